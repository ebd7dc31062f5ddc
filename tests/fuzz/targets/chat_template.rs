//! A chat template: parsed, and rendered within its limit of work.
#![no_main]

use bradley::domain::dataset::ChatMessage;
use bradley::formats::chat_template::{ChatTemplate, RenderOptions};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|source: &str| {
    let specials = vec![
        ("bos_token".to_owned(), "<s>".to_owned()),
        ("eos_token".to_owned(), "</s>".to_owned()),
    ];
    if let Ok(template) = ChatTemplate::new(source, specials) {
        let messages = [("system", "be brief"), ("user", "Hi"), ("assistant", "Yo")]
            .map(|(role, text)| ChatMessage::new(role, text));
        for generation in [true, false] {
            let _ = template.render(&messages, &RenderOptions::new(generation));
        }
    }
});
