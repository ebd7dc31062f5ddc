//! Tests of dataset files that are missing or damaged, locally and in the object store, of uploads
//! of exports, and of callers that leave while something is fetched.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};

use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use super::*;
use crate::domain::dataset::{DatasetFormat, ValidationReport};
use crate::domain::job::Metrics;
use crate::domain::reason::Reason;
use crate::train::checkpoint::RunState;

const ROWS: &[u8] = b"rows";

/// A data directory with the file of one dataset, with or without an object store.
struct StoredDataset {
    root: TempDir,
    store: Option<TempDir>,
    artifacts: Artifacts,
    dataset: Dataset,
}

impl StoredDataset {
    async fn new(has_store: bool) -> Self {
        let (root, store) = (
            tempfile::tempdir().unwrap(),
            has_store.then(|| tempfile::tempdir().unwrap()),
        );
        let open = |store: &TempDir| {
            Remote::open(
                &format!("file://{}", store.path().display()),
                &BTreeMap::new(),
                true,
            )
            .unwrap()
        };
        let artifacts = Artifacts::open(root.path(), store.as_ref().map(open)).unwrap();
        let dataset = Dataset {
            id: "d".into(),
            display_name: String::new(),
            format: DatasetFormat::Jsonl,
            size_bytes: ROWS.len() as u64,
            content_hash: blake3::hash(ROWS).to_hex().to_string(),
            report: ValidationReport::default(),
            create_time: 0,
            owner: String::new(),
        };
        fs::write(artifacts.dataset("d"), ROWS).unwrap();
        artifacts.upload_dataset("d").await.unwrap();
        StoredDataset {
            root,
            store,
            artifacts,
            dataset,
        }
    }

    fn here(&self) -> PathBuf {
        self.artifacts.dataset("d")
    }

    fn stored(&self) -> PathBuf {
        self.store.as_ref().unwrap().path().join("datasets/d")
    }

    async fn fetch(&self) -> Result<PathBuf> {
        self.artifacts
            .fetch_dataset(&self.dataset, &self.dataset.content_hash)
            .await
    }

    /// Fetches the file, which must be refused, and returns the reason and the message.
    async fn refusal(&self) -> (Reason, String) {
        match self.fetch().await.unwrap_err() {
            ServiceError::FailedPrecondition { reason, message } => {
                assert!(
                    message.contains("datasets/d") && message.contains("upload"),
                    "{message}"
                );
                assert!(
                    !message.contains(&self.root.path().display().to_string()),
                    "it names a folder of the server: {message}"
                );
                (reason, message)
            }
            e => panic!("{e:?}"),
        }
    }
}

#[tokio::test]
async fn a_damaged_or_missing_copy_of_a_dataset_is_fetched_again() {
    let stored = StoredDataset::new(true).await;
    let damages: [&dyn Fn(); 3] = [
        &|| fs::write(stored.here(), b"other rows").unwrap(),
        &|| fs::write(stored.here(), b"").unwrap(),
        &|| fs::remove_file(stored.here()).unwrap(),
    ];
    for damage in damages {
        damage();
        let path = stored.fetch().await.unwrap();
        assert_eq!(
            (path.clone(), fs::read(path).unwrap()),
            (stored.here(), ROWS.to_vec())
        );
    }
    // An intact local copy is used without the store.
    fs::remove_file(stored.stored()).unwrap();
    stored.fetch().await.unwrap();
}

#[tokio::test]
async fn a_dataset_that_the_store_does_not_have_whole_is_refused() {
    let stored = StoredDataset::new(true).await;
    fs::write(stored.here(), b"damaged").unwrap();
    fs::write(stored.stored(), b"damaged, too").unwrap();
    assert_eq!(stored.refusal().await.0, Reason::DatasetChanged);
    assert_eq!(
        fs::read(stored.here()).unwrap(),
        b"damaged",
        "nothing is replaced by what is no better"
    );
    fs::remove_file(stored.stored()).unwrap();
    let (reason, message) = stored.refusal().await;
    assert!(
        reason == Reason::ArtifactMissing && message.contains("artifact store"),
        "{reason:?}: {message}"
    );
}

#[tokio::test]
async fn without_a_store_a_missing_or_changed_dataset_is_refused_with_the_remedy() {
    let stored = StoredDataset::new(false).await;
    assert_eq!(stored.fetch().await.unwrap(), stored.here());
    fs::write(stored.here(), b"other rows").unwrap();
    let (reason, message) = stored.refusal().await;
    assert!(
        reason == Reason::DatasetChanged && message.contains(&stored.dataset.content_hash),
        "{reason:?}: {message}"
    );
    fs::remove_file(stored.here()).unwrap();
    let (reason, message) = stored.refusal().await;
    assert!(
        reason == Reason::ArtifactMissing && message.contains("data directory"),
        "{reason:?}: {message}"
    );
}

#[tokio::test]
async fn a_further_export_is_uploaded_when_another_upload_has_ended() {
    let [root, shared] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let url = format!("file://{}", shared.path().display());
    let remote = Remote::open(&url, &BTreeMap::new(), true).unwrap();
    let artifacts = Artifacts::open(root.path(), Some(remote)).unwrap();
    let folder = artifacts.export("j", 3, ExportName::Adapter);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("weights"), b"weights").unwrap();
    let files = [ExportedFile {
        path: "weights".into(),
        size_bytes: 7,
        content_hash: String::new(),
    }];
    let upload = || artifacts.upload_export("j", 3, ExportName::Adapter, &files);
    let mut others = Vec::new();
    for _ in 0..MAX_EXPORT_UPLOADS {
        others.push(artifacts.export_uploads.acquire().await.unwrap());
    }
    let waiting = tokio::time::timeout(Duration::from_millis(50), upload()).await;
    assert!(waiting.is_err(), "{waiting:?}");
    others.pop();
    let key = upload().await.unwrap();
    let stored = fs::read(shared.path().join(key).join("weights")).unwrap();
    assert_eq!(stored, b"weights");
}

/// A fetch of an adapter or a checkpoint.
type Fetch<'a> = Pin<Box<dyn Future<Output = Result<PathBuf>> + 'a>>;

/// A task that occupies the only blocking thread of a runtime, so that nothing behind it is done
/// until it is dropped.
struct ThreadGate {
    _open: mpsc::Sender<()>,
}

impl ThreadGate {
    /// Closes the gate behind the tasks that are queued, and returns when these are done. The gate
    /// `before` is opened for them.
    fn close(runtime: &Runtime, before: Option<ThreadGate>) -> Self {
        let (open, opened) = mpsc::channel::<()>();
        let (reach, reached) = mpsc::channel();
        runtime.spawn_blocking(move || {
            let _ = reach.send(());
            let _ = opened.recv_timeout(Duration::from_secs(60));
        });
        drop(before);
        reached.recv_timeout(Duration::from_secs(60)).unwrap();
        ThreadGate { _open: open }
    }
}

/// Polls a fetch, and does its blocking work between two polls, until it is ready or was pending
/// `limit` times. Returns its result, how often it was pending, and a gate in front of the blocking
/// work that it has begun last.
fn poll_in_steps(
    runtime: &Runtime,
    mut fetch: Fetch,
    limit: usize,
) -> (Option<Result<PathBuf>>, usize, ThreadGate) {
    let _entered = runtime.enter();
    let mut cx = Context::from_waker(Waker::noop());
    let mut gate = ThreadGate::close(runtime, None);
    let mut pending = 0;
    loop {
        if let Poll::Ready(result) = fetch.as_mut().poll(&mut cx) {
            return (Some(result), pending, gate);
        }
        pending += 1;
        assert!(pending < 10_000, "it never ends");
        if pending == limit {
            return (None, pending, gate);
        }
        gate = ThreadGate::close(runtime, Some(gate));
    }
}

/// Lets the caller of a fetch leave before the last part of its blocking work is done, and waits
/// for the end of that.
fn leave_before_the_end<'a>(
    runtime: &Runtime,
    artifacts: &Artifacts,
    fetch: impl Fn() -> Fetch<'a>,
) {
    let remove_local_files = || runtime.block_on(artifacts.drop_local_job("j")).unwrap();
    remove_local_files();
    let (fetched, pending, gate) = poll_in_steps(runtime, fetch(), usize::MAX);
    drop(gate);
    fetched.unwrap().unwrap();
    remove_local_files();
    let (unfinished, _, gate) = poll_in_steps(runtime, fetch(), pending);
    assert!(unfinished.is_none());
    assert!(
        artifacts.fetching.try_lock().is_err(),
        "another fetch may begin while files are replaced"
    );
    drop(gate);
    runtime.block_on(async { drop(artifacts.fetching.lock().await) });
}

#[test]
fn no_fetch_begins_while_one_whose_caller_has_left_replaces_files() {
    let runtime = Builder::new_current_thread()
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let [root, shared, from] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let url = format!("file://{}", shared.path().display());
    let remote = Remote::open(&url, &BTreeMap::new(), true).unwrap();
    let artifacts = Artifacts::open(root.path(), Some(remote)).unwrap();

    for name in ADAPTER_FILES {
        fs::write(from.path().join(name), name.repeat(1000)).unwrap();
    }
    let hash = runtime
        .block_on(artifacts.store_init_adapter("j", from.path()))
        .unwrap();
    leave_before_the_end(&runtime, &artifacts, || {
        Box::pin(artifacts.fetch_init_adapter("j", &hash))
    });
    assert_eq!(hash_adapter(&artifacts.init_adapter("j")).unwrap(), hash);

    let folder = artifacts.checkpoint("j", 3);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("weights"), b"weights").unwrap();
    let state = serde_json::json!({
        "version": 1,
        "adapter": true,
        "adam_updates": 3,
        "state": RunState::default(),
        "metrics": {},
        "files": { "weights": blake3::hash(b"weights").to_hex().as_str() },
    });
    fs::write(folder.join(checkpoint::STATE_FILE), state.to_string()).unwrap();
    let stored = Checkpoint {
        job: "j".into(),
        step: 3,
        best: false,
        adapter: true,
        size_bytes: 7,
        metrics: Metrics::new(),
        create_time: 0,
        digest: checkpoint::digest(&folder).unwrap(),
    };
    runtime
        .block_on(artifacts.upload_checkpoint("j", 3, &stored.digest))
        .unwrap();
    leave_before_the_end(&runtime, &artifacts, || {
        Box::pin(artifacts.fetch_checkpoint(&stored))
    });
    checkpoint::check(&folder).unwrap();
}

/// Other calls publish and remove files in the same folder.
#[test]
fn a_file_is_published_while_others_are_removed() {
    let root = tempfile::tempdir().unwrap();
    let artifacts = Artifacts::open(root.path(), None).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let other = artifacts.dataset("other");
            while !is_over.load(Ordering::Relaxed) {
                fs::write(&other, ROWS).unwrap();
                fs::remove_file(&other).unwrap();
            }
        });
        // No panic before the other thread's end: the scope waits for it.
        let published = (0..500).try_for_each(|i| {
            let (temporary, target) = (artifacts.temporary(), artifacts.dataset(&i.to_string()));
            fs::write(&temporary, ROWS).map_err(|e| failed(&temporary, e))?;
            artifacts.publish(&temporary, &target)?;
            remove(&target)
        });
        is_over.store(true, Ordering::Relaxed);
        published.unwrap();
    });
}
