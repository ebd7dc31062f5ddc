//! A server in the process of a command, for commands that load models themselves.

use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::failure::{Failure, Outcome};
use super::remote::open;
use super::serve;
use super::settings::{Settings, Sources};
use crate::rpc::client::{Client, Target};

/// Time between two health checks while the server starts.
const HEALTH_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Time limit for the answer to a health check.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

/// A server on a free loopback port.
pub(super) struct LoopbackServer {
    /// Address for clients, `http://127.0.0.1:PORT`.
    pub address: String,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<anyhow::Result<serve::Ended>>,
}

impl LoopbackServer {
    /// Starts a server with these settings, by name. It has no HTTP port. `BRADLEY_*` variables are
    /// meant for a deployment and do not apply to it; others, such as those of the hub, do.
    ///
    /// # Errors
    /// Returns a failure if a setting cannot be used, or there is no free port.
    pub(super) async fn start(
        settings: &[(&str, String)],
        sources: &Sources,
    ) -> Result<Self, Failure> {
        let failed = |e: &dyn std::fmt::Display| Failure::Failed(e.to_string());
        let fixed = [("listen", "127.0.0.1:0"), ("http_listen", "off")];
        let fixed = fixed.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let given = settings.iter().map(|(k, v)| ((*k).to_owned(), v.clone()));
        let own = Sources {
            flags: fixed.into_iter().chain(given).collect(),
            file: None,
            environment: sources
                .environment
                .iter()
                .filter(|(k, _)| !k.starts_with("BRADLEY_"))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
        };
        let settings = Settings::resolve(&own).map_err(|bad| Failure::Usage(bad.to_string()))?;
        let listener = TcpListener::bind(settings.listen)
            .await
            .map_err(|e| failed(&e))?;
        let address = listener.local_addr().map_err(|e| failed(&e))?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(serve::serve_on(settings, listener, None, async {
            let _ = stopped.await;
        }));
        Ok(LoopbackServer {
            address: format!("http://{address}"),
            stop,
            task,
        })
    }

    /// Connects and waits until the server answers. Its port is open from the start, but it answers
    /// only when the models are loaded.
    ///
    /// # Errors
    /// Returns a failure if the server has stopped, or is not ready within `limit`.
    pub(super) async fn connect_when_ready(&self, limit: Duration) -> Result<Client, Failure> {
        let client = open(&Target::plain(&self.address)).await?;
        let started = Instant::now();
        while started.elapsed() < limit {
            if self.task.is_finished() {
                return Err(Failure::Failed(
                    "the server stopped while it was starting; run `bradley serve --models \
                     MODEL` with the same model, --device and --precision to see why"
                        .into(),
                ));
            }
            let asked = tokio::time::timeout(ANSWER_LIMIT, client.health()).await;
            if matches!(asked, Ok(Ok(true))) {
                return Ok(client);
            }
            tokio::time::sleep(HEALTH_CHECK_INTERVAL).await;
        }
        Err(Failure::Failed(format!(
            "the server did not become ready within {} seconds",
            limit.as_secs()
        )))
    }

    /// Stops the server and waits until it has ended.
    ///
    /// # Errors
    /// Returns the failure with which it ended.
    pub(super) async fn stop(self) -> Outcome {
        let _ = self.stop.send(());
        // No setting but those of the command's flags applies, so the limits cannot be raised.
        let ended = self.task.await?.map_err(|e| {
            Failure::from(e)
                .replacing(", or raise memory_limit", "")
                .replacing(", or raise device_memory_limit", "")
        })?;
        match ended {
            serve::Ended::DeviceIdle => Ok(()),
            serve::Ended::DeviceBusy(result) => Ok(result?),
        }
    }
}
