//! Data rows, packing, the scorer and the trainer: synchronous, no tokio.

pub mod pair;
