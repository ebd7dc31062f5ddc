//! Memory of the passes on the CPU, as sums of the memory that the operations state for themselves.
//!
//! `train/estimate.rs` estimates the memory of a run with these functions. Sizes are in f32 values.

use crate::compute::cpu::attention;
use crate::compute::cpu::swiglu::{self, SavedGateUp};
use crate::model::block_shape::BlockShape;

/// Returns the values per token of a block's tape. `ranks` is the sum of the adapter's ranks on the
/// block.
pub fn tape_floats(block: &BlockShape, gate_up: SavedGateUp, ranks: usize) -> usize {
    let before_norm = if block.qk_norm { block.heads.row() } else { 0 };
    let residual = block.saved_streams * block.hidden;
    residual
        + before_norm
        + attention::tape_floats(&block.heads)
        + gate_up.floats(block.feed_forward)
        + ranks
}

/// Returns the values per token of a block's input. Nothing else is saved if blocks are recomputed.
pub fn input_floats(block: &BlockShape) -> usize {
    block.hidden
}

/// Returns the peak values per token of a block's backward pass, without the tape. Besides the
/// values of the operations it counts the gradients of the residual stream and the operands.
pub fn backward_floats(block: &BlockShape, gate_up: SavedGateUp) -> usize {
    let feed_forward = swiglu::backward_floats(block.feed_forward, gate_up) + 4 * block.hidden;
    let attention = attention::backward_floats(&block.heads) + 2 * block.hidden;
    // One gradient of the stream is already counted with the operands above.
    feed_forward.max(attention) + (block.gradient_streams - 1) * block.hidden
}

/// Returns the peak values per token of a block's forward pass that saves nothing: the matrices as
/// wide as the residual stream, and the values of the largest operation.
pub fn forward_floats(block: &BlockShape) -> usize {
    block.forward_streams * block.hidden
        + swiglu::forward_floats(block.feed_forward).max(attention::forward_floats(&block.heads))
}

/// Returns the values per predictor that the head takes: the hidden states before and after the
/// last norm, and their gradients. A row has one predictor per completion token.
pub fn head_floats(hidden: usize) -> usize {
    4 * hidden
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::cpu::attention::Heads;

    #[test]
    fn a_block_takes_what_its_operations_take_together() {
        let heads = Heads {
            query: 9,
            key: 3,
            dim: 64,
            window: None,
            scale: 0.125,
            softcap: None,
        };
        let block = BlockShape {
            hidden: 576,
            feed_forward: 1536,
            heads,
            qk_norm: false,
            saved_streams: 2,
            gradient_streams: 1,
            forward_streams: 2,
        };
        let (normed, narrow) = (
            BlockShape {
                qk_norm: true,
                ..block
            },
            BlockShape {
                feed_forward: 64,
                ..block
            },
        );
        // Two residuals; [q | k | v], output, log-sum-exps; [gate | up]; x·Aᵀ.
        assert_eq!(
            tape_floats(&block, SavedGateUp::F32, 112),
            2 * 576 + (960 + 576 + 9) + 3072 + 112
        );
        assert_eq!(tape_floats(&block, SavedGateUp::Bf16, 112), 4345);
        assert_eq!(tape_floats(&normed, SavedGateUp::F32, 112), 6841);
        assert_eq!((input_floats(&block), head_floats(576)), (576, 2304));
        // In the first case the feed-forward part is larger, in the narrow block attention.
        assert_eq!(
            (
                backward_floats(&block, SavedGateUp::F32),
                backward_floats(&block, SavedGateUp::Bf16)
            ),
            (5376, 5184)
        );
        assert_eq!(backward_floats(&narrow, SavedGateUp::F32), 5184);
        assert_eq!(
            (forward_floats(&block), forward_floats(&narrow)),
            (7296, 3648)
        );
    }
}
