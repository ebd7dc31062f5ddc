//! What a tokenizer is read as, whichever file it comes from.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::model::error::ModelError;

/// The name of the template that transformers uses when it is not asked for another.
pub(in crate::formats) const DEFAULT: &str = "default";
/// The name of the template that transformers uses for dialogues with tools.
pub(in crate::formats) const TOOL_USE: &str = "tool_use";

/// What a tokenizer is made of.
pub(in crate::formats) struct Parts {
    pub tokenizer: Tokenizer,
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    /// Every special token variable a template may use.
    pub special_tokens: Vec<(String, String)>,
    /// Chat templates by name; a model with one of them has it as [`DEFAULT`].
    pub templates: Vec<(String, String)>,
    pub files: Vec<(String, Vec<u8>)>,
    /// What turns text into tokens, as it was read.
    pub content: blake3::Hasher,
}

/// The error for a tokenizer that cannot be used.
pub(in crate::formats) fn wrong(path: &Path, reason: impl Into<String>) -> ModelError {
    ModelError::Tokenizer { path: path.to_owned(), reason: reason.into() }
}
