//! What a client may do to a job that exists: change, pause, resume, cancel, delete. Transitions are the domain's to allow.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::audit::audit;
use super::error::{Result, ServiceError};
use super::housekeeping::job_ended;
use super::service::Service;
use super::store::now;
use super::uses::{Needed, Users, check};
use crate::domain::access::Caller;
use crate::domain::job::{EventKind, Job, JobRequest, JobState};
use crate::domain::reason::Reason;
use crate::domain::violation::{Violations, quoted};

const PRIORITIES: RangeInclusive<i32> = -1000..=1000;

/// What of a job may change while it lives; `None` leaves it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JobChanges {
    /// The title.
    pub display_name: Option<String>,
    /// The labels, all of them.
    pub labels: Option<BTreeMap<String, String>>,
    /// Higher goes first.
    pub priority: Option<i32>,
    /// Milliseconds that it is kept after its end; `Some(None)` is for ever.
    pub ttl_ms: Option<Option<u64>>,
}

/// Checks the fields that may change.
pub(super) fn check_changeable(request: &JobRequest, bad: &mut Violations) {
    if request.display_name.chars().count() > 256 {
        bad.push("training_job.display_name", "has more than 256 characters");
    }
    if request.labels.len() > 64 || request.labels.iter().any(|(k, v)| k.is_empty() || k.len() > 128 || v.len() > 128) {
        bad.push("training_job.labels", "must be at most 64 labels with keys of 1 to 128 and values of at most 128 bytes");
    }
    if !PRIORITIES.contains(&request.priority) {
        bad.push("training_job.priority", format!("is {}: it must lie in -1000..=1000", request.priority));
    }
}

/// Clients may not push each other aside without end.
pub(super) fn check_priority(caller: &Caller, priority: i32, highest: i32, bad: &mut Violations) {
    if !caller.is_admin() && priority > highest {
        let message = format!("is {priority}: {highest} is the highest that this server lets clients give (max_client_priority)");
        bad.push("training_job.priority", message);
    }
}

fn refused(job: &Job, reason: Reason, remedy: &str) -> ServiceError {
    ServiceError::FailedPrecondition { reason, message: format!("trainingJobs/{} is {}: {remedy}", job.id, job.state.name()) }
}

impl Service {
    /// Changes title, labels and priority; with `etag`, only while the job has it.
    ///
    /// # Errors
    /// `Aborted` when the job has changed since the etag was read.
    pub async fn update_job(&self, caller: &Caller, id: &str, etag: Option<&str>, changes: JobChanges) -> Result<Job> {
        self.own_job(caller, id).await?;
        let highest = self.inner.options.max_client_priority;
        let (job, _) = self
            .inner
            .store
            .change_job(id, |job| {
                if etag.is_some_and(|e| e != job.etag()) {
                    let message =
                        format!("trainingJobs/{id} has changed since etag {} was read: read it again", quoted(etag.unwrap_or_default()));
                    return Err(ServiceError::Aborted { reason: Reason::EtagStale, message });
                }
                let request = &mut job.request;
                request.display_name = changes.display_name.unwrap_or(std::mem::take(&mut request.display_name));
                request.labels = changes.labels.unwrap_or(std::mem::take(&mut request.labels));
                request.priority = changes.priority.unwrap_or(request.priority);
                request.ttl_ms = changes.ttl_ms.unwrap_or(request.ttl_ms);
                let mut bad = Violations::default();
                check_changeable(request, &mut bad);
                if changes.priority.is_some() {
                    check_priority(caller, request.priority, highest, &mut bad);
                }
                bad.into_result()?;
                Ok(Vec::new())
            })
            .await?;
        self.inner.wake();
        audit(caller, "update", &format!("trainingJobs/{id}"));
        Ok(job)
    }

    /// Pauses a job; one that is on the device writes a checkpoint after its current unit.
    pub async fn pause_job(&self, caller: &Caller, id: &str) -> Result<Job> {
        self.own_job(caller, id).await?;
        self.move_job(caller, id, "pause", "paused by a client", |job| match job.state {
            JobState::Queued => Ok(JobState::Paused),
            JobState::Preparing | JobState::Running => Ok(JobState::Pausing),
            JobState::Pausing | JobState::Paused => Ok(job.state),
            JobState::Cancelling => Err(refused(job, Reason::Cancelling, "it will end soon")),
            _ => Err(refused(job, Reason::AlreadyEnded, "there is nothing to pause")),
        })
        .await
    }

    /// Puts a paused job back in the queue.
    ///
    /// # Errors
    /// `FailedPrecondition` (`MODEL_CHANGED`) when the model that this server has is not the one that the job was made with.
    pub async fn resume_job(&self, caller: &Caller, id: &str) -> Result<Job> {
        let job = self.own_job(caller, id).await?;
        self.check_base(&job)?;
        self.check_reference(&job).await?;
        self.inner.postponed.forget(id);
        let job = self
            .move_job(caller, id, "resume", "resumed by a client", |job| match job.state {
                JobState::Paused => Ok(JobState::Queued),
                JobState::Queued => Ok(JobState::Queued),
                JobState::Pausing => Err(refused(job, Reason::Pausing, "resume it when it is paused")),
                _ => Err(refused(job, Reason::NotPaused, "only a paused job can be resumed")),
            })
            .await?;
        self.inner.wake();
        Ok(job)
    }

    /// Cancels a job; one that is on the device stops after its current unit.
    pub async fn cancel_job(&self, caller: &Caller, id: &str) -> Result<Job> {
        self.own_job(caller, id).await?;
        self.move_job(caller, id, "cancel", "cancelled by a client", |job| match job.state {
            JobState::Queued | JobState::Paused => Ok(JobState::Cancelled),
            JobState::Preparing | JobState::Running | JobState::Pausing | JobState::Cancelling => Ok(JobState::Cancelling),
            _ => Err(refused(job, Reason::AlreadyEnded, "there is nothing to cancel")),
        })
        .await
    }

    /// Moves a job to the state that `to` gives, and tells its run and its followers.
    async fn move_job(
        &self,
        caller: &Caller,
        id: &str,
        action: &'static str,
        reason: &str,
        to: impl FnOnce(&Job) -> Result<JobState> + Send,
    ) -> Result<Job> {
        let mut ended = false;
        let (job, sequence) = self
            .inner
            .store
            .change_job(id, |job| {
                let (from, to) = (job.state, to(job)?);
                ended = from != to && to.is_final();
                if from == to {
                    return Ok(Vec::new());
                }
                job.state = to;
                if to == JobState::Queued {
                    job.turn = now();
                }
                Ok(vec![EventKind::StateChange { from: Some(from), to, reason: reason.to_owned() }])
            })
            .await?;
        if ended {
            job_ended(job.state);
        }
        // Another replica's run is told by the database.
        if let Some(held) = self.held(id) {
            held.heed(job.state);
        }
        self.inner.feed.notify(id, sequence);
        audit(caller, action, &format!("trainingJobs/{id}"));
        Ok(job)
    }

    /// Deletes an ended job with its events, checkpoints and exports.
    pub async fn delete_job(&self, caller: &Caller, id: &str) -> Result<()> {
        self.own_job(caller, id).await?;
        self.remove_job(caller, id, false).await
    }

    /// Deletes an ended job whose time to live is over.
    ///
    /// # Errors
    /// `NotFound` when it has been prolonged since the job was looked for.
    pub(super) async fn delete_expired(&self, id: &str) -> Result<()> {
        self.remove_job(&Caller::anyone(), id, true).await
    }

    async fn remove_job(&self, caller: &Caller, id: &str, expired: bool) -> Result<()> {
        let refuse = |job: &Job, users: &Users| {
            if !job.state.is_final() {
                return Err(refused(job, Reason::NotEnded, "cancel it first"));
            }
            check(caller, users, Needed::Weights { job: id, step: None })
        };
        // Files of a job without a row would be left for good: nothing is removed while the artifact store is away.
        self.inner.artifacts.check_store().await?;
        // The row goes first: what another client has changed or begun meanwhile is seen in the transaction that removes it.
        self.inner.store.delete_job(id, expired, refuse).await?;
        self.inner.engine.evict_policy(&self.inner.artifacts.checkpoints(id));
        audit(caller, "delete", &format!("trainingJobs/{id}"));
        self.inner.feed.notify(id, u64::MAX);
        self.inner.artifacts.remove_job(id).await
    }
}
