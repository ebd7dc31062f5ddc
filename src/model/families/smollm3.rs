//! SmolLM3: as Llama, without a rotation on every fourth layer. The layers without a rotation may
//! have a sliding window.

use serde_json::{Value, json};

use super::common::{Common, Family, sliding_layers};
use crate::model::config::json::Fields;
use crate::model::config::limits;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family {
    is_interleaved_in_gguf: true,
    ..Family::new("smollm3", "SmolLM3ForCausalLM", defaults, spec)
};

fn defaults() -> Value {
    json!({
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0,
        "mlp_bias": false,
        "tie_word_embeddings": true,
    })
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let num_layers = common.num_layers;
    let rotated = rotated_layers(fields, num_layers)?;
    let slides = match sliding_layers(fields, num_layers)? {
        Some(slides) => slides,
        None => {
            let has_windows = fields.flag("use_sliding_window")?.unwrap_or(false);
            rotated
                .iter()
                .map(|rotated| has_windows && !rotated)
                .collect()
        }
    };
    let block = |(rotated, slides): (&bool, &bool)| {
        common.block(AttentionSpec {
            rope: rotated.then_some(0),
            window: common.window.filter(|_| *slides),
            qkv_bias: common.attention_bias,
            output_bias: common.attention_bias,
            ..common.attention()
        })
    };
    let blocks = rotated.iter().zip(&slides).map(block).collect();
    Ok(common.model(blocks))
}

/// Returns for each layer true if queries and keys are rotated. `no_rope_layers` holds a 1 for
/// these layers. By default every `no_rope_layer_interval`-th layer is not rotated.
fn rotated_layers(fields: &Fields<'_>, num_layers: usize) -> Result<Vec<bool>, ModelError> {
    if let Some(stored) = fields.integers("no_rope_layers")? {
        if stored.len() < num_layers {
            return Err(fields.invalid(
                "no_rope_layers",
                format!(
                    "lists {} layers, num_hidden_layers is {num_layers}",
                    stored.len()
                ),
            ));
        }
        return Ok(stored[..num_layers].iter().map(|flag| *flag != 0).collect());
    }
    let interval = fields
        .optional_size("no_rope_layer_interval", limits::LAYERS)?
        .unwrap_or(4);
    Ok((1..=num_layers)
        .map(|layer| !layer.is_multiple_of(interval))
        .collect())
}
