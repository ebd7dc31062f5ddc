//! The scoring half of a device worker: batches from the queue, and whose turn it is while a run
//! trains.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::KeyValue;

use super::api::{CompletionLogps, EngineError, EngineOptions, ScoredItem, WeightsRef};
use super::entry::{Entry, ScoringQueue};
use super::fair_share::FairShare;
use super::residents::{Bases, ROW_TOKENS, Residents};
use crate::domain::training::Precision;
use crate::infer::pack::Owned;
use crate::infer::pair::SequenceGroup;
use crate::infer::reference_cache::ReferenceCache;
use crate::infer::scorer::{self, Logps};
use crate::model::decoder::Policy;
use crate::model::device::is_out_of_memory;
use crate::model::guard::guarded;
use crate::telemetry::trace;

/// An item's log-probs, or why there are none.
type LogpsResult = Result<Logps, EngineError>;

/// The weights of the run in progress.
pub(super) struct Live {
    pub job: String,
    pub policy: Policy,
    /// Its reference, as the run has it: a run in f32 on a bf16 server has weights that are not
    /// rounded.
    pub reference: Option<LiveReference>,
    /// Optimizer steps that the policy has taken, and after which the reference was moved last.
    pub step: u64,
}

/// The reference of the run in progress; one that moves (TR-DPO) as it is at the policy's step.
pub(super) struct LiveReference {
    /// The name that entries have for it.
    pub weights: WeightsRef,
    pub policy: Policy,
    /// Names the weights in the cache of log-probs.
    pub identity: String,
}

/// Scores what waits, and keeps account of the time that it takes from training.
pub(super) struct Scoring {
    /// Whose half this is.
    worker: usize,
    queue: Arc<ScoringQueue>,
    bases: Arc<Bases>,
    /// Weights in memory.
    pub residents: Residents,
    /// Tokens of a batch.
    pub batch_tokens: usize,
    /// Whose turn it is while a run is in progress.
    pub fair_share: FairShare,
}

/// The hook that a training unit calls between two decoder blocks, milliseconds apart, and where it
/// waits.
///
/// It runs on the device's thread inside the trainer's call, so that it re-enters the engine
/// half-way through a unit. What may run inside:
///
/// - Scoring batches of any weights, with everything that takes: reading adapters and checkpoints,
///   evicting them, the cache of reference log-probs (which holds no lock while it computes),
///   answering callers.
/// - The run's weights are read as they are in [`Live`], which does not change inside a unit: the
///   trainer calls the hook only where no tensor is half updated. The trainer itself is borrowed by
///   the unit: nothing here trains, begins or ends a run, or asks the queue for one.
/// - It does not nest: passes of a batch get a hook that does nothing.
/// - The unit's activations stay in memory meanwhile. A batch that runs out of memory frees weights
///   that nothing computes with, and fails alone; a panic fails the batch, never the unit.
pub(super) struct YieldPoint<'a> {
    scoring: &'a mut Scoring,
    cache: &'a ReferenceCache,
    live: &'a Live,
}

impl<'a> YieldPoint<'a> {
    /// Creates the hook of one unit, during which the run's weights are `live`.
    pub fn new(scoring: &'a mut Scoring, cache: &'a ReferenceCache, live: &'a Live) -> Self {
        YieldPoint { scoring, cache, live }
    }

    /// Scores one batch when something waits and it is scoring's turn.
    pub fn run(&mut self) {
        self.scoring.yield_to_scoring(self.cache, self.live);
    }
}

impl Scoring {
    pub fn new(
        worker: usize,
        queue: Arc<ScoringQueue>,
        bases: Arc<Bases>,
        options: &EngineOptions,
    ) -> Self {
        Scoring {
            worker,
            queue,
            bases,
            residents: Residents::new(options.resident_policies),
            batch_tokens: options.batch_tokens,
            fair_share: FairShare::new(options.scoring_share, Instant::now()),
        }
    }

    /// Scores one batch between two blocks of a training pass, when something waits and it is
    /// scoring's turn.
    fn yield_to_scoring(&mut self, cache: &ReferenceCache, live: &Live) {
        self.fair_share.pay(Instant::now());
        if !self.fair_share.is_scorings_turn() {
            return;
        }
        let batch = self.queue.take(&live.job, self.batch_tokens);
        if !batch.is_empty() {
            // What training gave a GPU before is training's time.
            self.bases.device().wait();
            let start = Instant::now();
            self.fair_share.pay(start);
            if let Err(panic) = guarded(|| self.score_batch(batch, cache, Some(live))) {
                // Whoever waited hears that their request was dropped; the run goes on.
                tracing::error!(panic, "a scoring batch failed");
            }
            self.fair_share.resume(start, Instant::now());
        }
    }

    /// Forgets weights whose folder is gone or will hold others, and those that have no room beside
    /// the runs in progress.
    pub fn forget_evicted(&mut self) {
        if self.queue.take_must_fit(self.worker) {
            self.residents.fit();
        }
        for dir in self.queue.take_evicted(self.worker) {
            self.residents.evict(&dir);
        }
    }

    /// Scores a batch and answers whoever waits; with a run in progress, training is owed its
    /// share. Entries share a pass over each of the weights that they name, policies and references
    /// alike.
    pub fn score_batch(&mut self, batch: Vec<Entry>, cache: &ReferenceCache, live: Option<&Live>) {
        self.forget_evicted();
        let (start, began) = (Instant::now(), SystemTime::now());
        let tokens: usize = batch.iter().map(|e| e.item.tokens()).sum();
        observe(&batch, tokens);
        for entry in &batch {
            let waited = entry.enqueued.elapsed();
            metrics::histogram!("bradley_scoring_queue_seconds").record(waited.as_secs_f64());
            trace::record("scoring.queue", &entry.trace, began - waited, waited, Vec::new());
        }
        let mut references = vec_of_none(batch.len());
        let precision = |e: &Entry| self.precision(e, live);
        for members in
            groups(&batch, |e| e.reference.as_ref().map(|weights| (weights, precision(e))))
        {
            self.pass(&batch, members, &mut references, |scoring, entries| {
                scoring.references(entries, cache, live)
            });
        }
        // A base model scored against itself costs one pass.
        let own = |e: &'_ Entry| e.reference.as_ref() != Some(&e.policy);
        let mut policies = vec_of_none(batch.len());
        for members in self.clusters(groups(&batch, |e| own(e).then_some(&e.policy)), &batch, live)
        {
            self.pass(&batch, members, &mut policies, |scoring, entries| {
                scoring.policies(entries, live)
            });
        }
        // Told before the answers: a caller's span outlives those within it.
        trace_batch(&batch, began, start.elapsed(), tokens);
        for ((entry, reference), policy) in batch.into_iter().zip(references).zip(policies) {
            let live_step = matches!(entry.policy, WeightsRef::Live { .. })
                .then(|| live.map(|l| l.step))
                .flatten();
            // The caller may have left meanwhile; nobody else wants the answer.
            let _ = entry.reply.send(combine(policy, reference, live_step));
        }
        let spent = start.elapsed();
        metrics::histogram!("bradley_scoring_compute_seconds").record(spent.as_secs_f64());
        metrics::counter!("bradley_scored_tokens_total").increment(tokens as u64);
        self.queue.set_rate(tokens as f64 / spent.as_secs_f64().max(1e-6));
        if live.is_some() {
            self.fair_share.charge(spent);
        }
    }

    /// Runs `pass` over some entries together; when that fails, over each alone, so that a bad item
    /// fails only itself. When the device runs out of memory, weights that nothing computes with
    /// are evicted and the pass runs once more.
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
            Ok(scored) => {
                members.into_iter().zip(scored).for_each(|(i, logps)| results[i] = Some(Ok(logps)))
            }
            Err(e) => match members.as_slice() {
                [only] => results[*only] = Some(Err(e)),
                all => all.iter().for_each(|i| results[*i] = Some(run(&[*i]).and_then(only_one))),
            },
        }
    }

    /// Frees the memory of weights that nothing computes with, and what the device keeps for later
    /// use.
    pub fn free_memory(&mut self) {
        self.residents.evict_unused();
        self.bases.device().trim();
    }

    /// The precision in which an entry is scored: a running job's own, else the server's. Its
    /// reference is scored in the same one, so that their difference is that of the weights alone.
    fn precision(&self, entry: &Entry, live: Option<&Live>) -> Precision {
        match (&entry.policy, live) {
            (WeightsRef::Live { job }, Some(live)) if live.job == *job => live.policy.precision,
            _ => self.bases.precision(),
        }
    }

    /// The log-probs of entries that name the same reference and are scored in the same precision,
    /// under it.
    fn references(
        &mut self,
        entries: &[&Entry],
        cache: &ReferenceCache,
        live: Option<&Live>,
    ) -> Result<Vec<Logps>, EngineError> {
        let Some(first) = entries.first() else { return Ok(Vec::new()) };
        let Some(weights) = first.reference.as_ref() else { return Ok(Vec::new()) };
        let of_run = live
            .filter(|live| matches!(&first.policy, WeightsRef::Live { job } if *job == live.job))
            .and_then(|live| live.reference.as_ref())
            .filter(|reference| reference.weights == *weights);
        let (reference, identity) = match of_run {
            Some(reference) => (reference.policy.clone(), reference.identity.clone()),
            None => (self.residents.get(&self.bases, weights)?, self.bases.identity(weights)?),
        };
        let reference = reference.with_precision(self.precision(first, live));
        let items: Vec<&[SequenceGroup]> =
            entries.iter().map(|e| e.item.groups.as_slice()).collect();
        let logps =
            cache.score(&reference, &identity, &items, ROW_TOKENS, &mut || {}).map_err(device)?;
        Ok(logps.iter().map(|l| l.as_ref().clone()).collect())
    }

    /// The log-probs of entries of one cluster, each under its own policy.
    fn policies(
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
            return scorer::score_all(policy, &items, ROW_TOKENS, &mut || {}).map_err(device);
        }
        scorer::score_shared(&policies, &items, ROW_TOKENS, &mut || {}).map_err(device)
    }

    /// Joins groups whose policies are adapters on the same base weights (or these themselves):
    /// they share a pass.
    fn clusters(
        &mut self,
        groups: Vec<Vec<usize>>,
        batch: &[Entry],
        live: Option<&Live>,
    ) -> Vec<Vec<usize>> {
        let mut clusters: Vec<(Option<Policy>, Vec<usize>)> = Vec::new();
        for members in groups {
            // What cannot be loaded fails in a pass of its own.
            let policy = members.first().and_then(|i| self.policy(&batch[*i].policy, live).ok());
            let alike = |other: &Policy| policy.as_ref().is_some_and(|p| p.shares_base(other));
            match clusters.iter_mut().find(|(other, _)| other.as_ref().is_some_and(alike)) {
                Some((_, all)) => all.extend(members),
                None => clusters.push((policy, members)),
            }
        }
        clusters.into_iter().map(|(_, members)| members).collect()
    }

    fn policy(&mut self, weights: &WeightsRef, live: Option<&Live>) -> Result<Policy, EngineError> {
        match (weights, live) {
            (WeightsRef::Live { job }, Some(live)) if live.job == *job => Ok(live.policy.clone()),
            _ => self.residents.get(&self.bases, weights),
        }
    }
}

fn device(e: candle_core::Error) -> EngineError {
    if is_out_of_memory(&e) {
        EngineError::DeviceFull(e.to_string())
    } else {
        EngineError::Device(e.to_string())
    }
}

/// Counts a batch, and the tokens that sequences padded to the longest would have cost and packed
/// ones do not. Prompts that items share are saved, too, but not counted.
fn observe(batch: &[Entry], tokens: usize) {
    metrics::histogram!("bradley_scoring_batch_items").record(batch.len() as f64);
    metrics::histogram!("bradley_scoring_batch_tokens").record(tokens as f64);
    let groups = batch.iter().flat_map(|e| &e.item.groups);
    let lengths = groups.flat_map(|g| g.completions.iter().map(|c| g.prompt.len() + c.len()));
    let (sequences, longest, alone) =
        lengths.fold((0, 0, 0), |(n, max, sum), len| (n + 1, len.max(max), sum + len));
    metrics::counter!("bradley_scoring_saved_tokens_total", "by" => "padding")
        .increment((sequences * longest - alone) as u64);
    metrics::counter!("bradley_scoring_saved_tokens_total", "by" => "shared_prompt")
        .increment(alone.saturating_sub(tokens) as u64);
}

/// One span for the batch, linked to its callers' spans, and one in each caller's trace, linked to
/// it.
fn trace_batch(batch: &[Entry], began: SystemTime, took: Duration, tokens: usize) {
    let about = vec![
        KeyValue::new("bradley.batch.items", batch.len() as i64),
        KeyValue::new("bradley.batch.tokens", tokens as i64),
    ];
    if let Some(shared) =
        trace::shared("scoring.batch", batch.iter().map(|e| &e.trace), began, took, about)
    {
        batch
            .iter()
            .for_each(|entry| trace::linked("scoring.device", &entry.trace, began, took, &shared));
    }
}

fn only_one(mut logps: Vec<Logps>) -> LogpsResult {
    logps.pop().ok_or_else(|| EngineError::Device("an item came back without log-probs".into()))
}

fn vec_of_none(n: usize) -> Vec<Option<LogpsResult>> {
    (0..n).map(|_| None).collect()
}

/// The entries that have a key by `which`, e.g. the weights that they name, grouped by it, in the
/// order in which they first appear.
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

/// An item's answer from what the passes gave; without a pass of its own, the policy's log-probs
/// are the reference's.
fn combine(
    policy: Option<LogpsResult>,
    reference: Option<LogpsResult>,
    live_step: Option<u64>,
) -> Result<ScoredItem, EngineError> {
    let (policy, reference) = (policy.transpose()?, reference.transpose()?);
    let Some(logps) = policy.as_ref().or(reference.as_ref()) else {
        return Err(EngineError::Device("an item was scored by no weights".into()));
    };
    let of = |n: usize| reference.as_ref().map(|r| r[n].clone());
    let completions = logps
        .iter()
        .enumerate()
        .map(|(n, logps)| CompletionLogps { policy: logps.clone(), reference: of(n) });
    Ok(ScoredItem { completions: completions.collect(), live_step })
}

#[cfg(test)]
pub(super) mod tests;
