//! Files beside the database: datasets, checkpoints, exports. Everything is made under a temporary name and renamed when it is whole.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::error::{Result, ServiceError};

/// The layout of the data directory.
#[derive(Clone, Debug)]
pub struct Artifacts {
    root: PathBuf,
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
    /// The folder.
    pub path: PathBuf,
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

impl Artifacts {
    /// Creates the folders and removes what an interrupted upload or export left.
    pub fn open(root: &Path) -> Result<Self> {
        let artifacts = Artifacts { root: root.to_owned() };
        remove(&artifacts.temporary_folder())?;
        for dir in [artifacts.temporary_folder(), root.join("datasets"), root.join("jobs")] {
            fs::create_dir_all(&dir).map_err(|e| failed(&dir, e))?;
        }
        Ok(artifacts)
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
        let kind = match format {
            ExportFormat::Adapter => "adapter",
            ExportFormat::Merged => "merged",
        };
        self.job(job).join("exports").join(format!("{step}-{kind}"))
    }

    /// Removes a checkpoint's folder and the exports made from it.
    pub fn remove_checkpoint(&self, job: &str, step: u64) -> Result<()> {
        for format in [ExportFormat::Adapter, ExportFormat::Merged] {
            remove(&self.export(job, step, format))?;
        }
        remove(&self.checkpoint(job, step))
    }

    /// Removes everything of a job.
    pub fn remove_job(&self, job: &str) -> Result<()> {
        remove(&self.job(job))
    }

    /// Removes a dataset's file.
    pub fn remove_dataset(&self, id: &str) -> Result<()> {
        remove(&self.dataset(id))
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
        let mut hash = blake3::Hasher::new();
        let size_bytes = File::open(&path).and_then(|mut f| io::copy(&mut f, &mut hash)).map_err(|e| failed(&path, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.push(ExportedFile { path: name, size_bytes, content_hash: hash.finalize().to_hex().to_string() });
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
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
