//! Jobs and their events. A change of a job and its events are stored in one transaction.

use std::collections::HashMap;

use sqlx::{Any, AssertSqlSafe, Transaction};

use super::rows::{EventRow, JOB, JobAndHolder, JobRow, to_json};
use super::{Dialect, PAGE_CONDITION, Page, Store, now, replica_name};
use crate::domain::job::{Evaluation, Event, EventKind, Finite, Job, JobState, JobWorker, Millis};
use crate::domain::names::{CheckpointRef, PolicyName};
use crate::domain::reason::Reason;
use crate::service::error::{Result, ServiceError};
use crate::service::in_use::DependentJobs;

/// Parameters of a job's creation.
#[derive(Clone, Copy, Debug)]
pub struct Creation<'a> {
    /// Client's id for the request, which makes a repeated request return the same job.
    pub request_id: Option<&'a str>,
    /// Hash of the request, to detect a `request_id` used for another request.
    pub request_hash: &'a str,
    /// Maximum number of unfinished jobs of the owner.
    pub quota: Option<u64>,
}

impl DependentJobs {
    fn add(&mut self, rows: Vec<JobRow>) {
        for row in rows {
            let request = row.request.clone();
            match Job::try_from(row) {
                Ok(job) => self.jobs.push(job),
                Err(_) => self.unreadable.push(request),
            }
        }
    }
}

/// A position in the list of expired jobs, which is ordered by expiry time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpiredPosition {
    time: Millis,
    seq: i64,
}

impl Default for ExpiredPosition {
    /// Returns the position before all expired jobs.
    fn default() -> Self {
        ExpiredPosition {
            time: Millis::MIN,
            seq: i64::MIN,
        }
    }
}

/// Returns the key of an owner's request id. Names of OIDC owners may have slashes; with these
/// escaped, the first slash ends the owner. Owners of other tokens have neither character.
fn request_key(owner: &str, id: &str) -> String {
    let owner = owner.replace('%', "%25").replace('/', "%2F");
    format!("{owner}/{id}")
}

/// Returns the job that an earlier call with the same `request_id` has created.
///
/// # Errors
/// `AlreadyExists` if that call had another request.
fn repeated(earlier: JobRow, creation: Creation<'_>) -> Result<Job> {
    if earlier.request_hash.as_deref() == Some(creation.request_hash) {
        return earlier.try_into();
    }
    let id = creation.request_id.unwrap_or_default();
    let message = format!(
        "request_id {id:?} was already used for trainingJobs/{} with a different request: use a \
         new request_id",
        earlier.id
    );
    Err(ServiceError::AlreadyExists { message })
}

impl Store {
    /// Adds a job with its first event. If the owner's `request_id` has already created a job from
    /// the same request, that job is returned instead.
    ///
    /// # Errors
    /// `AlreadyExists` if the `request_id` has created a job from another request;
    /// `ResourceExhausted` if the owner has the maximum number of unfinished jobs; `NotFound` if an
    /// input of the job does not exist.
    pub async fn insert_job(&self, job: &Job, creation: Creation<'_>) -> Result<Job> {
        let mut tx = self.writer.begin().await?;
        // Request ids are unique per owner.
        let key = creation.request_id.map(|id| request_key(&job.owner, id));
        if let Some(quota) = creation.quota {
            self.lock_owner(&mut tx, &job.owner).await?;
            if key.is_none() || self.job_of_request(&mut tx, &key).await?.is_none() {
                self.check_quota(&mut tx, &job.owner, quota).await?;
            }
        }
        self.lock_inputs(&mut tx, job).await?;
        let inserted: Option<i64> = sqlx::query_scalar(
            "INSERT INTO jobs (id, version, state, request, progress, latest_metrics, \
             skipped_rows, create_time, request_id, request_hash,
                 priority, turn, owner, trace)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) ON CONFLICT \
             (request_id) DO NOTHING RETURNING seq",
        )
        .bind(&job.id)
        .bind(job.version)
        .bind(job.state.name())
        .bind(to_json(&job.request)?)
        .bind(to_json(&job.progress)?)
        .bind(to_json(&Finite(job.latest_metrics.clone()))?)
        .bind(to_json(&job.skipped_rows)?)
        .bind(job.create_time)
        .bind(key.clone())
        .bind(creation.request_hash)
        .bind(i64::from(job.request.priority))
        .bind(job.queued_since)
        .bind(&job.owner)
        .bind(&job.trace)
        .fetch_optional(&mut *tx)
        .await?;
        if inserted.is_none() {
            let earlier = self
                .job_of_request(&mut tx, &key)
                .await?
                .ok_or_else(|| ServiceError::internal("a job could not be stored"))?;
            return repeated(earlier, creation);
        }
        let created = EventKind::StateChange {
            from: None,
            to: job.state,
            reason: "created".into(),
        };
        let sequence = self.append(&mut tx, &job.id, &created).await?;
        self.announce(&mut tx, job, sequence).await?;
        tx.commit().await?;
        Ok(job.clone())
    }

    /// Checks that the inputs of a job still exist, and locks them until the transaction ends.
    async fn lock_inputs(&self, tx: &mut Transaction<'_, Any>, job: &Job) -> Result<()> {
        let request = &job.request;
        let eval = match &request.evaluation {
            Evaluation::Dataset(id) => Some(id),
            _ => None,
        };
        for id in [Some(&request.dataset), eval].into_iter().flatten() {
            let select = format!(
                "SELECT seq FROM datasets WHERE id = $1{}",
                self.dialect.for_share()
            );
            let found = sqlx::query(AssertSqlSafe(select))
                .bind(id)
                .fetch_optional(&mut **tx)
                .await?;
            found.ok_or_else(|| ServiceError::not_found("dataset", format!("datasets/{id}")))?;
        }
        for name in [Some(&request.policy), request.reference.as_ref()]
            .into_iter()
            .flatten()
        {
            if let PolicyName::Checkpoint {
                job,
                which: CheckpointRef::Step(step),
            } = name
            {
                let select = format!(
                    "SELECT step FROM checkpoints WHERE job = $1 AND step = $2{}",
                    self.dialect.for_share()
                );
                let found = sqlx::query(AssertSqlSafe(select))
                    .bind(job)
                    .bind(*step as i64)
                    .fetch_optional(&mut **tx)
                    .await?;
                found.ok_or_else(|| ServiceError::not_found("checkpoint", name.to_string()))?;
            }
        }
        Ok(())
    }

    /// Returns true if the owner's `request_id` has created a job.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn has_created(&self, owner: &str, request_id: Option<&str>) -> Result<bool> {
        let Some(id) = request_id else {
            return Ok(false);
        };
        let count = "SELECT COUNT(*) FROM jobs WHERE request_id = $1";
        let made: i64 = sqlx::query_scalar(count)
            .bind(request_key(owner, id))
            .fetch_one(&self.readers)
            .await?;
        Ok(made > 0)
    }

    /// Returns the job that the owner's `request_id` has created from the same request; `None` if
    /// there is no `request_id`, or it has created no job.
    ///
    /// # Errors
    /// `AlreadyExists` if the `request_id` has created a job from another request.
    pub async fn created_before(&self, owner: &str, creation: Creation<'_>) -> Result<Option<Job>> {
        let Some(id) = creation.request_id else {
            return Ok(None);
        };
        let select = format!("SELECT {JOB} FROM jobs WHERE request_id = $1");
        let earlier: Option<JobRow> = sqlx::query_as(AssertSqlSafe(select))
            .bind(request_key(owner, id))
            .fetch_optional(&self.readers)
            .await?;
        earlier.map(|row| repeated(row, creation)).transpose()
    }

    async fn job_of_request(
        &self,
        tx: &mut Transaction<'_, Any>,
        key: &Option<String>,
    ) -> Result<Option<JobRow>> {
        let select = format!("SELECT {JOB} FROM jobs WHERE request_id = $1");
        Ok(sqlx::query_as(AssertSqlSafe(select))
            .bind(key.clone())
            .fetch_optional(&mut **tx)
            .await?)
    }

    /// Prevents other transactions from creating a job or a dataset of this owner until this one
    /// ends.
    pub(super) async fn lock_owner(
        &self,
        tx: &mut Transaction<'_, Any>,
        owner: &str,
    ) -> Result<()> {
        if self.dialect == Dialect::Postgres {
            let lock = "SELECT COUNT(*) FROM (SELECT pg_advisory_xact_lock(hashtextextended($1, \
                        0))) AS locked";
            sqlx::query(lock).bind(owner).execute(&mut **tx).await?;
        }
        Ok(())
    }

    async fn check_quota(
        &self,
        tx: &mut Transaction<'_, Any>,
        owner: &str,
        quota: u64,
    ) -> Result<()> {
        let count = format!(
            "SELECT COUNT(*) FROM jobs WHERE owner = $1 AND state IN ({})",
            state_list(|s| !s.is_final())
        );
        let unfinished: i64 = sqlx::query_scalar(AssertSqlSafe(count))
            .bind(owner)
            .fetch_one(&mut **tx)
            .await?;
        if unfinished as u64 >= quota {
            let message = format!(
                "you have {unfinished} unfinished jobs, at most {quota} are allowed: wait for one \
                 or cancel one"
            );
            return Err(ServiceError::ResourceExhausted {
                reason: Reason::TooManyJobs,
                message,
            });
        }
        Ok(())
    }

    /// Returns one job.
    ///
    /// # Errors
    /// `NotFound` if it does not exist; `FailedPrecondition` (`JOB_UNREADABLE`) if another version
    /// of the server wrote it.
    pub async fn job(&self, id: &str) -> Result<Job> {
        let select = format!("SELECT {JOB} FROM jobs WHERE id = $1");
        let row: Option<JobRow> = sqlx::query_as(AssertSqlSafe(select))
            .bind(id)
            .fetch_optional(&self.readers)
            .await?;
        let found: JobAndHolder = row.ok_or_else(|| missing(id))?.try_into()?;
        Ok(self.with_worker(found))
    }

    /// Adds to a job which process runs it, and when that last renewed its lease.
    fn with_worker(&self, found: JobAndHolder) -> Job {
        let JobAndHolder {
            mut job,
            holder,
            last_event_time,
        } = found;
        let lease = i64::try_from(self.lease.as_millis()).unwrap_or(i64::MAX);
        job.worker = holder.map(|(owner, until)| JobWorker {
            replica: replica_name(&owner).to_owned(),
            lease_renewed: until.saturating_sub(lease),
            last_event_time,
        });
        job
    }

    /// Returns a page of the jobs of `owner` (of everyone if `None`) in one of `states` (in any
    /// state if empty), newest first.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad page token.
    pub async fn jobs(
        &self,
        owner: Option<&str>,
        states: &[JobState],
        page_size: usize,
        page_token: &str,
    ) -> Result<Page<Job>> {
        let wanted = state_list(|s| states.is_empty() || states.contains(&s));
        let select =
            format!("SELECT {JOB} FROM jobs WHERE state IN ({wanted}) AND {PAGE_CONDITION}");
        let page = self
            .page::<JobRow, JobAndHolder>(&select, owner, page_size, page_token)
            .await?;
        let items = page.items.into_iter();
        Ok(Page {
            items: items.map(|found| self.with_worker(found)).collect(),
            next_page_token: page.next_page_token,
        })
    }

    /// Returns the number of jobs per state, by the name of the state. States without jobs are
    /// absent.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn job_counts(&self) -> Result<HashMap<String, i64>> {
        let rows: Vec<(String, i64)> =
            sqlx::query_as("SELECT state, COUNT(*) FROM jobs GROUP BY state")
                .fetch_all(&self.readers)
                .await?;
        Ok(rows.into_iter().collect())
    }

    /// Returns the jobs that are not in a final state, as the transaction sees them.
    pub(super) async fn unfinished_in(
        &self,
        tx: &mut Transaction<'_, Any>,
    ) -> Result<DependentJobs> {
        let rows: Vec<JobRow> = sqlx::query_as(AssertSqlSafe(select_unfinished()))
            .fetch_all(&mut **tx)
            .await?;
        let mut users = DependentJobs::default();
        users.add(rows);
        Ok(users)
    }

    /// Returns the jobs that may need weights of `job`, as the transaction sees them: the
    /// unfinished ones, and ended ones that have checkpoints and mention `job` in their requests.
    pub(super) async fn users_of_weights_in(
        &self,
        tx: &mut Transaction<'_, Any>,
        job: &str,
    ) -> Result<DependentJobs> {
        let mut users = self.unfinished_in(tx).await?;
        let ended = format!(
            "SELECT {JOB} FROM jobs WHERE state IN ({}) AND id <> $1 AND request LIKE $2
                 AND EXISTS (SELECT 1 FROM checkpoints WHERE checkpoints.job = jobs.id) ORDER BY \
                 seq",
            state_list(JobState::is_final)
        );
        let rows: Vec<JobRow> = sqlx::query_as(AssertSqlSafe(ended))
            .bind(job)
            .bind(format!("%{job}%"))
            .fetch_all(&mut **tx)
            .await?;
        users.add(rows);
        Ok(users)
    }

    /// Returns the ids of at most `limit` expired jobs after `after`, and the position at which the
    /// next page begins. After the last page the list starts again. A job's time to live may be
    /// prolonged before it is deleted.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn expired_jobs(
        &self,
        after: ExpiredPosition,
        limit: usize,
    ) -> Result<(Vec<String>, ExpiredPosition)> {
        let select = format!(
            "SELECT id, expire_time, seq FROM jobs WHERE {} AND (expire_time > $1 OR (expire_time \
             = $2 AND seq > $3))
             ORDER BY expire_time, seq LIMIT $4",
            self.is_expired()
        );
        let rows: Vec<(String, Millis, i64)> = sqlx::query_as(AssertSqlSafe(select))
            .bind(after.time)
            .bind(after.time)
            .bind(after.seq)
            .bind(limit as i64)
            .fetch_all(&self.readers)
            .await?;
        let next = match rows.last() {
            Some((_, time, seq)) if rows.len() == limit => ExpiredPosition {
                time: *time,
                seq: *seq,
            },
            _ => ExpiredPosition::default(),
        };
        Ok((rows.into_iter().map(|(id, ..)| id).collect(), next))
    }

    fn is_expired(&self) -> String {
        format!("expire_time < {}", self.dialect.now())
    }

    /// Returns the queued job for which a running one may be preempted: among those of the highest
    /// priority, the one that has waited longest. Jobs in `passed_over`, and jobs that were
    /// requeued with an error (an input is missing or has changed, or too many runs wait), do not
    /// count.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn next_queued(&self, passed_over: &[String]) -> Result<Option<Job>> {
        let mut passed_over = passed_over.to_vec();
        loop {
            let select = select_next_queued(passed_over.len(), " AND error IS NULL");
            let mut query = sqlx::query_as::<_, JobRow>(AssertSqlSafe(select));
            for id in &passed_over {
                query = query.bind(id);
            }
            let Some(row) = query.fetch_optional(&self.readers).await? else {
                return Ok(None);
            };
            let id = row.id.clone();
            match Job::try_from(row) {
                Ok(job) => return Ok(Some(job)),
                // Written by another version of the server. The next job may be readable.
                Err(_) => passed_over.push(id),
            }
        }
    }

    /// Returns the number of unfinished jobs that this version of the server cannot read.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn unreadable_jobs(&self) -> Result<usize> {
        let select = format!(
            "SELECT {JOB} FROM jobs WHERE state NOT IN ({}) ORDER BY seq",
            state_list(JobState::is_final)
        );
        let rows: Vec<JobRow> = sqlx::query_as(AssertSqlSafe(select))
            .fetch_all(&self.readers)
            .await?;
        let total = rows.len();
        Ok(total
            - rows
                .into_iter()
                .filter_map(|row| Job::try_from(row).ok())
                .count())
    }

    /// Changes a job for a client and appends the events that `change` returns, in one transaction.
    /// Returns the job and the sequence number of its newest new event (0 if there is none).
    ///
    /// # Errors
    /// The errors of `change`; `NotFound` if the job does not exist; `FailedPrecondition` for a
    /// state transition that is not allowed, or if another version of the server wrote the job.
    pub async fn change_job(
        &self,
        id: &str,
        change: impl FnOnce(&mut Job) -> Result<Vec<EventKind>> + Send,
    ) -> Result<(Job, u64)> {
        let mut tx = self.writer.begin().await?;
        let row = self.lock_job(&mut tx, id).await?;
        let changed = self.apply(&mut tx, row.try_into()?, change).await?;
        tx.commit().await?;
        Ok(changed)
    }

    /// Returns a job's row, locked until the transaction ends.
    ///
    /// # Errors
    /// `NotFound` if the job does not exist.
    pub(super) async fn lock_job(&self, tx: &mut Transaction<'_, Any>, id: &str) -> Result<JobRow> {
        let select = format!(
            "SELECT {JOB} FROM jobs WHERE id = $1{}",
            self.dialect.for_update()
        );
        let row: Option<JobRow> = sqlx::query_as(AssertSqlSafe(select))
            .bind(id)
            .fetch_optional(&mut **tx)
            .await?;
        row.ok_or_else(|| missing(id))
    }

    /// Applies `change` to a job with a locked row, and stores the job and its events. Returns the
    /// job and the sequence number of its newest new event (0 if there is none).
    ///
    /// # Errors
    /// The errors of `change`; `FailedPrecondition` for a state transition that is not allowed.
    pub(super) async fn apply(
        &self,
        tx: &mut Transaction<'_, Any>,
        mut job: Job,
        change: impl FnOnce(&mut Job) -> Result<Vec<EventKind>>,
    ) -> Result<(Job, u64)> {
        let before = job.state;
        let events = change(&mut job)?;
        if job.state != before && !before.may_become(job.state) {
            let message = format!(
                "trainingJobs/{} is {}: it cannot become {}",
                job.id,
                before.name(),
                job.state.name()
            );
            return Err(ServiceError::FailedPrecondition {
                reason: Reason::IllegalTransition,
                message,
            });
        }
        job.version += 1;
        if job.state.is_final() && job.end_time.is_none() {
            job.end_time = Some(now());
        }
        sqlx::query(
            "UPDATE jobs SET version = $1, state = $2, request = $3, priority = $4, error = $5, \
             progress = $6, latest_metrics = $7,
                 skipped_rows = $8, start_time = $9, end_time = $10, turn = $11, expire_time = $12
             WHERE id = $13",
        )
        .bind(job.version)
        .bind(job.state.name())
        .bind(to_json(&job.request)?)
        .bind(i64::from(job.request.priority))
        .bind(job.error.as_ref().map(to_json).transpose()?)
        .bind(to_json(&job.progress)?)
        .bind(to_json(&Finite(job.latest_metrics.clone()))?)
        .bind(to_json(&job.skipped_rows)?)
        .bind(job.start_time)
        .bind(job.end_time)
        .bind(job.queued_since)
        .bind(job.expire_time())
        .bind(&job.id)
        .execute(&mut **tx)
        .await?;
        let mut newest = 0;
        for event in &events {
            newest = self.append(tx, &job.id, event).await?;
        }
        self.announce(tx, &job, newest).await?;
        Ok((job, newest))
    }

    /// Deletes a job with its events and checkpoints. `refuse` gets the locked job and the jobs
    /// that may need its weights, and can prevent the deletion with an error. With `expired`, the
    /// job must also still be expired.
    ///
    /// # Errors
    /// The errors of `refuse`; `NotFound` if the job does not exist or is no longer expired.
    pub(in crate::service) async fn delete_job(
        &self,
        id: &str,
        expired: bool,
        refuse: impl FnOnce(&Job, &DependentJobs) -> Result<()> + Send,
    ) -> Result<()> {
        let mut tx = self.writer.begin().await?;
        let select = match expired {
            true => format!(
                "SELECT {JOB} FROM jobs WHERE id = $1 AND {}{}",
                self.is_expired(),
                self.dialect.for_update()
            ),
            false => format!(
                "SELECT {JOB} FROM jobs WHERE id = $1{}",
                self.dialect.for_update()
            ),
        };
        let row: Option<JobRow> = sqlx::query_as(AssertSqlSafe(select))
            .bind(id)
            .fetch_optional(&mut *tx)
            .await?;
        let job: Job = row.ok_or_else(|| missing(id))?.try_into()?;
        // The lock makes a transaction that creates a job with one of these checkpoints wait until
        // this one ends.
        let lock = format!(
            "SELECT step FROM checkpoints WHERE job = $1 ORDER BY step{}",
            self.dialect.for_update()
        );
        sqlx::query(AssertSqlSafe(lock))
            .bind(id)
            .fetch_all(&mut *tx)
            .await?;
        refuse(&job, &self.users_of_weights_in(&mut tx, id).await?)?;
        sqlx::query("DELETE FROM jobs WHERE id = $1")
            .bind(id)
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }

    /// Returns at most `limit` events after the sequence number `after`, in order.
    ///
    /// # Errors
    /// `OutOfRange` if the event after `after` has been deleted.
    pub async fn events(&self, job: &str, after: u64, limit: usize) -> Result<Vec<Event>> {
        let rows: Vec<EventRow> = sqlx::query_as(
            "SELECT sequence, time, body FROM events WHERE job = $1 AND sequence > $2 ORDER BY \
             sequence LIMIT $3",
        )
        .bind(job)
        .bind(after.min(i64::MAX as u64) as i64)
        .bind(limit as i64)
        .fetch_all(&self.readers)
        .await?;
        if let Some(oldest) = rows
            .first()
            .map(|r| r.sequence as u64)
            .filter(|first| *first > after.saturating_add(1))
        {
            let message = format!(
                "after_sequence is {after}, but the oldest stored event of trainingJobs/{job} is \
                 {oldest}: the events in between have been deleted, go on after {}",
                oldest - 1
            );
            return Err(ServiceError::OutOfRange { message });
        }
        rows.into_iter().map(Event::try_from).collect()
    }

    /// Returns the sequence number of a job's newest event, or 0.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn newest_sequence(&self, job: &str) -> Result<u64> {
        let newest: i64 = sqlx::query_scalar(SELECT_NEWEST)
            .bind(job)
            .fetch_one(&self.readers)
            .await?;
        Ok(newest as u64)
    }

    /// Returns the sequence number before the `n` newest stored events of a job, or before all of
    /// them if there are fewer. Without events it is 0.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn sequence_before_newest(&self, job: &str, n: u32) -> Result<u64> {
        let first: i64 = sqlx::query_scalar(
            "SELECT COALESCE(MIN(sequence), 1) FROM (SELECT sequence FROM events WHERE job = $1 \
             ORDER BY sequence DESC LIMIT $2) AS newest",
        )
        .bind(job)
        .bind(i64::from(n))
        .fetch_one(&self.readers)
        .await?;
        Ok(first.saturating_sub(1) as u64)
    }

    /// Appends an event, deletes events beyond the limit, and returns the new sequence number. The
    /// caller has locked the job's row, so that sequence numbers have no gaps.
    pub(super) async fn append(
        &self,
        tx: &mut Transaction<'_, Any>,
        job: &str,
        event: &EventKind,
    ) -> Result<u64> {
        let newest: i64 = sqlx::query_scalar(SELECT_NEWEST)
            .bind(job)
            .fetch_one(&mut **tx)
            .await?;
        let sequence = newest + 1;
        sqlx::query("INSERT INTO events (job, sequence, time, body) VALUES ($1, $2, $3, $4)")
            .bind(job)
            .bind(sequence)
            .bind(now())
            .bind(to_json(event)?)
            .execute(&mut **tx)
            .await?;
        sqlx::query("DELETE FROM events WHERE job = $1 AND sequence <= $2")
            .bind(job)
            .bind(sequence.saturating_sub(self.events_kept))
            .execute(&mut **tx)
            .await?;
        Ok(sequence as u64)
    }
}

/// Returns a SELECT of the queued job that is next in turn. Its first `passed_over` parameters are
/// ids of jobs to skip; `condition` is appended to the WHERE clause.
pub(super) fn select_next_queued(passed_over: usize, condition: &str) -> String {
    let parameters: Vec<String> = (1..=passed_over).map(|i| format!("${i}")).collect();
    let others = match passed_over {
        0 => String::new(),
        _ => format!(" AND id NOT IN ({})", parameters.join(", ")),
    };
    format!(
        "SELECT {JOB} FROM jobs WHERE state = 'queued'{others}{condition} ORDER BY priority DESC, \
         turn, seq LIMIT 1"
    )
}

pub(super) const SELECT_NEWEST: &str =
    "SELECT COALESCE(MAX(sequence), 0) FROM events WHERE job = $1";

fn select_unfinished() -> String {
    format!(
        "SELECT {JOB} FROM jobs WHERE state IN ({}) ORDER BY seq",
        state_list(|s| !s.is_final())
    )
}

/// Returns the names of the states selected by `wanted`, as a list for SQL.
pub(super) fn state_list(wanted: impl Fn(JobState) -> bool) -> String {
    JobState::ALL
        .into_iter()
        .filter(|s| wanted(*s))
        .map(|s| format!("'{}'", s.name()))
        .collect::<Vec<_>>()
        .join(", ")
}

fn missing(id: &str) -> ServiceError {
    ServiceError::not_found("job", format!("trainingJobs/{id}"))
}
