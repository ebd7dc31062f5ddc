//! Recognises row shapes of other tools and converts them into one: `prompt`, `chosen` and
//! `rejected`.
//!
//! - `preference`: `prompt`, `chosen` and `rejected` in one form.
//! - `implicit_prompt`: `chosen` and `rejected` as whole dialogues. The messages that they share
//!   are the prompt.
//! - `implicit_prompt_text`: `chosen` and `rejected` as plain texts without `prompt`, split as by
//!   TRL's `extract_prompt`.
//! - `openai_preference`: `input.messages`, `preferred_output` and `non_preferred_output`, the
//!   format of OpenAI's fine-tuning.
//! - `hh`: `chosen` and `rejected` as texts of "\n\nHuman: …\n\nAssistant: …", as in
//!   Anthropic's HH-RLHF.
//! - `ultrafeedback`: `chosen` and `rejected` as whole dialogues, and `prompt` with the text of
//!   their first user message (UltraFeedback, binarised).
//! - `orca`: `question`, `chosen` and `rejected` as plain texts, as in Intel/orca_dpo_pairs. They
//!   become messages of the user and of the assistant.
//! - `several_rejected`: a list of rejected answers. Each makes a pair with the chosen answer,
//!   which may be the only element of a list, as in RewardBench 2.
//! - `several_answers`: a list of several chosen answers, each of which makes a pair with each
//!   rejected answer.
//!
//! A `system` column becomes the system message of a dialogue ([`row::from_fields`]).
//! Every other column stays as it is. A row with several answers counts as one row: each of its n
//! pairs has the row's weight divided by n, and its id has the suffix `#1` to `#n`.

use serde_json::{Map, Value, json};

use super::logged::LoggedOfAnswers;
use super::names::{OPENAI_COLUMNS, QUESTION_COLUMN, found};
use super::reader::issue;
use super::row;
use crate::domain::dataset::{IssueReason, MAX_MESSAGES, PreferenceRow, RowIssue, RowShape};

/// Maximum number of chosen or of rejected answers in a row.
pub(super) const MAX_ANSWERS: usize = 64;
/// Maximum number of pairs that a row makes.
const MAX_PAIRS: usize = 1024;
/// Pairs of our column name and the file's in the shape `orca`.
const ORCA_NAMES: [(&str, &str); 1] = [("prompt", QUESTION_COLUMN)];
/// Pairs of our column name and OpenAI's.
const OPENAI_NAMES: [(&str, &str); 3] = [
    ("prompt", "input.messages"),
    ("chosen", OPENAI_COLUMNS[1]),
    ("rejected", OPENAI_COLUMNS[2]),
];

/// A row's number and columns, or the finding that it cannot be read.
pub(super) type Record = Result<(u64, Map<String, Value>), RowIssue>;

/// Returns the pairs of a record: one, or those of several answers. They are created one at a time,
/// because each has a copy of the prompt.
pub(super) fn pairs(record: Record) -> Pairs {
    Pairs(match record {
        Err(issue) => Rest::One(Some(Err(issue))),
        Ok((row, fields)) if has_several_answers(&fields) => match Several::new(row, fields) {
            Ok(several) => Rest::Several(several),
            Err(issue) => Rest::One(Some(Err(issue))),
        },
        Ok((row, fields)) => Rest::One(Some(read(row, fields))),
    })
}

/// Iterator over the pairs of one row.
pub(super) struct Pairs(Rest);

enum Rest {
    One(Option<Result<PreferenceRow, RowIssue>>),
    Several(Several),
}

impl Iterator for Pairs {
    type Item = Result<PreferenceRow, RowIssue>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.0 {
            Rest::One(pair) => pair.take(),
            Rest::Several(several) => several.next(),
        }
    }
}

/// Iterator over the pairs of a row with several answers, with the chosen answers in the outer
/// loop.
struct Several {
    row: u64,
    /// All columns except `chosen` and `rejected`.
    fields: Map<String, Value>,
    logged: LoggedOfAnswers,
    chosen: AnswerColumn,
    rejected: AnswerColumn,
    id: Option<String>,
    /// Number of pairs, and of those that have been returned.
    count: usize,
    returned: usize,
}

/// The answers in one column.
struct AnswerColumn {
    column: &'static str,
    values: Vec<Value>,
    /// False if the column has a single answer without a list.
    is_list: bool,
}

/// Returns true if a column is a list of answers (texts or lists of messages). A list of objects is
/// a single answer.
fn is_list_of_answers(value: Option<&Value>) -> bool {
    let first = value.and_then(Value::as_array).and_then(|all| all.first());
    first.is_some_and(|first| first.is_string() || first.is_array())
}

fn has_several_answers(fields: &Map<String, Value>) -> bool {
    is_list_of_answers(fields.get("chosen")) || is_list_of_answers(fields.get("rejected"))
}

impl AnswerColumn {
    /// Takes a column's answers out of a row. `refuse` makes the finding for a message.
    fn take(
        fields: &mut Map<String, Value>,
        column: &'static str,
        refuse: impl Fn(&str, IssueReason, String) -> RowIssue,
    ) -> Result<Self, RowIssue> {
        let is_list = is_list_of_answers(fields.get(column));
        let values = match fields.remove(column) {
            Some(Value::Array(values)) if is_list => values,
            None | Some(Value::Null) => {
                let message = format!("{column} is missing");
                return Err(refuse(column, IssueReason::MissingField, message));
            }
            Some(one) => vec![one],
        };
        let count = values.len();
        if count > MAX_ANSWERS {
            let message = format!(
                "{column} has {count} answers: {MAX_ANSWERS} are the limit, so split the row"
            );
            return Err(refuse(column, IssueReason::InvalidType, message));
        }
        if is_list && !values.iter().all(Value::is_string) && !values.iter().all(Value::is_array) {
            let message =
                format!("{column} mixes texts and lists of messages: use one form for all answers");
            return Err(refuse(column, IssueReason::InvalidType, message));
        }
        Ok(AnswerColumn {
            column,
            values,
            is_list,
        })
    }

    /// Returns the path of an answer.
    fn path(&self, index: usize) -> String {
        match self.is_list {
            true => format!("{}[{index}]", self.column),
            false => self.column.to_owned(),
        }
    }
}

impl Several {
    fn new(row: u64, mut fields: Map<String, Value>) -> Result<Self, RowIssue> {
        let id = id(&fields);
        let wrong = |field: &str, reason, message: String| RowIssue {
            id: id.clone(),
            ..issue(row, field, reason, message)
        };
        let rejected = AnswerColumn::take(&mut fields, "rejected", wrong)?;
        let chosen = AnswerColumn::take(&mut fields, "chosen", wrong)?;
        let count = chosen.values.len() * rejected.values.len();
        if count > MAX_PAIRS {
            let message = format!(
                "chosen and rejected make {count} pairs: {MAX_PAIRS} are the limit, so split the \
                 row"
            );
            return Err(wrong("rejected", IssueReason::InvalidType, message));
        }
        let splits_dialogues = |text: &str| hh_messages(text).is_some();
        if is_absent(&fields, "prompt")
            && !fields.get(QUESTION_COLUMN).is_some_and(Value::is_string)
            && rejected.values.iter().any(Value::is_string)
            && !chosen
                .values
                .iter()
                .all(|answer| answer.as_str().is_some_and(splits_dialogues))
        {
            let message = "prompt is missing: a row with several answers in plain text needs one";
            return Err(wrong(
                "prompt",
                IssueReason::MissingField,
                message.to_owned(),
            ));
        }
        let weight = match fields.get("weight") {
            None | Some(Value::Null) => Some(1.0),
            Some(given) => given.as_f64(),
        };
        // Other weights are invalid; they stay unchanged and are reported later.
        if let Some(weight) = weight.filter(|weight| *weight > 0.0) {
            fields.insert("weight".to_owned(), json!(weight / count as f64));
        }
        let counts = [chosen.values.len(), rejected.values.len()];
        let logged = LoggedOfAnswers::take(&mut fields, counts);
        Ok(Several {
            row,
            fields,
            logged,
            chosen,
            rejected,
            id,
            count,
            returned: 0,
        })
    }

    fn next(&mut self) -> Option<Result<PreferenceRow, RowIssue>> {
        if self.returned == self.count {
            return None;
        }
        let (chosen, rejected) = (
            self.returned / self.rejected.values.len(),
            self.returned % self.rejected.values.len(),
        );
        self.returned += 1;
        let place = self.returned;
        let is_last = place == self.count;
        let mut fields = if is_last {
            std::mem::take(&mut self.fields)
        } else {
            self.fields.clone()
        };
        let answers = [(&self.chosen, chosen), (&self.rejected, rejected)];
        for (answers, index) in answers {
            fields.insert(answers.column.to_owned(), answers.values[index].clone());
        }
        self.logged.add([chosen, rejected], &mut fields);
        if let (Some(id), true) = (&self.id, self.count > 1) {
            fields.insert("id".to_owned(), Value::String(format!("{id}#{place}")));
        }
        let pair = (self.count > 1).then_some(place as u32);
        let paths = answers.map(|(answers, index)| (answers.column, answers.path(index)));
        let named = paths
            .each_ref()
            .map(|(ours, theirs)| (*ours, theirs.as_str()));
        let shape = match self.chosen.values.len() {
            1 => RowShape::SeveralRejected,
            _ => RowShape::SeveralAnswers,
        };
        Some(match read(self.row, fields) {
            Ok(row) => Ok(PreferenceRow { shape, pair, ..row }),
            Err(issue) => Err(renamed(issue, &named)),
        })
    }
}

/// Reads a row with one chosen and one rejected answer.
fn read(row: u64, mut fields: Map<String, Value>) -> Result<PreferenceRow, RowIssue> {
    let id = id(&fields);
    let shape = normalise(row, &mut fields).map_err(|issue| RowIssue { id, ..issue })?;
    let mut pair = match row::from_fields(row, fields) {
        Err(issue) if shape == RowShape::OpenaiPreference => {
            return Err(renamed(issue, &OPENAI_NAMES));
        }
        Err(issue) if shape == RowShape::Orca => return Err(renamed(issue, &ORCA_NAMES)),
        pair => pair?,
    };
    if shape == RowShape::OpenaiPreference {
        pair.ignored
            .iter_mut()
            .for_each(|path| *path = renamed_path(path, &OPENAI_NAMES));
    }
    pair.shape = shape;
    Ok(pair)
}

/// Converts the columns of a row to `prompt`, `chosen` and `rejected`. Whole dialogues are left
/// without a prompt, and [`row::from_fields`] splits them. Columns of an unknown shape stay
/// unchanged, and the code that reads them reports the problem.
fn normalise(row: u64, fields: &mut Map<String, Value>) -> Result<RowShape, RowIssue> {
    let has_answers = !is_absent(fields, "chosen") || !is_absent(fields, "rejected");
    if !has_answers
        && OPENAI_COLUMNS
            .iter()
            .any(|column| !is_absent(fields, column))
    {
        return openai(row, fields);
    }
    let prompt = fields.get("prompt").filter(|prompt| !prompt.is_null());
    match (prompt, fields.get("chosen"), fields.get("rejected")) {
        (None, Some(Value::Array(_)), Some(Value::Array(_))) => Ok(RowShape::ImplicitPrompt),
        (None, Some(Value::String(chosen)), Some(Value::String(rejected)))
            if fields.get(QUESTION_COLUMN).is_some_and(Value::is_string) =>
        {
            let message = |role: &str, text: &str| json!([{"role": role, "content": text}]);
            let answers = [message(ASSISTANT, chosen), message(ASSISTANT, rejected)];
            let question = fields.remove(QUESTION_COLUMN);
            let question = question
                .as_ref()
                .and_then(Value::as_str)
                .unwrap_or_default();
            fields.insert("prompt".to_owned(), message(USER, question));
            for (column, answer) in ["chosen", "rejected"].into_iter().zip(answers) {
                fields.insert(column.to_owned(), answer);
            }
            Ok(RowShape::Orca)
        }
        (None, Some(Value::String(chosen)), Some(Value::String(rejected))) => {
            let (shape, texts) = match (hh_messages(chosen), hh_messages(rejected)) {
                (Some(chosen), Some(rejected)) => (RowShape::Hh, split_hh(row, chosen, rejected)?),
                _ => (
                    RowShape::ImplicitPromptText,
                    split_texts(row, fields, chosen, rejected)?,
                ),
            };
            for (column, text) in ["prompt", "chosen", "rejected"].into_iter().zip(texts) {
                fields.insert(column.to_owned(), text);
            }
            Ok(shape)
        }
        (Some(Value::String(prompt)), Some(Value::Array(chosen)), Some(Value::Array(rejected)))
            if [chosen, rejected]
                .iter()
                .all(|dialogue| first_user_text(dialogue) == Some(prompt)) =>
        {
            fields.remove("prompt");
            Ok(RowShape::Ultrafeedback)
        }
        _ => Ok(RowShape::Preference),
    }
}

fn is_absent(fields: &Map<String, Value>, column: &str) -> bool {
    fields.get(column).is_none_or(Value::is_null)
}

/// Returns the row's id as text, if it is valid.
fn id(fields: &Map<String, Value>) -> Option<String> {
    match fields.get("id") {
        Some(Value::String(id)) => Some(id.clone()),
        Some(Value::Number(id)) => Some(id.to_string()),
        _ => None,
    }
}

/// Replaces our column name by the file's in a finding. `names` are pairs of our name and the
/// file's.
fn renamed(issue: RowIssue, names: &[(&str, &str)]) -> RowIssue {
    let field = renamed_path(&issue.field, names);
    let message = match issue.message.strip_prefix(&issue.field) {
        Some(rest) if !issue.field.is_empty() => format!("{field}{rest}"),
        _ => issue.message,
    };
    RowIssue {
        field,
        message,
        ..issue
    }
}

fn renamed_path(path: &str, names: &[(&str, &str)]) -> String {
    let end = path.find(['[', '.']).unwrap_or(path.len());
    let (column, rest) = path.split_at(end);
    names
        .iter()
        .find(|(ours, _)| *ours == column)
        .map_or_else(|| path.to_owned(), |(_, theirs)| format!("{theirs}{rest}"))
}

/// Converts a row in OpenAI's format. `parallel_tool_calls` is dropped, because it is an
/// instruction to the API that the model does not see. `id` and `weight` in `input` are dropped,
/// too: only the row's own columns of these names count. Other keys of `input` become columns of
/// the row, unless it has them already.
fn openai(row: u64, fields: &mut Map<String, Value>) -> Result<RowShape, RowIssue> {
    let missing = |field: &str| {
        let message = format!(
            "{field} is missing: OpenAI's preference rows have input.messages, preferred_output \
             and non_preferred_output"
        );
        issue(row, field, IssueReason::MissingField, message)
    };
    let input = match fields.remove("input") {
        Some(Value::Object(input)) => input,
        None | Some(Value::Null) => return Err(missing("input")),
        Some(_) => {
            let message = "input is not an object: OpenAI's preference rows have the prompt as \
                input.messages";
            return Err(issue(row, "input", IssueReason::InvalidType, message));
        }
    };
    let mut texts = Map::new();
    for (ours, theirs) in OPENAI_NAMES {
        let value = if ours == "prompt" {
            input.get("messages").cloned()
        } else {
            fields.remove(theirs)
        };
        let value = value
            .filter(|v| !v.is_null())
            .ok_or_else(|| missing(theirs))?;
        texts.insert(ours.to_owned(), value);
    }
    for (column, value) in input {
        let is_used = column == "messages"
            || column == "parallel_tool_calls"
            || column == "id"
            || column == "weight";
        if !is_used && is_absent(fields, &column) {
            fields.insert(column, value);
        }
    }
    fields.extend(texts);
    Ok(RowShape::OpenaiPreference)
}

/// Returns the text of a dialogue's first user message.
fn first_user_text(dialogue: &[Value]) -> Option<&str> {
    let first = dialogue
        .iter()
        .find(|message| message.get("role").and_then(Value::as_str) == Some("user"))?;
    first.get("content").and_then(Value::as_str)
}

/// Splits two plain texts into prompt and answers, as TRL does. A row for which TRL would train on
/// an empty prompt is refused.
fn split_texts(
    row: u64,
    fields: &Map<String, Value>,
    chosen: &str,
    rejected: &str,
) -> Result<[Value; 3], RowIssue> {
    for (field, text) in [("chosen", chosen), ("rejected", rejected)] {
        if text.is_empty() {
            let message = format!("{field} has no text: give an answer or remove the row");
            return Err(issue(row, field, IssueReason::EmptyCompletion, message));
        }
    }
    let end = end_of_prompt(chosen, rejected);
    if end == 0 {
        let others = fields.keys().filter(|name| *name != "prompt");
        let columns: Vec<String> = others.cloned().collect();
        let message = format!(
            "prompt is missing, and the two texts have no common beginning, so there is no common \
             prompt: add a prompt; {}",
            found(&columns, "prompt")
        );
        return Err(issue(row, "prompt", IssueReason::DifferentPrompts, message));
    }
    Ok([&chosen[..end], &chosen[end..], &rejected[end..]].map(|text| json!(text)))
}

/// Returns the byte at which the prompt ends, as in TRL's `extract_prompt`: before the first
/// character that differs, and before a space directly in front of it. If one text is a prefix of
/// the other, or both are equal, the prompt ends before the shorter text's last character.
fn end_of_prompt(chosen: &str, rejected: &str) -> usize {
    let mut last = (0, None);
    for ((at, a), b) in chosen.char_indices().zip(rejected.chars()) {
        if a != b {
            return if last.1 == Some(' ') { last.0 } else { at };
        }
        last = (at, Some(a));
    }
    last.0
}

const USER: &str = "user";
const ASSISTANT: &str = "assistant";

/// Returns the messages (role and content) of an HH dialogue; `None` for other text.
fn hh_messages<'a>(text: &'a str) -> Option<Vec<(&'static str, &'a str)>> {
    const MARKERS: [(&str, &str); 2] = [("\n\nHuman:", USER), ("\n\nAssistant:", ASSISTANT)];
    let text = text.trim_start().strip_prefix("Human:")?;
    let (mut role, mut start) = (USER, 0);
    let mut messages = Vec::new();
    let message = |role, content: &'a str| (role, content.strip_prefix(' ').unwrap_or(content));
    for (end, _) in text.match_indices('\n') {
        if let Some((marker, next)) = MARKERS
            .iter()
            .find(|(marker, _)| text[end..].starts_with(marker))
        {
            messages.push(message(role, &text[start..end]));
            (role, start) = (next, end + marker.len());
        }
    }
    messages.push(message(role, &text[start..]));
    messages
        .iter()
        .any(|(role, _)| *role == ASSISTANT)
        .then_some(messages)
}

/// Splits two HH dialogues after the messages that they share, at a position where both continue
/// with an answer of the assistant.
fn split_hh(
    row: u64,
    chosen: Vec<(&str, &str)>,
    rejected: Vec<(&str, &str)>,
) -> Result<[Value; 3], RowIssue> {
    for (field, messages) in [("chosen", chosen.len()), ("rejected", rejected.len())] {
        if messages > MAX_MESSAGES {
            let message = format!("{field} has {messages} messages: {MAX_MESSAGES} are the limit");
            return Err(issue(row, field, IssueReason::InvalidType, message));
        }
    }
    let alike = chosen
        .iter()
        .zip(&rejected)
        .take_while(|(a, b)| a == b)
        .count();
    // Leave at least one message as the answer; validation then reports identical dialogues.
    let alike = alike.min(chosen.len() - 1).min(rejected.len() - 1);
    let both_answer = |at: &usize| chosen[*at].0 == ASSISTANT && rejected[*at].0 == ASSISTANT;
    let Some(end) = (1..=alike).rev().find(both_answer) else {
        let message = "the two dialogues have no common beginning before an answer, so there is no \
            common prompt: pair answers to the same prompt";
        return Err(issue(
            row,
            "rejected",
            IssueReason::DifferentPrompts,
            message,
        ));
    };
    let list = |messages: &[(&str, &str)]| {
        messages
            .iter()
            .map(|(role, content)| json!({"role": role, "content": content}))
            .collect()
    };
    Ok([
        list(&chosen[..end]),
        list(&chosen[end..]),
        list(&rejected[end..]),
    ])
}

#[cfg(test)]
mod tests;
