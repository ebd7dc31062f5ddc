//! Forward and backward over one packed row, block by block.
//!
//! The loss needs no tape: log-probs come out of the forward pass, ∂loss/∂logp of each completion token goes into the backward pass. With
//! activation checkpointing only each block's input is kept and the block runs again on the way back (arXiv:1604.06174); without it each block's
//! own tape is. Either way a block's tape is dropped as soon as its gradients are added to the totals.

use std::sync::Arc;

use candle_core::{Result, bail};

use super::trainable::Gradients;
use crate::model::block::BlockTape;
use crate::model::cuda::DeviceTape;
pub use crate::model::decoder::Keep;
use crate::model::decoder::{HeadTape, Policy, PreparedRow, Row};
use crate::model::device::ComputeDevice;
use crate::model::ops::buffer::Buffer;
use crate::model::ops::head::{HeadOptions, HeadOutput, KEPT, TokenDistribution};

/// A row after its forward pass, ready to go back.
pub struct RowTape {
    row: PreparedRow,
    output: HeadOutput,
    tape: Tape,
}

enum Tape {
    Cpu { blocks: Vec<Kept>, head: HeadTape },
    Cuda(Box<DeviceTape>),
}

enum Kept {
    /// Everything the backward pass needs.
    Tape(Box<BlockTape>),
    /// Only the block's input.
    Input(Buffer),
}

/// Runs the row forward. `pause` is called before every block.
pub fn forward(policy: &Policy, row: Arc<Row>, keep: Keep, pause: &mut dyn FnMut()) -> Result<RowTape> {
    let row = policy.prepare(row)?;
    if let ComputeDevice::Cuda(cuda) = &policy.device {
        let (output, tape) = cuda.forward(policy, &row, keep, pause)?;
        return Ok(RowTape { row, output, tape: Tape::Cuda(Box::new(tape)) });
    }
    let mut x = policy.embed(&row)?;
    let mut blocks = Vec::with_capacity(policy.num_blocks());
    for i in 0..policy.num_blocks() {
        pause();
        let input = (keep == Keep::Inputs).then(|| Buffer::copy_of(&x));
        let (y, tape) = policy.block(i, x, &row, keep == Keep::Tapes)?;
        x = y;
        blocks.extend(tape.map(|t| Kept::Tape(Box::new(t))).or(input.map(Kept::Input)));
    }
    // Without an adapter the head is trained, too.
    let trained = match keep {
        Keep::Tapes => Some(KEPT),
        Keep::Inputs => Some(0),
        Keep::Nothing => None,
    };
    let trained = trained.filter(|_| policy.adapter.is_none());
    let (output, head) = policy.head(&x, &row, HeadOptions { distribution: true, gradient: keep != Keep::Nothing, trained })?;
    Ok(RowTape { row, output, tape: Tape::Cpu { blocks, head } })
}

/// Runs the row backward from ∂loss/∂logp `[N]` and adds every trainable tensor's gradient to `gradients`. `pause` is called before every block.
pub fn backward(policy: &Policy, tape: RowTape, upstream: &[f32], gradients: &mut Gradients, pause: &mut dyn FnMut()) -> Result<()> {
    let RowTape { row, output, tape } = tape;
    let (blocks, head) = match tape {
        Tape::Cpu { blocks, head } => (blocks, head),
        Tape::Cuda(tape) => return gradients.on_device(policy, |cuda, sums| cuda.backward(policy, &row, *tape, upstream, sums, pause)),
    };
    if blocks.len() != policy.num_blocks() {
        bail!("the row was run forward without a tape");
    }
    let mut gx = policy.head_backward(head, output, &row, upstream, gradients)?;
    for (i, kept) in blocks.into_iter().enumerate().rev() {
        pause();
        let tape = match kept {
            Kept::Tape(tape) => *tape,
            Kept::Input(x) => match policy.block(i, x, &row, true)?.1 {
                Some(tape) => tape,
                None => bail!("block {i} left no tape"),
            },
        };
        policy.block_backward(i, tape, &row, &mut gx, gradients)?;
    }
    policy.embed_backward(&row, &gx, gradients);
    Ok(())
}

impl RowTape {
    /// log p of every completion token `[N]`.
    pub fn log_probs(&self) -> &[f32] {
        &self.output.log_probs
    }

    /// What else is known of each completion token.
    pub fn distributions(&self) -> &[TokenDistribution] {
        &self.output.distributions
    }
}
