//! Memory, threads and numerical kernels of the CPU and the GPU. Kernels work on slices and on
//! device memory; they know nothing about a model's parameters.

pub mod cpu;
pub(crate) mod cuda;
mod free_list;
pub mod layout;
pub mod out_of_memory;
