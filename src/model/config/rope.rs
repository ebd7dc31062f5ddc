//! Reads rotary frequencies from config.json, in the form of transformers 4 (`rope_theta`,
//! `rope_scaling`) or 5 (`rope_parameters`).

use super::json::Fields;
use super::limits;
use crate::model::error::ModelError;
use crate::model::rope::{RopeConfig, RopeScaling};
use crate::model::spec::ModelSpec;

/// Reads the frequencies of a model with heads of width `head_dim` that was trained for
/// `max_position_embeddings` positions.
pub(in crate::model) fn rope(
    fields: &Fields<'_>,
    max_position_embeddings: usize,
    head_dim: usize,
) -> Result<RopeConfig, ModelError> {
    // If both are present, `rope_scaling`, the older name, takes precedence as in transformers.
    let key = if fields.is_null("rope_scaling") {
        "rope_parameters"
    } else {
        "rope_scaling"
    };
    let rope = rope_of(
        fields,
        fields.object(key)?,
        fields.number("rope_theta")?.unwrap_or(10_000.0),
        max_position_embeddings,
    )?;
    let dims = rotated_dims(fields, key, head_dim)?;
    Ok(RopeConfig {
        dims: (dims != head_dim).then_some(dims),
        ..rope
    })
}

/// Checks that the frequencies of a model fit its heads.
pub(super) fn check_ropes(fields: &Fields<'_>, spec: &ModelSpec) -> Result<(), ModelError> {
    let head_dim = spec.head_dim();
    for rope in &spec.ropes {
        let dims = rope.dims.unwrap_or(head_dim);
        let reason = match &rope.scaling {
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                ..
            } if short_factor.len() != dims / 2 || long_factor.len() != dims / 2 => format!(
                "lists {} short and {} long factors; {dims} rotated dimensions need {} of each",
                short_factor.len(),
                long_factor.len(),
                dims / 2
            ),
            _ if rope.query_scaling.is_some() && dims != head_dim => {
                format!("scales queries: all {head_dim} dimensions must be rotated, not {dims}")
            }
            RopeScaling::Dynamic { .. } if dims <= 2 => {
                format!("is 'dynamic', which needs more than {dims} rotated dimensions")
            }
            _ => continue,
        };
        let key = match fields.is_null("rope_scaling") {
            true => "rope_parameters",
            false => "rope_scaling",
        };
        return Err(fields.invalid(key, reason));
    }
    Ok(())
}

/// Reads the number of rotated dimensions of a head of width `head_dim`. `key` is the name of the
/// object that describes the frequencies.
fn rotated_dims(fields: &Fields<'_>, key: &str, head_dim: usize) -> Result<usize, ModelError> {
    let name = "partial_rotary_factor";
    if !fields.has_default(name) {
        return Ok(head_dim);
    }
    let nested = fields.object(key)?;
    let nested = nested.as_ref().filter(|rope| !rope.is_null(name));
    let place = nested.unwrap_or(fields);
    let factor = place.number(name)?.unwrap_or(1.0);
    if !(factor > 0.0 && factor <= 1.0) {
        return Err(place.invalid(name, format!("is {factor}; must be above 0 and at most 1")));
    }
    // Truncated, as in transformers.
    let dims = (head_dim as f64 * factor) as usize;
    if dims == 0 || !dims.is_multiple_of(2) {
        return Err(place.invalid(
            name,
            format!(
                "is {factor}: it rotates {dims} of {head_dim} dimensions; their number must be \
                 even and above 0"
            ),
        ));
    }
    Ok(dims)
}

/// Returns the factor on cos and sin of `longrope` for a context of `ratio` times `original`
/// positions (arXiv:2402.13753).
fn longrope_attention_factor(ratio: f64, original: usize) -> f64 {
    if ratio <= 1.0 {
        1.0
    } else {
        (1.0 + ratio.ln() / (original as f64).ln()).sqrt()
    }
}

/// Requirement on factors, for messages.
const MUST_BE_POSITIVE: &str = "must be above 0 and finite in f32";

/// Returns true if a factor is above 0 and finite in f32, in which frequencies are computed.
fn is_positive(value: f64) -> bool {
    let value = value as f32;
    value > 0.0 && value.is_finite()
}

/// Reads the frequencies from the object `nested` that describes them. `theta` applies if the
/// object has no `rope_theta`. Without the object there is no context extension.
pub(in crate::model) fn rope_of(
    fields: &Fields<'_>,
    nested: Option<Fields<'_>>,
    theta: f64,
    max_position_embeddings: usize,
) -> Result<RopeConfig, ModelError> {
    let nested_theta = nested
        .as_ref()
        .map(|n| n.number("rope_theta"))
        .transpose()?
        .flatten();
    let theta = nested_theta.unwrap_or(theta);
    if !(theta > 1.0 && theta.is_finite()) {
        let reason = format!("is {theta}; must be a number above 1");
        let place = nested.as_ref().filter(|_| nested_theta.is_some());
        return Err(place.unwrap_or(fields).invalid("rope_theta", reason));
    }
    let has_partial = fields.has_default("partial_rotary_factor");
    for f in [Some(fields), nested.as_ref()].into_iter().flatten() {
        if !has_partial && f.number("partial_rotary_factor")?.is_some_and(|p| p != 1.0) {
            return Err(f.invalid(
                "partial_rotary_factor",
                "partial rotation is not implemented; must be 1",
            ));
        }
    }
    let Some(rope) = nested else {
        return Ok(RopeConfig::new(theta));
    };

    let kind = match rope.string("rope_type")? {
        Some(kind) => kind,
        None => rope.string("type")?.unwrap_or("default"),
    };
    // Only the class of Phi-3 has this field. It reads these older names as longrope.
    let is_phi3 = fields.has_default("original_max_position_embeddings");
    let kind = match kind {
        "su" | "yarn" if is_phi3 => "longrope",
        kind => kind,
    };
    let positive = |name: &str, value: f64| match is_positive(value) {
        true => Ok(value),
        false => Err(rope.invalid(name, format!("is {value}; {MUST_BE_POSITIVE}"))),
    };
    let factor = |name: &str| {
        let value = rope.number(name)?.ok_or_else(|| {
            rope.invalid(name, format!("is missing; rope type '{kind}' needs it"))
        })?;
        positive(name, value)
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
            // As in transformers, 0 in these fields has the same meaning as null.
            let unless_zero = |name: &str| -> Result<Option<f64>, ModelError> {
                let value = rope.number(name)?.filter(|value| *value != 0.0);
                value.map(|value| positive(name, value)).transpose()
            };
            let attention_factor = rope.number("attention_factor")?;
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast: unless_zero("beta_fast")?.unwrap_or(32.0),
                beta_slow: unless_zero("beta_slow")?.unwrap_or(1.0),
                attention_factor: attention_factor
                    .map(|value| positive("attention_factor", value))
                    .transpose()?,
                mscale: unless_zero("mscale")?,
                mscale_all_dim: unless_zero("mscale_all_dim")?,
                truncate: rope.flag("truncate")?.unwrap_or(true),
            }
        }
        "dynamic" => RopeScaling::Dynamic {
            factor: factor("factor")?,
            context: max_position_embeddings,
        },
        "longrope" => {
            let factors = |name: &str| {
                let list = rope.numbers(name)?.ok_or_else(|| {
                    rope.invalid(name, format!("is missing; rope type '{kind}' needs it"))
                })?;
                let wrong = list.iter().copied().find(|value| !is_positive(*value));
                match wrong {
                    None => Ok(list),
                    Some(value) => {
                        Err(rope.invalid(name, format!("lists {value}; each {MUST_BE_POSITIVE}")))
                    }
                }
            };
            let original = original()?;
            let ratio = if rope.is_null("factor") {
                max_position_embeddings as f64 / original as f64
            } else {
                factor("factor")?
            };
            let stored = rope.number("attention_factor")?;
            let attention_factor =
                stored.unwrap_or_else(|| longrope_attention_factor(ratio, original));
            RopeScaling::LongRope {
                short_factor: factors("short_factor")?,
                long_factor: factors("long_factor")?,
                attention_factor: positive("attention_factor", attention_factor)?,
                original_max_position_embeddings: original,
            }
        }
        other => {
            let supported = "default, linear, llama3, yarn, dynamic, longrope";
            return Err(rope.invalid(
                "rope_type",
                format!("'{other}' is not implemented; supported: {supported}"),
            ));
        }
    };
    Ok(RopeConfig {
        scaling,
        ..RopeConfig::new(theta)
    })
}
