//! Runs the engine without the service, for `compare.py`, `gpu.py`, `families.py` and
//! `score_files.py` in this folder. It reads one line per round from stdin, runs the round and
//! prints its measurements as JSON.
//!
//! Arguments: `offline MODEL PAIRS.jsonl MODE f32|bf16 BATCH [MAX_LENGTH [ROW_TOKENS]]`. MODE is
//! `train-lora`, `train-full`, `score`, or `lengths`, which reads no lines and measures scoring by
//! the length of a row. BATCH is the number of pairs of a training step; scoring takes 8 pairs at a
//! time, whatever BATCH says. A line is `FROM TO`, a range of the file's pairs without those that
//! cannot be encoded, or `FROM TO warm` to reuse the reference cache of the previous round. The
//! variable BRADLEY_BENCH_DEVICE selects the device, e.g. `cuda:0`; the default is `cpu`.

#![allow(clippy::print_stdout)]

use std::io::BufRead;
use std::sync::Arc;
use std::time::Instant;

use bradley::domain::dataset::DatasetFormat;
use bradley::domain::identity::ModelIdentity;
use bradley::domain::training::{
    BatchConfig, LoraConfig, Method, Precision, RunConfig, TARGET_MODULES, TrainingSpec, Truncation,
};
use bradley::formats::loader::load_model;
use bradley::infer::encode::PairEncoder;
use bradley::infer::pair::{EncodedPair, SequenceGroup};
use bradley::infer::reference_cache::ReferenceCache;
use bradley::infer::scorer::score_all;
use bradley::model::adapter::Adapter;
use bradley::model::decoder::Policy;
use bradley::model::device::{ComputeDevice, DeviceChoice};
use bradley::model::parameters::Parameters;
use bradley::train::estimate::{Lengths, MemoryKind, plan};
use bradley::train::reference::Reference;
use bradley::train::rows::read_rows;
use bradley::train::run_context::RunContext;
use bradley::train::trainable::TrainablePolicy;
use bradley::train::trainer::{Status, Trainer, TrainerInput};

fn main() -> anyhow::Result<()> {
    bradley::cli::tune_allocator();
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let [model, pairs, mode, precision, batch, rest @ ..] = args.as_slice() else {
        // `cargo bench` starts every benchmark without arguments. This one then does nothing.
        println!("offline: scripts in benches/ start it with arguments");
        return Ok(());
    };
    let max_length = rest.first().map_or(Ok(512), |s| s.parse())?;
    let row_tokens = rest
        .get(1)
        .map_or(Ok(BatchConfig::default().row_tokens), |s| s.parse())?;
    let precision = Precision::parse(precision)
        .ok_or_else(|| anyhow::anyhow!("the precision is f32 or bf16"))?;
    let loaded = load_model(None, model, &Default::default())?;
    let tokenizer = Arc::new(loaded.tokenizer);
    let parameters = Parameters::load(&loaded.config, &loaded.weights, precision)?;
    let device = std::env::var("BRADLEY_BENCH_DEVICE").unwrap_or("cpu".into());
    let device = DeviceChoice::parse(&device)
        .ok_or_else(|| anyhow::anyhow!("BRADLEY_BENCH_DEVICE is cpu or cuda:N"))?;
    let device = ComputeDevice::open(device).map_err(anyhow::Error::msg)?;
    let base = Policy {
        config: Arc::new(loaded.config),
        parameters: Arc::new(parameters),
        adapter: None,
        precision,
        device,
        helpers: Arc::default(),
    };
    let encoder = PairEncoder::new(&tokenizer, max_length, Truncation::KeepStart);
    let rows = read_rows(pairs.as_ref(), DatasetFormat::Jsonl)?;
    let all: Vec<EncodedPair> = rows
        .filter_map(|row| encoder.encode_row(&row.ok()?).ok())
        .collect();
    let mut cache = ReferenceCache::new(1 << 24);
    println!("ready {}", all.len());
    if mode == "lengths" {
        return lengths(&base, &all);
    }
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let chosen = &all[words[0].parse()?..words[1].parse()?];
        if words.get(2) != Some(&"warm") {
            cache = ReferenceCache::new(1 << 24);
        }
        let start = Instant::now();
        let spec = spec(
            mode == "train-lora",
            batch.parse()?,
            max_length,
            row_tokens,
            precision,
        );
        let (seconds, first_step) = match mode.as_str() {
            "score" => (score(&base, chosen, &cache)?, 0.0),
            _ => train(&base, chosen, spec.clone(), &tokenizer, &cache)?,
        };
        let tokens: usize = chosen.iter().map(EncodedPair::sequence_tokens).sum();
        println!(
            "{{\"seconds\": {seconds}, \"first_step\": {first_step}, \"with_setup\": {}, \
             \"pairs\": {}, \"tokens\": {tokens}, \"gflop\": {}, \"first_gflop\": {}, \
             \"peak_bytes\": {}, \"estimate\": {}}}",
            start.elapsed().as_secs_f64(),
            chosen.len(),
            gflop(&base, chosen, mode),
            gflop(
                &base,
                &chosen[..spec.batch.batch_size.min(chosen.len())],
                mode
            ),
            peak_bytes(&base),
            estimated(&base, chosen, mode, &spec),
        );
    }
    Ok(())
}

/// Returns the peak memory in bytes: that of the GPU, or this process's resident memory (VmHWM).
fn peak_bytes(policy: &Policy) -> u64 {
    if let Some(bytes) = policy.device.peak_memory() {
        return bytes;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find(|l| l.starts_with("VmHWM:"))
        .unwrap_or_default();
    line.split_whitespace()
        .nth(1)
        .and_then(|n| n.parse::<u64>().ok())
        .unwrap_or_default()
        * 1024
}

/// Returns LoRA of rank 16 on all linear layers.
fn lora() -> LoraConfig {
    LoraConfig {
        rank: 16,
        alpha: 32.0,
        target_modules: TARGET_MODULES.map(str::to_owned).to_vec(),
        ..LoraConfig::default()
    }
}

fn spec(
    is_lora: bool,
    batch_size: usize,
    max_length: usize,
    row_tokens: usize,
    precision: Precision,
) -> TrainingSpec {
    TrainingSpec {
        method: if is_lora {
            Method::Lora(lora())
        } else {
            Method::Full
        },
        batch: BatchConfig {
            batch_size,
            max_length,
            row_tokens,
            epochs: 1.0,
            shuffle: false,
            ..BatchConfig::default()
        },
        run: RunConfig {
            save_steps: 0,
            ..RunConfig::default()
        },
        precision: Some(precision),
        ..TrainingSpec::default()
    }
}

fn score(base: &Policy, pairs: &[EncodedPair], cache: &ReferenceCache) -> anyhow::Result<f64> {
    let policy = Policy {
        adapter: Some(Arc::new(Adapter::init(&base.config, &lora(), 1)?)),
        ..base.clone()
    };
    let groups: Vec<Vec<SequenceGroup>> = pairs.iter().map(EncodedPair::groups).collect();
    let start = Instant::now();
    for groups in groups.chunks(8) {
        let items: Vec<&[SequenceGroup]> = groups.iter().map(Vec::as_slice).collect();
        score_all(&policy, &items, 2048, &mut || {})?;
        cache.score(base, "base", &items, 2048, &mut || {})?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Trains on the pairs in their order. Returns the seconds of the whole run and of its first step,
/// in which a fresh process touches its memory for the first time.
fn train(
    base: &Policy,
    pairs: &[EncodedPair],
    spec: TrainingSpec,
    tokenizer: &Arc<bradley::formats::tokenizer::ChatTokenizer>,
    cache: &ReferenceCache,
) -> anyhow::Result<(f64, f64)> {
    let policy = match &spec.method {
        Method::Lora(lora) => {
            TrainablePolicy::lora(base, &Adapter::init(&base.config, lora, 1)?, base.precision)?
        }
        Method::Full => TrainablePolicy::full(base, base.precision)?,
    };
    let folder = tempfile::tempdir()?;
    let input = TrainerInput {
        spec,
        policy,
        reference: Reference::Frozen {
            policy: base.clone(),
            identity: "base".into(),
        },
        train: pairs.to_vec(),
        eval: Vec::new(),
        checkpoints: folder.path().to_owned(),
        resume: None,
        tokenizer: tokenizer.clone(),
        base: "base".into(),
        identity: ModelIdentity::default(),
        memory: u64::MAX,
    };
    let mut trainer = Trainer::new(input)?;
    let (start, total) = (Instant::now(), trainer.total_steps());
    let mut host = RunContext {
        cache,
        yield_point: &mut || {},
        emit: &mut |_| {},
    };
    let mut first_step = None;
    // The final checkpoint is not part of the measurement, as for TRL.
    while trainer.step() < total && trainer.advance(&mut host)? == Status::Working {
        if trainer.step() == 1 {
            first_step.get_or_insert_with(|| start.elapsed().as_secs_f64());
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok((seconds, first_step.unwrap_or(seconds)))
}

/// Measures the seconds per token of scoring one row, by the row's length. Only the cost of
/// attention grows with the length.
fn lengths(base: &Policy, pairs: &[EncodedPair]) -> anyhow::Result<()> {
    let text: Vec<u32> = pairs
        .iter()
        .flat_map(|p| p.prompt.iter().chain(&p.chosen).copied())
        .collect();
    for n in [64, 128, 256, 512, 1024, 2048, 4096] {
        let row = [SequenceGroup {
            prompt: text[..n / 2].to_vec(),
            completions: vec![text[n / 2..n].to_vec()],
        }];
        let mut times = Vec::new();
        for _ in 0..5 {
            let start = Instant::now();
            score_all(base, &[&row], usize::MAX, &mut || {})?;
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        println!(
            "{{\"tokens\": {n}, \"seconds\": {}, \"microseconds_a_token\": {}}}",
            times[2],
            times[2] / n as f64 * 1e6
        );
    }
    Ok(())
}

/// Counts the minimum multiplications and additions of the round's GEMMs, in 10⁹: packed tokens,
/// and the head on completions only. Policy and reference run a forward pass; a training round also
/// runs a backward pass.
fn gflop(base: &Policy, pairs: &[EncodedPair], mode: &str) -> f64 {
    let spec = &base.config.spec;
    let head = (spec.vocab_size * spec.hidden_size) as f64;
    // The embedding is a lookup, not a GEMM. An untied head is counted separately.
    let linear = base.config.parameter_count() as f64
        - if spec.tie_word_embeddings {
            head
        } else {
            2.0 * head
        };
    // Width of the queries, summed over the blocks.
    let query_width = spec
        .blocks
        .iter()
        .map(|block| block.attention().query_width())
        .sum::<usize>() as f64;
    // Cost of the blocks, of the head and of attention, in units of one forward pass.
    let (block_passes, head_passes, attention_passes) = match mode {
        "train-lora" => (3.0, 3.0, 4.5),
        "train-full" => (4.0, 4.0, 4.5),
        _ => (2.0, 2.0, 2.0),
    };
    let of = |p: &EncodedPair| {
        let (prompt, a, b) = (
            p.prompt.len() as f64,
            p.chosen.len() as f64,
            p.rejected.len() as f64,
        );
        // Number of pairs of a query and a key that it attends to.
        let seen = prompt * prompt / 2.0 + a * (prompt + a / 2.0) + b * (prompt + b / 2.0);
        2.0 * linear * block_passes * p.packed_tokens() as f64
            + 2.0 * head * head_passes * (a + b)
            + 4.0 * query_width * attention_passes * seen
    };
    pairs.iter().map(of).sum::<f64>() / 1e9
}

/// Returns the memory estimate in bytes, including resident weights; 0 for scoring.
fn estimated(base: &Policy, pairs: &[EncodedPair], mode: &str, spec: &TrainingSpec) -> u64 {
    if mode == "score" {
        return 0;
    }
    let lengths = Lengths::of(pairs, spec.batch.batch_size);
    let bytes = if base.precision == Precision::Bf16 {
        2
    } else {
        4
    };
    let (Ok(plan) | Err(plan)) = plan(
        &base.config,
        spec,
        lengths,
        u64::MAX,
        MemoryKind::of(&base.device),
    );
    base.config.parameter_count() as u64 * bytes + plan.total()
}
