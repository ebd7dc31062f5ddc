//! Qwen3: RMSNorm on each head's q and k, optional biases in attention; the upper layers may have a
//! sliding window.

use super::common::{Common, Family, FieldRules, windows_of_layers};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec, QkNorm};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen3",
    causal_lm_class: "Qwen3ForCausalLM",
    text_in: None,
    is_interleaved_in_gguf: false,
    spec,
};

const RULES: FieldRules = FieldRules {
    kv_heads: Some(32),
    head_dim: Some(128),
    max_position_embeddings: 32_768,
    has_mlp_bias: false,
};

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields, &RULES)?;
    let windows = windows_of_layers(fields, &common)?;
    let (qkv_bias, output_bias) = (common.attention_bias, common.attention_bias);
    let attention =
        AttentionSpec { qk_norm: QkNorm::PerHead, qkv_bias, output_bias, ..common.attention() };
    let blocks = windows
        .into_iter()
        .map(|window| common.block(AttentionSpec { window, ..attention }))
        .collect();
    Ok(common.model(blocks))
}
