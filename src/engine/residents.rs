//! Which weights are in memory: the base models for good, adapters and full weights while they are
//! used.

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

/// Tokens of a row that several items share: more would only need more memory.
pub(super) const ROW_TOKENS: usize = 2048;

/// A base model in memory; shared by every policy on it.
#[derive(Clone)]
pub(super) struct Base {
    pub info: ModelInfo,
    pub policy: Policy,
    pub tokenizer: Arc<ChatTokenizer>,
    /// Where its weights are read as the files have them; `None` where the ones in memory are
    /// these.
    files: Option<WeightFiles>,
    /// What most of its numbers are stored in.
    pub element_type: ElementType,
    /// Whether the weights in memory are those of the files, not rounded.
    pub is_exact: bool,
}

/// The base models by id, for one device.
pub(super) struct Bases {
    by_id: HashMap<String, Base>,
    /// In the order of the settings.
    order: Vec<String>,
    precision: Precision,
    device: ComputeDevice,
}

/// Bytes of a frozen weight.
pub(super) fn weight_bytes(precision: Precision) -> u64 {
    match precision {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
    }
}

impl Bases {
    /// Loads every model's weights; `devices` names all that will have them.
    pub fn load(
        models: Vec<LoadedModel>,
        device: ComputeDevice,
        devices: &str,
        precision: Precision,
    ) -> Result<Self, EngineError> {
        let (mut bases, mut order) = (HashMap::new(), Vec::new());
        for mut model in models {
            let is_exact = model.weights.is_exact_in(precision);
            if !is_exact {
                model.weights.record_digests();
            }
            let parameters = Parameters::load(&model.config, &model.weights, precision)
                .map_err(|e| EngineError::Weights(e.to_string()))?;
            let info = describe(&model, devices);
            let (files, element_type) =
                ((!is_exact).then(|| model.weights.files()), model.weights.element_type());
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
            bases.insert(model.id, Base { info, policy, tokenizer, files, element_type, is_exact });
        }
        Ok(Bases { by_id: bases, order, precision, device })
    }

    /// The same weights for another device.
    pub fn on(&self, device: ComputeDevice) -> Self {
        let moved = |base: &Base| Base {
            policy: Policy { device: device.clone(), ..base.policy.clone() },
            ..base.clone()
        };
        let by_id = self.by_id.iter().map(|(id, base)| (id.clone(), moved(base))).collect();
        Bases { by_id, order: self.order.clone(), precision: self.precision, device }
    }

    /// What they compute in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Where they compute.
    pub fn device(&self) -> &ComputeDevice {
        &self.device
    }

    /// The setting that limits the memory of their passes.
    pub fn memory_setting(&self) -> &'static str {
        match self.device.memory() {
            Some(_) => "device_memory_limit",
            None => "memory_limit",
        }
    }

    /// One of them.
    pub fn get(&self, id: &str) -> Result<&Base, EngineError> {
        self.by_id.get(id).ok_or_else(|| EngineError::UnknownModel(id.to_owned()))
    }

    /// All of them, in the order of the settings.
    pub fn infos(&self) -> Vec<ModelInfo> {
        self.order.iter().filter_map(|id| self.by_id.get(id)).map(|b| b.info.clone()).collect()
    }

    /// Bytes of their weights, and of a scoring batch on the largest of them.
    pub fn needed(&self) -> u64 {
        self.on_host()
            + self
                .by_id
                .values()
                .map(|b| estimate::scoring(&b.policy.config, ROW_TOKENS))
                .max()
                .unwrap_or(0)
    }

    /// Bytes of their weights on the host, whatever computes.
    pub fn on_host(&self) -> u64 {
        self.by_id.values().map(|b| b.info.parameters * weight_bytes(self.precision)).sum()
    }

    /// Loads what `weights` names, other than a running job.
    pub fn open(&self, weights: &WeightsRef) -> Result<Policy, EngineError> {
        match weights {
            WeightsRef::Base { model } => Ok(self.get(model)?.policy.clone()),
            WeightsRef::Adapter { model, dir, .. } => {
                let base = &self.get(model)?.policy;
                let adapter =
                    peft::load(dir, &base.config).map_err(|e| EngineError::unusable(&e))?;
                Ok(Policy { adapter: Some(Arc::new(adapter)), ..base.clone() })
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

    /// Loads full weights of a base model's shape.
    fn open_full(&self, model: &str, file: &Path) -> Result<Policy, EngineError> {
        let base = &self.get(model)?.policy;
        let parameters = load_full(&base.config, file, self.precision)?;
        Ok(Policy { parameters: Arc::new(parameters), adapter: None, ..base.clone() })
    }

    /// Opens the files of a base model whose weights in memory are rounded; `None` where they are
    /// not. Every tensor that is read is checked, see [`WeightFiles`].
    ///
    /// # Errors
    /// `FilesChanged` when the files are gone.
    pub fn reopen(&self, model: &str) -> Result<Option<Weights>, EngineError> {
        let files = self.get(model)?.files.as_ref();
        files.map(WeightFiles::open).transpose().map_err(|e| self.unreadable(model, &e))
    }

    /// Says why a base model's files cannot be read again.
    pub fn unreadable(&self, model: &str, e: &ModelError) -> EngineError {
        let ModelError::Changed { .. } = e else { return EngineError::unusable(e) };
        tracing::error!(model, error = %e, "the weights in their own precision cannot be read");
        EngineError::FilesChanged(format!(
            "models/{model}: this needs the weights as their files have them, because the server computes in {} and the files are more \
             precise, but {}; put the files back, restart the server with the model, or serve it in f32",
            self.precision.name(),
            e.for_clients()
        ))
    }

    /// Reads a base model's weights in f32 as its files have them; `None` where those in memory are
    /// not rounded. Blocks, and runs on the calling thread alone: scoring goes on with the others.
    ///
    /// # Errors
    /// `FilesChanged` when the files are gone or hold something else than what was loaded, and
    /// `Draining` as soon as `control` says that the run is not wanted.
    pub fn exact(
        &self,
        model: &str,
        control: &RunControl,
    ) -> Result<Option<Parameters>, EngineError> {
        let Some(files) = self.reopen(model)? else { return Ok(None) };
        let read = |param: &ParamSpec| {
            if control.command() != RunCommand::Run {
                return Err(EngineError::Draining);
            }
            files.load(param, Precision::F32).map_err(|e| self.unreadable(model, &e))
        };
        Parameters::build(&self.get(model)?.policy.config, read).map(Some)
    }

    /// Bytes of full weights besides the base models'; `None` for others, whose size is known when
    /// they are loaded.
    fn full_bytes(&self, weights: &WeightsRef) -> Result<Option<u64>, EngineError> {
        match weights {
            WeightsRef::Full { model, .. } | WeightsRef::StoredReference { model, .. } => {
                Ok(Some(self.get(model)?.info.parameters * weight_bytes(self.precision)))
            }
            WeightsRef::Base { .. }
            | WeightsRef::Adapter { .. }
            | WeightsRef::Live { .. }
            | WeightsRef::LiveReference { .. } => Ok(None),
        }
    }

    /// A name for these weights that never means others, nor the same ones stored in another
    /// precision.
    pub fn identity(&self, weights: &WeightsRef) -> Result<String, EngineError> {
        self.identity_in(weights, self.precision)
    }

    /// The same for weights that are in memory in `precision`.
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
        architecture: format!("{:?}", model.config.architecture).to_lowercase(),
        parameters: model.config.parameter_count() as u64,
        vocab_size: model.config.spec.vocab_size,
        num_layers: model.config.spec.blocks.len(),
        hidden_size: model.config.spec.hidden_size,
        max_position_embeddings: model.config.spec.max_position_embeddings,
        chat_template: model.tokenizer.has_chat_template(),
        identity: model.identity(),
        device: device.to_owned(),
    }
}

/// Returns true if a run's frozen weights must not be rounded: its passes are in f32, or its
/// reference takes in small parts of the policy. Masters start from such weights in any case.
pub(super) fn wants_exact(spec: &TrainingSpec, server: Precision) -> bool {
    spec.precision.unwrap_or(server) == Precision::F32 || spec.dpo.reference_sync.is_some()
}

/// Loads the full weights of a checkpoint's folder.
pub(super) fn load_full(
    config: &ModelConfig,
    file: &Path,
    precision: Precision,
) -> Result<Parameters, EngineError> {
    let weights = Weights::open_safetensors(file).map_err(|e| EngineError::unusable(&e))?;
    Parameters::load(config, &weights, precision).map_err(|e| EngineError::unusable(&e))
}

/// Weights in the cache.
struct Resident {
    weights: WeightsRef,
    policy: Policy,
    bytes: u64,
    /// Whether a run has them: its own needs count full weights then.
    of_run: bool,
}

impl Resident {
    /// Returns true if something computes with these weights, so that evicting them would free
    /// nothing.
    fn is_in_use(&self) -> bool {
        match &self.policy.adapter {
            Some(adapter) => Arc::strong_count(adapter) > 1,
            None => Arc::strong_count(&self.policy.parameters) > 1,
        }
    }

    /// Bytes that no run counts.
    fn counted(&self) -> u64 {
        let is_run_s = self.of_run && self.policy.adapter.is_none() && self.is_in_use();
        if is_run_s { 0 } else { self.bytes }
    }
}

/// LRU cache of adapters and full weights, bounded by bytes and by number.
pub(super) struct Residents {
    limit: usize,
    room: Room,
    /// Most recently used last.
    all: Vec<Resident>,
}

impl Residents {
    /// At most `limit` of them, however large.
    pub fn new(limit: usize) -> Self {
        Residents { limit: limit.max(1), room: Room::unlimited(), all: Vec::new() }
    }

    /// Lets them take no more bytes than `room` has.
    pub fn limit_bytes(&mut self, room: Room) {
        self.room = room;
        self.fit();
    }

    /// Returns weights, and loads them unless they are there.
    ///
    /// # Errors
    /// `NoRoom` when there is no room for full weights although everything that nothing computes
    /// with was evicted; those of opening them.
    pub fn get(&mut self, bases: &Bases, weights: &WeightsRef) -> Result<Policy, EngineError> {
        self.load(bases, weights, false)
    }

    /// The same for a run, whose needs count full weights: for these room was granted.
    pub fn get_for_run(
        &mut self,
        bases: &Bases,
        weights: &WeightsRef,
    ) -> Result<Policy, EngineError> {
        self.load(bases, weights, true)
    }

    fn load(
        &mut self,
        bases: &Bases,
        weights: &WeightsRef,
        for_run: bool,
    ) -> Result<Policy, EngineError> {
        if let WeightsRef::Base { .. } = weights {
            return bases.open(weights);
        }
        let mut found = match self.all.iter().position(|r| r.weights == *weights) {
            Some(i) => self.all.remove(i),
            None => {
                let (policy, bytes) = match bases.full_bytes(weights)? {
                    Some(bytes) => {
                        self.make_room(bases, bytes, for_run)?;
                        (bases.open(weights)?, bytes)
                    }
                    // Adapters are small: others make room for them, but none is refused.
                    None => {
                        let policy = bases.open(weights)?;
                        let bytes = adapter_bytes(&policy);
                        self.evict_for(bytes);
                        (policy, bytes)
                    }
                };
                Resident { weights: weights.clone(), policy, bytes, of_run: false }
            }
        };
        found.of_run |= for_run;
        let policy = found.policy.clone();
        self.all.push(found);
        self.report(bases);
        Ok(policy)
    }

    /// Evicts the least recently used weights that nothing computes with, until one more of `bytes`
    /// bytes has room or none is left to evict.
    fn evict_for(&mut self, bytes: u64) {
        while self.left() < bytes || self.all.len() >= self.limit {
            if !self.evict_oldest() {
                break;
            }
        }
    }

    /// The same for full weights, which are refused where there is still no room for them.
    fn make_room(&mut self, bases: &Bases, bytes: u64, for_run: bool) -> Result<(), EngineError> {
        self.evict_for(bytes);
        let left = self.left();
        if bytes <= left || for_run {
            return Ok(());
        }
        let setting = if bases.device().memory().is_some() {
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

    /// Bytes that are left for more weights.
    fn left(&self) -> u64 {
        self.room.bytes().saturating_sub(self.counted())
    }

    fn counted(&self) -> u64 {
        self.all.iter().map(Resident::counted).sum()
    }

    /// Evicts the least recently used weights that nothing computes with; false when there are
    /// none.
    fn evict_oldest(&mut self) -> bool {
        let oldest = self.all.iter().position(|r| !r.is_in_use());
        oldest.map(|i| self.all.remove(i)).is_some()
    }

    /// Reserves `bytes` for the run on these devices, and evicts what has no room beside it. 0
    /// means that the run is over.
    pub fn reserve_for_run(&mut self, bytes: u64) {
        if bytes == 0 {
            self.all.iter_mut().for_each(|r| r.of_run = false);
        }
        self.room.reserve_for_run(bytes);
        self.fit();
    }

    /// Evicts what has no room beside the runs in progress.
    pub fn fit(&mut self) {
        while self.counted() > self.room.bytes() && self.evict_oldest() {}
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Evicts everything that nothing computes with.
    pub fn evict_unused(&mut self) {
        self.all.retain(Resident::is_in_use);
    }

    /// Forgets weights whose files are gone.
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

    fn report(&self, bases: &Bases) {
        metrics::gauge!("bradley_resident_policies", "device" => bases.device().name())
            .set(self.all.len() as f64);
    }
}

/// Bytes of a policy's adapter in memory.
fn adapter_bytes(policy: &Policy) -> u64 {
    let tensors = policy.adapter.iter().flat_map(|adapter| adapter.named());
    tensors.map(|(_, t)| (t.elem_count() * t.dtype().size_in_bytes()) as u64).sum()
}

#[cfg(test)]
mod tests;
