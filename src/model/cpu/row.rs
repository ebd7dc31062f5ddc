//! A policy opened for a pass over one row on the CPU: the embedding, the last norm and the head.

use candle_core::{Result, bail};

use super::backend::{CpuBackend, CpuGradients, CpuHeadTape};
use super::block::CpuBlock;
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm::Kernel;
use crate::compute::cpu::head::{
    HeadInput, HeadOptions, HeadOutput, MAX_SAVED_PROBABILITIES, head, head_weight_gradient, logits,
};
use crate::compute::cpu::rms_norm::{rms_norm, rms_norm_backward};
use crate::compute::cpu::thread_pool;
use crate::model::backend::{PolicyView, RowOps, SavePolicy};
use crate::model::parameters::NormFactors;
use crate::model::params::ParamId;
use crate::model::row::{KeyCache, PreparedRow};

/// A policy opened for a pass over a row.
#[derive(Clone, Copy)]
pub struct CpuRow<'a> {
    policy: PolicyView<'a>,
    row: &'a PreparedRow,
    cache: Option<&'a (dyn KeyCache + 'a)>,
}

impl<'a> CpuRow<'a> {
    /// Opens `policy` for a pass over `row`.
    pub fn new(policy: PolicyView<'a>, row: &'a PreparedRow) -> Self {
        CpuRow {
            policy,
            row,
            cache: None,
        }
    }

    /// Returns the row with cached keys and values of its sequences.
    pub fn with_cache(self, cache: &'a (dyn KeyCache + 'a)) -> Self {
        CpuRow {
            cache: Some(cache),
            ..self
        }
    }

    /// Returns the logits of the predictors `[N, V]`, given the last block's output `[T, C]`.
    pub fn logits(&self, x: &Buffer) -> Result<Buffer> {
        self.logits_after(x, &self.row.row().predictors)
    }

    /// Returns the logits of the tokens after these N tokens of the row `[N, V]`, given the last
    /// block's output `[T, C]`. `tokens` are indices in the row.
    pub fn logits_after(&self, x: &Buffer, tokens: &[u32]) -> Result<Buffer> {
        let normed = self.head_input(x, tokens)?.normed;
        let w = self.policy.parameters.head()?.read()?;
        let softcap = self.policy.spec.logit_softcap;
        Ok(logits(self.kernel(), &normed, w.view(), softcap))
    }

    fn kernel(&self) -> Kernel {
        Kernel::best(self.policy.precision)
    }

    /// Returns C, the width of the residual stream.
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

    /// Returns the hidden states of the tokens with the indices `predictors`, before and after the
    /// last norm.
    fn head_input(&self, x: &[f32], predictors: &[u32]) -> Result<CpuHeadTape> {
        let width = self.width();
        let mut before_norm = Buffer::uninit(predictors.len() * width);
        thread_pool::chunks(&mut before_norm, width, |i, to| {
            to.copy_from_slice(&x[predictors[i] as usize * width..][..width])
        });
        let mut normed = Buffer::uninit(before_norm.len());
        rms_norm(
            &before_norm,
            self.last_norm()?.values()?,
            self.eps(),
            &mut normed,
        );
        // The factor on the logits is applied to the hidden states, which is the same.
        let factor = self.policy.spec.logit_factor;
        if factor != 1.0 {
            thread_pool::chunks(&mut normed, width, |_, h| {
                h.iter_mut().for_each(|h| *h *= factor)
            });
        }
        Ok(CpuHeadTape {
            before_norm,
            normed,
        })
    }

    /// Runs the last norm and the head on the last block's output `[T, C]`.
    fn run_head(&self, x: &[f32], options: HeadOptions) -> Result<(HeadOutput, CpuHeadTape)> {
        let row = self.row.row();
        let tape = self.head_input(x, &row.predictors)?;
        let w = self.policy.parameters.head()?.read()?;
        let input = HeadInput {
            kernel: self.kernel(),
            h: &tape.normed,
            w: w.view(),
            targets: &row.targets,
            softcap: self.policy.spec.logit_softcap,
        };
        let output = head(input, options);
        Ok((output, tape))
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
        Ok(CpuBlock::open(self.policy, index, self.row)?.with_cache(self.cache))
    }

    fn embed(&self) -> Result<Buffer> {
        let (width, scale) = (self.width(), self.embedding_scale());
        let embedding = self.policy.parameters.matrix(ParamId::Embedding)?.read()?;
        let mut x = Buffer::uninit(self.row.tokens() * width);
        for (to, &id) in x.chunks_mut(width).zip(&self.row.row().ids) {
            embedding.view().read_row(id as usize, to);
            if scale != 1.0 {
                to.iter_mut().for_each(|x| *x *= scale);
            }
        }
        Ok(x)
    }

    fn embed_backward(&self, gx: &Buffer, gradients: &mut CpuGradients) -> Result<()> {
        let (width, scale) = (self.width(), self.embedding_scale());
        if let Some(slot) = gradients.get_mut(ParamId::Embedding) {
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

    fn head(&self, x: &Buffer, save: SavePolicy) -> Result<(HeadOutput, CpuHeadTape)> {
        // The head is trained only if the policy has no adapter. `trained` is the number of
        // probabilities that the head may save for the gradient of its weight.
        let trained = match save {
            SavePolicy::Tapes => Some(MAX_SAVED_PROBABILITIES),
            SavePolicy::BlockInputs => Some(0),
            SavePolicy::Nothing => None,
        };
        let trained = trained.filter(|_| self.policy.adapter.is_none());
        self.run_head(
            x,
            HeadOptions {
                distribution: true,
                gradient: save != SavePolicy::Nothing,
                trained,
            },
        )
    }

    fn head_backward(
        &self,
        tape: CpuHeadTape,
        mut output: HeadOutput,
        upstream: &[f32],
        gradients: &mut CpuGradients,
    ) -> Result<Buffer> {
        let (width, row) = (self.width(), self.row.row());
        let CpuHeadTape {
            before_norm,
            normed,
        } = tape;
        if output.gradient.len() != upstream.len() * width {
            bail!("the head saved no gradient: the row was run forward without a tape");
        }
        if let Some(slot) = gradients.get_mut(self.policy.parameters.head_id()) {
            let w = self.policy.parameters.head()?.read()?;
            let input = HeadInput {
                kernel: self.kernel(),
                h: &normed,
                w: w.view(),
                targets: &row.targets,
                softcap: self.policy.spec.logit_softcap,
            };
            head_weight_gradient(input, &mut output, upstream, slot);
        }
        let factor = self.policy.spec.logit_factor;
        thread_pool::chunks(&mut output.gradient, width, |i, row| {
            let upstream = upstream[i] * factor;
            row.iter_mut().for_each(|x| *x *= upstream)
        });
        let mut dh = Buffer::zeros(before_norm.len());
        let slot = gradients.get_mut(ParamId::Norm);
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
            gx[p as usize * width..][..width]
                .iter_mut()
                .zip(from)
                .for_each(|(x, d)| *x += d);
        }
        Ok(gx)
    }
}
