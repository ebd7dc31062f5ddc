//! A safetensors file, as the weights of a PEFT adapter and of a model folder.
#![no_main]

use bradley::domain::training::Precision;
use bradley::formats::peft;
use bradley::formats::weights::Weights;
use bradley::model::config::ModelConfig;
use bradley::model::params::params;
use libfuzzer_sys::fuzz_target;

const MODEL: &str = include_str!("../../goldens/models/llama/config.json");
const ADAPTER: &str = include_str!("../../goldens/adapters/llama/adapter_config.json");

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig::from_hf_json(MODEL, std::path::Path::new("config.json")).unwrap();
    std::fs::write(dir.path().join(peft::CONFIG_FILE), ADAPTER).unwrap();
    std::fs::write(dir.path().join(peft::WEIGHTS_FILE), data).unwrap();
    let _ = peft::load(dir.path(), &config);
    if let Ok(weights) = Weights::open_safetensors(&dir.path().join(peft::WEIGHTS_FILE)) {
        for param in params(&config.spec) {
            let _ = weights.load(&param, Precision::Bf16);
        }
        let _ = weights.fingerprint();
    }
});
