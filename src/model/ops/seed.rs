//! Starts a backward pass from a given upstream gradient: candle's `backward()` always seeds with ones.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

struct GradSeed;

impl CustomOp2 for GradSeed {
    fn name(&self) -> &'static str {
        "grad-seed"
    }

    fn cpu_fwd(&self, _y: &CpuStorage, _: &Layout, _g: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        // The value is never read.
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _y: &Tensor, upstream: &Tensor, _: &Tensor, _: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(upstream.clone()), None))
    }
}

/// The gradients of `Σ y ⊙ upstream` with respect to every variable that `y` depends on.
pub fn backward_from(y: &Tensor, upstream: &Tensor) -> Result<candle_core::backprop::GradStore> {
    y.apply_op2(&upstream.detach(), GradSeed)?.backward()
}
