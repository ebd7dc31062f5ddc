//! The decoder's differentiable operations, each a candle custom op with a hand-written backward pass.
//!
//! Legend: T tokens of the packed row, C hidden size, H query heads, K key/value heads, D head dimension, F feed-forward size, V vocabulary,
//! r LoRA rank. Activations are row-major `[T, features]`, f32, contiguous. Gradients are formed only for arguments that are tracked.
//!
//! The CPU side is here; on another device candle reports `no cuda implementation for OP`, which is what a build without kernels should say.

pub mod attention;
pub mod gemm;
pub mod linear;
pub mod log_prob;
pub mod rms_norm;
pub mod rope;
pub mod seed;
pub mod simd;
pub mod swiglu;

#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, Tensor, bail};

/// The contiguous f32 slice behind an op's argument.
pub(crate) fn slice<'a>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(v), Some((start, end))) => Ok(&v[start..end]),
        (CpuStorage::F32(_), None) => bail!("{op}: the argument must be contiguous, its layout is {layout:?}"),
        _ => bail!("{op}: the argument must be f32"),
    }
}

/// Runs `f` on a tensor's values; copies only when the tensor is strided.
pub(crate) fn with_values<R>(op: &str, t: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => Ok(f(slice(op, cpu, layout)?)),
        _ => bail!("{op}: unimplemented on this device"),
    }
}

/// A CPU tensor over `values`.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}
