//! OLMo 3: as OLMo 2, with a sliding window on three of four layers. Only the layers without a
//! window have a context extension.

use serde_json::Value;

use super::common::{Common, Family, ropes_of_layer_types, sliding_layers};
use super::olmo2;
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, ModelSpec};

pub(super) static FAMILY: Family = Family::new("olmo3", "Olmo3ForCausalLM", defaults, spec);

/// Default θ.
const THETA: f64 = 500_000.0;
/// Indices in [`ModelSpec::ropes`].
const GLOBAL: usize = 0;
const LOCAL: usize = 1;

fn defaults() -> Value {
    let mut defaults = olmo2::defaults();
    defaults["sliding_window"] = 4096.into();
    defaults
}

fn spec(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(fields)?;
    let slides = match sliding_layers(fields, common.num_layers)? {
        Some(slides) => slides,
        None => (1..=common.num_layers)
            .map(|layer| !layer.is_multiple_of(4))
            .collect(),
    };
    let block = |slides: &bool| {
        let (window, rope) = match slides {
            true => (common.window, LOCAL),
            false => (None, GLOBAL),
        };
        let attention = AttentionSpec {
            window,
            rope: Some(rope),
            ..olmo2::attention(&common)
        };
        olmo2::block(&common, attention)
    };
    let blocks = slides.iter().map(block).collect();
    // In transformers 5 `rope_theta` outside `rope_parameters` applies only to the layers without a
    // window.
    let thetas = [fields.number("rope_theta")?.unwrap_or(THETA), THETA];
    let model = common.model(blocks);
    Ok(ModelSpec {
        ropes: ropes_of_layer_types(fields, thetas, model.max_position_embeddings)?,
        ..model
    })
}
