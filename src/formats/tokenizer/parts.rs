//! The parts of a tokenizer, as read from either file format.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::model::error::ModelError;

/// Name of the template that transformers uses by default.
pub(in crate::formats) const DEFAULT: &str = "default";
/// Name of the template that transformers uses for dialogues with tools.
pub(in crate::formats) const TOOL_USE: &str = "tool_use";

/// The parts that a `ChatTokenizer` is assembled from.
pub(in crate::formats) struct Parts {
    pub tokenizer: Tokenizer,
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    /// Special tokens by the names of the variables through which templates use them.
    pub special_tokens: Vec<(String, String)>,
    /// Chat templates by name. A single unnamed template has the name [`DEFAULT`].
    pub templates: Vec<(String, String)>,
    /// Names and contents of the files to write beside exported weights.
    pub files: Vec<(String, Vec<u8>)>,
    /// Hasher of everything that decides how text is split into tokens, except the special tokens.
    pub content: blake3::Hasher,
}

/// Makes the error for a tokenizer that cannot be used.
pub(in crate::formats) fn wrong(path: &Path, reason: impl Into<String>) -> ModelError {
    ModelError::Tokenizer {
        path: path.to_owned(),
        reason: reason.into(),
    }
}
