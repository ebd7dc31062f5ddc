//! The signal that the server is stopping.

use std::sync::Arc;

use tokio::sync::watch;

use super::error::{Result, ServiceError};

/// Turns on once, when the server begins to stop; clones share it.
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

    /// Returns true if the server is stopping.
    pub fn has_begun(&self) -> bool {
        *self.0.borrow()
    }

    /// Refuses new work when the server is stopping.
    ///
    /// # Errors
    /// `Unavailable` (`DRAINING`): the client may ask another replica.
    pub fn refuse_new_work(&self) -> Result<()> {
        if self.has_begun() { Err(ServiceError::draining()) } else { Ok(()) }
    }

    /// Returns a receiver that sees the shutdown begin.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.0.subscribe()
    }
}
