//! AdamW with f32 state, updated in place (arXiv:1711.05101, with the order of operations of
//! torch.optim.AdamW).

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Var, bail};

use crate::compute::cpu::buffer::large_pages;
use crate::compute::cpu::simd::dispatch;
use crate::compute::cpu::thread_pool;
use crate::domain::training::OptimizerConfig;

/// Number of elements that one task updates.
const CHUNK: usize = 1 << 15;

/// Moments of every trainable tensor.
#[derive(Clone, Debug, Default)]
pub struct AdamW {
    /// Number of updates so far.
    pub updates: u64,
    /// First moment m of each tensor.
    pub first: Vec<Vec<f32>>,
    /// Second moment v of each tensor.
    pub second: Vec<Vec<f32>>,
}

/// Coefficients of one update.
#[derive(Clone, Copy, Debug)]
struct Step {
    beta1: f32,
    beta2: f32,
    eps: f32,
    /// Factor of the decoupled weight decay, 1 − lr·λ.
    shrink: f32,
    /// lr / (1 − β₁ᵗ).
    step_size: f32,
    /// Bias correction of the second moment, √(1 − β₂ᵗ).
    correction2: f32,
    /// Clipping coefficient, by which every gradient is multiplied.
    clip: f32,
}

impl AdamW {
    /// Creates moments of zero for tensors of these sizes.
    pub fn new(sizes: impl IntoIterator<Item = usize>) -> Self {
        let first: Vec<Vec<f32>> = sizes.into_iter().map(|n| vec![0f32; n]).collect();
        let second: Vec<Vec<f32>> = first.iter().map(|m| vec![0f32; m.len()]).collect();
        first
            .iter()
            .chain(&second)
            .for_each(|moments| large_pages(moments));
        AdamW {
            updates: 0,
            first,
            second,
        }
    }

    /// Returns the bytes of both moments of `trained` parameters.
    pub fn bytes(trained: u64) -> u64 {
        2 * size_of::<f32>() as u64 * trained
    }

    /// Updates every `(variable, decays)` with its gradient times `clip`.
    ///
    /// # Errors
    /// Fails if a variable is not contiguous f32 or its gradient has another size.
    pub fn step(
        &mut self,
        config: &OptimizerConfig,
        lr: f64,
        clip: f64,
        vars: &[(&Var, bool)],
        grads: &[Vec<f32>],
    ) -> Result<()> {
        self.updates += 1;
        let t = self.updates as f64;
        for (i, (var, decays)) in vars.iter().enumerate() {
            let decay = if *decays { config.weight_decay } else { 0.0 };
            let step = Step {
                beta1: config.adam_beta1 as f32,
                beta2: config.adam_beta2 as f32,
                eps: config.adam_epsilon as f32,
                shrink: (1.0 - lr * decay) as f32,
                step_size: (lr / (1.0 - config.adam_beta1.powf(t))) as f32,
                correction2: (1.0 - config.adam_beta2.powf(t)).sqrt() as f32,
                clip: clip as f32,
            };
            let state = Mutex::new((&mut self.first[i][..], &mut self.second[i][..]));
            var.inplace_op1(&Update {
                step,
                grad: &grads[i],
                state,
            })?;
        }
        Ok(())
    }
}

struct Update<'a> {
    step: Step,
    grad: &'a [f32],
    state: Mutex<(&'a mut [f32], &'a mut [f32])>,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            bail!("adamw: the variable must be contiguous f32")
        };
        let values = &mut values[start..end];
        if values.len() != self.grad.len() {
            bail!(
                "adamw: {} gradients for {} values",
                self.grad.len(),
                values.len()
            );
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (m, v) = &mut *state;
        let s = self.step;
        thread_pool::chunks3(values, m, v, CHUNK, |i, p, m, v| {
            let g = &self.grad[i * CHUNK..];
            dispatch(
                #[inline(always)]
                || {
                    for i in 0..p.len() {
                        let g = g[i] * s.clip;
                        m[i] += (g - m[i]) * (1.0 - s.beta1);
                        v[i] = v[i] * s.beta2 + (1.0 - s.beta2) * g * g;
                        let denominator = v[i].sqrt() / s.correction2 + s.eps;
                        p[i] = p[i] * s.shrink - s.step_size * (m[i] / denominator);
                    }
                },
            )
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    /// Three steps computed by hand from the definition, in f64.
    #[test]
    fn follows_the_definition() {
        let config = OptimizerConfig {
            weight_decay: 0.1,
            ..OptimizerConfig::default()
        };
        let start = [0.5f64, -1.25, 3.0];
        let grads = [[0.1f64, -0.2, 0.3], [0.4, 0.0, -0.1], [-0.3, 0.2, 0.05]];
        let var = Var::from_tensor(
            &Tensor::from_vec(start.map(|x| x as f32).to_vec(), 3, &Device::Cpu).unwrap(),
        )
        .unwrap();
        let mut adam = AdamW::new([3]);
        let (mut p, mut m, mut v) = (start, [0f64; 3], [0f64; 3]);
        for (k, g) in grads.iter().enumerate() {
            let lr = 0.01 * (k + 1) as f64;
            adam.step(
                &config,
                lr,
                0.5,
                &[(&var, true)],
                &[g.map(|x| x as f32).to_vec()],
            )
            .unwrap();
            for i in 0..3 {
                let g = g[i] * 0.5;
                p[i] *= 1.0 - lr * 0.1;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let t = (k + 1) as i32;
                p[i] -= lr * (m[i] / (1.0 - 0.9f64.powi(t)))
                    / ((v[i] / (1.0 - 0.999f64.powi(t))).sqrt() + 1e-8);
            }
        }
        let got: Vec<f32> = var.to_vec1().unwrap();
        for i in 0..3 {
            assert!(
                (got[i] as f64 - p[i]).abs() < 1e-6,
                "{} vs {}",
                got[i],
                p[i]
            );
        }
    }
}
