//! Mistral: a sliding window on every layer, no biases.

use serde_json::{Value, json};

use super::common::{Common, Family};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family {
    is_interleaved_in_gguf: true,
    ..Family::new("mistral", "MistralForCausalLM", defaults, spec)
};

fn defaults() -> Value {
    json!({"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096})
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let block = common.block(AttentionSpec {
        window: common.window,
        ..common.attention()
    });
    let blocks = vec![block; common.num_layers];
    Ok(common.model(blocks))
}
