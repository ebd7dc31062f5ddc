//! Device workers and scheduling of work units.
//!
//! **One OS thread owns a device and its weights.** It alternates between scoring batches, steps of
//! generation and training micro-batches. The threads of the layers above only add work to the
//! bounded queue, which the threads of all devices share, and wait for answers.
//!
//! With data parallelism a run uses the devices of a group. The thread of the group's first device
//! trains it. The threads of the other devices score, and their devices also compute a share of the
//! run's rows.

pub mod api;
mod entry;
mod fair_share;
mod generation;
mod live;
pub mod memory;
mod needs;
mod policy_cache;
mod queue;
mod run;
mod scoring;
mod worker;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use self::api::{
    EngineError, EngineOptions, GenerationRequest, GenerationStream, ModelInfo, ModelUse, RunEnd,
    RunEvent, ScoreItem, ScoredItem, TrainingRun, WeightsRef,
};
use self::entry::{Entry, ScoringQueue};
use self::generation::GenerationEntry;
use self::memory::{HostMemory, Room};
use self::needs::{Extra, Needs};
use self::policy_cache::{Base, BaseModels};
use self::queue::Queue;
use crate::compute::cpu::attention::CACHE_BLOCK;
use crate::domain::identity::ModelIdentity;
use crate::domain::training::{LoraConfig, Method, Precision, TrainingSpec};
use crate::formats::export::{self, Layout};
use crate::formats::loader::LoadedModel;
use crate::formats::peft;
use crate::formats::tokenizer::{ChatTokenizer, GENERATION_CONFIG};
use crate::formats::weights::{ElementType, Weights};
use crate::infer::generate;
use crate::infer::pack;
use crate::infer::pair::EncodedPair;
use crate::infer::reference_cache::ReferenceCache;
use crate::model::device::{ComputeDevice, DeviceChoice};
use crate::model::error::ModelError;
use crate::model::params::{self, ParamSpec};
use crate::telemetry::trace;
use crate::train::checkpoint::REFERENCE_FILE;
use crate::train::estimate::{Lengths, MemoryKind, on_host, plan};

/// Packed tokens of the shortest pair: a prompt and two answers of one token each.
const SHORTEST_PAIR: usize = 3;

/// Handle to the device workers; clones share them. A worker ends when the queue was drained or the
/// last handle is dropped.
pub struct Engine {
    shared: Arc<EngineState>,
}

struct EngineState {
    queue: Arc<ScoringQueue>,
    /// Base models, as held by the device that has the most memory for a run.
    base_models: Arc<BaseModels>,
    options: EngineOptions,
    /// Memory in bytes that the estimate of a run may reach on that device.
    available: u64,
    /// Maximum number of runs in progress at the same time.
    concurrent_runs: usize,
}

impl Clone for Engine {
    fn clone(&self) -> Self {
        self.shared.queue.add_handle();
        Engine {
            shared: self.shared.clone(),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.queue.drop_handle();
    }
}

/// Tells the queue, when dropped, that the worker with this index has ended.
struct WorkerEndGuard(Arc<ScoringQueue>, usize);

impl Drop for WorkerEndGuard {
    fn drop(&mut self) {
        self.0.end(self.1);
    }
}

/// Loads the models' weights and starts one worker for each device.
///
/// # Errors
/// Fails if a device is not available, its kernels do not support a model's head size, a tensor
/// cannot be read, the weights do not fit the memory limit, or a thread cannot be started.
pub fn start(models: Vec<LoadedModel>, options: EngineOptions) -> Result<Engine, EngineError> {
    let bytes = policy_cache::weight_bytes(options.precision);
    let needed: u64 = models
        .iter()
        .map(|m| m.config.parameter_count() as u64 * bytes)
        .sum();
    let devices = open_devices(&options, &models, needed)?;
    let names: Vec<String> = devices.iter().map(|(device, _)| device.name()).collect();
    tracing::info!(
        devices = names.join(","),
        because = reason_for(&options, &devices),
        "computing on these devices"
    );
    let loaded = BaseModels::load(
        models,
        devices[0].0.clone(),
        &names.join(","),
        options.precision,
    )?;
    let all: Vec<Arc<BaseModels>> = devices
        .iter()
        .enumerate()
        .map(|(i, (device, _))| Arc::new(loaded.on(device.clone(), label(&names, i))))
        .collect();
    // Runs on GPUs share the host memory. On the CPU each worker has a fixed part of it.
    let on_gpu = devices.iter().any(|(device, _)| device.memory().is_some());
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
            "there are fewer devices than data_parallel: a run uses all of them"
        );
    }
    let (mut roomiest, mut available) = (0, 0);
    let mut run_bytes: Arc<AtomicU64> = Arc::default();
    for (i, base_models) in all.iter().enumerate() {
        if i.is_multiple_of(group) {
            // All devices of a group share one counter, because a run needs the same amount on
            // each.
            run_bytes = Arc::default();
        }
        let training = i.is_multiple_of(group).then(|| {
            let members = &devices[i..(i + group).min(devices.len())];
            // A run needs the same amount on each device, so the smallest one decides.
            let least = members
                .iter()
                .map(|(_, available)| *available)
                .min()
                .unwrap_or_default();
            if least > available {
                (roomiest, available) = (i, least);
            }
            let helpers = members[1..]
                .iter()
                .map(|(device, _)| device.clone())
                .collect();
            worker::TrainingResources {
                memory: least.saturating_sub(base_models.needed()),
                helpers,
            }
        });
        let label = label(&names, i);
        if base_models.device().memory().is_some() {
            metrics::gauge!("bradley_device_memory_limit_bytes", "device" => label.clone())
                .set(devices[i].1 as f64);
        }
        let room = Room::new(
            devices[i].1.saturating_sub(base_models.needed()),
            run_bytes.clone(),
            queue.host_memory().clone(),
            all.len(),
        );
        let mut worker = worker::Worker::new(
            i,
            label,
            queue.clone(),
            base_models.clone(),
            cache.clone(),
            &options,
            training,
        );
        worker.limit_policy_bytes(room);
        let ended = WorkerEndGuard(queue.clone(), i);
        std::thread::Builder::new()
            .name(format!("device-{}", base_models.device().name()))
            .spawn(move || {
                // Marks the worker as ended even after a panic, so that nobody waits forever.
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
            base_models: all[roomiest].clone(),
            // A run has no more devices, and its estimate counts the gradients of each.
            options: EngineOptions {
                data_parallel: group.min(all.len()),
                ..options
            },
            available,
            concurrent_runs,
        }),
    })
}

/// Returns the reason why the engine computes on these devices, for the log.
fn reason_for(options: &EngineOptions, devices: &[(ComputeDevice, u64)]) -> String {
    let has_gpu = devices.iter().any(|(device, _)| device.memory().is_some());
    match (options.devices.contains(&DeviceChoice::Auto), has_gpu) {
        (false, _) => "the setting device names them".to_owned(),
        (true, true) => "device is auto: every GPU that has room for the models is used".to_owned(),
        (true, false) => format!("device is auto: {}", ComputeDevice::no_gpu_reason()),
    }
}

/// Returns a worker's name in metrics: the name of its device, with a number if several workers
/// share a device.
fn label(devices: &[String], worker: usize) -> String {
    let name = &devices[worker];
    match devices.iter().filter(|other| *other == name).count() {
        1 => name.clone(),
        _ => format!("{name}:{worker}"),
    }
}

/// Refuses models whose heads are wider than the device's kernels support.
fn refuse_wide_heads(models: &[LoadedModel], device: &ComputeDevice) -> Result<(), EngineError> {
    let Some(limit) = device.max_head_dim() else {
        return Ok(());
    };
    match models.iter().find(|m| m.config.spec.head_dim() > limit) {
        None => Ok(()),
        Some(m) => Err(EngineError::Weights(format!(
            "models/{}: head_dim is {}, and {} computes with at most {limit}: serve it with \
             --device cpu",
            m.id,
            m.config.spec.head_dim(),
            device.name()
        ))),
    }
}

/// Opens the devices and returns each with the memory in bytes that the estimate may reach on it.
/// If the devices were chosen automatically, those that cannot hold the `needed` bytes are left
/// out. With `skip_missing_devices`, so are those that cannot be opened. If no device remains, the
/// last error is returned.
fn open_devices(
    options: &EngineOptions,
    models: &[LoadedModel],
    needed: u64,
) -> Result<Vec<(ComputeDevice, u64)>, EngineError> {
    let (mut devices, mut left_out) = (Vec::new(), None);
    for choice in &options.devices {
        let opened = match ComputeDevice::open_all(*choice)
            .map_err(|e| EngineError::Device(format!("{choice}: {e}")))
        {
            Err(e) if options.skip_missing_devices => {
                tracing::warn!(
                    device = %choice,
                    error = %e,
                    "a configured device cannot be opened: continuing without it"
                );
                left_out = Some(e);
                continue;
            }
            opened => opened?,
        };
        for device in opened {
            refuse_wide_heads(models, &device)?;
            let available = memory::limit(options, &device);
            if needed <= available {
                devices.push((device, available));
                continue;
            }
            let setting = if device.memory().is_some() {
                "device_memory_limit"
            } else {
                "memory_limit"
            };
            let remedy = format!(
                "load fewer or smaller models on {}, or raise {setting}",
                device.name()
            );
            let e = EngineError::OutOfMemory {
                needed_mib: needed.div_ceil(1 << 20),
                available_mib: available >> 20,
                remedy,
            };
            if *choice != DeviceChoice::Auto {
                return Err(e);
            }
            tracing::warn!(error = %e, "a device is left out");
            left_out = Some(e);
        }
    }
    if devices.is_empty()
        && let Some(e) = left_out
    {
        return Err(e);
    }
    // Workers on the CPU share the machine's memory and the weights in it.
    if devices.iter().all(|(device, _)| device.memory().is_none()) {
        let workers = devices.len().max(1) as u64;
        devices.iter_mut().for_each(|(_, available)| {
            *available = needed + available.saturating_sub(needed) / workers
        });
    }
    Ok(devices)
}

impl Engine {
    /// Returns the base models, in the order of the settings.
    pub fn models(&self) -> Vec<ModelInfo> {
        self.shared.base_models.infos()
    }

    /// Returns one base model.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have it.
    pub fn model(&self, id: &str) -> Result<ModelInfo, EngineError> {
        Ok(self.shared.base_models.get(id)?.info.clone())
    }

    /// Returns the work that this engine does with a base model. Training belongs to it if a run
    /// with the default settings, in the server's precision and on the shortest pairs, fits the
    /// memory limit. Scoring and export always belong to it.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have it.
    pub fn uses(&self, model: &str) -> Result<Vec<ModelUse>, EngineError> {
        let base = WeightsRef::Base {
            model: model.to_owned(),
        };
        let mut uses = Vec::new();
        for (training, method) in [
            (ModelUse::TrainLora, Method::Lora(LoraConfig::default())),
            (ModelUse::TrainFull, Method::Full),
        ] {
            let spec = TrainingSpec {
                method,
                precision: Some(self.precision()),
                ..TrainingSpec::default()
            };
            match self.check(model, Some(&base), &spec, Lengths::one(SHORTEST_PAIR)) {
                Ok(()) => uses.push(training),
                Err(EngineError::OutOfMemory { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        // The weights fit, or the engine would not have started. The memory of a scoring batch is
        // not checked, and an export reads one weight at a time.
        uses.extend([ModelUse::Score, ModelUse::Export]);
        Ok(uses)
    }

    /// Returns the precision of jobs that do not choose one.
    pub fn precision(&self) -> Precision {
        self.shared.options.precision
    }

    /// Returns the maximum number of runs in progress at the same time; more runs wait in the
    /// queue.
    pub fn concurrent_runs(&self) -> usize {
        self.shared.concurrent_runs
    }

    /// Returns the content hashes of a base model.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have it.
    pub fn identity(&self, model: &str) -> Result<ModelIdentity, EngineError> {
        Ok(self.shared.base_models.get(model)?.info.identity.clone())
    }

    /// Returns a base model's tokenizer.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have it.
    pub fn tokenizer(&self, model: &str) -> Result<Arc<ChatTokenizer>, EngineError> {
        Ok(self.shared.base_models.get(model)?.tokenizer.clone())
    }

    /// Returns the maximum number of tokens of a scored row.
    pub fn max_row_tokens(&self) -> usize {
        self.shared.options.max_row_tokens
    }

    /// Scores one item. If the future is dropped while the item is still queued, the item is never
    /// computed.
    ///
    /// # Errors
    /// `RowTooLong` and `QueueFull` immediately; `Draining` when the engine stops; otherwise the
    /// error of the pass.
    pub async fn score(
        &self,
        policy: &WeightsRef,
        reference: Option<&WeightsRef>,
        item: ScoreItem,
    ) -> Result<ScoredItem, EngineError> {
        let (tokens, limit) = (
            self.row_tokens([Some(policy), reference], &item),
            self.shared.options.max_row_tokens,
        );
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

    /// Continues a prompt. The events end after every sample's last token, or with an error.
    /// Dropping the stream cancels the request.
    ///
    /// Some models have other rotary frequencies for longer sequences. A sample ends where they
    /// would change.
    ///
    /// # Errors
    /// Those of [`Engine::check_generation`] and `TooManyGenerations` immediately; `Draining` if
    /// the engine stops. As an event: `NoRoomToGenerate` if memory is not sufficient,
    /// `AnswerNotRead` if the caller does not read, `GenerationDisplaced` if a run needs the
    /// memory; otherwise the errors of loading the weights and of the passes.
    pub fn generate(
        &self,
        policy: &WeightsRef,
        mut request: GenerationRequest,
    ) -> Result<GenerationStream, EngineError> {
        request.max_tokens = self.check_generation(policy, &request)?;
        let samples = request.samples;
        let (sender, events) = mpsc::channel(generation::channel_capacity(samples));
        let stopped: Arc<[AtomicBool]> = (0..samples).map(|_| AtomicBool::new(false)).collect();
        self.shared.queue.push_generation(GenerationEntry {
            request,
            policy: policy.clone(),
            enqueued: Instant::now(),
            stopped: stopped.clone(),
            events: sender,
        })?;
        Ok(GenerationStream { events, stopped })
    }

    /// Checks the lengths of a request. Returns the most tokens that each sample may have:
    /// `max_tokens`, or fewer if rotary frequencies change there.
    ///
    /// # Errors
    /// `PromptTooLong`, `SampleTooLong` or `SamplesTooLong` if a limit is exceeded; `UnknownModel`
    /// if the server does not have the model; `Weights` on a GPU.
    pub fn check_generation(
        &self,
        policy: &WeightsRef,
        request: &GenerationRequest,
    ) -> Result<usize, EngineError> {
        let shared = &self.shared;
        if !shared.base_models.device().is_cpu() {
            return Err(EngineError::Weights(
                "generation is not implemented on a GPU so far: serve the model with --device cpu \
                 to generate with it"
                    .to_owned(),
            ));
        }
        let (prompt, mut max_tokens) = (request.prompt.len(), request.max_tokens);
        let models: Vec<&Base> = match policy.model() {
            Some(model) => vec![shared.base_models.get(model)?],
            // The model of a running job may be any.
            None => shared.base_models.all().collect(),
        };
        for base in models {
            let spec = &base.policy.config.spec;
            max_tokens = generate::tokens_with_equal_frequencies(spec, prompt, max_tokens);
        }
        let options = &shared.options;
        let in_cache = |samples, max_tokens| {
            generate::blocks_needed(prompt, samples, max_tokens) * CACHE_BLOCK
        };
        let (row, cache) = (options.max_row_tokens, options.generation_cache_tokens);
        for (least, limit, setting) in [
            (prompt + 1, row, "max_row_tokens"),
            (in_cache(1, 1), cache, "generation_cache_tokens"),
        ] {
            if least > limit {
                return Err(EngineError::PromptTooLong {
                    tokens: prompt,
                    limit,
                    setting,
                });
            }
        }
        let (tokens, limit) = (prompt.saturating_add(max_tokens), row);
        if tokens > limit {
            return Err(EngineError::SampleTooLong { tokens, limit });
        }
        let (tokens, limit) = (in_cache(request.samples, max_tokens), cache);
        if tokens > limit {
            return Err(EngineError::SamplesTooLong { tokens, limit });
        }
        Ok(max_tokens)
    }

    /// Returns the number of tokens of a row that holds only this item, for the one of these
    /// weights whose model needs the longest row. If a model's rotary frequencies depend on the
    /// length of a sequence, sequences with different frequencies do not share their prompt, and
    /// the row has it several times.
    fn row_tokens(&self, weights: [Option<&WeightsRef>; 2], item: &ScoreItem) -> usize {
        let models = &self.shared.base_models;
        let of = |base: &Base| {
            let spec = &base.policy.config.spec;
            pack::row_tokens(&item.groups, &|length| spec.length_class(length))
        };
        let most = |weights: &WeightsRef| match weights.model() {
            Some(model) => models.get(model).ok().map(of),
            // The model of a running job may be any.
            None => models.all().map(of).max(),
        };
        let needed = weights.into_iter().flatten().filter_map(most).max();
        needed.unwrap_or_else(|| item.tokens())
    }

    /// Returns the targets of an adapter that stand for no layer of a base model.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have the model.
    pub fn unmatched_targets(
        &self,
        model: &str,
        lora: &LoraConfig,
    ) -> Result<Vec<String>, EngineError> {
        let spec = &self.shared.base_models.get(model)?.policy.config.spec;
        Ok(params::unmatched_targets(spec, lora))
    }

    /// Returns the number of tokens of the pairs in rows of `model`.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have the model.
    pub fn packed_tokens(&self, model: &str, pairs: &[EncodedPair]) -> Result<usize, EngineError> {
        let spec = &self.shared.base_models.get(model)?.policy.config.spec;
        let class = |length| spec.length_class(length);
        let of = |pair: &EncodedPair| pair.packed_tokens_by_length(&class);
        Ok(pairs.iter().map(of).sum())
    }

    /// Adds a run to the queue. Its progress is reported as events; `Ended` is the last one.
    ///
    /// # Errors
    /// Fails if the run cannot fit the memory limit, the server does not have a model that the run
    /// names, too many runs wait, or the engine is draining.
    pub fn train(&self, run: TrainingRun) -> Result<(), EngineError> {
        let size = run.spec.batch.batch_size;
        let lengths = self.lengths(&run.model, &run.train, &run.eval, size)?;
        let needs = self.needs(&run.model, run.reference.as_ref(), &run.spec, lengths)?;
        self.shared.queue.push_run(run, needs)
    }

    /// Returns the lengths of the pairs of a run in rows of `model`.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have the model.
    pub fn lengths(
        &self,
        model: &str,
        train: &[EncodedPair],
        eval: &[EncodedPair],
        batch_size: usize,
    ) -> Result<Lengths, EngineError> {
        let spec = &self.shared.base_models.get(model)?.policy.config.spec;
        Ok(Lengths::of_run(spec, train, eval, batch_size))
    }

    /// Performs the memory checks of [`Engine::train`] for pairs of these lengths.
    ///
    /// # Errors
    /// `OutOfMemory` if the run does not fit; `UnknownModel` if the server does not have a model
    /// that the run names.
    pub fn check(
        &self,
        model: &str,
        reference: Option<&WeightsRef>,
        spec: &TrainingSpec,
        lengths: Lengths,
    ) -> Result<(), EngineError> {
        self.needs(model, reference, spec, lengths).map(|_| ())
    }

    /// Returns the memory that a run needs, or an error if it exceeds the limits.
    fn needs(
        &self,
        model: &str,
        reference: Option<&WeightsRef>,
        spec: &TrainingSpec,
        lengths: Lengths,
    ) -> Result<Needs, EngineError> {
        let base_models = &self.shared.base_models;
        let config = &base_models.get(model)?.policy.config;
        let extra = self.extra(model, reference, spec, lengths)?;
        let available = self.shared.available;
        let mut host = 0;
        if self.memory_kind() == MemoryKind::Gpu {
            let options = &self.shared.options;
            host = extra.host + on_host(config, spec, options.data_parallel);
            let (needed, available) = (base_models.on_host() + host, memory::host_limit(options));
            if needed > available {
                let remedy = "train with LoRA, or raise memory_limit (the host's memory holds \
                    master weights, optimizer moments and copies of weights)"
                    .to_owned();
                return Err(EngineError::OutOfMemory {
                    needed_mib: needed.div_ceil(1 << 20),
                    available_mib: available >> 20,
                    remedy,
                });
            }
        }
        let resident = base_models.needed() + extra.device;
        let plan_within = |bytes| plan(config, spec, lengths, bytes, self.memory_kind());
        match plan_within(available.saturating_sub(resident)) {
            Ok(granted) => {
                // A device with less memory than the largest one may be enough for the leanest
                // plan.
                let (Ok(leanest) | Err(leanest)) = plan_within(0);
                let minimum = extra.device + leanest.total().min(granted.total());
                Ok(Needs {
                    extra: extra.device,
                    minimum,
                    host,
                })
            }
            Err(least) => {
                let setting = base_models.memory_setting();
                let remedy = match spec.dpo.compares_pairs() {
                    true => {
                        format!(
                            "lower batch_size (the loss holds all pairs of a batch) or \
                             max_length, train with LoRA, or raise {setting}"
                        )
                    }
                    false => format!(
                        "lower max_length, train with LoRA, leave activation_checkpointing to \
                         auto, or raise {setting}"
                    ),
                };
                Err(EngineError::OutOfMemory {
                    needed_mib: (resident + least.total()).div_ceil(1 << 20),
                    available_mib: available >> 20,
                    remedy,
                })
            }
        }
    }

    /// Returns the memory that a run needs besides the base models and its plan.
    fn extra(
        &self,
        model: &str,
        reference: Option<&WeightsRef>,
        spec: &TrainingSpec,
        lengths: Lengths,
    ) -> Result<Extra, EngineError> {
        needs::extra(
            &self.shared.base_models,
            model,
            reference,
            spec,
            lengths,
            self.memory_kind(),
        )
    }

    fn memory_kind(&self) -> MemoryKind {
        MemoryKind::of(self.shared.base_models.device())
    }

    /// Returns a run's peak memory for pairs of these lengths, base models included, and the limit,
    /// both in bytes. For a run that does not fit, the first value is the least that it needs.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have a model that the run names.
    pub fn memory(
        &self,
        model: &str,
        reference: Option<&WeightsRef>,
        spec: &TrainingSpec,
        lengths: Lengths,
    ) -> Result<(u64, u64), EngineError> {
        let base = self.shared.base_models.get(model)?;
        let resident =
            self.shared.base_models.needed() + self.extra(model, reference, spec, lengths)?.device;
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

    /// Returns the element type in which a model's weights are stored. Exports use it by default.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have it.
    pub fn element_type(&self, model: &str) -> Result<ElementType, EngineError> {
        Ok(self.shared.base_models.get(model)?.element_type)
    }

    /// Writes merged weights, the model's configuration and its tokenizer into the folder `out`.
    /// Weights come from the checkpoint's files or from the base model, whose files are read again
    /// if it is rounded in memory. So weights are rounded to `dtype` only once. If the base model
    /// is part of a model of text and images, the other parts are copied from the files. Blocks.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have the base model. `Weights` if a file cannot be
    /// read or written. `FilesChanged` if the base model is rounded in memory, or is part of a
    /// model of text and images, and its files are gone or were changed. `NotResident` for the
    /// weights of a running job.
    pub fn export_merged(
        &self,
        weights: &WeightsRef,
        dtype: ElementType,
        out: &Path,
    ) -> Result<(), EngineError> {
        let layout = Layout {
            dtype,
            shard_bytes: export::SHARD_BYTES,
        };
        let (model, adapter) = match weights {
            WeightsRef::Base { model }
            | WeightsRef::Full { model, .. }
            | WeightsRef::StoredReference { model, .. } => (model, None),
            WeightsRef::Adapter { model, dir, .. } => (model, Some(dir)),
            WeightsRef::Live { job } | WeightsRef::LiveReference { job } => {
                return Err(EngineError::NotResident(job.clone()));
            }
        };
        let base_models = &self.shared.base_models;
        let base = base_models.get(model)?;
        let (config, unusable) = (&base.policy.config, |e: ModelError| {
            EngineError::unusable(&e)
        });
        let adapter = adapter
            .map(|dir| peft::load(dir, config))
            .transpose()
            .map_err(unusable)?;
        let source = match weights {
            WeightsRef::Full { dir, .. } => {
                Some(Weights::open_safetensors(&dir.join(export::WEIGHTS_FILE)).map_err(unusable)?)
            }
            WeightsRef::StoredReference { dir, .. } => {
                Some(Weights::open_safetensors(&dir.join(REFERENCE_FILE)).map_err(unusable)?)
            }
            _ => base_models.reopen(model)?,
        };
        let whole = base_models.whole(model)?;
        let save = |read: &export::ReadWeight<'_>| {
            export::save_merged(out, config, adapter.as_ref(), layout, read, whole.as_ref())
        };
        let written = match &source {
            Some(files) => save(&|param: &ParamSpec| files.load(param, Precision::F32)),
            None => save(&base.policy.parameters.reader()),
        };
        // Only a base model's files are checked against the content that was loaded.
        written.map_err(|e| base_models.unreadable(model, &e))?;
        export::save_companions(out, config, &base.tokenizer, |_| true).map_err(unusable)
    }

    /// Writes a model's tokenizer and chat templates into the folder `out`. Blocks.
    ///
    /// # Errors
    /// `UnknownModel` if the server does not have it; `Weights` if a file cannot be written.
    pub fn export_tokenizer(&self, model: &str, out: &Path) -> Result<(), EngineError> {
        let base = self.shared.base_models.get(model)?;
        let wanted = |name: &str| name != GENERATION_CONFIG;
        export::save_companions(out, &base.policy.config, &base.tokenizer, wanted)
            .map_err(|e| EngineError::unusable(&e))
    }

    /// Evicts the weights that were loaded from `dir` or below, because the files are gone.
    pub fn evict_policy(&self, dir: &Path) {
        self.shared.queue.evict(dir);
    }

    /// Refuses new work from now on, and answers everything in the queue with `Draining`. A run in
    /// progress is stopped separately, through its [`RunControl`](api::RunControl).
    pub fn drain(&self) {
        for run in self.shared.queue.drain() {
            // At most one log message was sent before, so there is room for this event.
            let _ = run.events.try_send(RunEvent::Ended(RunEnd::Drained).into());
        }
    }

    /// Waits until the drained workers have finished their current batch or unit. Returns false if
    /// this takes longer than `patience`. The process must not exit earlier: its exit handlers shut
    /// down the GPU's libraries, which a worker may still be calling. Blocks.
    pub fn wait_for_end(&self, patience: Duration) -> bool {
        self.shared.queue.wait_for_end(patience)
    }
}
