//! Removal of the files of deleted checkpoints and of their exports.

use super::artifacts::Artifacts;
use super::error::{Result, ServiceError};
use super::store::Store;
use crate::domain::job::Checkpoint;
use crate::engine::Engine;

/// Removes the files of a checkpoint whose row has been deleted. If that fails, the files remain
/// until the job is deleted.
pub(super) async fn remove_checkpoint_files(
    engine: &Engine,
    artifacts: &Artifacts,
    c: &Checkpoint,
) {
    let (job, step) = (&c.job, c.step);
    engine.evict_policy(&artifacts.checkpoint(job, step));
    if let Err(e) = artifacts.remove_checkpoint(job, step, &c.digest).await {
        tracing::warn!(job, step, error = %e, "the checkpoint's files are left until the job is \
            deleted");
    }
}

/// Checks after an export that its checkpoint still exists. If it does not, the export is removed:
/// the deletion has removed only the files that it found.
///
/// # Errors
/// `NotFound` if the checkpoint or its job was deleted during the export; `Unavailable` or
/// `Internal` if the database fails.
pub(super) async fn check_exported(
    store: &Store,
    artifacts: &Artifacts,
    c: &Checkpoint,
) -> Result<()> {
    let (job, step) = (&c.job, c.step);
    let rows = store.checkpoints(job).await?;
    // Another digest: the run has written the step again since the deletion.
    if rows.iter().any(|r| r.step == step && r.digest == c.digest) {
        return Ok(());
    }
    let removed = match store.job(job).await {
        Err(ServiceError::NotFound { .. }) => artifacts.remove_job(job).await,
        _ => artifacts.remove_exports(job, step).await,
    };
    if let Err(e) = removed {
        tracing::warn!(job, step, error = %e, "the files of an export whose checkpoint was \
            deleted meanwhile are left");
    }
    Err(ServiceError::not_found(
        "checkpoint",
        format!("trainingJobs/{job}/checkpoints/{step}"),
    ))
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection as _, Executor as _};

    use super::*;
    use crate::domain::job::Metrics;
    use crate::service::artifacts::ExportName;
    use crate::service::remote::Remote;
    use crate::service::store::{DATABASE_FILE, StoreOptions, sqlite_url};

    #[tokio::test]
    async fn an_export_whose_checkpoint_was_deleted_meanwhile_is_removed() {
        let [data, shared] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let store = Store::open(data.path(), &StoreOptions::default())
            .await
            .unwrap();
        let url = format!("file://{}", shared.path().display());
        let remote = Remote::open(&url, &Default::default(), true).unwrap();
        let artifacts = Artifacts::open(data.path(), Some(remote)).unwrap();
        let url = sqlite_url(&data.path().join(DATABASE_FILE), "rw");
        let mut database = sqlx::AnyConnection::connect(&url).await.unwrap();
        // Only the rows of checkpoints matter here.
        database.execute("PRAGMA foreign_keys = OFF").await.unwrap();

        let checkpoint = |job: &str, digest: &str| Checkpoint {
            job: job.into(),
            step: 3,
            best: false,
            adapter: true,
            size_bytes: 1,
            metrics: Metrics::new(),
            create_time: 1,
            digest: digest.into(),
        };
        for job in ["stored", "rewritten"] {
            let row = "INSERT INTO checkpoints VALUES ($1, 3, 0, 1, 1, '{}', 1, 'x')";
            sqlx::query(row)
                .bind(job)
                .execute(&mut database)
                .await
                .unwrap();
        }
        for (job, digest, remains) in [
            ("stored", "x", true),
            ("rewritten", "y", false),
            ("deleted", "x", false),
        ] {
            let here = artifacts.export(job, 3, ExportName::Adapter);
            let there = shared.path().join(here.strip_prefix(data.path()).unwrap());
            for folder in [&here, &there] {
                std::fs::create_dir_all(folder).unwrap();
                std::fs::write(folder.join("adapter_config.json"), b"{}").unwrap();
            }
            let checked = check_exported(&store, &artifacts, &checkpoint(job, digest)).await;
            match &checked {
                Ok(()) => assert!(remains, "{job}"),
                Err(ServiceError::NotFound { .. }) => assert!(!remains, "{job}"),
                Err(e) => panic!("{job}: {e}"),
            }
            for folder in [&here, &there] {
                let file = folder.join("adapter_config.json");
                assert_eq!(file.exists(), remains, "{}", file.display());
            }
        }
    }
}
