//! JSONL, and what a row may look like.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::{Map, Value};

use super::shapes::{self, Record};
use super::{DataError, MAX_LINE_BYTES, RowReader, issue};
use crate::domain::dataset::{ChatMessage, IssueReason, MAX_MESSAGES, MAX_QUOTED_VALUE, PreferenceRow, RowIssue, RowShape, Text};
use crate::domain::violation::shortened;

pub(super) fn read(path: &Path) -> Result<RowReader, DataError> {
    let file = File::open(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
    let lines = Lines { reader: BufReader::with_capacity(1 << 18, file), row: 0, failed: false };
    Ok(Box::new(lines.flat_map(shapes::pairs)))
}

struct Lines {
    reader: BufReader<File>,
    row: u64,
    failed: bool,
}

impl Iterator for Lines {
    type Item = Record;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.failed {
                return None;
            }
            let mut line = Vec::new();
            let read = (&mut self.reader).take(MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut line);
            match read {
                Ok(0) => return None,
                Ok(_) => self.row += 1,
                Err(e) => {
                    self.failed = true;
                    return Some(Err(issue(self.row + 1, "", IssueReason::InvalidJson, format!("the file cannot be read further: {e}"))));
                }
            }
            if line.len() > MAX_LINE_BYTES {
                self.skip_line();
                let message =
                    format!("the line is longer than {} MiB: split the file into rows, one JSON object a line", MAX_LINE_BYTES >> 20);
                return Some(Err(issue(self.row, "", IssueReason::InvalidJson, message)));
            }
            let line = if self.row == 1 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line) } else { &line };
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return Some(parse(self.row, line));
        }
    }
}

impl Lines {
    fn skip_line(&mut self) {
        loop {
            let (used, done) = match self.reader.fill_buf() {
                Ok([]) => return,
                Ok(buffer) => match buffer.iter().position(|b| *b == b'\n') {
                    Some(i) => (i + 1, true),
                    None => (buffer.len(), false),
                },
                Err(_) => {
                    self.failed = true;
                    return;
                }
            };
            self.reader.consume(used);
            if done {
                return;
            }
        }
    }
}

fn parse(row: u64, line: &[u8]) -> Record {
    let text = std::str::from_utf8(line).map_err(|e| {
        issue(row, "", IssueReason::InvalidUtf8, format!("the line is not UTF-8 at byte {}: save the file as UTF-8", e.valid_up_to() + 1))
    })?;
    let value: Value = serde_json::from_str(text)
        .map_err(|e| issue(row, "", IssueReason::InvalidJson, format!("not JSON (column {}): {e}", e.column())))?;
    match value {
        Value::Object(fields) => Ok((row, fields)),
        other => Err(issue(row, "", IssueReason::InvalidJson, format!("a row is a JSON object, this is {}", kind(&other)))),
    }
}

/// Columns that change what a row means and that cannot be used yet: without them other tokens would be trained on.
pub(super) const UNSUPPORTED: [&str; 7] = ["tools", "images", "image", "videos", "video", "audios", "audio"];
/// Columns that other tools use and that are left out.
pub(super) const IGNORED: [&str; 2] = ["chat_template_kwargs", "system"];
/// The same among the keys of a message.
const UNSUPPORTED_KEYS: [&str; 4] = ["tool_calls", "function_call", "images", "audio"];

/// Keys of a column's messages that are reported as not used.
const MAX_IGNORED: usize = 16;

/// A row from its columns. Some that are not used are findings; others are ignored.
pub(super) fn from_fields(row: u64, mut fields: Map<String, Value>) -> Result<PreferenceRow, RowIssue> {
    let id = match fields.remove("id") {
        None | Some(Value::Null) => None,
        Some(Value::String(s)) => Some(s),
        Some(Value::Number(n)) => Some(n.to_string()),
        Some(other) => return Err(issue(row, "id", IssueReason::InvalidType, format!("id is {}: use a string or a number", kind(&other)))),
    };
    let named = |i: RowIssue| RowIssue { id: id.clone(), ..i };
    let weight = match fields.remove("weight") {
        None | Some(Value::Null) => 1.0,
        Some(v) => v.as_f64().filter(|w| w.is_finite() && *w > 0.0).ok_or_else(|| named(invalid_weight(row, &v.to_string())))?,
    };
    if let Some(field) = UNSUPPORTED.into_iter().find(|f| fields.get(*f).is_some_and(has_content)) {
        return Err(named(unsupported(row, field)));
    }
    let mut ignored: Vec<String> = IGNORED.into_iter().filter(|f| fields.get(*f).is_some_and(has_content)).map(str::to_owned).collect();
    let mut text = |field: &str| match fields.remove(field) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => to_text(row, field, v, &mut ignored).map(Some).map_err(named),
    };
    let (prompt, chosen, rejected) = (text("prompt")?, text("chosen")?, text("rejected")?);
    let need = |field: &str, t: Option<Text>| {
        t.ok_or_else(|| {
            let shapes = "a row has prompt, chosen and rejected, or OpenAI's input, preferred_output and non_preferred_output";
            named(issue(row, field, IssueReason::MissingField, format!("{field} is missing: {shapes}")))
        })
    };
    let (chosen, rejected) = (need("chosen", chosen)?, need("rejected", rejected)?);
    let (prompt, chosen, rejected) = match (prompt, chosen, rejected) {
        (Some(p), c, r) => (p, c, r),
        (None, Text::Chat(c), Text::Chat(r)) => split_dialogues(row, c, r).map_err(named)?,
        (None, ..) => {
            let message = "prompt is missing, and only two dialogues or two texts can be split into prompt and answer: add a prompt";
            return Err(named(issue(row, "prompt", IssueReason::MissingField, message)));
        }
    };
    let plain = |t: &Text| matches!(t, Text::Plain(_));
    for (field, t) in [("chosen", &chosen), ("rejected", &rejected)] {
        if plain(t) != plain(&prompt) {
            let (a, b) = if plain(t) { ("plain text", "a list of messages") } else { ("a list of messages", "plain text") };
            let message = format!("{field} is {a} but prompt is {b}: use the same form for all three");
            return Err(named(issue(row, field, IssueReason::InvalidType, message)));
        }
    }
    Ok(PreferenceRow { row, id, prompt, chosen, rejected, weight, ignored, shape: RowShape::default(), pair: None })
}

/// The finding about a weight that is no finite number above 0.
pub(super) fn invalid_weight(row: u64, weight: &str) -> RowIssue {
    let weight = shortened(weight, MAX_QUOTED_VALUE);
    issue(row, "weight", IssueReason::InvalidWeight, format!("weight is {weight}: it must be a finite number above 0"))
}

fn unsupported(row: u64, field: &str) -> RowIssue {
    let message =
        format!("{field} cannot be used yet, and without it the row would mean something else: leave the row out, or remove {field}");
    issue(row, field, IssueReason::UnsupportedField, message)
}

/// Whether a value says anything.
fn has_content(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => fields.values().any(has_content),
        Value::String(text) => !text.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

/// Splits two whole dialogues after the messages they share.
fn split_dialogues(row: u64, mut chosen: Vec<ChatMessage>, mut rejected: Vec<ChatMessage>) -> Result<(Text, Text, Text), RowIssue> {
    let mut shared = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    // Identical dialogues still have an answer each, which validation then reports as identical.
    shared = shared.min(chosen.len().saturating_sub(1)).min(rejected.len().saturating_sub(1));
    if shared == 0 {
        let message = "the two dialogues share no first message, so there is no common prompt: pair answers to the same prompt";
        return Err(issue(row, "rejected", IssueReason::DifferentPrompts, message));
    }
    let answers = (chosen.split_off(shared), rejected.split_off(shared));
    Ok((Text::Chat(chosen), Text::Chat(answers.0), Text::Chat(answers.1)))
}

/// A column's text. Keys of messages that are not used are added to `ignored`.
fn to_text(row: u64, field: &str, value: Value, ignored: &mut Vec<String>) -> Result<Text, RowIssue> {
    let wrong = |message: String| issue(row, field, IssueReason::InvalidType, message);
    match value {
        Value::String(s) => Ok(Text::Plain(s)),
        Value::Array(messages) if messages.len() > MAX_MESSAGES => {
            Err(wrong(format!("{field} has {} messages: {MAX_MESSAGES} are the limit", messages.len())))
        }
        Value::Array(messages) => {
            let mut chat = Vec::with_capacity(messages.len());
            let mut seen: Vec<String> = Vec::new();
            for (i, m) in messages.into_iter().enumerate() {
                for (key, _) in m.as_object().into_iter().flatten().filter(|(_, v)| has_content(v)) {
                    if UNSUPPORTED_KEYS.contains(&key.as_str()) {
                        return Err(unsupported(row, &format!("{field}[{i}].{key}")));
                    }
                    if key != "role" && key != "content" && seen.len() < MAX_IGNORED && !seen.contains(key) {
                        ignored.push(format!("{field}[{i}].{}", shortened(key, MAX_QUOTED_VALUE)));
                        seen.push(key.clone());
                    }
                }
                let part = |name: &str| match m.get(name) {
                    Some(Value::String(s)) => Ok(s.clone()),
                    Some(other) => Err(wrong(format!("{field}[{i}].{name} is {}: it must be a string", kind(other)))),
                    None => Err(wrong(format!("{field}[{i}].{name} is missing: a message is {{\"role\": …, \"content\": …}}"))),
                };
                chat.push(ChatMessage { role: part("role")?, content: part("content")? });
            }
            Ok(Text::Chat(chat))
        }
        other => Err(wrong(format!("{field} is {}: use a string or a list of messages", kind(&other)))),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
