//! Scores sequence groups: per-token log-probs of every completion.
//!
//! Items share rows, and prompts within a row, but an item's numbers do not depend on what else is scored. The trainer's reference log-probs come from
//! here too, so that a cached value is the value that would be computed.

use candle_core::Result;

use super::pack::pack_rows;
use super::pair::SequenceGroup;
use crate::model::decoder::Policy;

/// Per completion, the log-prob of each of its tokens.
pub type Logps = Vec<Vec<f32>>;

/// Scores one item without a tape.
pub fn score(policy: &Policy, groups: &[SequenceGroup]) -> Result<Logps> {
    Ok(score_all(policy, &[groups], usize::MAX)?.pop().unwrap_or_default())
}

/// Scores items together in rows of about `row_tokens` tokens.
pub fn score_all(policy: &Policy, items: &[&[SequenceGroup]], row_tokens: usize) -> Result<Vec<Logps>> {
    let mut all = vec![Logps::new(); items.len()];
    for packed in pack_rows(items, row_tokens) {
        let logps = policy.log_probs(packed.row.clone())?;
        for (&item, ranges) in packed.items.iter().zip(&packed.completions) {
            all[item] = ranges.iter().map(|r| logps[r.clone()].to_vec()).collect();
        }
    }
    Ok(all)
}
