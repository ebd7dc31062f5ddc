//! Scores the rows of a fold by its adapter.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::folder::{FoldResult, FoldScore, ScoreWriter};
use super::index::RowIndex;
use crate::cli::data::DataFiles;
use crate::cli::failure::Failure;
use crate::cli::progress::WorkProgress;
use crate::cli::score::pair as to_message;
use crate::cli::score_files::batch::score_pairs;
use crate::cli::score_files::fleet::Fleet;
use crate::domain::dataset::PreferenceRow;
use crate::rpc::pb;

/// Number of pairs with which a batch is full.
const BATCH_PAIRS: usize = 32;
/// Bytes of text with which a batch is full.
const BATCH_BYTES: usize = 1 << 20;
/// Maximum number of batches that are read ahead.
const MAX_WAITING: usize = 2;

/// Rows with their pairs.
type RowBatch = Vec<(u64, Vec<PreferenceRow>)>;

/// Scores the rows of `fold` with a checkpoint and writes the scores.
///
/// # Errors
/// Returns a failure if a file cannot be read or written, or the server does not score.
pub(super) async fn score_fold(
    fleet: &Fleet,
    policy: &str,
    (data, index): (&DataFiles, &Arc<RowIndex>),
    fold: u32,
    (mut writer, progress): (ScoreWriter, &WorkProgress),
) -> Result<(), Failure> {
    let (sender, mut batches) = mpsc::channel(MAX_WAITING);
    let (data, index) = (data.clone(), Arc::clone(index));
    let reading = tokio::task::spawn_blocking(move || read(&data, &index, fold, &sender));
    let mut done = 0;
    while let Some(batch) = batches.recv().await {
        let pairs = batch.iter().flat_map(|(_, pairs)| pairs);
        let pairs: Vec<pb::Pair> = pairs
            .enumerate()
            .map(|(i, pair)| to_message(i.to_string(), pair))
            .collect();
        let request = pb::ScorePairsRequest {
            options: Some(pb::ScoringOptions {
                policy: policy.to_owned(),
                ..Default::default()
            }),
            pairs,
        };
        let mut results = score_pairs(fleet, request).await?.into_iter();
        for (row, pairs) in &batch {
            let own: Vec<_> = pairs.iter().zip(results.by_ref()).collect();
            writer.add(&FoldScore {
                row: *row,
                result: lowest(own),
            })?;
            done += 1;
        }
        progress.set(done);
    }
    reading
        .await
        .map_err(|e| Failure::Failed(format!("the rows cannot be read: {e}")))??;
    writer.finish()
}

/// Returns the result of the pair with the lowest margin, or the first error of a pair.
fn lowest(pairs: Vec<(&PreferenceRow, Result<pb::PairScore, String>)>) -> FoldResult {
    let mut found: Option<(pb::PairScore, Option<u32>)> = None;
    for (pair, result) in pairs {
        let score = match result {
            Ok(score) if score.margin.is_finite() => score,
            Ok(score) => {
                let error = format!("the margin is {}", score.margin);
                return FoldResult::Failed { error };
            }
            Err(error) => return FoldResult::Failed { error },
        };
        let is_lowest = found
            .as_ref()
            .is_none_or(|(lowest, _)| score.margin < lowest.margin);
        if is_lowest {
            found = Some((score, pair.pair));
        }
    }
    match found {
        Some((score, pair)) => FoldResult::Scored {
            probability: score.probability,
            margin: score.margin,
            calibrated_probability: score.calibrated_probability,
            pair,
        },
        None => FoldResult::Failed {
            error: "the row has no pair".to_owned(),
        },
    }
}

/// Reads the rows of a fold and sends them in batches, until the scoring ends.
fn read(
    data: &DataFiles,
    index: &RowIndex,
    fold: u32,
    sender: &mpsc::Sender<RowBatch>,
) -> Result<(), Failure> {
    let (mut batch, mut pairs, mut bytes) = (RowBatch::new(), 0, 0);
    for (record, row) in data.records().zip(&index.rows) {
        let record = record?;
        if !row.is_scored_by(fold) {
            continue;
        }
        let of_row = record.pairs.unwrap_or_default();
        let text = |pair: &PreferenceRow| {
            pair.prompt.bytes() + pair.chosen.bytes() + pair.rejected.bytes()
        };
        pairs += of_row.len();
        bytes += of_row.iter().map(text).sum::<usize>();
        batch.push((record.row, of_row));
        if pairs >= BATCH_PAIRS || bytes >= BATCH_BYTES {
            if sender.blocking_send(std::mem::take(&mut batch)).is_err() {
                return Ok(());
            }
            (pairs, bytes) = (0, 0);
        }
    }
    if !batch.is_empty() {
        let _ = sender.blocking_send(batch);
    }
    Ok(())
}
