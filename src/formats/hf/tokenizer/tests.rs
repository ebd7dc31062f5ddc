use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::as_class;

/// Returns a tokenizer.json with Llama 2's pipeline and a tiny vocabulary.
fn sentencepiece() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 2, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        }],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        ]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "▁": 4, "▁a": 5},
            "merges": [["▁", "a"]]
        }
    })
}

/// Returns the ids of `text` with the class's tokenizer, or `None` if the file is used as it is.
fn ids(file: &Value, config: &Value, model_type: Option<&str>, text: &str) -> Option<Vec<u32>> {
    let changed = as_class(file.to_string().as_bytes(), config, model_type)?;
    Some(
        Tokenizer::from_bytes(changed)
            .unwrap()
            .encode(text, false)
            .unwrap()
            .get_ids()
            .to_vec(),
    )
}

/// The expected ids are those of transformers 5.23's LlamaTokenizer with the same vocabulary and
/// merges.
#[test]
fn the_class_llama_tokenizer_replaces_the_pipeline_of_the_file() {
    let file = sentencepiece();
    let legacy = json!({"tokenizer_class": "LlamaTokenizerFast", "legacy": true});
    assert_eq!(ids(&file, &legacy, None, "a"), Some(vec![5]));
    assert_eq!(ids(&file, &legacy, Some("llama"), " a"), Some(vec![5]));
    assert_eq!(ids(&file, &legacy, None, "  a"), Some(vec![4, 5]));
    assert_eq!(ids(&file, &legacy, None, "a</s>a"), Some(vec![5, 2, 5]));
    let current = json!({"tokenizer_class": "LlamaTokenizer"});
    assert_eq!(ids(&file, &current, None, "a</s>a"), Some(vec![5, 2, 3]));
    let no_space = json!({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": false});
    assert_eq!(ids(&file, &no_space, None, "a a"), Some(vec![3, 5]));
}

#[test]
fn other_classes_use_the_file_as_it_is() {
    let file = sentencepiece();
    let llama = json!({"tokenizer_class": "LlamaTokenizer"});
    for model in ["glm4", "granite", "mistral", "mistral3", "olmo3", "phi3"] {
        assert_eq!(ids(&file, &llama, Some(model), "a"), None, "{model}");
    }
    for model in ["gemma2", "qwen3", "smollm3"] {
        assert!(ids(&file, &llama, Some(model), "a").is_some(), "{model}");
    }
    assert_eq!(
        ids(
            &file,
            &json!({"tokenizer_class": "PreTrainedTokenizerFast"}),
            None,
            "a"
        ),
        None
    );
    assert_eq!(ids(&file, &json!({}), None, "a"), None);
    let mut byte_level = sentencepiece();
    byte_level["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
    ]});
    assert_eq!(ids(&byte_level, &llama, None, "a"), None);
}
