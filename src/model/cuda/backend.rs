//! The types that the model uses on a GPU.

use std::ops::Deref;

use candle_core::Result;

use super::gradients::GradientBuffers;
use crate::compute::cuda::gpu::Memory;
use crate::model::backend::Backend;

/// An NVIDIA GPU.
pub(super) struct CudaBackend;

impl Backend for CudaBackend {
    /// In the pass's precision, except for the matrices that are f32 on every device.
    type Activation = Memory;
    type LeftOperand<'a> = CudaOperand<'a>;
    /// `None` if the group has no adapter.
    type LowRankProjection = Option<Memory>;
    type GateUpSpace = Memory;
    type GateUp = Memory;
    /// Reuses the memory of the tape.
    type GateUpGradient = Memory;
    type HeadTape = CudaHeadTape;
    type Gradients = GradientBuffers;
    type Retired<T> = ();

    fn copy(x: &Memory) -> Result<Memory> {
        x.copy()
    }

    fn retire<T>(_value: T) {}
}

/// The left operand of a GEMM. cuBLAS needs no packing, so this is the matrix itself.
pub(super) enum CudaOperand<'a> {
    Owned(Memory),
    Borrowed(&'a Memory),
}

impl Deref for CudaOperand<'_> {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        match self {
            CudaOperand::Owned(memory) => memory,
            CudaOperand::Borrowed(memory) => memory,
        }
    }
}

/// Values that the head saves for the backward pass, in addition to its output.
pub(super) struct CudaHeadTape {
    /// The predictors' hidden states before the last norm `[N, C]`.
    pub before_norm: Memory,
    /// The predictors' hidden states after the last norm, times the factor on the logits `[N, C]`.
    pub normed: Memory,
    /// ∂log p/∂h `[N, C]`. `None` if there will be no backward pass.
    pub gradient: Option<Memory>,
}
