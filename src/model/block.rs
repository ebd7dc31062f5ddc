//! One decoder block on a packed row, forward and backward.
//!
//! x' = x + O(attention(rope(Q(n), K(n)), V(n))) with n = norm(x); x'' = x' + down(silu(gate(m)) ⊙ up(m)) with m = norm(x'). The tape keeps what is
//! expensive to form again; norms and the SwiGLU product are recomputed on the way back.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use super::adapter::Adapter;
use super::decoder::{Policy, PreparedRow};
use super::gradients::GradientSink;
use super::ops::Held;
use super::ops::attention::{Heads, attention, attention_backward};
use super::ops::buffer::Buffer;
use super::ops::gemm::{Kernel, Operand, View};
use super::ops::rms_norm::{HeadColumns, head_norm, head_norm_backward, rms_norm_backward, rms_norm_operand};
use super::ops::rope::{Direction, rotate};
use super::ops::swiglu::{GateUp, GradientTiles, KeepGateUp, SwigluTiles, swiglu, swiglu_backward};
use super::params::{BlockParam, LinearGroup, ParamId, PerGroup};
use super::projections::Group;
use super::spec::{Activation, BlockSpec, FeedForward, Mixer, Norms, QkNorm};

/// What the backward pass needs of one block.
pub struct BlockTape {
    /// The block's input `[T, C]`.
    x: Buffer,
    /// `[q | k | v]` as attention saw it.
    qkv: Buffer,
    /// q and k before their norms (Qwen3).
    before_norm: Option<Buffer>,
    /// Attention's output `[T, H·D]` and log-sum-exp `[T, H]`.
    attended: Buffer,
    lse: Buffer,
    /// After attention `[T, C]`.
    middle: Buffer,
    /// `[gate | up]` `[T, 2F]`.
    gate_up: GateUp,
    /// x·Aᵀ of each group.
    low_rank: PerGroup<Buffer>,
}

/// A block's tensors, opened.
struct Open<'a> {
    index: usize,
    kernel: Kernel,
    heads: Heads,
    /// F.
    width: usize,
    eps: f32,
    input_norm: Held<'a>,
    post_norm: Held<'a>,
    qk_norm: Option<(Held<'a>, Held<'a>)>,
    groups: PerGroup<Group<'a>>,
    /// Adapters on parts of the row: the same groups, of which only the low-rank terms are used.
    parts: Vec<(Range<usize>, PerGroup<Group<'a>>)>,
}

impl<'a> Open<'a> {
    fn new(policy: &'a Policy, index: usize, row: &'a PreparedRow) -> Result<Self> {
        let (spec, parameters, kernel) = (&policy.config.spec, &*policy.parameters, policy.kernel());
        let BlockSpec {
            mixer: Mixer::Attention(attention),
            mixer_norms: Norms::Pre,
            feed_forward: FeedForward::Gated { width, activation: Activation::Silu, bias: _ },
            feed_forward_norms: Norms::Pre,
        } = spec.blocks[index];
        let tensor = |param| Held::of(parameters.tensor(ParamId::Block(index, param))?);
        let groups = |adapter: Option<&'a Adapter>| PerGroup::build(|group| Group::open(kernel, index, parameters, adapter, group));
        let part = |(rows, adapter): &'a (Range<usize>, Arc<Adapter>)| Ok((rows.clone(), groups(Some(adapter))?));
        Ok(Open {
            index,
            kernel,
            heads: Heads { query: attention.heads, key: attention.kv_heads, dim: attention.head_dim, window: attention.window },
            width,
            eps: spec.rms_norm_eps as f32,
            input_norm: tensor(BlockParam::InputNorm)?,
            post_norm: tensor(BlockParam::PostNorm)?,
            qk_norm: match attention.qk_norm {
                QkNorm::Absent => None,
                QkNorm::PerHead => Some((tensor(BlockParam::QueryNorm)?, tensor(BlockParam::KeyNorm)?)),
            },
            groups: groups(policy.adapter.as_deref())?,
            parts: row.adapters.iter().map(part).collect::<Result<_>>()?,
        })
    }

    /// Runs a group; returns x·Aᵀ of the policy's own adapter.
    fn project(&self, group: LinearGroup, x: &Operand, tokens: usize, y: &mut [f32], keep: bool) -> Result<Buffer> {
        let u = self.groups.get(group).forward(x, tokens, y, keep)?;
        for (rows, groups) in &self.parts {
            groups.get(group).add_low_rank(x, rows.clone(), y);
        }
        Ok(u)
    }

    /// y = silu(gate) ⊙ up `[T, F]`, what is kept of `[gate | up]`, and x·Aᵀ of both. A tape for an adapter's gradient, where the kernel rounds, is rounded.
    fn feed_forward(&self, x: &Operand, tokens: usize, keep: bool, adapted: bool) -> Result<(Operand<'static>, Option<GateUp>, Buffer)> {
        let keep = match keep {
            false => KeepGateUp::No,
            true if self.kernel.pairs() && adapted => KeepGateUp::Bf16,
            true => KeepGateUp::F32,
        };
        if self.parts.is_empty() && self.groups.gate_up.is_tiled::<2>() {
            let tiles = SwigluTiles::new(self.kernel, tokens, self.width, keep);
            let group = &self.groups.gate_up;
            // SAFETY: each tile is given to one task.
            let u = group.forward_tiles(x, tokens, |rows, columns, [gate, up]| unsafe { tiles.take(rows, columns, gate, up) });
            let (y, kept) = tiles.finish();
            return Ok((y, kept, u));
        }
        let mut gate_up = Buffer::dirty(tokens * 2 * self.width);
        let u = self.project(LinearGroup::GateUp, x, tokens, &mut gate_up, false)?;
        let y = swiglu(self.kernel, &gate_up, self.width);
        let kept = match keep {
            KeepGateUp::No => None,
            KeepGateUp::F32 => Some(GateUp::F32(gate_up)),
            KeepGateUp::Bf16 => {
                Some(GateUp::Bf16(Operand::owned(self.kernel, View::f32(&gate_up, 2 * self.width), tokens, 2 * self.width)))
            }
        };
        Ok((y, kept, u))
    }

    fn columns(&self) -> (HeadColumns, HeadColumns) {
        let h = &self.heads;
        let (stride, offset) = (h.row(), h.query * h.dim);
        (HeadColumns { stride, offset: 0, count: h.query }, HeadColumns { stride, offset, count: h.key })
    }

    fn norm(&self, x: &[f32], w: &Held) -> Result<Operand<'static>> {
        Ok(rms_norm_operand(self.kernel, x, w.f32()?, self.eps))
    }

    /// Attention's output `[T, H·D]`, to be multiplied.
    fn attended<'b>(&self, attended: &'b [f32], tokens: usize) -> Operand<'b> {
        Operand::new(self.kernel, View::f32(attended, self.heads.width()), tokens, self.heads.width(), 1.0)
    }

    fn add_norm_gradient(
        &self,
        x: &[f32],
        w: &Held,
        g: &[f32],
        norm: BlockParam,
        gx: &mut [f32],
        sink: &mut dyn GradientSink,
    ) -> Result<()> {
        rms_norm_backward(x, w.f32()?, g, self.eps, gx, sink.slot(ParamId::Block(self.index, norm)));
        Ok(())
    }
}

/// Runs block `index` on `x` `[T, C]`; with `keep`, leaves a tape.
pub fn forward(policy: &Policy, index: usize, mut x: Buffer, row: &PreparedRow, keep: bool) -> Result<(Buffer, Option<BlockTape>)> {
    let open = Open::new(policy, index, row)?;
    let (tokens, heads) = (row.tokens(), open.heads);
    let mut qkv = Buffer::dirty(tokens * heads.row());
    let n = open.norm(&x, &open.input_norm)?;
    let u_qkv = open.project(LinearGroup::Qkv, &n, tokens, &mut qkv, false)?;
    let mut before_norm = None;
    if let Some((q, k)) = &open.qk_norm {
        before_norm = keep.then(|| Buffer::copy_of(&qkv));
        let (queries, keys) = open.columns();
        head_norm(&mut qkv, queries, q.f32()?, open.eps);
        head_norm(&mut qkv, keys, k.f32()?, open.eps);
    }
    rotate(&mut qkv, heads.row(), heads.query + heads.key, &row.rope, Direction::Forward);
    let (mut attended, mut lse) = (Buffer::dirty(tokens * heads.width()), Buffer::dirty(tokens * heads.query));
    attention(open.kernel, &qkv, heads, &row.row().layout, &mut attended, &mut lse);
    let input = keep.then(|| Buffer::copy_of(&x));
    let u_output = open.project(LinearGroup::Output, &open.attended(&attended, tokens), tokens, &mut x, true)?;

    drop(n);
    let n = open.norm(&x, &open.post_norm)?;
    let (y, gate_up, u_gate_up) = open.feed_forward(&n, tokens, keep, policy.adapter.is_some())?;
    drop(n);
    let middle = keep.then(|| Buffer::copy_of(&x));
    let u_down = open.project(LinearGroup::Down, &y, tokens, &mut x, true)?;
    let tape = match (input, middle, gate_up) {
        (Some(input), Some(middle), Some(gate_up)) => {
            let low_rank = PerGroup { qkv: u_qkv, output: u_output, gate_up: u_gate_up, down: u_down };
            Some(BlockTape { x: input, qkv, before_norm, attended, lse, middle, gate_up, low_rank })
        }
        _ => None,
    };
    Ok((x, tape))
}

/// Turns `gx` = ∂loss/∂(block's output) `[T, C]` into ∂loss/∂(its input) and adds the parameters' gradients to `sink`.
pub fn backward(
    policy: &Policy,
    index: usize,
    tape: BlockTape,
    row: &PreparedRow,
    gx: &mut [f32],
    sink: &mut dyn GradientSink,
) -> Result<()> {
    let open = Open::new(policy, index, row)?;
    let (tokens, heads) = (row.tokens(), open.heads);
    let BlockTape { x, qkv, before_norm, attended, lse, middle, gate_up, low_rank } = tape;
    let PerGroup { qkv: u_qkv, output: u_output, gate_up: u_gate_up, down: u_down } = low_rank;
    let groups = &open.groups;

    // Feed-forward part.
    let width = open.width;
    let gn = match gate_up {
        GateUp::F32(mut gate_up) => {
            let y = swiglu(open.kernel, &gate_up, width);
            let gy = groups.down.backward(&y, &u_down, gx, tokens, sink)?;
            drop(y);
            swiglu_backward(&mut gate_up, width, &gy);
            drop(gy);
            let n = open.norm(&middle, &open.post_norm)?;
            groups.gate_up.backward(&n, &u_gate_up, &gate_up, tokens, sink)?
        }
        GateUp::Bf16(kept) => {
            let (y, gradients) = {
                let g = [Operand::new(open.kernel, View::f32(gx, groups.down.output()), tokens, groups.down.output(), 1.0)];
                let tiles = GradientTiles::new(&kept, width);
                // SAFETY: each tile is given to one task.
                let v = groups.down.backward_tiles(&g, tokens, |rows, columns, [gy]| unsafe { tiles.take(rows, columns, gy) });
                let (y, gradients) = tiles.finish();
                groups.down.low_rank_gradients(&y, &u_down, &g, &v, tokens, sink);
                (y, gradients)
            };
            drop((y, kept));
            let n = open.norm(&middle, &open.post_norm)?;
            groups.gate_up.backward_frozen(&n, &u_gate_up, &gradients, tokens, sink)?
        }
    };
    drop((u_gate_up, u_down));
    open.add_norm_gradient(&middle, &open.post_norm, &gn, BlockParam::PostNorm, gx, sink)?;
    drop((gn, middle));

    // Attention part.
    let go = groups.output.backward(&open.attended(&attended, tokens), &u_output, gx, tokens, sink)?;
    let mut dqkv = Buffer::dirty(tokens * heads.row());
    attention_backward(open.kernel, &qkv, heads, &row.row().layout, (&attended, &lse), &go, &mut dqkv);
    drop((go, attended, lse, qkv, u_output));
    rotate(&mut dqkv, heads.row(), heads.query + heads.key, &row.rope, Direction::Backward);
    if let (Some((q, k)), Some(before)) = (&open.qk_norm, &before_norm) {
        let (queries, keys) = open.columns();
        head_norm_backward(before, &mut dqkv, queries, q.f32()?, open.eps, sink.slot(ParamId::Block(index, BlockParam::QueryNorm)));
        head_norm_backward(before, &mut dqkv, keys, k.f32()?, open.eps, sink.slot(ParamId::Block(index, BlockParam::KeyNorm)));
    }
    let n = open.norm(&x, &open.input_norm)?;
    let gn = groups.qkv.backward(&n, &u_qkv, &dqkv, tokens, sink)?;
    open.add_norm_gradient(&x, &open.input_norm, &gn, BlockParam::InputNorm, gx, sink)
}
