//! Events that a training run reports. The layers above send these through channels.

use std::time::Duration;

use crate::domain::job::{JobError, Metrics, Progress};

/// Event of a run. Each run reports `Ended` once, as its last event. A run that starts reports
/// `Running` once, before its steps; only a `Log` of the engine's queue may come earlier. All other
/// events come from the trainer.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEvent {
    /// The weights are loaded and the steps start.
    Running {
        /// Optimizer steps of the whole run.
        total_steps: u64,
        /// Step from which the run continues; 0 for a new run.
        from_step: u64,
    },
    /// Metrics of an optimizer step that is logged.
    Step {
        /// Progress after the step.
        progress: Progress,
        /// Values by name. The names are TRL's, except those of `rewards_normalized/*`.
        metrics: Metrics,
    },
    /// Metrics of an evaluation.
    Eval {
        /// Optimizer step after which the rows were evaluated.
        step: u64,
        /// Values by name, with the prefix `eval_`.
        metrics: Metrics,
    },
    /// A checkpoint folder is complete and synced.
    Checkpoint {
        /// Optimizer step after which it was written.
        step: u64,
        /// True if it is the best so far.
        best: bool,
        /// True if it holds a LoRA adapter, false if it holds full weights.
        adapter: bool,
        /// Size on disk in bytes.
        size_bytes: u64,
        /// Metrics at that step.
        metrics: Metrics,
    },
    /// A checkpoint could not be written. The run waits and tries again.
    CheckpointDelayed {
        /// Optimizer step of the checkpoint.
        step: u64,
        /// Reason for clients, without the server's folders.
        reason: String,
        /// True if there is no space left.
        disk_full: bool,
        /// Time after which the run fails, or `None` if it waits without limit.
        limit: Option<Duration>,
    },
    /// A message for people.
    Log {
        /// `info`, `warning` or `error`.
        severity: &'static str,
        /// Text of the message.
        message: String,
    },
    /// The run is over.
    Ended(RunEnd),
}

/// End of a run.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEnd {
    /// All steps were taken, or early stopping ended the run.
    Succeeded,
    /// A client cancelled it.
    Cancelled,
    /// Stopped on request, after an attempt to write a checkpoint if the run had started. The job
    /// continues later from its newest checkpoint.
    Drained,
    /// The run failed.
    Failed(JobError),
    /// The run could not start on this server now, and nothing was done. The job may start later or
    /// on another server.
    InputMissing(JobError),
}
