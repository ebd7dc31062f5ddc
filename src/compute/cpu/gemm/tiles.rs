//! Products that are used a tile at a time, while it is in the nearest caches, and are never
//! written as a whole.

use std::ops::Range;

use super::kernel::Kernel;
use super::operand::Operand;
use super::pack::round_rows;
use super::panel::{NR, OutputTile, ROW_PADDING};
use super::product::{Piece, Shared, Term, blocks, by_groups, multiply, pack_pieces};
use crate::compute::cpu::buffer::Buffer;

/// `P` products of one shape `[m, n]`: `finish(rows, columns, tiles)` gets every part of all of
/// them once, tile p being `[rows, NR]` of product p, of which it may use the columns. Each number
/// is the one that [`super::matmul`] gives, bit for bit.
///
/// # Panics
/// When a view is smaller than its product (a bug of the caller).
pub fn matmul_tiles<const P: usize>(
    m: usize,
    n: usize,
    products: [&[Term]; P],
    finish: impl Fn(Range<usize>, Range<usize>, [&mut [f32]; P]) + Sync,
) {
    let Some(first) = products.iter().find_map(|terms| terms.first()) else { return };
    if m == 0 || n == 0 {
        return;
    }
    let kernel = first.a.kernel;
    for t in products.iter().copied().flatten() {
        assert!(
            t.a.rows == m && t.a.kernel == kernel && t.b.covers(t.a.cols, n),
            "matmul_tiles: a term does not fit {m}x{}x{n}",
            t.a.cols
        );
    }
    let pieces = products.map(|terms| {
        blocks(kernel, terms, usize::MAX / 2).into_iter().flatten().collect::<Vec<_>>()
    });
    let depths = std::array::from_fn(|p| pieces[p].iter().map(|p| p.depth).sum());
    let tiled = Tiles { kernel, n, pieces, depths, finish };
    let (panels, units) = (n.div_ceil(NR), depths.iter().sum::<usize>() * NR);
    by_groups(
        kernel,
        (m, panels),
        (units, P * NR),
        |panel, to| tiled.pack(panel, to),
        |rows, panel, units, room| tiled.run(rows, panel, units, room),
    );
}

/// What the tasks share.
struct Tiles<'a, const P: usize, F> {
    kernel: Kernel,
    n: usize,
    pieces: [Vec<Piece<'a>>; P],
    depths: [usize; P],
    finish: F,
}

impl<const P: usize, F: Fn(Range<usize>, Range<usize>, [&mut [f32]; P]) + Sync> Tiles<'_, P, F> {
    /// A panel of each product's B, one after the other.
    fn pack(&self, panel: usize, units: &mut [u32]) {
        let mut rest = units;
        for (pieces, depth) in self.pieces.iter().zip(self.depths) {
            let (to, more) = rest.split_at_mut(depth * NR);
            pack_pieces(self.kernel, pieces, self.n, panel, to);
            rest = more;
        }
    }

    fn run(&self, rows: Range<usize>, panel: usize, units: &[u32], room: &mut [f32]) {
        let columns = panel * NR..((panel + 1) * NR).min(self.n);
        let (mut room, mut at) = (room, 0);
        let tiles = std::array::from_fn(|p| {
            let (tile, more) = std::mem::take(&mut room).split_at_mut(rows.len() * NR);
            let out = OutputTile {
                c: tile.as_mut_ptr(),
                stride: NR,
                columns: columns.len(),
                accumulate: false,
            };
            // SAFETY: the tile has the rows, NR apart; this task alone has it. The pieces' operands
            // cover the rows, by the assertion above.
            unsafe { multiply(self.kernel, &self.pieces[p], rows.clone(), &units[at..], out) };
            at += self.depths[p] * NR;
            room = more;
            tile
        });
        (self.finish)(rows, columns, tiles);
    }
}

/// An operand that tasks write a tile at a time.
pub struct TiledOperand {
    kernel: Kernel,
    rows: usize,
    cols: usize,
    depth: usize,
    own: Buffer,
    at: Shared,
}

impl TiledOperand {
    /// `[rows, cols]`; all of it has to be written.
    pub fn new(kernel: Kernel, rows: usize, cols: usize) -> Self {
        let depth = kernel.depth(cols);
        let mut own = Buffer::dirty((rows + ROW_PADDING) * depth);
        let at = Shared(own.as_mut_ptr());
        TiledOperand { kernel, rows, cols, depth, own, at }
    }

    /// Some of its rows, `width` columns from `column` on, a multiple of [`NR`], from a tile of
    /// rows [`NR`] apart.
    ///
    /// # Safety
    /// No other task writes this part.
    pub unsafe fn write(&self, rows: Range<usize>, column: usize, width: usize, tile: &[f32]) {
        assert!(
            rows.end <= self.rows
                && column.is_multiple_of(NR)
                && width <= NR
                && column + width <= self.cols
        );
        assert!(rows.is_empty() || tile.len() >= (rows.len() - 1) * NR + width);
        // What is beyond the last column is 0.
        let units = if column + width == self.cols {
            self.depth - self.kernel.units(column)
        } else {
            self.kernel.depth(width)
        };
        // SAFETY: rows and columns lie inside the buffer; f32 and units have one size; this part is
        // the caller's.
        let to = unsafe { self.at.at(rows.start * self.depth + self.kernel.units(column)) }
            .cast::<u32>();
        // SAFETY: as above.
        unsafe { round_rows(self.kernel, tile, rows.len(), width, to, self.depth, units) };
    }

    /// The operand, once all of it is written.
    pub fn operand(self) -> Operand<'static> {
        Operand::of_buffer(self.kernel, self.rows, self.cols, self.own)
    }
}
