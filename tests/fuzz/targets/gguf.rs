//! A GGUF file: header, metadata, tokenizer, and the tensors that it names.
#![no_main]

use std::io::Write;

use bradley::domain::training::Precision;
use bradley::formats::loader::load_model;
use bradley::model::parameters::Parameters;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    file.write_all(data).unwrap();
    if let Ok(model) = load_model(None, file.path().to_str().unwrap(), &Default::default()) {
        let _ = model.tokenizer.encode("Hello, world", true);
        let _ = Parameters::load(&model.config, &model.weights, Precision::F32);
    }
});
