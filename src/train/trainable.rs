//! Policies that are being trained: their trainable tensors and gradients.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Result, Tensor, Var, bail};

use crate::compute::cpu::buffer::large_pages;
use crate::compute::cpu::simd::{dispatch, dot};
use crate::compute::cpu::thread_pool;
use crate::domain::training::Precision;
use crate::model::adapter::Adapter;
use crate::model::cuda::{Cuda, GradientBuffers};
use crate::model::decoder::Policy;
use crate::model::device::ComputeDevice;
use crate::model::gradients::GradientSink;
use crate::model::params::ParamId;

/// One trainable tensor.
#[derive(Clone, Debug)]
pub struct Trainable {
    /// Parameter that the tensor belongs to.
    pub id: ParamId,
    /// Name in Hugging Face or PEFT files.
    pub name: String,
    /// Storage of the tensor, updated in place.
    pub var: Var,
    /// True if weight decay applies: for matrices, not for norms and biases.
    pub decay: bool,
}

/// A policy being trained.
#[derive(Debug)]
pub struct TrainablePolicy {
    /// The policy; its trainable tensors share storage with `trainables`.
    pub policy: Policy,
    /// Trainable tensors, in a fixed order.
    pub trainables: Vec<Trainable>,
    index: HashMap<ParamId, usize>,
}

impl TrainablePolicy {
    /// Creates a policy that trains `adapter` on the frozen weights of `base`.
    ///
    /// # Errors
    /// Fails if a tensor cannot be copied.
    pub fn lora(base: &Policy, adapter: &Adapter, precision: Precision) -> Result<Self> {
        let mut trainables = Vec::new();
        let adapter = adapter.map(|tensor, t| {
            let (trainable, shared) = track(tensor.id, &tensor.name, true, t)?;
            trainables.push(trainable);
            Ok::<_, candle_core::Error>(shared)
        })?;
        let policy = Policy {
            adapter: Some(Arc::new(adapter)),
            precision,
            ..base.clone()
        };
        Ok(Self::over(policy, trainables))
    }

    /// Creates a policy that trains an f32 copy of every weight of `start`.
    ///
    /// # Errors
    /// Fails if a tensor cannot be copied.
    pub fn full(start: &Policy, precision: Precision) -> Result<Self> {
        let mut trainables = Vec::new();
        let parameters = start.parameters.map(|param, t| {
            let (trainable, shared) = track(param.id, param.name(), param.decays(), t)?;
            trainables.push(trainable);
            Ok::<_, candle_core::Error>(shared)
        })?;
        trainables.sort_by_key(|t| order(t.id));
        let policy = Policy {
            parameters: Arc::new(parameters),
            adapter: None,
            precision,
            ..start.clone()
        };
        Ok(Self::over(policy, trainables))
    }

    fn over(policy: Policy, trainables: Vec<Trainable>) -> Self {
        let index = trainables
            .iter()
            .enumerate()
            .map(|(i, t)| (t.id, i))
            .collect();
        TrainablePolicy {
            policy,
            trainables,
            index,
        }
    }

    /// Returns the number of trainable parameters.
    pub fn num_trainable(&self) -> usize {
        self.trainables.iter().map(|t| t.var.elem_count()).sum()
    }

    /// Returns the bytes of the f32 master weights of `trained` parameters.
    pub fn master_bytes(trained: u64) -> u64 {
        size_of::<f32>() as u64 * trained
    }

    /// Returns true if only an adapter is trained.
    pub fn is_lora(&self) -> bool {
        self.policy.adapter.is_some()
    }
}

/// Returns a trainable f32 copy of a tensor, and a tensor that shares its storage.
fn track(id: ParamId, name: &str, decay: bool, t: &Tensor) -> Result<(Trainable, Tensor)> {
    let var = Var::from_tensor(&t.detach().to_dtype(candle_core::DType::F32)?.contiguous()?)?;
    let shared = var.as_detached_tensor();
    Ok((
        Trainable {
            id,
            name: name.to_owned(),
            var,
            decay,
        },
        shared,
    ))
}

/// Returns the sort key of a tensor in full fine-tuning: the order of the parameter table, but with
/// each block's norms after its linear layers. The gradient norm is summed in this order, so
/// another order would change its last bits.
fn order(id: ParamId) -> (usize, usize, bool) {
    match id {
        ParamId::Embedding => (0, 0, false),
        ParamId::Block(block, param) => (1, block, param.is_norm()),
        ParamId::Norm => (2, 0, true),
        ParamId::Head => (3, 0, false),
    }
}

/// Gradient of every trainable tensor, summed over a step's micro-batches.
#[derive(Debug)]
pub struct StepGradients {
    values: Vec<Vec<f32>>,
    index: HashMap<ParamId, usize>,
    /// Sums on the GPU, if the passes run there.
    device: Option<GradientBuffers>,
}

impl StepGradients {
    /// Returns gradients of zero.
    pub fn zeros(policy: &TrainablePolicy) -> Self {
        let values: Vec<Vec<f32>> = policy
            .trainables
            .iter()
            .map(|t| vec![0f32; t.var.elem_count()])
            .collect();
        values.iter().for_each(|v| large_pages(v));
        StepGradients {
            values,
            index: policy.index.clone(),
            device: None,
        }
    }

    /// Returns the bytes of the gradients of `trained` parameters.
    pub fn bytes(trained: u64) -> u64 {
        size_of::<f32>() as u64 * trained
    }

    /// Sets all gradients to zero for the next step.
    ///
    /// # Errors
    /// Fails if the device fails.
    pub fn clear(&mut self) -> Result<()> {
        thread_pool::chunks(&mut self.values, 1, |_, g| g[0].fill(0.0));
        if let Some(device) = &self.device {
            device.clear()?;
        }
        Ok(())
    }

    /// Copies the sums from the GPU to the host, if the passes run there.
    ///
    /// # Errors
    /// Fails if the device fails.
    pub fn collect(&mut self) -> Result<()> {
        if let Some(device) = &self.device {
            for (id, i) in &self.index {
                device.download(*id, &mut self.values[*i])?;
            }
        }
        Ok(())
    }

    /// Adds the gradients of another device to these.
    ///
    /// # Errors
    /// Fails if a device fails.
    pub fn reduce(&mut self, other: &mut StepGradients) -> Result<()> {
        other.collect()?;
        let theirs = &other.values;
        thread_pool::chunks(&mut self.values, 1, |i, ours| {
            ours[0]
                .iter_mut()
                .zip(&theirs[i])
                .for_each(|(sum, g)| *sum += g)
        });
        Ok(())
    }

    /// Runs a pass on the policy's GPU that adds to the gradients there.
    pub(super) fn on_device(
        &mut self,
        policy: &Policy,
        pass: impl FnOnce(&Cuda, &mut GradientBuffers) -> Result<()>,
    ) -> Result<()> {
        let ComputeDevice::Cuda(cuda) = &policy.device else {
            bail!("the policy is not on a GPU")
        };
        if self.device.is_none() {
            self.device = Some(
                cuda.gradients(
                    self.index
                        .iter()
                        .map(|(id, i)| (*id, self.values[*i].len())),
                )?,
            );
        }
        match &mut self.device {
            Some(sums) => pass(cuda, sums),
            None => bail!("the GPU has no gradients"),
        }
    }

    /// Returns the host's values of each trainable tensor, in the order of the tensors.
    pub fn values(&self) -> &[Vec<f32>] {
        &self.values
    }

    /// Returns the global norm √Σ g². Each tensor is summed in chunks in f32, the sums in f64,
    /// in a fixed order.
    pub fn norm(&self) -> f64 {
        let squares: Vec<f64> = thread_pool::map(self.values.len(), |i| {
            self.values[i]
                .chunks(1 << 14)
                .map(|c| square_sum(c) as f64)
                .sum()
        });
        squares.iter().sum::<f64>().sqrt()
    }
}

impl GradientSink for StepGradients {
    fn get_mut(&mut self, id: ParamId) -> Option<&mut [f32]> {
        let i = *self.index.get(&id)?;
        Some(&mut self.values[i])
    }
}

fn square_sum(c: &[f32]) -> f32 {
    dispatch(
        #[inline(always)]
        || dot(c, c),
    )
}

#[cfg(test)]
mod tests;
