//! A job that this process carries on: its lease, its run's control, and writes that are stored once, in order, or not at all.

use std::future::Future;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use super::error::{Result, ServiceError};
use super::service::Service;
use super::store::leases::{Also, Lease};
use crate::domain::job::{EventKind, Job, JobState, Metrics, Progress};
use crate::domain::reason::Reason;
use crate::engine::api::{Command, RunControl};

/// The first wait after the store did not answer, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Why a run makes room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// A job of a higher priority waits.
    Priority,
    /// Its time slice is over and another waits.
    Slice,
}

/// A job under this process's lease.
pub(super) struct Held {
    pub lease: Lease,
    /// How its run is told to stop.
    pub control: RunControlRef,
    written: AtomicI64,
    room: Mutex<Option<Room>>,
    /// How far the run is, for whoever watches the process.
    shown: Mutex<Shown>,
}

/// A gauge's name and value, of the last step that was logged.
type Shown = Vec<(&'static str, f64)>;

/// Gauges of a run, and the metric that each shows: the first that the run has, so that rewards are those that it trains.
const SHOWN: [(&str, &[&str]); 3] = [
    ("bradley_training_loss", &["loss"]),
    ("bradley_training_margin", &["rewards_normalized/margins", "rewards/margins"]),
    ("bradley_training_accuracy", &["rewards_normalized/accuracies", "rewards/accuracies"]),
];

type RunControlRef = std::sync::Arc<RunControl>;

impl Held {
    pub fn new(lease: Lease) -> Self {
        Held { lease, control: RunControlRef::default(), written: AtomicI64::new(0), room: Mutex::default(), shown: Mutex::default() }
    }

    /// Does what a client's change of the state asks of the run.
    pub fn heed(&self, state: JobState) {
        match state {
            JobState::Cancelling => self.control.cancel(),
            JobState::Pausing => self.control.drain(),
            _ => {}
        }
    }

    /// Sends the run back to the queue.
    pub fn make_room(&self, why: Room) {
        self.room.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.control.drain();
    }

    /// Why it was sent back, if it was.
    pub fn room(&self) -> Option<Room> {
        *self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a logged step.
    pub fn show(&self, progress: &Progress, metrics: &Metrics) {
        let value = |names: &[&str]| names.iter().find_map(|name| metrics.get(*name)).copied();
        let shown = SHOWN.iter().filter_map(|(gauge, names)| Some((*gauge, value(names)?)));
        let ratio = progress.step as f64 / progress.total_steps.max(1) as f64;
        let all = shown.chain([("bradley_training_progress_ratio", ratio)]).collect();
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = all;
    }

    /// What was noted last.
    pub fn shown(&self) -> Shown {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stores a change of the job and tells its followers. While the store does not answer this waits; the write is not made twice.
    ///
    /// # Errors
    /// `Aborted` when another worker has the job: nothing was stored.
    pub async fn write(
        &self,
        service: &Service,
        change: impl Fn(&mut Job) -> Result<Vec<EventKind>> + Send + Sync,
        also: Also<'_>,
    ) -> Result<Job> {
        let number = self.written.fetch_add(1, Ordering::Relaxed) + 1;
        let (job, sequence) = patiently(|| service.inner.store.write_run(&self.lease, number, &change, also)).await?;
        service.inner.feed.notify(&self.lease.job, sequence);
        Ok(job)
    }

    /// [`patiently`], until the run is told to stop: then the failure is returned.
    pub async fn while_wanted<T, F: Future<Output = Result<T>> + Send>(&self, f: impl Fn() -> F + Send + Sync) -> Result<T> {
        retry(f, || self.control.command() == Command::Run).await
    }

    /// [`patiently`], until the run is cancelled: then the failure is returned.
    pub async fn unless_cancelled<T, F: Future<Output = Result<T>> + Send>(&self, f: impl Fn() -> F + Send + Sync) -> Result<T> {
        retry(f, || self.control.command() != Command::Cancel).await
    }
}

/// Repeats `f` while the store, or the artifact store, does not answer.
pub(super) async fn patiently<T, F: Future<Output = Result<T>> + Send>(f: impl Fn() -> F + Send + Sync) -> Result<T> {
    retry(f, || true).await
}

async fn retry<T, F: Future<Output = Result<T>> + Send>(
    f: impl Fn() -> F + Send + Sync,
    wanted: impl Fn() -> bool + Send + Sync,
) -> Result<T> {
    let mut wait = RETRY.0;
    loop {
        match f().await {
            Err(ServiceError::Unavailable { reason, message, .. } | ServiceError::ResourceExhausted { reason, message })
                if matches!(
                    reason,
                    Reason::StoreUnavailable | Reason::ArtifactsUnavailable | Reason::StorageUnavailable | Reason::StorageFull
                ) && wanted() =>
            {
                tracing::warn!(reason = reason.name(), error = message, "waiting");
                metrics::counter!("bradley_store_retries_total", "reason" => reason.name()).increment(1);
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY.1);
            }
            result => return result,
        }
    }
}
