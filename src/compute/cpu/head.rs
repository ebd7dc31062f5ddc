//! The head, log-softmax and gather in one pass over the vocabulary, a tile of it at a time: `[N,
//! V]` is never held.
//!
//! log p(y) = ⟨h, W_y⟩ − log Σ_v e^⟨h, W_v⟩. The maximum, the sum and ∂log p/∂h = W_y − Σ_v p_v·W_v
//! grow together over the tiles, scaled down whenever a larger logit appears (the online softmax of
//! arXiv:2205.14135).

use super::buffer::Buffer;
use super::gemm::{
    Kernel, NR, Operand, Orientation, OutputTile, Shared, Term, Threads, View, WeightView, matmul,
    panel_product,
};
use super::simd::{dispatch, exp, exp_moments, exp_sum, max, sum};
use super::thread_pool;

/// Columns of the vocabulary in a tile; a multiple of [`NR`].
const TILE: usize = 512;
/// Rows that one task handles at most, but for the last strip: they and their logits fit the L2
/// cache together.
const MAX_ROWS: usize = 128;
/// Probabilities that are worth keeping for the weight's gradient: 256 MiB.
pub const KEPT: usize = 1 << 26;

/// Rows of a task: as many tasks for each thread, of about one size, in whole strips of the kernel.
/// No row's result depends on it.
fn rows_per_task(kernel: Kernel, rows: usize) -> usize {
    let turns = 2 * thread_pool::threads();
    let tasks = turns * rows.div_ceil(turns * MAX_ROWS).max(1);
    rows.div_ceil(tasks).max(1).next_multiple_of(kernel.rows())
}

/// What else is known of the distribution that predicted a token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenDistribution {
    /// The mean logit over the vocabulary.
    pub mean_logit: f32,
    /// −Σ p·log p, in nats.
    pub entropy: f32,
    /// log Σ p², in nats.
    pub log_sum_p2: f32,
    /// Whether the target is the most likely token (the first one, on a tie).
    pub is_argmax: bool,
}

/// What to compute besides log-probs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeadOptions {
    /// Fill [`TokenDistribution`]s.
    pub distribution: bool,
    /// Form ∂log p/∂h.
    pub gradient: bool,
    /// The head is trained if this is set: it is the largest number of probabilities that are saved
    /// for [`head_weight_gradient`], which computes the others again, with the same bits.
    pub trained: Option<usize>,
}

/// The inputs of the head's forward and backward pass.
#[derive(Clone, Copy, Debug)]
pub struct HeadInput<'a> {
    /// The kernel of the matrix products.
    pub kernel: Kernel,
    /// The normed hidden states that predict the targets `[N, C]`.
    pub h: &'a [f32],
    /// The head's weight `[V, C]`.
    pub w: WeightView<'a>,
    /// The token that each row predicts `[N]`, below V.
    pub targets: &'a [u32],
}

/// What came out of the head.
#[derive(Debug, Default)]
pub struct HeadOutput {
    /// log p of each target `[N]`.
    pub log_probs: Vec<f32>,
    /// log Σ_v e^logit of each row `[N]`.
    pub log_sum_exp: Vec<f32>,
    /// One per row, or empty when they were not asked for.
    pub distributions: Vec<TokenDistribution>,
    /// ∂log p/∂h `[N, C]`, or empty.
    pub gradient: Buffer,
    /// What was kept for the weight's gradient.
    pub kept: SavedExponentials,
}

/// Probabilities of the first tiles of the vocabulary, up to a factor for each row and tile.
#[derive(Debug, Default)]
pub struct SavedExponentials {
    /// e^(l − m) `[tiles, N, TILE]`, m being the row's largest logit up to and including the tile.
    exponentials: Buffer,
    /// m `[V / TILE, N]`, of all tiles.
    maxima: Buffer,
}

impl SavedExponentials {
    fn new(rows: usize, vocabulary: usize, at_most: usize) -> Self {
        let all = vocabulary.div_ceil(TILE);
        let tiles = (at_most / (rows.max(1) * TILE)).min(all);
        SavedExponentials {
            exponentials: Buffer::dirty(tiles * rows * TILE),
            maxima: Buffer::dirty(all * rows),
        }
    }
}

/// Bytes of the probabilities that are kept for `rows` rows with `predictors` predictors in all,
/// each row's head keeping at most [`KEPT`].
pub fn kept_bytes(rows: u64, predictors: u64, vocabulary: u64) -> u64 {
    size_of::<f32>() as u64 * (predictors * vocabulary).min(rows.saturating_mul(KEPT as u64))
}

/// A row's softmax so far.
#[derive(Clone, Copy)]
struct Running {
    /// The largest logit.
    max: f32,
    /// Where it is (the first one, on a tie).
    argmax: u32,
    /// Σ e^(l − max).
    sum: f32,
    /// Σ (l − max)·e^(l − max).
    weighted: f32,
    /// Σ e^(2(l − max)).
    squares: f32,
    /// Σ l.
    logits: f32,
    /// The target's logit.
    target: f32,
}

const START: Running = Running {
    max: f32::NEG_INFINITY,
    argmax: 0,
    sum: 0.0,
    weighted: 0.0,
    squares: 0.0,
    logits: 0.0,
    target: f32::NEG_INFINITY,
};

impl Running {
    /// Takes in a row's logits of one tile and leaves e^(l − max) in their place; returns what
    /// older sums were scaled by.
    #[inline(always)]
    fn take(&mut self, row: &mut [f32], first: usize, target: u32, distribution: bool) -> f32 {
        let top = max(row);
        let mut scale = 1.0;
        if let Some(y) = (target as usize).checked_sub(first)
            && y < row.len()
        {
            self.target = row[y];
        }
        if distribution {
            self.logits += sum(row.len(), |i| row[i]);
        }
        if top > self.max {
            if distribution {
                self.argmax = (first + row.iter().position(|x| *x == top).unwrap_or(0)) as u32;
            }
            let step = self.max - top;
            scale = if self.max == f32::NEG_INFINITY { 0.0 } else { exp(step) };
            if scale > 0.0 {
                self.weighted = scale * (self.weighted + step * self.sum);
            }
            self.sum *= scale;
            self.squares *= scale * scale;
            self.max = top;
        }
        let m = self.max;
        if distribution {
            let (sum, weighted, squares) = exp_moments(row, m);
            self.sum += sum;
            self.weighted += weighted;
            self.squares += squares;
        } else {
            self.sum += exp_sum(row, 1.0, m);
        }
        scale
    }

    fn log_sum_exp(&self) -> f32 {
        self.max + self.sum.ln()
    }

    fn describe(&self, target: u32, vocabulary: usize) -> TokenDistribution {
        TokenDistribution {
            mean_logit: self.logits / vocabulary as f32,
            entropy: self.sum.ln() - self.weighted / self.sum,
            log_sum_p2: self.squares.ln() - 2.0 * self.sum.ln(),
            is_argmax: self.argmax == target,
        }
    }
}

/// Computes log p of `targets[i]` given row i of `h`.
pub fn head(input: HeadInput<'_>, options: HeadOptions) -> HeadOutput {
    let HeadInput { kernel, h, w, targets } = input;
    let (rows, vocabulary, hidden) = (targets.len(), w.rows(), w.columns());
    let operand = Operand::new(kernel, View::f32(h, hidden), rows, hidden, 1.0);
    let mut running = vec![START; rows];
    let per_task = rows_per_task(kernel, rows);
    let mut gradient = Buffer::dirty(if options.gradient { rows * hidden } else { 0 });
    let mut kept = options.trained.map_or_else(SavedExponentials::default, |at_most| {
        SavedExponentials::new(rows, vocabulary, at_most)
    });
    for_each_tile(kernel, w, 0, options.gradient, |tile| {
        let out = Shared(gradient.as_mut_ptr());
        let keeps = (tile.first / TILE + 1) * rows * TILE <= kept.exponentials.len();
        let (exponentials, maxima) =
            (Shared(kept.exponentials.as_mut_ptr()), Shared(kept.maxima.as_mut_ptr()));
        thread_pool::chunks(&mut running, per_task, |i, running| {
            let (first, n) = (i * per_task, running.len());
            let mut passing = Buffer::dirty(if keeps { 0 } else { n * TILE });
            let place = tile.first / TILE * rows + first;
            let logits = if keeps {
                // SAFETY: what is kept has all rows of this tile, and this task alone touches its
                // own.
                unsafe { std::slice::from_raw_parts_mut(exponentials.at(place * TILE), n * TILE) }
            } else {
                &mut *passing
            };
            tile.logits(kernel, &operand, first, n, logits);
            let take = |r: usize, row: &mut [f32]| {
                let (running, y) = (&mut running[r], targets[first + r]);
                dispatch(
                    #[inline(always)]
                    || {
                        row[tile.width..].fill(0.0);
                        let scale = running.take(
                            &mut row[..tile.width],
                            tile.first,
                            y,
                            options.distribution,
                        );
                        if options.trained.is_some() {
                            // SAFETY: there is one for each row and tile, and this task alone
                            // touches its rows'.
                            unsafe { *maxima.at(place + r) = running.max };
                        }
                        if options.gradient && tile.first > 0 && scale != 1.0 {
                            // SAFETY: this task alone touches its rows of the gradient.
                            let so_far = unsafe {
                                std::slice::from_raw_parts_mut(out.at((first + r) * hidden), hidden)
                            };
                            so_far.iter_mut().for_each(|x| *x *= scale);
                        }
                    },
                );
            };
            if options.gradient {
                let p = Operand::prepared(kernel, logits, TILE, take);
                // SAFETY: as above.
                unsafe { tile.weighted_sum(kernel, &p, n, out.at(first * hidden), tile.first > 0) };
            } else {
                let mut take = take;
                logits.chunks_mut(TILE).enumerate().for_each(|(r, row)| take(r, row));
            }
        });
    });
    if options.gradient {
        finish_gradient(&mut gradient, w, targets, &running);
    }
    let log_sum_exp: Vec<f32> = running.iter().map(Running::log_sum_exp).collect();
    HeadOutput {
        log_probs: running.iter().zip(&log_sum_exp).map(|(r, lse)| r.target - lse).collect(),
        distributions: match options.distribution {
            true => running.iter().zip(targets).map(|(r, y)| r.describe(*y, vocabulary)).collect(),
            false => Vec::new(),
        },
        log_sum_exp,
        gradient,
        kept,
    }
}

/// W_y − (Σ_v e^(l_v − max)·W_v) / Σ_v e^(l_v − max).
fn finish_gradient(gradient: &mut [f32], w: WeightView, targets: &[u32], running: &[Running]) {
    let hidden = w.columns();
    let rows = thread_pool::rows_per_task(targets.len());
    thread_pool::chunks(gradient, rows * hidden, |task, gradient| {
        let mut target = vec![0f32; hidden];
        for (row, i) in gradient.chunks_mut(hidden).zip(task * rows..) {
            w.read_row(targets[i] as usize, &mut target);
            let inverse = 1.0 / running[i].sum;
            row.iter_mut().zip(&target).for_each(|(x, w)| *x = w - *x * inverse);
        }
    });
}

/// Adds ∂loss/∂W to `dw` `[V, C]`, given what [`head`] returned for `input` and
/// g = ∂loss/∂log p `[N]`: dW = Eᵀ·h with E = g ⊙ (onehot(y) − p), tile by tile. Uses up what was
/// kept.
pub fn head_weight_gradient(
    input: HeadInput<'_>,
    output: &mut HeadOutput,
    g: &[f32],
    dw: &mut [f32],
) {
    let HeadInput { kernel, h, w, targets } = input;
    let (rows, vocabulary, hidden) = (targets.len(), w.rows(), w.columns());
    let SavedExponentials { mut exponentials, maxima } = std::mem::take(&mut output.kept);
    assert_eq!(
        maxima.len(),
        vocabulary.div_ceil(TILE) * rows,
        "the head's forward pass was not told that it is trained"
    );
    let per_task = rows_per_task(kernel, rows);
    let m = |tile: usize, row: usize| maxima[tile * rows + row];
    // e^(l − m) of some rows of a tile, from `first` on, becomes E.
    let finish = |tile: usize, width: usize, first: usize, errors: &mut [f32]| {
        for (row, i) in errors.chunks_mut(TILE).zip(first..) {
            let (row, factor) =
                (&mut row[..width], -g[i] * exp(m(tile, i) - output.log_sum_exp[i]));
            dispatch(
                #[inline(always)]
                || row.iter_mut().for_each(|x| *x *= factor),
            );
            if let Some(x) =
                (targets[i] as usize).checked_sub(tile * TILE).and_then(|y| row.get_mut(y))
            {
                *x += g[i];
            }
        }
    };
    let mut add = |tile: usize, width: usize, errors: &[f32]| {
        let transposed = Operand::new(kernel, View::f32(errors, TILE).t(), width, rows, 1.0);
        let term = Term::new(&transposed, View::f32(h, hidden));
        matmul(width, hidden, &[term], &mut dw[tile * TILE * hidden..], hidden, true, Threads::All);
    };
    let kept = exponentials.len() / (rows * TILE).max(1);
    for (tile, errors) in exponentials.chunks_mut((rows * TILE).max(1)).enumerate() {
        let width = TILE.min(vocabulary - tile * TILE);
        thread_pool::chunks(errors, per_task * TILE, |i, errors| {
            finish(tile, width, i * per_task, errors)
        });
        add(tile, width, errors);
    }
    let operand = Operand::new(kernel, View::f32(h, hidden), rows, hidden, 1.0);
    let mut errors = Buffer::dirty(rows * TILE);
    for_each_tile(kernel, w, kept * TILE, false, |part| {
        let tile = part.first / TILE;
        thread_pool::chunks(&mut errors, per_task * TILE, |i, errors| {
            let first = i * per_task;
            part.logits(kernel, &operand, first, errors.len() / TILE, errors);
            for (row, i) in errors.chunks_mut(TILE).zip(first..) {
                let m = m(tile, i);
                dispatch(
                    #[inline(always)]
                    || row[..part.width].iter_mut().for_each(|x| *x = exp(*x - m)),
                );
            }
            finish(tile, part.width, first, errors);
        });
        add(tile, part.width, &errors);
    });
}

/// A tile of the vocabulary, packed for ⟨h, W_v⟩ and, when gradients are wanted, for Σ p_v·W_v.
struct Tile<'a> {
    /// Its first token.
    first: usize,
    /// Its tokens.
    width: usize,
    hidden: usize,
    /// Units of depth of ⟨h, W_v⟩.
    depth: usize,
    across: &'a [u32],
    along: &'a [u32],
}

/// Calls `f` with each tile from token `from` on.
fn for_each_tile(
    kernel: Kernel,
    w: WeightView,
    from: usize,
    gradient: bool,
    mut f: impl FnMut(&Tile),
) {
    let (vocabulary, hidden) = (w.rows(), w.columns());
    let depth = kernel.depth(hidden);
    let sums = if gradient { hidden.div_ceil(NR) } else { 0 };
    let mut across = Buffer::dirty(TILE * depth);
    let mut along = Buffer::dirty(sums * NR * kernel.depth(TILE));
    for first in (from..vocabulary).step_by(TILE) {
        let width = TILE.min(vocabulary - first);
        let k = kernel.depth(width);
        thread_pool::chunks(
            &mut across.units_mut()[..width.div_ceil(NR) * depth * NR],
            depth * NR,
            |i, panel| {
                let words = first + i * NR..first + width.min((i + 1) * NR);
                w.pack(kernel, Orientation::Transposed, 0..hidden, words, panel);
            },
        );
        thread_pool::chunks(&mut along.units_mut()[..sums * NR * k], k * NR, |i, panel| {
            w.pack(
                kernel,
                Orientation::Plain,
                first..first + width,
                i * NR..hidden.min((i + 1) * NR),
                panel,
            );
        });
        f(&Tile { first, width, hidden, depth, across: across.units(), along: along.units() });
    }
}

impl Tile<'_> {
    /// Logits of rows `first..first + n` into `to` `[n, TILE]`.
    fn logits(&self, kernel: Kernel, h: &Operand, first: usize, n: usize, to: &mut [f32]) {
        assert!(to.len() >= n * TILE);
        for i in 0..self.width.div_ceil(NR) {
            let product = h.product(first, 0, self.depth, &self.across[i * NR * self.depth..]);
            let columns = NR.min(self.width - i * NR);
            // SAFETY: `to` holds n rows of TILE; the operand covers the rows.
            unsafe {
                let out = OutputTile {
                    c: to.as_mut_ptr().add(i * NR),
                    stride: TILE,
                    columns,
                    accumulate: false,
                };
                panel_product(kernel, n, &[product], out);
            }
        }
    }

    /// Computes p·W over this tile into `to` `[n, C]`, with `p` `[n, TILE]`, zero beyond the tile's
    /// tokens; `accumulate` adds it to what `to` holds.
    ///
    /// # Safety
    /// `to` is valid for `n` rows and nobody else touches them.
    unsafe fn weighted_sum(
        &self,
        kernel: Kernel,
        p: &Operand,
        n: usize,
        to: *mut f32,
        accumulate: bool,
    ) {
        let k = kernel.depth(self.width);
        for i in 0..self.hidden.div_ceil(NR) {
            let product = p.product(0, 0, k, &self.along[i * NR * k..]);
            // SAFETY: by the caller.
            unsafe {
                let columns = NR.min(self.hidden - i * NR);
                panel_product(
                    kernel,
                    n,
                    &[product],
                    OutputTile { c: to.add(i * NR), stride: self.hidden, columns, accumulate },
                );
            }
        }
    }
}
