//! Scores sequence groups: per-token log-probs of every completion.
//!
//! Items share rows, and prompts within a row, but an item's numbers do not depend on what else is
//! scored. The trainer's reference log-probs come from here too, so that a cached value is the
//! value that would be computed.

use candle_core::Result;

use super::data_parallel::over_devices;
use super::pack::{Owned, PackedRow, pack_owned_rows, pack_rows_for_devices};
use super::pair::SequenceGroup;
use crate::model::decoder::Policy;

/// Per completion, the log-prob of each of its tokens.
pub type Logps = Vec<Vec<f32>>;

/// Scores one item without a tape.
pub fn score(policy: &Policy, groups: &[SequenceGroup]) -> Result<Logps> {
    Ok(score_all(policy, &[groups], usize::MAX, &mut || {})?.pop().unwrap_or_default())
}

/// Scores items together in rows of about `row_tokens` tokens, on all devices of the policy.
/// `pause` is called before every block of the rows of its own.
pub fn score_all(
    policy: &Policy,
    items: &[&[SequenceGroup]],
    row_tokens: usize,
    pause: &mut dyn FnMut(),
) -> Result<Vec<Logps>> {
    let mut all = vec![Logps::new(); items.len()];
    let rows = pack_rows_for_devices(items, row_tokens, policy.devices().count());
    let pass = |policy: &Policy, packed: &PackedRow, pause: &mut dyn FnMut()| {
        policy.log_probs(packed.row.clone(), pause)
    };
    for (packed, logps) in
        rows.iter().zip(over_devices(policy, rows.iter().collect(), pause, pass)?)
    {
        spread(packed, &logps, &mut all);
    }
    Ok(all)
}

/// Scores items of several policies that share their base weights: `items` says which of `policies`
/// each is for. They share rows, not prompts.
pub fn score_shared(
    policies: &[Policy],
    items: &[Owned],
    row_tokens: usize,
    pause: &mut dyn FnMut(),
) -> Result<Vec<Logps>> {
    let Some(base) = policies.first().map(Policy::base) else { return Ok(Vec::new()) };
    let mut all = vec![Logps::new(); items.len()];
    for packed in pack_owned_rows(items, row_tokens) {
        let adapters = packed.owners.iter().filter_map(|(tokens, owner)| {
            Some((tokens.clone(), policies[*owner].adapter.clone()?))
        });
        let logps = base.log_probs_with(packed.row.clone(), adapters.collect(), pause)?;
        spread(&packed, &logps, &mut all);
    }
    Ok(all)
}

/// Gives every item of a row its log-probs.
fn spread(packed: &PackedRow, logps: &[f32], all: &mut [Logps]) {
    for (&item, ranges) in packed.items.iter().zip(&packed.completions) {
        all[item] = ranges.iter().map(|r| logps[r.clone()].to_vec()).collect();
    }
}
