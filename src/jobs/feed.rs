//! Live events. Nothing is delivered that is not stored: a stream only learns here that there is more to read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::counted::Counted;
use super::error::{Result, ServiceError};
use super::service::Service;
use crate::domain::access::Caller;
use crate::domain::job::{Event, EventKind};

/// Events read from the store at a time.
const PAGE: usize = 256;
/// Events that wait for a slow client; more stay in the store.
const BUFFER: usize = 64;

/// The newest stored sequence of each job that somebody follows.
#[derive(Clone, Debug, Default)]
pub struct Feed(Arc<Mutex<HashMap<String, watch::Sender<u64>>>>);

impl Feed {
    /// Tells followers that `job` has events up to `sequence`.
    pub fn notify(&self, job: &str, sequence: u64) {
        if let Some(sender) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(job) {
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
        let followed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        followed.iter().filter(|(_, sender)| sender.receiver_count() > 0).map(|(job, _)| job.clone()).collect()
    }

    fn follow(&self, job: &str) -> watch::Receiver<u64> {
        let mut followed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        followed.retain(|_, sender| sender.receiver_count() > 0);
        followed.entry(job.to_owned()).or_insert_with(|| watch::channel(0).0).subscribe()
    }

    /// Every event after `after`, stored ones first, then live until the job has ended. When `draining` turns true the stream ends with
    /// `Unavailable`: the client goes on elsewhere from its last sequence. It ends with the caller's token, too.
    pub fn stream(&self, service: &Service, caller: Caller, job: String, after: u64) -> ReceiverStream<Result<Event>> {
        let (sender, receiver) = mpsc::channel(BUFFER);
        let (service, store, mut draining) = (service.clone(), service.inner.store.clone(), service.inner.draining.subscribe());
        // Subscribed before the first read: an event stored in between is noticed.
        let mut changes = self.follow(&job);
        tokio::spawn(async move {
            let _open = Counted::new("bradley_event_streams");
            let mut cursor = after;
            let invalid = service.until_invalid(&caller);
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
                    let last = matches!(&event.kind, EventKind::StateChange { to, .. } if to.is_final());
                    if sender.send(Ok(event)).await.is_err() || last {
                        return;
                    }
                }
                if more {
                    continue;
                }
                match store.job(&job).await {
                    // The cursor is at the last event already.
                    Ok(j) if j.state.is_final() && store.newest_sequence(&job).await.is_ok_and(|newest| newest <= cursor) => return,
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
