//! A group of linear layers on the device, forward and backward, computed with the GEMMs of cuBLAS.
//! The counterpart on the CPU is [`crate::model::cpu::projections`].
//!
//! y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ; with v = s·g·B: dx = g·W + v·A, dA = vᵀ·x,
//! dB = s·gᵀ·(x·Aᵀ), dW = gᵀ·x, db = Σ_tokens g. Here s is the adapter's scale, and
//! g = ∂loss/∂y.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use super::gradients::GradientBuffers;
use super::weights::{GroupWeights, LowRankGroup};
use crate::compute::cuda::gpu::{Gpu, Memory};
use crate::compute::cuda::kernels::Kind;
use crate::compute::cuda::ops::{self, Columns};
use crate::model::params::{BlockParam, ParamId};

/// A group of linear layers of a block.
#[derive(Clone, Copy)]
pub(super) struct CudaLinearGroup<'a> {
    pub gpu: &'a Arc<Gpu>,
    /// Element type of weights and activations.
    pub kind: Kind,
    pub weights: &'a GroupWeights,
    /// The policy's own adapter.
    pub adapter: Option<LowRankGroup<'a>>,
}

/// Inputs of the backward pass of a group.
#[derive(Clone, Copy)]
pub(super) struct GroupBackward<'a> {
    /// Index of the block.
    pub block: usize,
    /// T, the number of rows of all matrices.
    pub tokens: usize,
    /// Input of the forward pass `[T, in]`.
    pub x: &'a Memory,
    /// x·Aᵀ `[T, Σr]`, as [`CudaLinearGroup::forward`] returned it.
    pub u: Option<&'a Memory>,
    /// g = ∂loss/∂y `[T, Σout]`.
    pub g: &'a Memory,
}

impl CudaLinearGroup<'_> {
    /// Computes the outputs `[T, Σout]` of the group for `x` `[T, in]`. Adds them to `y` if
    /// `accumulate` is true, otherwise overwrites `y`. Returns x·Aᵀ `[T, Σr]` for the backward
    /// pass.
    pub fn forward(
        &self,
        x: &Memory,
        tokens: usize,
        y: &Memory,
        accumulate: bool,
    ) -> Result<Option<Memory>> {
        let (w, gpu) = (self.weights, self.gpu);
        let beta = if accumulate { 1.0 } else { 0.0 };
        gpu.matmul(
            [tokens, w.output, w.input],
            x.matrix(w.input),
            w.weight.matrix(w.input).t(),
            y.matrix(w.output),
            1.0,
            beta,
        )?;
        for m in &w.members {
            if let Some(bias) = &m.bias {
                ops::add_bias(
                    gpu,
                    Columns {
                        matrix: y,
                        stride: w.output,
                        first: m.column,
                        count: m.out,
                    },
                    bias,
                )?;
            }
        }
        self.adapter
            .map(|adapter| self.add_low_rank(adapter, x, 0..tokens, y))
            .transpose()
            .map(Option::flatten)
    }

    /// Adds s·(x·Aᵀ)·Bᵀ to the rows `rows` of `y`. Returns x·Aᵀ of these rows, or `None`
    /// if the group has no adapter or there are no rows.
    pub fn add_low_rank(
        &self,
        adapter: LowRankGroup<'_>,
        x: &Memory,
        rows: Range<usize>,
        y: &Memory,
    ) -> Result<Option<Memory>> {
        let (w, gpu, tokens, ranks) = (self.weights, self.gpu, rows.len(), adapter.group.ranks);
        if ranks == 0 || tokens == 0 {
            return Ok(None);
        }
        let u = gpu.uninit(self.kind, tokens * ranks)?;
        let input = x.matrix_at(rows.start * w.input, w.input);
        gpu.matmul(
            [tokens, ranks, w.input],
            input,
            adapter.a(w.input).t(),
            u.matrix(ranks),
            1.0,
            0.0,
        )?;
        for m in &w.members {
            let Some((b, rank, column)) = adapter.group.b(m.linear) else {
                continue;
            };
            let to = y.matrix_at(rows.start * w.output + m.column, w.output);
            gpu.matmul(
                [tokens, m.out, rank],
                u.matrix_at(column, ranks),
                adapter.matrices.matrix_at(b, rank).t(),
                to,
                adapter.scale,
                1.0,
            )?;
        }
        Ok(Some(u))
    }

    /// Accumulates the gradients of the group's trained parameters in `gradients` and returns
    /// ∂loss/∂x `[T, in]`.
    pub fn backward(&self, pass: GroupBackward<'_>, gradients: &GradientBuffers) -> Result<Memory> {
        let (w, gpu) = (self.weights, self.gpu);
        let GroupBackward {
            block,
            tokens,
            x,
            u,
            g,
        } = pass;
        let dx = gpu.uninit(self.kind, tokens * w.input)?;
        gpu.matmul(
            [tokens, w.input, w.output],
            g.matrix(w.output),
            w.weight.matrix(w.input),
            dx.matrix(w.input),
            1.0,
            0.0,
        )?;
        if let (Some(adapter), Some(u)) = (self.adapter, u) {
            self.low_rank_backward(adapter, pass, u, &dx, gradients)?;
        }
        for m in &w.members {
            let g_m = g.matrix_at(m.column, w.output);
            if let Some(slot) = gradients.get(ParamId::Block(block, BlockParam::Weight(m.linear))) {
                gpu.matmul(
                    [m.out, w.input, tokens],
                    g_m.t(),
                    x.matrix(w.input),
                    slot.matrix(w.input),
                    1.0,
                    1.0,
                )?;
            }
            if m.bias.is_some()
                && let Some(slot) = gradients.get(ParamId::Block(block, BlockParam::Bias(m.linear)))
            {
                ops::column_sum(
                    gpu,
                    slot,
                    Columns {
                        matrix: g,
                        stride: w.output,
                        first: m.column,
                        count: m.out,
                    },
                )?;
            }
        }
        Ok(dx)
    }

    /// Accumulates the gradients of the adapter, given u = x·Aᵀ, and adds the adapter's
    /// contribution to `dx` `[T, in]`.
    fn low_rank_backward(
        &self,
        adapter: LowRankGroup<'_>,
        pass: GroupBackward<'_>,
        u: &Memory,
        dx: &Memory,
        gradients: &GradientBuffers,
    ) -> Result<()> {
        let GroupBackward {
            block,
            tokens,
            x,
            g,
            ..
        } = pass;
        let (w, gpu, ranks, scale) = (self.weights, self.gpu, adapter.group.ranks, adapter.scale);
        let v = gpu.uninit(self.kind, tokens * ranks)?;
        for m in &w.members {
            let Some((b, rank, column)) = adapter.group.b(m.linear) else {
                continue;
            };
            let (g_m, v_m) = (g.matrix_at(m.column, w.output), v.matrix_at(column, ranks));
            gpu.matmul(
                [tokens, rank, m.out],
                g_m,
                adapter.matrices.matrix_at(b, rank),
                v_m,
                scale,
                0.0,
            )?;
            if let Some(slot) = gradients.get(ParamId::Block(block, BlockParam::LoraA(m.linear))) {
                gpu.matmul(
                    [rank, w.input, tokens],
                    v_m.t(),
                    x.matrix(w.input),
                    slot.matrix(w.input),
                    1.0,
                    1.0,
                )?;
            }
            if let Some(slot) = gradients.get(ParamId::Block(block, BlockParam::LoraB(m.linear))) {
                gpu.matmul(
                    [m.out, rank, tokens],
                    g_m.t(),
                    u.matrix_at(column, ranks),
                    slot.matrix(rank),
                    scale,
                    1.0,
                )?;
            }
        }
        gpu.matmul(
            [tokens, w.input, ranks],
            v.matrix(ranks),
            adapter.a(w.input),
            dx.matrix(w.input),
            1.0,
            1.0,
        )
    }
}
