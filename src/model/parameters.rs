//! The weights of a decoder: one tensor per row of the table of parameters ([`super::params`]).

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

/// Maximum number of tensors that are read at the same time. It bounds the memory peak: while a
/// tensor is converted, two or three copies of it are in memory.
const MAX_READERS: usize = 8;

/// Source of a model's tensors, e.g. its files.
pub trait TensorSource: Sync {
    /// Reads the tensor of a parameter to host memory, contiguous: a matrix in `precision`, norms
    /// and biases in f32.
    ///
    /// # Errors
    /// Fails if the tensor cannot be read or does not match the table of parameters.
    fn load(&self, param: &ParamSpec, precision: Precision) -> Result<Tensor, ModelError>;
}

/// The tensors of a linear layer: y = x·Wᵀ + b.
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// W `[out, in]`.
    pub weight: &'a WeightMatrix,
    /// b `[out]`.
    pub bias: Option<&'a Tensor>,
}

/// Factors `[width]` that an RMSNorm multiplies by.
pub enum NormFactors<'a> {
    /// The stored weight w.
    Stored(TensorRead<'a>),
    /// 1 + w, computed from the stored weight.
    PlusOne(Vec<f32>),
}

impl NormFactors<'_> {
    /// Returns the factors.
    ///
    /// # Errors
    /// Fails if the stored weight is not f32.
    pub fn values(&self) -> candle_core::Result<&[f32]> {
        match self {
            NormFactors::Stored(weight) => weight.f32(),
            NormFactors::PlusOne(values) => Ok(values),
        }
    }
}

/// All weights of a decoder.
#[derive(Clone, Debug)]
pub struct Parameters {
    table: Arc<ParamTable>,
    /// One value per row of `table`, in the same order.
    values: Vec<Value>,
}

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

    /// Returns a tensor that shares the storage of the value.
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
        let index = params
            .iter()
            .enumerate()
            .map(|(i, param)| (param.id, i))
            .collect();
        Arc::new(ParamTable {
            num_blocks: config.spec.blocks.len(),
            params,
            index,
        })
    }
}

impl Parameters {
    /// Loads every tensor that the configuration requires: matrices in `precision`, norms and
    /// biases in f32. Several threads read and convert at the same time.
    ///
    /// # Errors
    /// Returns the error of the first tensor, in the table's order, that cannot be loaded.
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
        let tensors_per_reader = all.len().div_ceil(MAX_READERS);
        thread_pool::chunks(&mut all, tensors_per_reader, |_, part| {
            for (param, read) in part {
                if failed.load(Ordering::Relaxed) {
                    return;
                }
                let tensor = weights.load(param, precision);
                failed.fetch_or(tensor.is_err(), Ordering::Relaxed);
                *read = Some(tensor);
            }
        });
        // After an error, tensors that were skipped are read here. The reported error is thus
        // always that of the first faulty tensor in the table's order.
        let value = |(param, read): (&ParamSpec, Read)| {
            let tensor = read.unwrap_or_else(|| weights.load(param, precision))?;
            Ok::<_, ModelError>(Value::new(param, tensor)?)
        };
        let values = all.into_iter().map(value).collect::<Result<_, _>>()?;
        Ok(Parameters { table, values })
    }

    /// Makes the parameters of the tensors that `get` returns. Calls `get` in the table's order.
    ///
    /// # Errors
    /// Returns the first error of `get`, and the errors of [`WeightMatrix::new`].
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

    /// Iterates over the rows of the table, each with its value.
    fn iter(&self) -> impl Iterator<Item = (&ParamSpec, &Value)> {
        self.table.params.iter().zip(&self.values)
    }

    fn value(&self, id: ParamId) -> Option<&Value> {
        self.table.index.get(&id).map(|i| &self.values[*i])
    }

    /// Returns true if the model has a parameter with this id.
    pub fn has(&self, id: ParamId) -> bool {
        self.value(id).is_some()
    }

    /// Returns a tensor that shares the storage of a parameter. Returns `None` if the model has no
    /// parameter with this id.
    pub fn get(&self, id: ParamId) -> Option<Tensor> {
        self.value(id).map(Value::tensor)
    }

    /// Returns a matrix that the model must have.
    ///
    /// # Errors
    /// Fails if the model has no matrix with this id.
    pub fn matrix(&self, id: ParamId) -> candle_core::Result<&WeightMatrix> {
        match self.value(id) {
            Some(Value::Matrix(matrix)) => Ok(matrix),
            Some(Value::Vector(_)) => bail!("{id:?} is not a matrix"),
            None => bail!("the model has no {id:?}"),
        }
    }

    /// Returns the weight of a norm, or a bias, that the model must have.
    ///
    /// # Errors
    /// Fails if the model has no norm or bias with this id.
    pub fn vector(&self, id: ParamId) -> candle_core::Result<&Tensor> {
        match self.value(id) {
            Some(Value::Vector(tensor)) => Ok(tensor),
            Some(Value::Matrix(_)) => bail!("{id:?} is a matrix"),
            None => bail!("the model has no {id:?}"),
        }
    }

    /// Iterates over the RMSNorms of a block.
    pub fn norms(&self, block: usize) -> impl Iterator<Item = BlockParam> {
        self.table
            .params
            .iter()
            .filter_map(move |param| match param.id {
                ParamId::Block(index, norm) if index == block && norm.is_norm() => Some(norm),
                _ => None,
            })
    }

    /// Returns the factors of an RMSNorm.
    ///
    /// # Errors
    /// Fails if the model has no norm with this id, or the stored weight is not f32.
    pub fn norm(&self, id: ParamId) -> candle_core::Result<NormFactors<'_>> {
        let weight = TensorRead::of(self.vector(id)?)?;
        let adds_one = self
            .table
            .index
            .get(&id)
            .is_some_and(|i| self.table.params[*i].adds_one);
        Ok(match adds_one {
            false => NormFactors::Stored(weight),
            true => NormFactors::PlusOne(weight.f32()?.iter().map(|w| 1.0 + w).collect()),
        })
    }

    /// Returns the tensors of a linear layer.
    ///
    /// # Errors
    /// Fails if the block has no such layer.
    pub fn linear(&self, block: usize, linear: Linear) -> candle_core::Result<Projection<'_>> {
        let weight = self.matrix(ParamId::Block(block, BlockParam::Weight(linear)))?;
        let bias = ParamId::Block(block, BlockParam::Bias(linear));
        Ok(Projection {
            weight,
            bias: self.has(bias).then(|| self.vector(bias)).transpose()?,
        })
    }

    /// Returns the id of the head's tensor. It is the embedding's if the two are tied.
    pub fn head_id(&self) -> ParamId {
        if self.has(ParamId::Head) {
            ParamId::Head
        } else {
            ParamId::Embedding
        }
    }

    /// Returns the head `[V, C]`.
    ///
    /// # Errors
    /// Never fails for a table that [`params`] returned.
    pub fn head(&self) -> candle_core::Result<&WeightMatrix> {
        self.matrix(self.head_id())
    }

    /// Returns the parameters with every tensor replaced by `f(row of the table, tensor)`, in the
    /// table's order.
    ///
    /// # Errors
    /// Returns the first error of `f`, and the errors of [`WeightMatrix::new`].
    pub fn map<E: From<candle_core::Error>>(
        &self,
        mut f: impl FnMut(&ParamSpec, &Tensor) -> Result<Tensor, E>,
    ) -> Result<Self, E> {
        let replaced = |(param, value): (&ParamSpec, &Value)| {
            Ok::<_, E>(Value::new(param, f(param, &value.tensor())?)?)
        };
        let values = self.iter().map(replaced).collect::<Result<_, E>>()?;
        Ok(Parameters {
            table: self.table.clone(),
            values,
        })
    }

    /// Returns every tensor with its name, in the table's order.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        self.iter()
            .map(|(param, value)| (param.name().to_owned(), value.tensor()))
            .collect()
    }

    /// Returns a function that looks up the tensor of a row of the table. That function returns
    /// [`ModelError::MissingTensor`] if there is no such tensor.
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
