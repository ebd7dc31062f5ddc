use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::*;

fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(path)
}

/// Returns an adapter_config.json written by PEFT 0.21.2, with every field of its `LoraConfig`.
fn written_by_peft() -> Map<String, Value> {
    let text = std::fs::read(golden("adapters/llama/adapter_config.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// Loads the golden adapter with one field of its configuration replaced.
fn load_with(field: &str, value: &Value) -> Result<Adapter, String> {
    let dir = tempfile::tempdir().unwrap();
    let mut fields = written_by_peft();
    fields.insert(field.to_owned(), value.clone());
    std::fs::write(
        dir.path().join(CONFIG_FILE),
        serde_json::to_vec(&fields).unwrap(),
    )
    .unwrap();
    std::fs::copy(
        golden("adapters/llama").join(WEIGHTS_FILE),
        dir.path().join(WEIGHTS_FILE),
    )
    .unwrap();
    let path = golden("models/llama/config.json");
    let model = ModelConfig::from_hf_json(&std::fs::read_to_string(&path).unwrap(), &path).unwrap();
    load(dir.path(), &model).map_err(|e| e.to_string())
}

#[test]
fn every_field_that_peft_writes_is_known() {
    for field in written_by_peft().keys().filter(|f| *f != "peft_type") {
        let lists = usize::from(FREE.contains(&field.as_str()))
            + OFF.iter().filter(|(name, _)| name == field).count();
        assert_eq!(lists, 1, "{field} must be in exactly one list");
    }
}

#[test]
fn a_field_that_changes_the_maths_is_refused_by_name_and_value() {
    let cases = [
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("init_lora_weights", json!("olora")),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("loftq")),
        ("init_lora_weights", json!("lora_ga")),
        ("init_lora_weights", json!("mica")),
        ("init_lora_weights", json!("a_start_of_a_later_version")),
        ("bias", json!("all")),
        ("bias", json!("lora_only")),
        ("fan_in_fan_out", json!(true)),
        ("lora_bias", json!(true)),
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("rank_pattern", json!({"q_proj": 8})),
        ("alpha_pattern", json!({"q_proj": 32})),
        ("layers_to_transform", json!([0])),
        ("layers_to_transform", json!(0)),
        ("layers_pattern", json!("layers")),
        ("layer_replication", json!([[0, 2], [1, 2]])),
        ("target_parameters", json!(["mlp.experts.gate_up_proj"])),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("trainable_token_indices", json!([1, 2])),
        ("alora_invocation_tokens", json!([5, 6])),
        ("arrow_config", json!({"top_k": 3})),
        ("corda_config", json!({"corda_method": "kpm"})),
        // PEFT turns an empty object into a configuration, which switches the variant on.
        ("kasa_config", json!({})),
        ("lora_ga_config", json!({"direction": "ArB2r"})),
        ("megatron_config", json!({"hidden_size": 1})),
        ("monteclora_config", json!({})),
        ("use_bdlora", json!({"nblocks": 2})),
        ("velora_config", json!({})),
        ("enable_lora", json!([true, false, true])),
        ("merge_weights", json!(true)),
        ("a_field_of_a_later_version", json!({"scale": 2})),
    ];
    for (field, value) in &cases {
        let e = load_with(field, value).expect_err(field);
        assert!(
            e.contains(&format!("{field} is {value}")) && e.contains("supported"),
            "{field}: {e}"
        );
    }
    // Every field of the list has a case here.
    for (field, _) in OFF {
        assert!(
            cases.iter().any(|(name, _)| *name == field),
            "{field} has no case"
        );
    }
    for start in [
        "pissa",
        "pissa_niter_4",
        "olora",
        "OLoRA",
        "corda",
        "loftq",
        "lora_ga",
    ] {
        let e = load_with("init_lora_weights", &json!(start)).unwrap_err();
        assert!(
            e.contains("PEFT changes the base model's weights when it loads the adapter"),
            "{start}: {e}"
        );
    }
    let e = load_with("init_lora_weights", &json!("mica")).unwrap_err();
    assert!(e.contains("PEFT trains only A"), "{e}");
    let e = load_with("use_rslora", &json!("yes")).unwrap_err();
    assert!(e.contains("use_rslora must be true or false"), "{e}");
}

#[test]
fn fields_that_do_not_change_the_maths_are_accepted() {
    let plain = load_with("peft_version", &json!("0.21.2")).unwrap();
    let cases = [
        ("init_lora_weights", json!(false)),
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!("orthogonal")),
        ("init_lora_weights", json!("eva")),
        // The form in which PEFT 0.21.2 writes it for such an adapter.
        (
            "eva_config",
            json!({
                "rho": 1.0, "tau": 0.99, "use_label_mask": true, "label_mask_value": -100,
                "whiten": false, "adjust_scaling_factors": true
            }),
        ),
        ("lora_dropout", json!(0.1)),
        ("inference_mode", json!(false)),
        ("task_type", Value::Null),
        ("peft_version", json!("0.9.0")),
        ("revision", json!("main")),
        ("base_model_name_or_path", json!("owner/name")),
        (
            "auto_mapping",
            json!({"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}),
        ),
        ("target_modules", json!(".*_proj")),
        ("exclude_modules", json!(["lm_head"])),
        ("megatron_core", json!("another.core")),
        ("qalora_group_size", json!(32)),
        ("ensure_weight_tying", json!(true)),
        ("runtime_config", json!({"ephemeral_gpu_offload": true})),
        ("modules_to_save", json!([])),
        ("rank_pattern", Value::Null),
        ("a_field_of_a_later_version", json!(false)),
        ("another_field_of_a_later_version", Value::Null),
    ];
    for (field, value) in cases {
        let adapter = load_with(field, &value).unwrap_or_else(|e| panic!("{field}: {e}"));
        assert_eq!(adapter.config, plain.config, "{field}");
    }
}
