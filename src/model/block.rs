//! One decoder block on a packed row, forward and backward, for every device. The order of a
//! block's steps is defined only here.
//!
//! x' = x + O(attention(rope(Q(n), K(n)), V(n))) with n = norm(x), where O is the output
//! projection, and x'' = x' + down(activation(gate(m)) ⊙ up(m)) with m = norm(x').
//!
//! Some families differ from this in one or more of these points:
//! - Q(n) and K(n) are normed before the rotation, each head on its own or all heads at once.
//! - Queries and keys of some blocks are not rotated.
//! - There is no norm on the inputs: n = x, m = x'.
//! - The output of each part passes through another norm before it is added, or is multiplied by a
//!   factor.
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
    ActivationFunction, AttentionSpec, BlockSpec, FeedForward, Mixer, Norms, Projections, QkNorm,
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
    /// Output of the attention part before the norm on it `[T, C]`. `None` if the block has no such
    /// norm.
    mixer_output: Option<B::Activation>,
    /// The residual stream after attention `[T, C]`.
    middle: B::Activation,
    gate_up: B::GateUp,
    /// Output of the feed-forward part before the norm on it `[T, C]`. `None` if the block has no
    /// such norm.
    feed_forward_output: Option<B::Activation>,
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
        mixer_norms: Norms::Pre | Norms::PreAndPost | Norms::Post,
        feed_forward:
            FeedForward::Gated {
                width: _,
                activation: ActivationFunction::Silu | ActivationFunction::GeluTanh,
                bias: _,
                projections: Projections::Separate | Projections::Fused,
            },
        feed_forward_norms: Norms::Pre | Norms::PreAndPost | Norms::Post,
        norm_names: _,
        output_factor: _,
    } = *spec;
    attention
}

/// Returns the operand of the first linear layers of a part: the residual stream `x`, normed if the
/// part has a norm on its input.
fn part_input<B: Backend>(
    block: &impl BlockOps<B>,
    (norm, norms): (StreamNorm, Norms),
    x: &B::Activation,
) -> Result<B::LeftOperand<'static>> {
    match norms.has_pre() {
        true => block.norm(norm, x),
        false => block.stream_operand(x),
    }
}

/// Adds to `gx` the gradient of the residual stream `x` through a part, given the gradient `g` of
/// the result of [`part_input`].
fn add_input_gradient<B: Backend>(
    block: &impl BlockOps<B>,
    (norm, norms): (StreamNorm, Norms),
    x: &B::Activation,
    g: &B::Activation,
    gx: &mut B::Activation,
    gradients: &mut B::Gradients,
) -> Result<()> {
    match norms.has_pre() {
        true => block.norm_backward(norm, x, g, gx, gradients),
        false => block.add_gradient(g, gx),
    }
}

/// Adds the output of the last linear layer of a part to the residual stream `x`. If `has_post` is
/// true, the output passes through `norm` first. It is multiplied by the block's factor. Returns
/// x·Aᵀ of the layer and the input of `norm`.
fn add_part<B: Backend>(
    block: &impl BlockOps<B>,
    (norm, has_post): (StreamNorm, bool),
    group: LinearGroup,
    input: &B::LeftOperand<'_>,
    x: &mut B::Activation,
) -> Result<(B::LowRankProjection, Option<B::Activation>)> {
    let factor = block.spec().output_factor;
    if !has_post && factor == 1.0 {
        return Ok((block.add_to_stream(group, input, x)?, None));
    }
    let mut output = block.new_stream()?;
    let low_rank = block.project(group, input, &mut output)?;
    if !has_post {
        block.add_scaled(factor, &output, x)?;
        return Ok((low_rank, None));
    }
    block.add_norm(norm, &output, x)?;
    Ok((low_rank, Some(output)))
}

/// Returns the gradient of a part's `output`, the input of `norm`. `gx` is the gradient of the
/// residual stream, to which the result of `norm` times the block's factor was added. Returns
/// `None` if there is neither norm nor factor: `gx` is then also the gradient of the output.
fn output_gradient<B: Backend>(
    block: &impl BlockOps<B>,
    norm: StreamNorm,
    output: Option<B::Activation>,
    gx: &B::Activation,
    gradients: &mut B::Gradients,
) -> Result<Option<B::Activation>> {
    let scaled = match block.spec().output_factor {
        1.0 => None,
        factor => Some(block.scaled(factor, gx)?),
    };
    let Some(output) = output else {
        return Ok(scaled);
    };
    let mut g = block.new_stream()?;
    block.norm_backward(
        norm,
        &output,
        scaled.as_ref().unwrap_or(gx),
        &mut g,
        gradients,
    )?;
    Ok(Some(g))
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
    let BlockSpec {
        mixer_norms,
        feed_forward_norms,
        ..
    } = *block.spec();

    // Attention part.
    let mut qkv = block.new_qkv()?;
    let n = part_input(block, (StreamNorm::Mixer, mixer_norms), x)?;
    let u_qkv = block.project(LinearGroup::Qkv, &n, &mut qkv)?;
    let n = B::retire(n);
    let mut before_norm = None;
    match attention.qk_norm {
        QkNorm::Absent => {}
        QkNorm::PerHead | QkNorm::AllHeads => {
            before_norm = save_tape.then(|| B::copy(&qkv)).transpose()?;
            block.head_norms(&mut qkv)?;
        }
    }
    if let Some(rope) = attention.rope {
        block.rotate(rope, &mut qkv, Direction::Forward)?;
    }
    let attended = block.attention(&qkv)?;
    let input = save_tape.then(|| B::copy(x)).transpose()?;
    let operand = block.attention_operand(&attended.output);
    let has_post = mixer_norms.has_post();
    let (u_output, mixer_output) = add_part(
        block,
        (StreamNorm::MixerOutput, has_post),
        LinearGroup::Output,
        &operand,
        x,
    )?;
    let mixer_output = mixer_output.filter(|_| save_tape);
    drop((operand, n));

    // Feed-forward part.
    let space = block.new_gate_up()?;
    let n = part_input(block, (StreamNorm::FeedForward, feed_forward_norms), x)?;
    let Gated {
        y,
        gate_up,
        low_rank: u_gate_up,
    } = block.feed_forward(space, n, save_tape)?;
    let middle = save_tape.then(|| B::copy(x)).transpose()?;
    let has_post = feed_forward_norms.has_post();
    let (u_down, feed_forward_output) = add_part(
        block,
        (StreamNorm::FeedForwardOutput, has_post),
        LinearGroup::Down,
        &y,
        x,
    )?;

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
                mixer_output,
                middle,
                gate_up,
                feed_forward_output,
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
    let before_mixer = (StreamNorm::Mixer, block.spec().mixer_norms);
    let before_feed_forward = (StreamNorm::FeedForward, block.spec().feed_forward_norms);
    let BlockTape {
        x,
        qkv,
        before_norm,
        attended,
        mixer_output,
        middle,
        gate_up,
        feed_forward_output,
        low_rank,
    } = tape;
    let PerGroup {
        qkv: u_qkv,
        output: u_output,
        gate_up: u_gate_up,
        down: u_down,
    } = low_rank;

    // Feed-forward part.
    let g = output_gradient(
        block,
        StreamNorm::FeedForwardOutput,
        feed_forward_output,
        gx,
        gradients,
    )?;
    let d_gate_up =
        block.feed_forward_backward(gate_up, &u_down, g.as_ref().unwrap_or(gx), gradients)?;
    drop(g);
    let u_down = B::retire(u_down);
    let n = part_input(block, before_feed_forward, &middle)?;
    let gn = block.linear_backward(
        LinearGroup::GateUp,
        &n,
        &u_gate_up,
        OutputGradient::GateUp(&d_gate_up),
        gradients,
    )?;
    drop((n, d_gate_up, u_gate_up, u_down));
    add_input_gradient(block, before_feed_forward, &middle, &gn, gx, gradients)?;
    drop((gn, middle));

    // Attention part.
    let g = output_gradient(block, StreamNorm::MixerOutput, mixer_output, gx, gradients)?;
    let operand = block.attention_operand(&attended.output);
    let stream = OutputGradient::Stream(g.as_ref().unwrap_or(gx));
    let go = block.linear_backward(LinearGroup::Output, &operand, &u_output, stream, gradients)?;
    drop((operand, g));
    let mut dqkv = block.attention_backward(&qkv, &attended, &go)?;
    drop((go, attended, qkv, u_output));
    if let Some(rope) = attention.rope {
        block.rotate(rope, &mut dqkv, Direction::Backward)?;
    }
    match (attention.qk_norm, &before_norm) {
        (QkNorm::PerHead | QkNorm::AllHeads, Some(before)) => {
            block.head_norms_backward(before, &mut dqkv, gradients)?
        }
        (QkNorm::PerHead | QkNorm::AllHeads, None) | (QkNorm::Absent, _) => {}
    }
    let n = part_input(block, before_mixer, &x)?;
    let gn = block.linear_backward(
        LinearGroup::Qkv,
        &n,
        &u_qkv,
        OutputGradient::Qkv(&dqkv),
        gradients,
    )?;
    add_input_gradient(block, before_mixer, &x, &gn, gx, gradients)
}
