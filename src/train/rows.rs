//! Preference rows from JSONL and Parquet files, streamed.

mod columnar;
mod jsonl;
pub mod labelled;
mod labels;
mod logged;
pub mod names;
mod reader;
mod row;
pub mod sandbox;
mod shapes;

use std::path::Path;

use serde_json::{Map, Value};

pub use self::columnar::RecordChoice;
pub use self::reader::{DataError, MAX_LINE_BYTES, RowReader};
use crate::domain::dataset::{DatasetFormat, PreferenceRow, RowIssue};

/// Returns the format of a file: Parquet if it starts with `PAR1`, else JSONL.
pub fn detect_format(first_bytes: &[u8]) -> DatasetFormat {
    if first_bytes.starts_with(b"PAR1") {
        DatasetFormat::Parquet
    } else {
        DatasetFormat::Jsonl
    }
}

/// Reads a trusted file. Use [`sandbox::for_each_row`] for uploaded Parquet files.
///
/// # Errors
/// Fails if the file cannot be opened or, for Parquet, its footer or columns are not usable.
pub fn read_rows(path: &Path, format: DatasetFormat) -> Result<RowReader, DataError> {
    match format {
        DatasetFormat::Jsonl => jsonl::read(path),
        DatasetFormat::Parquet => Ok(numbered(columnar::decode(path, &[], as_it_is)?)),
    }
}

/// Returns a column's name unchanged.
fn as_it_is(column: &str) -> Option<String> {
    Some(column.to_owned())
}

/// Reads the records of a trusted Parquet file as JSON objects. `rename` returns the new name of a
/// column, or `None` for a column that is left out.
///
/// # Errors
/// Fails if the file cannot be opened, or its footer or its renamed columns are not usable.
pub fn parquet_records<R: Fn(&str) -> Option<String> + Send + 'static>(
    path: &Path,
    rename: R,
) -> Result<impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + use<R>, DataError> {
    columnar::decode(path, &[], rename)
}

/// Reads the records of a trusted Parquet file as [`parquet_records`] does, with the values of the
/// columns that pairs do not use.
///
/// # Errors
/// As [`parquet_records`].
pub fn parquet_records_with_others<R: Fn(&str) -> Option<String> + Send + 'static>(
    path: &Path,
    rename: R,
) -> Result<impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + use<R>, DataError> {
    columnar::decode_with_others(path, rename)
}

/// Reads all columns of the records of a trusted Parquet file, as they are, except that nulls
/// inside `prompt` and `messages` are removed. `rename` is as for [`parquet_records`].
///
/// # Errors
/// Fails if the file cannot be opened, or its footer is not usable.
pub fn whole_parquet_records<R: Fn(&str) -> Option<String> + Send + 'static>(
    path: &Path,
    rename: R,
) -> Result<impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + use<R>, DataError> {
    columnar::decode_whole(path, rename)
}

/// Returns the pairs of one line of a JSONL file, or the finding that it cannot be read.
pub fn pairs_of_line(
    row: u64,
    line: &[u8],
) -> impl Iterator<Item = Result<PreferenceRow, RowIssue>> + Send + use<> {
    shapes::pairs(jsonl::parse(row, line))
}

/// Returns the pairs of one record.
pub fn pairs_of_record(
    row: u64,
    fields: Map<String, Value>,
) -> impl Iterator<Item = Result<PreferenceRow, RowIssue>> + Send {
    shapes::pairs(Ok((row, fields)))
}

/// Turns decoded records into numbered pairs.
fn numbered(
    records: impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + 'static,
) -> RowReader {
    Box::new(with_numbers(records).flat_map(shapes::pairs))
}

fn with_numbers(
    records: impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + 'static,
) -> impl Iterator<Item = shapes::Record> + Send + 'static {
    records
        .enumerate()
        .map(|(i, fields)| Ok((i as u64 + 1, fields?)))
}

#[cfg(test)]
mod tests;
