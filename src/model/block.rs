//! One decoder block on a packed row, forward and backward, for every device. The order of a
//! block's steps is defined only here.
//!
//! x' = x + O(attention(rope(Q(n), K(n)), V(n))) with n = norm(x), where O is the output
//! projection. Some families norm each head of Q(n) and K(n) before the rotation.
//! x'' = x' + down(activation(gate(m)) ⊙ up(m)) with m = norm(x').
//!
//! In the code `n` is the output of a norm and `u_qkv` … `u_down` are x·Aᵀ of the groups of
//! linear layers. Gradients are `gx` (of the residual stream), `gn` (of a norm's output), `go` (of
//! attention's output), `dqkv` (of `[q | k | v]`) and `d_gate_up` (of `[gate | up]`).
//!
//! The tape saves the activations that are expensive to recompute. The backward pass recomputes the
//! norms and activation(gate) ⊙ up.
//!
//! Device memory comes from a first-fit arena, so the order of allocations and frees determines the
//! peak memory of a pass. Do not move an allocation, a `drop` or a `retire` in this file without
//! measuring the peak.

use candle_core::Result;

use super::backend::{Attended, Backend, BlockOps, Gated, OutputGradient, StreamNorm};
use super::params::{LinearGroup, PerGroup};
use super::spec::{
    ActivationFunction, AttentionSpec, BlockSpec, FeedForward, Mixer, Norms, QkNorm,
};
use crate::compute::cpu::rope::Direction;

/// Activations of one block that are saved for the backward pass.
pub struct BlockTape<B: Backend> {
    /// The block's input `[T, C]`.
    x: B::Activation,
    /// `[q | k | v]` as attention read it: normed and rotated.
    qkv: B::Activation,
    /// `[q | k | v]` before the norms on queries and keys. `None` if the block has no such norms.
    before_norm: Option<B::Activation>,
    attended: Attended<B>,
    /// The residual stream after attention `[T, C]`.
    middle: B::Activation,
    gate_up: B::GateUp,
    /// x·Aᵀ of each group of linear layers.
    low_rank: PerGroup<B::LowRankProjection>,
}

/// Destructures a block's specification and returns its attention.
///
/// [`block_forward`] and [`block_backward`] are correct only for the variants in this pattern. A
/// new variant does not compile here, as a reminder to extend both functions first.
fn attention_of(spec: &BlockSpec) -> AttentionSpec {
    let BlockSpec {
        mixer: Mixer::Attention(attention),
        mixer_norms: Norms::Pre,
        feed_forward:
            FeedForward::Gated {
                width: _,
                activation: ActivationFunction::Silu | ActivationFunction::GeluTanh,
                bias: _,
            },
        feed_forward_norms: Norms::Pre,
    } = *spec;
    attention
}

/// Runs a block forward on the residual stream `x` `[T, C]`, in place. Returns a tape if
/// `save_tape` is true.
///
/// # Errors
/// Fails if the device fails or has no memory left.
pub fn block_forward<B: Backend>(
    block: &impl BlockOps<B>,
    x: &mut B::Activation,
    save_tape: bool,
) -> Result<Option<BlockTape<B>>> {
    let attention = attention_of(block.spec());

    // Attention part.
    let mut qkv = block.new_qkv()?;
    let n = block.norm(StreamNorm::Mixer, x)?;
    let u_qkv = block.project(LinearGroup::Qkv, &n, &mut qkv)?;
    let n = B::retire(n);
    let mut before_norm = None;
    match attention.qk_norm {
        QkNorm::Absent => {}
        QkNorm::PerHead => {
            before_norm = save_tape.then(|| B::copy(&qkv)).transpose()?;
            block.head_norms(&mut qkv)?;
        }
    }
    block.rotate(&mut qkv, Direction::Forward)?;
    let attended = block.attention(&qkv)?;
    let input = save_tape.then(|| B::copy(x)).transpose()?;
    let u_output = block.add_to_stream(
        LinearGroup::Output,
        &block.attention_operand(&attended.output),
        x,
    )?;
    drop(n);

    // Feed-forward part.
    let space = block.new_gate_up()?;
    let n = block.norm(StreamNorm::FeedForward, x)?;
    let Gated {
        y,
        gate_up,
        low_rank: u_gate_up,
    } = block.feed_forward(space, n, save_tape)?;
    let middle = save_tape.then(|| B::copy(x)).transpose()?;
    let u_down = block.add_to_stream(LinearGroup::Down, &y, x)?;

    Ok(match (input, middle, gate_up) {
        (Some(x), Some(middle), Some(gate_up)) => {
            let low_rank = PerGroup {
                qkv: u_qkv,
                output: u_output,
                gate_up: u_gate_up,
                down: u_down,
            };
            Some(BlockTape {
                x,
                qkv,
                before_norm,
                attended,
                middle,
                gate_up,
                low_rank,
            })
        }
        _ => None,
    })
}

/// Runs a block backward. Replaces `gx` `[T, C]`, the gradient of the block's output, by the
/// gradient of its input, and accumulates the gradients of the block's parameters in `gradients`.
/// Each part of the tape is freed as soon as it has been read.
///
/// # Errors
/// Fails if the device fails or has no memory left.
pub fn block_backward<B: Backend>(
    block: &impl BlockOps<B>,
    tape: BlockTape<B>,
    gx: &mut B::Activation,
    gradients: &mut B::Gradients,
) -> Result<()> {
    let attention = attention_of(block.spec());
    let BlockTape {
        x,
        qkv,
        before_norm,
        attended,
        middle,
        gate_up,
        low_rank,
    } = tape;
    let PerGroup {
        qkv: u_qkv,
        output: u_output,
        gate_up: u_gate_up,
        down: u_down,
    } = low_rank;

    // Feed-forward part.
    let d_gate_up = block.feed_forward_backward(gate_up, &u_down, gx, gradients)?;
    let u_down = B::retire(u_down);
    let n = block.norm(StreamNorm::FeedForward, &middle)?;
    let gn = block.linear_backward(
        LinearGroup::GateUp,
        &n,
        &u_gate_up,
        OutputGradient::GateUp(&d_gate_up),
        gradients,
    )?;
    drop((n, d_gate_up, u_gate_up, u_down));
    block.norm_backward(StreamNorm::FeedForward, &middle, &gn, gx, gradients)?;
    drop((gn, middle));

    // Attention part.
    let operand = block.attention_operand(&attended.output);
    let go = block.linear_backward(
        LinearGroup::Output,
        &operand,
        &u_output,
        OutputGradient::Stream(gx),
        gradients,
    )?;
    drop(operand);
    let mut dqkv = block.attention_backward(&qkv, &attended, &go)?;
    drop((go, attended, qkv, u_output));
    block.rotate(&mut dqkv, Direction::Backward)?;
    match (attention.qk_norm, &before_norm) {
        (QkNorm::PerHead, Some(before)) => {
            block.head_norms_backward(before, &mut dqkv, gradients)?
        }
        (QkNorm::PerHead, None) | (QkNorm::Absent, _) => {}
    }
    let n = block.norm(StreamNorm::Mixer, &x)?;
    let gn = block.linear_backward(
        LinearGroup::Qkv,
        &n,
        &u_qkv,
        OutputGradient::Qkv(&dqkv),
        gradients,
    )?;
    block.norm_backward(StreamNorm::Mixer, &x, &gn, gx, gradients)
}
