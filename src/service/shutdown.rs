//! Shutdown signal.

use std::sync::Arc;

use tokio::sync::watch;

use super::error::{Result, ServiceError};

/// Flag that is set once when the server begins to shut down. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Shutdown(Arc<watch::Sender<bool>>);

impl Default for Shutdown {
    fn default() -> Self {
        Shutdown(Arc::new(watch::channel(false).0))
    }
}

impl Shutdown {
    /// Begins the shutdown.
    pub fn begin(&self) {
        self.0.send_replace(true);
    }

    /// Returns true if the server is shutting down.
    pub fn has_begun(&self) -> bool {
        *self.0.borrow()
    }

    /// Checks that the server accepts new work.
    ///
    /// # Errors
    /// `Unavailable` (`DRAINING`) if it is shutting down; the client may retry with another
    /// replica.
    pub fn refuse_new_work(&self) -> Result<()> {
        if self.has_begun() {
            Err(ServiceError::draining())
        } else {
            Ok(())
        }
    }

    /// Returns a receiver that is notified when the shutdown begins.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.0.subscribe()
    }
}
