//! Which attention kernel runs: on tensor cores where it is made for the head's width, else the generic one.

use std::sync::Arc;

use candle_core::Result;

use super::gpu::{Gpu, Memory};
use super::kernels::{Arg, Kind, Launch};
use crate::model::ops::attention::Heads;

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

/// Name and shared memory of the tensor-core kernel, where there is one.
fn made_for(kind: Kind, dim: usize, pass: Pass) -> Option<(&'static str, usize)> {
    let found = MMA.iter().find(|(p, d, ..)| kind == Kind::Bf16 && *p == pass && *d == dim);
    found.map(|(.., name, shared)| (*name, *shared))
}

/// Starts the kernel of a pass over `tiles × heads` blocks; on tensor cores, all heads of a tile before the next tile.
pub(super) fn launch(gpu: &Gpu, kind: Kind, dim: usize, pass: Pass, [tiles, heads]: [usize; 2], args: &[Arg]) -> Result<()> {
    if let Some((name, shared)) = made_for(kind, dim, pass) {
        return gpu.launch(name, None, Launch::grid([heads, tiles], THREADS).shared(shared), args);
    }
    let launch = Launch::grid([tiles, heads], THREADS);
    let name = match pass {
        Pass::Forward => "attention",
        Pass::Queries => "attention_dq",
        Pass::Keys => "attention_dkv",
    };
    gpu.launch(name, Some(kind), launch, args)
}

/// Starts [`Pass::Keys`]. On tensor cores a block does one query head, or there would be fewer blocks than a GPU runs at one time; the parts of the
/// heads that share keys and values are added up afterwards.
pub(super) fn launch_keys(
    gpu: &Arc<Gpu>,
    kind: Kind,
    heads: Heads,
    [tokens, tiles]: [usize; 2],
    dqkv: &Memory,
    mut args: Vec<Arg>,
) -> Result<()> {
    if made_for(kind, heads.dim, Pass::Keys).is_none() {
        return launch(gpu, kind, heads.dim, Pass::Keys, [tiles, heads.key], &args);
    }
    let shared = heads.query != heads.key;
    let parts = shared.then(|| gpu.dirty(Kind::F32, 2 * tokens * heads.width())).transpose()?;
    args.push(parts.as_ref().map_or(Arg::Pointer(0), Arg::from));
    launch(gpu, kind, heads.dim, Pass::Keys, [tiles, heads.query], &args)?;
    let Some(parts) = &parts else { return Ok(()) };
    let args = [dqkv.into(), parts.into(), heads.query.into(), heads.key.into(), heads.dim.into()];
    gpu.launch("attention_sum", None, Launch::blocks(tokens), &args)
}
