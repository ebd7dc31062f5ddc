//! The trainer: a run as a sequence of short units of work, so that the device can score between
//! them.
//!
//! One unit is one micro-batch (forward, loss, backward), with the optimizer update if it is the
//! last of its step, one batch of an evaluation, one checkpoint, or the comparison of one pair's
//! logged log-probs with the model. Everything is a function of the spec, the data and the seed:
//! on a CPU the same run gives bit-identical numbers, even if it was interrupted and continued.
//! Another memory limit or other devices may change the last bits, because the rows may then be
//! packed differently. On a GPU an interruption may change them, too, because the reference's
//! log-probs are then computed again in other rows.

mod agreement;
mod evaluation;

use std::error::Error;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backprop::SavePolicy;
use super::checkpoint::{self, CheckpointContents, CheckpointError, RunState};
use super::estimate::{self, Estimate, Lengths, MemoryKind};
use super::event::RunEvent;
use super::logged::{self, Comparison};
use super::micro_batch::MicroBatch;
use super::observe::{self, EvaluationSums, Window};
use super::optimizer::AdamW;
use super::reference::{BatchReferences, Reference};
use super::run_context::RunContext;
use super::trainable::{StepGradients, TrainablePolicy};
use crate::domain::identity::ModelIdentity;
use crate::domain::job::{Metrics, Progress};
use crate::domain::names::BaseName;
use crate::domain::training::TrainingSpec;
use crate::formats::tokenizer::ChatTokenizer;
use crate::infer::pair::{EncodedPair, SequenceGroup, digest};
use crate::math::clip::clip_coefficient;
use crate::math::rng::epoch_order;
use crate::math::schedule::learning_rate;
use crate::model::decoder::Policy;
use crate::model::device::{ComputeDevice, is_out_of_memory};

/// Reason why a run could not continue.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The loss or the gradient norm is NaN or infinite.
    #[error("{what} is {value} at step {step}{}", remedy(rows))]
    NonFinite {
        /// `loss`, `grad_norm` or `eval_loss`.
        what: &'static str,
        /// The value, infinite or NaN.
        value: f64,
        /// Optimizer step in which it occurred.
        step: u64,
        /// Dataset rows of the micro-batch, for `grad_norm` those of the whole step; empty for
        /// `eval_loss`.
        rows: Vec<u64>,
    },
    /// The reference log-probs in a row are not those of the weights that the run starts from.
    #[error(
        "{0}: log them with these weights, the same chat template and precision, compute the \
         reference by leaving reference empty, or set logged_check to warn"
    )]
    LoggedDisagrees(String),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Even the leanest plan exceeds the memory that the run may use.
    #[error(
        "the run needs at least {needed_mib} MiB besides weights that it does not train, \
         {available_mib} MiB are left for it: lower max_length, train with LoRA, or give it more \
         memory"
    )]
    NoPlan {
        /// Memory of the leanest plan in MiB.
        needed_mib: u64,
        /// Memory for the run in MiB.
        available_mib: u64,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Returns the rest of the message about a value that is not finite: its rows, if they are known,
/// and the remedy.
fn remedy(rows: &[u64]) -> String {
    if rows.is_empty() {
        return ": lower the learning rate".to_owned();
    }
    format!(" (rows {rows:?}): lower the learning rate, or look at these rows")
}

impl TrainError {
    /// Returns true if memory ran out or the plan shows that it would.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            TrainError::Tensor(e) => is_out_of_memory(e),
            TrainError::NoPlan { .. } => true,
            TrainError::NonFinite { .. }
            | TrainError::LoggedDisagrees(_)
            | TrainError::Checkpoint(_) => false,
        }
    }

    /// Returns true if a checkpoint could not be written because there is no space left.
    fn is_disk_full(&self) -> bool {
        let mut next: Option<&(dyn Error + 'static)> = Some(self);
        while let Some(e) = next {
            if let Some(io) = e.downcast_ref::<io::Error>() {
                return matches!(
                    io.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                );
            }
            next = e.source();
        }
        false
    }

    /// Returns the message without the server's folders.
    pub fn for_clients(&self) -> String {
        match self {
            TrainError::Checkpoint(e) => e.for_clients(),
            e => e.to_string(),
        }
    }
}

/// Inputs of a run.
pub struct TrainerInput {
    /// Hyper-parameters of the run.
    pub spec: TrainingSpec,
    /// Weights to train, with their start values.
    pub policy: TrainablePolicy,
    /// Reference for the log-ratios.
    pub reference: Reference,
    /// Training pairs, in file order; at least one.
    pub train: Vec<EncodedPair>,
    /// Evaluation pairs, in file order.
    pub eval: Vec<EncodedPair>,
    /// Folder for the checkpoints.
    pub checkpoints: PathBuf,
    /// Folder of the checkpoint to continue from.
    pub resume: Option<PathBuf>,
    /// Tokenizer, written into checkpoints of full weights.
    pub tokenizer: Arc<ChatTokenizer>,
    /// Name of the base model, for adapter_config.json.
    pub base: BaseName,
    /// Content hashes of the base model. Checkpoints record them, and a run continues only on the
    /// same content.
    pub identity: ModelIdentity,
    /// Memory in bytes for the plan: training state, activations and the program itself
    /// ([`Estimate::total`]). Weights that are not trained (the base's, the reference's) are not
    /// part of it. It decides how long the rows are and whether activations are recomputed.
    pub memory: u64,
}

/// Result of a unit of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// More units follow.
    Working,
    /// Nothing was computed: the run waits until it can write a checkpoint.
    Waiting,
    /// The run is complete.
    Finished,
}

/// The next unit of work.
enum Phase {
    /// Compare the logged log-probs of pair `next` of the sample with the model.
    Compare { next: usize },
    /// Compute micro-batch `done` of the current step.
    Step { done: usize },
    /// Continue the evaluation at pair `next`.
    Evaluate { next: usize },
    /// Write a checkpoint, which is the best so far if `best` is true.
    Save { best: bool },
    /// Nothing is left to do.
    Done,
}

/// Time for which a run tries to write a checkpoint before it fails.
const SAVE_RETRY_PERIOD: Duration = Duration::from_secs(3600);
/// Delay before the next attempt.
const SAVE_RETRY_DELAY: Duration = Duration::from_secs(1);
/// Sleep between calls of the yield point while the run waits for the next attempt.
const SAVE_WAIT_SLEEP: Duration = Duration::from_millis(20);

/// A checkpoint that could not be written yet: the first failure and the time of the next attempt.
#[derive(Clone, Copy)]
struct Unsaved {
    since: Instant,
    next: Instant,
}

/// A run in progress.
pub struct Trainer {
    spec: TrainingSpec,
    policy: TrainablePolicy,
    reference: Reference,
    train: Vec<EncodedPair>,
    eval: Vec<EncodedPair>,
    checkpoints: PathBuf,
    tokenizer: Arc<ChatTokenizer>,
    base: BaseName,
    identity: ModelIdentity,
    /// Digest of the training and evaluation pairs, which checkpoints record.
    pairs: String,
    optimizer: AdamW,
    /// Gradients on each of the policy's devices. Before an update all are added to the first.
    gradients: Vec<StepGradients>,
    state: RunState,
    total_steps: u64,
    /// An epoch, and the order of the training pairs in it.
    order: (u64, Vec<u32>),
    phase: Phase,
    /// Tokens and metrics before the step in progress, to which a repeated step returns.
    before_step: (u64, Window),
    step_started: Instant,
    evaluation: EvaluationSums,
    /// Pairs whose logged log-probs are compared with the model before the first step: indices into
    /// `train` followed by `eval`.
    sample: Vec<usize>,
    comparison: Comparison,
    /// Newest value of each metric.
    latest: Metrics,
    saved_step: Option<u64>,
    unsaved: Option<Unsaved>,
    plan: Estimate,
    /// True after the rows were shortened because the device ran out of memory.
    shortened: bool,
    started: Instant,
    /// Step from which the run began or continued, for the estimate of its remaining time.
    first_step: u64,
}

impl Trainer {
    /// Prepares a run. With `resume`, restores its state from the checkpoint.
    ///
    /// # Errors
    /// Fails if the checkpoint cannot be restored or no plan fits the memory.
    pub fn new(input: TrainerInput) -> Result<Self, TrainError> {
        let TrainerInput {
            spec,
            policy,
            mut reference,
            train,
            eval,
            checkpoints,
            resume,
            tokenizer,
            base,
            identity,
            memory,
        } = input;
        let mut optimizer = AdamW::new(policy.trainables.iter().map(|t| t.var.elem_count()));
        let (mut state, mut latest, mut saved_step) = (RunState::default(), Metrics::new(), None);
        if let Some(dir) = &resume {
            let restored = checkpoint::restore(dir, &identity, &policy, &mut optimizer)?;
            if let Some(tensors) = restored.reference {
                reference.restore(tensors, restored.state.reference_syncs)?;
            }
            saved_step = Some(restored.state.step);
            (state, latest) = (restored.state, restored.metrics);
        }
        let config = &policy.policy.config;
        let lengths = Lengths::of_run(&config.spec, &train, &eval, spec.batch.batch_size);
        let plan = estimate::plan(
            config,
            &spec,
            lengths,
            memory,
            MemoryKind::of(&policy.policy.device),
        );
        let plan = plan.map_err(|leanest| {
            let needed_mib = leanest.total().div_ceil(1 << 20);
            TrainError::NoPlan {
                needed_mib,
                available_mib: memory >> 20,
            }
        })?;
        let total_steps = spec.batch.total_steps(train.len());
        let first_step = state.step;
        let mut trainer = Trainer {
            gradients: policy
                .policy
                .devices()
                .map(|_| StepGradients::zeros(&policy))
                .collect(),
            order: (u64::MAX, Vec::new()),
            before_step: Default::default(),
            step_started: Instant::now(),
            evaluation: EvaluationSums::default(),
            sample: match reference {
                Reference::Logged => logged::sample(train.len() + eval.len(), spec.seed.0),
                _ => Vec::new(),
            },
            comparison: Comparison::default(),
            started: Instant::now(),
            pairs: digest(&train, &eval),
            spec,
            policy,
            reference,
            train,
            eval,
            checkpoints,
            tokenizer,
            base,
            identity,
            optimizer,
            state,
            total_steps,
            phase: Phase::Done,
            latest,
            saved_step,
            unsaved: None,
            plan,
            shortened: false,
            first_step,
        };
        trainer.phase = match trainer.sample.is_empty() || trainer.state.step > 0 {
            true => trainer.first_phase(),
            // Only before the first step are the policy's weights those that it started from.
            false => Phase::Compare { next: 0 },
        };
        Ok(trainer)
    }

    /// Returns the first phase of a new or continued run, after the comparison of logged log-probs:
    /// an evaluation that is due but was not made, or the next step.
    fn first_phase(&self) -> Phase {
        let due = if self.state.step == 0 {
            self.spec.run.eval_on_start && !self.eval.is_empty()
        } else {
            self.evaluation_due()
        };
        match () {
            () if due && self.state.evaluated != Some(self.state.step) => {
                Phase::Evaluate { next: 0 }
            }
            () if self.is_over() => Phase::Done,
            () => Phase::Step { done: 0 },
        }
    }

    /// Returns true if an evaluation is due after the last step.
    fn evaluation_due(&self) -> bool {
        let (step, every) = (self.state.step, self.spec.run.eval_steps);
        !self.eval.is_empty()
            && (step >= self.total_steps || (every > 0 && step.is_multiple_of(every)))
    }

    /// Returns the current weights, for scoring between units.
    pub fn live_policy(&self) -> Policy {
        self.policy.policy.clone()
    }

    /// Returns the current reference and its identity in the cache of log-probs.
    pub fn reference(&self) -> Option<(&Policy, &str)> {
        self.reference.weights()
    }

    /// Returns true if the reference follows the policy (TR-DPO).
    pub fn moves_reference(&self) -> bool {
        self.reference.moving().is_some()
    }

    /// Returns the number of optimizer steps taken.
    pub fn step(&self) -> u64 {
        self.state.step
    }

    /// Returns the number of optimizer steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Returns the planned memory on each device in bytes, without weights that are not trained.
    pub fn planned_bytes(&self) -> u64 {
        self.plan.total()
    }

    /// Returns true if a device ran out of memory and the rows were shortened because of it.
    pub fn is_shortened(&self) -> bool {
        self.shortened
    }

    /// Does one unit of work.
    ///
    /// # Errors
    /// Fails if the run cannot continue.
    pub fn advance(&mut self, context: &mut RunContext) -> Result<Status, TrainError> {
        match self.phase {
            Phase::Done => return Ok(Status::Finished),
            Phase::Compare { next } => self.compare_unit(next, context)?,
            Phase::Step { done } => self.step_unit(done, context)?,
            Phase::Evaluate { next } => self.evaluate_unit(next, context)?,
            Phase::Save { best } => self.save_unit(best, context)?,
        }
        Ok(match self.phase {
            Phase::Done => Status::Finished,
            _ if self.unsaved.is_some() => Status::Waiting,
            _ => Status::Working,
        })
    }

    /// Writes a checkpoint of the last completed step, unless it exists or no step is complete.
    /// Used when the server drains, or the run is preempted or paused.
    ///
    /// # Errors
    /// Fails if the checkpoint cannot be written.
    pub fn save_now(&mut self, emit: &mut dyn FnMut(RunEvent)) -> Result<(), TrainError> {
        if let Phase::Step { done } = self.phase
            && done > 0
        {
            // Gradients are not part of a checkpoint, so the continued run repeats the step's first
            // micro-batches.
            self.rewind(done)?;
        }
        let best = matches!(self.phase, Phase::Save { best: true });
        if self.saved_step != Some(self.state.step) && self.state.step > 0 {
            self.save(best, emit)
        } else {
            Ok(())
        }
    }

    /// Returns to the start of the step in progress, in which `done` micro-batches are complete.
    fn rewind(&mut self, done: usize) -> Result<(), TrainError> {
        self.state.micro_batch -= done;
        (self.state.tokens, self.state.window) = std::mem::take(&mut self.before_step);
        self.phase = Phase::Step { done: 0 };
        Ok(self.clear()?)
    }

    fn clear(&mut self) -> candle_core::Result<()> {
        self.gradients.iter_mut().try_for_each(StepGradients::clear)
    }

    /// Writes a checkpoint. If that fails, e.g. because the disk is full, the run waits and tries
    /// again for up to [`SAVE_RETRY_PERIOD`], in order not to lose the steps.
    fn save_unit(&mut self, best: bool, context: &mut RunContext) -> Result<(), TrainError> {
        if self.unsaved.is_some_and(|u| u.next > Instant::now()) {
            (context.yield_point)();
            std::thread::sleep(SAVE_WAIT_SLEEP);
            return Ok(());
        }
        let Err(e) = self.save(best, context.emit) else {
            self.unsaved = None;
            self.phase = self.after_save();
            return Ok(());
        };
        let now = Instant::now();
        let since = self.unsaved.map_or(now, |u| u.since);
        if now - since > SAVE_RETRY_PERIOD {
            return Err(e);
        }
        self.report_unsaved(&e, Some(SAVE_RETRY_PERIOD), context.emit);
        self.unsaved = Some(Unsaved {
            since,
            next: now + SAVE_RETRY_DELAY,
        });
        Ok(())
    }

    /// Logs and reports that the checkpoint of the current step cannot be written, unless an
    /// attempt before this one has reported it. The run gives up after `limit`, if there is one.
    pub fn report_unsaved(
        &mut self,
        error: &TrainError,
        limit: Option<Duration>,
        emit: &mut dyn FnMut(RunEvent),
    ) {
        if self.unsaved.is_some() {
            return;
        }
        let now = Instant::now();
        self.unsaved = Some(Unsaved {
            since: now,
            next: now,
        });
        let step = self.state.step;
        let limit_seconds = limit.map(|l| l.as_secs());
        tracing::warn!(step, %error, limit_seconds, "a checkpoint cannot be written yet");
        emit(RunEvent::CheckpointDelayed {
            step,
            reason: error.for_clients(),
            disk_full: error.is_disk_full(),
            limit,
        });
    }

    /// Computes one micro-batch, and takes the optimizer step after the step's last one.
    fn step_unit(&mut self, done: usize, context: &mut RunContext) -> Result<(), TrainError> {
        let (micro_batches, group) = self.micro_batch_counts();
        if done == 0 {
            self.clear()?;
            self.before_step = (self.state.tokens, self.state.window.clone());
            self.step_started = Instant::now();
        }
        if let Err(e) = self.micro_batch(1.0 / group as f64, context) {
            self.shorten(e, context)?;
            return self.rewind(done);
        }
        self.state.micro_batch += 1;
        if done + 1 < group {
            self.phase = Phase::Step { done: done + 1 };
            return Ok(());
        }
        self.update(group)?;
        observe::step(
            self.step_started.elapsed(),
            self.state.tokens - self.before_step.0,
        );
        if self.state.micro_batch >= micro_batches {
            self.state.epoch += 1;
            self.state.micro_batch = 0;
        }
        self.after_update(context.emit);
        Ok(())
    }

    /// Handles the first out-of-memory error: halves the rows and turns on recomputation. Returns
    /// any other error, and a second one.
    fn shorten(&mut self, e: TrainError, context: &mut RunContext) -> Result<(), TrainError> {
        if !e.is_out_of_memory() || std::mem::replace(&mut self.shortened, true) {
            return Err(e);
        }
        self.policy.policy.devices().for_each(ComputeDevice::trim);
        let size = self.spec.batch.batch_size;
        let model = &self.policy.policy.config.spec;
        // If the pairs of the evaluation are longer, half of their length may not shorten a row of
        // the training.
        let class = |length| model.length_class(length);
        let lengths = Lengths::by_length(&self.train, size, &class);
        self.plan.row_tokens = (self.plan.row_tokens.min(lengths.micro_batch) / 2).max(1);
        self.plan.save = SavePolicy::BlockInputs;
        let message = format!(
            "{e}; going on with rows of {} tokens and activation checkpointing",
            self.plan.row_tokens
        );
        (context.emit)(RunEvent::Log {
            severity: "warning",
            message,
        });
        Ok(())
    }

    /// Returns the number of micro-batches in an epoch and in the current step. The last step of an
    /// epoch may have fewer.
    fn micro_batch_counts(&self) -> (usize, usize) {
        let micro_batches = self.train.len().div_ceil(self.spec.batch.batch_size);
        let accumulate = self.spec.batch.gradient_accumulation_steps;
        let start = self.state.micro_batch / accumulate * accumulate;
        (micro_batches, accumulate.min(micro_batches - start))
    }

    /// Returns the indices of the pairs of these micro-batches of the current epoch.
    fn batch_rows(&mut self, micro_batches: Range<usize>) -> Vec<usize> {
        if self.order.0 != self.state.epoch {
            let n = self.train.len();
            self.order = (self.state.epoch, order(&self.spec, n, self.state.epoch));
        }
        let size = self.spec.batch.batch_size;
        self.order
            .1
            .iter()
            .skip(micro_batches.start * size)
            .take(micro_batches.len() * size)
            .map(|i| *i as usize)
            .collect()
    }

    fn micro_batch(&mut self, scale: f64, context: &mut RunContext) -> Result<(), TrainError> {
        let index = self.state.micro_batch;
        let indices = self.batch_rows(index..index + 1);
        let pairs: Vec<&EncodedPair> = indices.iter().map(|i| &self.train[*i]).collect();
        let row_tokens = self.plan.row_tokens;
        let references = references(&self.reference, &pairs, row_tokens, context)?;
        let batch = MicroBatch {
            dpo: &self.spec.dpo,
            policy: &self.policy.policy,
            pairs: &pairs,
            references: &references,
            row_tokens,
        };
        let (loss, metrics) = batch.train(
            self.plan.save,
            scale,
            &mut self.gradients,
            context.yield_point,
        )?;
        if !loss.is_finite() {
            return Err(self.non_finite("loss", loss, &indices));
        }
        self.state.window.add(metrics, scale);
        self.state.tokens += pairs
            .iter()
            .map(|p| p.sequence_tokens() as u64)
            .sum::<u64>();
        metrics::counter!("bradley_training_pairs_total").increment(pairs.len() as u64);
        Ok(())
    }

    /// Takes an optimizer step with the gradients of the last `group` micro-batches.
    fn update(&mut self, group: usize) -> Result<(), TrainError> {
        let Some((gradients, others)) = self.gradients.split_first_mut() else {
            return Ok(());
        };
        gradients.collect()?;
        others
            .iter_mut()
            .try_for_each(|other| gradients.reduce(other))?;
        let norm = gradients.norm();
        if !norm.is_finite() {
            // The gradients' last micro-batch is counted already.
            let end = self.state.micro_batch;
            let rows = self.batch_rows(end - group..end);
            return Err(self.non_finite("grad_norm", norm, &rows));
        }
        let o = &self.spec.optimizer;
        let clip = if o.max_grad_norm > 0.0 {
            clip_coefficient(norm, o.max_grad_norm)
        } else {
            1.0
        };
        let lr = self.learning_rate();
        let vars: Vec<_> = self
            .policy
            .trainables
            .iter()
            .map(|t| (&t.var, t.decay))
            .collect();
        self.optimizer
            .step(o, lr, clip, &vars, self.gradients[0].values())?;
        self.policy
            .policy
            .devices()
            .for_each(|device| device.changed(self.policy.policy.view()));
        self.state.window.step(norm, lr);
        self.state.step += 1;
        if let Some(sync) = self.spec.dpo.reference_sync
            && self.state.step.is_multiple_of(sync.every_steps as u64)
        {
            self.state.reference_syncs += 1;
            self.reference
                .sync(&self.policy.policy, sync.alpha, self.state.reference_syncs)?;
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        let o = &self.spec.optimizer;
        learning_rate(
            o.schedule,
            o.learning_rate,
            o.warmup.steps(self.total_steps),
            self.total_steps,
            self.state.step,
        )
    }

    fn non_finite(&self, what: &'static str, value: f64, indices: &[usize]) -> TrainError {
        TrainError::NonFinite {
            what,
            value,
            step: self.state.step + 1,
            rows: indices.iter().map(|i| self.train[*i].row).collect(),
        }
    }

    fn after_update(&mut self, emit: &mut dyn FnMut(RunEvent)) {
        let (step, run) = (self.state.step, &self.spec.run);
        let last = step >= self.total_steps;
        let progress = self.progress();
        if step.is_multiple_of(run.logging_steps) || last {
            let mut metrics = self.state.window.take();
            metrics.insert("epoch".into(), progress.epoch);
            metrics.insert("num_tokens".into(), self.state.tokens as f64);
            self.latest.extend(metrics.clone());
            emit(RunEvent::Step { progress, metrics });
        }
        self.phase = if self.evaluation_due() {
            Phase::Evaluate { next: 0 }
        } else {
            self.after_evaluation(false)
        };
    }

    fn after_evaluation(&self, best: bool) -> Phase {
        let (step, run) = (self.state.step, &self.spec.run);
        let due = run.save_steps > 0 && step.is_multiple_of(run.save_steps);
        if step > 0 && (due || best || self.is_over()) {
            Phase::Save { best }
        } else {
            self.after_save()
        }
    }

    fn after_save(&self) -> Phase {
        if self.is_over() {
            Phase::Done
        } else {
            Phase::Step { done: 0 }
        }
    }

    fn is_over(&self) -> bool {
        let patience = self.spec.run.early_stopping_patience;
        self.state.step >= self.total_steps
            || (patience > 0 && self.state.stale_evaluations >= patience)
    }

    fn progress(&self) -> Progress {
        let taken = self.state.step - self.first_step;
        let left = self.total_steps.saturating_sub(self.state.step);
        Progress {
            step: self.state.step,
            total_steps: self.total_steps,
            epoch: self.state.epoch as f64
                + self.state.micro_batch as f64 / self.micro_batch_counts().0 as f64,
            tokens: self.state.tokens,
            eta_seconds: (taken > 0)
                .then(|| self.started.elapsed().as_secs_f64() / taken as f64 * left as f64),
        }
    }

    fn save(&mut self, best: bool, emit: &mut dyn FnMut(RunEvent)) -> Result<(), TrainError> {
        let contents = CheckpointContents {
            policy: &self.policy,
            optimizer: &self.optimizer,
            reference: self.reference.moving(),
            state: &self.state,
            metrics: &self.latest,
            tokenizer: &self.tokenizer,
            base: &self.base,
            identity: &self.identity,
            pairs: &self.pairs,
        };
        let start = Instant::now();
        let size_bytes = checkpoint::save(&self.checkpoints, &contents)?;
        metrics::histogram!("bradley_checkpoint_seconds", "phase" => "write")
            .record(start.elapsed().as_secs_f64());
        self.saved_step = Some(self.state.step);
        let (step, metrics) = (self.state.step, self.latest.clone());
        emit(RunEvent::Checkpoint {
            step,
            best,
            adapter: self.policy.is_lora(),
            size_bytes,
            metrics,
        });
        Ok(())
    }
}

/// Returns the order of `n` pairs in an epoch.
fn order(spec: &TrainingSpec, n: usize, epoch: u64) -> Vec<u32> {
    match spec.batch.shuffle {
        true => epoch_order(n, spec.seed.0, epoch),
        false => (0..n as u32).collect(),
    }
}

/// Returns the number of tokens that a run on `train` has processed when it reaches the epoch and
/// micro-batch of `state`.
pub fn tokens_until(spec: &TrainingSpec, train: &[EncodedPair], state: &RunState) -> u64 {
    let tokens = |pair: &EncodedPair| pair.sequence_tokens() as u64;
    let whole_epochs = state.epoch.saturating_mul(train.iter().map(tokens).sum());
    let begun = order(spec, train.len(), state.epoch)
        .into_iter()
        .take(state.micro_batch.saturating_mul(spec.batch.batch_size));
    whole_epochs.saturating_add(begun.map(|i| tokens(&train[i as usize])).sum())
}

fn references(
    reference: &Reference,
    pairs: &[&EncodedPair],
    row_tokens: usize,
    context: &mut RunContext,
) -> Result<BatchReferences, TrainError> {
    if let Reference::Logged = reference {
        let sums = pairs.iter().map(|pair| pair.logged.unwrap_or_default());
        return Ok(BatchReferences::Sums(sums.collect()));
    }
    let Some((policy, identity)) = reference.weights() else {
        return Ok(BatchReferences::None);
    };
    let groups: Vec<Vec<SequenceGroup>> = pairs.iter().map(|p| p.groups()).collect();
    let items: Vec<&[SequenceGroup]> = groups.iter().map(Vec::as_slice).collect();
    Ok(BatchReferences::Tokens(context.cache.score(
        policy,
        identity,
        &items,
        row_tokens,
        context.yield_point,
    )?))
}
