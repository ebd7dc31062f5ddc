//! Matrix products: C = keep·C + Σ_t A_t·B_t, packed, for f32 and for bf16 operands with f32 accumulation.
//!
//! B (the weights, mostly) is packed into panels of [`NR`] columns on the way, a block at a time, so that one row-major copy of a weight serves the
//! forward product x·Wᵀ and the backward product g·W. A is used as it lies (f32) or rounded row by row (bf16). The sum over k runs in one order that
//! depends on nothing but k: **a row of C is the same bit for bit whatever other rows are computed with it, and on however many threads**.

mod amx;
mod kernel;
mod operand;
mod pack;
#[cfg(test)]
mod tests;
mod tiles;

pub use self::kernel::Kernel;
pub(crate) use self::kernel::{Product, panel_product};
pub use self::operand::Operand;
pub(crate) use self::pack::pack_panel;
pub use self::tiles::{TiledOperand, matmul_tiles};
use super::buffer::Buffer;
use super::team;
use half::bf16;

/// Columns of a panel of B.
pub const NR: usize = 32;
/// Rows that a kernel may read past the last one of A, so that tiles need no edge case.
pub(crate) const ROW_PADDING: usize = 16;
/// Units of depth in a block of B: a panel of them fits the L2 cache.
const BLOCK_DEPTH: usize = 1024;
/// Units of B packed at one time: they fit the L3 cache.
const BLOCK_UNITS: usize = 1 << 20;
/// Up to so many units of A, which then stay in the L2 cache, every thread packs the panels that it multiplies.
const SMALL_A: usize = 1 << 18;
/// Up to so many rows of A, reading B is what takes time: its rows are read one after the other, a slice of this many units at a time.
const NARROW: usize = 64;
const SLICE_DEPTH: usize = 64;
/// Below this many multiplications, threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 19;

/// Whether a product may use every core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The caller is itself one of many parallel tasks.
    One,
    /// The team.
    All,
}

/// Elements of a matrix.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// 32-bit.
    F32(&'a [f32]),
    /// 16-bit, as bf16 models store their weights.
    Bf16(&'a [bf16]),
}

impl Elements<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Elements::F32(v) => v.len(),
            Elements::Bf16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A read-only strided view of an `m × n` matrix; one of the strides is 1.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(crate) elements: Elements<'a>,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a> View<'a> {
    /// f32, row-major, with rows `stride` apart.
    pub fn f32(values: &'a [f32], stride: usize) -> Self {
        View { elements: Elements::F32(values), row_stride: stride, col_stride: 1 }
    }

    /// Row-major with rows `stride` apart.
    pub fn of(elements: Elements<'a>, stride: usize) -> Self {
        View { elements, row_stride: stride, col_stride: 1 }
    }

    /// The transpose, without a copy.
    pub fn t(self) -> Self {
        View { elements: self.elements, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// Whether every element of an `m × n` matrix is inside.
    pub(crate) fn covers(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.elements.len()
    }
}

/// One A·B of a sum of products.
#[derive(Clone, Copy)]
pub struct Term<'a> {
    /// A `[m, k]`.
    pub a: &'a Operand<'a>,
    /// B `[k, n]`.
    pub b: View<'a>,
}

/// A piece of a term whose depth fits a block.
struct Piece<'a> {
    term: Term<'a>,
    /// Where it starts in k, in elements.
    start: usize,
    /// Elements of k.
    k: usize,
    /// Padded units of k.
    depth: usize,
}

/// `c = keep·c + Σ A·B` with `c` row-major `[m, n]`, rows `stride` apart; `keep` adds to what is there.
///
/// # Panics
/// When a view is smaller than its product (a bug of the caller).
pub fn matmul(m: usize, n: usize, terms: &[Term], c: &mut [f32], stride: usize, keep: bool, threads: Threads) {
    let Some(first) = terms.first() else { return };
    if m == 0 || n == 0 {
        return;
    }
    let kernel = first.a.kernel;
    assert!(stride >= n && c.len() >= (m - 1) * stride + n, "matmul: the output is smaller than {m}x{n}");
    for t in terms {
        assert!(t.a.rows == m && t.a.kernel == kernel && t.b.covers(t.a.cols, n), "matmul: a term does not fit {m}x{}x{n}", t.a.cols);
    }
    let work: usize = terms.iter().map(|t| m * n * t.a.cols).sum();
    let threads = if work < PARALLEL_FROM { Threads::One } else { threads };
    if m <= NARROW && kernel != Kernel::Amx && terms.iter().all(|t| t.b.col_stride == 1) {
        return by_slices(kernel, (m, n), &blocks(kernel, terms, SLICE_DEPTH), c, stride, keep, threads);
    }
    let mut keep = keep;
    for block in blocks(kernel, terms, BLOCK_DEPTH) {
        block_product(kernel, (m, n), &block, c, stride, keep, threads);
        keep = true;
    }
}

/// Cuts the sum over all terms into blocks of at most `most` units.
fn blocks<'a>(kernel: Kernel, terms: &[Term<'a>], most: usize) -> Vec<Vec<Piece<'a>>> {
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
    keep: bool,
}

impl BlockTask<'_> {
    /// Packs a panel of B.
    fn pack(&self, panel: usize, units: &mut [u32]) {
        pack_pieces(self.kernel, self.pieces, self.n, panel, units);
    }

    /// Some rows of A times a packed panel.
    fn run(&self, rows: std::ops::Range<usize>, panel: usize, units: &[u32]) {
        let column = panel * NR;
        // SAFETY: rows and columns lie inside the output, which the assertion in `matmul` bounds; tasks have disjoint rows or panels.
        unsafe {
            let dst = self.out.at(rows.start * self.stride + column);
            multiply(self.kernel, self.pieces, rows, NR.min(self.n - column), units, dst, self.stride, self.keep);
        }
    }
}

/// Packs panel number `panel` of B `[.., n]`, the pieces one after the other.
fn pack_pieces(kernel: Kernel, pieces: &[Piece], n: usize, panel: usize, units: &mut [u32]) {
    let column = panel * NR;
    let mut at = 0;
    for p in pieces {
        let to = &mut units[at * NR..(at + p.depth) * NR];
        pack_panel(kernel, p.term.b, p.start, p.k, column, NR.min(n - column), to);
        at += p.depth;
    }
}

/// `dst` = keep·dst + some rows of A times a packed panel, of which the first `columns` are wanted.
///
/// # Safety
/// `dst` is valid for the rows, `stride` apart, and nobody else touches them; the pieces' operands have the rows.
unsafe fn multiply(
    kernel: Kernel,
    pieces: &[Piece],
    rows: std::ops::Range<usize>,
    columns: usize,
    units: &[u32],
    dst: *mut f32,
    stride: usize,
    keep: bool,
) {
    let mut products = [Product::EMPTY; 8];
    let (mut at, mut keep) = (0, keep);
    for eight in pieces.chunks(8) {
        for (slot, p) in products.iter_mut().zip(eight) {
            *slot = p.term.a.product(rows.start, p.start, p.depth, &units[at..]);
            at += p.depth * NR;
        }
        // SAFETY: by the caller; the products point into operands that cover rows and depth, padding included.
        unsafe { panel_product(kernel, rows.len(), columns, &products[..eight.len()], dst, stride, keep) };
        keep = true;
    }
}

fn block_product(kernel: Kernel, (m, n): (usize, usize), pieces: &[Piece], c: &mut [f32], stride: usize, keep: bool, threads: Threads) {
    let depth: usize = pieces.iter().map(|p| p.depth).sum();
    let task = BlockTask { kernel, m, n, pieces, depth, out: Shared(c.as_mut_ptr()), stride, keep };
    match threads {
        Threads::One => by_panels(&task, 0..n.div_ceil(NR)),
        Threads::All if m * depth <= SMALL_A && n.div_ceil(NR) >= 2 * team::threads() => {
            let (panels, tasks) = (n.div_ceil(NR), (8 * team::threads()).min(n.div_ceil(NR)));
            team::for_each(tasks, |i| by_panels(&task, panels * i / tasks..panels * (i + 1) / tasks));
        }
        Threads::All => by_rows(&task),
    }
}

/// Slices of B's rows outside, panels inside: for so few rows that the output stays in the L2 cache.
fn by_slices(kernel: Kernel, (m, n): (usize, usize), slices: &[Vec<Piece>], c: &mut [f32], stride: usize, keep: bool, threads: Threads) {
    let panels = n.div_ceil(NR);
    let tasks = if threads == Threads::All { panels.min(2 * team::threads()) } else { 1 };
    let out = Shared(c.as_mut_ptr());
    team::for_each(tasks, |i| {
        for (s, pieces) in slices.iter().enumerate() {
            let depth = pieces.iter().map(|p| p.depth).sum();
            let task = BlockTask { kernel, m, n, pieces, depth, out, stride, keep: keep || s > 0 };
            by_panels(&task, panels * i / tasks..panels * (i + 1) / tasks);
        }
    });
}

/// Packs one panel after the other and multiplies it at once, while it is in the nearest cache: for few rows, whose A is there too.
fn by_panels(task: &BlockTask, panels: std::ops::Range<usize>) {
    let mut packed = Buffer::dirty(task.depth * NR);
    for panel in panels {
        task.pack(panel, packed.units_mut());
        task.run(0..task.m, panel, packed.units());
    }
}

/// Packs a group of panels together, then shares the rows out: a task's part of A stays in its cache while the panels pass.
fn by_rows(task: &BlockTask) {
    let (depth, panels) = (task.depth, task.n.div_ceil(NR));
    let group = (BLOCK_UNITS / (depth * NR)).clamp(1, panels);
    let mut packed = Buffer::dirty(group * depth * NR);
    for first in (0..panels).step_by(group) {
        let count = group.min(panels - first);
        team::chunks(&mut packed.units_mut()[..count * depth * NR], depth * NR, |i, units| task.pack(first + i, units));
        let units = packed.units();
        let tasks = grid(task.kernel, task.m, count);
        team::for_each(tasks.len(), |t| {
            for i in tasks[t].1.clone() {
                task.run(tasks[t].0.clone(), first + i, &units[i * depth * NR..(i + 1) * depth * NR]);
            }
        });
    }
}

/// Cuts the output into tasks of equal size: by rows where there are enough, so that a task's part of A stays in its cache; else by panels too.
fn grid(kernel: Kernel, m: usize, panels: usize) -> Vec<(std::ops::Range<usize>, std::ops::Range<usize>)> {
    let threads = team::threads();
    let step = kernel.rows();
    let strips = m.div_ceil(step);
    // About as many rows a task as A's part in the L2 cache allows, and a multiple of the number of threads.
    let rows = if kernel == Kernel::Amx { 256 } else { 128 };
    let row_tasks = (threads * (m.div_ceil(rows * threads))).clamp(1, strips);
    let panel_tasks = if row_tasks >= threads { 1 } else { (2 * threads).div_ceil(row_tasks).min(panels) };
    let cut = |n: usize, parts: usize, i: usize| n * i / parts;
    let mut tasks = Vec::with_capacity(row_tasks * panel_tasks);
    for r in 0..row_tasks {
        let rows = cut(strips, row_tasks, r) * step..(cut(strips, row_tasks, r + 1) * step).min(m);
        for p in 0..panel_tasks {
            tasks.push((rows.clone(), cut(panels, panel_tasks, p)..cut(panels, panel_tasks, p + 1)));
        }
    }
    tasks
}
