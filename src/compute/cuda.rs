//! NVIDIA GPU: driver access, device memory, GEMM by cuBLAS and the kernels of `kernels/*.cu`.
#![cfg(feature = "cuda")]

mod arena;
pub mod gpu;
pub mod kernels;
pub mod ops;
mod staging;
