//! A model folder's tokenizer.json.
#![no_main]

use bradley::formats::tokenizer::ChatTokenizer;
use libfuzzer_sys::fuzz_target;

// `ChatTokenizer` turns panics of the tokenizers library into errors. The hook hides their messages
// and, unlike libFuzzer's own hook, does not abort. A panic that nobody catches still ends the
// process.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |data: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), data).unwrap();
    if let Ok(tokenizer) = ChatTokenizer::from_folder(dir.path()) {
        let _ = tokenizer.encode("Hello, world", true);
    }
});
