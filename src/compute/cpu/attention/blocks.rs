//! Blocks of queries, and products with the keys that they see.

use std::ops::Range;

use super::keys::{Along, Keys};
use crate::compute::cpu::gemm::{NR, Operand, OutputTile, Product, panel_product};
use crate::compute::layout::RowLayout;

/// Queries in a block.
pub(super) const BLOCK: usize = 64;

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
    /// Factor of the scores.
    pub scale: f32,
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

    /// Where in a row of `[q | k | v]` key head `kv`'s keys begin.
    pub(super) fn key_at(&self, kv: usize) -> usize {
        (self.query + kv) * self.dim
    }

    /// Where its values begin.
    pub(super) fn value_at(&self, kv: usize) -> usize {
        (self.query + self.key + kv) * self.dim
    }
}

/// A block of queries with the keys they may see: all of the prompt's, then their own segment's up
/// to the last query.
#[derive(Clone, Debug)]
pub(super) struct QueryBlock {
    pub queries: Range<usize>,
    pub segment: usize,
    pub prefix: Option<usize>,
    /// Keys of the prefix.
    pub shared: usize,
    /// Keys of the own segment up to the last query.
    pub own: usize,
}

impl QueryBlock {
    /// Columns of the score matrix: each part padded to whole panels.
    pub(super) fn shared_columns(&self) -> usize {
        self.shared.next_multiple_of(NR)
    }

    pub(super) fn columns(&self) -> usize {
        self.shared_columns() + self.own.next_multiple_of(NR)
    }

    /// The first query of the block that sees any of the `i`-th panel of its own segment's keys; a
    /// multiple of [`NR`].
    pub(super) fn first_to_see(&self, i: usize) -> usize {
        (i * NR).saturating_sub(self.own - self.queries.len())
    }

    /// For query `i` of the block: the columns it sees in the prefix, and in its own segment.
    pub(super) fn visible(&self, i: usize, window: Option<usize>) -> [Range<usize>; 2] {
        let own = self.own - self.queries.len() + i + 1;
        let hidden = window.map_or(0, |w| (self.shared + own).saturating_sub(w));
        let base = self.shared_columns();
        [
            hidden.min(self.shared)..self.shared,
            base + hidden.saturating_sub(self.shared)..base + own,
        ]
    }
}

pub(super) fn blocks(layout: &RowLayout) -> Vec<QueryBlock> {
    let mut blocks = Vec::new();
    for (index, s) in layout.segments.iter().enumerate() {
        let prefix = if s.prefix.is_empty() {
            None
        } else {
            layout.segments.iter().position(|p| p.tokens == s.prefix)
        };
        let mut start = s.tokens.start;
        while start < s.tokens.end {
            let end = (start + BLOCK).min(s.tokens.end);
            blocks.push(QueryBlock {
                queries: start..end,
                segment: index,
                prefix,
                shared: s.prefix.len(),
                own: end - s.tokens.start,
            });
            start = end;
        }
    }
    blocks
}

/// The two parts of a block's keys: segment, keys, first column.
fn parts(block: &QueryBlock) -> impl Iterator<Item = (usize, usize, usize)> {
    let prefix = block.prefix.map(|p| (p, block.shared, 0));
    prefix.into_iter().chain([(block.segment, block.own, block.shared_columns())])
}

/// Computes `s[rows, columns] = A·B` over the key panels of a block, `a` being the queries'
/// `[rows, D]` operand. Rows that see nothing of a panel are left as they are.
pub(super) fn over_keys(a: &Operand, keys: &Keys, head: usize, block: &QueryBlock, s: &mut [f32]) {
    let (kernel, rows, columns) = (a.kernel(), block.queries.len(), block.columns());
    assert!(a.rows() >= rows && s.len() >= rows * columns);
    for (segment, count, first) in parts(block) {
        for i in 0..count.div_ceil(NR) {
            let (depth, panel) = keys.across(head, segment, i);
            let top = if segment == block.segment { block.first_to_see(i) } else { 0 };
            // SAFETY: the panel's columns are inside the padded row of `s`; the operand has `rows`
            // rows.
            unsafe {
                let c = s.as_mut_ptr().add(top * columns + first + i * NR);
                let out = OutputTile { c, stride: columns, columns: NR, accumulate: false };
                panel_product(kernel, rows - top, &[a.product(top, 0, depth, panel)], out);
            }
        }
    }
}

/// Computes `to[rows, D] = A·B` summed over a block's keys, `a` being a `[rows, columns]` operand
/// that is zero where a query does not see. It takes a few rows at a time, so that the keys after
/// them are left out.
///
/// # Safety
/// `to` is valid for the rows of the block's queries, D wide and `stride` apart, and nobody else
/// touches them.
pub(super) unsafe fn sum_over_keys(
    a: &Operand,
    keys: &Along,
    head: usize,
    block: &QueryBlock,
    to: *mut f32,
    stride: usize,
) {
    let (kernel, rows) = (a.kernel(), block.queries.len());
    debug_assert!(a.rows() >= rows);
    for (panel, n) in keys.panels() {
        for top in (0..rows).step_by(NR) {
            let some = NR.min(rows - top);
            let mut products = [Product::EMPTY; 2];
            let mut count = 0;
            for (segment, used, first) in parts(block) {
                let used = if segment == block.segment { used - (rows - top - some) } else { used };
                products[count] =
                    a.product(top, first, kernel.depth(used), keys.units(head, segment, panel));
                count += 1;
            }
            // SAFETY: by the caller.
            unsafe {
                let out = OutputTile {
                    c: to.add(top * stride + panel * NR),
                    stride,
                    columns: n,
                    accumulate: false,
                };
                panel_product(kernel, some, &products[..count], out);
            }
        }
    }
}
