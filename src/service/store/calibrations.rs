//! Calibrations of checkpoints. They are deleted with their checkpoints.

use super::rows::to_json;
use super::{Store, now};
use crate::math::calibration::Calibration;
use crate::service::error::{Result, ServiceError};

/// Identifies the weights and options that a calibration belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibrationKey {
    /// Id of the job.
    pub job: String,
    /// Step of the checkpoint.
    pub step: u64,
    /// Hash of the weights of policy and reference, of β and of the normalization.
    pub hash: String,
}

impl Store {
    /// Returns the calibration with this key.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn calibration(&self, key: &CalibrationKey) -> Result<Option<Calibration>> {
        let select =
            "SELECT parameters FROM calibrations WHERE job = $1 AND step = $2 AND key = $3";
        let found: Option<String> = sqlx::query_scalar(select)
            .bind(&key.job)
            .bind(key.step as i64)
            .bind(&key.hash)
            .fetch_optional(&self.readers)
            .await?;
        let parse = |text: String| {
            serde_json::from_str(&text).map_err(|e| {
                ServiceError::internal(format!(
                    "the calibration of trainingJobs/{}/checkpoints/{} is damaged: {e}",
                    key.job, key.step
                ))
            })
        };
        found.map(parse).transpose()
    }

    /// Adds or replaces a calibration.
    ///
    /// # Errors
    /// `NotFound` if the checkpoint has been deleted.
    pub async fn put_calibration(
        &self,
        key: &CalibrationKey,
        calibration: &Calibration,
    ) -> Result<()> {
        let insert = "INSERT INTO calibrations (job, step, key, parameters, create_time)
             SELECT job, step, $3, $4, $5 FROM checkpoints WHERE job = $1 AND step = $2
             ON CONFLICT (job, step, key) DO UPDATE SET parameters = excluded.parameters,
                 create_time = excluded.create_time";
        let done = sqlx::query(insert)
            .bind(&key.job)
            .bind(key.step as i64)
            .bind(&key.hash)
            .bind(to_json(calibration)?)
            .bind(now())
            .execute(&self.writer)
            .await?;
        if done.rows_affected() == 0 {
            let name = format!("trainingJobs/{}/checkpoints/{}", key.job, key.step);
            return Err(ServiceError::not_found("checkpoint", name));
        }
        Ok(())
    }
}
