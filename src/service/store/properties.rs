//! What the database knows of the whole installation, by name.

use super::Store;
use crate::service::error::Result;

/// The identity of the artifact store that belongs to this database.
pub const ARTIFACT_STORE: &str = "artifact_store";

impl Store {
    /// A property's value.
    pub async fn property(&self, name: &str) -> Result<Option<String>> {
        let select = "SELECT value FROM properties WHERE name = $1";
        Ok(sqlx::query_scalar(select).bind(name).fetch_optional(&self.readers).await?)
    }

    /// Sets a property that has no value yet; returns the value that it has now, which may be
    /// another process's.
    pub async fn set_property_once(&self, name: &str, value: &str) -> Result<String> {
        let insert =
            "INSERT INTO properties (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
        sqlx::query(insert).bind(name).bind(value).execute(&self.writer).await?;
        let select = "SELECT value FROM properties WHERE name = $1";
        Ok(sqlx::query_scalar(select).bind(name).fetch_one(&self.writer).await?)
    }

    /// Whether anything was stored that has files.
    pub async fn has_artifacts(&self) -> Result<bool> {
        let count = "SELECT (SELECT COUNT(*) FROM datasets) + (SELECT COUNT(*) FROM checkpoints)";
        let rows: i64 = sqlx::query_scalar(count).fetch_one(&self.readers).await?;
        Ok(rows > 0)
    }
}
