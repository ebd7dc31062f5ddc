//! From the answer of a gRPC call to OpenAI's JSON: one object, a stream of chunks, or an error.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::BytesMut;
use prost::Message as _;
use serde_json::{Value, json};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Response, StatusCode};
use tonic_types::StatusExt as _;

use super::endpoint::Endpoint;
use super::request::AnswerOptions;
use crate::rpc::client::field_violations;
use crate::rpc::pb;
use crate::rpc::rest::answer::{self, StreamText, conversion};
use crate::rpc::rest::request::MAX_INLINE;

/// Names of the gRPC request's fields, and those of OpenAI's parameters.
const PARAMETERS: [(&str, &str); 7] = [
    ("policy", "model"),
    ("samples", "n"),
    ("prompt.chat.messages", "messages"),
    ("prompt.chat", "messages"),
    ("prompt.plain", "prompt"),
    ("tools_json", "tools"),
    ("chat_template_kwargs_json", "chat_template_kwargs"),
];

/// Converts the answer of a call. It knows the request once the gRPC service has read it.
#[derive(Debug)]
pub struct AnswerConverter {
    /// The method.
    pub endpoint: Endpoint,
    /// The request.
    pub asked: Arc<OnceLock<AnswerOptions>>,
}

/// Returns an error in OpenAI's form, for a request that is refused before its body is read.
pub fn error(http: StatusCode, status: &Status) -> Response<Body> {
    error_of(http, status, false)
}

/// Returns an error in OpenAI's form. `is_chat` is true if the request continues a chat.
fn error_of(http: StatusCode, status: &Status, is_chat: bool) -> Response<Body> {
    let body = error_json(http, status, is_chat).to_string();
    answer::error_with(http, status, body.into())
}

fn error_json(http: StatusCode, status: &Status, is_chat: bool) -> Value {
    let wrong: Vec<_> = field_violations(status)
        .into_iter()
        .map(|(field, problem)| (parameter(&field, is_chat), problem))
        .collect();
    let message = match wrong.is_empty() {
        true => status.message().to_owned(),
        false => wrong
            .iter()
            .map(|(name, problem)| format!("{name} {problem}"))
            .collect::<Vec<_>>()
            .join("; "),
    };
    let kind = match http.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    let reason = status.get_details_error_info().map(|info| info.reason);
    json!({"error": {
        "message": message,
        "type": kind,
        "param": wrong.first().map(|(name, _)| name),
        "code": reason,
    }})
}

/// Returns the name of the parameter that a field of the gRPC request comes from.
fn parameter(field: &str, is_chat: bool) -> String {
    // The prompt of a chat as a whole, e.g. one that is too long.
    if is_chat && field == "prompt" {
        return "messages".to_owned();
    }
    // A message is sent as JSON in this field, which OpenAI's messages do not have.
    let field = field.strip_suffix(".fields_json").unwrap_or(field);
    let of = |(from, to): &(&str, &str)| {
        let rest = field.strip_prefix(from)?;
        let ends = rest.is_empty() || rest.starts_with(['.', '[']);
        ends.then(|| format!("{to}{rest}"))
    };
    let name = PARAMETERS.iter().find_map(of);
    name.unwrap_or_else(|| field.to_owned())
}

impl AnswerConverter {
    /// Converts the answer of the gRPC call.
    pub async fn convert(self, response: Response<Body>) -> Response<Body> {
        let (head, body) = response.into_parts();
        let converted = match answer::failure(&head.headers) {
            Some(status) => {
                let http = answer::http_status(&status, &head.headers);
                error_of(http, &status, self.endpoint == Endpoint::Chat)
            }
            None => self.answer(body).await,
        };
        answer::with_headers(converted, head.headers)
    }

    async fn answer(self, body: Body) -> Response<Body> {
        let is_chat = self.endpoint == Endpoint::Chat;
        let asked = self.asked.get().cloned();
        if let Some(asked) = asked.clone().filter(|asked| asked.streams) {
            let text = Chunks {
                asked,
                has_begun: Arc::default(),
                is_complete: Arc::default(),
            };
            return answer::event_stream(body, text);
        }
        let data = match answer::read_all(body).await {
            Ok(data) => data,
            Err((http, status)) => return error_of(http, &status, is_chat),
        };
        let is_small = data.len() <= MAX_INLINE;
        let convert = move || {
            let value = match (self.endpoint, asked) {
                (Endpoint::Models, _) => models(data),
                (Endpoint::Model(_), _) => one(data).map(|model| model_json(&model)),
                (_, Some(asked)) => whole(data, &asked),
                (_, None) => Err(conversion("the request was not read")),
            };
            value.map(|value| value.to_string())
        };
        let text = match is_small {
            true => convert(),
            false => tokio::task::spawn_blocking(convert)
                .await
                .unwrap_or_else(|e| Err(conversion(e))),
        };
        match text {
            Ok(text) => answer::json(StatusCode::OK, text),
            Err(status) => {
                let http = answer::http_status(&status, &HeaderMap::new());
                error_of(http, &status, is_chat)
            }
        }
    }
}

/// Decodes the message of a unary call.
fn one<M: prost::Message + Default>(mut data: BytesMut) -> Result<M, Status> {
    let message = answer::take_message(&mut data).ok_or_else(|| conversion("it has no message"))?;
    M::decode(message).map_err(conversion)
}

fn models(data: BytesMut) -> Result<Value, Status> {
    let list: pb::ListModelsResponse = one(data)?;
    let models: Vec<Value> = list.models.iter().map(model_json).collect();
    Ok(json!({"object": "list", "data": models}))
}

fn model_json(model: &pb::Model) -> Value {
    json!({
        "id": model.name.strip_prefix("models/").unwrap_or(&model.name),
        "object": "model",
        // A base model has no time of creation, but clients need a number.
        "created": 0,
        "owned_by": "bradley",
        "max_model_len": model.max_position_embeddings,
    })
}

/// Text of one sample, and the reason why it ended.
#[derive(Clone, Default)]
struct Sample {
    text: String,
    finish: Option<&'static str>,
}

/// Returns the answer to a request that does not stream.
fn whole(mut data: BytesMut, asked: &AnswerOptions) -> Result<Value, Status> {
    let mut samples = vec![Sample::default(); asked.samples.max(1) as usize];
    let (mut usage, mut version) = (None, String::new());
    while let Some(message) = answer::take_message(&mut data) {
        let response = pb::GenerateCompletionsResponse::decode(message).map_err(conversion)?;
        for delta in &response.deltas {
            let Some(sample) = samples.get_mut(delta.index as usize) else {
                return Err(conversion("it has more samples than were asked for"));
            };
            sample.text.push_str(&delta.text);
            sample.finish = finish(delta).or(sample.finish);
        }
        version = response.policy_version;
        usage = response.usage;
    }
    let usage = usage.ok_or_else(|| conversion("its end is missing"))?;
    let choices = samples.into_iter().enumerate().map(|(i, sample)| {
        let message = json!({"role": "assistant", "content": sample.text, "refusal": null});
        match asked.is_chat {
            true => json!({
                "index": i,
                "message": message,
                "logprobs": null,
                "finish_reason": sample.finish,
            }),
            false => json!({
                "index": i,
                "text": sample.text,
                "logprobs": null,
                "finish_reason": sample.finish,
            }),
        }
    });
    let object = match asked.is_chat {
        true => "chat.completion",
        false => "text_completion",
    };
    let mut value = envelope(asked, object, choices.collect(), &version);
    value["usage"] = usage_json(&usage);
    Ok(value)
}

fn envelope(asked: &AnswerOptions, object: &str, choices: Vec<Value>, version: &str) -> Value {
    json!({
        "id": asked.id,
        "object": object,
        "created": asked.created,
        "model": asked.model,
        // It says which weights answered, as OpenAI's says which configuration did.
        "system_fingerprint": version,
        "choices": choices,
    })
}

fn usage_json(usage: &pb::GenerationUsage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}

fn finish(delta: &pb::CompletionDelta) -> Option<&'static str> {
    match delta.finish_reason() {
        pb::FinishReason::Unspecified => None,
        pb::FinishReason::Stop => Some("stop"),
        pb::FinishReason::Length => Some("length"),
    }
}

/// Turns the messages of GenerateCompletions into OpenAI's chunks.
#[derive(Clone)]
struct Chunks {
    asked: AnswerOptions,
    /// True once the role of the answers has been sent.
    has_begun: Arc<AtomicBool>,
    /// True once the last message has come.
    is_complete: Arc<AtomicBool>,
}

impl Chunks {
    fn chunk(&self, choices: Vec<Value>, version: &str) -> Value {
        let object = match self.asked.is_chat {
            true => "chat.completion.chunk",
            false => "text_completion",
        };
        let mut chunk = envelope(&self.asked, object, choices, version);
        if self.asked.includes_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn choice(&self, index: u32, text: &str, finish: Option<&str>) -> Value {
        match self.asked.is_chat {
            true => {
                let delta = match text.is_empty() {
                    true => json!({}),
                    false => json!({"content": text}),
                };
                json!({
                    "index": index,
                    "delta": delta,
                    "logprobs": null,
                    "finish_reason": finish,
                })
            }
            false => json!({
                "index": index,
                "text": text,
                "logprobs": null,
                "finish_reason": finish,
            }),
        }
    }
}

fn event(text: &mut Vec<u8>, value: &Value) {
    text.extend_from_slice(format!("data: {value}\n\n").as_bytes());
}

impl StreamText for Chunks {
    fn has_comments(&self) -> bool {
        true
    }

    fn of(&self, message: &[u8]) -> Result<Vec<u8>, Status> {
        let response = pb::GenerateCompletionsResponse::decode(message).map_err(conversion)?;
        let version = &response.policy_version;
        let mut text = Vec::new();
        if self.asked.is_chat && !self.has_begun.swap(true, Ordering::Relaxed) {
            for index in 0..self.asked.samples.max(1) {
                let mut choice = self.choice(index, "", None);
                choice["delta"] = json!({"role": "assistant", "content": ""});
                event(&mut text, &self.chunk(vec![choice], version));
            }
        }
        for delta in &response.deltas {
            let finish = finish(delta);
            // A token may have no whole character yet.
            if delta.text.is_empty() && finish.is_none() {
                continue;
            }
            let choice = self.choice(delta.index, &delta.text, finish);
            event(&mut text, &self.chunk(vec![choice], version));
        }
        if response.usage.is_some() {
            self.is_complete.store(true, Ordering::Relaxed);
        }
        if let Some(usage) = response.usage.filter(|_| self.asked.includes_usage) {
            let mut last = self.chunk(Vec::new(), version);
            last["usage"] = usage_json(&usage);
            event(&mut text, &last);
        }
        Ok(text)
    }

    fn last(&self, error: Option<Status>) -> Option<Vec<u8>> {
        let status = match error {
            Some(status) => status,
            None if self.is_complete.load(Ordering::Relaxed) => {
                return Some(b"data: [DONE]\n\n".to_vec());
            }
            // A client would take the beginning of the text for all of it.
            None => conversion("its end is missing"),
        };
        let http = answer::http_status(&status, &HeaderMap::new());
        let mut text = Vec::new();
        event(&mut text, &error_json(http, &status, self.asked.is_chat));
        Some(text)
    }
}

#[cfg(test)]
mod tests;
