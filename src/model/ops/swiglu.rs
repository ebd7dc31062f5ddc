//! SwiGLU: y = silu(gate) ⊙ up (arXiv:2002.05202).

use half::bf16;

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

#[inline(always)]
fn widened(x: bf16) -> f32 {
    f32::from_bits((x.to_bits() as u32) << 16)
}

/// In a loop of its own: with fewer slices in a loop the compiler is sure to make vectors of it.
#[inline(always)]
fn widen(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = widened(*from);
    }
}

/// What [`swiglu`] gives, and `[gate | up]` rounded to bf16: half the memory until the backward pass. For kernels that round.
pub fn swiglu_kept(kernel: Kernel, gate_up: &[f32], width: usize) -> [Operand<'static>; 2] {
    Operand::computed_pair(kernel, gate_up.len() / (2 * width), [width, 2 * width], |i, y, kept| {
        let row = &gate_up[2 * i * width..][..2 * width];
        let (gate, up) = row.split_at(width);
        dispatch(
            #[inline(always)]
            || {
                for ((y, a), b) in y.iter_mut().zip(gate).zip(up) {
                    *y = a * sigmoid(*a) * b;
                }
            },
        );
        kept.copy_from_slice(row);
    })
}

/// y again, from what [`swiglu_kept`] kept.
pub fn swiglu_again(kept: &Operand, width: usize) -> Operand<'static> {
    Operand::computed(kept.kernel(), kept.rows(), width, |i, y| {
        let (gate, up) = kept.bf16_row(i).split_at(width);
        dispatch(
            #[inline(always)]
            || {
                widen(gate, y);
                for (y, b) in y.iter_mut().zip(up) {
                    *y = *y * sigmoid(*y) * widened(*b);
                }
            },
        )
    })
}

/// The gradients of gate and of up as [`swiglu_backward`] gives them, from what was kept, to be multiplied.
pub fn swiglu_gradients(kept: &Operand, width: usize, g: &[f32]) -> [Operand<'static>; 2] {
    Operand::computed_pair(kept.kernel(), kept.rows(), [width, width], |i, gate, up| {
        let (kept_gate, kept_up) = kept.bf16_row(i).split_at(width);
        let g = &g[i * width..][..width];
        dispatch(
            #[inline(always)]
            || {
                widen(kept_gate, gate);
                widen(kept_up, up);
                for ((a, b), g) in gate.iter_mut().zip(up).zip(g) {
                    let s = sigmoid(*a);
                    (*a, *b) = (g * *b * s * (1.0 + *a * (1.0 - s)), g * *a * s);
                }
            },
        )
    })
}
