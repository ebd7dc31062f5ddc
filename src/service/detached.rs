//! Work that goes on without its caller.
//!
//! A call's future is dropped at the `await` that it has reached when its client leaves or its time
//! limit passes. Work that must not end half done, such as removing a row and then its files, runs
//! in a task of its own. The server waits for these tasks before it ends.

use std::future::Future;
use std::time::Duration;

use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use super::error::{Result, ServiceError};

/// Tasks whose callers may have left. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct DetachedWork(TaskTracker);

impl DetachedWork {
    /// Runs `work` to its end, also if the caller leaves, and returns its result. It begins when
    /// the returned future is polled first.
    ///
    /// # Errors
    /// The errors of `work`; `Internal` if it panics.
    pub async fn to_its_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.0
            .spawn(work.in_current_span())
            .await
            .map_err(|e| ServiceError::internal(format!("a background task failed: {e}")))?
    }

    /// Starts `work` and returns at once. The server waits for the work before it ends.
    pub fn start(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(work.in_current_span());
    }

    /// Waits until all work has ended. Returns false if `patience` passes first.
    pub async fn wait(&self, patience: Duration) -> bool {
        // Work may begin after this, too.
        self.0.close();
        tokio::time::timeout(patience, self.0.wait()).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    /// Starts a call whose work waits for the sender and then sends, and lets the caller leave.
    async fn abandoned_call(
        detached: &DetachedWork,
    ) -> (oneshot::Sender<()>, oneshot::Receiver<()>) {
        let (go_on, waits) = oneshot::channel();
        let (done, result) = oneshot::channel();
        let call = detached.to_its_end(async move {
            waits.await.map_err(ServiceError::internal)?;
            done.send(())
                .map_err(|()| ServiceError::internal("nobody waits"))
        });
        let left = tokio::time::timeout(Duration::from_millis(20), call).await;
        assert!(left.is_err(), "{left:?}");
        (go_on, result)
    }

    #[tokio::test]
    async fn work_goes_on_without_its_caller_and_the_server_waits_for_it() {
        let detached = DetachedWork::default();
        assert!(
            detached.wait(Duration::from_secs(60)).await,
            "the server waits although there is no work"
        );
        let (go_on, result) = abandoned_call(&detached).await;
        assert!(!detached.wait(Duration::from_millis(20)).await);
        go_on.send(()).unwrap();
        assert!(detached.wait(Duration::from_secs(60)).await);
        result.await.unwrap();
    }

    async fn defect() -> Result<()> {
        panic!("a defect");
    }

    #[tokio::test]
    async fn a_caller_that_stays_gets_the_result_or_the_error() {
        let detached = DetachedWork::default();
        let result = detached
            .to_its_end(async { Ok::<_, ServiceError>(7) })
            .await;
        assert_eq!(result.unwrap(), 7);
        let refused = async { Err::<(), _>(ServiceError::DeadlineExceeded) };
        let e = detached.to_its_end(refused).await.unwrap_err();
        assert!(matches!(e, ServiceError::DeadlineExceeded), "{e}");
        let e = detached.to_its_end(defect()).await.unwrap_err();
        assert!(matches!(e, ServiceError::Internal { .. }), "{e}");
    }
}
