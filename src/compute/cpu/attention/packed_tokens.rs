//! Rows of tokens (queries, keys, values and gradients), packed per head as the second operand of
//! GEMMs. All query blocks that attend to keys share their packed form.

use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm::{Kernel, NR, View, pack_panel};
use crate::compute::cpu::thread_pool;
use crate::compute::layout::RowLayout;

/// Tokens packed as columns, for GEMMs whose depth is D: B `[D, tokens]`. A panel is [`NR`] tokens
/// of one segment.
pub(super) struct TokenColumns {
    units: Buffer,
    depth: usize,
    /// First panel of each segment.
    first: Vec<usize>,
    /// Number of panels of all segments.
    panels: usize,
}

impl TokenColumns {
    /// Packs `heads` heads. In the `row`-wide token rows, head `h` starts at column `at(h)`.
    pub fn pack(
        kernel: Kernel,
        layout: &RowLayout,
        tokens: &[f32],
        row: usize,
        dim: usize,
        heads: usize,
        at: impl Fn(usize) -> usize + Sync,
    ) -> Self {
        let depth = kernel.depth(dim);
        let mut first = Vec::with_capacity(layout.segments.len());
        let mut places = Vec::new();
        for s in &layout.segments {
            first.push(places.len());
            places.extend(
                s.tokens
                    .clone()
                    .step_by(NR)
                    .map(|start| start..(start + NR).min(s.tokens.end)),
            );
        }
        let panels = places.len();
        let mut units = Buffer::uninit(heads * panels * depth * NR);
        thread_pool::chunks(units.units_mut(), depth * NR, |i, panel| {
            let (head, place) = (i / panels, &places[i % panels]);
            let view = View::f32(&tokens[place.start * row + at(head)..], row).t();
            pack_panel(kernel, view, 0, dim, 0, place.len(), panel);
        });
        TokenColumns {
            units,
            depth,
            first,
            panels,
        }
    }

    /// Returns the depth and the units of a segment's `i`-th panel.
    pub fn panel(&self, head: usize, segment: usize, i: usize) -> (usize, &[u32]) {
        let at = (head * self.panels + self.first[segment] + i) * self.depth * NR;
        (self.depth, &self.units.units()[at..at + self.depth * NR])
    }
}

/// Tokens packed as rows, for GEMMs whose depth is a range of tokens: B `[tokens of the range, D]`.
/// A panel is [`NR`] columns of D.
pub(super) struct TokenRows {
    units: Buffer,
    dim: usize,
    /// First row of units of each range. The last entry is the total number of rows.
    first: Vec<usize>,
}

impl TokenRows {
    /// Packs whole segments, each as one range.
    pub fn pack(
        kernel: Kernel,
        layout: &RowLayout,
        tokens: &[f32],
        row: usize,
        dim: usize,
        heads: usize,
        at: impl Fn(usize) -> usize + Sync,
    ) -> Self {
        let ranges: Vec<_> = layout.segments.iter().map(|s| s.tokens.clone()).collect();
        Self::pack_ranges(kernel, &ranges, tokens, row, dim, heads, at)
    }

    /// Packs the given ranges of tokens.
    pub fn pack_ranges(
        kernel: Kernel,
        ranges: &[std::ops::Range<usize>],
        tokens: &[f32],
        row: usize,
        dim: usize,
        heads: usize,
        at: impl Fn(usize) -> usize + Sync,
    ) -> Self {
        let mut first = vec![0];
        for range in ranges {
            first.push(first[first.len() - 1] + kernel.depth(range.len()));
        }
        let panels = dim.div_ceil(NR);
        let depth = first[first.len() - 1];
        let mut units = Buffer::uninit(heads * panels * depth * NR);
        thread_pool::chunks(units.units_mut(), depth * NR, |i, panel| {
            let (head, column) = (i / panels, i % panels * NR);
            for (i, range) in ranges.iter().enumerate() {
                let view = View::f32(&tokens[range.start * row + at(head) + column..], row);
                let to = &mut panel[first[i] * NR..first[i + 1] * NR];
                pack_panel(kernel, view, 0, range.len(), 0, NR.min(dim - column), to);
            }
        });
        TokenRows { units, dim, first }
    }

    /// Iterates over the panels of D as (index, number of columns).
    pub fn panels(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let dim = self.dim;
        (0..dim.div_ceil(NR)).map(move |i| (i, NR.min(dim - i * NR)))
    }

    /// Returns the units of a range in one panel of D.
    pub fn units(&self, head: usize, range: usize, panel: usize) -> &[u32] {
        let depth = self.first[self.first.len() - 1];
        let base = (head * self.dim.div_ceil(NR) + panel) * depth;
        &self.units.units()[(base + self.first[range]) * NR..(base + self.first[range + 1]) * NR]
    }
}
