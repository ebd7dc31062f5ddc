//! Completes the names of policies and references: a base model's or a job's bare name suffices.

use super::failure::Failure;
use super::short_names;
use crate::domain::names::is_valid_id;
use crate::domain::similar::nearest;
use crate::rpc::client::{Client, is_absent};
use crate::rpc::pb;

const MODEL_PREFIX: &str = "models/";
const JOB_PREFIX: &str = "trainingJobs/";
const CHECKPOINTS: &str = "/checkpoints/";
/// Maximum number of models that an error lists.
const MAX_LISTED_MODELS: usize = 20;

/// Completes names with the models and jobs of one server.
pub(super) struct PolicyNames {
    client: Client,
    /// IDs of the server's models.
    models: Vec<String>,
    /// For models that the command serves itself, without jobs: the flag that names them, and what
    /// to do instead of naming a job.
    own_models: Option<(&'static str, &'static str)>,
}

impl PolicyNames {
    /// Asks the server for its models.
    pub(super) async fn of(client: &Client) -> Result<Self, Failure> {
        let mut service = client.models();
        let answer = service.list_models(pb::ListModelsRequest {}).await?;
        let models = answer.into_inner().models;
        let id = |name: String| name.trim_start_matches(MODEL_PREFIX).to_owned();
        Ok(PolicyNames {
            client: client.clone(),
            models: models.into_iter().map(|m| id(m.name)).collect(),
            own_models: None,
        })
    }

    /// Lets errors say that the command itself serves the models that `flag` names, and that there
    /// are no jobs. `remedy` says what to do instead of naming a job.
    pub(super) fn without_jobs(self, flag: &'static str, remedy: &'static str) -> Self {
        PolicyNames {
            own_models: Some((flag, remedy)),
            ..self
        }
    }

    /// Returns the only model of the server. `flag` is the one that names a model.
    ///
    /// # Errors
    /// Returns a failure with the models' names unless there is exactly one.
    pub(super) fn only_model(&self, flag: &str) -> Result<String, Failure> {
        match &self.models[..] {
            [one] => Ok(format!("{MODEL_PREFIX}{one}")),
            _ => Err(Failure::Usage(format!(
                "the server has {} models: name one with {flag} ({})",
                self.models.len(),
                self.listed()
            ))),
        }
    }

    /// Returns the full name of what `given` stands for: `models/ID` for a base model, and for a
    /// job without a checkpoint its latest one. `word` is the caller's word for the field.
    ///
    /// # Errors
    /// Returns a failure with the models of the server if there is neither such a model nor such a
    /// job.
    pub(super) async fn complete(&self, word: &str, given: &str) -> Result<String, Failure> {
        let (of, _) = given.split_once(CHECKPOINTS).unwrap_or((given, ""));
        if of != given || given.starts_with(JOB_PREFIX) || given == short_names::LAST {
            if !short_names::is_whole_job(of) && !self.may_list_jobs().await? {
                return Err(Failure::Usage(format!(
                    "{word} {given}: only a token with the role submit can list jobs, which {of} \
                     needs: name the job with its whole ID, trainingJobs/ID/checkpoints/STEP"
                )));
            }
            return short_names::checkpoint(&self.client, given).await;
        }
        let id = given.strip_prefix(MODEL_PREFIX).unwrap_or(given);
        if self.models.iter().any(|model| model == id) {
            return Ok(format!("{MODEL_PREFIX}{id}"));
        }
        let mut hint = "";
        if is_valid_id(given) {
            if self.may_list_jobs().await? {
                let job = short_names::job(&self.client, given).await?;
                if self.is_job(&job).await? {
                    return Ok(format!("{job}{CHECKPOINTS}latest"));
                }
            } else if short_names::is_whole_job(given) {
                // The server checks the name when it is used.
                return Ok(format!("{JOB_PREFIX}{given}{CHECKPOINTS}latest"));
            } else {
                hint = ", its whole id for a token without the role submit";
            }
        }
        let meant = nearest(id, self.models.iter().map(String::as_str))
            .map(|model| format!("did you mean {MODEL_PREFIX}{model}? "))
            .unwrap_or_default();
        let listed = self.listed();
        let there_are = match self.own_models {
            None => format!("This server has {listed}; a job is named by its id{hint}"),
            Some((flag, remedy)) => format!("{flag} has {listed} and no jobs: {remedy}"),
        };
        Err(Failure::Usage(format!(
            "{word} {given} does not exist: {meant}{there_are}"
        )))
    }

    /// Completes the names of policy and reference, as the flags of these names give them.
    ///
    /// # Errors
    /// The errors of [`PolicyNames::complete`].
    pub(super) async fn complete_options(
        &self,
        options: &mut pb::ScoringOptions,
    ) -> Result<(), Failure> {
        options.policy = self.complete("--policy", &options.policy).await?;
        if !options.reference.is_empty() {
            options.reference = self.complete("--reference", &options.reference).await?;
        }
        Ok(())
    }

    async fn may_list_jobs(&self) -> Result<bool, Failure> {
        short_names::may_list_jobs(&self.client).await
    }

    /// Returns true if the caller may see a job with this name.
    async fn is_job(&self, name: &str) -> Result<bool, Failure> {
        let request = pb::GetTrainingJobRequest {
            name: name.to_owned(),
        };
        match self.client.training().get_training_job(request).await {
            Ok(_) => Ok(true),
            // The id is not legal, the job does not exist, or it belongs to another client.
            Err(refused) if is_absent(&refused) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn listed(&self) -> String {
        let names: Vec<String> = self
            .models
            .iter()
            .take(MAX_LISTED_MODELS)
            .map(|id| format!("{MODEL_PREFIX}{id}"))
            .collect();
        match self.models.len().saturating_sub(MAX_LISTED_MODELS) {
            0 if names.is_empty() => "no models".to_owned(),
            0 => names.join(", "),
            more => format!("{} and {more} more", names.join(", ")),
        }
    }
}

/// Returns a warning if policy and reference are the same base model. An empty reference stands for
/// the policy's own.
pub(super) fn same_model_warning(policy: &str, reference: &str) -> Option<String> {
    let is_same = policy.starts_with(MODEL_PREFIX) && (reference.is_empty() || reference == policy);
    is_same.then(|| {
        format!(
            "{policy} is compared with itself, so that every probability is 0.5: name a trained \
             checkpoint with --policy, or another model with --reference"
        )
    })
}
