//! Gradients on the device. They are accumulated in f32 over the rows of a step and downloaded
//! once, before the optimizer's update.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Result, bail};

use crate::compute::cuda::gpu::{Gpu, Memory};
use crate::compute::cuda::kernels::Kind;
use crate::model::params::ParamId;

/// The accumulated gradients: one buffer per trained tensor.
pub struct GradientBuffers {
    gpu: Arc<Gpu>,
    gradients: HashMap<ParamId, Memory>,
}

impl std::fmt::Debug for GradientBuffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} gradients on {:?}", self.gradients.len(), self.gpu)
    }
}

impl GradientBuffers {
    /// Allocates zeros for tensors of these sizes, in elements.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        sizes: impl IntoIterator<Item = (ParamId, usize)>,
    ) -> Result<Self> {
        let gradients = sizes
            .into_iter()
            .map(|(id, len)| Ok((id, gpu.zeros(Kind::F32, len)?)))
            .collect::<Result<_>>()?;
        Ok(GradientBuffers {
            gpu: gpu.clone(),
            gradients,
        })
    }

    pub(super) fn get(&self, id: ParamId) -> Option<&Memory> {
        self.gradients.get(&id)
    }

    /// Sets all gradients to zero.
    ///
    /// # Errors
    /// Fails if the GPU fails.
    pub fn clear(&self) -> Result<()> {
        self.gpu.bind()?;
        self.gradients.values().try_for_each(|m| self.gpu.clear(m))
    }

    /// Copies the accumulated gradient of a tensor to the host.
    ///
    /// # Errors
    /// Fails if the tensor has no gradient of `to.len()` elements, or if the GPU fails.
    pub fn download(&self, id: ParamId, to: &mut [f32]) -> Result<()> {
        self.gpu.bind()?;
        match self.gradients.get(&id) {
            Some(memory) if memory.len() == to.len() => self.gpu.download(memory, to),
            _ => bail!(
                "the GPU has no gradient of {} elements for {id:?}",
                to.len()
            ),
        }
    }
}
