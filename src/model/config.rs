//! A model's configuration, read from config.json or from GGUF metadata.

pub(super) mod json;
pub(super) mod limits;
pub(super) mod rope;

use std::path::Path;

use serde_json::{Value, json};

use self::json::{Fields, invalid};
use super::error::ModelError;
use super::families::Architecture;
use super::params;
use super::spec::{Activation, FeedForward, ModelSpec, Norms, QkNorm};

/// A configuration: the decoder that it describes, and what else config.json says.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// The decoder.
    pub spec: ModelSpec,
    /// Starts a sequence.
    pub bos_token_id: Option<u32>,
    /// Any of them ends one.
    pub eos_token_ids: Vec<u32>,
    /// A config.json that transformers loads, for merged export.
    pub hf_json: Value,
}

impl ModelConfig {
    /// What the model computes, as a text that is the same however its configuration file is
    /// written. It is part of what jobs are pinned to: a field that is added later must be left out
    /// where it has no effect, or every older job is refused.
    ///
    /// The blocks of the families that it covers differ in their windows only, so it describes the
    /// first one and lists the windows of all.
    pub fn canonical(&self) -> String {
        let spec = &self.spec;
        let (frequencies, attention_factor) = spec.rope.inv_freq(spec.head_dim());
        let bits: Vec<u32> = frequencies.iter().map(|f| f.to_bits()).collect();
        let windows: Vec<usize> =
            spec.blocks.iter().map(|block| block.attention().window.unwrap_or(0)).collect();
        let block = &spec.blocks[0];
        let (attention, Norms::Pre, Norms::Pre) =
            (block.attention(), block.mixer_norms, block.feed_forward_norms);
        let FeedForward::Gated { width, activation: Activation::Silu, bias } = block.feed_forward;
        json!([
            ["architecture", self.architecture.as_str()],
            ["vocab_size", spec.vocab_size],
            ["hidden_size", spec.hidden_size],
            ["intermediate_size", width],
            ["num_layers", spec.blocks.len()],
            ["num_heads", attention.heads],
            ["num_kv_heads", attention.kv_heads],
            ["head_dim", attention.head_dim],
            ["rms_norm_eps", spec.rms_norm_eps],
            ["rope_frequencies", bits],
            ["rope_factor", attention_factor.to_bits()],
            ["tie_word_embeddings", spec.tie_word_embeddings],
            ["biases", [attention.qkv_bias, attention.output_bias, bias]],
            ["qk_norm", attention.qk_norm == QkNorm::PerHead],
            ["sliding_window", windows],
        ])
        .to_string()
    }

    /// Reads a config.json, of transformers 4 (`rope_theta`, `rope_scaling`) or 5
    /// (`rope_parameters`). `path` is for messages. Absent optional fields get the defaults of
    /// transformers' config classes.
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`] names the field; [`ModelError::Unsupported`] an architecture
    /// or variant that is not implemented.
    pub fn from_hf_json(text: &str, path: &Path) -> Result<Self, ModelError> {
        let json: Value = serde_json::from_str(text)
            .map_err(|e| invalid(path, "(whole file)", format!("not JSON: {e}")))?;
        Self::from_hf_value(json, path)
    }

    /// Reads the value of a config.json; `path` is for messages.
    pub(crate) fn from_hf_value(json: Value, path: &Path) -> Result<Self, ModelError> {
        let fields = Fields::new(&json, path)?;
        let architecture = architecture(&fields)?;
        if !fields.is_null("quantization_config") {
            let what = format!(
                "{}: a quantised checkpoint (field 'quantization_config'); use the unquantised weights or a GGUF file",
                path.display()
            );
            return Err(ModelError::Unsupported { what });
        }
        let spec = (architecture.family().spec)(&fields)?;
        let bos_token_id = fields.token_ids("bos_token_id")?.first().copied();
        let eos_token_ids = fields.token_ids("eos_token_id")?;
        Ok(ModelConfig { architecture, spec, bos_token_id, eos_token_ids, hf_json: json })
    }

    /// Parameters, tied ones once.
    pub fn parameter_count(&self) -> usize {
        params::parameter_count(&self.spec)
    }
}

fn architecture(fields: &Fields<'_>) -> Result<Architecture, ModelError> {
    let name = fields.string("model_type")?.ok_or_else(|| {
        fields.invalid("model_type", "is missing; is this a model's config.json?")
    })?;
    Architecture::from_model_type(name).ok_or_else(|| {
        let supported = Architecture::ALL.map(Architecture::as_str).join(", ");
        ModelError::Unsupported {
            what: format!(
                "{}: architecture '{name}' (supported: {supported})",
                fields.path().display()
            ),
        }
    })
}

#[cfg(test)]
mod tests;
