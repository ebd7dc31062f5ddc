//! The decoder's weights under their Hugging Face names.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;

use super::adapter::projection_shapes;
use super::config::ModelConfig;
use super::error::ModelError;
use super::ops::team;
use super::spec::{FeedForward, QkNorm};
use super::weights::Weights;
use crate::domain::training::Precision;

/// Tensors that are read at one time at most: each is in memory twice or three times while it is converted.
const READERS: usize = 8;

/// y = x·Wᵀ + b.
#[derive(Clone, Debug)]
pub struct Projection {
    /// W `[out, in]`.
    pub weight: Tensor,
    /// b `[out]`.
    pub bias: Option<Tensor>,
}

/// The seven projections of a block, in the order of [`crate::domain::training::TARGET_MODULES`].
pub const PROJECTIONS: [&str; 7] =
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];

/// Indices into [`PROJECTIONS`].
pub mod projection {
    /// Queries.
    pub const Q: usize = 0;
    /// Keys.
    pub const K: usize = 1;
    /// Values.
    pub const V: usize = 2;
    /// Attention output.
    pub const O: usize = 3;
    /// SwiGLU's gate.
    pub const GATE: usize = 4;
    /// SwiGLU's other factor.
    pub const UP: usize = 5;
    /// Feed-forward output.
    pub const DOWN: usize = 6;
}

/// One decoder block.
#[derive(Clone, Debug)]
pub struct Block {
    /// RMSNorm before attention, `[C]`.
    pub input_norm: Tensor,
    /// By [`projection`].
    pub projections: Vec<Projection>,
    /// RMSNorm over D on queries and on keys (Qwen3).
    pub qk_norm: Option<(Tensor, Tensor)>,
    /// RMSNorm before the feed-forward part, `[C]`.
    pub post_norm: Tensor,
}

/// All weights of a decoder.
#[derive(Clone, Debug)]
pub struct Parameters {
    /// `[V, C]`.
    pub embed: Tensor,
    /// In order.
    pub blocks: Vec<Block>,
    /// The last RMSNorm, `[C]`.
    pub norm: Tensor,
    /// `[V, C]`; `None` when tied to `embed`.
    pub head: Option<Tensor>,
}

impl Parameters {
    /// Loads every tensor the configuration calls for, shapes checked: matrices as `precision` says, norms and biases in f32. Several cores read and convert.
    pub fn load(config: &ModelConfig, weights: &Weights, precision: Precision) -> Result<Self, ModelError> {
        type Read = Option<Result<Tensor, ModelError>>;
        let failed = AtomicBool::new(false);
        let mut all: Vec<(String, Vec<usize>, Read)> =
            config.tensor_shapes().into_iter().map(|(name, shape)| (name, shape, None)).collect();
        let each = all.len().div_ceil(READERS);
        team::chunks(&mut all, each, |_, part| {
            for (name, shape, read) in part {
                if failed.load(Ordering::Relaxed) {
                    return;
                }
                let tensor = weights.load(name, shape, precision);
                failed.fetch_or(tensor.is_err(), Ordering::Relaxed);
                *read = Some(tensor);
            }
        });
        let mut loaded: HashMap<String, Read> = all.into_iter().map(|(name, _, read)| (name, read)).collect();
        Self::build(config, |name, shape| loaded.remove(name).flatten().unwrap_or_else(|| weights.load(name, shape, precision)))
    }

    /// Builds the structure from `get(name, shape)`.
    pub fn build<E>(config: &ModelConfig, mut get: impl FnMut(&str, &[usize]) -> Result<Tensor, E>) -> Result<Self, E> {
        let (c, v) = (config.spec.hidden_size, config.spec.vocab_size);
        let embed = get("model.embed_tokens.weight", &[v, c])?;
        let mut blocks = Vec::with_capacity(config.spec.blocks.len());
        for (i, block) in config.spec.blocks.iter().enumerate() {
            let (attention, shapes) = (block.attention(), projection_shapes(c, block));
            let FeedForward::Gated { bias: mlp_bias, .. } = block.feed_forward;
            let (d, qkv_bias) = (attention.head_dim, attention.qkv_bias);
            let biased = [qkv_bias, qkv_bias, qkv_bias, attention.output_bias, mlp_bias, mlp_bias, mlp_bias];
            let mut at = |name: &str, shape: &[usize]| get(&format!("model.layers.{i}.{name}"), shape);
            let mut projections = Vec::with_capacity(PROJECTIONS.len());
            for ((name, (out, input)), bias) in PROJECTIONS.iter().zip(shapes).zip(biased) {
                projections.push(Projection {
                    weight: at(&format!("{name}.weight"), &[out, input])?,
                    bias: if bias { Some(at(&format!("{name}.bias"), &[out])?) } else { None },
                });
            }
            blocks.push(Block {
                input_norm: at("input_layernorm.weight", &[c])?,
                projections,
                qk_norm: match attention.qk_norm {
                    QkNorm::PerHead => Some((at("self_attn.q_norm.weight", &[d])?, at("self_attn.k_norm.weight", &[d])?)),
                    QkNorm::Absent => None,
                },
                post_norm: at("post_attention_layernorm.weight", &[c])?,
            });
        }
        let norm = get("model.norm.weight", &[c])?;
        let head = if config.spec.tie_word_embeddings { None } else { Some(get("lm_head.weight", &[v, c])?) };
        Ok(Parameters { embed, blocks, norm, head })
    }

    /// The head `[V, C]`.
    pub fn head(&self) -> &Tensor {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// The same structure with every tensor replaced by `f(name, tensor)`, in a fixed order.
    pub fn map<E>(&self, mut f: impl FnMut(&str, &Tensor) -> Result<Tensor, E>) -> Result<Self, E> {
        let embed = f("model.embed_tokens.weight", &self.embed)?;
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (i, b) in self.blocks.iter().enumerate() {
            let mut at = |name: &str, t: &Tensor| f(&format!("model.layers.{i}.{name}"), t);
            let mut projections = Vec::with_capacity(b.projections.len());
            for (name, p) in PROJECTIONS.iter().zip(&b.projections) {
                projections.push(Projection {
                    weight: at(&format!("{name}.weight"), &p.weight)?,
                    bias: p.bias.as_ref().map(|t| at(&format!("{name}.bias"), t)).transpose()?,
                });
            }
            blocks.push(Block {
                input_norm: at("input_layernorm.weight", &b.input_norm)?,
                projections,
                qk_norm: match &b.qk_norm {
                    Some((q, k)) => Some((at("self_attn.q_norm.weight", q)?, at("self_attn.k_norm.weight", k)?)),
                    None => None,
                },
                post_norm: at("post_attention_layernorm.weight", &b.post_norm)?,
            });
        }
        let norm = f("model.norm.weight", &self.norm)?;
        let head = self.head.as_ref().map(|t| f("lm_head.weight", t)).transpose()?;
        Ok(Parameters { embed, blocks, norm, head })
    }

    /// Every tensor with its name, in the order of [`Parameters::map`].
    pub fn named(&self) -> Vec<(String, Tensor)> {
        let mut all = Vec::new();
        let copied: Result<Parameters, std::convert::Infallible> = self.map(|name, t| {
            all.push((name.to_owned(), t.clone()));
            Ok(t.clone())
        });
        match copied {
            Ok(_) => all,
            Err(never) => match never {},
        }
    }

    /// Returns a function that finds a tensor by its name.
    ///
    /// # Errors
    /// The function returns [`ModelError::MissingTensor`] for a name that is not there.
    pub fn reader(&self) -> impl Fn(&str, &[usize]) -> Result<Tensor, ModelError> {
        let tensors: HashMap<String, Tensor> = self.named().into_iter().collect();
        move |name, _| {
            let missing = || ModelError::MissingTensor { name: name.to_owned(), path: "memory".into() };
            tensors.get(name).cloned().ok_or_else(missing)
        }
    }

    /// The same storage, untracked: operations on it leave no tape.
    pub fn detached(&self) -> Self {
        let detached: Result<Parameters, std::convert::Infallible> = self.map(|_, t| Ok(t.detach()));
        match detached {
            Ok(p) => p,
            Err(never) => match never {},
        }
    }
}
