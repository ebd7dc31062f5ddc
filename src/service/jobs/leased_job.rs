//! A job that this process runs: its lease, the control of its run, and its writes. A write is
//! stored exactly once and in order, or not at all.

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
use crate::service::store::leases::{Lease, RunWriteEffect};

/// First and longest delay between retries while the store does not answer.
const RETRY_DELAYS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Reason for preempting a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Preemption {
    /// A job of a higher priority is queued.
    Priority,
    /// The time slice is over and a job of the same priority is queued.
    TimeSlice,
}

/// A job that this process runs under a lease.
pub(in crate::service) struct LeasedJob {
    pub lease: Lease,
    /// Flag through which the run is told to drain or to cancel.
    pub control: Arc<RunControl>,
    store: Store,
    events: EventFeed,
    /// Number of writes begun under the lease. It numbers them, so that a retried write is stored
    /// once.
    written: AtomicI64,
    preemption: Mutex<Option<Preemption>>,
    /// Gauges of the last logged step.
    gauges: Mutex<Vec<Gauge>>,
    /// Reason for which a failed write or read of the run is about to be repeated.
    waits_for: Mutex<Option<Reason>>,
}

/// Name and value of a gauge.
pub(in crate::service) type Gauge = (&'static str, f64);

/// Gauges of a run, each with the names of the metrics that it can show. It shows the first one
/// that the run reports: the metric of normalized rewards if there is one.
const GAUGES: [(&str, &[&str]); 3] = [
    ("bradley_training_loss", &["loss"]),
    (
        "bradley_training_margin",
        &["rewards_normalized/margins", "rewards/margins"],
    ),
    (
        "bradley_training_accuracy",
        &["rewards_normalized/accuracies", "rewards/accuracies"],
    ),
];

impl LeasedJob {
    /// Creates the entry for a job that was just claimed. Its changes are written to `store` and
    /// announced through `events`.
    pub fn new(lease: Lease, store: Store, events: EventFeed) -> Self {
        LeasedJob {
            lease,
            control: Arc::default(),
            store,
            events,
            written: AtomicI64::new(0),
            preemption: Mutex::default(),
            gauges: Mutex::default(),
            waits_for: Mutex::default(),
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

    /// Asks the run to write a checkpoint and go back to the queue. The first reason is recorded.
    pub(super) fn preempt(&self, why: Preemption) {
        self.preemption
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(why);
        self.control.drain();
    }

    /// Returns the reason for the preemption, if the run was preempted.
    pub(super) fn preemption(&self) -> Option<Preemption> {
        *self
            .preemption
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the gauges of a logged step.
    pub fn set_gauges(&self, progress: &Progress, metrics: &Metrics) {
        let value = |names: &[&str]| names.iter().find_map(|name| metrics.get(*name)).copied();
        let of_metrics = GAUGES
            .iter()
            .filter_map(|(gauge, names)| Some((*gauge, value(names)?)));
        let ratio = progress.step as f64 / progress.total_steps.max(1) as f64;
        let all = of_metrics
            .chain([("bradley_training_progress_ratio", ratio)])
            .collect();
        *self.gauges.lock().unwrap_or_else(PoisonError::into_inner) = all;
    }

    /// Returns the gauges of the last logged step.
    pub fn gauges(&self) -> Vec<Gauge> {
        self.gauges
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Returns what the run waits for, if the database, the artifact store or the disk failed at
    /// its last attempt.
    pub fn waits_for(&self) -> Option<Reason> {
        *self
            .waits_for
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what the run waits for, until the next change of the job is stored.
    pub(super) fn note_wait(&self, reason: Option<Reason>) {
        *self
            .waits_for
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = reason;
    }

    /// Stores a change of the job and notifies the followers of its events. Retries while the store
    /// does not answer; a retried write is not stored twice.
    ///
    /// # Errors
    /// `Aborted` if another worker holds the lease, and the other errors of [`Store::write_run`];
    /// nothing is stored then.
    pub async fn write(
        &self,
        change: impl Fn(&mut Job) -> Result<Vec<EventKind>> + Send + Sync,
        effect: RunWriteEffect<'_>,
    ) -> Result<Job> {
        let number = self.written.fetch_add(1, Ordering::Relaxed) + 1;
        let (job, sequence) = retry(
            || self.store.write_run(&self.lease, number, &change, effect),
            || true,
            |reason| self.note_wait(reason),
        )
        .await?;
        self.events.notify(&self.lease.job, sequence);
        Ok(job)
    }

    /// Like [`retry_while_unavailable`], but returns the failure once the run is told to stop.
    ///
    /// # Errors
    /// The errors of `f`.
    pub async fn retry_until_stopped<T, F: Future<Output = Result<T>> + Send>(
        &self,
        f: impl Fn() -> F + Send + Sync,
    ) -> Result<T> {
        let should_retry = || self.control.command() == RunCommand::Run;
        retry(f, should_retry, |reason| self.note_wait(reason)).await
    }

    /// Like [`retry_while_unavailable`], but returns the failure once the run is cancelled.
    ///
    /// # Errors
    /// The errors of `f`.
    pub async fn retry_until_cancelled<T, F: Future<Output = Result<T>> + Send>(
        &self,
        f: impl Fn() -> F + Send + Sync,
    ) -> Result<T> {
        let should_retry = || self.control.command() != RunCommand::Cancel;
        retry(f, should_retry, |reason| self.note_wait(reason)).await
    }
}

/// Repeats `f` while the database, the artifact store or the disk is unavailable or full.
///
/// # Errors
/// All other errors of `f`.
pub(super) async fn retry_while_unavailable<T, F: Future<Output = Result<T>> + Send>(
    f: impl Fn() -> F + Send + Sync,
) -> Result<T> {
    retry(f, || true, |_| {}).await
}

/// Repeats `f` while the database, the artifact store or the disk is unavailable or full, as long
/// as `should_retry`. `note_wait` gets the reason before each pause, and `None` at the end.
async fn retry<T, F: Future<Output = Result<T>> + Send>(
    f: impl Fn() -> F + Send + Sync,
    should_retry: impl Fn() -> bool + Send + Sync,
    note_wait: impl Fn(Option<Reason>) + Send + Sync,
) -> Result<T> {
    let mut wait = RETRY_DELAYS.0;
    loop {
        match f().await {
            Err(
                ServiceError::Unavailable {
                    reason, message, ..
                }
                | ServiceError::ResourceExhausted { reason, message },
            ) if matches!(
                reason,
                Reason::StoreUnavailable
                    | Reason::ArtifactsUnavailable
                    | Reason::StorageUnavailable
                    | Reason::StorageFull
            ) && should_retry() =>
            {
                tracing::warn!(
                    reason = reason.name(),
                    error = message,
                    "the job waits and tries again"
                );
                metrics::counter!("bradley_store_retries_total", "reason" => reason.name())
                    .increment(1);
                note_wait(Some(reason));
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY_DELAYS.1);
            }
            result => {
                note_wait(None);
                return result;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_is_noted_until_the_call_succeeds() {
        let (attempts, noted) = (AtomicI64::new(0), Mutex::new(Vec::new()));
        let counter = &attempts;
        let full = || async move {
            match counter.fetch_add(1, Ordering::Relaxed) {
                0 | 1 => Err(ServiceError::Unavailable {
                    reason: Reason::StoreUnavailable,
                    message: "the database is full".to_owned(),
                    retry_after: Duration::from_secs(1),
                }),
                attempt => Ok(attempt),
            }
        };
        let done = retry(full, || true, |reason| noted.lock().unwrap().push(reason));
        assert_eq!(done.await.unwrap(), 2);
        let waiting = Some(Reason::StoreUnavailable);
        assert_eq!(*noted.lock().unwrap(), [waiting, waiting, None]);
    }
}
