//! The decoder's numerical kernels on the CPU: plain functions over slices, each with its backward
//! pass written by hand.
//!
//! Legend: T tokens of the packed row, C hidden size, H query heads, K key/value heads, D head
//! dimension, F feed-forward size, V vocabulary size, r LoRA rank. Activations are row-major `[T,
//! features]`, f32. GEMMs run in f32, or in bf16 with f32 accumulation ([`gemm::Kernel`]);
//! everything else is f32, except a [`swiglu::GateUpTape::Bf16`] and its gradient. No result
//! depends on the number of threads. No token's result depends on what else is packed into its row.

pub mod attention;
pub mod buffer;
pub mod gemm;
pub mod head;
pub mod rms_norm;
pub mod rope;
pub mod simd;
pub mod swiglu;
pub mod thread_pool;

#[cfg(test)]
mod tests;

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};

use self::gemm::Elements;

/// Read guard over a tensor's elements. Holds the tensor's read lock until it is dropped.
pub struct TensorRead<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: Range<usize>,
}

impl<'a> TensorRead<'a> {
    /// Locks a contiguous f32 or bf16 tensor on the CPU for reading.
    ///
    /// # Errors
    ///
    /// Fails if the tensor is not contiguous, not f32 or bf16, or not on the CPU.
    pub fn of(t: &'a Tensor) -> Result<Self> {
        let (storage, layout) = t.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("a weight must be contiguous, its layout is {layout:?}")
        };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_) | CpuStorage::BF16(_)) => Ok(TensorRead {
                storage: Box::new(storage),
                range: start..end,
            }),
            Storage::Cpu(_) => bail!("a weight must be f32 or bf16"),
            _ => bail!("a weight must be in CPU memory"),
        }
    }

    /// Returns the elements in their stored type.
    pub fn elements(&self) -> Elements<'_> {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(v)) => Elements::F32(&v[self.range.clone()]),
            Storage::Cpu(CpuStorage::BF16(v)) => Elements::Bf16(&v[self.range.clone()]),
            _ => Elements::F32(&[]),
        }
    }

    /// Returns the elements of an f32 tensor.
    ///
    /// # Errors
    ///
    /// Fails if the tensor is bf16.
    pub fn f32(&self) -> Result<&[f32]> {
        match self.elements() {
            Elements::F32(v) => Ok(v),
            Elements::Bf16(_) => bail!("this tensor must be f32, but it is bf16"),
        }
    }
}

/// Calls `f` with the values of a contiguous f32 tensor and returns its result.
pub(crate) fn with_values<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    Ok(f(TensorRead::of(t)?.f32()?))
}
