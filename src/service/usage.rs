//! Counts the work that is done for each owner, and reports it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::error::{Result, ServiceError};
use super::store::{Store, now};
use crate::domain::access::Caller;
use crate::domain::usage::{OwnerUsage, Usage, day_text};

/// Interval at which counted work is stored.
const FLUSH_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of owners and days whose work waits to be stored. The work of further ones is not
/// counted while the database does not answer.
const MAX_PENDING: usize = 100_000;
/// Maximum number of records in an answer.
const MAX_RECORDS: usize = 10_000;
/// Maximum number of days in a report.
const MAX_DAYS: i64 = 400;
const DAY_MS: i64 = 24 * 3600 * 1000;

/// Work that is counted, by owner and day.
type Pending = BTreeMap<(String, i64), Usage>;

/// Counts work, and stores it from time to time. Clones share the counts.
#[derive(Clone)]
pub struct UsageMeter {
    store: Store,
    pending: Arc<Mutex<Pending>>,
    /// Held while counts are stored.
    storing: Arc<tokio::sync::Mutex<()>>,
}

/// Days and owner of a report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageQuery {
    /// The owner; `None` means the caller, for administrators everyone.
    pub owner: Option<String>,
    /// Number of the first day: days since 1970-01-01 (UTC).
    pub first: i64,
    /// Number of the last day, which is included.
    pub last: i64,
    /// True for a record of each day.
    pub by_day: bool,
}

/// Returns the number of this day since 1970 (UTC).
pub fn today() -> i64 {
    now().div_euclid(DAY_MS)
}

impl UsageMeter {
    /// Creates a meter without counts.
    pub(super) fn new(store: Store) -> Self {
        UsageMeter {
            store,
            pending: Arc::default(),
            storing: Arc::default(),
        }
    }

    /// Counts work that was done now.
    pub(super) fn count(&self, owner: &str, work: Usage) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (owner.to_owned(), today());
        if pending.len() < MAX_PENDING || pending.contains_key(&key) {
            *pending.entry(key).or_default() += work;
        }
    }

    /// Stores what was counted since the last time. If the database fails, the counts wait for the
    /// next time.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub(super) async fn flush(&self) -> Result<()> {
        // A task of its own: a caller that leaves during a commit would not learn whether it took
        // effect, and the counts would be stored twice.
        let meter = self.clone();
        tokio::spawn(async move { meter.store_pending().await })
            .await
            .map_err(ServiceError::internal)?
    }

    async fn store_pending(&self) -> Result<()> {
        // The last flush of a shutdown waits for one that is under way.
        let _storing = self.storing.lock().await;
        let taken =
            std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        if taken.is_empty() {
            return Ok(());
        }
        // If the database fails, the counts return to the others.
        let mut unstored = Unstored {
            meter: self,
            work: taken,
        };
        self.store.add_usage(&unstored.work).await?;
        unstored.work.clear();
        Ok(())
    }

    /// Stores the counts every ten seconds, forever.
    pub(super) async fn store_periodically(&self) {
        loop {
            tokio::time::sleep(FLUSH_INTERVAL).await;
            if let Err(e) = self.flush().await {
                tracing::debug!(error = %e, "the usage cannot be stored yet");
            }
        }
    }

    /// Returns the work of a range of days.
    ///
    /// # Errors
    /// `PermissionDenied` if a caller who is no administrator asks for another owner,
    /// `InvalidArgument` if the range ends before it begins or is too long, or if there are too
    /// many records.
    pub async fn report(&self, caller: &Caller, query: &UsageQuery) -> Result<Vec<OwnerUsage>> {
        let owner = match (&query.owner, caller.visible_owner()) {
            (Some(asked), Some(own)) if asked != own => {
                return Err(ServiceError::PermissionDenied {
                    message: "only administrators may see the usage of others: leave out the \
                              owner to see your own"
                        .to_owned(),
                });
            }
            (Some(asked), _) => Some(asked.as_str()),
            (None, own) => own,
        };
        if query.first > query.last {
            return Err(ServiceError::invalid(
                "start_date",
                format!(
                    "is {}, after the last day, {}: choose an earlier day",
                    day_text(query.first),
                    day_text(query.last)
                ),
            ));
        }
        let length = query.last - query.first + 1;
        if length > MAX_DAYS {
            return Err(ServiceError::invalid(
                "start_date",
                format!("begins a range of {length} days: ask for at most {MAX_DAYS}"),
            ));
        }
        self.flush().await?;
        let days = (query.first, query.last);
        let found = self
            .store
            .usage(owner, days, query.by_day, MAX_RECORDS + 1)
            .await?;
        if found.len() > MAX_RECORDS {
            return Err(ServiceError::invalid(
                "by_day",
                format!("gives more than {MAX_RECORDS} records: ask for fewer days or one owner"),
            ));
        }
        Ok(found)
    }
}

/// Counts on their way to the database. What is left when it is dropped is counted again.
struct Unstored<'a> {
    meter: &'a UsageMeter,
    work: Pending,
}

impl Drop for Unstored<'_> {
    fn drop(&mut self) {
        let mut pending = self
            .meter
            .pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (key, usage) in std::mem::take(&mut self.work) {
            *pending.entry(key).or_default() += usage;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::store::StoreOptions;

    /// A caller may leave at any moment, also while a commit is under way whose answer it then does
    /// not get.
    #[tokio::test(flavor = "multi_thread")]
    async fn work_is_stored_once_though_callers_leave_while_it_is_stored() {
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions::default();
        let store = Store::open(dir.path(), &options).await.unwrap();
        let meter = UsageMeter::new(store.clone());
        let one = Usage {
            scored_pairs: 1,
            ..Usage::default()
        };
        for i in 0..200 {
            meter.count("team", one);
            let patience = Duration::from_micros(i * 20);
            let _ = tokio::time::timeout(patience, meter.flush()).await;
        }
        meter.flush().await.unwrap();
        let days = (today() - 1, today() + 1);
        let stored = store.usage(None, days, false, 10).await.unwrap();
        assert_eq!(stored.len(), 1);
        assert_eq!(stored[0].usage.scored_pairs, 200);
        store.close().await;
    }
}
