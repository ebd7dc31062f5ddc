//! Services for jobs, datasets, checkpoints, scoring, evaluation, generation, usage and the
//! server's own lifecycle. Each owns the parts it needs. Below them are the store, the artifacts,
//! the event feed and the background tasks.
//!
//! **A call is acknowledged only after its effects are on disk, and an event is delivered only
//! after it has been stored.**

pub mod artifacts;
pub mod audit;
pub mod auth;
mod background;
pub mod backup;
mod blocking;
pub mod check;
mod checkpoint_files;
pub mod checkpoints;
mod data_dir;
pub mod data_volume;
pub mod datasets;
mod detached;
pub mod error;
pub mod evaluation;
mod events;
pub mod generation;
mod in_use;
pub mod jobs;
mod limiter;
mod model_card;
mod policies;
pub mod remote;
pub mod scoring;
pub mod server;
mod shutdown;
pub mod store;
mod template_date;
pub mod transfer;
pub mod usage;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::artifacts::Artifacts;
use self::auth::declared::DeclaredTokens;
use self::auth::oidc::{Oidc, OidcOptions};
use self::auth::quota::ScoringQuota;
use self::auth::tokens::TokenService;
use self::background::BackgroundTasks;
use self::checkpoints::CheckpointService;
use self::datasets::{DatasetLimits, DatasetService};
use self::detached::DetachedWork;
use self::error::{Result, failed};
use self::evaluation::EvaluationService;
use self::events::EventFeed;
use self::generation::GenerationService;
use self::jobs::JobService;
use self::jobs::create::JobCreator;
use self::jobs::estimate::JobEstimator;
use self::jobs::init_adapter::InitAdapters;
use self::jobs::inputs::InputLoader;
use self::jobs::registry::RunRegistry;
use self::jobs::runner::JobRunner;
use self::jobs::validate::RequestValidator;
use self::limiter::Limiter;
use self::policies::PolicyResolver;
use self::remote::Remote;
use self::scoring::ScoringService;
use self::server::Server;
use self::shutdown::Shutdown;
use self::store::properties::ARTIFACT_STORE;
use self::store::{Store, StoreOptions};
use self::template_date::TemplateDate;
use self::usage::UsageMeter;
use crate::engine::Engine;

/// Maximum number of slow tasks at one time: job estimates, dataset validations, adapter copies and
/// exports.
const MAX_SLOW_TASKS: usize = 2;

/// Limits and locations of the service.
#[derive(Clone)]
pub struct ServiceOptions {
    /// Data directory: the SQLite database and the artifacts.
    pub data_dir: PathBuf,
    /// Largest dataset upload, in bytes.
    pub max_upload_bytes: u64,
    /// Maximum number of events stored per job; the oldest are deleted first.
    pub events_kept: u64,
    /// Maximum time that [`Server::drain`] waits for running jobs.
    pub drain_timeout: Duration,
    /// PostgreSQL URL (`postgres://…`), shared by several replicas. `None` selects SQLite in the
    /// data directory.
    pub database_url: Option<String>,
    /// URL of the object store that holds the artifacts, and the vendor's variables for it. `None`
    /// stores artifacts in the data directory only.
    pub artifact_store: Option<(String, BTreeMap<String, String>)>,
    /// Duration of a job's lease. A worker that does not renew it for this long loses the job.
    pub lease: Duration,
    /// Time after which a running job is preempted if another job of the same priority is queued.
    pub time_slice: Duration,
    /// Maximum number of unfinished jobs per client.
    pub max_jobs_per_client: Option<u64>,
    /// Highest priority that a client may give its jobs. Administrators may give any.
    pub max_client_priority: i32,
    /// Maximum total size of one client's datasets, in bytes. An upload that would exceed it is
    /// refused at its beginning, on the way, or at its end.
    pub max_dataset_bytes_per_client: Option<u64>,
    /// Maximum text in one dataset, in bytes. It is limited because a job holds all its tokens in
    /// memory.
    pub max_dataset_text_bytes: u64,
    /// Maximum number of one client's tokens that wait to be scored, or for generated texts.
    pub max_scoring_tokens_per_client: Option<usize>,
    /// Folder of PEFT adapters that jobs may start from.
    pub adapter_dir: Option<PathBuf>,
    /// Date that chat templates see for models without a job. `None` is the current date.
    pub template_date: Option<jiff::civil::Date>,
    /// File that declares tokens.
    pub token_file: Option<PathBuf>,
    /// Issuer whose tokens are accepted beside our own.
    pub oidc: Option<OidcOptions>,
}

/// All services of a server. Clones share them.
#[derive(Clone)]
pub struct Service {
    /// Training jobs and their events.
    pub jobs: Arc<JobService>,
    /// Checkpoints of jobs: read, delete, export.
    pub checkpoints: CheckpointService,
    /// Uploaded datasets.
    pub datasets: DatasetService,
    /// Scores, continuations and evaluations: work with a policy as it is.
    pub inference: InferenceServices,
    /// Base models, callers' tokens, the work of each owner, readiness and shutdown.
    pub server: Arc<Server>,
}

/// The services that use a policy without changing it. They share one quota.
#[derive(Clone)]
pub struct InferenceServices {
    /// Scores of preference pairs and of completions.
    pub scoring: Arc<ScoringService>,
    /// Continuations of prompts.
    pub generation: Arc<GenerationService>,
    /// Evaluations of policies on datasets.
    pub evaluations: EvaluationService,
}

impl Service {
    /// Opens the data directory, requeues interrupted jobs, and starts the background tasks and one
    /// runner per run that the devices can execute concurrently.
    ///
    /// # Errors
    /// `FailedPrecondition` if another process uses the data directory, if a restore into it was
    /// interrupted, if this version may not use the database, or if the artifact store is not the
    /// one that belongs to the database. `InvalidArgument` if the file of tokens or the issuer's CA
    /// file cannot be used. `Unavailable`, `InvalidArgument`, `ResourceExhausted` or `Internal` if
    /// the database, the data directory or the artifact store cannot be opened.
    pub async fn open(engine: Engine, options: ServiceOptions) -> Result<Service> {
        let declared = options.token_file.as_deref().map(DeclaredTokens::open);
        let (declared, oidc) = (
            declared.transpose()?,
            options.oidc.clone().map(Oidc::new).transpose()?,
        );
        let (store, artifacts) = open_data(&options).await?;
        let (shutdown, runs, slow_tasks) = (
            Shutdown::default(),
            RunRegistry::default(),
            Limiter::new(MAX_SLOW_TASKS),
        );
        let detached = DetachedWork::default();
        let template_date = TemplateDate(options.template_date);
        let tokens = TokenService::new(store.clone(), declared, oidc);
        let usage = UsageMeter::new(store.clone());
        let events = EventFeed::new(store.clone(), tokens.clone(), shutdown.clone());
        let policies = PolicyResolver {
            store: store.clone(),
            artifacts: artifacts.clone(),
            engine: engine.clone(),
            runs: runs.clone(),
        };
        let inputs = InputLoader {
            store: store.clone(),
            artifacts: artifacts.clone(),
            engine: engine.clone(),
            policies: policies.clone(),
            template_date,
        };
        let validator = RequestValidator {
            store: store.clone(),
            engine: engine.clone(),
            policies: policies.clone(),
            adapters: InitAdapters(options.adapter_dir.clone()),
            max_client_priority: options.max_client_priority,
        };
        let jobs = Arc::new(JobService {
            store: store.clone(),
            artifacts: artifacts.clone(),
            engine: engine.clone(),
            events: events.clone(),
            runs: runs.clone(),
            policies: policies.clone(),
            creator: JobCreator {
                store: store.clone(),
                artifacts: artifacts.clone(),
                validator: validator.clone(),
                runs: runs.clone(),
                slow_tasks: slow_tasks.clone(),
                detached: detached.clone(),
                shutdown: shutdown.clone(),
                max_jobs_per_client: options.max_jobs_per_client,
            },
            estimator: JobEstimator {
                engine: engine.clone(),
                validator,
                inputs: inputs.clone(),
                slow_tasks: slow_tasks.clone(),
                shutdown: shutdown.clone(),
            },
            detached: detached.clone(),
            max_client_priority: options.max_client_priority,
        });
        let tasks = BackgroundTasks {
            store: store.clone(),
            artifacts: artifacts.clone(),
            events: events.clone(),
            runs: runs.clone(),
            jobs: jobs.clone(),
            shutdown: shutdown.clone(),
        };
        tasks.reclaim(!store.is_shared()).await?;
        let runner = JobRunner {
            store: store.clone(),
            artifacts: artifacts.clone(),
            engine: engine.clone(),
            events,
            runs: runs.clone(),
            policies: policies.clone(),
            inputs,
            shutdown: shutdown.clone(),
            time_slice: options.time_slice,
            postponement: options.lease,
            usage: usage.clone(),
        };
        let mut background = tasks.start();
        let following = tokens.clone();
        background.push(tokio::spawn(async move { following.follow().await }));
        let meter = usage.clone();
        background.push(tokio::spawn(
            async move { meter.store_periodically().await },
        ));
        let start =
            |runner: JobRunner| tokio::spawn(async move { runner.run_until_drained().await });
        let runners = (0..engine.concurrent_runs())
            .map(|_| start(runner.clone()))
            .collect();
        background.push(tokio::spawn(data_volume::measure(options.data_dir)));
        let quota = ScoringQuota::new(options.max_scoring_tokens_per_client);
        let generation = Arc::new(GenerationService::new(
            policies.clone(),
            engine.clone(),
            quota.clone(),
            usage.clone(),
            shutdown.clone(),
            template_date,
        ));
        let scoring = Arc::new(ScoringService::new(
            policies.clone(),
            engine.clone(),
            quota,
            usage.clone(),
            shutdown.clone(),
            template_date,
        ));
        Ok(Service {
            jobs,
            checkpoints: CheckpointService {
                store: store.clone(),
                artifacts: artifacts.clone(),
                engine: engine.clone(),
                policies: policies.clone(),
                runs: runs.clone(),
                slow_tasks: slow_tasks.clone(),
                detached: detached.clone(),
            },
            datasets: DatasetService {
                store: store.clone(),
                artifacts: artifacts.clone(),
                engine: engine.clone(),
                slow_tasks,
                detached: detached.clone(),
                shutdown: shutdown.clone(),
                template_date,
                limits: DatasetLimits {
                    max_upload_bytes: options.max_upload_bytes,
                    max_bytes_per_client: options.max_dataset_bytes_per_client,
                    max_text_bytes: options.max_dataset_text_bytes,
                },
            },
            inference: InferenceServices {
                evaluations: EvaluationService::new(
                    store.clone(),
                    artifacts.clone(),
                    scoring.clone(),
                    detached.clone(),
                ),
                scoring,
                generation,
            },
            server: Arc::new(Server {
                usage,
                engine,
                store,
                runs,
                tokens,
                detached,
                shutdown,
                drain_timeout: options.drain_timeout,
                runners: Mutex::new(runners),
                background: Mutex::new(background),
            }),
        })
    }
}

/// Checks that no other process uses the data directory, which need not exist yet. A server asks
/// before it loads its models and opens the file of its reference cache. [`Service::open`] locks
/// the directory later.
///
/// # Errors
/// `FailedPrecondition` (`DATA_DIR_IN_USE`) if another process uses it; `Internal` if the disk
/// fails.
pub fn check_data_dir_unused(data_dir: &Path) -> Result<()> {
    data_dir::check_unused(data_dir)
}

/// Locks the data directory for this process and opens its database and artifacts.
async fn open_data(options: &ServiceOptions) -> Result<(Store, Artifacts)> {
    let root = &options.data_dir;
    std::fs::create_dir_all(root).map_err(|e| failed(root, e))?;
    let lock = data_dir::lock(root)?;
    data_dir::check_restored(root)?;
    let store_options = StoreOptions {
        database_url: options.database_url.clone(),
        events_kept: options.events_kept,
        lease: options.lease,
        ..StoreOptions::default()
    };
    let store = Store::open(root, &store_options).await?;
    // A missing artifact folder is created only for a database that knows of no files in an
    // artifact store. For any other database it means a wrong URL or a share that is not mounted.
    let is_new = store.property(ARTIFACT_STORE).await?.is_none()
        && !(store.is_shared() && store.has_artifacts().await?);
    let open = |(url, variables): &(String, BTreeMap<String, String>)| {
        Remote::open(url, variables, is_new)
    };
    let remote = options.artifact_store.as_ref().map(open).transpose()?;
    let artifacts = Artifacts::open(root, remote)?.with_lock(lock);
    artifacts.ping().await?;
    artifacts.identify(&store).await?;
    Ok((store, artifacts))
}
