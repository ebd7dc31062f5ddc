//! Where the device's memory is taken from and given back to, without a call of the driver most
//! times.
//!
//! A pass takes memory block by block and gives it back in the opposite order, and the next row is
//! longer or shorter. So free memory is kept as ranges of one large range of addresses, whose
//! neighbours grow together; what is taken is the lowest range that is long enough; and chunks of
//! the device's memory are mapped behind the addresses when they are first needed. The memory that
//! is held stays near the most that was in use, whatever the rows' lengths.

use std::collections::BTreeMap;

use cudarc::driver::{DriverError, result as driver, sys};

use crate::compute::free_list::FreeList;

/// The most memory that is mapped at a time.
const MAX_CHUNK: usize = 32 << 20;

/// The least: devices map memory in pages of this size.
const MIN_CHUNK: usize = 2 << 20;

/// A device has at least so many chunks, so that a small one (a MIG slice) does not lose much to a
/// chunk in part use.
const MIN_CHUNKS: usize = 512;

/// Every address and size is a multiple.
const ALIGNMENT: usize = 512;

/// Memory on the device, free and in use.
pub(super) struct Arena {
    source: Source,
    live_bytes: usize,
    peak_bytes: usize,
    /// Bytes that are left to the driver.
    reserve: usize,
}

enum Source {
    Mapped(Mapped),
    /// On a device that cannot map memory: pieces of the driver's, by size.
    Pieces {
        free: BTreeMap<usize, Vec<u64>>,
        free_bytes: usize,
    },
}

impl Arena {
    /// The memory of GPU `ordinal`, which has `total` bytes; its context is current.
    pub fn open(ordinal: usize, total: usize, reserve: usize, can_map: bool) -> Self {
        let arena = if can_map {
            Mapped::reserve(ordinal, total)
        } else {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_SUPPORTED))
        };
        let source = arena.map(Source::Mapped).unwrap_or_else(|e| {
            tracing::info!(ordinal, reason = ?e.0, "memory of the GPU is taken piece by piece");
            Source::Pieces { free: BTreeMap::new(), free_bytes: 0 }
        });
        Arena { source, live_bytes: 0, peak_bytes: 0, reserve }
    }

    /// At least so many bytes: the address, and how many they are; `None` when that would leave
    /// less than the reserve.
    pub fn take(&mut self, bytes: usize) -> Option<(u64, usize)> {
        let (address, size) = match &mut self.source {
            Source::Mapped(arena) => {
                arena.take(bytes.max(1).next_multiple_of(ALIGNMENT), self.reserve)?
            }
            Source::Pieces { free, free_bytes } => {
                let class = size_class(bytes);
                // Somewhat larger ones, too: rows differ in length.
                let fits = free
                    .range(class..=class / 4 * 5)
                    .find(|(_, pieces)| !pieces.is_empty())
                    .map_or(class, |(class, _)| *class);
                match free.get_mut(&fits).and_then(Vec::pop) {
                    Some(address) => {
                        *free_bytes -= fits;
                        (address, fits)
                    }
                    None => (allocate(class, self.reserve)?, class),
                }
            }
        };
        self.live_bytes += size;
        self.peak_bytes = self.peak_bytes.max(self.live_bytes);
        Some((address, size))
    }

    /// Gives back what was taken.
    pub fn give(&mut self, address: u64, size: usize) {
        self.live_bytes -= size;
        match &mut self.source {
            Source::Mapped(arena) => arena.give(address, size),
            Source::Pieces { free, free_bytes } => {
                *free_bytes += size;
                free.entry(size).or_default().push(address);
            }
        }
    }

    /// Gives free memory back to the driver; the device is done with it. The peak is counted anew.
    pub fn trim(&mut self) -> Result<(), DriverError> {
        self.peak_bytes = self.live_bytes;
        match &mut self.source {
            Source::Mapped(arena) => arena.trim(),
            Source::Pieces { free, free_bytes } => {
                *free_bytes = 0;
                // SAFETY: these came from the driver and are in nobody's hands.
                std::mem::take(free)
                    .into_values()
                    .flatten()
                    .try_for_each(|address| unsafe { driver::free_sync(address) })
            }
        }
    }

    /// Bytes that are held and not in use.
    pub fn free_bytes(&self) -> usize {
        match &self.source {
            Source::Mapped(arena) => arena.mapped - self.live_bytes,
            Source::Pieces { free_bytes, .. } => *free_bytes,
        }
    }

    /// The most bytes that were in use at one time.
    pub fn peak_bytes(&self) -> usize {
        self.peak_bytes
    }
}

/// Sizes are rounded up by at most an eighth, so that rows of about the same length share memory.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(4096);
    bytes.next_multiple_of(1 << (bytes.ilog2() - 3))
}

/// A piece of the driver's.
fn allocate(bytes: usize, reserve: usize) -> Option<u64> {
    // SAFETY: the context is current.
    let address = unsafe { driver::malloc_sync(bytes) }.ok()?;
    if free_of_driver() >= reserve {
        return Some(address);
    }
    // SAFETY: nobody has it yet.
    let _ = unsafe { driver::free_sync(address) };
    None
}

fn free_of_driver() -> usize {
    driver::mem_get_info().map_or(0, |(free, _)| free)
}

/// A large range of addresses with memory behind the parts that were used.
struct Mapped {
    base: u64,
    reserved: usize,
    place: sys::CUmemLocation,
    ranges: FreeList,
    /// Bytes that are mapped at a time.
    chunk: usize,
    chunks: Vec<Option<sys::CUmemGenericAllocationHandle>>,
    /// Bytes of the chunks that are there.
    mapped: usize,
}

impl Mapped {
    fn reserve(ordinal: usize, total: usize) -> Result<Self, DriverError> {
        // Addresses cost nothing: twice the memory, for the holes between what is in use.
        let chunk = (total / MIN_CHUNKS).next_multiple_of(MIN_CHUNK).clamp(MIN_CHUNK, MAX_CHUNK);
        let reserved = (2 * total).next_multiple_of(chunk);
        let mut base = 0;
        // SAFETY: the address is written to a variable.
        unsafe { sys::cuMemAddressReserve(&raw mut base, reserved, chunk, 0, 0) }.result()?;
        let place = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: ordinal as i32,
        };
        let chunks = vec![None; reserved / chunk];
        Ok(Mapped { base, reserved, place, ranges: FreeList::default(), chunk, chunks, mapped: 0 })
    }

    fn take(&mut self, size: usize, reserve: usize) -> Option<(u64, usize)> {
        let at = self.ranges.take(size);
        let (first, last) = (at / self.chunk, (at + size - 1) / self.chunk);
        if at + size <= self.reserved && (first..=last).all(|chunk| self.map(chunk, reserve)) {
            return Some((self.base + at as u64, size));
        }
        self.ranges.give(at, size);
        None
    }

    fn give(&mut self, address: u64, size: usize) {
        self.ranges.give((address - self.base) as usize, size);
    }

    /// Maps chunk `chunk` unless it is mapped already. Returns false, and leaves the chunk out of
    /// use, when there is no memory for it or less than `reserve` would be left.
    fn map(&mut self, chunk: usize, reserve: usize) -> bool {
        if self.chunks[chunk].is_some() {
            return true;
        }
        let Ok(handle) = self.create(self.address(chunk)) else { return false };
        self.mapped += self.chunk;
        self.chunks[chunk] = Some(handle);
        // Another process may have taken what was free before.
        if free_of_driver() >= reserve {
            return true;
        }
        // Whatever comes of this, the caller must not use the chunk: its memory may be gone
        // although the call failed.
        if let Err(e) = self.unmap(chunk) {
            tracing::warn!(reason = ?e.0, "memory of the GPU was not given back to the driver");
        }
        false
    }

    /// The first address of a chunk.
    fn address(&self, chunk: usize) -> u64 {
        self.base + (chunk * self.chunk) as u64
    }

    /// Unmaps a chunk that nobody uses and releases its memory.
    fn unmap(&mut self, chunk: usize) -> Result<(), DriverError> {
        let Some(handle) = self.chunks[chunk] else { return Ok(()) };
        // SAFETY: the chunk is mapped there, and nobody uses it.
        unsafe {
            sys::cuMemUnmap(self.address(chunk), self.chunk).result()?;
            self.chunks[chunk] = None;
            self.mapped -= self.chunk;
            sys::cuMemRelease(handle).result()
        }
    }

    /// A chunk of memory at an address.
    fn create(&self, address: u64) -> Result<sys::CUmemGenericAllocationHandle, DriverError> {
        let what = sys::CUmemAllocationProp {
            type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
            location: self.place,
            win32HandleMetaData: std::ptr::null_mut(),
            allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: 0,
                usage: 0,
                reserved: [0; 4],
            },
        };
        let access = sys::CUmemAccessDesc {
            location: self.place,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let mut handle = 0;
        // SAFETY: the chunk's addresses are reserved and have no memory yet; what fails is undone.
        unsafe {
            sys::cuMemCreate(&raw mut handle, self.chunk, &raw const what, 0).result()?;
            let mapped = sys::cuMemMap(address, self.chunk, 0, handle, 0).result();
            let usable = mapped.and_then(|()| {
                sys::cuMemSetAccess(address, self.chunk, &raw const access, 1).result()
            });
            if let Err(e) = usable {
                let _ = mapped.map(|()| sys::cuMemUnmap(address, self.chunk));
                let _ = sys::cuMemRelease(handle);
                return Err(e);
            }
        }
        Ok(handle)
    }

    /// Unmaps the chunks of which nothing is in use.
    fn trim(&mut self) -> Result<(), DriverError> {
        for chunk in 0..self.chunks.len() {
            if self.ranges.is_free(chunk * self.chunk, self.chunk) {
                self.unmap(chunk)?;
            }
        }
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // With memory in use the addresses stay: the process ends.
        if self.trim().is_ok() && self.mapped == 0 {
            // SAFETY: nothing is mapped any more.
            let _ = unsafe { sys::cuMemAddressFree(self.base, self.reserved) };
        }
    }
}
