//! The log-probs in the rows' columns, for `--logged` of `score` and `score-files`.

use crate::cli::args::LoggedColumns;
use crate::domain::dataset::{IssueReason, PreferenceRow, RowIssue};
use crate::domain::logged::{
    LoggedLogprobs, LoggedProblem, LoggedSums, POLICY_COLUMNS, REFERENCE_COLUMNS,
};
use crate::rpc::pb;
use crate::train::rows::RowReader;

/// Applies [`select_columns`] to rows. A row with an error becomes a finding.
pub(super) fn rows(rows: RowReader, columns: Option<LoggedColumns>) -> RowReader {
    Box::new(rows.map(move |row| select_columns(row?, columns)))
}

/// Removes the log-probs that are not to be sent from a row.
///
/// # Errors
/// Returns a finding if the row lacks one that is to be sent.
pub(in crate::cli) fn select_columns(
    row: PreferenceRow,
    columns: Option<LoggedColumns>,
) -> Result<PreferenceRow, RowIssue> {
    let problem = |LoggedProblem { column, message }| RowIssue {
        row: row.row,
        id: row.id.clone(),
        field: column,
        reason: IssueReason::MissingField,
        message,
        of_model: false,
    };
    let (reference, policy) = match columns {
        None => (LoggedSums::Absent, LoggedSums::Absent),
        Some(columns) => {
            let reference = row.logged.of_reference().map_err(problem)?;
            let policy = match columns {
                LoggedColumns::Reference => LoggedSums::Absent,
                LoggedColumns::Both => LoggedSums::Given(row.logged.of_policy().map_err(problem)?),
            };
            (LoggedSums::Given(reference), policy)
        }
    };
    let is_used = |column: &String| {
        let of = |sums: &LoggedSums, columns: [&str; 2]| {
            *sums != LoggedSums::Absent && columns.contains(&column.as_str())
        };
        of(&reference, REFERENCE_COLUMNS) || of(&policy, POLICY_COLUMNS)
    };
    let mut ignored = row.ignored;
    ignored.retain(|column| !is_used(column));
    Ok(PreferenceRow {
        ignored,
        logged: LoggedLogprobs { reference, policy },
        ..row
    })
}

/// Converts the log-probs of a row. Answer a of its pair is the chosen one.
pub(in crate::cli) fn message(logged: &LoggedLogprobs) -> Option<pb::LoggedLogprobs> {
    let sums = |sums: &LoggedSums| match sums {
        LoggedSums::Given([a, b]) => (Some(*a), Some(*b)),
        _ => (None, None),
    };
    let ((reference_a, reference_b), (policy_a, policy_b)) =
        (sums(&logged.reference), sums(&logged.policy));
    (!logged.is_absent()).then_some(pb::LoggedLogprobs {
        reference_a,
        reference_b,
        policy_a,
        policy_b,
        tokens_a: None,
        tokens_b: None,
    })
}
