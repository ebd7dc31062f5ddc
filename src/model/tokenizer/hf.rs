//! tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and the
//! further templates in additional_chat_templates.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::{DEFAULT, Parts, wrong};
use crate::model::error::ModelError;
use crate::model::guard::guarded;

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
const SPECIAL: &str = "special_tokens_map.json";

/// The folder of chat templates besides the default one.
const EXTRA_TEMPLATES: &str = "additional_chat_templates";

/// The decoding defaults of transformers' `generate`, the end-of-sequence tokens among them.
pub const GENERATION_CONFIG: &str = "generation_config.json";

/// Files that this program does not read, but that other programs want beside the weights.
pub const EXTRA_FILES: [&str; 9] = [
    GENERATION_CONFIG,
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.json",
];

/// Returns true for `additional_chat_templates/NAME.jinja`.
pub fn is_extra_template(file: &str) -> bool {
    let name = file.strip_prefix(EXTRA_TEMPLATES).and_then(|rest| rest.strip_prefix('/'));
    name.is_some_and(|name| name.ends_with(".jinja") && !name.starts_with('.') && !name.contains(['/', '\\']))
}

pub(super) fn read(folder: &Path) -> Result<Parts, ModelError> {
    let mut files = Vec::new();
    let mut take = |name: &str| -> Result<Option<Vec<u8>>, ModelError> {
        let path = folder.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => {
                files.push((name.to_owned(), bytes.clone()));
                Ok(Some(bytes))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(ModelError::io(&path)(e)),
        }
    };
    let path = folder.join(TOKENIZER);
    let bytes = take(TOKENIZER)?
        .ok_or_else(|| wrong(&path, "is missing: a fast tokenizer is needed (save it with transformers' save_pretrained)"))?;
    // The library panics at some malformed decoders.
    let tokenizer = guarded(|| Tokenizer::from_bytes(&bytes)).map_err(|e| wrong(&path, e))?.map_err(|e| wrong(&path, e.to_string()))?;

    let object = |name: &str, bytes: Option<Vec<u8>>| -> Result<Value, ModelError> {
        match bytes {
            Some(b) => serde_json::from_slice(&b).map_err(|e| wrong(&folder.join(name), format!("not JSON: {e}"))),
            None => Ok(Value::Null),
        }
    };
    let config = object(CONFIG, take(CONFIG)?)?;
    let special = object(SPECIAL, take(SPECIAL)?)?;
    let mut special_tokens = Vec::new();
    for name in ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"] {
        if let Some(token) = token(&config, name).or_else(|| token(&special, name)) {
            special_tokens.push((name.to_owned(), token));
        }
    }
    let mut template_files: Vec<(String, String)> =
        more_templates(folder)?.into_iter().map(|n| (n.clone(), format!("{EXTRA_TEMPLATES}/{n}.jinja"))).collect();
    template_files.insert(0, (DEFAULT.to_owned(), TEMPLATE.to_owned()));
    let mut templates = Vec::new();
    for (name, file) in template_files {
        if let Some(bytes) = take(&file)? {
            templates.push((name, String::from_utf8(bytes).map_err(|_| wrong(&folder.join(&file), "is not UTF-8"))?));
        }
    }
    // Files replace what the configuration holds.
    if templates.is_empty() {
        templates = configured_templates(&config);
    }
    for name in EXTRA_FILES {
        take(name)?;
    }
    let find = |name: &str| special_tokens.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone());
    let mut content = blake3::Hasher::new();
    content.update(&bytes);
    Ok(Parts { bos_token: find("bos_token"), eos_token: find("eos_token"), tokenizer, special_tokens, templates, files, content })
}

/// A special token is a string or an AddedToken object.
fn token(config: &Value, name: &str) -> Option<String> {
    let value = config.get(name)?;
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str)).map(str::to_owned)
}

/// One template, or a list of named ones.
fn configured_templates(config: &Value) -> Vec<(String, String)> {
    let named = |t: &Value| {
        let text = |key: &str| t.get(key).and_then(Value::as_str).map(str::to_owned);
        Some((text("name")?, text("template")?))
    };
    match config.get("chat_template") {
        Some(Value::String(template)) => vec![(DEFAULT.to_owned(), template.clone())],
        Some(Value::Array(templates)) => templates.iter().filter_map(named).collect(),
        _ => Vec::new(),
    }
}

/// The names of the files in the folder of further templates, in alphabetical order.
fn more_templates(folder: &Path) -> Result<Vec<String>, ModelError> {
    let path = folder.join(EXTRA_TEMPLATES);
    let entries = match std::fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(e) => return Err(ModelError::io(&path)(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let file = entry.map_err(ModelError::io(&path))?.file_name();
        names.extend(file.to_str().and_then(|f| f.strip_suffix(".jinja")).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}
