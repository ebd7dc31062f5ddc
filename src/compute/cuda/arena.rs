//! Arena for device memory. Most allocations need no call of the driver.
//!
//! A training step allocates block by block and frees in the opposite order, and the next row is
//! longer or shorter. The arena therefore reserves one large address range and allocates first-fit
//! at the lowest free address; adjacent free ranges are merged. Chunks of device memory are mapped
//! behind the addresses when they are first needed. The mapped memory stays near the peak in use,
//! whatever the row lengths.

use std::collections::BTreeMap;

use cudarc::driver::{DriverError, result as driver, sys};

use crate::compute::free_list::FreeList;

/// Maximum size in bytes of a chunk of memory that is mapped at a time.
const MAX_CHUNK: usize = 32 << 20;

/// Minimum size in bytes of a chunk: the page size in which devices map memory.
const MIN_CHUNK: usize = 2 << 20;

/// The size of a chunk is the device's memory divided by this number, rounded up to a multiple of
/// [`MIN_CHUNK`], but at most [`MAX_CHUNK`]. A small device (a MIG slice) thus loses little memory
/// to a partly used chunk.
const MIN_CHUNKS: usize = 512;

/// Every address and size is a multiple of this many bytes.
const ALIGNMENT: usize = 512;

/// Device memory, free and in use.
pub(super) struct DeviceArena {
    source: Source,
    live_bytes: usize,
    peak_bytes: usize,
    /// Bytes of device memory to leave to the driver.
    reserve: usize,
}

enum Source {
    Mapped(Mapped),
    /// Fallback for a device that cannot map memory: allocations from the driver, reused by size in
    /// bytes.
    Pieces {
        free: BTreeMap<usize, Vec<u64>>,
        free_bytes: usize,
    },
}

impl DeviceArena {
    /// Opens the arena of GPU `ordinal`, which has `total` bytes. The GPU's context must be
    /// current.
    pub fn open(ordinal: usize, total: usize, reserve: usize, can_map: bool) -> Self {
        let arena = if can_map {
            Mapped::reserve(ordinal, total)
        } else {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_SUPPORTED))
        };
        let source = arena.map(Source::Mapped).unwrap_or_else(|e| {
            tracing::info!(
                ordinal,
                reason = ?e.0,
                "cannot map GPU memory: each allocation comes from the driver"
            );
            Source::Pieces {
                free: BTreeMap::new(),
                free_bytes: 0,
            }
        });
        DeviceArena {
            source,
            live_bytes: 0,
            peak_bytes: 0,
            reserve,
        }
    }

    /// Allocates at least `bytes` bytes. Returns the address and the allocated size in bytes.
    /// Returns `None` if there is not enough memory or less than the reserve would remain.
    pub fn allocate(&mut self, bytes: usize) -> Option<(u64, usize)> {
        let (address, size) = match &mut self.source {
            Source::Mapped(arena) => {
                arena.allocate(bytes.max(1).next_multiple_of(ALIGNMENT), self.reserve)?
            }
            Source::Pieces { free, free_bytes } => {
                let class = size_class(bytes);
                // Up to a quarter larger is accepted too, because rows differ in length.
                let fits = free
                    .range(class..=class / 4 * 5)
                    .find(|(_, pieces)| !pieces.is_empty())
                    .map_or(class, |(class, _)| *class);
                match free.get_mut(&fits).and_then(Vec::pop) {
                    Some(address) => {
                        *free_bytes -= fits;
                        (address, fits)
                    }
                    None => (allocate_from_driver(class, self.reserve)?, class),
                }
            }
        };
        self.live_bytes += size;
        self.peak_bytes = self.peak_bytes.max(self.live_bytes);
        Some((address, size))
    }

    /// Frees an allocation of `size` bytes.
    pub fn release(&mut self, address: u64, size: usize) {
        self.live_bytes -= size;
        match &mut self.source {
            Source::Mapped(arena) => arena.release(address, size),
            Source::Pieces { free, free_bytes } => {
                *free_bytes += size;
                free.entry(size).or_default().push(address);
            }
        }
    }

    /// Returns free memory to the driver. The device must have finished using it. Resets the peak
    /// to the bytes now in use.
    pub fn trim(&mut self) -> Result<(), DriverError> {
        self.peak_bytes = self.live_bytes;
        match &mut self.source {
            Source::Mapped(arena) => arena.trim(),
            Source::Pieces { free, free_bytes } => {
                *free_bytes = 0;
                // SAFETY: the driver allocated these, and nobody uses them.
                std::mem::take(free)
                    .into_values()
                    .flatten()
                    .try_for_each(|address| unsafe { driver::free_sync(address) })
            }
        }
    }

    /// Returns the number of bytes that the arena has from the driver and that are not in use.
    pub fn free_bytes(&self) -> usize {
        match &self.source {
            Source::Mapped(arena) => arena.mapped - self.live_bytes,
            Source::Pieces { free_bytes, .. } => *free_bytes,
        }
    }

    /// Returns the peak number of bytes in use since the last trim.
    pub fn peak_bytes(&self) -> usize {
        self.peak_bytes
    }
}

/// Rounds a size up to at least 4 KiB, and beyond that by at most an eighth, so that rows of about
/// the same length can reuse each other's memory.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(4096);
    bytes.next_multiple_of(1 << (bytes.ilog2() - 3))
}

/// Allocates from the driver, unless less than `reserve` bytes would remain free.
fn allocate_from_driver(bytes: usize, reserve: usize) -> Option<u64> {
    // SAFETY: the context is current.
    let address = unsafe { driver::malloc_sync(bytes) }.ok()?;
    if driver_free_bytes() >= reserve {
        return Some(address);
    }
    // SAFETY: the address was not handed out.
    let _ = unsafe { driver::free_sync(address) };
    None
}

fn driver_free_bytes() -> usize {
    driver::mem_get_info().map_or(0, |(free, _)| free)
}

/// Large address range with memory mapped behind the parts that were used.
struct Mapped {
    base: u64,
    reserved: usize,
    place: sys::CUmemLocation,
    free_list: FreeList,
    /// Size of a chunk in bytes.
    chunk: usize,
    chunks: Vec<Option<sys::CUmemGenericAllocationHandle>>,
    /// Total bytes of the mapped chunks.
    mapped: usize,
}

impl Mapped {
    fn reserve(ordinal: usize, total: usize) -> Result<Self, DriverError> {
        // Reserving addresses costs nothing. Twice the memory leaves room for fragmentation.
        let chunk = (total / MIN_CHUNKS)
            .next_multiple_of(MIN_CHUNK)
            .clamp(MIN_CHUNK, MAX_CHUNK);
        let reserved = (2 * total).next_multiple_of(chunk);
        let mut base = 0;
        // SAFETY: the call only writes the address to a local variable.
        unsafe { sys::cuMemAddressReserve(&raw mut base, reserved, chunk, 0, 0) }.result()?;
        let place = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: ordinal as i32,
        };
        let chunks = vec![None; reserved / chunk];
        Ok(Mapped {
            base,
            reserved,
            place,
            free_list: FreeList::default(),
            chunk,
            chunks,
            mapped: 0,
        })
    }

    fn allocate(&mut self, size: usize, reserve: usize) -> Option<(u64, usize)> {
        let at = self.free_list.allocate(size);
        let (first, last) = (at / self.chunk, (at + size - 1) / self.chunk);
        if at + size <= self.reserved && (first..=last).all(|chunk| self.map(chunk, reserve)) {
            return Some((self.base + at as u64, size));
        }
        self.free_list.release(at, size);
        None
    }

    fn release(&mut self, address: u64, size: usize) {
        self.free_list.release((address - self.base) as usize, size);
    }

    /// Maps chunk `chunk` unless it is mapped already. Returns false and leaves the chunk unmapped
    /// if there is no memory for it or less than `reserve` bytes would remain free.
    fn map(&mut self, chunk: usize, reserve: usize) -> bool {
        if self.chunks[chunk].is_some() {
            return true;
        }
        let Ok(handle) = self.create(self.address(chunk)) else {
            return false;
        };
        self.mapped += self.chunk;
        self.chunks[chunk] = Some(handle);
        // Another process may have allocated memory that was free before.
        if driver_free_bytes() >= reserve {
            return true;
        }
        // The caller must not use the chunk even if unmapping fails: its memory may be gone
        // nevertheless.
        if let Err(e) = self.unmap(chunk) {
            tracing::warn!(reason = ?e.0, "could not return GPU memory to the driver");
        }
        false
    }

    /// Returns the first address of a chunk.
    fn address(&self, chunk: usize) -> u64 {
        self.base + (chunk * self.chunk) as u64
    }

    /// Unmaps a chunk that is not in use and releases its memory.
    fn unmap(&mut self, chunk: usize) -> Result<(), DriverError> {
        let Some(handle) = self.chunks[chunk] else {
            return Ok(());
        };
        // SAFETY: the chunk is mapped at this address, and nobody uses it.
        unsafe {
            sys::cuMemUnmap(self.address(chunk), self.chunk).result()?;
            self.chunks[chunk] = None;
            self.mapped -= self.chunk;
            sys::cuMemRelease(handle).result()
        }
    }

    /// Allocates a chunk of device memory and maps it at `address`.
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
        // SAFETY: the chunk's addresses are reserved and have no memory yet. If a step fails, the
        // previous ones are undone.
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

    /// Unmaps the chunks in which nothing is in use.
    fn trim(&mut self) -> Result<(), DriverError> {
        for chunk in 0..self.chunks.len() {
            if self.free_list.is_free(chunk * self.chunk, self.chunk) {
                self.unmap(chunk)?;
            }
        }
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // If memory is still in use, the addresses stay reserved until the process ends.
        if self.trim().is_ok() && self.mapped == 0 {
            // SAFETY: nothing is mapped any more.
            let _ = unsafe { sys::cuMemAddressFree(self.base, self.reserved) };
        }
    }
}
