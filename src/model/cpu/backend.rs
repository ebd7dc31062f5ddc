//! The types that the model uses on the CPU.

use candle_core::Result;

use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm;
use crate::compute::cpu::swiglu::GateUpTape;
use crate::model::backend::Backend;
use crate::model::gradients::GradientSink;

/// Accumulates the gradients of the parameters.
pub type CpuGradients = dyn GradientSink;

/// The CPU.
pub struct CpuBackend;

impl Backend for CpuBackend {
    /// All activations are f32.
    type Activation = Buffer;
    type LeftOperand<'a> = gemm::Operand<'a>;
    type LowRankProjection = Buffer;
    /// Nothing is allocated in advance: gate and up are usually computed tile by tile, and the full
    /// matrix exists only if the tape saves it or if tiling is not possible.
    type GateUpSpace = ();
    type GateUp = GateUpTape;
    type GateUpGradient = CpuGateUpGradient;
    type HeadTape = CpuHeadTape;
    type Gradients = CpuGradients;
    type Retired<T> = T;

    fn copy(x: &Buffer) -> Result<Buffer> {
        Ok(Buffer::copy_of(x))
    }

    fn retire<T>(value: T) -> T {
        value
    }
}

/// The gradient of [`GateUpTape`].
pub enum CpuGateUpGradient {
    /// `[T, 2F]`. Reuses the memory of the tape.
    F32(Buffer),
    /// The gradients of gate and of up, each `[T, F]`, rounded to bf16.
    Rounded([gemm::Operand<'static>; 2]),
}

/// Values that the head saves for the backward pass, in addition to its output.
pub struct CpuHeadTape {
    /// The predictors' hidden states before the last norm `[N, C]`.
    pub before_norm: Buffer,
    /// The predictors' hidden states after the last norm, times the factor on the logits `[N, C]`.
    pub normed: Buffer,
}
