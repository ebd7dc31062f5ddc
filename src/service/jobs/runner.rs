//! Runs queued jobs to their end, several at one time if there are enough devices. Everything that
//! a run reports is stored before anyone is told of it.
//!
//! States of a leased job and the transitions between them. A change of state is stored with its
//! event in one transaction: by the run ([`LeasedJob::write`]), by a client's call, or by
//! [`Store::reclaim`] when the worker is gone.
//!
//! | from | to | when |
//! |---|---|---|
//! | Queued | Preparing | a runner claims it: it has the lease from here on |
//! | Preparing | Running | the device has loaded the weights |
//! | Preparing, Running | Pausing | a client asks; the run is told to write a checkpoint and stop |
//! | Preparing, Running, Pausing | Cancelling | a client asks; the run is told to stop |
//! | Preparing, Running | Queued | the run is drained or preempted |
//! | Preparing | Queued | an input is missing or has changed: the job is postponed |
//! | Preparing | Queued | too many runs wait for a device: the job is postponed |
//! | Pausing | Paused | the run is drained, or the job would be postponed |
//! | Preparing, Running, Pausing, Cancelling | Failed | the run failed, or an input is unusable |
//! | Cancelling | Cancelled | the run ended in any way but a failure |
//! | Running, Pausing | Succeeded | the run has taken all its steps, or early stopping ended it |
//! | Preparing, Running | Queued | the worker is gone |
//! | Preparing, Running | Failed | workers were lost repeatedly without progress (`WORKER_LOST`) |
//! | Pausing, Cancelling | Paused, Cancelled | the worker is gone |
//!
//! The last write of a run releases the lease. A run whose lease was lost can store nothing more.

use std::cmp::{Ordering, Reverse};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::{Context, KeyValue};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::Instrument as _;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::inputs::{InputLoader, JobInputs};
use super::leased_job::{LeasedJob, Preemption, retry_while_unavailable};
use super::registry::{RunRegistry, count_ended};
use super::resume::{CheckpointSource, check_pairs, newest_intact, progress};
use crate::domain::identity::Pins;
use crate::domain::job::{Checkpoint, EventKind, Job, JobError, JobState};
use crate::domain::logged::{LOGGED_REFERENCE, REFERENCE_COLUMNS};
use crate::domain::reason::Reason;
use crate::domain::usage::Usage;
use crate::domain::violation::counted;
use crate::engine::Engine;
use crate::engine::api::{EngineError, Report, RunCommand, RunEnd, RunEvent, TrainingRun};
use crate::service::artifacts::Artifacts;
use crate::service::blocking::blocking;
use crate::service::checkpoint_files::remove_checkpoint_files;
use crate::service::error::{Result, ServiceError};
use crate::service::events::EventFeed;
use crate::service::policies::PolicyResolver;
use crate::service::shutdown::Shutdown;
use crate::service::store::leases::{Lease, RunWriteEffect};
use crate::service::store::{Store, now};
use crate::service::usage::UsageMeter;
use crate::telemetry::trace;
use crate::train::checkpoint;
use crate::train::validate::BadRows;

/// Maximum number of events between the device and the store. When the channel is full, the run
/// waits.
const EVENT_CHANNEL_CAPACITY: usize = 64;
/// Delay after the queue could not be read.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// Time that other runners and replicas get to claim a queued job before this run is preempted for
/// it.
const PREEMPTION_DELAY: Duration = Duration::from_millis(500);

/// Result of [`JobRunner::should_preempt`].
enum Decision {
    Continue,
    /// A free runner is about to take the queued job; if it does not, a run is preempted.
    CheckAgain,
    Preempt(Preemption),
}

/// Runs jobs one after another.
#[derive(Clone)]
pub(in crate::service) struct JobRunner {
    pub store: Store,
    pub artifacts: Artifacts,
    pub engine: Engine,
    pub events: EventFeed,
    pub runs: RunRegistry,
    pub policies: PolicyResolver,
    pub inputs: InputLoader,
    pub shutdown: Shutdown,
    /// Time after which a running job is preempted if another job of the same priority is queued.
    pub time_slice: Duration,
    /// First pause of a job that is postponed, see the table above.
    pub postponement: Duration,
    /// Counts the device time of runs.
    pub usage: UsageMeter,
}

/// Everything a run needs before it can start on the device.
struct Loaded {
    inputs: JobInputs,
    /// Folder of the checkpoint to continue from; `None` starts from the beginning.
    resume: Option<PathBuf>,
}

impl JobRunner {
    /// Runs queued jobs, in the order of priority and waiting time, until the server drains.
    pub async fn run_until_drained(&self) {
        let (mut draining, mut woken) = (self.shutdown.subscribe(), self.runs.woken());
        loop {
            if *draining.borrow() {
                return;
            }
            let due = self.runs.next_due();
            match self.store.claim(&self.runs.passed_over()).await {
                Ok(Some((job, lease, sequence))) => {
                    self.events.notify(&job.id, sequence);
                    self.run_in_span(&job, lease).await;
                }
                Ok(None) => tokio::select! {
                    _ = woken.changed() => {}
                    () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)),
                        if due.is_some() => {}
                    _ = draining.wait_for(|d| *d) => return,
                },
                Err(e) => {
                    tracing::error!(error = %e, "the queue cannot be read");
                    tokio::time::sleep(STORE_RETRY).await;
                }
            }
        }
    }

    /// Runs a job in a span that belongs to the trace of the call that created the job.
    async fn run_in_span(&self, job: &Job, lease: Lease) {
        let caller = trace::parse(job.trace.as_deref());
        let span = tracing::info_span!(
            "training job",
            training_job = job.id,
            trace_id = trace::id(&caller)
        );
        // This fails only if no spans are exported.
        let _ = span.set_parent(caller);
        self.run_leased_job(job, lease).instrument(span).await;
    }

    /// Runs a leased job until it ends or is requeued, and stores the outcome. Every lease that a
    /// runner takes is released here.
    async fn run_leased_job(&self, job: &Job, lease: Lease) {
        let leased = Arc::new(LeasedJob::new(
            lease,
            self.store.clone(),
            self.events.clone(),
        ));
        self.runs.add(&leased);
        // A drain that began just before the job was added to the registry must not be missed.
        if self.shutdown.has_begun() {
            leased.control.drain();
        }
        let end = match self.run(job, &leased).await {
            Ok(RunEnd::InputMissing(e)) => {
                tracing::warn!(
                    job = job.id,
                    reason = e.reason.name(),
                    error = e.message,
                    "the job is requeued because an input is missing or has changed"
                );
                Ok(JobOutcome::Waits(e))
            }
            Ok(end) => Ok(JobOutcome::Run(end)),
            Err(ServiceError::Aborted { message, .. }) => Err(message),
            // The drain has timed out. Another worker reclaims the job when its lease has ended.
            Err(e) if self.store.is_closed() => Err(e.to_string()),
            Err(e) if may_succeed_later(&e) => {
                tracing::warn!(job = job.id, error = %e, "the job is requeued because it cannot \
                    begin yet");
                Ok(JobOutcome::Waits(failure(&e)))
            }
            Err(e) => {
                tracing::error!(job = job.id, error = %e, "the job failed");
                Ok(JobOutcome::Run(RunEnd::Failed(failure(&e))))
            }
        };
        // Nobody reads the run's events any more, so the device must stop working on it.
        leased.control.cancel();
        match &end {
            Ok(JobOutcome::Waits(_)) => self.runs.postpone(&job.id, self.postponement),
            _ => self.runs.forget_postponed(&job.id),
        }
        let stored = match end {
            Ok(end) => finish(&leased, &end).await.map_err(|e| e.to_string()),
            Err(lost) => Err(lost),
        };
        if let Err(e) = stored {
            tracing::warn!(
                job = job.id,
                error = e,
                "the end of the run could not be stored"
            );
        }
        self.runs.remove(&leased);
    }

    /// Runs a job until it ends or is told to stop.
    async fn run(&self, job: &Job, leased: &LeasedJob) -> Result<RunEnd> {
        let pinned = match &job.request.pins {
            Some(Pins {
                contents: Some(_), ..
            }) => job.clone(),
            _ => {
                let pinned = leased
                    .retry_until_stopped(|| self.pin_content(job, leased))
                    .await;
                if let Some(end) = stopped(leased.control.command()) {
                    return Ok(end);
                }
                pinned?
            }
        };
        let job = &pinned;
        let Loaded { inputs, resume } = match self.load_inputs(job, leased).await? {
            Ok(loaded) => loaded,
            Err(end) => return Ok(end),
        };
        let (events, reported) = mpsc::channel(EVENT_CHANNEL_CAPACITY);
        let run = TrainingRun {
            job: job.id.clone(),
            model: inputs.model,
            start: inputs.start,
            reference: inputs.reference,
            spec: job.request.spec.clone(),
            train: inputs.train,
            eval: inputs.eval,
            resume,
            checkpoints: self.artifacts.checkpoints(&job.id),
            events,
            control: leased.control.clone(),
        };
        if let Err(e) = self.engine.train(run) {
            if let EngineError::TooManyRuns { .. } = &e {
                return Err(e.into());
            }
            return Ok(match &e {
                EngineError::Draining => RunEnd::Drained,
                EngineError::OutOfMemory { .. } => RunEnd::Failed(JobError {
                    reason: Reason::OutOfMemory.into(),
                    message: e.to_string(),
                }),
                _ => RunEnd::Failed(JobError {
                    reason: Reason::Internal.into(),
                    message: e.to_string(),
                }),
            });
        }
        let ended = self.supervise(job, leased, reported).await;
        self.count_device_time(job, leased);
        ended
    }

    /// Counts the device time that a run has used since the last call.
    fn count_device_time(&self, job: &Job, leased: &LeasedJob) {
        let work = Usage {
            training_device_us: leased.control.take_device_us(),
            ..Usage::default()
        };
        if work != Usage::default() {
            self.usage.count(&job.owner, work);
        }
    }

    /// Loads the inputs of the run and finds the checkpoint to continue from. The inner `Err` is
    /// the end of a run that was told to stop meanwhile.
    async fn load_inputs(
        &self,
        job: &Job,
        leased: &LeasedJob,
    ) -> Result<std::result::Result<Loaded, RunEnd>> {
        let inputs = leased
            .retry_until_stopped(|| self.inputs.load(job))
            .instrument(tracing::info_span!("training.prepare"))
            .await;
        if let Some(end) = stopped(leased.control.command()) {
            return Ok(Err(end));
        }
        let mut inputs = inputs?;
        if inputs.skipped.rows() > 0 {
            log_skipped_rows(leased, &inputs.skipped).await?;
        }
        if inputs.unused_logged > 0 && job.progress.step == 0 {
            log_unused(leased, inputs.unused_logged).await?;
        }
        let source = CheckpointSource {
            store: &self.store,
            artifacts: &self.artifacts,
            engine: &self.engine,
        };
        let resume = leased
            .retry_until_stopped(|| newest_intact(source, leased))
            .await;
        if let Some(end) = stopped(leased.control.command()) {
            return Ok(Err(end));
        }
        let resume = resume?;
        if let Some(dir) = &resume {
            let state = leased
                .retry_until_stopped(|| progress(&self.artifacts, job, dir))
                .await;
            if let Some(end) = stopped(leased.control.command()) {
                return Ok(Err(end));
            }
            inputs = check_pairs(job, state?, inputs).await?;
        }
        Ok(Ok(Loaded { inputs, resume }))
    }

    /// Stores the events of the run until it ends, and preempts the run when another job must run
    /// instead.
    async fn supervise(
        &self,
        job: &Job,
        leased: &LeasedJob,
        mut reported: mpsc::Receiver<Report>,
    ) -> Result<RunEnd> {
        let slice = self.time_slice;
        let mut slices = tokio::time::interval_at(Instant::now() + slice, slice);
        // Other replicas and free devices get some time to claim a queued job before this run is
        // preempted for it.
        let others_may_claim = self.store.is_shared() || self.engine.concurrent_runs() > 1;
        let (delay, mut woken) = (
            if others_may_claim {
                PREEMPTION_DELAY
            } else {
                Duration::ZERO
            },
            self.runs.woken(),
        );
        // A job may have been queued while this one was being prepared.
        woken.mark_changed();
        let mut check_at: Option<Instant> = None;
        let (context, mut previous_event) = (trace::current(), std::time::Instant::now());
        loop {
            let slice_over = tokio::select! {
                report = reported.recv() => match report {
                    Some(Report { event: RunEvent::Ended(end), .. }) => return Ok(end),
                    Some(Report { made, event }) => {
                        if !matches!(event, RunEvent::Log { .. }) {
                            trace_stage(
                                &context,
                                &event,
                                made,
                                made - std::mem::replace(&mut previous_event, made),
                            );
                        }
                        self.count_device_time(job, leased);
                        self.persist_event(job, leased, event).await?;
                        metrics::histogram!("bradley_event_lag_seconds")
                            .record(made.elapsed().as_secs_f64());
                        continue;
                    }
                    None => break,
                },
                _ = woken.changed() => {
                    check_at.get_or_insert(Instant::now() + delay);
                    continue;
                }
                () = tokio::time::sleep_until(check_at.unwrap_or_else(Instant::now)),
                    if check_at.is_some() => false,
                _ = slices.tick() => true,
            };
            check_at = None;
            match self.should_preempt(leased, slice_over).await {
                Ok(Decision::Continue) => {}
                Ok(Decision::CheckAgain) => check_at = Some(Instant::now() + delay),
                Ok(Decision::Preempt(why)) => leased.preempt(why),
                // The run continues. A waiting job is found at the next check or when the run ends.
                Err(e) => tracing::warn!(job = job.id, error = %e, "the queue cannot be read"),
            }
        }
        let message = "the device worker ended without reporting a result".to_owned();
        Ok(RunEnd::Failed(JobError {
            reason: Reason::Internal.into(),
            message,
        }))
    }

    /// Decides to preempt the run if a job of a higher priority is queued, or one of the same
    /// priority and the time slice is over. If this process has several runs, only the one with the
    /// lowest priority is preempted for a higher priority; among equals, the newest. None is
    /// preempted while a runner of this process is free, because that one takes the queued job.
    async fn should_preempt(&self, leased: &LeasedJob, slice_over: bool) -> Result<Decision> {
        let Some(next) = self.store.next_queued(&self.runs.passed_over()).await? else {
            return Ok(Decision::Continue);
        };
        // The priority may have been changed since the run began.
        let job = self.store.job(&leased.lease.job).await?;
        let priority = job.request.priority;
        let preemption = match next.request.priority.cmp(&priority) {
            Ordering::Greater => Preemption::Priority,
            Ordering::Equal if slice_over => Preemption::TimeSlice,
            _ => return Ok(Decision::Continue),
        };
        let others = self.runs.others(&job.id);
        if others.len() + 1 < self.engine.concurrent_runs() {
            return Ok(Decision::CheckAgain);
        }
        if preemption == Preemption::Priority {
            for other in others {
                let other = self.store.job(&other).await?;
                if (other.request.priority, Reverse(other.create_time))
                    < (priority, Reverse(job.create_time))
                {
                    return Ok(Decision::Continue);
                }
            }
        }
        tracing::info!(
            job = leased.lease.job,
            next = next.id,
            ?preemption,
            "the job is preempted"
        );
        Ok(Decision::Preempt(preemption))
    }

    /// Pins the inputs of a job that an earlier version created without pins to their present
    /// content.
    async fn pin_content(&self, job: &Job, leased: &LeasedJob) -> Result<Job> {
        let model = self.policies.base_model(job).await?;
        let base = self.engine.identity(&model)?;
        let contents = self.policies.content_pins(&job.request).await?;
        let message = match job.request.pins {
            None => format!(
                "a version before 0.2 created the job without pins: it is pinned now to the served \
                 model {}",
                base.hash()
            ),
            Some(_) => format!(
                "an earlier version created the job without pins of its inputs: it is pinned now \
                 to the dataset {}, the policy {}, the reference {}",
                contents.dataset,
                contents.policy.as_deref().unwrap_or("(a base model)"),
                contents.reference.as_deref().unwrap_or("(a base model)"),
            ),
        };
        let pin = |j: &mut Job| {
            j.request.model.get_or_insert_with(|| model.clone());
            let pins = j.request.pins.get_or_insert_with(|| Pins {
                base: base.clone(),
                ..Pins::default()
            });
            pins.contents.get_or_insert_with(|| contents.clone());
            Ok(vec![EventKind::Log {
                severity: "warning".into(),
                message: message.clone(),
            }])
        };
        leased.write(pin, RunWriteEffect::Nothing).await
    }

    /// Stores an event of the run, then notifies the followers of the job.
    async fn persist_event(&self, job: &Job, leased: &LeasedJob, event: RunEvent) -> Result<()> {
        match event {
            RunEvent::Running {
                total_steps,
                from_step,
            } => {
                let running = move |j: &mut Job| {
                    j.progress.total_steps = total_steps;
                    j.progress.step = from_step;
                    if j.state != JobState::Preparing {
                        return Ok(Vec::new()); // pausing or cancelling
                    }
                    j.state = JobState::Running;
                    let reason = if from_step > 0 {
                        format!("continues from step {from_step}")
                    } else {
                        "weights are loaded".into()
                    };
                    Ok(vec![EventKind::StateChange {
                        from: Some(JobState::Preparing),
                        to: JobState::Running,
                        reason,
                    }])
                };
                leased.write(running, RunWriteEffect::Nothing).await?;
            }
            RunEvent::Step { progress, metrics } => {
                leased.set_gauges(&progress, &metrics);
                let step = |j: &mut Job| {
                    j.latest_metrics.extend(metrics.clone());
                    j.progress = progress.clone();
                    Ok(vec![EventKind::Step {
                        step: progress.step,
                        progress: progress.clone(),
                        metrics: metrics.clone(),
                    }])
                };
                leased.write(step, RunWriteEffect::Nothing).await?;
            }
            RunEvent::Eval { step, metrics } => {
                let eval = |j: &mut Job| {
                    j.latest_metrics.extend(metrics.clone());
                    Ok(vec![EventKind::Eval {
                        step,
                        metrics: metrics.clone(),
                    }])
                };
                leased.write(eval, RunWriteEffect::Nothing).await?;
            }
            RunEvent::Checkpoint {
                step,
                best,
                adapter,
                size_bytes,
                metrics,
            } => {
                let dir = self.artifacts.checkpoint(&job.id, step);
                let digest = blocking(move || checkpoint::digest(&dir))
                    .await?
                    .map_err(ServiceError::internal)?;
                let upload = || self.artifacts.upload_checkpoint(&job.id, step, &digest);
                let start = Instant::now();
                let uploaded = leased.retry_until_cancelled(upload).await;
                metrics::histogram!("bradley_checkpoint_seconds", "phase" => "keep")
                    .record(start.elapsed().as_secs_f64());
                if leased.control.command() == RunCommand::Cancel && uploaded.is_err() {
                    return Ok(()); // the job is cancelled: the checkpoint is not needed
                }
                uploaded?;
                let row = Checkpoint {
                    job: job.id.clone(),
                    step,
                    best,
                    adapter,
                    size_bytes,
                    metrics,
                    create_time: now(),
                    digest: digest.clone(),
                };
                leased
                    .write(
                        |_| Ok(vec![EventKind::CheckpointCreated { step, best }]),
                        RunWriteEffect::Add(&row),
                    )
                    .await?;
                self.delete_surplus_checkpoints(job, leased).await?;
            }
            RunEvent::CheckpointDelayed {
                step,
                reason,
                disk_full,
                limit,
            } => {
                let limit = limit.map_or_else(String::new, |limit| {
                    format!(", for {} minutes at most", limit.as_secs() / 60)
                });
                let message = format!(
                    "the checkpoint of step {step} cannot be written, the run waits until it can\
                     {limit}: {reason}"
                );
                let log = |_: &mut Job| {
                    Ok(vec![EventKind::Log {
                        severity: "warning".into(),
                        message: message.clone(),
                    }])
                };
                leased.write(log, RunWriteEffect::Nothing).await?;
                // The write of the next event, at the latest that of the checkpoint, ends this.
                leased.note_wait(Some(match disk_full {
                    true => Reason::StorageFull,
                    false => Reason::StorageUnavailable,
                }));
            }
            RunEvent::Log { severity, message } => {
                let log = |_: &mut Job| {
                    Ok(vec![EventKind::Log {
                        severity: severity.into(),
                        message: message.clone(),
                    }])
                };
                leased.write(log, RunWriteEffect::Nothing).await?;
            }
            RunEvent::Ended(_) => {}
        }
        Ok(())
    }

    /// Deletes old checkpoints beyond `save_total_limit`, except the best one.
    async fn delete_surplus_checkpoints(&self, job: &Job, leased: &LeasedJob) -> Result<()> {
        let all = retry_while_unavailable(|| self.store.checkpoints(&job.id)).await?;
        let surplus = all
            .len()
            .saturating_sub(job.request.spec.run.save_total_limit);
        for old in all.iter().take(surplus).filter(|c| !c.best) {
            match leased
                .write(|_| Ok(Vec::new()), RunWriteEffect::Retire(old.step))
                .await
            {
                Ok(_) => remove_checkpoint_files(&self.engine, &self.artifacts, old).await,
                // Another job starts from this checkpoint or uses it as its reference.
                Err(ServiceError::FailedPrecondition { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Outcome of a leased job.
enum JobOutcome {
    /// The run ended.
    Run(RunEnd),
    /// The job is requeued because an input is missing or has changed, or because too many runs
    /// wait for a device.
    Waits(JobError),
}

/// Returns true if a job could not start for a reason that may pass: missing files may be restored,
/// another version of the server or the right model may be started, and runs that wait may begin.
fn may_succeed_later(e: &ServiceError) -> bool {
    matches!(
        e,
        ServiceError::Unavailable {
            reason: Reason::QueueFull,
            ..
        } | ServiceError::FailedPrecondition {
            reason: Reason::ArtifactMissing
                | Reason::CheckpointFormat
                | Reason::DatasetChanged
                | Reason::ModelChanged
                | Reason::RowsChanged,
            ..
        }
    )
}

/// Converts an error of the service into the error that is stored with a failed job.
fn failure(e: &ServiceError) -> JobError {
    let reason = match e {
        ServiceError::FailedPrecondition { reason, .. }
        | ServiceError::ResourceExhausted { reason, .. }
        | ServiceError::Unavailable { reason, .. } => *reason,
        ServiceError::InvalidArgument(_) => Reason::DatasetInvalid,
        ServiceError::NotFound { .. } => Reason::NotFound,
        _ => Reason::Internal,
    };
    let message = match e {
        // As in answers to calls, only the operator may see paths and SQL statements.
        ServiceError::Internal { .. } => {
            "an internal error, which the server's log describes".to_owned()
        }
        e => e.to_string(),
    };
    JobError {
        reason: reason.into(),
        message,
    }
}

/// Returns the end of a run that was told to stop, or `None` if it should go on.
fn stopped(command: RunCommand) -> Option<RunEnd> {
    match command {
        RunCommand::Cancel => Some(RunEnd::Cancelled),
        RunCommand::Drain => Some(RunEnd::Drained),
        RunCommand::Run => None,
    }
}

/// Records the stage of the run that ended with `event`, i.e. the time since the previous event, as
/// a span.
fn trace_stage(context: &Context, event: &RunEvent, made: std::time::Instant, took: Duration) {
    let (name, about) = match event {
        RunEvent::Running { from_step, .. } => {
            ("training.load", vec![("from_step", *from_step as f64)])
        }
        RunEvent::Step { progress, metrics } => {
            let loss = metrics.get("loss").map(|loss| ("loss", *loss));
            (
                "training.steps",
                [Some(("step", progress.step as f64)), loss]
                    .into_iter()
                    .flatten()
                    .collect(),
            )
        }
        RunEvent::Eval { step, .. } => ("training.evaluate", vec![("step", *step as f64)]),
        RunEvent::Checkpoint {
            step, size_bytes, ..
        } => (
            "training.checkpoint",
            vec![("step", *step as f64), ("bytes", *size_bytes as f64)],
        ),
        RunEvent::CheckpointDelayed { .. } | RunEvent::Log { .. } | RunEvent::Ended(_) => return,
    };
    let about = about
        .into_iter()
        .map(|(key, value)| KeyValue::new(key, value))
        .collect();
    trace::record(
        name,
        context,
        SystemTime::now() - made.elapsed() - took,
        took,
        about,
    );
}

/// Logs that rows carry reference log-probs, but the job computes its own.
async fn log_unused(leased: &LeasedJob, rows: u64) -> Result<()> {
    let [chosen, rejected] = REFERENCE_COLUMNS;
    let message = format!(
        "{} {} {chosen} or {rejected}, which are not used: set reference to {LOGGED_REFERENCE} to \
         train on them without computing a reference",
        counted(rows, "row"),
        if rows == 1 { "has" } else { "have" }
    );
    let note = |_: &mut Job| {
        Ok(vec![EventKind::Log {
            severity: "info".into(),
            message: message.clone(),
        }])
    };
    leased
        .write(note, RunWriteEffect::Nothing)
        .await
        .map(|_| ())
}

async fn log_skipped_rows(leased: &LeasedJob, skipped: &BadRows) -> Result<()> {
    let listed = skipped.lines();
    let first = listed.first().map(String::as_str).unwrap_or_default();
    let message = format!(
        "{} {} left out, see skipped_rows; the first: {first}",
        counted(skipped.rows(), "row"),
        if skipped.rows() == 1 { "is" } else { "are" }
    );
    let note = |j: &mut Job| {
        // A resumed job has already logged the same rows.
        let known = j.skipped_rows == listed;
        j.skipped_rows.clone_from(&listed);
        Ok(if known {
            Vec::new()
        } else {
            vec![EventKind::Log {
                severity: "warning".into(),
                message: message.clone(),
            }]
        })
    };
    leased
        .write(note, RunWriteEffect::Nothing)
        .await
        .map(|_| ())
}

/// Stores the last change of state of a run and releases its lease.
async fn finish(leased: &LeasedJob, end: &JobOutcome) -> Result<()> {
    let preemption = leased.preemption();
    let change = move |job: &mut Job| {
        let from = job.state;
        let cancelling = from == JobState::Cancelling;
        let (to, reason) = match end {
            JobOutcome::Run(RunEnd::Failed(e)) => {
                job.error = Some(e.clone());
                (JobState::Failed, e.message.clone())
            }
            _ if cancelling => (JobState::Cancelled, "cancelled by a client".to_owned()),
            JobOutcome::Waits(e) | JobOutcome::Run(RunEnd::InputMissing(e)) => {
                job.error = Some(e.clone());
                let to = if from == JobState::Pausing {
                    JobState::Paused
                } else {
                    JobState::Queued
                };
                (to, format!("waits: {}", e.message))
            }
            JobOutcome::Run(RunEnd::Succeeded) => {
                (JobState::Succeeded, "the run is complete".to_owned())
            }
            JobOutcome::Run(RunEnd::Cancelled) => {
                (JobState::Cancelled, "cancelled by a client".to_owned())
            }
            JobOutcome::Run(RunEnd::Drained) if from == JobState::Pausing => (
                JobState::Paused,
                format!(
                    "paused by a client; continues from step {}",
                    job.progress.step
                ),
            ),
            JobOutcome::Run(RunEnd::Drained) => {
                let why = match preemption {
                    None => "the server is shutting down",
                    Some(Preemption::Priority) => "preempted by a job of a higher priority",
                    Some(Preemption::TimeSlice) => {
                        job.queued_since = now();
                        "its time slice is over"
                    }
                };
                (
                    JobState::Queued,
                    format!("{why}; continues from step {}", job.progress.step),
                )
            }
        };
        if from.is_final() {
            return Ok(Vec::new());
        }
        job.state = to;
        Ok(vec![EventKind::StateChange {
            from: Some(from),
            to,
            reason,
        }])
    };
    let job = leased.write(change, RunWriteEffect::Release).await?;
    if let JobOutcome::Waits(error) = end {
        metrics::counter!(
            "bradley_jobs_waiting_total",
            "reason" => error.reason.name().to_lowercase()
        )
        .increment(1);
    }
    if job.state.is_final() {
        count_ended(job.state);
    }
    Ok(())
}
