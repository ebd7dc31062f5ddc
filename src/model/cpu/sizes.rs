//! Sizes of what the passes hold on the CPU: sums of what their operations say of themselves.
//!
//! `train/estimate.rs` plans a run with them.

use crate::compute::cpu::attention;
use crate::compute::cpu::swiglu::{self, KeepGateUp};
use crate::model::block_shape::BlockShape;

/// Values per token that a block's tape holds, where the adapter's ranks on the block add up to
/// `ranks`.
pub fn tape_floats(block: &BlockShape, gate_up: KeepGateUp, ranks: usize) -> usize {
    let before_norm = if block.qk_norm { block.heads.row() } else { 0 };
    let residual = block.saved_streams * block.hidden;
    residual
        + before_norm
        + attention::tape_floats(&block.heads)
        + gate_up.floats(block.feed_forward)
        + ranks
}

/// Values per token of a block's input, which is all that is saved when blocks are recomputed.
pub fn input_floats(block: &BlockShape) -> usize {
    block.hidden
}

/// Values per token that a block's backward pass takes at its largest, besides the tape. Beside
/// those of the operations these are the residual stream's gradients and operands.
pub fn backward_floats(block: &BlockShape, gate_up: KeepGateUp) -> usize {
    let feed_forward = swiglu::backward_floats(block.feed_forward, gate_up) + 4 * block.hidden;
    let attention = attention::backward_floats(&block.heads) + 2 * block.hidden;
    // One gradient of the stream is counted with its operands.
    feed_forward.max(attention) + (block.gradient_streams - 1) * block.hidden
}

/// Values per token that a block takes at its largest where nothing is saved: what is as wide as
/// the residual stream, and what one of the operations needs.
pub fn forward_floats(block: &BlockShape) -> usize {
    block.forward_streams * block.hidden
        + swiglu::forward_floats(block.feed_forward).max(attention::forward_floats(&block.heads))
}

/// Values per predictor that the head takes, of which there is at most one for each token: the
/// hidden states before and after the last norm, and their gradients.
pub fn head_floats(hidden: usize) -> usize {
    4 * hidden
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::cpu::attention::Heads;

    #[test]
    fn a_block_takes_what_its_operations_take_together() {
        let heads = Heads { query: 9, key: 3, dim: 64, window: None, scale: 0.125 };
        let block = BlockShape {
            hidden: 576,
            feed_forward: 1536,
            heads,
            qk_norm: false,
            saved_streams: 2,
            gradient_streams: 1,
            forward_streams: 2,
        };
        let (normed, narrow) =
            (BlockShape { qk_norm: true, ..block }, BlockShape { feed_forward: 64, ..block });
        // Two residuals; [q | k | v], output, log-sum-exps; [gate | up]; x·Aᵀ.
        assert_eq!(
            tape_floats(&block, KeepGateUp::F32, 112),
            2 * 576 + (960 + 576 + 9) + 3072 + 112
        );
        assert_eq!(tape_floats(&block, KeepGateUp::Bf16, 112), 4345);
        assert_eq!(tape_floats(&normed, KeepGateUp::F32, 112), 6841);
        assert_eq!((input_floats(&block), head_floats(576)), (576, 2304));
        // The feed-forward part is the larger one, then attention.
        assert_eq!(
            (backward_floats(&block, KeepGateUp::F32), backward_floats(&block, KeepGateUp::Bf16)),
            (5376, 5184)
        );
        assert_eq!(backward_floats(&narrow, KeepGateUp::F32), 5184);
        assert_eq!((forward_floats(&block), forward_floats(&narrow)), (7296, 3648));
    }
}
