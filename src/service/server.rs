//! The server's own life: whether it takes requests, what it shows of itself, and how it stops.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::auth::tokens::TokenService;
use super::error::Result;
use super::jobs::registry::RunRegistry;
use super::shutdown::Shutdown;
use super::store::Store;
use crate::engine::Engine;
use crate::engine::api::ModelInfo;

/// What runs as long as the server.
pub struct Server {
    pub(super) engine: Engine,
    pub(super) store: Store,
    pub(super) runs: RunRegistry,
    pub(super) tokens: TokenService,
    pub(super) shutdown: Shutdown,
    /// How long a drain may take.
    pub(super) drain_timeout: Duration,
    /// Each runs jobs until the drain.
    pub(super) runners: Mutex<Vec<JoinHandle<()>>>,
    /// They go on for ever.
    pub(super) background: Mutex<Vec<JoinHandle<()>>>,
}

impl Server {
    /// Returns the base models.
    pub fn models(&self) -> Vec<ModelInfo> {
        self.engine.models()
    }

    /// Returns one base model.
    pub fn model(&self, id: &str) -> Result<ModelInfo> {
        Ok(self.engine.model(id)?)
    }

    /// Returns who knows the callers by their tokens.
    pub fn tokens(&self) -> &TokenService {
        &self.tokens
    }

    /// Tells whether requests should come here: not while draining. With a store that is away the
    /// server still scores, and all replicas lack it alike, so that is said and no reason to send
    /// requests elsewhere.
    pub async fn ready(&self) -> Result<&'static str> {
        self.shutdown.refuse_new_work()?;
        Ok(if self.store.ping().await.is_ok() {
            "ok"
        } else {
            "ok, but the database does not answer"
        })
    }

    /// Returns gauges of each run of this process: its job, the gauge's name and its value.
    pub fn run_gauges(&self) -> Vec<(String, &'static str, f64)> {
        self.runs.gauges()
    }

    /// Refuses new work, lets running jobs write a checkpoint and go back to the queue, and closes
    /// the store, all within `drain_timeout`.
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
                "a running job did not reach a checkpoint in time: it continues from its last one"
            );
        }
        for task in self.background.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
        self.store.close().await;
    }
}
