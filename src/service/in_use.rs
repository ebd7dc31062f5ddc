//! Who needs what: datasets and weights of unfinished jobs are not removed, nor the references of
//! jobs that have checkpoints. The store asks in the transaction that removes, while it holds the
//! row that a new job's transaction would have to see.

use super::error::{Result, ServiceError};
use crate::domain::access::Caller;
use crate::domain::job::{Evaluation, Job};
use crate::domain::names::{CheckpointRef, PolicyName};
use crate::domain::reason::Reason;

/// The unfinished jobs. Where weights are removed, also ended jobs that have checkpoints: these are
/// scored against a reference.
#[derive(Clone, Debug, Default)]
pub(super) struct Users {
    /// Those that this version of the server can read.
    pub jobs: Vec<Job>,
    /// The requests of the others, as they are stored: an id that occurs in one is needed.
    pub unreadable: Vec<String>,
}

/// Something that a job may need.
#[derive(Clone, Copy, Debug)]
pub(super) enum Needed<'a> {
    /// A dataset.
    Dataset(&'a str),
    /// Weights of a job: those of one step, or any.
    Weights {
        /// The job's id.
        job: &'a str,
        /// The checkpoint.
        step: Option<u64>,
    },
}

impl Needed<'_> {
    fn by(self, user: &Job) -> bool {
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

/// The weights that a job needs. An unfinished job needs its policy and its reference. Of an ended
/// job, scoring with its checkpoints needs the reference, which is the policy where none is named,
/// and looks for the base model along the policies where the job does not name it.
fn weights_of(user: &Job) -> impl Iterator<Item = &PolicyName> {
    let request = &user.request;
    let unfinished = !user.state.is_final();
    let measured = request.spec.dpo.has_reference(request.reference.is_some());
    let needs_policy =
        unfinished || request.model.is_none() || (measured && request.reference.is_none());
    let policy = Some(&request.policy).filter(|_| needs_policy);
    let reference = request.reference.as_ref().filter(|_| unfinished || measured);
    policy.into_iter().chain(reference)
}

/// Refuses when one of `users` needs it.
pub(super) fn check(caller: &Caller, users: &Users, needed: Needed<'_>) -> Result<()> {
    let (Needed::Dataset(id) | Needed::Weights { job: id, .. }) = needed;
    if users.unreadable.iter().any(|request| request.contains(id)) {
        let message = "a job that this version of the server cannot read needs it: use the version that wrote the job".to_owned();
        return Err(ServiceError::FailedPrecondition { reason: Reason::InUse, message });
    }
    let Some(user) = users.jobs.iter().find(|user| needed.by(user)) else { return Ok(()) };
    let what = match needed {
        Needed::Dataset(id) => format!("datasets/{id}"),
        Needed::Weights { .. } => "these weights".to_owned(),
    };
    let message = match caller.may_see(&user.owner) {
        true if user.state.is_final() => {
            format!(
                "the checkpoints of trainingJobs/{} are scored against {what}: delete that job first",
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
    Err(ServiceError::FailedPrecondition { reason: Reason::InUse, message })
}
