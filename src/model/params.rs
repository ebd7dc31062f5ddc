//! The table of a model's parameters. It lists every tensor once, with its id, its name in each
//! file format, its shape and its role.
//!
//! Names and shapes of tensors are defined only here. Loading, export, GGUF, LoRA, PEFT's names,
//! gradients, weight decay, the copies on a GPU and the parameter counts all read this table.

use std::borrow::Cow;
use std::collections::HashSet;

use super::spec::{
    AttentionSpec, BlockSpec, FeedForward, Mixer, ModelSpec, NormNames, Norms, Projections, QkNorm,
};
use crate::domain::training::LoraConfig;

/// Id of a parameter of a policy, either of its base model or of its adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamId {
    /// The embedding. It is also the head if the two are tied.
    Embedding,
    /// A parameter of the block with this index.
    Block(usize, BlockParam),
    /// The last RMSNorm.
    Norm,
    /// The head, if it is not tied to the embedding.
    Head,
}

/// A parameter of a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockParam {
    /// RMSNorm before the mixer.
    InputNorm,
    /// RMSNorm before the feed-forward part.
    FeedForwardNorm,
    /// RMSNorm on the mixer's output.
    MixerOutputNorm,
    /// RMSNorm on the feed-forward part's output.
    FeedForwardOutputNorm,
    /// RMSNorm on queries.
    QueryNorm,
    /// RMSNorm on keys.
    KeyNorm,
    /// W of a linear layer.
    Weight(Linear),
    /// b of a linear layer.
    Bias(Linear),
    /// LoRA's A of a linear layer.
    LoraA(Linear),
    /// LoRA's B of a linear layer.
    LoraB(Linear),
}

/// A linear layer of a block: y = x·Wᵀ + b.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Linear {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Attention's output projection.
    Output,
    /// The gate of the feed-forward part.
    Gate,
    /// The projection that is multiplied by the activated gate.
    Up,
    /// The output projection of the feed-forward part.
    Down,
    /// Queries, keys and values in one matrix, in this order.
    FusedQkv,
    /// Gate and up in one matrix, in this order.
    FusedGateUp,
}

/// Linear layers of a block that have the same input and are computed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearGroup {
    /// Queries, keys and values.
    Qkv,
    /// Attention's output projection.
    Output,
    /// Gate and up.
    GateUp,
    /// The output projection of the feed-forward part.
    Down,
}

/// One value for each group of linear layers.
#[derive(Clone, Debug)]
pub struct PerGroup<T> {
    /// Value of [`LinearGroup::Qkv`].
    pub qkv: T,
    /// Value of [`LinearGroup::Output`].
    pub output: T,
    /// Value of [`LinearGroup::GateUp`].
    pub gate_up: T,
    /// Value of [`LinearGroup::Down`].
    pub down: T,
}

/// Role of a tensor. It determines the tensor's precision and its weight decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamRole {
    /// A matrix: stored in the precision of the passes, with weight decay.
    Matrix,
    /// The weight of a norm: always f32, without weight decay.
    Norm,
    /// The bias of a linear layer: always f32, without weight decay.
    Bias,
}

/// Location of a parameter in a file. A matrix that is fused in both formats needs no more than a
/// name: it is one parameter ([`Projections::Fused`]). For a matrix that only one of the formats
/// fuses, add the range of rows here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileTensor {
    /// Name of the tensor in the file.
    pub name: String,
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Id of the parameter.
    pub id: ParamId,
    /// Location in the safetensors files of transformers.
    pub hf: FileTensor,
    /// Location in the GGUF files of llama.cpp.
    pub gguf: FileTensor,
    /// Shape; `[out, in]` for the matrix of a linear layer.
    pub shape: Vec<usize>,
    /// Role of the tensor.
    pub role: ParamRole,
    /// Name in LoRA's `target_modules` that gives the parameter a low-rank update. `None` if it
    /// cannot have one.
    pub lora_target: Option<&'static str>,
    /// Number of heads in its rows, for the weights and biases of queries and keys: GGUF files of
    /// some families have these rows in another order, also in blocks without a rotation. `None`
    /// for all others, and for fused queries, keys and values.
    pub rotated_heads: Option<usize>,
    /// True if passes compute with 1 + w. The files of llama.cpp store 1 + w, those of transformers
    /// store w.
    pub adds_one: bool,
}

/// One tensor of an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraTensor {
    /// Id of the parameter.
    pub id: ParamId,
    /// PEFT's name of the tensor.
    pub name: String,
    /// `[r, in]` for A, `[out, r]` for B.
    pub shape: [usize; 2],
}

/// A linear layer with a low-rank update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraLayer {
    /// Index of the block.
    pub block: usize,
    /// The linear layer of that block.
    pub linear: Linear,
    /// Shape of the layer's weight, `[out, in]`.
    pub shape: [usize; 2],
}

/// The low-rank update of one linear layer: W' = W + scale·B·A.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraSpec {
    /// Index of the block.
    pub block: usize,
    /// The linear layer of that block.
    pub linear: Linear,
    /// The factor A `[r, in]`.
    pub a: LoraTensor,
    /// The factor B `[out, r]`.
    pub b: LoraTensor,
}

/// Names of a module in each file format, relative to the model or to a block.
#[derive(Clone, Copy)]
struct Module {
    hf: &'static str,
    gguf: &'static str,
}

const EMBEDDING: Module = Module {
    hf: "model.embed_tokens",
    gguf: "token_embd",
};
const NORM: Module = Module {
    hf: "model.norm",
    gguf: "output_norm",
};
const HEAD: Module = Module {
    hf: "lm_head",
    gguf: "output",
};
const INPUT_NORM: Module = Module {
    hf: "input_layernorm",
    gguf: "attn_norm",
};
const FEED_FORWARD_NORM: Module = Module {
    hf: "post_attention_layernorm",
    gguf: "ffn_norm",
};
/// The norm before the feed-forward part in blocks that also have a norm on the mixer's output. In
/// these blocks `post_attention_layernorm` is the norm on the mixer's output.
const PRE_FEED_FORWARD_NORM: Module = Module {
    hf: "pre_feedforward_layernorm",
    gguf: "ffn_norm",
};
const MIXER_OUTPUT_NORM: Module = Module {
    hf: "post_attention_layernorm",
    gguf: "post_attention_norm",
};
const FEED_FORWARD_OUTPUT_NORM: Module = Module {
    hf: "post_feedforward_layernorm",
    gguf: "post_ffw_norm",
};
/// The norms on outputs in GLM-4. Its `post_attention_layernorm` is always the norm before the
/// feed-forward part.
const GLM_MIXER_OUTPUT_NORM: Module = Module {
    hf: "post_self_attn_layernorm",
    gguf: "post_attention_norm",
};
const GLM_FEED_FORWARD_OUTPUT_NORM: Module = Module {
    hf: "post_mlp_layernorm",
    gguf: "post_ffw_norm",
};
const QUERY_NORM: Module = Module {
    hf: "self_attn.q_norm",
    gguf: "attn_q_norm",
};
const KEY_NORM: Module = Module {
    hf: "self_attn.k_norm",
    gguf: "attn_k_norm",
};

/// Prefixes of the names of a block's tensors. The block's index follows.
const HF_BLOCKS: &str = "model.layers.";
const GGUF_BLOCKS: &str = "blk.";
/// Prefix that PEFT puts before the name of a module of the base model.
const PEFT_MODEL: &str = "base_model.model.";
/// Prefix of the names of the language model inside a model of text and images.
const LANGUAGE_MODEL_PREFIX: &str = "model.language_model.";
/// PEFT's names of the two factors of an update.
const LORA_A: &str = "lora_A";
const LORA_B: &str = "lora_B";

/// Name of the head in safetensors files. Files of a tied model may contain it as a copy of the
/// embedding.
pub const HF_HEAD: &str = "lm_head.weight";

impl Linear {
    /// All linear layers: those of [`crate::domain::training::TARGET_MODULES`], then those of
    /// [`crate::domain::training::FUSED_TARGET_MODULES`].
    pub const ALL: [Linear; 9] = [
        Linear::Query,
        Linear::Key,
        Linear::Value,
        Linear::Output,
        Linear::Gate,
        Linear::Up,
        Linear::Down,
        Linear::FusedQkv,
        Linear::FusedGateUp,
    ];

    fn module(self) -> Module {
        let (hf, gguf) = match self {
            Linear::Query => ("self_attn.q_proj", "attn_q"),
            Linear::Key => ("self_attn.k_proj", "attn_k"),
            Linear::Value => ("self_attn.v_proj", "attn_v"),
            Linear::Output => ("self_attn.o_proj", "attn_output"),
            Linear::Gate => ("mlp.gate_proj", "ffn_gate"),
            Linear::Up => ("mlp.up_proj", "ffn_up"),
            Linear::Down => ("mlp.down_proj", "ffn_down"),
            Linear::FusedQkv => ("self_attn.qkv_proj", "attn_qkv"),
            Linear::FusedGateUp => ("mlp.gate_up_proj", "ffn_up"),
        };
        Module { hf, gguf }
    }

    /// Returns the layer's name in LoRA's `target_modules`: the last part of its path.
    pub fn lora_target(self) -> &'static str {
        let path = self.module().hf;
        path.rsplit('.').next().unwrap_or(path)
    }

    /// Returns the separate layers whose rows the matrix of this layer holds. Empty for a layer
    /// that is not fused.
    pub(super) fn parts(self) -> &'static [Linear] {
        match self {
            Linear::FusedQkv => &[Linear::Query, Linear::Key, Linear::Value],
            Linear::FusedGateUp => &[Linear::Gate, Linear::Up],
            Linear::Query
            | Linear::Key
            | Linear::Value
            | Linear::Output
            | Linear::Gate
            | Linear::Up
            | Linear::Down => &[],
        }
    }

    /// Returns true if LoRA's `target_modules` name the layer. The names of all parts of a fused
    /// layer together stand for it, so that the default names mean every layer of each family.
    fn is_target(self, target_modules: &[String]) -> bool {
        let is_named = |linear: Linear| {
            target_modules
                .iter()
                .any(|wanted| wanted == linear.lora_target())
        };
        let parts = self.parts();
        is_named(self) || (!parts.is_empty() && parts.iter().all(|part| is_named(*part)))
    }

    /// Returns true if the adapter tensor with this PEFT name updates this layer in any block.
    pub fn is_updated_by(self, peft_name: &str) -> bool {
        peft_name.contains(&format!(".{}.lora_", self.module().hf))
    }
}

impl LinearGroup {
    /// Returns the linear layers that the group can have, in the order of their columns in the
    /// joint output. A block has either the separate layers or the fused one.
    pub fn members(self) -> &'static [Linear] {
        match self {
            LinearGroup::Qkv => &[Linear::Query, Linear::Key, Linear::Value, Linear::FusedQkv],
            LinearGroup::Output => &[Linear::Output],
            LinearGroup::GateUp => &[Linear::Gate, Linear::Up, Linear::FusedGateUp],
            LinearGroup::Down => &[Linear::Down],
        }
    }
}

impl<T> PerGroup<T> {
    /// Calls `make` for each group, in the order in which a block computes them.
    pub fn build<E>(mut make: impl FnMut(LinearGroup) -> Result<T, E>) -> Result<Self, E> {
        Ok(PerGroup {
            qkv: make(LinearGroup::Qkv)?,
            output: make(LinearGroup::Output)?,
            gate_up: make(LinearGroup::GateUp)?,
            down: make(LinearGroup::Down)?,
        })
    }

    /// Returns the value of a group.
    pub fn get(&self, group: LinearGroup) -> &T {
        match group {
            LinearGroup::Qkv => &self.qkv,
            LinearGroup::Output => &self.output,
            LinearGroup::GateUp => &self.gate_up,
            LinearGroup::Down => &self.down,
        }
    }
}

impl BlockParam {
    /// Returns true for the weights of norms.
    pub fn is_norm(self) -> bool {
        match self {
            BlockParam::InputNorm
            | BlockParam::FeedForwardNorm
            | BlockParam::MixerOutputNorm
            | BlockParam::FeedForwardOutputNorm
            | BlockParam::QueryNorm
            | BlockParam::KeyNorm => true,
            BlockParam::Weight(_)
            | BlockParam::Bias(_)
            | BlockParam::LoraA(_)
            | BlockParam::LoraB(_) => false,
        }
    }
}

impl ParamSpec {
    /// Returns the name that messages, checkpoints and the training state use.
    pub fn name(&self) -> &str {
        &self.hf.name
    }

    /// Returns the number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns true if AdamW's weight decay applies to the parameter.
    pub fn decays(&self) -> bool {
        self.role == ParamRole::Matrix
    }
}

impl LoraSpec {
    /// Returns both tensors, A first.
    pub fn tensors(&self) -> [&LoraTensor; 2] {
        [&self.a, &self.b]
    }
}

impl LoraTensor {
    /// Returns true for A, which starts as random numbers; B starts as zeros.
    pub fn is_a(&self) -> bool {
        matches!(self.id, ParamId::Block(_, BlockParam::LoraA(_)))
    }

    /// Returns the number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Returns the table: every parameter of a model once, in the order of a forward pass, except that
/// the norms on queries and keys follow attention's output projection. Exports split the tensors
/// into files in this order.
pub fn params(spec: &ModelSpec) -> Vec<ParamSpec> {
    let mut table = Vec::new();
    each_row(spec, |row| table.push(row.named()));
    table
}

/// Returns the total number of elements of all parameters. A tied embedding is counted once.
pub fn parameter_count(spec: &ModelSpec) -> usize {
    let mut count = 0;
    each_row(spec, |row| count += row.shape.iter().product::<usize>());
    count
}

/// Returns the linear layers that an adapter with the targets of `config` updates, block by block.
pub fn lora_layers(spec: &ModelSpec, config: &LoraConfig) -> Vec<LoraLayer> {
    let mut layers = Vec::new();
    each_row(spec, |row| {
        if let (ParamId::Block(block, BlockParam::Weight(linear)), &[out, input]) =
            (row.id, row.shape)
            && linear.is_target(&config.target_modules)
        {
            layers.push(LoraLayer {
                block,
                linear,
                shape: [out, input],
            });
        }
    });
    layers
}

/// Returns the targets of `config` that stand for no linear layer of the model. The name of a part
/// of a fused layer stands for it only together with the names of all other parts.
pub fn unmatched_targets(spec: &ModelSpec, config: &LoraConfig) -> Vec<String> {
    let updated: HashSet<Linear> = lora_layers(spec, config).iter().map(|l| l.linear).collect();
    let stands_for = |name: &str, linear: &Linear| {
        linear.lora_target() == name || linear.parts().iter().any(|p| p.lora_target() == name)
    };
    config
        .target_modules
        .iter()
        .filter(|name| !updated.iter().any(|linear| stands_for(name, linear)))
        .cloned()
        .collect()
}

/// Returns the low-rank updates of an adapter with the targets of `config`, block by block.
pub fn lora_params(spec: &ModelSpec, config: &LoraConfig) -> Vec<LoraSpec> {
    let update = |LoraLayer {
                      block,
                      linear,
                      shape: [out, input],
                  }| {
        let tensor = |param, which: &str, shape| LoraTensor {
            id: ParamId::Block(block, param),
            name: peft_name(block, linear, which),
            shape,
        };
        LoraSpec {
            block,
            linear,
            a: tensor(BlockParam::LoraA(linear), LORA_A, [config.rank, input]),
            b: tensor(BlockParam::LoraB(linear), LORA_B, [out, config.rank]),
        }
    };
    lora_layers(spec, config).into_iter().map(update).collect()
}

/// Returns the name of the embedding in safetensors files.
pub fn hf_embedding() -> String {
    file_name(EMBEDDING.hf, ParamRole::Matrix)
}

/// Returns the name of the embedding in GGUF files.
pub fn gguf_embedding() -> String {
    file_name(EMBEDDING.gguf, ParamRole::Matrix)
}

/// Returns the name of the head in GGUF files.
pub fn gguf_head() -> String {
    file_name(HEAD.gguf, ParamRole::Matrix)
}

/// Returns the name of a linear layer's bias in GGUF files.
pub fn gguf_bias(block: usize, linear: Linear) -> String {
    format!(
        "{GGUF_BLOCKS}{block}.{}",
        file_name(linear.module().gguf, ParamRole::Bias)
    )
}

/// Returns PEFT's name of the factor A of a linear layer, as an example in error messages.
pub fn peft_example(block: usize, linear: Linear) -> String {
    peft_name(block, linear, LORA_A)
}

fn peft_name(block: usize, linear: Linear, which: &str) -> String {
    format!(
        "{PEFT_MODEL}{HF_BLOCKS}{block}.{}.{which}.weight",
        linear.module().hf
    )
}

/// Returns true if the name of a stored tensor, in either format, is that of a tensor of a decoder
/// block.
pub fn is_in_block(stored: &str) -> bool {
    stored.starts_with(HF_BLOCKS) || stored.starts_with(GGUF_BLOCKS)
}

/// Returns the name in the table of a stored tensor. The prefix that models of text and images put
/// before the tensors of their language model is removed.
pub fn text_name(stored: &str) -> Cow<'_, str> {
    if let Some(name) = stored
        .strip_prefix("language_model.")
        .filter(|name| name.starts_with("model.") || *name == HF_HEAD)
    {
        return Cow::Borrowed(name);
    }
    match stored.strip_prefix(LANGUAGE_MODEL_PREFIX) {
        Some(name) => Cow::Owned(format!("model.{name}")),
        None => Cow::Borrowed(stored),
    }
}

/// Returns PEFT's name of a tensor of an adapter for the model of text and images that contains the
/// language model. `name` is the name for the language model alone.
pub fn whole_peft_name(name: &str) -> String {
    match name
        .strip_prefix(PEFT_MODEL)
        .and_then(|name| name.strip_prefix("model."))
    {
        Some(rest) => format!("{PEFT_MODEL}{LANGUAGE_MODEL_PREFIX}{rest}"),
        None => name.to_owned(),
    }
}

/// Returns PEFT's name of a tensor of an adapter for the language model alone. `stored` may be a
/// name for a model of text and images.
pub fn text_peft_name(stored: &str) -> Cow<'_, str> {
    match stored.strip_prefix(PEFT_MODEL).map(text_name) {
        Some(Cow::Owned(name)) => Cow::Owned(format!("{PEFT_MODEL}{name}")),
        Some(Cow::Borrowed(name)) if name.len() + PEFT_MODEL.len() < stored.len() => {
            Cow::Owned(format!("{PEFT_MODEL}{name}"))
        }
        _ => Cow::Borrowed(stored),
    }
}

/// Returns a regular expression that matches the modules with these names in the blocks of the
/// language model inside a model of text and images. It does not match those of the vision tower.
pub fn whole_target_modules(names: &[String]) -> String {
    let blocks = format!("{LANGUAGE_MODEL_PREFIX}layers.").replace('.', r"\.");
    format!(r"{blocks}\d+\..*\.({})", names.join("|"))
}

/// Returns the full name of a module's weight or bias.
fn file_name(module: &str, role: ParamRole) -> String {
    match role {
        ParamRole::Matrix | ParamRole::Norm => format!("{module}.weight"),
        ParamRole::Bias => format!("{module}.bias"),
    }
}

/// A row of the table before its names are formatted. Some callers do not need the names.
struct TableRow<'a> {
    id: ParamId,
    module: Module,
    role: ParamRole,
    shape: &'a [usize],
    rotated_heads: Option<usize>,
    adds_one: bool,
}

impl TableRow<'_> {
    fn lora_target(&self) -> Option<&'static str> {
        match self.id {
            ParamId::Block(_, BlockParam::Weight(linear)) => Some(linear.lora_target()),
            _ => None,
        }
    }

    fn named(&self) -> ParamSpec {
        let (hf, gguf) = match self.id {
            ParamId::Block(index, _) => (
                format!("{HF_BLOCKS}{index}."),
                format!("{GGUF_BLOCKS}{index}."),
            ),
            ParamId::Embedding | ParamId::Norm | ParamId::Head => (String::new(), String::new()),
        };
        ParamSpec {
            id: self.id,
            hf: FileTensor {
                name: hf + &file_name(self.module.hf, self.role),
            },
            gguf: FileTensor {
                name: gguf + &file_name(self.module.gguf, self.role),
            },
            shape: self.shape.to_vec(),
            role: self.role,
            lora_target: self.lora_target(),
            rotated_heads: self.rotated_heads,
            adds_one: self.adds_one,
        }
    }
}

/// Calls `visit` with every row of the table, in order.
fn each_row(spec: &ModelSpec, visit: impl FnMut(TableRow<'_>)) {
    let width = spec.hidden_size;
    let mut rows = Rows {
        visit,
        norms_add_one: spec.norms_add_one,
    };
    rows.push(
        ParamId::Embedding,
        EMBEDDING,
        ParamRole::Matrix,
        &[spec.vocab_size, width],
    );
    for (index, block) in spec.blocks.iter().enumerate() {
        rows.block(index, block, width);
    }
    rows.push(ParamId::Norm, NORM, ParamRole::Norm, &[width]);
    if !spec.tie_word_embeddings {
        rows.push(
            ParamId::Head,
            HEAD,
            ParamRole::Matrix,
            &[spec.vocab_size, width],
        );
    }
}

/// Passes each row to `visit`.
struct Rows<F> {
    visit: F,
    norms_add_one: bool,
}

impl<F: FnMut(TableRow<'_>)> Rows<F> {
    fn push(&mut self, id: ParamId, module: Module, role: ParamRole, shape: &[usize]) {
        let adds_one = role == ParamRole::Norm && self.norms_add_one;
        (self.visit)(TableRow {
            id,
            module,
            role,
            shape,
            rotated_heads: None,
            adds_one,
        });
    }

    fn block(&mut self, index: usize, block: &BlockSpec, width: usize) {
        if block.mixer_norms.has_pre() {
            self.norm(index, BlockParam::InputNorm, INPUT_NORM, width);
        }
        match &block.mixer {
            Mixer::Attention(attention) => self.attention(index, attention, width),
        }
        let (mixer_output_norm, feed_forward_output_norm) = match block.norm_names {
            NormNames::Gemma => (MIXER_OUTPUT_NORM, FEED_FORWARD_OUTPUT_NORM),
            NormNames::Glm => (GLM_MIXER_OUTPUT_NORM, GLM_FEED_FORWARD_OUTPUT_NORM),
        };
        let feed_forward_norm = match (block.mixer_norms, block.norm_names) {
            (Norms::Pre, _) | (Norms::PreAndPost | Norms::Post, NormNames::Glm) => {
                FEED_FORWARD_NORM
            }
            (Norms::PreAndPost | Norms::Post, NormNames::Gemma) => PRE_FEED_FORWARD_NORM,
        };
        if block.mixer_norms.has_post() {
            self.norm(index, BlockParam::MixerOutputNorm, mixer_output_norm, width);
        }
        if block.feed_forward_norms.has_pre() {
            self.norm(index, BlockParam::FeedForwardNorm, feed_forward_norm, width);
        }
        match block.feed_forward {
            FeedForward::Gated {
                width: inner,
                activation: _,
                bias,
                projections,
            } => {
                let inputs: &[(Linear, usize)] = match projections {
                    Projections::Separate => &[(Linear::Gate, inner), (Linear::Up, inner)],
                    Projections::Fused => &[(Linear::FusedGateUp, 2 * inner)],
                };
                for &(linear, out) in inputs {
                    self.linear(index, linear, [out, width], bias, None);
                }
                self.linear(index, Linear::Down, [width, inner], bias, None);
            }
        }
        match block.feed_forward_norms {
            Norms::Pre => {}
            Norms::PreAndPost | Norms::Post => self.norm(
                index,
                BlockParam::FeedForwardOutputNorm,
                feed_forward_output_norm,
                width,
            ),
        }
    }

    fn attention(&mut self, index: usize, attention: &AttentionSpec, width: usize) {
        let (q, kv) = (attention.query_width(), attention.kv_width());
        let bias = attention.qkv_bias;
        let (heads, kv_heads) = (Some(attention.heads), Some(attention.kv_heads));
        match attention.projections {
            Projections::Separate => {
                self.linear(index, Linear::Query, [q, width], bias, heads);
                self.linear(index, Linear::Key, [kv, width], bias, kv_heads);
                self.linear(index, Linear::Value, [kv, width], bias, None);
            }
            Projections::Fused => {
                self.linear(index, Linear::FusedQkv, [q + 2 * kv, width], bias, None);
            }
        }
        self.linear(
            index,
            Linear::Output,
            [width, q],
            attention.output_bias,
            None,
        );
        let widths = match attention.qk_norm {
            QkNorm::Absent => None,
            QkNorm::PerHead => Some([attention.head_dim; 2]),
            QkNorm::AllHeads => Some([q, kv]),
        };
        if let Some([query, key]) = widths {
            self.norm(index, BlockParam::QueryNorm, QUERY_NORM, query);
            self.norm(index, BlockParam::KeyNorm, KEY_NORM, key);
        }
    }

    fn norm(&mut self, index: usize, param: BlockParam, module: Module, width: usize) {
        self.push(
            ParamId::Block(index, param),
            module,
            ParamRole::Norm,
            &[width],
        );
    }

    /// Adds the weight of a linear layer with `shape` `[out, in]` and, if it has one, its bias.
    fn linear(
        &mut self,
        index: usize,
        linear: Linear,
        shape: [usize; 2],
        bias: bool,
        rotated_heads: Option<usize>,
    ) {
        let module = linear.module();
        let id = ParamId::Block(index, BlockParam::Weight(linear));
        (self.visit)(TableRow {
            id,
            module,
            role: ParamRole::Matrix,
            shape: &shape,
            rotated_heads,
            adds_one: false,
        });
        if bias {
            let id = ParamId::Block(index, BlockParam::Bias(linear));
            (self.visit)(TableRow {
                id,
                module,
                role: ParamRole::Bias,
                shape: &shape[..1],
                rotated_heads,
                adds_one: false,
            });
        }
    }
}

#[cfg(test)]
mod tests;
