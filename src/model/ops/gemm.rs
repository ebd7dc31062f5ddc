//! Matrix products over strided f32 views, through the `gemm` crate.

/// Whether a product may use every core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The caller is itself one of many parallel tasks.
    One,
    /// The rayon pool. The result does not depend on the number of threads: the summed dimension is never split.
    All,
}

/// A read-only strided view of an `m × n` matrix.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major with `cols` columns.
    pub(crate) fn rows(data: &'a [f32], cols: usize) -> Self {
        View { data, row_stride: cols, col_stride: 1 }
    }

    /// The transpose, without a copy.
    pub(crate) fn t(self) -> Self {
        View { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    fn covers(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.data.len()
    }
}

/// `dst = keep·dst + scale·(lhs · rhs)` with `dst` row-major `[m, n]`, `lhs` `[m, k]`, `rhs` `[k, n]`; `keep` is 0 or 1.
pub(crate) fn matmul(m: usize, k: usize, n: usize, dst: &mut [f32], keep: bool, scale: f32, lhs: View, rhs: View, threads: Threads) {
    assert!(dst.len() >= m * n && lhs.covers(m, k) && rhs.covers(k, n), "matmul: a view is smaller than {m}x{k}x{n}");
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: the assertion above bounds every address that strides and sizes can form, and `dst` is borrowed exclusively.
    unsafe {
        matmul_raw(
            (m, k, n),
            dst.as_mut_ptr(),
            n,
            keep,
            scale,
            (lhs.data.as_ptr(), lhs.row_stride, lhs.col_stride),
            (rhs.data.as_ptr(), rhs.row_stride, rhs.col_stride),
            threads,
        );
    }
}

/// [`matmul`] on raw views `(pointer, row stride, column stride)`, for kernels whose outputs interleave.
///
/// # Safety
/// Every element that `(m, k, n)` and the strides reach must be valid, and nothing else may touch the `dst` elements meanwhile.
pub(crate) unsafe fn matmul_raw(
    (m, k, n): (usize, usize, usize),
    dst: *mut f32,
    dst_row_stride: usize,
    keep: bool,
    scale: f32,
    lhs: (*const f32, usize, usize),
    rhs: (*const f32, usize, usize),
    threads: Threads,
) {
    let parallelism = match threads {
        Threads::One => ::gemm::Parallelism::None,
        Threads::All => ::gemm::Parallelism::Rayon(0),
    };
    // SAFETY: the caller vouches for the views; the crate reads and writes only the elements they describe.
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            dst,
            1,
            dst_row_stride as isize,
            keep,
            lhs.0,
            lhs.2 as isize,
            lhs.1 as isize,
            rhs.0,
            rhs.2 as isize,
            rhs.1 as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
