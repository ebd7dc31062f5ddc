//! A policy that is opened for a pass over one row: the embedding, the last norm and the head.

use candle_core::{Result, bail};

use super::backend::{CpuBackend, Gradients, HeadTape};
use super::block::CpuBlock;
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm::Kernel;
use crate::compute::cpu::head::{
    HeadInput, HeadOptions, HeadOutput, KEPT, head, head_weight_gradient,
};
use crate::compute::cpu::rms_norm::{rms_norm, rms_norm_backward};
use crate::compute::cpu::thread_pool;
use crate::model::backend::{Keep, PolicyView, RowOps};
use crate::model::parameters::NormFactors;
use crate::model::params::ParamId;
use crate::model::row::PreparedRow;

/// A policy and a row.
#[derive(Clone, Copy)]
pub struct CpuRow<'a> {
    policy: PolicyView<'a>,
    row: &'a PreparedRow,
}

impl<'a> CpuRow<'a> {
    /// Returns the operations of `policy` on `row`.
    pub fn new(policy: PolicyView<'a>, row: &'a PreparedRow) -> Self {
        CpuRow { policy, row }
    }

    fn kernel(&self) -> Kernel {
        Kernel::best(self.policy.precision)
    }

    /// C.
    fn width(&self) -> usize {
        self.policy.spec.hidden_size
    }

    fn eps(&self) -> f32 {
        self.policy.spec.rms_norm_eps as f32
    }

    fn embedding_scale(&self) -> f32 {
        self.policy.spec.embedding_scale_in(self.policy.precision)
    }

    fn last_norm(&self) -> Result<NormFactors<'a>> {
        self.policy.parameters.norm(ParamId::Norm)
    }

    /// Runs the last norm and the head on the last block's output `[T, C]`.
    fn run_head(&self, x: &[f32], options: HeadOptions) -> Result<(HeadOutput, HeadTape)> {
        let (width, row) = (self.width(), self.row.row());
        let mut before_norm = Buffer::dirty(row.predictors.len() * width);
        thread_pool::chunks(&mut before_norm, width, |i, to| {
            to.copy_from_slice(&x[row.predictors[i] as usize * width..][..width])
        });
        let mut normed = Buffer::dirty(before_norm.len());
        rms_norm(&before_norm, self.last_norm()?.values()?, self.eps(), &mut normed);
        let w = self.policy.parameters.head()?.read()?;
        let input =
            HeadInput { kernel: self.kernel(), h: &normed, w: w.view(), targets: &row.targets };
        let output = head(input, options);
        Ok((output, HeadTape { before_norm, normed }))
    }
}

impl RowOps<CpuBackend> for CpuRow<'_> {
    type Block<'b>
        = CpuBlock<'b>
    where
        Self: 'b;

    fn num_blocks(&self) -> usize {
        self.policy.parameters.num_blocks()
    }

    fn block(&self, index: usize) -> Result<CpuBlock<'_>> {
        CpuBlock::open(self.policy, index, self.row)
    }

    fn embed(&self) -> Result<Buffer> {
        let (width, scale) = (self.width(), self.embedding_scale());
        let embedding = self.policy.parameters.matrix(ParamId::Embedding)?.read()?;
        let mut x = Buffer::dirty(self.row.tokens() * width);
        for (to, &id) in x.chunks_mut(width).zip(&self.row.row().ids) {
            embedding.view().read_row(id as usize, to);
            if scale != 1.0 {
                to.iter_mut().for_each(|x| *x *= scale);
            }
        }
        Ok(x)
    }

    fn embed_backward(&self, gx: &Buffer, gradients: &mut Gradients) -> Result<()> {
        let (width, scale) = (self.width(), self.embedding_scale());
        if let Some(slot) = gradients.slot(ParamId::Embedding) {
            for (from, &id) in gx.chunks(width).zip(&self.row.row().ids) {
                slot[id as usize * width..][..width]
                    .iter_mut()
                    .zip(from)
                    .for_each(|(s, g)| *s += g * scale);
            }
        }
        Ok(())
    }

    fn log_probs(&self, x: &Buffer) -> Result<Vec<f32>> {
        Ok(self.run_head(x, HeadOptions::default())?.0.log_probs)
    }

    fn head(&self, x: &Buffer, keep: Keep) -> Result<(HeadOutput, HeadTape)> {
        // Without an adapter the head is trained, too.
        let trained = match keep {
            Keep::Tapes => Some(KEPT),
            Keep::Inputs => Some(0),
            Keep::Nothing => None,
        };
        let trained = trained.filter(|_| self.policy.adapter.is_none());
        self.run_head(
            x,
            HeadOptions { distribution: true, gradient: keep != Keep::Nothing, trained },
        )
    }

    fn head_backward(
        &self,
        tape: HeadTape,
        mut output: HeadOutput,
        upstream: &[f32],
        gradients: &mut Gradients,
    ) -> Result<Buffer> {
        let (width, row) = (self.width(), self.row.row());
        let HeadTape { before_norm, normed } = tape;
        if output.gradient.len() != upstream.len() * width {
            bail!("backward was not asked for in the head's forward pass");
        }
        if let Some(slot) = gradients.slot(self.policy.parameters.head_id()) {
            let w = self.policy.parameters.head()?.read()?;
            let input =
                HeadInput { kernel: self.kernel(), h: &normed, w: w.view(), targets: &row.targets };
            head_weight_gradient(input, &mut output, upstream, slot);
        }
        thread_pool::chunks(&mut output.gradient, width, |i, row| {
            row.iter_mut().for_each(|x| *x *= upstream[i])
        });
        let mut dh = Buffer::zeros(before_norm.len());
        let slot = gradients.slot(ParamId::Norm);
        rms_norm_backward(
            &before_norm,
            self.last_norm()?.values()?,
            &output.gradient,
            self.eps(),
            &mut dh,
            slot,
        );
        let mut gx = Buffer::zeros(self.row.tokens() * width);
        for (from, &p) in dh.chunks(width).zip(&row.predictors) {
            gx[p as usize * width..][..width].iter_mut().zip(from).for_each(|(x, d)| *x += d);
        }
        Ok(gx)
    }
}
