//! Tokens' rows.

use sqlx::AssertSqlSafe;

use super::Store;
use super::rows::TOKEN;
use crate::domain::job::Millis;
use crate::service::error::Result;

/// A token as stored.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct TokenRow {
    /// Its id.
    pub id: String,
    /// Whose jobs it is for.
    pub owner: String,
    /// Names of roles, separated by commas.
    pub roles: String,
    /// BLAKE3 of its secret, in hex.
    pub hash: String,
    /// When it was made.
    pub create_time: Millis,
    /// When it ends.
    pub expire_time: Option<Millis>,
}

impl Store {
    /// Adds a token.
    pub async fn insert_token(&self, t: &TokenRow) -> Result<()> {
        sqlx::query("INSERT INTO tokens (id, owner, roles, hash, create_time, expire_time) VALUES ($1, $2, $3, $4, $5, $6)")
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

    /// One token.
    pub async fn token(&self, id: &str) -> Result<Option<TokenRow>> {
        let select = format!("SELECT {TOKEN} FROM tokens WHERE id = $1");
        Ok(sqlx::query_as(AssertSqlSafe(select)).bind(id).fetch_optional(&self.readers).await?)
    }

    /// Every token, oldest first.
    pub async fn tokens(&self) -> Result<Vec<TokenRow>> {
        let select = format!("SELECT {TOKEN} FROM tokens ORDER BY create_time, id");
        Ok(sqlx::query_as(AssertSqlSafe(select)).fetch_all(&self.readers).await?)
    }

    /// Forgets a token; false when there is none.
    pub async fn delete_token(&self, id: &str) -> Result<bool> {
        let done =
            sqlx::query("DELETE FROM tokens WHERE id = $1").bind(id).execute(&self.writer).await?;
        Ok(done.rows_affected() > 0)
    }
}
