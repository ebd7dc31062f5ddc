//! Byte-level BPE tokenizers: `tokenizer.ggml.model` is `gpt2`.

use serde_json::{Value, json};

use super::description::{CONTROL, TokenizerDescription, USER_DEFINED, added_token};
use crate::formats::gguf::reader::Gguf;
use crate::model::error::ModelError;

/// Regular expressions of the pre-tokenizers of Llama 3 and Qwen 2.
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Returns the tokenizer that the metadata describes. Everything that decides how text is split
/// into tokens is added to `content`; `add_bos` is part of it.
///
/// # Errors
/// Returns an error that names the file and the key if the pre-tokenizer is unknown, or if a key is
/// missing or malformed.
pub(super) fn describe(
    gguf: &Gguf,
    tokens: &[String],
    add_bos: bool,
    content: &mut blake3::Hasher,
) -> Result<TokenizerDescription, ModelError> {
    let merges = gguf
        .strings("tokenizer.ggml.merges")?
        .ok_or_else(|| gguf.invalid("tokenizer.ggml.merges", "is missing"))?;
    let types = gguf
        .integers("tokenizer.ggml.token_type")?
        .unwrap_or_default();
    let pre = gguf.string("tokenizer.ggml.pre")?.unwrap_or("default");
    let pipeline = pipeline(pre).ok_or_else(|| ModelError::Unsupported {
        what: format!(
            "{}: pre-tokenizer '{pre}' (supported: default, gpt-2, smollm, starcoder, codeshell, \
             refact, qwen2, deepseek-r1-qwen, llama-bpe, llama3, llama-v3)",
            gguf.path.display()
        ),
    })?;
    for text in tokens.iter().chain(merges) {
        content.update(&(text.len() as u64).to_le_bytes());
        content.update(text.as_bytes());
    }
    content.update(format!("{types:?} {pre} {add_bos}").as_bytes());

    let added_tokens = tokens
        .iter()
        .zip(types)
        .enumerate()
        .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, (token, kind))| added_token(id, token, *kind == CONTROL))
        .collect();
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, t)| (t.clone(), json!(id)))
        .collect();
    Ok(TokenizerDescription {
        added_tokens,
        normalizer: pipeline.normalizer,
        pre_tokenizer: pipeline.pre_tokenizer,
        decoder: json!({
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": true,
            "use_regex": true,
        }),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pipeline.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        }),
    })
}

struct Pipeline {
    normalizer: Value,
    pre_tokenizer: Value,
    ignore_merges: bool,
}

/// Returns the normalizer and pre-tokenizer for llama.cpp's name of a pre-tokenizer, as in the
/// tokenizer.json files of the models it was named for.
fn pipeline(pre: &str) -> Option<Pipeline> {
    let byte_level = |regex: bool| {
        json!({
            "type": "ByteLevel",
            "add_prefix_space": false,
            "trim_offsets": true,
            "use_regex": regex,
        })
    };
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": false,
            },
            byte_level(false),
        ]})
    };
    let plain = |pre_tokenizer: Value| Pipeline {
        normalizer: Value::Null,
        pre_tokenizer,
        ignore_merges: false,
    };
    Some(match pre {
        "default" | "gpt-2" => plain(byte_level(true)),
        "smollm" | "starcoder" | "codeshell" | "refact" => {
            plain(json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                byte_level(true),
            ]}))
        }
        "qwen2" | "deepseek-r1-qwen" => Pipeline {
            normalizer: json!({"type": "NFC"}),
            ..plain(split(QWEN2))
        },
        "llama-bpe" | "llama3" | "llama-v3" => Pipeline {
            ignore_merges: true,
            ..plain(split(LLAMA3))
        },
        _ => return None,
    })
}
