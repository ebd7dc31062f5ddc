//! Checks whether a job still needs a dataset or weights. Inputs of unfinished jobs and references
//! of jobs that have checkpoints cannot be deleted. The store runs the check in the transaction
//! that deletes, while it holds a lock on the row that the creation of a new job must lock, too.

use super::error::{Result, ServiceError};
use crate::domain::access::Caller;
use crate::domain::job::{Evaluation, Job};
use crate::domain::names::{CheckpointRef, PolicyName};
use crate::domain::reason::Reason;

/// Jobs that may need a resource: the unfinished jobs and, if weights are to be deleted, also ended
/// jobs that have checkpoints, because these are scored against a reference.
#[derive(Clone, Debug, Default)]
pub(super) struct DependentJobs {
    /// Jobs that this version of the server can read.
    pub jobs: Vec<Job>,
    /// Stored requests of jobs that this version cannot read. Such a job is taken to need every id
    /// that occurs in its request.
    pub unreadable: Vec<String>,
}

/// A resource that a job may need.
#[derive(Clone, Copy, Debug)]
pub(super) enum Needed<'a> {
    Dataset(&'a str),
    /// Weights of a job: those of one step, or of any step if `step` is `None`.
    Weights {
        job: &'a str,
        /// Step of the checkpoint; `None` for all checkpoints of the job.
        step: Option<u64>,
    },
}

impl Needed<'_> {
    fn is_needed_by(self, user: &Job) -> bool {
        let request = &user.request;
        match self {
            Needed::Dataset(id) => {
                request.dataset == id
                    || matches!(&request.evaluation, Evaluation::Dataset(d) if d == id)
            }
            Needed::Weights { job, step } => {
                let named = weights_of(user).any(|name| match name {
                    PolicyName::Checkpoint { job: j, which } => {
                        j == job && step.is_none_or(|s| *which == CheckpointRef::Step(s))
                    }
                    PolicyName::Model(_) => false,
                });
                named && user.id != job
            }
        }
    }
}

/// Returns the weights that a job needs. An unfinished job needs its policy and its reference. The
/// checkpoints of an ended job are scored against its reference (the policy if no reference is
/// named). If the request does not name the base model, it is found by following the policies.
fn weights_of(user: &Job) -> impl Iterator<Item = &PolicyName> {
    let request = &user.request;
    let unfinished = !user.state.is_final();
    let has_reference = request.spec.dpo.has_reference(request.reference.is_some());
    let needs_policy =
        unfinished || request.model.is_none() || (has_reference && request.reference.is_none());
    let policy = Some(&request.policy).filter(|_| needs_policy);
    let reference = request
        .reference
        .as_ref()
        .filter(|_| unfinished || has_reference);
    policy.into_iter().chain(reference)
}

/// Checks that none of `users` needs the resource.
///
/// # Errors
/// `FailedPrecondition` (`IN_USE`) if one does.
pub(super) fn check(caller: &Caller, users: &DependentJobs, needed: Needed<'_>) -> Result<()> {
    let (Needed::Dataset(id) | Needed::Weights { job: id, .. }) = needed;
    if users.unreadable.iter().any(|request| request.contains(id)) {
        let message =
            "a job that this version of the server cannot read needs it: use the version that \
             wrote the job"
                .to_owned();
        return Err(ServiceError::FailedPrecondition {
            reason: Reason::InUse,
            message,
        });
    }
    let Some(user) = users.jobs.iter().find(|user| needed.is_needed_by(user)) else {
        return Ok(());
    };
    let what = match needed {
        Needed::Dataset(id) => format!("datasets/{id}"),
        Needed::Weights { .. } => "these weights".to_owned(),
    };
    let message = match caller.may_see(&user.owner) {
        true if user.state.is_final() => {
            format!(
                "the checkpoints of trainingJobs/{} are scored against {what}: delete that job \
                 first",
                user.id
            )
        }
        true => format!(
            "trainingJobs/{} is {} and needs {what}: wait for it or cancel it",
            user.id,
            user.state.name()
        ),
        false => format!("another client's job needs {what}: try again later"),
    };
    Err(ServiceError::FailedPrecondition {
        reason: Reason::InUse,
        message,
    })
}
