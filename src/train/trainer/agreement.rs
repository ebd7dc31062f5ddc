//! Comparison of logged reference log-probs with the model before the first step, one pair per
//! unit.

use super::{Phase, TrainError, Trainer};
use crate::domain::logged::LoggedCheck;
use crate::infer::scorer::score_all;
use crate::train::run_context::RunContext;

impl Trainer {
    pub(super) fn compare_unit(
        &mut self,
        next: usize,
        context: &mut RunContext,
    ) -> Result<(), TrainError> {
        let pair = self.sample.get(next).and_then(|i| {
            let of_eval = i.checked_sub(self.train.len());
            of_eval.map_or_else(|| self.train.get(*i), |i| self.eval.get(i))
        });
        let Some(pair) = pair else {
            (context.emit)(self.comparison.report());
            self.phase = self.first_phase();
            return Ok(());
        };
        let policy = &self.policy.policy;
        let groups = pair.groups();
        let scored = score_all(
            policy,
            &[groups.as_slice()],
            self.plan.row_tokens,
            context.yield_point,
        );
        let logps = match scored {
            Ok(mut scored) => scored.pop().unwrap_or_default(),
            Err(e) => return self.shorten(e.into(), context),
        };
        let problem = self.comparison.add(pair, &logps, policy.precision);
        match (problem, self.spec.logged_reference) {
            (Some(problem), Some(LoggedCheck::Fail)) => Err(TrainError::LoggedDisagrees(problem)),
            _ => {
                self.phase = Phase::Compare { next: next + 1 };
                Ok(())
            }
        }
    }
}
