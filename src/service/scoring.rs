//! Scoring. Names are resolved once per request. Texts are tokenised outside the async threads. The
//! engine's log-probabilities are turned into rewards, and answers are ranked.
//!
//! Steps for a pair: [`ScoringService::session`] → [`ScoringSession::admit`] (text budget,
//! tokens, quota) → [`AdmittedPair::score`].

pub mod logged;

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use jiff::civil::DateTime;
use tokio::sync::OwnedSemaphorePermit;

use self::logged::LoggedPair;
use super::auth::access::check_weights;
use super::auth::quota::{QuotaShare, ScoringQuota};
use super::blocking::blocking;
use super::error::{Result, ServiceError};
use super::limiter::Limiter;
use super::policies::{PolicyResolver, Resolved};
use super::shutdown::Shutdown;
use super::store::calibrations::CalibrationKey;
use super::template_date::TemplateDate;
use super::usage::UsageMeter;
use crate::domain::access::Caller;
use crate::domain::dataset::Text;
use crate::domain::dpo::Normalization;
use crate::domain::message::TemplateArguments;
use crate::domain::names::{CheckpointRef, PolicyName, parse_policy};
use crate::domain::training::Truncation;
use crate::domain::usage::Usage;
use crate::engine::Engine;
use crate::engine::api::{EngineError, ScoreItem, ScoredItem, WeightsRef};
use crate::formats::tokenizer::ChatTokenizer;
use crate::infer::encode::{EncodedCompletion, PairEncoder, Part, group};
use crate::math::calibration::{Calibration, CalibrationPoint};
use crate::math::score::{AnswerLogps, best_of, preference_probability, ranking, reward, total};
use crate::telemetry::trace;

/// Maximum text of one pair, or of a prompt and its answers, in bytes. The longest row that a
/// server scores by default (`max_row_tokens`: 16384) usually has less than a tenth of it.
const MAX_TEXT_BYTES: usize = 16 << 20;

/// Maximum number of requests that are tokenised at one time.
const MAX_TOKENIZING_REQUESTS: usize = 4;
/// Maximum text between admission and the end of scoring, over all requests, in KiB.
const TEXT_BUDGET_KIB: usize = 256 << 10;

/// Warning for equal policy and reference. A base model is its own reference unless another one is
/// named.
const SAME_WEIGHTS: &str = "policy and reference are the same weights: every reward is 0 and every \
                            probability is 0.5; name another reference, or a trained checkpoint as \
                            the policy";

/// Warning for scoring with a running job that moves its reference.
const MOVING_REFERENCE: &str = "the job is training and moves its reference (TR-DPO): each pair's \
                                rewards are against the reference as it is at the step that scores \
                                the pair; name a checkpoint to score it against the reference that \
                                it holds";

/// Options of a scoring request.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreOptions {
    /// The policy.
    pub policy: PolicyName,
    /// Reference; `None` means the reference of the policy's job, or for a base model the model
    /// itself.
    pub reference: Option<PolicyName>,
    /// β of the reward; `None` means the job's β, or 0.1 for a base model.
    pub beta: Option<f64>,
    /// Maximum number of tokens of prompt + answer; `None` means the job's, or 1024 for a base
    /// model.
    pub max_length: Option<usize>,
    /// Normalization of the reward; `None` means the one the job trains with, or the sum for a base
    /// model.
    pub normalization: Option<Normalization>,
    /// Tools and chat template variables for dialogues that have none of their own.
    pub arguments: TemplateArguments,
}

/// A prompt with two answers.
#[derive(Clone, Debug, PartialEq)]
pub struct PairToScore {
    /// Prompt x.
    pub prompt: Text,
    /// Answer y_a.
    pub a: Text,
    /// Answer y_b.
    pub b: Text,
    /// Tools and chat template variables of this pair; they override those of the request.
    pub arguments: TemplateArguments,
    /// Log-probs that the caller has computed before.
    pub logged: LoggedPair,
}

/// Score of one answer.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredCompletion {
    /// Σ log π_θ over the answer's tokens, in nats.
    pub policy_logprob: f64,
    /// Σ log π_ref over the answer's tokens, in nats; 0 without a reference.
    pub reference_logprob: f64,
    /// Reward: β·lr, or β·lr/n for n tokens, depending on the session's normalization, where
    /// lr = Σ log π_θ − Σ log π_ref.
    pub reward: f64,
    /// Number of tokens of the answer; 0 if it is not known.
    pub tokens: usize,
    /// Token ids of the answer; empty if it was not tokenised.
    pub token_ids: Vec<u32>,
    /// Number of prompt tokens before the answer.
    pub prompt_tokens: usize,
    /// True if the text was cut at max_length.
    pub truncated: bool,
    /// log π_θ of each token of the answer, in nats.
    pub policy_token_logprobs: Vec<f32>,
    /// log π_ref of each token of the answer, in nats; empty without a reference.
    pub reference_token_logprobs: Vec<f32>,
}

/// The score of a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredPair {
    /// Pr(a ≻ b), the probability that a is preferred.
    pub probability: f64,
    /// Margin r_a − r_b of the rewards.
    pub margin: f64,
    /// Calibrated probability that a is preferred, if the session has a calibration.
    pub calibrated_probability: Option<f64>,
    /// Score of the first answer.
    pub a: ScoredCompletion,
    /// Score of the second answer.
    pub b: ScoredCompletion,
    /// Name of the policy's weights. For a running job `@` and the step at which it scored are
    /// appended.
    pub policy_version: String,
    /// True if log-probs that the caller had computed before were used.
    pub logged: bool,
}

/// Scores pairs and completions.
pub struct ScoringService {
    policies: PolicyResolver,
    engine: Engine,
    quota: ScoringQuota,
    usage: UsageMeter,
    tokenizers: Limiter,
    /// Text budget; one permit is 1 KiB.
    texts: Limiter,
    shutdown: Shutdown,
    template_date: TemplateDate,
}

/// One of several answers to a prompt.
#[derive(Debug)]
pub struct RankedCompletion {
    /// Score of the answer, or the error that prevented it.
    pub score: Result<ScoredCompletion>,
    /// Probability that this answer is the best one; 0 without a score.
    pub probability: f64,
}

/// The reason why a row could not be scored.
#[derive(Debug, thiserror::Error)]
enum ScoreError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// Scores and ranking of several answers to one prompt.
#[derive(Debug)]
pub struct RankedCompletions {
    /// Results in the order of the answers in the request.
    pub answers: Vec<RankedCompletion>,
    /// Indices of the answers that have a score, best first.
    pub ranking: Vec<usize>,
}

/// Resolved options of a request; cheap to clone. An item is scored in two steps, whose order the
/// types enforce: `admit` waits for room in the text budget, tokenises the text once and takes the
/// client's quota; `score` computes. Budget and quota are released when the item is scored or
/// dropped.
#[derive(Clone)]
pub struct ScoringSession {
    service: Arc<ScoringService>,
    owner: String,
    policy: Arc<Resolved>,
    reference: Option<Arc<Resolved>>,
    /// True if the request itself names the reference.
    names_reference: bool,
    warnings: Arc<[String]>,
    tokenizer: Arc<ChatTokenizer>,
    beta: f64,
    normalization: Normalization,
    max_length: usize,
    truncation: Truncation,
    /// Tools and variables of the request, merged over those of the policy's job.
    arguments: Arc<TemplateArguments>,
    /// True if the request itself has tools.
    has_tools: bool,
    /// Date that chat templates see.
    date: DateTime,
    vocab_size: usize,
    /// Key of a calibration of this session's scores. `None` if its weights change, or if the
    /// policy is a base model.
    calibration_key: Option<Arc<CalibrationKey>>,
    /// The stored calibration.
    calibration: Option<Calibration>,
}

/// A pair for whose text the budget is reserved.
#[must_use = "the text budget is given back when this is dropped"]
pub struct ReservedPair {
    session: ScoringSession,
    pair: PairToScore,
    room: OwnedSemaphorePermit,
}

/// A pair that is ready to be scored: tokenised, with its share of the text budget and of the
/// client's quota, or with the log-probs of both models, which need neither.
#[must_use = "nothing is scored until `score` is called"]
pub struct AdmittedPair(PairWork);

enum PairWork {
    /// The policy computes the pair, and the reference if the caller has not.
    Compute(Admitted),
    /// The caller has computed the answers.
    Logged(ScoringSession, [AnswerLogps; 2]),
}

/// Answers to one prompt that are admitted and scored together in one row.
#[must_use = "nothing is scored until `score` is called"]
pub struct AdmittedCompletions {
    /// Encoding errors in the order of the answers. `None` stands for an answer that is in the row.
    errors: Vec<Option<ServiceError>>,
    /// `None` if no answer can be encoded.
    row: Option<Admitted>,
}

/// An admitted row with its share of the budget and of the quota.
struct Admitted {
    session: ScoringSession,
    encoded: Vec<EncodedCompletion>,
    item: ScoreItem,
    /// Σ log π_ref of a pair's answers, if the caller has computed them before.
    logged: Option<[f64; 2]>,
    _quota: Option<QuotaShare>,
    _room: OwnedSemaphorePermit,
}

impl ScoringService {
    /// Creates the service.
    pub(super) fn new(
        policies: PolicyResolver,
        engine: Engine,
        quota: ScoringQuota,
        usage: UsageMeter,
        shutdown: Shutdown,
        template_date: TemplateDate,
    ) -> Self {
        let (tokenizers, texts) = (
            Limiter::new(MAX_TOKENIZING_REQUESTS),
            Limiter::new(TEXT_BUDGET_KIB),
        );
        ScoringService {
            policies,
            engine,
            quota,
            usage,
            tokenizers,
            texts,
            shutdown,
            template_date,
        }
    }

    /// Resolves the options of a scoring request.
    ///
    /// # Errors
    /// `InvalidArgument` for bad options; `PermissionDenied` for another client's job; `NotFound`
    /// if the server does not have a model or checkpoint; `FailedPrecondition` if weights cannot be
    /// used; `Unavailable` if the server is shutting down.
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
        for name in [Some(&options.policy), options.reference.as_ref()]
            .into_iter()
            .flatten()
        {
            check_weights(&self.policies.store, caller, name).await?;
        }
        let policy = self.policies.resolve(&options.policy).await?;
        let reference = match &options.reference {
            Some(name) => Some(self.policies.resolve(name).await?),
            None => self.policies.default_reference(&policy).await?,
        };
        let names_reference = options.reference.is_some();
        if let Some(WeightsRef::Live { job }) = reference.as_ref().map(|r| &r.weights) {
            let message = format!(
                "trainingJobs/{job} is still training: a reference must not move, name a \
                 checkpoint by its step, or wait until the job has ended"
            );
            return Err(ServiceError::invalid("options.reference", message));
        }
        if let Some(r) = &reference {
            self.policies
                .check_tokenizers("options.reference", &policy.model, &r.model)?;
        }
        let spec = policy.job.as_ref().map(|j| &j.request.spec);
        let job_arguments = policy
            .job
            .as_ref()
            .map(|j| j.template_arguments())
            .unwrap_or_default();
        let mut warnings = Vec::new();
        if reference
            .as_ref()
            .is_some_and(|r| r.weights == policy.weights)
        {
            warnings.push(SAME_WEIGHTS.to_owned());
        }
        let has_moving_reference = spec.is_some_and(|s| s.dpo.reference_sync.is_some());
        if has_moving_reference
            && options.reference.is_none()
            && matches!(policy.weights, WeightsRef::Live { .. })
        {
            warnings.push(MOVING_REFERENCE.to_owned());
        }
        let beta = options.beta.or(spec.map(|s| s.dpo.beta)).unwrap_or(0.1);
        let normalization = options
            .normalization
            .or(spec.map(|s| s.dpo.reward_normalization()))
            .unwrap_or(Normalization::Sum);
        let calibration_key =
            self.calibration_key(&policy, reference.as_ref(), beta, normalization)?;
        let calibration = match &calibration_key {
            Some(key) => self.policies.store.calibration(key).await?,
            None => None,
        };
        Ok(ScoringSession {
            has_tools: options.arguments.tools.iter().flatten().next().is_some(),
            arguments: Arc::new(options.arguments.over(&job_arguments)),
            date: self.template_date.of(policy.job.as_ref()),
            vocab_size: self.engine.model(&policy.model)?.vocab_size,
            tokenizer: self.engine.tokenizer(&policy.model)?,
            beta,
            normalization,
            calibration_key: calibration_key.map(Arc::new),
            calibration,
            max_length: options
                .max_length
                .or(spec.map(|s| s.batch.max_length))
                .unwrap_or(1024),
            truncation: spec.map_or(Truncation::KeepStart, |s| s.batch.truncation),
            service: self.clone(),
            owner: caller.owner.clone(),
            policy: Arc::new(policy),
            reference: reference.map(Arc::new),
            names_reference,
            warnings: warnings.into(),
        })
    }

    /// Returns the key of the calibration for these weights and options; `None` if weights change,
    /// or if the policy is a base model. The key has hashes of contents, because a name may stand
    /// for other weights later.
    fn calibration_key(
        &self,
        policy: &Resolved,
        reference: Option<&Resolved>,
        beta: f64,
        normalization: Normalization,
    ) -> Result<Option<CalibrationKey>> {
        let (WeightsRef::Adapter { content, .. } | WeightsRef::Full { content, .. }) =
            &policy.weights
        else {
            return Ok(None);
        };
        let Some(PolicyName::Checkpoint {
            job,
            which: CheckpointRef::Step(step),
        }) = parse_policy(&policy.version)
        else {
            return Ok(None);
        };
        let reference = match reference.map(|r| &r.weights) {
            None => "none".to_owned(),
            Some(WeightsRef::Base { model }) => {
                format!("base {}", self.engine.identity(model)?.hash())
            }
            Some(WeightsRef::Adapter { content, .. } | WeightsRef::Full { content, .. }) => {
                format!("checkpoint {content}")
            }
            Some(WeightsRef::StoredReference { content, .. }) => format!("moved {content}"),
            Some(WeightsRef::Live { .. } | WeightsRef::LiveReference { .. }) => return Ok(None),
        };
        let base = self.engine.identity(&policy.model)?.hash();
        let normalization = match normalization {
            Normalization::Sum => "sum",
            Normalization::Mean => "mean",
        };
        let beta = beta.to_string();
        let parts: [&str; 5] = [&base, content, &reference, &beta, normalization];
        let hash = blake3::hash(parts.join("\n").as_bytes());
        Ok(Some(CalibrationKey {
            job,
            step,
            hash: hash.to_hex().to_string(),
        }))
    }
}

impl ScoringSession {
    /// Returns the name of the policy, with the step for a stored checkpoint.
    pub fn policy_version(&self) -> String {
        self.policy.version.clone()
    }

    /// Returns the name of the reference, if there is one.
    pub fn reference_version(&self) -> Option<String> {
        self.reference.as_ref().map(|r| r.version.clone())
    }

    /// Returns the normalization of the rewards over an answer's tokens.
    pub fn normalization(&self) -> Normalization {
        self.normalization
    }

    /// Returns β of the rewards.
    pub fn beta(&self) -> f64 {
        self.beta
    }

    /// Returns the stored calibration of this session's scores, if there is one.
    pub fn calibration(&self) -> Option<Calibration> {
        self.calibration
    }

    /// Returns true if a calibration of this session's scores can be stored: the policy is a stored
    /// checkpoint.
    pub fn may_be_calibrated(&self) -> bool {
        self.calibration_key.is_some()
    }

    /// Stores a calibration for this session's weights, β and normalization.
    ///
    /// # Errors
    /// `NotFound` if the checkpoint has been deleted meanwhile.
    pub(super) async fn store_calibration(&self, calibration: &Calibration) -> Result<()> {
        let Some(key) = &self.calibration_key else {
            return Err(ServiceError::internal("no checkpoint to calibrate"));
        };
        let store = &self.service.policies.store;
        store.put_calibration(key, calibration).await
    }

    /// Returns true if the policy is trained at present, so that its weights change.
    pub fn is_live(&self) -> bool {
        matches!(self.policy.weights, WeightsRef::Live { .. })
    }

    /// Returns warnings about the chosen weights for the readers of the scores.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.to_vec()
    }

    /// Reserves room for a pair's text in the text budget; waits until there is room. A stream must
    /// not read its next pair before that.
    ///
    /// # Errors
    /// `InvalidArgument` if the text has more than 16 MiB.
    pub async fn reserve(&self, pair: PairToScore) -> Result<ReservedPair> {
        let room = self
            .reserve_text(
                "pair",
                pair.arguments.bytes(),
                &pair.prompt,
                &[&pair.a, &pair.b],
            )
            .await?;
        Ok(ReservedPair {
            session: self.clone(),
            pair,
            room,
        })
    }

    /// Admits a pair for scoring.
    ///
    /// # Errors
    /// The errors of [`ScoringSession::reserve`] and [`ReservedPair::admit`].
    pub async fn admit(&self, pair: PairToScore) -> Result<AdmittedPair> {
        self.reserve(pair).await?.admit().await
    }

    /// Admits several answers to one prompt. An answer that cannot be encoded gets its own error.
    ///
    /// # Errors
    /// `InvalidArgument` if the text has more than 16 MiB, or if the request has tools and the
    /// prompt is plain text; `ResourceExhausted` if the client's unanswered requests have too many
    /// tokens.
    pub async fn admit_completions(
        &self,
        prompt: Text,
        completions: Vec<Text>,
    ) -> Result<AdmittedCompletions> {
        let room = self
            .reserve_text(
                "completions",
                0,
                &prompt,
                &completions.iter().collect::<Vec<_>>(),
            )
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
                    errors.push(Some(ServiceError::invalid(field, e.problem())));
                }
            }
        }
        if encoded.is_empty() {
            return Ok(AdmittedCompletions { errors, row: None });
        }
        if lacks_dialogue {
            return Err(needs_dialogue("options.tools"));
        }
        Ok(AdmittedCompletions {
            errors,
            row: Some(self.admitted(encoded, room)?),
        })
    }

    /// Returns true if the request has tools but the prompt is plain text, which no chat template
    /// renders.
    fn lacks_dialogue(&self, prompt: &Text) -> bool {
        self.has_tools && matches!(prompt, Text::Plain(_))
    }

    /// Reserves room in the text budget for a prompt and its answers. The prompt is counted once
    /// per answer, and for a dialogue its tools and variables, too. `field` names the text in error
    /// messages.
    async fn reserve_text(
        &self,
        field: &str,
        pair_arguments_bytes: usize,
        prompt: &Text,
        answers: &[&Text],
    ) -> Result<OwnedSemaphorePermit> {
        let template_bytes = match prompt {
            Text::Plain(_) => 0,
            Text::Chat(_) => (self.arguments.bytes() + pair_arguments_bytes) * answers.len().max(1),
        };
        let bytes = template_bytes
            + prompt.bytes() * answers.len().max(1)
            + answers.iter().map(|a| a.bytes()).sum::<usize>();
        if bytes > MAX_TEXT_BYTES {
            let message = format!(
                "has {bytes} bytes of text with its prompt (the prompt and its tools are counted \
                 once per answer), at most {MAX_TEXT_BYTES} are allowed: send shorter texts or \
                 fewer answers"
            );
            return Err(ServiceError::invalid(field, message));
        }
        self.service
            .texts
            .acquire_many(bytes.div_ceil(1024) as u32)
            .await
    }

    /// Runs `encode` on a blocking thread.
    async fn tokenize<T: Send + 'static>(
        &self,
        arguments: Arc<TemplateArguments>,
        encode: impl FnOnce(PairEncoder<'_>) -> T + Send + 'static,
    ) -> Result<T> {
        let (session, permit, caller) = (
            self.clone(),
            self.service.tokenizers.acquire().await?,
            trace::current(),
        );
        blocking(move || {
            // The permit is held until the work is done, even if the caller has disconnected.
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
            trace::record(
                "scoring.tokenize",
                &caller,
                SystemTime::now() - took,
                took,
                Vec::new(),
            );
            encoded
        })
        .await
    }

    /// Takes the client's quota for a row and builds the item to score.
    fn admitted(
        &self,
        encoded: Vec<EncodedCompletion>,
        room: OwnedSemaphorePermit,
    ) -> Result<Admitted> {
        let item = ScoreItem {
            groups: group(&encoded),
        };
        let quota = self.service.quota.take(&self.owner, item.tokens())?;
        Ok(Admitted {
            session: self.clone(),
            encoded,
            item,
            logged: None,
            _quota: quota,
            _room: room,
        })
    }

    /// Scores a row. If the job of a live policy has stopped running meanwhile, its latest
    /// checkpoint is used.
    async fn score(&self, item: ScoreItem) -> std::result::Result<ScoredItem, ScoreError> {
        let (engine, policies) = (&self.service.engine, &self.service.policies);
        let reference = self.reference.as_ref().map(|r| &r.weights);
        match engine
            .score(&self.policy.weights, reference, item.clone())
            .await
        {
            // The job stopped running between the start of the request and now. Its latest
            // checkpoint has the weights that it trained last, unless it was cancelled or failed
            // after that checkpoint.
            Err(EngineError::NotResident(_)) => {
                let Some(job) = self.policy.job.clone() else {
                    let defect = "a live policy without a job";
                    return Err(ServiceError::internal(defect).into());
                };
                let stored = policies
                    .resolve_stored(job, self.policy.model.clone(), CheckpointRef::Latest)
                    .await?;
                let stored_reference = match reference {
                    Some(WeightsRef::LiveReference { .. }) => policies
                        .default_reference(&stored)
                        .await?
                        .map(|r| r.weights),
                    _ => None,
                };
                Ok(engine
                    .score(
                        &stored.weights,
                        stored_reference.as_ref().or(reference),
                        item,
                    )
                    .await?)
            }
            scored => Ok(scored?),
        }
    }

    /// Scores a pair from the log-probs of its answers.
    fn score_logged(&self, answers: [AnswerLogps; 2]) -> ScoredPair {
        let work = Usage {
            scored_pairs: 1,
            ..Usage::default()
        };
        self.service.usage.count(&self.owner, work);
        metrics::counter!("bradley_scored_pairs_total").increment(1);
        let [a, b] = answers.map(|answer| ScoredCompletion {
            policy_logprob: answer.policy,
            reference_logprob: answer.reference.unwrap_or(0.0),
            reward: reward(self.beta, self.normalization, answer),
            tokens: answer.tokens,
            token_ids: Vec::new(),
            prompt_tokens: 0,
            truncated: false,
            policy_token_logprobs: Vec::new(),
            reference_token_logprobs: Vec::new(),
        });
        let margin = a.reward - b.reward;
        ScoredPair {
            probability: preference_probability(margin),
            calibrated_probability: None,
            margin,
            a,
            b,
            policy_version: self.policy_version(),
            logged: true,
        }
    }

    /// Describes the answers. `logged` has the reference's log-probs of a pair if the caller has
    /// computed them before.
    fn describe(
        &self,
        encoded: Vec<EncodedCompletion>,
        scored: ScoredItem,
        logged: Option<[f64; 2]>,
    ) -> Vec<ScoredCompletion> {
        encoded
            .into_iter()
            .zip(scored.completions)
            .enumerate()
            .map(|(i, (e, logps))| {
                let computed = logps.reference.filter(|_| logged.is_none());
                let mut answer = AnswerLogps::new(&logps.policy, computed.as_deref());
                if let Some(sum) = logged.and_then(|sums| sums.get(i).copied()) {
                    answer.reference = Some(sum);
                }
                ScoredCompletion {
                    policy_logprob: answer.policy,
                    reference_logprob: answer.reference.unwrap_or(0.0),
                    reward: reward(self.beta, self.normalization, answer),
                    prompt_tokens: e.prompt.len(),
                    truncated: e.truncated,
                    tokens: answer.tokens,
                    token_ids: e.tokens,
                    policy_token_logprobs: logps.policy,
                    reference_token_logprobs: computed.unwrap_or_default(),
                }
            })
            .collect()
    }
}

impl ReservedPair {
    /// Tokenises the pair and takes its client's quota.
    ///
    /// # Errors
    /// `InvalidArgument` if the pair cannot be encoded, if it has tools or template variables and
    /// its prompt is plain text, or if the log-probs that it carries do not suffice or are of a
    /// longer answer; `ResourceExhausted` if the client's unanswered requests have too many tokens.
    pub async fn admit(self) -> Result<AdmittedPair> {
        let ReservedPair {
            session,
            pair:
                PairToScore {
                    prompt,
                    a,
                    b,
                    arguments: own,
                    logged,
                },
            room,
        } = self;
        if let Some(policy) = logged.policy {
            let answers = policy.answers(
                logged.reference,
                session.reference.is_some(),
                session.normalization,
            )?;
            return Ok(AdmittedPair(PairWork::Logged(session, answers)));
        }
        if let Text::Plain(_) = prompt
            && !own.is_empty()
        {
            let field = if own.tools.is_some() {
                "pair.tools"
            } else {
                "pair.chat_template_kwargs"
            };
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
            ServiceError::invalid(field, e.problem())
        })?;
        let mut session = session;
        if logged.reference.is_some() {
            logged::refuse_truncated(&encoded)?;
            if !session.names_reference || !logged::is_checked(&encoded) {
                session.reference = None;
            }
        }
        Ok(AdmittedPair(PairWork::Compute(Admitted {
            logged: logged.reference,
            ..session.admitted(encoded, room)?
        })))
    }
}

/// Admits and scores a pair, if room for its text could be reserved.
///
/// # Errors
/// The error of the reservation, and the errors of [`ReservedPair::admit`] and
/// [`AdmittedPair::score`].
pub async fn score_reserved(reserved: Result<ReservedPair>) -> Result<ScoredPair> {
    reserved?.admit().await?.score().await
}

impl AdmittedPair {
    /// Scores the pair. The result does not depend on other requests.
    ///
    /// # Errors
    /// `InvalidArgument` if the row has more tokens than the server allows, or if the named
    /// reference gives other log-probs than the pair carries; `Unavailable` if the queue is full or
    /// the server is shutting down; `ResourceExhausted` if memory is not sufficient;
    /// `FailedPrecondition` if weights can no longer be read.
    pub async fn score(self) -> Result<ScoredPair> {
        let admitted = match self.0 {
            PairWork::Compute(admitted) => admitted,
            PairWork::Logged(session, answers) => return Ok(session.score_logged(answers)),
        };
        let (policy_version, logged) = (
            admitted.session.policy.version.clone(),
            admitted.logged.is_some(),
        );
        // A calibration is for exactly one reference, and logged log-probs may be of any.
        let calibration = admitted.session.calibration.filter(|_| !logged);
        let count = |_: u64| Usage {
            scored_pairs: 1,
            ..Usage::default()
        };
        let (scored, live_step) = admitted.score("pairs", count).await?;
        let policy_version = match live_step {
            Some(step) => format!("{policy_version}@{step}"),
            None => policy_version,
        };
        let mut sides = scored.into_iter();
        let (Some(a), Some(b)) = (sides.next(), sides.next()) else {
            return Err(ServiceError::internal(
                "a pair came back with fewer than two sides",
            ));
        };
        metrics::counter!("bradley_scored_pairs_total").increment(1);
        let margin = a.reward - b.reward;
        let point = CalibrationPoint {
            margin,
            length_difference: a.token_ids.len() as f64 - b.token_ids.len() as f64,
        };
        Ok(ScoredPair {
            probability: preference_probability(margin),
            calibrated_probability: calibration
                .map(|calibration| preference_probability(calibration.margin(point))),
            margin,
            a,
            b,
            policy_version,
            logged,
        })
    }
}

impl AdmittedCompletions {
    /// Scores the answers in one row, ranks them by their rewards, and computes for each the
    /// probability that it is the best.
    ///
    /// # Errors
    /// The errors of [`AdmittedPair::score`].
    pub async fn score(self) -> Result<RankedCompletions> {
        let scored = match self.row {
            Some(row) => {
                let count = |n: u64| Usage {
                    scored_completions: n,
                    ..Usage::default()
                };
                row.score("completions", count).await?.0
            }
            None => Vec::new(),
        };
        Ok(ranked(self.errors, scored))
    }
}

impl Admitted {
    /// Returns the scores of the row's answers, and the step at which a live policy scored them.
    /// `field` names the row's texts in errors. `count` gets the number of answers, and returns the
    /// work besides the tokens.
    async fn score(
        self,
        field: &'static str,
        count: impl FnOnce(u64) -> Usage,
    ) -> Result<(Vec<ScoredCompletion>, Option<u64>)> {
        // The bindings hold quota and budget until the row is scored.
        let Admitted {
            session,
            encoded,
            item,
            logged,
            _quota,
            _room,
        } = self;
        let tokens = item.tokens() as u64;
        let scored = session.score(item).await.map_err(|e| match e {
            ScoreError::Engine(e @ EngineError::RowTooLong { .. }) => {
                ServiceError::invalid(field, format!("is too long: {e}"))
            }
            ScoreError::Engine(e) => e.into(),
            ScoreError::Service(e) => e,
        })?;
        session.service.usage.count(
            &session.owner,
            Usage {
                scored_tokens: tokens,
                ..count(encoded.len() as u64)
            },
        );
        if let (Some(logged), [a, b]) = (logged, scored.completions.as_slice()) {
            let [a, b] = [a, b].map(|answer| answer.reference.as_deref());
            let tokens = [0, 1].map(|i| encoded.get(i).map_or(0, |e| e.tokens.len()));
            let precision = session.service.engine.precision();
            logged::compare(logged, [a, b].map(|of| of.map(total)), tokens, precision)?;
        }
        let live_step = scored.live_step;
        Ok((session.describe(encoded, scored, logged), live_step))
    }
}

/// Merges scores and errors in the order of the answers, and ranks the scored ones.
fn ranked(errors: Vec<Option<ServiceError>>, scored: Vec<ScoredCompletion>) -> RankedCompletions {
    let with_score: Vec<usize> = errors
        .iter()
        .enumerate()
        .filter(|(_, e)| e.is_none())
        .map(|(i, _)| i)
        .collect();
    let rewards: Vec<f64> = scored.iter().map(|s| s.reward).collect();
    let ranking = ranking(&rewards)
        .into_iter()
        .map(|i| with_score[i])
        .collect();
    let mut scored = scored.into_iter().zip(best_of(&rewards));
    let missing_score = || (Err(ServiceError::internal("unscored")), 0.0);
    let answers = errors.into_iter().map(|error| {
        let (score, probability) = match error {
            Some(e) => (Err(e), 0.0),
            None => scored
                .next()
                .map_or_else(missing_score, |(score, probability)| {
                    (Ok(score), probability)
                }),
        };
        RankedCompletion { score, probability }
    });
    RankedCompletions {
        answers: answers.collect(),
        ranking,
    }
}

fn needs_dialogue(field: &str) -> ServiceError {
    ServiceError::invalid(
        field,
        "applies only to chat messages, because the chat template renders it: send chat messages, \
         or leave this field and its JSON form empty",
    )
}

#[cfg(test)]
mod tests;
