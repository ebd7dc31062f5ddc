//! GEMM: C = Σ_t A_t·B_t, or C += Σ_t A_t·B_t, with packed panels, for f32 and for bf16
//! operands with f32 accumulation.
//!
//! B, usually a weight ([`WeightView`]), is packed into panels of [`NR`] columns on the fly, one
//! block at a time. One row-major copy of a weight therefore serves the forward x·Wᵀ and the
//! backward g·W. A is read in place (f32, unless it is transposed or scaled) or rounded row by row
//! (bf16). The order of the sum over k depends on k only: **a row of C is the same bit for bit,
//! whatever other rows are computed with it and however many threads take part**.

mod amx;
mod kernel;
mod operand;
mod pack;
mod panel;
mod product;
#[cfg(test)]
mod tests;
mod tiles;
mod view;
mod weight;

pub use self::kernel::Kernel;
pub(crate) use self::kernel::panel_product;
pub use self::operand::Operand;
pub(crate) use self::pack::{pack_panel, round};
pub use self::panel::NR;
pub(crate) use self::panel::{OutputTile, Product};
pub(crate) use self::product::Shared;
pub use self::product::{Term, Threads, matmul, packed_bytes};
pub use self::tiles::{TiledOperand, matmul_tiles};
pub use self::view::{Elements, View};
pub use self::weight::{Orientation, RightOperand, WeightView};
