//! JSONL files: one JSON object per line.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use super::reader::{DataError, MAX_LINE_BYTES, RowReader, issue};
use super::shapes::{self, Record};
use crate::domain::dataset::{IssueReason, RowIssue};
use crate::domain::message::kind;

pub(super) fn read(path: &Path) -> Result<RowReader, DataError> {
    Ok(Box::new(records(path)?.flat_map(shapes::pairs)))
}

/// Reads the lines as records.
pub(super) fn records(
    path: &Path,
) -> Result<impl Iterator<Item = Record> + Send + use<>, DataError> {
    let file = File::open(path).map_err(|source| DataError::Io {
        path: path.to_owned(),
        source,
    })?;
    Ok(Lines::new(file))
}

struct Lines<R> {
    reader: BufReader<R>,
    row: u64,
    failed: bool,
}

impl<R: Read> Lines<R> {
    fn new(file: R) -> Self {
        Lines {
            reader: BufReader::with_capacity(1 << 18, file),
            row: 0,
            failed: false,
        }
    }

    /// Ends the iteration. Returns its last item, the finding that the file cannot be read further.
    fn end_with(&mut self, row: u64, e: &io::Error) -> RowIssue {
        self.failed = true;
        let message = format!("the file cannot be read further: {e}");
        issue(row, "", IssueReason::InvalidJson, message)
    }
}

impl<R: Read> Iterator for Lines<R> {
    type Item = Record;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.failed {
                return None;
            }
            let mut line = Vec::new();
            let read = (&mut self.reader)
                .take(MAX_LINE_BYTES as u64 + 1)
                .read_until(b'\n', &mut line);
            match read {
                Ok(0) => return None,
                Ok(_) => self.row += 1,
                Err(e) => return Some(Err(self.end_with(self.row + 1, &e))),
            }
            // A line at the limit has been read with its line break, so there is no rest to skip.
            let content = line.strip_suffix(b"\n").unwrap_or(&line);
            if content.len() > MAX_LINE_BYTES {
                if let Err(e) = self.reader.skip_until(b'\n') {
                    return Some(Err(self.end_with(self.row, &e)));
                }
                let message = format!(
                    "the line is longer than {} MiB: split the file into rows, one JSON object a \
                     line",
                    MAX_LINE_BYTES >> 20
                );
                return Some(Err(issue(self.row, "", IssueReason::InvalidJson, message)));
            }
            // Without its line break, a line that ends too early has its error in line 1.
            let line = if self.row == 1 {
                content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content)
            } else {
                content
            };
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return Some(parse(self.row, line));
        }
    }
}

pub(super) fn parse(row: u64, line: &[u8]) -> Record {
    let text = std::str::from_utf8(line).map_err(|e| {
        issue(
            row,
            "",
            IssueReason::InvalidUtf8,
            format!(
                "the line is not UTF-8 at byte {}: save the file as UTF-8",
                e.valid_up_to() + 1
            ),
        )
    })?;
    let value: Value = serde_json::from_str(text).map_err(|e| {
        issue(
            row,
            "",
            IssueReason::InvalidJson,
            format!("not JSON (column {}): {e}", e.column()),
        )
    })?;
    match value {
        Value::Object(fields) => Ok((row, fields)),
        other => Err(issue(
            row,
            "",
            IssueReason::InvalidJson,
            format!("a row is a JSON object, this is {}", kind(&other)),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with an error in place of its end.
    struct Failing<'a>(&'a [u8]);

    impl Read for Failing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::Error::other("a bad sector")),
                read => Ok(read),
            }
        }
    }

    #[test]
    fn the_place_of_an_error_is_in_the_line() {
        let found = Lines::new(&b"{\"prompt\":\n"[..]).next();
        let message = found.unwrap().unwrap_err().message;
        assert!(
            message.starts_with("not JSON (column 10): ")
                && message.ends_with(" at line 1 column 10"),
            "{message}"
        );
    }

    #[test]
    fn a_file_that_cannot_be_read_further_ends_with_that_finding() {
        // The second line is in the middle of its content, or of the rest that is skipped.
        for length in [10, MAX_LINE_BYTES + 10] {
            let mut bytes = b"{}\n".to_vec();
            bytes.resize(bytes.len() + length, b'x');
            let found: Vec<(u64, String)> = Lines::new(Failing(&bytes))
                .map(|record| match record {
                    Ok((row, _)) => (row, String::new()),
                    Err(issue) => (issue.row, issue.message),
                })
                .collect();
            let last = "the file cannot be read further: a bad sector".to_owned();
            assert_eq!(found, [(1, String::new()), (2, last)], "{length}");
        }
    }
}
