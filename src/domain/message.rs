//! Chat messages, and the other inputs of a chat template.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Maximum number of messages in one text. Each message has at least one token, so a longer text
/// would exceed the default of `max_row_tokens`, the limit of a scored row.
pub const MAX_MESSAGES: usize = 16384;
/// Maximum number of tools of one dataset row, of one pair to score, or of one call of scoring or
/// generation. Jobs have no tools.
pub const MAX_TOOLS: usize = 1024;
/// Maximum nesting depth of objects and lists in a message, a tool or a template argument.
pub const MAX_DEPTH: usize = 64;
/// Maximum approximate size in memory of one list of tools, in bytes. The same limit holds for the
/// template arguments of one row, job or pair, or of one call of scoring or generation.
pub const MAX_ARGUMENT_BYTES: usize = 1 << 20;

/// Parameter names of transformers' `apply_chat_template`, and `messages`, the variable in which a
/// template sees the dialogue. A template never sees values that a caller passes under these names.
const RESERVED_KWARGS: [&str; 16] = [
    "messages",
    "conversation",
    "tools",
    "documents",
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
];

/// Types of content parts that hold something other than text. They are refused as keys of a part,
/// too.
const MEDIA_PARTS: [&str; 11] = [
    "image",
    "image_url",
    "input_image",
    "audio",
    "audio_url",
    "input_audio",
    "video",
    "video_url",
    "input_video",
    "file",
    "input_file",
];
/// Keys of messages that hold something other than text.
const MEDIA_KEYS: [&str; 6] = ["images", "image", "videos", "video", "audios", "audio"];
/// Keys that count as an answer even if the message has no text.
const ANSWER_KEYS: [&str; 7] = [
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "reasoning_text",
    "refusal",
];

/// Keys that describe a message; on their own they are no content.
const LABEL_KEYS: [&str; 4] = ["role", "content", "name", "tool_call_id"];

/// Chat message: a JSON object with at least a role. The chat template sees every key, in the order
/// of the input.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Value")]
pub struct ChatMessage(Map<String, Value>);

/// Reason why a JSON value cannot be used as a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MessageProblem {
    /// A key is missing or has the wrong type.
    Invalid {
        /// Path in the message, e.g. `content[1].type`; empty for the message itself.
        path: String,
        /// Explanation, to be appended to the path.
        reason: String,
    },
    /// The message holds an image, audio, video or file, which the models cannot process.
    Media {
        /// Path in the message.
        path: String,
    },
}

impl MessageProblem {
    /// Returns the path in the message; empty for the message itself.
    pub fn path(&self) -> &str {
        match self {
            MessageProblem::Invalid { path, .. } | MessageProblem::Media { path } => path,
        }
    }

    /// Returns the explanation, to be appended to the path.
    pub fn reason(&self) -> &str {
        match self {
            MessageProblem::Invalid { reason, .. } => reason,
            MessageProblem::Media { .. } => "cannot be used: models here see text only",
        }
    }
}

impl std::fmt::Display for MessageProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.path() {
            "" => write!(f, "the message {}", self.reason()),
            path => write!(f, "{path} {}", self.reason()),
        }
    }
}

impl ChatMessage {
    /// Returns a message with a role and a text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_owned(), Value::String(role.into()));
        fields.insert("content".to_owned(), Value::String(content.into()));
        ChatMessage(fields)
    }

    /// Parses a message from a JSON object. Keys with null are left out, as transformers does
    /// before rendering.
    ///
    /// # Errors
    /// Explains the problem if the value is not a message or holds media.
    pub fn from_json(value: Value) -> Result<Self, String> {
        Self::parse(value).map_err(|problem| problem.to_string())
    }

    /// Parses a message like [`ChatMessage::from_json`], with a structured error.
    ///
    /// # Errors
    /// The problem with its path in the message.
    pub fn parse(value: Value) -> Result<Self, MessageProblem> {
        let wrong = |path: &str, reason: String| MessageProblem::Invalid {
            path: path.to_owned(),
            reason,
        };
        let Value::Object(mut fields) = value else {
            return Err(wrong(
                "",
                format!(
                    "is {}: it must be {{\"role\": …, \"content\": …}}",
                    kind(&value)
                ),
            ));
        };
        match fields.get("role") {
            Some(Value::String(_)) => {}
            None => {
                return Err(wrong(
                    "role",
                    "is missing: a message is {\"role\": …, \"content\": …}".into(),
                ));
            }
            Some(other) => {
                return Err(wrong(
                    "role",
                    format!("is {}: it must be a string", kind(other)),
                ));
            }
        }
        if let Some(key) = MEDIA_KEYS
            .into_iter()
            .find(|key| fields.get(*key).is_some_and(has_content))
        {
            return Err(MessageProblem::Media {
                path: key.to_owned(),
            });
        }
        match fields.get("content") {
            Some(Value::String(_)) => {}
            Some(Value::Array(parts)) => check_parts(parts)?,
            None | Some(Value::Null) => {
                let has_payload = fields.iter().any(|(key, value)| is_payload(key, value));
                if !has_payload {
                    let how = if fields.contains_key("content") {
                        "null"
                    } else {
                        "missing"
                    };
                    let reason = format!(
                        "is {how}: a message has a content, or something else to say such as \
                         tool_calls"
                    );
                    return Err(wrong("content", reason));
                }
            }
            Some(other) => {
                return Err(wrong(
                    "content",
                    format!("is {}: it must be a string or a list of parts", kind(other)),
                ));
            }
        }
        if let Some((key, _)) = fields
            .iter()
            .find(|(_, value)| !is_within_depth(value, MAX_DEPTH))
        {
            return Err(wrong(key, too_deep()));
        }
        fields.retain(|_, value| !value.is_null());
        Ok(ChatMessage(fields))
    }

    /// Returns the role, e.g. `system`, `user`, `assistant` or `tool`.
    pub fn role(&self) -> &str {
        self.0
            .get("role")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// Returns all keys in the order of the input.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.0
    }

    /// Returns a key that version 0.2.0 ignored. That version used only the role and a text.
    pub(super) fn new_since_0_2_0(&self) -> Option<&str> {
        if !self.0.get("content").is_some_and(Value::is_string) {
            return Some("content");
        }
        let is_new = |(key, value): &(&String, &Value)| {
            !matches!(key.as_str(), "role" | "content") && has_content(value)
        };
        self.0.iter().find(is_new).map(|(key, _)| key.as_str())
    }

    /// Returns true if the message says nothing: no text, no tool call, no reasoning.
    pub fn is_blank(&self) -> bool {
        let has_text = match self.0.get("content") {
            Some(Value::String(text)) => !text.trim().is_empty(),
            Some(Value::Array(parts)) => parts.iter().any(|part| {
                part.get("text")
                    .and_then(Value::as_str)
                    .is_some_and(|text| !text.trim().is_empty())
            }),
            _ => false,
        };
        !has_text
            && !self
                .0
                .iter()
                .any(|(key, value)| ANSWER_KEYS.contains(&key.as_str()) && has_content(value))
    }

    /// Returns the approximate size in memory in bytes, keys included.
    pub fn bytes(&self) -> usize {
        self.0
            .iter()
            .map(|(key, value)| key.len() + bytes(value))
            .sum()
    }
}

impl TryFrom<Value> for ChatMessage {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        ChatMessage::from_json(value)
    }
}

/// Inputs of a chat template besides the messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TemplateArguments {
    /// Tools that the model may call, each a JSON object. Some templates treat `None` and an empty
    /// list differently.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
    /// Further variables, e.g. `enable_thinking`.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub kwargs: Map<String, Value>,
}

impl TemplateArguments {
    /// Returns true if there are neither tools nor variables.
    pub fn is_empty(&self) -> bool {
        self.tools.is_none() && self.kwargs.is_empty()
    }

    /// Merges these arguments with the defaults in `below`. Tools and variables given here override
    /// them.
    pub fn over(&self, below: &TemplateArguments) -> TemplateArguments {
        let mut kwargs = below.kwargs.clone();
        kwargs.extend(self.kwargs.clone());
        TemplateArguments {
            tools: self.tools.clone().or_else(|| below.tools.clone()),
            kwargs,
        }
    }

    /// Returns the approximate size in memory in bytes, keys included.
    pub fn bytes(&self) -> usize {
        let tools: usize = self.tools.iter().flatten().map(bytes).sum();
        tools
            + self
                .kwargs
                .iter()
                .map(|(key, value)| key.len() + bytes(value))
                .sum::<usize>()
    }
}

/// Parses tools from JSON: a list of objects, or a string with such a list in JSON, because tables
/// with typed columns store tools as a string. Null and an empty string mean no tools.
///
/// # Errors
/// An explanation, to be appended to the field's name.
pub fn tools_from_json(value: Value) -> Result<Option<Vec<Value>>, String> {
    let value = match value {
        Value::String(text) if text.trim().is_empty() => Value::Null,
        Value::String(text) => {
            serde_json::from_str(&text).map_err(|e| format!("is a string that is not JSON: {e}"))?
        }
        other => other,
    };
    let tools = match value {
        Value::Null => return Ok(None),
        Value::Array(tools) => tools,
        other => {
            return Err(format!(
                "is {}: it must be a list of JSON objects, or a JSON string of it",
                kind(&other)
            ));
        }
    };
    check_tools(&tools)?;
    Ok(Some(tools))
}

/// Checks the form and the size of a list of tools.
///
/// # Errors
/// An explanation, to be appended to the field's name.
pub fn check_tools(tools: &[Value]) -> Result<(), String> {
    if tools.len() > MAX_TOOLS {
        return Err(format!(
            "has {} tools: {MAX_TOOLS} are the limit",
            tools.len()
        ));
    }
    if let Some((i, other)) = tools.iter().enumerate().find(|(_, tool)| !tool.is_object()) {
        return Err(format!(
            "has {} at [{i}]: each tool is a JSON object",
            kind(other)
        ));
    }
    check_size(tools.iter())
}

/// Checks the names and the size of template arguments.
///
/// # Errors
/// An explanation, to be appended to the field's name.
pub fn check_kwargs(kwargs: &Map<String, Value>) -> Result<(), String> {
    if let Some(name) = RESERVED_KWARGS
        .into_iter()
        .find(|name| kwargs.contains_key(*name))
    {
        let remedy = match name {
            "tools" => "give tools in their own field",
            _ => "it is no variable that a template can be given: remove it",
        };
        return Err(format!("has the key {name:?}: {remedy}"));
    }
    check_size(kwargs.values())
}

fn check_size<'a>(values: impl Iterator<Item = &'a Value>) -> Result<(), String> {
    let mut total = 0;
    for value in values {
        if !is_within_depth(value, MAX_DEPTH) {
            return Err(too_deep());
        }
        total += bytes(value);
    }
    if total > MAX_ARGUMENT_BYTES {
        return Err(format!(
            "takes {total} bytes of memory: {MAX_ARGUMENT_BYTES} are the limit"
        ));
    }
    Ok(())
}

fn too_deep() -> String {
    format!("has objects and lists that lie more than {MAX_DEPTH} deep in each other: flatten it")
}

/// Returns true if a value has any content. Null, empty strings and lists, and objects without any
/// content have none.
pub fn has_content(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => fields.values().any(has_content),
        Value::String(text) => !text.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

/// Removes null keys from objects at every depth. Typed tables fill absent keys with null; TRL's
/// `remove_none_values` removes them in the same way.
pub fn without_nulls(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        Value::Object(fields) => {
            let present = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(
                present
                    .map(|(key, value)| (key, without_nulls(value)))
                    .collect(),
            )
        }
        scalar => scalar,
    }
}

/// Returns a description of the value's JSON type, e.g. "a list".
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn is_payload(key: &str, value: &Value) -> bool {
    !LABEL_KEYS.contains(&key) && has_content(value)
}

fn check_parts(parts: &[Value]) -> Result<(), MessageProblem> {
    for (i, part) in parts.iter().enumerate() {
        let path = format!("content[{i}]");
        let Some(fields) = part.as_object() else {
            let reason = format!(
                "is {}: a part is {{\"type\": \"text\", \"text\": …}}",
                kind(part)
            );
            return Err(MessageProblem::Invalid { path, reason });
        };
        if fields
            .get("type")
            .and_then(Value::as_str)
            .is_some_and(|kind| MEDIA_PARTS.contains(&kind))
        {
            return Err(MessageProblem::Media {
                path: format!("{path}.type"),
            });
        }
        if let Some(key) = MEDIA_PARTS
            .into_iter()
            .find(|key| fields.get(*key).is_some_and(has_content))
        {
            return Err(MessageProblem::Media {
                path: format!("{path}.{key}"),
            });
        }
    }
    Ok(())
}

/// Approximate memory of a JSON value without its text, in bytes. Counted because a list of a
/// million empty strings is not small.
const VALUE_OVERHEAD_BYTES: usize = 72;

/// Returns the approximate size of a value in memory, in bytes.
fn bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len().max(VALUE_OVERHEAD_BYTES),
        Value::Array(items) => VALUE_OVERHEAD_BYTES + items.iter().map(bytes).sum::<usize>(),
        Value::Object(fields) => {
            VALUE_OVERHEAD_BYTES
                + fields
                    .iter()
                    .map(|(key, value)| key.len() + bytes(value))
                    .sum::<usize>()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => VALUE_OVERHEAD_BYTES,
    }
}

fn is_within_depth(value: &Value, depth: usize) -> bool {
    match value {
        Value::Array(items) => {
            depth > 0 && items.iter().all(|item| is_within_depth(item, depth - 1))
        }
        Value::Object(fields) => {
            depth > 0 && fields.values().all(|item| is_within_depth(item, depth - 1))
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests;
