//! Memory estimate of a run, computed from shapes, and the choice of a plan that fits the limit.
//!
//! `benches/offline.rs` prints the estimate beside the measured peak.

use crate::compute::cpu::attention::score_bytes;
use crate::compute::cpu::gemm::{Kernel, packed_bytes};
use crate::compute::cpu::head::saved_bytes;
use crate::compute::cpu::swiglu::SavedGateUp;
use crate::domain::training::{ActivationCheckpointing, Method, Precision, TrainingSpec};
use crate::infer::pack::LengthClass;
use crate::infer::pair::EncodedPair;
use crate::model::block_shape::BlockShape;
use crate::model::config::ModelConfig;
use crate::model::cpu::sizes::{
    backward_floats, forward_floats, head_floats, input_floats, tape_floats,
};
use crate::model::cuda::sizes::{head_bytes, trained_bytes};
use crate::model::device::ComputeDevice;
use crate::model::params::{LoraLayer, lora_layers};
use crate::model::spec::{BlockSpec, ModelSpec};
use crate::train::backprop::SavePolicy;
use crate::train::optimizer::AdamW;
use crate::train::trainable::{StepGradients, TrainablePolicy};

const F32: u64 = 4;

/// Memory that a limit applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// Host memory.
    Host,
    /// A GPU's own memory.
    Gpu,
}

impl MemoryKind {
    /// Returns the memory in which a device's passes store activations.
    pub fn of(device: &ComputeDevice) -> Self {
        if device.memory().is_some() {
            MemoryKind::Gpu
        } else {
            MemoryKind::Host
        }
    }
}

/// Lengths of a run's pairs in packed tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Length of the longest pair.
    pub longest: usize,
    /// Upper bound of the total length of a micro-batch.
    pub micro_batch: usize,
}

impl Lengths {
    /// Returns the lengths of a set of pairs. Any pairs may be in the same micro-batch, so the
    /// bound is the sum of the `batch_size` longest ones.
    pub fn of(pairs: &[EncodedPair], batch_size: usize) -> Self {
        Self::by_length(pairs, batch_size, &|_| 0)
    }

    /// Returns the lengths as [`Lengths::of`] does, for a model whose rotary frequencies depend on
    /// the length of a sequence. A pair has its prompt twice if `class` differs for its sequences.
    pub fn by_length(pairs: &[EncodedPair], batch_size: usize, class: LengthClass) -> Self {
        let tokens = |pair: &EncodedPair| pair.packed_tokens_by_length(class);
        let mut lengths: Vec<usize> = pairs.iter().map(tokens).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let micro_batch = lengths.iter().take(batch_size).sum();
        Lengths {
            longest: lengths.first().copied().unwrap_or(0),
            micro_batch,
        }
    }

    /// Returns the lengths of a micro-batch of a single pair. No run with a pair of this length
    /// needs less memory.
    pub fn one(longest: usize) -> Self {
        Lengths {
            longest,
            micro_batch: longest,
        }
    }

    /// Returns the larger lengths of a run's training and evaluation pairs in rows of `model`. One
    /// plan holds for both.
    pub fn of_run(
        model: &ModelSpec,
        train: &[EncodedPair],
        eval: &[EncodedPair],
        batch_size: usize,
    ) -> Self {
        let class = |length| model.length_class(length);
        let of = |pairs: &[EncodedPair]| Self::by_length(pairs, batch_size, &class);
        let (train, eval) = (of(train), of(eval));
        Lengths {
            longest: train.longest.max(eval.longest),
            micro_batch: train.micro_batch.max(eval.micro_batch),
        }
    }
}

/// Memory of the program itself in bytes: code, runtime, tokenizer.
const PROGRAM_BYTES: u64 = 92 << 20;
/// Factor (numerator, denominator) for fragmentation of GPU memory, which is mapped in chunks.
const GPU_FRAGMENTATION: (u64, u64) = (17, 16);

/// Estimated bytes by purpose, without the resident base weights, and the plan that they belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of the run's own weights, gradients and AdamW moments.
    pub training_state: u64,
    /// Peak bytes of activations: of one row, or of all rows of a micro-batch if the loss compares
    /// pairs.
    pub activations: u64,
    /// Activations that the forward pass saves for the backward pass.
    pub save: SavePolicy,
    /// Maximum tokens of a packed row. A longer pair gets a row of its own.
    pub row_tokens: usize,
}

impl Estimate {
    /// Returns the total in bytes, including the program and the packed GEMM panels of its threads.
    pub fn total(&self) -> u64 {
        PROGRAM_BYTES + packed_bytes() as u64 + self.training_state + self.activations
    }
}

/// Returns the number of trainable parameters.
pub fn trainable_parameters(config: &ModelConfig, spec: &TrainingSpec) -> u64 {
    match &spec.method {
        Method::Full => config.parameter_count() as u64,
        Method::Lora(lora) => {
            let of_layer = |layer: &LoraLayer| lora.rank * layer.shape.iter().sum::<usize>();
            lora_layers(&config.spec, lora)
                .iter()
                .map(of_layer)
                .sum::<usize>() as u64
        }
    }
}

/// Returns the sum of LoRA ranks over the linear layers of a block, for the block with the largest
/// sum.
fn ranks(config: &ModelConfig, spec: &TrainingSpec) -> u64 {
    let Method::Lora(lora) = &spec.method else {
        return 0;
    };
    let mut of_block = vec![0; config.spec.blocks.len()];
    lora_layers(&config.spec, lora)
        .iter()
        .for_each(|layer| of_block[layer.block] += lora.rank as u64);
    of_block.into_iter().max().unwrap_or(0)
}

/// Size per token of the activations that a forward pass saves for the backward pass, in floats on
/// the CPU and in bytes on a GPU.
struct SavedActivations {
    /// For each token of all rows that still need their backward pass.
    of_row: u64,
    /// In addition for each token of the row in its backward pass.
    of_last_row: u64,
}

impl SavedActivations {
    fn new(save: SavePolicy, layers: u64, tape: u64, input: u64) -> Self {
        match save {
            SavePolicy::Tapes => SavedActivations {
                of_row: layers * tape,
                of_last_row: 0,
            },
            SavePolicy::BlockInputs => SavedActivations {
                of_row: layers * input,
                of_last_row: tape,
            },
            SavePolicy::Nothing => SavedActivations {
                of_row: 0,
                of_last_row: 0,
            },
        }
    }
}

/// Returns the tokens of the rows whose saved activations are in memory together: one row of `row`
/// tokens, or the rows of a whole micro-batch if the loss compares pairs.
fn saved_tokens(spec: &TrainingSpec, lengths: Lengths, row: u64) -> u64 {
    match spec.dpo.compares_pairs() {
        true => row.max(lengths.micro_batch as u64),
        false => row,
    }
}

/// Returns the estimate for pairs of these lengths with the given plan. A spec without a precision
/// counts as one in f32.
pub fn estimate(
    config: &ModelConfig,
    spec: &TrainingSpec,
    lengths: Lengths,
    save: SavePolicy,
    row_tokens: usize,
    memory: MemoryKind,
) -> Estimate {
    let t = lengths.longest.max(row_tokens.min(lengths.micro_batch)) as u64;
    let saved = saved_tokens(spec, lengths, t);
    if memory == MemoryKind::Gpu {
        return on_gpu(config, spec, t, saved, save, row_tokens);
    }
    let blocks = shapes(config);
    let ranks = ranks(config, spec) as usize;
    let kernel = Kernel::best(spec.precision.unwrap_or(Precision::F32));
    let is_fused = config.spec.blocks.iter().any(BlockSpec::fuses_gate_up);
    let is_lora = matches!(spec.method, Method::Lora(_));
    let gate_up = SavedGateUp::for_tape(kernel, is_lora && !is_fused);
    let tape = max_over_blocks(&blocks, |block| tape_floats(block, gate_up, ranks));
    let input = max_over_blocks(&blocks, input_floats);
    let backward = max_over_blocks(&blocks, |block| backward_floats(block, gate_up));
    let SavedActivations {
        of_row,
        of_last_row,
    } = SavedActivations::new(save, blocks.len() as u64, tape, input);
    let scores = max_over_blocks(&blocks, |block| {
        score_bytes(kernel, block.heads.query, t as usize, lengths.longest)
    });
    // Full fine-tuning trains the head. With `Tapes` it saves the head's probabilities for every
    // row in memory: for one row, or for at most one row per pair if the loss compares pairs.
    let rows = if spec.dpo.compares_pairs() {
        spec.batch.batch_size as u64
    } else {
        1
    };
    let head = match (&spec.method, save) {
        (Method::Full, SavePolicy::Tapes) => {
            saved_bytes(rows, saved, config.spec.vocab_size as u64)
        }
        _ => 0,
    };
    let workspace = backward + head_floats(config.spec.hidden_size) as u64;
    let activations = F32 * (saved * of_row + t * (of_last_row + workspace)) + scores + head;
    // The CPU computes with one set of gradients, like one GPU.
    let training_state = on_host(config, spec, 1);
    Estimate {
        training_state,
        activations,
        save,
        row_tokens,
    }
}

/// Returns the shape of each block.
fn shapes(config: &ModelConfig) -> Vec<BlockShape> {
    config
        .spec
        .blocks
        .iter()
        .map(|block| BlockShape::of(config.spec.hidden_size, block))
        .collect()
}

/// Returns the largest `size` over the blocks.
fn max_over_blocks(blocks: &[BlockShape], size: impl Fn(&BlockShape) -> usize) -> u64 {
    blocks.iter().map(size).max().unwrap_or(0) as u64
}

/// Returns the bytes of a GEMM operand's element.
fn element(spec: &TrainingSpec) -> usize {
    if spec.precision == Some(Precision::Bf16) {
        size_of::<half::bf16>()
    } else {
        size_of::<f32>()
    }
}

/// Returns the host memory in bytes of a run on `devices` GPUs: master weights, both moments, and
/// one set of gradients per GPU.
pub fn on_host(config: &ModelConfig, spec: &TrainingSpec, devices: usize) -> u64 {
    let trained = trainable_parameters(config, spec);
    TrainablePolicy::master_bytes(trained)
        + AdamW::bytes(trained)
        + devices.max(1) as u64 * StepGradients::bytes(trained)
}

/// Returns the estimate for a GPU. Master weights and moments stay on the host. Weights and
/// activations have the job's precision, the residual stream is in f32. `t` is the length of the
/// longest row in tokens, `saved` the result of [`saved_tokens`].
fn on_gpu(
    config: &ModelConfig,
    spec: &TrainingSpec,
    t: u64,
    saved: u64,
    save: SavePolicy,
    row_tokens: usize,
) -> Estimate {
    let (hidden, bytes, ranks) = (
        config.spec.hidden_size,
        element(spec),
        ranks(config, spec) as usize,
    );
    let blocks = shapes(config);
    let tape = max_over_blocks(&blocks, |block| block.tape_bytes(bytes, ranks));
    let input = max_over_blocks(&blocks, BlockShape::input_bytes);
    let SavedActivations {
        of_row,
        of_last_row,
    } = SavedActivations::new(save, blocks.len() as u64, tape, input);
    let workspace = max_over_blocks(&blocks, |block| block.backward_bytes(bytes))
        .max(head_bytes(hidden, bytes) as u64);
    let activations = (saved * of_row + t * (of_last_row + workspace)) * GPU_FRAGMENTATION.0
        / GPU_FRAGMENTATION.1;
    let training_state = trained_bytes(bytes) as u64 * trainable_parameters(config, spec);
    Estimate {
        training_state,
        activations,
        save,
        row_tokens,
    }
}

/// Returns the activation bytes of scoring a row of `tokens` tokens, which may interrupt a run.
pub fn scoring(config: &ModelConfig, tokens: usize) -> u64 {
    F32 * tokens as u64 * max_over_blocks(&shapes(config), forward_floats)
}

/// Returns the fastest plan within `available` bytes, which do not include the resident base
/// weights.
///
/// # Errors
/// The estimate of the leanest plan, if even that does not fit.
pub fn plan(
    config: &ModelConfig,
    spec: &TrainingSpec,
    lengths: Lengths,
    available: u64,
    memory: MemoryKind,
) -> Result<Estimate, Estimate> {
    let save_policies: &[SavePolicy] = match spec.batch.activation_checkpointing {
        ActivationCheckpointing::On => &[SavePolicy::BlockInputs],
        ActivationCheckpointing::Off => &[SavePolicy::Tapes],
        ActivationCheckpointing::Auto => &[SavePolicy::Tapes, SavePolicy::BlockInputs],
    };
    let wanted = spec.batch.row_tokens;
    let mut last = estimate(config, spec, lengths, save_policies[0], wanted, memory);
    for &save in save_policies {
        // Try shorter rows before recomputation, because they cost less time.
        for row_tokens in [wanted, wanted / 2, lengths.longest.min(wanted)] {
            last = estimate(config, spec, lengths, save, row_tokens.max(1), memory);
            if last.total() <= available {
                return Ok(last);
            }
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::cpu::thread_pool;
    use crate::domain::dpo::LossType;

    fn config() -> ModelConfig {
        let json = r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#;
        ModelConfig::from_hf_json(json, std::path::Path::new("config.json")).unwrap()
    }

    /// Returns the lengths of pairs that are all equally long.
    fn uniform(length: usize, spec: &TrainingSpec) -> Lengths {
        Lengths {
            longest: length,
            micro_batch: length * spec.batch.batch_size,
        }
    }

    fn pair(tokens: usize) -> EncodedPair {
        EncodedPair {
            row: 1,
            id: None,
            weight: 1.0,
            prompt: vec![1; tokens - 2],
            chosen: vec![2],
            rejected_prompt: None,
            rejected: vec![3],
            chosen_truncated: false,
            rejected_truncated: false,
            logged: None,
        }
    }

    #[test]
    fn a_micro_batch_is_at_most_the_longest_pairs_together() {
        let pairs: Vec<EncodedPair> = [10, 900, 20, 30, 1000, 5].map(pair).into();
        assert_eq!(
            Lengths::of(&pairs, 3),
            Lengths {
                longest: 1000,
                micro_batch: 1930
            }
        );
        assert_eq!(
            Lengths::of(&pairs, 100),
            Lengths {
                longest: 1000,
                micro_batch: 1965
            }
        );
        // A pair of which only one sequence is long has its prompt twice in a row. The sequences
        // of a pair that `pair` makes have one token after the prompt.
        let mut split = pair(10);
        split.chosen = vec![2; 5];
        let prompt = split.prompt.len();
        let class = |length: usize| usize::from(length > prompt + 1);
        assert_eq!(
            Lengths::by_length(&[split.clone()], 1, &class).longest,
            split.packed_tokens() + prompt
        );
        assert_eq!(
            Lengths::by_length(&[pair(10)], 1, &class),
            Lengths::of(&[pair(10)], 1)
        );
        assert_eq!(
            Lengths::of(&[], 3),
            Lengths {
                longest: 0,
                micro_batch: 0
            }
        );
        // The longer set counts, whichever it is. Two of 950 are longer together than one of 1000.
        let (model, others) = (config().spec, [950, 960].map(pair));
        for (train, eval) in [(&pairs[4..], &others[..]), (&others[..], &pairs[4..])] {
            assert_eq!(
                Lengths::of_run(&model, train, eval, 2),
                Lengths {
                    longest: 1000,
                    micro_batch: 1910
                }
            );
        }
    }

    #[test]
    fn one_long_pair_does_not_make_all_pairs_of_a_compared_batch_long() {
        let (config, mut spec) = (config(), TrainingSpec::default());
        spec.batch.batch_size = 16;
        spec.dpo.losses[0].loss = LossType::Aot;
        let mixed: Vec<EncodedPair> = (0..64)
            .map(|i| pair(if i == 0 { 2048 } else { 128 }))
            .collect();
        let lengths = Lengths::of(&mixed, spec.batch.batch_size);
        for memory in [MemoryKind::Host, MemoryKind::Gpu] {
            let of =
                |lengths, save| estimate(&config, &spec, lengths, save, 1024, memory).activations;
            let (all_long, bound) = (
                of(uniform(2048, &spec), SavePolicy::Tapes),
                of(lengths, SavePolicy::Tapes),
            );
            assert!(bound < all_long / 5, "{memory:?}: {bound} of {all_long}");
            // The bound is not below what the rows of the worst micro-batch save, which is as much
            // as one row with all their tokens.
            let tokens = 2048 + 15 * 128;
            let saved_by = |tokens| {
                of(
                    Lengths {
                        longest: 2048,
                        micro_batch: tokens,
                    },
                    SavePolicy::Tapes,
                )
            };
            assert!(
                bound >= saved_by(tokens) && saved_by(tokens) > saved_by(tokens - 128),
                "{memory:?}"
            );
        }
    }

    #[test]
    fn a_trained_head_saves_its_probabilities_for_every_row_in_memory() {
        let (mut config, mut spec) = (config(), TrainingSpec::default());
        spec.method = Method::Full;
        spec.batch.batch_size = 16;
        spec.dpo.losses[0].loss = LossType::Aot;
        let of = |config: &ModelConfig| {
            estimate(
                config,
                &spec,
                uniform(1100, &spec),
                SavePolicy::Tapes,
                2048,
                MemoryKind::Host,
            )
            .activations
        };
        let vocabulary = config.spec.vocab_size as u64;
        let with_words = of(&config);
        config.spec.vocab_size = 1;
        // Two pairs do not fit into one row. So 16 rows are in memory, each below the limit of a
        // row's head, and not 9 rows at that limit.
        assert_eq!(with_words - of(&config), F32 * 16 * 1100 * (vocabulary - 1));
    }

    #[test]
    fn a_gpu_holds_less_state_than_the_host_and_bf16_saves_less_than_half() {
        let (config, mut spec) = (config(), TrainingSpec::default());
        let of = |spec: &TrainingSpec, memory| {
            estimate(
                &config,
                spec,
                uniform(300, spec),
                SavePolicy::Tapes,
                1024,
                memory,
            )
        };
        assert!(
            of(&spec, MemoryKind::Gpu).training_state < of(&spec, MemoryKind::Host).training_state
        );
        let f32 = of(&spec, MemoryKind::Gpu);
        spec.precision = Some(Precision::Bf16);
        let bf16 = of(&spec, MemoryKind::Gpu);
        assert!(bf16.activations < f32.activations && bf16.activations > f32.activations / 2);
    }

    #[test]
    fn a_loss_that_compares_pairs_holds_every_row_of_its_micro_batch() {
        let (config, mut spec) = (config(), TrainingSpec::default());
        spec.batch.batch_size = 16;
        for memory in [MemoryKind::Host, MemoryKind::Gpu] {
            let of = |spec: &TrainingSpec, save| {
                estimate(&config, spec, uniform(1024, spec), save, 1024, memory).activations
            };
            let (one, one_recomputed) = (
                of(&spec, SavePolicy::Tapes),
                of(&spec, SavePolicy::BlockInputs),
            );
            let mut aot = spec.clone();
            aot.dpo.losses[0].loss = LossType::Aot;
            assert!(
                of(&aot, SavePolicy::Tapes) > 12 * one && of(&aot, SavePolicy::Tapes) <= 16 * one,
                "{memory:?}"
            );
            // Halving the rows does not help, but recomputation does.
            assert!(
                of(&aot, SavePolicy::BlockInputs) < of(&aot, SavePolicy::Tapes) / 3
                    && of(&aot, SavePolicy::BlockInputs) > 2 * one_recomputed,
                "{memory:?}"
            );
        }
    }

    /// Returns the bytes of training state and of activations for pairs of one length.
    fn needs(
        config: &ModelConfig,
        spec: &TrainingSpec,
        length: usize,
        save: SavePolicy,
        memory: MemoryKind,
    ) -> (u64, u64) {
        let estimate = estimate(
            config,
            spec,
            uniform(length, spec),
            save,
            spec.batch.row_tokens,
            memory,
        );
        (estimate.training_state, estimate.activations)
    }

    /// The numbers were computed by hand from the formulas.
    #[test]
    fn estimates_are_the_sums_of_what_the_operations_say() {
        let rounds = Kernel::best(Precision::Bf16).is_bf16();
        let by_kernel = |plain: u64, rounded: u64| if rounds { rounded } else { plain };
        let small = config();
        let normed = r#"{"model_type": "qwen3", "hidden_size": 128, "intermediate_size": 352,
            "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": false}"#;
        let normed =
            ModelConfig::from_hf_json(normed, std::path::Path::new("config.json")).unwrap();

        let lora = TrainingSpec::default();
        assert_eq!(
            needs(&small, &lora, 300, SavePolicy::Tapes, MemoryKind::Host),
            (78_151_680, 780_951_552)
        );
        assert_eq!(
            needs(&small, &lora, 300, SavePolicy::Tapes, MemoryKind::Gpu),
            (39_075_840, 849_153_536)
        );
        let total = estimate(
            &small,
            &lora,
            uniform(300, &lora),
            SavePolicy::Tapes,
            1024,
            MemoryKind::Host,
        )
        .total();
        assert_eq!(
            total - thread_pool::threads() as u64 * (2 << 20),
            (92 << 20) + 78_151_680 + 780_951_552
        );

        let lora_bf16 = TrainingSpec {
            precision: Some(Precision::Bf16),
            ..TrainingSpec::default()
        };
        let activations = by_kernel(399_944_000, 309_512_000);
        assert_eq!(
            needs(
                &small,
                &lora_bf16,
                2000,
                SavePolicy::BlockInputs,
                MemoryKind::Host
            ),
            (78_151_680, activations)
        );
        assert_eq!(
            needs(
                &small,
                &lora_bf16,
                2000,
                SavePolicy::BlockInputs,
                MemoryKind::Gpu
            ),
            (29_306_880, 300_840_500)
        );
        let activations = by_kernel(62_062_592, 50_331_648);
        assert_eq!(
            needs(
                &normed,
                &lora_bf16,
                300,
                SavePolicy::Tapes,
                MemoryKind::Host
            ),
            (2_785_280, activations)
        );
        assert_eq!(
            needs(&normed, &lora_bf16, 300, SavePolicy::Tapes, MemoryKind::Gpu),
            (1_044_480, 78_475_264)
        );

        let full = TrainingSpec {
            method: Method::Full,
            ..TrainingSpec::default()
        };
        assert_eq!(
            needs(
                &normed,
                &full,
                300,
                SavePolicy::BlockInputs,
                MemoryKind::Host
            ),
            (19_064_832, 34_750_464)
        );
        assert_eq!(
            needs(
                &normed,
                &full,
                300,
                SavePolicy::BlockInputs,
                MemoryKind::Gpu
            ),
            (9_532_416, 85_525_504)
        );
        let full_bf16 = TrainingSpec {
            precision: Some(Precision::Bf16),
            ..full.clone()
        };
        assert_eq!(
            needs(&small, &full_bf16, 300, SavePolicy::Tapes, MemoryKind::Host),
            (2_152_240_128, by_kernel(968_515_584, 955_097_088))
        );
        assert_eq!(
            needs(&small, &full_bf16, 300, SavePolicy::Tapes, MemoryKind::Gpu),
            (807_090_048, 515_894_784)
        );

        let mut compared = full;
        (compared.batch.batch_size, compared.batch.row_tokens) = (16, 2048);
        compared.dpo.losses[0].loss = LossType::Aot;
        assert_eq!(
            needs(&small, &compared, 1100, SavePolicy::Tapes, MemoryKind::Host),
            (2_152_240_128, 15_867_775_488)
        );
        assert_eq!(
            needs(&small, &compared, 1100, SavePolicy::Tapes, MemoryKind::Gpu),
            (1_076_120_064, 13_108_296_352)
        );

        assert_eq!(
            (scoring(&small, 1024), scoring(&normed, 1024)),
            (29_884_416, 6_815_744)
        );
        assert_eq!(
            (on_host(&small, &lora, 1), on_host(&small, &lora, 3)),
            (16 * 4_884_480, 24 * 4_884_480)
        );
    }

    #[test]
    fn less_memory_means_shorter_rows_then_recomputation_then_a_refusal() {
        let (config, spec) = (config(), TrainingSpec::default());
        let all = plan(
            &config,
            &spec,
            uniform(300, &spec),
            u64::MAX,
            MemoryKind::Host,
        )
        .unwrap();
        assert_eq!(
            (all.save, all.row_tokens),
            (SavePolicy::Tapes, spec.batch.row_tokens)
        );
        let less = plan(
            &config,
            &spec,
            uniform(300, &spec),
            all.total() - 1,
            MemoryKind::Host,
        )
        .unwrap();
        assert!(
            less.save == SavePolicy::Tapes
                && less.row_tokens < all.row_tokens
                && less.total() < all.total()
        );
        let least = plan(&config, &spec, uniform(300, &spec), 0, MemoryKind::Host).unwrap_err();
        assert_eq!(
            plan(
                &config,
                &spec,
                uniform(300, &spec),
                least.total(),
                MemoryKind::Host
            )
            .unwrap(),
            least
        );
        assert_eq!(least.save, SavePolicy::BlockInputs);
        assert!(
            plan(
                &config,
                &spec,
                uniform(300, &spec),
                least.total() - 1,
                MemoryKind::Host
            )
            .is_err()
        );
    }
}
