//! A decoder as plain data. Families of models differ in the values of these types, not in code.
//!
//! Enums with a single variant are meant to be extended. Code destructures them with an irrefutable
//! pattern, so a new variant does not compile until every use has been adapted.

use serde_json::{Value, json};

use super::rope::{RopeConfig, RopeScaling, RotaryPairs};
use crate::compute::cpu::attention::Heads;
pub use crate::compute::cpu::swiglu::ActivationFunction;
use crate::domain::training::Precision;

/// A decoder: an embedding, blocks, a last RMSNorm and a head.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// V, the size of the vocabulary.
    pub vocab_size: usize,
    /// C, the width of the residual stream.
    pub hidden_size: usize,
    /// Maximum number of positions that the model was trained for.
    pub max_position_embeddings: usize,
    /// ε of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Factor on the token embeddings, not yet rounded. [`ModelSpec::embedding_scale_in`] rounds it
    /// to the precision of a pass.
    pub embedding_scale: f32,
    /// True if passes in bf16 round that factor to bf16, as the classes of Gemma do.
    pub rounds_embedding_scale: bool,
    /// True if every RMSNorm multiplies by 1 + w instead of w.
    pub norms_add_one: bool,
    /// The sets of rotary frequencies. A block refers to one by its index
    /// ([`AttentionSpec::rope`]).
    pub ropes: Vec<RopeConfig>,
    /// True if the head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Factor on the logits, before the soft-cap.
    pub logit_factor: f32,
    /// Soft-cap c of the logits: a logit l is replaced by c·tanh(l / c). `None` means no soft-cap.
    pub logit_softcap: Option<f32>,
    /// The decoder blocks, first to last. There is at least one.
    pub blocks: Vec<BlockSpec>,
}

/// One decoder block: a mixer, in which tokens exchange information, then a feed-forward part. The
/// output of each is added to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockSpec {
    /// The first part of the block.
    pub mixer: Mixer,
    /// RMSNorms around the mixer.
    pub mixer_norms: Norms,
    /// The second part of the block.
    pub feed_forward: FeedForward,
    /// RMSNorms around the feed-forward part.
    pub feed_forward_norms: Norms,
    /// Names of the norms in files.
    pub norm_names: NormNames,
    /// Factor on the output of each part, after the norm on it, before it is added to the residual
    /// stream.
    pub output_factor: f32,
}

/// The part of a block in which the tokens of a row exchange information.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention.
    Attention(AttentionSpec),
}

/// Grouped-query attention (arXiv:2305.13245) with rotary embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// H, the number of query heads.
    pub heads: usize,
    /// K, the number of key and value heads. K divides H.
    pub kv_heads: usize,
    /// D, the width of a head. Always even, not always C / H.
    pub head_dim: usize,
    /// Factor on the dot products of queries and keys.
    pub scale: f32,
    /// Soft-cap c of the scaled scores: a score s is replaced by c·tanh(s / c). `None` means no
    /// soft-cap.
    pub softcap: Option<f32>,
    /// Index in [`ModelSpec::ropes`] of the frequencies that rotate queries and keys. `None` means
    /// that they are not rotated.
    pub rope: Option<usize>,
    /// Sliding window: a token attends to itself and to at most `window − 1` tokens before it.
    /// `None` means that it attends to all tokens before it.
    pub window: Option<usize>,
    /// Norms on queries and keys.
    pub qk_norm: QkNorm,
    /// True if q, k and v have biases.
    pub qkv_bias: bool,
    /// True if the output projection has a bias.
    pub output_bias: bool,
    /// The matrices that compute queries, keys and values.
    pub projections: Projections,
}

/// Storage of projections with the same input. Fused projections are one parameter, with one
/// low-rank update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projections {
    /// Each projection has a matrix of its own.
    Separate,
    /// One matrix computes all of them.
    Fused,
}

/// RMSNorms on queries and keys, before the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// No norms on queries and keys.
    Absent,
    /// Over the D elements of each head. All query heads share one weight `[D]`, all key heads
    /// another.
    PerHead,
    /// Over the H·D elements of all query heads and the K·D elements of all key heads.
    AllHeads,
}

/// The part of a block that processes each token independently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedForward {
    /// down(activation(gate(x)) ⊙ up(x)).
    Gated {
        /// F, the number of outputs of gate and of up.
        width: usize,
        /// The activation function, applied to the gate.
        activation: ActivationFunction,
        /// True if gate, up and down have biases.
        bias: bool,
        /// The matrices that compute gate and up.
        projections: Projections,
    },
}

/// Names of the norms of a block in files. The variants differ only for blocks with norms on
/// outputs: families disagree on which norm "post-attention norm" means. In all other blocks it
/// is the norm before the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormNames {
    /// As in Gemma and OLMo: the "post-attention norm" is the norm on the mixer's output. The norm
    /// before the feed-forward part has another name.
    Gemma,
    /// As in GLM-4: the "post-attention norm" is always the norm before the feed-forward part. The
    /// norms on outputs have names that no other family uses.
    Glm,
}

/// Positions of the RMSNorms around a part of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// On the input of the part.
    Pre,
    /// On the input of the part, and on its output before the output is added to the residual
    /// stream.
    PreAndPost,
    /// On the output of the part only.
    Post,
}

impl Norms {
    /// Returns true if there is a norm on the input.
    pub fn has_pre(self) -> bool {
        match self {
            Norms::Pre | Norms::PreAndPost => true,
            Norms::Post => false,
        }
    }

    /// Returns true if there is a norm on the output.
    pub fn has_post(self) -> bool {
        match self {
            Norms::Pre => false,
            Norms::PreAndPost | Norms::Post => true,
        }
    }
}

impl ModelSpec {
    /// Returns D of the widest attention head. The rotary frequencies are computed for this width.
    pub fn head_dim(&self) -> usize {
        let of = |block: &BlockSpec| block.attention().head_dim;
        self.blocks.iter().map(of).max().unwrap_or(0)
    }

    /// Returns a number that identifies the rotary frequencies of a sequence of this length: two
    /// lengths have the same number exactly if all their frequencies are equal.
    pub fn length_class(&self, length: usize) -> usize {
        // No summand decreases with the length, so equal sums have equal summands.
        let of = |rope: &RopeConfig| rope.length_class(length);
        self.ropes.iter().map(of).sum()
    }

    /// Returns the properties that [`super::config::ModelConfig::canonical`] does not list itself,
    /// as far as they differ from the Llama layout. They are part of the model's identity. A model
    /// of that layout has none, so that its identity is the one that older versions computed.
    ///
    /// Only the rotations are listed for every block; the other properties are read from
    /// the first block.
    pub fn distinctions(&self) -> Vec<Value> {
        let mut found = Vec::new();
        let Some(block) = self.blocks.first() else {
            return found;
        };
        let attention = block.attention();
        if attention.projections == Projections::Fused || block.fuses_gate_up() {
            let fused = [
                attention.projections == Projections::Fused,
                block.fuses_gate_up(),
            ];
            found.push(json!(["fused_matrices", fused]));
        }
        match block.feed_forward {
            FeedForward::Gated {
                activation: ActivationFunction::Silu,
                ..
            } => {}
            FeedForward::Gated {
                activation: ActivationFunction::GeluTanh,
                ..
            } => found.push(json!(["activation", "gelu_tanh"])),
        }
        if attention.scale != 1.0 / (attention.head_dim as f32).sqrt() {
            found.push(json!(["attention_scale", attention.scale.to_bits()]));
        }
        if let Some(cap) = attention.softcap {
            found.push(json!(["attention_softcap", cap.to_bits()]));
        }
        if let Some(cap) = self.logit_softcap {
            found.push(json!(["logit_softcap", cap.to_bits()]));
        }
        if block.normed_outputs() > 0 {
            found.push(json!([
                "output_norms",
                [
                    block.mixer_norms.has_post(),
                    block.feed_forward_norms.has_post()
                ]
            ]));
        }
        let input_norms = [block.mixer_norms, block.feed_forward_norms].map(Norms::has_pre);
        if input_norms != [true, true] {
            found.push(json!(["input_norms", input_norms]));
        }
        if attention.qk_norm == QkNorm::AllHeads {
            found.push(json!(["qk_norm", "all_heads"]));
        }
        if block.output_factor != 1.0 {
            found.push(json!(["output_factor", block.output_factor.to_bits()]));
        }
        if self.logit_factor != 1.0 {
            found.push(json!(["logit_factor", self.logit_factor.to_bits()]));
        }
        if self.norms_add_one {
            found.push(json!(["norms_add_one", true]));
        }
        if self.embedding_scale != 1.0 {
            found.push(json!(["embedding_scale", self.embedding_scale.to_bits()]));
        }
        if self.ropes.len() > 1 {
            let ropes: Vec<(Vec<u32>, u32)> = self.ropes[1..]
                .iter()
                .map(|rope| rope.bits(self.head_dim()))
                .collect();
            let of_blocks: Vec<Option<usize>> = self
                .blocks
                .iter()
                .map(|block| block.attention().rope)
                .collect();
            found.push(json!(["other_ropes", ropes, of_blocks]));
        }
        for (index, rope) in self.ropes.iter().enumerate() {
            if rope.pairs == RotaryPairs::Interleaved {
                found.push(json!(["interleaved_rope", index]));
            }
            match rope.scaling {
                RopeScaling::None
                | RopeScaling::Linear { .. }
                | RopeScaling::Llama3 { .. }
                | RopeScaling::Yarn { .. } => {}
                RopeScaling::Dynamic { factor, context } => {
                    found.push(json!(["dynamic_rope", index, factor, context]));
                }
                RopeScaling::LongRope {
                    original_max_position_embeddings: context,
                    ..
                } => {
                    let (long, _) = rope.bits_at(self.head_dim(), context + 1);
                    found.push(json!(["long_rope", index, context, long]));
                }
            }
        }
        let query_scalings: Vec<Option<(u32, usize)>> = self
            .ropes
            .iter()
            .map(|rope| rope.query_scaling)
            .map(|scaling| scaling.map(|scaling| (scaling.beta.to_bits(), scaling.period)))
            .collect();
        if query_scalings.iter().any(Option::is_some) {
            found.push(json!(["query_scalings", query_scalings]));
        }
        let is_unrotated = |(_, block): &(usize, &BlockSpec)| block.attention().rope.is_none();
        let unrotated: Vec<usize> = self
            .blocks
            .iter()
            .enumerate()
            .filter(is_unrotated)
            .map(|(index, _)| index)
            .collect();
        if !unrotated.is_empty() {
            found.push(json!(["unrotated_blocks", unrotated]));
        }
        found
    }

    /// Returns the factor on the token embeddings in passes of a precision, rounded as transformers
    /// rounds it.
    pub fn embedding_scale_in(&self, precision: Precision) -> f32 {
        match precision {
            Precision::Bf16 if self.rounds_embedding_scale => {
                half::bf16::from_f32(self.embedding_scale).to_f32()
            }
            Precision::F32 | Precision::Bf16 => self.embedding_scale,
        }
    }
}

impl BlockSpec {
    /// Returns the block's attention.
    pub fn attention(&self) -> &AttentionSpec {
        let Mixer::Attention(attention) = &self.mixer;
        attention
    }

    /// Returns the block with one matrix for gate and up.
    pub fn with_fused_gate_up(self) -> Self {
        let FeedForward::Gated {
            width,
            activation,
            bias,
            projections: _,
        } = self.feed_forward;
        BlockSpec {
            feed_forward: FeedForward::Gated {
                width,
                activation,
                bias,
                projections: Projections::Fused,
            },
            ..self
        }
    }

    /// Returns true if one matrix computes gate and up.
    pub fn fuses_gate_up(&self) -> bool {
        let FeedForward::Gated { projections, .. } = self.feed_forward;
        projections == Projections::Fused
    }

    /// Returns the number of matrices as wide as the residual stream that a tape holds: the inputs
    /// of both parts, and the outputs that pass through a norm.
    pub fn saved_streams(&self) -> usize {
        2 + self.normed_outputs()
    }

    /// Returns the number of such matrices that a backward pass holds at the same time: the
    /// gradient of the residual stream, that gradient times the factor on outputs, and the gradient
    /// of a part's output if the output has a norm.
    pub fn gradient_streams(&self) -> usize {
        1 + usize::from(self.output_factor != 1.0) + self.normed_outputs().min(1)
    }

    /// Returns the number of parts whose output has a norm.
    fn normed_outputs(&self) -> usize {
        [self.mixer_norms, self.feed_forward_norms]
            .into_iter()
            .filter(|norms| norms.has_post())
            .count()
    }

    /// Returns the number of matrices as wide as the residual stream that a forward pass holds at
    /// the same time. Two are the residual stream and the operand of a part. A norm on outputs adds
    /// two, an output before and after it. A factor on outputs without such a norm adds one.
    pub fn forward_streams(&self) -> usize {
        let outputs = match self.normed_outputs() {
            0 => usize::from(self.output_factor != 1.0),
            _ => 2,
        };
        2 + outputs
    }
}

impl AttentionSpec {
    /// Returns the heads in the form that the kernels take.
    pub fn as_heads(&self) -> Heads {
        let AttentionSpec {
            heads: query,
            kv_heads: key,
            head_dim: dim,
            window,
            scale,
            softcap,
            ..
        } = *self;
        Heads {
            query,
            key,
            dim,
            window,
            scale,
            softcap,
        }
    }

    /// Returns H·D, the width of the queries and of attention's output.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns K·D, the width of the keys and of the values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}
