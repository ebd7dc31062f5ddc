//! Models of text and images whose language model can be trained and scored: one entry each, which
//! says where config.json describes the language model and which family it belongs to.

use serde_json::{Map, Value, json};

use super::families::Architecture;

/// A model of text and images, of which only the language model is used.
pub struct MultimodalModel {
    /// `model_type` of the whole model.
    model_type: &'static str,
    /// The possible `model_type`s in `text_config`, each with the family of such a language model.
    /// Without a `model_type` the first applies.
    texts: &'static [(&'static str, Architecture)],
    /// True if older files have no `text_config`, but its fields at the top level.
    may_be_flat: bool,
    /// True if `tie_word_embeddings: true` of the whole model ties the embeddings, whatever
    /// `text_config` says. Otherwise the field of the whole model counts only if `text_config` has
    /// none.
    is_tied_by_either: bool,
    /// Fields that the family has, but the config class of this language model does not.
    ignored: &'static [&'static str],
    /// Returns the defaults of the config class of the language model, as far as they differ from
    /// those of the family.
    defaults: fn() -> Value,
}

/// All models of text and images that are supported.
static MODELS: [MultimodalModel; 5] = [
    MultimodalModel {
        texts: &[("gemma3_text", Architecture::Gemma3)],
        ..MultimodalModel::nested("gemma3")
    },
    MultimodalModel {
        texts: &[
            ("mistral", Architecture::Mistral),
            ("ministral3", Architecture::Ministral3),
        ],
        ..MultimodalModel::nested("mistral3")
    },
    MultimodalModel {
        texts: &[
            ("qwen2_vl_text", Architecture::Qwen2),
            ("qwen2_vl", Architecture::Qwen2),
        ],
        may_be_flat: true,
        is_tied_by_either: true,
        defaults: qwen2_vl,
        ..MultimodalModel::nested("qwen2_vl")
    },
    MultimodalModel {
        texts: &[
            ("qwen2_5_vl_text", Architecture::Qwen2),
            ("qwen2_5_vl", Architecture::Qwen2),
        ],
        may_be_flat: true,
        is_tied_by_either: true,
        defaults: qwen2_vl,
        ..MultimodalModel::nested("qwen2_5_vl")
    },
    MultimodalModel {
        texts: &[("qwen3_vl_text", Architecture::Qwen3)],
        is_tied_by_either: true,
        ignored: &["layer_types", "sliding_window", "use_sliding_window"],
        defaults: qwen3_vl,
        ..MultimodalModel::nested("qwen3_vl")
    },
];

fn qwen2_vl() -> Value {
    json!({
        "vocab_size": 152_064,
        "hidden_size": 8192,
        "intermediate_size": 29_568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "max_window_layers": 80,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
    })
}

fn qwen3_vl() -> Value {
    json!({
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 128_000,
        "rope_theta": 500_000.0,
    })
}

/// The configuration of the language model of a model of text and images.
pub struct TextConfig {
    /// Its family.
    pub architecture: Architecture,
    /// The config.json that it would have on its own.
    pub json: Value,
}

impl MultimodalModel {
    /// Returns a model whose language model is described by `text_config` alone, and has the
    /// defaults of its family.
    const fn nested(model_type: &'static str) -> Self {
        MultimodalModel {
            model_type,
            texts: &[],
            may_be_flat: false,
            is_tied_by_either: false,
            ignored: &[],
            defaults: || json!({}),
        }
    }

    /// Returns the model with the `model_type` `name`.
    pub fn from_model_type(name: &str) -> Option<&'static Self> {
        MODELS.iter().find(|model| model.model_type == name)
    }

    /// Returns the `model_type`s of all models of text and images.
    pub fn model_types() -> impl Iterator<Item = &'static str> {
        MODELS.iter().map(|model| model.model_type)
    }

    /// Returns the `model_type`s that the language model may have.
    pub fn text_types(&self) -> impl Iterator<Item = &'static str> {
        self.texts.iter().map(|(name, _)| *name)
    }

    /// Takes the language model out of the config.json of the whole model. Returns `None` if there
    /// is no description of it, or it is of another family.
    pub fn text_config(&self, whole: &Value) -> Option<TextConfig> {
        let whole = whole.as_object()?;
        let mut text = match whole.get("text_config") {
            Some(Value::Object(text)) => text.clone(),
            None | Some(Value::Null) if self.may_be_flat => {
                let mut text = whole.clone();
                for key in ["model_type", "text_config", "vision_config"] {
                    text.remove(key);
                }
                text
            }
            _ => return None,
        };
        let text_type = text.get("model_type").and_then(Value::as_str);
        let (_, architecture) = *self
            .texts
            .iter()
            .find(|(name, _)| text_type.is_none_or(|text_type| text_type == *name))?;
        let stored = |key: &str| whole.get(key).filter(|value| !value.is_null());
        // The special tokens of the whole model apply to its text.
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            if let Some(value) = stored(key) {
                text.insert(key.to_owned(), value.clone());
            }
        }
        for key in [
            "dtype",
            "torch_dtype",
            "quantization_config",
            "tie_word_embeddings",
        ] {
            if let (false, Some(value)) = (text.contains_key(key), stored(key)) {
                text.insert(key.to_owned(), value.clone());
            }
        }
        if self.is_tied_by_either && stored("tie_word_embeddings") == Some(&Value::Bool(true)) {
            text.insert("tie_word_embeddings".to_owned(), json!(true));
        }
        for key in self.ignored {
            text.remove(*key);
        }
        if let Value::Object(defaults) = (self.defaults)() {
            for (key, value) in defaults {
                text.entry(key).or_insert(value);
            }
        }
        for key in ["rope_scaling", "rope_parameters"] {
            if let Some(rope) = text.get_mut(key).and_then(Value::as_object_mut) {
                remove_sections(rope);
            }
        }
        let family = architecture.family();
        text.insert("model_type".to_owned(), json!(family.model_type));
        text.insert("architectures".to_owned(), json!([family.causal_lm_class]));
        Some(TextConfig {
            architecture,
            json: Value::Object(text),
        })
    }
}

/// Removes the sections of a position (`mrope_section`) from an object that describes rotary
/// frequencies. The three numbers of a position are the same for all text, so the sections have no
/// effect and the frequencies are the ordinary ones.
fn remove_sections(rope: &mut Map<String, Value>) {
    for key in ["mrope_section", "mrope_interleaved"] {
        rope.remove(key);
    }
    for key in ["rope_type", "type"] {
        if rope.get(key).and_then(Value::as_str) == Some("mrope") {
            rope.insert(key.to_owned(), json!("default"));
        }
    }
}
