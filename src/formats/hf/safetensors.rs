//! Reads safetensors files. Opening maps the files and checks their headers; tensors are converted
//! only when they are loaded.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor, WithDType};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::formats::weights::stored::{Check, ElementType, StoredAs};
use crate::model::error::{ModelError, last_part};
use crate::model::params::text_name;

const FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[derive(Debug)]
pub(in crate::formats) struct SafetensorsWeights {
    files: Vec<(PathBuf, Contents)>,
    tensors: Arc<HashMap<String, Stored>>,
}

/// Access to a file's bytes.
#[derive(Debug)]
enum Contents {
    /// A memory map. If the file is truncated, reading kills the process (SIGBUS).
    Mapped(Mmap),
    /// An open file. Each tensor's bytes are read into memory when it is loaded.
    Read(File),
}

impl Contents {
    fn bytes(&self, range: Range<usize>) -> std::io::Result<Cow<'_, [u8]>> {
        match self {
            Contents::Mapped(map) => Ok(Cow::Borrowed(&map[range])),
            Contents::Read(file) => {
                let mut bytes = vec![0; range.len()];
                file.read_exact_at(&mut bytes, range.start as u64)?;
                Ok(Cow::Owned(bytes))
            }
        }
    }
}

/// Directory of the tensors, without the open files.
#[derive(Clone, Debug)]
pub(in crate::formats) struct SafetensorsDirectory {
    paths: Vec<PathBuf>,
    tensors: Arc<HashMap<String, Stored>>,
}

impl SafetensorsDirectory {
    /// Opens the files again, without mapping them or reading their headers.
    ///
    /// # Errors
    /// [`ModelError::Io`] if a file cannot be opened.
    pub fn open(&self) -> Result<SafetensorsWeights, ModelError> {
        let open = |path: &PathBuf| {
            let file = File::open(path).map_err(ModelError::io(path))?;
            Ok((path.clone(), Contents::Read(file)))
        };
        let files = self
            .paths
            .iter()
            .map(open)
            .collect::<Result<_, ModelError>>()?;
        Ok(SafetensorsWeights {
            files,
            tensors: self.tensors.clone(),
        })
    }
}

#[derive(Debug)]
struct Stored {
    /// Name in the file. The key in the directory is the name without the prefix that models of
    /// text and images put before the tensors of their language model.
    name: String,
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Stored {
    fn tensor<T: WithDType>(
        &self,
        name: &str,
        path: &Path,
        values: Vec<T>,
    ) -> Result<Tensor, ModelError> {
        if values.len() != self.shape.iter().product::<usize>() {
            return Err(ModelError::corrupt(
                path,
                format!(
                    "tensor '{name}' has {} values for the shape {:?}",
                    values.len(),
                    self.shape
                ),
            ));
        }
        Ok(Tensor::from_vec(
            values,
            self.shape.as_slice(),
            &Device::Cpu,
        )?)
    }
}

impl SafetensorsWeights {
    /// Opens the single file of a folder, or the shards that its index lists.
    ///
    /// # Errors
    /// [`ModelError::NotFound`] if the folder has neither, [`ModelError::CorruptWeights`] if the
    /// index cannot be used, and the errors of [`SafetensorsWeights::open`].
    pub fn open_folder(folder: &Path) -> Result<Self, ModelError> {
        let single = folder.join(FILE);
        if single.is_file() {
            return Self::open(&[single]);
        }
        let index = folder.join(INDEX);
        let text = std::fs::read_to_string(&index).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => ModelError::NotFound {
                model: folder.display().to_string(),
                tried: format!("{FILE} and {INDEX} in that folder: neither is there"),
            },
            _ => ModelError::io(&index)(e),
        })?;
        let wrong = |reason: String| ModelError::corrupt(&index, reason);
        let json: Value =
            serde_json::from_str(&text).map_err(|e| wrong(format!("not JSON: {e}")))?;
        let map = json
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| wrong("no object weight_map".into()))?;
        let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
        if let Some(bad) = names
            .iter()
            .find(|n| n.contains(['/', '\\']) || n.starts_with('.'))
        {
            return Err(wrong(format!(
                "weight_map names the file '{bad}', which is not in this folder"
            )));
        }
        let shards: Vec<PathBuf> = names.into_iter().map(|n| folder.join(n)).collect();
        if shards.is_empty() {
            return Err(wrong("weight_map is empty".into()));
        }
        Self::open(&shards)
    }

    /// Maps the files and reads their headers.
    ///
    /// # Errors
    /// [`ModelError::Io`] if a file cannot be opened or mapped, [`ModelError::CorruptWeights`] if
    /// its header is malformed or a tensor ends outside the file.
    pub fn open(paths: &[PathBuf]) -> Result<Self, ModelError> {
        let (mut files, mut tensors) = (Vec::new(), HashMap::new());
        for (file, path) in paths.iter().enumerate() {
            let handle = File::open(path).map_err(ModelError::io(path))?;
            // SAFETY: the map is read-only. Weight files must not be modified while the server has
            // them open, as with every loader that maps files.
            let map = unsafe { Mmap::map(&handle) }.map_err(ModelError::io(path))?;
            let (header, metadata) = SafeTensors::read_metadata(&map)
                .map_err(|e| ModelError::corrupt(path, format!("safetensors header: {e}")))?;
            let data = 8 + header;
            for (name, info) in metadata.tensors() {
                let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
                if bytes.end > map.len() {
                    return Err(ModelError::corrupt(
                        path,
                        format!(
                            "tensor '{name}' ends at byte {}, the file at {}",
                            bytes.end,
                            map.len()
                        ),
                    ));
                }
                tensors.insert(
                    text_name(&name).into_owned(),
                    Stored {
                        name: name.clone(),
                        file,
                        dtype: info.dtype,
                        shape: info.shape.clone(),
                        bytes,
                    },
                );
            }
            files.push((path.clone(), Contents::Mapped(map)));
        }
        Ok(SafetensorsWeights {
            files,
            tensors: Arc::new(tensors),
        })
    }

    /// Returns the names of the stored tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns the name of a tensor in its file.
    pub fn name_in_file(&self, name: &str) -> Option<&str> {
        self.tensors.get(name).map(|stored| stored.name.as_str())
    }

    /// Returns a tensor's element type and shape.
    pub fn layout(&self, name: &str) -> Option<(Dtype, &[usize])> {
        let stored = self.tensors.get(name)?;
        Some((stored.dtype, &stored.shape))
    }

    /// Reads the bytes of a tensor as they are stored. Returns `None` if there is no such tensor.
    /// `check` gets the file's path and the bytes.
    ///
    /// # Errors
    /// Returns an error if the bytes cannot be read, or the error of `check`.
    pub fn bytes(&self, name: &str, check: &Check) -> Result<Option<Cow<'_, [u8]>>, ModelError> {
        let Some(stored) = self.tensors.get(name) else {
            return Ok(None);
        };
        let (path, contents) = &self.files[stored.file];
        let bytes = contents
            .bytes(stored.bytes.clone())
            .map_err(ModelError::io(path))?;
        check(path, &bytes)?;
        Ok(Some(bytes))
    }

    /// Reads a tensor as f32, or as bf16 if it is stored so and `keep_bf16` is true. Returns `None`
    /// if there is no such tensor. `check` gets the file's path and the tensor's bytes before they
    /// are converted.
    ///
    /// # Errors
    /// Returns an error if the bytes cannot be read or the element type is not supported, or the
    /// error of `check`.
    pub fn load(
        &self,
        name: &str,
        keep_bf16: bool,
        check: &Check,
    ) -> Result<Option<Tensor>, ModelError> {
        let (Some(stored), Some(bytes)) = (self.tensors.get(name), self.bytes(name, check)?) else {
            return Ok(None);
        };
        let path = &self.files[stored.file].0;
        let stored_bf16 = |b: &[u8]| bf16::from_le_bytes([b[0], b[1]]);
        let tensor = match stored.dtype {
            Dtype::F32 => stored.tensor(
                name,
                path,
                bytes
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
            ),
            Dtype::F16 => stored.tensor::<f32>(
                name,
                path,
                bytes
                    .chunks_exact(2)
                    .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                    .collect(),
            ),
            Dtype::BF16 if keep_bf16 => {
                stored.tensor::<bf16>(name, path, bytes.chunks_exact(2).map(stored_bf16).collect())
            }
            Dtype::BF16 => stored.tensor::<f32>(
                name,
                path,
                bytes
                    .chunks_exact(2)
                    .map(|b| stored_bf16(b).to_f32())
                    .collect(),
            ),
            other => Err(ModelError::Unsupported {
                what: format!(
                    "{}: tensor '{name}' in {other:?} (supported: F32, F16, BF16)",
                    last_part(path)
                ),
            }),
        };
        tensor.map(Some)
    }

    /// Returns the element type and size of every tensor of a supported element type.
    pub fn stored(&self) -> Vec<StoredAs> {
        let of = |t: &Stored| {
            let dtype = match t.dtype {
                Dtype::F32 => ElementType::F32,
                Dtype::BF16 => ElementType::Bf16,
                Dtype::F16 => ElementType::F16,
                _ => return None,
            };
            Some(StoredAs {
                dtype,
                format: dtype.name(),
                dims: t.shape.len(),
                elements: t.shape.iter().product(),
            })
        };
        self.tensors.values().filter_map(of).collect()
    }

    /// Returns a tensor's file and the offset of its bytes in it.
    #[cfg(test)]
    pub fn place(&self, name: &str) -> (PathBuf, u64) {
        let stored = &self.tensors[name];
        (self.files[stored.file].0.clone(), stored.bytes.start as u64)
    }

    /// Returns the directory with which the files can be opened again.
    pub fn directory(&self) -> SafetensorsDirectory {
        SafetensorsDirectory {
            paths: self.files.iter().map(|(path, _)| path.clone()).collect(),
            tensors: self.tensors.clone(),
        }
    }

    pub fn hash(&self, hash: &mut blake3::Hasher) {
        for (_, contents) in &self.files {
            match contents {
                Contents::Mapped(map) => {
                    hash.update(map);
                }
                Contents::Read(file) => {
                    // If the file cannot be read any more, no tensor can be loaded from it either,
                    // so its fingerprint does not matter.
                    let _ = std::io::copy(&mut &*file, hash);
                }
            }
        }
    }
}
