//! The decoder's passes on an NVIDIA GPU: [`super::pass`] with what a GPU does for them.
//!
//! Weights are copied to the device when they are first used; matrices and activations are in the
//! pass's precision, the residual stream, sums, norms, softmax, losses and gradients in f32.
//! Masters and the optimizer stay on the host: gradients are fetched once a step, changed weights
//! sent once. Nothing waits for the device but the log-probs of a row. Products are cuBLAS's,
//! everything else is `compute/cuda/kernels/*.cu`.

mod attention;
mod backend;
mod block;
mod gradients;
mod head;
mod opened;
mod projections;
mod row;
pub mod sizes;
mod weights;

use std::sync::Arc;

use candle_core::Result;

use self::backend::CudaBackend;
pub use self::gradients::GradientBuffers;
use self::opened::{OpenPolicy, OpenRow};
use self::row::DeviceRow;
use self::weights::{Copies, DeviceAdapter, DeviceWeights};
use super::adapter::Adapter;
use super::backend::{Keep, PolicyView};
use super::parameters::Parameters;
use super::params::ParamId;
use super::pass::{self, Tape};
use super::row::PreparedRow;
use crate::compute::cpu::head::HeadOutput;
pub use crate::compute::cuda::gpu::Gpu;
use crate::compute::cuda::kernels::Kind;
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
    tape: Tape<CudaBackend>,
}

impl DeviceTape {
    /// Returns what came out of the head, without the gradient, which stays on the device.
    pub fn output(&self) -> &HeadOutput {
        self.tape.output()
    }
}

/// The widest attention head: a warp holds one in registers where queries and keys are normed and
/// rotated (`MAX_DIM` in norm.cu).
const MAX_HEAD_DIM: usize = 256;

impl Cuda {
    /// Opens a GPU.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        Ok(Arc::new(Cuda {
            gpu: Gpu::open(ordinal)?,
            weights: Copies::default(),
            adapters: Copies::default(),
        }))
    }

    /// Opens every GPU that can be opened.
    pub fn open_all() -> Vec<Arc<Self>> {
        let open = |i| {
            Cuda::open(i)
                .inspect_err(|e| tracing::warn!(gpu = i, error = %e, "a GPU is left out"))
                .ok()
        };
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

    /// Returns the bytes of memory that are free, and all bytes; `None` if the driver does not
    /// tell.
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
    pub fn gradients(
        &self,
        sizes: impl IntoIterator<Item = (ParamId, usize)>,
    ) -> Result<GradientBuffers> {
        self.gpu.bind()?;
        GradientBuffers::new(&self.gpu, sizes)
    }

    /// Tells that a policy's own weights were changed in place: its adapter's, or all of them.
    pub fn changed(&self, policy: PolicyView<'_>) {
        match policy.adapter {
            Some(adapter) => self.adapters.forget(adapter),
            None => self.weights.forget(policy.parameters),
        }
    }

    /// A run has ended: forgets the weights that only it used. `precision` is the server's.
    pub fn end_of_run(&self, precision: Precision) {
        self.weights.sweep(Kind::of(precision));
        self.adapters.sweep(Kind::of(precision));
    }

    fn open_policy<'a>(
        &'a self,
        policy: PolicyView<'a>,
        row: &PreparedRow,
    ) -> Result<OpenPolicy<'a>> {
        self.gpu.bind()?;
        let (gpu, kind) = (&self.gpu, Kind::of(policy.precision));
        let adapter = |a: &Arc<Adapter>| self.adapters.adapter(gpu, kind, a);
        Ok(OpenPolicy {
            gpu,
            kind,
            policy,
            weights: self.weights.weights(gpu, kind, policy.parameters)?,
            adapter: policy.adapter.map(adapter).transpose()?,
            parts: row
                .adapters
                .iter()
                .map(|(rows, a)| Ok((rows.clone(), adapter(a)?)))
                .collect::<Result<_>>()?,
        })
    }

    /// Returns the log-probs of the row's completion tokens `[N]`.
    ///
    /// # Errors
    /// When the GPU fails or has no memory left; so do the other passes.
    pub fn log_probs(
        &self,
        policy: PolicyView<'_>,
        row: &PreparedRow,
        yield_point: &mut dyn FnMut(),
    ) -> Result<Vec<f32>> {
        let policy = self.open_policy(policy, row)?;
        let on_device = DeviceRow::new(&self.gpu, row)?;
        pass::log_probs(
            &OpenRow { policy: &policy, source: row.row(), row: &on_device },
            yield_point,
        )
    }

    /// Runs the row forward.
    pub fn forward(
        &self,
        policy: PolicyView<'_>,
        row: &PreparedRow,
        keep: Keep,
        yield_point: &mut dyn FnMut(),
    ) -> Result<DeviceTape> {
        let policy = self.open_policy(policy, row)?;
        let on_device = DeviceRow::new(&self.gpu, row)?;
        let tape = pass::forward(
            &OpenRow { policy: &policy, source: row.row(), row: &on_device },
            keep,
            yield_point,
        )?;
        Ok(DeviceTape { row: on_device, tape })
    }

    /// Runs the row backward from ∂loss/∂log p `[N]` and adds every trainable tensor's gradient to
    /// `gradients`.
    pub fn backward(
        &self,
        policy: PolicyView<'_>,
        row: &PreparedRow,
        tape: DeviceTape,
        upstream: &[f32],
        gradients: &mut GradientBuffers,
        yield_point: &mut dyn FnMut(),
    ) -> Result<()> {
        if row.row().targets.is_empty() {
            return Ok(());
        }
        let policy = self.open_policy(policy, row)?;
        let DeviceTape { row: on_device, tape } = tape;
        let row = OpenRow { policy: &policy, source: row.row(), row: &on_device };
        pass::backward(&row, tape, upstream, gradients, yield_point)
    }
}
