//! A policy whose weights are being trained: which tensors are variables, and their gradients.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Result, Tensor, Var, bail};

use crate::domain::training::Precision;
use crate::model::adapter::Adapter;
use crate::model::cuda::{Cuda, GradientBuffers};
use crate::model::decoder::Policy;
use crate::model::device::ComputeDevice;
use crate::model::gradients::{GradientSink, Place, Slot};
use crate::model::ops::buffer::large_pages;
use crate::model::ops::simd::{dispatch, dot};
use crate::model::ops::team;
use crate::model::parameters::PROJECTIONS;

/// One trainable tensor.
#[derive(Clone, Debug)]
pub struct Trainable {
    /// Its Hugging Face or PEFT name.
    pub name: String,
    /// Its storage, updated in place.
    pub var: Var,
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub decay: bool,
}

/// A policy being trained.
#[derive(Debug)]
pub struct TrainablePolicy {
    /// The policy; its trainable tensors share storage with `trainables`.
    pub policy: Policy,
    /// What is trained, in a fixed order.
    pub trainables: Vec<Trainable>,
    index: HashMap<Place, usize>,
}

impl TrainablePolicy {
    /// Trains `adapter` on the frozen weights of `base`.
    pub fn lora(base: &Policy, adapter: &Adapter, precision: Precision) -> Result<Self> {
        let mut trainables = Vec::new();
        let adapter = adapter.map(|name, t| track(name, t, &mut trainables))?;
        Self::over(Policy { adapter: Some(Arc::new(adapter)), precision, ..base.clone() }, trainables)
    }

    /// Trains a copy of every weight of `start`, in f32.
    pub fn full(start: &Policy, precision: Precision) -> Result<Self> {
        let mut trainables = Vec::new();
        let parameters = start.parameters.map(|name, t| track(name, t, &mut trainables))?;
        Self::over(Policy { parameters: Arc::new(parameters), adapter: None, precision, ..start.clone() }, trainables)
    }

    fn over(policy: Policy, trainables: Vec<Trainable>) -> Result<Self> {
        let mut index = HashMap::new();
        for (i, t) in trainables.iter().enumerate() {
            let Some(place) = place(&t.name) else { bail!("{} has no place in the decoder", t.name) };
            index.insert(place, i);
        }
        Ok(TrainablePolicy { policy, trainables, index })
    }

    /// Numbers trained.
    pub fn num_trainable(&self) -> usize {
        self.trainables.iter().map(|t| t.var.elem_count()).sum()
    }

    /// Whether only an adapter is trained.
    pub fn is_lora(&self) -> bool {
        self.policy.adapter.is_some()
    }
}

fn track(name: &str, t: &Tensor, trainables: &mut Vec<Trainable>) -> Result<Tensor> {
    let var = Var::from_tensor(&t.detach().to_dtype(candle_core::DType::F32)?.contiguous()?)?;
    let tensor = var.as_detached_tensor();
    trainables.push(Trainable { name: name.to_owned(), var, decay: t.rank() >= 2 });
    Ok(tensor)
}

/// Where in the decoder a tensor belongs, by its Hugging Face or PEFT name.
fn place(name: &str) -> Option<Place> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    match name {
        "model.embed_tokens.weight" => return Some(Place::Embedding),
        "model.norm.weight" => return Some(Place::Norm),
        "lm_head.weight" => return Some(Place::Head),
        _ => {}
    }
    let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let slot = match rest {
        "input_layernorm.weight" => Slot::InputNorm,
        "post_attention_layernorm.weight" => Slot::PostNorm,
        "self_attn.q_norm.weight" => Slot::QueryNorm,
        "self_attn.k_norm.weight" => Slot::KeyNorm,
        _ => {
            let index = PROJECTIONS.iter().position(|p| rest.starts_with(p))?;
            match rest.strip_prefix(PROJECTIONS[index])? {
                ".weight" => Slot::Weight(index),
                ".bias" => Slot::Bias(index),
                ".lora_A.weight" => Slot::LoraA(index),
                ".lora_B.weight" => Slot::LoraB(index),
                _ => return None,
            }
        }
    };
    Some(Place::Block(block.parse().ok()?, slot))
}

/// The gradient of every trainable tensor, summed over a step's micro-batches.
#[derive(Debug)]
pub struct Gradients {
    values: Vec<Vec<f32>>,
    index: HashMap<Place, usize>,
    /// The sums while they grow, where the passes run on a GPU.
    device: Option<GradientBuffers>,
}

impl Gradients {
    /// All zero.
    pub fn zeros(policy: &TrainablePolicy) -> Self {
        let values: Vec<Vec<f32>> = policy.trainables.iter().map(|t| vec![0f32; t.var.elem_count()]).collect();
        values.iter().for_each(|v| large_pages(v));
        Gradients { values, index: policy.index.clone(), device: None }
    }

    /// Sets all to zero for the next step.
    pub fn clear(&mut self) -> Result<()> {
        team::chunks(&mut self.values, 1, |_, g| g[0].fill(0.0));
        if let Some(device) = &self.device {
            device.clear()?;
        }
        Ok(())
    }

    /// Makes the host's values those of the device that summed them.
    pub fn collect(&mut self) -> Result<()> {
        if let Some(device) = &self.device {
            for (place, i) in &self.index {
                device.download(*place, &mut self.values[*i])?;
            }
        }
        Ok(())
    }

    /// Adds what another device has summed; afterwards the sums are those of both.
    pub fn reduce(&mut self, other: &mut Gradients) -> Result<()> {
        other.collect()?;
        let theirs = &other.values;
        team::chunks(&mut self.values, 1, |i, ours| ours[0].iter_mut().zip(&theirs[i]).for_each(|(sum, g)| *sum += g));
        Ok(())
    }

    /// Runs a pass on the policy's GPU with the sums there.
    pub(super) fn on_device(&mut self, policy: &Policy, pass: impl FnOnce(&Cuda, &GradientBuffers) -> Result<()>) -> Result<()> {
        let ComputeDevice::Cuda(cuda) = &policy.device else { bail!("the policy is not on a GPU") };
        if self.device.is_none() {
            self.device = Some(cuda.gradients(self.index.iter().map(|(place, i)| (*place, self.values[*i].len())))?);
        }
        match &self.device {
            Some(sums) => pass(cuda, sums),
            None => bail!("the GPU has no gradients"),
        }
    }

    /// Per trainable tensor, in their order.
    pub fn values(&self) -> &[Vec<f32>] {
        &self.values
    }

    /// √Σ g², summed per tensor in f32 and over tensors in f64, in a fixed order.
    pub fn norm(&self) -> f64 {
        let squares: Vec<f64> = team::map(self.values.len(), |i| self.values[i].chunks(1 << 14).map(|c| square_sum(c) as f64).sum());
        squares.iter().sum::<f64>().sqrt()
    }
}

impl GradientSink for Gradients {
    fn slot(&mut self, place: Place) -> Option<&mut [f32]> {
        let i = *self.index.get(&place)?;
        Some(&mut self.values[i])
    }
}

fn square_sum(c: &[f32]) -> f32 {
    dispatch(
        #[inline(always)]
        || dot(c, c),
    )
}
