//! Live event streams. Streams read events only from the store; this feed only tells them that
//! there is more to read. So nothing is delivered that is not stored.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::auth::tokens::TokenService;
use super::error::{Result, ServiceError};
use super::shutdown::Shutdown;
use super::store::Store;
use crate::domain::access::Caller;
use crate::domain::job::{Event, EventKind};
use crate::telemetry::gauge_guard::GaugeGuard;

/// Maximum number of events read from the store at a time.
const EVENTS_PER_READ: usize = 256;
/// Maximum number of events buffered for a slow client; further ones wait in the store.
const STREAM_BUFFER_EVENTS: usize = 64;

/// Event streams of jobs. Clones share them.
#[derive(Clone)]
pub(super) struct EventFeed {
    /// Newest sequence number that was announced of each followed job; 0 before the first one, and
    /// `u64::MAX` after the job's deletion.
    followed: Arc<Mutex<HashMap<String, watch::Sender<u64>>>>,
    store: Store,
    /// Used to end a stream when the caller's token is revoked or expires.
    tokens: TokenService,
    shutdown: Shutdown,
}

impl EventFeed {
    /// Creates a feed without followers.
    pub fn new(store: Store, tokens: TokenService, shutdown: Shutdown) -> Self {
        EventFeed {
            followed: Arc::default(),
            store,
            tokens,
            shutdown,
        }
    }

    /// Tells the followers of `job` that events up to `sequence` are stored.
    pub fn notify(&self, job: &str, sequence: u64) {
        if let Some(sender) = self
            .followed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(job)
        {
            // Notifications may arrive out of order; the newest sequence never decreases.
            sender.send_if_modified(|newest| {
                let later = sequence > *newest;
                *newest = sequence.max(*newest);
                later
            });
        }
    }

    /// Returns the ids of the jobs with at least one follower.
    pub fn followed(&self) -> Vec<String> {
        let followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        followed
            .iter()
            .filter(|(_, sender)| sender.receiver_count() > 0)
            .map(|(job, _)| job.clone())
            .collect()
    }

    fn follow(&self, job: &str) -> watch::Receiver<u64> {
        let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        followed.retain(|_, sender| sender.receiver_count() > 0);
        followed
            .entry(job.to_owned())
            .or_insert_with(|| watch::channel(0).0)
            .subscribe()
    }

    /// Returns a stream of all events after the sequence number `after`: first the stored ones,
    /// then new ones until the job has ended. When the server shuts down, the stream ends with
    /// `Unavailable`, and the client can continue elsewhere from its last sequence number. It also
    /// ends when the caller's token becomes invalid.
    pub fn stream(&self, caller: Caller, job: String, after: u64) -> ReceiverStream<Result<Event>> {
        let (sender, receiver) = mpsc::channel(STREAM_BUFFER_EVENTS);
        let (tokens, store, mut draining) = (
            self.tokens.clone(),
            self.store.clone(),
            self.shutdown.subscribe(),
        );
        // Subscribe before the first read, so that an event stored in between is noticed.
        let mut changes = self.follow(&job);
        tokio::spawn(async move {
            let _open = GaugeGuard::new("bradley_event_streams");
            let mut cursor = after;
            let invalid = tokens.until_invalid(&caller);
            tokio::pin!(invalid);
            loop {
                let page = match store.events(&job, cursor, EVENTS_PER_READ).await {
                    Ok(page) => page,
                    Err(e) => {
                        let _ = sender.send(Err(e)).await;
                        return;
                    }
                };
                let has_more = page.len() == EVENTS_PER_READ;
                for event in page {
                    cursor = event.sequence;
                    let last =
                        matches!(&event.kind, EventKind::StateChange { to, .. } if to.is_final());
                    // A slow reader must not go on with a token that is no longer valid.
                    let sent = tokio::select! {
                        sent = sender.send(Ok(event)) => sent,
                        e = &mut invalid => {
                            let _ = sender.send(Err(e)).await;
                            return;
                        }
                    };
                    if sent.is_err() || last {
                        return;
                    }
                }
                if has_more {
                    continue;
                }
                let is_over = match store.job(&job).await {
                    Ok(j) if j.state.is_final() => {
                        let newest = store.newest_sequence(&job).await;
                        newest.map(|newest| newest <= cursor)
                    }
                    Ok(_) => Ok(false),
                    Err(e) => Err(e),
                };
                match is_over {
                    // All events up to the last one have been sent.
                    Ok(true) => return,
                    Ok(false) => {}
                    Err(e) => {
                        let _ = sender.send(Err(e)).await;
                        return;
                    }
                }
                let drained = tokio::select! {
                    e = &mut invalid => {
                        let _ = sender.send(Err(e)).await;
                        return;
                    }
                    gone = async { changes.wait_for(|newest| *newest > cursor).await.is_err() } => {
                        if gone { return } else { false }
                    },
                    () = sender.closed() => return,
                    drained = async { draining.wait_for(|d| *d).await.is_ok() } => drained,
                };
                if drained {
                    let _ = sender.send(Err(ServiceError::draining())).await;
                    return;
                }
            }
        });
        ReceiverStream::new(receiver)
    }
}
