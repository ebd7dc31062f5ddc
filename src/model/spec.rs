//! A decoder as plain data: a family of models is other values of these types, not other code.
//!
//! An enum with one variant is a place for the next one. Code takes such an enum apart with a
//! pattern that cannot fail today, so that a new variant does not compile until every use of it has
//! been decided.

use serde_json::{Value, json};

use super::rope::RopeConfig;
use crate::compute::cpu::attention::Heads;
pub use crate::compute::cpu::swiglu::Activation;
use crate::domain::training::Precision;

/// A decoder: an embedding, blocks, a last RMSNorm and a head. V is `vocab_size`, C `hidden_size`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// V.
    pub vocab_size: usize,
    /// C.
    pub hidden_size: usize,
    /// Positions the model was made for.
    pub max_position_embeddings: usize,
    /// ε of every RMSNorm.
    pub rms_norm_eps: f64,
    /// What the embedded tokens are multiplied by, before it is rounded to the precision of the
    /// embedding.
    pub embedding_scale: f32,
    /// Whether every RMSNorm multiplies by 1 + w instead of w.
    pub norms_add_one: bool,
    /// Rotary frequencies; a block names those that it has by their place here.
    pub ropes: Vec<RopeConfig>,
    /// Whether the head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// The decoder blocks in order; at least one.
    pub blocks: Vec<BlockSpec>,
}

/// One decoder block: a mixer (what lets tokens see each other), then a feed-forward part, each
/// added to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockSpec {
    /// The first part.
    pub mixer: Mixer,
    /// The RMSNorms around it.
    pub mixer_norms: Norms,
    /// The second part.
    pub feed_forward: FeedForward,
    /// The RMSNorms around it.
    pub feed_forward_norms: Norms,
}

/// What lets the tokens of a row see each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention.
    Attention(AttentionSpec),
}

/// Grouped-query attention with rotary embeddings. H is `heads`, K `kv_heads`, D `head_dim`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// H.
    pub heads: usize,
    /// K; divides H.
    pub kv_heads: usize,
    /// D; even. Not always C / H.
    pub head_dim: usize,
    /// What the products of queries and keys are multiplied by.
    pub scale: f32,
    /// Which of [`ModelSpec::ropes`] rotates queries and keys.
    pub rope: usize,
    /// A token sees itself and at most `window − 1` tokens before it; `None` means all before it.
    pub window: Option<usize>,
    /// Norms on queries and keys.
    pub qk_norm: QkNorm,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on the output projection.
    pub output_bias: bool,
}

/// RMSNorms on queries and keys, before the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    Absent,
    /// Over the D numbers of each head, with one weight `[D]` for all query heads and one for all
    /// key heads.
    PerHead,
}

/// The part of a block that treats each token by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedForward {
    /// down(activation(gate(x)) ⊙ up(x)).
    Gated {
        /// F, the outputs of gate and of up.
        width: usize,
        /// What is applied to the gate.
        activation: Activation,
        /// Biases on gate, up and down.
        bias: bool,
    },
}

/// Where a part of a block has an RMSNorm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// On its input.
    Pre,
}

impl ModelSpec {
    /// Returns D of the widest attention head, which is how many numbers of each head are rotated.
    pub fn head_dim(&self) -> usize {
        let of = |block: &BlockSpec| block.attention().head_dim;
        self.blocks.iter().map(of).max().unwrap_or(0)
    }

    /// Returns what sets the model apart from others of the same sizes, windows, norms on queries
    /// and keys, biases and first frequencies: part of its identity, and empty for the families of
    /// the Llama layout. The blocks differ in their frequencies only.
    pub fn distinctions(&self) -> Vec<Value> {
        let mut found = Vec::new();
        let Some(block) = self.blocks.first() else { return found };
        let attention = block.attention();
        match block.feed_forward {
            FeedForward::Gated { activation: Activation::Silu, .. } => {}
            FeedForward::Gated { activation: Activation::GeluTanh, .. } => {
                found.push(json!(["activation", "gelu_tanh"]))
            }
        }
        if attention.scale != 1.0 / (attention.head_dim as f32).sqrt() {
            found.push(json!(["attention_scale", attention.scale.to_bits()]));
        }
        if self.norms_add_one {
            found.push(json!(["norms_add_one", true]));
        }
        if self.embedding_scale != 1.0 {
            found.push(json!(["embedding_scale", self.embedding_scale.to_bits()]));
        }
        if self.ropes.len() > 1 {
            let ropes: Vec<(Vec<u32>, u32)> =
                self.ropes[1..].iter().map(|rope| rope.bits(self.head_dim())).collect();
            let of_blocks: Vec<usize> =
                self.blocks.iter().map(|block| block.attention().rope).collect();
            found.push(json!(["other_ropes", ropes, of_blocks]));
        }
        found
    }

    /// Returns what the embedded tokens are multiplied by in passes of a precision, as transformers
    /// rounds it.
    pub fn embedding_scale_in(&self, precision: Precision) -> f32 {
        match precision {
            Precision::F32 => self.embedding_scale,
            Precision::Bf16 => half::bf16::from_f32(self.embedding_scale).to_f32(),
        }
    }
}

impl BlockSpec {
    /// Returns the block's attention.
    pub fn attention(&self) -> &AttentionSpec {
        let Mixer::Attention(attention) = &self.mixer;
        attention
    }

    /// Returns how many matrices as wide as the residual stream a tape holds: both parts' inputs.
    pub fn saved_streams(&self) -> usize {
        2
    }

    /// Returns how many such matrices a backward pass holds at one time: the gradient of the
    /// residual stream.
    pub fn gradient_streams(&self) -> usize {
        1
    }

    /// Returns how many such matrices a forward pass holds at one time: the residual stream and the
    /// operand of a part.
    pub fn forward_streams(&self) -> usize {
        2
    }
}

impl AttentionSpec {
    /// Returns the heads as the kernels take them.
    pub fn as_heads(&self) -> Heads {
        let AttentionSpec { heads: query, kv_heads: key, head_dim: dim, window, scale, .. } = *self;
        Heads { query, key, dim, window, scale }
    }

    /// Returns H·D, the width of the queries and of attention's output.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns K·D, the width of the keys and of the values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}
