//! Matrix products: C = Σ_t A_t·B_t, or C += Σ_t A_t·B_t, packed, for f32 and for bf16 operands
//! with f32 accumulation.
//!
//! B (the weights, mostly: [`WeightView`]) is packed into panels of [`NR`] columns on the way, a
//! block at a time, so that one row-major copy of a weight serves the forward product x·Wᵀ and the
//! backward product g·W. A is used as it lies (f32) or rounded row by row (bf16). The sum over k
//! runs in one order that depends on nothing but k: **a row of C is the same bit for bit whatever
//! other rows are computed with it, and on however many threads**.

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
pub(crate) use self::pack::pack_panel;
pub use self::panel::NR;
pub(crate) use self::panel::{OutputTile, Product};
pub(crate) use self::product::Shared;
pub use self::product::{Term, Threads, matmul, packed_bytes};
pub use self::tiles::{TiledOperand, matmul_tiles};
pub use self::view::{Elements, View};
pub use self::weight::{Orientation, RightOperand, WeightView};
