//! Sums of products: cut into blocks of a depth that the caches hold, shared out among the threads.

use std::ops::Range;

use super::kernel::{Kernel, panel_product};
use super::operand::Operand;
use super::panel::{NR, OutputTile, Product};
use super::weight::RightOperand;
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::thread_pool;

/// Units of depth in a block of B: a panel of them fits the L2 cache.
const BLOCK_DEPTH: usize = 1024;
/// Units of B that a task packs before A passes them: all of its part, mostly.
const GROUP_UNITS: usize = 1 << 19;
/// Units of A that pass at a time: they stay in the L2 cache while the panels change.
const PASS_UNITS: usize = 1 << 17;
/// Rows that are worth a task of their own.
const CUT_ROWS: usize = 32;
/// Up to so many rows of A, reading B is what takes time: its rows are read one after the other, a
/// slice of this many units at a time.
const NARROW: usize = 64;
const SLICE_DEPTH: usize = 64;
/// Below this many multiplications, threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 19;

/// Bytes of the panels of B that all threads together may have packed at one time.
pub fn packed_bytes() -> usize {
    thread_pool::threads() * GROUP_UNITS * size_of::<u32>()
}

/// Whether a product may use every core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The caller is itself one of many parallel tasks.
    One,
    /// The thread pool.
    All,
}

/// One A·B of a sum of products.
#[derive(Clone, Copy)]
pub struct Term<'a> {
    /// A `[m, k]`.
    pub a: &'a Operand<'a>,
    /// B `[k, n]`.
    pub b: RightOperand<'a>,
}

impl<'a> Term<'a> {
    /// Returns A·B.
    pub fn new(a: &'a Operand<'a>, b: impl Into<RightOperand<'a>>) -> Self {
        Term { a, b: b.into() }
    }
}

/// A piece of a term whose depth fits a block.
pub(super) struct Piece<'a> {
    term: Term<'a>,
    /// Where it starts in k, in elements.
    start: usize,
    /// Elements of k.
    k: usize,
    /// Padded units of k.
    pub(super) depth: usize,
}

/// Computes `c = Σ A·B`, with `c` row-major `[m, n]`, rows `stride` apart; `accumulate` adds the
/// sum to what `c` holds.
///
/// # Panics
/// When a view is smaller than its product (a bug of the caller).
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
    let work: usize = terms.iter().map(|t| m * n * t.a.cols).sum();
    let threads = if work < PARALLEL_FROM { Threads::One } else { threads };
    if m <= NARROW && kernel != Kernel::Amx && terms.iter().all(|t| t.b.has_contiguous_rows()) {
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

/// Cuts the sum over all terms into blocks of at most `most` units.
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
                block.push(Piece { term: *term, start, k, depth });
            }
            start += k;
        }
    }
    blocks
}

/// A pointer that tasks may share because they write disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct Shared(pub *mut f32);
// SAFETY: whoever makes one promises that tasks touch disjoint elements.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// The pointer `offset` elements on. A method, so that closures capture the whole struct.
    ///
    /// # Safety
    /// `offset` stays inside the allocation.
    pub(crate) unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: forwarded to the caller.
        unsafe { self.0.add(offset) }
    }
}

/// Everything that the tasks of a block share.
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
    /// Packs a panel of B.
    fn pack(&self, panel: usize, units: &mut [u32]) {
        pack_pieces(self.kernel, self.pieces, self.n, panel, units);
    }

    /// Some rows of A times a packed panel.
    fn run(&self, rows: Range<usize>, panel: usize, units: &[u32]) {
        let column = panel * NR;
        // SAFETY: rows and columns lie inside the output, which the assertion in `matmul` bounds;
        // tasks have disjoint rows or panels.
        unsafe {
            let c = self.out.at(rows.start * self.stride + column);
            let columns = NR.min(self.n - column);
            let out = OutputTile { c, stride: self.stride, columns, accumulate: self.accumulate };
            multiply(self.kernel, self.pieces, rows, units, out);
        }
    }
}

/// Packs panel number `panel` of B `[.., n]`, the pieces one after the other.
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
        p.term.b.pack(kernel, p.start..p.start + p.k, column..n.min(column + NR), to);
        at += p.depth;
    }
}

/// Multiplies some rows of A with a packed panel, `units`, into `out`.
///
/// # Safety
/// `out` is valid for the rows and nobody else touches them; the pieces' operands have the rows.
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
        // SAFETY: by the caller; the products point into operands that cover rows and depth,
        // padding included.
        unsafe { panel_product(kernel, rows.len(), &products[..eight.len()], out) };
        out.accumulate = true;
    }
}

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
    let task =
        BlockTask { kernel, m, n, pieces, depth, out: Shared(c.as_mut_ptr()), stride, accumulate };
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

/// Slices of B's rows outside, panels inside: for so few rows that the output stays in the L2
/// cache.
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
    let tasks = if threads == Threads::All { panels.min(2 * thread_pool::threads()) } else { 1 };
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

/// Packs one panel after the other and multiplies it at once, while it is in the nearest cache: for
/// few rows, whose A is there too.
fn by_panels(task: &BlockTask, panels: Range<usize>) {
    let mut packed = Buffer::dirty(task.depth * NR);
    for panel in panels {
        task.pack(panel, packed.units_mut());
        task.run(0..task.m, panel, packed.units());
    }
}

/// Shares out the panels: a task packs a group of them, `units` each, for itself alone, and takes a
/// few rows of A at a time through all of them, so that a packed panel stays near the core that
/// packed it. Where all rows pass at once, each panel is multiplied as soon as it is packed. A task
/// has `room` values for each row to work in.
pub(super) fn by_groups(
    kernel: Kernel,
    (m, panels): (usize, usize),
    (units, room): (usize, usize),
    pack: impl Fn(usize, &mut [u32]) + Sync,
    run: impl Fn(Range<usize>, usize, &[u32], &mut [f32]) + Sync,
) {
    let (threads, step) = (thread_pool::threads(), kernel.rows());
    let pass = (PASS_UNITS * NR / units.max(1) / step).max(1) * step;
    let held = if m <= pass { 1 } else { (GROUP_UNITS / units).max(1) };
    let groups =
        if m <= pass { 8 * threads } else { panels.div_ceil(held).next_multiple_of(threads) }
            .min(panels);
    // Fewer panels than threads, as for a low rank: the rows are shared out, too, and each task
    // packs what it needs.
    let cuts =
        if groups < threads { (2 * threads).div_ceil(groups).min(m.div_ceil(CUT_ROWS)) } else { 1 };
    let strips = m.div_ceil(step);
    thread_pool::for_each(groups * cuts, |task| {
        let (group, cut) = (task % groups, task / groups);
        let group = panels * group / groups..panels * (group + 1) / groups;
        let rows = strips * cut / cuts * step..(strips * (cut + 1) / cuts * step).min(m);
        let (mut packed, mut room) =
            (Buffer::dirty(held.min(group.len()) * units), Buffer::dirty(pass.min(m) * room));
        for first in group.clone().step_by(held) {
            let some = first..(first + held).min(group.end);
            for panel in some.clone() {
                pack(panel, &mut packed.units_mut()[(panel - first) * units..][..units]);
            }
            for start in rows.clone().step_by(pass) {
                for panel in some.clone() {
                    run(
                        start..(start + pass).min(rows.end),
                        panel,
                        &packed.units()[(panel - first) * units..][..units],
                        &mut room,
                    );
                }
            }
        }
    });
}
