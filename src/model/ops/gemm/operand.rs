//! A in the form kernels read: rows of units, the depth padded with zeros.

use std::cell::RefCell;

use super::kernel::{Kernel, Product};
use super::pack::{interleave, round, transpose};
use super::{Elements, ROW_PADDING, View};
use crate::model::ops::buffer::Buffer;
use crate::model::ops::team;
use half::bf16;

thread_local! {
    static LINES: RefCell<Vec<bf16>> = const { RefCell::new(Vec::new()) };
}

/// Elements that one task converts.
const CHUNK: usize = 1 << 15;

/// A matrix A `[rows, cols]` that can be multiplied from the left, any number of times.
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
    /// f32 as it lies.
    Lent(&'a [f32]),
    Own(Buffer),
}

impl<'a> Operand<'a> {
    /// The operand `scale·view` `[rows, cols]`. An unscaled row-major f32 view costs nothing when f32 is multiplied.
    pub fn new(kernel: Kernel, view: View<'a>, rows: usize, cols: usize, scale: f32) -> Self {
        assert!(view.covers(rows, cols), "operand: the view is smaller than {rows}x{cols}");
        if let (false, Elements::F32(values), 1, 1.0) = (kernel.pairs(), view.elements, view.col_stride, scale) {
            return Operand { kernel, rows, cols, units: Units::Lent(values), stride: view.row_stride };
        }
        let depth = kernel.depth(cols);
        let mut own = Buffer::dirty((rows + ROW_PADDING) * depth);
        let units = own.units_mut();
        let lines = if view.col_stride == 1 { (CHUNK / depth.max(1)).clamp(1, rows.max(1)) } else { 64 };
        let fill = |i: usize, part: &mut [u32]| fill_rows(kernel, view, i * lines, (rows - i * lines).min(lines), cols, depth, scale, part);
        match rows * cols < CHUNK {
            true => units[..rows * depth].chunks_mut((lines * depth).max(1)).enumerate().for_each(|(i, part)| fill(i, part)),
            false => team::chunks(&mut units[..rows * depth], lines * depth, fill),
        }
        Operand { kernel, rows, cols, units: Units::Own(own), stride: depth }
    }

    /// The same matrix as a view, to be multiplied from the right: rounded already, where the kernel rounds.
    pub fn view(&self) -> View<'_> {
        match &self.units {
            Units::Lent(values) => View::f32(values, self.stride),
            Units::Own(own) if self.kernel.pairs() => {
                let units = own.units();
                // SAFETY: a unit is a pair of bf16, of which every bit pattern is valid, in the order of k.
                let values = unsafe { std::slice::from_raw_parts(units.as_ptr().cast::<bf16>(), 2 * units.len()) };
                View::of(Elements::Bf16(values), 2 * self.stride)
            }
            Units::Own(own) => View::f32(own, self.stride),
        }
    }

    /// Its kernel.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// The product of its rows from `row` on, columns from `start` on (an even number), with a packed panel.
    pub(crate) fn product(&self, row: usize, start: usize, depth: usize, panel: &[u32]) -> Product {
        let units = match &self.units {
            Units::Lent(v) => v.as_ptr().cast(),
            Units::Own(b) => b.units().as_ptr(),
        };
        let offset = row * self.stride + self.kernel.units(start);
        debug_assert!(panel.len() >= depth * super::NR);
        // SAFETY: row and start lie inside the matrix.
        Product { a: unsafe { units.add(offset) }, stride: self.stride, b: panel.as_ptr(), depth }
    }
}

/// Rows `first..first + rows` of the operand.
fn fill_rows(kernel: Kernel, view: View, first: usize, rows: usize, cols: usize, depth: usize, scale: f32, dst: &mut [u32]) {
    let (Elements::F32(_) | Elements::Bf16(_)) = view.elements;
    if kernel.pairs() {
        LINES.with_borrow_mut(|lines| pairs(kernel, view, first, rows, cols, depth, scale, dst, lines));
    } else {
        singles(view, first, rows, cols, depth, scale, dst);
    }
}

fn singles(view: View, first: usize, rows: usize, cols: usize, depth: usize, scale: f32, dst: &mut [u32]) {
    if let (Elements::F32(v), 1) = (view.elements, view.row_stride) {
        let (start, stride) = (first, view.col_stride);
        let len = (cols - 1) * stride + rows;
        // SAFETY: `covers` was checked; f32 and u32 have the same layout.
        unsafe { transpose(v[start..start + len].as_ptr().cast(), len, stride, cols, rows, dst, depth) };
        if scale != 1.0 {
            dst.iter_mut().for_each(|u| *u = (f32::from_bits(*u) * scale).to_bits());
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

fn pairs(
    kernel: Kernel,
    view: View,
    first: usize,
    rows: usize,
    cols: usize,
    depth: usize,
    scale: f32,
    dst: &mut [u32],
    lines: &mut Vec<bf16>,
) {
    let used = cols.div_ceil(2);
    if view.col_stride == 1 {
        for (i, row) in dst.chunks_mut(depth).enumerate().take(rows) {
            let start = (first + i) * view.row_stride;
            // SAFETY: a row of units is as many pairs of bf16.
            let to: &mut [bf16] = unsafe { std::slice::from_raw_parts_mut(row.as_mut_ptr().cast(), 2 * depth) };
            match view.elements {
                Elements::F32(v) => round_scaled(kernel, &v[start..start + cols], scale, &mut to[..cols]),
                Elements::Bf16(v) => {
                    for (to, from) in to.iter_mut().zip(&v[start..start + cols]) {
                        *to = if scale == 1.0 { *from } else { bf16::from_f32(from.to_f32() * scale) };
                    }
                }
            }
            to[cols..].fill(bf16::ZERO);
        }
        return;
    }
    // Contiguous along the rows of A: two neighbouring k are rounded, interleaved into pairs, and the pairs are transposed.
    let mut paired = Buffer::dirty(used * rows);
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
                Elements::Bf16(v) => {
                    line.iter_mut().zip(&v[start..start + rows]).for_each(|(to, from)| *to = bf16::from_f32(from.to_f32() * scale))
                }
            }
        }
        let (low, high) = lines.split_at(rows);
        interleave(kernel, low, Some(&high[..rows]), units);
    }
    // SAFETY: the buffer's own units.
    unsafe { transpose(paired.units().as_ptr(), used * rows, rows, used, rows, dst, depth) };
    if used < depth {
        dst.chunks_mut(depth).take(rows).for_each(|row| row[used..].fill(0));
    }
}

fn round_scaled(kernel: Kernel, src: &[f32], scale: f32, dst: &mut [bf16]) {
    if scale == 1.0 {
        return round(kernel, src, dst);
    }
    let mut scaled = [0f32; 256];
    for (src, dst) in src.chunks(256).zip(dst.chunks_mut(256)) {
        let scaled = &mut scaled[..src.len()];
        scaled.iter_mut().zip(src).for_each(|(to, from)| *to = from * scale);
        round(kernel, scaled, dst);
    }
}

impl Operand<'static> {
    /// A copy of `view` `[rows, cols]` that outlives it.
    pub(crate) fn owned(kernel: Kernel, view: View, rows: usize, cols: usize) -> Operand<'static> {
        let Operand { kernel, rows, cols, units, stride } = Operand::new(kernel, view, rows, cols, 1.0);
        let units = match units {
            Units::Own(b) => Units::Own(b),
            Units::Lent(v) => Units::Own(Buffer::copy_of(v)),
        };
        Operand { kernel, rows, cols, units, stride }
    }
}
