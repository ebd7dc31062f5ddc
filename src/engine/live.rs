//! The weights that a run trains, as scoring and generation see them, and errors of their passes.

use super::api::{EngineError, WeightsRef};
use crate::model::decoder::Policy;
use crate::model::device::is_out_of_memory;

/// Current weights of the run in progress.
pub(super) struct Live {
    pub job: String,
    pub policy: Policy,
    /// Reference as the run uses it. A run in f32 on a bf16 server has unrounded reference weights.
    pub reference: Option<LiveReference>,
    /// Optimizer steps that the policy has taken. `reference` has the state after this step as well
    /// if it moves (TR-DPO).
    pub step: u64,
}

/// Current reference of the run in progress.
pub(super) struct LiveReference {
    /// Name by which entries refer to it.
    pub weights: WeightsRef,
    pub policy: Policy,
    /// Identity of the weights in the cache of log-probs.
    pub identity: String,
}

/// Converts an error of a pass.
pub(super) fn device_error(e: candle_core::Error) -> EngineError {
    if is_out_of_memory(&e) {
        EngineError::DeviceFull(e.to_string())
    } else {
        EngineError::Device(e.to_string())
    }
}
