//! The head on the device. It processes one tile of the vocabulary at a time with an online softmax
//! (arXiv:1805.02867), as [`crate::compute::cpu::head`] does.

use std::sync::Arc;

use candle_core::Result;

use super::row::DeviceRow;
use super::sizes::{HEAD_TILE, head_tile};
use crate::compute::cpu::head::{HeadOptions, HeadOutput, TokenDistribution};
use crate::compute::cuda::gpu::{Gpu, Memory};
use crate::compute::cuda::kernels::Kind;
use crate::compute::cuda::ops::{self, HeadErrors, HeadFinish, HeadTile, LogitTile, SOFTMAX_STATE};

/// The head of a model. V is the size of the vocabulary, C the width of the hidden states.
pub(super) struct Head<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub kind: Kind,
    /// The weight `[V, C]`.
    pub weight: &'a Memory,
    /// C.
    pub hidden: usize,
    /// V.
    pub vocabulary: usize,
    /// Soft-cap of the logits, if they have one.
    pub softcap: Option<f32>,
}

/// Result of a forward pass of the head.
pub(super) struct HeadForward {
    /// The output. Its own `gradient` is empty, because the gradient stays on the device.
    pub output: HeadOutput,
    /// ∂log p/∂h `[N, C]`, if it was requested.
    pub gradient: Option<Memory>,
}

impl Head<'_> {
    /// Iterates over the tiles of the vocabulary: first column and number of columns.
    fn tiles(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let vocabulary = self.vocabulary;
        (0..vocabulary)
            .step_by(HEAD_TILE)
            .map(move |first| (first, HEAD_TILE.min(vocabulary - first)))
    }

    /// Computes the `logits` `[N, HEAD_TILE]` of the tile with the columns `first..first + width`.
    fn logits(
        &self,
        h: &Memory,
        rows: usize,
        first: usize,
        width: usize,
        logits: &Memory,
    ) -> Result<()> {
        let w = self.weight.matrix_at(first * self.hidden, self.hidden).t();
        self.gpu.matmul(
            [rows, width, self.hidden],
            h.matrix(self.hidden),
            w,
            logits.matrix(HEAD_TILE),
            1.0,
            0.0,
        )
    }

    /// Computes the log-probs of the targets, given the normed hidden states `h` `[N, C]`.
    pub fn forward(
        &self,
        h: &Memory,
        row: &DeviceRow,
        targets: &[u32],
        options: HeadOptions,
    ) -> Result<HeadForward> {
        let (gpu, kind, rows, hidden) = (self.gpu, self.kind, targets.len(), self.hidden);
        if rows == 0 {
            return Ok(HeadForward {
                output: HeadOutput::default(),
                gradient: None,
            });
        }
        let target_ids = &row.target_ids;
        let state = gpu.uninit(Kind::F32, rows * SOFTMAX_STATE)?;
        ops::head_start(gpu, &state)?;
        let logits = gpu.uninit(Kind::F32, head_tile(rows))?;
        // Rows of the buffers that only the gradient needs.
        let of_gradient = if options.gradient { rows } else { 0 };
        let p = gpu.uninit(kind, head_tile(of_gradient))?;
        let scales = gpu.uninit(Kind::F32, rows)?;
        let gradient = gpu.uninit(Kind::F32, of_gradient * hidden)?;
        for (first, width) in self.tiles() {
            self.logits(h, rows, first, width, &logits)?;
            let tile = HeadTile {
                state: &state,
                p: &p,
                scales: &scales,
                tile: LogitTile {
                    logits: &logits,
                    stride: HEAD_TILE,
                    first,
                    width,
                },
                targets: target_ids,
                distribution: options.distribution,
                gradient: options.gradient,
                softcap: self.softcap,
            };
            ops::head_tile(gpu, tile)?;
            if options.gradient {
                if first > 0 {
                    ops::head_rescale(gpu, &gradient, &scales, hidden)?;
                }
                let beta = if first > 0 { 1.0 } else { 0.0 };
                let w = self.weight.matrix_at(first * hidden, hidden);
                gpu.matmul(
                    [rows, hidden, width],
                    p.matrix(HEAD_TILE),
                    w,
                    gradient.matrix(hidden),
                    1.0,
                    beta,
                )?;
            }
        }
        if options.gradient {
            let finish = HeadFinish {
                d: &gradient,
                state: &state,
                w: self.weight,
                targets: target_ids,
                width: hidden,
                softcap: self.softcap,
            };
            ops::head_finish(gpu, finish)?;
        }
        let mut states = vec![0f32; rows * SOFTMAX_STATE];
        gpu.download(&state, &mut states)?;
        let output = self.describe(&states, targets, options);
        Ok(HeadForward {
            output,
            gradient: options.gradient.then_some(gradient),
        })
    }

    /// Converts the final softmax state of each row to log-probs and, if requested, statistics of
    /// the distribution.
    fn describe(&self, states: &[f32], targets: &[u32], options: HeadOptions) -> HeadOutput {
        let mut output = HeadOutput::default();
        for (s, &target) in states.chunks(SOFTMAX_STATE).zip(targets) {
            let [max, sum, weighted, squares, logits, of_target, argmax, _] = s else {
                continue;
            };
            let lse = max + sum.ln();
            output.log_probs.push(of_target - lse);
            output.log_sum_exp.push(lse);
            if options.distribution {
                output.distributions.push(TokenDistribution {
                    mean_logit: logits / self.vocabulary as f32,
                    entropy: sum.ln() - weighted / sum,
                    log_sum_p2: squares.ln() - 2.0 * sum.ln(),
                    is_argmax: argmax.to_bits() == target,
                });
            }
        }
        output
    }

    /// Accumulates ∂loss/∂W in `dw` `[V, C]`, given g = ∂loss/∂log p `[N]`. It is Eᵀ·h
    /// with E = g ⊙ (onehot(y) − p), where y are the targets.
    pub fn weight_gradient(
        &self,
        h: &Memory,
        row: &DeviceRow,
        lse: &Memory,
        g: &Memory,
        dw: &Memory,
    ) -> Result<()> {
        let (gpu, rows, hidden) = (self.gpu, row.targets, self.hidden);
        let (logits, errors) = (
            gpu.uninit(Kind::F32, head_tile(rows))?,
            gpu.uninit(self.kind, head_tile(rows))?,
        );
        for (first, width) in self.tiles() {
            self.logits(h, rows, first, width, &logits)?;
            let tile = LogitTile {
                logits: &logits,
                stride: HEAD_TILE,
                first,
                width,
            };
            ops::head_errors(
                gpu,
                HeadErrors {
                    errors: &errors,
                    tile,
                    lse,
                    g,
                    targets: &row.target_ids,
                    softcap: self.softcap,
                },
            )?;
            let to = dw.matrix_at(first * hidden, hidden);
            gpu.matmul(
                [width, hidden, rows],
                errors.matrix(HEAD_TILE).t(),
                h.matrix(hidden),
                to,
                1.0,
                1.0,
            )?;
        }
        Ok(())
    }
}
