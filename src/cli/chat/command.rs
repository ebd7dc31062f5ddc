//! Lines of a conversation: messages, and commands that begin with a slash.

use std::path::PathBuf;

use crate::domain::similar::nearest;

/// The text of `/help`, for 80 columns.
pub(super) const HELP: &str = "\
/reset        forget the conversation; the system message stays
/system TEXT  set the system message for the next messages; without TEXT: none
/retry        ask the last message again, for another answer
/seed N       the next answer has the seed N, the one after it N + 1;
              without N, seeds are random
/save FILE    append the conversation to FILE, as a line of JSON with messages
/help         show these commands
/quit         end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one.
Arrow up brings earlier messages back; pasted lines are one message.
A message that begins with / is written with two.";

/// Names of the commands.
const NAMES: [&str; 8] = [
    "/reset", "/system", "/retry", "/seed", "/save", "/help", "/quit", "/exit",
];

/// A line of the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ChatEntry {
    /// An empty line.
    Nothing,
    /// A message for the policy.
    Message(String),
    /// A command.
    Command(ChatCommand),
}

/// A command about the conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ChatCommand {
    /// Forgets the turns.
    Reset,
    /// Sets the system message, or removes it.
    System(Option<String>),
    /// Asks the last message again.
    Retry,
    /// Sets the seed of the next answer; `None` means random seeds.
    Seed(Option<u64>),
    /// Appends the conversation to a file.
    Save(PathBuf),
    /// Shows the commands.
    Help,
    /// Ends the conversation.
    Quit,
}

/// Parses a line.
///
/// # Errors
/// Returns a text that says what is wrong with a command.
pub(super) fn parse(line: &str) -> Result<ChatEntry, String> {
    if line.trim().is_empty() {
        return Ok(ChatEntry::Nothing);
    }
    let Some(after_slash) = line.strip_prefix('/') else {
        return Ok(ChatEntry::Message(line.to_owned()));
    };
    if after_slash.starts_with('/') {
        return Ok(ChatEntry::Message(after_slash.to_owned()));
    }
    let (name, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let argument = argument.trim();
    let given = (!argument.is_empty()).then_some(argument);
    let command = match name {
        "/system" => ChatCommand::System(given.map(str::to_owned)),
        "/seed" => ChatCommand::Seed(given.map(seed).transpose()?),
        "/save" => match given {
            Some(file) => ChatCommand::Save(file.into()),
            None => return Err("/save needs a file: /save FILE".to_owned()),
        },
        "/reset" => alone(name, argument, ChatCommand::Reset)?,
        "/retry" => alone(name, argument, ChatCommand::Retry)?,
        "/help" => alone(name, argument, ChatCommand::Help)?,
        "/quit" | "/exit" => alone(name, argument, ChatCommand::Quit)?,
        _ => return Err(unknown(name)),
    };
    Ok(ChatEntry::Command(command))
}

fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| {
        format!(
            "/seed {text}: a seed is a whole number from 0 to {}",
            u64::MAX
        )
    })
}

/// Returns a command that has no argument.
fn alone(name: &str, argument: &str, command: ChatCommand) -> Result<ChatCommand, String> {
    match argument {
        "" => Ok(command),
        other => Err(format!("{name} has no argument: leave {other:?} out")),
    }
}

fn unknown(name: &str) -> String {
    let meant = nearest(name, NAMES)
        .map(|known| format!("did you mean {known}? "))
        .unwrap_or_default();
    format!(
        "{name} is no command: {meant}/help lists them; a message that begins with / is written \
         with two: /{name}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> Result<ChatEntry, String> {
        Ok(ChatEntry::Message(text.to_owned()))
    }

    fn command(command: ChatCommand) -> Result<ChatEntry, String> {
        Ok(ChatEntry::Command(command))
    }

    #[test]
    fn messages_and_commands_are_told_apart() {
        assert_eq!(parse(" \t"), Ok(ChatEntry::Nothing));
        assert_eq!(parse(" a  b "), message(" a  b "));
        assert_eq!(parse(" /reset"), message(" /reset"));
        assert_eq!(parse("//etc/hosts"), message("/etc/hosts"));
        assert_eq!(parse("/reset"), command(ChatCommand::Reset));
        assert_eq!(parse("/exit "), command(ChatCommand::Quit));
        assert_eq!(parse("/seed 7"), command(ChatCommand::Seed(Some(7))));
        assert_eq!(parse("/seed"), command(ChatCommand::Seed(None)));
        assert_eq!(parse("/system"), command(ChatCommand::System(None)));
        let two_lines = Some("Be brief.\nAnd kind.".to_owned());
        let parsed = parse("/system Be brief.\nAnd kind.");
        assert_eq!(parsed, command(ChatCommand::System(two_lines)));
        let file = PathBuf::from("my file.jsonl");
        assert_eq!(
            parse("/save my file.jsonl"),
            command(ChatCommand::Save(file))
        );
    }

    #[test]
    fn every_command_is_known_and_a_wrong_one_is_explained() {
        for name in NAMES {
            let parsed = parse(&format!("{name} 1"));
            assert!(
                !parsed.is_err_and(|e| e.contains("is no command")),
                "{name}"
            );
            assert!(HELP.contains(name) || name == "/exit", "{name}");
        }
        for (line, part) in [
            ("/rest", "did you mean /reset?"),
            ("/etc/hosts is what?", "with two: //etc/hosts"),
            ("/seed -1", "a whole number"),
            ("/save", "/save FILE"),
            ("/reset all", "leave \"all\" out"),
        ] {
            assert!(parse(line).is_err_and(|e| e.contains(part)), "{line}");
        }
    }
}
