//! The types that the model uses on the CPU.

use candle_core::Result;

use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm;
use crate::compute::cpu::swiglu::GateUp;
use crate::model::backend::Backend;
use crate::model::gradients::GradientSink;

/// Accumulates the gradients of the parameters.
pub type Gradients = dyn GradientSink;

/// The CPU.
pub struct CpuBackend;

impl Backend for CpuBackend {
    /// All activations are f32.
    type Activation = Buffer;
    type Operand<'a> = gemm::Operand<'a>;
    type LowRank = Buffer;
    /// Nothing is allocated in advance: gate and up are usually computed tile by tile, and the full
    /// matrix exists only if tiling is not possible.
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
    /// `[T, 2F]`. Reuses the memory of the tape.
    F32(Buffer),
    /// The gradients of gate and of up, each `[T, F]`, rounded to bf16.
    Rounded([gemm::Operand<'static>; 2]),
}

/// Values that the head saves for the backward pass, in addition to its output.
pub struct HeadTape {
    /// The predictors' hidden states before the last norm `[N, C]`.
    pub before_norm: Buffer,
    /// The predictors' hidden states after the last norm `[N, C]`.
    pub normed: Buffer,
}
