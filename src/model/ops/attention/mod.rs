//! Grouped-query attention over the segments of a packed row, tiled by query blocks: no T×T matrix exists.
//!
//! Forward: per block and head, S = scale·Q·Kᵀ over the keys of the prompt and of the segment itself, P = softmax(S), O = P·V; the log-sum-exp of
//! each row is kept. Backward recomputes P from it (arXiv:2205.14135, §3.1, without the on-chip part):
//! dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ⊙ (dP − rowsum(dO ⊙ O)), dQ = scale·dS·K, dK = scale·dSᵀ·Q.
//!
//! Blocks start where their segment starts, so a segment's numbers do not depend on where in the row it lies.

mod backward;
mod keys;

use std::ops::Range;

pub use self::backward::{SCORES, attention_backward};
use self::keys::{Along, Keys};
use super::buffer::Buffer;
use super::gemm::{Kernel, NR, Operand, Product, Shared, View, panel_product};
use super::simd::{dispatch, exp_sum, max};
use super::team;
use crate::model::layout::RowLayout;

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

impl Heads {
    /// Width of a row of `[q | k | v]`.
    pub fn row(&self) -> usize {
        (self.query + 2 * self.key) * self.dim
    }

    /// Width of a row of the output.
    pub fn width(&self) -> usize {
        self.query * self.dim
    }

    /// Factor of the scores, 1/√D.
    pub fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// Where in a row of `[q | k | v]` key head `kv`'s keys begin.
    fn key_at(&self, kv: usize) -> usize {
        (self.query + kv) * self.dim
    }

    /// Where its values begin.
    fn value_at(&self, kv: usize) -> usize {
        (self.query + self.key + kv) * self.dim
    }
}

/// A block of queries with the keys they may see: all of the prompt's, then their own segment's up to the last query.
#[derive(Clone, Debug)]
struct Block {
    queries: Range<usize>,
    segment: usize,
    prefix: Option<usize>,
    /// Keys of the prefix.
    shared: usize,
    /// Keys of the own segment up to the last query.
    own: usize,
}

impl Block {
    /// Columns of the score matrix: each part padded to whole panels.
    fn shared_columns(&self) -> usize {
        self.shared.next_multiple_of(NR)
    }

    fn columns(&self) -> usize {
        self.shared_columns() + self.own.next_multiple_of(NR)
    }

    /// The first query of the block that sees any of the `i`-th panel of its own segment's keys; a multiple of [`NR`].
    fn first_to_see(&self, i: usize) -> usize {
        (i * NR).saturating_sub(self.own - self.queries.len())
    }

    /// For query `i` of the block: the columns it sees in the prefix, and in its own segment.
    fn visible(&self, i: usize, window: Option<usize>) -> [Range<usize>; 2] {
        let own = self.own - self.queries.len() + i + 1;
        let hidden = window.map_or(0, |w| (self.shared + own).saturating_sub(w));
        let base = self.shared_columns();
        [hidden.min(self.shared)..self.shared, base + hidden.saturating_sub(self.shared)..base + own]
    }
}

fn blocks(layout: &RowLayout) -> Vec<Block> {
    let mut blocks = Vec::new();
    for (index, s) in layout.segments.iter().enumerate() {
        let prefix = if s.prefix.is_empty() { None } else { layout.segments.iter().position(|p| p.tokens == s.prefix) };
        let mut start = s.tokens.start;
        while start < s.tokens.end {
            let end = (start + BLOCK).min(s.tokens.end);
            blocks.push(Block { queries: start..end, segment: index, prefix, shared: s.prefix.len(), own: end - s.tokens.start });
            start = end;
        }
    }
    blocks
}

/// The two parts of a block's keys: segment, keys, first column.
fn parts(block: &Block) -> impl Iterator<Item = (usize, usize, usize)> {
    let prefix = block.prefix.map(|p| (p, block.shared, 0));
    prefix.into_iter().chain([(block.segment, block.own, block.shared_columns())])
}

/// `s[rows, columns] = A·B` over the key panels of a block, `a` being the queries' `[rows, D]` operand. Rows that see nothing of a panel are left as they are.
fn over_keys(kernel: Kernel, a: &Operand, rows: usize, keys: &Keys, head: usize, block: &Block, s: &mut [f32]) {
    let columns = block.columns();
    assert!(s.len() >= rows * columns);
    for (segment, count, first) in parts(block) {
        for i in 0..count.div_ceil(NR) {
            let (depth, panel) = keys.across(head, segment, i);
            let top = if segment == block.segment { block.first_to_see(i) } else { 0 };
            // SAFETY: the panel's columns are inside the padded row of `s`; the operand has `rows` rows.
            unsafe {
                let to = s.as_mut_ptr().add(top * columns + first + i * NR);
                panel_product(kernel, rows - top, NR, &[a.product(top, 0, depth, panel)], to, columns, false);
            }
        }
    }
}

/// `to[rows, D] = A·B` summed over a block's keys, `a` being a `[rows, columns]` operand that is zero where a query does not see. A few rows at a time, so
/// that the keys after them are left out.
///
/// # Safety
/// `to` is valid for `rows` rows of D, `stride` apart, and nobody else touches them.
unsafe fn sum_over_keys(kernel: Kernel, a: &Operand, rows: usize, keys: &Along, head: usize, block: &Block, to: *mut f32, stride: usize) {
    for (panel, n) in keys.panels() {
        for top in (0..rows).step_by(NR) {
            let some = NR.min(rows - top);
            let mut products = [Product::EMPTY; 2];
            let mut count = 0;
            for (segment, used, first) in parts(block) {
                let used = if segment == block.segment { used - (rows - top - some) } else { used };
                products[count] = a.product(top, first, kernel.depth(used), keys.units(head, segment, panel));
                count += 1;
            }
            // SAFETY: by the caller.
            unsafe { panel_product(kernel, some, n, &products[..count], to.add(top * stride + panel * NR), stride, false) };
        }
    }
}

/// `qkv` `[T, (H + 2K)·D]` → `out` `[T, H·D]`, scaled by 1/√D; `lse` `[T, H]` receives the log-sum-exp of each query.
pub fn attention(kernel: Kernel, qkv: &[f32], heads: Heads, layout: &RowLayout, out: &mut [f32], lse: &mut [f32]) {
    let (row, width, group) = (heads.row(), heads.width(), heads.query / heads.key);
    let tokens = layout.tokens();
    assert!(qkv.len() >= tokens * row && out.len() >= tokens * width && lse.len() >= tokens * heads.query);
    let blocks = blocks(layout);
    let keys = Keys::pack(kernel, layout, qkv, row, heads.dim, heads.key, |kv| heads.key_at(kv));
    let values = Along::pack(kernel, layout, qkv, row, heads.dim, heads.key, |kv| heads.value_at(kv));
    let (out, lse) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    // Long blocks first: what is left at the end is short.
    let mut tasks: Vec<(usize, usize)> = (0..blocks.len()).flat_map(|b| (0..heads.query).map(move |h| (b, h))).collect();
    tasks.sort_by_key(|(b, _)| std::cmp::Reverse(blocks[*b].columns()));
    team::for_each(tasks.len(), |task| {
        let (b, head) = tasks[task];
        let block = &blocks[b];
        let (rows, columns) = (block.queries.len(), block.columns());
        let mut s = Buffer::dirty(rows * columns);
        let q = View::f32(&qkv[block.queries.start * row + head * heads.dim..], row);
        let q = Operand::new(kernel, q, rows, heads.dim, 1.0);
        over_keys(kernel, &q, rows, &keys, head / group, block, &mut s);
        let mut inverse = [0f32; BLOCK];
        let p = Operand::prepared(kernel, &mut s, columns, |i, s| {
            let visible = block.visible(i, heads.window);
            let (m, total) = dispatch(
                #[inline(always)]
                || softmax(s, &visible, heads.scale()),
            );
            inverse[i] = 1.0 / total;
            // SAFETY: this task alone writes its queries and head.
            unsafe { *lse.at((block.queries.start + i) * heads.query + head) = m + total.ln() };
        });
        // SAFETY: as above; the rows of the output lie `width` apart.
        unsafe {
            let to = out.at(block.queries.start * width + head * heads.dim);
            sum_over_keys(kernel, &p, rows, &values, head / group, block, to, width);
            for (i, inverse) in inverse[..rows].iter().enumerate() {
                std::slice::from_raw_parts_mut(to.add(i * width), heads.dim).iter_mut().for_each(|x| *x *= inverse);
            }
        }
    });
}

/// Replaces scores by e^(scale·s − m) where they are visible, by 0 elsewhere; returns m and the sum.
#[inline(always)]
fn softmax(s: &mut [f32], visible: &[Range<usize>; 2], scale: f32) -> (f32, f32) {
    let m = max(&s[visible[0].clone()]).max(max(&s[visible[1].clone()])) * scale;
    let mut total = 0.0;
    let mut cleared = 0;
    for part in visible {
        s[cleared..part.start].fill(0.0);
        cleared = part.end;
        total += exp_sum(&mut s[part.clone()], scale, m);
    }
    s[cleared..].fill(0.0);
    (m, total)
}
