//! Named properties of the whole installation.

use super::Store;
use crate::service::error::Result;

/// Property with the identity of the artifact store that belongs to this database.
pub const ARTIFACT_STORE: &str = "artifact_store";

impl Store {
    /// Returns the value of a property; `None` if it is not set.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn property(&self, name: &str) -> Result<Option<String>> {
        let select = "SELECT value FROM properties WHERE name = $1";
        Ok(sqlx::query_scalar(select)
            .bind(name)
            .fetch_optional(&self.readers)
            .await?)
    }

    /// Sets a property unless it already has a value. Returns the value that it has now, which may
    /// be from another process.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn set_property_once(&self, name: &str, value: &str) -> Result<String> {
        let insert =
            "INSERT INTO properties (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
        sqlx::query(insert)
            .bind(name)
            .bind(value)
            .execute(&self.writer)
            .await?;
        let select = "SELECT value FROM properties WHERE name = $1";
        Ok(sqlx::query_scalar(select)
            .bind(name)
            .fetch_one(&self.writer)
            .await?)
    }

    /// Returns true if the database has rows with files (datasets or checkpoints).
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn has_artifacts(&self) -> Result<bool> {
        let count = "SELECT (SELECT COUNT(*) FROM datasets) + (SELECT COUNT(*) FROM checkpoints)";
        let rows: i64 = sqlx::query_scalar(count).fetch_one(&self.readers).await?;
        Ok(rows > 0)
    }
}
