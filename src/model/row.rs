//! Packed rows in the form that a pass takes.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::adapter::Adapter;
use crate::compute::cpu::attention::{CacheLayout, CachedKeys, CachedSegment, attention_cached};
use crate::compute::cpu::rope::RopeTable;
use crate::compute::cpu::thread_pool;
use crate::compute::layout::RowLayout;

/// Number of sequences whose new keys and values one task stores. For fewer, starting threads takes
/// longer than storing them.
const STORED_PER_TASK: usize = 8;

/// A packed row, ready for the decoder.
#[derive(Clone, Debug)]
pub struct Row {
    /// Token ids `[T]`.
    pub ids: Vec<u32>,
    /// The segments of the row: they define the tokens that each token attends to.
    pub layout: Arc<RowLayout>,
    /// For each completion token, the index in the row of the token that predicts it `[N]`. In a
    /// pass with a cache: the index of the last token of each segment.
    pub predictors: Vec<u32>,
    /// Ids of the completion tokens `[N]`, in the order of `predictors`. Empty in a pass with a
    /// cache.
    pub targets: Arc<Vec<u32>>,
}

/// The tables of one set of rotary frequencies.
#[derive(Clone, Debug)]
pub struct RowRope {
    /// The table that rotates the keys, and also the queries unless `queries` is set.
    pub(super) table: RopeTable,
    /// The table of the queries if these have factors that depend on the position.
    pub(super) queries: Option<RopeTable>,
}

/// A row with its rotary tables. The tables depend on the model.
#[derive(Clone, Debug)]
pub struct PreparedRow {
    pub(super) row: Arc<Row>,
    /// Rotary tables in the order of [`super::spec::ModelSpec::ropes`].
    pub(super) ropes: Vec<RowRope>,
    /// Adapters on parts of the row, for a policy without an adapter of its own. Only passes
    /// without a tape may have them.
    pub(super) adapters: Vec<(Range<usize>, Arc<Adapter>)>,
}

/// Keys and values that the attention of a pass reads or fills, besides those of the row itself.
pub enum CacheAccess<'a> {
    /// The row has whole prompts, one segment each. Their keys and values are stored here.
    Prompts(Vec<&'a mut CachedSegment>),
    /// The row has one token of each sequence. It attends to the prompt and to the own segment, and
    /// its keys and values are added to the own segment.
    Tokens(Vec<(&'a CachedSegment, &'a mut CachedSegment)>),
}

/// Keys and values that a pass reads or writes besides those of its row.
pub trait KeyCache {
    /// Stores the keys and values of the row's tokens in decoder block `block`. If the row has one
    /// token of each sequence, also computes their attention into `output` and returns true. `qkv`
    /// is what attention reads.
    fn attend(&self, block: usize, row: &Row, qkv: &[f32], output: &mut [f32]) -> bool;
}

impl KeyCache for RowCache<'_> {
    fn attend(&self, block: usize, row: &Row, qkv: &[f32], output: &mut [f32]) -> bool {
        let (layout, width) = (self.layout, self.layout.row(block));
        match &mut *self.access.lock().unwrap_or_else(PoisonError::into_inner) {
            CacheAccess::Prompts(segments) => {
                let places = row.layout.segments.iter().map(|s| &s.tokens);
                for (segment, tokens) in segments.iter_mut().zip(places) {
                    let rows = &qkv[tokens.start * width..tokens.end * width];
                    segment.store(layout, block, rows, tokens.len());
                }
                false
            }
            CacheAccess::Tokens(sequences) => {
                thread_pool::chunks(sequences, STORED_PER_TASK, |i, some| {
                    let rows = qkv.chunks(width).skip(i * STORED_PER_TASK);
                    for ((_, own), rows) in some.iter_mut().zip(rows) {
                        own.store(layout, block, rows, 1);
                    }
                });
                let keys: Vec<CachedKeys> = sequences
                    .iter()
                    .map(|(prefix, own)| CachedKeys { prefix, own })
                    .collect();
                attention_cached(layout, block, qkv, &keys, output);
                true
            }
        }
    }
}

/// The cached keys and values of a row's sequences, for a pass that reads or writes them.
pub struct RowCache<'a> {
    /// Form of the blocks.
    pub(super) layout: &'a CacheLayout,
    /// The segments. The pass runs the blocks one after the other, so the lock is never contended.
    pub(super) access: Mutex<CacheAccess<'a>>,
}

impl PreparedRow {
    /// Returns a row without adapters on parts of it.
    pub(super) fn new(row: Arc<Row>, ropes: Vec<RowRope>) -> Self {
        PreparedRow {
            row,
            ropes,
            adapters: Vec::new(),
        }
    }

    /// Returns the packed row.
    pub fn row(&self) -> &Arc<Row> {
        &self.row
    }

    /// Returns T, the number of tokens in the row.
    pub fn tokens(&self) -> usize {
        self.row.ids.len()
    }
}
