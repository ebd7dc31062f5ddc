//! GGUF tensors, dequantised one at a time and converted to the Hugging Face layout.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Mutex;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::{DType, Device, Tensor};

use super::reader::{Gguf, TensorEntries, TensorEntry};
use crate::formats::weights::stored::{Check, ElementType, StoredAs};
use crate::model::config::ModelConfig;
use crate::model::error::ModelError;
use crate::model::params::ParamSpec;

/// The tensors of an opened GGUF file.
#[derive(Debug)]
pub(in crate::formats) struct GgufWeights {
    gguf: Gguf,
    /// True if the rows of Q and K are stored in ggml's interleaved order.
    is_interleaved: bool,
    /// Held during a seek and the read after it, because all reads share one file position.
    lock: Mutex<()>,
}

/// Directory of the tensors, without the open file.
#[derive(Clone, Debug)]
pub(in crate::formats) struct GgufDirectory {
    tensors: TensorEntries,
    is_interleaved: bool,
}

impl GgufDirectory {
    /// Opens the file again without reading its header. [`GgufWeights::load`] then reads the bytes
    /// that are there now.
    ///
    /// # Errors
    /// [`ModelError::Io`] if the file cannot be opened.
    pub fn open(&self, path: &Path) -> Result<GgufWeights, ModelError> {
        let gguf = Gguf::reopen(path, self.tensors.clone())?;
        Ok(GgufWeights {
            gguf,
            is_interleaved: self.is_interleaved,
            lock: Mutex::new(()),
        })
    }
}

impl GgufWeights {
    pub fn new(gguf: Gguf, config: &ModelConfig) -> Self {
        let is_interleaved = config.architecture.is_interleaved_in_gguf();
        GgufWeights {
            gguf,
            is_interleaved,
            lock: Mutex::new(()),
        }
    }

    /// Returns the names of the stored tensors, as llama.cpp spells them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.gguf.tensor_names()
    }

    /// Returns the directory with which the file can be opened again.
    pub(in crate::formats) fn directory(&self) -> GgufDirectory {
        GgufDirectory {
            tensors: self.gguf.entries(),
            is_interleaved: self.is_interleaved,
        }
    }

    /// Reads a parameter's tensor as f32; `None` if the file does not have it. `check` gets the
    /// file's path and the tensor's bytes before they are dequantised.
    ///
    /// # Errors
    /// Returns an error if the bytes cannot be read or dequantised, or the error of `check`.
    pub fn load(&self, param: &ParamSpec, check: &Check) -> Result<Option<Tensor>, ModelError> {
        let Some(entry) = self.gguf.tensor(&param.gguf.name) else {
            return Ok(None);
        };
        let mut tensor = self.dequantise(entry, check)?;
        if param.adds_one {
            tensor = (tensor - 1.0)?;
        }
        match param.rotated_heads.filter(|_| self.is_interleaved) {
            Some(heads) => Ok(Some(deinterleave(&tensor, heads)?)),
            None => Ok(Some(tensor)),
        }
    }

    fn dequantise(&self, entry: &TensorEntry, check: &Check) -> Result<Tensor, ModelError> {
        let path = &self.gguf.path;
        if entry.bytes == 0 {
            // For an empty tensor candle would make a slice from a dangling pointer.
            return Err(ModelError::corrupt(
                path,
                "a tensor has no elements".to_owned(),
            ));
        }
        let mut bytes = vec![0u8; entry.bytes as usize];
        {
            let _guard = self.lock.lock();
            let mut file = &self.gguf.file;
            file.seek(SeekFrom::Start(entry.offset))
                .map_err(ModelError::io(path))?;
            file.read_exact(&mut bytes).map_err(ModelError::io(path))?;
        }
        check(path, &bytes)?;
        let quantised = qtensor_from_ggml(entry.dtype, &bytes, entry.shape.clone(), &Device::Cpu)?;
        drop(bytes);
        Ok(quantised.dequantize(&Device::Cpu)?.to_dtype(DType::F32)?)
    }

    /// Returns the element type and size of every tensor. Quantised tensors are reported as f16.
    pub fn stored(&self) -> Vec<StoredAs> {
        let of = |t: &TensorEntry| {
            let dtype = match t.dtype {
                GgmlDType::F32 => ElementType::F32,
                GgmlDType::BF16 => ElementType::Bf16,
                _ => ElementType::F16,
            };
            StoredAs {
                dtype,
                format: format_name(t.dtype),
                dims: t.shape.len(),
                elements: t.shape.iter().product(),
            }
        };
        self.gguf.tensors().map(of).collect()
    }

    pub fn hash(&self, hash: &mut blake3::Hasher) {
        let _guard = self.lock.lock();
        let mut file = &self.gguf.file;
        // If the file cannot be read any more, no tensor can be loaded from it either, so its
        // fingerprint does not matter.
        if file.seek(SeekFrom::Start(0)).is_ok() {
            let _ = std::io::copy(&mut file, hash);
        }
    }
}

/// Undoes llama.cpp's permutation of Q and K rows: per head, `[D/2, 2]` back to `[2, D/2]`.
fn deinterleave(t: &Tensor, heads: usize) -> Result<Tensor, ModelError> {
    let rows = t.dim(0)?;
    if heads == 0 || rows % (2 * heads) != 0 {
        return Ok(t.clone());
    }
    let half = rows / heads / 2;
    let width = t.elem_count() / rows;
    Ok(t.reshape((heads, half, 2, width))?
        .transpose(1, 2)?
        .contiguous()?
        .reshape(t.shape())?)
}

/// Returns llama.cpp's name of an element type, in lower case.
fn format_name(dtype: GgmlDType) -> &'static str {
    match dtype {
        GgmlDType::F32 => "f32",
        GgmlDType::F16 => "f16",
        GgmlDType::BF16 => "bf16",
        GgmlDType::Q4_0 => "q4_0",
        GgmlDType::Q4_1 => "q4_1",
        GgmlDType::Q5_0 => "q5_0",
        GgmlDType::Q5_1 => "q5_1",
        GgmlDType::Q8_0 => "q8_0",
        GgmlDType::Q8_1 => "q8_1",
        GgmlDType::Q2K => "q2_k",
        GgmlDType::Q3K => "q3_k",
        GgmlDType::Q4K => "q4_k",
        GgmlDType::Q5K => "q5_k",
        GgmlDType::Q6K => "q6_k",
        GgmlDType::Q8K => "q8_k",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn de_interleaving_puts_pairs_back_into_halves() {
        // One head with D = 4: ggml stores the original rows in the order (0, 2, 1, 3).
        let stored = Tensor::from_vec(vec![0f32, 2.0, 1.0, 3.0], (4, 1), &Device::Cpu).unwrap();
        let got: Vec<f32> = deinterleave(&stored, 1)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        assert_eq!(got, [0.0, 1.0, 2.0, 3.0]);
    }
}
