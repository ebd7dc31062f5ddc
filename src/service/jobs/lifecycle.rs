//! Changes that a client can make to an existing job: update, pause, resume, cancel, delete. The
//! allowed state transitions are defined in `domain`.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::JobService;
use super::registry::count_ended;
use super::validate::{check_changeable, check_priority};
use crate::domain::access::Caller;
use crate::domain::job::{EventKind, Job, JobRequest, JobState};
use crate::domain::reason::Reason;
use crate::domain::violation::{Violations, quoted};
use crate::service::audit::audit;
use crate::service::auth::access::own_job;
use crate::service::error::{Result, ServiceError};
use crate::service::in_use::{DependentJobs, Needed, check};
use crate::service::store::now;

/// Changes to the editable fields of a job; `None` leaves a field as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JobChanges {
    /// Display name.
    pub display_name: Option<String>,
    /// New labels; they replace all existing ones.
    pub labels: Option<BTreeMap<String, String>>,
    /// Priority; jobs with a higher one run first.
    pub priority: Option<i32>,
    /// Time to live after the end of the job, in milliseconds; `Some(None)` means that the job
    /// never expires.
    pub ttl_ms: Option<Option<u64>>,
}

impl JobChanges {
    /// Makes the changes to a job's request.
    ///
    /// # Errors
    /// `InvalidArgument` for bad values, or if the caller may not give the priority.
    fn apply(self, caller: &Caller, highest: i32, request: &mut JobRequest) -> Result<()> {
        request.display_name = self
            .display_name
            .unwrap_or(std::mem::take(&mut request.display_name));
        request.labels = self.labels.unwrap_or(std::mem::take(&mut request.labels));
        request.priority = self.priority.unwrap_or(request.priority);
        request.ttl_ms = self.ttl_ms.unwrap_or(request.ttl_ms);
        let mut bad = Violations::default();
        check_changeable(request, &mut bad);
        if self.priority.is_some() {
            check_priority(caller, request.priority, highest, &mut bad);
        }
        Ok(bad.into_result()?)
    }
}

fn refused(job: &Job, reason: Reason, remedy: &str) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason,
        message: format!("trainingJobs/{} is {}: {remedy}", job.id, job.state.name()),
    }
}

/// Returns what a caller can do so that a job that has not ended can be deleted.
fn before_deletion(state: JobState) -> &'static str {
    match state {
        JobState::Cancelling => "wait until it has ended",
        _ => "cancel it first",
    }
}

impl JobService {
    /// Changes the display name, labels, priority and time to live of a job. If `etag` is given,
    /// the job must still have it.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such job; `Aborted` if the job has
    /// changed since the etag was read; `InvalidArgument` for bad values.
    pub async fn update_job(
        self: &Arc<Self>,
        caller: &Caller,
        id: &str,
        etag: Option<&str>,
        changes: JobChanges,
    ) -> Result<Job> {
        own_job(&self.store, caller, id).await?;
        let (service, caller, id) = (self.clone(), caller.clone(), id.to_owned());
        let etag = etag.map(str::to_owned);
        let updating = async move {
            let change = |job: &mut Job| {
                if etag.as_ref().is_some_and(|e| *e != job.etag()) {
                    let message = format!(
                        "trainingJobs/{id} has changed since etag {} was read: read it again",
                        quoted(etag.as_deref().unwrap_or_default())
                    );
                    return Err(ServiceError::Aborted {
                        reason: Reason::EtagStale,
                        message,
                    });
                }
                let highest = service.max_client_priority;
                changes.apply(&caller, highest, &mut job.request)?;
                Ok(Vec::new())
            };
            let (job, _) = service.store.change_job(&id, change).await?;
            service.runs.wake();
            audit(&caller, "update", &format!("trainingJobs/{id}"));
            Ok::<_, ServiceError>(job)
        };
        self.detached.to_its_end(updating).await
    }

    /// Pauses a job. A running job first finishes its current unit of work and writes a checkpoint.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such job; `FailedPrecondition` if it
    /// has ended or is being cancelled.
    pub async fn pause_job(self: &Arc<Self>, caller: &Caller, id: &str) -> Result<Job> {
        own_job(&self.store, caller, id).await?;
        self.move_job(caller, id, "pause", "paused by a client", |job| {
            match job.state {
                JobState::Queued => Ok(JobState::Paused),
                JobState::Preparing | JobState::Running => Ok(JobState::Pausing),
                JobState::Pausing | JobState::Paused => Ok(job.state),
                JobState::Cancelling => Err(refused(job, Reason::Cancelling, "it will end soon")),
                _ => Err(refused(
                    job,
                    Reason::AlreadyEnded,
                    "there is nothing to pause",
                )),
            }
        })
        .await
    }

    /// Requeues a paused job.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such job; `FailedPrecondition`
    /// (`MODEL_CHANGED`) if the server's model differs from the one that the job was created with;
    /// also if the job is neither paused nor queued.
    pub async fn resume_job(self: &Arc<Self>, caller: &Caller, id: &str) -> Result<Job> {
        let job = own_job(&self.store, caller, id).await?;
        self.policies.check_base(&job)?;
        self.policies.check_reference(&job).await?;
        self.runs.forget_postponed(id);
        self.move_job(
            caller,
            id,
            "resume",
            "resumed by a client",
            |job| match job.state {
                JobState::Paused => Ok(JobState::Queued),
                JobState::Queued => Ok(JobState::Queued),
                JobState::Pausing => {
                    Err(refused(job, Reason::Pausing, "resume it when it is paused"))
                }
                _ => Err(refused(
                    job,
                    Reason::NotPaused,
                    "only a paused job can be resumed",
                )),
            },
        )
        .await
    }

    /// Cancels a job. A running job stops after its current unit of work.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such job; `FailedPrecondition` if it
    /// has already ended.
    pub async fn cancel_job(self: &Arc<Self>, caller: &Caller, id: &str) -> Result<Job> {
        own_job(&self.store, caller, id).await?;
        self.move_job(
            caller,
            id,
            "cancel",
            "cancelled by a client",
            |job| match job.state {
                JobState::Queued | JobState::Paused => Ok(JobState::Cancelled),
                JobState::Preparing
                | JobState::Running
                | JobState::Pausing
                | JobState::Cancelling => Ok(JobState::Cancelling),
                _ => Err(refused(
                    job,
                    Reason::AlreadyEnded,
                    "there is nothing to cancel",
                )),
            },
        )
        .await
    }

    /// Changes a job to the state that `to` returns, and notifies its run, the followers of its
    /// events, and the runners if it is queued.
    async fn move_job(
        self: &Arc<Self>,
        caller: &Caller,
        id: &str,
        action: &'static str,
        reason: &'static str,
        to: impl FnOnce(&Job) -> Result<JobState> + Send + 'static,
    ) -> Result<Job> {
        let (service, caller, id) = (self.clone(), caller.clone(), id.to_owned());
        let moving = async move {
            let mut ended = false;
            let (job, sequence) = service
                .store
                .change_job(&id, |job| {
                    let (from, to) = (job.state, to(job)?);
                    ended = from != to && to.is_final();
                    if from == to {
                        return Ok(Vec::new());
                    }
                    job.state = to;
                    if to == JobState::Queued {
                        job.queued_since = now();
                    }
                    Ok(vec![EventKind::StateChange {
                        from: Some(from),
                        to,
                        reason: reason.to_owned(),
                    }])
                })
                .await?;
            if ended {
                count_ended(job.state);
            }
            // A run on another replica is notified through the database.
            if let Some(run) = service.runs.get(&id) {
                run.apply_requested_state(job.state);
            }
            service.events.notify(&id, sequence);
            if job.state == JobState::Queued {
                service.runs.wake();
            }
            audit(&caller, action, &format!("trainingJobs/{id}"));
            Ok::<_, ServiceError>(job)
        };
        self.detached.to_its_end(moving).await
    }

    /// Deletes an ended job with its events, checkpoints and exports.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such job; `FailedPrecondition` if it
    /// has not ended, or if another job needs its weights; `Unavailable` if the artifact store is
    /// not the database's or does not answer.
    pub async fn delete_job(self: &Arc<Self>, caller: &Caller, id: &str) -> Result<()> {
        own_job(&self.store, caller, id).await?;
        self.remove_job(caller, id, false).await
    }

    /// Deletes an ended job whose time to live is over.
    ///
    /// # Errors
    /// `NotFound` if its time to live has been prolonged since it was listed as expired.
    pub(in crate::service) async fn delete_expired(self: &Arc<Self>, id: &str) -> Result<()> {
        self.remove_job(&Caller::unrestricted(), id, true).await
    }

    async fn remove_job(self: &Arc<Self>, caller: &Caller, id: &str, expired: bool) -> Result<()> {
        // A job's files could not be found again once its row is deleted. So nothing is removed
        // while the artifact store is unavailable.
        self.artifacts.check_artifact_store().await?;
        let (service, caller, id) = (self.clone(), caller.clone(), id.to_owned());
        let removing = async move {
            let refuse = |job: &Job, users: &DependentJobs| {
                if !job.state.is_final() {
                    let remedy = before_deletion(job.state);
                    return Err(refused(job, Reason::NotEnded, remedy));
                }
                let needed = Needed::Weights {
                    job: &id,
                    step: None,
                };
                check(&caller, users, needed)
            };
            // The row is deleted first: its transaction sees what other clients have changed or
            // begun meanwhile.
            service.store.delete_job(&id, expired, refuse).await?;
            let checkpoints = service.artifacts.checkpoints(&id);
            service.engine.evict_policy(&checkpoints);
            audit(&caller, "delete", &format!("trainingJobs/{id}"));
            service.events.notify(&id, u64::MAX);
            service.artifacts.remove_job(&id).await
        };
        self.detached.to_its_end(removing).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_is_being_cancelled_need_not_be_cancelled_before_it_is_deleted() {
        assert_eq!(before_deletion(JobState::Running), "cancel it first");
        assert_eq!(
            before_deletion(JobState::Cancelling),
            "wait until it has ended"
        );
    }
}
