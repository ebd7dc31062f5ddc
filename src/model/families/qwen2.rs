//! Qwen2 and 2.5: q, k and v have biases. The upper layers may have a sliding window.

use serde_json::{Value, json};

use super::common::{Common, Family, windows_of_layers};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family::new("qwen2", "Qwen2ForCausalLM", defaults, spec);

fn defaults() -> Value {
    json!({"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096})
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let windows = windows_of_layers(fields, &common)?;
    let block = |window| {
        common.block(AttentionSpec {
            window,
            qkv_bias: true,
            ..common.attention()
        })
    };
    let blocks = windows.into_iter().map(block).collect();
    Ok(common.model(blocks))
}
