//! Read-only views of matrices in memory.

use half::bf16;

/// Elements of a matrix, by type.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// bf16, the type in which bf16 models store their weights.
    Bf16(&'a [bf16]),
}

impl Elements<'_> {
    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        match self {
            Elements::F32(v) => v.len(),
            Elements::Bf16(v) => v.len(),
        }
    }

    /// Returns true if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Read-only strided view of a matrix. One of the two strides is 1.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(crate) elements: Elements<'a>,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a> View<'a> {
    /// Returns a row-major view of f32 values with rows `stride` elements apart.
    pub fn f32(values: &'a [f32], stride: usize) -> Self {
        View {
            elements: Elements::F32(values),
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// Returns a row-major view with rows `stride` elements apart.
    pub fn of(elements: Elements<'a>, stride: usize) -> Self {
        View {
            elements,
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// Returns the transpose, without a copy.
    pub fn t(self) -> Self {
        View {
            elements: self.elements,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// Returns true if every element of a `rows × cols` matrix is inside the view.
    pub(crate) fn covers(&self, rows: usize, cols: usize) -> bool {
        rows == 0
            || cols == 0
            || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.elements.len()
    }
}
