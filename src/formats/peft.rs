//! Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use candle_core::Tensor;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::{Value, json};

use crate::domain::names::{BaseName, is_hub_id};
use crate::domain::training::LoraConfig;
use crate::domain::violation::shortened;
use crate::model::adapter::Adapter;
use crate::model::config::ModelConfig;
use crate::model::error::ModelError;
use crate::model::params::{
    Linear, lora_params, peft_example, text_peft_name, whole_peft_name, whole_target_modules,
};

/// File with the adapter's rank, α and target modules.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// File with the adapter's matrices A and B.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Maximum number of characters of a refused field or value that an error message repeats.
const MAX_VALUE_CHARS: usize = 200;

/// The fields of adapter_config.json that may have any value: this module reads them elsewhere, or
/// they have no effect on what the adapter computes once it is trained.
const FREE: [&str; 17] = [
    // Read by `read_config`. The tensors say which projections and layers have an update, so the
    // patterns that chose them are not needed.
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    // Metadata.
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    // Training only.
    "inference_mode",
    "lora_dropout",
    // Settings for the start values of A when `init_lora_weights` is "eva".
    "eva_config",
    // These choose the device or the parallel layers, not the result.
    "runtime_config",
    "megatron_core",
    // PEFT reads these only together with a field that must be off.
    "qalora_group_size",
    "ensure_weight_tying",
];

/// The other fields of PEFT 0.21.2's `LoraConfig`. Each is listed with its supported values (as
/// JSON), at which the adapter computes plain LoRA. `null` is supported for every field.
const OFF: [(&str, &[&str]); 26] = [
    // With these values only A and B are initialised, and the file replaces both. See `why_refused`
    // for the other values.
    (
        "init_lora_weights",
        &["true", "false", "\"gaussian\"", "\"orthogonal\"", "\"eva\""],
    ),
    ("bias", &["\"none\""]),
    ("fan_in_fan_out", &["false"]),
    ("lora_bias", &["false"]),
    ("use_dora", &["false"]),
    ("use_qalora", &["false"]),
    ("modules_to_save", &["[]"]),
    ("rank_pattern", &["{}"]),
    ("alpha_pattern", &["{}"]),
    ("layers_to_transform", &["[]"]),
    ("layers_pattern", &["[]", "\"\""]),
    ("layer_replication", &["[]"]),
    ("target_parameters", &["[]"]),
    ("loftq_config", &["{}"]),
    ("trainable_token_indices", &[]),
    ("alora_invocation_tokens", &[]),
    ("arrow_config", &[]),
    ("corda_config", &[]),
    ("kasa_config", &[]),
    ("lora_ga_config", &[]),
    ("megatron_config", &[]),
    ("monteclora_config", &[]),
    ("use_bdlora", &[]),
    ("velora_config", &[]),
    // Fields of PEFT before 0.4.
    ("enable_lora", &[]),
    ("merge_weights", &["false"]),
];

/// Reads an adapter's rank, α and target modules, without the values of its tensors.
///
/// # Errors
/// Returns an error if a file is missing or malformed, or if the configuration asks for more than
/// plain LoRA.
pub fn config(dir: &Path) -> Result<LoraConfig, ModelError> {
    let fields = read_fields(dir)?;
    let path = dir.join(WEIGHTS_FILE);
    let bytes = map_weights(&path)?;
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|e| ModelError::corrupt(&path, format!("{WEIGHTS_FILE}: {e}")))?;
    read_config(&fields, &tensors).map_err(|reason| ModelError::Adapter {
        path: dir.to_owned(),
        reason,
    })
}

/// Reads adapter_config.json and refuses fields that would change what the adapter computes.
fn read_fields(dir: &Path) -> Result<Value, ModelError> {
    let wrong = |reason: String| ModelError::Adapter {
        path: dir.to_owned(),
        reason,
    };
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(ModelError::io(&path))?;
    let fields: Value = serde_json::from_str(&text)
        .map_err(|e| wrong(format!("{CONFIG_FILE} is not JSON: {e}")))?;
    check_supported(&fields).map_err(wrong)?;
    Ok(fields)
}

fn map_weights(path: &Path) -> Result<memmap2::Mmap, ModelError> {
    let file = std::fs::File::open(path).map_err(ModelError::io(path))?;
    // SAFETY: the map is read-only and private to the caller. The server's own adapters are written
    // once, by rename. Others, e.g. those in `adapter_dir`, must not be modified while they are
    // read.
    unsafe { memmap2::Mmap::map(&file) }.map_err(ModelError::io(path))
}

/// Reads an adapter that was made for a model with this configuration.
///
/// # Errors
/// The errors of [`config`]. Also fails if a tensor is missing, has another shape, is not finite,
/// or belongs to no projection of the model.
pub fn load(dir: &Path, model: &ModelConfig) -> Result<Adapter, ModelError> {
    let wrong = |reason: String| ModelError::Adapter {
        path: dir.to_owned(),
        reason,
    };
    let fields = read_fields(dir)?;
    let path = dir.join(WEIGHTS_FILE);
    let bytes = map_weights(&path)?;
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|e| ModelError::corrupt(&path, format!("{WEIGHTS_FILE}: {e}")))?;

    let config = read_config(&fields, &tensors).map_err(wrong)?;
    // An adapter of a model of text and images has longer names.
    let stored: HashMap<String, &str> = tensors
        .names()
        .into_iter()
        .map(|name| (text_peft_name(name).into_owned(), name))
        .collect();
    let mut used = 0;
    let layers = model.spec.blocks.len();
    let adapter = Adapter::build(model, &config, |tensor| {
        let (name, shape) = (tensor.name.as_str(), tensor.shape);
        let in_file = stored.get(name).copied().unwrap_or(name);
        let view = tensors.tensor(in_file).map_err(|_| {
            wrong(format!(
                "tensor {name} is missing: \
                 the adapter must cover {} in every one of the {layers} layers",
                config.target_modules.join(", ")
            ))
        })?;
        used += 1;
        if view.shape() != shape.as_slice() {
            return Err(ModelError::ShapeMismatch {
                name: name.into(),
                path: path.clone(),
                expected: shape.into(),
                found: view.shape().into(),
            });
        }
        to_f32(&view, name).map_err(wrong)
    })?;
    if used != tensors.len() {
        let table = lora_params(&model.spec, &config);
        let covered: BTreeSet<&str> = table
            .iter()
            .flat_map(|update| update.tensors())
            .map(|tensor| tensor.name.as_str())
            .collect();
        let extra = tensors
            .names()
            .into_iter()
            .find(|n| !covered.contains(text_peft_name(n).as_ref()))
            .unwrap_or_default();
        return Err(wrong(format!(
            "tensor {extra} belongs to no projection of this model ({layers} layers): \
             the adapter was made for another one"
        )));
    }
    Ok(adapter)
}

fn check_supported(fields: &Value) -> Result<(), String> {
    if fields.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        return Err(format!(
            "peft_type is {}: only LORA adapters are supported",
            fields.get("peft_type").unwrap_or(&Value::Null)
        ));
    }
    let Some(fields) = fields.as_object() else {
        return Err(format!("{CONFIG_FILE} is not a JSON object"));
    };
    for (field, value) in fields {
        let name = field.as_str();
        if name == "peft_type" || FREE.contains(&name) || value.is_null() {
            continue;
        }
        // An unknown field is from another version of PEFT. It is safe to ignore only if it is a
        // switch that is off.
        let off = OFF
            .iter()
            .find(|(known, _)| *known == name)
            .map_or(&["false"] as &[&str], |(_, off)| off);
        if !off.contains(&value.to_string().as_str()) {
            let allowed: Vec<&str> = off.iter().copied().chain(["null"]).collect();
            return Err(format!(
                "{} is {}: only {} is supported, because {}; \
                 merge the adapter into its base model with PEFT and serve the result, \
                 or train a plain LoRA",
                shortened(field, MAX_VALUE_CHARS),
                shortened(&value.to_string(), MAX_VALUE_CHARS),
                allowed.join(" or "),
                why_refused(name, value)
            ));
        }
    }
    Ok(())
}

/// Returns the reason why an unsupported value of a field is refused.
fn why_refused(field: &str, value: &Value) -> &'static str {
    let start = value
        .as_str()
        .filter(|_| field == "init_lora_weights")
        .unwrap_or_default()
        .to_lowercase();
    let changes_base = ["pissa", "corda", "olora", "loftq", "lora_ga"]
        .iter()
        .any(|name| start.starts_with(name));
    match start.as_str() {
        _ if changes_base => {
            "with this value PEFT changes the base model's weights when it loads the adapter"
        }
        "mica" => "with this value PEFT trains only A",
        _ => "other values change what the adapter computes",
    }
}

/// Takes rank and α from the configuration. Takes the target modules from the tensors' names,
/// because `target_modules` may be a pattern.
fn read_config(fields: &Value, tensors: &SafeTensors) -> Result<LoraConfig, String> {
    let rank = fields
        .get("r")
        .and_then(Value::as_u64)
        .filter(|r| (1..=4096).contains(r))
        .ok_or("r must be an integer from 1 to 4096")?;
    let alpha = fields
        .get("lora_alpha")
        .and_then(Value::as_f64)
        .filter(|a| a.is_finite() && *a > 0.0);
    let alpha = alpha.ok_or("lora_alpha must be a number above 0")?;
    let use_rslora = match fields.get("use_rslora") {
        None | Some(Value::Null) => false,
        Some(value) => value.as_bool().ok_or("use_rslora must be true or false")?,
    };
    let names = tensors.names();
    let target_modules: Vec<String> = Linear::ALL
        .into_iter()
        .filter(|linear| names.iter().any(|name| linear.is_updated_by(name)))
        .map(|linear| linear.lora_target().to_owned())
        .collect();
    if target_modules.is_empty() {
        return Err(format!(
            "{WEIGHTS_FILE} holds no tensor named like {}",
            peft_example(0, Linear::Query)
        ));
    }
    Ok(LoraConfig {
        rank: rank as usize,
        alpha,
        target_modules,
        use_rslora,
        init_adapter: None,
    })
}

fn to_f32(view: &TensorView, name: &str) -> Result<Tensor, String> {
    let bytes = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        Dtype::F16 => bytes
            .chunks_exact(2)
            .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        Dtype::BF16 => bytes
            .chunks_exact(2)
            .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        other => return Err(format!("tensor {name} is {other:?}: use F32, F16 or BF16")),
    };
    if let Some(i) = values.iter().position(|v| !v.is_finite()) {
        return Err(format!(
            "tensor {name} holds {} at element {i}: the adapter is damaged",
            values[i]
        ));
    }
    Tensor::from_vec(values, view.shape(), &candle_core::Device::Cpu).map_err(|e| e.to_string())
}

/// Writes an adapter of `model` that `PeftModel.from_pretrained` loads. `AutoPeftModelForCausalLM`
/// loads it, too, where it finds the base model under the name `base`. Of the models of text and
/// images it can load only Gemma 3.
///
/// # Errors
/// Returns an error that names the file if it cannot be written.
pub fn save(
    dir: &Path,
    adapter: &Adapter,
    model: &ModelConfig,
    base: &BaseName,
) -> Result<(), ModelError> {
    let c = &adapter.config;
    let (mut tensors, names) = (adapter.named(), adapter.target_modules());
    let mut target_modules = json!(names);
    // PEFT applies the adapter to the whole base model, of which the language model is a part. The
    // vision tower may have modules of the same names.
    if model.whole_json.is_some() {
        target_modules = json!(whole_target_modules(&names));
        for (name, _) in &mut tensors {
            *name = whole_peft_name(name);
        }
    }
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": c.rank,
        "lora_alpha": c.alpha,
        "lora_dropout": 0.0,
        "target_modules": target_modules,
        "use_rslora": c.use_rslora,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": null,
        "use_dora": false,
    });
    let path = dir.join(CONFIG_FILE);
    let text = serde_json::to_vec_pretty(&config).unwrap_or_default();
    std::fs::write(&path, text).map_err(ModelError::io(&path))?;
    save_tensors(&dir.join(WEIGHTS_FILE), &tensors)
}

/// Returns the adapter_config.json with the base model's name replaced by `base`.
///
/// # Errors
/// Returns an error if `config` is not a JSON object.
pub fn with_base(config: &[u8], base: &BaseName) -> Result<Vec<u8>, String> {
    let wrong = |reason: String| format!("{CONFIG_FILE} is not a JSON object: {reason}");
    let mut fields: serde_json::Map<String, Value> =
        serde_json::from_slice(config).map_err(|e| wrong(e.to_string()))?;
    fields.insert("base_model_name_or_path".into(), json!(base.name));
    fields.insert("revision".into(), json!(base.revision));
    serde_json::to_vec_pretty(&fields).map_err(|e| wrong(e.to_string()))
}

/// Returns the base model's name in an adapter_config.json if it is a hub id, else `id`. Versions
/// up to 0.2 wrote the model's source as it was typed, which may be a path on another machine.
pub fn base_of(config: &[u8], id: &str) -> BaseName {
    let fields: Value = serde_json::from_slice(config).unwrap_or_default();
    let text = |field: &str| fields.get(field).and_then(Value::as_str);
    let stored = BaseName::from_hub(text("base_model_name_or_path").unwrap_or_default());
    match is_hub_id(&stored.name) {
        true => BaseName {
            revision: stored
                .revision
                .or_else(|| text("revision").map(str::to_owned)),
            ..stored
        },
        false => BaseName::from(id),
    }
}

/// Writes tensors in f32 to a safetensors file that torch reads.
///
/// # Errors
/// Returns an error that names the file if it cannot be written.
pub fn save_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), ModelError> {
    // The library takes all tensors in one call. Each view makes its bytes when they are written,
    // so the bytes of only one tensor are in memory.
    let views = tensors
        .iter()
        .map(|(n, t)| Ok((n.clone(), Bytes::new(t)?)))
        .collect::<Result<Vec<_>, ModelError>>()?;
    let metadata = [("format".to_owned(), "pt".to_owned())]
        .into_iter()
        .collect();
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| ModelError::Io {
        path: path.to_owned(),
        source: io_error(e),
    })
}

/// Converts an error of writing tensors to an I/O error, whose kind says, for example, that the
/// disk is full.
pub(super) fn io_error(e: SafeTensorError) -> std::io::Error {
    match e {
        SafeTensorError::IoError(e) => e,
        e => std::io::Error::other(e.to_string()),
    }
}

/// A tensor that makes its bytes on demand.
struct Bytes {
    tensor: Tensor,
    shape: Vec<usize>,
}

impl Bytes {
    fn new(tensor: &Tensor) -> Result<Self, ModelError> {
        let tensor = tensor
            .detach()
            .to_dtype(candle_core::DType::F32)?
            .contiguous()?;
        Ok(Bytes {
            shape: tensor.dims().to_vec(),
            tensor,
        })
    }
}

impl safetensors::View for Bytes {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        let bytes = crate::compute::cpu::with_values(&self.tensor, |v| {
            v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()
        });
        // This fails only for a tensor that is not f32, contiguous and on the CPU. `new` has made
        // it so.
        std::borrow::Cow::Owned(bytes.unwrap_or_default())
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * 4
    }
}

#[cfg(test)]
mod tests;
