//! Notifications between replicas through PostgreSQL. Every change of a job is announced when its
//! transaction commits.

use std::time::Duration;

use sqlx::postgres::PgListener;
use sqlx::{Any, Transaction};

use super::{Dialect, Store};
use crate::domain::job::{Job, JobState};
use crate::service::error::Result;

const NOTIFY_CHANNEL: &str = "bradley_jobs";
/// Delay before a broken connection is opened again.
const RECONNECT_DELAY: Duration = Duration::from_secs(1);

/// Notice that another replica changed a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Id of the job.
    pub job: String,
    /// Sequence number of the newest event; 0 if the change has no event.
    pub sequence: u64,
    /// State of the job.
    pub state: JobState,
}

impl Store {
    /// Announces a change of a job. PostgreSQL delivers it when the transaction commits.
    pub(super) async fn announce(
        &self,
        tx: &mut Transaction<'_, Any>,
        job: &Job,
        sequence: u64,
    ) -> Result<()> {
        if self.dialect == Dialect::Postgres {
            let notice = format!(
                "{} {} {sequence} {}",
                self.replica,
                job.id,
                job.state.name()
            );
            let tell = "SELECT COUNT(*) FROM (SELECT pg_notify($1, $2)) AS told";
            sqlx::query(tell)
                .bind(NOTIFY_CHANNEL)
                .bind(notice)
                .execute(&mut **tx)
                .await?;
        }
        Ok(())
    }

    /// Calls `on_notice` for every change by another replica, forever. `None` means that changes
    /// may have been missed while there was no connection. Returns at once if the database is
    /// SQLite, which has no other replicas.
    pub async fn listen(&self, on_notice: impl Fn(Option<Notice>)) {
        if self.dialect != Dialect::Postgres {
            return;
        }
        loop {
            match self.listener().await {
                Ok(mut listener) => {
                    on_notice(None);
                    loop {
                        match listener.try_recv().await {
                            Ok(Some(notification)) => {
                                if let Some(notice) = self.parse(notification.payload()) {
                                    on_notice(Some(notice));
                                }
                            }
                            // The listener has reconnected.
                            Ok(None) => on_notice(None),
                            Err(e) => {
                                warn_not_listening(&e);
                                break;
                            }
                        }
                    }
                }
                Err(e) => warn_not_listening(&e),
            }
            tokio::time::sleep(RECONNECT_DELAY).await;
        }
    }

    async fn listener(&self) -> sqlx::Result<PgListener> {
        let mut listener = PgListener::connect(&self.url).await?;
        listener.listen(NOTIFY_CHANNEL).await?;
        Ok(listener)
    }

    /// Parses a notice; `None` if this replica sent it or it is not valid.
    fn parse(&self, payload: &str) -> Option<Notice> {
        let mut words = payload.split(' ');
        let (replica, job, sequence, state) =
            (words.next()?, words.next()?, words.next()?, words.next()?);
        (replica != self.replica).then_some(())?;
        Some(Notice {
            job: job.to_owned(),
            sequence: sequence.parse().ok()?,
            state: JobState::parse(state)?,
        })
    }
}

fn warn_not_listening(e: &sqlx::Error) {
    tracing::warn!(
        error = %e,
        "LISTEN on the database failed: changes by other replicas are noticed later"
    );
}
