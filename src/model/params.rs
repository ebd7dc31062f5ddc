//! The table of a model's parameters: every tensor once, with its id, its name in each file format,
//! its shape and its role.
//!
//! This is the only place that spells a tensor's name or shape. Loading, export, GGUF, LoRA, PEFT's
//! names, gradients, weight decay, the copies on a GPU and the parameter counts all read it.

use std::borrow::Cow;

use super::spec::{AttentionSpec, BlockSpec, FeedForward, Mixer, ModelSpec, Norms, QkNorm};
use crate::domain::training::LoraConfig;

/// A parameter of a policy: of its base model or of its adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamId {
    /// The embedding, which is also the head when the two are tied.
    Embedding,
    /// A tensor of a block, which is named by its index.
    Block(usize, BlockParam),
    /// The last RMSNorm.
    Norm,
    /// The head, when it is not tied.
    Head,
}

/// A parameter of a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockParam {
    /// RMSNorm before the mixer.
    InputNorm,
    /// RMSNorm before the feed-forward part.
    FeedForwardNorm,
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
    /// The factor that is gated.
    Up,
    /// The output of the feed-forward part.
    Down,
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
    /// The output of the feed-forward part.
    Down,
}

/// One value for each group.
#[derive(Clone, Debug)]
pub struct PerGroup<T> {
    /// Of [`LinearGroup::Qkv`].
    pub qkv: T,
    /// Of [`LinearGroup::Output`].
    pub output: T,
    /// Of [`LinearGroup::GateUp`].
    pub gate_up: T,
    /// Of [`LinearGroup::Down`].
    pub down: T,
}

/// What a tensor is to the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamRole {
    /// A matrix: in the precision of the passes, with weight decay.
    Matrix,
    /// The weight of a norm: always in f32, without weight decay.
    Norm,
    /// The bias of a linear layer: always in f32, without weight decay.
    Bias,
}

/// Where a file holds a parameter. A family whose files fuse several parameters in one tensor adds
/// the range of its rows here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileTensor {
    /// The file's name for the tensor.
    pub name: String,
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Which parameter it is.
    pub id: ParamId,
    /// Where transformers' safetensors files hold it.
    pub hf: FileTensor,
    /// Where llama.cpp's GGUF files hold it.
    pub gguf: FileTensor,
    /// `[out, in]` for the matrix of a linear layer.
    pub shape: Vec<usize>,
    /// What it is to the model.
    pub role: ParamRole,
    /// The name among LoRA's `target_modules` under which it gets a low-rank update; `None` where
    /// it cannot have one.
    pub lora_target: Option<&'static str>,
    /// How many heads that are rotated make up its rows, for queries and keys; `None` for all
    /// others.
    pub rotated_heads: Option<usize>,
    /// Whether passes compute with 1 + w. llama.cpp's files hold the sum, transformers' hold w.
    pub adds_one: bool,
}

/// One tensor of an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraTensor {
    /// Which parameter it is.
    pub id: ParamId,
    /// PEFT's name for it.
    pub name: String,
    /// `[r, in]` of A, `[out, r]` of B.
    pub shape: [usize; 2],
}

/// A linear layer with a low-rank update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraLayer {
    /// The block's index.
    pub block: usize,
    /// The linear layer of that block.
    pub linear: Linear,
    /// `[out, in]`.
    pub shape: [usize; 2],
}

/// The low-rank update of one linear layer: W' = W + scale·B·A.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraSpec {
    /// The block's index.
    pub block: usize,
    /// The linear layer of that block.
    pub linear: Linear,
    /// A.
    pub a: LoraTensor,
    /// B.
    pub b: LoraTensor,
}

/// What a module is called in each format, below the model or below a block.
#[derive(Clone, Copy)]
struct Module {
    hf: &'static str,
    gguf: &'static str,
}

const EMBEDDING: Module = Module { hf: "model.embed_tokens", gguf: "token_embd" };
const NORM: Module = Module { hf: "model.norm", gguf: "output_norm" };
const HEAD: Module = Module { hf: "lm_head", gguf: "output" };
const INPUT_NORM: Module = Module { hf: "input_layernorm", gguf: "attn_norm" };
const FEED_FORWARD_NORM: Module = Module { hf: "post_attention_layernorm", gguf: "ffn_norm" };
const QUERY_NORM: Module = Module { hf: "self_attn.q_norm", gguf: "attn_q_norm" };
const KEY_NORM: Module = Module { hf: "self_attn.k_norm", gguf: "attn_k_norm" };

/// What the names of a block's tensors begin with, before the block's index.
const HF_BLOCKS: &str = "model.layers.";
const GGUF_BLOCKS: &str = "blk.";
/// What PEFT puts before the name of a module of the base model.
const PEFT_MODEL: &str = "base_model.model.";
/// PEFT's names for the two factors of an update.
const LORA_A: &str = "lora_A";
const LORA_B: &str = "lora_B";

/// The file's name of the head, which files of a tied model may hold as a copy of the embedding.
pub const HF_HEAD: &str = "lm_head.weight";

impl Linear {
    /// All of them, in the order of [`crate::domain::training::TARGET_MODULES`].
    pub const ALL: [Linear; 7] = [
        Linear::Query,
        Linear::Key,
        Linear::Value,
        Linear::Output,
        Linear::Gate,
        Linear::Up,
        Linear::Down,
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
        };
        Module { hf, gguf }
    }

    /// Returns the layer's name among LoRA's `target_modules`: the last part of its path.
    pub fn lora_target(self) -> &'static str {
        let path = self.module().hf;
        path.rsplit('.').next().unwrap_or(path)
    }

    /// Returns true if a tensor of an adapter, by PEFT's name, updates this layer in some block.
    pub fn is_updated_by(self, peft_name: &str) -> bool {
        peft_name.contains(&format!(".{}.lora_", self.module().hf))
    }
}

impl LinearGroup {
    /// Returns the linear layers of the group, in the order of their outputs.
    pub fn members(self) -> &'static [Linear] {
        match self {
            LinearGroup::Qkv => &[Linear::Query, Linear::Key, Linear::Value],
            LinearGroup::Output => &[Linear::Output],
            LinearGroup::GateUp => &[Linear::Gate, Linear::Up],
            LinearGroup::Down => &[Linear::Down],
        }
    }
}

impl<T> PerGroup<T> {
    /// Makes each value with `make`, in the order in which a block computes the groups.
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
    /// Returns the name that messages, checkpoints and the state of training use.
    pub fn name(&self) -> &str {
        &self.hf.name
    }

    /// Returns the number of its elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns true if AdamW's weight decay applies.
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

    /// Returns the number of its elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Returns every parameter of a model once, in the order of a forward pass. Exports are divided
/// into files in this order.
pub fn params(spec: &ModelSpec) -> Vec<ParamSpec> {
    let mut table = Vec::new();
    each_row(spec, |row| table.push(row.named()));
    table
}

/// Returns the number of elements of all parameters, tied ones counted once.
pub fn parameter_count(spec: &ModelSpec) -> usize {
    let mut count = 0;
    each_row(spec, |row| count += row.shape.iter().product::<usize>());
    count
}

/// Returns the linear layers that an adapter with the targets of `config` updates, block by block.
pub fn lora_layers(spec: &ModelSpec, config: &LoraConfig) -> Vec<LoraLayer> {
    let mut layers = Vec::new();
    each_row(spec, |row| {
        let is_wanted = row
            .lora_target()
            .is_some_and(|target| config.target_modules.iter().any(|wanted| wanted == target));
        if let (true, ParamId::Block(block, BlockParam::Weight(linear)), &[out, input]) =
            (is_wanted, row.id, row.shape)
        {
            layers.push(LoraLayer { block, linear, shape: [out, input] });
        }
    });
    layers
}

/// Returns the low-rank updates of an adapter with the targets of `config`, block by block.
pub fn lora_params(spec: &ModelSpec, config: &LoraConfig) -> Vec<LoraSpec> {
    let update = |LoraLayer { block, linear, shape: [out, input] }| {
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

/// Returns GGUF's name for the embedding.
pub fn gguf_embedding() -> String {
    file_name(EMBEDDING.gguf, ParamRole::Matrix)
}

/// Returns GGUF's name for the head.
pub fn gguf_head() -> String {
    file_name(HEAD.gguf, ParamRole::Matrix)
}

/// Returns GGUF's name for the bias of a linear layer.
pub fn gguf_bias(block: usize, linear: Linear) -> String {
    format!("{GGUF_BLOCKS}{block}.{}", file_name(linear.module().gguf, ParamRole::Bias))
}

/// Returns PEFT's name for the A of a linear layer.
pub fn peft_example(block: usize, linear: Linear) -> String {
    peft_name(block, linear, LORA_A)
}

fn peft_name(block: usize, linear: Linear, which: &str) -> String {
    format!("{PEFT_MODEL}{HF_BLOCKS}{block}.{}.{which}.weight", linear.module().hf)
}

/// Returns true if a stored tensor belongs to a decoder block, by its name in either format.
pub fn is_in_block(stored: &str) -> bool {
    stored.starts_with(HF_BLOCKS) || stored.starts_with(GGUF_BLOCKS)
}

/// Returns a stored tensor's name in the table: what models of text and images call their language
/// model is left out.
pub fn text_name(stored: &str) -> Cow<'_, str> {
    if let Some(name) = stored
        .strip_prefix("language_model.")
        .filter(|name| name.starts_with("model.") || *name == HF_HEAD)
    {
        return Cow::Borrowed(name);
    }
    match stored.strip_prefix("model.language_model.") {
        Some(name) => Cow::Owned(format!("model.{name}")),
        None => Cow::Borrowed(stored),
    }
}

/// Returns the name of a module's tensor.
fn file_name(module: &str, role: ParamRole) -> String {
    match role {
        ParamRole::Matrix | ParamRole::Norm => format!("{module}.weight"),
        ParamRole::Bias => format!("{module}.bias"),
    }
}

/// A row of the table without its names, which some readers do not need.
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
            ParamId::Block(index, _) => {
                (format!("{HF_BLOCKS}{index}."), format!("{GGUF_BLOCKS}{index}."))
            }
            ParamId::Embedding | ParamId::Norm | ParamId::Head => (String::new(), String::new()),
        };
        ParamSpec {
            id: self.id,
            hf: FileTensor { name: hf + &file_name(self.module.hf, self.role) },
            gguf: FileTensor { name: gguf + &file_name(self.module.gguf, self.role) },
            shape: self.shape.to_vec(),
            role: self.role,
            lora_target: self.lora_target(),
            rotated_heads: self.rotated_heads,
            adds_one: self.adds_one,
        }
    }
}

/// Calls `visit` with every row of the table, in its order.
fn each_row(spec: &ModelSpec, visit: impl FnMut(TableRow<'_>)) {
    let width = spec.hidden_size;
    let mut rows = Rows { visit, norms_add_one: spec.norms_add_one };
    rows.push(ParamId::Embedding, EMBEDDING, ParamRole::Matrix, &[spec.vocab_size, width]);
    for (index, block) in spec.blocks.iter().enumerate() {
        rows.block(index, block, width);
    }
    rows.push(ParamId::Norm, NORM, ParamRole::Norm, &[width]);
    if !spec.tie_word_embeddings {
        rows.push(ParamId::Head, HEAD, ParamRole::Matrix, &[spec.vocab_size, width]);
    }
}

/// Where the rows go.
struct Rows<F> {
    visit: F,
    norms_add_one: bool,
}

impl<F: FnMut(TableRow<'_>)> Rows<F> {
    fn push(&mut self, id: ParamId, module: Module, role: ParamRole, shape: &[usize]) {
        let adds_one = role == ParamRole::Norm && self.norms_add_one;
        (self.visit)(TableRow { id, module, role, shape, rotated_heads: None, adds_one });
    }

    fn block(&mut self, index: usize, block: &BlockSpec, width: usize) {
        match block.mixer_norms {
            Norms::Pre => self.norm(index, BlockParam::InputNorm, INPUT_NORM, width),
        }
        match &block.mixer {
            Mixer::Attention(attention) => self.attention(index, attention, width),
        }
        match block.feed_forward_norms {
            Norms::Pre => self.norm(index, BlockParam::FeedForwardNorm, FEED_FORWARD_NORM, width),
        }
        match block.feed_forward {
            FeedForward::Gated { width: inner, activation: _, bias } => {
                for (linear, shape) in [
                    (Linear::Gate, [inner, width]),
                    (Linear::Up, [inner, width]),
                    (Linear::Down, [width, inner]),
                ] {
                    self.linear(index, linear, shape, bias, None);
                }
            }
        }
    }

    fn attention(&mut self, index: usize, attention: &AttentionSpec, width: usize) {
        let (q, kv) = (attention.query_width(), attention.kv_width());
        let bias = attention.qkv_bias;
        self.linear(index, Linear::Query, [q, width], bias, Some(attention.heads));
        self.linear(index, Linear::Key, [kv, width], bias, Some(attention.kv_heads));
        self.linear(index, Linear::Value, [kv, width], bias, None);
        self.linear(index, Linear::Output, [width, q], attention.output_bias, None);
        match attention.qk_norm {
            QkNorm::Absent => {}
            QkNorm::PerHead => {
                self.norm(index, BlockParam::QueryNorm, QUERY_NORM, attention.head_dim);
                self.norm(index, BlockParam::KeyNorm, KEY_NORM, attention.head_dim);
            }
        }
    }

    fn norm(&mut self, index: usize, param: BlockParam, module: Module, width: usize) {
        self.push(ParamId::Block(index, param), module, ParamRole::Norm, &[width]);
    }

    /// Adds the tensors of a linear layer, given its `[out, in]`.
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
