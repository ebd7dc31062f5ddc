//! Tokens of an answer with their log-probs, in the forms of OpenAI's API.

use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};

use super::request::AnswerOptions;
use crate::rpc::pb;

/// Minimum log-prob in an answer, because JSON has no infinity.
const MIN_LOG_PROB: f32 = -9999.0;
/// Stands for bytes that are no whole character.
const INCOMPLETE: char = '\u{FFFD}';

/// A token of an answer.
#[derive(Clone, Debug)]
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

/// The log-probs of tokens in the form of the request's API. They are written to JSON directly: a
/// tree of values takes several times as much memory as the text.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum AnswerLogProbs<'a> {
    /// Those of a chat.
    Chat {
        /// Each token with its likely tokens.
        content: ChatTokens<'a>,
        /// Always null: no answer is refused.
        refusal: Option<&'a str>,
    },
    /// Those of a text.
    Text {
        /// The texts of the tokens.
        tokens: AnswerTokenTexts<'a>,
        /// Their log-probs.
        token_logprobs: AnswerTokenLogProbs<'a>,
        /// The likely tokens at each place; `None` if none were asked for.
        top_logprobs: Option<LikelyTexts<'a>>,
        /// The place of each token in the text, in characters.
        text_offset: Vec<usize>,
    },
}

/// Writes the texts of tokens as a list.
#[derive(Debug)]
pub struct AnswerTokenTexts<'a>(&'a [AnswerToken]);

impl Serialize for AnswerTokenTexts<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|token| token.text.as_str()))
    }
}

/// Writes the log-probs of tokens as a list.
#[derive(Debug)]
pub struct AnswerTokenLogProbs<'a>(&'a [AnswerToken]);

impl Serialize for AnswerTokenLogProbs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|token| token.log_prob.map(number)))
    }
}

/// Writes the likely tokens at the places of a text's tokens as a list of objects.
#[derive(Debug)]
pub struct LikelyTexts<'a>(&'a [AnswerToken]);

impl Serialize for LikelyTexts<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(LikelyAtPlace))
    }
}

/// Writes the likely tokens at the place of a token, and the token itself, as an object. It is
/// null for the first token of a prompt.
struct LikelyAtPlace<'a>(&'a AnswerToken);

impl Serialize for LikelyAtPlace<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let token = self.0;
        let Some(own) = token.log_prob else {
            return serializer.serialize_none();
        };
        let likely = token.top.iter().map(|t| (t.text.as_str(), t.logprob));
        let mut written = Vec::with_capacity(token.top.len() + 1);
        let mut object = serializer.serialize_map(None)?;
        for (text, log_prob) in likely.chain([(token.text.as_str(), own)]) {
            // Of tokens with the same text, the most likely one is in the answer.
            if !written.contains(&text) {
                written.push(text);
                object.serialize_entry(text, &number(log_prob))?;
            }
        }
        object.end()
    }
}

/// Writes the tokens of a chat as a list of objects.
#[derive(Debug)]
pub struct ChatTokens<'a>(&'a [AnswerToken]);

impl Serialize for ChatTokens<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(ChatToken::with_likely))
    }
}

/// A token of a chat, or one of the likely tokens at its place.
#[derive(Serialize)]
struct ChatToken<'a> {
    token: &'a str,
    logprob: f64,
    /// `None` if the text is no whole character.
    bytes: Option<&'a [u8]>,
    /// `None` for a likely token.
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<ChatToken<'a>>>,
}

impl<'a> ChatToken<'a> {
    fn new(text: &'a str, log_prob: f32) -> Self {
        ChatToken {
            token: text,
            logprob: number(log_prob),
            bytes: (!text.contains(INCOMPLETE)).then_some(text.as_bytes()),
            top_logprobs: None,
        }
    }

    fn with_likely(token: &'a AnswerToken) -> Self {
        let likely = token.top.iter().map(|t| ChatToken::new(&t.text, t.logprob));
        ChatToken {
            top_logprobs: Some(likely.collect()),
            ..ChatToken::new(&token.text, token.log_prob.unwrap_or(MIN_LOG_PROB))
        }
    }
}

/// Returns the log-probs of tokens in the form of the request's API; `None` if they were not asked
/// for. `offsets` returns the places of the tokens in their text.
pub fn log_probs<'a>(
    asked: &AnswerOptions,
    tokens: &'a [AnswerToken],
    offsets: impl FnOnce() -> Vec<usize>,
) -> Option<AnswerLogProbs<'a>> {
    let alternatives = asked.alternatives?;
    if asked.is_chat {
        return Some(AnswerLogProbs::Chat {
            content: ChatTokens(tokens),
            refusal: None,
        });
    }
    Some(AnswerLogProbs::Text {
        tokens: AnswerTokenTexts(tokens),
        token_logprobs: AnswerTokenLogProbs(tokens),
        top_logprobs: (alternatives > 0).then_some(LikelyTexts(tokens)),
        text_offset: offsets(),
    })
}

/// Returns a log-prob as JSON has it.
fn number(log_prob: f32) -> f64 {
    f64::from(log_prob.max(MIN_LOG_PROB))
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

    fn token(text: &str, log_prob: Option<f32>, likely: &[(&str, f32)]) -> AnswerToken {
        let top = likely.iter().map(|(text, logprob)| pb::TokenLogprob {
            token_id: 1,
            logprob: *logprob,
            text: (*text).to_owned(),
        });
        AnswerToken {
            text: text.to_owned(),
            log_prob,
            top: top.collect(),
        }
    }

    fn json_of(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn bytes_are_those_of_whole_characters() {
        assert_eq!(
            json_of(&ChatToken::new("é", -0.5)),
            r#"{"token":"é","logprob":-0.5,"bytes":[195,169]}"#
        );
        let incomplete = json_of(&ChatToken::new("\u{FFFD}", f32::NEG_INFINITY));
        assert!(
            incomplete.ends_with(r#""logprob":-9999.0,"bytes":null}"#),
            "{incomplete}"
        );
    }

    #[test]
    fn tokens_of_a_chat_have_their_likely_tokens() {
        let tokens = [
            token("a", Some(-0.5), &[("a", -0.5), ("b", -1.5)]),
            token("c", Some(-2.0), &[]),
        ];
        assert_eq!(
            json_of(&ChatTokens(&tokens)),
            concat!(
                r#"[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":["#,
                r#"{"token":"a","logprob":-0.5,"bytes":[97]},"#,
                r#"{"token":"b","logprob":-1.5,"bytes":[98]}]},"#,
                r#"{"token":"c","logprob":-2.0,"bytes":[99],"top_logprobs":[]}]"#,
            )
        );
    }

    #[test]
    fn of_likely_tokens_with_the_same_text_the_first_is_written() {
        let tokens = [
            token("<s>", None, &[]),
            token(
                "\u{FFFD}",
                Some(-3.0),
                &[("\u{FFFD}", -0.5), ("\u{FFFD}", -1.0), ("a", -2.0)],
            ),
            token("b", Some(-0.25), &[]),
        ];
        let expected = "[null,{\"\u{FFFD}\":-0.5,\"a\":-2.0},{\"b\":-0.25}]";
        assert_eq!(json_of(&LikelyTexts(&tokens)), expected);
        assert_eq!(json_of(&AnswerTokenLogProbs(&tokens)), "[null,-3.0,-0.25]");
        assert_eq!(
            json_of(&AnswerTokenTexts(&tokens)),
            "[\"<s>\",\"\u{FFFD}\",\"b\"]"
        );
    }

    #[test]
    fn the_first_token_may_be_no_part_of_the_text() {
        let tokens = |texts: &[&str]| -> Vec<AnswerToken> {
            texts.iter().map(|text| token(text, None, &[])).collect()
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
