//! Checks of the database and the artifact store that change nothing, for `bradley doctor`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use sqlx::any::AnyPoolOptions;

use super::error::{Result, ServiceError};
use super::remote::Remote;
use super::store::{check_version, sqlite_url};

/// Time limit for the database and for the artifact store.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Asks the database at `database_url`, or the SQLite database in `data_dir`. Returns a text with
/// its kind, its number of jobs and the version of its schema, or one that says that it does not
/// exist yet. Neither creates nor migrates it.
///
/// # Errors
/// `Internal` if it does not answer within five seconds, or is no database of Bradley's;
/// `FailedPrecondition` (`SCHEMA_TOO_NEW`) if this version may not use it.
pub async fn database(data_dir: &Path, database_url: Option<&str>) -> Result<String> {
    sqlx::any::install_default_drivers();
    let file = data_dir.join("bradley.db");
    let (kind, url) = match database_url {
        Some(url) => ("PostgreSQL", url.to_owned()),
        None if !file.exists() => {
            return Ok(format!("{} is created at the first start", file.display()));
        }
        None => ("SQLite", sqlite_url(&file, "ro")),
    };
    let failed = |e: sqlx::Error| ServiceError::internal(format!("{kind} does not answer: {e}"));
    let asked = async {
        let pool = AnyPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(TIMEOUT)
            .connect(&url)
            .await?;
        let found = count(&pool).await;
        let version = match &found {
            Ok(Some(_)) => {
                let mut connection = pool.acquire().await?;
                check_version(&mut connection, database_url.is_some()).await
            }
            _ => Ok(()),
        };
        pool.close().await;
        found.map(|found| (found, version))
    };
    let asked = tokio::time::timeout(TIMEOUT, asked).await;
    let asked = asked.unwrap_or(Err(sqlx::Error::PoolTimedOut));
    let (found, version) = asked.map_err(failed)?;
    // A server of this version would not start on it.
    version?;
    match found {
        Some((jobs, schema)) => Ok(format!("{kind}, {jobs} jobs, schema version {schema}")),
        None => Ok(format!(
            "{kind}, empty: its schema is made at the first start"
        )),
    }
}

/// Returns the number of jobs and the version of the schema; `None` if the database has no schema.
async fn count(pool: &sqlx::AnyPool) -> sqlx::Result<Option<(i64, i64)>> {
    sqlx::query("SELECT 1").execute(pool).await?;
    let schema = sqlx::query_scalar::<_, i64>("SELECT MAX(version) FROM _sqlx_migrations");
    let Ok(schema) = schema.fetch_one(pool).await else {
        return Ok(None);
    };
    let jobs: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM jobs")
        .fetch_one(pool)
        .await?;
    Ok(Some((jobs, schema)))
}

/// Asks the artifact store at `url`. `options` are the variables of its vendor.
///
/// # Errors
/// `InvalidArgument` if the URL cannot be used, `Unavailable` if the store does not answer.
pub async fn artifact_store(url: &str, options: &BTreeMap<String, String>) -> Result<String> {
    let remote = Remote::open(url, options, false)?;
    remote.ping(TIMEOUT).await?;
    Ok(format!("{} answers", remote.url()))
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection as _, Executor as _};

    use super::*;
    use crate::domain::reason::Reason;
    use crate::service::store::{DATABASE_FILE, Store, StoreOptions};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_database_that_this_version_may_not_use_is_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions::default();
        Store::open(dir.path(), &options)
            .await
            .unwrap()
            .close()
            .await;
        let answer = database(dir.path(), None).await.unwrap();
        assert!(answer.contains("SQLite, 0 jobs"), "{answer}");
        let url = sqlite_url(&dir.path().join(DATABASE_FILE), "rw");
        let mut newer = sqlx::AnyConnection::connect(&url).await.unwrap();
        for statement in [
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
             VALUES (9000, 'newer', 1, x'00', 0)",
            "INSERT INTO migration_readers (migration, reader, reader_release)
             VALUES (9000, 9000, '9.0.0')",
        ] {
            newer.execute(statement).await.unwrap();
        }
        newer.close().await.unwrap();
        match database(dir.path(), None).await {
            Err(ServiceError::FailedPrecondition { reason, message }) => {
                assert_eq!(reason, Reason::SchemaTooNew);
                assert!(message.contains("start Bradley 9.0.0"), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }
}
