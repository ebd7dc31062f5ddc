//! LoRA adapters (arXiv:2106.09685): W' = W + scale·B·A on selected linear layers of every block.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use super::error::ModelError;
use super::params::{Linear, LoraSpec, LoraTensor, lora_params};
use crate::domain::training::LoraConfig;
use crate::math::rng;

/// The low-rank update of one linear layer, with rank r.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// A `[r, in]`.
    pub a: Tensor,
    /// B `[out, r]`.
    pub b: Tensor,
}

/// An adapter for every block of a decoder.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Rank, α and target modules.
    pub config: LoraConfig,
    table: Arc<LoraTable>,
    /// One update per entry of `table.updates`, in the same order.
    updates: Vec<LowRank>,
}

#[derive(Debug)]
struct LoraTable {
    num_blocks: usize,
    updates: Vec<LoraSpec>,
    index: HashMap<(usize, Linear), usize>,
}

impl LoraTable {
    fn of(model: &ModelConfig, config: &LoraConfig) -> Arc<Self> {
        let updates = lora_params(&model.spec, config);
        let index = updates
            .iter()
            .enumerate()
            .map(|(i, update)| ((update.block, update.linear), i))
            .collect();
        Arc::new(LoraTable {
            num_blocks: model.spec.blocks.len(),
            updates,
            index,
        })
    }
}

impl Adapter {
    /// Makes an untrained adapter, initialised as in PEFT: A is drawn from U(−1/√in, 1/√in)
    /// and B is zero, so that the adapter has no effect yet. The values of a tensor depend only on
    /// `seed` and on the tensor's name.
    ///
    /// # Errors
    /// Fails if a tensor cannot be made.
    pub fn init(model: &ModelConfig, config: &LoraConfig, seed: u64) -> Result<Self, ModelError> {
        Self::build(model, config, |tensor| {
            let [rows, columns] = tensor.shape;
            let values = match tensor.is_a() {
                true => rng::kaiming_uniform(seed, &tensor.name, tensor.elements(), columns),
                false => vec![0f32; tensor.elements()],
            };
            Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
        })
    }

    /// Makes an adapter of the tensors that `get` returns. Calls `get` block by block, A before B.
    ///
    /// # Errors
    /// Returns the first error of `get`.
    pub fn build<E>(
        model: &ModelConfig,
        config: &LoraConfig,
        mut get: impl FnMut(&LoraTensor) -> Result<Tensor, E>,
    ) -> Result<Self, E> {
        let table = LoraTable::of(model, config);
        let update = |spec: &LoraSpec| {
            Ok::<_, E>(LowRank {
                a: get(&spec.a)?,
                b: get(&spec.b)?,
            })
        };
        let updates = table.updates.iter().map(update).collect::<Result<_, E>>()?;
        Ok(Adapter {
            config: config.clone(),
            table,
            updates,
        })
    }

    /// Returns the names of the adapted modules of the model. A fused layer has its own name here,
    /// also if `config` names all of its parts instead.
    pub fn target_modules(&self) -> Vec<String> {
        let mut names = self.config.target_modules.clone();
        for fused in [Linear::FusedQkv, Linear::FusedGateUp] {
            if self.get(0, fused).is_none() {
                continue;
            }
            let is_part = |name: &str| fused.parts().iter().any(|part| part.lora_target() == name);
            names.retain(|name| !is_part(name) && name != fused.lora_target());
            names.push(fused.lora_target().to_owned());
        }
        names
    }

    /// Returns the number of decoder blocks of the model that the adapter was made for.
    pub fn num_blocks(&self) -> usize {
        self.table.num_blocks
    }

    /// Returns the update of a linear layer, or `None` if the layer has none.
    pub fn get(&self, block: usize, linear: Linear) -> Option<&LowRank> {
        self.table
            .index
            .get(&(block, linear))
            .map(|i| &self.updates[*i])
    }

    /// Returns the adapter with every tensor replaced by `f(row of the table, tensor)`: block by
    /// block, A before B.
    ///
    /// # Errors
    /// Returns the first error of `f`.
    pub fn map<E>(
        &self,
        mut f: impl FnMut(&LoraTensor, &Tensor) -> Result<Tensor, E>,
    ) -> Result<Self, E> {
        let mapped = |(spec, low_rank): (&LoraSpec, &LowRank)| {
            Ok::<_, E>(LowRank {
                a: f(&spec.a, &low_rank.a)?,
                b: f(&spec.b, &low_rank.b)?,
            })
        };
        let updates = self
            .table
            .updates
            .iter()
            .zip(&self.updates)
            .map(mapped)
            .collect::<Result<_, E>>()?;
        Ok(Adapter {
            config: self.config.clone(),
            table: self.table.clone(),
            updates,
        })
    }

    /// Returns every tensor with its PEFT name.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        let both = |(spec, low_rank): (&LoraSpec, &LowRank)| {
            [
                (spec.a.name.clone(), low_rank.a.clone()),
                (spec.b.name.clone(), low_rank.b.clone()),
            ]
        };
        self.table
            .updates
            .iter()
            .zip(&self.updates)
            .flat_map(both)
            .collect()
    }

    /// Returns the adapter with the same storage, detached from candle's autograd graph.
    pub fn detached(&self) -> Self {
        let detached: Result<Adapter, Infallible> = self.map(|_, t| Ok(t.detach()));
        match detached {
            Ok(a) => a,
            Err(never) => match never {},
        }
    }
}
