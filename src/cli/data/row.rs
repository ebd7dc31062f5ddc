//! The form in which the readers of all formats return rows.

use serde_json::{Map, Value};

use crate::domain::dataset::IssueReason;

/// Columns of a file that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Wanted {
    /// Those of preference pairs, which the file must have. Others are only reported as not used.
    Pairs,
    /// Those of preference pairs, which the file must have, and all others as they are.
    PairsAndOthers,
    /// All, as they are.
    All,
}

/// Columns with a prompt, which may be a list of messages, in files whose columns are all read.
pub(super) const PROMPT_COLUMNS: [&str; 2] = ["prompt", "messages"];

/// A row of a file.
#[derive(Debug)]
pub(in crate::cli) enum DataRow {
    /// The text of a line or of an element of an array, without a line feed. It is not checked yet,
    /// and a blank one counts as a line without being a row.
    Line(Vec<u8>),
    /// The columns of a record.
    Fields(Map<String, Value>),
    /// A row that cannot be read, while later ones can.
    Bad(RowProblem),
}

/// The reason why a row cannot be read.
#[derive(Clone, Debug)]
pub(in crate::cli) struct RowProblem {
    /// The column, or empty for the whole row.
    pub field: String,
    pub reason: IssueReason,
    /// Explanation with the remedy.
    pub message: String,
}

impl DataRow {
    pub(super) fn bad(field: &str, reason: IssueReason, message: impl Into<String>) -> Self {
        DataRow::Bad(RowProblem {
            field: field.to_owned(),
            reason,
            message: message.into(),
        })
    }
}

/// The rows of one file, in order. An error means that the file cannot be read further; it is the
/// last item, and its text does not name the file.
pub(in crate::cli) type DataRows = Box<dyn Iterator<Item = Result<DataRow, String>> + Send>;
