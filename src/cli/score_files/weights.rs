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
/// Determinant below which two pairs do not determine a temperature.
const MIN_DETERMINANT: f64 = 1e-9;

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
    options: &mut pb::ScoringOptions,
) -> Result<(), Failure> {
    let names = PolicyNames::of(client).await?;
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

/// Asks a server for the identity of the weights that these options mean. It scores two tiny pairs
/// for this, whose calibrated probabilities also identify the calibration.
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
    let pair = |other: &str| pb::Pair {
        prompt: plain("1 + 1 ="),
        a: plain(" 2"),
        b: plain(other),
        ..Default::default()
    };
    // The answer names the weights, also if the pair's own result is an error, e.g. because it has
    // more tokens than max_length.
    // The pairs may have more tokens than max_length, which is no matter: no such pair has a
    // calibrated probability either. They have no tools, because they are plain text.
    let request = pb::ScorePairsRequest {
        options: Some(pb::ScoringOptions {
            tools_json: String::new(),
            ..options.clone()
        }),
        pairs: vec![pair(" 3"), pair(" 3, or so I was told in school")],
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
        calibration: calibration(&answer.results),
        policy: answer.policy_version,
        reference: answer.reference_version,
    })
}

/// Returns a text that differs between calibrations, or `None` if the scores are not calibrated.
///
/// It has the two parameters of z = u·m + c·d, the logit of the calibrated probability of a pair
/// with the margin m and the difference d of tokens. They follow from two pairs. Rounded, they are
/// the same for servers whose scores differ in their last bits.
fn calibration(results: &[pb::PairResult]) -> Option<String> {
    let mut equations = Vec::new();
    for result in results {
        let Some(pb::pair_result::Result::Score(score)) = &result.result else {
            continue;
        };
        let probability = score.calibrated_probability?;
        let tokens = |answer: &Option<pb::CompletionScore>| {
            answer
                .as_ref()
                .map_or(0.0, |answer| f64::from(answer.tokens))
        };
        let logit = (probability / (1.0 - probability)).ln();
        equations.push([score.margin, tokens(&score.a) - tokens(&score.b), logit]);
    }
    let [[m1, d1, z1], [m2, d2, z2]] = equations[..] else {
        return None;
    };
    let determinant = m1 * d2 - m2 * d1;
    let (of_margin, of_length) = if determinant.abs() < MIN_DETERMINANT {
        // Policy and reference are the same, so that the temperature has no effect.
        (0.0, if d2 == 0.0 { 0.0 } else { z2 / d2 })
    } else {
        (
            (z1 * d2 - z2 * d1) / determinant,
            (m1 * z2 - m2 * z1) / determinant,
        )
    };
    let temperature = match of_margin {
        0.0 => "any temperature".to_owned(),
        of_margin => format!("temperature {:.4e}", 1.0 / of_margin),
    };
    Some(format!("{temperature}, length coefficient {of_length:.4e}"))
}

/// Returns the hashes of a model, or of a checkpoint, which is written once, its time and size and
/// the hashes of its base.
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
                // A checkpoint of a version that stored none.
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
                of.calibration.as_deref().map(Value::from).unwrap_or_default(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn result(margin: f64, tokens: [u32; 2], calibrated: Option<f64>) -> pb::PairResult {
        let answer = |tokens| {
            Some(pb::CompletionScore {
                tokens,
                ..Default::default()
            })
        };
        let score = pb::PairScore {
            margin,
            a: answer(tokens[0]),
            b: answer(tokens[1]),
            calibrated_probability: calibrated,
            ..Default::default()
        };
        pb::PairResult {
            id: String::new(),
            result: Some(pb::pair_result::Result::Score(score)),
        }
    }

    /// Returns the text for the calibration with a temperature and a length coefficient.
    fn text(margins: [f64; 2], temperature: f64, coefficient: f64) -> Option<String> {
        let calibrated = |margin: f64, difference: f64| {
            Some(1.0 / (1.0 + (-margin / temperature - coefficient * difference).exp()))
        };
        calibration(&[
            result(margins[0], [2, 2], calibrated(margins[0], 0.0)),
            result(margins[1], [2, 9], calibrated(margins[1], -7.0)),
        ])
    }

    #[test]
    fn a_calibration_is_identified_whatever_the_last_bits_of_the_margins() {
        let usual = text([0.31, -0.2], 2.5, -0.03).unwrap();
        assert_eq!(usual, "temperature 2.5000e0, length coefficient -3.0000e-2");
        assert_eq!(
            text([0.31 + 1e-12, -0.2 - 1e-12], 2.5, -0.03).unwrap(),
            usual
        );
        assert_ne!(text([0.31, -0.2], 2.6, -0.03).unwrap(), usual);
        assert_ne!(text([0.31, -0.2], 2.5, -0.031).unwrap(), usual);
        // Without a difference between policy and reference, only lengths count.
        assert_eq!(text([0.0, 0.0], 2.5, -0.03), text([0.0, 0.0], 3.0, -0.03));
        assert_ne!(text([0.0, 0.0], 2.5, -0.03), text([0.0, 0.0], 2.5, 0.0));
        let raw = [result(0.3, [2, 2], None), result(0.2, [2, 9], None)];
        assert_eq!(calibration(&raw), None);
        assert_eq!(calibration(&[]), None);
    }
}
