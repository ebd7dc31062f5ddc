//! Checks that this version may use a database that a newer version has migrated.
//!
//! Each migration has a row in the table `migration_readers`, which names the oldest version that
//! may still use the database after it: by its release, and by the newest migration that this
//! oldest version knows. A migration that only adds something names the release before it or an
//! older one; a migration that older versions cannot use names its own release.

use sqlx::AnyConnection;

use crate::domain::reason::Reason;
use crate::service::error::{Result, ServiceError};

/// Table in which sqlx records the migrations that were applied.
const APPLIED: &str = "_sqlx_migrations";
const READERS: &str = "migration_readers";

/// Checks that a version whose newest migration is `known` may use the database. A database that is
/// new or older than this version passes. `count_tables` is SQL that counts the tables named `$1`.
///
/// # Errors
/// `FailedPrecondition` (`SCHEMA_TOO_NEW`) if a newer migration does not allow it.
pub(super) async fn check(
    connection: &mut AnyConnection,
    count_tables: &'static str,
    known: i64,
) -> Result<()> {
    if !exists(connection, count_tables, APPLIED).await? {
        return Ok(());
    }
    let newer = format!("SELECT version FROM {APPLIED} WHERE version > $1 ORDER BY version");
    let newer: Vec<i64> = sqlx::query_scalar(sqlx::AssertSqlSafe(newer))
        .bind(known)
        .fetch_all(&mut *connection)
        .await?;
    if newer.is_empty() {
        return Ok(());
    }
    let readers: Vec<(i64, i64, String)> = if exists(connection, count_tables, READERS).await? {
        let select =
            format!("SELECT migration, reader, reader_release FROM {READERS} WHERE migration > $1");
        sqlx::query_as(sqlx::AssertSqlSafe(select))
            .bind(known)
            .fetch_all(&mut *connection)
            .await?
    } else {
        Vec::new()
    };
    match refusal(known, &newer, &readers) {
        None => {
            tracing::warn!(
                migrations = ?newer,
                "a newer version has migrated the database; this version may still use it"
            );
            Ok(())
        }
        Some(message) => Err(ServiceError::FailedPrecondition {
            reason: Reason::SchemaTooNew,
            message,
        }),
    }
}

/// Returns true if the database has a table. `count_tables` is SQL that counts the tables named
/// `$1`.
pub(super) async fn exists(
    connection: &mut AnyConnection,
    count_tables: &'static str,
    table: &str,
) -> Result<bool> {
    let count: i64 = sqlx::query_scalar(count_tables)
        .bind(table)
        .fetch_one(connection)
        .await?;
    Ok(count > 0)
}

/// Returns the reason why a version whose newest migration is `known` may not use a database with
/// these `newer` migrations; `None` if it may. `readers` are migrations with the oldest version
/// that each allows.
fn refusal(known: i64, newer: &[i64], readers: &[(i64, i64, String)]) -> Option<String> {
    let this = env!("CARGO_PKG_VERSION");
    let remedy = "or restore the backup that was made before the upgrade (docs/upgrade.md)";
    let strictest = readers
        .iter()
        .filter(|(migration, ..)| newer.contains(migration))
        .max_by_key(|(_, reader, _)| *reader);
    if let Some((migration, _, release)) = strictest.filter(|(_, reader, _)| *reader > known) {
        return Some(format!(
            "a newer version of Bradley has migrated this database (migration {migration}), and \
             this version, {this}, can no longer use it: start Bradley {release} or newer, {remedy}"
        ));
    }
    let silent = newer
        .iter()
        .find(|m| !readers.iter().any(|(migration, ..)| migration == *m))?;
    Some(format!(
        "another version of Bradley has migrated this database (migration {silent}), and the \
         database does not say that this version, {this}, may still use it: start the version that \
         used it last, {remedy}"
    ))
}

#[cfg(test)]
mod tests;
