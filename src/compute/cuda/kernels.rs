//! The kernels of `kernels/*.cu` by name, as PTX that the driver compiles for its GPU, and how they
//! are started.

use std::ffi::CString;

use candle_core::Result;
use cudarc::cublas::sys::cudaDataType;

use crate::domain::training::Precision;

/// Made by build.rs.
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// What an element is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 32-bit; integers too.
    F32,
    /// 16-bit.
    Bf16,
}

impl Kind {
    /// Of weights and activations.
    pub fn of(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Kind::F32,
            Precision::Bf16 => Kind::Bf16,
        }
    }

    /// Of an element.
    pub fn bytes(self) -> usize {
        match self {
            Kind::F32 => 4,
            Kind::Bf16 => 2,
        }
    }

    pub(super) fn suffix(self) -> &'static str {
        match self {
            Kind::F32 => "f32",
            Kind::Bf16 => "bf16",
        }
    }

    pub(super) fn cuda_type(self) -> cudaDataType {
        match self {
            Kind::F32 => cudaDataType::CUDA_R_32F,
            Kind::Bf16 => cudaDataType::CUDA_R_16BF,
        }
    }
}

/// A kernel's argument.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A pointer; null is an absent one.
    Pointer(u64),
    /// An int.
    Int(i32),
    /// A long long.
    Long(i64),
    /// A float.
    Float(f32),
}

impl Arg {
    /// In the lowest bytes.
    pub(super) fn bits(self) -> u64 {
        match self {
            Arg::Pointer(p) => p,
            Arg::Int(i) => i as u32 as u64,
            Arg::Long(l) => l as u64,
            Arg::Float(f) => f.to_bits() as u64,
        }
    }
}

impl From<usize> for Arg {
    fn from(n: usize) -> Self {
        Arg::Int(n as i32)
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Self {
        Arg::Float(x)
    }
}

impl From<bool> for Arg {
    fn from(b: bool) -> Self {
        Arg::Int(b.into())
    }
}

/// Blocks, threads of a block, bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub(super) grid: [u32; 3],
    pub(super) threads: (u32, u32),
    pub(super) shared: u32,
}

/// Threads of most kernels' blocks.
const THREADS: usize = 256;
/// Blocks of a grid-stride loop: enough for every multiprocessor.
const STRIDED_BLOCKS: usize = 2048;

impl Launch {
    /// Blocks of 256 threads.
    pub fn blocks(n: usize) -> Self {
        Launch::grid([n, 1], THREADS)
    }

    /// `x × y` blocks of so many threads.
    pub fn grid([x, y]: [usize; 2], threads: usize) -> Self {
        Launch { grid: [x as u32, y as u32, 1], threads: (threads as u32, 1), shared: 0 }
    }

    /// Blocks that walk over `n` elements together.
    pub fn strided(n: usize) -> Self {
        Launch::blocks(n.div_ceil(THREADS).min(STRIDED_BLOCKS))
    }

    /// 32 columns a block.
    pub fn columns(n: usize) -> Self {
        Launch { threads: (32, 8), ..Launch::blocks(n.div_ceil(32)) }
    }

    /// With dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Launch { shared: bytes as u32, ..self }
    }
}

/// Kernels for both kinds of elements.
const GENERIC: &[&str] = &[
    "embed",
    "rope",
    "swiglu",
    "swiglu_backward",
    "geglu",
    "geglu_backward",
    "add_bias",
    "column_sum",
    "scale_rows",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_weight",
    "head_norm",
    "head_norm_backward",
    "head_tile",
    "head_finish",
    "head_errors",
    "attention",
    "attention_delta",
    "attention_dq",
    "attention_dkv",
];
/// Kernels whose elements are always of the same kinds.
const PLAIN: [&str; 6] =
    ["gather_rows", "scatter_rows", "head_start", "head_rescale", "cast_bf16", "attention_sum"];

/// Part of attention that a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttentionPass {
    Forward,
    /// Gradients of queries.
    Queries,
    /// Gradients of keys and values.
    Keys,
}

/// Kernels on tensor cores: pass, head width, name, bytes of dynamic shared memory.
const TENSOR_CORE: [(AttentionPass, usize, &str, usize); 6] = [
    (AttentionPass::Forward, 64, "attention_mma_64", 32 << 10),
    (AttentionPass::Forward, 128, "attention_mma_128", 64 << 10),
    (AttentionPass::Queries, 64, "attention_dq_mma_64", 40 << 10),
    (AttentionPass::Queries, 128, "attention_dq_mma_128", 80 << 10),
    (AttentionPass::Keys, 64, "attention_dkv_mma_64", 40 << 10),
    (AttentionPass::Keys, 128, "attention_dkv_mma_128", 80 << 10),
];

/// Returns name and shared memory of the tensor-core kernel for these heads, where there is one.
pub(super) fn tensor_core_kernel(
    kind: Kind,
    dim: usize,
    pass: AttentionPass,
) -> Option<(&'static str, usize)> {
    let found = TENSOR_CORE.iter().find(|(p, d, ..)| kind == Kind::Bf16 && *p == pass && *d == dim);
    found.map(|(.., name, shared)| (*name, *shared))
}

/// Every kernel's name, its kinds and the dynamic shared memory that it asks for.
pub(super) fn all() -> impl Iterator<Item = (&'static str, Option<Kind>, usize)> {
    let generic =
        GENERIC.iter().flat_map(|&name| [Kind::F32, Kind::Bf16].map(|kind| (name, Some(kind), 0)));
    let tensor_core = TENSOR_CORE.into_iter().map(|(.., name, shared)| (name, None, shared));
    generic.chain(PLAIN.into_iter().map(|name| (name, None, 0))).chain(tensor_core)
}

/// The PTX.
pub(super) fn image() -> Result<CString> {
    CString::new(PTX).map_err(candle_core::Error::wrap)
}
