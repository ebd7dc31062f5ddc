//! The operations of one decoder block on the CPU.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use super::backend::{CpuBackend, CpuGateUpGradient, CpuGradients};
use super::projections::CpuLinearGroup;
use crate::compute::cpu::attention::{Heads, attention, attention_backward};
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm::{Kernel, Operand, View};
use crate::compute::cpu::rms_norm::{
    HeadColumns, head_norm, head_norm_backward, rms_norm, rms_norm_backward, rms_norm_operand,
};
use crate::compute::cpu::rope::{Direction, rotate};
use crate::compute::cpu::swiglu::{
    GateUpTape, GatedTiles, GradientTiles, SavedGateUp, gated, gated_backward,
};
use crate::compute::cpu::thread_pool;
use crate::model::adapter::Adapter;
use crate::model::backend::{Attended, BlockOps, Gated, OutputGradient, PolicyView, StreamNorm};
use crate::model::parameters::{NormFactors, Parameters};
use crate::model::params::{BlockParam, LinearGroup, ParamId, PerGroup};
use crate::model::row::{KeyCache, PreparedRow, RowRope};
use crate::model::spec::{ActivationFunction, BlockSpec, FeedForward, Mixer, QkNorm};

/// A block with its adapter, opened for a pass over a row.
pub struct CpuBlock<'a> {
    index: usize,
    spec: &'a BlockSpec,
    kernel: Kernel,
    heads: Heads,
    /// F, the width of the feed-forward part.
    width: usize,
    activation: ActivationFunction,
    /// ε of the norms.
    eps: f32,
    /// True if the policy has an adapter. In that case only the adapter is trained.
    is_adapted: bool,
    row: &'a PreparedRow,
    /// Cache of keys and values that attention fills or reads; `None` in passes without a cache.
    cache: Option<&'a (dyn KeyCache + 'a)>,
    parameters: &'a Parameters,
    groups: PerGroup<CpuLinearGroup<'a>>,
    /// Token ranges of the row that have adapters of their own, each with the groups opened for its
    /// adapter. Only the low-rank terms of these groups are used.
    parts: Vec<(Range<usize>, PerGroup<CpuLinearGroup<'a>>)>,
}

impl<'a> CpuBlock<'a> {
    /// Opens block `index` of a policy.
    pub fn open(policy: PolicyView<'a>, index: usize, row: &'a PreparedRow) -> Result<Self> {
        let (spec, parameters, kernel) = (
            policy.spec,
            &**policy.parameters,
            Kernel::best(policy.precision),
        );
        let BlockSpec {
            mixer: Mixer::Attention(attention),
            mixer_norms: _,
            feed_forward:
                FeedForward::Gated {
                    width,
                    activation,
                    bias: _,
                    projections: _,
                },
            feed_forward_norms: _,
            norm_names: _,
            output_factor: _,
        } = spec.blocks[index];
        let groups = |adapter: Option<&'a Adapter>| {
            PerGroup::build(|group| CpuLinearGroup::open(kernel, index, parameters, adapter, group))
        };
        let part = |(rows, adapter): &'a (Range<usize>, Arc<Adapter>)| {
            Ok((rows.clone(), groups(Some(adapter))?))
        };
        Ok(CpuBlock {
            index,
            spec: &spec.blocks[index],
            kernel,
            heads: attention.as_heads(),
            width,
            activation,
            eps: spec.rms_norm_eps as f32,
            is_adapted: policy.adapter.is_some(),
            row,
            cache: None,
            parameters,
            groups: groups(policy.adapter.map(|adapter| &**adapter))?,
            parts: row.adapters.iter().map(part).collect::<Result<_>>()?,
        })
    }

    /// Returns the block with cached keys and values.
    pub fn with_cache(self, cache: Option<&'a (dyn KeyCache + 'a)>) -> Self {
        CpuBlock { cache, ..self }
    }

    fn tokens(&self) -> usize {
        self.row.tokens()
    }

    /// Returns the factors of a norm of the block.
    fn factors(&self, norm: BlockParam) -> Result<NormFactors<'_>> {
        self.parameters.norm(ParamId::Block(self.index, norm))
    }

    /// Runs a group of linear layers. Adds its outputs to `y` if `accumulate` is true, otherwise
    /// overwrites `y`. Returns x·Aᵀ of the policy's own adapter.
    fn run_group(
        &self,
        group: LinearGroup,
        x: &Operand,
        y: &mut [f32],
        accumulate: bool,
    ) -> Result<Buffer> {
        let u = self
            .groups
            .get(group)
            .forward(x, self.tokens(), y, accumulate)?;
        for (rows, groups) in &self.parts {
            groups.get(group).add_low_rank(x, rows.clone(), y);
        }
        Ok(u)
    }

    /// Returns the columns of the queries and of the keys in `[q | k | v]`, each with its norm.
    fn normed_heads(&self) -> [(HeadColumns, BlockParam); 2] {
        let h = &self.heads;
        let (stride, offset) = (h.row(), h.query * h.dim);
        let [query_count, key_count] = match self.spec.attention().qk_norm {
            // All heads are normed as one.
            QkNorm::AllHeads => [1, 1],
            QkNorm::PerHead | QkNorm::Absent => [h.query, h.key],
        };
        let (queries, keys) = (
            HeadColumns {
                stride,
                offset: 0,
                count: query_count,
            },
            HeadColumns {
                stride,
                offset,
                count: key_count,
            },
        );
        [
            (queries, BlockParam::QueryNorm),
            (keys, BlockParam::KeyNorm),
        ]
    }
}

impl BlockOps<CpuBackend> for CpuBlock<'_> {
    fn spec(&self) -> &BlockSpec {
        self.spec
    }

    fn new_qkv(&self) -> Result<Buffer> {
        Ok(Buffer::uninit(self.tokens() * self.heads.row()))
    }

    fn new_stream(&self) -> Result<Buffer> {
        Ok(Buffer::zeros(self.tokens() * self.groups.down.output()))
    }

    fn new_gate_up(&self) -> Result<()> {
        Ok(())
    }

    fn norm(&self, norm: StreamNorm, x: &Buffer) -> Result<Operand<'static>> {
        Ok(rms_norm_operand(
            self.kernel,
            x,
            self.factors(norm.weight())?.values()?,
            self.eps,
        ))
    }

    fn stream_operand(&self, x: &Buffer) -> Result<Operand<'static>> {
        let width = self.groups.down.output();
        Ok(Operand::owned(
            self.kernel,
            View::f32(x, width),
            self.tokens(),
            width,
        ))
    }

    fn attention_operand<'b>(&self, output: &'b Buffer) -> Operand<'b> {
        Operand::new(
            self.kernel,
            View::f32(output, self.heads.width()),
            self.tokens(),
            self.heads.width(),
            1.0,
        )
    }

    fn project(&self, group: LinearGroup, input: &Operand<'_>, out: &mut Buffer) -> Result<Buffer> {
        self.run_group(group, input, out, false)
    }

    fn add_to_stream(
        &self,
        group: LinearGroup,
        input: &Operand<'_>,
        x: &mut Buffer,
    ) -> Result<Buffer> {
        self.run_group(group, input, x, true)
    }

    fn add_scaled(&self, factor: f32, y: &Buffer, x: &mut Buffer) -> Result<()> {
        let width = self.groups.down.output();
        thread_pool::chunks(x, width, |i, x| {
            x.iter_mut()
                .zip(&y[i * width..])
                .for_each(|(x, y)| *x += factor * y)
        });
        Ok(())
    }

    fn scaled(&self, factor: f32, x: &Buffer) -> Result<Buffer> {
        let mut y = Buffer::copy_of(x);
        thread_pool::chunks(&mut y, self.groups.down.output(), |_, y| {
            y.iter_mut().for_each(|y| *y *= factor)
        });
        Ok(y)
    }

    fn add_norm(&self, norm: StreamNorm, y: &Buffer, x: &mut Buffer) -> Result<()> {
        let mut normed = Buffer::uninit(y.len());
        rms_norm(
            y,
            self.factors(norm.weight())?.values()?,
            self.eps,
            &mut normed,
        );
        self.add_scaled(self.spec.output_factor, &normed, x)
    }

    fn head_norms(&self, qkv: &mut Buffer) -> Result<()> {
        for (columns, norm) in self.normed_heads() {
            head_norm(qkv, columns, self.factors(norm)?.values()?, self.eps);
        }
        Ok(())
    }

    fn rotate(&self, rope: usize, qkv: &mut Buffer, direction: Direction) -> Result<()> {
        let RowRope { table, queries } = &self.row.ropes[rope];
        let (h, stride) = (self.heads, self.heads.row());
        let first = match queries {
            Some(queries) => {
                rotate(qkv, stride, (0..h.query, h.dim), queries, direction);
                h.query
            }
            None => 0,
        };
        let others = first..h.query + h.key;
        rotate(qkv, stride, (others, h.dim), table, direction);
        Ok(())
    }

    fn attention(&self, qkv: &Buffer) -> Result<Attended<CpuBackend>> {
        let (tokens, heads) = (self.tokens(), self.heads);
        let (mut output, mut log_sum_exp) = (
            Buffer::uninit(tokens * heads.width()),
            Buffer::uninit(tokens * heads.query),
        );
        if let Some(cache) = self.cache
            && cache.attend(self.index, self.row.row(), qkv, &mut output)
        {
            return Ok(Attended {
                output,
                log_sum_exp,
            });
        }
        attention(
            self.kernel,
            qkv,
            heads,
            &self.row.row().layout,
            &mut output,
            &mut log_sum_exp,
        );
        Ok(Attended {
            output,
            log_sum_exp,
        })
    }

    /// With `save_tape`, saves `[gate | up]` in bf16 if the kernel rounds to bf16 and only an
    /// adapter is trained, otherwise in f32. The gradients of rounded values are separate operands
    /// for gate and up, so with fused projections the values are always saved in f32.
    fn feed_forward(
        &self,
        (): (),
        input: Operand<'static>,
        save_tape: bool,
    ) -> Result<Gated<CpuBackend>> {
        let (tokens, width) = (self.tokens(), self.width);
        let saved_gate_up = match save_tape {
            false => SavedGateUp::Nothing,
            true => {
                SavedGateUp::for_tape(self.kernel, self.is_adapted && !self.spec.fuses_gate_up())
            }
        };
        if self.parts.is_empty() && self.groups.gate_up.is_tiled::<2>() {
            let tiles =
                GatedTiles::new(self.kernel, self.activation, (tokens, width), saved_gate_up);
            let group = &self.groups.gate_up;
            // SAFETY: `forward_tiles` passes each tile to exactly one task.
            let low_rank =
                group.forward_tiles(&input, tokens, |rows, columns, [gate, up]| unsafe {
                    tiles.take(rows, columns, gate, up)
                });
            let (y, gate_up) = tiles.finish();
            return Ok(Gated {
                y,
                gate_up,
                low_rank,
            });
        }
        let mut gate_up = Buffer::uninit(tokens * 2 * width);
        let low_rank = self.run_group(LinearGroup::GateUp, &input, &mut gate_up, false)?;
        let y = gated(self.kernel, self.activation, &gate_up, width);
        let gate_up = match saved_gate_up {
            SavedGateUp::Nothing => None,
            SavedGateUp::F32 => Some(GateUpTape::F32(gate_up)),
            SavedGateUp::Bf16 => Some(GateUpTape::Bf16(Operand::owned(
                self.kernel,
                View::f32(&gate_up, 2 * width),
                tokens,
                2 * width,
            ))),
        };
        Ok(Gated {
            y,
            gate_up,
            low_rank,
        })
    }

    fn feed_forward_backward(
        &self,
        gate_up: GateUpTape,
        low_rank: &Buffer,
        g: &Buffer,
        gradients: &mut CpuGradients,
    ) -> Result<CpuGateUpGradient> {
        let (tokens, width, down) = (self.tokens(), self.width, &self.groups.down);
        match gate_up {
            GateUpTape::F32(mut gate_up) => {
                let y = gated(self.kernel, self.activation, &gate_up, width);
                let gy = down.backward(&y, low_rank, g, tokens, gradients)?;
                gated_backward(self.activation, &mut gate_up, width, &gy);
                Ok(CpuGateUpGradient::F32(gate_up))
            }
            GateUpTape::Bf16(saved) => {
                let g = [Operand::new(
                    self.kernel,
                    View::f32(g, down.output()),
                    tokens,
                    down.output(),
                    1.0,
                )];
                let tiles = GradientTiles::new(&saved, self.activation, width);
                // SAFETY: `backward_tiles` passes each tile to exactly one task.
                let v = down.backward_tiles(&g, tokens, |rows, columns, [gy]| unsafe {
                    tiles.take(rows, columns, gy)
                });
                let (y, gradient) = tiles.finish();
                down.low_rank_gradients(&y, low_rank, &g, &v, tokens, gradients);
                Ok(CpuGateUpGradient::Rounded(gradient))
            }
        }
    }

    fn linear_backward(
        &self,
        group: LinearGroup,
        input: &Operand<'_>,
        low_rank: &Buffer,
        g: OutputGradient<'_, CpuBackend>,
        gradients: &mut CpuGradients,
    ) -> Result<Buffer> {
        let group = self.groups.get(group);
        let g = match g {
            OutputGradient::Stream(g) | OutputGradient::Qkv(g) => g,
            OutputGradient::GateUp(CpuGateUpGradient::F32(g)) => g,
            OutputGradient::GateUp(CpuGateUpGradient::Rounded(gs)) => {
                return group.backward_frozen(input, low_rank, gs, self.tokens(), gradients);
            }
        };
        group.backward(input, low_rank, g, self.tokens(), gradients)
    }

    fn attention_backward(
        &self,
        qkv: &Buffer,
        attended: &Attended<CpuBackend>,
        g: &Buffer,
    ) -> Result<Buffer> {
        let mut dqkv = Buffer::uninit(self.tokens() * self.heads.row());
        let forward: (&[f32], &[f32]) = (&attended.output, &attended.log_sum_exp);
        attention_backward(
            self.kernel,
            qkv,
            self.heads,
            &self.row.row().layout,
            forward,
            g,
            &mut dqkv,
        );
        Ok(dqkv)
    }

    fn head_norms_backward(
        &self,
        before: &Buffer,
        dqkv: &mut Buffer,
        gradients: &mut CpuGradients,
    ) -> Result<()> {
        for (columns, norm) in self.normed_heads() {
            let slot = gradients.get_mut(ParamId::Block(self.index, norm));
            head_norm_backward(
                before,
                dqkv,
                columns,
                self.factors(norm)?.values()?,
                self.eps,
                slot,
            );
        }
        Ok(())
    }

    fn norm_backward(
        &self,
        norm: StreamNorm,
        x: &Buffer,
        g: &Buffer,
        gx: &mut Buffer,
        gradients: &mut CpuGradients,
    ) -> Result<()> {
        let slot = gradients.get_mut(ParamId::Block(self.index, norm.weight()));
        rms_norm_backward(
            x,
            self.factors(norm.weight())?.values()?,
            g,
            self.eps,
            gx,
            slot,
        );
        Ok(())
    }

    fn add_gradient(&self, g: &Buffer, gx: &mut Buffer) -> Result<()> {
        self.add_scaled(1.0, g, gx)
    }
}
