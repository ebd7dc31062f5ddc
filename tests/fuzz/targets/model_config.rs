//! A model folder's config.json.
#![no_main]

use bradley::model::config::ModelConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = ModelConfig::from_hf_json(text, std::path::Path::new("config.json")) {
        // The sizes of an accepted configuration must not overflow.
        let _ = config.parameter_count();
    }
});
