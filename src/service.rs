//! Services that own what they need: jobs, datasets, checkpoints, scoring, and the server's own
//! life. Beneath them are the store, the artifacts, the event feed and the background tasks.
//!
//! **What was acknowledged is on disk; what is delivered was stored first.**

pub mod artifacts;
pub mod audit;
pub mod auth;
mod background;
mod blocking;
mod checkpoint_files;
pub mod checkpoints;
pub mod datasets;
pub mod error;
mod events;
mod in_use;
pub mod jobs;
mod limiter;
mod policies;
mod remote;
pub mod scoring;
pub mod server;
mod shutdown;
pub mod store;
mod template_date;

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::artifacts::Artifacts;
use self::auth::quota::ScoringQuota;
use self::auth::tokens::TokenService;
use self::background::BackgroundTasks;
use self::checkpoints::CheckpointService;
use self::datasets::{DatasetLimits, DatasetService};
use self::error::{Result, ServiceError, failed};
use self::events::EventFeed;
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
use crate::domain::reason::Reason;
use crate::engine::Engine;

/// Estimates, validations, copies of adapters and exports side by side.
const HEAVY: usize = 2;

/// Limits and places.
#[derive(Clone)]
pub struct ServiceOptions {
    /// Where the database and artifacts live.
    pub data_dir: PathBuf,
    /// The largest upload.
    pub max_upload_bytes: u64,
    /// Events kept of a job, the newest.
    pub events_kept: u64,
    /// How long a drain may take.
    pub drain_timeout: Duration,
    /// `postgres://…`, shared by several replicas; `None` is SQLite in the data directory.
    pub database_url: Option<String>,
    /// An object store that holds the artifacts, and its vendor's variables; `None` is the data
    /// directory.
    pub artifact_store: Option<(String, BTreeMap<String, String>)>,
    /// How long a worker may be silent before its job goes to another.
    pub lease: Duration,
    /// How long a job may keep a device while others of its priority wait.
    pub time_slice: Duration,
    /// Unfinished jobs that one client may have.
    pub max_jobs_per_client: Option<u64>,
    /// The highest priority that a client may give its jobs; administrators may give any.
    pub max_client_priority: i32,
    /// Bytes of datasets that one client may keep.
    pub max_dataset_bytes_per_client: Option<u64>,
    /// Bytes of text that a dataset may hold: a job has its tokens in memory.
    pub max_dataset_text_bytes: u64,
    /// Tokens that one client may have in the scoring queue.
    pub max_scoring_tokens_per_client: Option<usize>,
    /// The folder with PEFT adapters that jobs may start from.
    pub adapter_dir: Option<PathBuf>,
    /// The date that chat templates print for models without a job; `None` is the present one.
    pub template_date: Option<jiff::civil::Date>,
}

/// The services of a server; clones share them.
#[derive(Clone)]
pub struct Service {
    /// Training jobs and their events.
    pub jobs: Arc<JobService>,
    /// Their checkpoints.
    pub checkpoints: CheckpointService,
    /// Datasets.
    pub datasets: DatasetService,
    /// Scores of pairs and completions.
    pub scoring: Arc<ScoringService>,
    /// The base models, the callers' tokens, readiness and the drain.
    pub server: Arc<Server>,
}

impl Service {
    /// Opens the data directory, puts interrupted jobs back in the queue and starts a runner for
    /// each run that the devices take at one time.
    pub async fn open(engine: Engine, options: ServiceOptions) -> Result<Service> {
        let (store, artifacts) = open_data(&options).await?;
        let (shutdown, runs, heavy) =
            (Shutdown::default(), RunRegistry::default(), Limiter::new(HEAVY));
        let template_date = TemplateDate(options.template_date);
        let tokens = TokenService::new(store.clone());
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
                heavy: heavy.clone(),
                shutdown: shutdown.clone(),
                max_jobs_per_client: options.max_jobs_per_client,
            },
            estimator: JobEstimator {
                engine: engine.clone(),
                validator,
                inputs: inputs.clone(),
                heavy: heavy.clone(),
                shutdown: shutdown.clone(),
            },
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
        };
        let start =
            |runner: JobRunner| tokio::spawn(async move { runner.run_until_drained().await });
        let runners = (0..engine.concurrent_runs()).map(|_| start(runner.clone())).collect();
        Ok(Service {
            jobs,
            checkpoints: CheckpointService {
                store: store.clone(),
                artifacts: artifacts.clone(),
                engine: engine.clone(),
                policies: policies.clone(),
                runs: runs.clone(),
                heavy: heavy.clone(),
            },
            datasets: DatasetService {
                store: store.clone(),
                artifacts,
                engine: engine.clone(),
                heavy,
                shutdown: shutdown.clone(),
                template_date,
                limits: DatasetLimits {
                    max_upload_bytes: options.max_upload_bytes,
                    max_bytes_per_client: options.max_dataset_bytes_per_client,
                    max_text_bytes: options.max_dataset_text_bytes,
                },
            },
            scoring: Arc::new(ScoringService::new(
                policies,
                engine.clone(),
                ScoringQuota::new(options.max_scoring_tokens_per_client),
                shutdown.clone(),
                template_date,
            )),
            server: Arc::new(Server {
                engine,
                store,
                runs,
                tokens,
                shutdown,
                drain_timeout: options.drain_timeout,
                runners: Mutex::new(runners),
                background: Mutex::new(tasks.start()),
            }),
        })
    }
}

/// Opens the database and the artifacts of a data directory, which no other process may have.
async fn open_data(options: &ServiceOptions) -> Result<(Store, Artifacts)> {
    let root = &options.data_dir;
    std::fs::create_dir_all(root).map_err(|e| failed(root, e))?;
    let lock = lock(root)?;
    let store_options = StoreOptions {
        database_url: options.database_url.clone(),
        events_kept: options.events_kept,
        lease: options.lease,
    };
    let store = Store::open(root, &store_options).await?;
    // A database that has files somewhere must find them there; only a new one may begin with an
    // empty folder.
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

/// Takes the data directory for this process.
fn lock(root: &Path) -> Result<File> {
    let path = root.join("bradley.lock");
    let file = File::create(&path).map_err(|e| failed(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let message = format!(
                "another server uses the data directory {}: stop it, or give each its own",
                root.display()
            );
            Err(ServiceError::FailedPrecondition { reason: Reason::DataDirInUse, message })
        }
        Err(TryLockError::Error(e)) => Err(failed(&path, e)),
    }
}
