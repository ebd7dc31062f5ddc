//! Generation: continues prompts with samples from a policy, and turns the tokens into text.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::auth::access::check_weights;
use super::auth::quota::{QuotaShare, ScoringQuota};
use super::blocking::blocking;
use super::error::{Result, ServiceError};
use super::limiter::Limiter;
use super::policies::{PolicyResolver, Resolved};
use super::shutdown::Shutdown;
use super::template_date::TemplateDate;
use super::usage::UsageMeter;
use crate::domain::access::Caller;
use crate::domain::dataset::Text;
use crate::domain::message::TemplateArguments;
use crate::domain::names::{CheckpointRef, PolicyName};
use crate::domain::training::Truncation;
use crate::domain::usage::Usage;
use crate::engine::Engine;
use crate::engine::api::{
    EngineError, GenerationEnd, GenerationEvent, GenerationRequest, GenerationResult,
    GenerationStream,
};
use crate::formats::tokenizer::ChatTokenizer;
use crate::infer::detokenize::{IncrementalText, TokenTexts};
use crate::infer::encode::PairEncoder;
use crate::infer::generate::{LogProbOptions, Sampled, SamplingOptions, ScoredToken};
use crate::model::error::ModelError;

/// Maximum text of a prompt and its template arguments, in bytes.
const MAX_PROMPT_BYTES: usize = 16 << 20;
/// Maximum number of prompts that are tokenised at one time.
const MAX_TOKENIZING_PROMPTS: usize = 4;
/// Maximum number of tokens, of all samples together, that [`Generation::next`] returns at once.
const MAX_TOKENS_AT_ONCE: usize = 256;

/// The prompt of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerationPrompt {
    /// A text or chat messages, which are encoded.
    Text(Text),
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

/// A prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// The policy.
    pub policy: PolicyName,
    /// The prompt.
    pub prompt: GenerationPrompt,
    /// Tools and chat template variables; they override those of the policy's job.
    pub arguments: TemplateArguments,
    /// Number of samples; at least one.
    pub samples: usize,
    /// Maximum number of tokens of each sample; at least one.
    pub max_tokens: usize,
    /// Temperature, top-p, top-k and seed with which tokens are chosen.
    pub sampling: SamplingOptions,
    /// Texts that end a sample; none is empty.
    pub stop: Vec<String>,
    /// Tokens that end a sample, besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// True to continue after the model's own end tokens.
    pub ignore_eos: bool,
    /// Log-probs that are wanted besides those of the generated tokens.
    pub log_probs: LogProbOptions,
    /// True to return the texts of tokens.
    pub token_texts: bool,
}

/// A token with its log-prob, and its text if that was asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct LikelyToken {
    /// Its id.
    pub token: u32,
    /// Its log-prob, in nats.
    pub log_prob: f32,
    /// Its text; empty if nobody asked for texts.
    pub text: String,
}

/// A token of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptPart {
    /// Its id.
    pub token: u32,
    /// Its log-prob, in nats; `None` for the first token.
    pub log_prob: Option<f32>,
    /// Its text; empty if nobody asked for texts.
    pub text: String,
    /// The most likely tokens at its place, if they were asked for.
    pub top: Vec<LikelyToken>,
}

/// New tokens of a sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GeneratedPart {
    /// Index of the sample.
    pub sample: usize,
    /// Text that they complete.
    pub text: String,
    /// Their ids.
    pub tokens: Vec<u32>,
    /// Their log-probs, in nats.
    pub log_probs: Vec<f32>,
    /// Their texts; empty if nobody asked for them.
    pub texts: Vec<String>,
    /// The most likely tokens at the place of each, if they were asked for.
    pub top: Vec<Vec<LikelyToken>>,
    /// Set with the last part of the sample.
    pub end: Option<GenerationEnd>,
}

/// Continues prompts.
pub struct GenerationService {
    policies: PolicyResolver,
    engine: Engine,
    quota: ScoringQuota,
    usage: UsageMeter,
    tokenizers: Limiter,
    shutdown: Shutdown,
    template_date: TemplateDate,
}

/// A request in progress. Dropping it cancels it.
pub struct Generation {
    events: CountedEvents,
    samples: Vec<SampleText>,
    stop: Vec<String>,
    tokenizer: Arc<ChatTokenizer>,
    version: String,
    prompt_tokens: usize,
    completion_tokens: usize,
    /// Tokens of the prompt with their log-probs that were not returned yet.
    prompt_left: std::vec::IntoIter<TokenOfPrompt>,
    /// The texts of tokens, if they were asked for.
    texts: Option<Arc<TokenTexts>>,
    /// Number of the most likely tokens at each place.
    top: usize,
    /// Parts that were not returned yet.
    parts: Vec<GeneratedPart>,
    shutdown: Shutdown,
    _quota: Option<QuotaShare>,
}

/// A token of a prompt, and what the engine says of it: nothing of the first one.
type TokenOfPrompt = (u32, Option<ScoredToken>);

/// A request whose prompt was run: its events, the name of the weights, and the prompt's tokens
/// from the second on if their log-probs are wanted.
type StartedRequest = (CountedEvents, String, Vec<ScoredToken>);

/// The events of a request. When dropped, it cancels the request and counts the work for the owner,
/// also that of tokens that nobody has read.
struct CountedEvents {
    stream: GenerationStream,
    /// Number of tokens of the prompt.
    prompt: usize,
    /// Number of tokens that were computed, with those of the prompt.
    computed: usize,
    owner: String,
    usage: UsageMeter,
}

/// The text of a sample.
#[derive(Default)]
struct SampleText {
    text: IncrementalText,
    ended: bool,
}

impl GenerationService {
    /// Creates the service. The quota is shared with scoring.
    pub(super) fn new(
        policies: PolicyResolver,
        engine: Engine,
        quota: ScoringQuota,
        usage: UsageMeter,
        shutdown: Shutdown,
        template_date: TemplateDate,
    ) -> Self {
        GenerationService {
            policies,
            engine,
            quota,
            usage,
            tokenizers: Limiter::new(MAX_TOKENIZING_PROMPTS),
            shutdown,
            template_date,
        }
    }

    /// Begins a request, and returns when its prompt has been computed.
    ///
    /// # Errors
    /// `InvalidArgument` for a prompt that cannot be encoded or exceeds a limit; `PermissionDenied`
    /// for another client's job; `NotFound` if the server does not have the policy;
    /// `FailedPrecondition` if its weights cannot be used, or if the server computes on a GPU, for
    /// which generation is not implemented; `Unavailable` if too many requests wait or the server
    /// is shutting down; `ResourceExhausted` if memory is not sufficient or the client's unanswered
    /// requests have too many tokens.
    pub async fn begin(&self, caller: &Caller, options: GenerateOptions) -> Result<Generation> {
        self.shutdown.refuse_new_work()?;
        check_weights(&self.policies.store, caller, &options.policy).await?;
        let policy = self.policies.resolve(&options.policy).await?;
        let tokenizer = self.engine.tokenizer(&policy.model)?;
        let prompt = self.tokenize(&policy, tokenizer.clone(), &options).await?;
        let mut stop_tokens = options.stop_token_ids.clone();
        if !options.ignore_eos {
            stop_tokens.extend(tokenizer.end_ids());
        }
        let mut request = GenerationRequest {
            prompt,
            samples: options.samples,
            max_tokens: options.max_tokens,
            sampling: options.sampling.clone(),
            stop_tokens,
            log_probs: options.log_probs,
        };
        request.max_tokens = match self.engine.check_generation(&policy.weights, &request) {
            Err(e @ EngineError::PromptTooLong { .. }) if is_token_ids(&options.prompt) => {
                let problem = format!("is too long: {e}");
                return Err(ServiceError::invalid("prompt_token_ids", problem));
            }
            checked => checked?,
        };
        let prompt_tokens = request.prompt.len();
        let prompt_ids = match options.log_probs.prompt {
            true => request.prompt.clone(),
            false => Vec::new(),
        };
        let texts = match options.token_texts {
            true => Some(Arc::new(TokenTexts::new(&tokenizer).map_err(undecodable)?)),
            false => None,
        };
        let most = prompt_tokens + request.samples.saturating_mul(request.max_tokens);
        let quota = self.quota.take(&caller.owner, most)?;
        let owner = &caller.owner;
        let (events, version, scored) = match self.start(owner, &policy, request.clone()).await {
            // The job stopped running meanwhile. Its latest checkpoint has the weights that it
            // trained last, unless it was cancelled or failed after that checkpoint.
            Err(EngineError::NotResident(_)) if policy.job.is_some() => {
                let Some(job) = policy.job.clone() else {
                    return Err(ServiceError::internal("a live policy without a job"));
                };
                let latest = CheckpointRef::Latest;
                let model = policy.model.clone();
                let stored = self.policies.resolve_stored(job, model, latest).await?;
                self.start(owner, &stored, request).await
            }
            started => started,
        }?;
        Ok(Generation {
            samples: (0..options.samples)
                .map(|_| SampleText::default())
                .collect(),
            stop: options.stop,
            events,
            tokenizer,
            version,
            prompt_tokens,
            completion_tokens: 0,
            prompt_left: with_first(prompt_ids, scored).into_iter(),
            texts,
            top: options.log_probs.top,
            parts: Vec::new(),
            shutdown: self.shutdown.clone(),
            _quota: quota,
        })
    }

    /// Gives a request to the engine and waits until its prompt has been computed.
    async fn start(
        &self,
        owner: &str,
        policy: &Resolved,
        request: GenerationRequest,
    ) -> std::result::Result<StartedRequest, EngineError> {
        let mut events = CountedEvents {
            prompt: request.prompt.len(),
            stream: self.engine.generate(&policy.weights, request)?,
            computed: 0,
            owner: owner.to_owned(),
            usage: self.usage.clone(),
        };
        let version = policy.version.clone();
        match events.next().await {
            Some(Ok(GenerationEvent::Started { live_step, prompt })) => Ok((
                events,
                match live_step {
                    Some(step) => format!("{version}@{step}"),
                    None => version,
                },
                prompt,
            )),
            Some(Err(e)) => Err(e),
            Some(Ok(GenerationEvent::Token { .. })) => {
                Err(EngineError::Device("a token came before the prompt".into()))
            }
            None => Err(EngineError::Draining),
        }
    }

    /// Encodes the prompt on a blocking thread.
    async fn tokenize(
        &self,
        policy: &Resolved,
        tokenizer: Arc<ChatTokenizer>,
        options: &GenerateOptions,
    ) -> Result<Vec<u32>> {
        let own = &options.arguments;
        let is_chat = matches!(options.prompt, GenerationPrompt::Text(Text::Chat(_)));
        if !is_chat && !own.is_empty() {
            let field = match own.tools {
                Some(_) => "tools",
                None => "chat_template_kwargs",
            };
            return Err(ServiceError::invalid(
                field,
                "applies only to chat messages, because the chat template renders it: send chat \
                 messages, or leave this field and its JSON form empty",
            ));
        }
        let vocab_size = self.engine.model(&policy.model)?.vocab_size;
        let prompt = match &options.prompt {
            GenerationPrompt::Text(text) => text.clone(),
            GenerationPrompt::Tokens(ids) => return checked_ids(ids, vocab_size),
        };
        let bytes = prompt.bytes() + own.bytes();
        if bytes > MAX_PROMPT_BYTES {
            let message = format!(
                "has {bytes} bytes of text with its tools, at most {MAX_PROMPT_BYTES} are allowed: \
                 send a shorter one"
            );
            return Err(ServiceError::invalid("prompt", message));
        }
        let of_job = policy.job.as_ref().map(|job| job.template_arguments());
        let arguments = own.over(&of_job.unwrap_or_default());
        let date = self.template_date.of(policy.job.as_ref());
        let permit = self.tokenizers.acquire().await?;
        let encoded = blocking(move || {
            let _permit = permit;
            PairEncoder::new(&tokenizer, usize::MAX, Truncation::KeepStart)
                .with_arguments(&arguments)
                .with_date(date)
                .with_vocab_size(vocab_size)
                .encode_to_continue(&prompt)
        })
        .await?;
        encoded.map_err(|e| ServiceError::invalid("prompt", e.to_string()))
    }
}

fn is_token_ids(prompt: &GenerationPrompt) -> bool {
    matches!(prompt, GenerationPrompt::Tokens(_))
}

/// Checks that a prompt's token ids are in the vocabulary, and that there are any.
fn checked_ids(ids: &[u32], vocab_size: usize) -> Result<Vec<u32>> {
    if ids.is_empty() {
        let problem = "is empty: a prompt needs at least one token";
        return Err(ServiceError::invalid("prompt_token_ids", problem));
    }
    match ids.iter().position(|id| *id as usize >= vocab_size) {
        None => Ok(ids.to_vec()),
        Some(place) => Err(ServiceError::invalid(
            format!("prompt_token_ids[{place}]"),
            format!(
                "is {}: the model's vocabulary has {vocab_size} tokens; send ids of this model's \
                 own tokenizer",
                ids.get(place).copied().unwrap_or_default()
            ),
        )),
    }
}

fn undecodable(e: ModelError) -> ServiceError {
    ServiceError::internal(format!("tokens cannot be decoded: {e}"))
}

/// Returns the tokens of a prompt. `scored` has those from the second on.
fn with_first(ids: Vec<u32>, scored: Vec<ScoredToken>) -> Vec<TokenOfPrompt> {
    let scored = std::iter::once(None).chain(scored.into_iter().map(Some));
    ids.into_iter().zip(scored).collect()
}

/// Returns likely tokens with their texts, if `texts` are wanted.
fn likely(
    tokenizer: &ChatTokenizer,
    texts: Option<&TokenTexts>,
    tokens: Vec<Sampled>,
) -> std::result::Result<Vec<LikelyToken>, ModelError> {
    let tokens = tokens.into_iter().map(|Sampled { token, log_prob }| {
        Ok(LikelyToken {
            token,
            log_prob,
            text: text_of(tokenizer, texts, token)?,
        })
    });
    tokens.collect()
}

/// Returns the text of a token; empty if `texts` are not wanted.
fn text_of(
    tokenizer: &ChatTokenizer,
    texts: Option<&TokenTexts>,
    token: u32,
) -> std::result::Result<String, ModelError> {
    texts.map_or(Ok(String::new()), |texts| texts.of(tokenizer, token))
}

impl Generation {
    /// Returns the name of the weights that generate.
    pub fn policy_version(&self) -> &str {
        &self.version
    }

    /// Returns the number of tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Returns the number of tokens of all samples so far.
    pub fn completion_tokens(&self) -> usize {
        self.completion_tokens
    }

    /// Returns the next tokens of the prompt, at most `MAX_TOKENS_AT_ONCE`, if their log-probs
    /// were asked for. Returns nothing after the last one.
    ///
    /// # Errors
    /// `Internal` if the tokenizer fails.
    pub async fn next_of_prompt(&mut self) -> Result<Vec<PromptPart>> {
        let left = self.prompt_left.by_ref();
        let some: Vec<TokenOfPrompt> = left.take(MAX_TOKENS_AT_ONCE).collect();
        if some.is_empty() {
            return Ok(Vec::new());
        }
        let (tokenizer, texts) = (self.tokenizer.clone(), self.texts.clone());
        let decoded = blocking(move || {
            let texts = texts.as_deref();
            let tokens = some.into_iter().map(|(token, scored)| {
                Ok(PromptPart {
                    token,
                    log_prob: scored.as_ref().map(|scored| scored.token.log_prob),
                    text: text_of(&tokenizer, texts, token)?,
                    top: match scored {
                        Some(scored) => likely(&tokenizer, texts, scored.top)?,
                        None => Vec::new(),
                    },
                })
            });
            tokens.collect::<std::result::Result<Vec<_>, ModelError>>()
        })
        .await?;
        decoded.map_err(undecodable)
    }

    /// Waits for new tokens and returns them, those of a sample together. Returns nothing after the
    /// last token of every sample.
    ///
    /// # Errors
    /// `Aborted` if the caller did not read for too long; `Unavailable` if the server is shutting
    /// down, or a training run needs the memory; `Internal` if a pass fails.
    pub async fn next(&mut self) -> Result<Vec<GeneratedPart>> {
        while self.samples.iter().any(|sample| !sample.ended) {
            let Some(event) = self.events.next().await else {
                return Err(match self.shutdown.has_begun() {
                    true => ServiceError::draining(),
                    false => ServiceError::internal("the device's worker has ended"),
                });
            };
            self.take(event?)?;
            // The texts of all likely tokens are decoded here, too.
            let step = match self.texts {
                Some(_) => 2 + self.top,
                None => 1,
            };
            let mut taken = step;
            while taken < MAX_TOKENS_AT_ONCE
                && let Some(event) = self.events.try_next()
            {
                self.take(event?)?;
                taken += step;
            }
            if !self.parts.is_empty() {
                return Ok(std::mem::take(&mut self.parts));
            }
        }
        Ok(Vec::new())
    }

    /// Adds an event to the parts.
    fn take(&mut self, event: GenerationEvent) -> Result<()> {
        let GenerationEvent::Token {
            sample: index,
            token,
            log_prob,
            top,
            end,
        } = event
        else {
            return Ok(());
        };
        let Some(sample) = self.samples.get_mut(index).filter(|sample| !sample.ended) else {
            // Tokens that were computed after a stop text had been found.
            return Ok(());
        };
        self.completion_tokens += 1;
        let mut new = sample
            .text
            .push(&self.tokenizer, token, &self.stop)
            .map_err(undecodable)?;
        if end.is_some() && !new.stopped {
            let last = sample
                .text
                .finish(&self.tokenizer, &self.stop)
                .map_err(undecodable)?;
            new.text.push_str(&last.text);
            new.stopped = last.stopped;
        }
        let end = match new.stopped {
            true => Some(GenerationEnd::Stop),
            false => end,
        };
        if end.is_some() {
            sample.ended = true;
            if let Some(flag) = self.events.stream.stopped.get(index) {
                flag.store(true, Ordering::Relaxed);
            }
        }
        let (tokenizer, texts) = (&self.tokenizer, self.texts.as_deref());
        let token_text = text_of(tokenizer, texts, token).map_err(undecodable)?;
        let top = likely(tokenizer, texts, top).map_err(undecodable)?;
        let known = self.parts.iter().position(|part| part.sample == index);
        let place = known.unwrap_or(self.parts.len());
        if known.is_none() {
            self.parts.push(GeneratedPart {
                sample: index,
                ..GeneratedPart::default()
            });
        }
        let part = &mut self.parts[place];
        part.text.push_str(&new.text);
        part.tokens.push(token);
        part.log_probs.push(log_prob);
        if self.texts.is_some() {
            part.texts.push(token_text);
        }
        if self.top > 0 {
            part.top.push(top);
        }
        part.end = end;
        Ok(())
    }
}

impl CountedEvents {
    /// Waits for the next event.
    async fn next(&mut self) -> Option<GenerationResult> {
        let event = self.stream.events.recv().await;
        self.count(event)
    }

    /// Returns the next event if it has come.
    fn try_next(&mut self) -> Option<GenerationResult> {
        let event = self.stream.events.try_recv().ok();
        self.count(event)
    }

    fn count(&mut self, event: Option<GenerationResult>) -> Option<GenerationResult> {
        self.computed += match &event {
            Some(Ok(GenerationEvent::Started { .. })) => self.prompt,
            Some(Ok(GenerationEvent::Token { .. })) => 1,
            Some(Err(_)) | None => 0,
        };
        event
    }
}

impl Drop for CountedEvents {
    fn drop(&mut self) {
        self.stream.events.close();
        while self.try_next().is_some() {}
        if self.computed > 0 {
            let work = Usage {
                scored_tokens: self.computed as u64,
                ..Usage::default()
            };
            self.usage.count(&self.owner, work);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use tokio::sync::mpsc;

    use super::*;
    use crate::service::store::{Store, StoreOptions};
    use crate::service::usage::today;

    #[tokio::test]
    async fn tokens_that_nobody_has_read_count_as_work() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &StoreOptions::default())
            .await
            .unwrap();
        let meter = UsageMeter::new(store.clone());
        let (sender, events) = mpsc::channel(10);
        let mut events = CountedEvents {
            stream: GenerationStream {
                events,
                stopped: [AtomicBool::new(false)].into(),
            },
            prompt: 7,
            computed: 0,
            owner: "team".into(),
            usage: meter.clone(),
        };
        let started = GenerationEvent::Started {
            live_step: None,
            prompt: Vec::new(),
        };
        sender.try_send(Ok(started)).unwrap();
        for token in 0..3 {
            let token = GenerationEvent::Token {
                sample: 0,
                token,
                log_prob: 0.0,
                top: Vec::new(),
                end: None,
            };
            sender.try_send(Ok(token)).unwrap();
        }
        // The caller reads one token and leaves.
        events.next().await;
        events.next().await;
        drop(events);
        meter.flush().await.unwrap();
        let days = (today() - 1, today() + 1);
        let stored = store.usage(None, days, false, 10).await.unwrap();
        assert_eq!(stored[0].usage.scored_tokens, 7 + 3);
        store.close().await;
    }
}
