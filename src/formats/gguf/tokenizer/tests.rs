//! Helpers of the tests of both kinds of tokenizers.

use std::io::BufWriter;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value as Stored};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::formats::chat_template::{ChatMessage, RenderOptions};
use crate::formats::gguf::reader::Gguf;
use crate::formats::tokenizer::ChatTokenizer;

/// Writes a GGUF file with the metadata and reads its tokenizer. The error is the message.
pub(super) fn read_written(metadata: &[(&str, &Stored)]) -> Result<ChatTokenizer, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.gguf");
    let mut file = BufWriter::new(std::fs::File::create(&path).unwrap());
    gguf_file::write(&mut file, metadata, &[]).unwrap();
    drop(file);
    let gguf = Gguf::open(&path).unwrap();
    ChatTokenizer::from_gguf(&gguf).map_err(|e| e.to_string())
}

/// Returns true for the added tokens that llama.cpp's converter takes for control tokens even if
/// tokenizer.json does not call them special.
pub(super) fn looks_special(text: &str) -> bool {
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
        || text.starts_with("<|") && text.ends_with("|>")
        || text.starts_with("<unused") && text.ends_with('>')
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Returns tokenizer.json and tokenizer_config.json of a real model.
pub(super) fn real(name: &str) -> (Value, Value) {
    let tokenizers = std::env::var("BRADLEY_TEST_TOKENIZERS").expect(
        "this test needs the environment variable BRADLEY_TEST_TOKENIZERS: `.ci/run setup` \
         fetches the tokenizers and prints it",
    );
    let folder = PathBuf::from(tokenizers).join(name);
    let [file, config] =
        ["tokenizer.json", "tokenizer_config.json"].map(|file| json(&folder.join(file)));
    (file, config)
}

/// Compares a tokenizer with a tokenizer.json, token for token, on the texts and dialogues of
/// tests/goldens/dialogues.json and on further texts.
pub(super) fn assert_same_tokens(
    name: &str,
    tokenizer: &ChatTokenizer,
    file: &Value,
    further: &[String],
) {
    let expected = Tokenizer::from_bytes(serde_json::to_vec(file).unwrap()).unwrap();
    let corpus = json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/dialogues.json"));
    let mut texts: Vec<String> = corpus["texts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap().to_owned())
        .collect();
    texts.extend_from_slice(further);
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
