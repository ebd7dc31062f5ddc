//! Compares whole training runs with TRL, step by step; tests determinism and continuation.

use std::path::PathBuf;
use std::sync::Arc;

use bradley::domain::identity::ModelIdentity;
use bradley::domain::job::Metrics;
use bradley::domain::training::{
    BatchConfig, LoraConfig, Method, OptimizerConfig, Precision, RunConfig, ScheduleKind,
    TrainingSpec, Warmup,
};
use bradley::formats::peft;
use bradley::infer::pair::{EncodedPair, digest};
use bradley::infer::reference_cache::ReferenceCache;
use bradley::infer::scorer::score;
use bradley::model::adapter::Adapter;
use bradley::model::decoder::Policy;
use bradley::train::checkpoint;
use bradley::train::event::RunEvent;
use bradley::train::reference::Reference;
use bradley::train::run_context::RunContext;
use bradley::train::trainable::TrainablePolicy;
use bradley::train::trainer::{Status, TrainError, Trainer, TrainerInput, tokens_until};
use serde_json::Value;

use crate::families::FAMILIES;
use crate::support::{
    FAMILY_MODELS, assert_close, chosen_families, encode, golden, is_batch_invariant, json, open,
    rows, tiny,
};

/// Description of a run.
pub struct Run {
    pub policy: TrainablePolicy,
    pub reference: Reference,
    pub pairs: Vec<EncodedPair>,
    pub eval: Vec<EncodedPair>,
    pub spec: TrainingSpec,
    pub resume: Option<PathBuf>,
    pub folder: PathBuf,
}

impl Run {
    /// Returns a full fine-tune of `model` with a frozen `reference`.
    pub fn full(
        model: &Policy,
        reference: &Policy,
        pairs: Vec<EncodedPair>,
        spec: TrainingSpec,
    ) -> Self {
        let reference = Reference::Frozen {
            policy: reference.clone(),
            identity: "reference".into(),
        };
        Run {
            policy: TrainablePolicy::full(model, Precision::F32).unwrap(),
            reference,
            pairs,
            eval: vec![],
            spec,
            resume: None,
            folder: scratch(),
        }
    }

    /// Returns a LoRA run from a stored adapter, with the base as the reference.
    pub fn lora(
        model: &Policy,
        adapter: &str,
        pairs: Vec<EncodedPair>,
        spec: TrainingSpec,
    ) -> Self {
        let adapter = peft::load(&golden(adapter), &model.config).unwrap();
        Run::lora_from(model, &adapter, pairs, spec)
    }

    /// Returns a LoRA run from an adapter, with the base as the reference.
    fn lora_from(
        model: &Policy,
        adapter: &Adapter,
        pairs: Vec<EncodedPair>,
        spec: TrainingSpec,
    ) -> Self {
        let reference = Reference::Frozen {
            policy: model.clone(),
            identity: "base".into(),
        };
        Run {
            policy: TrainablePolicy::lora(model, adapter, model.precision).unwrap(),
            reference,
            pairs,
            eval: vec![],
            spec,
            resume: None,
            folder: scratch(),
        }
    }
}

fn scratch() -> PathBuf {
    let dir = tempfile::tempdir().unwrap().keep();
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// Executes the run and returns its events.
pub fn events(run: Run) -> Vec<RunEvent> {
    events_with(run, &mut |_, _| {})
}

/// Executes the run, and calls `yield_point(weights, cache)` between the blocks of every pass.
fn events_with(run: Run, yield_point: &mut dyn FnMut(&Policy, &ReferenceCache)) -> Vec<RunEvent> {
    try_events(run, yield_point).unwrap()
}

/// Does the same for a run that may fail.
fn try_events(
    run: Run,
    yield_point: &mut dyn FnMut(&Policy, &ReferenceCache),
) -> Result<Vec<RunEvent>, TrainError> {
    let input = TrainerInput {
        spec: run.spec,
        policy: run.policy,
        reference: run.reference,
        train: run.pairs,
        eval: run.eval,
        checkpoints: run.folder.clone(),
        resume: run.resume,
        tokenizer: Arc::new(open("llama").tokenizer),
        base: "tiny".into(),
        identity: ModelIdentity::default(),
        memory: u64::MAX,
    };
    let mut trainer = Trainer::new(input).unwrap();
    let cache = ReferenceCache::new(1 << 20);
    let mut events = Vec::new();
    let live = trainer.live_policy();
    let mut context = RunContext {
        cache: &cache,
        yield_point: &mut || yield_point(&live, &cache),
        emit: &mut |e| events.push(e),
    };
    while trainer.advance(&mut context)? == Status::Working {}
    Ok(events)
}

/// Executes the run, removes its folder, and returns the metrics of each step.
pub fn train(run: Run) -> Vec<Metrics> {
    let folder = run.folder.clone();
    let steps = steps(&events(run));
    std::fs::remove_dir_all(folder).unwrap();
    steps
}

fn steps(events: &[RunEvent]) -> Vec<Metrics> {
    events
        .iter()
        .filter_map(|e| match e {
            RunEvent::Step { metrics, .. } => Some(metrics.clone()),
            _ => None,
        })
        .collect()
}

fn spec(settings: &Value, method: Method) -> TrainingSpec {
    let number = |k: &str| settings.get(k).and_then(Value::as_f64);
    TrainingSpec {
        method,
        optimizer: OptimizerConfig {
            learning_rate: number("learning_rate").unwrap(),
            weight_decay: number("weight_decay").unwrap_or(0.0),
            schedule: if settings.get("lr_scheduler_type").is_some() {
                ScheduleKind::Cosine
            } else {
                ScheduleKind::Constant
            },
            warmup: Warmup::Steps(number("warmup_steps").unwrap_or(0.0) as u64),
            ..Default::default()
        },
        batch: BatchConfig {
            batch_size: 2,
            gradient_accumulation_steps: number("gradient_accumulation_steps").unwrap_or(1.0)
                as usize,
            max_length: 256,
            max_steps: Some(number("max_steps").unwrap() as u64),
            shuffle: false,
            ..Default::default()
        },
        ..Default::default()
    }
}

/// Repeats TRL's run of a model, and compares every metric of each step.
fn assert_run_is_trls(name: &str, run: &str, rows_file: &str, trls: &Value) {
    let (model, tokenizer) = tiny(name);
    let pairs = encode(&rows(rows_file), &tokenizer, 256);
    let spec = spec(&trls["settings"], method(run));
    let got = train(if matches!(spec.method, Method::Lora(_)) {
        Run::lora(&model, &format!("adapters/{name}-start"), pairs, spec)
    } else {
        Run::full(&model, &model, pairs, spec)
    });
    let want = trls["steps"].as_array().unwrap();
    assert_eq!(got.len(), want.len(), "{name} {run}");
    for (k, (got, want)) in got.iter().zip(want).enumerate() {
        for (metric, value) in want.as_object().unwrap() {
            let value = value.as_f64().unwrap();
            let what = format!("{name} {run} step {} {metric}", k + 1);
            let tolerance = if metric == "loss" || metric == "grad_norm" {
                1e-4
            } else {
                1e-3
            };
            assert_close(&what, got[metric.as_str()], value, tolerance, 1e-2);
        }
    }
}

/// Returns the method of a run of TRL's, from its name.
fn method(run: &str) -> Method {
    match run {
        "lora" => Method::Lora(LoraConfig::default()),
        _ => Method::Full,
    }
}

#[test]
fn trajectories_are_trls() {
    for (name, trls) in json("trajectories.json").as_object().unwrap() {
        let (model, run) = name.split_once('/').unwrap();
        assert_run_is_trls(model, run, "pairs.jsonl", trls);
    }
}

#[test]
fn trajectories_of_each_family_are_trls() {
    // The emulator is slow, so there it is a few models with kernels that other families do not
    // use: soft-caps, longrope, interleaved rotation, norms over all heads.
    let few = &["gemma2-64", "phi3-long", "glm4-64", "olmo2-64"];
    let names = chosen_families(&FAMILIES, few);
    let runs: &[&str] = if names == few {
        &["lora"]
    } else {
        &["full", "lora"]
    };
    for name in names {
        let golden = json(&format!("trajectories_{name}.json"));
        for run in runs {
            let trls = &golden["runs"][run];
            assert_eq!(trls["steps"].as_array().unwrap().len(), 10, "{name} {run}");
            assert_run_is_trls(name, run, golden["rows"].as_str().unwrap(), trls);
        }
    }
}

fn shuffled(steps: u64) -> TrainingSpec {
    TrainingSpec {
        method: Method::Lora(LoraConfig::default()),
        optimizer: OptimizerConfig {
            learning_rate: 1e-2,
            ..Default::default()
        },
        batch: BatchConfig {
            batch_size: 2,
            gradient_accumulation_steps: 2,
            max_length: 256,
            max_steps: Some(steps),
            row_tokens: 150,
            ..Default::default()
        },
        run: RunConfig {
            save_steps: 2,
            eval_steps: 3,
            ..Default::default()
        },
        ..Default::default()
    }
}

fn bits(all: &[Metrics]) -> Vec<Vec<(String, u64)>> {
    all.iter()
        .map(|m| m.iter().map(|(k, v)| (k.clone(), v.to_bits())).collect())
        .collect()
}

#[test]
fn the_same_seed_gives_the_same_metrics_bit_for_bit_and_another_seed_does_not() {
    for precision in [Precision::F32, Precision::Bf16] {
        let run = |seed: u64| {
            let (model, tokenizer) = tiny("llama");
            let model = model.with_precision(precision);
            let mut spec = shuffled(6);
            spec.seed.0 = seed;
            let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
            bits(&train(Run {
                eval: pairs[..2].to_vec(),
                ..Run::lora(&model, "adapters/llama-start", pairs, spec)
            }))
        };
        let first = run(42);
        assert_eq!(first, run(42));
        assert_ne!(first, run(43));
    }
}

#[test]
fn scoring_between_the_blocks_of_a_pass_changes_neither_the_run_nor_the_scores() {
    let (model, tokenizer) = tiny("llama");
    let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
    let groups = pairs[0].groups();
    let other = score(&model, &groups).unwrap();
    let make = || Run {
        eval: pairs[..2].to_vec(),
        ..Run::lora(&model, "adapters/llama-start", pairs.clone(), shuffled(3))
    };
    let undisturbed = bits(&train(make()));
    let (mut calls, mut same) = (0, 0);
    // Scores under the run's own weights must not change within a step.
    let mut last = Vec::new();
    let disturbed = events_with(make(), &mut |live, cache| {
        calls += 1;
        assert_eq!(score(&model, &groups).unwrap(), other);
        assert_eq!(
            *cache
                .score(&model, "base", &[&groups], 512, &mut || {})
                .unwrap()[0],
            other
        );
        let now = score(live, &groups).unwrap();
        same += usize::from(now == last);
        last = now;
    });
    assert_eq!(bits(&steps(&disturbed)), undisturbed);
    let blocks = model.num_blocks();
    assert!(
        calls > 3 * 2 * 2 * blocks && calls % blocks == 0,
        "{calls} calls in passes over {blocks} blocks"
    );
    assert_eq!(calls - same, 4, "the weights of the start and of each step");
}

#[test]
fn a_gradient_that_is_not_finite_names_the_rows_of_its_step() {
    let (model, tokenizer) = tiny("llama");
    let mut pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
    // The loss of this weight is finite in f64, but its gradient is not in f32.
    pairs[0].weight = 1e39;
    let step: Vec<u64> = pairs[..4].iter().map(|pair| pair.row).collect();
    let mut spec = shuffled(3);
    spec.batch.shuffle = false;
    let run = Run::lora(&model, "adapters/llama-start", pairs, spec);
    let error = try_events(run, &mut |_, _| {}).unwrap_err();
    let message = error.to_string();
    let TrainError::NonFinite { what, rows, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((what, &rows), ("grad_norm", &step));
    assert!(message.contains(&format!("(rows {step:?})")), "{message}");
}

#[test]
fn the_error_about_an_evaluation_points_to_no_rows() {
    let error = TrainError::NonFinite {
        what: "eval_loss",
        value: f64::NAN,
        step: 3,
        rows: Vec::new(),
    };
    assert_eq!(
        error.to_string(),
        "eval_loss is NaN at step 3: lower the learning rate"
    );
}

#[test]
fn a_continued_run_takes_the_steps_of_an_undisturbed_one_bit_for_bit() {
    let (model, tokenizer) = tiny("llama");
    let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
    let make = |resume: Option<PathBuf>| Run {
        resume,
        ..Run::lora(&model, "adapters/llama-start", pairs.clone(), shuffled(7))
    };
    let whole = make(None);
    let folder = whole.folder.clone();
    let undisturbed = steps(&events(whole));
    for step in [4, 6] {
        let continued = train(make(Some(folder.join(step.to_string()))));
        assert_eq!(
            bits(&continued),
            bits(&undisturbed[step..]),
            "from step {step}"
        );
    }
    // A damaged checkpoint is noticed.
    let file = folder.join("4/adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let input = make(Some(folder.join("4")));
    let result = Trainer::new(TrainerInput {
        spec: input.spec,
        policy: input.policy,
        reference: input.reference,
        train: input.pairs,
        eval: vec![],
        checkpoints: input.folder,
        resume: input.resume,
        tokenizer: Arc::new(open("llama").tokenizer),
        base: "tiny".into(),
        identity: ModelIdentity::default(),
        memory: u64::MAX,
    });
    assert!(
        result
            .err()
            .unwrap()
            .to_string()
            .contains("adapter_model.safetensors does not match its checksum")
    );
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_continued_run_of_each_family_takes_the_steps_of_an_undisturbed_one_bit_for_bit() {
    for (name, run) in chosen_families(&FAMILY_MODELS, &["gemma2-64"])
        .into_iter()
        .flat_map(|name| [(name, "full"), (name, "lora")])
    {
        let (model, tokenizer) = tiny(name);
        let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
        let adapter = Adapter::init(&model.config, &LoraConfig::default(), 7).unwrap();
        let mut spec = shuffled(5);
        spec.method = method(run);
        spec.optimizer.learning_rate = 1e-3;
        spec.run.save_steps = 3;
        let make = |resume: Option<PathBuf>| {
            let (pairs, spec) = (pairs.clone(), spec.clone());
            let new = if matches!(spec.method, Method::Lora(_)) {
                Run::lora_from(&model, &adapter, pairs, spec)
            } else {
                Run::full(&model, &model, pairs, spec)
            };
            Run { resume, ..new }
        };
        let whole = make(None);
        let folder = whole.folder.clone();
        let undisturbed = steps(&events(whole));
        let continued = train(make(Some(folder.join("3"))));
        std::fs::remove_dir_all(folder).unwrap();
        if is_batch_invariant() {
            assert_eq!(bits(&continued), bits(&undisturbed[3..]), "{name} {run}");
            continue;
        }
        // A GPU may compute the reference's log-probs again in other rows.
        assert_eq!(continued.len(), 2, "{name} {run}");
        for (got, want) in continued.iter().zip(&undisturbed[3..]) {
            for (metric, want) in want {
                let what = format!("{name} {run} {metric}");
                assert_close(&what, got[metric.as_str()], *want, 1e-3, 1e-2);
            }
        }
    }
}

#[test]
fn a_checkpoint_knows_its_pairs_and_how_many_of_their_tokens_were_used() {
    let (model, tokenizer) = tiny("llama");
    let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
    let (spec, eval) = (shuffled(7), pairs[..2].to_vec());
    let mut longer = pairs.clone();
    longer.iter_mut().for_each(|pair| pair.chosen.push(1));
    let run = Run {
        eval: eval.clone(),
        ..Run::lora(&model, "adapters/llama-start", pairs.clone(), spec.clone())
    };
    let folder = run.folder.clone();
    events(run);
    let steps = checkpoint::steps(&folder).unwrap();
    assert!(steps.len() >= 3, "{steps:?}");
    for step in steps {
        let (recorded, state) = checkpoint::progress(&folder.join(step.to_string())).unwrap();
        assert_eq!(recorded, Some(digest(&pairs, &eval)), "step {step}");
        assert!(state.step == step && state.tokens > 0);
        assert_eq!(
            tokens_until(&spec, &pairs, &state),
            state.tokens,
            "step {step}"
        );
        assert!(
            tokens_until(&spec, &longer, &state) > state.tokens,
            "step {step}"
        );
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn evaluation_finds_the_best_checkpoint_and_early_stopping_ends_the_run() {
    let (model, tokenizer) = tiny("llama");
    let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
    let mut spec = shuffled(40);
    // The evaluation pairs are the training pairs with the answers swapped, so that training can
    // only make them worse.
    let wrong: Vec<EncodedPair> = pairs
        .iter()
        .map(|p| EncodedPair {
            chosen: p.rejected.clone(),
            rejected: p.chosen.clone(),
            ..p.clone()
        })
        .collect();
    spec.run = RunConfig {
        eval_steps: 1,
        early_stopping_patience: 3,
        ..Default::default()
    };
    let run = Run {
        eval: wrong,
        ..Run::lora(&model, "adapters/llama-start", pairs, spec)
    };
    let folder = run.folder.clone();
    let all = events(run);
    assert!(
        all.iter().any(
            |e| matches!(e, RunEvent::Log { message, .. } if message.contains("stopped early"))
        )
    );
    let evaluations: Vec<(u64, f64)> = all
        .iter()
        .filter_map(|e| match e {
            RunEvent::Eval { step, metrics } => Some((*step, metrics["eval_loss"])),
            _ => None,
        })
        .collect();
    assert!(evaluations.len() < 40, "{evaluations:?}");
    let lowest = evaluations.iter().min_by(|a, b| a.1.total_cmp(&b.1));
    let best = all.iter().rev().find_map(|e| match e {
        RunEvent::Checkpoint {
            step, best: true, ..
        } => Some(*step),
        _ => None,
    });
    assert_eq!(best, lowest.map(|(step, _)| *step), "{evaluations:?}");
    assert!(matches!(
        all.last(),
        Some(RunEvent::Checkpoint { .. }) | Some(RunEvent::Log { .. })
    ));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_run_without_memory_for_its_leanest_plan_does_not_start() {
    let (model, tokenizer) = tiny("llama");
    let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
    let run = Run::lora(&model, "adapters/llama-start", pairs, shuffled(1));
    let folder = run.folder.clone();
    let result = Trainer::new(TrainerInput {
        spec: run.spec,
        policy: run.policy,
        reference: run.reference,
        train: run.pairs,
        eval: vec![],
        checkpoints: run.folder,
        resume: None,
        tokenizer: Arc::new(tokenizer),
        base: "tiny".into(),
        identity: ModelIdentity::default(),
        memory: 1 << 20,
    });
    let e = result.err().unwrap();
    assert!(
        e.is_out_of_memory() && e.to_string().contains("1 MiB are left for it"),
        "{e}"
    );
    std::fs::remove_dir_all(folder).unwrap();
}
