//! Compares the memory that a run is planned with (`train/estimate.rs`) with the memory that it
//! uses.
//!
//! Each part of a plan is compared separately. The training state lies in vectors: the first test
//! adds up their sizes. Activations lie in the arena of `compute/cpu/buffer.rs`, or on the GPU.
//! Both record the peak of the whole process, so each run gets a process of its own. A plan's two
//! constants, for the program and for packed panels, are left out: they are larger than everything
//! else of a tiny model.

use std::process::Command;

use bradley::compute::cpu::buffer::Buffer;
use bradley::compute::cpu::thread_pool;
use bradley::domain::training::{
    ActivationCheckpointing, BatchConfig, LoraConfig, Method, Precision, TARGET_MODULES,
    TrainingSpec,
};
use bradley::infer::pair::EncodedPair;
use bradley::infer::scorer::score;
use bradley::model::adapter::Adapter;
use bradley::model::decoder::Policy;
use bradley::train::estimate::{Estimate, Lengths, MemoryKind, plan};
use bradley::train::optimizer::AdamW;
use bradley::train::reference::Reference;
use bradley::train::trainable::{StepGradients, TrainablePolicy};
use serde_json::{Value, json};

use crate::golden_training::{Run, train};
use crate::support::{MODELS, device, tiny};

/// Largest allowed difference between a plan and the peak, as a fraction of the peak.
const TOLERANCE: f64 = 0.2;
/// Environment variable with the case that a child process runs, as JSON.
const CASE: &str = "BRADLEY_TEST_MEMORY_CASE";

/// A run of one step on one micro-batch.
struct Case {
    model: &'static str,
    /// True for a full fine-tune, false for LoRA.
    full: bool,
    /// True with activation checkpointing.
    recompute: bool,
    /// Number of pairs in the row.
    pairs: usize,
    /// Number of tokens in the prompt, the chosen and the rejected answer of each pair.
    lengths: [usize; 3],
}

impl Case {
    fn to_json(&self) -> Value {
        json!([
            self.model,
            self.full,
            self.recompute,
            self.pairs,
            self.lengths
        ])
    }

    fn from_json(case: &Value) -> Self {
        let size = |value: &Value| value.as_u64().unwrap() as usize;
        Case {
            model: MODELS.into_iter().find(|name| case[0] == *name).unwrap(),
            full: case[1].as_bool().unwrap(),
            recompute: case[2].as_bool().unwrap(),
            pairs: size(&case[3]),
            lengths: [0, 1, 2].map(|i| size(&case[4][i])),
        }
    }

    fn policy(&self, base: &Policy) -> TrainablePolicy {
        if self.full {
            return TrainablePolicy::full(base, Precision::F32).unwrap();
        }
        let adapter = Adapter::init(&base.config, &lora(), 1).unwrap();
        TrainablePolicy::lora(base, &adapter, Precision::F32).unwrap()
    }

    fn spec(&self) -> TrainingSpec {
        let row_tokens = self.pairs * self.lengths.iter().sum::<usize>();
        TrainingSpec {
            method: if self.full {
                Method::Full
            } else {
                Method::Lora(lora())
            },
            precision: Some(Precision::F32),
            batch: BatchConfig {
                batch_size: self.pairs,
                max_steps: Some(1),
                row_tokens,
                activation_checkpointing: match self.recompute {
                    true => ActivationCheckpointing::On,
                    false => ActivationCheckpointing::Off,
                },
                ..BatchConfig::default()
            },
            ..TrainingSpec::default()
        }
    }

    /// Returns the pairs: random tokens of the tiny models' vocabularies, each pair with a prompt
    /// of its own.
    fn encoded(&self) -> Vec<EncodedPair> {
        let tokens = |seed: usize, n: usize| {
            (0..n)
                .map(|i| ((i * 31 + seed * 17 + i * i % 7) % 300) as u32)
                .collect()
        };
        let [prompt, chosen, rejected] = self.lengths;
        let pair = |i: usize| EncodedPair {
            row: i as u64 + 1,
            id: None,
            weight: 1.0,
            prompt: tokens(3 * i, prompt),
            chosen: tokens(3 * i + 1, chosen),
            rejected_prompt: None,
            rejected: tokens(3 * i + 2, rejected),
            chosen_truncated: false,
            rejected_truncated: false,
            logged: None,
        };
        (0..self.pairs).map(pair).collect()
    }

    fn plan(&self, base: &Policy) -> Estimate {
        let lengths = Lengths::of(&self.encoded(), self.pairs);
        let memory = MemoryKind::of(&device());
        plan(&base.config, &self.spec(), lengths, u64::MAX, memory).unwrap()
    }
}

fn lora() -> LoraConfig {
    let target_modules = TARGET_MODULES.map(str::to_owned).to_vec();
    LoraConfig {
        rank: 4,
        target_modules,
        ..LoraConfig::default()
    }
}

#[test]
fn the_training_state_takes_the_memory_that_is_planned() {
    for (model, full) in MODELS
        .into_iter()
        .flat_map(|model| [(model, false), (model, true)])
    {
        let case = Case {
            model,
            full,
            recompute: false,
            pairs: 1,
            lengths: [8, 4, 4],
        };
        let base = tiny(model).0;
        let policy = case.policy(&base);
        let sizes: Vec<usize> = policy
            .trainables
            .iter()
            .map(|t| t.var.elem_count())
            .collect();
        let moments = AdamW::new(sizes.clone());
        let gradients = StepGradients::zeros(&policy);
        let parts = [gradients.values(), &moments.first, &moments.second];
        let elements = |part: &[Vec<f32>]| part.iter().map(Vec::len).sum::<usize>();
        let numbers = sizes.iter().sum::<usize>() + parts.map(elements).iter().sum::<usize>();
        let lengths = Lengths::of(&case.encoded(), 1);
        let planned = plan(
            &base.config,
            &case.spec(),
            lengths,
            u64::MAX,
            MemoryKind::Host,
        )
        .unwrap();
        assert_eq!(
            planned.training_state,
            4 * numbers as u64,
            "{model}, full: {full}"
        );
    }
}

/// Runs a case in a process of its own, and returns the planned bytes and the peak.
fn measured(case: &Case) -> (f64, f64) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "memory::a_run_takes_the_memory_that_is_planned",
            "--nocapture",
        ])
        .env(CASE, case.to_json().to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}: {said}{errors}",
        case.to_json()
    );
    let line = said
        .lines()
        .find_map(|line| line.split_once("measured: "))
        .unwrap()
        .1;
    let figures: Value = serde_json::from_str(line).unwrap();
    (
        figures["planned"].as_f64().unwrap(),
        figures["peak"].as_f64().unwrap(),
    )
}

/// Runs the case in the environment, and prints the planned and the used bytes. Returns false if
/// there is none, because this process is not a child of [`measured`].
#[allow(clippy::print_stdout)]
fn run_as_child() -> bool {
    let Ok(case) = std::env::var(CASE) else {
        return false;
    };
    let case = Case::from_json(&serde_json::from_str(&case).unwrap());
    // Each thread holds the attention scores of one block, so the peak depends on their number.
    thread_pool::set_threads(2);
    let base = tiny(case.model).0;
    let planned = case.plan(&base);
    // The base's weights are not part of a plan; on a GPU this call uploads them.
    score(&base, &case.encoded()[0].groups()).unwrap();
    device().trim();
    let peak = || {
        device()
            .peak_memory()
            .unwrap_or(Buffer::peak_bytes() as u64)
    };
    let before = peak();
    let run = Run {
        policy: case.policy(&base),
        reference: Reference::Frozen {
            policy: base.clone(),
            identity: "base".into(),
        },
        pairs: case.encoded(),
        eval: Vec::new(),
        spec: case.spec(),
        resume: None,
        folder: tempfile::tempdir().unwrap().keep(),
    };
    assert_eq!(train(run).len(), 1);
    // On the CPU the training state is not in the arena.
    let state = if device().memory().is_some() {
        planned.training_state
    } else {
        0
    };
    let figures = json!({"planned": planned.activations + state, "peak": peak() - before});
    println!("\nmeasured: {figures}");
    true
}

#[test]
fn a_run_takes_the_memory_that_is_planned() {
    // Every run has a process of its own, which executes this test again.
    if run_as_child() {
        return;
    }
    let mut cases = Vec::new();
    let case = |model, full, recompute, lengths| Case {
        model,
        full,
        recompute,
        pairs: 1,
        lengths,
    };
    if device().name() == "cpu" {
        for (model, full) in MODELS
            .into_iter()
            .flat_map(|model| [(model, false), (model, true)])
        {
            cases.extend(
                [false, true].map(|recompute| case(model, full, recompute, [700, 200, 124])),
            );
        }
        // Its backward pass computes attention in several rounds.
        cases.push(case("llama", false, true, [3000, 600, 496]));
    } else {
        // A GPU's plan assumes that the row needs the log-prob of every token, so most tokens are
        // in completions.
        cases.push(case("llama", false, false, [24, 250, 250]));
        cases.push(case("qwen3", true, true, [24, 250, 250]));
    }
    for case in cases {
        let (planned, peak) = measured(&case);
        println!(
            "{}: {planned} bytes planned, {peak} taken, {:.3}",
            case.to_json(),
            planned / peak
        );
        let off = (planned - peak).abs() / peak;
        let what = format!("{}: {planned} bytes planned, {peak} taken", case.to_json());
        assert!(off <= TOLERANCE, "{what}");
    }
}

/// The plan of a row of several pairs does not know how each pair divides into prompt and
/// completions, so it assumes the worst case. For the CPU only: leave it out on a GPU or the
/// emulator, as .ci/run does.
#[test]
fn a_row_of_several_pairs_takes_no_more_than_planned() {
    assert_eq!(
        device().name(),
        "cpu",
        "this test is for the CPU: unset BRADLEY_TEST_DEVICE"
    );
    for full in [false, true] {
        let case = Case {
            model: "llama",
            full,
            recompute: false,
            pairs: 4,
            lengths: [128, 64, 64],
        };
        let (planned, peak) = measured(&case);
        let what = format!("{}: {planned} bytes planned, {peak} taken", case.to_json());
        assert!(peak <= planned && planned <= 2.0 * peak, "{what}");
    }
}
