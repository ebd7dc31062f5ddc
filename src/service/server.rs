//! Lifecycle of the server: readiness, state for health checks and metrics, and shutdown.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::auth::tokens::TokenService;
use super::detached::DetachedWork;
use super::error::Result;
use super::jobs::registry::RunRegistry;
use super::shutdown::Shutdown;
use super::store::Store;
use super::usage::UsageMeter;
use crate::domain::reason::Reason;
use crate::engine::Engine;
use crate::engine::api::{ModelInfo, ModelUse};

/// Time limit for the database's answer in a readiness check. Probes have limits of their own, of 1
/// second by default in Kubernetes, and a server without its database must stay ready.
const READY_TIMEOUT: Duration = Duration::from_millis(700);
/// Time limit for storing the usage that was counted last.
const USAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time for which the server, after its last answer, waits for changes whose callers have
/// left.
const DETACHED_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time for which the server waits until its connections to the database are closed. A
/// database that does not answer keeps those that are in use.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// A base model and the work that the server does with it.
#[derive(Clone, Debug, PartialEq)]
pub struct ServedModel {
    /// The model.
    pub info: ModelInfo,
    /// The work, in a fixed order.
    pub uses: Vec<ModelUse>,
}

/// Parts that live as long as the server, and its runners and background tasks.
pub struct Server {
    pub(super) engine: Engine,
    pub(super) store: Store,
    pub(super) runs: RunRegistry,
    pub(super) tokens: TokenService,
    /// The work that was done for each owner.
    pub(super) usage: UsageMeter,
    /// Changes that go on without their callers.
    pub(super) detached: DetachedWork,
    pub(super) shutdown: Shutdown,
    /// Maximum time that [`Server::drain`] waits for the runners.
    pub(super) drain_timeout: Duration,
    /// Runners of jobs. They end when the server drains.
    pub(super) runners: Mutex<Vec<JoinHandle<()>>>,
    /// Background tasks. They run until they are aborted.
    pub(super) background: Mutex<Vec<JoinHandle<()>>>,
}

impl Server {
    /// Returns the base models.
    ///
    /// # Errors
    /// The errors of [`Server::model`].
    pub fn models(&self) -> Result<Vec<ServedModel>> {
        let all = self.engine.models().into_iter();
        all.map(|info| self.served(info)).collect()
    }

    /// Returns one base model.
    ///
    /// # Errors
    /// `NotFound` if the server does not have it.
    pub fn model(&self, id: &str) -> Result<ServedModel> {
        self.served(self.engine.model(id)?)
    }

    fn served(&self, info: ModelInfo) -> Result<ServedModel> {
        let uses = self.engine.uses(&info.id)?;
        Ok(ServedModel { info, uses })
    }

    /// Returns the service that authenticates callers by their tokens.
    pub fn tokens(&self) -> &TokenService {
        &self.tokens
    }

    /// Returns the meter of the work that was done for each owner.
    pub fn usage(&self) -> &UsageMeter {
        &self.usage
    }

    /// Returns a readiness message if requests should be sent to this server. A database that does
    /// not answer within 0.7 seconds is only mentioned: the server can still score, and other
    /// replicas have the same problem.
    ///
    /// # Errors
    /// `Unavailable` (`DRAINING`) if the server is shutting down.
    pub async fn ready(&self) -> Result<&'static str> {
        self.shutdown.refuse_new_work()?;
        Ok(if self.store.ping_within(READY_TIMEOUT).await.is_ok() {
            "ok"
        } else {
            "ok, but the database does not answer"
        })
    }

    /// Returns the state of the server's parts, or the problem with each, for people.
    pub async fn parts(&self) -> Vec<(&'static str, std::result::Result<String, String>)> {
        let work = match self.shutdown.refuse_new_work() {
            Ok(()) => Ok("accepted".to_owned()),
            Err(e) => Err(e.to_string()),
        };
        let runs = self.runs.all();
        let waits: Vec<Reason> = runs.iter().filter_map(|run| run.waits_for()).collect();
        let database = match self.store.ping_within(READY_TIMEOUT).await {
            // Reads succeed on a full disk.
            Ok(()) if waits.contains(&Reason::StoreUnavailable) => Err(
                "answers, but the last write of a job failed: see the log, and whether its disk \
                 is full or read-only"
                    .to_owned(),
            ),
            Ok(()) => Ok("answers".to_owned()),
            Err(e) => Err(format!("does not answer: {e}")),
        };
        let models: Vec<String> = self.engine.models().into_iter().map(|m| m.id).collect();
        let mut parts = vec![
            ("new work", work),
            ("database", database),
            ("models", Ok(models.join(", "))),
            ("jobs that run here", state_of_runs(runs.len(), &waits)),
        ];
        let issuer = self.tokens.issuer_state();
        parts.extend(issuer.map(|state| ("OIDC issuer", state)));
        parts
    }

    /// Returns the gauges of all runs in this process as (job id, gauge name, value).
    pub fn run_gauges(&self) -> Vec<(String, &'static str, f64)> {
        self.runs.gauges()
    }

    /// Shuts down: refuses new work, waits at most `drain_timeout` for running jobs to write a
    /// checkpoint and go back to the queue, and stops the background tasks. Open calls may go on
    /// until [`Server::close`].
    pub async fn drain(&self) {
        self.shutdown.begin();
        self.engine.drain();
        self.runs.drain();
        let runners =
            std::mem::take(&mut *self.runners.lock().unwrap_or_else(PoisonError::into_inner));
        let all = async {
            for runner in runners {
                let _ = runner.await;
            }
        };
        if tokio::time::timeout(self.drain_timeout, all).await.is_err() {
            tracing::warn!(
                "a running job did not write a checkpoint in time: it will continue from its \
                 previous one"
            );
        }
        for task in self
            .background
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .drain(..)
        {
            task.abort();
        }
        self.store_usage().await;
    }

    /// Ends the use of the database, when all calls have ended. Before that it waits at most 5
    /// seconds for changes whose callers have left. Calls that ended after the drain are counted,
    /// too. A database that does not answer delays the end by at most 8 seconds.
    pub async fn close(&self) {
        if !self.detached.wait(DETACHED_TIMEOUT).await {
            tracing::warn!(
                "a change whose caller has left did not end in time: files of what was deleted may \
                 be left"
            );
        }
        self.store_usage().await;
        let closing = tokio::time::timeout(CLOSE_TIMEOUT, self.store.close());
        if closing.await.is_err() {
            tracing::warn!("the database does not answer: its connections are not closed");
        }
    }

    async fn store_usage(&self) {
        match tokio::time::timeout(USAGE_TIMEOUT, self.usage.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::warn!(error = %e, "the last usage cannot be stored"),
            Err(_) => tracing::warn!("the database does not answer: the last usage is not stored"),
        }
    }
}

/// Returns the number of runs. If some of them wait for storage (`waits`), it is a problem.
fn state_of_runs(runs: usize, waits: &[Reason]) -> std::result::Result<String, String> {
    if waits.is_empty() {
        return Ok(runs.to_string());
    }
    let mut reasons: Vec<&str> = waits.iter().map(|reason| reason.name()).collect();
    reasons.sort_unstable();
    reasons.dedup();
    let (number, reasons) = (waits.len(), reasons.join(", "));
    Err(format!(
        "{runs}, of which {number} cannot store or read something and wait: {reasons}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_wait_for_storage_are_a_problem_with_its_reasons() {
        assert_eq!(state_of_runs(2, &[]), Ok("2".to_owned()));
        let (store, disk) = (Reason::StoreUnavailable, Reason::StorageFull);
        assert_eq!(
            state_of_runs(4, &[store, disk, store]),
            Err(
                "4, of which 3 cannot store or read something and wait: STORAGE_FULL, \
                 STORE_UNAVAILABLE"
                    .to_owned()
            )
        );
    }
}
