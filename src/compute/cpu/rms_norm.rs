//! RMSNorm: y = x / √(mean(x²) + ε) ⊙ w, over the last dimension (arXiv:1910.07467).

use super::gemm::{Kernel, Operand};
use super::simd::{dispatch, sum};
use super::thread_pool;

/// Returns 1 / √(mean(x²) + ε).
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn normalise(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let r = inverse_rms(x, eps);
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = x * r * w;
    }
}

/// Computes y = RMSNorm of each row of `x` `[N, C]`; `w` is `[C]`.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let width = w.len();
    let rows = thread_pool::rows_per_task(y.len() / width);
    thread_pool::chunks(y, rows * width, |i, y| {
        for (y, x) in y.chunks_mut(width).zip(x[i * rows * width..].chunks(width)) {
            dispatch(
                #[inline(always)]
                || normalise(x, w, eps, y),
            );
        }
    });
}

/// Computes the RMSNorm of each row of `x` `[N, C]` as an operand; `w` is `[C]`.
pub fn rms_norm_operand(kernel: Kernel, x: &[f32], w: &[f32], eps: f32) -> Operand<'static> {
    let width = w.len();
    Operand::computed(kernel, x.len() / width, width, |i, y| {
        dispatch(
            #[inline(always)]
            || normalise(&x[i * width..][..width], w, eps, y),
        );
    })
}

/// Adds the gradient of the input. With r = 1/rms: dx += r·(g⊙w − x·r²·mean(g⊙w⊙x)).
#[inline(always)]
fn add_input_gradient(x: &[f32], w: &[f32], g: &[f32], eps: f32, dx: &mut [f32]) {
    let r = inverse_rms(x, eps);
    let c = sum(w.len(), |i| g[i] * w[i] * x[i]) * r * r / w.len() as f32;
    for (((dx, g), w), x) in dx.iter_mut().zip(g).zip(w).zip(x) {
        *dx += r * (g * w - x * c);
    }
}

/// Adds the gradient of the weight: dw += g⊙x·r.
#[inline(always)]
fn add_weight_gradient(x: &[f32], g: &[f32], eps: f32, dw: &mut [f32]) {
    let r = inverse_rms(x, eps);
    for ((dw, g), x) in dw.iter_mut().zip(g).zip(x) {
        *dw += g * x * r;
    }
}

/// Adds the gradients for the upstream gradient `g` `[N, C]` to `dx` `[N, C]` and, if given, to
/// `dw` `[C]`.
pub fn rms_norm_backward(
    x: &[f32],
    w: &[f32],
    g: &[f32],
    eps: f32,
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) {
    let width = w.len();
    let rows = thread_pool::rows_per_task(dx.len() / width);
    thread_pool::chunks(dx, rows * width, |i, dx| {
        let from = i * rows * width;
        for ((dx, x), g) in dx
            .chunks_mut(width)
            .zip(x[from..].chunks(width))
            .zip(g[from..].chunks(width))
        {
            dispatch(
                #[inline(always)]
                || add_input_gradient(x, w, g, eps, dx),
            );
        }
    });
    if let Some(dw) = dw {
        for (x, g) in x.chunks(width).zip(g.chunks(width)) {
            dispatch(
                #[inline(always)]
                || add_weight_gradient(x, g, eps, dw),
            );
        }
    }
}

/// Columns of a matrix that hold heads: `count` heads side by side from column `offset` on.
#[derive(Clone, Copy, Debug)]
pub struct HeadColumns {
    /// Width of the matrix in elements.
    pub stride: usize,
    /// First column of the first head.
    pub offset: usize,
    /// Number of heads.
    pub count: usize,
}

/// Applies RMSNorm to every head in place. `w` is `[D]`, and its length is the width of a head. If
/// all heads are normed as one (OLMo 2), they count as a single head of H·D elements.
pub fn head_norm(x: &mut [f32], heads: HeadColumns, w: &[f32], eps: f32) {
    let width = heads.count * w.len();
    thread_pool::chunks(x, heads.stride, |_, row| {
        for head in row[heads.offset..heads.offset + width].chunks_mut(w.len()) {
            dispatch(
                #[inline(always)]
                || {
                    let r = inverse_rms(head, eps);
                    for (x, w) in head.iter_mut().zip(w) {
                        *x = *x * r * w;
                    }
                },
            );
        }
    });
}

/// Replaces the upstream gradient `g` by the gradient of [`head_norm`]'s input `x`. Adds the
/// gradient of the weight to `dw`, if given.
pub fn head_norm_backward(
    x: &[f32],
    g: &mut [f32],
    heads: HeadColumns,
    w: &[f32],
    eps: f32,
    mut dw: Option<&mut [f32]>,
) {
    let columns = heads.offset..heads.offset + heads.count * w.len();
    if let Some(dw) = &mut dw {
        for (x, g) in x.chunks(heads.stride).zip(g.chunks(heads.stride)) {
            for (x, g) in x[columns.clone()]
                .chunks(w.len())
                .zip(g[columns.clone()].chunks(w.len()))
            {
                dispatch(
                    #[inline(always)]
                    || add_weight_gradient(x, g, eps, dw),
                );
            }
        }
    }
    thread_pool::chunks(g, heads.stride, |t, g| {
        let x = &x[t * heads.stride..];
        let mut dx = vec![0f32; w.len()];
        for (g, x) in g[columns.clone()]
            .chunks_mut(w.len())
            .zip(x[columns.clone()].chunks(w.len()))
        {
            dispatch(
                #[inline(always)]
                || {
                    dx.fill(0.0);
                    add_input_gradient(x, w, g, eps, &mut dx);
                },
            );
            g.copy_from_slice(&dx);
        }
    });
}
