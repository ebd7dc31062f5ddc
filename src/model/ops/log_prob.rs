//! The head, log-softmax and gather in one op over completion tokens, in chunks: `[T, V]` is never held.
//!
//! log p(y) = ⟨h, W_y⟩ − log Σ_v e^⟨h, W_v⟩. With a frozen head the forward pass also leaves ∂log p/∂h = W_y − Σ_v p_v·W_v, so that the backward
//! pass is a scaling of rows; a trainable head recomputes its chunk.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::gemm::{Threads, View, matmul};
use super::simd::{dispatch, exp, max, sum};
use super::{slice, tensor, with_values};

const OP: &str = "linear-log-prob";
/// Rows whose logits exist at one time.
const CHUNK: usize = 128;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogProbOptions {
    /// Fill [`TokenDistribution`]s.
    pub distribution: bool,
    /// Keep what the backward pass needs.
    pub gradient: bool,
}

/// Side results of [`linear_log_prob`], filled when it has run.
#[derive(Clone, Debug, Default)]
pub struct Distributions(Arc<Mutex<Vec<TokenDistribution>>>);

impl Distributions {
    /// One per row, or empty when they were not asked for.
    pub fn take(&self) -> Vec<TokenDistribution> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// log p of `targets[i]` given `h` row i: h `[N, C]`, w `[V, C]` → `[N]`.
pub fn linear_log_prob(h: &Tensor, w: &Tensor, targets: Arc<Vec<u32>>, options: LogProbOptions) -> Result<(Tensor, Distributions)> {
    let distributions = Distributions::default();
    let (rows, vocabulary) = (h.dim(0)?, w.dim(0)?);
    if targets.len() != rows {
        bail!("{OP}: {} targets for {rows} rows", targets.len());
    }
    if let Some(bad) = targets.iter().find(|t| **t as usize >= vocabulary) {
        bail!("{OP}: target {bad} is outside the vocabulary of {vocabulary}");
    }
    let op = LinearLogProb { targets, options, frozen_head: !w.track_op(), saved: Mutex::new(None), distributions: distributions.clone() };
    Ok((h.apply_op2(w, op)?, distributions))
}

struct LinearLogProb {
    targets: Arc<Vec<u32>>,
    options: LogProbOptions,
    frozen_head: bool,
    /// ∂log p/∂h `[N, C]`, for a frozen head.
    saved: Mutex<Option<Vec<f32>>>,
    distributions: Distributions,
}

/// Logits of the chunk `h` `[n, C]` into `buffer` `[n, V]`.
fn logits(h: &[f32], w: &[f32], hidden: usize, vocabulary: usize, buffer: &mut [f32]) {
    let n = h.len() / hidden;
    matmul(n, hidden, vocabulary, buffer, false, 1.0, View::rows(h, hidden), View::rows(w, hidden).t(), Threads::All);
}

#[inline(always)]
fn log_sum_exp(row: &[f32]) -> f32 {
    let m = max(row);
    m + sum(row.len(), |i| exp(row[i] - m)).ln()
}

#[inline(always)]
fn describe(row: &[f32], lse: f32, target: u32) -> TokenDistribution {
    let n = row.len();
    let y = row[target as usize];
    let mean_logit = sum(n, |i| row[i]) / n as f32;
    // H = lse − Σ p·logit, with logits taken relative to lse so that nothing large cancels.
    let entropy = -sum(n, |i| exp(row[i] - lse) * (row[i] - lse));
    let p2 = sum(n, |i| {
        let p = exp(row[i] - lse);
        p * p
    });
    let is_argmax = y >= max(row) && row[..target as usize].iter().all(|x| *x < y);
    TokenDistribution { mean_logit, entropy, log_sum_p2: p2.ln(), is_argmax }
}

impl CustomOp2 for LinearLogProb {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, h: &CpuStorage, lh: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (h, w) = (slice(OP, h, lh)?, slice(OP, w, lw)?);
        let ((rows, hidden), (vocabulary, _)) = (lh.shape().dims2()?, lw.shape().dims2()?);
        let keep = self.options.gradient && self.frozen_head;
        let mut out = vec![0f32; rows];
        let mut distributions = vec![TokenDistribution::default(); if self.options.distribution { rows } else { 0 }];
        let mut dh = vec![0f32; if keep { rows * hidden } else { 0 }];
        let mut buffer = vec![0f32; CHUNK.min(rows) * vocabulary];
        for start in (0..rows).step_by(CHUNK) {
            let n = CHUNK.min(rows - start);
            let targets = &self.targets[start..start + n];
            logits(&h[start * hidden..(start + n) * hidden], w, hidden, vocabulary, &mut buffer);
            let described: Vec<(f32, Option<TokenDistribution>)> = buffer[..n * vocabulary]
                .par_chunks_mut(vocabulary)
                .zip(targets)
                .map(|(row, &y)| {
                    dispatch(
                        #[inline(always)]
                        || {
                            let lse = log_sum_exp(row);
                            let logp = row[y as usize] - lse;
                            let described = self.options.distribution.then(|| describe(row, lse, y));
                            if keep {
                                for x in row.iter_mut() {
                                    *x = exp(*x - lse);
                                }
                            }
                            (logp, described)
                        },
                    )
                })
                .collect();
            for (i, (logp, d)) in described.into_iter().enumerate() {
                out[start + i] = logp;
                if let Some(d) = d {
                    distributions[start + i] = d;
                }
            }
            if keep {
                let dh = &mut dh[start * hidden..(start + n) * hidden];
                for (row, &y) in dh.chunks_mut(hidden).zip(targets) {
                    row.copy_from_slice(&w[y as usize * hidden..][..hidden]);
                }
                matmul(n, vocabulary, hidden, dh, true, -1.0, View::rows(&buffer, vocabulary), View::rows(w, hidden), Threads::All);
            }
        }
        *self.distributions.0.lock().unwrap_or_else(PoisonError::into_inner) = distributions;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = keep.then_some(dh);
        Ok((CpuStorage::F32(out), rows.into()))
    }

    fn bwd(&self, h: &Tensor, w: &Tensor, _out: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (rows, hidden) = h.dims2()?;
        if let Some(mut dh) = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take() {
            with_values(OP, g, |g| {
                for (row, g) in dh.chunks_mut(hidden).zip(g) {
                    row.iter_mut().for_each(|x| *x *= g);
                }
            })?;
            return Ok((Some(tensor(dh, (rows, hidden))?), None));
        }
        if self.frozen_head {
            bail!("{OP}: backward was not asked for in the forward pass, or ran twice");
        }
        let vocabulary = w.dim(0)?;
        let (dh, dw) =
            with_values(OP, h, |h| with_values(OP, w, |w| with_values(OP, g, |g| self.recompute(h, w, g, hidden, vocabulary))))???;
        Ok((Some(tensor(dh, (rows, hidden))?), Some(tensor(dw, (vocabulary, hidden))?)))
    }
}

impl LinearLogProb {
    /// With E = g ⊙ (onehot(y) − p): dh = E·W, dW = Eᵀ·h, chunk by chunk.
    fn recompute(&self, h: &[f32], w: &[f32], g: &[f32], hidden: usize, vocabulary: usize) -> (Vec<f32>, Vec<f32>) {
        let rows = g.len();
        let (mut dh, mut dw) = (vec![0f32; rows * hidden], vec![0f32; vocabulary * hidden]);
        let mut buffer = vec![0f32; CHUNK.min(rows) * vocabulary];
        for start in (0..rows).step_by(CHUNK) {
            let n = CHUNK.min(rows - start);
            let h = &h[start * hidden..(start + n) * hidden];
            logits(h, w, hidden, vocabulary, &mut buffer);
            buffer[..n * vocabulary].par_chunks_mut(vocabulary).zip(&self.targets[start..start + n]).zip(&g[start..start + n]).for_each(
                |((row, &y), &g)| {
                    dispatch(
                        #[inline(always)]
                        || {
                            let lse = log_sum_exp(row);
                            for x in row.iter_mut() {
                                *x = -g * exp(*x - lse);
                            }
                        },
                    );
                    row[y as usize] += g;
                },
            );
            let e = View::rows(&buffer, vocabulary);
            let dh = &mut dh[start * hidden..(start + n) * hidden];
            matmul(n, vocabulary, hidden, dh, false, 1.0, e, View::rows(w, hidden), Threads::All);
            matmul(vocabulary, n, hidden, &mut dw, true, 1.0, e.t(), View::rows(h, hidden), Threads::All);
        }
        (dh, dw)
    }
}
