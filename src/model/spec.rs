//! A decoder as plain data: a family of models is other values of these types, not other code.
//!
//! An enum with one variant is a place for the next one. Code takes such an enum apart with a
//! pattern that cannot fail today, so that a new variant does not compile until every use of it has
//! been decided.

use super::rope::RopeConfig;

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
    /// Rotary frequencies, the same in every block.
    pub rope: RopeConfig,
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

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·σ(x).
    Silu,
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
}

impl BlockSpec {
    /// Returns the block's attention.
    pub fn attention(&self) -> &AttentionSpec {
        let Mixer::Attention(attention) = &self.mixer;
        attention
    }
}

impl AttentionSpec {
    /// Returns H·D, the width of the queries and of attention's output.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns K·D, the width of the keys and of the values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}
