//! A job that this process carries on: its lease, its run's control, and writes that are stored
//! once, in order, or not at all.

use std::future::Future;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::domain::job::{EventKind, Job, JobState, Metrics, Progress};
use crate::domain::reason::Reason;
use crate::engine::api::{RunCommand, RunControl};
use crate::service::error::{Result, ServiceError};
use crate::service::events::EventFeed;
use crate::service::store::Store;
use crate::service::store::leases::{Also, Lease};

/// The first wait after the store did not answer, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Why a run is preempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Preemption {
    /// A job of a higher priority waits.
    Priority,
    /// Its time slice is over and another waits.
    TimeSlice,
}

/// A job under this process's lease.
pub(in crate::service) struct LeasedJob {
    pub lease: Lease,
    /// How its run is told to stop.
    pub control: Arc<RunControl>,
    store: Store,
    events: EventFeed,
    /// Writes that were begun under the lease.
    written: AtomicI64,
    preemption: Mutex<Option<Preemption>>,
    /// How far the run is, for whoever watches the process.
    gauges: Mutex<Vec<Gauge>>,
}

/// A gauge's name and value, of the last step that was logged.
pub(in crate::service) type Gauge = (&'static str, f64);

/// Gauges of a run, and the metric that each shows: the first that the run has, so that rewards are
/// those that it trains.
const GAUGES: [(&str, &[&str]); 3] = [
    ("bradley_training_loss", &["loss"]),
    ("bradley_training_margin", &["rewards_normalized/margins", "rewards/margins"]),
    ("bradley_training_accuracy", &["rewards_normalized/accuracies", "rewards/accuracies"]),
];

impl LeasedJob {
    /// Creates the entry of a job that was just claimed; its events are stored and told through
    /// these.
    pub fn new(lease: Lease, store: Store, events: EventFeed) -> Self {
        LeasedJob {
            lease,
            control: Arc::default(),
            store,
            events,
            written: AtomicI64::new(0),
            preemption: Mutex::default(),
            gauges: Mutex::default(),
        }
    }

    /// Applies a state that a client asked for (cancelling, pausing) to the run.
    pub fn apply_requested_state(&self, state: JobState) {
        match state {
            JobState::Cancelling => self.control.cancel(),
            JobState::Pausing => self.control.drain(),
            _ => {}
        }
    }

    /// Sends the run back to the queue.
    pub(super) fn preempt(&self, why: Preemption) {
        self.preemption.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.control.drain();
    }

    /// Returns why the run was sent back, if it was.
    pub(super) fn preemption(&self) -> Option<Preemption> {
        *self.preemption.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the gauges of a logged step.
    pub fn set_gauges(&self, progress: &Progress, metrics: &Metrics) {
        let value = |names: &[&str]| names.iter().find_map(|name| metrics.get(*name)).copied();
        let of_metrics = GAUGES.iter().filter_map(|(gauge, names)| Some((*gauge, value(names)?)));
        let ratio = progress.step as f64 / progress.total_steps.max(1) as f64;
        let all = of_metrics.chain([("bradley_training_progress_ratio", ratio)]).collect();
        *self.gauges.lock().unwrap_or_else(PoisonError::into_inner) = all;
    }

    /// Returns the gauges of the last logged step.
    pub fn gauges(&self) -> Vec<Gauge> {
        self.gauges.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stores a change of the job and tells its followers. While the store does not answer this
    /// waits; the write is not made twice.
    ///
    /// # Errors
    /// `Aborted` when another worker has the job: nothing was stored.
    pub async fn write(
        &self,
        change: impl Fn(&mut Job) -> Result<Vec<EventKind>> + Send + Sync,
        also: Also<'_>,
    ) -> Result<Job> {
        let number = self.written.fetch_add(1, Ordering::Relaxed) + 1;
        let (job, sequence) =
            patiently(|| self.store.write_run(&self.lease, number, &change, also)).await?;
        self.events.notify(&self.lease.job, sequence);
        Ok(job)
    }

    /// [`patiently`], until the run is told to stop: then the failure is returned.
    pub async fn while_wanted<T, F: Future<Output = Result<T>> + Send>(
        &self,
        f: impl Fn() -> F + Send + Sync,
    ) -> Result<T> {
        retry(f, || self.control.command() == RunCommand::Run).await
    }

    /// [`patiently`], until the run is cancelled: then the failure is returned.
    pub async fn unless_cancelled<T, F: Future<Output = Result<T>> + Send>(
        &self,
        f: impl Fn() -> F + Send + Sync,
    ) -> Result<T> {
        retry(f, || self.control.command() != RunCommand::Cancel).await
    }
}

/// Repeats `f` while the store, or the artifact store, does not answer.
pub(super) async fn patiently<T, F: Future<Output = Result<T>> + Send>(
    f: impl Fn() -> F + Send + Sync,
) -> Result<T> {
    retry(f, || true).await
}

async fn retry<T, F: Future<Output = Result<T>> + Send>(
    f: impl Fn() -> F + Send + Sync,
    wanted: impl Fn() -> bool + Send + Sync,
) -> Result<T> {
    let mut wait = RETRY.0;
    loop {
        match f().await {
            Err(
                ServiceError::Unavailable { reason, message, .. }
                | ServiceError::ResourceExhausted { reason, message },
            ) if matches!(
                reason,
                Reason::StoreUnavailable
                    | Reason::ArtifactsUnavailable
                    | Reason::StorageUnavailable
                    | Reason::StorageFull
            ) && wanted() =>
            {
                tracing::warn!(reason = reason.name(), error = message, "waiting");
                metrics::counter!("bradley_store_retries_total", "reason" => reason.name())
                    .increment(1);
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY.1);
            }
            result => return result,
        }
    }
}
