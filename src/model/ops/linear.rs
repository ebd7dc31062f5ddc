//! Linear projections: frozen, trainable, and frozen with a low-rank adapter.
//!
//! candle's own matmul forms the gradients of both operands; here a frozen weight costs none.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use super::gemm::{Threads, View, matmul};
use super::simd::add_assign;
use super::{slice, tensor, with_values};

/// y = x·Wᵀ + b with x `[T, in]`, W `[out, in]`, b `[out]`. Gradients go to whichever of the three is tracked.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        None => x.apply_op2(w, Linear),
        Some(b) => x.apply_op3(w, b, BiasedLinear),
    }
}

/// y = x·Wᵀ + b + scale·(x·Aᵀ)·Bᵀ with A `[r, in]`, B `[out, r]`; W and b are frozen (arXiv:2106.09685).
pub fn lora_linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    x.apply_op3(a, b, LoraLinear { w: w.detach(), bias: bias.map(Tensor::detach), scale: scale as f32 })
}

fn forward(x: &[f32], w: &[f32], bias: Option<&[f32]>, tokens: usize, input: usize, output: usize) -> Vec<f32> {
    let mut y = vec![0f32; tokens * output];
    if let Some(b) = bias {
        y.chunks_mut(output).for_each(|row| row.copy_from_slice(b));
    }
    matmul(tokens, input, output, &mut y, bias.is_some(), 1.0, View::rows(x, input), View::rows(w, input).t(), Threads::All);
    y
}

/// g·W.
fn grad_input(g: &[f32], w: &[f32], tokens: usize, input: usize, output: usize) -> Vec<f32> {
    let mut dx = vec![0f32; tokens * input];
    matmul(tokens, output, input, &mut dx, false, 1.0, View::rows(g, output), View::rows(w, input), Threads::All);
    dx
}

/// gᵀ·x.
fn grad_weight(g: &[f32], x: &[f32], tokens: usize, input: usize, output: usize) -> Vec<f32> {
    let mut dw = vec![0f32; output * input];
    matmul(output, tokens, input, &mut dw, false, 1.0, View::rows(g, output).t(), View::rows(x, input), Threads::All);
    dw
}

fn grads(x: &Tensor, w: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let ((tokens, input), (output, _)) = (x.dims2()?, w.dims2()?);
    with_values("linear", g, |g| {
        let dx = match x.track_op() {
            true => Some(tensor(with_values("linear", w, |w| grad_input(g, w, tokens, input, output))?, (tokens, input))?),
            false => None,
        };
        let dw = match w.track_op() {
            true => Some(tensor(with_values("linear", x, |x| grad_weight(g, x, tokens, input, output))?, (output, input))?),
            false => None,
        };
        Ok((dx, dw))
    })?
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((tokens, input), (output, _)) = (lx.shape().dims2()?, lw.shape().dims2()?);
        let y = forward(slice("linear", x, lx)?, slice("linear", w, lw)?, None, tokens, input, output);
        Ok((CpuStorage::F32(y), (tokens, output).into()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        grads(x, w, g)
    }
}

struct BiasedLinear;

impl CustomOp3 for BiasedLinear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((tokens, input), (output, _)) = (lx.shape().dims2()?, lw.shape().dims2()?);
        let bias = slice("linear", b, lb)?;
        let y = forward(slice("linear", x, lx)?, slice("linear", w, lw)?, Some(bias), tokens, input, output);
        Ok((CpuStorage::F32(y), (tokens, output).into()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, b: &Tensor, _y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = grads(x, w, g)?;
        let db = match b.track_op() {
            true => {
                let width = b.dims1()?;
                let mut db = vec![0f32; width];
                with_values("linear", g, |g| g.chunks(width).for_each(|row| add_assign(&mut db, row)))?;
                Some(tensor(db, width)?)
            }
            false => None,
        };
        Ok((dx, dw, db))
    }
}

struct LoraLinear {
    w: Tensor,
    bias: Option<Tensor>,
    scale: f32,
}

impl CustomOp3 for LoraLinear {
    fn name(&self) -> &'static str {
        "lora-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((tokens, input), (rank, _), (output, _)) = (lx.shape().dims2()?, la.shape().dims2()?, lb.shape().dims2()?);
        let (x, a, b) = (slice("lora-linear", x, lx)?, slice("lora-linear", a, la)?, slice("lora-linear", b, lb)?);
        let mut y = with_values("lora-linear", &self.w, |w| match &self.bias {
            None => Ok(forward(x, w, None, tokens, input, output)),
            Some(bias) => with_values("lora-linear", bias, |bias| forward(x, w, Some(bias), tokens, input, output)),
        })??;
        let u = forward(x, a, None, tokens, input, rank);
        matmul(tokens, rank, output, &mut y, true, self.scale, View::rows(&u, rank), View::rows(b, rank).t(), Threads::All);
        Ok((CpuStorage::F32(y), (tokens, output).into()))
    }

    /// With u = x·Aᵀ and v = scale·g·B: dx = g·W + v·A, dA = vᵀ·x, dB = scale·gᵀ·u. The gradient of W is never formed.
    fn bwd(&self, x: &Tensor, a: &Tensor, b: &Tensor, _y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((tokens, input), (rank, _), (output, _)) = (x.dims2()?, a.dims2()?, b.dims2()?);
        let op = "lora-linear";
        let (dx, da, db) = with_values(op, x, |x| {
            with_values(op, a, |a| {
                with_values(op, b, |b| {
                    with_values(op, g, |g| {
                        let mut v = vec![0f32; tokens * rank];
                        matmul(tokens, output, rank, &mut v, false, self.scale, View::rows(g, output), View::rows(b, rank), Threads::All);
                        let u = forward(x, a, None, tokens, input, rank);
                        let da = grad_weight(&v, x, tokens, input, rank);
                        let mut db = vec![0f32; output * rank];
                        let (gt, u) = (View::rows(g, output).t(), View::rows(&u, rank));
                        matmul(output, tokens, rank, &mut db, false, self.scale, gt, u, Threads::All);
                        let mut dx = with_values(op, &self.w, |w| grad_input(g, w, tokens, input, output))?;
                        matmul(tokens, rank, input, &mut dx, true, 1.0, View::rows(&v, rank), View::rows(a, input), Threads::All);
                        Ok::<_, candle_core::Error>((dx, da, db))
                    })
                })
            })
        })?????;
        Ok((Some(tensor(dx, (tokens, input))?), Some(tensor(da, (rank, input))?), Some(tensor(db, (output, rank))?)))
    }
}
