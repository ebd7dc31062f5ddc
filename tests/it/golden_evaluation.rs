//! Figures of evaluations against those of scikit-learn, scipy and numpy.

use bradley::math::calibration::{CalibrationPoint, fit, fit_temperature};
use bradley::math::evaluation::{Wins, histogram, probability_scores};
use serde::Deserialize;

use crate::support::golden;

/// Maximum difference from scikit-learn, relative to numbers above 1.
const TOLERANCE: f64 = 1e-9;

#[derive(Deserialize)]
struct Case {
    name: String,
    margins: Vec<f64>,
    length_differences: Vec<f64>,
    auc: f64,
    brier: f64,
    log_loss: f64,
    reliability: Vec<Reliability>,
    wins: u64,
    interval: (f64, f64),
    histogram: Counted,
    slope: f64,
    slope_and_coefficient: (f64, f64),
}

#[derive(Deserialize)]
struct Reliability {
    bins: usize,
    counts: Vec<u64>,
    observed: Vec<f64>,
    predicted: Vec<f64>,
    ece: f64,
}

#[derive(Deserialize)]
struct Counted {
    counts: Vec<u64>,
    edges: Vec<f64>,
}

fn cases() -> Vec<Case> {
    let text = std::fs::read_to_string(golden("evaluation.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&text).unwrap();
    assert!(cases.len() >= 5);
    cases
}

fn check(name: &str, what: &str, got: f64, expected: f64) {
    let limit = TOLERANCE * expected.abs().max(1.0);
    assert!(
        (got - expected).abs() <= limit,
        "{name}, {what}: {got} instead of {expected}"
    );
}

#[test]
fn scores_and_bins_are_scikit_learns() {
    for case in cases() {
        let name = &case.name;
        for expected in &case.reliability {
            let scores = probability_scores(&case.margins, expected.bins).unwrap();
            check(name, "AUC", scores.auc, case.auc);
            check(name, "Brier", scores.brier, case.brier);
            check(name, "log loss", scores.log_loss, case.log_loss);
            check(name, "ECE", scores.ece, expected.ece);
            let counts: Vec<u64> = scores.bins.iter().map(|bin| bin.samples).collect();
            assert_eq!(counts, expected.counts, "{name}");
            let filled = scores.bins.iter().filter(|bin| bin.samples > 0);
            let filled: Vec<_> = filled.collect();
            assert_eq!(filled.len(), expected.observed.len(), "{name}");
            for (i, bin) in filled.into_iter().enumerate() {
                check(name, "observed", bin.observed, expected.observed[i]);
                check(name, "predicted", bin.predicted, expected.predicted[i]);
            }
        }
    }
}

#[test]
fn intervals_are_scipys_and_histograms_numpys() {
    for case in cases() {
        let mut wins = Wins::default();
        case.margins.iter().for_each(|margin| wins.add(*margin));
        assert_eq!(wins.won, case.wins as f64, "{}", case.name);
        let (low, high) = wins.interval().unwrap();
        check(&case.name, "lower bound", low, case.interval.0);
        check(&case.name, "upper bound", high, case.interval.1);
        let counted = histogram(&case.margins, case.histogram.counts.len());
        assert_eq!(counted.counts, case.histogram.counts, "{}", case.name);
        for (got, expected) in counted.edges.iter().zip(&case.histogram.edges) {
            check(&case.name, "edge", *got, *expected);
        }
    }
}

#[test]
fn calibrations_are_scikit_learns_logistic_regressions() {
    for case in cases() {
        let points: Vec<CalibrationPoint> = case
            .margins
            .iter()
            .zip(&case.length_differences)
            .map(|(margin, length_difference)| CalibrationPoint {
                margin: *margin,
                length_difference: *length_difference,
            })
            .collect();
        let alone = fit_temperature(&points).unwrap();
        check(&case.name, "slope", 1.0 / alone.temperature, case.slope);
        let both = fit(&points).unwrap();
        let (slope, coefficient) = case.slope_and_coefficient;
        check(&case.name, "slope", 1.0 / both.temperature, slope);
        check(
            &case.name,
            "coefficient",
            both.length_coefficient,
            coefficient,
        );
    }
}
