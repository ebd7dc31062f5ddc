//! A PEFT adapter's configuration, beside weights that are whole.
#![no_main]

use bradley::formats::peft;
use bradley::model::config::ModelConfig;
use libfuzzer_sys::fuzz_target;

const MODEL: &str = include_str!("../../goldens/models/llama/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../goldens/adapters/llama/adapter_model.safetensors");

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig::from_hf_json(MODEL, std::path::Path::new("config.json")).unwrap();
    std::fs::write(dir.path().join(peft::CONFIG_FILE), data).unwrap();
    std::fs::write(dir.path().join(peft::WEIGHTS_FILE), WEIGHTS).unwrap();
    let _ = peft::load(dir.path(), &config);
});
