//! The rows of several files as one sequence.

use std::vec::IntoIter;

use serde_json::{Map, Value};

use super::columns::ColumnMap;
use super::open::{Opened, open};
use super::places::DataPlace;
use super::row::{DataRow, RowProblem, Wanted};
use crate::cli::failure::Failure;
use crate::domain::dataset::RowIssue;

/// Iterator over the rows of several files with their numbers, from 1 and through all files. Files
/// are opened one after the other. A failure, which names the file, is the last item.
pub(super) struct RowStream {
    places: IntoIter<DataPlace>,
    current: Option<Opened>,
    columns: ColumnMap,
    wanted: Wanted,
    names: SourceNames,
    /// Number of the last row.
    row: u64,
    /// True until a row of the current file has been checked for the mapped columns.
    is_unchecked: bool,
}

/// Names of rows and columns for messages.
#[derive(Clone, Debug, Default)]
pub(super) struct SourceNames {
    /// Name and first row of each file, in order.
    files: Vec<(String, u64)>,
    columns: ColumnMap,
}

impl SourceNames {
    pub(super) fn new(columns: ColumnMap) -> Self {
        SourceNames {
            files: Vec::new(),
            columns,
        }
    }

    /// Names a row: `row 7`, or `b.csv, row 3` if there are several files.
    pub(super) fn place(&self, row: u64) -> String {
        let after = self.files.partition_point(|(_, first)| *first <= row);
        match after.checked_sub(1).and_then(|i| self.files.get(i)) {
            Some((name, first)) if self.files.len() > 1 => {
                format!("{name}, row {}", row - first + 1)
            }
            _ => format!("row {row}"),
        }
    }

    /// Returns the file's name of a column.
    pub(super) fn column(&self, path: &str) -> String {
        self.columns.original(path)
    }

    /// Returns a message about a column with the file's name of it at the beginning.
    pub(super) fn message(&self, field: &str, message: &str) -> String {
        self.columns.message(field, message)
    }

    pub(super) fn describe(&self, row: u64, problem: &RowProblem) -> String {
        let message = self.message(&problem.field, &problem.message);
        format!("{}: {message}", self.place(row))
    }

    /// Names the file in a finding, if there are several, and the column as it is in the file.
    pub(super) fn placed(&self, issue: RowIssue) -> RowIssue {
        let mut message = self.message(&issue.field, &issue.message);
        if self.has_several_files() {
            message.push_str(&format!(" ({})", self.place(issue.row)));
        }
        RowIssue {
            field: self.column(&issue.field),
            message,
            ..issue
        }
    }

    pub(super) fn has_several_files(&self) -> bool {
        self.files.len() > 1
    }
}

impl RowStream {
    /// Returns the rows of pairs.
    pub(super) fn new(places: Vec<DataPlace>, columns: ColumnMap) -> Self {
        RowStream::wanting(Wanted::Pairs, places, columns)
    }

    /// Returns rows with the wanted columns.
    pub(super) fn wanting(wanted: Wanted, places: Vec<DataPlace>, columns: ColumnMap) -> Self {
        RowStream {
            wanted,
            places: places.into_iter(),
            current: None,
            names: SourceNames::new(columns.clone()),
            columns,
            row: 0,
            is_unchecked: false,
        }
    }

    pub(super) fn names(&self) -> &SourceNames {
        &self.names
    }

    pub(super) fn into_names(self) -> SourceNames {
        self.names
    }

    /// Returns the next row of the current or a later file, or a text about the current file.
    fn advance(&mut self) -> Result<Option<DataRow>, String> {
        loop {
            if let Some(opened) = &mut self.current {
                if let Some(row) = opened.rows.next() {
                    return Ok(Some(row?));
                }
                self.current = None;
            }
            let Some(place) = self.places.next() else {
                return Ok(None);
            };
            self.names.files.push((place.name(), self.row + 1));
            self.is_unchecked = true;
            self.current = Some(open(&place, &self.columns, self.wanted)?);
        }
    }

    /// Gives the columns of a row our names.
    fn renamed(&mut self, row: DataRow) -> Result<DataRow, String> {
        let is_renamed = self
            .current
            .as_ref()
            .is_some_and(|opened| opened.is_renamed);
        if self.columns.is_empty() || is_renamed {
            return Ok(row);
        }
        let fields = match row {
            DataRow::Line(line) => match serde_json::from_slice::<Map<String, Value>>(&line) {
                Ok(fields) => fields,
                // A malformed line is reported when it is read as a row.
                Err(_) => return Ok(DataRow::Line(line)),
            },
            DataRow::Fields(fields) => fields,
            bad => return Ok(bad),
        };
        if std::mem::take(&mut self.is_unchecked) {
            let names: Vec<String> = fields.keys().cloned().collect();
            self.columns.check(&names)?;
        }
        Ok(DataRow::Fields(self.columns.renamed(fields)))
    }
}

impl Iterator for RowStream {
    type Item = Result<(u64, DataRow), Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = match self.advance() {
            Ok(None) => return None,
            Ok(Some(row)) => self.renamed(row),
            Err(reason) => Err(reason),
        };
        Some(match row {
            Ok(row) => {
                self.row += 1;
                Ok((self.row, row))
            }
            Err(reason) => {
                let name = self.names.files.last().map_or("", |(name, _)| name);
                let failure = Failure::Failed(format!("{name}: {reason}"));
                self.current = None;
                self.places = Vec::new().into_iter();
                Err(failure)
            }
        })
    }
}
