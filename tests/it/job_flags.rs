//! Every field of a job can be set by a flag of `bradley train` and by a job file: random jobs go
//! through both and come back unchanged, and errors speak of what the caller typed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bradley::cli::job_flags::{FlagKind, JOB_FLAGS, JobFlags, OUTPUT_ONLY, get, remove};
use bradley::domain::dpo::LossType;
use bradley::rpc::canonical::{self, FieldSelection};
use bradley::rpc::client::Client;
use bradley::rpc::pb;
use clap::{CommandFactory as _, Parser as _};
use prost::Message as _;
use prost_types::{DescriptorProto, FileDescriptorSet};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::{Value, json};

use crate::server::Server;
use crate::support::golden;

/// Number of random jobs that go through flags and YAML.
const JOBS: u64 = 400;
/// Number of random jobs that a server checks.
const CHECKED_JOBS: u64 = 40;

#[derive(clap::Parser)]
struct Train {
    #[command(flatten)]
    flags: JobFlags,
}

/// Applies flags to a job as canonical JSON, and returns the only job.
fn applied(args: &[String], base: &Value) -> Value {
    let args = std::iter::once("train".to_owned()).chain(args.iter().cloned());
    let given = Train::try_parse_from(args).unwrap();
    let mut jobs = given.flags.apply(base).unwrap();
    assert_eq!(jobs.len(), 1);
    jobs.remove(0).fields
}

// ---- every field has a flag

/// Returns the paths of all fields below a message, without those of protobuf's own types.
fn fields(set: &FileDescriptorSet, message: &str, prefix: &str) -> Vec<String> {
    let find = |name: &str| -> Option<DescriptorProto> {
        let short = name.strip_prefix(".bradley.v1.")?;
        let mut all = set.file.iter().flat_map(|f| &f.message_type);
        all.find(|m| m.name() == short).cloned()
    };
    let mut paths = Vec::new();
    for field in find(message).unwrap().field {
        let path = match prefix {
            "" => field.name().to_owned(),
            prefix => format!("{prefix}.{}", field.name()),
        };
        if OUTPUT_ONLY.contains(&path.as_str()) {
            continue;
        }
        match find(field.type_name()) {
            Some(inner) => {
                let within = fields(set, field.type_name(), &path);
                // A message without fields is set as a whole.
                match inner.field.is_empty() {
                    true => paths.push(path),
                    false => paths.extend(within),
                }
            }
            None => paths.push(path),
        }
    }
    paths
}

#[test]
fn every_field_of_a_job_has_a_flag() {
    let set = FileDescriptorSet::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
    let all = fields(&set, ".bradley.v1.TrainingJob", "");
    assert!(
        all.len() > 55,
        "only {} fields: the walk is broken",
        all.len()
    );
    // The value of --loss has a loss's name, weight and label smoothing; --template-args sets the
    // variables of the template as JSON text, which has all that a Struct can have.
    let within_a_value = [
        "dpo.losses.loss_type",
        "dpo.losses.weight",
        "dpo.losses.label_smoothing",
        "chat_template_kwargs",
    ];
    let flagged: BTreeSet<&str> = JOB_FLAGS.iter().map(|flag| flag.field).collect();
    let missing: Vec<&String> = all
        .iter()
        .filter(|path| !flagged.contains(path.as_str()))
        .filter(|path| !within_a_value.contains(&path.as_str()))
        .filter(|path| !path.starts_with("labels."))
        .collect();
    assert!(
        missing.is_empty(),
        "these fields of a job have no flag in src/cli/job_flags.rs: {missing:?}"
    );
    let whole = ["dpo.losses", "dpo.reference_sync", "labels"];
    for flag in JOB_FLAGS {
        let exists = all.iter().any(|path| path == flag.field) || whole.contains(&flag.field);
        assert!(
            exists,
            "--{} sets {}, which does not exist",
            flag.name, flag.field
        );
    }
}

#[test]
fn the_help_has_groups_defaults_and_values() {
    // Without a width, lines are not wrapped.
    let help = Train::command()
        .term_width(0)
        .render_long_help()
        .to_string();
    for part in [
        "Data:",
        "Model:",
        "Objective:",
        "LoRA:",
        "Optimizer:",
        "Run:",
        "[default: 0.1]",
        "sigmoid, hinge, ipo",
        "all-linear",
        "constant_with_warmup",
    ] {
        assert!(help.contains(part), "{part} is not in\n{help}");
    }
    let words = |flag: &bradley::cli::job_flags::JobFlag| flag.help().split_whitespace().count();
    for flag in JOB_FLAGS {
        assert!(
            words(flag) >= 5,
            "--{} says only {:?}",
            flag.name,
            flag.help()
        );
    }
}

// ---- random jobs

struct Random(ChaCha8Rng);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n as u64) as usize
    }

    fn flag(&mut self) -> bool {
        self.below(2) == 1
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Returns a number in [low, high) with all its digits.
    fn number(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * ((self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64)
    }

    fn sometimes<T>(&mut self, draw: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.flag().then(|| draw(self))
    }
}

fn random_objective(draw: &mut Random, is_full: bool) -> pb::DpoConfig {
    let loss = |draw: &mut Random, name: &str| pb::WeightedLoss {
        loss_type: name.into(),
        weight: draw.sometimes(|d| d.number(0.1, 2.0)),
        // Only some losses take it; zero is accepted by all.
        label_smoothing: draw.sometimes(|_| 0.0),
    };
    let all = [
        "sigmoid", "hinge", "ipo", "robust", "sft", "discopop", "simpo", "orpo", "apo_zero",
    ];
    let mut names: Vec<&str> = Vec::new();
    for _ in 0..draw.below(4) {
        let name = draw.pick(&all);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let losses: Vec<pb::WeightedLoss> = names.iter().map(|name| loss(draw, name)).collect();
    let has = |name: &str| names.contains(&name);
    let has_sigmoid = names.is_empty() || has("sigmoid");
    let is_smoothed = losses
        .iter()
        .any(|l| l.loss_type == "robust" && l.label_smoothing.is_none());
    let divergence = match names.is_empty() {
        true => draw.pick(&[
            "",
            "reverse_kl",
            "forward_kl",
            "js_divergence",
            "alpha_divergence",
        ]),
        false => draw.pick(&["", "reverse_kl"]),
    };
    pb::DpoConfig {
        beta: draw.sometimes(|d| d.number(0.01, 1.0)),
        label_smoothing: match is_smoothed {
            true => draw.sometimes(|d| d.number(0.0, 0.49)),
            false => draw.sometimes(|_| 0.0),
        },
        f_divergence: divergence.into(),
        f_alpha: match divergence {
            "alpha_divergence" => draw.sometimes(|d| d.number(0.1, 0.9)),
            _ => None,
        },
        discopop_tau: has("discopop").then(|| draw.number(0.01, 0.2)),
        rpo_alpha: draw.sometimes(|d| d.number(0.0, 1.0)),
        dpop_lambda: has_sigmoid.then(|| draw.number(0.0, 50.0)),
        simpo_gamma: has("simpo").then(|| draw.number(0.0, 2.0)),
        orpo_lambda: has("orpo").then(|| draw.number(0.0, 2.0)),
        use_weighting: draw.flag(),
        ld_alpha: draw.sometimes(|d| d.number(0.0, 1.0)),
        reference_free: !is_full && draw.flag(),
        reference_sync: (is_full && has_sigmoid && draw.flag()).then(|| pb::ReferenceSync {
            alpha: draw.sometimes(|d| d.number(0.1, 1.0)),
            every_steps: draw.sometimes(|d| 1 + d.below(100) as u32),
        }),
        losses,
    }
}

fn random_optimizer(draw: &mut Random) -> pb::OptimizerConfig {
    let schedule = draw.pick(&[
        "",
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_floor",
    ]);
    let warms_up = schedule != "constant";
    pb::OptimizerConfig {
        learning_rate: draw.sometimes(|d| d.number(1e-7, 1e-2)),
        adam_beta1: draw.sometimes(|d| d.number(0.0, 0.99)),
        adam_beta2: draw.sometimes(|d| d.number(0.0, 0.999)),
        adam_epsilon: draw.sometimes(|d| d.number(1e-10, 1e-6)),
        weight_decay: draw.sometimes(|d| d.number(0.0, 0.1)),
        max_grad_norm: draw.sometimes(|d| d.number(0.0, 5.0)),
        lr_scheduler_type: schedule.into(),
        warmup_steps: (warms_up && draw.flag()).then(|| draw.below(10) as u32),
        warmup_ratio: (warms_up && draw.flag()).then(|| draw.number(0.0, 0.9)),
        min_lr_ratio: (schedule == "cosine_with_floor").then(|| draw.number(0.0, 1.0)),
    }
}

fn random_lora(draw: &mut Random) -> pb::LoraConfig {
    let mut targets: Vec<String> = Vec::new();
    let all = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ];
    match draw.below(3) {
        0 => {}
        1 => targets.push("all-linear".into()),
        _ => {
            let from = draw.below(7);
            targets.extend(all[from..].iter().map(|name| (*name).to_owned()));
        }
    }
    pb::LoraConfig {
        rank: draw.sometimes(|d| 1 + d.below(8) as u32),
        alpha: draw.sometimes(|d| d.number(0.5, 64.0)),
        target_modules: targets,
        use_rslora: draw.flag(),
        init_adapter: String::new(),
    }
}

/// Draws a job that a server with the tiny model accepts.
fn random_job(draw: &mut Random, dataset: &str) -> pb::TrainingJob {
    let is_full = draw.below(3) == 0;
    let method = match is_full {
        true => pb::training_job::Method::Full(pb::FullConfig {}),
        false => pb::training_job::Method::Lora(random_lora(draw)),
    };
    let evaluation = match draw.below(3) {
        0 => None,
        1 => Some(pb::training_job::Evaluation::EvalDataset(dataset.into())),
        _ => Some(pb::training_job::Evaluation::EvalFraction(
            draw.number(0.2, 0.5),
        )),
    };
    let has_evaluation = evaluation.is_some();
    let dpo = random_objective(draw, is_full);
    let needs_reference = |l: &pb::WeightedLoss| !["sft", "simpo", "orpo"].contains(&&*l.loss_type);
    let can_be_logged = !dpo.reference_free
        && dpo.reference_sync.is_none()
        && dpo.ld_alpha.is_none()
        && (dpo.losses.is_empty() || dpo.losses.iter().any(needs_reference));
    let reference = match draw.below(3) {
        0 if !dpo.reference_free => "models/tiny",
        1 if can_be_logged => "logged",
        _ => "",
    };
    let texts = [
        "",
        "a title",
        "β = 0.1, \"quoted\"",
        "-3: yes",
        "true",
        "null",
    ];
    let label = |draw: &mut Random| {
        let key = draw.pick(&["study", "a b", "no", "1"]).to_owned();
        (key, draw.pick(&texts).to_owned())
    };
    let kwargs = [
        "",
        "{\"enable_thinking\": false}",
        "{\"b\": 1.0, \"a\": [\"x\"]}",
    ];
    let labels = (0..draw.below(3)).map(|_| label(draw)).collect();
    pb::TrainingJob {
        display_name: draw.pick(&texts).to_owned(),
        labels,
        policy: "models/tiny".into(),
        reference: reference.into(),
        logged_check: match reference {
            "logged" => draw.pick(&["", "fail", "warn"]).into(),
            _ => String::new(),
        },
        dataset: dataset.into(),
        evaluation,
        dpo: Some(dpo),
        optimizer: Some(random_optimizer(draw)),
        method: Some(method),
        batch: Some(pb::BatchConfig {
            batch_size: draw.sometimes(|d| 1 + d.below(4) as u32),
            gradient_accumulation_steps: draw.sometimes(|d| 1 + d.below(3) as u32),
            max_length: Some(64 + draw.below(64) as u32),
            truncation_mode: draw.pick(&["", "keep_start", "keep_end"]).into(),
            epochs: draw.sometimes(|d| d.number(0.5, 3.0)),
            max_steps: draw.sometimes(|d| 1 + d.below(20) as u64),
            shuffle: draw.sometimes(Random::flag),
            row_tokens: draw.sometimes(|d| 64 + d.below(512) as u32),
            activation_checkpointing: draw.pick(&["", "auto", "on", "off"]).into(),
        }),
        run: Some(pb::RunConfig {
            save_steps: draw.sometimes(|d| d.below(10) as u32),
            save_total_limit: draw.sometimes(|d| 1 + d.below(5) as u32),
            eval_steps: has_evaluation.then(|| draw.below(10) as u32),
            logging_steps: draw.sometimes(|d| 1 + d.below(5) as u32),
            early_stopping_patience: has_evaluation.then(|| draw.below(4) as u32),
            metric_for_best: draw
                .pick(&[
                    "",
                    "eval_loss",
                    "eval_rewards/accuracies",
                    "eval_rewards/margins",
                ])
                .into(),
            eval_on_start: has_evaluation && draw.flag(),
        }),
        // Above 2^53 a double is not exact.
        seed: draw.sometimes(|d| d.pick(&[0, 42, u64::MAX, (1 << 53) + 1])),
        row_policy: draw
            .pick(&[
                pb::RowPolicy::Unspecified,
                pb::RowPolicy::Reject,
                pb::RowPolicy::Skip,
            ])
            .into(),
        precision: draw.pick(&["", "f32"]).into(),
        priority: draw.pick(&[0, -1000, -7]),
        ttl: draw.sometimes(|d| prost_types::Duration {
            seconds: d.pick(&[0, 90, 604_800]),
            nanos: d.pick(&[0, 500_000_000]),
        }),
        chat_template_kwargs_json: draw.pick(&kwargs).to_owned(),
        ..Default::default()
    }
}

/// Returns the flags that set the fields of a job.
fn flags_of(job: &Value) -> Vec<String> {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut args = Vec::new();
    for flag in JOB_FLAGS {
        let Some(value) = get(job, flag.field) else {
            continue;
        };
        let name = format!("--{}", flag.name);
        match flag.kind {
            FlagKind::Switch => args.push(format!("{name}={value}")),
            FlagKind::Message => args.push(name),
            FlagKind::RowPolicy => args.push(format!("{name}={}", value == "ROW_POLICY_SKIP")),
            FlagKind::Names(_) => {
                let names: Vec<&str> = value
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|n| n.as_str().unwrap())
                    .collect();
                args.extend([name, names.join(",")]);
            }
            FlagKind::Losses => {
                let losses: Vec<String> = value
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|loss| {
                        let mut term = loss["loss_type"].as_str().unwrap().to_owned();
                        let weight = loss.get("weight").map(&text).unwrap_or_default();
                        let smoothing = loss.get("label_smoothing").map(&text);
                        if !weight.is_empty() || smoothing.is_some() {
                            term += &format!("={weight}");
                        }
                        term + &smoothing.map(|s| format!(":{s}")).unwrap_or_default()
                    })
                    .collect();
                args.extend([name, losses.join(",")]);
            }
            FlagKind::Labels => {
                for (key, value) in value.as_object().unwrap() {
                    args.extend([name.clone(), format!("{key}={}", text(value))]);
                }
            }
            _ => args.push(format!("{name}={}", text(value))),
        }
    }
    args
}

/// Removes messages without a value, which mean the same as absent ones.
fn without_empty_messages(mut job: Value) -> Value {
    for name in ["dpo", "optimizer", "lora", "batch", "run"] {
        if get(&job, name) == Some(&json!({})) {
            remove(&mut job, name);
        }
    }
    job
}

#[test]
fn random_jobs_come_back_from_flags_and_from_yaml() {
    for seed in 0..JOBS {
        let mut draw = Random(ChaCha8Rng::seed_from_u64(seed));
        let job = random_job(&mut draw, "datasets/d");
        let value = canonical::to_value(&job, FieldSelection::Set).unwrap();
        let args = flags_of(&value);
        let from_flags: pb::TrainingJob =
            canonical::from_value(applied(&args, &json!({}))).unwrap();
        let again = canonical::to_value(&from_flags, FieldSelection::Set).unwrap();
        assert_eq!(
            without_empty_messages(again),
            without_empty_messages(value),
            "seed {seed}: {args:?}"
        );
        let yaml = canonical::to_yaml(&from_flags, FieldSelection::Set).unwrap();
        let from_yaml: pb::TrainingJob = canonical::from_yaml(&yaml).unwrap();
        assert_eq!(from_yaml, from_flags, "seed {seed}:\n{yaml}");
    }
}

#[test]
fn flags_override_the_file_and_what_they_exclude() {
    let file = json!({
        "dpo": {"beta": 0.5, "ld_alpha": 0.1},
        "full": {},
        "eval_fraction": 0.1,
        "batch": {"max_steps": 7},
        "optimizer": {"warmup_steps": 3},
        "chat_template_kwargs": {"a": 1.0},
        "labels": {"a": "1", "b": "2"},
        "row_policy": "ROW_POLICY_SKIP",
    });
    let args = "--beta -1 --rank 2 --eval-dataset datasets/e --epochs 2 --warmup-ratio 0.1 \
                --template-args {} --label b=3 --skip-bad-rows=false --ttl 2h";
    let args: Vec<String> = args.split_whitespace().map(str::to_owned).collect();
    assert_eq!(
        applied(&args, &file),
        json!({
            "dpo": {"beta": -1.0, "ld_alpha": 0.1},
            "batch": {"epochs": 2.0},
            "optimizer": {"warmup_ratio": 0.1},
            "labels": {"a": "1", "b": "3"},
            "row_policy": "ROW_POLICY_REJECT",
            "eval_dataset": "datasets/e",
            "chat_template_kwargs_json": "{}",
            "lora": {"rank": 2},
            "ttl": "7200s",
        })
    );
}

// ---- the real binary

fn bradley(server: &Server, args: &[&str]) -> Output {
    Command::new(crate::support::binary())
        .args(args)
        .env("BRADLEY_SERVER", &server.address)
        .env_remove("BRADLEY_CONFIG")
        .output()
        .unwrap()
}

/// Runs a command and returns whether it succeeded, and its output.
fn say(server: &Server, args: &[&str]) -> (bool, String) {
    let out = bradley(server, args);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.success(), text(&out.stdout) + &text(&out.stderr))
}

fn succeed(server: &Server, args: &[&str]) -> String {
    let (is_success, said) = say(server, args);
    assert!(is_success, "{args:?}: {said}");
    said
}

fn refused(server: &Server, args: &[&str]) -> String {
    let (is_success, said) = say(server, args);
    assert!(!is_success, "{args:?}: {said}");
    said
}

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// Uploads the golden pairs with reference log-probs, and returns the name of the dataset.
async fn upload_with_logps(client: &Client, dir: &Path) -> String {
    let text = std::fs::read_to_string(golden("pairs.jsonl")).unwrap();
    let row = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row["ref_chosen_logps"] = json!(-1.0);
        row["ref_rejected_logps"] = json!(-2.0);
        row.to_string()
    };
    let rows: Vec<String> = text.lines().map(row).collect();
    let file = write(dir, "logged.jsonl", &rows.join("\n"));
    let metadata = pb::UploadMetadata::default();
    let uploaded = client.upload_dataset(&file, metadata, |_| {}).await;
    uploaded.unwrap().name
}

async fn datasets(server: &Server) -> Vec<pb::Dataset> {
    let client = server.client().await;
    let mut service = client.datasets();
    let page = service.list_datasets(pb::ListDatasetsRequest::default());
    page.await.unwrap().into_inner().datasets
}

async fn jobs(server: &Server) -> Vec<pb::TrainingJob> {
    let client = server.client().await;
    let mut service = client.training();
    let page = service.list_training_jobs(pb::ListTrainingJobsRequest::default());
    page.await.unwrap().into_inner().training_jobs
}

/// The answer to a job is a job file for the same job.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_accepts_random_jobs_and_their_answers_as_files() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload_with_logps(&client, dir.path()).await;
    let check = async |job: pb::TrainingJob| {
        let request = pb::CreateTrainingJobRequest {
            training_job: Some(job),
            validate_only: true,
            ..Default::default()
        };
        let answer = client.training().create_training_job(request).await;
        answer.map(tonic::Response::into_inner)
    };
    for seed in 0..CHECKED_JOBS {
        let mut draw = Random(ChaCha8Rng::seed_from_u64(seed));
        let job = random_job(&mut draw, &dataset);
        let answer = check(job.clone()).await;
        let answer = answer.unwrap_or_else(|e| panic!("seed {seed}: {e}\n{job:#?}"));
        let yaml = canonical::to_yaml(&answer, FieldSelection::Set).unwrap();
        let again: pb::TrainingJob = canonical::from_yaml(&yaml).unwrap();
        let second = check(again).await;
        let second = second.unwrap_or_else(|e| panic!("seed {seed}: {e}\n{yaml}"));
        let settings = |job: &pb::TrainingJob| {
            let mut value = canonical::to_value(job, FieldSelection::Set).unwrap();
            for name in OUTPUT_ONLY {
                remove(&mut value, name);
            }
            value
        };
        assert_eq!(settings(&answer), settings(&second), "seed {seed}");
        if seed > 2 {
            continue;
        }
        // The same by the command line.
        let file = write(dir.path(), "job.yaml", &yaml);
        let file = file.to_str().unwrap();
        let printed = succeed(&server, &["train", "-f", file, "--print-job"]);
        let printed: pb::TrainingJob = canonical::from_yaml(&printed).unwrap();
        assert_eq!(settings(&printed), settings(&answer), "seed {seed}");
        succeed(&server, &["train", "-f", file, "--validate-only"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_choice_in_the_help_is_one_that_the_server_accepts() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let dataset = upload_with_logps(&server.client().await, dir.path()).await;
    for flag in JOB_FLAGS {
        let FlagKind::Choice(values) = flag.kind else {
            continue;
        };
        let name = format!("--{}", flag.name);
        let values = values().join(",");
        let args = ["train", "--dataset", &dataset, "--max-length", "128"];
        // This flag has a meaning only beside the other one.
        let beside: &[&str] = match flag.name {
            "logged-check" => &["--reference", "logged"],
            _ => &[],
        };
        let args = [&args[..], beside, &["--validate-only", &name, &values]].concat();
        succeed(&server, &args);
    }
    let mut args = vec!["train", "--dataset", &dataset, "--max-length", "128"];
    args.push("--validate-only");
    for loss in LossType::ALL {
        let term = match loss.name() {
            "exo_pair" => "exo_pair=1:0.01",
            name => name,
        };
        args.extend(["--loss", term]);
    }
    let said = succeed(&server, &args);
    let jobs = format!("{} jobs", LossType::ALL.len());
    assert!(said.contains(&jobs), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_speak_of_flags_and_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let pairs = golden("pairs.jsonl");
    let data = ["train", "--data", pairs.to_str().unwrap()];
    let with = |more: &[&str]| refused(&server, &[&data[..], more].concat());
    let said = with(&["--beta", "-1"]);
    assert!(said.contains("error: --beta is -1: it must be"), "{said}");
    let said = with(&["--rank", "0"]);
    assert!(said.contains("--rank is 0"), "{said}");
    assert!(!said.contains("alpha"), "an error that nobody made: {said}");
    let said = with(&["--loss", "sigmoid,nonsense", "--schedule", "quadratic"]);
    for part in [
        "--loss \"nonsense\" is unknown",
        "--schedule \"quadratic\" is unknown",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    let said = with(&["--schedule", "constant", "--warmup-steps", "3"]);
    assert!(said.contains("--warmup-steps has no effect"), "{said}");
    assert!(said.contains("set --schedule to"), "{said}");
    let evaluates = [
        "--early-stopping-patience=2",
        "--eval-steps=5",
        "--eval-on-start",
    ];
    let said = with(&evaluates);
    for flag in evaluates {
        let flag = flag.split('=').next().unwrap();
        let expected = format!("{flag} needs an evaluation: set --eval-data or --eval-fraction");
        assert!(said.contains(&expected), "{expected} is not in {said}");
    }
    assert!(with(&["--rank", "many"]).contains("--rank is \"many\": it must be a whole number"));
    assert!(with(&["--full", "--rank", "3"]).contains("--rank belongs to LoRA"));

    let broken = "policy: tiny\ndpo:\n  beta: 0\n  losses:\n  - loss_type: nonsense\n";
    let file = write(dir.path(), "job.yaml", broken);
    let file = file.to_str().unwrap();
    let said = with(&["-f", file, "--learning-rate", "-2"]);
    for part in [
        "job.yaml: dpo.beta is 0",
        "job.yaml: dpo.losses[0].loss_type \"nonsense\" is unknown",
        "--learning-rate is -2",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    let mended = [
        "-f",
        file,
        "--beta",
        "0.2",
        "--loss",
        "ipo",
        "--validate-only",
    ];
    succeed(&server, &[&data[..], &mended].concat());
    let unknown = write(dir.path(), "unknown.yaml", "dpo:\n  bta: 0.1\nrank: 3\n");
    let said = with(&["-f", unknown.to_str().unwrap()]);
    for part in [
        "unknown.yaml",
        "did you mean dpo.beta?",
        "did you mean lora.rank?",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_makes_a_labelled_job_for_each_combination() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let pairs = golden("pairs.jsonl");
    let args = [
        "train",
        "--data",
        pairs.to_str().unwrap(),
        "--max-length",
        "128",
        "--max-steps",
        "1",
        "--name",
        "study",
        "--label",
        "by=me",
        "--beta",
        "0.05,0.1",
        "--seed",
        "1,2",
    ];
    let with = |more: &[&'static str]| [&args[..], more].concat();
    let said = succeed(&server, &with(&["--validate-only"]));
    assert!(
        said.contains("4 jobs") && said.contains("beta=0.1 seed=2"),
        "{said}"
    );
    assert!(jobs(&server).await.is_empty());
    let said = refused(
        &server,
        &with(&["--learning-rate", "1e-4,-1", "--validate-only"]),
    );
    assert!(
        said.contains("learning-rate=-1 seed=1: --learning-rate is -1"),
        "{said}"
    );
    assert!(refused(&server, &with(&["--watch"])).contains("--watch follows one job"));
    let many: Vec<String> = (0..17).map(|n| format!("0.{n}1")).collect();
    let many = many.join(",");
    let too_many = refused(&server, &[&args[..], &["--rpo-alpha", &many]].concat());
    assert!(too_many.contains("a sweep has at most 64"), "{too_many}");

    let said = succeed(&server, &args);
    assert!(said.contains("beta=0.05 seed=1"), "{said}");
    let made = jobs(&server).await;
    assert_eq!(made.len(), 4);
    let mut settings = BTreeSet::new();
    for job in &made {
        let label = |key: &str| job.labels[key].as_str();
        assert_eq!(label("by"), "me");
        assert_eq!(label("sweep"), made[0].labels["sweep"]);
        let listing = format!(
            "bradley jobs list --label sweep={} --server ",
            label("sweep")
        );
        assert!(said.contains(&listing), "{said}");
        assert_eq!(label("beta").parse().ok(), job.dpo.as_ref().unwrap().beta);
        assert_eq!(label("seed").parse().ok(), job.seed);
        let title = format!("study beta={} seed={}", label("beta"), label("seed"));
        assert_eq!(job.display_name, title);
        settings.insert(title);
    }
    assert_eq!(settings.len(), 4);
    assert_eq!(
        datasets(&server).await.len(),
        1,
        "the file is uploaded once"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_uploaded_once_and_not_for_a_refused_job() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let pairs = golden("pairs.jsonl");
    let train = [
        "train",
        "--data",
        pairs.to_str().unwrap(),
        "--max-steps",
        "1",
    ];
    let with = |more: &[&'static str]| [&train[..], more].concat();
    // Refused before the upload, and refused by a check that needs the data.
    refused(&server, &with(&["--beta", "-1"]));
    refused(&server, &with(&["--target-modules", "qkv_proj"]));
    let blank = "{\"prompt\": \"a\", \"chosen\": \"\", \"rejected\": \"b\"}\n\
                 {\"prompt\": \"a\", \"chosen\": \"c\", \"rejected\": \"b\"}\n";
    let bad = write(dir.path(), "bad.jsonl", blank);
    let said = refused(&server, &["train", "--data", bad.to_str().unwrap()]);
    assert!(said.contains("--skip-bad-rows"), "{said}");
    assert!(datasets(&server).await.is_empty(), "an upload remains");

    succeed(&server, &with(&["--max-length", "128"]));
    let said = succeed(&server, &with(&["--max-length", "128", "--seed", "3"]));
    assert!(said.contains("is already stored"), "{said}");
    let stored = datasets(&server).await;
    assert_eq!(stored.len(), 1);
    // A refused call leaves a dataset that was there before.
    refused(
        &server,
        &with(&["--max-length", "128", "--target-modules", "qkv_proj"]),
    );
    assert_eq!(datasets(&server).await.len(), 1);
    // Lengths must be checked again with another maximum.
    succeed(&server, &with(&["--max-length", "256"]));
    assert_eq!(datasets(&server).await.len(), 2);

    let client = server.client().await;
    let list = async |content_hash: &str| {
        let request = pb::ListDatasetsRequest {
            content_hash: content_hash.into(),
            ..Default::default()
        };
        let answer = client.datasets().list_datasets(request).await;
        answer.map(|page| page.into_inner().datasets.len())
    };
    assert_eq!(list(&stored[0].content_hash).await.unwrap(), 2);
    assert_eq!(list(&"0".repeat(64)).await.unwrap(), 0);
    let wrong = list("abc").await.unwrap_err();
    assert_eq!(wrong.code(), tonic::Code::InvalidArgument);
    let metadata = |content_hash: String| pb::UploadMetadata {
        content_hash,
        ..Default::default()
    };
    let damaged = client
        .upload_dataset(&pairs, metadata("0".repeat(64)), |_| {})
        .await;
    let said = damaged.unwrap_err().to_string();
    assert!(said.contains("the bytes that arrived have"), "{said}");
    let whole = metadata(stored[0].content_hash.clone());
    client.upload_dataset(&pairs, whole, |_| {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bare_names_of_models_and_jobs_are_policies() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let pairs = golden("pairs.jsonl");
    let pairs = pairs.to_str().unwrap();
    let train = |policy: &str| {
        let args = [
            "train",
            "--data",
            pairs,
            "--max-steps",
            "1",
            "--max-length",
            "128",
        ];
        say(
            &server,
            &[&args[..], &["--rank", "2", "--policy", policy, "--watch"]].concat(),
        )
    };
    let (is_success, said) = train("tiny");
    assert!(is_success, "{said}");
    let (_, said) = train("models/tinny");
    assert!(
        said.contains("did you mean models/tiny? This server has models/tiny"),
        "{said}"
    );
    let made = jobs(&server).await;
    assert_eq!((made.len(), made[0].policy.as_str()), (1, "models/tiny"));
    let id = made[0].name.trim_start_matches("trainingJobs/");
    let (is_success, said) = train(id);
    assert!(is_success, "{said}");
    let latest = format!("{}/checkpoints/1", made[0].name);
    assert_eq!(jobs(&server).await[0].policy, latest);
    succeed(&server, &["score", "--policy", id, "--data", pairs]);
    let said = succeed(&server, &["score", "--policy", "tiny", "--data", pairs]);
    assert!(
        said.contains("policy and reference are the same weights"),
        "{said}"
    );
    let said = refused(&server, &["score", "--policy", "tinny", "--data", pairs]);
    assert!(
        said.contains("--policy tinny does not exist: did you mean models/tiny?"),
        "{said}"
    );
}
