//! Scores sequence groups: computes the log-prob of every completion token.
//!
//! Items share rows, and prompts within a row, but an item's results do not depend on the other
//! items, except in the last bits on a GPU ([`super::pack`]). The trainer's reference log-probs are
//! computed here, too, so that a cached value equals the value that would be computed: on the CPU
//! bit for bit.

use candle_core::Result;

use super::data_parallel::over_devices;
use super::pack::{Owned, PackedRow, pack_owned_rows, pack_rows_for_devices};
use super::pair::SequenceGroup;
use crate::model::decoder::Policy;

/// For each completion, the log-prob of each of its tokens, in nats.
pub type Logps = Vec<Vec<f32>>;

/// Scores one item in a row of its own.
///
/// # Errors
/// Fails if the device fails or has no memory left, as do the other functions of this file.
pub fn score(policy: &Policy, groups: &[SequenceGroup]) -> Result<Logps> {
    Ok(score_all(policy, &[groups], usize::MAX, &mut || {})?
        .pop()
        .unwrap_or_default())
}

/// Scores items together in rows of at most `row_tokens` tokens, on all devices of the policy. A
/// longer item gets a row of its own. `yield_point` is called before every block of the rows that
/// run on the policy's own device.
pub fn score_all(
    policy: &Policy,
    items: &[&[SequenceGroup]],
    row_tokens: usize,
    yield_point: &mut dyn FnMut(),
) -> Result<Vec<Logps>> {
    let mut all = vec![Logps::new(); items.len()];
    let class = |length| policy.config.spec.length_class(length);
    let rows = pack_rows_for_devices(items, row_tokens, policy.devices().count(), &class);
    let pass = |policy: &Policy, packed: &PackedRow, yield_point: &mut dyn FnMut()| {
        policy.log_probs(packed.row.clone(), yield_point)
    };
    for (packed, logps) in rows.iter().zip(over_devices(
        policy,
        rows.iter().collect(),
        yield_point,
        pass,
    )?) {
        assign_log_probs(packed, &logps, &mut all);
    }
    Ok(all)
}

/// Scores items of several policies that share their base weights. Each item's owner is an index in
/// `policies`. Items of different policies share rows, but not prompts.
pub fn score_shared(
    policies: &[Policy],
    items: &[Owned],
    row_tokens: usize,
    yield_point: &mut dyn FnMut(),
) -> Result<Vec<Logps>> {
    let Some(base) = policies.first().map(Policy::base) else {
        return Ok(Vec::new());
    };
    let mut all = vec![Logps::new(); items.len()];
    let class = |length| base.config.spec.length_class(length);
    for packed in pack_owned_rows(items, row_tokens, &class) {
        let adapters = packed.owners.iter().filter_map(|(tokens, owner)| {
            Some((tokens.clone(), policies[*owner].adapter.clone()?))
        });
        let logps = base.log_probs_with(packed.row.clone(), adapters.collect(), yield_point)?;
        assign_log_probs(&packed, &logps, &mut all);
    }
    Ok(all)
}

/// Writes the log-probs of a row to the entries of its items in `all`.
fn assign_log_probs(packed: &PackedRow, logps: &[f32], all: &mut [Logps]) {
    for (&item, ranges) in packed.items.iter().zip(&packed.completions) {
        all[item] = ranges.iter().map(|r| logps[r.clone()].to_vec()).collect();
    }
}
