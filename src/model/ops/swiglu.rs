//! SwiGLU: y = silu(gate) ⊙ up (arXiv:2002.05202).

use super::simd::{dispatch, sigmoid};
use super::team;

/// y `[T, F]` from `[gate | up]` `[T, 2F]`.
pub fn swiglu(gate_up: &[f32], width: usize, y: &mut [f32]) {
    let rows = team::rows_per_task(y.len() / width);
    team::chunks(y, rows * width, |i, y| {
        let gate_up = &gate_up[i * rows * 2 * width..];
        dispatch(
            #[inline(always)]
            || {
                for (y, row) in y.chunks_mut(width).zip(gate_up.chunks(2 * width)) {
                    let (gate, up) = row.split_at(width);
                    for ((y, a), b) in y.iter_mut().zip(gate).zip(up) {
                        *y = a * sigmoid(*a) * b;
                    }
                }
            },
        )
    });
}

/// Replaces `[gate | up]` by its gradient for the upstream gradient `g` `[T, F]`. With s = σ(gate): d_up = g·gate·s,
/// d_gate = g·up·s·(1 + gate·(1 − s)).
pub fn swiglu_backward(gate_up: &mut [f32], width: usize, g: &[f32]) {
    let rows = team::rows_per_task(g.len() / width);
    team::chunks(gate_up, rows * 2 * width, |i, gate_up| {
        let g = &g[i * rows * width..];
        dispatch(
            #[inline(always)]
            || {
                for (row, g) in gate_up.chunks_mut(2 * width).zip(g.chunks(width)) {
                    let (gate, up) = row.split_at_mut(width);
                    for ((a, b), g) in gate.iter_mut().zip(up).zip(g) {
                        let s = sigmoid(*a);
                        (*a, *b) = (g * *b * s * (1.0 + *a * (1.0 - s)), g * *a * s);
                    }
                }
            },
        )
    });
}
