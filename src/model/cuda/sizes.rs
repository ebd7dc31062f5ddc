//! Sizes of the buffers that a pass allocates on a GPU, and the memory they take together.
//!
//! The passes allocate with these functions, and `train/estimate.rs` plans a run with their sums,
//! so that the two cannot drift apart. This file is compiled without the feature `cuda`, too: the
//! estimate is the same arithmetic in every build.

pub use crate::model::block_shape::BlockShape;

/// Bytes of an f32.
const F32: usize = 4;

/// Columns of the vocabulary whose logits the head holds at a time: enough for a matrix
/// multiplication that uses every multiprocessor.
pub const HEAD_TILE: usize = 8192;

impl BlockShape {
    /// `[q | k | v]`, and their gradient.
    pub fn qkv(&self) -> usize {
        self.heads.row()
    }

    /// Output of attention.
    pub fn attended(&self) -> usize {
        self.heads.width()
    }

    /// Attention's log-sum-exps, in f32.
    pub fn log_sum_exps(&self) -> usize {
        self.heads.query
    }

    /// `[gate | up]`.
    pub fn gate_up(&self) -> usize {
        2 * self.feed_forward
    }

    /// Gradients of keys and values that each query head writes on tensor cores, in f32, to be
    /// summed over the heads that share them; 0 where no heads share.
    pub fn key_gradient_parts(&self) -> usize {
        if self.heads.query > self.heads.key { 2 * self.heads.width() } else { 0 }
    }

    /// Bytes per token that a block's tape holds, where matrices and activations have `element`
    /// bytes and the adapter's ranks on the block add up to `ranks`.
    pub fn tape_bytes(&self, element: usize, ranks: usize) -> usize {
        let before_norm = if self.qk_norm { self.qkv() } else { 0 };
        let residual = self.saved_streams * self.hidden;
        F32 * (residual + self.log_sum_exps())
            + element * (self.qkv() + before_norm + self.attended() + self.gate_up() + ranks)
    }

    /// Bytes per token of a block's input, which is all that is saved when blocks are recomputed.
    pub fn input_bytes(&self) -> usize {
        F32 * self.hidden
    }

    /// Bytes per token that a block's backward pass takes at its largest, besides the tape.
    pub fn backward_bytes(&self, element: usize) -> usize {
        let feed_forward = self.gate_up() + 2 * self.hidden;
        let attention = 3 * self.qkv() + 2 * self.attended();
        // Parts exist only on tensor cores, whose operands are narrower than f32.
        let parts = match self.key_gradient_parts() {
            parts if parts > 0 && element < F32 => {
                F32 * (parts + self.log_sum_exps()) + element * (self.qkv() + self.attended())
            }
            _ => 0,
        };
        F32 * self.gradient_streams * self.hidden
            + (element * feed_forward.max(attention)).max(parts)
    }
}

/// Bytes of each trained number on a GPU, whose matrices have `element` bytes: its gradient, and
/// the number itself. Masters and moments stay on the host.
pub fn trained_bytes(element: usize) -> usize {
    F32 + element
}

/// Elements of a tile of logits of `rows` predictors.
pub fn head_tile(rows: usize) -> usize {
    rows * HEAD_TILE
}

/// Bytes per predictor that the head takes: a tile of logits and one of probabilities, the hidden
/// states before and after the last norm, and their gradients.
pub fn head_bytes(hidden: usize, element: usize) -> usize {
    (F32 + element) * head_tile(1) + F32 * 4 * hidden
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::cpu::attention::Heads;

    fn shape(hidden: usize, feed_forward: usize, [query, key, dim]: [usize; 3]) -> BlockShape {
        BlockShape {
            hidden,
            feed_forward,
            heads: Heads { query, key, dim, window: None, scale: 0.125 },
            qk_norm: false,
            saved_streams: 2,
            gradient_streams: 1,
            forward_streams: 2,
        }
    }

    #[test]
    fn a_block_takes_what_its_buffers_take_together() {
        let small = shape(576, 1536, [9, 3, 64]);
        // f32: two residuals and 9 log-sum-exps; the others: [q | k | v], output, [gate | up],
        // x·Aᵀ.
        assert_eq!(small.tape_bytes(4, 112), 4 * (2 * 576 + 9) + 4 * (960 + 576 + 3072 + 112));
        assert_eq!(small.tape_bytes(2, 112), 14_084);
        assert_eq!(BlockShape { qk_norm: true, ..small }.tape_bytes(4, 112), 27_364);
        assert_eq!(small.input_bytes(), 2304);
        assert_eq!((small.backward_bytes(4), small.backward_bytes(2)), (19_200, 10_752));
        // With many heads that share keys, the parts of their gradients are the largest.
        let shared = shape(64, 64, [8, 1, 64]);
        assert_eq!(
            (shared.key_gradient_parts(), shared.backward_bytes(2), shared.backward_bytes(4)),
            (1024, 6688, 12_032)
        );
        let unshared = shape(64, 64, [8, 8, 64]);
        assert_eq!((unshared.key_gradient_parts(), unshared.backward_bytes(2)), (0, 11_520));
        assert_eq!((head_bytes(576, 4), head_bytes(576, 2)), (74_752, 58_368));
        assert_eq!((trained_bytes(4), trained_bytes(2)), (8, 6));
    }
}
