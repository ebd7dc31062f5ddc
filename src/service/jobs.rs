//! Training jobs: made, looked at, changed, run.

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
use super::error::{Result, ServiceError};
use super::events::EventFeed;
use super::policies::PolicyResolver;
use super::store::{Page, Store};
use crate::domain::access::Caller;
use crate::domain::job::{Event, Job, JobRequest, JobState};
use crate::engine::Engine;

/// Makes, shows and changes training jobs. Running them is the `runner`'s.
pub struct JobService {
    pub(super) store: Store,
    pub(super) artifacts: Artifacts,
    pub(super) engine: Engine,
    pub(super) events: EventFeed,
    pub(super) runs: RunRegistry,
    pub(super) policies: PolicyResolver,
    pub(super) creator: JobCreator,
    pub(super) estimator: JobEstimator,
    /// The highest priority that a client may give its jobs; administrators may give any.
    pub(super) max_client_priority: i32,
}

impl JobService {
    /// Queues a job; see `CreateTrainingJob`.
    pub async fn create_job(
        &self,
        caller: &Caller,
        request: JobRequest,
        request_id: Option<String>,
        validate_only: bool,
    ) -> Result<Job> {
        self.creator.create_job(caller, request, request_id, validate_only).await
    }

    /// Estimates a job without making it.
    ///
    /// # Errors
    /// Those of [`JobService::create_job`], as far as they can be found now.
    pub async fn estimate_job(&self, caller: &Caller, request: JobRequest) -> Result<JobEstimate> {
        self.estimator.estimate_job(caller, request).await
    }

    /// Returns one job.
    pub async fn get_job(&self, caller: &Caller, id: &str) -> Result<Job> {
        own_job(&self.store, caller, id).await
    }

    /// Returns a page of the jobs in one of `states` (all when empty), newest first.
    pub async fn list_jobs(
        &self,
        caller: &Caller,
        states: &[JobState],
        page_size: usize,
        page_token: &str,
    ) -> Result<Page<Job>> {
        self.store.jobs(caller.shown(), states, page_size, page_token).await
    }

    /// Returns events after `after`, and whether there are more.
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

    /// Returns every event after `after`, stored ones first, then live; ends with the job.
    pub async fn stream_events(
        &self,
        caller: &Caller,
        job: &str,
        after: u64,
    ) -> Result<ReceiverStream<Result<Event>>> {
        self.check_cursor(caller, job, after).await?;
        Ok(self.events.stream(caller.clone(), job.to_owned(), after))
    }

    async fn check_cursor(&self, caller: &Caller, job: &str, after: u64) -> Result<()> {
        own_job(&self.store, caller, job).await?;
        let newest = self.store.newest_sequence(job).await?;
        if after > newest {
            let message = format!(
                "after_sequence is {after}, the newest event of trainingJobs/{job} is {newest}: use a sequence that was received"
            );
            return Err(ServiceError::OutOfRange { message });
        }
        // An expired cursor is refused at once, not by the stream.
        self.store.events(job, after, 1).await.map(|_| ())
    }
}
