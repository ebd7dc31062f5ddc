//! Files beside the database: datasets, checkpoints, exports. Everything is made under a temporary name and renamed when it is whole. With an object
//! store, that is where they are kept, and the data directory holds copies.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::datasets::blocking;
use super::error::{Result, ServiceError};
use super::remote::Remote;
use crate::domain::dataset::Dataset;
use crate::domain::job::Checkpoint;
use crate::train::checkpoint;

/// How long the object store may take to say that it is there.
const PING: Duration = Duration::from_secs(5);

/// The data directory, and the store that it is a copy of.
#[derive(Clone, Debug)]
pub struct Artifacts {
    root: PathBuf,
    remote: Option<Remote>,
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
    /// Where clients find it: the folder, or its URL in the object store.
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

impl ExportFormat {
    const ALL: [ExportFormat; 2] = [ExportFormat::Adapter, ExportFormat::Merged];

    fn name(self) -> &'static str {
        match self {
            ExportFormat::Adapter => "adapter",
            ExportFormat::Merged => "merged",
        }
    }
}

impl Artifacts {
    /// Creates the folders and removes what an interrupted upload or export left.
    pub fn open(root: &Path, remote: Option<Remote>) -> Result<Self> {
        let artifacts = Artifacts { root: root.to_owned(), remote };
        remove(&artifacts.temporary_folder())?;
        for dir in [artifacts.temporary_folder(), root.join("datasets"), root.join("jobs")] {
            fs::create_dir_all(&dir).map_err(|e| failed(&dir, e))?;
        }
        Ok(artifacts)
    }

    /// Whether the data directory is a copy of an object store.
    pub fn is_copy(&self) -> bool {
        self.remote.is_some()
    }

    /// Whether the object store answers, if there is one.
    pub async fn ping(&self) -> Result<()> {
        match &self.remote {
            Some(remote) => remote.ping(PING).await,
            None => Ok(()),
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
    pub fn export(&self, job: &str, step: u64, format: ExportFormat) -> PathBuf {
        self.job(job).join("exports").join(format!("{step}-{}", format.name()))
    }

    /// Removes a checkpoint's folder and the exports made from it.
    pub async fn remove_checkpoint(&self, job: &str, step: u64) -> Result<()> {
        if let Some(remote) = &self.remote {
            remote.remove(&format!("jobs/{job}/checkpoints/{step}")).await?;
            for format in ExportFormat::ALL {
                remote.remove(&export_key(job, step, format)).await?;
            }
        }
        self.drop_local_checkpoint(job, step).await
    }

    /// Removes what this machine has of a checkpoint.
    pub async fn drop_local_checkpoint(&self, job: &str, step: u64) -> Result<()> {
        let mut paths: Vec<PathBuf> = ExportFormat::ALL.iter().map(|format| self.export(job, step, *format)).collect();
        paths.push(self.checkpoint(job, step));
        blocking(move || paths.iter().try_for_each(|p| remove(p))).await?
    }

    /// Removes everything of a job.
    pub async fn remove_job(&self, job: &str) -> Result<()> {
        if let Some(remote) = &self.remote {
            remote.remove(&format!("jobs/{job}")).await?;
        }
        let path = self.job(job);
        blocking(move || remove(&path)).await?
    }

    /// Removes a dataset's file.
    pub async fn remove_dataset(&self, id: &str) -> Result<()> {
        if let Some(remote) = &self.remote {
            remote.remove(&dataset_key(id)).await?;
        }
        let path = self.dataset(id);
        blocking(move || remove(&path)).await?
    }

    // ---- to and from the object store

    /// Keeps a dataset whose file is in place here.
    pub async fn keep_dataset(&self, id: &str) -> Result<()> {
        match &self.remote {
            Some(remote) => remote.put_file(&self.dataset(id), &dataset_key(id)).await,
            None => Ok(()),
        }
    }

    /// A dataset's file on this machine, fetched when it is not.
    ///
    /// # Errors
    /// `FailedPrecondition` when it is lost or changed.
    pub async fn fetch_dataset(&self, dataset: &Dataset) -> Result<PathBuf> {
        let path = self.dataset(&dataset.id);
        let Some(remote) = &self.remote else { return Ok(path) };
        if tokio::fs::try_exists(&path).await.unwrap_or(false) {
            return Ok(path);
        }
        let temporary = self.temporary();
        remote.get_file(&dataset_key(&dataset.id), &temporary).await.map_err(|e| lost(e, &format!("datasets/{}", dataset.id)))?;
        let (artifacts, expected, name) = (self.clone(), dataset.content_hash.clone(), dataset.id.clone());
        blocking(move || {
            if hash_file(&temporary)?.1 != expected {
                let _ = fs::remove_file(&temporary);
                let message = format!("the stored file of datasets/{name} does not match its hash: upload it again");
                return Err(ServiceError::FailedPrecondition { reason: "ARTIFACT_DAMAGED", message });
            }
            artifacts.publish(&temporary, &path)?;
            Ok(path)
        })
        .await?
    }

    /// Keeps a checkpoint whose folder is whole here.
    pub async fn keep_checkpoint(&self, job: &str, step: u64, digest: &str) -> Result<()> {
        let Some(remote) = &self.remote else { return Ok(()) };
        remote.put_folder(&self.checkpoint(job, step), &checkpoint_key(job, step, digest), checkpoint::STATE_FILE).await
    }

    /// A checkpoint's folder on this machine, fetched when it is not.
    ///
    /// # Errors
    /// `FailedPrecondition` (`ARTIFACT_MISSING`, `ARTIFACT_DAMAGED`) when it is lost or changed.
    pub async fn fetch_checkpoint(&self, c: &Checkpoint) -> Result<PathBuf> {
        let dir = self.checkpoint(&c.job, c.step);
        let (here, expected) = (dir.clone(), c.digest.clone());
        // Another replica's folder of this step, left from before a lease was lost, is not this checkpoint.
        let same = move || checkpoint::digest(&here).is_ok_and(|digest| expected.is_empty() || digest == expected);
        if blocking(same).await? {
            return Ok(dir);
        }
        let name = format!("trainingJobs/{}/checkpoints/{}", c.job, c.step);
        let Some(remote) = &self.remote else {
            let message = format!("the files of {name} are missing or changed under the data directory");
            return Err(ServiceError::FailedPrecondition { reason: "ARTIFACT_MISSING", message });
        };
        let temporary = self.temporary();
        fs::create_dir_all(&temporary).map_err(|e| failed(&temporary, e))?;
        let fetched = remote.get_folder(&checkpoint_key(&c.job, c.step, &c.digest), &temporary).await;
        let (artifacts, expected) = (self.clone(), c.digest.clone());
        blocking(move || {
            let placed = fetched.map_err(|e| lost(e, &name)).and_then(|()| {
                let whole = checkpoint::check(&temporary).and_then(|()| checkpoint::digest(&temporary));
                if !whole.as_ref().is_ok_and(|digest| *digest == expected) {
                    let why = whole.err().map_or("its hash is another".to_owned(), |e| e.to_string());
                    let message = format!("the stored files of {name} are damaged: {why}");
                    return Err(ServiceError::FailedPrecondition { reason: "ARTIFACT_DAMAGED", message });
                }
                remove(&dir)?;
                artifacts.publish(&temporary, &dir)
            });
            let _ = fs::remove_dir_all(&temporary);
            match placed {
                // Another call may have fetched it meanwhile.
                Err(e) if !checkpoint::digest(&dir).is_ok_and(|digest| digest == expected) => Err(e),
                _ => Ok(dir),
            }
        })
        .await?
    }

    /// Keeps an export whose folder is whole here; returns where clients find it.
    pub async fn keep_export(&self, job: &str, step: u64, format: ExportFormat) -> Result<String> {
        let path = self.export(job, step, format);
        let Some(remote) = &self.remote else { return Ok(path.display().to_string()) };
        let key = export_key(job, step, format);
        remote.put_folder(&path, &key, "").await?;
        Ok(remote.url_of(&key))
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

/// Syncs a file, or a folder with the files in it.
fn sync(path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(|e| failed(path, e))? {
            let entry = entry.map_err(|e| failed(path, e))?.path();
            if entry.is_file() {
                File::open(&entry).and_then(|f| f.sync_all()).map_err(|e| failed(&entry, e))?;
            }
        }
    }
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| failed(path, e))
}

/// The plain files of a folder with their sizes and hashes; links are not followed.
pub fn describe(dir: &Path) -> Result<Vec<ExportedFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| failed(dir, e))? {
        let entry = entry.map_err(|e| failed(dir, e))?;
        let kind = entry.file_type().map_err(|e| failed(dir, e))?;
        if !kind.is_file() {
            continue;
        }
        let path = entry.path();
        let (size_bytes, content_hash) = hash_file(&path)?;
        files.push(ExportedFile { path: entry.file_name().to_string_lossy().into_owned(), size_bytes, content_hash });
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// A file's size and BLAKE3.
fn hash_file(path: &Path) -> Result<(u64, String)> {
    let mut hash = blake3::Hasher::new();
    let size = File::open(path).and_then(|mut f| io::copy(&mut f, &mut hash)).map_err(|e| failed(path, e))?;
    Ok((size, hash.finalize().to_hex().to_string()))
}

fn dataset_key(id: &str) -> String {
    format!("datasets/{id}")
}

fn checkpoint_key(job: &str, step: u64, digest: &str) -> String {
    format!("jobs/{job}/checkpoints/{step}/{digest}")
}

fn export_key(job: &str, step: u64, format: ExportFormat) -> String {
    format!("jobs/{job}/exports/{step}-{}", format.name())
}

/// What the object store does not have is gone for good.
fn lost(e: ServiceError, name: &str) -> ServiceError {
    match e {
        ServiceError::NotFound { .. } => ServiceError::FailedPrecondition {
            reason: "ARTIFACT_MISSING",
            message: format!("the files of {name} are not in the artifact store"),
        },
        other => other,
    }
}

fn remove(path: &Path) -> Result<()> {
    let result = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(path, e)),
        _ => Ok(()),
    }
}

/// A file-system failure; a full disk is told apart, because it has a remedy.
pub fn failed(path: &Path, e: io::Error) -> ServiceError {
    let message = format!("{}: {e}", path.display());
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ServiceError::ResourceExhausted { reason: "STORAGE_FULL", message: format!("{message}: free space under the data directory") }
        }
        _ => ServiceError::Internal { message },
    }
}
