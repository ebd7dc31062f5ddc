//! Whose a job or a dataset is. Permission comes before existence: to a caller who may not see it,
//! what exists and what does not look the same.

use crate::domain::access::{Caller, Role};
use crate::domain::dataset::Dataset;
use crate::domain::job::Job;
use crate::domain::names::PolicyName;
use crate::service::audit::AUDIT;
use crate::service::error::{Result, ServiceError};
use crate::service::store::Store;

/// Refuses a caller without `role`.
pub fn require(caller: &Caller, role: Role) -> Result<()> {
    if caller.may(role) {
        return Ok(());
    }
    let message = format!("the token lacks the role {}: use one that has it", role.name());
    Err(ServiceError::PermissionDenied { message })
}

/// What `caller` may see of something found or not.
fn seen<T>(
    caller: &Caller,
    found: Result<T>,
    owner: impl Fn(&T) -> &str,
    name: impl Fn() -> String,
) -> Result<T> {
    match found {
        Ok(it) if caller.may_see(owner(&it)) => Ok(it),
        Ok(_) | Err(ServiceError::NotFound { .. }) if !caller.is_admin() => {
            let name = name();
            tracing::warn!(target: AUDIT, owner = caller.owner, resource = name, "refused");
            Err(ServiceError::PermissionDenied {
                message: format!("{name} does not exist, or is not yours"),
            })
        }
        other => other,
    }
}

/// Returns a job of the caller's.
pub(in crate::service) async fn own_job(store: &Store, caller: &Caller, id: &str) -> Result<Job> {
    seen(caller, store.job(id).await, |j| &j.owner, || format!("trainingJobs/{id}"))
}

/// Returns a dataset of the caller's.
pub(in crate::service) async fn own_dataset(
    store: &Store,
    caller: &Caller,
    id: &str,
) -> Result<Dataset> {
    seen(caller, store.dataset(id).await, |d| &d.owner, || format!("datasets/{id}"))
}

/// Refuses weights of a job that is not the caller's; models are everyone's.
pub(in crate::service) async fn check_weights(
    store: &Store,
    caller: &Caller,
    name: &PolicyName,
) -> Result<()> {
    match name {
        PolicyName::Checkpoint { job, .. } => own_job(store, caller, job).await.map(|_| ()),
        PolicyName::Model(_) => Ok(()),
    }
}
