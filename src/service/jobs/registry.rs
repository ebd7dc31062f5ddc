//! Registry of the jobs that this process runs and of those it has postponed, with the signal that
//! wakes the runners.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::leased_job::{Gauge, LeasedJob};
use super::postponed::Postponed;
use crate::domain::job::JobState;

/// Runs and postponed jobs of this process. Clones share them.
#[derive(Clone)]
pub(in crate::service) struct RunRegistry(Arc<RegistryState>);

struct RegistryState {
    /// Running jobs, by id.
    leased: Mutex<HashMap<String, Arc<LeasedJob>>>,
    /// Queued jobs that this process does not claim for a while.
    postponed: Postponed,
    /// Incremented to make every runner look at the queue.
    queued: watch::Sender<u64>,
}

impl Default for RunRegistry {
    fn default() -> Self {
        let inner = RegistryState {
            leased: Mutex::default(),
            postponed: Postponed::default(),
            queued: watch::channel(0).0,
        };
        RunRegistry(Arc::new(inner))
    }
}

impl RunRegistry {
    fn leased(&self) -> MutexGuard<'_, HashMap<String, Arc<LeasedJob>>> {
        self.0.leased.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the runners, because a job may have been queued.
    pub fn wake(&self) {
        self.0.queued.send_modify(|count| *count += 1);
    }

    /// Returns a receiver that is notified of every later [`wake`](RunRegistry::wake).
    pub fn woken(&self) -> watch::Receiver<u64> {
        self.0.queued.subscribe()
    }

    /// Returns the run of a job if it runs in this process.
    pub fn get(&self, job: &str) -> Option<Arc<LeasedJob>> {
        self.leased().get(job).cloned()
    }

    /// Returns the runs of this process.
    pub fn all(&self) -> Vec<Arc<LeasedJob>> {
        self.leased().values().cloned().collect()
    }

    /// Returns the ids of the other jobs that this process runs.
    pub fn others(&self, job: &str) -> Vec<String> {
        self.leased()
            .keys()
            .filter(|id| *id != job)
            .cloned()
            .collect()
    }

    pub fn add(&self, job: &Arc<LeasedJob>) {
        self.leased().insert(job.lease.job.clone(), job.clone());
    }

    /// Removes a finished run. An entry of another run of the same job stays: this process may
    /// already run the job again.
    pub fn remove(&self, job: &Arc<LeasedJob>) {
        let mut all = self.leased();
        if all
            .get(&job.lease.job)
            .is_some_and(|entry| Arc::ptr_eq(entry, job))
        {
            all.remove(&job.lease.job);
        }
        drop(all);
        // The job may have been requeued meanwhile and skipped because it was still listed here.
        self.wake();
    }

    /// Asks every run to write a checkpoint and stop.
    pub fn drain(&self) {
        self.leased().values().for_each(|job| job.control.drain());
    }

    /// Returns the gauges of all runs as (job id, gauge name, value).
    pub fn gauges(&self) -> Vec<(String, &'static str, f64)> {
        let of_job = |(job, leased): (&String, &Arc<LeasedJob>)| {
            let named = |(gauge, value): Gauge| (job.clone(), gauge, value);
            leased.gauges().into_iter().map(named).collect::<Vec<_>>()
        };
        self.leased().iter().flat_map(of_job).collect()
    }

    /// Postpones a queued job by `first`, or by twice its last pause.
    pub fn postpone(&self, job: &str, first: Duration) {
        self.0.postponed.postpone(job, first);
    }

    /// Ends the pause of a postponed job.
    pub fn forget_postponed(&self, job: &str) {
        self.0.postponed.forget(job);
    }

    /// Returns the time at which the next postponed job may be claimed.
    pub fn next_due(&self) -> Option<Instant> {
        self.0.postponed.next_due()
    }

    /// Returns the ids of jobs that this process must not claim: postponed jobs, and jobs with a
    /// run here that has not ended yet although its lease may be lost.
    pub fn passed_over(&self) -> Vec<String> {
        let mut jobs = self.0.postponed.jobs();
        jobs.extend(self.leased().keys().cloned());
        jobs
    }
}

/// Counts a job that this process moved to a final state.
pub(in crate::service) fn count_ended(state: JobState) {
    metrics::counter!("bradley_jobs_ended_total", "state" => state.name()).increment(1);
}
