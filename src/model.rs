//! What a model is: its configuration and parameters, and its passes, the same for every device.

pub mod adapter;
pub mod backend;
pub mod block;
pub mod block_shape;
pub mod config;
pub mod cpu;
// Without the feature, the types of `cuda` have no values.
#[cfg_attr(not(feature = "cuda"), path = "model/cuda/absent.rs")]
pub mod cuda;
pub mod decoder;
pub mod device;
pub mod error;
pub mod families;
pub mod gradients;
pub mod guard;
pub mod parameters;
pub mod params;
pub mod pass;
pub mod rope;
pub mod row;
pub mod spec;
pub mod weight_matrix;
