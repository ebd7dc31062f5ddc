//! Errors of finding, reading and preparing a model, and of running a pass.

use std::path::{Path, PathBuf};

/// An error of the model layer. Its message names the file, if one is concerned, and the remedy, if
/// there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// No model was found under the given name.
    #[error("model '{model}' not found; tried {tried}")]
    NotFound {
        /// The name or path that was requested.
        model: String,
        /// The places that were searched, each with the reason why it did not match.
        tried: String,
    },
    /// A field of config.json, or the corresponding GGUF metadata, is missing or has an invalid
    /// value.
    #[error("{}: field '{field}': {reason}", path.display())]
    InvalidConfig {
        /// Path of the file.
        path: PathBuf,
        /// Name of the field as in the file. For some values of GGUF metadata, the name that they
        /// have in a config.json.
        field: String,
        /// The problem and the values that are accepted.
        reason: String,
    },
    /// A weight file is truncated or malformed.
    #[error("{}: {reason}; the file is corrupt or incomplete, fetch it again", path.display())]
    CorruptWeights {
        /// Path of the file.
        path: PathBuf,
        /// The problem.
        reason: String,
    },
    /// The weight files lack a tensor that the configuration requires.
    #[error(
        "{}: no tensor '{name}', which the configuration requires; the weights belong to another \
         model",
        path.display()
    )]
    MissingTensor {
        /// The tensor's Hugging Face name; for the embedding of a GGUF file, its name there.
        name: String,
        /// Path of the file or folder.
        path: PathBuf,
    },
    /// The weight files have a tensor in a decoder layer that the configuration does not describe.
    #[error(
        "{}: tensor '{name}'{} belongs to a decoder layer, but the configuration does not describe \
         it. Ignoring it would change the model's results: correct the configuration (in \
         config.json attention_bias, mlp_bias, num_hidden_layers or model_type; in GGUF \
         block_count) or remove the tensor",
        path.display(), and_others(*others)
    )]
    UnexpectedTensor {
        /// Name of the first such tensor in the file.
        name: String,
        /// Path of the file or folder.
        path: PathBuf,
        /// Number of further such tensors.
        others: usize,
    },
    /// The shape of a stored tensor differs from the configuration.
    #[error(
        "{}: tensor '{name}' has shape {found:?}, the configuration requires {expected:?}",
        path.display()
    )]
    ShapeMismatch {
        /// The tensor's Hugging Face name, or PEFT's for a tensor of an adapter.
        name: String,
        /// The file that stores it.
        path: PathBuf,
        /// The shape that the configuration requires.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A kind of model, file or tokenizer that is not implemented.
    #[error("not supported: {what}")]
    Unsupported {
        /// The unsupported thing, followed by the supported alternatives or the remedy if there are
        /// any.
        what: String,
    },
    /// The tokenizer's files or metadata are missing or invalid.
    #[error("{}: tokenizer: {reason}", path.display())]
    Tokenizer {
        /// Path of the file.
        path: PathBuf,
        /// The problem.
        reason: String,
    },
    /// The chat template does not compile or cannot render these messages.
    #[error("chat template: {reason}")]
    ChatTemplate {
        /// The message of the template engine or of the template itself.
        reason: String,
    },
    /// A weight file has changed since it was loaded, or can no longer be read.
    #[error("{}: the file has changed since the model was loaded: {reason}", path.display())]
    Changed {
        /// Path of the file.
        path: PathBuf,
        /// The tensor with its old and new hash, or the error of the operating system.
        reason: String,
    },
    /// A value is too large for the requested element type.
    #[error(
        "tensor '{name}' has the value {value}, which {dtype} cannot hold: export it as f32 or bf16"
    )]
    TooLarge {
        /// The tensor's Hugging Face name.
        name: String,
        /// The value that does not fit.
        value: f32,
        /// The requested element type.
        dtype: &'static str,
    },
    /// A file operation failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// An adapter's files cannot be used with this model.
    #[error("{}: adapter: {reason}", path.display())]
    Adapter {
        /// Path of the file or folder.
        path: PathBuf,
        /// The problem.
        reason: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

fn and_others(others: usize) -> String {
    if others == 0 {
        String::new()
    } else {
        format!(" (and {others} others)")
    }
}

/// Returns the last part of a path. Clients are shown only this part.
pub fn last_part(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

impl ModelError {
    /// Returns the message with the file's name in place of its absolute path: a client cannot use
    /// the server's folders and should not learn them.
    pub fn for_clients(&self) -> String {
        let text = self.to_string();
        match self.path().filter(|path| path.is_absolute()) {
            Some(path) => text.replace(&path.display().to_string(), &last_part(path)),
            None => text,
        }
    }

    fn path(&self) -> Option<&Path> {
        match self {
            ModelError::NotFound { model, .. } => Some(Path::new(model)),
            ModelError::InvalidConfig { path, .. }
            | ModelError::CorruptWeights { path, .. }
            | ModelError::MissingTensor { path, .. }
            | ModelError::UnexpectedTensor { path, .. }
            | ModelError::ShapeMismatch { path, .. }
            | ModelError::Tokenizer { path, .. }
            | ModelError::Changed { path, .. }
            | ModelError::Io { path, .. }
            | ModelError::Adapter { path, .. } => Some(path),
            ModelError::Unsupported { .. }
            | ModelError::ChatTemplate { .. }
            | ModelError::TooLarge { .. }
            | ModelError::Candle(_) => None,
        }
    }

    /// Returns a function for `map_err` that makes a [`ModelError::Io`] about `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError + '_ {
        move |source| ModelError::Io {
            path: path.to_owned(),
            source,
        }
    }

    /// Makes a [`ModelError::CorruptWeights`] about `path`.
    pub(crate) fn corrupt(path: &Path, reason: impl Into<String>) -> ModelError {
        ModelError::CorruptWeights {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
