//! SwiGLU: y = silu(gate) ⊙ up (arXiv:2002.05202).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::simd::{dispatch, sigmoid};
use super::{slice, tensor, with_values};

const OP: &str = "swiglu";
/// Elements one task handles.
const CHUNK: usize = 8192;

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, gate: &CpuStorage, lg: &Layout, up: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(OP, gate, lg)?, slice(OP, up, lu)?);
        let mut y = vec![0f32; gate.len()];
        y.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK)).for_each(|((y, a), b)| {
            dispatch(
                #[inline(always)]
                || {
                    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                        *y = a * sigmoid(*a) * b;
                    }
                },
            )
        });
        Ok((CpuStorage::F32(y), lg.shape().clone()))
    }

    /// With s = σ(gate): d_up = g·gate·s, d_gate = g·up·s·(1 + gate·(1 − s)).
    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (da, db) = with_values(OP, gate, |a| {
            with_values(OP, up, |b| {
                with_values(OP, g, |g| {
                    let (mut da, mut db) = (vec![0f32; a.len()], vec![0f32; a.len()]);
                    da.par_chunks_mut(CHUNK)
                        .zip(db.par_chunks_mut(CHUNK))
                        .zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)).zip(g.par_chunks(CHUNK)))
                        .for_each(|((da, db), ((a, b), g))| {
                            dispatch(
                                #[inline(always)]
                                || {
                                    for i in 0..a.len() {
                                        let s = sigmoid(a[i]);
                                        db[i] = g[i] * a[i] * s;
                                        da[i] = g[i] * b[i] * s * (1.0 + a[i] * (1.0 - s));
                                    }
                                },
                            )
                        });
                    (da, db)
                })
            })
        })???;
        Ok((Some(tensor(da, gate.shape().clone())?), Some(tensor(db, up.shape().clone())?)))
    }
}

/// silu(gate) ⊙ up, both `[T, F]`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.apply_op2(up, SwiGlu)
}
