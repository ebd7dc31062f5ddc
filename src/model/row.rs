//! Packed rows in the form that a pass takes.

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
    /// The segments of the row: they define the tokens that each token attends to.
    pub layout: Arc<RowLayout>,
    /// For each completion token, the index in the row of the token that predicts it `[N]`.
    pub predictors: Vec<u32>,
    /// Ids of the completion tokens `[N]`, in the order of `predictors`.
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
