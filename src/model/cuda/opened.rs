//! A policy opened for a pass over one row on a GPU: the embedding, the last norm and the head.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, bail};

use super::backend::{CudaBackend, CudaHeadTape};
use super::block::{CudaBlock, NormBackward};
use super::gradients::GradientBuffers;
use super::head::Head;
use super::row::{DeviceRow, Scatter};
use super::sizes::BlockShape;
use super::weights::{DeviceAdapter, DeviceWeights};
use crate::compute::cpu::head::{HeadOptions, HeadOutput};
use crate::compute::cuda::gpu::{Gpu, Memory};
use crate::compute::cuda::kernels::Kind;
use crate::compute::cuda::ops;
use crate::model::backend::{PolicyView, RowOps, SavePolicy};
use crate::model::params::ParamId;
use crate::model::row::Row;

/// Sliding windows of at least this width are treated as no window, because no row has as many
/// positions. The kernels add a position and the window in 32-bit integers. Equals `NO_WINDOW` in
/// the kernels.
const NO_WINDOW: usize = 1 << 30;

/// A policy with its weights on the device.
pub(super) struct OpenPolicy<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub kind: Kind,
    pub policy: PolicyView<'a>,
    pub weights: Arc<DeviceWeights>,
    pub adapter: Option<Arc<DeviceAdapter>>,
    /// Token ranges of the row that have adapters of their own.
    pub parts: Vec<(Range<usize>, Arc<DeviceAdapter>)>,
}

impl OpenPolicy<'_> {
    fn hidden(&self) -> usize {
        self.policy.spec.hidden_size
    }

    fn eps(&self) -> f32 {
        self.policy.spec.rms_norm_eps as f32
    }

    fn head(&self) -> Head<'_> {
        let (hidden, vocabulary) = (self.hidden(), self.policy.spec.vocab_size);
        Head {
            gpu: self.gpu,
            kind: self.kind,
            weight: self.weights.head(),
            hidden,
            vocabulary,
            softcap: self.policy.spec.logit_softcap,
        }
    }
}

/// A policy opened for a pass over a row.
#[derive(Clone, Copy)]
pub(super) struct OpenRow<'a> {
    pub policy: &'a OpenPolicy<'a>,
    /// The row on the host.
    pub source: &'a Row,
    pub row: &'a DeviceRow,
}

impl OpenRow<'_> {
    /// Returns the factor on each token's embedding `[T]`, or `None` if it is 1.
    fn embedding_scales(&self) -> Result<Option<Memory>> {
        let OpenPolicy { gpu, policy, .. } = self.policy;
        let scale = policy.spec.embedding_scale_in(policy.precision);
        (scale != 1.0)
            .then(|| gpu.upload(Kind::F32, &vec![scale; self.row.tokens]))
            .transpose()
    }

    /// Gathers the hidden states of the predictors and applies the last norm. Multiplies the result
    /// by the factor on the logits, which is the same as multiplying the logits. Returns the states
    /// before and after, each `[N, C]`.
    fn last_norm(&self, x: &Memory) -> Result<(Memory, Memory)> {
        let OpenPolicy {
            gpu, kind, weights, ..
        } = self.policy;
        let (rows, width) = (self.row.targets, self.policy.hidden());
        let before = gpu.uninit(Kind::F32, rows * width)?;
        ops::gather_rows(gpu, &before, x, &self.row.predictors, width)?;
        let normed = gpu.uninit(*kind, rows * width)?;
        let (weight, eps) = (&weights.norm, self.policy.eps());
        match self.policy.policy.spec.logit_factor {
            1.0 => ops::rms_norm(gpu, &normed, &before, weight, eps)?,
            factor => {
                let unscaled = gpu.uninit(Kind::F32, rows * width)?;
                ops::rms_norm(gpu, &unscaled, &before, weight, eps)?;
                let factors = gpu.upload(Kind::F32, &vec![factor; rows])?;
                ops::scale_rows(gpu, &normed, &unscaled, &factors, width)?;
            }
        }
        Ok((before, normed))
    }
}

impl RowOps<CudaBackend> for OpenRow<'_> {
    type Block<'b>
        = CudaBlock<'b>
    where
        Self: 'b;

    fn num_blocks(&self) -> usize {
        self.policy.policy.parameters.num_blocks()
    }

    fn block(&self, index: usize) -> Result<CudaBlock<'_>> {
        let OpenPolicy {
            gpu,
            kind,
            policy,
            weights,
            adapter,
            parts,
        } = self.policy;
        let spec = &policy.spec.blocks[index];
        let mut shape = BlockShape::of(self.policy.hidden(), spec);
        shape.heads.window = shape.heads.window.filter(|window| *window < NO_WINDOW);
        let (weights, adapter, eps) = (
            &weights.blocks[index],
            adapter.as_deref(),
            self.policy.eps(),
        );
        Ok(CudaBlock {
            gpu,
            kind: *kind,
            index,
            spec,
            shape,
            eps,
            weights,
            adapter,
            parts,
            row: self.row,
        })
    }

    fn embed(&self) -> Result<Memory> {
        let OpenPolicy { gpu, weights, .. } = self.policy;
        let width = self.policy.hidden();
        let x = gpu.uninit(Kind::F32, self.row.tokens * width)?;
        ops::embed(gpu, &x, &weights.embed, &self.row.ids, width)?;
        if let Some(scales) = self.embedding_scales()? {
            ops::scale_rows(gpu, &x, &x, &scales, width)?;
        }
        Ok(x)
    }

    fn embed_backward(&self, gx: &Memory, gradients: &mut GradientBuffers) -> Result<()> {
        let (gpu, width) = (self.policy.gpu, self.policy.hidden());
        let Some(slot) = gradients.get(ParamId::Embedding) else {
            return Ok(());
        };
        let scatter = Scatter::new(gpu, &self.source.ids)?;
        match self.embedding_scales()? {
            Some(scales) => {
                let scaled = gpu.uninit(Kind::F32, gx.len())?;
                ops::scale_rows(gpu, &scaled, gx, &scales, width)?;
                scatter.add(gpu, slot, &scaled, width)
            }
            None => scatter.add(gpu, slot, gx, width),
        }
    }

    fn log_probs(&self, x: &Memory) -> Result<Vec<f32>> {
        let (_, normed) = self.last_norm(x)?;
        let passed = self.policy.head().forward(
            &normed,
            self.row,
            &self.source.targets,
            HeadOptions::default(),
        )?;
        Ok(passed.output.log_probs)
    }

    fn head(&self, x: &Memory, save: SavePolicy) -> Result<(HeadOutput, CudaHeadTape)> {
        let (before_norm, normed) = self.last_norm(x)?;
        let options = HeadOptions {
            distribution: true,
            gradient: save != SavePolicy::Nothing,
            trained: None,
        };
        let passed =
            self.policy
                .head()
                .forward(&normed, self.row, &self.source.targets, options)?;
        Ok((
            passed.output,
            CudaHeadTape {
                before_norm,
                normed,
                gradient: passed.gradient,
            },
        ))
    }

    fn head_backward(
        &self,
        tape: CudaHeadTape,
        output: HeadOutput,
        upstream: &[f32],
        gradients: &mut GradientBuffers,
    ) -> Result<Memory> {
        let CudaHeadTape {
            before_norm,
            normed,
            gradient: Some(gradient),
        } = tape
        else {
            bail!("the row was run forward without a tape");
        };
        let OpenPolicy {
            gpu,
            kind,
            policy,
            weights,
            ..
        } = self.policy;
        let (width, rows) = (self.policy.hidden(), self.row.targets);
        let g = gpu.upload(Kind::F32, upstream)?;
        if let Some(slot) = gradients.get(policy.parameters.head_id()) {
            let lse = gpu.upload(Kind::F32, &output.log_sum_exp)?;
            self.policy
                .head()
                .weight_gradient(&normed, self.row, &lse, &g, slot)?;
        }
        let scaled = gpu.uninit(*kind, rows * width)?;
        let g = match policy.spec.logit_factor {
            1.0 => g,
            factor => {
                let scaled: Vec<f32> = upstream.iter().map(|g| g * factor).collect();
                gpu.upload(Kind::F32, &scaled)?
            }
        };
        ops::scale_rows(gpu, &scaled, &gradient, &g, width)?;
        let dh = gpu.zeros(Kind::F32, rows * width)?;
        let slot = gradients.get(ParamId::Norm);
        let norm = NormBackward {
            x: &before_norm,
            w: &weights.norm,
            g: &scaled,
            eps: self.policy.eps(),
            slot,
        };
        norm.add_to(gpu, &dh)?;
        drop((gradient, scaled, before_norm, normed));
        let gx = gpu.zeros(Kind::F32, self.row.tokens * width)?;
        Scatter::new(gpu, &self.source.predictors)?.add(gpu, &gx, &dh, width)?;
        Ok(gx)
    }
}
