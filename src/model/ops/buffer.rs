//! Reused memory for activations: fresh pages cost more than the work on them, and a large allocation is fresh pages every time.
//!
//! Buffers come from one pool and go back to it when dropped. Their content is whatever was there before.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Free buffers kept at most.
const MAX_FREE: usize = 512;

static FREE: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// A slice of f32 (or of as many 4-byte units) from the pool.
#[derive(Debug, Default)]
pub struct Buffer {
    storage: Vec<f32>,
    len: usize,
}

impl Buffer {
    /// `len` values with any content.
    pub fn dirty(len: usize) -> Self {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |v: &Vec<f32>| v.len() >= len && v.len() / 2 <= len.max(1024);
        let best = free.iter().enumerate().filter(|(_, v)| fits(v)).min_by_key(|(_, v)| v.len()).map(|(i, _)| i);
        let storage = match best {
            Some(i) => free.swap_remove(i),
            None => {
                drop(free);
                // Sizes are rounded, so that rows of almost the same length share buffers.
                vec![0f32; len.max(1).next_multiple_of(if len > 1 << 16 { 1 << 15 } else { 1 << 10 })]
            }
        };
        Buffer { storage, len }
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

    /// Gives the free buffers back to the allocator, e.g. when a run has ended.
    pub fn trim() {
        FREE.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.storage[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.storage[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.storage.is_empty() {
            return;
        }
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() >= MAX_FREE {
            // The one longest unused is the least likely to fit again.
            free.remove(0);
        }
        free.push(std::mem::take(&mut self.storage));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_the_length_asked_for_and_zeros_are_zero() {
        {
            let mut b = Buffer::dirty(5000);
            b.fill(7.0);
        }
        let b = Buffer::zeros(4900);
        assert_eq!(b.len(), 4900);
        assert!(b.iter().all(|x| *x == 0.0));
        assert_eq!(b.units().len(), 4900);
    }
}
