//! Tokenizers from GGUF metadata. They are rebuilt as the tokenizer.json from which llama.cpp
//! converted them, or that transformers makes from the same SentencePiece model.

mod byte_level;
mod description;
mod sentencepiece;
#[cfg(test)]
mod tests;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::reader::Gguf;
use crate::formats::tokenizer::parts::{DEFAULT, Parts, TOOL_USE, wrong};
use crate::model::error::ModelError;

const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
/// Read only in files of SentencePiece tokenizers.
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";

/// Reads the tokenizer and chat templates from the metadata.
///
/// # Errors
/// Returns an error that names the file and the key if the tokenizer is of another kind, or if a
/// key is missing or malformed.
pub(in crate::formats) fn read(gguf: &Gguf) -> Result<Parts, ModelError> {
    let model = gguf.string("tokenizer.ggml.model")?.unwrap_or("none");
    if !["gpt2", "llama"].contains(&model) {
        let what = format!(
            "{}: tokenizer '{model}' in GGUF (supported: gpt2, the byte-level BPE, and llama, \
             the BPE of SentencePiece; for others use the safetensors folder)",
            gguf.path.display()
        );
        return Err(ModelError::Unsupported { what });
    }
    let tokens = gguf
        .strings("tokenizer.ggml.tokens")?
        .ok_or_else(|| gguf.invalid("tokenizer.ggml.tokens", "is missing"))?;
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
    let (bos, eos) = (token(BOS)?, token(EOS)?);
    let (unk, pad) = (
        token("tokenizer.ggml.unknown_token_id")?,
        token("tokenizer.ggml.padding_token_id")?,
    );
    let mut content = blake3::Hasher::new();
    let is_sentencepiece = model == "llama";
    // llama.cpp's defaults: SentencePiece models begin each text with the BOS token.
    let adds_bos = is_sentencepiece || byte_level::adds_bos(gguf)?;
    let starts = surrounding(gguf, (ADD_BOS, adds_bos), BOS, bos.as_ref())?;
    let description = if is_sentencepiece {
        if bos.is_none() && gguf.flag(ADD_BOS)?.unwrap_or(true) {
            return Err(gguf.invalid(BOS, "is missing, but the tokenizer adds this token"));
        }
        let ends = surrounding(gguf, (ADD_EOS, false), EOS, eos.as_ref())?;
        content.update(format!("{starts:?} {ends:?}").as_bytes());
        sentencepiece::describe(gguf, tokens, unk.as_deref(), &mut content)?
            .into_json(&starts, &ends)
    } else {
        let add_bos = gguf.flag(ADD_BOS)?.unwrap_or(adds_bos);
        byte_level::describe(gguf, tokens, add_bos, &mut content)?.into_json(&starts, &[])
    };
    let file = serde_json::to_vec(&description).map_err(|e| wrong(&gguf.path, e.to_string()))?;
    drop(description);
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

/// Returns the token with the key `id`, if the tokenizer puts it before or after each text. `adds`
/// is the flag that says so, with its default. A token that no key names is not added.
fn surrounding(
    gguf: &Gguf,
    adds: (&str, bool),
    id: &str,
    token: Option<&String>,
) -> Result<Vec<(String, u64)>, ModelError> {
    let (flag, default) = adds;
    if !gguf.flag(flag)?.unwrap_or(default) {
        return Ok(Vec::new());
    }
    let id = gguf.integer(id)?;
    Ok(token.cloned().zip(id).into_iter().collect())
}
