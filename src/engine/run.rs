//! Turns a run as asked for into a trainer: resolves weights, initialises the adapter, picks the reference.

use std::sync::Arc;

use candle_core::DType;

use super::api::{EngineError, TrainingRun};
use super::residents::{Bases, Residents};
use crate::domain::training::{Method, Precision};
use crate::model::adapter::Adapter;
use crate::model::decoder::Policy;
use crate::model::device::ComputeDevice;
use crate::model::export;
use crate::train::reference::Reference;
use crate::train::trainable::TrainablePolicy;
use crate::train::trainer::{Trainer, TrainerInput};

/// Prepares `run`; its events and control stay with the caller. `helpers` are the devices that share the rows with the worker's own.
pub(super) fn prepare(
    run: &mut TrainingRun,
    bases: &Bases,
    residents: &mut Residents,
    memory: u64,
    helpers: &Arc<[ComputeDevice]>,
) -> Result<Trainer, EngineError> {
    let base = bases.get(&run.model)?;
    let start = Policy { helpers: helpers.clone(), ..bases.open(&run.start)? };
    let precision = run.spec.precision.unwrap_or(start.precision);
    let policy = trainable(run, &start, precision)?;
    let reference = reference(run, bases, residents, precision, helpers)?;
    let input = TrainerInput {
        spec: run.spec.clone(),
        policy,
        reference,
        train: std::mem::take(&mut run.train),
        eval: std::mem::take(&mut run.eval),
        checkpoints: run.checkpoints.clone(),
        resume: run.resume.clone(),
        tokenizer: base.tokenizer.clone(),
        base: base.info.source.clone(),
        identity: base.info.identity.clone(),
        memory,
    };
    Trainer::new(input).map_err(|e| EngineError::Weights(e.to_string()))
}

fn trainable(run: &TrainingRun, start: &Policy, precision: Precision) -> Result<TrainablePolicy, EngineError> {
    let tensor = |e: candle_core::Error| EngineError::Device(e.to_string());
    let weights = |e: crate::model::error::ModelError| EngineError::Weights(e.to_string());
    match &run.spec.method {
        Method::Full => TrainablePolicy::full(&export::merged(start).map_err(weights)?, precision).map_err(tensor),
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
    bases: &Bases,
    residents: &mut Residents,
    precision: Precision,
    helpers: &Arc<[ComputeDevice]>,
) -> Result<Reference, EngineError> {
    let Some(weights) = &run.reference else { return Ok(Reference::None) };
    let policy = Policy { helpers: helpers.clone(), ..residents.get(bases, weights)?.with_precision(precision) };
    if run.spec.dpo.reference_sync.is_some() {
        let tensor = |e: candle_core::Error| EngineError::Device(e.to_string());
        let mut merged = export::merged(&policy).map_err(|e| EngineError::Weights(e.to_string()))?;
        // It takes in small parts of the policy: bf16 would lose them.
        merged.parameters = Arc::new(merged.parameters.map(|_, t| t.to_dtype(DType::F32)).map_err(tensor)?);
        // The job's id alone does not say in which precision the server has the weights that it starts from.
        return Ok(Reference::moving_from(merged, &format!("{} from {}", run.job, bases.identity(weights)?)));
    }
    Ok(Reference::Frozen { policy, identity: bases.identity(weights)? })
}

#[cfg(test)]
mod tests;
