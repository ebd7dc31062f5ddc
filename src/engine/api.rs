//! What the engine is asked and what it answers: plain records between `service` and the device
//! workers.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::domain::identity::ModelIdentity;
use crate::domain::names::BaseName;
use crate::domain::training::{Precision, TrainingSpec};
use crate::infer::pair::{EncodedPair, SequenceGroup};
use crate::model::device::DeviceChoice;
use crate::model::error::ModelError;
pub use crate::train::event::{RunEnd, RunEvent};

/// What is known of a resident base model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// The id in `models/{id}`.
    pub id: String,
    /// A hub id, or the last part of a local folder's or file's path.
    pub source: String,
    /// The name under which others find the model.
    pub base: BaseName,
    /// llama, mistral, qwen2 or qwen3.
    pub architecture: String,
    /// Tied ones once.
    pub parameters: u64,
    /// V.
    pub vocab_size: usize,
    /// Decoder blocks.
    pub num_layers: usize,
    /// C.
    pub hidden_size: usize,
    /// Positions the model was made for.
    pub max_position_embeddings: usize,
    /// Whether chat rows can be rendered.
    pub chat_template: bool,
    /// Content hashes of weights, configuration, tokenizer and chat template.
    pub identity: ModelIdentity,
    /// Where it is, e.g. `cpu` or `cuda:0,cuda:1`.
    pub device: String,
}

/// Weights that can score or start a run, resolved to what the engine can load.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WeightsRef {
    /// A base model as loaded.
    Base {
        /// Its id.
        model: String,
    },
    /// A base model with a PEFT adapter folder on it.
    Adapter {
        /// The base's id.
        model: String,
        /// The folder with adapter_config.json and adapter_model.safetensors.
        dir: PathBuf,
        /// A hash of the adapter: the same folder may hold another one later.
        content: String,
    },
    /// Full weights of a base model's shape.
    Full {
        /// The base's id (its config and tokenizer).
        model: String,
        /// The folder with model.safetensors.
        dir: PathBuf,
        /// A hash of the weights.
        content: String,
    },
    /// The moving reference (TR-DPO) that a checkpoint of full weights holds.
    StoredReference {
        /// The base's id.
        model: String,
        /// The checkpoint's folder.
        dir: PathBuf,
        /// A hash of the checkpoint.
        content: String,
    },
    /// What a running job trains now.
    Live {
        /// The job's id.
        job: String,
    },
    /// The moving reference (TR-DPO) of a running job as it is now; only of the same job's `Live`.
    LiveReference {
        /// The job's id.
        job: String,
    },
}

impl WeightsRef {
    /// The id of the base model under the weights; `None` for a running job.
    pub fn model(&self) -> Option<&str> {
        match self {
            WeightsRef::Base { model }
            | WeightsRef::Adapter { model, .. }
            | WeightsRef::Full { model, .. }
            | WeightsRef::StoredReference { model, .. } => Some(model),
            WeightsRef::Live { .. } | WeightsRef::LiveReference { .. } => None,
        }
    }
}

/// Sequences to score together in one row, e.g. a pair: the numbers never depend on other items.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreItem {
    /// A pair is one group with two completions, or two groups when the prompts differ.
    pub groups: Vec<SequenceGroup>,
}

impl ScoreItem {
    /// Tokens of the packed row.
    pub fn tokens(&self) -> usize {
        self.groups.iter().map(SequenceGroup::tokens).sum()
    }
}

/// Log-probs of one completion, per token, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionLogps {
    /// log π_θ.
    pub policy: Vec<f32>,
    /// log π_ref; `None` without a reference.
    pub reference: Option<Vec<f32>>,
}

/// A scored item.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredItem {
    /// In the order of the groups and their completions.
    pub completions: Vec<CompletionLogps>,
    /// For [`WeightsRef::Live`]: the optimizer step of the weights that scored.
    pub live_step: Option<u64>,
}

/// How a run is told to stop.
#[derive(Debug, Default)]
pub struct RunControl(AtomicU8);

/// What a run was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunCommand {
    /// Go on.
    Run,
    /// Stop for good; no checkpoint is written.
    Cancel,
    /// Write a checkpoint and stop; the job will be continued later.
    Drain,
}

impl RunControl {
    /// Asks the run to stop for good. Wins over a drain.
    pub fn cancel(&self) {
        self.0.store(1, Ordering::Release);
    }

    /// Asks the run to write a checkpoint and stop.
    pub fn drain(&self) {
        let _ = self.0.compare_exchange(0, 2, Ordering::AcqRel, Ordering::Acquire);
    }

    /// What was asked for.
    pub fn command(&self) -> RunCommand {
        match self.0.load(Ordering::Acquire) {
            0 => RunCommand::Run,
            1 => RunCommand::Cancel,
            _ => RunCommand::Drain,
        }
    }
}

/// An event on its way to whoever stores it.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// When it was made.
    pub made: Instant,
    /// What it says.
    pub event: RunEvent,
}

impl From<RunEvent> for Report {
    fn from(event: RunEvent) -> Self {
        Report { made: Instant::now(), event }
    }
}

/// A training run, ready to start: the data is tokenised, the names are resolved.
#[derive(Debug)]
pub struct TrainingRun {
    /// The job's id.
    pub job: String,
    /// The base model's id.
    pub model: String,
    /// What the policy starts from; never `Live`.
    pub start: WeightsRef,
    /// The frozen reference, perhaps on another base model; `None` when the objective has none;
    /// never `Live`.
    pub reference: Option<WeightsRef>,
    /// Hyper-parameters.
    pub spec: TrainingSpec,
    /// Training pairs, in file order.
    pub train: Vec<EncodedPair>,
    /// Evaluation pairs.
    pub eval: Vec<EncodedPair>,
    /// The folder of this job's checkpoints; each is the sub-folder named by its step.
    pub checkpoints: PathBuf,
    /// The checkpoint to continue from.
    pub resume: Option<PathBuf>,
    /// Where events go; bounded, the run waits when it is full.
    pub events: mpsc::Sender<Report>,
    /// How it is told to stop.
    pub control: Arc<RunControl>,
}

/// Limits and sizes of the engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    /// Where passes are computed; each is a worker's.
    pub devices: Vec<DeviceChoice>,
    /// Whether to start without those of the devices that cannot be opened, as long as one can.
    pub skip_missing_devices: bool,
    /// Devices that a run uses together; 1 gives every run its own.
    pub data_parallel: usize,
    /// How frozen weights are kept and what scoring computes in; jobs may choose their own.
    pub precision: Precision,
    /// Tokens that may wait to be scored; more is refused with `QueueFull`.
    pub queue_tokens: usize,
    /// Tokens of a scoring batch: one work unit.
    pub batch_tokens: usize,
    /// The longest row that is accepted, in tokens.
    pub max_row_tokens: usize,
    /// Reference log-probs kept, in tokens.
    pub reference_cache_tokens: usize,
    /// Where they are kept across restarts; `None` keeps them in memory only.
    pub reference_cache_file: Option<PathBuf>,
    /// Adapters and full weights kept resident besides the base models, as far as memory allows.
    pub resident_policies: usize,
    /// Share of device time scoring may take while a job trains, in (0, 1].
    pub scoring_share: f64,
    /// Bytes of the machine's memory that the estimate may reach before a job is refused; `None` is
    /// nine tenths of it, or of the limit of the process's control group where that is lower.
    pub memory_limit: Option<u64>,
    /// The same of each GPU's own memory; `None` is nine tenths of what is free there at the start.
    pub device_memory_limit: Option<u64>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            devices: vec![DeviceChoice::Cpu],
            skip_missing_devices: false,
            data_parallel: 1,
            precision: Precision::F32,
            queue_tokens: 1 << 20,
            batch_tokens: 4096,
            max_row_tokens: 16384,
            reference_cache_tokens: 1 << 22,
            reference_cache_file: None,
            resident_policies: 8,
            scoring_share: 0.4,
            memory_limit: None,
            device_memory_limit: None,
        }
    }
}

/// Why the engine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No such base model.
    #[error("model {0:?} is not loaded on this server: see ListModels for the ones that are")]
    UnknownModel(String),
    /// The queue is full.
    #[error(
        "the scoring queue is full ({queued} of {limit} tokens): retry later or raise queue_tokens"
    )]
    QueueFull {
        /// Tokens waiting.
        queued: usize,
        /// The limit.
        limit: usize,
        /// When to try again.
        retry_after: Duration,
    },
    /// One row is longer than the limit.
    #[error("the row has {tokens} tokens, the limit is {limit}: shorten it or lower max_length")]
    RowTooLong {
        /// Its tokens.
        tokens: usize,
        /// The limit.
        limit: usize,
    },
    /// The job's weights are not on the device (it is not running).
    #[error("job {0} is not running on this server")]
    NotResident(String),
    /// The engine is stopping.
    #[error("the server is shutting down: retry elsewhere or later")]
    Draining,
    /// By the estimate, the job does not fit.
    #[error("the job needs about {needed_mib} MiB, {available_mib} MiB are allowed: {remedy}")]
    OutOfMemory {
        /// The estimate.
        needed_mib: u64,
        /// The limit.
        available_mib: u64,
        /// What would make it fit.
        remedy: String,
    },
    /// Weights do not fit beside what must stay in memory.
    #[error(
        "these weights need {needed_mib} MiB of memory, {available_mib} MiB are left for them beside the base models and the run in \
         progress: retry when that has ended, or raise {setting}"
    )]
    NoRoom {
        /// Memory that they need, in MiB.
        needed_mib: u64,
        /// Memory that is left for them, in MiB.
        available_mib: u64,
        /// The settings that limit it.
        setting: &'static str,
    },
    /// Loading failed: the files or their shapes are at fault.
    #[error("{0}")]
    Weights(String),
    /// A base model's weights cannot be read again as they were loaded: its files are gone or were
    /// changed.
    #[error("{0}")]
    FilesChanged(String),
    /// The device had too little free memory for a work unit; the worker goes on.
    #[error("{0}: retry later, or send shorter rows")]
    DeviceFull(String),
    /// A work unit failed; the worker goes on.
    #[error("the device failed: {0}")]
    Device(String),
}

/// A failed computation on tensors.
impl From<candle_core::Error> for EngineError {
    fn from(e: candle_core::Error) -> Self {
        EngineError::Device(e.to_string())
    }
}

impl EngineError {
    /// Says why weights cannot be used: all of it in the log, without the server's folders to
    /// clients.
    pub(super) fn unusable(e: &ModelError) -> Self {
        tracing::warn!(error = %e, "weights cannot be used");
        EngineError::Weights(e.for_clients())
    }
}
