//! Runs jobs from the queue to their end, several at one time where there are devices for them, and
//! stores everything that a run reports before anyone hears of it.
//!
//! The states of a job under a lease, and what moves it on. A change of state is stored with its
//! event in one transaction: by the run ([`LeasedJob::write`]), by a client's call, or by
//! [`Store::reclaim`] when the worker is gone.
//!
//! | from | to | when |
//! |---|---|---|
//! | Queued | Preparing | a runner claims it: it has the lease from here on |
//! | Preparing | Running | the device has loaded the weights |
//! | Preparing, Running | Pausing | a client asks; the run is told to write a checkpoint and stop |
//! | Preparing, Running, Pausing | Cancelling | a client asks; the run is told to stop |
//! | Preparing, Running | Queued | the run is drained or preempted, or what it needs is not there: then it is postponed here |
//! | Pausing | Paused | the run is drained, or what it needs is not there |
//! | Preparing, Running, Pausing, Cancelling | Failed | the run failed, or an input cannot be used |
//! | Cancelling | Cancelled | the run ended in any way but a failure |
//! | Running, Pausing | Succeeded | the run has taken all its steps |
//! | Preparing, Running | Queued, Failed | the worker is gone; Failed (`WORKER_LOST`) when that happens again and again |
//! | Pausing, Cancelling | Paused, Cancelled | the worker is gone |
//!
//! The last write of a run gives the lease back. A run whose lease is another's stores nothing
//! more.

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
use super::leased_job::{LeasedJob, Preemption, patiently};
use super::registry::{RunRegistry, count_ended};
use super::resume::{CheckpointSource, check_pairs, newest_whole, progress};
use crate::domain::identity::Pins;
use crate::domain::job::{Checkpoint, EventKind, Job, JobError, JobState};
use crate::domain::reason::Reason;
use crate::engine::Engine;
use crate::engine::api::{EngineError, Report, RunCommand, RunEnd, RunEvent, TrainingRun};
use crate::service::artifacts::Artifacts;
use crate::service::blocking::blocking;
use crate::service::checkpoint_files::remove_checkpoint_files;
use crate::service::error::{Result, ServiceError};
use crate::service::events::EventFeed;
use crate::service::policies::PolicyResolver;
use crate::service::shutdown::Shutdown;
use crate::service::store::leases::{Also, Lease};
use crate::service::store::{Store, now};
use crate::telemetry::trace;
use crate::train::checkpoint;
use crate::train::validate::BadRows;

/// Events on their way from the device to the store.
const CHANNEL: usize = 64;
/// How long the runner waits after the store failed.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// What others get to take a queued job before a run makes room for it.
const PREEMPTION_DELAY: Duration = Duration::from_millis(500);

/// Runs jobs, one after another.
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
    /// How long a job may keep a device while others of its priority wait.
    pub time_slice: Duration,
    /// How long a job is left in the queue at first when what it needs is not there.
    pub postponement: Duration,
}

/// What a run begins with.
struct Loaded {
    inputs: JobInputs,
    /// The checkpoint to continue from.
    resume: Option<PathBuf>,
}

impl JobRunner {
    /// Runs queued jobs, by priority and age, until the server stops.
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
                    () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                    _ = draining.wait_for(|d| *d) => return,
                },
                Err(e) => {
                    tracing::error!(error = %e, "the queue cannot be read");
                    tokio::time::sleep(STORE_RETRY).await;
                }
            }
        }
    }

    /// Runs a job in a span of the trace in which it was made.
    async fn run_in_span(&self, job: &Job, lease: Lease) {
        let caller = trace::parse(job.trace.as_deref());
        let span = tracing::info_span!(
            "training job",
            training_job = job.id,
            trace_id = trace::id(&caller)
        );
        // It fails only where no spans are exported.
        let _ = span.set_parent(caller);
        self.run_leased_job(job, lease).instrument(span).await;
    }

    /// Runs a job until it ends or goes back to the queue, and stores how. This is the only way
    /// from a lease to its release.
    async fn run_leased_job(&self, job: &Job, lease: Lease) {
        let leased = Arc::new(LeasedJob::new(lease, self.store.clone(), self.events.clone()));
        self.runs.add(&leased);
        // A drain that began just before the job was listed must not be missed.
        if self.shutdown.has_begun() {
            leased.control.drain();
        }
        let end = match self.run(job, &leased).await {
            Ok(RunEnd::NotBegun(e)) => {
                tracing::warn!(
                    job = job.id,
                    reason = e.reason.name(),
                    error = e.message,
                    "the job is put back in the queue: what it needs is not there"
                );
                Ok(End::Waits(e))
            }
            Ok(end) => Ok(End::Run(end)),
            Err(ServiceError::Aborted { message, .. }) => Err(message),
            Err(e) if may_come(&e) => {
                tracing::warn!(job = job.id, error = %e, "the job is put back in the queue: what it needs is not there");
                Ok(End::Waits(failure(&e)))
            }
            Err(e) => {
                tracing::error!(job = job.id, error = %e, "the job could not be carried on");
                Ok(End::Run(RunEnd::Failed(failure(&e))))
            }
        };
        // Nobody listens to the run any more: the device must not go on with it.
        leased.control.cancel();
        match &end {
            Ok(End::Waits(_)) => self.runs.postpone(&job.id, self.postponement),
            _ => self.runs.forget_postponed(&job.id),
        }
        let told = match end {
            Ok(end) => finish(&leased, &end).await.map_err(|e| e.to_string()),
            Err(lost) => Err(lost),
        };
        if let Err(e) = told {
            tracing::warn!(job = job.id, error = e, "the run's end is not stored");
        }
        self.runs.remove(&leased);
    }

    /// Runs a job to its end, or to where it is told to stop.
    async fn run(&self, job: &Job, leased: &LeasedJob) -> Result<RunEnd> {
        let pinned = match &job.request.pins {
            Some(Pins { contents: Some(_), .. }) => job.clone(),
            _ => {
                let pinned = leased.while_wanted(|| self.pin_content(job, leased)).await;
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
        let (events, reported) = mpsc::channel(CHANNEL);
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
        self.supervise(job, leased, reported).await
    }

    /// Loads what the run needs: its inputs, and the checkpoint to continue from, if there is one.
    /// `Err` of the inner result is how a run ends that was told to stop meanwhile.
    async fn load_inputs(
        &self,
        job: &Job,
        leased: &LeasedJob,
    ) -> Result<std::result::Result<Loaded, RunEnd>> {
        let inputs = leased
            .while_wanted(|| self.inputs.load(job))
            .instrument(tracing::info_span!("training.prepare"))
            .await;
        if let Some(end) = stopped(leased.control.command()) {
            return Ok(Err(end));
        }
        let mut inputs = inputs?;
        if inputs.skipped.rows() > 0 {
            note_skipped(leased, &inputs.skipped).await?;
        }
        let source = CheckpointSource {
            store: &self.store,
            artifacts: &self.artifacts,
            engine: &self.engine,
        };
        let resume = leased.while_wanted(|| newest_whole(source, leased)).await;
        if let Some(end) = stopped(leased.control.command()) {
            return Ok(Err(end));
        }
        let resume = resume?;
        if let Some(dir) = &resume {
            let state = leased.while_wanted(|| progress(&self.artifacts, job, dir)).await;
            if let Some(end) = stopped(leased.control.command()) {
                return Ok(Err(end));
            }
            inputs = check_pairs(job, state?, inputs).await?;
        }
        Ok(Ok(Loaded { inputs, resume }))
    }

    /// Stores what the run reports until it ends, and preempts it when another job's turn comes.
    async fn supervise(
        &self,
        job: &Job,
        leased: &LeasedJob,
        mut reported: mpsc::Receiver<Report>,
    ) -> Result<RunEnd> {
        let slice = self.time_slice;
        let mut slices = tokio::time::interval_at(Instant::now() + slice, slice);
        // Other replicas and devices that are free are given the time to take a queued job before
        // this run makes room for it.
        let others = self.store.is_shared() || self.engine.concurrent_runs() > 1;
        let (delay, mut woken) =
            (if others { PREEMPTION_DELAY } else { Duration::ZERO }, self.runs.woken());
        // A job may have been queued while this one was prepared.
        woken.mark_changed();
        let mut look: Option<Instant> = None;
        let (context, mut stage) = (trace::current(), std::time::Instant::now());
        loop {
            let slice_over = tokio::select! {
                report = reported.recv() => match report {
                    Some(Report { event: RunEvent::Ended(end), .. }) => return Ok(end),
                    Some(Report { made, event }) => {
                        if !matches!(event, RunEvent::Log { .. }) {
                            trace_stage(&context, &event, made, made - std::mem::replace(&mut stage, made));
                        }
                        self.persist_event(job, leased, event).await?;
                        metrics::histogram!("bradley_event_lag_seconds").record(made.elapsed().as_secs_f64());
                        continue;
                    }
                    None => break,
                },
                _ = woken.changed() => {
                    look.get_or_insert(Instant::now() + delay);
                    continue;
                }
                () = tokio::time::sleep_until(look.unwrap_or_else(Instant::now)), if look.is_some() => false,
                _ = slices.tick() => true,
            };
            look = None;
            if let Err(e) = self.preempt_if_due(leased, slice_over).await {
                // The run goes on; whoever waits is seen when it ends.
                tracing::warn!(job = job.id, error = %e, "the queue cannot be read");
            }
        }
        let message = "the device worker ended without a word".to_owned();
        Ok(RunEnd::Failed(JobError { reason: Reason::Internal.into(), message }))
    }

    /// Sends the run back to the queue if [`JobRunner::should_preempt`] says so.
    async fn preempt_if_due(&self, leased: &LeasedJob, slice_over: bool) -> Result<()> {
        if let Some(preemption) = self.should_preempt(leased, slice_over).await? {
            leased.preempt(preemption);
        }
        Ok(())
    }

    /// Returns why the run should go back to the queue, if it should: a job of a higher priority
    /// waits there, or one of the same when the run's time slice is over. Of several runs in this
    /// process, one goes: of the lowest priority, the newest.
    async fn should_preempt(
        &self,
        leased: &LeasedJob,
        slice_over: bool,
    ) -> Result<Option<Preemption>> {
        let Some(next) = self.store.next_queued(&self.runs.passed_over()).await? else {
            return Ok(None);
        };
        // It may have been changed since the run began.
        let job = self.store.job(&leased.lease.job).await?;
        let priority = job.request.priority;
        let preemption = match next.request.priority.cmp(&priority) {
            Ordering::Greater => Preemption::Priority,
            Ordering::Equal if slice_over => Preemption::TimeSlice,
            _ => return Ok(None),
        };
        if preemption == Preemption::Priority {
            for other in self.runs.others(&job.id) {
                let other = self.store.job(&other).await?;
                if (other.request.priority, Reverse(other.create_time))
                    < (priority, Reverse(job.create_time))
                {
                    return Ok(None);
                }
            }
        }
        tracing::info!(
            job = leased.lease.job,
            next = next.id,
            ?preemption,
            "the job makes room for another"
        );
        Ok(Some(preemption))
    }

    /// Pins a job of an earlier version to what is there now: it depended on nothing in particular.
    async fn pin_content(&self, job: &Job, leased: &LeasedJob) -> Result<Job> {
        let model = self.policies.base_model(job).await?;
        let base = self.engine.identity(&model)?;
        let contents = self.policies.content_pins(&job.request).await?;
        let message = match job.request.pins {
            None => format!(
                "the job is from before version 0.2 and is pinned now to the model {} as it is served",
                base.hash()
            ),
            Some(_) => format!(
                "the job is from an earlier version and is pinned now to its inputs as they are: the dataset {}, the policy {}, the reference {}",
                contents.dataset,
                contents.policy.as_deref().unwrap_or("(a base model)"),
                contents.reference.as_deref().unwrap_or("(a base model)"),
            ),
        };
        let pin = |j: &mut Job| {
            j.request.model.get_or_insert_with(|| model.clone());
            let pins = j
                .request
                .pins
                .get_or_insert_with(|| Pins { base: base.clone(), ..Pins::default() });
            pins.contents.get_or_insert_with(|| contents.clone());
            Ok(vec![EventKind::Log { severity: "warning".into(), message: message.clone() }])
        };
        leased.write(pin, Also::Nothing).await
    }

    /// Stores what a run reported, then tells the followers.
    async fn persist_event(&self, job: &Job, leased: &LeasedJob, event: RunEvent) -> Result<()> {
        match event {
            RunEvent::Running { total_steps, from_step } => {
                let running = move |j: &mut Job| {
                    j.progress.total_steps = total_steps;
                    j.progress.step = from_step;
                    if j.state != JobState::Preparing {
                        return Ok(Vec::new()); // being cancelled
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
                leased.write(running, Also::Nothing).await?;
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
                leased.write(step, Also::Nothing).await?;
            }
            RunEvent::Eval { step, metrics } => {
                let eval = |j: &mut Job| {
                    j.latest_metrics.extend(metrics.clone());
                    Ok(vec![EventKind::Eval { step, metrics: metrics.clone() }])
                };
                leased.write(eval, Also::Nothing).await?;
            }
            RunEvent::Checkpoint { step, best, adapter, size_bytes, metrics } => {
                let dir = self.artifacts.checkpoint(&job.id, step);
                let digest = blocking(move || checkpoint::digest(&dir))
                    .await?
                    .map_err(ServiceError::internal)?;
                let upload = || self.artifacts.keep_checkpoint(&job.id, step, &digest);
                let start = Instant::now();
                let kept = leased.unless_cancelled(upload).await;
                metrics::histogram!("bradley_checkpoint_seconds", "phase" => "keep")
                    .record(start.elapsed().as_secs_f64());
                if leased.control.command() == RunCommand::Cancel && kept.is_err() {
                    return Ok(()); // nobody wants it
                }
                kept?;
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
                        Also::Add(&row),
                    )
                    .await?;
                self.retain(job, leased).await?;
            }
            RunEvent::Log { severity, message } => {
                let log = |_: &mut Job| {
                    Ok(vec![EventKind::Log { severity: severity.into(), message: message.clone() }])
                };
                leased.write(log, Also::Nothing).await?;
            }
            RunEvent::Ended(_) => {}
        }
        Ok(())
    }

    /// Keeps the newest checkpoints and the best one.
    async fn retain(&self, job: &Job, leased: &LeasedJob) -> Result<()> {
        let all = patiently(|| self.store.checkpoints(&job.id)).await?;
        let surplus = all.len().saturating_sub(job.request.spec.run.save_total_limit);
        for old in all.iter().take(surplus).filter(|c| !c.best) {
            match leased.write(|_| Ok(Vec::new()), Also::Retire(old.step)).await {
                Ok(_) => remove_checkpoint_files(&self.engine, &self.artifacts, old).await,
                // Another job starts from it or is measured against it.
                Err(ServiceError::FailedPrecondition { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// How a job leaves this process.
enum End {
    /// Its run ended.
    Run(RunEnd),
    /// It goes back to the queue, because what it needs is not there.
    Waits(JobError),
}

/// Whether a job could not begin for something that may come: objects that are restored, another
/// version of the server, the right model.
fn may_come(e: &ServiceError) -> bool {
    matches!(
        e,
        ServiceError::FailedPrecondition {
            reason: Reason::ArtifactMissing
                | Reason::CheckpointFormat
                | Reason::DatasetChanged
                | Reason::ModelChanged
                | Reason::RowsChanged,
            ..
        }
    )
}

/// Why a job fails by what its server could not do.
fn failure(e: &ServiceError) -> JobError {
    let reason = match e {
        ServiceError::FailedPrecondition { reason, .. }
        | ServiceError::ResourceExhausted { reason, .. } => *reason,
        ServiceError::InvalidArgument(_) => Reason::DatasetInvalid,
        ServiceError::NotFound { .. } => Reason::NotFound,
        _ => Reason::Internal,
    };
    let message = match e {
        // As in an answer: paths and statements are the operator's to read.
        ServiceError::Internal { .. } => {
            "an internal error, which the server's log describes".to_owned()
        }
        e => e.to_string(),
    };
    JobError { reason: reason.into(), message }
}

/// How a run ends that was told to stop.
fn stopped(command: RunCommand) -> Option<RunEnd> {
    match command {
        RunCommand::Cancel => Some(RunEnd::Cancelled),
        RunCommand::Drain => Some(RunEnd::Drained),
        RunCommand::Run => None,
    }
}

/// What the device did since the event before, as a span.
fn trace_stage(context: &Context, event: &RunEvent, made: std::time::Instant, took: Duration) {
    let (name, about) = match event {
        RunEvent::Running { from_step, .. } => {
            ("training.load", vec![("from_step", *from_step as f64)])
        }
        RunEvent::Step { progress, metrics } => {
            let loss = metrics.get("loss").map(|loss| ("loss", *loss));
            (
                "training.steps",
                [Some(("step", progress.step as f64)), loss].into_iter().flatten().collect(),
            )
        }
        RunEvent::Eval { step, .. } => ("training.evaluate", vec![("step", *step as f64)]),
        RunEvent::Checkpoint { step, size_bytes, .. } => {
            ("training.checkpoint", vec![("step", *step as f64), ("bytes", *size_bytes as f64)])
        }
        RunEvent::Log { .. } | RunEvent::Ended(_) => return,
    };
    let about = about.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect();
    trace::record(name, context, SystemTime::now() - made.elapsed() - took, took, about);
}

async fn note_skipped(leased: &LeasedJob, skipped: &BadRows) -> Result<()> {
    let listed = skipped.lines();
    let first = listed.first().map(String::as_str).unwrap_or_default();
    let message =
        format!("{} rows are left out, see skipped_rows; the first: {first}", skipped.rows());
    let note = |j: &mut Job| {
        // A job that is continued has told of them.
        let known = j.skipped_rows == listed;
        j.skipped_rows.clone_from(&listed);
        Ok(if known {
            Vec::new()
        } else {
            vec![EventKind::Log { severity: "warning".into(), message: message.clone() }]
        })
    };
    leased.write(note, Also::Nothing).await.map(|_| ())
}

/// The last state change of a run; the lease is given back with it.
async fn finish(leased: &LeasedJob, end: &End) -> Result<()> {
    let preemption = leased.preemption();
    let change = move |job: &mut Job| {
        let from = job.state;
        let cancelling = from == JobState::Cancelling;
        let (to, reason) = match end {
            End::Run(RunEnd::Failed(e)) => {
                job.error = Some(e.clone());
                (JobState::Failed, e.message.clone())
            }
            _ if cancelling => (JobState::Cancelled, "cancelled by a client".to_owned()),
            End::Waits(e) | End::Run(RunEnd::NotBegun(e)) => {
                job.error = Some(e.clone());
                let to =
                    if from == JobState::Pausing { JobState::Paused } else { JobState::Queued };
                (to, format!("waits: {}", e.message))
            }
            End::Run(RunEnd::Succeeded) => (JobState::Succeeded, "all steps are taken".to_owned()),
            End::Run(RunEnd::Cancelled) => {
                (JobState::Cancelled, "cancelled by a client".to_owned())
            }
            End::Run(RunEnd::Drained) if from == JobState::Pausing => (
                JobState::Paused,
                format!("paused by a client; continues from step {}", job.progress.step),
            ),
            End::Run(RunEnd::Drained) => {
                let why = match preemption {
                    None => "the server is shutting down",
                    Some(Preemption::Priority) => "makes room for a job of a higher priority",
                    Some(Preemption::TimeSlice) => {
                        job.turn = now();
                        "its time slice is over"
                    }
                };
                (JobState::Queued, format!("{why}; continues from step {}", job.progress.step))
            }
        };
        if from.is_final() {
            return Ok(Vec::new());
        }
        job.state = to;
        Ok(vec![EventKind::StateChange { from: Some(from), to, reason }])
    };
    let job = leased.write(change, Also::Release).await?;
    if let End::Waits(error) = end {
        metrics::counter!("bradley_jobs_waiting_total", "reason" => error.reason.name().to_lowercase()).increment(1);
    }
    if job.state.is_final() {
        count_ended(job.state);
    }
    Ok(())
}
