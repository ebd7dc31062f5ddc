//! Tokenizers with their special tokens and chat template, from Hugging Face files or GGUF metadata.

mod gguf;
mod hf;

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

pub use self::hf::{EXTRA_FILES, GENERATION_CONFIG, is_extra_template};
use super::chat::{ChatMessage, ChatTemplate};
use super::error::{ModelError, last_part};
use super::guard::guarded;

/// A tokenizer that knows its model's special tokens and chat format.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    bos: Option<(String, u32)>,
    eos: Option<(String, u32)>,
    template: Option<ChatTemplate>,
    files: Vec<(String, Vec<u8>)>,
    content_hash: String,
    path: PathBuf,
}

/// What a tokenizer is made of.
struct Parts {
    tokenizer: Tokenizer,
    bos_token: Option<String>,
    eos_token: Option<String>,
    /// Every special token variable a template may use.
    special_tokens: Vec<(String, String)>,
    template: Option<String>,
    files: Vec<(String, Vec<u8>)>,
    /// What turns text into tokens, as it was read.
    content: blake3::Hasher,
}

impl ChatTokenizer {
    /// Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of a folder.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        Self::assemble(hf::read(folder)?, folder)
    }

    pub(super) fn from_gguf(gguf: &super::gguf::Gguf) -> Result<Self, ModelError> {
        Self::assemble(gguf::read(gguf)?, &gguf.path)
    }

    fn assemble(mut parts: Parts, path: &Path) -> Result<Self, ModelError> {
        // A tokenizer.json may ask for truncation or padding; lengths are the business of the encoder here.
        parts.tokenizer.with_padding(None);
        parts.tokenizer.with_truncation(None).map_err(|e| wrong(path, e.to_string()))?;
        let id = |token: Option<String>| token.and_then(|t| parts.tokenizer.token_to_id(&t).map(|id| (t, id)));
        let (bos, eos) = (id(parts.bos_token), id(parts.eos_token));
        let mut content = parts.content;
        for (name, token) in &parts.special_tokens {
            content.update(format!("\n{name} {token:?}").as_bytes());
        }
        let content_hash = content.finalize().to_hex().to_string();
        let template = parts.template.map(|source| ChatTemplate::new(&source, parts.special_tokens)).transpose()?;
        let mut assembled =
            ChatTokenizer { bos, eos, template, tokenizer: parts.tokenizer, files: parts.files, content_hash, path: path.to_owned() };
        // A template that names tokens which are not there is found now, not by the first request.
        assembled.encode("", true)?;
        // Later errors are about clients' texts, and go to clients: without the server's folders.
        assembled.path = PathBuf::from(last_part(path));
        Ok(assembled)
    }

    /// The token ids of `text`; with `add_special_tokens`, BOS where the tokenizer adds one.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ModelError> {
        // The library panics at some of what a file may hold.
        let encoding = guarded(|| self.tokenizer.encode_fast(text, add_special_tokens)).map_err(|e| wrong(&self.path, e))?;
        Ok(encoding.map_err(|e| wrong(&self.path, e.to_string()))?.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens included.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        guarded(|| self.tokenizer.decode(ids, false)).map_err(|e| wrong(&self.path, e))?.map_err(|e| wrong(&self.path, e.to_string()))
    }

    /// The token that ends a sequence.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.as_ref().map(|(t, _)| t.as_str())
    }

    /// Its id.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.as_ref().map(|(_, id)| *id)
    }

    /// The id of the token that starts a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos.as_ref().map(|(_, id)| *id)
    }

    /// The token that starts a sequence.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos.as_ref().map(|(t, _)| t.as_str())
    }

    /// Whether dialogues can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Renders a dialogue; encode the result without adding special tokens.
    ///
    /// # Errors
    /// When the model has no chat template, or the template refuses these messages.
    pub fn apply_chat_template(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String, ModelError> {
        let Some(template) = &self.template else {
            let reason = "this model has none: use plain-text prompts and completions, or a chat model".to_owned();
            return Err(ModelError::ChatTemplate { reason });
        };
        template.render(messages, add_generation_prompt)
    }

    /// BLAKE3 of the tokenizer and its special tokens, in hex; the chat template is no part of it.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    /// BLAKE3 of the chat template, in hex; empty without one.
    pub fn template_hash(&self) -> String {
        self.template.as_ref().map(|t| blake3::hash(t.source().as_bytes()).to_hex().to_string()).unwrap_or_default()
    }

    /// The files to write beside exported weights, as they were read: of the tokenizer, the chat
    /// templates and generation_config.json. A name may have a folder in it.
    pub fn files(&self) -> &[(String, Vec<u8>)] {
        &self.files
    }
}

fn wrong(path: &Path, reason: impl Into<String>) -> ModelError {
    ModelError::Tokenizer { path: path.to_owned(), reason: reason.into() }
}
