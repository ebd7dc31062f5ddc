//! Carries one job after another from the queue to its end, and stores everything that a run reports before anyone hears of it.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;

use super::datasets::{blocking, unreadable};
use super::error::{Result, ServiceError};
use super::service::Service;
use super::store::now;
use crate::domain::dataset::{Dataset, RowIssue, Severity};
use crate::domain::job::{Checkpoint, Evaluation, EventKind, Job, JobError, JobState, RowPolicy};
use crate::engine::api::{Command, EngineError, RunControl, RunEnd, RunEvent, TrainingRun};
use crate::math::rng::split;
use crate::model::tokenizer::ChatTokenizer;
use crate::train::checkpoint;
use crate::train::encode::PairEncoder;
use crate::train::pair::EncodedPair;
use crate::train::validate::load_rows;

/// Events on their way from the device to the store.
const CHANNEL: usize = 64;
/// Skipped rows that a job lists in words.
const MAX_SKIPPED_LISTED: usize = 1000;
/// How long the runner waits after the store failed.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// Puts jobs that a stopped server left behind back in the queue, and brings checkpoint rows and folders into line.
pub(super) async fn recover(service: &Service) -> Result<()> {
    for job in service.inner.store.unfinished_jobs().await? {
        reconcile_checkpoints(service, &job).await?;
        let to = match job.state {
            JobState::Preparing | JobState::Running => JobState::Queued,
            JobState::Pausing => JobState::Paused,
            JobState::Cancelling => JobState::Cancelled,
            _ => continue,
        };
        let step = service.inner.store.checkpoints(&job.id).await?.last().map_or(0, |c| c.step);
        let reason = match to {
            JobState::Queued | JobState::Paused => format!("the server was restarted; continues from step {step}"),
            _ => "the server was restarted while the job was being cancelled".to_owned(),
        };
        change_state(service, &job.id, to, &reason).await?;
        tracing::info!(job = job.id, to = to.name(), step, "job recovered");
    }
    Ok(())
}

/// The row is what makes a checkpoint: it is stored after every event up to its step. A folder without one is what a crash cut short (or a
/// deletion did not finish) and goes; a row without its folder is dropped.
async fn reconcile_checkpoints(service: &Service, job: &Job) -> Result<()> {
    let folder = service.inner.artifacts.checkpoints(&job.id);
    let found = blocking(move || checkpoint::steps(&folder)).await?.map_err(ServiceError::internal)?;
    let known = service.inner.store.checkpoints(&job.id).await?;
    for row in &known {
        if !found.contains(&row.step) {
            tracing::warn!(job = job.id, step = row.step, "checkpoint folder is missing: its row is dropped");
            service.inner.store.delete_checkpoint(&job.id, row.step).await?;
        }
    }
    for step in found {
        if !known.iter().any(|row| row.step == step) {
            tracing::info!(job = job.id, step, "checkpoint was not acknowledged: its folder is removed");
            service.drop_checkpoint_files(&job.id, step).await?;
        }
    }
    Ok(())
}

/// Runs queued jobs, by priority and age, until the service drains.
pub(super) async fn run(service: Service) {
    let mut draining = service.inner.draining.subscribe();
    loop {
        if *draining.borrow() {
            return;
        }
        match service.inner.store.next_queued().await {
            Ok(Some(job)) => {
                let id = job.id.clone();
                if let Err(e) = run_job(&service, job).await {
                    tracing::error!(job = id, error = %e, "the job could not be carried on");
                    // The device may have finished; the store could not be told. Try to say so, then go on.
                    let error = JobError { reason: "INTERNAL".into(), message: e.to_string() };
                    if finish(&service, &id, RunEnd::Failed(error)).await.is_err() {
                        tokio::time::sleep(STORE_RETRY).await;
                    }
                }
            }
            Ok(None) => tokio::select! {
                () = service.inner.wake.notified() => {}
                _ = draining.wait_for(|d| *d) => return,
            },
            Err(e) => {
                tracing::error!(error = %e, "the queue cannot be read");
                tokio::time::sleep(STORE_RETRY).await;
            }
        }
    }
}

async fn run_job(service: &Service, job: Job) -> Result<()> {
    let control = Arc::new(RunControl::default());
    service.inner.controls.lock().unwrap_or_else(PoisonError::into_inner).insert(job.id.clone(), control.clone());
    // A drain that began just before the control was listed must not be missed.
    if service.is_draining() {
        control.drain();
    }
    let result = carry(service, &job, control.clone()).await;
    if result.is_err() {
        // Nobody listens to the run any more: the device must not go on with it.
        control.cancel();
    }
    service.inner.controls.lock().unwrap_or_else(PoisonError::into_inner).remove(&job.id);
    result
}

async fn carry(service: &Service, job: &Job, control: Arc<RunControl>) -> Result<()> {
    match change_state(service, &job.id, JobState::Preparing, "a device is free").await {
        Ok(()) => {}
        // Paused, cancelled or deleted between the look at the queue and now.
        Err(ServiceError::FailedPrecondition { .. } | ServiceError::NotFound { .. }) => return Ok(()),
        Err(e) => return Err(e),
    }
    let prepared = match prepare(service, job).await {
        Ok(prepared) => prepared,
        Err(e) => {
            let reason = match &e {
                ServiceError::FailedPrecondition { reason, .. } | ServiceError::ResourceExhausted { reason, .. } => *reason,
                ServiceError::InvalidArgument(_) => "DATASET_INVALID",
                ServiceError::NotFound { .. } => "NOT_FOUND",
                _ => "INTERNAL",
            };
            return finish(service, &job.id, RunEnd::Failed(JobError { reason: reason.into(), message: e.to_string() })).await;
        }
    };
    if !prepared.skipped.is_empty() {
        note_skipped(service, &job.id, &prepared.skipped).await?;
    }
    match control.command() {
        Command::Cancel => return finish(service, &job.id, RunEnd::Cancelled).await,
        Command::Drain => return finish(service, &job.id, RunEnd::Drained).await,
        Command::Run => {}
    }

    let (events, mut reported) = mpsc::channel(CHANNEL);
    let checkpoints = service.inner.artifacts.checkpoints(&job.id);
    let folder = checkpoints.clone();
    blocking(move || std::fs::create_dir_all(&folder).map_err(|e| super::artifacts::failed(&folder, e))).await??;
    let resume = service.inner.store.checkpoints(&job.id).await?.iter().rev().map(|c| c.step).collect();
    let run = TrainingRun {
        job: job.id.clone(),
        model: prepared.model,
        start: prepared.start,
        reference: prepared.reference,
        spec: job.request.spec.clone(),
        train: prepared.train,
        eval: prepared.eval,
        resume,
        checkpoints,
        events,
        control: control.clone(),
    };
    if let Err(e) = service.inner.engine.train(run) {
        let end = match &e {
            EngineError::Draining => RunEnd::Drained,
            EngineError::OutOfMemory { .. } => RunEnd::Failed(JobError { reason: "OUT_OF_MEMORY".into(), message: e.to_string() }),
            _ => RunEnd::Failed(JobError { reason: "INTERNAL".into(), message: e.to_string() }),
        };
        return finish(service, &job.id, end).await;
    }
    loop {
        let event = tokio::select! {
            event = reported.recv() => event,
            () = service.inner.wake.notified() => {
                if let Err(e) = make_room(service, job, &control).await {
                    // The run goes on; whoever waits is seen when it ends.
                    tracing::warn!(job = job.id, error = %e, "the queue cannot be read");
                }
                continue;
            }
        };
        match event {
            Some(RunEvent::Ended(end)) => return finish(service, &job.id, end).await,
            Some(event) => store_event(service, job, event).await?,
            None => break,
        }
    }
    let message = "the device worker ended without a word".to_owned();
    finish(service, &job.id, RunEnd::Failed(JobError { reason: "INTERNAL".into(), message })).await
}

/// Asks the run to go back to the queue when a job of a higher priority waits there.
async fn make_room(service: &Service, job: &Job, control: &RunControl) -> Result<()> {
    let Some(next) = service.inner.store.next_queued().await? else { return Ok(()) };
    // It may have been changed since the run began.
    let priority = service.inner.store.job(&job.id).await?.request.priority;
    if next.request.priority > priority {
        tracing::info!(job = job.id, next = next.id, "the job makes room for one of a higher priority");
        control.drain();
    }
    Ok(())
}

/// A job's data, ready for the device.
struct Prepared {
    model: String,
    start: crate::engine::api::WeightsRef,
    reference: Option<crate::engine::api::WeightsRef>,
    train: Vec<EncodedPair>,
    eval: Vec<EncodedPair>,
    skipped: Vec<RowIssue>,
}

async fn prepare(service: &Service, job: &Job) -> Result<Prepared> {
    let start = service.start_weights(job).await?;
    let reference = service.reference_weights(job).await?.map(|r| r.weights);
    let tokenizer = service.inner.engine.tokenizer(&start.model)?;
    let dataset = service.inner.store.dataset(&job.request.dataset).await?;
    let eval_dataset = match &job.request.evaluation {
        Evaluation::Dataset(id) => Some(service.inner.store.dataset(id).await?),
        _ => None,
    };
    let (inner, request) = (service.inner.clone(), job.request.clone());
    let (train, eval, skipped) = blocking(move || {
        let load = |d: &Dataset| encode_dataset(&inner.artifacts.dataset(&d.id), d, &tokenizer, &request);
        let (mut train, mut skipped) = load(&dataset)?;
        let mut eval = Vec::new();
        match (&request.evaluation, &eval_dataset) {
            (_, Some(d)) => {
                let (rows, more) = load(d)?;
                eval = rows;
                skipped.extend(more);
            }
            (Evaluation::Fraction(f), None) => {
                let (kept, held_out) = split(train.len(), *f, request.spec.seed.0);
                eval = held_out.into_iter().map(|i| train[i].clone()).collect();
                train = kept.into_iter().map(|i| train[i].clone()).collect();
            }
            _ => {}
        }
        Ok::<_, ServiceError>((train, eval, skipped))
    })
    .await??;
    if train.is_empty() {
        return Err(ServiceError::invalid("training_job.dataset", "no row is left to train on"));
    }
    Ok(Prepared { model: start.model, start: start.weights, reference, train, eval, skipped })
}

/// Tokenises a dataset under the job's row policy.
fn encode_dataset(
    path: &std::path::Path,
    dataset: &Dataset,
    tokenizer: &ChatTokenizer,
    request: &crate::domain::job::JobRequest,
) -> Result<(Vec<EncodedPair>, Vec<RowIssue>)> {
    let loaded = load_rows(path, dataset.format).map_err(|e| unreadable(&e))?;
    let encoder = PairEncoder::new(tokenizer, request.spec.batch.max_length, request.spec.batch.truncation);
    let mut issues: Vec<RowIssue> = loaded.report.issues.into_iter().filter(|i| i.reason.severity() == Severity::Error).collect();
    let mut pairs = Vec::with_capacity(loaded.rows.len());
    for row in &loaded.rows {
        match encoder.encode_row(row) {
            Ok(pair) => pairs.push(pair),
            Err(issue) => issues.push(issue),
        }
    }
    if request.row_policy == RowPolicy::Reject
        && let Some(first) = issues.first()
    {
        let message = format!(
            "datasets/{} has {} rows that cannot be used with max_length {}; row {}, {}: {}. Fix them, or set row_policy to SKIP",
            dataset.id,
            issues.len(),
            request.spec.batch.max_length,
            first.row,
            first.reason.name(),
            first.message
        );
        return Err(ServiceError::FailedPrecondition { reason: "DATASET_INVALID", message });
    }
    Ok((pairs, issues))
}

async fn note_skipped(service: &Service, job: &str, skipped: &[RowIssue]) -> Result<()> {
    let listed: Vec<String> =
        skipped.iter().take(MAX_SKIPPED_LISTED).map(|i| format!("row {}, {} {}: {}", i.row, i.field, i.reason.name(), i.message)).collect();
    let message = format!("{} rows are left out, see skipped_rows; the first: {}", skipped.len(), listed[0]);
    let event = EventKind::Log { severity: "warning".into(), message };
    let (_, sequence) = service
        .inner
        .store
        .change_job(job, move |j| {
            j.skipped_rows = listed;
            Ok(vec![event])
        })
        .await?;
    service.inner.feed.notify(job, sequence);
    Ok(())
}

/// Stores what a run reported, then tells the followers.
async fn store_event(service: &Service, job: &Job, event: RunEvent) -> Result<()> {
    let id = &job.id;
    let store = &service.inner.store;
    let (_, sequence) = match event {
        RunEvent::Running { total_steps, from_step } => {
            store
                .change_job(id, move |j| {
                    j.progress.total_steps = total_steps;
                    j.progress.step = from_step;
                    if j.state != JobState::Preparing {
                        return Ok(Vec::new()); // being cancelled
                    }
                    j.state = JobState::Running;
                    let reason = if from_step > 0 { format!("continues from step {from_step}") } else { "weights are loaded".into() };
                    Ok(vec![EventKind::StateChange { from: Some(JobState::Preparing), to: JobState::Running, reason }])
                })
                .await?
        }
        RunEvent::Step { progress, metrics } => {
            metrics::counter!("bradley_training_steps_total").increment(1);
            if let Some(loss) = metrics.get("loss") {
                metrics::gauge!("bradley_training_loss").set(*loss);
            }
            store
                .change_job(id, move |j| {
                    j.latest_metrics.extend(metrics.clone());
                    j.progress = progress.clone();
                    Ok(vec![EventKind::Step { step: progress.step, progress, metrics }])
                })
                .await?
        }
        RunEvent::Eval { step, metrics } => {
            store
                .change_job(id, move |j| {
                    j.latest_metrics.extend(metrics.clone());
                    Ok(vec![EventKind::Eval { step, metrics }])
                })
                .await?
        }
        RunEvent::Checkpoint { step, best, adapter, size_bytes, metrics } => {
            let checkpoint = Checkpoint { job: id.clone(), step, best, adapter, size_bytes, metrics, create_time: now() };
            let sequence = store.add_checkpoint(&checkpoint).await?;
            service.inner.feed.notify(id, sequence);
            return retain(service, job).await;
        }
        RunEvent::Damaged { step, reason } => {
            tracing::warn!(job = id, step, reason, "damaged checkpoint");
            store.delete_checkpoint(id, step).await?;
            service.drop_checkpoint_files(id, step).await?;
            let message = format!("checkpoint {step} is removed, the run continues from the one before: {reason}");
            store.change_job(id, move |_| Ok(vec![EventKind::Log { severity: "warning".into(), message }])).await?
        }
        RunEvent::Log { severity, message } => {
            store.change_job(id, move |_| Ok(vec![EventKind::Log { severity: severity.into(), message }])).await?
        }
        RunEvent::Ended(_) => return Ok(()),
    };
    service.inner.feed.notify(id, sequence);
    Ok(())
}

/// Keeps the newest checkpoints and the best one.
async fn retain(service: &Service, job: &Job) -> Result<()> {
    let all = service.inner.store.checkpoints(&job.id).await?;
    let surplus = all.len().saturating_sub(job.request.spec.run.save_total_limit);
    for old in all.iter().take(surplus).filter(|c| !c.best) {
        if service.refuse_when_used(&job.id, Some(old.step)).await.is_err() {
            continue; // another job starts from it or is measured against it
        }
        service.inner.store.delete_checkpoint(&job.id, old.step).await?;
        service.drop_checkpoint_files(&job.id, old.step).await?;
    }
    Ok(())
}

/// The last state change of a run.
async fn finish(service: &Service, id: &str, end: RunEnd) -> Result<()> {
    let draining = service.is_draining();
    let (_, sequence) = service
        .inner
        .store
        .change_job(id, move |job| {
            let from = job.state;
            let cancelling = from == JobState::Cancelling;
            let (to, reason) = match &end {
                RunEnd::Failed(e) => {
                    job.error = Some(e.clone());
                    (JobState::Failed, e.message.clone())
                }
                _ if cancelling => (JobState::Cancelled, "cancelled by a client".to_owned()),
                RunEnd::Succeeded => (JobState::Succeeded, "all steps are taken".to_owned()),
                RunEnd::Cancelled => (JobState::Cancelled, "cancelled by a client".to_owned()),
                RunEnd::Drained if from == JobState::Pausing => {
                    (JobState::Paused, format!("paused by a client; continues from step {}", job.progress.step))
                }
                RunEnd::Drained => {
                    let why = if draining { "the server is shutting down" } else { "makes room for a job of a higher priority" };
                    (JobState::Queued, format!("{why}; continues from step {}", job.progress.step))
                }
            };
            if from.is_final() {
                return Ok(Vec::new());
            }
            job.state = to;
            Ok(vec![EventKind::StateChange { from: Some(from), to, reason }])
        })
        .await?;
    service.inner.feed.notify(id, sequence);
    Ok(())
}

async fn change_state(service: &Service, id: &str, to: JobState, reason: &str) -> Result<()> {
    let (_, sequence) = service
        .inner
        .store
        .change_job(id, |job| {
            let from = job.state;
            job.state = to;
            if to == JobState::Preparing && job.start_time.is_none() {
                job.start_time = Some(now());
            }
            Ok(vec![EventKind::StateChange { from: Some(from), to, reason: reason.to_owned() }])
        })
        .await?;
    service.inner.feed.notify(id, sequence);
    Ok(())
}
