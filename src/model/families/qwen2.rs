//! Qwen2 and 2.5: biases on q, k and v; the upper layers may have a sliding window.

use super::common::{Common, Family, FieldRules, windows_of_layers};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen2",
    causal_lm_class: "Qwen2ForCausalLM",
    text_in: None,
    is_interleaved_in_gguf: false,
    spec,
};

const RULES: FieldRules = FieldRules {
    kv_heads: Some(32),
    head_dim: None,
    max_position_embeddings: 32_768,
    has_mlp_bias: false,
};

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields, &RULES)?;
    let windows = windows_of_layers(fields, &common)?;
    let block =
        |window| common.block(AttentionSpec { window, qkv_bias: true, ..common.attention() });
    let blocks = windows.into_iter().map(block).collect();
    Ok(common.model(blocks))
}
