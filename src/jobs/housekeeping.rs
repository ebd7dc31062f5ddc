//! What happens by itself: leases are renewed, jobs of dead workers put back, expired ones deleted, and other replicas' changes passed on.

use std::sync::PoisonError;

use super::error::Result;
use super::service::Service;
use super::store::Notice;
use crate::domain::access::Caller;

/// Expired jobs that are deleted at a time.
const DELETIONS: usize = 64;

/// Keeps house until the service drains and its last run has ended.
pub(super) async fn run(service: Service) {
    // Two renewals may fail before a lease runs out.
    let pause = service.inner.store.lease_time() / 3;
    loop {
        tokio::time::sleep(pause).await;
        renew(&service).await;
        if service.is_draining() {
            continue;
        }
        if let Err(e) = reclaim(&service, false).await {
            tracing::warn!(error = %e, "jobs of dead workers cannot be looked for");
        }
        if let Err(e) = expire(&service).await {
            tracing::warn!(error = %e, "expired jobs cannot be deleted");
        }
        if service.inner.store.is_shared() {
            refresh(&service).await;
        }
    }
}

/// Renews the leases of this process; a run whose lease is another's is stopped, and told what clients asked for meanwhile.
async fn renew(service: &Service) {
    let all: Vec<_> = service.inner.held.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
    for held in all {
        match service.inner.store.renew(&held.lease).await {
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
        metrics::counter!("bradley_jobs_recovered_total").increment(1);
        service.inner.feed.notify(&job.id, sequence);
        service.inner.wake.notify_one();
    }
    Ok(())
}

async fn expire(service: &Service) -> Result<()> {
    for job in service.inner.store.expired_jobs(DELETIONS).await? {
        match service.delete_job(&Caller::anyone(), &job.id).await {
            Ok(()) => tracing::info!(job = job.id, "job deleted: its time to live is over"),
            // Another job starts from it; or another replica was faster.
            Err(e) => tracing::debug!(job = job.id, error = %e, "an expired job cannot be deleted yet"),
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
    service.inner.wake.notify_one();
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
            inner.wake.notify_one();
        }
        None => heard.notify_one(),
    };
    tokio::select! {
        () = inner.store.listen(told) => {}
        () = async { loop { heard.notified().await; refresh(&service).await; } } => {}
    }
}
