//! Converts training jobs and their events.

use tonic::{Code, Status};

use super::{finish, identity, json, timestamp};
use crate::domain::dpo::{Divergence, DpoConfig, LossType, ReferenceSync, WeightedLoss};
use crate::domain::identity::Pins;
use crate::domain::job::{
    Evaluation, Event, EventKind, Job, JobRequest, JobState, Progress, RowPolicy,
};
use crate::domain::logged::{LOGGED_REFERENCE, LoggedCheck};
use crate::domain::names;
use crate::domain::reason::{FailureCode, StoredReason};
use crate::domain::training::{
    ActivationCheckpointing, BatchConfig, BestMetric, FUSED_TARGET_MODULES, GivenLora, LoraConfig,
    Method, OptimizerConfig, Precision, RunConfig, ScheduleKind, Seed, TARGET_MODULES,
    TrainingSpec, Truncation, Warmup,
};
use crate::domain::violation::{Violations, quoted};
use crate::rpc::pb;
use crate::rpc::status::job_error;
use crate::service::jobs::estimate::JobEstimate;
use crate::service::jobs::lifecycle::JobChanges;

/// Default peak learning rate for LoRA. The domain's default is for full fine-tuning.
const LORA_LEARNING_RATE: f64 = 1e-4;
/// Name of the divergence with the parameter `f_alpha`.
const ALPHA_DIVERGENCE: &str = "alpha_divergence";
/// Name of the schedule with a constant learning rate and no warm-up.
const CONSTANT: &str = "constant";
/// Name of the schedule with a constant learning rate after a warm-up, as in transformers'
/// get_constant_schedule_with_warmup.
const CONSTANT_WITH_WARMUP: &str = "constant_with_warmup";
/// Names of the schedule that ends at a floor: that of this API, and that of transformers.
const FLOOR_SCHEDULES: [&str; 2] = ["cosine_with_floor", "cosine_with_min_lr"];
/// Maximum number of paths in an update mask. A job has about as many fields.
const MAX_PATHS: usize = 32;
/// Maximum time to live: a hundred years.
const MAX_TTL: std::time::Duration = std::time::Duration::from_secs(100 * 366 * 24 * 3600);

// ---- requests

/// Converts a requested job. Output-only fields are ignored.
pub(in crate::rpc) fn job_request(job: pb::TrainingJob) -> Result<JobRequest, Status> {
    let mut bad = Violations::default();
    let policy = names::parse_policy(&job.policy);
    if policy.is_none() {
        bad.push(
            "training_job.policy",
            format!(
                "is {}: it must look like models/ID or trainingJobs/ID/checkpoints/STEP",
                quoted(&job.policy)
            ),
        );
    }
    let logged_reference = logged_check(&job.reference, &job.logged_check, &mut bad);
    let reference = match job.reference.as_str() {
        "" | LOGGED_REFERENCE => None,
        name => {
            let parsed = names::parse_policy(name);
            if parsed.is_none() {
                bad.push(
                    "training_job.reference",
                    format!(
                        "is {}: it must be empty, models/ID, trainingJobs/ID/checkpoints/STEP or \
                         {LOGGED_REFERENCE}",
                        quoted(name)
                    ),
                );
            }
            parsed
        }
    };
    let mut dataset = |field: &str, name: &str| match names::parse_dataset(name) {
        Some(id) => id.to_owned(),
        None => {
            bad.push(
                field,
                format!("is {}: it must look like datasets/ID", quoted(name)),
            );
            String::new()
        }
    };
    let train = dataset("training_job.dataset", &job.dataset);
    let evaluation = match &job.evaluation {
        None => Evaluation::None,
        Some(pb::training_job::Evaluation::EvalDataset(name)) => {
            Evaluation::Dataset(dataset("training_job.eval_dataset", name))
        }
        Some(pb::training_job::Evaluation::EvalFraction(f)) => Evaluation::Fraction(*f),
    };
    let row_policy = match pb::RowPolicy::try_from(job.row_policy) {
        Ok(pb::RowPolicy::Unspecified | pb::RowPolicy::Reject) => RowPolicy::Reject,
        Ok(pb::RowPolicy::Skip) => RowPolicy::Skip,
        Err(_) => {
            bad.push(
                "training_job.row_policy",
                format!("is {}: it must be REJECT (1) or SKIP (2)", job.row_policy),
            );
            RowPolicy::Reject
        }
    };
    let (method, given_lora) = match job.method {
        Some(pb::training_job::Method::Full(_)) => (Method::Full, GivenLora::default()),
        Some(pb::training_job::Method::Lora(l)) => {
            let (config, given) = lora(l, &mut bad);
            (Method::Lora(config), given)
        }
        None => (Method::Lora(LoraConfig::default()), GivenLora::default()),
    };
    let precision = match job.precision.as_str() {
        "" => None,
        name => {
            let parsed = Precision::parse(name);
            if parsed.is_none() {
                bad.push(
                    "training_job.precision",
                    format!(
                        "{} is unknown: use f32, bf16, or leave it empty for the server's",
                        quoted(name)
                    ),
                );
            }
            parsed
        }
    };
    let spec = TrainingSpec {
        dpo: dpo(job.dpo.unwrap_or_default(), &mut bad),
        optimizer: optimizer(job.optimizer.unwrap_or_default(), &method, &mut bad),
        batch: batch(job.batch.unwrap_or_default(), &mut bad),
        run: run(job.run.unwrap_or_default(), &mut bad),
        precision,
        seed: Seed(job.seed.unwrap_or(Seed::default().0)),
        method,
        logged_reference,
    };
    // The domain checks the ranges. It adds to the same list, so that one error reports both.
    spec.validate("training_job", &mut bad);
    let ttl_ms = ttl(job.ttl, &mut bad);
    let kwargs = json::kwargs(
        "training_job",
        job.chat_template_kwargs,
        &job.chat_template_kwargs_json,
    );
    let chat_template_kwargs = kwargs.unwrap_or_else(|(field, reason)| {
        bad.push(field, reason);
        serde_json::Map::new()
    });
    let Some(policy) = policy else {
        return refuse(bad);
    };
    let (display_name, labels, priority) = (job.display_name, job.labels, job.priority);
    let request = JobRequest {
        display_name,
        labels,
        priority,
        // The service sets these two when it creates the job.
        model: None,
        pins: None,
        policy,
        reference,
        dataset: train,
        evaluation,
        spec,
        given_lora,
        row_policy,
        ttl_ms,
        chat_template_kwargs,
    };
    finish(request, bad)
}

/// Converts `reference` and `logged_check` to the check of logged log-probs; `None` if the job does
/// not use any.
fn logged_check(reference: &str, check: &str, bad: &mut Violations) -> Option<LoggedCheck> {
    let field = "training_job.logged_check";
    let is_logged = reference == LOGGED_REFERENCE;
    if !is_logged && !check.is_empty() {
        let message = format!("has no meaning unless reference is {LOGGED_REFERENCE}: remove it");
        bad.push(field, message);
    }
    let parsed = match check {
        "" => LoggedCheck::default(),
        name => LoggedCheck::parse(name).unwrap_or_else(|| {
            bad.push(
                field,
                format!("is {}: it must be fail or warn", quoted(name)),
            );
            LoggedCheck::default()
        }),
    };
    is_logged.then_some(parsed)
}

/// Converts a time to live to milliseconds.
fn ttl(given: Option<prost_types::Duration>, bad: &mut Violations) -> Option<u64> {
    let ttl = given?;
    match std::time::Duration::try_from(ttl) {
        Ok(ttl) if ttl <= MAX_TTL => Some(ttl.as_millis() as u64),
        _ => {
            bad.push(
                "training_job.ttl",
                format!(
                    "is {} s: it must lie between 0 and {} s",
                    ttl.seconds,
                    MAX_TTL.as_secs()
                ),
            );
            None
        }
    }
}

/// Converts the estimated cost of a job.
pub(in crate::rpc) fn estimate(e: JobEstimate) -> pb::EstimateTrainingJobResponse {
    pb::EstimateTrainingJobResponse {
        train_pairs: e.train_pairs,
        eval_pairs: e.eval_pairs,
        skipped_rows: e.skipped_rows,
        total_steps: e.total_steps,
        tokens: e.tokens,
        longest_pair_tokens: e.longest_pair_tokens,
        memory_bytes: e.memory_bytes,
        memory_limit_bytes: e.memory_limit_bytes,
        duration: Some(duration(e.seconds)),
    }
}

fn duration(seconds: f64) -> prost_types::Duration {
    prost_types::Duration {
        seconds: seconds as i64,
        nanos: (seconds.fract() * 1e9) as i32,
    }
}

/// Returns the fields of `job` that `mask` names, or all changeable fields without a mask.
pub(in crate::rpc) fn changes(
    job: pb::TrainingJob,
    mask: Option<prost_types::FieldMask>,
) -> Result<JobChanges, Status> {
    const CHANGEABLE: [&str; 4] = ["display_name", "labels", "priority", "ttl"];
    let paths = mask
        .map(|m| m.paths)
        .filter(|p| !p.is_empty())
        .unwrap_or_else(|| CHANGEABLE.map(str::to_owned).to_vec());
    let mut bad = Violations::default();
    if !bad.at_most("update_mask.paths", paths.len(), MAX_PATHS) {
        return refuse(bad);
    }
    for (i, path) in paths
        .iter()
        .enumerate()
        .filter(|(_, p)| !CHANGEABLE.contains(&p.as_str()))
    {
        bad.push(
            format!("update_mask.paths[{i}]"),
            format!(
                "{} cannot be changed: use {}",
                quoted(path),
                CHANGEABLE.join(", ")
            ),
        );
    }
    let named = |name: &str| paths.iter().any(|p| p == name);
    let changes = JobChanges {
        display_name: named("display_name").then_some(job.display_name),
        labels: named("labels").then_some(job.labels),
        priority: named("priority").then_some(job.priority),
        ttl_ms: named("ttl").then(|| ttl(job.ttl, &mut bad)),
    };
    finish(changes, bad)
}

/// Returns the status for the collected violations. Used when there is no value to return.
fn refuse<T>(bad: Violations) -> Result<T, Status> {
    Err(crate::rpc::status::bad_request(bad))
}

fn dpo(mut c: pb::DpoConfig, bad: &mut Violations) -> DpoConfig {
    let d = DpoConfig::default();
    let mut losses = Vec::new();
    // The limit is the number of losses that exist. A longer list is refused without reading it.
    let is_within_limit = bad.at_most(
        "training_job.dpo.losses",
        c.losses.len(),
        LossType::ALL.len(),
    );
    if !is_within_limit {
        c.losses.clear();
    }
    for (i, l) in c.losses.iter().enumerate() {
        match LossType::parse(&l.loss_type) {
            Some(loss) => losses.push(WeightedLoss {
                loss,
                weight: l.weight.unwrap_or(1.0),
                label_smoothing: l.label_smoothing,
            }),
            None => {
                let known: Vec<&str> = LossType::ALL.iter().map(|l| l.name()).collect();
                bad.push(
                    format!("training_job.dpo.losses[{i}].loss_type"),
                    format!(
                        "{} is unknown: use {}",
                        quoted(&l.loss_type),
                        known.join(", ")
                    ),
                );
            }
        }
    }
    let divergence = match c.f_divergence.as_str() {
        "" | "reverse_kl" => Divergence::ReverseKl,
        "forward_kl" => Divergence::ForwardKl,
        "js_divergence" => Divergence::JensenShannon,
        ALPHA_DIVERGENCE => Divergence::Alpha {
            alpha: c.f_alpha.unwrap_or(0.5),
        },
        other => {
            let message = format!(
                "{} is unknown: use reverse_kl, forward_kl, js_divergence or alpha_divergence",
                quoted(other)
            );
            bad.push("training_job.dpo.f_divergence", message);
            Divergence::ReverseKl
        }
    };
    // If a loss is unknown, settings of single losses cannot be checked: they may belong to it.
    let all_known = is_within_limit && losses.len() == c.losses.len();
    let losses = if losses.is_empty() { d.losses } else { losses };
    if all_known {
        refuse_unused_dpo(&c, &losses, bad);
    }
    DpoConfig {
        losses,
        beta: c.beta.unwrap_or(d.beta),
        label_smoothing: c.label_smoothing.unwrap_or(d.label_smoothing),
        divergence,
        discopop_tau: c.discopop_tau.unwrap_or(d.discopop_tau),
        rpo_alpha: c.rpo_alpha,
        dpop_lambda: c.dpop_lambda.unwrap_or(d.dpop_lambda),
        simpo_gamma: c.simpo_gamma.unwrap_or(d.simpo_gamma),
        orpo_lambda: c.orpo_lambda.unwrap_or(d.orpo_lambda),
        wpo: c.use_weighting,
        ld_alpha: c.ld_alpha,
        reference_free: c.reference_free,
        reference_sync: c.reference_sync.map(|s| ReferenceSync {
            alpha: s.alpha.unwrap_or(0.6),
            every_steps: s.every_steps.unwrap_or(512),
        }),
    }
}

/// Records a violation for every setting that belongs to a loss or a divergence that the objective
/// does not have. The domain checks label smoothing.
fn refuse_unused_dpo(c: &pb::DpoConfig, losses: &[WeightedLoss], bad: &mut Violations) {
    let settings = [
        ("discopop_tau", c.discopop_tau, LossType::Discopop),
        ("simpo_gamma", c.simpo_gamma, LossType::Simpo),
        ("orpo_lambda", c.orpo_lambda, LossType::Orpo),
    ];
    for (name, given, loss) in settings {
        if given.is_some() && !losses.iter().any(|term| term.loss == loss) {
            let message = format!(
                "acts on the {0} loss only: add {0} to the losses or leave it out",
                loss.name()
            );
            bad.push(format!("training_job.dpo.{name}"), message);
        }
    }
    if c.f_alpha.is_some() && c.f_divergence != ALPHA_DIVERGENCE {
        let message =
            "acts with alpha_divergence only: set f_divergence to alpha_divergence or leave it out";
        bad.push("training_job.dpo.f_alpha", message);
    }
}

/// Records a violation for every setting that the chosen schedule does not use.
fn refuse_unused_schedule(c: &pb::OptimizerConfig, bad: &mut Violations) {
    let schedule = c.lr_scheduler_type.as_str();
    if c.min_lr_ratio.is_some() && !FLOOR_SCHEDULES.contains(&schedule) {
        let message = "acts with cosine_with_floor only: set lr_scheduler_type to \
                       cosine_with_floor or leave it out";
        bad.push("training_job.optimizer.min_lr_ratio", message);
    }
    if schedule == CONSTANT {
        let warmup = [
            ("warmup_steps", c.warmup_steps.is_some_and(|n| n > 0)),
            ("warmup_ratio", c.warmup_ratio.is_some_and(|r| r != 0.0)),
        ];
        for (name, _) in warmup.into_iter().filter(|(_, is_given)| *is_given) {
            let message = "has no effect with constant: set lr_scheduler_type to \
                           constant_with_warmup or leave it out";
            bad.push(format!("training_job.optimizer.{name}"), message);
        }
    }
}

fn optimizer(c: pb::OptimizerConfig, method: &Method, bad: &mut Violations) -> OptimizerConfig {
    let d = OptimizerConfig::default();
    let default_rate = if matches!(method, Method::Lora(_)) {
        LORA_LEARNING_RATE
    } else {
        d.learning_rate
    };
    refuse_unused_schedule(&c, bad);
    let schedule = match c.lr_scheduler_type.as_str() {
        "" | "linear" => ScheduleKind::Linear,
        // The two differ only in whether a warm-up is allowed.
        CONSTANT | CONSTANT_WITH_WARMUP => ScheduleKind::Constant,
        "cosine" => ScheduleKind::Cosine,
        name if FLOOR_SCHEDULES.contains(&name) => ScheduleKind::CosineWithFloor {
            min_ratio: c.min_lr_ratio.unwrap_or(0.1),
        },
        other => {
            let message = format!(
                "{} is unknown: use constant, constant_with_warmup, linear, cosine or \
                 cosine_with_floor",
                quoted(other)
            );
            bad.push("training_job.optimizer.lr_scheduler_type", message);
            d.schedule
        }
    };
    OptimizerConfig {
        learning_rate: c.learning_rate.unwrap_or(default_rate),
        adam_beta1: c.adam_beta1.unwrap_or(d.adam_beta1),
        adam_beta2: c.adam_beta2.unwrap_or(d.adam_beta2),
        adam_epsilon: c.adam_epsilon.unwrap_or(d.adam_epsilon),
        weight_decay: c.weight_decay.unwrap_or(d.weight_decay),
        max_grad_norm: c.max_grad_norm.unwrap_or(d.max_grad_norm),
        schedule,
        warmup: match (c.warmup_steps, c.warmup_ratio) {
            (Some(n), _) => Warmup::Steps(n.into()),
            (None, Some(r)) => Warmup::Ratio(r),
            (None, None) => d.warmup,
        },
    }
}

/// Converts LoRA settings: with defaults, and as the client gave them.
fn lora(mut c: pb::LoraConfig, bad: &mut Violations) -> (LoraConfig, GivenLora) {
    let d = LoraConfig::default();
    if !bad.at_most(
        "training_job.lora.target_modules",
        c.target_modules.len(),
        TARGET_MODULES.len() + FUSED_TARGET_MODULES.len(),
    ) {
        c.target_modules.clear();
    }
    let given = GivenLora {
        rank: c.rank.map(|r| r as usize),
        alpha: c.alpha,
        target_modules: (!c.target_modules.is_empty())
            .then(|| LoraConfig::named_targets(c.target_modules)),
        use_rslora: c.use_rslora.then_some(true),
    };
    let rank = given.rank.unwrap_or(d.rank);
    let config = LoraConfig {
        rank,
        // A rank of 0 is refused. The α that follows from it would be an error that nobody made.
        alpha: given.alpha.unwrap_or(2.0 * rank.max(1) as f64),
        target_modules: given.target_modules.clone().unwrap_or(d.target_modules),
        use_rslora: c.use_rslora,
        init_adapter: (!c.init_adapter.is_empty()).then_some(c.init_adapter),
    };
    (config, given)
}

fn batch(c: pb::BatchConfig, bad: &mut Violations) -> BatchConfig {
    let d = BatchConfig::default();
    let size = |given: Option<u32>, default: usize| given.map_or(default, |n| n as usize);
    BatchConfig {
        batch_size: size(c.batch_size, d.batch_size),
        gradient_accumulation_steps: size(
            c.gradient_accumulation_steps,
            d.gradient_accumulation_steps,
        ),
        max_length: size(c.max_length, d.max_length),
        truncation: match c.truncation_mode.as_str() {
            "" | "keep_start" => Truncation::KeepStart,
            "keep_end" => Truncation::KeepEnd,
            other => {
                bad.push(
                    "training_job.batch.truncation_mode",
                    format!("{} is unknown: use keep_start or keep_end", quoted(other)),
                );
                d.truncation
            }
        },
        epochs: c.epochs.unwrap_or(d.epochs),
        max_steps: c.max_steps,
        shuffle: c.shuffle.unwrap_or(d.shuffle),
        row_tokens: size(c.row_tokens, d.row_tokens),
        activation_checkpointing: match c.activation_checkpointing.as_str() {
            "" | "auto" => ActivationCheckpointing::Auto,
            "on" => ActivationCheckpointing::On,
            "off" => ActivationCheckpointing::Off,
            other => {
                bad.push(
                    "training_job.batch.activation_checkpointing",
                    format!("{} is unknown: use auto, on or off", quoted(other)),
                );
                d.activation_checkpointing
            }
        },
    }
}

fn run(c: pb::RunConfig, bad: &mut Violations) -> RunConfig {
    let d = RunConfig::default();
    let metric_for_best = match c.metric_for_best.as_str() {
        "" => d.metric_for_best,
        name => BestMetric::parse(name).unwrap_or_else(|| {
            let message = format!(
                "{} is unknown: use eval_loss, eval_rewards/accuracies or eval_rewards/margins",
                quoted(name)
            );
            bad.push("training_job.run.metric_for_best", message);
            d.metric_for_best
        }),
    };
    RunConfig {
        save_steps: c.save_steps.map_or(d.save_steps, u64::from),
        save_total_limit: c
            .save_total_limit
            .map_or(d.save_total_limit, |n| n as usize),
        eval_steps: c.eval_steps.map_or(d.eval_steps, u64::from),
        logging_steps: c.logging_steps.map_or(d.logging_steps, u64::from),
        early_stopping_patience: c
            .early_stopping_patience
            .unwrap_or(d.early_stopping_patience),
        metric_for_best,
        eval_on_start: c.eval_on_start,
    }
}

// ---- answers

/// Converts a stored job.
pub(in crate::rpc) fn job(j: Job) -> pb::TrainingJob {
    let etag = j.etag();
    let r = j.request;
    let method = match &r.spec.method {
        Method::Lora(l) => Some(pb::training_job::Method::Lora(lora_message(l))),
        Method::Full => Some(pb::training_job::Method::Full(pb::FullConfig {})),
    };
    let (chat_template_kwargs, chat_template_kwargs_json) =
        json::kwargs_fields(r.chat_template_kwargs);
    pb::TrainingJob {
        name: if j.id.is_empty() {
            String::new()
        } else {
            format!("trainingJobs/{}", j.id)
        },
        uid: j.id,
        etag,
        display_name: r.display_name,
        labels: r.labels,
        priority: r.priority,
        state: state(j.state).into(),
        error: j
            .error
            .map(|e| job_error(code_of(&e.reason), e.reason.name(), e.message)),
        policy: r.policy.to_string(),
        reference: match r.spec.logged_reference {
            Some(_) => LOGGED_REFERENCE.to_owned(),
            None => r.reference.map(|p| p.to_string()).unwrap_or_default(),
        },
        logged_check: r
            .spec
            .logged_reference
            .map_or_else(String::new, |check| check.name().to_owned()),
        dataset: format!("datasets/{}", r.dataset),
        evaluation: match r.evaluation {
            Evaluation::None => None,
            Evaluation::Dataset(id) => Some(pb::training_job::Evaluation::EvalDataset(format!(
                "datasets/{id}"
            ))),
            Evaluation::Fraction(f) => Some(pb::training_job::Evaluation::EvalFraction(f)),
        },
        dpo: Some(dpo_message(&r.spec.dpo)),
        optimizer: Some(optimizer_message(&r.spec.optimizer)),
        method,
        batch: Some(batch_message(&r.spec.batch)),
        run: Some(run_message(&r.spec.run)),
        seed: Some(r.spec.seed.0),
        precision: r
            .spec
            .precision
            .map_or_else(String::new, |p| p.name().to_owned()),
        row_policy: match r.row_policy {
            RowPolicy::Reject => pb::RowPolicy::Reject.into(),
            RowPolicy::Skip => pb::RowPolicy::Skip.into(),
        },
        progress: Some(progress(j.progress)),
        create_time: Some(timestamp(j.create_time)),
        start_time: j.start_time.map(timestamp),
        end_time: j.end_time.map(timestamp),
        latest_metrics: j.latest_metrics,
        skipped_rows: j.skipped_rows,
        owner: j.owner,
        pins: r.pins.map(pins),
        chat_template_kwargs,
        chat_template_kwargs_json,
        ttl: r.ttl_ms.map(|ms| prost_types::Duration {
            seconds: (ms / 1000) as i64,
            nanos: (ms % 1000) as i32 * 1_000_000,
        }),
        last_event_time: j
            .worker
            .as_ref()
            .and_then(|worker| worker.last_event_time)
            .map(timestamp),
        replica_time: j
            .worker
            .as_ref()
            .map(|worker| timestamp(worker.lease_renewed)),
        replica: j.worker.map(|worker| worker.replica).unwrap_or_default(),
    }
}

fn pins(pins: Pins) -> pb::JobPins {
    let contents = pins.contents.unwrap_or_default();
    pb::JobPins {
        base: Some(identity(pins.base)),
        init_adapter: pins.init_adapter.unwrap_or_default(),
        policy: contents.policy.unwrap_or_default(),
        reference: contents.reference.unwrap_or_default(),
        dataset: contents.dataset,
        eval_dataset: contents.eval_dataset.unwrap_or_default(),
    }
}

/// Returns the google.rpc code of a job's error.
fn code_of(reason: &StoredReason) -> Code {
    match reason.failure_code() {
        FailureCode::ResourceExhausted => Code::ResourceExhausted,
        FailureCode::FailedPrecondition => Code::FailedPrecondition,
        FailureCode::NotFound => Code::NotFound,
        FailureCode::Aborted => Code::Aborted,
        FailureCode::Internal => Code::Internal,
    }
}

fn dpo_message(c: &DpoConfig) -> pb::DpoConfig {
    let (f_divergence, f_alpha) = match c.divergence {
        Divergence::ReverseKl => ("reverse_kl", None),
        Divergence::ForwardKl => ("forward_kl", None),
        Divergence::JensenShannon => ("js_divergence", None),
        Divergence::Alpha { alpha } => (ALPHA_DIVERGENCE, Some(alpha)),
    };
    pb::DpoConfig {
        losses: c.losses.iter().map(weighted_loss_message).collect(),
        beta: Some(c.beta),
        label_smoothing: Some(c.label_smoothing),
        f_divergence: f_divergence.into(),
        f_alpha,
        // Settings without effect are left out: a client may use this answer as the request for
        // another job, and a request with them would be refused.
        discopop_tau: c.has_loss(LossType::Discopop).then_some(c.discopop_tau),
        rpo_alpha: c.rpo_alpha,
        dpop_lambda: Some(c.dpop_lambda),
        simpo_gamma: c.has_loss(LossType::Simpo).then_some(c.simpo_gamma),
        orpo_lambda: c.has_loss(LossType::Orpo).then_some(c.orpo_lambda),
        use_weighting: c.wpo,
        ld_alpha: c.ld_alpha,
        reference_free: c.reference_free,
        reference_sync: c.reference_sync.map(|s| pb::ReferenceSync {
            alpha: Some(s.alpha),
            every_steps: Some(s.every_steps),
        }),
    }
}

fn weighted_loss_message(term: &WeightedLoss) -> pb::WeightedLoss {
    pb::WeightedLoss {
        loss_type: term.loss.name().into(),
        weight: Some(term.weight),
        label_smoothing: term.label_smoothing,
    }
}

fn optimizer_message(c: &OptimizerConfig) -> pb::OptimizerConfig {
    let (lr_scheduler_type, min_lr_ratio) = match c.schedule {
        ScheduleKind::Constant if warms_up(c.warmup) => (CONSTANT_WITH_WARMUP, None),
        ScheduleKind::Constant => (CONSTANT, None),
        ScheduleKind::Linear => ("linear", None),
        ScheduleKind::Cosine => ("cosine", None),
        ScheduleKind::CosineWithFloor { min_ratio } => ("cosine_with_floor", Some(min_ratio)),
    };
    let (warmup_steps, warmup_ratio) = match c.warmup {
        Warmup::Steps(n) => (Some(n as u32), None),
        Warmup::Ratio(r) => (None, Some(r)),
    };
    pb::OptimizerConfig {
        learning_rate: Some(c.learning_rate),
        adam_beta1: Some(c.adam_beta1),
        adam_beta2: Some(c.adam_beta2),
        adam_epsilon: Some(c.adam_epsilon),
        weight_decay: Some(c.weight_decay),
        max_grad_norm: Some(c.max_grad_norm),
        lr_scheduler_type: lr_scheduler_type.into(),
        warmup_steps,
        warmup_ratio,
        min_lr_ratio,
    }
}

fn warms_up(warmup: Warmup) -> bool {
    match warmup {
        Warmup::Steps(n) => n > 0,
        Warmup::Ratio(r) => r > 0.0,
    }
}

fn lora_message(c: &LoraConfig) -> pb::LoraConfig {
    pb::LoraConfig {
        rank: Some(c.rank as u32),
        alpha: Some(c.alpha),
        target_modules: c.target_modules.clone(),
        use_rslora: c.use_rslora,
        init_adapter: c.init_adapter.clone().unwrap_or_default(),
    }
}

fn batch_message(c: &BatchConfig) -> pb::BatchConfig {
    pb::BatchConfig {
        batch_size: Some(c.batch_size as u32),
        gradient_accumulation_steps: Some(c.gradient_accumulation_steps as u32),
        max_length: Some(c.max_length as u32),
        truncation_mode: match c.truncation {
            Truncation::KeepStart => "keep_start".into(),
            Truncation::KeepEnd => "keep_end".into(),
        },
        epochs: Some(c.epochs),
        max_steps: c.max_steps,
        shuffle: Some(c.shuffle),
        row_tokens: Some(c.row_tokens as u32),
        activation_checkpointing: match c.activation_checkpointing {
            ActivationCheckpointing::Auto => "auto".into(),
            ActivationCheckpointing::On => "on".into(),
            ActivationCheckpointing::Off => "off".into(),
        },
    }
}

fn run_message(c: &RunConfig) -> pb::RunConfig {
    pb::RunConfig {
        save_steps: Some(c.save_steps as u32),
        save_total_limit: Some(c.save_total_limit as u32),
        eval_steps: Some(c.eval_steps as u32),
        logging_steps: Some(c.logging_steps as u32),
        early_stopping_patience: Some(c.early_stopping_patience),
        metric_for_best: c.metric_for_best.name().into(),
        eval_on_start: c.eval_on_start,
    }
}

fn progress(p: Progress) -> pb::JobProgress {
    pb::JobProgress {
        step: p.step,
        total_steps: p.total_steps,
        epoch: p.epoch,
        tokens: p.tokens,
        eta_seconds: p.eta_seconds,
    }
}

fn state(s: JobState) -> pb::JobState {
    match s {
        JobState::Queued => pb::JobState::Queued,
        JobState::Preparing => pb::JobState::Preparing,
        JobState::Running => pb::JobState::Running,
        JobState::Pausing => pb::JobState::Pausing,
        JobState::Paused => pb::JobState::Paused,
        JobState::Cancelling => pb::JobState::Cancelling,
        JobState::Cancelled => pb::JobState::Cancelled,
        JobState::Succeeded => pb::JobState::Succeeded,
        JobState::Failed => pb::JobState::Failed,
    }
}

/// Converts the states of a filter.
pub(in crate::rpc) fn states(given: &[i32]) -> Result<Vec<JobState>, Status> {
    let mut bad = Violations::default();
    let mut wanted = Vec::new();
    if !bad.at_most("states", given.len(), JobState::ALL.len()) {
        return refuse(bad);
    }
    for (i, n) in given.iter().enumerate() {
        match JobState::ALL.into_iter().find(|s| state(*s) as i32 == *n) {
            Some(s) => wanted.push(s),
            None => bad.push(
                format!("states[{i}]"),
                format!("is {n}: it must be one of JobState's values but UNSPECIFIED"),
            ),
        }
    }
    finish(wanted, bad)
}

/// Converts an event of `job`.
pub(in crate::rpc) fn event(job: &str, e: Event) -> pb::TrainingEvent {
    use pb::training_event::Event as P;
    let event = match e.kind {
        EventKind::StateChange { from, to, reason } => P::StateChange(pb::StateChange {
            from: from.map_or(pb::JobState::Unspecified, state).into(),
            to: state(to).into(),
            reason,
        }),
        EventKind::Step {
            step,
            progress: p,
            metrics,
        } => P::StepMetrics(pb::StepMetrics {
            step,
            progress: Some(progress(p)),
            metrics,
        }),
        EventKind::Eval { step, metrics } => P::EvalMetrics(pb::EvalMetrics { step, metrics }),
        EventKind::CheckpointCreated { step, best } => {
            P::CheckpointCreated(pb::CheckpointCreated {
                checkpoint: format!("trainingJobs/{job}/checkpoints/{step}"),
                step,
                best,
            })
        }
        EventKind::Log { severity, message } => P::Log(pb::LogMessage { severity, message }),
    };
    pb::TrainingEvent {
        sequence: e.sequence,
        time: Some(timestamp(e.time)),
        event: Some(event),
    }
}

#[cfg(test)]
mod tests;
