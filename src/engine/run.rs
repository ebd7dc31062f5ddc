//! Turns a requested run into a trainer: resolves weights, initialises the adapter, selects the
//! reference.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::DType;

use super::api::{EngineError, RunControl, TrainingRun, WeightsRef};
use super::policy_cache::{BaseModels, PolicyCache, load_full, needs_exact};
use crate::domain::training::{Method, Precision, TrainingSpec};
use crate::formats::{export, peft};
use crate::model::adapter::Adapter;
use crate::model::decoder::Policy;
use crate::model::device::ComputeDevice;
use crate::model::error::ModelError;
use crate::model::parameters::Parameters;
use crate::train::checkpoint::REFERENCE_FILE;
use crate::train::reference::Reference;
use crate::train::trainable::TrainablePolicy;
use crate::train::trainer::{TrainError, Trainer, TrainerInput};

/// Unrounded base weights in f32, by model id.
pub(super) type ExactBases = HashMap<String, Arc<Parameters>>;

/// Returns the base models that a run needs unrounded, but that are in memory only rounded.
pub(super) fn models_to_read(run: &TrainingRun, base_models: &BaseModels) -> Vec<String> {
    let start = starts_exact(&run.spec, base_models.precision()).then_some(&run.start);
    let reference = run
        .reference
        .as_ref()
        .filter(|_| needs_exact(&run.spec, base_models.precision()));
    let mut models = Vec::new();
    for weights in [start, reference].into_iter().flatten() {
        let (WeightsRef::Base { model } | WeightsRef::Adapter { model, .. }) = weights else {
            continue;
        };
        if !models.contains(model) && base_models.get(model).is_ok_and(|base| !base.is_exact) {
            models.push(model.clone());
        }
    }
    models
}

/// Reads the models of [`models_to_read`] again. Blocks, so the worker calls it on another thread
/// and the device continues to score.
///
/// # Errors
/// Same as [`BaseModels::exact`].
pub(super) fn read_exact(
    models: &[String],
    base_models: &BaseModels,
    control: &RunControl,
) -> Result<ExactBases, EngineError> {
    let mut exact = ExactBases::new();
    for model in models {
        if let Some(parameters) = base_models.exact(model, control)? {
            exact.insert(model.clone(), Arc::new(parameters));
        }
    }
    Ok(exact)
}

/// Returns true if the policy must start from unrounded weights. Master weights are f32,
/// independently of the precision of the server's frozen weights and of the passes.
fn starts_exact(spec: &TrainingSpec, server: Precision) -> bool {
    spec.method == Method::Full || needs_exact(spec, server)
}

/// Creates the trainer of `run`; events and control stay with the caller.
///
/// `read` has the weights that [`read_exact`] returned for the run. `memory` is the limit of its
/// plan in bytes, not counting copies of weights (see [`super::needs::extra`]). `helpers` are the
/// devices that share the rows with the worker's own device.
///
/// # Errors
/// `OutOfMemory` or `DeviceFull` if the run does not fit, `Weights` if weights or the checkpoint
/// cannot be loaded, `UnknownModel` if the server does not have a model that the run names.
pub(super) fn prepare(
    run: &mut TrainingRun,
    base_models: &BaseModels,
    read: ExactBases,
    policies: &mut PolicyCache,
    memory: u64,
    helpers: &Arc<[ComputeDevice]>,
) -> Result<Trainer, EngineError> {
    let base = base_models.get(&run.model)?;
    let precision = run.spec.precision.unwrap_or(base_models.precision());
    let exact = ExactWeights { base_models, read };
    let start = match starts_exact(&run.spec, base_models.precision()) {
        true => exact.open(&run.start)?,
        false => base_models.open(&run.start)?,
    };
    let policy = trainable(
        run,
        &Policy {
            helpers: helpers.clone(),
            ..start
        },
        precision,
    )?;
    let reference = reference(run, &exact, policies, precision, helpers)?;
    let input = TrainerInput {
        spec: run.spec.clone(),
        policy,
        reference,
        train: std::mem::take(&mut run.train),
        eval: std::mem::take(&mut run.eval),
        checkpoints: run.checkpoints.clone(),
        resume: run.resume.clone(),
        tokenizer: base.tokenizer.clone(),
        base: base.info.base.clone(),
        identity: base.info.identity.clone(),
        memory,
    };
    Trainer::new(input).map_err(|e| {
        tracing::warn!(job = run.job, error = %e, "the run cannot begin");
        match &e {
            TrainError::NoPlan {
                needed_mib,
                available_mib,
            } => EngineError::OutOfMemory {
                needed_mib: *needed_mib,
                available_mib: *available_mib,
                remedy: format!(
                    "lower max_length, train with LoRA, or raise {}",
                    base_models.memory_setting()
                ),
            },
            e if e.is_out_of_memory() => EngineError::DeviceFull(e.for_clients()),
            e => EngineError::Weights(e.for_clients()),
        }
    })
}

/// Source of unrounded weights for a run.
struct ExactWeights<'a> {
    base_models: &'a BaseModels,
    /// Weights that [`read_exact`] returned for the run.
    read: ExactBases,
}

impl ExactWeights<'_> {
    fn base(&self, model: &str) -> Result<Policy, EngineError> {
        let base = self.base_models.get(model)?;
        match self.read.get(model) {
            Some(parameters) => Ok(Policy {
                parameters: parameters.clone(),
                ..base.policy.clone()
            }),
            None if base.is_exact => Ok(base.policy.clone()),
            None => Err(EngineError::Device(format!(
                "the unrounded weights of models/{model} were not read before the run began"
            ))),
        }
    }

    fn open(&self, weights: &WeightsRef) -> Result<Policy, EngineError> {
        match weights {
            WeightsRef::Base { model } => self.base(model),
            WeightsRef::Adapter { model, dir, .. } => {
                let base = self.base(model)?;
                let adapter =
                    peft::load(dir, &base.config).map_err(|e| EngineError::unusable(&e))?;
                Ok(Policy {
                    adapter: Some(Arc::new(adapter)),
                    ..base
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
        let base = &self.base_models.get(model)?.policy;
        let parameters = load_full(&base.config, file, Precision::F32)?;
        Ok(Policy {
            parameters: Arc::new(parameters),
            adapter: None,
            ..base.clone()
        })
    }

    /// Returns a name for the weights that [`ExactWeights::open`] loads.
    fn identity(&self, weights: &WeightsRef) -> Result<String, EngineError> {
        let precision = match weights {
            WeightsRef::Base { model } | WeightsRef::Adapter { model, .. }
                if self.base_models.get(model)?.is_exact =>
            {
                self.base_models.precision()
            }
            _ => Precision::F32,
        };
        self.base_models.identity_in(weights, precision)
    }
}

fn trainable(
    run: &TrainingRun,
    start: &Policy,
    precision: Precision,
) -> Result<TrainablePolicy, EngineError> {
    let tensor = |e: candle_core::Error| EngineError::Device(e.to_string());
    let weights = |e: ModelError| EngineError::unusable(&e);
    match &run.spec.method {
        Method::Full => TrainablePolicy::full(&export::merged(start).map_err(weights)?, precision)
            .map_err(tensor),
        Method::Lora(config) => {
            let adapter = match &start.adapter {
                Some(adapter) => (**adapter).clone(),
                None => Adapter::init(&start.config, config, run.spec.seed.0).map_err(weights)?,
            };
            TrainablePolicy::lora(&start.base(), &adapter, precision).map_err(tensor)
        }
    }
}

fn reference(
    run: &TrainingRun,
    exact: &ExactWeights,
    policies: &mut PolicyCache,
    precision: Precision,
    helpers: &Arc<[ComputeDevice]>,
) -> Result<Reference, EngineError> {
    if run.spec.logged_reference.is_some() {
        return Ok(Reference::Logged);
    }
    let Some(weights) = &run.reference else {
        return Ok(Reference::None);
    };
    let base_models = exact.base_models;
    let (policy, identity) = match needs_exact(&run.spec, base_models.precision()) {
        true => (exact.open(weights)?, exact.identity(weights)?),
        false => (
            policies.get_for_run(base_models, weights)?,
            base_models.identity(weights)?,
        ),
    };
    let policy = Policy {
        helpers: helpers.clone(),
        ..policy.with_precision(precision)
    };
    if run.spec.dpo.reference_sync.is_some() {
        let tensor = |e: candle_core::Error| EngineError::Device(e.to_string());
        let mut merged = export::merged(&policy).map_err(|e| EngineError::unusable(&e))?;
        // Each sync adds a small part of the policy to the reference, which bf16 would round away.
        merged.parameters = Arc::new(
            merged
                .parameters
                .map(|_, t| t.to_dtype(DType::F32))
                .map_err(tensor)?,
        );
        // The job's id alone does not identify the weights that the reference starts from.
        return Ok(Reference::moving_from(
            merged,
            &format!("{} from {identity}", run.job),
        ));
    }
    Ok(Reference::Frozen { policy, identity })
}

#[cfg(test)]
mod tests;
