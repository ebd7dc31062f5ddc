//! Rotary position embedding (arXiv:2104.09864) on the first dimensions of each head.

use std::ops::Range;
use std::sync::Arc;

use super::simd::dispatch;
use super::thread_pool;

/// Dimensions of a head that are rotated together, of the R that are rotated at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryPairs {
    /// i and i + R/2, the "rotate half" form of transformers.
    Halves,
    /// 2i and 2i + 1.
    Interleaved,
}

/// cos and sin for each token of a row, `[T, R/2]` each. R is the number of rotated dimensions of a
/// head. Both are multiplied by the attention factor, a constant of some context extensions (YaRN,
/// LongRoPE); without one it is 1.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    half: usize,
    pairs: RotaryPairs,
}

impl RopeTable {
    /// Computes the table for the angles `position · inv_freq`, in f32 as transformers does. Each
    /// segment of the row has its positions and its `inv_freq`. All `inv_freq` have the same
    /// length, R/2.
    pub fn new<'a>(
        segments: impl IntoIterator<Item = (Range<u32>, &'a [f32])>,
        attention_factor: f32,
        pairs: RotaryPairs,
    ) -> Self {
        let (mut cos, mut sin, mut half) = (Vec::new(), Vec::new(), 0);
        for (positions, inv_freq) in segments {
            half = inv_freq.len();
            for p in positions {
                for f in inv_freq {
                    let (s, c) = (p as f32 * f).sin_cos();
                    cos.push(c * attention_factor);
                    sin.push(s * attention_factor);
                }
            }
        }
        RopeTable {
            cos: cos.into(),
            sin: sin.into(),
            half,
            pairs,
        }
    }

    /// Returns the table times a factor for each token. If all dimensions of a head are rotated,
    /// [`rotate`] then also multiplies the token's heads by its factor. Ministral 3 scales queries
    /// in this way.
    pub fn scaled(&self, factors: &[f32]) -> Self {
        let scale = |table: &[f32]| -> Arc<Vec<f32>> {
            // The table of a row without tokens has no width.
            let rows = table.chunks(self.half.max(1)).zip(factors);
            let scaled: Vec<f32> = rows
                .flat_map(|(row, factor)| row.iter().map(move |x| x * factor))
                .collect();
            scaled.into()
        };
        RopeTable {
            cos: scale(&self.cos),
            sin: scale(&self.sin),
            half: self.half,
            pairs: self.pairs,
        }
    }

    /// Returns the cos table and the sin table, `[T, R/2]` each.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Returns R/2, the number of pairs that are rotated in each head.
    pub fn half(&self) -> usize {
        self.half
    }

    /// Returns the dimensions that are rotated together.
    pub fn pairs(&self) -> RotaryPairs {
        self.pairs
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

/// Rotates the heads `heads` of width `dim` of every token in place. Each token is a row of
/// `stride` elements. Dimensions of a head after the first R do not change.
pub fn rotate(
    x: &mut [f32],
    stride: usize,
    (heads, dim): (Range<usize>, usize),
    table: &RopeTable,
    direction: Direction,
) {
    let (half, pairs) = (table.half, table.pairs);
    let sign = if direction == Direction::Forward {
        1.0
    } else {
        -1.0
    };
    let columns = heads.start * dim..heads.end * dim;
    debug_assert!(x.len() / stride * half == table.cos.len());
    debug_assert!(2 * half <= dim && columns.end <= stride);
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
                    for head in row[columns.clone()].chunks_mut(dim) {
                        let head = &mut head[..2 * half];
                        match pairs {
                            RotaryPairs::Halves => {
                                let (x1, x2) = head.split_at_mut(half);
                                for i in 0..half {
                                    let (a, b, s) = (x1[i], x2[i], sin[i] * sign);
                                    x1[i] = a * cos[i] - b * s;
                                    x2[i] = b * cos[i] + a * s;
                                }
                            }
                            RotaryPairs::Interleaved => {
                                for (i, pair) in head.chunks_exact_mut(2).enumerate() {
                                    let (a, b, s) = (pair[0], pair[1], sin[i] * sign);
                                    pair[0] = a * cos[i] - b * s;
                                    pair[1] = b * cos[i] + a * s;
                                }
                            }
                        }
                    }
                },
            );
        }
    });
}
