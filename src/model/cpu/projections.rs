//! Groups of linear layers with the same input, computed together with their adapters:
//! `[q | k | v]`, `o`, `[gate | up]`, `down`.
//!
//! y_i = x·W_iᵀ + b_i + s·(x·A_iᵀ)·B_iᵀ (arXiv:2106.09685), where s is the adapter's
//! scale. The adapter's term is a further term of the same GEMM, except in
//! [`CpuLinearGroup::add_low_rank`]. The gradient of a frozen W is never computed.

use std::ops::Range;

use candle_core::Result;

use crate::compute::cpu::TensorRead;
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm::{Kernel, NR, Operand, Term, Threads, View, matmul, matmul_tiles};
use crate::compute::cpu::thread_pool;
use crate::model::adapter::Adapter;
use crate::model::gradients::GradientSink;
use crate::model::parameters::Parameters;
use crate::model::params::{BlockParam, Linear, LinearGroup, ParamId};
use crate::model::weight_matrix::WeightRead;

/// Number of outputs (rows of B) per task when the gradient of B is accumulated.
const OUTPUTS_PER_TASK: usize = 192;

/// A linear layer of a group.
struct CpuLinear<'a> {
    linear: Linear,
    weight: WeightRead<'a>,
    bias: Option<TensorRead<'a>>,
    /// A `[r, in]` and B `[out, r]`.
    low_rank: Option<(TensorRead<'a>, TensorRead<'a>)>,
    out: usize,
    /// First column of the layer in the joint output.
    column: usize,
    /// First column of the layer in x·Aᵀ `[T, Σr]`.
    rank_column: usize,
}

/// A group of linear layers of a block, opened for a pass.
pub(super) struct CpuLinearGroup<'a> {
    kernel: Kernel,
    block: usize,
    members: Vec<CpuLinear<'a>>,
    input: usize,
    output: usize,
    /// The A of all members, stacked `[Σr, in]`.
    stacked_a: Buffer,
    ranks: usize,
    scale: f32,
}

impl<'a> CpuLinearGroup<'a> {
    /// Opens a group of block `block`.
    pub fn open(
        kernel: Kernel,
        block: usize,
        parameters: &'a Parameters,
        adapter: Option<&'a Adapter>,
        group: LinearGroup,
    ) -> Result<Self> {
        let linears = group.members();
        let (mut members, mut output, mut ranks, mut input) =
            (Vec::with_capacity(linears.len()), 0, 0, 0);
        for &linear in linears {
            if !parameters.has(ParamId::Block(block, BlockParam::Weight(linear))) {
                continue;
            }
            let p = parameters.linear(block, linear)?;
            let (out, width) = (p.weight.rows(), p.weight.columns());
            let low_rank = adapter.and_then(|a| a.get(block, linear));
            let rank = match low_rank {
                Some(l) => l.a.dim(0)?,
                None => 0,
            };
            members.push(CpuLinear {
                linear,
                weight: p.weight.read()?,
                bias: p.bias.map(TensorRead::of).transpose()?,
                low_rank: low_rank
                    .map(|l| {
                        Ok::<_, candle_core::Error>((TensorRead::of(&l.a)?, TensorRead::of(&l.b)?))
                    })
                    .transpose()?,
                out,
                column: output,
                rank_column: ranks,
            });
            (output, ranks, input) = (output + out, ranks + rank, width);
        }
        let mut stacked_a = Buffer::uninit(ranks * input);
        for m in &members {
            if let Some((a, _)) = &m.low_rank {
                let a = a.f32()?;
                stacked_a[m.rank_column * input..][..a.len()].copy_from_slice(a);
            }
        }
        let scale = adapter.map_or(1.0, |a| a.config.scale() as f32);
        Ok(CpuLinearGroup {
            kernel,
            block,
            members,
            input,
            output,
            stacked_a,
            ranks,
            scale,
        })
    }

    /// Returns Σout, the width of the joint output.
    pub fn output(&self) -> usize {
        self.output
    }

    /// Returns the id of a parameter of the block.
    fn id(&self, param: BlockParam) -> ParamId {
        ParamId::Block(self.block, param)
    }

    /// Returns the rank of a member; 0 without an adapter.
    fn rank(&self, m: &CpuLinear) -> usize {
        m.low_rank
            .as_ref()
            .map_or(0, |(a, _)| a.elements().len() / self.input)
    }

    /// Computes the outputs `[T, Σout]` of the group for `x` `[T, in]`. Adds them to `y` if
    /// `accumulate` is true, otherwise overwrites `y`. Returns x·Aᵀ `[T, Σr]` for the backward
    /// pass.
    pub fn forward(
        &self,
        x: &Operand,
        tokens: usize,
        y: &mut [f32],
        accumulate: bool,
    ) -> Result<Buffer> {
        let u = self.low_rank_inputs(x, tokens);
        for m in &self.members {
            let y = &mut y[m.column..];
            let mut accumulate = accumulate;
            if let Some(bias) = &m.bias {
                for row in y.chunks_mut(self.output) {
                    for (y, b) in row.iter_mut().zip(bias.f32()?) {
                        *y = if accumulate { *y + b } else { *b };
                    }
                }
                accumulate = true;
            }
            let weight = Term::new(x, m.weight.view().transposed());
            match &m.low_rank {
                Some((_, b)) => {
                    let scaled = self.scaled(m, &u, tokens);
                    let low_rank = Term::new(&scaled, View::of(b.elements(), self.rank(m)).t());
                    matmul(
                        tokens,
                        m.out,
                        &[weight, low_rank],
                        y,
                        self.output,
                        accumulate,
                        Threads::All,
                    );
                }
                None => matmul(
                    tokens,
                    m.out,
                    &[weight],
                    y,
                    self.output,
                    accumulate,
                    Threads::All,
                ),
            }
        }
        Ok(u)
    }

    /// Returns true if [`CpuLinearGroup::forward_tiles`] supports the group: it must have `P`
    /// members without biases and of the same width, which must be a multiple of the panel width
    /// [`NR`].
    pub fn is_tiled<const P: usize>(&self) -> bool {
        let fits = |m: &CpuLinear| {
            m.bias.is_none() && m.out == self.members[0].out && m.out.is_multiple_of(NR)
        };
        self.members.len() == P && self.members.iter().all(fits)
    }

    /// Computes the outputs like [`CpuLinearGroup::forward`], but tile by tile. `finish` gets the
    /// rows and columns of a tile and its values for each member. Returns x·Aᵀ `[T, Σr]`.
    pub fn forward_tiles<const P: usize>(
        &self,
        x: &Operand,
        tokens: usize,
        finish: impl Fn(Range<usize>, Range<usize>, [&mut [f32]; P]) + Sync,
    ) -> Buffer {
        let u = self.low_rank_inputs(x, tokens);
        let scaled: Vec<Operand> = self
            .members
            .iter()
            .map(|m| self.scaled(m, &u, tokens))
            .collect();
        let terms = |p: usize| -> Vec<Term> {
            let m = &self.members[p];
            let weight = Term::new(x, m.weight.view().transposed());
            let low_rank = m
                .low_rank
                .as_ref()
                .map(|(_, b)| Term::new(&scaled[p], View::of(b.elements(), self.rank(m)).t()));
            std::iter::once(weight).chain(low_rank).collect()
        };
        let terms: [Vec<Term>; P] = std::array::from_fn(terms);
        matmul_tiles(
            tokens,
            self.members[0].out,
            terms.each_ref().map(Vec::as_slice),
            finish,
        );
        u
    }

    /// Adds s·(x·A_iᵀ)·B_iᵀ to the rows `rows` of `y` `[T, Σout]`. The terms are added
    /// after those of the base weights, in the same order as in [`CpuLinearGroup::forward`], so
    /// that the results are bit-identical.
    pub fn add_low_rank(&self, x: &Operand, rows: Range<usize>, y: &mut [f32]) {
        if self.ranks == 0 || rows.is_empty() {
            return;
        }
        let tokens = rows.len();
        let u = self.low_rank_inputs(&x.part(rows.clone()), tokens);
        for m in &self.members {
            let Some((_, b)) = &m.low_rank else { continue };
            let scaled = self.scaled(m, &u, tokens);
            let y = &mut y[rows.start * self.output + m.column..];
            matmul(
                tokens,
                m.out,
                &[Term::new(&scaled, View::of(b.elements(), self.rank(m)).t())],
                y,
                self.output,
                true,
                Threads::All,
            );
        }
    }

    /// Returns x·Aᵀ `[T, Σr]`.
    fn low_rank_inputs(&self, x: &Operand, tokens: usize) -> Buffer {
        let mut u = Buffer::uninit(tokens * self.ranks);
        if self.ranks > 0 {
            let a = View::f32(&self.stacked_a, self.input).t();
            matmul(
                tokens,
                self.ranks,
                &[Term::new(x, a)],
                &mut u,
                self.ranks,
                false,
                Threads::All,
            );
        }
        u
    }

    /// Returns s·u of a member `[T, r]`, where u = x·Aᵀ.
    fn scaled<'u>(&self, m: &CpuLinear, u: &'u [f32], tokens: usize) -> Operand<'u> {
        Operand::new(
            self.kernel,
            View::f32(&u[m.rank_column..], self.ranks),
            tokens,
            self.rank(m),
            self.scale,
        )
    }

    /// Runs the group backward: accumulates the gradients of the parameters in `gradients` and
    /// returns ∂loss/∂x `[T, in]`. The inputs are g = ∂loss/∂y `[T, Σout]`, x, and u, the
    /// result of [`CpuLinearGroup::forward`].
    ///
    /// With v_i = s·g_i·B_i: dx = Σ g_i·W_i + v_i·A_i, dA_i = v_iᵀ·x,
    /// dB_i = s·g_iᵀ·u_i, dW_i = g_iᵀ·x, db_i = Σ_tokens g_i.
    pub fn backward(
        &self,
        x: &Operand,
        u: &[f32],
        g: &[f32],
        tokens: usize,
        gradients: &mut dyn GradientSink,
    ) -> Result<Buffer> {
        let view = |m: &CpuLinear| View::f32(&g[m.column..], self.output);
        let gs: Vec<Operand> = self
            .members
            .iter()
            .map(|m| Operand::new(self.kernel, view(m), tokens, m.out, 1.0))
            .collect();
        let dx = self.backward_frozen(x, u, &gs, tokens, gradients)?;
        self.weight_gradients(x, g, tokens, gradients);
        Ok(dx)
    }

    /// Runs the group backward like [`CpuLinearGroup::backward`], with frozen weights and biases.
    /// `gs` holds each member's part of g.
    pub fn backward_frozen(
        &self,
        x: &Operand,
        u: &[f32],
        gs: &[Operand],
        tokens: usize,
        gradients: &mut dyn GradientSink,
    ) -> Result<Buffer> {
        let mut dx = Buffer::uninit(tokens * self.input);
        let v = self.input_gradient(gs, tokens, |terms| {
            matmul(
                tokens,
                self.input,
                terms,
                &mut dx,
                self.input,
                false,
                Threads::All,
            )
        });
        self.low_rank_gradients(x, u, gs, &v, tokens, gradients);
        Ok(dx)
    }

    /// Computes ∂loss/∂x with frozen weights, tile by tile: `finish` gets the rows and columns
    /// of a tile and its values. Returns v/s = g·B `[T, Σr]` for
    /// [`CpuLinearGroup::low_rank_gradients`].
    pub fn backward_tiles(
        &self,
        gs: &[Operand],
        tokens: usize,
        finish: impl Fn(Range<usize>, Range<usize>, [&mut [f32]; 1]) + Sync,
    ) -> Buffer {
        self.input_gradient(gs, tokens, |terms| {
            matmul_tiles(tokens, self.input, [terms], finish)
        })
    }

    /// Calls `multiply` with the GEMM terms that add up to ∂loss/∂x. Returns v/s = g·B
    /// `[T, Σr]`.
    fn input_gradient(
        &self,
        gs: &[Operand],
        tokens: usize,
        multiply: impl FnOnce(&[Term]),
    ) -> Buffer {
        let kernel = self.kernel;
        let mut v = Buffer::uninit(tokens * self.ranks);
        for (m, g) in self.members.iter().zip(gs) {
            if let Some((_, b)) = &m.low_rank {
                let rank = self.rank(m);
                let term = Term::new(g, View::of(b.elements(), rank));
                matmul(
                    tokens,
                    rank,
                    &[term],
                    &mut v[m.rank_column..],
                    self.ranks,
                    false,
                    Threads::All,
                );
            }
        }
        let scaled = Operand::new(
            kernel,
            View::f32(&v, self.ranks.max(1)),
            tokens,
            self.ranks,
            self.scale,
        );
        let mut terms: Vec<Term> = self
            .members
            .iter()
            .zip(gs)
            .map(|(m, g)| Term::new(g, m.weight.view().plain()))
            .collect();
        if self.ranks > 0 {
            terms.push(Term::new(&scaled, View::f32(&self.stacked_a, self.input)));
        }
        multiply(&terms);
        v
    }

    /// Accumulates the adapter's gradients in `gradients`. The inputs are x, u as returned by the
    /// forward pass, each member's part of g, and v/s as returned by the backward pass in the
    /// parameter `v`.
    pub fn low_rank_gradients(
        &self,
        x: &Operand,
        u: &[f32],
        gs: &[Operand],
        v: &[f32],
        tokens: usize,
        gradients: &mut dyn GradientSink,
    ) {
        if self.ranks == 0 {
            return;
        }
        let kernel = self.kernel;
        let transposed = Operand::new(
            kernel,
            View::f32(v, self.ranks).t(),
            self.ranks,
            tokens,
            self.scale,
        );
        let mut da = Buffer::uninit(self.ranks * self.input);
        matmul(
            self.ranks,
            self.input,
            &[Term::new(&transposed, x.view())],
            &mut da,
            self.input,
            false,
            Threads::All,
        );
        for (m, g) in self.members.iter().zip(gs) {
            let rank = self.rank(m);
            if rank == 0 {
                continue;
            }
            if let Some(slot) = gradients.get_mut(self.id(BlockParam::LoraA(m.linear))) {
                slot.iter_mut()
                    .zip(&da[m.rank_column * self.input..])
                    .for_each(|(s, d)| *s += d);
            }
            if let Some(slot) = gradients.get_mut(self.id(BlockParam::LoraB(m.linear))) {
                // Computes dBᵀ `[r, out]`, because GEMM is faster with the long side in the
                // columns.
                let u = Operand::new(
                    kernel,
                    View::f32(&u[m.rank_column..], self.ranks).t(),
                    rank,
                    tokens,
                    self.scale,
                );
                let mut db = Buffer::uninit(rank * m.out);
                matmul(
                    rank,
                    m.out,
                    &[Term::new(&u, g.view())],
                    &mut db,
                    m.out,
                    false,
                    Threads::All,
                );
                let width = m.out;
                thread_pool::chunks(slot, rank * OUTPUTS_PER_TASK, |i, slots| {
                    for (slot, o) in slots.chunks_mut(rank).zip(i * OUTPUTS_PER_TASK..) {
                        slot.iter_mut()
                            .enumerate()
                            .for_each(|(r, s)| *s += db[r * width + o]);
                    }
                });
            }
        }
    }

    /// Accumulates the gradients of the weights and biases in `gradients`, if they are trained.
    fn weight_gradients(
        &self,
        x: &Operand,
        g: &[f32],
        tokens: usize,
        gradients: &mut dyn GradientSink,
    ) {
        for m in &self.members {
            if let Some(slot) = gradients.get_mut(self.id(BlockParam::Weight(m.linear))) {
                let g = Operand::new(
                    self.kernel,
                    View::f32(&g[m.column..], self.output).t(),
                    m.out,
                    tokens,
                    1.0,
                );
                matmul(
                    m.out,
                    self.input,
                    &[Term::new(&g, x.view())],
                    slot,
                    self.input,
                    true,
                    Threads::All,
                );
            }
            if m.bias.is_some()
                && let Some(slot) = gradients.get_mut(self.id(BlockParam::Bias(m.linear)))
            {
                for row in g[m.column..].chunks(self.output) {
                    slot.iter_mut().zip(row).for_each(|(s, g)| *s += g);
                }
            }
        }
    }
}
