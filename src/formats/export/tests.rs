use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::Device;
use half::bf16;

use super::*;
use crate::domain::training::{LoraConfig, Precision};
use crate::formats::loader::{LoadedModel, load_model};
use crate::formats::peft;
use crate::formats::source::HubOptions;

fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(path)
}

fn open(name: &str) -> LoadedModel {
    load_model(None, golden(name).to_str().unwrap(), &HubOptions::default()).unwrap()
}

/// Writes a model's own weights.
fn save(
    dir: &Path,
    model: &LoadedModel,
    adapter: Option<&Adapter>,
    layout: Layout,
) -> Result<(), ModelError> {
    let read = |param: &ParamSpec| model.weights.load(param, Precision::F32);
    save_merged(dir, &model.config, adapter, layout, &read, None)
}

fn values(weights: &Weights, param: &ParamSpec) -> Vec<f32> {
    weights
        .load(param, Precision::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn json_file(dir: &Path, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap()
}

#[test]
fn tensors_are_divided_as_huggingface_hub_divides_them() {
    let sizes = |given: &[usize], limit: u64| -> Vec<Vec<usize>> {
        let bytes = |elements: &usize| 2 * *elements as u64;
        split(given, bytes, 2 * limit)
            .iter()
            .map(|shard| shard.iter().map(|n| **n).collect())
            .collect()
    };
    // The example of huggingface_hub's `split_state_dict_into_shards_factory`, with an additional
    // tensor above the limit.
    assert_eq!(
        sizes(&[6, 6, 2, 6, 2, 2], 10),
        [vec![6], vec![6, 2], vec![6, 2, 2]]
    );
    assert_eq!(sizes(&[3, 20, 3, 3], 7), [vec![20], vec![3, 3], vec![3]]);
    assert_eq!(sizes(&[5, 5], 10), [vec![5, 5]]);
}

#[test]
fn shards_hold_every_tensor_once_and_the_index_finds_them() {
    let (model, dir) = (open("models/llama"), tempfile::tempdir().unwrap());
    let layout = Layout {
        dtype: ElementType::F32,
        shard_bytes: 20_000,
    };
    save(dir.path(), &model, None, layout).unwrap();
    assert!(!dir.path().join(WEIGHTS_FILE).exists());
    let index = json_file(dir.path(), INDEX_FILE);
    let table = params(&model.config.spec);
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), table.len());
    let parameters = model.config.parameter_count();
    assert_eq!(
        index["metadata"],
        json!({"total_parameters": parameters, "total_size": 4 * parameters})
    );
    let files: std::collections::BTreeSet<&str> =
        map.values().map(|v| v.as_str().unwrap()).collect();
    assert!(files.len() > 2, "{files:?}");
    for file in &files {
        assert!(
            file.starts_with("model-0000")
                && file.ends_with(&format!("-of-{:05}.safetensors", files.len())),
            "{file}"
        );
    }
    // The model itself reads them back.
    let again = Weights::open_folder(dir.path()).unwrap();
    for param in &table {
        assert_eq!(
            values(&again, param),
            values(&model.weights, param),
            "{}",
            param.name()
        );
    }
}

#[test]
fn the_element_type_is_that_of_most_numbers() {
    assert_eq!(
        open("models/llama").weights.element_type(),
        ElementType::F32
    );
    let bf16 = open("models/llama-bf16");
    assert_eq!(bf16.weights.element_type(), ElementType::Bf16);
    assert!(bf16.weights.is_exact_in(Precision::Bf16));
    assert!(!open("models/llama").weights.is_exact_in(Precision::Bf16));
}

#[test]
fn a_merge_is_rounded_once() {
    let (model, dir) = (open("models/llama"), tempfile::tempdir().unwrap());
    let adapter = peft::load(&golden("adapters/llama"), &model.config).unwrap();
    let layout = Layout {
        dtype: ElementType::Bf16,
        shard_bytes: SHARD_BYTES,
    };
    save(dir.path(), &model, Some(&adapter), layout).unwrap();
    let written = Weights::open_safetensors(&dir.path().join(WEIGHTS_FILE)).unwrap();
    assert_eq!(written.element_type(), ElementType::Bf16);
    let (mut changed, mut otherwise) = (0, 0);
    for param in params(&model.config.spec) {
        let (name, shape) = (param.name(), &param.shape);
        let base = values(&model.weights, &param);
        let update = low_rank(&adapter, param.id).map(|l| {
            let (a, b): (Vec<Vec<f32>>, Vec<Vec<f32>>) =
                (l.a.to_vec2().unwrap(), l.b.to_vec2().unwrap());
            (a, b, adapter.config.scale())
        });
        let got = values(&written, &param);
        for (i, w) in base.iter().enumerate() {
            let added = match &update {
                Some((a, b, scale)) => {
                    let (row, column) = (i / shape[1], i % shape[1]);
                    scale
                        * (0..a.len())
                            .map(|r| f64::from(b[row][r]) * f64::from(a[r][column]))
                            .sum::<f64>()
                }
                None => 0.0,
            };
            let round = |x: f64| bf16::from_f64(x).to_f32();
            // The bf16 value nearest to the exact sum, or to the sum in f32.
            let (want, slack) = (
                f64::from(*w) + added,
                1e-6 * (f64::from(w.abs()) + added.abs()),
            );
            let near = round(want - slack)..=round(want + slack);
            assert!(
                near.contains(&got[i]),
                "{name}[{i}]: {} is not {want}",
                got[i]
            );
            changed += usize::from(update.is_some());
            // Rounding the base first gives other numbers, so the test would detect it.
            otherwise +=
                usize::from(!near.contains(&round(f64::from(round(f64::from(*w))) + added)));
        }
    }
    assert!(changed > 1000 && otherwise > 100, "{changed} {otherwise}");
}

#[test]
fn a_value_beyond_f16_is_refused_by_its_tensor() {
    let (model, dir) = (open("models/llama"), tempfile::tempdir().unwrap());
    let layout = |dtype| Layout {
        dtype,
        shard_bytes: SHARD_BYTES,
    };
    let read = |param: &ParamSpec| -> Result<Tensor, ModelError> {
        let value = if param.name() == "model.norm.weight" {
            7e4f32
        } else {
            1.0
        };
        Ok(Tensor::full(value, param.shape.as_slice(), &Device::Cpu)?)
    };
    let e = save_merged(
        dir.path(),
        &model.config,
        None,
        layout(ElementType::F16),
        &read,
        None,
    )
    .unwrap_err()
    .to_string();
    assert!(
        e.contains("'model.norm.weight'") && e.contains("70000") && e.contains("bf16"),
        "{e}"
    );
    save_merged(
        dir.path(),
        &model.config,
        None,
        layout(ElementType::Bf16),
        &read,
        None,
    )
    .unwrap();
}

#[test]
fn config_json_keeps_every_key_and_says_the_element_type_where_it_did() {
    let mut config = open("models/llama").config;
    let with = |config: &mut ModelConfig, fields: &[(&str, &str)]| {
        let json = config.hf_json.as_object_mut().unwrap();
        json.retain(|key, _| key != "dtype" && key != "torch_dtype");
        fields
            .iter()
            .for_each(|(key, value)| drop(json.insert((*key).into(), json!(value))));
        json.insert("a_key_of_its_own".into(), json!({"x": [1, 2]}));
        config_json(config, ElementType::Bf16)
    };
    let v5 = with(&mut config, &[("dtype", "float32")]);
    assert_eq!(
        (&v5["dtype"], v5.get("torch_dtype")),
        (&json!("bfloat16"), None)
    );
    let v4 = with(&mut config, &[("torch_dtype", "float32")]);
    assert_eq!(
        (&v4["torch_dtype"], v4.get("dtype")),
        (&json!("bfloat16"), None)
    );
    assert_eq!(with(&mut config, &[])["torch_dtype"], json!("bfloat16"));
    config.hf_json["text_config"] = json!({"dtype": "float32", "hidden_size": 64});
    config.hf_json["vision_config"] = json!({"dtype": "float32"});
    let parts = with(&mut config, &[("dtype", "float32")]);
    assert_eq!(
        parts["text_config"],
        json!({"dtype": "bfloat16", "hidden_size": 64})
    );
    assert_eq!(parts["vision_config"], json!({"dtype": "float32"}));
    for key in ["text_config", "vision_config"] {
        config.hf_json.as_object_mut().unwrap().remove(key);
    }
    with(&mut config, &[("torch_dtype", "float32")]);
    let (mut before, mut after) = (config.hf_json.clone(), v4.clone());
    for json in [&mut before, &mut after] {
        json.as_object_mut().unwrap().remove("torch_dtype");
    }
    assert_eq!(before, after);
}

#[test]
fn companions_are_the_sources_own_files() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut given: HashMap<String, Vec<u8>> = HashMap::new();
    for entry in std::fs::read_dir(golden("models/llama")).unwrap() {
        let entry = entry.unwrap();
        given.insert(
            entry.file_name().into_string().unwrap(),
            std::fs::read(entry.path()).unwrap(),
        );
    }
    for name in [
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "special_tokens_map.json",
    ] {
        given.insert(name.into(), b"{}".to_vec());
    }
    given.insert(
        "additional_chat_templates/rag.jinja".into(),
        b"{{ messages }}".to_vec(),
    );
    given.insert("README.md".into(), b"not wanted".to_vec());
    given.insert(
        "generation_config.json".into(),
        br#"{"eos_token_id": [1, 7], "top_k": 3}"#.to_vec(),
    );
    std::fs::create_dir(source.path().join("additional_chat_templates")).unwrap();
    for (name, bytes) in &given {
        std::fs::write(source.path().join(name), bytes).unwrap();
    }
    let model = load_model(
        None,
        source.path().to_str().unwrap(),
        &HubOptions::default(),
    )
    .unwrap();
    save_companions(out.path(), &model.config, &model.tokenizer, |_| true).unwrap();
    for (name, bytes) in given
        .iter()
        .filter(|(name, _)| *name != "README.md" && *name != "config.json")
    {
        if name.ends_with(".safetensors") {
            continue;
        }
        assert_eq!(
            std::fs::read(out.path().join(name)).ok().as_ref(),
            Some(bytes),
            "{name}"
        );
    }
    assert!(!out.path().join("README.md").exists());

    // Without one of its own, the configuration's tokens are written.
    std::fs::remove_file(source.path().join("generation_config.json")).unwrap();
    let model = load_model(
        None,
        source.path().to_str().unwrap(),
        &HubOptions::default(),
    )
    .unwrap();
    save_companions(out.path(), &model.config, &model.tokenizer, |_| true).unwrap();
    assert_eq!(
        json_file(out.path(), GENERATION_CONFIG),
        json!({"_from_model_config": true, "bos_token_id": 0, "eos_token_id": 1})
    );
}

#[test]
fn an_adapter_names_its_base_as_peft_loads_it() {
    use crate::domain::names::BaseName;
    let model = open("models/llama");
    let adapter = Adapter::init(&model.config, &LoraConfig::default(), 1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let hub = BaseName::from_hub("owner/name@abc123");
    for (base, name, revision) in [
        (hub, json!("owner/name"), json!("abc123")),
        (model.base.clone(), json!("llama"), Value::Null),
    ] {
        peft::save(dir.path(), &adapter, &model.config, &base).unwrap();
        let config = json_file(dir.path(), peft::CONFIG_FILE);
        assert_eq!(
            (&config["base_model_name_or_path"], &config["revision"]),
            (&name, &revision)
        );
        // The written configuration can be read again.
        peft::load(dir.path(), &model.config).unwrap();
    }
    // Older versions wrote the source as it was typed.
    let stored = |name: &str| {
        peft::base_of(
            &serde_json::to_vec(&json!({"base_model_name_or_path": name})).unwrap(),
            "id",
        )
    };
    assert_eq!(stored("/srv/models/secret"), BaseName::from("id"));
    assert_eq!(stored("./models/x.gguf"), BaseName::from("id"));
    assert_eq!(
        stored("owner/name@v1"),
        BaseName {
            name: "owner/name".into(),
            revision: Some("v1".into())
        }
    );
    let renamed = peft::with_base(
        br#"{"r": 4, "base_model_name_or_path": "/srv"}"#,
        &BaseName::from("id"),
    )
    .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&renamed).unwrap(),
        json!({"r": 4, "base_model_name_or_path": "id", "revision": null})
    );
}

/// Returns the bytes of every tensor of a safetensors file, with its element type and shape.
fn stored(file: &Path) -> HashMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = std::fs::read(file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let all = tensors.tensors().into_iter();
    all.map(|(name, view)| {
        let (dtype, shape) = (view.dtype(), view.shape().to_vec());
        (name, (dtype, shape, view.data().to_vec()))
    })
    .collect()
}

#[test]
fn the_parts_around_a_language_model_are_exported_as_they_are() {
    let other_parts = ["visual.", "vision_tower.", "multi_modal_projector."];
    for name in [
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl-64",
        "gemma3-images",
        "mistral3-images",
    ] {
        let folder = golden(&format!("models/{name}"));
        let mut model = open(&format!("models/{name}"));
        // As the engine does: the copies are checked against what was there at the start.
        model.weights.record_digests();
        model.weights.record_others(&model.config).unwrap();
        let whole = model.weights.files().open().unwrap();
        let source = stored(&folder.join(WEIGHTS_FILE));
        let lora = LoraConfig {
            target_modules: vec!["q_proj".into(), "down_proj".into()],
            ..LoraConfig::default()
        };
        let untrained = Adapter::init(&model.config, &lora, 1).unwrap();
        let trained = untrained
            .map(|_, t| Ok::<_, ModelError>((t + 0.01)?))
            .unwrap();
        for (dtype, adapter) in [
            (ElementType::F32, None),
            (ElementType::F32, Some(&trained)),
            (ElementType::Bf16, None),
        ] {
            let out = tempfile::tempdir().unwrap();
            let read = |param: &ParamSpec| model.weights.load(param, Precision::F32);
            let layout = Layout {
                dtype,
                shard_bytes: u64::MAX,
            };
            save_merged(
                out.path(),
                &model.config,
                adapter,
                layout,
                &read,
                Some(&whole),
            )
            .unwrap();
            assert_eq!(
                json_file(out.path(), "config.json"),
                json_file(&folder, "config.json"),
                "{name}"
            );
            let written = stored(&out.path().join(WEIGHTS_FILE));
            assert_eq!(written.len(), source.len(), "{name}");
            let mut copied = 0;
            for (tensor, original) in &source {
                let is_other = other_parts.iter().any(|part| tensor.contains(part));
                copied += usize::from(is_other);
                let is_merged = adapter.is_some()
                    && ["self_attn.q_proj.weight", "down_proj.weight"]
                        .iter()
                        .any(|end| tensor.ends_with(end));
                let is_equal = written[tensor] == *original;
                let expected = is_other || (dtype == ElementType::F32 && !is_merged);
                assert_eq!(is_equal, expected, "{name} {dtype:?} {tensor}");
            }
            assert!(copied > 10, "{name}");
            // What was written is the same kind of model again.
            for file in ["tokenizer.json", "tokenizer_config.json"] {
                std::fs::copy(folder.join(file), out.path().join(file)).unwrap();
            }
            let again =
                load_model(None, out.path().to_str().unwrap(), &HubOptions::default()).unwrap();
            assert_eq!(again.config, model.config, "{name}");
        }
    }
}

#[test]
fn a_vision_tower_that_was_changed_meanwhile_is_not_exported() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for entry in std::fs::read_dir(golden("models/qwen3_vl")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, source.path().join(path.file_name().unwrap())).unwrap();
    }
    let source_name = source.path().to_str().unwrap();
    let mut model = load_model(None, source_name, &HubOptions::default()).unwrap();
    model.weights.record_digests();
    model.weights.record_others(&model.config).unwrap();
    let files = model.weights.files();
    let read = |param: &ParamSpec| {
        let shape = param.shape.as_slice();
        Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?)
    };
    let save = || {
        let whole = files.open().unwrap();
        let layout = Layout::CHECKPOINT;
        save_merged(out.path(), &model.config, None, layout, &read, Some(&whole))
    };
    save().unwrap();
    let path = source.path().join(WEIGHTS_FILE);
    let mut bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let (tensor, place) = text
        .as_object()
        .unwrap()
        .iter()
        .find(|(name, _)| name.contains("visual.blocks.0.norm1.weight"))
        .unwrap();
    bytes[8 + header + place["data_offsets"][0].as_u64().unwrap() as usize] ^= 1;
    // The open map must not change, so the file is replaced.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    let e = save().unwrap_err();
    assert!(
        matches!(&e, ModelError::Changed { reason, .. } if reason.contains(tensor.as_str())),
        "{e}"
    );
}

#[test]
fn an_adapter_of_the_text_of_a_larger_model_has_the_names_of_that_model() {
    let model = open("models/qwen3_vl");
    let lora = LoraConfig {
        target_modules: vec!["q_proj".into(), "up_proj".into()],
        ..LoraConfig::default()
    };
    let adapter = Adapter::init(&model.config, &lora, 1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    peft::save(dir.path(), &adapter, &model.config, &model.base).unwrap();
    let config = json_file(dir.path(), peft::CONFIG_FILE);
    assert_eq!(
        config["target_modules"],
        json!(r"model\.language_model\.layers\.\d+\..*\.(q_proj|up_proj)")
    );
    let file = dir.path().join(peft::WEIGHTS_FILE);
    let name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight";
    assert!(stored(&file).contains_key(name));
    // It can be read again, also with the names of the language model alone.
    let text = ModelConfig {
        whole_json: None,
        ..model.config.clone()
    };
    let again = peft::load(dir.path(), &model.config).unwrap();
    peft::save(dir.path(), &again, &text, &model.base).unwrap();
    assert!(!stored(&file).contains_key(name));
    let alone = peft::load(dir.path(), &model.config).unwrap();
    let values = |adapter: &Adapter| -> Vec<Vec<f32>> {
        let tensors = adapter.named().into_iter();
        tensors
            .map(|(_, t)| t.flatten_all().unwrap().to_vec1().unwrap())
            .collect()
    };
    assert_eq!(values(&again), values(&adapter));
    assert_eq!(values(&alone), values(&adapter));
}
