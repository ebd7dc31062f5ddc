//! From a request for completions to the message of GenerateCompletions.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use prost::Message as _;
use serde_json::{Map, Value};

use crate::domain::violation::{Violations, shortened};
use crate::rpc::pb;
use crate::rpc::rest::request::{framed, parse};
use crate::service::error::ServiceError;

/// Number of tokens of a text completion if the request does not limit them, as in OpenAI's API.
const DEFAULT_TEXT_TOKENS: u32 = 16;
/// Parameters that do not change the answer.
const WITHOUT_EFFECT: [&str; 8] = [
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
];
/// Maximum number of characters of a value that an error repeats.
const MAX_REPEATED: usize = 60;
/// Maximum number of prompts of a request.
const MAX_PROMPTS: usize = 128;
/// Maximum size of the parameters besides the prompts if there are several, in bytes: the call for
/// each prompt has a copy of them.
const MAX_COPIED_BYTES: usize = 64 << 10;
/// Maximum number of likely tokens at each place of a text, as in OpenAI's API.
const MAX_TEXT_ALTERNATIVES: u32 = 5;
/// Maximum number of likely tokens at each place of a chat, as in OpenAI's API.
const MAX_CHAT_ALTERNATIVES: u32 = 20;

/// The parts of a request that its answer needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerOptions {
    /// True for a chat.
    pub is_chat: bool,
    /// Identifies the answer.
    pub id: String,
    /// Time of the request, in seconds since 1970.
    pub created: u64,
    /// The model, as the request names it.
    pub model: String,
    /// Number of samples.
    pub samples: u32,
    /// Name of the parameter that limits the tokens of a sample.
    pub token_limit: &'static str,
    /// True to send the answer as it comes.
    pub streams: bool,
    /// True if a stream ends with the numbers of tokens.
    pub includes_usage: bool,
    /// Number of the most likely tokens at each place; `None` without log-probs.
    pub alternatives: Option<u32>,
    /// True if the answer begins with the prompt.
    pub echoes: bool,
    /// True if the answer has the prompt only.
    pub drops_samples: bool,
    /// The text of each prompt; `None` for a chat, and for a prompt of token ids.
    pub prompts: Vec<Option<String>>,
    /// The messages of the calls for all prompts but the first, framed as gRPC sends them.
    pub further: Vec<Bytes>,
}

/// A prompt in the forms of OpenAI's API and of the service.
struct OpenAiPrompt {
    /// Its text; `None` for a chat and for token ids.
    text: Option<String>,
    form: Option<pb::text::Form>,
    token_ids: Vec<u32>,
}

impl OpenAiPrompt {
    fn of_text(text: &str) -> Self {
        OpenAiPrompt {
            text: Some(text.to_owned()),
            form: Some(pb::text::Form::Plain(text.to_owned())),
            token_ids: Vec::new(),
        }
    }

    fn of_tokens(token_ids: Vec<u32>) -> Self {
        OpenAiPrompt {
            text: None,
            form: None,
            token_ids,
        }
    }

    /// Reads the prompts of a text completion; `None` if they have none of the forms.
    fn read(value: &Value) -> Option<Vec<Self>> {
        if let Value::String(text) = value {
            return Some(vec![OpenAiPrompt::of_text(text)]);
        }
        let list = value.as_array()?;
        if let Some(ids) = token_ids(list) {
            return Some(vec![OpenAiPrompt::of_tokens(ids)]);
        }
        let each = list.iter().map(|prompt| match prompt {
            Value::String(text) => Some(OpenAiPrompt::of_text(text)),
            Value::Array(ids) => token_ids(ids).map(OpenAiPrompt::of_tokens),
            _ => None,
        });
        let all: Option<Vec<Self>> = each.collect();
        all.filter(|all| !all.is_empty())
    }
}

/// Returns a list of token ids; `None` if it has none, or other values.
fn token_ids(list: &[Value]) -> Option<Vec<u32>> {
    let ids = list.iter().map(|id| u32::try_from(id.as_u64()?).ok());
    let ids: Option<Vec<u32>> = ids.collect();
    ids.filter(|ids| !ids.is_empty())
}

/// Converts the body of a request for completions. Returns the message of the call for the first
/// prompt; those for further prompts are in the options.
///
/// # Errors
/// `InvalidArgument` with all parameters that are wrong or not supported.
pub fn generation(
    is_chat: bool,
    text: &[u8],
) -> Result<(pb::GenerateCompletionsRequest, AnswerOptions), ServiceError> {
    let Value::Object(given) = parse(text)? else {
        return Err(ServiceError::invalid("body", "must be a JSON object"));
    };
    let mut fields = CompletionParameters {
        // OpenAI's clients send null for a parameter without a value.
        given: given.into_iter().filter(|(_, v)| !v.is_null()).collect(),
        bad: Violations::default(),
    };
    let model = fields.text("model").unwrap_or_default();
    if model.is_empty() {
        fields.bad.push("model", "is missing");
    }
    let mut prompts = match is_chat {
        true => fields.messages(),
        false => fields.prompts(),
    };
    let samples = fields.limit("n").unwrap_or(1);
    let echoes = !is_chat && fields.flag("echo").unwrap_or(false);
    let mut max_tokens = match echoes {
        true => fields.number("max_tokens"),
        false => fields.limit("max_tokens"),
    };
    let drops_samples = max_tokens == Some(0);
    if drops_samples {
        // The service has no call without a token: the answer leaves this one out.
        max_tokens = Some(1);
    }
    let alternatives = match is_chat {
        true => fields.chat_logprobs(),
        false => fields.text_logprobs(),
    };
    let mut token_limit = "max_tokens";
    if is_chat && let Some(max) = fields.limit("max_completion_tokens") {
        if max_tokens.is_some_and(|other| other != max) {
            let problem = "differs from max_tokens: give one of them";
            fields.bad.push("max_completion_tokens", problem);
        }
        max_tokens = Some(max);
        token_limit = "max_completion_tokens";
    }
    let streams = fields.flag("stream").unwrap_or(false);
    let includes_usage = fields.stream_options(streams);
    fields.check_together(prompts.len(), samples, streams, echoes);
    let has_token_ids = prompts.iter().any(|prompt| !prompt.token_ids.is_empty());
    let request = pb::GenerateCompletionsRequest {
        policy: policy(&model),
        prompt: None,
        samples,
        max_tokens: max_tokens.unwrap_or(match is_chat {
            true => 0,
            false => DEFAULT_TEXT_TOKENS,
        }),
        temperature: fields.real("temperature"),
        top_p: fields.real("top_p"),
        top_k: fields.top_k(),
        seed: fields.seed(),
        stop: fields.stop(),
        stop_token_ids: fields.stop_token_ids(),
        ignore_eos: fields.flag("ignore_eos").unwrap_or(false),
        logprobs: alternatives.is_some(),
        tools: Vec::new(),
        tools_json: fields.tools(is_chat),
        chat_template_kwargs: None,
        chat_template_kwargs_json: match is_chat {
            true => fields.json("chat_template_kwargs"),
            false => String::new(),
        },
        prompt_token_ids: Vec::new(),
        top_logprobs: alternatives.unwrap_or(0),
        // Token ids are turned into text by the service.
        prompt_logprobs: echoes && (alternatives.is_some() || has_token_ids),
        token_texts: alternatives.is_some() || (echoes && has_token_ids),
    };
    if prompts.len() > 1 && request.encoded_len() > MAX_COPIED_BYTES {
        let problem = format!(
            "has {} prompts, and the other parameters have more than {MAX_COPIED_BYTES} bytes: \
             shorten these, or send a request for each prompt",
            prompts.len()
        );
        fields.bad.push("prompt", problem);
        prompts.truncate(1);
    }
    let texts = prompts.iter().map(|prompt| prompt.text.clone()).collect();
    let mut calls = prompts
        .into_iter()
        .map(|prompt| pb::GenerateCompletionsRequest {
            prompt: prompt.form.map(|form| pb::Text { form: Some(form) }),
            prompt_token_ids: prompt.token_ids,
            ..request.clone()
        });
    let first = calls.next().unwrap_or_default();
    let asked = AnswerOptions {
        is_chat,
        id: format!(
            "{}-{}",
            if is_chat { "chatcmpl" } else { "cmpl" },
            uuid::Uuid::now_v7().simple()
        ),
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |passed| passed.as_secs()),
        model,
        samples,
        token_limit,
        streams,
        includes_usage,
        alternatives,
        echoes,
        drops_samples,
        prompts: texts,
        further: calls.map(|call| framed(&call.encode_to_vec())).collect(),
    };
    let bad = fields.finish();
    bad.into_result().map_err(ServiceError::InvalidArgument)?;
    Ok((first, asked))
}

/// Returns a message as chat templates expect it: parts that are all texts as one text, and the
/// arguments of a tool call, which OpenAI's API has as a text, as an object. vLLM does the same.
fn for_template(mut message: Value) -> Value {
    if let Some(Value::Array(parts)) = message.get("content") {
        let text = |part: &Value| match part["type"].as_str() {
            Some("text") => part["text"].as_str().map(str::to_owned),
            _ => None,
        };
        let texts: Option<Vec<String>> = parts.iter().map(text).collect();
        // Other parts are refused by the service.
        if let Some(texts) = texts.filter(|texts| !texts.is_empty()) {
            message["content"] = Value::from(texts.join("\n"));
        }
    }
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let arguments = call.pointer_mut("/function/arguments");
        if let Some(arguments) = arguments
            && let Some(text) = arguments.as_str()
            && let Ok(object) = serde_json::from_str::<Map<String, Value>>(text)
        {
            *arguments = Value::Object(object);
        }
    }
    message
}

/// Returns the policy that a model's name means.
fn policy(model: &str) -> String {
    match model.starts_with("models/") || model.starts_with("trainingJobs/") {
        true => model.to_owned(),
        false => format!("models/{model}"),
    }
}

/// The parameters of a request that were not read yet, and the problems of those that were.
struct CompletionParameters {
    given: Map<String, Value>,
    bad: Violations,
}

impl CompletionParameters {
    /// Takes a parameter. `read` returns its value, or `None` if it is not `expected`.
    fn take<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.given.remove(name)?;
        let read = read(&value);
        if read.is_none() {
            self.wrong(name, &value, &format!("it must be {expected}"));
        }
        read
    }

    fn wrong(&mut self, name: &str, value: &Value, remedy: &str) {
        let value = shortened(&value.to_string(), MAX_REPEATED);
        self.bad.push(name, format!("is {value}: {remedy}"));
    }

    fn text(&mut self, name: &str) -> Option<String> {
        self.take(name, "a string", |v| v.as_str().map(str::to_owned))
    }

    fn flag(&mut self, name: &str) -> Option<bool> {
        self.take(name, "true or false", Value::as_bool)
    }

    fn real(&mut self, name: &str) -> Option<f64> {
        self.take(name, "a number", Value::as_f64)
    }

    /// Takes the number of most likely tokens to sample from; `None` for all. vLLM has -1 and 0 for
    /// all.
    fn top_k(&mut self) -> Option<u32> {
        let expected = "a whole number from 1 to 4294967295, or -1 for all tokens";
        let top_k = self.take("top_k", expected, |v| match v.as_i64()? {
            -1 | 0 => Some(None),
            k => u32::try_from(k).ok().map(Some),
        });
        top_k.flatten()
    }

    /// Takes a number of samples or of tokens.
    fn limit(&mut self, name: &str) -> Option<u32> {
        self.take(name, "a whole number from 1 to 4294967295", |v| {
            u32::try_from(v.as_u64()?).ok().filter(|limit| *limit > 0)
        })
    }

    fn number(&mut self, name: &str) -> Option<u32> {
        let expected = "a whole number from 0 to 4294967295";
        self.take(name, expected, |v| u32::try_from(v.as_u64()?).ok())
    }

    /// Takes the seed, which OpenAI's API has with a sign.
    fn seed(&mut self) -> Option<u64> {
        let expected = "a whole number from -9223372036854775808 to 18446744073709551615";
        self.take("seed", expected, |v| {
            v.as_u64().or_else(|| v.as_i64().map(i64::cast_unsigned))
        })
    }

    fn json(&mut self, name: &str) -> String {
        let object = self.take(name, "an object", |v| v.is_object().then(|| v.to_string()));
        object.unwrap_or_default()
    }

    /// Takes the messages of a chat.
    fn messages(&mut self) -> Vec<OpenAiPrompt> {
        let Some(value) = self.given.remove("messages") else {
            self.bad.push("messages", "is missing");
            return Vec::new();
        };
        let Value::Array(messages) = value else {
            self.wrong("messages", &value, "it must be a list of messages");
            return Vec::new();
        };
        let messages = messages.into_iter().map(|message| pb::Message {
            // The service checks the message.
            fields_json: for_template(message).to_string(),
            ..Default::default()
        });
        let messages = messages.collect();
        let form = pb::text::Form::Chat(pb::MessageList { messages });
        vec![OpenAiPrompt {
            text: None,
            form: Some(form),
            token_ids: Vec::new(),
        }]
    }

    /// Takes the prompts of a text completion.
    fn prompts(&mut self) -> Vec<OpenAiPrompt> {
        if !self.given.contains_key("prompt") {
            self.bad.push("prompt", "is missing");
        }
        let expected = "a string, a list of token ids that is not empty, or a list of these";
        let prompts = self.take("prompt", expected, OpenAiPrompt::read);
        let mut prompts = prompts.unwrap_or_default();
        if prompts.len() > MAX_PROMPTS {
            let count = prompts.len();
            let problem = format!("has {count} prompts: at most {MAX_PROMPTS} are allowed");
            self.bad.push("prompt", problem);
            prompts.truncate(1);
        }
        prompts
    }

    /// Takes the number of likely tokens at each place of a text; `None` without log-probs.
    fn text_logprobs(&mut self) -> Option<u32> {
        if self.given.get("logprobs") == Some(&Value::Bool(false)) {
            self.given.remove("logprobs");
        }
        let expected = format!("a whole number from 0 to {MAX_TEXT_ALTERNATIVES}");
        self.take("logprobs", &expected, |v| {
            let count = u32::try_from(v.as_u64()?).ok();
            count.filter(|count| *count <= MAX_TEXT_ALTERNATIVES)
        })
    }

    /// Takes the number of likely tokens at each place of a chat; `None` without log-probs.
    fn chat_logprobs(&mut self) -> Option<u32> {
        let wanted = self.flag("logprobs").unwrap_or(false);
        let expected = format!("a whole number from 0 to {MAX_CHAT_ALTERNATIVES}");
        let count = self.take("top_logprobs", &expected, |v| {
            let count = u32::try_from(v.as_u64()?).ok();
            count.filter(|count| *count <= MAX_CHAT_ALTERNATIVES)
        });
        if !wanted && count.is_some_and(|count| count > 0) {
            let problem = "has no meaning without logprobs: set logprobs to true";
            self.bad.push("top_logprobs", problem);
        }
        wanted.then_some(count.unwrap_or(0))
    }

    /// Refuses parameters that are not supported together.
    fn check_together(&mut self, prompts: usize, samples: u32, streams: bool, echoes: bool) {
        if streams && prompts > 1 {
            let problem = "is true: several prompts are not streamed; send a request for each";
            self.bad.push("stream", problem);
        }
        if echoes && streams {
            let problem =
                "is true: the prompt is not repeated in a stream; leave echo or stream out";
            self.bad.push("echo", problem);
        }
        if echoes && samples > 1 {
            let problem = format!("is {samples}: with echo, a prompt has one sample");
            self.bad.push("n", problem);
        }
    }

    fn stop(&mut self) -> Vec<String> {
        let stop = self.take(
            "stop",
            "a string or a list of strings",
            |value| match value {
                Value::String(text) => Some(vec![text.clone()]),
                Value::Array(texts) => texts
                    .iter()
                    .map(|text| text.as_str().map(str::to_owned))
                    .collect(),
                _ => None,
            },
        );
        stop.unwrap_or_default()
    }

    fn stop_token_ids(&mut self) -> Vec<u32> {
        let ids = self.take("stop_token_ids", "a list of token ids", |value| {
            let ids = value.as_array()?.iter();
            ids.map(|id| u32::try_from(id.as_u64()?).ok()).collect()
        });
        ids.unwrap_or_default()
    }

    /// Takes the tools of a chat as JSON; empty if there are none. Calls of tools are part of the
    /// answer's text, in the form that the model was trained with.
    fn tools(&mut self, is_chat: bool) -> String {
        if !is_chat {
            return String::new();
        }
        let choice = self.given.remove("tool_choice");
        let tools = self.take("tools", "a list of tools", |v| v.as_array().cloned());
        let tools = tools.filter(|tools| !tools.is_empty());
        match &choice {
            Some(Value::String(choice)) if choice == "auto" => {}
            Some(Value::String(choice)) if choice == "none" => return String::new(),
            Some(other) => self.wrong(
                "tool_choice",
                other,
                "the model chooses: use \"auto\", or \"none\" to leave the tools out",
            ),
            None => {}
        }
        tools.map_or_else(String::new, |tools| Value::Array(tools).to_string())
    }

    /// Takes the options of a stream. Returns true if it ends with the numbers of tokens.
    fn stream_options(&mut self, streams: bool) -> bool {
        let Some(mut options) =
            self.take("stream_options", "an object", |v| v.as_object().cloned())
        else {
            return false;
        };
        if !streams {
            let problem = "has no meaning without stream: leave it out";
            self.bad.push("stream_options", problem);
        }
        // Padding against observers of lengths, of which there is none here.
        options.remove("include_obfuscation");
        let includes_usage = options.remove("include_usage").unwrap_or_default();
        for name in options.keys() {
            let name = format!("stream_options.{}", shortened(name, MAX_REPEATED));
            self.bad.push(name, "is not supported");
        }
        match includes_usage {
            Value::Null => false,
            Value::Bool(includes) => includes,
            other => {
                let name = "stream_options.include_usage";
                self.wrong(name, &other, "it must be true or false");
                false
            }
        }
    }

    /// Refuses what is left, unless it has no effect. Returns all problems.
    fn finish(mut self) -> Violations {
        for (name, value) in &self.given {
            if WITHOUT_EFFECT.contains(&name.as_str()) || is_neutral(name, value) {
                continue;
            }
            let remedy = match name.as_str() {
                "top_logprobs" => "is a parameter of chats: logprobs is the number of tokens here",
                "echo" => "is not supported: ScoreCompletions has the log-probs of given texts",
                _ => "is not supported: leave it out",
            };
            self.bad.push(shortened(name, MAX_REPEATED), remedy);
        }
        self.bad
    }
}

/// Returns true if a parameter that is not supported has the value that changes nothing.
fn is_neutral(name: &str, value: &Value) -> bool {
    match name {
        "frequency_penalty" | "presence_penalty" | "top_logprobs" | "min_p" | "min_tokens" => {
            value.as_f64() == Some(0.0)
        }
        "best_of" | "repetition_penalty" | "length_penalty" => value.as_f64() == Some(1.0),
        "echo" | "use_beam_search" => *value == Value::Bool(false),
        "skip_special_tokens" => *value == Value::Bool(true),
        "logit_bias" => value.as_object().is_some_and(Map::is_empty),
        "suffix" => value.as_str() == Some(""),
        "modalities" => *value == serde_json::json!(["text"]),
        "response_format" => *value == serde_json::json!({"type": "text"}),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
