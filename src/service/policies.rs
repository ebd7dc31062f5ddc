//! Resolves the names of policies and references to weights.

use std::path::PathBuf;

use super::artifacts::{ADAPTER_FILES, Artifacts, hash_files};
use super::blocking::blocking;
use super::error::{Result, ServiceError};
use super::jobs::registry::RunRegistry;
use super::store::Store;
use crate::domain::identity::{ContentPins, ModelIdentity};
use crate::domain::job::{Checkpoint, Evaluation, Job, JobRequest, JobState};
use crate::domain::names::{CheckpointRef, PolicyName};
use crate::domain::reason::Reason;
use crate::domain::training::Method;
use crate::engine::Engine;
use crate::engine::api::{EngineError, WeightsRef};
use crate::train::checkpoint::REFERENCE_FILE;

/// Maximum number of jobs in a chain in which each continues the one before.
const MAX_CONTINUED_JOBS: usize = 32;

/// A resolved name.
#[derive(Clone, Debug)]
pub(super) struct Resolved {
    /// Weights for the engine to load.
    pub weights: WeightsRef,
    /// Id of the base model.
    pub model: String,
    /// Job that trained the weights; `None` for a base model.
    pub job: Option<Job>,
    /// Name of the weights, with the step for a stored checkpoint.
    pub version: String,
}

/// Resolves the names of weights.
#[derive(Clone)]
pub(super) struct PolicyResolver {
    pub store: Store,
    pub artifacts: Artifacts,
    pub engine: Engine,
    /// Runs of this process. The weights of a running job are on the device.
    pub runs: RunRegistry,
}

impl PolicyResolver {
    /// Resolves a name. `latest` of a job that runs in this process means the weights it is
    /// training now.
    ///
    /// # Errors
    /// `NotFound` for an unknown model or job, and the errors of
    /// [`PolicyResolver::resolve_stored`].
    pub(super) async fn resolve(&self, name: &PolicyName) -> Result<Resolved> {
        match name {
            PolicyName::Model(id) => {
                self.engine.model(id)?;
                let weights = WeightsRef::Base { model: id.clone() };
                Ok(Resolved {
                    weights,
                    model: id.clone(),
                    job: None,
                    version: name.to_string(),
                })
            }
            PolicyName::Checkpoint { job, which } => {
                let job = self.store.job(job).await?;
                self.check_base(&job)?;
                let model = self.base_model(&job).await?;
                // The weights of a run on another replica are out of reach, so `latest` means its
                // newest checkpoint then.
                if *which == CheckpointRef::Latest
                    && job.state == JobState::Running
                    && self.runs.get(&job.id).is_some()
                {
                    let weights = WeightsRef::Live {
                        job: job.id.clone(),
                    };
                    return Ok(Resolved {
                        weights,
                        model,
                        version: name.to_string(),
                        job: Some(job),
                    });
                }
                self.resolve_stored(job, model, *which).await
            }
        }
    }

    /// Checks that the served base model is the one that the job was created with. An adapter is
    /// only valid on its own base model.
    ///
    /// # Errors
    /// `FailedPrecondition` (`MODEL_CHANGED`) with both hashes if it differs, or if the server does
    /// not have the model.
    pub(super) fn check_base(&self, job: &Job) -> Result<()> {
        let (Some(pins), Some(model)) = (&job.request.pins, &job.request.model) else {
            return Ok(());
        };
        self.check_identity(job, "with", model, &pins.base)
    }

    /// Checks that the base model of the job's reference is the one that the job was created with.
    /// Does nothing if the reference has the policy's base model.
    ///
    /// # Errors
    /// The errors of [`PolicyResolver::check_base`], for the reference's base model.
    pub(super) async fn check_reference(&self, job: &Job) -> Result<()> {
        let request = &job.request;
        let pinned = request
            .pins
            .as_ref()
            .and_then(|pins| pins.reference_base.as_ref());
        let (Some(pinned), Some(name)) = (pinned, &request.reference) else {
            return Ok(());
        };
        self.check_identity(
            job,
            "with a reference on",
            &self.base_model_of_name(name).await?,
            pinned,
        )
    }

    /// Compares the model served under the id `model` with the one that a job is pinned to. `role`
    /// describes the model's role in the error message.
    fn check_identity(
        &self,
        job: &Job,
        role: &str,
        model: &str,
        pinned: &ModelIdentity,
    ) -> Result<()> {
        let served = match self.engine.identity(model) {
            Ok(served) => served,
            Err(EngineError::UnknownModel(_)) => {
                let message = format!(
                    "trainingJobs/{} was made {role} models/{model} (identity {}), which this \
                     server does not have: serve it",
                    job.id,
                    pinned.hash()
                );
                return Err(ServiceError::FailedPrecondition {
                    reason: Reason::ModelChanged,
                    message,
                });
            }
            Err(e) => return Err(e.into()),
        };
        let Some(difference) = pinned.difference(&served) else {
            return Ok(());
        };
        let (part, (before, now)) = (difference.part, difference.hashes);
        let message = format!(
            "trainingJobs/{} was made {role} models/{model} whose {part} has the hash {}, the \
             {part} served now has {}: serve the model that the job was made with",
            job.id,
            or_none(before),
            or_none(now)
        );
        Err(ServiceError::FailedPrecondition {
            reason: Reason::ModelChanged,
            message,
        })
    }

    /// Checks that the reference can score token ids of the policy's tokenizer: ids must mean the
    /// same tokens in both models, and the reference must have an embedding for each. `policy` and
    /// `reference` are ids of base models; `field` is the request field that names the reference.
    ///
    /// # Errors
    /// `InvalidArgument` with the hashes of both tokenizers or the sizes of both vocabularies.
    pub(super) fn check_tokenizers(
        &self,
        field: &str,
        policy: &str,
        reference: &str,
    ) -> Result<()> {
        if policy == reference {
            return Ok(());
        }
        let (ours, theirs) = (
            self.engine.tokenizer(policy)?,
            self.engine.tokenizer(reference)?,
        );
        if !ours.has_vocabulary_of(&theirs) {
            let message = format!(
                "is on models/{reference} whose tokenizer has the hash {}, the policy is on \
                 models/{policy} whose tokenizer has the hash {}, and their vocabularies differ: \
                 the reference gets the policy's token ids, name one with the same tokenizer",
                theirs.content_hash(),
                ours.content_hash()
            );
            return Err(ServiceError::invalid(field, message));
        }
        let (reference_rows, policy_rows) = (
            self.engine.model(reference)?.vocab_size,
            self.engine.model(policy)?.vocab_size,
        );
        if reference_rows < ours.vocabulary_rows().min(policy_rows) {
            let message = format!(
                "is on models/{reference}, which has embeddings for {reference_rows} tokens; \
                 models/{policy} has them for {policy_rows}, and their tokenizer has ids up to {}: \
                 name a reference that has an embedding for every token",
                ours.vocabulary_rows() - 1
            );
            return Err(ServiceError::invalid(field, message));
        }
        Ok(())
    }

    /// Resolves a stored checkpoint, which is fetched if it is not on this machine.
    ///
    /// # Errors
    /// `FailedPrecondition` if the base model has changed or the checkpoint is missing, damaged or
    /// of another version; `NotFound` if there is no such step.
    pub(super) async fn resolve_stored(
        &self,
        job: Job,
        model: String,
        which: CheckpointRef,
    ) -> Result<Resolved> {
        self.check_base(&job)?;
        let checkpoint = self.find_checkpoint(&job.id, which).await?;
        let dir = self.artifacts.fetch_checkpoint(&checkpoint).await?;
        // Checkpoints of older versions have no digest. Their path identifies their content as
        // well: it is written once, and job ids are never reused.
        let content = if checkpoint.digest.is_empty() {
            dir.display().to_string()
        } else {
            checkpoint.digest
        };
        let weights = match checkpoint.adapter {
            true => WeightsRef::Adapter {
                model: model.clone(),
                dir,
                content,
            },
            false => WeightsRef::Full {
                model: model.clone(),
                dir,
                content,
            },
        };
        let version = format!("trainingJobs/{}/checkpoints/{}", job.id, checkpoint.step);
        Ok(Resolved {
            weights,
            model,
            job: Some(job),
            version,
        })
    }

    /// Returns the row of a checkpoint.
    ///
    /// # Errors
    /// `NotFound` for a step without a checkpoint; `FailedPrecondition` (`NO_CHECKPOINT`) if the
    /// job has no latest or best checkpoint.
    pub(super) async fn find_checkpoint(
        &self,
        job: &str,
        which: CheckpointRef,
    ) -> Result<Checkpoint> {
        let mut all = self.store.checkpoints(job).await?;
        let found = match which {
            CheckpointRef::Latest => all.pop(),
            CheckpointRef::Best => all.into_iter().find(|c| c.best),
            CheckpointRef::Step(step) => all.into_iter().find(|c| c.step == step),
        };
        if let Some(checkpoint) = found {
            return Ok(checkpoint);
        }
        let state = self.store.job(job).await?.state;
        let remedy = match (which, state.is_final()) {
            (CheckpointRef::Step(_), _) => {
                return Err(ServiceError::not_found(
                    "checkpoint",
                    format!("trainingJobs/{job}/checkpoints/{which}"),
                ));
            }
            (CheckpointRef::Latest, true) => {
                "create the job again, with save_steps to have checkpoints before its end"
            }
            (CheckpointRef::Latest, false) => {
                "wait for its first one; save_steps or eval_steps give a job one before its end"
            }
            (CheckpointRef::Best, true) => {
                "name latest or a step; only jobs with an evaluation have a best one"
            }
            (CheckpointRef::Best, false) => {
                "wait for its first evaluation, or name a step; jobs without an evaluation have no \
                 best one"
            }
        };
        Err(ServiceError::FailedPrecondition {
            reason: Reason::NoCheckpoint,
            message: format!(
                "trainingJobs/{job} is {} and has no {which} checkpoint: {remedy}",
                state.name()
            ),
        })
    }

    /// Returns the id of a job's base model. If the request does not name it, the chain of
    /// continued jobs is followed.
    ///
    /// # Errors
    /// `NotFound` if a job of the chain does not exist; `Internal` for a chain of
    /// [`MAX_CONTINUED_JOBS`] or more jobs; `Unavailable` or `Internal` if the database fails.
    pub(super) async fn base_model(&self, job: &Job) -> Result<String> {
        if let Some(model) = &job.request.model {
            return Ok(model.clone());
        }
        let mut policy = job.request.policy.clone();
        for _ in 0..MAX_CONTINUED_JOBS {
            match policy {
                PolicyName::Model(id) => return Ok(id),
                PolicyName::Checkpoint { job, .. } => {
                    policy = self.store.job(&job).await?.request.policy
                }
            }
        }
        Err(ServiceError::internal(format!(
            "trainingJobs/{} continues a chain of {MAX_CONTINUED_JOBS} or more jobs",
            job.id
        )))
    }

    /// Returns the id of the base model of a policy name.
    async fn base_model_of_name(&self, name: &PolicyName) -> Result<String> {
        match name {
            PolicyName::Model(id) => Ok(id.clone()),
            PolicyName::Checkpoint { job, .. } => {
                self.base_model(&self.store.job(job).await?).await
            }
        }
    }

    /// Replaces `latest` and `best` by the step that they mean now, so that the name never changes
    /// its meaning.
    ///
    /// # Errors
    /// The errors of [`PolicyResolver::find_checkpoint`].
    pub(super) async fn pin(&self, name: &PolicyName) -> Result<PolicyName> {
        match name {
            PolicyName::Checkpoint { job, which } => {
                let step = self.find_checkpoint(job, *which).await?.step;
                Ok(PolicyName::Checkpoint {
                    job: job.clone(),
                    which: CheckpointRef::Step(step),
                })
            }
            model => Ok(model.clone()),
        }
    }

    /// Returns the present content hashes of a job's inputs. `latest` and `best` must have been
    /// replaced by steps before.
    ///
    /// # Errors
    /// `NotFound` if an input does not exist.
    pub(super) async fn content_pins(&self, request: &JobRequest) -> Result<ContentPins> {
        let dataset = self.store.dataset(&request.dataset).await?.content_hash;
        let eval_dataset = match &request.evaluation {
            Evaluation::Dataset(id) => Some(self.store.dataset(id).await?.content_hash),
            _ => None,
        };
        let policy = self.digest(&request.policy).await?;
        let reference = match &request.reference {
            Some(name) => self.digest(name).await?,
            None => None,
        };
        Ok(ContentPins {
            policy,
            reference,
            dataset,
            eval_dataset,
        })
    }

    /// Returns the digest of a checkpoint; `None` for a base model, and for a checkpoint of a
    /// version without digests.
    async fn digest(&self, name: &PolicyName) -> Result<Option<String>> {
        let PolicyName::Checkpoint { job, which } = name else {
            return Ok(None);
        };
        let digest = self.find_checkpoint(job, *which).await?.digest;
        Ok((!digest.is_empty()).then_some(digest))
    }

    /// Resolves the weights that a job starts from.
    ///
    /// # Errors
    /// `FailedPrecondition` (`MODEL_CHANGED`, `ARTIFACT_MISSING`, `ARTIFACT_DAMAGED`) if they are
    /// not those that the job was created with.
    pub(super) async fn start_weights(&self, job: &Job) -> Result<Resolved> {
        self.check_base(job)?;
        let mut start = self.resolve(&job.request.policy).await?;
        check_content(job, "policy", |pins| pins.policy.as_ref(), &start)?;
        if let (Method::Lora(lora), WeightsRef::Base { model }) =
            (&job.request.spec.method, &start.weights)
            && let Some(name) = &lora.init_adapter
        {
            let (dir, content) = self.init_adapter(job, name).await?;
            start.weights = WeightsRef::Adapter {
                model: model.clone(),
                dir,
                content,
            };
        }
        Ok(start)
    }

    /// Returns the folder of the adapter that a job starts from, and its hash.
    async fn init_adapter(&self, job: &Job, name: &str) -> Result<(PathBuf, String)> {
        if let Some(hash) = job
            .request
            .pins
            .as_ref()
            .and_then(|pins| pins.init_adapter.clone())
        {
            return Ok((
                self.artifacts.fetch_init_adapter(&job.id, &hash).await?,
                hash,
            ));
        }
        // A job of version 0.1 has no copy of the adapter. Its adapter name is the path of the
        // folder.
        let dir = PathBuf::from(name);
        let folder = dir.clone();
        let hash = blocking(move || hash_files(&folder, &ADAPTER_FILES)).await??;
        Ok((dir, hash))
    }

    /// Resolves a job's reference: the one that its request names, else its own start weights;
    /// `None` if the objective has no reference.
    ///
    /// # Errors
    /// `FailedPrecondition` (`MODEL_CHANGED`) if its base model is not the one that the job was
    /// created with.
    pub(super) async fn reference_weights(&self, job: &Job) -> Result<Option<Resolved>> {
        self.check_base(job)?;
        if !job
            .request
            .spec
            .dpo
            .has_reference(job.request.reference.is_some())
        {
            return Ok(None);
        }
        self.check_reference(job).await?;
        match &job.request.reference {
            Some(name) => {
                let reference = self.resolve(name).await?;
                check_content(job, "reference", |pins| pins.reference.as_ref(), &reference)?;
                Ok(Some(reference))
            }
            None => self.start_weights(job).await.map(Some),
        }
    }

    /// Returns the reference for scoring a policy if the request names none: the reference of the
    /// policy's job, or for a base model the model itself. A job with a moving reference (TR-DPO)
    /// stores it in its checkpoints. The live weights of such a job are scored against the run's
    /// present reference.
    ///
    /// # Errors
    /// `FailedPrecondition` (`NO_REFERENCE`) if the checkpoint lacks the reference file that it
    /// should have.
    pub(super) async fn default_reference(&self, policy: &Resolved) -> Result<Option<Resolved>> {
        let Some(job) = &policy.job else {
            return Ok(Some(policy.clone()));
        };
        if job.request.spec.dpo.reference_sync.is_none() {
            return self.reference_weights(job).await;
        }
        let version = format!("{}/reference", policy.version);
        if let WeightsRef::Live { job } = &policy.weights {
            return Ok(Some(Resolved {
                weights: WeightsRef::LiveReference { job: job.clone() },
                version,
                ..policy.clone()
            }));
        }
        let WeightsRef::Full {
            model,
            dir,
            content,
        } = policy.weights.clone()
        else {
            return Err(ServiceError::internal(format!(
                "{} has a moving reference but is not a full checkpoint",
                policy.version
            )));
        };
        let file = dir.join(REFERENCE_FILE);
        if !blocking(move || file.is_file()).await? {
            let message = format!(
                "{} does not hold its job's moved reference ({REFERENCE_FILE}): name a reference, \
                 e.g. models/{model}, or another checkpoint",
                policy.version
            );
            return Err(ServiceError::FailedPrecondition {
                reason: Reason::NoReference,
                message,
            });
        }
        Ok(Some(Resolved {
            weights: WeightsRef::StoredReference {
                model,
                dir,
                content,
            },
            version,
            ..policy.clone()
        }))
    }
}

/// Checks that a checkpoint named by a job has the content that it had when the job was created.
///
/// # Errors
/// `FailedPrecondition` (`MODEL_CHANGED`) with both hashes if it differs.
fn check_content(
    job: &Job,
    what: &str,
    pinned: impl Fn(&ContentPins) -> Option<&String>,
    found: &Resolved,
) -> Result<()> {
    let contents = job
        .request
        .pins
        .as_ref()
        .and_then(|pins| pins.contents.as_ref());
    let (WeightsRef::Adapter { content, .. } | WeightsRef::Full { content, .. }) = &found.weights
    else {
        return Ok(());
    };
    let Some(pinned) = contents
        .and_then(pinned)
        .filter(|pinned| *pinned != content)
    else {
        return Ok(());
    };
    let message = format!(
        "trainingJobs/{} was made with a {what} of the content {pinned}, {} has {content} now: \
         restore the checkpoint that the job was made with",
        job.id, found.version
    );
    Err(ServiceError::FailedPrecondition {
        reason: Reason::ModelChanged,
        message,
    })
}

/// Returns the hash, or `none` for a part that a model does not have.
fn or_none(hash: &str) -> &str {
    if hash.is_empty() { "none" } else { hash }
}
