//! Changes that a client can make to an existing job: update, pause, resume, cancel, delete. The
//! allowed state transitions are defined in `domain`.

use std::collections::BTreeMap;

use super::JobService;
use super::registry::count_ended;
use super::validate::{check_changeable, check_priority};
use crate::domain::access::Caller;
use crate::domain::job::{EventKind, Job, JobState};
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

fn refused(job: &Job, reason: Reason, remedy: &str) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason,
        message: format!("trainingJobs/{} is {}: {remedy}", job.id, job.state.name()),
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
        &self,
        caller: &Caller,
        id: &str,
        etag: Option<&str>,
        changes: JobChanges,
    ) -> Result<Job> {
        own_job(&self.store, caller, id).await?;
        let highest = self.max_client_priority;
        let (job, _) = self
            .store
            .change_job(id, |job| {
                if etag.is_some_and(|e| e != job.etag()) {
                    let message = format!(
                        "trainingJobs/{id} has changed since etag {} was read: read it again",
                        quoted(etag.unwrap_or_default())
                    );
                    return Err(ServiceError::Aborted {
                        reason: Reason::EtagStale,
                        message,
                    });
                }
                let request = &mut job.request;
                request.display_name = changes
                    .display_name
                    .unwrap_or(std::mem::take(&mut request.display_name));
                request.labels = changes
                    .labels
                    .unwrap_or(std::mem::take(&mut request.labels));
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
        self.runs.wake();
        audit(caller, "update", &format!("trainingJobs/{id}"));
        Ok(job)
    }

    /// Pauses a job. A running job first finishes its current unit of work and writes a checkpoint.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such job; `FailedPrecondition` if it
    /// has ended or is being cancelled.
    pub async fn pause_job(&self, caller: &Caller, id: &str) -> Result<Job> {
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
    pub async fn resume_job(&self, caller: &Caller, id: &str) -> Result<Job> {
        let job = own_job(&self.store, caller, id).await?;
        self.policies.check_base(&job)?;
        self.policies.check_reference(&job).await?;
        self.runs.forget_postponed(id);
        let job = self
            .move_job(
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
            .await?;
        self.runs.wake();
        Ok(job)
    }

    /// Cancels a job. A running job stops after its current unit of work.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such job; `FailedPrecondition` if it
    /// has already ended.
    pub async fn cancel_job(&self, caller: &Caller, id: &str) -> Result<Job> {
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

    /// Changes a job to the state that `to` returns, and notifies its run and the followers of its
    /// events.
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
            .store
            .change_job(id, |job| {
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
        if let Some(run) = self.runs.get(id) {
            run.apply_requested_state(job.state);
        }
        self.events.notify(id, sequence);
        audit(caller, action, &format!("trainingJobs/{id}"));
        Ok(job)
    }

    /// Deletes an ended job with its events, checkpoints and exports.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such job; `FailedPrecondition` if it
    /// has not ended, or if another job needs its weights; `Unavailable` if the artifact store is
    /// not the database's or does not answer.
    pub async fn delete_job(&self, caller: &Caller, id: &str) -> Result<()> {
        own_job(&self.store, caller, id).await?;
        self.remove_job(caller, id, false).await
    }

    /// Deletes an ended job whose time to live is over.
    ///
    /// # Errors
    /// `NotFound` if its time to live has been prolonged since it was listed as expired.
    pub(in crate::service) async fn delete_expired(&self, id: &str) -> Result<()> {
        self.remove_job(&Caller::unrestricted(), id, true).await
    }

    async fn remove_job(&self, caller: &Caller, id: &str, expired: bool) -> Result<()> {
        let refuse = |job: &Job, users: &DependentJobs| {
            if !job.state.is_final() {
                return Err(refused(job, Reason::NotEnded, "cancel it first"));
            }
            check(
                caller,
                users,
                Needed::Weights {
                    job: id,
                    step: None,
                },
            )
        };
        // A job's files could not be found again once its row is deleted. So nothing is removed
        // while the artifact store is unavailable.
        self.artifacts.check_artifact_store().await?;
        // The row is deleted first: its transaction sees what other clients have changed or begun
        // meanwhile.
        self.store.delete_job(id, expired, refuse).await?;
        self.engine.evict_policy(&self.artifacts.checkpoints(id));
        audit(caller, "delete", &format!("trainingJobs/{id}"));
        self.events.notify(id, u64::MAX);
        self.artifacts.remove_job(id).await
    }
}
