//! Reference log-probs by content, in memory and on disk.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::Result;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use super::pair::SequenceGroup;
use super::scorer::{Logps, score_all};
use crate::model::decoder::Policy;

/// Changes whenever the kernels' order of operations does: older entries are then not found any
/// more.
const NUMERICS: u32 = 1;
/// How often what was written is made durable: a crash loses at most so much of the cache, which
/// only costs time.
const SYNC: Duration = Duration::from_secs(2);

/// Reference log-probs by content: they never change, so a second epoch or a repeated request costs
/// the policy only. Bounded by tokens, in memory and on disk alike; the oldest entries leave first.
/// All device workers share it; nobody has it while something is computed.
#[derive(Debug)]
pub struct ReferenceCache(Mutex<CacheState>);

#[derive(Debug)]
struct CacheState {
    limit: usize,
    tokens: usize,
    entries: HashMap<[u8; 32], Arc<Logps>>,
    order: VecDeque<[u8; 32]>,
    disk: Option<CacheFile>,
}

impl ReferenceCache {
    /// A cache for `limit` completion tokens, in memory only.
    pub fn new(limit: usize) -> Self {
        Self::with_disk(limit, None)
    }

    /// A cache that outlives the process in the file `path`. Where that cannot be used, it says so
    /// in the log and keeps to memory.
    pub fn open(limit: usize, path: &Path) -> Self {
        let disk = CacheFile::open(path, limit as u64).inspect_err(|e| {
            tracing::warn!(path = %path.display(), error = %e, "reference log-probs are not kept across restarts: the cache file cannot be used");
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
        // A panic in between leaves at most an entry out.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log-probs of every item under `reference`, whose weights `identity` names for good; what
    /// is missing is computed together. `pause` is called between blocks; it may use the cache.
    pub fn score(
        &self,
        reference: &Policy,
        identity: &str,
        items: &[&[SequenceGroup]],
        row_tokens: usize,
        pause: &mut dyn FnMut(),
    ) -> Result<Vec<Arc<Logps>>> {
        // Kernels round differently: a number is only ever repeated where it would be computed.
        let identity = format!("{identity}@{}@{NUMERICS}", reference.arithmetic());
        let keys: Vec<[u8; 32]> = items.iter().map(|groups| key(&identity, groups)).collect();
        let mut found: Vec<Option<Arc<Logps>>> = {
            let mut inner = self.lock();
            keys.iter().map(|k| inner.get(k)).collect()
        };
        let missing: Vec<usize> = (0..items.len()).filter(|i| found[*i].is_none()).collect();
        metrics::counter!("bradley_reference_cache_hits_total")
            .increment((items.len() - missing.len()) as u64);
        metrics::counter!("bradley_reference_cache_misses_total").increment(missing.len() as u64);
        let wanted: Vec<&[SequenceGroup]> = missing.iter().map(|i| items[*i]).collect();
        let mut new = Vec::with_capacity(missing.len());
        for (i, logps) in missing.into_iter().zip(score_all(reference, &wanted, row_tokens, pause)?)
        {
            let logps = Arc::new(logps);
            new.push((keys[i], logps.clone()));
            found[i] = Some(logps);
        }
        self.lock().keep(new);
        Ok(found.into_iter().flatten().collect())
    }
}

impl CacheState {
    fn get(&mut self, key: &[u8; 32]) -> Option<Arc<Logps>> {
        if let Some(hit) = self.entries.get(key) {
            return Some(hit.clone());
        }
        let logps = Arc::new(self.disk.as_ref()?.get(key)?);
        self.insert(*key, logps.clone());
        Some(logps)
    }

    fn keep(&mut self, new: Vec<([u8; 32], Arc<Logps>)>) {
        for (key, logps) in &new {
            self.insert(*key, logps.clone());
        }
        if let Some(disk) = &mut self.disk
            && let Err(e) = disk.insert(&new)
        {
            tracing::warn!(error = %e, "the reference cache file cannot be written: it is no longer used");
            self.disk = None;
        }
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

/// Key → (sequence, log-probs).
const ENTRIES: TableDefinition<&[u8; 32], (u64, &[u8])> = TableDefinition::new("entries");
/// Sequence → (key, tokens), oldest first.
const ORDER: TableDefinition<u64, (&[u8; 32], u64)> = TableDefinition::new("order");

/// The part that is on disk.
#[derive(Debug)]
struct CacheFile {
    database: Database,
    limit: u64,
    tokens: u64,
    next: u64,
    synced: Instant,
}

type RedbResult<T> = std::result::Result<T, redb::Error>;

impl CacheFile {
    fn open(path: &Path, limit: u64) -> RedbResult<Self> {
        let database = Database::create(path)?;
        let write = database.begin_write()?;
        let (mut tokens, mut next) = (0, 0);
        {
            write.open_table(ENTRIES)?;
            for entry in write.open_table(ORDER)?.iter()? {
                let (sequence, value) = entry?;
                tokens += value.value().1;
                next = sequence.value() + 1;
            }
        }
        write.commit()?;
        Ok(CacheFile { database, limit, tokens, next, synced: Instant::now() })
    }

    /// What is stored under `key`; nothing when it cannot be read.
    fn get(&self, key: &[u8; 32]) -> Option<Logps> {
        let read = || -> RedbResult<Option<Logps>> {
            let table = self.database.begin_read()?.open_table(ENTRIES)?;
            Ok(table.get(key)?.and_then(|entry| decode(entry.value().1)))
        };
        read().ok().flatten()
    }

    fn insert(&mut self, new: &[([u8; 32], Arc<Logps>)]) -> RedbResult<()> {
        if new.is_empty() {
            return Ok(());
        }
        let mut write = self.database.begin_write()?;
        let sync = self.synced.elapsed() > SYNC;
        // The error says that savepoints are in use, which they are not.
        let _ = write.set_durability(if sync { Durability::Immediate } else { Durability::None });
        {
            let (mut entries, mut order) = (write.open_table(ENTRIES)?, write.open_table(ORDER)?);
            for (key, logps) in new {
                if entries.get(key)?.is_some() {
                    continue;
                }
                let tokens = logps.iter().map(Vec::len).sum::<usize>() as u64;
                entries.insert(key, (self.next, encode(logps).as_slice()))?;
                order.insert(self.next, (key, tokens))?;
                self.next += 1;
                self.tokens += tokens;
            }
            while self.tokens > self.limit {
                let Some(oldest) = order.pop_first()? else { break };
                let (key, tokens) = oldest.1.value();
                entries.remove(key)?;
                self.tokens -= tokens;
            }
        }
        write.commit()?;
        if sync {
            self.synced = Instant::now();
        }
        Ok(())
    }
}

/// Completions, their lengths, then all values; little-endian.
fn encode(logps: &Logps) -> Vec<u8> {
    let lengths = std::iter::once(logps.len())
        .chain(logps.iter().map(Vec::len))
        .flat_map(|n| (n as u32).to_le_bytes());
    lengths.chain(logps.iter().flatten().flat_map(|x| x.to_le_bytes())).collect()
}

/// `None` when the bytes are not what [`encode`] makes.
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
        let entry =
            |n: u8| (key(n), Arc::new(vec![vec![-0.1 * n as f32, f32::MIN_POSITIVE], vec![-3.5]]));
        let mut file = CacheFile::open(&path, 9).unwrap();
        for n in 1..=4 {
            file.insert(&[entry(n)]).unwrap();
        }
        drop(file);
        let file = CacheFile::open(&path, 9).unwrap();
        assert_eq!((file.tokens, file.next), (9, 4));
        assert_eq!(file.get(&key(1)), None, "the oldest left");
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
