//! Uploads of datasets. Parquet files are decoded in a separate process, so that the memory that a
//! file takes, or a crash, does not affect the server.

use std::collections::BTreeSet;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bradley::rpc::client::{Client, ClientError, UploadError};
use bradley::rpc::pb;
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

use crate::attacks::peak_kib;
use crate::hostile::{assert_has_reason, mutate, number_of_cases, resident_kib};
use crate::server::{Server, get, is_audited, job, submit, succeed};
use crate::support::golden;
use crate::wait::{holds_for, until};

/// Limit for what a server does within seconds, on a busy machine.
const NOTICED: Duration = Duration::from_secs(60);

const MESSAGES: &str = "(LIST) { repeated group list { required group element {
    optional binary role (UTF8); optional binary content (UTF8); } } }";

async fn upload(server: &Server, file: &Path) -> Result<pb::Dataset, ClientError> {
    server
        .client()
        .await
        .upload_dataset(file, pb::UploadMetadata::default(), |_| {})
        .await
}

/// Writes a good record, then one whose lists have `messages` messages without text. Parquet stores
/// these as runs of levels, in a few bytes for any number of messages.
fn write_long_dialogues(path: &Path, messages: usize) {
    let schema = ["prompt", "chosen", "rejected"]
        .map(|c| format!("required group {c} {MESSAGES}"))
        .concat();
    let schema = Arc::new(parse_message_type(&format!("message pairs {{ {schema} }}")).unwrap());
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_dictionary_enabled(false)
        .set_statistics_enabled(parquet::file::properties::EnabledStatistics::None);
    let mut writer = SerializedFileWriter::new(
        std::fs::File::create(path).unwrap(),
        schema,
        Arc::new(properties.build()),
    )
    .unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut texts = ["user", "Q", "assistant", "yes", "assistant", "no"].into_iter();
    while let Some(mut column) = group.next_column().unwrap() {
        let text = ByteArray::from(texts.next().unwrap());
        column
            .typed::<ByteArrayType>()
            .write_batch(&[text], Some(&[2]), Some(&[0]))
            .unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    let mut group = writer.next_row_group().unwrap();
    let repetition: Vec<i16> = (0..messages).map(|i| i16::from(i > 0)).collect();
    while let Some(mut column) = group.next_column().unwrap() {
        column
            .typed::<ByteArrayType>()
            .write_batch(&[], Some(&vec![1; messages]), Some(&repetition))
            .unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_trains_on_a_parquet_file() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let dataset = upload(&server, &golden("parquet/plain-zstd"))
        .await
        .unwrap();
    assert_eq!(dataset.format(), pb::DatasetFormat::Parquet);
    let report = dataset.report.unwrap();
    assert!(report.valid_rows > 0, "{report:?}");
    let client = server.client().await;
    let name = submit(&client, job(&dataset.name, 2)).await;
    succeed(&client, &name).await;
}

/// Writes pairs of texts in row groups of two, and damages the row with the number `damaged`: the
/// file says that its chosen answer is longer than the whole page.
fn write_groups(path: &Path, pairs: usize, damaged: usize) {
    let columns = ["prompt", "chosen", "rejected"];
    let schema = columns.map(|c| format!("required binary {c} (UTF8);"));
    let schema = format!("message pairs {{ {} }}", schema.concat());
    let properties = WriterProperties::builder()
        .set_dictionary_enabled(false)
        .set_statistics_enabled(parquet::file::properties::EnabledStatistics::None);
    let mut writer = SerializedFileWriter::new(
        std::fs::File::create(path).unwrap(),
        Arc::new(parse_message_type(&schema).unwrap()),
        Arc::new(properties.build()),
    )
    .unwrap();
    let text = |column: &str, row: usize| format!("{column} number {row:03}");
    for first in (1..=pairs).step_by(2) {
        let mut group = writer.next_row_group().unwrap();
        let mut names = columns.iter();
        while let Some(mut column) = group.next_column().unwrap() {
            let name = names.next().unwrap();
            let values: Vec<ByteArray> = (first..=pairs.min(first + 1))
                .map(|row| ByteArray::from(text(name, row).as_str()))
                .collect();
            let typed = column.typed::<ByteArrayType>();
            typed.write_batch(&values, None, None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    let needle = text("chosen", damaged);
    let at = bytes
        .windows(needle.len())
        .position(|window| window == needle.as_bytes())
        .unwrap();
    bytes[at - 4..at].copy_from_slice(&u32::MAX.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

/// Only the row group with the damage is lost, and a job that skips bad rows says which rows it did
/// not train on.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_row_group_loses_its_own_rows_only() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("groups.parquet");
    write_groups(&file, 8, 3);
    let dataset = upload(&server, &file).await.unwrap();
    let report = dataset.report.unwrap();
    assert_eq!((report.rows, report.valid_rows), (8, 6), "{report:?}");
    let client = server.client().await;
    let mut skipping = job(&dataset.name, 2);
    skipping.row_policy = pb::RowPolicy::Skip.into();
    let name = submit(&client, skipping).await;
    succeed(&client, &name).await;
    let skipped = get(&client, &name).await.skipped_rows;
    let rows: Vec<&str> = skipped
        .iter()
        .filter_map(|line| line.split(',').next())
        .collect();
    assert_eq!(rows, ["row 3", "row 4"], "{skipped:?}");
    assert!(
        skipped[1].contains("an earlier record of its row group"),
        "{skipped:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_parquet_file_that_wants_gigabytes_is_refused_and_costs_the_server_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("endless.parquet");
    write_long_dialogues(&file, 30_000_000);
    let size = std::fs::metadata(&file).unwrap().len();
    assert!(size < 1 << 20, "{size} bytes");
    // The peak: memory that decoding took in the server itself would be free again at the end.
    let before = peak_kib(server.pid());
    let refused = upload(&server, &file).await.unwrap_err().to_string();
    assert!(
        refused.contains("decoding needs more than 1024 MiB of memory")
            && refused.contains("use JSONL"),
        "{refused}"
    );
    // A file that can be decoded costs no more: its good record is used, the other one is a
    // finding.
    write_long_dialogues(&file, 100_000);
    let report = upload(&server, &file).await.unwrap().report.unwrap();
    assert_eq!((report.rows, report.valid_rows), (2, 1), "{report:?}");
    assert!(
        report.issues[0].message.contains("100000 messages"),
        "{report:?}"
    );
    let grown = peak_kib(server.pid()).saturating_sub(before);
    assert!(grown < 64 << 10, "the server's peak grew by {grown} KiB");
    // The server still reads valid files.
    upload(&server, &golden("parquet/plain-none"))
        .await
        .unwrap();
}

/// Two of the golden files are from a fuzzer: one triggers an assertion, the other has a page that
/// claims 2.5 billion values. This test mutates all of them.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_parquet_files_get_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let mut paths: Vec<_> = std::fs::read_dir(golden("parquet"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    paths.sort();
    assert!(paths.len() >= 8);
    let mut files: Vec<_> = paths.iter().map(|p| std::fs::read(p).unwrap()).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for i in 0..number_of_cases() {
        files.push(mutate(&mut rng, &files[i % 8]));
    }
    let before = resident_kib(server.pid());
    let file = dir.path().join("damaged");
    let (mut accepted, mut refused) = (0, 0);
    for bytes in files {
        std::fs::write(&file, bytes).unwrap();
        match tokio::time::timeout(Duration::from_secs(150), upload(&server, &file))
            .await
            .expect("an upload is not answered")
        {
            Ok(_) => accepted += 1,
            Err(ClientError::Refused(e)) => {
                assert_has_reason("upload", &e);
                refused += 1;
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert!(
        accepted >= 3 && refused >= 10,
        "{accepted} accepted, {refused} refused"
    );
    let grown = resident_kib(server.pid()).saturating_sub(before);
    assert!(grown < 64 << 10, "the server grew by {grown} KiB");
}

/// A disk that fails.
struct Unreadable;

impl AsyncRead for Unreadable {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Poll::Ready(Err(std::io::Error::other("the disk fails")))
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_read_to_its_end_is_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let rows = std::fs::read(golden("pairs.jsonl")).unwrap();
    let mut queued = 0;
    let result = client
        .upload_rows(
            rows.as_slice().chain(Unreadable),
            pb::UploadMetadata::default(),
            |bytes| queued = bytes,
        )
        .await;
    let Err(UploadError::Read(error)) = result else {
        panic!("{result:?}");
    };
    assert_eq!(error.to_string(), "the disk fails");
    assert_eq!(queued, rows.len() as u64, "the complete rows were sent");
    // Without a failure the server stores them within milliseconds.
    holds_for("no dataset", Duration::from_secs(1), async || {
        let request = pb::ListDatasetsRequest::default();
        let listed = client.datasets().list_datasets(request).await.unwrap();
        listed.into_inner().datasets.is_empty()
    })
    .await;
}

#[tokio::test]
async fn the_datasets_of_a_client_stay_within_their_limit() {
    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", golden("models/llama").display());
    let size = std::fs::metadata(golden("pairs.jsonl")).unwrap().len();
    let limit = (size + size / 2).to_string();
    let flags = ["--max-dataset-bytes-per-client", &*limit];
    let server = Server::start_with(dir.path(), &models, &flags);
    let is_refused = |result: Result<pb::Dataset, ClientError>| match result {
        Err(ClientError::Refused(status)) => {
            assert_has_reason("upload", &status);
            assert!(status.message().contains(&limit), "{status}");
        }
        other => panic!("{other:?}"),
    };
    // The file is too large although the client has no dataset yet.
    let rows = std::fs::read(golden("pairs.jsonl")).unwrap();
    let large = dir.path().join("large.jsonl");
    std::fs::write(&large, rows.repeat(2)).unwrap();
    is_refused(upload(&server, &large).await);
    // Both begin while there is room for each of them alone. The one that ends later is refused,
    // and leaves no file.
    let file = golden("pairs.jsonl");
    let (a, b) = tokio::join!(upload(&server, &file), upload(&server, &file));
    assert!(a.is_ok() || b.is_ok(), "{a:?} {b:?}");
    is_refused(if a.is_err() { a } else { b });
    let files = std::fs::read_dir(dir.path().join("datasets")).unwrap();
    assert_eq!(files.count(), 1);
    is_refused(upload(&server, &file).await);
}

/// Uploads a file `uploads` times. Most clients leave before they have the answer. Returns the name
/// of a dataset whose client stayed.
async fn upload_and_leave(server: &Server, uploads: u32) -> String {
    let file = golden("pairs.jsonl");
    let start = std::time::Instant::now();
    let whole = upload(server, &file).await.unwrap();
    let mut patience = Patience(start.elapsed());
    for _ in 0..uploads {
        // Different clients, because a connection ends with all of its calls.
        let client = server.client().await;
        let call = client.upload_dataset(&file, pb::UploadMetadata::default(), |_| {});
        patience.wait_for(call).await;
    }
    whole.name
}

/// Time after which a client leaves. It follows the time that calls take on this machine, so that
/// clients leave at all moments shortly before a call ends, however busy the machine is.
struct Patience(Duration);

impl Patience {
    /// Waits for a call as long as the client's patience lasts. It becomes shorter after a call
    /// that ended, and longer after one that did not.
    async fn wait_for(&mut self, call: impl Future) {
        self.0 = match tokio::time::timeout(self.0, call).await {
            Ok(_) => self.0 * 7 / 10,
            Err(_) => self.0 * 23 / 20 + Duration::from_micros(20),
        };
    }
}

/// Returns the names of all datasets.
async fn names(client: &Client) -> BTreeSet<String> {
    let (mut names, mut token) = (BTreeSet::new(), String::new());
    loop {
        let request = pb::ListDatasetsRequest {
            page_size: 100,
            page_token: token,
            ..Default::default()
        };
        let page = client.datasets().list_datasets(request).await.unwrap();
        let page = page.into_inner();
        names.extend(page.datasets.into_iter().map(|dataset| dataset.name));
        token = page.next_page_token;
        if token.is_empty() {
            return names;
        }
    }
}

/// Returns the names of the datasets that have a file below `root`.
fn names_of_files(root: &Path) -> BTreeSet<String> {
    let files = std::fs::read_dir(root.join("datasets")).unwrap();
    files
        .map(|file| format!("datasets/{}", file.unwrap().file_name().to_str().unwrap()))
        .collect()
}

/// A client that leaves while its upload is being stored must not leave a dataset without a file.
#[tokio::test(flavor = "multi_thread")]
async fn a_dataset_of_a_client_that_has_left_has_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let whole = upload_and_leave(&server, 200).await;
    // An upload whose row was being stored is stored to its end.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let names = names(&server.client().await).await;
    assert!(names.len() > 10, "{} were stored", names.len());
    assert!(names.contains(&whole));
    for name in names {
        let file = server.data_dir.join(&name);
        assert!(file.is_file(), "{name} has no file");
    }
}

/// A client that leaves must not leave a file that belongs to no dataset, neither in the data
/// directory nor in the artifact store.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_not_stored_leaves_no_file_and_no_object() {
    let (dir, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let models = format!("tiny={}", golden("models/llama").display());
    let url = format!("file://{}", shared.path().display());
    let server = Server::start_with(dir.path(), &models, &["--artifact-url", &url]);
    upload_and_leave(&server, 100).await;
    let client = server.client().await;
    until("a row for each file", NOTICED, async || {
        let names = names(&client).await;
        names_of_files(dir.path()) == names && names_of_files(shared.path()) == names
    })
    .await;
}

/// A client that leaves while its dataset is being deleted must not leave the file, and the audit
/// log has the deletion.
#[tokio::test(flavor = "multi_thread")]
async fn a_dataset_that_a_client_deletes_and_leaves_has_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let (client, file) = (server.client().await, golden("pairs.jsonl"));
    let mut datasets = Vec::new();
    // The first client stays until its call has ended.
    let mut patience = Patience(NOTICED);
    for i in 0..100 {
        let name = upload(&server, &file).await.unwrap().name;
        let leaving = server.client().await;
        let request = pb::DeleteDatasetRequest { name: name.clone() };
        let start = std::time::Instant::now();
        patience
            .wait_for(async { leaving.datasets().delete_dataset(request).await })
            .await;
        if i == 0 {
            patience = Patience(start.elapsed());
        }
        datasets.push(name);
    }
    until("a row for each file", NOTICED, async || {
        names(&client).await == names_of_files(dir.path())
    })
    .await;
    let left = names(&client).await;
    let deleted: Vec<&String> = datasets
        .iter()
        .filter(|name| !left.contains(*name))
        .collect();
    assert!(deleted.len() > 10, "{} were deleted", deleted.len());
    for name in deleted {
        until("the line of the audit log", NOTICED, async || {
            let lines = server.lines_with(name);
            lines.iter().any(|line| is_audited(line, "delete"))
        })
        .await;
    }
}
