//! The decoder's passes on an NVIDIA GPU: implements the operations that [`super::pass`] needs.
//!
//! Weights are copied to the device when they are first used. Matrices and activations are in the
//! pass's precision. The residual stream, sums, norms, softmax and accumulated gradients are f32.
//! The loss, the master weights and the optimizer stay on the host: gradients are downloaded once
//! per step, and changed weights are uploaded once per step. Within a pass the host waits for the
//! device in three cases: when it downloads the log-probs of a row, if device memory runs out, and
//! if an upload has filled all slots of the staging memory. GEMMs are those of cuBLAS, all other
//! kernels are in `compute/cuda/kernels/*.cu`.

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
use super::backend::{PolicyView, SavePolicy};
use super::parameters::Parameters;
use super::params::ParamId;
use super::pass::{self, Tape};
use super::row::PreparedRow;
use crate::compute::cpu::head::HeadOutput;
pub use crate::compute::cuda::gpu::Gpu;
use crate::compute::cuda::kernels::Kind;
use crate::domain::training::Precision;

/// A GPU with the copies of weights in its memory.
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

/// Result of a forward pass over a row, the input of the backward pass.
pub struct DeviceTape {
    row: DeviceRow,
    tape: Tape<CudaBackend>,
}

impl DeviceTape {
    /// Returns the output of the head. Its `gradient` is empty, because it stays on the device.
    pub fn output(&self) -> &HeadOutput {
        self.tape.output()
    }
}

/// Width of the widest supported attention head, in elements: attention is tested up to this width.
/// Norms over all heads of a token at once may be wider.
const MAX_HEAD_DIM: usize = 256;

impl Cuda {
    /// Opens the GPU with this ordinal.
    ///
    /// # Errors
    /// Fails in the same cases as [`Gpu::open`].
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

    /// Returns the reason why [`Cuda::open_all`] has opened no GPU.
    pub fn absence() -> String {
        match Gpu::count() {
            0 => "the machine has no NVIDIA driver (580 or newer) that sees a GPU".to_owned(),
            _ => "no GPU could be opened".to_owned(),
        }
    }

    /// Returns `cuda:N`.
    pub fn name(&self) -> String {
        format!("cuda:{}", self.gpu.ordinal())
    }

    /// Returns a name for everything that affects rounding: the GPU and its cuBLAS version.
    pub fn arithmetic(&self) -> String {
        format!("{} cuBLAS {}", self.gpu.name(), self.gpu.blas_version())
    }

    /// Returns the width of the widest attention head that the kernels support, in elements.
    pub fn max_head_dim(&self) -> usize {
        MAX_HEAD_DIM
    }

    /// Returns the free and the total memory in bytes, or `None` if the driver does not report
    /// them.
    pub fn memory(&self) -> Option<(u64, u64)> {
        self.gpu.bind().and_then(|()| self.gpu.memory()).ok()
    }

    /// Returns the peak of the memory in use since the last trim, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.gpu.peak_bytes()
    }

    /// Returns true if the GPU has failed permanently. Only a new process can use it again.
    pub fn is_lost(&self) -> bool {
        self.gpu.is_lost()
    }

    /// Waits until the GPU has finished all submitted work.
    pub fn wait(&self) {
        // An error is reported again by the next call.
        let _ = self.gpu.synchronize();
    }

    /// Returns unused memory to the driver, including copies of weights that no longer exist on the
    /// host.
    ///
    /// # Errors
    /// Fails if the GPU fails.
    pub fn trim(&self) -> Result<()> {
        self.weights.forget_dead();
        self.adapters.forget_dead();
        self.gpu.trim()
    }

    /// Returns the device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Allocates gradients of zero for tensors of these sizes, in elements.
    ///
    /// # Errors
    /// Fails if the GPU fails or has no memory left for them.
    pub fn gradients(
        &self,
        sizes: impl IntoIterator<Item = (ParamId, usize)>,
    ) -> Result<GradientBuffers> {
        self.gpu.bind()?;
        GradientBuffers::new(&self.gpu, sizes)
    }

    /// Drops the copies of a policy's own weights after they were changed in place: those of its
    /// adapter or, without an adapter, those of the base model.
    pub fn changed(&self, policy: PolicyView<'_>) {
        match policy.adapter {
            Some(adapter) => self.adapters.forget(adapter),
            None => self.weights.forget(policy.parameters),
        }
    }

    /// Drops the copies of weights that only an ended run used. `precision` is the server's: copies
    /// in another precision are dropped, too.
    pub fn end_of_run(&self, precision: Precision) {
        self.weights.retain_live_of_kind(Kind::of(precision));
        self.adapters.retain_live_of_kind(Kind::of(precision));
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
    /// Fails if the GPU fails or has no memory left, as do the other passes.
    pub fn log_probs(
        &self,
        policy: PolicyView<'_>,
        row: &PreparedRow,
        yield_point: &mut dyn FnMut(),
    ) -> Result<Vec<f32>> {
        let policy = self.open_policy(policy, row)?;
        let on_device = DeviceRow::new(&self.gpu, row)?;
        pass::log_probs(
            &OpenRow {
                policy: &policy,
                source: row.row(),
                row: &on_device,
            },
            yield_point,
        )
    }

    /// Runs the row forward and saves what `save` selects.
    pub fn forward(
        &self,
        policy: PolicyView<'_>,
        row: &PreparedRow,
        save: SavePolicy,
        yield_point: &mut dyn FnMut(),
    ) -> Result<DeviceTape> {
        let policy = self.open_policy(policy, row)?;
        let on_device = DeviceRow::new(&self.gpu, row)?;
        let tape = pass::forward(
            &OpenRow {
                policy: &policy,
                source: row.row(),
                row: &on_device,
            },
            save,
            yield_point,
        )?;
        Ok(DeviceTape {
            row: on_device,
            tape,
        })
    }

    /// Runs the row backward, given `upstream` = ∂loss/∂log p `[N]`, and accumulates the
    /// gradients of all trained tensors in `gradients`.
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
        let DeviceTape {
            row: on_device,
            tape,
        } = tape;
        let row = OpenRow {
            policy: &policy,
            source: row.row(),
            row: &on_device,
        };
        pass::backward(&row, tape, upstream, gradients, yield_point)
    }
}
