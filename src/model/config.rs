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
use super::spec::{FeedForward, ModelSpec, QkNorm};

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
    /// The blocks of the families that it covers differ in their windows and frequencies only, so
    /// it describes the first one and lists the windows and frequencies of all.
    pub fn canonical(&self) -> String {
        let spec = &self.spec;
        let (frequencies, factor) = spec.ropes[0].bits(spec.head_dim());
        let windows: Vec<usize> =
            spec.blocks.iter().map(|block| block.attention().window.unwrap_or(0)).collect();
        let block = &spec.blocks[0];
        let attention = block.attention();
        let FeedForward::Gated { width, activation: _, bias } = block.feed_forward;
        let mut fields = vec![
            json!(["architecture", self.architecture.as_str()]),
            json!(["vocab_size", spec.vocab_size]),
            json!(["hidden_size", spec.hidden_size]),
            json!(["intermediate_size", width]),
            json!(["num_layers", spec.blocks.len()]),
            json!(["num_heads", attention.heads]),
            json!(["num_kv_heads", attention.kv_heads]),
            json!(["head_dim", attention.head_dim]),
            json!(["rms_norm_eps", spec.rms_norm_eps]),
            json!(["rope_frequencies", frequencies]),
            json!(["rope_factor", factor]),
            json!(["tie_word_embeddings", spec.tie_word_embeddings]),
            json!(["biases", [attention.qkv_bias, attention.output_bias, bias]]),
            json!(["qk_norm", attention.qk_norm == QkNorm::PerHead]),
            json!(["sliding_window", windows]),
        ];
        fields.extend(spec.distinctions());
        Value::Array(fields).to_string()
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
        let json = text_config(json);
        let fields = Fields::new(&json, path)?;
        let architecture = architecture(&fields)?;
        if !fields.is_null("quantization_config") {
            let what = format!(
                "{}: a quantised checkpoint (field 'quantization_config'); use the unquantised weights or a GGUF file",
                path.display()
            );
            return Err(ModelError::Unsupported { what });
        }
        let family = architecture.family();
        let defaults = (family.defaults)();
        let spec = (family.spec)(&fields.with_defaults(&defaults))?;
        let bos_token_id = fields.token_ids("bos_token_id")?.first().copied();
        let eos_token_ids = fields.token_ids("eos_token_id")?;
        Ok(ModelConfig { architecture, spec, bos_token_id, eos_token_ids, hf_json: json })
    }

    /// Parameters, tied ones once.
    pub fn parameter_count(&self) -> usize {
        params::parameter_count(&self.spec)
    }
}

/// Returns the configuration of the language model inside one of text and images, as the
/// config.json that it would have alone; other configurations as they are.
fn text_config(mut json: Value) -> Value {
    let family = json.get("model_type").and_then(Value::as_str).and_then(Architecture::of_text_in);
    let stored = family.and_then(|_| json.get_mut("text_config")).map(Value::take);
    let Some(Value::Object(mut text)) = stored else { return json };
    for key in [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "torch_dtype",
        "quantization_config",
    ] {
        if let (false, Some(value)) = (text.contains_key(key), json.get_mut(key).map(Value::take)) {
            text.insert(key.to_owned(), value);
        }
    }
    if let Some(family) = family {
        text.insert("model_type".to_owned(), json!(family.as_str()));
        text.insert("architectures".to_owned(), json!([family.family().causal_lm_class]));
    }
    Value::Object(text)
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
