//! A report as tables of at most 80 columns.

use unicode_width::UnicodeWidthStr;

use crate::cli::output::{self, table::elide};
use crate::cli::score::row_error;
use crate::domain::violation::counted;
use crate::rpc::pb;

const WIDTH: usize = 80;
/// Maximum width of names in the tables.
const MAX_NAME: usize = 34;
/// Maximum width of the names of weights, and of the dataset or its files.
const MAX_VERSION: usize = 68;

/// Returns the report for people.
pub(super) fn tables(report: &pb::EvaluationReport) -> String {
    let mut parts = vec![heading(report)];
    parts.push(output::table(
        &["", "n", "won", "95 % interval"],
        shares(report),
    ));
    if let Some(table) = figures(report) {
        parts.push(table);
    }
    if let Some(calibration) = &report.calibration {
        parts.push(calibrated(calibration));
    }
    parts.join("\n")
}

/// Returns lines about the first pairs without a score.
pub(super) fn errors(report: &pb::EvaluationReport) -> Vec<String> {
    let line = |e: &pb::EvaluationError| {
        let pair = match e.pair {
            0 => String::new(),
            pair => format!(", pair {pair}"),
        };
        let id = match e.id.as_str() {
            "" => String::new(),
            id => format!(" (id {id:?})"),
        };
        format!("row {}{pair}{id}: {}", e.row, row_error(&e.message))
    };
    let mut lines: Vec<String> = report.errors.iter().map(line).collect();
    match report.failed_pairs.saturating_sub(lines.len() as u64) {
        0 => {}
        more => lines.push(format!("and {more} more")),
    }
    lines
}

fn heading(report: &pb::EvaluationReport) -> String {
    let normalization = match report.normalization() {
        pb::RewardNormalization::Mean => "means",
        _ => "sums",
    };
    let mut lines = vec![
        format!("policy     {}", elide(&report.policy_version, MAX_VERSION)),
        format!(
            "reference  {}",
            match report.reference_version.as_str() {
                "" => "none".to_owned(),
                name => elide(name, MAX_VERSION),
            }
        ),
        format!(
            "rewards    {normalization} over tokens, beta {}",
            report.beta
        ),
        format!("data       {}", elide(&report.dataset, MAX_VERSION)),
        format!(
            "           {}, {} scored, {} without a score",
            counted(report.rows, "row"),
            counted(report.pairs, "pair"),
            report.failed_pairs
        ),
    ];
    if report.truncated_answers > 0 {
        let answers = counted(report.truncated_answers, "answer");
        let were = match report.truncated_answers {
            1 => "was",
            _ => "were",
        };
        lines.push(format!(
            "           {answers} {were} truncated at the maximum length"
        ));
    }
    lines.join("\n")
}

fn shares(report: &pb::EvaluationReport) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut add = |name: &str, rate: Option<&pb::WinRate>| {
        let Some(rate) = rate.filter(|rate| rate.count > 0) else {
            return;
        };
        rows.push(vec![
            elide(name, MAX_NAME),
            rate.count.to_string(),
            format!("{:.1} %", 100.0 * rate.share),
            format!("{:.1} – {:.1} %", 100.0 * rate.lower, 100.0 * rate.upper),
        ]);
    };
    add("accuracy (pairs)", report.accuracy.as_ref());
    add("best of N (rows)", report.best_of_n.as_ref());
    add("agreement with given scores", report.agreement.as_ref());
    for subset in &report.subsets {
        let name = match subset.subset.as_str() {
            "" => "(none)",
            name => name,
        };
        add(&format!("subset {name}"), subset.accuracy.as_ref());
        if subset.best_of_n.is_some() {
            add(&format!("  best of N, {name}"), subset.best_of_n.as_ref());
        }
    }
    for range in &report.by_length {
        let name = match (range.from_tokens, range.to_tokens) {
            (None, Some(to)) => format!("chosen − rejected ≤ {to} tokens"),
            (Some(from), None) => format!("chosen − rejected ≥ {from} tokens"),
            (Some(from), Some(to)) => format!("chosen − rejected {from} … {to}"),
            (None, None) => "any length".to_owned(),
        };
        add(&name, range.accuracy.as_ref());
    }
    rows
}

fn figures(report: &pb::EvaluationReport) -> Option<String> {
    let p = report.probability.as_ref()?;
    let rows = [
        ("mean margin", format!("{:+.4}", report.mean_margin)),
        ("mean Pr(chosen)", format!("{:.4}", report.mean_probability)),
        ("AUC", format!("{:.4}", p.auc)),
        ("Brier score", format!("{:.4}", p.brier)),
        ("log loss (nats)", format!("{:.4}", p.log_loss)),
        (
            "calibration error (ECE)",
            format!("{:.4} in {} bins", p.ece, p.bins.len()),
        ),
    ];
    let rows = rows.map(|(name, value)| vec![name.to_owned(), value]);
    Some(output::table(&["Pr = σ(margin)", "value"], rows.to_vec()))
}

fn calibrated(calibration: &pb::CalibrationReport) -> String {
    let (Some(before), Some(after)) = (&calibration.before, &calibration.after) else {
        return wrapped(&format!("no calibration: {}", calibration.problem));
    };
    let rows = [
        ("calibration error (ECE)", before.ece, after.ece),
        ("log loss (nats)", before.log_loss, after.log_loss),
        ("Brier score", before.brier, after.brier),
        ("AUC", before.auc, after.auc),
    ];
    let rows = rows.map(|(name, before, after)| {
        vec![
            name.to_owned(),
            format!("{before:.4}"),
            format!("{after:.4}"),
        ]
    });
    let table = output::table(&["held-out half", "Pr", "calibrated"], rows.to_vec());
    format!(
        "{table}\ncalibration: temperature {:.4}, length coefficient {:+.6} per token,\nfitted on \
         {} pairs, judged on {} others{}",
        calibration.temperature,
        calibration.length_coefficient,
        calibration.fitted_pairs,
        calibration.judged_pairs,
        match calibration.saved {
            true => ", and saved with the checkpoint",
            false => "",
        }
    )
}

/// Breaks a text into lines of at most [`WIDTH`] columns.
fn wrapped(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.width() + 1 + word.width() <= WIDTH => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_fit_80_columns() {
        let rate = Some(pb::WinRate {
            count: 12_345_678,
            share: 1.0,
            lower: 0.999,
            upper: 1.0,
        });
        let id = "0193c8e4-7a3f-7000-8000-0123456789ab";
        let report = pb::EvaluationReport {
            dataset: format!("datasets/{id}"),
            rows: 12_345_678,
            pairs: 12_345_678,
            failed_pairs: 12_345_678,
            truncated_answers: 5,
            accuracy: rate,
            agreement: rate,
            subsets: vec![pb::SubsetReport {
                subset: "a very long name of a subset, ".repeat(5),
                accuracy: rate,
                best_of_n: rate,
            }],
            by_length: vec![pb::LengthReport {
                from_tokens: Some(-100),
                to_tokens: Some(-21),
                accuracy: rate,
            }],
            probability: Some(pb::ProbabilityReport::default()),
            calibration: Some(pb::CalibrationReport {
                before: Some(pb::ProbabilityReport::default()),
                after: Some(pb::ProbabilityReport::default()),
                ..Default::default()
            }),
            policy_version: format!("trainingJobs/{id}/checkpoints/100000"),
            reference_version: format!("trainingJobs/{id}/checkpoints/100000/reference"),
            beta: 0.1,
            ..Default::default()
        };
        let text = tables(&report);
        for line in text.lines() {
            assert!(line.width() <= 80, "{} columns: {line}", line.width());
        }
        assert!(
            text.contains("100.0 %") && text.contains("99.9 – 100.0 %"),
            "{text}"
        );
        let without = pb::EvaluationReport {
            calibration: Some(pb::CalibrationReport {
                problem: "few pairs and ".repeat(20),
                ..Default::default()
            }),
            ..Default::default()
        };
        let text = tables(&without);
        assert!(!text.contains("AUC") && text.contains("no calibration"));
        assert!(text.lines().all(|line| line.width() <= 80), "{text}");
    }

    #[test]
    fn errors_name_row_pair_and_id() {
        let report = pb::EvaluationReport {
            failed_pairs: 3,
            errors: vec![pb::EvaluationError {
                row: 7,
                pair: 2,
                id: "x".into(),
                message: "chosen is empty".into(),
            }],
            ..Default::default()
        };
        assert_eq!(
            errors(&report),
            ["row 7, pair 2 (id \"x\"): chosen is empty", "and 2 more"]
        );
    }
}
