//! OLMo 2: RMSNorms on the outputs of both parts and none on their inputs. Queries and keys are
//! each normed over all heads at once.

use serde_json::{Value, json};

use super::common::{Common, Family};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, BlockSpec, ModelSpec, Norms, QkNorm};

pub(super) static FAMILY: Family = Family::new("olmo2", "Olmo2ForCausalLM", defaults, spec);

/// Defaults of OLMo 2, which OLMo 3 shares.
pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 50_304,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    })
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let block = block(&common, attention(&common));
    let blocks = vec![block; common.num_layers];
    Ok(common.model(blocks))
}

/// Returns attention without a window.
pub(super) fn attention(common: &Common) -> AttentionSpec {
    AttentionSpec {
        qk_norm: QkNorm::AllHeads,
        qkv_bias: common.attention_bias,
        output_bias: common.attention_bias,
        ..common.attention()
    }
}

/// Returns a block with this attention.
pub(super) fn block(common: &Common, attention: AttentionSpec) -> BlockSpec {
    BlockSpec {
        mixer_norms: Norms::Post,
        feed_forward_norms: Norms::Post,
        ..common.block(attention)
    }
}
