//! Says what is wrong with each row of a dataset, before anything is trained on it.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::encode::PairEncoder;
use super::rows::{DataError, apart};
use crate::domain::dataset::{
    ChatMessage, DatasetFormat, IssueReason, MAX_LISTED_ISSUES, PreferenceRow, RowIssue, Severity, Text, ValidationReport,
};
use crate::domain::violation::quoted;

/// The usable rows of a file and what was found about all of them.
#[derive(Clone, Debug, Default)]
pub struct LoadedRows {
    /// Rows without an error, in file order.
    pub rows: Vec<PreferenceRow>,
    /// Findings about every row.
    pub report: ValidationReport,
}

/// Checks every row; with an encoder, lengths too.
///
/// # Errors
/// `TooLarge` when the rows hold more than `limit` bytes of text: a small compressed file may hold any number.
pub fn validate_rows(path: &Path, format: DatasetFormat, lengths: Option<PairEncoder>, limit: u64) -> Result<ValidationReport, DataError> {
    let mut left = limit;
    scan(path, format, lengths, |row| {
        let bytes: usize = [&row.prompt, &row.chosen, &row.rejected].map(Text::bytes).iter().sum();
        left = left.checked_sub((bytes + row.arguments.bytes()) as u64).ok_or(DataError::TooLarge { limit })?;
        Ok(())
    })
}

/// The rows that can be used, with the report that says why others cannot.
pub fn load_rows(path: &Path, format: DatasetFormat) -> Result<LoadedRows, DataError> {
    let mut rows = Vec::new();
    let report = scan(path, format, None, |row| {
        rows.push(row);
        Ok(())
    })?;
    Ok(LoadedRows { rows, report })
}

fn scan(
    path: &Path,
    format: DatasetFormat,
    lengths: Option<PairEncoder>,
    mut keep: impl FnMut(PreferenceRow) -> Result<(), DataError>,
) -> Result<ValidationReport, DataError> {
    let mut report = ValidationReport::default();
    let mut seen = Seen::default();
    let mut columns = UnusedColumns::default();
    apart::for_each_row(path, format, |row| {
        report.rows += 1;
        let row = match row {
            Ok(row) => row,
            Err(issue) => {
                report.add(issue);
                return Ok(());
            }
        };
        for column in &row.ignored {
            columns.report(&row, column, &mut report);
        }
        let mut issues = check(&row);
        issues.extend(seen.check(&row));
        if let (Some(encoder), true) = (&lengths, issues.iter().all(|i| i.reason.severity() == Severity::Warning)) {
            issues.extend(check_lengths(&row, encoder));
        }
        let usable = issues.iter().all(|i| i.reason.severity() == Severity::Warning);
        issues.into_iter().for_each(|i| report.add(i));
        if usable {
            report.valid_rows += 1;
            keep(row)?;
        }
        Ok(())
    })?;
    Ok(report)
}

fn issue(row: &PreferenceRow, field: &str, reason: IssueReason, message: impl Into<String>) -> RowIssue {
    RowIssue { row: row.row, id: row.id.clone(), field: field.to_owned(), reason, message: message.into() }
}

/// What a row says by itself.
fn check(row: &PreferenceRow) -> Vec<RowIssue> {
    let mut issues = Vec::new();
    if is_empty(&row.prompt) {
        issues.push(issue(row, "prompt", IssueReason::MissingField, "prompt is empty: an answer needs something to answer"));
    }
    for (field, text) in [("chosen", &row.chosen), ("rejected", &row.rejected)] {
        if is_empty(text) {
            issues.push(issue(row, field, IssueReason::EmptyCompletion, format!("{field} has no text: give an answer or remove the row")));
        }
    }
    let usable = issues.iter().all(|i| i.reason.severity() == Severity::Warning);
    if usable && row.chosen == row.rejected {
        issues.push(issue(row, "rejected", IssueReason::IdenticalAnswers, "chosen and rejected are the same: there is nothing to prefer"));
    }
    issues
}

fn is_empty(text: &Text) -> bool {
    match text {
        Text::Plain(s) => s.trim().is_empty(),
        Text::Chat(messages) => messages.iter().all(ChatMessage::is_blank),
    }
}

fn check_lengths(row: &PreferenceRow, encoder: &PairEncoder) -> Vec<RowIssue> {
    let (pair, prompt_cut) = match encoder.encode_row_with_cut(row) {
        Ok(encoded) => encoded,
        Err(problem) => return vec![problem],
    };
    let mut issues = Vec::new();
    for (field, cut) in [("chosen", pair.chosen_truncated), ("rejected", pair.rejected_truncated)] {
        if cut {
            let message = format!("max_length cuts {field}: raise it to train on the whole answer");
            issues.push(issue(row, field, IssueReason::Truncated, message));
        }
    }
    if let Some(tail) = prompt_cut {
        let message = format!(
            "the end {} of the prompt's tokens is left out, because prompt + answer does not begin with it: the model is trained on another \
             context than it answers in. Use a chat template that renders the prompt alike with and without an answer, or end a plain prompt \
             where a token ends",
            quoted(&tail)
        );
        issues.push(issue(row, "prompt", IssueReason::PromptCut, message));
    }
    issues
}

/// The columns that were reported as not used. Each is listed once in a file, and counted in every
/// row that has it.
#[derive(Default)]
struct UnusedColumns(HashSet<String>);

impl UnusedColumns {
    fn report(&mut self, row: &PreferenceRow, column: &str, report: &mut ValidationReport) {
        if self.0.contains(column) || self.0.len() >= MAX_LISTED_ISSUES {
            return report.count(IssueReason::IgnoredField);
        }
        self.0.insert(column.to_owned());
        let message = format!("{column} is not used: the model does not see it (further rows with this column are counted, not listed)");
        report.add(issue(row, column, IssueReason::IgnoredField, message));
    }
}

/// Pairs met so far, by content hash.
#[derive(Default)]
struct Seen(HashMap<[u8; 32], u64>);

impl Seen {
    fn check(&mut self, row: &PreferenceRow) -> Option<RowIssue> {
        let forward = hash(row, &row.chosen, &row.rejected);
        if let Some(first) = self.0.get(&forward) {
            return Some(issue(row, "", IssueReason::DuplicatePair, format!("the same pair as row {first}: it counts twice")));
        }
        let backward = hash(row, &row.rejected, &row.chosen);
        if let Some(first) = self.0.get(&backward).filter(|_| forward != backward) {
            let message = format!("row {first} prefers these answers the other way round: keep one of the two");
            return Some(issue(row, "", IssueReason::ContradictoryPair, message));
        }
        self.0.insert(forward, row.row);
        None
    }
}

/// Lengths are hashed too, so that no two different rows give the same bytes.
fn hash(row: &PreferenceRow, a: &Text, b: &Text) -> [u8; 32] {
    let mut hash = blake3::Hasher::new();
    let mut add = |s: &str| {
        hash.update(&(s.len() as u64).to_le_bytes());
        hash.update(s.as_bytes());
    };
    for text in [&row.prompt, a, b] {
        match text {
            Text::Plain(s) => add(s),
            Text::Chat(messages) => {
                add(&messages.len().to_string());
                messages.iter().for_each(|m| add(&json(m)));
            }
        }
    }
    if !row.arguments.is_empty() {
        add(&json(&row.arguments));
    }
    *hash.finalize().as_bytes()
}

/// Every key and value in order, as JSON. A map of JSON values is always JSON.
fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn report(lines: &[&str]) -> LoadedRows {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(lines.join("\n").as_bytes()).unwrap();
        load_rows(file.path(), DatasetFormat::Jsonl).unwrap()
    }

    #[test]
    fn each_kind_of_bad_row_is_found_and_only_usable_rows_are_kept() {
        let loaded = report(&[
            r#"{"prompt":"p","chosen":"a","rejected":"b"}"#,
            r#"{"prompt":"p","chosen":"a","rejected":"b"}"#,
            r#"{"prompt":"p","chosen":"b","rejected":"a"}"#,
            r#"{"prompt":"p","chosen":"c","rejected":"c"}"#,
            r#"{"prompt":"p","chosen":" \n","rejected":"c"}"#,
            r#"{"prompt":"","chosen":"x","rejected":"c"}"#,
            r#"not json"#,
        ]);
        assert_eq!(loaded.rows.iter().map(|r| r.row).collect::<Vec<_>>(), [1, 2]);
        let r = &loaded.report;
        assert_eq!((r.rows, r.valid_rows, r.bad_rows()), (7, 2, 5));
        for reason in ["duplicate_pair", "contradictory_pair", "identical_answers", "empty_completion", "missing_field", "invalid_json"] {
            assert_eq!(r.counts[reason], 1, "{reason}");
        }
        assert!(r.issues.iter().any(|i| i.row == 3 && i.message.contains("row 1")));
    }
}
