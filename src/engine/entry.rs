//! A scoring item in the queue.

use std::time::Instant;

use opentelemetry::Context;
use tokio::sync::oneshot;

use super::api::{EngineError, ScoreItem, ScoredItem, WeightsRef};
use super::queue::{Queue, WorkItem};

/// Scoring queue of an engine.
pub(super) type ScoringQueue = Queue<Entry>;

/// One scoring item with the channel for its answer.
pub(super) struct Entry {
    pub item: ScoreItem,
    pub policy: WeightsRef,
    pub reference: Option<WeightsRef>,
    pub enqueued: Instant,
    /// Trace of the caller.
    pub trace: Context,
    pub reply: oneshot::Sender<Result<ScoredItem, EngineError>>,
}

impl WorkItem for Entry {
    fn tokens(&self) -> usize {
        self.item.tokens()
    }

    fn is_abandoned(&self) -> bool {
        self.reply.is_closed()
    }

    fn live_job(&self) -> Option<&str> {
        [Some(&self.policy), self.reference.as_ref()]
            .into_iter()
            .flatten()
            .find_map(|weights| match weights {
                WeightsRef::Live { job } | WeightsRef::LiveReference { job } => Some(job.as_str()),
                _ => None,
            })
    }

    fn refuse(self) {
        // The caller may have left.
        let _ = self.reply.send(Err(EngineError::Draining));
    }
}
