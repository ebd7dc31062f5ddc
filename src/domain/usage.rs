//! Work that was done for an owner.

use std::ops::AddAssign;

/// Amounts of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Number of pairs scored.
    pub scored_pairs: u64,
    /// Number of answers scored that are not of a pair.
    pub scored_completions: u64,
    /// Number of tokens scored or generated; a prompt counts once for all its answers or samples.
    pub scored_tokens: u64,
    /// Time for which devices trained, in microseconds; each device of a run counts.
    pub training_device_us: u64,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Usage) {
        self.scored_pairs += other.scored_pairs;
        self.scored_completions += other.scored_completions;
        self.scored_tokens += other.scored_tokens;
        self.training_device_us += other.training_device_us;
    }
}

/// The work of a day, or of several days together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerUsage {
    /// The owner; empty without authentication.
    pub owner: String,
    /// Number of the day since 1970 (UTC); `None` for several days together.
    pub day: Option<i64>,
    /// The work.
    pub usage: Usage,
}
