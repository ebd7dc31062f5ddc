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
use super::store::jobs::ExpiredPosition;
use super::store::listen::Notice;
use crate::domain::job::JobState;

/// Number of rounds between two sweeps for local copies of deleted files.
const ROUNDS_PER_SWEEP: u64 = 60;
/// Minimum age of a file without a row before a sweep removes it. It is longer than any upload or
/// job creation takes from its file to its row.
const MIN_SWEEP_AGE: Duration = Duration::from_secs(3600);
/// Maximum number of expired jobs deleted per round.
const MAX_DELETIONS_PER_ROUND: usize = 64;

/// Background tasks and the parts of the service they use.
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
    /// Starts the tasks. They run until they are aborted.
    pub fn start(&self) -> Vec<JoinHandle<()>> {
        let [renewing, maintaining, listening] = [self.clone(), self.clone(), self.clone()];
        vec![
            tokio::spawn(async move { renewing.renew_leases().await }),
            tokio::spawn(async move { maintaining.maintain().await }),
            tokio::spawn(async move { listening.listen().await }),
        ]
    }

    /// Renews leases forever. This is a task of its own, so that no other work delays a renewal.
    async fn renew_leases(&self) {
        // If a renewal fails at once, there is time for another one before the lease runs out.
        let pause = self.store.lease_time() / 3;
        loop {
            tokio::time::sleep(pause).await;
            self.renew(pause).await;
        }
    }

    /// Maintains jobs and gauges periodically. While the server drains, only `bradley_store_up` is
    /// updated.
    async fn maintain(&self) {
        let mut pause = tokio::time::interval(self.store.lease_time() / 3);
        pause.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut expired = ExpiredPosition::default();
        for tick in 0_u64.. {
            pause.tick().await;
            metrics::gauge!("bradley_store_up")
                .set(f64::from(u8::from(self.store.ping().await.is_ok())));
            if self.shutdown.has_begun() {
                continue;
            }
            if let Err(e) = self.reclaim(false).await {
                tracing::warn!(error = %e, "cannot look for jobs of dead workers");
            }
            if let Err(e) = self.expire(&mut expired).await {
                tracing::warn!(error = %e, "expired jobs cannot be deleted");
            }
            if let Err(e) = self.set_job_gauges().await {
                tracing::debug!(error = %e, "jobs cannot be counted");
            }
            // Repeats notifications that were lost because the connection to the database broke.
            self.refresh().await;
            if tick.is_multiple_of(ROUNDS_PER_SWEEP)
                && let Err(e) = self.sweep().await
            {
                tracing::warn!(error = %e, "local copies of deleted jobs and datasets cannot be \
                    removed");
            }
        }
    }

    /// Sets the gauges of the number of jobs per state, over all replicas, and of the jobs that
    /// this version cannot read.
    async fn set_job_gauges(&self) -> Result<()> {
        metrics::gauge!("bradley_unreadable_jobs").set(self.store.unreadable_jobs().await? as f64);
        let counts = self.store.job_counts().await?;
        for state in JobState::ALL {
            let n = counts.get(state.name()).copied().unwrap_or_default();
            metrics::gauge!("bradley_jobs", "state" => state.name()).set(n as f64);
        }
        Ok(())
    }

    /// Removes local copies of jobs and datasets that another replica deleted. Nothing is removed
    /// from the artifact store: a job that is missing in the database proves nothing there, because
    /// the database may be an older or a different one.
    async fn sweep(&self) -> Result<()> {
        if !self.artifacts.holds_copies_only() {
            return Ok(());
        }
        let (jobs, datasets) = self.artifacts.ids_with_local_files().await?;
        for id in jobs {
            // A job that is being created has a copy of its adapter before it has a row.
            let old = self
                .artifacts
                .job_age(&id)
                .is_some_and(|age| age > MIN_SWEEP_AGE);
            if old
                && matches!(
                    self.store.job(&id).await,
                    Err(ServiceError::NotFound { .. })
                )
            {
                self.artifacts.drop_local_job(&id).await?;
            }
        }
        for id in datasets {
            // A dataset that is being uploaded has no row yet.
            let old = self
                .artifacts
                .dataset_age(&id)
                .is_some_and(|age| age > MIN_SWEEP_AGE);
            if old
                && matches!(
                    self.store.dataset(&id).await,
                    Err(ServiceError::NotFound { .. })
                )
            {
                self.artifacts.drop_local_dataset(&id).await?;
            }
        }
        Ok(())
    }

    /// Renews the leases of this process. A run that has lost its lease is stopped; other runs are
    /// told which state clients have requested.
    async fn renew(&self, timeout: Duration) {
        for run in self.runs.all() {
            let renewed = tokio::time::timeout(timeout, self.store.renew(&run.lease)).await;
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
                // The lease may still be valid, so the run continues. If another worker has claimed
                // the job, the run can store nothing more.
                Err(e) => {
                    tracing::warn!(job = run.lease.job, error = %e, "the lease cannot be renewed")
                }
            }
        }
    }

    /// Reclaims jobs whose worker is gone, see [`Store::reclaim`], and tells their followers.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
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

    /// Deletes the next expired jobs. Each round continues where the last one ended, so that jobs
    /// that cannot be deleted do not block the others. A job whose deletion has begun when the
    /// server shuts down is deleted with its files; the next one is left.
    async fn expire(&self, after: &mut ExpiredPosition) -> Result<()> {
        let (jobs, next) = self
            .store
            .expired_jobs(*after, MAX_DELETIONS_PER_ROUND)
            .await?;
        *after = next;
        for job in jobs {
            if self.shutdown.has_begun() {
                break;
            }
            match self.jobs.delete_expired(&job).await {
                Ok(()) => tracing::info!(job, "job deleted: its time to live is over"),
                // Possible reasons: another job starts from it, another version wrote it, another
                // replica was faster, or its time to live was prolonged meanwhile.
                Err(e) => tracing::debug!(job, error = %e, "an expired job cannot be deleted yet"),
            }
        }
        Ok(())
    }

    /// Notifies followers and runners of changes that they may have missed.
    async fn refresh(&self) {
        for job in self.events.followed() {
            match self.store.newest_sequence(&job).await {
                // Every job has events, so this one was deleted. Its followers look and see it.
                Ok(0) => self.events.notify(&job, u64::MAX),
                Ok(newest) => self.events.notify(&job, newest),
                Err(_) => {}
            }
        }
        self.runs.wake();
    }

    /// Forwards changes by other replicas to followers, runs and runners, forever.
    async fn listen(&self) {
        let missed = tokio::sync::Notify::new();
        let on_notice = |notice: Option<Notice>| match notice {
            Some(notice) => {
                self.events.notify(&notice.job, notice.sequence);
                if let Some(run) = self.runs.get(&notice.job) {
                    run.apply_requested_state(notice.state);
                }
                if notice.state == JobState::Queued {
                    self.runs.wake();
                }
            }
            None => missed.notify_one(),
        };
        tokio::select! {
            () = self.store.listen(on_notice) => {}
            () = async { loop { missed.notified().await; self.refresh().await; } } => {}
        }
    }
}
