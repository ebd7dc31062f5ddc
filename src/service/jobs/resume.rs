//! Finds the checkpoint from which a run continues. Makes checkpoint rows and folders consistent,
//! and skips damaged checkpoints.

use std::path::{Path, PathBuf};

use super::inputs::JobInputs;
use super::leased_job::LeasedJob;
use crate::domain::job::{Checkpoint, EventKind, Job};
use crate::domain::reason::Reason;
use crate::engine::Engine;
use crate::service::artifacts::Artifacts;
use crate::service::blocking::blocking;
use crate::service::checkpoint_files::remove_checkpoint_files;
use crate::service::error::{Result, ServiceError, failed};
use crate::service::store::Store;
use crate::service::store::leases::RunWriteEffect;
use crate::train::checkpoint::{self, RunState};
use crate::train::trainer::tokens_until;

/// Parts of the service that finding and removing checkpoints needs.
#[derive(Clone, Copy)]
pub(super) struct CheckpointSource<'a> {
    pub store: &'a Store,
    pub artifacts: &'a Artifacts,
    pub engine: &'a Engine,
}

/// Returns the folder of the newest intact checkpoint. `None` starts the run from the beginning,
/// which gives the same numbers. Checkpoints that are proven to be damaged are removed, and the
/// followers of the job are told.
///
/// # Errors
/// `FailedPrecondition` (`ARTIFACT_MISSING`, `CHECKPOINT_FORMAT`) if the newest checkpoint that is
/// not damaged may be usable later or by another version; it is not removed then.
pub(super) async fn newest_intact(
    from: CheckpointSource<'_>,
    leased: &LeasedJob,
) -> Result<Option<PathBuf>> {
    let job = &leased.lease.job;
    let known = leased
        .retry_until_stopped(|| from.store.checkpoints(job))
        .await?;
    remove_folders_without_row(from, job, &known).await?;
    let folder = from.artifacts.checkpoints(job);
    blocking(move || std::fs::create_dir_all(&folder).map_err(|e| failed(&folder, e))).await??;
    for c in known.iter().rev() {
        let reason = match leased
            .retry_until_stopped(|| intact_folder(from.artifacts, c))
            .await
        {
            Ok(dir) => return Ok(Some(dir)),
            Err(ServiceError::FailedPrecondition {
                reason: Reason::ArtifactDamaged,
                message,
            }) => message,
            Err(e) => return Err(e),
        };
        // If the wrong artifact store is mounted, its contents prove no damage.
        leased
            .retry_until_stopped(|| from.artifacts.check_artifact_store())
            .await?;
        tracing::warn!(job, step = c.step, reason, "damaged checkpoint");
        let message = format!(
            "checkpoint {} is removed, the run continues from the one before, or from the \
             beginning if there is none: {reason}",
            c.step
        );
        let log_removal = |_: &mut _| {
            Ok(vec![EventKind::Log {
                severity: "warning".into(),
                message: message.clone(),
            }])
        };
        leased
            .write(log_removal, RunWriteEffect::Remove(c.step))
            .await?;
        remove_checkpoint_files(from.engine, from.artifacts, c).await;
    }
    Ok(None)
}

/// Reads the training progress stored in the checkpoint folder `dir`, and the digest of its pairs
/// if the checkpoint has one.
///
/// # Errors
/// The errors of [`Artifacts::unusable`] if the checkpoint cannot be read.
pub(super) async fn progress(
    artifacts: &Artifacts,
    job: &Job,
    dir: &Path,
) -> Result<(Option<String>, RunState)> {
    let (artifacts, dir) = (artifacts.clone(), dir.to_owned());
    let folder = format!("trainingJobs/{}/checkpoints", job.id);
    blocking(move || checkpoint::progress(&dir).map_err(|e| artifacts.unusable(&e, &folder)))
        .await?
}

/// Checks that a run continues with the same pairs it began with: another version of the server may
/// read or tokenise the rows differently. Checkpoints of version 0.2.0 have no digest of their
/// pairs. For these, the rows must contain nothing that 0.2.0 ignored or could not read, and the
/// pairs used so far must have as many tokens as the run counted.
///
/// # Errors
/// `FailedPrecondition` (`ROWS_CHANGED`) if the pairs differ.
pub(super) async fn check_pairs(
    job: &Job,
    (pinned, state): (Option<String>, RunState),
    inputs: JobInputs,
) -> Result<JobInputs> {
    let spec = job.request.spec.clone();
    let folder = format!("trainingJobs/{}/checkpoints", job.id);
    blocking(move || {
        let why = match (pinned, &inputs.new_since_0_2_0) {
            (Some(pinned), _) if pinned == inputs.digest => return Ok(inputs),
            (Some(pinned), _) => format!(
                "the run began with pairs of the digest {pinned}, but this server makes pairs of \
                 the digest {} from the rows",
                inputs.digest
            ),
            (None, Some(new)) => format!(
                "version 0.2.0, or a build soon after it, wrote it and ignored {new}, which the \
                 model would see now"
            ),
            (None, None) => match tokens_until(&spec, &inputs.train, &state) {
                tokens if tokens == state.tokens => return Ok(inputs),
                tokens => format!(
                    "the run has used {} tokens, but with this server's tokenisation of the rows \
                     it would be {tokens}",
                    state.tokens
                ),
            },
        };
        let message = format!(
            "the run cannot continue from {folder}/{}: {why}. Let the version of the server that \
             wrote it finish the job, or cancel the job and create it again",
            state.step
        );
        Err(ServiceError::FailedPrecondition {
            reason: Reason::RowsChanged,
            message,
        })
    })
    .await?
}

/// Removes checkpoint folders that have no row. A checkpoint exists only once its row is stored,
/// after every event up to its step. A folder without a row was left by a crash or by another run
/// of this job.
async fn remove_folders_without_row(
    from: CheckpointSource<'_>,
    job: &str,
    known: &[Checkpoint],
) -> Result<()> {
    let folder = from.artifacts.checkpoints(job);
    let found = blocking(move || checkpoint::steps(&folder))
        .await?
        .map_err(ServiceError::internal)?;
    for step in found
        .into_iter()
        .filter(|step| !known.iter().any(|row| row.step == *step))
    {
        tracing::info!(
            job,
            step,
            "checkpoint was not acknowledged: its folder is removed"
        );
        from.engine
            .evict_policy(&from.artifacts.checkpoint(job, step));
        from.artifacts.drop_local_checkpoint(job, step).await?;
    }
    Ok(())
}

/// Returns the folder of a checkpoint after checking every file. A damaged local copy of a
/// checkpoint in the artifact store is fetched again.
async fn intact_folder(artifacts: &Artifacts, c: &Checkpoint) -> Result<PathBuf> {
    let dir = match artifacts.fetch_checkpoint(c).await {
        // Damage in transit is repaired by a second fetch. If that fails too, the object in the
        // store is damaged.
        Err(ServiceError::FailedPrecondition {
            reason: Reason::ArtifactDamaged,
            ..
        }) if artifacts.has_object_store() => artifacts.fetch_checkpoint(c).await?,
        fetched => fetched?,
    };
    match check_files(artifacts, dir.clone(), c).await {
        Ok(()) => return Ok(dir),
        Err(ServiceError::FailedPrecondition {
            reason: Reason::ArtifactDamaged | Reason::ArtifactMissing,
            ..
        }) if artifacts.has_object_store() => {}
        Err(e) => {
            artifacts.mark_unverified(&c.job, c.step);
            return Err(e);
        }
    }
    artifacts.drop_local_checkpoint(&c.job, c.step).await?;
    let dir = artifacts.fetch_checkpoint(c).await?;
    check_files(artifacts, dir.clone(), c).await.map(|()| dir)
}

async fn check_files(artifacts: &Artifacts, dir: PathBuf, c: &Checkpoint) -> Result<()> {
    let name = format!("trainingJobs/{}/checkpoints/{}", c.job, c.step);
    blocking(move || checkpoint::check(&dir))
        .await?
        .map_err(|e| artifacts.unusable(&e, &name))
}
