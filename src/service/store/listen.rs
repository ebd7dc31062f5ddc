//! What replicas tell each other through PostgreSQL: every stored change of a job is announced when
//! its transaction commits.

use std::time::Duration;

use sqlx::postgres::PgListener;
use sqlx::{Any, Transaction};

use super::{Dialect, Store};
use crate::domain::job::{Job, JobState};
use crate::service::error::Result;

const CHANNEL: &str = "bradley_jobs";
/// The wait before a broken connection is made again.
const RECONNECT: Duration = Duration::from_secs(1);

/// Another replica changed a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The job's id.
    pub job: String,
    /// Its newest event; 0 when the change has none.
    pub sequence: u64,
    /// Its state.
    pub state: JobState,
}

impl Store {
    /// Announces a change; it is told when the transaction commits.
    pub(super) async fn announce(
        &self,
        tx: &mut Transaction<'_, Any>,
        job: &Job,
        sequence: u64,
    ) -> Result<()> {
        if self.dialect == Dialect::Postgres {
            let notice = format!("{} {} {sequence} {}", self.replica, job.id, job.state.name());
            let tell = "SELECT COUNT(*) FROM (SELECT pg_notify($1, $2)) AS told";
            sqlx::query(tell).bind(CHANNEL).bind(notice).execute(&mut **tx).await?;
        }
        Ok(())
    }

    /// Tells `told` what other replicas change, for ever; `None` stands for what may have been
    /// missed while there was no connection. Returns at once when there are no other replicas.
    pub async fn listen(&self, told: impl Fn(Option<Notice>)) {
        if self.dialect != Dialect::Postgres {
            return;
        }
        loop {
            match self.listener().await {
                Ok(mut listener) => {
                    told(None);
                    loop {
                        match listener.try_recv().await {
                            Ok(Some(notification)) => {
                                if let Some(notice) = self.parse(notification.payload()) {
                                    told(Some(notice));
                                }
                            }
                            // Connected again.
                            Ok(None) => told(None),
                            Err(e) => {
                                tracing::warn!(error = %e, "the database's notices cannot be read");
                                break;
                            }
                        }
                    }
                }
                Err(e) => tracing::warn!(error = %e, "the database's notices cannot be read"),
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }

    async fn listener(&self) -> sqlx::Result<PgListener> {
        let mut listener = PgListener::connect(&self.url).await?;
        listener.listen(CHANNEL).await?;
        Ok(listener)
    }

    /// A notice of another replica.
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
