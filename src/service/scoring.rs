//! Scoring: names resolved once per request, tokenising off the async threads, the engine's log-probs turned into rewards.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use jiff::civil::DateTime;
use tokio::sync::OwnedSemaphorePermit;

use super::auth::access::check_weights;
use super::auth::quota::ScoringQuota;
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
use crate::engine::trace;
use crate::math::score::{AnswerLogps, preference_probability, reward};
use crate::model::tokenizer::ChatTokenizer;
use crate::train::encode::{EncodeError, EncodedCompletion, PairEncoder, group};

/// Bytes of one pair's text, or of a prompt and its answers: what the longest row could use is less than a tenth.
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

/// A request's names made concrete; cheap to clone.
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

/// How answers to one prompt are split off it.
#[derive(Clone, Copy)]
enum Answers {
    /// As TRL splits pairs: after the prefix that both answers share with the prompt.
    Pair,
    /// Each as if it were alone.
    Independent,
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
    pub async fn session(self: &Arc<Self>, caller: &Caller, options: ScoreOptions) -> Result<ScoringSession> {
        self.shutdown.refuse_new_work()?;
        if let Some(beta) = options.beta.filter(|b| !(b.is_finite() && *b > 0.0)) {
            return Err(ServiceError::invalid("options.beta", format!("is {beta}: it must be a finite number above 0")));
        }
        if let Some(n) = options.max_length.filter(|n| !(2..=1 << 20).contains(n)) {
            return Err(ServiceError::invalid("options.max_length", format!("is {n}: it must lie in 2..=1048576")));
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
            let message = format!("trainingJobs/{job} is still training: a reference must not move, name a checkpoint by its step");
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
        if moves && options.reference.is_none() && matches!(policy.weights, WeightsRef::Live { .. }) {
            warnings.push(MOVING_REFERENCE.to_owned());
        }
        Ok(ScoringSession {
            has_tools: options.arguments.tools.iter().flatten().next().is_some(),
            arguments: Arc::new(options.arguments.over(&of_job)),
            date: self.template_date.of(policy.job.as_ref()),
            vocab_size: self.engine.model(&policy.model)?.vocab_size,
            tokenizer: self.engine.tokenizer(&policy.model)?,
            beta: options.beta.or(spec.map(|s| s.dpo.beta)).unwrap_or(0.1),
            normalization: options.normalization.or(spec.map(|s| s.dpo.reward_normalization())).unwrap_or(Normalization::Sum),
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

    /// [`ScoringSession::room`] for a pair.
    ///
    /// # Errors
    /// `InvalidArgument` for a text that is longer than any row could use.
    pub async fn room_for_pair(&self, pair: &PairToScore) -> Result<OwnedSemaphorePermit> {
        self.take_room("pair", pair.arguments.bytes(), &pair.prompt, &[&pair.a, &pair.b]).await
    }

    /// How rewards add up the log-ratios of an answer's tokens.
    pub fn normalization(&self) -> Normalization {
        self.normalization
    }

    /// What whoever reads the scores should know about the weights that were named.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.to_vec()
    }

    /// Room for a prompt and its completions beside the texts of others; waits for it.
    ///
    /// # Errors
    /// `InvalidArgument` for a text that is longer than any row could use.
    pub async fn room(&self, prompt: &Text, answers: &[&Text]) -> Result<OwnedSemaphorePermit> {
        self.take_room("completions", 0, prompt, answers).await
    }

    /// Takes room for a text whose field in the request is `field`.
    async fn take_room(&self, field: &str, own_arguments: usize, prompt: &Text, answers: &[&Text]) -> Result<OwnedSemaphorePermit> {
        let rendered_with = match prompt {
            Text::Plain(_) => 0,
            Text::Chat(_) => (self.arguments.bytes() + own_arguments) * answers.len().max(1),
        };
        let bytes = rendered_with + prompt.bytes() * answers.len().max(1) + answers.iter().map(|a| a.bytes()).sum::<usize>();
        if bytes > MAX_TEXT {
            let message = format!(
                "prompt and answers have {bytes} bytes of text, the prompt and its tools counted for each answer: {MAX_TEXT} are the limit"
            );
            return Err(ServiceError::invalid(field, message));
        }
        self.service.texts.acquire_many(bytes.div_ceil(1024) as u32).await
    }

    /// Scores one pair; its numbers do not depend on other requests.
    pub async fn score_pair(&self, pair: &PairToScore) -> Result<ScoredPair> {
        if let Text::Plain(_) = pair.prompt
            && !pair.arguments.is_empty()
        {
            let field = if pair.arguments.tools.is_some() { "pair.tools" } else { "pair.chat_template_kwargs" };
            return Err(needs_dialogue(field));
        }
        let arguments = match pair.arguments.is_empty() {
            true => self.arguments.clone(),
            false => Arc::new(pair.arguments.over(&self.arguments)),
        };
        let answers = vec![pair.a.clone(), pair.b.clone()];
        let (encoded, scored) = self.score(&pair.prompt, answers, arguments, Answers::Pair).await?;
        let policy_version = match scored.live_step {
            Some(step) => format!("{}@{step}", self.policy.version),
            None => self.policy.version.clone(),
        };
        let mut sides = self.describe(encoded, scored).into_iter();
        let (Some(a), Some(b)) = (sides.next(), sides.next()) else {
            return Err(ServiceError::internal("a pair came back with fewer than two sides"));
        };
        metrics::counter!("bradley_scored_pairs_total").increment(1);
        let margin = a.reward - b.reward;
        Ok(ScoredPair { probability: preference_probability(margin), margin, a, b, policy_version })
    }

    /// Scores N answers to one prompt in one row; an answer that cannot be scored has its own error.
    pub async fn score_completions(&self, prompt: &Text, completions: &[Text]) -> Result<Vec<Result<ScoredCompletion>>> {
        let (usable, mut results) = self.sort_out(prompt, completions).await?;
        let answers: Vec<Text> = usable.iter().map(|i| completions[*i].clone()).collect();
        if answers.is_empty() {
            return Ok(results.into_iter().map(|r| r.unwrap_or_else(|| Err(ServiceError::internal("unscored")))).collect());
        }
        let (encoded, scored) = self.score(prompt, answers, self.arguments.clone(), Answers::Independent).await?;
        for (i, described) in usable.into_iter().zip(self.describe(encoded, scored)) {
            results[i] = Some(Ok(described));
        }
        Ok(results.into_iter().map(|r| r.unwrap_or_else(|| Err(ServiceError::internal("unscored")))).collect())
    }

    /// Which completions can be encoded, and the errors of the others.
    #[allow(clippy::type_complexity)]
    async fn sort_out(&self, prompt: &Text, completions: &[Text]) -> Result<(Vec<usize>, Vec<Option<Result<ScoredCompletion>>>)> {
        let (session, prompt, completions) = (self.clone(), prompt.clone(), completions.to_vec());
        let permit = self.service.tokenizers.acquire().await?;
        blocking(move || {
            let _permit = permit;
            let encoder = session.encoder(&session.arguments);
            let mut usable = Vec::new();
            let mut results: Vec<Option<Result<ScoredCompletion>>> = Vec::new();
            for (i, c) in completions.iter().enumerate() {
                match encoder.encode_completions(&prompt, std::slice::from_ref(c)) {
                    Ok(_) => {
                        usable.push(i);
                        results.push(None);
                    }
                    Err(e) => results.push(Some(Err(encode_error(&e, "prompt", &format!("completions[{i}]"))))),
                }
            }
            (usable, results)
        })
        .await
    }

    fn encoder<'a>(&'a self, arguments: &'a TemplateArguments) -> PairEncoder<'a> {
        PairEncoder::new(&self.tokenizer, self.max_length, self.truncation)
            .with_arguments(arguments)
            .with_date(self.date)
            .with_vocab_size(self.vocab_size)
    }

    async fn score(
        &self,
        prompt: &Text,
        answers: Vec<Text>,
        arguments: Arc<TemplateArguments>,
        kind: Answers,
    ) -> Result<(Vec<EncodedCompletion>, ScoredItem)> {
        if let Text::Plain(_) = prompt
            && self.has_tools
        {
            return Err(needs_dialogue("options.tools"));
        }
        let fields: &[&str] = match kind {
            Answers::Pair => &["pair.a", "pair.b"],
            Answers::Independent => &[],
        };
        let (session, prompt) = (self.clone(), prompt.clone());
        let encoded = {
            let permit = self.service.tokenizers.acquire().await?;
            let caller = trace::current();
            blocking(move || {
                // Until the work is done, even when nobody waits for it any more.
                let _permit = permit;
                let start = Instant::now();
                let encoder = session.encoder(&arguments);
                let encoded = match kind {
                    Answers::Pair => encoder.encode_together(&prompt, &answers),
                    Answers::Independent => encoder.encode_completions(&prompt, &answers),
                };
                let took = start.elapsed();
                metrics::histogram!("bradley_scoring_tokenize_seconds").record(took.as_secs_f64());
                trace::record("scoring.tokenize", &caller, SystemTime::now() - took, took, Vec::new());
                encoded.map_err(|e| {
                    let field = match &e {
                        EncodeError::EmptyCompletion { field }
                        | EncodeError::MixedForms { field }
                        | EncodeError::TokenOutsideVocabulary { field, .. }
                            if field != "prompt" =>
                        {
                            let index = field.trim_start_matches("completions[").trim_end_matches(']').parse::<usize>().ok();
                            index.and_then(|i| fields.get(i).copied()).unwrap_or("completions")
                        }
                        _ => "pair.prompt",
                    };
                    encode_error(&e, "pair.prompt", field)
                })
            })
            .await??
        };
        let item = ScoreItem { groups: group(&encoded) };
        let _share = self.service.quota.take(&self.owner, item.tokens())?;
        let engine = &self.service.engine;
        let reference = self.reference.as_ref().map(|r| &r.weights);
        let scored = match engine.score(&self.policy.weights, reference, item.clone()).await {
            // The job ended between the request's start and now: its last checkpoint is what it trained.
            Err(EngineError::NotResident(_)) => {
                let Some(job) = self.policy.job.clone() else { return Err(ServiceError::internal("a live policy without a job")) };
                let stored = self.service.policies.resolve_stored(job, self.policy.model.clone(), CheckpointRef::Latest).await?;
                let stored_reference = match reference {
                    Some(WeightsRef::LiveReference { .. }) => self.service.policies.default_reference(&stored).await?.map(|r| r.weights),
                    _ => None,
                };
                engine.score(&stored.weights, stored_reference.as_ref().or(reference), item).await?
            }
            other => other?,
        };
        Ok((encoded, scored))
    }

    fn describe(&self, encoded: Vec<EncodedCompletion>, scored: ScoredItem) -> Vec<ScoredCompletion> {
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

fn needs_dialogue(field: &str) -> ServiceError {
    ServiceError::invalid(field, "needs chat messages, because the chat template shows it to the model: give chat, or leave it out")
}

fn encode_error(e: &EncodeError, prompt_field: &str, field: &str) -> ServiceError {
    let field = match e {
        EncodeError::EmptyCompletion { .. } | EncodeError::MixedForms { .. } => field,
        EncodeError::TokenOutsideVocabulary { field: at, .. } if at != "prompt" => field,
        _ => prompt_field,
    };
    ServiceError::invalid(field, e.to_string())
}
