//! Data rows, packing, the scorer and the trainer: synchronous, no tokio.

pub mod backprop;
pub mod checkpoint;
pub mod encode;
pub mod estimate;
pub mod event;
pub mod host;
mod micro_batch;
mod observe;
pub mod optimizer;
pub mod pack;
pub mod pair;
mod parallel;
pub mod reference;
pub mod reference_cache;
pub mod rows;
pub mod scorer;
pub mod trainable;
pub mod trainer;
pub mod validate;
