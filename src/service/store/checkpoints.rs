//! Rows of checkpoints. They are added and removed by the holder of the job's lease (see `leases`),
//! and removed by clients.

use sqlx::{Any, AssertSqlSafe, Transaction};

use super::Store;
use super::rows::{CHECKPOINT, CheckpointRow, to_json};
use crate::domain::job::{Checkpoint, Finite};
use crate::service::error::Result;
use crate::service::in_use::DependentJobs;

impl Store {
    /// Adds or replaces a checkpoint. If it is the best one, the previous best one loses the mark.
    pub(super) async fn put_checkpoint(
        &self,
        tx: &mut Transaction<'_, Any>,
        c: &Checkpoint,
    ) -> Result<()> {
        if c.best {
            sqlx::query("UPDATE checkpoints SET best = 0 WHERE job = $1")
                .bind(&c.job)
                .execute(&mut **tx)
                .await?;
        }
        sqlx::query(
            "INSERT INTO checkpoints (job, step, best, adapter, size_bytes, metrics, create_time, \
             digest)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
             ON CONFLICT (job, step) DO UPDATE SET best = excluded.best, adapter = \
             excluded.adapter, size_bytes = excluded.size_bytes,
                 metrics = excluded.metrics, create_time = excluded.create_time, digest = \
                 excluded.digest",
        )
        .bind(&c.job)
        .bind(c.step as i64)
        .bind(i64::from(c.best))
        .bind(i64::from(c.adapter))
        .bind(c.size_bytes as i64)
        .bind(to_json(&Finite(c.metrics.clone()))?)
        .bind(c.create_time)
        .bind(&c.digest)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    /// Returns a job's checkpoints, oldest first.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn checkpoints(&self, job: &str) -> Result<Vec<Checkpoint>> {
        let select = format!("SELECT {CHECKPOINT} FROM checkpoints WHERE job = $1 ORDER BY step");
        let rows: Vec<CheckpointRow> = sqlx::query_as(AssertSqlSafe(select))
            .bind(job)
            .fetch_all(&self.readers)
            .await?;
        rows.into_iter().map(Checkpoint::try_from).collect()
    }

    /// Deletes the row of a checkpoint, unless `refuse` finds a job that needs it.
    ///
    /// # Errors
    /// The errors of `refuse`.
    pub(in crate::service) async fn delete_checkpoint(
        &self,
        job: &str,
        step: u64,
        refuse: impl FnOnce(&DependentJobs) -> Result<()>,
    ) -> Result<()> {
        let mut tx = self.writer.begin().await?;
        self.lock_checkpoint(&mut tx, job, step).await?;
        refuse(&self.users_of_weights_in(&mut tx, job).await?)?;
        sqlx::query("DELETE FROM checkpoints WHERE job = $1 AND step = $2")
            .bind(job)
            .bind(step as i64)
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }

    /// Locks the row of a checkpoint. A transaction that creates a job with this checkpoint waits
    /// until this one ends.
    pub(super) async fn lock_checkpoint(
        &self,
        tx: &mut Transaction<'_, Any>,
        job: &str,
        step: u64,
    ) -> Result<()> {
        let lock = format!(
            "SELECT step FROM checkpoints WHERE job = $1 AND step = $2{}",
            self.dialect.for_update()
        );
        sqlx::query(AssertSqlSafe(lock))
            .bind(job)
            .bind(step as i64)
            .fetch_optional(&mut **tx)
            .await?;
        Ok(())
    }
}
