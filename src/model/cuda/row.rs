//! A packed row on the device: tokens, rotary tables, and which tokens see which, as tiles of 64.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use crate::compute::cpu::rope::RopeTable;
use crate::compute::cuda::gpu::{Gpu, Memory};
use crate::compute::cuda::kernels::Kind;
use crate::compute::cuda::ops::{self, ScatterRows, TILE_ENTRY};
use crate::compute::layout::RowLayout;
use crate::model::row::PreparedRow;

/// Tokens of a tile.
const TILE: usize = 64;

/// What the kernels need to know of a row.
pub(super) struct DeviceRow {
    pub tokens: usize,
    /// Completion tokens.
    pub targets: usize,
    /// `[T]`.
    pub ids: Memory,
    /// `[T]`.
    pub positions: Memory,
    /// Cosines and sines `[T, D/2]`, in the order of the model's rotary frequencies.
    pub ropes: Vec<(Memory, Memory)>,
    /// `[n, 5]`: first and last query, start of their segment, start and end of their prompt.
    pub tiles: Memory,
    /// `[n, 5]`: first and last key, end of their segment, start and end of the queries in other
    /// segments that see them.
    pub key_tiles: Memory,
    /// `[N]`.
    pub predictors: Memory,
    pub target_ids: Memory,
}

impl DeviceRow {
    pub fn new(gpu: &Arc<Gpu>, row: &PreparedRow) -> Result<Self> {
        let source = row.row();
        let (tiles, key_tiles) = (query_tiles(&source.layout), key_tiles(&source.layout));
        let rope = |table: &RopeTable| {
            let (cos, sin) = table.tables();
            Ok::<_, candle_core::Error>((gpu.upload(Kind::F32, cos)?, gpu.upload(Kind::F32, sin)?))
        };
        Ok(DeviceRow {
            tokens: source.ids.len(),
            targets: source.targets.len(),
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

fn query_tiles(layout: &RowLayout) -> Vec<[i32; TILE_ENTRY]> {
    let mut all = Vec::new();
    for s in &layout.segments {
        for start in s.tokens.clone().step_by(TILE) {
            let end = (start + TILE).min(s.tokens.end);
            all.push([start, end, s.tokens.start, s.prefix.start, s.prefix.end].map(|n| n as i32));
        }
    }
    longest_first(&mut all, |[start, end, segment, prefix, prefix_end]| {
        (end - segment) + (prefix_end - prefix) + (end - start)
    });
    all
}

fn key_tiles(layout: &RowLayout) -> Vec<[i32; TILE_ENTRY]> {
    let mut all = Vec::new();
    for s in &layout.segments {
        let dependent = dependents(layout, &s.tokens);
        for start in s.tokens.clone().step_by(TILE) {
            let end = (start + TILE).min(s.tokens.end);
            all.push([start, end, s.tokens.end, dependent.start, dependent.end].map(|n| n as i32));
        }
    }
    longest_first(&mut all, |[start, _, segment_end, first, last]| {
        (segment_end - start) + (last - first)
    });
    all
}

/// What is left at the end is short.
fn longest_first(tiles: &mut [[i32; TILE_ENTRY]], work: impl Fn(&[i32; TILE_ENTRY]) -> i32) {
    tiles.sort_by_key(|t| std::cmp::Reverse(work(t)));
}

/// The tokens of the completions of a prompt: they follow it.
fn dependents(layout: &RowLayout, prompt: &Range<usize>) -> Range<usize> {
    let completions =
        layout.segments.iter().filter(|s| !s.prefix.is_empty() && s.prefix == *prompt);
    completions.fold(prompt.end..prompt.end, |all, s| all.start..all.end.max(s.tokens.end))
}

/// Which rows go to which place, for a sum in a fixed order: the places, where each one's rows
/// start in the order, the order.
pub(super) struct Scatter {
    rows: Memory,
    offsets: Memory,
    order: Memory,
}

impl Scatter {
    /// Row i goes to `places[i]`.
    pub fn new(gpu: &Arc<Gpu>, places: &[u32]) -> Result<Self> {
        let mut order: Vec<u32> = (0..places.len() as u32).collect();
        order.sort_by_key(|i| (places[*i as usize], *i));
        let (mut rows, mut offsets): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        for (at, i) in order.iter().enumerate() {
            let place = places[*i as usize];
            if rows.last() != Some(&place) {
                rows.push(place);
                offsets.push(at as u32);
            }
        }
        offsets.push(order.len() as u32);
        let upload = |values: &[u32]| gpu.upload(Kind::F32, values);
        Ok(Scatter { rows: upload(&rows)?, offsets: upload(&offsets)?, order: upload(&order)? })
    }

    /// Adds the rows of `from` to their places in `to`.
    pub fn add(&self, gpu: &Gpu, to: &Memory, from: &Memory, width: usize) -> Result<()> {
        let Scatter { rows, offsets, order } = self;
        ops::scatter_rows(gpu, ScatterRows { to, from, rows, offsets, order, width })
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
