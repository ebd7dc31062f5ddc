//! Converts a row's columns into a [`PreferenceRow`].

use serde_json::{Map, Value};

use super::logged::logged;
use super::names::{MEDIA_COLUMNS, found};
use super::reader::issue;
use crate::domain::dataset::{
    ChatMessage, IssueReason, MAX_MESSAGES, MAX_QUOTED_VALUE, PreferenceRow, RowIssue, RowShape,
    Text,
};
use crate::domain::message::{
    MessageProblem, TemplateArguments, check_kwargs, has_content, kind, tools_from_json,
};
use crate::domain::violation::shortened;

/// Columns with the tools and with the variables for the chat template.
pub(super) const TOOLS_COLUMN: &str = "tools";
pub(super) const KWARGS_COLUMN: &str = "chat_template_kwargs";
/// Column with the text of a system message, which becomes the first message of the prompt.
pub(super) const SYSTEM_COLUMN: &str = "system";

/// Maximum number of unknown columns of a row that are reported.
const MAX_IGNORED: usize = 16;

/// Builds a row from its columns. Other row shapes have been converted to prompt, chosen and
/// rejected before, except whole dialogues without a prompt, which are split here. Remaining
/// unknown columns are reported as not used.
pub(super) fn from_fields(
    row: u64,
    mut fields: Map<String, Value>,
) -> Result<PreferenceRow, RowIssue> {
    let id = match fields.remove("id") {
        None | Some(Value::Null) => None,
        Some(Value::String(s)) => Some(s),
        Some(Value::Number(n)) => Some(n.to_string()),
        Some(other) => {
            return Err(issue(
                row,
                "id",
                IssueReason::InvalidType,
                format!("id is {}: use a string or a number", kind(&other)),
            ));
        }
    };
    let named = |i: RowIssue| RowIssue {
        id: id.clone(),
        ..i
    };
    let weight = match fields.remove("weight") {
        None | Some(Value::Null) => 1.0,
        Some(v) => v
            .as_f64()
            .filter(|w| w.is_finite() && *w > 0.0)
            .ok_or_else(|| named(invalid_weight(row, &v.to_string())))?,
    };
    if let Some(field) = MEDIA_COLUMNS
        .into_iter()
        .find(|f| fields.get(*f).is_some_and(has_content))
    {
        return Err(named(unsupported(row, field)));
    }
    let arguments = arguments(row, &mut fields).map_err(named)?;
    let system = system(row, &mut fields).map_err(named)?;
    let is_incomplete = ["prompt", "chosen", "rejected"]
        .iter()
        .any(|column| fields.get(*column).is_none_or(Value::is_null));
    let columns: Vec<String> = if is_incomplete {
        fields.keys().cloned().collect()
    } else {
        Vec::new()
    };
    let mut text = |field: &str| match fields.remove(field) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => to_text(row, field, v).map(Some).map_err(named),
    };
    let (prompt, chosen, rejected) = (text("prompt")?, text("chosen")?, text("rejected")?);
    let need = |field: &str, t: Option<Text>| {
        t.ok_or_else(|| {
            named(issue(
                row,
                field,
                IssueReason::MissingField,
                format!("{field} is missing; {}", found(&columns, field)),
            ))
        })
    };
    let (chosen, rejected) = (need("chosen", chosen)?, need("rejected", rejected)?);
    let (prompt, chosen, rejected) = match (prompt, chosen, rejected) {
        (Some(p), c, r) => (p, c, r),
        (None, Text::Chat(c), Text::Chat(r)) => split_dialogues(row, c, r).map_err(named)?,
        (None, ..) => {
            let message = format!(
                "prompt is missing, and only two dialogues or two texts can be split into prompt \
                 and answer: add a prompt; {}",
                found(&columns, "prompt")
            );
            return Err(named(issue(
                row,
                "prompt",
                IssueReason::MissingField,
                message,
            )));
        }
    };
    let has_system_column = system.is_some();
    let prompt = match system {
        Some(system) => with_system(row, prompt, system).map_err(named)?,
        None => prompt,
    };
    let plain = |t: &Text| matches!(t, Text::Plain(_));
    for (field, t) in [("chosen", &chosen), ("rejected", &rejected)] {
        if plain(t) != plain(&prompt) {
            let (a, b) = if plain(t) {
                ("plain text", "a list of messages")
            } else {
                ("a list of messages", "plain text")
            };
            let message =
                format!("{field} is {a} but prompt is {b}: use the same form for all three");
            return Err(named(issue(row, field, IssueReason::InvalidType, message)));
        }
    }
    let mut ignored: Vec<String> = Vec::new();
    let arguments = if plain(&prompt) {
        if arguments.tools.iter().flatten().next().is_some() {
            let message = "tools need a dialogue, because the chat template shows them to the \
                model: make prompt, chosen and rejected lists of messages, or remove tools";
            return Err(named(issue(
                row,
                TOOLS_COLUMN,
                IssueReason::UnsupportedField,
                message,
            )));
        }
        if !arguments.kwargs.is_empty() {
            ignored.push(KWARGS_COLUMN.to_owned());
        }
        TemplateArguments::default()
    } else {
        arguments
    };
    let logged = logged(&fields);
    let unknown = fields
        .iter()
        .filter(|(name, value)| !MEDIA_COLUMNS.contains(&name.as_str()) && has_content(value));
    ignored.extend(
        unknown
            .take(MAX_IGNORED)
            .map(|(name, _)| shortened(name, MAX_QUOTED_VALUE)),
    );
    Ok(PreferenceRow {
        row,
        id,
        prompt,
        chosen,
        rejected,
        weight,
        arguments,
        has_system_column,
        ignored,
        shape: RowShape::default(),
        pair: None,
        logged,
    })
}

/// Takes a row's tools and template variables out of its columns.
fn arguments(row: u64, fields: &mut Map<String, Value>) -> Result<TemplateArguments, RowIssue> {
    let wrong = |field: &str, reason: String| {
        issue(
            row,
            field,
            IssueReason::InvalidType,
            format!("{field} {reason}"),
        )
    };
    let tools = tools_from_json(fields.remove(TOOLS_COLUMN).unwrap_or_default())
        .map_err(|e| wrong(TOOLS_COLUMN, e))?;
    let kwargs = match fields.remove(KWARGS_COLUMN) {
        Some(Value::String(text)) if !text.trim().is_empty() => serde_json::from_str(&text)
            .map_err(|e| wrong(KWARGS_COLUMN, format!("is a string that is not JSON: {e}")))?,
        Some(Value::String(_)) | None => Value::Null,
        Some(other) => other,
    };
    let kwargs = match kwargs {
        Value::Null => Map::new(),
        Value::Object(kwargs) => kwargs,
        other => {
            return Err(wrong(
                KWARGS_COLUMN,
                format!("is {}: it must be a JSON object", kind(&other)),
            ));
        }
    };
    check_kwargs(&kwargs).map_err(|e| wrong(KWARGS_COLUMN, e))?;
    Ok(TemplateArguments { tools, kwargs })
}

/// Takes the system message out of a row's columns, if it has one.
fn system(row: u64, fields: &mut Map<String, Value>) -> Result<Option<String>, RowIssue> {
    match fields.remove(SYSTEM_COLUMN) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text).filter(|text| !text.trim().is_empty())),
        Some(other) => Err(issue(
            row,
            SYSTEM_COLUMN,
            IssueReason::InvalidType,
            format!(
                "system is {}: use the text of the system message",
                kind(&other)
            ),
        )),
    }
}

/// Puts the text of the column `system` before the prompt, as a system message.
///
/// # Errors
/// A plain prompt has no messages, and a dialogue may have another system message already: to
/// ignore the column would change the meaning of the row.
fn with_system(row: u64, prompt: Text, system: String) -> Result<Text, RowIssue> {
    let Text::Chat(mut messages) = prompt else {
        let message = "system needs a dialogue: make prompt, chosen and rejected lists of \
            messages, rename the column of the prompt to question, or remove system";
        return Err(issue(
            row,
            SYSTEM_COLUMN,
            IssueReason::UnsupportedField,
            message,
        ));
    };
    let system = ChatMessage::new(SYSTEM_COLUMN, system);
    match messages.first() {
        Some(first) if *first == system => {}
        Some(first) if first.role() == SYSTEM_COLUMN => {
            let message = "system differs from the system message with which the dialogue \
                begins: remove one of them";
            return Err(issue(row, SYSTEM_COLUMN, IssueReason::InvalidType, message));
        }
        _ => messages.insert(0, system),
    }
    Ok(Text::Chat(messages))
}

/// Returns the finding about a weight that is not a finite number above 0.
pub(super) fn invalid_weight(row: u64, weight: &str) -> RowIssue {
    let weight = shortened(weight, MAX_QUOTED_VALUE);
    issue(
        row,
        "weight",
        IssueReason::InvalidWeight,
        format!("weight is {weight}: it must be a finite number above 0"),
    )
}

fn unsupported(row: u64, field: &str) -> RowIssue {
    let message = format!(
        "{field} cannot be used, because models here see text only, and without it the row would \
         mean something else: leave the row out, or remove {field}"
    );
    issue(row, field, IssueReason::UnsupportedField, message)
}

/// Splits two whole dialogues after the messages that they share.
fn split_dialogues(
    row: u64,
    mut chosen: Vec<ChatMessage>,
    mut rejected: Vec<ChatMessage>,
) -> Result<(Text, Text, Text), RowIssue> {
    let mut shared = chosen
        .iter()
        .zip(&rejected)
        .take_while(|(a, b)| a == b)
        .count();
    // Leave at least one message as the answer; validation then reports identical dialogues.
    shared = shared
        .min(chosen.len().saturating_sub(1))
        .min(rejected.len().saturating_sub(1));
    if shared == 0 {
        let message = "the two dialogues have no common beginning before an answer, so there is no \
            common prompt: pair answers to the same prompt";
        return Err(issue(
            row,
            "rejected",
            IssueReason::DifferentPrompts,
            message,
        ));
    }
    let answers = (chosen.split_off(shared), rejected.split_off(shared));
    Ok((
        Text::Chat(chosen),
        Text::Chat(answers.0),
        Text::Chat(answers.1),
    ))
}

/// Converts a column into text or messages.
fn to_text(row: u64, field: &str, value: Value) -> Result<Text, RowIssue> {
    let wrong = |message: String| issue(row, field, IssueReason::InvalidType, message);
    match value {
        Value::String(s) => Ok(Text::Plain(s)),
        Value::Array(messages) if messages.len() > MAX_MESSAGES => Err(wrong(format!(
            "{field} has {} messages: {MAX_MESSAGES} are the limit",
            messages.len()
        ))),
        Value::Array(messages) => {
            let mut chat = Vec::with_capacity(messages.len());
            for (i, message) in messages.into_iter().enumerate() {
                chat.push(
                    ChatMessage::parse(message).map_err(|problem| match problem {
                        MessageProblem::Media { path } => {
                            unsupported(row, &format!("{field}[{i}].{path}"))
                        }
                        MessageProblem::Invalid { path, reason } if path.is_empty() => {
                            wrong(format!("{field}[{i}] {reason}"))
                        }
                        MessageProblem::Invalid { path, reason } => {
                            wrong(format!("{field}[{i}].{path} {reason}"))
                        }
                    })?,
                );
            }
            Ok(Text::Chat(chat))
        }
        Value::Object(cells) if is_pandas_column(&cells) => Err(wrong(format!(
            "{field} is an object: use a string or a list of messages; pandas: \
             to_json(orient='records', lines=True) writes one row a line"
        ))),
        other => Err(wrong(format!(
            "{field} is {}: use a string or a list of messages",
            kind(&other)
        ))),
    }
}

/// Returns true for an object with the numbers of rows as keys, as `to_json()` of pandas writes
/// each column.
fn is_pandas_column(cells: &Map<String, Value>) -> bool {
    !cells.is_empty() && cells.keys().all(|key| key.parse::<u64>().is_ok())
}
