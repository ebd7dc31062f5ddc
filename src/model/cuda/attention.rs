//! Which attention kernel runs: on tensor cores where it is made for the head's width, else the generic one.

use candle_core::Result;

use super::gpu::Gpu;
use super::kernels::{Arg, Kind, Launch};

/// Threads of a block.
const THREADS: usize = 128;

/// A kernel's part of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    /// Gradients of queries.
    Queries,
    /// Gradients of keys and values.
    Keys,
}

/// Tensor-core kernels: pass, head width, name, bytes of shared memory.
pub(super) const MMA: [(Pass, usize, &str, usize); 6] = [
    (Pass::Forward, 64, "attention_mma_64", 32 << 10),
    (Pass::Forward, 128, "attention_mma_128", 64 << 10),
    (Pass::Queries, 64, "attention_dq_mma_64", 40 << 10),
    (Pass::Queries, 128, "attention_dq_mma_128", 80 << 10),
    (Pass::Keys, 64, "attention_dkv_mma_64", 40 << 10),
    (Pass::Keys, 128, "attention_dkv_mma_128", 80 << 10),
];

/// Starts the kernel of a pass over `tiles × heads` blocks.
pub(super) fn launch(gpu: &Gpu, kind: Kind, dim: usize, pass: Pass, grid: [usize; 2], args: &[Arg]) -> Result<()> {
    let launch = Launch::grid(grid, THREADS);
    let made_for = MMA.iter().find(|(p, d, ..)| kind == Kind::Bf16 && *p == pass && *d == dim);
    if let Some((.., name, shared)) = made_for {
        return gpu.launch(name, None, launch.shared(*shared), args);
    }
    let name = match pass {
        Pass::Forward => "attention",
        Pass::Queries => "attention_dq",
        Pass::Keys => "attention_dkv",
    };
    gpu.launch(name, Some(kind), launch, args)
}
