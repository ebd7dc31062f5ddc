//! Weights, and the right operand of a GEMM.

use std::ops::Range;

use super::kernel::Kernel;
use super::pack::pack_panel;
use super::view::{Elements, View};

/// A weight W `[rows, columns]`, row-major.
///
/// The kernels of the CPU read it only with `pack` and `read_row`. A quantised weight would need
/// these two methods and no change in the kernels.
#[derive(Clone, Copy, Debug)]
pub struct WeightView<'a> {
    elements: Elements<'a>,
    columns: usize,
}

/// Orientation of a linear layer's weight as the right operand of a GEMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orientation {
    /// Forward pass, x·Wᵀ: B is Wᵀ `[columns, rows]`.
    Transposed,
    /// Backward pass, g·W: B is W `[rows, columns]`.
    Plain,
}

impl<'a> WeightView<'a> {
    /// Returns a view of a weight with rows of `columns` contiguous elements.
    pub fn new(elements: Elements<'a>, columns: usize) -> Self {
        WeightView { elements, columns }
    }

    /// Returns the number of rows: outputs of a linear layer, or tokens of a vocabulary.
    pub fn rows(&self) -> usize {
        self.elements.len() / self.columns.max(1)
    }

    /// Returns the number of columns: inputs of a linear layer, the width of an embedding.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns the elements as they are stored.
    pub fn elements(&self) -> Elements<'a> {
        self.elements
    }

    /// Returns B = Wᵀ, for x·Wᵀ.
    pub fn transposed(self) -> RightOperand<'a> {
        RightOperand::Weight(self, Orientation::Transposed)
    }

    /// Returns B = W, for g·W.
    pub fn plain(self) -> RightOperand<'a> {
        RightOperand::Weight(self, Orientation::Plain)
    }

    /// Packs rows `k` and at most [`super::NR`] columns `n` of B into a panel `dst`. The length of
    /// `dst` is the padded depth in units times `NR`; positions outside the matrix become zero.
    pub(crate) fn pack(
        &self,
        kernel: Kernel,
        orientation: Orientation,
        k: Range<usize>,
        n: Range<usize>,
        dst: &mut [u32],
    ) {
        let w = View::of(self.elements, self.columns);
        let b = match orientation {
            Orientation::Transposed => w.t(),
            Orientation::Plain => w,
        };
        pack_panel(kernel, b, k.start, k.len(), n.start, n.len(), dst);
    }

    /// Copies row `row` `[columns]` to `to` as f32.
    pub fn read_row(&self, row: usize, to: &mut [f32]) {
        let at = row * self.columns..(row + 1) * self.columns;
        match self.elements {
            Elements::F32(w) => to.copy_from_slice(&w[at]),
            Elements::Bf16(w) => to.iter_mut().zip(&w[at]).for_each(|(x, w)| *x = w.to_f32()),
        }
    }
}

/// Right operand B `[k, n]` of a GEMM.
#[derive(Clone, Copy, Debug)]
pub enum RightOperand<'a> {
    /// Plain values: activations, gradients or an adapter's matrices.
    Values(View<'a>),
    /// A weight, which knows how to pack its elements.
    Weight(WeightView<'a>, Orientation),
}

impl<'a> From<View<'a>> for RightOperand<'a> {
    fn from(view: View<'a>) -> Self {
        RightOperand::Values(view)
    }
}

impl RightOperand<'_> {
    /// Returns true if every element of a `k × n` matrix is inside the operand.
    pub(super) fn covers(&self, k: usize, n: usize) -> bool {
        match self {
            RightOperand::Values(view) => view.covers(k, n),
            RightOperand::Weight(w, Orientation::Transposed) => {
                k == 0 || n == 0 || (k <= w.columns && n <= w.rows())
            }
            RightOperand::Weight(w, Orientation::Plain) => {
                k == 0 || n == 0 || (k <= w.rows() && n <= w.columns)
            }
        }
    }

    /// Returns true if the rows of B are contiguous, so that a few of them can be read at a time.
    pub(super) fn has_contiguous_rows(&self) -> bool {
        match self {
            RightOperand::Values(view) => view.col_stride == 1,
            RightOperand::Weight(w, Orientation::Transposed) => w.columns == 1,
            RightOperand::Weight(_, Orientation::Plain) => true,
        }
    }

    /// Packs rows `k` and columns `n` into a panel, as [`WeightView::pack`] does.
    pub(super) fn pack(&self, kernel: Kernel, k: Range<usize>, n: Range<usize>, dst: &mut [u32]) {
        match self {
            RightOperand::Values(view) => {
                pack_panel(kernel, *view, k.start, k.len(), n.start, n.len(), dst)
            }
            RightOperand::Weight(w, orientation) => w.pack(kernel, *orientation, k, n, dst),
        }
    }
}
