//! How much memory a run needs, by arithmetic on shapes.

use crate::domain::training::{ActivationCheckpointing, Method, TrainingSpec};
use crate::model::adapter::projection_shapes;
use crate::model::config::ModelConfig;

/// Above this, `auto` recomputes activations.
const TAPE_BUDGET: u64 = 1 << 30;
const F32: u64 = 4;

/// Bytes by purpose, besides the resident base weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Weights of its own, gradients and AdamW's moments.
    pub training_state: u64,
    /// Activations of one micro-batch.
    pub activations: u64,
    /// Whether block activations are recomputed.
    pub checkpointing: bool,
}

impl Estimate {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.training_state + self.activations
    }
}

/// Numbers trained by `spec`.
pub fn trainable_parameters(config: &ModelConfig, spec: &TrainingSpec) -> u64 {
    match &spec.method {
        Method::Full => config.parameter_count() as u64,
        Method::Lora(l) => {
            let per_block: usize = projection_shapes(config)
                .iter()
                .zip(crate::domain::training::TARGET_MODULES)
                .filter(|(_, name)| l.target_modules.iter().any(|m| m == name))
                .map(|((out, input), _)| l.rank * (out + input))
                .sum();
            (per_block * config.num_layers) as u64
        }
    }
}

/// What a run over micro-batches of `tokens` packed tokens needs.
pub fn estimate(config: &ModelConfig, spec: &TrainingSpec, tokens: usize) -> Estimate {
    let (c, f) = (config.hidden_size as u64, config.intermediate_size as u64);
    let (q, k) = ((config.num_heads * config.head_dim) as u64, (config.num_kv_heads * config.head_dim) as u64);
    let (t, layers) = (tokens as u64, config.num_layers as u64);
    // Per token and block on a tape: the input copy, two norms, q, k, v, rotated q and k, attention's output, two projections with their sums,
    // gate, up and their product.
    let tape = F32 * t * (7 * c + 3 * q + 3 * k + 3 * f);
    let inputs = F32 * t * c * (layers + 1);
    let checkpointing = match spec.batch.activation_checkpointing {
        ActivationCheckpointing::On => true,
        ActivationCheckpointing::Off => false,
        ActivationCheckpointing::Auto => tape * layers > TAPE_BUDGET,
    };
    let activations = if checkpointing { inputs + 2 * tape } else { (layers + 1) * tape };
    let head = F32 * (128 * config.vocab_size as u64 + t * c);
    let trained = trainable_parameters(config, spec);
    // Gradient, first and second moment; a full fine-tune also owns its weights and forms one more head-sized gradient on the way.
    let training_state = match spec.method {
        Method::Full => F32 * (4 * trained + config.vocab_size as u64 * c),
        Method::Lora(_) => F32 * 4 * trained,
    };
    Estimate { training_state, activations: activations + head, checkpointing }
}
