//! Live events. Nothing is delivered that is not stored: a stream only learns here that there is
//! more to read.

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
use crate::telemetry::counted::Counted;

/// Events read from the store at a time.
const PAGE: usize = 256;
/// Events that wait for a slow client; more stay in the store.
const BUFFER: usize = 64;

/// The event streams of jobs; clones share them.
#[derive(Clone)]
pub(super) struct EventFeed {
    /// The newest stored sequence of each job that somebody follows.
    followed: Arc<Mutex<HashMap<String, watch::Sender<u64>>>>,
    store: Store,
    /// Streams end with the tokens of their callers.
    tokens: TokenService,
    shutdown: Shutdown,
}

impl EventFeed {
    /// Creates a feed that nobody follows.
    pub fn new(store: Store, tokens: TokenService, shutdown: Shutdown) -> Self {
        EventFeed { followed: Arc::default(), store, tokens, shutdown }
    }

    /// Tells followers that `job` has events up to `sequence`.
    pub fn notify(&self, job: &str, sequence: u64) {
        if let Some(sender) = self.followed.lock().unwrap_or_else(PoisonError::into_inner).get(job)
        {
            // Two changes of a job may be told in the other order: the newest never goes back.
            sender.send_if_modified(|newest| {
                let later = sequence > *newest;
                *newest = sequence.max(*newest);
                later
            });
        }
    }

    /// The jobs that somebody follows.
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
        followed.entry(job.to_owned()).or_insert_with(|| watch::channel(0).0).subscribe()
    }

    /// Every event after `after`, stored ones first, then live until the job has ended. When the
    /// server stops the stream ends with `Unavailable`: the client goes on elsewhere from its last
    /// sequence. It ends with the caller's token, too.
    pub fn stream(&self, caller: Caller, job: String, after: u64) -> ReceiverStream<Result<Event>> {
        let (sender, receiver) = mpsc::channel(BUFFER);
        let (tokens, store, mut draining) =
            (self.tokens.clone(), self.store.clone(), self.shutdown.subscribe());
        // Subscribed before the first read: an event stored in between is noticed.
        let mut changes = self.follow(&job);
        tokio::spawn(async move {
            let _open = Counted::new("bradley_event_streams");
            let mut cursor = after;
            let invalid = tokens.until_invalid(&caller);
            tokio::pin!(invalid);
            loop {
                let page = match store.events(&job, cursor, PAGE).await {
                    Ok(page) => page,
                    Err(e) => {
                        let _ = sender.send(Err(e)).await;
                        return;
                    }
                };
                let more = page.len() == PAGE;
                for event in page {
                    cursor = event.sequence;
                    let last =
                        matches!(&event.kind, EventKind::StateChange { to, .. } if to.is_final());
                    if sender.send(Ok(event)).await.is_err() || last {
                        return;
                    }
                }
                if more {
                    continue;
                }
                match store.job(&job).await {
                    // The cursor is at the last event already.
                    Ok(j)
                        if j.state.is_final()
                            && store
                                .newest_sequence(&job)
                                .await
                                .is_ok_and(|newest| newest <= cursor) =>
                    {
                        return;
                    }
                    Ok(_) => {}
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
                    gone = async { changes.wait_for(|newest| *newest > cursor).await.is_err() } => if gone { return } else { false },
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
