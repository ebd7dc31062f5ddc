//! One decoder block on the device, forward and backward: [`crate::model::block`] with the residual stream in f32 and all other activations in the
//! pass's precision.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use super::gpu::{Gpu, Memory};
use super::gradients::GradientBuffers;
use super::kernels::{Arg, Kind, Launch};
use super::projections::Group;
use super::row::DeviceRow;
use super::weights::{BlockWeights, DeviceAdapter};
use crate::model::gradients::{Place, Slot};
use crate::model::ops::attention::Heads;

/// Rows whose products a block of threads sums for a norm's gradient.
const ROWS_A_BLOCK: usize = 64;

/// What the backward pass needs of one block.
pub(super) struct BlockTape {
    x: Memory,
    qkv: Memory,
    before_norm: Option<Memory>,
    attended: Memory,
    lse: Memory,
    middle: Memory,
    gate_up: Memory,
    low_rank: [Option<Memory>; 4],
}

/// Shapes of a block.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub hidden: usize,
    pub feed_forward: usize,
    pub heads: Heads,
    pub eps: f32,
}

/// A block with its adapter, on a row.
pub(super) struct Block<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub kind: Kind,
    pub index: usize,
    pub shape: Shape,
    pub weights: &'a BlockWeights,
    pub adapter: Option<&'a DeviceAdapter>,
    /// Adapters on parts of the row.
    pub parts: &'a [(Range<usize>, Arc<DeviceAdapter>)],
    pub row: &'a DeviceRow,
}

impl Block<'_> {
    fn group(&self, which: usize) -> Group<'_> {
        let adapter = self.adapter.map(|a| a.group(self.index, which));
        Group { gpu: self.gpu, kind: self.kind, weights: &self.weights.groups[which], adapter }
    }

    fn project(&self, which: usize, x: &Memory, y: &Memory, keep: bool) -> Result<Option<Memory>> {
        let group = self.group(which);
        let u = group.forward(x, self.row.tokens, y, keep)?;
        for (rows, adapter) in self.parts {
            group.add_low_rank(adapter.group(self.index, which), x, rows.clone(), y)?;
        }
        Ok(u)
    }

    fn norm(&self, x: &Memory, w: &Memory) -> Result<Memory> {
        let n = self.gpu.dirty(self.kind, self.row.tokens * self.shape.hidden)?;
        rms_norm(self.gpu, self.kind, &n, x, w, [self.row.tokens, self.shape.hidden], self.shape.eps)?;
        Ok(n)
    }

    /// Tokens, stride, and how many heads are rotated.
    fn rotate(&self, qkv: &Memory, sign: f32) -> Result<()> {
        let h = self.shape.heads;
        let (row, heads) = (self.row, h.query + h.key);
        let args =
            [qkv.into(), (&row.cos).into(), (&row.sin).into(), row.tokens.into(), h.row().into(), heads.into(), h.dim.into(), sign.into()];
        self.gpu.launch("rope", Some(self.kind), Launch::blocks(row.tokens), &args)
    }

    /// Queries and keys with their norms: weight, first column, heads.
    fn head_norms(&self) -> impl Iterator<Item = (&Memory, usize, usize, Slot)> {
        let h = self.shape.heads;
        let both = self.weights.qk_norm.as_ref();
        both.into_iter().flat_map(move |(q, k)| [(q, 0, h.query, Slot::QueryNorm), (k, h.query * h.dim, h.key, Slot::KeyNorm)])
    }

    /// The arguments that all attention kernels end with.
    fn attention_arguments(&self, tiles: &Memory) -> [Arg; 7] {
        let h = self.shape.heads;
        let scale = 1.0 / (h.dim as f32).sqrt();
        [tiles.into(), (&self.row.positions).into(), h.query.into(), h.key.into(), h.dim.into(), h.window.unwrap_or(0).into(), scale.into()]
    }

    fn swiglu(&self, gate_up: &Memory) -> Result<Memory> {
        let (tokens, width) = (self.row.tokens, self.shape.feed_forward);
        let y = self.gpu.dirty(self.kind, tokens * width)?;
        let args = [(&y).into(), gate_up.into(), tokens.into(), width.into()];
        self.gpu.launch("swiglu", Some(self.kind), Launch::strided(tokens * width), &args)?;
        Ok(y)
    }

    /// Runs the block on `x` `[T, C]` in place; with `keep`, leaves a tape.
    pub fn forward(&self, x: &Memory, keep: bool) -> Result<Option<BlockTape>> {
        let (gpu, kind, tokens, h) = (self.gpu, self.kind, self.row.tokens, self.shape.heads);
        let qkv = gpu.dirty(kind, tokens * h.row())?;
        let n = self.norm(x, &self.weights.input_norm)?;
        let u_qkv = self.project(0, &n, &qkv, false)?;
        drop(n);
        let before_norm = if keep && self.weights.qk_norm.is_some() { Some(gpu.copy(&qkv)?) } else { None };
        for (w, offset, heads, _) in self.head_norms() {
            let args =
                [(&qkv).into(), w.into(), tokens.into(), h.row().into(), offset.into(), heads.into(), h.dim.into(), self.shape.eps.into()];
            gpu.launch("head_norm", Some(kind), Launch::grid([(tokens * heads).div_ceil(4), 1], 128), &args)?;
        }
        self.rotate(&qkv, 1.0)?;
        let (attended, lse) = (gpu.dirty(kind, tokens * h.width())?, gpu.dirty(Kind::F32, tokens * h.query)?);
        let mut args: Vec<Arg> = vec![(&attended).into(), (&lse).into(), (&qkv).into()];
        args.extend(self.attention_arguments(&self.row.tiles));
        super::attention::launch(gpu, kind, h.dim, super::attention::Pass::Forward, [self.row.num_tiles, h.query], &args)?;
        let input = keep.then(|| gpu.copy(x)).transpose()?;
        let u_o = self.project(1, &attended, x, true)?;

        let gate_up = gpu.dirty(kind, tokens * 2 * self.shape.feed_forward)?;
        let n = self.norm(x, &self.weights.post_norm)?;
        let u_gate_up = self.project(2, &n, &gate_up, false)?;
        drop(n);
        let y = self.swiglu(&gate_up)?;
        let middle = keep.then(|| gpu.copy(x)).transpose()?;
        let u_down = self.project(3, &y, x, true)?;
        Ok(match (input, middle) {
            (Some(x), Some(middle)) => {
                Some(BlockTape { x, qkv, before_norm, attended, lse, middle, gate_up, low_rank: [u_qkv, u_o, u_gate_up, u_down] })
            }
            _ => None,
        })
    }

    /// Turns `gx` `[T, C]` from the gradient of the block's output into that of its input.
    pub fn backward(&self, tape: BlockTape, gx: &Memory, gradients: &GradientBuffers) -> Result<()> {
        let (gpu, kind, tokens, h) = (self.gpu, self.kind, self.row.tokens, self.shape.heads);
        let BlockTape { x, qkv, before_norm, attended, lse, middle, gate_up, low_rank: [u_qkv, u_o, u_gate_up, u_down] } = tape;
        let group = |which, x: &Memory, u: Option<&Memory>, g: &Memory| self.group(which).backward(self.index, x, u, g, tokens, gradients);
        let rounded = |gx: &Memory| round(gpu, kind, gx);

        // Feed-forward part.
        let y = self.swiglu(&gate_up)?;
        let gy = match rounded(gx)? {
            Some(g) => group(3, &y, u_down.as_ref(), &g)?,
            None => group(3, &y, u_down.as_ref(), gx)?,
        };
        drop((y, u_down));
        let args = [(&gate_up).into(), (&gy).into(), tokens.into(), self.shape.feed_forward.into()];
        gpu.launch("swiglu_backward", Some(kind), Launch::strided(tokens * self.shape.feed_forward), &args)?;
        drop(gy);
        let n = self.norm(&middle, &self.weights.post_norm)?;
        let gn = group(2, &n, u_gate_up.as_ref(), &gate_up)?;
        drop((n, gate_up, u_gate_up));
        self.norm_backward(gx, &middle, &self.weights.post_norm, &gn, Slot::PostNorm, gradients)?;
        drop((gn, middle));

        // Attention part.
        let go = match rounded(gx)? {
            Some(g) => group(1, &attended, u_o.as_ref(), &g)?,
            None => group(1, &attended, u_o.as_ref(), gx)?,
        };
        let dqkv = self.attention_backward(&qkv, &attended, &lse, &go)?;
        drop((go, attended, lse, qkv, u_o));
        self.rotate(&dqkv, -1.0)?;
        if let Some(before) = &before_norm {
            for (w, offset, heads, slot) in self.head_norms() {
                self.head_norm_backward(&dqkv, before, w, [offset, heads], gradients.slot(Place::Block(self.index, slot)))?;
            }
        }
        let n = self.norm(&x, &self.weights.input_norm)?;
        let gn = group(0, &n, u_qkv.as_ref(), &dqkv)?;
        debug_assert_eq!(dqkv.len(), tokens * h.row());
        self.norm_backward(gx, &x, &self.weights.input_norm, &gn, Slot::InputNorm, gradients)
    }

    fn attention_backward(&self, qkv: &Memory, attended: &Memory, lse: &Memory, go: &Memory) -> Result<Memory> {
        use super::attention::{Pass, launch, launch_keys};
        let (gpu, kind, tokens, h) = (self.gpu, self.kind, self.row.tokens, self.shape.heads);
        let delta = gpu.dirty(Kind::F32, tokens * h.query)?;
        let args = [(&delta).into(), attended.into(), go.into(), tokens.into(), h.query.into(), h.dim.into()];
        gpu.launch("attention_delta", Some(kind), Launch::grid([(tokens * h.query).div_ceil(4), 1], 128), &args)?;
        let dqkv = gpu.dirty(kind, tokens * h.row())?;
        let first: [Arg; 5] = [(&dqkv).into(), qkv.into(), go.into(), lse.into(), (&delta).into()];
        let args = |tiles| [first.as_slice(), &self.attention_arguments(tiles)].concat();
        launch(gpu, kind, h.dim, Pass::Queries, [self.row.num_tiles, h.query], &args(&self.row.tiles))?;
        launch_keys(gpu, kind, h, [tokens, self.row.num_key_tiles], &dqkv, args(&self.row.key_tiles))?;
        Ok(dqkv)
    }

    fn head_norm_backward(
        &self,
        g: &Memory,
        before: &Memory,
        w: &Memory,
        [offset, heads]: [usize; 2],
        slot: Option<&Memory>,
    ) -> Result<()> {
        let (gpu, tokens, h) = (self.gpu, self.row.tokens, self.shape.heads);
        let blocks = (tokens * heads).div_ceil(ROWS_A_BLOCK);
        let partial = slot.map(|_| gpu.dirty(Kind::F32, blocks * h.dim)).transpose()?;
        let args = [
            g.into(),
            partial.as_ref().map_or(Arg::Pointer(0), Arg::from),
            before.into(),
            w.into(),
            tokens.into(),
            h.row().into(),
            offset.into(),
            heads.into(),
            h.dim.into(),
            self.shape.eps.into(),
            ROWS_A_BLOCK.into(),
        ];
        gpu.launch("head_norm_backward", Some(self.kind), Launch::grid([blocks, 1], 128), &args)?;
        match (slot, &partial) {
            (Some(slot), Some(partial)) => add_columns(gpu, slot, partial, [blocks, h.dim]),
            _ => Ok(()),
        }
    }

    fn norm_backward(&self, gx: &Memory, x: &Memory, w: &Memory, g: &Memory, slot: Slot, gradients: &GradientBuffers) -> Result<()> {
        let slot = gradients.slot(Place::Block(self.index, slot));
        rms_norm_backward(self.gpu, self.kind, gx, x, w, g, [self.row.tokens, self.shape.hidden], self.shape.eps, slot)
    }
}

/// `gx` rounded to the pass's precision; `None` where that is f32 already.
fn round(gpu: &Arc<Gpu>, kind: Kind, gx: &Memory) -> Result<Option<Memory>> {
    if kind == Kind::F32 {
        return Ok(None);
    }
    let g = gpu.dirty(kind, gx.len())?;
    gpu.launch("cast_bf16", None, Launch::strided(gx.len()), &[(&g).into(), gx.into(), Arg::Long(gx.len() as i64)])?;
    Ok(Some(g))
}

/// `out[c] += Σ_r g[r, c]`.
fn add_columns(gpu: &Gpu, out: &Memory, g: &Memory, [rows, columns]: [usize; 2]) -> Result<()> {
    let args = [out.into(), g.into(), rows.into(), columns.into(), columns.into()];
    gpu.launch("column_sum", Some(Kind::F32), Launch::columns(columns), &args)
}

/// y = x / √(mean x² + ε) ⊙ w.
pub(super) fn rms_norm(gpu: &Gpu, kind: Kind, y: &Memory, x: &Memory, w: &Memory, [rows, width]: [usize; 2], eps: f32) -> Result<()> {
    gpu.launch("rms_norm", Some(kind), Launch::blocks(rows), &[y.into(), x.into(), w.into(), rows.into(), width.into(), eps.into()])
}

/// Adds the gradient of x to `gx`, and that of w to `slot`.
pub(super) fn rms_norm_backward(
    gpu: &Arc<Gpu>,
    kind: Kind,
    gx: &Memory,
    x: &Memory,
    w: &Memory,
    g: &Memory,
    [rows, width]: [usize; 2],
    eps: f32,
    slot: Option<&Memory>,
) -> Result<()> {
    let inverse = gpu.dirty(Kind::F32, rows)?;
    let args = [gx.into(), (&inverse).into(), x.into(), w.into(), g.into(), rows.into(), width.into(), eps.into()];
    gpu.launch("rms_norm_backward", Some(kind), Launch::blocks(rows), &args)?;
    let Some(slot) = slot else { return Ok(()) };
    let blocks = rows.div_ceil(ROWS_A_BLOCK);
    let partial = gpu.dirty(Kind::F32, blocks * width)?;
    let args = [(&partial).into(), x.into(), (&inverse).into(), g.into(), rows.into(), width.into(), ROWS_A_BLOCK.into()];
    gpu.launch("rms_norm_weight", Some(kind), Launch::grid([width.div_ceil(256), blocks], 256), &args)?;
    add_columns(gpu, slot, &partial, [blocks, width])
}
