//! The jobs that this process runs, those that it leaves in the queue, and the signal to look
//! there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::leased_job::{Gauge, LeasedJob};
use super::postponed::Postponed;
use crate::domain::job::JobState;

/// What this process has of the queue; clones share it.
#[derive(Clone)]
pub(in crate::service) struct RunRegistry(Arc<RegistryState>);

struct RegistryState {
    /// The jobs that this process runs.
    leased: Mutex<HashMap<String, Arc<LeasedJob>>>,
    /// Queued jobs that it does not take for a while.
    postponed: Postponed,
    /// Changes when a job was queued: every runner looks.
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

    /// Tells the runners that a job was queued.
    pub fn wake(&self) {
        self.0.queued.send_modify(|count| *count += 1);
    }

    /// Returns a receiver that sees every wake from now on.
    pub fn woken(&self) -> watch::Receiver<u64> {
        self.0.queued.subscribe()
    }

    /// Returns the run of a job, if this process has it.
    pub fn get(&self, job: &str) -> Option<Arc<LeasedJob>> {
        self.leased().get(job).cloned()
    }

    /// Returns the runs of this process.
    pub fn all(&self) -> Vec<Arc<LeasedJob>> {
        self.leased().values().cloned().collect()
    }

    /// Returns the ids of the other jobs that this process runs.
    pub fn others(&self, job: &str) -> Vec<String> {
        self.leased().keys().filter(|id| *id != job).cloned().collect()
    }

    /// Adds a run.
    pub fn add(&self, job: &Arc<LeasedJob>) {
        self.leased().insert(job.lease.job.clone(), job.clone());
    }

    /// Removes a run that is over. Only its own entry is removed: this process may run the job
    /// again already.
    pub fn remove(&self, job: &Arc<LeasedJob>) {
        let mut all = self.leased();
        if all.get(&job.lease.job).is_some_and(|entry| Arc::ptr_eq(entry, job)) {
            all.remove(&job.lease.job);
        }
        drop(all);
        // The job may have been queued meanwhile, and passed over.
        self.wake();
    }

    /// Asks every run to write a checkpoint and stop.
    pub fn drain(&self) {
        self.leased().values().for_each(|job| job.control.drain());
    }

    /// Returns the gauges of each run: its job, the gauge's name and its value.
    pub fn gauges(&self) -> Vec<(String, &'static str, f64)> {
        let of_job = |(job, leased): (&String, &Arc<LeasedJob>)| {
            let named = |(gauge, value): Gauge| (job.clone(), gauge, value);
            leased.gauges().into_iter().map(named).collect::<Vec<_>>()
        };
        self.leased().iter().flat_map(of_job).collect()
    }

    /// Leaves a job in the queue for a while, longer each time.
    pub fn postpone(&self, job: &str, first: Duration) {
        self.0.postponed.postpone(job, first);
    }

    /// Lets a postponed job be taken at once.
    pub fn forget_postponed(&self, job: &str) {
        self.0.postponed.forget(job);
    }

    /// Returns when the next postponed job may be taken.
    pub fn next_due(&self) -> Option<Instant> {
        self.0.postponed.next_due()
    }

    /// Returns the queued jobs that this process does not take: postponed ones, and those of which
    /// a run here has not ended yet, although its lease was lost.
    pub fn passed_over(&self) -> Vec<String> {
        let mut jobs = self.0.postponed.jobs();
        jobs.extend(self.leased().keys().cloned());
        jobs
    }
}

/// Counts a job that this process brought to its end.
pub(in crate::service) fn count_ended(state: JobState) {
    metrics::counter!("bradley_jobs_ended_total", "state" => state.name()).increment(1);
}
