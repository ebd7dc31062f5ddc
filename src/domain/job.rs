//! A training job and its life.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::identity::Pins;
use super::message::TemplateArguments;
use super::names::PolicyName;
use super::reason::StoredReason;
use super::training::{GivenLora, TrainingSpec};

/// Milliseconds since the Unix epoch, UTC.
pub type Millis = i64;

/// Metrics by their TRL names.
pub type Metrics = BTreeMap<String, f64>;

/// Metrics in JSON, which has no infinities: what is not finite is left out, and what is null is
/// taken for left out.
pub mod finite {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer};

    use super::Metrics;

    /// The finite ones.
    pub fn serialize<S: Serializer>(all: &Metrics, s: S) -> Result<S::Ok, S::Error> {
        s.collect_map(all.iter().filter(|(_, v)| v.is_finite()))
    }

    /// The ones that are numbers.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Metrics, D::Error> {
        let all = BTreeMap::<String, Option<f64>>::deserialize(d)?;
        Ok(all.into_iter().filter_map(|(name, v)| Some((name, v?))).collect())
    }
}

/// [`Metrics`] on their way to or from the store.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct Finite(#[serde(with = "finite")] pub Metrics);

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waiting for a device.
    Queued,
    /// Loading, tokenising.
    Preparing,
    /// Taking optimizer steps.
    Running,
    /// A pause was asked for.
    Pausing,
    /// Stopped with a checkpoint until it is resumed.
    Paused,
    /// A cancel was asked for.
    Cancelling,
    /// Ended by a cancel.
    Cancelled,
    /// Ended well.
    Succeeded,
    /// Ended by an error.
    Failed,
}

impl JobState {
    /// Every state.
    pub const ALL: [JobState; 9] = [
        JobState::Queued,
        JobState::Preparing,
        JobState::Running,
        JobState::Pausing,
        JobState::Paused,
        JobState::Cancelling,
        JobState::Cancelled,
        JobState::Succeeded,
        JobState::Failed,
    ];

    /// Whether nothing will change any more.
    pub fn is_final(self) -> bool {
        matches!(self, JobState::Cancelled | JobState::Succeeded | JobState::Failed)
    }

    /// Whether the job may go from `self` to `to`. A drained or killed server's jobs go back to
    /// `Queued`.
    pub fn may_become(self, to: JobState) -> bool {
        use JobState::*;
        match self {
            Queued => matches!(to, Preparing | Paused | Cancelled | Failed),
            Preparing => matches!(to, Running | Pausing | Cancelling | Failed | Queued),
            Running => matches!(to, Succeeded | Failed | Pausing | Cancelling | Queued),
            // It may end by itself before the pause takes hold.
            Pausing => matches!(to, Paused | Succeeded | Failed | Cancelling),
            Paused => matches!(to, Queued | Cancelled),
            Cancelling => matches!(to, Cancelled | Failed),
            Cancelled | Succeeded | Failed => false,
        }
    }

    /// The name in the store and in logs.
    pub fn name(self) -> &'static str {
        match self {
            JobState::Queued => "queued",
            JobState::Preparing => "preparing",
            JobState::Running => "running",
            JobState::Pausing => "pausing",
            JobState::Paused => "paused",
            JobState::Cancelling => "cancelling",
            JobState::Cancelled => "cancelled",
            JobState::Succeeded => "succeeded",
            JobState::Failed => "failed",
        }
    }

    /// The state of that name.
    pub fn parse(name: &str) -> Option<JobState> {
        JobState::ALL.into_iter().find(|s| s.name() == name)
    }
}

/// What to do with rows that fail validation; never silent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowPolicy {
    /// Refuse the job.
    #[default]
    Reject,
    /// Leave them out and list them.
    Skip,
}

/// The rows to evaluate on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evaluation {
    /// None.
    #[default]
    None,
    /// A dataset of their own, by id.
    Dataset(String),
    /// A fraction in (0, 1) split off by the seed.
    Fraction(f64),
}

/// What a client asked for, as pinned at creation; title, labels and priority may change later.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobRequest {
    /// A title for people.
    pub display_name: String,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// Higher goes first.
    #[serde(default)]
    pub priority: i32,
    /// The base model under it, which stays known when the jobs that it continues are deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The content that the job depends on; `None` for jobs of version 0.1 that have not started
    /// since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pins: Option<Pins>,
    /// What is trained.
    pub policy: PolicyName,
    /// `None`: the policy's own start weights.
    pub reference: Option<PolicyName>,
    /// The dataset's id.
    pub dataset: String,
    /// Rows to evaluate on.
    pub evaluation: Evaluation,
    /// Hyper-parameters.
    pub spec: TrainingSpec,
    /// The fields of LoRA that the client named, which are checked against the adapter that the job
    /// starts from. Not stored.
    #[serde(skip)]
    pub given_lora: GivenLora,
    /// Bad rows.
    pub row_policy: RowPolicy,
    /// Milliseconds that it is kept after its end; `None` is for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
    /// Variables for the chat template; those of a row win.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub chat_template_kwargs: Map<String, Value>,
}

/// How far a job is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps taken.
    pub step: u64,
    /// Optimizer steps in all.
    pub total_steps: u64,
    /// Epochs done.
    pub epoch: f64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds to go.
    pub eta_seconds: Option<f64>,
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    /// The reason, whose name is stored, e.g. `NON_FINITE_LOSS` or `DATASET_INVALID`.
    pub reason: StoredReason,
    /// In words, with the remedy.
    pub message: String,
}

/// A job as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The id in `trainingJobs/{id}`.
    pub id: String,
    /// Counts the changes.
    pub version: i64,
    /// What was asked for.
    pub request: JobRequest,
    /// Where it is.
    pub state: JobState,
    /// Why it failed; of a queued job, why it was put back in the queue.
    pub error: Option<JobError>,
    /// How far it is.
    pub progress: Progress,
    /// The newest metrics.
    pub latest_metrics: Metrics,
    /// Rows left out, in words.
    pub skipped_rows: Vec<String>,
    /// Created.
    pub create_time: Millis,
    /// First began to prepare.
    pub start_time: Option<Millis>,
    /// Ended.
    pub end_time: Option<Millis>,
    /// Since when it waits for a device: its place among jobs of its priority.
    pub turn: Millis,
    /// The trace of the call that made it, as W3C's `traceparent`.
    pub trace: Option<String>,
    /// The client that made it; empty without authentication.
    pub owner: String,
}

impl Job {
    /// The tools and variables that the chat template gets where a row has none of its own.
    pub fn template_arguments(&self) -> TemplateArguments {
        TemplateArguments { tools: None, kwargs: self.request.chat_template_kwargs.clone() }
    }

    /// When it is deleted: its time to live after its end.
    pub fn expire_time(&self) -> Option<Millis> {
        Some(self.end_time?.saturating_add(self.request.ttl_ms? as Millis))
    }

    /// Changes whenever title, labels, priority or state do; progress leaves it.
    pub fn etag(&self) -> String {
        let mut hash = blake3::Hasher::new();
        let r = &self.request;
        for part in [r.display_name.as_str(), self.state.name()]
            .into_iter()
            .chain(r.labels.iter().flat_map(|(k, v)| [k.as_str(), v]))
        {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hash.update(&r.priority.to_le_bytes());
        hash.finalize().to_hex()[..16].to_owned()
    }
}

/// A complete state on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The job's id.
    pub job: String,
    /// The optimizer step.
    pub step: u64,
    /// Best so far.
    pub best: bool,
    /// Whether it is a LoRA adapter.
    pub adapter: bool,
    /// Bytes on disk.
    pub size_bytes: u64,
    /// Metrics then.
    pub metrics: Metrics,
    /// When it was complete.
    pub create_time: Millis,
    /// The hash of its state file, which lists the hashes of its other files; empty for those of
    /// older versions.
    pub digest: String,
}

/// An event as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// 1, 2, 3, … within the job.
    pub sequence: u64,
    /// When.
    pub time: Millis,
    /// What.
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EventKind {
    /// The job changed state.
    StateChange {
        /// Before; `None` for a new job.
        from: Option<JobState>,
        /// After.
        to: JobState,
        /// Why.
        reason: String,
    },
    /// One logged step.
    Step {
        /// The optimizer step.
        step: u64,
        /// How far.
        progress: Progress,
        /// By name.
        #[serde(with = "finite")]
        metrics: Metrics,
    },
    /// One evaluation.
    Eval {
        /// After which step.
        step: u64,
        /// By name.
        #[serde(with = "finite")]
        metrics: Metrics,
    },
    /// A checkpoint is complete.
    CheckpointCreated {
        /// The step.
        step: u64,
        /// Best so far.
        best: bool,
    },
    /// A message for people.
    Log {
        /// info, warning, error.
        severity: String,
        /// The text.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_that_are_no_numbers_are_left_out() {
        let metrics =
            Metrics::from([("a".into(), f64::NAN), ("b".into(), 1.5), ("c".into(), f64::INFINITY)]);
        let event = EventKind::Eval { step: 1, metrics };
        let text = serde_json::to_string(&event).unwrap();
        let EventKind::Eval { metrics, .. } = serde_json::from_str(&text).unwrap() else {
            panic!()
        };
        assert_eq!(metrics, Metrics::from([("b".into(), 1.5)]));
        let old = r#"{"kind":"eval","step":1,"metrics":{"a":null,"b":2.0}}"#;
        assert!(serde_json::from_str::<EventKind>(old).is_ok(), "what an older version stored");
    }

    #[test]
    fn final_states_have_no_way_out_and_every_other_state_has_one() {
        for s in JobState::ALL {
            assert_eq!(JobState::ALL.iter().any(|t| s.may_become(*t)), !s.is_final(), "{s:?}");
            assert_eq!(JobState::parse(s.name()), Some(s));
        }
    }
}
