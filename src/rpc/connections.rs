//! Limits the number of open connections of a port and closes idle ones. Each connection uses a
//! file descriptor, and files, the database and probes need descriptors, too. Without a limit, a
//! client could use them all, even without a token.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Time without an open call after which a connection is closed.
const MAX_IDLE: Duration = Duration::from_secs(300);
/// Interval at which idle connections are closed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(15);
/// Minimum idle time before a connection may be closed to admit a new one when the limit is
/// reached. It gives a new connection time to send its first request.
const MIN_IDLE: Duration = Duration::from_secs(1);
/// Interval at which the server looks again for a place for an accepted connection.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// The open connections of a port, and the limit on their number.
#[derive(Debug)]
pub(super) struct Connections {
    places: Arc<Semaphore>,
    open: Mutex<HashMap<u64, Arc<Activity>>>,
    next_id: AtomicU64,
}

/// Open calls and idle time of a connection.
#[derive(Debug)]
pub(super) struct Activity {
    /// Calls that have not sent all of their answer yet.
    calls: AtomicUsize,
    /// Time of the last activity: the end of the last counted call, or the last call of
    /// [`Activity::touch`]. It is meaningful only while `calls` is 0.
    idle_since: Mutex<Instant>,
    close: CancellationToken,
}

/// A connection's place among the limited number; dropping it frees the place.
#[derive(Debug)]
pub(super) struct Place {
    pub activity: Arc<Activity>,
    id: u64,
    connections: Arc<Connections>,
    _permit: OwnedSemaphorePermit,
}

/// Guard of an open call; dropping it ends the call.
#[derive(Debug)]
pub(super) struct OpenCall(Arc<Activity>);

impl Activity {
    fn new() -> Self {
        Activity {
            calls: AtomicUsize::new(0),
            idle_since: Mutex::new(Instant::now()),
            close: CancellationToken::new(),
        }
    }

    /// Counts a call as open until the result is dropped.
    pub fn begin_call(self: &Arc<Self>) -> OpenCall {
        self.calls.fetch_add(1, Ordering::AcqRel);
        OpenCall(self.clone())
    }

    /// Restarts the idle time. This is for activity that is not counted as an open call.
    pub fn touch(&self) {
        *self
            .idle_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Returns a token that is cancelled when the connection must be closed.
    pub fn closing(&self) -> CancellationToken {
        self.close.clone()
    }

    /// Returns the time since the last activity, or `None` while a call is open.
    fn idle(&self) -> Option<Duration> {
        if self.calls.load(Ordering::Acquire) > 0 {
            return None;
        }
        Some(
            self.idle_since
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .elapsed(),
        )
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        // The time is set before the count, so that a reader that sees no open call sees the new
        // time.
        self.0.touch();
        self.0.calls.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.lock().remove(&self.id);
    }
}

impl Connections {
    /// Creates a set of at most `limit` connections. A background task closes idle connections
    /// until the set and all of its places are dropped.
    pub fn new(limit: usize) -> Arc<Self> {
        let connections = Arc::new(Connections {
            places: Arc::new(Semaphore::new(limit)),
            open: Mutex::default(),
            next_id: AtomicU64::new(0),
        });
        let swept = Arc::downgrade(&connections);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_INTERVAL).await;
                let Some(connections) = swept.upgrade() else {
                    return;
                };
                connections.close_idle(MAX_IDLE);
            }
        });
        connections
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Activity>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place for an accepted connection and returns it. While all places are taken,
    /// each retry closes the connection that has been idle longest, if any is idle.
    pub async fn place(self: &Arc<Self>) -> Place {
        loop {
            if let Ok(permit) = self.places.clone().try_acquire_owned() {
                let (id, activity) = (
                    self.next_id.fetch_add(1, Ordering::Relaxed),
                    Arc::new(Activity::new()),
                );
                self.lock().insert(id, activity.clone());
                return Place {
                    activity,
                    id,
                    connections: self.clone(),
                    _permit: permit,
                };
            }
            self.close_idlest();
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Closes the connection that has been idle longest, if it has been idle for [`MIN_IDLE`].
    fn close_idlest(&self) {
        let open = self.lock();
        let closable = open
            .values()
            .filter(|a| !a.close.is_cancelled())
            .filter_map(|a| Some((a.idle()?, a)));
        if let Some((_, idlest)) = closable
            .filter(|(idle, _)| *idle >= MIN_IDLE)
            .max_by_key(|(idle, _)| *idle)
        {
            idlest.close.cancel();
        }
    }

    /// Closes all connections that have been idle for `limit`.
    fn close_idle(&self, limit: Duration) {
        let open = self.lock();
        open.values()
            .filter(|a| a.idle().is_some_and(|idle| idle >= limit))
            .for_each(|a| a.close.cancel());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_port_closes_the_idlest_connection_and_never_one_with_a_call() {
        let connections = Connections::new(3);
        let busy = connections.place().await;
        let call = busy.activity.begin_call();
        let first = connections.place().await;
        tokio::time::sleep(Duration::from_millis(10)).await;
        let second = connections.place().await;
        // A further connection waits until the first idle one may be closed.
        let waiting = tokio::spawn({
            let connections = connections.clone();
            async move { connections.place().await }
        });
        first.activity.closing().cancelled().await;
        assert!(!busy.activity.close.is_cancelled() && !second.activity.close.is_cancelled());
        drop(first);
        let third = waiting.await.unwrap();
        drop((second, third));
        assert_eq!(connections.lock().len(), 1);
        connections.close_idle(Duration::ZERO);
        assert!(!busy.activity.close.is_cancelled());
        // The connection becomes idle when its call ends.
        drop(call);
        connections.close_idle(MAX_IDLE);
        assert!(!busy.activity.close.is_cancelled());
        connections.close_idle(Duration::ZERO);
        assert!(busy.activity.close.is_cancelled());
    }
}
