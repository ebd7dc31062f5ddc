//! The decoder: one parametrised Llama-family forward pass over packed rows.
//!
//! Gradients flow to whatever tensors are tracked; with none tracked the pass leaves no tape. The head runs on completion tokens only.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};

use super::adapter::{Adapter, LowRank};
use super::config::ModelConfig;
use super::layout::RowLayout;
use super::ops::attention::{Heads, segment_attention};
use super::ops::linear::{linear, lora_linear};
use super::ops::log_prob::{Distributions, LogProbOptions, linear_log_prob};
use super::ops::rms_norm::rms_norm;
use super::ops::rope::{RopeTable, rope};
use super::ops::swiglu::swiglu;
use super::parameters::{Parameters, Projection, projection};

/// Weights that give probabilities: a base model, perhaps with an adapter on it.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The shape.
    pub config: Arc<ModelConfig>,
    /// The base weights; shared by every policy of the same base.
    pub parameters: Arc<Parameters>,
    /// The adapter.
    pub adapter: Option<Arc<Adapter>>,
}

/// A packed row, ready for the decoder.
#[derive(Clone, Debug)]
pub struct Row {
    /// Token ids `[T]`.
    pub ids: Vec<u32>,
    /// Which tokens see which.
    pub layout: Arc<RowLayout>,
    /// For each completion token, the row index that predicts it.
    pub predictors: Vec<u32>,
    /// The completion tokens `[N]`, in the order of `predictors`.
    pub targets: Arc<Vec<u32>>,
}

/// A row with its rotary tables, which depend on the model.
#[derive(Clone, Debug)]
pub struct PreparedRow {
    row: Arc<Row>,
    rope: RopeTable,
}

impl Policy {
    /// The same weights, untracked.
    pub fn detached(&self) -> Policy {
        Policy {
            config: self.config.clone(),
            parameters: Arc::new(self.parameters.detached()),
            adapter: self.adapter.as_ref().map(|a| Arc::new(a.detached())),
        }
    }

    /// The base model without the adapter.
    pub fn base(&self) -> Policy {
        Policy { adapter: None, ..self.clone() }
    }

    /// Decoder blocks.
    pub fn num_blocks(&self) -> usize {
        self.parameters.blocks.len()
    }

    /// Computes a row's rotary tables.
    pub fn prepare(&self, row: Arc<Row>) -> Result<PreparedRow> {
        if let Some(bad) = row.ids.iter().find(|id| **id as usize >= self.config.vocab_size) {
            bail!("token id {bad} is outside the model's vocabulary of {}", self.config.vocab_size);
        }
        let (inv_freq, factor) = self.config.rope.inv_freq(self.config.head_dim);
        let rope = RopeTable::new(&row.layout.positions(), &inv_freq, factor);
        Ok(PreparedRow { row, rope })
    }

    /// The embedded row `[T, C]`.
    pub fn embed(&self, row: &PreparedRow) -> Result<Tensor> {
        let ids = Tensor::from_slice(&row.row.ids, row.row.ids.len(), &Device::Cpu)?;
        // Untracked: the embedding's gradient is scattered by the trainer from the first block's input gradient.
        self.parameters.embed.detach().index_select(&ids, 0)
    }

    /// Block `index` on `x` `[T, C]` → `[T, C]`.
    pub fn block(&self, index: usize, x: &Tensor, row: &PreparedRow) -> Result<Tensor> {
        let config = &self.config;
        let block = &self.parameters.blocks[index];
        let adapter = self.adapter.as_ref().map(|a| (&a.blocks[index], a.config.scale()));
        let project = |p: usize, x: &Tensor| match adapter {
            Some((low_rank, scale)) => apply(&block.projections[p], low_rank[p].as_ref(), scale, x),
            None => apply(&block.projections[p], None, 0.0, x),
        };
        let heads = Heads {
            query: config.num_heads,
            key: config.num_kv_heads,
            dim: config.head_dim,
            window: config.sliding_window.get(index).copied().flatten(),
        };

        let n = rms_norm(x, &block.input_norm, config.rms_norm_eps)?;
        let (mut q, mut k) = (project(projection::Q, &n)?, project(projection::K, &n)?); // [T, H·D], [T, K·D]
        if let Some((q_norm, k_norm)) = &block.qk_norm {
            q = self.head_norm(&q, q_norm)?;
            k = self.head_norm(&k, k_norm)?;
        }
        let v = project(projection::V, &n)?; // [T, K·D]
        let o = segment_attention(&rope(&q, &row.rope)?, &rope(&k, &row.rope)?, &v, heads, &row.row.layout)?;
        let x = (x + project(projection::O, &o)?)?;

        let n = rms_norm(&x, &block.post_norm, config.rms_norm_eps)?;
        let y = swiglu(&project(projection::GATE, &n)?, &project(projection::UP, &n)?)?; // [T, F]
        &x + project(projection::DOWN, &y)?
    }

    /// RMSNorm over each head: `[T, heads·D]` → the same.
    fn head_norm(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        let dim = self.config.head_dim;
        rms_norm(&x.reshape((tokens * width / dim, dim))?, w, self.config.rms_norm_eps)?.reshape((tokens, width))
    }

    /// Log-probs of the row's completion tokens `[N]`, from the last block's output `[T, C]`.
    pub fn head(&self, x: &Tensor, row: &PreparedRow, options: LogProbOptions) -> Result<(Tensor, Distributions)> {
        let predictors = Tensor::from_slice(&row.row.predictors, row.row.predictors.len(), &Device::Cpu)?;
        let h = rms_norm(&x.index_select(&predictors, 0)?, &self.parameters.norm, self.config.rms_norm_eps)?;
        linear_log_prob(&h, self.parameters.head(), row.row.targets.clone(), options)
    }

    /// Log-probs of the row's completion tokens `[N]`, without a tape when nothing is tracked.
    pub fn log_probs(&self, row: Arc<Row>) -> Result<Vec<f32>> {
        let row = self.prepare(row)?;
        let mut x = self.embed(&row)?;
        for i in 0..self.num_blocks() {
            x = self.block(i, &x, &row)?;
        }
        let (logps, _) = self.head(&x, &row, LogProbOptions { distribution: false, gradient: false })?;
        logps.to_vec1()
    }
}

impl PreparedRow {
    /// The row.
    pub fn row(&self) -> &Arc<Row> {
        &self.row
    }
}

fn apply(p: &Projection, low_rank: Option<&LowRank>, scale: f64, x: &Tensor) -> Result<Tensor> {
    match low_rank {
        Some(l) => lora_linear(x, &p.weight, p.bias.as_ref(), &l.a, &l.b, scale),
        None => linear(x, &p.weight, p.bias.as_ref()),
    }
}
