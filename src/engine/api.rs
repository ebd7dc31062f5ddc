//! Requests to the engine and its answers: plain records that pass between `service` and the device
//! workers.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::domain::identity::ModelIdentity;
use crate::domain::names::BaseName;
use crate::domain::training::{Precision, TrainingSpec};
use crate::infer::generate::{LogProbOptions, Sampled, SamplingOptions, ScoredToken};
use crate::infer::pair::{EncodedPair, SequenceGroup};
use crate::model::device::DeviceChoice;
use crate::model::error::ModelError;
pub use crate::train::event::{RunEnd, RunEvent};

/// Description of a loaded base model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// The id in `models/{id}`.
    pub id: String,
    /// Hub id, or the last part of a local folder's or file's path.
    pub source: String,
    /// Name under which other programs find the model.
    pub base: BaseName,
    /// `model_type` in config.json: of the family, e.g. `llama`, or of the model of text and images
    /// that contains the language model, e.g. `gemma3`.
    pub architecture: String,
    /// Number of parameters; tied weights count once.
    pub parameters: u64,
    /// Number of tokens in the vocabulary (V).
    pub vocab_size: usize,
    /// Number of decoder blocks.
    pub num_layers: usize,
    /// Width of the hidden state (C).
    pub hidden_size: usize,
    /// Longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Format of most of the stored weights, e.g. `bf16` or `q4_k`.
    pub stored_format: &'static str,
    /// True if the model is the language model of a multimodal model.
    pub text_only: bool,
    /// True if the tokenizer has a chat template, so that chat rows can be rendered.
    pub chat_template: bool,
    /// Content hashes of weights, configuration, tokenizer and chat template.
    pub identity: ModelIdentity,
    /// Devices that compute with it, e.g. `cpu` or `cuda:0,cuda:1`.
    pub device: String,
}

/// Work that an engine does with a base model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelUse {
    /// Trains adapters on it.
    TrainLora,
    /// Trains all of its weights.
    TrainFull,
    /// Scores pairs with it and with the policies on it.
    Score,
    /// Exports the policies on it.
    Export,
}

/// Weights that can score or start a run, resolved to something that the engine can load.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WeightsRef {
    /// A base model as loaded.
    Base {
        /// The base model's id.
        model: String,
    },
    /// A base model with a PEFT adapter folder on it.
    Adapter {
        /// The base model's id.
        model: String,
        /// Folder with adapter_config.json and adapter_model.safetensors.
        dir: PathBuf,
        /// Hash of the adapter, because the same folder may hold another adapter later.
        content: String,
    },
    /// Full weights of a base model's shape.
    Full {
        /// Id of the base model, which provides the configuration and the tokenizer.
        model: String,
        /// Folder with model.safetensors.
        dir: PathBuf,
        /// Hash of the weights.
        content: String,
    },
    /// The moving reference (TR-DPO) that a checkpoint of full weights holds.
    StoredReference {
        /// The base model's id.
        model: String,
        /// Folder of the checkpoint.
        dir: PathBuf,
        /// Hash of the checkpoint.
        content: String,
    },
    /// The current weights of a running job.
    Live {
        /// The job's id.
        job: String,
    },
    /// The current moving reference (TR-DPO) of a running job. Valid only together with `Live` of
    /// the same job.
    LiveReference {
        /// The job's id.
        job: String,
    },
}

impl WeightsRef {
    /// Returns the id of the base model that the weights belong to; `None` for a running job.
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

/// Sequences that are scored in the same row, e.g. the two of a pair. On the CPU no bit of the
/// result depends on the other items in the batch. On a GPU they may change its rounding.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreItem {
    /// Groups of completions with a common prompt. A pair is one group with two completions, or two
    /// groups if the prompts differ.
    pub groups: Vec<SequenceGroup>,
}

impl ScoreItem {
    /// Returns the number of tokens in the packed row. A model whose rotary frequencies depend on
    /// the length of a sequence may need more, see [`crate::infer::pack::row_tokens`].
    pub fn tokens(&self) -> usize {
        self.groups.iter().map(SequenceGroup::tokens).sum()
    }
}

/// Log-probabilities of the tokens of one completion, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionLogps {
    /// log π_θ of each token.
    pub policy: Vec<f32>,
    /// log π_ref of each token; `None` without a reference.
    pub reference: Option<Vec<f32>>,
}

/// Result for one [`ScoreItem`].
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredItem {
    /// One entry for each completion, in the order of the groups and their completions.
    pub completions: Vec<CompletionLogps>,
    /// Optimizer step of the weights that scored; set only for [`WeightsRef::Live`].
    pub live_step: Option<u64>,
}

/// A prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationRequest {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Number of samples.
    pub samples: usize,
    /// Maximum number of tokens of each sample.
    pub max_tokens: usize,
    /// Temperature, top-p, top-k and seed with which tokens are chosen.
    pub sampling: SamplingOptions,
    /// A sample ends with any of these tokens.
    pub stop_tokens: Vec<u32>,
    /// Log-probs that are wanted besides those of the generated tokens.
    pub log_probs: LogProbOptions,
}

/// The reason why a sample has no further token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GenerationEnd {
    /// Its last token is a stop token, or completes a stop text.
    Stop,
    /// It has as many tokens as were asked for, or as the model allows.
    Length,
}

/// Progress of a [`GenerationRequest`].
#[derive(Clone, Debug, PartialEq)]
pub enum GenerationEvent {
    /// The prompt was run. This is the first event.
    Started {
        /// Optimizer step of the weights; set only for [`WeightsRef::Live`].
        live_step: Option<u64>,
        /// The prompt's tokens from the second on, if their log-probs are wanted.
        prompt: Vec<ScoredToken>,
    },
    /// A sample has another token.
    Token {
        /// Index of the sample.
        sample: usize,
        /// The token.
        token: u32,
        /// Log-prob of the token at temperature 1, in nats.
        log_prob: f32,
        /// The most likely tokens at its place, if they are wanted.
        top: Vec<Sampled>,
        /// Set if this is the sample's last token.
        end: Option<GenerationEnd>,
    },
}

/// Progress of a request, or the error that ends it.
pub type GenerationResult = Result<GenerationEvent, EngineError>;

/// The events of a request in progress. Dropping it cancels the request.
#[derive(Debug)]
pub struct GenerationStream {
    /// Events in order. The channel is bounded: a request whose caller does not read waits.
    pub events: mpsc::Receiver<GenerationResult>,
    /// Setting a sample's flag ends the sample.
    pub stopped: Arc<[AtomicBool]>,
}

/// Flag through which a run in progress is told to stop, and the device time that it has used. The
/// run reads the flag between units of work.
#[derive(Debug, Default)]
pub struct RunControl {
    command: AtomicU8,
    /// Device time since it was last taken, in microseconds.
    device_us: AtomicU64,
}

/// Current instruction to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunCommand {
    /// Continue.
    Run,
    /// Stop for good, without a checkpoint.
    Cancel,
    /// Write a checkpoint and stop; the job is continued later.
    Drain,
}

impl RunControl {
    /// Asks the run to stop for good. Wins over a drain.
    pub fn cancel(&self) {
        self.command.store(1, Ordering::Release);
    }

    /// Asks the run to write a checkpoint and stop.
    pub fn drain(&self) {
        let _ = self
            .command
            .compare_exchange(0, 2, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Returns the current instruction.
    pub fn command(&self) -> RunCommand {
        match self.command.load(Ordering::Acquire) {
            0 => RunCommand::Run,
            1 => RunCommand::Cancel,
            _ => RunCommand::Drain,
        }
    }

    /// Adds device time that the run has used.
    pub fn add_device_time(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.device_us.fetch_add(us, Ordering::Relaxed);
    }

    /// Returns the device time since the last call, in microseconds.
    pub fn take_device_us(&self) -> u64 {
        self.device_us.swap(0, Ordering::Relaxed)
    }
}

/// An event on its way to the task that stores it.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Time at which the event was created.
    pub made: Instant,
    /// The event.
    pub event: RunEvent,
}

impl From<RunEvent> for Report {
    fn from(event: RunEvent) -> Self {
        Report {
            made: Instant::now(),
            event,
        }
    }
}

/// A training run that is ready to start: the data is tokenised and all names are resolved.
#[derive(Debug)]
pub struct TrainingRun {
    /// The job's id.
    pub job: String,
    /// The base model's id.
    pub model: String,
    /// Weights that the policy starts from; never `Live`.
    pub start: WeightsRef,
    /// Weights of the reference, possibly on another base model; a moving reference (TR-DPO) starts
    /// from them. `None` if the objective has no reference, or if the rows carry its log-probs.
    /// Never `Live`.
    pub reference: Option<WeightsRef>,
    /// Hyper-parameters of the run.
    pub spec: TrainingSpec,
    /// Training pairs, in file order.
    pub train: Vec<EncodedPair>,
    /// Evaluation pairs, in file order.
    pub eval: Vec<EncodedPair>,
    /// Folder with this job's checkpoints, each in a sub-folder named after its step.
    pub checkpoints: PathBuf,
    /// Folder of the checkpoint to continue from.
    pub resume: Option<PathBuf>,
    /// Channel for events. It is bounded: the run waits while it is full.
    pub events: mpsc::Sender<Report>,
    /// Flag that tells the run to stop.
    pub control: Arc<RunControl>,
}

/// Limits and sizes of the engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    /// Devices to compute on; each gets a worker of its own.
    pub devices: Vec<DeviceChoice>,
    /// True to start without the devices that cannot be opened, as long as at least one can.
    pub skip_missing_devices: bool,
    /// Number of devices that one run uses together; 1 gives every run a device of its own.
    pub data_parallel: usize,
    /// Precision of frozen weights and of scoring. A job may choose another one.
    pub precision: Precision,
    /// Maximum number of tokens waiting to be scored; further items are refused with `QueueFull`.
    pub queue_tokens: usize,
    /// Maximum number of tokens in a scoring batch, which is one unit of work. An item with more
    /// tokens is a batch of its own.
    pub batch_tokens: usize,
    /// Maximum length in tokens of a scored row, and of a prompt with one of its samples; longer
    /// ones are refused. It does not limit the rows of training.
    pub max_row_tokens: usize,
    /// Capacity of the cache of reference log-probabilities, in tokens.
    pub reference_cache_tokens: usize,
    /// File that preserves this cache across restarts; `None` means memory only.
    pub reference_cache_file: Option<PathBuf>,
    /// Size of each worker's cache of keys and values for generation, in tokens.
    pub generation_cache_tokens: usize,
    /// Maximum number of adapters and full weights in each worker's LRU cache, besides the base
    /// models. Memory may allow fewer.
    pub resident_policies: usize,
    /// Share of device time that scoring may take while a job trains, in (0, 1].
    pub scoring_share: f64,
    /// Host memory in bytes that the estimate may reach before a job is refused. `None` means nine
    /// tenths of the machine's memory, or of the control group's limit if that is lower.
    pub memory_limit: Option<u64>,
    /// Memory of each GPU in bytes that the estimate may reach. `None` means nine tenths of the
    /// memory that is free at the start.
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
            generation_cache_tokens: 1 << 15,
            resident_policies: 8,
            scoring_share: 0.4,
            memory_limit: None,
            device_memory_limit: None,
        }
    }
}

/// Reason why the engine could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No such base model.
    #[error("model {0:?} is not loaded on this server: see ListModels for the ones that are")]
    UnknownModel(String),
    /// The scoring queue is full.
    #[error(
        "the scoring queue is full ({queued} of {limit} tokens): retry later or raise queue_tokens"
    )]
    QueueFull {
        /// Tokens that wait.
        queued: usize,
        /// Maximum number of tokens that may wait.
        limit: usize,
        /// Time after which a retry may succeed.
        retry_after: Duration,
    },
    /// The list of runs that wait for a device is full.
    #[error("{limit} training runs already wait for a device of this server: retry later")]
    TooManyRuns {
        /// Maximum number of runs that may wait.
        limit: usize,
        /// Time after which a retry may succeed.
        retry_after: Duration,
    },
    /// One row is longer than the limit.
    #[error(
        "the prompt and its answers have {tokens} tokens together, and the server's \
         max_row_tokens is {limit}: shorten them, lower max_length, or send fewer answers at a time"
    )]
    RowTooLong {
        /// Length of the row in tokens.
        tokens: usize,
        /// Maximum length in tokens.
        limit: usize,
    },
    /// A prompt leaves no room for a sample.
    #[error(
        "the prompt has {tokens} tokens, and the server's {setting} allows {limit} with those of \
         the samples: shorten the prompt"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Maximum number of tokens.
        limit: usize,
        /// Name of the setting that limits them.
        setting: &'static str,
    },
    /// A prompt and its longest sample exceed `max_row_tokens`.
    #[error(
        "the prompt and its longest sample may have {tokens} tokens, and the server's \
         max_row_tokens is {limit}: lower max_tokens, or shorten the prompt"
    )]
    SampleTooLong {
        /// Tokens of the prompt and of the longest sample.
        tokens: usize,
        /// Maximum number of tokens.
        limit: usize,
    },
    /// A prompt and its longest samples exceed `generation_cache_tokens`.
    #[error(
        "the prompt and its samples may have {tokens} tokens together, and the server's \
         generation_cache_tokens is {limit}: lower max_tokens, ask for fewer samples, or shorten \
         the prompt"
    )]
    SamplesTooLong {
        /// Tokens that are needed.
        tokens: usize,
        /// Size of the cache in tokens.
        limit: usize,
    },
    /// The memory has no room for the keys and values of a request.
    #[error(
        "this request needs {needed_mib} MiB of memory for its keys and values, {available_mib} \
         MiB are left for them beside the models and the run in progress: lower max_tokens, ask \
         for fewer samples, retry when the run has ended, or raise {setting}"
    )]
    NoRoomToGenerate {
        /// Memory that the request needs, in MiB.
        needed_mib: u64,
        /// Memory that is left for it, in MiB.
        available_mib: u64,
        /// Name of the setting that limits it.
        setting: &'static str,
    },
    /// The caller does not read the tokens, or reads them too slowly while other requests wait.
    #[error(
        "the answer has waited {} seconds for its reader, and holds memory that other requests \
         need: read it as it comes, or ask for fewer samples or tokens", .waited.as_secs()
    )]
    AnswerNotRead {
        /// Time for which the request had to wait for its caller.
        waited: Duration,
    },
    /// The list of generation requests that wait for a device is full.
    #[error("{limit} generation requests already wait for a device of this server: retry later")]
    TooManyGenerations {
        /// Maximum number of requests that may wait.
        limit: usize,
        /// Time after which a retry may succeed.
        retry_after: Duration,
    },
    /// A training run needs the memory of the texts in progress.
    #[error("a training run that begins needs the memory: retry later")]
    GenerationDisplaced {
        /// Time after which a retry may succeed.
        retry_after: Duration,
    },
    /// The job is not running, so its weights are not on a device.
    #[error("trainingJobs/{0} is not running on this server")]
    NotResident(String),
    /// The engine is stopping.
    #[error("the server is shutting down: retry elsewhere or later")]
    Draining,
    /// According to the estimate the job does not fit the memory limit, or the base models do not
    /// when the engine starts.
    #[error("about {needed_mib} MiB are needed, {available_mib} MiB are allowed: {remedy}")]
    OutOfMemory {
        /// Estimated memory in MiB.
        needed_mib: u64,
        /// Memory limit in MiB.
        available_mib: u64,
        /// Change that would make the job or the models fit.
        remedy: String,
    },
    /// The weights do not fit beside the base models and the run in progress.
    #[error(
        "these weights need {needed_mib} MiB of memory, {available_mib} MiB are left for them \
         beside the base models and the run in progress: retry when that has ended, or raise \
         {setting}"
    )]
    NoRoom {
        /// Memory that the weights need, in MiB.
        needed_mib: u64,
        /// Memory that is left for them, in MiB.
        available_mib: u64,
        /// Names of the settings that limit it.
        setting: &'static str,
    },
    /// The weights cannot be used: their files or the shapes of their tensors are wrong, or the
    /// device or the request does not support such weights.
    #[error("{0}")]
    Weights(String),
    /// The files of a base model are gone or were changed, so its weights cannot be read again.
    #[error("{0}")]
    FilesChanged(String),
    /// The device had too little free memory for a unit of work. The worker continues with the next
    /// one.
    #[error("{0}: retry later, or send shorter rows")]
    DeviceFull(String),
    /// A unit of work failed, and the worker continues with the next one. Or a device cannot be
    /// used when the engine starts.
    #[error("the device failed: {0}")]
    Device(String),
}

impl From<candle_core::Error> for EngineError {
    fn from(e: candle_core::Error) -> Self {
        EngineError::Device(e.to_string())
    }
}

impl EngineError {
    /// Reports weights that cannot be used. The log gets the full error; the message for clients
    /// leaves out the server's folders.
    pub(super) fn unusable(e: &ModelError) -> Self {
        tracing::warn!(error = %e, "weights cannot be used");
        EngineError::Weights(e.for_clients())
    }
}
