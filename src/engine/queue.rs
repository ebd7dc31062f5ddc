//! What waits for the device: scoring items, bounded by tokens, and training runs.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry::Context;
use tokio::sync::oneshot;

use super::api::{EngineError, ScoreItem, ScoredItem, TrainingRun, WeightsRef};

/// Runs that may wait behind the running one.
const MAX_WAITING_RUNS: usize = 16;
/// Tokens a second assumed until a rate has been measured, for the first retry hint.
const ASSUMED_RATE: f64 = 500.0;

/// One scoring item and who waits for it.
pub(super) struct Entry {
    pub item: ScoreItem,
    pub policy: WeightsRef,
    pub reference: Option<WeightsRef>,
    pub enqueued: Instant,
    /// The trace that it is part of.
    pub trace: Context,
    pub reply: oneshot::Sender<Result<ScoredItem, EngineError>>,
}

/// What the worker should do next.
pub(super) enum Work {
    /// Score these, in order.
    Score(Vec<Entry>),
    /// Nothing to score: train.
    Train,
    /// Nothing to do, and nothing will come.
    Stop,
}

#[derive(Default)]
struct Inner {
    entries: VecDeque<Entry>,
    tokens: usize,
    runs: VecDeque<TrainingRun>,
    evicted: Vec<PathBuf>,
    draining: bool,
    /// Handles that can still bring work.
    handles: usize,
    tokens_per_second: Option<f64>,
    /// The worker has ended.
    ended: bool,
}

/// The bounded queue in front of one device.
pub(super) struct Queue {
    limit: usize,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Queue {
    pub fn new(limit: usize) -> Self {
        metrics::gauge!("bradley_scoring_queue_limit_tokens").set(limit as f64);
        Queue { limit, inner: Mutex::new(Inner::default()), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The guarded code does not panic half-way through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add_handle(&self) {
        self.lock().handles += 1;
    }

    pub fn drop_handle(&self) {
        self.lock().handles -= 1;
        self.changed.notify_all();
    }

    /// Queues an item, or says why not.
    pub fn push(&self, entry: Entry) -> Result<(), EngineError> {
        let mut inner = self.lock();
        if inner.draining {
            return Err(EngineError::Draining);
        }
        let tokens = entry.item.tokens();
        if !inner.entries.is_empty() && inner.tokens + tokens > self.limit {
            let rate = inner.tokens_per_second.unwrap_or(ASSUMED_RATE).max(1.0);
            let retry_after = Duration::from_secs_f64((inner.tokens as f64 / rate / 2.0).clamp(0.1, 30.0));
            metrics::counter!("bradley_scoring_rejected_total").increment(1);
            return Err(EngineError::QueueFull { queued: inner.tokens, limit: self.limit, retry_after });
        }
        inner.tokens += tokens;
        inner.entries.push_back(entry);
        report(&inner);
        self.changed.notify_all();
        Ok(())
    }

    /// Whether the engine is stopping.
    pub fn is_draining(&self) -> bool {
        self.lock().draining
    }

    /// The worker has ended; called when it has given up what it owned.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Waits until the worker has ended; false when it has not within `patience`.
    pub fn wait_for_end(&self, patience: Duration) -> bool {
        let (inner, _) =
            self.changed.wait_timeout_while(self.lock(), patience, |inner| !inner.ended).unwrap_or_else(PoisonError::into_inner);
        inner.ended
    }

    /// Queues a run.
    pub fn push_run(&self, run: TrainingRun) -> Result<(), EngineError> {
        let mut inner = self.lock();
        if inner.draining {
            return Err(EngineError::Draining);
        }
        if inner.runs.len() >= MAX_WAITING_RUNS {
            let limit = MAX_WAITING_RUNS;
            return Err(EngineError::QueueFull { queued: inner.runs.len(), limit, retry_after: Duration::from_secs(30) });
        }
        inner.runs.push_back(run);
        self.changed.notify_all();
        Ok(())
    }

    pub fn take_run(&self) -> Option<TrainingRun> {
        self.lock().runs.pop_front()
    }

    pub fn evict(&self, dir: PathBuf) {
        self.lock().evicted.push(dir);
    }

    pub fn take_evicted(&self) -> Vec<PathBuf> {
        std::mem::take(&mut self.lock().evicted)
    }

    pub fn set_rate(&self, tokens_per_second: f64) {
        let mut inner = self.lock();
        let old = inner.tokens_per_second.unwrap_or(tokens_per_second);
        inner.tokens_per_second = Some(0.8 * old + 0.2 * tokens_per_second);
    }

    /// Refuses new work from now on; what waits is answered with `Draining`. Waiting runs are handed back to be told.
    pub fn drain(&self) -> Vec<TrainingRun> {
        let mut inner = self.lock();
        inner.draining = true;
        inner.tokens = 0;
        for entry in inner.entries.drain(..) {
            let _ = entry.reply.send(Err(EngineError::Draining));
        }
        report(&inner);
        self.changed.notify_all();
        inner.runs.drain(..).collect()
    }

    /// What a batch of `budget` tokens takes, without waiting; empty when nothing waits.
    pub fn take(&self, budget: usize) -> Vec<Entry> {
        take_batch(&mut self.lock(), budget)
    }

    /// Waits for work. With a run in progress it never waits: there is always something to train. `may_score` is false while scoring has had its
    /// share.
    pub fn next(&self, training: bool, may_score: bool, budget: usize) -> Work {
        let mut inner = self.lock();
        loop {
            if may_score {
                let batch = take_batch(&mut inner, budget);
                if !batch.is_empty() {
                    return Work::Score(batch);
                }
            }
            if training || !inner.runs.is_empty() {
                return Work::Train;
            }
            if inner.draining || inner.handles == 0 {
                return Work::Stop;
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The oldest items up to `budget` tokens (at least one), without those whose caller has left.
fn take_batch(inner: &mut Inner, budget: usize) -> Vec<Entry> {
    let (mut batch, mut tokens) = (Vec::new(), 0);
    while let Some(front) = inner.entries.front() {
        let n = front.item.tokens();
        let abandoned = front.reply.is_closed();
        if !abandoned && !batch.is_empty() && tokens + n > budget {
            break;
        }
        let Some(entry) = inner.entries.pop_front() else { break };
        inner.tokens -= n;
        if abandoned {
            metrics::counter!("bradley_scoring_abandoned_total").increment(1);
            continue;
        }
        tokens += n;
        batch.push(entry);
    }
    report(inner);
    batch
}

fn report(inner: &Inner) {
    metrics::gauge!("bradley_scoring_queue_tokens").set(inner.tokens as f64);
    metrics::gauge!("bradley_scoring_queue_items").set(inner.entries.len() as f64);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::pair::SequenceGroup;

    fn entry(tokens: usize) -> (Entry, oneshot::Receiver<Result<ScoredItem, EngineError>>) {
        let (reply, receiver) = oneshot::channel();
        let item = ScoreItem { groups: vec![SequenceGroup { prompt: vec![0; tokens - 1], completions: vec![vec![0]] }] };
        let policy = WeightsRef::Base { model: "m".into() };
        (Entry { item, policy, reference: None, enqueued: Instant::now(), trace: Context::new(), reply }, receiver)
    }

    #[test]
    fn a_full_queue_refuses_and_an_abandoned_item_is_skipped() {
        let queue = Queue::new(10);
        let (a, a_waits) = entry(6);
        let (b, b_waits) = entry(4);
        let (c, _c_waits) = entry(2);
        queue.push(a).unwrap();
        queue.push(b).unwrap();
        assert!(matches!(queue.push(c), Err(EngineError::QueueFull { queued: 10, limit: 10, .. })));
        drop(a_waits);
        let Work::Score(batch) = queue.next(false, true, 100) else { panic!("there is work") };
        assert_eq!(batch.len(), 1, "the abandoned item never reaches the device");
        assert_eq!(batch[0].item.tokens(), 4);
        drop(b_waits);
    }

    #[test]
    fn an_item_over_the_limit_is_taken_when_nothing_waits_so_that_it_is_not_refused_for_ever() {
        let queue = Queue::new(10);
        assert!(queue.push(entry(50).0).is_ok());
    }

    #[test]
    fn draining_answers_what_waits_and_stops_the_worker() {
        let queue = Queue::new(10);
        queue.add_handle();
        let (a, mut waits) = entry(3);
        queue.push(a).unwrap();
        assert!(queue.drain().is_empty());
        assert!(matches!(waits.try_recv(), Ok(Err(EngineError::Draining))));
        assert!(matches!(queue.next(false, true, 100), Work::Stop));
        assert!(matches!(queue.push(entry(3).0), Err(EngineError::Draining)));
    }

    #[test]
    fn the_end_of_the_worker_is_waited_for_but_not_for_ever() {
        let queue = Queue::new(10);
        assert!(!queue.wait_for_end(Duration::from_millis(1)));
        std::thread::scope(|s| {
            s.spawn(|| queue.end());
            assert!(queue.wait_for_end(Duration::from_secs(60)));
        });
    }
}
