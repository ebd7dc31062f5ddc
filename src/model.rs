//! The model layer: configuration, parameters, and the forward and backward passes. One description
//! of the model serves every device.

pub mod adapter;
pub mod backend;
pub mod block;
pub mod block_shape;
pub mod config;
pub mod cpu;
// Without the feature `cuda`, `absent.rs` takes its place: its types cannot be constructed.
#[cfg_attr(not(feature = "cuda"), path = "model/cuda/absent.rs")]
pub mod cuda;
pub mod decoder;
pub mod device;
pub mod error;
pub mod families;
pub mod gradients;
pub mod guard;
mod multimodal;
pub mod parameters;
pub mod params;
pub mod pass;
pub mod rope;
pub mod row;
pub mod spec;
pub mod weight_matrix;
