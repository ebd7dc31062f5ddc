//! The types that the CPU computes with.

use candle_core::Result;

use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm;
use crate::compute::cpu::swiglu::GateUp;
use crate::model::backend::Backend;
use crate::model::gradients::GradientSink;

/// Where the gradients of parameters go.
pub type Gradients = dyn GradientSink;

/// This machine's cores.
pub struct CpuBackend;

impl Backend for CpuBackend {
    /// In f32.
    type Activation = Buffer;
    type Operand<'a> = gemm::Operand<'a>;
    type LowRank = Buffer;
    /// The projections are computed by tiles, and written as a whole only where that cannot be.
    type GateUpSpace = ();
    type GateUp = GateUp;
    type GateUpGradient = GateUpGradient;
    type HeadTape = HeadTape;
    type Gradients = Gradients;
    type Retired<T> = T;

    fn copy(x: &Buffer) -> Result<Buffer> {
        Ok(Buffer::copy_of(x))
    }

    fn retire<T>(value: T) -> T {
        value
    }
}

/// The gradient of [`GateUp`].
pub enum GateUpGradient {
    /// `[T, 2F]`, in the tape's memory.
    F32(Buffer),
    /// Of gate and of up, rounded.
    Rounded([gemm::Operand<'static>; 2]),
}

/// What the backward pass needs of the head, besides its output.
pub struct HeadTape {
    /// The predictors' hidden states before the last norm `[N, C]`.
    pub before_norm: Buffer,
    /// The same after it.
    pub normed: Buffer,
}
