//! Rotary position embedding in the "rotate half" form (arXiv:2104.09864, as transformers lays it
//! out).

use std::ops::Range;
use std::sync::Arc;

use super::simd::dispatch;
use super::thread_pool;

/// cos and sin for each token of a row, `[T, D/2]` each, multiplied by the attention factor.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    half: usize,
}

impl RopeTable {
    /// Computes the table for the angles `position · inv_freq`, in f32 as transformers does.
    /// `inv_freq` has D/2 entries.
    pub fn new(positions: &[u32], inv_freq: &[f32], attention_factor: f32) -> Self {
        let half = inv_freq.len();
        let (mut cos, mut sin) = (
            Vec::with_capacity(positions.len() * half),
            Vec::with_capacity(positions.len() * half),
        );
        for &p in positions {
            for f in inv_freq {
                let (s, c) = (p as f32 * f).sin_cos();
                cos.push(c * attention_factor);
                sin.push(s * attention_factor);
            }
        }
        RopeTable {
            cos: cos.into(),
            sin: sin.into(),
            half,
        }
    }

    /// Returns the table times a factor for each token. The rotated vectors are then multiplied by
    /// these factors.
    pub fn scaled(&self, factors: &[f32]) -> Self {
        let scale = |table: &[f32]| -> Arc<Vec<f32>> {
            let rows = table.chunks(self.half).zip(factors);
            let scaled: Vec<f32> = rows
                .flat_map(|(row, factor)| row.iter().map(move |x| x * factor))
                .collect();
            scaled.into()
        };
        RopeTable {
            cos: scale(&self.cos),
            sin: scale(&self.sin),
            half: self.half,
        }
    }

    /// Returns the cos table and the sin table, `[T, D/2]` each.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }
}

/// Direction of the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Rotates by the angle of the token's position (forward pass).
    Forward,
    /// Rotates by the negative angle. This is the transpose of the forward map, attention factor
    /// included, so it maps the gradient of the output to that of the input.
    Backward,
}

/// Rotates the heads `heads` of every token in place. Each token is a row of `stride` elements.
pub fn rotate(
    x: &mut [f32],
    stride: usize,
    heads: Range<usize>,
    table: &RopeTable,
    direction: Direction,
) {
    let half = table.half;
    let sign = if direction == Direction::Forward {
        1.0
    } else {
        -1.0
    };
    let columns = heads.start * 2 * half..heads.end * 2 * half;
    debug_assert!(x.len() / stride * half == table.cos.len() && columns.end <= stride);
    let rows = thread_pool::rows_per_task(x.len() / stride);
    thread_pool::chunks(x, rows * stride, |task, x| {
        for (r, row) in x.chunks_mut(stride).enumerate() {
            let t = task * rows + r;
            let (cos, sin) = (
                &table.cos[t * half..][..half],
                &table.sin[t * half..][..half],
            );
            dispatch(
                #[inline(always)]
                || {
                    for head in row[columns.clone()].chunks_mut(2 * half) {
                        let (x1, x2) = head.split_at_mut(half);
                        for i in 0..half {
                            let (a, b, s) = (x1[i], x2[i], sin[i] * sign);
                            x1[i] = a * cos[i] - b * s;
                            x2[i] = b * cos[i] + a * s;
                        }
                    }
                },
            );
        }
    });
}
