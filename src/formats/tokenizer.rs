//! Tokenizers with their special tokens and chat template, from Hugging Face files or GGUF
//! metadata.

pub(super) mod parts;

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use self::parts::{DEFAULT, Parts, TOOL_USE, wrong};
use super::chat_template::{ChatMessage, ChatTemplate, RenderOptions};
pub use super::hf::tokenizer::{EXTRA_FILES, GENERATION_CONFIG, is_extra_template};
use super::{gguf, hf};
use crate::model::error::{ModelError, last_part};
use crate::model::guard::guarded;

/// A tokenizer that knows its model's special tokens and chat format.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    bos: Option<(String, u32)>,
    eos: Option<(String, u32)>,
    templates: Templates,
    files: Vec<(String, Vec<u8>)>,
    content_hash: String,
    vocabulary: Vocabulary,
    path: PathBuf,
}

/// The tokens and their ids, without the rules that turn text into them.
#[derive(Debug)]
struct Vocabulary {
    /// BLAKE3 of every id with its token, in hex.
    hash: String,
    /// The largest id plus one: the embedding rows that a model needs for it.
    rows: usize,
}

impl Vocabulary {
    fn of(tokenizer: &Tokenizer) -> Self {
        let mut tokens: Vec<(u32, String)> =
            tokenizer.get_vocab(true).into_iter().map(|(t, id)| (id, t)).collect();
        tokens.sort_unstable();
        let mut hash = blake3::Hasher::new();
        for (id, token) in &tokens {
            hash.update(&id.to_le_bytes());
            hash.update(&(token.len() as u64).to_le_bytes());
            hash.update(token.as_bytes());
        }
        let rows = tokens.last().map_or(0, |(id, _)| *id as usize + 1);
        Vocabulary { hash: hash.finalize().to_hex().to_string(), rows }
    }
}

impl ChatTokenizer {
    /// Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of a folder.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        Self::assemble(hf::tokenizer::read(folder)?, folder)
    }

    pub(super) fn from_gguf(gguf: &gguf::reader::Gguf) -> Result<Self, ModelError> {
        Self::assemble(gguf::tokenizer::read(gguf)?, &gguf.path)
    }

    fn assemble(mut parts: Parts, path: &Path) -> Result<Self, ModelError> {
        // A tokenizer.json may ask for truncation or padding; lengths are the business of the
        // encoder here.
        parts.tokenizer.with_padding(None);
        parts.tokenizer.with_truncation(None).map_err(|e| wrong(path, e.to_string()))?;
        let id = |token: Option<String>| {
            token.and_then(|t| parts.tokenizer.token_to_id(&t).map(|id| (t, id)))
        };
        let (bos, eos) = (id(parts.bos_token), id(parts.eos_token));
        let mut content = parts.content;
        for (name, token) in &parts.special_tokens {
            content.update(format!("\n{name} {token:?}").as_bytes());
        }
        let content_hash = content.finalize().to_hex().to_string();
        let vocabulary =
            guarded(|| Vocabulary::of(&parts.tokenizer)).map_err(|e| wrong(path, e))?;
        let templates = Templates::compile(parts.templates, &parts.special_tokens, path);
        let mut assembled = ChatTokenizer {
            bos,
            eos,
            templates,
            tokenizer: parts.tokenizer,
            files: parts.files,
            content_hash,
            vocabulary,
            path: path.to_owned(),
        };
        // A template that names tokens which are not there is found now, not by the first request.
        assembled.encode("", true)?;
        // Later errors are about clients' texts, and go to clients: without the server's folders.
        assembled.path = PathBuf::from(last_part(path));
        Ok(assembled)
    }

    /// The token ids of `text`; with `add_special_tokens`, BOS where the tokenizer adds one.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ModelError> {
        // The library panics at some of what a file may hold.
        let encoding = guarded(|| self.tokenizer.encode_fast(text, add_special_tokens))
            .map_err(|e| wrong(&self.path, e))?;
        Ok(encoding.map_err(|e| wrong(&self.path, e.to_string()))?.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens included.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        guarded(|| self.tokenizer.decode(ids, false))
            .map_err(|e| wrong(&self.path, e))?
            .map_err(|e| wrong(&self.path, e.to_string()))
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
        [&self.templates.default, &self.templates.tool_use]
            .into_iter()
            .flatten()
            .any(|t| t.compiled.is_ok())
    }

    /// Renders a dialogue; encode the result without adding special tokens.
    ///
    /// # Errors
    /// When the model has no chat template, or the template does not compile or refuses these
    /// messages.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        options: &RenderOptions,
    ) -> Result<String, ModelError> {
        let template = self
            .templates
            .find(options.tools.is_some())
            .map_err(|reason| ModelError::ChatTemplate { reason })?;
        template.render(messages, options)
    }

    /// BLAKE3 of the tokenizer and its special tokens, in hex; the chat template is no part of it.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    /// Returns true if every token id means the same token in both. They may still split text
    /// differently, and differ in their special tokens' roles and chat templates.
    pub fn has_vocabulary_of(&self, other: &ChatTokenizer) -> bool {
        self.vocabulary.hash == other.vocabulary.hash
    }

    /// The embedding rows that a model needs for its tokens: the largest id plus one.
    pub fn vocabulary_rows(&self) -> usize {
        self.vocabulary.rows
    }

    /// BLAKE3 of the chat template, in hex, of both where dialogues with tools have one of their
    /// own; empty without any.
    pub fn template_hash(&self) -> String {
        let of = |text: &str| blake3::hash(text.as_bytes()).to_hex().to_string();
        match (&self.templates.default, &self.templates.tool_use) {
            (None, None) => String::new(),
            (Some(default), None) => of(&default.source),
            (default, Some(tools)) => {
                let default = default.as_ref().map_or("", |t| t.source.as_str());
                of(&format!("{}\n{default}\n{}", default.len(), tools.source))
            }
        }
    }

    /// The files to write beside exported weights, as they were read: of the tokenizer, the chat
    /// templates and generation_config.json. A name may have a folder in it.
    pub fn files(&self) -> &[(String, Vec<u8>)] {
        &self.files
    }
}

/// A model's chat templates.
#[derive(Debug, Default)]
struct Templates {
    default: Option<NamedTemplate>,
    tool_use: Option<NamedTemplate>,
    /// The names of all, for errors.
    names: Vec<String>,
}

/// A template that may not compile: it is an error of the dialogues that need it, not of the model,
/// which can be used with plain text.
#[derive(Debug)]
struct NamedTemplate {
    source: String,
    compiled: Result<ChatTemplate, String>,
}

impl Templates {
    fn compile(
        sources: Vec<(String, String)>,
        special_tokens: &[(String, String)],
        path: &Path,
    ) -> Self {
        let mut templates = Templates::default();
        for (name, source) in sources {
            templates.names.push(name.clone());
            let place = match name.as_str() {
                DEFAULT => &mut templates.default,
                TOOL_USE => &mut templates.tool_use,
                _ => continue,
            };
            let compiled = ChatTemplate::new(&source, special_tokens.to_vec()).map_err(|e| {
                let reason = match e {
                    ModelError::ChatTemplate { reason } => reason,
                    other => other.to_string(),
                };
                tracing::warn!(path = %path.display(), name, error = reason, "the chat template does not compile: only plain text can be used");
                format!("the model's template {name:?} does not compile: {reason}; use plain-text prompts and completions, or serve another template")
            });
            *place = Some(NamedTemplate { source, compiled });
        }
        templates
    }

    /// The template that transformers chooses.
    fn find(&self, with_tools: bool) -> Result<&ChatTemplate, String> {
        let chosen = self.tool_use.as_ref().filter(|_| with_tools).or(self.default.as_ref());
        match chosen {
            Some(template) => template.compiled.as_ref().map_err(Clone::clone),
            None if self.names.is_empty() => {
                Err("this model has none: use plain-text prompts and completions, or a chat model"
                    .to_owned())
            }
            None => Err(format!(
                "this model has templates named {} and none named {DEFAULT:?}: use plain-text prompts and completions",
                self.names.join(", ")
            )),
        }
    }
}
