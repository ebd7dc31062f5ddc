//! The training metrics of TRL, under TRL's names, and `rewards_normalized/*`, which are ours.

use serde::{Deserialize, Serialize};

use crate::domain::job::Metrics;

/// Statistics of one completion token, in addition to its log-prob.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenStats {
    /// Mean logit over the vocabulary.
    pub mean_logit: f64,
    /// Entropy of the predicted distribution, in nats.
    pub entropy: f64,
    /// True if the token was the most likely one.
    pub is_argmax: bool,
}

/// Observations of one pair from which the metrics are computed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PairObservation {
    /// Σ log π_θ over the chosen completion.
    pub logp_chosen: f64,
    /// Σ log π_θ over the rejected completion.
    pub logp_rejected: f64,
    /// Reward r_w of the chosen completion.
    pub reward_chosen: f64,
    /// Reward r_l of the rejected completion.
    pub reward_rejected: f64,
    /// r_w and r_l as means over tokens, for losses that train these.
    pub normalized: Option<(f64, f64)>,
    /// One entry per chosen token.
    pub chosen: Vec<TokenStats>,
    /// One entry per rejected token.
    pub rejected: Vec<TokenStats>,
}

impl PairObservation {
    /// Returns the pair's values of the metrics that are means over pairs.
    fn metrics(&self) -> Vec<(&'static str, f64)> {
        let (chosen, rejected) = (self.reward_chosen, self.reward_rejected);
        let mut metrics = vec![
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/accuracies", f64::from(chosen > rejected)),
            ("rewards/margins", chosen - rejected),
            ("logps/chosen", self.logp_chosen),
            ("logps/rejected", self.logp_rejected),
        ];
        if let Some((chosen, rejected)) = self.normalized {
            metrics.extend([
                ("rewards_normalized/chosen", chosen),
                ("rewards_normalized/rejected", rejected),
                (
                    "rewards_normalized/accuracies",
                    f64::from(chosen > rejected),
                ),
                ("rewards_normalized/margins", chosen - rejected),
            ]);
        }
        metrics
    }
}

/// Adds the pairs' metrics to `sums`, pair by pair. The result does not depend on the division of
/// the pairs into batches.
pub fn add_pairs(sums: &mut Metrics, pairs: &[PairObservation]) {
    for (name, value) in pairs.iter().flat_map(PairObservation::metrics) {
        *sums.entry(name.to_owned()).or_default() += value;
    }
}

/// Returns the metrics of one micro-batch.
pub fn micro_batch(loss: f64, pairs: &[PairObservation]) -> Metrics {
    let mut metrics = Metrics::new();
    add_pairs(&mut metrics, pairs);
    metrics
        .values_mut()
        .for_each(|sum| *sum /= pairs.len().max(1) as f64);
    metrics.insert("loss".into(), loss);
    metrics.extend(tokens(pairs));
    metrics
}

/// Returns the metrics that are means over completion tokens of all `pairs`: `logits/chosen` and
/// `mean_token_accuracy` over the chosen ones, `logits/rejected` over the rejected ones, `entropy`
/// over both.
pub fn tokens(pairs: &[PairObservation]) -> Metrics {
    let sum_and_count = |side: &dyn Fn(&PairObservation) -> &[TokenStats],
                         f: &dyn Fn(&TokenStats) -> f64| {
        let n: usize = pairs.iter().map(|p| side(p).len()).sum();
        (
            pairs
                .iter()
                .flat_map(|p| side(p).iter().map(f))
                .sum::<f64>(),
            n,
        )
    };
    let ratio = |(sum, n): (f64, usize)| if n > 0 { sum / n as f64 } else { 0.0 };
    let (logits_chosen, logits_rejected) = (
        sum_and_count(&|p| &p.chosen, &|t| t.mean_logit),
        sum_and_count(&|p| &p.rejected, &|t| t.mean_logit),
    );
    let (entropy_chosen, entropy_rejected) = (
        sum_and_count(&|p| &p.chosen, &|t| t.entropy),
        sum_and_count(&|p| &p.rejected, &|t| t.entropy),
    );
    [
        ("logits/chosen", ratio(logits_chosen)),
        ("logits/rejected", ratio(logits_rejected)),
        (
            "entropy",
            ratio((
                entropy_chosen.0 + entropy_rejected.0,
                entropy_chosen.1 + entropy_rejected.1,
            )),
        ),
        (
            "mean_token_accuracy",
            ratio(sum_and_count(&|p| &p.chosen, &|t| f64::from(t.is_argmax))),
        ),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v))
    .collect()
}

/// Unweighted mean of the metrics of several micro-batches. TRL averages in the same way between
/// two log lines.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Average {
    #[serde(with = "exact::map")]
    sums: Metrics,
    count: u64,
}

/// Serialises f64 values as their bits, because a decimal text may not be parsed to the same value.
pub mod exact {
    use serde::{Deserialize, Deserializer, Serializer};

    /// Serialises one number.
    pub fn serialize<S: Serializer>(x: &f64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(x.to_bits())
    }

    /// Deserialises one number.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        u64::deserialize(d).map(f64::from_bits)
    }

    /// Serialises a map of numbers by name.
    pub mod map {
        use std::collections::BTreeMap;

        use serde::{Deserialize, Deserializer, Serializer};

        use crate::domain::job::Metrics;

        /// Serialises numbers by name.
        pub fn serialize<S: Serializer>(all: &Metrics, s: S) -> Result<S::Ok, S::Error> {
            s.collect_map(all.iter().map(|(name, x)| (name, x.to_bits())))
        }

        /// Deserialises numbers by name.
        pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Metrics, D::Error> {
            Ok(BTreeMap::<String, u64>::deserialize(d)?
                .into_iter()
                .map(|(name, bits)| (name, f64::from_bits(bits)))
                .collect())
        }
    }
}

impl Average {
    /// Adds the metrics of one micro-batch.
    pub fn add(&mut self, metrics: Metrics) {
        for (k, v) in metrics {
            *self.sums.entry(k).or_default() += v;
        }
        self.count += 1;
    }

    /// Returns the means and resets the average.
    pub fn take(&mut self) -> Metrics {
        let n = self.count.max(1) as f64;
        self.count = 0;
        std::mem::take(&mut self.sums)
            .into_iter()
            .map(|(k, v)| (k, v / n))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_metrics_weigh_tokens_and_reward_metrics_weigh_pairs() {
        let t = |entropy: f64, is_argmax: bool| TokenStats {
            mean_logit: entropy * 2.0,
            entropy,
            is_argmax,
        };
        let a = PairObservation {
            logp_chosen: -2.0,
            logp_rejected: -4.0,
            reward_chosen: 1.0,
            reward_rejected: 1.0,
            normalized: None,
            chosen: vec![t(1.0, true)],
            rejected: vec![t(2.0, true), t(3.0, true)],
        };
        let b = PairObservation {
            reward_chosen: 3.0,
            chosen: vec![t(0.0, false), t(0.0, false), t(0.0, false)],
            ..a.clone()
        };
        let m = micro_batch(0.5, &[a, b]);
        assert_eq!(m["mean_token_accuracy"], 0.25);
        assert_eq!(m["logits/chosen"], 0.5);
        assert_eq!(m["entropy"], 11.0 / 8.0);
        assert_eq!(m["rewards/accuracies"], 0.5, "a tie is not a win");
        assert_eq!(m["rewards/margins"], 1.0);
        assert!(
            m.keys()
                .all(|name| !name.starts_with("rewards_normalized/"))
        );
    }

    #[test]
    fn normalized_rewards_have_metrics_of_their_own() {
        let longer = PairObservation {
            reward_chosen: -9.0,
            reward_rejected: -8.0,
            normalized: Some((-1.0, -2.0)),
            ..Default::default()
        };
        let m = micro_batch(0.0, &[longer.clone(), longer]);
        assert_eq!((m["rewards/margins"], m["rewards/accuracies"]), (-1.0, 0.0));
        assert_eq!(
            (
                m["rewards_normalized/margins"],
                m["rewards_normalized/accuracies"]
            ),
            (1.0, 1.0)
        );
        assert_eq!(
            (
                m["rewards_normalized/chosen"],
                m["rewards_normalized/rejected"]
            ),
            (-1.0, -2.0)
        );
    }
}
