//! Weights on disk: safetensors (one file or shards) or GGUF. Tensors are read one at a time and
//! identified by their Hugging Face names.

pub(super) mod stored;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{DType, Tensor};
use safetensors::Dtype;

pub use self::stored::ElementType;
use self::stored::StoredAs;
use super::gguf::weights::{GgufDirectory, GgufWeights};
use super::hf::safetensors::{SafetensorsDirectory, SafetensorsWeights};
use crate::domain::training::Precision;
use crate::model::config::ModelConfig;
use crate::model::error::ModelError;
use crate::model::parameters::TensorSource;
use crate::model::params::{self, ParamRole, ParamSpec};

/// BLAKE3 hash of each tensor's stored bytes, by the tensor's Hugging Face name.
type Digests = HashMap<String, blake3::Hash>;

/// Location of a model's weights, for reading the same values again after the files were closed.
///
/// Other programs may replace, truncate or overwrite the files at any time, also during a read. So
/// the files are not mapped. The bytes of one tensor are read into memory, and their hash must
/// equal that of the first load. Thus the values that are used are the values that were checked.
/// Tensors that are not needed are neither read nor hashed. Position, shape and element type of a
/// tensor are those of the first time; the headers are not read again.
#[derive(Clone, Debug)]
pub struct WeightFiles {
    path: PathBuf,
    directory: Directory,
    digests: Arc<Digests>,
}

#[derive(Clone, Debug)]
enum Directory {
    Safetensors(SafetensorsDirectory),
    Gguf(GgufDirectory),
}

impl WeightFiles {
    /// Opens the files again. [`Weights::load`] then checks every tensor that it reads.
    ///
    /// # Errors
    /// [`ModelError::Changed`] if a file is gone or cannot be opened.
    pub fn open(&self) -> Result<Weights, ModelError> {
        let kind = match &self.directory {
            Directory::Safetensors(d) => d.open().map(FileFormat::Safetensors),
            Directory::Gguf(d) => d.open(&self.path).map(FileFormat::Gguf),
        };
        let digests = Digesting::Expected(self.digests.clone());
        Ok(Weights {
            digests,
            ..Weights::new(kind.map_err(unreadable_again)?, &self.path)
        })
    }
}

/// Turns an I/O error into [`ModelError::Changed`]: the file was readable the first time.
fn unreadable_again(e: ModelError) -> ModelError {
    match e {
        ModelError::Io { path, source } => ModelError::Changed {
            path,
            reason: source.to_string(),
        },
        e => e,
    }
}

/// Treatment of the hash of each tensor's bytes.
#[derive(Debug)]
enum Digesting {
    /// Nothing is hashed.
    Off,
    /// The hash is recorded.
    Recorded(Mutex<Digests>),
    /// The hash must equal the recorded one.
    Expected(Arc<Digests>),
}

/// A tensor that is not of the language model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherTensor {
    /// Name by which [`Weights`] finds the tensor. [`Weights::name_in_file`] returns the name in
    /// the file, which may have a prefix.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
}

/// The weights of one model.
#[derive(Debug)]
pub struct Weights {
    kind: FileFormat,
    path: PathBuf,
    fingerprint: OnceLock<String>,
    digests: Digesting,
}

#[derive(Debug)]
enum FileFormat {
    Safetensors(SafetensorsWeights),
    Gguf(GgufWeights),
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists, in a
    /// folder.
    ///
    /// # Errors
    /// Returns an error that names the file if there is neither, or one is truncated or malformed.
    pub fn open_folder(folder: &Path) -> Result<Self, ModelError> {
        Ok(Self::new(
            FileFormat::Safetensors(SafetensorsWeights::open_folder(folder)?),
            folder,
        ))
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// The errors of [`Weights::open_folder`].
    pub fn open_safetensors(file: &Path) -> Result<Self, ModelError> {
        Ok(Self::new(
            FileFormat::Safetensors(SafetensorsWeights::open(&[file.to_owned()])?),
            file,
        ))
    }

    pub(super) fn from_gguf(weights: GgufWeights, path: &Path) -> Self {
        Self::new(FileFormat::Gguf(weights), path)
    }

    fn new(kind: FileFormat, path: &Path) -> Self {
        Weights {
            kind,
            path: path.to_owned(),
            fingerprint: OnceLock::new(),
            digests: Digesting::Off,
        }
    }

    /// Reads a parameter's tensor, contiguous and on the CPU. A matrix has the element type
    /// `precision`; norms and biases are f32.
    ///
    /// # Errors
    /// Returns an error if the tensor is missing, cannot be read, or has another shape or an
    /// unsupported element type. Returns [`ModelError::Changed`] if its file was opened by
    /// [`WeightFiles::open`] and the tensor's bytes have changed or cannot be read.
    pub fn load(&self, param: &ParamSpec, precision: Precision) -> Result<Tensor, ModelError> {
        let dtype = if param.role == ParamRole::Matrix && precision == Precision::Bf16 {
            DType::BF16
        } else {
            DType::F32
        };
        let check = |file: &Path, bytes: &[u8]| self.check_digest(&param.hf.name, file, bytes);
        let tensor = match &self.kind {
            FileFormat::Safetensors(w) => w.load(&param.hf.name, dtype == DType::BF16, &check),
            FileFormat::Gguf(w) => w.load(param, &check),
        };
        let tensor = match &self.digests {
            Digesting::Expected(_) => tensor.map_err(unreadable_again)?,
            Digesting::Off | Digesting::Recorded(_) => tensor?,
        };
        let name = || param.name().to_owned();
        let tensor = tensor.ok_or_else(|| ModelError::MissingTensor {
            name: name(),
            path: self.path.clone(),
        })?;
        if tensor.dims() != param.shape {
            return Err(ModelError::ShapeMismatch {
                name: name(),
                path: self.path.clone(),
                expected: param.shape.clone(),
                found: tensor.dims().to_vec(),
            });
        }
        Ok(tensor.to_dtype(dtype)?)
    }

    /// Returns the tensors that are not of the language model, in the order of their names: those
    /// of the other parts of a model of text and images. GGUF files have none.
    pub fn others(&self, config: &ModelConfig) -> Vec<OtherTensor> {
        let FileFormat::Safetensors(weights) = &self.kind else {
            return Vec::new();
        };
        let params = params::params(&config.spec);
        let of_text: BTreeSet<&str> = params.iter().map(|p| p.hf.name.as_str()).collect();
        let other = |name: &str| {
            let (dtype, shape) = weights.layout(name)?;
            Some(OtherTensor {
                name: name.to_owned(),
                dtype,
                shape: shape.to_vec(),
            })
        };
        let mut others: Vec<OtherTensor> = weights
            .names()
            .filter(|name| !of_text.contains(name) && !is_harmless(name))
            .filter_map(other)
            .collect();
        others.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        others
    }

    /// Reads the bytes of a tensor of [`Weights::others`] as they are stored.
    ///
    /// # Errors
    /// Returns an error if the tensor is missing, or the errors of [`Weights::load`].
    pub fn bytes(&self, other: &OtherTensor) -> Result<Vec<u8>, ModelError> {
        let name = &other.name;
        let check = |file: &Path, bytes: &[u8]| self.check_digest(name, file, bytes);
        let bytes = match &self.kind {
            FileFormat::Safetensors(weights) => weights.bytes(name, &check),
            FileFormat::Gguf(_) => Ok(None),
        };
        let bytes = match &self.digests {
            Digesting::Expected(_) => bytes.map_err(unreadable_again)?,
            Digesting::Off | Digesting::Recorded(_) => bytes?,
        };
        let missing = || ModelError::MissingTensor {
            name: name.clone(),
            path: self.path.clone(),
        };
        Ok(bytes.ok_or_else(missing)?.into_owned())
    }

    /// Returns the name that a tensor of the language model has in its file. In a model of text and
    /// images it has a prefix.
    pub fn name_in_file<'a>(&'a self, name: &'a str) -> &'a str {
        match &self.kind {
            FileFormat::Safetensors(weights) => weights.name_in_file(name).unwrap_or(name),
            FileFormat::Gguf(_) => name,
        }
    }

    /// Reads the tensors of [`Weights::others`], so that their hashes are recorded.
    ///
    /// # Errors
    /// The errors of [`Weights::bytes`].
    pub fn record_others(&self, config: &ModelConfig) -> Result<(), ModelError> {
        for other in self.others(config) {
            self.bytes(&other)?;
        }
        Ok(())
    }

    /// Records or checks the hash of a tensor's bytes.
    fn check_digest(&self, name: &str, file: &Path, bytes: &[u8]) -> Result<(), ModelError> {
        match &self.digests {
            Digesting::Off => Ok(()),
            Digesting::Recorded(digests) => {
                let digest = blake3::hash(bytes);
                // A poisoned lock is harmless: nothing panics while the map is changed.
                digests
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(name.to_owned(), digest);
                Ok(())
            }
            Digesting::Expected(digests) => {
                let (expected, found) = (digests.get(name), blake3::hash(bytes));
                if expected == Some(&found) {
                    return Ok(());
                }
                let expected = expected.map_or_else(|| "none".to_owned(), |hash| hash.to_string());
                let reason = format!("tensor '{name}' had the hash {expected}, it has {found} now");
                Err(ModelError::Changed {
                    path: file.to_owned(),
                    reason,
                })
            }
        }
    }

    /// Checks that the configuration uses every stored tensor. An unused tensor outside of the
    /// decoder layers only causes a warning, because many files have parts that the language
    /// model's forward pass does not use. In a model of text and images such tensors are expected
    /// and cause no warning.
    ///
    /// # Errors
    /// [`ModelError::UnexpectedTensor`] for tensors of decoder layers, e.g. biases that the
    /// configuration switches off; [`ModelError::Unsupported`] for a head that differs from the
    /// embedding although the configuration ties them.
    pub fn check_names(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let params = params::params(&config.spec);
        let (stored, called_for): (Vec<&str>, BTreeSet<&str>) = match &self.kind {
            FileFormat::Safetensors(w) => (
                w.names().collect(),
                params.iter().map(|p| p.hf.name.as_str()).collect(),
            ),
            FileFormat::Gguf(w) => (
                w.names().collect(),
                params.iter().map(|p| p.gguf.name.as_str()).collect(),
            ),
        };
        let mut unexpected: Vec<&str> = stored
            .into_iter()
            .filter(|name| !called_for.contains(*name) && !is_harmless(name))
            .collect();
        unexpected.sort_unstable();
        let in_layers: Vec<&&str> = unexpected
            .iter()
            .filter(|name| params::is_in_block(name))
            .collect();
        if let Some(first) = in_layers.first() {
            let (name, others) = ((**first).to_owned(), in_layers.len() - 1);
            return Err(ModelError::UnexpectedTensor {
                name,
                path: self.path.clone(),
                others,
            });
        }
        if config.spec.tie_word_embeddings && !self.is_tied()? {
            return Err(ModelError::Unsupported {
                what: format!(
                    "{}: {} differs from the embedding, but tie_word_embeddings is true: set it to \
                     false in config.json",
                    self.path.display(),
                    params::HF_HEAD
                ),
            });
        }
        if config.whole_json.is_some() {
            tracing::info!(
                path = %self.path.display(),
                tensors = unexpected.len(),
                "the tensors of the other parts of the model are left as they are"
            );
        } else if let Some(first) = unexpected.first() {
            tracing::warn!(
                path = %self.path.display(),
                tensor = *first,
                tensors = unexpected.len(),
                "the weights have tensors that the configuration does not use: they are ignored"
            );
        }
        Ok(())
    }

    /// Returns the element type of most of the weights. Quantised weights count as f16, because
    /// their scales are stored in f16 and f16 rounds less than bf16.
    pub fn element_type(&self) -> ElementType {
        let tensors = self.stored();
        let count = |dtype| {
            tensors
                .iter()
                .filter(|t| t.dtype == dtype)
                .map(|t| t.elements)
                .sum::<usize>()
        };
        let mut best = ElementType::F32;
        for dtype in ElementType::ALL {
            if count(dtype) > count(best) {
                best = dtype;
            }
        }
        best
    }

    /// Returns the name of the format in which most of the weights are stored: that of an element
    /// type, or of a quantisation such as `q4_k`.
    pub fn stored_format(&self) -> &'static str {
        let mut elements: BTreeMap<&'static str, usize> = BTreeMap::new();
        for tensor in self.stored() {
            *elements.entry(tensor.format).or_default() += tensor.elements;
        }
        let most = elements.into_iter().max_by_key(|(_, elements)| *elements);
        most.map_or(ElementType::F32.name(), |(format, _)| format)
    }

    /// Returns true if [`Weights::load`] in `precision` rounds nothing.
    pub fn is_exact_in(&self, precision: Precision) -> bool {
        // In bf16 only matrices are rounded. Tensors of other shapes stay in f32.
        let stays_exact = |t: &StoredAs| t.dims != 2 || t.dtype == ElementType::Bf16;
        precision == Precision::F32 || self.stored().iter().all(stays_exact)
    }

    fn stored(&self) -> Vec<StoredAs> {
        match &self.kind {
            FileFormat::Safetensors(w) => w.stored(),
            FileFormat::Gguf(w) => w.stored(),
        }
    }

    /// Makes [`Weights::load`] record the hashes of what it reads, for [`Weights::files`].
    pub fn record_digests(&mut self) {
        self.digests = Digesting::Recorded(Mutex::default());
    }

    /// Returns the location and hashes with which the same weights can be read again. It has the
    /// hashes of the tensors that were loaded since [`Weights::record_digests`].
    pub fn files(&self) -> WeightFiles {
        let directory = match &self.kind {
            FileFormat::Safetensors(w) => Directory::Safetensors(w.directory()),
            FileFormat::Gguf(w) => Directory::Gguf(w.directory()),
        };
        let digests = match &self.digests {
            Digesting::Off => Arc::default(),
            Digesting::Recorded(digests) => Arc::new(
                digests
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone(),
            ),
            Digesting::Expected(digests) => digests.clone(),
        };
        WeightFiles {
            path: self.path.clone(),
            directory,
            digests,
        }
    }

    /// Returns false if the files have a head that is not a copy of the embedding.
    fn is_tied(&self) -> Result<bool, ModelError> {
        let FileFormat::Safetensors(w) = &self.kind else {
            // GGUF has no flag: a model is tied if its file has no head.
            return Ok(true);
        };
        let (head, embedding) = (params::HF_HEAD, params::hf_embedding());
        if w.layout(head).is_none() {
            return Ok(true);
        }
        let unchecked = |_: &Path, _: &[u8]| Ok(());
        Ok(w.layout(head) == w.layout(&embedding)
            && w.bytes(head, &unchecked)? == w.bytes(&embedding, &unchecked)?)
    }

    /// Returns the BLAKE3 hash of the files' contents, in hex. It is computed once.
    pub fn fingerprint(&self) -> String {
        let compute = || {
            let mut hash = blake3::Hasher::new();
            match &self.kind {
                FileFormat::Safetensors(w) => w.hash(&mut hash),
                FileFormat::Gguf(w) => w.hash(&mut hash),
            }
            hash.finalize().to_hex().to_string()
        };
        self.fingerprint.get_or_init(compute).clone()
    }
}

impl TensorSource for Weights {
    fn load(&self, param: &ParamSpec, precision: Precision) -> Result<Tensor, ModelError> {
        Weights::load(self, param, precision)
    }
}

/// Returns true for tensors that are redundant: rotary frequencies, which are part of the
/// configuration, and the copy of a tied head.
fn is_harmless(name: &str) -> bool {
    const SUFFIXES: [&str; 2] = [".rotary_emb.inv_freq", ".attn_rot_embd"];
    name == params::HF_HEAD
        || ModelConfig::GGUF_ROPE_TENSORS.contains(&name)
        || SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

#[cfg(test)]
mod tests;
