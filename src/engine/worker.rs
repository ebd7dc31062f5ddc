//! The device worker: one OS thread that owns a device and runs units of work. A training unit
//! yields to scoring and generation between any two decoder blocks.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

use super::api::{
    EngineError, EngineOptions, Report, RunCommand, RunControl, RunEnd, RunEvent, TrainingRun,
    WeightsRef,
};
use super::entry::ScoringQueue;
use super::live::{Live, LiveReference};
use super::memory::Room;
use super::needs::Needs;
use super::policy_cache::BaseModels;
use super::queue::{Seeker, Work};
use super::run::{self, ExactBases};
use super::scoring::{PolicyScorer, YieldPoint};
use crate::domain::job::JobError;
use crate::domain::reason::Reason;
use crate::infer::reference_cache::ReferenceCache;
use crate::model::decoder::Policy;
use crate::model::device::ComputeDevice;
use crate::model::guard::guarded;
use crate::train::run_context::RunContext;
use crate::train::trainer::{Status, TrainError, Trainer};

/// Delay before an event is sent again to a full channel.
const CHANNEL_RETRY_DELAY: Duration = Duration::from_millis(2);

/// Delay before a checkpoint that could not be written is tried again.
const SAVE_RETRY_DELAY: Duration = Duration::from_millis(500);

/// Interval at which a worker checks whether the weights of its run have been read. It scores in
/// between.
const READ_CHECK_INTERVAL: Duration = Duration::from_millis(2);

/// State of a device worker, owned by its thread.
pub(super) struct Worker {
    index: usize,
    /// Name in metrics.
    label: String,
    queue: Arc<ScoringQueue>,
    base_models: Arc<BaseModels>,
    scoring: PolicyScorer,
    cache: Arc<ReferenceCache>,
    starting: Option<Starting>,
    active: Option<Active>,
    training: Option<TrainingResources>,
}

/// Resources of a worker that runs training.
pub(super) struct TrainingResources {
    /// Maximum memory in bytes for a run.
    pub memory: u64,
    /// Further devices that compute a part of the run's rows.
    pub helpers: Arc<[ComputeDevice]>,
}

/// A run that waits for its unrounded base weights, which a separate thread reads.
///
/// Reading, hashing and converting a model's files takes seconds to minutes, and scoring must not
/// wait for it. Reading starts only when the run has been assigned to this worker, because a run in
/// the queue must not use memory.
struct Starting {
    run: TrainingRun,
    needs: Needs,
    reading: JoinHandle<Result<Result<ExactBases, EngineError>, String>>,
}

impl Starting {
    /// Returns true if the weights have been read or the run was told to stop.
    fn is_over(&self) -> bool {
        self.reading.is_finished() || stopped(&self.run.control).is_some()
    }
}

/// The run in progress.
struct Active {
    run: TrainingRun,
    trainer: Trainer,
}

impl Active {
    /// Returns the current policy and reference. Both stay consistent until the trainer takes its
    /// next step: it changes the policy's tensors in place and replaces a moving reference.
    fn live(&self) -> Live {
        let job = self.run.job.clone();
        let weights = match self.trainer.moves_reference() {
            true => Some(WeightsRef::LiveReference { job: job.clone() }),
            false => self.run.reference.clone(),
        };
        let reference =
            weights
                .zip(self.trainer.reference())
                .map(|(weights, (policy, identity))| LiveReference {
                    weights,
                    policy: Policy {
                        helpers: Arc::default(),
                        ..policy.clone()
                    },
                    identity: identity.to_owned(),
                });
        Live {
            job,
            policy: self.trainer.live_policy(),
            reference,
            step: self.trainer.step(),
        }
    }
}

impl Worker {
    /// Creates worker number `index`. Without `training` it takes no runs.
    pub fn new(
        index: usize,
        label: String,
        queue: Arc<ScoringQueue>,
        base_models: Arc<BaseModels>,
        cache: Arc<ReferenceCache>,
        options: &EngineOptions,
        training: Option<TrainingResources>,
    ) -> Self {
        let scoring = PolicyScorer::new(index, queue.clone(), base_models.clone(), options);
        Worker {
            index,
            label,
            queue,
            base_models,
            scoring,
            cache,
            starting: None,
            active: None,
            training,
        }
    }

    /// Limits the bytes of adapters, full weights, and keys and values in its cache.
    pub fn limit_policy_bytes(&mut self, room: Room) {
        self.scoring.policies.limit_bytes(room);
    }

    /// Works until the queue is drained or no engine handle is left.
    pub fn work(mut self) {
        loop {
            self.abort_if_gpu_is_lost();
            let free = self.update_memory_gauges();
            self.scoring.evict_requested();
            if self.starting.as_ref().is_some_and(Starting::is_over) {
                // Checked before scoring, because scoring requests may never stop coming.
                self.start_when_read();
            }
            let may_score = self.active.is_none() || self.scoring.fair_share.may_score();
            let own_job = self.active.as_ref().map(|active| active.run.job.as_str());
            if may_score && self.scoring.may_generate(own_job) {
                let live = self.active.as_ref().map(Active::live);
                self.scoring.generate(live.as_ref());
            }
            let run = self
                .active
                .as_ref()
                .map(|a| &a.run)
                .or(self.starting.as_ref().map(|s| &s.run));
            let job = run.map(|run| run.job.as_str());
            let training = self.training.as_ref();
            if training.is_some() {
                metrics::gauge!("bradley_device_training", "device" => self.label.clone())
                    .set(f64::from(u8::from(run.is_some())));
            }
            let (room, limit) = (
                training.map(|t| free.unwrap_or(t.memory)),
                training.map_or(0, |t| t.memory),
            );
            let seeker = Seeker {
                worker: self.index,
                job,
                room,
                limit,
                generating: self.scoring.generating(),
            };
            let may_score = self.active.is_none() || self.scoring.fair_share.may_score();
            match self
                .queue
                .next(seeker, may_score, self.scoring.batch_tokens)
            {
                Work::Score(batch) => self.scoring.score_batch(
                    batch,
                    &self.cache,
                    self.active.as_ref().map(Active::live).as_ref(),
                ),
                Work::Train if self.starting.is_some() => self.start_when_read(),
                Work::Train => self.train_unit(),
                Work::Begin(run, needs) => self.begin(*run, needs),
                Work::Evict | Work::Generate => {}
                Work::Stop => return,
            }
        }
    }

    /// Aborts the process if a GPU has failed permanently. This happens before the run is reported
    /// as failed: nothing can be computed in this process, but the next one continues the run from
    /// its checkpoint.
    fn abort_if_gpu_is_lost(&self) {
        let helpers = self.training.iter().flat_map(|t| t.helpers.iter());
        if std::iter::once(self.base_models.device())
            .chain(helpers)
            .any(ComputeDevice::is_lost)
        {
            tracing::error!(
                "the GPU failed for good: the process ends, so that another one can use it"
            );
            std::process::abort();
        }
    }

    /// Updates the memory gauges and returns the free bytes of the device; `None` on the CPU.
    fn update_memory_gauges(&self) -> Option<u64> {
        let device = self.base_models.device();
        let (free, total) = device.memory()?;
        metrics::gauge!("bradley_device_free_bytes", "device" => device.name()).set(free as f64);
        metrics::gauge!("bradley_device_memory_bytes", "device" => device.name()).set(total as f64);
        Some(free)
    }

    fn train_unit(&mut self) {
        let Some(active) = &mut self.active else {
            return;
        };
        match active.run.control.command() {
            RunCommand::Cancel => return self.end(RunEnd::Cancelled),
            RunCommand::Drain => return self.drain_run(),
            RunCommand::Run => {}
        }
        let start = Instant::now();
        let live = active.live();
        let events = active.run.events.clone();
        let (cache, trainer) = (&self.cache, &mut active.trainer);
        let was_shortened = trainer.is_shortened();
        let scoring = &mut self.scoring;
        let mut reports: Vec<Report> = Vec::new();
        scoring.fair_share.start(Instant::now());
        let status = guarded(|| {
            let mut yield_point = YieldPoint::new(scoring, cache, &live);
            let mut run_yield_point = || yield_point.run();
            let mut emit = |event: RunEvent| reports.push(event.into());
            trainer.advance(&mut RunContext {
                cache,
                yield_point: &mut run_yield_point,
                emit: &mut emit,
            })
        });
        drop(live);
        // The wait for a full channel, i.e. for the database, is no work of the device.
        let spent = start.elapsed().saturating_sub(scoring.fair_share.scored());
        // The unit may have updated the weights, so scoring must use the new ones. After a panic
        // the weights are not reliable, so no scoring happens; the events reported before the panic
        // are still sent.
        let live = status.is_ok().then(|| active.live());
        let mut yield_point = live
            .as_ref()
            .map(|live| YieldPoint::new(scoring, cache, live));
        for report in reports {
            offer(&events, report, || {
                if let Some(yield_point) = &mut yield_point {
                    yield_point.run();
                }
            });
        }
        drop(live);
        self.scoring.fair_share.stop(Instant::now());
        if !matches!(status, Ok(Ok(Status::Waiting))) {
            metrics::histogram!("bradley_training_unit_seconds", "device" => self.label.clone())
                .record(spent.as_secs_f64());
            let helpers = self.training.as_ref().map_or(0, |t| t.helpers.len());
            let devices = u32::try_from(1 + helpers).unwrap_or(u32::MAX);
            active
                .run
                .control
                .add_device_time(spent.saturating_mul(devices));
        }
        let ran_out_of_memory = active.trainer.is_shortened() && !was_shortened;
        self.abort_if_gpu_is_lost();
        if ran_out_of_memory {
            // The run repeats the step with shorter rows and can use the memory of cached weights
            // that are not in use.
            self.scoring.free_memory();
        }
        match status {
            Ok(Ok(Status::Working | Status::Waiting)) => {}
            Ok(Ok(Status::Finished)) => self.end(RunEnd::Succeeded),
            Ok(Err(e)) => self.end(RunEnd::Failed(explain(&e))),
            Err(panic) => self.end(RunEnd::Failed(internal(panic))),
        }
    }

    /// Starts a run immediately, or first has another thread read the unrounded base weights that
    /// it needs.
    fn begin(&mut self, run: TrainingRun, needs: Needs) {
        if let Some(end) = stopped(&run.control) {
            return self.end_before_start(&run, end);
        }
        self.scoring.reserve_for_run(needs.minimum);
        self.queue.request_fit_check();
        let models = run::models_to_read(&run, &self.base_models);
        if models.is_empty() {
            return self.start(run, needs, ExactBases::new());
        }
        let (base_models, control) = (self.base_models.clone(), run.control.clone());
        let reading = std::thread::Builder::new()
            .name("read-weights".into())
            .spawn(move || guarded(|| run::read_exact(&models, &base_models, &control)));
        match reading {
            Ok(reading) => {
                self.starting = Some(Starting {
                    run,
                    needs,
                    reading,
                })
            }
            Err(e) => self.end_before_start(
                &run,
                RunEnd::Failed(internal(format!("no thread can be started: {e}"))),
            ),
        }
    }

    /// Starts the waiting run if its weights have been read, or ends it.
    fn start_when_read(&mut self) {
        let Some(Starting {
            run,
            needs,
            reading,
        }) = self.starting.take()
        else {
            return;
        };
        if let Some(end) = stopped(&run.control) {
            // The reading thread also sees the request and stops at its next tensor.
            return self.end_before_start(&run, end);
        }
        if !reading.is_finished() {
            self.starting = Some(Starting {
                run,
                needs,
                reading,
            });
            return std::thread::sleep(READ_CHECK_INTERVAL);
        }
        let end = match reading.join() {
            Ok(Ok(Ok(read))) => return self.start(run, needs, read),
            Ok(Ok(Err(EngineError::FilesChanged(message)))) => RunEnd::InputMissing(JobError {
                reason: Reason::ModelFilesChanged.into(),
                message,
            }),
            Ok(Ok(Err(e))) => RunEnd::Failed(unavailable(&e)),
            Ok(Err(panic)) => RunEnd::Failed(internal(panic)),
            Err(_) => RunEnd::Failed(internal(
                "the thread that reads weights ended unexpectedly".into(),
            )),
        };
        self.end_before_start(&run, end);
    }

    /// Reports that a run has not started, and releases the memory reserved for it.
    fn end_before_start(&mut self, run: &TrainingRun, end: RunEnd) {
        self.scoring.policies.reserve_for_run(0);
        send(run, RunEvent::Ended(end));
    }

    fn start(&mut self, mut run: TrainingRun, needs: Needs, read: ExactBases) {
        let end = stopped(&run.control);
        let (base_models, policies) = (&self.base_models, &mut self.scoring.policies);
        // The queue gives runs only to workers with training resources.
        let Some(TrainingResources { memory, helpers }) = &self.training else {
            return;
        };
        let for_plan = needs.left_for_plan(*memory);
        let prepared = match end {
            Some(end) => Err(end),
            None => {
                match guarded(|| {
                    run::prepare(&mut run, base_models, read, policies, for_plan, helpers)
                }) {
                    Ok(Ok(trainer)) => Ok(trainer),
                    Ok(Err(e)) => Err(RunEnd::Failed(unavailable(&e))),
                    Err(panic) => Err(RunEnd::Failed(internal(panic))),
                }
            }
        };
        match prepared {
            Ok(trainer) => {
                self.scoring
                    .reserve_for_run(needs.extra + trainer.planned_bytes());
                self.queue.request_fit_check();
                tracing::info!(
                    job = run.job,
                    from_step = trainer.step(),
                    total_steps = trainer.total_steps(),
                    "run started"
                );
                send(
                    &run,
                    RunEvent::Running {
                        total_steps: trainer.total_steps(),
                        from_step: trainer.step(),
                    },
                );
                self.scoring.fair_share.reset();
                self.active = Some(Active { run, trainer });
            }
            Err(end) => self.end_before_start(&run, end),
        }
    }

    fn drain_run(&mut self) {
        let Some(active) = &mut self.active else {
            return;
        };
        let events = active.run.events.clone();
        let job = active.run.job.clone();
        let trainer = &mut active.trainer;
        let saved = guarded(|| trainer.save_now(&mut emitter(&events)));
        match saved {
            Ok(Ok(())) => {}
            Ok(Err(e)) if !self.queue.is_draining() => {
                // Nothing is urgent for a preempted or paused run: the steps are worth waiting for,
                // and a client who cannot wait may cancel.
                trainer.report_unsaved(&e, None, &mut emitter(&events));
                let live = active.live();
                YieldPoint::new(&mut self.scoring, &self.cache, &live).run();
                std::thread::sleep(SAVE_RETRY_DELAY);
                return;
            }
            // The job continues from its last complete checkpoint; only later steps are repeated.
            Ok(Err(e)) => {
                tracing::error!(job, error = %e, "a stopping run cannot write its checkpoint");
            }
            Err(panic) => {
                tracing::error!(job, panic, "a stopping run cannot write its checkpoint");
            }
        }
        self.end(RunEnd::Drained);
    }

    fn end(&mut self, end: RunEnd) {
        if let Some(active) = self.active.take() {
            tracing::info!(
                job = active.run.job,
                step = active.trainer.step(),
                end = ?end,
                "run ended"
            );
            // Free weights and optimizer state before reporting the end, so that the next run finds
            // the memory.
            let Active { run, trainer } = active;
            drop(trainer);
            self.scoring.policies.reserve_for_run(0);
            let helpers = self.training.iter().flat_map(|t| t.helpers.iter());
            std::iter::once(self.base_models.device())
                .chain(helpers)
                .for_each(|device| device.end_of_run(self.base_models.precision()));
            send(&run, RunEvent::Ended(end));
        }
    }
}

/// Sends an event and blocks while the channel is full. A closed channel means that the service no
/// longer handles the run, e.g. because the lease was lost; it then cancels the run through its
/// control.
fn send(run: &TrainingRun, event: RunEvent) {
    let _ = run.events.blocking_send(event.into());
}

/// Sends an event and lets scoring continue while the channel is full, because the store may be
/// unavailable for a long time.
fn offer(events: &Sender<Report>, mut report: Report, mut meanwhile: impl FnMut()) {
    while let Err(TrySendError::Full(back)) = events.try_send(report) {
        report = back;
        meanwhile();
        std::thread::sleep(CHANNEL_RETRY_DELAY);
    }
}

fn emitter(events: &Sender<Report>) -> impl FnMut(RunEvent) + '_ {
    |event| {
        let _ = events.blocking_send(event.into());
    }
}

/// Returns the end of a run that was told to stop before it started.
fn stopped(control: &RunControl) -> Option<RunEnd> {
    match control.command() {
        RunCommand::Cancel => Some(RunEnd::Cancelled),
        RunCommand::Drain => Some(RunEnd::Drained),
        RunCommand::Run => None,
    }
}

fn unavailable(e: &EngineError) -> JobError {
    let reason = match e {
        EngineError::OutOfMemory { .. } | EngineError::DeviceFull(_) => Reason::OutOfMemory,
        _ => Reason::WeightsUnavailable,
    };
    JobError {
        reason: reason.into(),
        message: e.to_string(),
    }
}

fn internal(message: String) -> JobError {
    JobError {
        reason: Reason::Internal.into(),
        message,
    }
}

/// Describes why a run failed, with a reason that clients can act on.
pub(super) fn explain(e: &TrainError) -> JobError {
    let reason = match e {
        e if e.is_out_of_memory() => Reason::OutOfMemory,
        TrainError::NonFinite { .. } => Reason::NonFiniteLoss,
        TrainError::LoggedDisagrees(_) => Reason::DatasetInvalid,
        TrainError::Checkpoint(_) => Reason::CheckpointFailed,
        TrainError::Tensor(_) | TrainError::NoPlan { .. } => Reason::DeviceFailed,
    };
    tracing::warn!(error = %e, "the run failed");
    JobError {
        reason: reason.into(),
        message: e.for_clients(),
    }
}

#[cfg(test)]
mod tests;
