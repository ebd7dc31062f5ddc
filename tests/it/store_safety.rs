//! Data that a store must not lose: checkpoints of another format, artifacts of a store that is not
//! mounted, acknowledged changes, exports, and runs whose lease another worker has taken.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bradley::rpc::client::{Client, ClientError, FieldMask, Status};
use bradley::rpc::pb::{self, training_event::Event};
use bradley::train::checkpoint;
use tempfile::TempDir;
use tokio::sync::OnceCell;
use tonic::Code;
use tonic_types::StatusExt;

use crate::backends::{Fault, Postgres, Proxy, S3, signal};
use crate::replicas::{adapter, check_history, checkpointing, undisturbed};
use crate::server::{
    Server, checkpoints_folder, events, finish, get, id, is_step, job, job_error_reason, losses,
    resume, state, submit, try_get, until_event, upload,
};
use crate::support::golden;
use crate::wait::{until, until_ok};

/// Steps of the jobs that are compared with an undisturbed run. Tests act while such a job runs, so
/// it must last for seconds.
pub const STEPS: u64 = 300;
/// Deadline of every wait.
pub const LIMIT: Duration = Duration::from_secs(120);
/// Duration of short leases in seconds: as a flag, and as a time.
pub const LEASE: &str = "3";
const LEASE_TIME: Duration = Duration::from_secs(3);

// ---- servers

pub fn models() -> String {
    format!("tiny={}", golden("models/llama").display())
}

pub fn url_of(root: &Path) -> String {
    format!("file://{}", root.display())
}

/// Starts a replica whose artifacts are in a shared folder.
pub fn replica(dir: &Path, postgres: &Postgres, root: &Path, more: &[&str]) -> Server {
    let (database, artifacts) = (postgres.url(), url_of(root));
    let flags = [
        "--database-url",
        &database,
        "--artifact-url",
        &artifacts,
        "--lease",
        LEASE,
    ];
    Server::start_with(dir, &models(), &[&flags, more].concat())
}

/// Starts a replica whose artifacts are in S3, behind a proxy.
fn replica_on_s3(dir: &Path, postgres: &Postgres, s3: &S3, proxy: &Proxy, more: &[&str]) -> Server {
    let (database, artifacts) = (postgres.url(), "s3://bradley/runs");
    let flags = [
        "--database-url",
        &database,
        "--artifact-url",
        artifacts,
        "--lease",
        LEASE,
    ];
    let environment = s3.environment_at(proxy.port());
    let environment: Vec<_> = environment.iter().map(|(k, v)| (*k, v.as_str())).collect();
    Server::start_in(dir, &models(), &[&flags, more].concat(), &environment)
}

/// Starts a replica that must refuse to serve, and returns its log.
fn refused_replica(dir: &Path, postgres: &Postgres, root: &Path) -> String {
    let (database, artifacts) = (postgres.url(), url_of(root));
    refused_start(
        dir,
        &[
            "--database-url",
            &database,
            "--artifact-url",
            &artifacts,
            "--lease",
            LEASE,
        ],
    )
}

/// Starts a server that must refuse to serve, and returns its log.
pub fn refused_start(dir: &Path, flags: &[&str]) -> String {
    let mut child = Command::new(crate::support::binary())
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--http-listen",
            "127.0.0.1:0",
        ])
        .args(["--log-format", "json", "--models", &models(), "--data-dir"])
        .arg(dir)
        .args(flags)
        .env_remove("BRADLEY_CONFIG")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (sender, lines) = mpsc::channel();
    let errors = BufReader::new(child.stderr.take().unwrap());
    std::thread::spawn(move || {
        errors
            .lines()
            .map_while(Result::ok)
            .for_each(|line| drop(sender.send(line)));
    });
    let mut said = String::new();
    // The channel closes when the process ends.
    let mut refused = true;
    loop {
        match lines.recv_timeout(LIMIT) {
            Ok(line) if !line.contains("\"serving\"") => said += &format!("{line}\n"),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            _ => {
                refused = false;
                break;
            }
        }
    }
    if !refused {
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    assert!(refused, "the server starts with {flags:?}");
    assert!(!status.success(), "{said}");
    said
}

// ---- jobs

/// Pauses a job, in whatever state it is.
pub async fn pause(client: &Client, name: &str) {
    let request = pb::PauseTrainingJobRequest { name: name.into() };
    client.training().pause_training_job(request).await.unwrap();
    until("the pause", LIMIT, async || {
        state(client, name).await == pb::JobState::Paused
    })
    .await;
}

pub async fn cancel(client: &Client, name: &str) {
    let request = pb::CancelTrainingJobRequest { name: name.into() };
    client
        .training()
        .cancel_training_job(request)
        .await
        .unwrap();
}

/// Returns the state changes with their time in milliseconds.
pub fn changes(events: &[pb::TrainingEvent]) -> Vec<(i64, pb::StateChange)> {
    let change = |e: &pb::TrainingEvent| match &e.event {
        Some(Event::StateChange(s)) => {
            let time = e.time.unwrap();
            Some((
                time.seconds * 1000 + i64::from(time.nanos) / 1_000_000,
                s.clone(),
            ))
        }
        _ => None,
    };
    events.iter().filter_map(change).collect()
}

/// Returns the text of an event: a log line, or the reason of a state change.
fn event_text(e: &pb::TrainingEvent) -> Option<&str> {
    match &e.event {
        Some(Event::StateChange(s)) => Some(&s.reason),
        Some(Event::Log(l)) => Some(&l.message),
        _ => None,
    }
}

fn texts(events: &[pb::TrainingEvent]) -> Vec<&str> {
    events.iter().filter_map(event_text).collect()
}

/// Waits until a job is queued again with an error of this reason, which an event must report, too.
pub async fn waits(client: &Client, name: &str, reason: &str) {
    until_ok(&format!("a wait for {reason}"), LIMIT, async || {
        let job = get(client, name).await;
        let error = job.error.clone().unwrap_or_default();
        if job.state() == pb::JobState::Queued && job_error_reason(&error) == reason {
            assert_eq!(error.code, Code::FailedPrecondition as i32, "{error:?}");
            let changes = changes(&events(client, name).await);
            let told = changes
                .iter()
                .any(|(_, c)| c.to() == pb::JobState::Queued && c.reason.contains(&error.message));
            assert!(told, "no event says {:?}: {changes:?}", error.message);
            return Ok(());
        }
        if matches!(job.state(), pb::JobState::Succeeded | pb::JobState::Failed) {
            let events = events(client, name).await;
            panic!(
                "the job does not wait but has ended, {:?}: {:?}",
                job.state(),
                texts(&events)
            );
        }
        Err(format!("{:?} {error:?}", job.state()))
    })
    .await;
}

/// Checks that a short job runs and succeeds.
pub async fn another_succeeds(client: &Client, dataset: &str) {
    let other = submit(client, job(dataset, 2)).await;
    finish(client, &other).await;
    assert_eq!(state(client, &other).await, pb::JobState::Succeeded);
}

/// Returns losses and adapter of a job of [`STEPS`] steps that nothing disturbs.
pub async fn expected() -> &'static (BTreeMap<u64, u64>, Vec<u8>) {
    static EXPECTED: OnceCell<(BTreeMap<u64, u64>, Vec<u8>)> = OnceCell::const_new();
    EXPECTED.get_or_init(|| undisturbed(STEPS)).await
}

// ---- files

/// Returns the files below a folder.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries.map(|e| e.unwrap().path());
    let mut all: Vec<_> = paths
        .flat_map(|p| if p.is_dir() { files(&p) } else { vec![p] })
        .collect();
    all.sort();
    all
}

/// Returns the steps and digests in a job's checkpoint rows, the newest last.
fn checkpoint_rows(postgres: &Postgres, name: &str) -> Vec<(u64, String)> {
    let select = "SELECT step, digest FROM checkpoints WHERE job";
    let rows = postgres.sql(&format!("{select} = '{}' ORDER BY step", id(name)));
    let parse = |row: &String| {
        let (step, digest) = row.split_once('|').unwrap();
        (step.parse().unwrap(), digest.to_owned())
    };
    rows.iter().map(parse).collect()
}

/// A job of [`STEPS`] steps that was paused after some checkpoints. No server runs.
struct Paused {
    postgres: Postgres,
    share: TempDir,
    /// The data directory of the server that began the job.
    dir: TempDir,
    dataset: String,
    name: String,
}

impl Paused {
    async fn new() -> Paused {
        let postgres = Postgres::start();
        let (share, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut server = replica(dir.path(), &postgres, share.path(), &[]);
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await.name;
        let name = submit(&client, checkpointing(&dataset, STEPS)).await;
        let second = |e: &Event| matches!(e, Event::CheckpointCreated(c) if c.step >= 20);
        until_event(&client, &name, second).await;
        pause(&client, &name).await;
        assert!(server.terminate(LIMIT).success());
        Paused {
            postgres,
            share,
            dir,
            dataset,
            name,
        }
    }

    /// Returns the folder of the job's checkpoints in the artifact store.
    fn stored(&self) -> PathBuf {
        checkpoints_folder(self.share.path(), &self.name)
    }

    /// Returns the copy of a checkpoint in the first server's data directory.
    fn local_copy(&self, step: u64) -> PathBuf {
        checkpoints_folder(self.dir.path(), &self.name).join(step.to_string())
    }

    /// Replaces a checkpoint's state file and its local copy. Renames its folder to the new digest,
    /// which it writes to the database and returns.
    fn rewrite(&self, step: u64, digest: &str, state: &[u8]) -> String {
        let folder = self.stored().join(step.to_string());
        std::fs::write(folder.join(digest).join(checkpoint::STATE_FILE), state).unwrap();
        let new = checkpoint::digest(&folder.join(digest)).unwrap();
        std::fs::rename(folder.join(digest), folder.join(&new)).unwrap();
        if self.local_copy(step).is_dir() {
            std::fs::write(self.local_copy(step).join(checkpoint::STATE_FILE), state).unwrap();
        }
        let update = format!("UPDATE checkpoints SET digest = '{new}'");
        self.postgres.sql(&format!(
            "{update} WHERE job = '{}' AND step = {step}",
            id(&self.name)
        ));
        new
    }

    /// Checks that the job continues from a checkpoint and ends as if nothing had happened.
    async fn assert_continues(&self, client: &Client, step: u64) {
        let events = finish(client, &self.name).await;
        let changes = changes(&events);
        let done = get(client, &self.name).await;
        assert_eq!(done.state(), pb::JobState::Succeeded, "{changes:?}");
        assert_eq!(
            done.error, None,
            "the error remains although its cause is gone"
        );
        let from = format!("continues from step {step}");
        let continued = |c: &pb::StateChange| c.to() == pb::JobState::Running && c.reason == from;
        assert!(
            changes.iter().any(|(_, c)| continued(c)),
            "not {from}: {changes:?}"
        );
        check_history(&events);
        let (expected, weights) = expected().await;
        assert_eq!(
            losses(&events),
            *expected,
            "other losses than those of an undisturbed run"
        );
        assert!(
            adapter(client, &self.name).await == *weights,
            "other weights than those of an undisturbed run"
        );
    }
}

// ---- checkpoints of another format

/// Checks that a job waits while its checkpoints have another format. With `has_copy`, the server
/// has copies of them.
async fn assert_waits_for_its_format(has_copy: bool) {
    let paused = Paused::new().await;
    let rows = checkpoint_rows(&paused.postgres, &paused.name);
    let newest = rows.last().unwrap().0;
    let mut written = Vec::new();
    for (step, digest) in &rows {
        let folder = paused.stored().join(step.to_string()).join(digest);
        let original = std::fs::read_to_string(folder.join(checkpoint::STATE_FILE)).unwrap();
        let other = original.replacen("\"version\": 1", "\"version\": 2", 1);
        assert_ne!(other, original);
        written.push((
            *step,
            paused.rewrite(*step, digest, other.as_bytes()),
            original,
        ));
    }
    let before = (
        checkpoint_rows(&paused.postgres, &paused.name),
        files(&paused.stored()),
    );

    let fresh = tempfile::tempdir().unwrap();
    let dir = if has_copy {
        paused.dir.path()
    } else {
        fresh.path()
    };
    let server = replica(dir, &paused.postgres, paused.share.path(), &[]);
    let client = server.client().await;
    resume(&client, &paused.name).await.unwrap();
    waits(&client, &paused.name, "CHECKPOINT_FORMAT").await;
    // The waiting job does not block other jobs.
    another_succeeds(&client, &paused.dataset).await;
    // The waiting job is tried again, but not at once.
    let mut refusals = Vec::new();
    until("the second try", LIMIT, async || {
        let changes = changes(&events(&client, &paused.name).await);
        let back = changes
            .iter()
            .filter(|(_, c)| c.from() == pb::JobState::Preparing && c.to() == pb::JobState::Queued);
        refusals = back.map(|(time, _)| *time).collect();
        refusals.len() >= 2
    })
    .await;
    assert!(
        refusals[1] - refusals[0] >= 2500,
        "tried again too soon: {refusals:?}"
    );
    let after = (
        checkpoint_rows(&paused.postgres, &paused.name),
        files(&paused.stored()),
    );
    assert_eq!(after, before, "a row or a file was removed");

    for (step, digest, original) in &written {
        paused.rewrite(*step, digest, original.as_bytes());
    }
    paused.assert_continues(&client, newest).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_checkpoint_of_another_format_is_kept_and_its_job_waits() {
    assert_waits_for_its_format(false).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_local_copy_of_another_format_is_kept_and_its_job_waits() {
    assert_waits_for_its_format(true).await;
}

// ---- artifacts that are missing

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_job_waits_for_its_missing_checkpoint_and_continues_from_it() {
    let paused = Paused::new().await;
    let rows = checkpoint_rows(&paused.postgres, &paused.name);
    let newest = rows.last().unwrap().0;
    let (elsewhere, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (here, away) = (
        paused.stored().join(newest.to_string()),
        elsewhere.path().join("away"),
    );
    std::fs::rename(&here, &away).unwrap();

    let server = replica(dir.path(), &paused.postgres, paused.share.path(), &[]);
    let client = server.client().await;
    resume(&client, &paused.name).await.unwrap();
    waits(&client, &paused.name, "ARTIFACT_MISSING").await;
    another_succeeds(&client, &paused.dataset).await;
    assert_eq!(
        checkpoint_rows(&paused.postgres, &paused.name),
        rows,
        "a row was removed"
    );

    std::fs::rename(&away, &here).unwrap();
    paused.assert_continues(&client, newest).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_job_waits_for_its_missing_dataset() {
    let postgres = Postgres::start();
    let (share, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut server = replica(dir.path(), &postgres, share.path(), &[]);
    let client = server.client().await;
    let (present, missing) = (
        upload(&client, "pairs.jsonl").await.name,
        upload(&client, "pairs.jsonl").await.name,
    );
    assert!(server.terminate(LIMIT).success());
    let (elsewhere, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (here, away) = (share.path().join(&missing), elsewhere.path().join("away"));
    std::fs::rename(&here, &away).unwrap();

    let server = replica(dir.path(), &postgres, share.path(), &[]);
    let client = server.client().await;
    let name = submit(&client, job(&missing, 2)).await;
    waits(&client, &name, "ARTIFACT_MISSING").await;
    another_succeeds(&client, &present).await;
    std::fs::rename(&away, &here).unwrap();
    finish(&client, &name).await;
    let done = get(&client, &name).await;
    assert_eq!((done.state(), done.error), (pb::JobState::Succeeded, None));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_server_does_not_start_while_its_artifact_store_is_not_mounted() {
    let postgres = Postgres::start();
    let (share, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (root, away) = (share.path().join("store"), share.path().join("away"));
    std::fs::create_dir(&root).unwrap();
    let mut server = replica(dir.path(), &postgres, &root, &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    assert!(server.terminate(LIMIT).success());

    std::fs::rename(&root, &away).unwrap();
    let said = refused_replica(dir.path(), &postgres, &root);
    assert!(
        said.contains(root.to_str().unwrap()),
        "it does not name the folder: {said}"
    );
    assert!(!root.exists(), "the folder was created");

    std::fs::rename(&away, &root).unwrap();
    let server = replica(dir.path(), &postgres, &root, &[]);
    another_succeeds(&server.client().await, &dataset).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_server_does_not_start_with_a_store_that_its_database_does_not_know() {
    let postgres = Postgres::start();
    let (share, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut server = replica(dir.path(), &postgres, share.path(), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    assert!(server.terminate(LIMIT).success());
    let before = files(share.path());

    let (other, fresh) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let said = refused_replica(fresh.path(), &postgres, other.path());
    let names_it = said.contains(other.path().to_str().unwrap());
    assert!(names_it && said.contains("artifact store"), "{said}");
    assert_eq!(
        std::fs::read_dir(other.path()).unwrap().count(),
        0,
        "something was written"
    );
    assert_eq!(files(share.path()), before);
    assert!(
        before.len() > 1,
        "the store has no identity beside its dataset: {before:?}"
    );

    let server = replica(dir.path(), &postgres, share.path(), &[]);
    another_succeeds(&server.client().await, &dataset).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn an_upload_into_an_unmounted_store_is_refused() {
    let postgres = Postgres::start();
    let (share, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (root, away) = (share.path().join("store"), share.path().join("away"));
    std::fs::create_dir(&root).unwrap();
    let server = replica(dir.path(), &postgres, &root, &[]);
    let client = server.client().await;
    let try_upload = async || {
        let metadata = pb::UploadMetadata {
            display_name: "pairs".into(),
            ..Default::default()
        };
        client
            .upload_dataset(&golden("pairs.jsonl"), metadata, |_| {})
            .await
    };
    try_upload().await.unwrap();

    // When a share is unmounted, its mount point remains as an empty folder.
    std::fs::rename(&root, &away).unwrap();
    std::fs::create_dir(&root).unwrap();
    match try_upload().await {
        Err(ClientError::Refused(status)) => {
            let reason = status.get_details_error_info().unwrap().reason;
            let found = (status.code(), reason.as_str());
            assert_eq!(
                found,
                (Code::Unavailable, "ARTIFACTS_UNAVAILABLE"),
                "{status}"
            );
        }
        other => panic!("the upload is not refused: {other:?}"),
    }
    assert_eq!(
        files(&root),
        Vec::<PathBuf>::new(),
        "data below the mount point"
    );

    std::fs::remove_dir_all(&root).unwrap();
    std::fs::rename(&away, &root).unwrap();
    until("an upload", LIMIT, async || try_upload().await.is_ok()).await;
}

// ---- acknowledged changes

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn a_job_whose_ttl_was_cleared_is_not_deleted() {
    let (postgres, s3) = (Postgres::start(), S3::start());
    let (dir, proxy) = (tempfile::tempdir().unwrap(), Proxy::start(s3.port()));
    let server = replica_on_s3(dir.path(), &postgres, &s3, &proxy, &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let mut jobs = Vec::new();
    for _ in 0..5 {
        jobs.push(submit(&client, job(&dataset, 1)).await);
    }
    for name in &jobs {
        finish(&client, name).await;
    }
    let objects = |name: &str| s3.keys(&format!("runs/jobs/{}/", id(name))).len();
    let (first, kept) = (&jobs[0], &jobs[3]);
    let (of_first, of_kept) = (objects(first), objects(kept));
    assert!(of_first > 1 && of_kept > 1);

    // All jobs expire at the same time, in the order of their creation.
    proxy.set(Fault::Slow(Duration::from_millis(100)));
    postgres.sql(
        "UPDATE jobs SET expire_time = seq,
             request = jsonb_set(request::jsonb, '{ttl_ms}', '1')::text",
    );
    until("a deletion", LIMIT, async || objects(first) < of_first).await;
    let update_mask = Some(FieldMask {
        paths: vec!["ttl".into()],
    });
    let training_job = Some(pb::TrainingJob {
        name: kept.clone(),
        ..Default::default()
    });
    let request = pb::UpdateTrainingJobRequest {
        training_job,
        update_mask,
    };
    match client.training().update_training_job(request).await {
        Ok(answer) => assert_eq!(answer.into_inner().ttl, None),
        // The deletion of this job began before the change, which was therefore not acknowledged.
        Err(status) => return assert_eq!(status.code(), Code::NotFound, "{status}"),
    }
    for name in jobs.iter().filter(|name| *name != kept) {
        let gone = async || {
            try_get(&client, name)
                .await
                .is_err_and(|e| e.code() == Code::NotFound)
        };
        until("every other deletion", LIMIT, gone).await;
    }
    proxy.set(Fault::None);
    let still = try_get(&client, kept)
        .await
        .expect("the job whose ttl was cleared is gone");
    assert_eq!((still.state(), still.ttl), (pb::JobState::Succeeded, None));
    assert_eq!(objects(kept), of_kept, "some of its objects were deleted");
    assert!(!adapter(&client, kept).await.is_empty());
}

// ---- exports

async fn export(client: &Client, name: &str) -> Result<pb::ExportCheckpointResponse, Status> {
    let format = pb::ExportFormat::Adapter.into();
    let request = pb::ExportCheckpointRequest {
        name: name.into(),
        format,
        ..Default::default()
    };
    client
        .checkpoints()
        .export_checkpoint(request)
        .await
        .map(|r| r.into_inner())
}

/// Asks for an export until it succeeds, and checks that each of its files is in the store.
async fn export_and_check(client: &Client, name: &str, s3: &S3, when: &str) -> Vec<String> {
    let export = until_ok(&format!("an export {when}"), LIMIT, async || {
        export(client, name).await.map_err(|status| {
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            status.to_string()
        })
    })
    .await;
    let folder = format!("runs/{}", export.path);
    let listed: Vec<_> = export
        .files
        .iter()
        .map(|f| format!("{folder}/{}", f.path))
        .collect();
    let found = s3.keys(&format!("{folder}/"));
    assert!(listed.len() >= 2, "{listed:?}");
    let missing: Vec<_> = listed.iter().filter(|key| !found.contains(key)).collect();
    assert!(
        missing.is_empty(),
        "{when}: the export was answered without {missing:?}"
    );
    listed
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn an_export_whose_caller_leaves_is_completed_by_the_next_call() {
    let (postgres, s3) = (Postgres::start(), S3::start());
    let (dir, proxy) = (tempfile::tempdir().unwrap(), Proxy::start(s3.port()));
    let server = replica_on_s3(dir.path(), &postgres, &s3, &proxy, &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let job = submit(&client, job(&dataset, 2)).await;
    finish(&client, &job).await;
    let name = format!("{job}/checkpoints/latest");
    let before = s3.keys("runs/").len();

    // The caller disconnects when the first file is in the store.
    proxy.set(Fault::Slow(Duration::from_millis(500)));
    let call = tokio::spawn({
        let (client, name) = (client.clone(), name.clone());
        async move { export(&client, &name).await.map(drop) }
    });
    until("an object", LIMIT, async || s3.keys("runs/").len() > before).await;
    call.abort();
    proxy.set(Fault::None);
    export_and_check(&client, &name, &s3, "after a call that was given up").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn an_export_that_lost_a_file_is_completed_by_the_next_call() {
    let (postgres, s3) = (Postgres::start(), S3::start());
    let (dir_a, dir_b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let proxy = Proxy::start(s3.port());
    let a = replica_on_s3(dir_a.path(), &postgres, &s3, &proxy, &[]);
    let b = replica_on_s3(dir_b.path(), &postgres, &s3, &proxy, &[]);
    let (client_a, client_b) = (a.client().await, b.client().await);
    let dataset = upload(&client_a, "pairs.jsonl").await.name;
    let job = submit(&client_a, job(&dataset, 2)).await;
    finish(&client_a, &job).await;
    let name = format!("{job}/checkpoints/latest");
    let keys = export_and_check(&client_a, &name, &s3, "at first").await;
    // B has no folder of the export yet; A has had one all the time.
    for key in &keys {
        s3.remove(key);
        export_and_check(&client_b, &name, &s3, "with no local folder").await;
        s3.remove(key);
        export_and_check(&client_a, &name, &s3, "with a local folder").await;
        s3.remove(key);
        export_and_check(
            &client_b,
            &name,
            &s3,
            "with a local folder on another replica",
        )
        .await;
    }
}

// ---- leases

/// The database returns to a state before a worker's claim, as after a fail-over that lost the
/// newest commits. The next claim then gets the same token.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn only_one_of_two_workers_with_the_same_lease_token_writes() {
    let postgres = Postgres::start();
    let (expected, weights) = expected().await;
    let share = tempfile::tempdir().unwrap();
    let (dir_a, dir_b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a = replica(dir_a.path(), &postgres, share.path(), &[]);
    let client_a = a.client().await;
    let dataset = upload(&client_a, "pairs.jsonl").await.name;
    // While another job runs, this one waits, and the database is copied.
    let first = submit(&client_a, job(&dataset, 100_000)).await;
    until_event(&client_a, &first, |e| is_step(e, 1)).await;
    let name = submit(&client_a, checkpointing(&dataset, STEPS)).await;
    let of_job = format!("id = '{}'", id(&name));
    postgres.sql(&format!(
        "CREATE TABLE saved_jobs AS SELECT * FROM jobs WHERE {of_job};
         CREATE TABLE saved_events AS SELECT * FROM events WHERE job = '{}'",
        id(&name)
    ));
    assert_eq!(
        postgres.sql("SELECT state, lease_token FROM saved_jobs"),
        ["queued|0"]
    );
    cancel(&client_a, &first).await;
    until_event(&client_a, &name, |e| is_step(e, 25)).await;

    signal(a.pid(), libc::SIGSTOP);
    // A fail-over breaks every connection.
    postgres.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'",
    );
    postgres.sql(&format!(
        "DELETE FROM jobs WHERE {of_job};
         INSERT INTO jobs OVERRIDING SYSTEM VALUE SELECT * FROM saved_jobs;
         INSERT INTO events SELECT * FROM saved_events"
    ));
    let b = replica(dir_b.path(), &postgres, share.path(), &[]);
    let client_b = b.client().await;
    until_event(&client_b, &name, |e| is_step(e, 3)).await;
    signal(a.pid(), libc::SIGCONT);

    let events = finish(&client_b, &name).await;
    assert_eq!(
        state(&client_b, &name).await,
        pb::JobState::Succeeded,
        "{:?}",
        changes(&events)
    );
    check_history(&events);
    assert_eq!(
        losses(&events),
        *expected,
        "other losses than those of an undisturbed run"
    );
    assert!(
        adapter(&client_b, &name).await == *weights,
        "other weights than those of an undisturbed run"
    );
    // The first worker stops its run, writes nothing, and continues to serve.
    until("the end of the other run", LIMIT, async || {
        !a.metrics().contains(id(&name))
    })
    .await;
    assert_eq!(
        finish(&client_a, &name).await,
        events,
        "something was written after the end"
    );
    another_succeeds(&client_a, &dataset).await;
}

/// A process with two devices claims a job that its other device still trains.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn the_end_of_a_run_that_lost_its_lease_does_not_end_its_successors_lease() {
    let (postgres, s3) = (Postgres::start(), S3::start());
    let (expected, weights) = expected().await;
    let (dir, proxy) = (tempfile::tempdir().unwrap(), Proxy::start(s3.port()));
    let server = replica_on_s3(dir.path(), &postgres, &s3, &proxy, &["--device", "cpu,cpu"]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    // Uploads of checkpoints take seconds, so that the run outlives several leases. During an
    // upload the run does not learn that it has lost its lease.
    proxy.set(Fault::Slow(Duration::from_millis(300)));
    let name = submit(&client, checkpointing(&dataset, STEPS)).await;
    let checkpoints = format!("runs/jobs/{}/checkpoints/", id(&name));
    until("an upload", LIMIT, async || {
        !s3.keys(&checkpoints).is_empty()
    })
    .await;
    postgres.sql(&format!(
        "UPDATE jobs SET lease_token = lease_token + 1, state = 'queued', lease_owner = NULL,
             lease_until = 0
         WHERE id = '{}'",
        id(&name)
    ));
    let taken = Instant::now();
    // A change of the job makes the idle device look at the queue immediately.
    let labels = BTreeMap::from([("taken".to_owned(), "over".to_owned())]);
    let training_job = Some(pb::TrainingJob {
        name: name.clone(),
        labels,
        ..Default::default()
    });
    let update_mask = Some(FieldMask {
        paths: vec!["labels".into()],
    });
    let request = pb::UpdateTrainingJobRequest {
        training_job,
        update_mask,
    };
    client
        .training()
        .update_training_job(request)
        .await
        .unwrap();

    let assert_no_worker_died = |events: &[pb::TrainingEvent]| {
        let texts = texts(events);
        let died = texts.iter().any(|reason| reason.contains("worker is gone"));
        assert!(!died, "a live run was taken for a dead one: {texts:?}");
    };
    until("four leases", LIMIT, async || {
        assert_no_worker_died(&events(&client, &name).await);
        taken.elapsed() > 4 * LEASE_TIME
    })
    .await;
    proxy.set(Fault::None);
    let events = finish(&client, &name).await;
    assert_no_worker_died(&events);
    assert_eq!(
        state(&client, &name).await,
        pb::JobState::Succeeded,
        "{:?}",
        texts(&events)
    );
    let claims = changes(&events);
    let claims = claims
        .iter()
        .filter(|(_, c)| c.to() == pb::JobState::Preparing)
        .count();
    assert_eq!(
        claims,
        2,
        "the first run and its successor: {:?}",
        texts(&events)
    );
    assert_eq!(
        losses(&events),
        *expected,
        "other losses than those of an undisturbed run"
    );
    assert!(
        adapter(&client, &name).await == *weights,
        "other weights than those of an undisturbed run"
    );
}
