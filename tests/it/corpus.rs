//! Gives each parser the saved corpus of its fuzz target, which includes inputs that fuzzing found.
//! A parser must accept NAME.ok and return an error for NAME.refused, and never panic.

use std::path::{Path, PathBuf};

use bradley::cli::settings::{Settings, Sources};
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

fn corpus() -> PathBuf {
    golden("../fuzz/corpus")
}

/// Checks that `is_accepted` returns true for a target's files NAME.ok, and false for NAME.refused.
#[track_caller]
fn assert_outcomes(target: &str, is_accepted: impl Fn(&Path) -> bool) {
    let mut files = 0;
    for entry in std::fs::read_dir(corpus().join(target)).unwrap() {
        let file = entry.unwrap().path();
        let expected = match file.extension().and_then(|extension| extension.to_str()) {
            Some("ok") => true,
            Some("refused") => false,
            _ => panic!("{}: name it NAME.ok or NAME.refused", file.display()),
        };
        assert_eq!(
            is_accepted(&file),
            expected,
            "{} is not what its name says",
            file.display()
        );
        files += 1;
    }
    assert!(files > 0, "no files of {target}");
}

fn text(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_default()
}

#[test]
fn every_folder_of_the_corpus_is_tested_here() {
    let mut folders: Vec<String> = std::fs::read_dir(corpus())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    folders.sort();
    let tested = [
        "adapter_config",
        "chat_template",
        "gguf",
        "model_config",
        "rows",
        "safetensors",
        "settings",
        "tokenizer",
    ];
    assert_eq!(folders, tested);
}

#[test]
fn rows() {
    // A file is accepted if at least one row can be read.
    assert_outcomes("rows", |file| {
        read_rows(file, DatasetFormat::Jsonl).is_ok_and(|rows| rows.take(1000).any(|r| r.is_ok()))
    });
}

#[test]
fn settings() {
    assert_outcomes("settings", |file| {
        text(file).parse().is_ok_and(|table| {
            let file = Some(("bradley.toml".into(), table));
            Settings::resolve(&Sources {
                file,
                ..Sources::default()
            })
            .is_ok()
        })
    });
}

#[test]
fn gguf_models() {
    let dir = tempfile::tempdir().unwrap();
    assert_outcomes("gguf", |file| {
        let path = dir.path().join("m.gguf");
        std::fs::copy(file, &path).unwrap();
        let model = load_model(None, path.to_str().unwrap(), &Default::default());
        model.is_ok_and(|m| Parameters::load(&m.config, &m.weights, Precision::F32).is_ok())
    });
}

#[test]
fn tokenizers() {
    let dir = tempfile::tempdir().unwrap();
    assert_outcomes("tokenizer", |file| {
        std::fs::copy(file, dir.path().join("tokenizer.json")).unwrap();
        ChatTokenizer::from_folder(dir.path()).is_ok()
    });
}

#[test]
fn model_configurations() {
    assert_outcomes("model_config", |file| {
        ModelConfig::from_hf_json(&text(file), file).is_ok()
    });
}

#[test]
fn chat_templates() {
    assert_outcomes("chat_template", |file| {
        ChatTemplate::new(&text(file), vec![])
            .is_ok_and(|template| template.render(&[], &RenderOptions::new(true)).is_ok())
    });
}

#[test]
fn adapters() {
    let config = golden("models/llama/config.json");
    let config = ModelConfig::from_hf_json(&text(&config), &config).unwrap();
    for (target, fuzzed, intact) in [
        ("safetensors", peft::WEIGHTS_FILE, peft::CONFIG_FILE),
        ("adapter_config", peft::CONFIG_FILE, peft::WEIGHTS_FILE),
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(
            golden("adapters/llama").join(intact),
            dir.path().join(intact),
        )
        .unwrap();
        assert_outcomes(target, |file| {
            std::fs::copy(file, dir.path().join(fuzzed)).unwrap();
            peft::load(dir.path(), &config).is_ok()
        });
    }
}
