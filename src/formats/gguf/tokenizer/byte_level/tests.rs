use std::path::Path;

use candle_core::quantized::gguf_file::Value as Stored;
use serde_json::Value;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizerWrapper};

use super::super::description::{CONTROL, NORMAL, UNUSED, USER_DEFINED};
use super::super::tests::{assert_same_tokens, looks_special, read_written, real};
use super::{PRE, PRE_TOKENIZERS, description};
use crate::formats::tokenizer::ChatTokenizer;

/// The metadata of a byte-level tokenizer that a test writes into a GGUF file.
struct ByteVocabulary {
    /// Text and type of each token.
    tokens: Vec<(String, i32)>,
    merges: Vec<String>,
    metadata: Vec<(&'static str, Stored)>,
}

impl ByteVocabulary {
    /// A vocabulary of 0 `a`, 1 `b`, 2 a space, 3 a line break, 4 `ab`, 5 `<s>`, 6 `</s>` and
    /// 7 ` a`. No merges lead to `ab`.
    fn tiny(pre: &str) -> Self {
        let types = [
            ("a", NORMAL),
            ("b", NORMAL),
            ("Ġ", NORMAL),
            ("Ċ", NORMAL),
            ("ab", NORMAL),
            ("<s>", CONTROL),
            ("</s>", CONTROL),
            ("Ġa", NORMAL),
        ];
        let tokens = types.map(|(text, kind)| (text.to_owned(), kind));
        let mut vocabulary = ByteVocabulary {
            tokens: tokens.into(),
            merges: vec!["Ġ a".to_owned()],
            metadata: Vec::new(),
        };
        vocabulary.set("tokenizer.ggml.model", Stored::String("gpt2".into()));
        vocabulary.set(PRE, Stored::String(pre.into()));
        vocabulary.set("tokenizer.ggml.bos_token_id", Stored::U32(5));
        vocabulary.set("tokenizer.ggml.eos_token_id", Stored::U32(6));
        vocabulary
    }

    fn set(&mut self, key: &'static str, value: Stored) {
        self.metadata.push((key, value));
    }

    fn read(&self) -> Result<ChatTokenizer, String> {
        let texts = self.tokens.iter().map(|(t, _)| Stored::String(t.clone()));
        let types = self.tokens.iter().map(|(_, kind)| Stored::I32(*kind));
        let merges = self.merges.iter().map(|m| Stored::String(m.clone()));
        let arrays = [
            ("tokenizer.ggml.tokens", Stored::Array(texts.collect())),
            ("tokenizer.ggml.token_type", Stored::Array(types.collect())),
            ("tokenizer.ggml.merges", Stored::Array(merges.collect())),
        ];
        let metadata: Vec<(&str, &Stored)> = arrays
            .iter()
            .chain(&self.metadata)
            .map(|(key, value)| (*key, value))
            .collect();
        read_written(&metadata)
    }
}

/// Returns the parts into which the pre-tokenizer with this name divides a text.
fn divided<'a>(name: &str, text: &'a str) -> Vec<&'a str> {
    let found = PRE_TOKENIZERS
        .iter()
        .find(|(names, _)| names.contains(&name));
    let (_, rules) = found.unwrap();
    let wrapper: PreTokenizerWrapper = serde_json::from_value(description(rules.division)).unwrap();
    let mut divided = PreTokenizedString::from(text);
    tokenizers::PreTokenizer::pre_tokenize(&wrapper, &mut divided).unwrap();
    let parts = divided.get_splits(OffsetReferential::Original, OffsetType::Byte);
    parts
        .into_iter()
        .map(|(_, (start, end), _)| &text[start..end])
        .collect()
}

/// The parts were made by Python's tokenizers 0.23. The first four cases are of
/// `Split(Regex(pattern), "isolated")`. In their order, the pattern is that of cl100k (Llama 3 and
/// GLM-4 have the same in tokenizer.json), of gpt-oss's tokenizer.json (o200k), of Mistral NeMo's
/// tekken.json, and of Qwen3's tokenizer.json. The last case is of
/// `Sequence([Digits(True), ByteLevel(False)])`, the pre-tokenizer of Granite 3 and SmolLM2.
#[test]
fn texts_are_divided_as_by_the_patterns_of_the_models() {
    let cases: [(&[&str], [&str; 13]); 5] = [
        (
            &["llama-bpe", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"],
            [
                "I¦'VE¦ don¦'T¦ we¦'ll¦ o¦'clock¦ '¦twas",
                "123¦456¦7¦ ¦3¦.¦14¦ ¦½²Ⅷ¦ ¦١٢٣",
                "camelCase¦ HTTPServer¦ iPhone¦15¦Pro¦ XMLParser¦2",
                "世界¦，你好¦。こんにちは¦ 안녕",
                "👩\u{200d}👧¦ \u{1f1e9}\u{1f1ea}👍\u{1f3fd}!",
                "a¦\n\n¦ ¦ b¦\r\n¦\tc¦\n",
                "x¦    ¦ y¦   ",
                "if¦ (¦a¦ !=¦ b¦)¦ {¦ return¦;¦ }¦ //¦ done¦\n",
                "/usr¦/bin¦/¦ path¦/\n¦/next",
                "naïve¦ Größe¦ e¦\u{301}¦ d¦\u{323}\u{307}",
                "ह¦िन¦्द¦ी¦ ภาษา",
                "Ǆ¦ ﬁ¦ ſ¦'s¦ _¦under¦_score",
                "don¦'t¦\u{a0}stop¦\u{3000}now",
            ],
        ),
        (
            &["gpt-4o"],
            [
                "I'VE¦ don'T¦ we'll¦ o¦'clock¦ '¦twas",
                "123¦456¦7¦ ¦3¦.¦14¦ ¦½²Ⅷ¦ ¦١٢٣",
                "camel¦Case¦ HTTPServer¦ i¦Phone¦15¦Pro¦ XMLParser¦2",
                "世界¦，你好¦。こんにちは¦ 안녕",
                "👩\u{200d}👧¦ \u{1f1e9}\u{1f1ea}👍\u{1f3fd}!",
                "a¦\n\n¦ ¦ b¦\r\n¦\tc¦\n",
                "x¦    ¦ y¦   ",
                "if¦ (¦a¦ !=¦ b¦)¦ {¦ return¦;¦ }¦ //¦ done¦\n",
                "/usr¦/bin¦/¦ path¦/\n/¦next",
                "naïve¦ Größe¦ e\u{301}¦ d\u{323}\u{307}",
                "हिन्दी¦ ภาษา",
                "Ǆ¦ ﬁ¦ ſ's¦ _¦under¦_score",
                "don't¦\u{a0}stop¦\u{3000}now",
            ],
        ),
        (
            &["tekken"],
            [
                "I¦'VE¦ don¦'T¦ we¦'ll¦ o¦'clock¦ '¦twas",
                "1¦2¦3¦4¦5¦6¦7¦ ¦3¦.¦1¦4¦ ¦½¦²¦Ⅷ¦ ¦١¦٢¦٣",
                "camel¦Case¦ HTTPServer¦ i¦Phone¦1¦5¦Pro¦ XMLParser¦2",
                "世界¦，你好¦。こんにちは¦ 안녕",
                "👩\u{200d}👧¦ \u{1f1e9}\u{1f1ea}👍\u{1f3fd}!",
                "a¦\n\n¦ ¦ b¦\r\n¦\tc¦\n",
                "x¦    ¦ y¦   ",
                "if¦ (¦a¦ !=¦ b¦)¦ {¦ return¦;¦ }¦ //¦ done¦\n",
                "/usr¦/bin¦/¦ path¦/\n/¦next",
                "naïve¦ Größe¦ e\u{301}¦ d\u{323}\u{307}",
                "हिन्दी¦ ภาษา",
                "Ǆ¦ ﬁ¦ ſ¦'s¦ _¦under¦_score",
                "don¦'t¦\u{a0}stop¦\u{3000}now",
            ],
        ),
        (
            &["qwen2"],
            [
                "I¦'VE¦ don¦'T¦ we¦'ll¦ o¦'clock¦ '¦twas",
                "1¦2¦3¦4¦5¦6¦7¦ ¦3¦.¦1¦4¦ ¦½¦²¦Ⅷ¦ ¦١¦٢¦٣",
                "camelCase¦ HTTPServer¦ iPhone¦1¦5¦Pro¦ XMLParser¦2",
                "世界¦，你好¦。こんにちは¦ 안녕",
                "👩\u{200d}👧¦ \u{1f1e9}\u{1f1ea}👍\u{1f3fd}!",
                "a¦\n\n¦ ¦ b¦\r\n¦\tc¦\n",
                "x¦    ¦ y¦   ",
                "if¦ (¦a¦ !=¦ b¦)¦ {¦ return¦;¦ }¦ //¦ done¦\n",
                "/usr¦/bin¦/¦ path¦/\n¦/next",
                "naïve¦ Größe¦ e¦\u{301}¦ d¦\u{323}\u{307}",
                "ह¦िन¦्द¦ी¦ ภาษา",
                "Ǆ¦ ﬁ¦ ſ¦'s¦ _¦under¦_score",
                "don¦'t¦\u{a0}stop¦\u{3000}now",
            ],
        ),
        (
            &["refact", "smollm"],
            [
                "I¦'¦VE¦ don¦'¦T¦ we¦'ll¦ o¦'¦clock¦ '¦twas",
                "1¦2¦3¦4¦5¦6¦7¦ ¦3¦.¦1¦4¦ ¦½¦²¦Ⅷ¦ ¦١¦٢¦٣",
                "camelCase¦ HTTPServer¦ iPhone¦1¦5¦Pro¦ XMLParser¦2",
                "世界¦，¦你好¦。¦こんにちは¦ 안녕",
                "👩\u{200d}👧¦ \u{1f1e9}\u{1f1ea}👍\u{1f3fd}!",
                "a¦\n\n ¦ b¦\r\n¦\t¦c¦\n",
                "x¦    ¦ y¦   ",
                "if¦ (¦a¦ !=¦ b¦)¦ {¦ return¦;¦ }¦ //¦ done¦\n",
                "/¦usr¦/¦bin¦/¦ path¦/¦\n¦/¦next",
                "naïve¦ Größe¦ e¦\u{301}¦ d¦\u{323}\u{307}",
                "ह¦ि¦न¦्¦द¦ी¦ ภาษา",
                "Ǆ¦ ﬁ¦ ſ¦'s¦ _¦under¦_¦score",
                "don¦'t¦\u{a0}¦stop¦\u{3000}¦now",
            ],
        ),
    ];
    for (names, expected) in cases {
        for name in names {
            for parts in expected {
                let text = parts.replace('¦', "");
                assert_eq!(divided(name, &text).join("¦"), parts, "{name}");
            }
        }
    }
}

#[test]
fn an_unknown_pre_tokenizer_is_refused_with_the_names_of_the_others() {
    let error = ByteVocabulary::tiny("pixtral").read().unwrap_err();
    for part in ["tokenizer.gguf", "'pixtral'", "safetensors folder"] {
        assert!(error.contains(part), "{error} does not say {part}");
    }
    for name in PRE_TOKENIZERS.iter().flat_map(|(names, _)| *names) {
        assert!(error.contains(name), "{error} does not say {name}");
        assert!(ByteVocabulary::tiny(name).read().is_ok(), "{name}");
    }
}

#[test]
fn the_documentation_lists_every_pre_tokenizer() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for page in ["docs/usage.md", "docs/decisions/023-reading-gguf.md"] {
        let text = std::fs::read_to_string(root.join(page)).unwrap();
        for name in PRE_TOKENIZERS.iter().flat_map(|(names, _)| *names) {
            assert!(text.contains(&format!("`{name}`")), "{page}: {name}");
        }
    }
}

#[test]
fn whole_tokens_come_before_merges_where_the_vocabulary_needs_it() {
    let cases: [(&[&str], &[u32]); 2] = [
        (
            &["llama-bpe", "smaug-bpe", "glm4", "chatglm-bpe", "tekken"],
            &[4],
        ),
        (&["default", "qwen2", "refact", "dbrx", "gpt-4o"], &[0, 1]),
    ];
    for (names, ids) in cases {
        for name in names {
            let tokenizer = ByteVocabulary::tiny(name).read().unwrap();
            assert_eq!(tokenizer.encode("ab", false).unwrap(), ids, "{name}");
            assert_eq!(tokenizer.encode(" a", false).unwrap(), [7], "{name}");
        }
    }
}

#[test]
fn the_bos_token_begins_a_text_as_the_file_says_or_as_in_llama_cpp() {
    let begins = |name: &str, flag: Option<bool>| {
        let mut vocabulary = ByteVocabulary::tiny(name);
        if let Some(flag) = flag {
            vocabulary.set("tokenizer.ggml.add_bos_token", Stored::Bool(flag));
        }
        let tokenizer = vocabulary.read().unwrap();
        tokenizer.encode("a", true).unwrap().starts_with(&[5])
    };
    for name in ["llama-bpe", "llama3", "llama-v3", "tekken"] {
        assert!(begins(name, None), "{name}");
    }
    for name in [
        "default",
        "smollm",
        "qwen2",
        "smaug-bpe",
        "dbrx",
        "gpt-4o",
        "glm4",
    ] {
        assert!(!begins(name, None), "{name}");
    }
    for name in ["tekken", "dbrx"] {
        assert!(begins(name, Some(true)), "{name}");
        assert!(!begins(name, Some(false)), "{name}");
    }
}

#[test]
fn special_tokens_of_phi_4_drop_the_spaces_around_them() {
    let mut vocabulary = ByteVocabulary::tiny("dbrx");
    vocabulary.tokens.push(("<|im_sep|>".to_owned(), CONTROL));
    vocabulary.tokens.push(("<think>".to_owned(), USER_DEFINED));
    let text = "a \n<|im_sep|>\n b<think> b";
    let encoded = |vocabulary: &ByteVocabulary| {
        let tokenizer = vocabulary.read().unwrap();
        tokenizer.encode(text, false).unwrap()
    };
    assert_eq!(encoded(&vocabulary), [0, 2, 3, 8, 3, 2, 1, 9, 2, 1]);
    vocabulary.tokens.push(("<|dummy_0|>".to_owned(), CONTROL));
    assert_eq!(encoded(&vocabulary), [0, 8, 1, 9, 2, 1]);
}

/// Returns what convert_hf_to_gguf.py writes for a tokenizer.json.
fn converted(file: &Value, config: &Value, pre: &str) -> ByteVocabulary {
    let pieces = file["model"]["vocab"].as_object().unwrap();
    let pieces = pieces
        .iter()
        .map(|(text, id)| (id.as_u64().unwrap(), text.as_str(), NORMAL));
    let added = file["added_tokens"].as_array().unwrap();
    let added = added.iter().map(|token| {
        let text = token["content"].as_str().unwrap();
        let kind = match looks_special(text) || token["special"] == true {
            true => CONTROL,
            false => USER_DEFINED,
        };
        (token["id"].as_u64().unwrap(), text, kind)
    });
    let all: Vec<(u64, &str, i32)> = pieces.chain(added).collect();
    // Models have more rows than tokens.
    let rows = all.iter().map(|(id, ..)| id + 1).max().unwrap() + 7;
    let mut tokens: Vec<(String, i32)> =
        (0..rows).map(|id| (format!("[PAD{id}]"), UNUSED)).collect();
    for (id, text, kind) in all {
        tokens[id as usize] = (text.to_owned(), kind);
    }
    // Older files have the merges as text.
    let merges = file["model"]["merges"].as_array().unwrap();
    let merges = merges
        .iter()
        .map(|merge| match merge.as_str() {
            Some(text) => text.to_owned(),
            None => format!(
                "{} {}",
                merge[0].as_str().unwrap(),
                merge[1].as_str().unwrap()
            ),
        })
        .collect();
    let mut metadata = vec![
        ("tokenizer.ggml.model", Stored::String("gpt2".into())),
        (PRE, Stored::String(pre.into())),
    ];
    for (key, name) in [
        ("tokenizer.ggml.bos_token_id", "bos_token"),
        ("tokenizer.ggml.eos_token_id", "eos_token"),
    ] {
        let text = config[name].as_str();
        let id = text.and_then(|text| tokens.iter().position(|(token, _)| token == text));
        metadata.extend(id.map(|id| (key, Stored::U32(id as u32))));
    }
    ByteVocabulary {
        tokens,
        merges,
        metadata,
    }
}

fn assert_is_tokenizer_json(name: &str, pre: &str, template: Option<&str>) {
    let (file, config) = real(name);
    let mut vocabulary = converted(&file, &config, pre);
    let template = template.unwrap_or_else(|| config["chat_template"].as_str().unwrap());
    vocabulary.set("tokenizer.chat_template", Stored::String(template.into()));
    assert_same_tokens(name, &vocabulary.read().unwrap(), &file, &[]);
}

#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS)"]
fn a_gguf_file_of_qwen_3_has_the_tokens_of_tokenizer_json() {
    assert_is_tokenizer_json("qwen3", "qwen2", None);
}

/// The converter has not always written that the BOS token is added.
#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS)"]
fn a_gguf_file_of_llama_3_has_the_tokens_of_tokenizer_json() {
    assert_is_tokenizer_json("llama3_1", "llama-bpe", None);
}

/// SmolLM3 has this vocabulary, and no BOS token either.
#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS)"]
fn a_gguf_file_of_llama_3_without_bos_has_the_tokens_of_tokenizer_json() {
    assert_is_tokenizer_json("llama3", "smaug-bpe", None);
}

/// Phi-4-mini has the vocabulary of gpt-oss with other special tokens.
#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS)"]
fn a_gguf_file_with_the_vocabulary_o200k_has_the_tokens_of_tokenizer_json() {
    let template = "{% for message in messages %}<|start|>{{ message['role'] }}<|message|>\
                    {{ message['content'] }}<|end|>{% endfor %}<|start|>assistant";
    assert_is_tokenizer_json("gptoss", "gpt-4o", Some(template));
}
