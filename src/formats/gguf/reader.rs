//! The GGUF container: metadata and the directory of tensors, versions 2 and 3, little-endian.
//!
//! candle's reader is not safe for untrusted files: an alignment of 0 divides by zero, and
//! dimensions are multiplied unchecked. It also stores each of the tokenizer's about hundred
//! thousand strings in a value of a general type. This reader checks every length against the rest
//! of the file before it allocates, and every tensor's extent before anything is read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;

use crate::model::error::ModelError;

/// An opened GGUF file.
#[derive(Debug)]
pub(crate) struct Gguf {
    pub path: PathBuf,
    /// The open file, from which tensors are read.
    pub file: File,
    metadata: BTreeMap<String, Metadata>,
    tensors: TensorEntries,
}

/// Directory of a file: the tensors' entries by GGUF name.
pub(crate) type TensorEntries = BTreeMap<String, TensorEntry>;

/// Element type, shape and position of a tensor. Its bytes were checked to lie inside the file.
#[derive(Clone, Debug)]
pub(crate) struct TensorEntry {
    pub dtype: GgmlDType,
    /// Outermost dimension first, the reverse of GGUF's order.
    pub shape: Vec<usize>,
    /// Bytes from the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// A metadata value. Scalar integers are widened to i64, and scalar floats to f64.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Metadata {
    Integer(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    Integers(Vec<i32>),
    Floats(Vec<f32>),
    Flags(Vec<bool>),
    /// A value of a type that this crate does not use.
    Other,
}

const MAGIC: &[u8; 4] = b"GGUF";
const MAX_DIMS: u32 = 4;
const MAX_ARRAY_DEPTH: usize = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

impl Gguf {
    /// Reads the header and checks that every tensor lies inside the file.
    ///
    /// # Errors
    /// [`ModelError::CorruptWeights`] if the file is truncated or contradicts itself.
    /// [`ModelError::Unsupported`] if it is not GGUF, or its version or a quantisation cannot be
    /// read.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(ModelError::io(path))?;
        let len = file.metadata().map_err(ModelError::io(path))?.len();
        let mut reader = Reader {
            inner: BufReader::with_capacity(1 << 18, &file),
            path,
            len,
            position: 0,
        };
        if &reader.array::<4>("the magic number")? != MAGIC {
            return Err(ModelError::Unsupported {
                what: format!(
                    "{}: a single file must be GGUF, and this one does not start with 'GGUF'; of \
                     a model in safetensors, name the folder with its config.json",
                    path.display()
                ),
            });
        }
        let version = reader.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(ModelError::Unsupported {
                what: format!(
                    "{}: GGUF version {version} (supported: 2 and 3, little-endian)",
                    path.display()
                ),
            });
        }
        let tensor_count = reader.u64("the tensor count")?;
        let metadata_count = reader.u64("the metadata count")?;

        let mut metadata = BTreeMap::new();
        for i in 0..metadata_count {
            let key = reader.string(&format!("metadata key {i} of {metadata_count}"))?;
            let kind = reader.u32(&key)?;
            let value = reader.value(kind, &key, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(ModelError::corrupt(
                    path,
                    format!("metadata key '{key}' occurs twice"),
                ));
            }
        }
        let mut raw = Vec::new();
        for i in 0..tensor_count {
            raw.push(reader.tensor_info(&format!("tensor {i} of {tensor_count}"))?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Metadata::Integer(n)) if *n > 0 && *n <= 1 << 20 => *n as u64,
            Some(other) => {
                return Err(ModelError::corrupt(
                    path,
                    format!("general.alignment is {other:?}; must be an integer from 1 to 1048576"),
                ));
            }
        };
        let data_start = reader.position.div_ceil(alignment) * alignment;

        let mut tensors = BTreeMap::new();
        for (name, shape, kind, offset) in raw {
            let (dtype, bytes) = extent(path, &name, &shape, kind)?;
            let end = data_start
                .checked_add(offset)
                .and_then(|start| start.checked_add(bytes));
            if end.is_none_or(|end| end > len) {
                let reason = format!(
                    "tensor '{name}' needs {bytes} bytes at offset {offset} of the data; \
                     the file has {}",
                    len.saturating_sub(data_start)
                );
                return Err(ModelError::corrupt(path, reason));
            }
            let entry = TensorEntry {
                dtype,
                shape,
                offset: data_start + offset,
                bytes,
            };
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(ModelError::corrupt(
                    path,
                    format!("tensor '{name}' occurs twice"),
                ));
            }
        }
        Ok(Gguf {
            path: path.to_owned(),
            file,
            metadata,
            tensors,
        })
    }

    /// Opens a file again with the directory that was read before. The header is not read, so there
    /// is no metadata.
    ///
    /// # Errors
    /// [`ModelError::Io`] if the file cannot be opened.
    pub(crate) fn reopen(path: &Path, tensors: TensorEntries) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(ModelError::io(path))?;
        Ok(Gguf {
            path: path.to_owned(),
            file,
            metadata: BTreeMap::new(),
            tensors,
        })
    }

    /// Returns a copy of the directory, for [`Gguf::reopen`].
    pub(crate) fn entries(&self) -> TensorEntries {
        self.tensors.clone()
    }

    /// Returns the GGUF names of all tensors.
    pub(crate) fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns the entry of the tensor with this GGUF name.
    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(name)
    }

    pub(crate) fn tensors(&self) -> impl Iterator<Item = &TensorEntry> {
        self.tensors.values()
    }

    /// Reads the values of an f32 tensor.
    ///
    /// # Errors
    /// Returns an error if the tensor is not f32 or the file cannot be read.
    pub(crate) fn read_f32(&self, entry: &TensorEntry) -> Result<Vec<f32>, ModelError> {
        if entry.dtype != GgmlDType::F32 {
            return Err(ModelError::corrupt(
                &self.path,
                format!("a tensor is {:?} where F32 is expected", entry.dtype),
            ));
        }
        let mut bytes = vec![0; entry.bytes as usize];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(entry.offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(ModelError::io(&self.path))?;
        Ok(bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect())
    }

    /// Makes a [`ModelError::InvalidConfig`] about a metadata key.
    pub(crate) fn invalid(&self, key: &str, reason: impl Into<String>) -> ModelError {
        ModelError::InvalidConfig {
            path: self.path.clone(),
            field: key.to_owned(),
            reason: reason.into(),
        }
    }

    fn read<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        read: impl FnOnce(&'a Metadata) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        self.metadata
            .get(key)
            .map(|v| read(v).ok_or_else(|| self.invalid(key, format!("must be {kind}"))))
            .transpose()
    }

    /// Returns the non-negative integer stored under `key`, if any.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<u64>, ModelError> {
        self.read(key, "a non-negative integer", |v| match v {
            Metadata::Integer(n) => u64::try_from(*n).ok(),
            _ => None,
        })
    }

    /// Returns the number stored under `key`, if any; an integer is converted to a float.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.read(key, "a number", |v| match v {
            Metadata::Float(x) => Some(*x),
            Metadata::Integer(n) => Some(*n as f64),
            _ => None,
        })
    }

    /// Returns the bool stored under `key`, if any.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.read(key, "a truth value", |v| match v {
            Metadata::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// Returns the string stored under `key`, if any.
    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>, ModelError> {
        self.read(key, "a string", |v| match v {
            Metadata::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// Returns the array of strings stored under `key`, if any.
    pub(crate) fn strings(&self, key: &str) -> Result<Option<&[String]>, ModelError> {
        self.read(key, "an array of strings", |v| match v {
            Metadata::Strings(s) => Some(s.as_slice()),
            _ => None,
        })
    }

    /// Returns the array of 32-bit floats stored under `key`, if any.
    pub(crate) fn floats(&self, key: &str) -> Result<Option<&[f32]>, ModelError> {
        self.read(key, "an array of 32-bit floats", |v| match v {
            Metadata::Floats(x) => Some(x.as_slice()),
            _ => None,
        })
    }

    /// Returns the array of bools stored under `key`, if any.
    pub(crate) fn flags(&self, key: &str) -> Result<Option<&[bool]>, ModelError> {
        self.read(key, "an array of truth values", |v| match v {
            Metadata::Flags(flags) => Some(flags.as_slice()),
            _ => None,
        })
    }

    /// Returns true if anything is stored under `key`.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// Returns the array of integers stored under `key`, if any.
    pub(crate) fn integers(&self, key: &str) -> Result<Option<&[i32]>, ModelError> {
        self.read(key, "an array of 32-bit integers", |v| match v {
            Metadata::Integers(n) => Some(n.as_slice()),
            _ => None,
        })
    }
}

/// Returns the element type and the size in bytes of a tensor. Every multiplication is checked for
/// overflow.
fn extent(
    path: &Path,
    name: &str,
    shape: &[usize],
    kind: u32,
) -> Result<(GgmlDType, u64), ModelError> {
    let dtype = ggml_dtype(kind).ok_or_else(|| ModelError::Unsupported {
        what: format!(
            "{}: tensor '{name}' in {} \
             (supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K)",
            path.display(),
            unsupported_name(kind)
        ),
    })?;
    let (block, row) = (dtype.block_size(), shape.last().copied().unwrap_or(1));
    if row % block != 0 {
        return Err(ModelError::corrupt(
            path,
            format!("tensor '{name}': rows of {row} elements are not whole blocks of {block}"),
        ));
    }
    let elements = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let bytes = elements.and_then(|n| (n / block).checked_mul(dtype.type_size()));
    bytes.map(|bytes| (dtype, bytes as u64)).ok_or_else(|| {
        ModelError::corrupt(
            path,
            format!("tensor '{name}' has the impossible shape {shape:?}"),
        )
    })
}

/// Maps ggml's number of an element type to the type.
fn ggml_dtype(kind: u32) -> Option<GgmlDType> {
    Some(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

fn unsupported_name(kind: u32) -> String {
    let name = match kind {
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("ggml type {kind}"),
    };
    name.to_owned()
}

/// A cursor that counts the bytes that are left in the file.
struct Reader<'a> {
    inner: BufReader<&'a File>,
    path: &'a Path,
    len: u64,
    position: u64,
}

/// Name, shape, number of the element type, and offset from the start of the data.
type RawTensor = (String, Vec<usize>, u32, u64);

impl Reader<'_> {
    /// Fails unless at least `bytes` are left in the file. It is called before every allocation, so
    /// that a false length cannot exhaust the memory.
    fn expect(&self, bytes: u64, what: &str) -> Result<(), ModelError> {
        let left = self.len.saturating_sub(self.position);
        if bytes > left {
            let what = what.chars().take(120).collect::<String>();
            return Err(ModelError::corrupt(
                self.path,
                format!(
                    "{what} needs {bytes} bytes at offset {}, {left} are left",
                    self.position
                ),
            ));
        }
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8], what: &str) -> Result<(), ModelError> {
        self.expect(buffer.len() as u64, what)?;
        self.inner
            .read_exact(buffer)
            .map_err(ModelError::io(self.path))?;
        self.position += buffer.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str) -> Result<String, ModelError> {
        let len = self.u64(what)?;
        self.expect(len, what)?;
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes, what)?;
        // Some published vocabularies hold a token that is not UTF-8. No text is ever encoded as
        // it.
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
    }

    fn scalar(&mut self, kind: u32, what: &str) -> Result<Metadata, ModelError> {
        Ok(match kind {
            0 => Metadata::Integer(self.array::<1>(what)?[0].into()),
            1 => Metadata::Integer(i8::from_le_bytes(self.array(what)?).into()),
            2 => Metadata::Integer(u16::from_le_bytes(self.array(what)?).into()),
            3 => Metadata::Integer(i16::from_le_bytes(self.array(what)?).into()),
            4 => Metadata::Integer(self.u32(what)?.into()),
            5 => Metadata::Integer(i32::from_le_bytes(self.array(what)?).into()),
            6 => Metadata::Float(f32::from_le_bytes(self.array(what)?).into()),
            7 => Metadata::Bool(self.array::<1>(what)?[0] != 0),
            10 => i64::try_from(self.u64(what)?).map_or(Metadata::Other, Metadata::Integer),
            11 => Metadata::Integer(i64::from_le_bytes(self.array(what)?)),
            12 => Metadata::Float(f64::from_le_bytes(self.array(what)?)),
            STRING => Metadata::String(self.string(what)?),
            other => {
                return Err(ModelError::corrupt(
                    self.path,
                    format!("'{what}' has the unknown value type {other}"),
                ));
            }
        })
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<Metadata, ModelError> {
        if kind != ARRAY {
            return self.scalar(kind, key);
        }
        if depth == MAX_ARRAY_DEPTH {
            return Err(ModelError::corrupt(
                self.path,
                format!("'{key}' nests arrays more than {MAX_ARRAY_DEPTH} deep"),
            ));
        }
        let (kind, count) = (self.u32(key)?, self.u64(key)?);
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            _ => 8,
        };
        self.expect(count.saturating_mul(least), key)?;
        match kind {
            STRING => (0..count)
                .map(|_| self.string(key))
                .collect::<Result<_, _>>()
                .map(Metadata::Strings),
            6 => (0..count)
                .map(|_| self.array(key).map(f32::from_le_bytes))
                .collect::<Result<_, _>>()
                .map(Metadata::Floats),
            4 | 5 => (0..count)
                .map(|_| self.array(key).map(i32::from_le_bytes))
                .collect::<Result<_, _>>()
                .map(Metadata::Integers),
            7 => (0..count)
                .map(|_| self.array::<1>(key).map(|byte| byte[0] != 0))
                .collect::<Result<_, _>>()
                .map(Metadata::Flags),
            _ => {
                for _ in 0..count {
                    self.value(kind, key, depth + 1)?;
                }
                Ok(Metadata::Other)
            }
        }
    }

    fn tensor_info(&mut self, what: &str) -> Result<RawTensor, ModelError> {
        let name = self.string(what)?;
        let dims = self.u32(what)?;
        if dims > MAX_DIMS {
            return Err(ModelError::corrupt(
                self.path,
                format!("{what} has {dims} dimensions; at most {MAX_DIMS} are possible"),
            ));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let dim = self.u64(what)?;
            shape.push(usize::try_from(dim).map_err(|_| {
                ModelError::corrupt(self.path, format!("{what} has a dimension of {dim}"))
            })?);
        }
        shape.reverse();
        Ok((name, shape, self.u32(what)?, self.u64(what)?))
    }
}
