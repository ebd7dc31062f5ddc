//! Faults of a GPU that only the emulator can cause: memory that runs out, a lost device, a cuBLAS
//! that rounds. tests/cuda/device excludes these tests on a real GPU by the module's name.

use std::time::Duration;

use bradley::model::device::ComputeDevice;
use bradley::rpc::pb::{self, training_event::Event};

use super::{gpu_name, losses};
use crate::server::{Server, finish, get, job, state, steps, submit, upload};
use crate::support::{device, golden};
use crate::wait::until;

/// Returns the name of the emulated GPU under test, `cuda:N`.
fn emulated_gpu_name() -> String {
    let name = gpu_name();
    let is_emulated =
        matches!(device(), ComputeDevice::Cuda(cuda) if cuda.gpu().name().contains("Emulated"));
    assert!(
        is_emulated,
        "this test needs the emulator (tests/cuda/emulator), not the GPU {name}"
    );
    name
}

#[tokio::test]
#[ignore = "needs the emulator (BRADLEY_TEST_DEVICE)"]
async fn a_run_that_does_not_fit_the_gpu_shortens_its_rows_or_fails() {
    let device = emulated_gpu_name();
    // The memory suffices for rows of one pair but not of two, or not even for one pair. Mapped
    // memory needs other sizes, because it is mapped in larger pieces. In the last case the
    // driver's call that releases memory reports a failure.
    let cases = [
        (46, "0", "0", None),
        (36, "0", "0", Some("out of memory")),
        (46, "1", "0", None),
        (38, "1", "0", Some("out of memory")),
        (44, "1", "1", Some("freeing memory")),
    ];
    for (megabytes, mapping, release_fails, error) in cases {
        let what = format!("{megabytes} MiB, mapping {mapping}, release fails {release_fails}");
        let dir = tempfile::tempdir().unwrap();
        let memory = (megabytes << 20).to_string();
        let flags = ["--device", &device, "--device-memory-limit", "20GiB"];
        let models = format!("tiny={}", golden("models/llama").display());
        let environment = [
            ("EMULATE_MEMORY", &*memory),
            ("EMULATE_MAPPING", mapping),
            ("EMULATE_RELEASE_FAILS", release_fails),
        ];
        let server = Server::start_in(dir.path(), &models, &flags, &environment);
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await;
        let job = submit(&client, job(&dataset.name, 3)).await;
        let events = finish(&client, &job).await;
        let logs: Vec<&str> = events
            .iter()
            .filter_map(|e| {
                if let Some(Event::Log(l)) = &e.event {
                    Some(l.message.as_str())
                } else {
                    None
                }
            })
            .collect();
        let shortened = logs
            .iter()
            .any(|l| l.contains("out of memory") && l.contains("going on with rows of"));
        assert!(
            shortened || error == Some("freeing memory"),
            "{what}: {logs:?}"
        );
        let ended = get(&client, &job).await;
        let expected = if error.is_none() {
            pb::JobState::Succeeded
        } else {
            pb::JobState::Failed
        };
        assert_eq!(ended.state(), expected, "{what}: {:?}", ended.error);
        assert_eq!(losses(&events).len() == 3, error.is_none(), "{what}");
        if let Some(error) = error {
            assert!(ended.error.unwrap().message.contains(error), "{what}");
        }
    }
}

#[tokio::test]
#[ignore = "needs the emulator (BRADLEY_TEST_DEVICE)"]
async fn a_lost_gpu_ends_the_process_and_the_next_process_continues_the_job() {
    let device = emulated_gpu_name();
    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", golden("models/llama").display());
    let flags = ["--device", &device];
    let mut server = Server::start_in(
        dir.path(),
        &models,
        &flags,
        &[("EMULATE_LOST_AFTER", "400"), ("EMULATE_MAPPING", "1")],
    );
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let mut wanted = job(&dataset.name, 14);
    wanted.run = Some(pb::RunConfig {
        save_steps: Some(2),
        ..Default::default()
    });
    let job = submit(&client, wanted).await;
    until(
        "the end of a server without its GPU",
        Duration::from_secs(180),
        async || server.exit_status().is_some(),
    )
    .await;
    let server = Server::start_with(dir.path(), &models, &flags);
    let events = finish(&server.client().await, &job).await;
    assert_eq!(
        state(&server.client().await, &job).await,
        pb::JobState::Succeeded
    );
    let steps = steps(&events);
    assert!(
        steps.ends_with(&[13, 14]) && steps.contains(&1),
        "{steps:?}"
    );
}

#[test]
#[ignore = "needs the emulator (BRADLEY_TEST_DEVICE)"]
fn a_gpu_that_rounds_the_operands_of_f32_gemms_is_refused() {
    let device = emulated_gpu_name();
    let out = std::process::Command::new(crate::support::binary())
        .args([
            "serve",
            "--models",
            &format!("tiny={}", golden("models/llama").display()),
            "--device",
            &device,
            "--listen",
            "127.0.0.1:0",
        ])
        .env("EMULATE_TF32", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && said.contains("NVIDIA_TF32_OVERRIDE"),
        "{said}"
    );
}
