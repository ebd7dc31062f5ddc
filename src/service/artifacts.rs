//! Files that belong to database rows: datasets, checkpoints, exports, and the adapters that jobs
//! start from. Each is written under a temporary name and renamed when it is complete. If an object
//! store is configured, it is the authoritative copy, and the data directory is a cache of it.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::blocking::blocking;
use super::error::{Result, ServiceError, failed};
use super::limiter::Limiter;
use super::remote::Remote;
use super::store::Store;
use super::store::properties::ARTIFACT_STORE;
use crate::domain::dataset::Dataset;
use crate::domain::job::Checkpoint;
use crate::domain::reason::Reason;
use crate::formats::peft;
use crate::formats::weights::ElementType;
use crate::train::checkpoint::{self, CheckpointError};

/// A temporary file or folder. It is removed on drop, unless it has been renamed or
/// [`Temporary::persist`] was called.
pub(super) struct Temporary(pub PathBuf);

impl Temporary {
    /// Leaves the file or folder in place.
    pub fn persist(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            let _ = remove(&self.0);
        }
    }
}

/// File names of a PEFT adapter.
pub const ADAPTER_FILES: [&str; 2] = [peft::CONFIG_FILE, peft::WEIGHTS_FILE];

/// Marker file in a data directory that has never held the only copy of anything.
const COPIES_ONLY_MARKER: &str = "copies-only";

/// Folder for the files of jobs, in the data directory and in the artifact store.
pub(super) const JOBS_FOLDER: &str = "jobs";
/// Folder for the files of datasets, in the data directory and in the artifact store.
pub(super) const DATASETS_FOLDER: &str = "datasets";
/// Folder for unfinished files in the data directory. A server empties it when it starts, except
/// for what another process has locked with [`IN_USE_FILE`].
pub(super) const TEMPORARY_FOLDER: &str = "tmp";
/// File of a temporary folder that another process than the server uses, and has locked.
pub(super) const IN_USE_FILE: &str = "in-use";

/// Maximum number of exports that are uploaded to the object store at a time. An upload goes on if
/// its caller leaves, so a caller who asks again and again could otherwise start any number.
const MAX_EXPORT_UPLOADS: usize = 2;
/// Maximum time for the object store to answer a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Files in the data directory, and in the object store if one is configured. Clones share the
/// state.
#[derive(Clone, Debug)]
pub struct Artifacts {
    root: PathBuf,
    remote: Option<Remote>,
    /// Identity of the object store, set once the store is known to belong to the database.
    store_identity: Arc<OnceLock<String>>,
    /// Folders whose files this process has verified completely.
    verified: Arc<Mutex<HashSet<PathBuf>>>,
    /// Lock that lets only one checkpoint or adapter be fetched from the object store at a time. It
    /// is moved into the work that replaces local files, which goes on if the caller leaves.
    fetching: Arc<tokio::sync::Mutex<()>>,
    /// Limit on the uploads of exports; further ones wait.
    export_uploads: Limiter,
    /// Lock on the data directory. Other processes cannot take it while any clone exists.
    _lock: Option<Arc<File>>,
}

/// One file of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportedFile {
    /// Path relative to the export's folder.
    pub path: String,
    /// Size of the file, in bytes.
    pub size_bytes: u64,
    /// BLAKE3 hash of the file, in hex.
    pub content_hash: String,
}

/// The folder and files of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Path of the folder on this machine.
    pub path: PathBuf,
    /// Path of the folder relative to the data directory or, with an object store, to the store's
    /// URL.
    pub location: String,
    /// The files, sorted by path.
    pub files: Vec<ExportedFile>,
}

/// Kind of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// A PEFT adapter.
    Adapter,
    /// Full weights in the format of Hugging Face transformers.
    Merged,
}

/// Name of an export among the exports of one checkpoint. Equal requests have equal names and share
/// the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportName {
    /// An adapter with the files of the tokenizer.
    Adapter,
    /// An adapter without a tokenizer, because its base model is not served or has changed.
    AdapterAlone,
    /// Merged weights.
    Merged(ElementType),
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExportName::Adapter => f.write_str("adapter"),
            ExportName::AdapterAlone => f.write_str("adapter-alone"),
            ExportName::Merged(dtype) => write!(f, "merged-{}", dtype.name()),
        }
    }
}

/// Suffixes of export folders of versions up to 0.2. Their contents differ, so they are only
/// removed, never returned.
const OLD_EXPORTS: [&str; 2] = ["adapter", "merged"];

impl Artifacts {
    /// Creates the folders of the data directory and removes what interrupted uploads and exports
    /// left. If an object store is configured and the directory has no datasets and jobs, it is
    /// marked as one that has only copies.
    ///
    /// # Errors
    /// `Internal` or `ResourceExhausted` if the file system fails.
    pub fn open(root: &Path, remote: Option<Remote>) -> Result<Self> {
        let artifacts = Artifacts {
            root: root.to_owned(),
            remote,
            store_identity: Arc::default(),
            verified: Arc::default(),
            fetching: Arc::default(),
            export_uploads: Limiter::new(MAX_EXPORT_UPLOADS),
            _lock: None,
        };
        let temporary = artifacts.temporary_folder();
        fs::create_dir_all(&temporary).map_err(|e| failed(&temporary, e))?;
        clear(&temporary)?;
        let mut empty = true;
        for dir in [root.join(DATASETS_FOLDER), root.join(JOBS_FOLDER)] {
            fs::create_dir_all(&dir).map_err(|e| failed(&dir, e))?;
            empty &= fs::read_dir(&dir)
                .map_err(|e| failed(&dir, e))?
                .next()
                .is_none();
        }
        if artifacts.remote.is_some() && empty {
            let marker = root.join(COPIES_ONLY_MARKER);
            File::create(&marker).map_err(|e| failed(&marker, e))?;
        }
        Ok(artifacts)
    }

    /// Holds the lock on the data directory as long as any clone of these artifacts exists.
    pub(super) fn with_lock(self, lock: File) -> Self {
        Artifacts {
            _lock: Some(Arc::new(lock)),
            ..self
        }
    }

    /// Returns true if there is an object store, of which the data directory is a cache.
    pub fn has_object_store(&self) -> bool {
        self.remote.is_some()
    }

    /// Returns true if the data directory has been a cache since it was created. Then it never
    /// holds the only copy of a file.
    pub fn holds_copies_only(&self) -> bool {
        self.has_object_store() && self.root.join(COPIES_ONLY_MARKER).exists()
    }

    /// Checks that the object store, if there is one, answers.
    ///
    /// # Errors
    /// `Unavailable` if it does not answer.
    pub async fn ping(&self) -> Result<()> {
        match &self.remote {
            Some(remote) => remote.ping(PING_TIMEOUT).await,
            None => Ok(()),
        }
    }

    /// Checks that the object store belongs to the database. If the database has no object store
    /// yet, this one is recorded.
    ///
    /// # Errors
    /// `FailedPrecondition` (`WRONG_ARTIFACT_STORE`) if it is another store, or if the database has
    /// one and none is configured; `Unavailable` if it does not answer.
    pub async fn identify(&self, store: &Store) -> Result<()> {
        let wrong = |message: String| {
            Err(ServiceError::FailedPrecondition {
                reason: Reason::WrongArtifactStore,
                message,
            })
        };
        let known = store.property(ARTIFACT_STORE).await?;
        let Some(remote) = &self.remote else {
            return match known {
                None => Ok(()),
                Some(known) => wrong(format!(
                    "this database's files are in the artifact store with the identity {known}: \
                     set artifact_url"
                )),
            };
        };
        let found = remote.identity().await?;
        let identity = match (known, found) {
            (Some(known), Some(found)) if known == found => known,
            (Some(known), found) => {
                let found = found.map_or_else(
                    || "it has no identity object".to_owned(),
                    |id| format!("its identity is {id}"),
                );
                return wrong(format!(
                    "the artifact store {} is not the one that this database knows: {found}, and \
                     the database knows {known}; mount that store, or correct artifact_url; if the \
                     store was moved, its object bradley-store-id must be copied, too",
                    remote.url()
                ));
            }
            (None, _)
                if store.is_shared()
                    && store.has_artifacts().await?
                    && remote.is_empty().await? =>
            {
                return wrong(format!(
                    "the artifact store {} is empty, but the database has datasets or checkpoints: \
                     mount the right store, or correct artifact_url",
                    remote.url()
                ));
            }
            (None, found) => {
                // The object is written first, so that a start that fails in between can be
                // repeated. If several replicas start at one time, a store with conditional writes
                // accepts only one of their identities.
                let identity = match found {
                    Some(found) => found,
                    None => {
                        remote
                            .create_identity(&uuid::Uuid::now_v7().to_string())
                            .await?
                    }
                };
                let chosen = store.set_property_once(ARTIFACT_STORE, &identity).await?;
                if chosen != identity {
                    return wrong(format!(
                        "the database has recorded the artifact store {chosen}, but {} is \
                         {identity}",
                        remote.url()
                    ));
                }
                identity
            }
        };
        let _ = self.store_identity.set(identity);
        Ok(())
    }

    /// Checks that the object store is still the one from the start. A share that is no longer
    /// mounted looks like an empty folder: nothing must be written there, and missing files there
    /// mean nothing.
    ///
    /// # Errors
    /// `Unavailable` if it is another store or does not answer.
    pub async fn check_artifact_store(&self) -> Result<()> {
        let (Some(remote), Some(known)) = (&self.remote, self.store_identity.get()) else {
            return Ok(());
        };
        match remote.identity().await? {
            Some(found) if found == *known => Ok(()),
            _ => Err(ServiceError::Unavailable {
                reason: Reason::ArtifactsUnavailable,
                message: "the artifact store is not the one that this server started with: its \
                          object bradley-store-id is missing or has another identity; is the \
                          right share mounted?"
                    .to_owned(),
                retry_after: Duration::from_secs(2),
            }),
        }
    }

    fn temporary_folder(&self) -> PathBuf {
        self.root.join(TEMPORARY_FOLDER)
    }

    /// Returns a new path for unfinished files, on the same file system as the final ones, so that
    /// a rename is atomic.
    pub fn temporary(&self) -> PathBuf {
        self.temporary_folder()
            .join(uuid::Uuid::now_v7().to_string())
    }

    /// Returns the path of a dataset's file in the data directory.
    pub fn dataset(&self, id: &str) -> PathBuf {
        self.root.join(DATASETS_FOLDER).join(id)
    }

    fn job(&self, job: &str) -> PathBuf {
        self.root.join(JOBS_FOLDER).join(job)
    }

    /// Returns the folder of a job's checkpoints in the data directory.
    pub fn checkpoints(&self, job: &str) -> PathBuf {
        self.job(job).join("checkpoints")
    }

    /// Returns the folder of one checkpoint in the data directory.
    pub fn checkpoint(&self, job: &str, step: u64) -> PathBuf {
        self.checkpoints(job).join(step.to_string())
    }

    /// Returns the folder of an export in the data directory.
    pub fn export(&self, job: &str, step: u64, name: ExportName) -> PathBuf {
        self.root.join(export_key(job, step, name))
    }

    /// Removes a checkpoint and the exports made from it, here and in the object store.
    ///
    /// # Errors
    /// `Unavailable` if the object store does not answer; `Internal` if the file system fails.
    pub async fn remove_checkpoint(&self, job: &str, step: u64, digest: &str) -> Result<()> {
        if let Some(remote) = &self.remote {
            // Only the object with this digest: another worker may have written the same step again
            // meanwhile.
            remote.remove(&checkpoint_key(job, step, digest)).await?;
        }
        self.remove_exports(job, step).await?;
        self.drop_local_checkpoint(job, step).await
    }

    /// Removes the exports made from a checkpoint, here and in the object store.
    ///
    /// # Errors
    /// `Unavailable` if the object store does not answer; `Internal` if the file system fails.
    pub async fn remove_exports(&self, job: &str, step: u64) -> Result<()> {
        if let Some(remote) = &self.remote {
            for exports in exports_keys(job, step) {
                remote.remove(&exports).await?;
            }
        }
        let paths = exports_keys(job, step).map(|key| self.root.join(key));
        blocking(move || paths.iter().try_for_each(|p| remove(p))).await?
    }

    /// Marks a checkpoint as unverified: its files are checked again before their next use.
    pub fn mark_unverified(&self, job: &str, step: u64) {
        self.verified
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.checkpoint(job, step));
    }

    /// Removes the local files of a checkpoint and of its exports.
    ///
    /// # Errors
    /// `Internal` if the file system fails.
    pub async fn drop_local_checkpoint(&self, job: &str, step: u64) -> Result<()> {
        self.mark_unverified(job, step);
        let mut paths: Vec<PathBuf> = exports_keys(job, step)
            .map(|key| self.root.join(key))
            .into();
        paths.push(self.checkpoint(job, step));
        blocking(move || paths.iter().try_for_each(|p| remove(p))).await?
    }

    /// Returns the ids of the jobs and of the datasets that have local files.
    ///
    /// # Errors
    /// `Internal` if the file system fails.
    pub async fn ids_with_local_files(&self) -> Result<(Vec<String>, Vec<String>)> {
        let folders = [self.root.join(JOBS_FOLDER), self.root.join(DATASETS_FOLDER)];
        blocking(move || {
            let names = |folder: &PathBuf| -> Result<Vec<String>> {
                let entries = fs::read_dir(folder).map_err(|e| failed(folder, e))?;
                Ok(entries
                    .filter_map(|e| e.ok()?.file_name().into_string().ok())
                    .collect())
            };
            Ok((names(&folders[0])?, names(&folders[1])?))
        })
        .await?
    }

    /// Returns the time since the last change of a job's folder, or `None` if it does not exist.
    pub fn job_age(&self, id: &str) -> Option<Duration> {
        fs::metadata(self.job(id))
            .ok()?
            .modified()
            .ok()?
            .elapsed()
            .ok()
    }

    /// Returns the time since the last change of a dataset's file, or `None` if it does not exist.
    pub fn dataset_age(&self, id: &str) -> Option<Duration> {
        fs::metadata(self.dataset(id))
            .ok()?
            .modified()
            .ok()?
            .elapsed()
            .ok()
    }

    /// Removes the local files of a job.
    ///
    /// # Errors
    /// `Internal` if the file system fails.
    pub async fn drop_local_job(&self, job: &str) -> Result<()> {
        let path = self.job(job);
        self.verified
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|p| !p.starts_with(&path));
        blocking(move || remove(&path)).await?
    }

    /// Removes the local file of a dataset.
    ///
    /// # Errors
    /// `Internal` if the file system fails.
    pub async fn drop_local_dataset(&self, id: &str) -> Result<()> {
        let path = self.dataset(id);
        blocking(move || remove(&path)).await?
    }

    /// Removes all files of a job, here and in the object store.
    ///
    /// # Errors
    /// `Unavailable` if the object store does not answer; `Internal` if the file system fails.
    pub async fn remove_job(&self, job: &str) -> Result<()> {
        if let Some(remote) = &self.remote {
            remote.remove(&format!("{JOBS_FOLDER}/{job}")).await?;
        }
        self.drop_local_job(job).await
    }

    /// Removes a dataset's file, here and in the object store.
    ///
    /// # Errors
    /// `Unavailable` if the object store does not answer; `Internal` if the file system fails.
    pub async fn remove_dataset(&self, id: &str) -> Result<()> {
        if let Some(remote) = &self.remote {
            remote.remove(&dataset_key(id)).await?;
        }
        self.drop_local_dataset(id).await
    }

    // ---- transfers to and from the object store

    /// Uploads a dataset's local file to the object store, if there is one.
    ///
    /// # Errors
    /// `Unavailable` if the object store does not answer or is not the database's.
    pub async fn upload_dataset(&self, id: &str) -> Result<()> {
        let Some(remote) = &self.remote else {
            return Ok(());
        };
        self.check_artifact_store().await?;
        remote.put_file(&self.dataset(id), &dataset_key(id)).await
    }

    /// Returns the local path of a dataset's file after checking that its content has the hash
    /// `expected`. If an object store is configured, a missing, damaged or unreadable file is
    /// fetched from it.
    ///
    /// # Errors
    /// `FailedPrecondition`: `ARTIFACT_MISSING` if the authoritative copy is missing,
    /// `DATASET_CHANGED` if it has other content. `Unavailable` if the object store does not answer
    /// or is not the database's.
    pub async fn fetch_dataset(&self, dataset: &Dataset, expected: &str) -> Result<PathBuf> {
        let (path, expected, id) = (
            self.dataset(&dataset.id),
            expected.to_owned(),
            dataset.id.clone(),
        );
        let local = path.clone();
        let found = blocking(move || hash_if_present(&local)).await?;
        if matches!(&found, Ok(Some(hash)) if *hash == expected) {
            return Ok(path);
        }
        let Some(remote) = &self.remote else {
            return Err(match found? {
                Some(found) => dataset_changed(&id, &found, &expected),
                None => self.dataset_missing(&id),
            });
        };
        if !matches!(found, Ok(None)) {
            tracing::warn!(
                dataset = id,
                expected,
                ?found,
                "the local copy of a dataset is damaged and is fetched again"
            );
        }
        let temporary = Temporary(self.temporary());
        if let Err(e) = remote.get_file(&dataset_key(&id), &temporary.0).await {
            return Err(match e {
                // If the store is another one or not mounted, a missing object means nothing.
                ServiceError::NotFound { .. } => self
                    .check_artifact_store()
                    .await
                    .err()
                    .unwrap_or_else(|| self.dataset_missing(&id)),
                e => e,
            });
        }
        let artifacts = self.clone();
        blocking(move || {
            let (_, found) = hash_file(&temporary.0)?;
            if found != expected {
                return Err(dataset_changed(&id, &found, &expected));
            }
            artifacts.publish(&temporary.0, &path)?;
            Ok(path)
        })
        .await?
    }

    /// Returns the error for a dataset whose authoritative copy is missing.
    fn dataset_missing(&self, id: &str) -> ServiceError {
        let message = format!(
            "the file of datasets/{id} is not in {}: restore it from a backup, or upload it again \
             and name the new dataset (a job must be created again)",
            self.location_name()
        );
        ServiceError::FailedPrecondition {
            reason: Reason::ArtifactMissing,
            message,
        }
    }

    /// Returns the name of the authoritative store, for messages.
    fn location_name(&self) -> &'static str {
        if self.has_object_store() {
            "the artifact store"
        } else {
            "the data directory"
        }
    }

    /// Converts the error for a missing object to `ARTIFACT_MISSING`, or to `Unavailable` if the
    /// store is not the database's.
    async fn explain_missing(&self, e: ServiceError, name: &str) -> ServiceError {
        if !matches!(e, ServiceError::NotFound { .. }) {
            return e;
        }
        match self.check_artifact_store().await {
            Ok(()) => self.missing(name),
            Err(e) => e,
        }
    }

    /// Returns the error for files whose authoritative copy is missing. They may come back: a
    /// bucket or folder can be restored, and the listing of a store can lag.
    pub(super) fn missing(&self, name: &str) -> ServiceError {
        let message = format!(
            "the files of {name} are not in {}: restore them, or delete the checkpoint or job that \
             they belong to",
            self.location_name()
        );
        ServiceError::FailedPrecondition {
            reason: Reason::ArtifactMissing,
            message,
        }
    }

    /// Converts the error of reading a checkpoint: it is damaged, missing, of another version of
    /// the server, or temporarily unreadable.
    pub(super) fn unusable(&self, e: &CheckpointError, name: &str) -> ServiceError {
        match e {
            e if e.is_damage() => damaged(name, e.for_clients()),
            e if e.is_missing_file() => self.missing(&format!("{name} ({})", e.for_clients())),
            CheckpointError::Version { .. } => ServiceError::FailedPrecondition {
                reason: Reason::CheckpointFormat,
                message: format!("{name} cannot be read: {}", e.for_clients()),
            },
            e => {
                tracing::warn!(error = %e, "a checkpoint cannot be read now");
                ServiceError::Unavailable {
                    reason: Reason::StorageUnavailable,
                    message: e.for_clients(),
                    retry_after: Duration::from_secs(2),
                }
            }
        }
    }

    /// Returns the local folder with the job's own copy of the adapter it starts from.
    pub fn init_adapter(&self, job: &str) -> PathBuf {
        self.job(job).join("init_adapter")
    }

    /// Copies the adapter that a job starts from, so that later changes of the original do not
    /// affect the job. Returns the hash of the copy.
    ///
    /// # Errors
    /// `Internal` if the file system fails; `Unavailable` if the object store does not answer.
    pub async fn store_init_adapter(&self, job: &str, from: &Path) -> Result<String> {
        let (artifacts, from, target) = (self.clone(), from.to_owned(), self.init_adapter(job));
        let hash = blocking(move || {
            let temporary = Temporary(artifacts.temporary());
            fs::create_dir_all(&temporary.0).map_err(|e| failed(&temporary.0, e))?;
            for name in ADAPTER_FILES {
                fs::copy(from.join(name), temporary.0.join(name))
                    .map_err(|e| failed(&from.join(name), e))?;
            }
            let hash = hash_files(&temporary.0, &ADAPTER_FILES)?;
            artifacts.publish(&temporary.0, &target)?;
            Ok::<_, ServiceError>(hash)
        })
        .await??;
        if let Some(remote) = &self.remote {
            self.check_artifact_store().await?;
            remote
                .put_folder(&self.init_adapter(job), &init_adapter_key(job), "")
                .await?;
        }
        Ok(hash)
    }

    /// Uploads a job's copy of the adapter it starts from, if it has one, to the object store, if
    /// there is one.
    ///
    /// # Errors
    /// `Unavailable` if the object store does not answer or is not the database's.
    pub async fn upload_init_adapter(&self, job: &str) -> Result<()> {
        let dir = self.init_adapter(job);
        let Some(remote) = self.remote.as_ref().filter(|_| dir.is_dir()) else {
            return Ok(());
        };
        self.check_artifact_store().await?;
        remote.put_folder(&dir, &init_adapter_key(job), "").await
    }

    /// Returns the local folder with the job's copy of the adapter it starts from, after checking
    /// its hash. A missing or damaged copy is fetched from the object store.
    ///
    /// # Errors
    /// `FailedPrecondition` (`ARTIFACT_MISSING`, `ARTIFACT_DAMAGED`) if it is lost or changed;
    /// `Unavailable` if the object store does not answer or is not the database's.
    pub async fn fetch_init_adapter(&self, job: &str, expected: &str) -> Result<PathBuf> {
        let (dir, name) = (
            self.init_adapter(job),
            format!("trainingJobs/{job}'s init_adapter"),
        );
        let verified = || self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified().contains(&dir)
            && tokio::fs::try_exists(dir.join(peft::WEIGHTS_FILE))
                .await
                .unwrap_or(false)
        {
            return Ok(dir);
        }
        let fetching = self.fetching.clone().lock_owned().await;
        let local = dir.clone();
        let found = blocking(move || hash_files(&local, &ADAPTER_FILES)).await?;
        let changed = |found: &str| {
            let message = format!(
                "the stored files of {name} were changed: their hash is {found}, the job was made \
                 with {expected}"
            );
            ServiceError::FailedPrecondition {
                reason: Reason::ArtifactDamaged,
                message,
            }
        };
        match (found, &self.remote) {
            (Ok(found), _) if found == expected => {
                verified().insert(dir.clone());
                return Ok(dir);
            }
            (Ok(found), None) => return Err(changed(&found)),
            (Err(_), None) => return Err(self.missing(&name)),
            (_, Some(_)) => {}
        }
        let Some(remote) = &self.remote else {
            return Ok(dir);
        };
        let temporary = Temporary(self.temporary());
        fs::create_dir_all(&temporary.0).map_err(|e| failed(&temporary.0, e))?;
        if let Err(e) = remote
            .get_folder(&init_adapter_key(job), &temporary.0)
            .await
        {
            return Err(self.explain_missing(e, &name).await);
        }
        let fetched = temporary.0.clone();
        match blocking(move || hash_files(&fetched, &ADAPTER_FILES)).await? {
            Ok(found) if found == expected => {}
            Ok(found) => return Err(changed(&found)),
            Err(_) => return Err(self.missing(&name)),
        }
        let (artifacts, target) = (self.clone(), dir.clone());
        blocking(move || {
            let _fetching = fetching;
            remove(&target)?;
            artifacts.publish(&temporary.0, &target)
        })
        .await??;
        verified().insert(dir.clone());
        Ok(dir)
    }

    /// Uploads a complete local checkpoint to the object store, if there is one. The state file is
    /// uploaded last.
    ///
    /// # Errors
    /// `Unavailable` if the object store does not answer or is not the database's.
    pub async fn upload_checkpoint(&self, job: &str, step: u64, digest: &str) -> Result<()> {
        let Some(remote) = &self.remote else {
            return Ok(());
        };
        self.check_artifact_store().await?;
        remote
            .put_folder(
                &self.checkpoint(job, step),
                &checkpoint_key(job, step, digest),
                checkpoint::STATE_FILE,
            )
            .await
    }

    /// Returns the local folder of a checkpoint. A missing or damaged one is fetched from the
    /// object store.
    ///
    /// # Errors
    /// `FailedPrecondition`: `ARTIFACT_DAMAGED` if its files are proven to differ from those that
    /// were written, `ARTIFACT_MISSING` if the authoritative copy is missing, which may be
    /// temporary, `CHECKPOINT_FORMAT` if another version of the server wrote it. `Unavailable` if
    /// the disk or the object store cannot be read now.
    pub async fn fetch_checkpoint(&self, c: &Checkpoint) -> Result<PathBuf> {
        let dir = self.checkpoint(&c.job, c.step);
        if self.is_local(c).await? {
            return Ok(dir);
        }
        // One fetch at a time: a second caller then finds what the first has fetched.
        let fetching = self.fetching.clone().lock_owned().await;
        if self.is_local(c).await? {
            return Ok(dir);
        }
        let name = format!("trainingJobs/{}/checkpoints/{}", c.job, c.step);
        let Some(remote) = &self.remote else {
            return Err(self.local_failure(c, name).await?);
        };
        let temporary = Temporary(self.temporary());
        fs::create_dir_all(&temporary.0).map_err(|e| failed(&temporary.0, e))?;
        if let Err(e) = remote
            .get_folder(&checkpoint_key(&c.job, c.step, &c.digest), &temporary.0)
            .await
        {
            return Err(self.explain_missing(e, &name).await);
        }
        let (artifacts, expected) = (self.clone(), c.digest.clone());
        blocking(move || {
            let _fetching = fetching;
            let state = checkpoint::digest(&temporary.0);
            match state.and_then(|digest| checkpoint::check(&temporary.0).map(|()| digest)) {
                // Checkpoints of before migration 3 have no recorded hash.
                Ok(digest) if expected.is_empty() || digest == expected => {}
                Ok(_) => return Err(damaged(&name, "its hash differs from the recorded one")),
                // A file may be missing because the list of objects lags or an object is gone. That
                // does not prove damage.
                Err(e) => return Err(artifacts.unusable(&e, &name)),
            }
            remove(&dir)?;
            artifacts.publish(&temporary.0, &dir)?;
            Ok(dir)
        })
        .await?
    }

    /// Returns the error for a local checkpoint that is not usable when there is no object store. A
    /// changed state file proves damage, because it lists the other files. Missing files prove
    /// nothing: the data directory may be a partly restored or a different one.
    async fn local_failure(&self, c: &Checkpoint, name: String) -> Result<ServiceError> {
        let (dir, expected, artifacts) = (
            self.checkpoint(&c.job, c.step),
            c.digest.clone(),
            self.clone(),
        );
        blocking(move || match checkpoint::digest(&dir) {
            Ok(found) if !expected.is_empty() && found != expected => {
                damaged(&name, format!("{} has changed", checkpoint::STATE_FILE))
            }
            Err(e) => artifacts.unusable(&e, &name),
            Ok(_) => match checkpoint::check(&dir) {
                Err(e) => artifacts.unusable(&e, &name),
                // The files have been restored meanwhile. The next attempt finds them.
                Ok(()) => artifacts.missing(&name),
            },
        })
        .await
    }

    /// Returns true if the local folder of the checkpoint is complete and unchanged. A folder of
    /// the same step with another digest, left by a worker that lost its lease, is not this
    /// checkpoint.
    async fn is_local(&self, c: &Checkpoint) -> Result<bool> {
        let (dir, expected, artifacts) = (
            self.checkpoint(&c.job, c.step),
            c.digest.clone(),
            self.clone(),
        );
        let name = format!("trainingJobs/{}/checkpoints/{}", c.job, c.step);
        blocking(move || {
            match checkpoint::digest(&dir) {
                Ok(digest) if expected.is_empty() || digest == expected => {}
                Err(e) if !e.is_damage() && !e.is_missing_file() => {
                    return Err(artifacts.unusable(&e, &name));
                }
                _ => return Ok(false),
            }
            // Every file is checked once per process.
            let verified = || {
                artifacts
                    .verified
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
            };
            if verified().contains(&dir) {
                return Ok(true);
            }
            match checkpoint::check(&dir) {
                Ok(()) => {
                    verified().insert(dir);
                    Ok(true)
                }
                Err(e) if !e.is_damage() && !e.is_missing_file() => {
                    Err(artifacts.unusable(&e, &name))
                }
                Err(_) => Ok(false),
            }
        })
        .await?
    }

    /// Uploads a complete local export to the object store, if there is one, and returns its
    /// location for clients. Files that the store already has are skipped: an earlier call may have
    /// been interrupted, or has uploaded them while this one waited for its turn.
    ///
    /// # Errors
    /// `Unavailable` if the object store does not answer, is not the database's, or does not list
    /// the files yet.
    pub async fn upload_export(
        &self,
        job: &str,
        step: u64,
        name: ExportName,
        files: &[ExportedFile],
    ) -> Result<String> {
        let (path, key) = (self.export(job, step, name), export_key(job, step, name));
        let Some(remote) = &self.remote else {
            return Ok(key);
        };
        let _turn = self.export_uploads.acquire().await?;
        self.check_artifact_store().await?;
        let stored = remote.folder(&key).await?;
        let absent = |stored: &BTreeMap<String, u64>, file: &ExportedFile| {
            stored.get(&file.path) != Some(&file.size_bytes)
        };
        for file in files.iter().filter(|file| absent(&stored, file)) {
            remote
                .put_file(&path.join(&file.path), &format!("{key}/{}", file.path))
                .await?;
        }
        let stored = remote.folder(&key).await?;
        if let Some(file) = files.iter().find(|file| absent(&stored, file)) {
            let message = format!(
                "{} is not in the artifact store yet: ask for the export again",
                file.path
            );
            return Err(ServiceError::Unavailable {
                reason: Reason::ArtifactsUnavailable,
                message,
                retry_after: Duration::from_secs(2),
            });
        }
        Ok(key)
    }

    /// Renames `temporary` to `target` durably: contents are synced before the rename, the parent
    /// folder after it.
    ///
    /// # Errors
    /// `Internal` or `ResourceExhausted` if the file system fails.
    pub fn publish(&self, temporary: &Path, target: &Path) -> Result<()> {
        let parent = target.parent().unwrap_or(&self.root);
        fs::create_dir_all(parent).map_err(|e| failed(parent, e))?;
        sync(temporary)?;
        fs::rename(temporary, target).map_err(|e| failed(target, e))?;
        // Only its entries: other calls may be removing files in it.
        sync_folder(parent)
    }
}

/// Syncs a file, or a folder and recursively its contents, to disk.
pub(super) fn sync(path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(|e| failed(path, e))? {
            let entry = entry.map_err(|e| failed(path, e))?;
            let kind = entry.file_type().map_err(|e| failed(path, e))?;
            if kind.is_file() || kind.is_dir() {
                sync(&entry.path())?;
            }
        }
    }
    File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(|e| failed(path, e))
}

/// Syncs the entries of a folder, but not the contents of its files.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|f| f.sync_all())
        .map_err(|e| failed(folder, e))
}

/// Lists the plain files below a folder with their sizes and hashes, sorted by path. Symbolic links
/// are not followed.
///
/// # Errors
/// `Internal` if a file cannot be read.
pub fn describe(dir: &Path) -> Result<Vec<ExportedFile>> {
    let mut files = Vec::new();
    describe_below(dir, "", &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn describe_below(dir: &Path, prefix: &str, files: &mut Vec<ExportedFile>) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| failed(dir, e))? {
        let entry = entry.map_err(|e| failed(dir, e))?;
        let kind = entry.file_type().map_err(|e| failed(dir, e))?;
        let (path, name) = (
            entry.path(),
            format!("{prefix}{}", entry.file_name().to_string_lossy()),
        );
        if kind.is_dir() {
            describe_below(&path, &format!("{name}/"), files)?;
        } else if kind.is_file() {
            let (size_bytes, content_hash) = hash_file(&path)?;
            files.push(ExportedFile {
                path: name,
                size_bytes,
                content_hash,
            });
        }
    }
    Ok(())
}

/// Returns the error for a dataset file whose content is not the one that was uploaded.
fn dataset_changed(id: &str, found: &str, expected: &str) -> ServiceError {
    let message = format!(
        "the file of datasets/{id} has the content hash {found}, but {expected} is needed: \
         restore it from a backup, or upload it again and name the new dataset (a job must be \
         created again)"
    );
    ServiceError::FailedPrecondition {
        reason: Reason::DatasetChanged,
        message,
    }
}

/// Returns the BLAKE3 hash of a file, or `None` if it does not exist.
fn hash_if_present(path: &Path) -> Result<Option<String>> {
    match fs::exists(path) {
        Ok(false) => Ok(None),
        _ => hash_file(path).map(|(_, hash)| Some(hash)),
    }
}

/// Returns the size of a file in bytes and its BLAKE3 hash.
pub(super) fn hash_file(path: &Path) -> Result<(u64, String)> {
    let mut hash = blake3::Hasher::new();
    let size = File::open(path)
        .and_then(|mut f| io::copy(&mut f, &mut hash))
        .map_err(|e| failed(path, e))?;
    Ok((size, hash.finalize().to_hex().to_string()))
}

fn dataset_key(id: &str) -> String {
    format!("datasets/{id}")
}

fn checkpoint_key(job: &str, step: u64, digest: &str) -> String {
    format!("{JOBS_FOLDER}/{job}/checkpoints/{step}/{digest}")
}

fn export_key(job: &str, step: u64, name: ExportName) -> String {
    format!("{JOBS_FOLDER}/{job}/exports/{step}/{name}")
}

/// Returns the folders of all exports of a checkpoint, including those of old versions.
fn exports_keys(job: &str, step: u64) -> [String; 1 + OLD_EXPORTS.len()] {
    let exports = format!("{JOBS_FOLDER}/{job}/exports/{step}");
    let [adapter, merged] = OLD_EXPORTS.map(|name| format!("{exports}-{name}"));
    [exports, adapter, merged]
}

fn init_adapter_key(job: &str) -> String {
    format!("{JOBS_FOLDER}/{job}/init_adapter")
}

pub(super) fn damaged(name: &str, why: impl std::fmt::Display) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: Reason::ArtifactDamaged,
        message: format!("the stored files of {name} are damaged: {why}"),
    }
}

/// Returns the hash of a job's copy of the adapter that it starts from.
///
/// # Errors
/// `Internal` if a file is missing or cannot be read.
pub(super) fn hash_adapter(dir: &Path) -> Result<String> {
    hash_files(dir, &ADAPTER_FILES)
}

/// Returns one hash over the names, sizes and contents of the files `names` in `dir`.
///
/// # Errors
/// `Internal` if a file is missing or cannot be read.
pub fn hash_files(dir: &Path, names: &[&str]) -> Result<String> {
    let mut all = blake3::Hasher::new();
    for name in names {
        let (size, hash) = hash_file(&dir.join(name))?;
        all.update(format!("{name} {size} {hash}\n").as_bytes());
    }
    Ok(all.finalize().to_hex().to_string())
}

/// Removes what interrupted work left in the folder of temporary files, but not what another
/// process, such as a backup, uses.
fn clear(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|e| failed(folder, e))? {
        let path = entry.map_err(|e| failed(folder, e))?.path();
        let is_in_use = File::open(path.join(IN_USE_FILE))
            .is_ok_and(|file| matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock)));
        if !is_in_use {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Removes a file, or a folder with its contents, if it exists.
pub(super) fn remove(path: &Path) -> Result<()> {
    let result = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(path, e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
