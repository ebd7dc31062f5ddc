//! Compares random models on random packed rows with a plain reference in f64
//! (`reference_model.rs`): log-probs, and the gradient of every tensor. BRADLEY_TEST_DEVICE names
//! the device. With more seeds:
//!
//!   BRADLEY_TEST_SPECS=500 BRADLEY_TEST_SEED=1000 cargo test --test it random_specs

use std::convert::Infallible;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use bradley::domain::training::{FUSED_TARGET_MODULES, LoraConfig, Precision, TARGET_MODULES};
use bradley::infer::pack::{PackedRow, pack_by_length};
use bradley::infer::pair::SequenceGroup;
use bradley::model::adapter::Adapter;
use bradley::model::config::ModelConfig;
use bradley::model::decoder::Policy;
use bradley::model::families::Architecture;
use bradley::model::parameters::Parameters;
use bradley::model::params::{LoraTensor, ParamId, ParamRole, ParamSpec, lora_layers};
use bradley::model::rope::{QueryScaling, RopeConfig, RopeScaling, RotaryPairs};
use bradley::model::spec::{
    ActivationFunction, AttentionSpec, BlockSpec, FeedForward, Mixer, ModelSpec, NormNames, Norms,
    Projections, QkNorm,
};
use bradley::train::backprop::{SavePolicy, backward, forward};
use bradley::train::trainable::{StepGradients, TrainablePolicy};
use candle_core::{DType, Device, Tensor};
use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::reference_model::{Hidden, ReferenceModel};
use crate::support::{assert_close, device, encode, json, numbers, rows, tiny};

/// Number of seeds without BRADLEY_TEST_SPECS: on the CPU, and on other devices, because the
/// emulator needs minutes for what takes the CPU seconds.
const SEEDS: (u64, u64) = (24, 8);
/// First seed without BRADLEY_TEST_SEED.
const FIRST_SEED: u64 = 1;

/// Relative tolerance of a log-prob in f32; values below 1 nat are compared on the scale of a nat.
/// Sums of some hundred terms have rounding errors of about 1e-6; a norm over a head of two
/// dimensions that happen to be small magnifies these up to a hundred times.
const LOGP_F32: f64 = 1e-4;
/// Tolerance of a tensor's gradient in f32, relative to its norm.
const GRADIENT_F32: f64 = 5e-4;
/// Fraction of the norm of all gradients to which a tensor's gradient is compared at least: a
/// smaller gradient is the difference of larger numbers that cancel.
const SMALL_GRADIENT: f64 = 0.02;
/// Tolerance of all log-probs of a row in bf16, relative. An operand is rounded by up to 2⁻⁸,
/// so logits of about 1 are off by about 1e-2, at log-probs of about −4.
const LOGP_BF16: f64 = 2e-2;
/// Tolerance of all gradients in bf16, relative to their norm.
const GRADIENT_BF16: f64 = 0.1;

/// Half of the step of the difference quotients. In f64 this gives rounding errors of about 1e-7,
/// and a smaller error from the curvature.
const STEP: f64 = 3e-7;

/// Generator of random draws.
struct Draw(ChaCha8Rng);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n as u64) as usize
    }

    fn within(&mut self, range: RangeInclusive<usize>) -> usize {
        range.start() + self.below(range.end() - range.start() + 1)
    }

    fn flag(&mut self) -> bool {
        self.below(2) == 1
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Returns a number in [low, high).
    fn number(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * ((self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64)
    }

    /// Returns numbers in [−bound, bound) that bf16 represents exactly, so that a model has the
    /// same weights in both precisions.
    fn weights(&mut self, n: usize, bound: f64, centre: f64) -> Vec<f32> {
        let rounded = |x: f64| bf16::from_f64(x).to_f32();
        (0..n)
            .map(|_| rounded(centre + self.number(-bound, bound)))
            .collect()
    }
}

fn random_rope(draw: &mut Draw) -> RopeConfig {
    let theta = draw.pick(&[100.0, 10_000.0, 500_000.0]);
    let factor = draw.number(1.5, 8.0);
    let original_max_position_embeddings = draw.within(8..=64);
    let scaling = match draw.below(4) {
        0 => RopeScaling::None,
        1 => RopeScaling::Linear { factor },
        2 => {
            let low_freq_factor = draw.number(0.5, 2.0);
            let high_freq_factor = low_freq_factor + draw.number(0.5, 4.0);
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }
        }
        _ => RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast: draw.number(4.0, 32.0),
            beta_slow: draw.number(0.5, 2.0),
            attention_factor: draw.flag().then(|| draw.number(0.8, 1.3)),
            mscale: draw.flag().then(|| draw.number(0.5, 1.5)),
            mscale_all_dim: draw.flag().then(|| draw.number(0.5, 1.5)),
            truncate: draw.flag(),
        },
    };
    RopeConfig {
        scaling,
        ..RopeConfig::new(theta)
    }
}

/// Draws the rotated dimensions, and whether the frequencies depend on the length of a sequence.
fn draw_rotation(draw: &mut Draw, rope: &mut RopeConfig, head_dim: usize) {
    rope.pairs = draw.pick(&[RotaryPairs::Halves, RotaryPairs::Interleaved]);
    let partial = draw.flag();
    let half = draw.within(1..=head_dim / 2);
    rope.dims = partial.then_some(2 * half);
    let dims = rope.dims.unwrap_or(head_dim);
    // About the lengths of the drawn sequences.
    let context = draw.pick(&[4, 8, 12, 100]);
    let factor = draw.number(1.5, 8.0);
    let kind = draw.below(4);
    let mut factors = || (0..dims / 2).map(|_| draw.number(1.0, 4.0)).collect();
    let (short_factor, long_factor): (Vec<f64>, Vec<f64>) = (factors(), factors());
    match kind {
        0 if dims > 2 => rope.scaling = RopeScaling::Dynamic { factor, context },
        1 => {
            rope.scaling = RopeScaling::LongRope {
                short_factor,
                long_factor,
                attention_factor: draw.number(0.8, 1.3),
                original_max_position_embeddings: context,
            }
        }
        _ => {}
    }
}

fn random_block(draw: &mut Draw, head_dim: usize) -> BlockSpec {
    let heads = draw.within(1..=(128 / head_dim).clamp(1, 8));
    let divisors: Vec<usize> = (1..=heads).filter(|n| heads.is_multiple_of(*n)).collect();
    let attention = AttentionSpec {
        heads,
        kv_heads: draw.pick(&divisors),
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        softcap: None,
        rope: Some(0),
        window: draw
            .flag()
            .then(|| draw.pick(&[1, 2, 3, 7, 16, 33, 64, 70, 500])),
        qk_norm: draw.pick(&[QkNorm::Absent, QkNorm::PerHead]),
        qkv_bias: draw.flag(),
        output_bias: draw.flag(),
        projections: Projections::Separate,
    };
    let odd_width = draw.within(1..=48);
    BlockSpec {
        mixer: Mixer::Attention(attention),
        mixer_norms: Norms::Pre,
        feed_forward: FeedForward::Gated {
            // Whole panels use other kernels than the rest.
            width: draw.pick(&[odd_width, 32, 64]),
            activation: ActivationFunction::Silu,
            bias: draw.flag(),
            projections: Projections::Separate,
        },
        feed_forward_norms: Norms::Pre,
        norm_names: NormNames::Gemma,
        output_factor: 1.0,
    }
}

/// Draws a model. Its blocks differ, except in the head size, which the rotation fixes.
fn random_spec(draw: &mut Draw) -> ModelSpec {
    let head_dim = draw.pick(&[2, 4, 6, 8, 10, 14, 16, 20, 24, 32, 34, 40, 64]);
    let small_vocabulary = draw.within(5..=60);
    let blocks = draw.within(1..=3);
    ModelSpec {
        // A vocabulary of 600 has two tiles of the head.
        vocab_size: draw.pick(&[small_vocabulary, small_vocabulary, 600]),
        hidden_size: draw.within(4..=40),
        max_position_embeddings: 512,
        rms_norm_eps: draw.pick(&[1e-6, 1e-5, 1e-3, 1e-2]),
        embedding_scale: 1.0,
        rounds_embedding_scale: false,
        norms_add_one: false,
        ropes: vec![random_rope(draw)],
        tie_word_embeddings: draw.flag(),
        logit_factor: 1.0,
        logit_softcap: None,
        blocks: (0..blocks).map(|_| random_block(draw, head_dim)).collect(),
    }
}

/// Draws features that only some families have. `draw` is another generator than that of
/// [`random_spec`], so that a new feature does not change the sizes that a seed gives.
fn draw_distinctions(draw: &mut Draw, spec: &mut ModelSpec) {
    // Numbers that bf16 represents exactly.
    spec.embedding_scale = draw.pick(&[1.0, 1.0, 0.5, 3.0]);
    spec.norms_add_one = draw.flag();
    if draw.flag() {
        spec.ropes.push(random_rope(draw));
    }
    for block in &mut spec.blocks {
        let Mixer::Attention(attention) = &mut block.mixer;
        attention.rope = Some(draw.below(spec.ropes.len()));
        if draw.flag() {
            attention.scale *= draw.number(0.5, 1.5) as f32;
        }
        let FeedForward::Gated { activation, .. } = &mut block.feed_forward;
        *activation = draw.pick(&[ActivationFunction::Silu, ActivationFunction::GeluTanh]);
    }
    for block in &mut spec.blocks {
        block.mixer_norms = draw.pick(&[Norms::Pre, Norms::PreAndPost]);
        block.feed_forward_norms = draw.pick(&[Norms::Pre, Norms::PreAndPost]);
    }
    // Scores and logits are about 1, so these caps change them.
    for block in &mut spec.blocks {
        let Mixer::Attention(attention) = &mut block.mixer;
        attention.softcap = draw.flag().then(|| draw.number(0.5, 5.0) as f32);
    }
    spec.logit_softcap = draw.flag().then(|| draw.number(1.0, 10.0) as f32);
    let head_dim = spec.head_dim();
    for rope in &mut spec.ropes {
        draw_rotation(draw, rope, head_dim);
    }
    let kinds = [Projections::Separate, Projections::Fused];
    for block in &mut spec.blocks {
        let Mixer::Attention(attention) = &mut block.mixer;
        attention.projections = draw.pick(&kinds);
        let FeedForward::Gated { projections, .. } = &mut block.feed_forward;
        *projections = draw.pick(&kinds);
        block.norm_names = draw.pick(&[NormNames::Gemma, NormNames::Glm]);
    }
    for block in &mut spec.blocks {
        let Mixer::Attention(attention) = &mut block.mixer;
        if draw.below(4) == 0 {
            attention.rope = None;
        }
    }
    spec.logit_factor = draw.pick(&[1.0, 1.0, 0.3, 2.0]);
    for block in &mut spec.blocks {
        block.output_factor = draw.pick(&[1.0, 1.0, 0.4, 1.5]);
    }
    for rope in &mut spec.ropes {
        // Scaling needs a rotation of all dimensions.
        let is_scaled = draw.flag() && rope.dims.is_none();
        rope.query_scaling = is_scaled.then(|| QueryScaling {
            beta: draw.number(0.1, 1.0) as f32,
            period: draw.within(1..=20),
        });
    }
    for block in &mut spec.blocks {
        let post = draw.below(4);
        if post < 2 {
            block.mixer_norms = Norms::Post;
        }
        if post == 0 {
            block.feed_forward_norms = Norms::Post;
        }
        let Mixer::Attention(attention) = &mut block.mixer;
        if attention.qk_norm == QkNorm::PerHead && draw.flag() {
            attention.qk_norm = QkNorm::AllHeads;
        }
    }
}

/// Draws prompts with their completions. Half of the rows have a prompt and a completion of about a
/// block of queries (64 tokens) or more; some prompts occur twice.
fn random_groups(draw: &mut Draw, vocabulary: usize) -> Vec<SequenceGroup> {
    let tokens = |draw: &mut Draw, n: usize| -> Vec<u32> {
        (0..n).map(|_| draw.below(vocabulary) as u32).collect()
    };
    let is_long = draw.flag();
    let mut groups: Vec<SequenceGroup> = Vec::new();
    for group in 0..draw.within(1..=3) {
        let prompt = match is_long && group == 0 {
            true => draw.within(60..=90),
            false => draw.within(1..=9),
        };
        let prompt = tokens(draw, prompt);
        let completions = (0..draw.within(1..=3)).map(|completion| {
            let length = match is_long && group == 0 && completion == 0 {
                true => draw.within(60..=80),
                false => draw.within(1..=8),
            };
            tokens(draw, length)
        });
        let completions = completions.collect();
        groups.push(SequenceGroup {
            prompt,
            completions,
        });
    }
    if draw.flag() {
        let length = draw.within(1..=8);
        let completions = vec![tokens(draw, length)];
        groups.push(SequenceGroup {
            prompt: groups[0].prompt.clone(),
            completions,
        });
    }
    groups
}

/// Draws a model's tensors, about as large as those of a trained model, so that no part of it is
/// negligible beside the others.
fn random_parameters(draw: &mut Draw, config: &ModelConfig) -> Parameters {
    let tensor = |param: &ParamSpec| -> candle_core::Result<Tensor> {
        let values = match param.role {
            // The outputs have about the variance of the inputs.
            ParamRole::Matrix => {
                let inputs = param.shape[param.shape.len() - 1];
                draw.weights(param.elements(), 1.7 / (inputs as f64).sqrt(), 0.0)
            }
            ParamRole::Norm => draw.weights(
                param.elements(),
                0.4,
                if param.adds_one { 0.0 } else { 1.0 },
            ),
            ParamRole::Bias => draw.weights(param.elements(), 0.3, 0.0),
        };
        Tensor::from_vec(values, param.shape.as_slice(), &Device::Cpu)
    };
    Parameters::build(config, tensor).unwrap()
}

fn random_adapter(draw: &mut Draw, config: &ModelConfig) -> Adapter {
    let mut targets: Vec<String> = TARGET_MODULES.iter().map(|name| name.to_string()).collect();
    if draw.flag() {
        targets.retain(|_| draw.flag());
    }
    if targets.is_empty() {
        targets.push("v_proj".into());
    }
    // A fused layer has an update if its first part has one.
    for (part, fused) in ["q_proj", "gate_proj"]
        .into_iter()
        .zip(FUSED_TARGET_MODULES)
    {
        if targets.iter().any(|name| name == part) {
            targets.push(fused.into());
        }
    }
    let mut lora = LoraConfig {
        rank: draw.within(1..=9),
        alpha: draw.number(1.0, 12.0),
        target_modules: targets,
        use_rslora: draw.flag(),
        init_adapter: None,
    };
    if lora_layers(&config.spec, &lora).is_empty() {
        lora.target_modules.push("o_proj".into());
    }
    let tensor = |tensor: &LoraTensor| -> Result<Tensor, Infallible> {
        let bound = 0.5 / (tensor.shape[1] as f64).sqrt();
        let values = draw.weights(tensor.elements(), bound, 0.0);
        Ok(Tensor::from_vec(values, &tensor.shape, &Device::Cpu).unwrap())
    };
    Adapter::build(config, &lora, tensor).unwrap()
}

/// A model, an adapter and a row, drawn from a seed.
struct Case {
    base: Policy,
    /// Adapter that is trained; without one, all weights are trained.
    adapter: Option<Adapter>,
    groups: Vec<SequenceGroup>,
    row: PackedRow,
    /// ∂loss/∂log p of each of the row's targets.
    upstream: Vec<f32>,
    save: SavePolicy,
    /// Generator for later draws.
    draw: Draw,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut draw = Draw(ChaCha8Rng::seed_from_u64(seed));
        let mut spec = random_spec(&mut draw);
        draw_distinctions(&mut Draw(ChaCha8Rng::seed_from_u64(!seed)), &mut spec);
        let groups = random_groups(&mut draw, spec.vocab_size);
        let config = ModelConfig {
            architecture: Architecture::Llama,
            spec,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            hf_json: serde_json::Value::Null,
            whole_json: None,
        };
        let parameters = random_parameters(&mut draw, &config);
        let adapter = draw.flag().then(|| random_adapter(&mut draw, &config));
        let items: Vec<_> = groups.iter().map(std::slice::from_ref).collect();
        let row = pack_by_length(&items, &|length| config.spec.length_class(length));
        let upstream = row
            .row
            .targets
            .iter()
            .map(|_| draw.number(-1.0, 1.0) as f32)
            .collect();
        let save = draw.pick(&[SavePolicy::Tapes, SavePolicy::BlockInputs]);
        let base = Policy {
            config: Arc::new(config),
            parameters: Arc::new(parameters),
            adapter: None,
            precision: Precision::F32,
            device: device(),
            helpers: Arc::default(),
        };
        Case {
            base,
            adapter,
            groups,
            row,
            upstream,
            save,
            draw,
        }
    }

    /// Returns the policy that is trained. A frozen base has the precision of the passes, as in a
    /// server.
    fn trainable(&self, precision: Precision) -> TrainablePolicy {
        let base = self.base.with_precision(precision);
        let Some(adapter) = &self.adapter else {
            return TrainablePolicy::full(&base, precision).unwrap();
        };
        let frozen = base
            .parameters
            .map(|param, tensor| match (param.role, precision) {
                (ParamRole::Matrix, Precision::Bf16) => tensor.to_dtype(DType::BF16),
                _ => Ok(tensor.clone()),
            });
        let base = Policy {
            parameters: Arc::new(frozen.unwrap()),
            ..base
        };
        TrainablePolicy::lora(&base, adapter, precision).unwrap()
    }

    /// Returns every completion with its prompt, and the positions of its tokens among the row's
    /// targets.
    fn sequences(&self) -> Vec<(&[u32], &[u32], Range<usize>)> {
        let mut sequences = Vec::new();
        for (group, ranges) in self.groups.iter().zip(&self.row.completions) {
            for (completion, range) in group.completions.iter().zip(ranges) {
                sequences.push((&group.prompt[..], &completion[..], range.clone()));
            }
        }
        sequences
    }
}

/// Results of the program.
struct Computed {
    log_probs: Vec<f32>,
    /// Gradient of each trained tensor.
    gradients: Vec<Vec<f64>>,
}

/// Runs a row forward and backward, and checks that scoring gives the same log-probs as training.
fn compute(case: &Case, policy: &TrainablePolicy) -> Computed {
    let row = &case.row.row;
    let tape = forward(&policy.policy, row.clone(), case.save, &mut || {}).unwrap();
    let log_probs = tape.log_probs().to_vec();
    let scored = policy.policy.log_probs(row.clone(), &mut || {}).unwrap();
    assert_eq!(scored.len(), log_probs.len());
    for (scored, trained) in scored.iter().zip(&log_probs) {
        assert_close("scoring", *scored as f64, *trained as f64, LOGP_F32, 1.0);
    }
    let mut sums = StepGradients::zeros(policy);
    backward(&policy.policy, tape, &case.upstream, &mut sums, &mut || {}).unwrap();
    sums.collect().unwrap();
    let widened = |g: &Vec<f32>| g.iter().map(|x| *x as f64).collect();
    Computed {
        log_probs,
        gradients: sums.values().iter().map(widened).collect(),
    }
}

/// Sum over a row's targets of upstream·log p; its derivatives are the expected gradients.
struct Objective<'a> {
    case: &'a Case,
    /// For each sequence, the input of each block and the output of the last one, at the drawn
    /// weights. Values before a tensor do not change with it.
    hidden: Vec<Vec<Hidden>>,
}

impl<'a> Objective<'a> {
    fn new(case: &'a Case, model: &ReferenceModel) -> Self {
        let states = |(prompt, completion, _): (&[u32], &[u32], Range<usize>)| {
            let mut states = vec![model.embed(prompt, completion)];
            let length = prompt.len() + completion.len();
            for index in 0..model.num_blocks() {
                states.push(model.block(index, &states[index], length));
            }
            states
        };
        Objective {
            case,
            hidden: case.sequences().into_iter().map(states).collect(),
        }
    }

    /// Returns the objective when only the tensor `moved` has changed since [`Objective::new`].
    fn value(&self, model: &ReferenceModel, moved: ParamId) -> f64 {
        let mut sum = 0.0;
        for ((prompt, completion, range), hidden) in self.case.sequences().iter().zip(&self.hidden)
        {
            let (first, mut x) = match moved {
                ParamId::Embedding => (0, model.embed(prompt, completion)),
                ParamId::Block(index, _) => (index, hidden[index].clone()),
                ParamId::Norm | ParamId::Head => {
                    (model.num_blocks(), hidden[model.num_blocks()].clone())
                }
            };
            let length = prompt.len() + completion.len();
            for index in first..model.num_blocks() {
                x = model.block(index, &x, length);
            }
            let log_probs = model.head(&x, prompt.len(), completion);
            let upstream = &self.case.upstream[range.clone()];
            sum += log_probs
                .iter()
                .zip(upstream)
                .map(|(l, g)| l * *g as f64)
                .sum::<f64>();
        }
        sum
    }
}

/// Description of the case, printed on drop when a check fails or the program panics.
struct PrintedOnPanic(String);

impl Drop for PrintedOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

fn norm(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn check(seed: u64) {
    let mut case = Case::new(seed);
    let (spec, lora) = (
        &case.base.config.spec,
        case.adapter.as_ref().map(|a| a.config.clone()),
    );
    let layout = &case.row.row.layout.segments;
    let save = case.save;
    let _printed = PrintedOnPanic(format!(
        "BRADLEY_TEST_SEED={seed}: {spec:#?}\n{lora:?}\n{layout:?}\n{save:?}"
    ));

    let policies = [Precision::F32, Precision::Bf16].map(|precision| case.trainable(precision));
    let [exact, rounded] = policies.each_ref().map(|policy| compute(&case, policy));
    let mut model = ReferenceModel::new(&policies[0].policy);

    let mut wanted = vec![0.0; case.upstream.len()];
    for (prompt, completion, range) in case.sequences() {
        wanted[range].copy_from_slice(&model.log_probs(prompt, completion));
    }
    for (i, (got, want)) in exact.log_probs.iter().zip(&wanted).enumerate() {
        assert_close(
            &format!("seed {seed}: log-prob {i}"),
            *got as f64,
            *want,
            LOGP_F32,
            1.0,
        );
    }
    let off = rounded
        .log_probs
        .iter()
        .zip(&wanted)
        .map(|(got, want)| *got as f64 - want);
    let off = norm(off) / norm(wanted.iter().copied());
    assert!(
        off < LOGP_BF16,
        "seed {seed}: in bf16 the log-probs are off by {off:e}"
    );

    // Compares each gradient along a random direction with elements of variance 1: an error of the
    // gradient then changes the result by about its own norm.
    let directions: Vec<Vec<f64>> = exact
        .gradients
        .iter()
        .map(|g| {
            (0..g.len())
                .map(|_| case.draw.number(-(3f64.sqrt()), 3f64.sqrt()))
                .collect()
        })
        .collect();
    let along = |gradient: &[f64], direction: &[f64]| -> f64 {
        gradient.iter().zip(direction).map(|(g, d)| g * d).sum()
    };
    let all = norm(exact.gradients.iter().flatten().copied());
    assert!(all > 0.0, "seed {seed}: there is no gradient");
    let objective = Objective::new(&case, &model);
    let mut off_in_bf16 = Vec::new();
    for (i, trained) in policies[0].trainables.iter().enumerate() {
        let direction = &directions[i];
        model.shift(trained.id, direction, STEP);
        let above = objective.value(&model, trained.id);
        model.shift(trained.id, direction, -2.0 * STEP);
        let below = objective.value(&model, trained.id);
        model.shift(trained.id, direction, STEP);
        let want = (above - below) / (2.0 * STEP);

        let (got, name) = (along(&exact.gradients[i], direction), &trained.name);
        let scale = norm(exact.gradients[i].iter().copied()).max(SMALL_GRADIENT * all);
        let off = (got - want).abs();
        let what = format!("seed {seed}: the gradient of {name}: {got} is not {want}");
        assert!(
            off <= GRADIENT_F32 * scale,
            "{what} within {GRADIENT_F32} of {scale}"
        );
        off_in_bf16.push(along(&rounded.gradients[i], direction) - want);
    }
    let off = norm(off_in_bf16) / all;
    assert!(
        off < GRADIENT_BF16,
        "seed {seed}: in bf16 the gradients are off by {off:e}"
    );
}

fn seeds() -> Range<u64> {
    let number = |variable: &str, default: u64| {
        std::env::var(variable)
            .ok()
            .map_or(default, |value| value.parse().unwrap())
    };
    let first = number("BRADLEY_TEST_SEED", FIRST_SEED);
    let count = if device().name() == "cpu" {
        SEEDS.0
    } else {
        SEEDS.1
    };
    first..first + number("BRADLEY_TEST_SPECS", count)
}

#[test]
fn log_probs_and_gradients_are_those_of_the_definition() {
    seeds().for_each(check);
}

/// Checks that the seeds reach every kind of model and row; otherwise the test above would prove
/// less.
#[test]
fn the_seeds_draw_every_variant() {
    let cases: Vec<Case> = (FIRST_SEED..FIRST_SEED + SEEDS.0).map(Case::new).collect();
    let any = |what: &str, is: &dyn Fn(&Case) -> bool| {
        assert!(cases.iter().any(is), "no seed draws {what}");
    };
    let blocks = |case: &Case| case.base.config.spec.blocks.clone();
    let attention = |case: &Case, is: &dyn Fn(&AttentionSpec) -> bool| {
        blocks(case).iter().any(|block| is(block.attention()))
    };
    let scalings = |case: &Case, is: &dyn Fn(&RopeScaling) -> bool| {
        case.base
            .config
            .spec
            .ropes
            .iter()
            .any(|rope| is(&rope.scaling))
    };
    any("a tied head", &|c| c.base.config.spec.tie_word_embeddings);
    any("a head of its own", &|c| {
        !c.base.config.spec.tie_word_embeddings
    });
    any("two tiles of the vocabulary", &|c| {
        c.base.config.spec.vocab_size > 512
    });
    any("an adapter", &|c| c.adapter.is_some());
    any("a full fine-tune", &|c| c.adapter.is_none());
    any("tapes", &|c| c.save == SavePolicy::Tapes);
    any("recomputation", &|c| c.save == SavePolicy::BlockInputs);
    any("no scaling", &|c| scalings(c, &|s| *s == RopeScaling::None));
    any("linear", &|c| {
        scalings(c, &|s| matches!(s, RopeScaling::Linear { .. }))
    });
    any("llama3", &|c| {
        scalings(c, &|s| matches!(s, RopeScaling::Llama3 { .. }))
    });
    any("yarn", &|c| {
        scalings(c, &|s| matches!(s, RopeScaling::Yarn { .. }))
    });
    any("grouped queries", &|c| {
        attention(c, &|a| a.kv_heads > 1 && a.kv_heads < a.heads)
    });
    any("one key head for all", &|c| {
        attention(c, &|a| a.kv_heads == 1 && a.heads > 1)
    });
    any("norms on queries and keys", &|c| {
        attention(c, &|a| a.qk_norm == QkNorm::PerHead)
    });
    any("biases on queries", &|c| {
        attention(c, &|a| a.qkv_bias && !a.output_bias)
    });
    any("a bias on the output", &|c| {
        attention(c, &|a| a.output_bias && !a.qkv_bias)
    });
    any("biases in the feed-forward part", &|c| {
        blocks(c)
            .iter()
            .any(|b| matches!(b.feed_forward, FeedForward::Gated { bias: true, .. }))
    });
    any("blocks of which some have a window", &|c| {
        attention(c, &|a| a.window.is_some()) && attention(c, &|a| a.window.is_none())
    });
    any("a window that hides a part of the prompt", &|c| {
        let longest = c.groups.iter().map(|g| g.prompt.len()).max().unwrap();
        attention(c, &|a| a.window.is_some_and(|window| window < longest))
    });
    any("scaled embeddings", &|c| {
        c.base.config.spec.embedding_scale != 1.0
    });
    any("norms of 1 + w", &|c| c.base.config.spec.norms_add_one);
    any("two rotations", &|c| {
        attention(c, &|a| a.rope == Some(0)) && attention(c, &|a| a.rope == Some(1))
    });
    for is_scaled in [false, true] {
        let what = format!("queries with a scale of their positions: {is_scaled}");
        any(&what, &|c| {
            let ropes = &c.base.config.spec.ropes;
            attention(c, &|a| {
                a.rope
                    .is_some_and(|rope| ropes[rope].query_scaling.is_some() == is_scaled)
            })
        });
    }
    any("blocks of which some are not rotated", &|c| {
        attention(c, &|a| a.rope.is_none()) && attention(c, &|a| a.rope.is_some())
    });
    any("scores of another scale", &|c| {
        attention(c, &|a| a.scale != 1.0 / (a.head_dim as f32).sqrt())
    });
    for wanted in [ActivationFunction::Silu, ActivationFunction::GeluTanh] {
        let is = |b: &BlockSpec| {
            let FeedForward::Gated { activation, .. } = b.feed_forward;
            activation == wanted
        };
        let what = format!("the activation {wanted:?}");
        any(&what, &|c| blocks(c).iter().any(is));
    }
    for both in [false, true] {
        let is = |b: &BlockSpec| {
            [b.mixer_norms, b.feed_forward_norms]
                == [
                    Norms::PreAndPost,
                    if both { Norms::PreAndPost } else { Norms::Pre },
                ]
        };
        let what = format!("norms on the outputs of both parts: {both}");
        any(&what, &|c| blocks(c).iter().any(is));
    }
    any("a soft-cap on scores", &|c| {
        attention(c, &|a| a.softcap.is_some())
    });
    any("no soft-cap on scores", &|c| {
        attention(c, &|a| a.softcap.is_none())
    });
    for is_trained in [false, true] {
        let what = format!("a soft-cap on the logits, full fine-tune: {is_trained}");
        any(&what, &|c| {
            c.base.config.spec.logit_softcap.is_some() && c.adapter.is_none() == is_trained
        });
    }
    any("no soft-cap on the logits", &|c| {
        c.base.config.spec.logit_softcap.is_none()
    });
    let rope =
        |case: &Case, is: &dyn Fn(&RopeConfig) -> bool| case.base.config.spec.ropes.iter().any(is);
    for pairs in [RotaryPairs::Halves, RotaryPairs::Interleaved] {
        any(&format!("a rotation of all dimensions, {pairs:?}"), &|c| {
            rope(c, &|r| r.pairs == pairs && r.dims.is_none())
        });
        any(&format!("a rotation of some dimensions, {pairs:?}"), &|c| {
            rope(c, &|r| r.pairs == pairs && r.dims.is_some())
        });
    }
    any("dynamic", &|c| {
        scalings(c, &|s| matches!(s, RopeScaling::Dynamic { .. }))
    });
    any("longrope", &|c| {
        scalings(c, &|s| matches!(s, RopeScaling::LongRope { .. }))
    });
    any("a prompt with sequences of two classes", &|c| {
        let classes = |group: &SequenceGroup| -> Vec<usize> {
            let class = |completion: &Vec<u32>| {
                let length = group.prompt.len() + completion.len();
                c.base.config.spec.length_class(length)
            };
            group.completions.iter().map(class).collect()
        };
        c.groups
            .iter()
            .map(classes)
            .any(|found| found.iter().any(|class| *class != found[0]))
    });
    for is_trained in [false, true] {
        let what = format!("fused queries, keys and values, full fine-tune: {is_trained}");
        any(&what, &|c| {
            c.adapter.is_none() == is_trained
                && attention(c, &|a| a.projections == Projections::Fused)
        });
        let what = format!("fused gate and up, full fine-tune: {is_trained}");
        any(&what, &|c| {
            c.adapter.is_none() == is_trained && blocks(c).iter().any(BlockSpec::fuses_gate_up)
        });
    }
    any("norms on all heads at once", &|c| {
        attention(c, &|a| a.qk_norm == QkNorm::AllHeads && a.kv_heads > 1)
    });
    any("norms on outputs only", &|c| {
        blocks(c)
            .iter()
            .any(|b| [b.mixer_norms, b.feed_forward_norms] == [Norms::Post; 2])
    });
    any("logits with a factor", &|c| {
        c.base.config.spec.logit_factor != 1.0
    });
    for has_norm in [false, true] {
        let what = format!("outputs with a factor, normed: {has_norm}");
        any(&what, &|c| {
            blocks(c)
                .iter()
                .any(|b| b.output_factor != 1.0 && b.mixer_norms.has_post() == has_norm)
        });
    }
    any("several completions of one prompt", &|c| {
        c.groups.iter().any(|g| g.completions.len() > 1)
    });
    any("a prompt that two items share", &|c| {
        c.groups.len() > 1 && c.groups.last().unwrap().prompt == c.groups[0].prompt
    });
    any("more than a block of queries", &|c| {
        c.groups[0].prompt.len() > 64
    });
}

/// Compares the reference itself with transformers.
#[test]
fn the_reference_is_transformers() {
    let expected = json("logps.json");
    for name in crate::support::MODELS {
        let (policy, tokenizer) = tiny(name);
        let model = ReferenceModel::new(&policy);
        let rows = rows("pairs.jsonl");
        for (row, pair) in rows.iter().zip(encode(&rows, &tokenizer, 256)) {
            let of_row = &expected[name][row.id.as_deref().unwrap()];
            let rejected_prompt = pair.rejected_prompt.as_ref().unwrap_or(&pair.prompt);
            let sides = [
                ("chosen", &pair.prompt, &pair.chosen),
                ("rejected", rejected_prompt, &pair.rejected),
            ];
            for (side, prompt, completion) in sides {
                let got = model.log_probs(prompt, completion);
                let want = numbers(&of_row[side]["policy"]["logps"]);
                assert_eq!(got.len(), want.len(), "{name} {side}");
                for (got, want) in got.iter().zip(want) {
                    assert_close(&format!("{name} {side}"), *got, want, 1e-5, 0.1);
                }
            }
        }
    }
}
