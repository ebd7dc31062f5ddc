//! Metrics between log lines and over evaluations, and what the process counts of every step.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::domain::job::Metrics;
use crate::math::metrics::{Average, PairObservation, add_pairs, exact, tokens};

/// Counts an optimizer step, logged or not. Its time is that on the wall: scoring in between is
/// part of it.
pub fn step(took: Duration, tokens: u64) {
    metrics::counter!("bradley_training_steps_total").increment(1);
    metrics::counter!("bradley_training_tokens_total").increment(tokens);
    metrics::histogram!("bradley_training_step_seconds").record(took.as_secs_f64());
}

/// Metrics between two log lines.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    average: Average,
    /// Σ over steps of Σ over micro-batches of loss/group: a short group weighs as much as a full
    /// one, as in transformers.
    #[serde(with = "exact")]
    loss: f64,
    steps: u64,
    #[serde(with = "exact")]
    grad_norm: f64,
    #[serde(with = "exact")]
    learning_rate: f64,
}

impl Window {
    /// Adds a micro-batch that counts `scale` in its step.
    pub fn add(&mut self, metrics: Metrics, scale: f64) {
        self.loss += metrics.get("loss").copied().unwrap_or_default() * scale;
        self.average.add(metrics);
    }

    /// Adds an optimizer step.
    pub fn step(&mut self, grad_norm: f64, learning_rate: f64) {
        self.steps += 1;
        self.grad_norm = grad_norm;
        self.learning_rate = learning_rate;
    }

    /// The means; grad_norm and learning_rate are the last step's. Starts a new window.
    pub fn take(&mut self) -> Metrics {
        let mut metrics = self.average.take();
        metrics.insert("loss".into(), self.loss / self.steps.max(1) as f64);
        metrics.insert("grad_norm".into(), self.grad_norm);
        metrics.insert("learning_rate".into(), self.learning_rate);
        (self.loss, self.steps) = (0.0, 0);
        metrics
    }
}

/// Metrics over the evaluation rows. Every pair counts the same, so that a short last batch does
/// not count as much as a full one.
#[derive(Debug, Default)]
pub(super) struct EvaluationSums {
    /// Sums over pairs of rewards and log-probs. They are taken pair by pair: their means are the
    /// means of what scoring serves, to the last bit.
    of_pairs: Metrics,
    /// Sums of batches' means, each times the batch's pairs.
    of_batches: Metrics,
    pairs: f64,
}

impl EvaluationSums {
    /// Adds a batch with its mean loss.
    pub fn add(&mut self, loss: f64, pairs: &[PairObservation]) {
        add_pairs(&mut self.of_pairs, pairs);
        let weight = pairs.len() as f64;
        for (name, mean) in tokens(pairs).into_iter().chain([("loss".to_owned(), loss)]) {
            *self.of_batches.entry(name).or_default() += mean * weight;
        }
        self.pairs += weight;
    }

    /// The means, with the eval_ prefix.
    pub fn finish(self) -> Metrics {
        let sums = self.of_pairs.into_iter().chain(self.of_batches);
        sums.map(|(name, sum)| (format!("eval_{name}"), sum / self.pairs.max(1.0))).collect()
    }
}
