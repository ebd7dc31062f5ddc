//! Attention of one new token of each sequence over keys and values that earlier passes have
//! cached.
//!
//! Keys and values are cached in the form in which the GEMMs read them, so that a new token costs
//! one read of them. A segment (a prompt, or the tokens that were generated after it) is a list of
//! blocks of [`CACHE_BLOCK`] tokens. One block holds the keys and values of all decoder blocks.
//!
//! The sums are those of [`super::attention`] in the same order: first over the keys of the
//! prompt, then over those of the own segment, up to the new token. There, masked keys add zeros,
//! which change no bit. The output of a token is therefore the same bit for bit as in a row that
//! has the whole sequence.

use half::bf16;

use super::blocks::{Heads, softmax_of_scores};
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm::{
    Kernel, NR, Operand, OutputTile, Product, Shared, View, pack_panel, panel_product, round,
};
use crate::compute::cpu::thread_pool;

/// Number of tokens in a block of the cache. A multiple of the depth step of every GEMM kernel, so
/// that a sum over several blocks is the sum over all their tokens.
pub const CACHE_BLOCK: usize = 64;
/// Number of panels of keys in a block.
const PANELS: usize = CACHE_BLOCK / NR;

/// Places of the keys and values of one decoder block in a block of the cache.
#[derive(Clone, Copy, Debug)]
struct LayerPlace {
    heads: Heads,
    /// First unit of the keys `[K, PANELS, depth of D, NR]`. The values `[K, ⌈D / NR⌉, depth
    /// of CACHE_BLOCK, NR]` follow.
    first: usize,
}

/// The form of a block of the cache, for a decoder and a GEMM kernel.
#[derive(Clone, Debug)]
pub struct CacheLayout {
    kernel: Kernel,
    places: Vec<LayerPlace>,
    units: usize,
}

impl CacheLayout {
    /// Makes the layout for decoder blocks with these heads.
    pub fn new(kernel: Kernel, blocks: impl IntoIterator<Item = Heads>) -> Self {
        let (mut places, mut units) = (Vec::new(), 0);
        for heads in blocks {
            places.push(LayerPlace {
                heads,
                first: units,
            });
            units += heads.key * (keys_of_head(kernel, &heads) + values_of_head(kernel, &heads));
        }
        CacheLayout {
            kernel,
            places,
            units,
        }
    }

    /// Returns the width of a row of `[q | k | v]` of decoder block `index`, in elements.
    pub fn row(&self, index: usize) -> usize {
        self.places[index].heads.row()
    }

    /// Returns the size of a block in bytes.
    pub fn block_bytes(&self) -> usize {
        self.units * size_of::<u32>()
    }
}

/// Returns the number of units of the keys of one key head.
fn keys_of_head(kernel: Kernel, heads: &Heads) -> usize {
    PANELS * kernel.depth(heads.dim) * NR
}

/// Returns the number of units of the values of one key head.
fn values_of_head(kernel: Kernel, heads: &Heads) -> usize {
    heads.dim.div_ceil(NR) * kernel.depth(CACHE_BLOCK) * NR
}

/// Returns the number of blocks that `tokens` tokens of a segment take.
pub fn blocks_of(tokens: usize) -> usize {
    tokens.div_ceil(CACHE_BLOCK)
}

/// Cached keys and values of consecutive tokens of a sequence: a prompt, or what follows it.
#[derive(Debug, Default)]
pub struct CachedSegment {
    blocks: Vec<Buffer>,
    tokens: usize,
}

impl CachedSegment {
    /// Returns the number of tokens whose keys and values are complete.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Returns the number of blocks in memory.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Allocates the blocks for `count` more tokens.
    pub fn make_room(&mut self, layout: &CacheLayout, count: usize) {
        while self.blocks.len() < blocks_of(self.tokens + count) {
            self.blocks.push(Buffer::zeros(layout.units));
        }
    }

    /// Writes the keys and values of `count` tokens of decoder block `index` after the complete
    /// ones. `qkv` has the rows `[q | k | v]` of these tokens. [`CachedSegment::make_room`] was
    /// called before, and [`CachedSegment::complete`] is called after the last decoder block.
    pub fn store(&mut self, layout: &CacheLayout, index: usize, qkv: &[f32], count: usize) {
        let LayerPlace { heads, first } = layout.places[index];
        let (kernel, row, start) = (layout.kernel, heads.row(), self.tokens);
        let mut done = 0;
        while done < count {
            let (block, slot) = ((start + done) / CACHE_BLOCK, (start + done) % CACHE_BLOCK);
            let some = (CACHE_BLOCK - slot).min(count - done);
            let units = &mut self.blocks[block].units_mut()[first..];
            let (keys, values) = units.split_at_mut(heads.key * keys_of_head(kernel, &heads));
            let rows = &qkv[done * row..(done + some) * row];
            if slot > 0 {
                for (row, slot) in rows.chunks(row).zip(slot..) {
                    store_token(kernel, &heads, row, slot, keys, values);
                }
            } else {
                for kv in 0..heads.key {
                    let size = keys_of_head(kernel, &heads);
                    let to = &mut keys[kv * size..][..size];
                    store_first_keys(kernel, &heads, &rows[heads.key_at(kv)..], some, to);
                    let size = values_of_head(kernel, &heads);
                    let to = &mut values[kv * size..][..size];
                    store_first_values(kernel, &heads, &rows[heads.value_at(kv)..], some, to);
                }
            }
            done += some;
        }
    }

    /// Counts `count` more tokens as complete.
    pub fn complete(&mut self, count: usize) {
        self.tokens += count;
    }
}

/// Writes the keys of one key head of the first `count` tokens of a block. The tokens' keys lie a
/// row of `[q | k | v]` apart.
fn store_first_keys(kernel: Kernel, heads: &Heads, from: &[f32], count: usize, to: &mut [u32]) {
    let (row, depth) = (heads.row(), kernel.depth(heads.dim));
    for (i, panel) in to.chunks_mut(depth * NR).enumerate() {
        if i * NR < count {
            let n = NR.min(count - i * NR);
            let view = View::f32(&from[i * NR * row..], row).t();
            pack_panel(kernel, view, 0, heads.dim, 0, n, panel);
        }
    }
}

/// Writes the values of one key head of the first `count` tokens of a block, as
/// [`store_first_keys`] does.
fn store_first_values(kernel: Kernel, heads: &Heads, from: &[f32], count: usize, to: &mut [u32]) {
    let (row, depth) = (heads.row(), kernel.depth(CACHE_BLOCK));
    for (i, panel) in to.chunks_mut(depth * NR).enumerate() {
        let (column, n) = (i * NR, NR.min(heads.dim - i * NR));
        let view = View::f32(&from[column..], row);
        pack_panel(kernel, view, 0, count, 0, n, panel);
    }
}

/// Writes the keys and values of all key heads of the token at place `slot` of a block, given its
/// row `[q | k | v]`. Packing a panel for a single token would take much longer. The padding of the
/// panels has been zero since the block was allocated.
fn store_token(
    kernel: Kernel,
    heads: &Heads,
    row: &[f32],
    slot: usize,
    keys: &mut [u32],
    values: &mut [u32],
) {
    let is_bf16 = kernel.is_bf16();
    let elements = one_per_unit(kernel, &row[heads.key_at(0)..]);
    let (new_keys, new_values) = elements.split_at(heads.key * heads.dim);
    // A unit of a bf16 kernel holds two elements, the first one in its lower half.
    let per_unit = if is_bf16 { 2 } else { 1 };
    let panel_units = kernel.depth(heads.dim) * NR;
    let (panel, column) = (slot / NR, slot % NR);
    for (to, from) in keys
        .chunks_mut(keys_of_head(kernel, heads))
        .zip(new_keys.chunks(heads.dim))
    {
        let units = to[panel * panel_units..][..panel_units].chunks_mut(NR);
        for (unit, some) in units.zip(from.chunks(per_unit)) {
            unit[column] = some[0] | some.get(1).map_or(0, |second| second << 16);
        }
    }
    let panel_units = kernel.depth(CACHE_BLOCK) * NR;
    let at = unit_of(kernel, slot) * NR;
    for (to, from) in values
        .chunks_mut(values_of_head(kernel, heads))
        .zip(new_values.chunks(heads.dim))
    {
        for (panel, some) in to.chunks_mut(panel_units).zip(from.chunks(NR)) {
            for (to, from) in panel[at..].iter_mut().zip(some) {
                match is_bf16 && slot % 2 == 1 {
                    true => *to = (*to & 0xffff) | (from << 16),
                    false => *to = *from,
                }
            }
        }
    }
}

/// Returns the bits of each value: of the f32, or of the rounded bf16 for a bf16 kernel.
fn one_per_unit(kernel: Kernel, values: &[f32]) -> Vec<u32> {
    if !kernel.is_bf16() {
        return values.iter().map(|x| x.to_bits()).collect();
    }
    let mut rounded = vec![bf16::ZERO; values.len()];
    round(kernel, values, &mut rounded);
    rounded.iter().map(|x| u32::from(x.to_bits())).collect()
}

/// Returns the unit of depth that holds element `k`.
fn unit_of(kernel: Kernel, k: usize) -> usize {
    if kernel.is_bf16() { k / 2 } else { k }
}

/// The cached segments that a token attends to.
#[derive(Clone, Copy, Debug)]
pub struct CachedKeys<'a> {
    /// The prompt.
    pub prefix: &'a CachedSegment,
    /// The generated tokens, complete ones only.
    pub own: &'a CachedSegment,
}

impl CachedKeys<'_> {
    /// Iterates over the segments as (segment, number of keys, first score column). The own segment
    /// also has the new token, which is not counted as complete yet.
    fn parts(&self) -> [(&CachedSegment, usize, usize); 2] {
        let shared = self.prefix.tokens;
        [
            (self.prefix, shared, 0),
            (self.own, self.own.tokens + 1, shared.next_multiple_of(NR)),
        ]
    }

    /// Returns the number of score columns, padded to whole panels for each segment.
    fn columns(&self) -> usize {
        let [_, (_, own, first)] = self.parts();
        first + own.next_multiple_of(NR)
    }
}

/// Computes attention of one new token of each sequence in decoder block `index`: `qkv` `[S, (H +
/// 2K)·D]` → `out` `[S, H·D]`. The keys and values of the new tokens are stored already.
pub fn attention_cached(
    layout: &CacheLayout,
    index: usize,
    qkv: &[f32],
    sequences: &[CachedKeys],
    out: &mut [f32],
) {
    let (kernel, LayerPlace { heads, first }) = (layout.kernel, layout.places[index]);
    let (row, width, group) = (heads.row(), heads.width(), heads.query / heads.key);
    assert!(qkv.len() >= sequences.len() * row && out.len() >= sequences.len() * width);
    let out = Shared(out.as_mut_ptr());
    let mut tasks: Vec<(usize, usize)> = (0..sequences.len())
        .flat_map(|s| (0..heads.key).map(move |kv| (s, kv)))
        .collect();
    tasks.sort_by_key(|(s, _)| std::cmp::Reverse(sequences[*s].columns()));
    thread_pool::for_each(tasks.len(), |task| {
        let (sequence, kv) = tasks[task];
        let keys = &sequences[sequence];
        let (parts, columns) = (keys.parts(), keys.columns());
        let block_units = |segment: &'_ CachedSegment, block: usize| -> *const u32 {
            segment.blocks[block].units()[first..].as_ptr()
        };
        let at = sequence * row + kv * group * heads.dim;
        let q = View::f32(&qkv[at..], heads.dim);
        let q = Operand::new(kernel, q, group, heads.dim, 1.0);
        let mut s = Buffer::uninit(group * columns);
        let (depth, of_head) = (kernel.depth(heads.dim), keys_of_head(kernel, &heads));
        for (segment, count, column) in parts {
            for i in 0..count.div_ceil(NR) {
                let offset = kv * of_head + i % PANELS * depth * NR;
                // SAFETY: the panel lies inside the block; its columns are inside the padded row of
                // `s`; the operand has `group` rows.
                unsafe {
                    let panel = block_units(segment, i / PANELS).add(offset);
                    let panel = std::slice::from_raw_parts(panel, depth * NR);
                    let out = OutputTile {
                        c: s.as_mut_ptr().add(column + i * NR),
                        stride: columns,
                        columns: NR,
                        accumulate: false,
                    };
                    panel_product(kernel, group, &[q.product(0, 0, depth, panel)], out);
                }
            }
        }
        let [(_, shared, _), (_, own, base)] = parts;
        let hidden = heads.window.map_or(0, |w| (shared + own).saturating_sub(w));
        let visible = [
            hidden.min(shared)..shared,
            base + hidden.saturating_sub(shared)..base + own,
        ];
        let mut inverse = vec![0f32; group];
        let p = Operand::prepared(kernel, &mut s, columns, |i, s| {
            let (_, total) = softmax_of_scores(&heads, s, &visible);
            inverse[i] = 1.0 / total;
        });
        let depth = kernel.depth(CACHE_BLOCK);
        let values = heads.key * of_head + kv * values_of_head(kernel, &heads);
        let mut products: Vec<Product> = Vec::new();
        for panel in 0..heads.dim.div_ceil(NR) {
            products.clear();
            for (segment, count, column) in parts {
                for block in 0..blocks_of(count) {
                    let used = CACHE_BLOCK.min(count - block * CACHE_BLOCK);
                    // SAFETY: the panel lies inside the block.
                    let units = unsafe {
                        let units = block_units(segment, block).add(values + panel * depth * NR);
                        std::slice::from_raw_parts(units, depth * NR)
                    };
                    let start = column + block * CACHE_BLOCK;
                    products.push(p.product(0, start, kernel.depth(used), units));
                }
            }
            // SAFETY: this task alone writes its query heads of its sequence, which lie side by
            // side; the operand has `group` rows, and its padded depth covers every block.
            unsafe {
                let to = out.at(sequence * width + kv * group * heads.dim + panel * NR);
                let tile = OutputTile {
                    c: to,
                    stride: heads.dim,
                    columns: NR.min(heads.dim - panel * NR),
                    accumulate: false,
                };
                panel_product(kernel, group, &products, tile);
            }
        }
        for (i, inverse) in inverse.iter().enumerate() {
            // SAFETY: as above.
            unsafe {
                let to = out.at(sequence * width + (kv * group + i) * heads.dim);
                std::slice::from_raw_parts_mut(to, heads.dim)
                    .iter_mut()
                    .for_each(|x| *x *= inverse);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::rng::kaiming_uniform;

    /// Stores tokens in several passes. `passes` has the number of tokens of each.
    fn stored(layout: &CacheLayout, qkv: &[f32], passes: &[usize]) -> CachedSegment {
        let mut segment = CachedSegment::default();
        for count in passes {
            segment.make_room(layout, *count);
            for index in 0..layout.places.len() {
                let rows = &qkv[segment.tokens * layout.row(index)..];
                segment.store(layout, index, rows, *count);
            }
            segment.complete(*count);
        }
        segment
    }

    #[test]
    fn tokens_that_are_stored_one_by_one_have_the_bits_of_those_stored_at_once() {
        const TOKENS: usize = CACHE_BLOCK + 39;
        let heads = |dim| Heads {
            query: 4,
            key: 2,
            dim,
            window: None,
            scale: 1.0,
            softcap: None,
        };
        for kernel in Kernel::available() {
            for dim in [1, 20, 33, 64] {
                let layout = CacheLayout::new(kernel, [heads(dim), heads(7)]);
                let width = layout.row(0).max(layout.row(1));
                let qkv = kaiming_uniform(7, "qkv", TOKENS * width, 1);
                let at_once = stored(&layout, &qkv, &[TOKENS]);
                for passes in [vec![1; TOKENS], vec![1, 5, 70, 27]] {
                    let in_passes = stored(&layout, &qkv, &passes);
                    assert_eq!(in_passes.tokens, TOKENS);
                    assert_eq!(in_passes.num_blocks(), at_once.num_blocks());
                    for (ours, whole) in in_passes.blocks.iter().zip(&at_once.blocks) {
                        assert!(ours.units() == whole.units(), "{kernel:?}, dim {dim}");
                    }
                }
            }
        }
    }
}
