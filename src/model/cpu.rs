//! The decoder's passes on the CPU, with the kernels of [`crate::compute::cpu`].

mod backend;
mod block;
mod projections;
mod row;
pub mod sizes;

pub use self::backend::CpuBackend;
pub use self::row::CpuRow;
