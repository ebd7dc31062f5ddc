//! Grouped-query attention over the segments of a packed row, tiled by query blocks: no T×T matrix exists.
//!
//! Forward: per block and head, S = scale·Q·Kᵀ over the keys of the prompt and of the segment itself, P = softmax(S), O = P·V; the log-sum-exp of
//! each row is kept. Backward recomputes P from it (arXiv:2205.14135, §3.1, without the on-chip part):
//! dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ⊙ (dP − rowsum(dO ⊙ O)), dQ = scale·dS·K, dK = scale·dSᵀ·Q.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::gemm::{Threads, matmul_raw};
use super::simd::{dispatch, dot, exp, max, sum};
use super::{slice, tensor, with_values};
use crate::model::layout::RowLayout;

const OP: &str = "segment-attention";
/// Queries in a block.
const BLOCK: usize = 64;

/// The shape of the heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// H.
    pub query: usize,
    /// K; divides H.
    pub key: usize,
    /// D.
    pub dim: usize,
    /// A query sees this many positions back, itself included; `None` sees all.
    pub window: Option<usize>,
}

/// q `[T, H·D]`, k and v `[T, K·D]` → `[T, H·D]`, scaled by 1/√D.
pub fn segment_attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, layout: &Arc<RowLayout>) -> Result<Tensor> {
    q.apply_op3(k, v, Attention { heads, layout: layout.clone(), lse: OnceLock::new() })
}

struct Attention {
    heads: Heads,
    layout: Arc<RowLayout>,
    /// `[T, H]`, filled by the forward pass.
    lse: OnceLock<Vec<f32>>,
}

/// A block of queries with the keys they may see: first the prompt's, then their own segment's up to the last query.
struct Block {
    queries: Range<usize>,
    prefix: Range<usize>,
    own: Range<usize>,
}

impl Block {
    fn keys(&self) -> usize {
        self.prefix.len() + self.own.len()
    }
}

/// Pointers into tensors whose heads interleave, so that no slice can describe one task's part.
#[derive(Clone, Copy)]
struct Ptr(*mut f32);
// SAFETY: tasks write disjoint (token, head) parts; inputs are only read.
unsafe impl Send for Ptr {}
// SAFETY: as above.
unsafe impl Sync for Ptr {}

impl Ptr {
    fn read(values: &[f32]) -> Ptr {
        Ptr(values.as_ptr().cast_mut())
    }

    /// SAFETY of use: `offset` stays inside the tensor.
    unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: forwarded to the caller.
        unsafe { self.0.add(offset) }
    }
}

impl Attention {
    fn blocks(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        for s in &self.layout.segments {
            let mut start = s.tokens.start;
            while start < s.tokens.end {
                let end = (start + BLOCK).min(s.tokens.end);
                blocks.push(Block { queries: start..end, prefix: s.prefix.clone(), own: s.tokens.start..end });
                start = end;
            }
        }
        blocks
    }

    fn check(&self, q: usize, k: usize, v: usize) -> Result<usize> {
        let Heads { query, key, dim, .. } = self.heads;
        let tokens = self.layout.tokens();
        if q != tokens * query * dim || k != tokens * key * dim || v != k || query % key != 0 {
            bail!("{OP}: q {q}, k {k}, v {v} values do not fit {tokens} tokens of {query}/{key} heads of {dim}");
        }
        Ok(tokens)
    }

    /// Writes the masked scores of one block and head into `s` `[queries, keys]`.
    ///
    /// # Safety
    /// `q` and `k` point to tensors of this op's shapes; `s` has room for `queries × keys`.
    unsafe fn scores(&self, q: Ptr, k: Ptr, block: &Block, head: usize, s: &mut [f32]) {
        let Heads { query, key, dim, window } = self.heads;
        let (wq, wk, kv) = (query * dim, key * dim, head / (query / key));
        let (rows, keys, shared) = (block.queries.len(), block.keys(), block.prefix.len());
        let scale = 1.0 / (dim as f32).sqrt();
        // SAFETY: offsets stay inside [T, width] because blocks lie inside the row.
        unsafe {
            let qp = q.at(block.queries.start * wq + head * dim);
            let sp = s.as_mut_ptr();
            for (range, column) in [(&block.prefix, 0), (&block.own, shared)] {
                if !range.is_empty() {
                    let kp = k.at(range.start * wk + kv * dim);
                    matmul_raw((rows, dim, range.len()), sp.add(column), keys, false, scale, (qp, wq, 1), (kp, 1, wk), Threads::One);
                }
            }
        }
        let first = block.queries.start - block.own.start;
        for (i, row) in s[..rows * keys].chunks_mut(keys).enumerate() {
            let position = shared + first + i;
            row[position + 1..].fill(f32::NEG_INFINITY);
            if let Some(w) = window {
                row[..(position + 1).saturating_sub(w)].fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Turns a row of scores into probabilities and returns their log-sum-exp.
#[inline(always)]
fn softmax(row: &mut [f32]) -> f32 {
    let m = max(row);
    for x in row.iter_mut() {
        *x = masked_exp(*x, m);
    }
    let z = sum(row.len(), |i| row[i]);
    let inverse = 1.0 / z;
    for x in row.iter_mut() {
        *x *= inverse;
    }
    m + z.ln()
}

/// e^(x − m), exactly 0 where x is −∞ (the clamped [`exp`] would leave 1e-38).
#[inline(always)]
fn masked_exp(x: f32, m: f32) -> f32 {
    let e = exp(x - m);
    if x == f32::NEG_INFINITY { 0.0 } else { e }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (slice(OP, q, lq)?, slice(OP, k, lk)?, slice(OP, v, lv)?);
        let tokens = self.check(q.len(), k.len(), v.len())?;
        let Heads { query, key, dim, .. } = self.heads;
        let (wq, wk) = (query * dim, key * dim);
        let (mut out, mut lse) = (vec![0f32; tokens * wq], vec![0f32; tokens * query]);
        let (qp, kp, vp, op, lp) = (Ptr::read(q), Ptr::read(k), Ptr::read(v), Ptr(out.as_mut_ptr()), Ptr(lse.as_mut_ptr()));
        let blocks = self.blocks();
        (0..blocks.len() * query).into_par_iter().for_each_init(Vec::new, |s: &mut Vec<f32>, task| {
            let (block, head) = (&blocks[task / query], task % query);
            let (rows, keys, shared) = (block.queries.len(), block.keys(), block.prefix.len());
            s.resize(rows * keys, 0.0);
            // SAFETY: this task alone writes the outputs of (block.queries, head); all offsets lie inside the tensors checked above.
            unsafe {
                self.scores(qp, kp, block, head, s);
                for (i, row) in s.chunks_mut(keys).enumerate() {
                    let l = dispatch(
                        #[inline(always)]
                        || softmax(row),
                    );
                    *lp.at((block.queries.start + i) * query + head) = l;
                }
                let dst = op.at(block.queries.start * wq + head * dim);
                let mut keep = false;
                for (range, column) in [(&block.prefix, 0), (&block.own, shared)] {
                    if !range.is_empty() {
                        let vp = vp.at(range.start * wk + head / (query / key) * dim);
                        let p = s.as_ptr().add(column);
                        matmul_raw((rows, range.len(), dim), dst, wq, keep, 1.0, (p, keys, 1), (vp, wk, 1), Threads::One);
                        keep = true;
                    }
                }
            }
        });
        let _ = self.lse.set(lse);
        Ok((CpuStorage::F32(out), lq.shape().clone()))
    }

    fn bwd(&self, q: &Tensor, k: &Tensor, v: &Tensor, o: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(lse) = self.lse.get() else { bail!("{OP}: backward without forward") };
        let (dq, dk, dv) = with_values(OP, q, |q| {
            with_values(OP, k, |k| {
                with_values(OP, v, |v| with_values(OP, o, |o| with_values(OP, g, |g| self.gradients(q, k, v, o, g, lse))))
            })
        })??????;
        Ok((Some(tensor(dq, q.shape().clone())?), Some(tensor(dk, k.shape().clone())?), Some(tensor(dv, v.shape().clone())?)))
    }
}

impl Attention {
    fn gradients(&self, q: &[f32], k: &[f32], v: &[f32], o: &[f32], g: &[f32], lse: &[f32]) -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)> {
        self.check(q.len(), k.len(), v.len())?;
        let Heads { query, key, dim, .. } = self.heads;
        let wq = query * dim;
        let (mut dq, mut dk, mut dv) = (vec![0f32; q.len()], vec![0f32; k.len()], vec![0f32; v.len()]);
        let outputs = (Ptr(dq.as_mut_ptr()), Ptr(dk.as_mut_ptr()), Ptr(dv.as_mut_ptr()));
        let inputs = (Ptr::read(q), Ptr::read(k), Ptr::read(v), Ptr::read(g));
        let blocks = self.blocks();
        // One task per key/value head: its query heads add to the same dK and dV, in a fixed order.
        (0..key).into_par_iter().for_each(|kv| {
            let (mut p, mut ds) = (Vec::new(), Vec::new());
            for head in kv * (query / key)..(kv + 1) * (query / key) {
                for block in &blocks {
                    let (rows, keys) = (block.queries.len(), block.keys());
                    p.resize(rows * keys, 0.0);
                    ds.resize(rows * keys, 0.0);
                    // SAFETY: this task alone writes dq of its query heads and dk, dv of its key head; offsets lie inside the checked tensors.
                    unsafe {
                        self.scores(inputs.0, inputs.1, block, head, &mut p);
                        self.upstream(inputs.2, inputs.3, block, head, &mut ds);
                    }
                    for (i, (p, ds)) in p.chunks_mut(keys).zip(ds.chunks_mut(keys)).enumerate() {
                        let token = block.queries.start + i;
                        let at = token * wq + head * dim;
                        let l = lse[token * query + head];
                        dispatch(
                            #[inline(always)]
                            || {
                                let delta = dot(&o[at..at + dim], &g[at..at + dim]);
                                for (p, ds) in p.iter_mut().zip(ds.iter_mut()) {
                                    *p = masked_exp(*p, l);
                                    *ds = *p * (*ds - delta);
                                }
                            },
                        );
                    }
                    // SAFETY: as above.
                    unsafe { self.accumulate(inputs, outputs, block, head, &p, &ds) };
                }
            }
        });
        Ok((dq, dk, dv))
    }

    /// dP = dO·Vᵀ into `dp` `[queries, keys]`.
    ///
    /// # Safety
    /// As [`Attention::scores`].
    unsafe fn upstream(&self, v: Ptr, g: Ptr, block: &Block, head: usize, dp: &mut [f32]) {
        let Heads { query, key, dim, .. } = self.heads;
        let (wq, wk, kv) = (query * dim, key * dim, head / (query / key));
        let (rows, keys) = (block.queries.len(), block.keys());
        for (range, column) in [(&block.prefix, 0), (&block.own, block.prefix.len())] {
            if !range.is_empty() {
                // SAFETY: forwarded to the caller.
                unsafe {
                    let (gp, vp) = (g.at(block.queries.start * wq + head * dim), v.at(range.start * wk + kv * dim));
                    let dst = dp.as_mut_ptr().add(column);
                    matmul_raw((rows, dim, range.len()), dst, keys, false, 1.0, (gp, wq, 1), (vp, 1, wk), Threads::One);
                }
            }
        }
    }

    /// dQ = scale·dS·K; dK += scale·dSᵀ·Q; dV += Pᵀ·dO.
    ///
    /// # Safety
    /// As [`Attention::scores`]; no other task touches dq of `head` or dk, dv of its key head.
    unsafe fn accumulate(
        &self,
        (q, k, _v, g): (Ptr, Ptr, Ptr, Ptr),
        (dq, dk, dv): (Ptr, Ptr, Ptr),
        block: &Block,
        head: usize,
        p: &[f32],
        ds: &[f32],
    ) {
        let Heads { query, key, dim, .. } = self.heads;
        let (wq, wk, kv) = (query * dim, key * dim, head / (query / key));
        let (rows, keys) = (block.queries.len(), block.keys());
        let scale = 1.0 / (dim as f32).sqrt();
        let at_q = block.queries.start * wq + head * dim;
        let mut keep = false;
        for (range, column) in [(&block.prefix, 0), (&block.own, block.prefix.len())] {
            if range.is_empty() {
                continue;
            }
            let (n, at_k) = (range.len(), range.start * wk + kv * dim);
            // SAFETY: forwarded to the caller.
            unsafe {
                let (p, ds) = (p.as_ptr().add(column), ds.as_ptr().add(column));
                matmul_raw((rows, n, dim), dq.at(at_q), wq, keep, scale, (ds, keys, 1), (k.at(at_k), wk, 1), Threads::One);
                matmul_raw((n, rows, dim), dk.at(at_k), wk, true, scale, (ds, 1, keys), (q.at(at_q), wq, 1), Threads::One);
                matmul_raw((n, rows, dim), dv.at(at_k), wk, true, 1.0, (p, 1, keys), (g.at(at_q), wq, 1), Threads::One);
            }
            keep = true;
        }
    }
}
