//! The decoder's weights, one tensor for each row of the table of parameters ([`super::params`]).

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Tensor, bail};

use super::config::ModelConfig;
use super::error::ModelError;
use super::params::{BlockParam, Linear, ParamId, ParamSpec, params};
use crate::compute::cpu::thread_pool;
use crate::domain::training::Precision;

/// Tensors that are read at one time at most: each is in memory twice or three times while it is converted.
const READERS: usize = 8;

/// Where tensors are read from.
pub trait TensorSource: Sync {
    /// Reads a parameter's tensor, contiguous, on the CPU: a matrix in `precision`, norms and
    /// biases in f32.
    ///
    /// # Errors
    /// When it cannot be read or is not what the table of parameters says.
    fn load(&self, param: &ParamSpec, precision: Precision) -> Result<Tensor, ModelError>;
}

/// A linear layer's tensors: y = x·Wᵀ + b.
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// W `[out, in]`.
    pub weight: &'a Tensor,
    /// b `[out]`.
    pub bias: Option<&'a Tensor>,
}

/// All weights of a decoder.
#[derive(Clone, Debug)]
pub struct Parameters {
    table: Arc<ParamTable>,
    /// In the table's order.
    tensors: Vec<Tensor>,
}

#[derive(Debug)]
struct ParamTable {
    num_blocks: usize,
    params: Vec<ParamSpec>,
    index: HashMap<ParamId, usize>,
}

impl ParamTable {
    fn of(config: &ModelConfig) -> Arc<Self> {
        let params = params(&config.spec);
        let index = params.iter().enumerate().map(|(i, param)| (param.id, i)).collect();
        Arc::new(ParamTable { num_blocks: config.spec.blocks.len(), params, index })
    }
}

impl Parameters {
    /// Loads every tensor the configuration calls for, shapes checked: matrices as `precision` says, norms and biases in f32. Several cores read and convert.
    pub fn load(config: &ModelConfig, weights: &impl TensorSource, precision: Precision) -> Result<Self, ModelError> {
        type Read = Option<Result<Tensor, ModelError>>;
        let failed = AtomicBool::new(false);
        let table = ParamTable::of(config);
        let mut all: Vec<(&ParamSpec, Read)> = table.params.iter().map(|param| (param, None)).collect();
        let each = all.len().div_ceil(READERS);
        thread_pool::chunks(&mut all, each, |_, part| {
            for (param, read) in part {
                if failed.load(Ordering::Relaxed) {
                    return;
                }
                let tensor = weights.load(param, precision);
                failed.fetch_or(tensor.is_err(), Ordering::Relaxed);
                *read = Some(tensor);
            }
        });
        // After an error, what was not read yet is read here, so that the error is always that of
        // the first tensor that has one.
        let read = |(param, read): (&ParamSpec, Read)| read.unwrap_or_else(|| weights.load(param, precision));
        let tensors = all.into_iter().map(read).collect::<Result<_, _>>()?;
        Ok(Parameters { table, tensors })
    }

    /// Makes each tensor with `get`, in the table's order.
    pub fn build<E>(config: &ModelConfig, get: impl FnMut(&ParamSpec) -> Result<Tensor, E>) -> Result<Self, E> {
        let table = ParamTable::of(config);
        let tensors = table.params.iter().map(get).collect::<Result<_, E>>()?;
        Ok(Parameters { table, tensors })
    }

    /// Returns the number of decoder blocks.
    pub fn num_blocks(&self) -> usize {
        self.table.num_blocks
    }

    /// Returns every tensor with its row of the table, in the table's order.
    pub fn iter(&self) -> impl Iterator<Item = (&ParamSpec, &Tensor)> {
        self.table.params.iter().zip(&self.tensors)
    }

    /// Returns a tensor; `None` when the model has none of this id.
    pub fn get(&self, id: ParamId) -> Option<&Tensor> {
        self.table.index.get(&id).map(|i| &self.tensors[*i])
    }

    /// Returns a tensor that the model must have.
    ///
    /// # Errors
    /// When it has none of this id.
    pub fn tensor(&self, id: ParamId) -> candle_core::Result<&Tensor> {
        match self.get(id) {
            Some(tensor) => Ok(tensor),
            None => bail!("the model has no {id:?}"),
        }
    }

    /// Returns the tensors of a linear layer.
    ///
    /// # Errors
    /// When the block has no such layer.
    pub fn linear(&self, block: usize, linear: Linear) -> candle_core::Result<Projection<'_>> {
        let weight = self.tensor(ParamId::Block(block, BlockParam::Weight(linear)))?;
        Ok(Projection { weight, bias: self.get(ParamId::Block(block, BlockParam::Bias(linear))) })
    }

    /// Returns which tensor the head is: its own, or the embedding when the two are tied.
    pub fn head_id(&self) -> ParamId {
        if self.get(ParamId::Head).is_some() { ParamId::Head } else { ParamId::Embedding }
    }

    /// Returns the head `[V, C]`.
    ///
    /// # Errors
    /// Never, for a table of [`params`].
    pub fn head(&self) -> candle_core::Result<&Tensor> {
        self.tensor(self.head_id())
    }

    /// Replaces every tensor by `f(its row of the table, tensor)`, in the table's order.
    pub fn map<E>(&self, mut f: impl FnMut(&ParamSpec, &Tensor) -> Result<Tensor, E>) -> Result<Self, E> {
        let tensors = self.iter().map(|(param, tensor)| f(param, tensor)).collect::<Result<_, E>>()?;
        Ok(Parameters { table: self.table.clone(), tensors })
    }

    /// Returns every tensor with its name, in the table's order.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        self.iter().map(|(param, tensor)| (param.name().to_owned(), tensor.clone())).collect()
    }

    /// Returns a function that finds the tensor of a row of the table.
    ///
    /// # Errors
    /// The function returns [`ModelError::MissingTensor`] for one that is not there.
    pub fn reader(&self) -> impl Fn(&ParamSpec) -> Result<Tensor, ModelError> {
        |param| {
            let missing = || ModelError::MissingTensor { name: param.name().to_owned(), path: "memory".into() };
            self.get(param.id).cloned().ok_or_else(missing)
        }
    }

    /// The same storage, untracked: operations on it leave no tape.
    pub fn detached(&self) -> Self {
        let detached: Result<Parameters, Infallible> = self.map(|_, t| Ok(t.detach()));
        match detached {
            Ok(p) => p,
            Err(never) => match never {},
        }
    }
}
