//! Prompts of the command line and of files.

use serde_json::{Map, Value};

use crate::cli::args::PromptFormArgs;
use crate::cli::data::{DataFiles, WholeRecord};
use crate::cli::failure::Failure;
use crate::cli::progress::say;
use crate::domain::message::kind;
use crate::rpc::pb;

/// Columns that a result adds to its row.
pub(super) const RESULT_COLUMNS: ResultColumns = ResultColumns {
    refused: &["samples", "prompt_tokens", "policy", "seed"],
    left_out: &[],
};

/// Columns of the rows of prompts that cannot be copied into the result.
pub struct ResultColumns {
    /// A row must not have them.
    pub refused: &'static [&'static str],
    /// They are left out of the row.
    pub left_out: &'static [&'static str],
}

/// A row of the files of prompts.
#[derive(Clone)]
pub struct PromptRow {
    /// Number of the row, from 1 and through all files.
    pub row: u64,
    /// Its place for messages.
    pub place: String,
    /// The row's columns, which the result repeats.
    pub fields: Map<String, Value>,
    /// Its prompt.
    pub prompt: pb::Text,
}

/// Converts a prompt: a text, which is the message of a user unless `--plain` is given, or a list
/// of messages.
///
/// # Errors
/// Returns a text that says what is wrong with the prompt.
pub(super) fn prompt_of(prompt: &Value, form: &PromptFormArgs) -> Result<pb::Text, String> {
    let message = |role: &str, content: &str| pb::Message {
        role: role.to_owned(),
        content: content.to_owned(),
        ..Default::default()
    };
    let mut messages: Vec<pb::Message> = form
        .system
        .iter()
        .map(|system| message("system", system))
        .collect();
    match prompt {
        Value::String(text) if form.plain => {
            return Ok(pb::Text {
                form: Some(pb::text::Form::Plain(text.clone())),
            });
        }
        Value::String(text) => messages.push(message("user", text)),
        Value::Array(all) if !form.plain => {
            messages.extend(all.iter().map(|fields| pb::Message {
                fields_json: fields.to_string(),
                ..Default::default()
            }));
        }
        Value::Array(_) => return Err("has messages, but --plain is given: leave it out".into()),
        other => {
            return Err(format!(
                "is {}: it must be a text or a list of messages",
                kind(other)
            ));
        }
    }
    Ok(pb::Text {
        form: Some(pb::text::Form::Chat(pb::MessageList { messages })),
    })
}

/// Reads the prompts of files. Every row has a text or messages in the column `prompt`, or messages
/// in `messages`. A note on standard error names the columns that are left out.
///
/// # Errors
/// Returns a failure that names the row that cannot be used, or says that there is no row.
pub fn read(
    data: &DataFiles,
    form: &PromptFormArgs,
    taken: &ResultColumns,
) -> Result<Vec<PromptRow>, Failure> {
    let mut prompts = Vec::new();
    let mut left_out: Vec<&str> = Vec::new();
    for record in data.whole_records() {
        let WholeRecord {
            row,
            place,
            mut columns,
        } = record?;
        if let Ok(columns) = &mut columns {
            for name in taken.left_out {
                if columns.contains_key(*name) && !left_out.contains(name) {
                    left_out.push(name);
                }
            }
            columns.retain(|name, _| !taken.left_out.contains(&name.as_str()));
        }
        let prompt =
            columns.and_then(|columns| prompt_row((row, &place), columns, form, taken.refused));
        let failed = |problem| Failure::Failed(format!("{}: {place}: {problem}", data.title()));
        prompts.push(prompt.map_err(failed)?);
    }
    if prompts.is_empty() {
        return Err(Failure::Failed(format!("{} has no prompts", data.title())));
    }
    if !left_out.is_empty() {
        let is_named = |name: &&&str| left_out.contains(*name);
        let names: Vec<&str> = taken.left_out.iter().filter(is_named).copied().collect();
        let names = names.join(", ");
        say(&format!(
            "columns of the prompts that are left out of the pairs: {names}"
        ));
    }
    Ok(prompts)
}

fn prompt_row(
    (row, place): (u64, &str),
    fields: Map<String, Value>,
    form: &PromptFormArgs,
    refused: &[&str],
) -> Result<PromptRow, String> {
    if let Some(refused) = refused.iter().find(|name| fields.contains_key(**name)) {
        return Err(format!(
            "the column {refused} cannot be copied into the result: rename or remove it"
        ));
    }
    let Some(prompt) = fields.get("prompt").or_else(|| fields.get("messages")) else {
        let found: Vec<&str> = fields.keys().map(String::as_str).collect();
        return Err(format!(
            "no column prompt, a text or a list of messages; found: {}; --columns prompt=NAME \
             reads the column NAME as prompt",
            found.join(", ")
        ));
    };
    let prompt = prompt_of(prompt, form).map_err(|problem| format!("prompt {problem}"))?;
    Ok(PromptRow {
        row,
        place: place.to_owned(),
        fields,
        prompt,
    })
}
