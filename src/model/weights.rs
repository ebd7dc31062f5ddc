//! Weights on disk: safetensors (one file or shards) or GGUF. Tensors are read one at a time, under their Hugging Face names.

mod gguf;
mod safetensors;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{DType, Tensor};

pub(super) use self::gguf::GgufWeights;
use self::safetensors::SafetensorsWeights;
use super::config::ModelConfig;
use super::error::ModelError;
use super::gguf::Gguf;
use super::params::{self, ParamSpec, Role};
use crate::domain::training::Precision;

/// An element type that weights are exported in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// IEEE single precision.
    F32,
    /// The upper half of f32.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl ElementType {
    /// All of them, the first is preferred where two are equally common.
    pub const ALL: [ElementType; 3] = [ElementType::F32, ElementType::Bf16, ElementType::F16];

    /// The name in requests and file names.
    pub fn name(self) -> &'static str {
        match self {
            ElementType::F32 => "f32",
            ElementType::Bf16 => "bf16",
            ElementType::F16 => "f16",
        }
    }

    /// The element type that a request names.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// The name in config.json.
    pub fn torch_name(self) -> &'static str {
        match self {
            ElementType::F32 => "float32",
            ElementType::Bf16 => "bfloat16",
            ElementType::F16 => "float16",
        }
    }

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::Bf16 | ElementType::F16 => 2,
        }
    }
}

/// Tensors of one kind: their element type, number of dimensions and number of elements.
pub(super) struct StoredAs {
    dtype: ElementType,
    dims: usize,
    elements: usize,
}

/// Where a model's weights were read, for reading them again after they have been closed.
#[derive(Clone, Debug)]
pub struct WeightFiles {
    /// A GGUF file, or safetensors files in the order in which they were opened.
    files: Vec<PathBuf>,
    is_gguf: bool,
    path: PathBuf,
    fingerprint: String,
}

impl WeightFiles {
    /// Opens the files again.
    ///
    /// # Errors
    /// When one is gone or cannot be read, and [`ModelError::Changed`] when they hold something
    /// else than before: the contents are hashed.
    pub fn open(&self, config: &ModelConfig) -> Result<Weights, ModelError> {
        let kind = match self.is_gguf {
            true => Kind::Gguf(GgufWeights::new(Gguf::open(&self.path)?, config)),
            false => Kind::Safetensors(SafetensorsWeights::open(&self.files)?),
        };
        let weights = Weights::new(kind, &self.path);
        let found = weights.fingerprint();
        if found != self.fingerprint {
            let expected = self.fingerprint.clone();
            return Err(ModelError::Changed { path: self.path.clone(), expected, found });
        }
        Ok(weights)
    }
}

/// The weights of one model.
#[derive(Debug)]
pub struct Weights {
    kind: Kind,
    path: PathBuf,
    fingerprint: OnceLock<String>,
}

#[derive(Debug)]
enum Kind {
    Safetensors(SafetensorsWeights),
    Gguf(GgufWeights),
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists, in a folder.
    ///
    /// # Errors
    /// When there is neither, or a file is truncated or malformed: the file is named.
    pub fn open_folder(folder: &Path) -> Result<Self, ModelError> {
        Ok(Self::new(Kind::Safetensors(SafetensorsWeights::open_folder(folder)?), folder))
    }

    /// Opens one safetensors file.
    pub fn open_safetensors(file: &Path) -> Result<Self, ModelError> {
        Ok(Self::new(Kind::Safetensors(SafetensorsWeights::open(&[file.to_owned()])?), file))
    }

    pub(super) fn from_gguf(weights: GgufWeights, path: &Path) -> Self {
        Self::new(Kind::Gguf(weights), path)
    }

    fn new(kind: Kind, path: &Path) -> Self {
        Weights { kind, path: path.to_owned(), fingerprint: OnceLock::new() }
    }

    /// A parameter's tensor, contiguous, on the CPU: a matrix in `precision`, norms and biases in
    /// f32.
    ///
    /// # Errors
    /// When it is missing, has another shape or an element type that cannot be read.
    pub fn load(&self, param: &ParamSpec, precision: Precision) -> Result<Tensor, ModelError> {
        let dtype = if param.role == Role::Matrix && precision == Precision::Bf16 { DType::BF16 } else { DType::F32 };
        let tensor = match &self.kind {
            Kind::Safetensors(w) => w.load(&param.hf.name, dtype == DType::BF16)?,
            Kind::Gguf(w) => w.load(param)?,
        };
        let name = || param.name().to_owned();
        let tensor = tensor.ok_or_else(|| ModelError::MissingTensor { name: name(), path: self.path.clone() })?;
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

    /// Checks that the configuration calls for what is stored. A tensor elsewhere than in a decoder layer is only warned of: many
    /// files have parts that no forward pass of the language model uses.
    ///
    /// # Errors
    /// [`ModelError::UnexpectedTensor`] for tensors of decoder layers, e.g. biases that the configuration switches off.
    pub fn check_names(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let params = params::params(&config.spec);
        let (stored, called_for): (Vec<&str>, BTreeSet<&str>) = match &self.kind {
            Kind::Safetensors(w) => (w.names().collect(), params.iter().map(|p| p.hf.name.as_str()).collect()),
            Kind::Gguf(w) => (w.names().collect(), params.iter().map(|p| p.gguf.name.as_str()).collect()),
        };
        let mut unexpected: Vec<&str> = stored.into_iter().filter(|name| !called_for.contains(*name) && !is_harmless(name)).collect();
        unexpected.sort_unstable();
        let in_layers: Vec<&&str> = unexpected.iter().filter(|name| params::is_in_block(name)).collect();
        if let Some(first) = in_layers.first() {
            let (name, others) = ((**first).to_owned(), in_layers.len() - 1);
            return Err(ModelError::UnexpectedTensor { name, path: self.path.clone(), others });
        }
        if let Some(first) = unexpected.first() {
            tracing::warn!(
                path = %self.path.display(),
                tensor = *first,
                tensors = unexpected.len(),
                "the weights hold tensors that the configuration does not call for: they are not used"
            );
        }
        Ok(())
    }

    /// Returns the element type that most of the numbers have. Quantised ones count as f16: that
    /// is what their scales are stored in, and it rounds less than bf16.
    pub fn element_type(&self) -> ElementType {
        let tensors = self.stored();
        let count = |dtype| tensors.iter().filter(|t| t.dtype == dtype).map(|t| t.elements).sum::<usize>();
        let mut best = ElementType::F32;
        for dtype in ElementType::ALL {
            if count(dtype) > count(best) {
                best = dtype;
            }
        }
        best
    }

    /// Returns true if [`Weights::load`] in `precision` rounds nothing.
    pub fn is_exact_in(&self, precision: Precision) -> bool {
        let is_bf16 = |t: &StoredAs| t.dims != 2 || t.dtype == ElementType::Bf16;
        precision == Precision::F32 || self.stored().iter().all(is_bf16)
    }

    fn stored(&self) -> Vec<StoredAs> {
        match &self.kind {
            Kind::Safetensors(w) => w.stored(),
            Kind::Gguf(w) => w.stored(),
        }
    }

    /// Returns what is needed to open the same weights again.
    pub fn files(&self) -> WeightFiles {
        let (files, is_gguf) = match &self.kind {
            Kind::Safetensors(w) => (w.paths(), false),
            Kind::Gguf(_) => (vec![self.path.clone()], true),
        };
        WeightFiles { files, is_gguf, path: self.path.clone(), fingerprint: self.fingerprint() }
    }

    /// BLAKE3 of the files' contents, in hex; computed once.
    pub fn fingerprint(&self) -> String {
        let compute = || {
            let mut hash = blake3::Hasher::new();
            match &self.kind {
                Kind::Safetensors(w) => w.hash(&mut hash),
                Kind::Gguf(w) => w.hash(&mut hash),
            }
            hash.finalize().to_hex().to_string()
        };
        self.fingerprint.get_or_init(compute).clone()
    }
}

/// Whether a tensor says nothing that the configuration and the other tensors do not: rotary frequencies, and the copy of a tied head.
fn is_harmless(name: &str) -> bool {
    const SUFFIXES: [&str; 2] = [".rotary_emb.inv_freq", ".attn_rot_embd"];
    const NAMES: [&str; 2] = [params::HF_HEAD, ModelConfig::GGUF_ROPE_FREQS];
    NAMES.contains(&name) || SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}
