//! Wraps text to a number of columns: the text of a model while it comes, or a whole text.

use std::collections::VecDeque;

use unicode_width::UnicodeWidthStr;

/// Text in place of a tab, whose width would depend on its place.
const TAB: &str = "    ";
/// Maximum size of a line for each of its columns, in bytes. It bounds lines of characters without
/// a width.
const MAX_COLUMN_BYTES: usize = 32;

/// A text that grows, in lines of a limited width.
///
/// Lines end at spaces, or within words that are too long. A line that has ended does not change
/// any more, so it can be printed while the text still grows.
pub struct TextWrap {
    width: usize,
    /// Lines that have ended and were not taken yet.
    lines: VecDeque<String>,
    /// Text of the line that has not ended.
    rest: String,
}

impl TextWrap {
    /// Returns an empty text with lines of at most `width` columns. A character that is wider has a
    /// line of its own.
    pub fn new(width: usize) -> Self {
        TextWrap {
            width,
            lines: VecDeque::new(),
            rest: String::new(),
        }
    }

    /// Appends text.
    pub fn push(&mut self, text: &str) {
        self.rest.push_str(&text.replace('\t', TAB));
        while let Some((end, next)) = first_line(&self.rest, self.width) {
            self.lines.push_back(self.rest[..end].trim_end().to_owned());
            self.rest.drain(..next);
        }
    }

    /// Ends the last line.
    pub fn finish(&mut self) {
        if !self.rest.is_empty() {
            self.lines.push_back(self.rest.trim_end().to_owned());
            self.rest.clear();
        }
    }

    /// Returns true if a line has ended that was not taken yet.
    pub fn has_line(&self) -> bool {
        !self.lines.is_empty()
    }

    /// Takes the first line that has ended.
    pub fn next_line(&mut self) -> Option<String> {
        self.lines.pop_front()
    }
}

/// Returns the lines of a text that has ended.
pub fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut wrap = TextWrap::new(width);
    wrap.push(text);
    wrap.finish();
    wrap.lines.into()
}

/// Returns the end of the first line and the start of the second, in bytes; `None` if the first one
/// may become longer.
fn first_line(text: &str, width: usize) -> Option<(usize, usize)> {
    // The last spaces after a word: their start and their end.
    let mut spaces: Option<(usize, usize)> = None;
    let mut has_word = false;
    for (i, c) in text.char_indices() {
        let end = i + c.len_utf8();
        match c {
            '\n' => return Some((i, end)),
            ' ' if has_word => {
                let start = match spaces {
                    Some((start, before)) if before == i => start,
                    _ => i,
                };
                spaces = Some((start, end));
            }
            ' ' => {}
            _ => {
                has_word = true;
                let is_too_long =
                    end > width.saturating_mul(MAX_COLUMN_BYTES) || text[..end].width() > width;
                if is_too_long && i > 0 {
                    return Some(spaces.unwrap_or((i, i)));
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_spaces_and_within_long_words() {
        for (text, width, lines) in [
            ("one two three", 7, vec!["one two", "three"]),
            ("one two  three", 7, vec!["one two", "three"]),
            ("one\n\n  two", 7, vec!["one", "", "  two"]),
            ("abcdefghij", 4, vec!["abcd", "efgh", "ij"]),
            ("a bcdefghij", 4, vec!["a", "bcde", "fghi", "j"]),
            ("      abcdef", 4, vec!["", "abcd", "ef"]),
            ("東京都庁 東", 4, vec!["東京", "都庁", "東"]),
            ("東京", 1, vec!["東", "京"]),
            ("a\tb", 9, vec!["a    b"]),
            ("a \n", 9, vec!["a"]),
            ("", 9, vec![]),
        ] {
            assert_eq!(wrapped(text, width), lines, "{text:?} in {width}");
        }
    }

    #[test]
    fn lines_do_not_depend_on_the_parts_in_which_a_text_comes() {
        let text = "Water boils at 100 °C, 水は沸騰する; \
                    supercalifragilistic\n\n\tindented ❤️ text. ";
        for width in 1..30 {
            let mut wrap = TextWrap::new(width);
            let mut lines = Vec::new();
            for c in text.chars() {
                wrap.push(&c.to_string());
                lines.extend(std::iter::from_fn(|| wrap.next_line()));
            }
            wrap.finish();
            lines.extend(std::iter::from_fn(|| wrap.next_line()));
            assert_eq!(lines, wrapped(text, width), "{width}");
            let widest = lines.iter().map(|line| line.width()).max();
            assert!(widest <= Some(width.max(2)), "{lines:?}");
            assert!(!wrap.has_line());
        }
    }

    #[test]
    fn characters_without_a_width_do_not_fill_the_memory() {
        let lines = wrapped(&"\u{301}".repeat(10_000), 10);
        assert!(lines.iter().all(|line| line.len() <= 10 * MAX_COLUMN_BYTES));
    }
}
