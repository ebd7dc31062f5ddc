//! Model configuration, the decoder, its ops, tokenisation, chat templates, weight loading and adapters.

pub mod adapter;
pub mod backend;
pub mod block;
pub mod block_shape;
pub mod chat;
pub mod config;
pub mod cpu;
// Without the feature, the types of `cuda` have no values.
#[cfg_attr(not(feature = "cuda"), path = "cuda/absent.rs")]
pub mod cuda;
pub mod decoder;
pub mod device;
pub mod error;
pub mod export;
pub mod families;
mod gguf;
pub mod gradients;
pub mod guard;
pub mod layout;
pub mod loader;
pub mod ops;
pub mod parameters;
pub mod params;
pub mod pass;
pub mod peft;
mod projections;
mod ranges;
pub mod rope;
pub mod row;
pub mod source;
pub mod spec;
pub mod tokenizer;
pub mod weight_matrix;
pub mod weights;
