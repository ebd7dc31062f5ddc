//! Rows as the database stores them, and their conversion to records.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Dialect, ListedRow};
use crate::domain::dataset::Dataset;
use crate::domain::job::{Checkpoint, Event, Finite, Job, JobState, Millis};
use crate::domain::reason::Reason;
use crate::service::error::{Result, ServiceError};

pub(super) fn to_json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|e| ServiceError::internal(format!("a record cannot be stored: {e}")))
}

fn from_json<T: DeserializeOwned>(text: &str, what: &str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|e| ServiceError::internal(format!("the stored {what} cannot be read: {e}")))
}

/// Columns of a [`JobRow`]. They are selected by name, so that this version still works after a
/// newer one has added columns.
pub(super) const JOB: &str = "seq, id, version, state, request, error, progress, latest_metrics, \
                              skipped_rows, create_time, start_time, end_time, request_hash, turn, \
                              owner, lease_token, lease_owner, lease_until, \
                              lease_writes, reclaims, reclaim_step, trace, \
                              (SELECT time FROM events WHERE events.job = jobs.id \
                              ORDER BY sequence DESC LIMIT 1) AS last_event_time";
/// Columns of a [`CheckpointRow`].
pub(super) const CHECKPOINT: &str =
    "job, step, best, adapter, size_bytes, metrics, create_time, digest";
/// Columns of a [`DatasetRow`] without its report.
const DATASET: &str = "seq, id, display_name, format, size_bytes, content_hash, create_time, owner";
/// Columns of a [`TokenRow`](super::tokens::TokenRow).
pub(super) const TOKEN: &str = "id, owner, roles, hash, create_time, expire_time";

/// Returns the columns of a [`DatasetRow`].
pub(super) fn dataset() -> String {
    format!("{DATASET}, report")
}

/// Returns the columns of a [`DatasetRow`] for lists, without the report's findings, which may be
/// long.
pub(super) fn dataset_in_list(dialect: Dialect) -> String {
    let report = match dialect {
        Dialect::Sqlite => "json_remove(report, '$.issues')",
        // JSONB cannot contain NUL characters, which may occur in row ids in reports of older
        // versions.
        Dialect::Postgres => {
            r"CASE WHEN POSITION('\u0000' IN report) > 0 THEN report
                   ELSE CAST(CAST(report AS JSONB) - 'issues' AS TEXT) END"
        }
    };
    format!("{DATASET}, {report} AS report")
}

#[derive(sqlx::FromRow)]
pub(super) struct JobRow {
    pub seq: i64,
    pub id: String,
    pub version: i64,
    pub state: String,
    pub request: String,
    pub error: Option<String>,
    pub progress: String,
    pub latest_metrics: String,
    pub skipped_rows: String,
    pub create_time: Millis,
    pub start_time: Option<Millis>,
    pub end_time: Option<Millis>,
    pub request_hash: Option<String>,
    pub turn: Millis,
    pub owner: String,
    pub lease_token: i64,
    pub lease_owner: Option<String>,
    pub lease_until: Millis,
    pub lease_writes: i64,
    pub reclaims: i64,
    pub reclaim_step: i64,
    pub trace: Option<String>,
    pub last_event_time: Option<Millis>,
}

impl ListedRow for JobRow {
    fn seq(&self) -> i64 {
        self.seq
    }

    fn bytes(&self) -> usize {
        let error = self.error.as_ref().map_or(0, String::len);
        self.request.len() + self.skipped_rows.len() + self.latest_metrics.len() + error
    }
}

impl TryFrom<JobRow> for Job {
    type Error = ServiceError;

    /// # Errors
    /// `FailedPrecondition` (`JOB_UNREADABLE`) if another version of the server wrote the row.
    fn try_from(r: JobRow) -> Result<Job> {
        let unreadable = |what: &str, why: &dyn std::fmt::Display| {
            let message = format!(
                "trainingJobs/{} cannot be read by this version of the server ({what}: {why}): use \
                 the version that wrote it",
                r.id
            );
            ServiceError::FailedPrecondition {
                reason: Reason::JobUnreadable,
                message,
            }
        };
        fn parsed<T: DeserializeOwned>(
            text: &str,
            what: &str,
            unreadable: &impl Fn(&str, &dyn std::fmt::Display) -> ServiceError,
        ) -> Result<T> {
            serde_json::from_str(text).map_err(|e| unreadable(what, &e))
        }
        Ok(Job {
            state: JobState::parse(&r.state).ok_or_else(|| unreadable("its state", &r.state))?,
            request: parsed(&r.request, "its request", &unreadable)?,
            error: r
                .error
                .as_ref()
                .map(|e| parsed(e, "its error", &unreadable))
                .transpose()?,
            progress: parsed(&r.progress, "its progress", &unreadable)?,
            latest_metrics: parsed::<Finite>(&r.latest_metrics, "its metrics", &unreadable)?.0,
            skipped_rows: parsed(&r.skipped_rows, "its skipped rows", &unreadable)?,
            id: r.id,
            version: r.version,
            create_time: r.create_time,
            start_time: r.start_time,
            end_time: r.end_time,
            queued_since: r.turn,
            owner: r.owner,
            trace: r.trace,
            worker: None,
        })
    }
}

/// A job for a client, with the holder of its lease and the lease's end, and with the time of its
/// newest event.
pub(super) struct JobAndHolder {
    pub job: Job,
    pub holder: Option<(String, Millis)>,
    pub last_event_time: Option<Millis>,
}

impl TryFrom<JobRow> for JobAndHolder {
    type Error = ServiceError;

    fn try_from(mut row: JobRow) -> Result<JobAndHolder> {
        let holder = row.lease_owner.take().zip(Some(row.lease_until));
        let last_event_time = row.last_event_time;
        let job = Job::try_from(row)?;
        Ok(JobAndHolder {
            job,
            holder,
            last_event_time,
        })
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct EventRow {
    pub sequence: i64,
    pub time: Millis,
    pub body: String,
}

impl TryFrom<EventRow> for Event {
    type Error = ServiceError;

    fn try_from(r: EventRow) -> Result<Event> {
        Ok(Event {
            sequence: r.sequence as u64,
            time: r.time,
            kind: from_json(&r.body, "event")?,
        })
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct CheckpointRow {
    pub job: String,
    pub step: i64,
    pub best: i64,
    pub adapter: i64,
    pub size_bytes: i64,
    pub metrics: String,
    pub create_time: Millis,
    pub digest: String,
}

impl TryFrom<CheckpointRow> for Checkpoint {
    type Error = ServiceError;

    fn try_from(r: CheckpointRow) -> Result<Checkpoint> {
        Ok(Checkpoint {
            metrics: from_json::<Finite>(&r.metrics, "checkpoint metrics")?.0,
            job: r.job,
            step: r.step as u64,
            best: r.best != 0,
            adapter: r.adapter != 0,
            size_bytes: r.size_bytes as u64,
            create_time: r.create_time,
            digest: r.digest,
        })
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct DatasetRow {
    pub seq: i64,
    pub id: String,
    pub display_name: String,
    pub format: String,
    pub size_bytes: i64,
    pub content_hash: String,
    pub report: String,
    pub create_time: Millis,
    pub owner: String,
}

impl ListedRow for DatasetRow {
    fn seq(&self) -> i64 {
        self.seq
    }

    fn bytes(&self) -> usize {
        self.display_name.len() + self.report.len()
    }
}

impl TryFrom<DatasetRow> for Dataset {
    type Error = ServiceError;

    fn try_from(r: DatasetRow) -> Result<Dataset> {
        Ok(Dataset {
            format: from_json(&r.format, "dataset format")?,
            report: from_json(&r.report, "validation report")?,
            id: r.id,
            display_name: r.display_name,
            size_bytes: r.size_bytes as u64,
            content_hash: r.content_hash,
            create_time: r.create_time,
            owner: r.owner,
        })
    }
}
