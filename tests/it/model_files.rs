//! Models whose files say more, or less, than they should.

use std::path::Path;

use bradley::model::loader::load_model;
use bradley::model::source::HubOptions;
use candle_core::{DType, Device, Tensor};

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
    load_model(None, folder.to_str().unwrap(), &HubOptions::default()).map(|_| ()).map_err(|e| e.to_string())
}

#[test]
fn tensors_that_the_configuration_does_not_call_for_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    copy_model("llama", dir.path(), &["model.safetensors"]);
    let with = |names: &[&str]| {
        let mut all = tensors("models/llama/model.safetensors");
        all.extend(names.iter().map(|name| (name.to_string(), Tensor::ones(4, DType::F32, &Device::Cpu).unwrap())));
        candle_core::safetensors::save(&all, dir.path().join("model.safetensors")).unwrap();
        load(dir.path())
    };
    with(&[]).unwrap();
    let e = with(&["model.layers.1.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.bias"]).unwrap_err();
    assert!(e.contains("'model.layers.0.self_attn.q_proj.bias' (and 1 others)") && e.contains("attention_bias"), "{e}");
    let e = with(&["model.layers.3.input_layernorm.weight"]).unwrap_err();
    assert!(e.contains("'model.layers.3.input_layernorm.weight'") && e.contains("num_hidden_layers"), "{e}");
    // The copy of the tied head, old buffers, and what is no part of the decoder.
    with(&["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.patch.weight"]).unwrap();
}
