//! Splits a JSON array, or JSON objects that follow each other, into their elements.
//!
//! Elements are only found, not parsed: the bytes of each become one line, so that a malformed one
//! is reported as a row and does not end the file. One element is in memory at a time.

use std::io::{BufRead, BufReader, Read};

use super::row::{DataRow, DataRows};
use crate::domain::dataset::IssueReason;
use crate::train::rows::MAX_LINE_BYTES;

pub(super) fn read(reader: impl Read + Send + 'static) -> DataRows {
    Box::new(JsonElements {
        reader: BufReader::with_capacity(1 << 18, reader),
        state: State::Start,
    })
}

/// ```text
/// Start => Array | Sequence | End, Array => Array | End | Ended,
/// Sequence => Sequence | Ended, End => Ended
/// ```
#[derive(Clone, Copy, PartialEq)]
enum State {
    /// Before the first byte that is not blank.
    Start,
    /// Inside an array, before an element.
    Array,
    /// Before an element of a sequence without brackets.
    Sequence,
    /// After the array.
    End,
    Ended,
}

struct JsonElements<R> {
    reader: BufReader<R>,
    state: State,
}

impl<R: Read> Iterator for JsonElements<R> {
    type Item = Result<DataRow, String>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.element();
        if !matches!(item, Ok(Some(_))) {
            self.state = State::Ended;
        }
        item.transpose()
    }
}

impl<R: Read> JsonElements<R> {
    fn element(&mut self) -> Result<Option<DataRow>, String> {
        if self.state == State::Ended {
            return Ok(None);
        }
        if self.state == State::Start {
            if self.peek_bytes()?.starts_with(b"\xef\xbb\xbf") {
                self.reader.consume(3);
            }
            self.state = State::Sequence;
            if self.next_visible()? == Some(b'[') {
                self.reader.consume(1);
                self.state = State::Array;
                if self.next_visible()? == Some(b']') {
                    self.reader.consume(1);
                    self.state = State::End;
                }
            }
        }
        match (self.state, self.next_visible()?) {
            (State::End, None) | (State::Sequence, None) => Ok(None),
            (State::End, Some(_)) => {
                Err("has more text after the end of its JSON array: remove it".to_owned())
            }
            (_, None) => Err("ends inside its JSON array: the file is cut off".to_owned()),
            (..) => self.collect().map(Some),
        }
    }

    /// Collects an element up to its end, and the comma or bracket after it.
    fn collect(&mut self) -> Result<DataRow, String> {
        let is_array = self.state == State::Array;
        let (mut element, mut is_too_long) = (Vec::new(), false);
        let (mut depth, mut in_string, mut is_escaped) = (0_u64, false, false);
        loop {
            let buffer = self.peek_bytes()?;
            if buffer.is_empty() && (is_array || depth > 0 || in_string) {
                return Err("ends inside a JSON value: the file is cut off".to_owned());
            }
            if buffer.is_empty() {
                break;
            }
            let mut used = 0;
            let mut end = None;
            for byte in buffer {
                if in_string {
                    (in_string, is_escaped) =
                        (is_escaped || *byte != b'"', !is_escaped && *byte == b'\\');
                } else {
                    match byte {
                        b'"' => in_string = true,
                        b'{' | b'[' => depth += 1,
                        b']' if is_array && depth == 0 => end = Some(State::End),
                        b',' if is_array && depth == 0 => end = Some(State::Array),
                        b'}' | b']' => {
                            depth = depth.saturating_sub(1);
                            if !is_array && depth == 0 {
                                end = Some(State::Sequence);
                            }
                        }
                        byte if !is_array && depth == 0 && byte.is_ascii_whitespace() => {
                            end = Some(State::Sequence);
                        }
                        _ => {}
                    }
                }
                used += 1;
                if end.is_some() {
                    break;
                }
            }
            // The delimiter of an array is not part of the element.
            let of_element = used - usize::from(is_array && end.is_some());
            is_too_long |= element.len() + of_element > MAX_LINE_BYTES;
            if !is_too_long {
                // A line feed in a string is not JSON, so only space between values changes.
                let is_break = |byte: &u8| matches!(byte, b'\n' | b'\r');
                let bytes = buffer[..of_element].iter();
                element.extend(bytes.map(|byte| if is_break(byte) { b' ' } else { *byte }));
            }
            self.reader.consume(used);
            if let Some(next) = end {
                self.state = next;
                break;
            }
        }
        if is_too_long {
            let message = format!("the element is longer than {} MiB", MAX_LINE_BYTES >> 20);
            return Ok(DataRow::bad("", IssueReason::InvalidJson, message));
        }
        Ok(DataRow::Line(element))
    }

    /// Skips white space and returns the next byte without consuming it.
    fn next_visible(&mut self) -> Result<Option<u8>, String> {
        loop {
            let buffer = self.peek_bytes()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            match buffer.iter().position(|byte| !byte.is_ascii_whitespace()) {
                Some(at) => {
                    let byte = buffer[at];
                    self.reader.consume(at);
                    return Ok(Some(byte));
                }
                None => {
                    let blank = buffer.len();
                    self.reader.consume(blank);
                }
            }
        }
    }

    fn peek_bytes(&mut self) -> Result<&[u8], String> {
        self.reader
            .fill_buf()
            .map_err(|e| format!("cannot be read further: {e}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(text: &str) -> Vec<Result<String, String>> {
        read(std::io::Cursor::new(text.as_bytes().to_vec()))
            .map(|row| {
                row.map(|row| match row {
                    DataRow::Line(line) => String::from_utf8(line).unwrap().trim().to_owned(),
                    other => format!("{other:?}"),
                })
            })
            .collect()
    }

    #[test]
    fn arrays_and_sequences_are_split_at_their_own_delimiters_only() {
        let element = r#"{"a": "x],}\"{", "b": [1, {"c": []}]}"#;
        let broken = element.replace(": [1", ":\n\t[1");
        let one = Ok(element.to_owned());
        let spaced = Ok(broken.replace('\n', " "));
        assert_eq!(
            elements(&format!("[{element}]")),
            std::slice::from_ref(&one)
        );
        assert_eq!(
            elements(&format!("\u{feff} [\n{element} ,\n{broken}\n, 7]\n ")),
            [one.clone(), spaced.clone(), Ok("7".to_owned())]
        );
        assert_eq!(
            elements(&format!("{broken}\n{element}{element} 7")),
            [spaced, one.clone(), one.clone(), Ok("7".to_owned())]
        );
        assert!(elements("[]").is_empty() && elements(" ").is_empty() && elements("").is_empty());
        assert_eq!(
            elements("[nonsense, {]"),
            [
                Ok("nonsense".to_owned()),
                Err("ends inside a JSON value: the file is cut off".to_owned())
            ]
        );
        for cut in ["[{}, ", "[", "[{}"] {
            let last = elements(cut).pop().unwrap();
            assert!(last.unwrap_err().contains("cut off"), "{cut}");
        }
        assert!(
            elements("[{}] {}")[1]
                .as_ref()
                .unwrap_err()
                .contains("more text")
        );
    }

    #[test]
    fn an_element_that_is_too_long_is_skipped_and_the_next_one_is_read() {
        let text = format!("[\"{}\", {{}}]", "x".repeat(MAX_LINE_BYTES));
        let found = elements(&text);
        assert!(
            found[0].as_ref().unwrap().contains("longer than 16 MiB"),
            "{:?}",
            found[0]
        );
        assert_eq!(found[1..], [Ok("{}".to_owned())]);
    }
}
