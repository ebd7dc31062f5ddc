//! Scores the rows of a fold by its adapter.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::folder::{FoldResult, FoldScore, ScoreWriter};
use super::index::RowIndex;
use crate::cli::data::DataFiles;
use crate::cli::failure::Failure;
use crate::cli::progress::WorkProgress;
use crate::cli::score::pair as to_message;
use crate::domain::dataset::PreferenceRow;
use crate::rpc::client::{Client, ClientError, Code, blames_arguments, is_transient};
use crate::rpc::pb::{self, pair_result};

/// Number of pairs with which a batch is full.
const BATCH_PAIRS: usize = 32;
/// Bytes of text with which a batch is full.
const BATCH_BYTES: usize = 1 << 20;
/// Maximum number of batches that are read ahead.
const MAX_WAITING: usize = 2;
/// Maximum number of times that a batch is sent.
const MAX_TRIES: u32 = 30;
/// Number of times that a batch is sent until an internal error of the server is a pair's own. A
/// pair that always causes one must not stop the others.
const MAX_INTERNAL: u32 = 3;

/// Rows with their pairs.
type RowBatch = Vec<(u64, Vec<PreferenceRow>)>;

/// Scores the rows of `fold` with a checkpoint and writes the scores.
///
/// # Errors
/// Returns a failure if a file cannot be read or written, or the server does not score.
pub(super) async fn score_fold(
    client: &Client,
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
        let mut results = score(client, policy, pairs).await?.into_iter();
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
    let mut found: Option<(f64, f64, Option<u32>)> = None;
    for (pair, result) in pairs {
        let score = match result {
            Ok(score) if score.margin.is_finite() => score,
            Ok(score) => {
                let error = format!("the margin is {}", score.margin);
                return FoldResult::Failed { error };
            }
            Err(error) => return FoldResult::Failed { error },
        };
        if found.is_none_or(|(_, margin, _)| score.margin < margin) {
            found = Some((score.probability, score.margin, pair.pair));
        }
    }
    match found {
        Some((probability, margin, pair)) => FoldResult::Scored {
            probability,
            margin,
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

/// Scores a batch, which is sent again if the server was busy or is restarted. The result of a pair
/// is an error only if the pair itself is the reason.
async fn score(
    client: &Client,
    policy: &str,
    pairs: Vec<pb::Pair>,
) -> Result<Vec<Result<pb::PairScore, String>>, Failure> {
    let request = pb::ScorePairsRequest {
        options: Some(pb::ScoringOptions {
            policy: policy.to_owned(),
            ..Default::default()
        }),
        pairs,
    };
    let mut tries = 0;
    loop {
        tries += 1;
        let (code, failure) = match client.scoring().score_pairs(request.clone()).await {
            Ok(answer) => {
                let results = answer.into_inner().results;
                match results_of(results, request.pairs.len(), tries) {
                    Ok(scores) => return Ok(scores),
                    Err((code, reason)) => (code, Failure::Failed(reason)),
                }
            }
            Err(status) => (status.code() as i32, ClientError::from(status).into()),
        };
        if !is_transient(Code::from_i32(code)) || tries >= MAX_TRIES {
            return Err(failure);
        }
        tokio::time::sleep(Duration::from_millis(200 * u64::from(tries.min(25)))).await;
    }
}

/// Returns the results of a batch that was sent `tries` times, or the code and message of an error
/// that is not the fault of its pair.
fn results_of(
    results: Vec<pb::PairResult>,
    expected: usize,
    tries: u32,
) -> Result<Vec<Result<pb::PairScore, String>>, (i32, String)> {
    let incomplete = || (0, "the server did not answer every pair".to_owned());
    if results.len() != expected {
        return Err(incomplete());
    }
    let is_own = |code: i32| {
        let is_internal = Code::from_i32(code) == Code::Internal;
        blames_arguments(code) || (is_internal && tries >= MAX_INTERNAL)
    };
    let one = |result: pb::PairResult| match result.result {
        Some(pair_result::Result::Score(score)) => Ok(Ok(score)),
        Some(pair_result::Result::Error(e)) if is_own(e.code) => Ok(Err(e.message)),
        Some(pair_result::Result::Error(e)) => Err((e.code, e.message)),
        None => Err(incomplete()),
    };
    results.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lasting_internal_error_is_the_pairs_own() {
        let failed = |code: Code| {
            let mut result = pair_result::Result::Error(Default::default());
            if let pair_result::Result::Error(error) = &mut result {
                error.code = code as i32;
            }
            vec![pb::PairResult {
                result: Some(result),
                ..Default::default()
            }]
        };
        let own = |code, tries| results_of(failed(code), 1, tries).is_ok();
        assert!(own(Code::InvalidArgument, 1));
        assert!(!own(Code::Internal, 1) && own(Code::Internal, MAX_INTERNAL));
        assert!(!own(Code::Unavailable, MAX_TRIES));
        assert!(results_of(Vec::new(), 1, MAX_TRIES).is_err());
    }
}
