//! Data rows and the trainer: synchronous, no tokio.

pub mod backprop;
pub mod checkpoint;
pub mod estimate;
pub mod event;
pub mod logged;
mod micro_batch;
mod observe;
pub mod optimizer;
pub mod reference;
pub mod rows;
pub mod run_context;
pub mod trainable;
pub mod trainer;
pub mod validate;
