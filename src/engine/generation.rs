//! The generating part of a device worker: requests from the queue, and the sequences in progress.
//!
//! A step admits waiting requests as far as the cache of keys and values has room, then computes
//! one token of every sequence. It is one unit of work, like a scoring batch, and counts as scoring
//! in the device's time.
//!
//! - A request reserves the cache and the memory for its longest possible texts when it is
//!   admitted, so no sequence runs out of them later. A request that does not fit beside others
//!   waits until they end. One that does not fit alone is refused.
//! - A caller who leaves closes the channel; the next step frees the request's blocks.
//! - A caller who does not read has a full channel. The request's sequences then wait, and the
//!   request ends after the time of [`ReadLimits`].
//! - When no request is left, the pages of the freed keys and values return to the operating
//!   system, if they are at least [`TRIM_BYTES`].

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::api::{
    EngineError, GenerationEnd, GenerationEvent, GenerationRequest, GenerationResult, WeightsRef,
};
use super::live::{Live, device_error};
use super::policy_cache::{BaseModels, PolicyCache, adapter_bytes};
use crate::compute::cpu::attention::{CACHE_BLOCK, blocks_of};
use crate::compute::cpu::buffer::Buffer;
use crate::infer::generate::{self, Prompt, Sampled, ScoredToken, Sequence};
use crate::model::adapter::Adapter;
use crate::model::decoder::Policy;
use crate::model::guard::guarded;

/// Maximum number of sequences of a worker that are computed together.
const MAX_SEQUENCES: usize = 64;
/// Maximum number of prompt tokens that a step runs, except for the first prompt.
const PREFILL_TOKENS: usize = 2048;
/// Number of tokens of a sample that may wait for a slow caller.
const TOKENS_IN_CHANNEL: usize = 32;
/// Bytes of keys and values after which unused pages are returned when no request is in progress.
/// Computing that many takes far longer than the page faults of using the pages again.
const TRIM_BYTES: u64 = 256 << 20;
/// Retry hint for requests that were ended because a training run needs their memory.
const DISPLACED_RETRY: Duration = Duration::from_secs(30);

/// Returns the capacity of the channel of a request: two places more than its tokens may take, for
/// the first event and an error that ends it.
pub(super) fn channel_capacity(samples: usize) -> usize {
    samples * TOKENS_IN_CHANNEL + 2
}

/// Maximum time for which the sequences of a request may wait for its caller to read.
#[derive(Clone, Copy, Debug)]
struct ReadLimits {
    /// Maximum time for which the channel may have no room for the next token of each sample.
    pause: Duration,
    /// Maximum sum of the waiting times during which another request waits for room.
    beside_others: Duration,
}

impl Default for ReadLimits {
    fn default() -> Self {
        ReadLimits {
            pause: Duration::from_secs(60),
            beside_others: Duration::from_secs(60),
        }
    }
}

/// A request in the queue.
pub(super) struct GenerationEntry {
    pub request: GenerationRequest,
    pub policy: WeightsRef,
    pub enqueued: Instant,
    /// A sample whose flag is set is not continued.
    pub stopped: Arc<[AtomicBool]>,
    pub events: mpsc::Sender<GenerationResult>,
}

impl GenerationEntry {
    /// Returns the job whose current weights it needs, if any.
    pub fn live_job(&self) -> Option<&str> {
        match &self.policy {
            WeightsRef::Live { job } | WeightsRef::LiveReference { job } => Some(job),
            _ => None,
        }
    }

    /// Returns true if the caller has left.
    pub fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Ends it with an error.
    pub fn refuse(self, e: EngineError) {
        // Its channel is empty, or has a reserved place for this.
        let _ = self.events.try_send(Err(e));
    }

    /// Returns the blocks of the cache that it takes at most.
    pub fn blocks(&self) -> usize {
        let GenerationRequest {
            prompt,
            samples,
            max_tokens,
            ..
        } = &self.request;
        generate::blocks_needed(prompt.len(), *samples, *max_tokens)
    }
}

/// A request in progress.
struct Generating {
    /// Identifies it on its worker.
    id: u64,
    entry: GenerationEntry,
    /// The base model alone; its sequences have the adapter.
    base: Policy,
    /// Samples that have not ended.
    samples: Vec<OpenSample>,
    blocks: usize,
    /// Bytes that are reserved.
    bytes: u64,
    /// Bytes of keys and values that were computed.
    computed: u64,
    block_bytes: u64,
    /// Start of the time for which the channel has been full.
    stalled_since: Option<Instant>,
    /// Time for which the channel was full while another request waited for room.
    stalled_beside_others: Duration,
    last_token: Instant,
}

/// The base model and the adapter of a policy, and the step of a running job.
type ResolvedPolicy = (Policy, Option<Arc<Adapter>>, Option<u64>);

/// The samples of a request with their first tokens, and the tokens of its prompt if their
/// log-probs are wanted.
type BegunRequest = (Vec<(Sequence, Sampled)>, Vec<ScoredToken>);

/// The base model of a request, what its prompt has given, and the step of a running job.
type OpenedRequest = (Policy, BegunRequest, Option<u64>);

/// A sample in progress.
struct OpenSample {
    index: usize,
    sequence: Sequence,
    tokens: usize,
}

/// The requests in progress on a worker.
pub(super) struct Generator {
    /// Maximum number of blocks of all requests in progress.
    limit: usize,
    generating: Vec<Generating>,
    /// Number of requests that were admitted.
    admitted: u64,
    read_limits: ReadLimits,
    /// True if a request waits for room.
    others_wait: bool,
    last_decode: Instant,
    /// Bytes of freed keys and values whose pages were not returned to the operating system.
    unreturned: u64,
    label: String,
}

/// The parts of the worker that a step uses.
pub(super) struct StepContext<'a> {
    pub policies: &'a mut PolicyCache,
    pub base_models: &'a BaseModels,
    pub live: Option<&'a Live>,
}

impl Generator {
    /// Creates a generator with room for `limit` blocks of keys and values.
    pub fn new(limit: usize, label: String) -> Self {
        Generator {
            limit,
            generating: Vec::new(),
            admitted: 0,
            read_limits: ReadLimits::default(),
            others_wait: false,
            last_decode: Instant::now(),
            unreturned: 0,
            label,
        }
    }

    /// Returns true if any request is in progress.
    pub fn is_active(&self) -> bool {
        !self.generating.is_empty()
    }

    /// Returns the number of blocks that are reserved.
    fn blocks(&self) -> usize {
        self.generating.iter().map(|g| g.blocks).sum()
    }

    /// Returns the number of sequences in progress.
    fn sequences(&self) -> usize {
        self.generating.iter().map(|g| g.samples.len()).sum()
    }

    /// Returns true if a request need not wait for those in progress: there is room, or it cannot
    /// be admitted after them either. Without others, every request that the engine has accepted
    /// has room in the cache.
    fn has_room(&self, cx: &StepContext, entry: &GenerationEntry) -> bool {
        let must_wait = |bytes| cx.policies.must_wait(cx.base_models, &entry.policy, bytes);
        self.generating.is_empty()
            || (self.blocks() + entry.blocks() <= self.limit
                && self.sequences() + entry.request.samples <= MAX_SEQUENCES
                && !cx.bytes_needed(entry).is_ok_and(must_wait))
    }

    /// Ends all requests in progress if they do not fit beside the run for which memory was
    /// reserved.
    pub fn make_room(&mut self, policies: &mut PolicyCache) {
        if self.is_active() && !policies.fits() {
            let retry_after = DISPLACED_RETRY;
            self.end_all(policies, || EngineError::GenerationDisplaced {
                retry_after,
            });
            policies.fit();
        }
    }

    /// Ends all requests in progress with an error.
    pub fn end_all(&mut self, policies: &mut PolicyCache, e: impl Fn() -> EngineError) {
        for generating in self.generating.drain(..) {
            policies.release_cache(generating.bytes);
            self.unreturned += generating.computed;
            generating.entry.refuse(e());
        }
        self.trim();
        self.report();
    }

    /// Returns unused pages to the operating system if no request is in progress and many bytes of
    /// keys and values were freed.
    fn trim(&mut self) {
        if self.generating.is_empty() && self.unreturned >= TRIM_BYTES {
            Buffer::trim();
            self.unreturned = 0;
        }
    }

    /// Ends the requests whose samples have all ended and those whose callers have left or do not
    /// read, and frees their blocks.
    fn sweep(&mut self, policies: &mut PolicyCache) {
        let limits = self.read_limits;
        let is_over = |g: &mut Generating| {
            let stopped = &g.entry.stopped;
            let keeps_on = |s: &OpenSample| {
                stopped
                    .get(s.index)
                    .is_none_or(|flag| !flag.load(Ordering::Relaxed))
            };
            g.samples.retain(keeps_on);
            // A caller whose samples have all ended closes the channel, too.
            if g.samples.is_empty() {
                return true;
            }
            if g.entry.is_abandoned() {
                metrics::counter!("bradley_generation_abandoned_total").increment(1);
                return true;
            }
            g.unread_for(limits).is_some()
        };
        for over in self.generating.extract_if(.., is_over) {
            policies.release_cache(over.bytes);
            self.unreturned += over.computed;
            if let Some(waited) = over.unread_for(limits)
                && !over.samples.is_empty()
            {
                over.entry.refuse(EngineError::AnswerNotRead { waited });
            }
        }
    }

    /// Admits waiting requests and computes one token of every sequence whose caller reads. `take`
    /// returns the next request if the given test is true for it; no other request overtakes it.
    /// Returns false if nothing could be computed.
    pub fn step(
        &mut self,
        cx: &mut StepContext,
        take: impl Fn(&dyn Fn(&GenerationEntry) -> bool) -> Option<GenerationEntry>,
    ) -> bool {
        self.sweep(cx.policies);
        let (mut prefilled, mut worked) = (0, false);
        let others_wait = Cell::new(false);
        while prefilled < PREFILL_TOKENS {
            let fits = |entry: &GenerationEntry| {
                let has_room = self.has_room(cx, entry);
                others_wait.set(!has_room);
                has_room
                    && (prefilled == 0 || prefilled + entry.request.prompt.len() <= PREFILL_TOKENS)
            };
            let Some(entry) = take(&fits) else { break };
            prefilled += entry.request.prompt.len();
            self.admit(cx, entry);
            worked = true;
        }
        self.others_wait = others_wait.get();
        worked |= self.decode(cx.policies);
        self.sweep(cx.policies);
        self.trim();
        self.report();
        worked
    }

    /// Runs the prompt of a request, samples the first tokens, and sends them.
    fn admit(&mut self, cx: &mut StepContext, entry: GenerationEntry) {
        metrics::histogram!("bradley_generation_queue_seconds")
            .record(entry.enqueued.elapsed().as_secs_f64());
        let mut bytes = 0;
        let (base, (begun, prompt), live_step) = match self.open(cx, &entry, &mut bytes) {
            Ok(opened) => opened,
            Err(e) => {
                cx.policies.release_cache(bytes);
                return entry.refuse(e);
            }
        };
        metrics::counter!("bradley_generation_prompt_tokens_total")
            .increment(entry.request.prompt.len() as u64);
        metrics::histogram!("bradley_generation_first_token_seconds")
            .record(entry.enqueued.elapsed().as_secs_f64());
        let _ = entry
            .events
            .try_send(Ok(GenerationEvent::Started { live_step, prompt }));
        let (sequences, firsts): (Vec<Sequence>, Vec<Sampled>) = begun.into_iter().unzip();
        self.admitted += 1;
        let block_bytes = base.cache_layout().block_bytes() as u64;
        let mut generating = Generating {
            id: self.admitted,
            blocks: entry.blocks(),
            samples: Vec::new(),
            computed: blocks_of(entry.request.prompt.len()) as u64 * block_bytes,
            block_bytes,
            stalled_since: None,
            stalled_beside_others: Duration::ZERO,
            last_token: Instant::now(),
            entry,
            base,
            bytes,
        };
        for (index, (sequence, first)) in sequences.into_iter().zip(firsts).enumerate() {
            let mut sample = OpenSample {
                index,
                sequence,
                tokens: 0,
            };
            if !generating.deliver(&mut sample, first) {
                generating.samples.push(sample);
            }
        }
        self.generating.push(generating);
    }

    /// Reserves the memory of a request, runs its prompt and samples the first tokens. Also returns
    /// the base model and the step of a running job. `reserved` counts the bytes, also if this
    /// fails.
    fn open(
        &self,
        cx: &mut StepContext,
        entry: &GenerationEntry,
        reserved: &mut u64,
    ) -> Result<OpenedRequest, EngineError> {
        let bytes = cx.bytes_needed(entry)?;
        let mut reserve = |cx: &mut StepContext| {
            cx.policies.reserve_cache(cx.base_models, bytes)?;
            *reserved = bytes;
            Ok::<_, EngineError>(())
        };
        let is_live = cx.live_of(&entry.policy).is_some();
        if is_live {
            // Before the adapter is copied.
            reserve(cx)?;
        }
        let (base, adapter, live_step) = self.resolve(cx, &entry.policy)?;
        if !is_live {
            // The weights are in use now, so they are not evicted for the keys.
            reserve(cx)?;
        }
        let begun = guarded(|| begin(&base, adapter, &entry.request))
            .unwrap_or_else(|panic| Err(EngineError::Device(panic)))?;
        Ok((base, begun, live_step))
    }

    /// Returns the base model and the adapter of a policy, and the step of a running job. The
    /// adapter of a running job is copied, because training changes it in place.
    fn resolve(
        &self,
        cx: &mut StepContext,
        weights: &WeightsRef,
    ) -> Result<ResolvedPolicy, EngineError> {
        let Some(live) = cx.live_of(weights) else {
            let policy = cx.policies.get(cx.base_models, weights)?;
            return Ok((policy.base(), policy.adapter, None));
        };
        let Some(adapter) = &live.policy.adapter else {
            return Err(EngineError::Weights(format!(
                "trainingJobs/{} trains all weights of its model, and they change while a text is \
                 generated: name a checkpoint by its step, or wait until the job has ended",
                live.job
            )));
        };
        let copied = adapter.map(|_, tensor| tensor.detach().copy())?;
        let base = Policy {
            helpers: Arc::default(),
            ..live.policy.base()
        };
        Ok((base, Some(Arc::new(copied)), Some(live.step)))
    }

    /// Computes and sends the next token of every sequence whose caller reads. Sequences on the
    /// same base weights share a pass. Returns false if there are none.
    fn decode(&mut self, policies: &mut PolicyCache) -> bool {
        let now = Instant::now();
        let passed = now.duration_since(std::mem::replace(&mut self.last_decode, now));
        let mut left: Vec<&mut Generating> = Vec::new();
        for generating in &mut self.generating {
            if !generating.is_stalled() {
                generating.stalled_since = None;
                left.push(generating);
            } else if generating.stalled_since.is_none() {
                generating.stalled_since = Some(now);
            } else if self.others_wait {
                generating.stalled_beside_others += passed;
            }
        }
        let worked = !left.is_empty();
        let mut failed: Vec<(u64, EngineError)> = Vec::new();
        while let Some(first) = left.first() {
            let base = first.base.clone();
            let (mut members, others): (Vec<_>, Vec<_>) =
                left.into_iter().partition(|g| g.base.shares_base(&base));
            left = others;
            let mut sequences: Vec<&mut Sequence> = members
                .iter_mut()
                .flat_map(|g| g.samples.iter_mut().map(|sample| &mut sample.sequence))
                .collect();
            let count = sequences.len();
            let start = Instant::now();
            let next = guarded(|| {
                generate::decode(&base, &base.cache_layout(), &mut sequences, &mut || {})
                    .map_err(device_error)
            })
            .unwrap_or_else(|panic| Err(EngineError::Device(panic)));
            drop(sequences);
            metrics::histogram!("bradley_generation_step_seconds")
                .record(start.elapsed().as_secs_f64());
            metrics::histogram!("bradley_generation_step_items").record(count as f64);
            let mut next = match next {
                Ok(next) => next.into_iter(),
                Err(e) => {
                    failed.extend(members.iter().map(|g| (g.id, repeated(&e))));
                    continue;
                }
            };
            for generating in members {
                let mut open = Vec::with_capacity(generating.samples.len());
                let samples = std::mem::take(&mut generating.samples);
                for mut sample in samples {
                    match next.next() {
                        Some(Ok(token)) => {
                            if !generating.deliver(&mut sample, token) {
                                open.push(sample);
                            }
                        }
                        Some(Err(e)) => {
                            failed.push((generating.id, device_error(e)));
                        }
                        None => open.push(sample),
                    }
                }
                metrics::histogram!("bradley_generation_token_seconds")
                    .record(generating.last_token.elapsed().as_secs_f64());
                generating.last_token = Instant::now();
                generating.samples = open;
            }
        }
        self.end_failed(policies, failed);
        worked
    }

    /// Ends the requests with these ids with their errors.
    fn end_failed(&mut self, policies: &mut PolicyCache, failed: Vec<(u64, EngineError)>) {
        for (id, e) in failed {
            if let Some(over) = self.generating.iter_mut().find(|g| g.id == id) {
                over.samples.clear();
                let _ = over.entry.events.try_send(Err(e));
            }
        }
        self.sweep(policies);
    }

    fn report(&self) {
        let device = || self.label.clone();
        metrics::gauge!("bradley_generation_sequences", "device" => device())
            .set(self.sequences() as f64);
        metrics::gauge!("bradley_generation_cache_tokens", "device" => device())
            .set((self.blocks() * CACHE_BLOCK) as f64);
    }
}

impl<'a> StepContext<'a> {
    /// Returns the run whose weights these are, if it is in progress here.
    fn live_of(&self, weights: &WeightsRef) -> Option<&'a Live> {
        self.live
            .filter(|live| matches!(weights, WeightsRef::Live { job } if *job == live.job))
    }

    /// Returns the bytes of a request's keys and values. For a running job they include a copy of
    /// its adapter.
    fn bytes_needed(&self, entry: &GenerationEntry) -> Result<u64, EngineError> {
        let (policy, copied) = match (self.live_of(&entry.policy), entry.policy.model()) {
            (Some(live), _) => (&live.policy, adapter_bytes(&live.policy)),
            (None, Some(model)) => (&self.base_models.get(model)?.policy, 0),
            (None, None) => {
                let job = entry.live_job().unwrap_or_default();
                return Err(EngineError::NotResident(job.to_owned()));
            }
        };
        let keys_and_values = entry.blocks() * policy.cache_layout().block_bytes();
        Ok(copied + keys_and_values as u64)
    }
}

impl Generating {
    /// Returns true if the channel has no room for a token of each sample, besides the place that
    /// is reserved for the event that ends the request.
    fn is_stalled(&self) -> bool {
        self.entry.events.capacity() <= self.samples.len()
    }

    /// Returns the time for which it had to wait for its caller, if that is too long and the
    /// channel still has no room for its next tokens.
    fn unread_for(&self, limits: ReadLimits) -> Option<Duration> {
        if !self.is_stalled() {
            return None;
        }
        let pause = self.stalled_since.map(|since| since.elapsed());
        let beside_others = self.stalled_beside_others;
        pause
            .filter(|pause| *pause > limits.pause)
            .or((beside_others > limits.beside_others).then_some(beside_others))
    }

    /// Sends a token of a sample. Returns true if it is the sample's last one.
    fn deliver(&mut self, sample: &mut OpenSample, sampled: Sampled) -> bool {
        sample.tokens += 1;
        if sample.tokens % CACHE_BLOCK == 1 {
            self.computed += self.block_bytes;
        }
        let request = &self.entry.request;
        let end = if request.stop_tokens.contains(&sampled.token) {
            Some(GenerationEnd::Stop)
        } else {
            (sample.tokens >= request.max_tokens).then_some(GenerationEnd::Length)
        };
        metrics::counter!("bradley_generated_tokens_total").increment(1);
        // There is room, or the caller has left.
        let _ = self.entry.events.try_send(Ok(GenerationEvent::Token {
            sample: sample.index,
            token: sampled.token,
            log_prob: sampled.log_prob,
            top: sample.sequence.take_top(),
            end,
        }));
        end.is_some()
    }
}

/// Runs a prompt once and samples the first token of each sample.
fn begin(
    base: &Policy,
    adapter: Option<Arc<Adapter>>,
    request: &GenerationRequest,
) -> Result<BegunRequest, EngineError> {
    let GenerationRequest {
        prompt,
        samples,
        max_tokens,
        sampling,
        log_probs,
        ..
    } = request;
    let prompt = Prompt::new(prompt.clone(), *max_tokens, adapter)?.with_log_probs(*log_probs);
    let (layout, mut prompts) = (base.cache_layout(), [prompt]);
    let logits =
        generate::prefill(base, &layout, &mut prompts, &mut || {}).map_err(device_error)?;
    let [mut prompt] = prompts;
    let scored = prompt.take_scored();
    let prompt = Arc::new(prompt);
    let Some(logits) = logits.first() else {
        return Err(EngineError::Device(
            "a prompt came back without logits".into(),
        ));
    };
    let begun = (0..*samples)
        .map(|sample| Sequence::begin(prompt.clone(), sampling, sample, logits))
        .collect::<candle_core::Result<_>>()?;
    Ok((begun, scored))
}

/// Returns the error again, for another request of the same pass.
fn repeated(e: &EngineError) -> EngineError {
    match e {
        EngineError::DeviceFull(why) => EngineError::DeviceFull(why.clone()),
        EngineError::Device(why) => EngineError::Device(why.clone()),
        other => EngineError::Device(other.to_string()),
    }
}

#[cfg(test)]
mod tests;
