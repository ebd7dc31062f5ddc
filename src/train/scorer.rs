//! Scores sequence groups: per-token log-probs of every completion.
//!
//! Items share rows, and prompts within a row, but an item's numbers do not depend on what else is scored. The trainer's reference log-probs come from
//! here too, so that a cached value is the value that would be computed.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

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

    /// The log-probs of every item under `reference`, whose weights `identity` names for good; what is missing is computed together.
    pub fn score(&mut self, reference: &Policy, identity: &str, items: &[&[SequenceGroup]], row_tokens: usize) -> Result<Vec<Arc<Logps>>> {
        let identity = format!("{identity}@{:?}", reference.precision);
        let keys: Vec<[u8; 32]> = items.iter().map(|groups| key(&identity, groups)).collect();
        let mut found: Vec<Option<Arc<Logps>>> = keys.iter().map(|k| self.entries.get(k).cloned()).collect();
        let missing: Vec<usize> = (0..items.len()).filter(|i| found[*i].is_none()).collect();
        metrics::counter!("bradley_reference_cache_hits_total").increment((items.len() - missing.len()) as u64);
        metrics::counter!("bradley_reference_cache_misses_total").increment(missing.len() as u64);
        let wanted: Vec<&[SequenceGroup]> = missing.iter().map(|i| items[*i]).collect();
        for (i, logps) in missing.into_iter().zip(score_all(reference, &wanted, row_tokens)?) {
            let logps = Arc::new(logps);
            self.insert(keys[i], logps.clone());
            found[i] = Some(logps);
        }
        Ok(found.into_iter().flatten().collect())
    }

    fn insert(&mut self, key: [u8; 32], logps: Arc<Logps>) {
        let size = logps.iter().map(Vec::len).sum::<usize>();
        if size > self.limit || self.entries.contains_key(&key) {
            return;
        }
        while self.tokens + size > self.limit {
            let Some(oldest) = self.order.pop_front() else { break };
            if let Some(gone) = self.entries.remove(&oldest) {
                self.tokens -= gone.iter().map(Vec::len).sum::<usize>();
            }
        }
        self.tokens += size;
        self.entries.insert(key, logps);
        self.order.push_back(key);
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
