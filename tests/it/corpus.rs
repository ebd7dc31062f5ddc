//! The fuzzers' saved corpus, what they found included, through the parsers that it is for: an
//! answer, never a panic.

use std::path::PathBuf;

use bradley::domain::dataset::DatasetFormat;
use bradley::domain::training::Precision;
use bradley::formats::chat_template::{ChatTemplate, RenderOptions};
use bradley::formats::loader::load_model;
use bradley::formats::peft;
use bradley::formats::tokenizer::ChatTokenizer;
use bradley::model::config::ModelConfig;
use bradley::model::parameters::Parameters;
use bradley::train::rows::read_rows;

use crate::support::golden;

/// The files of a target.
fn files(target: &str) -> Vec<PathBuf> {
    let folder = golden("../fuzz/corpus").join(target);
    let files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(!files.is_empty());
    files
}

/// How many files of `target` the parser takes.
fn taken(target: &str, parse: impl Fn(&PathBuf) -> bool) -> usize {
    files(target).iter().filter(|f| parse(f)).count()
}

#[test]
fn rows_are_read_or_found_wanting() {
    let good = |file: &PathBuf| {
        read_rows(file, DatasetFormat::Jsonl).is_ok_and(|rows| rows.take(1000).any(|r| r.is_ok()))
    };
    assert_eq!(taken("rows", good), 7);
}

#[test]
fn model_files_load_or_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let copy = |file: &PathBuf, name: &str| {
        let to = dir.path().join(name);
        std::fs::copy(file, &to).unwrap();
        to
    };
    let gguf = |file: &PathBuf| {
        let path = copy(file, "m.gguf");
        let model = load_model(None, path.to_str().unwrap(), &Default::default());
        model.is_ok_and(|m| Parameters::load(&m.config, &m.weights, Precision::F32).is_ok())
    };
    assert!(taken("gguf", gguf) >= 1);
    let tokenizer = |file: &PathBuf| {
        copy(file, "tokenizer.json");
        ChatTokenizer::from_folder(dir.path()).is_ok()
    };
    assert_eq!(taken("tokenizer", tokenizer), 3);
    let text = |file: &PathBuf| std::fs::read_to_string(file).unwrap_or_default();
    assert!(taken("model_config", |f| ModelConfig::from_hf_json(&text(f), f).is_ok()) >= 4);
    assert!(
        taken("chat_template", |f| ChatTemplate::new(&text(f), vec![])
            .is_ok_and(|t| t.render(&[], &RenderOptions::new(true)).is_ok()))
            >= 4
    );

    let llama = golden("models/llama/config.json");
    let config = ModelConfig::from_hf_json(&text(&llama), &llama).unwrap();
    copy(&golden("adapters/llama/adapter_config.json"), peft::CONFIG_FILE);
    let weights = |file: &PathBuf| {
        copy(file, peft::WEIGHTS_FILE);
        peft::load(dir.path(), &config).is_ok()
    };
    assert_eq!(taken("safetensors", weights), 1);
    copy(&golden("adapters/llama/adapter_model.safetensors"), peft::WEIGHTS_FILE);
    let adapter = |file: &PathBuf| {
        copy(file, peft::CONFIG_FILE);
        peft::load(dir.path(), &config).is_ok()
    };
    assert!(taken("adapter_config", adapter) >= 1);
}
