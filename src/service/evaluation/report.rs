//! The report of an evaluation, and its computation from scored pairs. Scores come in any order;
//! the report does not depend on it, to the last bit.

use std::collections::BTreeMap;

use crate::domain::dpo::Normalization;
use crate::math::calibration::{Calibration, CalibrationPoint, fit};
use crate::math::evaluation::{Histogram, ProbabilityScores, Wins, histogram, probability_scores};
use crate::math::sigmoid;
use crate::service::error::{Result, ServiceError};

/// Maximum number of failures that a report lists.
const MAX_FAILURES: usize = 20;
/// Maximum number of different subsets.
const MAX_SUBSETS: usize = 1000;
/// Number of ranges of the margin histogram.
const MARGIN_RANGES: usize = 20;
/// Largest length difference of each range but the last, in tokens.
const LENGTH_LIMITS: [i64; 4] = [-101, -21, 20, 100];
/// Minimum number of pairs in each half for a calibration.
const MIN_CALIBRATION_PAIRS: usize = 10;

/// Result of an evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationReport {
    /// Id of the dataset.
    pub dataset: String,
    /// Number of rows that were read.
    pub rows: u64,
    /// Number of pairs with a score.
    pub pairs: u64,
    /// Number of pairs and unreadable rows without a score.
    pub failed: u64,
    /// The first failures by row and pair, at most 20.
    pub failures: Vec<PairFailure>,
    /// Number of truncated answers.
    pub truncated: u64,
    /// Pairs, won if the chosen answer has the larger reward.
    pub accuracy: Wins,
    /// Rows with several answers, won if the best answer is a chosen one.
    pub best_of_n: Wins,
    /// Accuracy and best of N by subset; empty without a subset column.
    pub subsets: BTreeMap<String, SubsetWins>,
    /// Accuracy by length difference.
    pub by_length: Vec<LengthWins>,
    /// Pairs with two different given scores, won if the margin has the sign of their difference.
    pub agreement: Wins,
    /// Mean margin; 0 without a pair.
    pub mean_margin: f64,
    /// Mean probability; 0 without a pair.
    pub mean_probability: f64,
    /// Discrimination and calibration; `None` without a pair.
    pub probability: Option<ProbabilityScores>,
    /// Number of pairs by margin.
    pub margins: Histogram,
    /// The calibration, or the reason why there is none.
    pub calibration: std::result::Result<JudgedCalibration, String>,
    /// The weights and options that scored.
    pub versions: Versions,
}

/// Weights and options with which an evaluation scored.
#[derive(Clone, Debug, PartialEq)]
pub struct Versions {
    /// Name of the policy's weights.
    pub policy: String,
    /// Name of the reference's weights.
    pub reference: Option<String>,
    /// β of the rewards.
    pub beta: f64,
    /// Normalization of the rewards.
    pub normalization: Normalization,
    /// Warnings about the weights.
    pub warnings: Vec<String>,
}

/// A pair or a row without a score.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairFailure {
    /// Number of the row, and of the pair within it; 0 if the row makes one pair.
    pub place: (u64, u32),
    /// Id of the row.
    pub id: Option<String>,
    /// The reason.
    pub message: String,
}

/// Wins on a subset.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SubsetWins {
    /// Pairs.
    pub accuracy: Wins,
    /// Rows with several answers.
    pub best_of_n: Wins,
}

/// Wins on the pairs in a range of length differences.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LengthWins {
    /// Smallest difference in tokens; `None` in the first range.
    pub from: Option<i64>,
    /// Largest difference in tokens; `None` in the last range.
    pub to: Option<i64>,
    /// Pairs.
    pub accuracy: Wins,
}

/// A calibration that was fitted on one half of the pairs and judged on the other.
#[derive(Clone, Debug, PartialEq)]
pub struct JudgedCalibration {
    /// The calibration.
    pub fitted: Calibration,
    /// Number of pairs on which it was fitted.
    pub fitted_pairs: u64,
    /// Number of pairs on which it was judged.
    pub judged_pairs: u64,
    /// Scores of the probabilities without the calibration, on the judged pairs.
    pub before: ProbabilityScores,
    /// Scores of the calibrated probabilities, on the judged pairs.
    pub after: ProbabilityScores,
    /// True if it has been stored with the policy's checkpoint.
    pub is_saved: bool,
}

/// A scored pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// Number of the row, and of the pair within it; 0 if the row makes one pair.
    pub place: (u64, u32),
    /// The subset, if there are subsets.
    pub subset: Option<String>,
    /// r_chosen − r_rejected.
    pub margin: f64,
    /// r_chosen and r_rejected.
    pub rewards: (f64, f64),
    /// Tokens of the chosen − tokens of the rejected answer.
    pub length_difference: i64,
    /// Number of truncated answers.
    pub truncated: u64,
    /// Difference of the given scores, if the row has them.
    pub given: Option<f64>,
    /// True if the calibration is judged on the pair, false if it is fitted on it.
    pub is_held_out: bool,
}

/// The part of a [`Judgement`] that is stored for each pair.
#[derive(Clone, Copy)]
struct PairNumbers {
    place: (u64, u32),
    margin: f64,
    length_difference: i64,
    is_held_out: bool,
}

/// The best rewards among the chosen and among the rejected answers of a row.
struct BestRewards {
    subset: Option<String>,
    chosen: f64,
    rejected: f64,
}

/// Collects scored pairs for a report.
#[derive(Default)]
pub struct EvaluationTally {
    rows: u64,
    last_row: u64,
    pairs: Vec<PairNumbers>,
    failed: u64,
    failures: BTreeMap<(u64, u32), PairFailure>,
    truncated: u64,
    subsets: BTreeMap<String, SubsetWins>,
    agreement: Wins,
    /// Rows that make several pairs, and rows of which a pair has no score (`None`).
    several: BTreeMap<u64, Option<BestRewards>>,
}

impl EvaluationTally {
    /// Counts the row of a pair that was read. The pairs of a row must follow each other.
    pub fn read(&mut self, row: u64) {
        if self.last_row != row {
            self.last_row = row;
            self.rows += 1;
        }
    }

    /// Returns the number of pairs with a score.
    pub fn scored(&self) -> u64 {
        self.pairs.len() as u64
    }

    /// Returns the number of pairs and rows without a score.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Adds a pair or a row without a score.
    pub fn fail(&mut self, failure: PairFailure) {
        self.failed += 1;
        self.several.insert(failure.place.0, None);
        self.failures.entry(failure.place).or_insert(failure);
        if self.failures.len() > MAX_FAILURES {
            self.failures.pop_last();
        }
    }

    /// Adds a pair with a score.
    ///
    /// # Errors
    /// `InvalidArgument` if there are too many subsets.
    pub fn add(&mut self, pair: Judgement) -> Result<()> {
        if let Some(subset) = &pair.subset {
            if self.subsets.len() == MAX_SUBSETS && !self.subsets.contains_key(subset) {
                let message = format!(
                    "has more than {MAX_SUBSETS} different values: name a column with categories"
                );
                return Err(ServiceError::invalid("subset_column", message));
            }
            let wins = self.subsets.entry(subset.clone()).or_default();
            wins.accuracy.add(pair.margin);
        }
        if let Some(given) = pair.given.filter(|given| *given != 0.0) {
            self.agreement.add(pair.margin * given.signum());
        }
        self.truncated += pair.truncated;
        self.pairs.push(PairNumbers {
            place: pair.place,
            margin: pair.margin,
            length_difference: pair.length_difference,
            is_held_out: pair.is_held_out,
        });
        if pair.place.1 > 0 {
            let (chosen, rejected) = pair.rewards;
            let row = self.several.entry(pair.place.0).or_insert_with(|| {
                Some(BestRewards {
                    subset: pair.subset,
                    chosen,
                    rejected,
                })
            });
            if let Some(best) = row {
                best.chosen = best.chosen.max(chosen);
                best.rejected = best.rejected.max(rejected);
            }
        }
        Ok(())
    }

    /// Computes the report.
    pub fn finish(mut self, dataset: String, bins: usize, versions: Versions) -> EvaluationReport {
        // Sums of floating-point numbers depend on the order.
        self.pairs.sort_by_key(|pair| pair.place);
        let margins: Vec<f64> = self.pairs.iter().map(|pair| pair.margin).collect();
        let mut accuracy = Wins::default();
        margins.iter().for_each(|margin| accuracy.add(*margin));
        let mut best_of_n = Wins::default();
        for best in self.several.into_values().flatten() {
            let difference = best.chosen - best.rejected;
            best_of_n.add(difference);
            if let Some(wins) = best.subset.and_then(|subset| self.subsets.get_mut(&subset)) {
                wins.best_of_n.add(difference);
            }
        }
        let mean = |sum: f64| sum / margins.len().max(1) as f64;
        EvaluationReport {
            dataset,
            rows: self.rows,
            pairs: margins.len() as u64,
            failed: self.failed,
            failures: self.failures.into_values().collect(),
            truncated: self.truncated,
            accuracy,
            best_of_n,
            subsets: self.subsets,
            by_length: by_length(&self.pairs),
            agreement: self.agreement,
            mean_margin: mean(margins.iter().sum()),
            mean_probability: mean(margins.iter().map(|m| sigmoid(*m)).sum()),
            probability: probability_scores(&margins, bins),
            calibration: calibrate(&self.pairs, bins),
            margins: histogram(&margins, MARGIN_RANGES),
            versions,
        }
    }
}

fn by_length(pairs: &[PairNumbers]) -> Vec<LengthWins> {
    let mut ranges: Vec<LengthWins> = (0..=LENGTH_LIMITS.len())
        .map(|i| LengthWins {
            from: i.checked_sub(1).map(|before| LENGTH_LIMITS[before] + 1),
            to: LENGTH_LIMITS.get(i).copied(),
            accuracy: Wins::default(),
        })
        .collect();
    for pair in pairs {
        let range = LENGTH_LIMITS.partition_point(|limit| *limit < pair.length_difference);
        ranges[range].accuracy.add(pair.margin);
    }
    ranges
}

/// Fits a calibration on the pairs that are not held out, and judges it on those that are.
fn calibrate(pairs: &[PairNumbers], bins: usize) -> std::result::Result<JudgedCalibration, String> {
    let points = |is_held_out: bool| -> Vec<CalibrationPoint> {
        let of_half = pairs.iter().filter(|pair| pair.is_held_out == is_held_out);
        of_half
            .map(|pair| CalibrationPoint {
                margin: pair.margin,
                length_difference: pair.length_difference as f64,
            })
            .collect()
    };
    let (to_fit, to_judge) = (points(false), points(true));
    if to_fit.len().min(to_judge.len()) < MIN_CALIBRATION_PAIRS {
        return Err(format!(
            "the two halves of the data have {} and {} pairs with a score, and each needs at least \
             {MIN_CALIBRATION_PAIRS}: use more pairs with different prompts",
            to_fit.len(),
            to_judge.len()
        ));
    }
    let fitted = fit(&to_fit).map_err(|e| e.to_string())?;
    let scores = |margin: &dyn Fn(&CalibrationPoint) -> f64| {
        let margins: Vec<f64> = to_judge.iter().map(margin).collect();
        probability_scores(&margins, bins).ok_or_else(|| "no pair to judge".to_owned())
    };
    Ok(JudgedCalibration {
        fitted,
        fitted_pairs: to_fit.len() as u64,
        judged_pairs: to_judge.len() as u64,
        before: scores(&|point| point.margin)?,
        after: scores(&|point| fitted.margin(*point))?,
        is_saved: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(row: u64, number: u32, rewards: (f64, f64)) -> Judgement {
        Judgement {
            place: (row, number),
            subset: Some(format!("s{}", row % 2)),
            margin: rewards.0 - rewards.1,
            rewards,
            length_difference: 10 * row as i64 - 30,
            truncated: u64::from(row == 1),
            given: (row == 2).then_some(-1.0),
            is_held_out: row.is_multiple_of(2),
        }
    }

    fn failure(row: u64, number: u32) -> PairFailure {
        PairFailure {
            place: (row, number),
            id: None,
            message: "too long".into(),
        }
    }

    fn finish(tally: EvaluationTally) -> EvaluationReport {
        let versions = Versions {
            policy: "models/m".into(),
            reference: None,
            beta: 0.1,
            normalization: Normalization::Sum,
            warnings: Vec::new(),
        };
        tally.finish("d".into(), 15, versions)
    }

    #[test]
    fn the_best_answer_of_a_row_decides() {
        let mut tally = EvaluationTally::default();
        // Row 1: the chosen answer is best. Row 2: one rejected answer is better. Row 3: the second
        // of two chosen answers is as good as the best rejected one. Row 4 has an error.
        for judgement in [
            pair(1, 1, (1.0, 0.5)),
            pair(1, 2, (1.0, -2.0)),
            pair(2, 1, (0.0, -1.0)),
            pair(2, 2, (0.0, 0.25)),
            pair(3, 1, (-1.0, 2.0)),
            pair(3, 2, (2.0, 2.0)),
            pair(4, 1, (1.0, 0.0)),
            pair(5, 0, (1.0, 0.0)),
        ] {
            tally.read(judgement.place.0);
            tally.add(judgement).unwrap();
        }
        tally.fail(failure(4, 2));
        let report = finish(tally);
        assert_eq!((report.rows, report.pairs, report.failed), (5, 8, 1));
        assert_eq!(report.best_of_n, Wins { count: 3, won: 1.5 });
        assert_eq!(report.accuracy, Wins { count: 8, won: 5.5 });
        assert_eq!(report.agreement, Wins { count: 2, won: 1.0 });
        let subset = &report.subsets["s1"];
        assert_eq!(subset.best_of_n, Wins { count: 2, won: 1.5 });
        assert_eq!(report.truncated, 2);
        assert!(report.calibration.unwrap_err().contains("at least 10"));
    }

    #[test]
    fn length_ranges_touch_and_do_not_overlap() {
        let mut tally = EvaluationTally::default();
        for (row, difference) in [-500, -101, -100, -21, -20, 0, 20, 21, 100, 101]
            .into_iter()
            .enumerate()
        {
            let judgement = Judgement {
                length_difference: difference,
                ..pair(row as u64 + 1, 0, (1.0, 0.0))
            };
            tally.add(judgement).unwrap();
        }
        let ranges: Vec<_> = finish(tally)
            .by_length
            .into_iter()
            .map(|range| (range.from, range.to, range.accuracy.count))
            .collect();
        assert_eq!(
            ranges,
            [
                (None, Some(-101), 2),
                (Some(-100), Some(-21), 2),
                (Some(-20), Some(20), 3),
                (Some(21), Some(100), 2),
                (Some(101), None, 1),
            ]
        );
    }

    #[test]
    fn the_order_of_the_scores_does_not_matter() {
        let all: Vec<Judgement> = (1..=60)
            .map(|row| Judgement {
                length_difference: (row % 7) as i64 - 3,
                ..pair(row, 0, (((row * 37) % 11) as f64 * 0.31 - 1.2, 0.1))
            })
            .collect();
        let (mut forward, mut backward) = (EvaluationTally::default(), EvaluationTally::default());
        for judgement in &all {
            forward.add(judgement.clone()).unwrap();
        }
        for judgement in all.iter().rev() {
            backward.add(judgement.clone()).unwrap();
        }
        let (forward, backward) = (finish(forward), finish(backward));
        assert_eq!(forward, backward);
        let calibration = forward.calibration.unwrap();
        assert_eq!(
            (calibration.fitted_pairs, calibration.judged_pairs),
            (30, 30)
        );
    }

    #[test]
    fn the_first_failures_are_listed_and_all_are_counted() {
        let mut tally = EvaluationTally::default();
        for row in (1..=50).rev() {
            tally.fail(failure(row, 0));
        }
        let report = finish(tally);
        let rows: Vec<u64> = report.failures.iter().map(|f| f.place.0).collect();
        assert_eq!(rows, (1..=20).collect::<Vec<u64>>());
        assert_eq!((report.failed, report.probability), (50, None));
    }

    #[test]
    fn a_column_with_too_many_values_is_refused() {
        let mut tally = EvaluationTally::default();
        for row in 0..=MAX_SUBSETS as u64 {
            let judgement = Judgement {
                subset: Some(row.to_string()),
                ..pair(row, 0, (1.0, 0.0))
            };
            let added = tally.add(judgement);
            assert_eq!(added.is_err(), row == MAX_SUBSETS as u64);
        }
    }
}
