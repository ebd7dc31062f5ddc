use std::path::Path;

use candle_core::{DType, Device};

use super::*;
use crate::domain::training::LoraConfig;
use crate::model::config::ModelConfig;
use crate::model::device::ComputeDevice;
use crate::model::parameters::Parameters;

/// Returns a Qwen3 policy with biases in attention. A block has norms before both of its parts and
/// on queries and keys, but none on its outputs.
fn policy() -> Policy {
    let json = r#"{"model_type": "qwen3", "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 8, "attention_bias": true}"#;
    let config = ModelConfig::from_hf_json(json, Path::new("config.json")).unwrap();
    let parameters = Parameters::build(&config, |p| {
        Tensor::zeros(p.shape.as_slice(), DType::F32, &Device::Cpu)
    })
    .unwrap();
    let (config, parameters) = (Arc::new(config), Arc::new(parameters));
    Policy {
        config,
        parameters,
        adapter: None,
        precision: Precision::F32,
        device: ComputeDevice::Cpu,
        helpers: Arc::default(),
    }
}

/// The gradient norm is summed in this order, so another order would change the last bits of every
/// run.
#[test]
fn a_full_fine_tune_lists_a_blocks_norms_behind_its_linear_layers() {
    let trained = TrainablePolicy::full(&policy(), Precision::F32).unwrap();
    let blocks = ["model.layers.0.", "model.layers.1."].map(|block| {
        [
            "self_attn.q_proj.weight",
            "self_attn.q_proj.bias",
            "self_attn.k_proj.weight",
            "self_attn.k_proj.bias",
            "self_attn.v_proj.weight",
            "self_attn.v_proj.bias",
            "self_attn.o_proj.weight",
            "self_attn.o_proj.bias",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
            "input_layernorm.weight",
            "self_attn.q_norm.weight",
            "self_attn.k_norm.weight",
            "post_attention_layernorm.weight",
        ]
        .map(|name| format!("{block}{name}"))
    });
    let ends = |name: &str| vec![name.to_owned()];
    let wanted = [
        ends("model.embed_tokens.weight"),
        blocks.concat(),
        ends("model.norm.weight"),
        ends("lm_head.weight"),
    ]
    .concat();
    let names: Vec<&str> = trained.trainables.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, wanted);
    for t in &trained.trainables {
        assert_eq!(t.decay, t.var.rank() == 2, "{}", t.name);
    }
}

#[test]
fn an_adapter_is_listed_block_by_block_in_the_order_of_target_modules() {
    let base = policy();
    // The order in the configuration has no effect.
    let target_modules = vec!["down_proj".to_owned(), "q_proj".to_owned()];
    let config = LoraConfig {
        rank: 2,
        target_modules,
        ..LoraConfig::default()
    };
    let adapter = Adapter::init(&base.config, &config, 1).unwrap();
    let trained = TrainablePolicy::lora(&base, &adapter, Precision::F32).unwrap();
    let wanted = [
        "0.self_attn.q_proj",
        "0.mlp.down_proj",
        "1.self_attn.q_proj",
        "1.mlp.down_proj",
    ]
    .map(|module| {
        ["A", "B"]
            .map(|which| format!("base_model.model.model.layers.{module}.lora_{which}.weight"))
    })
    .concat();
    let names: Vec<&str> = trained.trainables.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, wanted);
    assert!(trained.trainables.iter().all(|t| t.decay));
}
