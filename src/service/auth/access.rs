//! Ownership checks for jobs and datasets. A caller who may not see a resource gets the same error
//! whether it exists or not, so that ids cannot be probed.

use crate::domain::access::{Caller, Role};
use crate::domain::dataset::Dataset;
use crate::domain::job::Job;
use crate::domain::names::PolicyName;
use crate::service::audit::AUDIT;
use crate::service::error::{Result, ServiceError};
use crate::service::store::Store;

/// Checks that a caller has `role`.
///
/// # Errors
/// `PermissionDenied` if not.
pub fn require(caller: &Caller, role: Role) -> Result<()> {
    if caller.may(role) {
        return Ok(());
    }
    let message = format!(
        "the token lacks the role {}: use one that has it",
        role.name()
    );
    Err(ServiceError::PermissionDenied { message })
}

/// Returns what was looked up if `caller` may see it. To others than administrators, a missing
/// resource and another client's look the same.
fn check_visible<T>(
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
                message: format!("{name} does not exist, or belongs to another client"),
            })
        }
        other => other,
    }
}

/// Returns a job that the caller owns (any job for administrators).
///
/// # Errors
/// `PermissionDenied` if the job does not exist or belongs to another client; `NotFound` for
/// administrators.
pub(in crate::service) async fn own_job(store: &Store, caller: &Caller, id: &str) -> Result<Job> {
    check_visible(
        caller,
        store.job(id).await,
        |j| &j.owner,
        || format!("trainingJobs/{id}"),
    )
}

/// Returns a dataset that the caller owns (any dataset for administrators).
///
/// # Errors
/// `PermissionDenied` if the dataset does not exist or belongs to another client; `NotFound` for
/// administrators.
pub(in crate::service) async fn own_dataset(
    store: &Store,
    caller: &Caller,
    id: &str,
) -> Result<Dataset> {
    check_visible(
        caller,
        store.dataset(id).await,
        |d| &d.owner,
        || format!("datasets/{id}"),
    )
}

/// Checks that weights are a base model, which everyone may use, or belong to a job of the
/// caller's.
///
/// # Errors
/// The errors of [`own_job`].
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
