//! Work that was done for each owner, by day.

use std::collections::BTreeMap;

use sqlx::AssertSqlSafe;

use super::Store;
use crate::domain::usage::{OwnerUsage, Usage};
use crate::service::error::Result;

#[derive(sqlx::FromRow)]
struct UsageRow {
    owner: String,
    day: Option<i64>,
    scored_pairs: i64,
    scored_completions: i64,
    scored_tokens: i64,
    training_device_us: i64,
}

impl From<UsageRow> for OwnerUsage {
    fn from(row: UsageRow) -> Self {
        OwnerUsage {
            owner: row.owner,
            day: row.day,
            usage: Usage {
                scored_pairs: row.scored_pairs as u64,
                scored_completions: row.scored_completions as u64,
                scored_tokens: row.scored_tokens as u64,
                training_device_us: row.training_device_us as u64,
            },
        }
    }
}

impl Store {
    /// Adds work to that of owners and days, all or nothing.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn add_usage(&self, work: &BTreeMap<(String, i64), Usage>) -> Result<()> {
        let add = "INSERT INTO owner_usage (owner, day, scored_pairs, scored_completions, \
                   scored_tokens, training_device_us) VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT \
                   (owner, day) DO UPDATE SET scored_pairs = owner_usage.scored_pairs + \
                   excluded.scored_pairs, scored_completions = owner_usage.scored_completions + \
                   excluded.scored_completions, scored_tokens = owner_usage.scored_tokens + \
                   excluded.scored_tokens, training_device_us = owner_usage.training_device_us + \
                   excluded.training_device_us";
        let mut transaction = self.writer.begin().await?;
        // The order of the map is the same in every replica, so that they do not wait for each
        // other in a circle.
        for ((owner, day), usage) in work {
            sqlx::query(add)
                .bind(owner)
                .bind(day)
                .bind(usage.scored_pairs as i64)
                .bind(usage.scored_completions as i64)
                .bind(usage.scored_tokens as i64)
                .bind(usage.training_device_us as i64)
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Returns the work of the days `first..=last` for one owner, or for all if it is `None`: for
    /// each day, or added up. At most `limit` records are returned, sorted by owner and day.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn usage(
        &self,
        owner: Option<&str>,
        (first, last): (i64, i64),
        by_day: bool,
        limit: usize,
    ) -> Result<Vec<OwnerUsage>> {
        let sum = |column: &str| format!("CAST(SUM({column}) AS BIGINT) AS {column}");
        let (day, group) = match by_day {
            true => ("day", "owner, day"),
            false => ("CAST(NULL AS BIGINT) AS day", "owner"),
        };
        let select = format!(
            "SELECT owner, {day}, {}, {}, {}, {} FROM owner_usage WHERE day >= $1 AND day <= $2 \
             AND ($3 = 0 OR owner = $4) GROUP BY {group} ORDER BY {group} LIMIT $5",
            sum("scored_pairs"),
            sum("scored_completions"),
            sum("scored_tokens"),
            sum("training_device_us"),
        );
        let rows: Vec<UsageRow> = sqlx::query_as(AssertSqlSafe(select))
            .bind(first)
            .bind(last)
            .bind(i64::from(owner.is_some()))
            .bind(owner.unwrap_or_default())
            .bind(limit as i64)
            .fetch_all(&self.readers)
            .await?;
        Ok(rows.into_iter().map(OwnerUsage::from).collect())
    }
}
