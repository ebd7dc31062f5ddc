//! Jobs, events, checkpoints and datasets in SQLite. What a call acknowledges is on disk: WAL with `synchronous = FULL`.

mod jobs;
mod rows;

use std::path::Path;
use std::time::Duration;

use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

use self::rows::{CheckpointRow, DatasetRow, to_json};
use super::error::{Result, ServiceError};
use crate::domain::dataset::Dataset;
use crate::domain::job::{Checkpoint, EventKind, Millis};

/// Reads that may run side by side.
const READERS: u32 = 4;

/// A page of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    /// The items, newest first.
    pub items: Vec<T>,
    /// Empty on the last page.
    pub next_page_token: String,
}

/// The database.
#[derive(Clone, Debug)]
pub struct Store {
    /// One connection: writes are serialised here and never meet `SQLITE_BUSY`.
    writer: SqlitePool,
    readers: SqlitePool,
    /// Events kept of a job, the newest.
    events_kept: i64,
}

/// The time, in milliseconds since 1970.
pub fn now() -> Millis {
    jiff::Timestamp::now().as_millisecond()
}

impl Store {
    /// Opens or creates `<data_dir>/bradley.db` and brings its schema up to date. Of each job the newest `events_kept` events are kept.
    pub async fn open(data_dir: &Path, events_kept: u64) -> Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(data_dir.join("bradley.db"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let pool = |n: u32| SqlitePoolOptions::new().max_connections(n).acquire_timeout(Duration::from_secs(30));
        let writer = pool(1).connect_with(options.clone()).await?;
        sqlx::migrate!("src/jobs/migrations")
            .run(&writer)
            .await
            .map_err(|e| ServiceError::internal(format!("the schema of {} cannot be brought up to date: {e}", data_dir.display())))?;
        Ok(Store { writer, readers: pool(READERS).connect_with(options).await?, events_kept: events_kept.clamp(1, i64::MAX as u64) as i64 })
    }

    /// Closes every connection; the WAL is folded into the database.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    /// Whether the store answers.
    pub async fn ping(&self) -> Result<()> {
        sqlx::query("SELECT 1").execute(&self.readers).await?;
        Ok(())
    }

    // ---- checkpoints

    /// Adds or replaces a checkpoint and tells of it, in one transaction; a best one takes the mark from the others. Returns the event's sequence.
    pub async fn add_checkpoint(&self, c: &Checkpoint) -> Result<u64> {
        let mut tx = self.writer.begin().await?;
        if c.best {
            sqlx::query("UPDATE checkpoints SET best = 0 WHERE job = ?").bind(&c.job).execute(&mut *tx).await?;
        }
        sqlx::query(
            "INSERT OR REPLACE INTO checkpoints (job, step, best, adapter, size_bytes, metrics, create_time) VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&c.job)
        .bind(c.step as i64)
        .bind(c.best)
        .bind(c.adapter)
        .bind(c.size_bytes as i64)
        .bind(to_json(&c.metrics)?)
        .bind(c.create_time)
        .execute(&mut *tx)
        .await?;
        let sequence = self.append(&mut tx, &c.job, &EventKind::CheckpointCreated { step: c.step, best: c.best }).await?;
        tx.commit().await?;
        Ok(sequence)
    }

    /// A job's checkpoints, oldest first.
    pub async fn checkpoints(&self, job: &str) -> Result<Vec<Checkpoint>> {
        let rows: Vec<CheckpointRow> =
            sqlx::query_as("SELECT * FROM checkpoints WHERE job = ? ORDER BY step").bind(job).fetch_all(&self.readers).await?;
        rows.into_iter().map(Checkpoint::try_from).collect()
    }

    /// Forgets a checkpoint.
    pub async fn delete_checkpoint(&self, job: &str, step: u64) -> Result<()> {
        sqlx::query("DELETE FROM checkpoints WHERE job = ? AND step = ?").bind(job).bind(step as i64).execute(&self.writer).await?;
        Ok(())
    }

    // ---- datasets

    /// Adds a dataset.
    pub async fn insert_dataset(&self, d: &Dataset) -> Result<()> {
        sqlx::query(
            "INSERT INTO datasets (id, display_name, format, size_bytes, content_hash, report, create_time) VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&d.id)
        .bind(&d.display_name)
        .bind(to_json(&d.format)?)
        .bind(d.size_bytes as i64)
        .bind(&d.content_hash)
        .bind(to_json(&d.report)?)
        .bind(d.create_time)
        .execute(&self.writer)
        .await?;
        Ok(())
    }

    /// One dataset.
    pub async fn dataset(&self, id: &str) -> Result<Dataset> {
        let row: Option<DatasetRow> = sqlx::query_as("SELECT * FROM datasets WHERE id = ?").bind(id).fetch_optional(&self.readers).await?;
        row.ok_or_else(|| ServiceError::not_found("dataset", format!("datasets/{id}")))?.try_into()
    }

    /// Datasets, newest first.
    pub async fn datasets(&self, page_size: usize, page_token: &str) -> Result<Page<Dataset>> {
        let before = parse_token(page_token)?;
        let rows: Vec<DatasetRow> = sqlx::query_as("SELECT * FROM datasets WHERE seq < ? ORDER BY seq DESC LIMIT ?")
            .bind(before)
            .bind(page_size as i64 + 1)
            .fetch_all(&self.readers)
            .await?;
        page(rows, page_size, |r| r.seq)
    }

    /// Forgets a dataset.
    pub async fn delete_dataset(&self, id: &str) -> Result<()> {
        sqlx::query("DELETE FROM datasets WHERE id = ?").bind(id).execute(&self.writer).await?;
        Ok(())
    }
}

fn parse_token(token: &str) -> Result<i64> {
    match token {
        "" => Ok(i64::MAX),
        t => t
            .parse()
            .map_err(|_| ServiceError::invalid("page_token", format!("{t:?} was not given out by this list: start again without it"))),
    }
}

/// Cuts the one row too many that says whether there is a next page.
fn page<R, T: TryFrom<R, Error = ServiceError>>(mut rows: Vec<R>, size: usize, seq: impl Fn(&R) -> i64) -> Result<Page<T>> {
    let more = rows.len() > size;
    rows.truncate(size);
    let next_page_token = if more { rows.last().map(|r| seq(r).to_string()).unwrap_or_default() } else { String::new() };
    let items = rows.into_iter().map(T::try_from).collect::<Result<_>>()?;
    Ok(Page { items, next_page_token })
}
