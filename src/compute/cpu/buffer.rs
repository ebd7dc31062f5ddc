//! Arena for activation buffers.
//!
//! A training step allocates and frees the same few hundred buffers over and over. Fresh pages from
//! the operating system cost more (page faults) than the work on them, so buffers come from one
//! large reserved range of virtual memory.
//!
//! Allocation is first-fit at the lowest free address (`compute/free_list.rs`), and the contents of
//! a new buffer are unspecified. Pages are committed on first touch and stay until
//! [`Buffer::trim`], so the resident memory stays near the peak in use.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::thread_pool;
use crate::compute::free_list::FreeList;

/// Alignment of every buffer, in bytes. With it, no two buffers share a cache line and no vector
/// load crosses into another buffer.
const ALIGNMENT: usize = 128;
/// Size and alignment of a large page, in bytes.
const LARGE_PAGE: usize = 2 << 20;
/// Largest default page size of supported systems, in bytes. A range aligned to it consists of
/// whole pages on all of them.
const PAGE: usize = 64 << 10;

static ARENA: Mutex<Arena> = Mutex::new(Arena {
    base: None,
    reserved: 0,
    committed: 0,
    highest: 0,
    free_list: FreeList::new(),
});

/// Reserved address range. All sizes are in bytes.
struct Arena {
    /// Start of the range. `None` until the first allocation, or if reserving failed.
    base: Option<BaseAddress>,
    reserved: usize,
    /// Bytes from `base` that are readable and writable. Grows in steps of [`LARGE_PAGE`].
    committed: usize,
    /// Highest end of an allocation since the last trim, as an offset from `base`.
    highest: usize,
    free_list: FreeList,
}

#[derive(Clone, Copy)]
struct BaseAddress(NonNull<u8>);

// SAFETY: this is only an address; the lock of the arena decides who may use the memory behind it.
unsafe impl Send for BaseAddress {}

fn arena() -> MutexGuard<'static, Arena> {
    ARENA.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Arena {
    /// Returns the start of the range and reserves it on the first call. Returns `None` if the
    /// system does not allow that (`ulimit -v`).
    fn base(&mut self) -> Option<NonNull<u8>> {
        if self.base.is_none() && self.reserved == 0 {
            // SAFETY: the calls only return two numbers.
            let memory = unsafe {
                libc::sysconf(libc::_SC_PHYS_PAGES).max(1) as usize
                    * libc::sysconf(libc::_SC_PAGESIZE).max(1) as usize
            };
            // Reserving costs nothing. Twice the physical memory leaves room for fragmentation.
            self.reserved = (2 * memory.max(1 << 30)).next_multiple_of(LARGE_PAGE);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: creates a new mapping at an address that the system chooses.
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
                // SAFETY: the mapping is one large page longer than `reserved`, so the aligned
                // start is inside it.
                self.base =
                    NonNull::new(unsafe { at.cast::<u8>().add(at.align_offset(LARGE_PAGE)) })
                        .map(BaseAddress);
            }
        }
        self.base.map(|b| b.0)
    }

    /// Allocates `size` bytes, a multiple of [`ALIGNMENT`].
    fn allocate(&mut self, size: usize) -> Option<NonNull<u8>> {
        let base = self.base()?;
        let at = self.free_list.allocate(size);
        if at + size > self.committed && !self.grow(base, at + size) {
            self.free_list.release(at, size);
            return None;
        }
        self.highest = self.highest.max(at + size);
        // SAFETY: inside the mapping.
        Some(unsafe { base.add(at) })
    }

    /// Commits the range from its start to at least `needed` bytes. Returns false if the range is
    /// too short or the system refuses.
    fn grow(&mut self, base: NonNull<u8>, needed: usize) -> bool {
        let until = needed.next_multiple_of(LARGE_PAGE);
        if until > self.reserved {
            return false;
        }
        // SAFETY: the range is reserved and not in use yet. Large pages are only a hint; they
        // reduce the number of page faults.
        let usable = unsafe {
            let start = base.add(self.committed).as_ptr().cast();
            let length = until - self.committed;
            let usable = libc::mprotect(start, length, libc::PROT_READ | libc::PROT_WRITE) == 0;
            #[cfg(target_os = "linux")]
            libc::madvise(start, length, libc::MADV_HUGEPAGE);
            usable
        };
        if usable {
            self.committed = until;
        }
        usable
    }

    fn release(&mut self, at: NonNull<u8>, size: usize) {
        if let Some(BaseAddress(base)) = self.base {
            self.free_list
                .release(at.as_ptr() as usize - base.as_ptr() as usize, size);
        }
    }

    /// Returns unused pages to the operating system.
    fn trim(&mut self) {
        let Some(BaseAddress(base)) = self.base else {
            return;
        };
        let end = self.free_list.end();
        for (at, length) in self
            .free_list
            .holes()
            .chain([(end, self.highest.max(end) - end)])
        {
            let (start, until) = (
                at.next_multiple_of(PAGE),
                (at + length).next_multiple_of(PAGE).min(self.committed),
            );
            // The last page of a hole also holds the start of the next buffer, so it stays. After
            // `end` there is no buffer.
            let until = if at == end {
                until
            } else {
                until.min((at + length) / PAGE * PAGE)
            };
            if start < until {
                // SAFETY: these are whole pages outside every buffer; they read as zero when they
                // are used again.
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

/// Asks the system for large pages under long-lived values, which reduces page faults on first
/// touch. This is only a hint.
pub fn large_pages(values: &[f32]) {
    let start = (values.as_ptr() as usize).next_multiple_of(PAGE);
    let end = (values.as_ptr() as usize + size_of_val(values)) / PAGE * PAGE;
    #[cfg(target_os = "linux")]
    if end > start {
        // SAFETY: these are whole pages inside the slice; their contents do not change.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

/// Memory of a buffer.
#[derive(Debug)]
enum Storage {
    /// Address and allocated bytes in the arena.
    Arena(NonNull<f32>, usize),
    /// Fallback if the arena has no memory for the buffer.
    Heap(Vec<f32>),
}

// SAFETY: the values belong to this buffer alone.
unsafe impl Send for Storage {}
// SAFETY: as above; shared references only read the values.
unsafe impl Sync for Storage {}

/// A slice of f32 values, or of the same number of 4-byte units, in the arena.
#[derive(Debug, Default)]
pub struct Buffer {
    storage: Option<Storage>,
    len: usize,
}

impl Buffer {
    /// Allocates `len` values with **unspecified contents**. Callers must write every element
    /// before they read it.
    pub fn uninit(len: usize) -> Self {
        if len == 0 {
            return Buffer::default();
        }
        let size = (len * size_of::<f32>()).next_multiple_of(ALIGNMENT);
        let found = arena().allocate(size);
        let storage = found.map_or_else(
            || Storage::Heap(vec![0f32; len]),
            |at| Storage::Arena(at.cast(), size),
        );
        Buffer {
            storage: Some(storage),
            len,
        }
    }

    /// Allocates `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut b = Self::uninit(len);
        b.fill(0.0);
        b
    }

    /// Copies `values` into a new buffer, with all threads.
    pub fn copy_of(values: &[f32]) -> Self {
        const PART: usize = 1 << 16;
        let mut b = Self::uninit(values.len());
        thread_pool::chunks(&mut b, PART, |i, to| {
            to.copy_from_slice(&values[i * PART..][..to.len()])
        });
        b
    }

    /// Returns the contents as 4-byte units: bits of f32, or pairs of bf16.
    pub fn units(&self) -> &[u32] {
        let values: &[f32] = self;
        // SAFETY: f32 and u32 have the same size and alignment, and every bit pattern is valid for
        // both.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
    }

    /// Returns the contents as mutable 4-byte units.
    pub fn units_mut(&mut self) -> &mut [u32] {
        let values: &mut [f32] = self;
        // SAFETY: as in `units`.
        unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
    }

    /// Returns the peak size in bytes of the used part of the range since the last trim. Holes
    /// between buffers count because their pages stay committed.
    pub fn peak_bytes() -> usize {
        arena().highest
    }

    /// Returns all unused pages to the operating system, e.g. when a run has ended.
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
            // SAFETY: these values, at least `len` of them, belong to this buffer alone; every bit
            // pattern is a valid f32.
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
            // SAFETY: as in `deref`, with exclusive access.
            Some(Storage::Arena(at, _)) => unsafe {
                std::slice::from_raw_parts_mut(at.as_ptr(), self.len)
            },
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(Storage::Arena(at, size)) = &self.storage {
            arena().release(at.cast(), *size);
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
                let mut b = Buffer::uninit(len);
                b.fill(7.0);
            }
            let b = Buffer::zeros(len);
            assert_eq!((b.len(), b.units().len()), (len, len));
            assert!(b.iter().all(|x| *x == 0.0));
        }
    }

    #[test]
    fn what_is_in_use_stays_when_the_rest_is_given_back() {
        // Other tests allocate and free at the same time.
        let mut in_use: Vec<Buffer> = (1..60)
            .map(|i| Buffer::copy_of(&vec![i as f32; i * 777]))
            .collect();
        for i in (0..in_use.len()).rev().step_by(3) {
            in_use.remove(i);
        }
        Buffer::trim();
        let more: Vec<Buffer> = (1..60)
            .map(|i| Buffer::copy_of(&vec![-1.0; i * 555]))
            .collect();
        for b in &in_use {
            let n = b[0];
            assert!(b.iter().all(|x| *x == n) && b.len() == n as usize * 777);
        }
        assert!(more.iter().all(|b| b.iter().all(|x| *x == -1.0)));
    }

    #[test]
    fn a_trim_gives_pages_back() {
        let mut arena = Arena {
            base: None,
            reserved: 0,
            committed: 0,
            highest: 0,
            free_list: FreeList::new(),
        };
        let sizes = [5 * PAGE, 2 * LARGE_PAGE + ALIGNMENT, 3 * PAGE + ALIGNMENT];
        let taken = sizes.map(|size| {
            let at = arena.allocate(size).unwrap();
            // SAFETY: that many bytes were taken.
            unsafe { at.as_ptr().write_bytes(7, size) };
            at
        });
        arena.release(taken[1], sizes[1]);
        arena.trim();
        // SAFETY: the whole range is mapped. Returned pages read as zero; pages shared with another
        // buffer keep their contents.
        let byte = |at: NonNull<u8>, offset: usize| unsafe { at.add(offset).read() };
        assert_eq!(
            [
                byte(taken[0], sizes[0] - 1),
                byte(taken[2], 0),
                byte(taken[2], sizes[2] - 1)
            ],
            [7; 3]
        );
        assert_eq!(byte(taken[1], LARGE_PAGE), 0);
        arena.release(taken[2], sizes[2]);
        arena.trim();
        assert_eq!(byte(taken[2], 2 * PAGE), 0);
        assert_eq!(byte(taken[0], 0), 7);
    }
}
