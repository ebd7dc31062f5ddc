//! Matrices as they lie in memory.

use half::bf16;

/// Elements of a matrix.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// 32-bit.
    F32(&'a [f32]),
    /// 16-bit, as bf16 models store their weights.
    Bf16(&'a [bf16]),
}

impl Elements<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Elements::F32(v) => v.len(),
            Elements::Bf16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A read-only strided view of an `m × n` matrix; one of the strides is 1.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(crate) elements: Elements<'a>,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a> View<'a> {
    /// f32, row-major, with rows `stride` apart.
    pub fn f32(values: &'a [f32], stride: usize) -> Self {
        View { elements: Elements::F32(values), row_stride: stride, col_stride: 1 }
    }

    /// Row-major with rows `stride` apart.
    pub fn of(elements: Elements<'a>, stride: usize) -> Self {
        View { elements, row_stride: stride, col_stride: 1 }
    }

    /// The transpose, without a copy.
    pub fn t(self) -> Self {
        View { elements: self.elements, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// Whether every element of an `m × n` matrix is inside.
    pub(crate) fn covers(&self, rows: usize, cols: usize) -> bool {
        rows == 0
            || cols == 0
            || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.elements.len()
    }
}
