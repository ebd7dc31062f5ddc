//! Types shared by the readers of all formats.

use std::path::PathBuf;

use crate::domain::dataset::{IssueReason, PreferenceRow, RowIssue};

/// Maximum length of a line in bytes, without its line break. Longer lines are refused, and
/// the rest of them is not read into memory.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// Error that prevents reading a file. Problems of a single row are [`RowIssue`]s.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file operation failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The decoding process was killed from outside, not because of its own limits.
    #[error(
        "{}: the process that decodes it was killed, perhaps because the machine has no memory \
         left: retry later",
        path.display()
    )]
    Interrupted {
        /// Path of the file.
        path: PathBuf,
    },
    /// The rows have more text than a job may hold in memory.
    #[error(
        "the rows hold more than {limit} bytes of text: split the dataset, or raise \
         max_dataset_text_bytes"
    )]
    TooLarge {
        /// Maximum in bytes.
        limit: u64,
    },
    /// The file does not have a valid format.
    #[error("{}: {reason}", path.display())]
    BadFile {
        /// Path of the file.
        path: PathBuf,
        /// Explanation with the remedy.
        reason: String,
    },
}

/// Iterator over the pairs of a file in row order. A row with several answers has one pair for each
/// chosen with each rejected one; all carry the row's number. A bad row does not end the iteration.
/// If the file cannot be read further, that finding is the last item. If a Parquet record cannot be
/// decoded, there is a finding for it and for each later record of its row group.
pub type RowReader = Box<dyn Iterator<Item = Result<PreferenceRow, RowIssue>> + Send>;

/// Returns a finding about a row without an id.
pub(super) fn issue(
    row: u64,
    field: &str,
    reason: IssueReason,
    message: impl Into<String>,
) -> RowIssue {
    RowIssue {
        row,
        id: None,
        field: field.to_owned(),
        reason,
        message: message.into(),
        of_model: false,
    }
}
