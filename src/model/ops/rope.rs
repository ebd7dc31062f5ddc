//! Rotary position embedding in the "rotate half" form (arXiv:2104.09864, as transformers lays it out).

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::slice;

const OP: &str = "rope";

/// cos and sin for each token of a row, `[T, D/2]` each, the attention factor multiplied in.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    half: usize,
}

impl RopeTable {
    /// Angles `position · inv_freq`, formed in f32 as transformers does. `inv_freq` has D/2 entries.
    pub fn new(positions: &[u32], inv_freq: &[f32], attention_factor: f32) -> Self {
        let half = inv_freq.len();
        let (mut cos, mut sin) = (Vec::with_capacity(positions.len() * half), Vec::with_capacity(positions.len() * half));
        for &p in positions {
            for f in inv_freq {
                let (s, c) = (p as f32 * f).sin_cos();
                cos.push(c * attention_factor);
                sin.push(s * attention_factor);
            }
        }
        RopeTable { cos: cos.into(), sin: sin.into(), half }
    }
}

struct Rope {
    table: RopeTable,
    /// −1 rotates back: the transpose of a rotation (times the attention factor).
    sign: f32,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(OP, x, layout)?;
        let (tokens, width) = layout.shape().dims2()?;
        let half = self.table.half;
        if self.table.cos.len() != tokens * half || width % (2 * half) != 0 {
            candle_core::bail!("{OP}: a table of {} angles does not fit [{tokens}, {width}]", self.table.cos.len());
        }
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(width).zip(x.par_chunks(width)).enumerate().with_min_len(16).for_each(|(t, (y, x))| {
            let cos = &self.table.cos[t * half..][..half];
            let sin = &self.table.sin[t * half..][..half];
            for (y, x) in y.chunks_mut(2 * half).zip(x.chunks(2 * half)) {
                let ((y1, y2), (x1, x2)) = (y.split_at_mut(half), x.split_at(half));
                for i in 0..half {
                    let s = sin[i] * self.sign;
                    y1[i] = x1[i] * cos[i] - x2[i] * s;
                    y2[i] = x2[i] * cos[i] + x1[i] * s;
                }
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let back = Rope { table: self.table.clone(), sign: -self.sign };
        Ok(Some(g.contiguous()?.apply_op1_no_bwd(&back)?))
    }
}

/// Rotates every head of `x` `[T, heads·D]` by its token's position.
pub fn rope(x: &Tensor, table: &RopeTable) -> Result<Tensor> {
    x.apply_op1(Rope { table: table.clone(), sign: 1.0 })
}
