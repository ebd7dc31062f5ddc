//! From the answer of a gRPC call to OpenAI's JSON: one object, a stream of chunks, or an error.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Response, StatusCode};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::endpoint::Endpoint;
use super::request::AnswerOptions;
use super::tokens::{self, AnswerLogProbs, AnswerToken};
use crate::rpc::client::field_violations;
use crate::rpc::pb;
use crate::rpc::rest::answer::{self, StreamText, conversion};
use crate::rpc::rest::request::MAX_INLINE;
use crate::rpc::status::status;
use crate::service::error::ServiceError;

/// Number of prompts of a request that are continued at the same time.
const PROMPTS_AT_ONCE: usize = 8;
/// Maximum size of the answers to all prompts of a request together, in MiB as gRPC sends them.
/// The JSON of tokens with log-probs is up to 8 times as long, and grows in a buffer of up to twice
/// its size.
const MAX_ANSWERS_MIB: usize = 32;
/// An empty list of choices in the JSON of an answer.
const NO_CHOICES: &str = r#""choices":[]"#;
/// Permits for converting answers above [`MAX_INLINE`]: two at the same time, further ones wait.
static LARGE_ANSWER_PERMITS: Semaphore = Semaphore::const_new(2);

/// The gRPC request's field, and OpenAI's older parameter, for the maximum number of tokens.
const MAX_TOKENS: &str = "max_tokens";
/// Names of the gRPC request's fields, and those of OpenAI's parameters.
const PARAMETERS: [(&str, &str); 8] = [
    ("policy", "model"),
    ("samples", "n"),
    ("prompt.chat.messages", "messages"),
    ("prompt.chat", "messages"),
    ("prompt.plain", "prompt"),
    ("prompt_token_ids", "prompt"),
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

/// The part of a request that an error belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ErrorPlace {
    /// A chat, with the parameter that limits its tokens.
    Chat(&'static str),
    /// A request for text completions as a whole.
    Text,
    /// The prompt with this index, of several.
    Prompt(usize),
}

impl ErrorPlace {
    /// Returns the name of the parameter that limits the tokens of the request.
    fn token_limit(self) -> &'static str {
        match self {
            ErrorPlace::Chat(token_limit) => token_limit,
            ErrorPlace::Text | ErrorPlace::Prompt(_) => MAX_TOKENS,
        }
    }
}

/// Returns an error in OpenAI's form, for a request that is refused before its body is read.
pub fn error(http: StatusCode, status: &Status) -> Response<Body> {
    error_of(http, status, ErrorPlace::Text)
}

/// Returns an error in OpenAI's form.
fn error_of(http: StatusCode, status: &Status, place: ErrorPlace) -> Response<Body> {
    let body = error_json(http, status, place).to_string();
    answer::error_with(http, status, body.into())
}

fn error_json(http: StatusCode, status: &Status, place: ErrorPlace) -> Value {
    // The service's advice has the name of its own field.
    let lower_limit = format!("lower {}", place.token_limit());
    let with_limit = |text: &str| text.replace("lower max_tokens", &lower_limit);
    let wrong: Vec<_> = field_violations(status)
        .into_iter()
        .map(|(field, problem)| (parameter(&field, place), with_limit(&problem)))
        .collect();
    let message = match wrong.is_empty() {
        true => with_limit(status.message()),
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
fn parameter(field: &str, place: ErrorPlace) -> String {
    // The prompt of a chat as a whole, e.g. one that is too long.
    if matches!(place, ErrorPlace::Chat(_)) && field == "prompt" {
        return "messages".to_owned();
    }
    if field == MAX_TOKENS {
        return place.token_limit().to_owned();
    }
    // A message is sent as JSON in this field, which OpenAI's messages do not have.
    let field = field.strip_suffix(".fields_json").unwrap_or(field);
    let of = |(from, to): &(&str, &str)| {
        let rest = field.strip_prefix(from)?;
        let ends = rest.is_empty() || rest.starts_with(['.', '[']);
        ends.then(|| format!("{to}{rest}"))
    };
    let name = PARAMETERS.iter().find_map(of);
    let name = name.unwrap_or_else(|| field.to_owned());
    let rest = name.strip_prefix("prompt");
    match (place, rest.filter(|r| r.is_empty() || r.starts_with('['))) {
        (ErrorPlace::Prompt(index), Some(rest)) => format!("prompt[{index}]{rest}"),
        _ => name,
    }
}

/// The messages of a call, or the error that ended it.
type CallAnswer = Result<BytesMut, (StatusCode, Status)>;

/// The messages of the calls for all prompts in order, or the error of one of them.
type AllAnswers = Result<Vec<BytesMut>, (ErrorPlace, StatusCode, Status)>;

/// Number of bytes of all answers to a request so far, those of calls that failed included.
#[derive(Clone, Default)]
struct AnswerBytes(Arc<AtomicUsize>);

impl AnswerBytes {
    /// Adds the bytes of a frame.
    ///
    /// # Errors
    /// `InvalidArgument` above [`MAX_ANSWERS_MIB`].
    fn add(&self, bytes: usize) -> Result<(), Status> {
        let before = self.0.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) <= MAX_ANSWERS_MIB << 20 {
            return Ok(());
        }
        let long = format!(
            "asks for answers of more than {MAX_ANSWERS_MIB} MiB together: ask for fewer prompts, \
             samples, tokens or likely tokens in a request"
        );
        Err(status(ServiceError::invalid("body", long)))
    }

    /// Reads the body of a call that has begun.
    async fn read(&self, body: Body) -> CallAnswer {
        answer::read_counted(body, |bytes| self.add(bytes)).await
    }

    /// Makes a call and reads its answer.
    async fn read_call<E>(
        &self,
        call: impl Future<Output = Result<Response<Body>, E>>,
    ) -> Result<CallAnswer, E> {
        let (head, body) = call.await?.into_parts();
        Ok(match answer::failure(&head.headers) {
            Some(status) => Err((answer::http_status(&status, &head.headers), status)),
            None => self.read(body).await,
        })
    }
}

/// Reads the answers to several prompts: the one of the first, whose call has begun, and those of
/// the `further` messages, for which `call` makes calls. A call that is refused for lack of room
/// is made again when another one has ended.
async fn read_prompts<R, E>(
    first: Body,
    further: Vec<Bytes>,
    call: impl Fn(Bytes) -> R,
) -> Result<AllAnswers, E>
where
    R: Future<Output = Result<Response<Body>, E>> + Send + 'static,
    E: Send + 'static,
{
    let none = HeaderMap::new();
    let mut all = vec![BytesMut::new(); further.len() + 1];
    let mut waiting: VecDeque<(usize, Bytes)> = (1..).zip(further.iter().cloned()).collect();
    // Dropping the tasks ends the calls.
    let mut tasks: JoinSet<(usize, Result<CallAnswer, E>)> = JoinSet::new();
    let bytes = AnswerBytes::default();
    let of_first = bytes.clone();
    tasks.spawn(async move { (0, Ok(of_first.read(first).await)) });
    let mut at_once = PROMPTS_AT_ONCE;
    loop {
        while tasks.len() < at_once
            && let Some((prompt, message)) = waiting.pop_front()
        {
            let (answering, bytes) = (call(message), bytes.clone());
            tasks.spawn(async move { (prompt, bytes.read_call(answering).await) });
        }
        let Some(ended) = tasks.join_next().await else {
            return Ok(Ok(all));
        };
        let (prompt, answered) = match ended {
            Ok((prompt, answered)) => (prompt, answered?),
            Err(e) => {
                let e = conversion(e);
                return Ok(Err((ErrorPlace::Text, answer::http_status(&e, &none), e)));
            }
        };
        match answered {
            Ok(data) => {
                if let Some(place) = all.get_mut(prompt) {
                    *place = data;
                }
            }
            Err((http, e)) => {
                let message = further.get(prompt.wrapping_sub(1));
                let lacks_room = matches!(e.code(), Code::ResourceExhausted | Code::Unavailable);
                let may_fit_later = lacks_room && !tasks.is_empty();
                match message.filter(|_| may_fit_later) {
                    Some(message) => {
                        at_once = tasks.len();
                        waiting.push_front((prompt, message.clone()));
                    }
                    None => return Ok(Err((ErrorPlace::Prompt(prompt), http, e))),
                }
            }
        }
    }
}

impl AnswerConverter {
    /// Converts the answer of the gRPC call for the first prompt. `call` calls the service with the
    /// message for a further prompt.
    ///
    /// # Errors
    /// Returns the error of `call`.
    pub async fn convert<R, E>(
        self,
        response: Response<Body>,
        call: impl Fn(Bytes) -> R,
    ) -> Result<Response<Body>, E>
    where
        R: Future<Output = Result<Response<Body>, E>> + Send + 'static,
        E: Send + 'static,
    {
        let (head, body) = response.into_parts();
        let converted = match answer::failure(&head.headers) {
            Some(status) => {
                let http = answer::http_status(&status, &head.headers);
                error_of(http, &status, self.first_place())
            }
            None => self.answer(body, call).await?,
        };
        Ok(answer::with_headers(converted, head.headers))
    }

    /// Returns the place of an error of the first call.
    fn first_place(&self) -> ErrorPlace {
        let has_several = |asked: &AnswerOptions| !asked.further.is_empty();
        match self.endpoint {
            Endpoint::Chat => {
                let asked = self.asked.get();
                ErrorPlace::Chat(asked.map_or(MAX_TOKENS, |asked| asked.token_limit))
            }
            _ if self.asked.get().is_some_and(has_several) => ErrorPlace::Prompt(0),
            _ => ErrorPlace::Text,
        }
    }

    async fn answer<R, E>(self, body: Body, call: impl Fn(Bytes) -> R) -> Result<Response<Body>, E>
    where
        R: Future<Output = Result<Response<Body>, E>> + Send + 'static,
        E: Send + 'static,
    {
        let place = self.first_place();
        let asked = self.asked.get().cloned();
        if let Some(asked) = asked.clone().filter(|asked| asked.streams) {
            return Ok(answer::event_stream(body, Chunks::new(asked)));
        }
        let further = asked.as_ref().map(|asked| asked.further.clone());
        let read = match further.filter(|further| !further.is_empty()) {
            Some(further) => read_prompts(body, further, call).await?,
            None => match AnswerBytes::default().read(body).await {
                Ok(data) => Ok(vec![data]),
                Err((http, status)) => Err((place, http, status)),
            },
        };
        let data = match read {
            Ok(data) => data,
            Err((place, http, status)) => return Ok(error_of(http, &status, place)),
        };
        let bytes: usize = data.iter().map(BytesMut::len).sum();
        // The semaphore is never closed. The conversion has the permit, because it continues when
        // its request has been cancelled.
        let permit = match bytes > MAX_INLINE {
            true => Some(LARGE_ANSWER_PERMITS.acquire().await),
            false => None,
        };
        let convert = move || {
            let _permit = permit;
            match (self.endpoint, asked) {
                (Endpoint::Models, _) => {
                    models(first_of(data)).map(|list| list.to_string().into_bytes())
                }
                (Endpoint::Model(_), _) => {
                    one(first_of(data)).map(|model| model_json(&model).to_string().into_bytes())
                }
                (_, Some(asked)) => whole(data, &asked),
                (_, None) => Err(conversion("the request was not read")),
            }
        };
        Ok(match answer::inline_or_on_thread(bytes, convert).await {
            Ok(text) => answer::json(StatusCode::OK, text),
            Err(status) => {
                let http = answer::http_status(&status, &HeaderMap::new());
                error_of(http, &status, place)
            }
        })
    }
}

/// Returns the messages of the only call.
fn first_of(data: Vec<BytesMut>) -> BytesMut {
    data.into_iter().next().unwrap_or_default()
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

/// Text and tokens of one sample, and the reason why it ended.
#[derive(Clone, Default)]
struct Sample {
    text: String,
    /// Empty without log-probs.
    tokens: Vec<AnswerToken>,
    finish: Option<&'static str>,
}

/// The answer to one prompt.
struct PromptAnswer {
    samples: Vec<Sample>,
    /// Tokens of the prompt, if the answer begins with it.
    prompt: Vec<AnswerToken>,
    usage: pb::GenerationUsage,
    version: String,
}

impl PromptAnswer {
    fn read(mut data: BytesMut, asked: &AnswerOptions) -> Result<Self, Status> {
        let mut samples = vec![Sample::default(); asked.samples.max(1) as usize];
        let (mut prompt, mut usage, mut version) = (Vec::new(), None, String::new());
        while let Some(message) = answer::take_message(&mut data) {
            let response = pb::GenerateCompletionsResponse::decode(message).map_err(conversion)?;
            let tokens = response.prompt_tokens.into_iter();
            prompt.extend(tokens.map(AnswerToken::of_prompt));
            for mut delta in response.deltas {
                let Some(sample) = samples.get_mut(delta.index as usize) else {
                    return Err(conversion("it has more samples than were asked for"));
                };
                sample.text.push_str(&delta.text);
                sample.finish = finish(&delta).or(sample.finish);
                sample.tokens.extend(tokens::of_delta(&mut delta));
            }
            version = response.policy_version;
            usage = response.usage;
        }
        Ok(PromptAnswer {
            samples,
            prompt,
            usage: usage.ok_or_else(|| conversion("its end is missing"))?,
            version,
        })
    }

    /// Adds the prompt to the beginning of the sample. `text` is its text; `None` if it was sent as
    /// token ids.
    fn echo(&mut self, text: Option<&str>, drops_sample: bool) {
        let Some(sample) = self.samples.first_mut() else {
            return;
        };
        let mut tokens = std::mem::take(&mut self.prompt);
        let mut whole = match text {
            Some(text) => text.to_owned(),
            None => tokens.iter().map(|token| token.text.as_str()).collect(),
        };
        if drops_sample {
            self.usage.completion_tokens = 0;
            sample.finish = Some("length");
        } else {
            whole.push_str(&sample.text);
            tokens.append(&mut sample.tokens);
        }
        sample.text = whole;
        sample.tokens = tokens;
    }
}

/// An answer, or a chunk of a stream, as its JSON.
#[derive(Serialize)]
struct AnswerObject<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    /// It says which weights answered, as OpenAI's says which configuration did.
    system_fingerprint: &'a str,
    choices: Vec<AnswerChoice<'a>>,
    #[serde(skip_serializing_if = "AnswerUsage::is_absent")]
    usage: AnswerUsage,
}

/// One sample of an answer, or its new text in a chunk.
#[derive(Serialize)]
struct AnswerChoice<'a> {
    index: usize,
    #[serde(flatten)]
    content: ChoiceContent<'a>,
    logprobs: Option<AnswerLogProbs<'a>>,
    finish_reason: Option<&'static str>,
}

/// The text of a choice, in the field that its kind of answer has for it.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum ChoiceContent<'a> {
    /// The whole message of a chat.
    Message(ChatAnswer<'a>),
    /// The new part of a chat's message.
    Delta(ChatDelta<'a>),
    /// A text, or the new part of one.
    Text(&'a str),
}

#[derive(Serialize)]
struct ChatAnswer<'a> {
    role: &'static str,
    content: &'a str,
    /// Always null: no answer is refused.
    refusal: Option<&'static str>,
}

#[derive(Serialize)]
struct ChatDelta<'a> {
    /// Only in the first chunk of a sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

/// The numbers of tokens in an answer.
#[derive(Serialize)]
#[serde(untagged)]
enum AnswerUsage {
    /// The chunk has no such field.
    Absent,
    /// Null: they come in the last chunk.
    Later,
    /// They are known.
    Known {
        prompt_tokens: u32,
        completion_tokens: u32,
        total_tokens: u32,
    },
}

impl AnswerUsage {
    fn known(usage: &pb::GenerationUsage) -> Self {
        AnswerUsage::Known {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
        }
    }

    fn is_absent(&self) -> bool {
        matches!(self, AnswerUsage::Absent)
    }
}

/// Returns the JSON of the answer to a request that does not stream, from the messages of each
/// prompt's call. The choices of a prompt are written before the next one is decoded, because
/// decoded messages take several times as much memory as their text.
fn whole(all: Vec<BytesMut>, asked: &AnswerOptions) -> Result<Vec<u8>, Status> {
    let (mut text, mut index) = (Vec::new(), 0);
    let mut versions: Vec<String> = Vec::new();
    let mut usage = pb::GenerationUsage::default();
    for (i, data) in all.into_iter().enumerate() {
        let mut read = PromptAnswer::read(data, asked)?;
        if asked.echoes {
            let text = asked.prompts.get(i).and_then(Option::as_deref);
            read.echo(text, asked.drops_samples);
        }
        usage.prompt_tokens += read.usage.prompt_tokens;
        usage.completion_tokens += read.usage.completion_tokens;
        // The current weights of a running job may change between two prompts.
        if !versions.contains(&read.version) {
            versions.push(read.version);
        }
        for sample in read.samples {
            if index > 0 {
                text.push(b',');
            }
            let choice = whole_choice(index, &sample, asked);
            serde_json::to_writer(&mut text, &choice).map_err(conversion)?;
            index += 1;
        }
    }
    let versions = versions.join(", ");
    let answer = AnswerObject {
        id: &asked.id,
        object: match asked.is_chat {
            true => "chat.completion",
            false => "text_completion",
        },
        created: asked.created,
        model: &asked.model,
        system_fingerprint: &versions,
        choices: Vec::new(),
        usage: AnswerUsage::known(&usage),
    };
    let answer = serde_json::to_string(&answer).map_err(conversion)?;
    // No string of the answer has this text, because quotes in strings have backslashes.
    let (start, end) = answer
        .split_once(NO_CHOICES)
        .ok_or_else(|| conversion("it has no list of choices"))?;
    text.splice(0..0, format!("{start}\"choices\":[").into_bytes());
    text.extend_from_slice(b"]");
    text.extend_from_slice(end.as_bytes());
    Ok(text)
}

fn whole_choice<'a>(index: usize, sample: &'a Sample, asked: &AnswerOptions) -> AnswerChoice<'a> {
    let offsets = || tokens::offsets_in(&sample.tokens, &sample.text);
    AnswerChoice {
        index,
        content: match asked.is_chat {
            true => ChoiceContent::Message(ChatAnswer {
                role: "assistant",
                content: &sample.text,
                refusal: None,
            }),
            false => ChoiceContent::Text(&sample.text),
        },
        logprobs: tokens::log_probs(asked, &sample.tokens, offsets),
        finish_reason: sample.finish,
    }
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
    /// Number of characters of each sample's tokens so far.
    offsets: Arc<[AtomicUsize]>,
}

impl Chunks {
    fn new(asked: AnswerOptions) -> Self {
        let samples = 0..asked.samples.max(1);
        Chunks {
            has_begun: Arc::default(),
            is_complete: Arc::default(),
            offsets: samples.map(|_| AtomicUsize::new(0)).collect(),
            asked,
        }
    }

    /// Returns the log-probs of a sample's new tokens.
    fn new_log_probs<'a>(&self, sample: u32, new: &'a [AnswerToken]) -> Option<AnswerLogProbs<'a>> {
        tokens::log_probs(&self.asked, new, || {
            let Some(so_far) = self.offsets.get(sample as usize) else {
                return Vec::new();
            };
            let (places, end) = tokens::offsets(new, so_far.load(Ordering::Relaxed));
            so_far.store(end, Ordering::Relaxed);
            places
        })
    }

    /// Returns a chunk without the numbers of tokens.
    fn chunk<'a>(&'a self, choices: Vec<AnswerChoice<'a>>, version: &'a str) -> AnswerObject<'a> {
        AnswerObject {
            id: &self.asked.id,
            object: match self.asked.is_chat {
                true => "chat.completion.chunk",
                false => "text_completion",
            },
            created: self.asked.created,
            model: &self.asked.model,
            system_fingerprint: version,
            choices,
            usage: match self.asked.includes_usage {
                true => AnswerUsage::Later,
                false => AnswerUsage::Absent,
            },
        }
    }

    /// Returns the new text of a sample in the form of the request's API.
    fn new_content<'a>(&self, text: &'a str) -> ChoiceContent<'a> {
        match self.asked.is_chat {
            true => ChoiceContent::Delta(ChatDelta {
                role: None,
                content: (!text.is_empty()).then_some(text),
            }),
            false => ChoiceContent::Text(text),
        }
    }
}

/// Adds an event to the text of a stream.
fn event(text: &mut Vec<u8>, value: &impl Serialize) -> Result<(), Status> {
    text.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *text, value).map_err(conversion)?;
    text.extend_from_slice(b"\n\n");
    Ok(())
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
            for index in 0..self.asked.samples.max(1) as usize {
                let choice = AnswerChoice {
                    index,
                    content: ChoiceContent::Delta(ChatDelta {
                        role: Some("assistant"),
                        content: Some(""),
                    }),
                    logprobs: None,
                    finish_reason: None,
                };
                event(&mut text, &self.chunk(vec![choice], version))?;
            }
        }
        for mut delta in response.deltas {
            let (finish, new) = (finish(&delta), tokens::of_delta(&mut delta));
            // A token may have no whole character yet.
            if delta.text.is_empty() && finish.is_none() && new.is_empty() {
                continue;
            }
            let choice = AnswerChoice {
                index: delta.index as usize,
                content: self.new_content(&delta.text),
                logprobs: self.new_log_probs(delta.index, &new),
                finish_reason: finish,
            };
            event(&mut text, &self.chunk(vec![choice], version))?;
        }
        if response.usage.is_some() {
            self.is_complete.store(true, Ordering::Relaxed);
        }
        if let Some(usage) = response.usage.filter(|_| self.asked.includes_usage) {
            let mut last = self.chunk(Vec::new(), version);
            last.usage = AnswerUsage::known(&usage);
            event(&mut text, &last)?;
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
        let place = match self.asked.is_chat {
            true => ErrorPlace::Chat(self.asked.token_limit),
            false => ErrorPlace::Text,
        };
        let error = error_json(http, &status, place);
        Some(format!("data: {error}\n\n").into_bytes())
    }
}

#[cfg(test)]
mod tests;
