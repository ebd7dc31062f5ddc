//! Model configuration from GGUF metadata. The metadata is converted to an equivalent config.json,
//! which is then read like one from Hugging Face.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::reader::Gguf;
use crate::model::config::ModelConfig;
use crate::model::error::ModelError;
use crate::model::families::{Architecture, refusal};
use crate::model::params::{Linear, gguf_bias, gguf_embedding, gguf_head};
use crate::model::rope::{RopeConfig, RopeScaling};

/// Tensor in which llama.cpp stores the llama3 RoPE scaling, shape `[D/2]`: one divisor per
/// frequency.
const ROPE_FREQS: &str = "rope_freqs.weight";
/// Tensors with the divisors of longrope, shape `[R/2]`, for sequences within the pretrained
/// context and for longer ones.
const SHORT_FACTORS: &str = "rope_factors_short.weight";
const LONG_FACTORS: &str = "rope_factors_long.weight";
/// `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings` of every published
/// Llama 3.x. GGUF does not store them.
const LLAMA3_RAMP: (f64, f64, usize) = (1.0, 4.0, 8192);
/// Tokens that end a turn or a message if the chat template prints them.
const TURN_ENDS: [&str; 4] = ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"];
/// Architectures of llama.cpp that are implemented.
const SUPPORTED: &str = "llama (also Mistral), qwen2, qwen2vl, qwen3, qwen3vl, gemma2, gemma3, \
                         phi3, glm4, smollm3, granite, olmo2 (also OLMo 3), mistral3";
/// Numbers of blocks of Gemma 2 27B and Gemma 3 27B. In these models the factor on the scores is
/// 1/√(C / H) in place of 1/√D. GGUF does not store the factor, so this module, like llama.cpp,
/// recognises the models by their number of blocks.
const GEMMA_27B_BLOCKS: [(Architecture, u64); 2] =
    [(Architecture::Gemma2, 46), (Architecture::Gemma3, 62)];

impl ModelConfig {
    /// Reads the configuration of a GGUF file.
    ///
    /// Files of Mistral 7B have the architecture `llama` and no sliding window. Such a model
    /// attends to all earlier positions, as in llama.cpp. The language models of Qwen2-VL and
    /// Qwen3-VL compute the same as Qwen2 and Qwen3, and are read as such.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for another architecture or a mixture of experts,
    /// [`ModelError::InvalidConfig`] for a metadata key that is missing or not supported,
    /// [`ModelError::MissingTensor`] for a file without an embedding, and the errors of
    /// [`ModelConfig::from_hf_json`].
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let stored = gguf
            .string("general.architecture")?
            .ok_or_else(|| gguf.invalid("general.architecture", "is missing"))?;
        let keys = MetadataKeys {
            gguf,
            architecture: stored,
        };
        let architecture = keys.family()?;
        if keys.integer("expert_count")?.is_some_and(|n| n > 0) {
            return Err(ModelError::Unsupported {
                what: format!("{}: a mixture of experts", gguf.path.display()),
            });
        }
        if stored == "glm4" && gguf.has(&keys.key("rope.dimension_sections")) {
            return Err(ModelError::Unsupported {
                what: format!(
                    "{}: GGUF architecture 'glm4' of a model of text and images, whose Q and K \
                     have another order of rows",
                    gguf.path.display()
                ),
            });
        }

        let (width, heads) = (
            keys.required("embedding_length")?,
            keys.required("attention.head_count")?,
        );
        let rotated = keys.integer("rope.dimension_count")?;
        let is_partial = matches!(architecture, Architecture::Phi3 | Architecture::Glm4);
        let head_dim = match keys
            .integer("attention.key_length")?
            .or(rotated.filter(|_| !is_partial))
        {
            Some(d) => d,
            None if heads > 0 => width / heads,
            None => return Err(gguf.invalid(&keys.key("attention.head_count"), "is 0")),
        };
        for (key, what) in [
            ("rope.dimension_count", "rotate"),
            ("attention.value_length", "be as long as"),
        ] {
            if key == "rope.dimension_count" && is_partial {
                continue;
            }
            if keys.integer(key)?.is_some_and(|n| n != head_dim) {
                return Err(gguf.invalid(
                    &keys.key(key),
                    format!(
                        "must {what} the whole key of {head_dim}; other values are not implemented"
                    ),
                ));
            }
        }
        let embedding = gguf_embedding();
        let embedding = gguf
            .tensor(&embedding)
            .ok_or_else(|| missing(gguf, &embedding))?;
        let has = |name: &str| gguf.tensor(name).is_some();
        let context = keys.required("context_length")?;
        let blocks = keys.required("block_count")?;

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
        config.insert("num_hidden_layers".into(), json!(blocks));
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
        let shape = Shape {
            context,
            blocks,
            head_dim,
            rotated: rotated.filter(|_| is_partial).unwrap_or(head_dim),
        };
        if let Some(scaling) = scaling(&keys, &shape, theta)? {
            config.insert("rope_scaling".into(), scaling);
        }
        keys.fields_of_family(architecture, &shape, &mut config)?;
        Self::from_hf_value(Value::Object(config), &gguf.path)
    }

    /// Names of the tensors that [`ModelConfig::from_gguf`] reads.
    pub(crate) const GGUF_ROPE_TENSORS: [&str; 3] = [ROPE_FREQS, SHORT_FACTORS, LONG_FACTORS];
}

/// Sizes that several fields depend on.
struct Shape {
    context: u64,
    blocks: u64,
    head_dim: u64,
    /// Number of dimensions of each head that are rotated.
    rotated: u64,
}

/// Returns the ids of the tokens at which generation stops, in the form of `eos_token_id` in a
/// config.json.
///
/// The first id is the tokenizer's `eos_token`, which ends a text. Llama 3 and Phi-3 end an
/// assistant's turn with another token. An export must list that one, too, or generation would not
/// stop after the answer. Many files have no metadata key for it, so it is also looked up in the
/// chat template.
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

    /// Returns the values of an f32 tensor, if the file has it.
    fn values(&self, tensor: &str) -> Result<Option<Vec<f32>>, ModelError> {
        let entry = self.gguf.tensor(tensor);
        entry.map(|entry| self.gguf.read_f32(entry)).transpose()
    }

    /// Returns the family of the model.
    fn family(&self) -> Result<Architecture, ModelError> {
        let name = self
            .gguf
            .string("general.name")?
            .unwrap_or_default()
            .to_lowercase();
        let is_set = |suffix: &str| Ok::<_, ModelError>(self.number(suffix)?.unwrap_or(0.0) != 0.0);
        Ok(match self.architecture {
            "llama" if name.contains("mistral") => Architecture::Mistral,
            "llama" => Architecture::Llama,
            "qwen2" | "qwen2vl" => Architecture::Qwen2,
            "qwen3" | "qwen3vl" => Architecture::Qwen3,
            "gemma2" => Architecture::Gemma2,
            "gemma3" => Architecture::Gemma3,
            "phi3" => Architecture::Phi3,
            "glm4" => Architecture::Glm4,
            "smollm3" => Architecture::SmolLm3,
            "granite" => Architecture::Granite,
            "olmo2" if is_set("attention.sliding_window")? => Architecture::Olmo3,
            "olmo2" => Architecture::Olmo2,
            "mistral3" if is_set("attention.temperature_scale")? => Architecture::Ministral3,
            "mistral3" => Architecture::Mistral,
            other => {
                let what = format!(
                    "{}: GGUF architecture '{other}'{}",
                    self.gguf.path.display(),
                    refusal(other, SUPPORTED)
                );
                return Err(ModelError::Unsupported { what });
            }
        })
    }

    /// Adds the fields that only some families have.
    fn fields_of_family(
        &self,
        architecture: Architecture,
        shape: &Shape,
        config: &mut Map<String, Value>,
    ) -> Result<(), ModelError> {
        match architecture {
            Architecture::Llama
            | Architecture::Mistral
            | Architecture::Qwen2
            | Architecture::Qwen3
            | Architecture::SmolLm3
            | Architecture::Olmo2
            | Architecture::Ministral => {}
            Architecture::Gemma2 | Architecture::Gemma3 => {
                config.insert("hidden_activation".into(), json!("gelu_pytorch_tanh"));
                let is_27b = GEMMA_27B_BLOCKS.contains(&(architecture, shape.blocks));
                let heads = self.required("attention.head_count")?.max(1);
                let scalar = match is_27b {
                    true => self.required("embedding_length")? / heads,
                    false => shape.head_dim,
                };
                config.insert("query_pre_attn_scalar".into(), json!(scalar));
                for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
                    if let Some(cap) = self.number(field)? {
                        config.insert(field.into(), json!(shortest(cap)));
                    }
                }
                if architecture == Architecture::Gemma3 {
                    let slides = |layer: u64| !(layer + 1).is_multiple_of(6);
                    self.insert_layers(shape, 10_000.0, slides, config)?;
                } else if !self.gguf.has(&self.key("attention.sliding_window")) {
                    // The default of the family applies.
                    config.remove("sliding_window");
                }
            }
            Architecture::Olmo3 => {
                let theta = self.number("rope.freq_base")?.unwrap_or(10_000.0);
                let slides = |layer: u64| !(layer + 1).is_multiple_of(4);
                self.insert_layers(shape, theta, slides, config)?;
            }
            Architecture::Phi3 | Architecture::Glm4 => {
                if shape.rotated == 0 || shape.rotated > shape.head_dim {
                    return Err(self.gguf.invalid(
                        &self.key("rope.dimension_count"),
                        format!(
                            "is {}; must be from 1 to the {} of a key",
                            shape.rotated, shape.head_dim
                        ),
                    ));
                }
                let factor = rotary_factor(shape.rotated, shape.head_dim);
                config.insert("partial_rotary_factor".into(), json!(factor));
                if architecture == Architecture::Phi3 {
                    let original = self
                        .integer("rope.scaling.original_context_length")?
                        .unwrap_or(shape.context);
                    config.insert("original_max_position_embeddings".into(), json!(original));
                }
            }
            Architecture::Granite => {
                let default = (shape.head_dim as f64).powf(-0.5);
                for (field, suffix, default) in [
                    ("attention_multiplier", "attention.scale", default),
                    ("embedding_multiplier", "embedding_scale", 1.0),
                    ("residual_multiplier", "residual_scale", 1.0),
                    ("logits_scaling", "logit_scale", 1.0),
                ] {
                    // In llama.cpp 0 means that there is no factor.
                    let stored = self.number(suffix)?.filter(|factor| *factor != 0.0);
                    config.insert(field.into(), json!(stored.map_or(default, shortest)));
                }
            }
            Architecture::Ministral3 => {
                let key = "attention.temperature_scale";
                let beta = self.number(key)?.unwrap_or_default();
                match config
                    .get_mut("rope_scaling")
                    .and_then(Value::as_object_mut)
                {
                    Some(scaling) => {
                        scaling.insert("llama_4_scaling_beta".into(), json!(shortest(beta)));
                    }
                    None => {
                        return Err(self.gguf.invalid(
                            &self.key(key),
                            "is implemented only together with rope.scaling.type 'yarn'",
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds `layer_types` and `rope_parameters` of a model whose layers with a window have their
    /// own rotary frequencies. Only the other layers have a context extension. `slides` returns
    /// true for the layers with a window, if the file does not say which these are; `local` is
    /// their θ, if the file does not say it.
    fn insert_layers(
        &self,
        shape: &Shape,
        local: f64,
        slides: impl Fn(u64) -> bool,
        config: &mut Map<String, Value>,
    ) -> Result<(), ModelError> {
        if shape.blocks > self.gguf.tensors().count() as u64 {
            let reason = format!("is {}; the file has fewer tensors", shape.blocks);
            return Err(self.gguf.invalid(&self.key("block_count"), reason));
        }
        let pattern = self.key("attention.sliding_window_pattern");
        // It is one truth value for each layer, or a period.
        let stored = match self.gguf.flags(&pattern) {
            Ok(flags) => flags.map(<[bool]>::to_vec),
            Err(_) => {
                let period = self.gguf.integer(&pattern)?.unwrap_or_default();
                let layers = 0..shape.blocks;
                Some(
                    layers
                        .map(|layer| !(layer + 1).is_multiple_of(period))
                        .collect(),
                )
            }
        };
        let has_window = config.get("sliding_window").is_some_and(|w| !w.is_null());
        let slides = stored.unwrap_or_else(|| (0..shape.blocks).map(slides).collect());
        let types = slides.iter().map(|slides| match *slides && has_window {
            true => "sliding_attention",
            false => "full_attention",
        });
        config.insert("layer_types".into(), types.collect());
        let mut full = match config.remove("rope_scaling") {
            Some(Value::Object(scaling)) => scaling,
            _ => Map::from_iter([("rope_type".to_owned(), json!("default"))]),
        };
        if let Some(theta) = config.remove("rope_theta") {
            full.insert("rope_theta".into(), theta);
        }
        let local = shortest(self.number("rope.freq_base_swa")?.unwrap_or(local));
        config.insert(
            "rope_parameters".into(),
            json!({
                "full_attention": full,
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            }),
        );
        Ok(())
    }
}

/// Returns a factor that transformers and this crate turn into `rotated` of `head_dim` dimensions.
/// Both truncate the product.
fn rotary_factor(rotated: u64, head_dim: u64) -> f64 {
    let exact = rotated as f64 / head_dim as f64;
    match (head_dim as f64 * exact) as u64 == rotated {
        true => exact,
        false => (rotated as f64 + 0.5) / head_dim as f64,
    }
}

/// Returns `rope_scaling` for the config.json, if the file has any.
fn scaling(
    keys: &MetadataKeys<'_>,
    shape: &Shape,
    theta: f64,
) -> Result<Option<Value>, ModelError> {
    let factor = keys
        .number("rope.scaling.factor")?
        .or(keys.number("rope.scale_linear")?);
    let own_factor = keys.number("rope.scaling.attn_factor")?;
    if let (Some(short), Some(long)) = (keys.values(SHORT_FACTORS)?, keys.values(LONG_FACTORS)?) {
        let numbers = |values: &[f32]| -> Vec<f64> {
            values.iter().map(|x| shortest(f64::from(*x))).collect()
        };
        let mut scaling = json!({
            "rope_type": "longrope",
            "type": "longrope",
            "short_factor": numbers(&short),
            "long_factor": numbers(&long),
        });
        if let Some(factor) = own_factor {
            scaling["attention_factor"] = json!(shortest(factor));
        }
        return Ok(Some(scaling));
    }
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
                .unwrap_or(shape.context);
            let mut scaling = json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            });
            for (field, suffix) in [
                ("beta_fast", "rope.scaling.yarn_beta_fast"),
                ("beta_slow", "rope.scaling.yarn_beta_slow"),
                ("attention_factor", "rope.scaling.yarn_attn_factor"),
                ("mscale_all_dim", "rope.scaling.yarn_log_multiplier"),
            ] {
                if let Some(value) = keys.number(suffix)? {
                    scaling[field] = json!(shortest(value));
                }
            }
            // Older files of OLMo 3 have the attention factor under this key. In those of other
            // models the key holds a further factor.
            if let Some(factor) = own_factor.filter(|factor| *factor != 1.0) {
                if keys.architecture != "olmo2" {
                    return Err(keys.gguf.invalid(
                        &keys.key("rope.scaling.attn_factor"),
                        "is implemented only for olmo2 and for longrope; must be 1",
                    ));
                }
                scaling["attention_factor"] = json!(shortest(factor));
            }
            // llama.cpp's converter writes only `mscale_all_dim`, and `mscale` is then 1.
            if !scaling["mscale_all_dim"].is_null() {
                scaling["mscale"] = json!(1.0);
            }
            return Ok(Some(scaling));
        }
        Some(other) => {
            return Err(keys.gguf.invalid(
                &keys.key("rope.scaling.type"),
                format!("'{other}' is not implemented; supported: none, linear, yarn"),
            ));
        }
    }
    let Some(freqs) = keys.values(ROPE_FREQS)? else {
        return Ok(None);
    };
    let refused = || {
        let reason = "the divisors are not those of Llama 3 (low 1, high 4, original context 8192)";
        keys.gguf.invalid(ROPE_FREQS, reason)
    };
    // Checked before frequencies are computed, because the file may claim a head of any size.
    if freqs.len() as u64 != shape.head_dim / 2 {
        return Err(refused());
    }
    let head_dim = shape.head_dim as usize;
    // The largest divisor is the scaling factor. The ramp must then reproduce all other divisors.
    let factor = f64::from(freqs.iter().copied().fold(1.0, f32::max));
    let (low_freq_factor, high_freq_factor, original_max_position_embeddings) = LLAMA3_RAMP;
    let scaled = RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings,
    };
    let plain = RopeConfig::new(theta).inv_freq(head_dim).0;
    let scaled = RopeConfig {
        scaling: scaled,
        ..RopeConfig::new(theta)
    }
    .inv_freq(head_dim)
    .0;
    let same = plain
        .iter()
        .zip(&scaled)
        .zip(&freqs)
        .all(|((p, s), f)| (p / f / s - 1.0).abs() < 1e-3);
    if !same {
        return Err(refused());
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
