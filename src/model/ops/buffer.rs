//! Reused memory for activations: fresh pages cost more than the work on them, and a large allocation is fresh pages every time.
//!
//! Buffers come from one pool and go back to it when dropped. Their content is whatever was there before. The pool never holds more than an eighth over what was in
//! use at one time since the last [`Buffer::trim`]: before it would grow past that, it gives back what it kept longest.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use memmap2::{Advice, MmapMut};

/// From so many values on a buffer is mapped on its own, so that giving it back gives its pages back.
const MAPPED_FROM: usize = 1 << 16;

static POOL: Mutex<Pool> = Mutex::new(Pool::new());

/// Free storage; sizes in values.
struct Pool {
    /// By size, then by age: when each was freed.
    free: BTreeMap<usize, VecDeque<(u64, Storage)>>,
    /// Counts what was freed.
    clock: u64,
    free_values: usize,
    live_values: usize,
    /// The most that was live at one time.
    peak_values: usize,
}

#[derive(Debug)]
enum Storage {
    Heap(Vec<f32>),
    Mapped(MmapMut),
}

impl Storage {
    fn new(values: usize) -> Self {
        if values >= MAPPED_FROM
            && let Ok(map) = MmapMut::map_anon(values * 4)
        {
            // Only a hint: fewer, larger pages.
            let _ = map.advise(Advice::HugePage);
            return Storage::Mapped(map);
        }
        Storage::Heap(vec![0f32; values])
    }

    fn values(&self) -> usize {
        match self {
            Storage::Heap(v) => v.len(),
            Storage::Mapped(m) => m.len() / 4,
        }
    }
}

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sizes are rounded up by at most an eighth, so that rows of about the same length share buffers.
fn size_class(len: usize) -> usize {
    let len = len.max(1024);
    len.next_multiple_of(1 << (len.ilog2() - 3))
}

impl Pool {
    const fn new() -> Self {
        Pool { free: BTreeMap::new(), clock: 0, free_values: 0, live_values: 0, peak_values: 0 }
    }

    /// Storage for `class` values, counted as live. The smallest free one that fits, up to twice as large: rows differ in length, and fresh pages cost
    /// more than the room. Of several the one freed last: it is the likeliest to be in a cache.
    fn take(&mut self, class: usize) -> Option<Storage> {
        let storage = self.free.range_mut(class..=2 * class).find_map(|(_, same)| same.pop_back()).map(|(_, storage)| storage);
        let values = storage.as_ref().map_or(class, Storage::values);
        if storage.is_some() {
            self.free_values -= values;
        }
        self.live_values += values;
        self.peak_values = self.peak_values.max(self.live_values);
        storage
    }

    fn give_back(&mut self, storage: Storage) {
        let values = storage.values();
        self.live_values = self.live_values.saturating_sub(values);
        self.free_values += values;
        self.clock += 1;
        self.free.entry(values).or_default().push_back((self.clock, storage));
    }

    /// What must go so that live and free together stay near the peak, the longest unused first.
    fn surplus(&mut self) -> Vec<Storage> {
        let mut gone = Vec::new();
        while self.live_values + self.free_values > self.peak_values + self.peak_values / 8 {
            let oldest = self.free.values_mut().filter(|same| !same.is_empty()).min_by_key(|same| same.front().map(|(age, _)| *age));
            let Some((_, storage)) = oldest.and_then(VecDeque::pop_front) else { break };
            self.free_values -= storage.values();
            gone.push(storage);
        }
        self.free.retain(|_, same| !same.is_empty());
        gone
    }
}

/// Asks for large pages under values that live long: fewer faults when they are first touched. Only a hint.
pub fn large_pages(values: &[f32]) {
    const PAGE: usize = 4096;
    let start = (values.as_ptr() as usize).next_multiple_of(PAGE);
    let end = (values.as_ptr() as usize + size_of_val(values)) / PAGE * PAGE;
    #[cfg(target_os = "linux")]
    if end > start {
        // SAFETY: whole pages inside the slice; their content does not change.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

/// A slice of f32 (or of as many 4-byte units) from the pool.
#[derive(Debug, Default)]
pub struct Buffer {
    storage: Option<Storage>,
    len: usize,
}

impl Buffer {
    /// `len` values with any content.
    pub fn dirty(len: usize) -> Self {
        if len == 0 {
            return Buffer::default();
        }
        let class = size_class(len);
        let (found, gone) = {
            let mut pool = pool();
            let found = pool.take(class);
            let gone = if found.is_none() { pool.surplus() } else { Vec::new() };
            (found, gone)
        };
        // Unmapping and mapping take time: not under the lock.
        drop(gone);
        Buffer { storage: Some(found.unwrap_or_else(|| Storage::new(class))), len }
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut b = Self::dirty(len);
        b.fill(0.0);
        b
    }

    /// A copy of `values`.
    pub fn copy_of(values: &[f32]) -> Self {
        let mut b = Self::dirty(values.len());
        b.copy_from_slice(values);
        b
    }

    /// The content as 4-byte units: f32 bits, or pairs of bf16.
    pub fn units(&self) -> &[u32] {
        let values: &[f32] = self;
        // SAFETY: f32 and u32 have the same size and alignment, and every bit pattern is valid for both.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
    }

    /// The content as 4-byte units, to write.
    pub fn units_mut(&mut self) -> &mut [u32] {
        let values: &mut [f32] = self;
        // SAFETY: as in `units`.
        unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
    }

    /// Gives all free buffers back, e.g. when a run has ended.
    pub fn trim() {
        let gone = {
            let mut pool = pool();
            pool.free_values = 0;
            pool.peak_values = pool.live_values;
            std::mem::take(&mut pool.free)
        };
        drop(gone);
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.storage {
            None => &[],
            Some(Storage::Heap(v)) => &v[..self.len],
            // SAFETY: the map is page-aligned and has at least `len` values; every bit pattern is an f32.
            Some(Storage::Mapped(m)) => unsafe { std::slice::from_raw_parts(m.as_ptr().cast(), self.len) },
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.storage {
            None => &mut [],
            Some(Storage::Heap(v)) => &mut v[..self.len],
            // SAFETY: as in `deref`, and exclusive.
            Some(Storage::Mapped(m)) => unsafe { std::slice::from_raw_parts_mut(m.as_mut_ptr().cast(), self.len) },
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(storage) = self.storage.take() {
            pool().give_back(storage);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_the_length_asked_for_and_zeros_are_zero() {
        for len in [0, 1, 4900, MAPPED_FROM + 1] {
            {
                let mut b = Buffer::dirty(len);
                b.fill(7.0);
            }
            let b = Buffer::zeros(len);
            assert_eq!((b.len(), b.units().len()), (len, len));
            assert!(b.iter().all(|x| *x == 0.0));
        }
    }

    #[test]
    fn size_classes_waste_little() {
        for len in [1, 1024, 1025, 5000, 123_456, 10_000_001] {
            let class = size_class(len);
            assert!(class >= len && class <= (len + len / 8).max(1024) + 1, "{len} -> {class}");
        }
    }

    #[test]
    fn a_pool_never_keeps_more_than_was_live_and_reuses_what_is_near() {
        let mut pool = Pool::new();
        assert!(pool.take(2048).is_none());
        pool.give_back(Storage::new(2048));
        assert!(pool.take(1000).is_none(), "too large to be used for less than half its size");
        assert_eq!(pool.surplus().len(), 1);
        assert_eq!(pool.free_values + pool.live_values, 1000);
        pool.give_back(Storage::new(1000));
        pool.give_back(Storage::new(1024));
        assert_eq!(pool.take(1000).map(|s| s.values()), Some(1000), "the smallest that fits");
        assert_eq!(pool.take(1000).map(|s| s.values()), Some(1024), "then the next");
    }
}
