//! Model files with missing or additional parts.

use std::path::Path;

use bradley::formats::loader::load_model;
use bradley::formats::source::HubOptions;
use bradley::rpc::pb;
use candle_core::{DType, Device, Tensor};

use crate::server::Server;
use crate::support::{golden, tensors};

/// Copies a golden model's files, except those that `leave_out` names.
fn copy_model(name: &str, to: &Path, leave_out: &[&str]) {
    for entry in std::fs::read_dir(golden(&format!("models/{name}"))).unwrap() {
        let entry = entry.unwrap();
        if !leave_out.iter().any(|file| entry.file_name() == *file) {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

fn load(folder: &Path) -> Result<(), String> {
    load_model(None, folder.to_str().unwrap(), &HubOptions::default())
        .map(|_| ())
        .map_err(|e| e.to_string())
}

#[test]
fn tensors_that_the_configuration_does_not_call_for_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    copy_model("llama", dir.path(), &["model.safetensors"]);
    let load_with = |names: &[&str]| {
        let mut all = tensors("models/llama/model.safetensors");
        let embedding = all["model.embed_tokens.weight"].clone();
        all.extend(names.iter().map(|name| {
            let tensor = match *name {
                "lm_head.weight" => embedding.clone(),
                _ => Tensor::ones(4, DType::F32, &Device::Cpu).unwrap(),
            };
            (name.to_string(), tensor)
        }));
        candle_core::safetensors::save(&all, dir.path().join("model.safetensors")).unwrap();
        load(dir.path())
    };
    load_with(&[]).unwrap();
    let e = load_with(&[
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.bias",
    ])
    .unwrap_err();
    assert!(
        e.contains("'model.layers.0.self_attn.q_proj.bias' (and 1 others)")
            && e.contains("attention_bias"),
        "{e}"
    );
    let e = load_with(&["model.layers.3.input_layernorm.weight"]).unwrap_err();
    assert!(
        e.contains("'model.layers.3.input_layernorm.weight'") && e.contains("num_hidden_layers"),
        "{e}"
    );
    // The copy of the tied head, old buffers, and tensors outside of the decoder.
    load_with(&[
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.patch.weight",
    ])
    .unwrap();
}

#[test]
fn a_head_that_differs_from_the_embedding_of_a_tied_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    copy_model("llama", dir.path(), &["model.safetensors"]);
    let mut all = tensors("models/llama/model.safetensors");
    let trained = (&all["model.embed_tokens.weight"] + 0.25).unwrap();
    all.insert("lm_head.weight".to_owned(), trained);
    candle_core::safetensors::save(&all, dir.path().join("model.safetensors")).unwrap();
    let e = load(dir.path()).unwrap_err();
    assert!(
        e.contains("lm_head.weight") && e.contains("tie_word_embeddings"),
        "{e}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tokenizer_without_an_end_of_sequence_causes_warnings() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("no-eos");
    std::fs::create_dir(&folder).unwrap();
    copy_model("llama", &folder, &["tokenizer_config.json"]);
    let settings = std::fs::read(golden("models/llama/tokenizer_config.json")).unwrap();
    let mut settings: serde_json::Value = serde_json::from_slice(&settings).unwrap();
    // A token that is not in the vocabulary.
    settings["eos_token"] = "<|nowhere|>".into();
    std::fs::write(folder.join("tokenizer_config.json"), settings.to_string()).unwrap();

    let models = format!(
        "with-eos={},without-eos={}",
        golden("models/llama").display(),
        folder.display()
    );
    let server = Server::start_with(dir.path(), &models, &[]);
    assert!(server.has_logged("no end-of-sequence token"));
    let client = server.client().await;
    let findings = async |file: &str, model: &str| {
        let metadata = pb::UploadMetadata {
            model: model.into(),
            ..Default::default()
        };
        let dataset = client
            .upload_dataset(&golden(file), metadata, |_| {})
            .await
            .unwrap();
        let report = dataset.report.unwrap();
        assert_eq!(report.valid_rows, report.rows);
        report
            .issues
            .into_iter()
            .filter(|i| i.reason == "no_eos")
            .map(|i| (i.row, i.field, i.severity))
            .collect::<Vec<_>>()
    };
    let warning = (
        1,
        "chosen".to_owned(),
        i32::from(pb::IssueSeverity::Warning),
    );
    assert_eq!(
        findings("plain.jsonl", "models/without-eos").await,
        [warning],
        "the warning is not reported once for the file"
    );
    assert!(findings("plain.jsonl", "models/with-eos").await.is_empty());
    assert!(
        findings("pairs.jsonl", "models/without-eos")
            .await
            .is_empty(),
        "a warning although the chat template ends the answers"
    );
}
