//! Reads an uploaded file as pairs with labels.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::labels::{RowLabels, labelled};
use super::reader::DataError;
use super::{jsonl, sandbox};
use crate::domain::dataset::{DatasetFormat, PreferenceRow, RowIssue};

/// A pair with the labels of its row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LabelledPair {
    /// The row's values in the columns that were asked for.
    pub labels: RowLabels,
    /// The pair, or the finding that it cannot be read.
    pub pair: Result<PreferenceRow, RowIssue>,
}

/// Calls `each` with every pair of an uploaded file and the row's values in `columns`. A Parquet
/// file is decoded by another process; until its end no other file is decoded, so that `each` must
/// not wait for long.
///
/// # Errors
/// Fails if the file cannot be read. Returns errors of `each`.
pub fn for_each_pair(
    path: &Path,
    format: DatasetFormat,
    columns: &[String],
    mut each: impl FnMut(LabelledPair) -> Result<(), DataError>,
) -> Result<(), DataError> {
    match format {
        DatasetFormat::Jsonl => {
            for (labels, pair) in labelled(jsonl::records(path)?, columns) {
                let labels = RowLabels::clone(&labels);
                each(LabelledPair { labels, pair })?;
            }
            Ok(())
        }
        DatasetFormat::Parquet => sandbox::for_each_decoded(path, columns, |labels, pair| {
            let labels = labels.clone();
            each(LabelledPair { labels, pair })
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn pairs_have_the_labels_of_their_rows() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let rows = concat!(
            r#"{"prompt": "p", "chosen": "a", "rejected": ["b", "c"], "subset": "x", "n": 1}"#,
            "\n[]\n",
            r#"{"prompt": "p", "chosen": "a", "rejected": "b", "subset": null, "score": 2}"#,
        );
        std::fs::write(file.path(), rows).unwrap();
        let columns = ["subset".to_owned(), "score".to_owned()];
        let mut seen = Vec::new();
        for_each_pair(file.path(), DatasetFormat::Jsonl, &columns, |pair| {
            let row = pair.pair.as_ref().map_or_else(|i| i.row, |row| row.row);
            seen.push((row, pair.pair.is_ok(), Value::Object(pair.labels)));
            Ok(())
        })
        .unwrap();
        let label = |name: &str, value: Value| serde_json::json!({ name: value });
        assert_eq!(
            seen,
            [
                (1, true, label("subset", "x".into())),
                (1, true, label("subset", "x".into())),
                (2, false, serde_json::json!({})),
                (3, true, label("score", 2.into())),
            ]
        );
    }
}
