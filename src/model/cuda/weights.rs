//! Weights on the device: matrices in the pass's precision, projections of one input stacked, norms and biases in f32. Copies are made when a policy
//! is first used and kept while its weights live on the host.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::{Result, Tensor};

use super::gpu::{Gpu, Memory};
use super::kernels::Kind;
use crate::model::adapter::{Adapter, LowRank};
use crate::model::ops::Held;
use crate::model::ops::gemm::Elements;
use crate::model::parameters::{Parameters, Projection, projection};

/// Projections that share their input: `[q | k | v]`, `o`, `[gate | up]`, `down`.
pub(super) const GROUPS: [&[usize]; 4] =
    [&[projection::Q, projection::K, projection::V], &[projection::O], &[projection::GATE, projection::UP], &[projection::DOWN]];

/// One of a group.
pub(super) struct Member {
    /// Which projection of the block.
    pub index: usize,
    pub out: usize,
    /// Its first row in the stacked weight, its first column in the joint output.
    pub column: usize,
    pub bias: Option<Memory>,
}

/// The weights of a group.
pub(super) struct GroupWeights {
    /// `[Σout, in]`.
    pub weight: Memory,
    pub members: Vec<Member>,
    pub input: usize,
    pub output: usize,
}

/// A block's.
pub(super) struct BlockWeights {
    pub input_norm: Memory,
    pub post_norm: Memory,
    pub qk_norm: Option<(Memory, Memory)>,
    pub groups: [GroupWeights; 4],
}

/// All of a decoder's.
pub(super) struct DeviceWeights {
    pub embed: Memory,
    pub blocks: Vec<BlockWeights>,
    pub norm: Memory,
    head: Option<Memory>,
}

impl DeviceWeights {
    fn upload(gpu: &Arc<Gpu>, kind: Kind, p: &Parameters) -> Result<Self> {
        let block = |b: &crate::model::parameters::Block| {
            let group = |indices: &[usize]| GroupWeights::upload(gpu, kind, &b.projections, indices);
            Ok::<_, candle_core::Error>(BlockWeights {
                input_norm: tensor(gpu, Kind::F32, &b.input_norm)?,
                post_norm: tensor(gpu, Kind::F32, &b.post_norm)?,
                qk_norm: match &b.qk_norm {
                    Some((q, k)) => Some((tensor(gpu, Kind::F32, q)?, tensor(gpu, Kind::F32, k)?)),
                    None => None,
                },
                groups: [group(GROUPS[0])?, group(GROUPS[1])?, group(GROUPS[2])?, group(GROUPS[3])?],
            })
        };
        Ok(DeviceWeights {
            embed: tensor(gpu, kind, &p.embed)?,
            blocks: p.blocks.iter().map(block).collect::<Result<_>>()?,
            norm: tensor(gpu, Kind::F32, &p.norm)?,
            head: p.head.as_ref().map(|t| tensor(gpu, kind, t)).transpose()?,
        })
    }

    /// `[V, C]`.
    pub fn head(&self) -> &Memory {
        self.head.as_ref().unwrap_or(&self.embed)
    }
}

impl GroupWeights {
    fn upload(gpu: &Arc<Gpu>, kind: Kind, projections: &[Projection], indices: &[usize]) -> Result<Self> {
        let (mut members, mut output, mut input) = (Vec::new(), 0, 0);
        for &index in indices {
            let p = &projections[index];
            let (out, width) = p.weight.dims2()?;
            let bias = p.bias.as_ref().map(|b| tensor(gpu, Kind::F32, b)).transpose()?;
            members.push(Member { index, out, column: output, bias });
            (output, input) = (output + out, width);
        }
        let weight = stack(gpu, kind, indices.iter().map(|i| &projections[*i].weight))?;
        Ok(GroupWeights { weight, members, input, output })
    }
}

/// An adapter's part of a group.
pub(super) struct GroupAdapter {
    /// All A, one above the other, `[Σr, in]`.
    pub a: Memory,
    /// Per member: B `[out, r]`, r, the first column among the ranks.
    pub b: Vec<Option<(Memory, usize, usize)>>,
    pub ranks: usize,
}

/// An adapter.
pub(super) struct DeviceAdapter {
    pub scale: f32,
    pub blocks: Vec<[GroupAdapter; 4]>,
}

impl DeviceAdapter {
    fn upload(gpu: &Arc<Gpu>, kind: Kind, adapter: &Adapter) -> Result<Self> {
        let block = |block: &Vec<Option<LowRank>>| {
            let group = |indices: &[usize]| GroupAdapter::upload(gpu, kind, block, indices);
            Ok([group(GROUPS[0])?, group(GROUPS[1])?, group(GROUPS[2])?, group(GROUPS[3])?])
        };
        Ok(DeviceAdapter { scale: adapter.config.scale() as f32, blocks: adapter.blocks.iter().map(block).collect::<Result<_>>()? })
    }
}

impl GroupAdapter {
    fn upload(gpu: &Arc<Gpu>, kind: Kind, block: &[Option<LowRank>], indices: &[usize]) -> Result<Self> {
        let (mut b, mut ranks) = (Vec::new(), 0);
        for &i in indices {
            b.push(match &block[i] {
                Some(low_rank) => {
                    let rank = low_rank.a.dim(0)?;
                    ranks += rank;
                    Some((tensor(gpu, kind, &low_rank.b)?, rank, ranks - rank))
                }
                None => None,
            });
        }
        let a = stack(gpu, kind, indices.iter().filter_map(|i| block[*i].as_ref()).map(|l| &l.a))?;
        Ok(GroupAdapter { a, b, ranks })
    }
}

/// Tensors one after the other; what has the right elements goes to the device from where it is.
fn stack<'a>(gpu: &Arc<Gpu>, kind: Kind, tensors: impl Iterator<Item = &'a Tensor>) -> Result<Memory> {
    let tensors: Vec<Held> = tensors.map(Held::of).collect::<Result<_>>()?;
    let memory = gpu.dirty(kind, tensors.iter().map(|t| t.elements().len()).sum())?;
    let mut at = 0;
    for t in &tensors {
        match (kind, t.elements()) {
            (Kind::F32, Elements::F32(v)) => gpu.write(&memory, at, v)?,
            (Kind::F32, Elements::Bf16(v)) => gpu.write(&memory, at, &v.iter().map(|x| x.to_f32()).collect::<Vec<f32>>())?,
            (Kind::Bf16, Elements::F32(v)) => gpu.write(&memory, at, &v.iter().map(|x| half::bf16::from_f32(*x)).collect::<Vec<_>>())?,
            (Kind::Bf16, Elements::Bf16(v)) => gpu.write(&memory, at, v)?,
        }
        at += t.elements().len();
    }
    Ok(memory)
}

fn tensor(gpu: &Arc<Gpu>, kind: Kind, t: &Tensor) -> Result<Memory> {
    stack(gpu, kind, std::iter::once(t))
}

/// Device copies of what lives on the host.
pub(super) struct Copies<H, D> {
    all: Mutex<Vec<Entry<H, D>>>,
}

/// The original, what elements became, the copy.
type Entry<H, D> = (Weak<H>, Kind, Arc<D>);

impl<H, D> Default for Copies<H, D> {
    fn default() -> Self {
        Copies { all: Mutex::default() }
    }
}

impl<H, D> Copies<H, D> {
    /// The copy of `host`, made by `upload` unless there is one. Copies whose original is gone go too.
    fn get(&self, host: &Arc<H>, kind: Kind, upload: impl FnOnce() -> Result<D>) -> Result<Arc<D>> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(host, ..)| host.strong_count() > 0);
        // A weak reference keeps the address from being used again.
        let found = all.iter().find(|(h, k, _)| std::ptr::eq(h.as_ptr(), Arc::as_ptr(host)) && *k == kind);
        if let Some((.., device)) = found {
            return Ok(device.clone());
        }
        let device = Arc::new(upload()?);
        all.push((Arc::downgrade(host), kind, device.clone()));
        Ok(device)
    }

    /// Forgets copies whose originals are gone, and those in another precision than `kind`: a job's that has ended.
    pub fn sweep(&self, kind: Kind) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(host, k, _)| host.strong_count() > 0 && *k == kind);
    }

    /// Forgets the copies of `host`: it was changed in place.
    pub fn forget(&self, host: &Arc<H>) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(h, ..)| h.strong_count() > 0 && !std::ptr::eq(h.as_ptr(), Arc::as_ptr(host)));
    }
}

impl Copies<Parameters, DeviceWeights> {
    pub fn weights(&self, gpu: &Arc<Gpu>, kind: Kind, host: &Arc<Parameters>) -> Result<Arc<DeviceWeights>> {
        self.get(host, kind, || DeviceWeights::upload(gpu, kind, host))
    }
}

impl Copies<Adapter, DeviceAdapter> {
    pub fn adapter(&self, gpu: &Arc<Gpu>, kind: Kind, host: &Arc<Adapter>) -> Result<Arc<DeviceAdapter>> {
        self.get(host, kind, || DeviceAdapter::upload(gpu, kind, host))
    }
}
