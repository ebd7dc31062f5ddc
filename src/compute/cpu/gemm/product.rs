//! Sums of GEMMs, blocked by depth so that packed panels fit the caches, and distributed over the
//! threads.

use std::ops::Range;

use super::kernel::{Kernel, panel_product};
use super::operand::Operand;
use super::panel::{NR, OutputTile, Product};
use super::weight::RightOperand;
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::thread_pool;

/// Maximum depth of a block of B, in units. A panel of this depth fits the L2 cache.
const BLOCK_DEPTH: usize = 1024;
/// Maximum units of B that a task packs before it multiplies them with A, unless a single panel is
/// larger. Usually this is all of its share.
const GROUP_UNITS: usize = 1 << 19;
/// Units of A that are multiplied at a time. They stay in the L2 cache while the panels change.
const PASS_UNITS: usize = 1 << 17;
/// Minimum number of rows that are worth a task of their own.
const MIN_CUT_ROWS: usize = 32;
/// For at most this many rows of A, the GEMM is bound by reading B. B's rows are then read in
/// order, in slices of [`SLICE_DEPTH`] units, if they are contiguous and the kernel is not AMX.
const NARROW_ROWS: usize = 64;
const SLICE_DEPTH: usize = 64;
/// Number of multiplications from which a GEMM uses several threads.
const MIN_PARALLEL_MULTIPLICATIONS: usize = 1 << 19;
/// Number of elements of B from which a GEMM uses several threads, however few rows A has: reading
/// and packing B then takes most of the time.
const MIN_PARALLEL_ELEMENTS: usize = 1 << 15;

/// Returns the maximum size in bytes of the panels of B that all threads together have packed at
/// one time. If a single panel has more than 2¹⁹ units, the size is larger.
pub fn packed_bytes() -> usize {
    thread_pool::threads() * GROUP_UNITS * size_of::<u32>()
}

/// Threads that a GEMM may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread only, because the caller is already one of many parallel tasks.
    One,
    /// All threads of the pool.
    All,
}

/// One term A·B of a sum of GEMMs.
#[derive(Clone, Copy)]
pub struct Term<'a> {
    /// A `[m, k]`.
    pub a: &'a Operand<'a>,
    /// B `[k, n]`.
    pub b: RightOperand<'a>,
}

impl<'a> Term<'a> {
    /// Returns the term A·B.
    pub fn new(a: &'a Operand<'a>, b: impl Into<RightOperand<'a>>) -> Self {
        Term { a, b: b.into() }
    }
}

/// Part of a term along its depth, short enough for one block.
pub(super) struct Piece<'a> {
    term: Term<'a>,
    /// Start in k, in elements.
    start: usize,
    /// Length in k, in elements.
    k: usize,
    /// Length in k, in units, padding included.
    pub(super) depth: usize,
}

/// Computes `c = Σ A·B` with `c` row-major `[m, n]` and rows `stride` elements apart. With
/// `accumulate`, adds the sum to the values of `c`.
///
/// # Panics
/// Panics if a view is smaller than the matrix it stands for (a bug of the caller).
pub fn matmul(
    m: usize,
    n: usize,
    terms: &[Term],
    c: &mut [f32],
    stride: usize,
    accumulate: bool,
    threads: Threads,
) {
    let Some(first) = terms.first() else { return };
    if m == 0 || n == 0 {
        return;
    }
    let kernel = first.a.kernel;
    assert!(
        stride >= n && c.len() >= (m - 1) * stride + n,
        "matmul: the output is smaller than {m}x{n}"
    );
    for t in terms {
        assert!(
            t.a.rows == m && t.a.kernel == kernel && t.b.covers(t.a.cols, n),
            "matmul: a term does not fit {m}x{}x{n}",
            t.a.cols
        );
    }
    let elements: usize = terms.iter().map(|t| n * t.a.cols).sum();
    let threads = if is_small(m, elements) {
        Threads::One
    } else {
        threads
    };
    if m <= NARROW_ROWS && kernel != Kernel::Amx && terms.iter().all(|t| t.b.has_contiguous_rows())
    {
        return by_slices(
            kernel,
            (m, n),
            &blocks(kernel, terms, SLICE_DEPTH),
            c,
            stride,
            accumulate,
            threads,
        );
    }
    let mut accumulate = accumulate;
    for block in blocks(kernel, terms, BLOCK_DEPTH) {
        block_product(kernel, (m, n), &block, c, stride, accumulate, threads);
        accumulate = true;
    }
}

/// Returns true if starting threads costs more than it saves. A has `m` rows, and the right
/// operands of all terms have `elements` elements.
pub(super) fn is_small(m: usize, elements: usize) -> bool {
    m * elements < MIN_PARALLEL_MULTIPLICATIONS && elements < MIN_PARALLEL_ELEMENTS
}

/// Splits the sum over all terms into blocks with a depth of at most `most` units.
pub(super) fn blocks<'a>(kernel: Kernel, terms: &[Term<'a>], most: usize) -> Vec<Vec<Piece<'a>>> {
    let mut blocks: Vec<Vec<Piece>> = Vec::new();
    let mut room = 0;
    for term in terms {
        let mut start = 0;
        while start < term.a.cols {
            let k = (term.a.cols - start).min(kernel.elements(most));
            let depth = kernel.depth(k);
            if depth > room {
                blocks.push(Vec::new());
                room = most;
            }
            room -= depth;
            if let Some(block) = blocks.last_mut() {
                block.push(Piece {
                    term: *term,
                    start,
                    k,
                    depth,
                });
            }
            start += k;
        }
    }
    blocks
}

/// Pointer that tasks share because they write disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct Shared(pub *mut f32);
// SAFETY: the code that creates a `Shared` guarantees that tasks touch disjoint elements.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Returns the pointer advanced by `offset` elements. It is a method so that closures capture
    /// the whole struct instead of the raw pointer, which is not `Sync`.
    ///
    /// # Safety
    /// `offset` stays inside the allocation.
    pub(crate) unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: forwarded to the caller.
        unsafe { self.0.add(offset) }
    }
}

/// State shared by the tasks of one block.
struct BlockTask<'a> {
    kernel: Kernel,
    m: usize,
    n: usize,
    pieces: &'a [Piece<'a>],
    depth: usize,
    out: Shared,
    stride: usize,
    accumulate: bool,
}

impl BlockTask<'_> {
    fn pack(&self, panel: usize, units: &mut [u32]) {
        pack_pieces(self.kernel, self.pieces, self.n, panel, units);
    }

    /// Multiplies some rows of A with the packed panel `units` and writes the result to `out`.
    fn run(&self, rows: Range<usize>, panel: usize, units: &[u32]) {
        let column = panel * NR;
        // SAFETY: rows and columns lie inside the output, which the assertion in `matmul` bounds;
        // tasks have disjoint rows or panels.
        unsafe {
            let c = self.out.at(rows.start * self.stride + column);
            let columns = NR.min(self.n - column);
            let out = OutputTile {
                c,
                stride: self.stride,
                columns,
                accumulate: self.accumulate,
            };
            multiply(self.kernel, self.pieces, rows, units, out);
        }
    }
}

/// Packs panel number `panel` of B `[.., n]`: the pieces of the block one after the other.
pub(super) fn pack_pieces(
    kernel: Kernel,
    pieces: &[Piece],
    n: usize,
    panel: usize,
    units: &mut [u32],
) {
    let column = panel * NR;
    let mut at = 0;
    for p in pieces {
        let to = &mut units[at * NR..(at + p.depth) * NR];
        p.term.b.pack(
            kernel,
            p.start..p.start + p.k,
            column..n.min(column + NR),
            to,
        );
        at += p.depth;
    }
}

/// Multiplies some rows of A with the packed panel `units` and writes the result to `out`.
///
/// # Safety
/// `out` is valid for the rows and no other thread touches them. The operands of the pieces have
/// these rows.
pub(super) unsafe fn multiply(
    kernel: Kernel,
    pieces: &[Piece],
    rows: Range<usize>,
    units: &[u32],
    out: OutputTile,
) {
    let mut products = [Product::EMPTY; 8];
    let (mut at, mut out) = (0, out);
    for eight in pieces.chunks(8) {
        for (slot, p) in products.iter_mut().zip(eight) {
            *slot = p.term.a.product(rows.start, p.start, p.depth, &units[at..]);
            at += p.depth * NR;
        }
        // SAFETY: guaranteed by the caller; the products point into operands that cover rows and
        // depth, padding included.
        unsafe { panel_product(kernel, rows.len(), &products[..eight.len()], out) };
        out.accumulate = true;
    }
}

/// Multiplies one block of the sum and writes it to `c`, or adds it with `accumulate`.
fn block_product(
    kernel: Kernel,
    (m, n): (usize, usize),
    pieces: &[Piece],
    c: &mut [f32],
    stride: usize,
    accumulate: bool,
    threads: Threads,
) {
    let depth: usize = pieces.iter().map(|p| p.depth).sum();
    let task = BlockTask {
        kernel,
        m,
        n,
        pieces,
        depth,
        out: Shared(c.as_mut_ptr()),
        stride,
        accumulate,
    };
    match threads {
        Threads::One => by_panels(&task, 0..n.div_ceil(NR)),
        Threads::All => by_groups(
            kernel,
            (m, n.div_ceil(NR)),
            (depth * NR, 0),
            |panel, units| task.pack(panel, units),
            |rows, panel, units, _| task.run(rows, panel, units),
        ),
    }
}

/// Multiplies with the slices of B in the outer loop and the panels in the inner loop. Used when A
/// has so few rows that the output stays in the L2 cache.
fn by_slices(
    kernel: Kernel,
    (m, n): (usize, usize),
    slices: &[Vec<Piece>],
    c: &mut [f32],
    stride: usize,
    accumulate: bool,
    threads: Threads,
) {
    let panels = n.div_ceil(NR);
    let tasks = if threads == Threads::All {
        panels.min(2 * thread_pool::threads())
    } else {
        1
    };
    let out = Shared(c.as_mut_ptr());
    thread_pool::for_each(tasks, |i| {
        for (s, pieces) in slices.iter().enumerate() {
            let depth = pieces.iter().map(|p| p.depth).sum();
            let task = BlockTask {
                kernel,
                m,
                n,
                pieces,
                depth,
                out,
                stride,
                accumulate: accumulate || s > 0,
            };
            by_panels(&task, panels * i / tasks..panels * (i + 1) / tasks);
        }
    });
}

/// Packs one panel after the other and multiplies each at once, while it is in the cache: L1 for a
/// slice of [`by_slices`], L2 for a whole block of a GEMM on one thread.
fn by_panels(task: &BlockTask, panels: Range<usize>) {
    let mut packed = Buffer::uninit(task.depth * NR);
    for panel in panels {
        task.pack(panel, packed.units_mut());
        task.run(0..task.m, panel, packed.units());
    }
}

/// Distributes the panels over the threads. A task packs a group of panels (`units` units each) for
/// itself alone and multiplies a few rows of A at a time with all of them, so that packed panels
/// stay in the caches of the core that packed them. If all rows are multiplied at once, each panel
/// is multiplied right after it is packed. Each task gets scratch memory of `scratch` values per
/// row.
pub(super) fn by_groups(
    kernel: Kernel,
    (m, panels): (usize, usize),
    (units, scratch): (usize, usize),
    pack: impl Fn(usize, &mut [u32]) + Sync,
    run: impl Fn(Range<usize>, usize, &[u32], &mut [f32]) + Sync,
) {
    let (threads, step) = (thread_pool::threads(), kernel.rows());
    let pass = (PASS_UNITS * NR / units.max(1) / step).max(1) * step;
    let panels_per_pack = if m <= pass {
        1
    } else {
        (GROUP_UNITS / units).max(1)
    };
    let groups = if m <= pass {
        8 * threads
    } else {
        panels.div_ceil(panels_per_pack).next_multiple_of(threads)
    }
    .min(panels);
    // If there are fewer panels than threads, e.g. for a low LoRA rank, the rows are divided too,
    // and each task packs the panels it needs.
    let cuts = if groups < threads {
        (2 * threads).div_ceil(groups).min(m.div_ceil(MIN_CUT_ROWS))
    } else {
        1
    };
    let strips = m.div_ceil(step);
    thread_pool::for_each(groups * cuts, |task| {
        let (group, cut) = (task % groups, task / groups);
        let group = panels * group / groups..panels * (group + 1) / groups;
        let rows = strips * cut / cuts * step..(strips * (cut + 1) / cuts * step).min(m);
        let (mut packed, mut scratch) = (
            Buffer::uninit(panels_per_pack.min(group.len()) * units),
            Buffer::uninit(pass.min(m) * scratch),
        );
        for first in group.clone().step_by(panels_per_pack) {
            let some = first..(first + panels_per_pack).min(group.end);
            for panel in some.clone() {
                pack(
                    panel,
                    &mut packed.units_mut()[(panel - first) * units..][..units],
                );
            }
            for start in rows.clone().step_by(pass) {
                for panel in some.clone() {
                    run(
                        start..(start + pass).min(rows.end),
                        panel,
                        &packed.units()[(panel - first) * units..][..units],
                        &mut scratch,
                    );
                }
            }
        }
    });
}
