//! The score of a pair: Pr(y_a ≻ y_b | x) = σ(r_a − r_b) with
//! r = β·(log π_θ − log π_ref), the same reward that the loss trains.
//!
//! Losses that compare means over tokens (ipo, sigmoid_norm, simpo, orpo) train
//! r = β·(log π_θ − log π_ref)/n instead, with n the number of tokens; for simpo and orpo
//! without log π_ref.
//!
//! Training metrics and served scores are both computed by [`reward`], so that equal log-probs give
//! the same bits if the normalization is the same. For ipo and sigmoid_norm it is not: `rewards/*`
//! are sums, as in TRL (`DpoConfig::logged_normalization`), while served scores and
//! `rewards_normalized/*` are means.

use super::sigmoid;
use crate::domain::dpo::Normalization;

/// Log-probs of an answer, summed over its tokens, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AnswerLogps {
    /// Σ log π_θ.
    pub policy: f64,
    /// Σ log π_ref; `None` without a reference.
    pub reference: Option<f64>,
    /// Number of tokens in the answer.
    pub tokens: usize,
}

impl AnswerLogps {
    /// Sums the log-probs of an answer's tokens.
    pub fn new(policy: &[f32], reference: Option<&[f32]>) -> Self {
        AnswerLogps {
            policy: total(policy),
            reference: reference.map(total),
            tokens: policy.len(),
        }
    }
}

/// Returns the implicit reward r = β·lr (arXiv:2305.18290, eq. 5 without the partition function,
/// which cancels in a pair) with lr = log π_θ(y|x) − log π_ref(y|x), or log π_θ(y|x) without
/// a reference; with [`Normalization::Mean`], lr is divided by the number of tokens.
pub fn reward(beta: f64, normalization: Normalization, answer: AnswerLogps) -> f64 {
    let log_ratio = answer.policy - answer.reference.unwrap_or(0.0);
    match normalization {
        Normalization::Sum => beta * log_ratio,
        Normalization::Mean => beta * (log_ratio / answer.tokens.max(1) as f64),
    }
}

/// Returns σ(margin) with margin = r_a − r_b: the Bradley–Terry probability that a
/// is preferred.
pub fn preference_probability(margin: f64) -> f64 {
    sigmoid(margin)
}

/// Returns each answer's probability of being the best under Plackett–Luce: the softmax of the
/// rewards.
pub fn best_of(rewards: &[f64]) -> Vec<f64> {
    let top = rewards.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = rewards.iter().map(|r| (r - top).exp()).collect();
    let z: f64 = e.iter().sum();
    e.into_iter().map(|x| x / z).collect()
}

/// Returns the indices in order of decreasing reward. The sort is stable.
pub fn ranking(rewards: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..rewards.len()).collect();
    order.sort_by(|a, b| rewards[*b].total_cmp(&rewards[*a]));
    order
}

/// Returns the sum of per-token log-probs. It is accumulated in f64 to keep the precision of long
/// answers.
pub fn total(logps: &[f32]) -> f64 {
    logps.iter().map(|x| *x as f64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exchanging_the_answers_gives_the_complement() {
        for margin in [-800.0, -3.0, 0.0, 0.1, 40.0] {
            assert!(
                (preference_probability(margin) + preference_probability(-margin) - 1.0).abs()
                    < 1e-15
            );
        }
    }

    #[test]
    fn a_mean_reward_is_that_of_one_token() {
        // SimPO, β = 2: −100 nats over 100 tokens against −30 over 20.
        let long = AnswerLogps::new(&[-1.0; 100], None);
        let short = AnswerLogps::new(&[-1.5; 20], None);
        let margin =
            |normalization| reward(2.0, normalization, long) - reward(2.0, normalization, short);
        assert_eq!(margin(Normalization::Mean), 1.0);
        assert_eq!(margin(Normalization::Sum), -140.0);
        let against = AnswerLogps::new(&[-1.5, -2.5], Some(&[-1.0, -2.0]));
        assert_eq!(reward(0.5, Normalization::Sum, against), -0.5);
        assert_eq!(reward(0.5, Normalization::Mean, against), -0.25);
    }

    #[test]
    fn two_answers_have_their_pair_probability_and_the_best_comes_first() {
        let p = best_of(&[1.0, 0.2]);
        assert!((p[0] - preference_probability(0.8)).abs() < 1e-15);
        assert_eq!(ranking(&[0.0, 2.0, 1.0, 2.0]), [1, 3, 2, 0]);
    }
}
