//! A policy: the weights of one parametrised Llama-family model, and where its passes run. The head
//! runs on completion tokens only.

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
use super::row::{PreparedRow, Row};
use crate::compute::cpu::gemm::Kernel;
use crate::compute::cpu::rope::RopeTable;
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

impl Policy {
    /// Returns what passes read of it.
    pub fn view(&self) -> PolicyView<'_> {
        PolicyView {
            spec: &self.config.spec,
            parameters: &self.parameters,
            adapter: self.adapter.as_ref(),
            precision: self.precision,
        }
    }

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

    /// Names what decides the last bits of its numbers: the precision, and the kernel or the GPU
    /// and its version of cuBLAS. Devices that share the rows are all named, each kind once.
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
        if let Some(bad) =
            row.ids.iter().chain(row.targets.iter()).find(|id| **id as usize >= vocabulary)
        {
            bail!("token id {bad} is outside the model's vocabulary of {vocabulary}");
        }
        let spec = &self.config.spec;
        let positions = row.layout.positions();
        let table = |rope: &RopeConfig| {
            let (inv_freq, factor) = rope.inv_freq(spec.head_dim());
            RopeTable::new(&positions, &inv_freq, factor)
        };
        let ropes = spec.ropes.iter().map(table).collect();
        Ok(PreparedRow::new(row, ropes))
    }

    /// Log-probs of the row's completion tokens `[N]`. `pause` is called before every block.
    pub fn log_probs(&self, row: Arc<Row>, pause: &mut dyn FnMut()) -> Result<Vec<f32>> {
        self.log_probs_of(self.prepare(row)?, pause)
    }

    /// [`Policy::log_probs`] with other adapters on parts of the row: the base's products are
    /// shared, each adapter's low-rank terms are added to its own tokens. A token's numbers are
    /// those that it would have with its adapter alone, bit for bit.
    pub fn log_probs_with(
        &self,
        row: Arc<Row>,
        adapters: Vec<(Range<usize>, Arc<Adapter>)>,
        pause: &mut dyn FnMut(),
    ) -> Result<Vec<f32>> {
        if self.adapter.is_some() && !adapters.is_empty() {
            bail!("adapters on parts of a row need a base without one");
        }
        let row = PreparedRow { adapters, ..self.prepare(row)? };
        self.log_probs_of(row, pause)
    }

    fn log_probs_of(&self, row: PreparedRow, pause: &mut dyn FnMut()) -> Result<Vec<f32>> {
        match &self.device {
            ComputeDevice::Cpu => pass::log_probs(&CpuRow::new(self.view(), &row), pause),
            ComputeDevice::Cuda(cuda) => cuda.log_probs(self.view(), &row, pause),
        }
    }
}
