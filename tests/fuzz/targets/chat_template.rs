//! A chat template: parsed, and rendered with its fuel.
#![no_main]

use bradley::domain::dataset::ChatMessage;
use bradley::model::chat::ChatTemplate;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|source: &str| {
    let say = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    let specials = vec![("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())];
    if let Ok(template) = ChatTemplate::new(source, specials) {
        let messages = [say("system", "be brief"), say("user", "Hi"), say("assistant", "Yo")];
        for generation in [true, false] {
            let _ = template.render(&messages, generation);
        }
    }
});
