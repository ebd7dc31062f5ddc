//! Merged weights on disk, in transformers' layout: config.json, generation_config.json,
//! safetensors in one file or in shards, and the tokenizer's files.

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};

use super::peft::io_error;
use super::tokenizer::{ChatTokenizer, GENERATION_CONFIG};
use super::weights::{ElementType, Weights};
use crate::compute::cpu::with_values;
use crate::model::adapter::{Adapter, LowRank};
use crate::model::config::ModelConfig;
use crate::model::decoder::Policy;
use crate::model::error::ModelError;
use crate::model::params::{BlockParam, ParamId, ParamSpec, params};

/// File with all weights, if they are not divided into shards.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// File that maps each tensor's name to its shard.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Maximum size of a shard of an export, in bytes.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// Element type and maximum file size of written weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The element type of the language model's tensors.
    pub dtype: ElementType,
    /// Maximum size of a file, in bytes. A larger tensor gets a file of its own.
    pub shard_bytes: u64,
}

impl Layout {
    /// One file in f32, which stores the f32 master weights exactly.
    pub const CHECKPOINT: Layout = Layout {
        dtype: ElementType::F32,
        shard_bytes: u64::MAX,
    };
}

/// Callback that returns the tensor of a parameter.
pub type ReadWeight<'a> = dyn Fn(&ParamSpec) -> Result<Tensor, ModelError> + 'a;

/// Writes the weights of a model with `adapter` merged in: W + scale·B·A, computed in f32 and
/// rounded once. `read` returns a base weight. It is called for one weight at a time, so the whole
/// model is never in memory.
///
/// `whole` holds the files of the model of text and images that contains this language model. With
/// it, the tensors have the names that they have there, the tensors of the other parts are copied
/// as they are, and config.json is that of the whole model, unchanged.
///
/// # Errors
/// Returns an error if a weight cannot be read or does not fit the element type, or if a file
/// cannot be written.
pub fn save_merged(
    dir: &Path,
    config: &ModelConfig,
    adapter: Option<&Adapter>,
    layout: Layout,
    read: &ReadWeight,
    whole: Option<&Weights>,
) -> Result<(), ModelError> {
    let params = params(&config.spec);
    let others = whole.map(|whole| whole.others(config)).unwrap_or_default();
    let merged = params.iter().map(|param| Written {
        name: whole.map_or(param.name(), |whole| whole.name_in_file(param.name())),
        dtype: safetensors_type(layout.dtype),
        shape: &param.shape,
        value: Box::new(move || {
            let value = merge(adapter, param.id, read(param)?)?;
            encode(param.name(), &value, layout.dtype)
        }),
    });
    let copied = others.iter().filter_map(|other| {
        let whole = whole?;
        Some(Written {
            name: whole.name_in_file(&other.name),
            dtype: other.dtype,
            shape: &other.shape,
            value: Box::new(move || whole.bytes(other)),
        })
    });
    let tensors: Vec<Written<'_>> = merged.chain(copied).collect();
    let shards = split(&tensors, |t| t.bytes() as u64, layout.shard_bytes);
    let failed = RefCell::new(None);
    let mut weight_map = Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => WEIGHTS_FILE.to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let views = shard.iter().map(|&tensor| {
            weight_map.insert(tensor.name.to_owned(), json!(file));
            let failed = &failed;
            (tensor.name.to_owned(), Lazy { tensor, failed })
        });
        let metadata = [("format".to_owned(), "pt".to_owned())]
            .into_iter()
            .collect();
        let path = dir.join(&file);
        let written = safetensors::serialize_to_file(views, Some(metadata), &path);
        // A tensor that could not be read was written without bytes. Its error is the cause of a
        // later one, so it is returned first.
        if let Some(e) = failed.take() {
            return Err(e);
        }
        written.map_err(|e| ModelError::Io {
            path,
            source: io_error(e),
        })?;
    }
    if shards.len() > 1 {
        let elements: usize = tensors.iter().map(Written::elements).sum();
        let size: usize = tensors.iter().map(Written::bytes).sum();
        weight_map.sort_keys();
        let index = json!({
            "metadata": {"total_parameters": elements, "total_size": size},
            "weight_map": weight_map,
        });
        write_json(dir, INDEX_FILE, &index)?;
    }
    match config.whole_json.as_ref().filter(|_| whole.is_some()) {
        Some(json) => write_json(dir, "config.json", json),
        None => write_json(dir, "config.json", &config_json(config, layout.dtype)),
    }
}

/// Writes the tokenizer's files for which `wanted` returns true. If generation_config.json is
/// wanted and the model has none, it is made from the configuration.
///
/// # Errors
/// Returns an error that names the file if it cannot be written.
pub fn save_companions(
    dir: &Path,
    config: &ModelConfig,
    tokenizer: &ChatTokenizer,
    wanted: impl Fn(&str) -> bool,
) -> Result<(), ModelError> {
    let files = tokenizer.files();
    if wanted(GENERATION_CONFIG) && !files.iter().any(|(name, _)| name == GENERATION_CONFIG) {
        write_json(dir, GENERATION_CONFIG, &generation_config(config))?;
    }
    for (name, bytes) in files.iter().filter(|(name, _)| wanted(name)) {
        let path = dir.join(name);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(ModelError::io(folder))?;
        }
        std::fs::write(&path, bytes).map_err(ModelError::io(&path))?;
    }
    Ok(())
}

fn write_json(dir: &Path, name: &str, value: &Value) -> Result<(), ModelError> {
    let path = dir.join(name);
    let mut text = serde_json::to_vec_pretty(value).unwrap_or_default();
    text.push(b'\n');
    std::fs::write(&path, text).map_err(ModelError::io(&path))
}

/// Returns the source's config.json with the element type of the written weights. Older versions of
/// transformers write it as `torch_dtype`, later ones as `dtype`. The key of the source is used, or
/// `torch_dtype`, which all versions read, if it has none. The description of the language model in
/// a model of text and images (`text_config`) is corrected, too, if it has such a key.
fn config_json(config: &ModelConfig, dtype: ElementType) -> Value {
    let mut json = config.hf_json.clone();
    let Some(fields) = json.as_object_mut() else {
        return json;
    };
    let text = fields.get_mut("text_config").and_then(Value::as_object_mut);
    if let Some(text) = text {
        set_element_type(text, dtype);
    }
    if !set_element_type(fields, dtype) {
        fields.insert("torch_dtype".to_owned(), json!(dtype.torch_name()));
    }
    json
}

/// Sets the keys of a config.json that name the element type. Returns false if there are none.
fn set_element_type(fields: &mut Map<String, Value>, dtype: ElementType) -> bool {
    let mut is_set = false;
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = fields.get_mut(key) {
            *value = json!(dtype.torch_name());
            is_set = true;
        }
    }
    is_set
}

/// Makes a generation_config.json with the tokens that start and end a sequence.
fn generation_config(config: &ModelConfig) -> Value {
    let mut json = Map::new();
    json.insert("_from_model_config".into(), json!(true));
    if let Some(bos) = config.bos_token_id {
        json.insert("bos_token_id".into(), json!(bos));
    }
    match config.eos_token_ids.as_slice() {
        [] => {}
        [eos] => drop(json.insert("eos_token_id".into(), json!(eos))),
        several => drop(json.insert("eos_token_id".into(), json!(several))),
    }
    Value::Object(json)
}

/// Divides the tensors among files in their order, as huggingface_hub's
/// `split_state_dict_into_shards_factory` does. A tensor above the limit gets a file of its own.
fn split<T>(tensors: &[T], bytes: impl Fn(&T) -> u64, limit: u64) -> Vec<Vec<&T>> {
    let (mut shards, mut current, mut size) = (Vec::new(), Vec::new(), 0u64);
    for tensor in tensors {
        let bytes = bytes(tensor);
        if bytes > limit {
            shards.push(vec![tensor]);
            continue;
        }
        if size + bytes > limit {
            shards.push(std::mem::take(&mut current));
            size = 0;
        }
        current.push(tensor);
        size += bytes;
    }
    if !current.is_empty() {
        shards.push(current);
    }
    shards
}

/// A tensor of an export.
struct Written<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    /// Makes its bytes.
    value: Box<dyn Fn() -> Result<Vec<u8>, ModelError> + 'a>,
}

impl Written<'_> {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> usize {
        (self.elements() * self.dtype.bitsize()).div_ceil(8)
    }
}

/// A tensor that makes its bytes when they are written. [`View`] cannot return an error, so one is
/// stored in `failed`.
struct Lazy<'a> {
    tensor: &'a Written<'a>,
    failed: &'a RefCell<Option<ModelError>>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        self.tensor.dtype
    }

    fn shape(&self) -> &[usize] {
        self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if self.failed.borrow().is_some() {
            return Cow::Borrowed(&[]);
        }
        match (self.tensor.value)() {
            Ok(bytes) => Cow::Owned(bytes),
            Err(e) => {
                self.failed.replace(Some(e));
                Cow::Borrowed(&[])
            }
        }
    }

    fn data_len(&self) -> usize {
        self.tensor.bytes()
    }
}

fn safetensors_type(dtype: ElementType) -> Dtype {
    match dtype {
        ElementType::F32 => Dtype::F32,
        ElementType::Bf16 => Dtype::BF16,
        ElementType::F16 => Dtype::F16,
    }
}

/// Returns the bytes of a tensor, with each element rounded to the nearest value of `dtype`.
fn encode(name: &str, tensor: &Tensor, dtype: ElementType) -> Result<Vec<u8>, ModelError> {
    let tensor = tensor.detach().to_dtype(DType::F32)?.contiguous()?;
    with_values(&tensor, |values| {
        // Weights that are already infinite are written as they are. Rounding must not make finite
        // ones infinite.
        if dtype == ElementType::F16
            && let Some(value) = values
                .iter()
                .find(|x| x.is_finite() && half::f16::from_f32(**x).is_infinite())
        {
            return Err(ModelError::TooLarge {
                name: name.to_owned(),
                value: *value,
                dtype: dtype.name(),
            });
        }
        Ok(match dtype {
            ElementType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            ElementType::Bf16 => values
                .iter()
                .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
                .collect(),
            ElementType::F16 => values
                .iter()
                .flat_map(|x| half::f16::from_f32(*x).to_le_bytes())
                .collect(),
        })
    })?
}

/// Returns a policy without an adapter that computes the same function. It shares all tensors that
/// the adapter does not update.
///
/// # Errors
/// Returns an error if a matrix multiplication of the merge fails.
pub fn merged(policy: &Policy) -> Result<Policy, ModelError> {
    let parameters = policy
        .parameters
        .map(|param, t| merge(policy.adapter.as_deref(), param.id, t.clone()))?;
    Ok(Policy {
        config: policy.config.clone(),
        parameters: Arc::new(parameters),
        adapter: None,
        ..policy.clone()
    })
}

/// Returns W + scale·B·A in f32 if `adapter` updates the parameter, else W unchanged.
fn merge(adapter: Option<&Adapter>, id: ParamId, w: Tensor) -> Result<Tensor, ModelError> {
    let Some(adapter) = adapter else { return Ok(w) };
    match low_rank(adapter, id) {
        Some(l) => {
            let update = (l.b.detach().matmul(&l.a.detach())? * adapter.config.scale())?;
            Ok((w.to_dtype(DType::F32)? + update)?)
        }
        None => Ok(w),
    }
}

fn low_rank(adapter: &Adapter, id: ParamId) -> Option<&LowRank> {
    match id {
        ParamId::Block(block, BlockParam::Weight(linear)) => adapter.get(block, linear),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
