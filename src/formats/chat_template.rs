//! Renders chat templates as transformers 5.23 does.

mod json;
mod percent;
mod python;

use std::sync::LazyLock;

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};
use serde_json::Map;

pub use crate::domain::dataset::ChatMessage;
use crate::model::error::ModelError;

/// Maximum number of template instructions per rendering, so that a hostile template cannot hang
/// the server.
const FUEL: u64 = 50_000_000;
const NAME: &str = "chat_template";
/// Name of the template function that prints the date.
const STRFTIME: &str = "strftime_now";
/// Keys under which messages store their reasoning; the one that most templates read is first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

static NO_KWARGS: LazyLock<Map<String, serde_json::Value>> = LazyLock::new(Map::new);

/// A compiled chat template with the special tokens it may print.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special_tokens: Vec<(String, String)>,
}

/// Variables that a template sees besides the messages.
#[derive(Clone, Copy, Debug)]
pub struct RenderOptions<'a> {
    /// True to end the rendering with the prefix of the assistant's answer.
    pub add_generation_prompt: bool,
    /// The tools that the model may call. `None` renders as transformers' `tools=None`.
    pub tools: Option<&'a [serde_json::Value]>,
    /// Further variables, like the keyword arguments of transformers' `apply_chat_template`. They
    /// may replace special tokens such as `bos_token`.
    pub kwargs: &'a Map<String, serde_json::Value>,
    /// The date and time that `strftime_now` formats; `None` is the present, in UTC.
    pub date: Option<DateTime>,
}

impl RenderOptions<'static> {
    /// Returns options without tools, further variables and date.
    pub fn new(add_generation_prompt: bool) -> Self {
        RenderOptions {
            add_generation_prompt,
            tools: None,
            kwargs: &NO_KWARGS,
            date: None,
        }
    }
}

impl ChatTemplate {
    /// Compiles a template; `special_tokens` are variables such as `bos_token`.
    ///
    /// # Errors
    /// Returns an error if the template engine cannot parse the template.
    pub fn new(source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, ModelError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|e| explain(&e))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        python::install(&mut environment);
        percent::install(&mut environment);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_filter("tojson", json::to_json);
        // jinja2 reads every line ending as \n.
        let lines = source.replace("\r\n", "\n").replace('\r', "\n");
        let lines = percent::rewrite(&without_generation_tags(&lines));
        environment
            .add_template_owned(NAME, lines)
            .map_err(|e| explain(&e))?;
        Ok(ChatTemplate {
            environment,
            source: source.to_owned(),
            special_tokens,
        })
    }

    /// Returns the template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a dialogue.
    ///
    /// # Errors
    /// Returns the error of the template engine, or the one that the template itself raises.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        options: &RenderOptions,
    ) -> Result<String, ModelError> {
        let special_tokens = self
            .special_tokens
            .iter()
            .map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        let kwargs = options
            .kwargs
            .iter()
            .map(|(name, value)| (name.as_str(), template_value(value)));
        let tools = options.tools.map_or(Value::from(()), |tools| {
            tools.iter().map(template_value).collect()
        });
        let fixed = [
            ("messages", messages.iter().map(message).collect()),
            ("tools", tools),
            ("documents", Value::from(())),
            (
                "add_generation_prompt",
                Value::from(options.add_generation_prompt),
            ),
        ];
        // If two variables have the same name, the later one wins.
        let variables = Value::from_pairs(special_tokens.chain(kwargs).chain(fixed));
        let render = |environment: &Environment| environment.get_template(NAME)?.render(variables);
        if !self.source.contains(STRFTIME) {
            return render(&self.environment).map_err(|e| explain(&e));
        }
        let date = options.date.unwrap_or_else(|| {
            jiff::Timestamp::now()
                .to_zoned(jiff::tz::TimeZone::UTC)
                .datetime()
        });
        // The function is global, so that macros see it, too. The clone limits it to this
        // rendering.
        let mut environment = self.environment.clone();
        environment.add_function(STRFTIME, move |format: String| -> Result<String, Error> {
            jiff::fmt::strtime::format(&format, date)
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("{STRFTIME}: {e}")))
        });
        render(&environment).map_err(|e| explain(&e))
    }
}

/// Converts a message for templates. Like transformers, it provides the reasoning under both
/// `thinking` and `reasoning_content`, even if the message stores it under only one of
/// [`REASONING`].
fn message(message: &ChatMessage) -> Value {
    let fields = message.fields();
    let Some(reasoning) = REASONING
        .iter()
        .find_map(|key| fields.get(*key).filter(|value| !value.is_null()))
    else {
        return template_object(fields);
    };
    let mut aliased = Map::new();
    aliased.insert("thinking".to_owned(), reasoning.clone());
    for (key, value) in fields {
        aliased.insert(key.clone(), value.clone());
    }
    aliased.insert("reasoning_content".to_owned(), reasoning.clone());
    template_object(&aliased)
}

fn template_object(fields: &Map<String, serde_json::Value>) -> Value {
    Value::from_pairs(
        fields
            .iter()
            .map(|(key, value)| (key.as_str(), template_value(value))),
    )
}

/// Converts a JSON value for templates. Objects preserve the order of their keys.
fn template_value(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match value {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => Value::from(number.as_f64().unwrap_or_default()),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(template_value).collect(),
        Json::Object(fields) => template_object(fields),
    }
}

/// Replaces the tags `{% generation %}` and `{% endgeneration %}` by `{% with %}` and
/// `{% endwith %}`, which print their content in a scope of its own. transformers uses `generation`
/// to mark the assistant's tokens for its masks; minijinja does not know it.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inner = &tag[..end];
        let (inner, open) = match inner.strip_prefix(['-', '+']) {
            Some(stripped) => (stripped, &inner[..1]),
            None => (inner, ""),
        };
        let (name, close) = match inner.strip_suffix(['-', '+']) {
            Some(stripped) => (stripped, &inner[inner.len() - 1..]),
            None => (inner, ""),
        };
        let replacement = match name.trim() {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => continue,
        };
        out.push_str(&format!("{open} {replacement} {close}"));
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

fn explain(e: &Error) -> ModelError {
    let reason = match e.detail() {
        Some(detail) => {
            format!(
                "{detail}{}",
                e.line().map(|l| format!(" (line {l})")).unwrap_or_default()
            )
        }
        None => e.to_string(),
    };
    let hint = match percent::is_about_operator(e) {
        true => {
            "; formatting with % is supported only directly after a string literal: \
             elsewhere the template must use the filter format"
        }
        false => "",
    };
    ModelError::ChatTemplate {
        reason: reason + hint,
    }
}

#[cfg(test)]
mod tests;
