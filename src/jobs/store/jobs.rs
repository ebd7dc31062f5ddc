//! Jobs and their events. A change of a job and the events that tell of it are one transaction.

use sqlx::{Sqlite, Transaction};

use super::rows::{EventRow, JobRow, to_json};
use super::{Page, Store, now, page, parse_token};
use crate::domain::job::{Event, EventKind, Job, JobState};
use crate::jobs::error::{Result, ServiceError};

impl Store {
    /// Adds a job with its first event, or returns the job that `request_id` already made from the same body.
    pub async fn insert_job(&self, job: &Job, request_id: Option<&str>, request_hash: &str) -> Result<Job> {
        let mut tx = self.writer.begin().await?;
        if let Some(id) = request_id {
            let earlier: Option<JobRow> =
                sqlx::query_as("SELECT * FROM jobs WHERE request_id = ?").bind(id).fetch_optional(&mut *tx).await?;
            if let Some(earlier) = earlier {
                if earlier.request_hash.as_deref() != Some(request_hash) {
                    let message = format!("request_id {id:?} made trainingJobs/{} from another request: use a new request_id", earlier.id);
                    return Err(ServiceError::AlreadyExists { message });
                }
                return earlier.try_into();
            }
        }
        sqlx::query(
            "INSERT INTO jobs
                 (id, version, state, request, progress, latest_metrics, skipped_rows, create_time, request_id, request_hash, priority)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&job.id)
        .bind(job.version)
        .bind(job.state.name())
        .bind(to_json(&job.request)?)
        .bind(to_json(&job.progress)?)
        .bind(to_json(&job.latest_metrics)?)
        .bind(to_json(&job.skipped_rows)?)
        .bind(job.create_time)
        .bind(request_id)
        .bind(request_hash)
        .bind(job.request.priority)
        .execute(&mut *tx)
        .await?;
        let created = EventKind::StateChange { from: None, to: job.state, reason: "created".into() };
        self.append(&mut tx, &job.id, &created).await?;
        tx.commit().await?;
        Ok(job.clone())
    }

    /// One job.
    pub async fn job(&self, id: &str) -> Result<Job> {
        let row: Option<JobRow> = sqlx::query_as("SELECT * FROM jobs WHERE id = ?").bind(id).fetch_optional(&self.readers).await?;
        row.ok_or_else(|| missing(id))?.try_into()
    }

    /// Jobs in one of `states` (all when empty), newest first.
    pub async fn jobs(&self, states: &[JobState], page_size: usize, page_token: &str) -> Result<Page<Job>> {
        let wanted: Vec<&str> = if states.is_empty() { &JobState::ALL[..] } else { states }.iter().map(|s| s.name()).collect();
        let rows: Vec<JobRow> =
            sqlx::query_as("SELECT * FROM jobs WHERE state IN (SELECT value FROM json_each(?)) AND seq < ? ORDER BY seq DESC LIMIT ?")
                .bind(to_json(&wanted)?)
                .bind(parse_token(page_token)?)
                .bind(page_size as i64 + 1)
                .fetch_all(&self.readers)
                .await?;
        page(rows, page_size, |r| r.seq)
    }

    /// Every job that is not in a final state, oldest first.
    pub async fn unfinished_jobs(&self) -> Result<Vec<Job>> {
        let states: Vec<&str> = JobState::ALL.iter().filter(|s| !s.is_final()).map(|s| s.name()).collect();
        let rows: Vec<JobRow> = sqlx::query_as("SELECT * FROM jobs WHERE state IN (SELECT value FROM json_each(?)) ORDER BY seq")
            .bind(to_json(&states)?)
            .fetch_all(&self.readers)
            .await?;
        rows.into_iter().map(Job::try_from).collect()
    }

    /// The queued job whose turn it is: the oldest of the highest priority.
    pub async fn next_queued(&self) -> Result<Option<Job>> {
        let turn = "SELECT * FROM jobs WHERE state = 'queued' ORDER BY priority DESC, seq LIMIT 1";
        let row: Option<JobRow> = sqlx::query_as(turn).fetch_optional(&self.readers).await?;
        row.map(Job::try_from).transpose()
    }

    /// Changes a job and appends the events that `change` returns, in one transaction. Returns the job and its newest sequence.
    ///
    /// # Errors
    /// Those of `change`; `FailedPrecondition` for an illegal state transition.
    pub async fn change_job(&self, id: &str, change: impl FnOnce(&mut Job) -> Result<Vec<EventKind>> + Send) -> Result<(Job, u64)> {
        let mut tx = self.writer.begin().await?;
        let row: Option<JobRow> = sqlx::query_as("SELECT * FROM jobs WHERE id = ?").bind(id).fetch_optional(&mut *tx).await?;
        let mut job: Job = row.ok_or_else(|| missing(id))?.try_into()?;
        let before = job.state;
        let events = change(&mut job)?;
        if job.state != before && !before.may_become(job.state) {
            let message = format!("trainingJobs/{id} is {}: it cannot become {}", before.name(), job.state.name());
            return Err(ServiceError::FailedPrecondition { reason: "ILLEGAL_TRANSITION", message });
        }
        job.version += 1;
        if job.state.is_final() && job.end_time.is_none() {
            job.end_time = Some(now());
        }
        sqlx::query(
            "UPDATE jobs SET version = ?, state = ?, request = ?, priority = ?, error = ?, progress = ?, latest_metrics = ?, skipped_rows = ?,
                 start_time = ?, end_time = ?
             WHERE id = ?",
        )
        .bind(job.version)
        .bind(job.state.name())
        .bind(to_json(&job.request)?)
        .bind(job.request.priority)
        .bind(job.error.as_ref().map(to_json).transpose()?)
        .bind(to_json(&job.progress)?)
        .bind(to_json(&job.latest_metrics)?)
        .bind(to_json(&job.skipped_rows)?)
        .bind(job.start_time)
        .bind(job.end_time)
        .bind(id)
        .execute(&mut *tx)
        .await?;
        let mut newest = 0;
        for event in &events {
            newest = self.append(&mut tx, id, event).await?;
        }
        tx.commit().await?;
        Ok((job, newest))
    }

    /// Removes a job with its events and checkpoints.
    pub async fn delete_job(&self, id: &str) -> Result<()> {
        sqlx::query("DELETE FROM jobs WHERE id = ?").bind(id).execute(&self.writer).await?;
        Ok(())
    }

    /// Events after `after`, in order, at most `limit`.
    ///
    /// # Errors
    /// `OutOfRange` when the next one is not kept any more.
    pub async fn events(&self, job: &str, after: u64, limit: usize) -> Result<Vec<Event>> {
        let rows: Vec<EventRow> =
            sqlx::query_as("SELECT sequence, time, body FROM events WHERE job = ? AND sequence > ? ORDER BY sequence LIMIT ?")
                .bind(job)
                .bind(after.min(i64::MAX as u64) as i64)
                .bind(limit as i64)
                .fetch_all(&self.readers)
                .await?;
        if let Some(oldest) = rows.first().map(|r| r.sequence as u64).filter(|first| *first > after.saturating_add(1)) {
            let message = format!(
                "after_sequence is {after}, the oldest event of trainingJobs/{job} that is kept is {oldest}: the ones between are gone, go on after {}",
                oldest - 1
            );
            return Err(ServiceError::OutOfRange { message });
        }
        rows.into_iter().map(Event::try_from).collect()
    }

    /// The newest sequence of a job.
    pub async fn newest_sequence(&self, job: &str) -> Result<u64> {
        let newest: Option<i64> =
            sqlx::query_scalar("SELECT MAX(sequence) FROM events WHERE job = ?").bind(job).fetch_one(&self.readers).await?;
        Ok(newest.unwrap_or(0) as u64)
    }

    /// Appends an event, forgets the ones that it pushes past the limit, and returns its sequence.
    pub(super) async fn append(&self, tx: &mut Transaction<'_, Sqlite>, job: &str, event: &EventKind) -> Result<u64> {
        let sequence: i64 = sqlx::query_scalar(
            "INSERT INTO events (job, sequence, time, body)
             VALUES (?1, (SELECT COALESCE(MAX(sequence), 0) + 1 FROM events WHERE job = ?1), ?2, ?3) RETURNING sequence",
        )
        .bind(job)
        .bind(now())
        .bind(to_json(event)?)
        .fetch_one(&mut **tx)
        .await?;
        sqlx::query("DELETE FROM events WHERE job = ? AND sequence <= ?")
            .bind(job)
            .bind(sequence.saturating_sub(self.events_kept))
            .execute(&mut **tx)
            .await?;
        Ok(sequence as u64)
    }
}

fn missing(id: &str) -> ServiceError {
    ServiceError::not_found("job", format!("trainingJobs/{id}"))
}
