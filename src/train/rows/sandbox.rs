//! Decodes uploaded Parquet files in a separate process with limits on memory and processor time. A
//! malicious file can only exhaust that process, and the error then blames the file.
//!
//! The process runs this binary with [`DECODE`] as the first argument. It writes one JSON line for
//! each pair or finding, and one at the end. If labels are asked for, a line with those of a row
//! comes before its first pair. With `--records` it writes the number of records first, then the
//! chosen records in place of pairs.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::columnar::{NumberedRecord, RecordChoice};
use super::labels::{RowLabels, labelled};
use super::reader::{DataError, MAX_LINE_BYTES, issue};
use super::{as_it_is, columnar, with_numbers};
use crate::domain::dataset::{DatasetFormat, IssueReason, PreferenceRow, RowIssue};

/// Subcommand that runs [`decode`], or with `--records` [`decode_records`].
pub const DECODE: &str = "decode-parquet";
/// Address space limit of the decoding process in bytes. Enough for decompressed pages of several
/// hundred MiB and their records.
pub const MEMORY: u64 = 1 << 30;
/// Base limit of processor time in seconds; a larger file gets one more second for each
/// [`BYTES_PER_SECOND`].
const BASE_SECONDS: u64 = 60;
const BYTES_PER_SECOND: u64 = 1 << 20;

/// Lock that lets only one file be decoded into pairs at a time, to bound the total memory.
/// [`SandboxedRecords`] does not take it.
static DECODE_LOCK: Mutex<()> = Mutex::new(());

/// Message of the decoding process, one JSON line each.
#[derive(Serialize, Deserialize)]
enum Line {
    /// Labels of the pairs that follow.
    Labels(RowLabels),
    Row(Box<PreferenceRow>),
    Issue(RowIssue),
    /// Number of records of the file.
    Total(u64),
    /// A record with its number.
    Record(u64, Map<String, Value>),
    /// The file cannot be read, or no further.
    Unusable(String),
    /// End of the file; all rows were sent.
    End,
}

/// Calls `row` with each pair of the file, or with the finding about a row that cannot be read. A
/// Parquet file is decoded by another process; only one file is decoded at a time.
///
/// # Errors
/// Fails if the file cannot be opened. For Parquet also if its footer or columns are not usable, or
/// the decoding process exceeds a limit or is killed. Returns errors of `row`.
pub fn for_each_row(
    path: &Path,
    format: DatasetFormat,
    mut row: impl FnMut(Result<PreferenceRow, RowIssue>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    if format == DatasetFormat::Jsonl {
        return super::read_rows(path, format)?.try_for_each(row);
    }
    for_each_decoded(path, &[], |_, pair| row(pair))
}

/// Calls `row` with each pair of a Parquet file, or with the finding about a row that cannot be
/// read, and with the labels of the row: its values in `columns`.
pub(super) fn for_each_decoded(
    path: &Path,
    columns: &[String],
    mut row: impl FnMut(&RowLabels, Result<PreferenceRow, RowIssue>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let _lock = DECODE_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let mut decoder = Decoder::start(path, columns, None)?;
    let mut labels = RowLabels::new();
    loop {
        match decoder.line(path)? {
            Line::Labels(next) => labels = next,
            Line::Row(r) => row(&labels, Ok(*r))?,
            Line::Issue(i) => row(&labels, Err(i))?,
            Line::Total(_) | Line::Record(..) => {}
            Line::Unusable(reason) => {
                return Err(DataError::BadFile {
                    path: path.to_owned(),
                    reason,
                });
            }
            Line::End => return Ok(()),
        }
    }
}

/// Records of a Parquet file that another process decodes.
pub struct SandboxedRecords {
    path: PathBuf,
    decoder: Decoder,
    total: u64,
    has_ended: bool,
}

impl SandboxedRecords {
    /// Starts the process. Unlike [`for_each_row`], it does not wait for other decoding processes
    /// to end.
    ///
    /// # Errors
    /// Fails if the file cannot be opened, or its footer or columns are not usable.
    pub fn open(path: &Path, choice: &RecordChoice) -> Result<Self, DataError> {
        let mut decoder = Decoder::start(path, &[], Some(choice))?;
        let bad = |reason: String| DataError::BadFile {
            path: path.to_owned(),
            reason,
        };
        let total = match decoder.line(path)? {
            Line::Total(total) => total,
            Line::Unusable(reason) => return Err(bad(reason)),
            _ => {
                return Err(bad(
                    "the decoding process sent no number of records".to_owned()
                ));
            }
        };
        Ok(SandboxedRecords {
            path: path.to_owned(),
            decoder,
            total,
            has_ended: false,
        })
    }

    /// Returns the number of records of the whole file.
    pub fn total(&self) -> u64 {
        self.total
    }
}

impl Iterator for SandboxedRecords {
    /// An error means that the file cannot be read further. It is the last item.
    type Item = Result<NumberedRecord, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_ended {
            return None;
        }
        let next = match self.decoder.line(&self.path) {
            Ok(Line::Record(row, fields)) => return Some(Ok((row, Ok(fields)))),
            Ok(Line::Issue(issue)) => return Some(Ok((issue.row, Err(issue)))),
            Ok(Line::End) => None,
            Ok(Line::Unusable(reason)) => Some(Err(DataError::BadFile {
                path: self.path.clone(),
                reason,
            })),
            Ok(Line::Labels(_) | Line::Row(_) | Line::Total(_)) => Some(Err(DataError::BadFile {
                path: self.path.clone(),
                reason: "the decoding process sent something else than a record".to_owned(),
            })),
            Err(e) => Some(Err(e)),
        };
        self.has_ended = true;
        next
    }
}

/// Main function of the decoding process for [`SandboxedRecords`]: writes the records of the file
/// at `path` that `choice`, a [`RecordChoice`] in JSON, selects.
///
/// # Errors
/// As [`decode`].
pub fn decode_records(path: &Path, choice: &str, out: impl Write) -> std::io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, out);
    match columnar::select_records(path, serde_json::from_str(choice)?) {
        Err(e) => {
            let DataError::BadFile { reason, .. } = e else {
                return Err(std::io::Error::other(e.to_string()));
            };
            write_line(&mut out, &Line::Unusable(reason))?;
        }
        Ok((total, records)) => {
            write_line(&mut out, &Line::Total(total))?;
            for record in records {
                let (row, record) = match record {
                    Ok(record) => record,
                    Err(reason) => {
                        write_line(&mut out, &Line::Unusable(reason))?;
                        return out.flush();
                    }
                };
                let line = record.map_or_else(Line::Issue, |fields| Line::Record(row, fields));
                if !write_line(&mut out, &line)? {
                    write_line(&mut out, &Line::Issue(too_long(row)))?;
                }
            }
            write_line(&mut out, &Line::End)?;
        }
    }
    out.flush()
}

fn too_long(row: u64) -> RowIssue {
    let message = format!(
        "the record has more than {} MiB: split it",
        MAX_LINE_BYTES >> 20
    );
    issue(row, "", IssueReason::InvalidType, message)
}

/// Returns the limit of processor seconds for a file of `file_bytes` bytes.
pub fn seconds(file_bytes: u64) -> u64 {
    BASE_SECONDS + file_bytes / BYTES_PER_SECOND
}

/// Main function of the decoding process, which has already set its own limits: writes the pairs of
/// every row of the file at `path` to `out`. If `columns` are named, a line with the row's values
/// in them comes before the first pair of each row.
///
/// # Errors
/// Fails if the reading process has closed `out`, or the file cannot be opened.
pub fn decode(path: &Path, columns: &[String], out: impl Write) -> std::io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, out);
    match columnar::decode(path, columns, as_it_is) {
        Err(e) => {
            let DataError::BadFile { reason, .. } = e else {
                return Err(std::io::Error::other(e.to_string()));
            };
            write_line(&mut out, &Line::Unusable(reason))?;
        }
        Ok(records) => {
            let mut labels_sent = 0;
            for (labels, row) in labelled(with_numbers(records), columns) {
                let (Ok(PreferenceRow { row: number, .. }) | Err(RowIssue { row: number, .. })) =
                    row;
                if !columns.is_empty() && labels_sent != number {
                    labels_sent = number;
                    let line = Line::Labels(RowLabels::clone(&labels));
                    if !write_line(&mut out, &line)? {
                        write_line(&mut out, &Line::Labels(RowLabels::new()))?;
                    }
                }
                let line = row.map_or_else(Line::Issue, |row| Line::Row(Box::new(row)));
                if !write_line(&mut out, &line)? {
                    write_line(&mut out, &Line::Issue(too_long(number)))?;
                }
            }
            write_line(&mut out, &Line::End)?;
        }
    }
    out.flush()
}

/// Writes a line. Returns false, without writing, if it is longer than the reader accepts.
fn write_line(out: &mut impl Write, line: &Line) -> std::io::Result<bool> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let fits = text.len() <= MAX_LINE_BYTES;
    if fits {
        out.write_all(&text)?;
    }
    Ok(fits)
}

/// Handle of the decoding process, which is killed on drop.
struct Decoder {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Decoder {
    fn start(
        path: &Path,
        columns: &[String],
        choice: Option<&RecordChoice>,
    ) -> Result<Self, DataError> {
        let failed = |source| DataError::Io {
            path: path.to_owned(),
            source,
        };
        // Opened here first, because a file that cannot be opened is not a damaged file.
        std::fs::File::open(path).map_err(failed)?;
        // This path stays valid if the binary's file is replaced.
        let mut command = Command::new("/proc/self/exe");
        command.arg(DECODE);
        if let Some(choice) = choice {
            let json = serde_json::to_string(choice).map_err(|e| failed(e.into()))?;
            command.arg("--records").arg(json);
        }
        command
            .arg("--")
            .arg(path)
            .args(columns)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().map_err(failed)?;
        match child.stdout.take() {
            Some(out) => Ok(Self {
                child,
                lines: BufReader::with_capacity(1 << 16, out),
            }),
            None => Err(failed(std::io::Error::other(
                "the decoding process has no output",
            ))),
        }
    }

    fn line(&mut self, path: &Path) -> Result<Line, DataError> {
        let failed = |source| DataError::Io {
            path: path.to_owned(),
            source,
        };
        let mut line = Vec::new();
        (&mut self.lines)
            .take(MAX_LINE_BYTES as u64)
            .read_until(b'\n', &mut line)
            .map_err(failed)?;
        if line.ends_with(b"\n") {
            return serde_json::from_slice(&line).map_err(|e| failed(e.into()));
        }
        let status = self.child.wait().map_err(failed)?;
        // Its own limits end it with other signals: a failed allocation aborts, and SIGXCPU comes
        // before SIGKILL.
        if matches!(status.signal(), Some(libc::SIGKILL)) {
            return Err(DataError::Interrupted {
                path: path.to_owned(),
            });
        }
        let reason = format!(
            "decoding needs more than {} MiB of memory, or more time than a file of this size may \
             take, or fails ({status}): write the file again with smaller row groups, or use JSONL",
            MEMORY >> 20
        );
        Err(DataError::BadFile {
            path: path.to_owned(),
            reason,
        })
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
