//! Reused memory for activations: fresh pages cost more than the work on them, and a large
//! allocation is fresh pages every time.
//!
//! Buffers are parts of one large range of addresses, the lowest that is free
//! (`compute/free_list.rs`); their content is whatever was there before. Pages come when they are
//! first touched and stay until [`Buffer::trim`], so what is held stays near the most that was in
//! use at one time.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::thread_pool;
use crate::compute::free_list::FreeList;

/// In bytes; every buffer begins at a multiple, so that none shares a cache line with another, or a
/// vector's load crosses into one.
const ALIGNMENT: usize = 128;
/// Large pages are aligned so.
const LARGE_PAGE: usize = 2 << 20;
/// The largest pages that systems have by default, in bytes: what is a multiple of it is one of
/// theirs.
const PAGE: usize = 64 << 10;

static ARENA: Mutex<Arena> =
    Mutex::new(Arena { base: None, reserved: 0, usable: 0, highest: 0, ranges: FreeList::new() });

/// The range of addresses; sizes in bytes.
struct Arena {
    /// `None` before the first buffer.
    base: Option<BaseAddress>,
    reserved: usize,
    /// So many from the start may be touched.
    usable: usize,
    /// The end of what was in use since the last trim.
    highest: usize,
    ranges: FreeList,
}

#[derive(Clone, Copy)]
struct BaseAddress(NonNull<u8>);

// SAFETY: an address; who may use what behind it is decided under the lock.
unsafe impl Send for BaseAddress {}

fn arena() -> MutexGuard<'static, Arena> {
    ARENA.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Arena {
    /// The start of the range, reserved now if not before; `None` where that is not allowed
    /// (`ulimit -v`).
    fn base(&mut self) -> Option<NonNull<u8>> {
        if self.base.is_none() && self.reserved == 0 {
            // SAFETY: asks for two numbers.
            let memory = unsafe {
                libc::sysconf(libc::_SC_PHYS_PAGES).max(1) as usize
                    * libc::sysconf(libc::_SC_PAGESIZE).max(1) as usize
            };
            // Addresses cost nothing: twice the memory, for the holes between what is in use.
            self.reserved = (2 * memory.max(1 << 30)).next_multiple_of(LARGE_PAGE);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: a new mapping, at an address of the system's choice.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    self.reserved + LARGE_PAGE,
                    libc::PROT_NONE,
                    flags,
                    -1,
                    0,
                )
            };
            if at != libc::MAP_FAILED {
                // SAFETY: the mapping is a large page longer than what is used of it.
                self.base =
                    NonNull::new(unsafe { at.cast::<u8>().add(at.align_offset(LARGE_PAGE)) })
                        .map(BaseAddress);
            }
        }
        self.base.map(|b| b.0)
    }

    /// So many bytes, a multiple of [`ALIGNMENT`].
    fn take(&mut self, size: usize) -> Option<NonNull<u8>> {
        let base = self.base()?;
        let at = self.ranges.take(size);
        if at + size > self.usable && !self.grow(base, at + size) {
            self.ranges.give(at, size);
            return None;
        }
        self.highest = self.highest.max(at + size);
        // SAFETY: inside the mapping.
        Some(unsafe { base.add(at) })
    }

    /// Makes the first `needed` bytes usable.
    fn grow(&mut self, base: NonNull<u8>, needed: usize) -> bool {
        let until = needed.next_multiple_of(LARGE_PAGE);
        if until > self.reserved {
            return false;
        }
        // SAFETY: reserved and not in use yet; large pages are only a hint: fewer faults.
        let usable = unsafe {
            let start = base.add(self.usable).as_ptr().cast();
            let length = until - self.usable;
            let usable = libc::mprotect(start, length, libc::PROT_READ | libc::PROT_WRITE) == 0;
            #[cfg(target_os = "linux")]
            libc::madvise(start, length, libc::MADV_HUGEPAGE);
            usable
        };
        if usable {
            self.usable = until;
        }
        usable
    }

    fn give(&mut self, at: NonNull<u8>, size: usize) {
        if let Some(BaseAddress(base)) = self.base {
            self.ranges.give(at.as_ptr() as usize - base.as_ptr() as usize, size);
        }
    }

    /// Gives the pages back of which nothing is in use.
    fn trim(&mut self) {
        let Some(BaseAddress(base)) = self.base else { return };
        let end = self.ranges.end();
        for (at, length) in self.ranges.holes().chain([(end, self.highest.max(end) - end)]) {
            let (start, until) =
                (at.next_multiple_of(PAGE), (at + length).next_multiple_of(PAGE).min(self.usable));
            // The page that the hole ends in belongs to what is behind it, unless that is nothing.
            let until = if at == end { until } else { until.min((at + length) / PAGE * PAGE) };
            if start < until {
                // SAFETY: whole pages that nobody uses; they read as zero when they are used again.
                unsafe {
                    libc::madvise(
                        base.add(start).as_ptr().cast(),
                        until - start,
                        libc::MADV_DONTNEED,
                    )
                };
            }
        }
        self.highest = end;
    }
}

/// Asks for large pages under values that live long: fewer faults when they are first touched. Only
/// a hint.
pub fn large_pages(values: &[f32]) {
    let start = (values.as_ptr() as usize).next_multiple_of(PAGE);
    let end = (values.as_ptr() as usize + size_of_val(values)) / PAGE * PAGE;
    #[cfg(target_os = "linux")]
    if end > start {
        // SAFETY: whole pages inside the slice; their content does not change.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

/// Where a buffer's values are.
#[derive(Debug)]
enum Storage {
    /// In the arena: the address, and the bytes that were taken.
    Arena(NonNull<f32>, usize),
    /// Where there is none.
    Heap(Vec<f32>),
}

// SAFETY: the values belong to the buffer alone.
unsafe impl Send for Storage {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Storage {}

/// A slice of f32 (or of as many 4-byte units) from the arena.
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
        let size = (len * size_of::<f32>()).next_multiple_of(ALIGNMENT);
        let found = arena().take(size);
        let storage = found
            .map_or_else(|| Storage::Heap(vec![0f32; len]), |at| Storage::Arena(at.cast(), size));
        Buffer { storage: Some(storage), len }
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut b = Self::dirty(len);
        b.fill(0.0);
        b
    }

    /// A copy of `values`, made by all threads.
    pub fn copy_of(values: &[f32]) -> Self {
        const PART: usize = 1 << 16;
        let mut b = Self::dirty(values.len());
        thread_pool::chunks(&mut b, PART, |i, to| {
            to.copy_from_slice(&values[i * PART..][..to.len()])
        });
        b
    }

    /// The content as 4-byte units: f32 bits, or pairs of bf16.
    pub fn units(&self) -> &[u32] {
        let values: &[f32] = self;
        // SAFETY: f32 and u32 have the same size and alignment, and every bit pattern is valid for
        // both.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
    }

    /// The content as 4-byte units, to write.
    pub fn units_mut(&mut self) -> &mut [u32] {
        let values: &mut [f32] = self;
        // SAFETY: as in `units`.
        unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
    }

    /// Returns the most bytes of the range that were in use at one time since the last trim. Holes
    /// between buffers count, because their pages stay.
    pub fn peak_bytes() -> usize {
        arena().highest
    }

    /// Gives all free memory back, e.g. when a run has ended.
    pub fn trim() {
        arena().trim();
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.storage {
            None => &[],
            Some(Storage::Heap(v)) => v,
            // SAFETY: the buffer alone has these values, at least `len` of them; every bit pattern
            // is an f32.
            Some(Storage::Arena(at, _)) => unsafe {
                std::slice::from_raw_parts(at.as_ptr(), self.len)
            },
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.storage {
            None => &mut [],
            Some(Storage::Heap(v)) => v,
            // SAFETY: as in `deref`, and exclusive.
            Some(Storage::Arena(at, _)) => unsafe {
                std::slice::from_raw_parts_mut(at.as_ptr(), self.len)
            },
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(Storage::Arena(at, size)) = &self.storage {
            arena().give(at.cast(), *size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_the_length_asked_for_and_zeros_are_zero() {
        for len in [0, 1, 4900, (1 << 16) + 1] {
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
    fn what_is_in_use_stays_when_the_rest_is_given_back() {
        // Other tests take and give back meanwhile.
        let mut kept: Vec<Buffer> =
            (1..60).map(|i| Buffer::copy_of(&vec![i as f32; i * 777])).collect();
        for i in (0..kept.len()).rev().step_by(3) {
            kept.remove(i);
        }
        Buffer::trim();
        let more: Vec<Buffer> = (1..60).map(|i| Buffer::copy_of(&vec![-1.0; i * 555])).collect();
        for b in &kept {
            let n = b[0];
            assert!(b.iter().all(|x| *x == n) && b.len() == n as usize * 777);
        }
        assert!(more.iter().all(|b| b.iter().all(|x| *x == -1.0)));
    }

    #[test]
    fn a_trim_gives_pages_back() {
        let mut arena =
            Arena { base: None, reserved: 0, usable: 0, highest: 0, ranges: FreeList::new() };
        let sizes = [5 * PAGE, 2 * LARGE_PAGE + ALIGNMENT, 3 * PAGE + ALIGNMENT];
        let taken = sizes.map(|size| {
            let at = arena.take(size).unwrap();
            // SAFETY: that many bytes were taken.
            unsafe { at.as_ptr().write_bytes(7, size) };
            at
        });
        arena.give(taken[1], sizes[1]);
        arena.trim();
        // SAFETY: all of it is mapped; what was given back reads as zero, but for the pages it
        // shares.
        let byte = |at: NonNull<u8>, offset: usize| unsafe { at.add(offset).read() };
        assert_eq!(
            [byte(taken[0], sizes[0] - 1), byte(taken[2], 0), byte(taken[2], sizes[2] - 1)],
            [7; 3]
        );
        assert_eq!(byte(taken[1], LARGE_PAGE), 0);
        arena.give(taken[2], sizes[2]);
        arena.trim();
        assert_eq!(byte(taken[2], 2 * PAGE), 0);
        assert_eq!(byte(taken[0], 0), 7);
    }
}
