//! Ministral 3: as Mistral, usually without a window. Rotated queries have a factor that grows with
//! their position.

use serde_json::{Value, json};

use super::common::{Common, Family};
use crate::model::config::json::Fields;
use crate::model::config::limits;
use crate::model::error::ModelError;
use crate::model::rope::QueryScaling;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family {
    is_interleaved_in_gguf: true,
    ..Family::new("ministral3", "Ministral3ForCausalLM", defaults, spec)
};

fn defaults() -> Value {
    json!({
        "vocab_size": 131_072,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16_384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    })
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let block = common.block(AttentionSpec {
        window: common.window,
        ..common.attention()
    });
    let blocks = vec![block; common.num_layers];
    let mut model = common.model(blocks);
    let scaling = query_scaling(fields, model.max_position_embeddings)?;
    for rope in &mut model.ropes {
        rope.query_scaling = Some(scaling);
    }
    Ok(model)
}

fn query_scaling(
    fields: &Fields<'_>,
    max_position_embeddings: usize,
) -> Result<QueryScaling, ModelError> {
    const BETA: &str = "llama_4_scaling_beta";
    const PERIOD: &str = "original_max_position_embeddings";
    let nested = match fields.object("rope_scaling")? {
        Some(scaling) => scaling,
        None => fields
            .object("rope_parameters")?
            .ok_or_else(|| fields.invalid("rope_parameters", "is null; must be an object"))?,
    };
    let beta = nested
        .number(BETA)?
        .ok_or_else(|| nested.invalid(BETA, "is missing; the family needs it"))?;
    if !(beta >= 0.0 && beta.is_finite()) {
        return Err(nested.invalid(BETA, format!("is {beta}; must be a number of at least 0")));
    }
    // As for the frequencies, a value outside the object takes precedence.
    let period = match fields.optional_size(PERIOD, limits::POSITIONS)? {
        Some(outside) => Some(outside),
        None => nested.optional_size(PERIOD, limits::POSITIONS)?,
    };
    Ok(QueryScaling {
        beta: beta as f32,
        period: period.unwrap_or(max_position_embeddings),
    })
}
