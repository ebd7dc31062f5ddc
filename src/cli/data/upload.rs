//! Uploads rows of input that the server cannot read as it is, as JSONL that is made while it is
//! sent, and describes uploaded datasets.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::mpsc;

use super::columns::naming;
use super::row::DataRow;
use super::stream::{RowStream, SourceNames};
use crate::cli::failure::Failure;
use crate::domain::dataset::{IssueReason, RowShape};
use crate::domain::logged::is_logged_column;
use crate::rpc::client::{Client, ClientError, UploadError};
use crate::rpc::pb;

/// Size of a piece of the JSONL text in bytes, and maximum number of pieces that wait to be sent.
const PIECE_BYTES: usize = 1 << 20;
const MAX_PIECES: usize = 2;

/// Maximum number of rows that a finding names.
const MAX_NAMED_ROWS: usize = 8;

/// Rows that the client could not read. The server gets a blank line in place of each.
#[derive(Clone, Debug, Default)]
pub(super) struct LeftOut {
    pub rows: u64,
    /// Description of the first one.
    pub first: String,
    /// Number of rows that are sent.
    sent: u64,
}

impl LeftOut {
    /// Checks that there is a row to send.
    ///
    /// # Errors
    /// Returns a failure that begins with `the file: `, as those of the server do.
    fn check(&self) -> Result<(), Failure> {
        let reason = match (self.sent, self.rows) {
            (0, 0) => "it holds no row".to_owned(),
            (0, 1) => format!("its only row cannot be read: {}", self.first),
            (0, n) => format!(
                "none of its {n} rows can be read, the first one: {}",
                self.first
            ),
            _ => return Ok(()),
        };
        Err(Failure::Usage(format!("the file: {reason}")))
    }

    /// Describes the rows, if there are any.
    fn warning(&self) -> Option<String> {
        match self.rows {
            0 => None,
            1 => Some(format!(
                "1 row cannot be read and was left out: {}",
                self.first
            )),
            n => Some(format!(
                "{n} rows cannot be read and were left out, the first one: {}",
                self.first
            )),
        }
    }
}

/// The reason why a job would be refused because of its rows.
pub(in crate::cli) struct RowRefusal {
    /// Number of bad rows and of all rows.
    pub rows: String,
    pub remedy: &'static str,
}

/// An uploaded dataset, or a stored one with the same content.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Uploaded {
    pub dataset: pb::Dataset,
    left_out: LeftOut,
    names: SourceNames,
}

impl Uploaded {
    /// Returns a dataset that has every row of the files.
    pub(super) fn complete(dataset: pb::Dataset, names: SourceNames) -> Self {
        Uploaded {
            dataset,
            left_out: LeftOut::default(),
            names,
        }
    }

    fn report(&self) -> pb::ValidationReport {
        self.dataset.report.clone().unwrap_or_default()
    }

    /// Returns warnings about rows that were left out, and about rows without a prompt.
    pub(in crate::cli) fn warnings(&self) -> Vec<String> {
        let left_out = self.left_out.warning().into_iter();
        left_out.chain(self.prompt_hint()).collect()
    }

    /// Names the flag for the column of the prompt if rows have no prompt, but perhaps such a
    /// column under another name.
    fn prompt_hint(&self) -> Option<String> {
        let report = self.report();
        let has = |reason: IssueReason, is_field: fn(&str) -> bool| {
            let mut issues = report.issues.iter();
            issues.any(|issue| issue.reason == reason.name() && is_field(&issue.field))
        };
        let is_split = report
            .shapes
            .contains_key(RowShape::ImplicitPromptText.name());
        let lacks_prompt = has(IssueReason::DifferentPrompts, |field| field == "prompt")
            || (is_split && has(IssueReason::IgnoredField, |field| !is_logged_column(field)));
        (lacks_prompt && self.names.column("prompt") == "prompt")
            .then(|| format!("rows have no prompt: {}", naming("prompt")))
    }

    /// Describes at most `limit` findings of those for which `is_of_use` returns true. Findings of
    /// several rows that say the same are one, which names the first rows.
    pub(in crate::cli) fn findings(
        &self,
        limit: usize,
        is_of_use: impl Fn(&pb::RowIssue) -> bool,
    ) -> Vec<String> {
        let report = self.report();
        let mut different: Vec<(&pb::RowIssue, Vec<u64>)> = Vec::new();
        for issue in report.issues.iter().filter(|issue| is_of_use(issue)) {
            let is_same = |(other, _): &(&pb::RowIssue, Vec<u64>)| {
                (&other.field, &other.reason, &other.message)
                    == (&issue.field, &issue.reason, &issue.message)
            };
            match different.iter().position(is_same) {
                Some(i) => different[i].1.push(issue.row),
                None if different.len() < limit => different.push((issue, vec![issue.row])),
                None => {}
            }
        }
        different
            .into_iter()
            .map(|(issue, rows)| self.finding(issue, &rows))
            .collect()
    }

    /// Describes a finding of some rows, with their places and the column's name in the files.
    fn finding(&self, issue: &pb::RowIssue, rows: &[u64]) -> String {
        let named = rows.iter().take(MAX_NAMED_ROWS);
        let mut places: Vec<String> = named.map(|row| self.names.place(*row)).collect();
        match rows.len().saturating_sub(MAX_NAMED_ROWS) {
            0 => {}
            more => places.push(format!("{more} more")),
        }
        // The place in one of several files has a comma.
        let places = places.join(if self.names.has_several_files() {
            "; "
        } else {
            ", "
        });
        let field = self.names.column(&issue.field);
        let message = self.names.message(&issue.field, &issue.message);
        let space = if field.is_empty() { "" } else { " " };
        let severity = match issue.severity() {
            pb::IssueSeverity::Warning => "warning: ",
            _ => "",
        };
        format!(
            "{places}: {severity}{field}{space}{}: {message}",
            issue.reason
        )
    }

    /// Describes the first error.
    pub(in crate::cli) fn first_error(&self) -> Option<String> {
        if self.left_out.rows > 0 {
            return Some(self.left_out.first.clone());
        }
        let report = self.report();
        let is_error = |i: &&pb::RowIssue| i.severity() == pb::IssueSeverity::Error;
        let first = report.issues.iter().find(is_error);
        first.map(|issue| self.finding(issue, &[issue.row]))
    }

    /// Returns the reason why a job that takes every row would be refused.
    pub(in crate::cli) fn refusal(&self) -> Option<RowRefusal> {
        let report = self.report();
        let bad = report.rows - report.valid_rows + self.left_out.rows;
        let is_too_long = report
            .counts
            .contains_key(IssueReason::PromptFillsMaxLength.name());
        (bad > 0).then(|| RowRefusal {
            rows: format!("{bad} of the {} rows", report.rows + self.left_out.rows),
            remedy: match (is_too_long, report.valid_rows > 0) {
                (true, true) => {
                    "give them more room with --max-length, correct them, or leave them out with \
                     --skip-bad-rows"
                }
                (true, false) => "give them more room with --max-length, or correct them",
                (false, true) => "correct them, or leave them out with --skip-bad-rows",
                (false, false) => "correct them",
            },
        })
    }
}

/// Converts the rows to JSONL and uploads them. `sent` is called with the number of bytes queued so
/// far.
///
/// # Errors
/// Returns a failure if a file cannot be read to its end or no row can be read, in which cases the
/// server stores nothing, or if the server refuses the upload.
pub(super) async fn upload(
    client: &Client,
    rows: RowStream,
    metadata: pb::UploadMetadata,
    sent: impl FnMut(u64),
) -> Result<Uploaded, Failure> {
    let (sender, receiver) = mpsc::channel(MAX_PIECES);
    let converted = tokio::task::spawn_blocking(move || convert(rows, &sender));
    let pipe = Pipe {
        pieces: receiver,
        rest: io::Cursor::new(Vec::new()),
        has_ended: false,
    };
    let answer = client.upload_rows(pipe, metadata, sent).await;
    let converted = converted
        .await
        .map_err(|e| Failure::Failed(format!("the rows cannot be read: {e}")))?;
    match answer {
        Ok(dataset) => {
            let (names, left_out) = converted?;
            Ok(Uploaded {
                dataset,
                left_out,
                names,
            })
        }
        Err(UploadError::Read(e)) => {
            converted?;
            Err(Failure::Failed(format!("the rows cannot be read: {e}")))
        }
        Err(UploadError::Call(status)) => {
            let refused = Failure::from(ClientError::Refused(status));
            // Rows that could not be read may be the reason.
            let left_out = converted.ok().and_then(|(_, rows)| rows.warning());
            Err(match left_out {
                Some(warning) => refused.with_context(&warning),
                None => refused,
            })
        }
    }
}

/// Part of the JSONL text, or its end. Without the end, the text counts as incomplete.
enum JsonlPiece {
    Text(Vec<u8>),
    End,
}

fn convert(
    rows: RowStream,
    sender: &mpsc::Sender<JsonlPiece>,
) -> Result<(SourceNames, LeftOut), Failure> {
    // A closed channel means that the server has refused the upload.
    let converted = to_jsonl(rows, |text| {
        sender.blocking_send(JsonlPiece::Text(text)).is_ok()
    })?;
    if !sender.is_closed() {
        converted.1.check()?;
    }
    let _ = sender.blocking_send(JsonlPiece::End);
    Ok(converted)
}

/// Passes the rows as JSONL to `write`, in pieces, until it returns false. A row that cannot be
/// read becomes a blank line, which the server counts as a line but not as a row, so that later
/// rows have their numbers.
pub(super) fn to_jsonl(
    mut rows: RowStream,
    mut write: impl FnMut(Vec<u8>) -> bool,
) -> Result<(SourceNames, LeftOut), Failure> {
    let mut left_out = LeftOut::default();
    let mut text = Vec::with_capacity(PIECE_BYTES);
    while let Some((number, row)) = rows.next().transpose()? {
        match row {
            DataRow::Line(line) => {
                left_out.sent += u64::from(!line.iter().all(u8::is_ascii_whitespace));
                text.extend(line);
            }
            DataRow::Fields(fields) => {
                left_out.sent += 1;
                serde_json::to_writer(&mut text, &fields)
                    .map_err(|e| Failure::Failed(e.to_string()))?;
            }
            DataRow::Bad(problem) => {
                if left_out.rows == 0 {
                    left_out.first = rows.names().describe(number, &problem);
                }
                left_out.rows += 1;
            }
        }
        text.push(b'\n');
        if text.len() >= PIECE_BYTES {
            let full = std::mem::replace(&mut text, Vec::with_capacity(PIECE_BYTES));
            if !write(full) {
                return Ok((rows.into_names(), left_out));
            }
        }
    }
    write(text);
    Ok((rows.into_names(), left_out))
}

/// Reads the pieces as one text.
struct Pipe {
    pieces: mpsc::Receiver<JsonlPiece>,
    rest: io::Cursor<Vec<u8>>,
    has_ended: bool,
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if self.has_ended {
                return Poll::Ready(Ok(()));
            }
            let before = buffer.filled().len();
            match Pin::new(&mut self.rest).poll_read(context, buffer) {
                Poll::Ready(Ok(())) if buffer.filled().len() == before => {}
                other => return other,
            }
            match self.pieces.poll_recv(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(JsonlPiece::Text(text))) => self.rest = io::Cursor::new(text),
                Poll::Ready(Some(JsonlPiece::End)) => self.has_ended = true,
                Poll::Ready(None) => {
                    let reason = "a file cannot be read to its end";
                    return Poll::Ready(Err(io::Error::other(reason)));
                }
            }
        }
    }
}
