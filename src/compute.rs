//! What a device does for a model, and nothing of what a model is: memory, threads, and kernels
//! over slices and device memory.

pub mod cpu;
pub(crate) mod cuda;
mod free_list;
pub mod layout;
pub mod out_of_memory;
