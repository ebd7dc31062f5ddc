//! tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::{Parts, wrong};
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

/// The names of the further chat templates in a model's folder, sorted.
fn extra_templates(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder.join(EXTRA_TEMPLATES)) else { return Vec::new() };
    let names = entries.filter_map(|e| Some(format!("{EXTRA_TEMPLATES}/{}", e.ok()?.file_name().to_str()?)));
    let mut names: Vec<String> = names.filter(|name| is_extra_template(name) && folder.join(name).is_file()).collect();
    names.sort();
    names
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
    let template = match take(TEMPLATE)? {
        Some(bytes) => Some(String::from_utf8(bytes).map_err(|_| wrong(&folder.join(TEMPLATE), "is not UTF-8"))?),
        None => template(&config),
    };
    for name in EXTRA_FILES {
        take(name)?;
    }
    for name in extra_templates(folder) {
        take(&name)?;
    }
    let find = |name: &str| special_tokens.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone());
    let mut content = blake3::Hasher::new();
    content.update(&bytes);
    Ok(Parts { bos_token: find("bos_token"), eos_token: find("eos_token"), tokenizer, special_tokens, template, files, content })
}

/// A special token is a string or an AddedToken object.
fn token(config: &Value, name: &str) -> Option<String> {
    let value = config.get(name)?;
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str)).map(str::to_owned)
}

/// One template, or a list of named ones of which `default` is used.
fn template(config: &Value) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(s) => Some(s.clone()),
        Value::Array(named) => named
            .iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|t| t.get("template"))
            .and_then(Value::as_str)
            .map(str::to_owned),
        _ => None,
    }
}
