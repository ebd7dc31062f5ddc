//! The scoring and generating part of a device worker: work from the queue, and sharing the device
//! with a run.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::KeyValue;

use super::api::{CompletionLogps, EngineError, EngineOptions, ScoredItem, WeightsRef};
use super::entry::{Entry, ScoringQueue};
use super::fair_share::FairShare;
use super::generation::{Generator, StepContext};
use super::live::{Live, device_error};
use super::policy_cache::{BaseModels, PolicyCache, ROW_TOKENS};
use super::queue::{Generates, WorkItem as _};
use crate::compute::cpu::attention::CACHE_BLOCK;
use crate::domain::training::Precision;
use crate::infer::pack::Owned;
use crate::infer::pair::SequenceGroup;
use crate::infer::reference_cache::ReferenceCache;
use crate::infer::scorer::{self, Logps};
use crate::model::decoder::Policy;
use crate::model::guard::guarded;
use crate::telemetry::trace;

/// Log-probabilities of an item, or the error.
type LogpsResult = Result<Logps, EngineError>;

/// Scores queued items and generates texts, and records the time that this takes from training.
pub(super) struct PolicyScorer {
    /// Index of the worker.
    worker: usize,
    queue: Arc<ScoringQueue>,
    base_models: Arc<BaseModels>,
    /// Cache of adapters and full weights.
    pub policies: PolicyCache,
    /// Maximum tokens per batch.
    pub batch_tokens: usize,
    /// Account of the device time while a run is in progress.
    pub fair_share: FairShare,
    /// Texts in progress.
    generator: Generator,
    /// True if the last step of [`PolicyScorer::generate`] computed something.
    generates: bool,
    /// True if a generation step was the last work beside the run in progress. A scoring batch is
    /// then next.
    generated_last: bool,
}

/// Hook that a training unit calls between two decoder blocks, every few milliseconds, and while it
/// waits.
///
/// It runs on the device's thread inside the trainer's call, so it re-enters the engine in the
/// middle of a unit. The rules:
///
/// - It may score batches and generate with any weights, including everything that this needs:
///   reading adapters and checkpoints, evicting them, the cache of reference log-probs (which holds
///   no lock while it computes), and answering callers.
/// - It reads the run's weights from [`Live`], which does not change inside a unit: the trainer
///   calls the hook only when no tensor is partially updated. The unit has borrowed the trainer, so
///   the hook cannot train, start or end a run, or take one from the queue.
/// - It does not nest: passes of a batch or of generation get a hook that does nothing.
/// - The unit's activations stay in memory meanwhile. A batch that runs out of memory frees cached
///   weights that are not in use. If it still fails, only the batch fails; the same holds for a
///   panic. A panic in a generation step ends all texts in progress.
pub(super) struct YieldPoint<'a> {
    scoring: &'a mut PolicyScorer,
    cache: &'a ReferenceCache,
    live: &'a Live,
}

impl<'a> YieldPoint<'a> {
    /// Creates the hook of one unit. `live` has the run's weights during the unit.
    pub fn new(scoring: &'a mut PolicyScorer, cache: &'a ReferenceCache, live: &'a Live) -> Self {
        YieldPoint {
            scoring,
            cache,
            live,
        }
    }

    /// Scores one batch or generates one token of each text, if there is such work and scoring has
    /// not used up its share of the time.
    pub fn run(&mut self) {
        self.scoring.yield_to_scoring(self.cache, self.live);
    }
}

impl PolicyScorer {
    pub fn new(
        worker: usize,
        queue: Arc<ScoringQueue>,
        base_models: Arc<BaseModels>,
        options: &EngineOptions,
    ) -> Self {
        let blocks = options.generation_cache_tokens / CACHE_BLOCK;
        PolicyScorer {
            generator: Generator::new(blocks, base_models.label().to_owned()),
            generates: false,
            generated_last: false,
            worker,
            queue,
            base_models,
            policies: PolicyCache::new(options.resident_policies),
            batch_tokens: options.batch_tokens,
            fair_share: FairShare::new(options.scoring_share, Instant::now()),
        }
    }

    /// Scores one batch or generates one token of each text between two blocks of a training pass,
    /// if there is such work and it has not used up its share of the time. The two take turns.
    fn yield_to_scoring(&mut self, cache: &ReferenceCache, live: &Live) {
        self.fair_share.pay(Instant::now());
        if !self.fair_share.may_score() {
            return;
        }
        if self.may_generate(Some(&live.job)) {
            self.base_models.device().wait();
            let start = Instant::now();
            self.fair_share.pay(start);
            self.generate(Some(live));
            self.fair_share.resume(start, Instant::now());
            return;
        }
        let batch = self.queue.take(&live.job, self.batch_tokens);
        if !batch.is_empty() {
            // Wait for kernels that training has queued on the GPU; their time counts as training.
            self.base_models.device().wait();
            let start = Instant::now();
            self.fair_share.pay(start);
            if let Err(panic) = guarded(|| self.score_batch(batch, cache, Some(live))) {
                // The batch and its reply channels are dropped, so its callers get `Draining` and
                // may retry. The run continues.
                tracing::error!(panic, "a scoring batch failed");
            }
            self.fair_share.resume(start, Instant::now());
        }
    }

    /// Reserves memory for a run that begins. Weights that no longer fit are evicted, and texts in
    /// progress end if their keys and values do not fit either.
    pub fn reserve_for_run(&mut self, bytes: u64) {
        self.policies.reserve_for_run(bytes);
        self.generator.make_room(&mut self.policies);
    }

    /// Returns true if the worker of `job` has texts in progress or may take a waiting request.
    pub fn has_generation(&self, job: Option<&str>) -> bool {
        self.generator.is_active() || self.queue.has_generation(job)
    }

    /// Returns true if there are texts to generate and it is not the turn of scoring: beside the
    /// run of `job` the two take turns. The call ends scoring's turn, so the next call may
    /// return another answer.
    pub fn may_generate(&mut self, job: Option<&str>) -> bool {
        let is_turn_of_scoring = std::mem::take(&mut self.generated_last);
        (job.is_none() || !is_turn_of_scoring) && self.has_generation(job)
    }

    /// Returns the state of the requests in progress, for the queue.
    pub fn generating(&self) -> Generates {
        match (self.generator.is_active(), self.generates) {
            (false, _) => Generates::Nothing,
            (true, true) => Generates::Requests,
            (true, false) => Generates::Blocked,
        }
    }

    /// Admits waiting requests and generates one token of each text in progress. If a run is in
    /// progress, charges the time to scoring. If the server is stopping, ends all texts.
    pub fn generate(&mut self, live: Option<&Live>) {
        self.evict_requested();
        if self.queue.is_draining() {
            self.generator
                .end_all(&mut self.policies, || EngineError::Draining);
            return;
        }
        let start = Instant::now();
        let job = live.map(|live| live.job.as_str());
        let queue = self.queue.clone();
        let mut cx = StepContext {
            policies: &mut self.policies,
            base_models: &self.base_models,
            live,
        };
        let generator = &mut self.generator;
        match guarded(|| generator.step(&mut cx, |fits| queue.take_generation(job, fits))) {
            Ok(worked) => self.generates = worked,
            Err(panic) => {
                tracing::error!(panic, "a generation step failed");
                self.generator
                    .end_all(&mut self.policies, || EngineError::Device(panic.clone()));
            }
        }
        if live.is_some() {
            self.generated_last = true;
            self.fair_share.charge(start.elapsed());
        }
    }

    /// Evicts weights whose folder was deleted, and weights that do not fit beside the runs in
    /// progress. Updates the gauge of cached weights, which other evictions leave as it was.
    pub fn evict_requested(&mut self) {
        if self.queue.take_must_fit(self.worker) {
            self.policies.fit();
        }
        for dir in self.queue.take_evicted(self.worker) {
            self.policies.evict(&dir);
        }
        self.policies.report(&self.base_models);
    }

    /// Scores a batch and answers the callers. If a run is in progress, charges the time to
    /// scoring. Entries with the same reference share a pass, and so do entries whose policies have
    /// the same base weights, with or without adapters.
    pub fn score_batch(&mut self, batch: Vec<Entry>, cache: &ReferenceCache, live: Option<&Live>) {
        self.evict_requested();
        let (start, began) = (Instant::now(), SystemTime::now());
        let tokens: usize = batch.iter().map(|e| e.item.tokens()).sum();
        observe(&batch, tokens);
        for entry in &batch {
            let waited = entry.enqueued.elapsed();
            metrics::histogram!("bradley_scoring_queue_seconds").record(waited.as_secs_f64());
            trace::record(
                "scoring.queue",
                &entry.trace,
                began - waited,
                waited,
                Vec::new(),
            );
        }
        let mut reference_logps = vec_of_none(batch.len());
        let precision = |e: &Entry| self.precision(e, live);
        for members in groups(&batch, |e| {
            e.reference.as_ref().map(|weights| (weights, precision(e)))
        }) {
            self.pass(&batch, members, &mut reference_logps, |scoring, entries| {
                scoring.score_references(entries, cache, live)
            });
        }
        let mut policy_logps = vec_of_none(batch.len());
        for members in self.clusters(
            groups(&batch, |e| needs_policy_pass(e).then_some(&e.policy)),
            &batch,
            live,
        ) {
            self.pass(&batch, members, &mut policy_logps, |scoring, entries| {
                scoring.score_policies(entries, live)
            });
        }
        // Recorded before the answers, because a caller's span must end after the spans inside it.
        trace_batch(&batch, began, start.elapsed(), tokens);
        for ((entry, reference), policy) in batch.into_iter().zip(reference_logps).zip(policy_logps)
        {
            let live_step = matches!(entry.policy, WeightsRef::Live { .. })
                .then(|| live.map(|l| l.step))
                .flatten();
            // The caller may have left; then nobody needs the answer.
            let _ = entry.reply.send(combine(policy, reference, live_step));
        }
        let spent = start.elapsed();
        metrics::histogram!("bradley_scoring_compute_seconds").record(spent.as_secs_f64());
        metrics::counter!("bradley_scored_tokens_total").increment(tokens as u64);
        self.queue
            .set_rate(tokens as f64 / spent.as_secs_f64().max(1e-6));
        if live.is_some() {
            self.fair_share.charge(spent);
        }
    }

    /// Runs `pass` over several entries together. If that fails, runs it for each entry alone, so
    /// that a bad item fails only itself. If the device runs out of memory, evicts cached weights
    /// that are not in use and tries once more.
    fn pass(
        &mut self,
        batch: &[Entry],
        members: Vec<usize>,
        results: &mut [Option<LogpsResult>],
        pass: impl Fn(&mut Self, &[&Entry]) -> Result<Vec<Logps>, EngineError>,
    ) {
        let mut run = |members: &[usize]| {
            let entries: Vec<&Entry> = members.iter().map(|i| &batch[*i]).collect();
            let once = |scoring: &mut Self| {
                guarded(|| pass(scoring, &entries))
                    .unwrap_or_else(|panic| Err(EngineError::Device(panic)))
            };
            match once(self) {
                Err(EngineError::DeviceFull(_)) => {
                    self.free_memory();
                    once(self)
                }
                done => done,
            }
        };
        match run(&members) {
            Ok(scored) => members
                .into_iter()
                .zip(scored)
                .for_each(|(i, logps)| results[i] = Some(Ok(logps))),
            Err(e) => match members.as_slice() {
                [only] => results[*only] = Some(Err(e)),
                all => all
                    .iter()
                    .for_each(|i| results[*i] = Some(run(&[*i]).and_then(only_one))),
            },
        }
    }

    /// Frees the memory of cached weights that are not in use, and unused memory of the device's
    /// arena.
    pub fn free_memory(&mut self) {
        self.policies.evict_unused();
        self.base_models.device().trim();
    }

    /// Returns the precision in which an entry is scored: the precision of the running job whose
    /// weights it names, or else the server's. The reference uses the same precision, so that
    /// rounding does not add to the difference.
    fn precision(&self, entry: &Entry, live: Option<&Live>) -> Precision {
        match (&entry.policy, live) {
            (WeightsRef::Live { job }, Some(live)) if live.job == *job => live.policy.precision,
            _ => self.base_models.precision(),
        }
    }

    /// Returns the log-probs under the reference. All entries name the same reference and are
    /// scored in the same precision.
    fn score_references(
        &mut self,
        entries: &[&Entry],
        cache: &ReferenceCache,
        live: Option<&Live>,
    ) -> Result<Vec<Logps>, EngineError> {
        let Some(first) = entries.first() else {
            return Ok(Vec::new());
        };
        let Some(weights) = first.reference.as_ref() else {
            return Ok(Vec::new());
        };
        let of_run = live
            .filter(|live| matches!(&first.policy, WeightsRef::Live { job } if *job == live.job))
            .and_then(|live| live.reference.as_ref())
            .filter(|reference| reference.weights == *weights);
        let (reference, identity) = match of_run {
            Some(reference) => (reference.policy.clone(), reference.identity.clone()),
            None => (
                self.policies.get(&self.base_models, weights)?,
                self.base_models.identity(weights)?,
            ),
        };
        let reference = reference.with_precision(self.precision(first, live));
        let items: Vec<&[SequenceGroup]> =
            entries.iter().map(|e| e.item.groups.as_slice()).collect();
        let logps = cache
            .score(&reference, &identity, &items, ROW_TOKENS, &mut || {})
            .map_err(device_error)?;
        Ok(logps.iter().map(|l| l.as_ref().clone()).collect())
    }

    /// Returns the log-probs of one cluster's entries, each under its own policy.
    fn score_policies(
        &mut self,
        entries: &[&Entry],
        live: Option<&Live>,
    ) -> Result<Vec<Logps>, EngineError> {
        let (mut named, mut policies): (Vec<&WeightsRef>, Vec<Policy>) = (Vec::new(), Vec::new());
        let mut items: Vec<Owned> = Vec::with_capacity(entries.len());
        for entry in entries {
            let owner = match named.iter().position(|w| **w == entry.policy) {
                Some(owner) => owner,
                None => {
                    policies.push(self.policy(&entry.policy, live)?);
                    named.push(&entry.policy);
                    named.len() - 1
                }
            };
            items.push((owner, entry.item.groups.as_slice()));
        }
        if let [policy] = policies.as_slice() {
            let items: Vec<&[SequenceGroup]> = items.iter().map(|(_, groups)| *groups).collect();
            return scorer::score_all(policy, &items, ROW_TOKENS, &mut || {}).map_err(device_error);
        }
        scorer::score_shared(&policies, &items, ROW_TOKENS, &mut || {}).map_err(device_error)
    }

    /// Merges groups whose policies are the same base weights with or without an adapter, because
    /// they can share a pass.
    fn clusters(
        &mut self,
        groups: Vec<Vec<usize>>,
        batch: &[Entry],
        live: Option<&Live>,
    ) -> Vec<Vec<usize>> {
        let mut clusters: Vec<(Option<Policy>, Vec<usize>)> = Vec::new();
        for members in groups {
            // Weights that cannot be loaded get a pass of their own, which fails.
            let policy = members
                .first()
                .and_then(|i| self.policy(&batch[*i].policy, live).ok());
            let alike = |other: &Policy| policy.as_ref().is_some_and(|p| p.shares_base(other));
            match clusters
                .iter_mut()
                .find(|(other, _)| other.as_ref().is_some_and(alike))
            {
                Some((_, all)) => all.extend(members),
                None => clusters.push((policy, members)),
            }
        }
        clusters.into_iter().map(|(_, members)| members).collect()
    }

    fn policy(&mut self, weights: &WeightsRef, live: Option<&Live>) -> Result<Policy, EngineError> {
        match (weights, live) {
            (WeightsRef::Live { job }, Some(live)) if live.job == *job => Ok(live.policy.clone()),
            _ => self.policies.get(&self.base_models, weights),
        }
    }
}

/// Records a batch's size and the tokens saved compared to padding all sequences to the longest,
/// and compared to repeating a shared prompt.
fn observe(batch: &[Entry], tokens: usize) {
    metrics::histogram!("bradley_scoring_batch_items").record(batch.len() as f64);
    metrics::histogram!("bradley_scoring_batch_tokens").record(tokens as f64);
    let groups = batch.iter().flat_map(|e| &e.item.groups);
    let lengths = groups.flat_map(|g| g.completions.iter().map(|c| g.prompt.len() + c.len()));
    let (sequences, longest, alone) = lengths.fold((0, 0, 0), |(n, max, sum), len| {
        (n + 1, len.max(max), sum + len)
    });
    metrics::counter!("bradley_scoring_saved_tokens_total", "by" => "padding")
        .increment((sequences * longest - alone) as u64);
    metrics::counter!("bradley_scoring_saved_tokens_total", "by" => "shared_prompt")
        .increment(alone.saturating_sub(tokens) as u64);
}

/// Records one span for the batch, linked to its callers' spans, and one span in each caller's
/// trace, linked to the batch.
fn trace_batch(batch: &[Entry], began: SystemTime, took: Duration, tokens: usize) {
    let about = vec![
        KeyValue::new("bradley.batch.items", batch.len() as i64),
        KeyValue::new("bradley.batch.tokens", tokens as i64),
    ];
    if let Some(shared) = trace::shared(
        "scoring.batch",
        batch.iter().map(|e| &e.trace),
        began,
        took,
        about,
    ) {
        batch
            .iter()
            .for_each(|entry| trace::linked("scoring.device", &entry.trace, began, took, &shared));
    }
}

fn only_one(mut logps: Vec<Logps>) -> LogpsResult {
    logps
        .pop()
        .ok_or_else(|| EngineError::Device("an item came back without log-probs".into()))
}

fn vec_of_none(n: usize) -> Vec<Option<LogpsResult>> {
    (0..n).map(|_| None).collect()
}

/// Groups the entries by the key that `which` returns, in the order of first appearance. Entries
/// without a key are left out.
fn groups<'a, K: PartialEq>(
    batch: &'a [Entry],
    which: impl Fn(&'a Entry) -> Option<K>,
) -> Vec<Vec<usize>> {
    let mut groups: Vec<(K, Vec<usize>)> = Vec::new();
    for (i, entry) in batch.iter().enumerate() {
        let Some(key) = which(entry) else { continue };
        match groups.iter_mut().find(|(k, _)| *k == key) {
            Some((_, members)) => members.push(i),
            None => groups.push((key, vec![i])),
        }
    }
    groups.into_iter().map(|(_, members)| members).collect()
}

/// Returns true if the policy of an entry is still to be scored after the reference. A model that
/// is scored against itself needs only one pass, and an entry whose caller has left meanwhile needs
/// no more.
fn needs_policy_pass(entry: &Entry) -> bool {
    entry.reference.as_ref() != Some(&entry.policy) && !entry.is_abandoned()
}

/// Combines the results of the passes into an item's answer. If the policy had no pass of its own,
/// it is the same as the reference, or the caller has left and nobody gets the answer.
fn combine(
    policy: Option<LogpsResult>,
    reference: Option<LogpsResult>,
    live_step: Option<u64>,
) -> Result<ScoredItem, EngineError> {
    let (policy, reference) = (policy.transpose()?, reference.transpose()?);
    let Some(logps) = policy.as_ref().or(reference.as_ref()) else {
        return Err(EngineError::Device(
            "an item was not scored by any weights".into(),
        ));
    };
    let of = |n: usize| reference.as_ref().map(|r| r[n].clone());
    let completions = logps.iter().enumerate().map(|(n, logps)| CompletionLogps {
        policy: logps.clone(),
        reference: of(n),
    });
    Ok(ScoredItem {
        completions: completions.collect(),
        live_step,
    })
}

#[cfg(test)]
pub(super) mod tests;
