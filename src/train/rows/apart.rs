//! A stranger's file, decoded by a process of its own that may use only so much memory and
//! processor time: what its claims cost is lost with that process, and the file is told to be at
//! fault. The process is this binary, told so by its first argument ([`DECODE`]); it writes a JSON
//! line for each row, and one at the end.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::reader::{DataError, MAX_LINE_BYTES, issue};
use super::{columnar, numbered};
use crate::domain::dataset::{DatasetFormat, IssueReason, PreferenceRow, RowIssue};

/// The subcommand that [`decode`] answers.
pub const DECODE: &str = "decode-parquet";
/// Address space that decoding may use, in bytes: pages of some hundred MiB, decompressed, with
/// their records.
pub const MEMORY: u64 = 1 << 30;
/// Processor seconds for any file, and bytes for each further one.
const SECONDS: u64 = 60;
const BYTES_PER_SECOND: u64 = 1 << 20;

/// Files are decoded one after another, so that all together need no more than one.
static DECODING: Mutex<()> = Mutex::new(());

/// What the decoding process says, a line each.
#[derive(Serialize, Deserialize)]
enum Line {
    Row(PreferenceRow),
    Issue(RowIssue),
    /// The file cannot be read at all.
    Unusable(String),
    /// That was every row.
    End,
}

/// Hands each row, or what is wrong with it, to `row`. A Parquet file is decoded by another
/// process, when no other file is.
///
/// # Errors
/// When the file cannot be opened or, for Parquet, its footer or columns are not usable, or it
/// costs more than it may, wherever in the file; and what `row` returns.
pub fn for_each_row(
    path: &Path,
    format: DatasetFormat,
    mut row: impl FnMut(Result<PreferenceRow, RowIssue>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    if format == DatasetFormat::Jsonl {
        return super::read_rows(path, format)?.try_for_each(row);
    }
    let _alone = DECODING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut decoder = Decoder::start(path)?;
    loop {
        match decoder.line(path)? {
            Line::Row(r) => row(Ok(r))?,
            Line::Issue(i) => row(Err(i))?,
            Line::Unusable(reason) => {
                return Err(DataError::BadFile { path: path.to_owned(), reason });
            }
            Line::End => return Ok(()),
        }
    }
}

/// Processor seconds that decoding a file of so many bytes may take.
pub fn seconds(file_bytes: u64) -> u64 {
    SECONDS + file_bytes / BYTES_PER_SECOND
}

/// The decoding process's work, after it has limited itself: every row of the file at `path` onto
/// `out`.
///
/// # Errors
/// When nobody reads them any more.
pub fn decode(path: &Path, out: impl Write) -> std::io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, out);
    match columnar::decode(path) {
        Err(e) => {
            let DataError::BadFile { reason, .. } = e else {
                return Err(std::io::Error::other(e.to_string()));
            };
            say(&mut out, &Line::Unusable(reason))?;
        }
        Ok(records) => {
            for row in numbered(records) {
                let (Ok(PreferenceRow { row: number, .. }) | Err(RowIssue { row: number, .. })) =
                    row;
                let line = row.map_or_else(Line::Issue, Line::Row);
                if !say(&mut out, &line)? {
                    let message =
                        format!("the record has more than {} MiB: split it", MAX_LINE_BYTES >> 20);
                    say(
                        &mut out,
                        &Line::Issue(issue(number, "", IssueReason::InvalidType, message)),
                    )?;
                }
            }
            say(&mut out, &Line::End)?;
        }
    }
    out.flush()
}

/// Writes a line, unless it is too long for whoever reads it.
fn say(out: &mut impl Write, line: &Line) -> std::io::Result<bool> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let fits = text.len() <= MAX_LINE_BYTES;
    if fits {
        out.write_all(&text)?;
    }
    Ok(fits)
}

/// The decoding process; it ends with this.
struct Decoder {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Decoder {
    fn start(path: &Path) -> Result<Self, DataError> {
        let failed = |source| DataError::Io { path: path.to_owned(), source };
        // What cannot be opened is no fault of the file.
        std::fs::File::open(path).map_err(failed)?;
        // The name stays good when the file of the binary is replaced.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg(DECODE)
            .arg(path)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().map_err(failed)?;
        match child.stdout.take() {
            Some(out) => Ok(Self { child, lines: BufReader::with_capacity(1 << 16, out) }),
            None => Err(failed(std::io::Error::other("the decoding process has no output"))),
        }
    }

    fn line(&mut self, path: &Path) -> Result<Line, DataError> {
        let failed = |source| DataError::Io { path: path.to_owned(), source };
        let mut line = Vec::new();
        (&mut self.lines)
            .take(MAX_LINE_BYTES as u64)
            .read_until(b'\n', &mut line)
            .map_err(failed)?;
        if line.ends_with(b"\n") {
            return serde_json::from_slice(&line).map_err(|e| failed(e.into()));
        }
        let status = self.child.wait().map_err(failed)?;
        // Its own limits end it otherwise: what wants memory aborts, and SIGXCPU comes before
        // SIGKILL.
        if matches!(status.signal(), Some(libc::SIGKILL)) {
            return Err(DataError::Interrupted { path: path.to_owned() });
        }
        let reason = format!(
            "decoding needs more than {} MiB of memory, or more time than a file of this size may take, or fails ({status}): write the file anew with \
             smaller row groups, or use JSONL",
            MEMORY >> 20
        );
        Err(DataError::BadFile { path: path.to_owned(), reason })
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
