//! Passes over one packed row, for every device. The loops over a decoder's blocks are only here.
//!
//! The loss is computed between the two passes: the forward pass returns log-probs, and the
//! backward pass takes ∂loss/∂log p of each completion token. With activation checkpointing
//! (arXiv:1604.06174) only each block's input is saved, and the backward pass runs the block
//! forward again. Without it each block's tape is saved. Either way a block's tape is freed as soon
//! as the block's gradients are accumulated.
//!
//! `yield_point` is called before every block. The engine uses it to run scoring requests during
//! training.

use candle_core::{Result, bail};

use super::backend::{Backend, RowOps, SavePolicy};
use super::block::{BlockTape, block_backward, block_forward};
use crate::compute::cpu::head::HeadOutput;

/// Values of a forward pass that are saved for the backward pass.
pub struct Tape<B: Backend> {
    /// One entry per block. Empty after a forward pass with [`SavePolicy::Nothing`].
    blocks: Vec<Saved<B>>,
    head: B::HeadTape,
    output: HeadOutput,
}

/// Values that the forward pass has saved of one block.
enum Saved<B: Backend> {
    /// Everything that the backward pass needs.
    Tape(Box<BlockTape<B>>),
    /// The block's input `[T, C]` only.
    Input(B::Activation),
}

impl<B: Backend> Tape<B> {
    /// Returns the output of the head.
    pub fn output(&self) -> &HeadOutput {
        &self.output
    }
}

/// Returns the log-probs of the row's completion tokens `[N]`.
///
/// # Errors
/// Fails if the device fails or has no memory left.
pub fn log_probs<B: Backend, R: RowOps<B>>(
    row: &R,
    yield_point: &mut dyn FnMut(),
) -> Result<Vec<f32>> {
    let (x, _) = blocks_forward(row, SavePolicy::Nothing, yield_point)?;
    row.log_probs(&x)
}

/// Returns the last block's output `[T, C]` of a pass that saves nothing.
///
/// # Errors
/// Fails if the device fails or has no memory left.
pub fn hidden<B: Backend, R: RowOps<B>>(
    row: &R,
    yield_point: &mut dyn FnMut(),
) -> Result<B::Activation> {
    Ok(blocks_forward(row, SavePolicy::Nothing, yield_point)?.0)
}

/// Runs the row forward and saves what `save` selects.
///
/// # Errors
/// Fails if the device fails or has no memory left.
pub fn forward<B: Backend, R: RowOps<B>>(
    row: &R,
    save: SavePolicy,
    yield_point: &mut dyn FnMut(),
) -> Result<Tape<B>> {
    let (x, blocks) = blocks_forward(row, save, yield_point)?;
    let (output, head) = row.head(&x, save)?;
    Ok(Tape {
        blocks,
        head,
        output,
    })
}

/// Embeds the row and runs the blocks. Returns the last block's output `[T, C]` and the saved
/// values.
fn blocks_forward<B: Backend, R: RowOps<B>>(
    row: &R,
    save: SavePolicy,
    yield_point: &mut dyn FnMut(),
) -> Result<(B::Activation, Vec<Saved<B>>)> {
    let mut x = row.embed()?;
    let mut saved = Vec::with_capacity(row.num_blocks());
    for index in 0..row.num_blocks() {
        yield_point();
        let input = (save == SavePolicy::BlockInputs)
            .then(|| B::copy(&x))
            .transpose()?;
        let tape = block_forward(&row.block(index)?, &mut x, save == SavePolicy::Tapes)?;
        saved.extend(
            tape.map(|tape| Saved::Tape(Box::new(tape)))
                .or(input.map(Saved::Input)),
        );
    }
    Ok((x, saved))
}

/// Runs the row backward, given `upstream` = ∂loss/∂log p `[N]`, and accumulates the gradients
/// of all trained tensors in `gradients`.
///
/// # Errors
/// Fails if the forward pass saved nothing, and if the device fails or has no memory left.
pub fn backward<B: Backend, R: RowOps<B>>(
    row: &R,
    tape: Tape<B>,
    upstream: &[f32],
    gradients: &mut B::Gradients,
    yield_point: &mut dyn FnMut(),
) -> Result<()> {
    let Tape {
        blocks,
        head,
        output,
    } = tape;
    if blocks.len() != row.num_blocks() {
        bail!("the row was run forward without a tape");
    }
    let mut gx = row.head_backward(head, output, upstream, gradients)?;
    for (index, saved) in blocks.into_iter().enumerate().rev() {
        yield_point();
        let tape = match saved {
            Saved::Tape(tape) => *tape,
            Saved::Input(mut x) => match block_forward(&row.block(index)?, &mut x, true)? {
                Some(tape) => tape,
                None => bail!("block {index} was run forward again but returned no tape"),
            },
        };
        block_backward(&row.block(index)?, tape, &mut gx, gradients)?;
    }
    row.embed_backward(&gx, gradients)
}

#[cfg(test)]
mod tests;
