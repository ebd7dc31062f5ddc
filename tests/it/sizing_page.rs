//! docs/sizing.md: its tables have what the estimator computes today.

use std::path::Path;

use bradley::domain::training::{
    ActivationCheckpointing, BatchConfig, Method, Precision, TrainingSpec,
};
use bradley::model::config::ModelConfig;
use bradley::train::estimate::{self, Lengths, MemoryKind, on_host, trainable_parameters};

use crate::models_page::{GIB, Published, SCORING_ROW_TOKENS, published, table, with_table};
use crate::pages::read;

/// Models on the page, from small to large.
const MODELS: [&str; 11] = [
    "SmolLM2 135M",
    "Qwen2.5 0.5B",
    "Llama 3.2 1B",
    "SmolLM2 1.7B",
    "Llama 3.2 3B",
    "Qwen3 4B",
    "Llama 3.1 8B",
    "Qwen3 14B",
    "Mistral Small 3.2 24B",
    "Qwen3 32B",
    "Llama 3.3 70B",
];

/// Number of models at the beginning of the list that are in the table of CPUs.
const ON_CPU: usize = 6;

/// Lengths of the longest pair, in tokens.
const LENGTHS: [usize; 3] = [1024, 4096, 16384];

/// Largest difference between the page and this machine for a CPU, as a fraction, and in GiB:
/// activations depend on the processor's instructions and on the number of threads.
const TOLERANCE: (f64, f64) = (0.15, 0.3);

fn model(name: &str) -> Published {
    let found = published().into_iter().find(|p| p.model == name);
    found.unwrap_or_else(|| panic!("tests/it/models_page.json has no {name}"))
}

fn spec(method: &Method, precision: Precision, save: ActivationCheckpointing) -> TrainingSpec {
    TrainingSpec {
        method: method.clone(),
        precision: Some(precision),
        batch: BatchConfig {
            activation_checkpointing: save,
            ..BatchConfig::default()
        },
        ..TrainingSpec::default()
    }
}

/// Returns the GiB that a server with only this model needs while it trains, in the memory that its
/// passes use.
fn needed(config: &ModelConfig, spec: &TrainingSpec, longest: usize, memory: MemoryKind) -> f64 {
    let lengths = Lengths {
        longest,
        micro_batch: longest * spec.batch.batch_size,
    };
    let plan = estimate::plan(config, spec, lengths, u64::MAX, memory).unwrap();
    let element = match spec.precision {
        Some(Precision::Bf16) => 2,
        _ => 4,
    };
    let weights = element * config.parameter_count() as u64;
    let scoring = estimate::scoring(config, SCORING_ROW_TOKENS);
    (weights + scoring + plan.training_state + plan.activations) as f64 / GIB
}

/// Returns the memory with recomputed and with saved activations.
fn range(
    config: &ModelConfig,
    method: &Method,
    precision: Precision,
    longest: usize,
    memory: MemoryKind,
) -> [f64; 2] {
    [ActivationCheckpointing::On, ActivationCheckpointing::Off].map(|save| {
        let spec = spec(method, precision, save);
        needed(config, &spec, longest, memory)
    })
}

/// Formats the bytes of a file.
fn file_size(bytes: u64) -> String {
    let gib = bytes as f64 / GIB;
    match gib < 1.0 {
        true => format!("{:.0} MiB", gib * 1024.0),
        false => format!("{gib:.1} GiB"),
    }
}

/// Returns the bytes of a checkpoint: the f32 weights that are trained, and two moments of each.
fn checkpoint_bytes(config: &ModelConfig, spec: &TrainingSpec) -> u64 {
    3 * 4 * trainable_parameters(config, spec)
}

fn gpu_table(method: &Method) -> String {
    let row = |name: &str| {
        let config = model(name).config;
        let cells = LENGTHS.map(|longest| {
            let [least, most] = range(&config, method, Precision::Bf16, longest, MemoryKind::Gpu);
            format!("{least:.1} – {most:.1}")
        });
        let spec = spec(method, Precision::Bf16, ActivationCheckpointing::Auto);
        let weights = 2 * config.parameter_count() as u64;
        let host = (weights + on_host(&config, &spec, 1)) as f64 / GIB;
        format!(
            "| {name} | {} | {host:.1} | {} |",
            cells.join(" | "),
            file_size(checkpoint_bytes(&config, &spec)),
        )
    };
    let header = [
        "| model | GPU, 1024 | GPU, 4096 | GPU, 16384 | host | checkpoint |",
        "|---|--:|--:|--:|--:|--:|",
    ];
    table(header, MODELS.into_iter().map(row))
}

fn cpu_table() -> String {
    let row = |name: &str| {
        let config = model(name).config;
        let cells = [Method::default(), Method::Full].map(|method| {
            [1024, 4096].map(|longest| {
                let [least, most] =
                    range(&config, &method, Precision::F32, longest, MemoryKind::Host);
                format!("{least:.1} – {most:.1}")
            })
        });
        format!("| {name} | {} |", cells.concat().join(" | "))
    };
    let header = [
        "| model | LoRA, 1024 | LoRA, 4096 | full, 1024 | full, 4096 |",
        "|---|--:|--:|--:|--:|",
    ];
    table(header, MODELS.into_iter().take(ON_CPU).map(row))
}

/// Returns the part of a page between the two comments of a table.
fn table_of<'a>(page: &'a str, name: &str) -> &'a str {
    let (_, rest) = page
        .split_once(&format!("<!-- begin {name} -->\n"))
        .unwrap();
    rest.split_once(&format!("<!-- end {name} -->")).unwrap().0
}

/// Returns true if two tables have the same words, and numbers that differ no more than the
/// tolerance.
fn is_close(shown: &str, computed: &str) -> bool {
    let (shown, computed): (Vec<&str>, Vec<&str>) = (
        shown.split_whitespace().collect(),
        computed.split_whitespace().collect(),
    );
    let same = |(a, b): (&&str, &&str)| match (a.parse::<f64>(), b.parse::<f64>()) {
        (Ok(a), Ok(b)) => (a - b).abs() <= TOLERANCE.0 * b + TOLERANCE.1,
        _ => a == b,
    };
    shown.len() == computed.len() && shown.iter().zip(&computed).all(same)
}

#[test]
fn the_page_of_sizes_has_what_the_estimator_computes_today() {
    let page = read("docs/sizing.md");
    let mut expected = with_table(&page, "lora", &gpu_table(&Method::default()));
    expected = with_table(&expected, "full", &gpu_table(&Method::Full));
    let cpu = cpu_table();
    if !is_close(table_of(&page, "cpu"), &cpu) {
        expected = with_table(&expected, "cpu", &cpu);
    }
    if page == expected {
        return;
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sizing.md");
    std::fs::write(&path, &expected).unwrap();
    panic!(
        "docs/sizing.md is out of date; if the change is meant, copy {} to it",
        path.display()
    );
}

#[test]
fn numbers_of_a_cpu_may_differ_a_little_and_not_much() {
    assert!(is_close("| a | 10.0 – 20.0 |", "| a | 11.2 – 18.5 |"));
    assert!(!is_close("| a | 10.0 – 20.0 |", "| a | 13.0 – 20.0 |"));
    assert!(!is_close("| a | 10.0 – 20.0 |", "| b | 10.0 – 20.0 |"));
    assert!(!is_close("", "| a | 10.0 – 20.0 |"));
}
