//! Leases of jobs. A lease has a fencing token: a number that is larger for each new lease of a
//! job. A worker that was cut off finds its token outdated and can write nothing more, whatever its
//! clock says. The database's clock decides when a lease expires.

use std::time::Duration;

use sqlx::AssertSqlSafe;

use super::jobs::{SELECT_NEWEST, select_next_queued, state_list};
use super::rows::{JOB, JobRow};
use super::{Store, now};
use crate::domain::access::Caller;
use crate::domain::job::{Checkpoint, EventKind, Job, JobError, JobState};
use crate::domain::reason::Reason;
use crate::service::error::{Result, ServiceError};
use crate::service::in_use::{Needed, check};

/// Number of times that a job may lose its worker without making progress before it fails. A job
/// that kills its workers must not do so forever.
const MAX_RECLAIMS: i64 = 5;

/// The right to run a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Id of the job.
    pub job: String,
    token: i64,
    /// Id of the replica and a random id of this claim. The token alone is not unique: a database
    /// fail-over that loses commits may give out a token twice.
    holder: String,
}

/// Additional effect of a run's write, in the same transaction.
#[derive(Clone, Copy, Debug)]
pub enum RunWriteEffect<'a> {
    /// No additional effect.
    Nothing,
    /// Adds a checkpoint.
    Add(&'a Checkpoint),
    /// Deletes the checkpoint of this step, because it is damaged.
    Remove(u64),
    /// Deletes the checkpoint of this step, unless another job needs it.
    Retire(u64),
    /// Releases the lease, because the run is over.
    Release,
}

impl Store {
    /// Returns the duration of a lease.
    pub fn lease_time(&self) -> Duration {
        self.lease
    }

    fn lease_end(&self) -> String {
        format!("{} + {}", self.dialect.now(), self.lease.as_millis())
    }

    /// Claims the queued job that is next in turn: the job becomes `Preparing`, and the caller gets
    /// its lease. Two replicas never get the same job. Jobs in `passed_over`, and those that this
    /// version cannot read, are skipped. Returns the job, the lease and the job's newest sequence
    /// number.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn claim(&self, passed_over: &[String]) -> Result<Option<(Job, Lease, u64)>> {
        let mut passed_over = passed_over.to_vec();
        let mut tx = self.writer.begin().await?;
        let (job, token) = loop {
            let select = format!(
                "{}{}",
                select_next_queued(passed_over.len(), ""),
                self.dialect.skip_locked()
            );
            let mut query = sqlx::query_as::<_, JobRow>(AssertSqlSafe(select));
            for id in &passed_over {
                query = query.bind(id);
            }
            let Some(row) = query.fetch_optional(&mut *tx).await? else {
                return Ok(None);
            };
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
            // The error says why the job was requeued before.
            job.error = None;
            job.start_time.get_or_insert(now());
            Ok(vec![EventKind::StateChange {
                from: Some(JobState::Queued),
                to: JobState::Preparing,
                reason: "a device is free".into(),
            }])
        };
        let (job, sequence) = self.apply(&mut tx, job, prepare).await?;
        let holder = format!("{}/{}", self.replica, uuid::Uuid::now_v7());
        let take_lease = format!(
            "UPDATE jobs SET lease_owner = $1, lease_token = $2, lease_until = {}, lease_writes = \
             0 WHERE id = $3",
            self.lease_end()
        );
        sqlx::query(AssertSqlSafe(take_lease))
            .bind(&holder)
            .bind(token)
            .bind(&job.id)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        let lease = Lease {
            job: job.id.clone(),
            token,
            holder,
        };
        Ok(Some((job, lease, sequence)))
    }

    /// Renews a lease and returns the state of the job; `None` if the lease is lost or the job is
    /// gone.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn renew(&self, lease: &Lease) -> Result<Option<JobState>> {
        let renew = format!(
            "UPDATE jobs SET lease_until = {} WHERE id = $1 AND lease_token = $2 AND lease_owner = \
             $3 RETURNING state",
            self.lease_end()
        );
        let renewed = sqlx::query_scalar(AssertSqlSafe(renew))
            .bind(&lease.job)
            .bind(lease.token)
            .bind(&lease.holder);
        let state: Option<String> = renewed.fetch_optional(&self.writer).await?;
        Ok(state.and_then(|s| JobState::parse(&s)))
    }

    /// Stores a write of a run, the `number`th under its lease. If the write was already stored and
    /// only its answer was lost, it is not stored again. Returns the job and the sequence number of
    /// the newest event that the write added (0 if it added none; for a write that was already
    /// stored, the job's newest event).
    ///
    /// # Errors
    /// `Aborted` if the lease is lost; the errors of `change`; `NotFound` if the job was deleted;
    /// `FailedPrecondition` (`IN_USE`) if another job needs the checkpoint to retire.
    pub async fn write_run(
        &self,
        lease: &Lease,
        number: i64,
        change: impl FnOnce(&mut Job) -> Result<Vec<EventKind>>,
        effect: RunWriteEffect<'_>,
    ) -> Result<(Job, u64)> {
        let mut tx = self.writer.begin().await?;
        let row = self.lock_job(&mut tx, &lease.job).await?;
        // A released lease has no owner. Only a retry of the last write may find this state.
        let given_back = row.lease_owner.is_none() && row.lease_writes >= number;
        if row.lease_token != lease.token
            || !(given_back || row.lease_owner.as_ref() == Some(&lease.holder))
        {
            let message = format!("trainingJobs/{} is run by another worker", lease.job);
            return Err(ServiceError::Aborted {
                reason: Reason::LeaseLost,
                message,
            });
        }
        if row.lease_writes >= number {
            let newest: i64 = sqlx::query_scalar(SELECT_NEWEST)
                .bind(&lease.job)
                .fetch_one(&mut *tx)
                .await?;
            return Ok((row.try_into()?, newest as u64));
        }
        if let RunWriteEffect::Retire(step) = effect {
            let needed = Needed::Weights {
                job: &lease.job,
                step: Some(step),
            };
            self.lock_checkpoint(&mut tx, &lease.job, step).await?;
            check(
                &Caller::unrestricted(),
                &self.users_of_weights_in(&mut tx, &lease.job).await?,
                needed,
            )?;
        }
        let changed = self.apply(&mut tx, row.try_into()?, change).await?;
        let count_write = match effect {
            RunWriteEffect::Release => {
                "UPDATE jobs SET lease_writes = $1, lease_owner = NULL, lease_until = 0 WHERE id = \
                 $2"
            }
            _ => "UPDATE jobs SET lease_writes = $1 WHERE id = $2",
        };
        sqlx::query(count_write)
            .bind(number)
            .bind(&lease.job)
            .execute(&mut *tx)
            .await?;
        match effect {
            RunWriteEffect::Add(checkpoint) => self.put_checkpoint(&mut tx, checkpoint).await?,
            RunWriteEffect::Remove(step) | RunWriteEffect::Retire(step) => {
                let remove = "DELETE FROM checkpoints WHERE job = $1 AND step = $2";
                sqlx::query(remove)
                    .bind(&lease.job)
                    .bind(step as i64)
                    .execute(&mut *tx)
                    .await?;
            }
            RunWriteEffect::Nothing | RunWriteEffect::Release => {}
        }
        tx.commit().await?;
        Ok(changed)
    }

    /// Reclaims the jobs of dead workers: they are requeued, or paused or cancelled if that was
    /// requested. A job that loses its worker too often without progress fails (`WORKER_LOST`).
    /// With `all`, every lease counts as expired, because this is the only process. Returns the
    /// jobs with their newest sequence numbers.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn reclaim(&self, all: bool) -> Result<Vec<(Job, u64)>> {
        let leased_states = state_list(|s| {
            matches!(
                s,
                JobState::Preparing | JobState::Running | JobState::Pausing | JobState::Cancelling
            )
        });
        let expired = format!("($1 = 1 OR lease_until < {})", self.dialect.now());
        let select = format!(
            "SELECT id FROM jobs WHERE state IN ({leased_states}) AND {expired} ORDER BY seq"
        );
        let ids: Vec<String> = sqlx::query_scalar(AssertSqlSafe(select))
            .bind(i64::from(all))
            .fetch_all(&self.readers)
            .await?;
        let mut moved = Vec::new();
        for id in ids {
            let mut tx = self.writer.begin().await?;
            let recheck = format!(
                "SELECT {JOB} FROM jobs WHERE id = $2 AND state IN ({leased_states}) AND \
                 {expired}{}",
                self.dialect.skip_locked()
            );
            let row: Option<JobRow> = sqlx::query_as(AssertSqlSafe(recheck))
                .bind(i64::from(all))
                .bind(&id)
                .fetch_optional(&mut *tx)
                .await?;
            let Some(row) = row else { continue };
            let (reclaims, before) = (row.reclaims, row.reclaim_step);
            let job = match Job::try_from(row) {
                Ok(job) => job,
                Err(e) => {
                    tracing::error!(job = id, error = %e, "a job that cannot be read is left as it \
                        is");
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
            let farthest = reached.max(before);
            let changed = self
                .apply(&mut tx, job, |job| {
                    let from = job.state;
                    let (to, reason) = match from {
                        JobState::Preparing | JobState::Running if reclaims > MAX_RECLAIMS => {
                            let message = format!(
                                "its worker died {reclaims} times without progress beyond step \
                                 {farthest}: the job may need more memory than there is"
                            );
                            job.error = Some(JobError {
                                reason: Reason::WorkerLost.into(),
                                message: message.clone(),
                            });
                            (JobState::Failed, message)
                        }
                        JobState::Pausing => (
                            JobState::Paused,
                            format!("its worker is gone; continues from step {step}"),
                        ),
                        JobState::Cancelling => {
                            (JobState::Cancelled, "its worker is gone".to_owned())
                        }
                        _ => (
                            JobState::Queued,
                            format!("its worker is gone; continues from step {step}"),
                        ),
                    };
                    job.state = to;
                    Ok(vec![EventKind::StateChange {
                        from: Some(from),
                        to,
                        reason,
                    }])
                })
                .await?;
            // The increased token prevents further writes of the old worker.
            let revoke_lease =
                "UPDATE jobs SET lease_token = lease_token + 1, lease_owner = NULL, lease_until = \
                 0, reclaims = $1, reclaim_step = $2
                 WHERE id = $3";
            sqlx::query(revoke_lease)
                .bind(reclaims)
                .bind(farthest)
                .bind(&id)
                .execute(&mut *tx)
                .await?;
            tx.commit().await?;
            moved.push(changed);
        }
        Ok(moved)
    }
}
