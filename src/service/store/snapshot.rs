//! Copies of the SQLite database at one moment, taken while a server uses it.

use std::path::{Path, PathBuf};

use sqlx::{AnyConnection, Connection as _};

use super::{DATABASE_FILE, Dialect, moved, newest, schema_version, sqlite_url};
use crate::service::error::{Result, ServiceError, failed};

/// The SQLite database of a data directory. It is opened beside a server and never migrated.
pub struct LiveDatabase {
    file: PathBuf,
}

/// Prevents writes to the database until it is released or dropped.
pub struct WriteBlock(AnyConnection);

/// The rows of a copy that have files, and its schema.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Number of the newest migration.
    pub migration: i64,
    /// Identity of the artifact store, if the files are in one.
    pub artifact_store: Option<String>,
    /// Ids of the jobs, with the hash of the adapter that a job starts from, if it has a copy.
    pub jobs: Vec<(String, Option<String>)>,
    /// Ids of the datasets, with the hash of each file.
    pub datasets: Vec<(String, String)>,
    /// Job, step and digest of the checkpoints.
    pub checkpoints: Vec<(String, i64, String)>,
}

impl LiveDatabase {
    /// Finds the database of a data directory.
    ///
    /// # Errors
    /// `InvalidArgument` if there is none; `FailedPrecondition` (`SCHEMA_TOO_NEW`) if this version
    /// may not use it.
    pub async fn open(data_dir: &Path) -> Result<Self> {
        let file = data_dir.join(DATABASE_FILE);
        if !std::fs::exists(&file).map_err(|e| failed(&file, e))? {
            return Err(ServiceError::invalid(
                "--data-dir",
                format!(
                    "{} has no {DATABASE_FILE}: name the data directory of a server that uses \
                     SQLite",
                    data_dir.display()
                ),
            ));
        }
        let mut connection = connect(&file, "rw").await?;
        check_readable(&mut connection).await?;
        connection.close().await?;
        Ok(LiveDatabase { file })
    }

    /// Checks that the database was not moved to PostgreSQL.
    ///
    /// # Errors
    /// `FailedPrecondition` (`DATABASE_MOVED`) if it was; `Unavailable` or `Internal` if the
    /// database fails.
    pub async fn check_not_moved(&self) -> Result<()> {
        let mut connection = connect(&self.file, "rw").await?;
        moved::check_for_backup(&mut connection, Dialect::Sqlite.count_tables()).await?;
        connection.close().await?;
        Ok(())
    }

    /// Returns the identity of the artifact store, if the files are in one.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn artifact_store(&self) -> Result<Option<String>> {
        let mut connection = connect(&self.file, "rw").await?;
        let found = artifact_store(&mut connection).await?;
        connection.close().await?;
        Ok(found)
    }

    /// Removes the mark of a database that was moved to PostgreSQL. Returns false if it has none.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn remove_moved_mark(&self) -> Result<bool> {
        let mut connection = connect(&self.file, "rw").await?;
        let is_removed = moved::forget(&mut connection, Dialect::Sqlite.count_tables()).await?;
        connection.close().await?;
        Ok(is_removed)
    }

    /// Prevents writes to the database. The server's own writes wait meanwhile.
    ///
    /// # Errors
    /// `Unavailable` if another write does not end in time.
    pub async fn block_writes(&self) -> Result<WriteBlock> {
        let mut connection = connect(&self.file, "rw").await?;
        sqlx::query("BEGIN IMMEDIATE")
            .execute(&mut connection)
            .await?;
        Ok(WriteBlock(connection))
    }

    /// Writes a copy of the database as it is at one moment to a new file.
    ///
    /// # Errors
    /// `InvalidArgument` for a path that is not UTF-8; `ResourceExhausted`, `Unavailable` or
    /// `Internal` if the file cannot be written.
    pub async fn copy_to(&self, file: &Path) -> Result<()> {
        let target = file.to_str().ok_or_else(|| {
            let message = format!("{} is not valid UTF-8: choose another path", file.display());
            ServiceError::invalid("DIR", message)
        })?;
        let mut connection = connect(&self.file, "rw").await?;
        sqlx::query("VACUUM INTO $1")
            .bind(target)
            .execute(&mut connection)
            .await?;
        connection.close().await?;
        Ok(())
    }
}

impl WriteBlock {
    /// Lets the server write again.
    ///
    /// # Errors
    /// `Internal` if the database fails.
    pub async fn release(mut self) -> Result<()> {
        sqlx::query("ROLLBACK").execute(&mut self.0).await?;
        self.0.close().await?;
        Ok(())
    }
}

impl Snapshot {
    /// Reads a copy of a database. The file is not changed.
    ///
    /// # Errors
    /// `FailedPrecondition` (`SCHEMA_TOO_NEW`) if this version may not use it; `Internal` if it is
    /// not a database of Bradley.
    pub async fn read(file: &Path) -> Result<Self> {
        let mut connection = connect(file, "ro").await?;
        check_readable(&mut connection).await?;
        let migration = sqlx::query_scalar("SELECT MAX(version) FROM _sqlx_migrations")
            .fetch_one(&mut connection)
            .await?;
        let jobs: Vec<(String, String)> =
            sqlx::query_as("SELECT id, request FROM jobs ORDER BY id")
                .fetch_all(&mut connection)
                .await?;
        let jobs = jobs
            .into_iter()
            .map(|(id, request)| (id, init_adapter(&request)));
        let datasets = sqlx::query_as("SELECT id, content_hash FROM datasets ORDER BY id")
            .fetch_all(&mut connection)
            .await?;
        let select = "SELECT job, step, digest FROM checkpoints ORDER BY job, step";
        let checkpoints = sqlx::query_as(select).fetch_all(&mut connection).await?;
        let artifact_store = artifact_store(&mut connection).await?;
        connection.close().await?;
        Ok(Snapshot {
            migration,
            artifact_store,
            jobs: jobs.collect(),
            datasets,
            checkpoints,
        })
    }
}

/// Returns the hash of the adapter that a stored request starts from.
fn init_adapter(request: &str) -> Option<String> {
    let request: serde_json::Value = serde_json::from_str(request).ok()?;
    Some(request.pointer("/pins/init_adapter")?.as_str()?.to_owned())
}

async fn connect(file: &Path, mode: &str) -> Result<AnyConnection> {
    sqlx::any::install_default_drivers();
    let mut connection = AnyConnection::connect(&sqlite_url(file, mode)).await?;
    sqlx::query("PRAGMA busy_timeout = 30000")
        .execute(&mut connection)
        .await?;
    Ok(connection)
}

async fn check_readable(connection: &mut AnyConnection) -> Result<()> {
    let known = newest(&Dialect::Sqlite.migrations());
    schema_version::check(connection, Dialect::Sqlite.count_tables(), known).await
}

async fn artifact_store(connection: &mut AnyConnection) -> Result<Option<String>> {
    // Databases of version 0.1 have no such table.
    if !schema_version::exists(connection, Dialect::Sqlite.count_tables(), "properties").await? {
        return Ok(None);
    }
    let select = "SELECT value FROM properties WHERE name = $1";
    Ok(sqlx::query_scalar(select)
        .bind(super::properties::ARTIFACT_STORE)
        .fetch_optional(connection)
        .await?)
}
