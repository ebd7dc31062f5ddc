//! Passes on this machine's cores, with the kernels of [`super::ops`].

mod backend;
mod block;
mod row;
pub mod sizes;

pub use self::backend::CpuBackend;
pub use self::row::CpuRow;
