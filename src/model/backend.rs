//! The interface between the model and a device: the operations that a decoder needs.
//!
//! [`super::block`] defines the order of a block's steps and [`super::pass`] the loop over the
//! blocks, once for all devices. A device implements three traits: [`Backend`] names its types,
//! [`RowOps`] is a policy opened for a pass over one row, and [`BlockOps`] is one block of it.
//!
//! The operations are coarse, so that each device can fuse steps in its own way. The CPU rounds a
//! norm's output while it is still in the L1 cache and applies SwiGLU to tiles of gate and up. A
//! GPU rounds the gradient of the residual stream before the GEMM that reads it.

use std::sync::Arc;

use candle_core::Result;

use super::adapter::Adapter;
use super::parameters::Parameters;
use super::params::{BlockParam, LinearGroup};
use super::spec::{BlockSpec, ModelSpec};
use crate::compute::cpu::head::HeadOutput;
use crate::compute::cpu::rope::Direction;
use crate::domain::training::Precision;

/// The parts of a policy that a pass reads: everything except the device.
#[derive(Clone, Copy, Debug)]
pub struct PolicyView<'a> {
    /// The decoder.
    pub spec: &'a ModelSpec,
    /// The base weights.
    pub parameters: &'a Arc<Parameters>,
    /// The adapter.
    pub adapter: Option<&'a Arc<Adapter>>,
    /// Precision of the matrix multiplications.
    pub precision: Precision,
}

/// Selects the values that a forward pass saves for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavePolicy {
    /// Every block's tape.
    Tapes,
    /// Every block's input: the backward pass runs the block forward again (recomputation).
    BlockInputs,
    /// Nothing: no backward pass will follow.
    Nothing,
}

/// An RMSNorm on the residual stream, or on an output that is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamNorm {
    /// Before the mixer.
    Mixer,
    /// Before the feed-forward part.
    FeedForward,
    /// On the mixer's output.
    MixerOutput,
    /// On the feed-forward part's output.
    FeedForwardOutput,
}

impl StreamNorm {
    /// Returns the parameter of the block that holds the norm's weight.
    pub fn weight(self) -> BlockParam {
        match self {
            StreamNorm::Mixer => BlockParam::InputNorm,
            StreamNorm::FeedForward => BlockParam::FeedForwardNorm,
            StreamNorm::MixerOutput => BlockParam::MixerOutputNorm,
            StreamNorm::FeedForwardOutput => BlockParam::FeedForwardOutputNorm,
        }
    }
}

/// The types that a device computes with. T is the number of tokens in the row, F the width of the
/// feed-forward part and r the rank of the adapter on a linear layer.
pub trait Backend: Sized {
    /// A matrix with one row per token. The residual stream `[T, C]`, its gradient and attention's
    /// log-sum-exps are f32 on every device. The device chooses the element type of all others.
    type Activation;
    /// The left operand of a matrix multiplication, in the layout and precision that the device's
    /// GEMM reads.
    type LeftOperand<'a>;
    /// x·Aᵀ of a group of linear layers `[T, Σr]`, from which the adapter's gradients are
    /// computed.
    type LowRankProjection;
    /// Memory for the outputs of the gate and up projections. It is allocated before their input.
    type GateUpSpace;
    /// `[gate | up]` `[T, 2F]` as the tape stores it.
    type GateUp;
    /// The gradient of `[gate | up]`.
    type GateUpGradient;
    /// Values that the head saves for the backward pass, in addition to its output.
    type HeadTape;
    /// The accumulated gradients of the parameters.
    type Gradients: ?Sized;
    /// The value that [`Backend::retire`] returns.
    type Retired<T>;

    /// Copies a matrix.
    ///
    /// # Errors
    /// Fails if the device fails or has no memory left.
    fn copy(x: &Self::Activation) -> Result<Self::Activation>;

    /// Marks a value as no longer read. A GPU frees its memory at once. The CPU holds the memory
    /// until the result is dropped: otherwise the arena could place a saved activation there, and
    /// the next temporary of the same size would take new memory.
    fn retire<T>(value: T) -> Self::Retired<T>;
}

/// The values that attention computes and the tape saves. H is the number of query heads, D the
/// width of a head.
pub struct Attended<B: Backend> {
    /// Output `[T, H·D]`.
    pub output: B::Activation,
    /// Log-sum-exp of every query's scores `[T, H]`.
    pub log_sum_exp: B::Activation,
}

/// Result of [`BlockOps::feed_forward`].
pub struct Gated<B: Backend> {
    /// activation(gate) ⊙ up `[T, F]`.
    pub y: B::LeftOperand<'static>,
    /// `[gate | up]`. `None` if the device did not store it because no tape is saved.
    pub gate_up: Option<B::GateUp>,
    /// x·Aᵀ of gate and up.
    pub low_rank: B::LowRankProjection,
}

/// The gradient of the output of a group of linear layers. The variants differ in the matrix that
/// holds it.
pub enum OutputGradient<'a, B: Backend> {
    /// The gradient of the output of the last layer of a part, as wide as the residual stream and
    /// in f32. It is the gradient of the stream itself, unless the output passes through a norm or
    /// is multiplied by a factor before it is added.
    Stream(&'a B::Activation),
    /// The gradient of `[q | k | v]`.
    Qkv(&'a B::Activation),
    /// The gradient of `[gate | up]`.
    GateUp(&'a B::GateUpGradient),
}

/// A policy opened for a pass over one row. T is the number of tokens, N the number of completion
/// tokens and C the width of the residual stream.
///
/// The functions that return a `Result` fail if the device fails or has no memory left, or if a
/// weight does not match the model's table of parameters ([`super::params`]).
pub trait RowOps<B: Backend> {
    /// A block of the policy, opened for the row.
    type Block<'a>: BlockOps<B>
    where
        Self: 'a;

    /// Returns the number of decoder blocks.
    fn num_blocks(&self) -> usize;

    /// Opens the block with this index.
    fn block(&self, index: usize) -> Result<Self::Block<'_>>;

    /// Returns the embeddings of the row's tokens `[T, C]`.
    fn embed(&self) -> Result<B::Activation>;

    /// Accumulates the gradient of the embedding matrix if it is trained. `gx` `[T, C]` is the
    /// gradient of the result of [`RowOps::embed`].
    fn embed_backward(&self, gx: &B::Activation, gradients: &mut B::Gradients) -> Result<()>;

    /// Returns the log-probs of the completion tokens `[N]`, given the last block's output.
    fn log_probs(&self, x: &B::Activation) -> Result<Vec<f32>>;

    /// Runs the last norm and the head on the last block's output `[T, C]`. With
    /// [`SavePolicy::Nothing`] the result cannot be passed to [`RowOps::head_backward`].
    fn head(&self, x: &B::Activation, save: SavePolicy) -> Result<(HeadOutput, B::HeadTape)>;

    /// Returns the gradient of the last block's output `[T, C]`, given `upstream` =
    /// ∂loss/∂log p `[N]`. Accumulates the gradients of the head and of the last norm if they
    /// are trained.
    fn head_backward(
        &self,
        tape: B::HeadTape,
        output: HeadOutput,
        upstream: &[f32],
        gradients: &mut B::Gradients,
    ) -> Result<B::Activation>;
}

/// A block opened for a pass over one row, with the policy's adapter applied. If the policy has
/// none, parts of the row may have adapters of their own in passes without a tape.
///
/// The functions fail in the same cases as those of [`RowOps`]. Each backward function accumulates
/// the gradients of those of its parameters that are trained.
pub trait BlockOps<B: Backend> {
    /// Returns the description of the block.
    fn spec(&self) -> &BlockSpec;

    /// Allocates `[q | k | v]` `[T, (H + 2K)·D]` with unspecified contents. K is the number of key
    /// heads.
    fn new_qkv(&self) -> Result<B::Activation>;

    /// Allocates a matrix of the same shape and type as the residual stream `[T, C]`, filled with
    /// zeros.
    fn new_stream(&self) -> Result<B::Activation>;

    /// Allocates the memory that [`BlockOps::feed_forward`] writes to.
    fn new_gate_up(&self) -> Result<B::GateUpSpace>;

    /// Applies a norm to the residual stream `x` and returns the result as an operand.
    fn norm(&self, norm: StreamNorm, x: &B::Activation) -> Result<B::LeftOperand<'static>>;

    /// Returns the residual stream `x` as an operand, without a norm.
    fn stream_operand(&self, x: &B::Activation) -> Result<B::LeftOperand<'static>>;

    /// Returns attention's output as the operand of the output projection.
    fn attention_operand<'a>(&self, output: &'a B::Activation) -> B::LeftOperand<'a>;

    /// Writes the outputs of a group of linear layers to `out`. Returns x·Aᵀ.
    fn project(
        &self,
        group: LinearGroup,
        input: &B::LeftOperand<'_>,
        out: &mut B::Activation,
    ) -> Result<B::LowRankProjection>;

    /// Adds the output of a linear layer to the residual stream `x`. Returns x·Aᵀ.
    fn add_to_stream(
        &self,
        group: LinearGroup,
        input: &B::LeftOperand<'_>,
        x: &mut B::Activation,
    ) -> Result<B::LowRankProjection>;

    /// Adds `factor` times the output `y` `[T, C]` of a part to the residual stream `x`.
    fn add_scaled(&self, factor: f32, y: &B::Activation, x: &mut B::Activation) -> Result<()>;

    /// Returns `factor` times `x`, a matrix of the shape and type of the residual stream.
    fn scaled(&self, factor: f32, x: &B::Activation) -> Result<B::Activation>;

    /// Applies a norm to the output `y` `[T, C]` of a part and adds the result, times
    /// [`BlockSpec::output_factor`], to the residual stream `x`.
    fn add_norm(&self, norm: StreamNorm, y: &B::Activation, x: &mut B::Activation) -> Result<()>;

    /// Applies RMSNorm to the queries and to the keys in place: to every head or to all heads at
    /// once, as [`super::spec::AttentionSpec::qk_norm`] says.
    fn head_norms(&self, qkv: &mut B::Activation) -> Result<()>;

    /// Applies the rotary position embedding to queries and keys in place. `rope` is the index of
    /// the frequencies in [`ModelSpec::ropes`].
    fn rotate(&self, rope: usize, qkv: &mut B::Activation, direction: Direction) -> Result<()>;

    /// Computes softmax attention of the rotated queries, keys and values `qkv`.
    fn attention(&self, qkv: &B::Activation) -> Result<Attended<B>>;

    /// Computes gate and up, and activation(gate) ⊙ up. With `save_tape` the result contains
    /// `[gate | up]`.
    fn feed_forward(
        &self,
        space: B::GateUpSpace,
        input: B::LeftOperand<'static>,
        save_tape: bool,
    ) -> Result<Gated<B>>;

    /// Runs down and the activation backward. Returns the gradient of `[gate | up]`, given the
    /// gradient `g` of the output of down, in f32. `low_rank` is x·Aᵀ of down.
    fn feed_forward_backward(
        &self,
        gate_up: B::GateUp,
        low_rank: &B::LowRankProjection,
        g: &B::Activation,
        gradients: &mut B::Gradients,
    ) -> Result<B::GateUpGradient>;

    /// Returns the gradient of the input of a group of linear layers, given the gradient `g` of its
    /// output.
    fn linear_backward(
        &self,
        group: LinearGroup,
        input: &B::LeftOperand<'_>,
        low_rank: &B::LowRankProjection,
        g: OutputGradient<'_, B>,
        gradients: &mut B::Gradients,
    ) -> Result<B::Activation>;

    /// Returns the gradient of `qkv`, given the gradient `g` of attention's output.
    fn attention_backward(
        &self,
        qkv: &B::Activation,
        attended: &Attended<B>,
        g: &B::Activation,
    ) -> Result<B::Activation>;

    /// Runs the norms on queries and keys backward. `before` holds `[q | k | v]` before the norms.
    /// `dqkv` is replaced in place: the gradient of the norms' outputs by that of their inputs.
    fn head_norms_backward(
        &self,
        before: &B::Activation,
        dqkv: &mut B::Activation,
        gradients: &mut B::Gradients,
    ) -> Result<()>;

    /// Runs a norm backward: adds the gradient of its input `x` to `gx`, given the gradient `g` of
    /// its output.
    fn norm_backward(
        &self,
        norm: StreamNorm,
        x: &B::Activation,
        g: &B::Activation,
        gx: &mut B::Activation,
        gradients: &mut B::Gradients,
    ) -> Result<()>;

    /// Adds the gradient `g` of a result of [`BlockOps::stream_operand`] to the gradient `gx` of
    /// the residual stream.
    fn add_gradient(&self, g: &B::Activation, gx: &mut B::Activation) -> Result<()>;
}
