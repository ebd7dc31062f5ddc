//! Job creation: validates the request, copies the adapter that the job starts from, and stores the
//! job once per `request_id`.

use tokio::sync::oneshot;

use super::init_adapter::{adopt_adapter, names_adapter};
use super::registry::RunRegistry;
use super::validate::{RequestValidator, is_request_id};
use crate::domain::access::Caller;
use crate::domain::job::{Job, JobRequest, JobState, Metrics, Progress};
use crate::domain::training::{LoraConfig, Method};
use crate::service::artifacts::Artifacts;
use crate::service::audit::audit;
use crate::service::detached::DetachedWork;
use crate::service::error::{Result, ServiceError};
use crate::service::limiter::Limiter;
use crate::service::shutdown::Shutdown;
use crate::service::store::jobs::Creation;
use crate::service::store::{Store, now};
use crate::telemetry::trace;

/// Creates jobs.
#[derive(Clone)]
pub(in crate::service) struct JobCreator {
    pub store: Store,
    pub artifacts: Artifacts,
    pub validator: RequestValidator,
    pub runs: RunRegistry,
    /// Shared limit on slow tasks; copying an adapter counts as one.
    pub slow_tasks: Limiter,
    pub detached: DetachedWork,
    pub shutdown: Shutdown,
    /// Maximum number of unfinished jobs per client.
    pub max_jobs_per_client: Option<u64>,
}

impl JobCreator {
    /// Validates a job and adds it to the queue.
    ///
    /// # Errors
    /// The errors of [`JobService::create_job`](super::JobService::create_job).
    pub async fn create_job(
        &self,
        caller: &Caller,
        request: JobRequest,
        request_id: Option<String>,
        validate_only: bool,
    ) -> Result<Job> {
        self.shutdown.refuse_new_work()?;
        let hash = serde_json::to_vec(&request)
            .map(|b| blake3::hash(&b).to_hex().to_string())
            .map_err(ServiceError::internal)?;
        let quota = self.max_jobs_per_client;
        let known = Creation {
            request_id: request_id.as_deref().filter(|id| is_request_id(id)),
            request_hash: &hash,
            quota,
        };
        // A repeated request gets its job, even if an input is gone or a limit has changed since.
        if !validate_only && let Some(job) = self.store.created_before(&caller.owner, known).await?
        {
            return Ok(job);
        }
        let request = self
            .validator
            .check_request(caller, request, request_id.as_deref())
            .await?;
        let job = draft(caller, request);
        if validate_only {
            return Ok(Job {
                id: String::new(),
                ..job
            });
        }
        // Runs in a separate task, which finishes even if the caller disconnects. Otherwise the
        // copied adapter of a job that is not stored would never be removed.
        let (creator, caller, (sender, created)) =
            (self.clone(), caller.clone(), oneshot::channel());
        let creating = async move {
            let creation = Creation {
                request_id: request_id.as_deref(),
                request_hash: &hash,
                quota,
            };
            let created = creator
                .store_job(job, creation, || sender.is_closed())
                .await;
            if let Ok(job) = &created {
                tracing::info!(job = job.id, state = job.state.name(), "job created");
                audit(&caller, "create", &format!("trainingJobs/{}", job.id));
                creator.runs.wake();
            }
            let _ = sender.send(created);
        };
        self.detached.start(creating);
        created.await.map_err(ServiceError::internal)?
    }

    /// Copies the adapter that a new job starts from and stores the job, unless the caller has
    /// disconnected meanwhile. If the job is not stored, the copy is removed.
    async fn store_job(
        &self,
        mut job: Job,
        creation: Creation<'_>,
        caller_left: impl Fn() -> bool,
    ) -> Result<Job> {
        let copied = match self.copy_init_adapter(&mut job, creation.request_id).await {
            Ok(()) if caller_left() => Err(ServiceError::DeadlineExceeded),
            copied => copied,
        };
        let (inserted, may_be_stored) = match copied {
            Ok(()) => {
                let inserted = self.store.insert_job(&job, creation).await;
                let may_be_stored = self.may_be_stored(&job, &inserted).await;
                (inserted, may_be_stored)
            }
            Err(e) => (Err(e), false),
        };
        if !may_be_stored && names_adapter(&job) {
            // A failure is ignored, and the copied adapter remains. A later sweep removes it from a
            // data directory that has always been a cache of an artifact store. Nothing removes it
            // from another data directory, or from the artifact store.
            let _ = self.artifacts.remove_job(&job.id).await;
        }
        inserted
    }

    /// Returns true if an insert with this result has stored the job or may have done so. Then its
    /// files must stay. The insert may have succeeded although its answer was lost.
    async fn may_be_stored(&self, job: &Job, inserted: &Result<Job>) -> bool {
        match inserted {
            Ok(stored) => stored.id == job.id,
            Err(e) => {
                self.store.may_still_insert(e)
                    || !matches!(
                        self.store.job(&job.id).await,
                        Err(ServiceError::NotFound { .. })
                    )
            }
        }
    }

    /// Copies the adapter that a new job starts from, if any, to the job's artifacts and pins its
    /// content hash. Nothing is copied if the same `request_id` has already created a job.
    async fn copy_init_adapter(&self, job: &mut Job, request_id: Option<&str>) -> Result<()> {
        let Method::Lora(LoraConfig {
            init_adapter: Some(name),
            ..
        }) = &job.request.spec.method
        else {
            return Ok(());
        };
        if self.store.has_created(&job.owner, request_id).await? {
            return Ok(());
        }
        let from = self.validator.adapters.find(name).await?;
        let _permit = self.slow_tasks.acquire().await?;
        let hash = self.artifacts.store_init_adapter(&job.id, &from).await?;
        if let Some(pins) = &mut job.request.pins {
            pins.init_adapter = Some(hash);
        }
        // The source folder may have changed since it was validated, so the settings are read
        // from the copy.
        adopt_adapter(&mut job.request, self.artifacts.init_adapter(&job.id)).await
    }
}

/// Returns a new queued job that is not stored yet.
pub(super) fn draft(caller: &Caller, request: JobRequest) -> Job {
    let now = now();
    Job {
        id: uuid::Uuid::now_v7().to_string(),
        version: 1,
        request,
        state: JobState::Queued,
        error: None,
        progress: Progress::default(),
        latest_metrics: Metrics::new(),
        skipped_rows: Vec::new(),
        create_time: now,
        start_time: None,
        end_time: None,
        queued_since: now,
        worker: None,
        owner: caller.owner.clone(),
        trace: trace::format(&trace::current()),
    }
}
