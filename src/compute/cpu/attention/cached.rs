//! Attention of one new token of each sequence over cached keys and values: those of earlier
//! passes.
//!
//! Keys and values are cached in the form in which the GEMMs read them, so that a new token costs
//! one read of them. A segment (a prompt, or the tokens that were generated after it) is a list of
//! blocks of [`CACHE_BLOCK`] tokens. One block holds the keys and values of all decoder blocks.
//!
//! The sums are those of [`super::attention`] in the same order: first over the keys of the
//! prompt, then over those of the own segment, up to the new token. There, masked keys add zeros,
//! which change no bit. The output of a token is therefore the same bit for bit as in a row that
//! has the whole sequence.

use super::blocks::{Heads, softmax_of_scores};
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm::{
    Kernel, NR, Operand, OutputTile, Product, Shared, View, pack_panel, panel_product,
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
            for kv in 0..heads.key {
                let size = keys_of_head(kernel, &heads);
                let to = &mut keys[kv * size..][..size];
                store_keys(kernel, &heads, &rows[heads.key_at(kv)..], (slot, some), to);
                let size = values_of_head(kernel, &heads);
                let to = &mut values[kv * size..][..size];
                store_values(
                    kernel,
                    &heads,
                    &rows[heads.value_at(kv)..],
                    (slot, some),
                    to,
                );
            }
            done += some;
        }
    }

    /// Counts `count` more tokens as complete.
    pub fn complete(&mut self, count: usize) {
        self.tokens += count;
    }
}

/// Writes the keys of `count` tokens from place `slot` of a block on. The tokens' keys lie a row of
/// `[q | k | v]` apart.
fn store_keys(
    kernel: Kernel,
    heads: &Heads,
    from: &[f32],
    (slot, count): (usize, usize),
    to: &mut [u32],
) {
    let (row, depth) = (heads.row(), kernel.depth(heads.dim));
    if slot == 0 {
        for (i, panel) in to.chunks_mut(depth * NR).enumerate() {
            if i * NR < count {
                let n = NR.min(count - i * NR);
                let view = View::f32(&from[i * NR * row..], row).t();
                pack_panel(kernel, view, 0, heads.dim, 0, n, panel);
            }
        }
        return;
    }
    let mut one = Buffer::uninit(depth * NR);
    for i in 0..count {
        let view = View::f32(&from[i * row..], row).t();
        pack_panel(kernel, view, 0, heads.dim, 0, 1, one.units_mut());
        let (panel, column) = ((slot + i) / NR, (slot + i) % NR);
        let panel = &mut to[panel * depth * NR..][..depth * NR];
        for (to, from) in panel.chunks_mut(NR).zip(one.units().chunks(NR)) {
            to[column] = from[0];
        }
    }
}

/// Writes the values of `count` tokens from place `slot` of a block on, as [`store_keys`] does.
fn store_values(
    kernel: Kernel,
    heads: &Heads,
    from: &[f32],
    (slot, count): (usize, usize),
    to: &mut [u32],
) {
    let (row, depth) = (heads.row(), kernel.depth(CACHE_BLOCK));
    let mut one = Buffer::uninit(kernel.depth(1) * NR);
    for (i, panel) in to.chunks_mut(depth * NR).enumerate() {
        let (column, n) = (i * NR, NR.min(heads.dim - i * NR));
        if slot == 0 {
            let view = View::f32(&from[column..], row);
            pack_panel(kernel, view, 0, count, 0, n, panel);
            continue;
        }
        for token in 0..count {
            let view = View::f32(&from[token * row + column..], row);
            pack_panel(kernel, view, 0, 1, 0, n, one.units_mut());
            let at = slot + token;
            let units = &mut panel[unit_of(kernel, at) * NR..][..NR];
            for (to, from) in units.iter_mut().zip(one.units()) {
                // A unit of a bf16 kernel holds two tokens, the first one in its lower half.
                match kernel.is_bf16() && at % 2 == 1 {
                    true => *to = (*to & 0xffff) | (from << 16),
                    false => *to = *from,
                }
            }
        }
    }
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
