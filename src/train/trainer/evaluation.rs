//! Evaluations of the trainer: one batch per unit, then the decision about the best checkpoint.

use std::ops::Range;

use super::{MicroBatch, Phase, TrainError, Trainer, references};
use crate::domain::job::Metrics;
use crate::infer::pair::EncodedPair;
use crate::math::metrics::PairObservation;
use crate::train::event::RunEvent;
use crate::train::run_context::RunContext;

impl Trainer {
    pub(super) fn evaluate_unit(
        &mut self,
        next: usize,
        context: &mut RunContext,
    ) -> Result<(), TrainError> {
        let end = (next + self.spec.batch.batch_size).min(self.eval.len());
        match self.evaluate(next..end, context) {
            Ok((loss, pairs)) => self.evaluation.add(loss, &pairs),
            Err(e) => return self.shorten(e, context),
        }
        if end < self.eval.len() {
            self.phase = Phase::Evaluate { next: end };
            return Ok(());
        }
        let metrics = std::mem::take(&mut self.evaluation).finish();
        if let Some(&value) = metrics.get("eval_loss").filter(|v| !v.is_finite()) {
            return Err(TrainError::NonFinite {
                what: "eval_loss",
                value,
                step: self.state.step,
                rows: Vec::new(),
            });
        }
        self.state.evaluated = Some(self.state.step);
        let best = self.judge(&metrics);
        self.latest.extend(metrics.clone());
        (context.emit)(RunEvent::Eval {
            step: self.state.step,
            metrics,
        });
        self.phase = self.after_evaluation(best);
        if !best && self.is_over() && self.state.step < self.total_steps {
            let message = format!(
                "stopped early: {} evaluations without a better {}",
                self.state.stale_evaluations,
                self.best_metric()
            );
            (context.emit)(RunEvent::Log {
                severity: "info",
                message,
            });
        }
        Ok(())
    }

    fn evaluate(
        &self,
        rows: Range<usize>,
        context: &mut RunContext,
    ) -> Result<(f64, Vec<PairObservation>), TrainError> {
        let pairs: Vec<&EncodedPair> = self.eval[rows].iter().collect();
        let row_tokens = self.plan.row_tokens;
        let references = references(&self.reference, &pairs, row_tokens, context)?;
        let batch = MicroBatch {
            dpo: &self.spec.dpo,
            policy: &self.policy.policy,
            pairs: &pairs,
            references: &references,
            row_tokens,
        };
        Ok(batch.evaluate(context.yield_point)?)
    }

    /// Returns the name of the evaluation metric that selects the best checkpoint.
    fn best_metric(&self) -> &'static str {
        self.spec
            .run
            .metric_for_best
            .of(self.spec.dpo.reward_normalization())
    }

    /// Records the result of an evaluation after at least one step. Returns true if it is the best
    /// so far.
    fn judge(&mut self, metrics: &Metrics) -> bool {
        let metric = self.spec.run.metric_for_best;
        let name = self.best_metric();
        let Some(&value) = metrics.get(name) else {
            return false;
        };
        if self.state.step == 0 {
            return false;
        }
        // Version 0.2 did not store the metric's name, and always compared metrics of summed
        // log-ratios.
        let compared = if self.state.best_metric.is_empty() {
            metric.name()
        } else {
            &self.state.best_metric
        };
        let best = self.state.best.filter(|_| compared == name);
        let better = best.is_none_or(|(old, _)| metric.improves(value, old));
        if better {
            self.state.best = Some((value, self.state.step));
            self.state.best_metric = name.to_owned();
            self.state.stale_evaluations = 0;
        } else {
            self.state.stale_evaluations += 1;
        }
        better
    }
}
