//! Tests of dataset files that are missing or damaged, locally and in the object store.

use tempfile::TempDir;

use super::*;
use crate::domain::dataset::{DatasetFormat, ValidationReport};
use crate::domain::reason::Reason;

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
