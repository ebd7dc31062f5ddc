//! Blocking work in asynchronous code.

use super::error::{Result, ServiceError};

/// Runs a blocking function on a thread pool, so that it does not block a tokio worker thread.
///
/// # Errors
/// `Internal` if the function panics.
pub(super) async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(f)
        .await
        .map_err(|e| ServiceError::internal(format!("a background task failed: {e}")))
}
