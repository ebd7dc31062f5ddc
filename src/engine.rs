//! Device workers and scheduling of work units.
//!
//! **One OS thread owns a device and its weights**; it runs scoring batches and training
//! micro-batches in turn. Everything else only fills the bounded queue, which all devices' threads
//! share, and waits for answers. With data parallelism a run uses the devices of a group: the first
//! one's thread trains it, the others' score, and give their devices to the run's rows meanwhile.

pub mod api;
mod entry;
mod fair_share;
mod memory;
mod needs;
mod queue;
mod residents;
mod run;
mod scoring;
mod worker;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use self::api::{
    EngineError, EngineOptions, ModelInfo, RunEnd, RunEvent, ScoreItem, ScoredItem, TrainingRun,
    WeightsRef,
};
use self::entry::{Entry, ScoringQueue};
use self::memory::{HostMemory, Room};
use self::needs::{Extra, Needs};
use self::queue::Queue;
use self::residents::Bases;
use crate::domain::identity::ModelIdentity;
use crate::domain::training::{Precision, TrainingSpec};
use crate::formats::export::{self, Layout};
use crate::formats::loader::LoadedModel;
use crate::formats::peft;
use crate::formats::tokenizer::{ChatTokenizer, GENERATION_CONFIG};
use crate::formats::weights::{ElementType, Weights};
use crate::infer::reference_cache::ReferenceCache;
use crate::model::device::{ComputeDevice, DeviceChoice};
use crate::model::error::ModelError;
use crate::model::params::ParamSpec;
use crate::telemetry::trace;
use crate::train::checkpoint::REFERENCE_FILE;
use crate::train::estimate::{Lengths, MemoryKind, on_host, plan};

/// A handle on the device worker; clones share it. The worker ends when it has drained or the last
/// handle is dropped.
pub struct Engine {
    shared: Arc<EngineState>,
}

struct EngineState {
    queue: Arc<ScoringQueue>,
    /// The models as the device with the most room for a run has them.
    bases: Arc<Bases>,
    options: EngineOptions,
    /// Bytes that the estimate may reach there.
    available: u64,
    /// Runs that can be in progress at one time.
    concurrent_runs: usize,
}

impl Clone for Engine {
    fn clone(&self) -> Self {
        self.shared.queue.add_handle();
        Engine { shared: self.shared.clone() }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.queue.drop_handle();
    }
}

/// Tells the queue, when dropped, that its worker has ended.
struct WorkerEndGuard(Arc<ScoringQueue>, usize);

impl Drop for WorkerEndGuard {
    fn drop(&mut self) {
        self.0.end(self.1);
    }
}

/// Loads the models' weights and starts a worker for each device.
///
/// # Errors
/// When a device is not available, a tensor cannot be read, or the weights do not fit the memory
/// limit.
pub fn start(models: Vec<LoadedModel>, options: EngineOptions) -> Result<Engine, EngineError> {
    let bytes = residents::weight_bytes(options.precision);
    let needed: u64 = models.iter().map(|m| m.config.parameter_count() as u64 * bytes).sum();
    let places = places(&options, &models, needed)?;
    let names: Vec<String> = places.iter().map(|(device, _)| device.name()).collect();
    tracing::info!(devices = names.join(","), "computing on");
    let loaded = Bases::load(models, places[0].0.clone(), &names.join(","), options.precision)?;
    let all: Vec<Arc<Bases>> =
        places.iter().map(|(device, _)| Arc::new(loaded.on(device.clone()))).collect();
    // Runs on GPUs share the machine's memory. On the CPU each worker has its part of it.
    let on_gpu = places.iter().any(|(device, _)| device.memory().is_some());
    let host = if on_gpu {
        memory::host_limit(&options).saturating_sub(loaded.on_host())
    } else {
        u64::MAX
    };
    let queue: Arc<ScoringQueue> =
        Arc::new(Queue::new(options.queue_tokens, all.len()).sharing(HostMemory::new(host)));
    queue.add_handle();
    let cache = Arc::new(match &options.reference_cache_file {
        Some(path) => ReferenceCache::open(options.reference_cache_tokens, path),
        None => ReferenceCache::new(options.reference_cache_tokens),
    });
    let group = options.data_parallel.max(1);
    if group > all.len() {
        tracing::warn!(
            data_parallel = group,
            devices = all.len(),
            "a run uses the devices that there are"
        );
    }
    let (mut roomiest, mut available) = (0, 0);
    let mut run_bytes: Arc<AtomicU64> = Arc::default();
    for (i, bases) in all.iter().enumerate() {
        if i.is_multiple_of(group) {
            // A run needs as much of each device in its group.
            run_bytes = Arc::default();
        }
        let training = i.is_multiple_of(group).then(|| {
            let members = &places[i..(i + group).min(places.len())];
            // The run needs as much of each.
            let least = members.iter().map(|(_, available)| *available).min().unwrap_or_default();
            if least > available {
                (roomiest, available) = (i, least);
            }
            let helpers = members[1..].iter().map(|(device, _)| device.clone()).collect();
            worker::TrainingResources { memory: least.saturating_sub(bases.needed()), helpers }
        });
        let label = label(&names, i);
        if bases.device().memory().is_some() {
            metrics::gauge!("bradley_device_memory_limit_bytes", "device" => label.clone())
                .set(places[i].1 as f64);
        }
        let room = Room::new(
            places[i].1.saturating_sub(bases.needed()),
            run_bytes.clone(),
            queue.host_memory().clone(),
            all.len(),
        );
        let mut worker = worker::Worker::new(
            i,
            label,
            queue.clone(),
            bases.clone(),
            cache.clone(),
            &options,
            training,
        );
        worker.limit_residents(room);
        let ended = WorkerEndGuard(queue.clone(), i);
        std::thread::Builder::new()
            .name(format!("device-{}", bases.device().name()))
            .spawn(move || {
                // Whatever ends it, nobody waits for it in vain.
                let _ended = ended;
                worker.work();
            })
            .map_err(|e| EngineError::Device(format!("its thread did not start: {e}")))?;
    }
    metrics::gauge!("bradley_memory_limit_bytes").set(memory::host_limit(&options) as f64);
    let concurrent_runs = all.len().div_ceil(group);
    Ok(Engine {
        shared: Arc::new(EngineState {
            queue,
            bases: all[roomiest].clone(),
            options,
            available,
            concurrent_runs,
        }),
    })
}

/// A worker's name in metrics: its device's, numbered where several workers share one.
fn label(devices: &[String], worker: usize) -> String {
    let name = &devices[worker];
    match devices.iter().filter(|other| *other == name).count() {
        1 => name.clone(),
        _ => format!("{name}:{worker}"),
    }
}

/// Refuses a model whose heads are wider than the device's kernels can compute with.
fn refuse_wide_heads(models: &[LoadedModel], device: &ComputeDevice) -> Result<(), EngineError> {
    let Some(limit) = device.max_head_dim() else { return Ok(()) };
    match models.iter().find(|m| m.config.spec.head_dim() > limit) {
        None => Ok(()),
        Some(m) => Err(EngineError::Weights(format!(
            "models/{}: head_dim is {}, and {} computes with at most {limit}: serve it with --device cpu",
            m.id,
            m.config.spec.head_dim(),
            device.name()
        ))),
    }
}

/// The devices, each with the bytes that the estimate may reach on it. Where they were not named,
/// those are left out that cannot hold the `needed` bytes.
fn places(
    options: &EngineOptions,
    models: &[LoadedModel],
    needed: u64,
) -> Result<Vec<(ComputeDevice, u64)>, EngineError> {
    let (mut places, mut left_out) = (Vec::new(), None);
    for choice in &options.devices {
        let opened = match ComputeDevice::open_all(*choice)
            .map_err(|e| EngineError::Device(format!("{choice}: {e}")))
        {
            Err(e) if options.skip_missing_devices => {
                tracing::warn!(device = %choice, error = %e, "a device that was named cannot be opened: going on without it");
                left_out = Some(e);
                continue;
            }
            opened => opened?,
        };
        for device in opened {
            refuse_wide_heads(models, &device)?;
            let available = memory::limit(options, &device);
            if needed <= available {
                places.push((device, available));
                continue;
            }
            let setting =
                if device.memory().is_some() { "device_memory_limit" } else { "memory_limit" };
            let remedy =
                format!("on {}: load fewer or smaller models, or raise {setting}", device.name());
            let e = EngineError::OutOfMemory {
                needed_mib: needed >> 20,
                available_mib: available >> 20,
                remedy,
            };
            if *choice != DeviceChoice::Auto {
                return Err(e);
            }
            tracing::warn!(error = %e, "a GPU is left out");
            left_out = Some(e);
        }
    }
    if places.is_empty()
        && let Some(e) = left_out
    {
        return Err(e);
    }
    // Workers on the CPU share the machine's memory, and the weights in it.
    if places.iter().all(|(device, _)| device.memory().is_none()) {
        let workers = places.len().max(1) as u64;
        places.iter_mut().for_each(|(_, available)| {
            *available = needed + available.saturating_sub(needed) / workers
        });
    }
    Ok(places)
}

impl Engine {
    /// The base models.
    pub fn models(&self) -> Vec<ModelInfo> {
        self.shared.bases.infos()
    }

    /// One base model.
    ///
    /// # Errors
    /// `UnknownModel` when the server does not have it.
    pub fn model(&self, id: &str) -> Result<ModelInfo, EngineError> {
        Ok(self.shared.bases.get(id)?.info.clone())
    }

    /// What jobs compute in when they do not say.
    pub fn precision(&self) -> Precision {
        self.shared.options.precision
    }

    /// Runs that can be in progress at one time; more wait.
    pub fn concurrent_runs(&self) -> usize {
        self.shared.concurrent_runs
    }

    /// Returns the content hashes of a base model.
    pub fn identity(&self, model: &str) -> Result<ModelIdentity, EngineError> {
        Ok(self.shared.bases.get(model)?.info.identity.clone())
    }

    /// A base model's tokenizer.
    pub fn tokenizer(&self, model: &str) -> Result<Arc<ChatTokenizer>, EngineError> {
        Ok(self.shared.bases.get(model)?.tokenizer.clone())
    }

    /// Scores one item. Dropping the future abandons it: it never reaches the device if it has not
    /// yet.
    ///
    /// # Errors
    /// `QueueFull` at once when the queue is; the others as they are found.
    pub async fn score(
        &self,
        policy: &WeightsRef,
        reference: Option<&WeightsRef>,
        item: ScoreItem,
    ) -> Result<ScoredItem, EngineError> {
        let (tokens, limit) = (item.tokens(), self.shared.options.max_row_tokens);
        if tokens > limit {
            return Err(EngineError::RowTooLong { tokens, limit });
        }
        let (reply, answer) = oneshot::channel();
        let entry = Entry {
            item,
            policy: policy.clone(),
            reference: reference.cloned(),
            enqueued: Instant::now(),
            trace: trace::current(),
            reply,
        };
        self.shared.queue.push(entry)?;
        answer.await.unwrap_or(Err(EngineError::Draining))
    }

    /// Queues a run behind those in progress, if any. Its events tell the rest, `Ended` last.
    ///
    /// # Errors
    /// When it cannot fit the memory limit, or the engine is draining.
    pub fn train(&self, run: TrainingRun) -> Result<(), EngineError> {
        let size = run.spec.batch.batch_size;
        let lengths = Lengths::of(&run.train, size).max(Lengths::of(&run.eval, size));
        let needs = self.needs(&run.model, run.reference.as_ref(), &run.spec, lengths)?;
        self.shared.queue.push_run(run, needs)
    }

    /// The checks of [`Engine::train`] for pairs of these lengths.
    pub fn check(
        &self,
        model: &str,
        reference: Option<&WeightsRef>,
        spec: &TrainingSpec,
        lengths: Lengths,
    ) -> Result<(), EngineError> {
        self.needs(model, reference, spec, lengths).map(|_| ())
    }

    /// Returns what a run needs of memory, if the limits allow it.
    fn needs(
        &self,
        model: &str,
        reference: Option<&WeightsRef>,
        spec: &TrainingSpec,
        lengths: Lengths,
    ) -> Result<Needs, EngineError> {
        let bases = &self.shared.bases;
        let config = &bases.get(model)?.policy.config;
        let extra = self.extra(model, reference, spec, lengths)?;
        let available = self.shared.available;
        let mut host = 0;
        if self.memory_kind() == MemoryKind::Gpu {
            let options = &self.shared.options;
            host = extra.host + on_host(config, spec, options.data_parallel);
            let (needed, available) = (bases.on_host() + host, memory::host_limit(options));
            if needed > available {
                let remedy = "on the host, for masters, moments and copies of weights: train with LoRA, or raise memory_limit".to_owned();
                return Err(EngineError::OutOfMemory {
                    needed_mib: needed >> 20,
                    available_mib: available >> 20,
                    remedy,
                });
            }
        }
        let resident = bases.needed() + extra.device;
        let plan_within = |bytes| plan(config, spec, lengths, bytes, self.memory_kind());
        match plan_within(available.saturating_sub(resident)) {
            Ok(granted) => {
                // A device that has less than the roomiest one may be enough.
                let (Ok(leanest) | Err(leanest)) = plan_within(0);
                let minimum = extra.device + leanest.total().min(granted.total());
                Ok(Needs { extra: extra.device, minimum, host })
            }
            Err(least) => {
                let setting = bases.memory_setting();
                let remedy = match spec.dpo.compares_pairs() {
                    true => {
                        format!(
                            "lower batch_size (the loss holds all pairs of a batch) or max_length, train with LoRA, or raise {setting}"
                        )
                    }
                    false => format!(
                        "lower max_length, train with LoRA, leave activation_checkpointing to auto, or raise {setting}"
                    ),
                };
                Err(EngineError::OutOfMemory {
                    needed_mib: (resident + least.total()) >> 20,
                    available_mib: available >> 20,
                    remedy,
                })
            }
        }
    }

    /// Bytes that a run needs besides the base models and its plan.
    fn extra(
        &self,
        model: &str,
        reference: Option<&WeightsRef>,
        spec: &TrainingSpec,
        lengths: Lengths,
    ) -> Result<Extra, EngineError> {
        needs::extra(&self.shared.bases, model, reference, spec, lengths, self.memory_kind())
    }

    fn memory_kind(&self) -> MemoryKind {
        MemoryKind::of(self.shared.bases.device())
    }

    /// Returns the bytes that a run over pairs of these lengths needs at its peak, the base models
    /// included, and its limit. A run that does not fit is told what it needs at least.
    pub fn memory(
        &self,
        model: &str,
        reference: Option<&WeightsRef>,
        spec: &TrainingSpec,
        lengths: Lengths,
    ) -> Result<(u64, u64), EngineError> {
        let base = self.shared.bases.get(model)?;
        let resident =
            self.shared.bases.needed() + self.extra(model, reference, spec, lengths)?.device;
        let available = self.shared.available;
        let (Ok(plan) | Err(plan)) = plan(
            &base.policy.config,
            spec,
            lengths,
            available.saturating_sub(resident),
            self.memory_kind(),
        );
        Ok((resident + plan.total(), available))
    }

    /// The element type that a model's weights are stored in, and exported in unless another is
    /// asked for.
    pub fn element_type(&self, model: &str) -> Result<ElementType, EngineError> {
        Ok(self.shared.bases.get(model)?.element_type)
    }

    /// Writes merged weights, the model's configuration and its tokenizer into the folder `out`. A
    /// checkpoint's own tensors are copied, a base model's are taken as its files have them; each
    /// number is rounded to `dtype` once. Blocks.
    ///
    /// # Errors
    /// `Weights` when a file cannot be read, and `FilesChanged` when a base model whose weights in
    /// memory are rounded has files that are gone or were changed.
    pub fn export_merged(
        &self,
        weights: &WeightsRef,
        dtype: ElementType,
        out: &Path,
    ) -> Result<(), EngineError> {
        let layout = Layout { dtype, shard_bytes: export::SHARD_BYTES };
        let (model, adapter) = match weights {
            WeightsRef::Base { model }
            | WeightsRef::Full { model, .. }
            | WeightsRef::StoredReference { model, .. } => (model, None),
            WeightsRef::Adapter { model, dir, .. } => (model, Some(dir)),
            WeightsRef::Live { job } | WeightsRef::LiveReference { job } => {
                return Err(EngineError::NotResident(job.clone()));
            }
        };
        let bases = &self.shared.bases;
        let base = bases.get(model)?;
        let (config, unusable) = (&base.policy.config, |e: ModelError| EngineError::unusable(&e));
        let adapter = adapter.map(|dir| peft::load(dir, config)).transpose().map_err(unusable)?;
        let source = match weights {
            WeightsRef::Full { dir, .. } => {
                Some(Weights::open_safetensors(&dir.join(export::WEIGHTS_FILE)).map_err(unusable)?)
            }
            WeightsRef::StoredReference { dir, .. } => {
                Some(Weights::open_safetensors(&dir.join(REFERENCE_FILE)).map_err(unusable)?)
            }
            _ => bases.reopen(model)?,
        };
        let written = match &source {
            Some(files) => {
                let read = |param: &ParamSpec| files.load(param, Precision::F32);
                export::save_merged(out, config, adapter.as_ref(), layout, &read)
            }
            None => export::save_merged(
                out,
                config,
                adapter.as_ref(),
                layout,
                &base.policy.parameters.reader(),
            ),
        };
        // Of all files only a base model's are checked against what was loaded.
        written.map_err(|e| bases.unreadable(model, &e))?;
        export::save_companions(out, config, &base.tokenizer, |_| true).map_err(unusable)
    }

    /// Writes a model's tokenizer and chat templates into the folder `out`. Blocks.
    pub fn export_tokenizer(&self, model: &str, out: &Path) -> Result<(), EngineError> {
        let base = self.shared.bases.get(model)?;
        let wanted = |name: &str| name != GENERATION_CONFIG;
        export::save_companions(out, &base.policy.config, &base.tokenizer, wanted)
            .map_err(|e| EngineError::unusable(&e))
    }

    /// Forgets weights loaded from `dir` or below: the files are gone.
    pub fn evict_policy(&self, dir: &Path) {
        self.shared.queue.evict(dir);
    }

    /// Refuses new work from now on and answers what waits. A run in progress is stopped through
    /// its control.
    pub fn drain(&self) {
        for run in self.shared.queue.drain() {
            // The channel was never used: there is room for one event.
            let _ = run.events.try_send(RunEvent::Ended(RunEnd::Drained).into());
        }
    }

    /// Waits until the drained workers are done with the batch or the unit in progress; false when
    /// that takes longer than `patience`. A process must not end before: the GPU's libraries are
    /// taken down by its exit handlers, whoever still calls them. Blocks.
    pub fn wait_for_end(&self, patience: Duration) -> bool {
        self.shared.queue.wait_for_end(patience)
    }
}
