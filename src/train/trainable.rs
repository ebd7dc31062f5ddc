//! A policy whose weights are being trained: which tensors are variables, and their gradients.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId, Var};
use rayon::prelude::*;

use crate::model::adapter::Adapter;
use crate::model::decoder::Policy;
use crate::model::ops::simd::{add_assign, dot};
use crate::model::ops::with_values;

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
    /// Operations on it are recorded.
    pub tracked: Policy,
    /// The same storage; operations on it leave no tape.
    pub plain: Policy,
    /// What is trained, in a fixed order.
    pub trainables: Vec<Trainable>,
    index: HashMap<TensorId, usize>,
    /// The embedding's place among the trainables: its gradient does not come from the tape.
    embed: Option<usize>,
}

impl TrainablePolicy {
    /// Trains `adapter` on the frozen weights of `base`.
    pub fn lora(base: &Policy, adapter: &Adapter) -> Result<Self> {
        let mut trainables = Vec::new();
        let adapter = adapter.map(|name, t| track(name, t, &mut trainables))?;
        let tracked =
            Policy { config: base.config.clone(), parameters: Arc::new(base.parameters.detached()), adapter: Some(Arc::new(adapter)) };
        Ok(Self::over(tracked, trainables))
    }

    /// Trains a copy of every weight of `start`.
    pub fn full(start: &Policy) -> Result<Self> {
        let mut trainables = Vec::new();
        let parameters = start.parameters.map(|name, t| track(name, t, &mut trainables))?;
        Ok(Self::over(Policy { config: start.config.clone(), parameters: Arc::new(parameters), adapter: None }, trainables))
    }

    fn over(tracked: Policy, trainables: Vec<Trainable>) -> Self {
        let index: HashMap<TensorId, usize> = trainables.iter().enumerate().map(|(i, t)| (t.var.id(), i)).collect();
        let embed = index.get(&tracked.parameters.embed.id()).copied();
        TrainablePolicy { plain: tracked.detached(), tracked, trainables, index, embed }
    }

    /// Numbers trained.
    pub fn num_trainable(&self) -> usize {
        self.trainables.iter().map(|t| t.var.elem_count()).sum()
    }

    /// Whether only an adapter is trained.
    pub fn is_lora(&self) -> bool {
        self.tracked.adapter.is_some()
    }
}

fn track(name: &str, t: &Tensor, trainables: &mut Vec<Trainable>) -> Result<Tensor> {
    let var = Var::from_tensor(&t.detach().contiguous()?)?;
    let tensor = var.as_tensor().clone();
    trainables.push(Trainable { name: name.to_owned(), var, decay: t.rank() >= 2 });
    Ok(tensor)
}

/// The gradient of every trainable tensor, summed over a step's micro-batches.
#[derive(Debug)]
pub struct Gradients(Vec<Vec<f32>>);

impl Gradients {
    /// All zero.
    pub fn zeros(policy: &TrainablePolicy) -> Self {
        Gradients(policy.trainables.iter().map(|t| vec![0f32; t.var.elem_count()]).collect())
    }

    /// Sets all to zero for the next step.
    pub fn clear(&mut self) {
        self.0.par_iter_mut().for_each(|g| g.fill(0.0));
    }

    /// Per trainable tensor, in their order.
    pub fn values(&self) -> &[Vec<f32>] {
        &self.0
    }

    /// Adds what a backward pass left for the trainable tensors.
    pub fn add(&mut self, policy: &TrainablePolicy, store: &GradStore) -> Result<()> {
        for id in store.get_ids() {
            if let (Some(&i), Some(g)) = (policy.index.get(id), store.get_id(*id)) {
                with_values("gradient", g, |g| add_assign(&mut self.0[i], g))?;
            }
        }
        Ok(())
    }

    /// Scatters the gradient of the embedded row `[T, C]` to the embedding, when that is trained.
    pub fn add_embedding(&mut self, policy: &TrainablePolicy, ids: &[u32], gradient: &Tensor) -> Result<()> {
        let Some(i) = policy.embed else { return Ok(()) };
        let width = gradient.dim(1)?;
        with_values("gradient", gradient, |g| {
            for (row, &id) in g.chunks(width).zip(ids) {
                add_assign(&mut self.0[i][id as usize * width..][..width], row);
            }
        })
    }

    /// √Σ g², summed per tensor in f32 and over tensors in f64, in a fixed order.
    pub fn norm(&self) -> f64 {
        let squares: Vec<f64> = self.0.par_iter().map(|g| g.chunks(1 << 14).map(|c| square_sum(c) as f64).sum()).collect();
        squares.iter().sum::<f64>().sqrt()
    }
}

fn square_sum(c: &[f32]) -> f32 {
    crate::model::ops::simd::dispatch(
        #[inline(always)]
        || dot(c, c),
    )
}
