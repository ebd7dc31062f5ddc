//! Turns tokens into text as they are generated.

use crate::formats::tokenizer::ChatTokenizer;
use crate::model::error::ModelError;

/// Stands for bytes that are no UTF-8, also for those of a character that is not complete yet.
const INCOMPLETE: char = '\u{FFFD}';
/// Maximum number of tokens that wait for the rest of a character. A character has at most 4 bytes,
/// so a longer wait means bytes that are no UTF-8, or several tokens that each end inside a
/// character.
const MAX_WAITING_TOKENS: usize = 7;
/// Maximum number of tokens that hold the beginning of a character: at most 3 bytes, each in a
/// token of its own.
const MAX_BEGINNING_TOKENS: usize = 3;

/// The text of a sample so far. It returns whole characters only, and stops at stop texts.
#[derive(Debug, Default)]
pub struct IncrementalText {
    ids: Vec<u32>,
    /// Index of the first token that is decoded again: the text of a token may depend on the one
    /// before it.
    prefix: usize,
    /// Index of a token. The text of the tokens before it was returned or is held, except for a
    /// character that they only begin.
    done: usize,
    /// Text that may be the beginning of a stop text.
    held: String,
}

/// Returns the text of single tokens, special tokens included.
#[derive(Clone, Debug, Default)]
pub struct TokenTexts {
    /// A token and its text. Some decoders remove the space before the first token of a text, so
    /// other tokens are decoded after this one.
    before: Option<(u32, String)>,
}

impl TokenTexts {
    /// Makes the texts of a tokenizer's tokens.
    ///
    /// # Errors
    /// Fails if the tokenizer library fails or panics.
    pub fn new(tokenizer: &ChatTokenizer) -> Result<Self, ModelError> {
        let before = match tokenizer.encode("a", false)?.last() {
            Some(id) => Some((*id, tokenizer.decode(&[*id])?)),
            None => None,
        };
        Ok(TokenTexts { before })
    }

    /// Returns the text of a token. Bytes that are no whole character are U+FFFD.
    ///
    /// # Errors
    /// As [`TokenTexts::new`].
    pub fn of(&self, tokenizer: &ChatTokenizer, token: u32) -> Result<String, ModelError> {
        if let Some((before, text)) = &self.before {
            let both = tokenizer.decode(&[*before, token])?;
            if let Some(text) = both.strip_prefix(text.as_str()) {
                return Ok(text.to_owned());
            }
        }
        tokenizer.decode(&[token])
    }
}

/// Text that was completed by a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewText {
    /// The text; often empty.
    pub text: String,
    /// True if a stop text follows it.
    pub stopped: bool,
}

impl IncrementalText {
    /// Adds a token and returns the text that it completes. `stop` has the stop texts.
    ///
    /// # Errors
    /// Fails if the tokenizer library fails or panics.
    pub fn push(
        &mut self,
        tokenizer: &ChatTokenizer,
        token: u32,
        stop: &[String],
    ) -> Result<NewText, ModelError> {
        self.ids.push(token);
        self.read(tokenizer, false)?;
        Ok(self.release(stop))
    }

    /// Returns the text that is left after the last token, also of an incomplete character.
    ///
    /// # Errors
    /// As [`IncrementalText::push`].
    pub fn finish(
        &mut self,
        tokenizer: &ChatTokenizer,
        stop: &[String],
    ) -> Result<NewText, ModelError> {
        self.read(tokenizer, true)?;
        let mut last = self.release(stop);
        if !last.stopped {
            last.text.push_str(&std::mem::take(&mut self.held));
        }
        Ok(last)
    }

    /// Adds the text of the last tokens to the held text, if it is complete or `at_end` is true.
    /// If too many tokens have no complete text, adds the text of all but the last ones, so that
    /// the number of tokens that are decoded again is bounded.
    fn read(&mut self, tokenizer: &ChatTokenizer, at_end: bool) -> Result<(), ModelError> {
        let text = |until: usize| tokenizer.decode_text(&self.ids[self.prefix..until]);
        let mut until = self.ids.len();
        let all = text(until)?;
        let Some(start) = final_bytes(&text(self.done)?, &all) else {
            // Some decoders replace each byte of a run if one of them is no UTF-8, also those of
            // characters that were returned. Without these, the text of the new tokens is left.
            self.prefix = self.done;
            return self.read(tokenizer, at_end);
        };
        let mut end = all.len();
        if all.ends_with(INCOMPLETE) && !at_end {
            if until - self.done <= MAX_WAITING_TOKENS {
                return Ok(());
            }
            let shorter = final_bytes(&text(until - MAX_BEGINNING_TOKENS)?, &all);
            (until, end) = shorter.map_or((until, end), |end| (until - MAX_BEGINNING_TOKENS, end));
        }
        if let Some(new) = all.get(start..end) {
            self.held.push_str(new);
        }
        (self.prefix, self.done) = (self.done, until);
        Ok(())
    }

    /// Takes the held text that cannot be part of a stop text.
    fn release(&mut self, stop: &[String]) -> NewText {
        let found = stop.iter().filter_map(|s| self.held.find(s.as_str())).min();
        if let Some(at) = found {
            let text = self.held[..at].to_owned();
            self.held.clear();
            return NewText {
                text,
                stopped: true,
            };
        }
        let is_beginning = |tail: &str| stop.iter().any(|s| s.starts_with(tail));
        let held_from = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|at| is_beginning(&self.held[*at..]))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(held_from);
        NewText {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }
}

/// Returns the number of bytes at the beginning of `first` that are final. `all` is the text of the
/// same tokens and of later ones. `None` if the later tokens change more of `first` than an
/// incomplete character at its end.
fn final_bytes(first: &str, all: &str) -> Option<usize> {
    let complete = first.trim_end_matches(INCOMPLETE);
    let unchanged = [first, complete];
    let unchanged = unchanged.iter().find(|text| all.starts_with(**text));
    unchanged.map(|text| text.len())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> ChatTokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models/qwen2");
        ChatTokenizer::from_folder(&folder).unwrap()
    }

    /// Returns the pieces of the text of these tokens.
    fn pieces(tokenizer: &ChatTokenizer, ids: &[u32], stop: &[&str]) -> (Vec<String>, bool) {
        let stop: Vec<String> = stop.iter().map(|s| (*s).to_owned()).collect();
        let (mut text, mut all) = (IncrementalText::default(), Vec::new());
        for id in ids {
            let new = text.push(tokenizer, *id, &stop).unwrap();
            all.push(new.text);
            if new.stopped {
                return (all, true);
            }
        }
        let last = text.finish(tokenizer, &stop).unwrap();
        all.push(last.text);
        (all, last.stopped)
    }

    #[test]
    fn characters_of_several_tokens_come_whole() {
        let tokenizer = tokenizer();
        let text = "naïve 😀 Où est-ce? 日本 done";
        let ids = tokenizer.encode(text, false).unwrap();
        let (all, _) = pieces(&tokenizer, &ids, &[]);
        assert_eq!(all.concat(), text);
        assert!(
            all.iter().all(|piece| !piece.contains(INCOMPLETE)),
            "{all:?}"
        );
        assert!(all.len() > 10, "the text comes in few pieces: {all:?}");
        // A character that never becomes complete is replaced at the end only.
        let cut = tokenizer.encode("a😀", false).unwrap();
        let (all, _) = pieces(&tokenizer, &cut[..cut.len() - 1], &[]);
        assert_eq!(all.concat().chars().next(), Some('a'));
        assert!(all.last().unwrap().contains(INCOMPLETE), "{all:?}");
    }

    #[test]
    fn a_stop_text_ends_the_text_before_it_even_in_the_middle_of_a_token() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("one two three two end", false).unwrap();
        for (stop, want) in [
            (&["wo"][..], "one t"),
            (&["three", "two"], "one "),
            (&["nothing"], "one two three two end"),
            (&["two endless"], "one two three two end"),
            (&["end"], "one two three two "),
        ] {
            let (all, stopped) = pieces(&tokenizer, &ids, stop);
            assert_eq!(
                (all.concat().as_str(), stopped),
                (want, want.len() < 21),
                "{stop:?}"
            );
        }
    }

    /// Returns the tokens that are single bytes above 127.
    fn lone_bytes(tokenizer: &ChatTokenizer) -> Vec<u32> {
        let text = tokenizer.encode("é€😀日本語", false).unwrap();
        let is_lone = |id: &u32| tokenizer.decode_text(&[*id]).unwrap() == "\u{FFFD}";
        text.into_iter().filter(is_lone).collect()
    }

    #[test]
    fn bytes_that_are_no_text_are_decoded_a_bounded_number_of_times() {
        let tokenizer = tokenizer();
        let bytes = lone_bytes(&tokenizer);
        assert!(bytes.len() > 8, "{bytes:?}");
        let letters = tokenizer.encode("a 😀b", false).unwrap();
        // 0 mixes the bytes, 1 repeats one of them, 2 the beginning of a character.
        for kind in 0..3 {
            let (mut ids, mut state) = (letters.clone(), 1u64);
            let emoji = tokenizer.encode("😀", false).unwrap();
            for i in 0..600 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                ids.push(match kind {
                    0 => bytes[(state >> 33) as usize % bytes.len()],
                    1 => bytes[bytes.len() - 1],
                    _ => emoji[i % (emoji.len() - 1)],
                });
                if kind == 0 && state >> 60 == 0 {
                    ids.extend(&letters);
                }
            }
            ids.extend(&letters);
            let (mut text, mut streamed) = (IncrementalText::default(), String::new());
            for (i, id) in ids.iter().enumerate() {
                streamed += &text.push(&tokenizer, *id, &[]).unwrap().text;
                assert!(i + 1 - text.prefix < 20, "{kind}: {text:?}");
                assert!(i + 1 - text.done <= MAX_WAITING_TOKENS, "{kind}: {text:?}");
            }
            streamed += &text.finish(&tokenizer, &[]).unwrap().text;
            assert_eq!(streamed, tokenizer.decode_text(&ids).unwrap(), "{kind}");
            assert!(streamed.ends_with("a 😀b"));
        }
    }

    #[test]
    fn a_character_that_later_tokens_complete_is_not_final() {
        assert_eq!(final_bytes("a\u{FFFD}", "a€\u{FFFD}"), Some(1));
        assert_eq!(final_bytes("a\u{FFFD}", "a\u{FFFD}\u{FFFD}b"), Some(4));
        assert_eq!(final_bytes("aé", "a\u{FFFD}\u{FFFD}\u{FFFD}"), None);
    }

    /// Returns a tokenizer whose decoder replaces all bytes of a run if one is no UTF-8, as those
    /// of Llama 2 and Gemma do. Token 1 + b is the byte b, and words follow.
    fn with_byte_fallback(words: &[&str]) -> ChatTokenizer {
        let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
        let words = words.iter().map(|word| (*word).to_owned());
        let tokens = std::iter::once("<unk>".to_owned())
            .chain(bytes)
            .chain(words);
        let vocabulary: serde_json::Map<String, serde_json::Value> = tokens
            .enumerate()
            .map(|(id, token)| (token, id.into()))
            .collect();
        let file = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ]},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
                "byte_fallback": true, "vocab": vocabulary, "merges": [],
            },
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
        ChatTokenizer::from_folder(folder.path()).unwrap()
    }

    #[test]
    fn a_bad_byte_takes_no_text_with_it() {
        let tokenizer = with_byte_fallback(&["x", "▁word", "▁more"]);
        let byte = |byte: u8| 1 + u32::from(byte);
        let word = |i: u32| 257 + i;
        for (character, bad) in [("é", 0xFF), ("你", 0xFF), ("😀", 0xFF), ("😀", 0x80)] {
            let mut ids = vec![word(0)];
            ids.extend(character.bytes().map(byte));
            ids.extend([byte(bad), word(1), byte(bad), word(2)]);
            let (all, _) = pieces(&tokenizer, &ids, &[]);
            let expected = format!("x{character}\u{FFFD} word\u{FFFD} more");
            assert_eq!(all.concat(), expected, "{all:?}");
        }
        // A run of bytes without an end.
        let mut ids: Vec<u32> = "éé".bytes().map(byte).collect();
        ids.extend([byte(0xFF); 30]);
        ids.push(word(1));
        let all = pieces(&tokenizer, &ids, &[]).0.concat();
        assert!(
            all.starts_with("éé\u{FFFD}") && all.ends_with(" word"),
            "{all}"
        );
        assert_eq!(all.matches(INCOMPLETE).count(), 30);
    }

    #[test]
    fn a_token_has_its_own_text_with_the_space_before_it() {
        let texts_of = |tokenizer: &ChatTokenizer, ids: &[u32]| -> Vec<String> {
            let texts = TokenTexts::new(tokenizer).unwrap();
            ids.iter()
                .map(|id| texts.of(tokenizer, *id).unwrap())
                .collect()
        };
        let bytes = tokenizer();
        let text = "one two, three";
        let mut ids = bytes.encode(text, false).unwrap();
        assert_eq!(texts_of(&bytes, &ids).concat(), text);
        ids = vec![bytes.eos_id().unwrap()];
        assert_eq!(texts_of(&bytes, &ids), [bytes.eos_token().unwrap()]);
        assert_eq!(texts_of(&bytes, &lone_bytes(&bytes)[..1]), ["\u{FFFD}"]);
        let words = with_byte_fallback(&["x", "▁word"]);
        assert_eq!(texts_of(&words, &[258, 257, 258]), [" word", "x", " word"]);
    }

    #[test]
    fn special_tokens_are_not_text() {
        let tokenizer = tokenizer();
        let mut ids = tokenizer.encode("hello", false).unwrap();
        ids.push(tokenizer.eos_id().unwrap());
        assert_eq!(pieces(&tokenizer, &ids, &[]).0.concat(), "hello");
    }
}
