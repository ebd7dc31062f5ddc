//! Qwen3: each head's q and k have an RMSNorm. Attention may have biases, and the upper layers may
//! have a sliding window.

use serde_json::{Value, json};

use super::common::{Common, Family, windows_of_layers};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec, QkNorm};

pub(super) static FAMILY: Family = Family::new("qwen3", "Qwen3ForCausalLM", defaults, spec);

fn defaults() -> Value {
    json!({
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
    })
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let windows = windows_of_layers(fields, &common)?;
    let (qkv_bias, output_bias) = (common.attention_bias, common.attention_bias);
    let attention = AttentionSpec {
        qk_norm: QkNorm::PerHead,
        qkv_bias,
        output_bias,
        ..common.attention()
    };
    let blocks = windows
        .into_iter()
        .map(|window| {
            common.block(AttentionSpec {
                window,
                ..attention
            })
        })
        .collect();
    Ok(common.model(blocks))
}
