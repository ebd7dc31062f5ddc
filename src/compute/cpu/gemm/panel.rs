//! A panel of B, and the rows of A that a kernel multiplies with it.

/// Columns of a panel of B.
pub const NR: usize = 32;
/// Rows that a kernel may read past the last one of A, so that tiles need no edge case.
pub(crate) const ROW_PADDING: usize = 16;

/// Rows of A, from some point on, and the panel they are multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    /// First unit of the first row.
    pub a: *const u32,
    /// Units between rows.
    pub stride: usize,
    /// `[depth][NR]`.
    pub b: *const u32,
    /// Units.
    pub depth: usize,
}

/// The part of C that a kernel writes.
#[derive(Clone, Copy)]
pub(crate) struct OutputTile {
    /// The first element of the first row.
    pub c: *mut f32,
    /// Elements between rows.
    pub stride: usize,
    /// Columns to write, at most [`NR`].
    pub columns: usize,
    /// Adds the products to the values of C if true, overwrites C if false.
    pub accumulate: bool,
}

impl Product {
    pub const EMPTY: Product =
        Product { a: std::ptr::null(), stride: 0, b: std::ptr::null(), depth: 0 };
}
