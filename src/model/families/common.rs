//! Reads the fields of config.json that all families share.

use serde_json::Value;

use crate::model::config::json::Fields;
use crate::model::config::limits;
use crate::model::config::rope::{rope, rope_of};
use crate::model::error::ModelError;
use crate::model::rope::RopeConfig;
use crate::model::spec::{
    ActivationFunction, AttentionSpec, BlockSpec, FeedForward, Mixer, ModelSpec, NormNames, Norms,
    Projections, QkNorm,
};

/// Description of a family of models.
pub struct Family {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// The class of transformers that loads a model of the family.
    pub causal_lm_class: &'static str,
    /// True if llama.cpp interleaves the halves of each head in the rows of Q and K.
    pub is_interleaved_in_gguf: bool,
    /// Returns the defaults of the family's config class in transformers, as far as they differ
    /// from those of `Common::read`. Three fields that not every class has are used only if they
    /// are listed here: `hidden_activation` (in place of `hidden_act`), `mlp_bias`, and
    /// `partial_rotary_factor`, which is otherwise refused unless it is 1. If the field
    /// `original_max_position_embeddings` is listed, the rope types `su` and `yarn` mean
    /// `longrope`, as in Phi-3.
    pub defaults: fn() -> Value,
    /// Reads the model from the fields of config.json, to which `defaults` have been added.
    pub spec: fn(&Fields<'_>) -> Result<ModelSpec, ModelError>,
}

impl Family {
    /// Returns a family without the optional properties.
    pub(super) const fn new(
        model_type: &'static str,
        causal_lm_class: &'static str,
        defaults: fn() -> Value,
        spec: fn(&Fields<'_>) -> Result<ModelSpec, ModelError>,
    ) -> Self {
        Family {
            model_type,
            causal_lm_class,
            is_interleaved_in_gguf: false,
            defaults,
            spec,
        }
    }
}

/// The fields that all families have. Families use some of them differently.
pub(super) struct Common {
    /// Number of decoder blocks.
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
    activation: ActivationFunction,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope: RopeConfig,
    tie_word_embeddings: bool,
}

impl Common {
    /// Reads and checks the fields.
    ///
    /// # Errors
    /// Returns [`ModelError::InvalidConfig`] for a field that is missing or invalid.
    pub fn read(fields: &Fields<'_>) -> Result<Self, ModelError> {
        let activation = activation(fields)?;
        let hidden_size = fields.size("hidden_size", limits::WIDTH)?;
        let num_layers = fields.size("num_hidden_layers", limits::LAYERS)?;
        let heads = fields.size("num_attention_heads", limits::HEADS)?;
        // In every family null means the number of query heads.
        let kv_heads = fields
            .optional_size("num_key_value_heads", limits::HEADS)?
            .unwrap_or(heads);
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
            return Err(fields.invalid(
                "rms_norm_eps",
                format!("is {rms_norm_eps}; must be between 0 and 1"),
            ));
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
            rope: rope(fields, max_position_embeddings, head_dim)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            mlp_bias: fields.has_default("mlp_bias") && fields.flag("mlp_bias")?.unwrap_or(false),
            window: fields.optional_size("sliding_window", limits::POSITIONS)?,
        })
    }

    /// Returns attention without a window, without biases and without norms on queries and keys.
    pub fn attention(&self) -> AttentionSpec {
        AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            softcap: None,
            rope: Some(0),
            window: None,
            qk_norm: QkNorm::Absent,
            qkv_bias: false,
            output_bias: false,
            projections: Projections::Separate,
        }
    }

    /// Returns a block with this attention and a gated feed-forward part, each with a norm before
    /// it.
    pub fn block(&self, attention: AttentionSpec) -> BlockSpec {
        BlockSpec {
            mixer: Mixer::Attention(attention),
            mixer_norms: Norms::Pre,
            feed_forward: FeedForward::Gated {
                width: self.intermediate_size,
                activation: self.activation,
                bias: self.mlp_bias,
                projections: Projections::Separate,
            },
            feed_forward_norms: Norms::Pre,
            norm_names: NormNames::Gemma,
            output_factor: 1.0,
        }
    }

    /// Returns the model with these blocks.
    pub fn model(self, blocks: Vec<BlockSpec>) -> ModelSpec {
        ModelSpec {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            max_position_embeddings: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps,
            embedding_scale: 1.0,
            rounds_embedding_scale: false,
            norms_add_one: false,
            ropes: vec![self.rope],
            tie_word_embeddings: self.tie_word_embeddings,
            logit_factor: 1.0,
            logit_softcap: None,
            blocks,
        }
    }
}

fn activation(fields: &Fields<'_>) -> Result<ActivationFunction, ModelError> {
    // Config classes that have `hidden_activation` ignore `hidden_act`.
    let has_long_name = fields.has_default("hidden_activation");
    let field = if has_long_name {
        "hidden_activation"
    } else {
        "hidden_act"
    };
    match fields.string(field)?.unwrap_or("silu") {
        "silu" | "swish" => Ok(ActivationFunction::Silu),
        "gelu_pytorch_tanh" => Ok(ActivationFunction::GeluTanh),
        other => Err(fields.invalid(
            field,
            format!("'{other}' is not implemented; supported: silu, gelu_pytorch_tanh"),
        )),
    }
}

/// Reads `head_dim`. The default is that of the config class, else hidden_size / heads.
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

/// Returns the sliding window of each layer, determined as in the Qwen classes of transformers.
pub(super) fn windows_of_layers(
    fields: &Fields<'_>,
    common: &Common,
) -> Result<Vec<Option<usize>>, ModelError> {
    let num_layers = common.num_layers;
    let is_used = fields.flag("use_sliding_window")?.unwrap_or(false);
    let window = common.window.filter(|_| is_used);
    if let Some(slides) = sliding_layers(fields, num_layers)? {
        return Ok(slides
            .into_iter()
            .map(|slides| window.filter(|_| slides))
            .collect());
    }
    let first = fields.integer("max_window_layers")?.unwrap_or(28);
    Ok((0..num_layers as u64)
        .map(|layer| window.filter(|_| layer >= first))
        .collect())
}

/// Reads `layer_types`: for each layer, true if it has a sliding window. Returns `None` if the
/// field is absent.
pub(super) fn sliding_layers(
    fields: &Fields<'_>,
    num_layers: usize,
) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(types) = fields.strings("layer_types")? else {
        return Ok(None);
    };
    if types.len() != num_layers {
        return Err(fields.invalid(
            "layer_types",
            format!(
                "lists {} layers, num_hidden_layers is {num_layers}",
                types.len()
            ),
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

/// Reads the frequencies of the layers without a window, then of those with one. transformers 4
/// stores them in separate fields, and scales only those of the layers without a window;
/// transformers 5 has one object per type of layer. `thetas` apply where an object has no
/// `rope_theta`.
pub(super) fn ropes_of_layer_types(
    fields: &Fields<'_>,
    thetas: [f64; 2],
    max_position_embeddings: usize,
) -> Result<Vec<RopeConfig>, ModelError> {
    let parameters = fields.object("rope_parameters")?;
    let of = |layers: &str, theta: f64| {
        let nested = parameters
            .as_ref()
            .map(|types| types.object(layers))
            .transpose()?
            .flatten();
        rope_of(fields, nested, theta, max_position_embeddings)
    };
    let [global, local] = thetas;
    let global = match fields.object("rope_scaling")? {
        Some(scaling) => rope_of(fields, Some(scaling), global, max_position_embeddings)?,
        None => of("full_attention", global)?,
    };
    Ok(vec![global, of("sliding_attention", local)?])
}
