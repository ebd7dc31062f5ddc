//! Scores sequence groups: per-token log-probs of every completion.
//!
//! One item is one row, always packed the same way, so that its numbers do not depend on what else is scored. The trainer's reference log-probs
//! come from here too, so that a cached value is the value that would be computed.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use candle_core::Result;

use super::pack::pack;
use super::pair::SequenceGroup;
use crate::model::decoder::Policy;

/// Per completion, the log-prob of each of its tokens.
pub type Logps = Vec<Vec<f32>>;

/// Scores one item without a tape.
pub fn score(policy: &Policy, groups: &[SequenceGroup]) -> Result<Logps> {
    let packed = pack(groups);
    let logps = policy.log_probs(packed.row.clone())?;
    Ok(packed.completions.iter().map(|r| logps[r.clone()].to_vec()).collect())
}

/// Reference log-probs by content: they never change, so a second epoch or a repeated request costs the policy only.
/// Bounded by tokens; the oldest entries leave first.
#[derive(Debug)]
pub struct ReferenceCache {
    limit: usize,
    tokens: usize,
    entries: HashMap<[u8; 32], Arc<Logps>>,
    order: VecDeque<[u8; 32]>,
}

impl ReferenceCache {
    /// A cache for `limit` completion tokens.
    pub fn new(limit: usize) -> Self {
        ReferenceCache { limit, tokens: 0, entries: HashMap::new(), order: VecDeque::new() }
    }

    /// The log-probs of `groups` under `reference`, whose weights `identity` names for good.
    pub fn score(&mut self, reference: &Policy, identity: &str, groups: &[SequenceGroup]) -> Result<Arc<Logps>> {
        let key = key(identity, groups);
        if let Some(hit) = self.entries.get(&key) {
            metrics::counter!("bradley_reference_cache_hits_total").increment(1);
            return Ok(hit.clone());
        }
        metrics::counter!("bradley_reference_cache_misses_total").increment(1);
        let logps = Arc::new(score(reference, groups)?);
        let size = logps.iter().map(Vec::len).sum::<usize>();
        if size <= self.limit {
            while self.tokens + size > self.limit {
                let Some(oldest) = self.order.pop_front() else { break };
                if let Some(gone) = self.entries.remove(&oldest) {
                    self.tokens -= gone.iter().map(Vec::len).sum::<usize>();
                }
            }
            self.tokens += size;
            self.entries.insert(key, logps.clone());
            self.order.push_back(key);
        }
        Ok(logps)
    }
}

/// Lengths are hashed with the ids, so that no two different items give the same bytes.
fn key(identity: &str, groups: &[SequenceGroup]) -> [u8; 32] {
    let mut hash = blake3::Hasher::new();
    let mut add = |ids: &[u32]| {
        hash.update(&(ids.len() as u64).to_le_bytes());
        for id in ids {
            hash.update(&id.to_le_bytes());
        }
    };
    add(&identity.bytes().map(u32::from).collect::<Vec<_>>());
    for g in groups {
        add(&[g.completions.len() as u32]);
        add(&g.prompt);
        g.completions.iter().for_each(|c| add(c));
    }
    *hash.finalize().as_bytes()
}
