//! The seam between the model and a device: what a device has to do for a decoder.
//!
//! [`super::block`] has the order of a block's steps and [`super::pass`] the loop over the blocks,
//! once for all devices. A device implements three traits: [`Backend`] names its types, [`RowOps`]
//! is a policy that is opened for a pass over one row, and [`BlockOps`] is one block of it.
//!
//! The operations are coarse, so that a device can fuse what suits it. The CPU rounds a norm's
//! output while it is in the nearest cache and applies SwiGLU to tiles of gate and up; a GPU rounds
//! the gradient of the residual stream before it multiplies it.

use std::sync::Arc;

use candle_core::Result;

use super::adapter::Adapter;
use super::parameters::Parameters;
use super::params::{BlockParam, LinearGroup};
use super::spec::{BlockSpec, ModelSpec};
use crate::compute::cpu::head::HeadOutput;
use crate::compute::cpu::rope::Direction;
use crate::domain::training::Precision;

/// A policy as a pass reads it: everything but where it runs.
#[derive(Clone, Copy, Debug)]
pub struct PolicyView<'a> {
    /// The decoder.
    pub spec: &'a ModelSpec,
    /// The base weights.
    pub parameters: &'a Arc<Parameters>,
    /// The adapter.
    pub adapter: Option<&'a Arc<Adapter>>,
    /// What matrix multiplications are computed in.
    pub precision: Precision,
}

/// What a forward pass saves for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Every block's tape.
    Tapes,
    /// Every block's input; the block runs again in the backward pass.
    Inputs,
    /// Nothing: for evaluation.
    Nothing,
}

/// An RMSNorm on the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamNorm {
    /// Before the mixer.
    Mixer,
    /// Before the feed-forward part.
    FeedForward,
}

impl StreamNorm {
    /// Returns which parameter of the block its weight is.
    pub fn weight(self) -> BlockParam {
        match self {
            StreamNorm::Mixer => BlockParam::InputNorm,
            StreamNorm::FeedForward => BlockParam::FeedForwardNorm,
        }
    }
}

/// The types that a device computes with. T is the number of tokens of the row.
pub trait Backend: Sized {
    /// A matrix with a row for each token. The residual stream `[T, C]`, its gradient and
    /// attention's log-sum-exps are f32 on every device; all others are as the device likes.
    type Activation;
    /// The left operand of a matrix multiplication, in the form that the device multiplies.
    type Operand<'a>;
    /// x·Aᵀ of a group of linear layers `[T, Σr]`, which the adapter's gradients need.
    type LowRank;
    /// Memory for the gate and up projections. It is allocated before their input is.
    type GateUpSpace;
    /// `[gate | up]` `[T, 2F]`, as the tape has it.
    type GateUp;
    /// Its gradient.
    type GateUpGradient;
    /// What the backward pass needs of the head, besides its output.
    type HeadTape;
    /// The sums of the parameters' gradients.
    type Gradients: ?Sized;
    /// What is left of a value after [`Backend::retire`].
    type Retired<T>;

    /// Copies a matrix.
    ///
    /// # Errors
    /// When the device has no memory left, or fails.
    fn copy(x: &Self::Activation) -> Result<Self::Activation>;

    /// Says that a value is not read any more. A GPU frees its memory at once. The CPU frees it
    /// when the result is dropped: until then activations that are saved cannot settle in its
    /// place, which the next temporary of the same size is to take.
    fn retire<T>(value: T) -> Self::Retired<T>;
}

/// Attention's output, as the tape has it.
pub struct Attended<B: Backend> {
    /// `[T, H·D]`.
    pub output: B::Activation,
    /// The log-sum-exp of every query's scores `[T, H]`.
    pub log_sum_exp: B::Activation,
}

/// What [`BlockOps::feed_forward`] computes.
pub struct Gated<B: Backend> {
    /// activation(gate) ⊙ up `[T, F]`.
    pub y: B::Operand<'static>,
    /// `[gate | up]`; `None` where the device has not stored it because no tape is saved.
    pub gate_up: Option<B::GateUp>,
    /// x·Aᵀ of gate and up.
    pub low_rank: B::LowRank,
}

/// The gradient of the output of a group of linear layers, in the form in which it is at hand.
pub enum OutputGradient<'a, B: Backend> {
    /// That of the residual stream, to which the output was added.
    Stream(&'a B::Activation),
    /// That of `[q | k | v]`.
    Qkv(&'a B::Activation),
    /// That of `[gate | up]`.
    GateUp(&'a B::GateUpGradient),
}

/// A policy that is opened for a pass over one row. N is the number of completion tokens, C the
/// width of the residual stream.
///
/// The functions that return a `Result` fail when the device fails or has no memory left, and when
/// a weight is not what the model's table of parameters says.
pub trait RowOps<B: Backend> {
    /// A block of the policy.
    type Block<'a>: BlockOps<B>
    where
        Self: 'a;

    /// Returns the number of decoder blocks.
    fn num_blocks(&self) -> usize;

    /// Opens a block.
    fn block(&self, index: usize) -> Result<Self::Block<'_>>;

    /// Returns the embedded row `[T, C]`.
    fn embed(&self) -> Result<B::Activation>;

    /// Adds the embedding's gradient, given that of the embedded row, where it is trained.
    fn embed_backward(&self, gx: &B::Activation, gradients: &mut B::Gradients) -> Result<()>;

    /// Returns the log-probs of the completion tokens `[N]`, given the last block's output.
    fn log_probs(&self, x: &B::Activation) -> Result<Vec<f32>>;

    /// Runs the last norm and the head on the last block's output `[T, C]`. With
    /// [`Keep::Nothing`] there is no backward pass.
    fn head(&self, x: &B::Activation, keep: Keep) -> Result<(HeadOutput, B::HeadTape)>;

    /// Returns the gradient of the last block's output `[T, C]`, given ∂loss/∂log p `[N]`.
    fn head_backward(
        &self,
        tape: B::HeadTape,
        output: HeadOutput,
        upstream: &[f32],
        gradients: &mut B::Gradients,
    ) -> Result<B::Activation>;
}

/// A block that is opened for a pass over one row, with the policy's adapter on it. Passes without
/// a tape may have adapters on parts of the row, too.
///
/// The functions fail as those of [`RowOps`] do. Each backward function adds the gradients of its
/// parameters, where they are trained.
pub trait BlockOps<B: Backend> {
    /// Returns the block as data.
    fn spec(&self) -> &BlockSpec;

    /// Returns memory for `[q | k | v]` `[T, (H + 2K)·D]`, of any content.
    fn new_qkv(&self) -> Result<B::Activation>;

    /// Returns memory for [`BlockOps::feed_forward`].
    fn new_gate_up(&self) -> Result<B::GateUpSpace>;

    /// Returns the norm of the residual stream.
    fn norm(&self, norm: StreamNorm, x: &B::Activation) -> Result<B::Operand<'static>>;

    /// Returns attention's output as an operand.
    fn attention_operand<'a>(&self, output: &'a B::Activation) -> B::Operand<'a>;

    /// Writes the outputs of a group of linear layers to `out`.
    fn project(
        &self,
        group: LinearGroup,
        input: &B::Operand<'_>,
        out: &mut B::Activation,
    ) -> Result<B::LowRank>;

    /// Adds the output of a linear layer to the residual stream.
    fn add_to_stream(
        &self,
        group: LinearGroup,
        input: &B::Operand<'_>,
        x: &mut B::Activation,
    ) -> Result<B::LowRank>;

    /// Norms every head of the queries and keys in place.
    fn head_norms(&self, qkv: &mut B::Activation) -> Result<()>;

    /// Rotates queries and keys in place.
    fn rotate(&self, qkv: &mut B::Activation, direction: Direction) -> Result<()>;

    /// Computes attention.
    fn attention(&self, qkv: &B::Activation) -> Result<Attended<B>>;

    /// Computes gate and up, and activation(gate) ⊙ up. With `save_tape` the result has
    /// `[gate | up]`.
    fn feed_forward(
        &self,
        space: B::GateUpSpace,
        input: B::Operand<'static>,
        save_tape: bool,
    ) -> Result<Gated<B>>;

    /// Returns the gradient of `[gate | up]`, given that of the residual stream: the backward pass
    /// of down and of the activation. `low_rank` is x·Aᵀ of down.
    fn feed_forward_backward(
        &self,
        gate_up: B::GateUp,
        low_rank: &B::LowRank,
        gx: &B::Activation,
        gradients: &mut B::Gradients,
    ) -> Result<B::GateUpGradient>;

    /// Returns the gradient of the input of a group of linear layers, given that of its output.
    fn linear_backward(
        &self,
        group: LinearGroup,
        input: &B::Operand<'_>,
        low_rank: &B::LowRank,
        g: OutputGradient<'_, B>,
        gradients: &mut B::Gradients,
    ) -> Result<B::Activation>;

    /// Returns the gradient of `qkv`, given that of attention's output.
    fn attention_backward(
        &self,
        qkv: &B::Activation,
        attended: &Attended<B>,
        g: &B::Activation,
    ) -> Result<B::Activation>;

    /// Turns the gradient of normed queries and keys into that of `before`, which they were before
    /// their norms.
    fn head_norms_backward(
        &self,
        before: &B::Activation,
        dqkv: &mut B::Activation,
        gradients: &mut B::Gradients,
    ) -> Result<()>;

    /// Adds the gradient of a norm's input `x` to that of the residual stream, given that of its
    /// output, `g`.
    fn norm_backward(
        &self,
        norm: StreamNorm,
        x: &B::Activation,
        g: &B::Activation,
        gx: &mut B::Activation,
        gradients: &mut B::Gradients,
    ) -> Result<()>;
}
