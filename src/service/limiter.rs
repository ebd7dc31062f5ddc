//! Limits on work that is done side by side.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::{Result, ServiceError};

/// A number of permits, which clones share. A permit moves into the work that it is for: a caller
/// who leaves does not make room for more of it.
#[derive(Clone, Debug)]
pub(super) struct Limiter(Arc<Semaphore>);

impl Limiter {
    /// Creates a limiter with so many permits.
    pub fn new(permits: usize) -> Self {
        Limiter(Arc::new(Semaphore::new(permits)))
    }

    /// Waits for a permit, first come, first served.
    pub async fn acquire(&self) -> Result<OwnedSemaphorePermit> {
        self.acquire_many(1).await
    }

    /// Waits for several permits at once.
    pub async fn acquire_many(&self, permits: u32) -> Result<OwnedSemaphorePermit> {
        self.0.clone().acquire_many_owned(permits).await.map_err(|_| ServiceError::draining())
    }
}
