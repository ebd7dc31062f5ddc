//! Validation of a dataset's rows before training.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::logged::reference_sums;
use super::rows::{DataError, sandbox};
use crate::domain::dataset::{
    ChatMessage, DatasetFormat, IssueReason, LoggedRows, MAX_LISTED_ISSUES, PreferenceRow,
    RowIssue, RowShape, Severity, Text, ValidationReport,
};
use crate::domain::logged::{POLICY_COLUMNS, REFERENCE_COLUMNS, is_logged_column};
use crate::domain::violation::quoted;
use crate::infer::encode::PairEncoder;

/// Usable rows of a file, and the findings about all rows.
#[derive(Clone, Debug, Default)]
pub struct LoadedRows {
    /// Rows without an error, in file order.
    pub rows: Vec<PreferenceRow>,
    /// Findings about every row.
    pub report: ValidationReport,
    /// Summary of the rows with an error.
    pub bad: BadRows,
}

/// Number of rows with an error, and their first errors. The report cannot provide these, because
/// warnings may fill its list.
#[derive(Clone, Debug, Default)]
pub struct BadRows {
    rows: u64,
    errors: u64,
    listed: Vec<RowIssue>,
    /// Row, field and reason of the error that was added last.
    last: Option<(u64, String, IssueReason)>,
    /// Number of the row that was counted last; 0 before the first.
    counted: u64,
    /// Counted rows that also have a usable pair, in file order. Only these can be added again,
    /// when their pairs are tokenised. The list is bounded, because the total text of usable pairs
    /// is limited (`max_dataset_text_bytes`).
    partly_usable: Vec<u64>,
}

impl BadRows {
    /// Adds an error. Several pairs of a row may have the same error, which counts once. Rows come
    /// in file order: once when the file is read, and again when usable pairs are tokenised.
    pub fn add(&mut self, error: RowIssue) {
        let this = (error.row, error.field.clone(), error.reason);
        if self.last.as_ref() == Some(&this) {
            return;
        }
        self.last = Some(this);
        if error.row != self.counted && self.partly_usable.binary_search(&error.row).is_err() {
            self.counted = error.row;
            self.rows += 1;
        }
        self.errors += 1;
        if self.listed.len() < MAX_LISTED_ISSUES {
            self.listed.push(error.shortened());
        }
    }

    /// Adds the bad rows of another dataset.
    pub fn extend(&mut self, other: BadRows) {
        self.rows += other.rows;
        self.errors += other.errors;
        let room = MAX_LISTED_ISSUES - self.listed.len();
        self.listed.extend(other.listed.into_iter().take(room));
    }

    /// Returns the number of rows with an error.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Returns the first error.
    pub fn first(&self) -> Option<&RowIssue> {
        self.listed.first()
    }

    /// Describes the first errors, one per line. The last line counts the remaining ones.
    pub fn lines(&self) -> Vec<String> {
        let line = |i: &RowIssue| {
            let space = if i.field.is_empty() { "" } else { " " };
            format!(
                "row {}, {}{space}{}: {}",
                i.row,
                i.field,
                i.reason.name(),
                i.message
            )
        };
        let mut lines: Vec<String> = self.listed.iter().map(line).collect();
        let others = self.errors - lines.len() as u64;
        if others > 0 {
            lines.push(format!("… and {others} more"));
        }
        lines
    }
}

/// Validates every row. With an encoder, also checks lengths.
///
/// # Errors
/// `TooLarge` if the usable rows have more than `limit` bytes of text, which is possible even for a
/// small compressed file; otherwise the errors of reading the file.
pub fn validate_rows(
    path: &Path,
    format: DatasetFormat,
    encoder: Option<PairEncoder>,
    limit: u64,
) -> Result<ValidationReport, DataError> {
    let mut left = limit;
    let (report, _) = scan(path, format, encoder, |row| {
        let bytes: usize = [&row.prompt, &row.chosen, &row.rejected]
            .map(Text::bytes)
            .iter()
            .sum();
        left = left
            .checked_sub((bytes + row.arguments.bytes()) as u64)
            .ok_or(DataError::TooLarge { limit })?;
        Ok(())
    })?;
    Ok(report)
}

/// Returns the usable rows, and a report about all rows.
///
/// # Errors
/// Fails if the file cannot be read.
pub fn load_rows(path: &Path, format: DatasetFormat) -> Result<LoadedRows, DataError> {
    let mut rows = Vec::new();
    let (report, bad) = scan(path, format, None, |row| {
        rows.push(row);
        Ok(())
    })?;
    Ok(LoadedRows { rows, report, bad })
}

/// Message of the finding about a tokenizer without an end-of-sequence token, added to the first
/// plain-text row.
const NO_EOS: &str = "the model's tokenizer has no end-of-sequence token, so the model does not \
    learn where plain-text answers end: set eos_token in its tokenizer_config.json \
    (tokenizer.ggml.eos_token_id in GGUF), or end each answer with a text that stops generation";

fn scan(
    path: &Path,
    format: DatasetFormat,
    encoder: Option<PairEncoder>,
    mut on_usable_row: impl FnMut(PreferenceRow) -> Result<(), DataError>,
) -> Result<(ValidationReport, BadRows), DataError> {
    let mut seen = Seen::default();
    let mut tally = Tally::default();
    let mut warn_no_eos = encoder.is_some_and(|encoder| !encoder.has_eos());
    let mut columns = UnusedColumns::default();
    sandbox::for_each_row(path, format, |row| {
        let (Ok(PreferenceRow { row: number, .. }) | Err(RowIssue { row: number, .. })) = row;
        tally.enter(number);
        let row = match row {
            Ok(row) => row,
            Err(issue) => {
                tally.add(issue);
                return Ok(());
            }
        };
        tally.count_shape(&row);
        for problem in row.logged.problems() {
            let message = format!(
                "{}; a job with reference logged refuses the row",
                problem.message
            );
            tally.add(issue(
                &row,
                &problem.column,
                IssueReason::IgnoredField,
                message,
            ));
        }
        for column in &row.ignored {
            columns.report(&row, column, &mut tally);
        }
        let mut issues = check(&row);
        issues.extend(seen.check(&row));
        if issues
            .iter()
            .all(|i| i.reason.severity() == Severity::Warning)
        {
            tally.count_logged(&row);
        }
        if let (Some(encoder), true) = (
            &encoder,
            issues
                .iter()
                .all(|i| i.reason.severity() == Severity::Warning),
        ) {
            issues.extend(check_lengths(&row, encoder));
        }
        if warn_no_eos && matches!(row.chosen, Text::Plain(_)) {
            warn_no_eos = false;
            issues.push(issue(&row, "chosen", IssueReason::NoEos, NO_EOS));
        }
        let usable = issues
            .iter()
            .all(|i| i.reason.severity() == Severity::Warning);
        issues.into_iter().for_each(|i| tally.add(i));
        if usable {
            tally.pairs += 1;
            tally.has_usable_pair = true;
            on_usable_row(row)?;
        }
        Ok(())
    })?;
    Ok(tally.finish())
}

/// Counts rows from a stream of pairs, in which the pairs of a row are adjacent.
#[derive(Default)]
struct Tally {
    report: ValidationReport,
    bad: BadRows,
    /// Number of the current row; 0 before the first.
    row: u64,
    /// True if the current row has an error.
    is_bad: bool,
    /// True if it has an error that does not depend on model or length.
    is_bad_for_every_job: bool,
    /// True if one of its pairs has no error.
    has_usable_pair: bool,
    /// True if its shape has been counted.
    has_shape: bool,
    /// Findings about the current row. Its pairs share the prompt and some answers, so they repeat
    /// findings.
    reported: Vec<(String, IssueReason)>,
    /// Number of usable pairs so far.
    pairs: u64,
    /// True if any row has several pairs.
    has_several: bool,
    /// Reference log-probs of the pairs so far.
    logged: LoggedRows,
    /// Number of the last row that counts in `logged.rows_without`; 0 before the first.
    row_without: u64,
}

impl Tally {
    /// Starts a new row, unless `number` is the current one.
    fn enter(&mut self, number: u64) {
        if number == self.row {
            return;
        }
        self.leave();
        (self.row, self.is_bad, self.is_bad_for_every_job) = (number, false, false);
        (self.has_usable_pair, self.has_shape) = (false, false);
        self.reported.clear();
        self.report.rows += 1;
    }

    /// Counts the current row, after its last pair.
    fn leave(&mut self) {
        self.report.valid_rows += u64::from(self.row > 0 && !self.is_bad);
        *self.report.unusable_rows.get_or_insert_default() += u64::from(self.is_bad_for_every_job);
        if self.is_bad && self.has_usable_pair {
            self.bad.partly_usable.push(self.row);
        }
    }

    /// Counts the shape of the current row, once, and notes if the row has several pairs.
    fn count_shape(&mut self, pair: &PreferenceRow) {
        if !self.has_shape {
            *self
                .report
                .shapes
                .entry(pair.shape.name().to_owned())
                .or_default() += 1;
        }
        self.has_shape = true;
        self.has_several |= pair.pair.is_some();
    }

    /// Adds a finding about the current row, unless an earlier pair of the row has the same one.
    fn add(&mut self, issue: RowIssue) {
        let finding = (issue.field.clone(), issue.reason);
        if self.reported.contains(&finding) {
            return;
        }
        self.reported.push(finding);
        if issue.reason.severity() == Severity::Error {
            self.is_bad = true;
            self.is_bad_for_every_job |= !issue.depends_on_job();
            self.bad.add(issue.clone());
        }
        self.report.add(issue);
    }

    /// Counts a finding that is listed already, at most once per row.
    fn count(&mut self, field: &str, reason: IssueReason) {
        let finding = (field.to_owned(), reason);
        if !self.reported.contains(&finding) {
            self.reported.push(finding);
            self.report.count(reason);
        }
    }

    /// Counts the reference log-probs of a pair.
    fn count_logged(&mut self, pair: &PreferenceRow) {
        let missing = match reference_sums(pair) {
            Ok(_) => {
                self.logged.pairs += 1;
                return;
            }
            Err(missing) => missing,
        };
        if pair.row != self.row_without {
            self.row_without = pair.row;
            self.logged.rows_without += 1;
        }
        let first = &mut self.logged.first_without;
        first.get_or_insert_with(|| missing.shortened());
    }

    fn finish(mut self) -> (ValidationReport, BadRows) {
        self.leave();
        self.report.logged = Some(self.logged);
        self.report.pairs = if self.has_several { self.pairs } else { 0 };
        (self.report, self.bad)
    }
}

fn issue(
    row: &PreferenceRow,
    field: &str,
    reason: IssueReason,
    message: impl Into<String>,
) -> RowIssue {
    RowIssue {
        row: row.row,
        id: row.id.clone(),
        field: row.column(field),
        reason,
        message: message.into(),
        of_model: false,
    }
}

/// Returns the findings that follow from the row alone.
pub fn check(row: &PreferenceRow) -> Vec<RowIssue> {
    let mut issues = Vec::new();
    if is_empty(&row.prompt) {
        issues.push(issue(
            row,
            "prompt",
            IssueReason::MissingField,
            "prompt is empty: add the text that the answers respond to, or remove the row",
        ));
    }
    for (field, text) in [("chosen", &row.chosen), ("rejected", &row.rejected)] {
        if is_empty(text) {
            issues.push(issue(
                row,
                field,
                IssueReason::EmptyCompletion,
                format!("{field} has no text: give an answer or remove the row"),
            ));
        }
    }
    let usable = issues
        .iter()
        .all(|i| i.reason.severity() == Severity::Warning);
    if usable && row.chosen == row.rejected {
        issues.push(issue(
            row,
            "rejected",
            IssueReason::IdenticalAnswers,
            "chosen and rejected are the same: there is nothing to prefer",
        ));
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
    for (field, cut) in [
        ("chosen", pair.chosen_truncated),
        ("rejected", pair.rejected_truncated),
    ] {
        if cut {
            let message = format!("max_length cuts {field}: raise it to train on the whole answer");
            issues.push(issue(row, field, IssueReason::Truncated, message));
        }
    }
    if let Some(tail) = prompt_cut {
        let message = format!(
            "the end {} of the prompt's tokens is left out, because prompt + answer has other \
             tokens in its place: the model is trained on another context than it answers in. Use \
             a chat template that renders the prompt alike with and without an answer, or end a \
             plain prompt where a token ends",
            quoted(&tail)
        );
        issues.push(issue(row, "prompt", IssueReason::PromptCut, message));
    }
    issues
}

/// Columns that were reported as not used. Each is listed once per file and counted in every row
/// that has it.
#[derive(Default)]
struct UnusedColumns(HashSet<String>);

impl UnusedColumns {
    fn report(&mut self, row: &PreferenceRow, column: &str, tally: &mut Tally) {
        if self.0.contains(column) || self.0.len() >= MAX_LISTED_ISSUES {
            return tally.count(column, IssueReason::IgnoredField);
        }
        self.0.insert(column.to_owned());
        let why = if REFERENCE_COLUMNS.contains(&column) {
            "is used only by jobs with reference logged"
        } else if POLICY_COLUMNS.contains(&column) {
            "is not used by jobs: only scoring uses it, if asked to"
        } else {
            "is not used: the model does not see it"
        };
        let name = match column.trim() {
            "" => "a column without a name",
            _ => column,
        };
        // Without its prompt, a row's answers were split where they begin to differ.
        let remedy = match row.shape {
            RowShape::ImplicitPromptText if !is_logged_column(column) => {
                "; if it holds the prompt, rename it to prompt"
            }
            _ => "",
        };
        let message =
            format!("{name} {why}{remedy} (further rows with this column are counted, not listed)");
        tally.add(issue(row, column, IssueReason::IgnoredField, message));
    }
}

/// Row number of each pair so far, by content hash.
#[derive(Default)]
struct Seen(HashMap<[u8; 32], u64>);

impl Seen {
    fn check(&mut self, row: &PreferenceRow) -> Option<RowIssue> {
        let forward = hash(row, &row.chosen, &row.rejected);
        if let Some(first) = self.0.get(&forward) {
            return Some(issue(
                row,
                "",
                IssueReason::DuplicatePair,
                format!("the same pair as row {first}: it counts twice"),
            ));
        }
        let backward = hash(row, &row.rejected, &row.chosen);
        if let Some(first) = self.0.get(&backward).filter(|_| forward != backward) {
            let message = format!(
                "row {first} has the opposite preference for these answers: remove one of the rows"
            );
            return Some(issue(row, "", IssueReason::ContradictoryPair, message));
        }
        self.0.insert(forward, row.row);
        None
    }
}

/// Returns the content hash of a pair. Text lengths are included, so that different pairs never
/// give the same input bytes.
pub fn hash(row: &PreferenceRow, a: &Text, b: &Text) -> [u8; 32] {
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

/// Returns a value as JSON with its keys in order. Serialising cannot fail for these types.
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
        assert_eq!(
            loaded.rows.iter().map(|r| r.row).collect::<Vec<_>>(),
            [1, 2]
        );
        let r = &loaded.report;
        assert_eq!((r.rows, r.valid_rows, r.bad_rows()), (7, 2, 5));
        assert!(loaded.bad.lines()[4].starts_with("row 7, invalid_json: not JSON"));
        for reason in [
            "duplicate_pair",
            "contradictory_pair",
            "identical_answers",
            "empty_completion",
            "missing_field",
            "invalid_json",
        ] {
            assert_eq!(r.counts[reason], 1, "{reason}");
        }
        assert!(
            r.issues
                .iter()
                .any(|i| i.row == 3 && i.message.contains("row 1"))
        );
        assert_eq!((r.shapes["preference"], r.pairs), (6, 0));
    }

    #[test]
    fn warnings_do_not_hide_bad_rows() {
        let duplicate = r#"{"prompt":"p","chosen":"a","rejected":"b"}"#.to_owned();
        let mut rows = vec![duplicate; MAX_LISTED_ISSUES + 1];
        rows.extend(
            (0..MAX_LISTED_ISSUES + 500)
                .map(|i| format!(r#"{{"prompt":"p{i}","chosen":"","rejected":""}}"#)),
        );
        let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
        let loaded = report(&rows);
        assert!(
            loaded
                .report
                .issues
                .iter()
                .all(|i| i.reason == IssueReason::DuplicatePair),
            "the report lists a bad row although warnings fill its list"
        );
        assert_eq!(loaded.bad.rows(), loaded.report.bad_rows());
        assert_eq!(loaded.bad.rows(), 1500);
        let lines = loaded.bad.lines();
        assert_eq!(lines.len(), MAX_LISTED_ISSUES + 1);
        assert!(
            lines[0].starts_with("row 1002, chosen empty_completion")
                && lines[1].starts_with("row 1002, rejected"),
            "{lines:?}"
        );
        assert_eq!(lines[MAX_LISTED_ISSUES], "… and 2000 more");

        let mut both = loaded.bad.clone();
        both.extend(loaded.bad);
        assert_eq!(
            (both.rows(), both.lines().pop().unwrap().as_str()),
            (3000, "… and 5000 more")
        );
    }

    #[test]
    fn rows_are_unusable_for_every_job_only_if_a_finding_does_not_depend_on_the_job() {
        let mut tally = Tally::default();
        let mut add = |row: u64, field: &str, reason: IssueReason| {
            tally.enter(row);
            tally.add(RowIssue {
                row,
                id: None,
                field: field.into(),
                reason,
                message: String::new(),
                of_model: false,
            });
        };
        // Two pairs of one row; both may be usable with another model.
        add(1, "rejected[0]", IssueReason::TokenOutsideVocabulary);
        add(1, "rejected[1]", IssueReason::TokenOutsideVocabulary);
        add(2, "chosen", IssueReason::EmptyCompletion);
        add(3, "prompt", IssueReason::PromptFillsMaxLength);
        add(3, "rejected[1]", IssueReason::IdenticalAnswers);
        add(4, "chosen", IssueReason::Truncated);
        let (report, _) = tally.finish();
        assert_eq!(
            (report.rows, report.bad_rows(), report.bad_rows_of_any_job()),
            (4, 3, 2)
        );
        // A report as version 0.2.0 stored it.
        let old = ValidationReport {
            unusable_rows: None,
            ..report
        };
        assert_eq!(old.bad_rows_of_any_job(), 0);
    }

    #[test]
    fn a_row_that_is_bad_in_several_ways_counts_once() {
        let loaded = report(&[
            r#"{"prompt":"p","chosen":"a","rejected":["b","",""]}"#,
            r#"{"prompt":"q","chosen":"a","rejected":["b","c"]}"#,
            r#"{"prompt":"r","chosen":"a","rejected":["","b"]}"#,
            r#"{"prompt":"s","chosen":"","rejected":["a","b"]}"#,
            r#"{"prompt":"t","chosen":"a","rejected":["a","b"]}"#,
        ]);
        let mut bad = loaded.bad;
        assert_eq!(
            (
                bad.rows(),
                loaded.rows.iter().map(|r| r.row).collect::<Vec<_>>()
            ),
            (4, vec![1, 2, 2, 3, 5])
        );
        // When they are tokenised, the usable pairs of some of these rows are too long.
        for row in [1, 2, 2, 3, 5] {
            bad.add(RowIssue {
                row,
                id: None,
                field: "prompt".into(),
                reason: IssueReason::PromptFillsMaxLength,
                message: String::new(),
                of_model: false,
            });
        }
        assert_eq!(bad.rows(), 5, "only the second row was good");
    }

    #[test]
    fn rows_that_make_several_pairs_count_once() {
        let loaded = report(&[
            r#"{"prompt":"p","chosen":"a","rejected":["b","c","d"]}"#,
            r#"{"prompt":"q","chosen":"a","rejected":"b"}"#,
            r#"{"prompt":"q","chosen":"a","rejected":["b","a",""],"score":"s"}"#,
            r#"{"prompt":"q","chosen":" ","rejected":["b","c"]}"#,
            r#"{"chosen":"1 2","rejected":"1 3"}"#,
            r#"{"neither":1}"#,
        ]);
        let r = &loaded.report;
        assert_eq!((r.rows, r.valid_rows, r.bad_rows(), r.pairs), (6, 3, 3, 6));
        assert_eq!(
            loaded.rows.iter().map(|r| r.row).collect::<Vec<_>>(),
            [1, 1, 1, 2, 3, 5]
        );
        let shapes: Vec<(&str, u64)> = r
            .shapes
            .iter()
            .map(|(name, rows)| (name.as_str(), *rows))
            .collect();
        assert_eq!(
            shapes,
            [
                ("implicit_prompt_text", 1),
                ("preference", 1),
                ("several_rejected", 3)
            ]
        );
        let said: Vec<(u64, &str, IssueReason)> = r
            .issues
            .iter()
            .map(|i| (i.row, i.field.as_str(), i.reason))
            .collect();
        let expected = [
            (3, "score", IssueReason::IgnoredField),
            (3, "", IssueReason::DuplicatePair),
            (3, "rejected[1]", IssueReason::IdenticalAnswers),
            (3, "rejected[2]", IssueReason::EmptyCompletion),
            (4, "chosen", IssueReason::EmptyCompletion),
            (6, "chosen", IssueReason::MissingField),
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn an_unused_column_is_named_also_if_it_has_no_name() {
        let loaded = report(&[r#"{"prompt":"p","chosen":"a","rejected":"b","":"0"}"#]);
        let issue = &loaded.report.issues[0];
        assert_eq!(
            (&*issue.field, issue.reason),
            ("", IssueReason::IgnoredField)
        );
        let expected = "a column without a name is not used: ";
        assert!(issue.message.starts_with(expected), "{}", issue.message);
    }

    #[test]
    fn an_unused_column_of_a_row_without_a_prompt_may_hold_the_prompt() {
        let loaded = report(&[
            r#"{"chosen":"1 2","rejected":"1 3","question_text":"q"}"#,
            r#"{"prompt":"p","chosen":"a","rejected":"b","source":"s"}"#,
        ]);
        let has_remedy = |i: &RowIssue| i.message.contains("; if it holds the prompt, rename it");
        let said: Vec<(&str, bool)> = loaded
            .report
            .issues
            .iter()
            .map(|i| (&*i.field, has_remedy(i)))
            .collect();
        assert_eq!(said, [("question_text", true), ("source", false)]);
    }

    #[test]
    fn rows_without_reference_log_probs_are_counted_once() {
        let given = serde_json::json!({
            "prompt": "p", "chosen": "a", "rejected": "b",
            "ref_chosen_logps": -1, "ref_rejected_logps": -2,
        });
        let loaded = report(&[
            &given.to_string(),
            r#"{"prompt":"q","chosen":"a","rejected":["b","c"]}"#,
            r#"{"prompt":"r","chosen":"a","rejected":"b","ref_chosen_logps":-1}"#,
            r#"{"prompt":"s","chosen":"a","rejected":"a"}"#,
        ]);
        let logged = loaded.report.logged.unwrap();
        assert_eq!((logged.pairs, logged.rows_without), (1, 2));
        let first = logged.first_without.unwrap();
        assert_eq!((first.row, first.field.as_str()), (2, "ref_chosen_logps"));
        assert!(first.message.contains("are missing"), "{first:?}");
    }
}
