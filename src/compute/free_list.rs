//! First-fit free list over one large address range. An allocation takes the lowest free range that
//! is long enough; adjacent free ranges are merged.
//!
//! A training step allocates block by block and frees in the opposite order. With first-fit, nearly
//! everything below the highest address in use is therefore in use, whatever the row lengths.

use std::collections::BTreeMap;

/// First-fit free list over an unbounded address space.
#[derive(Debug, Default)]
pub(super) struct FreeList {
    /// Length of each free range, by its start. No range is empty, touches another one or touches
    /// `end`.
    free: BTreeMap<usize, usize>,
    /// Everything from this address on is free.
    end: usize,
}

impl FreeList {
    pub const fn new() -> Self {
        FreeList {
            free: BTreeMap::new(),
            end: 0,
        }
    }

    /// Returns the end of the last range in use.
    pub fn end(&self) -> usize {
        self.end
    }

    /// Returns the free ranges before the end as (start, length).
    pub fn holes(&self) -> impl Iterator<Item = (usize, usize)> {
        self.free.iter().map(|(at, length)| (*at, *length))
    }

    /// Allocates the lowest free range of `size` and returns its start.
    pub fn allocate(&mut self, size: usize) -> usize {
        let Some((at, length)) = self
            .free
            .iter()
            .find(|(_, length)| **length >= size)
            .map(|(at, length)| (*at, *length))
        else {
            self.end += size;
            return self.end - size;
        };
        self.free.remove(&at);
        if length > size {
            self.free.insert(at + size, length - size);
        }
        at
    }

    /// Frees a range that [`FreeList::allocate`] returned and merges it with adjacent free ranges.
    pub fn release(&mut self, at: usize, size: usize) {
        debug_assert!(
            size == 0 || !self.is_free(at, size),
            "[{at}, {}) is freed twice",
            at + size
        );
        let (mut start, mut end) = (at, at + size);
        if let Some((&before, &length)) = self.free.range(..at).next_back()
            && before + length == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(length) = self.free.remove(&end) {
            end += length;
        }
        if end == self.end {
            self.end = start;
        } else {
            self.free.insert(start, end - start);
        }
    }

    /// Returns true if nothing in `at..at + size` is in use.
    pub fn is_free(&self, at: usize, size: usize) -> bool {
        let until = (at + size).min(self.end);
        at >= until
            || self
                .free
                .range(..=at)
                .next_back()
                .is_some_and(|(start, length)| start + length >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_never_overlap_and_grow_together_again() {
        let mut random = 7u64;
        let mut next = move |n: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % n
        };
        let mut ranges = FreeList::default();
        let mut taken: Vec<(usize, usize)> = Vec::new();
        for _ in 0..20_000 {
            if taken.is_empty() || next(100) < 51 {
                let size = 1 + next(50) as usize;
                let at = ranges.allocate(size);
                assert!(
                    taken.iter().all(|(a, s)| at + size <= *a || a + s <= at),
                    "[{at}, {}) is in use",
                    at + size
                );
                taken.push((at, size));
            } else {
                let (at, size) = taken.swap_remove(next(taken.len() as u64) as usize);
                assert!(!ranges.is_free(at, size));
                ranges.release(at, size);
                assert!(ranges.is_free(at, size));
            }
            let used: usize = taken.iter().map(|(_, s)| s).sum();
            assert_eq!(ranges.end - ranges.free.values().sum::<usize>(), used);
        }
        for (at, size) in taken {
            ranges.release(at, size);
        }
        assert!(ranges.free.is_empty() && ranges.end == 0);
    }

    #[test]
    fn rows_of_any_length_take_no_more_than_the_longest() {
        let mut ranges = FreeList::default();
        let mut highest = 0;
        for row in [900, 2048, 1300, 700, 1999, 2048, 64] {
            let blocks: Vec<[(usize, usize); 3]> = (0..32)
                .map(|_| {
                    let passing = ranges.allocate(row * 5);
                    let block = [row * 4, row * 12, row].map(|size| (ranges.allocate(size), size));
                    ranges.release(passing, row * 5);
                    block
                })
                .collect();
            highest = highest.max(ranges.end);
            for block in blocks.iter().rev() {
                for (at, size) in block {
                    ranges.release(*at, *size);
                }
            }
        }
        assert_eq!(ranges.end, 0);
        assert!(highest <= 2048 * (17 * 32 + 5), "{highest}");
    }
}
