//! The operations of one decoder block on the device. The residual stream and the log-sum-exps are
//! f32, all other activations are in the pass's precision.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use super::attention::Attention;
use super::backend::{CudaBackend, CudaOperand};
use super::gradients::GradientBuffers;
use super::projections::{CudaLinearGroup, GroupBackward};
use super::row::{DeviceRope, DeviceRow, DeviceTable};
use super::sizes::BlockShape;
use super::weights::{BlockWeights, DeviceAdapter};
use crate::compute::cpu::rope::Direction;
use crate::compute::cuda::gpu::{Gpu, Memory};
use crate::compute::cuda::kernels::Kind;
use crate::compute::cuda::ops::{self, Columns, HeadLayout, HeadNormBackward, RmsNormBackward};
use crate::model::backend::{Attended, BlockOps, Gated, OutputGradient, StreamNorm};
use crate::model::params::{BlockParam, LinearGroup, ParamId};
use crate::model::spec::{ActivationFunction, BlockSpec, FeedForward, QkNorm};

/// A block with its adapter, opened for a pass over a row.
pub(super) struct CudaBlock<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub kind: Kind,
    pub index: usize,
    pub spec: &'a BlockSpec,
    pub shape: BlockShape,
    /// ε of the norms.
    pub eps: f32,
    pub weights: &'a BlockWeights,
    pub adapter: Option<&'a DeviceAdapter>,
    /// Token ranges of the row that have adapters of their own.
    pub parts: &'a [(Range<usize>, Arc<DeviceAdapter>)],
    pub row: &'a DeviceRow,
}

impl CudaBlock<'_> {
    fn group(&self, which: LinearGroup) -> CudaLinearGroup<'_> {
        let adapter = self.adapter.map(|a| a.group(self.index, which));
        CudaLinearGroup {
            gpu: self.gpu,
            kind: self.kind,
            weights: self.weights.groups.get(which),
            adapter,
        }
    }

    /// Runs a group of linear layers. Adds its outputs to `y` if `accumulate` is true, otherwise
    /// overwrites `y`. Returns x·Aᵀ of the policy's own adapter.
    fn run_group(
        &self,
        which: LinearGroup,
        x: &Memory,
        y: &Memory,
        accumulate: bool,
    ) -> Result<Option<Memory>> {
        let group = self.group(which);
        let u = group.forward(x, self.row.tokens, y, accumulate)?;
        for (rows, adapter) in self.parts {
            group.add_low_rank(adapter.group(self.index, which), x, rows.clone(), y)?;
        }
        Ok(u)
    }

    /// Returns the columns of `heads` heads in `[q | k | v]`, starting at column `first`.
    fn head_columns(&self, first: usize, heads: usize) -> HeadLayout {
        HeadLayout {
            rows: self.row.tokens,
            stride: self.shape.qkv(),
            first,
            heads,
            dim: self.shape.heads.dim,
        }
    }

    /// Returns the columns of the queries and of the keys in `[q | k | v]`, each with its norm.
    fn normed_heads(&self) -> [(HeadLayout, BlockParam); 2] {
        let h = self.shape.heads;
        let (queries, keys) = (
            self.head_columns(0, h.query),
            self.head_columns(h.query * h.dim, h.key),
        );
        // All heads are normed as one.
        let joined = |heads: HeadLayout| match self.spec.attention().qk_norm {
            QkNorm::AllHeads => HeadLayout {
                heads: 1,
                dim: heads.heads * heads.dim,
                ..heads
            },
            QkNorm::PerHead | QkNorm::Absent => heads,
        };
        [
            (joined(queries), BlockParam::QueryNorm),
            (joined(keys), BlockParam::KeyNorm),
        ]
    }

    fn attention_of_row(&self) -> Attention<'_> {
        Attention {
            gpu: self.gpu,
            kind: self.kind,
            shape: self.shape,
            row: self.row,
        }
    }

    fn activation(&self) -> ActivationFunction {
        let FeedForward::Gated { activation, .. } = self.spec.feed_forward;
        activation
    }

    fn gated(&self, gate_up: &Memory) -> Result<Memory> {
        let width = self.shape.feed_forward;
        let y = self.gpu.uninit(self.kind, self.row.tokens * width)?;
        ops::gated(self.gpu, self.activation(), &y, gate_up, width)?;
        Ok(y)
    }

    fn head_norm_backward(
        &self,
        g: &Memory,
        before: &Memory,
        w: &Memory,
        heads: HeadLayout,
        slot: Option<&Memory>,
    ) -> Result<()> {
        let (gpu, dim) = (self.gpu, heads.dim);
        let parts = ops::weight_partials(heads.items());
        let partial = slot
            .map(|_| gpu.uninit(Kind::F32, parts * dim))
            .transpose()?;
        ops::head_norm_backward(
            gpu,
            HeadNormBackward {
                g,
                partial: partial.as_ref(),
                before,
                w,
                eps: self.eps,
            },
            heads,
        )?;
        match (slot, &partial) {
            (Some(slot), Some(partial)) => ops::column_sum(gpu, slot, Columns::all(partial, dim)),
            _ => Ok(()),
        }
    }
}

impl BlockOps<CudaBackend> for CudaBlock<'_> {
    fn spec(&self) -> &BlockSpec {
        self.spec
    }

    fn new_qkv(&self) -> Result<Memory> {
        self.gpu
            .uninit(self.kind, self.row.tokens * self.shape.qkv())
    }

    fn new_stream(&self) -> Result<Memory> {
        self.gpu
            .zeros(Kind::F32, self.row.tokens * self.shape.hidden)
    }

    fn new_gate_up(&self) -> Result<Memory> {
        self.gpu
            .uninit(self.kind, self.row.tokens * self.shape.gate_up())
    }

    fn norm(&self, norm: StreamNorm, x: &Memory) -> Result<CudaOperand<'static>> {
        let n = self
            .gpu
            .uninit(self.kind, self.row.tokens * self.shape.hidden)?;
        ops::rms_norm(self.gpu, &n, x, self.weights.norm(norm.weight())?, self.eps)?;
        Ok(CudaOperand::Owned(n))
    }

    fn stream_operand(&self, x: &Memory) -> Result<CudaOperand<'static>> {
        let operand = match round(self.gpu, self.kind, x)? {
            Some(rounded) => rounded,
            None => x.copy()?,
        };
        Ok(CudaOperand::Owned(operand))
    }

    fn attention_operand<'b>(&self, output: &'b Memory) -> CudaOperand<'b> {
        CudaOperand::Borrowed(output)
    }

    fn project(
        &self,
        group: LinearGroup,
        input: &CudaOperand<'_>,
        out: &mut Memory,
    ) -> Result<Option<Memory>> {
        self.run_group(group, input, out, false)
    }

    fn add_to_stream(
        &self,
        group: LinearGroup,
        input: &CudaOperand<'_>,
        x: &mut Memory,
    ) -> Result<Option<Memory>> {
        self.run_group(group, input, x, true)
    }

    fn add_scaled(&self, factor: f32, y: &Memory, x: &mut Memory) -> Result<()> {
        ops::add(self.gpu, x, &self.scaled(factor, y)?)
    }

    fn scaled(&self, factor: f32, x: &Memory) -> Result<Memory> {
        let y = self.gpu.uninit(Kind::F32, x.len())?;
        let factors = self.gpu.upload(Kind::F32, &vec![factor; self.row.tokens])?;
        ops::scale_rows(self.gpu, &y, x, &factors, self.shape.hidden)?;
        Ok(y)
    }

    fn add_norm(&self, norm: StreamNorm, y: &Memory, x: &mut Memory) -> Result<()> {
        let normed = self.gpu.uninit(Kind::F32, y.len())?;
        ops::rms_norm(
            self.gpu,
            &normed,
            y,
            self.weights.norm(norm.weight())?,
            self.eps,
        )?;
        match self.spec.output_factor {
            1.0 => ops::add(self.gpu, x, &normed),
            factor => self.add_scaled(factor, &normed, x),
        }
    }

    fn head_norms(&self, qkv: &mut Memory) -> Result<()> {
        let mut heads = self.normed_heads().into_iter();
        heads.try_for_each(|(heads, norm)| {
            ops::head_norm(self.gpu, qkv, self.weights.norm(norm)?, heads, self.eps)
        })
    }

    fn rotate(&self, rope: usize, qkv: &mut Memory, direction: Direction) -> Result<()> {
        let h = self.shape.heads;
        let DeviceRope { table, queries } = &self.row.ropes[rope];
        let rotate =
            |table: &DeviceTable, heads| ops::rope(self.gpu, qkv, table.tables(), heads, direction);
        match queries {
            None => rotate(table, self.head_columns(0, h.query + h.key)),
            Some(queries) => {
                rotate(queries, self.head_columns(0, h.query))?;
                rotate(table, self.head_columns(h.query * h.dim, h.key))
            }
        }
    }

    fn attention(&self, qkv: &Memory) -> Result<Attended<CudaBackend>> {
        self.attention_of_row().forward(qkv)
    }

    fn feed_forward(
        &self,
        space: Memory,
        input: CudaOperand<'static>,
        _save_tape: bool,
    ) -> Result<Gated<CudaBackend>> {
        let low_rank = self.run_group(LinearGroup::GateUp, &input, &space, false)?;
        drop(input);
        let y = self.gated(&space)?;
        Ok(Gated {
            y: CudaOperand::Owned(y),
            gate_up: Some(space),
            low_rank,
        })
    }

    fn feed_forward_backward(
        &self,
        gate_up: Memory,
        low_rank: &Option<Memory>,
        g: &Memory,
        gradients: &mut GradientBuffers,
    ) -> Result<Memory> {
        let y = CudaOperand::Owned(self.gated(&gate_up)?);
        let gy = self.linear_backward(
            LinearGroup::Down,
            &y,
            low_rank,
            OutputGradient::Stream(g),
            gradients,
        )?;
        ops::gated_backward(
            self.gpu,
            self.activation(),
            &gate_up,
            &gy,
            self.shape.feed_forward,
        )?;
        Ok(gate_up)
    }

    fn linear_backward(
        &self,
        group: LinearGroup,
        input: &CudaOperand<'_>,
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
        self.attention_of_row().backward(qkv, attended, g)
    }

    fn head_norms_backward(
        &self,
        before: &Memory,
        dqkv: &mut Memory,
        gradients: &mut GradientBuffers,
    ) -> Result<()> {
        self.normed_heads()
            .into_iter()
            .try_for_each(|(heads, norm)| {
                let slot = gradients.get(ParamId::Block(self.index, norm));
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
        let slot = gradients.get(ParamId::Block(self.index, norm.weight()));
        NormBackward {
            x,
            w: self.weights.norm(norm.weight())?,
            g,
            eps: self.eps,
            slot,
        }
        .add_to(self.gpu, gx)
    }

    fn add_gradient(&self, g: &Memory, gx: &mut Memory) -> Result<()> {
        if g.kind() == Kind::F32 {
            return ops::add(self.gpu, gx, g);
        }
        let widened = self.gpu.uninit(Kind::F32, g.len())?;
        ops::cast_f32(self.gpu, &widened, g)?;
        ops::add(self.gpu, gx, &widened)
    }
}

/// Rounds `gx` to the pass's precision. Returns `None` if that is f32.
fn round(gpu: &Arc<Gpu>, kind: Kind, gx: &Memory) -> Result<Option<Memory>> {
    if kind == Kind::F32 {
        return Ok(None);
    }
    let g = gpu.uninit(kind, gx.len())?;
    ops::cast_bf16(gpu, &g, gx)?;
    Ok(Some(g))
}

/// The backward pass of an RMSNorm over rows.
pub(super) struct NormBackward<'a> {
    /// The norm's input `[n, width]`.
    pub x: &'a Memory,
    /// The norm's factors `[width]`.
    pub w: &'a Memory,
    /// Gradient of the norm's output `[n, width]`.
    pub g: &'a Memory,
    pub eps: f32,
    /// Buffer that accumulates the gradient of `w`. `None` if `w` is not trained.
    pub slot: Option<&'a Memory>,
}

impl NormBackward<'_> {
    /// Adds the gradient of the input to `gx`, and the gradient of the weight to `slot`.
    pub fn add_to(&self, gpu: &Arc<Gpu>, gx: &Memory) -> Result<()> {
        let NormBackward { x, w, g, eps, slot } = *self;
        let width = w.len();
        let rows = x.len().checked_div(width).unwrap_or(0);
        let inverse = gpu.uninit(Kind::F32, rows)?;
        ops::rms_norm_backward(
            gpu,
            RmsNormBackward {
                gx,
                inverse: &inverse,
                x,
                w,
                g,
                eps,
            },
        )?;
        let Some(slot) = slot else { return Ok(()) };
        let partial = gpu.uninit(Kind::F32, ops::weight_partials(rows) * width)?;
        ops::rms_norm_weight(gpu, &partial, x, &inverse, g, width)?;
        ops::column_sum(gpu, slot, Columns::all(&partial, width))
    }
}
