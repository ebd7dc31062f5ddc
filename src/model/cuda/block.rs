//! One decoder block on the device, forward and backward: [`crate::model::block`] with the residual stream in f32 and all other activations in the
//! pass's precision.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use super::attention::{Attended, Attention};
use super::gpu::{Gpu, Memory};
use super::gradients::GradientBuffers;
use super::kernels::Kind;
use super::ops::{self, Columns, HeadColumns, HeadNormBackward, RmsNormBackward};
use super::projections::Group;
use super::row::DeviceRow;
use super::sizes::BlockShape;
use super::weights::{BlockWeights, DeviceAdapter};
use crate::model::ops::rope::Direction;
use crate::model::params::{BlockParam, LinearGroup, ParamId, PerGroup};

/// What the backward pass needs of one block. [`BlockShape::tape_bytes`] is its size.
pub(super) struct BlockTape {
    x: Memory,
    qkv: Memory,
    before_norm: Option<Memory>,
    attended: Memory,
    lse: Memory,
    middle: Memory,
    gate_up: Memory,
    /// x·Aᵀ of each group.
    low_rank: PerGroup<Option<Memory>>,
}

/// A block with its adapter, on a row.
pub(super) struct Block<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub kind: Kind,
    pub index: usize,
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
    fn group(&self, which: LinearGroup) -> Group<'_> {
        let adapter = self.adapter.map(|a| a.group(self.index, which));
        Group { gpu: self.gpu, kind: self.kind, weights: self.weights.groups.get(which), adapter }
    }

    fn project(&self, which: LinearGroup, x: &Memory, y: &Memory, keep: bool) -> Result<Option<Memory>> {
        let group = self.group(which);
        let u = group.forward(x, self.row.tokens, y, keep)?;
        for (rows, adapter) in self.parts {
            group.add_low_rank(adapter.group(self.index, which), x, rows.clone(), y)?;
        }
        Ok(u)
    }

    fn norm(&self, x: &Memory, w: &Memory) -> Result<Memory> {
        let n = self.gpu.dirty(self.kind, self.row.tokens * self.shape.hidden)?;
        ops::rms_norm(self.gpu, &n, x, w, self.eps)?;
        Ok(n)
    }

    /// Rotates queries and keys, or back.
    fn rotate(&self, qkv: &Memory, direction: Direction) -> Result<()> {
        let h = self.shape.heads;
        ops::rope(self.gpu, qkv, &self.row.cos, &self.row.sin, self.head_columns(0, h.query + h.key), direction)
    }

    /// Places of `heads` heads of `[q | k | v]`, from column `first` on.
    fn head_columns(&self, first: usize, heads: usize) -> HeadColumns {
        HeadColumns { rows: self.row.tokens, stride: self.shape.qkv(), first, heads, dim: self.shape.heads.dim }
    }

    /// Queries and keys with their norms: weight, places, gradient.
    fn head_norms(&self) -> impl Iterator<Item = (&Memory, HeadColumns, BlockParam)> {
        let h = self.shape.heads;
        let (queries, keys) = (self.head_columns(0, h.query), self.head_columns(h.query * h.dim, h.key));
        let both = self.weights.qk_norm.as_ref();
        both.into_iter().flat_map(move |(q, k)| [(q, queries, BlockParam::QueryNorm), (k, keys, BlockParam::KeyNorm)])
    }

    fn attention(&self) -> Attention<'_> {
        Attention { gpu: self.gpu, kind: self.kind, shape: self.shape, row: self.row }
    }

    fn swiglu(&self, gate_up: &Memory) -> Result<Memory> {
        let width = self.shape.feed_forward;
        let y = self.gpu.dirty(self.kind, self.row.tokens * width)?;
        ops::swiglu(self.gpu, &y, gate_up, width)?;
        Ok(y)
    }

    /// Runs the block on `x` `[T, C]` in place; with `keep`, leaves a tape.
    pub fn forward(&self, x: &Memory, keep: bool) -> Result<Option<BlockTape>> {
        let (gpu, kind, tokens, shape) = (self.gpu, self.kind, self.row.tokens, self.shape);
        let qkv = gpu.dirty(kind, tokens * shape.qkv())?;
        let n = self.norm(x, &self.weights.input_norm)?;
        let u_qkv = self.project(LinearGroup::Qkv, &n, &qkv, false)?;
        drop(n);
        let before_norm = if keep && self.weights.qk_norm.is_some() { Some(gpu.copy(&qkv)?) } else { None };
        for (w, heads, _) in self.head_norms() {
            ops::head_norm(gpu, &qkv, w, heads, self.eps)?;
        }
        self.rotate(&qkv, Direction::Forward)?;
        let (attended, lse) = self.attention().forward(&qkv)?;
        let input = keep.then(|| gpu.copy(x)).transpose()?;
        let u_output = self.project(LinearGroup::Output, &attended, x, true)?;

        let gate_up = gpu.dirty(kind, tokens * shape.gate_up())?;
        let n = self.norm(x, &self.weights.post_norm)?;
        let u_gate_up = self.project(LinearGroup::GateUp, &n, &gate_up, false)?;
        drop(n);
        let y = self.swiglu(&gate_up)?;
        let middle = keep.then(|| gpu.copy(x)).transpose()?;
        let u_down = self.project(LinearGroup::Down, &y, x, true)?;
        Ok(match (input, middle) {
            (Some(x), Some(middle)) => {
                let low_rank = PerGroup { qkv: u_qkv, output: u_output, gate_up: u_gate_up, down: u_down };
                Some(BlockTape { x, qkv, before_norm, attended, lse, middle, gate_up, low_rank })
            }
            _ => None,
        })
    }

    /// Turns `gx` `[T, C]` from the gradient of the block's output into that of its input.
    pub fn backward(&self, tape: BlockTape, gx: &Memory, gradients: &GradientBuffers) -> Result<()> {
        let (gpu, kind, tokens) = (self.gpu, self.kind, self.row.tokens);
        let BlockTape { x, qkv, before_norm, attended, lse, middle, gate_up, low_rank } = tape;
        let PerGroup { qkv: u_qkv, output: u_output, gate_up: u_gate_up, down: u_down } = low_rank;
        let group = |which, x: &Memory, u: Option<&Memory>, g: &Memory| self.group(which).backward(self.index, x, u, g, tokens, gradients);
        let rounded = |gx: &Memory| round(gpu, kind, gx);

        // Feed-forward part.
        let y = self.swiglu(&gate_up)?;
        let gy = match rounded(gx)? {
            Some(g) => group(LinearGroup::Down, &y, u_down.as_ref(), &g)?,
            None => group(LinearGroup::Down, &y, u_down.as_ref(), gx)?,
        };
        drop((y, u_down));
        ops::swiglu_backward(gpu, &gate_up, &gy, self.shape.feed_forward)?;
        drop(gy);
        let n = self.norm(&middle, &self.weights.post_norm)?;
        let gn = group(LinearGroup::GateUp, &n, u_gate_up.as_ref(), &gate_up)?;
        drop((n, gate_up, u_gate_up));
        self.norm_backward(gx, &middle, &self.weights.post_norm, &gn, BlockParam::PostNorm, gradients)?;
        drop((gn, middle));

        // Attention part.
        let go = match rounded(gx)? {
            Some(g) => group(LinearGroup::Output, &attended, u_output.as_ref(), &g)?,
            None => group(LinearGroup::Output, &attended, u_output.as_ref(), gx)?,
        };
        let forward = Attended { qkv: &qkv, output: &attended, lse: &lse };
        let dqkv = self.attention().backward(forward, &go)?;
        drop((go, attended, lse, qkv, u_output));
        self.rotate(&dqkv, Direction::Backward)?;
        if let Some(before) = &before_norm {
            for (w, heads, slot) in self.head_norms() {
                self.head_norm_backward(&dqkv, before, w, heads, gradients.slot(ParamId::Block(self.index, slot)))?;
            }
        }
        let n = self.norm(&x, &self.weights.input_norm)?;
        let gn = group(LinearGroup::Qkv, &n, u_qkv.as_ref(), &dqkv)?;
        self.norm_backward(gx, &x, &self.weights.input_norm, &gn, BlockParam::InputNorm, gradients)
    }

    fn head_norm_backward(&self, g: &Memory, before: &Memory, w: &Memory, heads: HeadColumns, slot: Option<&Memory>) -> Result<()> {
        let (gpu, dim) = (self.gpu, heads.dim);
        let parts = ops::weight_partials(heads.items());
        let partial = slot.map(|_| gpu.dirty(Kind::F32, parts * dim)).transpose()?;
        ops::head_norm_backward(gpu, HeadNormBackward { g, partial: partial.as_ref(), before, w, eps: self.eps }, heads)?;
        match (slot, &partial) {
            (Some(slot), Some(partial)) => ops::column_sum(gpu, slot, Columns::all(partial, dim)),
            _ => Ok(()),
        }
    }

    fn norm_backward(&self, gx: &Memory, x: &Memory, w: &Memory, g: &Memory, norm: BlockParam, gradients: &GradientBuffers) -> Result<()> {
        let slot = gradients.slot(ParamId::Block(self.index, norm));
        NormBackward { x, w, g, eps: self.eps, slot }.add_to(self.gpu, gx)
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
