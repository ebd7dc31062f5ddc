//! The layout of every command's help: flags of the connection in a section of their own, and no
//! empty default values.

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

/// Lays out a command and its subcommands.
fn arrange(command: Command) -> Command {
    command
        .mut_args(|arg| section(without_empty_default(arg)))
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
}
