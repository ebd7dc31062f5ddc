//! Left operand A in the kernels' format: rows of units, the depth padded with zeros.

use std::cell::RefCell;
use std::ops::Range;

use super::kernel::Kernel;
use super::pack::{interleave, round, transpose, transpose_pairs};
use super::panel::{NR, Product, ROW_PADDING};
use super::view::{Elements, View};
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::thread_pool;
use half::bf16;

thread_local! {
    /// Two rounded lines of k, before they are interleaved into pairs.
    static BF16_LINES: RefCell<Vec<bf16>> = const { RefCell::new(Vec::new()) };
    /// One row in f32, before it is rounded.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Number of units that one task converts from a row-major source; from another source it converts
/// 64 rows. A matrix of fewer elements than this is converted by the calling thread alone.
const CHUNK: usize = 1 << 15;

/// A matrix A `[rows, cols]`, prepared once as the left operand of any number of GEMMs.
pub struct Operand<'a> {
    pub(super) kernel: Kernel,
    pub(super) rows: usize,
    /// k, in elements.
    pub(super) cols: usize,
    units: Units<'a>,
    /// Units between rows.
    stride: usize,
}

enum Units<'a> {
    /// Borrowed: f32 values in place, or units of another operand.
    Borrowed(&'a [u32]),
    Owned(Buffer),
}

impl Units<'_> {
    fn all(&self) -> &[u32] {
        match self {
            Units::Borrowed(units) => units,
            Units::Owned(buffer) => buffer.units(),
        }
    }
}

impl<'a> Operand<'a> {
    /// Returns the operand `scale·view` `[rows, cols]`. For f32 kernels, an unscaled row-major f32
    /// view is borrowed without a copy.
    pub fn new(kernel: Kernel, view: View<'a>, rows: usize, cols: usize, scale: f32) -> Self {
        assert!(
            view.covers(rows, cols),
            "operand: the view is smaller than {rows}x{cols}"
        );
        if let (false, Elements::F32(values), 1, 1.0) =
            (kernel.is_bf16(), view.elements, view.col_stride, scale)
        {
            return Operand {
                kernel,
                rows,
                cols,
                units: Units::Borrowed(units_of(values)),
                stride: view.row_stride,
            };
        }
        let depth = kernel.depth(cols);
        let mut own = Buffer::uninit((rows + ROW_PADDING) * depth);
        let units = own.units_mut();
        let lines = if view.col_stride == 1 {
            (CHUNK / depth.max(1)).clamp(1, rows.max(1))
        } else {
            64
        };
        let fill = |i: usize, part: &mut [u32]| {
            let first = i * lines;
            fill_rows(
                kernel,
                SourceRows {
                    view,
                    first,
                    rows: (rows - first).min(lines),
                    cols,
                    scale,
                },
                depth,
                part,
            );
        };
        match rows * cols < CHUNK {
            true => units[..rows * depth]
                .chunks_mut((lines * depth).max(1))
                .enumerate()
                .for_each(|(i, part)| fill(i, part)),
            false => thread_pool::chunks(&mut units[..rows * depth], lines * depth, fill),
        }
        Operand {
            kernel,
            rows,
            cols,
            units: Units::Owned(own),
            stride: depth,
        }
    }

    /// Applies `prepare(i, row)` to each row of `values` in place and returns the operand `[rows,
    /// cols]`. For bf16 kernels, a row is rounded while it is in the L1 cache. Uses one thread.
    pub(crate) fn prepared(
        kernel: Kernel,
        values: &'a mut [f32],
        cols: usize,
        mut prepare: impl FnMut(usize, &mut [f32]),
    ) -> Self {
        let mut rounded = OperandRows::new(kernel, values.len() / cols, cols);
        for (i, row) in values.chunks_exact_mut(cols).enumerate() {
            prepare(i, row);
            rounded.write(i, row);
        }
        rounded.operand(values)
    }

    /// Returns two operands of the same shape, made as by [`Operand::prepared`] with one `prepare`
    /// for both.
    pub(crate) fn prepared_pair(
        kernel: Kernel,
        [first, second]: [&'a mut [f32]; 2],
        cols: usize,
        mut prepare: impl FnMut(usize, &mut [f32], &mut [f32]),
    ) -> [Self; 2] {
        let mut rounded =
            [first.len(), second.len()].map(|len| OperandRows::new(kernel, len / cols, cols));
        for (i, (x, y)) in first
            .chunks_exact_mut(cols)
            .zip(second.chunks_exact_mut(cols))
            .enumerate()
        {
            prepare(i, x, y);
            rounded[0].write(i, x);
            rounded[1].write(i, y);
        }
        let [x, y] = rounded;
        [x.operand(first), y.operand(second)]
    }

    /// Returns a transposed copy `[cols, rows]`.
    pub(crate) fn transposed(&self) -> Operand<'static> {
        Operand::owned(self.kernel, self.view().t(), self.cols, self.rows)
    }

    /// Returns some of its rows, borrowed.
    pub fn part(&self, rows: Range<usize>) -> Operand<'_> {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "operand: rows {rows:?} of {}",
            self.rows
        );
        let units = &self.units.all()[rows.start * self.stride..];
        Operand {
            kernel: self.kernel,
            rows: rows.len(),
            cols: self.cols,
            units: Units::Borrowed(units),
            stride: self.stride,
        }
    }

    /// Returns the matrix as a view, for use as a right operand. The values are already rounded for
    /// bf16 kernels.
    pub fn view(&self) -> View<'_> {
        let units = self.units.all();
        if self.kernel.is_bf16() {
            // SAFETY: a unit is a pair of bf16 in the order of k, and every bit pattern is a valid
            // bf16.
            let values = unsafe {
                std::slice::from_raw_parts(units.as_ptr().cast::<bf16>(), 2 * units.len())
            };
            return View::of(Elements::Bf16(values), 2 * self.stride);
        }
        // SAFETY: a unit is an f32, and every bit pattern is valid.
        View::f32(
            unsafe { std::slice::from_raw_parts(units.as_ptr().cast::<f32>(), units.len()) },
            self.stride,
        )
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns one row of an operand for a bf16 kernel. Panics if the kernel is not bf16.
    pub fn bf16_row(&self, row: usize) -> &[bf16] {
        assert!(
            self.kernel.is_bf16() && row < self.rows,
            "operand: row {row} of {}",
            self.rows
        );
        let units = &self.units.all()[row * self.stride..][..self.stride];
        // SAFETY: a unit is a pair of bf16 in the order of k, and every bit pattern is a valid
        // bf16.
        let values =
            unsafe { std::slice::from_raw_parts(units.as_ptr().cast::<bf16>(), 2 * units.len()) };
        &values[..self.cols]
    }

    /// Returns the kernel that this operand was prepared for.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Pairs the rows from `row` on and the columns from `start` on with a packed panel of B. For
    /// bf16 kernels, `start` must be even.
    pub(crate) fn product(&self, row: usize, start: usize, depth: usize, panel: &[u32]) -> Product {
        let units = self.units.all().as_ptr();
        let offset = row * self.stride + self.kernel.units(start);
        debug_assert!(panel.len() >= depth * NR);
        Product {
            // SAFETY: row and start lie inside the matrix.
            a: unsafe { units.add(offset) },
            stride: self.stride,
            b: panel.as_ptr(),
            depth,
        }
    }
}

/// Builder of an operand from finished rows. For bf16 kernels it holds the rounded rows; for f32
/// kernels it holds nothing, and the operand borrows the values.
struct OperandRows {
    kernel: Kernel,
    rows: usize,
    cols: usize,
    depth: usize,
    own: Buffer,
}

impl OperandRows {
    fn new(kernel: Kernel, rows: usize, cols: usize) -> Self {
        let depth = kernel.depth(cols);
        let own = if kernel.is_bf16() {
            Buffer::uninit((rows + ROW_PADDING) * depth)
        } else {
            Buffer::default()
        };
        OperandRows {
            kernel,
            rows,
            cols,
            depth,
            own,
        }
    }

    fn write(&mut self, i: usize, row: &[f32]) {
        if self.kernel.is_bf16() {
            round_row(
                self.kernel,
                row,
                &mut self.own.units_mut()[i * self.depth..(i + 1) * self.depth],
            );
        }
    }

    /// Returns the operand with all rows, given the values that were written.
    fn operand(self, values: &[f32]) -> Operand<'_> {
        let OperandRows {
            kernel,
            rows,
            cols,
            depth,
            own,
        } = self;
        let units = if kernel.is_bf16() {
            Units::Owned(own)
        } else {
            Units::Borrowed(units_of(values))
        };
        Operand {
            kernel,
            rows,
            cols,
            units,
            stride: depth,
        }
    }
}

/// The rows of `scale·view` that one task converts.
#[derive(Clone, Copy)]
struct SourceRows<'a> {
    view: View<'a>,
    /// The first row, counted in the view.
    first: usize,
    /// The number of rows.
    rows: usize,
    /// Elements in a row: k.
    cols: usize,
    /// Factor applied to every element.
    scale: f32,
}

/// Converts rows into `dst` `[rows, depth]`. `depth` is in units, padding included.
fn fill_rows(kernel: Kernel, source: SourceRows, depth: usize, dst: &mut [u32]) {
    // A new element type does not compile here: the functions below must then handle it.
    let (Elements::F32(_) | Elements::Bf16(_)) = source.view.elements;
    if kernel.is_bf16() {
        BF16_LINES.with_borrow_mut(|lines| fill_rows_bf16(kernel, source, depth, dst, lines));
    } else {
        fill_rows_f32(source, depth, dst);
    }
}

/// [`fill_rows`] for f32 kernels.
fn fill_rows_f32(source: SourceRows, depth: usize, dst: &mut [u32]) {
    let SourceRows {
        view,
        first,
        rows,
        cols,
        scale,
    } = source;
    if let (Elements::F32(v), 1) = (view.elements, view.row_stride) {
        let (start, stride) = (first, view.col_stride);
        let len = (cols - 1) * stride + rows;
        // SAFETY: `covers` was checked; f32 and u32 have the same layout.
        unsafe {
            transpose(
                v[start..start + len].as_ptr().cast(),
                len,
                stride,
                cols,
                rows,
                dst,
                depth,
            )
        };
        if scale != 1.0 {
            dst.iter_mut()
                .for_each(|u| *u = (f32::from_bits(*u) * scale).to_bits());
        }
        return;
    }
    for (i, row) in dst.chunks_mut(depth).enumerate().take(rows) {
        for (j, unit) in row.iter_mut().enumerate() {
            *unit = (at(view, first + i, j) * scale).to_bits();
        }
    }
}

fn at(view: View, row: usize, col: usize) -> f32 {
    let i = row * view.row_stride + col * view.col_stride;
    match view.elements {
        Elements::F32(v) => v[i],
        Elements::Bf16(v) => v[i].to_f32(),
    }
}

/// [`fill_rows`] for bf16 kernels; `lines` is scratch memory.
fn fill_rows_bf16(
    kernel: Kernel,
    source: SourceRows,
    depth: usize,
    dst: &mut [u32],
    lines: &mut Vec<bf16>,
) {
    let SourceRows {
        view,
        first,
        rows,
        cols,
        scale,
    } = source;
    let used = cols.div_ceil(2);
    if view.col_stride == 1 {
        for (i, row) in dst.chunks_mut(depth).enumerate().take(rows) {
            let start = (first + i) * view.row_stride;
            // SAFETY: a unit has the size of two bf16, and every bit pattern is valid for both
            // types.
            let to: &mut [bf16] =
                unsafe { std::slice::from_raw_parts_mut(row.as_mut_ptr().cast(), 2 * depth) };
            match view.elements {
                Elements::F32(v) => {
                    round_scaled(kernel, &v[start..start + cols], scale, &mut to[..cols])
                }
                Elements::Bf16(v) => {
                    for (to, from) in to.iter_mut().zip(&v[start..start + cols]) {
                        *to = if scale == 1.0 {
                            *from
                        } else {
                            bf16::from_f32(from.to_f32() * scale)
                        };
                    }
                }
            }
            to[cols..].fill(bf16::ZERO);
        }
        return;
    }
    if let (Elements::Bf16(v), 1.0) = (view.elements, scale) {
        return transpose_pairs(&v[first..], view.col_stride, cols, rows, dst, depth);
    }
    // The source is contiguous along the rows of A: two neighbouring k are rounded and interleaved
    // into pairs, and the pairs are transposed.
    let mut paired = Buffer::uninit(used * rows);
    lines.resize(2 * rows, bf16::ZERO);
    for (p, units) in paired.units_mut().chunks_mut(rows).enumerate() {
        for half in 0..2 {
            let k = 2 * p + half;
            let line = &mut lines[half * rows..(half + 1) * rows];
            if k >= cols {
                line.fill(bf16::ZERO);
                continue;
            }
            let start = first + k * view.col_stride;
            match view.elements {
                Elements::F32(v) => round_scaled(kernel, &v[start..start + rows], scale, line),
                Elements::Bf16(v) => line
                    .iter_mut()
                    .zip(&v[start..start + rows])
                    .for_each(|(to, from)| *to = bf16::from_f32(from.to_f32() * scale)),
            }
        }
        let (low, high) = lines.split_at(rows);
        interleave(kernel, low, Some(&high[..rows]), units);
    }
    // SAFETY: the buffer's own units.
    unsafe {
        transpose(
            paired.units().as_ptr(),
            used * rows,
            rows,
            used,
            rows,
            dst,
            depth,
        )
    };
    if used < depth {
        dst.chunks_mut(depth)
            .take(rows)
            .for_each(|row| row[used..].fill(0));
    }
}

fn round_scaled(kernel: Kernel, src: &[f32], scale: f32, dst: &mut [bf16]) {
    if scale == 1.0 {
        return round(kernel, src, dst);
    }
    let mut scaled = [0f32; 256];
    for (src, dst) in src.chunks(256).zip(dst.chunks_mut(256)) {
        let scaled = &mut scaled[..src.len()];
        scaled
            .iter_mut()
            .zip(src)
            .for_each(|(to, from)| *to = from * scale);
        round(kernel, scaled, dst);
    }
}

/// Rounds a row into pairs of bf16 and fills the rest of `units` with zeros.
fn round_row(kernel: Kernel, row: &[f32], units: &mut [u32]) {
    // SAFETY: a unit has the size of two bf16, and every bit pattern is valid for both types.
    let to: &mut [bf16] =
        unsafe { std::slice::from_raw_parts_mut(units.as_mut_ptr().cast(), 2 * units.len()) };
    round(kernel, row, &mut to[..row.len()]);
    to[row.len()..].fill(bf16::ZERO);
}

/// Reinterprets f32 values as units.
fn units_of(values: &[f32]) -> &[u32] {
    // SAFETY: same size and alignment, and every bit pattern is valid for both.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}

impl Operand<'static> {
    /// Returns the operand `[rows, cols]` with its padded rows of units in `own`.
    pub(super) fn of_buffer(kernel: Kernel, rows: usize, cols: usize, own: Buffer) -> Self {
        Operand {
            kernel,
            rows,
            cols,
            units: Units::Owned(own),
            stride: kernel.depth(cols),
        }
    }

    /// Computes the operand `[rows, cols]` in parallel: `fill(i, row)` writes row i. For bf16
    /// kernels, a row is rounded while it is in the L1 cache.
    pub fn computed(
        kernel: Kernel,
        rows: usize,
        cols: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let depth = kernel.depth(cols);
        let mut own = Buffer::uninit((rows + ROW_PADDING) * depth);
        let lines = thread_pool::rows_per_task(rows);
        if kernel.is_bf16() {
            thread_pool::chunks(
                &mut own.units_mut()[..rows * depth],
                lines * depth,
                |i, part| {
                    ROW.with_borrow_mut(|row| {
                        row.resize(cols, 0.0);
                        for (r, units) in part.chunks_mut(depth).enumerate() {
                            fill(i * lines + r, row);
                            round_row(kernel, row, units);
                        }
                    });
                },
            );
        } else {
            thread_pool::chunks(&mut own[..rows * depth], lines * depth, |i, part| {
                part.chunks_mut(depth)
                    .enumerate()
                    .for_each(|(r, row)| fill(i * lines + r, row));
            });
        }
        Operand {
            kernel,
            rows,
            cols,
            units: Units::Owned(own),
            stride: depth,
        }
    }

    /// Returns the operand of a copy of `view` `[rows, cols]`. It does not borrow from the view.
    pub(crate) fn owned(kernel: Kernel, view: View, rows: usize, cols: usize) -> Operand<'static> {
        let Operand {
            kernel,
            rows,
            cols,
            units,
            stride,
        } = Operand::new(kernel, view, rows, cols, 1.0);
        let units = match units {
            Units::Owned(b) => Units::Owned(b),
            Units::Borrowed(units) => {
                let mut own = Buffer::uninit(units.len());
                own.units_mut().copy_from_slice(units);
                Units::Owned(own)
            }
        };
        Operand {
            kernel,
            rows,
            cols,
            units,
            stride,
        }
    }
}
