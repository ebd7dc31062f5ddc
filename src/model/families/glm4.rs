//! GLM-4: norms before and after each part, biases on q, k and v, one matrix for gate and up. The
//! first half of each head is rotated, in interleaved pairs.

use serde_json::{Value, json};

use super::common::{Common, Family};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::rope::{RopeConfig, RotaryPairs};
use crate::model::spec::{AttentionSpec, BlockSpec, ModelSpec, NormNames, Norms};

pub(super) static FAMILY: Family = Family::new("glm4", "Glm4ForCausalLM", defaults, spec);

fn defaults() -> Value {
    json!({
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 13_696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": true,
    })
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let block = common.block(AttentionSpec {
        qkv_bias: common.attention_bias,
        ..common.attention()
    });
    let block = BlockSpec {
        mixer_norms: Norms::PreAndPost,
        feed_forward_norms: Norms::PreAndPost,
        norm_names: NormNames::Glm,
        ..block.with_fused_gate_up()
    };
    let blocks = vec![block; common.num_layers];
    let model = common.model(blocks);
    let interleaved = |rope: &RopeConfig| RopeConfig {
        pairs: RotaryPairs::Interleaved,
        ..rope.clone()
    };
    Ok(ModelSpec {
        ropes: model.ropes.iter().map(interleaved).collect(),
        ..model
    })
}
