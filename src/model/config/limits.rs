//! Above these a header is taken for garbage: no allocation or product over configured sizes can
//! overflow.

pub const LAYERS: usize = 4096;
pub const HEADS: usize = 4096;
pub const HEAD_DIM: usize = 4096;
pub const WIDTH: usize = 1 << 20;
pub const VOCAB: usize = 1 << 24;
pub const POSITIONS: usize = 1 << 31;
