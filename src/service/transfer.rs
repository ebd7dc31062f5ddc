//! Move of a server from SQLite and its data directory to PostgreSQL and an artifact store.

use std::collections::BTreeMap;
use std::path::Path;

use super::artifacts::{Artifacts, damaged, hash_adapter, hash_file};
use super::blocking::blocking;
use super::data_dir::{check_restored, lock};
use super::error::{Result, ServiceError};
use super::remote::{Remote, URL_FORM, is_url};
use super::store::properties::ARTIFACT_STORE;
use super::store::snapshot::{LiveDatabase, Snapshot};
use super::store::transfer::CopiedTable;
use super::store::{DATABASE_FILE, Store, StoreOptions, moved};
use crate::train::checkpoint::{self, CheckpointError};

/// Copies the files of a data directory, except exports, to an artifact store, given by its URL and
/// its vendor's variables, and the rows of the SQLite database to an empty PostgreSQL database. No
/// server may use the data directory meanwhile. Nothing is removed, but the SQLite database is
/// marked as moved at the end, and no server starts on it until [`undo`]. The call can be repeated
/// after a failure.
///
/// # Errors
/// `InvalidArgument` if the data directory has no database or has files that were changed, if no
/// artifact store is given or known, or if the target is not an empty PostgreSQL database;
/// `FailedPrecondition` if a server runs (`DATA_DIR_IN_USE`), the database was moved before
/// (`DATABASE_MOVED`), a file of a checkpoint or of a copied adapter is missing or damaged, or the
/// database knows another artifact store; `Unavailable` or `Internal` if a database, the artifact
/// store or the disk fails, or if the file of a dataset is missing.
pub async fn migrate(
    data_dir: &Path,
    to: &str,
    artifact_store: Option<&(String, BTreeMap<String, String>)>,
) -> Result<Vec<CopiedTable>> {
    let schemes = ["postgres://", "postgresql://"];
    if !schemes.iter().any(|scheme| to.starts_with(scheme)) {
        let message =
            "must be the URL of a PostgreSQL database: postgres://USER:PASSWORD@HOST/NAME";
        return Err(ServiceError::invalid("--to", message));
    }
    if let Some((url, _)) = artifact_store
        && !is_url(url)
    {
        let message = format!("is {url:?}: it must be {URL_FORM}");
        return Err(ServiceError::invalid("--artifact-url", message));
    }
    let file = data_dir.join(DATABASE_FILE);
    if !file.exists() {
        let message = format!(
            "{} has no {DATABASE_FILE}: name the data directory of a server that uses SQLite",
            data_dir.display()
        );
        return Err(ServiceError::invalid("--data-dir", message));
    }
    let _lock = lock(data_dir)?;
    check_restored(data_dir)?;
    let source = Store::open(data_dir, &StoreOptions::default()).await?;
    let known = source.property(ARTIFACT_STORE).await?;
    if artifact_store.is_none() && known.is_none() {
        let message = "is not set: servers that share a database must find the same files; name \
                       the bucket or shared folder to which the files are copied";
        return Err(ServiceError::invalid("--artifact-url", message));
    }
    let options = StoreOptions {
        database_url: Some(to.to_owned()),
        url_source: "--to",
        ..StoreOptions::default()
    };
    let target = Store::open(data_dir, &options).await?;
    // The target is checked before the files are copied, which may take hours, and before the
    // SQLite database records its artifact store, without which no server then starts on it.
    source.check_target(&target).await?;
    if let Some((url, variables)) = artifact_store {
        let remote = Remote::open(url, variables, known.is_none())?;
        let artifacts = Artifacts::open(data_dir, Some(remote))?;
        artifacts.ping().await?;
        if known.is_none() {
            upload(&Snapshot::read(&file).await?, &artifacts).await?;
        }
        // The SQLite database knows its store only when all files are there. From then on, no
        // server starts on it without the store.
        artifacts.identify(&source).await?;
    }
    let copied = source.copy_to(&target).await;
    let marked = if copied.is_ok() {
        mark_as_moved(&source, to).await
    } else {
        Ok(())
    };
    source.close().await;
    target.close().await;
    marked?;
    copied
}

async fn mark_as_moved(source: &Store, to: &str) -> Result<()> {
    let value = moved::mark(&jiff::Timestamp::now().to_string(), to);
    match source.set_property_once(moved::MOVED, &value).await {
        Ok(_) => Ok(()),
        Err(e) => Err(ServiceError::internal(format!(
            "everything is copied, but the SQLite database cannot be marked as moved: start no \
             server on it: {e}"
        ))),
    }
}

/// Removes the mark of a SQLite database that was moved, so that servers start on it again. They
/// need its artifact store. No server may use the PostgreSQL database any more.
///
/// # Errors
/// `InvalidArgument` if the data directory has no database, or one that was not moved;
/// `FailedPrecondition` if a server uses the data directory (`DATA_DIR_IN_USE`) or this version may
/// not use the database (`SCHEMA_TOO_NEW`); `Unavailable` or `Internal` if the database fails.
pub async fn undo(data_dir: &Path) -> Result<()> {
    let database = LiveDatabase::open(data_dir).await?;
    let _lock = lock(data_dir)?;
    check_restored(data_dir)?;
    if database.remove_moved_mark().await? {
        return Ok(());
    }
    let message = format!("the database in {} was not moved", data_dir.display());
    Err(ServiceError::invalid("--undo:", message))
}

/// Uploads the files that a database names, after comparing them with their hashes.
async fn upload(snapshot: &Snapshot, artifacts: &Artifacts) -> Result<()> {
    for (id, expected) in &snapshot.datasets {
        let path = artifacts.dataset(id);
        let (_, found) = blocking(move || hash_file(&path)).await??;
        if found != *expected {
            let message = format!(
                "the file of datasets/{id} has the content hash {found}, but {expected} was \
                 uploaded: restore it from a backup, or delete the dataset"
            );
            return Err(ServiceError::invalid("--data-dir", message));
        }
        artifacts.upload_dataset(id).await?;
    }
    for (job, init_adapter) in &snapshot.jobs {
        if let Some(expected) = init_adapter {
            let dir = artifacts.init_adapter(job);
            let found = blocking(move || hash_adapter(&dir)).await?;
            if found.ok().as_ref() != Some(expected) {
                let name = format!("trainingJobs/{job}'s init_adapter");
                return Err(damaged(
                    &name,
                    "they are missing, or their hash is another one",
                ));
            }
        }
        artifacts.upload_init_adapter(job).await?;
    }
    for (job, step, digest) in &snapshot.checkpoints {
        let step = *step as u64;
        let dir = artifacts.checkpoint(job, step);
        let name = format!("trainingJobs/{job}/checkpoints/{step}");
        let checked = blocking(move || {
            checkpoint::digest(&dir).and_then(|found| match checkpoint::check(&dir) {
                // A checkpoint in the format of another version is copied as it is.
                Ok(()) | Err(CheckpointError::Version { .. }) => Ok(found),
                Err(e) => Err(e),
            })
        });
        let found = checked.await?.map_err(|e| artifacts.unusable(&e, &name))?;
        if !digest.is_empty() && found != *digest {
            return Err(damaged(&name, "its hash differs from the recorded one"));
        }
        artifacts.upload_checkpoint(job, step, digest).await?;
    }
    Ok(())
}
