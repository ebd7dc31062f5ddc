//! A database that a newer version has written: this version works with everything in it that it
//! can read. Also a finding as version 0.1 stored it. Newer migrations are in `rollback.rs`.

use std::path::Path;
use std::process::Command;

use bradley::rpc::client::{Client, Status};
use bradley::rpc::pb;
use tonic::Code;

use crate::backends::Postgres;
use crate::replicas::{check_history, checkpointing};
use crate::server::{
    finish, id, is_step, job, losses, reason, state, submit, try_get, until_event, upload,
};
use crate::store_safety::{LIMIT, STEPS, another_succeeds, cancel, expected, pause, replica};
use crate::wait::{until, until_ok};

// ---- columns that a newer version adds or changes

/// Creates a token for an administrator, and returns its text.
fn token(dir: &Path, postgres: &Postgres) -> String {
    let made = Command::new(crate::support::binary())
        .args([
            "--output", "json", "tokens", "create", "--owner", "ops", "--roles", "admin",
        ])
        .args(["--database-url", &postgres.url(), "--data-dir"])
        .arg(dir)
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    made["token"].as_str().unwrap().to_owned()
}

/// Repeats a call while the answer is UNAVAILABLE.
async fn retried<T>(call: impl AsyncFn() -> Result<T, Status>) -> T {
    until_ok("an answer", LIMIT, async || {
        call().await.map_err(|status| {
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            status.to_string()
        })
    })
    .await
}

/// Reads every table, often enough that each connection has prepared the statements.
async fn read_everything(client: &Client, job: &str, dataset: &str) {
    for _ in 0..4 {
        let jobs = retried(async || {
            client
                .training()
                .list_training_jobs(pb::ListTrainingJobsRequest::default())
                .await
        });
        assert_eq!(jobs.await.into_inner().training_jobs.len(), 1);
        let datasets = retried(async || {
            client
                .datasets()
                .list_datasets(pb::ListDatasetsRequest::default())
                .await
        });
        assert_eq!(datasets.await.into_inner().datasets.len(), 1);
        let one = retried(async || {
            let request = pb::GetDatasetRequest {
                name: dataset.into(),
            };
            client.datasets().get_dataset(request).await
        });
        assert_eq!(one.await.into_inner().name, dataset);
        let checkpoints = retried(async || {
            let request = pb::ListCheckpointsRequest { parent: job.into() };
            client.checkpoints().list_checkpoints(request).await
        });
        assert!(!checkpoints.await.into_inner().checkpoints.is_empty());
        let events = retried(async || {
            let parent = job.into();
            let request = pb::ListTrainingEventsRequest {
                parent,
                ..Default::default()
            };
            client.training().list_training_events(request).await
        });
        assert!(!events.await.into_inner().events.is_empty());
        assert_eq!(retried(async || try_get(client, job).await).await.name, job);
    }
}

/// Checks that a job succeeds although these statements change the schema while it runs.
async fn assert_run_survives(statements: &str) {
    let postgres = Postgres::start();
    let (expected, _) = expected().await;
    let (dir, share) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let token = token(dir.path(), &postgres);
    let server = replica(dir.path(), &postgres, share.path(), &["--auth", "tokens"]);
    let client = server.client_with(&token).await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, checkpointing(&dataset, STEPS)).await;
    until_event(&client, &name, |e| is_step(e, 12)).await;
    read_everything(&client, &name, &dataset).await;

    let step = try_get(&client, &name)
        .await
        .unwrap()
        .progress
        .unwrap()
        .step;
    assert!(
        step + 20 < STEPS,
        "the job is almost done at step {step}, so this test would test nothing"
    );
    postgres.sql(statements);
    // The test asks the database, because calls may fail for another reason.
    let select = format!("SELECT state, error FROM jobs WHERE id = '{}'", id(&name));
    let mut row = String::new();
    until("the end of the job", LIMIT, async || {
        row = postgres.sql(&select).remove(0);
        ["succeeded", "failed", "cancelled"]
            .iter()
            .any(|end| row.starts_with(end))
    })
    .await;
    assert_eq!(row, "succeeded|");
    read_everything(&client, &name, &dataset).await;
    let events = finish(&client, &name).await;
    check_history(&events);
    assert_eq!(
        losses(&events),
        *expected,
        "other losses than those of an undisturbed run"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_run_continues_when_every_table_gets_a_column() {
    let add = |table| format!("ALTER TABLE {table} ADD COLUMN x BIGINT;");
    let all = ["checkpoints", "datasets", "tokens", "jobs", "events"]
        .map(add)
        .concat();
    assert_run_survives(&all).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_run_continues_when_a_column_changes_its_type() {
    let change = "ALTER TABLE jobs ALTER COLUMN trace TYPE varchar";
    assert_run_survives(change).await;
}

// ---- jobs that this version cannot read

/// Checks that other jobs run beside one of the highest priority that `change` makes unreadable.
async fn assert_unreadable_job_blocks_no_other(change: &str) {
    let postgres = Postgres::start();
    let (dir, share) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = replica(dir.path(), &postgres, share.path(), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let unreadable = submit(&client, job(&dataset, 100_000)).await;
    pause(&client, &unreadable).await;
    let update = "UPDATE jobs SET priority = 1000";
    postgres.sql(&format!(
        "{update}, {change} WHERE id = '{}'",
        id(&unreadable)
    ));

    // Other jobs are created, claimed, continued, listed and cancelled.
    another_succeeds(&client, &dataset).await;
    let long = submit(&client, job(&dataset, 100_000)).await;
    until("the start of the other job", LIMIT, async || {
        state(&client, &long).await == pb::JobState::Running
    })
    .await;
    let list = pb::ListTrainingJobsRequest::default();
    let jobs = client
        .training()
        .list_training_jobs(list)
        .await
        .unwrap()
        .into_inner();
    let names: Vec<_> = jobs.training_jobs.iter().map(|j| j.name.as_str()).collect();
    assert!(
        names.len() == 2 && names.contains(&long.as_str()),
        "{names:?}"
    );
    cancel(&client, &long).await;
    until("the cancellation", LIMIT, async || {
        state(&client, &long).await == pb::JobState::Cancelled
    })
    .await;

    let refused = try_get(&client, &unreadable).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::FailedPrecondition, "JOB_UNREADABLE"),
        "{refused}"
    );
    let is_counted = || {
        server
            .metrics()
            .lines()
            .any(|line| line == "bradley_unreadable_jobs 1")
    };
    until("the count of unreadable jobs", LIMIT, async || is_counted()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_job_with_an_unreadable_request_blocks_no_other() {
    let change = r#"state = 'queued', request = '{"from":"the future"}'"#;
    assert_unreadable_job_blocks_no_other(change).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_job_in_an_unknown_state_blocks_no_other() {
    assert_unreadable_job_blocks_no_other("state = 'dreaming'").await;
}

// ---- findings of version 0.1

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn datasets_are_listed_though_a_finding_contains_u_0000() {
    let postgres = Postgres::start();
    let (dir, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = replica(dir.path(), &postgres, root.path(), &[]);
    let client = server.client().await;
    let rows = dir.path().join("rows.jsonl");
    let bad = r#"{"id": "a\u0000b", "prompt": "p", "chosen": "x", "rejected": "x"}"#;
    let good = r#"{"prompt": "p", "chosen": "x", "rejected": "y"}"#;
    std::fs::write(&rows, format!("{bad}\n{good}\n")).unwrap();
    let metadata = pb::UploadMetadata::default();
    let dataset = client
        .upload_dataset(&rows, metadata, |_| {})
        .await
        .unwrap();
    assert_eq!(dataset.report.unwrap().issues[0].id, "a\u{fffd}b");
    // As version 0.1 stored it: PostgreSQL has no such character in its texts.
    let sql = r"UPDATE datasets SET report = REPLACE(report, 'a' || CHR(65533) || 'b', 'a\u0000b')";
    postgres.sql(sql);
    let listed = client
        .datasets()
        .list_datasets(pb::ListDatasetsRequest::default())
        .await;
    assert_eq!(listed.unwrap().into_inner().datasets.len(), 1);
}
