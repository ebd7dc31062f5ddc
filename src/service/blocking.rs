//! Work that holds up the thread that it runs on.

use super::error::{Result, ServiceError};

/// Runs what would hold up a tokio thread.
pub(super) async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(f)
        .await
        .map_err(|e| ServiceError::internal(format!("a background task failed: {e}")))
}
