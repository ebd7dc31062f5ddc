//! Verdicts, the output and the report.

use serde_json::{Map, Value, json};

use super::folder::{FoldResult, FoldScore, ScoreFolder};
use super::index::{ContentHasher, IndexedRow, RowIndex};
use crate::cli::args::CurateArgs;
use crate::cli::data::{DataFiles, DataRecord};
use crate::cli::failure::Failure;
use crate::cli::output::table::elide;
use crate::cli::output::{line, table};
use crate::cli::synced_file::SyncedFile;
use crate::domain::dataset::{ChatMessage, Text};

/// Columns of the results. A row's own columns with these names are left out, also if the row has
/// no such result: in a file that is curated again they are old results.
const COLUMNS: [&str; 9] = [
    "fold",
    "out_of_fold_probability",
    "calibrated_probability",
    "margin",
    "pair",
    "verdict",
    "duplicate_of",
    "contradicts",
    "error",
];
/// Maximum number of suspicious rows in the report.
const MAX_SUSPICIOUS: usize = 100;
/// Maximum number of them in the table.
const MAX_SHOWN: usize = 10;
/// Width of a prompt in the table, so that the table fits 80 columns.
const PROMPT_WIDTH: usize = 40;
/// Maximum number of characters of a prompt in the report.
const MAX_PROMPT: usize = 200;

/// A guess about the label of a row, from its out-of-fold probability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Agrees,
    Doubtful,
    Flipped,
}

impl Verdict {
    const ALL: [Verdict; 3] = [Verdict::Agrees, Verdict::Doubtful, Verdict::Flipped];

    fn name(self) -> &'static str {
        match self {
            Verdict::Agrees => "agrees",
            Verdict::Doubtful => "doubtful",
            Verdict::Flipped => "probably_flipped",
        }
    }
}

/// Probabilities that divide the verdicts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thresholds {
    agrees_from: f64,
    flipped_below: f64,
}

impl Thresholds {
    /// Checks the thresholds of the command.
    ///
    /// # Errors
    /// Returns a failure that names the flag.
    pub fn new(args: &CurateArgs) -> Result<Self, Failure> {
        for (flag, value) in [
            ("agrees-from", args.agrees_from),
            ("flipped-below", args.flipped_below),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Failure::Usage(format!(
                    "--{flag} is {value}: it must be a probability between 0 and 1"
                )));
            }
        }
        if args.flipped_below > args.agrees_from {
            return Err(Failure::Usage(format!(
                "--agrees-from is {} and --flipped-below is {}: a row between them would be both; \
                 the defaults are 0.6 and 0.4",
                args.agrees_from, args.flipped_below
            )));
        }
        Ok(Thresholds {
            agrees_from: args.agrees_from,
            flipped_below: args.flipped_below,
        })
    }

    pub fn verdict(self, probability: f64) -> Verdict {
        match probability {
            p if p < self.flipped_below => Verdict::Flipped,
            p if p < self.agrees_from => Verdict::Doubtful,
            _ => Verdict::Agrees,
        }
    }
}

/// A row with a low margin.
#[derive(Clone, Debug)]
struct SuspiciousRow {
    row: u64,
    probability: f64,
    margin: f64,
    prompt: String,
}

/// Rows of a fold, and how many of them the adapter ranks as their label does.
#[derive(Clone, Copy, Debug, Default)]
struct FoldTally {
    scored: u64,
    /// Rows with a positive margin; a tie counts half.
    wins: f64,
}

impl FoldTally {
    fn accuracy(self) -> Option<f64> {
        (self.scored > 0).then(|| self.wins / self.scored as f64)
    }
}

/// Numbers about all rows.
#[derive(Debug)]
pub(super) struct CurationReport {
    thresholds: Thresholds,
    rows: u64,
    /// Number of rows with each of [`Verdict::ALL`].
    verdicts: [u64; 3],
    errors: u64,
    duplicates: u64,
    contradictions: u64,
    folds: Vec<FoldTally>,
    /// The rows with the lowest margins, lowest first.
    suspicious: Vec<SuspiciousRow>,
    /// Own columns of the rows that are left out, because results have the same names.
    pub left_out: Vec<&'static str>,
}

/// Writes every row with its result to `file` and returns the report.
///
/// # Errors
/// Returns a failure if a file cannot be read or written, or the rows are other ones than those
/// that were scored.
pub(super) fn write_rows(
    (data, index): (&DataFiles, &RowIndex),
    folder: &ScoreFolder,
    folds: u32,
    thresholds: Thresholds,
    file: &mut SyncedFile,
) -> Result<CurationReport, Failure> {
    let readers = (0..folds).map(|fold| folder.read_scores(fold));
    let mut readers: Vec<_> = readers.collect::<Result<_, _>>()?;
    let mut report = CurationReport::new(thresholds, folds);
    let mut content = ContentHasher::default();
    let mut indexed_rows = index.rows.iter();
    for record in data.records() {
        let record = record?;
        content.add(&record);
        let Some(indexed) = indexed_rows.next().filter(|row| row.row == record.row) else {
            return Err(changed(data));
        };
        let score = match &indexed.fold {
            Ok(fold) => {
                let next = readers.get_mut(*fold as usize).and_then(Iterator::next);
                let score = next.transpose()?.filter(|score| score.row == indexed.row);
                Some((*fold, score.ok_or_else(|| folder.lacks_a_row(*fold))?))
            }
            Err(_) => None,
        };
        let columns = report.add(&record, indexed, score);
        file.json_line(&columns)?;
    }
    match content.finish() == index.content {
        true => Ok(report),
        false => Err(changed(data)),
    }
}

fn changed(data: &DataFiles) -> Failure {
    Failure::Failed(format!(
        "{} has changed since the start: restore it to continue, or curate the new rows from the \
         beginning",
        data.title()
    ))
}

impl CurationReport {
    fn new(thresholds: Thresholds, folds: u32) -> Self {
        CurationReport {
            thresholds,
            rows: 0,
            verdicts: [0; 3],
            errors: 0,
            duplicates: 0,
            contradictions: 0,
            folds: vec![FoldTally::default(); folds as usize],
            suspicious: Vec::new(),
            left_out: Vec::new(),
        }
    }

    /// Counts a row and returns its columns with the results.
    fn add(
        &mut self,
        record: &DataRecord,
        indexed: &IndexedRow,
        score: Option<(u32, FoldScore)>,
    ) -> Map<String, Value> {
        let mut columns = record.columns.clone();
        for name in COLUMNS {
            if columns.shift_remove(name).is_some() && !self.left_out.contains(&name) {
                self.left_out.push(name);
            }
        }
        let mut set = |name: &str, value: Value| columns.insert(name.to_owned(), value);
        self.rows += 1;
        if let Ok(fold) = indexed.fold {
            set("fold", (fold + 1).into());
        }
        let error = match score {
            Some((fold, score)) => match score.result {
                FoldResult::Scored {
                    probability,
                    margin,
                    calibrated_probability,
                    pair,
                } => {
                    let verdict = self.thresholds.verdict(probability);
                    set("out_of_fold_probability", probability.into());
                    if let Some(calibrated) = calibrated_probability {
                        set("calibrated_probability", calibrated.into());
                    }
                    set("margin", margin.into());
                    if let Some(pair) = pair {
                        set("pair", pair.into());
                    }
                    set("verdict", verdict.name().into());
                    self.verdicts[verdict as usize] += 1;
                    self.count(fold, margin);
                    self.suspect(record, probability, margin);
                    None
                }
                FoldResult::Failed { error } => Some(error),
            },
            None => indexed.fold.clone().err(),
        };
        if let Some(row) = indexed.duplicate_of {
            self.duplicates += 1;
            set("duplicate_of", row.into());
        }
        if let Some(row) = indexed.contradicts {
            self.contradictions += 1;
            set("contradicts", row.into());
        }
        if let Some(error) = error {
            self.errors += 1;
            set("error", error.into());
        }
        columns
    }

    /// Adds a margin to the accuracy of its fold.
    fn count(&mut self, fold: u32, margin: f64) {
        if let Some(tally) = self.folds.get_mut(fold as usize) {
            tally.scored += 1;
            tally.wins += match margin {
                margin if margin > 0.0 => 1.0,
                0.0 => 0.5,
                _ => 0.0,
            };
        }
    }

    /// Lists a row among the suspicious ones, if its verdict is not `agrees` and its margin is one
    /// of the lowest.
    fn suspect(&mut self, record: &DataRecord, probability: f64, margin: f64) {
        if self.thresholds.verdict(probability) == Verdict::Agrees {
            return;
        }
        let place = self.suspicious.partition_point(|row| row.margin <= margin);
        if place < MAX_SUSPICIOUS {
            self.suspicious.truncate(MAX_SUSPICIOUS - 1);
            let row = SuspiciousRow {
                row: record.row,
                probability,
                margin,
                prompt: prompt(record),
            };
            self.suspicious.insert(place, row);
        }
    }

    /// Returns the number of rows with an error.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    fn total(&self) -> FoldTally {
        let add = |a: FoldTally, b: &FoldTally| FoldTally {
            scored: a.scored + b.scored,
            wins: a.wins + b.wins,
        };
        self.folds.iter().fold(FoldTally::default(), add)
    }

    /// Returns the report as JSON.
    pub fn to_json(&self, run: &str, model: &str) -> Value {
        let counts = Verdict::ALL.map(|v| (v.name().to_owned(), self.verdicts[v as usize].into()));
        let verdicts: Map<String, Value> = counts.into_iter().collect();
        let folds = self.folds.iter().enumerate();
        let folds: Vec<Value> = folds
            .map(|(i, fold)| {
                json!({"fold": i + 1, "scored": fold.scored, "accuracy": fold.accuracy()})
            })
            .collect();
        let suspicious = self.suspicious.iter();
        let suspicious: Vec<Value> = suspicious
            .map(|row| {
                json!({
                    "row": row.row,
                    "out_of_fold_probability": row.probability,
                    "margin": row.margin,
                    "prompt": row.prompt,
                })
            })
            .collect();
        json!({
            "curate": run,
            "model": model,
            "rows": self.rows,
            "verdicts": verdicts,
            "errors": self.errors,
            "duplicates": self.duplicates,
            "contradictions": self.contradictions,
            "accuracy": self.total().accuracy(),
            "agrees_from": self.thresholds.agrees_from,
            "flipped_below": self.thresholds.flipped_below,
            "folds": folds,
            "suspicious": suspicious,
        })
    }

    /// Prints the report for people.
    pub fn print(&self) {
        let share = |n: u64| format!("{:.1}%", 100.0 * n as f64 / self.rows.max(1) as f64);
        let row = |name: &str, n: u64, meaning: String| {
            vec![name.to_owned(), n.to_string(), share(n), meaning]
        };
        let Thresholds {
            agrees_from: high,
            flipped_below: low,
        } = self.thresholds;
        let [agrees, doubtful, flipped] = self.verdicts;
        let rows = vec![
            row("agrees", agrees, format!("probability from {high}")),
            row("doubtful", doubtful, format!("from {low}, below {high}")),
            row("probably flipped", flipped, format!("below {low}")),
            row("error", self.errors, "not scored".to_owned()),
            row("duplicate", self.duplicates, "of an earlier row".to_owned()),
            row(
                "contradiction",
                self.contradictions,
                "the opposite of another row".to_owned(),
            ),
        ];
        line(&table(&["verdict", "rows", "share", "meaning"], rows));
        if let Some(accuracy) = self.total().accuracy() {
            line(&format!(
                "{} rows, accuracy out of fold {:.1}% (ties count half)",
                self.rows,
                100.0 * accuracy
            ));
        }
        if self.suspicious.is_empty() {
            return;
        }
        let rows = self.suspicious.iter().take(MAX_SHOWN).map(|row| {
            vec![
                row.row.to_string(),
                format!("{:.3}", row.probability),
                format!("{:+.3}", row.margin),
                elide(&row.prompt, PROMPT_WIDTH),
            ]
        });
        line("the most suspicious rows:");
        line(&table(
            &["row", "Pr(chosen)", "margin", "prompt"],
            rows.collect(),
        ));
    }
}

/// Returns a row's prompt for people: of a dialogue, the last message.
fn prompt(record: &DataRecord) -> String {
    let first = record.pairs.as_ref().ok().and_then(|pairs| pairs.first());
    let text = match first.map(|pair| &pair.prompt) {
        Some(Text::Plain(text)) => text.clone(),
        Some(Text::Chat(messages)) => {
            let last = messages.last().map(ChatMessage::fields);
            match last.and_then(|fields| fields.get("content")) {
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
                None => String::new(),
            }
        }
        None => String::new(),
    };
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(MAX_PROMPT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_divide_the_verdicts() {
        let thresholds = Thresholds {
            agrees_from: 0.6,
            flipped_below: 0.4,
        };
        let verdict = |p: f64| thresholds.verdict(p).name();
        assert_eq!(
            [0.0, 0.399, 0.4, 0.5, 0.599, 0.6, 1.0].map(verdict),
            [
                "probably_flipped",
                "probably_flipped",
                "doubtful",
                "doubtful",
                "doubtful",
                "agrees",
                "agrees"
            ]
        );
    }

    #[test]
    fn results_of_an_earlier_curation_are_left_out() {
        let thresholds = Thresholds {
            agrees_from: 0.6,
            flipped_below: 0.4,
        };
        let mut report = CurationReport::new(thresholds, 2);
        let own = json!({"verdict": "agrees", "x": 1, "error": "old", "duplicate_of": 3});
        let record = DataRecord {
            row: 7,
            columns: own.as_object().unwrap().clone(),
            pairs: Ok(Vec::new()),
        };
        let mut indexed = IndexedRow {
            row: 7,
            fold: Err("new".to_owned()),
            duplicate_of: None,
            contradicts: None,
        };
        let failed = Value::Object(report.add(&record, &indexed, None));
        assert_eq!(failed, json!({"x": 1, "error": "new"}));
        indexed.fold = Ok(1);
        let score = FoldScore {
            row: 7,
            result: FoldResult::Scored {
                probability: 0.75,
                margin: 1.5,
                calibrated_probability: None,
                pair: None,
            },
        };
        let scored = Value::Object(report.add(&record, &indexed, Some((1, score))));
        let wanted = json!({
            "x": 1, "fold": 2, "out_of_fold_probability": 0.75, "margin": 1.5, "verdict": "agrees",
        });
        assert_eq!(scored, wanted);
        assert_eq!(report.left_out, ["verdict", "duplicate_of", "error"]);
    }

    #[test]
    fn the_rows_with_the_lowest_margins_are_listed_in_order() {
        let thresholds = Thresholds {
            agrees_from: 0.6,
            flipped_below: 0.4,
        };
        let mut report = CurationReport::new(thresholds, 1);
        for row in 0..3 * MAX_SUSPICIOUS as u64 {
            let record = DataRecord {
                row,
                columns: Map::new(),
                pairs: Ok(Vec::new()),
            };
            // The margins -299 to 0 in an irregular order; 7 has no common divisor with 300.
            let margin = -((row * 7 % 300) as f64);
            report.suspect(&record, 0.1, margin);
        }
        let margins: Vec<f64> = report.suspicious.iter().map(|row| row.margin).collect();
        let lowest: Vec<f64> = (0..MAX_SUSPICIOUS).map(|i| i as f64 - 299.0).collect();
        assert_eq!(margins, lowest);
    }
}
