//! Rows with their own columns, for commands that write them again.

use serde_json::{Map, Value};

use super::row::DataRow;
use super::stream::RowStream;
use crate::cli::failure::Failure;
use crate::domain::dataset::{PreferenceRow, RowIssue};
use crate::train::rows::{pairs_of_line, pairs_of_record};

/// Column of the text of a line that is no JSON object.
const LINE_COLUMN: &str = "line";

/// A row of pairs with its own columns.
#[derive(Clone, Debug)]
pub(in crate::cli) struct DataRecord {
    /// Number of the row, from 1 and through all files.
    pub row: u64,
    /// The row's columns. A line that is no JSON object has its text in the column `line`; other
    /// rows that cannot be read have no column.
    pub columns: Map<String, Value>,
    /// The row's pairs, or the first finding because of which it cannot be used.
    pub pairs: Result<Vec<PreferenceRow>, RowIssue>,
}

/// A row with the values of all columns, which need not be those of pairs.
pub(in crate::cli) struct WholeRecord {
    /// Number of the row, from 1 and through all files.
    pub row: u64,
    /// The row's place for messages: `row 7`, or `b.csv, row 3` if there are several files.
    pub place: String,
    /// The columns, or the reason why the row cannot be read.
    pub columns: Result<Map<String, Value>, String>,
}

/// Returns the rows of files with all columns. Blank lines are left out.
pub(super) fn whole_records(
    mut rows: RowStream,
) -> impl Iterator<Item = Result<WholeRecord, Failure>> + Send {
    std::iter::from_fn(move || {
        loop {
            let (row, content) = match rows.next()? {
                Ok(next) => next,
                Err(failure) => return Some(Err(failure)),
            };
            let columns = match content {
                DataRow::Line(line) if line.iter().all(u8::is_ascii_whitespace) => continue,
                DataRow::Line(line) => serde_json::from_slice(&line)
                    .map_err(|e| format!("{e}; give one JSON object a line")),
                DataRow::Fields(fields) => Ok(fields),
                DataRow::Bad(problem) => {
                    Err(rows.names().message(&problem.field, &problem.message))
                }
            };
            let place = rows.names().place(row);
            return Some(Ok(WholeRecord {
                row,
                place,
                columns,
            }));
        }
    })
}

/// Iterator over the rows of files. Blank lines are left out.
pub(super) struct RecordReader(RowStream);

impl RecordReader {
    pub(super) fn new(rows: RowStream) -> Self {
        RecordReader(rows)
    }

    fn record(&self, row: u64, content: DataRow) -> DataRecord {
        let (columns, pairs): (_, Result<Vec<_>, RowIssue>) = match content {
            DataRow::Line(line) => {
                let columns = serde_json::from_slice(&line).unwrap_or_else(|_| {
                    let text = String::from_utf8_lossy(&line).into_owned();
                    Map::from_iter([(LINE_COLUMN.to_owned(), text.into())])
                });
                (columns, pairs_of_line(row, &line).collect())
            }
            DataRow::Fields(fields) => {
                let pairs = pairs_of_record(row, fields.clone()).collect();
                (fields, pairs)
            }
            DataRow::Bad(problem) => {
                let issue = RowIssue {
                    row,
                    id: None,
                    field: problem.field,
                    reason: problem.reason,
                    message: problem.message,
                    of_model: false,
                };
                (Map::new(), Err(issue))
            }
        };
        DataRecord {
            row,
            columns,
            pairs: pairs.map_err(|issue| self.0.names().placed(issue)),
        }
    }
}

impl Iterator for RecordReader {
    type Item = Result<DataRecord, Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (row, content) = match self.0.next()? {
                Ok(next) => next,
                Err(failure) => return Some(Err(failure)),
            };
            match content {
                DataRow::Line(line) if line.iter().all(u8::is_ascii_whitespace) => {}
                content => return Some(Ok(self.record(row, content))),
            }
        }
    }
}
