//! Reads rotary frequencies from config.json, in the form of transformers 4 (`rope_theta`,
//! `rope_scaling`) or 5 (`rope_parameters`).

use super::json::Fields;
use super::limits;
use crate::model::error::ModelError;
use crate::model::rope::{RopeConfig, RopeScaling};

/// Reads the frequencies of a model that was trained for `max_position_embeddings` positions.
pub(in crate::model) fn rope(
    fields: &Fields<'_>,
    max_position_embeddings: usize,
) -> Result<RopeConfig, ModelError> {
    // If both are present, `rope_scaling`, the older name, takes precedence as in transformers.
    let key = if fields.is_null("rope_scaling") {
        "rope_parameters"
    } else {
        "rope_scaling"
    };
    rope_of(
        fields,
        fields.object(key)?,
        fields.number("rope_theta")?.unwrap_or(10_000.0),
        max_position_embeddings,
    )
}

/// Reads the frequencies from the object `nested` that describes them. `theta` applies if the
/// object has no `rope_theta`. Without the object there is no context extension.
pub(in crate::model) fn rope_of(
    fields: &Fields<'_>,
    nested: Option<Fields<'_>>,
    theta: f64,
    max_position_embeddings: usize,
) -> Result<RopeConfig, ModelError> {
    let theta = nested
        .as_ref()
        .map(|n| n.number("rope_theta"))
        .transpose()?
        .flatten()
        .unwrap_or(theta);
    if !(theta > 1.0 && theta.is_finite()) {
        return Err(fields.invalid(
            "rope_theta",
            format!("is {theta}; must be a number above 1"),
        ));
    }
    for f in [Some(fields), nested.as_ref()].into_iter().flatten() {
        if f.number("partial_rotary_factor")?.is_some_and(|p| p != 1.0) {
            return Err(f.invalid(
                "partial_rotary_factor",
                "partial rotation is not implemented; must be 1",
            ));
        }
    }
    let Some(rope) = nested else {
        return Ok(RopeConfig {
            theta,
            scaling: RopeScaling::None,
            query_scaling: None,
        });
    };

    let kind = match rope.string("rope_type")? {
        Some(kind) => kind,
        None => rope.string("type")?.unwrap_or("default"),
    };
    let factor = |name: &str| {
        let value = rope.number(name)?.ok_or_else(|| {
            rope.invalid(name, format!("is missing; rope type '{kind}' needs it"))
        })?;
        if value > 0.0 && value.is_finite() {
            Ok(value)
        } else {
            Err(rope.invalid(name, format!("is {value}; must be above 0")))
        }
    };
    let original = || -> Result<usize, ModelError> {
        let name = "original_max_position_embeddings";
        match fields.optional_size(name, limits::POSITIONS)? {
            Some(outside) => Ok(outside),
            None => Ok(rope
                .optional_size(name, limits::POSITIONS)?
                .unwrap_or(max_position_embeddings)),
        }
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: factor("factor")?,
        },
        "llama3" => {
            let (low_freq_factor, high_freq_factor) =
                (factor("low_freq_factor")?, factor("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                return Err(rope.invalid(
                    "high_freq_factor",
                    format!(
                        "is {high_freq_factor}; must exceed low_freq_factor, {low_freq_factor}"
                    ),
                ));
            }
            RopeScaling::Llama3 {
                factor: factor("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original()?,
            }
        }
        "yarn" => {
            let original = original()?;
            // A null factor means the ratio of the extended to the pretrained context.
            let factor = if rope.is_null("factor") {
                max_position_embeddings as f64 / original as f64
            } else {
                factor("factor")?
            };
            let or = |name: &str, default: f64| {
                Ok::<_, ModelError>(rope.number(name)?.filter(|v| *v != 0.0).unwrap_or(default))
            };
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast: or("beta_fast", 32.0)?,
                beta_slow: or("beta_slow", 1.0)?,
                attention_factor: rope.number("attention_factor")?,
                mscale: rope.number("mscale")?,
                mscale_all_dim: rope.number("mscale_all_dim")?,
                truncate: rope.flag("truncate")?.unwrap_or(true),
            }
        }
        other => {
            return Err(rope.invalid(
                "rope_type",
                format!("'{other}' is not implemented; supported: default, linear, llama3, yarn"),
            ));
        }
    };
    Ok(RopeConfig {
        theta,
        scaling,
        query_scaling: None,
    })
}
