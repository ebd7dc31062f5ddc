//! The decoder: one parametrised Llama-family model over packed rows, forward and backward. The head runs on completion tokens only.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, bail};

use super::adapter::Adapter;
use super::block::{self, BlockTape};
use super::config::ModelConfig;
use super::device::ComputeDevice;
use super::gradients::GradientSink;
use super::layout::RowLayout;
use super::ops::Held;
use super::ops::buffer::Buffer;
use super::ops::gemm::{Elements, Kernel};
use super::ops::head::{HeadOptions, HeadOutput, head, head_weight_gradient};
use super::ops::rms_norm::{rms_norm, rms_norm_backward};
use super::ops::rope::RopeTable;
use super::ops::team;
use super::parameters::Parameters;
use super::params::ParamId;
use crate::domain::training::Precision;

/// Weights that give probabilities: a base model, perhaps with an adapter on it.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The shape.
    pub config: Arc<ModelConfig>,
    /// The base weights; shared by every policy of the same base.
    pub parameters: Arc<Parameters>,
    /// The adapter.
    pub adapter: Option<Arc<Adapter>>,
    /// What matrix products are computed in.
    pub precision: Precision,
    /// Where.
    pub device: ComputeDevice,
    /// Devices that take a share of the rows where there are several: data parallelism.
    pub helpers: Arc<[ComputeDevice]>,
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
    pub(super) rope: RopeTable,
    /// Adapters on parts of the row, besides the policy's own; only for passes without a tape.
    pub(super) adapters: Vec<(Range<usize>, Arc<Adapter>)>,
}

impl PreparedRow {
    /// The row.
    pub fn row(&self) -> &Arc<Row> {
        &self.row
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.row.ids.len()
    }
}

/// What a forward pass keeps for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Every block's tape.
    Tapes,
    /// Every block's input; the block runs again in the backward pass.
    Inputs,
    /// Nothing: for evaluation.
    Nothing,
}

/// What the backward pass needs of the head.
pub struct HeadTape {
    /// The predictors' hidden states before and after the last norm `[N, C]`.
    before_norm: Buffer,
    normed: Buffer,
}

impl Policy {
    /// The base model without the adapter.
    pub fn base(&self) -> Policy {
        Policy { adapter: None, ..self.clone() }
    }

    /// The same weights on another device alone.
    pub fn on(&self, device: &ComputeDevice) -> Policy {
        Policy { device: device.clone(), helpers: Arc::default(), ..self.clone() }
    }

    /// Its own device, then those that help it.
    pub fn devices(&self) -> impl Iterator<Item = &ComputeDevice> {
        std::iter::once(&self.device).chain(self.helpers.iter())
    }

    /// The same weights, multiplied in another precision.
    pub fn with_precision(&self, precision: Precision) -> Policy {
        Policy { precision, ..self.clone() }
    }

    /// Whether both are the same base weights in the same precision, apart from their adapters.
    pub fn shares_base(&self, other: &Policy) -> bool {
        Arc::ptr_eq(&self.parameters, &other.parameters) && self.precision == other.precision
    }

    /// The kernel of its matrix products on this machine.
    pub fn kernel(&self) -> Kernel {
        Kernel::best(self.precision)
    }

    /// Names what decides the last bits of its numbers: the precision, and the kernel or the GPU and its version of cuBLAS. Devices that share the
    /// rows are all named, each kind once.
    pub fn arithmetic(&self) -> String {
        let mut names: Vec<String> = Vec::new();
        for device in self.devices() {
            let name = device.arithmetic(self.kernel());
            if !names.contains(&name) {
                names.push(name);
            }
        }
        format!("{} {}", names.join(" and "), self.precision.name())
    }

    /// Decoder blocks.
    pub fn num_blocks(&self) -> usize {
        self.parameters.num_blocks()
    }

    /// Computes a row's rotary tables.
    pub fn prepare(&self, row: Arc<Row>) -> Result<PreparedRow> {
        let vocabulary = self.config.spec.vocab_size;
        if let Some(bad) = row.ids.iter().chain(row.targets.iter()).find(|id| **id as usize >= vocabulary) {
            bail!("token id {bad} is outside the model's vocabulary of {vocabulary}");
        }
        let spec = &self.config.spec;
        let (inv_freq, factor) = spec.rope.inv_freq(spec.head_dim());
        let rope = RopeTable::new(&row.layout.positions(), &inv_freq, factor);
        Ok(PreparedRow { row, rope, adapters: Vec::new() })
    }

    /// The embedded row `[T, C]`.
    pub fn embed(&self, row: &PreparedRow) -> Result<Buffer> {
        let width = self.config.spec.hidden_size;
        let held = Held::of(self.parameters.tensor(ParamId::Embedding)?)?;
        let mut x = Buffer::dirty(row.tokens() * width);
        for (to, &id) in x.chunks_mut(width).zip(&row.row.ids) {
            let at = id as usize * width;
            match held.elements() {
                Elements::F32(w) => to.copy_from_slice(&w[at..at + width]),
                Elements::Bf16(w) => to.iter_mut().zip(&w[at..at + width]).for_each(|(x, w)| *x = w.to_f32()),
            }
        }
        Ok(x)
    }

    /// Block `index` on `x` `[T, C]`; with `keep`, leaves a tape.
    pub fn block(&self, index: usize, x: Buffer, row: &PreparedRow, keep: bool) -> Result<(Buffer, Option<BlockTape>)> {
        block::forward(self, index, x, row, keep)
    }

    /// Turns `gx` from the gradient of block `index`'s output into that of its input.
    pub fn block_backward(
        &self,
        index: usize,
        tape: BlockTape,
        row: &PreparedRow,
        gx: &mut [f32],
        sink: &mut dyn GradientSink,
    ) -> Result<()> {
        block::backward(self, index, tape, row, gx, sink)
    }

    /// Log-probs of the row's completion tokens, from the last block's output `[T, C]`.
    pub fn head(&self, x: &[f32], row: &PreparedRow, options: HeadOptions) -> Result<(HeadOutput, HeadTape)> {
        let width = self.config.spec.hidden_size;
        let mut before_norm = Buffer::dirty(row.row.predictors.len() * width);
        team::chunks(&mut before_norm, width, |i, to| to.copy_from_slice(&x[row.row.predictors[i] as usize * width..][..width]));
        let mut normed = Buffer::dirty(before_norm.len());
        let norm = Held::of(self.parameters.tensor(ParamId::Norm)?)?;
        rms_norm(&before_norm, norm.f32()?, self.config.spec.rms_norm_eps as f32, &mut normed);
        let w = Held::of(self.parameters.head()?)?;
        let output = head(self.kernel(), &normed, w.elements(), width, &row.row.targets, options);
        Ok((output, HeadTape { before_norm, normed }))
    }

    /// ∂loss/∂(last block's output) `[T, C]`, given g = ∂loss/∂log p `[N]`.
    pub fn head_backward(
        &self,
        tape: HeadTape,
        mut output: HeadOutput,
        row: &PreparedRow,
        g: &[f32],
        sink: &mut dyn GradientSink,
    ) -> Result<Buffer> {
        let width = self.config.spec.hidden_size;
        let HeadTape { before_norm, normed } = tape;
        if output.gradient.len() != g.len() * width {
            bail!("backward was not asked for in the head's forward pass");
        }
        if let Some(slot) = sink.slot(self.parameters.head_id()) {
            let w = Held::of(self.parameters.head()?)?;
            head_weight_gradient(self.kernel(), &normed, w.elements(), width, &row.row.targets, &mut output, g, slot);
        }
        team::chunks(&mut output.gradient, width, |i, row| row.iter_mut().for_each(|x| *x *= g[i]));
        let mut dh = Buffer::zeros(before_norm.len());
        let norm = Held::of(self.parameters.tensor(ParamId::Norm)?)?;
        let eps = self.config.spec.rms_norm_eps as f32;
        rms_norm_backward(&before_norm, norm.f32()?, &output.gradient, eps, &mut dh, sink.slot(ParamId::Norm));
        let mut gx = Buffer::zeros(row.tokens() * width);
        for (from, &p) in dh.chunks(width).zip(&row.row.predictors) {
            gx[p as usize * width..][..width].iter_mut().zip(from).for_each(|(x, d)| *x += d);
        }
        Ok(gx)
    }

    /// Adds the gradient of the embedded row `[T, C]` to the embedding's, when that is trained.
    pub fn embed_backward(&self, row: &PreparedRow, gx: &[f32], sink: &mut dyn GradientSink) {
        let width = self.config.spec.hidden_size;
        if let Some(slot) = sink.slot(ParamId::Embedding) {
            for (from, &id) in gx.chunks(width).zip(&row.row.ids) {
                slot[id as usize * width..][..width].iter_mut().zip(from).for_each(|(s, g)| *s += g);
            }
        }
    }

    /// Log-probs of the row's completion tokens `[N]`. `pause` is called before every block.
    pub fn log_probs(&self, row: Arc<Row>, pause: &mut dyn FnMut()) -> Result<Vec<f32>> {
        self.log_probs_of(self.prepare(row)?, pause)
    }

    /// [`Policy::log_probs`] with other adapters on parts of the row: the base's products are shared, each adapter's low-rank terms are added to its
    /// own tokens. A token's numbers are those that it would have with its adapter alone, bit for bit.
    pub fn log_probs_with(&self, row: Arc<Row>, adapters: Vec<(Range<usize>, Arc<Adapter>)>, pause: &mut dyn FnMut()) -> Result<Vec<f32>> {
        if self.adapter.is_some() && !adapters.is_empty() {
            bail!("adapters on parts of a row need a base without one");
        }
        self.log_probs_of(PreparedRow { adapters, ..self.prepare(row)? }, pause)
    }

    fn log_probs_of(&self, row: PreparedRow, pause: &mut dyn FnMut()) -> Result<Vec<f32>> {
        if let ComputeDevice::Cuda(cuda) = &self.device {
            return cuda.log_probs(self, &row, pause);
        }
        let mut x = self.embed(&row)?;
        for i in 0..self.num_blocks() {
            pause();
            x = self.block(i, x, &row, false)?.0;
        }
        Ok(self.head(&x, &row, HeadOptions::default())?.0.log_probs)
    }
}
