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

/// A tokenizer with its model's special tokens and chat templates.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    bos: Option<(String, u32)>,
    eos: Option<(String, u32)>,
    templates: Templates,
    files: Vec<(String, Vec<u8>)>,
    content_hash: String,
    vocabulary: Vocabulary,
    /// Ids of `eos_token_id` in the model's configuration.
    end_ids_of_config: Vec<u32>,
    path: PathBuf,
}

/// Summary of the mapping from ids to tokens, without the rules that split text into tokens.
#[derive(Debug)]
struct Vocabulary {
    /// BLAKE3 of every id with its token, in hex.
    hash: String,
    /// The largest id plus one: the number of embedding rows that a model needs.
    rows: usize,
}

impl Vocabulary {
    fn of(tokenizer: &Tokenizer) -> Self {
        let mut tokens: Vec<(u32, String)> = tokenizer
            .get_vocab(true)
            .into_iter()
            .map(|(t, id)| (id, t))
            .collect();
        tokens.sort_unstable();
        let mut hash = blake3::Hasher::new();
        for (id, token) in &tokens {
            hash.update(&id.to_le_bytes());
            hash.update(&(token.len() as u64).to_le_bytes());
            hash.update(token.as_bytes());
        }
        let rows = tokens.last().map_or(0, |(id, _)| *id as usize + 1);
        Vocabulary {
            hash: hash.finalize().to_hex().to_string(),
            rows,
        }
    }
}

impl ChatTokenizer {
    /// Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat templates
    /// of a folder.
    ///
    /// # Errors
    /// Returns an error that names the file if tokenizer.json is missing, or if a file cannot be
    /// read or is malformed. A chat template that does not compile is only logged.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        Self::assemble(hf::tokenizer::read(folder)?, folder)
    }

    pub(super) fn from_gguf(gguf: &gguf::reader::Gguf) -> Result<Self, ModelError> {
        Self::assemble(gguf::tokenizer::read(gguf)?, &gguf.path)
    }

    fn assemble(mut parts: Parts, path: &Path) -> Result<Self, ModelError> {
        // A tokenizer.json may ask for truncation or padding. Here only the pair encoder limits
        // lengths.
        parts.tokenizer.with_padding(None);
        parts
            .tokenizer
            .with_truncation(None)
            .map_err(|e| wrong(path, e.to_string()))?;
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
            end_ids_of_config: Vec::new(),
            path: path.to_owned(),
        };
        // A post-processor that names tokens outside the vocabulary must fail now, not in the first
        // request.
        assembled.encode("", true)?;
        // Later errors are sent to clients, which must not see the server's folders.
        assembled.path = PathBuf::from(last_part(path));
        Ok(assembled)
    }

    /// Sets the ids of `eos_token_id` in the model's configuration. They end a generated text if
    /// there is no generation_config.json that names such tokens.
    pub(super) fn with_end_ids(self, of_config: &[u32]) -> Self {
        ChatTokenizer {
            end_ids_of_config: of_config.to_vec(),
            ..self
        }
    }

    /// Encodes `text` as token ids. With `add_special_tokens`, the special tokens that the
    /// tokenizer adds (e.g. BOS) are included.
    ///
    /// # Errors
    /// Returns an error if the tokenizer library fails or panics.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ModelError> {
        // The library panics at some malformed tokenizer files.
        let encoding = guarded(|| self.tokenizer.encode_fast(text, add_special_tokens))
            .map_err(|e| wrong(&self.path, e))?;
        Ok(encoding
            .map_err(|e| wrong(&self.path, e.to_string()))?
            .get_ids()
            .to_vec())
    }

    /// Decodes token ids to text, including special tokens.
    ///
    /// # Errors
    /// Returns an error if the tokenizer library fails or panics.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        guarded(|| self.tokenizer.decode(ids, false))
            .map_err(|e| wrong(&self.path, e))?
            .map_err(|e| wrong(&self.path, e.to_string()))
    }

    /// Decodes token ids to text without special tokens.
    ///
    /// # Errors
    /// Returns an error if the tokenizer library fails or panics.
    pub fn decode_text(&self, ids: &[u32]) -> Result<String, ModelError> {
        guarded(|| self.tokenizer.decode(ids, true))
            .map_err(|e| wrong(&self.path, e))?
            .map_err(|e| wrong(&self.path, e.to_string()))
    }

    /// Returns the ids of all tokens that end a generated text: the end-of-sequence token, and
    /// those of generation_config.json. If that file is absent or names none, those of the model's
    /// configuration take their place.
    pub fn end_ids(&self) -> Vec<u32> {
        let config = self
            .files
            .iter()
            .find(|(name, _)| name == GENERATION_CONFIG)
            .and_then(|(_, bytes)| serde_json::from_slice::<serde_json::Value>(bytes).ok());
        let listed = match config.as_ref().map(|config| &config["eos_token_id"]) {
            Some(serde_json::Value::Array(all)) => all.clone(),
            Some(one) => vec![one.clone()],
            None => Vec::new(),
        };
        let mut ids: Vec<u32> = listed
            .iter()
            .filter_map(|id| u32::try_from(id.as_u64()?).ok())
            .collect();
        if ids.is_empty() {
            ids.extend_from_slice(&self.end_ids_of_config);
        }
        ids.extend(self.eos_id());
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Returns the token that ends a sequence.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.as_ref().map(|(t, _)| t.as_str())
    }

    /// Returns the id of the token that ends a sequence.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.as_ref().map(|(_, id)| *id)
    }

    /// Returns the id of the token that starts a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos.as_ref().map(|(_, id)| *id)
    }

    /// Returns the token that starts a sequence.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos.as_ref().map(|(t, _)| t.as_str())
    }

    /// Returns true if at least one chat template compiled.
    pub fn has_chat_template(&self) -> bool {
        [&self.templates.default, &self.templates.tool_use]
            .into_iter()
            .flatten()
            .any(|t| t.compiled.is_ok())
    }

    /// Renders a dialogue. Encode the result without adding special tokens.
    ///
    /// # Errors
    /// Returns an error if the model has no chat template, the template does not compile, or it
    /// refuses these messages.
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

    /// Returns the BLAKE3 hash of the tokenizer and its special tokens, in hex. Chat templates are
    /// not part of it.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    /// Returns true if every id stands for the same token in both tokenizers. They may still split
    /// text differently, and may differ in the roles of special tokens and in chat templates.
    pub fn has_vocabulary_of(&self, other: &ChatTokenizer) -> bool {
        self.vocabulary.hash == other.vocabulary.hash
    }

    /// Returns the number of embedding rows that a model needs: the largest token id plus one.
    pub fn vocabulary_rows(&self) -> usize {
        self.vocabulary.rows
    }

    /// Returns the BLAKE3 hash of the default chat template, in hex. If dialogues with tools have a
    /// template of their own, the hash covers both. It is empty if there is no template.
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

    /// Returns name and contents of the files to write beside exported weights. From a folder
    /// these are the tokenizer's files, the chat templates and those of [`EXTRA_FILES`] that the
    /// model has, as they were read. From GGUF they are a tokenizer.json and a
    /// tokenizer_config.json that were made from the metadata. A name may contain a folder.
    pub fn files(&self) -> &[(String, Vec<u8>)] {
        &self.files
    }
}

/// A model's chat templates.
#[derive(Debug, Default)]
struct Templates {
    default: Option<NamedTemplate>,
    tool_use: Option<NamedTemplate>,
    /// The names of all templates, for error messages.
    names: Vec<String>,
}

/// A template and the result of compiling it. A failure is reported for dialogues that need the
/// template, not when the model is loaded, because the model still works with plain text.
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
                tracing::warn!(
                    path = %path.display(),
                    name,
                    error = reason,
                    "the chat template does not compile: dialogues that need it are refused"
                );
                format!(
                    "the model's template {name:?} does not compile: {reason}; \
                     use plain-text prompts and completions, or serve another template"
                )
            });
            *place = Some(NamedTemplate { source, compiled });
        }
        templates
    }

    /// Returns the template that transformers chooses: `tool_use` for dialogues with tools if there
    /// is one, else `default`.
    fn find(&self, with_tools: bool) -> Result<&ChatTemplate, String> {
        let chosen = self
            .tool_use
            .as_ref()
            .filter(|_| with_tools)
            .or(self.default.as_ref());
        match chosen {
            Some(template) => template.compiled.as_ref().map_err(Clone::clone),
            None if self.names.is_empty() => Err(
                "this model has none: use plain-text prompts and completions, or a chat model"
                    .to_owned(),
            ),
            None => Err(format!(
                "this model has templates named {} and none named {DEFAULT:?}: \
                 use plain-text prompts and completions",
                self.names.join(", ")
            )),
        }
    }
}
