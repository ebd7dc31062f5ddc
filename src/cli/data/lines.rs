//! Lines of a JSONL file, unchanged and of bounded length.

use std::io::{BufRead, BufReader, Read};

use super::row::{DataRow, DataRows};
use crate::domain::dataset::IssueReason;
use crate::train::rows::MAX_LINE_BYTES;

pub(super) fn read(reader: impl Read + Send + 'static) -> DataRows {
    Box::new(LineReader {
        reader: BufReader::with_capacity(1 << 18, reader),
        is_first: true,
        has_ended: false,
    })
}

struct LineReader<R> {
    reader: BufReader<R>,
    is_first: bool,
    has_ended: bool,
}

impl<R: Read> Iterator for LineReader<R> {
    type Item = Result<DataRow, String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_ended {
            return None;
        }
        let line = match self.line() {
            Ok(line) => line?,
            Err(e) => {
                self.has_ended = true;
                return Some(Err(format!("cannot be read further: {e}")));
            }
        };
        let is_first = std::mem::take(&mut self.is_first);
        Some(Ok(match line {
            Some(mut line) => {
                if is_first && line.starts_with(b"\xef\xbb\xbf") {
                    line.drain(..3);
                }
                DataRow::Line(line)
            }
            None => DataRow::bad(
                "",
                IssueReason::InvalidJson,
                format!(
                    "the line is longer than {} MiB: split the file into rows, one JSON object a \
                     line",
                    MAX_LINE_BYTES >> 20
                ),
            ),
        }))
    }
}

impl<R: Read> LineReader<R> {
    /// Returns the next line, `Some(None)` for one that is too long, or `None` at the end.
    fn line(&mut self) -> std::io::Result<Option<Option<Vec<u8>>>> {
        let mut line = Vec::new();
        let read = (&mut self.reader)
            .take(MAX_LINE_BYTES as u64 + 1)
            .read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(None);
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if line.len() > MAX_LINE_BYTES {
            self.reader.skip_until(b'\n')?;
            return Ok(Some(None));
        }
        Ok(Some(Some(line)))
    }
}
