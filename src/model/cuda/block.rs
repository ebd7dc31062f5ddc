//! The operations of one decoder block on the device: the residual stream is f32, all other
//! activations are in the pass's precision.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use super::attention::Attention;
use super::backend::{CudaBackend, Operand};
use super::gradients::GradientBuffers;
use super::projections::{CudaLinearGroup, GroupBackward};
use super::row::DeviceRow;
use super::sizes::BlockShape;
use super::weights::{BlockWeights, DeviceAdapter};
use crate::compute::cpu::rope::Direction;
use crate::compute::cuda::gpu::{Gpu, Memory};
use crate::compute::cuda::kernels::Kind;
use crate::compute::cuda::ops::{self, Columns, HeadColumns, HeadNormBackward, RmsNormBackward};
use crate::model::backend::{Attended, BlockOps, Gated, OutputGradient, StreamNorm};
use crate::model::params::{BlockParam, LinearGroup, ParamId};
use crate::model::spec::{Activation, BlockSpec, FeedForward};

/// A block with its adapter, on a row.
pub(super) struct Block<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub kind: Kind,
    pub index: usize,
    pub spec: &'a BlockSpec,
    pub shape: BlockShape,
    /// ε of the norms.
    pub eps: f32,
    pub weights: &'a BlockWeights,
    pub adapter: Option<&'a DeviceAdapter>,
    /// Adapters on parts of the row.
    pub parts: &'a [(Range<usize>, Arc<DeviceAdapter>)],
    pub row: &'a DeviceRow,
}

impl Block<'_> {
    fn group(&self, which: LinearGroup) -> CudaLinearGroup<'_> {
        let adapter = self.adapter.map(|a| a.group(self.index, which));
        CudaLinearGroup {
            gpu: self.gpu,
            kind: self.kind,
            weights: self.weights.groups.get(which),
            adapter,
        }
    }

    /// Runs a group: y = keep·y + its outputs. Returns x·Aᵀ of the policy's own adapter.
    fn run_group(
        &self,
        which: LinearGroup,
        x: &Memory,
        y: &Memory,
        keep: bool,
    ) -> Result<Option<Memory>> {
        let group = self.group(which);
        let u = group.forward(x, self.row.tokens, y, keep)?;
        for (rows, adapter) in self.parts {
            group.add_low_rank(adapter.group(self.index, which), x, rows.clone(), y)?;
        }
        Ok(u)
    }

    /// Places of `heads` heads of `[q | k | v]`, from column `first` on.
    fn head_columns(&self, first: usize, heads: usize) -> HeadColumns {
        HeadColumns {
            rows: self.row.tokens,
            stride: self.shape.qkv(),
            first,
            heads,
            dim: self.shape.heads.dim,
        }
    }

    /// Places of queries and keys, each with its norm.
    fn normed_heads(&self) -> [(HeadColumns, BlockParam); 2] {
        let h = self.shape.heads;
        let (queries, keys) =
            (self.head_columns(0, h.query), self.head_columns(h.query * h.dim, h.key));
        [(queries, BlockParam::QueryNorm), (keys, BlockParam::KeyNorm)]
    }

    fn over_row(&self) -> Attention<'_> {
        Attention { gpu: self.gpu, kind: self.kind, shape: self.shape, row: self.row }
    }

    fn activation(&self) -> Activation {
        let FeedForward::Gated { activation, .. } = self.spec.feed_forward;
        activation
    }

    fn gated(&self, gate_up: &Memory) -> Result<Memory> {
        let width = self.shape.feed_forward;
        let y = self.gpu.dirty(self.kind, self.row.tokens * width)?;
        ops::gated(self.gpu, self.activation(), &y, gate_up, width)?;
        Ok(y)
    }

    fn head_norm_backward(
        &self,
        g: &Memory,
        before: &Memory,
        w: &Memory,
        heads: HeadColumns,
        slot: Option<&Memory>,
    ) -> Result<()> {
        let (gpu, dim) = (self.gpu, heads.dim);
        let parts = ops::weight_partials(heads.items());
        let partial = slot.map(|_| gpu.dirty(Kind::F32, parts * dim)).transpose()?;
        ops::head_norm_backward(
            gpu,
            HeadNormBackward { g, partial: partial.as_ref(), before, w, eps: self.eps },
            heads,
        )?;
        match (slot, &partial) {
            (Some(slot), Some(partial)) => ops::column_sum(gpu, slot, Columns::all(partial, dim)),
            _ => Ok(()),
        }
    }
}

impl BlockOps<CudaBackend> for Block<'_> {
    fn spec(&self) -> &BlockSpec {
        self.spec
    }

    fn new_qkv(&self) -> Result<Memory> {
        self.gpu.dirty(self.kind, self.row.tokens * self.shape.qkv())
    }

    fn new_gate_up(&self) -> Result<Memory> {
        self.gpu.dirty(self.kind, self.row.tokens * self.shape.gate_up())
    }

    fn norm(&self, norm: StreamNorm, x: &Memory) -> Result<Operand<'static>> {
        let n = self.gpu.dirty(self.kind, self.row.tokens * self.shape.hidden)?;
        ops::rms_norm(self.gpu, &n, x, self.weights.norm(norm.weight())?, self.eps)?;
        Ok(Operand::Owned(n))
    }

    fn attention_operand<'b>(&self, output: &'b Memory) -> Operand<'b> {
        Operand::Borrowed(output)
    }

    fn project(
        &self,
        group: LinearGroup,
        input: &Operand<'_>,
        out: &mut Memory,
    ) -> Result<Option<Memory>> {
        self.run_group(group, input, out, false)
    }

    fn add_to_stream(
        &self,
        group: LinearGroup,
        input: &Operand<'_>,
        x: &mut Memory,
    ) -> Result<Option<Memory>> {
        self.run_group(group, input, x, true)
    }

    fn head_norms(&self, qkv: &mut Memory) -> Result<()> {
        let mut heads = self.normed_heads().into_iter();
        heads.try_for_each(|(heads, norm)| {
            ops::head_norm(self.gpu, qkv, self.weights.norm(norm)?, heads, self.eps)
        })
    }

    fn rotate(&self, qkv: &mut Memory, direction: Direction) -> Result<()> {
        let (h, (cos, sin)) = (self.shape.heads, &self.row.ropes[self.spec.attention().rope]);
        ops::rope(self.gpu, qkv, cos, sin, self.head_columns(0, h.query + h.key), direction)
    }

    fn attention(&self, qkv: &Memory) -> Result<Attended<CudaBackend>> {
        self.over_row().forward(qkv)
    }

    fn feed_forward(
        &self,
        space: Memory,
        input: Operand<'static>,
        _save_tape: bool,
    ) -> Result<Gated<CudaBackend>> {
        let low_rank = self.run_group(LinearGroup::GateUp, &input, &space, false)?;
        drop(input);
        let y = self.gated(&space)?;
        Ok(Gated { y: Operand::Owned(y), gate_up: Some(space), low_rank })
    }

    fn feed_forward_backward(
        &self,
        gate_up: Memory,
        low_rank: &Option<Memory>,
        gx: &Memory,
        gradients: &mut GradientBuffers,
    ) -> Result<Memory> {
        let y = Operand::Owned(self.gated(&gate_up)?);
        let gy = self.linear_backward(
            LinearGroup::Down,
            &y,
            low_rank,
            OutputGradient::Stream(gx),
            gradients,
        )?;
        ops::gated_backward(self.gpu, self.activation(), &gate_up, &gy, self.shape.feed_forward)?;
        Ok(gate_up)
    }

    fn linear_backward(
        &self,
        group: LinearGroup,
        input: &Operand<'_>,
        low_rank: &Option<Memory>,
        g: OutputGradient<'_, CudaBackend>,
        gradients: &mut GradientBuffers,
    ) -> Result<Memory> {
        let run = |g: &Memory| {
            let pass = GroupBackward {
                block: self.index,
                tokens: self.row.tokens,
                x: input,
                u: low_rank.as_ref(),
                g,
            };
            self.group(group).backward(pass, gradients)
        };
        match g {
            OutputGradient::Stream(gx) => match round(self.gpu, self.kind, gx)? {
                Some(rounded) => run(&rounded),
                None => run(gx),
            },
            OutputGradient::Qkv(g) | OutputGradient::GateUp(g) => run(g),
        }
    }

    fn attention_backward(
        &self,
        qkv: &Memory,
        attended: &Attended<CudaBackend>,
        g: &Memory,
    ) -> Result<Memory> {
        self.over_row().backward(qkv, attended, g)
    }

    fn head_norms_backward(
        &self,
        before: &Memory,
        dqkv: &mut Memory,
        gradients: &mut GradientBuffers,
    ) -> Result<()> {
        self.normed_heads().into_iter().try_for_each(|(heads, norm)| {
            let slot = gradients.slot(ParamId::Block(self.index, norm));
            self.head_norm_backward(dqkv, before, self.weights.norm(norm)?, heads, slot)
        })
    }

    fn norm_backward(
        &self,
        norm: StreamNorm,
        x: &Memory,
        g: &Memory,
        gx: &mut Memory,
        gradients: &mut GradientBuffers,
    ) -> Result<()> {
        let slot = gradients.slot(ParamId::Block(self.index, norm.weight()));
        NormBackward { x, w: self.weights.norm(norm.weight())?, g, eps: self.eps, slot }
            .add_to(self.gpu, gx)
    }
}

/// Returns `gx` rounded to the pass's precision; `None` where that is f32 already.
fn round(gpu: &Arc<Gpu>, kind: Kind, gx: &Memory) -> Result<Option<Memory>> {
    if kind == Kind::F32 {
        return Ok(None);
    }
    let g = gpu.dirty(kind, gx.len())?;
    ops::cast_bf16(gpu, &g, gx)?;
    Ok(Some(g))
}

/// The backward pass of an RMSNorm over rows.
pub(super) struct NormBackward<'a> {
    /// The norm's input `[n, width]`.
    pub x: &'a Memory,
    /// `[width]`
    pub w: &'a Memory,
    /// Gradient of the output `[n, width]`.
    pub g: &'a Memory,
    pub eps: f32,
    /// Where the gradient of `w` is added up, if it is trained.
    pub slot: Option<&'a Memory>,
}

impl NormBackward<'_> {
    /// Adds the gradient of the input to `gx`, and that of the weight to its slot.
    pub fn add_to(&self, gpu: &Arc<Gpu>, gx: &Memory) -> Result<()> {
        let NormBackward { x, w, g, eps, slot } = *self;
        let width = w.len();
        let rows = x.len().checked_div(width).unwrap_or(0);
        let inverse = gpu.dirty(Kind::F32, rows)?;
        ops::rms_norm_backward(gpu, RmsNormBackward { gx, inverse: &inverse, x, w, g, eps })?;
        let Some(slot) = slot else { return Ok(()) };
        let partial = gpu.dirty(Kind::F32, ops::weight_partials(rows) * width)?;
        ops::rms_norm_weight(gpu, &partial, x, &inverse, g, width)?;
        ops::column_sum(gpu, slot, Columns::all(&partial, width))
    }
}
