//! The BPE tokenizers of SentencePiece: `tokenizer.ggml.model` is `llama`.
//!
//! Such a file has the pieces with their scores. The merges follow from the scores as in
//! transformers' SpmConverter (convert_slow_tokenizer.py), and the rest of the pipeline is that of
//! LlamaConverter and GemmaConverter. So the tokenizer equals the tokenizer.json that transformers
//! makes from the same SentencePiece model. Some files also have the merges of that tokenizer.json,
//! which are then used.
//!
//! Two things are in the files of transformers and not in GGUF. The first is the option `legacy` of
//! tokenizer_config.json: here, as in llama.cpp and in Llama 2's tokenizer.json, a space is put
//! before the text and after each special token, unless the file switches that off
//! (`tokenizer.ggml.add_space_prefix`, as in Gemma). The second is the treatment of the text around
//! added tokens: here, as in SentencePiece, an added token is matched exactly, and the spaces
//! around it stay. Only Phi-3's tokens drop the spaces after them, as in its tokenizer.json and in
//! llama.cpp.
//!
//! A vocabulary from which the merges do not follow is refused.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::description::{
    BYTE, CONTROL, NORMAL, Strips, TokenizerDescription, UNKNOWN, UNUSED, USER_DEFINED, added_token,
};
use crate::formats::gguf::reader::Gguf;
use crate::model::error::ModelError;

const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
/// Stands for a space in a piece.
const SPACE: char = '▁';
/// Maximum length of a token. The time to find the merges grows with its square; the longest piece
/// of Gemma 3 has 93 bytes.
const MAX_TOKEN_BYTES: usize = 256;
/// Architecture of Phi-3. Its SentencePiece model is that of Llama 2.
const PHI3: &str = "phi3";
/// Added tokens of Phi-3 after which spaces stay.
const EXACT_IN_PHI3: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// A token of the vocabulary, with its text as in tokenizer.json.
struct SentencePiece {
    id: usize,
    text: String,
    /// Value of `tokenizer.ggml.token_type`.
    kind: i32,
    /// The largest score is merged first. Only pieces of the type `NORMAL` have another than 0.
    score: f32,
}

/// Order of the merges whose results have the same score. It is that of the transformers version
/// with which the published tokenizer.json was made.
#[derive(Clone, Copy, PartialEq)]
enum TieOrder {
    /// The order of ids: Llama 2, Mistral, Phi-3.
    ById,
    /// Longer pieces first: Gemma 2 and 3. It decides how more than 31 spaces are divided.
    LongestFirst,
}

/// Returns the tokenizer that the metadata describes. `unknown` is the token for text that the
/// vocabulary cannot express. Everything that decides how text is split into tokens is added to
/// `content`.
///
/// # Errors
/// Returns an error that names the file and the token or key if the vocabulary does not define the
/// tokenizer, or if a key is missing or malformed.
pub(super) fn describe(
    gguf: &Gguf,
    tokens: &[String],
    unknown: Option<&str>,
    content: &mut blake3::Hasher,
) -> Result<TokenizerDescription, ModelError> {
    let refuse = |reason: String| ModelError::Unsupported {
        what: format!(
            "{}: SentencePiece tokenizer: {reason}; use the safetensors folder",
            gguf.path.display()
        ),
    };
    let architecture = gguf.string("general.architecture")?.unwrap_or_default();
    let ties = match architecture {
        "llama" | PHI3 => TieOrder::ById,
        "gemma" | "gemma2" | "gemma3" => TieOrder::LongestFirst,
        other => {
            return Err(refuse(format!(
                "the rules of architecture '{other}' are not in the file \
                 (supported: llama, phi3, gemma, gemma2, gemma3)"
            )));
        }
    };
    let normalizes = "tokenizer.ggml.precompiled_charsmap";
    if gguf.has(normalizes) {
        return Err(refuse(format!("{normalizes} is set")));
    }
    let removes_spaces = "tokenizer.ggml.remove_extra_whitespaces";
    if gguf.flag(removes_spaces)? == Some(true) {
        return Err(refuse(format!("{removes_spaces} is true")));
    }
    let missing = |key: &str| gguf.invalid(key, "is missing");
    let scores = gguf.floats(SCORES)?.ok_or_else(|| missing(SCORES))?;
    let types = gguf.integers(TYPES)?.ok_or_else(|| missing(TYPES))?;
    for (key, values) in [(SCORES, scores.len()), (TYPES, types.len())] {
        if values != tokens.len() {
            let reason = format!("has {values} values for {} tokens", tokens.len());
            return Err(gguf.invalid(key, reason));
        }
    }
    let adds_space = gguf
        .flag("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);

    let mut pieces = read_pieces(tokens, types, scores).map_err(refuse)?;
    check_bytes(&pieces).map_err(refuse)?;
    if ties == TieOrder::LongestFirst {
        name_the_tab(&mut pieces);
    }
    let ids = ids_by_text(&pieces).map_err(refuse)?;
    let merges = match gguf.strings("tokenizer.ggml.merges")? {
        Some(stored) => stored_merges(stored, &ids).map_err(refuse)?,
        None => derive_merges(&pieces, &ids, ties).map_err(refuse)?,
    };

    for piece in &pieces {
        let (id, length) = (piece.id as u64, piece.text.len() as u64);
        content.update(&id.to_le_bytes());
        content.update(&length.to_le_bytes());
        content.update(piece.text.as_bytes());
        content.update(&piece.kind.to_le_bytes());
        content.update(&piece.score.to_le_bytes());
    }
    for text in merges.iter().flatten() {
        content.update(&(text.len() as u64).to_le_bytes());
        content.update(text.as_bytes());
    }
    content.update(&[u8::from(adds_space)]);
    let is_phi3 = architecture == PHI3;
    if is_phi3 {
        content.update(PHI3.as_bytes());
    }
    let strips = |piece: &SentencePiece| match is_phi3 {
        true if !EXACT_IN_PHI3.contains(&piece.text.as_str()) => Strips::Right,
        _ => Strips::Neither,
    };

    let unknown = unknown.or_else(|| {
        let piece = pieces.iter().find(|piece| piece.kind == UNKNOWN)?;
        Some(piece.text.as_str())
    });
    let added_tokens = pieces
        .iter()
        .filter(|piece| matches!(piece.kind, UNKNOWN | CONTROL | USER_DEFINED))
        .map(|piece| {
            let special = piece.kind != USER_DEFINED;
            added_token(piece.id, &piece.text, special, strips(piece))
        })
        .collect();
    let vocab: serde_json::Map<String, Value> = pieces
        .iter()
        .map(|piece| (piece.text.clone(), json!(piece.id)))
        .collect();
    Ok(TokenizerDescription {
        added_tokens,
        normalizer: normalizer(adds_space),
        pre_tokenizer: Value::Null,
        decoder: decoder(adds_space),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges,
        }),
    })
}

/// Returns the pieces in the order of their ids, without the tokens that only fill the embedding
/// up. The error is the reason for which the vocabulary is refused.
fn read_pieces(
    tokens: &[String],
    types: &[i32],
    scores: &[f32],
) -> Result<Vec<SentencePiece>, String> {
    let mut pieces = Vec::with_capacity(tokens.len());
    for (id, ((token, kind), stored)) in tokens.iter().zip(types).zip(scores).enumerate() {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(format!(
                "token {id} has {} bytes; at most {MAX_TOKEN_BYTES} are possible",
                token.len()
            ));
        }
        let (text, score) = match *kind {
            // The fraction of NaN and of infinity is NaN.
            NORMAL if stored.fract() != 0.0 => {
                return Err(format!(
                    "token {id} ('{token}') has the score {stored}: only the BPE has whole scores, \
                     a unigram model has no merges"
                ));
            }
            // Adding 0 makes -0 the same score as 0.
            NORMAL => (token.clone(), stored + 0.0),
            // llama.cpp gives added tokens the score -1000. In the SentencePiece model it is 0.
            UNKNOWN | CONTROL | BYTE => (token.clone(), 0.0),
            USER_DEFINED => (with_space_marks(id, token)?, 0.0),
            UNUSED if is_padding(token) => continue,
            UNUSED => {
                return Err(format!(
                    "token {id} ('{token}') is unused: transformers would produce it and \
                     SentencePiece would not"
                ));
            }
            other => {
                return Err(format!(
                    "token {id} ('{token}') has the unknown type {other}"
                ));
            }
        };
        pieces.push(SentencePiece {
            id,
            text,
            kind: *kind,
            score,
        });
    }
    Ok(pieces)
}

/// Returns the text of a token that a user added. llama.cpp's converter writes its space marks as
/// spaces.
fn with_space_marks(id: usize, token: &str) -> Result<String, String> {
    if !token.contains(' ') {
        return Ok(token.to_owned());
    }
    if token.chars().all(|c| c == ' ') {
        return Ok(token.replace(' ', &SPACE.to_string()));
    }
    Err(format!(
        "the added token {id} ('{token}') has spaces, which may stand for {SPACE}"
    ))
}

/// Returns true for `[PAD7]`. The converter writes such tokens for rows of the embedding that have
/// no token.
fn is_padding(token: &str) -> bool {
    let number = token
        .strip_prefix("[PAD")
        .and_then(|rest| rest.strip_suffix(']'));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Fails unless there is a piece for each byte. Text without pieces of its own is written in bytes.
fn check_bytes(pieces: &[SentencePiece]) -> Result<(), String> {
    let names: Vec<&str> = pieces
        .iter()
        .filter(|piece| piece.kind == BYTE)
        .map(|piece| piece.text.as_str())
        .collect();
    let absent = (0..=u8::MAX)
        .map(byte_piece)
        .find(|name| !names.contains(&name.as_str()));
    match absent {
        None if names.len() == 256 => Ok(()),
        None => Err(format!("there are {} bytes, not 256", names.len())),
        Some(name) => Err(format!("the byte {name} is missing")),
    }
}

fn byte_piece(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// Replaces the text `<0x09>` of the tab's byte piece by the tab itself, as GemmaConverter does
/// where the tab has no piece (Gemma 1 and 2). Otherwise two tabs could not be merged.
fn name_the_tab(pieces: &mut [SentencePiece]) {
    if pieces.iter().any(|piece| piece.text == "\t") {
        return;
    }
    let byte = byte_piece(b'\t');
    if let Some(piece) = pieces.iter_mut().find(|piece| piece.text == byte) {
        piece.text = "\t".to_owned();
    }
}

/// Returns the ids of the pieces' texts. Fails if two pieces have the same text.
fn ids_by_text(pieces: &[SentencePiece]) -> Result<HashMap<&str, usize>, String> {
    let mut ids = HashMap::with_capacity(pieces.len());
    for piece in pieces {
        if let Some(other) = ids.insert(piece.text.as_str(), piece.id) {
            return Err(format!(
                "tokens {other} and {} have the same text '{}'",
                piece.id, piece.text
            ));
        }
    }
    Ok(ids)
}

/// Returns the merges of the file as pairs. Fails if one is not of two pieces that are a piece
/// together.
fn stored_merges<'a>(
    stored: &'a [String],
    ids: &HashMap<&str, usize>,
) -> Result<Vec<[&'a str; 2]>, String> {
    let mut pairs = Vec::with_capacity(stored.len());
    for merge in stored {
        let known = merge.split_once(' ').filter(|&(left, right)| {
            let whole = format!("{left}{right}");
            let texts = [left, right, whole.as_str()];
            texts.into_iter().all(|text| ids.contains_key(text))
        });
        let (left, right) = known.ok_or_else(|| {
            format!("the merge '{merge}' is not of two pieces that are a piece together")
        })?;
        pairs.push([left, right]);
    }
    Ok(pairs)
}

/// Returns all pairs of pieces that are a piece together, in the order in which they are merged.
/// Fails if the scores do not define this order.
fn derive_merges<'a>(
    pieces: &'a [SentencePiece],
    ids: &HashMap<&str, usize>,
    ties: TieOrder,
) -> Result<Vec<[&'a str; 2]>, String> {
    let mut found: Vec<(f32, [&str; 2])> = Vec::new();
    let mut scored: HashMap<u32, &SentencePiece> = HashMap::new();
    for piece in pieces {
        let mut splits: Vec<(usize, usize, [&str; 2])> = piece
            .text
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = piece.text.split_at(at);
                Some((*ids.get(left)?, *ids.get(right)?, [left, right]))
            })
            .collect();
        // Llama 2's runs of spaces share a score. Each other piece that the BPE learnt has a score
        // of its own. The score 0 is not checked: the first learnt piece has it, and all pieces
        // that were not learnt.
        let is_spaces = piece.text.chars().all(|c| c == SPACE);
        if !splits.is_empty()
            && piece.score < 0.0
            && !is_spaces
            && let Some(other) = scored.insert(piece.score.to_bits(), piece)
        {
            return Err(format!(
                "tokens {} ('{}') and {} ('{}') have the same score {}, so the order of the merges \
                 is not known",
                other.id, other.text, piece.id, piece.text, piece.score
            ));
        }
        splits.sort_unstable_by_key(|(left, right, _)| (*left, *right));
        found.extend(splits.into_iter().map(|(_, _, pair)| (piece.score, pair)));
    }
    // Both sorts are stable.
    match ties {
        TieOrder::ById => found.sort_by(|a, b| b.0.total_cmp(&a.0)),
        TieOrder::LongestFirst => {
            let lengths = |pair: &[&str; 2]| pair.map(|text| text.chars().count());
            found.sort_by(|a, b| {
                let by_score = b.0.total_cmp(&a.0);
                by_score.then_with(|| lengths(&b.1).cmp(&lengths(&a.1)))
            });
        }
    }
    Ok(found.into_iter().map(|(_, pair)| pair).collect())
}

/// Returns the normalizer of Llama 2's tokenizer.json, or Gemma's, which adds no space.
fn normalizer(adds_space: bool) -> Value {
    let marks = json!({
        "type": "Replace",
        "pattern": {"String": " "},
        "content": SPACE.to_string(),
    });
    if !adds_space {
        return marks;
    }
    let prepend = json!({"type": "Prepend", "prepend": SPACE.to_string()});
    json!({"type": "Sequence", "normalizers": [prepend, marks]})
}

fn decoder(adds_space: bool) -> Value {
    let mut decoders = vec![
        json!({
            "type": "Replace",
            "pattern": {"String": SPACE.to_string()},
            "content": " ",
        }),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if adds_space {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": decoders})
}

#[cfg(test)]
mod tests;
