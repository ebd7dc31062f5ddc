//! Jobs, events, checkpoints and datasets in SQLite or PostgreSQL. What a call acknowledges is on
//! disk.
//!
//! The SQL is written once, in what both databases understand; `Dialect` holds the few places where
//! they differ. All columns are BIGINT and TEXT.

mod checkpoints;
mod datasets;
pub mod jobs;
pub mod leases;
pub mod listen;
pub mod properties;
mod rows;
pub(super) mod stale;
pub mod tokens;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use sqlx::any::{AnyConnectOptions, AnyPoolOptions, AnyRow};
use sqlx::{AnyConnection, AnyPool, AssertSqlSafe, Connection as _, FromRow};

use super::error::{Result, ServiceError};
use crate::domain::job::Millis;
use crate::domain::violation::quoted;

/// Connections of a SQLite store that read side by side.
const READERS: u32 = 4;
/// Connections to PostgreSQL, for reads and for writes each.
const CONNECTIONS: u32 = 8;
/// How long a call waits for a connection: with a database that does not answer, callers hear so in
/// this time.
const ACQUIRE: Duration = Duration::from_secs(5);

/// Bytes of text in the rows of a page, which ends before the row that would exceed them: most
/// clients take answers of 4 MiB at most.
const PAGE_BYTES: usize = 2 << 20;
/// Rows of a page that are read from the database at a time.
const ROWS_AT_A_TIME: usize = 32;

/// The condition of a list's page.
const OF_PAGE: &str = "seq < $1 AND ($2 = 0 OR owner = $3)";

/// A row that lists give out.
trait ListedRow {
    /// Its place in the list.
    fn seq(&self) -> i64;
    /// Bytes of its text.
    fn bytes(&self) -> usize;
}

/// A page of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    /// The items, newest first.
    pub items: Vec<T>,
    /// Empty on the last page.
    pub next_page_token: String,
}

/// Where the two databases differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    /// The database's own clock, in milliseconds since 1970: replicas need not agree on the time.
    fn now(self) -> &'static str {
        match self {
            Dialect::Sqlite => "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
            Dialect::Postgres => "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)",
        }
    }

    /// Ends a SELECT of a row that this transaction will change. SQLite has one writer.
    fn for_update(self) -> &'static str {
        match self {
            Dialect::Sqlite => "",
            Dialect::Postgres => " FOR UPDATE",
        }
    }

    /// The same, passing over rows that another transaction holds.
    fn skip_locked(self) -> &'static str {
        match self {
            Dialect::Sqlite => "",
            Dialect::Postgres => " FOR UPDATE SKIP LOCKED",
        }
    }

    /// Ends a SELECT of a row that must still be there when this transaction ends.
    fn for_share(self) -> &'static str {
        match self {
            Dialect::Sqlite => "",
            Dialect::Postgres => " FOR SHARE",
        }
    }
}

/// How the store is opened.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// `postgres://…`; `None` is SQLite in the data directory.
    pub database_url: Option<String>,
    /// Events kept of a job, the newest.
    pub events_kept: u64,
    /// How long a worker may be silent before its job goes to another.
    pub lease: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions { database_url: None, events_kept: 1_000_000, lease: Duration::from_secs(30) }
    }
}

/// The database.
#[derive(Clone)]
pub struct Store {
    dialect: Dialect,
    url: String,
    /// With SQLite one connection: writes are serialised here and never meet `SQLITE_BUSY`.
    writer: AnyPool,
    readers: AnyPool,
    events_kept: i64,
    lease: Duration,
    /// This process among the replicas.
    replica: String,
}

/// The time, in milliseconds since 1970.
pub fn now() -> Millis {
    jiff::Timestamp::now().as_millisecond()
}

impl Store {
    /// Opens the database, or creates `<data_dir>/bradley.db`, and brings its schema up to date.
    pub async fn open(data_dir: &Path, options: &StoreOptions) -> Result<Self> {
        sqlx::any::install_default_drivers();
        let (dialect, url) = match &options.database_url {
            Some(url) => (Dialect::Postgres, url.clone()),
            None => (Dialect::Sqlite, sqlite_url(&data_dir.join("bradley.db"))),
        };
        let connect = AnyConnectOptions::from_str(&url)
            .map_err(|e| ServiceError::internal(format!("database_url: {e}")))?;
        let pool = |n: u32| {
            AnyPoolOptions::new()
                .max_connections(n)
                .acquire_timeout(ACQUIRE)
                .after_connect(move |connection, _| Box::pin(prepare(dialect, connection)))
                .before_acquire(|_, about| {
                    let usable = stale::is_fresh(about.age);
                    Box::pin(async move { Ok(usable) })
                })
                .after_release(move |connection, _| Box::pin(is_clean(dialect, connection)))
        };
        let (writers, readers) = match dialect {
            Dialect::Sqlite => (1, READERS),
            Dialect::Postgres => (CONNECTIONS, CONNECTIONS),
        };
        let unreachable = |e| ServiceError::internal(format!("the database cannot be opened: {e}"));
        let writer = pool(writers).connect_with(connect.clone()).await.map_err(unreachable)?;
        let mut migrations = match dialect {
            Dialect::Sqlite => sqlx::migrate!("src/service/migrations/sqlite"),
            Dialect::Postgres => sqlx::migrate!("src/service/migrations/postgres"),
        };
        // Migrations only add: a newer version may have used this database, and an older one must
        // still start after a rollback.
        migrations.set_ignore_missing(true);
        migrations.run(&writer).await.map_err(|e| {
            ServiceError::internal(format!(
                "the database's schema cannot be brought up to date: {e}"
            ))
        })?;
        Ok(Store {
            dialect,
            url,
            writer,
            readers: pool(readers).connect_with(connect).await.map_err(unreachable)?,
            events_kept: options.events_kept.clamp(1, i64::MAX as u64) as i64,
            lease: options.lease,
            replica: uuid::Uuid::now_v7().to_string(),
        })
    }

    /// Whether other replicas may use the same database.
    pub fn is_shared(&self) -> bool {
        self.dialect == Dialect::Postgres
    }

    /// Closes every connection; SQLite folds its WAL into the database.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    /// A page of what `select` finds, which has [`OF_PAGE`] among its conditions: rows of `owner`,
    /// or of everyone when `None`, newest first. It has `size` rows at most, and fewer where their
    /// text exceeds [`PAGE_BYTES`]. A row that alone exceeds them is a page.
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
            // A few at a time: 1000 large rows would take gigabytes. One row too many says that
            // there is a next page.
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
                if let Some(last) = rows.last().filter(|_| rows.len() >= size || bytes > PAGE_BYTES)
                {
                    let next_page_token = R::seq(last).to_string();
                    return Ok(Page { items: readable(rows), next_page_token });
                }
                before = R::seq(&row);
                rows.push(row);
            }
            if is_end {
                return Ok(Page { items: readable(rows), next_page_token: String::new() });
            }
        }
    }

    /// Whether the store answers.
    pub async fn ping(&self) -> Result<()> {
        sqlx::query("SELECT 1").execute(&self.readers).await?;
        Ok(())
    }
}

/// Sets a new connection up.
async fn prepare(dialect: Dialect, connection: &mut AnyConnection) -> sqlx::Result<()> {
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
        // A replica that is frozen in a transaction must not hold its locks, and nobody waits long
        // for one.
        for setting in [
            "idle_in_transaction_session_timeout = '10s'",
            "lock_timeout = '5s'",
            "statement_timeout = '60s'",
        ] {
            sqlx::query(AssertSqlSafe(format!("SET {setting}"))).execute(&mut *connection).await?;
        }
        // What is acknowledged is on disk, whatever the database's default is; a stricter setting
        // stays.
        let durable = "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'";
        sqlx::query(durable).execute(&mut *connection).await?;
    }
    Ok(())
}

/// Whether a connection has no transaction left open. On a full disk SQLite rolls back by itself,
/// and sqlx, whose own rollback then fails, takes the transaction to be still open: later ones
/// would be savepoints inside it, and what they "commit" could be lost. Such a connection is
/// closed.
async fn is_clean(dialect: Dialect, connection: &mut AnyConnection) -> sqlx::Result<bool> {
    if dialect == Dialect::Sqlite {
        // A rollback on its way is done before this is answered.
        connection.ping().await?;
    }
    Ok(!connection.is_in_transaction())
}

/// A file's URL: everything but letters, digits, `/`, `.`, `-` and `_` is escaped.
fn sqlite_url(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let escape = |b: &u8| match b {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => {
            char::from(*b).to_string()
        }
        other => format!("%{other:02X}"),
    };
    let escaped: String = path.as_os_str().as_bytes().iter().map(escape).collect();
    format!("sqlite://{escaped}?mode=rwc")
}

fn parse_token(token: &str) -> Result<i64> {
    match token {
        "" => Ok(i64::MAX),
        t => t.parse().map_err(|_| {
            ServiceError::invalid(
                "page_token",
                format!("{} was not given out by this list: start again without it", quoted(t)),
            )
        }),
    }
}

/// The records that this version can read: one that another version wrote must not stand in the way
/// of all others.
fn readable<R, T: TryFrom<R, Error = ServiceError>>(rows: Vec<R>) -> Vec<T> {
    let read = |row| {
        T::try_from(row).inspect_err(|e| tracing::error!(error = %e, "a stored record is left out"))
    };
    rows.into_iter().filter_map(|row| read(row).ok()).collect()
}
