//! The parts of a tokenizer.json, and the values in GGUF metadata that describe a token.

use serde_json::{Value, json};

/// Values of `tokenizer.ggml.token_type`. They are those of SentencePiece's model files.
pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;
pub(super) const BYTE: i32 = 6;

/// A tokenizer in the terms of tokenizer.json, without its post-processor.
pub(super) struct TokenizerDescription {
    /// Tokens that are found in the text before anything else happens to it.
    pub added_tokens: Vec<Value>,
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub decoder: Value,
    pub model: Value,
}

impl TokenizerDescription {
    /// Returns the tokenizer.json. `starts` and `ends` are special tokens, with their ids, that are
    /// put before and after a text.
    pub(super) fn into_json(self, starts: &[(String, u64)], ends: &[(String, u64)]) -> Value {
        // Not `json!`, which would copy the vocabulary and the merges.
        let parts = [
            ("version", json!("1.0")),
            ("truncation", Value::Null),
            ("padding", Value::Null),
            ("added_tokens", Value::Array(self.added_tokens)),
            ("normalizer", self.normalizer),
            ("pre_tokenizer", self.pre_tokenizer),
            ("post_processor", post_processor(starts, ends)),
            ("decoder", self.decoder),
            ("model", self.model),
        ];
        parts.into_iter().collect()
    }
}

/// Sides of an added token on which spaces and line breaks are dropped.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Strips {
    Neither,
    Right,
    Both,
}

/// Returns an entry of `added_tokens`.
pub(super) fn added_token(id: usize, content: &str, special: bool, strips: Strips) -> Value {
    json!({
        "id": id,
        "content": content,
        "single_word": false,
        "lstrip": strips == Strips::Both,
        "rstrip": strips != Strips::Neither,
        "normalized": false,
        "special": special,
    })
}

fn post_processor(starts: &[(String, u64)], ends: &[(String, u64)]) -> Value {
    if starts.is_empty() && ends.is_empty() {
        return Value::Null;
    }
    let around = |sequence: &str, type_id: u8| -> Vec<Value> {
        let special =
            |(token, _): &(String, u64)| json!({"SpecialToken": {"id": token, "type_id": type_id}});
        let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
        let before = starts.iter().map(&special);
        let after = ends.iter().map(&special);
        before.chain([text]).chain(after).collect()
    };
    let special_tokens: serde_json::Map<String, Value> = starts
        .iter()
        .chain(ends)
        .map(|(token, id)| {
            let entry = json!({"id": token, "ids": [id], "tokens": [token]});
            (token.clone(), entry)
        })
        .collect();
    let pair: Vec<Value> = [around("A", 0), around("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": special_tokens,
    })
}
