//! Tests of answers that are encoded together, and of the errors about them.

use std::path::Path;

use super::*;
use crate::formats::loader::load_model;
use crate::formats::source::HubOptions;

fn tokenizer() -> ChatTokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models/llama");
    load_model(
        Some("tiny"),
        folder.to_str().unwrap(),
        &HubOptions::default(),
    )
    .unwrap()
    .tokenizer
}

fn plain(text: &str) -> Text {
    Text::Plain(text.into())
}

#[test]
fn answers_beside_others_are_encoded_as_if_they_were_alone() {
    let tokenizer = tokenizer();
    let encoder = PairEncoder::new(&tokenizer, 256, Truncation::KeepStart);
    let prompt = plain("The capital of France is");
    let answers = [
        plain(" Paris."),
        Text::Chat(vec![ChatMessage::new("assistant", "Paris.")]),
        plain("is it?"),
    ];
    let together = encoder.encode_completions(&prompt, &answers);
    assert_eq!(together.len(), answers.len());
    for (answer, encoded) in answers.iter().zip(&together) {
        let alone = encoder
            .encode_completions(&prompt, std::slice::from_ref(answer))
            .pop()
            .unwrap();
        match (encoded, alone) {
            (Ok(encoded), Ok(alone)) => {
                assert_eq!(*encoded, alone);
                // With a single answer both functions find the same common prefix.
                assert_eq!(
                    encoder
                        .encode_together(&prompt, std::slice::from_ref(answer))
                        .unwrap(),
                    [alone]
                );
            }
            (Err(encoded), Err(alone)) => assert_eq!(encoded.problem(), alone.problem()),
            (encoded, alone) => panic!("{encoded:?}, but alone {alone:?}"),
        }
    }
    let failed: Vec<bool> = together.iter().map(Result::is_err).collect();
    assert_eq!(failed, [false, true, false], "only the one of another form");
}

#[test]
fn an_error_names_its_part() {
    let tokenizer = tokenizer();
    let encoder = PairEncoder::new(&tokenizer, 32, Truncation::KeepStart);
    let chat = Text::Chat(vec![ChatMessage::new("assistant", "Paris.")]);
    let e = encoder
        .encode_together(&plain("Where?"), &[plain(" Paris."), chat.clone()])
        .unwrap_err();
    assert_eq!(e.part(), Part::Answer(1));
    assert!(
        e.to_string().starts_with("completions[1] and the prompt"),
        "{e}"
    );
    assert_eq!(
        encoder
            .encode_pair(&plain("Where?"), &chat, &plain("?"))
            .unwrap_err()
            .part(),
        Part::Chosen
    );
    let mixed = [plain(" Paris."), chat];
    let encoded = encoder.encode_completions(&plain("Where?"), &mixed);
    let e = encoded[1].as_ref().unwrap_err();
    assert_eq!(e.part(), Part::Answer(1));
    assert!(e.problem().starts_with("and the prompt must"), "{e}");
    // An error of the prompt is returned for every answer.
    let long = plain(&"Where is it? ".repeat(64));
    let answers = [plain(" Here."), plain(" There.")];
    for encoded in encoder.encode_completions(&long, &answers) {
        let e = encoded.unwrap_err();
        assert!(
            matches!(e, EncodeError::PromptFillsMaxLength { max_length: 32, .. }),
            "{e}"
        );
        assert_eq!(e.part(), Part::Prompt);
    }
}
