//! The types that a GPU computes with.

use std::ops::Deref;

use candle_core::Result;

use super::gradients::GradientBuffers;
use crate::compute::cuda::gpu::Memory;
use crate::model::backend::Backend;

/// An NVIDIA GPU.
pub(super) struct CudaBackend;

impl Backend for CudaBackend {
    /// In the pass's precision, but for what is f32 on every device.
    type Activation = Memory;
    type Operand<'a> = Operand<'a>;
    /// `None` without an adapter on the group.
    type LowRank = Option<Memory>;
    type GateUpSpace = Memory;
    type GateUp = Memory;
    /// In the tape's memory.
    type GateUpGradient = Memory;
    type HeadTape = HeadTape;
    type Gradients = GradientBuffers;
    type Retired<T> = ();

    fn copy(x: &Memory) -> Result<Memory> {
        x.copy()
    }

    fn retire<T>(_value: T) {}
}

/// The left operand of a matrix multiplication: cuBLAS reads a matrix where it is.
pub(super) enum Operand<'a> {
    Owned(Memory),
    Borrowed(&'a Memory),
}

impl Deref for Operand<'_> {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        match self {
            Operand::Owned(memory) => memory,
            Operand::Borrowed(memory) => memory,
        }
    }
}

/// What the backward pass needs of the head, besides its output.
pub(super) struct HeadTape {
    /// The predictors' hidden states before the last norm `[N, C]`.
    pub before_norm: Memory,
    /// The same after it.
    pub normed: Memory,
    /// ∂log p/∂h `[N, C]`, where there will be a backward pass.
    pub gradient: Option<Memory>,
}
