//! Memory that a run needs besides the base models: its plan (training state and activations, see
//! [`estimate::plan`]), copies of weights, and more activations if the reference needs them.

use super::api::{EngineError, WeightsRef};
use super::policy_cache::{BaseModels, needs_exact, weight_bytes};
use crate::domain::training::{Method, Precision, TrainingSpec};
use crate::model::config::ModelConfig;
use crate::train::estimate::{self, Lengths, MemoryKind};

/// Memory in bytes that a run needs besides the base models and its plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extra {
    /// In the memory that its passes use: a GPU's own memory, or host memory on the CPU.
    pub device: u64,
    /// In host memory, if the device has its own memory; 0 on the CPU.
    pub host: u64,
}

/// Memory in bytes that a run needs besides the base models. Stored with the run in the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// See [`Extra::device`].
    pub extra: u64,
    /// Needed on its device with the leanest plan, including `extra`.
    pub minimum: u64,
    /// Needed in host memory, if the device has its own memory; 0 on the CPU.
    pub host: u64,
}

impl Needs {
    /// Returns the bytes for the run's plan on a device with `memory` bytes for the run: the part
    /// that its copies of weights leave free.
    pub fn left_for_plan(self, memory: u64) -> u64 {
        memory.saturating_sub(self.extra)
    }
}

/// Returns the memory that a run needs besides the base models and its plan. Admission, estimate
/// and start of a run all use this function, so that the run plans with the memory that was
/// granted.
///
/// # Errors
/// `UnknownModel` if the server does not have a model that the run names.
pub(super) fn extra(
    base_models: &BaseModels,
    model: &str,
    reference: Option<&WeightsRef>,
    spec: &TrainingSpec,
    lengths: Lengths,
    memory: MemoryKind,
) -> Result<Extra, EngineError> {
    let server = base_models.precision();
    let precision = spec.precision.unwrap_or(server);
    let is_exact_run = needs_exact(spec, server);
    let base = base_models.get(model)?;
    let f32_of = |parameters: u64| parameters * weight_bytes(Precision::F32);
    let (mut host, mut gpu, mut activations) = (0, 0, 0);

    // Frozen weights of a LoRA policy, if those in memory are rounded and the run needs exact ones.
    // For full fine-tuning the plan includes all weights.
    let reads_base_again = matches!(spec.method, Method::Lora(_)) && is_exact_run && !base.is_exact;
    if reads_base_again {
        host += f32_of(base.info.parameters);
    }
    // A GPU also has a copy of the base model in the run's precision, for the policy, the reference
    // or scoring.
    if precision != server {
        gpu += base.info.parameters * weight_bytes(precision);
    }

    if let Some((weights, id)) = reference
        .filter(|_| spec.dpo.has_reference(true))
        .and_then(|w| Some((w, w.model()?)))
    {
        let other = base_models.get(id)?;
        let parameters = other.info.parameters;
        let is_moving = spec.dpo.reference_sync.is_some();
        let has_own_weights = is_moving
            || matches!(
                weights,
                WeightsRef::Full { .. } | WeightsRef::StoredReference { .. }
            );
        let shares_policy_base = id == model && reads_base_again;
        host += if is_moving {
            // During a sync the old and the new weights exist together.
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
        MemoryKind::Host => Extra {
            device: host + activations,
            host: 0,
        },
        MemoryKind::Gpu => Extra {
            device: gpu + activations,
            host,
        },
    })
}

/// Returns the additional activation bytes if scoring a row on the reference's model needs more
/// than on the policy's model, which the plan includes.
fn more_activations(
    reference: &ModelConfig,
    policy: &ModelConfig,
    spec: &TrainingSpec,
    lengths: Lengths,
) -> u64 {
    let row_tokens = lengths
        .longest
        .max(spec.batch.row_tokens.min(lengths.micro_batch));
    estimate::scoring(reference, row_tokens).saturating_sub(estimate::scoring(policy, row_tokens))
}

#[cfg(test)]
mod tests;
