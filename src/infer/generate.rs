//! Generates tokens: a prompt is run once, then one pass computes the next token of any number of
//! sequences.
//!
//! The sequences of a pass may have different lengths, belong to different requests, and have
//! different adapters on one base. A sequence's tokens and log-probs do not depend on its company.
//! On the CPU the log-prob of a generated token has the bits that [`super::scorer::score`] computes
//! for the same prompt and completion.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};
use candle_transformers::generation::{LogitsProcessor, Sampling};

use crate::compute::cpu::attention::{CacheLayout, CachedSegment, blocks_of};
use crate::compute::cpu::head::{log_prob, most_likely};
use crate::compute::cpu::thread_pool;
use crate::math::rng::derived_seed;
use crate::model::adapter::Adapter;
use crate::model::decoder::{CachedPrompt, CachedSequence, LogitsReader, Policy};
use crate::model::spec::ModelSpec;

/// Options that decide how the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// The logits are divided by it; 0 chooses the most likely token.
    pub temperature: f64,
    /// Samples from the most likely tokens whose probabilities add up to this; `None` means all.
    /// With `top_k`, the probabilities are those among its tokens.
    pub top_p: Option<f64>,
    /// Samples from this many of the most likely tokens; `None` means all.
    pub top_k: Option<usize>,
    /// Seed of the request. Every sample has its own generator, derived from it.
    pub seed: u64,
}

impl SamplingOptions {
    /// Returns the sampler of a sample. The samples of a request are numbered from 0.
    fn sampler(&self, sample: usize) -> Sampler {
        let temperature = self.temperature;
        let sampling = match (self.top_k, self.top_p) {
            (None, _) => Sampling::All { temperature },
            (Some(k), None) => Sampling::TopK { k, temperature },
            (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        };
        let nucleus = match (self.top_k, self.top_p) {
            (None, Some(p)) if p > 0.0 && p < 1.0 => Some(p as f32),
            _ => None,
        };
        let nucleus_of = match sampling {
            Sampling::TopKThenTopP { k, .. } => Some(k),
            _ => None,
        };
        let seed = derived_seed(self.seed, &format!("sample {sample}"));
        let random = || LogitsProcessor::from_sampling(seed, sampling);
        Sampler {
            processor: (temperature != 0.0).then(random),
            nucleus,
            nucleus_of,
        }
    }
}

/// Chooses the tokens of a sample.
struct Sampler {
    /// `None` chooses the most likely token.
    processor: Option<LogitsProcessor>,
    /// `top_p` if there is no `top_k`. candle would sort the whole vocabulary.
    nucleus: Option<f32>,
    /// `top_k` if there is a `top_p` as well. candle compares `top_p` with probabilities among all
    /// tokens, transformers and vLLM with those among the `top_k` tokens. So they are scaled first.
    nucleus_of: Option<usize>,
}

impl Sampler {
    /// Samples from logits `[V]`. Fails if a logit is not a number.
    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let Some(processor) = &mut self.processor else {
            return most_likely_token(logits).map_or_else(not_a_number, Ok);
        };
        check_numbers(logits)?;
        let logits = Tensor::from_slice(logits, logits.len(), &Device::Cpu)?;
        let (nucleus, nucleus_of) = (self.nucleus, self.nucleus_of);
        processor.sample_f(&logits, |probabilities| {
            if let Some(p) = nucleus {
                keep_nucleus(probabilities, p);
            }
            if let Some(k) = nucleus_of {
                scale(probabilities, k);
            }
        })
    }
}

/// Returns the token with the largest of the logits `[V]` (on a tie, the first of them), or `None`
/// if a logit is not a number.
fn most_likely_token(logits: &[f32]) -> Option<u32> {
    /// Number of logits that are compared with the largest one before them without a branch.
    const AT_ONCE: usize = 64;
    let (mut largest, mut token) = (f32::NEG_INFINITY, 0);
    for (i, some) in logits.chunks(AT_ONCE).enumerate() {
        let differs = |l: &f32| (*l > largest) | l.is_nan();
        if !some.iter().fold(false, |any, l| any | differs(l)) {
            continue;
        }
        for (j, l) in some.iter().enumerate() {
            if l.is_nan() {
                return None;
            }
            if *l > largest {
                (largest, token) = (*l, i * AT_ONCE + j);
            }
        }
    }
    Some(token as u32)
}

/// Number of the most likely tokens that [`keep_nucleus`] sorts at first. While these are too few,
/// it sorts eight times as many.
const FIRST_SORTED: usize = 256;

/// Sets the probabilities `[V]` of all tokens to 0 but those of the nucleus: the fewest most likely
/// tokens whose probabilities add up to `p`. Of equally likely tokens, those with the lowest ids
/// come first. The result is that of candle, which sorts the whole vocabulary.
fn keep_nucleus(probabilities: &mut [f32], p: f32) {
    let mut order: Vec<u32> = (0..probabilities.len() as u32).collect();
    let of = |token: u32| probabilities[token as usize];
    let by_rank = |a: &u32, b: &u32| of(*b).total_cmp(&of(*a)).then(a.cmp(b));
    let (mut kept, mut sorted, mut sum) = (0, 0, 0f32);
    while kept < order.len() {
        if sum >= p {
            break;
        }
        if kept == sorted {
            let rest = &mut order[sorted..];
            let count = FIRST_SORTED.max(7 * sorted).min(rest.len());
            if count < rest.len() {
                rest.select_nth_unstable_by(count, by_rank);
            }
            rest[..count].sort_unstable_by(by_rank);
            sorted += count;
        }
        sum += of(order[kept]);
        kept += 1;
    }
    for token in &order[kept..] {
        probabilities[*token as usize] = 0.0;
    }
}

/// Scales probabilities so that the `k` highest add up to 1.
fn scale(probabilities: &mut [f32], k: usize) {
    if !(1..probabilities.len()).contains(&k) {
        return;
    }
    let mut sorted = probabilities.to_vec();
    let (highest, _, _) = sorted.select_nth_unstable_by(k, |a, b| b.total_cmp(a));
    let sum: f32 = highest.iter().sum();
    probabilities.iter_mut().for_each(|p| *p /= sum);
}

/// Log-probs that a request wants besides those of the generated tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogProbOptions {
    /// Number of the most likely tokens at the place of each token.
    pub top: usize,
    /// True for the log-probs of the prompt's own tokens.
    pub prompt: bool,
}

/// A token of a prompt, with its log-prob after the tokens before it.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// The token.
    pub token: Sampled,
    /// The most likely tokens at its place, the most likely first.
    pub top: Vec<Sampled>,
}

/// A token with its log-prob: a generated one, one of a prompt, or one of the most likely ones at
/// the same place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-prob under the model, in nats: at temperature 1 and over the whole vocabulary,
    /// whatever the sampling options are.
    pub log_prob: f32,
}

/// A prompt with its cached keys and values, which all its samples share.
#[derive(Debug)]
pub struct Prompt {
    ids: Vec<u32>,
    /// Length of the longest sequence that may start with it.
    length: usize,
    adapter: Option<Arc<Adapter>>,
    cache: CachedSegment,
    log_probs: LogProbOptions,
    /// The tokens from the second on, once the prompt was run. Empty if nobody asks for them.
    scored: Vec<ScoredToken>,
}

impl Prompt {
    /// Makes a prompt of at least one token, with at most `max_tokens` tokens after it. `adapter`
    /// is the adapter of its policy.
    ///
    /// # Errors
    /// Fails if the prompt has no tokens.
    pub fn new(ids: Vec<u32>, max_tokens: usize, adapter: Option<Arc<Adapter>>) -> Result<Self> {
        if ids.is_empty() {
            bail!("a prompt needs at least one token");
        }
        Ok(Prompt {
            length: ids.len() + max_tokens,
            ids,
            adapter,
            cache: CachedSegment::default(),
            log_probs: LogProbOptions::default(),
            scored: Vec::new(),
        })
    }

    /// Returns the prompt with other log-probs that are wanted; by default none.
    pub fn with_log_probs(self, log_probs: LogProbOptions) -> Self {
        Prompt { log_probs, ..self }
    }

    /// Takes the prompt's tokens from the second on, with their log-probs, after [`prefill`]. They
    /// agree with [`super::scorer::score`] up to rounding: there, a prompt's tokens and those of
    /// its completion are added separately. The rotary frequencies are those of a sequence that is
    /// longer than the prompt. If frequencies depend on the length (LongRoPE, `dynamic`), scoring
    /// the prompt's tokens alone may use other ones.
    pub fn take_scored(&mut self) -> Vec<ScoredToken> {
        std::mem::take(&mut self.scored)
    }
}

/// A sequence that is being generated.
pub struct Sequence {
    prompt: Arc<Prompt>,
    own: CachedSegment,
    /// The last token, which is not in the cache yet.
    last: u32,
    sampler: Sampler,
    /// The most likely tokens at the place of the last token, if they are wanted.
    top: Vec<Sampled>,
}

impl Sequence {
    /// Samples the first token after the prompt, given the prompt's logits, and returns it with the
    /// sequence. `sample` is the number of the sample in its request, counted from 0.
    ///
    /// # Errors
    /// Fails if a logit is not a number.
    pub fn begin(
        prompt: Arc<Prompt>,
        options: &SamplingOptions,
        sample: usize,
        logits: &[f32],
    ) -> Result<(Self, Sampled)> {
        let mut sampler = options.sampler(sample);
        let first = draw(&mut sampler, logits)?;
        let sequence = Sequence {
            top: top_tokens(logits, prompt.log_probs.top),
            prompt,
            own: CachedSegment::default(),
            last: first.token,
            sampler,
        };
        Ok((sequence, first))
    }

    /// Samples the token after the last one, given its logits `[V]`.
    fn advance(&mut self, logits: &[f32]) -> Result<Sampled> {
        let next = draw(&mut self.sampler, logits)?;
        self.last = next.token;
        self.top = top_tokens(logits, self.prompt.log_probs.top);
        Ok(next)
    }

    /// Takes the most likely tokens at the place of the last token, the most likely first; empty
    /// if they are not wanted.
    pub fn take_top(&mut self) -> Vec<Sampled> {
        std::mem::take(&mut self.top)
    }
}

/// Returns the `count` most likely tokens of logits `[V]`, the most likely first.
fn top_tokens(logits: &[f32], count: usize) -> Vec<Sampled> {
    let top = most_likely(logits, count).into_iter();
    top.map(|(token, log_prob)| Sampled { token, log_prob })
        .collect()
}

/// Returns the error about a logit that is not a number.
fn not_a_number<T>() -> Result<T> {
    bail!("the model computed a logit that is not a number");
}

/// Fails if a logit is not a number.
fn check_numbers(logits: &[f32]) -> Result<()> {
    match logits.iter().any(|l| l.is_nan()) {
        true => not_a_number(),
        false => Ok(()),
    }
}

/// Returns a reader that adds the tokens of a prompt, from the second on, to `scored`. Each has its
/// `top` most likely tokens. The vocabulary has `vocabulary` tokens.
fn scoring_reader<'a>(
    ids: &'a [u32],
    top: usize,
    vocabulary: usize,
    scored: &'a mut Vec<ScoredToken>,
) -> LogitsReader<'a> {
    Box::new(move |first: usize, logits: &[f32]| -> Result<()> {
        let rows = logits.chunks(vocabulary).zip(ids.iter().skip(first));
        let rows: Vec<(&[f32], &u32)> = rows.collect();
        let tokens = thread_pool::map(rows.len(), |i| -> Result<ScoredToken> {
            let (logits, token) = rows[i];
            check_numbers(logits)?;
            let token = Sampled {
                token: *token,
                log_prob: log_prob(logits, *token),
            };
            let top = top_tokens(logits, top);
            Ok(ScoredToken { token, top })
        });
        for token in tokens {
            scored.push(token?);
        }
        Ok(())
    })
}

/// Samples a token from logits `[V]`.
fn draw(sampler: &mut Sampler, logits: &[f32]) -> Result<Sampled> {
    let token = sampler.choose(logits)?;
    Ok(Sampled {
        token,
        log_prob: log_prob(logits, token),
    })
}

/// Returns the blocks of the cache that a request takes at most: its prompt once, and `max_tokens`
/// tokens of each of `samples` samples.
pub fn blocks_needed(prompt: usize, samples: usize, max_tokens: usize) -> usize {
    // The last token is never read, so it is not stored.
    blocks_of(prompt) + samples * blocks_of(max_tokens.saturating_sub(1))
}

/// Returns the most tokens, at most `max_tokens`, that can follow a prompt without another set of
/// rotary frequencies. Some rotary embeddings (LongRoPE, `dynamic`) have others for longer
/// sequences, and then every cached key would change.
pub fn tokens_with_equal_frequencies(spec: &ModelSpec, prompt: usize, max_tokens: usize) -> usize {
    let class = spec.length_class(prompt + 1);
    let (mut fits, mut too_many) = (max_tokens.min(1), max_tokens + 1);
    while fits + 1 < too_many {
        let middle = fits.midpoint(too_many);
        match spec.length_class(prompt + middle) == class {
            true => fits = middle,
            false => too_many = middle,
        }
    }
    fits
}

/// Runs prompts and fills their caches. Returns the logits `[V]` of the token after each prompt.
/// `base` is their base model, given without an adapter: each prompt brings its own. `yield_point`
/// is called before every block.
///
/// # Errors
/// Fails if `base` is on a GPU, where nothing can be generated, or has an adapter, if a token id is
/// outside the vocabulary, if a logit of a prompt whose log-probs are wanted is not a number, or if
/// the device fails.
pub fn prefill(
    base: &Policy,
    layout: &CacheLayout,
    prompts: &mut [Prompt],
    yield_point: &mut dyn FnMut(),
) -> Result<Vec<Vec<f32>>> {
    if prompts.is_empty() {
        return Ok(Vec::new());
    }
    let vocabulary = base.config.spec.vocab_size;
    let rows = prompts.iter_mut().map(|prompt| CachedPrompt {
        ids: &prompt.ids,
        adapter: prompt.adapter.clone(),
        length: prompt.length,
        cache: &mut prompt.cache,
        reader: match prompt.log_probs {
            LogProbOptions { prompt: false, .. } => None,
            LogProbOptions { top, .. } => {
                let scored = &mut prompt.scored;
                Some(scoring_reader(&prompt.ids, top, vocabulary, scored))
            }
        },
    });
    let logits = base.prefill(layout, rows.collect(), yield_point)?;
    let rows = logits.chunks(vocabulary);
    Ok(rows.map(<[f32]>::to_vec).collect())
}

/// Computes and samples the next token of each sequence. All sequences have this base model, which
/// is given without an adapter. `yield_point` is called before every block.
///
/// # Errors
/// Fails as [`prefill`] does. The inner result of a sequence fails if a logit is not a number.
pub fn decode(
    base: &Policy,
    layout: &CacheLayout,
    sequences: &mut [&mut Sequence],
    yield_point: &mut dyn FnMut(),
) -> Result<Vec<Result<Sampled>>> {
    if sequences.is_empty() {
        return Ok(Vec::new());
    }
    let rows = sequences.iter_mut().map(|sequence| CachedSequence {
        id: sequence.last,
        adapter: sequence.prompt.adapter.clone(),
        length: sequence.prompt.length,
        prompt: &sequence.prompt.cache,
        own: &mut sequence.own,
    });
    let logits = base.decode(layout, rows.collect(), yield_point)?;
    // Every sequence has its own generator, so the order in which they are sampled does not matter.
    let mut draws: Vec<_> = sequences
        .iter_mut()
        .zip(logits.chunks(base.config.spec.vocab_size))
        .map(|(sequence, logits)| (sequence, logits, None))
        .collect();
    thread_pool::chunks(&mut draws, 1, |_, draws| {
        for (sequence, logits, next) in draws {
            *next = Some(sequence.advance(logits));
        }
    });
    Ok(draws.into_iter().filter_map(|(_, _, next)| next).collect())
}

#[cfg(test)]
mod tests;
