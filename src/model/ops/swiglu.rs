//! SwiGLU: y = silu(gate) ⊙ up (arXiv:2002.05202).

use rayon::prelude::*;

use super::TOKENS;
use super::simd::{dispatch, sigmoid};

/// y `[T, F]` from `[gate | up]` `[T, 2F]`.
pub fn swiglu(gate_up: &[f32], width: usize, y: &mut [f32]) {
    y.par_chunks_mut(width).zip(gate_up.par_chunks(2 * width)).with_min_len(TOKENS).for_each(|(y, row)| {
        let (gate, up) = row.split_at(width);
        dispatch(
            #[inline(always)]
            || {
                for ((y, a), b) in y.iter_mut().zip(gate).zip(up) {
                    *y = a * sigmoid(*a) * b;
                }
            },
        )
    });
}

/// Replaces `[gate | up]` by its gradient for the upstream gradient `g` `[T, F]`. With s = σ(gate): d_up = g·gate·s,
/// d_gate = g·up·s·(1 + gate·(1 − s)).
pub fn swiglu_backward(gate_up: &mut [f32], width: usize, g: &[f32]) {
    gate_up.par_chunks_mut(2 * width).zip(g.par_chunks(width)).with_min_len(TOKENS).for_each(|(row, g)| {
        let (gate, up) = row.split_at_mut(width);
        dispatch(
            #[inline(always)]
            || {
                for ((a, b), g) in gate.iter_mut().zip(up).zip(g) {
                    let s = sigmoid(*a);
                    (*a, *b) = (g * *b * s * (1.0 + *a * (1.0 - s)), g * *a * s);
                }
            },
        )
    });
}
