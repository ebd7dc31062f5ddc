//! Checks of the database, the artifact store, the token file and the OIDC issuer that change
//! nothing, for `bradley doctor`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::Connection as _;
use sqlx::any::AnyPoolOptions;

use super::auth::declared::DeclaredTokens;
use super::auth::oidc::{self, KeySource};
use super::error::{Result, ServiceError};
use super::remote::Remote;
use super::store::acquire::{ACQUIRE_TIMEOUT, no_connection};
use super::store::properties::ARTIFACT_STORE;
use super::store::{DATABASE_FILE, check_version, refusal, sqlite_url};
use crate::domain::reason::Reason;

/// Time limit for the database, for the artifact store and for the OIDC issuer.
const TIMEOUT: Duration = ACQUIRE_TIMEOUT;

/// Reads the file that declares tokens. Returns a text about it.
///
/// # Errors
/// `InvalidArgument` (`token_file`) if it cannot be read or an entry cannot be used.
pub fn token_file(path: &Path) -> Result<String> {
    DeclaredTokens::open(path)?;
    Ok(format!("{} can be used", path.display()))
}

/// Fetches the keys of an OIDC issuer as the server does: with its discovery document, unless the
/// URL of the keys is set. Returns a text with their number.
///
/// # Errors
/// `InvalidArgument` (`oidc_ca_file`) or `Internal` if there can be no HTTPS client, `Unavailable`
/// if the keys cannot be fetched within five seconds.
pub async fn issuer(source: &KeySource) -> Result<String> {
    let counted = tokio::time::timeout(TIMEOUT, oidc::count_keys(source.clone())).await;
    let counted = counted.unwrap_or_else(|_| {
        Err(ServiceError::Unavailable {
            reason: Reason::IssuerUnavailable,
            message: format!(
                "the keys of the OIDC issuer cannot be fetched: no answer within {} seconds",
                TIMEOUT.as_secs()
            ),
            retry_after: TIMEOUT,
        })
    });
    Ok(format!("its keys can be fetched ({})", counted?))
}

/// Asks the database at `database_url`, or the SQLite database in `data_dir`. Returns a text with
/// its kind, its number of jobs and the version of its schema, or one that says that it does not
/// exist yet or is empty. The database is neither created nor migrated.
///
/// # Errors
/// `Internal` if it does not answer within five seconds, or has migrations but no table of jobs, so
/// that it is not Bradley's; `FailedPrecondition` (`SCHEMA_TOO_NEW`, `DATABASE_MOVED`) if a server
/// of this version would not start on it.
pub async fn database(data_dir: &Path, database_url: Option<&str>) -> Result<String> {
    sqlx::any::install_default_drivers();
    let file = data_dir.join(DATABASE_FILE);
    let (kind, url) = match database_url {
        Some(url) => ("PostgreSQL", url.to_owned()),
        None if !file.exists() => {
            return Ok(format!("{} is created at the first start", file.display()));
        }
        None => ("SQLite", sqlite_url(&file, "ro")),
    };
    let failed = |e: sqlx::Error| {
        let why = match &e {
            sqlx::Error::PoolTimedOut => no_connection(kind),
            e => format!("{kind} does not answer: {}", refusal(e)),
        };
        ServiceError::internal(why)
    };
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

/// Returns the identity of the artifact store that the database of these settings knows; `None` if
/// it knows none, does not exist yet, or does not answer.
async fn known_store(data_dir: &Path, database_url: Option<&str>) -> Option<String> {
    sqlx::any::install_default_drivers();
    let file = data_dir.join(DATABASE_FILE);
    let url = match database_url {
        Some(url) => url.to_owned(),
        None if !file.exists() => return None,
        None => sqlite_url(&file, "ro"),
    };
    let asked = async {
        let mut connection = sqlx::AnyConnection::connect(&url).await.ok()?;
        let select = "SELECT value FROM properties WHERE name = $1";
        let known = sqlx::query_scalar(select)
            .bind(ARTIFACT_STORE)
            .fetch_optional(&mut connection);
        known.await.ok().flatten()
    };
    tokio::time::timeout(TIMEOUT, asked).await.ok().flatten()
}

/// Asks the artifact store at `url`. `options` are the variables of its vendor. Unless the
/// database of these settings knows a store, a store without an identity is accepted as a new one,
/// and the folder of a `file:` URL need not exist.
///
/// # Errors
/// `InvalidArgument` if the URL cannot be used, `Unavailable` or `Internal` if the store does not
/// answer, `FailedPrecondition` (`WRONG_ARTIFACT_STORE`) if the database knows another store.
pub async fn artifact_store(
    url: &str,
    options: &BTreeMap<String, String>,
    data_dir: &Path,
    database_url: Option<&str>,
) -> Result<String> {
    let known = known_store(data_dir, database_url).await;
    if known.is_none()
        && let Some(folder) = missing_folder(url)
    {
        return Ok(format!(
            "empty: the folder {} is made at the first start",
            folder.display()
        ));
    }
    let remote = Remote::open(url, options, false)?;
    remote.ping(TIMEOUT).await?;
    let found = tokio::time::timeout(TIMEOUT, remote.identity()).await;
    let found = found.unwrap_or_else(|_| {
        let message = format!("{} did not answer in time", remote.url());
        Err(ServiceError::internal(message))
    })?;
    match (known, found) {
        (Some(known), found) if found.as_ref() != Some(&known) => {
            Err(ServiceError::FailedPrecondition {
                reason: Reason::WrongArtifactStore,
                message: format!(
                    "{} is not the store {known} that this database knows: mount that one, or \
                     correct artifact_url",
                    remote.url()
                ),
            })
        }
        (None, None) => Ok(format!(
            "{} answers; it is new, and gets its identity at the first start",
            remote.url()
        )),
        _ => Ok(format!("{} answers", remote.url())),
    }
}

/// Returns the folder of a `file:` URL if it does not exist.
fn missing_folder(url: &str) -> Option<PathBuf> {
    let parsed = reqwest::Url::parse(url).ok()?;
    let folder = (parsed.scheme() == "file").then(|| parsed.to_file_path().ok())??;
    (!folder.exists()).then_some(folder)
}

#[cfg(test)]
mod tests {
    use sqlx::Executor as _;

    use super::*;
    use crate::service::store::{Store, StoreOptions};

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
