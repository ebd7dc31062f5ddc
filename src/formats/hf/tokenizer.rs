//! Reads a tokenizer from tokenizer.json, tokenizer_config.json, special_tokens_map.json,
//! chat_template.jinja and the further templates in additional_chat_templates.

use std::path::Path;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::formats::tokenizer::parts::{DEFAULT, Parts, wrong};
use crate::model::error::ModelError;
use crate::model::guard::guarded;

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
const MODEL_CONFIG: &str = "config.json";
/// Model types for which transformers ignores the class LlamaTokenizer in tokenizer_config.json: it
/// uses tokenizer.json as it is, or another class.
const OTHER_CLASS: [&str; 11] = [
    "glm4",
    "granite",
    "ministral",
    "ministral3",
    "mistral",
    "mistral3",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
];
const SPECIAL: &str = "special_tokens_map.json";

/// Folder of the chat templates besides the default one.
const EXTRA_TEMPLATES: &str = "additional_chat_templates";

/// File with the defaults of transformers' `generate`, including the end-of-sequence tokens.
pub const GENERATION_CONFIG: &str = "generation_config.json";

/// Files that other programs need beside the weights. This program reads only
/// [`GENERATION_CONFIG`] of them.
pub const EXTRA_FILES: [&str; 12] = [
    GENERATION_CONFIG,
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
];

/// Returns true for `additional_chat_templates/NAME.jinja`.
pub fn is_extra_template(file: &str) -> bool {
    let name = file
        .strip_prefix(EXTRA_TEMPLATES)
        .and_then(|rest| rest.strip_prefix('/'));
    name.is_some_and(|name| {
        name.ends_with(".jinja") && !name.starts_with('.') && !name.contains(['/', '\\'])
    })
}

/// Reads the tokenizer, its special tokens and the chat templates of a folder.
///
/// # Errors
/// Returns an error that names the file if tokenizer.json is missing, or if a file cannot be read
/// or is malformed.
pub(in crate::formats) fn read(folder: &Path) -> Result<Parts, ModelError> {
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
    let bytes = take(TOKENIZER)?.ok_or_else(|| {
        wrong(
            &path,
            "is missing: a fast tokenizer is needed (save it with transformers' save_pretrained)",
        )
    })?;
    let object = |name: &str, bytes: Option<Vec<u8>>| -> Result<Value, ModelError> {
        match bytes {
            Some(b) => serde_json::from_slice(&b)
                .map_err(|e| wrong(&folder.join(name), format!("not JSON: {e}"))),
            None => Ok(Value::Null),
        }
    };
    let config = object(CONFIG, take(CONFIG)?)?;
    let pipeline = as_class(&bytes, &config, model_type(folder).as_deref());
    // The library panics at some malformed decoders.
    let tokenizer = guarded(|| Tokenizer::from_bytes(pipeline.as_deref().unwrap_or(&bytes)))
        .map_err(|e| wrong(&path, e))?
        .map_err(|e| wrong(&path, e.to_string()))?;
    let special = object(SPECIAL, take(SPECIAL)?)?;
    let mut special_tokens = Vec::new();
    for name in [
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "mask_token",
    ] {
        if let Some(token) = token(&config, name).or_else(|| token(&special, name)) {
            special_tokens.push((name.to_owned(), token));
        }
    }
    let mut template_files: Vec<(String, String)> = more_templates(folder)?
        .into_iter()
        .map(|n| (n.clone(), format!("{EXTRA_TEMPLATES}/{n}.jinja")))
        .collect();
    template_files.insert(0, (DEFAULT.to_owned(), TEMPLATE.to_owned()));
    let mut templates = Vec::new();
    for (name, file) in template_files {
        if let Some(bytes) = take(&file)? {
            templates.push((
                name,
                String::from_utf8(bytes).map_err(|_| wrong(&folder.join(&file), "is not UTF-8"))?,
            ));
        }
    }
    // Template files take precedence over the templates in the configuration.
    if templates.is_empty() {
        templates = configured_templates(&config);
    }
    for name in EXTRA_FILES {
        take(name)?;
    }
    let find = |name: &str| {
        special_tokens
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, t)| t.clone())
    };
    let mut content = blake3::Hasher::new();
    // The hash covers the file that decides the tokens, so another class or flag of the class
    // counts as another tokenizer.
    content.update(pipeline.as_deref().unwrap_or(&bytes));
    Ok(Parts {
        bos_token: find("bos_token"),
        eos_token: find("eos_token"),
        tokenizer,
        special_tokens,
        templates,
        files,
        content,
    })
}

/// Returns `model_type` of config.json, if the folder has one.
fn model_type(folder: &Path) -> Option<String> {
    let bytes = std::fs::read(folder.join(MODEL_CONFIG)).ok()?;
    let config: Value = serde_json::from_slice(&bytes).ok()?;
    config
        .get("model_type")
        .and_then(Value::as_str)
        .map(str::to_owned)
}

/// Returns the tokenizer.json that transformers makes from the file, or `None` if it uses the file
/// as it is.
///
/// transformers' class LlamaTokenizer takes only the vocabulary and the merges from the file of a
/// SentencePiece tokenizer. It makes the rest itself (models/llama/tokenization_llama.py). By
/// default it puts a space before a text that does not begin with one, whereas the normaliser in
/// Llama 2's file always adds a space. Training must see the same tokens as transformers, so the
/// class takes precedence over the file.
fn as_class(tokenizer: &[u8], config: &Value, model_type: Option<&str>) -> Option<Vec<u8>> {
    let class = config.get("tokenizer_class").and_then(Value::as_str)?;
    if class.strip_suffix("Fast").unwrap_or(class) != "LlamaTokenizer"
        || model_type.is_some_and(|m| OTHER_CLASS.contains(&m))
    {
        return None;
    }
    let mut file: Value = serde_json::from_slice(tokenizer).ok()?;
    let is_sentencepiece = file["model"]["type"].as_str().is_none_or(|t| t == "BPE")
        && file["model"]["merges"].is_array();
    if !is_sentencepiece
        || has_byte_level(&file["pre_tokenizer"])
        || has_byte_level(&file["decoder"])
    {
        return None;
    }
    let flag = |name: &str| config.get(name).and_then(Value::as_bool);
    let adds_space = flag("add_prefix_space").unwrap_or(true);
    let prepend_scheme = match (adds_space, flag("legacy").unwrap_or(false)) {
        (true, true) => "always",
        (true, false) => "first",
        (false, _) => "never",
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if adds_space {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let pre_tokenizer = json!({
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": prepend_scheme,
        "split": false,
    });
    let parts = file.as_object_mut()?;
    parts.insert("normalizer".to_owned(), Value::Null);
    parts.insert("pre_tokenizer".to_owned(), pre_tokenizer);
    parts.insert(
        "decoder".to_owned(),
        json!({"type": "Sequence", "decoders": decoders}),
    );
    serde_json::to_vec(&file).ok()
}

/// Returns true if a pre-tokenizer or decoder is ByteLevel, alone or as a part of a sequence.
fn has_byte_level(part: &Value) -> bool {
    let parts = ["pretokenizers", "decoders"]
        .iter()
        .find_map(|key| part[*key].as_array());
    part["type"] == "ByteLevel" || parts.is_some_and(|parts| parts.iter().any(has_byte_level))
}

/// Returns a special token, which is stored as a string or as an AddedToken object.
fn token(config: &Value, name: &str) -> Option<String> {
    let value = config.get(name)?;
    value
        .as_str()
        .or_else(|| value.get("content").and_then(Value::as_str))
        .map(str::to_owned)
}

/// Returns the chat templates of tokenizer_config.json: one template, or a list of named ones.
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

/// Returns the names of the templates in [`EXTRA_TEMPLATES`], in alphabetical order.
fn more_templates(folder: &Path) -> Result<Vec<String>, ModelError> {
    let path = folder.join(EXTRA_TEMPLATES);
    let entries = match std::fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(e)
            if matches!(
                e.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(e) => return Err(ModelError::io(&path)(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let file = entry.map_err(ModelError::io(&path))?.file_name();
        names.extend(
            file.to_str()
                .and_then(|f| f.strip_suffix(".jinja"))
                .map(str::to_owned),
        );
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests;
