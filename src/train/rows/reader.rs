//! What the readers of all formats have in common: what comes of a file, and of a row.

use std::path::PathBuf;

use crate::domain::dataset::{IssueReason, PreferenceRow, RowIssue};

/// A line longer than this is refused, not read into memory.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// Why a file could not be read at all. What is wrong with a single row is a [`RowIssue`].
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its answer.
        source: std::io::Error,
    },
    /// The process that decoded the file was killed, not by limits of its own.
    #[error("{}: the process that decodes it was killed, perhaps because the machine has no memory left: retry later", path.display())]
    Interrupted {
        /// The file.
        path: PathBuf,
    },
    /// The rows hold more text than a job may have in memory.
    #[error(
        "the rows hold more than {limit} bytes of text: split the dataset, or raise max_dataset_text_bytes"
    )]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// The file is not what its format says.
    #[error("{}: {reason}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
}

/// Pairs in the order of their rows in the file: a row makes one, or one for each of several
/// rejected answers, all with its number. A bad row does not end the iteration.
pub type RowReader = Box<dyn Iterator<Item = Result<PreferenceRow, RowIssue>> + Send>;

/// A finding about a row that has no id yet.
pub(super) fn issue(
    row: u64,
    field: &str,
    reason: IssueReason,
    message: impl Into<String>,
) -> RowIssue {
    RowIssue { row, id: None, field: field.to_owned(), reason, message: message.into() }
}
