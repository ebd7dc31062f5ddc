//! Limits on concurrent work.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::{Result, ServiceError};

/// A fixed number of permits, which clones share. Move the permit into the work it is for, so that
/// it is not released when the caller disconnects while the work still runs.
#[derive(Clone, Debug)]
pub(super) struct Limiter(Arc<Semaphore>);

impl Limiter {
    /// Creates a limiter with `permits` permits.
    pub fn new(permits: usize) -> Self {
        Limiter(Arc::new(Semaphore::new(permits)))
    }

    /// Waits for a permit; callers are served in the order of their arrival.
    ///
    /// # Errors
    /// `Unavailable` if the limiter is closed.
    pub async fn acquire(&self) -> Result<OwnedSemaphorePermit> {
        self.acquire_many(1).await
    }

    /// Waits until `permits` permits are free and takes them together.
    ///
    /// # Errors
    /// `Unavailable` if the limiter is closed.
    pub async fn acquire_many(&self, permits: u32) -> Result<OwnedSemaphorePermit> {
        self.0
            .clone()
            .acquire_many_owned(permits)
            .await
            .map_err(|_| ServiceError::draining())
    }
}
