//! Rows of tokens.

use sqlx::AssertSqlSafe;

use super::Store;
use super::rows::TOKEN;
use crate::domain::job::Millis;
use crate::service::error::Result;

/// A stored token.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct TokenRow {
    /// Id of the token, which is part of its text.
    pub id: String,
    /// Owner of the jobs and datasets created with the token.
    pub owner: String,
    /// Names of the roles, separated by commas.
    pub roles: String,
    /// BLAKE3 hash of the secret, in hex.
    pub hash: String,
    /// Creation time, in milliseconds since 1970.
    pub create_time: Millis,
    /// Expiry time, in milliseconds since 1970; `None` never expires.
    pub expire_time: Option<Millis>,
}

impl Store {
    /// Adds a token.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn insert_token(&self, t: &TokenRow) -> Result<()> {
        sqlx::query(
            "INSERT INTO tokens (id, owner, roles, hash, create_time, expire_time) VALUES ($1, $2, \
             $3, $4, $5, $6)",
        )
        .bind(&t.id)
        .bind(&t.owner)
        .bind(&t.roles)
        .bind(&t.hash)
        .bind(t.create_time)
        .bind(t.expire_time)
        .execute(&self.writer)
        .await?;
        Ok(())
    }

    /// Returns one token, or `None` if it does not exist.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn token(&self, id: &str) -> Result<Option<TokenRow>> {
        let select = format!("SELECT {TOKEN} FROM tokens WHERE id = $1");
        Ok(sqlx::query_as(AssertSqlSafe(select))
            .bind(id)
            .fetch_optional(&self.readers)
            .await?)
    }

    /// Returns all tokens, oldest first.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn tokens(&self) -> Result<Vec<TokenRow>> {
        let select = format!("SELECT {TOKEN} FROM tokens ORDER BY create_time, id");
        Ok(sqlx::query_as(AssertSqlSafe(select))
            .fetch_all(&self.readers)
            .await?)
    }

    /// Deletes a token. Returns false if it does not exist.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn delete_token(&self, id: &str) -> Result<bool> {
        let done = sqlx::query("DELETE FROM tokens WHERE id = $1")
            .bind(id)
            .execute(&self.writer)
            .await?;
        Ok(done.rows_affected() > 0)
    }
}
