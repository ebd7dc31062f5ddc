//! Cache of the reference model's log-probs, in memory and on disk. The key is a hash of the
//! content: the reference's identity and the token ids.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::Result;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use super::pair::SequenceGroup;
use super::scorer::{Logps, score_all};
use crate::model::decoder::Policy;

/// Version of the kernels' order of operations. Increase it when that order changes: results then
/// differ in the last bits, and older entries must not be found any more.
const NUMERICS_VERSION: u32 = 1;
/// A write to the cache file is synced to disk if the last sync is longer ago than this. A crash
/// thus loses at most the entries written during this time after a sync; they are computed again.
const SYNC_INTERVAL: Duration = Duration::from_secs(2);

/// Cache of reference log-probs, keyed by content. The log-probs of a fixed model never change, so
/// a second epoch or a repeated request runs only the policy.
///
/// On a GPU the last bits of a log-prob depend on the row in which it was computed. A run's numbers
/// may therefore depend, in the last bits, on what the cache already holds.
///
/// The cache is bounded by its number of completion tokens, in memory and on disk alike. The oldest
/// entries are evicted first. All device workers share it, and the lock is never held during a
/// pass.
#[derive(Debug)]
pub struct ReferenceCache(Mutex<CacheState>);

#[derive(Debug)]
struct CacheState {
    /// Maximum number of completion tokens in memory.
    limit: usize,
    /// Number of completion tokens in memory.
    tokens: usize,
    entries: HashMap<[u8; 32], Arc<Logps>>,
    /// Keys of `entries`, oldest first.
    order: VecDeque<[u8; 32]>,
    disk: Option<CacheFile>,
}

impl ReferenceCache {
    /// Makes a cache of at most `limit` completion tokens, in memory only.
    pub fn new(limit: usize) -> Self {
        Self::with_disk(limit, None)
    }

    /// Makes a cache that is also stored in the file `path`, so that it survives restarts. If the
    /// file cannot be used, the cache logs a warning and works in memory only.
    pub fn open(limit: usize, path: &Path) -> Self {
        let disk = CacheFile::open(path, limit as u64).inspect_err(|e| {
            tracing::warn!(
                path = %path.display(),
                error = %e,
                "the file of the reference cache cannot be used: the cache is in memory only and \
                 will not survive a restart"
            );
        });
        Self::with_disk(limit, disk.ok())
    }

    fn with_disk(limit: usize, disk: Option<CacheFile>) -> Self {
        ReferenceCache(Mutex::new(CacheState {
            limit,
            tokens: 0,
            entries: HashMap::new(),
            order: VecDeque::new(),
            disk,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, CacheState> {
        // After a panic under the lock, at worst one entry is missing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the log-probs of every item under `reference`. `identity` must identify the weights
    /// of `reference` permanently. The missing items are computed together. `yield_point` is called
    /// before every block and may use the cache.
    ///
    /// # Errors
    /// Fails if the device fails or has no memory left.
    pub fn score(
        &self,
        reference: &Policy,
        identity: &str,
        items: &[&[SequenceGroup]],
        row_tokens: usize,
        yield_point: &mut dyn FnMut(),
    ) -> Result<Vec<Arc<Logps>>> {
        // Kernels round differently, so a value is reused only where the same kernel would compute
        // it.
        let identity = format!("{identity}@{}@{NUMERICS_VERSION}", reference.arithmetic());
        let keys: Vec<[u8; 32]> = items.iter().map(|groups| key(&identity, groups)).collect();
        let mut found: Vec<Option<Arc<Logps>>> = {
            let mut state = self.lock();
            keys.iter().map(|k| state.get(k)).collect()
        };
        let missing: Vec<usize> = (0..items.len()).filter(|i| found[*i].is_none()).collect();
        metrics::counter!("bradley_reference_cache_hits_total")
            .increment((items.len() - missing.len()) as u64);
        metrics::counter!("bradley_reference_cache_misses_total").increment(missing.len() as u64);
        let wanted: Vec<&[SequenceGroup]> = missing.iter().map(|i| items[*i]).collect();
        let mut new = Vec::with_capacity(missing.len());
        for (i, logps) in
            missing
                .into_iter()
                .zip(score_all(reference, &wanted, row_tokens, yield_point)?)
        {
            let logps = Arc::new(logps);
            new.push((keys[i], logps.clone()));
            found[i] = Some(logps);
        }
        self.lock().store(new);
        Ok(found.into_iter().flatten().collect())
    }
}

impl CacheState {
    /// Looks an entry up in memory, then on disk. An entry from disk is also put in memory.
    fn get(&mut self, key: &[u8; 32]) -> Option<Arc<Logps>> {
        if let Some(hit) = self.entries.get(key) {
            return Some(hit.clone());
        }
        let logps = Arc::new(self.disk.as_ref()?.get(key)?);
        self.insert(*key, logps.clone());
        Some(logps)
    }

    /// Stores new entries in memory and on disk. After a failed write the file is no longer used.
    fn store(&mut self, new: Vec<([u8; 32], Arc<Logps>)>) {
        for (key, logps) in &new {
            self.insert(*key, logps.clone());
        }
        if let Some(disk) = &mut self.disk
            && let Err(e) = disk.insert(&new)
        {
            tracing::warn!(
                error = %e,
                "the file of the reference cache cannot be written: it is no longer used"
            );
            self.disk = None;
        }
    }

    /// Puts an entry in memory and evicts the oldest ones to make room. An entry that alone exceeds
    /// the limit is left out.
    fn insert(&mut self, key: [u8; 32], logps: Arc<Logps>) {
        let size = logps.iter().map(Vec::len).sum::<usize>();
        if size > self.limit || self.entries.contains_key(&key) {
            return;
        }
        while self.tokens + size > self.limit {
            let Some(oldest) = self.order.pop_front() else {
                break;
            };
            if let Some(evicted) = self.entries.remove(&oldest) {
                self.tokens -= evicted.iter().map(Vec::len).sum::<usize>();
            }
        }
        self.tokens += size;
        self.entries.insert(key, logps);
        self.order.push_back(key);
    }
}

/// Returns the hash of an item under the reference `identity`. Lengths are hashed with the ids, so
/// that different items never give the same bytes.
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

/// Table of entries: key → (sequence number, log-probs).
const ENTRIES: TableDefinition<&[u8; 32], (u64, &[u8])> = TableDefinition::new("entries");
/// Table of the insertion order: sequence number → (key, number of tokens), oldest first.
const ORDER: TableDefinition<u64, (&[u8; 32], u64)> = TableDefinition::new("order");

/// The part of the cache that is on disk.
#[derive(Debug)]
struct CacheFile {
    database: Database,
    /// Maximum number of completion tokens in the file.
    limit: u64,
    /// Number of completion tokens in the file.
    tokens: u64,
    /// Sequence number of the next entry.
    next_sequence: u64,
    last_sync: Instant,
}

type RedbResult<T> = std::result::Result<T, redb::Error>;

impl CacheFile {
    fn open(path: &Path, limit: u64) -> RedbResult<Self> {
        let database = Database::create(path)?;
        let write = database.begin_write()?;
        let (mut tokens, mut next_sequence) = (0, 0);
        {
            write.open_table(ENTRIES)?;
            for entry in write.open_table(ORDER)?.iter()? {
                let (sequence, value) = entry?;
                tokens += value.value().1;
                next_sequence = sequence.value() + 1;
            }
        }
        write.commit()?;
        Ok(CacheFile {
            database,
            limit,
            tokens,
            next_sequence,
            last_sync: Instant::now(),
        })
    }

    /// Returns the log-probs stored under `key`. Returns `None` if there is no entry or it cannot
    /// be read.
    fn get(&self, key: &[u8; 32]) -> Option<Logps> {
        let read = || -> RedbResult<Option<Logps>> {
            let table = self.database.begin_read()?.open_table(ENTRIES)?;
            Ok(table.get(key)?.and_then(|entry| decode(entry.value().1)))
        };
        read().ok().flatten()
    }

    /// Writes new entries in one transaction and removes the oldest ones until the limit is kept.
    fn insert(&mut self, new: &[([u8; 32], Arc<Logps>)]) -> RedbResult<()> {
        if new.is_empty() {
            return Ok(());
        }
        let mut write = self.database.begin_write()?;
        let sync = self.last_sync.elapsed() > SYNC_INTERVAL;
        // This fails only if savepoints are in use; the cache uses none.
        let _ = write.set_durability(if sync {
            Durability::Immediate
        } else {
            Durability::None
        });
        {
            let (mut entries, mut order) = (write.open_table(ENTRIES)?, write.open_table(ORDER)?);
            for (key, logps) in new {
                if entries.get(key)?.is_some() {
                    continue;
                }
                let tokens = logps.iter().map(Vec::len).sum::<usize>() as u64;
                entries.insert(key, (self.next_sequence, encode(logps).as_slice()))?;
                order.insert(self.next_sequence, (key, tokens))?;
                self.next_sequence += 1;
                self.tokens += tokens;
            }
            while self.tokens > self.limit {
                let Some(oldest) = order.pop_first()? else {
                    break;
                };
                let (key, tokens) = oldest.1.value();
                entries.remove(key)?;
                self.tokens -= tokens;
            }
        }
        write.commit()?;
        if sync {
            self.last_sync = Instant::now();
        }
        Ok(())
    }
}

/// Serialises log-probs: the number of completions, their lengths in tokens (u32), then all values
/// (f32). Everything is little-endian.
fn encode(logps: &Logps) -> Vec<u8> {
    let lengths = std::iter::once(logps.len())
        .chain(logps.iter().map(Vec::len))
        .flat_map(|n| (n as u32).to_le_bytes());
    lengths
        .chain(logps.iter().flatten().flat_map(|x| x.to_le_bytes()))
        .collect()
}

/// Reads the format of [`encode`]. Returns `None` if the bytes are damaged.
fn decode(bytes: &[u8]) -> Option<Logps> {
    let words: Vec<[u8; 4]> = bytes.as_chunks::<4>().0.to_vec();
    let (count, rest) = words.split_first()?;
    let (lengths, mut values) = rest.split_at_checked(u32::from_le_bytes(*count) as usize)?;
    let mut logps = Logps::with_capacity(lengths.len());
    for n in lengths {
        let (these, others) = values.split_at_checked(u32::from_le_bytes(*n) as usize)?;
        logps.push(these.iter().map(|x| f32::from_le_bytes(*x)).collect());
        values = others;
    }
    values.is_empty().then_some(logps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> [u8; 32] {
        [n; 32]
    }

    #[test]
    fn what_was_written_is_read_after_a_restart_bit_for_bit_and_the_oldest_leave() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache.redb");
        let entry = |n: u8| {
            (
                key(n),
                Arc::new(vec![vec![-0.1 * n as f32, f32::MIN_POSITIVE], vec![-3.5]]),
            )
        };
        let mut file = CacheFile::open(&path, 9).unwrap();
        for n in 1..=4 {
            file.insert(&[entry(n)]).unwrap();
        }
        drop(file);
        let file = CacheFile::open(&path, 9).unwrap();
        assert_eq!((file.tokens, file.next_sequence), (9, 4));
        assert_eq!(file.get(&key(1)), None, "the oldest entry is still there");
        for n in 2..=4 {
            assert_eq!(file.get(&key(n)).as_ref(), Some(&*entry(n).1));
        }
        assert_eq!(file.get(&key(9)), None);
    }

    #[test]
    fn damaged_bytes_are_no_entry() {
        let bytes = encode(&vec![vec![1.0, 2.0], vec![3.0]]);
        assert_eq!(decode(&bytes), Some(vec![vec![1.0, 2.0], vec![3.0]]));
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), None, "{cut}");
        }
        assert_eq!(decode(&[255; 8]), None);
    }

    #[test]
    fn a_file_that_is_no_cache_is_reported_and_memory_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache.redb");
        std::fs::write(&path, "not a database").unwrap();
        assert!(ReferenceCache::open(10, &path).lock().disk.is_none());
    }
}
