//! Byte-level BPE tokenizers: `tokenizer.ggml.model` is `gpt2`.

use serde_json::{Value, json};

use super::description::{CONTROL, Strips, TokenizerDescription, USER_DEFINED, added_token};
use crate::formats::gguf::reader::Gguf;
use crate::model::error::ModelError;

/// Regular expression of tiktoken's cl100k, which Llama 3 and GLM-4 took over.
const CL100K: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// The same with a token for each digit.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Regular expression of tiktoken's o200k. It also divides words before capitals.
const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Regular expression of Mistral's tekken.json. The tokenizer.json of some models has cl100k's
/// instead, which transformers repairs with the option `fix_mistral_regex`.
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Key of the pre-tokenizer's name.
const PRE: &str = "tokenizer.ggml.pre";
/// Name that stands for a file without one.
const DEFAULT_PRE: &str = "default";
/// A token that only the vocabulary of Phi-4 has.
const ONLY_IN_PHI4: &str = "<|dummy_0|>";

/// Division of a text before the merges.
#[derive(Clone, Copy)]
enum Division {
    /// By the regular expression of GPT-2.
    Gpt2,
    /// The same, after each digit is divided off.
    Gpt2Digits,
    /// By this regular expression.
    Regex(&'static str),
}

/// Rules of a pre-tokenizer's name, as in the tokenizer.json files of the models that have it.
#[derive(Clone, Copy)]
struct PreTokenizer {
    division: Division,
    /// The text is brought into the form NFC first.
    composes: bool,
    /// A part that is a token is not merged from its bytes. Llama 3 has tokens to which no merges
    /// lead. In the vocabularies without this rule, merges lead to every token.
    ignores_merges: bool,
    /// The BOS token begins a text if the file does not say whether it does.
    adds_bos: bool,
}

impl PreTokenizer {
    const fn of(division: Division) -> Self {
        PreTokenizer {
            division,
            composes: false,
            ignores_merges: false,
            adds_bos: false,
        }
    }

    const fn composing(self) -> Self {
        PreTokenizer {
            composes: true,
            ..self
        }
    }

    const fn ignoring_merges(self) -> Self {
        PreTokenizer {
            ignores_merges: true,
            ..self
        }
    }

    const fn adding_bos(self) -> Self {
        PreTokenizer {
            adds_bos: true,
            ..self
        }
    }
}

/// llama.cpp's names of pre-tokenizers, with their rules.
///
/// Its converter takes the name from the tokens of a test text, so models of several families share
/// one:
///
/// - `refact`: Granite.
/// - `smaug-bpe`: SmolLM3, and Llama 3 without the BOS token.
/// - `dbrx`: Phi-4, OLMo 2 and 3, Granite 4.
/// - `gpt-4o`: Phi-4-mini.
/// - `tekken`: Mistral since NeMo, Ministral.
/// - `chatglm-bpe` or `glm4`: GLM-4. Of these two names, llama.cpp ignores the merges only for
///   `glm4`, but tiktoken's tokenizer, which both stand for, always does.
const PRE_TOKENIZERS: [(&[&str], PreTokenizer); 8] = [
    (&[DEFAULT_PRE, "gpt-2"], PreTokenizer::of(Division::Gpt2)),
    (
        &["smollm", "starcoder", "codeshell", "refact"],
        PreTokenizer::of(Division::Gpt2Digits),
    ),
    (
        &["qwen2", "deepseek-r1-qwen"],
        PreTokenizer::of(Division::Regex(QWEN2)).composing(),
    ),
    (
        &["llama-bpe", "llama3", "llama-v3"],
        PreTokenizer::of(Division::Regex(CL100K))
            .ignoring_merges()
            .adding_bos(),
    ),
    (
        &["smaug-bpe", "glm4", "chatglm-bpe"],
        PreTokenizer::of(Division::Regex(CL100K)).ignoring_merges(),
    ),
    (&["dbrx"], PreTokenizer::of(Division::Regex(CL100K))),
    (&["gpt-4o"], PreTokenizer::of(Division::Regex(O200K))),
    (
        &["tekken"],
        PreTokenizer::of(Division::Regex(TEKKEN))
            .ignoring_merges()
            .adding_bos(),
    ),
];

/// Returns true if the BOS token begins a text of a file that does not say whether it does. This is
/// llama.cpp's default.
///
/// # Errors
/// Returns an error that names the file if the pre-tokenizer is unknown or malformed.
pub(super) fn adds_bos(gguf: &Gguf) -> Result<bool, ModelError> {
    Ok(pre_tokenizer(gguf)?.1.adds_bos)
}

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
    let (pre, rules) = pre_tokenizer(gguf)?;
    for text in tokens.iter().chain(merges) {
        content.update(&(text.len() as u64).to_le_bytes());
        content.update(text.as_bytes());
    }
    content.update(format!("{types:?} {pre} {add_bos}").as_bytes());

    // GGUF does not say which spaces around its added tokens a tokenizer drops.
    let strips = match tokens.iter().any(|token| token == ONLY_IN_PHI4) {
        true => Strips::Both,
        false => Strips::Neither,
    };
    let added_tokens = tokens
        .iter()
        .zip(types)
        .enumerate()
        .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, (token, kind))| {
            let special = *kind == CONTROL;
            let strips = match special {
                true => strips,
                false => Strips::Neither,
            };
            added_token(id, token, special, strips)
        })
        .collect();
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, t)| (t.clone(), json!(id)))
        .collect();
    Ok(TokenizerDescription {
        added_tokens,
        normalizer: match rules.composes {
            true => json!({"type": "NFC"}),
            false => Value::Null,
        },
        pre_tokenizer: description(rules.division),
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
            "ignore_merges": rules.ignores_merges,
            "vocab": vocab,
            "merges": merges,
        }),
    })
}

/// Returns the name of the file's pre-tokenizer and its rules.
fn pre_tokenizer(gguf: &Gguf) -> Result<(&str, PreTokenizer), ModelError> {
    let name = gguf.string(PRE)?.unwrap_or(DEFAULT_PRE);
    let found = PRE_TOKENIZERS
        .iter()
        .find(|(names, _)| names.contains(&name));
    let (_, rules) = found.ok_or_else(|| {
        let known: Vec<&str> = PRE_TOKENIZERS
            .iter()
            .flat_map(|(names, _)| names.iter().copied())
            .collect();
        ModelError::Unsupported {
            what: format!(
                "{}: pre-tokenizer '{name}' in GGUF (supported: {}; for others use the safetensors \
                 folder)",
                gguf.path.display(),
                known.join(", ")
            ),
        }
    })?;
    Ok((name, *rules))
}

/// Returns the pre-tokenizer of tokenizer.json.
fn description(division: Division) -> Value {
    let byte_level = |regex: bool| {
        json!({
            "type": "ByteLevel",
            "add_prefix_space": false,
            "trim_offsets": true,
            "use_regex": regex,
        })
    };
    let parts = match division {
        Division::Gpt2 => return byte_level(true),
        Division::Gpt2Digits => [
            json!({"type": "Digits", "individual_digits": true}),
            byte_level(true),
        ],
        Division::Regex(pattern) => [
            json!({
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": false,
            }),
            byte_level(false),
        ],
    };
    json!({"type": "Sequence", "pretokenizers": parts})
}

#[cfg(test)]
mod tests;
