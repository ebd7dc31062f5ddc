//! Tokens of an answer with their log-probs, in the forms of OpenAI's API.

use serde_json::{Map, Value, json};

use super::request::AnswerOptions;
use crate::rpc::pb;

/// Minimum log-prob in an answer, because JSON has no infinity.
const MIN_LOG_PROB: f32 = -9999.0;
/// Stands for bytes that are no whole character.
const INCOMPLETE: char = '\u{FFFD}';

/// A token of an answer.
#[derive(Clone)]
pub struct AnswerToken {
    /// Its text.
    pub text: String,
    /// `None` for the first token of a prompt.
    pub log_prob: Option<f32>,
    /// The most likely tokens at its place, the most likely first.
    pub top: Vec<pb::TokenLogprob>,
}

impl AnswerToken {
    /// Converts a token of a prompt.
    pub fn of_prompt(token: pb::PromptToken) -> Self {
        AnswerToken {
            text: token.text,
            log_prob: token.logprob,
            top: token.top_logprobs,
        }
    }
}

/// Returns the new tokens of a sample; none if their texts were not asked for.
pub fn of_delta(delta: &mut pb::CompletionDelta) -> Vec<AnswerToken> {
    let mut top = std::mem::take(&mut delta.top_logprobs).into_iter();
    let texts = std::mem::take(&mut delta.token_texts).into_iter();
    texts
        .zip(&delta.token_logprobs)
        .map(|(text, log_prob)| AnswerToken {
            text,
            log_prob: Some(*log_prob),
            top: top.next().map(|top| top.tokens).unwrap_or_default(),
        })
        .collect()
}

/// Returns the log-probs of tokens in the form of the request's API; null if they were not asked
/// for. `offsets` returns the places of the tokens in their text.
pub fn log_probs(
    asked: &AnswerOptions,
    tokens: &[AnswerToken],
    offsets: impl FnOnce() -> Vec<usize>,
) -> Value {
    match asked.alternatives {
        None => Value::Null,
        Some(_) if asked.is_chat => {
            let content: Vec<Value> = tokens.iter().map(chat_token).collect();
            json!({"content": content, "refusal": null})
        }
        Some(alternatives) => json!({
            "tokens": tokens.iter().map(|token| token.text.as_str()).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|t| t.log_prob.map(number)).collect::<Vec<_>>(),
            "top_logprobs": match alternatives {
                0 => Value::Null,
                _ => tokens.iter().map(top_of_text).collect(),
            },
            "text_offset": offsets(),
        }),
    }
}

/// Returns a log-prob as JSON.
fn number(log_prob: f32) -> Value {
    Value::from(f64::from(log_prob.max(MIN_LOG_PROB)))
}

/// Returns the likely tokens at the place of a token of a text, and the token itself.
fn top_of_text(token: &AnswerToken) -> Value {
    let Some(log_prob) = token.log_prob else {
        return Value::Null;
    };
    let mut top = Map::new();
    // Of tokens with the same text, the most likely one is in the answer.
    for likely in &token.top {
        top.entry(likely.text.as_str())
            .or_insert_with(|| number(likely.logprob));
    }
    top.entry(token.text.as_str())
        .or_insert_with(|| number(log_prob));
    Value::Object(top)
}

/// Returns a token of a chat.
fn chat_token(token: &AnswerToken) -> Value {
    let top = token.top.iter();
    let top: Vec<Value> = top.map(|t| with_bytes(&t.text, t.logprob)).collect();
    let mut value = with_bytes(&token.text, token.log_prob.unwrap_or(MIN_LOG_PROB));
    value["top_logprobs"] = Value::Array(top);
    value
}

fn with_bytes(text: &str, log_prob: f32) -> Value {
    let bytes = (!text.contains(INCOMPLETE)).then_some(text.as_bytes());
    json!({"token": text, "logprob": number(log_prob), "bytes": bytes})
}

/// Returns the number of characters before each of the tokens, of which `before` stand before the
/// first one, and the number of characters up to the end.
pub fn offsets(tokens: &[AnswerToken], before: usize) -> (Vec<usize>, usize) {
    let mut at = before;
    let places = tokens.iter().map(|token| {
        let place = at;
        at += token.text.chars().count();
        place
    });
    let places = places.collect();
    (places, at)
}

/// Returns the places of tokens in their text, in characters. Each token that is a part of a
/// character counts as one character.
pub fn offsets_in(tokens: &[AnswerToken], text: &str) -> Vec<usize> {
    // Some tokenizers leave the space before the first word out.
    let at_beginning = |token: &AnswerToken| {
        let forms = [token.text.as_str(), token.text.trim_start()];
        let in_text = forms.into_iter().find(|t| text.starts_with(*t));
        in_text.map(|t| t.chars().count())
    };
    let Some((first, rest)) = tokens.split_first() else {
        return Vec::new();
    };
    let mut places = vec![0];
    let after_first = match (at_beginning(first), rest.split_first()) {
        (Some(characters), _) => offsets(rest, characters).0,
        // A token such as BOS is not part of the text, which begins with the second token.
        (None, Some((second, others))) => {
            places.push(0);
            let characters = at_beginning(second);
            let characters = characters.unwrap_or_else(|| second.text.chars().count());
            offsets(others, characters).0
        }
        (None, None) => Vec::new(),
    };
    places.extend(after_first);
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_whole_characters() {
        assert_eq!(with_bytes("é", -0.5)["bytes"], json!([195, 169]));
        assert_eq!(with_bytes("\u{FFFD}", -0.5)["bytes"], Value::Null);
    }

    #[test]
    fn the_first_token_may_be_no_part_of_the_text() {
        let tokens = |texts: &[&str]| -> Vec<AnswerToken> {
            let token = |text: &&str| AnswerToken {
                text: (*text).to_owned(),
                log_prob: None,
                top: Vec::new(),
            };
            texts.iter().map(token).collect()
        };
        for (texts, text, places) in [
            (&["<s>", "a", "b"][..], "ab", &[0, 0, 1][..]),
            (&["<s>", " a", "b"], "ab", &[0, 0, 1]),
            (&["<s>"], "", &[0]),
            (&[" a", "b"], "ab", &[0, 1]),
            (&["aé", "b"], "aéb", &[0, 2]),
            (&[], "", &[]),
        ] {
            assert_eq!(offsets_in(&tokens(texts), text), places, "{texts:?}");
        }
    }
}
