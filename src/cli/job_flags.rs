//! The flags of `bradley train` that set fields of the job. [`JOB_FLAGS`] has one for each field,
//! with the texts of the help.

use std::collections::{BTreeMap, BTreeSet};

use clap::{Arg, ArgAction, ArgMatches, Args};
use serde_json::{Map, Number, Value, json};

use crate::domain::dpo::LossType;
use crate::domain::logged::LoggedCheck;
use crate::domain::training::{ALL_LINEAR, FUSED_TARGET_MODULES, TARGET_MODULES};

/// Maximum number of jobs of a sweep.
pub const MAX_SWEEP: usize = 64;

/// Fields that only the server sets. A job file may have them, because `jobs get` prints them.
pub const OUTPUT_ONLY: [&str; 16] = [
    "name",
    "uid",
    "etag",
    "state",
    "error",
    "progress",
    "create_time",
    "start_time",
    "end_time",
    "latest_metrics",
    "skipped_rows",
    "owner",
    "pins",
    "replica",
    "replica_time",
    "last_event_time",
];

/// Value of `--reference` for a job without a reference.
const NO_REFERENCE: &str = "none";

const DATA: &str = "Data";
const MODEL: &str = "Model";
const OBJECTIVE: &str = "Objective";
const LORA: &str = "LoRA";
const OPTIMIZER: &str = "Optimizer";
const RUN: &str = "Run";

const U32: FlagKind = FlagKind::Whole(u32::MAX as u64);
const U64: FlagKind = FlagKind::Whole(u64::MAX);

/// A flag that sets one field of the job.
#[derive(Clone, Copy, Debug)]
pub struct JobFlag {
    /// Name of the flag without its dashes.
    pub name: &'static str,
    /// Path of the field in TrainingJob, such as `dpo.beta`.
    pub field: &'static str,
    /// Heading in the help.
    group: &'static str,
    /// Form of the value.
    pub kind: FlagKind,
    /// Default, as the help shows it. Empty if the flag has none, or if the help's sentence says
    /// what happens without the flag.
    default: &'static str,
    help: &'static str,
    /// Fields of a job file that contradict or override this one, and are removed.
    replaces: &'static [&'static str],
}

/// Form of a flag's value.
#[derive(Clone, Copy, Debug)]
pub enum FlagKind {
    /// A number.
    Number,
    /// A whole number up to this one, at least 0.
    Whole(u64),
    /// A whole number, which may be negative.
    Signed,
    /// True if the flag is given. `--flag=false` overrides a job file.
    Switch,
    /// Sets a message without values, which stands for its defaults.
    Message,
    /// A switch between the two values of RowPolicy.
    RowPolicy,
    /// A text.
    Text,
    /// The name of a policy or reference.
    Policy,
    /// One of these texts.
    Choice(fn() -> Vec<&'static str>),
    /// Texts from this list, separated by commas.
    Names(fn() -> Vec<&'static str>),
    /// Losses with weights and label smoothing.
    Losses,
    /// `KEY=VALUE`, several times.
    Labels,
    /// A time with its unit.
    Time,
    /// A JSON object, which is sent as text.
    Json,
}

const fn flag(
    name: &'static str,
    field: &'static str,
    group: &'static str,
    kind: FlagKind,
    default: &'static str,
    help: &'static str,
) -> JobFlag {
    JobFlag {
        name,
        field,
        group,
        kind,
        default,
        help,
        replaces: &[],
    }
}

impl JobFlag {
    const fn replacing(mut self, fields: &'static [&'static str]) -> Self {
        self.replaces = fields;
        self
    }
}

fn losses() -> Vec<&'static str> {
    LossType::ALL.iter().map(|loss| loss.name()).collect()
}

fn divergences() -> Vec<&'static str> {
    vec![
        "reverse_kl",
        "forward_kl",
        "js_divergence",
        "alpha_divergence",
    ]
}

fn schedules() -> Vec<&'static str> {
    vec![
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_floor",
    ]
}

fn target_modules() -> Vec<&'static str> {
    let names = TARGET_MODULES.iter().chain(&FUSED_TARGET_MODULES).copied();
    std::iter::once(ALL_LINEAR).chain(names).collect()
}

fn truncation_modes() -> Vec<&'static str> {
    vec!["keep_start", "keep_end"]
}

fn auto_on_or_off() -> Vec<&'static str> {
    vec!["auto", "on", "off"]
}

fn metrics() -> Vec<&'static str> {
    vec![
        "eval_loss",
        "eval_rewards/accuracies",
        "eval_rewards/margins",
    ]
}

fn logged_checks() -> Vec<&'static str> {
    [LoggedCheck::Fail, LoggedCheck::Warn]
        .map(LoggedCheck::name)
        .to_vec()
}

fn precisions() -> Vec<&'static str> {
    vec!["f32", "bf16"]
}

/// Every flag that sets a field of the job, in the order of the help.
pub const JOB_FLAGS: &[JobFlag] = &[
    flag(
        "dataset",
        "dataset",
        DATA,
        FlagKind::Text,
        "",
        "A dataset that is already on the server, in place of --data: datasets/ID, ID, the \
         beginning of an ID, or @last.",
    ),
    flag(
        "eval-dataset",
        "eval_dataset",
        DATA,
        FlagKind::Text,
        "",
        "A dataset on the server to evaluate on, in place of --eval-data.",
    )
    .replacing(&["eval_fraction"]),
    flag(
        "eval-fraction",
        "eval_fraction",
        DATA,
        FlagKind::Number,
        "",
        "Share of the pairs, between 0 and 1, that is set aside to evaluate on. Without an \
         evaluation there is no best checkpoint.",
    )
    .replacing(&["eval_dataset"]),
    flag(
        "max-length",
        "batch.max_length",
        DATA,
        U32,
        "1024",
        "Maximum number of tokens of prompt + answer. Longer pairs are cut; memory and time grow \
         with it.",
    ),
    flag(
        "truncation-mode",
        "batch.truncation_mode",
        DATA,
        FlagKind::Choice(truncation_modes),
        "keep_start",
        "Part of a pair that is kept if the pair is too long: its start or its end.",
    ),
    flag(
        "shuffle",
        "batch.shuffle",
        DATA,
        FlagKind::Switch,
        "true",
        "Visit the pairs in a new random order in each epoch; --shuffle=false uses the file's \
         order.",
    ),
    flag(
        "template-args",
        "chat_template_kwargs_json",
        DATA,
        FlagKind::Json,
        "",
        "Variables for the chat template, as a JSON object: {\"enable_thinking\": false}. A row's \
         own chat_template_kwargs override them.",
    )
    .replacing(&["chat_template_kwargs"]),
    flag(
        "skip-bad-rows",
        "row_policy",
        DATA,
        FlagKind::RowPolicy,
        "false",
        "Leave out rows that fail validation and train on the others. Without it, a job with \
         a bad row is refused.",
    ),
    flag(
        "policy",
        "policy",
        MODEL,
        FlagKind::Policy,
        "",
        "The model to train: a base model's name, a job (its latest checkpoint), or \
         JOB/checkpoints/STEP. Without it, the server's only model.",
    ),
    flag(
        "reference",
        "reference",
        MODEL,
        FlagKind::Policy,
        "",
        "The frozen model that rewards are measured against, named as the policy is. Without it, \
         the policy's weights at the start. `logged` uses the log-probs in the rows' columns \
         ref_chosen_logps and ref_rejected_logps. `none` trains without one, as with \
         --reference-free.",
    )
    .replacing(&["dpo.reference_free"]),
    flag(
        "logged-check",
        "logged_check",
        MODEL,
        FlagKind::Choice(logged_checks),
        "fail",
        "With --reference logged: what happens if the log-probs of a sampled row are not those of \
         the policy's weights at the start.",
    ),
    flag(
        "full",
        "full",
        MODEL,
        FlagKind::Message,
        "false",
        "Train every weight in place of a LoRA adapter. It needs about four times the memory, and \
         on the host of a GPU about eight times (docs/sizing.md).",
    )
    .replacing(&["lora"]),
    flag(
        "precision",
        "precision",
        MODEL,
        FlagKind::Choice(precisions),
        "",
        "Precision of matrix multiplications; sums are f32 in both. Without it, the server's own.",
    ),
    flag(
        "loss",
        "dpo.losses",
        OBJECTIVE,
        FlagKind::Losses,
        "sigmoid",
        "The loss, or a mix with weights such as sigmoid=0.8,sft=0.2. NAME=WEIGHT:EPSILON gives a \
         term label smoothing of its own. Give the flag again for a sweep over losses.",
    ),
    flag(
        "beta",
        "dpo.beta",
        OBJECTIVE,
        FlagKind::Number,
        "0.1",
        "β, above 0: how strongly the policy is held to the reference. Smaller values let it move \
         further.",
    ),
    flag(
        "label-smoothing",
        "dpo.label_smoothing",
        OBJECTIVE,
        FlagKind::Number,
        "0",
        "Share ε of labels that are assumed to be wrong, at least 0 and below 0.5. It makes noisy \
         preferences less harmful. It is refused if no loss of the mix uses it.",
    ),
    flag(
        "f-divergence",
        "dpo.f_divergence",
        OBJECTIVE,
        FlagKind::Choice(divergences),
        "reverse_kl",
        "The divergence that holds the policy to the reference. Others than reverse_kl allow more \
         diverse answers; only some losses are defined for them.",
    ),
    flag(
        "f-alpha",
        "dpo.f_alpha",
        OBJECTIVE,
        FlagKind::Number,
        "0.5",
        "α of --f-divergence alpha_divergence, not 1.",
    ),
    flag(
        "discopop-tau",
        "dpo.discopop_tau",
        OBJECTIVE,
        FlagKind::Number,
        "0.05",
        "Temperature τ of the loss discopop, above 0.",
    ),
    flag(
        "rpo-alpha",
        "dpo.rpo_alpha",
        OBJECTIVE,
        FlagKind::Number,
        "",
        "RPO: adds this weight times the chosen answer's negative log-likelihood, which stops its \
         probability from falling. Off without it.",
    ),
    flag(
        "dpop-lambda",
        "dpo.dpop_lambda",
        OBJECTIVE,
        FlagKind::Number,
        "0",
        "DPOP: the penalty λ if the chosen answer becomes less likely than under the reference. \
         For pairs that differ in a few tokens; with the loss sigmoid only.",
    ),
    flag(
        "simpo-gamma",
        "dpo.simpo_gamma",
        OBJECTIVE,
        FlagKind::Number,
        "0.5",
        "Margin γ by which the loss simpo wants the chosen answer ahead.",
    ),
    flag(
        "orpo-lambda",
        "dpo.orpo_lambda",
        OBJECTIVE,
        FlagKind::Number,
        "0.1",
        "Weight λ of the odds-ratio term of the loss orpo.",
    ),
    flag(
        "use-weighting",
        "dpo.use_weighting",
        OBJECTIVE,
        FlagKind::Switch,
        "false",
        "WPO: weighs each pair by the policy's probability of its answers, so that data of \
         another model counts as if it were the policy's own.",
    ),
    flag(
        "ld-alpha",
        "dpo.ld_alpha",
        OBJECTIVE,
        FlagKind::Number,
        "",
        "LD-DPO: weight in [0, 1] of the tokens beyond the shorter answer's length. Below 1, long \
         answers win less by their length alone. Off without it.",
    ),
    flag(
        "reference-free",
        "dpo.reference_free",
        OBJECTIVE,
        FlagKind::Switch,
        "false",
        "Train without a reference: rewards are β times the policy's own log-probs.",
    )
    .replacing(&["reference"]),
    flag(
        "reference-sync",
        "dpo.reference_sync",
        OBJECTIVE,
        FlagKind::Message,
        "false",
        "TR-DPO: moves the reference towards the policy while it trains. With --full only.",
    ),
    flag(
        "reference-sync-alpha",
        "dpo.reference_sync.alpha",
        OBJECTIVE,
        FlagKind::Number,
        "0.6",
        "TR-DPO: share of the policy in the new reference, above 0 and at most 1.",
    ),
    flag(
        "reference-sync-every-steps",
        "dpo.reference_sync.every_steps",
        OBJECTIVE,
        U32,
        "512",
        "TR-DPO: optimizer steps between two moves of the reference.",
    ),
    flag(
        "rank",
        "lora.rank",
        LORA,
        U32,
        "16",
        "Rank of the adapter, 1 to 1024: its size, and how much it can learn.",
    )
    .replacing(&["full"]),
    flag(
        "alpha",
        "lora.alpha",
        LORA,
        FlagKind::Number,
        "2 × rank",
        "LoRA's α: the adapter is scaled by α/rank.",
    )
    .replacing(&["full"]),
    flag(
        "target-modules",
        "lora.target_modules",
        LORA,
        FlagKind::Names(target_modules),
        "all-linear",
        "Linear layers that get an adapter, separated by commas, with their names in PEFT.",
    )
    .replacing(&["full"]),
    flag(
        "use-rslora",
        "lora.use_rslora",
        LORA,
        FlagKind::Switch,
        "false",
        "rsLoRA: scales by α/√rank, which keeps large ranks effective.",
    )
    .replacing(&["full"]),
    flag(
        "init-adapter",
        "lora.init_adapter",
        LORA,
        FlagKind::Text,
        "",
        "A PEFT adapter to start from: a folder below the server's adapter_dir. The job takes over \
         its rank, α and target modules.",
    )
    .replacing(&["full"]),
    flag(
        "learning-rate",
        "optimizer.learning_rate",
        OPTIMIZER,
        FlagKind::Number,
        "1e-4 for LoRA, 1e-6 with --full",
        "The peak learning rate, above 0. The setting to try first if training is slow or \
         unstable.",
    ),
    flag(
        "schedule",
        "optimizer.lr_scheduler_type",
        OPTIMIZER,
        FlagKind::Choice(schedules),
        "linear",
        "The learning rate's course after the warm-up.",
    ),
    flag(
        "warmup-steps",
        "optimizer.warmup_steps",
        OPTIMIZER,
        U32,
        "0",
        "Steps in which the learning rate rises to its peak. Overrides --warmup-ratio. Not with \
         --schedule constant.",
    ),
    flag(
        "warmup-ratio",
        "optimizer.warmup_ratio",
        OPTIMIZER,
        FlagKind::Number,
        "0",
        "The same as a share of all steps, at least 0 and below 1. Not with --schedule constant.",
    )
    .replacing(&["optimizer.warmup_steps"]),
    flag(
        "min-lr-ratio",
        "optimizer.min_lr_ratio",
        OPTIMIZER,
        FlagKind::Number,
        "0.1",
        "The floor of --schedule cosine_with_floor as a share of the peak.",
    ),
    flag(
        "weight-decay",
        "optimizer.weight_decay",
        OPTIMIZER,
        FlagKind::Number,
        "0",
        "Decoupled weight decay of matrices, which pulls them towards 0.",
    ),
    flag(
        "max-grad-norm",
        "optimizer.max_grad_norm",
        OPTIMIZER,
        FlagKind::Number,
        "1",
        "Larger gradients are scaled down to this norm; 0 turns clipping off.",
    ),
    flag(
        "adam-beta1",
        "optimizer.adam_beta1",
        OPTIMIZER,
        FlagKind::Number,
        "0.9",
        "Decay of AdamW's mean of gradients, at least 0 and below 1.",
    ),
    flag(
        "adam-beta2",
        "optimizer.adam_beta2",
        OPTIMIZER,
        FlagKind::Number,
        "0.999",
        "Decay of AdamW's mean of squared gradients, at least 0 and below 1.",
    ),
    flag(
        "adam-epsilon",
        "optimizer.adam_epsilon",
        OPTIMIZER,
        FlagKind::Number,
        "1e-8",
        "Term in the denominator of AdamW's update that stops it from exploding.",
    ),
    flag(
        "batch-size",
        "batch.batch_size",
        OPTIMIZER,
        U32,
        "8",
        "Pairs in a micro-batch. Once these have --row-tokens tokens in all, more pairs need no \
         more memory, except with the losses aot and aot_unpaired.",
    ),
    flag(
        "gradient-accumulation-steps",
        "batch.gradient_accumulation_steps",
        OPTIMIZER,
        U32,
        "1",
        "Micro-batches in an optimizer step. A step has this number times --batch-size pairs, \
         without more memory.",
    ),
    flag(
        "epochs",
        "batch.epochs",
        RUN,
        FlagKind::Number,
        "3",
        "Passes over the pairs; may be fractional.",
    )
    .replacing(&["batch.max_steps"]),
    flag(
        "max-steps",
        "batch.max_steps",
        RUN,
        U64,
        "",
        "Number of optimizer steps. Overrides --epochs.",
    ),
    flag(
        "seed",
        "seed",
        RUN,
        U64,
        "42",
        "Seed of the shuffle, the evaluation split and the adapter's first weights. Runs with the \
         same seed, data and settings are equal.",
    ),
    flag(
        "save-steps",
        "run.save_steps",
        RUN,
        U32,
        "0",
        "Steps between checkpoints; 0 for none in between. The final one and each new best one are \
         always written.",
    ),
    flag(
        "save-total-limit",
        "run.save_total_limit",
        RUN,
        U32,
        "3",
        "Number of newest checkpoints that are stored, besides the best one.",
    ),
    flag(
        "eval-steps",
        "run.eval_steps",
        RUN,
        U32,
        "0",
        "Steps between evaluations; 0 for one at the end.",
    ),
    flag(
        "eval-on-start",
        "run.eval_on_start",
        RUN,
        FlagKind::Switch,
        "false",
        "Evaluate before the first step, too, to have a number to compare with.",
    ),
    flag(
        "logging-steps",
        "run.logging_steps",
        RUN,
        U32,
        "1",
        "Steps between two events with metrics.",
    ),
    flag(
        "early-stopping-patience",
        "run.early_stopping_patience",
        RUN,
        U32,
        "0",
        "Evaluations without improvement after which the job ends early; 0 turns this off. Set \
         --eval-steps, too: without it the job never ends early.",
    ),
    flag(
        "metric-for-best",
        "run.metric_for_best",
        RUN,
        FlagKind::Choice(metrics),
        "eval_loss",
        "The metric by which the best checkpoint is chosen.",
    ),
    flag(
        "row-tokens",
        "batch.row_tokens",
        RUN,
        U32,
        "1024",
        "Maximum number of tokens that are computed at once; a longer pair is computed as a whole. \
         The server lowers it if memory is short; results stay the same up to rounding.",
    ),
    flag(
        "activation-checkpointing",
        "batch.activation_checkpointing",
        RUN,
        FlagKind::Choice(auto_on_or_off),
        "auto",
        "Computes activations a second time in place of storing them, which saves memory and costs \
         time. auto does so if memory requires it.",
    ),
    flag(
        "title",
        "display_name",
        RUN,
        FlagKind::Text,
        "",
        "A title for the job, for people.",
    ),
    flag(
        "label",
        "labels",
        RUN,
        FlagKind::Labels,
        "",
        "A label as KEY=VALUE, to find the job again; may be given several times.",
    ),
    flag(
        "priority",
        "priority",
        RUN,
        FlagKind::Signed,
        "0",
        "-1000 to 1000. A job of a higher priority runs first and preempts running ones of a \
         lower.",
    ),
    flag(
        "ttl",
        "ttl",
        RUN,
        FlagKind::Time,
        "",
        "Time that the job, its events and its checkpoints are stored after its end: 90s, 12h, 7d. \
         Without it, until the job is deleted.",
    ),
];

/// Returns the flag with this name.
pub fn job_flag(name: &str) -> Option<&'static JobFlag> {
    JOB_FLAGS.iter().find(|flag| flag.name == name)
}

impl JobFlag {
    /// Returns true if several values of the flag make several jobs.
    pub fn sweeps(&self) -> bool {
        matches!(
            self.kind,
            FlagKind::Number
                | FlagKind::Whole(_)
                | FlagKind::Signed
                | FlagKind::Choice(_)
                | FlagKind::Losses
                | FlagKind::Policy
        )
    }

    fn values(&self) -> Vec<&'static str> {
        match self.kind {
            FlagKind::Choice(values) | FlagKind::Names(values) => values(),
            FlagKind::Losses => losses(),
            _ => Vec::new(),
        }
    }

    /// Returns the help: the sentence, the default and the possible values.
    pub fn help(&self) -> String {
        let mut text = self.help.to_owned();
        if !self.default.is_empty() {
            text += &format!(" [default: {}]", self.default);
        }
        let values = self.values();
        if !values.is_empty() {
            text += &format!(" [possible values: {}]", values.join(", "));
        }
        text
    }

    fn argument(&self) -> Arg {
        let arg = Arg::new(self.name)
            .long(self.name)
            .help_heading(self.group)
            .help(self.help());
        let value_name = match self.kind {
            FlagKind::Number => "NUMBER",
            FlagKind::Whole(_) | FlagKind::Signed => "N",
            FlagKind::Choice(_) => "VALUE",
            FlagKind::Names(_) => "NAMES",
            FlagKind::Losses => "LOSSES",
            FlagKind::Labels => "KEY=VALUE",
            FlagKind::Time => "TIME",
            FlagKind::Json => "JSON",
            FlagKind::Policy => "MODEL",
            FlagKind::Text => "TEXT",
            FlagKind::Switch | FlagKind::Message | FlagKind::RowPolicy => {
                return arg
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("true")
                    .value_parser(["true", "false"])
                    .hide_possible_values(true)
                    .value_name("false");
            }
        };
        let is_repeated = self.sweeps() || matches!(self.kind, FlagKind::Labels);
        let action = match is_repeated {
            true => ArgAction::Append,
            false => ArgAction::Set,
        };
        let is_number = matches!(
            self.kind,
            FlagKind::Number | FlagKind::Whole(_) | FlagKind::Signed
        );
        let mut arg = arg
            .value_name(value_name)
            .action(action)
            .allow_negative_numbers(is_number || matches!(self.kind, FlagKind::Time));
        if is_number || matches!(self.kind, FlagKind::Choice(_)) {
            arg = arg.value_delimiter(',');
        }
        match self.name {
            "title" => arg.alias("name"),
            "learning-rate" => arg.alias("lr"),
            _ => arg,
        }
    }

    /// Converts one value of the flag to canonical JSON. `None` removes the field.
    fn parse(&self, text: &str) -> Result<Option<Value>, String> {
        let wrong = |expected: &str| format!("--{} is {text:?}: it must be {expected}", self.name);
        let value = match self.kind {
            FlagKind::Number => number(text.parse().map_err(|_| wrong("a number"))?),
            FlagKind::Whole(max) => {
                let n: i128 = text.parse().map_err(|_| wrong("a whole number"))?;
                let n = u64::try_from(n).ok().filter(|n| *n <= max);
                json!(n.ok_or_else(|| wrong(&format!("a whole number from 0 to {max}")))?)
            }
            FlagKind::Signed => {
                let n: i32 = text.parse().map_err(|_| wrong("a whole number"))?;
                json!(n)
            }
            FlagKind::Switch => json!(text == "true"),
            FlagKind::Message if text == "true" => json!({}),
            FlagKind::Message => return Ok(None),
            FlagKind::RowPolicy => match text {
                "true" => json!("ROW_POLICY_SKIP"),
                _ => json!("ROW_POLICY_REJECT"),
            },
            FlagKind::Text | FlagKind::Policy | FlagKind::Choice(_) => json!(text),
            FlagKind::Names(_) => names(text).into(),
            FlagKind::Losses => weighted(text).map_err(|e| format!("--{}: {e}", self.name))?,
            FlagKind::Labels => {
                let (key, value) = text.split_once('=').ok_or_else(|| wrong("KEY=VALUE"))?;
                json!({ key: value })
            }
            FlagKind::Time => {
                json!(seconds(text).ok_or_else(|| wrong("a time such as 90s, 12h or 7d"))?)
            }
            FlagKind::Json => {
                let object: Result<Map<String, Value>, _> = serde_json::from_str(text);
                object.map_err(|e| {
                    wrong(&format!(
                        "a JSON object such as {{\"enable_thinking\": false}} ({e})"
                    ))
                })?;
                json!(text)
            }
        };
        Ok(Some(value))
    }
}

/// Returns the canonical JSON of a number. JSON has no NaN and no infinities, so these are texts.
fn number(x: f64) -> Value {
    match Number::from_f64(x) {
        Some(n) => Value::Number(n),
        None if x.is_nan() => json!("NaN"),
        None if x > 0.0 => json!("Infinity"),
        None => json!("-Infinity"),
    }
}

fn names(text: &str) -> Vec<&str> {
    text.split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .collect()
}

/// Parses a loss or a mix: `sigmoid`, `sigmoid=0.8,sft=0.2` or `exo_pair=1:0.01`.
fn weighted(text: &str) -> Result<Value, String> {
    let parse = |part: &str, of: &str, what: &str| -> Result<Value, String> {
        let n: f64 = of
            .parse()
            .map_err(|_| format!("the {what} in {part:?} is not a number"))?;
        Ok(number(n))
    };
    let mut losses = Vec::new();
    for part in names(text) {
        let mut loss = Map::new();
        let (name, rest) = part.split_once('=').unwrap_or((part, ""));
        let (weight, smoothing) = rest.split_once(':').unwrap_or((rest, ""));
        loss.insert("loss_type".into(), json!(name));
        if !weight.is_empty() {
            loss.insert("weight".into(), parse(part, weight, "weight")?);
        }
        if !smoothing.is_empty() {
            let smoothing = parse(part, smoothing, "label smoothing")?;
            loss.insert("label_smoothing".into(), smoothing);
        }
        losses.push(Value::Object(loss));
    }
    Ok(losses.into())
}

/// Converts a time with its unit to the canonical JSON of a Duration: seconds, with up to nine
/// decimals.
fn seconds(text: &str) -> Option<String> {
    let unit = text.chars().last()?;
    let digits = text.strip_suffix(unit)?;
    let factor: u64 = match unit {
        's' => {
            let seconds: f64 = digits.parse().ok()?;
            return seconds.is_finite().then(|| text.to_owned());
        }
        'm' => 60,
        'h' => 3600,
        'd' => 24 * 3600,
        _ => return None,
    };
    let n: u64 = digits.parse().ok()?;
    Some(format!("{}s", n.checked_mul(factor)?))
}

/// The flags of a call, with their values.
#[derive(Clone, Debug, Default)]
pub struct JobFlags {
    given: BTreeMap<&'static str, Vec<String>>,
}

impl clap::FromArgMatches for JobFlags {
    fn from_arg_matches(m: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = BTreeMap::new();
        for flag in JOB_FLAGS {
            if let Some(values) = m.get_many::<String>(flag.name) {
                given.insert(flag.name, values.cloned().collect());
            }
        }
        Ok(JobFlags { given })
    }

    fn update_from_arg_matches(&mut self, m: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(m)?;
        Ok(())
    }
}

impl Args for JobFlags {
    fn augment_args(command: clap::Command) -> clap::Command {
        JOB_FLAGS
            .iter()
            .fold(command, |command, flag| command.arg(flag.argument()))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// One job of a call: its fields as canonical JSON, and the values in which it differs from the
/// other jobs of the sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct JobVariant {
    /// The job as canonical JSON.
    pub fields: Value,
    /// Flags that sweep, with the value of this job as it was typed. Empty without a sweep.
    pub swept: Vec<(&'static str, String)>,
}

impl JobVariant {
    /// Describes the job within its sweep: `beta=0.05 seed=1`.
    pub fn describe(&self) -> String {
        let parts: Vec<String> = self
            .swept
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        parts.join(" ")
    }
}

impl JobFlags {
    /// Adds a value of a flag, as if it had been given.
    pub fn add(&mut self, name: &'static str, value: String) {
        self.given.entry(name).or_default().push(value);
    }

    /// Returns true if the flag was given.
    pub fn has(&self, name: &str) -> bool {
        self.given.contains_key(name)
    }

    /// Returns the flag's value, the last one if it was given several times.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.given.get(name)?.last().map(String::as_str)
    }

    /// Returns the flag that sets a field, or the message that the field is a part of, if the flag
    /// was given.
    pub fn flag_of(&self, field: &str) -> Option<&'static JobFlag> {
        flag_for(field).filter(|flag| self.has(flag.name))
    }

    /// Refuses `--reference none` beside a flag that asks for a reference.
    fn refuse_none_with_a_reference(&self) -> Result<(), String> {
        let is_none = |text: &String| text == NO_REFERENCE;
        let none = self
            .given
            .get("reference")
            .is_some_and(|all| all.iter().any(is_none));
        match none && self.value("reference-free") == Some("false") {
            true => Err(format!(
                "--reference {NO_REFERENCE} and --reference-free=false contradict each other: \
                 leave one of them out"
            )),
            false => Ok(()),
        }
    }

    /// Applies the flags to `base`, a job as canonical JSON. Returns one job, or one for each
    /// combination of the values of flags with several.
    ///
    /// # Errors
    /// Returns a message that names the flag if a value cannot be read, flags contradict each
    /// other, or the sweep has more than [`MAX_SWEEP`] jobs.
    pub fn apply(&self, base: &Value) -> Result<Vec<JobVariant>, String> {
        self.refuse_lora_with_full()?;
        self.refuse_none_with_a_reference()?;
        let mut fields = base.clone();
        if !fields.is_object() {
            fields = json!({});
        }
        let flags: Vec<&JobFlag> = JOB_FLAGS.iter().filter(|f| self.has(f.name)).collect();
        for flag in &flags {
            // --full=false and --reference-free=false replace nothing.
            let is_off = flag.group != LORA
                && matches!(flag.kind, FlagKind::Message | FlagKind::Switch)
                && self.value(flag.name) == Some("false");
            for replaced in flag.replaces.iter().filter(|_| !is_off) {
                remove(&mut fields, replaced);
            }
        }
        let mut variants = vec![JobVariant {
            fields,
            swept: Vec::new(),
        }];
        for flag in flags {
            variants = self.apply_flag(flag, variants)?;
        }
        Ok(variants)
    }

    fn apply_flag(
        &self,
        flag: &'static JobFlag,
        variants: Vec<JobVariant>,
    ) -> Result<Vec<JobVariant>, String> {
        let texts = self.given.get(flag.name).map_or(&[][..], Vec::as_slice);
        if matches!(flag.kind, FlagKind::Labels) {
            let mut variants = variants;
            let mut labels = Map::new();
            for text in texts {
                let label = flag.parse(text)?.unwrap_or_default();
                for (key, value) in label.as_object().into_iter().flatten() {
                    let other = labels.insert(key.clone(), value.clone());
                    if let Some(other) = other.filter(|other| other != value) {
                        return Err(format!(
                            "--label {key} is given twice, with {other} and {value}: a label has \
                             one value"
                        ));
                    }
                }
                for variant in &mut variants {
                    add_labels(&mut variant.fields, &label);
                }
            }
            return Ok(variants);
        }
        let mut seen = BTreeSet::new();
        let distinct: Vec<&String> = texts.iter().filter(|t| seen.insert(*t)).collect();
        let jobs = variants.len() * distinct.len();
        if jobs > MAX_SWEEP {
            return Err(format!(
                "the values of the flags up to --{} make {jobs} jobs: a sweep has at most \
                 {MAX_SWEEP}; give fewer values",
                flag.name
            ));
        }
        let mut all = Vec::with_capacity(jobs);
        for variant in variants {
            for text in &distinct {
                let mut next = variant.clone();
                match flag.parse(text)? {
                    Some(_) if flag.name == "reference" && *text == NO_REFERENCE => {
                        set(&mut next.fields, "dpo.reference_free", json!(true));
                        remove(&mut next.fields, flag.field);
                    }
                    Some(value) => set(&mut next.fields, flag.field, value),
                    None => remove(&mut next.fields, flag.field),
                }
                if distinct.len() > 1 {
                    next.swept.push((flag.name, (*text).clone()));
                }
                all.push(next);
            }
        }
        Ok(all)
    }

    fn refuse_lora_with_full(&self) -> Result<(), String> {
        if self.value("full") != Some("true") {
            return Ok(());
        }
        match JOB_FLAGS
            .iter()
            .find(|f| f.group == LORA && self.has(f.name))
        {
            Some(flag) => Err(format!(
                "--{} belongs to LoRA and --full trains every weight: leave one of them out",
                flag.name
            )),
            None => Ok(()),
        }
    }
}

/// Returns the flag that sets a field, or else the one that sets the message that the field is a
/// part of. Indices such as `[0]` are ignored.
pub fn flag_for(field: &str) -> Option<&'static JobFlag> {
    let mut path: String = String::new();
    let mut is_index = false;
    for c in field.chars() {
        match c {
            '[' => is_index = true,
            ']' => is_index = false,
            c if !is_index => path.push(c),
            _ => {}
        }
    }
    loop {
        if let Some(flag) = JOB_FLAGS.iter().find(|flag| flag.field == path) {
            return Some(flag);
        }
        if path == "chat_template_kwargs" {
            return job_flag("template-args");
        }
        path.truncate(path.rfind('.')?);
    }
}

/// Returns the value of a field in a job as canonical JSON.
pub fn get<'a>(job: &'a Value, field: &str) -> Option<&'a Value> {
    field
        .split('.')
        .try_fold(job, |value, part| value.get(part))
}

/// Sets a field of a job as canonical JSON. Messages on the way are added.
pub fn set(job: &mut Value, field: &str, value: Value) {
    let (first, rest) = field.split_once('.').unwrap_or((field, ""));
    let Value::Object(fields) = job else {
        *job = json!({});
        return set(job, field, value);
    };
    let slot = fields.entry(first).or_insert(Value::Null);
    // A message that is set already keeps its parts.
    match rest {
        "" if value == json!({}) && slot.is_object() => {}
        "" => *slot = value,
        rest => set(slot, rest, value),
    }
}

/// Removes a field from a job as canonical JSON.
pub fn remove(job: &mut Value, field: &str) {
    let (parent, last) = match field.rsplit_once('.') {
        Some((parent, last)) => (Some(parent), last),
        None => (None, field),
    };
    let parent = match parent {
        Some(parent) => parent
            .split('.')
            .try_fold(job, |value, part| value.get_mut(part)),
        None => Some(job),
    };
    if let Some(Value::Object(fields)) = parent {
        fields.remove(last);
    }
}

/// Adds labels to a job as canonical JSON. They override those with the same keys.
fn add_labels(job: &mut Value, labels: &Value) {
    let mut all = get(job, "labels").cloned().unwrap_or_else(|| json!({}));
    if let (Value::Object(all), Value::Object(labels)) = (&mut all, labels) {
        all.extend(labels.clone());
    }
    set(job, "labels", all);
}
