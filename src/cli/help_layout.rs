//! Rules for the flags of every command: those of the connection have a section of their own in the
//! help, an empty default is not shown, and a number may be negative, so that the error about it
//! names the flag.

use std::any::TypeId;
use std::ffi::{OsStr, OsString};

use clap::builder::UnknownArgumentValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Command, CommandFactory as _};

use super::args::Cli;

/// Flags of the connection to a server.
const CONNECTION: [&str; 8] = [
    "server",
    "servers",
    "connections",
    "wait_for_server",
    "token",
    "tls_server_ca",
    "tls_client_cert",
    "tls_client_key",
];
/// Heading of the section with them.
const HEADING: &str = "Connection";

/// Returns the definition of the command line with its layout.
pub(super) fn command() -> Command {
    arrange(Cli::command())
}

/// Returns the definition with better errors. Their usage lines are those of the help: clap's own
/// list every argument with a value, also those whose values come from environment variables. Names
/// that other programs use for a flag get a tip.
pub(super) fn with_plain_errors(command: Command) -> Command {
    // Only a built command knows the names of the commands above it.
    let mut built = command.clone();
    built.build();
    improve_errors(command, &mut built)
}

fn improve_errors(command: Command, built: &mut Command) -> Command {
    let rendered = built.render_usage().ansi().to_string();
    let command = match rendered.split_once(' ') {
        Some((_heading, usage)) => command.override_usage(usage.to_owned()),
        None => command,
    };
    with_names_of_others(command).mut_subcommands(|sub| {
        match built.find_subcommand_mut(sub.get_name()) {
            Some(built_sub) => improve_errors(sub, built_sub),
            None => sub,
        }
    })
}

/// Adds hidden flags with names that other programs use for `--days`. Their errors name it.
fn with_names_of_others(command: Command) -> Command {
    if command
        .get_arguments()
        .all(|arg| arg.get_id().as_str() != "days")
    {
        return command;
    }
    ["expires", "ttl"]
        .into_iter()
        .fold(command, |extended, name| {
            let meant = UnknownArgumentValueParser::suggest_arg("--days");
            extended.arg(Arg::new(name).long(name).hide(true).value_parser(meant))
        })
}

/// Joins a flag and a negative number behind it to one argument. The parser takes `-3` as the value
/// of a numeric flag, but mistakes `-1e-4`, `-.5` and `-1/2` for flags themselves.
pub(super) fn with_joined_numbers(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut joined: Vec<OsString> = Vec::new();
    let mut has_ended = false;
    for arg in args {
        has_ended = has_ended || arg == "--";
        let is_value = !has_ended && begins_as_negative_number(&arg);
        match joined.last_mut() {
            Some(flag) if is_value && takes_next(flag) => {
                flag.push("=");
                flag.push(arg);
            }
            _ => joined.push(arg),
        }
    }
    joined
}

/// Names `--format` in errors that concern `--output`, its hidden old name. The error about `--out`
/// of a command that has no such flag, for which the parser would suggest `--output`, says how a
/// result gets into a file. The error about a value of `--output`, which may be that of its
/// variable, names both.
pub(super) fn with_current_names(mut error: clap::Error) -> clap::Error {
    let argument = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(flag)) => flag.as_str(),
        _ => "",
    };
    let tip = match (error.kind(), argument) {
        (ErrorKind::UnknownArgument, "--out") => {
            error.remove(ContextKind::SuggestedArg);
            "write the result to a file with --format json > FILE"
        }
        (ErrorKind::InvalidValue, "--output <OUTPUT>") => {
            let current = ContextValue::String("--format <FORMAT>".to_owned());
            error.insert(ContextKind::InvalidArg, current);
            "the variable BRADLEY_OUTPUT, or --output, the old name of this flag, has this value"
        }
        _ => return error,
    };
    let tips = ContextValue::StyledStrs(vec![tip.into()]);
    error.insert(ContextKind::Suggested, tips);
    error
}

/// Returns true for a flag without a value of its own.
fn takes_next(arg: &OsStr) -> bool {
    let name = arg.to_str().and_then(|text| text.strip_prefix("--"));
    name.is_some_and(|name| !name.is_empty() && !name.contains('='))
}

fn begins_as_negative_number(arg: &OsStr) -> bool {
    let number = arg.to_str().and_then(|text| text.strip_prefix('-'));
    let digits = number.map(|number| number.strip_prefix('.').unwrap_or(number));
    digits.is_some_and(|digits| digits.starts_with(|c: char| c.is_ascii_digit()))
}

/// Lays out a command and its subcommands.
fn arrange(command: Command) -> Command {
    command
        .mut_args(|arg| section(without_empty_default(with_any_number(arg))))
        .mut_subcommands(arrange)
}

/// Moves a flag of the connection to its section.
fn section(arg: Arg) -> Arg {
    match arg.get_long().is_some() && CONNECTION.contains(&arg.get_id().as_str()) {
        true => arg.help_heading(HEADING),
        false => arg,
    }
}

/// Hides a default that is empty: the text of such a flag says what happens without it.
fn without_empty_default(arg: Arg) -> Arg {
    match arg.get_default_values() {
        [only] if only.is_empty() => arg.hide_default_value(true),
        _ => arg,
    }
}

/// Passes negative numbers to the parser of a numeric flag, which says what it expects. Without
/// this, `-3` counts as an unknown flag.
fn with_any_number(arg: Arg) -> Arg {
    let value_type = arg.get_value_parser().type_id();
    let numbers = [
        TypeId::of::<f64>(),
        TypeId::of::<i32>(),
        TypeId::of::<u8>(),
        TypeId::of::<u32>(),
        TypeId::of::<u64>(),
        TypeId::of::<usize>(),
    ];
    match numbers.iter().any(|number| value_type == *number) {
        true => arg.allow_negative_numbers(true),
        false => arg,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the help of every command, with the command's name before it.
    fn helps(command: &mut Command, before: &str, into: &mut Vec<(String, String)>) {
        let name = format!("{before} {}", command.get_name());
        into.push((name.clone(), command.render_long_help().to_string()));
        for sub in command.get_subcommands_mut() {
            helps(sub, &name, into);
        }
    }

    #[test]
    fn no_help_shows_an_empty_default_and_the_connection_has_a_section() {
        let mut all = Vec::new();
        helps(&mut command(), "", &mut all);
        assert!(all.len() > 30, "{}", all.len());
        for (name, help) in &all {
            assert!(!help.contains("[default: \"\"]"), "{name}:\n{help}");
            assert!(!help.contains("[default: ]"), "{name}:\n{help}");
            if let Some(server) = help.find("--server <") {
                let heading = help.find("\nConnection:\n");
                assert!(heading.is_some_and(|h| h < server), "{name}:\n{help}");
            }
        }
    }

    #[test]
    fn an_error_has_the_usage_line_of_the_help() {
        let helped = |line: &[&str]| {
            let mut plain = command();
            let refused = plain.try_get_matches_from_mut(line).unwrap_err();
            refused.to_string()
        };
        let usage = |text: &str| {
            let line = text.lines().find(|line| line.starts_with("Usage: "));
            line.unwrap().to_owned()
        };
        for (given, expected) in [
            (
                &["bradley", "jobs", "pause", "--server", "http://h:1"][..],
                "Usage: bradley jobs pause [OPTIONS] <NAME>",
            ),
            (
                &["bradley", "jobs", "diff", "--token", "t"],
                "Usage: bradley jobs diff [OPTIONS] <A> <B>",
            ),
            (
                &["bradley", "watch", "--server", "http://h:1"],
                "Usage: bradley watch [OPTIONS] <JOB>",
            ),
            (
                &["bradley", "jobs", "--format", "json", "remove"],
                "Usage: bradley jobs [OPTIONS] <COMMAND>",
            ),
        ] {
            let refused = with_plain_errors(command()).try_get_matches_from(given);
            let said = refused.unwrap_err().to_string();
            assert_eq!(usage(&said), expected, "{said}");
            // The help is the same with and without it.
            let help = [given, &["--help"]].concat();
            let with = with_plain_errors(command()).try_get_matches_from(&help);
            assert_eq!(with.unwrap_err().to_string(), helped(&help), "{given:?}");
        }
    }

    #[test]
    fn other_names_of_days_get_a_tip() {
        for name in ["--expires", "--ttl"] {
            let line = ["bradley", "tokens", "create", "--owner", "me", name, "7"];
            let refused = with_plain_errors(command()).try_get_matches_from(line);
            let said = refused.unwrap_err().to_string();
            assert!(said.contains(name) && said.contains("'--days'"), "{said}");
        }
        let line = [
            "bradley", "tokens", "create", "--owner", "me", "--days", "7",
        ];
        let parsed = with_plain_errors(command()).try_get_matches_from(line);
        assert!(parsed.is_ok(), "{parsed:?}");
    }

    #[test]
    fn a_negative_number_is_refused_with_the_flag_and_what_is_allowed() {
        let generate: &[&str] = &["generate", "--policy", "p", "--prompt", "x"];
        let files: &[&str] = &["score-files", "--in", "x", "--out", "y", "--policy", "p"];
        let curate: &[&str] = &["curate", "--data", "x", "--out", "y"];
        let train: &[&str] = &["train", "--data", "x"];
        let serve: &[&str] = &["serve"];
        let parsed = |given: &[&str], flag: &str| {
            let line = [&["bradley"][..], given, &[flag, "-3"]].concat();
            command().try_get_matches_from(line)
        };
        let whole = format!("it must be a whole number from 0 to {}", u64::MAX);
        let from_one = "it must be a whole number, at least 1";
        for (given, flag, expected) in [
            (generate, "--top-k", "it must be a whole number, at least 0"),
            (generate, "--max-tokens", from_one),
            (generate, "--seed", whole.as_str()),
            (generate, "--retry-timeout", whole.as_str()),
            (files, "--part-rows", "-3 is not in 1..=1000000"),
            (files, "--connections", "-3 is not in 1..=64"),
            (files, "--threads", whole.as_str()),
            (curate, "--folds", "-3 is not in 2..=100"),
        ] {
            let said = parsed(given, flag).unwrap_err().to_string();
            let place = format!("'-3' for '{flag} <");
            assert!(said.contains(&place) && said.contains(expected), "{said}");
        }
        // The command or the server says what is wrong with these.
        for (given, flag) in [
            (generate, "--temperature"),
            (curate, "--rank"),
            (curate, "--batch-size"),
            (curate, "--max-length"),
            (curate, "--agrees-from"),
            (train, "--ttl"),
            (serve, "--threads"),
        ] {
            let refused = parsed(given, flag).err();
            assert!(refused.is_none(), "{flag}: {refused:?}");
        }
    }

    /// Says how each flag of a command that is a whole number from 0 or more refuses `-3`.
    fn refusals(command: &Command, into: &mut Vec<(String, String)>) {
        let unsigned = [
            TypeId::of::<u8>(),
            TypeId::of::<u32>(),
            TypeId::of::<u64>(),
            TypeId::of::<usize>(),
        ];
        for arg in command.get_arguments() {
            let parser = arg.get_value_parser();
            if unsigned.iter().any(|number| parser.type_id() == *number) {
                let flag = Arg::new("n").long("n").value_parser(parser.clone());
                let alone = Command::new("x").arg(flag.allow_negative_numbers(true));
                let refused = alone.try_get_matches_from(["x", "--n", "-3"]).unwrap_err();
                let name = format!("{} --{}", command.get_name(), arg.get_id());
                into.push((name, refused.to_string()));
            }
        }
        for sub in command.get_subcommands() {
            refusals(sub, into);
        }
    }

    #[test]
    fn every_flag_refuses_a_number_below_its_range_with_the_range() {
        let mut all = Vec::new();
        refusals(&command(), &mut all);
        assert!(all.len() > 20, "{}", all.len());
        for (flag, said) in &all {
            let has_range = said.contains("it must be ") || said.contains(" is not in ");
            assert!(has_range, "{flag}: {said}");
            assert!(!said.contains("..=4294967295"), "{flag}: {said}");
        }
    }

    #[test]
    fn a_flag_takes_every_form_of_a_negative_number() {
        let joined = |line: &str| with_joined_numbers(line.split(' ').map(OsString::from));
        for (line, expected) in [
            ("train --learning-rate -1e-4", "train --learning-rate=-1e-4"),
            ("pairs --beta -.5 --top-k 3", "pairs --beta=-.5 --top-k 3"),
            ("score-files --shard -1/2", "score-files --shard=-1/2"),
            ("train --beta=0.1 -1", "train --beta=0.1 -1"),
            ("x --temperature --top-k 3", "x --temperature --top-k 3"),
            ("x -- --beta -1", "x -- --beta -1"),
            ("x -- -1", "x -- -1"),
            ("x --data - -h", "x --data - -h"),
        ] {
            let expected: Vec<OsString> = expected.split(' ').map(OsString::from).collect();
            assert_eq!(joined(line), expected);
        }
        let parsed = |line: &str| command().try_get_matches_from(joined(line));
        for taken in [
            "bradley train --data x --learning-rate -1e-4",
            "bradley generate --policy p --prompt x --temperature -.5",
            "bradley score-files --in x --out y --policy p --shard -1/2",
        ] {
            let refused = parsed(taken).err();
            assert!(refused.is_none(), "{taken}: {refused:?}");
        }
        let files = "bradley score-files --in x --out y --policy p --part-rows -1e3";
        let said = parsed(files).unwrap_err().to_string();
        assert!(said.contains("'-1e3' for '--part-rows <"), "{said}");
        let generate = "bradley generate --policy p --prompt x --temperature --top-k 3";
        let said = parsed(generate).unwrap_err().to_string();
        assert!(
            said.contains("value is required for '--temperature <"),
            "{said}"
        );
    }

    #[test]
    fn the_error_about_a_missing_flag_for_a_file_names_the_format() {
        let said = |line: &str| {
            let refused = command().try_get_matches_from(line.split(' '));
            with_current_names(refused.unwrap_err()).to_string()
        };
        for line in [
            "bradley score --policy p --data x --out y",
            "bradley evaluate --policy p --data x --out=y",
        ] {
            let text = said(line);
            assert!(text.contains("unexpected argument '--out' found"), "{text}");
            assert!(text.contains("tip: write the result to a file"), "{text}");
            assert!(!text.contains("--output"), "{text}");
        }
        let text = said("bradley score --policy p --data x --polic y");
        assert!(text.contains("'--policy'"), "{text}");
        let text = said("bradley jobs list --output xml");
        assert!(text.contains("'xml' for '--format <FORMAT>'"), "{text}");
        assert!(
            text.contains("tip: the variable BRADLEY_OUTPUT, or"),
            "{text}"
        );
    }
}
