//! Mark of a SQLite database that was moved to PostgreSQL. Without it, a server that is started on
//! the old database by mistake would continue the same jobs in both. The mark is a property, which
//! older versions ignore.

use sqlx::AnyConnection;

use super::schema_version;
use crate::domain::reason::Reason;
use crate::service::error::{Result, ServiceError};

/// Property with the date of the move and the place of the new database.
pub const MOVED: &str = "moved";
/// Table of the properties. Databases of version 0.1 have none.
const PROPERTIES: &str = "properties";

/// Returns the value of the mark: the date of `time` (RFC 3339), and the host, port and name of the
/// PostgreSQL database at `url`. It has no user and no password.
pub fn mark(time: &str, url: &str) -> String {
    let place = reqwest::Url::parse(url).map_or_else(
        |_| "its place is not known".to_owned(),
        |url| {
            let host = url.host_str().unwrap_or("localhost");
            format!("{host}:{}{}", url.port().unwrap_or(5432), url.path())
        },
    );
    let date = time.split('T').next().unwrap_or(time);
    format!("{date} ({place})")
}

/// Checks that a SQLite database was not moved to PostgreSQL. `count_tables` is SQL that counts the
/// tables named `$1`.
///
/// # Errors
/// `FailedPrecondition` (`DATABASE_MOVED`) if it was.
pub(super) async fn check(
    connection: &mut AnyConnection,
    count_tables: &'static str,
) -> Result<()> {
    let remedy = "start servers with --database-url and --artifact-url, and give bradley tokens \
                  --database-url; to go back to this copy, stop all servers of that database for \
                  good and run bradley migrate --undo (docs/upgrade.md)";
    refuse(connection, count_tables, remedy).await
}

/// Like [`check`], for a backup: a copy of a database that no server uses any more would be taken
/// for one of the server's data.
///
/// # Errors
/// As [`check`].
pub(super) async fn check_for_backup(
    connection: &mut AnyConnection,
    count_tables: &'static str,
) -> Result<()> {
    let remedy = "back up that database with pg_dump, and then the bucket (docs/backup.md)";
    refuse(connection, count_tables, remedy).await
}

/// Refuses a database with the mark.
async fn refuse(
    connection: &mut AnyConnection,
    count_tables: &'static str,
    remedy: &str,
) -> Result<()> {
    if !schema_version::exists(connection, count_tables, PROPERTIES).await? {
        return Ok(());
    }
    let select = "SELECT value FROM properties WHERE name = $1";
    let found: Option<String> = sqlx::query_scalar(select)
        .bind(MOVED)
        .fetch_optional(connection)
        .await?;
    match found {
        None => Ok(()),
        Some(mark) => Err(ServiceError::FailedPrecondition {
            reason: Reason::DatabaseMoved,
            message: format!("this database was moved to PostgreSQL on {mark}: {remedy}"),
        }),
    }
}

/// Removes the mark. Returns false if there was none.
///
/// # Errors
/// `Unavailable` or `Internal` if the database fails.
pub(super) async fn forget(
    connection: &mut AnyConnection,
    count_tables: &'static str,
) -> Result<bool> {
    if !schema_version::exists(connection, count_tables, PROPERTIES).await? {
        return Ok(false);
    }
    let removed = sqlx::query("DELETE FROM properties WHERE name = $1")
        .bind(MOVED)
        .execute(connection)
        .await?;
    Ok(removed.rows_affected() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_has_the_date_and_place_but_no_password() {
        let marked = |url| mark("2026-11-30T10:00:00.5Z", url);
        assert_eq!(
            marked("postgres://bradley:secret@db/jobs?sslmode=require"),
            "2026-11-30 (db:5432/jobs)"
        );
        assert_eq!(
            marked("postgresql://db:6543/jobs"),
            "2026-11-30 (db:6543/jobs)"
        );
    }
}
