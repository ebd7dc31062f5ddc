//! What a training run reports, as it happens. The layers above carry these through channels.

use crate::domain::job::{JobError, Metrics, Progress};

/// What a run reports. `Running` comes first and `Ended` last, each once; the trainer itself emits
/// what lies between.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEvent {
    /// Weights are loaded; steps begin.
    Running {
        /// Optimizer steps in all.
        total_steps: u64,
        /// The step continued from; 0 for a fresh run.
        from_step: u64,
    },
    /// A logged step.
    Step {
        /// How far, step included.
        progress: Progress,
        /// By TRL's names.
        metrics: Metrics,
    },
    /// An evaluation.
    Eval {
        /// After which step.
        step: u64,
        /// By name, with the eval_ prefix.
        metrics: Metrics,
    },
    /// A checkpoint folder is complete and synced.
    Checkpoint {
        /// The step.
        step: u64,
        /// Best so far.
        best: bool,
        /// Whether it holds an adapter.
        adapter: bool,
        /// Bytes on disk.
        size_bytes: u64,
        /// Metrics then.
        metrics: Metrics,
    },
    /// A message for people.
    Log {
        /// info, warning, error.
        severity: &'static str,
        /// The text.
        message: String,
    },
    /// The run is over.
    Ended(RunEnd),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEnd {
    /// All steps taken, or stopped early on purpose.
    Succeeded,
    /// Cancelled on request.
    Cancelled,
    /// Stopped with a checkpoint, to be continued.
    Drained,
    /// It could not go on.
    Failed(JobError),
    /// It could not begin here and now, and has done nothing: what it needs may come back, or be
    /// somewhere else.
    NotBegun(JobError),
}
