//! The score of a pair: Pr(y_a ≻ y_b | x) = σ(r_a − r_b) with r = β·(log π_θ − log π_ref), the same reward that the loss trains.

use super::sigmoid;

/// lr = log π_θ(y|x) − log π_ref(y|x); without a reference, log π_θ.
pub fn log_ratio(policy: f64, reference: Option<f64>) -> f64 {
    policy - reference.unwrap_or(0.0)
}

/// r = β·lr, the implicit reward (arXiv:2305.18290, eq. 5 without the partition function, which cancels in a pair).
pub fn reward(beta: f64, policy: f64, reference: Option<f64>) -> f64 {
    beta * log_ratio(policy, reference)
}

/// σ(margin) with margin = r_a − r_b: the Bradley–Terry probability that a is preferred.
pub fn preference_probability(margin: f64) -> f64 {
    sigmoid(margin)
}

/// Each answer's chance of being the best of all under Plackett–Luce: softmax of the rewards.
pub fn best_of(rewards: &[f64]) -> Vec<f64> {
    let top = rewards.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = rewards.iter().map(|r| (r - top).exp()).collect();
    let z: f64 = e.iter().sum();
    e.into_iter().map(|x| x / z).collect()
}

/// Indices by falling reward; equal rewards keep their order.
pub fn ranking(rewards: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..rewards.len()).collect();
    order.sort_by(|a, b| rewards[*b].total_cmp(&rewards[*a]));
    order
}

/// The sum of per-token log-probs, in f64 so that long answers lose nothing.
pub fn total(logps: &[f32]) -> f64 {
    logps.iter().map(|x| *x as f64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exchanging_the_answers_gives_the_complement() {
        for margin in [-800.0, -3.0, 0.0, 0.1, 40.0] {
            assert!((preference_probability(margin) + preference_probability(-margin) - 1.0).abs() < 1e-15);
        }
    }

    #[test]
    fn two_answers_have_their_pair_probability_and_the_best_comes_first() {
        let p = best_of(&[1.0, 0.2]);
        assert!((p[0] - preference_probability(0.8)).abs() < 1e-15);
        assert_eq!(ranking(&[0.0, 2.0, 1.0, 2.0]), [1, 3, 2, 0]);
    }
}
