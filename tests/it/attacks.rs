//! Requests, files and connections that cost a server far more than they cost their sender, and
//! settings and rows whose meaning could be lost silently.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bradley::rpc::client::{Client, ClientError, Status};
use bradley::rpc::pb::{self, training_event::Event};
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, FloatType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::SchemaDescriptor;
use prost::Message as _;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tonic::Code;
use tonic_types::{FieldViolation, StatusExt as _};

use crate::server::{Server, create, finish, get, job, job_error_reason, reason, submit, upload};
use crate::support::golden;
use crate::wait::until;

/// Maximum time of a call while a server is under attack.
const PATIENCE: Duration = Duration::from_secs(60);

fn tiny() -> String {
    format!("tiny={}", golden("models/llama").display())
}

/// Starts a server on the tiny Llama with limits on one resource of its process.
fn start_limited(
    data_dir: &Path,
    resource: libc::__rlimit_resource_t,
    soft: u64,
    hard: u64,
) -> Server {
    let limit = libc::rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    };
    Server::start_as(data_dir, &tiny(), &[], |command| {
        let set = move || {
            // SAFETY: the pointer is to a complete rlimit, which the closure owns.
            let done = unsafe { libc::setrlimit(resource, &raw const limit) };
            if done == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        };
        // SAFETY: the closure only makes the system call setrlimit, which is allowed between fork
        // and exec.
        unsafe { command.pre_exec(set) };
    })
}

/// Waits for a future and fails the test if it takes too long.
async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(PATIENCE, work).await;
    done.unwrap_or_else(|_| panic!("{what} takes more than {PATIENCE:?}"))
}

/// Returns the first 300 characters, because a server that fails these tests may answer with
/// gigabytes.
fn start_of(text: &str) -> String {
    text.chars().take(300).collect()
}

/// Checks that a call is refused with this code, and returns the error.
fn refused<T>(answer: Result<T, Status>, code: Code) -> Status {
    let Err(status) = answer else {
        panic!("the call is accepted; the expected error is {code:?}")
    };
    assert_eq!(status.code(), code, "{}", start_of(status.message()));
    status
}

fn violations(status: &Status) -> Vec<FieldViolation> {
    status
        .get_details_bad_request()
        .map(|b| b.field_violations)
        .unwrap_or_default()
}

fn creation(training_job: pb::TrainingJob) -> pb::CreateTrainingJobRequest {
    pb::CreateTrainingJobRequest {
        training_job: Some(training_job),
        ..Default::default()
    }
}

/// Returns a job of two steps with this objective.
fn job_with(dataset: &str, dpo: pb::DpoConfig) -> pb::TrainingJob {
    pb::TrainingJob {
        dpo: Some(dpo),
        ..job(dataset, 2)
    }
}

fn losses(names: impl IntoIterator<Item = impl Into<String>>) -> Vec<pb::WeightedLoss> {
    let term = |loss_type| pb::WeightedLoss {
        loss_type,
        weight: None,
        label_smoothing: None,
    };
    names.into_iter().map(|name| term(name.into())).collect()
}

// ---- repeated fields without a limit

/// Returns the peak memory of a server, in KiB.
pub fn peak_kib(pid: u32) -> u64 {
    peak_kib_while_running(pid).expect("the server has ended")
}

/// Returns the peak memory of a process in KiB, or `None` if it has ended.
pub fn peak_kib_while_running(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Sends one request with far too many elements to a server that may have 8 GiB. The answer must be
/// short and name `field`, and neither the server nor its other clients may be affected.
async fn refused_at_little_cost<T>(
    field: &str,
    call: impl AsyncFnOnce(&Client) -> Result<T, Status>,
) -> Vec<FieldViolation> {
    let dir = tempfile::tempdir().unwrap();
    let server = start_limited(dir.path(), libc::RLIMIT_AS, 8 << 30, 8 << 30);
    let (client, other) = (server.client().await, server.client().await);
    let answer = tokio::time::timeout(PATIENCE, call(&client)).await;
    let answer = answer.unwrap_or_else(|_| {
        let peak = peak_kib(server.pid());
        panic!("no answer within {PATIENCE:?}; the server has had {peak} KiB")
    });
    let status = refused(answer, Code::InvalidArgument);
    let found = violations(&status);
    assert!((1..=3).contains(&found.len()), "{} violations", found.len());
    assert_eq!(found[0].field, field);
    let numbers = found[0].description.split(|c: char| !c.is_ascii_digit());
    let allowed = numbers
        .filter_map(|n| n.parse::<u64>().ok())
        .find(|n| (1..=1000).contains(n));
    assert!(
        allowed.is_some(),
        "the limit is not named: {}",
        found[0].description
    );
    assert!(soon("a health check", client.health()).await.unwrap());
    let models = pb::ListModelsRequest {};
    soon("another client's call", other.models().list_models(models))
        .await
        .unwrap();
    let peak = peak_kib(server.pid());
    assert!(peak < 1 << 20, "the server had {peak} KiB");
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn fifteen_million_states_get_one_violation_and_cost_no_memory() {
    let found = refused_at_little_cost("states", async |client| {
        let states = vec![0; 15_000_000];
        let request = pb::ListTrainingJobsRequest {
            states,
            ..Default::default()
        };
        client.training().list_training_jobs(request).await
    })
    .await;
    assert_eq!(found.len(), 1, "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn four_hundred_thousand_losses_are_refused_in_a_few_words() {
    refused_at_little_cost("training_job.dpo.losses", async |client| {
        let losses = vec![pb::WeightedLoss::default(); 400_000];
        let wanted = job_with(
            "datasets/x",
            pb::DpoConfig {
                losses,
                ..Default::default()
            },
        );
        client
            .training()
            .create_training_job(creation(wanted))
            .await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_mask_of_half_a_million_paths_is_refused_in_a_few_words() {
    for path in ["x", "display_name"] {
        refused_at_little_cost("update_mask.paths", async |client| {
            let update_mask = Some(prost_types::FieldMask {
                paths: vec![path.into(); 500_000],
            });
            let named = pb::TrainingJob {
                name: "trainingJobs/x".into(),
                ..Default::default()
            };
            let request = pb::UpdateTrainingJobRequest {
                training_job: Some(named),
                update_mask,
            };
            client.training().update_training_job(request).await
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_million_target_modules_are_refused_in_a_few_words() {
    refused_at_little_cost("training_job.lora.target_modules", async |client| {
        let target_modules = vec!["x".to_owned(); 500_000];
        let lora = pb::LoraConfig {
            target_modules,
            ..Default::default()
        };
        let method = Some(pb::training_job::Method::Lora(lora));
        let wanted = pb::TrainingJob {
            method,
            ..job("datasets/x", 1)
        };
        client
            .training()
            .create_training_job(creation(wanted))
            .await
    })
    .await;
}

// ---- errors that repeat a client's own text

/// Returns the size in bytes of a status in an answer's headers: its message percent-encoded as
/// tonic does it, its details as base64 without padding.
fn header_bytes(status: &Status) -> usize {
    let is_plain = |b: &u8| b.is_ascii_graphic() && !b"\"#%<>`?{}".contains(b);
    let message: usize = status
        .message()
        .bytes()
        .map(|b| if is_plain(&b) { 1 } else { 3 })
        .sum();
    message + (status.details().len() * 4).div_ceil(3)
}

/// Returns the number N in "and N more" at the end of the violations or of the message.
fn left_out(status: &Status) -> Option<usize> {
    let last = violations(status)
        .pop()
        .map(|v| v.description)
        .unwrap_or_default();
    [last.as_str(), status.message()].iter().find_map(|text| {
        let (_, rest) = text.rsplit_once("and ")?;
        rest.split_once(" more")?.0.parse().ok()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_quote_little_of_what_a_client_sent() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    // Percent-encoding turns a space into three bytes, and an error that quotes the last text
    // writes it as `\u{10ffff}`.
    for text in ["x", " ", "%", "é", "\"", "\u{10ffff}"] {
        let long = text.repeat(100_000);
        let bad_losses = |n: usize| pb::DpoConfig {
            losses: losses((0..n).map(|i| format!("{i}{}", text.repeat(5000)))),
            ..Default::default()
        };
        let policy = pb::TrainingJob {
            policy: long.clone(),
            ..job("datasets/x", 1)
        };
        let everything = pb::TrainingJob {
            policy: long.clone(),
            reference: long.clone(),
            precision: long.clone(),
            ..job_with(&long, bad_losses(16))
        };
        let mut training = client.training();
        let page = pb::ListTrainingJobsRequest {
            page_token: long.clone(),
            ..Default::default()
        };
        let datasets = pb::ListDatasetsRequest {
            page_token: long.clone(),
            ..Default::default()
        };
        let named = pb::GetDatasetRequest {
            name: format!("datasets/{long}"),
        };
        let many = job_with("datasets/x", bad_losses(40));
        // Each case has the number of its invalid fields.
        let answers = [
            (
                "a long policy",
                1,
                training.create_training_job(creation(policy)).await.err(),
            ),
            (
                "40 losses",
                40,
                training.create_training_job(creation(many)).await.err(),
            ),
            (
                "many fields",
                20,
                training
                    .create_training_job(creation(everything))
                    .await
                    .err(),
            ),
            (
                "a job's page token",
                1,
                training.list_training_jobs(page).await.err(),
            ),
            (
                "a dataset's page token",
                1,
                client.datasets().list_datasets(datasets).await.err(),
            ),
            (
                "a dataset's name",
                1,
                client.datasets().get_dataset(named).await.err(),
            ),
        ];
        for (what, bad_fields, answer) in answers {
            let status = answer.unwrap_or_else(|| panic!("{what} is accepted"));
            let shown = start_of(status.message());
            assert_eq!(
                status.code(),
                Code::InvalidArgument,
                "{what} of {text:?}: {shown}"
            );
            let size = header_bytes(&status);
            assert!(
                size <= 4096,
                "{what} of {text:?}: {size} bytes of headers: {shown}"
            );
            let found = violations(&status);
            assert!(
                (1..=50).contains(&found.len()),
                "{what}: {} violations",
                found.len()
            );
            // Too many losses may be reported as one violation of the list.
            if found.iter().any(|v| v.field == "training_job.dpo.losses") {
                continue;
            }
            let listed = found.iter().filter(|v| !v.field.is_empty()).count();
            let more = left_out(&status).unwrap_or(0);
            assert_eq!(listed + more, bad_fields, "{what} of {text:?}: {found:?}");
        }
    }
}

// ---- connections

/// Answers pings and settings as an HTTP/2 client must, so that keep-alive does not close the
/// connection, but makes no call. Returns when the server closes the connection.
async fn idle_http2(connection: TcpStream) -> std::io::Result<()> {
    speak_http2(connection, &[]).await
}

/// Does the same after sending these frames, which may open calls.
pub async fn speak_http2(mut connection: TcpStream, frames: &[u8]) -> std::io::Result<()> {
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const ACK: u8 = 1;
    connection
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await?;
    connection
        .write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0])
        .await?;
    connection.write_all(frames).await?;
    loop {
        let mut header = [0; 9];
        connection.read_exact(&mut header).await?;
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        let mut payload = vec![0; length as usize];
        connection.read_exact(&mut payload).await?;
        let (kind, flags) = (header[3], header[4]);
        if flags & ACK != 0 {
            continue;
        }
        match kind {
            SETTINGS => {
                connection
                    .write_all(&[0, 0, 0, SETTINGS, ACK, 0, 0, 0, 0])
                    .await?
            }
            PING => {
                connection
                    .write_all(&[0, 0, 8, PING, ACK, 0, 0, 0, 0])
                    .await?;
                connection.write_all(&payload).await?;
            }
            _ => {}
        }
    }
}

/// Opens `number` idle HTTP/2 connections, which live as long as the returned set.
async fn flood(server: &Server, number: usize) -> JoinSet<std::io::Result<()>> {
    let address = server.address.trim_start_matches("http://").to_owned();
    let connected = Arc::new(AtomicUsize::new(0));
    let mut connections = JoinSet::new();
    for _ in 0..number {
        let (address, connected) = (address.clone(), connected.clone());
        connections.spawn(async move {
            let connection = TcpStream::connect(address).await?;
            connected.fetch_add(1, Ordering::Relaxed);
            idle_http2(connection).await
        });
    }
    // Waits until the server accepts no more connections. The kernel's queue then fills up, and the
    // remaining clients cannot connect.
    let (mut before, mut unchanged_since) = ((0, 0), Instant::now());
    until(
        "the end of new connections",
        Duration::from_secs(30),
        async || {
            let now = (connected.load(Ordering::Relaxed), descriptors(server.pid()));
            if now != before || now.0 == 0 {
                (before, unchanged_since) = (now, Instant::now());
            }
            unchanged_since.elapsed() >= Duration::from_secs(1)
        },
    )
    .await;
    let connected = before.0;
    assert!(
        connected >= number / 2,
        "{connected} of {number} connections could be opened"
    );
    connections
}

/// Returns the number of files that a process has open.
fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("the server has ended")
        .count()
}

/// Returns the soft limit on a process's open files.
fn soft_limit(pid: u32) -> u64 {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits
        .lines()
        .find_map(|l| l.strip_prefix("Max open files"))
        .unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

async fn http_get(address: &str, path: &str) -> std::io::Result<String> {
    let mut connection = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    Ok(answer)
}

async fn assert_live(server: &Server) {
    let answer = soon("GET /livez", http_get(&server.http, "/livez"))
        .await
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// Creates a job and pauses it, so that its event stream stays open without new events.
async fn paused_job(client: &Client, dataset: &str) -> String {
    let name = submit(client, job(dataset, 100_000)).await;
    let request = pb::PauseTrainingJobRequest { name: name.clone() };
    client.training().pause_training_job(request).await.unwrap();
    let is_paused = |e: &pb::TrainingEvent| match &e.event {
        Some(Event::StateChange(change)) => change.to() == pb::JobState::Paused,
        _ => false,
    };
    soon("a pause", client.follow(&name, 0, |e| !is_paused(&e)))
        .await
        .unwrap();
    name
}

#[tokio::test(flavor = "multi_thread")]
async fn four_hundred_idle_connections_take_no_descriptor_that_the_server_needs() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_limited(dir.path(), libc::RLIMIT_NOFILE, 256, 256);
    // A client that follows a paused job on a connection of its own.
    let watcher = server.client().await;
    let dataset = upload(&watcher, "pairs.jsonl").await;
    let waiting = paused_job(&watcher, &dataset.name).await;
    let request = pb::StreamTrainingEventsRequest {
        parent: waiting.clone(),
        after_sequence: 0,
        ..Default::default()
    };
    let mut events = watcher
        .training()
        .stream_training_events(request)
        .await
        .unwrap()
        .into_inner();
    let followed = tokio::spawn(async move {
        let mut states = Vec::new();
        while let Some(event) = events.message().await? {
            if let Some(Event::StateChange(change)) = event.event {
                states.push(change.to());
            }
        }
        Ok::<_, Status>(states)
    });

    let flooding = flood(&server, 400).await;
    assert_live(&server).await;
    let upload_pairs = |client: &Client| {
        let client = client.clone();
        async move {
            let file = golden("pairs.jsonl");
            client
                .upload_dataset(&file, pb::UploadMetadata::default(), |_| {})
                .await
        }
    };
    soon("an upload on an old connection", upload_pairs(&watcher))
        .await
        .unwrap();
    let newcomer = soon("a new connection", server.client()).await;
    assert!(soon("a health check", newcomer.health()).await.unwrap());
    let dataset = soon("an upload", upload_pairs(&newcomer)).await.unwrap();
    let name = soon("a job's creation", submit(&newcomer, job(&dataset.name, 2))).await;
    let ended = soon("a tiny job", finish(&newcomer, &name))
        .await
        .pop()
        .and_then(|e| e.event);
    let Some(Event::StateChange(change)) = ended else {
        panic!("{ended:?}")
    };
    assert_eq!(change.to(), pb::JobState::Succeeded, "{}", change.reason);
    assert_live(&server).await;

    // The stream was not closed: it still delivers new events, until the job ends.
    assert!(!followed.is_finished(), "{:?}", followed.await);
    let cancel = pb::CancelTrainingJobRequest { name: waiting };
    soon(
        "a cancellation",
        newcomer.training().cancel_training_job(cancel),
    )
    .await
    .unwrap();
    let states = soon("the end of the stream", followed)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(states.last(), Some(&pb::JobState::Cancelled), "{states:?}");
    drop(flooding);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_silent_connections_to_the_http_port_do_not_stop_probes() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_limited(dir.path(), libc::RLIMIT_NOFILE, 256, 256);
    assert_live(&server).await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(&server.http).await.unwrap());
    }
    let _flooding = flood(&server, 100).await;
    assert_live(&server).await;
    let client = soon("a new connection", server.client()).await;
    assert!(soon("a health check", client.health()).await.unwrap());
    let file = golden("pairs.jsonl");
    let upload = client.upload_dataset(&file, pb::UploadMetadata::default(), |_| {});
    soon("an upload", upload).await.unwrap();
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_warns_that_the_limit_of_open_files_lowers_max_connections() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_limited(dir.path(), libc::RLIMIT_NOFILE, 256, 256);
    until(
        "a log line about max_connections",
        Duration::from_secs(60),
        async || server.has_logged("max_connections"),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_raises_its_limit_of_open_files_as_far_as_it_may() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_limited(dir.path(), libc::RLIMIT_NOFILE, 256, 4096);
    assert_eq!(soft_limit(server.pid()), 4096);
}

// ---- findings about rows

/// Writes a JSONL file.
fn jsonl(dir: &Path, rows: &[serde_json::Value]) -> PathBuf {
    let file = dir.join("rows.jsonl");
    let lines: Vec<String> = rows.iter().map(|r| r.to_string()).collect();
    std::fs::write(&file, lines.join("\n")).unwrap();
    file
}

/// Values of a Parquet column: one for each row, possibly absent. A column of messages has one
/// message per row.
pub enum Column {
    Text(Vec<Option<&'static str>>),
    Double(Vec<Option<f64>>),
    Float(Vec<Option<f32>>),
}

/// Writes a Parquet file. `schema` has a leaf for each column. Only a leaf itself may be optional,
/// not a group above it.
pub fn write_parquet(file: &Path, schema: &str, columns: Vec<Column>) {
    let schema = Arc::new(parse_message_type(&format!("message rows {{ {schema} }}")).unwrap());
    let leaves = SchemaDescriptor::new(schema.clone());
    let properties = Arc::new(
        WriterProperties::builder()
            .set_compression(Compression::ZSTD(Default::default()))
            .build(),
    );
    let sink = std::fs::File::create(file).unwrap();
    let mut writer = SerializedFileWriter::new(sink, schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for (i, column) in columns.into_iter().enumerate() {
        let leaf = leaves.column(i);
        let mut out = group.next_column().unwrap().unwrap();
        // An absent value is defined only up to the level above it.
        macro_rules! write_column {
            ($kind:ty, $values:expr, $to:expr) => {{
                let definition_levels: Vec<i16> = $values
                    .iter()
                    .map(|v| leaf.max_def_level() - i16::from(v.is_none()))
                    .collect();
                let repetition_levels = vec![0; definition_levels.len()];
                let present: Vec<_> = $values.into_iter().flatten().map($to).collect();
                out.typed::<$kind>()
                    .write_batch(&present, Some(&definition_levels), Some(&repetition_levels))
                    .unwrap();
            }};
        }
        match column {
            Column::Text(values) => write_column!(ByteArrayType, values, ByteArray::from),
            Column::Double(values) => write_column!(DoubleType, values, |x| x),
            Column::Float(values) => write_column!(FloatType, values, |x| x),
        }
        out.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

async fn upload_file(client: &Client, file: &Path) -> Result<pb::Dataset, ClientError> {
    client
        .upload_dataset(file, pb::UploadMetadata::default(), |_| {})
        .await
}

/// A finding as (row, field, reason, true if it is an error).
type Finding<'a> = (u64, &'a str, &'a str, bool);

fn findings(report: &pb::ValidationReport) -> BTreeSet<Finding<'_>> {
    let error = |i: &pb::RowIssue| i.severity() == pb::IssueSeverity::Error;
    report
        .issues
        .iter()
        .map(|i| (i.row, i.field.as_str(), i.reason.as_str(), error(i)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn findings_quote_little_of_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let long = "w".repeat(50_000);
    let mut rows = vec![json!({"id": "good", "prompt": "1 2", "chosen": " 3", "rejected": " 4"})];
    for i in 0..100 {
        let id = format!("{i}{}", "i".repeat(50_000));
        rows.push(json!({"id": id, "prompt": "1", "chosen": "2", "rejected": "3", "weight": long}));
    }
    let file = jsonl(dir.path(), &rows);
    let uploaded = upload_file(&client, &file).await.unwrap();
    let request = pb::GetDatasetRequest {
        name: uploaded.name.clone(),
    };
    let got = client
        .datasets()
        .get_dataset(request)
        .await
        .unwrap()
        .into_inner();
    for dataset in [&uploaded, &got] {
        let report = dataset.report.as_ref().unwrap();
        assert_eq!((report.rows, report.valid_rows), (101, 1));
        assert_eq!(report.counts["invalid_weight"], 100);
        assert_eq!(report.issues.len(), 100);
        let size = dataset.encoded_len();
        assert!(size < 1_000_000, "the dataset has {size} bytes");
        for i in &report.issues {
            let (id, message) = (i.id.chars().count(), i.message.chars().count());
            assert!(
                id <= 400 && message <= 400,
                "{id} characters of id, {message} of message"
            );
        }
    }
    let request = pb::ListDatasetsRequest::default();
    let listed = client
        .datasets()
        .list_datasets(request)
        .await
        .unwrap()
        .into_inner();
    assert!(
        listed.encoded_len() < 100_000,
        "the list has {} bytes",
        listed.encoded_len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn parquet_weights_that_are_no_finite_numbers_are_findings() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let weights = [
        Some(1.0),
        Some(f64::NAN),
        Some(f64::INFINITY),
        Some(f64::NEG_INFINITY),
        Some(2.0),
        None,
    ];
    let columns = [
        ("double", Column::Double(weights.to_vec())),
        (
            "float",
            Column::Float(weights.map(|w| w.map(|w| w as f32)).to_vec()),
        ),
    ];
    for (kind, weights) in columns {
        let file = dir.path().join(kind);
        let schema = format!(
            "required binary prompt (UTF8); required binary chosen (UTF8);
             required binary rejected (UTF8); optional {kind} weight;"
        );
        let text = |texts: [&'static str; 6]| Column::Text(texts.map(Some).to_vec());
        let columns = vec![
            text(["1", "2", "3", "4", "5", "6"]),
            text(["a"; 6]),
            text(["b"; 6]),
            weights,
        ];
        write_parquet(&file, &schema, columns);
        let report = upload_file(&client, &file).await.unwrap().report.unwrap();
        let expected: BTreeSet<Finding<'_>> = [2, 3, 4]
            .map(|row| (row, "weight", "invalid_weight", true))
            .into();
        assert_eq!(findings(&report), expected, "{kind}");
        assert_eq!((report.rows, report.valid_rows), (6, 3), "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn extra_fields_of_a_row_are_used_or_reported() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let mut rows = Vec::new();
    // `change` adds a key to a chat row.
    let mut add = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut row = json!({
            "prompt": [{"role": "user", "content": format!("Question {}?", rows.len())}],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        });
        change(&mut row);
        rows.push(row);
    };
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    add(&|row| row["tools"] = tools.clone());
    let calls = json!([{"type": "function", "function": {"name": "f", "arguments": "{}"}}]);
    add(&|row| row["chosen"][0]["tool_calls"] = calls.clone());
    add(&|row| row["images"] = json!(["a.png"]));
    add(&|row| row["chat_template_kwargs"] = json!({"enable_thinking": false}));
    add(&|row| row["chosen"][0]["reasoning_content"] = json!("Because."));
    add(&|row| row["rejected"][0]["thinking"] = json!("Hm."));
    add(&|row| row["prompt"][0]["name"] = json!("Ada"));
    add(&|row| row["system"] = json!("Be brief."));
    // Empty values have no information that could be lost.
    add(&|row| {
        for column in ["tools", "images", "chat_template_kwargs", "system"] {
            row[column] = json!(null);
        }
        for key in ["tool_calls", "reasoning_content", "thinking", "name"] {
            row["chosen"][0][key] = json!(null);
        }
    });
    add(&|row| {
        row["tools"] = json!([]);
        row["images"] = json!([]);
        row["chat_template_kwargs"] = json!({});
        row["system"] = json!("");
        row["chosen"][0]["tool_calls"] = json!([]);
        row["chosen"][0]["reasoning_content"] = json!("");
    });
    add(&|row| {
        row["chosen"][0]["content"] = json!([{"type": "image_url", "image_url": {"url": "a.png"}}])
    });
    add(&|row| row["system"] = json!("Be long."));
    add(&|row| row["note"] = json!("A note."));
    add(&|row| row["note"] = json!("Another note."));
    // Only dialogues can have tools or a system message.
    rows.push(json!({"prompt": "1 2", "chosen": " 3", "rejected": " 4", "tools": tools}));
    rows.push(json!({"prompt": "2 3", "chosen": " 4", "rejected": " 5",
                     "chat_template_kwargs": {"a": 1}}));
    rows.push(json!({"prompt": "3 4", "chosen": " 5", "rejected": " 6", "system": "Be brief."}));
    let file = jsonl(dir.path(), &rows);
    let report = upload_file(&client, &file).await.unwrap().report.unwrap();
    // Tools, tool calls, reasoning, names, template arguments and system messages are used.
    let expected: BTreeSet<Finding<'_>> = [
        (3, "images", "unsupported_field", true),
        (11, "chosen[0].content[0].type", "unsupported_field", true),
        (13, "note", "ignored_field", false),
        (15, "tools", "unsupported_field", true),
        (16, "chat_template_kwargs", "ignored_field", false),
        (17, "system", "unsupported_field", true),
    ]
    .into();
    assert_eq!(findings(&report), expected, "{report:?}");
    assert_eq!((report.rows, report.valid_rows), (17, 13));
    // An unused column is listed once and counted in every row.
    assert_eq!(
        (
            report.counts["unsupported_field"],
            report.counts["ignored_field"]
        ),
        (4, 3)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn extra_columns_of_a_parquet_row_are_used_or_reported() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let message = |more: &str| {
        format!(
            "(LIST) {{ repeated group list {{ required group element {{
                 required binary role (UTF8); required binary content (UTF8); {more} }} }} }}"
        )
    };
    let schema = format!(
        "required group prompt {}
         required group chosen {}
         required group rejected {}
         optional binary tools (UTF8); optional binary images (UTF8);
         optional binary chat_template_kwargs (UTF8); optional binary system (UTF8);
         optional binary note (UTF8);",
        message(""),
        message("optional binary reasoning_content (UTF8); optional binary tool_calls (UTF8);"),
        message("")
    );
    const ROWS: usize = 7;
    let every = |text: &'static str| Column::Text(vec![Some(text); ROWS]);
    // Row number `row`, counted from 1, has a text; the others have none.
    let one = |row: usize, text: &'static str| {
        Column::Text((1..=ROWS).map(|r| (r == row).then_some(text)).collect())
    };
    let questions = ["1?", "2?", "3?", "4?", "5?", "6?", "7?"];
    let columns = vec![
        every("user"),
        Column::Text(questions.map(Some).to_vec()),
        every("assistant"),
        every("Yes."),
        one(1, "Because."),
        one(2, r#"[{"function": {"name": "f"}}]"#),
        every("assistant"),
        every("No."),
        one(3, r#"[{"function": {"name": "f"}}]"#),
        one(4, "a.png"),
        one(5, r#"{"enable_thinking": false}"#),
        one(6, "Be brief."),
        one(7, "A note."),
    ];
    let file = dir.path().join("rows.parquet");
    write_parquet(&file, &schema, columns);
    let report = upload_file(&client, &file).await.unwrap().report.unwrap();
    let expected: BTreeSet<Finding<'_>> = [
        (4, "images", "unsupported_field", true),
        (1, "note", "ignored_field", false),
    ]
    .into();
    assert_eq!(findings(&report), expected, "{report:?}");
    assert_eq!((report.rows, report.valid_rows), (7, 6));
    assert_eq!(report.counts["ignored_field"], 6, "{report:?}");
}

// ---- objectives with contradictory settings
//
// The AOT losses sort within the batch, so a loss belongs to no row and cannot have its weight.

fn assert_violation<T>(answer: Result<T, Status>, field: &str) {
    let status = refused(answer, Code::InvalidArgument);
    let fields: Vec<String> = violations(&status).into_iter().map(|v| v.field).collect();
    assert_eq!(fields, [field], "{}", status.message());
}

/// Checks a job without starting it.
async fn check(client: &Client, wanted: pb::TrainingJob) -> Result<pb::TrainingJob, Status> {
    let request = pb::CreateTrainingJobRequest {
        validate_only: true,
        ..creation(wanted)
    };
    client
        .training()
        .create_training_job(request)
        .await
        .map(|r| r.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn aot_losses_refuse_use_weighting() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    for names in [&["aot"][..], &["aot_unpaired"], &["sigmoid", "aot"]] {
        let dpo = |use_weighting| pb::DpoConfig {
            losses: losses(names.iter().copied()),
            use_weighting,
            ..Default::default()
        };
        check(&client, job_with(&dataset, dpo(false)))
            .await
            .unwrap();
        let answer = check(&client, job_with(&dataset, dpo(true))).await;
        assert_violation(answer, "training_job.dpo.use_weighting");
    }
    let plain = pb::DpoConfig {
        use_weighting: true,
        ..Default::default()
    };
    check(&client, job_with(&dataset, plain)).await.unwrap();
}

/// Returns the reason why a job is refused for its rows, when it is created or after it has read
/// them.
async fn refusal_of_rows(client: &Client, wanted: pb::TrainingJob) -> String {
    let (reason, message) = match create(client, wanted).await {
        Err(status) => {
            assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
            (reason(&status), status.message().to_owned())
        }
        Ok(created) => {
            let name = created.name;
            finish(client, &name).await;
            let ended = get(client, &name).await;
            assert_eq!(ended.state(), pb::JobState::Failed);
            let error = ended.error.unwrap();
            (job_error_reason(&error), error.message)
        }
    };
    assert_eq!(reason, "DATASET_INVALID", "{message}");
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn aot_losses_refuse_rows_of_unequal_weight() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let row = |i: usize, weight: f64| {
        let prompt = format!("{i} {i}");
        json!({"prompt": prompt, "chosen": " 5 6", "rejected": " 7", "weight": weight})
    };
    let file = jsonl(
        dir.path(),
        &[row(1, 1.0), row(2, 1.0), row(3, 2.0), row(4, 1.0)],
    );
    let weighted = upload_file(&client, &file).await.unwrap().name;
    let file = jsonl(dir.path(), &[row(1, 1.0), row(2, 1.0)]);
    let equal = upload_file(&client, &file).await.unwrap().name;
    for name in ["aot", "aot_unpaired"] {
        let wanted = |dataset: &str| {
            let dpo = pb::DpoConfig {
                losses: losses([name]),
                ..Default::default()
            };
            job_with(dataset, dpo)
        };
        let message = refusal_of_rows(&client, wanted(&weighted)).await;
        // The message names the row, the problem and the remedy.
        assert!(message.contains("row 3"), "{message}");
        assert!(
            message.contains("weight") && message.contains(name),
            "{message}"
        );
        let request = pb::EstimateTrainingJobRequest {
            training_job: Some(wanted(&weighted)),
        };
        let status = refused(
            client.training().estimate_training_job(request).await,
            Code::FailedPrecondition,
        );
        assert_eq!(
            status.get_details_error_info().unwrap().reason,
            "DATASET_INVALID"
        );
        // These losses are made for rows of equal weight.
        let name = submit(&client, wanted(&equal)).await;
        let last = finish(&client, &name).await.pop().and_then(|e| e.event);
        let Some(Event::StateChange(change)) = last else {
            panic!("{last:?}")
        };
        assert_eq!(change.to(), pb::JobState::Succeeded, "{}", change.reason);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reference_sync_is_refused_where_no_loss_reads_the_reference() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let moving = |names: &[&str]| {
        let dpo = pb::DpoConfig {
            losses: losses(names.iter().copied()),
            reference_sync: Some(pb::ReferenceSync {
                alpha: Some(0.5),
                every_steps: Some(1),
            }),
            ..Default::default()
        };
        let method = Some(pb::training_job::Method::Full(pb::FullConfig {}));
        pb::TrainingJob {
            method,
            ..job_with(&dataset, dpo)
        }
    };
    for names in [&["simpo"][..], &["orpo"], &["sft"], &["simpo", "sft"]] {
        let answer = check(&client, moving(names)).await;
        assert_violation(answer, "training_job.dpo.reference_sync");
    }
    // One loss that reads the reference is enough.
    check(&client, moving(&["sft", "sigmoid"])).await.unwrap();
}

// ---- messages of the command line

/// Runs a command, and returns its exit status and its output with its errors.
fn bradley(server: &Server, args: &[&str]) -> (Option<i32>, String) {
    let done: Output = std::process::Command::new(crate::support::binary())
        .args(args)
        .env("BRADLEY_SERVER", &server.address)
        .env_remove("BRADLEY_CONFIG")
        .output()
        .unwrap();
    let said = [done.stdout, done.stderr].concat();
    (done.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn train_checks_lengths_as_the_job_will_and_names_its_own_flags() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let long = "The river rises in the hills and flows past the old mill. ".repeat(2);
    let row = |i: usize, prompt: &str| {
        let prompt = format!("{i}{prompt}");
        json!({"prompt": prompt, "chosen": " 5", "rejected": " 7"})
    };
    let rows = [
        row(1, " 2"),
        row(2, &long),
        row(3, " 4"),
        row(4, " 5"),
        row(5, &long),
        row(6, " 7"),
    ];
    let file = jsonl(dir.path(), &rows);
    let train = |more: &[&str]| {
        let file = file.to_str().unwrap();
        let args = [
            "train",
            "--data",
            file,
            "--rank",
            "4",
            "--batch-size",
            "2",
            "--max-steps",
            "2",
            "--watch",
        ];
        bradley(&server, &[&args[..], more].concat())
    };
    let (code, said) = train(&["--max-length", "16"]);
    assert!(said.contains("6 rows, 4 of them usable"), "{said}");
    for row in ["row 2", "row 5"] {
        let names_row = |line: &str| line.contains(row) && line.contains("prompt_fills_max_length");
        assert!(said.lines().any(names_row), "{row} is not named: {said}");
    }
    assert!(
        said.contains("--skip-bad-rows") && said.contains("--max-length"),
        "{said}"
    );
    assert!(!said.contains("row_policy"), "{said}");
    assert!(matches!(code, Some(1 | 2)), "{code:?}: {said}");

    let (code, said) = train(&["--max-length", "16", "--skip-bad-rows"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("succeeded"), "{said}");
    let (code, said) = train(&[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("6 rows, 6 of them usable"), "{said}");
}
