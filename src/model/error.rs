//! What can go wrong while a model is found, read or prepared, or while a pass runs.

use std::path::{Path, PathBuf};

/// An error of the model layer: what was wrong, in which file, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Nothing at that place is a model.
    #[error("model '{model}' not found; tried {tried}")]
    NotFound {
        /// What was asked for.
        model: String,
        /// Where it was looked for, and what each place answered.
        tried: String,
    },
    /// A field of config.json, or the GGUF metadata that stands for it, cannot be used.
    #[error("{}: field '{field}': {reason}", path.display())]
    InvalidConfig {
        /// The file.
        path: PathBuf,
        /// The field, as the file spells it.
        field: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A weight file is truncated or malformed.
    #[error("{}: {reason}; the file is corrupt or incomplete, fetch it again", path.display())]
    CorruptWeights {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that the configuration calls for is not stored.
    #[error("{}: no tensor '{name}', which the configuration calls for; the weights belong to another model", path.display())]
    MissingTensor {
        /// Its Hugging Face name.
        name: String,
        /// The file or folder.
        path: PathBuf,
    },
    /// A decoder layer has a tensor that the configuration does not call for.
    #[error(
        "{}: tensor '{name}'{} belongs to a decoder layer, but the configuration does not call for it, so the model would compute \
         something else without it: correct config.json (attention_bias, mlp_bias, num_hidden_layers, model_type), or remove it",
        path.display(), and_others(*others)
    )]
    UnexpectedTensor {
        /// The first one, as the file names it.
        name: String,
        /// The file or folder.
        path: PathBuf,
        /// How many more there are.
        others: usize,
    },
    /// A stored tensor does not have the shape that the configuration gives it.
    #[error("{}: tensor '{name}' has shape {found:?}, the configuration gives {expected:?}", path.display())]
    ShapeMismatch {
        /// Its Hugging Face name.
        name: String,
        /// The file it is stored in.
        path: PathBuf,
        /// By the configuration.
        expected: Vec<usize>,
        /// In the file.
        found: Vec<usize>,
    },
    /// A kind of model, file or tokenizer that is not implemented.
    #[error("{what} is not supported")]
    Unsupported {
        /// What it is, with the supported ones.
        what: String,
    },
    /// The tokenizer's files or metadata cannot be used.
    #[error("{}: tokenizer: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The chat template does not compile or cannot render these messages.
    #[error("chat template: {reason}")]
    ChatTemplate {
        /// What the template engine, or the template itself, says.
        reason: String,
    },
    /// A weight file holds something else than when it was loaded, or cannot be read any more.
    #[error("{}: the file is no longer what was loaded from it: {reason}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// The tensor with its hash then and now, or the operating system's answer.
        reason: String,
    },
    /// A value does not fit the element type that was asked for.
    #[error(
        "tensor '{name}' has the value {value}, which {dtype} cannot hold: export it as f32 or bf16"
    )]
    TooLarge {
        /// The tensor's Hugging Face name.
        name: String,
        /// The value.
        value: f32,
        /// The element type.
        dtype: &'static str,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its answer.
        source: std::io::Error,
    },
    /// An adapter's files cannot be used with this model.
    #[error("{}: adapter: {reason}", path.display())]
    Adapter {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

fn and_others(others: usize) -> String {
    if others == 0 { String::new() } else { format!(" (and {others} others)") }
}

/// The last part of a path: what clients may see of it.
pub fn last_part(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl ModelError {
    /// Returns the message with the file's name in place of its path. Folders of the server are
    /// nothing that a client can use or should see.
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

    /// [`ModelError::Io`] about `path`, for `map_err`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError + '_ {
        move |source| ModelError::Io { path: path.to_owned(), source }
    }

    /// [`ModelError::CorruptWeights`] about `path`.
    pub(crate) fn corrupt(path: &Path, reason: impl Into<String>) -> ModelError {
        ModelError::CorruptWeights { path: path.to_owned(), reason: reason.into() }
    }
}
