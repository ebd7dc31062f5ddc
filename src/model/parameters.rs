//! The decoder's weights, one tensor for each row of the table of parameters ([`super::params`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Tensor, bail};

use super::config::ModelConfig;
use super::error::ModelError;
use super::params::{BlockParam, Linear, ParamId, ParamRole, ParamSpec, params};
use super::weight_matrix::WeightMatrix;
use crate::compute::cpu::{TensorRead, thread_pool};
use crate::domain::training::Precision;

/// Tensors that are read at one time at most: each is in memory twice or three times while it is
/// converted.
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
    pub weight: &'a WeightMatrix,
    /// b `[out]`.
    pub bias: Option<&'a Tensor>,
}

/// What an RMSNorm multiplies by.
pub enum NormFactors<'a> {
    /// The stored weight.
    Stored(TensorRead<'a>),
    /// 1 + the stored weight.
    PlusOne(Vec<f32>),
}

impl NormFactors<'_> {
    /// Returns the factors.
    ///
    /// # Errors
    /// When the stored weight is not f32.
    pub fn values(&self) -> candle_core::Result<&[f32]> {
        match self {
            NormFactors::Stored(held) => held.f32(),
            NormFactors::PlusOne(values) => Ok(values),
        }
    }
}

/// All weights of a decoder.
#[derive(Clone, Debug)]
pub struct Parameters {
    table: Arc<ParamTable>,
    /// In the table's order.
    values: Vec<Value>,
}

/// The value of a parameter.
#[derive(Clone, Debug)]
enum Value {
    Matrix(WeightMatrix),
    /// A norm's weight or a bias, in f32.
    Vector(Tensor),
}

impl Value {
    fn new(param: &ParamSpec, tensor: Tensor) -> candle_core::Result<Self> {
        Ok(match param.role {
            ParamRole::Matrix => Value::Matrix(WeightMatrix::new(tensor)?),
            ParamRole::Norm | ParamRole::Bias => Value::Vector(tensor),
        })
    }

    /// Returns it as a tensor that shares its storage.
    fn tensor(&self) -> Tensor {
        match self {
            Value::Matrix(matrix) => matrix.tensor(),
            Value::Vector(tensor) => tensor.clone(),
        }
    }
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
    /// Loads every tensor the configuration calls for, shapes checked: matrices as `precision`
    /// says, norms and biases in f32. Several cores read and convert.
    pub fn load(
        config: &ModelConfig,
        weights: &impl TensorSource,
        precision: Precision,
    ) -> Result<Self, ModelError> {
        type Read = Option<Result<Tensor, ModelError>>;
        let failed = AtomicBool::new(false);
        let table = ParamTable::of(config);
        let mut all: Vec<(&ParamSpec, Read)> =
            table.params.iter().map(|param| (param, None)).collect();
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
        let value = |(param, read): (&ParamSpec, Read)| {
            let tensor = read.unwrap_or_else(|| weights.load(param, precision))?;
            Ok::<_, ModelError>(Value::new(param, tensor)?)
        };
        let values = all.into_iter().map(value).collect::<Result<_, _>>()?;
        Ok(Parameters { table, values })
    }

    /// Makes each tensor with `get`, in the table's order.
    ///
    /// # Errors
    /// The first one of `get`, and those of [`WeightMatrix::new`].
    pub fn build<E: From<candle_core::Error>>(
        config: &ModelConfig,
        mut get: impl FnMut(&ParamSpec) -> Result<Tensor, E>,
    ) -> Result<Self, E> {
        let table = ParamTable::of(config);
        let value = |param| Ok::<_, E>(Value::new(param, get(param)?)?);
        let values = table.params.iter().map(value).collect::<Result<_, E>>()?;
        Ok(Parameters { table, values })
    }

    /// Returns the number of decoder blocks.
    pub fn num_blocks(&self) -> usize {
        self.table.num_blocks
    }

    /// Returns every value with its row of the table, in the table's order.
    fn iter(&self) -> impl Iterator<Item = (&ParamSpec, &Value)> {
        self.table.params.iter().zip(&self.values)
    }

    fn value(&self, id: ParamId) -> Option<&Value> {
        self.table.index.get(&id).map(|i| &self.values[*i])
    }

    /// Returns true if the model has a parameter of this id.
    pub fn has(&self, id: ParamId) -> bool {
        self.value(id).is_some()
    }

    /// Returns a parameter as a tensor that shares its storage; `None` when the model has none of
    /// this id.
    pub fn get(&self, id: ParamId) -> Option<Tensor> {
        self.value(id).map(Value::tensor)
    }

    /// Returns a matrix that the model must have.
    ///
    /// # Errors
    /// When it has no matrix of this id.
    pub fn matrix(&self, id: ParamId) -> candle_core::Result<&WeightMatrix> {
        match self.value(id) {
            Some(Value::Matrix(matrix)) => Ok(matrix),
            Some(Value::Vector(_)) => bail!("{id:?} is no matrix"),
            None => bail!("the model has no {id:?}"),
        }
    }

    /// Returns the weight of a norm, or a bias, that the model must have.
    ///
    /// # Errors
    /// When it has none of this id.
    pub fn vector(&self, id: ParamId) -> candle_core::Result<&Tensor> {
        match self.value(id) {
            Some(Value::Vector(tensor)) => Ok(tensor),
            Some(Value::Matrix(_)) => bail!("{id:?} is a matrix"),
            None => bail!("the model has no {id:?}"),
        }
    }

    /// Returns the RMSNorms of a block.
    pub fn norms(&self, block: usize) -> impl Iterator<Item = BlockParam> {
        self.table.params.iter().filter_map(move |param| match param.id {
            ParamId::Block(index, norm) if index == block && norm.is_norm() => Some(norm),
            _ => None,
        })
    }

    /// Returns the factors of an RMSNorm.
    ///
    /// # Errors
    /// When the model has none of this id.
    pub fn norm(&self, id: ParamId) -> candle_core::Result<NormFactors<'_>> {
        let held = TensorRead::of(self.vector(id)?)?;
        let adds_one = self.table.index.get(&id).is_some_and(|i| self.table.params[*i].adds_one);
        Ok(match adds_one {
            false => NormFactors::Stored(held),
            true => NormFactors::PlusOne(held.f32()?.iter().map(|w| 1.0 + w).collect()),
        })
    }

    /// Returns the tensors of a linear layer.
    ///
    /// # Errors
    /// When the block has no such layer.
    pub fn linear(&self, block: usize, linear: Linear) -> candle_core::Result<Projection<'_>> {
        let weight = self.matrix(ParamId::Block(block, BlockParam::Weight(linear)))?;
        let bias = ParamId::Block(block, BlockParam::Bias(linear));
        Ok(Projection { weight, bias: self.has(bias).then(|| self.vector(bias)).transpose()? })
    }

    /// Returns which tensor the head is: its own, or the embedding when the two are tied.
    pub fn head_id(&self) -> ParamId {
        if self.has(ParamId::Head) { ParamId::Head } else { ParamId::Embedding }
    }

    /// Returns the head `[V, C]`.
    ///
    /// # Errors
    /// Never, for a table of [`params`].
    pub fn head(&self) -> candle_core::Result<&WeightMatrix> {
        self.matrix(self.head_id())
    }

    /// Replaces every tensor by `f(its row of the table, tensor)`, in the table's order.
    ///
    /// # Errors
    /// The first one of `f`, and those of [`WeightMatrix::new`].
    pub fn map<E: From<candle_core::Error>>(
        &self,
        mut f: impl FnMut(&ParamSpec, &Tensor) -> Result<Tensor, E>,
    ) -> Result<Self, E> {
        let replaced = |(param, value): (&ParamSpec, &Value)| {
            Ok::<_, E>(Value::new(param, f(param, &value.tensor())?)?)
        };
        let values = self.iter().map(replaced).collect::<Result<_, E>>()?;
        Ok(Parameters { table: self.table.clone(), values })
    }

    /// Returns every tensor with its name, in the table's order.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        self.iter().map(|(param, value)| (param.name().to_owned(), value.tensor())).collect()
    }

    /// Returns a function that finds the tensor of a row of the table.
    ///
    /// # Errors
    /// The function returns [`ModelError::MissingTensor`] for one that is not there.
    pub fn reader(&self) -> impl Fn(&ParamSpec) -> Result<Tensor, ModelError> {
        |param| {
            let missing = || ModelError::MissingTensor {
                name: param.name().to_owned(),
                path: "memory".into(),
            };
            self.get(param.id).ok_or_else(missing)
        }
    }
}
