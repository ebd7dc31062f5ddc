//! Resource names: `models/{id}`, `datasets/{id}`, `trainingJobs/{id}`,
//! `trainingJobs/{id}/checkpoints/{step|latest|best}`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Checkpoint within a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointRef {
    /// The checkpoint after this optimizer step.
    Step(u64),
    /// The newest checkpoint. Scoring and generation use the current weights instead if the job
    /// runs in this process.
    Latest,
    /// The best checkpoint by the job's metric.
    Best,
}

/// Name of a set of weights.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PolicyName {
    /// `models/{id}`.
    Model(String),
    /// `trainingJobs/{job}/checkpoints/{which}`.
    Checkpoint {
        /// The job's id.
        job: String,
        /// Checkpoint of this job.
        which: CheckpointRef,
    },
}

/// Returns true if `name` has the form `owner/name` of the Hugging Face hub, without a revision.
pub fn is_hub_id(name: &str) -> bool {
    let plain = |p: &str| {
        !p.is_empty()
            && !p.starts_with('.')
            && p.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    name.split_once('/')
        .is_some_and(|(owner, name)| plain(owner) && plain(name))
}

/// Name under which other programs load a base model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseName {
    /// `owner/name` on the Hugging Face hub, or else the id in `models/{id}`. Never a path.
    pub name: String,
    /// Branch, tag or commit on the hub, if one was given.
    pub revision: Option<String>,
}

impl BaseName {
    /// Splits a hub id `owner/name[@revision]`.
    pub fn from_hub(source: &str) -> Self {
        let (name, revision) = match source.split_once('@') {
            Some((name, revision)) => (name, Some(revision.to_owned())),
            None => (source, None),
        };
        BaseName {
            name: name.to_owned(),
            revision,
        }
    }
}

impl From<&str> for BaseName {
    fn from(name: &str) -> Self {
        BaseName {
            name: name.to_owned(),
            revision: None,
        }
    }
}

/// Returns true if `id` has 1 to 128 letters, digits, `-`, `_` or `.`, and does not start with a
/// dot.
pub fn is_valid_id(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= 128
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn id_after<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    name.strip_prefix(prefix).filter(|id| is_valid_id(id))
}

/// Returns the id in `trainingJobs/{id}`.
pub fn parse_job(name: &str) -> Option<&str> {
    id_after(name, "trainingJobs/")
}

/// Returns the id in `datasets/{id}`.
pub fn parse_dataset(name: &str) -> Option<&str> {
    id_after(name, "datasets/")
}

/// Returns the id in `models/{id}`.
pub fn parse_model(name: &str) -> Option<&str> {
    id_after(name, "models/")
}

/// Returns the job and the checkpoint in `trainingJobs/{id}/checkpoints/{step|latest|best}`.
pub fn parse_checkpoint(name: &str) -> Option<(&str, CheckpointRef)> {
    let (job, which) = name
        .strip_prefix("trainingJobs/")?
        .split_once("/checkpoints/")?;
    let which = match which {
        "latest" => CheckpointRef::Latest,
        "best" => CheckpointRef::Best,
        digits => CheckpointRef::Step(parse_step(digits)?),
    };
    is_valid_id(job).then_some((job, which))
}

/// Returns the step in decimal digits, without a sign and without leading zeros, so that each
/// checkpoint has one name.
fn parse_step(digits: &str) -> Option<u64> {
    let step: u64 = digits.parse().ok()?;
    (step.to_string() == digits).then_some(step)
}

/// Parses the name of a base model or of a checkpoint.
pub fn parse_policy(name: &str) -> Option<PolicyName> {
    match parse_model(name) {
        Some(id) => Some(PolicyName::Model(id.to_owned())),
        None => parse_checkpoint(name).map(|(job, which)| PolicyName::Checkpoint {
            job: job.to_owned(),
            which,
        }),
    }
}

impl fmt::Display for CheckpointRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CheckpointRef::Step(n) => write!(f, "{n}"),
            CheckpointRef::Latest => f.write_str("latest"),
            CheckpointRef::Best => f.write_str("best"),
        }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PolicyName::Model(id) => write!(f, "models/{id}"),
            PolicyName::Checkpoint { job, which } => {
                write!(f, "trainingJobs/{job}/checkpoints/{which}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_hostile_ones_are_refused() {
        for n in [
            "models/m",
            "trainingJobs/a-1/checkpoints/12",
            "trainingJobs/a/checkpoints/0",
            "trainingJobs/a/checkpoints/latest",
            "trainingJobs/a/checkpoints/best",
        ] {
            assert_eq!(parse_policy(n).unwrap().to_string(), n);
        }
        for n in [
            "models/",
            "models/../x",
            "models/.",
            "datasets/a",
            "trainingJobs/a/b/checkpoints/1",
            "trainingJobs/a/checkpoints/-1",
            "trainingJobs/a/checkpoints/+5",
            "trainingJobs/a/checkpoints/007",
            "trainingJobs/a/checkpoints/00",
            "trainingJobs/a/checkpoints/",
            "",
        ] {
            assert_eq!(parse_policy(n), None, "{n}");
        }
    }
}
