//! What happens by itself: leases are renewed, jobs of dead workers put back, expired ones deleted, and other replicas' changes passed on.

use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::error::{Result, ServiceError};
use super::service::Service;
use super::store::jobs::Expired;
use super::store::listen::Notice;
use crate::domain::job::JobState;

/// Every how many rounds old copies are looked for.
const SWEEP: u64 = 60;
/// What an upload may take between its file and its row.
const UPLOADING: Duration = Duration::from_secs(3600);
/// Expired jobs that are deleted at a time.
const DELETIONS: usize = 64;

/// Renews leases for ever: nothing else may hold this up.
pub(super) async fn renewals(service: Service) {
    // Two renewals may fail before a lease runs out.
    let pause = service.inner.store.lease_time() / 3;
    loop {
        tokio::time::sleep(pause).await;
        renew(&service, pause).await;
    }
}

/// Keeps house until the service drains.
pub(super) async fn run(service: Service) {
    let mut pause = tokio::time::interval(service.inner.store.lease_time() / 3);
    pause.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut expired = Expired::default();
    for tick in 0_u64.. {
        pause.tick().await;
        metrics::gauge!("bradley_store_up").set(f64::from(u8::from(service.inner.store.ping().await.is_ok())));
        if service.is_draining() {
            continue;
        }
        if let Err(e) = reclaim(&service, false).await {
            tracing::warn!(error = %e, "jobs of dead workers cannot be looked for");
        }
        if let Err(e) = expire(&service, &mut expired).await {
            tracing::warn!(error = %e, "expired jobs cannot be deleted");
        }
        if let Err(e) = count(&service).await {
            tracing::debug!(error = %e, "jobs cannot be counted");
        }
        // Restores what a caller who left, or a lost connection, kept from being told.
        refresh(&service).await;
        if tick.is_multiple_of(SWEEP)
            && let Err(e) = sweep(&service).await
        {
            tracing::warn!(error = %e, "copies of what was deleted elsewhere cannot be removed");
        }
    }
}

/// Shows how many jobs are in each state, of all replicas, and how many of them this version cannot read.
async fn count(service: &Service) -> Result<()> {
    metrics::gauge!("bradley_unreadable_jobs").set(service.inner.store.unreadable_jobs().await? as f64);
    let counts = service.inner.store.job_counts().await?;
    for state in JobState::ALL {
        let n = counts.get(state.name()).copied().unwrap_or_default();
        metrics::gauge!("bradley_jobs", "state" => state.name()).set(n as f64);
    }
    Ok(())
}

/// Removes local copies of jobs and datasets that another replica deleted. What the artifact store has is left alone: that a database does not know a
/// job proves nothing, for it may be an older one, or another.
async fn sweep(service: &Service) -> Result<()> {
    if !service.inner.artifacts.holds_copies_only() {
        return Ok(());
    }
    let (jobs, datasets) = service.inner.artifacts.local().await?;
    for id in jobs {
        // One that is being made has a copy of its adapter before it has a row.
        let old = service.inner.artifacts.job_age(&id).is_some_and(|age| age > UPLOADING);
        if old && matches!(service.inner.store.job(&id).await, Err(ServiceError::NotFound { .. })) {
            service.inner.artifacts.drop_local_job(&id).await?;
        }
    }
    for id in datasets {
        // One that is being uploaded has no row yet.
        let old = service.inner.artifacts.dataset_age(&id).is_some_and(|age| age > UPLOADING);
        if old && matches!(service.inner.store.dataset(&id).await, Err(ServiceError::NotFound { .. })) {
            service.inner.artifacts.drop_local_dataset(&id).await?;
        }
    }
    Ok(())
}

/// Renews the leases of this process; a run whose lease is another's is stopped, and told what clients asked for meanwhile.
async fn renew(service: &Service, patience: Duration) {
    let all: Vec<_> = service.inner.held.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
    for held in all {
        let renewed = tokio::time::timeout(patience, service.inner.store.renew(&held.lease)).await;
        match renewed.unwrap_or_else(|_| Err(ServiceError::internal("the database does not answer"))) {
            Ok(Some(state)) => held.heed(state),
            Ok(None) => {
                tracing::warn!(job = held.lease.job, "another worker has the job: its run here is stopped");
                held.control.cancel();
            }
            // Until somebody takes the job, it is still ours.
            Err(e) => tracing::warn!(job = held.lease.job, error = %e, "the lease cannot be renewed"),
        }
    }
}

/// Puts jobs whose worker is gone back in the queue; see `Store::reclaim`.
pub(super) async fn reclaim(service: &Service, all: bool) -> Result<()> {
    for (job, sequence) in service.inner.store.reclaim(all).await? {
        tracing::info!(job = job.id, to = job.state.name(), "job recovered");
        match job.state.is_final() {
            true => job_ended(job.state),
            false => metrics::counter!("bradley_jobs_recovered_total").increment(1),
        }
        service.inner.feed.notify(&job.id, sequence);
        service.inner.wake();
    }
    Ok(())
}

/// Counts a job that this process brought to its end.
pub(super) fn job_ended(state: JobState) {
    metrics::counter!("bradley_jobs_ended_total", "state" => state.name()).increment(1);
}

/// Deletes the next expired jobs. Each round goes on where the one before ended, so that jobs which cannot be deleted do not hold up the others.
async fn expire(service: &Service, after: &mut Expired) -> Result<()> {
    let (jobs, next) = service.inner.store.expired_jobs(*after, DELETIONS).await?;
    *after = next;
    for job in jobs {
        match service.delete_expired(&job).await {
            Ok(()) => tracing::info!(job, "job deleted: its time to live is over"),
            // Another job starts from it; another version wrote it; another replica was faster; or its time to live was prolonged meanwhile.
            Err(e) => tracing::debug!(job, error = %e, "an expired job cannot be deleted yet"),
        }
    }
    Ok(())
}

/// Tells followers what may have been missed.
async fn refresh(service: &Service) {
    for job in service.inner.feed.followed() {
        if let Ok(newest) = service.inner.store.newest_sequence(&job).await {
            service.inner.feed.notify(&job, newest);
        }
    }
    service.inner.wake();
}

/// Passes on what other replicas change, for ever.
pub(super) async fn listen(service: Service) {
    let inner = service.inner.clone();
    let heard = tokio::sync::Notify::new();
    let told = |notice: Option<Notice>| match notice {
        Some(notice) => {
            inner.feed.notify(&notice.job, notice.sequence);
            if let Some(held) = service.held(&notice.job) {
                held.heed(notice.state);
            }
            if notice.state == JobState::Queued {
                inner.wake();
            }
        }
        None => heard.notify_one(),
    };
    tokio::select! {
        () = inner.store.listen(told) => {}
        () = async { loop { heard.notified().await; refresh(&service).await; } } => {}
    }
}
