//! The trainer: a run as a sequence of short units of work, so that the device can score between
//! them.
//!
//! One unit is one micro-batch (forward, loss, backward), one optimizer update with what is due
//! after it, or one batch of an evaluation. Everything is a function of the spec, the data and the
//! seed: the same run gives the same numbers bit for bit, continued or not.

mod evaluation;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backprop::Keep;
use super::checkpoint::{self, CheckpointContents, CheckpointError, RunState};
use super::estimate::{self, Estimate, Lengths, MemoryKind};
use super::event::RunEvent;
use super::host::Host;
use super::micro_batch::MicroBatch;
use super::observe::{self, EvaluationSums, Window};
use super::optimizer::AdamW;
use super::reference::Reference;
use super::trainable::{Gradients, TrainablePolicy};
use crate::domain::identity::ModelIdentity;
use crate::domain::job::{Metrics, Progress};
use crate::domain::names::BaseName;
use crate::domain::training::TrainingSpec;
use crate::formats::tokenizer::ChatTokenizer;
use crate::infer::pair::{EncodedPair, SequenceGroup, digest};
use crate::infer::scorer::Logps;
use crate::math::clip::clip_coefficient;
use crate::math::rng::epoch_order;
use crate::math::schedule::learning_rate;
use crate::model::decoder::Policy;
use crate::model::device::{ComputeDevice, is_out_of_memory};

/// Why a run could not go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The loss or the gradient is not a number.
    #[error(
        "{what} is {value} at step {step} (rows {rows:?}): lower the learning rate, or look at these rows"
    )]
    NonFinite {
        /// loss, grad_norm or eval_loss.
        what: &'static str,
        /// inf or NaN.
        value: f64,
        /// The step being taken.
        step: u64,
        /// The dataset rows of the micro-batch.
        rows: Vec<u64>,
    },
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Not even the leanest plan fits the memory that the run may use.
    #[error(
        "the run needs at least {needed_mib} MiB besides copies of weights, {available_mib} MiB are left for it: \
         lower max_length, train with LoRA, or give it more memory"
    )]
    NoPlan {
        /// What the leanest plan needs.
        needed_mib: u64,
        /// What there is.
        available_mib: u64,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl TrainError {
    /// Returns true if memory ran out, or would.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            TrainError::Tensor(e) => is_out_of_memory(e),
            TrainError::NoPlan { .. } => true,
            TrainError::NonFinite { .. } | TrainError::Checkpoint(_) => false,
        }
    }

    /// Returns the message without folders of the server.
    pub fn for_clients(&self) -> String {
        match self {
            TrainError::Checkpoint(e) => e.for_clients(),
            e => e.to_string(),
        }
    }
}

/// What a run needs.
pub struct TrainerInput {
    /// Hyper-parameters.
    pub spec: TrainingSpec,
    /// The weights to train, at their start.
    pub policy: TrainablePolicy,
    /// What log-ratios are taken against.
    pub reference: Reference,
    /// Training pairs, in file order; at least one.
    pub train: Vec<EncodedPair>,
    /// Evaluation pairs.
    pub eval: Vec<EncodedPair>,
    /// The folder for checkpoints.
    pub checkpoints: PathBuf,
    /// The checkpoint to continue from.
    pub resume: Option<PathBuf>,
    /// For full checkpoints.
    pub tokenizer: Arc<ChatTokenizer>,
    /// The base model's name, for adapter_config.json.
    pub base: BaseName,
    /// The base model by content: checkpoints record it, and a run continues on no other.
    pub identity: ModelIdentity,
    /// Bytes the run may need besides the resident base weights: decides what is recomputed.
    pub memory: u64,
}

/// What is left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// More units.
    Working,
    /// Nothing.
    Finished,
}

enum Phase {
    /// Micro-batch `done` of the step's group is next.
    Step { done: usize },
    /// The evaluation goes on at this pair.
    Evaluate { next: usize },
    /// A checkpoint is due.
    Save { best: bool },
    /// The run is over.
    Done,
}

/// How long a run waits for a checkpoint that cannot be written, before it fails.
const SAVE_PATIENCE: Duration = Duration::from_secs(3600);
/// How long until it tries again.
const SAVE_RETRY: Duration = Duration::from_secs(1);
/// The thread's naps meanwhile.
const IDLE: Duration = Duration::from_millis(20);

/// A checkpoint that could not be written yet.
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
    /// The digest of both lists of pairs, which checkpoints record.
    pairs: String,
    optimizer: AdamW,
    /// Of each of the policy's devices; the update sees the first, to which the others are added.
    gradients: Vec<Gradients>,
    state: RunState,
    total_steps: u64,
    order: (u64, Vec<u32>),
    phase: Phase,
    /// Tokens and window before the step in progress: what its repetition begins with.
    before: (u64, Window),
    step_started: Instant,
    evaluation: EvaluationSums,
    latest: Metrics,
    saved_step: Option<u64>,
    unsaved: Option<Unsaved>,
    plan: Estimate,
    /// Whether the plan was cut down because the device ran out of memory.
    shortened: bool,
    started: Instant,
    first_step: u64,
}

impl Trainer {
    /// Prepares a run; with `resume`, restores its state.
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
        let lengths = Lengths::of(&train, spec.batch.batch_size);
        let plan = estimate::plan(
            &policy.policy.config,
            &spec,
            lengths,
            memory,
            MemoryKind::of(&policy.policy.device),
        );
        let plan = plan.map_err(|leanest| {
            let needed_mib = leanest.total().div_ceil(1 << 20);
            TrainError::NoPlan { needed_mib, available_mib: memory >> 20 }
        })?;
        let total_steps = spec.batch.total_steps(train.len());
        let first_step = state.step;
        let mut trainer = Trainer {
            gradients: policy.policy.devices().map(|_| Gradients::zeros(&policy)).collect(),
            order: (u64::MAX, Vec::new()),
            before: Default::default(),
            step_started: Instant::now(),
            evaluation: EvaluationSums::default(),
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
        trainer.phase = trainer.first_phase();
        Ok(trainer)
    }

    /// Where a fresh or continued run begins: with an evaluation that is due and was not made, else
    /// with the next step.
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

    /// Whether the rows are evaluated after the step just taken.
    fn evaluation_due(&self) -> bool {
        let (step, every) = (self.state.step, self.spec.run.eval_steps);
        !self.eval.is_empty()
            && (step >= self.total_steps || (every > 0 && step.is_multiple_of(every)))
    }

    /// The weights as they are now, for scoring between units.
    pub fn live_policy(&self) -> Policy {
        self.policy.policy.clone()
    }

    /// The reference as it is now, and its name in the cache of log-probs.
    pub fn reference(&self) -> Option<(&Policy, &str)> {
        self.reference.weights()
    }

    /// Returns true if the reference follows the policy (TR-DPO).
    pub fn moves_reference(&self) -> bool {
        self.reference.moving().is_some()
    }

    /// Optimizer steps taken.
    pub fn step(&self) -> u64 {
        self.state.step
    }

    /// Optimizer steps in all.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Bytes that the run plans to need on each of its devices, besides copies of weights.
    pub fn planned_bytes(&self) -> u64 {
        self.plan.total()
    }

    /// Returns true if a device ran out of memory and rows were shortened for it.
    pub fn is_shortened(&self) -> bool {
        self.shortened
    }

    /// Does one unit of work.
    pub fn advance(&mut self, host: &mut Host) -> Result<Status, TrainError> {
        match self.phase {
            Phase::Done => return Ok(Status::Finished),
            Phase::Step { done } => self.step_unit(done, host)?,
            Phase::Evaluate { next } => self.evaluate_unit(next, host)?,
            Phase::Save { best } => self.save_unit(best, host)?,
        }
        Ok(if matches!(self.phase, Phase::Done) { Status::Finished } else { Status::Working })
    }

    /// Writes a checkpoint of the last completed step, unless there is one; used when the server
    /// drains.
    pub fn save_now(&mut self, emit: &mut dyn FnMut(RunEvent)) -> Result<(), TrainError> {
        if let Phase::Step { done } = self.phase
            && done > 0
        {
            // The step's first micro-batches are repeated when the run continues: their gradients
            // are not part of a checkpoint.
            self.rewind(done)?;
        }
        let best = matches!(self.phase, Phase::Save { best: true });
        if self.saved_step != Some(self.state.step) && self.state.step > 0 {
            self.save(best, emit)
        } else {
            Ok(())
        }
    }

    /// Back to the start of the step in progress, of which `done` micro-batches are done.
    fn rewind(&mut self, done: usize) -> Result<(), TrainError> {
        self.state.micro_batch -= done;
        (self.state.tokens, self.state.window) = std::mem::take(&mut self.before);
        self.phase = Phase::Step { done: 0 };
        Ok(self.clear()?)
    }

    fn clear(&mut self) -> candle_core::Result<()> {
        self.gradients.iter_mut().try_for_each(Gradients::clear)
    }

    /// Writes a checkpoint. When it cannot be written (the disk is full, say) the run waits and
    /// tries again: what was trained is worth more than the wait.
    fn save_unit(&mut self, best: bool, host: &mut Host) -> Result<(), TrainError> {
        if self.unsaved.is_some_and(|u| u.next > Instant::now()) {
            (host.pause)();
            std::thread::sleep(IDLE);
            return Ok(());
        }
        let Err(e) = self.save(best, host.emit) else {
            self.unsaved = None;
            self.phase = self.after_save();
            return Ok(());
        };
        let now = Instant::now();
        let since = self.unsaved.map_or(now, |u| u.since);
        if now - since > SAVE_PATIENCE {
            return Err(e);
        }
        if self.unsaved.is_none() {
            tracing::warn!(step = self.state.step, error = %e, "the checkpoint cannot be written");
            let why = e.for_clients();
            let message = format!(
                "the checkpoint of step {} cannot be written, the run waits until it can: {why}",
                self.state.step
            );
            (host.emit)(RunEvent::Log { severity: "warning", message });
        }
        self.unsaved = Some(Unsaved { since, next: now + SAVE_RETRY });
        Ok(())
    }

    // ---- one micro-batch, and the update when the step's last one is done

    fn step_unit(&mut self, done: usize, host: &mut Host) -> Result<(), TrainError> {
        let (micro_batches, group) = self.group();
        if done == 0 {
            self.clear()?;
            self.before = (self.state.tokens, self.state.window.clone());
            self.step_started = Instant::now();
        }
        if let Err(e) = self.micro_batch(1.0 / group as f64, host) {
            self.shorten(e, host)?;
            return self.rewind(done);
        }
        self.state.micro_batch += 1;
        if done + 1 < group {
            self.phase = Phase::Step { done: done + 1 };
            return Ok(());
        }
        self.update()?;
        observe::step(self.step_started.elapsed(), self.state.tokens - self.before.0);
        if self.state.micro_batch >= micro_batches {
            self.state.epoch += 1;
            self.state.micro_batch = 0;
        }
        self.after_update(host.emit);
        Ok(())
    }

    /// When the device ran out of memory, once: shorter rows, whose blocks are run again. Any other
    /// error stands.
    fn shorten(&mut self, e: TrainError, host: &mut Host) -> Result<(), TrainError> {
        if !e.is_out_of_memory() || std::mem::replace(&mut self.shortened, true) {
            return Err(e);
        }
        self.policy.policy.devices().for_each(ComputeDevice::trim);
        let size = self.spec.batch.batch_size;
        let lengths = Lengths::of(&self.train, size).max(Lengths::of(&self.eval, size));
        self.plan.row_tokens = (self.plan.row_tokens.min(lengths.micro_batch) / 2).max(1);
        self.plan.keep = Keep::Inputs;
        let message = format!(
            "{e}; going on with rows of {} tokens and activation checkpointing",
            self.plan.row_tokens
        );
        (host.emit)(RunEvent::Log { severity: "warning", message });
        Ok(())
    }

    /// Micro-batches in this epoch, and in the current step's group (the last group of an epoch may
    /// be short).
    fn group(&self) -> (usize, usize) {
        let micro_batches = self.train.len().div_ceil(self.spec.batch.batch_size);
        let accumulate = self.spec.batch.gradient_accumulation_steps;
        let start = self.state.micro_batch / accumulate * accumulate;
        (micro_batches, accumulate.min(micro_batches - start))
    }

    fn batch_rows(&mut self) -> Vec<usize> {
        if self.order.0 != self.state.epoch {
            let n = self.train.len();
            self.order = (self.state.epoch, order(&self.spec, n, self.state.epoch));
        }
        let size = self.spec.batch.batch_size;
        self.order
            .1
            .iter()
            .skip(self.state.micro_batch * size)
            .take(size)
            .map(|i| *i as usize)
            .collect()
    }

    fn micro_batch(&mut self, scale: f64, host: &mut Host) -> Result<(), TrainError> {
        let chosen = self.batch_rows();
        let pairs: Vec<&EncodedPair> = chosen.iter().map(|i| &self.train[*i]).collect();
        let row_tokens = self.plan.row_tokens;
        let references = references(&self.reference, &pairs, row_tokens, host)?;
        let batch = MicroBatch {
            dpo: &self.spec.dpo,
            policy: &self.policy.policy,
            pairs: &pairs,
            references: references.as_deref(),
            row_tokens,
        };
        let (loss, metrics) =
            batch.train(self.plan.keep, scale, &mut self.gradients, host.pause)?;
        if !loss.is_finite() {
            return Err(self.non_finite("loss", loss, &chosen));
        }
        self.state.window.add(metrics, scale);
        self.state.tokens += pairs.iter().map(|p| p.sequence_tokens() as u64).sum::<u64>();
        metrics::counter!("bradley_training_pairs_total").increment(pairs.len() as u64);
        Ok(())
    }

    fn update(&mut self) -> Result<(), TrainError> {
        let Some((gradients, others)) = self.gradients.split_first_mut() else { return Ok(()) };
        gradients.collect()?;
        others.iter_mut().try_for_each(|other| gradients.reduce(other))?;
        let norm = gradients.norm();
        if !norm.is_finite() {
            let rows = self.batch_rows();
            return Err(self.non_finite("grad_norm", norm, &rows));
        }
        let o = &self.spec.optimizer;
        let clip =
            if o.max_grad_norm > 0.0 { clip_coefficient(norm, o.max_grad_norm) } else { 1.0 };
        let lr = self.learning_rate();
        let vars: Vec<_> = self.policy.trainables.iter().map(|t| (&t.var, t.decay)).collect();
        self.optimizer.step(o, lr, clip, &vars, self.gradients[0].values())?;
        self.policy.policy.devices().for_each(|device| device.changed(self.policy.policy.view()));
        self.state.window.step(norm, lr);
        self.state.step += 1;
        if let Some(sync) = self.spec.dpo.reference_sync
            && self.state.step.is_multiple_of(sync.every_steps as u64)
        {
            self.state.reference_syncs += 1;
            self.reference.sync(&self.policy.policy, sync.alpha, self.state.reference_syncs)?;
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

    fn non_finite(&self, what: &'static str, value: f64, chosen: &[usize]) -> TrainError {
        TrainError::NonFinite {
            what,
            value,
            step: self.state.step + 1,
            rows: chosen.iter().map(|i| self.train[*i].row).collect(),
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
        if self.is_over() { Phase::Done } else { Phase::Step { done: 0 } }
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
            epoch: self.state.epoch as f64 + self.state.micro_batch as f64 / self.group().0 as f64,
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

/// The order of `n` pairs in an epoch.
fn order(spec: &TrainingSpec, n: usize, epoch: u64) -> Vec<u32> {
    match spec.batch.shuffle {
        true => epoch_order(n, spec.seed.0, epoch),
        false => (0..n as u32).collect(),
    }
}

/// Returns the tokens of the pairs that a run on `train` has used when it is at the epoch and
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
    host: &mut Host,
) -> Result<Option<Vec<Arc<Logps>>>, TrainError> {
    let Some((policy, identity)) = reference.weights() else { return Ok(None) };
    let groups: Vec<Vec<SequenceGroup>> = pairs.iter().map(|p| p.groups()).collect();
    let items: Vec<&[SequenceGroup]> = groups.iter().map(Vec::as_slice).collect();
    Ok(Some(host.cache.score(policy, identity, &items, row_tokens, host.pause)?))
}
