//! Checkpoints: queries, deletion and export by clients.

use std::path::{Path, PathBuf};

use tokio::sync::OwnedSemaphorePermit;

use super::artifacts::{Artifacts, Export, ExportFormat, ExportName, Temporary, describe};
use super::audit::audit;
use super::auth::access::own_job;
use super::blocking::blocking;
use super::checkpoint_files::{check_exported, remove_checkpoint_files};
use super::detached::DetachedWork;
use super::error::{Result, ServiceError, failed};
use super::in_use::{DependentJobs, Needed, check};
use super::jobs::registry::RunRegistry;
use super::limiter::Limiter;
use super::model_card::{CARD_FILE, ModelCard};
use super::policies::PolicyResolver;
use super::store::Store;
use crate::domain::access::Caller;
use crate::domain::identity::ModelIdentity;
use crate::domain::job::{Checkpoint, Job, JobState};
use crate::domain::names::{BaseName, CheckpointRef};
use crate::domain::reason::Reason;
use crate::engine::Engine;
use crate::engine::api::WeightsRef;
use crate::formats::peft;
use crate::formats::weights::ElementType;

/// Returns the base model that a job is pinned to, if it is pinned.
fn pinned_base(job: Job) -> Option<ModelIdentity> {
    job.request.pins.map(|pins| pins.base)
}

/// Reads, deletes and exports checkpoints.
#[derive(Clone)]
pub struct CheckpointService {
    pub(super) store: Store,
    pub(super) artifacts: Artifacts,
    pub(super) engine: Engine,
    pub(super) policies: PolicyResolver,
    pub(super) runs: RunRegistry,
    /// Shared limit on slow tasks; an export counts as one.
    pub(super) slow_tasks: Limiter,
    /// Runs deletions and exports, which must not end half done.
    pub(super) detached: DetachedWork,
}

impl CheckpointService {
    /// Returns one checkpoint, and the base model it was trained on if the job is pinned to one.
    ///
    /// # Errors
    /// `PermissionDenied` for another client's job; `NotFound` or `FailedPrecondition`
    /// (`NO_CHECKPOINT`) if there is no such checkpoint.
    pub async fn get_checkpoint(
        &self,
        caller: &Caller,
        job: &str,
        which: CheckpointRef,
    ) -> Result<(Checkpoint, Option<ModelIdentity>)> {
        let owning_job = own_job(&self.store, caller, job).await?;
        Ok((
            self.policies.find_checkpoint(job, which).await?,
            pinned_base(owning_job),
        ))
    }

    /// Returns a job's checkpoints, oldest first, and the base model they were trained on if the
    /// job is pinned to one.
    ///
    /// # Errors
    /// `PermissionDenied` for another client's job.
    pub async fn list_checkpoints(
        &self,
        caller: &Caller,
        job: &str,
    ) -> Result<(Vec<Checkpoint>, Option<ModelIdentity>)> {
        let owning_job = own_job(&self.store, caller, job).await?;
        Ok((self.store.checkpoints(job).await?, pinned_base(owning_job)))
    }

    /// Deletes a checkpoint.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such job; `NotFound` if there is no
    /// such checkpoint; `FailedPrecondition` (`IN_USE`) if the job has not ended and would continue
    /// from it, or if another job needs it.
    pub async fn delete_checkpoint(&self, caller: &Caller, job: &str, step: u64) -> Result<()> {
        let state = own_job(&self.store, caller, job).await?.state;
        let checkpoint = self
            .policies
            .find_checkpoint(job, CheckpointRef::Step(step))
            .await?;
        let newest = self
            .policies
            .find_checkpoint(job, CheckpointRef::Latest)
            .await?
            .step;
        if !state.is_final() && newest == step && !self.is_unreadable(state, &checkpoint).await {
            let message = format!(
                "trainingJobs/{job} is {} and would continue from step {step}: delete it when the \
                 job has ended",
                state.name()
            );
            return Err(ServiceError::FailedPrecondition {
                reason: Reason::InUse,
                message,
            });
        }
        let (service, caller, job) = (self.clone(), caller.clone(), job.to_owned());
        let removing = async move {
            let needed = Needed::Weights {
                job: &job,
                step: Some(step),
            };
            let refuse = |users: &DependentJobs| check(&caller, users, needed);
            service.store.delete_checkpoint(&job, step, refuse).await?;
            audit(
                &caller,
                "delete",
                &format!("trainingJobs/{job}/checkpoints/{step}"),
            );
            remove_checkpoint_files(&service.engine, &service.artifacts, &checkpoint).await;
            service.runs.forget_postponed(&job);
            service.runs.wake();
            Ok::<_, ServiceError>(())
        };
        self.detached.to_its_end(removing).await
    }

    /// Returns true if a queued or paused job cannot read this checkpoint. Deleting it lets the job
    /// continue from the previous one.
    async fn is_unreadable(&self, state: JobState, checkpoint: &Checkpoint) -> bool {
        matches!(state, JobState::Queued | JobState::Paused)
            && matches!(
                self.artifacts.fetch_checkpoint(checkpoint).await,
                Err(ServiceError::FailedPrecondition {
                    reason: Reason::ArtifactMissing
                        | Reason::ArtifactDamaged
                        | Reason::CheckpointFormat,
                    ..
                })
            )
    }

    /// Exports a checkpoint as an adapter or as merged weights. An existing export is returned
    /// again.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such job; `NotFound` if there is no
    /// such checkpoint; `FailedPrecondition` (`NO_ADAPTER`, `MODEL_CHANGED`, `MODEL_FILES_CHANGED`,
    /// `WEIGHTS_UNUSABLE`, …); `InvalidArgument` if an element type is given for an adapter.
    pub async fn export_checkpoint(
        &self,
        caller: &Caller,
        job: &str,
        which: CheckpointRef,
        wanted: ExportRequest,
    ) -> Result<Export> {
        let job = own_job(&self.store, caller, job).await?;
        let checkpoint = self.policies.find_checkpoint(&job.id, which).await?;
        let format = wanted.format.unwrap_or(if checkpoint.adapter {
            ExportFormat::Adapter
        } else {
            ExportFormat::Merged
        });
        if format == ExportFormat::Adapter && !checkpoint.adapter {
            let message = format!(
                "trainingJobs/{} is a full fine-tune and has no adapter: export it MERGED",
                job.id
            );
            return Err(ServiceError::FailedPrecondition {
                reason: Reason::NoAdapter,
                message,
            });
        }
        let (id, step) = (job.id.clone(), checkpoint.step);
        let (name, contents) = match format {
            ExportFormat::Adapter if wanted.dtype.is_some() => {
                let message = "is for merged weights, an adapter is exported in f32 as it was \
                               trained: leave it empty, or ask for MERGED";
                return Err(ServiceError::invalid("dtype", message));
            }
            ExportFormat::Adapter => {
                let card = ModelCard::of(&job, &checkpoint);
                self.adapter_contents(&job, &checkpoint, card).await?
            }
            ExportFormat::Merged => {
                let model = self.policies.base_model(&job).await?;
                let weights = self
                    .policies
                    .resolve_stored(job, model.clone(), CheckpointRef::Step(step))
                    .await?
                    .weights;
                let dtype = match wanted.dtype {
                    Some(dtype) => dtype,
                    None => self.engine.element_type(&model)?,
                };
                (
                    ExportName::Merged(dtype),
                    ExportContents::Merged { weights, dtype },
                )
            }
        };
        let permit = self.slow_tasks.acquire().await?;
        let (service, caller) = (self.clone(), caller.clone());
        let exporting = async move {
            let made = service.make_export(&id, step, name, contents, permit).await;
            // Also after a failure, of which some files may be left.
            check_exported(&service.store, &service.artifacts, &checkpoint).await?;
            let export = made?;
            audit(
                &caller,
                "export",
                &format!("trainingJobs/{id}/checkpoints/{step}"),
            );
            Ok::<_, ServiceError>(export)
        };
        self.detached.to_its_end(exporting).await
    }

    /// Writes an export, unless it exists, and uploads it. `permit` is released when it is written.
    ///
    /// # Errors
    /// The errors of the file system, of the engine and of the artifact store.
    async fn make_export(
        &self,
        job: &str,
        step: u64,
        name: ExportName,
        contents: ExportContents,
        permit: OwnedSemaphorePermit,
    ) -> Result<Export> {
        let (artifacts, engine) = (self.artifacts.clone(), self.engine.clone());
        let job_id = job.to_owned();
        let (files, path) = blocking(move || {
            let _permit = permit;
            let target = artifacts.export(&job_id, step, name);
            if !target.is_dir() {
                let temporary = Temporary(artifacts.temporary());
                std::fs::create_dir_all(&temporary.0).map_err(|e| failed(&temporary.0, e))?;
                write(&engine, &contents, &temporary.0)?;
                match artifacts.publish(&temporary.0, &target) {
                    Ok(()) => {}
                    // Another call may have made the same export meanwhile.
                    Err(e) if !target.is_dir() => return Err(e),
                    Err(_) => {}
                }
            }
            Ok::<_, ServiceError>((describe(&target)?, target))
        })
        .await??;
        let location = self
            .artifacts
            .upload_export(job, step, name, &files)
            .await?;
        Ok(Export {
            files,
            path,
            location,
        })
    }

    /// Returns the contents of an adapter export. The adapter's files are copied, which needs no
    /// model: the base model may have been replaced meanwhile. If the unchanged base model is
    /// served, its tokenizer is exported, too.
    async fn adapter_contents(
        &self,
        job: &Job,
        checkpoint: &Checkpoint,
        card: ModelCard,
    ) -> Result<(ExportName, ExportContents)> {
        let folder = self.artifacts.fetch_checkpoint(checkpoint).await?;
        let model = self.policies.base_model(job).await?;
        let served = self
            .policies
            .check_base(job)
            .ok()
            .and_then(|()| self.engine.model(&model).ok());
        Ok(match served {
            Some(info) => (
                ExportName::Adapter,
                ExportContents::Adapter {
                    folder,
                    base: Some(info.base),
                    model,
                    card,
                },
            ),
            None => (
                ExportName::AdapterAlone,
                ExportContents::Adapter {
                    folder,
                    base: None,
                    model,
                    card,
                },
            ),
        })
    }
}

/// Options of an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportRequest {
    /// Kind of export; if absent, it follows from the checkpoint (adapter or full weights).
    pub format: Option<ExportFormat>,
    /// Element type of merged weights; the base model's if absent.
    pub dtype: Option<ElementType>,
}

/// Contents of an export.
enum ExportContents {
    Merged {
        weights: WeightsRef,
        dtype: ElementType,
    },
    Adapter {
        /// Folder of the checkpoint.
        folder: PathBuf,
        /// Name of the base model; `None` if the model is not served or has changed.
        base: Option<BaseName>,
        /// Id of the base model.
        model: String,
        /// Describes the adapter.
        card: ModelCard,
    },
}

fn write(engine: &Engine, contents: &ExportContents, out: &Path) -> Result<()> {
    match contents {
        ExportContents::Merged { weights, dtype } => {
            Ok(engine.export_merged(weights, *dtype, out)?)
        }
        ExportContents::Adapter {
            folder,
            base,
            model,
            card,
        } => {
            let (from, to) = (
                folder.join(peft::WEIGHTS_FILE),
                out.join(peft::WEIGHTS_FILE),
            );
            std::fs::copy(&from, &to).map_err(|e| failed(&from, e))?;
            let (from, to) = (folder.join(peft::CONFIG_FILE), out.join(peft::CONFIG_FILE));
            let config = std::fs::read(&from).map_err(|e| failed(&from, e))?;
            let name = match base {
                Some(base) => base.clone(),
                None => peft::base_of(&config, model),
            };
            let config = peft::with_base(&config, &name).map_err(ServiceError::internal)?;
            std::fs::write(&to, config).map_err(|e| failed(&to, e))?;
            let to = out.join(CARD_FILE);
            std::fs::write(&to, card.text(&name)).map_err(|e| failed(&to, e))?;
            match base {
                Some(_) => Ok(engine.export_tokenizer(model, out)?),
                None => Ok(()),
            }
        }
    }
}
