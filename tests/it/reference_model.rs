//! A second implementation of the decoder, written from its definition: plain loops in f64, one
//! token sequence at a time. It has no packed rows, no tiles, no tape and no backward pass, so it
//! shares no code and no optimisations with the program. Its derivatives are difference quotients.

use std::collections::HashMap;
use std::f64::consts::PI;

use bradley::model::decoder::Policy;
use bradley::model::params::{BlockParam, Linear, ParamId, params};
use bradley::model::rope::{RopeConfig, RopeScaling};
use bradley::model::spec::{ActivationFunction, FeedForward, ModelSpec, Norms};
use candle_core::{DType, Tensor};

/// Hidden states of a sequence: one vector for each token.
pub type Hidden = Vec<Vec<f64>>;

/// A model, optionally with an adapter.
pub struct ReferenceModel {
    spec: ModelSpec,
    /// Every matrix as rows, `[out, in]`.
    tensors: HashMap<ParamId, Vec<f64>>,
    /// The factor on B·A.
    lora_scale: f64,
    /// For each of the model's rotations: the angle in radians by which a pair of dimensions of a
    /// head turns from one position to the next, for each pair, and the factor on cos and sin.
    rotations: Vec<(Vec<f64>, f64)>,
}

impl ReferenceModel {
    /// Copies a policy's weights.
    pub fn new(policy: &Policy) -> Self {
        let spec = policy.config.spec.clone();
        let value = |id| Some((id, numbers(&policy.parameters.get(id)?)));
        let mut tensors: HashMap<ParamId, Vec<f64>> = params(&spec)
            .iter()
            .filter_map(|param| value(param.id))
            .collect();
        let adapter = policy.adapter.as_deref();
        for block in 0..spec.blocks.len() {
            for linear in Linear::ALL {
                if let Some(update) = adapter.and_then(|adapter| adapter.get(block, linear)) {
                    tensors.insert(
                        ParamId::Block(block, BlockParam::LoraA(linear)),
                        numbers(&update.a),
                    );
                    tensors.insert(
                        ParamId::Block(block, BlockParam::LoraB(linear)),
                        numbers(&update.b),
                    );
                }
            }
        }
        let rotations = spec
            .ropes
            .iter()
            .map(|rope| frequencies(rope, spec.head_dim()))
            .collect();
        let lora_scale = adapter.map_or(1.0, |adapter| {
            let (alpha, rank) = (adapter.config.alpha, adapter.config.rank as f64);
            if adapter.config.use_rslora {
                alpha / rank.sqrt()
            } else {
                alpha / rank
            }
        });
        ReferenceModel {
            spec,
            tensors,
            lora_scale,
            rotations,
        }
    }

    /// Returns the number of decoder blocks.
    pub fn num_blocks(&self) -> usize {
        self.spec.blocks.len()
    }

    /// Adds `step` times `direction` to a tensor.
    pub fn shift(&mut self, id: ParamId, direction: &[f64], step: f64) {
        let tensor = self.tensors.get_mut(&id).unwrap();
        assert_eq!(tensor.len(), direction.len());
        tensor
            .iter_mut()
            .zip(direction)
            .for_each(|(weight, d)| *weight += step * d);
    }

    /// Returns log p of each token of `completion` after `prompt`.
    pub fn log_probs(&self, prompt: &[u32], completion: &[u32]) -> Vec<f64> {
        let mut hidden = self.embed(prompt, completion);
        for index in 0..self.num_blocks() {
            hidden = self.block(index, &hidden);
        }
        self.head(&hidden, prompt.len(), completion)
    }

    /// Returns the embeddings of all tokens except the last one, which predicts nothing.
    pub fn embed(&self, prompt: &[u32], completion: &[u32]) -> Hidden {
        let (table, width) = (&self.tensors[&ParamId::Embedding], self.spec.hidden_size);
        let tokens = prompt.iter().chain(&completion[..completion.len() - 1]);
        let scale = f64::from(self.spec.embedding_scale);
        let embedding = |id: &u32| {
            table[*id as usize * width..][..width]
                .iter()
                .map(|x| scale * x)
                .collect()
        };
        tokens.map(embedding).collect()
    }

    /// Returns a block's output for its input.
    pub fn block(&self, index: usize, input: &Hidden) -> Hidden {
        let block = &self.spec.blocks[index];
        let (Norms::Pre, Norms::Pre) = (block.mixer_norms, block.feed_forward_norms);
        let attention = block.attention();
        let (heads, kv_heads, dim) = (attention.heads, attention.kv_heads, attention.head_dim);
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (position, x) in input.iter().enumerate() {
            let n = self.norm(ParamId::Block(index, BlockParam::InputNorm), x);
            let mut query = self.linear(index, Linear::Query, &n);
            let mut key = self.linear(index, Linear::Key, &n);
            for (vector, norm) in [
                (&mut query, BlockParam::QueryNorm),
                (&mut key, BlockParam::KeyNorm),
            ] {
                for head in vector.chunks_mut(dim) {
                    if self.tensors.contains_key(&ParamId::Block(index, norm)) {
                        let normed = self.norm(ParamId::Block(index, norm), head);
                        head.copy_from_slice(&normed);
                    }
                    self.rotate(attention.rope, head, position);
                }
            }
            queries.push(query);
            keys.push(key);
            values.push(self.linear(index, Linear::Value, &n));
        }

        let mut output = Hidden::new();
        for (i, x) in input.iter().enumerate() {
            // A window of w tokens holds the token itself and the w − 1 before it.
            let first = attention
                .window
                .map_or(0, |window| (i + 1).saturating_sub(window));
            let mut attended = Vec::with_capacity(heads * dim);
            for head in 0..heads {
                let kv = head / (heads / kv_heads) * dim;
                let query = &queries[i][head * dim..][..dim];
                let score =
                    |j: usize| f64::from(attention.scale) * dot(query, &keys[j][kv..][..dim]);
                let probabilities = softmax((first..=i).map(score).collect());
                let mut sum = vec![0.0; dim];
                for (p, j) in probabilities.iter().zip(first..) {
                    add(&mut sum, *p, &values[j][kv..][..dim]);
                }
                attended.extend(sum);
            }
            let mut y = x.clone();
            add(&mut y, 1.0, &self.linear(index, Linear::Output, &attended));

            let FeedForward::Gated { activation, .. } = block.feed_forward;
            let n = self.norm(ParamId::Block(index, BlockParam::FeedForwardNorm), &y);
            let gate = self.linear(index, Linear::Gate, &n);
            let up = self.linear(index, Linear::Up, &n);
            let inner: Vec<f64> = gate
                .iter()
                .zip(&up)
                .map(|(g, u)| activate(activation, *g) * u)
                .collect();
            add(&mut y, 1.0, &self.linear(index, Linear::Down, &inner));
            output.push(y);
        }
        output
    }

    /// Returns log p of each token of the completion, from the last block's output.
    pub fn head(&self, hidden: &Hidden, prompt: usize, completion: &[u32]) -> Vec<f64> {
        let head = self
            .tensors
            .get(&ParamId::Head)
            .unwrap_or_else(|| &self.tensors[&ParamId::Embedding]);
        let predictors = hidden[prompt - 1..].iter().zip(completion);
        let log_prob = |(x, target): (&Vec<f64>, &u32)| {
            let logits = product(head, &self.norm(ParamId::Norm, x));
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
            logits[*target as usize] - largest - sum.ln()
        };
        predictors.map(log_prob).collect()
    }

    /// Computes RMSNorm: x / √(mean(x²) + ε) ⊙ w, or ⊙ (1 + w).
    fn norm(&self, weight: ParamId, x: &[f64]) -> Vec<f64> {
        let one = if self.spec.norms_add_one { 1.0 } else { 0.0 };
        let rms = (dot(x, x) / x.len() as f64 + self.spec.rms_norm_eps).sqrt();
        x.iter()
            .zip(&self.tensors[&weight])
            .map(|(x, w)| x / rms * (one + w))
            .collect()
    }

    /// Computes W·x + b + scale·B·(A·x).
    fn linear(&self, block: usize, linear: Linear, x: &[f64]) -> Vec<f64> {
        let tensor = |param| self.tensors.get(&ParamId::Block(block, param));
        let mut y = product(tensor(BlockParam::Weight(linear)).unwrap(), x);
        if let Some(bias) = tensor(BlockParam::Bias(linear)) {
            add(&mut y, 1.0, bias);
        }
        if let (Some(a), Some(b)) = (
            tensor(BlockParam::LoraA(linear)),
            tensor(BlockParam::LoraB(linear)),
        ) {
            add(&mut y, self.lora_scale, &product(b, &product(a, x)));
        }
        y
    }

    /// Rotates dimension i of a head with dimension i + D/2.
    fn rotate(&self, rope: usize, head: &mut [f64], position: usize) {
        let half = head.len() / 2;
        let (frequencies, factor) = &self.rotations[rope];
        for (i, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let (sin, cos) = (sin * factor, cos * factor);
            let (a, b) = (head[i], head[i + half]);
            (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }
}

/// Computes an activation by its definition.
fn activate(activation: ActivationFunction, x: f64) -> f64 {
    match activation {
        ActivationFunction::Silu => x / (1.0 + (-x).exp()),
        ActivationFunction::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
    }
}

/// Returns the rotary frequencies of a head, and the factor on cos and sin.
fn frequencies(rope: &RopeConfig, dim: usize) -> (Vec<f64>, f64) {
    let plain = (0..dim / 2).map(|i| rope.theta.powf(-2.0 * i as f64 / dim as f64));
    match rope.scaling {
        RopeScaling::None => (plain.collect(), 1.0),
        RopeScaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let scale = |f: f64| {
                let turns = original_max_position_embeddings as f64 * f / (2.0 * PI);
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor))
                    .clamp(0.0, 1.0);
                kept * f + (1.0 - kept) * f / factor
            };
            (plain.map(scale).collect(), 1.0)
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            mscale,
            mscale_all_dim,
            truncate,
        } => {
            // The dimension that turns `turns` times over the context of the pretrained model.
            let dimension = |turns: f64| {
                let wavelength = original_max_position_embeddings as f64 / turns;
                dim as f64 * (wavelength / (2.0 * PI)).ln() / (2.0 * rope.theta.ln())
            };
            let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            let scale = |(i, f): (usize, f64)| {
                let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                interpolated * f / factor + (1.0 - interpolated) * f
            };
            let of = |m: f64| {
                if factor <= 1.0 {
                    1.0
                } else {
                    0.1 * m * factor.ln() + 1.0
                }
            };
            let default = match (mscale, mscale_all_dim) {
                (Some(one), Some(all)) if one != 0.0 && all != 0.0 => of(one) / of(all),
                _ => of(1.0),
            };
            (
                plain.enumerate().map(scale).collect(),
                attention_factor.unwrap_or(default),
            )
        }
    }
}

/// Returns a tensor's elements.
fn numbers(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor
        .to_dtype(DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    flat.into_iter().map(f64::from).collect()
}

/// Computes M·x for a matrix as rows.
fn product(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| dot(row, x)).collect()
}

/// Computes a dot product as four sums side by side, so that no addition waits for the one before
/// it.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 4];
    let whole = a.len() / 4 * 4;
    for (a, b) in a[..whole].chunks_exact(4).zip(b[..whole].chunks_exact(4)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest: f64 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

/// Computes to += factor·x.
fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    assert_eq!(to.len(), x.len());
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}

fn softmax(scores: Vec<f64>) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.into_iter().map(|e| e / sum).collect()
}
