//! Forward and backward over one packed row, block by block.
//!
//! The loss needs no tape: log-probs come out of the forward pass, ∂loss/∂logp of each completion token goes into the backward pass. With
//! activation checkpointing only each block's input is kept and the block runs again on the way back (arXiv:1604.06174); without it each block's own
//! small tape is kept. Either way a block's gradients are added to the totals and dropped before the next block's are formed.

use std::sync::Arc;

use candle_core::{Result, Tensor, Var, bail};

use super::trainable::{Gradients, TrainablePolicy};
use crate::model::decoder::{PreparedRow, Row};
use crate::model::ops::log_prob::{LogProbOptions, TokenDistribution};
use crate::model::ops::seed::backward_from;

/// A row after its forward pass, ready to go back.
pub struct RowTape {
    row: PreparedRow,
    blocks: Vec<BlockTape>,
    head_input: Var,
    logps: Tensor,
    /// log p of every completion token `[N]`.
    pub log_probs: Vec<f32>,
    /// What else is known of each completion token.
    pub distributions: Vec<TokenDistribution>,
}

enum BlockTape {
    /// The block's tape, from its input to its output.
    Kept { input: Var, output: Tensor },
    /// Only its input.
    Input(Tensor),
}

/// Runs the row forward; `checkpointing` trades a second forward pass for memory.
pub fn forward(policy: &TrainablePolicy, row: Arc<Row>, checkpointing: bool) -> Result<RowTape> {
    let row = policy.plain.prepare(row)?;
    let mut x = policy.plain.embed(&row)?;
    let mut blocks = Vec::with_capacity(policy.plain.num_blocks());
    for i in 0..policy.plain.num_blocks() {
        if checkpointing {
            let y = policy.plain.block(i, &x, &row)?;
            blocks.push(BlockTape::Input(std::mem::replace(&mut x, y)));
        } else {
            let input = Var::from_tensor(&x)?;
            let output = policy.tracked.block(i, &input, &row)?;
            x = output.detach();
            blocks.push(BlockTape::Kept { input, output });
        }
    }
    let head_input = Var::from_tensor(&x)?;
    let (logps, distributions) = policy.tracked.head(&head_input, &row, LogProbOptions { distribution: true, gradient: true })?;
    Ok(RowTape { row, blocks, head_input, log_probs: logps.to_vec1()?, logps, distributions: distributions.take() })
}

/// Runs the row backward from ∂loss/∂logp `[N]` and adds every trainable tensor's gradient to `gradients`.
pub fn backward(policy: &TrainablePolicy, tape: RowTape, upstream: Vec<f32>, gradients: &mut Gradients) -> Result<()> {
    let RowTape { row, blocks, head_input, logps, .. } = tape;
    let n = upstream.len();
    let mut store = backward_from(&logps, &Tensor::from_vec(upstream, n, logps.device())?)?;
    drop(logps);
    let Some(mut gx) = store.remove(&head_input) else { bail!("the head left no gradient for its input") };
    gradients.add(policy, &store)?;
    drop((store, head_input));
    for (i, block) in blocks.into_iter().enumerate().rev() {
        let (input, output) = match block {
            BlockTape::Kept { input, output } => (input, output),
            BlockTape::Input(x) => {
                let input = Var::from_tensor(&x)?;
                let output = policy.tracked.block(i, &input, &row)?;
                (input, output)
            }
        };
        let mut store = backward_from(&output, &gx)?;
        let Some(next) = store.remove(&input) else { bail!("block {i} left no gradient for its input") };
        gx = next;
        gradients.add(policy, &store)?;
    }
    gradients.add_embedding(policy, &row.row().ids, &gx)
}

/// Runs the row forward without a tape, for evaluation; [`backward`] on it is an error.
pub fn observe(policy: &crate::model::decoder::Policy, row: Arc<Row>) -> Result<RowTape> {
    let row = policy.prepare(row)?;
    let mut x = policy.embed(&row)?;
    for i in 0..policy.num_blocks() {
        x = policy.block(i, &x, &row)?;
    }
    let (logps, distributions) = policy.head(&x, &row, LogProbOptions { distribution: true, gradient: false })?;
    let head_input = Var::zeros((), candle_core::DType::F32, x.device())?;
    Ok(RowTape { row, blocks: Vec::new(), head_input, log_probs: logps.to_vec1()?, logps, distributions: distributions.take() })
}
