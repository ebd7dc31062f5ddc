//! Llama 2 and 3.x, SmolLM2. Biases are optional, in attention and in the feed-forward part.

use serde_json::{Value, json};

use super::common::{Common, Family};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family {
    is_interleaved_in_gguf: true,
    ..Family::new("llama", "LlamaForCausalLM", defaults, spec)
};

fn defaults() -> Value {
    json!({"max_position_embeddings": 2048, "mlp_bias": false})
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let (qkv_bias, output_bias) = (common.attention_bias, common.attention_bias);
    let block = common.block(AttentionSpec {
        qkv_bias,
        output_bias,
        ..common.attention()
    });
    let blocks = vec![block; common.num_layers];
    Ok(common.model(blocks))
}
