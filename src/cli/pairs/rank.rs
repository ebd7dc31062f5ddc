//! Choice of a pair among the samples of a prompt.

use serde::{Deserialize, Serialize};

/// A sample with its reward.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Candidate<'a> {
    /// The text.
    pub text: &'a str,
    /// Reward by the judge.
    pub reward: f64,
    /// Number of tokens that were scored.
    pub tokens: u32,
}

/// The best and the worst of some samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ChosenPair {
    /// Index of the best sample.
    pub best: usize,
    /// Index of the worst sample.
    pub worst: usize,
    /// Difference of their rewards after the length penalty.
    pub margin: f64,
}

/// Reason why a prompt has no pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Dropped {
    /// Fewer than two of its samples differ, are not blank and, without `--keep-cut`, are complete.
    FewAnswers,
    /// Fewer than two of them can be scored whole.
    NotScored,
    /// The rewards of the best and the worst sample differ too little.
    NearTie,
}

/// The result of a prompt that has no pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct NoPair {
    /// The reason.
    pub reason: Dropped,
    /// Difference of the rewards of the best and the worst sample after the length penalty; `None`
    /// if fewer than two samples have a reward.
    pub margin: Option<f64>,
}

impl From<Dropped> for NoPair {
    fn from(reason: Dropped) -> Self {
        NoPair {
            reason,
            margin: None,
        }
    }
}

/// Chooses the samples with the highest and the lowest reward, each lowered by `length_penalty` for
/// every token. Among equal ones, the first counts.
///
/// # Errors
/// Returns the reason why there is no pair: fewer than two candidates, or a margin below
/// `min_margin` or of 0.
pub(super) fn choose(
    candidates: &[Candidate<'_>],
    length_penalty: f64,
    min_margin: f64,
) -> Result<ChosenPair, NoPair> {
    if candidates.len() < 2 {
        return Err(Dropped::NotScored.into());
    }
    let value = |i: usize| candidates[i].reward - length_penalty * f64::from(candidates[i].tokens);
    let (mut best, mut worst) = (0, 0);
    for i in 1..candidates.len() {
        if value(i) > value(best) {
            best = i;
        }
        if value(i) < value(worst) {
            worst = i;
        }
    }
    let margin = value(best) - value(worst);
    match margin > 0.0 && margin >= min_margin {
        true => Ok(ChosenPair {
            best,
            worst,
            margin,
        }),
        false => Err(NoPair {
            reason: Dropped::NearTie,
            margin: Some(margin),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(values: &[(f64, u32)]) -> Vec<Candidate<'static>> {
        let of = |(reward, tokens): &(f64, u32)| Candidate {
            text: "",
            reward: *reward,
            tokens: *tokens,
        };
        values.iter().map(of).collect()
    }

    #[test]
    fn the_best_and_the_worst_sample_are_a_pair() {
        let all = candidates(&[(0.5, 1), (2.0, 9), (-1.0, 3), (2.0, 1)]);
        let pair = choose(&all, 0.0, 0.1).unwrap();
        assert_eq!((pair.best, pair.worst, pair.margin), (1, 2, 3.0));
        // A penalty makes the shorter one the best.
        let pair = choose(&all, 0.25, 0.1).unwrap();
        assert_eq!((pair.best, pair.worst, pair.margin), (3, 2, 3.5));
    }

    #[test]
    fn near_ties_and_single_samples_are_no_pairs() {
        let near = candidates(&[(1.0, 1), (1.25, 1)]);
        let tie = |margin| NoPair {
            reason: Dropped::NearTie,
            margin: Some(margin),
        };
        assert_eq!(choose(&near, 0.0, 0.3), Err(tie(0.25)));
        assert_eq!(choose(&near, 0.0, 0.25).map(|p| p.best), Ok(1));
        let equal = candidates(&[(1.0, 1), (1.0, 1)]);
        assert_eq!(choose(&equal, 0.0, 0.0), Err(tie(0.0)));
        let one = candidates(&[(1.0, 1)]);
        assert_eq!(
            choose(&one, 0.0, 0.0),
            Err(NoPair::from(Dropped::NotScored))
        );
    }
}
