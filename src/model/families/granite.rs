//! Granite 3.x, dense: as Llama, with multipliers on the embeddings, on the scores and on the
//! output of each part, and a divisor of the logits.

use serde_json::{Value, json};

use super::common::{Common, Family};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, BlockSpec, ModelSpec};

pub(super) static FAMILY: Family = Family {
    is_interleaved_in_gguf: true,
    ..Family::new("granite", "GraniteForCausalLM", defaults, spec)
};

fn defaults() -> Value {
    json!({
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "mlp_bias": false,
    })
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let attention = AttentionSpec {
        scale: multiplier(fields, "attention_multiplier")?,
        qkv_bias: common.attention_bias,
        output_bias: common.attention_bias,
        ..common.attention()
    };
    let block = BlockSpec {
        output_factor: multiplier(fields, "residual_multiplier")?,
        ..common.block(attention)
    };
    let blocks = vec![block; common.num_layers];
    Ok(ModelSpec {
        embedding_scale: multiplier(fields, "embedding_multiplier")?,
        logit_factor: 1.0 / multiplier(fields, "logits_scaling")?,
        ..common.model(blocks)
    })
}

/// Reads a multiplier, by default 1.
fn multiplier(fields: &Fields<'_>, field: &str) -> Result<f32, ModelError> {
    let stored = fields.number(field)?.unwrap_or(1.0);
    let rounded = stored as f32;
    if !(rounded.is_normal() && rounded > 0.0) {
        return Err(fields.invalid(field, format!("is {stored}; must be a number above 0")));
    }
    Ok(rounded)
}
