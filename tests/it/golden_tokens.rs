//! Compares tokens and rendered chats with TRL and transformers, token for token.

use bradley::domain::dataset::Text;
use bradley::domain::training::Truncation;
use bradley::formats::chat_template::RenderOptions;
use bradley::infer::encode::{EncodeError, PairEncoder};

use crate::support::{MODELS, encode, ids, json, rows, tiny};

#[test]
fn every_row_has_trls_tokens() {
    let expected = json("tokens.json");
    for name in MODELS {
        let (_, tokenizer) = tiny(name);
        for file in ["pairs.jsonl", "plain.jsonl"] {
            let rows = rows(file);
            for (row, pair) in rows.iter().zip(encode(&rows, &tokenizer, 256)) {
                let e = &expected[name][row.id.as_deref().unwrap()];
                let what = format!("{name} {:?}", row.id);
                assert_eq!(pair.prompt, ids(&e["prompt"]), "{what} prompt");
                assert_eq!(pair.chosen, ids(&e["chosen"]), "{what} chosen");
                assert_eq!(pair.rejected, ids(&e["rejected"]), "{what} rejected");
                assert_eq!(pair.rejected_prompt, None);
            }
        }
    }
}

#[test]
fn dialogues_render_as_transformers_renders_them() {
    let expected = json("tokens.json");
    for name in MODELS {
        let (_, tokenizer) = tiny(name);
        for row in rows("pairs.jsonl") {
            let e = &expected[name][row.id.as_deref().unwrap()];
            let (Text::Chat(prompt), Text::Chat(chosen)) = (&row.prompt, &row.chosen) else {
                panic!("not a chat row")
            };
            assert_eq!(
                tokenizer
                    .apply_chat_template(prompt, &RenderOptions::new(true))
                    .unwrap(),
                e["text"].as_str().unwrap()
            );
            let whole: Vec<_> = prompt.iter().chain(chosen).cloned().collect();
            assert_eq!(
                tokenizer
                    .apply_chat_template(&whole, &RenderOptions::new(false))
                    .unwrap(),
                e["whole"].as_str().unwrap()
            );
        }
    }
}

#[test]
fn truncation_keeps_the_start_or_the_end_and_never_loses_the_answer_silently() {
    let (_, tokenizer) = tiny("qwen2");
    for row in rows("pairs.jsonl") {
        let whole = &encode(std::slice::from_ref(&row), &tokenizer, 1000)[0];
        let (prompt, chosen) = (whole.prompt.len(), whole.chosen.len());
        for max in 2..prompt + chosen + 2 {
            let start = PairEncoder::new(&tokenizer, max, Truncation::KeepStart).encode_pair(
                &row.prompt,
                &row.chosen,
                &row.rejected,
            );
            match start {
                Ok(p) => {
                    assert!(max > prompt);
                    assert_eq!(p.prompt, whole.prompt);
                    assert_eq!(p.chosen, whole.chosen[..(max - prompt).min(chosen)]);
                    assert_eq!(p.chosen_truncated, max < prompt + chosen);
                }
                Err(EncodeError::PromptFillsMaxLength { tokens, max_length }) => {
                    assert_eq!((tokens, max_length), (prompt, max));
                    assert!(max <= prompt);
                }
                Err(other) => panic!("{other}"),
            }
            let end = PairEncoder::new(&tokenizer, max, Truncation::KeepEnd)
                .encode_pair(&row.prompt, &row.chosen, &row.rejected)
                .unwrap();
            let (all, kept) = (
                [whole.prompt.clone(), whole.chosen.clone()].concat(),
                [end.prompt.clone(), end.chosen].concat(),
            );
            assert_eq!(kept, all[all.len().saturating_sub(max)..]);
            assert!(!end.prompt.is_empty());
        }
    }
}

#[test]
fn a_prompt_of_ten_thousand_tokens_is_refused_by_its_length() {
    let (_, tokenizer) = tiny("llama");
    let prompt = Text::Plain("the river rises ".repeat(5000));
    let answer = Text::Plain("yes".into());
    let e = PairEncoder::new(&tokenizer, 1024, Truncation::KeepStart)
        .encode_pair(&prompt, &answer, &Text::Plain("no".into()))
        .unwrap_err();
    assert!(
        matches!(
            e,
            EncodeError::PromptFillsMaxLength { tokens, max_length: 1024 } if tokens > 10_000
        ),
        "{e}"
    );
}
