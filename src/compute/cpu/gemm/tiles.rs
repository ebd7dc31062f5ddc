//! GEMMs whose result is used tile by tile while the tile is in the L1 cache. The full result
//! matrix never exists.

use std::ops::Range;

use super::kernel::Kernel;
use super::operand::Operand;
use super::pack::round_rows;
use super::panel::{NR, OutputTile, ROW_PADDING};
use super::product::{Piece, Shared, Term, blocks, by_groups, multiply, pack_pieces};
use crate::compute::cpu::buffer::Buffer;

/// Computes `P` GEMMs of the same shape `[m, n]` and calls `finish(rows, columns, tiles)` exactly
/// once for each part. `tiles[p]` is `[rows, NR]` of GEMM p; its first `columns.len()` columns are
/// valid, and `finish` may overwrite it. The values are the same bit for bit as those of
/// [`super::matmul`].
///
/// # Panics
/// Panics if a view is smaller than the matrix it stands for (a bug of the caller).
pub fn matmul_tiles<const P: usize>(
    m: usize,
    n: usize,
    products: [&[Term]; P],
    finish: impl Fn(Range<usize>, Range<usize>, [&mut [f32]; P]) + Sync,
) {
    let Some(first) = products.iter().find_map(|terms| terms.first()) else {
        return;
    };
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
        blocks(kernel, terms, usize::MAX / 2)
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
    });
    let depths = std::array::from_fn(|p| pieces[p].iter().map(|p| p.depth).sum());
    let tiled = Tiles {
        kernel,
        n,
        pieces,
        depths,
        finish,
    };
    let (panels, units) = (n.div_ceil(NR), depths.iter().sum::<usize>() * NR);
    by_groups(
        kernel,
        (m, panels),
        (units, P * NR),
        |panel, to| tiled.pack(panel, to),
        |rows, panel, units, scratch| tiled.run(rows, panel, units, scratch),
    );
}

/// State shared by the tasks.
struct Tiles<'a, const P: usize, F> {
    kernel: Kernel,
    n: usize,
    pieces: [Vec<Piece<'a>>; P],
    depths: [usize; P],
    finish: F,
}

impl<const P: usize, F: Fn(Range<usize>, Range<usize>, [&mut [f32]; P]) + Sync> Tiles<'_, P, F> {
    /// Packs one panel of the B of each GEMM, one after the other.
    fn pack(&self, panel: usize, units: &mut [u32]) {
        let mut rest = units;
        for (pieces, depth) in self.pieces.iter().zip(self.depths) {
            let (to, more) = rest.split_at_mut(depth * NR);
            pack_pieces(self.kernel, pieces, self.n, panel, to);
            rest = more;
        }
    }

    fn run(&self, rows: Range<usize>, panel: usize, units: &[u32], scratch: &mut [f32]) {
        let columns = panel * NR..((panel + 1) * NR).min(self.n);
        let (mut scratch, mut at) = (scratch, 0);
        let tiles = std::array::from_fn(|p| {
            let (tile, more) = std::mem::take(&mut scratch).split_at_mut(rows.len() * NR);
            let out = OutputTile {
                c: tile.as_mut_ptr(),
                stride: NR,
                columns: columns.len(),
                accumulate: false,
            };
            // SAFETY: the tile has the rows, NR elements apart, and belongs to this task alone. The
            // operands of the pieces cover the rows, as the assertion in `matmul_tiles` checked.
            unsafe {
                multiply(
                    self.kernel,
                    &self.pieces[p],
                    rows.clone(),
                    &units[at..],
                    out,
                )
            };
            at += self.depths[p] * NR;
            scratch = more;
            tile
        });
        (self.finish)(rows, columns, tiles);
    }
}

/// An operand that parallel tasks write tile by tile.
pub struct TiledOperand {
    kernel: Kernel,
    rows: usize,
    cols: usize,
    depth: usize,
    own: Buffer,
    at: Shared,
}

impl TiledOperand {
    /// Allocates an operand `[rows, cols]` with unspecified contents. Callers must write every tile
    /// before they call [`TiledOperand::operand`].
    pub fn new(kernel: Kernel, rows: usize, cols: usize) -> Self {
        let depth = kernel.depth(cols);
        let mut own = Buffer::uninit((rows + ROW_PADDING) * depth);
        let at = Shared(own.as_mut_ptr());
        TiledOperand {
            kernel,
            rows,
            cols,
            depth,
            own,
            at,
        }
    }

    /// Writes the given rows of the `width` columns that start at `column`, a multiple of [`NR`],
    /// from a tile with row stride [`NR`]. Rounds for bf16 kernels.
    ///
    /// # Safety
    /// No other task writes this part at the same time.
    pub unsafe fn write(&self, rows: Range<usize>, column: usize, width: usize, tile: &[f32]) {
        assert!(
            rows.end <= self.rows
                && column.is_multiple_of(NR)
                && width <= NR
                && column + width <= self.cols
        );
        assert!(rows.is_empty() || tile.len() >= (rows.len() - 1) * NR + width);
        // The last tile of a row also writes the padding, as zeros.
        let units = if column + width == self.cols {
            self.depth - self.kernel.units(column)
        } else {
            self.kernel.depth(width)
        };
        // SAFETY: rows and columns lie inside the buffer; f32 and units have the same size; by the
        // caller, no other task writes this part.
        let to = unsafe {
            self.at
                .at(rows.start * self.depth + self.kernel.units(column))
        }
        .cast::<u32>();
        // SAFETY: as above.
        unsafe { round_rows(self.kernel, tile, rows.len(), width, to, self.depth, units) };
    }

    /// Returns the operand after every tile has been written.
    pub fn operand(self) -> Operand<'static> {
        Operand::of_buffer(self.kernel, self.rows, self.cols, self.own)
    }
}
