//! Store of jobs, events, checkpoints, calibrations, datasets, tokens, usage and properties of the
//! database itself, in SQLite or PostgreSQL. A write has reached the disk when its call returns.
//!
//! The SQL is written once, in the subset that both databases understand; `Dialect` holds the few
//! differences. All columns are 64-bit integers or TEXT.

pub(super) mod acquire;
pub mod calibrations;
mod checkpoints;
mod datasets;
pub mod jobs;
pub mod leases;
pub mod listen;
pub mod moved;
pub mod properties;
mod rows;
mod schema_version;
pub mod snapshot;
pub(super) mod stale;
pub mod tokens;
pub mod transfer;
mod usage;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use sqlx::any::{AnyConnectOptions, AnyPoolOptions, AnyRow};
use sqlx::migrate::Migrator;
use sqlx::{AnyConnection, AnyPool, AssertSqlSafe, Connection as _, FromRow};

use self::acquire::ACQUIRE_TIMEOUT;
use super::error::{Result, ServiceError};
use crate::domain::job::Millis;
use crate::domain::reason::Reason;
use crate::domain::violation::quoted;

/// File of the SQLite database in the data directory.
pub const DATABASE_FILE: &str = "bradley.db";
/// Number of connections for reads from SQLite.
const SQLITE_READERS: u32 = 4;
/// Number of connections to PostgreSQL: this many for reads, and as many again for writes.
const POSTGRES_CONNECTIONS: u32 = 8;

/// SQLSTATE of PostgreSQL for a connection to a database that does not exist.
const NO_SUCH_DATABASE: &str = "3D000";

/// Maximum text in the rows of a page, in bytes. Most gRPC clients accept messages of at most 4
/// MiB. A page ends before the row that would exceed the limit.
const PAGE_BYTES: usize = 2 << 20;
/// Maximum number of characters of a machine's name in the id of a replica.
const MAX_MACHINE_NAME: usize = 100;
/// Maximum number of rows of a page read from the database at a time.
const ROWS_AT_A_TIME: usize = 32;

/// SQL condition that selects the rows of a page: `$1` is the `seq` before which the page begins,
/// `$2` is 0 for all owners, `$3` is the owner.
const PAGE_CONDITION: &str = "seq < $1 AND ($2 = 0 OR owner = $3)";

/// A row that can be listed in pages.
trait ListedRow {
    /// Position in the list.
    fn seq(&self) -> i64;
    /// Size of the text in the row, in bytes.
    fn bytes(&self) -> usize;
}

/// A page of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    /// The items, newest first.
    pub items: Vec<T>,
    /// Token for the next page; empty on the last page.
    pub next_page_token: String,
}

/// SQL that differs between the two databases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    /// Returns the migrations that this version knows.
    fn migrations(self) -> Migrator {
        match self {
            Dialect::Sqlite => sqlx::migrate!("src/service/migrations/sqlite"),
            Dialect::Postgres => sqlx::migrate!("src/service/migrations/postgres"),
        }
    }

    /// Returns SQL that counts the tables named `$1`.
    fn count_tables(self) -> &'static str {
        match self {
            Dialect::Sqlite => {
                "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = $1"
            }
            Dialect::Postgres => {
                "SELECT COUNT(*) FROM information_schema.tables
                 WHERE table_schema = current_schema() AND CAST(table_name AS TEXT) = $1"
            }
        }
    }

    /// Returns SQL for the database's clock, in milliseconds since 1970. The clocks of the replicas
    /// need not agree.
    fn now(self) -> &'static str {
        match self {
            Dialect::Sqlite => "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
            Dialect::Postgres => "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)",
        }
    }

    /// Returns the end of a SELECT that locks a row for an update. SQLite needs no lock, because it
    /// has only one writer.
    fn for_update(self) -> &'static str {
        match self {
            Dialect::Sqlite => "",
            Dialect::Postgres => " FOR UPDATE",
        }
    }

    /// Like [`Dialect::for_update`], but skips rows that another transaction has locked.
    fn skip_locked(self) -> &'static str {
        match self {
            Dialect::Sqlite => "",
            Dialect::Postgres => " FOR UPDATE SKIP LOCKED",
        }
    }

    /// Returns the end of a SELECT that prevents a row from being changed or deleted until the
    /// transaction ends.
    fn for_share(self) -> &'static str {
        match self {
            Dialect::Sqlite => "",
            Dialect::Postgres => " FOR SHARE",
        }
    }
}

/// Options for opening the store.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// PostgreSQL URL (`postgres://…`); `None` selects SQLite in the data directory.
    pub database_url: Option<String>,
    /// Name of the setting or flag that gave the URL, for errors.
    pub url_source: &'static str,
    /// Maximum number of events stored per job; the oldest are deleted first.
    pub events_kept: u64,
    /// Duration of a job's lease. A worker that does not renew it for this long loses the job.
    pub lease: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            database_url: None,
            url_source: "database_url",
            events_kept: 1_000_000,
            lease: Duration::from_secs(30),
        }
    }
}

/// The database. Clones share the connections.
#[derive(Clone)]
pub struct Store {
    dialect: Dialect,
    url: String,
    /// Connections for writes. SQLite has only one, so that the writes of this process are
    /// serialised here and never meet `SQLITE_BUSY` because of each other.
    writer: AnyPool,
    readers: AnyPool,
    events_kept: i64,
    lease: Duration,
    /// Id of this process among the replicas: the machine's name, `@` and a random part.
    replica: String,
}

/// Returns a new id of this process.
fn new_replica() -> String {
    let id = uuid::Uuid::now_v7();
    // In Kubernetes this is the name of the pod.
    let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let is_legal = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let machine: String = machine
        .chars()
        .filter(is_legal)
        .take(MAX_MACHINE_NAME)
        .collect();
    match machine.is_empty() {
        true => id.to_string(),
        false => format!("{machine}@{id}"),
    }
}

/// Returns the name of the replica that holds a lease: that of its machine, or else its id.
fn replica_name(lease_owner: &str) -> &str {
    let replica = lease_owner.split('/').next().unwrap_or_default();
    replica.split('@').next().unwrap_or_default()
}

/// Returns this machine's time, in milliseconds since 1970.
pub fn now() -> Millis {
    jiff::Timestamp::now().as_millisecond()
}

impl Store {
    /// Opens the database, or creates `<data_dir>/bradley.db`, and applies the migrations of its
    /// schema.
    ///
    /// # Errors
    /// `FailedPrecondition` (`SCHEMA_TOO_NEW`) if a newer version has migrated the database so that
    /// this one may not use it, or (`DATABASE_MOVED`) if `bradley migrate` has moved it to
    /// PostgreSQL; `Unavailable` or `Internal` if the database cannot be opened or migrated.
    pub async fn open(data_dir: &Path, options: &StoreOptions) -> Result<Self> {
        sqlx::any::install_default_drivers();
        let (dialect, url) = match &options.database_url {
            Some(url) => (Dialect::Postgres, url.clone()),
            None => (
                Dialect::Sqlite,
                sqlite_url(&data_dir.join(DATABASE_FILE), "rwc"),
            ),
        };
        let connect = AnyConnectOptions::from_str(&url)
            .map_err(|e| ServiceError::internal(format!("{}: {e}", options.url_source)))?;
        let pool = |n: u32| {
            AnyPoolOptions::new()
                .max_connections(n)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                .after_connect(move |connection, _| Box::pin(configure(dialect, connection)))
                .before_acquire(|_, about| {
                    let usable = stale::is_fresh(about.age);
                    Box::pin(async move { Ok(usable) })
                })
                .after_release(move |connection, _| Box::pin(is_clean(dialect, connection)))
        };
        let (writers, readers) = match dialect {
            Dialect::Sqlite => (1, SQLITE_READERS),
            Dialect::Postgres => (POSTGRES_CONNECTIONS, POSTGRES_CONNECTIONS),
        };
        let place = match &options.database_url {
            // Not the whole URL, because it may have a password.
            Some(_) => {
                let url = &connect.database_url;
                let host = url.host_str().unwrap_or("localhost");
                let port = url.port().unwrap_or(5432);
                format!("of {} at {host}:{port}", options.url_source)
            }
            None => data_dir.join(DATABASE_FILE).display().to_string(),
        };
        let cannot_open = |e: sqlx::Error| {
            let why = match e {
                sqlx::Error::PoolTimedOut => format!(
                    "it did not answer within {} seconds: check its address, that it runs, and \
                     that this machine may reach it",
                    ACQUIRE_TIMEOUT.as_secs()
                ),
                e => refusal(&e),
            };
            ServiceError::internal(format!("the database {place} cannot be opened: {why}"))
        };
        let writer = pool(writers)
            .connect_with(connect.clone())
            .await
            .map_err(cannot_open)?;
        let mut migrations = dialect.migrations();
        // Migrations of newer versions are ignored if they allow it: after a rollback, this version
        // still runs on a database to which a newer one has only added something.
        let mut connection = writer.acquire().await.map_err(cannot_open)?;
        schema_version::check(&mut connection, dialect.count_tables(), newest(&migrations)).await?;
        // Before the migrations, so that the version that moved a database can still use it after
        // `bradley migrate --undo`.
        if dialect == Dialect::Sqlite {
            moved::check(&mut connection, dialect.count_tables()).await?;
        }
        drop(connection);
        migrations.set_ignore_missing(true);
        let migrating = pool(1)
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    configure(dialect, connection).await?;
                    set_migration_limits(dialect, connection).await
                })
            })
            .connect_with(connect.clone())
            .await
            .map_err(cannot_open)?;
        let migrated = migrations.run(&migrating).await;
        migrating.close().await;
        migrated.map_err(|e| {
            ServiceError::internal(format!(
                "the schema of the database {place} cannot be brought up to date: {e}"
            ))
        })?;
        // Once more: a newer version may have migrated while this one waited for its turn.
        let mut connection = writer.acquire().await.map_err(cannot_open)?;
        schema_version::check(&mut connection, dialect.count_tables(), newest(&migrations)).await?;
        drop(connection);
        Ok(Store {
            dialect,
            url,
            writer,
            readers: pool(readers)
                .connect_with(connect)
                .await
                .map_err(cannot_open)?,
            events_kept: options.events_kept.clamp(1, i64::MAX as u64) as i64,
            lease: options.lease,
            replica: new_replica(),
        })
    }

    /// Returns true if other replicas may use the same database.
    pub fn is_shared(&self) -> bool {
        self.dialect == Dialect::Postgres
    }

    /// Returns true if a row whose insert failed with `e` may still be stored: PostgreSQL may be at
    /// work on it although the connection broke.
    pub fn may_still_insert(&self, e: &ServiceError) -> bool {
        self.is_shared() && matches!(e, ServiceError::Unavailable { .. })
    }

    /// Closes all connections. SQLite then merges its WAL into the database file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    /// Returns true after [`Store::close`].
    pub fn is_closed(&self) -> bool {
        self.readers.is_closed()
    }

    /// Returns a page of the rows that `select` finds, newest first. `select` must contain
    /// [`PAGE_CONDITION`]. Only rows of `owner` are returned, or of everyone if it is `None`. A
    /// page has at most `size` rows, and fewer if their text would exceed [`PAGE_BYTES`]. A row
    /// that alone exceeds the limit gets a page of its own.
    async fn page<R, T>(
        &self,
        select: &str,
        owner: Option<&str>,
        size: usize,
        token: &str,
    ) -> Result<Page<T>>
    where
        R: ListedRow + for<'r> FromRow<'r, AnyRow> + Send + Unpin,
        T: TryFrom<R, Error = ServiceError>,
    {
        let select = format!("{select} ORDER BY seq DESC LIMIT $4");
        let (mut rows, mut bytes, mut before) = (Vec::<R>::new(), 0, parse_token(token)?);
        loop {
            // Rows are read in small batches, because 1000 large rows would take gigabytes. One
            // more row than the page needs is read to learn whether there is a next page.
            let wanted = (size + 1 - rows.len()).min(ROWS_AT_A_TIME);
            let found: Vec<R> = sqlx::query_as(AssertSqlSafe(select.clone()))
                .bind(before)
                .bind(i64::from(owner.is_some()))
                .bind(owner.unwrap_or_default())
                .bind(wanted as i64)
                .fetch_all(&self.readers)
                .await?;
            let is_end = found.len() < wanted;
            for row in found {
                bytes += row.bytes();
                if let Some(last) = rows
                    .last()
                    .filter(|_| rows.len() >= size || bytes > PAGE_BYTES)
                {
                    let next_page_token = R::seq(last).to_string();
                    return Ok(Page {
                        items: readable(rows),
                        next_page_token,
                    });
                }
                before = R::seq(&row);
                rows.push(row);
            }
            if is_end {
                return Ok(Page {
                    items: readable(rows),
                    next_page_token: String::new(),
                });
            }
        }
    }

    /// Checks that the database answers.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if it does not.
    pub async fn ping(&self) -> Result<()> {
        sqlx::query("SELECT 1").execute(&self.readers).await?;
        Ok(())
    }

    /// Checks that the database answers within `limit`, which may be shorter than the time limits
    /// of calls.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if it does not.
    pub async fn ping_within(&self, limit: Duration) -> Result<()> {
        let answer = tokio::time::timeout(limit, self.ping()).await;
        answer.unwrap_or_else(|_| {
            Err(ServiceError::Unavailable {
                reason: Reason::StoreUnavailable,
                message: format!("the database did not answer within {limit:?}"),
                retry_after: Duration::from_secs(1),
            })
        })
    }
}

/// Configures a new connection.
async fn configure(dialect: Dialect, connection: &mut AnyConnection) -> sqlx::Result<()> {
    if dialect == Dialect::Sqlite {
        for pragma in [
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "busy_timeout = 10000",
        ] {
            sqlx::query(AssertSqlSafe(format!("PRAGMA {pragma}")))
                .execute(&mut *connection)
                .await?;
        }
    } else {
        // Limits how long a frozen replica can hold locks, and how long others wait for a lock.
        for setting in [
            "idle_in_transaction_session_timeout = '10s'",
            "lock_timeout = '5s'",
            "statement_timeout = '60s'",
        ] {
            sqlx::query(AssertSqlSafe(format!("SET {setting}")))
                .execute(&mut *connection)
                .await?;
        }
        // Commits must reach the disk, whatever the default of the database is. A stricter setting
        // is left unchanged.
        let durable = "SELECT set_config('synchronous_commit', 'on', false) WHERE \
                       current_setting('synchronous_commit') = 'off'";
        sqlx::query(durable).execute(&mut *connection).await?;
    }
    Ok(())
}

/// Returns true if a connection has no open transaction; others are closed. On a full disk SQLite
/// rolls back by itself. The rollback of sqlx then fails, and sqlx believes that the transaction is
/// still open. Later transactions would be savepoints inside it, and their commits could be lost.
async fn is_clean(dialect: Dialect, connection: &mut AnyConnection) -> sqlx::Result<bool> {
    if dialect == Dialect::Sqlite {
        // The answer arrives only after a pending rollback is done.
        connection.ping().await?;
    }
    Ok(!connection.is_in_transaction())
}

/// Returns why a database cannot be opened. The library's own text says "error returned from
/// database", and ends with a line number of PostgreSQL's source.
pub(super) fn refusal(e: &sqlx::Error) -> String {
    let Some(refused) = e.as_database_error() else {
        return e.to_string();
    };
    match refused.code().as_deref() {
        Some(NO_SUCH_DATABASE) => format!("{}: create it, or correct its name", refused.message()),
        _ => refused.message().to_owned(),
    }
}

/// Returns the number of the newest migration.
fn newest(migrations: &Migrator) -> i64 {
    migrations.iter().map(|m| m.version).max().unwrap_or(0)
}

/// Checks that this version may use a database, in PostgreSQL or in SQLite.
///
/// # Errors
/// `FailedPrecondition` if not (`SCHEMA_TOO_NEW`, `DATABASE_MOVED`); `Unavailable` or `Internal` if
/// it fails.
pub(super) async fn check_version(connection: &mut AnyConnection, is_postgres: bool) -> Result<()> {
    let dialect = match is_postgres {
        true => Dialect::Postgres,
        false => Dialect::Sqlite,
    };
    let known = newest(&dialect.migrations());
    schema_version::check(connection, dialect.count_tables(), known).await?;
    match dialect {
        Dialect::Sqlite => moved::check(connection, dialect.count_tables()).await,
        Dialect::Postgres => Ok(()),
    }
}

/// Sets the limits of a connection that migrates. A migration may take longer than any statement of
/// the server, and must wait for another replica that migrates.
async fn set_migration_limits(
    dialect: Dialect,
    connection: &mut AnyConnection,
) -> sqlx::Result<()> {
    if dialect == Dialect::Postgres {
        for setting in [
            // Otherwise each start logs that the table of the migrations exists already.
            "client_min_messages = 'warning'",
            "idle_in_transaction_session_timeout = 0",
            "lock_timeout = '60s'",
            "statement_timeout = 0",
        ] {
            sqlx::query(AssertSqlSafe(format!("SET {setting}")))
                .execute(&mut *connection)
                .await?;
        }
    }
    Ok(())
}

/// Returns the SQLite URL of a file that is opened in a `mode`: `ro`, `rw`, or `rwc`, which creates
/// it. All bytes but letters, digits, `/`, `.`, `-` and `_` are escaped.
pub(super) fn sqlite_url(path: &Path, mode: &str) -> String {
    use std::os::unix::ffi::OsStrExt;
    let escape = |b: &u8| match b {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => {
            char::from(*b).to_string()
        }
        other => format!("%{other:02X}"),
    };
    let escaped: String = path.as_os_str().as_bytes().iter().map(escape).collect();
    format!("sqlite://{escaped}?mode={mode}")
}

fn parse_token(token: &str) -> Result<i64> {
    match token {
        "" => Ok(i64::MAX),
        t => t.parse().map_err(|_| {
            ServiceError::invalid(
                "page_token",
                format!(
                    "{} is not a page token of this list: start again without it",
                    quoted(t)
                ),
            )
        }),
    }
}

/// Converts rows to records. Rows that this version cannot read are logged and skipped, so that one
/// row of another version does not block the whole list.
fn readable<R, T: TryFrom<R, Error = ServiceError>>(rows: Vec<R>) -> Vec<T> {
    let read = |row| {
        T::try_from(row).inspect_err(|e| tracing::error!(error = %e, "a stored record is left out"))
    };
    rows.into_iter().filter_map(|row| read(row).ok()).collect()
}
