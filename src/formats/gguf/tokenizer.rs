//! Byte-level BPE tokenizers from GGUF metadata. They are rebuilt as the tokenizer.json from which
//! llama.cpp converted them.

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::reader::Gguf;
use crate::formats::tokenizer::parts::{DEFAULT, Parts, TOOL_USE, wrong};
use crate::model::error::ModelError;

/// Values of `tokenizer.ggml.token_type` for special tokens and for tokens that a user added.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// Regular expressions of the pre-tokenizers of Llama 3 and Qwen 2.
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Reads the tokenizer and chat templates from the metadata.
///
/// # Errors
/// Returns an error that names the file and the key if the tokenizer is of another kind, or if a
/// key is missing or malformed.
pub(in crate::formats) fn read(gguf: &Gguf) -> Result<Parts, ModelError> {
    let model = gguf.string("tokenizer.ggml.model")?.unwrap_or("none");
    if model != "gpt2" {
        let what = format!(
            "{}: tokenizer '{model}' in GGUF (supported: gpt2, the byte-level BPE; \
             for SentencePiece models use the safetensors folder)",
            gguf.path.display()
        );
        return Err(ModelError::Unsupported { what });
    }
    let missing = |key: &str| gguf.invalid(key, "is missing");
    let tokens = gguf
        .strings("tokenizer.ggml.tokens")?
        .ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
    let merges = gguf
        .strings("tokenizer.ggml.merges")?
        .ok_or_else(|| missing("tokenizer.ggml.merges"))?;
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
    let token = |key: &str| -> Result<Option<String>, ModelError> {
        let Some(id) = gguf.integer(key)? else {
            return Ok(None);
        };
        let found = usize::try_from(id).ok().and_then(|i| tokens.get(i));
        found.cloned().map(Some).ok_or_else(|| {
            gguf.invalid(
                key,
                format!("is {id}, the vocabulary has {} tokens", tokens.len()),
            )
        })
    };
    let mut content = blake3::Hasher::new();
    for text in tokens.iter().chain(merges) {
        content.update(&(text.len() as u64).to_le_bytes());
        content.update(text.as_bytes());
    }
    let (bos, eos) = (
        token("tokenizer.ggml.bos_token_id")?,
        token("tokenizer.ggml.eos_token_id")?,
    );
    let (unk, pad) = (
        token("tokenizer.ggml.unknown_token_id")?,
        token("tokenizer.ggml.padding_token_id")?,
    );
    let add_bos = gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(false);
    content.update(format!("{types:?} {pre} {add_bos}").as_bytes());

    let added: Vec<Value> = tokens
        .iter()
        .zip(types)
        .enumerate()
        .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, (content, kind))| {
            json!({
                "id": id,
                "content": content,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind == CONTROL,
            })
        })
        .collect();
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, t)| (t.clone(), json!(id)))
        .collect();
    let post_processor = match (&bos, add_bos) {
        (Some(bos), true) => bos_processor(
            bos,
            gguf.integer("tokenizer.ggml.bos_token_id")?
                .unwrap_or_default(),
        ),
        _ => Value::Null,
    };
    let description = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": pipeline.normalizer,
        "pre_tokenizer": pipeline.pre_tokenizer,
        "post_processor": post_processor,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": true,
            "use_regex": true,
        },
        "model": {
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
        },
    });
    let file = serde_json::to_vec(&description).map_err(|e| wrong(&gguf.path, e.to_string()))?;
    let tokenizer = Tokenizer::from_bytes(&file).map_err(|e| wrong(&gguf.path, e.to_string()))?;

    let template = gguf.string("tokenizer.chat_template")?.map(str::to_owned);
    let tool_use = gguf
        .string("tokenizer.chat_template.tool_use")?
        .map(str::to_owned);
    let named = [
        ("bos_token", bos.clone()),
        ("eos_token", eos.clone()),
        ("unk_token", unk),
        ("pad_token", pad),
    ];
    let special_tokens: Vec<(String, String)> = named
        .into_iter()
        .filter_map(|(n, t)| Some((n.to_owned(), t?)))
        .collect();
    let mut config: serde_json::Map<String, Value> = special_tokens
        .iter()
        .map(|(n, t)| (n.clone(), json!(t)))
        .collect();
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    let templates: Vec<(String, String)> = [(DEFAULT, template.clone()), (TOOL_USE, tool_use)]
        .into_iter()
        .filter_map(|(name, t)| Some((name.to_owned(), t?)))
        .collect();
    let named = |(name, template): &(String, String)| json!({"name": name, "template": template});
    let stored = if templates.len() > 1 {
        templates.iter().map(named).collect()
    } else {
        json!(template)
    };
    config.insert("chat_template".into(), stored);
    let config =
        serde_json::to_vec_pretty(&config).map_err(|e| wrong(&gguf.path, e.to_string()))?;
    let files = vec![
        ("tokenizer.json".to_owned(), file),
        ("tokenizer_config.json".to_owned(), config),
    ];
    Ok(Parts {
        tokenizer,
        bos_token: bos,
        eos_token: eos,
        special_tokens,
        templates,
        files,
        content,
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

fn bos_processor(bos: &str, id: u64) -> Value {
    let special = |type_id: u8| json!({"SpecialToken": {"id": bos, "type_id": type_id}});
    let sequence = |id: &str, type_id: u8| json!({"Sequence": {"id": id, "type_id": type_id}});
    json!({"type": "TemplateProcessing", "single": [special(0), sequence("A", 0)],
           "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
           "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}}})
}
