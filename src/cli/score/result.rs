//! Results of scored rows: how they are printed, and their averages.

use std::io::Write;

use serde_json::{Value, json};

use crate::cli::args::Output;
use crate::cli::output::table::elide;
use crate::cli::output::{flat, stream_item};
use crate::domain::violation::counted;
use crate::rpc::pb;

/// Maximum number of errors that are listed one by one.
const MAX_LISTED_ERRORS: usize = 20;
/// Number of errors that are listed if all say that a column is missing.
const SAME_ERRORS: usize = 3;

/// Width of the table's columns before the name of a pair, with the spaces behind them: those that
/// it always has, the rewards, and calibrated probabilities.
const WIDTH: usize = 12 + 11 + 11;
const REWARDS_WIDTH: usize = 15 + 17;
const CALIBRATED_WIDTH: usize = 12;
/// Minimum width for the name of a pair. If a terminal has less room, the rewards are left out.
const MIN_NAME: usize = 8;

/// Columns of CSV.
const CSV_COLUMNS: [&str; 19] = [
    "row",
    "id",
    "pair",
    "probability",
    "calibrated_probability",
    "margin",
    "normalization",
    "policy_version",
    "chosen.policy_logprob",
    "chosen.reference_logprob",
    "chosen.reward",
    "chosen.tokens",
    "chosen.truncated",
    "rejected.policy_logprob",
    "rejected.reference_logprob",
    "rejected.reward",
    "rejected.tokens",
    "rejected.truncated",
    "error",
];

/// A row of the files, with its score.
#[derive(Clone, Debug)]
pub(crate) struct ScoredRow {
    /// Number of the row, from 1 and through all files.
    pub row: u64,
    /// Number of the pair within the row, from 1, if the row makes several pairs.
    pub pair: Option<u32>,
    /// Id that the row has in the file.
    pub id: Option<String>,
    /// Columns of the row that are not used.
    pub ignored: Vec<String>,
    /// The column that the row lacks, if this is why it has no score.
    pub missing_column: Option<String>,
    /// True if the server, not the row, is the reason why it has no score.
    pub of_server: bool,
    /// The score, or the reason why there is none.
    pub result: Result<Score, String>,
}

/// The score of a row.
#[derive(Clone, Debug, Default)]
pub(crate) struct Score {
    /// Probability, margin and rewards.
    pub pair: pb::PairScore,
    /// Name of the weights that scored.
    pub policy_version: String,
    /// The normalization of the rewards that was used.
    pub normalization: pb::RewardNormalization,
}

impl ScoredRow {
    /// Returns the row's id. Without an id it returns the row's number, with the pair's number if
    /// the row makes several pairs: `7#2`.
    fn name(&self) -> String {
        match (&self.id, self.pair) {
            (Some(id), _) => id.clone(),
            (None, Some(pair)) => format!("{}#{pair}", self.row),
            (None, None) => self.row.to_string(),
        }
    }

    /// Describes the error for people; `None` if the row has a score.
    fn error(&self) -> Option<String> {
        let error = self.result.as_ref().err()?;
        let pair = self.pair.map(|pair| format!(", pair {pair}"));
        let id = self.id.as_ref().map(|id| format!(" (id {id:?})"));
        let (pair, id) = (pair.unwrap_or_default(), id.unwrap_or_default());
        Some(format!("row {}{pair}{id}: {error}", self.row))
    }
}

/// Returns the name of a normalization in `--normalization`.
pub(super) fn normalization_name(normalization: pb::RewardNormalization) -> &'static str {
    match normalization {
        pb::RewardNormalization::Sum => "sum",
        pb::RewardNormalization::Mean => "mean",
        pb::RewardNormalization::AsTrained | pb::RewardNormalization::Unspecified => "as_trained",
    }
}

/// Prints rows one by one, as they are scored.
pub(super) struct RowPrinter<W> {
    out: W,
    output: Output,
    /// Width of the terminal; `None` without one.
    width: Option<usize>,
    has_header: bool,
    /// True if the table has a column for calibrated probabilities, as its first row has one.
    is_calibrated: bool,
    /// The first errors, which are listed below a table.
    errors: Vec<String>,
    /// Names of the columns with the answers, as the files have them.
    answer_columns: [String; 2],
    /// True unless a row has an error for another reason than a missing answer.
    lack_answers: bool,
    /// True unless a row has an error for another reason than a missing prompt.
    lack_prompts: bool,
}

impl<W: Write> RowPrinter<W> {
    /// Returns a printer for a terminal of this width; without one, tables are as wide as needed.
    pub fn new(out: W, output: Output, width: Option<usize>) -> Self {
        RowPrinter {
            out,
            output,
            width,
            has_header: false,
            is_calibrated: false,
            errors: Vec::new(),
            answer_columns: ["chosen", "rejected"].map(str::to_owned),
            lack_answers: true,
            lack_prompts: true,
        }
    }

    /// Takes other names of the columns with the answers.
    pub fn with_answer_columns(self, answer_columns: [String; 2]) -> Self {
        RowPrinter {
            answer_columns,
            ..self
        }
    }

    /// Prints one row.
    ///
    /// # Errors
    /// Returns an error if nobody reads the output any more.
    pub fn print(&mut self, row: &ScoredRow) -> std::io::Result<()> {
        match self.output {
            Output::Table => {}
            Output::Csv => {
                let cells = Value::from_iter(flat::fields(&to_json(row)));
                let lines = flat::csv(Some(&CSV_COLUMNS), &[cells]);
                let without_header = || lines.split_once('\n').map_or("", |(_, rest)| rest);
                let lines = match std::mem::replace(&mut self.has_header, true) {
                    true => without_header(),
                    false => &lines,
                };
                self.out.write_all(lines.as_bytes())?;
                return self.out.flush();
            }
            Output::Json | Output::Yaml => {
                let item = stream_item(self.output, &to_json(row));
                self.out.write_all(item.as_bytes())?;
                return self.out.flush();
            }
        }
        match &row.result {
            Ok(score) => {
                if !self.has_header {
                    self.has_header = true;
                    self.is_calibrated = score.pair.calibrated_probability.is_some();
                    let title = self.is_calibrated.then_some("calibrated");
                    let probabilities = probability_cells("Pr(chosen)", title);
                    let rewards = self.has_rewards();
                    writeln!(self.out, "{probabilities}  {}", table_header(rewards))?;
                }
                let cell = |probability: Option<f64>| {
                    probability.map_or_else(|| "-".to_owned(), |p| format!("{p:.4}"))
                };
                let raw = cell(Some(score.pair.probability));
                let calibrated = cell(score.pair.calibrated_probability);
                let calibrated = self.is_calibrated.then_some(&*calibrated);
                let probabilities = probability_cells(&raw, calibrated);
                let name = elide(&row.name(), self.name_width());
                let others = table_row(&name, &score.pair, self.has_rewards());
                writeln!(self.out, "{probabilities}  {others}")?;
            }
            Err(_) => {
                let missing = row.missing_column.as_ref();
                self.lack_answers &= missing.is_some_and(|c| self.answer_columns.contains(c));
                self.lack_prompts &= missing.is_some_and(|c| c == "prompt");
                if self.errors.len() < MAX_LISTED_ERRORS {
                    self.errors.extend(row.error());
                }
            }
        }
        self.out.flush()
    }

    /// Returns the width that is left for rewards and names, if it is limited.
    fn room(&self) -> Option<usize> {
        let used = WIDTH + usize::from(self.is_calibrated) * CALIBRATED_WIDTH;
        self.width.map(|width| width.saturating_sub(used))
    }

    /// Returns true if the rewards fit.
    fn has_rewards(&self) -> bool {
        self.room()
            .is_none_or(|room| room >= REWARDS_WIDTH + MIN_NAME)
    }

    /// Returns the maximum width of a pair's name.
    fn name_width(&self) -> usize {
        let rewards = usize::from(self.has_rewards()) * REWARDS_WIDTH;
        self.room().map_or(usize::MAX, |room| {
            room.saturating_sub(rewards).max(MIN_NAME)
        })
    }

    /// Prints the averages below a table.
    ///
    /// # Errors
    /// Returns an error if nobody reads the output any more.
    pub fn summary(&mut self, summary: &Summary) -> std::io::Result<()> {
        if self.output == Output::Table {
            writeln!(self.out, "{}", summary.line())?;
        }
        Ok(())
    }

    /// Returns true if every row with an error lacks the column of an answer.
    pub fn lacks_columns(&self) -> bool {
        !self.errors.is_empty() && self.lack_answers
    }

    /// Returns true if every row with an error lacks the column `prompt`.
    pub fn lacks_prompts(&self) -> bool {
        !self.errors.is_empty() && self.lack_prompts
    }

    /// Returns the lines that list the first errors; `failed` is the number of all.
    pub fn errors(&self, failed: u64) -> Vec<String> {
        let mut lines = self.errors.clone();
        if failed > SAME_ERRORS as u64 && self.lacks_columns() {
            // Rows of one file usually lack the same column, which need not be said often.
            lines.truncate(SAME_ERRORS);
        }
        let more = failed.saturating_sub(lines.len() as u64);
        if !lines.is_empty() && more > 0 {
            lines.push(format!("and {more} more; --format json shows all of them"));
        }
        lines
    }
}

fn to_json(row: &ScoredRow) -> Value {
    let mut line = json!({"row": row.row});
    if let Some(id) = &row.id {
        line["id"] = id.clone().into();
    }
    if let Some(pair) = row.pair {
        line["pair"] = pair.into();
    }
    match &row.result {
        Ok(score) => {
            line["probability"] = score.pair.probability.into();
            if let Some(calibrated) = score.pair.calibrated_probability {
                line["calibrated_probability"] = calibrated.into();
            }
            line["margin"] = score.pair.margin.into();
            line["normalization"] = normalization_name(score.normalization).into();
            line["policy_version"] = score.policy_version.clone().into();
            if score.pair.logged {
                line["logged"] = true.into();
            }
            line["chosen"] = answer(score.pair.a.as_ref());
            line["rejected"] = answer(score.pair.b.as_ref());
        }
        Err(message) => line["error"] = message.clone().into(),
    }
    line
}

/// Returns the score of one answer as JSON. Log-probs of tokens are there if they were requested.
fn answer(score: Option<&pb::CompletionScore>) -> Value {
    let c = score.cloned().unwrap_or_default();
    let mut all = json!({
        "policy_logprob": c.policy_logprob,
        "reference_logprob": c.reference_logprob,
        "reward": c.reward,
        "tokens": c.tokens,
        "prompt_tokens": c.prompt_tokens,
        "truncated": c.truncated,
    });
    if !c.token_ids.is_empty() {
        all["token_ids"] = json!(c.token_ids);
        all["policy_token_logprobs"] = json!(c.policy_token_logprobs);
        all["reference_token_logprobs"] = json!(c.reference_token_logprobs);
    }
    all
}

/// Returns the first cells of a line of the table. Its columns have fixed widths, because rows are
/// printed before the later ones are known. The name is last, because its length differs.
fn probability_cells(raw: &str, calibrated: Option<&str>) -> String {
    match calibrated {
        Some(calibrated) => format!("{raw:>10}  {calibrated:>10}"),
        None => format!("{raw:>10}"),
    }
}

/// Returns the header of the table behind its first cells.
fn table_header(has_rewards: bool) -> String {
    let rewards = match has_rewards {
        true => format!("{:>13}  {:>15}  ", "reward chosen", "reward rejected"),
        false => String::new(),
    };
    format!("{:>9}  {rewards}{:>9}  pair", "margin", "tokens")
}

fn table_row(name: &str, score: &pb::PairScore, has_rewards: bool) -> String {
    let default = pb::CompletionScore::default();
    let (a, b) = (
        score.a.as_ref().unwrap_or(&default),
        score.b.as_ref().unwrap_or(&default),
    );
    let rewards = match has_rewards {
        true => format!("{:>+13.4}  {:>+15.4}  ", a.reward, b.reward),
        false => String::new(),
    };
    let tokens = format!("{}+{}", a.tokens, b.tokens);
    format!("{:>+9.4}  {rewards}{tokens:>9}  {name}", score.margin)
}

/// Sums over the rows that have a score. Answer a of each pair is the preferred one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Summary {
    /// Number of rows with a score.
    scored: u64,
    /// Number of rows without a score.
    failed: u64,
    /// Number of those rows for which the server is the reason.
    failed_at_server: u64,
    /// Number of answers that were longer than the maximum length.
    truncated: u64,
    /// Number of pairs with a positive margin; a tie counts half.
    wins: f64,
    probabilities: f64,
    margins: f64,
    normalization: pb::RewardNormalization,
}

impl Summary {
    /// Adds a row.
    pub fn add(&mut self, row: &ScoredRow) {
        let Ok(score) = &row.result else {
            self.failed += 1;
            self.failed_at_server += u64::from(row.of_server);
            return;
        };
        let pair = &score.pair;
        self.scored += 1;
        self.normalization = score.normalization;
        self.probabilities += pair.probability;
        self.margins += pair.margin;
        self.wins += match pair.margin {
            margin if margin > 0.0 => 1.0,
            0.0 => 0.5,
            _ => 0.0,
        };
        let answers = pair.a.iter().chain(&pair.b);
        self.truncated += answers.filter(|answer| answer.truncated).count() as u64;
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.scored.max(1) as f64
    }

    /// Returns the share of pairs with a positive margin; a tie counts half.
    pub fn accuracy(&self) -> f64 {
        self.mean(self.wins)
    }

    /// Returns the mean of Pr(a ≻ b).
    pub fn probability(&self) -> f64 {
        self.mean(self.probabilities)
    }

    /// Returns the mean margin.
    pub fn margin(&self) -> f64 {
        self.mean(self.margins)
    }

    /// Returns the number of rows without a score.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Returns the number of rows without a score for which the server is the reason.
    pub fn failed_at_server(&self) -> u64 {
        self.failed_at_server
    }

    /// Returns the number of all rows.
    pub fn rows(&self) -> u64 {
        self.scored + self.failed
    }

    fn line(&self) -> String {
        if self.scored == 0 {
            let failed = counted(self.failed, "row");
            return format!("no pair has a score; {failed} without one");
        }
        format!(
            "{}: accuracy {:.1}% (ties count half), mean probability {:.3}, mean margin {:+.3}; \
             rewards are {}s over tokens; {} without a score, {}",
            counted(self.scored, "pair"),
            100.0 * self.accuracy(),
            self.probability(),
            self.margin(),
            normalization_name(self.normalization),
            counted(self.failed, "row"),
            counted(self.truncated, "truncated answer")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(number: u64, result: Result<f64, &str>) -> ScoredRow {
        let score = |margin| Score {
            pair: pb::PairScore {
                margin,
                probability: 0.5,
                a: Some(pb::CompletionScore {
                    truncated: number == 1,
                    prompt_tokens: 7,
                    ..Default::default()
                }),
                b: Some(pb::CompletionScore::default()),
                ..Default::default()
            },
            policy_version: "models/m".to_owned(),
            normalization: pb::RewardNormalization::Sum,
        };
        ScoredRow {
            row: number,
            pair: None,
            id: None,
            ignored: Vec::new(),
            missing_column: None,
            of_server: false,
            result: result.map(score).map_err(str::to_owned),
        }
    }

    fn printed(output: Output, rows: &[ScoredRow]) -> (String, Vec<String>) {
        let mut printer = RowPrinter::new(Vec::new(), output, None);
        let mut summary = Summary::default();
        for row in rows {
            printer.print(row).unwrap();
            summary.add(row);
        }
        printer.summary(&summary).unwrap();
        let errors = printer.errors(summary.failed());
        (String::from_utf8(printer.out).unwrap(), errors)
    }

    #[test]
    fn a_table_has_scores_only_and_the_errors_are_listed_apart() {
        let mut rows = vec![row(1, Ok(2.0)), row(2, Err("too long")), row(3, Ok(0.0))];
        let (table, errors) = printed(Output::Table, &rows);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4, "{table}");
        assert!(
            lines[0].ends_with("pair") && lines[1].ends_with("  1"),
            "{table}"
        );
        assert!(
            lines[3].contains("2 pairs: accuracy 75.0% (ties count half)")
                && lines[3].ends_with("1 row without a score, 1 truncated answer"),
            "{table}"
        );
        assert_eq!(errors, ["row 2: too long"]);
        let of_several = ScoredRow {
            pair: Some(3),
            id: Some("x".to_owned()),
            ..row(7, Err("too long"))
        };
        let (_, errors) = printed(Output::Table, &[of_several]);
        assert_eq!(errors, ["row 7, pair 3 (id \"x\"): too long"]);
        rows.extend((4..40).map(|i| row(i, Err("too long"))));
        let (_, errors) = printed(Output::Table, &rows);
        assert_eq!(errors.len(), MAX_LISTED_ERRORS + 1);
        assert!(
            errors[MAX_LISTED_ERRORS].starts_with("and 17 more"),
            "{errors:?}"
        );
    }

    #[test]
    fn errors_about_a_missing_answer_are_listed_a_few_times() {
        let lacking = |column: &str| ScoredRow {
            missing_column: Some(column.to_owned()),
            ..row(1, Err("it is missing"))
        };
        let rows: Vec<ScoredRow> = (0..9).map(|_| lacking("rejected")).collect();
        let (_, errors) = printed(Output::Table, &rows);
        assert_eq!(errors.len(), SAME_ERRORS + 1, "{errors:?}");
        let of_prompts: Vec<ScoredRow> = (0..9).map(|_| lacking("prompt")).collect();
        let (_, errors) = printed(Output::Table, &of_prompts);
        assert_eq!(errors.len(), 9, "{errors:?}");
        let mut printer = RowPrinter::new(Vec::new(), Output::Table, None);
        assert!(!printer.lacks_prompts());
        printer.print(&lacking("prompt")).unwrap();
        assert!(printer.lacks_prompts() && !printer.lacks_columns());
        printer.print(&row(2, Err("too long"))).unwrap();
        assert!(!printer.lacks_prompts());
    }

    #[test]
    fn calibrated_probabilities_have_a_column_where_they_exist() {
        let mut rows = [row(1, Ok(2.0)), row(2, Ok(1.0)), row(3, Err("too long"))];
        let (raw, _) = printed(Output::Table, &rows);
        assert!(!raw.contains("calibrated"), "{raw}");
        let (csv, _) = printed(Output::Csv, &rows);
        assert!(csv.contains("\n1,,,0.5,,2"), "{csv}");
        if let Ok(score) = &mut rows[0].result {
            score.pair.calibrated_probability = Some(0.75);
        }
        let (table, _) = printed(Output::Table, &rows);
        let lines: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines[0][..3], ["Pr(chosen)", "calibrated", "margin"]);
        assert_eq!(lines[1][..3], ["0.5000", "0.7500", "+2.0000"]);
        assert_eq!(lines[2][..3], ["0.5000", "-", "+1.0000"]);
        let (csv, _) = printed(Output::Csv, &rows);
        let lines: Vec<&str> = csv.lines().collect();
        assert!(
            lines[0].starts_with("row,id,pair,probability,calibrated_probability,margin,"),
            "{csv}"
        );
        assert!(lines[1].starts_with("1,,,0.5,0.75,2"), "{csv}");
        assert!(lines[2].starts_with("2,,,0.5,,1"), "{csv}");
        assert!(lines[3].starts_with("3,,,,,,"), "{csv}");
    }

    #[test]
    fn a_table_fits_the_terminal() {
        let mut rows = [row(1, Ok(2.0)), row(2, Ok(1.0))];
        rows[1].id = Some("0193c8e4-7a3f-7000-8000-000000000000".to_owned());
        let table = |rows: &[ScoredRow], width| {
            let mut printer = RowPrinter::new(Vec::new(), Output::Table, Some(width));
            for row in rows {
                printer.print(row).unwrap();
            }
            let text = String::from_utf8(printer.out).unwrap();
            let widest = text.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(width), "{text}");
            text
        };
        let narrow = table(&rows, 80);
        assert!(narrow.contains("reward rejected"), "{narrow}");
        assert!(narrow.contains("0193c8e…000000"), "{narrow}");
        assert!(table(&rows, 120).contains("-8000-000000000000"));
        for row in &mut rows {
            if let Ok(score) = &mut row.result {
                score.pair.calibrated_probability = Some(0.75);
            }
        }
        let narrow = table(&rows, 80);
        assert!(!narrow.contains("reward"), "{narrow}");
        assert!(table(&rows, 120).contains("reward rejected"));
    }

    #[test]
    fn yaml_is_one_list_of_all_rows() {
        let rows = [row(1, Ok(2.0)), row(2, Err("too long"))];
        let (text, _) = printed(Output::Yaml, &rows);
        let list = crate::rpc::canonical::value_of_yaml(&text).unwrap();
        assert_eq!(list.as_array().map(Vec::len), Some(2), "{text}");
        assert_eq!(
            (&list[0]["margin"], &list[1]),
            (&json!(2.0), &json!({"row": 2, "error": "too long"}))
        );
    }

    #[test]
    fn json_lines_have_rows_of_both_kinds() {
        let rows = [row(1, Ok(2.0)), row(2, Err("too long"))];
        let (lines, errors) = printed(Output::Json, &rows);
        let lines: Vec<Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(
            (&lines[0]["row"], &lines[0]["margin"]),
            (&json!(1), &json!(2.0))
        );
        assert_eq!(lines[0]["chosen"]["prompt_tokens"], 7);
        assert_eq!(lines[0]["policy_version"], "models/m");
        assert_eq!(lines[1], json!({"row": 2, "error": "too long"}));
        assert_eq!(errors, ["row 2: too long"; 0]);
    }
}
