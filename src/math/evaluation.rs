//! Measures of how well margins agree with preferences.
//!
//! A row of preference data has a chosen and a rejected answer. With the chosen answer always
//! first, every label would be 1, and AUC and calibration would be undefined. Each pair therefore
//! counts in both orders: as (m, 1) and as (−m, 0), where m = r_chosen − r_rejected and the
//! predicted probability is σ(m) or σ(−m). No random order has to be drawn, and the figures do
//! not depend on one. Accuracy, Brier score and log loss have the same value in either order.
//!
//! On these 2n samples the figures equal those of scikit-learn: `roc_auc_score`,
//! `brier_score_loss`, `log_loss` and `calibration_curve(strategy="uniform")`.

use super::{log_sigmoid, sigmoid};

/// The quantile of the standard normal distribution for a 95 % interval.
const Z95: f64 = 1.959_963_984_540_054;

/// Number of comparisons, and how many were won. A tie counts half.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Wins {
    /// Number of comparisons.
    pub count: u64,
    /// Number of those that were won, with a half for each tie.
    pub won: f64,
}

impl Wins {
    /// Adds a comparison, which is won if `difference` is above 0.
    pub fn add(&mut self, difference: f64) {
        self.count += 1;
        self.won += match difference {
            d if d > 0.0 => 1.0,
            0.0 => 0.5,
            _ => 0.0,
        };
    }

    /// Returns the won share; `None` without a comparison.
    pub fn share(&self) -> Option<f64> {
        (self.count > 0).then(|| self.won / self.count as f64)
    }

    /// Returns the 95 % interval of the share: Wilson's score interval without continuity
    /// correction (JASA 22, 1927, 209–212), with the ties as half a win. It takes the comparisons
    /// as independent.
    pub fn interval(&self) -> Option<(f64, f64)> {
        let (p, n) = (self.share()?, self.count as f64);
        let z2 = Z95 * Z95;
        let center = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = Z95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
        Some(((center - half).max(0.0), (center + half).min(1.0)))
    }
}

/// Measures of predicted probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbabilityScores {
    /// Area under the ROC curve: the probability that a sample with label 1 has a larger margin
    /// than one with label 0, where equal margins count half.
    pub auc: f64,
    /// Brier score: the mean of (label − probability)².
    pub brier: f64,
    /// Log loss in nats: the mean of −log σ(m). Probabilities are not clipped.
    pub log_loss: f64,
    /// Expected calibration error: the mean over samples of |observed − predicted| of their bin.
    pub ece: f64,
    /// Bins of the reliability diagram, those without samples included.
    pub bins: Vec<ReliabilityBin>,
}

/// Samples whose predicted probability p is in the same range.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ReliabilityBin {
    /// p is above this number. The first bin includes 0.
    pub above: f64,
    /// p is at most this number.
    pub up_to: f64,
    /// Number of samples. Each pair has two.
    pub samples: u64,
    /// Mean predicted probability; 0 without samples.
    pub predicted: f64,
    /// Share of the samples with label 1; 0 without samples.
    pub observed: f64,
}

/// Returns the scores of margins, with `bins` bins of equal width over [0, 1]; `None` without a
/// margin.
pub fn probability_scores(margins: &[f64], bins: usize) -> Option<ProbabilityScores> {
    if margins.is_empty() {
        return None;
    }
    let n = margins.len() as f64;
    let bins = reliability(margins, bins.max(1));
    let error = |bin: &ReliabilityBin| bin.samples as f64 * (bin.observed - bin.predicted).abs();
    Some(ProbabilityScores {
        auc: auc(margins),
        brier: margins.iter().map(|m| sigmoid(-m).powi(2)).sum::<f64>() / n,
        log_loss: margins.iter().map(|m| -log_sigmoid(*m)).sum::<f64>() / n,
        ece: bins.iter().map(error).sum::<f64>() / (2.0 * n),
        bins,
    })
}

/// Returns the share of all (i, j) with m_i > −m_j, where equality counts half: the
/// Mann–Whitney statistic of the samples of both orders.
fn auc(margins: &[f64]) -> f64 {
    let mut sorted = margins.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    let mut twice = 0u128;
    for m in &sorted {
        let below = sorted.partition_point(|x| *x < -m);
        let up_to = sorted.partition_point(|x| *x <= -m);
        twice += 2 * (n - up_to) as u128 + (up_to - below) as u128;
    }
    twice as f64 / 2.0 / (n as f64 * n as f64)
}

fn reliability(margins: &[f64], bins: usize) -> Vec<ReliabilityBin> {
    // The same edges as of numpy's linspace(0, 1, bins + 1).
    let step = 1.0 / bins as f64;
    let edges: Vec<f64> = (1..bins).map(|i| i as f64 * step).collect();
    let mut sums = vec![ReliabilityBin::default(); bins];
    for (i, bin) in sums.iter_mut().enumerate() {
        bin.above = i as f64 * step;
        bin.up_to = edges.get(i).copied().unwrap_or(1.0);
    }
    for m in margins {
        for (probability, label) in [(sigmoid(*m), 1.0), (sigmoid(-m), 0.0)] {
            let bin = &mut sums[edges.partition_point(|edge| *edge < probability)];
            bin.samples += 1;
            bin.predicted += probability;
            bin.observed += label;
        }
    }
    for bin in &mut sums {
        bin.predicted /= bin.samples.max(1) as f64;
        bin.observed /= bin.samples.max(1) as f64;
    }
    sums
}

/// Numbers of values in ranges of equal width.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Edges of the ranges in ascending order, one more than there are ranges. A range includes its
    /// lower edge, and the last one its upper edge, too.
    pub edges: Vec<f64>,
    /// Number of values in each range.
    pub counts: Vec<u64>,
}

/// Counts values in `bins` ranges between the smallest and the largest value, as
/// `numpy.histogram` does. If all values are equal, the ranges reach from 0.5 below the value to
/// 0.5 above it.
pub fn histogram(values: &[f64], bins: usize) -> Histogram {
    if values.is_empty() || bins == 0 {
        return Histogram::default();
    }
    let mut low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let mut high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if low == high {
        (low, high) = (low - 0.5, high + 0.5);
    }
    let step = (high - low) / bins as f64;
    let mut edges: Vec<f64> = (0..bins).map(|i| i as f64 * step + low).collect();
    edges.push(high);
    let mut counts = vec![0; bins];
    for value in values {
        let after = edges.partition_point(|edge| edge <= value);
        counts[after.saturating_sub(1).min(bins - 1)] += 1;
    }
    Histogram { edges, counts }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_count_half() {
        let mut wins = Wins::default();
        assert_eq!((wins.share(), wins.interval()), (None, None));
        for difference in [2.0, -1.0, 0.0, -0.0, 0.5] {
            wins.add(difference);
        }
        assert_eq!((wins.count, wins.won), (5, 3.0));
        assert_eq!(wins.share(), Some(0.6));
        wins.add(f64::NAN);
        assert_eq!((wins.count, wins.won), (6, 3.0), "NaN does not win");
    }

    #[test]
    fn an_interval_of_no_or_only_wins_ends_at_the_bound() {
        let interval = |won, count| Wins { count, won }.interval().unwrap();
        let (low, high) = interval(0.0, 10);
        assert!(low == 0.0 && (0.2..0.3).contains(&high), "{low} {high}");
        let (low, high) = interval(10.0, 10);
        assert!(
            high > 1.0 - 1e-12 && (0.7..0.8).contains(&low),
            "{low} {high}"
        );
    }

    #[test]
    fn equal_margins_say_nothing() {
        let scores = probability_scores(&[0.0; 7], 15).unwrap();
        assert_eq!((scores.auc, scores.brier, scores.ece), (0.5, 0.25, 0.0));
        assert!((scores.log_loss - 2f64.ln()).abs() < 1e-12);
        let filled: Vec<&ReliabilityBin> = scores.bins.iter().filter(|b| b.samples > 0).collect();
        assert_eq!(filled.len(), 1);
        assert_eq!((filled[0].samples, filled[0].observed), (14, 0.5));
        assert_eq!(probability_scores(&[], 15), None);
    }

    #[test]
    fn the_direct_definition_of_the_auc_gives_the_same() {
        let margins = [0.3, -0.3, 0.0, 1.5, 0.3, -2.0, -0.1, 0.1];
        let mut share = 0.0;
        for positive in margins {
            for negative in margins.map(|m| -m) {
                share += match positive.partial_cmp(&negative).unwrap() {
                    std::cmp::Ordering::Greater => 1.0,
                    std::cmp::Ordering::Equal => 0.5,
                    std::cmp::Ordering::Less => 0.0,
                };
            }
        }
        let scores = probability_scores(&margins, 10).unwrap();
        assert!((scores.auc - share / 64.0).abs() < 1e-15);
    }

    #[test]
    fn enormous_margins_have_finite_scores() {
        let scores = probability_scores(&[900.0, -900.0], 15).unwrap();
        assert_eq!(
            (scores.auc, scores.brier, scores.log_loss),
            (0.5, 0.5, 450.0)
        );
        assert_eq!(scores.ece, 0.5);
    }

    #[test]
    fn every_value_is_in_one_range() {
        let all = histogram(&[-1.0, -0.5, 0.0, 0.5, 1.0], 4);
        assert_eq!(all.edges, [-1.0, -0.5, 0.0, 0.5, 1.0]);
        assert_eq!(all.counts, [1, 1, 1, 2]);
        let equal = histogram(&[2.0; 3], 2);
        assert_eq!(
            (equal.edges, equal.counts),
            (vec![1.5, 2.0, 2.5], vec![0, 3])
        );
        assert_eq!(histogram(&[], 4), Histogram::default());
    }
}
