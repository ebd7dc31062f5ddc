//! A second implementation of the decoder, written from its definition: plain loops in f64, one
//! token sequence at a time. It has no packed rows, no tiles, no tape and no backward pass, so it
//! shares no computation with the program, only the description of the model (`ModelSpec`). Its
//! derivatives are difference quotients.

use std::collections::HashMap;
use std::f64::consts::PI;

use bradley::model::decoder::Policy;
use bradley::model::params::{BlockParam, Linear, ParamId, params};
use bradley::model::rope::{QueryScaling, RopeConfig, RopeScaling, RotaryPairs};
use bradley::model::spec::{
    ActivationFunction, FeedForward, ModelSpec, Norms, Projections, QkNorm,
};
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
        let length = prompt.len() + completion.len();
        for index in 0..self.num_blocks() {
            hidden = self.block(index, &hidden, length);
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

    /// Returns a block's output for its input. `length` is the number of tokens of the sequence.
    pub fn block(&self, index: usize, input: &Hidden, length: usize) -> Hidden {
        let block = &self.spec.blocks[index];
        let attention = block.attention();
        let rotation = attention.rope.map(|rope| {
            let rope = &self.spec.ropes[rope];
            (rope, frequencies(rope, attention.head_dim, length))
        });
        let (heads, kv_heads, dim) = (attention.heads, attention.kv_heads, attention.head_dim);
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (position, x) in input.iter().enumerate() {
            let n = self.part_input(block.mixer_norms, index, BlockParam::InputNorm, x);
            let (query_width, kv_width) = (heads * dim, kv_heads * dim);
            let mut query = match attention.projections {
                Projections::Fused => self.linear(index, Linear::FusedQkv, &n),
                Projections::Separate => [Linear::Query, Linear::Key, Linear::Value]
                    .map(|linear| self.linear(index, linear, &n))
                    .concat(),
            };
            let value = query.split_off(query_width + kv_width);
            let mut key = query.split_off(query_width);
            for (vector, norm) in [
                (&mut query, BlockParam::QueryNorm),
                (&mut key, BlockParam::KeyNorm),
            ] {
                if attention.qk_norm == QkNorm::AllHeads {
                    *vector = self.norm(ParamId::Block(index, norm), vector);
                }
                for head in vector.chunks_mut(dim) {
                    if attention.qk_norm == QkNorm::PerHead {
                        let normed = self.norm(ParamId::Block(index, norm), head);
                        head.copy_from_slice(&normed);
                    }
                    if let Some((rope, rotation)) = &rotation {
                        rotate(rotation, rope.pairs, head, position);
                        if let (Some(scaling), BlockParam::QueryNorm) = (rope.query_scaling, norm) {
                            scale_query(scaling, head, position);
                        }
                    }
                }
            }
            queries.push(query);
            keys.push(key);
            values.push(value);
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
                let score = |j: usize| {
                    let score = f64::from(attention.scale) * dot(query, &keys[j][kv..][..dim]);
                    cap(attention.softcap, score)
                };
                let probabilities = softmax((first..=i).map(score).collect());
                let mut sum = vec![0.0; dim];
                for (p, j) in probabilities.iter().zip(first..) {
                    add(&mut sum, *p, &values[j][kv..][..dim]);
                }
                attended.extend(sum);
            }
            let mut y = x.clone();
            let part = self.linear(index, Linear::Output, &attended);
            add(
                &mut y,
                f64::from(block.output_factor),
                &self.normed(block.mixer_norms, index, BlockParam::MixerOutputNorm, part),
            );

            let FeedForward::Gated {
                activation,
                width,
                projections,
                ..
            } = block.feed_forward;
            let n = self.part_input(
                block.feed_forward_norms,
                index,
                BlockParam::FeedForwardNorm,
                &y,
            );
            let mut gate = match projections {
                Projections::Fused => self.linear(index, Linear::FusedGateUp, &n),
                Projections::Separate => [Linear::Gate, Linear::Up]
                    .map(|linear| self.linear(index, linear, &n))
                    .concat(),
            };
            let up = gate.split_off(width);
            let inner: Vec<f64> = gate
                .iter()
                .zip(&up)
                .map(|(g, u)| activate(activation, *g) * u)
                .collect();
            let part = self.linear(index, Linear::Down, &inner);
            add(
                &mut y,
                f64::from(block.output_factor),
                &self.normed(
                    block.feed_forward_norms,
                    index,
                    BlockParam::FeedForwardOutputNorm,
                    part,
                ),
            );
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
            let mut logits = product(head, &self.norm(ParamId::Norm, x));
            for logit in &mut logits {
                *logit *= f64::from(self.spec.logit_factor);
                *logit = cap(self.spec.logit_softcap, *logit);
            }
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

    /// Returns the input of a part: the residual stream, normed if the block has a norm there.
    fn part_input(&self, norms: Norms, block: usize, weight: BlockParam, x: &[f64]) -> Vec<f64> {
        match norms {
            Norms::Post => x.to_vec(),
            Norms::Pre | Norms::PreAndPost => self.norm(ParamId::Block(block, weight), x),
        }
    }

    /// Applies the norm on a part's output if the block has one.
    fn normed(&self, norms: Norms, block: usize, weight: BlockParam, part: Vec<f64>) -> Vec<f64> {
        match norms {
            Norms::Pre => part,
            Norms::PreAndPost | Norms::Post => self.norm(ParamId::Block(block, weight), &part),
        }
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
}

/// Multiplies a query by the factor for its position.
fn scale_query(scaling: QueryScaling, head: &mut [f64], position: usize) {
    let periods = (position / scaling.period) as f64;
    let factor = 1.0 + f64::from(scaling.beta) * (1.0 + periods).ln();
    head.iter_mut().for_each(|x| *x *= factor);
}

/// Rotates the first R dimensions of a head, given R/2 frequencies and the factor on cos and sin.
fn rotate(
    (frequencies, factor): &(Vec<f64>, f64),
    pairs: RotaryPairs,
    head: &mut [f64],
    position: usize,
) {
    for (i, frequency) in frequencies.iter().enumerate() {
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (sin, cos) = (sin * factor, cos * factor);
        let (one, other) = match pairs {
            RotaryPairs::Halves => (i, i + frequencies.len()),
            RotaryPairs::Interleaved => (2 * i, 2 * i + 1),
        };
        let (a, b) = (head[one], head[other]);
        (head[one], head[other]) = (a * cos - b * sin, b * cos + a * sin);
    }
}

/// Applies a soft-cap, if there is one.
fn cap(softcap: Option<f32>, x: f64) -> f64 {
    match softcap.map(f64::from) {
        None => x,
        Some(cap) => cap * (x / cap).tanh(),
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

/// Returns the rotary frequencies of a head in a sequence of `length` tokens, and the factor on cos
/// and sin.
fn frequencies(rope: &RopeConfig, head_dim: usize, length: usize) -> (Vec<f64>, f64) {
    let dim = rope.dims.unwrap_or(head_dim);
    let of = |theta: f64| (0..dim / 2).map(move |i| theta.powf(-2.0 * i as f64 / dim as f64));
    let plain = of(rope.theta);
    match rope.scaling {
        RopeScaling::Dynamic { factor, context } => {
            let excess = (length as f64 / context as f64 - 1.0).max(0.0);
            let growth = (1.0 + factor * excess).powf(dim as f64 / (dim as f64 - 2.0));
            (of(rope.theta * growth).collect(), 1.0)
        }
        RopeScaling::LongRope {
            ref short_factor,
            ref long_factor,
            attention_factor,
            original_max_position_embeddings,
        } => {
            let is_long = length > original_max_position_embeddings;
            let divisors = if is_long { long_factor } else { short_factor };
            let divided = plain.zip(divisors).map(|(f, divisor)| f / divisor);
            (divided.collect(), attention_factor)
        }
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
