//! Checkpoints as clients see them: looked at, deleted, exported.

use super::access::audit;
use super::artifacts::{ADAPTER_FILES, Export, ExportFormat, Temporary, describe};
use super::datasets::blocking;
use super::error::{Result, ServiceError};
use super::service::Service;
use super::uses::{Needed, check};
use crate::domain::access::Caller;
use crate::domain::identity::ModelIdentity;
use crate::domain::job::{Checkpoint, Job, JobState};
use crate::domain::names::CheckpointRef;

/// The base model that a job is pinned to: its run goes on on no other.
fn base(job: Job) -> Option<ModelIdentity> {
    job.request.pins.map(|pins| pins.base)
}

impl Service {
    /// Returns one checkpoint, and the base model that it was trained on.
    pub async fn get_checkpoint(&self, caller: &Caller, job: &str, which: CheckpointRef) -> Result<(Checkpoint, Option<ModelIdentity>)> {
        let owner = self.own_job(caller, job).await?;
        Ok((self.find_checkpoint(job, which).await?, base(owner)))
    }

    /// Returns a job's checkpoints, oldest first, and the base model that they were trained on.
    pub async fn list_checkpoints(&self, caller: &Caller, job: &str) -> Result<(Vec<Checkpoint>, Option<ModelIdentity>)> {
        let owner = self.own_job(caller, job).await?;
        Ok((self.inner.store.checkpoints(job).await?, base(owner)))
    }

    /// Deletes a checkpoint, but not the one that an unfinished job would continue from.
    pub async fn delete_checkpoint(&self, caller: &Caller, job: &str, step: u64) -> Result<()> {
        let state = self.own_job(caller, job).await?.state;
        let checkpoint = self.find_checkpoint(job, CheckpointRef::Step(step)).await?;
        let newest = self.find_checkpoint(job, CheckpointRef::Latest).await?.step;
        if !state.is_final() && newest == step && !self.is_out_of_reach(state, &checkpoint).await {
            let message =
                format!("trainingJobs/{job} is {} and would continue from step {step}: delete it when the job has ended", state.name());
            return Err(ServiceError::FailedPrecondition { reason: "IN_USE", message });
        }
        let needed = Needed::Weights { job, step: Some(step) };
        self.inner.store.delete_checkpoint(job, step, |users| check(caller, users, needed)).await?;
        self.drop_checkpoint_files(&checkpoint).await;
        self.inner.postponed.forget(job);
        self.inner.wake();
        audit(caller, "delete", &format!("trainingJobs/{job}/checkpoints/{step}"));
        Ok(())
    }

    /// Returns true if a waiting job cannot read this checkpoint. Deleting it lets the job continue from the one before.
    async fn is_out_of_reach(&self, state: JobState, checkpoint: &Checkpoint) -> bool {
        matches!(state, JobState::Queued | JobState::Paused)
            && matches!(
                self.inner.artifacts.fetch_checkpoint(checkpoint).await,
                Err(ServiceError::FailedPrecondition { reason: "ARTIFACT_MISSING" | "ARTIFACT_DAMAGED" | "CHECKPOINT_FORMAT", .. })
            )
    }

    /// Removes the files of a checkpoint whose row is gone: what cannot be removed now goes with its job.
    pub(super) async fn drop_checkpoint_files(&self, c: &Checkpoint) {
        let (job, step) = (&c.job, c.step);
        self.inner.engine.evict_policy(&self.inner.artifacts.checkpoint(job, step));
        if let Err(e) = self.inner.artifacts.remove_checkpoint(job, step, &c.digest).await {
            tracing::warn!(job, step, error = %e, "the checkpoint's files are left until the job is deleted");
        }
    }

    /// Writes a checkpoint as an adapter or merged; what was exported before is given again.
    pub async fn export_checkpoint(
        &self,
        caller: &Caller,
        job: &str,
        which: CheckpointRef,
        format: Option<ExportFormat>,
    ) -> Result<Export> {
        let job = self.own_job(caller, job).await?;
        let checkpoint = self.find_checkpoint(&job.id, which).await?;
        let format = format.unwrap_or(if checkpoint.adapter { ExportFormat::Adapter } else { ExportFormat::Merged });
        if format == ExportFormat::Adapter && !checkpoint.adapter {
            let message = format!("trainingJobs/{} is a full fine-tune and has no adapter: export it MERGED", job.id);
            return Err(ServiceError::FailedPrecondition { reason: "NO_ADAPTER", message });
        }
        let (id, job_id) = (job.id.clone(), job.id.clone());
        let weights = match format {
            // Files are copied: that needs no model, and the model may have been replaced since.
            ExportFormat::Adapter => {
                self.inner.artifacts.fetch_checkpoint(&checkpoint).await?;
                None
            }
            ExportFormat::Merged => {
                let model = self.base_model(&job).await?;
                Some(self.resolve_stored(job, model, CheckpointRef::Step(checkpoint.step)).await?.weights)
            }
        };
        let (inner, step) = (self.inner.clone(), checkpoint.step);
        let permit = self.heavy_permit().await?;
        let (files, path) = blocking(move || {
            let _permit = permit;
            let target = inner.artifacts.export(&id, checkpoint.step, format);
            if !target.is_dir() {
                let temporary = Temporary(inner.artifacts.temporary());
                std::fs::create_dir_all(&temporary.0).map_err(|e| super::artifacts::failed(&temporary.0, e))?;
                match &weights {
                    Some(weights) => inner.engine.export_merged(weights, &temporary.0)?,
                    None => {
                        for name in ADAPTER_FILES {
                            let from = inner.artifacts.checkpoint(&id, checkpoint.step).join(name);
                            std::fs::copy(&from, temporary.0.join(name)).map_err(|e| super::artifacts::failed(&from, e))?;
                        }
                    }
                }
                match inner.artifacts.publish(&temporary.0, &target) {
                    Ok(()) => {}
                    // Another call may have made the same export meanwhile.
                    Err(e) if !target.is_dir() => return Err(e),
                    Err(_) => {}
                }
            }
            Ok::<_, ServiceError>((describe(&target)?, target))
        })
        .await??;
        let location = self.inner.artifacts.keep_export(&job_id, step, format, &files).await?;
        audit(caller, "export", &format!("trainingJobs/{job_id}/checkpoints/{step}"));
        Ok(Export { files, path, location })
    }
}
