//! Llama 2 and 3.x, SmolLM2. Biases are optional, in attention and in the feed-forward part.

use super::common::{Common, Family, FieldRules};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_type: "llama",
    causal_lm_class: "LlamaForCausalLM",
    text_in: None,
    is_interleaved_in_gguf: true,
    spec,
};

const RULES: FieldRules = FieldRules {
    kv_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    has_mlp_bias: true,
};

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields, &RULES)?;
    let (qkv_bias, output_bias) = (common.attention_bias, common.attention_bias);
    let block = common.block(AttentionSpec { qkv_bias, output_bias, ..common.attention() });
    let blocks = vec![block; common.num_layers];
    Ok(common.model(blocks))
}
