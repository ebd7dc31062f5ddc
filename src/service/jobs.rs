//! Training jobs: creation, queries, changes of state, and running.

pub(super) mod create;
pub mod estimate;
pub(super) mod init_adapter;
pub(super) mod inputs;
pub(super) mod leased_job;
pub mod lifecycle;
mod postponed;
pub(super) mod registry;
mod resume;
pub(super) mod runner;
pub(super) mod validate;

use tokio_stream::wrappers::ReceiverStream;

use self::create::JobCreator;
use self::estimate::{JobEstimate, JobEstimator};
use self::registry::RunRegistry;
use super::artifacts::Artifacts;
use super::auth::access::own_job;
use super::detached::DetachedWork;
use super::error::{Result, ServiceError};
use super::events::EventFeed;
use super::policies::PolicyResolver;
use super::store::{Page, Store};
use crate::domain::access::{Caller, Whose};
use crate::domain::job::{Event, Job, JobRequest, JobState};
use crate::engine::Engine;

/// Creates, reads and changes training jobs. `runner` runs them.
pub struct JobService {
    pub(super) store: Store,
    pub(super) artifacts: Artifacts,
    pub(super) engine: Engine,
    pub(super) events: EventFeed,
    pub(super) runs: RunRegistry,
    pub(super) policies: PolicyResolver,
    pub(super) creator: JobCreator,
    pub(super) estimator: JobEstimator,
    /// Runs the changes of jobs, which must not end half done.
    pub(super) detached: DetachedWork,
    /// Highest priority that a client may give its jobs. Administrators may give any.
    pub(super) max_client_priority: i32,
}

impl JobService {
    /// Validates a job and adds it to the queue. With `validate_only` the job is returned but not
    /// stored. A repeated `request_id` returns the job of the first request.
    ///
    /// # Errors
    /// `InvalidArgument` for bad fields, `NotFound` if a model or checkpoint does not exist,
    /// `FailedPrecondition` if an input cannot be used, `AlreadyExists` if `request_id` belongs to
    /// a different request, `ResourceExhausted` if the owner has too many unfinished jobs or the
    /// job needs too much memory, `Unavailable` if the server is shutting down.
    pub async fn create_job(
        &self,
        caller: &Caller,
        request: JobRequest,
        request_id: Option<String>,
        validate_only: bool,
    ) -> Result<Job> {
        self.creator
            .create_job(caller, request, request_id, validate_only)
            .await
    }

    /// Estimates the cost of a job without creating it.
    ///
    /// # Errors
    /// The errors of [`JobService::create_job`], except those that are found only when a job is
    /// stored; and those of reading the rows, with which the job would fail.
    pub async fn estimate_job(&self, caller: &Caller, request: JobRequest) -> Result<JobEstimate> {
        self.estimator.estimate_job(caller, request).await
    }

    /// Returns one job.
    ///
    /// # Errors
    /// `PermissionDenied` if the job does not exist or belongs to another client; `NotFound` for
    /// administrators.
    pub async fn get_job(&self, caller: &Caller, id: &str) -> Result<Job> {
        own_job(&self.store, caller, id).await
    }

    /// Returns a page of `whose` jobs that are in one of `states` (in any state if empty), newest
    /// first.
    ///
    /// # Errors
    /// `InvalidArgument` for a page token that this list did not return.
    pub async fn list_jobs(
        &self,
        caller: &Caller,
        whose: Whose,
        states: &[JobState],
        page_size: usize,
        page_token: &str,
    ) -> Result<Page<Job>> {
        self.store
            .jobs(caller.listed_owner(whose), states, page_size, page_token)
            .await
    }

    /// Returns at most `limit` events after the sequence number `after`, and `true` if there are
    /// more.
    ///
    /// # Errors
    /// `OutOfRange` if `after` is beyond the newest event, or if the events that follow it have
    /// been deleted.
    pub async fn list_events(
        &self,
        caller: &Caller,
        job: &str,
        after: u64,
        limit: usize,
    ) -> Result<(Vec<Event>, bool)> {
        self.check_cursor(caller, job, after).await?;
        let mut events = self.store.events(job, after, limit + 1).await?;
        let more = events.len() > limit;
        events.truncate(limit);
        Ok((events, more))
    }

    /// Returns a stream of all events after the sequence number `after`: first the stored ones,
    /// then new ones as they are stored. The stream ends with the job. If `tail` is above 0, it
    /// begins with at most the `tail` newest events, however many more are stored.
    ///
    /// # Errors
    /// The errors of [`JobService::list_events`]. With `tail`, only `after` beyond the newest event
    /// is `OutOfRange`.
    pub async fn stream_events(
        &self,
        caller: &Caller,
        job: &str,
        after: u64,
        tail: u32,
    ) -> Result<ReceiverStream<Result<Event>>> {
        let after = match tail {
            0 => after,
            tail => {
                own_job(&self.store, caller, job).await?;
                after.max(self.store.sequence_before_newest(job, tail).await?)
            }
        };
        self.check_cursor(caller, job, after).await?;
        Ok(self.events.stream(caller.clone(), job.to_owned(), after))
    }

    async fn check_cursor(&self, caller: &Caller, job: &str, after: u64) -> Result<()> {
        own_job(&self.store, caller, job).await?;
        let newest = self.store.newest_sequence(job).await?;
        if after > newest {
            let message = format!(
                "after_sequence is {after}, but the newest event of trainingJobs/{job} is \
                 {newest}: use the sequence of an event that was received"
            );
            return Err(ServiceError::OutOfRange { message });
        }
        // Reads one event here, so that an expired cursor fails the call itself instead of the
        // stream.
        self.store.events(job, after, 1).await.map(|_| ())
    }
}
