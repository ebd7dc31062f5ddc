//! Carries one job after another from the queue to its end, several at one time where there are devices for them, and stores everything that a run reports before anyone hears of it.

use std::cmp::{Ordering, Reverse};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use jiff::civil::DateTime;
use opentelemetry::{Context, KeyValue};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::Instrument as _;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::blocking::blocking;
use super::error::{Result, ServiceError, unreadable};
use super::held::{Held, Room, patiently};
use super::housekeeping::job_ended;
use super::resume::{check_pairs, newest_whole};
use super::service::Service;
use super::store::leases::{Also, Lease};
use super::store::now;
use crate::domain::dataset::{Dataset, PreferenceRow};
use crate::domain::identity::Pins;
use crate::domain::job::{Checkpoint, Evaluation, EventKind, Job, JobError, JobState, RowPolicy};
use crate::domain::message::TemplateArguments;
use crate::domain::reason::Reason;
use crate::engine::api::{Command, EngineError, Report, RunEnd, RunEvent, TrainingRun};
use crate::engine::trace;
use crate::model::tokenizer::ChatTokenizer;
use crate::train::checkpoint;
use crate::train::encode::PairEncoder;
use crate::train::pair::{EncodedPair, digest, split_rows};
use crate::train::validate::{BadRows, load_rows};

/// Events on their way from the device to the store.
const CHANNEL: usize = 64;
/// How long the runner waits after the store failed.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// What others get to take a queued job before a run makes room for it.
const COURTESY: Duration = Duration::from_millis(500);

/// Runs queued jobs, by priority and age, until the service drains.
pub(super) async fn run(service: Service) {
    let (mut draining, mut woken) = (service.inner.draining.subscribe(), service.inner.woken());
    loop {
        if *draining.borrow() {
            return;
        }
        let due = service.inner.postponed.next_due();
        match service.inner.store.claim(&service.inner.passed_over()).await {
            Ok(Some((job, lease, sequence))) => {
                service.inner.feed.notify(&job.id, sequence);
                run_job(&service, &job, lease).await;
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

/// Carries a job in a span of the trace in which it was made.
async fn run_job(service: &Service, job: &Job, lease: Lease) {
    let caller = trace::parse(job.trace.as_deref());
    let span = tracing::info_span!("training job", training_job = job.id, trace_id = trace::id(&caller));
    // It fails only where no spans are exported.
    let _ = span.set_parent(caller);
    carry_on(service, job, lease).instrument(span).await;
}

async fn carry_on(service: &Service, job: &Job, lease: Lease) {
    let held = Arc::new(Held::new(lease));
    service.inner.held.lock().unwrap_or_else(PoisonError::into_inner).insert(job.id.clone(), held.clone());
    // A drain that began just before the job was listed must not be missed.
    if service.is_draining() {
        held.control.drain();
    }
    let end = match carry(service, job, &held).await {
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
    held.control.cancel();
    match &end {
        Ok(End::Waits(_)) => service.inner.postponed.postpone(&job.id, service.inner.options.lease),
        _ => service.inner.postponed.forget(&job.id),
    }
    let told = match end {
        Ok(end) => finish(service, &held, &end).await.map_err(|e| e.to_string()),
        Err(lost) => Err(lost),
    };
    if let Err(e) = told {
        tracing::warn!(job = job.id, error = e, "the run's end is not stored");
    }
    service.inner.let_go(&held);
}

/// How a job leaves this process.
enum End {
    /// Its run ended.
    Run(RunEnd),
    /// It goes back to the queue, because what it needs is not there.
    Waits(JobError),
}

/// Whether a job could not begin for something that may come: objects that are restored, another version of the server, the right model.
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
        ServiceError::FailedPrecondition { reason, .. } | ServiceError::ResourceExhausted { reason, .. } => *reason,
        ServiceError::InvalidArgument(_) => Reason::DatasetInvalid,
        ServiceError::NotFound { .. } => Reason::NotFound,
        _ => Reason::Internal,
    };
    let message = match e {
        // As in an answer: paths and statements are the operator's to read.
        ServiceError::Internal { .. } => "an internal error, which the server's log describes".to_owned(),
        e => e.to_string(),
    };
    JobError { reason: reason.into(), message }
}

/// How a run ends that was told to stop.
fn stopped(command: Command) -> Option<RunEnd> {
    match command {
        Command::Cancel => Some(RunEnd::Cancelled),
        Command::Drain => Some(RunEnd::Drained),
        Command::Run => None,
    }
}

/// Pins a job of an earlier version to what is there now: it depended on nothing in particular.
async fn pin_content(service: &Service, job: &Job, held: &Held) -> Result<Job> {
    let model = service.base_model(job).await?;
    let base = service.inner.engine.identity(&model)?;
    let contents = service.content_pins(&job.request).await?;
    let message = match job.request.pins {
        None => format!("the job is from before version 0.2 and is pinned now to the model {} as it is served", base.hash()),
        Some(_) => format!(
            "the job is from an earlier version and is pinned now to its inputs as they are: the dataset {}, the policy {}, the reference {}",
            contents.dataset,
            contents.policy.as_deref().unwrap_or("(a base model)"),
            contents.reference.as_deref().unwrap_or("(a base model)"),
        ),
    };
    let pin = |j: &mut Job| {
        j.request.model.get_or_insert_with(|| model.clone());
        let pins = j.request.pins.get_or_insert_with(|| Pins { base: base.clone(), ..Pins::default() });
        pins.contents.get_or_insert_with(|| contents.clone());
        Ok(vec![EventKind::Log { severity: "warning".into(), message: message.clone() }])
    };
    held.write(service, pin, Also::Nothing).await
}

/// Carries a job to its end, or to where it is told to stop.
async fn carry(service: &Service, job: &Job, held: &Arc<Held>) -> Result<RunEnd> {
    let pinned = match &job.request.pins {
        Some(Pins { contents: Some(_), .. }) => job.clone(),
        _ => {
            let pinned = held.while_wanted(|| pin_content(service, job, held)).await;
            if let Some(end) = stopped(held.control.command()) {
                return Ok(end);
            }
            pinned?
        }
    };
    let job = &pinned;
    let prepared = held.while_wanted(|| prepare(service, job)).instrument(tracing::info_span!("training.prepare")).await;
    if let Some(end) = stopped(held.control.command()) {
        return Ok(end);
    }
    let mut prepared = prepared?;
    if prepared.skipped.rows() > 0 {
        note_skipped(service, held, &prepared.skipped).await?;
    }
    let checkpoints = service.inner.artifacts.checkpoints(&job.id);
    let resume = held.while_wanted(|| newest_whole(service, held)).await;
    if let Some(end) = stopped(held.control.command()) {
        return Ok(end);
    }
    let resume = resume?;
    if let Some(dir) = &resume {
        prepared = check_pairs(service, job, dir, prepared).await?;
    }
    let (events, mut reported) = mpsc::channel(CHANNEL);
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
        control: held.control.clone(),
    };
    if let Err(e) = service.inner.engine.train(run) {
        return Ok(match &e {
            EngineError::Draining => RunEnd::Drained,
            EngineError::OutOfMemory { .. } => RunEnd::Failed(JobError { reason: Reason::OutOfMemory.into(), message: e.to_string() }),
            _ => RunEnd::Failed(JobError { reason: Reason::Internal.into(), message: e.to_string() }),
        });
    }
    let slice = service.inner.options.time_slice;
    let mut slices = tokio::time::interval_at(Instant::now() + slice, slice);
    // Other replicas and devices that are free are given the time to take a queued job before this run makes room for it.
    let others = service.inner.store.is_shared() || service.inner.engine.concurrent_runs() > 1;
    let (courtesy, mut woken) = (if others { COURTESY } else { Duration::ZERO }, service.inner.woken());
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
                    store_event(service, job, held, event).await?;
                    metrics::histogram!("bradley_event_lag_seconds").record(made.elapsed().as_secs_f64());
                    continue;
                }
                None => break,
            },
            _ = woken.changed() => {
                look.get_or_insert(Instant::now() + courtesy);
                continue;
            }
            () = tokio::time::sleep_until(look.unwrap_or_else(Instant::now)), if look.is_some() => false,
            _ = slices.tick() => true,
        };
        look = None;
        if let Err(e) = make_room(service, held, slice_over).await {
            // The run goes on; whoever waits is seen when it ends.
            tracing::warn!(job = job.id, error = %e, "the queue cannot be read");
        }
    }
    let message = "the device worker ended without a word".to_owned();
    Ok(RunEnd::Failed(JobError { reason: Reason::Internal.into(), message }))
}

/// What the device did since the event before, as a span.
fn trace_stage(context: &Context, event: &RunEvent, made: std::time::Instant, took: Duration) {
    let (name, about) = match event {
        RunEvent::Running { from_step, .. } => ("training.load", vec![("from_step", *from_step as f64)]),
        RunEvent::Step { progress, metrics } => {
            let loss = metrics.get("loss").map(|loss| ("loss", *loss));
            ("training.steps", [Some(("step", progress.step as f64)), loss].into_iter().flatten().collect())
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

/// Asks the run to go back to the queue when a job of a higher priority waits there, or one of the same when the run's time slice is over. Of several runs
/// in this process, one goes: of the lowest priority, the newest.
async fn make_room(service: &Service, held: &Held, slice_over: bool) -> Result<()> {
    let Some(next) = service.inner.store.next_queued(&service.inner.passed_over()).await? else { return Ok(()) };
    // It may have been changed since the run began.
    let job = service.inner.store.job(&held.lease.job).await?;
    let priority = job.request.priority;
    let room = match next.request.priority.cmp(&priority) {
        Ordering::Greater => Room::Priority,
        Ordering::Equal if slice_over => Room::Slice,
        _ => return Ok(()),
    };
    if room == Room::Priority {
        for other in service.inner.others(&job.id) {
            let other = service.inner.store.job(&other).await?;
            if (other.request.priority, Reverse(other.create_time)) < (priority, Reverse(job.create_time)) {
                return Ok(());
            }
        }
    }
    tracing::info!(job = held.lease.job, next = next.id, ?room, "the job makes room for another");
    held.make_room(room);
    Ok(())
}

/// A job's data, ready for the device.
pub(super) struct Prepared {
    pub model: String,
    start: crate::engine::api::WeightsRef,
    pub reference: Option<crate::engine::api::WeightsRef>,
    pub train: Vec<EncodedPair>,
    pub eval: Vec<EncodedPair>,
    /// The digest of both lists of pairs.
    pub digest: String,
    /// What version 0.2.0 did not use of the rows, where there is any.
    pub new_since_0_2_0: Option<String>,
    pub skipped: BadRows,
}

pub(super) async fn prepare(service: &Service, job: &Job) -> Result<Prepared> {
    let start = service.start_weights(job).await?;
    let reference = service.reference_weights(job).await?.map(|r| r.weights);
    let tokenizer = service.inner.engine.tokenizer(&start.model)?;
    let dataset = service.inner.store.dataset(&job.request.dataset).await?;
    let eval_dataset = match &job.request.evaluation {
        Evaluation::Dataset(id) => Some(service.inner.store.dataset(id).await?),
        _ => None,
    };
    let (artifacts, pinned) = (&service.inner.artifacts, job.request.pins.as_ref().and_then(|pins| pins.contents.as_ref()));
    let expected = pinned.map_or(&dataset.content_hash, |contents| &contents.dataset);
    let file = artifacts.fetch_dataset(&dataset, expected).await?;
    let eval_file = match eval_dataset {
        Some(d) => {
            let expected = pinned.and_then(|contents| contents.eval_dataset.as_ref()).unwrap_or(&d.content_hash);
            let path = artifacts.fetch_dataset(&d, expected).await?;
            Some((d, path))
        }
        None => None,
    };
    let request = job.request.clone();
    let context = RowContext {
        tokenizer,
        arguments: job.template_arguments(),
        date: service.template_date(Some(job)),
        vocab_size: service.model(&start.model)?.vocab_size,
    };
    let (train, eval, digest, new_since_0_2_0, skipped) = blocking(move || {
        let Encoded { pairs: mut train, bad: mut skipped, mut new_since_0_2_0 } = encode_dataset(&file, &dataset, &context, &request)?;
        let mut eval = Vec::new();
        match (&request.evaluation, &eval_file) {
            (_, Some((d, path))) => {
                let more = encode_dataset(path, d, &context, &request)?;
                eval = more.pairs;
                skipped.extend(more.bad);
                new_since_0_2_0 = new_since_0_2_0.or(more.new_since_0_2_0);
            }
            (Evaluation::Fraction(f), None) => {
                (train, eval) = split_rows(&train, *f, request.spec.seed.0);
            }
            _ => {}
        }
        let digest = digest(&train, &eval);
        Ok::<_, ServiceError>((train, eval, digest, new_since_0_2_0, skipped))
    })
    .await??;
    if train.is_empty() {
        return Err(ServiceError::invalid("training_job.dataset", "no row is left to train on"));
    }
    Ok(Prepared { model: start.model, start: start.weights, reference, train, eval, digest, new_since_0_2_0, skipped })
}

/// What a job's rows are tokenised with.
struct RowContext {
    tokenizer: Arc<ChatTokenizer>,
    arguments: TemplateArguments,
    date: DateTime,
    vocab_size: usize,
}

/// The pairs of a dataset.
struct Encoded {
    pairs: Vec<EncodedPair>,
    /// Rows that are left out.
    bad: BadRows,
    /// What version 0.2.0 did not use of the first row that has any such thing.
    new_since_0_2_0: Option<String>,
}

/// Tokenises a dataset under the job's row policy.
fn encode_dataset(
    path: &std::path::Path,
    dataset: &Dataset,
    context: &RowContext,
    request: &crate::domain::job::JobRequest,
) -> Result<Encoded> {
    let loaded = load_rows(path, dataset.format).map_err(|e| unreadable(&e))?;
    // Decoding has limits, and a job must not train on the part before one that uploading did not meet.
    let (now, uploaded) = (loaded.report.rows, dataset.report.rows);
    if now != uploaded {
        let message = format!("datasets/{} has {now} rows that can be read now, {uploaded} at its upload: upload it again", dataset.id);
        return Err(ServiceError::FailedPrecondition { reason: Reason::DatasetInvalid, message });
    }
    if request.spec.dpo.compares_pairs()
        && let Some(row) = loaded.rows.iter().find(|row| row.weight != 1.0)
    {
        let message = format!(
            "row {} of datasets/{} has the weight {}, but aot and aot_unpaired compare sorted log-ratios across pairs and cannot weigh them: remove \
             the weights (a row with several rejected answers has its weight divided among them), or choose another loss",
            row.row, dataset.id, row.weight
        );
        return Err(ServiceError::FailedPrecondition { reason: Reason::DatasetInvalid, message });
    }
    let encoder = PairEncoder::new(&context.tokenizer, request.spec.batch.max_length, request.spec.batch.truncation)
        .with_arguments(&context.arguments)
        .with_date(context.date)
        .with_vocab_size(context.vocab_size);
    let mut bad = loaded.bad;
    let mut pairs = Vec::with_capacity(loaded.rows.len());
    for row in &loaded.rows {
        match encoder.encode_row(row) {
            Ok(pair) => pairs.push(pair),
            Err(issue) => bad.add(issue),
        }
    }
    if request.row_policy == RowPolicy::Reject
        && let Some(first) = bad.first()
    {
        let message = format!(
            "datasets/{} has {} rows that cannot be used with max_length {}; row {}, {}: {}. Fix them, or set row_policy to SKIP",
            dataset.id,
            bad.rows(),
            request.spec.batch.max_length,
            first.row,
            first.reason.name(),
            first.message
        );
        return Err(ServiceError::FailedPrecondition { reason: Reason::DatasetInvalid, message });
    }
    let new = |row: &PreferenceRow| Some(format!("{} of row {} of datasets/{}", row.new_since_0_2_0()?, row.row, dataset.id));
    Ok(Encoded { pairs, bad, new_since_0_2_0: loaded.rows.iter().find_map(new) })
}

async fn note_skipped(service: &Service, held: &Held, skipped: &BadRows) -> Result<()> {
    let listed = skipped.lines();
    let first = listed.first().map(String::as_str).unwrap_or_default();
    let message = format!("{} rows are left out, see skipped_rows; the first: {first}", skipped.rows());
    let note = |j: &mut Job| {
        // A job that is continued has told of them.
        let known = j.skipped_rows == listed;
        j.skipped_rows.clone_from(&listed);
        Ok(if known { Vec::new() } else { vec![EventKind::Log { severity: "warning".into(), message: message.clone() }] })
    };
    held.write(service, note, Also::Nothing).await.map(|_| ())
}

/// Stores what a run reported, then tells the followers.
async fn store_event(service: &Service, job: &Job, held: &Held, event: RunEvent) -> Result<()> {
    match event {
        RunEvent::Running { total_steps, from_step } => {
            let running = move |j: &mut Job| {
                j.progress.total_steps = total_steps;
                j.progress.step = from_step;
                if j.state != JobState::Preparing {
                    return Ok(Vec::new()); // being cancelled
                }
                j.state = JobState::Running;
                let reason = if from_step > 0 { format!("continues from step {from_step}") } else { "weights are loaded".into() };
                Ok(vec![EventKind::StateChange { from: Some(JobState::Preparing), to: JobState::Running, reason }])
            };
            held.write(service, running, Also::Nothing).await?;
        }
        RunEvent::Step { progress, metrics } => {
            held.show(&progress, &metrics);
            let step = |j: &mut Job| {
                j.latest_metrics.extend(metrics.clone());
                j.progress = progress.clone();
                Ok(vec![EventKind::Step { step: progress.step, progress: progress.clone(), metrics: metrics.clone() }])
            };
            held.write(service, step, Also::Nothing).await?;
        }
        RunEvent::Eval { step, metrics } => {
            let eval = |j: &mut Job| {
                j.latest_metrics.extend(metrics.clone());
                Ok(vec![EventKind::Eval { step, metrics: metrics.clone() }])
            };
            held.write(service, eval, Also::Nothing).await?;
        }
        RunEvent::Checkpoint { step, best, adapter, size_bytes, metrics } => {
            let dir = service.inner.artifacts.checkpoint(&job.id, step);
            let digest = blocking(move || checkpoint::digest(&dir)).await?.map_err(ServiceError::internal)?;
            let upload = || service.inner.artifacts.keep_checkpoint(&job.id, step, &digest);
            let start = Instant::now();
            let kept = held.unless_cancelled(upload).await;
            metrics::histogram!("bradley_checkpoint_seconds", "phase" => "keep").record(start.elapsed().as_secs_f64());
            if held.control.command() == Command::Cancel && kept.is_err() {
                return Ok(()); // nobody wants it
            }
            kept?;
            let row =
                Checkpoint { job: job.id.clone(), step, best, adapter, size_bytes, metrics, create_time: now(), digest: digest.clone() };
            held.write(service, |_| Ok(vec![EventKind::CheckpointCreated { step, best }]), Also::Add(&row)).await?;
            retain(service, job, held).await?;
        }
        RunEvent::Log { severity, message } => {
            let log = |_: &mut Job| Ok(vec![EventKind::Log { severity: severity.into(), message: message.clone() }]);
            held.write(service, log, Also::Nothing).await?;
        }
        RunEvent::Ended(_) => {}
    }
    Ok(())
}

/// Keeps the newest checkpoints and the best one.
async fn retain(service: &Service, job: &Job, held: &Held) -> Result<()> {
    let all = patiently(|| service.inner.store.checkpoints(&job.id)).await?;
    let surplus = all.len().saturating_sub(job.request.spec.run.save_total_limit);
    for old in all.iter().take(surplus).filter(|c| !c.best) {
        match held.write(service, |_| Ok(Vec::new()), Also::Retire(old.step)).await {
            Ok(_) => service.drop_checkpoint_files(old).await,
            // Another job starts from it or is measured against it.
            Err(ServiceError::FailedPrecondition { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The last state change of a run; the lease is given back with it.
async fn finish(service: &Service, held: &Held, end: &End) -> Result<()> {
    let room = held.room();
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
                let to = if from == JobState::Pausing { JobState::Paused } else { JobState::Queued };
                (to, format!("waits: {}", e.message))
            }
            End::Run(RunEnd::Succeeded) => (JobState::Succeeded, "all steps are taken".to_owned()),
            End::Run(RunEnd::Cancelled) => (JobState::Cancelled, "cancelled by a client".to_owned()),
            End::Run(RunEnd::Drained) if from == JobState::Pausing => {
                (JobState::Paused, format!("paused by a client; continues from step {}", job.progress.step))
            }
            End::Run(RunEnd::Drained) => {
                let why = match room {
                    None => "the server is shutting down",
                    Some(Room::Priority) => "makes room for a job of a higher priority",
                    Some(Room::Slice) => {
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
    let job = held.write(service, change, Also::Release).await?;
    if let End::Waits(error) = end {
        metrics::counter!("bradley_jobs_waiting_total", "reason" => error.reason.name().to_lowercase()).increment(1);
    }
    if job.state.is_final() {
        job_ended(job.state);
    }
    Ok(())
}
