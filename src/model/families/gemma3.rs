//! Gemma 3, text only: norms before and after each part, all norms with the factors 1 + w; RMSNorm
//! on each head's q and k; GELU in the feed-forward part; embeddings times √C. Five of six layers
//! have a sliding window and rotary frequencies of their own.

use serde_json::{Value, json};

use super::common::{Family, ropes_of_layer_types, sliding_layers};
use super::gemma::Gemma;
use crate::model::config::json::Fields;
use crate::model::config::limits;
use crate::model::error::ModelError;
use crate::model::rope::RopeConfig;
use crate::model::spec::{AttentionSpec, ModelSpec, QkNorm};

pub(super) static FAMILY: Family = Family::new("gemma3_text", "Gemma3ForCausalLM", defaults, spec);

/// Default θ of the layers without a window and of those with one.
const THETA: [f64; 2] = [1_000_000.0, 10_000.0];
/// Indices in [`ModelSpec::ropes`].
const GLOBAL: usize = 0;
const LOCAL: usize = 1;

/// Published files omit many of these fields.
fn defaults() -> Value {
    json!({
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "tie_word_embeddings": true,
    })
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let gemma = Gemma::read(fields)?;
    let attention = AttentionSpec {
        qk_norm: QkNorm::PerHead,
        // The class of transformers reads the field but does not apply it.
        softcap: None,
        ..gemma.attention
    };
    let block = |slides: &bool| {
        let attention = match slides {
            true => AttentionSpec {
                window: gemma.window(),
                rope: Some(LOCAL),
                ..attention
            },
            false => AttentionSpec {
                window: None,
                rope: Some(GLOBAL),
                ..attention
            },
        };
        gemma.block(attention)
    };
    let blocks = layers(fields, gemma.num_layers())?
        .iter()
        .map(block)
        .collect();
    let model = gemma.model(blocks);
    Ok(ModelSpec {
        ropes: ropes(fields, model.max_position_embeddings)?,
        ..model
    })
}

/// Returns for each layer true if it has the sliding window. By default every sixth layer has none.
fn layers(fields: &Fields<'_>, num_layers: usize) -> Result<Vec<bool>, ModelError> {
    if let Some(slides) = sliding_layers(fields, num_layers)? {
        return Ok(slides);
    }
    let pattern = fields
        .optional_size("sliding_window_pattern", limits::LAYERS)?
        .unwrap_or(6);
    Ok((1..=num_layers)
        .map(|layer| !layer.is_multiple_of(pattern))
        .collect())
}

/// Reads the frequencies of the layers without a window, then of those with one.
fn ropes(
    fields: &Fields<'_>,
    max_position_embeddings: usize,
) -> Result<Vec<RopeConfig>, ModelError> {
    let theta =
        |field: &str, default: f64| Ok::<_, ModelError>(fields.number(field)?.unwrap_or(default));
    let thetas = [
        theta("rope_theta", THETA[GLOBAL])?,
        theta("rope_local_base_freq", THETA[LOCAL])?,
    ];
    ropes_of_layer_types(fields, thetas, max_position_embeddings)
}
