//! Compares passes on a GPU with passes on the CPU, on models that are wide enough for the tensor
//! cores' kernels. BRADLEY_TEST_DEVICE=cuda:N names the GPU; with the libraries of
//! tests/cuda/emulator in LD_LIBRARY_PATH it is emulated on this machine's processor. The golden
//! tests run on that device, too.

mod emulator;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bradley::domain::training::{LoraConfig, Precision, TARGET_MODULES};
use bradley::engine::{self, api::EngineOptions};
use bradley::formats::loader::load_model;
use bradley::formats::peft::save_tensors;
use bradley::formats::source::HubOptions;
use bradley::infer::pack::{PackedRow, pack};
use bradley::infer::pair::SequenceGroup;
use bradley::math::rng::kaiming_uniform;
use bradley::model::adapter::Adapter;
use bradley::model::config::ModelConfig;
use bradley::model::decoder::Policy;
use bradley::model::device::{ComputeDevice, DeviceChoice};
use bradley::model::parameters::Parameters;
use bradley::model::params::LoraTensor;
use bradley::rpc::pb::{self, training_event::Event};
use bradley::train::backprop::{SavePolicy, backward, forward};
use bradley::train::trainable::{StepGradients, TrainablePolicy};
use candle_core::{DType, Device, Tensor};

use crate::server::{Server, finish, job, pairs, score, scored, submit, upload};
use crate::support::{assert_close, device, golden};

/// Returns the name of the GPU under test, `cuda:N`.
fn gpu_name() -> String {
    let name = device().name();
    assert!(
        name != "cpu",
        "this test needs a GPU or the emulator: set the environment variable \
         BRADLEY_TEST_DEVICE to cuda:N"
    );
    name
}

/// Shapes for the tensor cores' kernels: heads of 64 and of 128 dimensions, norms on queries and
/// keys, biases, a window that limits attention, one that does not, and an untied head. The
/// features of further families, such as soft-caps, are in families.rs and random_specs.rs.
const SHAPES: [(&str, &str); 5] = [
    (
        "llama",
        r#""model_type": "llama", "hidden_size": 192,
            "num_attention_heads": 3, "num_key_value_heads": 1"#,
    ),
    (
        "qwen2",
        r#""model_type": "qwen2", "hidden_size": 256,
            "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": false"#,
    ),
    (
        "qwen3",
        r#""model_type": "qwen3", "hidden_size": 160, "head_dim": 128,
            "num_attention_heads": 2, "num_key_value_heads": 1"#,
    ),
    (
        "mistral",
        r#""model_type": "mistral", "hidden_size": 128, "head_dim": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 40"#,
    ),
    (
        "mistral without a window",
        r#""model_type": "mistral", "hidden_size": 128, "head_dim": 64,
            "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 2147483647"#,
    ),
];

/// Returns a policy with random weights in f32 on the CPU. `shape` is a part of its config.json.
fn random_policy(shape: &str, seed: u64) -> Policy {
    let json = format!(
        r#"{{{shape}, "intermediate_size": 224, "num_hidden_layers": 2, "vocab_size": 300,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5}}"#
    );
    let config = ModelConfig::from_hf_json(&json, Path::new("config.json")).unwrap();
    let parameters = Parameters::build(&config, |param| {
        let (name, shape) = (param.name(), param.shape.as_slice());
        let mut values = kaiming_uniform(
            seed,
            name,
            shape.iter().product(),
            shape[shape.len() - 1].min(160),
        );
        match (shape.len(), name.contains("norm")) {
            (1, true) => values.iter_mut().for_each(|x| *x += 1.0),
            // Makes scores differ: the gradient of uniform attention consists of rounding errors.
            (2, _) => values.iter_mut().for_each(|x| *x *= 1.7),
            _ => {}
        }
        Tensor::from_vec(values, shape, &Device::Cpu)
    });
    Policy {
        config: Arc::new(config),
        parameters: Arc::new(parameters.unwrap()),
        adapter: None,
        precision: Precision::F32,
        device: ComputeDevice::Cpu,
        helpers: Arc::default(),
    }
}

/// Returns a row of two pairs and one prompt with three answers. The prompts of the pairs are
/// longer than a tile of attention (64 tokens).
fn row() -> PackedRow {
    let ids = |n: usize, seed: usize| {
        (0..n)
            .map(|i| ((i * 31 + seed * 17) % 300) as u32)
            .collect::<Vec<u32>>()
    };
    let group = |prompt, answers: &[usize]| SequenceGroup {
        prompt: ids(prompt, prompt),
        completions: answers.iter().map(|n| ids(*n, n + prompt)).collect(),
    };
    let groups = [
        group(70, &[5, 66]),
        group(3, &[1, 4, 9]),
        group(130, &[30, 2]),
    ];
    pack(&groups.iter().map(std::slice::from_ref).collect::<Vec<_>>())
}

fn adapter(policy: &Policy) -> Adapter {
    let config = LoraConfig {
        rank: 8,
        target_modules: TARGET_MODULES.map(str::to_owned).to_vec(),
        ..LoraConfig::default()
    };
    // Small updates, as in training: a large random one makes gradients that are mostly rounding
    // errors.
    let values = |tensor: &LoraTensor| {
        let values = kaiming_uniform(7, &tensor.name, tensor.elements(), tensor.shape[1])
            .iter()
            .map(|x| x * 0.3)
            .collect();
        Tensor::from_vec(values, &tensor.shape, &Device::Cpu)
    };
    Adapter::build(&policy.config, &config, values).unwrap()
}

/// Runs a row forward, and backward with an upstream gradient that differs from token to token.
/// Returns the log-probs and the gradients.
fn passes(
    policy: &TrainablePolicy,
    row: &PackedRow,
    save: SavePolicy,
) -> (Vec<f32>, Vec<Vec<f32>>) {
    let tape = forward(&policy.policy, row.row.clone(), save, &mut || {}).unwrap();
    let logps = tape.log_probs().to_vec();
    let upstream: Vec<f32> = (0..logps.len())
        .map(|i| ((i % 7) as f32 + 1.0) / 40.0)
        .collect();
    let mut gradients = StepGradients::zeros(policy);
    backward(&policy.policy, tape, &upstream, &mut gradients, &mut || {}).unwrap();
    gradients.collect().unwrap();
    (logps, gradients.values().to_vec())
}

/// Returns ‖a − b‖ / ‖b‖.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let (mut difference, mut norm) = (0f64, 0f64);
    for (x, y) in a.iter().zip(b) {
        difference += (*x as f64 - *y as f64).powi(2);
        norm += (*y as f64).powi(2);
    }
    (difference / norm.max(1e-30)).sqrt()
}

#[test]
#[ignore = "needs a GPU or the emulator (BRADLEY_TEST_DEVICE)"]
fn a_gpu_computes_what_the_cpu_computes() {
    gpu_name();
    let row = row();
    for (name, shape) in SHAPES {
        let base = random_policy(shape, 1);
        let on_cpu = Policy {
            parameters: Arc::new(rounded(&base.parameters)),
            ..base
        };
        let on_gpu = Policy {
            device: device(),
            ..on_cpu.clone()
        };
        let adapter = adapter(&on_cpu);
        // In bf16 the gradient of a single tensor may consist of rounding errors of numbers that
        // cancel, on the CPU too. So in bf16 only all gradients together are compared.
        for (precision, logp_tolerance, gradient_tolerance) in
            [(Precision::F32, 1e-5, 1e-4), (Precision::Bf16, 1e-2, 5e-2)]
        {
            for full in [false, true] {
                let trainable = |policy: &Policy, precision| match full {
                    true => TrainablePolicy::full(policy, precision).unwrap(),
                    false => TrainablePolicy::lora(policy, &adapter, precision).unwrap(),
                };
                let (expected_logps, expected_gradients) =
                    passes(&trainable(&on_cpu, Precision::F32), &row, SavePolicy::Tapes);
                let policy = trainable(&on_gpu, precision);
                let (logps, gradients) = passes(&policy, &row, SavePolicy::Tapes);
                let what = format!("{name} {precision:?} full {full}");
                let off = distance(&logps, &expected_logps);
                assert!(
                    off < logp_tolerance,
                    "{what}: the log-probs are off by {off:e}"
                );
                let off = distance(&gradients.concat(), &expected_gradients.concat());
                assert!(
                    off < gradient_tolerance,
                    "{what}: the gradients are off by {off:e}"
                );
                for ((trained, gradient), expected) in policy
                    .trainables
                    .iter()
                    .zip(&gradients)
                    .zip(&expected_gradients)
                    .filter(|_| precision == Precision::F32)
                {
                    let off = distance(gradient, expected);
                    assert!(
                        off < gradient_tolerance,
                        "{what}: the gradient of {} is off by {off:e}",
                        trained.name
                    );
                }
                let recomputed = passes(&policy, &row, SavePolicy::BlockInputs);
                assert!(
                    recomputed == (logps, gradients),
                    "{what}: recomputed blocks give other bits"
                );
            }
        }
    }
}

/// The reference cache distinguishes log-probs by the devices and the cuBLAS that computed them.
#[test]
#[ignore = "needs a GPU or the emulator (BRADLEY_TEST_DEVICE)"]
fn a_policys_arithmetic_names_each_device_and_the_version_of_cublas() {
    gpu_name();
    let ComputeDevice::Cuda(cuda) = device() else {
        panic!("{:?} is no GPU", device())
    };
    let name = cuda.gpu().name();
    let on_cpu = random_policy(SHAPES[0].1, 1);
    let on_gpu = Policy {
        device: device(),
        ..on_cpu.clone()
    };
    let helped = Policy {
        helpers: Arc::new([device()]),
        ..on_cpu.clone()
    };
    let [cpu, gpu, both] = [&on_cpu, &on_gpu, &helped].map(Policy::arithmetic);
    assert!(gpu.contains(name), "{gpu}");
    let version: Vec<char> = gpu
        .split("cuBLAS ")
        .nth(1)
        .unwrap_or_default()
        .chars()
        .take_while(|c| !c.is_whitespace())
        .collect();
    assert!(version.first().is_some_and(char::is_ascii_digit), "{gpu}");
    assert!(
        ![&gpu, &both].contains(&&cpu) && gpu != both,
        "{cpu}; {gpu}; {both}"
    );
    for device in [&cpu, &gpu] {
        let name = device.trim_end_matches(on_cpu.precision.name()).trim();
        assert!(both.contains(name), "{both} does not name {name}");
    }
}

/// Returns weights that bf16 represents exactly, so that both precisions start from the same
/// values.
fn rounded(p: &Parameters) -> Parameters {
    p.map(|_, t| t.to_dtype(DType::BF16)?.to_dtype(DType::F32))
        .unwrap()
}

/// Returns the losses of a job's steps.
fn losses(events: &[pb::TrainingEvent]) -> Vec<f64> {
    let loss = |e: &pb::TrainingEvent| match &e.event {
        Some(Event::StepMetrics(s)) => Some(s.metrics["loss"]),
        _ => None,
    };
    events.iter().filter_map(loss).collect()
}

#[tokio::test]
#[ignore = "needs a GPU or the emulator (BRADLEY_TEST_DEVICE)"]
async fn a_server_on_a_gpu_trains_and_scores_as_one_on_the_cpu() {
    let name = gpu_name();
    let mut outcomes = Vec::new();
    let models = format!("tiny={}", golden("models/llama").display());
    // Also with mapped memory, which a GPU has and the emulator has only when asked, and with
    // kernels that run only when something waits for them.
    for (device, mapping, late) in [
        ("cpu", "0", "0"),
        (&name, "0", "0"),
        (&name, "1", "0"),
        (&name, "1", "1"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let environment = [("EMULATE_MAPPING", mapping), ("EMULATE_LATE", late)];
        let server = Server::start_in(dir.path(), &models, &["--device", device], &environment);
        let client = server.client().await;
        let models = client
            .models()
            .list_models(pb::ListModelsRequest::default())
            .await
            .unwrap()
            .into_inner()
            .models;
        assert_eq!(models[0].device, device);
        let dataset = upload(&client, "pairs.jsonl").await;
        let job = submit(&client, job(&dataset.name, 8)).await;
        let losses = losses(&finish(&client, &job).await);
        assert_eq!(losses.len(), 8);
        let results = score(&client, &format!("{job}/checkpoints/latest"), pairs())
            .await
            .results;
        let gauge = format!("bradley_device_free_bytes{{device=\"{device}\"}}");
        assert_eq!(
            server.metrics().contains(&gauge),
            device != "cpu",
            "only the memory of a GPU is a metric"
        );
        outcomes.push((
            losses,
            results.iter().map(|r| scored(r).margin).collect::<Vec<_>>(),
        ));
    }
    for (i, (cpu, gpu)) in outcomes[0].0.iter().zip(&outcomes[1].0).enumerate() {
        assert_close(
            &format!("the loss of step {}", i + 1),
            *gpu,
            *cpu,
            1e-3,
            0.1,
        );
    }
    for (cpu, gpu) in outcomes[0].1.iter().zip(&outcomes[1].1) {
        assert_close("a margin after training", *gpu, *cpu, 1e-2, 0.1);
    }
    assert_eq!(outcomes[1], outcomes[2], "mapped memory changes some bits");
    assert_eq!(
        outcomes[2], outcomes[3],
        "deferred kernels change some bits"
    );
}

#[tokio::test]
#[ignore = "needs a GPU or the emulator (BRADLEY_TEST_DEVICE)"]
async fn a_server_that_is_stopped_while_its_gpu_works_exits_with_status_0() {
    let device = gpu_name();
    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", golden("models/llama").display());
    // Nobody reads from the client's connection while the test waits for the server, so the call
    // may stay open.
    let mut server = Server::start_with(
        dir.path(),
        &models,
        &["--device", &device, "--drain-timeout", "1"],
    );
    let client = server.client().await;
    score(&client, "models/tiny", pairs()).await;
    // Many new pairs; the caller leaves while they are computed. The busy server must still exit
    // with status 0. A server that does not wait for its device fails this test only by chance: the
    // emulator sets another exit status if its libraries are called during the exit.
    let many = |call: usize| {
        // Other prompts, so that the reference cache has none of them.
        let new_pairs = move |i: usize| {
            pairs().into_iter().map(move |mut p| {
                if let Some(pb::text::Form::Chat(list)) =
                    p.prompt.as_mut().and_then(|t| t.form.as_mut())
                {
                    list.messages
                        .iter_mut()
                        .for_each(|m| m.content += &format!(" {call} {i}"));
                }
                pb::Pair {
                    id: format!("{}-{call}-{i}", p.id),
                    ..p
                }
            })
        };
        score(
            &client,
            "models/tiny",
            (0..20).flat_map(new_pairs).collect(),
        )
    };
    let all = async { tokio::join!(many(0), many(1), many(2), many(3)) };
    let left = tokio::time::timeout(Duration::from_millis(500), all).await;
    assert!(
        server.terminate(Duration::from_secs(180)).success(),
        "after {left:?}"
    );
}

/// Writes a folder with a random model of this shape and the tiny Llama's tokenizer.
fn model_folder(shape: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let policy = random_policy(shape, 1);
    let config = serde_json::to_vec(&policy.config.hf_json).unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    save_tensors(
        &folder.path().join("model.safetensors"),
        &policy.parameters.named(),
    )
    .unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(golden("models/llama").join(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// Starts an engine with the GPU under test, and stops it. Returns the error if it does not start.
fn start_engine(folder: &Path, change: impl FnOnce(&mut EngineOptions)) -> Result<(), String> {
    let model = load_model(Some("m"), folder.to_str().unwrap(), &HubOptions::default()).unwrap();
    let device = DeviceChoice::parse(&gpu_name()).unwrap();
    let mut options = EngineOptions {
        devices: vec![device],
        ..EngineOptions::default()
    };
    change(&mut options);
    engine::start(vec![model], options)
        .map(|engine| engine.drain())
        .map_err(|e| e.to_string())
}

#[test]
#[ignore = "needs a GPU or the emulator (BRADLEY_TEST_DEVICE)"]
fn a_model_whose_heads_are_too_wide_for_the_kernels_is_refused() {
    gpu_name();
    let shape = |width: usize| {
        format!(
            r#""model_type": "qwen3", "hidden_size": 64, "head_dim": {width},
                "num_attention_heads": 1, "num_key_value_heads": 1"#
        )
    };
    let refused = start_engine(model_folder(&shape(512)).path(), |_| {}).unwrap_err();
    assert!(
        refused.contains("head_dim is 512") && refused.contains("--device cpu"),
        "{refused}"
    );
    assert_eq!(
        start_engine(model_folder(&shape(256)).path(), |_| {}),
        Ok(())
    );
}

#[test]
#[ignore = "needs a GPU or the emulator (BRADLEY_TEST_DEVICE)"]
fn a_gpu_has_a_memory_limit_of_its_own() {
    gpu_name();
    let folder = model_folder(SHAPES[0].1);
    // The limit of the host's memory does not apply to the GPU's memory.
    assert_eq!(
        start_engine(folder.path(), |options| options.memory_limit = Some(1)),
        Ok(())
    );
    let refused = start_engine(folder.path(), |options| {
        options.device_memory_limit = Some(1)
    })
    .unwrap_err();
    assert!(refused.contains("raise device_memory_limit"), "{refused}");
}

#[test]
fn a_device_that_is_not_there_is_an_error_that_says_so() {
    let error = ComputeDevice::open(bradley::model::device::DeviceChoice::Cuda(99)).unwrap_err();
    assert!(
        error.contains("driver") || error.contains("no GPU 99"),
        "{error}"
    );
}
