//! Model configuration from GGUF metadata. The metadata is converted to an equivalent config.json,
//! which is then read like one from Hugging Face.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::reader::Gguf;
use crate::model::config::ModelConfig;
use crate::model::error::ModelError;
use crate::model::families::Architecture;
use crate::model::params::{Linear, gguf_bias, gguf_embedding, gguf_head};
use crate::model::rope::{RopeConfig, RopeScaling};

/// Tensor in which llama.cpp stores the llama3 RoPE scaling, shape `[D/2]`: one divisor per
/// frequency.
const ROPE_FREQS: &str = "rope_freqs.weight";
/// `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings` of every published
/// Llama 3.x. GGUF does not store them.
const LLAMA3_RAMP: (f64, f64, usize) = (1.0, 4.0, 8192);
/// Tokens that end a turn or a message if the chat template prints them.
const TURN_ENDS: [&str; 3] = ["<|eot_id|>", "<|eom_id|>", "<|im_end|>"];

impl ModelConfig {
    /// Reads the configuration of a GGUF file.
    ///
    /// Mistral files have the architecture `llama` and no sliding window. Such a model attends to
    /// all earlier positions, as in llama.cpp and transformers. `rope_freqs` holds the values of
    /// the tensor [`ModelConfig::GGUF_ROPE_FREQS`], if the file has it.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for another architecture or a mixture of experts,
    /// [`ModelError::InvalidConfig`] for a metadata key that is missing or not supported, and the
    /// errors of [`ModelConfig::from_hf_json`].
    pub(crate) fn from_gguf(gguf: &Gguf, rope_freqs: Option<&[f32]>) -> Result<Self, ModelError> {
        let stored = gguf
            .string("general.architecture")?
            .ok_or_else(|| gguf.invalid("general.architecture", "is missing"))?;
        let name = gguf
            .string("general.name")?
            .unwrap_or_default()
            .to_lowercase();
        let architecture = match stored {
            "llama" if name.contains("mistral") => Architecture::Mistral,
            "llama" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            "qwen3" => Architecture::Qwen3,
            other => {
                let what = format!(
                    "{}: GGUF architecture '{other}' \
                     (supported: llama, which Mistral uses too, qwen2, qwen3)",
                    gguf.path.display()
                );
                return Err(ModelError::Unsupported { what });
            }
        };
        let keys = MetadataKeys {
            gguf,
            architecture: stored,
        };
        if keys.integer("expert_count")?.is_some_and(|n| n > 0) {
            return Err(ModelError::Unsupported {
                what: format!("{}: a mixture of experts", gguf.path.display()),
            });
        }

        let (width, heads) = (
            keys.required("embedding_length")?,
            keys.required("attention.head_count")?,
        );
        let rotated = keys.integer("rope.dimension_count")?;
        let head_dim = match keys.integer("attention.key_length")?.or(rotated) {
            Some(d) => d,
            None if heads > 0 => width / heads,
            None => return Err(gguf.invalid(&keys.key("attention.head_count"), "is 0")),
        };
        for (key, what) in [
            ("rope.dimension_count", "rotate"),
            ("attention.value_length", "be as long as"),
        ] {
            if keys.integer(key)?.is_some_and(|n| n != head_dim) {
                return Err(gguf.invalid(
                    &keys.key(key),
                    format!("must {what} the whole key of {head_dim}; the rest is not implemented"),
                ));
            }
        }
        let embedding = gguf_embedding();
        let embedding = gguf
            .tensor(&embedding)
            .ok_or_else(|| missing(gguf, &embedding))?;
        let has = |name: &str| gguf.tensor(name).is_some();
        let context = keys.required("context_length")?;

        let mut config = Map::new();
        config.insert(
            "architectures".into(),
            json!([architecture.causal_lm_class()]),
        );
        config.insert("model_type".into(), json!(architecture.as_str()));
        config.insert("vocab_size".into(), json!(embedding.shape.first()));
        config.insert("hidden_size".into(), json!(width));
        config.insert(
            "intermediate_size".into(),
            json!(keys.required("feed_forward_length")?),
        );
        config.insert(
            "num_hidden_layers".into(),
            json!(keys.required("block_count")?),
        );
        config.insert("num_attention_heads".into(), json!(heads));
        config.insert(
            "num_key_value_heads".into(),
            json!(keys.integer("attention.head_count_kv")?.unwrap_or(heads)),
        );
        config.insert("head_dim".into(), json!(head_dim));
        config.insert("hidden_act".into(), json!("silu"));
        config.insert("max_position_embeddings".into(), json!(context));
        config.insert(
            "rms_norm_eps".into(),
            json!(shortest(
                keys.number("attention.layer_norm_rms_epsilon")?
                    .unwrap_or(1e-6)
            )),
        );
        config.insert(
            "attention_bias".into(),
            json!(has(&gguf_bias(0, Linear::Query))),
        );
        config.insert("mlp_bias".into(), json!(has(&gguf_bias(0, Linear::Gate))));
        config.insert("tie_word_embeddings".into(), json!(!has(&gguf_head())));
        let window = keys.integer("attention.sliding_window")?.filter(|n| *n > 0);
        config.insert("sliding_window".into(), json!(window));
        config.insert(
            "bos_token_id".into(),
            json!(gguf.integer("tokenizer.ggml.bos_token_id")?),
        );
        config.insert("eos_token_id".into(), stop_tokens(gguf)?);
        let theta = shortest(keys.number("rope.freq_base")?.unwrap_or(10_000.0));
        config.insert("rope_theta".into(), json!(theta));
        if let Some(scaling) = scaling(&keys, context, theta, head_dim as usize, rope_freqs)? {
            config.insert("rope_scaling".into(), scaling);
        }
        Self::from_hf_value(Value::Object(config), &gguf.path)
    }

    /// Name of the tensor that [`ModelConfig::from_gguf`] takes as `rope_freqs`.
    pub(crate) const GGUF_ROPE_FREQS: &str = ROPE_FREQS;
}

/// Returns the ids of the tokens at which generation stops, in the form of `eos_token_id` in a
/// config.json.
///
/// The first id is the tokenizer's `eos_token`, which ends a text. Llama 3 ends an assistant's turn
/// with another token. An export must list that one, too, or generation would not stop after the
/// answer. Many files have no metadata key for it, so it is also looked up in the chat template.
fn stop_tokens(gguf: &Gguf) -> Result<Value, ModelError> {
    let mut ids: Vec<u64> = gguf
        .integer("tokenizer.ggml.eos_token_id")?
        .into_iter()
        .collect();
    let template = gguf.string("tokenizer.chat_template")?.unwrap_or_default();
    let printed: Vec<&str> = TURN_ENDS
        .into_iter()
        .filter(|token| template.contains(token))
        .collect();
    let tokens = gguf.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
    // Some files mark an absent token by an id that is outside the vocabulary.
    let is_token = |id: &u64| *id < tokens.len() as u64;
    let ends = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
    ids.extend(
        ends.iter()
            .filter_map(|key| gguf.integer(key).ok().flatten())
            .filter(is_token),
    );
    ids.extend(
        tokens
            .iter()
            .zip(0_u64..)
            .filter(|(token, _)| printed.contains(&token.as_str()))
            .map(|(_, id)| id),
    );
    let mut seen = BTreeSet::new();
    ids.retain(|id| seen.insert(*id));
    Ok(match ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    })
}

/// Reads metadata keys, which are prefixed by the architecture's name.
struct MetadataKeys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl MetadataKeys<'_> {
    fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture)
    }

    fn integer(&self, suffix: &str) -> Result<Option<u64>, ModelError> {
        self.gguf.integer(&self.key(suffix))
    }

    fn required(&self, suffix: &str) -> Result<u64, ModelError> {
        self.integer(suffix)?
            .ok_or_else(|| self.gguf.invalid(&self.key(suffix), "is missing"))
    }

    fn number(&self, suffix: &str) -> Result<Option<f64>, ModelError> {
        self.gguf.number(&self.key(suffix))
    }
}

/// Returns `rope_scaling` for the config.json, if the file has any.
fn scaling(
    keys: &MetadataKeys<'_>,
    context: u64,
    theta: f64,
    head_dim: usize,
    freqs: Option<&[f32]>,
) -> Result<Option<Value>, ModelError> {
    let factor = keys
        .number("rope.scaling.factor")?
        .or(keys.number("rope.scale_linear")?);
    match keys.gguf.string(&keys.key("rope.scaling.type"))? {
        None | Some("none") => {}
        Some("linear") => {
            return Ok(factor
                .filter(|f| *f != 1.0)
                .map(|factor| json!({"rope_type": "linear", "factor": factor})));
        }
        Some("yarn") => {
            let original = keys
                .integer("rope.scaling.original_context_length")?
                .unwrap_or(context);
            return Ok(Some(json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            })));
        }
        Some(other) => {
            return Err(keys.gguf.invalid(
                &keys.key("rope.scaling.type"),
                format!("'{other}' is not implemented; supported: none, linear, yarn"),
            ));
        }
    }
    let Some(freqs) = freqs else { return Ok(None) };
    // The largest divisor is the scaling factor. The ramp must then reproduce all other divisors.
    let factor = f64::from(freqs.iter().copied().fold(1.0, f32::max));
    let (low_freq_factor, high_freq_factor, original_max_position_embeddings) = LLAMA3_RAMP;
    let scaled = RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings,
    };
    let plain = RopeConfig {
        theta,
        scaling: RopeScaling::None,
    }
    .inv_freq(head_dim)
    .0;
    let scaled = RopeConfig {
        theta,
        scaling: scaled,
    }
    .inv_freq(head_dim)
    .0;
    let same = freqs.len() == plain.len()
        && plain
            .iter()
            .zip(&scaled)
            .zip(freqs)
            .all(|((p, s), f)| (p / f / s - 1.0).abs() < 1e-3);
    if !same {
        return Err(keys.gguf.invalid(
            ROPE_FREQS,
            "the divisors are not those of Llama 3 (low 1, high 4, original context 8192)",
        ));
    }
    Ok(Some(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low_freq_factor,
        "high_freq_factor": high_freq_factor,
        "original_max_position_embeddings": original_max_position_embeddings,
    })))
}

fn missing(gguf: &Gguf, name: &str) -> ModelError {
    ModelError::MissingTensor {
        name: name.to_owned(),
        path: gguf.path.clone(),
    }
}

/// Returns the shortest decimal that rounds to the same f32. GGUF stores f32, so 1e-5 is read as
/// 9.99999974738e-6; this restores the number that was written.
fn shortest(x: f64) -> f64 {
    (x as f32).to_string().parse().unwrap_or(x)
}
