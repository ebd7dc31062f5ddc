//! Several devices in one process: a run on each, or one run on all. `cpu,cpu` is two workers on
//! this machine's cores. In the CUDA build with the emulator's libraries
//! (BRADLEY_TEST_DEVICE=cuda:N) there are two emulated GPUs; neither can access the other's memory.

use std::time::Duration;

use bradley::engine::{self, api::EngineOptions};
use bradley::formats::loader::load_model;
use bradley::model::device::DeviceChoice;
use bradley::rpc::pb::{self, training_event::Event};

use crate::server::{Server, finish, job, pairs, score, scored, state, submit, upload};
use crate::support::{assert_close, device, golden};
use crate::wait::until;

/// Maximum time for a job to reach a state.
const PATIENCE: Duration = Duration::from_secs(90);

/// Value of `--device`, and the environment of a server with these devices.
type Devices = (&'static str, &'static [(&'static str, &'static str)]);

const TWO_EMULATED: Devices = ("cuda:0,cuda:1", &[("EMULATE_DEVICES", "2")]);

/// The same with mapped memory, as GPUs have it, and with kernels that run only when something
/// waits for them.
const TWO_EMULATED_LATE: Devices = (
    "cuda:0,cuda:1",
    &[
        ("EMULATE_DEVICES", "2"),
        ("EMULATE_MAPPING", "1"),
        ("EMULATE_LATE", "1"),
    ],
);

/// Returns two devices of each available kind.
fn device_pairs() -> Vec<Devices> {
    let mut pairs: Vec<Devices> = vec![("cpu,cpu", &[])];
    if format!("{:?}", device()).contains("Emulated") {
        pairs.extend([TWO_EMULATED, TWO_EMULATED_LATE]);
    }
    pairs
}

fn start(dir: &std::path::Path, (devices, environment): Devices, more: &[&str]) -> Server {
    let models = format!("tiny={}", golden("models/llama").display());
    let flags = [&["--device", devices], more].concat();
    Server::start_in(dir, &models, &flags, environment)
}

#[tokio::test]
async fn each_device_trains_a_job_and_scores_its_weights() {
    for devices in device_pairs() {
        let dir = tempfile::tempdir().unwrap();
        let mut server = start(dir.path(), devices, &[]);
        let client = server.client().await;
        let models = client
            .models()
            .list_models(pb::ListModelsRequest::default())
            .await
            .unwrap()
            .into_inner()
            .models;
        assert_eq!(models[0].device, devices.0);
        let dataset = upload(&client, "pairs.jsonl").await;
        let endless = |rate| {
            let optimizer = Some(pb::OptimizerConfig {
                learning_rate: Some(rate),
                ..Default::default()
            });
            pb::TrainingJob {
                optimizer,
                ..job(&dataset.name, 100_000)
            }
        };
        let jobs = [
            submit(&client, endless(1e-2)).await,
            submit(&client, endless(1e-20)).await,
        ];
        // A third job waits, because there are two devices.
        let third = submit(&client, job(&dataset.name, 2)).await;
        until("both run", PATIENCE, async || {
            state(&client, &jobs[0]).await == pb::JobState::Running
                && state(&client, &jobs[1]).await == pb::JobState::Running
        })
        .await;
        assert_eq!(state(&client, &third).await, pb::JobState::Queued);
        // Weights in training are scored by the worker that trains them: those of the first job by
        // one worker; those of the second, which its learning rate leaves as they are, by the
        // other. A base model is scored by either.
        until("the first one has learnt", PATIENCE, async || {
            let results = score(&client, &format!("{}/checkpoints/latest", jobs[0]), pairs())
                .await
                .results;
            results.iter().any(|r| scored(r).margin.abs() > 1e-3)
        })
        .await;
        for policy in [
            format!("{}/checkpoints/latest", jobs[1]),
            "models/tiny".into(),
        ] {
            let results = score(&client, &policy, pairs()).await.results;
            assert!(
                results.iter().all(|r| scored(r).margin.abs() < 1e-6),
                "{policy} has changed"
            );
        }
        // Units of work are counted for each device, because an alert compares the number of
        // devices that train with the number of running jobs.
        let metrics = server.metrics();
        let training = metrics
            .lines()
            .filter(|l| l.starts_with("bradley_training_unit_seconds_count{device="));
        let of_each: Vec<&str> = training.collect();
        assert_eq!(of_each.len(), 2, "{of_each:?}");
        client
            .training()
            .cancel_training_job(pb::CancelTrainingJobRequest {
                name: jobs[0].clone(),
            })
            .await
            .unwrap();
        finish(&client, &third).await;
        assert_eq!(state(&client, &third).await, pb::JobState::Succeeded);
        assert_eq!(
            state(&client, &jobs[1]).await,
            pb::JobState::Running,
            "the end of the other job has stopped it"
        );
        assert!(server.terminate(Duration::from_secs(60)).success());
    }
}

#[tokio::test]
async fn a_job_of_a_higher_priority_preempts_the_job_of_the_lowest() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path(), ("cpu,cpu", &[]), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let with = |priority, steps| pb::TrainingJob {
        priority,
        ..job(&dataset.name, steps)
    };
    let (low, middle) = (
        submit(&client, with(0, 100_000)).await,
        submit(&client, with(1, 100_000)).await,
    );
    until("both run", PATIENCE, async || {
        state(&client, &low).await == pb::JobState::Running
            && state(&client, &middle).await == pb::JobState::Running
    })
    .await;
    let high = submit(&client, with(2, 100_000)).await;
    until("it runs", PATIENCE, async || {
        state(&client, &high).await == pb::JobState::Running
    })
    .await;
    until("the lowest waits", PATIENCE, async || {
        state(&client, &low).await == pb::JobState::Queued
    })
    .await;
    assert_eq!(state(&client, &middle).await, pb::JobState::Running);
}

/// Returns the losses and gradient norms of 8 steps in rows of at most 48 tokens, and the margins
/// after them.
async fn train_and_score(devices: Devices, more: &[&str]) -> (Vec<[f64; 2]>, Vec<f64>) {
    let dir = tempfile::tempdir().unwrap();
    let server = start(dir.path(), devices, more);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let mut wanted = job(&dataset.name, 8);
    if let Some(batch) = &mut wanted.batch {
        (batch.batch_size, batch.row_tokens) = (Some(5), Some(48));
    }
    let name = submit(&client, wanted).await;
    let events = finish(&client, &name).await;
    let step = |e: &pb::TrainingEvent| match &e.event {
        Some(Event::StepMetrics(s)) => Some([s.metrics["loss"], s.metrics["grad_norm"]]),
        _ => None,
    };
    let results = score(&client, &format!("{name}/checkpoints/latest"), pairs())
        .await
        .results;
    (
        events.iter().filter_map(step).collect(),
        results.iter().map(|r| scored(r).margin).collect(),
    )
}

#[tokio::test]
async fn a_run_on_two_devices_learns_what_it_learns_on_one_and_repeats_bit_for_bit() {
    for devices in device_pairs() {
        let alone = train_and_score((devices.0.split(',').next().unwrap(), devices.1), &[]).await;
        let both = train_and_score(devices, &["--data-parallel", "2"]).await;
        assert_eq!((alone.0.len(), both.0.len()), (8, 8));
        // In the first step all runs have the same weights; only sums of gradients have another
        // order.
        for (i, (one, two)) in alone.0.iter().zip(&both.0).enumerate() {
            assert_close(
                &format!("the loss of step {}", i + 1),
                two[0],
                one[0],
                1e-4,
                0.1,
            );
            assert_close(
                &format!("the gradient's norm in step {}", i + 1),
                two[1],
                one[1],
                1e-3,
                0.1,
            );
        }
        for (one, two) in alone.1.iter().zip(&both.1) {
            assert_close("a margin after training", *two, *one, 1e-3, 0.1);
        }
        assert_ne!(
            alone.0, both.0,
            "two devices add gradients in another order, so some bits must differ"
        );
        assert_eq!(
            both,
            train_and_score(devices, &["--data-parallel", "2"]).await,
            "{}",
            devices.0
        );
    }
}

#[tokio::test]
async fn a_server_starts_without_a_device_that_is_missing_only_when_told_to() {
    let load = || {
        load_model(
            Some("m"),
            golden("models/llama").to_str().unwrap(),
            &Default::default(),
        )
        .unwrap()
    };
    let missing = DeviceChoice::parse("cuda:97").unwrap();
    let here = if device().name() == "cpu" {
        DeviceChoice::Cpu
    } else {
        DeviceChoice::Cuda(0)
    };
    let start = |devices: Vec<DeviceChoice>, skip_missing_devices| {
        engine::start(
            vec![load()],
            EngineOptions {
                devices,
                skip_missing_devices,
                ..EngineOptions::default()
            },
        )
    };
    let refused = start(vec![here, missing], false).err().unwrap().to_string();
    assert!(refused.contains("cuda:97"), "{refused}");
    let started = start(vec![here, missing], true).unwrap();
    assert_eq!(started.models()[0].device, here.to_string());
    started.drain();
    // A server without any device does not start.
    let refused = start(vec![missing], true).err().unwrap().to_string();
    assert!(refused.contains("cuda:97"), "{refused}");
}

#[test]
fn devices_that_do_not_go_together_are_refused() {
    for wrong in ["cpu,cuda:0", "cuda:0,cuda:0", "auto,cpu"] {
        let out = std::process::Command::new(crate::support::binary())
            .args([
                "serve",
                "--models",
                "m=nowhere",
                "--device",
                wrong,
                "--listen",
                "127.0.0.1:0",
            ])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(
            !out.status.success() && said.contains("device") && said.contains(wrong),
            "{wrong}: {said}"
        );
    }
}
