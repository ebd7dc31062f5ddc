//! What the decoder needs to know of a model, read from config.json or from GGUF metadata.

mod gguf;
mod json;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use self::json::Fields;
use super::error::ModelError;
use super::rope::{RopeConfig, RopeScaling};

/// Model families with the Llama layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2 and 3.x, SmolLM2.
    Llama,
    /// Mistral: a sliding window on every layer.
    Mistral,
    /// Qwen2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMSNorm on each head's q and k.
    Qwen3,
}

/// One decoder of the Llama family. C is `hidden_size`, D `head_dim`, V `vocab_size`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// V.
    pub vocab_size: usize,
    /// C.
    pub hidden_size: usize,
    /// Width of the SwiGLU block.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// D; even. Not always C / heads.
    pub head_dim: usize,
    /// Positions the model was made for.
    pub max_position_embeddings: usize,
    /// ε of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary frequencies.
    pub rope: RopeConfig,
    /// Whether the head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// RMSNorm over D on q and k before the rotation.
    pub qk_norm: bool,
    /// Per layer: a token sees itself and at most `window − 1` tokens before it.
    pub sliding_window: Vec<Option<usize>>,
    /// Starts a sequence.
    pub bos_token_id: Option<u32>,
    /// Any of them ends one.
    pub eos_token_ids: Vec<u32>,
    /// A config.json that transformers loads, for merged export.
    pub hf_json: Value,
}

/// Above these a header is taken for garbage: no allocation or product over configured sizes can overflow.
mod limits {
    pub const LAYERS: usize = 4096;
    pub const HEADS: usize = 4096;
    pub const HEAD_DIM: usize = 4096;
    pub const WIDTH: usize = 1 << 20;
    pub const VOCAB: usize = 1 << 24;
    pub const POSITIONS: usize = 1 << 31;
}

impl Architecture {
    /// As config.json's `model_type` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
        }
    }

    /// The family that `model_type` names.
    pub fn from_model_type(name: &str) -> Option<Self> {
        [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3].into_iter().find(|a| a.as_str() == name)
    }

    /// The class that transformers loads it with.
    fn causal_lm_class(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Mistral => "MistralForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

impl ModelConfig {
    /// What the model computes, as a text that is the same however its configuration file is written. It is part of what jobs are pinned to: a field that
    /// is added later must be left out where it has no effect, or every older job is refused.
    pub fn canonical(&self) -> String {
        let (frequencies, attention_factor) = self.rope.inv_freq(self.head_dim);
        let bits: Vec<u32> = frequencies.iter().map(|f| f.to_bits()).collect();
        let windows: Vec<usize> = self.sliding_window.iter().map(|w| w.unwrap_or(0)).collect();
        json!([
            ["architecture", self.architecture.as_str()],
            ["vocab_size", self.vocab_size],
            ["hidden_size", self.hidden_size],
            ["intermediate_size", self.intermediate_size],
            ["num_layers", self.num_layers],
            ["num_heads", self.num_heads],
            ["num_kv_heads", self.num_kv_heads],
            ["head_dim", self.head_dim],
            ["rms_norm_eps", self.rms_norm_eps],
            ["rope_frequencies", bits],
            ["rope_factor", attention_factor.to_bits()],
            ["tie_word_embeddings", self.tie_word_embeddings],
            ["biases", [self.qkv_bias, self.o_bias, self.mlp_bias]],
            ["qk_norm", self.qk_norm],
            ["sliding_window", windows],
        ])
        .to_string()
    }

    /// Reads a config.json, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`). `path` is for messages.
    /// Absent optional fields get the defaults of transformers' config classes.
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`] names the field; [`ModelError::Unsupported`] an architecture or variant that is not implemented.
    pub fn from_hf_json(text: &str, path: &Path) -> Result<Self, ModelError> {
        let json: Value = serde_json::from_str(text).map_err(|e| invalid(path, "(whole file)", format!("not JSON: {e}")))?;
        Self::from_hf_value(json, path)
    }

    fn from_hf_value(json: Value, path: &Path) -> Result<Self, ModelError> {
        let fields = Fields::new(&json, path)?;
        let architecture = architecture(&fields)?;
        if !fields.is_null("quantization_config") {
            let what = format!(
                "{}: a quantised checkpoint (field 'quantization_config'); use the unquantised weights or a GGUF file",
                path.display()
            );
            return Err(ModelError::Unsupported { what });
        }
        match fields.string("hidden_act")?.unwrap_or("silu") {
            "silu" | "swish" => {}
            other => return Err(fields.invalid("hidden_act", format!("'{other}' is not implemented; supported: silu"))),
        }

        let hidden_size = fields.size("hidden_size", limits::WIDTH)?;
        let num_layers = fields.size("num_hidden_layers", limits::LAYERS)?;
        let num_heads = fields.size("num_attention_heads", limits::HEADS)?;
        let num_kv_heads = match (fields.optional_size("num_key_value_heads", limits::HEADS)?, architecture) {
            (Some(n), _) => n,
            (None, Architecture::Mistral) if !fields.has("num_key_value_heads") => 8,
            (None, Architecture::Qwen2 | Architecture::Qwen3) if !fields.has("num_key_value_heads") => 32,
            (None, _) => num_heads,
        };
        if num_heads % num_kv_heads != 0 {
            return Err(fields.invalid("num_key_value_heads", format!("{num_kv_heads} does not divide num_attention_heads, {num_heads}")));
        }
        let head_dim = match fields.optional_size("head_dim", limits::HEAD_DIM)? {
            Some(n) => n,
            None if architecture == Architecture::Qwen3 => 128,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                return Err(fields.invalid(
                    "num_attention_heads",
                    format!("{num_heads} does not divide hidden_size, {hidden_size}, and head_dim is absent"),
                ));
            }
        };
        if head_dim % 2 != 0 || head_dim > limits::HEAD_DIM {
            return Err(
                fields.invalid("head_dim", format!("is {head_dim}; rotary embedding needs an even number of at most {}", limits::HEAD_DIM))
            );
        }
        let max_position_embeddings = fields.optional_size("max_position_embeddings", limits::POSITIONS)?.unwrap_or(match architecture {
            Architecture::Llama => 2048,
            Architecture::Mistral => 131_072,
            Architecture::Qwen2 | Architecture::Qwen3 => 32_768,
        });
        let rms_norm_eps = fields.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return Err(fields.invalid("rms_norm_eps", format!("is {rms_norm_eps}; must lie between 0 and 1")));
        }
        let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
        let (qkv_bias, o_bias) = match architecture {
            Architecture::Llama | Architecture::Qwen3 => (attention_bias, attention_bias),
            Architecture::Mistral => (false, false),
            Architecture::Qwen2 => (true, false),
        };

        let config = ModelConfig {
            architecture,
            vocab_size: fields.size("vocab_size", limits::VOCAB)?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", limits::WIDTH)?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position_embeddings,
            rms_norm_eps,
            rope: rope(&fields, max_position_embeddings)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias,
            o_bias,
            mlp_bias: architecture == Architecture::Llama && fields.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: architecture == Architecture::Qwen3,
            sliding_window: sliding_window(&fields, architecture, num_layers)?,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id")?,
            hf_json: Value::Null,
        };
        Ok(ModelConfig { hf_json: json, ..config })
    }

    /// Every parameter by its Hugging Face name, with its shape (`[out, in]` for projections); `lm_head` only if untied.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (c, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, c])];
        for layer in 0..self.num_layers {
            let mut push = |name: &str, shape: &[usize]| shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            push("input_layernorm.weight", &[c]);
            for (name, out, input, bias) in
                [("q", q, c, self.qkv_bias), ("k", kv, c, self.qkv_bias), ("v", kv, c, self.qkv_bias), ("o", c, q, self.o_bias)]
            {
                push(&format!("self_attn.{name}_proj.weight"), &[out, input]);
                if bias {
                    push(&format!("self_attn.{name}_proj.bias"), &[out]);
                }
            }
            if self.qk_norm {
                push("self_attn.q_norm.weight", &[self.head_dim]);
                push("self_attn.k_norm.weight", &[self.head_dim]);
            }
            push("post_attention_layernorm.weight", &[c]);
            for (name, out, input) in [("gate", f, c), ("up", f, c), ("down", c, f)] {
                push(&format!("mlp.{name}_proj.weight"), &[out, input]);
                if self.mlp_bias {
                    push(&format!("mlp.{name}_proj.bias"), &[out]);
                }
            }
        }
        shapes.push(("model.norm.weight".to_owned(), vec![c]));
        if !self.tie_word_embeddings {
            shapes.push(("lm_head.weight".to_owned(), vec![self.vocab_size, c]));
        }
        shapes
    }

    /// Parameters, tied ones once.
    pub fn parameter_count(&self) -> usize {
        self.tensor_shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

/// [`ModelError::InvalidConfig`] about a field of `path`.
fn invalid(path: &Path, field: &str, reason: impl Into<String>) -> ModelError {
    ModelError::InvalidConfig { path: PathBuf::from(path), field: field.to_owned(), reason: reason.into() }
}

fn architecture(fields: &Fields<'_>) -> Result<Architecture, ModelError> {
    let name = fields.string("model_type")?.ok_or_else(|| fields.invalid("model_type", "is missing; is this a model's config.json?"))?;
    Architecture::from_model_type(name).ok_or_else(|| ModelError::Unsupported {
        what: format!("{}: architecture '{name}' (supported: llama, mistral, qwen2, qwen3)", fields.path().display()),
    })
}

/// Which layers have a window, as the four transformers classes decide it.
fn sliding_window(fields: &Fields<'_>, architecture: Architecture, num_layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
    let window = match fields.optional_size("sliding_window", limits::POSITIONS)? {
        None if !fields.has("sliding_window") => Some(4096),
        other => other,
    };
    match architecture {
        Architecture::Llama => Ok(vec![None; num_layers]),
        Architecture::Mistral => Ok(vec![window; num_layers]),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let window = window.filter(|_| matches!(fields.flag("use_sliding_window"), Ok(Some(true))));
            if let Some(types) = fields.strings("layer_types")? {
                if types.len() != num_layers {
                    return Err(fields.invalid("layer_types", format!("lists {} layers, num_hidden_layers is {num_layers}", types.len())));
                }
                return types
                    .iter()
                    .map(|t| match *t {
                        "full_attention" => Ok(None),
                        "sliding_attention" => Ok(window),
                        other => Err(fields.invalid("layer_types", format!("'{other}'; supported: full_attention, sliding_attention"))),
                    })
                    .collect();
            }
            let first = fields.integer("max_window_layers")?.unwrap_or(28);
            Ok((0..num_layers as u64).map(|layer| window.filter(|_| layer >= first)).collect())
        }
    }
}

fn rope(fields: &Fields<'_>, max_position_embeddings: usize) -> Result<RopeConfig, ModelError> {
    // transformers lets `rope_scaling`, the older name, win when both are there.
    let key = if fields.is_null("rope_scaling") { "rope_parameters" } else { "rope_scaling" };
    let nested = fields.object(key)?;
    let theta = match nested.as_ref().map(|n| n.number("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => fields.number("rope_theta")?.unwrap_or(10_000.0),
    };
    if !(theta > 1.0 && theta.is_finite()) {
        return Err(fields.invalid("rope_theta", format!("is {theta}; must be a number above 1")));
    }
    for f in [Some(fields), nested.as_ref()].into_iter().flatten() {
        if f.number("partial_rotary_factor")?.is_some_and(|p| p != 1.0) {
            return Err(f.invalid("partial_rotary_factor", "partial rotation is not implemented; must be 1"));
        }
    }
    let Some(rope) = nested else { return Ok(RopeConfig { theta, scaling: RopeScaling::None }) };

    let kind = match rope.string("rope_type")? {
        Some(kind) => kind,
        None => rope.string("type")?.unwrap_or("default"),
    };
    let factor = |name: &str| {
        let value = rope.number(name)?.ok_or_else(|| rope.invalid(name, format!("is missing; rope type '{kind}' needs it")))?;
        if value > 0.0 && value.is_finite() { Ok(value) } else { Err(rope.invalid(name, format!("is {value}; must be above 0"))) }
    };
    let original = || -> Result<usize, ModelError> {
        let name = "original_max_position_embeddings";
        match fields.optional_size(name, limits::POSITIONS)? {
            Some(outside) => Ok(outside),
            None => Ok(rope.optional_size(name, limits::POSITIONS)?.unwrap_or(max_position_embeddings)),
        }
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor("factor")? },
        "llama3" => {
            let (low_freq_factor, high_freq_factor) = (factor("low_freq_factor")?, factor("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                return Err(
                    rope.invalid("high_freq_factor", format!("is {high_freq_factor}; must exceed low_freq_factor, {low_freq_factor}"))
                );
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
            // A null factor means the ratio of the two contexts.
            let factor = if rope.is_null("factor") { max_position_embeddings as f64 / original as f64 } else { factor("factor")? };
            let or = |name: &str, default: f64| Ok::<_, ModelError>(rope.number(name)?.filter(|v| *v != 0.0).unwrap_or(default));
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
        other => return Err(rope.invalid("rope_type", format!("'{other}' is not implemented; supported: default, linear, llama3, yarn"))),
    };
    Ok(RopeConfig { theta, scaling })
}
