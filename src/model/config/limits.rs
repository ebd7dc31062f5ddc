//! Upper limits of the sizes in a configuration. A file with larger values is rejected as invalid,
//! so that sizes computed from the configuration cannot overflow.

pub const LAYERS: usize = 4096;
pub const HEADS: usize = 4096;
pub const HEAD_DIM: usize = 4096;
pub const WIDTH: usize = 1 << 20;
pub const VOCAB: usize = 1 << 24;
pub const POSITIONS: usize = 1 << 31;
