//! An NVIDIA GPU: its driver and memory, products by cuBLAS, and the kernels of `kernels/*.cu`.
#![cfg(feature = "cuda")]

mod arena;
pub mod gpu;
pub mod kernels;
pub mod ops;
mod staging;
