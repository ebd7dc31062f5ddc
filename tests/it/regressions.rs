//! Regressions: lost answers, models that are not served, stores that were begun but not finished,
//! probes without an end, and files of jobs that were never stored.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bradley::rpc::client::{Client, Status};
use bradley::rpc::pb::{self, training_event::Event};
use tempfile::TempDir;
use tonic::Code;

use crate::attacks::speak_http2;
use crate::backends::{Fault, Postgres, Proxy, S3};
use crate::replicas::{adapter, check_history, checkpointing};
use crate::server::{
    Server, checkpoints_folder, events, finish, get, id, is_step, job, losses, pairs, reason,
    resume, score, state, submit, try_get, until_event, upload,
};
use crate::store_safety::{
    LEASE, LIMIT, STEPS, another_succeeds, changes, expected, files, models, pause, refused_start,
    replica, url_of, waits,
};
use crate::support::{copy_files, golden};
use crate::wait::until;

/// File with the weights of a PEFT adapter.
const WEIGHTS: &str = "adapter_model.safetensors";
/// Age that is longer than any upload takes.
const LONG_AGO: Duration = Duration::from_secs(7200);

/// Trains an adapter and puts it into the server's adapter folder as `x`.
async fn train_adapter(client: &Client, dataset: &str, adapters: &Path) {
    let name = submit(client, job(dataset, 2)).await;
    finish(client, &name).await;
    let latest = format!("{name}/checkpoints/latest");
    let format = pb::ExportFormat::Adapter;
    client
        .download_checkpoint(&latest, format, &adapters.join("x"))
        .await
        .unwrap();
}

/// Returns a request for a job that starts from the adapter `x`, with the request_id `once`.
fn from_adapter(dataset: &str, title: &str) -> pb::CreateTrainingJobRequest {
    let lora = pb::LoraConfig {
        rank: Some(4),
        init_adapter: "x".into(),
        ..Default::default()
    };
    let method = Some(pb::training_job::Method::Lora(lora));
    let training_job = Some(pb::TrainingJob {
        method,
        display_name: title.into(),
        ..job(dataset, 2)
    });
    pb::CreateTrainingJobRequest {
        training_job,
        request_id: "once".into(),
        ..Default::default()
    }
}

/// Sends a request for a job.
async fn create(
    client: &Client,
    request: pb::CreateTrainingJobRequest,
) -> Result<pb::TrainingJob, Status> {
    client
        .training()
        .create_training_job(request)
        .await
        .map(|made| made.into_inner())
}

async fn all_jobs(client: &Client) -> Vec<String> {
    let request = pb::ListTrainingJobsRequest::default();
    let listed = client
        .training()
        .list_training_jobs(request)
        .await
        .unwrap()
        .into_inner();
    listed
        .training_jobs
        .into_iter()
        .map(|job| job.name)
        .collect()
}

// ---- lost answers

/// A proxy for PostgreSQL that drops one answer: that to the first COMMIT of a connection that has
/// sent `mark`. The transaction is committed, and the connection is closed.
struct CommitDroppingProxy {
    port: u16,
    lost: Arc<AtomicBool>,
}

impl CommitDroppingProxy {
    fn start(backend: u16, mark: &'static [u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, lost) = (
            listener.local_addr().unwrap().port(),
            Arc::<AtomicBool>::default(),
        );
        let shared = lost.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let lost = shared.clone();
                std::thread::spawn(move || relay(client, backend, mark, &lost));
            }
        });
        CommitDroppingProxy { port, lost }
    }
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Passes bytes on in both directions, except the answer to that COMMIT.
fn relay(mut client: TcpStream, backend: u16, mark: &[u8], lost: &AtomicBool) {
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", backend)) else {
        return;
    };
    let (mut answers, mut to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let drop_answer = Arc::<AtomicBool>::default();
    let must_drop = drop_answer.clone();
    let back = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = answers.read(&mut buffer) {
            let is_lost = must_drop.load(Ordering::Acquire) && contains(&buffer[..n], b"COMMIT");
            if is_lost || to_client.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = (
            answers.shutdown(Shutdown::Both),
            to_client.shutdown(Shutdown::Both),
        );
    });
    let (mut buffer, mut sent, mut is_marked) = (vec![0; 1 << 16], Vec::new(), false);
    while let Ok(n @ 1..) = client.read(&mut buffer) {
        // The bytes of a word may be split between two reads.
        sent.drain(..sent.len().saturating_sub(mark.len()));
        sent.extend_from_slice(&buffer[..n]);
        is_marked |= contains(&sent, mark);
        if is_marked && contains(&sent, b"COMMIT") && !lost.swap(true, Ordering::AcqRel) {
            drop_answer.store(true, Ordering::Release);
        }
        if server.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = server.shutdown(Shutdown::Both);
    let _ = back.join();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_job_whose_commit_was_not_answered_exists_with_its_adapter() {
    let postgres = Postgres::start();
    let (dir, share, adapters) = (
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let port = postgres
        .url()
        .split([':', '/'])
        .find_map(|part| part.parse().ok())
        .unwrap();
    let proxy = CommitDroppingProxy::start(port, b"a lost answer");
    let database = postgres
        .url()
        .replace(&port.to_string(), &proxy.port.to_string());
    let (artifacts, folder) = (url_of(share.path()), adapters.path().to_str().unwrap());
    let flags = [
        "--database-url",
        &database,
        "--artifact-url",
        &artifacts,
        "--adapter-dir",
        folder,
        "--lease",
        LEASE,
    ];
    let server = Server::start_with(dir.path(), &models(), &flags);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    train_adapter(&client, &dataset, adapters.path()).await;
    let before = all_jobs(&client).await.len();

    let refused = create(&client, from_adapter(&dataset, "a lost answer")).await;
    assert!(proxy.lost.load(Ordering::Acquire), "no answer was lost");
    refused.expect_err("the call must fail without an answer of the database");
    // Only the database knows the job.
    let stored = postgres.sql("SELECT id FROM jobs WHERE request LIKE '%a lost answer%'");
    assert_eq!(stored.len(), 1);
    let made = create(&client, from_adapter(&dataset, "a lost answer"))
        .await
        .unwrap();
    assert_eq!(
        id(&made.name),
        stored[0],
        "the repeated request created another job"
    );
    assert_eq!(all_jobs(&client).await.len(), before + 1);
    let copy = share
        .path()
        .join("jobs")
        .join(&stored[0])
        .join("init_adapter")
        .join(WEIGHTS);
    let original = adapters.path().join("x").join(WEIGHTS);
    assert!(
        std::fs::read(copy).unwrap() == std::fs::read(original).unwrap(),
        "the job's copy of its adapter differs"
    );
    finish(&client, &made.name).await;
    let done = get(&client, &made.name).await;
    assert_eq!(done.state(), pb::JobState::Succeeded, "{:?}", done.error);
}

/// A server with SQLite and an adapter `x`.
struct WithAdapter {
    dir: TempDir,
    adapters: TempDir,
    client: Client,
    dataset: String,
    _server: Server,
}

impl WithAdapter {
    async fn start(flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let (dir, adapters) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let flags = [
            &[
                "--adapter-dir",
                adapters.path().to_str().unwrap(),
                "--lease",
                LEASE,
            ],
            flags,
        ]
        .concat();
        let server = Server::start_in(dir.path(), &models(), &flags, environment);
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await.name;
        train_adapter(&client, &dataset, adapters.path()).await;
        WithAdapter {
            dir,
            adapters,
            client,
            dataset,
            _server: server,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_copies_no_adapter() {
    let it = WithAdapter::start(&[], &[]).await;
    let request = from_adapter(&it.dataset, "repeated");
    let made = create(&it.client, request.clone()).await.unwrap();
    let before = files(
        &it.dir
            .path()
            .join("jobs")
            .join(id(&made.name))
            .join("init_adapter"),
    );
    assert_eq!(before.len(), 2, "{before:?}");
    // The adapter no longer exists, so it cannot be copied.
    std::fs::remove_file(it.adapters.path().join("x").join(WEIGHTS)).unwrap();
    let again = create(&it.client, request.clone()).await.unwrap();
    assert_eq!(again.name, made.name);
    let another = pb::CreateTrainingJobRequest {
        request_id: "twice".into(),
        ..request
    };
    create(&it.client, another)
        .await
        .expect_err("a job is created although its adapter cannot be copied");
    // The folder of the refused job is deleted, too.
    let folders = std::fs::read_dir(it.dir.path().join("jobs"))
        .unwrap()
        .count();
    assert_eq!(folders, all_jobs(&it.client).await.len());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python with moto (BRADLEY_TEST_PYTHON)"]
async fn an_adapter_whose_client_leaves_before_its_job_is_stored_is_removed() {
    let s3 = S3::start();
    let proxy = Proxy::start(s3.port());
    let environment = s3.environment_at(proxy.port());
    let environment: Vec<_> = environment.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let it = WithAdapter::start(&["--artifact-url", "s3://bradley/runs"], &environment).await;
    let before = all_jobs(&it.client).await;
    let copies = || {
        s3.keys("runs/jobs/")
            .into_iter()
            .filter(|key| key.contains("/init_adapter/"))
            .count()
    };
    assert_eq!(copies(), 0);

    proxy.set(Fault::Slow(Duration::from_millis(500)));
    let call = tokio::spawn({
        let (client, request) = (it.client.clone(), from_adapter(&it.dataset, "left"));
        async move { create(&client, request).await.map(drop) }
    });
    until("an object of the adapter", LIMIT, async || copies() > 0).await;
    call.abort();
    proxy.set(Fault::None);
    until("the removal from S3", LIMIT, async || copies() == 0).await;
    assert_eq!(
        all_jobs(&it.client).await,
        before,
        "a job was created although its client left"
    );
    until("the removal from the data directory", LIMIT, async || {
        let folders = std::fs::read_dir(it.dir.path().join("jobs"))
            .unwrap()
            .count();
        folders == before.len()
    })
    .await;
    // The request_id was not used up.
    let made = create(&it.client, from_adapter(&it.dataset, "left"))
        .await
        .unwrap();
    finish(&it.client, &made.name).await;
    assert_eq!(state(&it.client, &made.name).await, pb::JobState::Succeeded);
}

// ---- models

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_for_a_model_that_is_not_served_and_continues_with_it() {
    let (expected, weights) = expected().await;
    let dir = tempfile::tempdir().unwrap();
    let llama = golden("models/llama").display().to_string();
    let serve = |models: &str| Server::start_with(dir.path(), models, &["--lease", LEASE]);
    let both = format!("tiny={llama},second={llama}");
    let mut server = serve(&both);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let wanted = pb::TrainingJob {
        policy: "models/second".into(),
        ..checkpointing(&dataset, STEPS)
    };
    let name = submit(&client, wanted).await;
    until_event(&client, &name, |e| is_step(e, 25)).await;
    server.kill();

    let mut server = serve(&format!("tiny={llama}"));
    let client = server.client().await;
    waits(&client, &name, "MODEL_CHANGED").await;
    let said = get(&client, &name).await.error.unwrap().message;
    assert!(said.contains("models/second"), "{said}");
    another_succeeds(&client, &dataset).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Queued);
    server.kill();

    let server = serve(&both);
    let client = server.client().await;
    let told = finish(&client, &name).await;
    let done = get(&client, &name).await;
    assert_eq!((done.state(), done.error), (pb::JobState::Succeeded, None));
    assert_eq!(
        losses(&told),
        *expected,
        "other losses than those of an undisturbed run"
    );
    assert!(
        adapter(&client, &name).await == *weights,
        "other weights than those of an undisturbed run"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_exported_though_its_base_model_has_changed() {
    let (dir, model) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    copy_files(&golden("models/llama"), model.path());
    let models = format!("tiny={}", model.path().display());
    let mut server = Server::start_with(dir.path(), &models, &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, job(&dataset, 2)).await;
    finish(&client, &name).await;
    server.kill();

    let config = model.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let other = text.replace("\"rope_theta\": 10000.0", "\"rope_theta\": 20000.0");
    assert_ne!(other, text);
    std::fs::write(&config, other).unwrap();
    let trained = checkpoints_folder(dir.path(), &name)
        .join("2")
        .join(WEIGHTS);
    let trained = std::fs::read(trained).unwrap();
    for models in [models, format!("other={}", model.path().display())] {
        let server = Server::start_with(dir.path(), &models, &[]);
        let client = server.client().await;
        assert!(
            adapter(&client, &name).await == trained,
            "{models}: the exported adapter is not the trained one"
        );
        let format = pb::ExportFormat::Merged.into();
        let request = pb::ExportCheckpointRequest {
            name: format!("{name}/checkpoints/latest"),
            format,
            ..Default::default()
        };
        let refused = client
            .checkpoints()
            .export_checkpoint(request)
            .await
            .unwrap_err();
        let found = (refused.code(), reason(&refused));
        assert_eq!(
            found,
            (Code::FailedPrecondition, "MODEL_CHANGED".into()),
            "{models}: {refused}"
        );
        // Without this the other server would return the export of this one.
        std::fs::remove_dir_all(dir.path().join("jobs").join(id(&name)).join("exports")).unwrap();
    }
}

// ---- probes

/// Returns the first frame of a health check: the headers (HPACK) of a request that does not end.
fn endless_health_check() -> Vec<u8> {
    const HEADERS: u8 = 1;
    const END_HEADERS: u8 = 4;
    // From HPACK's static table: method POST, scheme http. Then header names, by their index in
    // that table or literally, each with its value.
    let mut block = vec![0x83, 0x86];
    let mut field = |name: &[u8], value: &str| {
        block.extend_from_slice(name);
        block.push(value.len() as u8);
        block.extend_from_slice(value.as_bytes());
    };
    field(&[0x04], "/grpc.health.v1.Health/Check");
    field(&[0x01], "localhost");
    field(&[0x0f, 0x10], "application/grpc");
    field(b"\x00\x02te", "trailers");
    let mut frame = vec![0, 0, block.len() as u8, HEADERS, END_HEADERS, 0, 0, 0, 1];
    frame.extend(block);
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_with_an_endless_health_check_is_closed_when_others_need_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(dir.path(), &models(), &["--max-connections", "2"]);
    let address = server.address.trim_start_matches("http://").to_owned();
    let mut endless = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let connection = tokio::net::TcpStream::connect(&address).await.unwrap();
        endless.spawn(async move { speak_http2(connection, &endless_health_check()).await });
    }
    let newcomer = async {
        let client = server.client().await;
        assert!(client.health().await.unwrap());
    };
    tokio::time::timeout(LIMIT, newcomer)
        .await
        .expect("no connection is closed for a new one");
    let closed = tokio::time::timeout(LIMIT, endless.join_next()).await;
    assert!(closed.expect("no connection was closed").is_some());
}

// ---- the identity of the artifact store

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn two_servers_that_start_at_once_on_an_empty_store_agree_on_its_identity() {
    let postgres = Postgres::start();
    let (share, dirs) = (
        tempfile::tempdir().unwrap(),
        [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()],
    );
    let start = |dir: &TempDir| replica(dir.path(), &postgres, share.path(), &[]);
    let servers = std::thread::scope(|scope| {
        let starting = dirs.each_ref().map(|dir| scope.spawn(move || start(dir)));
        starting.map(|server| server.join().unwrap())
    });
    let object = std::fs::read_to_string(share.path().join("bradley-store-id")).unwrap();
    let known = postgres.sql("SELECT value FROM properties WHERE name = 'artifact_store'");
    assert_eq!(known, [object.trim()]);
    for server in &servers {
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await.name;
        another_succeeds(&client, &dataset).await;
    }
}

/// The usage of the scoring call is still to be stored.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_server_ends_although_its_database_does_not_answer() {
    let postgres = Postgres::start();
    let (dir, share) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let flags = ["--drain-timeout", "1"];
    let mut server = replica(dir.path(), &postgres, share.path(), &flags);
    score(&server.client().await, "models/tiny", pairs()).await;
    let frozen = postgres.freeze();
    let status = server.terminate(LIMIT);
    drop(frozen);
    assert!(status.success(), "{status}");
    until("a warning about the usage", LIMIT, async || {
        server.has_logged("the last usage")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_does_not_start_without_the_store_that_its_database_knows() {
    let (dir, share) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let artifacts = url_of(share.path());
    let mut server = Server::start_with(dir.path(), &models(), &["--artifact-url", &artifacts]);
    let dataset = upload(&server.client().await, "pairs.jsonl").await.name;
    assert!(server.terminate(LIMIT).success());
    let identity = std::fs::read_to_string(share.path().join("bradley-store-id")).unwrap();
    let said = refused_start(dir.path(), &[]);
    assert!(
        said.contains("artifact_url") && said.contains(identity.trim()),
        "{said}"
    );
    let server = Server::start_with(dir.path(), &models(), &["--artifact-url", &artifacts]);
    another_succeeds(&server.client().await, &dataset).await;
}

/// A first start that failed after the store got its identity and before the database had it can be
/// repeated.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_database_adopts_the_identity_of_its_store() {
    let (dir, share) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(share.path().join("bradley-store-id"), "begun").unwrap();
    let server = Server::start_with(
        dir.path(),
        &models(),
        &["--artifact-url", &url_of(share.path())],
    );
    let client = server.client().await;
    another_succeeds(&client, &upload(&client, "pairs.jsonl").await.name).await;
    let identity = std::fs::read_to_string(share.path().join("bradley-store-id")).unwrap();
    assert_eq!(identity, "begun");
}

// ---- jobs of another version

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_job_with_a_setting_of_another_version_waits_for_it_with_its_dataset() {
    let postgres = Postgres::start();
    let (dir, share) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut server = replica(dir.path(), &postgres, share.path(), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, checkpointing(&dataset, STEPS)).await;
    until_event(&client, &name, |e| is_step(e, 12)).await;
    pause(&client, &name).await;
    assert!(server.terminate(LIMIT).success());
    let of_job = format!("state = 'queued' WHERE id = '{}'", id(&name));
    let newer = "jsonb_set(request::jsonb, '{spec,optimizer,from_the_future}', '1')::text";
    postgres.sql(&format!("UPDATE jobs SET request = {newer}, {of_job}"));

    let server = replica(dir.path(), &postgres, share.path(), &[]);
    let client = server.client().await;
    let refused = try_get(&client, &name).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused)),
        (Code::FailedPrecondition, "JOB_UNREADABLE".into())
    );
    another_succeeds(&client, &upload(&client, "pairs.jsonl").await.name).await;
    let request = pb::DeleteDatasetRequest {
        name: dataset.clone(),
    };
    let refused = client.datasets().delete_dataset(request).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused)),
        (Code::FailedPrecondition, "IN_USE".into())
    );
    // The version that knows the setting finds all inputs of the job.
    let known = "(request::jsonb #- '{spec,optimizer,from_the_future}')::text";
    postgres.sql(&format!("UPDATE jobs SET request = {known}, {of_job}"));
    let told = finish(&client, &name).await;
    assert_eq!(
        state(&client, &name).await,
        pb::JobState::Succeeded,
        "{:?}",
        changes(&told)
    );
    assert_eq!(
        losses(&told),
        expected().await.0,
        "other losses than those of an undisturbed run"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn expired_jobs_that_cannot_be_read_do_not_stop_the_deletion_of_others() {
    let postgres = Postgres::start();
    let (dir, share) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = replica(dir.path(), &postgres, share.path(), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, job(&dataset, 1)).await;
    finish(&client, &name).await;
    postgres.sql(&format!(
        "INSERT INTO jobs (id, version, state, request, progress, latest_metrics, skipped_rows,
             create_time, expire_time)
         SELECT 'newer-' || n, version, 'succeeded', '{{\"from\":\"the future\"}}', progress,
             latest_metrics, skipped_rows, create_time, 1
         FROM jobs, generate_series(1, 200) AS n WHERE id = '{0}';
         UPDATE jobs SET expire_time = 2,
             request = jsonb_set(request::jsonb, '{{ttl_ms}}', '1')::text
         WHERE id = '{0}'",
        id(&name)
    ));
    until("the deletion", LIMIT, async || {
        try_get(&client, &name)
            .await
            .is_err_and(|e| e.code() == Code::NotFound)
    })
    .await;
    assert_eq!(
        postgres.sql("SELECT COUNT(*) FROM jobs"),
        ["200"],
        "jobs that cannot be read were deleted"
    );
}

// ---- missing files, and files that nobody needs

/// A paused job on one server, without an artifact store.
struct Local {
    dir: TempDir,
    server: Server,
    client: Client,
    dataset: String,
    name: String,
    /// Steps of its checkpoints.
    steps: Vec<u64>,
}

impl Local {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start_with(dir.path(), &models(), &["--lease", LEASE]);
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await.name;
        let name = submit(&client, checkpointing(&dataset, STEPS)).await;
        let second = |e: &Event| matches!(e, Event::CheckpointCreated(c) if c.step >= 20);
        until_event(&client, &name, second).await;
        pause(&client, &name).await;
        let mut local = Local {
            dir,
            server,
            client,
            dataset,
            name,
            steps: Vec::new(),
        };
        local.steps = local.stored_steps().await;
        assert!(local.steps.len() >= 2, "{:?}", local.steps);
        local
    }

    /// Returns the steps of the checkpoints in the database.
    async fn stored_steps(&self) -> Vec<u64> {
        let request = pb::ListCheckpointsRequest {
            parent: self.name.clone(),
        };
        let listed = self
            .client
            .checkpoints()
            .list_checkpoints(request)
            .await
            .unwrap()
            .into_inner();
        listed.checkpoints.iter().map(|c| c.step).collect()
    }

    fn newest(&self) -> u64 {
        self.steps[self.steps.len() - 1]
    }

    fn folder(&self, step: u64) -> PathBuf {
        checkpoints_folder(self.dir.path(), &self.name).join(step.to_string())
    }

    async fn restart(&mut self) {
        assert!(self.server.terminate(LIMIT).success());
        self.server = Server::start_with(self.dir.path(), &models(), &["--lease", LEASE]);
        self.client = self.server.client().await;
    }

    /// Resumes the job, which must wait: nothing is removed, and other jobs run.
    async fn assert_waits(&self) {
        resume(&self.client, &self.name).await.unwrap();
        waits(&self.client, &self.name, "ARTIFACT_MISSING").await;
        let said = get(&self.client, &self.name).await.error.unwrap().message;
        assert!(
            said.contains("data directory")
                && said.contains(&format!("checkpoints/{}", self.newest())),
            "{said}"
        );
        another_succeeds(&self.client, &self.dataset).await;
        assert_eq!(self.stored_steps().await, self.steps, "a row was removed");
    }

    /// Waits until the job has continued from a step and ended as if nothing had happened.
    async fn continues_from(&self, step: u64) {
        let told = finish(&self.client, &self.name).await;
        let changes = changes(&told);
        assert_eq!(
            state(&self.client, &self.name).await,
            pb::JobState::Succeeded,
            "{changes:?}"
        );
        let from = format!("continues from step {step}");
        assert!(
            changes
                .iter()
                .any(|(_, c)| c.to() == pb::JobState::Running && c.reason == from),
            "not {from}: {changes:?}"
        );
        check_history(&told);
        let (expected, weights) = expected().await;
        assert_eq!(
            losses(&told),
            *expected,
            "other losses than those of an undisturbed run"
        );
        assert!(
            adapter(&self.client, &self.name).await == *weights,
            "other weights than those of an undisturbed run"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_store_waits_for_the_folder_of_its_checkpoint() {
    let mut local = Local::new().await;
    let (newest, away) = (local.newest(), local.dir.path().join("away"));
    std::fs::rename(local.folder(newest), &away).unwrap();
    local.restart().await;
    local.assert_waits().await;
    std::fs::rename(&away, local.folder(newest)).unwrap();
    local.continues_from(newest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_store_continues_from_the_checkpoint_before_a_deleted_one() {
    let local = Local::new().await;
    let newest = local.newest();
    // The server has found the checkpoint intact; then the files disappear while the server runs.
    score(
        &local.client,
        &format!("{}/checkpoints/{newest}", local.name),
        pairs(),
    )
    .await;
    std::fs::remove_file(local.folder(newest).join(WEIGHTS)).unwrap();
    local.assert_waits().await;
    let request = pb::DeleteCheckpointRequest {
        name: format!("{}/checkpoints/{newest}", local.name),
    };
    local
        .client
        .checkpoints()
        .delete_checkpoint(request)
        .await
        .unwrap();
    local
        .continues_from(local.steps[local.steps.len() - 2])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_whose_list_of_files_has_changed_is_damaged_and_not_used() {
    let mut local = Local::new().await;
    let newest = local.newest();
    // A flipped bit in a file's name makes that file look missing.
    let state = local.folder(newest).join("trainer_state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    let changed = text.replace("optimizer.safetensors", "optimizes.safetensors");
    assert_ne!(changed, text);
    std::fs::write(&state, changed).unwrap();
    local.restart().await;
    resume(&local.client, &local.name).await.unwrap();
    local
        .continues_from(local.steps[local.steps.len() - 2])
        .await;
    let told = events(&local.client, &local.name).await;
    let warning = format!("checkpoint {newest} is removed");
    let is_warning = |e: &pb::TrainingEvent| match &e.event {
        Some(Event::Log(l)) => l.message.contains(&warning),
        _ => false,
    };
    assert!(told.iter().any(is_warning), "{told:?}");
}

/// Writes a file below a folder, and sets the age of the file and of the folder to `age`.
fn write_aged(folder: &Path, file: &str, age: Duration) {
    let path = folder.join(file);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, b"{}").unwrap();
    let time = SystemTime::now() - age;
    for aged in [path.as_path(), folder] {
        std::fs::File::open(aged)
            .unwrap()
            .set_modified(time)
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_old_local_files_of_jobs_that_were_never_stored_are_deleted() {
    let (dir, share) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let artifacts = url_of(share.path());
    let serve = || {
        Server::start_with(
            dir.path(),
            &models(),
            &["--artifact-url", &artifacts, "--lease", LEASE],
        )
    };
    let mut server = serve();
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let known = submit(&client, job(&dataset, 1)).await;
    finish(&client, &known).await;
    assert!(server.terminate(LIMIT).success());

    let (here, there) = (dir.path().join("jobs"), share.path().join("jobs"));
    let (config, weights) = (
        "init_adapter/adapter_config.json",
        format!("init_adapter/{WEIGHTS}"),
    );
    let names = |kind: &str| (0..6).map(|i| format!("{i}-{kind}")).collect::<Vec<_>>();
    for (kind, age) in [
        ("old", LONG_AGO),
        ("fresh", Duration::ZERO),
        ("ran", LONG_AGO),
    ] {
        for name in names(kind) {
            for root in [&here, &there] {
                write_aged(&root.join(&name), config, age);
                write_aged(&root.join(&name), &weights, age);
            }
        }
    }
    for name in names("ran") {
        write_aged(
            &there.join(name),
            "checkpoints/1/digest/trainer_state.json",
            LONG_AGO,
        );
    }
    // The files of a known job may have any age.
    write_aged(&there.join(id(&known)), config, LONG_AGO);
    // In the artifact store nothing may be deleted, because another database may know these jobs.
    let kept_there: Vec<PathBuf> = files(&there).into_iter().collect();

    let server = serve();
    let count = |root: &Path, kind: &str| {
        files(root)
            .iter()
            .filter(|p| p.display().to_string().contains(kind))
            .count()
    };
    until("the deletion from the data directory", LIMIT, async || {
        count(&here, "-old") == 0 && count(&here, "-ran") == 0
    })
    .await;
    assert_eq!(files(&there), kept_there);
    assert_eq!(count(&here, "-fresh"), 12);
    let client = server.client().await;
    another_succeeds(&client, &dataset).await;
    assert_eq!(
        files(&there)
            .iter()
            .filter(|p| kept_there.contains(p))
            .count(),
        kept_there.len()
    );
    assert_eq!(count(&here, "-fresh"), 12);
}
