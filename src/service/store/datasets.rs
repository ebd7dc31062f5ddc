//! Rows of datasets. Their files are in `artifacts`.

use sqlx::AssertSqlSafe;

use super::rows::{self, DatasetRow, to_json};
use super::{PAGE_CONDITION, Page, Store};
use crate::domain::dataset::Dataset;
use crate::service::error::{Result, ServiceError};
use crate::service::in_use::DependentJobs;

/// SQL for the total size of the datasets of the owner `$1`, in bytes. The cast is needed because
/// PostgreSQL's sum of BIGINT is NUMERIC.
const SUM_OF_BYTES: &str =
    "SELECT CAST(COALESCE(SUM(size_bytes), 0) AS BIGINT) FROM datasets WHERE owner = $1";

impl Store {
    /// Adds a dataset. `refuse` gets the total size in bytes of its owner's other datasets, and can
    /// prevent the insertion with an error. No other dataset of the owner is added meanwhile.
    ///
    /// # Errors
    /// The errors of `refuse`; `Unavailable` or `Internal` if the database fails.
    pub async fn insert_dataset(
        &self,
        d: &Dataset,
        refuse: impl FnOnce(u64) -> Result<()> + Send,
    ) -> Result<()> {
        let mut tx = self.writer.begin().await?;
        self.lock_owner(&mut tx, &d.owner).await?;
        // The row is inserted before the sum is read: a transaction of SQLite that reads first
        // fails if another process writes in between.
        sqlx::query(
            "INSERT INTO datasets (id, display_name, format, size_bytes, content_hash, report, \
             create_time, owner)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(&d.id)
        .bind(&d.display_name)
        .bind(to_json(&d.format)?)
        .bind(d.size_bytes as i64)
        .bind(&d.content_hash)
        .bind(to_json(&d.report)?)
        .bind(d.create_time)
        .bind(&d.owner)
        .execute(&mut *tx)
        .await?;
        let bytes: i64 = sqlx::query_scalar(SUM_OF_BYTES)
            .bind(&d.owner)
            .fetch_one(&mut *tx)
            .await?;
        refuse((bytes as u64).saturating_sub(d.size_bytes))?;
        Ok(tx.commit().await?)
    }

    /// Returns one dataset.
    ///
    /// # Errors
    /// `NotFound` if it does not exist.
    pub async fn dataset(&self, id: &str) -> Result<Dataset> {
        let select = format!("SELECT {} FROM datasets WHERE id = $1", rows::dataset());
        let row: Option<DatasetRow> = sqlx::query_as(AssertSqlSafe(select))
            .bind(id)
            .fetch_optional(&self.readers)
            .await?;
        row.ok_or_else(|| ServiceError::not_found("dataset", format!("datasets/{id}")))?
            .try_into()
    }

    /// Returns a page of the datasets of `owner` (of everyone if `None`), newest first, without the
    /// findings in their reports. With a hash, only those whose file has it.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad page token.
    pub async fn datasets(
        &self,
        owner: Option<&str>,
        content_hash: Option<blake3::Hash>,
        page_size: usize,
        page_token: &str,
    ) -> Result<Page<Dataset>> {
        // The hash is hex digits by its type.
        let condition = content_hash
            .map(|hash| format!(" AND content_hash = '{}'", hash.to_hex()))
            .unwrap_or_default();
        let select = format!(
            "SELECT {} FROM datasets WHERE {PAGE_CONDITION}{condition}",
            rows::dataset_in_list(self.dialect)
        );
        self.page::<DatasetRow, _>(&select, owner, page_size, page_token)
            .await
    }

    /// Returns the total size of an owner's datasets, in bytes.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn dataset_bytes(&self, owner: &str) -> Result<u64> {
        let bytes: i64 = sqlx::query_scalar(SUM_OF_BYTES)
            .bind(owner)
            .fetch_one(&self.readers)
            .await?;
        Ok(bytes as u64)
    }

    /// Deletes the row of a dataset, unless `refuse` finds an unfinished job that needs it.
    ///
    /// # Errors
    /// The errors of `refuse`.
    pub(in crate::service) async fn delete_dataset(
        &self,
        id: &str,
        refuse: impl FnOnce(&DependentJobs) -> Result<()>,
    ) -> Result<()> {
        let mut tx = self.writer.begin().await?;
        let lock = format!(
            "SELECT seq FROM datasets WHERE id = $1{}",
            self.dialect.for_update()
        );
        sqlx::query(AssertSqlSafe(lock))
            .bind(id)
            .fetch_optional(&mut *tx)
            .await?;
        refuse(&self.unfinished_in(&mut tx).await?)?;
        sqlx::query("DELETE FROM datasets WHERE id = $1")
            .bind(id)
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }
}
