//! Metrics averaged between logged steps and over evaluations, and process-wide step counters.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::domain::job::Metrics;
use crate::math::metrics::{Average, PairObservation, add_pairs, exact, tokens};

/// Counts an optimizer step, logged or not. `took` is wall-clock time and includes scoring in
/// between.
pub fn step(took: Duration, tokens: u64) {
    metrics::counter!("bradley_training_steps_total").increment(1);
    metrics::counter!("bradley_training_tokens_total").increment(tokens);
    metrics::histogram!("bradley_training_step_seconds").record(took.as_secs_f64());
}

/// Metrics since the last logged step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    average: Average,
    /// Σ over steps of Σ over micro-batches of loss/group, where `group` is the number of
    /// micro-batches in the step. A short step has the same weight as a full one, as in
    /// transformers.
    #[serde(with = "exact")]
    loss: f64,
    steps: u64,
    #[serde(with = "exact")]
    grad_norm: f64,
    #[serde(with = "exact")]
    learning_rate: f64,
}

impl Window {
    /// Adds the metrics of a micro-batch that has the weight `scale` in its step.
    pub fn add(&mut self, metrics: Metrics, scale: f64) {
        self.loss += metrics.get("loss").copied().unwrap_or_default() * scale;
        self.average.add(metrics);
    }

    /// Records an optimizer step.
    pub fn step(&mut self, grad_norm: f64, learning_rate: f64) {
        self.steps += 1;
        self.grad_norm = grad_norm;
        self.learning_rate = learning_rate;
    }

    /// Returns the means and starts a new window. `grad_norm` and `learning_rate` are those of the
    /// last step.
    pub fn take(&mut self) -> Metrics {
        let mut metrics = self.average.take();
        metrics.insert("loss".into(), self.loss / self.steps.max(1) as f64);
        metrics.insert("grad_norm".into(), self.grad_norm);
        metrics.insert("learning_rate".into(), self.learning_rate);
        (self.loss, self.steps) = (0.0, 0);
        metrics
    }
}

/// Metrics over all evaluation rows. Every pair has the same weight, so a short last batch does not
/// weigh as much as a full one.
#[derive(Debug, Default)]
pub(super) struct EvaluationSums {
    /// Sums of rewards and log-probs over pairs. Summing pair by pair makes the means bit-identical
    /// to means of the values that scoring returns.
    of_pairs: Metrics,
    /// Sums of batch means, each multiplied by the number of pairs in the batch.
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

    /// Returns the means, with the prefix `eval_`.
    pub fn finish(self) -> Metrics {
        let sums = self.of_pairs.into_iter().chain(self.of_batches);
        sums.map(|(name, sum)| (format!("eval_{name}"), sum / self.pairs.max(1.0)))
            .collect()
    }
}
