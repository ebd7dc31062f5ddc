//! Packed rows as a pass takes them.

use std::ops::Range;
use std::sync::Arc;

use super::adapter::Adapter;
use crate::compute::cpu::rope::RopeTable;
use crate::compute::layout::RowLayout;

/// A packed row, ready for the decoder.
#[derive(Clone, Debug)]
pub struct Row {
    /// Token ids `[T]`.
    pub ids: Vec<u32>,
    /// Which tokens see which.
    pub layout: Arc<RowLayout>,
    /// For each completion token, the row index that predicts it.
    pub predictors: Vec<u32>,
    /// The completion tokens `[N]`, in the order of `predictors`.
    pub targets: Arc<Vec<u32>>,
}

/// A row with its rotary tables, which depend on the model.
#[derive(Clone, Debug)]
pub struct PreparedRow {
    pub(super) row: Arc<Row>,
    /// In the order of the model's rotary frequencies.
    pub(super) ropes: Vec<RopeTable>,
    /// Adapters on parts of the row, besides the policy's own; only for passes without a tape.
    pub(super) adapters: Vec<(Range<usize>, Arc<Adapter>)>,
}

impl PreparedRow {
    /// Returns a row on which no part has an adapter of its own.
    pub(super) fn new(row: Arc<Row>, ropes: Vec<RopeTable>) -> Self {
        PreparedRow { row, ropes, adapters: Vec::new() }
    }

    /// Returns the row as it was packed.
    pub fn row(&self) -> &Arc<Row> {
        &self.row
    }

    /// Returns the number of its tokens, T.
    pub fn tokens(&self) -> usize {
        self.row.ids.len()
    }
}
