//! A model folder's tokenizer.json.
#![no_main]

use bradley::formats::tokenizer::ChatTokenizer;
use libfuzzer_sys::fuzz_target;

// The library's panics are caught and made errors; one that is not caught still ends the process.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |data: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), data).unwrap();
    if let Ok(tokenizer) = ChatTokenizer::from_folder(dir.path()) {
        let _ = tokenizer.encode("Hello, world", true);
    }
});
