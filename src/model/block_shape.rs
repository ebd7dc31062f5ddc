//! The shape of a decoder block. Every device computes the sizes of its buffers from it.

use super::spec::{BlockSpec, FeedForward, Mixer, QkNorm};
use crate::compute::cpu::attention::Heads;

/// Shape of a decoder block. Widths are in elements per token of the row.
#[derive(Clone, Copy, Debug)]
pub struct BlockShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward part.
    pub feed_forward: usize,
    /// Attention heads.
    pub heads: Heads,
    /// True if queries and keys are normed. The tape then also holds them as they were before the
    /// norm.
    pub qk_norm: bool,
    /// Number of matrices as wide as the residual stream that the tape holds.
    pub saved_streams: usize,
    /// Number of such matrices that a backward pass holds at the same time.
    pub gradient_streams: usize,
    /// Number of such matrices that a forward pass holds at the same time.
    pub forward_streams: usize,
}

impl BlockShape {
    /// Returns the shape of `block` in a model with a residual stream of width `hidden`.
    pub fn of(hidden: usize, block: &BlockSpec) -> Self {
        let BlockSpec {
            mixer: Mixer::Attention(attention),
            mixer_norms: _,
            feed_forward:
                FeedForward::Gated {
                    width: feed_forward,
                    activation: _,
                    bias: _,
                    projections: _,
                },
            feed_forward_norms: _,
            norm_names: _,
            output_factor: _,
        } = *block;
        let qk_norm = match attention.qk_norm {
            QkNorm::Absent => false,
            QkNorm::PerHead | QkNorm::AllHeads => true,
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
