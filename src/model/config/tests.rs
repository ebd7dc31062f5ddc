use super::*;

fn golden(path: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(path);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// BLAKE3 hashes of [`ModelConfig::canonical`], computed by the version that had no [`ModelSpec`]
/// yet. Jobs are pinned to these hashes, so they must never change.
const IDENTITIES: [(&str, &str); 11] = [
    (
        "llama, tied",
        "a1ce60e9825dde3acf374eb4cbe15450845129661ca9cf99c8986ed326600b76",
    ),
    (
        "llama with biases",
        "a7b959e8cde8c005ce73770243903932b8bb0b835ba3dea69f698f22d4e3f414",
    ),
    (
        "mistral",
        "11755a8ee315b3e3827108d610ad4b905e9c3b09ee120a744d94a1c0776f5a64",
    ),
    (
        "qwen2, tied",
        "b3e01258080162472b0e4dfda1985569cd0fc9467580d60b6a2cebed179086f4",
    ),
    (
        "qwen2 with windows",
        "802c0aee653def2d9093557936a62a05d8aac098ad3736a0f209ed7bd4714bdb",
    ),
    (
        "qwen3",
        "9ea068fda400bbf7ea369f25546480d739ee8260356fc337c6007a2ddd7f1235",
    ),
    (
        "qwen3 with biases, tied",
        "677507ff64ec7c2fd403bfedab5acea771beaf7abf2e32361c582cb944441919",
    ),
    (
        "models/llama",
        "071c4267dc8311b9ec490576cba7dfbf3c388dc147544001d7bfb8fe93da6109",
    ),
    (
        "models/mistral",
        "8cf97e0e45637beef47f08e1ce1707b4fcb21312da414076b00b2403d41f5a5c",
    ),
    (
        "models/qwen2",
        "dd8b0da33e56d8780357b85bc9ff64f39e38cc2958f39d51f5f93dc8ee275bd9",
    ),
    (
        "models/qwen3",
        "c12c3f103d1df3a3f12ccb973603cf3647807890b20ee8e5428b7aceaf8efa1d",
    ),
];

#[test]
fn the_identity_of_a_configuration_stays_what_it_was() {
    let cases = golden("parameters.json");
    for (name, expected) in IDENTITIES {
        let json = match name.starts_with("models/") {
            true => golden(&format!("{name}/config.json")),
            false => cases
                .as_array()
                .unwrap()
                .iter()
                .find(|case| case["name"] == name)
                .unwrap()["config"]
                .clone(),
        };
        let config =
            ModelConfig::from_hf_json(&json.to_string(), Path::new("config.json")).unwrap();
        let canonical = config.canonical();
        assert_eq!(
            blake3::hash(canonical.as_bytes()).to_hex().as_str(),
            expected,
            "{name}: {canonical}"
        );
    }
}

#[test]
fn an_absent_field_means_what_the_familys_class_in_transformers_means() {
    let read = |model_type: &str, more: &str| {
        let sizes = r#""vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 30,
            "num_attention_heads": 64"#;
        let text =
            format!(r#"{{"model_type": "{model_type}", "hidden_size": 256, {sizes}{more}}}"#);
        ModelConfig::from_hf_json(&text, Path::new("config.json"))
            .unwrap()
            .spec
    };
    for (model_type, kv_heads, head_dim, positions, windows) in [
        ("llama", 64, 4, 2048, vec![None; 30]),
        ("mistral", 8, 4, 131_072, vec![Some(4096); 30]),
        ("qwen2", 32, 4, 32_768, vec![None; 30]),
        ("qwen3", 32, 128, 32_768, vec![None; 30]),
        ("gemma2", 4, 256, 8192, [Some(4096), None].repeat(15)),
        ("phi3", 64, 4, 4096, vec![None; 30]),
        ("glm4", 2, 128, 131_072, vec![None; 30]),
        (
            "gemma3_text",
            4,
            256,
            131_072,
            [vec![Some(4096); 5], vec![None]].concat().repeat(5),
        ),
        ("smollm3", 4, 4, 32_768, vec![None; 30]),
        ("granite", 64, 4, 2048, vec![None; 30]),
        ("olmo2", 64, 4, 2048, vec![None; 30]),
        (
            "olmo3",
            64,
            4,
            2048,
            [
                [vec![Some(4096); 3], vec![None]].concat().repeat(7),
                vec![Some(4096); 2],
            ]
            .concat(),
        ),
        ("ministral", 8, 4, 131_072, vec![Some(4096); 30]),
        ("ministral3", 8, 128, 262_144, vec![None; 30]),
    ] {
        let spec = read(model_type, "");
        let attention = spec.blocks[0].attention();
        assert_eq!(
            (attention.kv_heads, attention.head_dim),
            (kv_heads, head_dim),
            "{model_type}"
        );
        assert_eq!(spec.max_position_embeddings, positions, "{model_type}");
        assert_eq!(
            spec.blocks
                .iter()
                .map(|b| b.attention().window)
                .collect::<Vec<_>>(),
            windows,
            "{model_type}"
        );
        // In every family null means the number of query heads.
        assert_eq!(
            read(model_type, r#", "num_key_value_heads": null"#).blocks[0]
                .attention()
                .kv_heads,
            64,
            "{model_type}"
        );
    }
    // Qwen uses its window only with `use_sliding_window`. The first `max_window_layers` layers, 28
    // by default, do not have it.
    let windows = |more: &str| -> Vec<Option<usize>> {
        let blocks = read(
            "qwen2",
            &format!(r#", "use_sliding_window": true, "sliding_window": 16{more}"#),
        )
        .blocks;
        blocks.iter().map(|b| b.attention().window).collect()
    };
    assert_eq!(windows(""), [vec![None; 28], vec![Some(16); 2]].concat());
    assert_eq!(
        windows(r#", "max_window_layers": 1"#),
        [vec![None; 1], vec![Some(16); 29]].concat()
    );
}

#[test]
fn a_flag_of_another_type_is_refused() {
    for model_type in ["qwen2", "qwen3", "smollm3"] {
        let text = format!(
            r#"{{"model_type": "{model_type}", "hidden_size": 64, "vocab_size": 8,
            "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "use_sliding_window": "yes"}}"#
        );
        let error = ModelConfig::from_hf_json(&text, Path::new("config.json"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("'use_sliding_window': is \"yes\"; must be true or false"),
            "{error}"
        );
    }
}

#[test]
fn a_wrong_field_of_the_rotation_is_refused_with_the_name_of_its_object() {
    let refused = |model_type: &str, more: &str| {
        let text = format!(
            r#"{{"model_type": "{model_type}", "hidden_size": 64, "vocab_size": 8,
            "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, {more}}}"#
        );
        ModelConfig::from_hf_json(&text, Path::new("config.json"))
            .unwrap_err()
            .to_string()
    };
    for (model_type, more, part) in [
        ("llama", r#""rope_theta": 0"#, "'rope_theta': is 0;"),
        (
            "llama",
            r#""rope_parameters": {"rope_theta": 1}"#,
            "'rope_parameters.rope_theta': is 1;",
        ),
        (
            "llama",
            r#""rope_theta": -2, "rope_scaling": {"rope_type": "default"}"#,
            "'rope_theta': is -2;",
        ),
        (
            "glm4",
            r#""rope_scaling": {"partial_rotary_factor": 2}"#,
            "'rope_scaling.partial_rotary_factor': is 2; must be above 0 and at most 1",
        ),
        (
            "glm4",
            r#""partial_rotary_factor": 0.001"#,
            "'partial_rotary_factor': is 0.001: it rotates 0 of 128 dimensions",
        ),
    ] {
        let error = refused(model_type, more);
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_factor_of_the_rotation_that_is_not_positive_is_refused_with_its_key_and_file() {
    let read = |scaling: &Value| {
        let json = json!({
            "model_type": "llama", "hidden_size": 16, "vocab_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 4, "rope_scaling": scaling,
        });
        ModelConfig::from_hf_json(&json.to_string(), Path::new("folder/config.json"))
    };
    let yarn = json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
        "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.1, "mscale": 1.0,
        "mscale_all_dim": 0.8,
    });
    let longrope = json!({
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 512,
        "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0], "attention_factor": 1.1,
    });
    for (scaling, field) in [
        (&yarn, "factor"),
        (&yarn, "beta_fast"),
        (&yarn, "beta_slow"),
        (&yarn, "attention_factor"),
        (&yarn, "mscale"),
        (&yarn, "mscale_all_dim"),
        (&longrope, "factor"),
        (&longrope, "short_factor"),
        (&longrope, "long_factor"),
        (&longrope, "attention_factor"),
    ] {
        assert!(read(scaling).is_ok(), "{scaling}");
        // As f32 the last two are infinite and 0.
        for wrong in [-1.0, 0.0, 1e39, 1e-50] {
            let mut changed = scaling.clone();
            match scaling[field].is_array() {
                true => changed[field][1] = json!(wrong),
                false => changed[field] = json!(wrong),
            }
            // As in transformers, 0 has the same meaning as null in these fields.
            let is_null =
                wrong == 0.0 && (field.starts_with("beta") || field.starts_with("mscale"));
            if is_null {
                assert!(read(&changed).is_ok(), "{changed}");
                continue;
            }
            let error = read(&changed).unwrap_err().to_string();
            assert!(error.contains("folder/config.json"), "{error}");
            assert!(
                error.contains(&format!("'rope_scaling.{field}': ")),
                "{error}"
            );
            assert!(error.contains("must be above 0"), "{error}");
        }
    }
}
