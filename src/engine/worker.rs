//! The device worker: one OS thread that owns a device and runs units of work, scoring batches between training units.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::api::{Command, CompletionLogps, EngineError, EngineOptions, RunEnd, RunEvent, ScoredItem, TrainingRun, WeightsRef};
use super::queue::{Entry, Queue, Work};
use super::residents::{Bases, Residents};
use super::run;
use crate::domain::job::JobError;
use crate::model::decoder::Policy;
use crate::model::ops::buffer::Buffer;
use crate::train::pair::SequenceGroup;
use crate::train::reference_cache::ReferenceCache;
use crate::train::scorer::{self, Logps};
use crate::train::trainer::{Status, TrainError, Trainer};

/// Tokens of a row that several items share: more would only need more memory.
const ROW_TOKENS: usize = 2048;

/// What the thread owns.
pub(super) struct Worker {
    queue: Arc<Queue>,
    bases: Arc<Bases>,
    residents: Residents,
    cache: ReferenceCache,
    active: Option<Active>,
    batch_tokens: usize,
    share: f64,
    /// Bytes a run may need.
    memory: u64,
    /// Time that training must get before scoring may go on.
    owed_to_training: Duration,
}

/// The run on the device.
struct Active {
    run: TrainingRun,
    trainer: Trainer,
}

impl Worker {
    pub fn new(queue: Arc<Queue>, bases: Arc<Bases>, options: &EngineOptions, memory: u64) -> Self {
        Worker {
            queue,
            bases,
            residents: Residents::new(options.resident_policies),
            cache: match &options.reference_cache_file {
                Some(path) => ReferenceCache::open(options.reference_cache_tokens, path),
                None => ReferenceCache::new(options.reference_cache_tokens),
            },
            active: None,
            batch_tokens: options.batch_tokens,
            share: options.scoring_share.clamp(0.01, 1.0),
            memory,
            owed_to_training: Duration::ZERO,
        }
    }

    /// Works until the queue is drained or no handle is left.
    pub fn work(mut self) {
        loop {
            for dir in self.queue.take_evicted() {
                self.residents.evict(&dir);
            }
            let training = self.active.is_some();
            let may_score = !training || self.owed_to_training.is_zero();
            match self.queue.next(training, may_score, self.batch_tokens) {
                Work::Score(batch) => self.score_batch(batch),
                Work::Train => self.train_unit(),
                Work::Stop => return,
            }
        }
    }

    // ---- scoring

    fn score_batch(&mut self, batch: Vec<Entry>) {
        let start = Instant::now();
        let tokens: usize = batch.iter().map(|e| e.item.tokens()).sum();
        metrics::histogram!("bradley_scoring_batch_tokens").record(tokens as f64);
        for entries in by_weights(batch) {
            for entry in &entries {
                metrics::histogram!("bradley_scoring_queue_seconds").record(entry.enqueued.elapsed().as_secs_f64());
            }
            self.score_alike(entries);
        }
        let spent = start.elapsed();
        metrics::histogram!("bradley_scoring_compute_seconds").record(spent.as_secs_f64());
        metrics::counter!("bradley_scored_tokens_total").increment(tokens as u64);
        self.queue.set_rate(tokens as f64 / spent.as_secs_f64().max(1e-6));
        if self.active.is_some() {
            self.owed_to_training += spent.mul_f64((1.0 - self.share) / self.share);
        }
    }

    /// Scores entries of the same weights together; when that fails, each alone, so that one bad item fails only itself.
    fn score_alike(&mut self, entries: Vec<Entry>) {
        let together = guarded(|| self.score_items(&entries)).unwrap_or_else(|panic| Err(EngineError::Device(panic)));
        match together {
            Ok(scored) => entries.into_iter().zip(scored).for_each(|(entry, item)| answer(entry, Ok(item))),
            Err(_) if entries.len() > 1 => entries.into_iter().for_each(|entry| self.score_alike(vec![entry])),
            Err(e) => {
                if let Some(entry) = entries.into_iter().next() {
                    answer(entry, Err(e));
                }
            }
        }
    }

    /// Scores entries that all name the same policy and reference.
    fn score_items(&mut self, entries: &[Entry]) -> Result<Vec<ScoredItem>, EngineError> {
        let Some(first) = entries.first() else { return Ok(Vec::new()) };
        let (policy, live_step) = self.policy(&first.policy)?;
        let items: Vec<&[SequenceGroup]> = entries.iter().map(|e| e.item.groups.as_slice()).collect();
        let device = |e: candle_core::Error| EngineError::Device(e.to_string());
        let reference = match &first.reference {
            Some(weights) => {
                let identity = self.bases.identity(weights)?;
                let reference = self.residents.get(&self.bases, weights)?;
                Some(self.cache.score(&reference, &identity, &items, ROW_TOKENS).map_err(device)?)
            }
            None => None,
        };
        // A base model scored against itself costs one pass.
        let policy: Vec<Arc<Logps>> = match &reference {
            Some(logps) if first.reference.as_ref() == Some(&first.policy) => logps.clone(),
            _ => scorer::score_all(&policy, &items, ROW_TOKENS).map_err(device)?.into_iter().map(Arc::new).collect(),
        };
        let item = |(i, policy): (usize, Arc<Logps>)| {
            let of = |n: usize| reference.as_ref().map(|r| r[i][n].clone());
            let completions = policy.iter().enumerate().map(|(n, logps)| CompletionLogps { policy: logps.clone(), reference: of(n) });
            ScoredItem { completions: completions.collect(), live_step }
        };
        Ok(policy.into_iter().enumerate().map(item).collect())
    }

    fn policy(&mut self, weights: &WeightsRef) -> Result<(Policy, Option<u64>), EngineError> {
        match (weights, &self.active) {
            (WeightsRef::Live { job }, Some(active)) if active.run.job == *job => {
                Ok((active.trainer.live_policy(), Some(active.trainer.step())))
            }
            _ => Ok((self.residents.get(&self.bases, weights)?, None)),
        }
    }

    // ---- training

    fn train_unit(&mut self) {
        let Some(active) = &mut self.active else {
            return self.start_run();
        };
        let start = Instant::now();
        match active.run.control.command() {
            Command::Cancel => return self.end(RunEnd::Cancelled),
            Command::Drain => return self.drain_run(),
            Command::Run => {}
        }
        let events = active.run.events.clone();
        let mut emit = emitter(&events);
        let cache = &mut self.cache;
        let trainer = &mut active.trainer;
        let status = guarded(|| trainer.advance(cache, &mut emit));
        let spent = start.elapsed();
        metrics::histogram!("bradley_training_unit_seconds").record(spent.as_secs_f64());
        self.owed_to_training = self.owed_to_training.saturating_sub(spent);
        match status {
            Ok(Ok(Status::Working)) => {}
            Ok(Ok(Status::Finished)) => self.end(RunEnd::Succeeded),
            Ok(Err(e)) => self.end(RunEnd::Failed(explain(&e))),
            Err(panic) => self.end(RunEnd::Failed(internal(panic))),
        }
    }

    fn start_run(&mut self) {
        let Some(mut run) = self.queue.take_run() else { return };
        let end = match run.control.command() {
            Command::Cancel => Some(RunEnd::Cancelled),
            Command::Drain => Some(RunEnd::Drained),
            Command::Run => None,
        };
        let (bases, residents, memory) = (&self.bases, &mut self.residents, self.memory);
        let prepared = match end {
            Some(end) => Err(end),
            None => match guarded(|| run::prepare(&mut run, bases, residents, memory)) {
                Ok(Ok(trainer)) => Ok(trainer),
                Ok(Err(e)) => Err(RunEnd::Failed(JobError { reason: "WEIGHTS_UNAVAILABLE".into(), message: e.to_string() })),
                Err(panic) => Err(RunEnd::Failed(internal(panic))),
            },
        };
        match prepared {
            Ok(trainer) => {
                tracing::info!(job = run.job, from_step = trainer.step(), total_steps = trainer.total_steps(), "run started");
                send(&run, RunEvent::Running { total_steps: trainer.total_steps(), from_step: trainer.step() });
                self.owed_to_training = Duration::ZERO;
                self.active = Some(Active { run, trainer });
            }
            Err(end) => send(&run, RunEvent::Ended(end)),
        }
    }

    fn drain_run(&mut self) {
        let Some(active) = &mut self.active else { return };
        let events = active.run.events.clone();
        let trainer = &mut active.trainer;
        let saved = guarded(|| trainer.save_now(&mut emitter(&events)));
        match saved {
            Ok(Ok(())) => {}
            // The job continues from its last good checkpoint; only the steps since are repeated.
            Ok(Err(e)) => tracing::error!(error = %e, "checkpoint at drain failed"),
            Err(panic) => tracing::error!(panic, "checkpoint at drain failed"),
        }
        self.end(RunEnd::Drained);
    }

    fn end(&mut self, end: RunEnd) {
        if let Some(active) = self.active.take() {
            tracing::info!(job = active.run.job, step = active.trainer.step(), end = ?end, "run ended");
            // Weights and optimizer are freed before anyone hears that the run is over.
            let Active { run, trainer } = active;
            drop(trainer);
            Buffer::trim();
            send(&run, RunEvent::Ended(end));
        }
    }
}

/// Entries by the weights they name, in the order in which these first appear.
fn by_weights(batch: Vec<Entry>) -> Vec<Vec<Entry>> {
    let mut groups: Vec<Vec<Entry>> = Vec::new();
    for entry in batch {
        let alike = |group: &&mut Vec<Entry>| group.first().is_some_and(|e| e.policy == entry.policy && e.reference == entry.reference);
        match groups.iter_mut().find(alike) {
            Some(group) => group.push(entry),
            None => groups.push(vec![entry]),
        }
    }
    groups
}

/// The caller may have left meanwhile; nobody else wants the answer.
fn answer(entry: Entry, result: Result<ScoredItem, EngineError>) {
    let _ = entry.reply.send(result);
}

/// Sends and waits while the channel is full. A receiver that is gone means that the service is going down: the run notices by its control.
fn send(run: &TrainingRun, event: RunEvent) {
    let _ = run.events.blocking_send(event);
}

fn emitter(events: &tokio::sync::mpsc::Sender<RunEvent>) -> impl FnMut(RunEvent) + '_ {
    |event| {
        let _ = events.blocking_send(event);
    }
}

/// Runs a unit of work; a panic in it is its own failure, not the thread's.
fn guarded<R>(f: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| describe(&*panic))
}

fn describe(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| s.to_string()).or_else(|| panic.downcast_ref::<String>().cloned());
    format!("a unit of work panicked: {}", text.unwrap_or_else(|| "no message".into()))
}

fn internal(message: String) -> JobError {
    JobError { reason: "INTERNAL".into(), message }
}

fn explain(e: &TrainError) -> JobError {
    let reason = match e {
        TrainError::NonFinite { .. } => "NON_FINITE_LOSS",
        TrainError::Checkpoint(_) => "CHECKPOINT_FAILED",
        TrainError::Tensor(_) => "DEVICE_FAILED",
    };
    JobError { reason: reason.into(), message: e.to_string() }
}
