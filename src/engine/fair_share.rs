//! Division of a device's time between training and scoring.
//!
//! Let `share` be the fraction of the device's time that scoring may take while a run is in
//! progress.
//!
//! - A scoring batch that takes s seconds adds s·(1 − share)/share seconds to scoring's
//!   **debt**.
//! - The time for which training has the device pays off the debt. Scoring may run while there is
//!   no debt. It then takes one batch at a time, whatever the batch's length.
//! - Training beyond its share becomes **credit** (a debt below 0), at most [`MAX_CREDIT_SECONDS`].
//!   Requests come in bursts, and the share should hold over longer times.
//! - A batch inside a training unit counts as scoring: the unit's clock stops meanwhile.
//! - A generation step counts as a scoring batch.
//! - A new run starts without debt and without credit.
//!
//! Callers pass the current time, so that tests need no clock.

use std::time::{Duration, Instant};

/// Maximum credit in seconds.
const MAX_CREDIT_SECONDS: f64 = 10.0;

/// Account of the device time between training and scoring.
#[derive(Debug)]
pub(super) struct FairShare {
    /// Fraction of the time for scoring, in (0, 1].
    share: f64,
    /// Seconds of training that must pass before scoring may continue; below 0 it is credit.
    debt: f64,
    /// Start of the training time that has not paid off debt yet.
    training_since: Instant,
    /// Time that scoring took since [`FairShare::start`].
    scored: Duration,
}

impl FairShare {
    /// Opens an account without debt. The share is clamped to [0.01, 1].
    pub fn new(share: f64, now: Instant) -> Self {
        FairShare {
            share: share.clamp(0.01, 1.0),
            debt: 0.0,
            training_since: now,
            scored: Duration::ZERO,
        }
    }

    /// Returns true if scoring may run. Training time since the last call of [`Self::pay`] does not
    /// count yet.
    pub fn may_score(&self) -> bool {
        self.debt <= 0.0
    }

    /// Starts a training unit.
    pub fn start(&mut self, now: Instant) {
        self.training_since = now;
        self.scored = Duration::ZERO;
    }

    /// Ends the unit.
    pub fn stop(&mut self, now: Instant) {
        self.pay(now);
    }

    /// Returns the time that scoring has taken since the unit's start.
    pub fn scored(&self) -> Duration {
        self.scored
    }

    /// Pays off debt with the time that training has had since the last call.
    pub fn pay(&mut self, now: Instant) {
        self.debt = (self.debt
            - now
                .saturating_duration_since(self.training_since)
                .as_secs_f64())
        .max(-MAX_CREDIT_SECONDS);
        self.training_since = now;
    }

    /// Gives the device back to training after a scoring batch inside the unit. The batch started
    /// at `batch_start`.
    pub fn resume(&mut self, batch_start: Instant, now: Instant) {
        self.scored += now.saturating_duration_since(batch_start);
        self.training_since = now;
    }

    /// Adds the debt of a scoring batch that ran while a run was in progress.
    pub fn charge(&mut self, batch: Duration) {
        self.debt += batch.as_secs_f64() * (1.0 - self.share) / self.share;
    }

    /// Removes debt and credit, because another run starts.
    pub fn reset(&mut self) {
        self.debt = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn scoring_waits_until_training_had_its_share() {
        let start = Instant::now();
        let mut account = FairShare::new(0.25, start);
        assert!(account.may_score(), "scoring owes time from the start");
        account.start(start);
        account.charge(2 * SECOND);
        assert!(!account.may_score());
        account.pay(start + 5 * SECOND);
        assert!(!account.may_score(), "5 of 6 seconds pay off the debt");
        account.pay(start + 6 * SECOND);
        assert!(account.may_score());
        // With a share of 1 scoring never owes anything.
        let mut alone = FairShare::new(1.0, start);
        alone.charge(100 * SECOND);
        assert!(alone.may_score());
    }

    #[test]
    fn a_batch_inside_a_unit_is_not_training() {
        let start = Instant::now();
        let mut account = FairShare::new(0.5, start);
        account.start(start);
        account.pay(start + SECOND);
        account.charge(3 * SECOND);
        account.resume(start + SECOND, start + 4 * SECOND);
        // 3 seconds of debt, 1 of credit: 2 to go, from the end of the batch on.
        account.pay(start + 5 * SECOND);
        assert!(!account.may_score());
        account.stop(start + 6 * SECOND);
        assert_eq!(account.scored(), 3 * SECOND);
        assert!(account.may_score());
        account.start(start + 7 * SECOND);
        account.stop(start + 8 * SECOND);
        assert_eq!(account.scored(), Duration::ZERO, "each unit counts its own");
    }

    #[test]
    fn credit_is_limited_and_ends_with_the_run() {
        let start = Instant::now();
        let mut account = FairShare::new(0.5, start);
        account.start(start);
        account.pay(start + 1000 * SECOND);
        account.charge(Duration::from_secs_f64(MAX_CREDIT_SECONDS));
        assert!(account.may_score(), "a burst may not spend the credit");
        account.charge(SECOND);
        assert!(!account.may_score(), "a burst exceeds the credit");
        account.reset();
        assert!(account.may_score());
        account.charge(SECOND);
        assert!(!account.may_score(), "credit remains for the next run");
    }
}
