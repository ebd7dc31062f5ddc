//! Ministral: as Mistral, but each layer has the sliding window or not. By default all have it.

use serde_json::{Value, json};

use super::common::{Common, Family, sliding_layers};
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family::new("ministral", "MinistralForCausalLM", defaults, spec);

fn defaults() -> Value {
    json!({
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    })
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let slides =
        sliding_layers(fields, common.num_layers)?.unwrap_or_else(|| vec![true; common.num_layers]);
    let block = |slides: &bool| {
        common.block(AttentionSpec {
            window: common.window.filter(|_| *slides),
            ..common.attention()
        })
    };
    let blocks = slides.iter().map(block).collect();
    Ok(common.model(blocks))
}
