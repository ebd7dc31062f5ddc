//! Preference rows from JSONL and Parquet files, streamed.

pub mod apart;
mod columnar;
mod json;
mod shapes;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::domain::dataset::{DatasetFormat, IssueReason, PreferenceRow, RowIssue};

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
    #[error("the rows hold more than {limit} bytes of text: split the dataset, or raise max_dataset_text_bytes")]
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

/// Pairs in the order of their rows in the file: a row makes one, or one for each of several rejected answers, all with its number.
/// A bad row does not end the iteration.
pub type RowReader = Box<dyn Iterator<Item = Result<PreferenceRow, RowIssue>> + Send>;

/// Parquet starts with `PAR1`; anything else is taken for JSONL.
pub fn detect_format(first_bytes: &[u8]) -> DatasetFormat {
    if first_bytes.starts_with(b"PAR1") { DatasetFormat::Parquet } else { DatasetFormat::Jsonl }
}

/// Opens a file of one's own; a stranger's Parquet file is for [`apart::for_each_row`].
///
/// # Errors
/// When it cannot be opened or, for Parquet, its footer or columns are not usable.
pub fn read_rows(path: &Path, format: DatasetFormat) -> Result<RowReader, DataError> {
    match format {
        DatasetFormat::Jsonl => json::read(path),
        DatasetFormat::Parquet => Ok(numbered(columnar::decode(path)?)),
    }
}

/// The rows of records that were decoded.
fn numbered(records: impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + 'static) -> RowReader {
    Box::new(records.enumerate().map(|(i, fields)| Ok((i as u64 + 1, fields?))).flat_map(shapes::pairs))
}

/// A finding about a row that has no id yet.
fn issue(row: u64, field: &str, reason: IssueReason, message: impl Into<String>) -> RowIssue {
    RowIssue { row, id: None, field: field.to_owned(), reason, message: message.into() }
}

#[cfg(test)]
mod tests;
