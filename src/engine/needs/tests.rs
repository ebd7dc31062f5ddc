//! Tests of the memory that a run needs besides its plan, and of starting a run with the granted
//! memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;

use super::*;
use crate::domain::dpo::{LossType, ReferenceSync};
use crate::domain::reason::Reason;
use crate::domain::training::ActivationCheckpointing;
use crate::engine::api::{EngineOptions, ModelUse, Report, RunEvent, TrainingRun};
use crate::engine::scoring::tests::{base, pair};
use crate::engine::worker::explain;
use crate::engine::{Engine, start};
use crate::formats::loader::load_model;
use crate::formats::source::HubOptions;
use crate::model::device::{ComputeDevice, DeviceChoice, OutOfMemory};
use crate::train::trainer::TrainError;

/// Length of the pairs in tokens.
const TOKENS: usize = 64;

const LENGTHS: Lengths = Lengths {
    longest: 64,
    micro_batch: 128,
};

/// Returns the models of a server with this precision: two are stored in f32, one in bf16.
fn base_models(precision: Precision) -> BaseModels {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models");
    let load = |(id, folder): (&str, &str)| {
        load_model(
            Some(id),
            goldens.join(folder).to_str().unwrap(),
            &HubOptions::default(),
        )
        .unwrap()
    };
    let models = [
        ("tiny", "llama"),
        ("other", "qwen2-ref"),
        ("stored_in_bf16", "llama-bf16"),
    ]
    .map(load);
    BaseModels::load(models.into(), ComputeDevice::Cpu, "cpu", precision).unwrap()
}

fn model(id: &str) -> WeightsRef {
    WeightsRef::Base { model: id.into() }
}

fn full(id: &str) -> WeightsRef {
    WeightsRef::Full {
        model: id.into(),
        dir: PathBuf::from("/checkpoint"),
        content: "hash".into(),
    }
}

fn spec(method: Method, precision: Precision) -> TrainingSpec {
    TrainingSpec {
        method,
        precision: Some(precision),
        ..TrainingSpec::default()
    }
}

fn lora(precision: Precision) -> TrainingSpec {
    spec(TrainingSpec::default().method, precision)
}

/// Returns the host bytes of a run on the CPU, and the (GPU, host) bytes of the same run on a GPU.
fn needs(
    base_models: &BaseModels,
    model: &str,
    reference: Option<&WeightsRef>,
    spec: &TrainingSpec,
) -> (u64, (u64, u64)) {
    let of = |memory| extra(base_models, model, reference, spec, LENGTHS, memory).unwrap();
    let (cpu, gpu) = (of(MemoryKind::Host), of(MemoryKind::Gpu));
    assert_eq!(cpu.host, 0, "the CPU's memory is the machine's");
    (cpu.device, (gpu.device, gpu.host))
}

#[test]
fn weights_as_they_are_in_memory_are_not_copied() {
    let base_models = base_models(Precision::Bf16);
    let spec = lora(Precision::Bf16);
    assert_eq!(
        needs(&base_models, "tiny", Some(&model("tiny")), &spec),
        (0, (0, 0))
    );
    assert_eq!(
        needs(&base_models, "tiny", Some(&model("other")), &spec),
        (0, (0, 0))
    );
    assert_eq!(needs(&base_models, "tiny", None, &spec), (0, (0, 0)));
}

#[test]
fn weights_that_must_not_be_rounded_are_copied_of_each_model_once() {
    let base_models = base_models(Precision::Bf16);
    let parameters = |id: &str| base_models.get(id).unwrap().info.parameters;
    let (tiny, other, stored) = (
        parameters("tiny"),
        parameters("other"),
        parameters("stored_in_bf16"),
    );
    assert_ne!(tiny, other);
    let run = lora(Precision::F32);
    // The policy and the reference share frozen weights.
    assert_eq!(
        needs(&base_models, "tiny", Some(&model("tiny")), &run),
        (4 * tiny, (4 * tiny, 4 * tiny))
    );
    let both = 4 * (tiny + other);
    assert_eq!(
        needs(&base_models, "tiny", Some(&model("other")), &run),
        (both, (both, both))
    );
    // Weights stored in bf16 are never rounded, but a GPU still needs an f32 copy.
    assert_eq!(
        needs(
            &base_models,
            "stored_in_bf16",
            Some(&model("stored_in_bf16")),
            &run
        ),
        (0, (4 * stored, 0))
    );
    // The plan of full fine-tuning includes the policy's weights, but not those of a frozen
    // reference.
    let run = spec(Method::Full, Precision::F32);
    assert_eq!(
        needs(&base_models, "tiny", Some(&model("tiny")), &run),
        (4 * tiny, (4 * tiny, 4 * tiny))
    );
    assert_eq!(needs(&base_models, "tiny", None, &run), (0, (4 * tiny, 0)));
}

#[test]
fn a_server_in_f32_copies_nothing_on_the_cpu_and_a_gpu_has_weights_in_each_precision() {
    let base_models = base_models(Precision::F32);
    let parameters = |id: &str| base_models.get(id).unwrap().info.parameters;
    let run = lora(Precision::Bf16);
    assert_eq!(
        needs(&base_models, "tiny", Some(&model("tiny")), &run),
        (0, (2 * parameters("tiny"), 0))
    );
    let both = 2 * (parameters("tiny") + parameters("other"));
    assert_eq!(
        needs(&base_models, "tiny", Some(&model("other")), &run),
        (0, (both, 0))
    );
}

#[test]
fn a_moving_reference_is_in_memory_twice_while_the_policy_is_mixed_in() {
    for server in [Precision::F32, Precision::Bf16] {
        let base_models = base_models(server);
        let tiny = base_models.get("tiny").unwrap().info.parameters;
        let mut run = spec(Method::Full, server);
        run.dpo.reference_sync = Some(ReferenceSync {
            alpha: 0.5,
            every_steps: 1,
        });
        let on_gpu = weight_bytes(server) * tiny;
        for reference in [model("tiny"), full("tiny")] {
            assert_eq!(
                needs(&base_models, "tiny", Some(&reference), &run),
                (8 * tiny, (on_gpu, 8 * tiny)),
                "{server:?}"
            );
        }
    }
}

#[test]
fn a_full_checkpoint_as_the_reference_has_weights_of_its_own() {
    let base_models = base_models(Precision::Bf16);
    let tiny = base_models.get("tiny").unwrap().info.parameters;
    let reference = full("tiny");
    let run = spec(Method::Full, Precision::Bf16);
    assert_eq!(
        needs(&base_models, "tiny", Some(&reference), &run),
        (2 * tiny, (2 * tiny, 2 * tiny))
    );
    // In f32 it is loaded unrounded, in addition to the policy's own frozen weights.
    let run = lora(Precision::F32);
    assert_eq!(
        needs(&base_models, "tiny", Some(&reference), &run),
        (8 * tiny, (8 * tiny, 8 * tiny))
    );
    // An objective without a reference needs no memory for one.
    let mut run = spec(Method::Full, Precision::Bf16);
    run.dpo.losses[0].loss = LossType::Simpo;
    run.dpo.reference_free = true;
    assert_eq!(
        needs(&base_models, "tiny", Some(&reference), &run),
        (0, (0, 0))
    );
}

#[test]
fn a_larger_reference_needs_more_activations_in_rows_as_long_as_the_runs() {
    let config = |hidden: usize| {
        let json = format!(
            r#"{{"model_type": "llama", "hidden_size": {hidden}, "intermediate_size": 1536,
            "num_hidden_layers": 2, "num_attention_heads": 8,
            "num_key_value_heads": 8, "vocab_size": 320, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5}}"#
        );
        ModelConfig::from_hf_json(&json, Path::new("config.json")).unwrap()
    };
    let (small, large) = (config(256), config(512));
    let mut run = lora(Precision::F32);
    let more = |run: &TrainingSpec, lengths| more_activations(&large, &small, run, lengths);
    let difference = |tokens| estimate::scoring(&large, tokens) - estimate::scoring(&small, tokens);
    run.batch.row_tokens = 100;
    assert_eq!(
        more(
            &run,
            Lengths {
                longest: 300,
                micro_batch: 900
            }
        ),
        difference(300)
    );
    assert_eq!(
        more(
            &run,
            Lengths {
                longest: 30,
                micro_batch: 900
            }
        ),
        difference(100),
        "a row has several pairs"
    );
    assert_eq!(
        more(
            &run,
            Lengths {
                longest: 30,
                micro_batch: 60
            }
        ),
        difference(60),
        "but not more than there are"
    );
    assert_eq!(
        more_activations(&small, &large, &run, LENGTHS),
        0,
        "the plan counts as much"
    );
}

/// Starts an engine on the CPU with a tiny model that is rounded in memory.
fn engine(memory_limit: u64) -> Engine {
    start_with(EngineOptions {
        memory_limit: Some(memory_limit),
        precision: Precision::Bf16,
        ..EngineOptions::default()
    })
}

/// Starts an engine on the CPU with a tiny model.
fn start_with(options: EngineOptions) -> Engine {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models/llama");
    let model = load_model(
        Some("tiny"),
        folder.to_str().unwrap(),
        &HubOptions::default(),
    )
    .unwrap();
    start(vec![model], options).unwrap()
}

/// Returns settings that allow only one plan, because their pairs fill a row: with a moving
/// reference, with a frozen reference on unrounded weights, and without copies of weights.
fn specs() -> Vec<TrainingSpec> {
    let mut one = TrainingSpec {
        precision: Some(Precision::Bf16),
        ..TrainingSpec::default()
    };
    one.batch.activation_checkpointing = ActivationCheckpointing::Off;
    (one.batch.row_tokens, one.batch.batch_size) = (TOKENS, 1);
    let mut moving = TrainingSpec {
        method: Method::Full,
        ..one.clone()
    };
    moving.dpo.reference_sync = Some(ReferenceSync {
        alpha: 0.5,
        every_steps: 1,
    });
    vec![
        moving,
        TrainingSpec {
            precision: Some(Precision::F32),
            ..one.clone()
        },
        one,
    ]
}

fn run(spec: &TrainingSpec, checkpoints: &Path) -> (TrainingRun, mpsc::Receiver<Report>) {
    let (events, told) = mpsc::channel(1 << 10);
    let run = TrainingRun {
        job: "job".into(),
        model: "tiny".into(),
        start: base(),
        reference: Some(base()),
        spec: spec.clone(),
        train: vec![pair(TOKENS)],
        eval: Vec::new(),
        checkpoints: checkpoints.to_owned(),
        resume: None,
        events,
        control: Arc::default(),
    };
    (run, told)
}

#[test]
fn a_run_starts_in_exactly_the_memory_that_its_estimate_names_and_is_refused_with_less() {
    for spec in specs() {
        let folder = tempfile::tempdir().unwrap();
        let lengths = Lengths::one(TOKENS);
        let (needed, _) = engine(u64::MAX / 2)
            .memory("tiny", Some(&base()), &spec, lengths)
            .unwrap();

        let enough = engine(needed);
        assert_eq!(
            enough
                .memory("tiny", Some(&base()), &spec, lengths)
                .unwrap(),
            (needed, needed)
        );
        enough.check("tiny", Some(&base()), &spec, lengths).unwrap();
        let (run_with_enough, mut told) = run(&spec, folder.path());
        let control = run_with_enough.control.clone();
        enough.train(run_with_enough).unwrap();
        let first = told.blocking_recv().unwrap().event;
        assert!(matches!(first, RunEvent::Running { .. }), "{first:?}");
        control.cancel();
        while !matches!(told.blocking_recv().unwrap().event, RunEvent::Ended(_)) {}

        let short = engine(needed - 1);
        assert_eq!(
            short.memory("tiny", Some(&base()), &spec, lengths).unwrap(),
            (needed, needed - 1)
        );
        assert!(matches!(
            short.check("tiny", Some(&base()), &spec, lengths),
            Err(EngineError::OutOfMemory { .. })
        ));
        assert!(matches!(
            short.train(run(&spec, folder.path()).0),
            Err(EngineError::OutOfMemory { .. })
        ));
    }
}

/// The plan of a run with unrounded weights uses only the memory that their copy leaves free. It is
/// leaner than the plan that the whole memory would allow.
#[test]
fn a_plan_has_the_memory_that_copies_of_weights_leave() {
    let base_models = base_models(Precision::Bf16);
    let config = &base_models.get("tiny").unwrap().policy.config;
    let run = lora(Precision::F32);
    assert_eq!(
        run.batch.activation_checkpointing,
        ActivationCheckpointing::Auto
    );
    let extra = extra(
        &base_models,
        "tiny",
        Some(&model("tiny")),
        &run,
        LENGTHS,
        MemoryKind::Host,
    )
    .unwrap()
    .device;
    let plan = |available| estimate::plan(config, &run, LENGTHS, available, MemoryKind::Host);
    let fastest = plan(u64::MAX).unwrap().total();
    let leanest = plan(0).unwrap_err().total();
    let memory = extra + fastest - 1;
    assert!(
        leanest < fastest && fastest <= memory,
        "{leanest} {fastest} {extra}"
    );
    let needs = Needs {
        extra,
        minimum: extra + leanest,
        host: 0,
    };
    let chosen = plan(needs.left_for_plan(memory)).unwrap();
    assert!(extra + chosen.total() <= memory);
    assert_eq!(
        plan(memory).unwrap().total(),
        fastest,
        "without the copy it would be this one"
    );
    assert!(
        plan(needs.left_for_plan(needs.minimum)).is_ok()
            && plan(needs.left_for_plan(needs.minimum - 1)).is_err()
    );
}

#[test]
fn copies_of_weights_are_part_of_the_estimate() {
    let [moving, unrounded, plain] = specs().try_into().unwrap();
    let engine = engine(u64::MAX / 2);
    let parameters = engine.models()[0].parameters;
    let extra = |spec| {
        engine
            .extra("tiny", Some(&base()), spec, Lengths::one(TOKENS))
            .unwrap()
            .device
    };
    assert_eq!(
        (extra(&moving), extra(&unrounded), extra(&plain)),
        (8 * parameters, 4 * parameters, 0)
    );
}

#[test]
fn training_is_a_use_of_a_model_as_far_as_it_fits_the_memory() {
    let largest = engine(u64::MAX / 2);
    let base_models = &largest.shared.base_models;
    let config = &base_models.get("tiny").unwrap().policy.config;
    // The server computes in bf16, and so does a job that chooses no precision.
    let least = |method: Method| {
        let spec = spec(method, Precision::Bf16);
        let (lengths, host) = (Lengths::one(3), MemoryKind::Host);
        let leanest = estimate::plan(config, &spec, lengths, 0, host).unwrap_err();
        base_models.needed() + leanest.total()
    };
    let (lora, full) = (least(Method::default()), least(Method::Full));
    assert!(lora < full, "{lora} {full}");
    let uses = |limit: u64| engine(limit).uses("tiny").unwrap();
    assert_eq!(uses(lora - 1), [ModelUse::Score, ModelUse::Export]);
    let with_lora = [ModelUse::TrainLora, ModelUse::Score, ModelUse::Export];
    assert_eq!(
        (uses(lora), uses(full - 1)),
        (with_lora.into(), with_lora.into())
    );
    let all = [
        ModelUse::TrainLora,
        ModelUse::TrainFull,
        ModelUse::Score,
        ModelUse::Export,
    ];
    assert_eq!(uses(full), all);
    assert!(matches!(
        largest.uses("unknown"),
        Err(EngineError::UnknownModel(_))
    ));
}

/// The estimate of a run on GPUs counts one set of gradients in host memory for each device.
#[test]
fn a_run_is_planned_for_no_more_devices_than_there_are() {
    let planned = |data_parallel| {
        let devices = vec![DeviceChoice::Cpu; 2];
        let engine = start_with(EngineOptions {
            devices,
            data_parallel,
            ..EngineOptions::default()
        });
        (
            engine.shared.options.data_parallel,
            engine.concurrent_runs(),
        )
    };
    assert_eq!([1, 2, 8].map(planned), [(1, 2), (2, 1), (2, 1)]);
}

#[test]
fn a_job_that_ran_out_of_memory_says_so() {
    let full = candle_core::Error::Cuda(Box::new(OutOfMemory("the GPU is out of memory".into())));
    let other = candle_core::Error::Msg("an illegal address".into());
    let no_plan = TrainError::NoPlan {
        needed_mib: 2,
        available_mib: 1,
    };
    let reasons =
        [TrainError::Tensor(full), no_plan, TrainError::Tensor(other)].map(|e| explain(&e).reason);
    assert_eq!(
        reasons,
        [
            Reason::OutOfMemory,
            Reason::OutOfMemory,
            Reason::DeviceFailed
        ]
    );
}
