//! Sizes of the buffers that a pass allocates on a GPU, and their sums.
//!
//! The passes take the widths of their buffers from this file, and `train/estimate.rs` estimates
//! the memory of a run from the same widths, so that the two stay consistent. This file is also
//! compiled without the feature `cuda`, so that every build computes the same estimate.

pub use crate::model::block_shape::BlockShape;

/// Bytes of an f32.
const F32: usize = 4;

/// Number of vocabulary columns in a tile of logits. The head holds one tile at a time. It is wide
/// enough for a GEMM that uses every multiprocessor.
pub const HEAD_TILE: usize = 8192;

impl BlockShape {
    /// Returns the width of `[q | k | v]` and of its gradient, in elements per token.
    pub fn qkv(&self) -> usize {
        self.heads.row()
    }

    /// Returns the width of attention's output, in elements per token.
    pub fn attended(&self) -> usize {
        self.heads.width()
    }

    /// Returns the number of attention's log-sum-exps (f32) per token.
    pub fn log_sum_exps(&self) -> usize {
        self.heads.query
    }

    /// Returns the width of `[gate | up]`, in elements per token.
    pub fn gate_up(&self) -> usize {
        2 * self.feed_forward
    }

    /// Returns the number of elements (f32) per token in the partial gradients of keys and values.
    /// On tensor cores each query head writes its own, and those of the heads that share a key head
    /// are summed afterwards. Returns 0 if no heads share keys.
    pub fn key_gradient_parts(&self) -> usize {
        if self.heads.query > self.heads.key {
            2 * self.heads.width()
        } else {
            0
        }
    }

    /// Returns the bytes per token of a block's tape. `element` is the number of bytes of an
    /// element of matrices and activations, `ranks` the sum of the adapter's ranks on the block.
    pub fn tape_bytes(&self, element: usize, ranks: usize) -> usize {
        let before_norm = if self.qk_norm { self.qkv() } else { 0 };
        let residual = self.saved_streams * self.hidden;
        F32 * (residual + self.log_sum_exps())
            + element * (self.qkv() + before_norm + self.attended() + self.gate_up() + ranks)
    }

    /// Returns the bytes per token of a block's input. Nothing else is saved if blocks are
    /// recomputed.
    pub fn input_bytes(&self) -> usize {
        F32 * self.hidden
    }

    /// Returns the peak bytes per token of a block's backward pass, without the tape.
    pub fn backward_bytes(&self, element: usize) -> usize {
        let feed_forward = self.gate_up() + 2 * self.hidden;
        let attention = 3 * self.qkv() + 2 * self.attended();
        // Partial gradients exist only on tensor cores, whose operands are narrower than f32.
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

/// Returns the bytes on the GPU per trained parameter element: its gradient (f32) and its value
/// (`element` bytes). Master weights and the optimizer's moments stay on the host.
pub fn trained_bytes(element: usize) -> usize {
    F32 + element
}

/// Returns the number of elements in a tile of logits of `rows` predictors.
pub fn head_tile(rows: usize) -> usize {
    rows * HEAD_TILE
}

/// Returns the bytes per predictor that the head takes: a tile of logits and one of probabilities,
/// the hidden states before and after the last norm, and their gradients.
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
            heads: Heads {
                query,
                key,
                dim,
                window: None,
                scale: 0.125,
                softcap: None,
            },
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
        assert_eq!(
            small.tape_bytes(4, 112),
            4 * (2 * 576 + 9) + 4 * (960 + 576 + 3072 + 112)
        );
        assert_eq!(small.tape_bytes(2, 112), 14_084);
        assert_eq!(
            BlockShape {
                qk_norm: true,
                ..small
            }
            .tape_bytes(4, 112),
            27_364
        );
        assert_eq!(small.input_bytes(), 2304);
        assert_eq!(
            (small.backward_bytes(4), small.backward_bytes(2)),
            (19_200, 10_752)
        );
        // With many query heads per key head, the partial gradients dominate.
        let shared = shape(64, 64, [8, 1, 64]);
        assert_eq!(
            (
                shared.key_gradient_parts(),
                shared.backward_bytes(2),
                shared.backward_bytes(4)
            ),
            (1024, 6688, 12_032)
        );
        let unshared = shape(64, 64, [8, 8, 64]);
        assert_eq!(
            (unshared.key_gradient_parts(), unshared.backward_bytes(2)),
            (0, 11_520)
        );
        assert_eq!((head_bytes(576, 4), head_bytes(576, 2)), (74_752, 58_368));
        assert_eq!((trained_bytes(4), trained_bytes(2)), (8, 6));
    }
}
