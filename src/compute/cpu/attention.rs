//! Grouped-query attention over the segments of a packed row, tiled by query blocks: no T×T matrix
//! exists.
//!
//! Forward pass, per block and head: S = scale·Q·Kᵀ over the keys of the prompt and of the
//! segment itself, P = softmax(S), O = P·V. The log-sum-exp of each row is saved. The backward
//! pass recomputes P from it (arXiv:2205.14135, §3.1, without the on-chip part): dV = Pᵀ·dO,
//! dP = dO·Vᵀ, dS = P ⊙ (dP − rowsum(dO ⊙ O)), dQ = scale·dS·K, dK = scale·dSᵀ·Q.
//! With a soft-cap c, S is replaced by S' = c·tanh(S / c) before the softmax, and dS is multiplied
//! by 1 − (S' / c)².
//!
//! Every segment is divided into blocks from its own first token on, so a segment's results do not
//! depend on its position in the row.

mod backward;
mod blocks;
mod cached;
mod packed_tokens;

pub use self::backward::{attention_backward, score_bytes};
pub use self::blocks::Heads;
use self::blocks::{BLOCK, blocks, over_keys, softmax_of_scores, sum_over_keys};
pub use self::cached::{
    CACHE_BLOCK, CacheLayout, CachedKeys, CachedSegment, attention_cached, blocks_of,
};
use self::packed_tokens::{TokenColumns, TokenRows};
use super::buffer::Buffer;
use super::gemm::{Kernel, Operand, Shared, View};
use super::thread_pool;
use crate::compute::layout::RowLayout;

/// Computes attention: `qkv` `[T, (H + 2K)·D]` → `out` `[T, H·D]`. `lse` `[T, H]` receives the
/// log-sum-exp of each query and head.
pub fn attention(
    kernel: Kernel,
    qkv: &[f32],
    heads: Heads,
    layout: &RowLayout,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (row, width, group) = (heads.row(), heads.width(), heads.query / heads.key);
    let tokens = layout.tokens();
    assert!(
        qkv.len() >= tokens * row
            && out.len() >= tokens * width
            && lse.len() >= tokens * heads.query
    );
    let blocks = blocks(layout);
    let keys = TokenColumns::pack(kernel, layout, qkv, row, heads.dim, heads.key, |kv| {
        heads.key_at(kv)
    });
    let values = TokenRows::pack(kernel, layout, qkv, row, heads.dim, heads.key, |kv| {
        heads.value_at(kv)
    });
    let (out, lse) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    // Long blocks go first, so that only short ones are left when threads run out of work.
    let mut tasks: Vec<(usize, usize)> = (0..blocks.len())
        .flat_map(|b| (0..heads.query).map(move |h| (b, h)))
        .collect();
    tasks.sort_by_key(|(b, _)| std::cmp::Reverse(blocks[*b].columns()));
    thread_pool::for_each(tasks.len(), |task| {
        let (b, head) = tasks[task];
        let block = &blocks[b];
        let (rows, columns) = (block.queries.len(), block.columns());
        let mut s = Buffer::uninit(rows * columns);
        let q = View::f32(&qkv[block.queries.start * row + head * heads.dim..], row);
        let q = Operand::new(kernel, q, rows, heads.dim, 1.0);
        over_keys(&q, &keys, head / group, block, &mut s);
        let mut inverse = [0f32; BLOCK];
        let p = Operand::prepared(kernel, &mut s, columns, |i, s| {
            let visible = block.visible(i, heads.window);
            let (m, total) = softmax_of_scores(&heads, s, &visible);
            inverse[i] = 1.0 / total;
            // SAFETY: this task alone writes its queries and head.
            unsafe { *lse.at((block.queries.start + i) * heads.query + head) = m + total.ln() };
        });
        // SAFETY: as above; the rows of the output lie `width` apart.
        unsafe {
            let to = out.at(block.queries.start * width + head * heads.dim);
            sum_over_keys(&p, &values, head / group, block, to, width);
            for (i, inverse) in inverse[..rows].iter().enumerate() {
                std::slice::from_raw_parts_mut(to.add(i * width), heads.dim)
                    .iter_mut()
                    .for_each(|x| *x *= inverse);
            }
        }
    });
}

/// Returns the f32 values per token of the forward pass: `[q | k | v]`, the packed heads and the
/// output.
pub fn forward_floats(heads: &Heads) -> usize {
    2 * heads.row() + heads.width()
}

/// Returns the f32 values per token on a tape: `[q | k | v]`, the output and its log-sum-exps.
pub fn tape_floats(heads: &Heads) -> usize {
    heads.row() + heads.width() + heads.query
}

/// Returns the f32 values per token that [`attention_backward`] needs in addition to the tape and
/// the scores: gradients and packed heads.
pub fn backward_floats(heads: &Heads) -> usize {
    3 * heads.row() + 2 * heads.width()
}
