//! Several servers on one PostgreSQL and one S3 store: each queued job runs exactly once, workers
//! die or freeze, and backends become unavailable.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use bradley::rpc::client::{Client, FirstEvent};
use bradley::rpc::pb;
use bradley::rpc::pb::training_event::Event;
use tonic::Code;
use tonic_types::StatusExt;

use crate::backends::{Postgres, S3, signal};
use crate::server::{
    Server, checkpoints_folder, create, finish, get, id, job, losses, pairs, score, scored, state,
    submit, upload,
};
use crate::store_safety::files;
use crate::support::golden;
use crate::wait::{holds_for, until};

/// Starts a replica with short leases.
fn replica(dir: &Path, postgres: &Postgres, s3: &S3) -> Server {
    let url = postgres.url();
    let flags = [
        "--database-url",
        &url,
        "--artifact-url",
        "s3://bradley/runs",
        "--lease",
        "3",
    ];
    let environment = s3.environment();
    let environment: Vec<(&str, &str)> =
        environment.iter().map(|(k, v)| (*k, v.as_str())).collect();
    Server::start_in(
        dir,
        &format!("tiny={}", golden("models/llama").display()),
        &flags,
        &environment,
    )
}

/// Returns a job that saves every ten steps and keeps two checkpoints.
pub fn checkpointing(dataset: &str, steps: u64) -> pb::TrainingJob {
    let mut wanted = job(dataset, steps);
    wanted.run = Some(pb::RunConfig {
        save_steps: Some(10),
        save_total_limit: Some(2),
        ..Default::default()
    });
    wanted
}

fn step_of(e: &pb::TrainingEvent) -> Option<u64> {
    match &e.event {
        Some(Event::StepMetrics(s)) => Some(s.step),
        _ => None,
    }
}

/// Returns the states that a job has reached, with the reasons.
fn changes(events: &[pb::TrainingEvent]) -> Vec<(pb::JobState, String)> {
    let change = |e: &pb::TrainingEvent| match &e.event {
        Some(Event::StateChange(s)) => Some((s.to(), s.reason.clone())),
        _ => None,
    };
    events.iter().filter_map(change).collect()
}

/// Checks the events of a job that has succeeded: their numbers have no gap, it succeeds once, and
/// steps are repeated only after it was queued again.
pub fn check_history(events: &[pb::TrainingEvent]) {
    assert!(
        events
            .iter()
            .enumerate()
            .all(|(i, e)| e.sequence == i as u64 + 1),
        "the sequence numbers have a gap"
    );
    let ends = changes(events)
        .iter()
        .filter(|(to, _)| *to == pb::JobState::Succeeded)
        .count();
    assert_eq!(ends, 1, "a job must succeed exactly once");
    let (mut last, mut restarted) = (0, false);
    for e in events {
        match (&e.event, step_of(e)) {
            (Some(Event::StateChange(s)), _) if s.to() == pb::JobState::Queued => restarted = true,
            (_, Some(step)) => {
                assert!(
                    step == last + 1 || (restarted && step <= last),
                    "step {step} after step {last}: two workers ran the job at the same time"
                );
                (last, restarted) = (step, false);
            }
            _ => {}
        }
    }
}

/// Returns the adapter of a job's last checkpoint.
pub async fn adapter(client: &Client, job: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let name = format!("{job}/checkpoints/latest");
    client
        .download_checkpoint(&name, pb::ExportFormat::Adapter, dir.path())
        .await
        .unwrap();
    std::fs::read(dir.path().join("adapter_model.safetensors")).unwrap()
}

/// Returns losses and adapter of a [`checkpointing`] job that nothing disturbs, on a server of its
/// own with SQLite.
pub async fn undisturbed(steps: u64) -> (BTreeMap<u64, u64>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, checkpointing(&dataset.name, steps)).await;
    let events = finish(&client, &name).await;
    (losses(&events), adapter(&client, &name).await)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn twenty_jobs_on_two_replicas_succeed_exactly_once_though_one_replica_is_killed() {
    let (postgres, s3) = (Postgres::start(), S3::start());
    let (expected, weights) = undisturbed(60).await;
    let (dir_a, dir_b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut a = replica(dir_a.path(), &postgres, &s3);
    let b = replica(dir_b.path(), &postgres, &s3);
    let (client_a, client_b) = (a.client().await, b.client().await);
    let dataset = upload(&client_a, "pairs.jsonl").await;
    let mut jobs = Vec::new();
    for i in 0..20 {
        let client = if i % 2 == 0 { &client_a } else { &client_b };
        jobs.push(submit(client, checkpointing(&dataset.name, 60)).await);
    }
    until(
        "the end of 8 of 20 jobs",
        Duration::from_secs(120),
        async || {
            let mut done = 0;
            for name in &jobs {
                done += usize::from(state(&client_b, name).await == pb::JobState::Succeeded);
            }
            done >= 8
        },
    )
    .await;
    // Kills a replica while it runs a job. It is stopped first, and goes on if its job is about to
    // end.
    until(
        "a job of the replica",
        Duration::from_secs(120),
        async || {
            let metrics = a.metrics();
            let Some(name) = jobs.iter().find(|name| metrics.contains(id(name))) else {
                return false;
            };
            signal(a.pid(), libc::SIGSTOP);
            let job = get(&client_b, name).await;
            let is_running = job.state() == pb::JobState::Running;
            let runs = is_running && job.progress.unwrap_or_default().step < 50;
            if !runs {
                signal(a.pid(), libc::SIGCONT);
            }
            runs
        },
    )
    .await;
    a.kill();
    let mut recovered = 0;
    for name in &jobs {
        let events = finish(&client_b, name).await;
        assert_eq!(
            state(&client_b, name).await,
            pb::JobState::Succeeded,
            "{:?}",
            changes(&events)
        );
        check_history(&events);
        assert_eq!(
            losses(&events),
            expected,
            "other losses than those of an undisturbed run"
        );
        assert!(
            adapter(&client_b, name).await == weights,
            "other weights than those of an undisturbed run"
        );
        recovered += changes(&events)
            .iter()
            .filter(|(_, reason)| reason.contains("worker is gone"))
            .count();
    }
    assert_eq!(
        recovered, 1,
        "the job of the killed server must be taken over, and no other"
    );
    // A checkpoint can be scored on a replica that may not have trained it.
    let policy = format!("{}/checkpoints/latest", jobs[0]);
    assert!(
        score(&client_b, &policy, pairs())
            .await
            .results
            .iter()
            .all(|r| scored(r).probability > 0.0)
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn a_frozen_worker_writes_nothing_after_its_lease_was_taken() {
    let (postgres, s3) = (Postgres::start(), S3::start());
    let (expected, weights) = undisturbed(400).await;
    let (dir_a, dir_b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a = replica(dir_a.path(), &postgres, &s3);
    let client_a = a.client().await;
    let dataset = upload(&client_a, "pairs.jsonl").await;
    let name = submit(&client_a, checkpointing(&dataset.name, 400)).await;
    // The other replica follows the events of a job that it does not run, as they come.
    let b = replica(dir_b.path(), &postgres, &s3);
    let client_b = b.client().await;
    let follow = client_b.follow(&name, 0, |e| step_of(&e).is_none_or(|step| step < 25));
    tokio::time::timeout(Duration::from_secs(60), follow)
        .await
        .expect("the event does not come")
        .unwrap();
    signal(a.pid(), libc::SIGSTOP);
    let events = finish(&client_b, &name).await;
    signal(a.pid(), libc::SIGCONT);
    check_history(&events);
    assert!(
        changes(&events)
            .iter()
            .any(|(_, reason)| reason.contains("worker is gone")),
        "{:?}",
        changes(&events)
    );
    assert_eq!(losses(&events), expected);
    // The thawed replica notices that it lost the lease, stops the run, writes nothing, and
    // continues to serve.
    until(
        "the end of the thawed run",
        Duration::from_secs(60),
        async || !a.metrics().contains(id(&name)),
    )
    .await;
    assert_eq!(
        finish(&client_a, &name).await,
        events,
        "something was written after the end"
    );
    assert!(
        adapter(&client_b, &name).await == weights && adapter(&client_a, &name).await == weights
    );
    let next = submit(&client_a, checkpointing(&dataset.name, 20)).await;
    finish(&client_a, &next).await;
    assert_eq!(state(&client_b, &next).await, pb::JobState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn a_client_of_one_replica_commands_a_job_on_another() {
    let (postgres, s3) = (Postgres::start(), S3::start());
    let (dir_a, dir_b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a = replica(dir_a.path(), &postgres, &s3);
    let client_a = a.client().await;
    let dataset = upload(&client_a, "pairs.jsonl").await;
    let name = submit(&client_a, checkpointing(&dataset.name, 100_000)).await;
    until(
        "the start of the run",
        Duration::from_secs(60),
        async || state(&client_a, &name).await == pb::JobState::Running,
    )
    .await;
    let b = replica(dir_b.path(), &postgres, &s3);
    let client_b = b.client().await;
    client_b
        .training()
        .pause_training_job(pb::PauseTrainingJobRequest { name: name.clone() })
        .await
        .unwrap();
    until("the pause", Duration::from_secs(60), async || {
        state(&client_b, &name).await == pb::JobState::Paused
    })
    .await;
    client_a
        .training()
        .resume_training_job(pb::ResumeTrainingJobRequest { name: name.clone() })
        .await
        .unwrap();
    until("the continued run", Duration::from_secs(60), async || {
        state(&client_a, &name).await == pb::JobState::Running
    })
    .await;
    client_b
        .training()
        .cancel_training_job(pb::CancelTrainingJobRequest { name: name.clone() })
        .await
        .unwrap();
    until("the cancellation", Duration::from_secs(60), async || {
        state(&client_b, &name).await == pb::JobState::Cancelled
    })
    .await;
    // The newest events are those of the cancellation.
    let mut newest = Vec::new();
    let tail = client_b.follow_from(&name, FirstEvent::Tail(2), |event| {
        newest.push(event);
        true
    });
    tokio::time::timeout(Duration::from_secs(60), tail)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(newest.len(), 2, "{newest:?}");
    assert_eq!(changes(&newest).last().unwrap().0, pb::JobState::Cancelled);
    let doctor = std::process::Command::new(crate::support::binary())
        .args([
            "doctor",
            "--http-listen",
            "off",
            "--database-url",
            &postgres.url(),
        ])
        .args(["--artifact-url", "file:///"])
        .output()
        .unwrap();
    let found = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(
        found.contains("ok       database: PostgreSQL, 1 jobs, schema"),
        "{found}"
    );
    // A job deleted on one replica is gone from both, including its objects.
    assert!(!s3.keys("runs/jobs").is_empty());
    client_b
        .training()
        .delete_training_job(pb::DeleteTrainingJobRequest { name: name.clone() })
        .await
        .unwrap();
    let gone = client_a
        .training()
        .get_training_job(pb::GetTrainingJobRequest { name })
        .await
        .unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    assert_eq!(s3.keys("runs/jobs"), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn a_run_waits_for_its_database_and_its_artifact_store() {
    let (mut postgres, s3) = (Postgres::start(), S3::start());
    let (expected, weights) = undisturbed(400).await;
    let dir = tempfile::tempdir().unwrap();
    let server = replica(dir.path(), &postgres, &s3);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, checkpointing(&dataset.name, 400)).await;
    let reaches = async |step: u64| {
        let follow = client.follow(&name, 0, |e| step_of(&e).is_none_or(|s| s < step));
        tokio::time::timeout(Duration::from_secs(60), follow)
            .await
            .expect("the event does not come")
            .unwrap();
    };
    reaches(15).await;
    // Scoring with a base model needs neither backend.
    let scores = async || {
        let results = score(&client, "models/tiny", pairs()).await.results;
        results.iter().all(|r| scored(r).probability > 0.0)
    };
    s3.freeze();
    holds_for("scoring without S3", Duration::from_secs(3), &scores).await;
    s3.thaw();
    reaches(45).await;
    postgres.crash();
    let away = client
        .training()
        .get_training_job(pb::GetTrainingJobRequest { name: name.clone() })
        .await
        .unwrap_err();
    assert_eq!(away.code(), Code::Unavailable, "{away}");
    assert!(away.get_details_retry_info().is_some());
    holds_for(
        "scoring without PostgreSQL",
        Duration::from_secs(4),
        &scores,
    )
    .await;
    // The server stays ready, and says so before a probe's time limit. Some answers of a busy
    // machine may come later.
    let mut ready = String::new();
    until("a quick answer", Duration::from_secs(60), async || {
        let start = std::time::Instant::now();
        ready = server.http_get("/readyz?verbose");
        start.elapsed() < Duration::from_secs(3)
    })
    .await;
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    assert!(ready.contains("[-] database: does not answer"), "{ready}");
    assert!(
        ready.ends_with("ok, but the database does not answer\n"),
        "{ready}"
    );
    postgres.resume();
    let events = finish(&client, &name).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Succeeded);
    check_history(&events);
    assert_eq!(losses(&events), expected);
    assert!(adapter(&client, &name).await == weights);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn a_job_waits_for_a_lost_checkpoint_and_fetches_a_damaged_copy_again() {
    let (postgres, s3) = (Postgres::start(), S3::start());
    let (expected, weights) = undisturbed(400).await;
    let dir = tempfile::tempdir().unwrap();
    let mut server = replica(dir.path(), &postgres, &s3);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, checkpointing(&dataset.name, 400)).await;
    let follow = client.follow(
        &name,
        0,
        |e| !matches!(&e.event, Some(Event::CheckpointCreated(c)) if c.step >= 20),
    );
    tokio::time::timeout(Duration::from_secs(60), follow)
        .await
        .expect("the event does not come")
        .unwrap();
    // A killed run may leave an unacknowledged folder; a paused run leaves none.
    client
        .training()
        .pause_training_job(pb::PauseTrainingJobRequest { name: name.clone() })
        .await
        .unwrap();
    until("the pause", Duration::from_secs(60), async || {
        state(&client, &name).await == pb::JobState::Paused
    })
    .await;
    server.kill();
    let folder = checkpoints_folder(dir.path(), &name);
    let mut steps: Vec<u64> = std::fs::read_dir(&folder)
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok())
        .collect();
    steps.sort();
    // The newest checkpoint is lost here and in the store. The local copy of the one before is
    // damaged.
    let [.., before, newest] = steps[..] else {
        panic!("two checkpoints are needed: {steps:?}")
    };
    let keys = s3.keys(&format!("runs/jobs/{}/checkpoints/{newest}/", id(&name)));
    assert!(
        keys.iter()
            .any(|k| k.ends_with("adapter_model.safetensors")),
        "{keys:?}"
    );
    keys.iter().for_each(|key| s3.remove(key));
    std::fs::remove_dir_all(folder.join(newest.to_string())).unwrap();
    let damaged = folder
        .join(before.to_string())
        .join("optimizer.safetensors");
    std::fs::write(damaged, b"damage").unwrap();

    let server = replica(dir.path(), &postgres, &s3);
    let client = server.client().await;
    client
        .training()
        .resume_training_job(pb::ResumeTrainingJobRequest { name: name.clone() })
        .await
        .unwrap();
    // A checkpoint that is missing from the store may come back. The job waits for it until its
    // owner decides to continue without it.
    until("the wait", Duration::from_secs(30), async || {
        let job = get(&client, &name).await;
        job.state() == pb::JobState::Queued
            && job
                .error
                .is_some_and(|e| e.message.contains("not in the artifact store"))
    })
    .await;
    let lost = format!("{name}/checkpoints/{newest}");
    client
        .checkpoints()
        .delete_checkpoint(pb::DeleteCheckpointRequest { name: lost })
        .await
        .unwrap();
    let events = finish(&client, &name).await;
    assert_eq!(
        state(&client, &name).await,
        pb::JobState::Succeeded,
        "{:?}",
        changes(&events)
    );
    let from = format!("continues from step {before}");
    assert!(
        changes(&events)
            .iter()
            .any(|(to, reason)| *to == pb::JobState::Running && *reason == from),
        "{:?}",
        changes(&events)
    );
    assert_eq!(losses(&events), expected);
    assert!(adapter(&client, &name).await == weights);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_folder_serves_as_the_artifact_store() {
    let (dir, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let url = format!("file://{}", shared.path().display());
    let server = Server::start_with(
        dir.path(),
        &format!("tiny={}", golden("models/llama").display()),
        &["--artifact-url", &url],
    );
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let first = submit(&client, checkpointing(&dataset.name, 40)).await;
    finish(&client, &first).await;
    let stored: Vec<_> = std::fs::read_dir(checkpoints_folder(shared.path(), &first))
        .unwrap()
        .collect();
    assert!(stored.len() >= 2, "{stored:?}");
    // The local copies are not needed.
    std::fs::remove_dir_all(dir.path().join("jobs").join(id(&first))).unwrap();
    let mut second = checkpointing(&dataset.name, 10);
    second.policy = format!("{first}/checkpoints/latest");
    second.reference = "models/tiny".into();
    let second = submit(&client, second).await;
    finish(&client, &second).await;
    assert_eq!(state(&client, &second).await, pb::JobState::Succeeded);
    let name = format!("{second}/checkpoints/latest");
    let export = pb::ExportCheckpointRequest {
        name: name.clone(),
        format: pb::ExportFormat::Adapter.into(),
        ..Default::default()
    };
    let export = client
        .checkpoints()
        .export_checkpoint(export)
        .await
        .unwrap()
        .into_inner();
    let exported = shared
        .path()
        .join(&export.path)
        .join("adapter_model.safetensors");
    assert!(
        export.path.starts_with("jobs/") && exported.is_file(),
        "{}",
        export.path
    );

    // The job that a finished job was continued from may be deleted, unless it is also its
    // reference: the weights of the finished job can still be used.
    client
        .training()
        .delete_training_job(pb::DeleteTrainingJobRequest {
            name: first.clone(),
        })
        .await
        .unwrap();
    let objects = |job: &str| files(&shared.path().join("jobs").join(id(job))).len();
    assert_eq!(objects(&first), 0);
    assert!(!adapter(&client, &second).await.is_empty());
    client
        .training()
        .delete_training_job(pb::DeleteTrainingJobRequest {
            name: second.clone(),
        })
        .await
        .unwrap();
    assert_eq!(objects(&second), 0);
    client
        .datasets()
        .delete_dataset(pb::DeleteDatasetRequest { name: dataset.name })
        .await
        .unwrap();
    assert_eq!(files(&shared.path().join("datasets")).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn a_new_job_and_the_deletion_of_what_it_needs_exclude_each_other() {
    let (postgres, s3) = (Postgres::start(), S3::start());
    let (dir_a, dir_b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (a, b) = (
        replica(dir_a.path(), &postgres, &s3),
        replica(dir_b.path(), &postgres, &s3),
    );
    let (client_a, client_b) = (a.client().await, b.client().await);
    // Numbers of datasets that stayed because a job needs them, and of those that were deleted
    // before their job could be created.
    let mut outcomes = [0, 0];
    for i in 0..24_u64 {
        let dataset = upload(&client_a, "pairs.jsonl").await.name;
        let creation = async {
            // From nothing to a fifth of a second, so that some deletions are earlier on a slow
            // machine, too.
            tokio::time::sleep(Duration::from_micros(i * i * 400)).await;
            create(&client_a, job(&dataset, 1)).await
        };
        let deletion = async {
            client_b
                .datasets()
                .delete_dataset(pb::DeleteDatasetRequest {
                    name: dataset.clone(),
                })
                .await
        };
        match tokio::join!(creation, deletion) {
            (Ok(created), Err(refused)) => {
                assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
                let name = created.name;
                finish(&client_b, &name).await;
                assert_eq!(state(&client_b, &name).await, pb::JobState::Succeeded);
                outcomes[0] += 1;
            }
            (Err(refused), Ok(_)) => {
                assert_eq!(refused.code(), Code::NotFound, "{refused}");
                outcomes[1] += 1;
            }
            (Ok(created), Ok(_)) => {
                // The dataset was deleted after the end of the job, which is no conflict.
                let name = created.name;
                assert_eq!(
                    state(&client_a, &name).await,
                    pb::JobState::Succeeded,
                    "the dataset of an unfinished job is gone"
                );
            }
            (Err(a), Err(b)) => panic!("{a}; {b}"),
        }
    }
    assert!(outcomes[1] > 0, "no deletion came first: {outcomes:?}");
}
