//! The service as the RPC layer and tests see it: one method per thing that can be asked.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument as _;

use super::artifacts::Artifacts;
use super::audit::audit;
use super::blocking::blocking;
use super::error::{Result, ServiceError};
use super::feed::Feed;
use super::held::Held;
use super::lifecycle::{check_changeable, check_priority};
use super::postponed::Postponed;
use super::remote::Remote;
use super::shares::Shares;
use super::store::jobs::Creation;
use super::store::properties::ARTIFACT_STORE;
use super::store::{Page, Store, StoreOptions, now};
use super::tokens::Doorkeeper;
use super::uses::{Needed, check};
use super::{housekeeping, runner};
use crate::domain::access::Caller;
use crate::domain::dataset::{Dataset, RowIssue, Severity};
use crate::domain::identity::{ModelIdentity, Pins};
use crate::domain::job::{Evaluation, Event, Job, JobRequest, JobState, Metrics, Progress, RowPolicy};
use crate::domain::reason::Reason;
use crate::domain::training::{LoraConfig, Method};
use crate::domain::violation::{Violations, quoted};
use crate::engine::api::{ModelInfo, WeightsRef};
use crate::engine::{Engine, trace};
use crate::model::error::ModelError;
use crate::model::peft;
use crate::train::estimate::Lengths;

/// The field that names an adapter to start from.
const INIT_ADAPTER: &str = "training_job.lora.init_adapter";
/// Requests that may tokenise side by side.
const TOKENISERS: usize = 4;
/// Estimates, validations and exports side by side.
const HEAVY: usize = 2;
/// KiB of text that may be on their way to the device.
const TEXTS: usize = 256 << 10;

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
    /// An object store that holds the artifacts, and its vendor's variables; `None` is the data directory.
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

/// The service; clones share it.
#[derive(Clone)]
pub struct Service {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub engine: Engine,
    pub store: Store,
    pub artifacts: Artifacts,
    pub feed: Feed,
    pub options: ServiceOptions,
    /// The jobs that this process carries on.
    pub held: Mutex<HashMap<String, Arc<Held>>>,
    /// Queued jobs that it does not take for a while.
    pub postponed: Postponed,
    /// Changes when a job was queued: every runner looks.
    queued: watch::Sender<u64>,
    pub draining: watch::Sender<bool>,
    tokenisers: Arc<Semaphore>,
    /// Work that takes long: estimates, validation of uploads, exports.
    heavy: Arc<Semaphore>,
    /// KiB of text on their way to the device.
    pub texts: Arc<Semaphore>,
    runners: Mutex<Vec<JoinHandle<()>>>,
    keepers: Mutex<Vec<JoinHandle<()>>>,
    pub doorkeeper: Doorkeeper,
    pub shares: Arc<Shares>,
    /// No other process has the data directory while this is open.
    _lock: std::fs::File,
}

impl Inner {
    /// Tells the runners that a job was queued.
    pub fn wake(&self) {
        self.queued.send_modify(|count| *count += 1);
    }

    /// Queued jobs that this process does not take: postponed ones, and those of which a run here has not ended yet, although its lease was lost.
    pub fn passed_over(&self) -> Vec<String> {
        let mut jobs = self.postponed.jobs();
        jobs.extend(self.held.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned());
        jobs
    }

    /// The run is over. Only its own entry is removed: the job may be carried on again already.
    pub fn let_go(&self, held: &Arc<Held>) {
        let mut all = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(&held.lease.job).is_some_and(|entry| Arc::ptr_eq(entry, held)) {
            all.remove(&held.lease.job);
        }
        drop(all);
        // The job may have been queued meanwhile, and passed over.
        self.wake();
    }

    /// The other jobs that this process carries on.
    pub fn others(&self, job: &str) -> Vec<String> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).keys().filter(|id| *id != job).cloned().collect()
    }

    /// Sees every wake from now on.
    pub fn woken(&self) -> watch::Receiver<u64> {
        self.queued.subscribe()
    }
}

impl Service {
    /// Opens the data directory, puts interrupted jobs back in the queue and starts a runner for each run that the devices take at one time.
    pub async fn open(engine: Engine, options: ServiceOptions) -> Result<Service> {
        let root = options.data_dir.clone();
        std::fs::create_dir_all(&root).map_err(|e| super::error::failed(&root, e))?;
        let lock = lock(&root)?;
        let store_options =
            StoreOptions { database_url: options.database_url.clone(), events_kept: options.events_kept, lease: options.lease };
        let store = Store::open(&root, &store_options).await?;
        // A database that has files somewhere must find them there; only a new one may begin with an empty folder.
        let is_new = store.property(ARTIFACT_STORE).await?.is_none() && !(store.is_shared() && store.has_artifacts().await?);
        let open = |(url, variables): &(String, BTreeMap<String, String>)| Remote::open(url, variables, is_new);
        let remote = options.artifact_store.as_ref().map(open).transpose()?;
        let inner = Inner {
            store,
            artifacts: Artifacts::open(&root, remote)?,
            engine,
            feed: Feed::default(),
            options,
            held: Mutex::default(),
            postponed: Postponed::default(),
            queued: watch::channel(0).0,
            draining: watch::channel(false).0,
            tokenisers: Arc::new(Semaphore::new(TOKENISERS)),
            heavy: Arc::new(Semaphore::new(HEAVY)),
            texts: Arc::new(Semaphore::new(TEXTS)),
            runners: Mutex::default(),
            keepers: Mutex::default(),
            doorkeeper: Doorkeeper::default(),
            shares: Arc::default(),
            _lock: lock,
        };
        let service = Service { inner: Arc::new(inner) };
        service.inner.artifacts.ping().await?;
        service.inner.artifacts.identify(&service.inner.store).await?;
        housekeeping::reclaim(&service, !service.inner.store.is_shared()).await?;
        let runners = (0..service.inner.engine.concurrent_runs()).map(|_| tokio::spawn(runner::run(service.clone()))).collect();
        let keepers = [
            tokio::spawn(housekeeping::renewals(service.clone())),
            tokio::spawn(housekeeping::run(service.clone())),
            tokio::spawn(housekeeping::listen(service.clone())),
        ];
        *service.inner.runners.lock().unwrap_or_else(PoisonError::into_inner) = runners;
        service.inner.keepers.lock().unwrap_or_else(PoisonError::into_inner).extend(keepers);
        Ok(service)
    }

    /// The job of that id, if this process carries it on.
    pub(super) fn held(&self, job: &str) -> Option<Arc<Held>> {
        self.inner.held.lock().unwrap_or_else(PoisonError::into_inner).get(job).cloned()
    }

    // ---- training jobs

    /// Queues a job; see `CreateTrainingJob`.
    pub async fn create_job(&self, caller: &Caller, request: JobRequest, request_id: Option<String>, validate_only: bool) -> Result<Job> {
        self.refuse_when_draining()?;
        let hash = serde_json::to_vec(&request).map(|b| blake3::hash(&b).to_hex().to_string()).map_err(ServiceError::internal)?;
        let request = self.check_request(caller, request, request_id.as_deref()).await?;
        let job = Service::draft(caller, request);
        if validate_only {
            return Ok(Job { id: String::new(), ..job });
        }
        let quota = self.inner.options.max_jobs_per_client;
        // A task of its own, which ends even if the caller leaves: nothing else removes what was copied for a job that is not stored then.
        let (service, caller, (sender, made)) = (self.clone(), caller.clone(), oneshot::channel());
        let making = async move {
            let creation = Creation { request_id: request_id.as_deref(), request_hash: &hash, quota };
            let made = service.store_job(job, creation, || sender.is_closed()).await;
            if let Ok(job) = &made {
                tracing::info!(job = job.id, state = job.state.name(), "job created");
                audit(&caller, "create", &format!("trainingJobs/{}", job.id));
                service.inner.wake();
            }
            let _ = sender.send(made);
        };
        tokio::spawn(making.in_current_span());
        made.await.map_err(ServiceError::internal)?
    }

    /// Copies the adapter that a new job starts from and stores the job, unless its caller has left meanwhile. Removes the copy of a job that is not
    /// stored.
    async fn store_job(&self, mut job: Job, creation: Creation<'_>, has_left: impl Fn() -> bool) -> Result<Job> {
        let inserted = match self.copy_init_adapter(&mut job, creation.request_id).await {
            Ok(()) if has_left() => Err(ServiceError::DeadlineExceeded),
            Ok(()) => self.inner.store.insert_job(&job, creation).await,
            Err(e) => Err(e),
        };
        let is_stored = match &inserted {
            Ok(stored) => stored.id == job.id,
            // The row may be there all the same, its answer lost: then its files must stay.
            Err(_) => !matches!(self.inner.store.job(&job.id).await, Err(ServiceError::NotFound { .. })),
        };
        if !is_stored && names_adapter(&job) {
            // What cannot be removed now stays: a copy on this machine is swept up later, one in the artifact store is not.
            let _ = self.inner.artifacts.remove_job(&job.id).await;
        }
        inserted
    }

    /// Copies the adapter that a new job starts from, if any, into the job's artifacts and pins its content. A request that was made before needs no
    /// other copy.
    async fn copy_init_adapter(&self, job: &mut Job, request_id: Option<&str>) -> Result<()> {
        let Method::Lora(LoraConfig { init_adapter: Some(name), .. }) = &job.request.spec.method else { return Ok(()) };
        if self.inner.store.was_made(&job.owner, request_id).await? {
            return Ok(());
        }
        let from = self.find_adapter(name).await?;
        let _permit = self.heavy_permit().await?;
        let hash = self.inner.artifacts.keep_init_adapter(&job.id, &from).await?;
        if let Some(pins) = &mut job.request.pins {
            pins.init_adapter = Some(hash);
        }
        // The folder may have been written to since it was looked at: the copy counts.
        adopt_adapter(&mut job.request, self.inner.artifacts.init_adapter(&job.id)).await
    }

    /// A job that is not stored yet.
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
            turn: now,
            owner: caller.owner.clone(),
            trace: trace::format(&trace::current()),
        }
    }

    /// Checks everything that can be checked before the data is read; pins `latest` and `best` to steps.
    pub(super) async fn check_request(&self, caller: &Caller, mut request: JobRequest, request_id: Option<&str>) -> Result<JobRequest> {
        let mut bad = Violations::default();
        request.spec.validate("training_job", &mut bad);
        check_changeable(&request, &mut bad);
        if request_id.is_some_and(|id| id.len() > 128 || id.contains('\0')) {
            bad.push("request_id", "must have at most 128 characters, none of them NUL");
        }
        if let Evaluation::Fraction(f) = request.evaluation
            && !(f > 0.0 && f < 1.0)
        {
            bad.push("training_job.eval_fraction", format!("is {f}: it must lie between 0 and 1"));
        }
        if request.evaluation == Evaluation::None && request.spec.run.early_stopping_patience > 0 {
            bad.push("training_job.run.early_stopping_patience", "needs an evaluation: set eval_dataset or eval_fraction");
        }
        if request.reference.is_some() && request.spec.dpo.reference_free {
            bad.push("training_job.reference", "has no meaning with dpo.reference_free: remove one of them");
        }
        check_priority(caller, request.priority, self.inner.options.max_client_priority, &mut bad);
        bad.into_result()?;
        for name in [Some(&request.policy), request.reference.as_ref()].into_iter().flatten() {
            self.check_weights(caller, name).await?;
        }

        let start = self.resolve(&self.pin(&request.policy).await?).await?;
        request.policy = self.pin(&request.policy).await?;
        request.model = Some(start.model.clone());
        let mut pins = Pins { base: self.inner.engine.identity(&start.model)?, ..Pins::default() };
        if let (Method::Lora(_), WeightsRef::Full { .. }) = (&request.spec.method, &start.weights) {
            let message =
                "LoRA starts from a base model or from a LoRA checkpoint: export the full checkpoint merged and serve it as a model";
            return Err(ServiceError::FailedPrecondition { reason: Reason::FullCheckpoint, message: message.into() });
        }
        if let Method::Lora(LoraConfig { init_adapter: Some(name), .. }) = &request.spec.method {
            let WeightsRef::Base { .. } = &start.weights else {
                let message = "the policy is a checkpoint with an adapter of its own: name one of the two";
                return Err(ServiceError::invalid(INIT_ADAPTER, message));
            };
            // A repeated request answers with the job that was made, whatever became of the folder.
            if !self.inner.store.was_made(&caller.owner, request_id).await? {
                let folder = self.find_adapter(name).await?;
                adopt_adapter(&mut request, folder).await?;
            }
        } else if let WeightsRef::Adapter { dir, .. } = &start.weights {
            adopt_adapter(&mut request, dir.clone()).await?;
        }
        let mut reference = start.weights.clone();
        if let Some(name) = &request.reference {
            let pinned = self.pin(name).await?;
            let resolved = self.resolve(&pinned).await?;
            self.check_tokenizers("training_job.reference", &start.model, &resolved.model)?;
            if resolved.model != start.model {
                let reference_base = self.inner.engine.identity(&resolved.model)?;
                check_mixable(&request, &pins.base, &resolved.model, &reference_base)?;
                pins.reference_base = Some(reference_base);
            }
            request.reference = Some(pinned);
            reference = resolved.weights;
        }
        for id in [Some(&request.dataset), eval_dataset(&request.evaluation)].into_iter().flatten() {
            let dataset = self.own_dataset(caller, id).await?;
            let bad_rows = dataset.report.bad_rows_of_any_job();
            if request.row_policy == RowPolicy::Reject && bad_rows > 0 {
                let counts = |i: &&RowIssue| i.reason.severity() == Severity::Error && !i.reason.depends_on_job();
                let first = dataset.report.issues.iter().find(counts);
                let example = first.map(|i| format!(" (row {}, {}: {})", i.row, i.reason.name(), i.message)).unwrap_or_default();
                let message = format!(
                    "datasets/{id} has {bad_rows} bad rows{example}: fix them, or set row_policy to SKIP to train on the other {}",
                    dataset.report.rows - bad_rows
                );
                return Err(ServiceError::FailedPrecondition { reason: Reason::DatasetInvalid, message });
            }
        }
        pins.contents = Some(self.content_pins(&request).await?);
        request.pins = Some(pins);
        // Pinned, so that the job goes on alike under a server with other settings.
        request.spec.precision.get_or_insert(self.inner.engine.precision());
        // How long a micro-batch gets is known when the rows are tokenised; the engine checks that before the run.
        let reference = request.spec.dpo.has_reference(request.reference.is_some()).then_some(&reference);
        self.inner.engine.check(&start.model, reference, &request.spec, Lengths::one(2 * request.spec.batch.max_length))?;
        Ok(request)
    }

    /// The PEFT adapter folder of that name below the one that is configured; links do not lead out of it.
    async fn find_adapter(&self, name: &str) -> Result<PathBuf> {
        let Some(root) = self.inner.options.adapter_dir.clone() else {
            let message = "this server has no folder of adapters: set adapter_dir, or leave the field empty";
            return Err(ServiceError::invalid(INIT_ADAPTER, message));
        };
        let wanted = root.join(name);
        let found = blocking(move || {
            let (root, dir) = (root.canonicalize().ok()?, wanted.canonicalize().ok()?);
            (dir.starts_with(&root) && dir.join(peft::CONFIG_FILE).is_file()).then_some(dir)
        })
        .await?;
        match found {
            Some(dir) => Ok(dir),
            None => Err(ServiceError::invalid(
                INIT_ADAPTER,
                format!("{} is no PEFT adapter folder below the server's adapter_dir", quoted(name)),
            )),
        }
    }

    /// One job.
    pub async fn get_job(&self, caller: &Caller, id: &str) -> Result<Job> {
        self.own_job(caller, id).await
    }

    /// Jobs in one of `states` (all when empty), newest first.
    pub async fn list_jobs(&self, caller: &Caller, states: &[JobState], page_size: usize, page_token: &str) -> Result<Page<Job>> {
        self.inner.store.jobs(caller.shown(), states, page_size, page_token).await
    }

    /// Events after `after`, and whether there are more.
    pub async fn list_events(&self, caller: &Caller, job: &str, after: u64, limit: usize) -> Result<(Vec<Event>, bool)> {
        self.check_cursor(caller, job, after).await?;
        let mut events = self.inner.store.events(job, after, limit + 1).await?;
        let more = events.len() > limit;
        events.truncate(limit);
        Ok((events, more))
    }

    /// Every event after `after`, stored ones first, then live; ends with the job.
    pub async fn stream_events(&self, caller: &Caller, job: &str, after: u64) -> Result<ReceiverStream<Result<Event>>> {
        self.check_cursor(caller, job, after).await?;
        Ok(self.inner.feed.stream(self, caller.clone(), job.to_owned(), after))
    }

    async fn check_cursor(&self, caller: &Caller, job: &str, after: u64) -> Result<()> {
        self.own_job(caller, job).await?;
        let newest = self.inner.store.newest_sequence(job).await?;
        if after > newest {
            let message =
                format!("after_sequence is {after}, the newest event of trainingJobs/{job} is {newest}: use a sequence that was received");
            return Err(ServiceError::OutOfRange { message });
        }
        // An expired cursor is refused at once, not by the stream.
        self.inner.store.events(job, after, 1).await.map(|_| ())
    }

    // ---- datasets

    /// One dataset.
    pub async fn get_dataset(&self, caller: &Caller, id: &str) -> Result<Dataset> {
        self.own_dataset(caller, id).await
    }

    /// Datasets, newest first.
    pub async fn list_datasets(&self, caller: &Caller, page_size: usize, page_token: &str) -> Result<Page<Dataset>> {
        self.inner.store.datasets(caller.shown(), page_size, page_token).await
    }

    /// Deletes a dataset that no unfinished job uses.
    pub async fn delete_dataset(&self, caller: &Caller, id: &str) -> Result<()> {
        self.own_dataset(caller, id).await?;
        self.inner.artifacts.check_store().await?;
        self.inner.store.delete_dataset(id, |users| check(caller, users, Needed::Dataset(id))).await?;
        audit(caller, "delete", &format!("datasets/{id}"));
        self.inner.artifacts.remove_dataset(id).await
    }

    // ---- models

    /// The base models.
    pub fn models(&self) -> Vec<ModelInfo> {
        self.inner.engine.models()
    }

    /// One base model.
    pub fn model(&self, id: &str) -> Result<ModelInfo> {
        let found = self.inner.engine.models().into_iter().find(|m| m.id == id);
        found.ok_or_else(|| ServiceError::not_found("model", format!("models/{id}")))
    }

    // ---- the server's own life

    /// Whether requests should come here: not while draining. With a store that is away the server still scores, and all replicas lack it alike, so
    /// that is said and no reason to send requests elsewhere.
    pub async fn ready(&self) -> Result<&'static str> {
        self.refuse_when_draining()?;
        Ok(if self.inner.store.ping().await.is_ok() { "ok" } else { "ok, but the database does not answer" })
    }

    /// Gauges of each run that this process carries on: its job, the gauge's name and its value.
    pub fn runs(&self) -> Vec<(String, &'static str, f64)> {
        let held = self.inner.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter().flat_map(|(job, held)| held.shown().into_iter().map(|(gauge, value)| (job.clone(), gauge, value))).collect()
    }

    /// Who presents a bearer token.
    ///
    /// # Errors
    /// `Unauthenticated` for one that is not valid.
    pub async fn admit(&self, token: &str) -> Result<Caller> {
        self.inner.doorkeeper.admit(&self.inner.store, token).await
    }

    /// Returns when the caller's token has been revoked or has expired: long calls end then.
    pub async fn until_invalid(&self, caller: &Caller) -> ServiceError {
        super::tokens::until_invalid(&self.inner.store, caller).await;
        ServiceError::Unauthenticated { message: "the bearer token is no longer valid".into() }
    }

    /// Whether new work is refused.
    pub fn is_draining(&self) -> bool {
        *self.inner.draining.borrow()
    }

    pub(super) fn refuse_when_draining(&self) -> Result<()> {
        if self.is_draining() { Err(ServiceError::draining()) } else { Ok(()) }
    }

    /// A place to tokenise in. It moves into the work: a caller who leaves does not make room for more of it.
    pub(super) async fn tokenise_permit(&self) -> Result<OwnedSemaphorePermit> {
        self.inner.tokenisers.clone().acquire_owned().await.map_err(|_| ServiceError::draining())
    }

    /// The same for work that takes long.
    pub(super) async fn heavy_permit(&self) -> Result<OwnedSemaphorePermit> {
        self.inner.heavy.clone().acquire_owned().await.map_err(|_| ServiceError::draining())
    }

    /// Refuses new work, lets running jobs write a checkpoint and go back to the queue, and closes the store, all within `drain_timeout`.
    pub async fn drain(&self) {
        self.inner.draining.send_replace(true);
        self.inner.engine.drain();
        for held in self.inner.held.lock().unwrap_or_else(PoisonError::into_inner).values() {
            held.control.drain();
        }
        let runners = std::mem::take(&mut *self.inner.runners.lock().unwrap_or_else(PoisonError::into_inner));
        let all = async {
            for runner in runners {
                let _ = runner.await;
            }
        };
        if tokio::time::timeout(self.inner.options.drain_timeout, all).await.is_err() {
            tracing::warn!("a running job did not reach a checkpoint in time: it continues from its last one");
        }
        for keeper in self.inner.keepers.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            keeper.abort();
        }
        self.inner.store.close().await;
    }
}

/// Writes the rank, α and targets of the adapter in `folder`, from which a LoRA job starts, into the job's request.
///
/// # Errors
/// `InvalidArgument` for each of them that the client named otherwise, and for an adapter that cannot be read.
async fn adopt_adapter(request: &mut JobRequest, folder: PathBuf) -> Result<()> {
    let JobRequest { spec, given_lora, policy, .. } = request;
    let Method::Lora(lora) = &mut spec.method else { return Ok(()) };
    let (field, whose) = match &lora.init_adapter {
        Some(name) => (INIT_ADAPTER, format!("the init_adapter {}", quoted(name))),
        None => ("training_job.policy", format!("the adapter of {policy}")),
    };
    let adapter = match blocking(move || peft::config(&folder)).await? {
        Ok(adapter) => adapter,
        Err(e) => {
            tracing::warn!(error = %e, "an adapter cannot be read");
            // Not the whole error, which names a path of this machine.
            let reason = match e {
                ModelError::Adapter { reason, .. } | ModelError::CorruptWeights { reason, .. } => reason,
                _ => format!("{} or {} is missing or unreadable", peft::CONFIG_FILE, peft::WEIGHTS_FILE),
            };
            return Err(ServiceError::invalid(field, format!("{whose} cannot be read: {reason}")));
        }
    };
    let mut bad = Violations::default();
    lora.adopt(&adapter, given_lora, &whose, "training_job.lora", &mut bad);
    Ok(bad.into_result()?)
}

/// Whether a job starts from an adapter of the server's.
fn names_adapter(job: &Job) -> bool {
    matches!(&job.request.spec.method, Method::Lora(lora) if lora.init_adapter.is_some())
}

/// Refuses a reference that follows the policy (TR-DPO) on a model of another configuration: both models' weights are mixed, tensor by tensor.
fn check_mixable(request: &JobRequest, policy: &ModelIdentity, model: &str, reference: &ModelIdentity) -> Result<()> {
    if request.spec.dpo.reference_sync.is_none() || policy.config == reference.config {
        return Ok(());
    }
    let message = format!(
        "mixes the policy's weights into those of models/{model}, whose configuration has the hash {}, the policy's has {}: name a reference of the same \
         architecture and shape, or remove reference_sync",
        reference.config, policy.config
    );
    Err(ServiceError::invalid("training_job.dpo.reference_sync", message))
}

/// Takes the data directory for this process.
fn lock(root: &std::path::Path) -> Result<std::fs::File> {
    let path = root.join("bradley.lock");
    let file = std::fs::File::create(&path).map_err(|e| super::error::failed(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            let message = format!("another server uses the data directory {}: stop it, or give each its own", root.display());
            Err(ServiceError::FailedPrecondition { reason: Reason::DataDirInUse, message })
        }
        Err(std::fs::TryLockError::Error(e)) => Err(super::error::failed(&path, e)),
    }
}

fn eval_dataset(evaluation: &Evaluation) -> Option<&String> {
    match evaluation {
        Evaluation::Dataset(id) => Some(id),
        _ => None,
    }
}
