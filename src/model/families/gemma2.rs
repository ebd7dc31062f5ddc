//! Gemma 2: as Gemma 3, with soft-caps on scores and logits, without norms on queries and keys, and
//! with the same rotary frequencies on all layers. By default every second layer has a sliding
//! window, beginning with the first.

use serde_json::{Value, json};

use super::common::{Family, sliding_layers};
use super::gemma::Gemma;
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family::new("gemma2", "Gemma2ForCausalLM", defaults, spec);

fn defaults() -> Value {
    json!({
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "tie_word_embeddings": true,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    })
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let gemma = Gemma::read(fields)?;
    let num_layers = gemma.num_layers();
    let slides = match sliding_layers(fields, num_layers)? {
        Some(slides) => slides,
        None => (0..num_layers).map(|layer| layer % 2 == 0).collect(),
    };
    let block = |slides: &bool| {
        gemma.block(AttentionSpec {
            window: gemma.window().filter(|_| *slides),
            ..gemma.attention
        })
    };
    let blocks = slides.iter().map(block).collect();
    Ok(gemma.model(blocks))
}
