//! Operands and output of the inner kernels: a panel of B, rows of A and a tile of C.
//!
//! A unit is 4 bytes: one f32, or the bf16 of two neighbouring k. Depth is the extent along k, in
//! units.

/// Number of columns in a panel of B.
pub const NR: usize = 32;
/// Number of readable rows that must follow the last row of A for bf16 kernels, so that the AMX
/// kernel needs no edge case. A for f32 kernels may be borrowed and has no such rows.
pub(crate) const ROW_PADDING: usize = 16;

/// Rows of A and the packed panel of B that they are multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    /// First unit of the first row of A.
    pub a: *const u32,
    /// Units between the starts of consecutive rows of A.
    pub stride: usize,
    /// Packed panel of B, `[depth, NR]` units.
    pub b: *const u32,
    /// Depth in units.
    pub depth: usize,
}

/// The part of C that a kernel writes.
#[derive(Clone, Copy)]
pub(crate) struct OutputTile {
    /// First element of the first row.
    pub c: *mut f32,
    /// Elements between the starts of consecutive rows.
    pub stride: usize,
    /// Columns to write, at most [`NR`].
    pub columns: usize,
    /// Adds the products to the values of C if true, overwrites C if false.
    pub accumulate: bool,
}

impl Product {
    pub const EMPTY: Product = Product {
        a: std::ptr::null(),
        stride: 0,
        b: std::ptr::null(),
        depth: 0,
    };
}
