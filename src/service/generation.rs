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
use crate::infer::detokenize::IncrementalText;
use crate::infer::encode::PairEncoder;
use crate::infer::generate::SamplingOptions;

/// Maximum text of a prompt and its template arguments, in bytes.
const MAX_PROMPT_BYTES: usize = 16 << 20;
/// Maximum number of prompts that are tokenised at one time.
const MAX_TOKENIZING_PROMPTS: usize = 4;
/// Maximum number of tokens, of all samples together, that [`Generation::next`] returns at once.
const MAX_TOKENS_AT_ONCE: usize = 256;

/// A prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// The policy.
    pub policy: PolicyName,
    /// The prompt.
    pub prompt: Text,
    /// Tools and chat template variables; they override those of the policy's job.
    pub arguments: TemplateArguments,
    /// Number of samples; at least one.
    pub samples: usize,
    /// Maximum number of tokens of each sample; at least one.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Texts that end a sample; none is empty.
    pub stop: Vec<String>,
    /// Tokens that end a sample, besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// True to continue after the model's own end tokens.
    pub ignore_eos: bool,
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
    /// Parts that were not returned yet.
    parts: Vec<GeneratedPart>,
    shutdown: Shutdown,
    _quota: Option<QuotaShare>,
}

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
    /// is shutting down; `ResourceExhausted` if memory is not sufficient or the client has too many
    /// tokens in the queue.
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
        };
        request.max_tokens = self.engine.check_generation(&policy.weights, &request)?;
        let prompt_tokens = request.prompt.len();
        let most = prompt_tokens + request.samples.saturating_mul(request.max_tokens);
        let quota = self.quota.take(&caller.owner, most)?;
        let owner = &caller.owner;
        let (events, version) = match self.start(owner, &policy, request.clone()).await {
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
            parts: Vec::new(),
            shutdown: self.shutdown.clone(),
            _quota: quota,
        })
    }

    /// Gives a request to the engine and waits until its prompt has been computed. Also returns the
    /// name of the weights.
    async fn start(
        &self,
        owner: &str,
        policy: &Resolved,
        request: GenerationRequest,
    ) -> std::result::Result<(CountedEvents, String), EngineError> {
        let mut events = CountedEvents {
            prompt: request.prompt.len(),
            stream: self.engine.generate(&policy.weights, request)?,
            computed: 0,
            owner: owner.to_owned(),
            usage: self.usage.clone(),
        };
        let version = policy.version.clone();
        match events.next().await {
            Some(Ok(GenerationEvent::Started { live_step })) => Ok((
                events,
                match live_step {
                    Some(step) => format!("{version}@{step}"),
                    None => version,
                },
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
        let (prompt, own) = (options.prompt.clone(), &options.arguments);
        if let Text::Plain(_) = prompt
            && !own.is_empty()
        {
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
        let vocab_size = self.engine.model(&policy.model)?.vocab_size;
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
            let mut taken = 1;
            while taken < MAX_TOKENS_AT_ONCE
                && let Some(event) = self.events.try_next()
            {
                self.take(event?)?;
                taken += 1;
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
        let undecodable = |e| ServiceError::internal(format!("tokens cannot be decoded: {e}"));
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
        let started = GenerationEvent::Started { live_step: None };
        sender.try_send(Ok(started)).unwrap();
        for token in 0..3 {
            let token = GenerationEvent::Token {
                sample: 0,
                token,
                log_prob: 0.0,
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
