//! Which weights are in memory: the base models for good, adapters and full weights while they are used.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::api::{EngineError, ModelInfo, WeightsRef};
use super::scoring::ROW_TOKENS;
use crate::domain::training::{Method, Precision, TrainingSpec};
use crate::model::config::ModelConfig;
use crate::model::decoder::Policy;
use crate::model::device::ComputeDevice;
use crate::model::export;
use crate::model::loader::LoadedModel;
use crate::model::parameters::Parameters;
use crate::model::peft;
use crate::model::tokenizer::ChatTokenizer;
use crate::model::weights::{ElementType, WeightFiles, Weights};
use crate::train::checkpoint::REFERENCE_FILE;
use crate::train::estimate;

/// A base model in memory; shared by every policy on it.
#[derive(Clone)]
pub(super) struct Base {
    pub info: ModelInfo,
    pub policy: Policy,
    pub tokenizer: Arc<ChatTokenizer>,
    /// Where its weights were read.
    files: WeightFiles,
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
    pub fn load(models: Vec<LoadedModel>, device: ComputeDevice, devices: &str, precision: Precision) -> Result<Self, EngineError> {
        let (mut bases, mut order) = (HashMap::new(), Vec::new());
        for model in models {
            let parameters = Parameters::load(&model.config, &model.weights, precision).map_err(|e| EngineError::Weights(e.to_string()))?;
            let info = describe(&model, devices);
            let (files, element_type) = (model.weights.files(), model.weights.element_type());
            let is_exact = model.weights.is_exact_in(precision);
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
        let moved = |base: &Base| Base { policy: Policy { device: device.clone(), ..base.policy.clone() }, ..base.clone() };
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
        self.on_host() + self.by_id.values().map(|b| estimate::scoring(&b.policy.config, ROW_TOKENS)).max().unwrap_or(0)
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
                let adapter = peft::load(dir, &base.config).map_err(|e| EngineError::unusable(&e))?;
                Ok(Policy { adapter: Some(Arc::new(adapter)), ..base.clone() })
            }
            WeightsRef::Full { model, dir, .. } => self.open_full(model, &dir.join(export::WEIGHTS_FILE)),
            WeightsRef::StoredReference { model, dir, .. } => self.open_full(model, &dir.join(REFERENCE_FILE)),
            WeightsRef::Live { job } => Err(EngineError::NotResident(job.clone())),
        }
    }

    /// Loads full weights of a base model's shape.
    fn open_full(&self, model: &str, file: &Path) -> Result<Policy, EngineError> {
        let base = &self.get(model)?.policy;
        let parameters = load_full(&base.config, file, self.precision)?;
        Ok(Policy { parameters: Arc::new(parameters), adapter: None, ..base.clone() })
    }

    /// Opens a base model's files again.
    ///
    /// # Errors
    /// When they are gone, or are not the ones any more that were loaded.
    pub fn reopen(&self, model: &str) -> Result<Weights, EngineError> {
        let base = self.get(model)?;
        base.files.open(&base.policy.config).map_err(|e| {
            tracing::error!(model, error = %e, "the weights in their own precision cannot be read");
            EngineError::Weights(format!(
                "models/{model}: this needs the weights as their files have them, because the server computes in {} and the files are more \
                 precise, but they cannot be read: {}; put the files back, restart the server with the model, or serve it in f32",
                self.precision.name(),
                e.for_clients()
            ))
        })
    }

    /// Loads a base model's weights as its files have them: those in memory, or in f32 from the files
    /// if the ones in memory are rounded.
    pub fn exact(&self, model: &str) -> Result<Policy, EngineError> {
        let base = self.get(model)?;
        if base.is_exact {
            return Ok(base.policy.clone());
        }
        let weights = self.reopen(model)?;
        let config = &base.policy.config;
        let parameters = Parameters::load(config, &weights, Precision::F32).map_err(|e| EngineError::unusable(&e))?;
        Ok(Policy { parameters: Arc::new(parameters), ..base.policy.clone() })
    }

    /// Bytes of the base weights that [`Bases::exact`] loads for a run and that live as long as it:
    /// of a LoRA policy, and of a reference.
    pub fn exact_copy(&self, base: &Base, spec: &TrainingSpec) -> u64 {
        let is_frozen = matches!(spec.method, Method::Lora(_)) || spec.dpo.has_reference(true);
        let is_copied = !base.is_exact && is_frozen && wants_exact(spec, self.precision);
        if is_copied { base.info.parameters * weight_bytes(Precision::F32) } else { 0 }
    }

    /// A name for these weights that never means others, nor the same ones stored in another precision.
    pub fn identity(&self, weights: &WeightsRef) -> Result<String, EngineError> {
        self.identity_in(weights, self.precision)
    }

    /// The same for weights that are in memory in `precision`.
    pub fn identity_in(&self, weights: &WeightsRef, precision: Precision) -> Result<String, EngineError> {
        let base = |model: &str| Ok::<_, EngineError>(format!("{} {}", self.get(model)?.info.identity.hash(), precision.name()));
        Ok(match weights {
            WeightsRef::Base { model } => base(model)?,
            WeightsRef::Adapter { model, content, .. } => format!("{}+{content}", base(model)?),
            WeightsRef::Full { model, content, .. } => format!("{}={content}", base(model)?),
            WeightsRef::StoredReference { model, content, .. } => format!("{}~{content}", base(model)?),
            WeightsRef::Live { job } => return Err(EngineError::NotResident(job.clone())),
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
pub(super) fn load_full(config: &ModelConfig, file: &Path, precision: Precision) -> Result<Parameters, EngineError> {
    let weights = Weights::open_safetensors(file).map_err(|e| EngineError::unusable(&e))?;
    Parameters::load(config, &weights, precision).map_err(|e| EngineError::unusable(&e))
}

/// Adapters and full weights that were used lately; the least recently used leaves first.
pub(super) struct Residents {
    limit: usize,
    /// Most recently used last.
    policies: Vec<(WeightsRef, Policy)>,
}

impl Residents {
    pub fn new(limit: usize) -> Self {
        Residents { limit: limit.max(1), policies: Vec::new() }
    }

    pub fn get(&mut self, bases: &Bases, weights: &WeightsRef) -> Result<Policy, EngineError> {
        if let WeightsRef::Base { .. } = weights {
            return bases.open(weights);
        }
        let found = match self.policies.iter().position(|(w, _)| w == weights) {
            Some(i) => self.policies.remove(i),
            None => (weights.clone(), bases.open(weights)?),
        };
        if self.policies.len() >= self.limit {
            self.policies.remove(0);
        }
        let policy = found.1.clone();
        self.policies.push(found);
        metrics::gauge!("bradley_resident_policies", "device" => bases.device().name()).set(self.policies.len() as f64);
        Ok(policy)
    }

    /// Forgets weights whose files are gone.
    pub fn evict(&mut self, gone: &Path) {
        self.policies.retain(|(w, _)| match w {
            WeightsRef::Adapter { dir, .. } | WeightsRef::Full { dir, .. } | WeightsRef::StoredReference { dir, .. } => {
                !dir.starts_with(gone)
            }
            WeightsRef::Base { .. } | WeightsRef::Live { .. } => true,
        });
    }
}
