//! RMSNorm: y = x / √(mean(x²) + ε) ⊙ w, over the last dimension (arXiv:1910.07467).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::simd::{dispatch, sum};
use super::{slice, tensor, with_values};

const OP: &str = "rms-norm";

struct RmsNorm {
    eps: f32,
}

/// 1 / √(mean(x²) + ε).
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (slice(OP, x, lx)?, slice(OP, w, lw)?);
        let width = w.len();
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(16).for_each(|(y, x)| {
            dispatch(
                #[inline(always)]
                || {
                    let r = inverse_rms(x, self.eps);
                    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                        *y = x * r * w;
                    }
                },
            )
        });
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    /// With r = 1/rms: dx = r·(g⊙w − x·r²·mean(g⊙w⊙x)), dw = Σ_rows g⊙x·r.
    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let width = w.dims1()?;
        let (need_x, need_w) = (x.track_op(), w.track_op());
        let (dx, dw) = with_values(OP, x, |x| {
            with_values(OP, w, |w| {
                with_values(OP, g, |g| {
                    let dx = need_x.then(|| grad_input(x, w, g, width, self.eps));
                    let dw = need_w.then(|| grad_weight(x, g, width, self.eps));
                    (dx, dw)
                })
            })
        })???;
        let dx = dx.map(|d| tensor(d, x.shape().clone())).transpose()?;
        Ok((dx, dw.map(|d| tensor(d, width)).transpose()?))
    }
}

fn grad_input(x: &[f32], w: &[f32], g: &[f32], width: usize, eps: f32) -> Vec<f32> {
    let mut dx = vec![0f32; x.len()];
    dx.par_chunks_mut(width).zip(x.par_chunks(width)).zip(g.par_chunks(width)).with_min_len(16).for_each(|((dx, x), g)| {
        dispatch(
            #[inline(always)]
            || {
                let r = inverse_rms(x, eps);
                let c = sum(width, |i| g[i] * w[i] * x[i]) * r * r / width as f32;
                for i in 0..width {
                    dx[i] = r * (g[i] * w[i] - x[i] * c);
                }
            },
        )
    });
    dx
}

fn grad_weight(x: &[f32], g: &[f32], width: usize, eps: f32) -> Vec<f32> {
    let mut dw = vec![0f32; width];
    for (x, g) in x.chunks(width).zip(g.chunks(width)) {
        dispatch(
            #[inline(always)]
            || {
                let r = inverse_rms(x, eps);
                for i in 0..width {
                    dw[i] += g[i] * x[i] * r;
                }
            },
        );
    }
    dw
}

/// RMSNorm of each row of `x` (last dimension = `w`'s length).
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op2(w, RmsNorm { eps: eps as f32 })
}
