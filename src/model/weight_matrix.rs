//! Weight matrices in host memory.

use candle_core::{DType, Result, Tensor, bail};

use crate::compute::cpu::TensorRead;
use crate::compute::cpu::gemm::WeightView;

/// A weight W `[rows, columns]` of a linear layer, of the head or of an embedding. It shares the
/// storage of the tensor that it was made from, so that full fine-tuning can update the weights in
/// place.
///
/// To add a quantised matrix, add a variant of [`WeightStorage`]. It needs a [`WeightView`] that
/// packs its panels and reads its rows, a conversion to a tensor, and an upload to a GPU.
#[derive(Clone, Debug)]
pub struct WeightMatrix {
    storage: WeightStorage,
    rows: usize,
    columns: usize,
}

/// Storage of a matrix.
#[derive(Clone, Debug)]
pub enum WeightStorage {
    /// In f32, row-major.
    F32(Tensor),
    /// In bf16, row-major.
    Bf16(Tensor),
}

impl WeightMatrix {
    /// Makes a matrix from a tensor without copying it.
    ///
    /// # Errors
    /// Fails if the tensor is not a matrix, or its type is neither f32 nor bf16.
    pub fn new(tensor: Tensor) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        let storage = match tensor.dtype() {
            DType::F32 => WeightStorage::F32(tensor),
            DType::BF16 => WeightStorage::Bf16(tensor),
            other => bail!("a weight must be f32 or bf16, but its type is {other:?}"),
        };
        Ok(WeightMatrix {
            storage,
            rows,
            columns,
        })
    }

    /// Returns the number of rows: the outputs of a linear layer or the tokens of the vocabulary.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns: the inputs of a linear layer or the width of an embedding.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns the storage.
    pub fn storage(&self) -> &WeightStorage {
        &self.storage
    }

    /// Returns the size in memory, in bytes.
    pub fn bytes(&self) -> usize {
        let element = match &self.storage {
            WeightStorage::F32(_) => size_of::<f32>(),
            WeightStorage::Bf16(_) => size_of::<half::bf16>(),
        };
        self.rows * self.columns * element
    }

    /// Locks the matrix for reading: nothing changes it in place while the guard lives.
    ///
    /// # Errors
    /// Fails if the tensor is not contiguous, or not on the CPU.
    pub fn read(&self) -> Result<WeightRead<'_>> {
        match &self.storage {
            WeightStorage::F32(tensor) | WeightStorage::Bf16(tensor) => Ok(WeightRead {
                values: TensorRead::of(tensor)?,
                columns: self.columns,
            }),
        }
    }

    /// Returns the matrix as a tensor of the stored type that shares the storage. It is used for
    /// exports and for the f32 copies that a run trains.
    pub fn tensor(&self) -> Tensor {
        match &self.storage {
            WeightStorage::F32(tensor) | WeightStorage::Bf16(tensor) => tensor.clone(),
        }
    }
}

/// Read guard of a [`WeightMatrix`].
pub struct WeightRead<'a> {
    values: TensorRead<'a>,
    columns: usize,
}

impl WeightRead<'_> {
    /// Returns the view from which the kernels pack panels and read rows.
    pub fn view(&self) -> WeightView<'_> {
        WeightView::new(self.values.elements(), self.columns)
    }
}

#[cfg(test)]
mod tests;
