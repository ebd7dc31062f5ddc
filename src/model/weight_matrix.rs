//! Weight matrices as they are held in memory.

use candle_core::{DType, Result, Tensor, bail};

use crate::compute::cpu::TensorRead;
use crate::compute::cpu::gemm::WeightView;

/// A weight W `[rows, columns]`: of a linear layer, of the head or an embedding. It shares the
/// storage of the tensor that it was made of, so that the weights of a run that trains them all
/// change in place.
///
/// A quantised matrix becomes another [`WeightStorage`]: it has to be read into a [`WeightView`]
/// that packs its panels and reads its rows, and to be copied into a tensor.
#[derive(Clone, Debug)]
pub struct WeightMatrix {
    storage: WeightStorage,
    rows: usize,
    columns: usize,
}

/// How a matrix is stored.
#[derive(Clone, Debug)]
pub enum WeightStorage {
    /// In f32, row-major.
    F32(Tensor),
    /// In bf16, row-major.
    Bf16(Tensor),
}

impl WeightMatrix {
    /// Returns the matrix of a tensor, without a copy.
    ///
    /// # Errors
    /// When the tensor is no matrix, or not of f32 or bf16.
    pub fn new(tensor: Tensor) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        let storage = match tensor.dtype() {
            DType::F32 => WeightStorage::F32(tensor),
            DType::BF16 => WeightStorage::Bf16(tensor),
            other => bail!("a weight must be f32 or bf16, it is {other:?}"),
        };
        Ok(WeightMatrix { storage, rows, columns })
    }

    /// Returns the number of rows: outputs of a linear layer, words of a vocabulary.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns: inputs of a linear layer, the width of an embedding.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns how it is stored.
    pub fn storage(&self) -> &WeightStorage {
        &self.storage
    }

    /// Returns the bytes that it takes in memory.
    pub fn bytes(&self) -> usize {
        let element = match &self.storage {
            WeightStorage::F32(_) => size_of::<f32>(),
            WeightStorage::Bf16(_) => size_of::<half::bf16>(),
        };
        self.rows * self.columns * element
    }

    /// Opens it for reading: nothing changes it in place while the guard lives.
    ///
    /// # Errors
    /// When the tensor is not contiguous, or not on the CPU.
    pub fn read(&self) -> Result<WeightRead<'_>> {
        match &self.storage {
            WeightStorage::F32(tensor) | WeightStorage::Bf16(tensor) => {
                Ok(WeightRead { values: TensorRead::of(tensor)?, columns: self.columns })
            }
        }
    }

    /// Returns its values as a tensor in the type that they are stored in, which shares the
    /// storage: for exports, and for the f32 copies that a run trains.
    pub fn tensor(&self) -> Tensor {
        match &self.storage {
            WeightStorage::F32(tensor) | WeightStorage::Bf16(tensor) => tensor.clone(),
        }
    }
}

/// A matrix that is open for reading.
pub struct WeightRead<'a> {
    values: TensorRead<'a>,
    columns: usize,
}

impl WeightRead<'_> {
    /// Returns what the kernels multiply and read rows of.
    pub fn view(&self) -> WeightView<'_> {
        WeightView::new(self.values.elements(), self.columns)
    }
}

#[cfg(test)]
mod tests;
