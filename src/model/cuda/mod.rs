//! The decoder's passes on an NVIDIA GPU: the same row in, the same numbers out as [`super::decoder`] gives on the CPU.
//!
//! Weights are copied to the device when they are first used; matrices and activations are in the pass's precision, the residual stream, sums, norms,
//! softmax, losses and gradients in f32. Masters and the optimizer stay on the host: gradients are fetched once a step, changed weights sent once.
//! Nothing waits for the device but the log-probs of a row. Products are cuBLAS's, everything else is `kernels/*.cu`.

mod attention;
mod block;
mod gpu;
mod gradients;
mod head;
mod kernels;
mod ops;
mod pool;
mod projections;
mod row;
pub mod sizes;
mod staging;
mod weights;

use std::sync::Arc;

use candle_core::{Result, bail};

use self::block::{Block, BlockTape, NormBackward};
pub use self::gpu::Gpu;
use self::gpu::Memory;
pub use self::gradients::GradientBuffers;
use self::head::Head;
use self::kernels::Kind;
use self::row::{DeviceRow, Scatter};
use self::sizes::BlockShape;
use self::weights::{Copies, DeviceAdapter, DeviceWeights};
use super::adapter::Adapter;
use super::decoder::{Keep, Policy, PreparedRow};
use super::ops::head::{HeadOptions, HeadOutput};
use super::parameters::Parameters;
use super::params::ParamId;
use crate::domain::training::Precision;

/// A GPU with the weights that are on it.
pub struct Cuda {
    gpu: Arc<Gpu>,
    weights: Copies<Parameters, DeviceWeights>,
    adapters: Copies<Adapter, DeviceAdapter>,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.gpu.fmt(f)
    }
}

/// A row after its forward pass, ready to go back.
pub struct DeviceTape {
    row: DeviceRow,
    blocks: Vec<Kept>,
    before_norm: Memory,
    normed: Memory,
    gradient: Option<Memory>,
    lse: Vec<f32>,
}

/// The widest attention head: a warp holds one in registers where queries and keys are normed and rotated (`MAX_DIM` in norm.cu).
const MAX_HEAD_DIM: usize = 256;

/// Windows from here on hide nothing: no row has as many positions. The kernels add positions to a window in 32 bits; it is their `NO_WINDOW`.
const NO_WINDOW: usize = 1 << 30;

enum Kept {
    Tape(Box<BlockTape>),
    Input(Memory),
}

/// A policy's weights on the device, and the shape of its passes.
struct Opened<'a> {
    gpu: &'a Arc<Gpu>,
    kind: Kind,
    policy: &'a Policy,
    weights: Arc<DeviceWeights>,
    adapter: Option<Arc<DeviceAdapter>>,
    parts: Vec<(std::ops::Range<usize>, Arc<DeviceAdapter>)>,
}

impl Opened<'_> {
    fn hidden(&self) -> usize {
        self.policy.config.spec.hidden_size
    }

    fn eps(&self) -> f32 {
        self.policy.config.spec.rms_norm_eps as f32
    }

    fn block<'b>(&'b self, index: usize, row: &'b DeviceRow) -> Block<'b> {
        let mut shape = BlockShape::of(self.hidden(), &self.policy.config.spec.blocks[index]);
        shape.heads.window = shape.heads.window.filter(|window| *window < NO_WINDOW);
        let (weights, adapter) = (&self.weights.blocks[index], self.adapter.as_deref());
        Block { gpu: self.gpu, kind: self.kind, index, shape, eps: self.eps(), weights, adapter, parts: &self.parts, row }
    }

    fn head(&self) -> Head<'_> {
        let (hidden, vocabulary) = (self.hidden(), self.policy.config.spec.vocab_size);
        Head { gpu: self.gpu, kind: self.kind, weight: self.weights.head(), hidden, vocabulary }
    }

    /// The embedded row `[T, C]`.
    fn embed(&self, row: &DeviceRow) -> Result<Memory> {
        let x = self.gpu.dirty(Kind::F32, row.tokens * self.hidden())?;
        ops::embed(self.gpu, &x, &self.weights.embed, &row.ids, self.hidden())?;
        Ok(x)
    }

    /// The predictors' hidden states before and after the last norm `[N, C]`.
    fn last_norm(&self, x: &Memory, row: &DeviceRow) -> Result<(Memory, Memory)> {
        let (rows, width) = (row.targets, self.hidden());
        let before = self.gpu.dirty(Kind::F32, rows * width)?;
        ops::gather_rows(self.gpu, &before, x, &row.predictors, width)?;
        let normed = self.gpu.dirty(self.kind, rows * width)?;
        ops::rms_norm(self.gpu, &normed, &before, &self.weights.norm, self.eps())?;
        Ok((before, normed))
    }
}

impl Cuda {
    /// Opens a GPU.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        Ok(Arc::new(Cuda { gpu: Gpu::open(ordinal)?, weights: Copies::default(), adapters: Copies::default() }))
    }

    /// Opens every GPU that can be opened.
    pub fn open_all() -> Vec<Arc<Self>> {
        let open = |i| Cuda::open(i).inspect_err(|e| tracing::warn!(gpu = i, error = %e, "a GPU is left out")).ok();
        (0..Gpu::count()).filter_map(open).collect()
    }

    /// Returns `cuda:N`.
    pub fn name(&self) -> String {
        format!("cuda:{}", self.gpu.ordinal())
    }

    /// Names what decides the last bits of its results: the GPU and its version of cuBLAS.
    pub fn arithmetic(&self) -> String {
        format!("{} cuBLAS {}", self.gpu.name(), self.gpu.blas_version())
    }

    /// Returns the widest attention head that the kernels compute with.
    pub fn max_head_dim(&self) -> usize {
        MAX_HEAD_DIM
    }

    /// Returns the bytes of memory that are free, and all bytes; `None` if the driver does not tell.
    pub fn memory(&self) -> Option<(u64, u64)> {
        self.gpu.bind().and_then(|()| self.gpu.memory()).ok()
    }

    /// Returns the most bytes of memory that were in use at one time.
    pub fn peak_bytes(&self) -> u64 {
        self.gpu.peak_bytes()
    }

    /// Returns whether it failed for good: only a new process can use it again.
    pub fn is_lost(&self) -> bool {
        self.gpu.is_lost()
    }

    /// Waits until it has done what it was given.
    pub fn wait(&self) {
        // What went wrong, the next call says.
        let _ = self.gpu.synchronize();
    }

    /// Returns unused memory to the driver.
    ///
    /// # Errors
    /// When the GPU fails.
    pub fn trim(&self) -> Result<()> {
        self.weights.forget_unused();
        self.adapters.forget_unused();
        self.gpu.trim()
    }

    /// The device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Zero gradients for tensors of these sizes.
    pub fn gradients(&self, sizes: impl IntoIterator<Item = (ParamId, usize)>) -> Result<GradientBuffers> {
        self.gpu.bind()?;
        GradientBuffers::new(&self.gpu, sizes)
    }

    /// Tells that a policy's own weights were changed in place: its adapter's, or all of them.
    pub fn changed(&self, policy: &Policy) {
        match &policy.adapter {
            Some(adapter) => self.adapters.forget(adapter),
            None => self.weights.forget(&policy.parameters),
        }
    }

    /// A run has ended: forgets the weights that only it used. `precision` is the server's.
    pub fn end_of_run(&self, precision: Precision) {
        self.weights.sweep(Kind::of(precision));
        self.adapters.sweep(Kind::of(precision));
    }

    fn open_policy<'a>(&'a self, policy: &'a Policy, row: &PreparedRow) -> Result<Opened<'a>> {
        self.gpu.bind()?;
        let (gpu, kind) = (&self.gpu, Kind::of(policy.precision));
        let adapter = |a: &Arc<Adapter>| self.adapters.adapter(gpu, kind, a);
        Ok(Opened {
            gpu,
            kind,
            policy,
            weights: self.weights.weights(gpu, kind, &policy.parameters)?,
            adapter: policy.adapter.as_ref().map(adapter).transpose()?,
            parts: row.adapters.iter().map(|(rows, a)| Ok((rows.clone(), adapter(a)?))).collect::<Result<_>>()?,
        })
    }

    /// Log-probs of the row's completion tokens `[N]`. `pause` is called before every block.
    pub fn log_probs(&self, policy: &Policy, row: &PreparedRow, pause: &mut dyn FnMut()) -> Result<Vec<f32>> {
        let opened = self.open_policy(policy, row)?;
        let on_device = DeviceRow::new(&self.gpu, row)?;
        let x = opened.embed(&on_device)?;
        for i in 0..policy.num_blocks() {
            pause();
            opened.block(i, &on_device).forward(&x, false)?;
        }
        let (_, normed) = opened.last_norm(&x, &on_device)?;
        let options = HeadOptions::default();
        Ok(opened.head().forward(&normed, &on_device, &row.row().targets, options)?.output.log_probs)
    }

    /// Runs the row forward. `pause` is called before every block.
    pub fn forward(&self, policy: &Policy, row: &PreparedRow, keep: Keep, pause: &mut dyn FnMut()) -> Result<(HeadOutput, DeviceTape)> {
        let opened = self.open_policy(policy, row)?;
        let on_device = DeviceRow::new(&self.gpu, row)?;
        let x = opened.embed(&on_device)?;
        let mut blocks = Vec::with_capacity(policy.num_blocks());
        for i in 0..policy.num_blocks() {
            pause();
            let input = if keep == Keep::Inputs { Some(self.gpu.copy(&x)?) } else { None };
            let tape = opened.block(i, &on_device).forward(&x, keep == Keep::Tapes)?;
            blocks.extend(tape.map(|t| Kept::Tape(Box::new(t))).or(input.map(Kept::Input)));
        }
        let (before_norm, normed) = opened.last_norm(&x, &on_device)?;
        let options = HeadOptions { distribution: true, gradient: keep != Keep::Nothing, trained: None };
        let passed = opened.head().forward(&normed, &on_device, &row.row().targets, options)?;
        let lse = passed.output.log_sum_exp.clone();
        Ok((passed.output, DeviceTape { row: on_device, blocks, before_norm, normed, gradient: passed.gradient, lse }))
    }

    /// Runs the row backward from ∂loss/∂logp `[N]` and adds every trainable tensor's gradient to `gradients`. `pause` is called before every block.
    pub fn backward(
        &self,
        policy: &Policy,
        row: &PreparedRow,
        tape: DeviceTape,
        upstream: &[f32],
        gradients: &GradientBuffers,
        pause: &mut dyn FnMut(),
    ) -> Result<()> {
        if row.row().targets.is_empty() {
            return Ok(());
        }
        let opened = self.open_policy(policy, row)?;
        let DeviceTape { row: on_device, blocks, before_norm, normed, gradient, lse } = tape;
        let Some(gradient) = gradient.filter(|_| blocks.len() == policy.num_blocks()) else {
            bail!("the row was run forward without a tape");
        };
        let (gpu, kind, width, rows) = (&self.gpu, opened.kind, opened.hidden(), on_device.targets);
        let g = gpu.upload(Kind::F32, upstream)?;
        if let Some(slot) = gradients.slot(policy.parameters.head_id()) {
            let lse = gpu.upload(Kind::F32, &lse)?;
            opened.head().weight_gradient(&normed, &on_device, &lse, &g, slot)?;
        }
        let scaled = gpu.dirty(kind, rows * width)?;
        ops::scale_rows(gpu, &scaled, &gradient, &g, width)?;
        let dh = gpu.zeros(Kind::F32, rows * width)?;
        let slot = gradients.slot(ParamId::Norm);
        let norm = NormBackward { x: &before_norm, w: &opened.weights.norm, g: &scaled, eps: opened.eps(), slot };
        norm.add_to(gpu, &dh)?;
        drop((gradient, scaled, before_norm, normed));
        let gx = gpu.zeros(Kind::F32, on_device.tokens * width)?;
        Scatter::new(gpu, &row.row().predictors)?.add(gpu, &gx, &dh, width)?;
        for (i, kept) in blocks.into_iter().enumerate().rev() {
            pause();
            let block = opened.block(i, &on_device);
            let tape = match kept {
                Kept::Tape(tape) => *tape,
                Kept::Input(x) => match block.forward(&x, true)? {
                    Some(tape) => tape,
                    None => bail!("block {i} left no tape"),
                },
            };
            block.backward(tape, &gx, gradients)?;
        }
        if let Some(slot) = gradients.slot(ParamId::Embedding) {
            Scatter::new(gpu, &row.row().ids)?.add(gpu, slot, &gx, width)?;
        }
        Ok(())
    }
}
