//! Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: one matrix computes queries, keys and values, another gate
//! and up. Some models rotate only a part of each head, and those with a long context divide the
//! rotary frequencies by factors (longrope).

use serde_json::{Value, json};

use super::common::{Common, Family};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec, Projections};

pub(super) static FAMILY: Family = Family::new("phi3", "Phi3ForCausalLM", defaults, spec);

fn defaults() -> Value {
    json!({
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
    })
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    // The class has no biases; `attention_bias` in published files is false.
    let block = common
        .block(AttentionSpec {
            window: common.window,
            projections: Projections::Fused,
            ..common.attention()
        })
        .with_fused_gate_up();
    let blocks = vec![block; common.num_layers];
    Ok(common.model(blocks))
}
