//! Files beside the database: datasets, checkpoints, exports. Everything is made under a temporary
//! name and renamed when it is whole. With an object store, that is where they are kept, and the
//! data directory holds copies.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::blocking::blocking;
use super::error::{Result, ServiceError, failed};
use super::remote::Remote;
use super::store::Store;
use super::store::properties::ARTIFACT_STORE;
use crate::domain::dataset::Dataset;
use crate::domain::job::Checkpoint;
use crate::domain::reason::Reason;
use crate::formats::peft;
use crate::formats::weights::ElementType;
use crate::train::checkpoint::{self, CheckpointError};

/// A file or folder that is removed unless it has been renamed.
pub(super) struct Temporary(pub PathBuf);

impl Temporary {
    /// It is somebody's now.
    pub fn keep(mut self) {
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

/// The files of a PEFT adapter.
pub const ADAPTER_FILES: [&str; 2] = [peft::CONFIG_FILE, peft::WEIGHTS_FILE];

/// The file that says that the data directory has never held an only copy.
const COPIES: &str = "copies-only";

/// The folder of the artifact store with the jobs' files.
const JOBS: &str = "jobs";

/// How long the object store may take to say that it is there.
const PING: Duration = Duration::from_secs(5);

/// The data directory, and the store that it is a copy of.
#[derive(Clone, Debug)]
pub struct Artifacts {
    root: PathBuf,
    remote: Option<Remote>,
    /// The identity of the artifact store that belongs to the database.
    store_identity: Arc<OnceLock<String>>,
    /// Checkpoints that this process has found whole.
    checked: Arc<Mutex<HashSet<PathBuf>>>,
    fetching: Arc<tokio::sync::Mutex<()>>,
    /// No other process has the data directory while this is open.
    _lock: Option<Arc<File>>,
}

/// One file of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportedFile {
    /// Relative to the export's folder.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// BLAKE3 in hex.
    pub content_hash: String,
}

/// The folder and files of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The folder on this machine.
    pub path: PathBuf,
    /// The folder relative to the data directory, or to the object store's URL where there is one.
    pub location: String,
    /// Its files, by name.
    pub files: Vec<ExportedFile>,
}

/// What an export holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// A PEFT adapter.
    Adapter,
    /// Weights as transformers loads them.
    Merged,
}

/// Names an export among those of its checkpoint: equal requests share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportName {
    /// An adapter with the tokenizer's files.
    Adapter,
    /// An adapter whose base model is not served: nobody has its tokenizer.
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

/// The folders of a checkpoint's exports as versions up to 0.2 made them: with other contents, and
/// not given out any more.
const OLD_EXPORTS: [&str; 2] = ["adapter", "merged"];

impl Artifacts {
    /// Creates the folders and removes what an interrupted upload or export left.
    pub fn open(root: &Path, remote: Option<Remote>) -> Result<Self> {
        let artifacts = Artifacts {
            root: root.to_owned(),
            remote,
            store_identity: Arc::default(),
            checked: Arc::default(),
            fetching: Arc::default(),
            _lock: None,
        };
        remove(&artifacts.temporary_folder())?;
        let mut empty = true;
        for dir in [artifacts.temporary_folder(), root.join("datasets"), root.join("jobs")] {
            fs::create_dir_all(&dir).map_err(|e| failed(&dir, e))?;
            empty &= fs::read_dir(&dir).map_err(|e| failed(&dir, e))?.next().is_none();
        }
        if artifacts.remote.is_some() && empty {
            let marker = root.join(COPIES);
            File::create(&marker).map_err(|e| failed(&marker, e))?;
        }
        Ok(artifacts)
    }

    /// Holds the lock on the data directory open as long as any clone of these artifacts.
    pub(super) fn with_lock(self, lock: File) -> Self {
        Artifacts { _lock: Some(Arc::new(lock)), ..self }
    }

    /// Whether the data directory is a copy of an object store.
    pub fn is_copy(&self) -> bool {
        self.remote.is_some()
    }

    /// Whether it has been one from its first day: then nothing in it is the only copy.
    pub fn holds_copies_only(&self) -> bool {
        self.is_copy() && self.root.join(COPIES).exists()
    }

    /// Whether the object store answers, if there is one.
    pub async fn ping(&self) -> Result<()> {
        match &self.remote {
            Some(remote) => remote.ping(PING).await,
            None => Ok(()),
        }
    }

    /// Makes sure that the object store is the one whose files the database knows, or makes it that
    /// when the database knows none.
    ///
    /// # Errors
    /// `FailedPrecondition` (`WRONG_ARTIFACT_STORE`) for another one.
    pub async fn identify(&self, store: &Store) -> Result<()> {
        let wrong = |message: String| {
            Err(ServiceError::FailedPrecondition { reason: Reason::WrongArtifactStore, message })
        };
        let known = store.property(ARTIFACT_STORE).await?;
        let Some(remote) = &self.remote else {
            return match known {
                None => Ok(()),
                Some(known) => wrong(format!(
                    "this database's files are in the artifact store with the identity {known}: set artifact_url"
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
                    "the artifact store {} is not the one that this database knows, which is {known} ({found}): mount that store, or correct \
                     artifact_url; where a store was moved, its object bradley-store-id has to be copied, too",
                    remote.url()
                ));
            }
            (None, _)
                if store.is_shared()
                    && store.has_artifacts().await?
                    && remote.is_empty().await? =>
            {
                return wrong(format!(
                    "the artifact store {} is empty, but the database has datasets or checkpoints: mount the right store, or correct artifact_url",
                    remote.url()
                ));
            }
            (None, found) => {
                // First the object: a start that fails in between can be repeated. Of several
                // replicas that start at one time the store takes one's.
                let identity = match found {
                    Some(found) => found,
                    None => remote.create_identity(&uuid::Uuid::now_v7().to_string()).await?,
                };
                let chosen = store.set_property_once(ARTIFACT_STORE, &identity).await?;
                if chosen != identity {
                    return wrong(format!(
                        "the database knows the artifact store {chosen}, {} is {identity}",
                        remote.url()
                    ));
                }
                identity
            }
        };
        let _ = self.store_identity.set(identity);
        Ok(())
    }

    /// Makes sure that the object store is still the one that it was at the start: a share that is
    /// no longer mounted leaves an empty folder, in which nothing is to be written and of which
    /// nothing is to be believed.
    ///
    /// # Errors
    /// `Unavailable` when it is not, or does not answer.
    pub async fn check_store(&self) -> Result<()> {
        let (Some(remote), Some(known)) = (&self.remote, self.store_identity.get()) else {
            return Ok(());
        };
        match remote.identity().await? {
            Some(found) if found == *known => Ok(()),
            _ => Err(ServiceError::Unavailable {
                reason: Reason::ArtifactsUnavailable,
                message:
                    "the artifact store lacks its object bradley-store-id: is the share mounted?"
                        .to_owned(),
                retry_after: Duration::from_secs(2),
            }),
        }
    }

    fn temporary_folder(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// A fresh name for something unfinished, on the same file system as everything else.
    pub fn temporary(&self) -> PathBuf {
        self.temporary_folder().join(uuid::Uuid::now_v7().to_string())
    }

    /// A dataset's file.
    pub fn dataset(&self, id: &str) -> PathBuf {
        self.root.join("datasets").join(id)
    }

    fn job(&self, job: &str) -> PathBuf {
        self.root.join("jobs").join(job)
    }

    /// The folder of a job's checkpoints.
    pub fn checkpoints(&self, job: &str) -> PathBuf {
        self.job(job).join("checkpoints")
    }

    /// One checkpoint's folder.
    pub fn checkpoint(&self, job: &str, step: u64) -> PathBuf {
        self.checkpoints(job).join(step.to_string())
    }

    /// The folder of an export.
    pub fn export(&self, job: &str, step: u64, name: ExportName) -> PathBuf {
        self.root.join(export_key(job, step, name))
    }

    /// Removes a checkpoint's folder and the exports made from it.
    pub async fn remove_checkpoint(&self, job: &str, step: u64, digest: &str) -> Result<()> {
        if let Some(remote) = &self.remote {
            // Exactly this one: a successor may have made the step anew meanwhile.
            remote.remove(&checkpoint_key(job, step, digest)).await?;
            for exports in exports_keys(job, step) {
                remote.remove(&exports).await?;
            }
        }
        self.drop_local_checkpoint(job, step).await
    }

    /// Has a checkpoint's files checked again before they are next used.
    pub fn distrust_checkpoint(&self, job: &str, step: u64) {
        self.checked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.checkpoint(job, step));
    }

    /// Removes what this machine has of a checkpoint.
    pub async fn drop_local_checkpoint(&self, job: &str, step: u64) -> Result<()> {
        self.distrust_checkpoint(job, step);
        let mut paths: Vec<PathBuf> = exports_keys(job, step).map(|key| self.root.join(key)).into();
        paths.push(self.checkpoint(job, step));
        blocking(move || paths.iter().try_for_each(|p| remove(p))).await?
    }

    /// The jobs and datasets that have files here.
    pub async fn local(&self) -> Result<(Vec<String>, Vec<String>)> {
        let folders = [self.root.join("jobs"), self.root.join("datasets")];
        blocking(move || {
            let names = |folder: &PathBuf| -> Result<Vec<String>> {
                let entries = fs::read_dir(folder).map_err(|e| failed(folder, e))?;
                Ok(entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect())
            };
            Ok((names(&folders[0])?, names(&folders[1])?))
        })
        .await?
    }

    /// How long a job's folder has been here.
    pub fn job_age(&self, id: &str) -> Option<Duration> {
        fs::metadata(self.job(id)).ok()?.modified().ok()?.elapsed().ok()
    }

    /// How long a dataset's file has been here.
    pub fn dataset_age(&self, id: &str) -> Option<Duration> {
        fs::metadata(self.dataset(id)).ok()?.modified().ok()?.elapsed().ok()
    }

    /// Removes what this machine has of a job.
    pub async fn drop_local_job(&self, job: &str) -> Result<()> {
        let path = self.job(job);
        self.checked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|p| !p.starts_with(&path));
        blocking(move || remove(&path)).await?
    }

    /// Removes what this machine has of a dataset.
    pub async fn drop_local_dataset(&self, id: &str) -> Result<()> {
        let path = self.dataset(id);
        blocking(move || remove(&path)).await?
    }

    /// Removes everything of a job.
    pub async fn remove_job(&self, job: &str) -> Result<()> {
        if let Some(remote) = &self.remote {
            remote.remove(&format!("{JOBS}/{job}")).await?;
        }
        self.drop_local_job(job).await
    }

    /// Removes a dataset's file.
    pub async fn remove_dataset(&self, id: &str) -> Result<()> {
        if let Some(remote) = &self.remote {
            remote.remove(&dataset_key(id)).await?;
        }
        self.drop_local_dataset(id).await
    }

    // ---- to and from the object store

    /// Keeps a dataset whose file is in place here.
    pub async fn keep_dataset(&self, id: &str) -> Result<()> {
        let Some(remote) = &self.remote else { return Ok(()) };
        self.check_store().await?;
        remote.put_file(&self.dataset(id), &dataset_key(id)).await
    }

    /// Returns a dataset's file on this machine, whose content has the hash `expected`. With an
    /// object store, a file that is missing here, damaged or unreadable is fetched from there.
    ///
    /// # Errors
    /// `FailedPrecondition`: `ARTIFACT_MISSING` when the file is not where it is kept,
    /// `DATASET_CHANGED` when it has other content there.
    pub async fn fetch_dataset(&self, dataset: &Dataset, expected: &str) -> Result<PathBuf> {
        let (path, expected, id) =
            (self.dataset(&dataset.id), expected.to_owned(), dataset.id.clone());
        let is_here = path.clone();
        let found = blocking(move || hash_if_present(&is_here)).await?;
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
                // Of another store, or one that is not mounted, nothing is believed.
                ServiceError::NotFound { .. } => {
                    self.check_store().await.err().unwrap_or_else(|| self.dataset_missing(&id))
                }
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

    /// The error for a dataset whose file is not where it is kept now.
    fn dataset_missing(&self, id: &str) -> ServiceError {
        let message = format!(
            "the file of datasets/{id} is not in {}: restore it from a backup, or upload the dataset again and create the job anew",
            self.place()
        );
        ServiceError::FailedPrecondition { reason: Reason::ArtifactMissing, message }
    }

    /// Where files are kept, in words.
    fn place(&self) -> &'static str {
        if self.is_copy() { "the artifact store" } else { "the data directory" }
    }

    /// Maps a missing object to `ARTIFACT_MISSING`, or to `Unavailable` if this is not the
    /// database's store.
    async fn explain_missing(&self, e: ServiceError, name: &str) -> ServiceError {
        if !matches!(e, ServiceError::NotFound { .. }) {
            return e;
        }
        match self.check_store().await {
            Ok(()) => self.missing(name),
            Err(e) => e,
        }
    }

    /// The error for files that are not where they are kept now. They may come back: a bucket or a
    /// folder can be restored, a listing can lag.
    pub(super) fn missing(&self, name: &str) -> ServiceError {
        let message = format!(
            "the files of {name} are not in {}: restore them, or delete what they belong to",
            self.place()
        );
        ServiceError::FailedPrecondition { reason: Reason::ArtifactMissing, message }
    }

    /// Why the files of a checkpoint cannot be used: they are damaged, missing, of another version
    /// of the server, or may be readable later.
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

    /// The folder with the job's own copy of the adapter that it starts from.
    pub fn init_adapter(&self, job: &str) -> PathBuf {
        self.job(job).join("init_adapter")
    }

    /// Copies an adapter that a job starts from, so that nobody can change it; returns the hash of
    /// the copy.
    pub async fn keep_init_adapter(&self, job: &str, from: &Path) -> Result<String> {
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
            self.check_store().await?;
            remote.put_folder(&self.init_adapter(job), &init_adapter_key(job), "").await?;
        }
        Ok(hash)
    }

    /// A job's copy of the adapter that it starts from, on this machine.
    ///
    /// # Errors
    /// `FailedPrecondition` (`ARTIFACT_MISSING`, `ARTIFACT_DAMAGED`) when it is lost or changed.
    pub async fn fetch_init_adapter(&self, job: &str, expected: &str) -> Result<PathBuf> {
        let (dir, name) = (self.init_adapter(job), format!("trainingJobs/{job}'s init_adapter"));
        let known = || self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if known().contains(&dir)
            && tokio::fs::try_exists(dir.join(peft::WEIGHTS_FILE)).await.unwrap_or(false)
        {
            return Ok(dir);
        }
        let _fetching = self.fetching.lock().await;
        let here = dir.clone();
        let found = blocking(move || hash_files(&here, &ADAPTER_FILES)).await?;
        let changed = |found: &str| {
            let message = format!(
                "the stored files of {name} were changed: their hash is {found}, the job was made with {expected}"
            );
            ServiceError::FailedPrecondition { reason: Reason::ArtifactDamaged, message }
        };
        match (found, &self.remote) {
            (Ok(found), _) if found == expected => {
                known().insert(dir.clone());
                return Ok(dir);
            }
            (Ok(found), None) => return Err(changed(&found)),
            (Err(_), None) => return Err(self.missing(&name)),
            (_, Some(_)) => {}
        }
        let Some(remote) = &self.remote else { return Ok(dir) };
        let temporary = Temporary(self.temporary());
        fs::create_dir_all(&temporary.0).map_err(|e| failed(&temporary.0, e))?;
        if let Err(e) = remote.get_folder(&init_adapter_key(job), &temporary.0).await {
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
            remove(&target)?;
            artifacts.publish(&temporary.0, &target)
        })
        .await??;
        known().insert(dir.clone());
        Ok(dir)
    }

    /// Keeps a checkpoint whose folder is whole here.
    pub async fn keep_checkpoint(&self, job: &str, step: u64, digest: &str) -> Result<()> {
        let Some(remote) = &self.remote else { return Ok(()) };
        self.check_store().await?;
        remote
            .put_folder(
                &self.checkpoint(job, step),
                &checkpoint_key(job, step, digest),
                checkpoint::STATE_FILE,
            )
            .await
    }

    /// A checkpoint's folder on this machine, fetched when it is not.
    ///
    /// # Errors
    /// `FailedPrecondition`: `ARTIFACT_DAMAGED` when its files are proven to be others than were
    /// written, `ARTIFACT_MISSING` when the artifact store does not have them (now),
    /// `CHECKPOINT_FORMAT` when another version of the server wrote them.
    pub async fn fetch_checkpoint(&self, c: &Checkpoint) -> Result<PathBuf> {
        let dir = self.checkpoint(&c.job, c.step);
        if self.is_here(c).await? {
            return Ok(dir);
        }
        // One at a time: a second caller finds what the first has fetched.
        let _fetching = self.fetching.lock().await;
        if self.is_here(c).await? {
            return Ok(dir);
        }
        let name = format!("trainingJobs/{}/checkpoints/{}", c.job, c.step);
        let Some(remote) = &self.remote else {
            return Err(self.why_not_here(c, name).await?);
        };
        let temporary = Temporary(self.temporary());
        fs::create_dir_all(&temporary.0).map_err(|e| failed(&temporary.0, e))?;
        if let Err(e) =
            remote.get_folder(&checkpoint_key(&c.job, c.step, &c.digest), &temporary.0).await
        {
            return Err(self.explain_missing(e, &name).await);
        }
        let (artifacts, expected) = (self.clone(), c.digest.clone());
        blocking(move || {
            let state = checkpoint::digest(&temporary.0);
            match state.and_then(|digest| checkpoint::check(&temporary.0).map(|()| digest)) {
                Ok(digest) if digest == expected => {}
                Ok(_) => return Err(damaged(&name, "its hash is another")),
                // A file may be missing where the list of objects is behind, or an object gone:
                // nothing that is here is wrong.
                Err(e) => return Err(artifacts.unusable(&e, &name)),
            }
            remove(&dir)?;
            artifacts.publish(&temporary.0, &dir)?;
            Ok(dir)
        })
        .await?
    }

    /// Why a checkpoint is not on this machine, which has no other place to fetch it from. A state
    /// file that is not the one that was written proves damage: it says which other files there
    /// should be. Files that are only missing prove nothing: the data directory may have been
    /// restored in part, or be another one.
    async fn why_not_here(&self, c: &Checkpoint, name: String) -> Result<ServiceError> {
        let (dir, expected, artifacts) =
            (self.checkpoint(&c.job, c.step), c.digest.clone(), self.clone());
        blocking(move || match checkpoint::digest(&dir) {
            Ok(found) if !expected.is_empty() && found != expected => {
                damaged(&name, format!("{} has changed", checkpoint::STATE_FILE))
            }
            Err(e) => artifacts.unusable(&e, &name),
            Ok(_) => match checkpoint::check(&dir) {
                Err(e) => artifacts.unusable(&e, &name),
                // It has come back meanwhile: the next try finds it.
                Ok(()) => artifacts.missing(&name),
            },
        })
        .await
    }

    /// Whether the checkpoint's folder is on this machine, as it was written. Another replica's
    /// folder of the same step, left from before a lease was lost, is not this checkpoint.
    async fn is_here(&self, c: &Checkpoint) -> Result<bool> {
        let (dir, expected, artifacts) =
            (self.checkpoint(&c.job, c.step), c.digest.clone(), self.clone());
        let name = format!("trainingJobs/{}/checkpoints/{}", c.job, c.step);
        blocking(move || {
            match checkpoint::digest(&dir) {
                Ok(digest) if expected.is_empty() || digest == expected => {}
                Err(e) if !e.is_damage() && !e.is_missing_file() => {
                    return Err(artifacts.unusable(&e, &name));
                }
                _ => return Ok(false),
            }
            // Every file, once for each process.
            let known = || artifacts.checked.lock().unwrap_or_else(PoisonError::into_inner);
            if known().contains(&dir) {
                return Ok(true);
            }
            match checkpoint::check(&dir) {
                Ok(()) => {
                    known().insert(dir);
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

    /// Keeps an export whose folder with `files` is whole here; returns where clients find it. What
    /// the object store has already is not sent again: an earlier call may have been given up
    /// half-way.
    pub async fn keep_export(
        &self,
        job: &str,
        step: u64,
        name: ExportName,
        files: &[ExportedFile],
    ) -> Result<String> {
        let (path, key) = (self.export(job, step, name), export_key(job, step, name));
        let Some(remote) = &self.remote else { return Ok(key) };
        self.check_store().await?;
        let kept = remote.folder(&key).await?;
        let absent = |kept: &BTreeMap<String, u64>, file: &ExportedFile| {
            kept.get(&file.path) != Some(&file.size_bytes)
        };
        for file in files.iter().filter(|file| absent(&kept, file)) {
            remote.put_file(&path.join(&file.path), &format!("{key}/{}", file.path)).await?;
        }
        let kept = remote.folder(&key).await?;
        if let Some(file) = files.iter().find(|file| absent(&kept, file)) {
            let message =
                format!("{} is not in the artifact store yet: ask for the export again", file.path);
            return Err(ServiceError::Unavailable {
                reason: Reason::ArtifactsUnavailable,
                message,
                retry_after: Duration::from_secs(2),
            });
        }
        Ok(key)
    }

    /// Makes `temporary` durable as `target`.
    pub fn publish(&self, temporary: &Path, target: &Path) -> Result<()> {
        let parent = target.parent().unwrap_or(&self.root);
        fs::create_dir_all(parent).map_err(|e| failed(parent, e))?;
        sync(temporary)?;
        fs::rename(temporary, target).map_err(|e| failed(target, e))?;
        sync(parent)
    }
}

/// Syncs a file, or a folder with the files and folders in it.
fn sync(path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(|e| failed(path, e))? {
            let entry = entry.map_err(|e| failed(path, e))?;
            let kind = entry.file_type().map_err(|e| failed(path, e))?;
            if kind.is_file() || kind.is_dir() {
                sync(&entry.path())?;
            }
        }
    }
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| failed(path, e))
}

/// The plain files of a folder and of the folders in it, with their sizes and hashes; links are not
/// followed.
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
        let (path, name) =
            (entry.path(), format!("{prefix}{}", entry.file_name().to_string_lossy()));
        if kind.is_dir() {
            describe_below(&path, &format!("{name}/"), files)?;
        } else if kind.is_file() {
            let (size_bytes, content_hash) = hash_file(&path)?;
            files.push(ExportedFile { path: name, size_bytes, content_hash });
        }
    }
    Ok(())
}

/// The error for a dataset's file with other content than a job was made with.
fn dataset_changed(id: &str, found: &str, expected: &str) -> ServiceError {
    let message = format!(
        "the file of datasets/{id} has the content {found}, the job was made with {expected}: restore it, or upload it again and make a new job"
    );
    ServiceError::FailedPrecondition { reason: Reason::DatasetChanged, message }
}

/// Returns a file's BLAKE3, or `None` where there is no file.
fn hash_if_present(path: &Path) -> Result<Option<String>> {
    match fs::exists(path) {
        Ok(false) => Ok(None),
        _ => hash_file(path).map(|(_, hash)| Some(hash)),
    }
}

/// A file's size and BLAKE3.
fn hash_file(path: &Path) -> Result<(u64, String)> {
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
    format!("{JOBS}/{job}/checkpoints/{step}/{digest}")
}

fn export_key(job: &str, step: u64, name: ExportName) -> String {
    format!("{JOBS}/{job}/exports/{step}/{name}")
}

/// The folders with all exports of a checkpoint.
fn exports_keys(job: &str, step: u64) -> [String; 1 + OLD_EXPORTS.len()] {
    let exports = format!("{JOBS}/{job}/exports/{step}");
    let [adapter, merged] = OLD_EXPORTS.map(|name| format!("{exports}-{name}"));
    [exports, adapter, merged]
}

fn init_adapter_key(job: &str) -> String {
    format!("{JOBS}/{job}/init_adapter")
}

fn damaged(name: &str, why: impl std::fmt::Display) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: Reason::ArtifactDamaged,
        message: format!("the stored files of {name} are damaged: {why}"),
    }
}

/// One hash of the named files of a folder.
pub fn hash_files(dir: &Path, names: &[&str]) -> Result<String> {
    let mut all = blake3::Hasher::new();
    for name in names {
        let (size, hash) = hash_file(&dir.join(name))?;
        all.update(format!("{name} {size} {hash}\n").as_bytes());
    }
    Ok(all.finalize().to_hex().to_string())
}

fn remove(path: &Path) -> Result<()> {
    let result = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(path, e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
