//! A model's configuration, read from config.json or from GGUF metadata.

pub(super) mod json;
pub(super) mod limits;
pub(super) mod rope;

use std::path::Path;

use serde_json::{Value, json};

use self::json::{Fields, invalid};
use self::rope::check_ropes;
use super::error::ModelError;
use super::families::{Architecture, refusal};
use super::multimodal::{MultimodalModel, TextConfig};
use super::params;
use super::spec::{FeedForward, ModelSpec, QkNorm};

/// A model's configuration: the decoder and the remaining information of config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The model family.
    pub architecture: Architecture,
    /// The decoder that the configuration describes.
    pub spec: ModelSpec,
    /// Id of the token that starts a sequence.
    pub bos_token_id: Option<u32>,
    /// Ids of the tokens that end a sequence. Any of them does.
    pub eos_token_ids: Vec<u32>,
    /// A config.json with which transformers loads the language model alone. Exports of merged
    /// models write it, unless the language model is a part of another model.
    pub hf_json: Value,
    /// The config.json of the model of text and images that contains this language model, if it is
    /// a part of one.
    pub whole_json: Option<Value>,
}

impl ModelConfig {
    /// Returns a canonical text of everything that determines the model's results. It does not
    /// depend on the file format or on the spelling of the configuration.
    ///
    /// Jobs are pinned to a hash of this text. A field that is added later must therefore be
    /// omitted where it has no effect; otherwise every older job is refused.
    ///
    /// The blocks of a model of the supported families differ only in their windows and rotations.
    /// The text describes the first block and lists the windows and rotations of all.
    pub fn canonical(&self) -> String {
        let spec = &self.spec;
        let (frequencies, factor) = spec.ropes[0].bits(spec.head_dim());
        let windows: Vec<usize> = spec
            .blocks
            .iter()
            .map(|block| block.attention().window.unwrap_or(0))
            .collect();
        let block = &spec.blocks[0];
        let attention = block.attention();
        let FeedForward::Gated {
            width,
            activation: _,
            bias,
            projections: _,
        } = block.feed_forward;
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

    /// Reads the text of a config.json of transformers 4 (`rope_theta`, `rope_scaling`) or 5
    /// (`rope_parameters`). `path` is used in error messages only. Absent optional fields get the
    /// defaults of the config classes of transformers.
    ///
    /// # Errors
    /// Returns [`ModelError::InvalidConfig`] for a field that is missing or invalid, and
    /// [`ModelError::Unsupported`] for an architecture or a variant that is not implemented.
    pub fn from_hf_json(text: &str, path: &Path) -> Result<Self, ModelError> {
        let json: Value = serde_json::from_str(text)
            .map_err(|e| invalid(path, "(whole file)", format!("not JSON: {e}")))?;
        Self::from_hf_value(json, path)
    }

    /// Reads a parsed config.json. `path` is used in error messages only.
    pub(crate) fn from_hf_value(json: Value, path: &Path) -> Result<Self, ModelError> {
        let (json, whole_json, architecture) = match text_config(&json, path)? {
            Some(text) => (text.json, Some(json), Some(text.architecture)),
            None => (json, None, None),
        };
        let fields = Fields::new(&json, path)?;
        let architecture = match architecture {
            Some(architecture) => architecture,
            None => self::architecture(&fields)?,
        };
        if !fields.is_null("quantization_config") {
            let what = format!(
                "{}: a quantised checkpoint (field 'quantization_config'); use the unquantised \
                 weights or a GGUF file",
                path.display()
            );
            return Err(ModelError::Unsupported { what });
        }
        let family = architecture.family();
        let defaults = (family.defaults)();
        let spec = (family.spec)(&fields.with_defaults(&defaults))?;
        check_ropes(&fields, &spec)?;
        let bos_token_id = fields.token_ids("bos_token_id")?.first().copied();
        let eos_token_ids = fields.token_ids("eos_token_id")?;
        Ok(ModelConfig {
            architecture,
            spec,
            bos_token_id,
            eos_token_ids,
            hf_json: json,
            whole_json,
        })
    }

    /// Returns the `model_type` of the model: that of the whole model, if the language model is a
    /// part of one.
    pub fn model_type(&self) -> &str {
        let whole = self.whole_json.as_ref();
        whole
            .and_then(|json| json.get("model_type"))
            .and_then(Value::as_str)
            .unwrap_or_else(|| self.architecture.as_str())
    }

    /// Returns the number of parameters of the language model. A tied embedding is counted once.
    pub fn parameter_count(&self) -> usize {
        params::parameter_count(&self.spec)
    }
}

/// Returns the language model of a model of text and images. `None` if the config.json describes
/// another kind of model, or a model of text and images that [`MultimodalModel`] does not list.
///
/// # Errors
/// Returns [`ModelError::Unsupported`] if the language model is not implemented.
fn text_config(json: &Value, path: &Path) -> Result<Option<TextConfig>, ModelError> {
    let model_type = json.get("model_type").and_then(Value::as_str);
    let Some(model) = model_type.and_then(MultimodalModel::from_model_type) else {
        return Ok(None);
    };
    let text = model.text_config(json).ok_or_else(|| {
        let text_type = json
            .pointer("/text_config/model_type")
            .and_then(Value::as_str);
        let supported: Vec<&str> = model.text_types().collect();
        ModelError::Unsupported {
            what: format!(
                "{}: architecture '{}' with text_config.model_type {}{}",
                path.display(),
                model_type.unwrap_or_default(),
                text_type.map_or_else(|| "absent".to_owned(), |name| format!("'{name}'")),
                refusal(text_type.unwrap_or_default(), &supported.join(", "))
            ),
        }
    })?;
    Ok(Some(text))
}

fn architecture(fields: &Fields<'_>) -> Result<Architecture, ModelError> {
    let name = fields.string("model_type")?.ok_or_else(|| {
        fields.invalid("model_type", "is missing; is this a model's config.json?")
    })?;
    Architecture::from_model_type(name).ok_or_else(|| {
        let text_of = MultimodalModel::model_types()
            .collect::<Vec<_>>()
            .join(", ");
        let alone = Architecture::ALL.map(Architecture::as_str).join(", ");
        let supported = format!("{alone}, and the text of {text_of}");
        ModelError::Unsupported {
            what: format!(
                "{}: architecture '{name}'{}",
                fields.path().display(),
                refusal(name, &supported)
            ),
        }
    })
}

#[cfg(test)]
mod tests;
