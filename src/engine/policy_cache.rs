//! Weights in memory: base models permanently, adapters and full weights in an LRU cache.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::api::{EngineError, ModelInfo, RunCommand, RunControl, WeightsRef};
use super::memory::Room;
use crate::domain::training::{Precision, TrainingSpec};
use crate::formats::export;
use crate::formats::loader::LoadedModel;
use crate::formats::peft;
use crate::formats::tokenizer::ChatTokenizer;
use crate::formats::weights::{ElementType, WeightFiles, Weights};
use crate::model::config::ModelConfig;
use crate::model::decoder::Policy;
use crate::model::device::ComputeDevice;
use crate::model::error::ModelError;
use crate::model::parameters::Parameters;
use crate::model::params::ParamSpec;
use crate::train::checkpoint::REFERENCE_FILE;
use crate::train::estimate;

/// Maximum tokens of a scoring row that several items share; a longer item gets a row of its own.
/// Longer rows would only need more memory.
pub(super) const ROW_TOKENS: usize = 2048;

/// A base model in memory, shared by all policies on it.
#[derive(Clone)]
pub(super) struct Base {
    pub info: ModelInfo,
    pub policy: Policy,
    pub tokenizer: Arc<ChatTokenizer>,
    /// Files from which unrounded weights can be read again; `None` if the weights in memory are
    /// exact.
    files: Option<WeightFiles>,
    /// Files of the model of text and images that contains the language model, if it is a part of
    /// one.
    whole: Option<WeightFiles>,
    /// Element type of most weights in the files.
    pub element_type: ElementType,
    /// True if the weights in memory have the exact values of the files.
    pub is_exact: bool,
}

/// The base models by id, for one worker.
pub(super) struct BaseModels {
    by_id: HashMap<String, Base>,
    /// Ids in the order of the settings.
    order: Vec<String>,
    precision: Precision,
    device: ComputeDevice,
    /// The worker's name in metrics.
    label: String,
}

/// Returns the bytes of one frozen weight.
pub(super) fn weight_bytes(precision: Precision) -> u64 {
    match precision {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
    }
}

impl BaseModels {
    /// Loads every model's weights. `devices` names all devices that will use them.
    ///
    /// # Errors
    /// `Weights` if a tensor cannot be read.
    pub fn load(
        models: Vec<LoadedModel>,
        device: ComputeDevice,
        devices: &str,
        precision: Precision,
    ) -> Result<Self, EngineError> {
        let (mut by_id, mut order) = (HashMap::new(), Vec::new());
        for mut model in models {
            let is_exact = model.weights.is_exact_in(precision);
            if !is_exact {
                model.weights.record_digests();
            }
            let parameters = Parameters::load(&model.config, &model.weights, precision)
                .map_err(|e| EngineError::Weights(e.to_string()))?;
            let info = describe(&model, devices);
            let files = (!is_exact).then(|| model.weights.files());
            let whole = match model.config.whole_json {
                Some(_) => {
                    model.weights.record_digests();
                    model
                        .weights
                        .record_others(&model.config)
                        .map_err(|e| EngineError::Weights(e.to_string()))?;
                    Some(model.weights.files())
                }
                None => None,
            };
            let element_type = model.weights.element_type();
            order.push(model.id.clone());
            let policy = Policy {
                config: Arc::new(model.config),
                parameters: Arc::new(parameters),
                adapter: None,
                precision,
                device: device.clone(),
                helpers: Arc::default(),
            };
            let tokenizer = Arc::new(model.tokenizer);
            by_id.insert(
                model.id,
                Base {
                    info,
                    policy,
                    tokenizer,
                    files,
                    whole,
                    element_type,
                    is_exact,
                },
            );
        }
        Ok(BaseModels {
            by_id,
            order,
            precision,
            label: device.name(),
            device,
        })
    }

    /// Returns the same weights for a worker on another device. `label` is its name in metrics.
    pub fn on(&self, device: ComputeDevice, label: String) -> Self {
        let moved = |base: &Base| Base {
            policy: Policy {
                device: device.clone(),
                ..base.policy.clone()
            },
            ..base.clone()
        };
        let by_id = self
            .by_id
            .iter()
            .map(|(id, base)| (id.clone(), moved(base)))
            .collect();
        BaseModels {
            by_id,
            order: self.order.clone(),
            precision: self.precision,
            device,
            label,
        }
    }

    /// Returns the precision of the frozen weights and of scoring.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Returns the device that computes with them.
    pub fn device(&self) -> &ComputeDevice {
        &self.device
    }

    /// Returns the worker's name in metrics.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Returns the name of the setting that limits memory on this device.
    pub fn memory_setting(&self) -> &'static str {
        match self.device.memory() {
            Some(_) => "device_memory_limit",
            None => "memory_limit",
        }
    }

    /// Returns the model with this id.
    ///
    /// # Errors
    /// `UnknownModel` if there is none.
    pub fn get(&self, id: &str) -> Result<&Base, EngineError> {
        self.by_id
            .get(id)
            .ok_or_else(|| EngineError::UnknownModel(id.to_owned()))
    }

    /// Returns all models.
    pub fn all(&self) -> impl Iterator<Item = &Base> {
        self.by_id.values()
    }

    /// Returns descriptions of all models, in the order of the settings.
    pub fn infos(&self) -> Vec<ModelInfo> {
        self.order
            .iter()
            .filter_map(|id| self.by_id.get(id))
            .map(|b| b.info.clone())
            .collect()
    }

    /// Returns the bytes of all weights, and of the activations of one scoring row of
    /// [`ROW_TOKENS`] tokens on the model that needs the most. A longer row needs more.
    pub fn needed(&self) -> u64 {
        self.on_host()
            + self
                .by_id
                .values()
                .map(|b| estimate::scoring(&b.policy.config, ROW_TOKENS))
                .max()
                .unwrap_or(0)
    }

    /// Returns the bytes of all weights in host memory.
    pub fn on_host(&self) -> u64 {
        self.by_id
            .values()
            .map(|b| b.info.parameters * weight_bytes(self.precision))
            .sum()
    }

    /// Loads `weights`.
    ///
    /// # Errors
    /// `NotResident` for weights of a running job, `UnknownModel`, or `Weights` if files cannot be
    /// read.
    pub fn open(&self, weights: &WeightsRef) -> Result<Policy, EngineError> {
        match weights {
            WeightsRef::Base { model } => Ok(self.get(model)?.policy.clone()),
            WeightsRef::Adapter { model, dir, .. } => {
                let base = &self.get(model)?.policy;
                let adapter =
                    peft::load(dir, &base.config).map_err(|e| EngineError::unusable(&e))?;
                Ok(Policy {
                    adapter: Some(Arc::new(adapter)),
                    ..base.clone()
                })
            }
            WeightsRef::Full { model, dir, .. } => {
                self.open_full(model, &dir.join(export::WEIGHTS_FILE))
            }
            WeightsRef::StoredReference { model, dir, .. } => {
                self.open_full(model, &dir.join(REFERENCE_FILE))
            }
            WeightsRef::Live { job } | WeightsRef::LiveReference { job } => {
                Err(EngineError::NotResident(job.clone()))
            }
        }
    }

    /// Loads full weights for a base model's architecture.
    fn open_full(&self, model: &str, file: &Path) -> Result<Policy, EngineError> {
        let base = &self.get(model)?.policy;
        let parameters = load_full(&base.config, file, self.precision)?;
        Ok(Policy {
            parameters: Arc::new(parameters),
            adapter: None,
            ..base.clone()
        })
    }

    /// Opens the files of a base model that is rounded in memory; `None` if it is exact. Each
    /// tensor is checked when it is read, see [`WeightFiles`].
    ///
    /// # Errors
    /// `FilesChanged` if the files are gone.
    pub fn reopen(&self, model: &str) -> Result<Option<Weights>, EngineError> {
        let files = self.get(model)?.files.as_ref();
        files
            .map(WeightFiles::open)
            .transpose()
            .map_err(|e| self.unreadable(model, &e))
    }

    /// Opens the files of the model of text and images that contains a base model, if it is a part
    /// of one. The tensors of its other parts are checked when they are read.
    ///
    /// # Errors
    /// `FilesChanged` if the files are gone.
    pub fn whole(&self, model: &str) -> Result<Option<Weights>, EngineError> {
        let whole = self.get(model)?.whole.as_ref();
        whole
            .map(WeightFiles::open)
            .transpose()
            .map_err(|e| self.unreadable(model, &e))
    }

    /// Returns the error of a base model whose files cannot be read again.
    pub fn unreadable(&self, model: &str, e: &ModelError) -> EngineError {
        let ModelError::Changed { .. } = e else {
            return EngineError::unusable(e);
        };
        tracing::error!(model, error = %e, "the files of a base model cannot be read again");
        let mut remedy = "put the files back, or restart the server with the model".to_owned();
        EngineError::FilesChanged(match self.precision {
            Precision::F32 => format!(
                "models/{model}: an export copies the parts for images from the model's files, \
                 but {}; {remedy}",
                e.for_clients()
            ),
            Precision::Bf16 => {
                if self.get(model).is_ok_and(|base| base.whole.is_none()) {
                    remedy += ", or serve it in f32";
                }
                format!(
                    "models/{model}: this needs the model's files, because the server computes in \
                 bf16 and has rounded weights in memory, but {}; {remedy}",
                    e.for_clients()
                )
            }
        })
    }

    /// Reads a base model's unrounded weights in f32; `None` if those in memory are exact. Blocks.
    /// It uses only the calling thread, so that scoring has the other ones.
    ///
    /// # Errors
    /// `FilesChanged` if the files are gone or differ from what was loaded; `Draining` as soon as
    /// `control` tells the run to stop.
    pub fn exact(
        &self,
        model: &str,
        control: &RunControl,
    ) -> Result<Option<Parameters>, EngineError> {
        let Some(files) = self.reopen(model)? else {
            return Ok(None);
        };
        let read = |param: &ParamSpec| {
            if control.command() != RunCommand::Run {
                return Err(EngineError::Draining);
            }
            files
                .load(param, Precision::F32)
                .map_err(|e| self.unreadable(model, &e))
        };
        Parameters::build(&self.get(model)?.policy.config, read).map(Some)
    }

    /// Returns the bytes of full weights. `None` for other weights: an adapter's size is known only
    /// after loading, and the rest is in memory already.
    fn full_bytes(&self, weights: &WeightsRef) -> Result<Option<u64>, EngineError> {
        match weights {
            WeightsRef::Full { model, .. } | WeightsRef::StoredReference { model, .. } => Ok(Some(
                self.get(model)?.info.parameters * weight_bytes(self.precision),
            )),
            WeightsRef::Base { .. }
            | WeightsRef::Adapter { .. }
            | WeightsRef::Live { .. }
            | WeightsRef::LiveReference { .. } => Ok(None),
        }
    }

    /// Returns a name that identifies the content of these weights and the precision in which they
    /// are stored.
    ///
    /// # Errors
    /// `NotResident` for weights of a running job, and `UnknownModel`.
    pub fn identity(&self, weights: &WeightsRef) -> Result<String, EngineError> {
        self.identity_in(weights, self.precision)
    }

    /// Returns the same name for weights that are in memory in `precision`.
    ///
    /// # Errors
    /// Same as [`Self::identity`].
    pub fn identity_in(
        &self,
        weights: &WeightsRef,
        precision: Precision,
    ) -> Result<String, EngineError> {
        let base = |model: &str| {
            Ok::<_, EngineError>(format!(
                "{} {}",
                self.get(model)?.info.identity.hash(),
                precision.name()
            ))
        };
        Ok(match weights {
            WeightsRef::Base { model } => base(model)?,
            WeightsRef::Adapter { model, content, .. } => format!("{}+{content}", base(model)?),
            WeightsRef::Full { model, content, .. } => format!("{}={content}", base(model)?),
            WeightsRef::StoredReference { model, content, .. } => {
                format!("{}~{content}", base(model)?)
            }
            WeightsRef::Live { job } | WeightsRef::LiveReference { job } => {
                return Err(EngineError::NotResident(job.clone()));
            }
        })
    }
}

fn describe(model: &LoadedModel, device: &str) -> ModelInfo {
    ModelInfo {
        id: model.id.clone(),
        source: model.origin.clone(),
        base: model.base.clone(),
        architecture: model.config.model_type().to_owned(),
        parameters: model.config.parameter_count() as u64,
        vocab_size: model.config.spec.vocab_size,
        num_layers: model.config.spec.blocks.len(),
        hidden_size: model.config.spec.hidden_size,
        max_position_embeddings: model.config.spec.max_position_embeddings,
        stored_format: model.weights.stored_format(),
        text_only: model.config.whole_json.is_some(),
        chat_template: model.tokenizer.has_chat_template(),
        identity: model.identity(),
        device: device.to_owned(),
    }
}

/// Returns true if a run needs unrounded frozen weights: its passes are in f32, or its reference is
/// mixed with small parts of the policy (TR-DPO). Master weights start from unrounded weights in
/// any case.
pub(super) fn needs_exact(spec: &TrainingSpec, server: Precision) -> bool {
    spec.precision.unwrap_or(server) == Precision::F32 || spec.dpo.reference_sync.is_some()
}

/// Loads full weights from a file of a checkpoint.
///
/// # Errors
/// `Weights` if the file cannot be read or does not have the model's tensors.
pub(super) fn load_full(
    config: &ModelConfig,
    file: &Path,
    precision: Precision,
) -> Result<Parameters, EngineError> {
    let weights = Weights::open_safetensors(file).map_err(|e| EngineError::unusable(&e))?;
    Parameters::load(config, &weights, precision).map_err(|e| EngineError::unusable(&e))
}

/// Entry of the cache.
struct CachedPolicy {
    weights: WeightsRef,
    policy: Policy,
    bytes: u64,
    /// True if a run uses the weights; the run's own memory needs then include full weights.
    of_run: bool,
}

impl CachedPolicy {
    /// Returns true if other code holds these weights, so that evicting them would free no memory.
    fn is_in_use(&self) -> bool {
        match &self.policy.adapter {
            Some(adapter) => Arc::strong_count(adapter) > 1,
            None => Arc::strong_count(&self.policy.parameters) > 1,
        }
    }

    /// Returns the bytes that count against the cache's limit: none if a run's needs include them.
    fn counted_bytes(&self) -> u64 {
        let is_counted_by_run = self.of_run && self.policy.adapter.is_none() && self.is_in_use();
        if is_counted_by_run { 0 } else { self.bytes }
    }
}

/// LRU cache of adapters and full weights, bounded by bytes and by number. The cached keys and
/// values of generation count against the same bytes. Weights in use are never evicted for others:
/// adapters are then loaded in excess of both limits, full weights in excess of the number only.
pub(super) struct PolicyCache {
    limit: usize,
    room: Room,
    /// Bytes that are reserved for cached keys and values of generation.
    generation_bytes: u64,
    /// Most recently used last.
    all: Vec<CachedPolicy>,
}

impl PolicyCache {
    /// Creates a cache of at most `limit` entries, without a limit on their bytes.
    pub fn new(limit: usize) -> Self {
        PolicyCache {
            limit: limit.max(1),
            room: Room::unlimited(),
            generation_bytes: 0,
            all: Vec::new(),
        }
    }

    /// Limits the weights, keys and values to the bytes that `room` has, and evicts unused weights
    /// until they fit.
    pub fn limit_bytes(&mut self, room: Room) {
        self.room = room;
        self.fit();
    }

    /// Returns weights from the cache, or loads them.
    ///
    /// # Errors
    /// `NoRoom` if full weights do not fit even after all unused weights were evicted; otherwise
    /// the errors of loading.
    pub fn get(
        &mut self,
        base_models: &BaseModels,
        weights: &WeightsRef,
    ) -> Result<Policy, EngineError> {
        self.load(base_models, weights, false)
    }

    /// Returns weights for a run. The run's memory needs include full weights, so these are never
    /// refused.
    ///
    /// # Errors
    /// Fails if the weights cannot be loaded.
    pub fn get_for_run(
        &mut self,
        base_models: &BaseModels,
        weights: &WeightsRef,
    ) -> Result<Policy, EngineError> {
        self.load(base_models, weights, true)
    }

    fn load(
        &mut self,
        base_models: &BaseModels,
        weights: &WeightsRef,
        for_run: bool,
    ) -> Result<Policy, EngineError> {
        if let WeightsRef::Base { .. } = weights {
            return base_models.open(weights);
        }
        let mut found = match self.all.iter().position(|r| r.weights == *weights) {
            Some(i) => self.all.remove(i),
            None => {
                let (policy, bytes) = match base_models.full_bytes(weights)? {
                    Some(bytes) => {
                        self.evict_for_full_weights(base_models, bytes, for_run)?;
                        (base_models.open(weights)?, bytes)
                    }
                    // Adapters are small: others are evicted for them, but they are never refused.
                    None => {
                        let policy = base_models.open(weights)?;
                        let bytes = adapter_bytes(&policy);
                        self.evict_for(bytes);
                        (policy, bytes)
                    }
                };
                CachedPolicy {
                    weights: weights.clone(),
                    policy,
                    bytes,
                    of_run: false,
                }
            }
        };
        found.of_run |= for_run;
        let policy = found.policy.clone();
        self.all.push(found);
        self.report(base_models);
        Ok(policy)
    }

    /// Evicts the least recently used weights that are not in use until `bytes` more bytes and one
    /// more entry fit, or nothing is left to evict.
    fn evict_for(&mut self, bytes: u64) {
        while self.left() < bytes || self.all.len() >= self.limit {
            if !self.evict_oldest() {
                break;
            }
        }
    }

    /// Evicts as [`Self::evict_for`] does, and refuses full weights that still do not fit.
    fn evict_for_full_weights(
        &mut self,
        base_models: &BaseModels,
        bytes: u64,
        for_run: bool,
    ) -> Result<(), EngineError> {
        self.evict_for(bytes);
        let left = self.left();
        if bytes <= left || for_run {
            return Ok(());
        }
        let setting = if base_models.device().memory().is_some() {
            "device_memory_limit or memory_limit"
        } else {
            "memory_limit"
        };
        Err(EngineError::NoRoom {
            needed_mib: bytes.div_ceil(1 << 20),
            available_mib: left >> 20,
            setting,
        })
    }

    /// Returns the bytes that are left for more weights.
    fn left(&self) -> u64 {
        self.room
            .bytes()
            .saturating_sub(self.counted_bytes() + self.generation_bytes)
    }

    /// Returns true if `bytes` for the keys and values of a request with these weights have no room
    /// now, but will have it when the requests in progress have ended. An adapter that is not in
    /// the cache counts as 0 bytes, because its size is known only after loading.
    pub fn must_wait(&self, base_models: &BaseModels, weights: &WeightsRef, bytes: u64) -> bool {
        let (own, others): (Vec<_>, Vec<_>) = self.all.iter().partition(|r| r.weights == *weights);
        let own = match own.first() {
            Some(own) => own.counted_bytes(),
            None => base_models.full_bytes(weights).ok().flatten().unwrap_or(0),
        };
        // No batch is in progress meanwhile, so only requests and the run use weights.
        let in_use = |by_run: bool| -> u64 {
            let stay = others
                .iter()
                .filter(|r| r.is_in_use() && (r.of_run || !by_run));
            stay.map(|r| r.counted_bytes()).sum()
        };
        let (room, needed) = (self.room.bytes(), own + bytes);
        needed + in_use(true) <= room && needed + in_use(false) + self.generation_bytes > room
    }

    /// Reserves bytes for cached keys and values, and evicts weights that are not in use for them.
    ///
    /// # Errors
    /// `NoRoomToGenerate` if the memory does not have them beside the base models, the weights in
    /// use and the run in progress.
    pub fn reserve_cache(
        &mut self,
        base_models: &BaseModels,
        bytes: u64,
    ) -> Result<(), EngineError> {
        while self.left() < bytes && self.evict_oldest() {}
        if self.left() < bytes {
            return Err(EngineError::NoRoomToGenerate {
                needed_mib: bytes.div_ceil(1 << 20),
                available_mib: self.left() >> 20,
                setting: base_models.memory_setting(),
            });
        }
        self.generation_bytes += bytes;
        Ok(())
    }

    /// Gives reserved bytes back.
    pub fn release_cache(&mut self, bytes: u64) {
        self.generation_bytes = self.generation_bytes.saturating_sub(bytes);
    }

    #[cfg(test)]
    pub fn reserved_cache(&self) -> u64 {
        self.generation_bytes
    }

    fn counted_bytes(&self) -> u64 {
        self.all.iter().map(CachedPolicy::counted_bytes).sum()
    }

    /// Evicts the least recently used weights that are not in use. Returns false if there are none.
    fn evict_oldest(&mut self) -> bool {
        let oldest = self.all.iter().position(|r| !r.is_in_use());
        oldest.map(|i| self.all.remove(i)).is_some()
    }

    /// Reserves `bytes` for the run on this group of devices, and evicts weights that no longer
    /// fit. 0 means that the run has ended.
    pub fn reserve_for_run(&mut self, bytes: u64) {
        if bytes == 0 {
            self.all.iter_mut().for_each(|r| r.of_run = false);
        }
        self.room.reserve_for_run(bytes);
        self.fit();
    }

    /// Evicts weights that do not fit beside the runs in progress.
    pub fn fit(&mut self) {
        while !self.fits() && self.evict_oldest() {}
    }

    /// Returns true if the weights, and the cached keys and values, fit beside the runs in
    /// progress.
    pub fn fits(&self) -> bool {
        self.counted_bytes() + self.generation_bytes <= self.room.bytes()
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Evicts all weights that are not in use.
    pub fn evict_unused(&mut self) {
        self.all.retain(CachedPolicy::is_in_use);
    }

    /// Evicts the weights that were loaded from the deleted folder `gone` or below, even if they
    /// are in use. The folder may later have other content.
    pub fn evict(&mut self, gone: &Path) {
        self.all.retain(|r| match &r.weights {
            WeightsRef::Adapter { dir, .. }
            | WeightsRef::Full { dir, .. }
            | WeightsRef::StoredReference { dir, .. } => !dir.starts_with(gone),
            WeightsRef::Base { .. }
            | WeightsRef::Live { .. }
            | WeightsRef::LiveReference { .. } => true,
        });
    }

    /// Updates the gauge of the number of weights in the cache.
    pub fn report(&self, base_models: &BaseModels) {
        metrics::gauge!("bradley_resident_policies", "device" => base_models.label().to_owned())
            .set(self.all.len() as f64);
    }
}

/// Returns the bytes of a policy's adapter in memory.
pub(super) fn adapter_bytes(policy: &Policy) -> u64 {
    let tensors = policy.adapter.iter().flat_map(|adapter| adapter.named());
    tensors
        .map(|(_, t)| (t.elem_count() * t.dtype().size_in_bytes()) as u64)
        .sum()
}

#[cfg(test)]
mod tests;
