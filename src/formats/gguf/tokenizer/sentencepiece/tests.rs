use std::collections::HashSet;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value as Stored};
use serde_json::Value;
use tokenizers::Tokenizer;

use super::super::description::{BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};
use super::byte_piece;
use crate::formats::chat_template::{ChatMessage, RenderOptions};
use crate::formats::gguf::reader::Gguf;
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
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.gguf");
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
        let mut file = BufWriter::new(std::fs::File::create(&path).unwrap());
        gguf_file::write(&mut file, &metadata, &[]).unwrap();
        drop(file);
        let gguf = Gguf::open(&path).unwrap();
        ChatTokenizer::from_gguf(&gguf).map_err(|e| e.to_string())
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
        "the scores do not define the merges"
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
        (GgufVocabulary::tiny("phi3"), "architecture 'phi3'"),
        (
            keyed("tokenizer.ggml.merges", merges),
            "the merge 'b b' is not of two pieces",
        ),
        (
            keyed(
                "tokenizer.ggml.remove_extra_whitespaces",
                Stored::Bool(true),
            ),
            "tokenizer.ggml.remove_extra_whitespaces is not supported",
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
        let looks_special = ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
            || text.starts_with("<|") && text.ends_with("|>")
            || text.starts_with("<unused") && text.ends_with('>');
        tokens[id as usize] = if looks_special || token["special"] == true {
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

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
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
fn assert_is_tokenizer_json(name: &str, architecture: &str, template: Option<&Path>) {
    let tokenizers = std::env::var("BRADLEY_TEST_TOKENIZERS")
        .expect("BRADLEY_TEST_TOKENIZERS: `.ci/run setup` prints it");
    let folder = PathBuf::from(tokenizers).join(name);
    let file = json(&folder.join("tokenizer.json"));
    let config = json(&folder.join("tokenizer_config.json"));
    let is_llama = architecture == "llama";
    let mut vocabulary = converted(&file, &config, is_llama);
    vocabulary.set("general.architecture", Stored::String(architecture.into()));
    if !is_llama {
        vocabulary.set("tokenizer.ggml.add_space_prefix", Stored::Bool(false));
    }
    let template = template.map_or_else(
        || config["chat_template"].as_str().unwrap().to_owned(),
        |path| std::fs::read_to_string(path).unwrap(),
    );
    vocabulary.set("tokenizer.chat_template", Stored::String(template));
    let tokenizer = vocabulary.read().unwrap();

    let (_, rebuilt) = &tokenizer.files()[0];
    let rebuilt: Value = serde_json::from_slice(rebuilt).unwrap();
    for part in ["normalizer", "decoder", "post_processor"] {
        assert_eq!(rebuilt[part], file[part], "{name}: {part}");
    }
    let (ours, theirs) = (model_with_pairs(&rebuilt), model_with_pairs(&file));
    let merges = |model: &Value| model["merges"].as_array().unwrap().clone();
    let (our_merges, their_merges) = (merges(&ours), merges(&theirs));
    assert_eq!(our_merges.len(), their_merges.len(), "{name}");
    let other = our_merges
        .iter()
        .zip(&their_merges)
        .position(|(a, b)| a != b);
    assert_eq!(other, None, "{name}: the first merge that differs");
    let vocab = theirs["vocab"].as_object().unwrap();
    for (text, id) in vocab {
        assert_eq!(ours["vocab"][text], *id, "{name}: {text:?}");
    }

    let expected = Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let corpus = json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/dialogues.json"));
    let mut texts: Vec<String> = corpus["texts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap().to_owned())
        .collect();
    for length in [15, 31, 40, 70, 129] {
        texts.push(format!("a{}b", " ".repeat(length)));
        texts.push(format!(
            "{}\n\n\n{}",
            "\t".repeat(length),
            "-".repeat(length)
        ));
    }
    let plain = texts.len();
    for dialogue in corpus["dialogues"].as_array().unwrap() {
        let messages: Result<Vec<ChatMessage>, _> = dialogue["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| ChatMessage::from_json(message.clone()))
            .collect();
        let options = RenderOptions::new(true);
        texts.extend(tokenizer.apply_chat_template(&messages.unwrap(), &options));
    }
    assert!(texts.len() >= plain + 40, "{name}: {} texts", texts.len());
    for text in &texts {
        for special in [true, false] {
            let wanted = expected.encode(text.as_str(), special).unwrap();
            let got = tokenizer.encode(text, special).unwrap();
            assert_eq!(got, wanted.get_ids(), "{name}: {text:?}");
            let decoded = expected.decode(wanted.get_ids(), false).unwrap();
            assert_eq!(tokenizer.decode(&got).unwrap(), decoded, "{name}: {text:?}");
        }
    }
}

#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS)"]
fn a_gguf_file_of_llama_2_has_the_tokens_of_tokenizer_json() {
    let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/llama2.jinja");
    assert_is_tokenizer_json("llama2", "llama", Some(&template));
}

#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS)"]
fn a_gguf_file_of_gemma_3_has_the_tokens_of_tokenizer_json() {
    assert_is_tokenizer_json("gemma3", "gemma3", None);
}
