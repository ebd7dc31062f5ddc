//! A conversation: what was said, and how much of it a prompt has.

use std::fs::OpenOptions;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::generate::printable;
use crate::cli::output::table::elide;
use crate::rpc::pb;

/// Maximum number of turns that a note names.
const MAX_NAMED_TURNS: usize = 3;
/// Columns of a turn's name in a note.
const NAME_COLUMNS: usize = 40;

/// A message of the user with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ChatTurn {
    /// The message.
    pub user: String,
    /// The answer, or as much of it as came before it was stopped.
    pub answer: String,
    /// Seed of the answer.
    pub seed: u64,
}

/// All turns since the conversation began.
#[derive(Clone, Debug, Default)]
pub(super) struct Conversation {
    /// The system message.
    pub system: Option<String>,
    turns: Vec<ChatTurn>,
    /// Number of the oldest turns that prompts leave out, because they were too long with them.
    left_out: usize,
}

impl Conversation {
    /// Returns the number of turns.
    pub fn len(&self) -> usize {
        self.turns.len()
    }

    /// Returns the number of the oldest turns that prompts leave out.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Forgets all turns.
    pub fn reset(&mut self) {
        self.turns.clear();
        self.left_out = 0;
    }

    /// Adds a turn whose prompt left `left_out` turns out. Later prompts leave them out, too.
    pub fn add(&mut self, turn: ChatTurn, left_out: usize) {
        self.turns.push(turn);
        self.left_out = left_out;
    }

    /// Removes the last turn and returns it.
    pub fn remove_last(&mut self) -> Option<ChatTurn> {
        let last = self.turns.pop();
        self.left_out = self.left_out.min(self.turns.len());
        last
    }

    /// Returns role and text of the messages after the first `left_out` turns.
    fn messages(&self, left_out: usize) -> Vec<(&'static str, &str)> {
        let system = self.system.iter().map(|text| ("system", text.as_str()));
        let turns = self.turns.iter().skip(left_out).flat_map(|turn| {
            [
                ("user", turn.user.as_str()),
                ("assistant", turn.answer.as_str()),
            ]
        });
        system.chain(turns).collect()
    }

    /// Returns the prompt for a new message of the user, without the first `left_out` turns.
    pub fn prompt(&self, left_out: usize, user: &str) -> pb::Text {
        let mut all = self.messages(left_out);
        all.push(("user", user));
        let message = |(role, content): (&str, &str)| pb::Message {
            role: role.to_owned(),
            content: content.to_owned(),
            ..Default::default()
        };
        let messages = all.into_iter().map(message).collect();
        pb::Text {
            form: Some(pb::text::Form::Chat(pb::MessageList { messages })),
        }
    }

    /// Returns a note about the turns that a prompt without the first `left_out` turns leaves out
    /// and earlier prompts did not; `None` if there are none.
    pub fn note(&self, left_out: usize) -> Option<String> {
        let new = self.turns.get(self.left_out..left_out)?;
        let number = new.len();
        let turns = match number {
            0 => return None,
            1 => format!("turn {left_out}"),
            _ => format!("turns {} to {left_out}", self.left_out + 1),
        };
        let name = |turn: &ChatTurn| {
            let text = turn.user.replace(['\n', '\t'], " ");
            format!("“{}”", elide(&printable(&text), NAME_COLUMNS))
        };
        let mut names: Vec<String> = new.iter().take(MAX_NAMED_TURNS).map(name).collect();
        if number > MAX_NAMED_TURNS {
            names.push(format!("{} more", number - MAX_NAMED_TURNS));
        }
        let verb = if number == 1 { "is" } else { "are" };
        Some(format!(
            "note: the conversation is too long for one prompt: {turns} ({}) {verb} left out from \
             now on",
            names.join(", ")
        ))
    }

    /// Returns the whole conversation as a row with the column `messages`. `base` is the request of
    /// its messages.
    pub fn row(&self, base: &pb::GenerateCompletionsRequest) -> Value {
        let messages: Vec<Value> = self
            .messages(0)
            .into_iter()
            .map(|(role, content)| json!({"role": role, "content": content}))
            .collect();
        let seeds: Vec<u64> = self.turns.iter().map(|turn| turn.seed).collect();
        let mut row = json!({
            "messages": messages,
            "chat": {
                "policy": base.policy,
                "seeds": seeds,
                "left_out_turns": self.left_out,
            },
        });
        for (column, text) in [
            ("tools", &base.tools_json),
            ("chat_template_kwargs", &base.chat_template_kwargs_json),
        ] {
            // The server has accepted this JSON.
            if let Ok(value) = serde_json::from_str::<Value>(text) {
                row[column] = value;
            }
        }
        row
    }
}

/// Appends a line to a file, which is created if it does not exist. An incomplete line at its end
/// is ended first.
///
/// # Errors
/// Returns the error of the operating system.
pub(super) fn append(path: &Path, line: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .open(path)?;
    let mut last = [b'\n'];
    // Empty and special files have no last byte.
    let is_cut = file.seek(SeekFrom::End(-1)).is_ok()
        && file.read_exact(&mut last).is_ok()
        && last != [b'\n'];
    let start = if is_cut { "\n" } else { "" };
    file.write_all(format!("{start}{line}\n").as_bytes())?;
    match file.metadata()?.is_file() {
        true => file.sync_all(),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(number: u64) -> ChatTurn {
        ChatTurn {
            user: format!("question {number}\u{1b}"),
            answer: format!("answer {number}"),
            seed: number,
        }
    }

    fn contents(prompt: &pb::Text) -> Vec<&str> {
        let Some(pb::text::Form::Chat(list)) = &prompt.form else {
            panic!("{prompt:?}");
        };
        list.messages.iter().map(|m| m.content.as_str()).collect()
    }

    #[test]
    fn a_prompt_leaves_the_oldest_turns_out_and_the_row_has_all() {
        let mut conversation = Conversation {
            system: Some("Be brief.".into()),
            ..Default::default()
        };
        for number in 1..=5 {
            conversation.add(turn(number), 0);
        }
        let prompt = conversation.prompt(4, "next");
        let expected = ["Be brief.", "question 5\u{1b}", "answer 5", "next"];
        assert_eq!(contents(&prompt), expected);
        assert_eq!(conversation.note(0), None);
        let note = conversation.note(1).unwrap();
        assert!(
            note.contains("turn 1 (“question 1\u{fffd}”) is left"),
            "{note}"
        );
        let note = conversation.note(4).unwrap();
        assert!(note.contains("turns 1 to 4 (“question 1"), "{note}");
        assert!(note.contains("”, 1 more) are left"), "{note}");
        conversation.add(turn(6), 4);
        assert_eq!(conversation.note(4), None);
        let row = conversation.row(&pb::GenerateCompletionsRequest {
            policy: "models/tiny".into(),
            tools_json: "[]".into(),
            ..Default::default()
        });
        assert_eq!(row["messages"].as_array().map(Vec::len), Some(13));
        assert_eq!(row["messages"][1]["role"], "user");
        assert_eq!(row["chat"]["seeds"], json!([1, 2, 3, 4, 5, 6]));
        assert_eq!(row["chat"]["left_out_turns"], 4);
        assert_eq!(
            (&row["tools"], row.get("chat_template_kwargs")),
            (&json!([]), None)
        );

        // While turns are removed, at most all that remain are left out of a prompt.
        for left in (0..6).rev() {
            conversation.remove_last();
            assert_eq!(conversation.len(), left);
            assert!(conversation.left_out() <= left);
        }
        assert_eq!(conversation.remove_last(), None);
        assert_eq!(contents(&conversation.prompt(0, "x")), ["Be brief.", "x"]);
    }

    #[test]
    fn a_line_is_appended_after_an_incomplete_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chats.jsonl");
        append(&path, "1").unwrap();
        append(&path, "2").unwrap();
        std::fs::write(&path, "1\n2").unwrap();
        append(&path, "3").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\n3\n");
        append(Path::new("/dev/null"), "4").unwrap();
        assert!(append(dir.path(), "5").is_err());
    }
}
