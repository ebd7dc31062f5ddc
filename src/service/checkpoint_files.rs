//! Removal of the files of deleted checkpoints.

use super::artifacts::Artifacts;
use crate::domain::job::Checkpoint;
use crate::engine::Engine;

/// Removes the files of a checkpoint whose row has been deleted. If that fails, the files remain
/// until the job is deleted.
pub(super) async fn remove_checkpoint_files(
    engine: &Engine,
    artifacts: &Artifacts,
    c: &Checkpoint,
) {
    let (job, step) = (&c.job, c.step);
    engine.evict_policy(&artifacts.checkpoint(job, step));
    if let Err(e) = artifacts.remove_checkpoint(job, step, &c.digest).await {
        tracing::warn!(job, step, error = %e, "the checkpoint's files are left until the job is \
            deleted");
    }
}
