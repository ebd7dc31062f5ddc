//! Jobs that this process leaves in the queue for a while: an input that they need is missing or
//! has changed, and is unlikely to be restored soon, or too many runs wait for a device.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Longest pause before a postponed job is tried again.
const MAX_PAUSE: Duration = Duration::from_secs(600);

/// Postponed jobs by id. Other processes do not know of the pause and may claim them at any time.
#[derive(Debug, Default)]
pub(super) struct Postponed(Mutex<HashMap<String, Pause>>);

#[derive(Clone, Copy, Debug)]
struct Pause {
    until: Instant,
    length: Duration,
}

impl Postponed {
    /// Postpones a job by `first`, or by twice its last pause if it was postponed before.
    pub fn postpone(&self, job: &str, first: Duration) {
        self.postpone_at(Instant::now(), job, first);
    }

    fn postpone_at(&self, now: Instant, job: &str, first: Duration) {
        let mut pauses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let length = pauses
            .get(job)
            .map_or(first, |last| (last.length * 2).min(MAX_PAUSE.max(first)));
        pauses.insert(
            job.to_owned(),
            Pause {
                until: now + length,
                length,
            },
        );
    }

    /// Removes a job, so that it may be claimed at once and its next pause is `first` again.
    pub fn forget(&self, job: &str) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(job);
    }

    /// Returns the ids of the jobs that are postponed now.
    pub fn jobs(&self) -> Vec<String> {
        self.pauses_at(Instant::now())
            .into_iter()
            .map(|(job, _)| job)
            .collect()
    }

    /// Returns the earliest end of a pause; `None` if no job is postponed.
    pub fn next_due(&self) -> Option<Instant> {
        self.pauses_at(Instant::now())
            .into_iter()
            .map(|(_, until)| until)
            .min()
    }

    /// Returns the jobs that are postponed at `now`, each with the end of its pause.
    fn pauses_at(&self, now: Instant) -> Vec<(String, Instant)> {
        let pauses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pauses
            .iter()
            .filter(|(_, pause)| pause.until > now)
            .map(|(job, pause)| (job.clone(), pause.until))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_until_the_job_runs() {
        let (postponed, start, second) =
            (Postponed::default(), Instant::now(), Duration::from_secs(1));
        let mut now = start;
        for seconds in [3, 6, 12] {
            postponed.postpone_at(now, "a", 3 * second);
            let until = now + seconds * second;
            assert_eq!(
                postponed.pauses_at(until - second / 1000),
                [("a".to_owned(), until)]
            );
            assert_eq!(postponed.pauses_at(until), []);
            now = until;
        }
        postponed.forget("a");
        postponed.postpone_at(now, "a", 3 * second);
        assert_eq!(postponed.pauses_at(now + 3 * second), []);
        for _ in 0..20 {
            postponed.postpone_at(now, "a", 3 * second);
        }
        assert_eq!(
            postponed.pauses_at(now),
            [("a".to_owned(), now + MAX_PAUSE)]
        );
    }
}
