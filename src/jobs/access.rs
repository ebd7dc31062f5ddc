//! Whose a job or a dataset is. Permission comes before existence: to a caller who may not see it, what exists and what does not look the same.

use super::audit::AUDIT;
use super::error::{Result, ServiceError};
use super::service::Service;
use crate::domain::access::{Caller, Role};
use crate::domain::dataset::Dataset;
use crate::domain::job::Job;
use crate::domain::names::PolicyName;

/// Refuses a caller without `role`.
pub fn require(caller: &Caller, role: Role) -> Result<()> {
    if caller.may(role) {
        return Ok(());
    }
    let message = format!("the token lacks the role {}: use one that has it", role.name());
    Err(ServiceError::PermissionDenied { message })
}

/// What `caller` may see of something found or not.
fn seen<T>(caller: &Caller, found: Result<T>, owner: impl Fn(&T) -> &str, name: impl Fn() -> String) -> Result<T> {
    match found {
        Ok(it) if caller.may_see(owner(&it)) => Ok(it),
        Ok(_) | Err(ServiceError::NotFound { .. }) if !caller.is_admin() => {
            let name = name();
            tracing::warn!(target: AUDIT, owner = caller.owner, resource = name, "refused");
            Err(ServiceError::PermissionDenied { message: format!("{name} does not exist, or is not yours") })
        }
        other => other,
    }
}

impl Service {
    /// A job of the caller's.
    pub(super) async fn own_job(&self, caller: &Caller, id: &str) -> Result<Job> {
        seen(caller, self.inner.store.job(id).await, |j| &j.owner, || format!("trainingJobs/{id}"))
    }

    /// A dataset of the caller's.
    pub(super) async fn own_dataset(&self, caller: &Caller, id: &str) -> Result<Dataset> {
        seen(caller, self.inner.store.dataset(id).await, |d| &d.owner, || format!("datasets/{id}"))
    }

    /// Refuses weights of a job that is not the caller's; models are everyone's.
    pub(super) async fn check_weights(&self, caller: &Caller, name: &PolicyName) -> Result<()> {
        match name {
            PolicyName::Checkpoint { job, .. } => self.own_job(caller, job).await.map(|_| ()),
            PolicyName::Model(_) => Ok(()),
        }
    }
}
