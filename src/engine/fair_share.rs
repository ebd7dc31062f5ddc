//! Whose turn it is on a device that trains and scores.
//!
//! The rules, with `share` the part of the device's time that scoring may take while a run is in
//! progress:
//!
//! - A batch that takes s seconds makes a **debt** of s·(1 − share)/share seconds to training.
//! - Training pays the debt off with the time for which it has the device. Scoring has its **turn**
//!   while there is no debt, and then takes one batch at a time, however long that is.
//! - Training beyond its share is remembered as **credit** (a debt below 0), at most [`CREDIT`]
//!   seconds of it: requests come in bursts, and the share is meant over longer times.
//! - A batch inside a training unit counts as scoring, not as training: the unit's clock stands
//!   still meanwhile.
//! - Another run begins without debt and without credit.
//!
//! Times are given by the caller, so that a test needs no clock.

use std::time::{Duration, Instant};

/// The most seconds of training beyond its share that are remembered.
const CREDIT: f64 = 10.0;

/// The account between training and scoring.
#[derive(Debug)]
pub(super) struct FairShare {
    /// Scoring's part of the time, in (0, 1].
    share: f64,
    /// Seconds that training must get before scoring goes on; below 0 is credit.
    debt: f64,
    /// Since when training has the device without an interruption.
    training_since: Instant,
    /// What scoring took since [`FairShare::start`].
    scored: Duration,
}

impl FairShare {
    /// Opens an account without debt. A share below 0.01 or above 1 is taken for the nearest of
    /// these.
    pub fn new(share: f64, now: Instant) -> Self {
        FairShare {
            share: share.clamp(0.01, 1.0),
            debt: 0.0,
            training_since: now,
            scored: Duration::ZERO,
        }
    }

    /// Returns true if it is scoring's turn, as of the last payment.
    pub fn is_scorings_turn(&self) -> bool {
        self.debt <= 0.0
    }

    /// Begins a training unit.
    pub fn start(&mut self, now: Instant) {
        self.training_since = now;
        self.scored = Duration::ZERO;
    }

    /// Ends the unit; returns how much of its time scoring had.
    pub fn stop(&mut self, now: Instant) -> Duration {
        self.pay(now);
        self.scored
    }

    /// Pays off the debt with the time for which training has had the device until now.
    pub fn pay(&mut self, now: Instant) {
        self.debt = (self.debt - now.saturating_duration_since(self.training_since).as_secs_f64())
            .max(-CREDIT);
        self.training_since = now;
    }

    /// Gives the device back to training after a batch inside its unit, which began at
    /// `batch_start`.
    pub fn resume(&mut self, batch_start: Instant, now: Instant) {
        self.scored += now.saturating_duration_since(batch_start);
        self.training_since = now;
    }

    /// Charges scoring for a batch while a run is in progress.
    pub fn charge(&mut self, batch: Duration) {
        self.debt += batch.as_secs_f64() * (1.0 - self.share) / self.share;
    }

    /// Forgets debt and credit: another run begins.
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
        assert!(account.is_scorings_turn(), "nothing is owed at first");
        account.start(start);
        account.charge(2 * SECOND);
        assert!(!account.is_scorings_turn());
        account.pay(start + 5 * SECOND);
        assert!(!account.is_scorings_turn(), "5 of 6 seconds");
        account.pay(start + 6 * SECOND);
        assert!(account.is_scorings_turn());
        // Alone on the device it owes nothing.
        let mut alone = FairShare::new(1.0, start);
        alone.charge(100 * SECOND);
        assert!(alone.is_scorings_turn());
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
        assert!(!account.is_scorings_turn());
        assert_eq!(account.stop(start + 6 * SECOND), 3 * SECOND);
        assert!(account.is_scorings_turn());
        account.start(start + 7 * SECOND);
        assert_eq!(account.stop(start + 8 * SECOND), Duration::ZERO, "each unit counts its own");
    }

    #[test]
    fn credit_is_limited_and_ends_with_the_run() {
        let start = Instant::now();
        let mut account = FairShare::new(0.5, start);
        account.start(start);
        account.pay(start + 1000 * SECOND);
        account.charge(Duration::from_secs_f64(CREDIT));
        assert!(account.is_scorings_turn(), "a burst spends the credit");
        account.charge(SECOND);
        assert!(!account.is_scorings_turn(), "and no more than that");
        account.reset();
        assert!(account.is_scorings_turn());
        account.charge(SECOND);
        assert!(!account.is_scorings_turn(), "credit is gone, too");
    }
}
