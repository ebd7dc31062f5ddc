//! Scoring: names are resolved once per request, texts tokenised off the async threads, the
//! engine's log-probs turned into rewards, answers ranked.
//!
//! A pair's way: [`ScoringService::session`] → [`ScoringSession::admit`] (text budget, tokens,
//! quota) → [`AdmittedPair::score`].

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use jiff::civil::DateTime;
use tokio::sync::OwnedSemaphorePermit;

use super::auth::access::check_weights;
use super::auth::quota::{QuotaShare, ScoringQuota};
use super::blocking::blocking;
use super::error::{Result, ServiceError};
use super::limiter::Limiter;
use super::policies::{PolicyResolver, Resolved};
use super::shutdown::Shutdown;
use super::template_date::TemplateDate;
use crate::domain::access::Caller;
use crate::domain::dataset::Text;
use crate::domain::dpo::Normalization;
use crate::domain::message::TemplateArguments;
use crate::domain::names::{CheckpointRef, PolicyName};
use crate::domain::training::Truncation;
use crate::engine::Engine;
use crate::engine::api::{EngineError, ScoreItem, ScoredItem, WeightsRef};
use crate::formats::tokenizer::ChatTokenizer;
use crate::infer::encode::{EncodedCompletion, PairEncoder, Part, group};
use crate::math::score::{AnswerLogps, best_of, preference_probability, ranking, reward};
use crate::telemetry::trace;

/// Bytes of one pair's text, or of a prompt and its answers: what the longest row could use is less
/// than a tenth.
const MAX_TEXT: usize = 16 << 20;

/// Requests that may tokenise side by side.
const TOKENIZERS: usize = 4;
/// KiB of text that may be on their way to the device.
const TEXT_BUDGET_KIB: usize = 256 << 10;

/// A plain model is its own reference unless another is named.
const SAME_WEIGHTS: &str = "policy and reference are the same weights: every reward is 0 and every probability is 0.5; name another reference, or a \
                            trained checkpoint as the policy";

const MOVING_REFERENCE: &str = "the job is training and moves its reference (TR-DPO): each pair's rewards are against the reference as it is at the step \
                                that scores the pair; name a checkpoint to score it against the reference that it holds";

/// What a request wants to score with.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreOptions {
    /// The policy.
    pub policy: PolicyName,
    /// `None`: the job's own pinned reference, or for a model the model itself.
    pub reference: Option<PolicyName>,
    /// `None`: the job's β, or 0.1.
    pub beta: Option<f64>,
    /// `None`: the job's, or 1024.
    pub max_length: Option<usize>,
    /// `None`: as the job trains its reward, or the sum for a model.
    pub normalization: Option<Normalization>,
    /// Tools, and variables for the chat template, for dialogues without their own.
    pub arguments: TemplateArguments,
}

/// A prompt with two answers.
#[derive(Clone, Debug, PartialEq)]
pub struct PairToScore {
    /// x.
    pub prompt: Text,
    /// y_a.
    pub a: Text,
    /// y_b.
    pub b: Text,
    /// Its own tools and variables for the chat template, which win over those of the request.
    pub arguments: TemplateArguments,
}

/// What is known of one answer.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredCompletion {
    /// Σ log π_θ, in nats.
    pub policy_logprob: f64,
    /// Σ log π_ref; 0 without a reference.
    pub reference_logprob: f64,
    /// β·lr, or β·lr/n, by the session's normalization.
    pub reward: f64,
    /// The completion's tokens.
    pub token_ids: Vec<u32>,
    /// Prompt tokens before them.
    pub prompt_tokens: usize,
    /// Whether max_length cut it.
    pub truncated: bool,
    /// log π_θ per token.
    pub policy_tokens: Vec<f32>,
    /// log π_ref per token; empty without a reference.
    pub reference_tokens: Vec<f32>,
}

/// The score of a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredPair {
    /// Pr(a ≻ b).
    pub probability: f64,
    /// r_a − r_b.
    pub margin: f64,
    /// The first answer.
    pub a: ScoredCompletion,
    /// The second.
    pub b: ScoredCompletion,
    /// The weights that scored.
    pub policy_version: String,
}

/// Scores pairs and completions.
pub struct ScoringService {
    policies: PolicyResolver,
    engine: Engine,
    quota: ScoringQuota,
    tokenizers: Limiter,
    /// KiB of text on their way to the device.
    texts: Limiter,
    shutdown: Shutdown,
    template_date: TemplateDate,
}

/// An answer among others to one prompt.
#[derive(Debug)]
pub struct RankedCompletion {
    /// Its score, or why it has none.
    pub score: Result<ScoredCompletion>,
    /// The probability that it is the best; 0 without a score.
    pub probability: f64,
}

/// Scored answers to one prompt.
#[derive(Debug)]
pub struct RankedCompletions {
    /// One for each answer, in the order of the request.
    pub answers: Vec<RankedCompletion>,
    /// Indices of the answers that have a score, the best first.
    pub ranking: Vec<usize>,
}

/// A request's names made concrete; cheap to clone. An item is scored in two steps, which its types
/// keep in order: `admit` waits for room for its text, tokenises it once and takes its client's
/// quota; `score` computes. What an item has taken is given back when it is scored or dropped.
#[derive(Clone)]
pub struct ScoringSession {
    service: Arc<ScoringService>,
    owner: String,
    policy: Arc<Resolved>,
    reference: Option<Arc<Resolved>>,
    warnings: Arc<[String]>,
    tokenizer: Arc<ChatTokenizer>,
    beta: f64,
    normalization: Normalization,
    max_length: usize,
    truncation: Truncation,
    /// The request's tools and variables over those of the policy's job.
    arguments: Arc<TemplateArguments>,
    /// Whether the request names tools.
    has_tools: bool,
    /// The date that chat templates print.
    date: DateTime,
    vocab_size: usize,
}

/// A pair whose text has room beside the texts of others.
#[must_use = "the text budget is given back when this is dropped"]
pub struct ReservedPair {
    session: ScoringSession,
    pair: PairToScore,
    room: OwnedSemaphorePermit,
}

/// A pair that may be scored: within the text budget and its client's quota, and tokenised.
#[must_use = "nothing is scored until `score` is called"]
pub struct AdmittedPair(Admitted);

/// Answers to one prompt that may be scored, in one row.
#[must_use = "nothing is scored until `score` is called"]
pub struct AdmittedCompletions {
    /// One for each answer: `None` is the next one of the row.
    errors: Vec<Option<ServiceError>>,
    /// `None` when no answer can be encoded.
    row: Option<Admitted>,
}

/// Tokens on their way to the device.
struct Admitted {
    session: ScoringSession,
    encoded: Vec<EncodedCompletion>,
    item: ScoreItem,
    _quota: Option<QuotaShare>,
    _room: OwnedSemaphorePermit,
}

impl ScoringService {
    /// Creates the service.
    pub(super) fn new(
        policies: PolicyResolver,
        engine: Engine,
        quota: ScoringQuota,
        shutdown: Shutdown,
        template_date: TemplateDate,
    ) -> Self {
        let (tokenizers, texts) = (Limiter::new(TOKENIZERS), Limiter::new(TEXT_BUDGET_KIB));
        ScoringService { policies, engine, quota, tokenizers, texts, shutdown, template_date }
    }

    /// Resolves what a scoring request names.
    pub async fn session(
        self: &Arc<Self>,
        caller: &Caller,
        options: ScoreOptions,
    ) -> Result<ScoringSession> {
        self.shutdown.refuse_new_work()?;
        if let Some(beta) = options.beta.filter(|b| !(b.is_finite() && *b > 0.0)) {
            return Err(ServiceError::invalid(
                "options.beta",
                format!("is {beta}: it must be a finite number above 0"),
            ));
        }
        if let Some(n) = options.max_length.filter(|n| !(2..=1 << 20).contains(n)) {
            return Err(ServiceError::invalid(
                "options.max_length",
                format!("is {n}: it must lie in 2..=1048576"),
            ));
        }
        for name in [Some(&options.policy), options.reference.as_ref()].into_iter().flatten() {
            check_weights(&self.policies.store, caller, name).await?;
        }
        let policy = self.policies.resolve(&options.policy).await?;
        let reference = match &options.reference {
            Some(name) => Some(self.policies.resolve(name).await?),
            None => self.policies.default_reference(&policy).await?,
        };
        if let Some(WeightsRef::Live { job }) = reference.as_ref().map(|r| &r.weights) {
            let message = format!(
                "trainingJobs/{job} is still training: a reference must not move, name a checkpoint by its step"
            );
            return Err(ServiceError::invalid("options.reference", message));
        }
        if let Some(r) = &reference {
            self.policies.check_tokenizers("options.reference", &policy.model, &r.model)?;
        }
        let spec = policy.job.as_ref().map(|j| &j.request.spec);
        let of_job = policy.job.as_ref().map(|j| j.template_arguments()).unwrap_or_default();
        let mut warnings = Vec::new();
        if reference.as_ref().is_some_and(|r| r.weights == policy.weights) {
            warnings.push(SAME_WEIGHTS.to_owned());
        }
        let moves = spec.is_some_and(|s| s.dpo.reference_sync.is_some());
        if moves && options.reference.is_none() && matches!(policy.weights, WeightsRef::Live { .. })
        {
            warnings.push(MOVING_REFERENCE.to_owned());
        }
        Ok(ScoringSession {
            has_tools: options.arguments.tools.iter().flatten().next().is_some(),
            arguments: Arc::new(options.arguments.over(&of_job)),
            date: self.template_date.of(policy.job.as_ref()),
            vocab_size: self.engine.model(&policy.model)?.vocab_size,
            tokenizer: self.engine.tokenizer(&policy.model)?,
            beta: options.beta.or(spec.map(|s| s.dpo.beta)).unwrap_or(0.1),
            normalization: options
                .normalization
                .or(spec.map(|s| s.dpo.reward_normalization()))
                .unwrap_or(Normalization::Sum),
            max_length: options.max_length.or(spec.map(|s| s.batch.max_length)).unwrap_or(1024),
            truncation: spec.map_or(Truncation::KeepStart, |s| s.batch.truncation),
            service: self.clone(),
            owner: caller.owner.clone(),
            policy: Arc::new(policy),
            reference: reference.map(Arc::new),
            warnings: warnings.into(),
        })
    }
}

impl ScoringSession {
    /// The policy's name, with its step unless it is still training.
    pub fn policy_version(&self) -> String {
        self.policy.version.clone()
    }

    /// The reference's name.
    pub fn reference_version(&self) -> Option<String> {
        self.reference.as_ref().map(|r| r.version.clone())
    }

    /// How rewards add up the log-ratios of an answer's tokens.
    pub fn normalization(&self) -> Normalization {
        self.normalization
    }

    /// What whoever reads the scores should know about the weights that were named.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.to_vec()
    }

    /// Waits for room for a pair's text beside the texts of others. A stream reads no further until
    /// it has it.
    ///
    /// # Errors
    /// `InvalidArgument` for a text that is longer than any row could use.
    pub async fn reserve(&self, pair: PairToScore) -> Result<ReservedPair> {
        let room = self
            .take_room("pair", pair.arguments.bytes(), &pair.prompt, &[&pair.a, &pair.b])
            .await?;
        Ok(ReservedPair { session: self.clone(), pair, room })
    }

    /// Admits a pair to be scored.
    ///
    /// # Errors
    /// Those of [`ScoringSession::reserve`] and [`ReservedPair::admit`].
    pub async fn admit(&self, pair: PairToScore) -> Result<AdmittedPair> {
        self.reserve(pair).await?.admit().await
    }

    /// Admits N answers to one prompt; an answer that cannot be encoded has its own error.
    ///
    /// # Errors
    /// `InvalidArgument` for a text that is longer than any row could use; `ResourceExhausted` when
    /// the client has too many tokens in the queue.
    pub async fn admit_completions(
        &self,
        prompt: Text,
        completions: Vec<Text>,
    ) -> Result<AdmittedCompletions> {
        let room = self
            .take_room("completions", 0, &prompt, &completions.iter().collect::<Vec<_>>())
            .await?;
        let lacks_dialogue = self.lacks_dialogue(&prompt);
        let encode =
            move |encoder: PairEncoder<'_>| encoder.encode_completions(&prompt, &completions);
        let results = self.tokenize(self.arguments.clone(), encode).await?;
        let (mut errors, mut encoded) = (Vec::with_capacity(results.len()), Vec::new());
        for (i, result) in results.into_iter().enumerate() {
            match result {
                Ok(completion) => {
                    encoded.push(completion);
                    errors.push(None);
                }
                Err(e) => {
                    let field = match e.part() {
                        Part::Prompt => "prompt".to_owned(),
                        Part::Chosen | Part::Rejected | Part::Answer(_) => {
                            format!("completions[{i}]")
                        }
                    };
                    errors.push(Some(ServiceError::invalid(field, e.to_string())));
                }
            }
        }
        if encoded.is_empty() {
            return Ok(AdmittedCompletions { errors, row: None });
        }
        if lacks_dialogue {
            return Err(needs_dialogue("options.tools"));
        }
        Ok(AdmittedCompletions { errors, row: Some(self.admitted(encoded, room)?) })
    }

    /// Returns true if the request names tools, and the prompt is plain text, which no chat
    /// template renders.
    fn lacks_dialogue(&self, prompt: &Text) -> bool {
        self.has_tools && matches!(prompt, Text::Plain(_))
    }

    /// Takes room for a text whose field in the request is `field`.
    async fn take_room(
        &self,
        field: &str,
        own_arguments: usize,
        prompt: &Text,
        answers: &[&Text],
    ) -> Result<OwnedSemaphorePermit> {
        let rendered_with = match prompt {
            Text::Plain(_) => 0,
            Text::Chat(_) => (self.arguments.bytes() + own_arguments) * answers.len().max(1),
        };
        let bytes = rendered_with
            + prompt.bytes() * answers.len().max(1)
            + answers.iter().map(|a| a.bytes()).sum::<usize>();
        if bytes > MAX_TEXT {
            let message = format!(
                "prompt and answers have {bytes} bytes of text, the prompt and its tools counted for each answer: {MAX_TEXT} are the limit"
            );
            return Err(ServiceError::invalid(field, message));
        }
        self.service.texts.acquire_many(bytes.div_ceil(1024) as u32).await
    }

    /// Runs `encode` off the async threads.
    async fn tokenize<T: Send + 'static>(
        &self,
        arguments: Arc<TemplateArguments>,
        encode: impl FnOnce(PairEncoder<'_>) -> T + Send + 'static,
    ) -> Result<T> {
        let (session, permit, caller) =
            (self.clone(), self.service.tokenizers.acquire().await?, trace::current());
        blocking(move || {
            // Until the work is done, even when nobody waits for it any more.
            let _permit = permit;
            let start = Instant::now();
            let encoder =
                PairEncoder::new(&session.tokenizer, session.max_length, session.truncation)
                    .with_arguments(&arguments)
                    .with_date(session.date)
                    .with_vocab_size(session.vocab_size);
            let encoded = encode(encoder);
            let took = start.elapsed();
            metrics::histogram!("bradley_scoring_tokenize_seconds").record(took.as_secs_f64());
            trace::record("scoring.tokenize", &caller, SystemTime::now() - took, took, Vec::new());
            encoded
        })
        .await
    }

    /// Takes the client's quota for a row.
    fn admitted(
        &self,
        encoded: Vec<EncodedCompletion>,
        room: OwnedSemaphorePermit,
    ) -> Result<Admitted> {
        let item = ScoreItem { groups: group(&encoded) };
        let quota = self.service.quota.take(&self.owner, item.tokens())?;
        Ok(Admitted { session: self.clone(), encoded, item, _quota: quota, _room: room })
    }

    /// Scores a row.
    async fn score(&self, item: ScoreItem) -> Result<ScoredItem> {
        let (engine, policies) = (&self.service.engine, &self.service.policies);
        let reference = self.reference.as_ref().map(|r| &r.weights);
        match engine.score(&self.policy.weights, reference, item.clone()).await {
            // The job ended between the request's start and now: its last checkpoint is what it
            // trained.
            Err(EngineError::NotResident(_)) => {
                let Some(job) = self.policy.job.clone() else {
                    return Err(ServiceError::internal("a live policy without a job"));
                };
                let stored = policies
                    .resolve_stored(job, self.policy.model.clone(), CheckpointRef::Latest)
                    .await?;
                let stored_reference = match reference {
                    Some(WeightsRef::LiveReference { .. }) => {
                        policies.default_reference(&stored).await?.map(|r| r.weights)
                    }
                    _ => None,
                };
                Ok(engine
                    .score(&stored.weights, stored_reference.as_ref().or(reference), item)
                    .await?)
            }
            scored => Ok(scored?),
        }
    }

    fn describe(
        &self,
        encoded: Vec<EncodedCompletion>,
        scored: ScoredItem,
    ) -> Vec<ScoredCompletion> {
        encoded
            .into_iter()
            .zip(scored.completions)
            .map(|(e, logps)| {
                let answer = AnswerLogps::new(&logps.policy, logps.reference.as_deref());
                ScoredCompletion {
                    policy_logprob: answer.policy,
                    reference_logprob: answer.reference.unwrap_or(0.0),
                    reward: reward(self.beta, self.normalization, answer),
                    prompt_tokens: e.prompt.len(),
                    truncated: e.truncated,
                    token_ids: e.tokens,
                    policy_tokens: logps.policy,
                    reference_tokens: logps.reference.unwrap_or_default(),
                }
            })
            .collect()
    }
}

impl ReservedPair {
    /// Tokenises the pair and takes its client's quota.
    ///
    /// # Errors
    /// `InvalidArgument` for a pair that cannot be encoded; `ResourceExhausted` when the client has
    /// too many tokens in the queue.
    pub async fn admit(self) -> Result<AdmittedPair> {
        let ReservedPair { session, pair: PairToScore { prompt, a, b, arguments: own }, room } =
            self;
        if let Text::Plain(_) = prompt
            && !own.is_empty()
        {
            let field =
                if own.tools.is_some() { "pair.tools" } else { "pair.chat_template_kwargs" };
            return Err(needs_dialogue(field));
        }
        let arguments = match own.is_empty() {
            true => session.arguments.clone(),
            false => Arc::new(own.over(&session.arguments)),
        };
        if session.lacks_dialogue(&prompt) {
            return Err(needs_dialogue("options.tools"));
        }
        let encode = move |encoder: PairEncoder<'_>| encoder.encode_together(&prompt, &[a, b]);
        let encoded = session.tokenize(arguments, encode).await?.map_err(|e| {
            let field = match e.part() {
                Part::Chosen | Part::Answer(0) => "pair.a",
                Part::Rejected | Part::Answer(_) => "pair.b",
                Part::Prompt => "pair.prompt",
            };
            ServiceError::invalid(field, e.to_string())
        })?;
        Ok(AdmittedPair(session.admitted(encoded, room)?))
    }
}

impl AdmittedPair {
    /// Scores the pair; its numbers do not depend on other requests.
    pub async fn score(self) -> Result<ScoredPair> {
        let policy_version = self.0.session.policy.version.clone();
        let (scored, live_step) = self.0.score().await?;
        let policy_version = match live_step {
            Some(step) => format!("{policy_version}@{step}"),
            None => policy_version,
        };
        let mut sides = scored.into_iter();
        let (Some(a), Some(b)) = (sides.next(), sides.next()) else {
            return Err(ServiceError::internal("a pair came back with fewer than two sides"));
        };
        metrics::counter!("bradley_scored_pairs_total").increment(1);
        let margin = a.reward - b.reward;
        Ok(ScoredPair { probability: preference_probability(margin), margin, a, b, policy_version })
    }
}

impl AdmittedCompletions {
    /// Scores the answers in one row, ranks them by their rewards, and gives each its probability
    /// to be the best.
    pub async fn score(self) -> Result<RankedCompletions> {
        let scored = match self.row {
            Some(row) => row.score().await?.0,
            None => Vec::new(),
        };
        Ok(ranked(self.errors, scored))
    }
}

impl Admitted {
    /// Returns the scores of the row's answers, and the step of a live policy.
    async fn score(self) -> Result<(Vec<ScoredCompletion>, Option<u64>)> {
        // The quota and the room are held until the row is scored.
        let Admitted { session, encoded, item, _quota, _room } = self;
        let scored = session.score(item).await?;
        let live_step = scored.live_step;
        Ok((session.describe(encoded, scored), live_step))
    }
}

/// Puts the scores of the answers that have no error in their places, and ranks them.
fn ranked(errors: Vec<Option<ServiceError>>, scored: Vec<ScoredCompletion>) -> RankedCompletions {
    let with_score: Vec<usize> =
        errors.iter().enumerate().filter(|(_, e)| e.is_none()).map(|(i, _)| i).collect();
    let rewards: Vec<f64> = scored.iter().map(|s| s.reward).collect();
    let ranking = ranking(&rewards).into_iter().map(|i| with_score[i]).collect();
    let mut scored = scored.into_iter().zip(best_of(&rewards));
    let unscored = || (Err(ServiceError::internal("unscored")), 0.0);
    let answers = errors.into_iter().map(|error| {
        let (score, probability) = match error {
            Some(e) => (Err(e), 0.0),
            None => {
                scored.next().map_or_else(unscored, |(score, probability)| (Ok(score), probability))
            }
        };
        RankedCompletion { score, probability }
    });
    RankedCompletions { answers: answers.collect(), ranking }
}

fn needs_dialogue(field: &str) -> ServiceError {
    ServiceError::invalid(
        field,
        "needs chat messages, because the chat template shows it to the model: give chat, or leave it out, its form as JSON too",
    )
}

#[cfg(test)]
mod tests;
