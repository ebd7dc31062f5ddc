//! SwiGLU: y = silu(gate) ⊙ up (arXiv:2002.05202).

use super::gemm::{Kernel, Operand};
use super::simd::{dispatch, sigmoid};
use super::team;

/// y `[T, F]` from `[gate | up]` `[T, 2F]`, to be multiplied.
pub fn swiglu(kernel: Kernel, gate_up: &[f32], width: usize) -> Operand<'static> {
    Operand::computed(kernel, gate_up.len() / (2 * width), width, |i, y| {
        let (gate, up) = gate_up[2 * i * width..][..2 * width].split_at(width);
        dispatch(
            #[inline(always)]
            || {
                for ((y, a), b) in y.iter_mut().zip(gate).zip(up) {
                    *y = a * sigmoid(*a) * b;
                }
            },
        )
    })
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
