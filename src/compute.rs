//! Memory, threads and kernels of the devices. Kernels work on slices and on device memory; they
//! know nothing of a model's parameters.

pub mod cpu;
pub(crate) mod cuda;
mod free_list;
pub mod layout;
pub mod out_of_memory;
