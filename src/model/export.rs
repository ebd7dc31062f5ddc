//! Merged weights on disk, in transformers' layout: config.json, model.safetensors and the tokenizer's files.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::decoder::Policy;
use super::error::ModelError;
use super::parameters::PROJECTIONS;
use super::peft::save_tensors;
use super::tokenizer::ChatTokenizer;

/// The file with the weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// Writes `policy` with its adapter merged in: W + scale·B·A.
pub fn save_merged(dir: &Path, policy: &Policy, tokenizer: &ChatTokenizer) -> Result<(), ModelError> {
    save_tensors(&dir.join(WEIGHTS_FILE), &merged(policy)?.parameters.named())?;
    let path = dir.join("config.json");
    let text = serde_json::to_vec_pretty(&policy.config.hf_json).unwrap_or_default();
    std::fs::write(&path, text).map_err(ModelError::io(&path))?;
    for (name, bytes) in tokenizer.files() {
        let path = dir.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(ModelError::io(parent))?;
        }
        std::fs::write(&path, bytes).map_err(ModelError::io(&path))?;
    }
    Ok(())
}

/// The same function as `policy` without an adapter; shares every tensor that the adapter leaves alone.
pub fn merged(policy: &Policy) -> Result<Policy, ModelError> {
    let parameters = policy.parameters.map(|name, t| merge(policy, name, t))?;
    Ok(Policy { config: policy.config.clone(), parameters: Arc::new(parameters), adapter: None, ..policy.clone() })
}

fn merge(policy: &Policy, name: &str, w: &Tensor) -> Result<Tensor, ModelError> {
    let Some(adapter) = &policy.adapter else { return Ok(w.clone()) };
    let Some((block, rest)) = name.strip_prefix("model.layers.").and_then(|n| n.split_once('.')) else { return Ok(w.clone()) };
    let Some(projection) = rest.strip_suffix(".weight").and_then(|p| PROJECTIONS.iter().position(|q| *q == p)) else {
        return Ok(w.clone());
    };
    let low_rank = block.parse::<usize>().ok().and_then(|i| adapter.blocks.get(i)).and_then(|b| b[projection].as_ref());
    match low_rank {
        Some(l) => Ok((w.to_dtype(DType::F32)? + (l.b.detach().matmul(&l.a.detach())? * adapter.config.scale())?)?),
        None => Ok(w.clone()),
    }
}
