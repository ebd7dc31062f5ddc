//! Page-locked host memory through which values are copied to the device.
//!
//! On machines whose GPU reads the host's page tables, a copy from ordinary memory may still read
//! its source after the call has returned, and callers drop their sources right after the call.
//! Values are therefore first copied into one of a few page-locked slots, which are used in turn. A
//! slot is written again only after the stream has passed the event recorded behind the slot's last
//! copy.

use std::ffi::c_void;

use cudarc::driver::{DriverError, result as driver, sys};

/// Size of a slot in bytes.
const SLOT_BYTES: usize = 4 << 20;

/// Number of slots: one is filled while the device reads the others.
const SLOTS: usize = 4;

/// Ring of page-locked slots for the copies of one stream.
pub(super) struct Staging {
    slots: Vec<Slot>,
    current: usize,
    /// Bytes of the current slot that copies in flight may still read.
    used: usize,
}

struct Slot {
    memory: *mut c_void,
    /// Recorded after the last copy out of the slot.
    read: sys::CUevent,
}

// SAFETY: page-locked memory and events belong to the context, not to a thread.
unsafe impl Send for Staging {}

impl Staging {
    /// Allocates the slots. The GPU's context must be current.
    pub fn open() -> Result<Self, DriverError> {
        let mut staging = Staging {
            slots: Vec::with_capacity(SLOTS),
            current: 0,
            used: 0,
        };
        for _ in 0..SLOTS {
            // SAFETY: the context is current; `close` frees both.
            let memory = unsafe { driver::malloc_host(SLOT_BYTES, 0) }?;
            let read = driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            staging.slots.push(Slot { memory, read });
        }
        Ok(staging)
    }

    /// Enqueues a copy of `values` to the device address `to` on `stream`. The caller may drop the
    /// values as soon as this returns.
    ///
    /// # Safety
    /// The device memory at `to` is at least as long as the values.
    pub unsafe fn copy(
        &mut self,
        to: u64,
        values: &[u8],
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        let mut done = 0;
        while done < values.len() {
            if self.used == SLOT_BYTES {
                self.next_slot(stream)?;
            }
            let piece = &values[done..values.len().min(done + SLOT_BYTES - self.used)];
            // SAFETY: the slot has room for the piece, and no copy in flight reads that part of it.
            let staged = unsafe {
                let start = self.slots[self.current].memory.cast::<u8>().add(self.used);
                std::ptr::copy_nonoverlapping(piece.as_ptr(), start, piece.len());
                std::slice::from_raw_parts(start, piece.len())
            };
            self.used += piece.len();
            // SAFETY: the caller's memory is long enough; the slot stays until the stream has
            // passed its event.
            unsafe { driver::memcpy_htod_async(to + done as u64, staged, stream) }?;
            done += piece.len();
        }
        Ok(())
    }

    /// Switches to the next slot, after waiting until the device has read it.
    fn next_slot(&mut self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: the events are valid. One that was never recorded does not wait.
        unsafe {
            driver::event::record(self.slots[self.current].read, stream)?;
            let next = (self.current + 1) % self.slots.len();
            driver::event::synchronize(self.slots[next].read)?;
            (self.current, self.used) = (next, 0);
        }
        Ok(())
    }

    /// Frees the slots. The stream must have finished.
    pub fn close(&mut self) {
        for slot in self.slots.drain(..) {
            // SAFETY: the stream has finished, so nothing reads the slots.
            unsafe {
                let _ = driver::free_host(slot.memory);
                let _ = driver::event::destroy(slot.read);
            }
        }
    }
}
