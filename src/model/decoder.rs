//! A policy: the weights of a decoder, an optional adapter, and the devices that run its passes.
//! The head runs only on the tokens that predict completion tokens.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::{Result, bail};

use super::adapter::Adapter;
use super::backend::PolicyView;
use super::config::ModelConfig;
use super::cpu::CpuRow;
use super::device::ComputeDevice;
use super::parameters::Parameters;
use super::pass;
use super::rope::RopeConfig;
use super::row::{CacheAccess, PreparedRow, Row, RowCache, RowRope};
use crate::compute::cpu::attention::{CacheLayout, CachedSegment};
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm::Kernel;
use crate::compute::cpu::rope::RopeTable;
use crate::compute::layout::RowLayout;
use crate::domain::training::Precision;

/// A model that assigns probabilities to tokens: a base model with an optional adapter.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Configuration of the base model.
    pub config: Arc<ModelConfig>,
    /// The base weights. All policies on the same base model share them.
    pub parameters: Arc<Parameters>,
    /// The adapter; `None` for the base model alone.
    pub adapter: Option<Arc<Adapter>>,
    /// Precision of the matrix multiplications.
    pub precision: Precision,
    /// The device that runs the passes.
    pub device: ComputeDevice,
    /// Further devices that take a share of the rows (data parallelism).
    pub helpers: Arc<[ComputeDevice]>,
}

/// A prompt that is run once, before tokens are generated after it.
pub struct CachedPrompt<'a> {
    /// Token ids; at least one.
    pub ids: &'a [u32],
    /// The adapter.
    pub adapter: Option<Arc<Adapter>>,
    /// Length of the longest sequence that starts with the prompt. Some rotary embeddings choose
    /// their frequencies by it.
    pub length: usize,
    /// Receives the prompt's keys and values; empty.
    pub cache: &'a mut CachedSegment,
    /// Receives the logits of the prompt's own tokens; `None` if they are not needed.
    pub reader: Option<LogitsReader<'a>>,
}

/// Reads logits `[N, V]` of N consecutive tokens of a prompt. The first argument is the index of
/// the first of these tokens in the prompt. It is called in the order of the tokens, and not for
/// the prompt's first token, which nothing predicts.
pub type LogitsReader<'a> = Box<dyn FnMut(usize, &[f32]) -> Result<()> + 'a>;

/// Number of a prompt's tokens whose logits exist at the same time.
const LOGIT_ROWS: usize = 64;

/// A sequence whose next token is computed.
pub struct CachedSequence<'a> {
    /// The last token, which is not in the cache yet.
    pub id: u32,
    /// The adapter.
    pub adapter: Option<Arc<Adapter>>,
    /// As [`CachedPrompt::length`], and the same for the prompt and all its sequences.
    pub length: usize,
    /// The prompt's keys and values.
    pub prompt: &'a CachedSegment,
    /// The keys and values of the earlier generated tokens.
    pub own: &'a mut CachedSegment,
}

/// Builds the row of a pass with a cache: whole prompts, or one token of each sequence.
#[derive(Default)]
struct RowBuilder {
    ids: Vec<u32>,
    layout: RowLayout,
    /// Positions of each segment.
    positions: Vec<Positions>,
    /// Adapters on ranges of the row's tokens.
    adapters: Vec<(Range<usize>, Arc<Adapter>)>,
}

impl RowBuilder {
    /// Appends a segment: tokens of a sequence of `length` tokens, from position `first` on.
    fn push(&mut self, ids: &[u32], first: usize, length: usize, adapter: Option<Arc<Adapter>>) {
        let (tokens, _) = self.layout.push_group(ids.len(), []);
        self.ids.extend_from_slice(ids);
        self.positions.push((first, ids.len(), length));
        let Some(adapter) = adapter else { return };
        match self.adapters.last_mut() {
            Some((last, same)) if last.end == tokens.start && Arc::ptr_eq(same, &adapter) => {
                last.end = tokens.end;
            }
            _ => self.adapters.push((tokens, adapter)),
        }
    }
}

impl Policy {
    /// Returns the parts of the policy that passes read.
    pub fn view(&self) -> PolicyView<'_> {
        PolicyView {
            spec: &self.config.spec,
            parameters: &self.parameters,
            adapter: self.adapter.as_ref(),
            precision: self.precision,
        }
    }

    /// Returns the base model without the adapter.
    pub fn base(&self) -> Policy {
        Policy {
            adapter: None,
            ..self.clone()
        }
    }

    /// Returns the policy on `device` alone, without helpers.
    pub fn on(&self, device: &ComputeDevice) -> Policy {
        Policy {
            device: device.clone(),
            helpers: Arc::default(),
            ..self.clone()
        }
    }

    /// Iterates over the policy's own device, then its helpers.
    pub fn devices(&self) -> impl Iterator<Item = &ComputeDevice> {
        std::iter::once(&self.device).chain(self.helpers.iter())
    }

    /// Returns the policy with another precision of the matrix multiplications.
    pub fn with_precision(&self, precision: Precision) -> Policy {
        Policy {
            precision,
            ..self.clone()
        }
    }

    /// Returns true if both policies have the same base weights and the same precision. The
    /// adapters may differ.
    pub fn shares_base(&self, other: &Policy) -> bool {
        Arc::ptr_eq(&self.parameters, &other.parameters) && self.precision == other.precision
    }

    /// Returns the GEMM kernel that the policy uses on this machine's CPU.
    pub fn kernel(&self) -> Kernel {
        Kernel::best(self.precision)
    }

    /// Returns a name for everything that affects rounding: the precision and, for each device, the
    /// GEMM kernel or the GPU and its cuBLAS version. Results are bit-identical only under the same
    /// name. Helpers are included; equal names appear once.
    pub fn arithmetic(&self) -> String {
        let mut names: Vec<String> = Vec::new();
        for device in self.devices() {
            let name = device.arithmetic(self.kernel());
            if !names.contains(&name) {
                names.push(name);
            }
        }
        format!("{} {}", names.join(" and "), self.precision.name())
    }

    /// Returns the number of decoder blocks.
    pub fn num_blocks(&self) -> usize {
        self.parameters.num_blocks()
    }

    /// Prepares a row for a pass: checks its token ids and computes its rotary tables.
    ///
    /// # Errors
    /// Fails if a token id is outside the model's vocabulary.
    pub fn prepare(&self, row: Arc<Row>) -> Result<PreparedRow> {
        self.check_ids(&row)?;
        let lengths = row.layout.sequence_lengths();
        let segments = row.layout.segments.iter().zip(lengths);
        let positions: Vec<Positions> = segments
            .map(|(s, length)| (s.prefix.len(), s.tokens.len(), length))
            .collect();
        Ok(PreparedRow::new(row, self.ropes(&positions)))
    }

    /// Checks that the row's token ids are in the vocabulary.
    fn check_ids(&self, row: &Row) -> Result<()> {
        let vocabulary = self.config.spec.vocab_size;
        let mut ids = row.ids.iter().chain(row.targets.iter());
        match ids.find(|id| **id as usize >= vocabulary) {
            None => Ok(()),
            Some(bad) => {
                bail!("token id {bad} is outside the model's vocabulary of {vocabulary}")
            }
        }
    }

    /// Computes the rotary tables of a row with these segments.
    fn ropes(&self, segments: &[Positions]) -> Vec<RowRope> {
        let spec = &self.config.spec;
        let table = |rope: &RopeConfig| row_rope(rope, spec.head_dim(), segments);
        spec.ropes.iter().map(table).collect()
    }

    /// Returns the log-probs of the row's completion tokens `[N]`. `yield_point` is called before
    /// every block.
    ///
    /// # Errors
    /// Fails if a token id is outside the vocabulary, or the device fails or has no memory left.
    pub fn log_probs(&self, row: Arc<Row>, yield_point: &mut dyn FnMut()) -> Result<Vec<f32>> {
        self.log_probs_of(self.prepare(row)?, yield_point)
    }

    /// Returns the log-probs of the row's completion tokens `[N]`, with adapters on parts of the
    /// row. The GEMMs of the base model are shared, and each adapter's low-rank terms are added to
    /// its own range of tokens. A token's results are those with its adapter alone: bit-identical
    /// on the CPU, up to rounding on a GPU.
    ///
    /// # Errors
    /// Fails as [`Policy::log_probs`] does, and if the policy itself has an adapter.
    pub fn log_probs_with(
        &self,
        row: Arc<Row>,
        adapters: Vec<(Range<usize>, Arc<Adapter>)>,
        yield_point: &mut dyn FnMut(),
    ) -> Result<Vec<f32>> {
        if self.adapter.is_some() && !adapters.is_empty() {
            bail!("adapters on parts of a row need a base model without an adapter");
        }
        let row = PreparedRow {
            adapters,
            ..self.prepare(row)?
        };
        self.log_probs_of(row, yield_point)
    }

    /// Returns the form of the cache of keys and values for this policy.
    pub fn cache_layout(&self) -> CacheLayout {
        let blocks = &self.config.spec.blocks;
        CacheLayout::new(
            self.kernel(),
            blocks.iter().map(|block| block.attention().as_heads()),
        )
    }

    /// Runs S whole prompts, fills their caches, and returns the logits of the token after each
    /// prompt `[S, V]`.
    ///
    /// # Errors
    /// Fails as [`Policy::log_probs`] does, if the policy itself has an adapter, and on a GPU.
    pub fn prefill(
        &self,
        layout: &CacheLayout,
        prompts: Vec<CachedPrompt>,
        yield_point: &mut dyn FnMut(),
    ) -> Result<Buffer> {
        let mut row = RowBuilder::default();
        let (mut segments, mut readers) = (Vec::new(), Vec::new());
        for prompt in prompts {
            row.push(prompt.ids, 0, prompt.length, prompt.adapter);
            prompt.cache.make_room(layout, prompt.ids.len());
            segments.push(prompt.cache);
            readers.push(prompt.reader);
        }
        let access = Mutex::new(CacheAccess::Prompts(segments));
        self.cached_pass(row, RowCache { layout, access }, readers, yield_point)
    }

    /// Runs one token of each of S sequences, adds it to the sequence's cache, and returns the
    /// logits of the next token of each `[S, V]`. A sequence's logits have the same bits whatever
    /// other sequences are decoded with it.
    ///
    /// # Errors
    /// As [`Policy::prefill`].
    pub fn decode(
        &self,
        layout: &CacheLayout,
        sequences: Vec<CachedSequence>,
        yield_point: &mut dyn FnMut(),
    ) -> Result<Buffer> {
        let (mut row, mut segments) = (RowBuilder::default(), Vec::new());
        for sequence in sequences {
            let position = sequence.prompt.tokens() + sequence.own.tokens();
            row.push(&[sequence.id], position, sequence.length, sequence.adapter);
            sequence.own.make_room(layout, 1);
            segments.push((sequence.prompt, sequence.own));
        }
        let access = Mutex::new(CacheAccess::Tokens(segments));
        self.cached_pass(row, RowCache { layout, access }, Vec::new(), yield_point)
    }

    /// Runs a row whose attention reads or writes a cache, and returns the logits of the token
    /// after each segment. The readers of the first segments get the logits of their tokens.
    fn cached_pass(
        &self,
        row: RowBuilder,
        cache: RowCache,
        readers: Vec<Option<LogitsReader>>,
        yield_point: &mut dyn FnMut(),
    ) -> Result<Buffer> {
        if self.adapter.is_some() {
            bail!("a pass with a cache takes the adapters of its sequences, not the policy's own");
        }
        let ComputeDevice::Cpu = &self.device else {
            bail!("generation is not implemented on a GPU so far: serve the model with device cpu");
        };
        let RowBuilder {
            ids,
            layout,
            positions,
            adapters,
        } = row;
        let last_tokens = layout.segments.iter().map(|s| s.tokens.end as u32 - 1);
        let row = Arc::new(Row {
            ids,
            predictors: last_tokens.collect(),
            layout: Arc::new(layout),
            targets: Arc::default(),
        });
        self.check_ids(&row)?;
        let prepared = PreparedRow {
            adapters,
            ..PreparedRow::new(row, self.ropes(&positions))
        };
        let opened = CpuRow::new(self.view(), &prepared).with_cache(&cache);
        let x = pass::hidden(&opened, yield_point)?;
        for (segment, reader) in prepared.row.layout.segments.iter().zip(readers) {
            if let Some(reader) = reader {
                read_logits(&opened, &x, &segment.tokens, reader)?;
            }
        }
        let logits = opened.logits(&x)?;
        let counts = positions.iter().map(|(_, tokens, _)| *tokens);
        match cache.access.into_inner() {
            Ok(CacheAccess::Prompts(segments)) => segments
                .into_iter()
                .zip(counts)
                .for_each(|(segment, count)| segment.complete(count)),
            Ok(CacheAccess::Tokens(sequences)) => {
                sequences.into_iter().for_each(|(_, own)| own.complete(1))
            }
            Err(_) => bail!("an earlier step of the pass panicked"),
        }
        Ok(logits)
    }

    fn log_probs_of(&self, row: PreparedRow, yield_point: &mut dyn FnMut()) -> Result<Vec<f32>> {
        match &self.device {
            ComputeDevice::Cpu => pass::log_probs(&CpuRow::new(self.view(), &row), yield_point),
            ComputeDevice::Cuda(cuda) => cuda.log_probs(self.view(), &row, yield_point),
        }
    }
}

/// Passes the logits of a prompt's tokens to their reader. `tokens` are the prompt's places in the
/// row.
fn read_logits(
    row: &CpuRow,
    x: &Buffer,
    tokens: &Range<usize>,
    mut reader: LogitsReader,
) -> Result<()> {
    // The last token predicts the first one after the prompt.
    let predictors: Vec<u32> = tokens
        .clone()
        .skip(1)
        .map(|place| place as u32 - 1)
        .collect();
    let mut next = 1;
    for some in predictors.chunks(LOGIT_ROWS) {
        reader(next, &row.logits_after(x, some)?)?;
        next += some.len();
    }
    Ok(())
}

/// Positions of a segment: the first one, their number, and the length of the longest sequence that
/// the segment is part of.
type Positions = (usize, usize, usize);

/// Computes the rotary tables of a row. The frequencies of a sequence may depend on its length. All
/// sequences of a prompt must have the same frequencies; the packer places others with a copy of
/// the prompt.
fn row_rope(rope: &RopeConfig, head_dim: usize, segments: &[Positions]) -> RowRope {
    let mut frequencies: HashMap<usize, Vec<f32>> = HashMap::new();
    for (_, _, length) in segments {
        let inv_freq = || rope.inv_freq_at(head_dim, *length).0;
        let class = rope.length_class(*length);
        frequencies.entry(class).or_insert_with(inv_freq);
    }
    let ranges = segments.iter().map(|(first, tokens, length)| {
        let positions = *first as u32..(first + tokens) as u32;
        let class = rope.length_class(*length);
        (positions, frequencies[&class].as_slice())
    });
    let (_, factor) = rope.inv_freq(head_dim);
    let table = RopeTable::new(ranges, factor, rope.pairs);
    let queries = rope.query_scaling.map(|scaling| {
        let positions = segments
            .iter()
            .flat_map(|(first, tokens, _)| *first as u32..(first + tokens) as u32);
        let factors: Vec<f32> = positions.map(|p| scaling.factor(p)).collect();
        table.scaled(&factors)
    });
    RowRope { table, queries }
}
