//! Learning-rate schedules with warm-up, as in `get_*_schedule_with_warmup` of transformers.

use crate::domain::training::ScheduleKind;

/// Returns the learning rate of optimizer step `step`, counted from 0: `peak · step/warmup` during
/// warm-up, then the schedule's curve over the remaining steps. `warmup` and `total` are in steps.
pub fn learning_rate(kind: ScheduleKind, peak: f64, warmup: u64, total: u64, step: u64) -> f64 {
    if step < warmup {
        return peak * step as f64 / warmup.max(1) as f64;
    }
    let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
    peak * match kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Linear => (1.0 - progress).max(0.0),
        ScheduleKind::Cosine => cosine.max(0.0),
        ScheduleKind::CosineWithFloor { min_ratio } => {
            cosine.max(0.0) * (1.0 - min_ratio) + min_ratio
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: ScheduleKind, warmup: u64) -> Vec<f64> {
        (0..6)
            .map(|k| (learning_rate(kind, 1.0, warmup, 5, k) * 1e6).round() / 1e6)
            .collect()
    }

    /// The expected values are the LambdaLR factors of transformers for 5 training steps.
    #[test]
    fn equals_transformers_lambda_schedules() {
        assert_eq!(
            rates(ScheduleKind::Constant, 2),
            [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
        );
        assert_eq!(
            rates(ScheduleKind::Linear, 0),
            [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
        );
        assert_eq!(
            rates(ScheduleKind::Linear, 1),
            [0.0, 1.0, 0.75, 0.5, 0.25, 0.0]
        );
        assert_eq!(
            rates(ScheduleKind::Cosine, 1),
            [0.0, 1.0, 0.853553, 0.5, 0.146447, 0.0]
        );
        assert_eq!(
            rates(ScheduleKind::CosineWithFloor { min_ratio: 0.1 }, 1),
            [0.0, 1.0, 0.868198, 0.55, 0.231802, 0.1]
        );
    }
}
