//! A policy: the weights of a decoder, an optional adapter, and the devices that run its passes.
//! The head runs only on the tokens that predict completion tokens.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, bail};

use super::adapter::Adapter;
use super::backend::PolicyView;
use super::config::ModelConfig;
use super::cpu::CpuRow;
use super::device::ComputeDevice;
use super::parameters::Parameters;
use super::pass;
use super::rope::RopeConfig;
use super::row::{PreparedRow, Row, RowRope};
use crate::compute::cpu::gemm::Kernel;
use crate::compute::cpu::rope::RopeTable;
use crate::compute::layout::RowLayout;
use crate::domain::training::Precision;

/// A model that assigns probabilities to tokens: a base model with an optional adapter.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Configuration of the base model.
    pub config: Arc<ModelConfig>,
    /// The base weights. All policies on the same base model share them.
    pub parameters: Arc<Parameters>,
    /// The adapter; `None` for the base model alone.
    pub adapter: Option<Arc<Adapter>>,
    /// Precision of the matrix multiplications.
    pub precision: Precision,
    /// The device that runs the passes.
    pub device: ComputeDevice,
    /// Further devices that take a share of the rows (data parallelism).
    pub helpers: Arc<[ComputeDevice]>,
}

impl Policy {
    /// Returns the parts of the policy that passes read.
    pub fn view(&self) -> PolicyView<'_> {
        PolicyView {
            spec: &self.config.spec,
            parameters: &self.parameters,
            adapter: self.adapter.as_ref(),
            precision: self.precision,
        }
    }

    /// Returns the base model without the adapter.
    pub fn base(&self) -> Policy {
        Policy {
            adapter: None,
            ..self.clone()
        }
    }

    /// Returns the policy on `device` alone, without helpers.
    pub fn on(&self, device: &ComputeDevice) -> Policy {
        Policy {
            device: device.clone(),
            helpers: Arc::default(),
            ..self.clone()
        }
    }

    /// Iterates over the policy's own device, then its helpers.
    pub fn devices(&self) -> impl Iterator<Item = &ComputeDevice> {
        std::iter::once(&self.device).chain(self.helpers.iter())
    }

    /// Returns the policy with another precision of the matrix multiplications.
    pub fn with_precision(&self, precision: Precision) -> Policy {
        Policy {
            precision,
            ..self.clone()
        }
    }

    /// Returns true if both policies have the same base weights and the same precision. The
    /// adapters may differ.
    pub fn shares_base(&self, other: &Policy) -> bool {
        Arc::ptr_eq(&self.parameters, &other.parameters) && self.precision == other.precision
    }

    /// Returns the GEMM kernel that the policy uses on this machine's CPU.
    pub fn kernel(&self) -> Kernel {
        Kernel::best(self.precision)
    }

    /// Returns a name for everything that affects rounding: the precision and, for each device, the
    /// GEMM kernel or the GPU and its cuBLAS version. Results are bit-identical only under the same
    /// name. Helpers are included; equal names appear once.
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

    /// Returns the number of decoder blocks.
    pub fn num_blocks(&self) -> usize {
        self.parameters.num_blocks()
    }

    /// Prepares a row for a pass: checks its token ids and computes its rotary tables.
    ///
    /// # Errors
    /// Fails if a token id is outside the model's vocabulary.
    pub fn prepare(&self, row: Arc<Row>) -> Result<PreparedRow> {
        let vocabulary = self.config.spec.vocab_size;
        if let Some(bad) = row
            .ids
            .iter()
            .chain(row.targets.iter())
            .find(|id| **id as usize >= vocabulary)
        {
            bail!("token id {bad} is outside the model's vocabulary of {vocabulary}");
        }
        let spec = &self.config.spec;
        let table = |rope: &RopeConfig| row_rope(rope, spec.head_dim(), &row.layout);
        let ropes = spec.ropes.iter().map(table).collect();
        Ok(PreparedRow::new(row, ropes))
    }

    /// Returns the log-probs of the row's completion tokens `[N]`. `yield_point` is called before
    /// every block.
    ///
    /// # Errors
    /// Fails if a token id is outside the vocabulary, or the device fails or has no memory left.
    pub fn log_probs(&self, row: Arc<Row>, yield_point: &mut dyn FnMut()) -> Result<Vec<f32>> {
        self.log_probs_of(self.prepare(row)?, yield_point)
    }

    /// Returns the log-probs of the row's completion tokens `[N]`, with adapters on parts of the
    /// row. The GEMMs of the base model are shared, and each adapter's low-rank terms are added to
    /// its own range of tokens. A token's results are those with its adapter alone: bit-identical
    /// on the CPU, up to rounding on a GPU.
    ///
    /// # Errors
    /// Fails as [`Policy::log_probs`] does, and if the policy itself has an adapter.
    pub fn log_probs_with(
        &self,
        row: Arc<Row>,
        adapters: Vec<(Range<usize>, Arc<Adapter>)>,
        yield_point: &mut dyn FnMut(),
    ) -> Result<Vec<f32>> {
        if self.adapter.is_some() && !adapters.is_empty() {
            bail!("adapters on parts of a row need a base model without an adapter");
        }
        let row = PreparedRow {
            adapters,
            ..self.prepare(row)?
        };
        self.log_probs_of(row, yield_point)
    }

    fn log_probs_of(&self, row: PreparedRow, yield_point: &mut dyn FnMut()) -> Result<Vec<f32>> {
        match &self.device {
            ComputeDevice::Cpu => pass::log_probs(&CpuRow::new(self.view(), &row), yield_point),
            ComputeDevice::Cuda(cuda) => cuda.log_probs(self.view(), &row, yield_point),
        }
    }
}

/// Computes the rotary tables of a row. The frequencies of a sequence may depend on its length. All
/// sequences of a prompt must have the same frequencies; the packer places others with a copy of
/// the prompt.
fn row_rope(rope: &RopeConfig, head_dim: usize, layout: &RowLayout) -> RowRope {
    let lengths = layout.sequence_lengths();
    let classes: Vec<usize> = lengths
        .iter()
        .map(|length| rope.length_class(*length))
        .collect();
    let mut frequencies: HashMap<usize, Vec<f32>> = HashMap::new();
    for (class, length) in classes.iter().zip(&lengths) {
        let inv_freq = || rope.inv_freq_at(head_dim, *length).0;
        frequencies.entry(*class).or_insert_with(inv_freq);
    }
    let segments = layout.segments.iter().zip(&classes).map(|(s, class)| {
        let first = s.prefix.len() as u32;
        let positions = first..first + s.tokens.len() as u32;
        (positions, frequencies[class].as_slice())
    });
    let (_, factor) = rope.inv_freq(head_dim);
    let table = RopeTable::new(segments, factor, rope.pairs);
    let queries = rope.query_scaling.map(|scaling| {
        let positions = layout.positions();
        let factors: Vec<f32> = positions.iter().map(|p| scaling.factor(*p)).collect();
        table.scaled(&factors)
    });
    RowRope { table, queries }
}
