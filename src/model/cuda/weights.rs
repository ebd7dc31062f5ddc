//! Copies of weights on the device. Matrices are in the pass's precision, norms and biases in f32.
//! The weights of linear layers with the same input are stacked to one matrix. A copy is made when
//! a policy is first used. After the weights on the host are gone, the next lookup or trim drops
//! it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::{Result, Tensor, bail};
use half::bf16;
use half::slice::HalfFloatSliceExt;

use crate::compute::cpu::TensorRead;
use crate::compute::cpu::gemm::Elements;
use crate::compute::cpu::thread_pool;
use crate::compute::cuda::gpu::{Gpu, Matrix, Memory};
use crate::compute::cuda::kernels::Kind;
use crate::model::adapter::Adapter;
use crate::model::parameters::Parameters;
use crate::model::params::{BlockParam, Linear, LinearGroup, ParamId, PerGroup};
use crate::model::weight_matrix::WeightRead;

/// Alignment of an adapter's matrices, in elements: cuBLAS is fastest on aligned matrices.
const ALIGNMENT_ELEMENTS: usize = 64;

/// A linear layer of a group.
pub(super) struct CudaLinear {
    /// The linear layer of the block.
    pub linear: Linear,
    pub out: usize,
    /// First row of the layer in the stacked weight and first column in the joint output.
    pub column: usize,
    pub bias: Option<Memory>,
}

/// The weights of a group of linear layers.
pub(super) struct GroupWeights {
    /// The stacked weights `[Σout, in]`.
    pub weight: Memory,
    pub members: Vec<CudaLinear>,
    pub input: usize,
    pub output: usize,
}

/// The weights of a block.
pub(super) struct BlockWeights {
    norms: HashMap<BlockParam, Memory>,
    pub groups: PerGroup<GroupWeights>,
}

impl BlockWeights {
    /// Returns the factors of a norm `[width]`.
    pub fn norm(&self, norm: BlockParam) -> Result<&Memory> {
        match self.norms.get(&norm) {
            Some(factors) => Ok(factors),
            None => bail!("the block has no {norm:?}"),
        }
    }
}

/// All weights of a decoder.
pub(super) struct DeviceWeights {
    pub embed: Memory,
    pub blocks: Vec<BlockWeights>,
    pub norm: Memory,
    head: Option<Memory>,
}

impl DeviceWeights {
    fn upload(gpu: &Arc<Gpu>, kind: Kind, p: &Parameters) -> Result<Self> {
        let factors = |id| gpu.upload(Kind::F32, p.norm(id)?.values()?);
        let block = |index| {
            let norm =
                |norm| Ok::<_, candle_core::Error>((norm, factors(ParamId::Block(index, norm))?));
            let group = |group: LinearGroup| GroupWeights::upload(gpu, kind, p, index, group);
            Ok::<_, candle_core::Error>(BlockWeights {
                norms: p.norms(index).map(norm).collect::<Result<_>>()?,
                groups: PerGroup::build(group)?,
            })
        };
        Ok(DeviceWeights {
            embed: upload_stacked(gpu, kind, &[p.matrix(ParamId::Embedding)?.read()?])?,
            blocks: (0..p.num_blocks()).map(block).collect::<Result<_>>()?,
            norm: factors(ParamId::Norm)?,
            head: match p.has(ParamId::Head) {
                true => Some(upload_stacked(
                    gpu,
                    kind,
                    &[p.matrix(ParamId::Head)?.read()?],
                )?),
                false => None,
            },
        })
    }

    /// Returns the head `[V, C]`.
    pub fn head(&self) -> &Memory {
        self.head.as_ref().unwrap_or(&self.embed)
    }
}

impl GroupWeights {
    fn upload(
        gpu: &Arc<Gpu>,
        kind: Kind,
        parameters: &Parameters,
        block: usize,
        group: LinearGroup,
    ) -> Result<Self> {
        let (mut members, mut weights, mut output, mut input) = (Vec::new(), Vec::new(), 0, 0);
        for &linear in group.members() {
            if !parameters.has(ParamId::Block(block, BlockParam::Weight(linear))) {
                continue;
            }
            let p = parameters.linear(block, linear)?;
            let (out, width) = (p.weight.rows(), p.weight.columns());
            let bias = p.bias.map(|b| upload_vector(gpu, b)).transpose()?;
            members.push(CudaLinear {
                linear,
                out,
                column: output,
                bias,
            });
            weights.push(p.weight.read()?);
            (output, input) = (output + out, width);
        }
        let weight = upload_stacked(gpu, kind, &weights)?;
        Ok(GroupWeights {
            weight,
            members,
            input,
            output,
        })
    }
}

/// The adapter of a group. Matrices are given by the offsets of their first elements in
/// [`BlockAdapter::matrices`].
pub(super) struct GroupAdapter {
    /// Offset of the stacked A of all members `[Σr, in]`.
    pub a: usize,
    /// For each member with an update: offset of B `[out, r]`, rank r, and the first column of the
    /// member in x·Aᵀ `[T, Σr]`.
    b: Vec<(Linear, (usize, usize, usize))>,
    pub ranks: usize,
}

impl GroupAdapter {
    /// Returns the entry of `b` of a member, or `None` if the member has no update.
    pub fn b(&self, member: Linear) -> Option<(usize, usize, usize)> {
        let mut entries = self.b.iter();
        entries
            .find(|(linear, _)| *linear == member)
            .map(|(_, b)| *b)
    }
}

/// The adapter of a block. Its matrices are in one buffer and are uploaded with one copy. Training
/// uploads them in every step, and starting a copy takes longer than transferring a small matrix.
pub(super) struct BlockAdapter {
    pub matrices: Memory,
    pub groups: PerGroup<GroupAdapter>,
}

/// The copy of an adapter.
pub(super) struct DeviceAdapter {
    pub scale: f32,
    pub blocks: Vec<BlockAdapter>,
}

impl DeviceAdapter {
    fn upload(gpu: &Arc<Gpu>, kind: Kind, adapter: &Adapter) -> Result<Self> {
        let gathered = thread_pool::map(adapter.num_blocks(), |block| {
            let mut pieces = Pieces::default();
            let groups = PerGroup::build(|group| pieces.group(adapter, block, group))?;
            Ok::<_, candle_core::Error>((pieces.gather(kind)?, groups))
        });
        let block = |gathered: Result<(Gathered, PerGroup<GroupAdapter>)>| {
            let (values, groups) = gathered?;
            let matrices = match values {
                Gathered::F32(v) => gpu.upload(kind, &v)?,
                Gathered::Bf16(v) => gpu.upload(kind, &v)?,
            };
            Ok(BlockAdapter { matrices, groups })
        };
        Ok(DeviceAdapter {
            scale: adapter.config.scale() as f32,
            blocks: gathered.into_iter().map(block).collect::<Result<_>>()?,
        })
    }
}

/// The adapter of a group with its matrices, as GEMMs read them.
#[derive(Clone, Copy)]
pub(super) struct LowRankGroup<'a> {
    pub matrices: &'a Memory,
    pub group: &'a GroupAdapter,
    pub scale: f32,
}

impl DeviceAdapter {
    /// Returns the adapter of a group of a block.
    pub fn group(&self, block: usize, which: LinearGroup) -> LowRankGroup<'_> {
        let block = &self.blocks[block];
        LowRankGroup {
            matrices: &block.matrices,
            group: block.groups.get(which),
            scale: self.scale,
        }
    }
}

impl LowRankGroup<'_> {
    /// Returns the stacked A `[Σr, in]`.
    pub fn a(&self, input: usize) -> Matrix {
        self.matrices.matrix_at(self.group.a, input)
    }
}

/// Layout of a block's adapter matrices in one buffer.
#[derive(Default)]
struct Pieces<'a> {
    /// Offset of each matrix, in elements.
    placed: Vec<(usize, &'a Tensor)>,
    /// Length of the buffer so far, in elements.
    len: usize,
}

/// The buffer on the host, before the upload.
enum Gathered {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl<'a> Pieces<'a> {
    /// Advances to the next aligned offset and returns it.
    fn align(&mut self) -> usize {
        self.len = self.len.next_multiple_of(ALIGNMENT_ELEMENTS);
        self.len
    }

    /// Appends a matrix to the layout.
    fn place(&mut self, t: &'a Tensor) {
        self.placed.push((self.len, t));
        self.len += t.elem_count();
    }

    /// Places the matrices of a group: first the A of all members, aligned and without gaps in
    /// between, so that they form one stacked matrix, then each B at an aligned offset.
    fn group(
        &mut self,
        adapter: &'a Adapter,
        block: usize,
        group: LinearGroup,
    ) -> Result<GroupAdapter> {
        let (a, mut b, mut ranks) = (self.align(), Vec::new(), 0);
        let members = group.members();
        members
            .iter()
            .filter_map(|linear| adapter.get(block, *linear))
            .for_each(|l| self.place(&l.a));
        for &linear in members {
            let Some(low_rank) = adapter.get(block, linear) else {
                continue;
            };
            let (rank, at) = (low_rank.a.dim(0)?, self.align());
            self.place(&low_rank.b);
            b.push((linear, (at, rank, ranks)));
            ranks += rank;
        }
        Ok(GroupAdapter { a, b, ranks })
    }

    /// Copies the matrices to one buffer, converted to the element type `kind`.
    fn gather(&self, kind: Kind) -> Result<Gathered> {
        let mut all = match kind {
            Kind::F32 => Gathered::F32(vec![0.0; self.len]),
            Kind::Bf16 => Gathered::Bf16(vec![bf16::ZERO; self.len]),
        };
        for (at, t) in &self.placed {
            let (values, range) = (TensorRead::of(t)?, *at..at + t.elem_count());
            match (&mut all, values.elements()) {
                (Gathered::F32(to), Elements::F32(v)) => to[range].copy_from_slice(v),
                (Gathered::F32(to), Elements::Bf16(v)) => v.convert_to_f32_slice(&mut to[range]),
                (Gathered::Bf16(to), Elements::F32(v)) => to[range].convert_from_f32_slice(v),
                (Gathered::Bf16(to), Elements::Bf16(v)) => to[range].copy_from_slice(v),
            }
        }
        Ok(all)
    }
}

/// Uploads matrices to one buffer, stacked. A matrix that already has the element type of `kind` is
/// copied directly from its storage.
fn upload_stacked(gpu: &Arc<Gpu>, kind: Kind, matrices: &[WeightRead]) -> Result<Memory> {
    let memory = gpu.uninit(
        kind,
        matrices.iter().map(|m| m.view().elements().len()).sum(),
    )?;
    let mut at = 0;
    for elements in matrices.iter().map(|m| m.view().elements()) {
        write_converted(gpu, kind, &memory, at, elements)?;
        at += elements.len();
    }
    Ok(memory)
}

/// Uploads a bias as f32.
fn upload_vector(gpu: &Arc<Gpu>, t: &Tensor) -> Result<Memory> {
    let values = TensorRead::of(t)?;
    let memory = gpu.uninit(Kind::F32, values.elements().len())?;
    write_converted(gpu, Kind::F32, &memory, 0, values.elements())?;
    Ok(memory)
}

/// Writes `elements` to `memory` from offset `at` on, converted to the element type `kind`.
fn write_converted(
    gpu: &Arc<Gpu>,
    kind: Kind,
    memory: &Memory,
    at: usize,
    elements: Elements,
) -> Result<()> {
    match (kind, elements) {
        (Kind::F32, Elements::F32(v)) => gpu.write(memory, at, v),
        (Kind::F32, Elements::Bf16(v)) => gpu.write(
            memory,
            at,
            &v.iter().map(|x| x.to_f32()).collect::<Vec<f32>>(),
        ),
        (Kind::Bf16, Elements::F32(v)) => gpu.write(
            memory,
            at,
            &v.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>(),
        ),
        (Kind::Bf16, Elements::Bf16(v)) => gpu.write(memory, at, v),
    }
}

/// Cache of device copies of host objects.
pub(super) struct Copies<H, D> {
    all: Mutex<Vec<CachedCopy<H, D>>>,
}

/// The host object, the element type of its matrices on the device, and the copy.
type CachedCopy<H, D> = (Weak<H>, Kind, Arc<D>);

impl<H, D> Default for Copies<H, D> {
    fn default() -> Self {
        Copies {
            all: Mutex::default(),
        }
    }
}

impl<H, D> Copies<H, D> {
    /// Returns the copy of `host`, and makes it with `upload` if there is none. Also drops the
    /// copies of host objects that no longer exist.
    fn get(&self, host: &Arc<H>, kind: Kind, upload: impl FnOnce() -> Result<D>) -> Result<Arc<D>> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(host, ..)| host.strong_count() > 0);
        // A weak reference prevents the reuse of the address, so equal pointers mean the same
        // object.
        let found = all
            .iter()
            .find(|(h, k, _)| std::ptr::eq(h.as_ptr(), Arc::as_ptr(host)) && *k == kind);
        if let Some((.., device)) = found {
            return Ok(device.clone());
        }
        let device = Arc::new(upload()?);
        all.push((Arc::downgrade(host), kind, device.clone()));
        Ok(device)
    }

    /// Drops the copies of host objects that no longer exist, and all copies whose precision is not
    /// `kind`. Called at the end of a run.
    pub fn retain_live_of_kind(&self, kind: Kind) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(host, k, _)| host.strong_count() > 0 && *k == kind);
    }

    /// Drops the copies of host objects that no longer exist.
    pub fn forget_dead(&self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(host, ..)| host.strong_count() > 0);
    }

    /// Drops the copies of `host`, because it was changed in place.
    pub fn forget(&self, host: &Arc<H>) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(h, ..)| h.strong_count() > 0 && !std::ptr::eq(h.as_ptr(), Arc::as_ptr(host)));
    }
}

impl Copies<Parameters, DeviceWeights> {
    pub fn weights(
        &self,
        gpu: &Arc<Gpu>,
        kind: Kind,
        host: &Arc<Parameters>,
    ) -> Result<Arc<DeviceWeights>> {
        self.get(host, kind, || DeviceWeights::upload(gpu, kind, host))
    }
}

impl Copies<Adapter, DeviceAdapter> {
    pub fn adapter(
        &self,
        gpu: &Arc<Gpu>,
        kind: Kind,
        host: &Arc<Adapter>,
    ) -> Result<Arc<DeviceAdapter>> {
        self.get(host, kind, || DeviceAdapter::upload(gpu, kind, host))
    }
}
