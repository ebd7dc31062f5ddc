use std::collections::HashSet;
use std::path::Path;

use candle_core::quantized::gguf_file::Value as Stored;
use serde_json::{Value, json};

use super::super::description::{BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};
use super::super::tests::{assert_same_tokens, looks_special, read_written, real};
use super::byte_piece;
use crate::formats::tokenizer::ChatTokenizer;

/// The metadata of a tokenizer that a test writes into a GGUF file.
#[derive(Clone)]
struct GgufVocabulary {
    /// Text, score and type of each token.
    tokens: Vec<(String, f32, i32)>,
    metadata: Vec<(&'static str, Stored)>,
}

impl GgufVocabulary {
    /// A vocabulary with the pieces of Llama 2 that are not learnt, and five that are:
    /// 259 `ab`, 260 `▁ab`, 261 `▁`, 262 `a` and 263 `b`.
    fn tiny(architecture: &str) -> Self {
        let mut tokens = vec![
            ("<unk>".to_owned(), 0.0, UNKNOWN),
            ("<s>".to_owned(), 0.0, CONTROL),
            ("</s>".to_owned(), 0.0, CONTROL),
        ];
        tokens.extend((0..=u8::MAX).map(|byte| (byte_piece(byte), 0.0, BYTE)));
        let learnt = ["ab", "▁ab", "▁", "a", "b"];
        tokens.extend((0_u8..).zip(learnt).map(|(rank, text)| {
            let score = -f32::from(rank);
            (text.to_owned(), score, NORMAL)
        }));
        let mut vocabulary = GgufVocabulary {
            tokens,
            metadata: Vec::new(),
        };
        vocabulary.set("general.architecture", Stored::String(architecture.into()));
        vocabulary.set("tokenizer.ggml.model", Stored::String("llama".into()));
        vocabulary.set("tokenizer.ggml.pre", Stored::String("default".into()));
        vocabulary.set("tokenizer.ggml.bos_token_id", Stored::U32(1));
        vocabulary.set("tokenizer.ggml.eos_token_id", Stored::U32(2));
        vocabulary
    }

    fn set(&mut self, key: &'static str, value: Stored) {
        self.metadata.retain(|(other, _)| *other != key);
        self.metadata.push((key, value));
    }

    fn add(&mut self, text: &str, score: f32, kind: i32) {
        self.tokens.push((text.to_owned(), score, kind));
    }

    /// Writes a GGUF file and reads its tokenizer. The error is the message.
    fn read(&self) -> Result<ChatTokenizer, String> {
        let texts = self.tokens.iter().map(|(t, ..)| Stored::String(t.clone()));
        let scores = self.tokens.iter().map(|(_, score, _)| Stored::F32(*score));
        let types = self.tokens.iter().map(|(.., kind)| Stored::I32(*kind));
        let arrays = [
            ("tokenizer.ggml.tokens", Stored::Array(texts.collect())),
            ("tokenizer.ggml.scores", Stored::Array(scores.collect())),
            ("tokenizer.ggml.token_type", Stored::Array(types.collect())),
        ];
        let metadata: Vec<(&str, &Stored)> = arrays
            .iter()
            .chain(&self.metadata)
            .map(|(key, value)| (*key, value))
            .collect();
        read_written(&metadata)
    }
}

fn ids(tokenizer: &ChatTokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, true).unwrap()
}

#[test]
fn a_space_is_put_before_the_text_and_after_special_tokens() {
    let tokenizer = GgufVocabulary::tiny("llama").read().unwrap();
    assert_eq!(ids(&tokenizer, "ab ab"), [1, 260, 260]);
    assert_eq!(ids(&tokenizer, "ab</s>ab"), [1, 260, 2, 260]);
    assert_eq!(ids(&tokenizer, " ab"), [1, 261, 260]);
    assert_eq!(ids(&tokenizer, ""), [1]);
    assert_eq!(tokenizer.encode("ab", false).unwrap(), [260]);
    assert_eq!(tokenizer.decode(&[260, 259, 260]).unwrap(), "abab ab");
    assert_eq!(tokenizer.bos_id(), Some(1));
    assert_eq!(tokenizer.eos_id(), Some(2));
}

#[test]
fn text_without_pieces_is_written_in_bytes() {
    let tokenizer = GgufVocabulary::tiny("llama").read().unwrap();
    assert_eq!(ids(&tokenizer, "é"), [1, 261, 3 + 0xc3, 3 + 0xa9]);
    let decoded = tokenizer.decode(&[261, 3 + 0xc3, 3 + 0xa9]).unwrap();
    assert_eq!(decoded, "é");
}

#[test]
fn flags_turn_the_space_and_the_special_tokens_on_and_off() {
    let mut vocabulary = GgufVocabulary::tiny("llama");
    vocabulary.set("tokenizer.ggml.add_space_prefix", Stored::Bool(false));
    vocabulary.set("tokenizer.ggml.add_eos_token", Stored::Bool(true));
    let tokenizer = vocabulary.read().unwrap();
    assert_eq!(ids(&tokenizer, "ab ab"), [1, 259, 260, 2]);
    assert_eq!(tokenizer.decode(&[260]).unwrap(), " ab");
    let with_eos = tokenizer.content_hash().to_owned();
    vocabulary.set("tokenizer.ggml.add_eos_token", Stored::Bool(false));
    vocabulary.set("tokenizer.ggml.add_bos_token", Stored::Bool(false));
    let tokenizer = vocabulary.read().unwrap();
    assert_eq!(ids(&tokenizer, "ab ab"), [259, 260]);
    assert_ne!(tokenizer.content_hash(), with_eos);
}

#[test]
fn rows_of_the_embedding_without_a_token_are_not_in_the_vocabulary() {
    let mut vocabulary = GgufVocabulary::tiny("llama");
    let rows = vocabulary.tokens.len();
    vocabulary.add("[PAD264]", -10000.0, UNUSED);
    let tokenizer = vocabulary.read().unwrap();
    assert_eq!(tokenizer.vocabulary_rows(), rows);
}

/// The order of the scores decides, not that of the ids.
#[test]
fn the_piece_with_the_largest_score_is_merged_first() {
    let mut vocabulary = GgufVocabulary::tiny("llama");
    vocabulary.add("ba", 0.0, NORMAL);
    vocabulary.set("tokenizer.ggml.add_space_prefix", Stored::Bool(false));
    vocabulary.tokens[259].1 = -9.0;
    assert_eq!(ids(&vocabulary.read().unwrap(), "aba"), [1, 262, 264]);
    vocabulary.tokens[264].1 = -10.0;
    assert_eq!(ids(&vocabulary.read().unwrap(), "aba"), [1, 259, 262]);
}

/// A file that was made from tokenizer.json has the same score for all pieces.
#[test]
fn merges_in_the_file_are_used_instead_of_scores() {
    let mut vocabulary = GgufVocabulary::tiny("llama");
    vocabulary.add("ba", 0.0, NORMAL);
    for token in &mut vocabulary.tokens[259..] {
        token.1 = -1000.0;
    }
    vocabulary.set("tokenizer.ggml.add_space_prefix", Stored::Bool(false));
    assert!(
        vocabulary.read().is_err(),
        "a file whose scores do not define the merges is accepted"
    );
    for (merges, ids_of_aba) in [
        (["b a", "a b", "▁ ab"], [1, 262, 264]),
        (["a b", "b a", "▁ ab"], [1, 259, 262]),
    ] {
        let merges = merges.map(|merge| Stored::String(merge.into()));
        vocabulary.set("tokenizer.ggml.merges", Stored::Array(merges.into()));
        assert_eq!(ids(&vocabulary.read().unwrap(), "aba"), ids_of_aba);
    }
}

/// llama.cpp writes Gemma's runs of spaces as spaces. Gemma 1 and 2 have no piece for one tab.
#[test]
fn runs_of_spaces_and_tabs_are_gemmas() {
    let mut vocabulary = GgufVocabulary::tiny("gemma2");
    vocabulary.set("tokenizer.ggml.add_space_prefix", Stored::Bool(false));
    for spaces in 2..=3 {
        vocabulary.add(&" ".repeat(spaces), -1000.0, USER_DEFINED);
    }
    vocabulary.add("\t\t", 0.0, NORMAL);
    let tokenizer = vocabulary.read().unwrap();
    assert_eq!(ids(&tokenizer, "a  b"), [1, 262, 264, 263]);
    // With Gemma's order of merges, a run that is too long is divided from the left.
    assert_eq!(ids(&tokenizer, "a    b"), [1, 262, 265, 261, 263]);
    assert_eq!(ids(&tokenizer, "a\t\tb"), [1, 262, 266, 263]);
    assert_eq!(ids(&tokenizer, "\t"), [1, 3 + 9]);
    assert_eq!(tokenizer.decode(&[3 + 9]).unwrap(), "\t");
}

/// Phi-3's `<|endoftext|>` and the tokens of other families are matched exactly.
#[test]
fn added_tokens_of_phi_3_drop_the_spaces_behind_them() {
    let mut vocabulary = GgufVocabulary::tiny("phi3");
    for text in ["<|user|>", "<|endoftext|>"] {
        vocabulary.add(text, -1000.0, CONTROL);
    }
    let phi3 = vocabulary.read().unwrap();
    vocabulary.set("general.architecture", Stored::String("llama".into()));
    let llama = vocabulary.read().unwrap();
    let (space, newline) = (261, 3 + 10);
    assert_eq!(ids(&phi3, "ab<|user|>  \n ab"), [1, 260, 264, 260]);
    assert_eq!(
        ids(&llama, "ab<|user|>\nab"),
        [1, 260, 264, space, newline, 259]
    );
    for tokenizer in [&phi3, &llama] {
        assert_eq!(
            ids(tokenizer, "ab<|endoftext|>\nab"),
            [1, 260, 265, space, newline, 259]
        );
    }
    assert_ne!(phi3.content_hash(), llama.content_hash());
}

#[test]
fn a_vocabulary_that_does_not_define_the_tokenizer_is_refused_by_name() {
    let tiny = || GgufVocabulary::tiny("llama");
    let with = |text: &str, score: f32, kind: i32| {
        let mut vocabulary = tiny();
        vocabulary.add(text, score, kind);
        vocabulary
    };
    let keyed = |key: &'static str, value: Stored| {
        let mut vocabulary = tiny();
        vocabulary.set(key, value);
        vocabulary
    };
    let mut missing_byte = tiny();
    missing_byte.tokens[3 + 0x41] = ("x".to_owned(), -20.0, NORMAL);
    let mut no_bos = tiny();
    no_bos
        .metadata
        .retain(|(key, _)| *key != "tokenizer.ggml.bos_token_id");
    let merges = Stored::Array(vec![Stored::String("b b".into())]);
    let cases = [
        (
            with("ba", -3.5, NORMAL),
            "token 264 ('ba') has the score -3.5",
        ),
        (
            with("ba", f32::NAN, NORMAL),
            "token 264 ('ba') has the score NaN",
        ),
        (
            with("b▁", -1.0, NORMAL),
            "tokens 260 ('▁ab') and 264 ('b▁') have the same score -1",
        ),
        (
            with("ab", -9.0, NORMAL),
            "tokens 259 and 264 have the same text 'ab'",
        ),
        (
            with("x y", -1000.0, USER_DEFINED),
            "the added token 264 ('x y') has spaces",
        ),
        (with("ba", -9.0, UNUSED), "token 264 ('ba') is unused"),
        (
            with("ba", -9.0, 7),
            "token 264 ('ba') has the unknown type 7",
        ),
        (with("<0x100>", 0.0, BYTE), "there are 257 bytes"),
        (
            with(&"a".repeat(257), -9.0, NORMAL),
            "token 264 has 257 bytes",
        ),
        (missing_byte, "the byte <0x41> is missing"),
        (no_bos, "'tokenizer.ggml.bos_token_id': is missing"),
        (GgufVocabulary::tiny("plamo"), "architecture 'plamo'"),
        (
            keyed("tokenizer.ggml.merges", merges),
            "the merge 'b b' is not of two pieces",
        ),
        (
            keyed(
                "tokenizer.ggml.remove_extra_whitespaces",
                Stored::Bool(true),
            ),
            "tokenizer.ggml.remove_extra_whitespaces is true",
        ),
        (
            keyed("tokenizer.ggml.model", Stored::String("t5".into())),
            "tokenizer 't5' in GGUF",
        ),
    ];
    for (vocabulary, reason) in cases {
        let error = vocabulary.read().unwrap_err();
        assert!(error.contains(reason), "{error} does not say {reason}");
        assert!(error.contains("tokenizer.gguf"), "{error}");
    }
}

/// Returns what convert_hf_to_gguf.py writes for the SentencePiece model from which transformers
/// made a tokenizer.json.
///
/// `runs_are_last`: Llama 2's and Mistral's model files give runs of spaces the score -1e9. The
/// other learnt pieces have the scores 0, -1, -2 … in the order of their ids.
fn converted(file: &Value, config: &Value, runs_are_last: bool) -> GgufVocabulary {
    let mut pieces: Vec<(usize, &str)> = file["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(text, id)| (id.as_u64().unwrap() as usize, text.as_str()))
        .collect();
    pieces.sort_unstable();
    let added = file["added_tokens"].as_array().unwrap();
    let added_texts: HashSet<&str> = added
        .iter()
        .map(|token| token["content"].as_str().unwrap())
        .collect();
    let last = added
        .iter()
        .map(|token| token["id"].as_u64().unwrap() as usize);
    // Models have more rows than tokens.
    let rows = last.max().unwrap().max(pieces.len()) + 7;
    let mut tokens: Vec<(String, f32, i32)> = (0..rows)
        .map(|id| (format!("[PAD{id}]"), -10000.0, UNUSED))
        .collect();
    let bytes: HashSet<String> = (0..=u8::MAX).map(byte_piece).collect();
    let mut learnt: u16 = 0;
    let mut base = 0.0;
    for (id, text) in pieces {
        let is_byte = bytes.contains(text);
        let is_run = text.chars().all(|c| c == '▁');
        let is_learnt = !is_byte && !added_texts.contains(text);
        let score = match is_learnt {
            true if runs_are_last && is_run => -1e9,
            true => -(base + f32::from(learnt)),
            false => 0.0,
        };
        if is_learnt {
            learnt += 1;
            if learnt == 1 << 15 {
                (learnt, base) = (0, base + 32768.0);
            }
        }
        tokens[id] = (text.to_owned(), score, if is_byte { BYTE } else { NORMAL });
    }
    for token in added {
        let (id, text) = (
            token["id"].as_u64().unwrap(),
            token["content"].as_str().unwrap(),
        );
        tokens[id as usize] = if looks_special(text) || token["special"] == true {
            (text.to_owned(), -1000.0, CONTROL)
        } else {
            (text.replace('▁', " "), -1000.0, USER_DEFINED)
        };
    }
    let mut vocabulary = GgufVocabulary {
        tokens,
        metadata: Vec::new(),
    };
    vocabulary.set("tokenizer.ggml.model", Stored::String("llama".into()));
    vocabulary.set("tokenizer.ggml.pre", Stored::String("default".into()));
    vocabulary.set("tokenizer.ggml.add_bos_token", Stored::Bool(true));
    for (key, name) in [
        ("tokenizer.ggml.bos_token_id", "bos_token"),
        ("tokenizer.ggml.eos_token_id", "eos_token"),
        ("tokenizer.ggml.unknown_token_id", "unk_token"),
    ] {
        let token = added.iter().find(|token| token["content"] == config[name]);
        let id = token.unwrap()["id"].as_u64().unwrap() as u32;
        vocabulary.set(key, Stored::U32(id));
    }
    vocabulary
}

/// Returns the model of a tokenizer.json with its merges as pairs. Older files have them as text.
fn model_with_pairs(file: &Value) -> Value {
    let mut model = file["model"].clone();
    for merge in model["merges"].as_array_mut().unwrap() {
        let pair = merge.as_str().and_then(|text| text.split_once(' '));
        if let Some((left, right)) = pair {
            *merge = serde_json::json!([left, right]);
        }
    }
    model
}

/// Compares the tokenizer of a GGUF file with the tokenizer.json of the same model: merge for
/// merge, and token for token on the texts and dialogues of tests/goldens/dialogues.json.
fn assert_is_tokenizer_json(architecture: &str, file: &Value, config: &Value, template: &str) {
    let is_llama = ["llama", "phi3"].contains(&architecture);
    let mut vocabulary = converted(file, config, is_llama);
    vocabulary.set("general.architecture", Stored::String(architecture.into()));
    if !is_llama {
        vocabulary.set("tokenizer.ggml.add_space_prefix", Stored::Bool(false));
    }
    vocabulary.set("tokenizer.chat_template", Stored::String(template.into()));
    let tokenizer = vocabulary.read().unwrap();

    let (_, rebuilt) = &tokenizer.files()[0];
    let rebuilt: Value = serde_json::from_slice(rebuilt).unwrap();
    for part in ["normalizer", "decoder", "post_processor"] {
        assert_eq!(rebuilt[part], file[part], "{architecture}: {part}");
    }
    let (ours, theirs) = (model_with_pairs(&rebuilt), model_with_pairs(file));
    let merges = |model: &Value| model["merges"].as_array().unwrap().clone();
    let (our_merges, their_merges) = (merges(&ours), merges(&theirs));
    assert_eq!(our_merges.len(), their_merges.len(), "{architecture}");
    let other = our_merges
        .iter()
        .zip(&their_merges)
        .position(|(a, b)| a != b);
    assert_eq!(other, None, "{architecture}: the first merge that differs");
    let vocab = theirs["vocab"].as_object().unwrap();
    for (text, id) in vocab {
        assert_eq!(ours["vocab"][text], *id, "{architecture}: {text:?}");
    }

    let lengths = [15, 31, 40, 70, 129];
    let runs: Vec<String> = lengths
        .into_iter()
        .flat_map(|length| {
            let (tabs, lines) = ("\t".repeat(length), "-".repeat(length));
            [
                format!("a{}b", " ".repeat(length)),
                format!("{tabs}\n\n\n{lines}"),
            ]
        })
        .collect();
    assert_same_tokens(architecture, &tokenizer, file, &runs);
}

fn llama2_template() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/llama2.jinja");
    std::fs::read_to_string(path).unwrap()
}

#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS)"]
fn a_gguf_file_of_llama_2_has_the_tokens_of_tokenizer_json() {
    let (file, config) = real("llama2");
    assert_is_tokenizer_json("llama", &file, &config, &llama2_template());
}

#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS)"]
fn a_gguf_file_of_gemma_3_has_the_tokens_of_tokenizer_json() {
    let (file, config) = real("gemma3");
    let template = config["chat_template"].as_str().unwrap();
    assert_is_tokenizer_json("gemma3", &file, &config, template);
}

/// The tokenizer.json of Phi-3-mini is that of Llama 2 with these added tokens.
#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS)"]
fn a_gguf_file_of_phi_3_has_the_tokens_of_tokenizer_json() {
    let (mut file, config) = real("llama2");
    let added = [
        (0, "<unk>", false, true),
        (1, "<s>", false, true),
        (2, "</s>", true, false),
        (32000, "<|endoftext|>", false, true),
        (32001, "<|assistant|>", true, true),
        (32002, "<|placeholder1|>", true, true),
        (32003, "<|placeholder2|>", true, true),
        (32004, "<|placeholder3|>", true, true),
        (32005, "<|placeholder4|>", true, true),
        (32006, "<|system|>", true, true),
        (32007, "<|end|>", true, true),
        (32008, "<|placeholder5|>", true, true),
        (32009, "<|placeholder6|>", true, true),
        (32010, "<|user|>", true, true),
    ];
    file["added_tokens"] = added
        .into_iter()
        .map(|(id, content, rstrip, special)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": rstrip, "normalized": false, "special": special,
            })
        })
        .collect();
    let template = "{{ bos_token }}{% for message in messages %}\
                    {{ '<|' + message['role'] + '|>\\n' }}{{ message['content'] }}\
                    {{ '<|end|>\\n' }}{% endfor %}{{ '<|assistant|>\\n' }}";
    assert_is_tokenizer_json("phi3", &file, &config, template);
}
