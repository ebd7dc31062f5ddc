//! Backward pass of attention, in two sweeps so that no two tasks write the same gradient. The
//! first sweep goes by queries: it computes dQ and leaves P and dS transposed. The second goes by
//! keys: it computes dK and dV.

use std::ops::Range;

use super::blocks::{BLOCK, Heads, QueryBlock, blocks, over_keys, sum_over_keys};
use super::packed_tokens::{TokenColumns, TokenRows};
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm::{
    Kernel, NR, Operand, OutputTile, Product, Shared, View, panel_product,
};
use crate::compute::cpu::simd::{dispatch, dot, exp, soft_cap, soft_cap_slope};
use crate::compute::cpu::thread_pool;
use crate::compute::layout::RowLayout;

/// Limit of a round: the sum of (score columns · [`NR`]) over its blocks and all heads. A round
/// saves the scores of its blocks between the two sweeps. Longer rows are processed in several
/// rounds, of at least one block each, even if that block alone exceeds the limit.
const SCORE_BUDGET: usize = 1 << 24;
/// Maximum number of scores that a round saves, for P and for dS each, unless its only block
/// exceeds [`SCORE_BUDGET`]. A column has up to [`BLOCK`] of them.
const MAX_SAVED_SCORES: usize = SCORE_BUDGET / NR * BLOCK;

/// Computes the gradients of [`super::attention`] for `g = ∂loss/∂out` `[T, H·D]`, given its
/// inputs and outputs. `dqkv` `[T, (H + 2K)·D]` is overwritten.
pub fn attention_backward(
    kernel: Kernel,
    qkv: &[f32],
    heads: Heads,
    layout: &RowLayout,
    (out, lse): (&[f32], &[f32]),
    g: &[f32],
    dqkv: &mut [f32],
) {
    let (row, width) = (heads.row(), heads.width());
    let tokens = layout.tokens();
    assert!(
        qkv.len() >= tokens * row
            && g.len() >= tokens * width
            && out.len() >= tokens * width
            && lse.len() >= tokens * heads.query
    );
    assert!(dqkv.len() >= tokens * row);
    let all = blocks(layout);
    let packed = Packed {
        keys: TokenColumns::pack(kernel, layout, qkv, row, heads.dim, heads.key, |kv| {
            heads.key_at(kv)
        }),
        values: TokenColumns::pack(kernel, layout, qkv, row, heads.dim, heads.key, |kv| {
            heads.value_at(kv)
        }),
        key_rows: TokenRows::pack(kernel, layout, qkv, row, heads.dim, heads.key, |kv| {
            heads.key_at(kv)
        }),
    };
    let ranges: Vec<Range<usize>> = all.iter().map(|b| b.queries.clone()).collect();
    let queries = TokenRows::pack_ranges(kernel, &ranges, qkv, row, heads.dim, heads.query, |h| {
        h * heads.dim
    });
    let upstream = TokenRows::pack_ranges(kernel, &ranges, g, width, heads.dim, heads.query, |h| {
        h * heads.dim
    });
    let sweep = Sweep {
        kernel,
        heads,
        layout,
        qkv,
        out,
        lse,
        g,
        packed,
        queries,
        upstream,
        dqkv: Shared(dqkv.as_mut_ptr()),
    };
    let mut first = 0;
    while first < all.len() {
        let (mut end, mut scores) = (first, 0);
        while end < all.len()
            && (end == first || scores + all[end].columns() * NR * heads.query <= SCORE_BUDGET)
        {
            scores += all[end].columns() * NR * heads.query;
            end += 1;
        }
        sweep.round(&all, first..end, first > 0);
        first = end;
    }
}

/// Estimates the size in bytes of P and dS that [`attention_backward`] saves between its two
/// sweeps, for a row of `tokens` tokens in which the longest pair has `longest`. A query attends on
/// average to at most half of the row's tokens, and to no more than `longest`. One `BLOCK` is added
/// for the padding of blocks and panels. The estimate is too low if one block alone exceeds the
/// limit of a round: `longest` · `heads` > 2¹⁹.
pub fn score_bytes(kernel: Kernel, heads: usize, tokens: usize, longest: usize) -> usize {
    let element = if kernel.is_bf16() {
        size_of::<half::bf16>()
    } else {
        size_of::<f32>()
    };
    let columns = (tokens / 2).min(longest) + BLOCK;
    2 * (tokens * columns * heads).min(MAX_SAVED_SCORES) * element
}

/// Packed keys and values that the first sweep reads.
struct Packed {
    /// For S = Q·Kᵀ.
    keys: TokenColumns,
    /// For dP = dO·Vᵀ.
    values: TokenColumns,
    /// For dQ = scale·dS·K.
    key_rows: TokenRows,
}

struct Sweep<'a> {
    kernel: Kernel,
    heads: Heads,
    layout: &'a RowLayout,
    qkv: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    g: &'a [f32],
    packed: Packed,
    /// The ranges are the query blocks.
    queries: TokenRows,
    upstream: TokenRows,
    dqkv: Shared,
}

/// Pᵀ and dSᵀ `[columns, queries]` of one block and head.
struct Transposed {
    p: Operand<'static>,
    ds: Operand<'static>,
}

/// Panel of one segment's keys in one key head: the work of one task of the second sweep.
#[derive(Clone, Copy)]
struct KeyPanel {
    /// Index of the segment in the row.
    segment: usize,
    /// Index of the panel in the segment; panels are [`NR`] keys wide.
    index: usize,
    /// Index of the key head.
    head: usize,
}

impl Sweep<'_> {
    /// Runs both sweeps over some of the blocks. With `accumulate`, adds dK and dV to those of
    /// earlier rounds.
    fn round(&self, all: &[QueryBlock], round: Range<usize>, accumulate: bool) {
        let h = self.heads.query;
        let transposed: Vec<Transposed> = thread_pool::map(round.len() * h, |i| {
            self.by_queries(&all[round.start + i / h], i % h)
        });
        // A segment's keys that no block of the round attends to still need zeros in the first
        // round.
        let panels: Vec<KeyPanel> = (0..self.layout.segments.len())
            .flat_map(|s| {
                (0..self.layout.segments[s].tokens.len().div_ceil(NR)).map(move |i| (s, i))
            })
            .flat_map(|(segment, index)| {
                (0..self.heads.key).map(move |head| KeyPanel {
                    segment,
                    index,
                    head,
                })
            })
            .collect();
        thread_pool::for_each(panels.len(), |i| {
            self.by_keys(all, round.clone(), &transposed, panels[i], accumulate)
        });
    }

    /// Computes dQ of one block and head. Returns Pᵀ and dSᵀ for the second sweep.
    fn by_queries(&self, block: &QueryBlock, head: usize) -> Transposed {
        let (kernel, heads) = (self.kernel, self.heads);
        let (row, width, kv) = (heads.row(), heads.width(), head / (heads.query / heads.key));
        let (rows, columns) = (block.queries.len(), block.columns());
        let (mut p, mut ds) = (
            Buffer::uninit(rows * columns),
            Buffer::uninit(rows * columns),
        );
        let at = |t: usize| t * width + head * heads.dim;
        let q = View::f32(
            &self.qkv[block.queries.start * row + head * heads.dim..],
            row,
        );
        over_keys(
            &Operand::new(kernel, q, rows, heads.dim, 1.0),
            &self.packed.keys,
            kv,
            block,
            &mut p,
        );
        let g = View::f32(&self.g[at(block.queries.start)..], width);
        over_keys(
            &Operand::new(kernel, g, rows, heads.dim, 1.0),
            &self.packed.values,
            kv,
            block,
            &mut ds,
        );
        let [p, ds] = Operand::prepared_pair(kernel, [&mut p, &mut ds], columns, |i, p, ds| {
            let t = block.queries.start + i;
            let (out, g) = (
                &self.out[at(t)..at(t) + heads.dim],
                &self.g[at(t)..at(t) + heads.dim],
            );
            let lse = self.lse[t * heads.query + head];
            let visible = block.visible(i, heads.window);
            dispatch(
                #[inline(always)]
                || {
                    let (delta, scale) = (dot(out, g), heads.scale);
                    let mut cleared = 0;
                    for part in &visible {
                        p[cleared..part.start].fill(0.0);
                        ds[cleared..part.start].fill(0.0);
                        cleared = part.end;
                        let (p, ds) = (&mut p[part.clone()], &mut ds[part.clone()]);
                        match heads.softcap {
                            None => {
                                for (p, ds) in p.iter_mut().zip(ds) {
                                    *p = exp(*p * scale - lse);
                                    *ds = *p * (*ds - delta) * scale;
                                }
                            }
                            Some(cap) => {
                                soft_cap(p, scale, cap);
                                for (p, ds) in p.iter_mut().zip(ds) {
                                    let slope = soft_cap_slope(*p, cap);
                                    *p = exp(*p - lse);
                                    *ds = *p * (*ds - delta) * slope * scale;
                                }
                            }
                        }
                    }
                    p[cleared..].fill(0.0);
                    ds[cleared..].fill(0.0);
                },
            );
        });
        // SAFETY: this task alone writes dQ of its queries and head.
        unsafe {
            let to = self.dqkv.at(block.queries.start * row + head * heads.dim);
            sum_over_keys(&ds, &self.packed.key_rows, kv, block, to, row);
        }
        Transposed {
            p: p.transposed(),
            ds: ds.transposed(),
        }
    }

    /// Computes dK and dV of a panel of keys, given Pᵀ and dSᵀ of each block of the round
    /// and head.
    fn by_keys(
        &self,
        all: &[QueryBlock],
        round: Range<usize>,
        transposed: &[Transposed],
        key_panel: KeyPanel,
        accumulate: bool,
    ) {
        let KeyPanel {
            segment,
            index: i,
            head: kv,
        } = key_panel;
        let (kernel, heads) = (self.kernel, self.heads);
        let (row, group) = (heads.row(), heads.query / heads.key);
        let start = self.layout.segments[segment].tokens.start + i * NR;
        let keys = NR.min(self.layout.segments[segment].tokens.end - start);
        for (panel, n) in self.queries.panels() {
            let (mut dk, mut dv) = (Vec::new(), Vec::new());
            for b in round.clone() {
                let block = &all[b];
                let (column, top) = match () {
                    () if block.prefix == Some(segment) => (i * NR, 0),
                    () if block.segment == segment && block.own > i * NR => {
                        (block.shared_columns() + i * NR, block.first_to_see(i))
                    }
                    () => continue,
                };
                // The queries before `top` do not attend to these keys.
                let (skipped, depth) = (kernel.units(top), kernel.depth(block.queries.len()));
                for head in kv * group..(kv + 1) * group {
                    let t = &transposed[(b - round.start) * heads.query + head];
                    dk.push(t.ds.product(
                        column,
                        top,
                        depth - skipped,
                        &self.queries.units(head, b, panel)[skipped * NR..],
                    ));
                    dv.push(t.p.product(
                        column,
                        top,
                        depth - skipped,
                        &self.upstream.units(head, b, panel)[skipped * NR..],
                    ));
                }
            }
            // SAFETY: this task alone writes dK and dV of these keys and this key head.
            unsafe {
                self.write(
                    &dk,
                    keys,
                    n,
                    self.dqkv.at(start * row + heads.key_at(kv) + panel * NR),
                    accumulate,
                );
                self.write(
                    &dv,
                    keys,
                    n,
                    self.dqkv.at(start * row + heads.value_at(kv) + panel * NR),
                    accumulate,
                );
            }
        }
    }

    /// Writes the sum of the products to `to`, or adds it to `to` with `accumulate`.
    ///
    /// # Safety
    /// `to` is valid for `keys` rows of `n` elements and no other thread touches them.
    unsafe fn write(
        &self,
        products: &[Product],
        keys: usize,
        n: usize,
        to: *mut f32,
        accumulate: bool,
    ) {
        let row = self.heads.row();
        // SAFETY: guaranteed by the caller; the operands have all columns of their block as rows,
        // padded to whole panels.
        unsafe {
            if products.is_empty() && !accumulate {
                (0..keys).for_each(|r| to.add(r * row).write_bytes(0, n));
            } else if !products.is_empty() {
                panel_product(
                    self.kernel,
                    keys,
                    products,
                    OutputTile {
                        c: to,
                        stride: row,
                        columns: n,
                        accumulate,
                    },
                );
            }
        }
    }
}
