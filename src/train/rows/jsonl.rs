//! JSONL files: one JSON object per line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use super::reader::{DataError, MAX_LINE_BYTES, RowReader, issue};
use super::shapes::{self, Record};
use crate::domain::dataset::IssueReason;
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
    Ok(Lines {
        reader: BufReader::with_capacity(1 << 18, file),
        row: 0,
        failed: false,
    })
}

struct Lines {
    reader: BufReader<File>,
    row: u64,
    failed: bool,
}

impl Iterator for Lines {
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
                Err(e) => {
                    self.failed = true;
                    return Some(Err(issue(
                        self.row + 1,
                        "",
                        IssueReason::InvalidJson,
                        format!("the file cannot be read further: {e}"),
                    )));
                }
            }
            // A line at the limit has been read with its line break, so there is no rest to skip.
            let content = line.strip_suffix(b"\n").unwrap_or(&line);
            if content.len() > MAX_LINE_BYTES {
                self.skip_line();
                let message = format!(
                    "the line is longer than {} MiB: split the file into rows, one JSON object a \
                     line",
                    MAX_LINE_BYTES >> 20
                );
                return Some(Err(issue(self.row, "", IssueReason::InvalidJson, message)));
            }
            let line = if self.row == 1 {
                line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line)
            } else {
                &line
            };
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return Some(parse(self.row, line));
        }
    }
}

impl Lines {
    fn skip_line(&mut self) {
        loop {
            let (used, done) = match self.reader.fill_buf() {
                Ok([]) => return,
                Ok(buffer) => match buffer.iter().position(|b| *b == b'\n') {
                    Some(i) => (i + 1, true),
                    None => (buffer.len(), false),
                },
                Err(_) => {
                    self.failed = true;
                    return;
                }
            };
            self.reader.consume(used);
            if done {
                return;
            }
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
