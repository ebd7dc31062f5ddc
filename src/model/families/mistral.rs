//! Mistral: a sliding window on every layer, no biases.

use super::common::{Common, Family, FieldRules};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_type: "mistral",
    causal_lm_class: "MistralForCausalLM",
    text_in: None,
    is_interleaved_in_gguf: true,
    spec,
};

const RULES: FieldRules = FieldRules {
    kv_heads: Some(8),
    head_dim: None,
    max_position_embeddings: 131_072,
    has_mlp_bias: false,
};

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields, &RULES)?;
    let block = common.block(AttentionSpec { window: common.window, ..common.attention() });
    let blocks = vec![block; common.num_layers];
    Ok(common.model(blocks))
}
