//! Background tasks: lease renewal, reclaiming jobs of dead workers, expiry, cross-replica
//! notifications.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::artifacts::Artifacts;
use super::error::{Result, ServiceError};
use super::events::EventFeed;
use super::jobs::JobService;
use super::jobs::registry::{RunRegistry, count_ended};
use super::shutdown::Shutdown;
use super::store::Store;
use super::store::jobs::Expired;
use super::store::listen::Notice;
use crate::domain::job::JobState;

/// Every how many rounds old copies are looked for.
const SWEEP: u64 = 60;
/// What an upload may take between its file and its row.
const UPLOADING: Duration = Duration::from_secs(3600);
/// Expired jobs that are deleted at a time.
const DELETIONS: usize = 64;

/// What the background tasks need.
#[derive(Clone)]
pub(super) struct BackgroundTasks {
    pub store: Store,
    pub artifacts: Artifacts,
    pub events: EventFeed,
    pub runs: RunRegistry,
    pub jobs: Arc<JobService>,
    pub shutdown: Shutdown,
}

impl BackgroundTasks {
    /// Starts them; they go on until they are aborted.
    pub fn start(&self) -> Vec<JoinHandle<()>> {
        let [renewing, keeping, listening] = [self.clone(), self.clone(), self.clone()];
        vec![
            tokio::spawn(async move { renewing.renew_leases().await }),
            tokio::spawn(async move { keeping.keep_house().await }),
            tokio::spawn(async move { listening.listen().await }),
        ]
    }

    /// Renews leases for ever: nothing else may hold this up.
    async fn renew_leases(&self) {
        // Two renewals may fail before a lease runs out.
        let pause = self.store.lease_time() / 3;
        loop {
            tokio::time::sleep(pause).await;
            self.renew(pause).await;
        }
    }

    /// Keeps house until the service drains.
    async fn keep_house(&self) {
        let mut pause = tokio::time::interval(self.store.lease_time() / 3);
        pause.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut expired = Expired::default();
        for tick in 0_u64.. {
            pause.tick().await;
            metrics::gauge!("bradley_store_up")
                .set(f64::from(u8::from(self.store.ping().await.is_ok())));
            if self.shutdown.has_begun() {
                continue;
            }
            if let Err(e) = self.reclaim(false).await {
                tracing::warn!(error = %e, "jobs of dead workers cannot be looked for");
            }
            if let Err(e) = self.expire(&mut expired).await {
                tracing::warn!(error = %e, "expired jobs cannot be deleted");
            }
            if let Err(e) = self.count().await {
                tracing::debug!(error = %e, "jobs cannot be counted");
            }
            // Restores what a caller who left, or a lost connection, kept from being told.
            self.refresh().await;
            if tick.is_multiple_of(SWEEP)
                && let Err(e) = self.sweep().await
            {
                tracing::warn!(error = %e, "copies of what was deleted elsewhere cannot be removed");
            }
        }
    }

    /// Shows how many jobs are in each state, of all replicas, and how many of them this version
    /// cannot read.
    async fn count(&self) -> Result<()> {
        metrics::gauge!("bradley_unreadable_jobs").set(self.store.unreadable_jobs().await? as f64);
        let counts = self.store.job_counts().await?;
        for state in JobState::ALL {
            let n = counts.get(state.name()).copied().unwrap_or_default();
            metrics::gauge!("bradley_jobs", "state" => state.name()).set(n as f64);
        }
        Ok(())
    }

    /// Removes local copies of jobs and datasets that another replica deleted. What the artifact
    /// store has is left alone: that a database does not know a job proves nothing, for it may be
    /// an older one, or another.
    async fn sweep(&self) -> Result<()> {
        if !self.artifacts.holds_copies_only() {
            return Ok(());
        }
        let (jobs, datasets) = self.artifacts.local().await?;
        for id in jobs {
            // One that is being made has a copy of its adapter before it has a row.
            let old = self.artifacts.job_age(&id).is_some_and(|age| age > UPLOADING);
            if old && matches!(self.store.job(&id).await, Err(ServiceError::NotFound { .. })) {
                self.artifacts.drop_local_job(&id).await?;
            }
        }
        for id in datasets {
            // One that is being uploaded has no row yet.
            let old = self.artifacts.dataset_age(&id).is_some_and(|age| age > UPLOADING);
            if old && matches!(self.store.dataset(&id).await, Err(ServiceError::NotFound { .. })) {
                self.artifacts.drop_local_dataset(&id).await?;
            }
        }
        Ok(())
    }

    /// Renews the leases of this process; a run whose lease is another's is stopped, and told what
    /// clients asked for meanwhile.
    async fn renew(&self, patience: Duration) {
        for run in self.runs.all() {
            let renewed = tokio::time::timeout(patience, self.store.renew(&run.lease)).await;
            match renewed
                .unwrap_or_else(|_| Err(ServiceError::internal("the database does not answer")))
            {
                Ok(Some(state)) => run.apply_requested_state(state),
                Ok(None) => {
                    tracing::warn!(
                        job = run.lease.job,
                        "another worker has the job: its run here is stopped"
                    );
                    run.control.cancel();
                }
                // Until somebody takes the job, it is still ours.
                Err(e) => {
                    tracing::warn!(job = run.lease.job, error = %e, "the lease cannot be renewed")
                }
            }
        }
    }

    /// Puts jobs whose worker is gone back in the queue; see `Store::reclaim`.
    pub async fn reclaim(&self, all: bool) -> Result<()> {
        for (job, sequence) in self.store.reclaim(all).await? {
            tracing::info!(job = job.id, to = job.state.name(), "job recovered");
            match job.state.is_final() {
                true => count_ended(job.state),
                false => metrics::counter!("bradley_jobs_recovered_total").increment(1),
            }
            self.events.notify(&job.id, sequence);
            self.runs.wake();
        }
        Ok(())
    }

    /// Deletes the next expired jobs. Each round goes on where the one before ended, so that jobs
    /// which cannot be deleted do not hold up the others.
    async fn expire(&self, after: &mut Expired) -> Result<()> {
        let (jobs, next) = self.store.expired_jobs(*after, DELETIONS).await?;
        *after = next;
        for job in jobs {
            match self.jobs.delete_expired(&job).await {
                Ok(()) => tracing::info!(job, "job deleted: its time to live is over"),
                // Another job starts from it; another version wrote it; another replica was faster;
                // or its time to live was prolonged meanwhile.
                Err(e) => tracing::debug!(job, error = %e, "an expired job cannot be deleted yet"),
            }
        }
        Ok(())
    }

    /// Tells followers what may have been missed.
    async fn refresh(&self) {
        for job in self.events.followed() {
            if let Ok(newest) = self.store.newest_sequence(&job).await {
                self.events.notify(&job, newest);
            }
        }
        self.runs.wake();
    }

    /// Passes on what other replicas change, for ever.
    async fn listen(&self) {
        let heard = tokio::sync::Notify::new();
        let told = |notice: Option<Notice>| match notice {
            Some(notice) => {
                self.events.notify(&notice.job, notice.sequence);
                if let Some(run) = self.runs.get(&notice.job) {
                    run.apply_requested_state(notice.state);
                }
                if notice.state == JobState::Queued {
                    self.runs.wake();
                }
            }
            None => heard.notify_one(),
        };
        tokio::select! {
            () = self.store.listen(told) => {}
            () = async { loop { heard.notified().await; self.refresh().await; } } => {}
        }
    }
}
