//! What a run continues from: checkpoint rows and folders brought into line, damaged ones passed
//! over.

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
use crate::service::store::leases::Also;
use crate::train::checkpoint::{self, RunState};
use crate::train::trainer::tokens_until;

/// Where checkpoints are.
#[derive(Clone, Copy)]
pub(super) struct CheckpointSource<'a> {
    pub store: &'a Store,
    pub artifacts: &'a Artifacts,
    pub engine: &'a Engine,
}

/// The newest checkpoint that is whole; `None` begins anew, which gives the same numbers. Ones that
/// are proven to be damaged are removed, and the job's followers told.
///
/// # Errors
/// `FailedPrecondition` (`ARTIFACT_MISSING`, `CHECKPOINT_FORMAT`) when the newest one may be usable
/// later or elsewhere: nothing is removed then.
pub(super) async fn newest_whole(
    from: CheckpointSource<'_>,
    leased: &LeasedJob,
) -> Result<Option<PathBuf>> {
    let job = &leased.lease.job;
    let known = leased.while_wanted(|| from.store.checkpoints(job)).await?;
    remove_unknown(from, job, &known).await?;
    let folder = from.artifacts.checkpoints(job);
    blocking(move || std::fs::create_dir_all(&folder).map_err(|e| failed(&folder, e))).await??;
    for c in known.iter().rev() {
        let reason = match leased.while_wanted(|| whole(from.artifacts, c)).await {
            Ok(dir) => return Ok(Some(dir)),
            Err(ServiceError::FailedPrecondition { reason: Reason::ArtifactDamaged, message }) => {
                message
            }
            Err(e) => return Err(e),
        };
        // Nothing that another store holds proves damage.
        leased.while_wanted(|| from.artifacts.check_store()).await?;
        tracing::warn!(job, step = c.step, reason, "damaged checkpoint");
        let message = format!(
            "checkpoint {} is removed, the run continues from the one before: {reason}",
            c.step
        );
        let told = |_: &mut _| {
            Ok(vec![EventKind::Log { severity: "warning".into(), message: message.clone() }])
        };
        leased.write(told, Also::Remove(c.step)).await?;
        remove_checkpoint_files(from.engine, from.artifacts, c).await;
    }
    Ok(None)
}

/// Reads how far the run of a job's checkpoint in the folder `dir` had come, and the digest of its
/// pairs where the checkpoint has it.
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

/// Makes sure that a run goes on from a checkpoint with the pairs with which it began: another
/// version of the server may read or tokenise the rows in another way. Checkpoints of version 0.2.0
/// have no digest of their pairs. For these, rows must have nothing that it did not use, and the
/// pairs that the run has used must have as many tokens as it counted.
///
/// # Errors
/// `FailedPrecondition` (`ROWS_CHANGED`) when the pairs are others.
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
            (Some(pinned), _) => format!("its run's pairs have the digest {pinned}, this server makes pairs with {} of the rows", inputs.digest),
            (None, Some(new)) => format!("version 0.2.0, or a build soon after it, wrote it and did not use {new}, which the model sees now"),
            (None, None) => match tokens_until(&spec, &inputs.train, &state) {
                tokens if tokens == state.tokens => return Ok(inputs),
                tokens => format!("its run has used {} tokens, with this server's tokens of the rows it would be {tokens}", state.tokens),
            },
        };
        let message = format!(
            "the run cannot go on from {folder}/{}: {why}. Let the version of the server that wrote it end the job, or cancel the job and create it \
             again",
            state.step
        );
        Err(ServiceError::FailedPrecondition { reason: Reason::RowsChanged, message })
    })
    .await?
}

/// The row is what makes a checkpoint: it is stored after every event up to its step. A folder
/// without one is what a crash cut short, or what another replica made meanwhile in another way.
async fn remove_unknown(from: CheckpointSource<'_>, job: &str, known: &[Checkpoint]) -> Result<()> {
    let folder = from.artifacts.checkpoints(job);
    let found =
        blocking(move || checkpoint::steps(&folder)).await?.map_err(ServiceError::internal)?;
    for step in found.into_iter().filter(|step| !known.iter().any(|row| row.step == *step)) {
        tracing::info!(job, step, "checkpoint was not acknowledged: its folder is removed");
        from.engine.evict_policy(&from.artifacts.checkpoint(job, step));
        from.artifacts.drop_local_checkpoint(job, step).await?;
    }
    Ok(())
}

/// A checkpoint's folder, every file as it was written. A damaged copy of one that the artifact
/// store has is fetched again.
async fn whole(artifacts: &Artifacts, c: &Checkpoint) -> Result<PathBuf> {
    let dir = match artifacts.fetch_checkpoint(c).await {
        // What comes out wrong twice is wrong in the store, and no fault of the way here.
        Err(ServiceError::FailedPrecondition { reason: Reason::ArtifactDamaged, .. })
            if artifacts.is_copy() =>
        {
            artifacts.fetch_checkpoint(c).await?
        }
        fetched => fetched?,
    };
    match checked(artifacts, dir.clone(), c).await {
        Ok(()) => return Ok(dir),
        Err(ServiceError::FailedPrecondition {
            reason: Reason::ArtifactDamaged | Reason::ArtifactMissing,
            ..
        }) if artifacts.is_copy() => {}
        Err(e) => {
            artifacts.distrust_checkpoint(&c.job, c.step);
            return Err(e);
        }
    }
    artifacts.drop_local_checkpoint(&c.job, c.step).await?;
    let dir = artifacts.fetch_checkpoint(c).await?;
    checked(artifacts, dir.clone(), c).await.map(|()| dir)
}

async fn checked(artifacts: &Artifacts, dir: PathBuf, c: &Checkpoint) -> Result<()> {
    let name = format!("trainingJobs/{}/checkpoints/{}", c.job, c.step);
    blocking(move || checkpoint::check(&dir)).await?.map_err(|e| artifacts.unusable(&e, &name))
}
