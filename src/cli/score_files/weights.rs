//! Identifies the weights that score: their names with the step, and hashes of their content.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cli::failure::Failure;
use crate::cli::policy_names::PolicyNames;
use crate::rpc::client::{Client, Status, is_absent};
use crate::rpc::pb;

/// Time limit for the answer of [`identify`].
pub(super) const IDENTITY_LIMIT: Duration = Duration::from_secs(120);

/// Identity of the policy and the reference at one server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WeightsIdentity {
    /// Name of the policy's weights, with the step.
    pub policy: String,
    /// Name of the reference's weights; empty without one.
    pub reference: String,
    /// Normalization of the rewards: sum or mean.
    pub normalization: String,
    /// Hashes of the policy's content.
    pub policy_content: Value,
    /// Hashes of the reference's content.
    pub reference_content: Value,
    /// The stored calibration, if scores have a calibrated probability.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
}

/// Completes the names of policy and reference. A name that means other weights later, `latest` or
/// `best` of a job that has not ended, is refused.
///
/// # Errors
/// Returns a failure if a name means nothing, or means weights that change.
pub(super) async fn complete_names(
    client: &Client,
    names: &PolicyNames,
    options: &mut pb::ScoringOptions,
) -> Result<(), Failure> {
    names.complete_options(options).await?;
    refuse_moving(client, "--policy", &options.policy).await?;
    refuse_moving(client, "--reference", &options.reference).await
}

async fn refuse_moving(client: &Client, flag: &str, name: &str) -> Result<(), Failure> {
    let Some((job, "latest" | "best")) = name.split_once("/checkpoints/") else {
        return Ok(());
    };
    let request = pb::GetTrainingJobRequest {
        name: job.to_owned(),
    };
    let found = match client.training().get_training_job(request).await {
        Ok(found) => found.into_inner(),
        // This token may only score. The versions in the answers show later whether they change.
        Err(refused) if is_absent(&refused) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let has_ended = matches!(
        found.state(),
        pb::JobState::Succeeded | pb::JobState::Failed | pb::JobState::Cancelled
    );
    match has_ended {
        true => Ok(()),
        false => Err(moving(flag, name, job)),
    }
}

fn moving(flag: &str, name: &str, job: &str) -> Failure {
    Failure::Usage(format!(
        "{flag} {name} changes while {job} trains, so that the parts would be scored by different \
         weights: name a step (bradley checkpoints list {job}), or wait until the job has ended"
    ))
}

/// Asks a server for the identity of the weights that these options mean. It scores a tiny pair for
/// this.
///
/// # Errors
/// Returns the server's status.
pub(super) async fn identify(
    client: &Client,
    options: &pb::ScoringOptions,
) -> Result<WeightsIdentity, Status> {
    let plain = |text: &str| {
        Some(pb::Text {
            form: Some(pb::text::Form::Plain(text.to_owned())),
        })
    };
    let pair = pb::Pair {
        prompt: plain("1 + 1 ="),
        a: plain(" 2"),
        b: plain(" 3"),
        ..Default::default()
    };
    // The answer names the weights, also if the pair's own result is an error, e.g. because it has
    // more tokens than max_length. It has no tools, because it is plain text.
    let request = pb::ScorePairsRequest {
        options: Some(pb::ScoringOptions {
            tools_json: String::new(),
            ..options.clone()
        }),
        pairs: vec![pair],
    };
    let answer = client.scoring().score_pairs(request).await?.into_inner();
    let normalization = match answer.normalization() {
        pb::RewardNormalization::Mean => "mean",
        _ => "sum",
    };
    Ok(WeightsIdentity {
        normalization: normalization.to_owned(),
        policy_content: content(client, &answer.policy_version).await?,
        reference_content: content(client, &answer.reference_version).await?,
        calibration: calibration(&answer),
        policy: answer.policy_version,
        reference: answer.reference_version,
    })
}

/// Describes the calibration of an answer, if its scores have one.
pub(super) fn calibration(answer: &pb::ScorePairsResponse) -> Option<String> {
    answer.calibration.as_ref().map(|c| {
        format!(
            "temperature {:?}, length coefficient {:?}",
            c.temperature, c.length_coefficient
        )
    })
}

/// Returns the hashes of a model, or the digest of a checkpoint with the hashes of its base. For a
/// checkpoint of a version that stored no digest, its time and size stand in for it.
async fn content(client: &Client, version: &str) -> Result<Value, Status> {
    if version.starts_with("models/") {
        let request = pb::GetModelRequest {
            name: version.to_owned(),
        };
        let model = client.models().get_model(request).await?.into_inner();
        return Ok(hashes(model.identity.as_ref()));
    }
    let Some((job, step)) = version.split_once("/checkpoints/") else {
        return Ok(Value::Null);
    };
    let step = step.split('/').next().unwrap_or(step);
    let request = pb::GetCheckpointRequest {
        name: format!("{job}/checkpoints/{step}"),
    };
    match client.checkpoints().get_checkpoint(request).await {
        Ok(found) => {
            let found = found.into_inner();
            let time = found.create_time.unwrap_or_default();
            let base = hashes(found.base.as_ref());
            Ok(match found.digest.as_str() {
                // A checkpoint of a version that stored no digest.
                "" => json!({
                    "created": format!("{}.{:09}", time.seconds, time.nanos),
                    "bytes": found.size_bytes,
                    "base": base,
                }),
                digest => json!({"digest": digest, "base": base}),
            })
        }
        // This token may only score.
        Err(refused) if is_absent(&refused) => Ok(Value::Null),
        Err(error) => Err(error),
    }
}

fn hashes(identity: Option<&pb::ModelIdentity>) -> Value {
    let Some(identity) = identity else {
        return Value::Null;
    };
    json!({
        "weights": identity.weights,
        "config": identity.config,
        "tokenizer": identity.tokenizer,
        "chat_template": identity.chat_template,
    })
}

impl WeightsIdentity {
    /// Sets the options to the weights that were identified, so that `latest` and `best` mean these
    /// from now on.
    ///
    /// # Errors
    /// Returns a failure if they are the current weights of a running job.
    pub(super) fn pin(&self, options: &mut pb::ScoringOptions) -> Result<(), Failure> {
        if let Some((job, step)) = self.policy.split_once("/checkpoints/")
            && step.starts_with("latest")
        {
            return Err(moving("--policy", &self.policy, job));
        }
        options.policy = self.policy.clone();
        if !options.reference.is_empty() {
            options.reference = self.reference.clone();
        }
        Ok(())
    }

    /// Compares with the identity at the start of the run.
    ///
    /// # Errors
    /// Returns a failure that names the server and the weights if they differ.
    pub(super) fn check(&self, expected: &Self, address: &str) -> Result<(), Failure> {
        if self == expected {
            return Ok(());
        }
        let text = |text: &String| Value::from(text.as_str());
        let all = |of: &Self| {
            [
                text(&of.policy),
                text(&of.reference),
                of.policy_content.clone(),
                of.reference_content.clone(),
                text(&of.normalization),
                of.calibration
                    .as_deref()
                    .map(Value::from)
                    .unwrap_or_default(),
            ]
        };
        let names = [
            "the policy",
            "the reference",
            "the policy's content",
            "the reference's content",
            "the normalization",
            "the calibration",
        ];
        let mut pairs = names.into_iter().zip(all(expected)).zip(all(self));
        let (what, was, is) = pairs
            .find(|((_, was), is)| was != is)
            .map(|((what, was), is)| (what, was, is))
            .unwrap_or_default();
        Err(Failure::Failed(format!(
            "{what} has changed at {address} (before: {was}, now: {is}): the parts so far were \
             scored with the weights before; serve those again, or name another --out"
        )))
    }
}
