//! The shape of a decoder block: what the sizes of its buffers follow from, on every device.

use super::spec::{Activation, BlockSpec, FeedForward, Mixer, Norms, QkNorm};
use crate::compute::cpu::attention::Heads;

/// Shape of a decoder block. Sizes are elements per token of the row.
#[derive(Clone, Copy, Debug)]
pub struct BlockShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward part.
    pub feed_forward: usize,
    /// Attention heads.
    pub heads: Heads,
    /// Whether queries and keys are normed, so that the tape holds them before the norm, too.
    pub qk_norm: bool,
}

impl BlockShape {
    /// Returns the shape of a block of a model whose residual stream is `hidden` wide.
    pub fn of(hidden: usize, block: &BlockSpec) -> Self {
        let BlockSpec {
            mixer: Mixer::Attention(attention),
            mixer_norms: Norms::Pre,
            feed_forward:
                FeedForward::Gated { width: feed_forward, activation: Activation::Silu, bias: _ },
            feed_forward_norms: Norms::Pre,
        } = *block;
        let qk_norm = match attention.qk_norm {
            QkNorm::Absent => false,
            QkNorm::PerHead => true,
        };
        let heads = Heads {
            query: attention.heads,
            key: attention.kv_heads,
            dim: attention.head_dim,
            window: attention.window,
        };
        BlockShape { hidden, feed_forward, heads, qk_norm }
    }
}
