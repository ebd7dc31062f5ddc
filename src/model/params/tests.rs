//! Compares the table with the names, shapes and weight decay of transformers, of llama.cpp's gguf
//! package and of PEFT (tests/goldens/parameters.py).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::*;
use crate::domain::training::{FUSED_TARGET_MODULES, TARGET_MODULES};
use crate::model::adapter::Adapter;
use crate::model::config::ModelConfig;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(path)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn spec(config: &Value) -> ModelSpec {
    ModelConfig::from_hf_json(&config.to_string(), Path::new("config.json"))
        .unwrap()
        .spec
}

fn shape(value: &Value) -> Vec<usize> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_u64().unwrap() as usize)
        .collect()
}

#[test]
fn every_family_has_the_parameters_that_other_tools_say() {
    let cases = json(&golden("parameters.json"));
    for case in cases.as_array().unwrap() {
        let table = params(&spec(&case["config"]));
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let wanted: BTreeMap<String, (String, Vec<usize>, bool)> = case["parameters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| {
                (
                    text(&p["name"]),
                    (
                        text(&p["gguf"]),
                        shape(&p["shape"]),
                        p["decays"].as_bool().unwrap(),
                    ),
                )
            })
            .collect();
        let found: BTreeMap<String, (String, Vec<usize>, bool)> = table
            .iter()
            .map(|p| {
                (
                    p.hf.name.clone(),
                    (p.gguf.name.clone(), p.shape.clone(), p.decays()),
                )
            })
            .collect();
        assert_eq!(found, wanted, "{}", case["name"]);
        // Names and ids are unique.
        assert_eq!(
            (table.len(), found.len()),
            (wanted.len(), wanted.len()),
            "{}",
            case["name"]
        );
        assert_eq!(
            table.iter().map(ParamSpec::elements).sum::<usize>(),
            parameter_count(&spec(&case["config"])),
            "{}",
            case["name"]
        );
        assert_eq!(
            table
                .iter()
                .map(|p| p.id)
                .collect::<std::collections::HashSet<_>>()
                .len(),
            table.len(),
            "{}",
            case["name"]
        );
    }
}

#[test]
fn adapters_have_the_tensors_that_peft_makes() {
    let cases = json(&golden("parameters.json"));
    for case in cases.as_array().unwrap() {
        let spec = spec(&case["config"]);
        for adapter in case["adapters"].as_array().unwrap() {
            let targets = adapter["target_modules"].as_array().unwrap();
            let config = LoraConfig {
                rank: adapter["rank"].as_u64().unwrap() as usize,
                target_modules: targets
                    .iter()
                    .map(|t| t.as_str().unwrap().to_owned())
                    .collect(),
                ..LoraConfig::default()
            };
            let pairs = adapter["tensors"].as_array().unwrap();
            let wanted: BTreeMap<&str, Vec<usize>> = pairs
                .iter()
                .map(|pair| (pair[0].as_str().unwrap(), shape(&pair[1])))
                .collect();
            let table = lora_params(&spec, &config);
            let tensors: Vec<&LoraTensor> = table.iter().flat_map(LoraSpec::tensors).collect();
            let found: BTreeMap<&str, Vec<usize>> = tensors
                .iter()
                .map(|t| (t.name.as_str(), t.shape.to_vec()))
                .collect();
            assert_eq!(found, wanted, "{}", case["name"]);
            assert_eq!(tensors.len(), wanted.len(), "{}", case["name"]);
            // The layers match the rows of the table that have a LoRA target.
            let says = |p: &ParamSpec| {
                p.lora_target
                    .is_some_and(|target| config.target_modules.iter().any(|t| t == target))
            };
            let rows: Vec<ParamId> = params(&spec)
                .iter()
                .filter(|p| says(p))
                .map(|p| p.id)
                .collect();
            let weights: Vec<ParamId> = table
                .iter()
                .map(|u| ParamId::Block(u.block, BlockParam::Weight(u.linear)))
                .collect();
            assert_eq!(weights, rows, "{}", case["name"]);
            // The name of a tensor identifies exactly one layer.
            for update in &table {
                for name in update.tensors().map(|t| t.name.as_str()) {
                    let updated: Vec<Linear> = Linear::ALL
                        .into_iter()
                        .filter(|linear| linear.is_updated_by(name))
                        .collect();
                    assert_eq!(updated, [update.linear], "{name}");
                }
            }
        }
    }
}

#[test]
fn the_golden_models_files_hold_the_table() {
    for name in [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma3",
        "gemma2",
        "gemma2-64",
        "phi3",
        "phi3-long",
        "glm4",
        "glm4-64",
        "smollm3",
        "smollm3-64",
        "granite",
        "granite-64",
        "olmo2",
        "olmo2-64",
        "olmo3",
        "olmo3-64",
        "ministral",
        "ministral-64",
        "ministral3",
        "ministral3-64",
    ] {
        let table = params(&spec(&json(&golden(&format!("models/{name}/config.json")))));
        let file = std::fs::read(golden(&format!("models/{name}/model.safetensors"))).unwrap();
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        let stored: BTreeMap<String, Vec<usize>> = metadata
            .tensors()
            .into_iter()
            .map(|(n, info)| (n, info.shape.clone()))
            .collect();
        let wanted: BTreeMap<String, Vec<usize>> = table
            .iter()
            .map(|p| (p.hf.name.clone(), p.shape.clone()))
            .collect();
        assert_eq!(wanted, stored, "{name}");
    }
}

#[test]
fn the_domains_target_modules_are_the_linear_layers() {
    let names = Linear::ALL.map(Linear::lora_target);
    assert_eq!(names[..7], TARGET_MODULES);
    assert_eq!(names[7..], FUSED_TARGET_MODULES);
    let mut grouped: Vec<Linear> = Vec::new();
    PerGroup::build(|group| {
        grouped.extend_from_slice(group.members());
        Ok::<_, ()>(())
    })
    .unwrap();
    assert_eq!(grouped.len(), Linear::ALL.len());
    assert!(Linear::ALL.iter().all(|linear| grouped.contains(linear)));
}

/// The default targets are the seven separate layers.
#[test]
fn the_default_targets_mean_every_layer_of_a_model_with_fused_projections() {
    let config = json(&golden("models/phi3/config.json"));
    let spec = spec(&config);
    let targets = |names: &[&str]| -> Vec<Linear> {
        let config = LoraConfig {
            target_modules: names.iter().map(|name| name.to_string()).collect(),
            ..LoraConfig::default()
        };
        let layers = lora_layers(&spec, &config);
        let first = layers.iter().filter(|layer| layer.block == 0);
        first.map(|layer| layer.linear).collect()
    };
    let all = [
        Linear::FusedQkv,
        Linear::Output,
        Linear::FusedGateUp,
        Linear::Down,
    ];
    assert_eq!(targets(&TARGET_MODULES), all);
    assert_eq!(
        targets(&["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        all
    );
    // One part alone does not stand for the whole matrix.
    assert_eq!(targets(&["q_proj", "up_proj", "o_proj"]), [Linear::Output]);
    let unmatched = |names: &[&str]| {
        let config = LoraConfig {
            target_modules: names.iter().map(|name| name.to_string()).collect(),
            ..LoraConfig::default()
        };
        unmatched_targets(&spec, &config)
    };
    assert_eq!(
        unmatched(&["q_proj", "up_proj", "o_proj"]),
        ["q_proj", "up_proj"]
    );
    for accepted in [&TARGET_MODULES[..], &["qkv_proj", "down_proj"]] {
        assert!(unmatched(accepted).is_empty());
    }

    let config = ModelConfig::from_hf_json(&config.to_string(), Path::new("config.json")).unwrap();
    let adapter = Adapter::init(&config, &LoraConfig::default(), 1).unwrap();
    assert_eq!(
        adapter.target_modules(),
        ["o_proj", "down_proj", "qkv_proj", "gate_up_proj"],
        "the names of modules that PEFT finds"
    );
}

/// Exports split the tensors into files in the table's order, so it must not change.
#[test]
fn the_order_is_that_of_a_forward_pass() {
    let cases = json(&golden("parameters.json"));
    let case = cases
        .as_array()
        .unwrap()
        .iter()
        .find(|case| case["name"] == "qwen3 with biases, tied")
        .unwrap();
    let table = params(&spec(&case["config"]));
    let names: Vec<&str> = table.iter().map(ParamSpec::name).collect();
    assert_eq!(names[0], "model.embed_tokens.weight");
    let second: Vec<&str> = names
        .iter()
        .filter_map(|name| name.strip_prefix("model.layers.1."))
        .collect();
    let wanted = [
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.q_proj.bias",
        "self_attn.k_proj.weight",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.weight",
        "self_attn.v_proj.bias",
        "self_attn.o_proj.weight",
        "self_attn.o_proj.bias",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ];
    assert_eq!(second, wanted);
    assert_eq!(
        names[1..1 + wanted.len()]
            .iter()
            .map(|n| &n[..15])
            .collect::<BTreeSet<_>>(),
        BTreeSet::from(["model.layers.0."])
    );
    assert_eq!(*names.last().unwrap(), "model.norm.weight");
    let rotated: Vec<usize> = table[..12].iter().filter_map(|p| p.rotated_heads).collect();
    assert_eq!(
        rotated,
        [4, 4, 2, 2],
        "the weights and biases of queries and keys"
    );
}

#[test]
fn names_outside_the_table_are_those_of_the_formats() {
    assert_eq!(
        (gguf_embedding(), gguf_head()),
        ("token_embd.weight".to_owned(), "output.weight".to_owned())
    );
    assert_eq!(
        (gguf_bias(0, Linear::Query), gguf_bias(3, Linear::Gate)),
        (
            "blk.0.attn_q.bias".to_owned(),
            "blk.3.ffn_gate.bias".to_owned()
        )
    );
    assert_eq!(
        peft_example(0, Linear::Query),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    );
    assert!(
        is_in_block("model.layers.3.x")
            && is_in_block("blk.0.x")
            && !is_in_block("model.norm.weight")
            && !is_in_block("output.weight")
    );
    let cases = json(&golden("parameters.json"));
    let untied = cases
        .as_array()
        .unwrap()
        .iter()
        .find(|case| case["name"] == "mistral")
        .unwrap();
    assert_eq!(
        params(&spec(&untied["config"])).last().unwrap().hf.name,
        HF_HEAD
    );
}

#[test]
fn the_language_model_of_a_model_of_text_and_images_has_the_names_of_the_table() {
    let name = "model.layers.3.mlp.up_proj.weight";
    for stored in [
        name,
        "language_model.model.layers.3.mlp.up_proj.weight",
        "model.language_model.layers.3.mlp.up_proj.weight",
    ] {
        assert_eq!(text_name(stored), name);
    }
    assert_eq!(text_name("language_model.lm_head.weight"), HF_HEAD);
    for other in [
        "vision_tower.embeddings.weight",
        "language_model.projector.weight",
        "model.visual.blocks.0.norm.weight",
    ] {
        assert_eq!(text_name(other), other);
    }
}
