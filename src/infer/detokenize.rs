//! Turns tokens into text as they are generated.

use crate::formats::tokenizer::ChatTokenizer;
use crate::model::error::ModelError;

/// Stands for bytes that are no UTF-8, also for those of a character that is not complete yet.
const INCOMPLETE: char = '\u{FFFD}';

/// The text of a sample so far. It returns whole characters only, and stops at stop texts.
#[derive(Debug, Default)]
pub struct IncrementalText {
    ids: Vec<u32>,
    /// Tokens from here on are decoded again: the text of a token may depend on the one before it.
    prefix: usize,
    /// The text of the tokens before was returned or is held.
    done: usize,
    /// Text that may be the beginning of a stop text.
    held: String,
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
    fn read(&mut self, tokenizer: &ChatTokenizer, at_end: bool) -> Result<(), ModelError> {
        let known = tokenizer.decode_text(&self.ids[self.prefix..self.done])?;
        let all = tokenizer.decode_text(&self.ids[self.prefix..])?;
        if all.ends_with(INCOMPLETE) && !at_end {
            return Ok(());
        }
        if let Some(new) = all.get(known.len()..) {
            self.held.push_str(new);
        }
        (self.prefix, self.done) = (self.done, self.ids.len());
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
        assert!(all.len() > 10, "it comes in pieces");
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

    #[test]
    fn special_tokens_are_not_text() {
        let tokenizer = tokenizer();
        let mut ids = tokenizer.encode("hello", false).unwrap();
        ids.push(tokenizer.eos_id().unwrap());
        assert_eq!(pieces(&tokenizer, &ids, &[]).0.concat(), "hello");
    }
}
