//! Labels of rows: values of columns that are no part of a pair, such as the name of a subset or a
//! score that somebody has given.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::shapes::{self, Record};
use crate::domain::dataset::{PreferenceRow, RowIssue};

/// Values of a row by column. A column that the row lacks, or whose value is null, is absent.
pub type RowLabels = Map<String, Value>;

/// Returns the pairs of records with the labels of their rows.
pub(super) fn labelled(
    records: impl Iterator<Item = Record>,
    columns: &[String],
) -> impl Iterator<Item = (Arc<RowLabels>, Result<PreferenceRow, RowIssue>)> {
    records.flat_map(move |record| {
        let labels = match &record {
            Ok((_, fields)) => columns
                .iter()
                .filter_map(|column| Some((column.clone(), fields.get(column)?.clone())))
                .filter(|(_, value)| !value.is_null())
                .collect(),
            Err(_) => RowLabels::new(),
        };
        let labels = Arc::new(labels);
        shapes::pairs(record).map(move |pair| (Arc::clone(&labels), pair))
    })
}
