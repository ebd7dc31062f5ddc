//! Blocks of queries, and GEMMs with the keys and values that they attend to.

use std::ops::Range;

use super::packed_tokens::{TokenColumns, TokenRows};
use crate::compute::cpu::gemm::{NR, Operand, OutputTile, Product, panel_product};
use crate::compute::cpu::simd::{dispatch, exp_sum, max, soft_cap};
use crate::compute::layout::RowLayout;

/// Maximum number of queries in a block.
pub(super) const BLOCK: usize = 64;

/// Shape of the attention heads and options of the scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// H, the number of query heads.
    pub query: usize,
    /// K, the number of key/value heads; divides H.
    pub key: usize,
    /// D, the head dimension.
    pub dim: usize,
    /// Sliding window: a query attends to this many positions back, itself included. `None` means
    /// all.
    pub window: Option<usize>,
    /// Factor that the scores q·k are multiplied by.
    pub scale: f32,
    /// Soft-cap c: a scaled score s is replaced by c·tanh(s / c). `None` means that it is not.
    pub softcap: Option<f32>,
}

impl Heads {
    /// Returns the width of a row of `[q | k | v]`, in elements.
    pub fn row(&self) -> usize {
        (self.query + 2 * self.key) * self.dim
    }

    /// Returns the width of a row of the output, in elements.
    pub fn width(&self) -> usize {
        self.query * self.dim
    }

    /// Returns the first column of key head `kv`'s keys in a row of `[q | k | v]`.
    pub(super) fn key_at(&self, kv: usize) -> usize {
        (self.query + kv) * self.dim
    }

    /// Returns the first column of key head `kv`'s values in a row of `[q | k | v]`.
    pub(super) fn value_at(&self, kv: usize) -> usize {
        (self.query + self.key + kv) * self.dim
    }
}

/// Block of queries and the keys they may attend to: all of the prompt, then their own segment up
/// to the last query.
#[derive(Clone, Debug)]
pub(super) struct QueryBlock {
    pub queries: Range<usize>,
    /// Index of the segment of the queries in the row.
    pub segment: usize,
    /// Index of the segment of the prompt in the row. `None` for the queries of a prompt.
    pub prefix: Option<usize>,
    /// Number of keys in the prefix.
    pub shared: usize,
    /// Number of keys in the own segment up to the last query.
    pub own: usize,
}

impl QueryBlock {
    /// Returns the number of score columns for the prefix, padded to whole panels.
    pub(super) fn shared_columns(&self) -> usize {
        self.shared.next_multiple_of(NR)
    }

    pub(super) fn columns(&self) -> usize {
        self.shared_columns() + self.own.next_multiple_of(NR)
    }

    /// Returns the first query of the block that attends to any key of the `i`-th panel of its own
    /// segment; a multiple of [`NR`].
    pub(super) fn first_to_see(&self, i: usize) -> usize {
        (i * NR).saturating_sub(self.own - self.queries.len())
    }

    /// Returns the score columns that query `i` of the block attends to: in the prefix, and in its
    /// own segment.
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

/// Divides every segment into blocks of at most [`BLOCK`] queries.
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

/// Iterates over the parts of a block's keys as (segment, number of keys, first score column): the
/// prefix, if any, then the own segment.
fn parts(block: &QueryBlock) -> impl Iterator<Item = (usize, usize, usize)> {
    let prefix = block.prefix.map(|p| (p, block.shared, 0));
    prefix
        .into_iter()
        .chain([(block.segment, block.own, block.shared_columns())])
}

/// Computes `s[rows, columns] = A·B` over the key panels of a block; `a` is the queries' operand
/// `[rows, D]`. Rows that do not attend to any key of a panel are left unchanged.
pub(super) fn over_keys(
    a: &Operand,
    keys: &TokenColumns,
    head: usize,
    block: &QueryBlock,
    s: &mut [f32],
) {
    let (kernel, rows, columns) = (a.kernel(), block.queries.len(), block.columns());
    assert!(a.rows() >= rows && s.len() >= rows * columns);
    for (segment, count, first) in parts(block) {
        for i in 0..count.div_ceil(NR) {
            let (depth, panel) = keys.panel(head, segment, i);
            let top = if segment == block.segment {
                block.first_to_see(i)
            } else {
                0
            };
            // SAFETY: the panel's columns are inside the padded row of `s`; the operand has `rows`
            // rows.
            unsafe {
                let c = s.as_mut_ptr().add(top * columns + first + i * NR);
                let out = OutputTile {
                    c,
                    stride: columns,
                    columns: NR,
                    accumulate: false,
                };
                panel_product(kernel, rows - top, &[a.product(top, 0, depth, panel)], out);
            }
        }
    }
}

/// Computes `to[rows, D] = A·B` summed over a block's keys; `a` is an operand `[rows, columns]`
/// with zeros for masked keys. Works on a few rows at a time, so that keys after these rows can be
/// skipped.
///
/// # Safety
/// `to` is valid for the rows of the block's queries, D wide and `stride` elements apart, and no
/// other thread touches them.
pub(super) unsafe fn sum_over_keys(
    a: &Operand,
    keys: &TokenRows,
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
                let used = if segment == block.segment {
                    used - (rows - top - some)
                } else {
                    used
                };
                products[count] = a.product(
                    top,
                    first,
                    kernel.depth(used),
                    keys.units(head, segment, panel),
                );
                count += 1;
            }
            // SAFETY: guaranteed by the caller.
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

/// Scales the visible scores of a query, applies the soft-cap, and replaces them by e^(s − m) and
/// all others by 0. Returns m and the sum.
pub(super) fn softmax_of_scores(
    heads: &Heads,
    s: &mut [f32],
    visible: &[Range<usize>; 2],
) -> (f32, f32) {
    dispatch(
        #[inline(always)]
        || match heads.softcap {
            None => softmax(s, visible, heads.scale),
            Some(cap) => {
                for part in visible {
                    soft_cap(&mut s[part.clone()], heads.scale, cap);
                }
                softmax(s, visible, 1.0)
            }
        },
    )
}

/// Replaces visible scores by e^(scale·s − m) and all others by 0. Returns m and the sum.
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
