//! Who carries a job on. A lease is a token that only grows: a worker that was cut off finds its
//! token outdated and can write nothing more, whatever it believes of the time. The database's
//! clock decides when a lease has run out.

use std::time::Duration;

use sqlx::AssertSqlSafe;

use super::jobs::{NEWEST, next, quoted};
use super::rows::{JOB, JobRow};
use super::{Store, now};
use crate::domain::access::Caller;
use crate::domain::job::{Checkpoint, EventKind, Job, JobError, JobState};
use crate::domain::reason::Reason;
use crate::service::error::{Result, ServiceError};
use crate::service::in_use::{Needed, check};

/// Workers that may die over a job without getting further in it: what kills each of them must not
/// kill them for ever.
const MAX_RECLAIMS: i64 = 5;

/// The right to carry a job on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The job's id.
    pub job: String,
    token: i64,
    /// The replica, and an id of this claim alone: after a fail-over of the database that lost
    /// commits a token may be given out twice.
    owner: String,
}

/// What a run's write does besides changing the job, in the same transaction.
#[derive(Clone, Copy, Debug)]
pub enum Also<'a> {
    /// Nothing.
    Nothing,
    /// Adds a checkpoint.
    Add(&'a Checkpoint),
    /// Forgets the checkpoint of that step: it is lost.
    Remove(u64),
    /// Forgets the checkpoint of that step, unless an unfinished job needs it.
    Retire(u64),
    /// Gives the lease back: the run is over.
    Release,
}

impl Store {
    /// How long a worker may be silent.
    pub fn lease_time(&self) -> Duration {
        self.lease
    }

    fn until(&self) -> String {
        format!("{} + {}", self.dialect.now(), self.lease.as_millis())
    }

    /// Takes the queued job whose turn it is: it becomes `Preparing`, and the lease its caller's.
    /// Two replicas never get the same one. Jobs that `passed_over` names, and those that this
    /// version cannot read, are left for others.
    pub async fn claim(&self, passed_over: &[String]) -> Result<Option<(Job, Lease, u64)>> {
        let mut passed_over = passed_over.to_vec();
        let mut tx = self.writer.begin().await?;
        let (job, token) = loop {
            let select = format!("{}{}", next(passed_over.len(), ""), self.dialect.skip_locked());
            let mut query = sqlx::query_as::<_, JobRow>(AssertSqlSafe(select));
            for id in &passed_over {
                query = query.bind(id);
            }
            let Some(row) = query.fetch_optional(&mut *tx).await? else { return Ok(None) };
            let (id, token) = (row.id.clone(), row.lease_token + 1);
            match Job::try_from(row) {
                Ok(job) => break (job, token),
                Err(e) => {
                    tracing::warn!(job = id, error = %e, "a queued job is passed over");
                    passed_over.push(id);
                }
            }
        };
        let prepare = |job: &mut Job| {
            job.state = JobState::Preparing;
            // Why it was put back in the queue before.
            job.error = None;
            job.start_time.get_or_insert(now());
            Ok(vec![EventKind::StateChange {
                from: Some(JobState::Queued),
                to: JobState::Preparing,
                reason: "a device is free".into(),
            }])
        };
        let (job, sequence) = self.apply(&mut tx, job, prepare).await?;
        let owner = format!("{}/{}", self.replica, uuid::Uuid::now_v7());
        let take = format!(
            "UPDATE jobs SET lease_owner = $1, lease_token = $2, lease_until = {}, lease_writes = 0 WHERE id = $3",
            self.until()
        );
        sqlx::query(AssertSqlSafe(take))
            .bind(&owner)
            .bind(token)
            .bind(&job.id)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        let lease = Lease { job: job.id.clone(), token, owner };
        Ok(Some((job, lease, sequence)))
    }

    /// Prolongs a lease and returns the job's state; `None` when it is another's now, or the job is
    /// gone.
    pub async fn renew(&self, lease: &Lease) -> Result<Option<JobState>> {
        let renew = format!(
            "UPDATE jobs SET lease_until = {} WHERE id = $1 AND lease_token = $2 AND lease_owner = $3 RETURNING state",
            self.until()
        );
        let renewed = sqlx::query_scalar(AssertSqlSafe(renew))
            .bind(&lease.job)
            .bind(lease.token)
            .bind(&lease.owner);
        let state: Option<String> = renewed.fetch_optional(&self.writer).await?;
        Ok(state.and_then(|s| JobState::parse(&s)))
    }

    /// A write of a run, the `number`th under its lease: one that was stored before (its answer was
    /// lost) is not stored again.
    ///
    /// # Errors
    /// `Aborted` when the lease is another's; those of `change`.
    pub async fn write_run(
        &self,
        lease: &Lease,
        number: i64,
        change: impl FnOnce(&mut Job) -> Result<Vec<EventKind>>,
        also: Also<'_>,
    ) -> Result<(Job, u64)> {
        let mut tx = self.writer.begin().await?;
        let row = self.locked(&mut tx, &lease.job).await?;
        // A lease that was given back has no owner: only a repeated last write may find that.
        let given_back = row.lease_owner.is_none() && row.lease_writes >= number;
        if row.lease_token != lease.token
            || !(given_back || row.lease_owner.as_ref() == Some(&lease.owner))
        {
            let message = format!("trainingJobs/{} is carried on by another worker", lease.job);
            return Err(ServiceError::Aborted { reason: Reason::LeaseLost, message });
        }
        if row.lease_writes >= number {
            let newest: i64 =
                sqlx::query_scalar(NEWEST).bind(&lease.job).fetch_one(&mut *tx).await?;
            return Ok((row.try_into()?, newest as u64));
        }
        if let Also::Retire(step) = also {
            let needed = Needed::Weights { job: &lease.job, step: Some(step) };
            self.lock_checkpoint(&mut tx, &lease.job, step).await?;
            check(
                &Caller::anyone(),
                &self.users_of_weights_in(&mut tx, &lease.job).await?,
                needed,
            )?;
        }
        let changed = self.apply(&mut tx, row.try_into()?, change).await?;
        let number_it = match also {
            Also::Release => {
                "UPDATE jobs SET lease_writes = $1, lease_owner = NULL, lease_until = 0 WHERE id = $2"
            }
            _ => "UPDATE jobs SET lease_writes = $1 WHERE id = $2",
        };
        sqlx::query(number_it).bind(number).bind(&lease.job).execute(&mut *tx).await?;
        match also {
            Also::Add(checkpoint) => self.put_checkpoint(&mut tx, checkpoint).await?,
            Also::Remove(step) | Also::Retire(step) => {
                let remove = "DELETE FROM checkpoints WHERE job = $1 AND step = $2";
                sqlx::query(remove).bind(&lease.job).bind(step as i64).execute(&mut *tx).await?;
            }
            Also::Nothing | Also::Release => {}
        }
        tx.commit().await?;
        Ok(changed)
    }

    /// Puts jobs whose worker is gone back in the queue, or where they were going. With `all`, this
    /// process is the only one and every lease is void. Returns the jobs with their newest
    /// sequence.
    pub async fn reclaim(&self, all: bool) -> Result<Vec<(Job, u64)>> {
        let held = quoted(|s| {
            matches!(
                s,
                JobState::Preparing | JobState::Running | JobState::Pausing | JobState::Cancelling
            )
        });
        let expired = format!("($1 = 1 OR lease_until < {})", self.dialect.now());
        let select =
            format!("SELECT id FROM jobs WHERE state IN ({held}) AND {expired} ORDER BY seq");
        let ids: Vec<String> = sqlx::query_scalar(AssertSqlSafe(select))
            .bind(i64::from(all))
            .fetch_all(&self.readers)
            .await?;
        let mut moved = Vec::new();
        for id in ids {
            let mut tx = self.writer.begin().await?;
            let again = format!(
                "SELECT {JOB} FROM jobs WHERE id = $2 AND state IN ({held}) AND {expired}{}",
                self.dialect.skip_locked()
            );
            let row: Option<JobRow> = sqlx::query_as(AssertSqlSafe(again))
                .bind(i64::from(all))
                .bind(&id)
                .fetch_optional(&mut *tx)
                .await?;
            let Some(row) = row else { continue };
            let (reclaims, before) = (row.reclaims, row.reclaim_step);
            let job = match Job::try_from(row) {
                Ok(job) => job,
                Err(e) => {
                    tracing::error!(job = id, error = %e, "a job that cannot be read is left as it is");
                    continue;
                }
            };
            let newest: Option<i64> =
                sqlx::query_scalar("SELECT MAX(step) FROM checkpoints WHERE job = $1")
                    .bind(&id)
                    .fetch_one(&mut *tx)
                    .await?;
            let step = newest.unwrap_or(0);
            let reached = job.progress.step as i64;
            let reclaims = if reached > before { 1 } else { reclaims + 1 };
            let changed = self
                .apply(&mut tx, job, |job| {
                    let from = job.state;
                    let (to, reason) = match from {
                        JobState::Preparing | JobState::Running if reclaims > MAX_RECLAIMS => {
                            let message = format!(
                                "its worker died {reclaims} times without getting beyond step {reached}: the job may need more memory than there is"
                            );
                            job.error = Some(JobError { reason: Reason::WorkerLost.into(), message: message.clone() });
                            (JobState::Failed, message)
                        }
                        JobState::Pausing => (JobState::Paused, format!("its worker is gone; continues from step {step}")),
                        JobState::Cancelling => (JobState::Cancelled, "its worker is gone".to_owned()),
                        _ => (JobState::Queued, format!("its worker is gone; continues from step {step}")),
                    };
                    job.state = to;
                    Ok(vec![EventKind::StateChange { from: Some(from), to, reason }])
                })
                .await?;
            // Whoever had the lease can write no more.
            let void =
                "UPDATE jobs SET lease_token = lease_token + 1, lease_owner = NULL, lease_until = 0, reclaims = $1, reclaim_step = $2
                 WHERE id = $3";
            sqlx::query(void)
                .bind(reclaims)
                .bind(reached.max(before))
                .bind(&id)
                .execute(&mut *tx)
                .await?;
            tx.commit().await?;
            moved.push(changed);
        }
        Ok(moved)
    }
}
