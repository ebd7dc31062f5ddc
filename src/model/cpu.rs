//! Passes on this machine's cores, with the kernels of [`crate::compute::cpu`].

mod backend;
mod block;
mod projections;
mod row;
pub mod sizes;

pub use self::backend::CpuBackend;
pub use self::row::CpuRow;
