//! Settings of a training run: method, optimizer, batches, evaluation. The defaults of full
//! fine-tuning's optimizer, of batches, and of LoRA's rank and α follow TRL; others do not, e.g.
//! LoRA's targets, logging and checkpoints.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::dpo::{DpoConfig, Normalization};
use super::logged::{LOGGED_REFERENCE, LoggedCheck};
use super::violation::{Violations, quoted};

/// Projections that LoRA can adapt, in the decoder's order.
pub const TARGET_MODULES: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// Matrices that hold several projections in some families, e.g. Phi-3. LoRA adapts such a matrix
/// only as a whole.
pub const FUSED_TARGET_MODULES: [&str; 2] = ["qkv_proj", "gate_up_proj"];

/// Each of [`FUSED_TARGET_MODULES`] with the projections that it holds.
const PARTS_OF_FUSED: [(&str, &[&str]); 2] = [
    ("qkv_proj", &["q_proj", "k_proj", "v_proj"]),
    ("gate_up_proj", &["gate_proj", "up_proj"]),
];

/// PEFT's word for every linear layer of the blocks, without the output head.
pub const ALL_LINEAR: &str = "all-linear";

/// Every setting of a run except the data, fixed when the job is created.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingSpec {
    /// DPO objective.
    pub dpo: DpoConfig,
    /// AdamW and its learning-rate schedule.
    pub optimizer: OptimizerConfig,
    /// LoRA or full fine-tuning.
    pub method: Method,
    /// Batch sizes and sequence lengths.
    pub batch: BatchConfig,
    /// Checkpoints, evaluation and logging.
    pub run: RunConfig,
    /// Precision of GEMM operands; `None` means the server's default.
    pub precision: Option<Precision>,
    /// Seed of the shuffle, the evaluation split and the initial LoRA weights.
    pub seed: Seed,
    /// Set if the reference's log-probs are those in the rows, so that the run computes none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logged_reference: Option<LoggedCheck>,
}

/// Random seed; the default is 42.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed(pub u64);

impl Default for Seed {
    fn default() -> Self {
        Seed(42)
    }
}

/// Set of weights that the optimizer changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Method {
    /// Low-rank adapters on frozen base weights.
    Lora(LoraConfig),
    /// All weights of the model.
    Full,
}

impl Default for Method {
    fn default() -> Self {
        Method::Lora(LoraConfig::default())
    }
}

/// LoRA settings, named as in PEFT: ΔW = scale·B·A, with A `[r, in]` and B `[out, r]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank r.
    pub rank: usize,
    /// Numerator α of the scale.
    pub alpha: f64,
    /// Names of the adapted projections, from [`TARGET_MODULES`] and [`FUSED_TARGET_MODULES`]. The
    /// names of all parts of a fused projection together stand for it.
    pub target_modules: Vec<String>,
    /// True for rank-stabilised LoRA: scale = α/√r instead of α/r.
    pub use_rslora: bool,
    /// Name of a PEFT adapter to start from, in the server's adapter folder. The fields above then
    /// have that adapter's values.
    pub init_adapter: Option<String>,
}

/// Fields of [`LoraConfig`] that a client set. `None` means the default, or the value of the
/// adapter that the run starts from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GivenLora {
    /// Rank, if set.
    pub rank: Option<usize>,
    /// α, if set.
    pub alpha: Option<f64>,
    /// Adapted projections, if set.
    pub target_modules: Option<Vec<String>>,
    /// Rank-stabilised scaling, if set. The wire format cannot tell an explicit `false` from an
    /// absent field.
    pub use_rslora: Option<bool>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            rank: 16,
            alpha: 32.0,
            target_modules: TARGET_MODULES.iter().map(|s| s.to_string()).collect(),
            use_rslora: false,
            init_adapter: None,
        }
    }
}

impl LoraConfig {
    /// Returns the projections that a client's `target_modules` stand for. [`ALL_LINEAR`] is
    /// replaced by their names, because it is only a word for a list: adapters and stored jobs have
    /// the names.
    pub fn named_targets(given: Vec<String>) -> Vec<String> {
        if given == [ALL_LINEAR] {
            TARGET_MODULES.map(str::to_owned).to_vec()
        } else {
            given
        }
    }

    /// Returns the factor on B·A: α/r, or α/√r for rank-stabilised LoRA.
    pub fn scale(&self) -> f64 {
        let r = self.rank as f64;
        self.alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Takes over the settings of the adapter that the run continues. Records a violation for each
    /// field that the client set to another value than the adapter has. `source` names the adapter
    /// in messages.
    pub fn adopt(
        &mut self,
        adapter: &LoraConfig,
        given: &GivenLora,
        source: &str,
        field: &str,
        out: &mut Violations,
    ) {
        let mut differs = |name: &str, wanted: String, has: String| {
            let message = format!(
                "is {wanted}, but the job continues from {source}, which has {has}: leave it \
                 out or set the same value"
            );
            out.push(format!("{field}.{name}"), message);
        };
        if let Some(rank) = given.rank.filter(|rank| *rank != adapter.rank) {
            differs("rank", rank.to_string(), adapter.rank.to_string());
        }
        if let Some(alpha) = given.alpha.filter(|alpha| *alpha != adapter.alpha) {
            differs("alpha", alpha.to_string(), adapter.alpha.to_string());
        }
        let sorted = |names: &[String]| -> BTreeSet<String> {
            let parts = |name: &String| -> Vec<String> {
                match PARTS_OF_FUSED.iter().find(|(fused, _)| fused == name) {
                    Some((_, parts)) => parts.iter().map(|part| (*part).to_owned()).collect(),
                    None => vec![name.clone()],
                }
            };
            names.iter().flat_map(parts).collect()
        };
        if let Some(targets) = given
            .target_modules
            .as_ref()
            .filter(|t| sorted(t) != sorted(&adapter.target_modules))
        {
            differs(
                "target_modules",
                targets.join(", "),
                adapter.target_modules.join(", "),
            );
        }
        if let Some(use_rslora) = given.use_rslora.filter(|r| *r != adapter.use_rslora) {
            differs(
                "use_rslora",
                use_rslora.to_string(),
                adapter.use_rslora.to_string(),
            );
        }
        let init_adapter = self.init_adapter.take();
        *self = LoraConfig {
            init_adapter,
            ..adapter.clone()
        };
    }
}

/// AdamW (f32 state, decoupled weight decay) and its learning-rate schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay rate β₁ of the first moment.
    pub adam_beta1: f64,
    /// Decay rate β₂ of the second moment.
    pub adam_beta2: f64,
    /// Term ε in the denominator of the update.
    pub adam_epsilon: f64,
    /// Decoupled weight decay, applied to matrices only, as in transformers.
    pub weight_decay: f64,
    /// Maximum global gradient norm; larger gradients are scaled down. 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Shape of the learning rate after warm-up.
    pub schedule: ScheduleKind,
    /// Length of the warm-up.
    pub warmup: Warmup,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig {
            learning_rate: 1e-6,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            schedule: ScheduleKind::Linear,
            warmup: Warmup::Steps(0),
        }
    }
}

/// Shape of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ScheduleKind {
    /// Stays at the peak.
    Constant,
    /// Decreases linearly to 0.
    Linear,
    /// Follows half a cosine down to 0.
    Cosine,
    /// Follows half a cosine down to `min_ratio` of the peak.
    CosineWithFloor {
        /// Floor as a fraction of the peak, in [0, 1].
        min_ratio: f64,
    },
}

/// Length of the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// Number of optimizer steps.
    Steps(u64),
    /// Fraction of all steps, rounded up.
    Ratio(f64),
}

impl Warmup {
    /// Returns the number of warm-up steps in a run of `total` steps.
    pub fn steps(self, total: u64) -> u64 {
        match self {
            Warmup::Steps(n) => n,
            Warmup::Ratio(r) => (r * total as f64).ceil() as u64,
        }
    }
}

/// Side of prompt + completion that is cut when the sequence is longer than `max_length`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// Cut the end.
    #[default]
    KeepStart,
    /// Cut the start: the prompt's and, if the answer alone is too long, the answer's.
    KeepEnd,
}

/// Precision of GEMM operands. Sums, norms, softmax, accumulated gradients and optimizer state are
/// always f32, the loss is f64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floating point.
    #[default]
    F32,
    /// Operands rounded to bf16, accumulation in f32.
    Bf16,
}

impl Precision {
    /// Returns the precision with this name, `f32` or `bf16`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "f32" => Some(Precision::F32),
            "bf16" => Some(Precision::Bf16),
            _ => None,
        }
    }

    /// Returns `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }
}

/// Setting for recomputing block activations in the backward pass, which saves memory and costs
/// time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationCheckpointing {
    /// On if the memory estimate requires it.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// Batch sizes and sequence lengths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// Pairs per micro-batch.
    pub batch_size: usize,
    /// Micro-batches per optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Maximum number of tokens of prompt + completion.
    pub max_length: usize,
    /// Side that is cut from longer sequences.
    pub truncation: Truncation,
    /// Passes over the data; may be fractional.
    pub epochs: f64,
    /// Number of optimizer steps; overrides `epochs`.
    pub max_steps: Option<u64>,
    /// True to shuffle the rows in each epoch.
    pub shuffle: bool,
    /// Maximum number of tokens in a packed row. A longer pair gets a row of its own.
    pub row_tokens: usize,
    /// Recomputation of activations in the backward pass.
    pub activation_checkpointing: ActivationCheckpointing,
}

impl Default for BatchConfig {
    fn default() -> Self {
        BatchConfig {
            batch_size: 8,
            gradient_accumulation_steps: 1,
            max_length: 1024,
            truncation: Truncation::KeepStart,
            epochs: 3.0,
            max_steps: None,
            shuffle: true,
            row_tokens: 1024,
            activation_checkpointing: ActivationCheckpointing::Auto,
        }
    }
}

impl BatchConfig {
    /// Returns the optimizer steps in one epoch over `pairs` pairs:
    /// ⌈⌈pairs/batch⌉/accumulation⌉, at least 1.
    pub fn steps_per_epoch(&self, pairs: usize) -> u64 {
        pairs
            .div_ceil(self.batch_size)
            .div_ceil(self.gradient_accumulation_steps)
            .max(1) as u64
    }

    /// Returns the optimizer steps of the whole run, at least 1.
    pub fn total_steps(&self, pairs: usize) -> u64 {
        self.max_steps
            .unwrap_or_else(|| (self.epochs * self.steps_per_epoch(pairs) as f64).ceil() as u64)
            .max(1)
    }
}

/// Evaluation metric that selects the best checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BestMetric {
    /// `eval_loss`, lower is better.
    #[default]
    EvalLoss,
    /// Fraction of pairs in which the chosen answer has the higher reward; higher is better.
    EvalAccuracy,
    /// Mean reward margin; higher is better.
    EvalMargin,
}

impl BestMetric {
    /// Returns the metric's name in a job's settings.
    pub fn name(self) -> &'static str {
        match self {
            BestMetric::EvalLoss => "eval_loss",
            BestMetric::EvalAccuracy => "eval_rewards/accuracies",
            BestMetric::EvalMargin => "eval_rewards/margins",
        }
    }

    /// Returns the name of the evaluation metric to compare. If the objective trains rewards
    /// averaged over tokens, this is the metric of the averaged rewards.
    pub fn of(self, normalization: Normalization) -> &'static str {
        match (self, normalization) {
            (BestMetric::EvalAccuracy, Normalization::Mean) => "eval_rewards_normalized/accuracies",
            (BestMetric::EvalMargin, Normalization::Mean) => "eval_rewards_normalized/margins",
            _ => self.name(),
        }
    }

    /// Returns the metric with this name.
    pub fn parse(name: &str) -> Option<BestMetric> {
        [
            BestMetric::EvalLoss,
            BestMetric::EvalAccuracy,
            BestMetric::EvalMargin,
        ]
        .into_iter()
        .find(|m| m.name() == name)
    }

    /// Returns true if `new` is better than `old`.
    pub fn improves(self, new: f64, old: f64) -> bool {
        match self {
            BestMetric::EvalLoss => new < old,
            _ => new > old,
        }
    }
}

/// Checkpoints, evaluation and logging.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Optimizer steps between checkpoints; 0 writes none in between. The final checkpoint and each
    /// new best one are always written.
    pub save_steps: u64,
    /// Number of newest checkpoints that are not deleted, besides the best one.
    pub save_total_limit: usize,
    /// Optimizer steps between evaluations; 0 evaluates only at the end.
    pub eval_steps: u64,
    /// Optimizer steps between logged training metrics.
    pub logging_steps: u64,
    /// Number of evaluations without improvement after which the run ends early; 0 turns this off.
    pub early_stopping_patience: u32,
    /// Metric that selects the best checkpoint.
    pub metric_for_best: BestMetric,
    /// True to evaluate before the first step as well.
    pub eval_on_start: bool,
}

impl Default for RunConfig {
    fn default() -> Self {
        RunConfig {
            save_steps: 0,
            save_total_limit: 3,
            eval_steps: 0,
            logging_steps: 1,
            early_stopping_patience: 0,
            metric_for_best: BestMetric::EvalLoss,
            eval_on_start: false,
        }
    }
}

impl TrainingSpec {
    /// Records every invalid setting. `field` is the prefix of the field paths.
    pub fn validate(&self, field: &str, out: &mut Violations) {
        self.dpo.validate(&format!("{field}.dpo"), out);
        self.optimizer.validate(&format!("{field}.optimizer"), out);
        if let Method::Lora(l) = &self.method {
            l.validate(&format!("{field}.lora"), out);
            if self.dpo.reference_sync.is_some() {
                out.push(
                    format!("{field}.dpo.reference_sync"),
                    "needs full fine-tuning: with LoRA the reference is frozen",
                );
            }
        }
        if self.logged_reference.is_some() {
            self.refuse_with_logged_reference(field, out);
        }
        self.batch.validate(&format!("{field}.batch"), out);
        if self.run.logging_steps == 0 {
            out.push(
                format!("{field}.run.logging_steps"),
                "is 0: it must be at least 1",
            );
        }
        if self.run.save_total_limit == 0 {
            out.push(
                format!("{field}.run.save_total_limit"),
                "is 0: at least the newest checkpoint must be kept",
            );
        }
    }

    /// Records a violation for each setting that does not work with the logged log-probs of a
    /// reference: these are sums over whole answers, and the reference is fixed.
    fn refuse_with_logged_reference(&self, field: &str, out: &mut Violations) {
        let reference = format!("{field}.reference");
        if self.dpo.reference_free {
            out.push(
                reference,
                "has no meaning with dpo.reference_free: remove one of them",
            );
        } else if !self.dpo.needs_reference() && !self.dpo.losses.is_empty() {
            let names: Vec<&str> = self.dpo.losses.iter().map(|l| l.loss.name()).collect();
            let message = format!(
                "is {LOGGED_REFERENCE}, but {} trains without a reference: leave it empty, or add \
                 a loss that needs one",
                names.join(", ")
            );
            out.push(reference, message);
        }
        let message = if self.dpo.reference_sync.is_some() {
            Some((
                "reference_sync",
                "moves the reference, but the log-probs in the rows are those of a fixed one",
            ))
        } else if self.dpo.ld_alpha.is_some() {
            Some((
                "ld_alpha",
                "weighs tokens, but the log-probs in the rows are sums over whole answers",
            ))
        } else {
            None
        };
        if let Some((name, why)) = message {
            out.push(
                format!("{field}.dpo.{name}"),
                format!("{why}: remove it, or name a model as the reference"),
            );
        }
    }
}

impl OptimizerConfig {
    fn validate(&self, field: &str, out: &mut Violations) {
        out.positive(format!("{field}.learning_rate"), self.learning_rate);
        for (name, b) in [
            ("adam_beta1", self.adam_beta1),
            ("adam_beta2", self.adam_beta2),
        ] {
            if !(0.0..1.0).contains(&b) {
                out.push(
                    format!("{field}.{name}"),
                    format!("is {b}: it must lie in [0, 1)"),
                );
            }
        }
        out.positive(format!("{field}.adam_epsilon"), self.adam_epsilon);
        out.non_negative(format!("{field}.weight_decay"), self.weight_decay);
        out.non_negative(format!("{field}.max_grad_norm"), self.max_grad_norm);
        if let ScheduleKind::CosineWithFloor { min_ratio } = self.schedule
            && !(0.0..=1.0).contains(&min_ratio)
        {
            out.push(
                format!("{field}.min_lr_ratio"),
                format!("is {min_ratio}: it must lie in [0, 1]"),
            );
        }
        if let Warmup::Ratio(r) = self.warmup
            && !(0.0..1.0).contains(&r)
        {
            out.push(
                format!("{field}.warmup_ratio"),
                format!("is {r}: it must lie in [0, 1)"),
            );
        }
    }
}

impl LoraConfig {
    fn validate(&self, field: &str, out: &mut Violations) {
        if !(1..=1024).contains(&self.rank) {
            out.push(
                format!("{field}.rank"),
                format!("is {}: it must lie in 1..=1024", self.rank),
            );
        }
        out.positive(format!("{field}.alpha"), self.alpha);
        if self.target_modules.is_empty() {
            out.push(
                format!("{field}.target_modules"),
                "is empty: name at least one projection",
            );
        }
        let all = [&TARGET_MODULES[..], &FUSED_TARGET_MODULES[..]].concat();
        for (i, m) in self.target_modules.iter().enumerate() {
            if m == ALL_LINEAR {
                out.push(
                    format!("{field}.target_modules[{i}]"),
                    format!("is {ALL_LINEAR}, which includes the others: leave them out"),
                );
            } else if !all.contains(&m.as_str()) {
                out.push(
                    format!("{field}.target_modules[{i}]"),
                    format!(
                        "{} is not a projection of the decoder: use {ALL_LINEAR}, or some of {}",
                        quoted(m),
                        all.join(", ")
                    ),
                );
            }
        }
    }
}

impl BatchConfig {
    fn validate(&self, field: &str, out: &mut Violations) {
        for (name, v, max) in [
            ("batch_size", self.batch_size, 4096),
            (
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps,
                65536,
            ),
            ("max_length", self.max_length, 1 << 20),
            ("row_tokens", self.row_tokens, 1 << 20),
        ] {
            if v == 0 || v > max {
                out.push(
                    format!("{field}.{name}"),
                    format!("is {v}: it must lie in 1..={max}"),
                );
            }
        }
        if self.max_length == 1 {
            out.push(
                format!("{field}.max_length"),
                "is 1: a prompt token and a completion token need at least 2",
            );
        }
        if self.max_steps == Some(0) {
            out.push(
                format!("{field}.max_steps"),
                "is 0: it must be at least 1, or absent",
            );
        }
        if !(self.epochs.is_finite() && self.epochs > 0.0 && self.epochs <= 1e6) {
            out.push(
                format!("{field}.epochs"),
                format!("is {}: it must lie in (0, 1000000]", self.epochs),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_linear_stands_for_every_projection_and_only_alone() {
        let all = LoraConfig::named_targets(vec![ALL_LINEAR.into()]);
        assert_eq!(all, TARGET_MODULES);
        let some = vec!["q_proj".to_owned()];
        assert_eq!(LoraConfig::named_targets(some.clone()), some);
        let mixed = LoraConfig {
            target_modules: LoraConfig::named_targets(vec!["q_proj".into(), ALL_LINEAR.into()]),
            ..Default::default()
        };
        let mut bad = Violations::default();
        mixed.validate("lora", &mut bad);
        let [violation] = bad.listed() else {
            panic!("{:?}", bad.listed());
        };
        assert_eq!(violation.field, "lora.target_modules[1]");
    }

    #[test]
    fn a_run_has_the_values_of_the_adapter_that_it_continues() {
        let adapter = LoraConfig {
            rank: 4,
            alpha: 8.0,
            target_modules: vec!["q_proj".into(), "v_proj".into()],
            ..Default::default()
        };
        let adopt = |given: &GivenLora| {
            let (mut lora, mut bad) = (
                LoraConfig {
                    init_adapter: Some("x".into()),
                    ..Default::default()
                },
                Violations::default(),
            );
            lora.adopt(&adapter, given, "the adapter x", "lora", &mut bad);
            (
                lora,
                bad.listed()
                    .iter()
                    .map(|v| v.field.clone())
                    .collect::<Vec<_>>(),
            )
        };
        let effective = LoraConfig {
            init_adapter: Some("x".into()),
            ..adapter.clone()
        };
        assert_eq!(adopt(&GivenLora::default()), (effective.clone(), vec![]));
        let targets = |names: [&str; 2]| Some(names.map(str::to_owned).to_vec());
        let same = GivenLora {
            rank: Some(4),
            alpha: Some(8.0),
            target_modules: targets(["v_proj", "q_proj"]),
            use_rslora: None,
        };
        assert_eq!(adopt(&same), (effective, vec![]));
        let others = [
            (
                "lora.rank",
                GivenLora {
                    rank: Some(16),
                    ..Default::default()
                },
            ),
            (
                "lora.alpha",
                GivenLora {
                    alpha: Some(32.0),
                    ..Default::default()
                },
            ),
            (
                "lora.target_modules",
                GivenLora {
                    target_modules: targets(["q_proj", "k_proj"]),
                    ..Default::default()
                },
            ),
            (
                "lora.use_rslora",
                GivenLora {
                    use_rslora: Some(true),
                    ..Default::default()
                },
            ),
        ];
        for (field, given) in others {
            assert_eq!(adopt(&given).1, [field]);
        }
    }

    #[test]
    fn the_names_of_the_parts_stand_for_a_fused_projection_of_the_adapter() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let adapter = LoraConfig {
            target_modules: names(&["o_proj", "down_proj", "qkv_proj", "gate_up_proj"]),
            ..Default::default()
        };
        for (given, accepted) in [(&TARGET_MODULES[..], true), (&TARGET_MODULES[..6], false)] {
            let given = GivenLora {
                target_modules: Some(names(given)),
                ..Default::default()
            };
            let (mut lora, mut bad) = (LoraConfig::default(), Violations::default());
            lora.adopt(&adapter, &given, "the adapter x", "lora", &mut bad);
            assert_eq!(bad.listed().is_empty(), accepted);
        }
    }
}
