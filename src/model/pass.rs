//! Passes over one packed row, for every device: the only loops over the blocks of a decoder.
//!
//! The loss needs no tape: log-probs come out of the forward pass, ∂loss/∂log p of each completion
//! token goes into the backward pass. With activation checkpointing only each block's input is
//! saved and the block runs again in the backward pass (arXiv:1604.06174); without it each block's
//! tape is. Either way a block's tape is freed as soon as its gradients are added to the sums.
//!
//! `yield_point` is called before every block, which is where the engine scores while it trains.

use candle_core::{Result, bail};

use super::backend::{Backend, Keep, RowOps};
use super::block::{BlockTape, block_backward, block_forward};
use crate::compute::cpu::head::HeadOutput;

/// What the backward pass needs of the forward pass.
pub struct Tape<B: Backend> {
    /// One for each block; empty after a forward pass that saved nothing.
    blocks: Vec<Saved<B>>,
    head: B::HeadTape,
    output: HeadOutput,
}

/// What the forward pass has saved of a block.
enum Saved<B: Backend> {
    /// Everything that the backward pass needs.
    Tape(Box<BlockTape<B>>),
    /// Its input only.
    Input(B::Activation),
}

impl<B: Backend> Tape<B> {
    /// Returns what came out of the head.
    pub fn output(&self) -> &HeadOutput {
        &self.output
    }
}

/// Returns the log-probs of the row's completion tokens `[N]`.
///
/// # Errors
/// When the device fails or has no memory left.
pub fn log_probs<B: Backend, R: RowOps<B>>(
    row: &R,
    yield_point: &mut dyn FnMut(),
) -> Result<Vec<f32>> {
    let (x, _) = blocks_forward(row, Keep::Nothing, yield_point)?;
    row.log_probs(&x)
}

/// Runs the row forward.
///
/// # Errors
/// When the device fails or has no memory left.
pub fn forward<B: Backend, R: RowOps<B>>(
    row: &R,
    keep: Keep,
    yield_point: &mut dyn FnMut(),
) -> Result<Tape<B>> {
    let (x, blocks) = blocks_forward(row, keep, yield_point)?;
    let (output, head) = row.head(&x, keep)?;
    Ok(Tape { blocks, head, output })
}

/// Embeds the row and runs the blocks. Returns the last one's output `[T, C]` and what is saved.
fn blocks_forward<B: Backend, R: RowOps<B>>(
    row: &R,
    keep: Keep,
    yield_point: &mut dyn FnMut(),
) -> Result<(B::Activation, Vec<Saved<B>>)> {
    let mut x = row.embed()?;
    let mut saved = Vec::with_capacity(row.num_blocks());
    for index in 0..row.num_blocks() {
        yield_point();
        let input = (keep == Keep::Inputs).then(|| B::copy(&x)).transpose()?;
        let tape = block_forward(&row.block(index)?, &mut x, keep == Keep::Tapes)?;
        saved.extend(tape.map(|tape| Saved::Tape(Box::new(tape))).or(input.map(Saved::Input)));
    }
    Ok((x, saved))
}

/// Runs the row backward, given ∂loss/∂log p `[N]`, and adds the gradient of every tensor that is
/// trained to `gradients`.
///
/// # Errors
/// When the forward pass saved no tape, and when the device fails or has no memory left.
pub fn backward<B: Backend, R: RowOps<B>>(
    row: &R,
    tape: Tape<B>,
    upstream: &[f32],
    gradients: &mut B::Gradients,
    yield_point: &mut dyn FnMut(),
) -> Result<()> {
    let Tape { blocks, head, output } = tape;
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
                None => bail!("block {index} left no tape"),
            },
        };
        block_backward(&row.block(index)?, tape, &mut gx, gradients)?;
    }
    row.embed_backward(&gx, gradients)
}

#[cfg(test)]
mod tests;
