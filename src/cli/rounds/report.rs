//! The report of a run, as text and as JSON.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::compare::{ComparedAnswers, NotCompared};
use crate::cli::failure::Failure;
use crate::cli::generate::shown;
use crate::cli::output::{self, wrap::wrapped};

/// Number of prompts whose answers a report has.
const MAX_SAMPLES: usize = 3;
/// Width of the text of answers, in columns, and maximum number of its lines.
const TEXT_WIDTH: usize = 68;
const MAX_LINES: usize = 4;
/// Width of sentences below the table, in columns.
const SENTENCE_WIDTH: usize = 79;

/// Numbers about the pairs of a round.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct RoundPairs {
    pub pairs: usize,
    /// Mean over the pairs of the difference of the rewards.
    pub mean_margin: f64,
}

/// The agreement of the new policy with pairs that it has not seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct HeldOutPairs {
    pub pairs: u64,
    /// Share of the pairs whose chosen answer has the larger reward.
    pub accuracy: f64,
}

/// A complete round, as report.json has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct RoundReport {
    /// Number of the round, from 1.
    pub round: u32,
    /// The policy that answered.
    pub policy: String,
    /// The checkpoint that the round has trained.
    pub new_policy: String,
    pub prompts: usize,
    #[serde(flatten)]
    pub pairs: RoundPairs,
    /// Number of prompts whose answers before and after were compared.
    pub compared: usize,
    #[serde(default)]
    pub not_compared: NotCompared,
    /// Share of the compared prompts that the new policy wins, with a tie as half; `None` without a
    /// comparison.
    pub win_rate: Option<f64>,
    /// Mean numbers of tokens of the answers to the first prompts.
    pub mean_tokens_before: f64,
    pub mean_tokens_after: f64,
    pub held_out: Option<HeldOutPairs>,
    /// The answers to the first prompts.
    pub samples: Vec<ComparedAnswers>,
}

impl RoundPairs {
    /// Reads the numbers from the pairs of a round.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be read or has other lines than pairs.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let failed = |reason: String| Failure::Failed(format!("{}: {reason}", path.display()));
        let text = fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        let mut pairs = 0;
        let mut margins = 0.0;
        for line in text.lines() {
            let pair: Value = serde_json::from_str(line).map_err(|e| failed(e.to_string()))?;
            pairs += 1;
            margins += pair["generated"]["margin"].as_f64().unwrap_or_default();
        }
        Ok(RoundPairs {
            pairs,
            mean_margin: mean(margins, pairs),
        })
    }
}

fn mean(sum: f64, count: usize) -> f64 {
    match count {
        0 => 0.0,
        n => sum / n as f64,
    }
}

/// Numbers about compared answers.
#[derive(Debug, PartialEq)]
pub(super) struct ComparisonSummary {
    pub compared: usize,
    pub not_compared: NotCompared,
    pub win_rate: Option<f64>,
    pub mean_tokens_before: f64,
    pub mean_tokens_after: f64,
    pub samples: Vec<ComparedAnswers>,
}

impl ComparisonSummary {
    /// Summarizes the answers to the first prompts.
    pub fn of(answers: &[ComparedAnswers]) -> Self {
        let wins: Vec<f64> = answers.iter().filter_map(ComparedAnswers::win).collect();
        let tokens = |of: fn(&ComparedAnswers) -> usize| {
            mean(answers.iter().map(of).sum::<usize>() as f64, answers.len())
        };
        ComparisonSummary {
            compared: wins.len(),
            not_compared: NotCompared::of(answers),
            win_rate: (!wins.is_empty()).then(|| mean(wins.iter().sum(), wins.len())),
            mean_tokens_before: tokens(|a| a.before.tokens),
            mean_tokens_after: tokens(|a| a.after.tokens),
            samples: answers.iter().take(MAX_SAMPLES).cloned().collect(),
        }
    }
}

/// Returns the reports of a run as a JSON object.
///
/// # Errors
/// Returns a failure if a report cannot be written as JSON.
pub(super) fn document(run: &str, reports: &[RoundReport]) -> Result<Value, Failure> {
    let rounds = rounds_json(reports)?;
    let policy = reports.last().map(|report| report.new_policy.as_str());
    Ok(json!({"run": run, "policy": policy, "rounds": rounds}))
}

/// Returns the reports without the samples, which have no place in a table.
///
/// # Errors
/// Returns a failure if a report cannot be written as JSON.
pub(super) fn rows(reports: &[RoundReport]) -> Result<Vec<Value>, Failure> {
    let mut rows = rounds_json(reports)?;
    for row in &mut rows {
        if let Value::Object(fields) = row {
            fields.remove("samples");
        }
    }
    Ok(rows)
}

fn rounds_json(reports: &[RoundReport]) -> Result<Vec<Value>, Failure> {
    let all: Result<Vec<Value>, serde_json::Error> =
        reports.iter().map(serde_json::to_value).collect();
    all.map_err(|e| Failure::Failed(format!("the report cannot be written: {e}")))
}

/// Returns the reports for people, with lines that fit 80 columns.
pub(super) fn text(reports: &[RoundReport]) -> String {
    let mut header = vec!["round", "pairs", "margin", "won", "tokens before", "after"];
    let has_held_out = reports.iter().any(|report| report.held_out.is_some());
    if has_held_out {
        header.push("held out");
    }
    let cells = |report: &RoundReport| {
        let mut cells = vec![
            report.round.to_string(),
            report.pairs.pairs.to_string(),
            format!("{:.3}", report.pairs.mean_margin),
            match report.win_rate {
                Some(share) => format!("{:.0}% of {}", 100.0 * share, report.compared),
                None => "-".to_owned(),
            },
            format!("{:.0}", report.mean_tokens_before),
            format!("{:.0}", report.mean_tokens_after),
        ];
        if has_held_out {
            cells.push(match &report.held_out {
                Some(held_out) => {
                    format!("{:.0}% of {}", 100.0 * held_out.accuracy, held_out.pairs)
                }
                None => "-".to_owned(),
            });
        }
        cells
    };
    let mut parts = vec![output::table(&header, reports.iter().map(cells).collect())];
    for sentence in reports.iter().filter_map(not_compared_sentence) {
        let lines = wrapped(&sentence, SENTENCE_WIDTH);
        parts.push(format!("\n{}", lines.join("\n")));
    }
    for report in reports {
        for (i, sample) in report.samples.iter().enumerate() {
            parts.push(format!("\nround {}, prompt {}", report.round, i + 1));
            let prompt = prompt_text(&sample.prompt);
            let (before, after) = (&sample.before.text, &sample.after.text);
            for (name, text) in [("prompt", &prompt), ("before", before), ("after", after)] {
                for (j, line) in first_lines(&shown(text)).into_iter().enumerate() {
                    let name = if j == 0 { name } else { "" };
                    parts.push(format!("  {name:<8}{line}").trim_end().to_owned());
                }
            }
        }
    }
    if let Some(last) = reports.last() {
        parts.push(format!("\nthe new policy: {}", last.new_policy));
    }
    parts.join("\n")
}

/// Says how many answers of a round could not be compared, and why; `None` if all were compared.
fn not_compared_sentence(report: &RoundReport) -> Option<String> {
    let NotCompared { blank, not_scored } = report.not_compared;
    let mut reasons = Vec::new();
    if blank > 0 {
        reasons.push(format!("{blank} because an answer is blank"));
    }
    if not_scored > 0 {
        reasons.push(format!(
            "{not_scored} because the judge cannot score an answer whole"
        ));
    }
    let total = report.not_compared.total();
    (total > 0).then(|| {
        format!(
            "round {}: the answers to {total} of {} prompts could not be compared, {}",
            report.round,
            report.compared + total,
            reasons.join(" and ")
        )
    })
}

/// Returns the text of a prompt; of a chat, that of the last message.
fn prompt_text(prompt: &Value) -> String {
    let last = match prompt {
        Value::Array(messages) => messages.last().map(|message| &message["content"]),
        other => Some(other),
    };
    match last {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    }
}

/// Breaks a text into at most [`MAX_LINES`] lines of [`TEXT_WIDTH`] columns; `…` at the end
/// stands for what does not fit. An empty text is one line.
fn first_lines(text: &str) -> Vec<String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut lines = wrapped(&words.join(" "), TEXT_WIDTH);
    if lines.len() > MAX_LINES {
        lines.truncate(MAX_LINES);
        if let Some(last) = lines.last_mut() {
            last.push('…');
        }
    }
    if lines.is_empty() {
        lines.push(String::new());
    }
    lines
}

#[cfg(test)]
mod tests {
    use unicode_width::UnicodeWidthStr;

    use super::super::compare::JudgedAnswer;
    use super::*;

    fn compared(text: &str, tokens: usize, reward: f64) -> ComparedAnswers {
        ComparedAnswers {
            prompt: json!([{"role": "user", "content": "What is it?"}]),
            before: JudgedAnswer {
                text: "old".into(),
                tokens: 2,
                reward: Some(0.0),
            },
            after: JudgedAnswer {
                text: text.into(),
                tokens,
                reward: Some(reward),
            },
        }
    }

    fn report(answers: &[ComparedAnswers]) -> RoundReport {
        let summary = ComparisonSummary::of(answers);
        RoundReport {
            round: 1,
            policy: "models/m".into(),
            new_policy: "trainingJobs/j/checkpoints/4".into(),
            prompts: 9,
            pairs: RoundPairs {
                pairs: 7,
                mean_margin: 0.25,
            },
            compared: summary.compared,
            not_compared: summary.not_compared,
            win_rate: summary.win_rate,
            mean_tokens_before: summary.mean_tokens_before,
            mean_tokens_after: summary.mean_tokens_after,
            held_out: None,
            samples: summary.samples,
        }
    }

    #[test]
    fn wins_and_lengths_are_means_over_the_prompts() {
        let answers = [
            compared("new", 4, 1.0),
            compared("old", 2, 0.0),
            compared("worse", 6, -1.0),
            compared("better", 8, 1.0),
        ];
        let summary = ComparisonSummary::of(&answers);
        assert_eq!((summary.compared, summary.win_rate), (4, Some(0.625)));
        assert_eq!(summary.mean_tokens_before, 2.0);
        assert_eq!(summary.mean_tokens_after, 5.0);
        assert_eq!(summary.samples, answers[..3]);
        let none = ComparisonSummary::of(&[]);
        assert_eq!((none.compared, none.win_rate), (0, None));
    }

    #[test]
    fn the_text_fits_80_columns_and_the_json_is_read_again() {
        let long = "word ".repeat(200);
        let whole = report(&[compared(&long, 200, 1.0), compared("", 0, -1.0)]);
        let text = text(std::slice::from_ref(&whole));
        assert!(text.lines().all(|line| line.width() <= 80), "{text}");
        for part in ["50% of 2", "What is it?", "…", "checkpoints/4"] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let json = document("r", std::slice::from_ref(&whole)).unwrap();
        assert_eq!(json["rounds"][0]["pairs"], 7);
        assert_eq!(json["rounds"][0]["samples"][0]["after"]["tokens"], 200);
        let read: RoundReport = serde_json::from_value(json["rounds"][0].clone()).unwrap();
        assert_eq!(read, whole);
        let rows = rows(std::slice::from_ref(&whole)).unwrap();
        assert_eq!(rows[0]["samples"], Value::Null);
    }

    #[test]
    fn answers_that_could_not_be_compared_are_counted_with_the_reason() {
        let blank = compared("b", 1, 1.0);
        let all = [
            compared("better", 2, 1.0),
            ComparedAnswers {
                after: JudgedAnswer {
                    text: " ".into(),
                    tokens: 1,
                    reward: None,
                },
                ..blank.clone()
            },
            ComparedAnswers {
                after: JudgedAnswer {
                    text: "too long".into(),
                    tokens: 9,
                    reward: None,
                },
                ..blank
            },
        ];
        let whole = report(&all);
        let text = text(std::slice::from_ref(&whole));
        let words: Vec<&str> = text.split_whitespace().collect();
        let sentence = "round 1: the answers to 2 of 3 prompts could not be compared, 1 because an \
                        answer is blank and 1 because the judge cannot score an answer whole";
        assert!(words.join(" ").contains(sentence), "{text}");
        assert!(text.lines().all(|line| line.width() <= 80), "{text}");
        let json = document("r", std::slice::from_ref(&whole)).unwrap();
        assert_eq!(
            json["rounds"][0]["not_compared"],
            json!({"blank": 1, "not_scored": 1})
        );
        let all_compared = report(&all[..1]);
        assert_eq!(not_compared_sentence(&all_compared), None);
    }

    #[test]
    fn a_long_text_has_its_first_lines_also_without_spaces() {
        assert_eq!(first_lines(" a\n b "), ["a b"]);
        assert_eq!(first_lines(""), [""]);
        let many = first_lines(&"word ".repeat(200));
        assert_eq!(many.len(), MAX_LINES);
        assert!(many[MAX_LINES - 1].ends_with("word…"));
        let chinese = first_lines(&"水".repeat(500));
        let widths: Vec<usize> = chinese.iter().map(|line| line.width()).collect();
        assert_eq!(widths, [68, 68, 68, 69]);
    }
}
