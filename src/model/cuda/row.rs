//! A packed row on the device: tokens, rotary tables, and the attention mask as tiles of 64 tokens.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use crate::compute::cpu::rope::{RopeTable, RotaryPairs};
use crate::compute::cuda::gpu::{Gpu, Memory};
use crate::compute::cuda::kernels::Kind;
use crate::compute::cuda::ops::{self, RotaryTables, ScatterRows, TILE_ENTRY};
use crate::compute::layout::RowLayout;
use crate::model::row::{PreparedRow, RowRope};

/// Number of tokens in a tile.
const TILE_TOKENS: usize = 64;

/// The data of a row that the kernels read.
pub(super) struct DeviceRow {
    /// T, the number of tokens.
    pub tokens: usize,
    /// N, the number of completion tokens.
    pub targets: usize,
    /// Token ids `[T]`.
    pub ids: Memory,
    /// Positions of the tokens `[T]`.
    pub positions: Memory,
    /// Rotary tables in the order of the model's sets of rotary frequencies.
    pub ropes: Vec<DeviceRope>,
    /// Tiles of queries `[n, 5]`: start and end of the queries, start of their segment, start and
    /// end of their prompt. All ends are exclusive.
    pub tiles: Memory,
    /// Tiles of keys `[n, 5]`: start and end of the keys, end of their segment, start and end of
    /// the queries in other segments that attend to them. All ends are exclusive.
    pub key_tiles: Memory,
    /// Indices in the row of the tokens that predict the completion tokens `[N]`.
    pub predictors: Memory,
    /// Ids of the completion tokens `[N]`.
    pub target_ids: Memory,
}

/// The tables of one set of rotary frequencies.
pub(super) struct DeviceRope {
    /// The table that rotates the keys, and also the queries unless `queries` is set.
    pub table: DeviceTable,
    /// The table of the queries if these have factors that depend on the position.
    pub queries: Option<DeviceTable>,
}

impl DeviceRope {
    fn new(gpu: &Arc<Gpu>, rope: &RowRope) -> Result<Self> {
        let table = |table| DeviceTable::new(gpu, table);
        Ok(DeviceRope {
            table: table(&rope.table)?,
            queries: rope.queries.as_ref().map(table).transpose()?,
        })
    }
}

/// A rotary table.
pub(super) struct DeviceTable {
    /// `[T, half]`.
    cos: Memory,
    /// `[T, half]`.
    sin: Memory,
    half: usize,
    pairs: RotaryPairs,
}

impl DeviceTable {
    fn new(gpu: &Arc<Gpu>, table: &RopeTable) -> Result<Self> {
        let (cos, sin) = table.tables();
        Ok(DeviceTable {
            cos: gpu.upload(Kind::F32, cos)?,
            sin: gpu.upload(Kind::F32, sin)?,
            half: table.half(),
            pairs: table.pairs(),
        })
    }

    /// Returns the table in the form that the kernel takes.
    pub fn tables(&self) -> RotaryTables<'_> {
        RotaryTables {
            cos: &self.cos,
            sin: &self.sin,
            half: self.half,
            pairs: self.pairs,
        }
    }
}

impl DeviceRow {
    pub fn new(gpu: &Arc<Gpu>, row: &PreparedRow) -> Result<Self> {
        let source = row.row();
        let (tiles, key_tiles) = (query_tiles(&source.layout), key_tiles(&source.layout));
        let rope = |rope| DeviceRope::new(gpu, rope);
        Ok(DeviceRow {
            tokens: source.ids.len(),
            targets: source.targets.len(),
            // `Kind::F32` also stands for integers of 32 bits.
            ids: gpu.upload(Kind::F32, &source.ids)?,
            positions: gpu.upload(Kind::F32, &source.layout.positions())?,
            ropes: row.ropes.iter().map(rope).collect::<Result<_>>()?,
            tiles: gpu.upload(Kind::F32, tiles.as_flattened())?,
            key_tiles: gpu.upload(Kind::F32, key_tiles.as_flattened())?,
            predictors: gpu.upload(Kind::F32, &source.predictors)?,
            target_ids: gpu.upload(Kind::F32, &source.targets)?,
        })
    }
}

/// Returns the entries of [`DeviceRow::tiles`], those with the most work first.
fn query_tiles(layout: &RowLayout) -> Vec<[i32; TILE_ENTRY]> {
    let mut all = Vec::new();
    for s in &layout.segments {
        for start in s.tokens.clone().step_by(TILE_TOKENS) {
            let end = (start + TILE_TOKENS).min(s.tokens.end);
            all.push([start, end, s.tokens.start, s.prefix.start, s.prefix.end].map(|n| n as i32));
        }
    }
    longest_first(&mut all, |[start, end, segment, prefix, prefix_end]| {
        (end - segment) + (prefix_end - prefix) + (end - start)
    });
    all
}

/// Returns the entries of [`DeviceRow::key_tiles`], those with the most work first.
fn key_tiles(layout: &RowLayout) -> Vec<[i32; TILE_ENTRY]> {
    let mut all = Vec::new();
    for s in &layout.segments {
        let dependent = dependents(layout, &s.tokens);
        for start in s.tokens.clone().step_by(TILE_TOKENS) {
            let end = (start + TILE_TOKENS).min(s.tokens.end);
            all.push([start, end, s.tokens.end, dependent.start, dependent.end].map(|n| n as i32));
        }
    }
    longest_first(&mut all, |[start, _, segment_end, first, last]| {
        (segment_end - start) + (last - first)
    });
    all
}

/// Sorts tiles by decreasing work, so that the last thread blocks to finish are short ones.
fn longest_first(tiles: &mut [[i32; TILE_ENTRY]], work: impl Fn(&[i32; TILE_ENTRY]) -> i32) {
    tiles.sort_by_key(|t| std::cmp::Reverse(work(t)));
}

/// Returns the tokens of the completions of `prompt`. They directly follow the prompt.
fn dependents(layout: &RowLayout, prompt: &Range<usize>) -> Range<usize> {
    let completions = layout
        .segments
        .iter()
        .filter(|s| !s.prefix.is_empty() && s.prefix == *prompt);
    completions.fold(prompt.end..prompt.end, |all, s| {
        all.start..all.end.max(s.tokens.end)
    })
}

/// Scatter-add of rows in a fixed order of summation, so that results are reproducible.
pub(super) struct Scatter {
    /// The distinct destination rows, ascending.
    rows: Memory,
    /// Start in `order` of the source rows of each destination row, and the end of the last one.
    offsets: Memory,
    /// Indices of the source rows, sorted by destination row.
    order: Memory,
}

impl Scatter {
    /// Prepares a scatter-add of source row i to destination row `destinations[i]`.
    pub fn new(gpu: &Arc<Gpu>, destinations: &[u32]) -> Result<Self> {
        let mut order: Vec<u32> = (0..destinations.len() as u32).collect();
        order.sort_by_key(|i| (destinations[*i as usize], *i));
        let (mut rows, mut offsets): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        for (at, i) in order.iter().enumerate() {
            let destination = destinations[*i as usize];
            if rows.last() != Some(&destination) {
                rows.push(destination);
                offsets.push(at as u32);
            }
        }
        offsets.push(order.len() as u32);
        let upload = |values: &[u32]| gpu.upload(Kind::F32, values);
        Ok(Scatter {
            rows: upload(&rows)?,
            offsets: upload(&offsets)?,
            order: upload(&order)?,
        })
    }

    /// Adds each row of `from` to its destination row in `to`. Rows have `width` elements.
    pub fn add(&self, gpu: &Gpu, to: &Memory, from: &Memory, width: usize) -> Result<()> {
        let Scatter {
            rows,
            offsets,
            order,
        } = self;
        ops::scatter_rows(
            gpu,
            ScatterRows {
                to,
                from,
                rows,
                offsets,
                order,
                width,
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_name_what_each_query_sees_and_who_sees_each_key() {
        let mut layout = RowLayout::default();
        layout.push_group(70, [3, 65]);
        layout.push_group(2, [1]);
        let mut queries = query_tiles(&layout);
        queries.sort();
        assert_eq!(
            queries,
            [
                [0, 64, 0, 0, 0],
                [64, 70, 0, 0, 0],
                [70, 73, 70, 0, 70],
                [73, 137, 73, 0, 70],
                [137, 138, 73, 0, 70],
                [138, 140, 138, 138, 138],
                [140, 141, 140, 138, 140]
            ]
        );
        let mut keys = key_tiles(&layout);
        keys.sort();
        assert_eq!(keys[0], [0, 64, 70, 70, 138]);
        assert_eq!(keys[2], [70, 73, 73, 73, 73]);
        assert_eq!(keys[5], [138, 140, 140, 140, 141]);
    }
}
