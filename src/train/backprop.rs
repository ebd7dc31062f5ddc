//! Forward and backward pass over one packed row on its policy's device, with gradients for
//! training. The passes themselves are in [`crate::model::pass`].

use std::sync::Arc;

use candle_core::Result;

use super::trainable::StepGradients;
use crate::compute::cpu::head::{HeadOutput, TokenDistribution};
pub use crate::model::backend::SavePolicy;
use crate::model::cpu::{CpuBackend, CpuRow};
use crate::model::cuda::DeviceTape;
use crate::model::decoder::Policy;
use crate::model::device::ComputeDevice;
use crate::model::pass;
use crate::model::row::{PreparedRow, Row};

/// A row after its forward pass, with the tape for its backward pass.
pub struct RowTape {
    row: PreparedRow,
    tape: BackendTape,
}

enum BackendTape {
    Cpu(Box<pass::Tape<CpuBackend>>),
    Cuda(Box<DeviceTape>),
}

/// Runs the forward pass of a row. `yield_point` is called before every block.
///
/// # Errors
/// Fails if the device fails or runs out of memory.
pub fn forward(
    policy: &Policy,
    row: Arc<Row>,
    save: SavePolicy,
    yield_point: &mut dyn FnMut(),
) -> Result<RowTape> {
    let row = policy.prepare(row)?;
    let tape = match &policy.device {
        ComputeDevice::Cpu => BackendTape::Cpu(Box::new(pass::forward(
            &CpuRow::new(policy.view(), &row),
            save,
            yield_point,
        )?)),
        ComputeDevice::Cuda(cuda) => BackendTape::Cuda(Box::new(cuda.forward(
            policy.view(),
            &row,
            save,
            yield_point,
        )?)),
    };
    Ok(RowTape { row, tape })
}

/// Runs the backward pass of a row from ∂loss/∂logp `[N]` and adds the gradient of every
/// trainable tensor to `gradients`. `yield_point` is called before every block.
///
/// # Errors
/// Fails if the forward pass saved no tape, or the device fails or runs out of memory.
pub fn backward(
    policy: &Policy,
    tape: RowTape,
    upstream: &[f32],
    gradients: &mut StepGradients,
    yield_point: &mut dyn FnMut(),
) -> Result<()> {
    let RowTape { row, tape } = tape;
    match tape {
        BackendTape::Cpu(tape) => pass::backward(
            &CpuRow::new(policy.view(), &row),
            *tape,
            upstream,
            gradients,
            yield_point,
        ),
        BackendTape::Cuda(tape) => gradients.on_device(policy, |cuda, sums| {
            cuda.backward(policy.view(), &row, *tape, upstream, sums, yield_point)
        }),
    }
}

impl RowTape {
    fn output(&self) -> &HeadOutput {
        match &self.tape {
            BackendTape::Cpu(tape) => tape.output(),
            BackendTape::Cuda(tape) => tape.output(),
        }
    }

    /// Returns log p of every completion token, `[N]`.
    pub fn log_probs(&self) -> &[f32] {
        &self.output().log_probs
    }

    /// Returns the statistics of each completion token's distribution, `[N]`.
    pub fn distributions(&self) -> &[TokenDistribution] {
        &self.output().distributions
    }
}
