//! Training jobs: request, state, progress, checkpoints and events.

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

/// Metrics by the names that TRL gives them.
pub type Metrics = BTreeMap<String, f64>;

/// JSON form of [`Metrics`]. JSON has no infinities or NaN: values that are not finite are left out
/// when writing, and `null` is ignored when reading.
pub mod finite {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer};

    use super::Metrics;

    /// Writes only the finite metrics.
    pub fn serialize<S: Serializer>(all: &Metrics, s: S) -> Result<S::Ok, S::Error> {
        s.collect_map(all.iter().filter(|(_, v)| v.is_finite()))
    }

    /// Reads the metrics and skips those that are `null`.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Metrics, D::Error> {
        let all = BTreeMap::<String, Option<f64>>::deserialize(d)?;
        Ok(all
            .into_iter()
            .filter_map(|(name, v)| Some((name, v?)))
            .collect())
    }
}

/// [`Metrics`] in the JSON form of [`finite`], as the store has them.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct Finite(#[serde(with = "finite")] pub Metrics);

/// State of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waiting for a device.
    Queued,
    /// Loading weights and tokenising the data.
    Preparing,
    /// Taking optimizer steps.
    Running,
    /// A pause was requested; the run has not stopped yet.
    Pausing,
    /// Stopped until a client resumes it. It then continues from its newest checkpoint, if any.
    Paused,
    /// A cancel was requested; the run has not stopped yet.
    Cancelling,
    /// Ended because of a cancel.
    Cancelled,
    /// Ended successfully.
    Succeeded,
    /// Ended because of an error.
    Failed,
}

impl JobState {
    /// All states.
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

    /// Returns true if the state can never change again.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            JobState::Cancelled | JobState::Succeeded | JobState::Failed
        )
    }

    /// Returns true if a job may go from `self` to `to`. Jobs of a drained or killed server are
    /// requeued, that is, they go back to `Queued`.
    pub fn may_become(self, to: JobState) -> bool {
        use JobState::*;
        match self {
            Queued => matches!(to, Preparing | Paused | Cancelled | Failed),
            Preparing => matches!(to, Running | Pausing | Cancelling | Failed | Queued),
            Running => matches!(to, Succeeded | Failed | Pausing | Cancelling | Queued),
            // The run may end by itself before it notices the request.
            Pausing => matches!(to, Paused | Succeeded | Failed | Cancelling),
            Paused => matches!(to, Queued | Cancelled),
            Cancelling => matches!(to, Cancelled | Failed),
            Cancelled | Succeeded | Failed => false,
        }
    }

    /// Returns the name in the store and in logs.
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

    /// Returns the state with this name.
    pub fn parse(name: &str) -> Option<JobState> {
        JobState::ALL.into_iter().find(|s| s.name() == name)
    }
}

/// Handling of rows that fail validation. Bad rows are never ignored silently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowPolicy {
    /// Refuse the job.
    #[default]
    Reject,
    /// Leave the rows out and list them. Of a row that makes several pairs, only the bad pairs are
    /// left out.
    Skip,
}

/// Source of the evaluation rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evaluation {
    /// No evaluation.
    #[default]
    None,
    /// A separate dataset, by its id.
    Dataset(String),
    /// A fraction in (0, 1) of the training rows, split off with the job's seed.
    Fraction(f64),
}

/// The client's request, fixed when the job is created. Only title, labels, priority and time to
/// live may change later.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobRequest {
    /// Title, for display only.
    pub display_name: String,
    /// Labels that the client chose freely.
    pub labels: BTreeMap<String, String>,
    /// Jobs with a higher number run first.
    #[serde(default)]
    pub priority: i32,
    /// Id of the base model. Stored here so that it stays known after the jobs that this one
    /// continues are deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Content hashes that the job depends on. `None` for jobs of version 0.1 that have not started
    /// since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pins: Option<Pins>,
    /// Weights that the training starts from.
    pub policy: PolicyName,
    /// Reference weights; `None` means the weights that the policy starts from.
    pub reference: Option<PolicyName>,
    /// The dataset's id.
    pub dataset: String,
    /// Source of the evaluation rows.
    pub evaluation: Evaluation,
    /// Hyper-parameters.
    pub spec: TrainingSpec,
    /// LoRA fields that the client set. They are checked against the adapter that the job starts
    /// from and are not stored.
    #[serde(skip)]
    pub given_lora: GivenLora,
    /// Handling of rows that fail validation.
    pub row_policy: RowPolicy,
    /// Time in milliseconds for which the job is stored after its end; `None` means without limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
    /// Variables for the chat template; a row's own variables override them.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub chat_template_kwargs: Map<String, Value>,
}

/// Progress of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps taken.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Epochs completed, with the fraction of the current one.
    pub epoch: f64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Estimated time to the end, in seconds.
    pub eta_seconds: Option<f64>,
}

/// Error that ended a job, or that put it back in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    /// Reason; its name is stored, e.g. `NON_FINITE_LOSS` or `DATASET_INVALID`.
    pub reason: StoredReason,
    /// Explanation with the remedy.
    pub message: String,
}

/// A job as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The id in `trainingJobs/{id}`.
    pub id: String,
    /// Number of changes made to the job so far.
    pub version: i64,
    /// Request of the client that created the job.
    pub request: JobRequest,
    /// Current state.
    pub state: JobState,
    /// Error that ended the job. For a queued or paused job, the reason why its last run could not
    /// start: an input was missing or had changed, or too many runs waited for a device.
    pub error: Option<JobError>,
    /// Progress of the training.
    pub progress: Progress,
    /// Newest value of each metric.
    pub latest_metrics: Metrics,
    /// Descriptions of the rows that were left out.
    pub skipped_rows: Vec<String>,
    /// Time of creation.
    pub create_time: Millis,
    /// Time at which the job first entered `Preparing`.
    pub start_time: Option<Millis>,
    /// Time at which the job reached a final state.
    pub end_time: Option<Millis>,
    /// Time from which the job counts as queued: its creation, its last resumption by a client, or
    /// the end of its last time slice. Among jobs of the same priority the earliest goes first.
    pub queued_since: Millis,
    /// Trace of the call that created the job, as a W3C `traceparent`.
    pub trace: Option<String>,
    /// Client that created the job; empty without authentication.
    pub owner: String,
    /// Process that runs the job. Only jobs that are read for a client have it.
    pub worker: Option<JobWorker>,
}

/// The process that runs a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobWorker {
    /// Name of its machine, which in Kubernetes is that of the pod; its id if there is no name.
    pub replica: String,
    /// Time at which it last renewed the job's lease.
    pub lease_renewed: Millis,
    /// Time of the job's newest event.
    pub last_event_time: Option<Millis>,
}

impl Job {
    /// Returns the chat template's arguments for rows that have none of their own.
    pub fn template_arguments(&self) -> TemplateArguments {
        TemplateArguments {
            tools: None,
            kwargs: self.request.chat_template_kwargs.clone(),
        }
    }

    /// Returns the time at which the job is deleted: its end plus its time to live.
    pub fn expire_time(&self) -> Option<Millis> {
        Some(
            self.end_time?
                .saturating_add(self.request.ttl_ms? as Millis),
        )
    }

    /// Returns a tag that changes with title, labels, priority, time to live and state, but not
    /// with progress.
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
        if let Some(ttl_ms) = r.ttl_ms {
            hash.update(&ttl_ms.to_le_bytes());
        }
        hash.finalize().to_hex()[..16].to_owned()
    }
}

/// Record of a complete checkpoint on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The job's id.
    pub job: String,
    /// Optimizer step after which it was written.
    pub step: u64,
    /// True if it is the best of the job so far. A better one takes the mark away.
    pub best: bool,
    /// True if it holds a LoRA adapter, false if it holds full weights.
    pub adapter: bool,
    /// Bytes on disk.
    pub size_bytes: u64,
    /// Metrics at that step.
    pub metrics: Metrics,
    /// Time at which it was complete.
    pub create_time: Millis,
    /// Hash of its state file, which lists the hashes of its other files. Empty for checkpoints of
    /// older versions.
    pub digest: String,
}

/// Stored event of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Number of the event within the job, from 1.
    pub sequence: u64,
    /// Time at which the event was stored.
    pub time: Millis,
    /// Content of the event.
    pub kind: EventKind,
}

/// Content of an event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EventKind {
    /// The job changed state.
    StateChange {
        /// Previous state; `None` for a new job.
        from: Option<JobState>,
        /// New state.
        to: JobState,
        /// Explanation of the change.
        reason: String,
    },
    /// Metrics of an optimizer step that is logged.
    Step {
        /// The optimizer step.
        step: u64,
        /// Progress after the step.
        progress: Progress,
        /// Values by metric name.
        #[serde(with = "finite")]
        metrics: Metrics,
    },
    /// Metrics of an evaluation.
    Eval {
        /// Optimizer step after which the rows were evaluated.
        step: u64,
        /// Values by metric name.
        #[serde(with = "finite")]
        metrics: Metrics,
    },
    /// A checkpoint is complete.
    CheckpointCreated {
        /// Optimizer step after which it was written.
        step: u64,
        /// True if it was the best so far.
        best: bool,
    },
    /// Message for people.
    Log {
        /// `info`, `warning` or `error`.
        severity: String,
        /// Text of the message.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_that_are_no_numbers_are_left_out() {
        let metrics = Metrics::from([
            ("a".into(), f64::NAN),
            ("b".into(), 1.5),
            ("c".into(), f64::INFINITY),
        ]);
        let event = EventKind::Eval { step: 1, metrics };
        let text = serde_json::to_string(&event).unwrap();
        let EventKind::Eval { metrics, .. } = serde_json::from_str(&text).unwrap() else {
            panic!()
        };
        assert_eq!(metrics, Metrics::from([("b".into(), 1.5)]));
        let old = r#"{"kind":"eval","step":1,"metrics":{"a":null,"b":2.0}}"#;
        assert!(
            serde_json::from_str::<EventKind>(old).is_ok(),
            "an event that an older version stored cannot be read"
        );
    }

    #[test]
    fn final_states_have_no_way_out_and_every_other_state_has_one() {
        for s in JobState::ALL {
            assert_eq!(
                JobState::ALL.iter().any(|t| s.may_become(*t)),
                !s.is_final(),
                "{s:?}"
            );
            assert_eq!(JobState::parse(s.name()), Some(s));
        }
    }
}
