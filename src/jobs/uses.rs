//! Who needs what: datasets and weights of unfinished jobs are not removed. The store asks in the transaction that removes, while it holds the row that
//! a new job's transaction would have to see.

use super::error::{Result, ServiceError};
use crate::domain::access::Caller;
use crate::domain::job::{Evaluation, Job};
use crate::domain::names::{CheckpointRef, PolicyName};

/// The unfinished jobs.
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
            Needed::Dataset(id) => request.dataset == id || matches!(&request.evaluation, Evaluation::Dataset(d) if d == id),
            Needed::Weights { job, step } => {
                let names = [Some(&request.policy), request.reference.as_ref()];
                let named = names.into_iter().flatten().any(|name| match name {
                    PolicyName::Checkpoint { job: j, which } => j == job && step.is_none_or(|s| *which == CheckpointRef::Step(s)),
                    PolicyName::Model(_) => false,
                });
                named && user.id != job
            }
        }
    }
}

/// Refuses when one of `users` needs it.
pub(super) fn check(caller: &Caller, users: &Users, needed: Needed<'_>) -> Result<()> {
    let (Needed::Dataset(id) | Needed::Weights { job: id, .. }) = needed;
    if users.unreadable.iter().any(|request| request.contains(id)) {
        let message = "a job that this version of the server cannot read needs it: use the version that wrote the job".to_owned();
        return Err(ServiceError::FailedPrecondition { reason: "IN_USE", message });
    }
    let Some(user) = users.jobs.iter().find(|user| needed.by(user)) else { return Ok(()) };
    let what = match needed {
        Needed::Dataset(id) => format!("datasets/{id}"),
        Needed::Weights { .. } => "these weights".to_owned(),
    };
    let message = match caller.may_see(&user.owner) {
        true => format!("trainingJobs/{} is {} and needs {what}: wait for it or cancel it", user.id, user.state.name()),
        false => format!("another client's job needs {what}: try again later"),
    };
    Err(ServiceError::FailedPrecondition { reason: "IN_USE", message })
}
