//! What the families of the Llama layout read from the same fields of config.json.

use serde_json::Value;

use crate::model::config::json::Fields;
use crate::model::config::limits;
use crate::model::config::rope::rope;
use crate::model::error::ModelError;
use crate::model::rope::RopeConfig;
use crate::model::spec::{
    Activation, AttentionSpec, BlockSpec, FeedForward, Mixer, ModelSpec, Norms, QkNorm,
};

/// A family of models.
pub struct Family {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// The class that transformers loads it with.
    pub causal_lm_class: &'static str,
    /// `model_type` of models of text and images whose `text_config` is one of this family.
    pub text_in: Option<&'static str>,
    /// Whether llama.cpp stores the rows of Q and K with the halves of each head interleaved.
    pub is_interleaved_in_gguf: bool,
    /// Returns what the family's config class in transformers has where a field is absent, as far
    /// as that is not what `Common::read` takes. A field that only some classes have is read if it
    /// is here.
    pub defaults: fn() -> Value,
    /// Reads the model from config.json, with these defaults.
    pub spec: fn(&Fields<'_>) -> Result<ModelSpec, ModelError>,
}

impl Family {
    /// Returns a family that has nothing of what only some have.
    pub(super) const fn new(
        model_type: &'static str,
        causal_lm_class: &'static str,
        defaults: fn() -> Value,
        spec: fn(&Fields<'_>) -> Result<ModelSpec, ModelError>,
    ) -> Self {
        Family {
            model_type,
            causal_lm_class,
            text_in: None,
            is_interleaved_in_gguf: false,
            defaults,
            spec,
        }
    }
}

/// The fields that all families have. What they do with some of them differs.
pub(super) struct Common {
    /// Decoder blocks.
    pub num_layers: usize,
    /// `attention_bias`.
    pub attention_bias: bool,
    /// `sliding_window`.
    pub window: Option<usize>,
    hidden_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    intermediate_size: usize,
    mlp_bias: bool,
    activation: Activation,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope: RopeConfig,
    tie_word_embeddings: bool,
}

impl Common {
    /// Reads the fields.
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`] names the field.
    pub fn read(fields: &Fields<'_>) -> Result<Self, ModelError> {
        let activation = activation(fields)?;
        let hidden_size = fields.size("hidden_size", limits::WIDTH)?;
        let num_layers = fields.size("num_hidden_layers", limits::LAYERS)?;
        let heads = fields.size("num_attention_heads", limits::HEADS)?;
        // A null means the same in every family: as many as query heads.
        let kv_heads = fields.optional_size("num_key_value_heads", limits::HEADS)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(fields.invalid(
                "num_key_value_heads",
                format!("{kv_heads} does not divide num_attention_heads, {heads}"),
            ));
        }
        let head_dim = head_dim(fields, hidden_size, heads)?;
        let max_position_embeddings = fields
            .size_or_default("max_position_embeddings", limits::POSITIONS)?
            .ok_or_else(|| fields.invalid("max_position_embeddings", "is missing"))?;
        let rms_norm_eps = fields.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return Err(fields
                .invalid("rms_norm_eps", format!("is {rms_norm_eps}; must lie between 0 and 1")));
        }
        Ok(Common {
            num_layers,
            attention_bias: fields.flag("attention_bias")?.unwrap_or(false),
            hidden_size,
            heads,
            kv_heads,
            head_dim,
            activation,
            vocab_size: fields.size("vocab_size", limits::VOCAB)?,
            intermediate_size: fields.size("intermediate_size", limits::WIDTH)?,
            max_position_embeddings,
            rms_norm_eps,
            rope: rope(fields, max_position_embeddings)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            mlp_bias: fields.has_default("mlp_bias") && fields.flag("mlp_bias")?.unwrap_or(false),
            window: fields.optional_size("sliding_window", limits::POSITIONS)?,
        })
    }

    /// Returns attention over all tokens, without biases and without norms on queries and keys.
    pub fn attention(&self) -> AttentionSpec {
        AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            rope: 0,
            window: None,
            qk_norm: QkNorm::Absent,
            qkv_bias: false,
            output_bias: false,
        }
    }

    /// Returns a block of this attention and a gated feed-forward part, each behind a norm.
    pub fn block(&self, attention: AttentionSpec) -> BlockSpec {
        BlockSpec {
            mixer: Mixer::Attention(attention),
            mixer_norms: Norms::Pre,
            feed_forward: FeedForward::Gated {
                width: self.intermediate_size,
                activation: self.activation,
                bias: self.mlp_bias,
            },
            feed_forward_norms: Norms::Pre,
        }
    }

    /// Returns the model of these blocks.
    pub fn model(self, blocks: Vec<BlockSpec>) -> ModelSpec {
        ModelSpec {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            max_position_embeddings: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps,
            embedding_scale: 1.0,
            norms_add_one: false,
            ropes: vec![self.rope],
            tie_word_embeddings: self.tie_word_embeddings,
            blocks,
        }
    }
}

fn activation(fields: &Fields<'_>) -> Result<Activation, ModelError> {
    // The classes that have the longer name ignore the other one.
    let has_long_name = fields.has_default("hidden_activation");
    let field = if has_long_name { "hidden_activation" } else { "hidden_act" };
    match fields.string(field)?.unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => Err(fields.invalid(
            field,
            format!("'{other}' is not implemented; supported: silu, gelu_pytorch_tanh"),
        )),
    }
}

fn head_dim(fields: &Fields<'_>, hidden_size: usize, heads: usize) -> Result<usize, ModelError> {
    let head_dim = match fields.size_or_default("head_dim", limits::HEAD_DIM)? {
        Some(n) => n,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(fields.invalid(
                "num_attention_heads",
                format!(
                    "{heads} does not divide hidden_size, {hidden_size}, and head_dim is absent"
                ),
            ));
        }
    };
    if head_dim % 2 != 0 || head_dim > limits::HEAD_DIM {
        return Err(fields.invalid(
            "head_dim",
            format!(
                "is {head_dim}; rotary embedding needs an even number of at most {}",
                limits::HEAD_DIM
            ),
        ));
    }
    Ok(head_dim)
}

/// Reads which layers have the window, as transformers' Qwen classes decide it.
pub(super) fn windows_of_layers(
    fields: &Fields<'_>,
    common: &Common,
) -> Result<Vec<Option<usize>>, ModelError> {
    let num_layers = common.num_layers;
    let window =
        common.window.filter(|_| matches!(fields.flag("use_sliding_window"), Ok(Some(true))));
    if let Some(slides) = sliding_layers(fields, num_layers)? {
        return Ok(slides.into_iter().map(|slides| window.filter(|_| slides)).collect());
    }
    let first = fields.integer("max_window_layers")?.unwrap_or(28);
    Ok((0..num_layers as u64).map(|layer| window.filter(|_| layer >= first)).collect())
}

/// Reads from `layer_types` which layers have a window; `None` where the field is absent.
pub(super) fn sliding_layers(
    fields: &Fields<'_>,
    num_layers: usize,
) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(types) = fields.strings("layer_types")? else { return Ok(None) };
    if types.len() != num_layers {
        return Err(fields.invalid(
            "layer_types",
            format!("lists {} layers, num_hidden_layers is {num_layers}", types.len()),
        ));
    }
    let slides = |kind: &&str| match *kind {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(fields.invalid(
            "layer_types",
            format!("'{other}'; supported: full_attention, sliding_attention"),
        )),
    };
    types.iter().map(slides).collect::<Result<_, _>>().map(Some)
}
