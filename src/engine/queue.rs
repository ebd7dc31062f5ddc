//! Queue of work for the devices, which all workers share. The number of tokens of the scoring
//! items in it is limited, and so are the numbers of training runs and of prompts to continue.
//! [`Queue::next`] gives a free worker scoring items first, then a run, of each kind the oldest
//! that it may take. Prompts do not wait for these: a free worker takes a generation step before
//! each call of [`Queue::next`], and is woken if prompts are all that waits.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::api::{EngineError, RunCommand, RunEvent, TrainingRun};
use super::generation::GenerationEntry;
use super::memory::HostMemory;
use super::needs::Needs;

/// Maximum number of runs that wait for a worker.
const MAX_WAITING_RUNS: usize = 16;
/// Maximum number of generation requests that wait for a worker.
const MAX_WAITING_GENERATIONS: usize = 256;
/// Time for which a worker waits for other work while no caller reads its generated tokens.
const BLOCKED_WAIT: Duration = Duration::from_millis(5);
/// Scoring rate in tokens per second that is assumed for retry hints until a rate has been
/// measured.
const ASSUMED_TOKENS_PER_SECOND: f64 = 500.0;
/// Interval at which an idle worker checks whether a waiting run was told to stop.
const STOP_CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// A small piece of work that is done in batches, between the units of runs and inside them.
pub(super) trait WorkItem {
    /// Returns its size in tokens, which counts against the queue's limit and a batch's budget.
    fn tokens(&self) -> usize;
    /// Returns true if the caller no longer waits for the answer.
    fn is_abandoned(&self) -> bool;
    /// Returns the job whose current weights it needs, if any. Only the worker that trains the job
    /// has them.
    fn live_job(&self) -> Option<&str>;
    /// Answers it with [`EngineError::Draining`].
    fn refuse(self);
}

/// A worker that asks for work.
#[derive(Clone, Copy)]
pub(super) struct Seeker<'a> {
    pub worker: usize,
    /// Job that it trains.
    pub job: Option<&'a str>,
    /// Memory in bytes that is free for a run; `None` if the worker takes no runs.
    pub room: Option<u64>,
    /// Maximum memory in bytes for a run on this worker, besides the base models.
    pub limit: u64,
    /// State of the generation requests that it has in progress.
    pub generating: Generates,
}

/// State of the generation requests that a worker has in progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Generates {
    /// There are none.
    #[default]
    Nothing,
    /// At least one can be continued.
    Requests,
    /// None can be continued, because their callers do not read.
    Blocked,
}

/// A run that waits for a worker.
struct Waiting {
    run: TrainingRun,
    needs: Needs,
    /// True once the client has been told that the run waits for memory.
    notified: bool,
}

impl Waiting {
    /// Tells the client, once, that the run waits for host memory. `left` is the free part in
    /// bytes.
    fn notify_waits_for_memory(&mut self, left: u64) {
        if std::mem::replace(&mut self.notified, true) {
            return;
        }
        let message = format!(
            "the run waits until another one has ended: it needs about {} MiB of the machine's \
             memory, {} MiB are left of memory_limit",
            self.needs.host.div_ceil(1 << 20),
            left >> 20
        );
        // This is the run's first event, so there is room for it in the channel.
        let _ = self.run.events.try_send(
            RunEvent::Log {
                severity: "info",
                message,
            }
            .into(),
        );
    }
}

/// Next task of a worker.
pub(super) enum Work<W> {
    /// Score these items, in order.
    Score(Vec<W>),
    /// Nothing that may be scored now: continue the run.
    Train,
    /// Nothing to score: start this run.
    Begin(Box<TrainingRun>, Needs),
    /// Nothing to score, no run: generate.
    Generate,
    /// Nothing to compute, but weights must be evicted.
    Evict,
    /// Nothing to do, and no more work will come.
    Stop,
}

struct QueueState<W> {
    entries: VecDeque<W>,
    tokens: usize,
    runs: VecDeque<Waiting>,
    generations: VecDeque<GenerationEntry>,
    workers: Vec<WorkerState>,
    draining: bool,
    /// Engine handles that can still add work.
    handles: usize,
    /// Measured scoring rate of one worker.
    tokens_per_second: Option<f64>,
}

/// State of a worker as the queue knows it.
#[derive(Default)]
struct WorkerState {
    /// Job that it trains.
    job: Option<String>,
    /// Memory in bytes that is free for a run; `None` if it takes none now.
    room: Option<u64>,
    /// Maximum memory in bytes for a run on this worker.
    limit: u64,
    /// Host memory in bytes that its run needs.
    host: u64,
    /// Folders whose weights it must evict.
    evicted: Vec<PathBuf>,
    /// True if it must check that its cached weights still fit the memory.
    must_fit: bool,
    ended: bool,
}

/// The bounded queue in front of the devices.
pub(super) struct Queue<W> {
    limit: usize,
    /// Host memory, which the runs in progress share.
    host: HostMemory,
    inner: Mutex<QueueState<W>>,
    changed: Condvar,
}

impl<W: WorkItem> Queue<W> {
    /// Creates the queue for `workers` workers, numbered from 0.
    pub fn new(limit: usize, workers: usize) -> Self {
        metrics::gauge!("bradley_scoring_queue_limit_tokens").set(limit as f64);
        let inner = QueueState {
            entries: VecDeque::new(),
            tokens: 0,
            runs: VecDeque::new(),
            generations: VecDeque::new(),
            workers: (0..workers).map(|_| WorkerState::default()).collect(),
            draining: false,
            handles: 0,
            tokens_per_second: None,
        };
        Queue {
            limit,
            host: HostMemory::new(u64::MAX),
            inner: Mutex::new(inner),
            changed: Condvar::new(),
        }
    }

    /// Allows runs to be in progress together only if `host` is enough for all of them.
    pub fn sharing(self, host: HostMemory) -> Self {
        Queue { host, ..self }
    }

    /// Returns the host memory that the runs in progress share.
    pub fn host_memory(&self) -> &HostMemory {
        &self.host
    }

    fn lock(&self) -> MutexGuard<'_, QueueState<W>> {
        // The guarded code does not panic in the middle of a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add_handle(&self) {
        self.lock().handles += 1;
    }

    pub fn drop_handle(&self) {
        self.lock().handles -= 1;
        self.changed.notify_all();
    }

    /// Adds an item to the queue.
    ///
    /// # Errors
    /// `Draining`, or `QueueFull` if the queued tokens would exceed the limit with this item. An
    /// item for an empty queue is always accepted.
    pub fn push(&self, entry: W) -> Result<(), EngineError> {
        let mut inner = self.lock();
        if inner.draining {
            return Err(EngineError::Draining);
        }
        let tokens = entry.tokens();
        if !inner.entries.is_empty() && inner.tokens + tokens > self.limit {
            let rate = (inner.tokens_per_second.unwrap_or(ASSUMED_TOKENS_PER_SECOND)
                * inner.workers.len() as f64)
                .max(1.0);
            let retry_after =
                Duration::from_secs_f64((inner.tokens as f64 / rate / 2.0).clamp(0.1, 30.0));
            metrics::counter!("bradley_scoring_rejected_total").increment(1);
            return Err(EngineError::QueueFull {
                queued: inner.tokens,
                limit: self.limit,
                retry_after,
            });
        }
        inner.tokens += tokens;
        inner.entries.push_back(entry);
        report(&inner);
        self.changed.notify_all();
        Ok(())
    }

    /// Returns true if the engine is stopping.
    pub fn is_draining(&self) -> bool {
        self.lock().draining
    }

    /// Marks a worker as ended. Called after the worker has released everything that it owned.
    pub fn end(&self, worker: usize) {
        let mut inner = self.lock();
        inner.workers[worker] = WorkerState {
            ended: true,
            ..WorkerState::default()
        };
        self.count_host(&inner);
        self.changed.notify_all();
    }

    /// Waits until all workers have ended. Returns false if `patience` passes first.
    pub fn wait_for_end(&self, patience: Duration) -> bool {
        let waits = |inner: &mut QueueState<W>| inner.workers.iter().any(|w| !w.ended);
        let (inner, _) = self
            .changed
            .wait_timeout_while(self.lock(), patience, waits)
            .unwrap_or_else(PoisonError::into_inner);
        inner.workers.iter().all(|w| w.ended)
    }

    /// Adds a run to the queue.
    ///
    /// # Errors
    /// `Draining`, or `TooManyRuns` if [`MAX_WAITING_RUNS`] runs wait.
    pub fn push_run(&self, run: TrainingRun, needs: Needs) -> Result<(), EngineError> {
        let mut inner = self.lock();
        if inner.draining {
            return Err(EngineError::Draining);
        }
        if inner.runs.len() >= MAX_WAITING_RUNS {
            return Err(EngineError::TooManyRuns {
                limit: MAX_WAITING_RUNS,
                retry_after: Duration::from_secs(30),
            });
        }
        inner.runs.push_back(Waiting {
            run,
            needs,
            notified: false,
        });
        self.changed.notify_all();
        Ok(())
    }

    /// Adds a prompt to continue.
    ///
    /// # Errors
    /// `Draining`, or `TooManyGenerations` if [`MAX_WAITING_GENERATIONS`] requests wait.
    pub fn push_generation(&self, entry: GenerationEntry) -> Result<(), EngineError> {
        let mut inner = self.lock();
        if inner.draining {
            return Err(EngineError::Draining);
        }
        drop_abandoned(&mut inner.generations);
        if inner.generations.len() >= MAX_WAITING_GENERATIONS {
            metrics::counter!("bradley_generation_rejected_total").increment(1);
            return Err(EngineError::TooManyGenerations {
                limit: MAX_WAITING_GENERATIONS,
                retry_after: Duration::from_secs(5),
            });
        }
        inner.generations.push_back(entry);
        report_generations(&inner);
        self.changed.notify_all();
        Ok(())
    }

    /// Returns the oldest generation request that the worker of `job` may take, if it `fits`. Drops
    /// those whose callers have left. No request overtakes one that does not fit.
    pub fn take_generation(
        &self,
        job: Option<&str>,
        fits: &dyn Fn(&GenerationEntry) -> bool,
    ) -> Option<GenerationEntry> {
        let mut inner = self.lock();
        let QueueState {
            generations,
            workers,
            ..
        } = &mut *inner;
        drop_abandoned(generations);
        let oldest = generations
            .iter()
            .position(|waiting| may_take(workers, waiting.live_job(), job));
        let taken = match oldest {
            Some(oldest) if fits(&generations[oldest]) => generations.remove(oldest),
            _ => None,
        };
        report_generations(&inner);
        taken
    }

    /// Returns true if a generation request waits that the worker of `job` may take.
    pub fn has_generation(&self, job: Option<&str>) -> bool {
        has_generation(&self.lock(), job)
    }

    /// Makes every worker evict the weights in a folder. Wakes idle workers.
    pub fn evict(&self, dir: &Path) {
        self.lock()
            .workers
            .iter_mut()
            .filter(|w| !w.ended)
            .for_each(|w| w.evicted.push(dir.to_owned()));
        self.changed.notify_all();
    }

    /// Returns the folders whose weights a worker must evict before it computes with any weights.
    pub fn take_evicted(&self, worker: usize) -> Vec<PathBuf> {
        std::mem::take(&mut self.lock().workers[worker].evicted)
    }

    /// Makes every worker evict weights that do not fit beside the runs in progress. Wakes idle
    /// workers.
    pub fn request_fit_check(&self) {
        self.lock()
            .workers
            .iter_mut()
            .filter(|w| !w.ended)
            .for_each(|w| w.must_fit = true);
        self.changed.notify_all();
    }

    /// Returns true, once, if a worker must evict weights that do not fit.
    pub fn take_must_fit(&self, worker: usize) -> bool {
        std::mem::take(&mut self.lock().workers[worker].must_fit)
    }

    pub fn set_rate(&self, tokens_per_second: f64) {
        let mut inner = self.lock();
        let old = inner.tokens_per_second.unwrap_or(tokens_per_second);
        inner.tokens_per_second = Some(0.8 * old + 0.2 * tokens_per_second);
    }

    /// Refuses new work from now on and answers waiting items with `Draining`. Returns the waiting
    /// runs, so that the caller can report to their clients.
    pub fn drain(&self) -> Vec<TrainingRun> {
        let mut inner = self.lock();
        inner.draining = true;
        inner.tokens = 0;
        for entry in inner.entries.drain(..) {
            entry.refuse();
        }
        drop_abandoned(&mut inner.generations);
        for entry in inner.generations.drain(..) {
            entry.refuse(EngineError::Draining);
        }
        report(&inner);
        report_generations(&inner);
        self.changed.notify_all();
        inner.runs.drain(..).map(|waiting| waiting.run).collect()
    }

    /// Returns a scoring batch of up to `budget` tokens, or of one item that is larger, without
    /// waiting. Empty if there is nothing that the worker of `job` may score.
    pub fn take(&self, job: &str, budget: usize) -> Vec<W> {
        take_batch(&mut self.lock(), Some(job), budget)
    }

    /// Updates the host memory that the runs in progress need.
    fn count_host(&self, inner: &QueueState<W>) {
        self.host
            .set_in_use(inner.workers.iter().map(|w| w.host).sum());
    }

    /// Takes the run that worker `me` should start, if there is one. A run may overtake another
    /// only if the other waits for a larger device. No run overtakes one that waits for host
    /// memory.
    fn next_run(&self, inner: &mut QueueState<W>, me: usize) -> Option<Waiting> {
        let QueueState { runs, workers, .. } = inner;
        // A worker that takes no runs has no `room`.
        workers[me].room?;
        // A stopped run can go to any worker, which ends it immediately.
        if let Some(stopped) = runs
            .iter()
            .position(|waiting| waiting.run.control.command() != RunCommand::Run)
        {
            return runs.remove(stopped).map(|waiting| Waiting {
                needs: Needs::default(),
                ..waiting
            });
        }
        let mut in_use: u64 = workers.iter().map(|w| w.host).sum();
        for (i, waiting) in runs.iter_mut().enumerate() {
            let needs = waiting.needs;
            if !workers
                .iter()
                .any(|w| w.room.is_some() && w.limit >= needs.minimum)
            {
                continue;
            }
            // Each run fits on its own; this was checked before it was queued.
            if in_use > 0 && !self.host.allows(in_use.saturating_add(needs.host)) {
                waiting.notify_waits_for_memory(self.host.left());
                return None;
            }
            if has_most_room(workers, me, needs.minimum) {
                return runs.remove(i);
            }
            // Another worker will take it; reserve its memory.
            in_use = in_use.saturating_add(needs.host);
        }
        None
    }

    /// Waits for work. Returns immediately if the worker has a run in progress. `may_score` is
    /// false while scoring has used up its share of the time.
    pub fn next(&self, seeker: Seeker, may_score: bool, budget: usize) -> Work<W> {
        let mut inner = self.lock();
        let training = seeker.job.is_some();
        let me = &mut inner.workers[seeker.worker];
        if me.job.as_deref() != seeker.job {
            me.job = seeker.job.map(str::to_owned);
        }
        (me.room, me.limit) = (seeker.room.filter(|_| !training), seeker.limit);
        if !training && std::mem::take(&mut me.host) > 0 {
            // Another run may have been waiting for this memory.
            self.count_host(&inner);
            self.changed.notify_all();
        }
        loop {
            if may_score {
                let batch = take_batch(&mut inner, seeker.job, budget);
                if !batch.is_empty() {
                    return Work::Score(batch);
                }
            }
            if training {
                return Work::Train;
            }
            if let Some(Waiting { run, needs, .. }) = self.next_run(&mut inner, seeker.worker) {
                let me = &mut inner.workers[seeker.worker];
                (me.job, me.room, me.host) = (Some(run.job.clone()), None, needs.host);
                self.count_host(&inner);
                // The next run goes to another worker, which may be waiting.
                self.changed.notify_all();
                return Work::Begin(Box::new(run), needs);
            }
            match seeker.generating {
                Generates::Requests => return Work::Generate,
                Generates::Nothing if has_generation(&inner, None) => return Work::Generate,
                Generates::Nothing => {}
                Generates::Blocked => {
                    // New work ends the wait early.
                    drop(self.changed.wait_timeout(inner, BLOCKED_WAIT));
                    return Work::Generate;
                }
            }
            if inner.draining || inner.handles == 0 {
                return Work::Stop;
            }
            let me = &inner.workers[seeker.worker];
            if me.must_fit || !me.evicted.is_empty() {
                return Work::Evict;
            }
            inner = match inner.runs.is_empty() {
                true => self
                    .changed
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner),
                // Stopping a waiting run does not notify the queue, so check at intervals.
                false => {
                    self.changed
                        .wait_timeout(inner, STOP_CHECK_INTERVAL)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }
}

/// Returns true if worker `me` should take a run that needs at least `minimum` bytes: among the
/// idle workers that are large enough, it has the most free memory. The lower number wins a tie.
fn has_most_room(workers: &[WorkerState], me: usize, minimum: u64) -> bool {
    let room = |w: &WorkerState| w.room.filter(|_| w.limit >= minimum);
    let Some(mine) = room(&workers[me]) else {
        return false;
    };
    workers
        .iter()
        .enumerate()
        .all(|(i, w)| room(w).is_none_or(|room| room < mine || (room == mine && me <= i)))
}

/// Returns true if the worker that trains `job` may take an entry that needs the current weights of
/// `live_job`. Only the worker that trains a job has its current weights. If no worker trains that
/// job, any worker may take the entry, and reports the error to the caller.
fn may_take(workers: &[WorkerState], live_job: Option<&str>, job: Option<&str>) -> bool {
    live_job.is_none_or(|live| {
        job == Some(live) || workers.iter().all(|w| w.job.as_deref() != Some(live))
    })
}

/// Takes the oldest items that the worker of `job` may score, up to `budget` tokens. The first of
/// them is taken whatever its size. Items whose caller has left are dropped.
fn take_batch<W: WorkItem>(inner: &mut QueueState<W>, job: Option<&str>, budget: usize) -> Vec<W> {
    let (mut batch, mut tokens, mut at) = (Vec::new(), 0, 0);
    while let Some(entry) = inner.entries.get(at) {
        let n = entry.tokens();
        let abandoned = entry.is_abandoned();
        if !abandoned && !may_take(&inner.workers, entry.live_job(), job) {
            at += 1;
            continue;
        }
        if !abandoned && !batch.is_empty() && tokens + n > budget {
            break;
        }
        let Some(entry) = inner.entries.remove(at) else {
            break;
        };
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

/// Drops the generation requests whose callers have left, and counts them.
fn drop_abandoned(generations: &mut VecDeque<GenerationEntry>) {
    let before = generations.len();
    generations.retain(|waiting| !waiting.is_abandoned());
    let dropped = (before - generations.len()) as u64;
    if dropped > 0 {
        metrics::counter!("bradley_generation_abandoned_total").increment(dropped);
    }
}

/// Returns true if a generation request waits that the worker of `job` may take.
fn has_generation<W>(inner: &QueueState<W>, job: Option<&str>) -> bool {
    inner
        .generations
        .iter()
        .any(|waiting| may_take(&inner.workers, waiting.live_job(), job))
}

fn report_generations<W>(inner: &QueueState<W>) {
    metrics::gauge!("bradley_generation_queue_items").set(inner.generations.len() as f64);
}

fn report<W>(inner: &QueueState<W>) {
    metrics::gauge!("bradley_scoring_queue_tokens").set(inner.tokens as f64);
    metrics::gauge!("bradley_scoring_queue_items").set(inner.entries.len() as f64);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    use metrics_exporter_prometheus::PrometheusBuilder;
    use opentelemetry::Context;
    use tokio::sync::oneshot;

    use super::*;
    use crate::domain::training::TrainingSpec;
    use crate::engine::api::{GenerationRequest, ScoreItem, ScoredItem, WeightsRef};
    use crate::engine::entry::Entry;
    use crate::infer::generate::{LogProbOptions, SamplingOptions};
    use crate::infer::pair::SequenceGroup;

    const IDLE: Seeker = Seeker {
        worker: 0,
        job: None,
        room: Some(1),
        limit: u64::MAX,
        generating: Generates::Nothing,
    };

    fn run(job: &str) -> TrainingRun {
        TrainingRun {
            job: job.into(),
            model: "m".into(),
            start: WeightsRef::Base { model: "m".into() },
            reference: None,
            spec: TrainingSpec::default(),
            train: Vec::new(),
            eval: Vec::new(),
            checkpoints: PathBuf::new(),
            resume: None,
            events: tokio::sync::mpsc::channel(1).0,
            control: Default::default(),
        }
    }

    fn entry(tokens: usize) -> (Entry, oneshot::Receiver<Result<ScoredItem, EngineError>>) {
        let (reply, receiver) = oneshot::channel();
        let item = ScoreItem {
            groups: vec![SequenceGroup {
                prompt: vec![0; tokens - 1],
                completions: vec![vec![0]],
            }],
        };
        let policy = WeightsRef::Base { model: "m".into() };
        (
            Entry {
                item,
                policy,
                reference: None,
                enqueued: Instant::now(),
                trace: Context::new(),
                reply,
            },
            receiver,
        )
    }

    #[test]
    fn a_full_queue_refuses_and_an_abandoned_item_is_skipped() {
        let queue = Queue::<Entry>::new(10, 1);
        let (a, a_waits) = entry(6);
        let (b, b_waits) = entry(4);
        let (c, _c_waits) = entry(2);
        queue.push(a).unwrap();
        queue.push(b).unwrap();
        assert!(matches!(
            queue.push(c),
            Err(EngineError::QueueFull {
                queued: 10,
                limit: 10,
                ..
            })
        ));
        drop(a_waits);
        let Work::Score(batch) = queue.next(IDLE, true, 100) else {
            panic!("there is no batch although an item waits")
        };
        assert_eq!(
            batch.len(),
            1,
            "the abandoned item never reaches the device"
        );
        assert_eq!(batch[0].item.tokens(), 4);
        drop(b_waits);
    }

    #[test]
    fn an_item_over_the_limit_is_taken_when_nothing_waits_so_that_it_is_not_refused_for_ever() {
        let queue = Queue::<Entry>::new(10, 1);
        assert!(queue.push(entry(50).0).is_ok());
    }

    #[test]
    fn a_caller_that_leaves_while_its_prompt_waits_is_counted_and_the_gauge_falls() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        let assert_gauge = |number: usize| {
            let text = handle.render();
            let line = format!("\nbradley_generation_queue_items {number}\n");
            assert!(text.contains(&line), "{text}");
        };
        metrics::with_local_recorder(&recorder, || {
            let queue = Queue::<Entry>::new(10, 1);
            let (events, receiver) = tokio::sync::mpsc::channel(4);
            let request = GenerationRequest {
                prompt: vec![1],
                samples: 1,
                max_tokens: 1,
                sampling: SamplingOptions {
                    temperature: 0.0,
                    top_p: None,
                    top_k: None,
                    seed: 0,
                },
                stop_tokens: Vec::new(),
                log_probs: LogProbOptions::default(),
            };
            let waiting = GenerationEntry {
                request,
                policy: WeightsRef::Base { model: "m".into() },
                enqueued: Instant::now(),
                stopped: [AtomicBool::new(false)].into(),
                events,
            };
            queue.push_generation(waiting).unwrap();
            assert_gauge(1);
            drop(receiver);
            let taken = queue.take_generation(None, &|_: &GenerationEntry| true);
            assert!(taken.is_none());
            assert_gauge(0);
            let text = handle.render();
            assert!(
                text.contains("\nbradley_generation_abandoned_total 1\n"),
                "{text}"
            );
        });
    }

    #[test]
    fn draining_answers_what_waits_and_stops_the_worker() {
        let queue = Queue::<Entry>::new(10, 1);
        queue.add_handle();
        let (a, mut waits) = entry(3);
        queue.push(a).unwrap();
        assert!(queue.drain().is_empty());
        assert!(matches!(waits.try_recv(), Ok(Err(EngineError::Draining))));
        assert!(matches!(queue.next(IDLE, true, 100), Work::Stop));
        assert!(matches!(queue.push(entry(3).0), Err(EngineError::Draining)));
    }

    #[test]
    fn the_end_of_the_worker_is_waited_for_but_not_for_ever() {
        let queue = Queue::<Entry>::new(10, 1);
        assert!(!queue.wait_for_end(Duration::from_millis(1)));
        std::thread::scope(|s| {
            s.spawn(|| queue.end(0));
            assert!(queue.wait_for_end(Duration::from_secs(60)));
        });
    }

    #[test]
    fn a_run_goes_to_the_worker_with_the_most_room_and_the_next_to_another() {
        let queue = Queue::<Entry>::new(10, 3);
        queue.add_handle();
        let idle = |worker, room| Seeker {
            worker,
            job: None,
            room,
            limit: u64::MAX,
            ..IDLE
        };
        // The queue knows a worker after its first request; a scoring item prevents the request
        // from waiting.
        for (worker, room) in [(0, Some(5)), (1, Some(9)), (2, None)] {
            let (item, _waits) = entry(1);
            queue.push(item).unwrap();
            assert!(matches!(
                queue.next(idle(worker, room), true, 100),
                Work::Score(_)
            ));
        }
        queue.push_run(run("a"), Needs::default()).unwrap();
        queue.push_run(run("b"), Needs::default()).unwrap();
        let Work::Begin(first, _) = queue.next(idle(1, Some(9)), true, 100) else {
            panic!("the worker with the most room takes no run")
        };
        let Work::Begin(second, _) = queue.next(idle(0, Some(5)), true, 100) else {
            panic!("the next run waits although another worker is idle")
        };
        assert_eq!((first.job.as_str(), second.job.as_str()), ("a", "b"));
        queue.drain();
        assert!(matches!(queue.next(idle(2, None), true, 100), Work::Stop));
    }

    /// Makes an idle worker known to the queue. A scoring item prevents the request from waiting.
    fn make_known(queue: &Queue<Entry>, seeker: Seeker) {
        let (item, _waits) = entry(1);
        queue.push(item).unwrap();
        assert!(matches!(queue.next(seeker, true, 100), Work::Score(_)));
    }

    #[test]
    fn a_run_goes_to_a_worker_that_may_give_it_its_minimum() {
        let queue = Queue::<Entry>::new(10, 2);
        queue.add_handle();
        let idle = |worker, room, limit| Seeker {
            worker,
            job: None,
            room: Some(room),
            limit,
            ..IDLE
        };
        // The first worker has more free memory now, but a lower limit for a run.
        let (small, large) = (idle(0, 90, 50), idle(1, 70, 70));
        make_known(&queue, small);
        make_known(&queue, large);
        let needs = |minimum| Needs {
            minimum,
            ..Needs::default()
        };
        queue.push_run(run("large"), needs(60)).unwrap();
        queue.push_run(run("larger"), needs(70)).unwrap();
        assert!(
            queue.next_run(&mut queue.lock(), 0).is_none(),
            "the small worker takes a run that is too large for it"
        );
        queue.push_run(run("small"), needs(50)).unwrap();
        let Work::Begin(first, _) = queue.next(large, true, 100) else {
            panic!("the large worker does not take the large run")
        };
        // The second large run waits for the large worker. The small run overtakes it, because the
        // small worker cannot take a large run.
        let Work::Begin(second, carried) = queue.next(small, true, 100) else {
            panic!("the small run waits behind the large one")
        };
        assert_eq!(
            (first.job.as_str(), second.job.as_str()),
            ("large", "small")
        );
        assert_eq!(carried, needs(50));
        let Work::Begin(third, _) = queue.next(large, true, 100) else {
            panic!("the large worker takes no second run although it is idle")
        };
        assert_eq!(third.job, "larger");
    }

    #[test]
    fn runs_start_together_only_where_the_machine_has_memory_for_both() {
        let queue = Queue::<Entry>::new(10, 2).sharing(HostMemory::new(100));
        queue.add_handle();
        let idle = |worker| Seeker { worker, ..IDLE };
        let with_events = |job: &str| {
            let (events, told) = tokio::sync::mpsc::channel(1);
            (TrainingRun { events, ..run(job) }, told)
        };
        let needs = |host| Needs {
            host,
            ..Needs::default()
        };
        let (second, mut told) = with_events("second");
        queue.push_run(run("first"), needs(60)).unwrap();
        queue.push_run(second, needs(50)).unwrap();
        queue.push_run(run("third"), needs(10)).unwrap();
        assert!(
            matches!(queue.next(idle(0), true, 100), Work::Begin(first, _) if first.job == "first")
        );
        assert_eq!(queue.host_memory().left(), 40);
        // The other worker starts neither the second run nor one behind it.
        make_known(&queue, idle(1));
        for _ in 0..2 {
            assert!(queue.next_run(&mut queue.lock(), 1).is_none());
        }
        let RunEvent::Log { message, .. } = told.try_recv().unwrap().event else {
            panic!("the event of the waiting run is not a log message")
        };
        assert!(message.contains("memory_limit"), "{message}");
        assert!(
            told.try_recv().is_err(),
            "the client gets another event about the waiting run"
        );
        // A waiting run can be told to stop.
        let (cancelled, _told) = with_events("cancelled");
        cancelled.control.cancel();
        queue.push_run(cancelled, needs(50)).unwrap();
        assert!(
            matches!(queue.next(idle(1), true, 100), Work::Begin(run, _) if run.job == "cancelled")
        );
        make_known(&queue, idle(1));
        // The first run has ended: its worker asks for work without a job.
        make_known(&queue, idle(0));
        assert_eq!(queue.host_memory().left(), 100);
        assert!(matches!(
            queue.next(idle(0), true, 100),
            Work::Begin(second, _) if second.job == "second"
        ));
        assert!(
            matches!(queue.next(idle(1), true, 100), Work::Begin(third, _) if third.job == "third")
        );
        assert_eq!(queue.host_memory().left(), 40);
        // A worker that ends releases the memory of its run.
        queue.end(0);
        assert_eq!(queue.host_memory().left(), 90);
    }

    /// Asserts that worker 1, which waits for work, is told to evict weights after `act`.
    fn assert_wakes_to_evict(queue: &Queue<Entry>, act: impl FnOnce()) {
        std::thread::scope(|s| {
            let waits = s.spawn(|| queue.next(Seeker { worker: 1, ..IDLE }, true, 100));
            while queue.lock().workers[1].room.is_none() {
                std::thread::yield_now();
            }
            act();
            assert!(matches!(waits.join(), Ok(Work::Evict)));
        });
    }

    #[test]
    fn an_idle_worker_wakes_up_to_evict_weights_that_have_no_room() {
        let queue = Queue::<Entry>::new(10, 2);
        queue.add_handle();
        assert_wakes_to_evict(&queue, || queue.request_fit_check());
        assert!(queue.take_must_fit(1) && !queue.take_must_fit(1));
        assert!(queue.take_must_fit(0), "only one worker checks");
    }

    #[test]
    fn an_idle_worker_wakes_up_to_evict_weights_of_a_folder() {
        let queue = Queue::<Entry>::new(10, 2);
        queue.add_handle();
        assert_wakes_to_evict(&queue, || queue.evict(Path::new("/gone")));
        assert_eq!(queue.take_evicted(1), [PathBuf::from("/gone")]);
        let (item, _waits) = entry(1);
        queue.push(item).unwrap();
        // A worker with work is not told to evict, because it does so before it computes.
        assert!(
            matches!(queue.next(IDLE, true, 100), Work::Score(_)),
            "the worker does not get the waiting item first"
        );
        assert!(matches!(queue.next(IDLE, true, 100), Work::Evict));
    }

    #[test]
    fn weights_in_training_are_scored_by_the_worker_that_trains_them() {
        let queue = Queue::<Entry>::new(100, 2);
        let live = |job: &str| {
            let (entry, waits) = entry(2);
            (
                Entry {
                    policy: WeightsRef::Live { job: job.into() },
                    ..entry
                },
                waits,
            )
        };
        let trains = |worker, job| Seeker {
            worker,
            job: Some(job),
            room: None,
            limit: 0,
            ..IDLE
        };
        for (worker, job) in [(0, "a"), (1, "b")] {
            assert!(matches!(
                queue.next(trains(worker, job), true, 100),
                Work::Train
            ));
        }
        let (of_b, _b) = live("b");
        let (base, _base) = entry(3);
        queue.push(of_b).unwrap();
        queue.push(base).unwrap();
        let Work::Score(first) = queue.next(trains(0, "a"), true, 100) else {
            panic!("the worker does not take the item of the base model")
        };
        assert_eq!(
            first.iter().map(|e| e.item.tokens()).collect::<Vec<_>>(),
            [3]
        );
        assert_eq!(queue.take("b", 100).len(), 1);
        // An item that names the job only as its reference goes to the worker of the job, too.
        let (entry, _waits) = entry(2);
        queue
            .push(Entry {
                reference: Some(WeightsRef::LiveReference { job: "b".into() }),
                ..entry
            })
            .unwrap();
        assert!(queue.take("a", 100).is_empty());
        assert_eq!(queue.take("b", 100).len(), 1);
        let (of_none, _none) = live("c");
        queue.push(of_none).unwrap();
        assert_eq!(
            queue.take("a", 100).len(),
            1,
            "nobody trains it: its caller must hear that"
        );
    }
}
