//! SIGKILL and SIGTERM while a job trains: no job and no delivered event is lost, and only the
//! steps since the last checkpoint are repeated. Also probes and a diverging run.

use std::path::Path;
use std::time::Duration;

use bradley::rpc::pb;

use crate::server::{
    Server, checkpoints_folder, finish, get, job, losses, state, steps, submit, succeed, upload,
};
use crate::support::copy_files;

/// Steps of the job that is killed twice. They take about a second, so that the job still runs when
/// a busy machine kills its server late.
const STEPS: u64 = 150;

fn checkpointing(dataset: &str, steps: u64) -> pb::TrainingJob {
    let mut wanted = job(dataset, steps);
    wanted.run = Some(pb::RunConfig {
        save_steps: Some(5),
        ..Default::default()
    });
    wanted
}

/// Follows a job until `enough` returns true for an event. Returns the events up to that one.
async fn events_until(
    client: &bradley::rpc::client::Client,
    name: &str,
    enough: impl Fn(&pb::TrainingEvent) -> bool,
) -> Vec<pb::TrainingEvent> {
    let mut seen = Vec::new();
    let follow = client.follow(name, 0, |e| {
        let stop = enough(&e);
        seen.push(e);
        !stop
    });
    tokio::time::timeout(Duration::from_secs(60), follow)
        .await
        .expect("the event does not come")
        .unwrap();
    seen
}

fn step_of(e: &pb::TrainingEvent) -> Option<u64> {
    match &e.event {
        Some(pb::training_event::Event::StepMetrics(s)) => Some(s.step),
        _ => None,
    }
}

/// Creates a complete checkpoint folder that the database does not know, as a kill before the row
/// is written leaves it.
fn leave_checkpoint_without_row(data_dir: &Path, name: &str, step: u64) {
    let folder = checkpoints_folder(data_dir, name);
    let steps = std::fs::read_dir(&folder)
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().to_str()?.parse::<u64>().ok());
    let newest = steps.max().expect("no checkpoint was written");
    let (from, to) = (
        folder.join(newest.to_string()),
        folder.join(step.to_string()),
    );
    std::fs::create_dir(&to).unwrap();
    copy_files(&from, &to);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_loses_nothing_but_the_steps_since_the_last_checkpoint() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let undisturbed = {
        let server = Server::start(other.path());
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await;
        let name = submit(&client, checkpointing(&dataset.name, STEPS)).await;
        losses(&finish(&client, &name).await)
    };

    let mut server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, checkpointing(&dataset.name, STEPS)).await;
    let waiting = submit(&client, job(&dataset.name, 2)).await;
    let mut delivered = Vec::new();
    for kill_after in [7, 23] {
        let client = server.client().await;
        delivered.extend(events_until(&client, &name, |e| step_of(e) >= Some(kill_after)).await);
        server.kill();
        leave_checkpoint_without_row(&server.data_dir, &name, 3);
        server = Server::start(dir.path());
    }
    let client = server.client().await;
    let all = finish(&client, &name).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Succeeded);
    assert!(
        all.iter()
            .enumerate()
            .all(|(i, e)| e.sequence == i as u64 + 1),
        "the sequence numbers have a gap"
    );
    for e in &delivered {
        assert_eq!(
            Some(e),
            all.get(e.sequence as usize - 1),
            "a delivered event is gone or has changed"
        );
    }
    // After each restart at most the steps since the last multiple of five are repeated.
    let mut last = 0;
    for e in &all {
        if let Some(step) = step_of(e) {
            assert!(
                step == last + 1 || (step <= last && last - step < 6),
                "step {step} after {last}"
            );
            last = step;
        }
    }
    assert_eq!(
        losses(&all),
        undisturbed,
        "other losses than those of an undisturbed run"
    );
    let checkpoints: Vec<u64> = all
        .iter()
        .filter_map(|e| match &e.event {
            Some(pb::training_event::Event::CheckpointCreated(c)) => Some(c.step),
            _ => None,
        })
        .collect();
    assert!(
        checkpoints.iter().all(|step| step % 5 == 0),
        "a checkpoint without a row is reported: {checkpoints:?}"
    );
    assert!(
        !checkpoints_folder(&server.data_dir, &name)
            .join("3")
            .exists(),
        "a checkpoint without a row is not removed"
    );
    finish(&client, &waiting).await;
    assert_eq!(
        state(&client, &waiting).await,
        pb::JobState::Succeeded,
        "the queued job is lost"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains_within_its_deadline_and_the_job_continues() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let mut wanted = job(&dataset.name, 400);
    // No periodic checkpoints, so the drain must write one.
    wanted.run = None;
    let name = submit(&client, wanted).await;
    events_until(&client, &name, |e| step_of(e) >= Some(5)).await;
    let (opened, is_open) = tokio::sync::oneshot::channel();
    let open = {
        let (client, name) = (client.clone(), name.clone());
        tokio::spawn(async move {
            let request = pb::StreamTrainingEventsRequest {
                parent: name,
                after_sequence: 0,
                ..Default::default()
            };
            let mut stream = client
                .training()
                .stream_training_events(request)
                .await
                .unwrap()
                .into_inner();
            opened.send(()).unwrap();
            loop {
                match stream.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return None,
                    Err(e) => return Some(e.code()),
                }
            }
        })
    };
    is_open.await.unwrap();
    // The default of drain_timeout.
    let status = server.terminate(Duration::from_secs(30));
    assert!(status.success(), "{status}");
    assert_eq!(
        open.await.unwrap(),
        Some(tonic::Code::Unavailable),
        "an open stream ends with UNAVAILABLE, so that its client tries another server"
    );

    let server = Server::start(dir.path());
    let client = server.client().await;
    let all = finish(&client, &name).await;
    assert_eq!(
        steps(&all),
        (1..=400).collect::<Vec<_>>(),
        "a step is lost or repeated"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_metrics_answer_on_the_http_port() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    crate::server::score(&client, "models/tiny", crate::server::pairs()).await;
    for (path, expected) in [
        ("/livez", "200 OK"),
        ("/readyz", "200 OK"),
        ("/metrics", "bradley_requests_total"),
        ("/metrics", "bradley_scored_tokens_total"),
    ] {
        let answer = server.http_get(path);
        assert!(answer.contains(expected), "{path}: {answer}");
    }
    assert!(server.metric("bradley_scored_tokens_total ") > Some(0.0));
    assert!(server.data_dir.join("bradley.db").is_file());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_diverges_fails_and_can_be_read_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let mut wild = job(&dataset.name, 3);
    wild.optimizer = Some(pb::OptimizerConfig {
        learning_rate: Some(1e38),
        max_grad_norm: Some(0.0),
        ..Default::default()
    });
    wild.evaluation = Some(pb::training_job::Evaluation::EvalFraction(0.3));
    wild.run = Some(pb::RunConfig {
        eval_steps: Some(1),
        ..Default::default()
    });
    let name = submit(&client, wild).await;
    finish(&client, &name).await;
    let failed = get(&client, &name).await;
    assert_eq!(failed.state(), pb::JobState::Failed);
    server.kill();
    let server = Server::start(dir.path());
    let client = server.client().await;
    assert_eq!(get(&client, &name).await, failed);
    let next = submit(&client, job(&dataset.name, 2)).await;
    succeed(&client, &next).await;
}
