//! Counts the memory that a run needs besides the base models.

use super::api::{EngineError, WeightsRef};
use super::residents::{Bases, wants_exact, weight_bytes};
use crate::domain::training::{Method, Precision, TrainingSpec};
use crate::model::config::ModelConfig;
use crate::train::estimate::{self, Lengths, MemoryKind};

/// Bytes that a run needs besides the base models and its plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extra {
    /// In the memory that its passes use: a GPU's own, or on the CPU the machine's.
    pub device: u64,
    /// In the machine's memory, where the device has its own; 0 on the CPU.
    pub host: u64,
}

/// Bytes that a run needs besides the base models. The run carries them through the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// [`Extra::device`].
    pub extra: u64,
    /// With the leanest plan on its device, `extra` included.
    pub minimum: u64,
    /// In the machine's memory, where the device has its own; 0 on the CPU.
    pub host: u64,
}

impl Needs {
    /// Returns the bytes that the run's plan may use on a device with `memory` bytes for the run:
    /// what the copies of weights leave.
    pub fn left_for_plan(self, memory: u64) -> u64 {
        memory.saturating_sub(self.extra)
    }
}

/// Returns what a run needs besides the base models and its plan. Admission, the estimate and the
/// start of a run all use this function, so that a run plans with what was granted.
pub(super) fn extra(
    bases: &Bases,
    model: &str,
    reference: Option<&WeightsRef>,
    spec: &TrainingSpec,
    lengths: Lengths,
    memory: MemoryKind,
) -> Result<Extra, EngineError> {
    let server = bases.precision();
    let precision = spec.precision.unwrap_or(server);
    let is_exact_run = wants_exact(spec, server);
    let base = bases.get(model)?;
    let f32_of = |parameters: u64| parameters * weight_bytes(Precision::F32);
    let (mut host, mut gpu, mut activations) = (0, 0, 0);

    // A LoRA policy's frozen weights, if those in memory are rounded and the run's must not be.
    // A fully trained policy has all its weights in the plan.
    let reads_base_again = matches!(spec.method, Method::Lora(_)) && is_exact_run && !base.is_exact;
    if reads_base_again {
        host += f32_of(base.info.parameters);
    }
    // A GPU has the base model in the run's precision, too: for the policy, the reference, or
    // scoring.
    if precision != server {
        gpu += base.info.parameters * weight_bytes(precision);
    }

    if let Some((weights, id)) =
        reference.filter(|_| spec.dpo.has_reference(true)).and_then(|w| Some((w, w.model()?)))
    {
        let other = bases.get(id)?;
        let parameters = other.info.parameters;
        let is_moving = spec.dpo.reference_sync.is_some();
        let has_own_weights = is_moving
            || matches!(weights, WeightsRef::Full { .. } | WeightsRef::StoredReference { .. });
        let shares_policy_base = id == model && reads_base_again;
        host += if is_moving {
            // While the policy is mixed in, the old and the new weights are both there.
            2 * f32_of(parameters)
        } else if has_own_weights {
            parameters * weight_bytes(if is_exact_run { Precision::F32 } else { server })
        } else if is_exact_run && !other.is_exact && !shares_policy_base {
            f32_of(parameters)
        } else {
            0
        };
        if has_own_weights || (id != model && precision != server) {
            gpu += parameters * weight_bytes(precision);
        }
        activations = more_activations(&other.policy.config, &base.policy.config, spec, lengths);
    }
    Ok(match memory {
        MemoryKind::Host => Extra { device: host + activations, host: 0 },
        MemoryKind::Gpu => Extra { device: gpu + activations, host },
    })
}

/// Bytes of activations that scoring a row on the reference's model needs beyond those on the
/// policy's, which the plan counts.
fn more_activations(
    reference: &ModelConfig,
    policy: &ModelConfig,
    spec: &TrainingSpec,
    lengths: Lengths,
) -> u64 {
    let row_tokens = lengths.longest.max(spec.batch.row_tokens.min(lengths.micro_batch));
    estimate::scoring(reference, row_tokens).saturating_sub(estimate::scoring(policy, row_tokens))
}

#[cfg(test)]
mod tests;
