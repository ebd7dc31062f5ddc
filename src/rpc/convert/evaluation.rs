//! Converts requests for evaluations, and their reports.

use tonic::Status;

use super::{dataset_id, invalid, scoring};
use crate::math::evaluation::{Histogram, ProbabilityScores, ReliabilityBin, Wins};
use crate::rpc::pb;
use crate::service::evaluation::report::{
    EvaluationReport, JudgedCalibration, LengthWins, PairFailure, SubsetWins,
};
use crate::service::evaluation::{EvaluationProgress, EvaluationRequest, SCORE_COLUMNS};

/// Number of bins unless the request names another one, and the maximum.
const DEFAULT_BINS: u32 = 15;
const MAX_BINS: u32 = 100;
/// Maximum length of a column's name in bytes.
const MAX_COLUMN_BYTES: usize = 256;

/// Converts a request.
pub(in crate::rpc) fn request(r: pb::EvaluatePolicyRequest) -> Result<EvaluationRequest, Status> {
    let (options, _) = scoring::options(r.options)?;
    let dataset = dataset_id("dataset", &r.dataset)?.to_owned();
    let subset_column = column("subset_column", r.subset_column)?;
    let chosen = column("chosen_score_column", r.chosen_score_column)?;
    let rejected = column("rejected_score_column", r.rejected_score_column)?;
    let score_columns = match (chosen, rejected) {
        (None, None) => (SCORE_COLUMNS.0.to_owned(), SCORE_COLUMNS.1.to_owned()),
        (Some(chosen), Some(rejected)) => (chosen, rejected),
        (Some(_), None) => {
            return Err(invalid(
                "rejected_score_column",
                "is empty, but chosen_score_column is not: name both columns or neither",
            ));
        }
        (None, Some(_)) => {
            return Err(invalid(
                "chosen_score_column",
                "is empty, but rejected_score_column is not: name both columns or neither",
            ));
        }
    };
    let bins = match r.bins {
        0 => DEFAULT_BINS,
        n if n <= MAX_BINS => n,
        n => {
            return Err(invalid(
                "bins",
                format!("is {n}: it must lie in 1..={MAX_BINS}, or be 0 for {DEFAULT_BINS}"),
            ));
        }
    };
    Ok(EvaluationRequest {
        dataset,
        options,
        subset_column,
        score_columns,
        bins: bins as usize,
        save_calibration: r.save_calibration,
    })
}

fn column(field: &str, name: String) -> Result<Option<String>, Status> {
    if name.len() > MAX_COLUMN_BYTES || name.contains('\0') {
        return Err(invalid(
            field,
            format!("must have at most {MAX_COLUMN_BYTES} bytes, none of them NUL"),
        ));
    }
    Ok((!name.is_empty()).then_some(name))
}

pub(in crate::rpc) fn progress(p: EvaluationProgress) -> pb::EvaluationProgress {
    pb::EvaluationProgress {
        scored_pairs: p.scored,
        failed_pairs: p.failed,
        total_pairs: p.total,
    }
}

pub(in crate::rpc) fn report(r: EvaluationReport) -> pb::EvaluationReport {
    pb::EvaluationReport {
        dataset: format!("datasets/{}", r.dataset),
        rows: r.rows,
        pairs: r.pairs,
        failed_pairs: r.failed,
        errors: r.failures.into_iter().map(error).collect(),
        truncated_answers: r.truncated,
        accuracy: Some(rate(r.accuracy)),
        best_of_n: rate_if_any(r.best_of_n),
        subsets: r.subsets.into_iter().map(subset).collect(),
        by_length: r.by_length.into_iter().map(length).collect(),
        agreement: rate_if_any(r.agreement),
        mean_margin: r.mean_margin,
        mean_probability: r.mean_probability,
        probability: r.probability.map(probability),
        margins: Some(margins(r.margins)),
        calibration: Some(calibration(r.calibration)),
        policy_version: r.versions.policy,
        reference_version: r.versions.reference.unwrap_or_default(),
        beta: r.versions.beta,
        normalization: scoring::normalization(r.versions.normalization),
        warnings: r.versions.warnings,
    }
}

fn error(failure: PairFailure) -> pb::EvaluationError {
    let (row, pair) = failure.place;
    pb::EvaluationError {
        row,
        pair,
        id: failure.id.unwrap_or_default(),
        message: failure.message,
    }
}

fn rate(wins: Wins) -> pb::WinRate {
    let (lower, upper) = wins.interval().unwrap_or((0.0, 0.0));
    pb::WinRate {
        count: wins.count,
        share: wins.share().unwrap_or(0.0),
        lower,
        upper,
    }
}

fn rate_if_any(wins: Wins) -> Option<pb::WinRate> {
    (wins.count > 0).then(|| rate(wins))
}

fn subset((name, wins): (String, SubsetWins)) -> pb::SubsetReport {
    pb::SubsetReport {
        subset: name,
        accuracy: Some(rate(wins.accuracy)),
        best_of_n: rate_if_any(wins.best_of_n),
    }
}

fn length(range: LengthWins) -> pb::LengthReport {
    pb::LengthReport {
        from_tokens: range.from,
        to_tokens: range.to,
        accuracy: Some(rate(range.accuracy)),
    }
}

fn probability(scores: ProbabilityScores) -> pb::ProbabilityReport {
    pb::ProbabilityReport {
        auc: scores.auc,
        brier: scores.brier,
        log_loss: scores.log_loss,
        ece: scores.ece,
        bins: scores.bins.into_iter().map(bin).collect(),
    }
}

fn bin(bin: ReliabilityBin) -> pb::ReliabilityBin {
    pb::ReliabilityBin {
        above: bin.above,
        up_to: bin.up_to,
        samples: bin.samples,
        predicted: bin.predicted,
        observed: bin.observed,
    }
}

fn margins(histogram: Histogram) -> pb::MarginHistogram {
    pb::MarginHistogram {
        edges: histogram.edges,
        counts: histogram.counts,
    }
}

fn calibration(judged: Result<JudgedCalibration, String>) -> pb::CalibrationReport {
    match judged {
        Err(problem) => pb::CalibrationReport {
            problem,
            ..Default::default()
        },
        Ok(judged) => pb::CalibrationReport {
            problem: String::new(),
            fitted_pairs: judged.fitted_pairs,
            judged_pairs: judged.judged_pairs,
            temperature: judged.fitted.temperature,
            length_coefficient: judged.fitted.length_coefficient,
            before: Some(probability(judged.before)),
            after: Some(probability(judged.after)),
            saved: judged.is_saved,
        },
    }
}
