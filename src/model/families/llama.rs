//! Llama 2 and 3.x, SmolLM2. Biases are optional, in attention and in the feed-forward part.

use super::common::{Common, Defaults, Family};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, BlockSpec, FeedForward, ModelSpec};

pub(super) static FAMILY: Family = Family { model_type: "llama", causal_lm_class: "LlamaForCausalLM", is_interleaved_in_gguf: true, spec };

const DEFAULTS: Defaults = Defaults { kv_heads: None, head_dim: None, max_position_embeddings: 2048 };

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields, &DEFAULTS)?;
    let (qkv_bias, output_bias) = (common.attention_bias, common.attention_bias);
    let block = common.block(AttentionSpec { qkv_bias, output_bias, ..common.attention() });
    let FeedForward::Gated { width, activation, .. } = block.feed_forward;
    let feed_forward = FeedForward::Gated { width, activation, bias: fields.flag("mlp_bias")?.unwrap_or(false) };
    let blocks = vec![BlockSpec { feed_forward, ..block }; common.num_layers];
    Ok(common.model(blocks))
}
