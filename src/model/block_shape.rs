//! The shape of a decoder block: what the sizes of its buffers follow from, on every device.

use super::spec::{BlockSpec, FeedForward, Mixer, QkNorm};
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
    /// Matrices as wide as the residual stream that the tape holds.
    pub saved_streams: usize,
    /// Such matrices that a backward pass holds at one time.
    pub gradient_streams: usize,
    /// Such matrices that a forward pass holds at one time.
    pub forward_streams: usize,
}

impl BlockShape {
    /// Returns the shape of a block of a model whose residual stream is `hidden` wide.
    pub fn of(hidden: usize, block: &BlockSpec) -> Self {
        let BlockSpec {
            mixer: Mixer::Attention(attention),
            mixer_norms: _,
            feed_forward: FeedForward::Gated { width: feed_forward, activation: _, bias: _ },
            feed_forward_norms: _,
        } = *block;
        let qk_norm = match attention.qk_norm {
            QkNorm::Absent => false,
            QkNorm::PerHead => true,
        };
        BlockShape {
            hidden,
            feed_forward,
            heads: attention.as_heads(),
            qk_norm,
            saved_streams: block.saved_streams(),
            gradient_streams: block.gradient_streams(),
            forward_streams: block.forward_streams(),
        }
    }
}
