//! Backup of a server that uses SQLite, and the restore of a backup. The server may run during a
//! backup, but not during a restore. If the files are in an artifact store, the backup has only the
//! database.
//!
//! A row's files are stored before the row and removed after it. So every file that a copy of the
//! database names existed when the copy was made. Links to all files are made before the copy and
//! again after it, so that a file which the server removes meanwhile is still there. A checkpoint
//! that is written and removed between the two is missing; then the copy is made again. In the last
//! attempt the server cannot write while links are made, until the copy has begun.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Component, Path};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::artifacts::{
    DATASETS_FOLDER, JOBS_FOLDER, TEMPORARY_FOLDER, Temporary, describe, hash_adapter, hash_file,
    remove, sync, sync_folder,
};
use super::blocking::blocking;
use super::data_dir::{LOCK_FILE, RESTORING_FOLDER, check_restored, lock};
use super::error::{Result, ServiceError, failed};
use super::store::DATABASE_FILE;
use super::store::snapshot::{LiveDatabase, Snapshot};
use crate::train::checkpoint::{self, CheckpointError};
use unfinished::{Unfinished, parent, remove_abandoned_backups, remove_abandoned_links};

mod unfinished;

/// File that lists the others of a backup; written last.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Version of the manifest's format.
const FORMAT: u32 = 1;
/// Number of copies of the database that are tried.
const ATTEMPTS: u32 = 4;
/// Interval at which the last attempt checks that the copy has begun.
const COPY_CHECK_INTERVAL: Duration = Duration::from_millis(5);
/// Number of bytes copied at a time.
const COPY_BYTES: usize = 1 << 20;
/// Folder of a job with its copy of the adapter that it starts from.
const INIT_ADAPTER: &str = "init_adapter";
/// Names that an empty data directory may have.
const IGNORED: [&str; 2] = ["lost+found", LOCK_FILE];

/// Contents of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupManifest {
    /// Version of this format.
    pub format: u32,
    /// Version of Bradley that made the backup.
    pub bradley: String,
    /// Time at which the backup began, in RFC 3339.
    pub create_time: String,
    /// Number of the database's newest migration.
    pub migration: i64,
    /// Identity of the artifact store, if the files are there and not in the backup.
    pub artifact_store: Option<String>,
    /// Number of jobs.
    pub jobs: usize,
    /// Number of datasets.
    pub datasets: usize,
    /// Number of checkpoints.
    pub checkpoints: usize,
    /// The files, by their path in the backup.
    pub files: BTreeMap<String, BackupFile>,
    /// Datasets, checkpoints and copied adapters that were already missing or damaged in the data
    /// directory, each with its problem.
    pub missing: Vec<String>,
}

/// One file of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupFile {
    /// Size in bytes.
    pub size_bytes: u64,
    /// BLAKE3 hash, in hex.
    pub content_hash: String,
}

/// Copies the database of a data directory, and the files that it names, to a new folder. The
/// folder appears when the backup is complete.
///
/// # Errors
/// `InvalidArgument` if the data directory has no database, or if the target is not empty, is a
/// mount point or is inside the data directory; `FailedPrecondition` if this version may not use
/// the database (`SCHEMA_TOO_NEW`) or it was moved to PostgreSQL (`DATABASE_MOVED`);
/// `ResourceExhausted`, `Unavailable` or `Internal` if the database or the file system fails.
pub async fn back_up(data_dir: &Path, target: &Path) -> Result<BackupManifest> {
    let create_time = jiff::Timestamp::now().to_string();
    let live = LiveDatabase::open(data_dir).await?;
    live.check_not_moved().await?;
    refuse_mount_point(target)?;
    check_empty("DIR", target, &[])?;
    refuse_inside(data_dir, target)?;
    remove_abandoned_backups(target)?;
    let partial = Unfinished::beside(target)?;
    let temporary = data_dir.join(TEMPORARY_FOLDER);
    remove_abandoned_links(&temporary)?;
    // A server that starts meanwhile does not remove a folder whose file is locked.
    let links_folder = Unfinished::for_links(&temporary)?;
    let links = links_folder.path().join("links");
    let snapshot = copy_database(&live, data_dir, &links, partial.path()).await?;
    let target = target.to_owned();
    blocking(move || {
        let (files, missing) = copy_files(&snapshot, &links, partial.path())?;
        if !links_folder.is_intact() {
            // A server of version 0.2.0, or one on a file system without locks, clears the whole
            // folder.
            return Err(ServiceError::internal(
                "a server started meanwhile and removed the links of this backup: run it again",
            ));
        }
        let manifest = BackupManifest {
            format: FORMAT,
            bradley: env!("CARGO_PKG_VERSION").to_owned(),
            create_time,
            migration: snapshot.migration,
            artifact_store: snapshot.artifact_store,
            jobs: snapshot.jobs.len(),
            datasets: snapshot.datasets.len(),
            checkpoints: snapshot.checkpoints.len(),
            files,
            missing,
        };
        let path = partial.path().join(MANIFEST_FILE);
        let text = serde_json::to_vec_pretty(&manifest).map_err(ServiceError::internal)?;
        fs::write(&path, text).map_err(|e| failed(&path, e))?;
        sync(partial.path())?;
        if !partial.is_intact() {
            // Locks of a shared file system may hold on one machine only.
            return Err(ServiceError::internal(format!(
                "another process removed the unfinished backup beside {}: run it again",
                target.display()
            )));
        }
        partial.publish(&target)?;
        sync_folder(parent(&target))?;
        Ok(manifest)
    })
    .await?
}

/// Restores a backup into a data directory that is new or empty. A server does not start there
/// until the restore is complete.
///
/// # Errors
/// `InvalidArgument` if the folder is no backup, or if the data directory is not empty;
/// `FailedPrecondition` if a process uses the data directory (`DATA_DIR_IN_USE`) or this version
/// may not use the database (`SCHEMA_TOO_NEW`); `Internal` if one of the backup's files is missing
/// or has changed; `ResourceExhausted` or `Internal` if the file system fails.
pub async fn restore(backup: &Path, data_dir: &Path) -> Result<BackupManifest> {
    let manifest = read_manifest(backup)?;
    fs::create_dir_all(data_dir).map_err(|e| failed(data_dir, e))?;
    let _lock = lock(data_dir)?;
    check_restored(data_dir)?;
    check_empty("--data-dir", data_dir, &IGNORED)?;
    let restoring = Temporary(data_dir.join(RESTORING_FOLDER));
    fs::create_dir(&restoring.0).map_err(|e| failed(&restoring.0, e))?;
    let (from, to, files) = (
        backup.to_owned(),
        restoring.0.clone(),
        manifest.files.clone(),
    );
    blocking(move || {
        files
            .iter()
            .try_for_each(|(path, expected)| restore_file(&from, &to, path, expected))
    })
    .await??;
    // The copy is checked before anything is in its place.
    Snapshot::read(&restoring.0.join(DATABASE_FILE)).await?;
    let target = data_dir.to_owned();
    blocking(move || {
        sync(&restoring.0)?;
        // From here on, an interrupted restore leaves the folder, so that no server starts.
        let folder = restoring.0.clone();
        restoring.persist();
        for name in [DATASETS_FOLDER, JOBS_FOLDER, DATABASE_FILE] {
            let (from, to) = (folder.join(name), target.join(name));
            if fs::exists(&from).map_err(|e| failed(&from, e))? {
                fs::rename(&from, &to).map_err(|e| failed(&to, e))?;
            }
        }
        sync_folder(&target)?;
        remove(&folder)?;
        sync_folder(&target)
    })
    .await??;
    Ok(manifest)
}

/// Copies the database to `partial`, with links to the files of its rows in `links`.
async fn copy_database(
    live: &LiveDatabase,
    data_dir: &Path,
    links: &Path,
    partial: &Path,
) -> Result<Snapshot> {
    let database = partial.join(DATABASE_FILE);
    let has_files = live.artifact_store().await?.is_none();
    let mut attempt = 1;
    loop {
        remove(&database)?;
        remove(links)?;
        if attempt == ATTEMPTS {
            copy_blocked(live, &database, || link_files(data_dir, links)).await?;
        } else {
            if has_files {
                link_files(data_dir, links).await?;
            }
            live.copy_to(&database).await?;
            if has_files {
                link_files(data_dir, links).await?;
            }
        }
        let snapshot = Snapshot::read(&database).await?;
        if !has_files || attempt == ATTEMPTS || is_complete(&snapshot, links) {
            return Ok(snapshot);
        }
        attempt += 1;
    }
}

/// Copies the database in the state that it has when `link` is called. Nobody can write from then
/// until the copy has begun. From its beginning on the copy reads that one state, so the server may
/// write again although the copy may take minutes.
async fn copy_blocked(
    live: &LiveDatabase,
    database: &Path,
    link: impl AsyncFnOnce() -> Result<()>,
) -> Result<()> {
    let mut block = Some(live.block_writes().await?);
    link().await?;
    let copy = live.copy_to(database);
    tokio::pin!(copy);
    loop {
        tokio::select! {
            copied = &mut copy => break copied?,
            () = tokio::time::sleep(COPY_CHECK_INTERVAL), if block.is_some() => {
                // SQLite writes to the copy only after it has begun to read.
                let has_begun = fs::metadata(database).is_ok_and(|m| m.len() > 0);
                if let Some(block) = block.take_if(|_| has_begun) {
                    block.release().await?;
                }
            }
        }
    }
    match block {
        Some(block) => block.release().await,
        None => Ok(()),
    }
}

/// Makes links to the finished files of a data directory that have none yet.
async fn link_files(data_dir: &Path, links: &Path) -> Result<()> {
    let (from, to) = (data_dir.to_owned(), links.to_owned());
    blocking(move || {
        [DATASETS_FOLDER, JOBS_FOLDER]
            .iter()
            .try_for_each(|folder| link_below(&from.join(folder), &to.join(folder)))
    })
    .await?
}

/// Links the files below a folder. Files that are removed meanwhile are left out, and so are
/// unfinished ones, whose names begin with a dot.
fn link_below(from: &Path, to: &Path) -> Result<()> {
    let entries = match fs::read_dir(from) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|e| failed(from, e))?,
    };
    fs::create_dir_all(to).map_err(|e| failed(to, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| failed(from, e))?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let (path, target) = (entry.path(), to.join(&name));
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => link_below(&path, &target)?,
            Ok(kind) if kind.is_file() => link(&path, &target)?,
            _ => {}
        }
    }
    Ok(())
}

/// Links a file, or copies it where the file system does not allow links.
fn link(path: &Path, target: &Path) -> Result<()> {
    use io::ErrorKind::{AlreadyExists, NotFound};
    match fs::hard_link(path, target) {
        Ok(()) => return Ok(()),
        Err(e) if matches!(e.kind(), AlreadyExists | NotFound) => return Ok(()),
        Err(_) => {}
    }
    match fs::copy(path, target) {
        Err(e) if e.kind() != NotFound => Err(failed(target, e)),
        _ => Ok(()),
    }
}

fn dataset_path(id: &str) -> String {
    format!("{DATASETS_FOLDER}/{id}")
}

fn checkpoint_path(job: &str, step: i64) -> String {
    format!("{JOBS_FOLDER}/{job}/checkpoints/{step}")
}

/// Returns true if there are links to the files of every dataset and checkpoint.
fn is_complete(snapshot: &Snapshot, links: &Path) -> bool {
    let has_dataset = |(id, _): &(String, String)| links.join(dataset_path(id)).exists();
    let has_checkpoint = |(job, step, digest): &(String, i64, String)| {
        checkpoint::digest(&links.join(checkpoint_path(job, *step)))
            .is_ok_and(|found| digest.is_empty() || found == *digest)
    };
    snapshot.datasets.iter().all(has_dataset) && snapshot.checkpoints.iter().all(has_checkpoint)
}

/// Copies the files of a snapshot's rows from `links` into the backup, beside the database. Returns
/// the backup's files and a list of what is missing or damaged.
fn copy_files(
    snapshot: &Snapshot,
    links: &Path,
    backup: &Path,
) -> Result<(BTreeMap<String, BackupFile>, Vec<String>)> {
    let mut missing = Vec::new();
    let (size_bytes, content_hash) = hash_file(&backup.join(DATABASE_FILE))?;
    let database = BackupFile {
        size_bytes,
        content_hash,
    };
    let mut files = BTreeMap::from([(DATABASE_FILE.to_owned(), database)]);
    if snapshot.artifact_store.is_some() {
        return Ok((files, missing));
    }
    for (id, expected) in &snapshot.datasets {
        let path = dataset_path(id);
        if !links.join(&path).exists() {
            missing.push(format!("datasets/{id}: its file does not exist"));
            continue;
        }
        let copied = copy(&links.join(&path), &backup.join(&path))?;
        if copied.content_hash != *expected {
            missing.push(format!("datasets/{id}: its content has changed"));
        }
        files.insert(path, copied);
    }
    for (job, init_adapter) in &snapshot.jobs {
        for part in [INIT_ADAPTER, "exports"] {
            copy_folder(
                links,
                backup,
                &format!("{JOBS_FOLDER}/{job}/{part}"),
                &mut files,
            )?;
        }
        let Some(expected) = init_adapter else {
            continue;
        };
        let copied = backup.join(format!("{JOBS_FOLDER}/{job}/{INIT_ADAPTER}"));
        let problem = match hash_adapter(&copied) {
            Ok(found) if found == *expected => continue,
            Ok(_) => "its files have changed",
            Err(_) => "its files are missing or cannot be read",
        };
        missing.push(format!("trainingJobs/{job}'s init_adapter: {problem}"));
    }
    for (job, step, digest) in &snapshot.checkpoints {
        let path = checkpoint_path(job, *step);
        copy_folder(links, backup, &path, &mut files)?;
        if let Some(problem) = checkpoint_problem(&backup.join(&path), digest) {
            missing.push(format!("trainingJobs/{job}/checkpoints/{step}: {problem}"));
        }
    }
    Ok((files, missing))
}

/// Returns what is wrong with the files of a checkpoint. A checkpoint in the format of another
/// version cannot be checked.
fn checkpoint_problem(dir: &Path, expected: &str) -> Option<String> {
    match checkpoint::digest(dir) {
        Ok(found) if !expected.is_empty() && found != expected => {
            return Some("its files have changed".to_owned());
        }
        Ok(_) => {}
        Err(e) => return Some(e.for_clients()),
    }
    match checkpoint::check(dir) {
        Ok(()) | Err(CheckpointError::Version { .. }) => None,
        Err(e) => Some(e.for_clients()),
    }
}

/// Copies a folder, if it exists, from `links` to the same path in the backup.
fn copy_folder(
    links: &Path,
    backup: &Path,
    folder: &str,
    files: &mut BTreeMap<String, BackupFile>,
) -> Result<()> {
    let from = links.join(folder);
    if !from.exists() {
        return Ok(());
    }
    for file in describe(&from)? {
        let path = format!("{folder}/{}", file.path);
        let copied = copy(&links.join(&path), &backup.join(&path))?;
        files.insert(path, copied);
    }
    Ok(())
}

/// Copies a file and hashes what it copies.
fn copy(from: &Path, to: &Path) -> Result<BackupFile> {
    let folder = parent(to);
    fs::create_dir_all(folder).map_err(|e| failed(folder, e))?;
    let mut source = File::open(from).map_err(|e| failed(from, e))?;
    let mut target = File::create(to).map_err(|e| failed(to, e))?;
    let (mut hash, mut buffer) = (blake3::Hasher::new(), vec![0; COPY_BYTES]);
    let mut size_bytes = 0;
    loop {
        let n = source.read(&mut buffer).map_err(|e| failed(from, e))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        target.write_all(&buffer[..n]).map_err(|e| failed(to, e))?;
        size_bytes += n as u64;
    }
    Ok(BackupFile {
        size_bytes,
        content_hash: hash.finalize().to_hex().to_string(),
    })
}

/// Reads the manifest of a backup.
fn read_manifest(backup: &Path) -> Result<BackupManifest> {
    let invalid = |what: &str| {
        let message = format!("{} {what}", backup.display());
        ServiceError::invalid("BACKUP", message)
    };
    let path = backup.join(MANIFEST_FILE);
    let text = fs::read(&path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            invalid("has no manifest.json: name a folder that bradley backup has completed")
        }
        _ => failed(&path, e),
    })?;
    let damaged = |e: serde_json::Error| {
        let place = backup.display();
        ServiceError::internal(format!(
            "BACKUP {place} has a damaged manifest.json: {e}: use another backup"
        ))
    };
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(damaged)?;
    if value["format"] != FORMAT {
        let made_by = value["bradley"].as_str().unwrap_or("another version");
        return Err(invalid(&format!(
            "has the format {}, and this version, {}, restores format {FORMAT}: use Bradley \
             {made_by}",
            value["format"],
            env!("CARGO_PKG_VERSION")
        )));
    }
    let manifest: BackupManifest = serde_json::from_value(value).map_err(damaged)?;
    let is_plain = |path: &String| {
        let mut parts = Path::new(path).components();
        parts.all(|part| matches!(part, Component::Normal(_)))
    };
    if let Some(path) = manifest.files.keys().find(|path| !is_plain(path)) {
        return Err(invalid(&format!(
            "has a manifest.json that names {path:?}, which is not a path in the backup"
        )));
    }
    Ok(manifest)
}

fn restore_file(from: &Path, to: &Path, path: &str, expected: &BackupFile) -> Result<()> {
    let source = from.join(path);
    let damaged = |what: &str| {
        ServiceError::internal(format!(
            "BACKUP {} {what}, so the backup is damaged and nothing was restored: use another \
             backup",
            source.display()
        ))
    };
    if !source.exists() {
        return Err(damaged("is missing"));
    }
    match copy(&source, &to.join(path))? == *expected {
        true => Ok(()),
        false => Err(damaged("has changed since the backup")),
    }
}

/// Checks that a folder does not exist, or has nothing but the names `ignored`.
fn check_empty(argument: &str, folder: &Path, ignored: &[&str]) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|e| failed(folder, e))?,
    };
    for entry in entries {
        let name = entry.map_err(|e| failed(folder, e))?.file_name();
        if !ignored.iter().any(|file| name == *file) {
            let message = format!(
                "{} is not empty (it has {}): name a new folder",
                folder.display(),
                name.to_string_lossy()
            );
            return Err(ServiceError::invalid(argument, message));
        }
    }
    Ok(())
}

/// Refuses a folder on which a file system is mounted, because a backup could not take its place.
fn refuse_mount_point(folder: &Path) -> Result<()> {
    match is_mount_point(folder) {
        true => Err(ServiceError::invalid(
            "DIR",
            format!(
                "{} is a mount point, which a backup cannot replace when it is complete: name a \
                 new folder below it",
                folder.display()
            ),
        )),
        false => Ok(()),
    }
}

/// Refuses a target inside the data directory, because whoever loses the one loses the other.
fn refuse_inside(data_dir: &Path, target: &Path) -> Result<()> {
    let root = data_dir.canonicalize().map_err(|e| failed(data_dir, e))?;
    let existing = target
        .ancestors()
        .map(|folder| match folder.as_os_str().is_empty() {
            true => Path::new("."),
            false => folder,
        })
        .find_map(|folder| folder.canonicalize().ok());
    match existing.is_some_and(|folder| folder.starts_with(&root)) {
        true => Err(ServiceError::invalid(
            "DIR",
            format!(
                "{} is inside the data directory {}: name a new folder elsewhere",
                target.display(),
                data_dir.display()
            ),
        )),
        false => Ok(()),
    }
}

fn is_mount_point(folder: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt as _;
    let (Ok(folder), Ok(mounts)) = (
        folder.canonicalize(),
        fs::read_to_string("/proc/self/mountinfo"),
    ) else {
        return false;
    };
    // The file escapes these four characters.
    let escape = |byte: &u8| match byte {
        b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
        other => vec![*other],
    };
    let folder: Vec<u8> = folder
        .as_os_str()
        .as_bytes()
        .iter()
        .flat_map(escape)
        .collect();
    let of_line = |line: &str| {
        line.split(' ')
            .nth(4)
            .map(|place| place.as_bytes() == folder)
    };
    mounts.lines().filter_map(of_line).any(|is_it| is_it)
}

#[cfg(test)]
mod tests;
