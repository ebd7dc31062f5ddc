//! Rows of inputs: pairs, several answers to a prompt, or the reason why a row is neither.

use std::sync::OnceLock;

use serde_json::{Map, Value};

use crate::cli::args::LoggedColumns;
use crate::cli::data::ColumnMap;
use crate::cli::score::logged::select_columns;
use crate::domain::dataset::{IssueReason, PreferenceRow, RowIssue, Text};
use crate::domain::message::TemplateArguments;
use crate::train::rows::names::COMPLETIONS_COLUMN;
use crate::train::rows::{pairs_of_line, pairs_of_record};

/// Maximum number of answers to one prompt: the limit of ScoreCompletions.
const MAX_ANSWERS: usize = 256;
/// Error of a row with several answers, the log-probs of which no call takes.
const SEVERAL_WITH_LOGGED: &str = "--logged takes rows with one chosen and one rejected answer: \
    give each pair a row of its own with its log-probs, or leave --logged out";

/// A row of an input.
#[derive(Debug)]
pub(super) struct InputRow {
    /// Its number in the input, from 1; blank lines count.
    pub row: u64,
    pub id: Option<String>,
    /// Values of the columns that are carried, in the order of `--carry`.
    pub carried: Vec<Value>,
    /// True if the row cannot be scored because it lacks a column.
    pub lacks_column: bool,
    pub content: RowContent,
}

/// The texts of a row.
#[derive(Debug)]
pub(super) enum RowContent {
    Pair(Box<PreferenceRow>),
    Answers(Box<PromptAnswers>),
    /// The reason why the row cannot be scored.
    Bad(String),
}

/// Several answers to one prompt.
#[derive(Debug)]
pub(super) struct PromptAnswers {
    pub prompt: Text,
    pub answers: Vec<Text>,
    /// The column of each answer in the input, with the place in its list: `rejected[1]`.
    pub columns: Vec<String>,
    pub arguments: TemplateArguments,
}

/// How rows are read.
#[derive(Clone, Debug, Default)]
pub(super) struct RowReading {
    /// Columns that are carried, by their names in the input.
    pub carry: Vec<String>,
    /// The names that columns of the input have in our format.
    pub columns: ColumnMap,
    /// The log-probs that rows must have and that are used.
    pub logged: Option<LoggedColumns>,
    /// All columns of the first row of JSON that was read.
    pub first_columns: OnceLock<Vec<String>>,
}

impl RowReading {
    /// Reads a line of JSON; `None` for a blank one.
    pub(super) fn line(&self, row: u64, line: &[u8]) -> Option<InputRow> {
        if line.iter().all(u8::is_ascii_whitespace) {
            return None;
        }
        Some(match serde_json::from_slice::<Map<String, Value>>(line) {
            Ok(fields) => self.whole_record(row, fields),
            Err(_) => {
                let findings = pairs_of_line(row, line).find_map(Result::err);
                let message = findings.map_or_else(
                    || "the line is not a JSON object".to_owned(),
                    |issue| issue.message_with_field(),
                );
                InputRow::bad(row, message)
            }
        })
    }

    /// Reads a record with all columns of the row.
    pub(super) fn whole_record(&self, row: u64, fields: Map<String, Value>) -> InputRow {
        self.first_columns
            .get_or_init(|| fields.keys().cloned().collect());
        self.record(row, fields)
    }

    /// Reads a record, which may have only the columns that are needed.
    pub(super) fn record(&self, row: u64, fields: Map<String, Value>) -> InputRow {
        let value = |name: &String| fields.get(name).cloned().unwrap_or_default();
        let carried = self.carry.iter().map(value).collect();
        let fields = self.columns.renamed(fields);
        let id = match fields.get("id") {
            Some(Value::String(id)) => Some(id.clone()),
            Some(Value::Number(id)) => Some(id.to_string()),
            _ => None,
        };
        let has_completions = fields
            .get(COMPLETIONS_COLUMN)
            .is_some_and(|completions| !completions.is_null());
        let content = match has_completions {
            true => answers(row, fields),
            false => pairs(row, fields),
        };
        let mut content = content.and_then(|content| self.with_logged(content));
        if let Ok(RowContent::Answers(answers)) = &mut content {
            for column in &mut answers.columns {
                *column = self.columns.original(column);
            }
        }
        let lacks_column =
            matches!(&content, Err(issue) if issue.reason == IssueReason::MissingField);
        InputRow {
            row,
            id,
            carried,
            lacks_column,
            content: content.unwrap_or_else(|issue| {
                let message = self.columns.message(&issue.field, &issue.message);
                let field = self.columns.original(&issue.field);
                let issue = RowIssue {
                    field,
                    message,
                    ..issue
                };
                RowContent::Bad(issue.message_with_field())
            }),
        }
    }

    /// Removes the log-probs that are not used from a pair.
    ///
    /// # Errors
    /// Returns a finding if the pair lacks one that is used.
    fn with_logged(&self, content: RowContent) -> Result<RowContent, RowIssue> {
        Ok(match content {
            RowContent::Pair(pair) => {
                RowContent::Pair(Box::new(select_columns(*pair, self.logged)?))
            }
            RowContent::Answers(_) if self.logged.is_some() => {
                RowContent::Bad(SEVERAL_WITH_LOGGED.to_owned())
            }
            other => other,
        })
    }
}

impl InputRow {
    /// Returns a row that cannot be read at all.
    pub(super) fn bad(row: u64, message: String) -> Self {
        InputRow {
            row,
            id: None,
            carried: Vec::new(),
            lacks_column: false,
            content: RowContent::Bad(message),
        }
    }
}

/// Reads a row with `chosen` and `rejected`. Several answers are ranked together, the chosen ones
/// first.
fn pairs(row: u64, fields: Map<String, Value>) -> Result<RowContent, RowIssue> {
    let is_list = |column: &str| has_list(&fields, column);
    let (chosen_is_list, rejected_is_list) = (is_list("chosen"), is_list("rejected"));
    let rejected_count = match fields.get("rejected") {
        Some(Value::Array(all)) if rejected_is_list => all.len(),
        _ => 1,
    };
    let mut pairs = pairs_of_record(row, fields).collect::<Result<Vec<_>, _>>()?;
    if pairs.len() < 2 {
        return Ok(match pairs.pop() {
            Some(pair) => RowContent::Pair(Box::new(pair)),
            None => RowContent::Bad("rejected has no answer".to_owned()),
        });
    }
    let PreferenceRow {
        prompt, arguments, ..
    } = pairs[0].clone();
    // Whole dialogues may have more messages in common in one pair than in another.
    if pairs.iter().any(|pair| pair.prompt != prompt) {
        return Ok(RowContent::Bad(
            "the answers continue different prompts: give the common prompt in the column prompt, \
             and only the messages after it in chosen and rejected"
                .to_owned(),
        ));
    }
    // Each chosen answer has a pair with each rejected one, in the order of the rejected ones.
    let chosen = pairs.iter().step_by(rejected_count).map(|p| &p.chosen);
    let rejected = pairs.iter().take(rejected_count).map(|p| &p.rejected);
    let mut columns = answer_columns("chosen", chosen_is_list, chosen.len());
    columns.extend(answer_columns("rejected", rejected_is_list, rejected.len()));
    let answers = chosen.chain(rejected).cloned().collect();
    Ok(RowContent::Answers(Box::new(PromptAnswers {
        prompt,
        answers,
        columns,
        arguments,
    })))
}

/// Returns true if a column has a list of answers: texts, or lists of messages.
fn has_list(fields: &Map<String, Value>, column: &str) -> bool {
    match fields.get(column) {
        Some(Value::Array(all)) => {
            matches!(all[..], [Value::String(_) | Value::Array(_), ..])
        }
        _ => false,
    }
}

/// Returns the names of the answers in a column, which has one answer or a list.
fn answer_columns(column: &str, is_list: bool, count: usize) -> Vec<String> {
    match is_list {
        true => (0..count).map(|at| format!("{column}[{at}]")).collect(),
        false => vec![column.to_owned(); count],
    }
}

/// Reads a row with `completions`. Each is read as the rejected answer of a pair that has the first
/// one as the chosen answer, so that answers have the same forms as in pairs.
fn answers(row: u64, mut fields: Map<String, Value>) -> Result<RowContent, RowIssue> {
    let bad = |message: String| Ok(RowContent::Bad(message));
    let completions = match fields.remove(COMPLETIONS_COLUMN) {
        Some(Value::Array(completions)) => completions,
        _ => return bad("completions is not a list: make it a list of answers".to_owned()),
    };
    if completions.is_empty() || completions.len() > MAX_ANSWERS {
        return bad(format!(
            "completions has {} answers: give 1 to {MAX_ANSWERS}",
            completions.len()
        ));
    }
    if fields.get("prompt").is_none_or(Value::is_null) {
        return bad("prompt is missing: a row with completions needs one".to_owned());
    }
    // These columns would make the row one of another shape.
    for column in ["chosen", "rejected", "input", "question"] {
        fields.remove(column);
    }
    let mut texts: Option<PromptAnswers> = None;
    for (at, completion) in completions.iter().enumerate() {
        let mut pair = fields.clone();
        pair.insert("chosen".to_owned(), completions[0].clone());
        pair.insert("rejected".to_owned(), completion.clone());
        let pair = pairs_of_record(row, pair).next();
        // The finding names the column of the pair, which the row does not have.
        let named = |issue: RowIssue| {
            let (field, place) = (issue.field.as_str(), format!("completions[{at}]"));
            let answer = ["chosen", "rejected"]
                .into_iter()
                .find(|answer| field.starts_with(answer));
            let renamed = |answer: &str, text: &str| match text.strip_prefix(answer) {
                Some(rest) => format!("{place}{rest}"),
                None => text.to_owned(),
            };
            match answer {
                Some(answer) => RowIssue {
                    field: renamed(answer, field),
                    message: renamed(answer, &issue.message),
                    ..issue
                },
                None => issue,
            }
        };
        let Some(pair) = pair.transpose().map_err(named)? else {
            return bad(format!("completions[{at}] is empty: give an answer"));
        };
        match &mut texts {
            None => {
                texts = Some(PromptAnswers {
                    prompt: pair.prompt,
                    answers: vec![pair.rejected],
                    columns: answer_columns(COMPLETIONS_COLUMN, true, completions.len()),
                    arguments: pair.arguments,
                });
            }
            Some(texts) if texts.prompt == pair.prompt => texts.answers.push(pair.rejected),
            Some(_) => {
                return bad(format!(
                    "completions[{at}] continues another prompt than completions[0]: give only the \
                     messages after the prompt"
                ));
            }
        }
    }
    Ok(match texts {
        Some(texts) => RowContent::Answers(Box::new(texts)),
        None => RowContent::Bad("completions is empty".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(columns: &[&str]) -> RowReading {
        let columns: Vec<String> = columns.iter().map(|pair| (*pair).to_owned()).collect();
        RowReading {
            carry: vec!["source".to_owned()],
            columns: ColumnMap::parse(&columns).unwrap(),
            ..Default::default()
        }
    }

    fn read(line: &str) -> InputRow {
        reading(&[]).line(7, line.as_bytes()).unwrap()
    }

    fn refusal(line: &str) -> String {
        match read(line).content {
            RowContent::Bad(message) => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pairs_and_several_answers_are_read() {
        let row =
            read(r#"{"id": 3, "prompt": "p", "chosen": "a", "rejected": "b", "source": [1]}"#);
        assert_eq!((row.row, row.id.as_deref()), (7, Some("3")));
        assert_eq!(row.carried, [serde_json::json!([1])]);
        assert!(matches!(row.content, RowContent::Pair(pair) if pair.pair.is_none()));
        let plain = |text: &str| Text::Plain(text.to_owned());
        for line in [
            r#"{"prompt": "p", "completions": ["a", "b", "c"]}"#,
            r#"{"prompt": "p", "chosen": "a", "rejected": ["b", "c"]}"#,
        ] {
            let RowContent::Answers(row) = read(line).content else {
                panic!("{line}")
            };
            assert_eq!(row.prompt, plain("p"));
            assert_eq!(row.answers, ["a", "b", "c"].map(plain));
        }
        let several = r#"{"prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d", "e"]}"#;
        let RowContent::Answers(row) = read(several).content else {
            panic!("{several}")
        };
        assert_eq!(row.answers, ["a", "b", "c", "d", "e"].map(plain));
        let columns = [
            "chosen[0]",
            "chosen[1]",
            "rejected[0]",
            "rejected[1]",
            "rejected[2]",
        ];
        assert_eq!(row.columns, columns);
        let one_rejected = r#"{"prompt": "p", "chosen": ["a", "b"], "rejected": "c"}"#;
        let RowContent::Answers(row) = read(one_rejected).content else {
            panic!("{one_rejected}")
        };
        assert_eq!(row.answers, ["a", "b", "c"].map(plain));
        assert_eq!(row.columns, ["chosen[0]", "chosen[1]", "rejected"]);
        assert!(reading(&[]).line(1, b" \t").is_none());
    }

    #[test]
    fn mapped_columns_are_read_by_our_names_and_carried_and_named_by_theirs() {
        let reading = reading(&["prompt=source", "chosen=good", "rejected=bad", "id=key"]);
        let line = br#"{"key": "k", "source": "p", "good": "a", "bad": "b", "chosen": 7}"#;
        let row = reading.line(1, line).unwrap();
        assert_eq!(row.id.as_deref(), Some("k"));
        assert_eq!(row.carried, [serde_json::json!("p")]);
        let RowContent::Pair(pair) = row.content else {
            panic!("{row:?}")
        };
        let plain = |text: &str| Text::Plain(text.to_owned());
        assert_eq!((pair.prompt, pair.chosen), (plain("p"), plain("a")));
        let line = br#"{"source": "p", "good": "a"}"#;
        let RowContent::Bad(message) = reading.line(1, line).unwrap().content else {
            panic!()
        };
        assert!(message.starts_with("bad is missing"), "{message}");
        let line = br#"{"source": "p", "good": "a", "bad": ["b", "c"]}"#;
        let RowContent::Answers(row) = reading.line(1, line).unwrap().content else {
            panic!()
        };
        assert_eq!(row.columns, ["good", "bad[0]", "bad[1]"]);
    }

    #[test]
    fn answers_of_a_row_continue_one_prompt() {
        let message =
            |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        let dialogue = |texts: &[&str]| -> Value {
            let roles = ["user", "assistant"].into_iter().cycle();
            roles
                .zip(texts)
                .map(|(role, text)| message(role, text))
                .collect()
        };
        let row = |rejected: [&[&str]; 2]| {
            let row = serde_json::json!({
                "chosen": dialogue(&["q", "a", "q2", "a2"]),
                "rejected": rejected.map(dialogue),
            });
            row.to_string()
        };
        let alike = row([&["q", "a", "q2", "b"], &["q", "a", "q2", "c"]]);
        assert!(matches!(read(&alike).content, RowContent::Answers(row) if row.answers.len() == 3));
        let different = row([&["q", "a", "q2", "b"], &["q", "c"]]);
        assert!(refusal(&different).contains("continue different prompts"));
    }

    #[test]
    fn a_row_has_the_log_probs_that_are_used_or_an_error() {
        let content = |logged: LoggedColumns, line: &str| {
            let reading = RowReading {
                logged: Some(logged),
                ..reading(&["ref_chosen_logps=theirs"])
            };
            reading.line(1, line.as_bytes()).unwrap().content
        };
        let line = r#"{"prompt": "p", "chosen": "a", "rejected": "b", "theirs": -1.5,
            "ref_rejected_logps": -2, "chosen_logps": -3, "rejected_logps": -4}"#;
        let sums = |content: RowContent| {
            let RowContent::Pair(pair) = content else {
                panic!("{content:?}")
            };
            let logged = pair.logged;
            (logged.of_reference().ok(), logged.of_policy().ok())
        };
        assert_eq!(sums(read(line).content), (None, None));
        let (of_reference, of_policy) = (Some([-1.5, -2.0]), Some([-3.0, -4.0]));
        let found = sums(content(LoggedColumns::Reference, line));
        assert_eq!(found, (of_reference, None));
        let found = sums(content(LoggedColumns::Both, line));
        assert_eq!(found, (of_reference, of_policy));
        let one = r#"{"prompt": "p", "chosen": "a", "rejected": "b", "ref_rejected_logps": -2}"#;
        let none = r#"{"prompt": "p", "chosen": "a", "rejected": "b"}"#;
        let several = r#"{"prompt": "p", "chosen": "a", "rejected": ["b", "c"]}"#;
        let completions = r#"{"prompt": "p", "completions": ["a"]}"#;
        for (line, expected) in [
            (one, "theirs is missing, but the row has ref_rejected_logps"),
            (none, "theirs and ref_rejected_logps are missing: add the"),
            (several, "--logged takes rows with one chosen and one"),
            (completions, "--logged takes rows with one chosen and one"),
        ] {
            let RowContent::Bad(message) = content(LoggedColumns::Both, line) else {
                panic!("{line}")
            };
            assert!(message.starts_with(expected), "{message}");
        }
    }

    #[test]
    fn a_bad_row_says_what_is_wrong() {
        assert!(refusal("{\"prompt\": 1").contains("JSON"));
        assert!(refusal("[]").contains("JSON"));
        assert!(read(r#"{"prompt": "p", "chosen": "a"}"#).lacks_column);
        assert!(!read(r#"{"prompt": "p", "chosen": "a", "rejected": 5}"#).lacks_column);
        assert!(refusal(r#"{"prompt": "p", "chosen": "a"}"#).contains("rejected is missing"));
        assert!(refusal(r#"{"completions": ["a"]}"#).contains("prompt is missing"));
        assert!(refusal(r#"{"prompt": "p", "completions": []}"#).contains("1 to 256"));
        assert!(refusal(r#"{"prompt": "p", "completions": "a"}"#).contains("not a list"));
        let message = refusal(r#"{"prompt": "p", "completions": ["a", 5]}"#);
        assert!(message.contains("completions[1] is a number"), "{message}");
    }
}
