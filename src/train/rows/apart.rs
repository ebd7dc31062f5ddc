//! A stranger's file, decoded by a process of its own that may use only so much memory and processor time: what its claims cost is lost with
//! that process, and the file is told to be at fault. The process is this binary, told so by its first argument ([`DECODE`]); it writes a JSON
//! line for each record.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{DataError, RowReader, columnar, issue, numbered};
use crate::domain::dataset::{DatasetFormat, IssueReason, RowIssue};

/// The subcommand that [`decode`] answers.
pub const DECODE: &str = "decode-parquet";
/// Address space that decoding may use, in bytes: pages of some hundred MiB, decompressed, with their records.
pub const MEMORY: u64 = 1 << 30;
/// Processor seconds for any file, and bytes for each further one.
const SECONDS: u64 = 60;
const BYTES_PER_SECOND: u64 = 1 << 20;
/// A record that is longer as JSON ends the reading: three texts, each within [`super::MAX_LINE_BYTES`].
const MAX_RECORD_BYTES: u64 = 4 * super::MAX_LINE_BYTES as u64;

/// What the decoding process says, a line each: once what it makes of the file, then its records.
#[derive(Serialize, Deserialize)]
enum Line {
    Readable,
    Unusable(String),
    Record(Map<String, Value>),
    Issue(RowIssue),
}

/// Opens a file as [`super::read_rows`] does; a Parquet file is decoded by another process.
///
/// # Errors
/// When it cannot be opened or, for Parquet, its footer or columns are not usable, or cost more than they may.
pub fn read_rows(path: &Path, format: DatasetFormat) -> Result<RowReader, DataError> {
    match format {
        DatasetFormat::Jsonl => super::read_rows(path, format),
        DatasetFormat::Parquet => {
            let mut records = Records::start(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
            let bad = |reason| DataError::BadFile { path: path.to_owned(), reason };
            match records.line() {
                Ok(Some(Line::Readable)) => Ok(numbered(records)),
                Ok(Some(Line::Unusable(reason))) => Err(bad(reason)),
                Ok(_) => Err(bad("the process that decodes Parquet is not this program".into())),
                Err(reason) => Err(bad(reason)),
            }
        }
    }
}

/// Processor seconds that decoding a file of so many bytes may take.
pub fn seconds(file_bytes: u64) -> u64 {
    SECONDS + file_bytes / BYTES_PER_SECOND
}

/// The decoding process's work, after it has limited itself: every record of the file at `path` onto `out`.
///
/// # Errors
/// When nobody reads them any more.
pub fn decode(path: &Path, out: impl Write) -> std::io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, out);
    let mut say = |line: &Line| {
        serde_json::to_writer(&mut out, line)?;
        out.write_all(b"\n")
    };
    match columnar::decode(path) {
        Err(DataError::BadFile { reason, .. }) => say(&Line::Unusable(reason))?,
        Err(e) => say(&Line::Unusable(e.to_string()))?,
        Ok(records) => {
            say(&Line::Readable)?;
            for record in records {
                say(&record.map_or_else(Line::Issue, Line::Record))?;
            }
        }
    }
    out.flush()
}

/// The records that the decoding process sends; it ends with them.
struct Records {
    child: Child,
    lines: Option<BufReader<ChildStdout>>,
    row: u64,
}

impl Records {
    fn start(path: &Path) -> std::io::Result<Self> {
        // The name stays good when the file of the binary is replaced.
        let mut child = Command::new("/proc/self/exe")
            .arg(DECODE)
            .arg(path)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let lines = child.stdout.take().map(|out| BufReader::with_capacity(1 << 16, out));
        Ok(Self { child, lines, row: 0 })
    }

    /// The next line, or `None` after the last.
    fn line(&mut self) -> Result<Option<Line>, String> {
        let Some(lines) = &mut self.lines else { return Ok(None) };
        let mut line = Vec::new();
        let read = lines.take(MAX_RECORD_BYTES).read_until(b'\n', &mut line);
        if read.is_ok() && line.ends_with(b"\n") {
            return serde_json::from_slice(&line).map(Some).map_err(|e| format!("the decoded record cannot be read: {e}"));
        }
        self.lines = None;
        match read {
            Ok(n) if n as u64 == MAX_RECORD_BYTES => return Err(format!("the record is longer than {} MiB", MAX_RECORD_BYTES >> 20)),
            Ok(_) => {}
            Err(e) => return Err(format!("the decoded records cannot be read: {e}")),
        }
        match self.child.wait() {
            Ok(status) if status.success() && line.is_empty() => Ok(None),
            Ok(status) => Err(format!(
                "decoding needs more than {} MiB of memory, or more time than a file of this size may take, or fails ({status}): write the \
                 file anew with smaller row groups, or use JSONL",
                MEMORY >> 20
            )),
            Err(e) => Err(format!("the process that decodes Parquet cannot be waited for: {e}")),
        }
    }
}

impl Iterator for Records {
    type Item = Result<Map<String, Value>, RowIssue>;

    fn next(&mut self) -> Option<Self::Item> {
        self.row += 1;
        match self.line().transpose()? {
            Ok(Line::Record(fields)) => Some(Ok(fields)),
            Ok(Line::Issue(issue)) => Some(Err(issue)),
            Ok(_) => None,
            Err(reason) => {
                self.lines = None;
                Some(Err(issue(self.row, "", IssueReason::InvalidType, reason)))
            }
        }
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
