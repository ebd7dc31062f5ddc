//! LM head, log-softmax and gather in one pass over the vocabulary, tile by tile. Only [`logits`]
//! makes the logits `[N, V]` as a whole.
//!
//! log p(y) = ⟨h, W_y⟩ − log Σ_v e^⟨h, W_v⟩. The maximum, the sum and ∂log p/∂h =
//! W_y − Σ_v p_v·W_v are accumulated over the tiles and rescaled whenever a larger logit
//! appears (online softmax, arXiv:1805.02867).
//!
//! With a soft-cap c, each logit l is replaced by l' = c·tanh(l / c). In the gradients, W_v is
//! then multiplied by the slope of the cap at v, 1 − (l'_v / c)².

use super::buffer::Buffer;
use super::gemm::{
    Kernel, NR, Operand, Orientation, OutputTile, Shared, Term, Threads, View, WeightView, matmul,
    panel_product,
};
use super::simd::{dispatch, exp, exp_moments, exp_sum, max, soft_cap, soft_cap_slope, sum};
use super::thread_pool;

/// Number of tokens of the vocabulary in a tile; a multiple of [`NR`].
const TILE: usize = 512;
/// Maximum number of rows per task, before rounding up to whole strips of the kernel. These rows
/// and their logits fit the L2 cache together.
const MAX_ROWS: usize = 128;
/// Number of logits to which a task of [`logits`] applies the soft-cap.
const LOGITS_PER_TASK: usize = 1 << 12;
/// Maximum number of probabilities that the head saves of one packed row for the weight's gradient:
/// 256 MiB of f32.
pub const MAX_SAVED_PROBABILITIES: usize = 1 << 26;

/// Returns the number of rows per task: every thread gets the same number of tasks, of about equal
/// size, in whole strips of the kernel. No row's result depends on it.
fn rows_per_task(kernel: Kernel, rows: usize) -> usize {
    let turns = 2 * thread_pool::threads();
    let tasks = turns * rows.div_ceil(turns * MAX_ROWS).max(1);
    rows.div_ceil(tasks).max(1).next_multiple_of(kernel.rows())
}

/// Statistics of the distribution that predicted a token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenDistribution {
    /// Mean logit over the vocabulary.
    pub mean_logit: f32,
    /// −Σ p·log p, in nats.
    pub entropy: f32,
    /// log Σ p², in nats.
    pub log_sum_p2: f32,
    /// True if the target is the most likely token (on a tie, the first of them).
    pub is_argmax: bool,
}

/// Optional outputs of the head, in addition to the log-probs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeadOptions {
    /// Compute a [`TokenDistribution`] for each row.
    pub distribution: bool,
    /// Compute ∂log p/∂h.
    pub gradient: bool,
    /// Set if the head's weight is trained. The value is the maximum number of probabilities to
    /// save for [`head_weight_gradient`]; the others are recomputed there, bit for bit.
    pub trained: Option<usize>,
}

/// Inputs of the head's forward and backward pass.
#[derive(Clone, Copy, Debug)]
pub struct HeadInput<'a> {
    /// Kernel of the GEMMs.
    pub kernel: Kernel,
    /// Hidden states after the final norm `[N, C]`, one per target.
    pub h: &'a [f32],
    /// Weight of the head `[V, C]`.
    pub w: WeightView<'a>,
    /// Target token of each row `[N]`, less than V.
    pub targets: &'a [u32],
    /// Soft-cap of the logits, if they have one.
    pub softcap: Option<f32>,
}

/// Outputs of the head.
#[derive(Debug, Default)]
pub struct HeadOutput {
    /// log p of each target `[N]`.
    pub log_probs: Vec<f32>,
    /// log Σ_v e^logit of each row `[N]`.
    pub log_sum_exp: Vec<f32>,
    /// One per row, or empty if not requested.
    pub distributions: Vec<TokenDistribution>,
    /// ∂log p/∂h `[N, C]`, or empty if not requested.
    pub gradient: Buffer,
    /// Saved exponentials for the weight's gradient.
    pub saved: SavedExponentials,
}

/// Saved exponentials of the first tiles of the vocabulary. A factor for each row and tile turns
/// them into probabilities.
#[derive(Debug, Default)]
pub struct SavedExponentials {
    /// e^(l − m) `[saved tiles, N, TILE]`, where m is the row's largest logit up to and including
    /// the tile. With a soft-cap, multiplied by its slope.
    exponentials: Buffer,
    /// m `[⌈V / TILE⌉, N]`, of all tiles.
    maxima: Buffer,
    /// Slope of the soft-cap at each target `[N]`, or empty without a soft-cap.
    target_slopes: Vec<f32>,
}

impl SavedExponentials {
    fn new(rows: usize, vocabulary: usize, at_most: usize) -> Self {
        let all = vocabulary.div_ceil(TILE);
        let tiles = (at_most / (rows.max(1) * TILE)).min(all);
        SavedExponentials {
            exponentials: Buffer::uninit(tiles * rows * TILE),
            maxima: Buffer::uninit(all * rows),
            target_slopes: Vec::new(),
        }
    }
}

/// Returns the size in bytes of the saved probabilities for `rows` packed rows that have
/// `predictors` predictors (tokens that predict a completion token) in all. The head saves at most
/// [`MAX_SAVED_PROBABILITIES`] values of each packed row.
pub fn saved_bytes(rows: u64, predictors: u64, vocabulary: u64) -> u64 {
    size_of::<f32>() as u64
        * (predictors * vocabulary).min(rows.saturating_mul(MAX_SAVED_PROBABILITIES as u64))
}

/// State of a row's online softmax.
#[derive(Clone, Copy)]
struct OnlineSoftmax {
    /// Largest logit l so far.
    max: f32,
    /// Token of the largest logit (on a tie, the first of them).
    argmax: u32,
    /// Σ e^(l − max).
    sum: f32,
    /// Σ (l − max)·e^(l − max).
    weighted: f32,
    /// Σ e^(2(l − max)).
    squares: f32,
    /// Σ l.
    logits: f32,
    /// Logit of the target.
    target: f32,
}

const EMPTY_SOFTMAX: OnlineSoftmax = OnlineSoftmax {
    max: f32::NEG_INFINITY,
    argmax: 0,
    sum: 0.0,
    weighted: 0.0,
    squares: 0.0,
    logits: 0.0,
    target: f32::NEG_INFINITY,
};

impl OnlineSoftmax {
    /// Adds a row's logits of one tile to the state and replaces them by e^(l − max). Returns the
    /// factor by which sums over earlier tiles must be scaled.
    #[inline(always)]
    fn update(&mut self, row: &mut [f32], first: usize, target: u32, distribution: bool) -> f32 {
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
            scale = if self.max == f32::NEG_INFINITY {
                0.0
            } else {
                exp(step)
            };
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

    /// Does the same as [`OnlineSoftmax::update`], after the soft-cap `cap` has been applied to the
    /// logits, and multiplies the exponentials by the slope of the cap.
    #[inline(always)]
    fn update_capped(
        &mut self,
        row: &mut [f32],
        first: usize,
        target: u32,
        distribution: bool,
        cap: f32,
    ) -> f32 {
        let mut slopes = [0f32; TILE];
        soft_cap(row, 1.0, cap);
        for (slope, l) in slopes.iter_mut().zip(&*row) {
            *slope = soft_cap_slope(*l, cap);
        }
        let scale = self.update(row, first, target, distribution);
        for (x, slope) in row.iter_mut().zip(&slopes) {
            *x *= slope;
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

/// Computes log p of `targets[i]` given row i of `h`, and the outputs that `options` requests.
pub fn head(input: HeadInput<'_>, options: HeadOptions) -> HeadOutput {
    let HeadInput {
        kernel,
        h,
        w,
        targets,
        softcap,
    } = input;
    let (rows, vocabulary, hidden) = (targets.len(), w.rows(), w.columns());
    let operand = Operand::new(kernel, View::f32(h, hidden), rows, hidden, 1.0);
    let mut running = vec![EMPTY_SOFTMAX; rows];
    let per_task = rows_per_task(kernel, rows);
    let mut gradient = Buffer::uninit(if options.gradient { rows * hidden } else { 0 });
    let mut saved = options
        .trained
        .map_or_else(SavedExponentials::default, |at_most| {
            SavedExponentials::new(rows, vocabulary, at_most)
        });
    for_each_tile(kernel, w, 0, options.gradient, |tile| {
        let out = Shared(gradient.as_mut_ptr());
        let is_saved = (tile.first / TILE + 1) * rows * TILE <= saved.exponentials.len();
        let (exponentials, maxima) = (
            Shared(saved.exponentials.as_mut_ptr()),
            Shared(saved.maxima.as_mut_ptr()),
        );
        thread_pool::chunks(&mut running, per_task, |i, running| {
            let (first, n) = (i * per_task, running.len());
            let mut scratch = Buffer::uninit(if is_saved { 0 } else { n * TILE });
            let place = tile.first / TILE * rows + first;
            let logits = if is_saved {
                // SAFETY: the saved exponentials have all rows of this tile, and this task alone
                // touches its own rows.
                unsafe { std::slice::from_raw_parts_mut(exponentials.at(place * TILE), n * TILE) }
            } else {
                &mut *scratch
            };
            tile.logits(kernel, &operand, first, n, logits);
            let take = |r: usize, row: &mut [f32]| {
                let (running, y) = (&mut running[r], targets[first + r]);
                dispatch(
                    #[inline(always)]
                    || {
                        row[tile.width..].fill(0.0);
                        let (row, distribution) = (&mut row[..tile.width], options.distribution);
                        let scale = match softcap {
                            None => running.update(row, tile.first, y, distribution),
                            Some(cap) => {
                                running.update_capped(row, tile.first, y, distribution, cap)
                            }
                        };
                        if options.trained.is_some() {
                            // SAFETY: there is one maximum for each row and tile, and this task
                            // alone touches those of its rows.
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
                logits
                    .chunks_mut(TILE)
                    .enumerate()
                    .for_each(|(r, row)| take(r, row));
            }
        });
    });
    if options.gradient {
        finish_gradient(&mut gradient, w, targets, &running, softcap);
    }
    if let (Some(cap), Some(_)) = (softcap, options.trained) {
        saved.target_slopes = running
            .iter()
            .map(|r| soft_cap_slope(r.target, cap))
            .collect();
    }
    let log_sum_exp: Vec<f32> = running.iter().map(OnlineSoftmax::log_sum_exp).collect();
    HeadOutput {
        log_probs: running
            .iter()
            .zip(&log_sum_exp)
            .map(|(r, lse)| r.target - lse)
            .collect(),
        distributions: match options.distribution {
            true => running
                .iter()
                .zip(targets)
                .map(|(r, y)| r.describe(*y, vocabulary))
                .collect(),
            false => Vec::new(),
        },
        log_sum_exp,
        gradient,
        saved,
    }
}

/// Computes the logits `[N, V]` of rows `h` `[N, C]`, after the soft-cap. Only generation needs
/// them as a whole: for the next token of each sequence, and for log-probs of a prompt, of which
/// the caller gives a few rows at a time.
///
/// [`head`] divides the rows among the threads, so that a few rows would use a single one. Here the
/// threads share the vocabulary. The logits have the same bits.
pub fn logits(kernel: Kernel, h: &[f32], w: WeightView, softcap: Option<f32>) -> Buffer {
    let (vocabulary, hidden) = (w.rows(), w.columns());
    let rows = h.len() / hidden.max(1);
    let operand = Operand::new(kernel, View::f32(h, hidden), rows, hidden, 1.0);
    let mut all = Buffer::uninit(rows * vocabulary);
    matmul(
        rows,
        vocabulary,
        &[Term::new(&operand, w.transposed())],
        &mut all,
        vocabulary,
        false,
        Threads::All,
    );
    if let Some(cap) = softcap {
        thread_pool::chunks(&mut all, LOGITS_PER_TASK, |_, logits| {
            dispatch(
                #[inline(always)]
                || soft_cap(logits, 1.0, cap),
            )
        });
    }
    all
}

/// Returns log p of `target`, given one row of the result of [`logits`]. It has the bits of
/// [`HeadOutput::log_probs`], because the sums run over the same tiles of the same logits.
pub fn log_prob(logits: &[f32], target: u32) -> f32 {
    let running = softmax_state(logits, target);
    running.target - running.log_sum_exp()
}

/// Returns the `count` most likely tokens with their log-probs, the most likely first, given one
/// row of the result of [`logits`]. Of tokens with equal logits the one with the lowest id comes
/// first. The log-probs have the bits of [`log_prob`].
pub fn most_likely(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    if count == 0 {
        return Vec::new();
    }
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (id, logit) in logits.iter().enumerate() {
        let least = top.last().map_or(f32::NEG_INFINITY, |(_, least)| *least);
        if top.len() == count && *logit <= least {
            continue;
        }
        let place = top.partition_point(|(_, other)| *other >= *logit);
        top.insert(place, (id as u32, *logit));
        top.truncate(count);
    }
    let log_sum_exp = softmax_state(logits, 0).log_sum_exp();
    top.iter_mut().for_each(|(_, logit)| *logit -= log_sum_exp);
    top
}

/// Returns the state of the online softmax after all tiles of one row of logits.
fn softmax_state(logits: &[f32], target: u32) -> OnlineSoftmax {
    let (mut running, mut tile) = (EMPTY_SOFTMAX, [0f32; TILE]);
    for (i, from) in logits.chunks(TILE).enumerate() {
        let tile = &mut tile[..from.len()];
        tile.copy_from_slice(from);
        dispatch(
            #[inline(always)]
            || running.update(tile, i * TILE, target, false),
        );
    }
    running
}

/// Computes ∂log p/∂h = W_y − (Σ_v e^(l_v − max)·W_v) / Σ_v e^(l_v − max). On entry,
/// `gradient` holds the sum in the numerator. With a soft-cap, each W_v has its slope as a factor.
fn finish_gradient(
    gradient: &mut [f32],
    w: WeightView,
    targets: &[u32],
    running: &[OnlineSoftmax],
    softcap: Option<f32>,
) {
    let hidden = w.columns();
    let rows = thread_pool::rows_per_task(targets.len());
    thread_pool::chunks(gradient, rows * hidden, |task, gradient| {
        let mut target = vec![0f32; hidden];
        for (row, i) in gradient.chunks_mut(hidden).zip(task * rows..) {
            w.read_row(targets[i] as usize, &mut target);
            if let Some(cap) = softcap {
                let slope = soft_cap_slope(running[i].target, cap);
                target.iter_mut().for_each(|w| *w *= slope);
            }
            let inverse = 1.0 / running[i].sum;
            row.iter_mut()
                .zip(&target)
                .for_each(|(x, w)| *x = w - *x * inverse);
        }
    });
}

/// Adds ∂loss/∂W to `dw` `[V, C]`, given the output of [`head`] for `input` and
/// g = ∂loss/∂log p `[N]`: dW = Eᵀ·h with E = g ⊙ (onehot(y) − p), tile by tile. With a
/// soft-cap, E is multiplied by its slopes. Consumes the saved exponentials.
pub fn head_weight_gradient(
    input: HeadInput<'_>,
    output: &mut HeadOutput,
    g: &[f32],
    dw: &mut [f32],
) {
    let HeadInput {
        kernel,
        h,
        w,
        targets,
        softcap,
    } = input;
    let (rows, vocabulary, hidden) = (targets.len(), w.rows(), w.columns());
    let SavedExponentials {
        mut exponentials,
        maxima,
        target_slopes,
    } = std::mem::take(&mut output.saved);
    assert_eq!(
        maxima.len(),
        vocabulary.div_ceil(TILE) * rows,
        "the head's forward pass ran without `HeadOptions::trained`"
    );
    let per_task = rows_per_task(kernel, rows);
    let m = |tile: usize, row: usize| maxima[tile * rows + row];
    // Turns e^(l − m) into E for some rows of a tile, starting with row `first`.
    let finish = |tile: usize, width: usize, first: usize, errors: &mut [f32]| {
        for (row, i) in errors.chunks_mut(TILE).zip(first..) {
            let (row, factor) = (
                &mut row[..width],
                -g[i] * exp(m(tile, i) - output.log_sum_exp[i]),
            );
            dispatch(
                #[inline(always)]
                || row.iter_mut().for_each(|x| *x *= factor),
            );
            if let Some(x) = (targets[i] as usize)
                .checked_sub(tile * TILE)
                .and_then(|y| row.get_mut(y))
            {
                *x += target_slopes.get(i).map_or(g[i], |slope| g[i] * slope);
            }
        }
    };
    let mut add = |tile: usize, width: usize, errors: &[f32]| {
        let transposed = Operand::new(kernel, View::f32(errors, TILE).t(), width, rows, 1.0);
        let term = Term::new(&transposed, View::f32(h, hidden));
        matmul(
            width,
            hidden,
            &[term],
            &mut dw[tile * TILE * hidden..],
            hidden,
            true,
            Threads::All,
        );
    };
    let saved = exponentials.len() / (rows * TILE).max(1);
    for (tile, errors) in exponentials.chunks_mut((rows * TILE).max(1)).enumerate() {
        let width = TILE.min(vocabulary - tile * TILE);
        thread_pool::chunks(errors, per_task * TILE, |i, errors| {
            finish(tile, width, i * per_task, errors)
        });
        add(tile, width, errors);
    }
    let operand = Operand::new(kernel, View::f32(h, hidden), rows, hidden, 1.0);
    let mut errors = Buffer::uninit(rows * TILE);
    for_each_tile(kernel, w, saved * TILE, false, |part| {
        let tile = part.first / TILE;
        thread_pool::chunks(&mut errors, per_task * TILE, |i, errors| {
            let first = i * per_task;
            part.logits(kernel, &operand, first, errors.len() / TILE, errors);
            for (row, i) in errors.chunks_mut(TILE).zip(first..) {
                let m = m(tile, i);
                dispatch(
                    #[inline(always)]
                    || {
                        let row = &mut row[..part.width];
                        match softcap {
                            None => row.iter_mut().for_each(|x| *x = exp(*x - m)),
                            Some(cap) => {
                                soft_cap(row, 1.0, cap);
                                row.iter_mut()
                                    .for_each(|x| *x = exp(*x - m) * soft_cap_slope(*x, cap));
                            }
                        }
                    },
                );
            }
            finish(tile, part.width, first, errors);
        });
        add(tile, part.width, &errors);
    });
}

/// Tile of the vocabulary, packed for ⟨h, W_v⟩ and, if gradients are requested, for
/// Σ p_v·W_v.
struct Tile<'a> {
    /// First token of the tile.
    first: usize,
    /// Number of tokens in the tile.
    width: usize,
    hidden: usize,
    /// Depth of ⟨h, W_v⟩ in units.
    depth: usize,
    /// W packed for ⟨h, W_v⟩: panels of tokens.
    across: &'a [u32],
    /// W packed for Σ p_v·W_v: panels of hidden columns. Empty without gradients.
    along: &'a [u32],
}

/// Packs and passes to `f` each tile from token `from` on, in order.
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
    let mut across = Buffer::uninit(TILE * depth);
    let mut along = Buffer::uninit(sums * NR * kernel.depth(TILE));
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
        thread_pool::chunks(
            &mut along.units_mut()[..sums * NR * k],
            k * NR,
            |i, panel| {
                w.pack(
                    kernel,
                    Orientation::Plain,
                    first..first + width,
                    i * NR..hidden.min((i + 1) * NR),
                    panel,
                );
            },
        );
        f(&Tile {
            first,
            width,
            hidden,
            depth,
            across: across.units(),
            along: along.units(),
        });
    }
}

impl Tile<'_> {
    /// Computes the logits of rows `first..first + n` into `to` `[n, TILE]`.
    fn logits(&self, kernel: Kernel, h: &Operand, first: usize, n: usize, to: &mut [f32]) {
        assert!(to.len() >= n * TILE);
        for i in 0..self.width.div_ceil(NR) {
            let product = h.product(first, 0, self.depth, &self.across[i * NR * self.depth..]);
            let columns = NR.min(self.width - i * NR);
            // SAFETY: `to` has n rows of TILE elements; the operand covers the rows.
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

    /// Computes p·W over this tile into `to` `[n, C]`. `p` is `[n, TILE]` and zero beyond the
    /// tile's tokens. With `accumulate`, adds the result to the values of `to`.
    ///
    /// # Safety
    /// `to` is valid for `n` rows and no other thread touches them.
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
            // SAFETY: guaranteed by the caller.
            unsafe {
                let columns = NR.min(self.hidden - i * NR);
                panel_product(
                    kernel,
                    n,
                    &[product],
                    OutputTile {
                        c: to.add(i * NR),
                        stride: self.hidden,
                        columns,
                        accumulate,
                    },
                );
            }
        }
    }
}
