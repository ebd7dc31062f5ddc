//! Preference rows from JSONL and Parquet files, streamed.

pub mod apart;
mod columnar;
mod jsonl;
mod reader;
mod row;
mod shapes;

use std::path::Path;

use serde_json::{Map, Value};

pub use self::reader::{DataError, MAX_LINE_BYTES, RowReader};
use crate::domain::dataset::{DatasetFormat, RowIssue};

/// Returns the format of a file: Parquet if it starts with `PAR1`, else JSONL.
pub fn detect_format(first_bytes: &[u8]) -> DatasetFormat {
    if first_bytes.starts_with(b"PAR1") {
        DatasetFormat::Parquet
    } else {
        DatasetFormat::Jsonl
    }
}

/// Reads a trusted file. Use [`apart::for_each_row`] for uploaded Parquet files.
///
/// # Errors
/// Fails if the file cannot be opened or, for Parquet, its footer or columns are not usable.
pub fn read_rows(path: &Path, format: DatasetFormat) -> Result<RowReader, DataError> {
    match format {
        DatasetFormat::Jsonl => jsonl::read(path),
        DatasetFormat::Parquet => Ok(numbered(columnar::decode(path)?)),
    }
}

/// Turns decoded records into numbered pairs.
fn numbered(
    records: impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + 'static,
) -> RowReader {
    Box::new(
        records
            .enumerate()
            .map(|(i, fields)| Ok((i as u64 + 1, fields?)))
            .flat_map(shapes::pairs),
    )
}

#[cfg(test)]
mod tests;
