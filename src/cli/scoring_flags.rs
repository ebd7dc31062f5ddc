//! The flags of the commands that score: policy, reference and the options of rewards. `generate`
//! reads its flags of chat templates with the same functions.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value};

use super::failure::Failure;
use super::whole_number::whole_from;
use crate::rpc::pb;

/// The policy, the reference and the options of `score`, `score-files` and `evaluate`.
#[derive(Clone, Debug, Args)]
pub struct ScoringArgs {
    /// The policy: a base model's name, a job (its latest checkpoint), or
    /// JOB/checkpoints/STEP|latest|best.
    #[arg(long)]
    pub policy: String,
    /// The reference: named as the policy is. Default: the reference of the policy's job, or for a
    /// base model the model itself.
    #[arg(long, default_value = "")]
    pub reference: String,
    /// β of the rewards. Default: the job's, or 0.1 for a base model.
    #[arg(long, allow_negative_numbers = true)]
    pub beta: Option<f64>,
    /// Maximum number of tokens of prompt + answer. Default: the job's, or 1024 for a base model.
    #[arg(long, value_parser = whole_from::<0>)]
    pub max_length: Option<u32>,
    /// Variables for the chat template, as a JSON object: {"enable_thinking": false}. A row's own
    /// chat_template_kwargs override them.
    #[arg(long, value_name = "JSON")]
    pub template_args: Option<String>,
    /// A file with a JSON array of tools, for rows without tools of their own.
    #[arg(long, value_name = "FILE")]
    pub tools: Option<PathBuf>,
    /// Reward of an answer: from the sum over its tokens, from the mean, or as the job trained it.
    #[arg(long, default_value = "as_trained", value_parser = ["as_trained", "sum", "mean"])]
    pub normalization: String,
}

impl ScoringArgs {
    /// Returns the options of a call, with policy and reference as they were given.
    ///
    /// # Errors
    /// Returns a failure if the value of `--template-args` is not a JSON object, or the file of
    /// `--tools` cannot be read.
    pub(super) fn options(&self) -> Result<pb::ScoringOptions, Failure> {
        Ok(pb::ScoringOptions {
            policy: self.policy.clone(),
            reference: self.reference.clone(),
            beta: self.beta,
            max_length: self.max_length,
            per_token_logprobs: false,
            chat_template_kwargs: None,
            chat_template_kwargs_json: template_arguments(self.template_args.as_deref())?,
            tools: Vec::new(),
            tools_json: tools(self.tools.as_deref())?,
            normalization: normalization(&self.normalization).into(),
        })
    }
}

/// Checks that the value of `--template-args` is a JSON object and returns it unchanged; without
/// the flag the result is empty. The text is sent as JSON, because a Struct would lose the order of
/// keys and turn 1.0 into 1.
pub(super) fn template_arguments(text: Option<&str>) -> Result<String, Failure> {
    let Some(text) = text else {
        return Ok(String::new());
    };
    let _: Map<String, Value> = serde_json::from_str(text).map_err(|e| {
        Failure::Usage(format!(
            "--template-args: {e}; give a JSON object such as {{\"enable_thinking\": false}}"
        ))
    })?;
    Ok(text.to_owned())
}

/// Reads the file of `--tools`; without the flag the result is empty.
pub(super) fn tools(file: Option<&Path>) -> Result<String, Failure> {
    let Some(path) = file else {
        return Ok(String::new());
    };
    std::fs::read_to_string(path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))
}

/// Parses the value of `--normalization`.
fn normalization(name: &str) -> pb::RewardNormalization {
    match name {
        "sum" => pb::RewardNormalization::Sum,
        "mean" => pb::RewardNormalization::Mean,
        _ => pb::RewardNormalization::AsTrained,
    }
}
