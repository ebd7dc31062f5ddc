//! Work that was done for an owner.

use std::ops::AddAssign;

use jiff::civil::Date;

/// The day with the number 0.
const EPOCH: Date = Date::constant(1970, 1, 1);

/// Returns the number of days from 1970-01-01 to `date`, by which a day is stored.
pub fn day_number(date: Date) -> i64 {
    EPOCH
        .until(date)
        .map_or(0, |span| i64::from(span.get_days()))
}

/// Returns the day with this number; `None` outside the range of dates.
pub fn date_of(day: i64) -> Option<Date> {
    let span = jiff::Span::new().try_days(day).ok()?;
    EPOCH.checked_add(span).ok()
}

/// Returns a day as `2026-07-26`; empty outside the range of dates.
pub fn day_text(day: i64) -> String {
    date_of(day).map_or_else(String::new, |d| d.to_string())
}

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
