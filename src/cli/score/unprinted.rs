//! The rows that `bradley score` has read and not printed, and the choice of the pair to send next.
//!
//! The server answers pairs in any order, and refuses one for which it has no room at the moment.
//! Such a pair is sent again after the time that the server asked for, or as soon as another pair
//! of the command has a score, because the room of that one is free then. The number of pairs that
//! are sent and not answered is limited to the number for which the server had room at the last
//! refusal; after as many scores the limit grows by one. No row is read while a pair waits.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::result::{Score, ScoredRow};
use crate::rpc::pb;

/// Maximum number of rows that are read and not printed. Answers come in any order, rows are
/// printed in the order of the files.
const MAX_ROWS: usize = 1024;
/// Maximum number of pairs that are sent and not answered. Their texts are in memory.
const MAX_UNANSWERED: usize = 512;

/// The rows, in the order of the files.
pub(super) struct UnprintedRows {
    rows: VecDeque<UnprintedRow>,
    /// Number of the first of them, from 0 and through all files.
    first: usize,
    /// Numbers of the rows whose pairs are to be sent, for the first time or again.
    unsent: BTreeSet<usize>,
    /// Number of pairs that are sent and not answered.
    unanswered: usize,
    /// Maximum of `unanswered` at the moment.
    limit: usize,
    /// Number of scores since `limit` was set.
    scores: usize,
    /// Time before which no pair is sent, because the server had no room.
    resume_at: Option<Instant>,
    /// Time of the first refusal since the last answer.
    refused_since: Option<Instant>,
}

struct UnprintedRow {
    row: ScoredRow,
    /// `None` once the row has a result.
    pair: Option<pb::Pair>,
    /// True while the pair is sent and not answered.
    is_sent: bool,
}

impl UnprintedRows {
    pub fn new() -> Self {
        UnprintedRows {
            rows: VecDeque::new(),
            first: 0,
            unsent: BTreeSet::new(),
            unanswered: 0,
            limit: MAX_UNANSWERED,
            scores: 0,
            resume_at: None,
            refused_since: None,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Returns true if the next row can be read.
    pub fn may_read(&self) -> bool {
        self.unsent.is_empty() && self.unanswered < self.limit && self.rows.len() < MAX_ROWS
    }

    /// Adds the next row. A row that cannot be read has no pair.
    pub fn push(&mut self, row: ScoredRow, pair: Option<pb::Pair>) {
        let index = self.first + self.rows.len();
        let pair = pair.map(|pair| pb::Pair {
            id: index.to_string(),
            ..pair
        });
        if pair.is_some() {
            self.unsent.insert(index);
        }
        self.rows.push_back(UnprintedRow {
            row,
            pair,
            is_sent: false,
        });
    }

    /// Removes the first row if it has a result.
    pub fn pop(&mut self) -> Option<ScoredRow> {
        if self.rows.front()?.pair.is_some() {
            return None;
        }
        self.first += 1;
        self.rows.pop_front().map(|unprinted| unprinted.row)
    }

    /// Returns true if [`Self::send`] has a pair and it can be sent now.
    pub fn may_send(&self, now: Instant) -> bool {
        !self.unsent.is_empty()
            && self.unanswered < self.limit
            && self.resume_at.is_none_or(|at| at <= now)
    }

    /// Returns the time at which a pair that waits can be sent, if it is after `now`.
    pub fn wakes_at(&self, now: Instant) -> Option<Instant> {
        self.resume_at
            .filter(|at| *at > now && !self.unsent.is_empty())
    }

    /// Takes the pair to send, the first one of the files.
    pub fn send(&mut self) -> Option<pb::Pair> {
        let index = self.unsent.pop_first()?;
        let unprinted = self.rows.get_mut(index.checked_sub(self.first)?)?;
        unprinted.is_sent = true;
        self.unanswered += 1;
        unprinted.pair.clone()
    }

    /// Takes the score of a pair. Its room is free now.
    pub fn scored(&mut self, index: usize, score: Score) {
        if self.settle(index, Ok(score)).is_none() {
            return;
        }
        self.resume_at = None;
        self.scores += 1;
        if self.scores >= self.limit {
            self.limit = (self.limit + 1).min(MAX_UNANSWERED);
            self.scores = 0;
        }
    }

    /// Takes the error of a pair that can never be scored.
    pub fn failed(&mut self, index: usize, message: String) {
        self.settle(index, Err(message));
    }

    /// Takes the error of a pair that the server failed to score.
    pub fn failed_at_server(&mut self, index: usize, message: String) {
        if let Some(row) = self.settle(index, Err(message)) {
            row.of_server = true;
        }
    }

    /// Takes the refusal of a pair that is to be sent again after `delay`.
    pub fn refused(&mut self, index: usize, delay: Duration, now: Instant) {
        let Some(unprinted) = self.sent_row(index) else {
            return;
        };
        unprinted.is_sent = false;
        self.unsent.insert(index);
        self.unanswered -= 1;
        self.limit = self.unanswered.max(1);
        self.scores = 0;
        self.resume_at = Some(now + delay);
        self.begin_patience(now);
    }

    /// Notes that the server refused something, which is to be sent again.
    pub fn begin_patience(&mut self, now: Instant) {
        self.refused_since.get_or_insert(now);
    }

    /// Returns true if the server has refused everything for this time.
    pub fn are_refused_for(&self, time: Duration, now: Instant) -> bool {
        self.refused_since
            .is_some_and(|since| now.saturating_duration_since(since) >= time)
    }

    /// Makes all pairs without an answer ready to be sent over another stream.
    pub fn send_again(&mut self) {
        for (index, unprinted) in (self.first..).zip(&mut self.rows) {
            if std::mem::take(&mut unprinted.is_sent) {
                self.unsent.insert(index);
            }
        }
        self.unanswered = 0;
        self.resume_at = None;
    }

    /// Sets the result of a row whose pair is sent; `None` if there is no such row.
    fn settle(&mut self, index: usize, result: Result<Score, String>) -> Option<&mut ScoredRow> {
        self.sent_row(index)?;
        self.unanswered -= 1;
        self.refused_since = None;
        let unprinted = self.sent_row(index)?;
        unprinted.is_sent = false;
        unprinted.pair = None;
        unprinted.row.result = result;
        Some(&mut unprinted.row)
    }

    fn sent_row(&mut self, index: usize) -> Option<&mut UnprintedRow> {
        let place = index.checked_sub(self.first)?;
        self.rows.get_mut(place).filter(|row| row.is_sent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_secs(1);

    /// Reads and sends up to this number of rows, and returns them.
    fn sent(number: usize) -> UnprintedRows {
        let mut rows = UnprintedRows::new();
        read(&mut rows, number);
        rows
    }

    /// Reads and sends up to this number of rows, and returns how many were sent.
    fn read(rows: &mut UnprintedRows, number: usize) -> usize {
        let row = || ScoredRow {
            row: 1,
            pair: None,
            id: None,
            ignored: Vec::new(),
            missing_column: None,
            of_server: false,
            result: Ok(Score::default()),
        };
        (0..number)
            .take_while(|_| {
                let may_read = rows.may_read();
                if may_read {
                    rows.push(row(), Some(pb::Pair::default()));
                    assert!(rows.send().is_some());
                }
                may_read
            })
            .count()
    }

    fn sends(rows: &mut UnprintedRows, now: Instant) -> Option<String> {
        let pair = rows.may_send(now).then(|| rows.send())??;
        Some(pair.id)
    }

    #[test]
    fn a_refused_pair_is_sent_again_after_its_delay_or_the_score_of_another() {
        let now = Instant::now();
        let mut rows = sent(4);
        rows.refused(3, DELAY, now);
        rows.refused(1, DELAY, now);
        assert!(!rows.may_read() && !rows.may_send(now));
        assert_eq!(rows.wakes_at(now), Some(now + DELAY));
        // The server had room for two pairs, and two are on their way.
        assert_eq!(sends(&mut rows, now + DELAY), None);
        rows.scored(0, Score::default());
        assert_eq!(sends(&mut rows, now).as_deref(), Some("1"));
        assert_eq!(sends(&mut rows, now), None);
        rows.refused(1, DELAY, now);
        rows.failed(2, "too long".to_owned());
        // A pair that failed had no room at the server, so none became free.
        assert_eq!(sends(&mut rows, now), None);
        assert_eq!(sends(&mut rows, now + DELAY).as_deref(), Some("1"));
        assert_eq!(rows.wakes_at(now + DELAY), None);
        rows.scored(1, Score::default());
        assert_eq!(sends(&mut rows, now).as_deref(), Some("3"));
        rows.scored(3, Score::default());
        assert!((0..4).all(|_| rows.pop().is_some()));
        assert!(rows.is_empty() && rows.may_read());
    }

    #[test]
    fn after_a_refusal_more_pairs_are_sent_step_by_step() {
        let mut rows = sent(3);
        rows.refused(2, DELAY, Instant::now());
        rows.refused(1, DELAY, Instant::now());
        for index in 0..3 {
            rows.scored(index, Score::default());
            rows.send();
        }
        // The first score raised the limit of one to two, the others to three.
        assert_eq!((rows.unanswered, rows.limit), (0, 3));
        assert_eq!(read(&mut rows, 9), 3);
    }

    #[test]
    fn the_numbers_of_rows_and_of_unanswered_pairs_are_limited() {
        let mut rows = UnprintedRows::new();
        assert_eq!(read(&mut rows, 2000), MAX_UNANSWERED);
        // All but the first have a score.
        let second = 2 * MAX_UNANSWERED - 1;
        (1..MAX_UNANSWERED).for_each(|index| rows.scored(index, Score::default()));
        assert_eq!(read(&mut rows, 2000), MAX_UNANSWERED - 1);
        (MAX_UNANSWERED..second).for_each(|index| rows.scored(index, Score::default()));
        assert_eq!(read(&mut rows, 2000), MAX_ROWS - second);
        assert_eq!(rows.rows.len(), MAX_ROWS);
        assert!(rows.pop().is_none());
    }

    #[test]
    fn patience_ends_when_nothing_but_refusals_came_for_a_while() {
        let now = Instant::now();
        let mut rows = sent(3);
        rows.refused(0, DELAY, now);
        assert!(!rows.are_refused_for(DELAY, now) && rows.are_refused_for(Duration::ZERO, now));
        rows.refused(1, DELAY, now + DELAY);
        assert!(rows.are_refused_for(DELAY, now + DELAY));
        rows.failed_at_server(2, "out of memory".to_owned());
        assert!(!rows.are_refused_for(DELAY, now + DELAY));
    }

    #[test]
    fn another_stream_gets_every_pair_without_an_answer() {
        let mut rows = sent(3);
        rows.scored(1, Score::default());
        rows.send_again();
        let now = Instant::now();
        assert_eq!(sends(&mut rows, now).as_deref(), Some("0"));
        assert_eq!(sends(&mut rows, now).as_deref(), Some("2"));
        assert_eq!(sends(&mut rows, now), None);
        // An answer to a pair that is not awaited changes nothing.
        rows.scored(1, Score::default());
        rows.scored(7, Score::default());
        assert_eq!(rows.unanswered, 2);
    }
}
