//! The families that have golden files of their own: log-probs and gradients are those of
//! transformers, alone and in packed rows, in f32 and in bf16. Published config.json files are read
//! as transformers reads them, and those of other models are refused.

use std::collections::HashMap;

use bradley::domain::training::Precision;
use bradley::infer::pack::pack_by_length;
use bradley::infer::pair::{EncodedPair, SequenceGroup};
use bradley::infer::scorer::score;
use bradley::model::config::ModelConfig;
use bradley::model::decoder::Policy;
use bradley::model::device::ComputeDevice;
use bradley::model::rope::{RopeConfig, RopeScaling, RotaryPairs};
use bradley::model::spec::{ModelSpec, Norms, QkNorm};
use bradley::train::backprop::{SavePolicy, backward, forward};
use bradley::train::trainable::{StepGradients, TrainablePolicy};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use crate::reference_model::ReferenceModel;
use crate::support::{
    assert_close, chosen_families, device, encode, golden, is_batch_invariant, json, numbers,
    policy, relative, rows, tensors, tiny,
};

/// Folders in tests/goldens/models. A model whose name ends in `-64` has heads of 64 dimensions,
/// for which GPUs have kernels of their own, and other features than the model without the suffix.
pub const FAMILIES: [&str; 25] = [
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
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl-64",
    "gemma3-images",
    "mistral3-images",
];

/// Compares the log-probs of every pair with the golden ones.
fn assert_golden_log_probs(name: &str, what: &str, model: &Policy, pairs: &[EncodedPair]) {
    let expected = json(&format!("logps_{name}.json"));
    for (row, pair) in rows("pairs.jsonl").iter().zip(pairs) {
        let id = row.id.as_deref().unwrap();
        let got = score(model, &pair.groups()).unwrap();
        for (got, side) in got.iter().zip(["chosen", "rejected"]) {
            let want = numbers(&expected[id][side]);
            assert_eq!(got.len(), want.len(), "{what} {id} {side}");
            got.iter().zip(want).for_each(|(g, w)| {
                assert_close(&format!("{what} {id} {side}"), f64::from(*g), w, 1e-5, 0.1)
            });
        }
    }
}

#[test]
fn log_probs_of_each_family_are_those_of_transformers() {
    for name in FAMILIES {
        let (model, tokenizer) = tiny(name);
        assert_golden_log_probs(
            name,
            name,
            &model,
            &encode(&rows("pairs.jsonl"), &tokenizer, 256),
        );
    }
}

/// Compares the reference of `random_specs.rs`, which checks the gradients of random models, with
/// transformers. The reference is slow, so it computes only the first rows of each model.
#[test]
fn the_reference_has_the_log_probs_of_each_family() {
    for name in FAMILIES {
        let (policy, tokenizer) = tiny(name);
        let model = ReferenceModel::new(&policy);
        let expected = json(&format!("logps_{name}.json"));
        let rows = rows("pairs.jsonl");
        for (row, pair) in rows.iter().zip(encode(&rows, &tokenizer, 256)).take(2) {
            let rejected_prompt = pair.rejected_prompt.as_ref().unwrap_or(&pair.prompt);
            for (side, prompt, completion) in [
                ("chosen", &pair.prompt, &pair.chosen),
                ("rejected", rejected_prompt, &pair.rejected),
            ] {
                let got = model.log_probs(prompt, completion);
                let want = numbers(&expected[row.id.as_deref().unwrap()][side]);
                assert_eq!(got.len(), want.len(), "{name} {side}");
                for (got, want) in got.iter().zip(want) {
                    assert_close(&format!("{name} {side}"), *got, want, 1e-5, 0.1);
                }
            }
        }
    }
}

/// Returns the gradients of Σ log p of the chosen answers minus Σ log p of the rejected ones,
/// from one packed row.
fn gradients(
    policy: &TrainablePolicy,
    pairs: &[EncodedPair],
    save: SavePolicy,
) -> Vec<(String, Tensor)> {
    let groups: Vec<_> = pairs.iter().map(EncodedPair::groups).collect();
    let spec = &policy.policy.config.spec;
    let items: Vec<_> = groups.iter().map(Vec::as_slice).collect();
    let row = pack_by_length(&items, &|length| spec.length_class(length));
    let tape = forward(&policy.policy, row.row.clone(), save, &mut || {}).unwrap();
    let mut upstream = vec![0f32; row.row.targets.len()];
    for ranges in &row.completions {
        upstream[ranges[0].clone()].fill(1.0);
        upstream[ranges[1].clone()].fill(-1.0);
    }
    let mut total = StepGradients::zeros(policy);
    backward(&policy.policy, tape, &upstream, &mut total, &mut || {}).unwrap();
    total.collect().unwrap();
    let trainables = policy.trainables.iter().zip(total.values());
    trainables
        .map(|(t, g)| {
            (
                t.name.clone(),
                Tensor::from_slice(g, t.var.shape(), &Device::Cpu).unwrap(),
            )
        })
        .collect()
}

/// Returns the name of the bias of the queries, if `tensor` is the bias of the keys of a block that
/// does not rotate them. Such a bias adds the same number to all scores of a query, so it changes
/// no log-prob.
fn without_effect(spec: &ModelSpec, tensor: &str) -> Option<String> {
    let module = tensor.strip_suffix("k_proj.bias")?;
    let block = module.split('.').find_map(|part| part.parse().ok());
    let block: usize = block.expect("the tensor's name has no block number");
    spec.blocks[block]
        .attention()
        .rope
        .is_none()
        .then(|| format!("{module}q_proj.bias"))
}

fn norm(tensor: &Tensor) -> f64 {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let squares = values.iter().map(|x| f64::from(*x).powi(2));
    squares.sum::<f64>().sqrt()
}

#[test]
fn gradients_of_each_family_are_torchs_with_and_without_tapes() {
    for name in FAMILIES {
        let (model, tokenizer) = tiny(name);
        let pairs = encode(&rows("pairs.jsonl")[..2], &tokenizer, 256);
        let policy = TrainablePolicy::full(&model, Precision::F32).unwrap();
        let expected = tensors(&format!("grads_{name}.safetensors"));
        let bits = |t: &Tensor| -> Vec<u32> {
            t.flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .into_iter()
                .map(f32::to_bits)
                .collect()
        };
        let (kept, again) = (
            gradients(&policy, &pairs, SavePolicy::Tapes),
            gradients(&policy, &pairs, SavePolicy::BlockInputs),
        );
        assert_eq!(kept.len(), expected.len(), "{name}");
        for ((tensor, g), (_, recomputed)) in kept.iter().zip(&again) {
            match without_effect(&model.config.spec, tensor) {
                // Both gradients are what rounding leaves of 0.
                Some(of_queries) => {
                    let bound = 1e-5 * norm(&expected[&of_queries]);
                    let (got, want) = (norm(g), norm(&expected[tensor]));
                    assert!(
                        got < bound && want < bound,
                        "{name} {tensor}: {got:e} and {want:e} are not 0"
                    );
                }
                None => {
                    let error = relative(g, &expected[tensor]);
                    assert!(error < 1e-4, "{name} {tensor}: relative error {error:e}");
                }
            }
            if is_batch_invariant() {
                assert_eq!(bits(g), bits(recomputed), "{name} {tensor}");
            }
        }
    }
}

#[test]
fn rows_of_each_family_give_what_their_sequences_give_alone() {
    // Of each kernel that only some families use, one of these.
    let few = &[
        "gemma2-64",
        "phi3-long",
        "glm4-64",
        "olmo2-64",
        "granite-64",
        "ministral3-64",
        "qwen3_vl-64",
    ];
    for (name, precision) in chosen_families(&FAMILIES, few)
        .into_iter()
        .flat_map(|name| [(name, Precision::F32), (name, Precision::Bf16)])
    {
        let (exact, tokenizer) = tiny(name);
        let model = exact.with_precision(precision);
        let mut pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
        if !matches!(device(), ComputeDevice::Cpu) {
            // The emulator is slow.
            pairs.truncate(2);
        }
        let groups: Vec<_> = pairs.iter().map(EncodedPair::groups).collect();
        let items: Vec<_> = groups.iter().map(Vec::as_slice).collect();
        let packed = pack_by_length(&items, &|length| model.config.spec.length_class(length));
        let together = model.log_probs(packed.row.clone(), &mut || {}).unwrap();
        let sum = |values: &[f32]| values.iter().map(|x| f64::from(*x)).sum::<f64>();
        for (i, pair) in pairs.iter().enumerate() {
            for (side, completion) in [&pair.chosen, &pair.rejected].into_iter().enumerate() {
                let alone = SequenceGroup {
                    prompt: pair.prompt.clone(),
                    completions: vec![completion.clone()],
                };
                let got = &together[packed.completions[i][side].clone()];
                if is_batch_invariant() {
                    assert_eq!(
                        got,
                        score(&model, std::slice::from_ref(&alone)).unwrap()[0],
                        "{name} {precision:?}: bit for bit"
                    );
                }
                // In bf16 the operands are rounded.
                let tolerance = if precision == Precision::Bf16 {
                    0.02
                } else {
                    1e-5
                };
                assert_close(
                    name,
                    sum(got),
                    sum(&score(&exact, &[alone]).unwrap()[0]),
                    tolerance,
                    0.1,
                );
            }
        }
    }
}

#[test]
fn the_text_of_a_gemma_3_of_text_and_images_is_read() {
    let folder = tempfile::tempdir().unwrap();
    crate::support::copy_files(&golden("models/gemma3"), folder.path());
    let mut text: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("config.json")).unwrap()).unwrap();
    let eos = text
        .as_object_mut()
        .unwrap()
        .remove("eos_token_id")
        .unwrap();
    let config = json!({
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": eos,
        "text_config": text,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let stored = tensors("models/gemma3/model.safetensors");
    let (alone, tokenizer) = tiny("gemma3");
    let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
    for before in ["language_model.model.", "model.language_model."] {
        let rename = |(name, tensor): (&String, &Tensor)| {
            (name.replacen("model.", before, 1), tensor.clone())
        };
        let mut renamed: HashMap<String, Tensor> = stored.iter().map(rename).collect();
        renamed.insert(
            "vision_tower.embeddings.weight".into(),
            Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu).unwrap(),
        );
        candle_core::safetensors::save(&renamed, folder.path().join("model.safetensors")).unwrap();
        let model = bradley::formats::loader::load_model(
            None,
            folder.path().to_str().unwrap(),
            &Default::default(),
        )
        .unwrap();
        assert_eq!(
            model.config.canonical(),
            alone.config.canonical(),
            "{before}: the same model"
        );
        assert_eq!(model.config.eos_token_ids, alone.config.eos_token_ids);
        assert_eq!(model.config.whole_json, Some(config.clone()));
        assert_eq!(model.config.model_type(), "gemma3");
        // A checkpoint is a model of text alone.
        assert_eq!(
            model.config.hf_json["architectures"],
            json!(["Gemma3ForCausalLM"])
        );
        assert_golden_log_probs("gemma3", before, &policy(model).0, &pairs);
    }
}

#[test]
fn a_gemma_3_is_read_as_transformers_4_and_5_write_it() {
    let read = |json: Value| {
        ModelConfig::from_hf_json(&json.to_string(), std::path::Path::new("config.json"))
    };
    // The text part of the config.json of google/gemma-3-4b-it.
    let spec = read(json!({
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }))
    .unwrap();
    assert_eq!(
        (spec.parameter_count(), spec.eos_token_ids.as_slice()),
        (3_880_263_168, [1, 106].as_slice())
    );
    let spec = spec.spec;
    let windows: Vec<Option<usize>> = spec
        .blocks
        .iter()
        .map(|block| block.attention().window)
        .collect();
    assert_eq!(
        windows[..7],
        [
            Some(1024),
            Some(1024),
            Some(1024),
            Some(1024),
            Some(1024),
            None,
            Some(1024)
        ]
    );
    assert!(
        spec.blocks
            .iter()
            .all(|block| block.attention().window.is_some() == (block.attention().rope == Some(1)))
    );
    assert_eq!(spec.blocks[0].attention().scale, 1.0 / 16.0);
    let frequency = |rope: usize, at: usize| f64::from(spec.ropes[rope].inv_freq(256).0[at]);
    assert_close(
        "global",
        frequency(0, 64),
        1e6_f64.powf(-0.5) / 8.0,
        1e-6,
        1e-12,
    );
    assert_close("local", frequency(1, 64), 1e4_f64.powf(-0.5), 1e-6, 1e-12);
    // √2560, exact and rounded to bf16.
    assert_eq!(
        (
            spec.embedding_scale_in(Precision::F32),
            spec.embedding_scale_in(Precision::Bf16)
        ),
        (50.596_443, 50.5)
    );

    let with = |field: &str, value: Value| {
        let mut json = json!({"model_type": "gemma3_text", "hidden_size": 256});
        json[field] = value;
        read(json)
    };
    for (field, value) in [
        ("attn_logit_softcapping", json!(0.0)),
        ("final_logit_softcapping", json!(-30.0)),
        ("use_bidirectional_attention", json!(true)),
    ] {
        assert!(with(field, value).unwrap_err().to_string().contains(field));
    }
    // Soft-caps are absent by default. transformers applies only that on the logits.
    let caps = |spec: &ModelSpec| (spec.blocks[0].attention().softcap, spec.logit_softcap);
    assert_eq!(caps(&spec), (None, None));
    let capped = with("attn_logit_softcapping", json!(50.0)).unwrap().spec;
    assert_eq!(caps(&capped), (None, None));
    let capped = with("final_logit_softcapping", json!(30.0)).unwrap().spec;
    assert_eq!(caps(&capped), (None, Some(30.0)));
    let pattern = with("sliding_window_pattern", json!(2)).unwrap().spec;
    assert_eq!(
        pattern
            .blocks
            .iter()
            .filter(|block| block.attention().window.is_none())
            .count(),
        13
    );
}

#[test]
fn a_gemma_2_is_read_as_transformers_reads_it() {
    let read = |json: Value| {
        ModelConfig::from_hf_json(&json.to_string(), std::path::Path::new("config.json"))
    };
    // The fields of google/gemma-2-2b-it's config.json that describe the model.
    let published = json!({
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": false,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "eos_token_id": [1, 107],
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256_000,
    });
    let config = read(published.clone()).unwrap();
    assert_eq!(config.parameter_count(), 2_614_341_888);
    let spec = &config.spec;
    assert!(spec.tie_word_embeddings && spec.norms_add_one);
    assert_eq!(
        (spec.embedding_scale, spec.logit_softcap),
        (48.0, Some(30.0))
    );
    for (layer, block) in spec.blocks.iter().enumerate() {
        let attention = block.attention();
        assert_eq!(
            (attention.scale, attention.softcap, attention.qk_norm),
            (1.0 / 16.0, Some(50.0), QkNorm::Absent)
        );
        let window = (layer % 2 == 0).then_some(4096);
        assert_eq!(attention.window, window, "layer {layer}");
        assert_eq!(
            (block.mixer_norms, block.feed_forward_norms),
            (Norms::PreAndPost, Norms::PreAndPost)
        );
    }

    // The defaults are those of the 2B model.
    let defaults = read(json!({"model_type": "gemma2"})).unwrap();
    assert_eq!(defaults.canonical(), config.canonical());
    // Null means that there is no cap. A model without a cap is another model.
    for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
        let mut json = published.clone();
        json[field] = Value::Null;
        let uncapped = read(json).unwrap();
        let has_cap = match field {
            "attn_logit_softcapping" => uncapped.spec.blocks[0].attention().softcap.is_some(),
            _ => uncapped.spec.logit_softcap.is_some(),
        };
        assert!(!has_cap, "{field}");
        assert_ne!(uncapped.canonical(), config.canonical(), "{field}");
        for refused in [json!(0), json!(-1.0), json!(1e-60), json!("50")] {
            let mut json = published.clone();
            json[field] = refused;
            assert!(read(json).unwrap_err().to_string().contains(field));
        }
    }
    let mut layers = published.clone();
    layers["layer_types"] = json!(vec!["full_attention"; 26]);
    let windows = read(layers).unwrap().spec.blocks;
    assert!(
        windows
            .iter()
            .all(|block| block.attention().window.is_none())
    );
}

/// Reads the configuration of a model.
fn read(json: &Value) -> Result<ModelConfig, bradley::model::error::ModelError> {
    ModelConfig::from_hf_json(&json.to_string(), std::path::Path::new("config.json"))
}

#[test]
fn a_phi_3_is_read_as_transformers_reads_it() {
    // The fields of microsoft/Phi-4-mini-instruct's config.json that describe the model, with
    // factors of another size.
    let factors = |last: f64| -> Value {
        let mut list = vec![1.0; 48];
        list[47] = last;
        json!(list)
    };
    let published = json!({
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": false,
        "bos_token_id": 199_999,
        "eos_token_id": 199_999,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131_072,
        "mlp_bias": false,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": factors(1.25),
            "long_factor": factors(30.5),
        },
        "rope_theta": 10_000.0,
        "sliding_window": 262_144,
        "tie_word_embeddings": true,
        "vocab_size": 200_064,
    });
    let config = read(&published).unwrap();
    assert_eq!(config.parameter_count(), 3_836_021_760);
    let spec = &config.spec;
    let rope = &spec.ropes[0];
    assert_eq!((spec.head_dim(), rope.dims), (128, Some(96)));
    let (short, attention_factor) = rope.inv_freq_at(128, 4096);
    let (long, _) = rope.inv_freq_at(128, 4097);
    assert_eq!((short.len(), short[0]), (48, 1.0));
    let last = 10_000_f64.powf(-94.0 / 96.0);
    assert_close("short", f64::from(short[47]), last / 1.25, 1e-6, 1e-12);
    assert_close("long", f64::from(long[47]), last / 30.5, 1e-6, 1e-12);
    // √(1 + ln 32 / ln 4096).
    assert_close(
        "factor",
        f64::from(attention_factor),
        1.190_238,
        1e-6,
        1e-12,
    );
    assert_ne!(spec.length_class(4096), spec.length_class(4097));
    assert_eq!(spec.length_class(4097), spec.length_class(131_072));

    let with = |field: &str, value: Value| {
        let mut json = published.clone();
        json[field] = value;
        read(&json)
    };
    // Older files have other names for longrope.
    for name in ["su", "yarn"] {
        let mut scaling = published["rope_scaling"].clone();
        scaling["type"] = json!(name);
        let older = with("rope_scaling", scaling).unwrap();
        assert_eq!(older.canonical(), config.canonical(), "{name}");
    }
    let mut other = published["rope_scaling"].clone();
    other["long_factor"] = factors(31.0);
    let other = with("rope_scaling", other).unwrap();
    assert_ne!(other.canonical(), config.canonical());
    for (field, value) in [
        ("partial_rotary_factor", json!(0.5)),
        ("partial_rotary_factor", json!(1.5)),
        (
            "rope_scaling",
            json!({"type": "longrope", "short_factor": [1.0]}),
        ),
        ("hidden_act", json!("relu")),
    ] {
        assert!(with(field, value).is_err(), "{field}");
    }
    // Without `rope_scaling` the frequencies are plain, as in Phi-4.
    let plain = with("rope_scaling", Value::Null).unwrap().spec;
    assert_eq!(plain.length_class(4096), plain.length_class(131_072));
}

#[test]
fn a_glm_4_is_read_as_transformers_reads_it() {
    // The fields of zai-org/GLM-4-9B-0414's config.json that describe the model.
    let published = json!({
        "model_type": "glm4",
        "architectures": ["Glm4ForCausalLM"],
        "attention_bias": true,
        "eos_token_id": [151_329, 151_336, 151_338],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 13_696,
        "max_position_embeddings": 32_768,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": false,
        "vocab_size": 151_552,
    });
    let config = read(&published).unwrap();
    assert_eq!(config.parameter_count(), 9_400_279_040);
    let spec = &config.spec;
    let rope = &spec.ropes[0];
    assert_eq!(
        (rope.dims, rope.pairs),
        (Some(64), RotaryPairs::Interleaved)
    );
    for block in &spec.blocks {
        let attention = block.attention();
        assert!(attention.qkv_bias && !attention.output_bias);
        assert_eq!(
            (block.mixer_norms, block.feed_forward_norms),
            (Norms::PreAndPost, Norms::PreAndPost)
        );
    }
    // By default half of each head is rotated.
    let mut json = published.clone();
    json.as_object_mut()
        .unwrap()
        .remove("partial_rotary_factor");
    assert_eq!(read(&json).unwrap().canonical(), config.canonical());
    let mut json = published;
    json["partial_rotary_factor"] = json!(0.25);
    assert_ne!(read(&json).unwrap().canonical(), config.canonical());
}

#[test]
fn a_smollm3_is_read_as_transformers_reads_it() {
    let rotated = [1, 1, 1, 0].repeat(9);
    // The fields of HuggingFaceTB/SmolLM3-3B's config.json that describe the model.
    let published = json!({
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": false,
        "bos_token_id": null,
        "eos_token_id": 128_012,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "layer_types": vec!["full_attention"; 36],
        "max_position_embeddings": 65_536,
        "max_window_layers": 28,
        "mlp_bias": false,
        "no_rope_layer_interval": 4,
        "no_rope_layers": rotated,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_scaling": null,
        "rope_theta": 5_000_000.0,
        "sliding_window": null,
        "use_sliding_window": false,
        "vocab_size": 128_256,
    });
    let config = read(&published).unwrap();
    assert_eq!(config.parameter_count(), 3_075_098_624);
    assert_eq!(config.spec.ropes[0].theta, 5_000_000.0);
    let rotated = |config: &ModelConfig| -> Vec<bool> {
        let blocks = config.spec.blocks.iter();
        blocks
            .map(|block| block.attention().rope.is_some())
            .collect()
    };
    assert_eq!(rotated(&config), [true, true, true, false].repeat(9));

    let with = |field: &str, value: Value| {
        let mut json = published.clone();
        json[field] = value;
        read(&json)
    };
    // Null stands for the interval. Layers that are not rotated are part of the identity.
    let by_interval = with("no_rope_layers", Value::Null).unwrap();
    assert_eq!(by_interval.canonical(), config.canonical());
    let all = with("no_rope_layers", json!(vec![1; 36])).unwrap();
    assert_ne!(all.canonical(), config.canonical());
    for refused in [json!([1, 0]), json!("none")] {
        let error = with("no_rope_layers", refused).unwrap_err().to_string();
        assert!(error.contains("no_rope_layers"), "{error}");
    }
    // Without layer_types, the layers that are not rotated have the window.
    let mut json = published.clone();
    json["layer_types"] = Value::Null;
    json["use_sliding_window"] = json!(true);
    json["sliding_window"] = json!(128);
    let windows = read(&json).unwrap().spec.blocks;
    assert!(windows.iter().all(|block| {
        let attention = block.attention();
        attention.window == attention.rope.is_none().then_some(128)
    }));
    let theta = read(&json!({"model_type": "smollm3"})).unwrap().spec.ropes[0].theta;
    assert_eq!(theta, 2_000_000.0);
}

#[test]
fn a_granite_is_read_as_transformers_reads_it() {
    // The fields of ibm-granite/granite-3.3-2b-instruct's config.json that describe the model.
    let mut published = json!({
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": false,
        "attention_multiplier": 0.015625,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "max_position_embeddings": 131_072,
        "mlp_bias": false,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5,
        "rope_scaling": null,
        "rope_theta": 10_000_000.0,
        "tie_word_embeddings": true,
        "vocab_size": 49_159,
    });
    let config = read(&published).unwrap();
    assert_eq!(config.parameter_count(), 2_533_539_840);
    let (spec, block) = (&config.spec, &config.spec.blocks[0]);
    assert_eq!((spec.embedding_scale, spec.logit_factor), (12.0, 0.125));
    assert_eq!(
        (block.attention().scale, block.output_factor),
        (1.0 / 64.0, 0.22)
    );
    for field in [
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
    ] {
        let with = |value: Value| {
            let mut json = published.clone();
            json[field] = value;
            read(&json)
        };
        // Every multiplier is part of the identity.
        let other = with(json!(0.75)).unwrap();
        assert_ne!(other.canonical(), config.canonical(), "{field}");
        for refused in [json!(0), json!(-1.0), json!(1e-60), json!("1")] {
            assert!(with(refused).unwrap_err().to_string().contains(field));
        }
    }
    // The class multiplies by a number, so that only the product is rounded.
    published["embedding_multiplier"] = json!(5.7);
    let spec = read(&published).unwrap().spec;
    assert_eq!(spec.embedding_scale_in(Precision::Bf16), 5.7);
    // By default all multipliers are 1, also that on the scores.
    let plain = read(&json!({"model_type": "granite"})).unwrap().spec;
    assert_eq!((plain.embedding_scale, plain.logit_factor), (1.0, 1.0));
    let block = &plain.blocks[0];
    assert_eq!((block.attention().scale, block.output_factor), (1.0, 1.0));
}

#[test]
fn an_olmo_2_is_read_as_transformers_reads_it() {
    // The fields of allenai/OLMo-2-0425-1B-Instruct's config.json that describe the model.
    let published = json!({
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": false,
        "eos_token_id": 100_257,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "pad_token_id": 100_277,
        "rms_norm_eps": 1e-6,
        "rope_scaling": null,
        "rope_theta": 500_000,
        "tie_word_embeddings": false,
        "vocab_size": 100_352,
    });
    let config = read(&published).unwrap();
    assert_eq!(config.parameter_count(), 1_484_916_736);
    for block in &config.spec.blocks {
        assert_eq!(
            [block.mixer_norms, block.feed_forward_norms],
            [Norms::Post; 2]
        );
        assert_eq!(block.attention().qk_norm, QkNorm::AllHeads);
    }
    // Norms are part of the identity.
    let canonical = config.canonical();
    assert!(
        canonical.contains(r#"["input_norms",[false,false]]"#),
        "{canonical}"
    );
    assert!(
        canonical.contains(r#"["qk_norm","all_heads"]"#),
        "{canonical}"
    );
    let spec = read(&json!({"model_type": "olmo2"})).unwrap().spec;
    assert_eq!(spec.rms_norm_eps, 1e-5);
}

#[test]
fn an_olmo_3_is_read_as_transformers_4_and_5_write_it() {
    let mut types = vec!["sliding_attention"; 3];
    types.push("full_attention");
    let types = types.repeat(8);
    // The fields of allenai/Olmo-3-7B-Instruct's config.json that describe the model.
    let published = json!({
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "attention_bias": false,
        "eos_token_id": 100_257,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "layer_types": types,
        "max_position_embeddings": 65_536,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 100_277,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "attention_factor": 1.207_943_930_3,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500_000,
        "sliding_window": 4096,
        "tie_word_embeddings": false,
        "vocab_size": 100_278,
    });
    let config = read(&published).unwrap();
    assert_eq!(config.parameter_count(), 7_298_011_136);
    for (layer, block) in config.spec.blocks.iter().enumerate() {
        let attention = block.attention();
        let slides = layer % 4 != 3;
        assert_eq!(attention.window, slides.then_some(4096), "layer {layer}");
        assert_eq!(attention.rope, Some(usize::from(slides)), "layer {layer}");
    }
    let [full, sliding] = &config.spec.ropes[..] else {
        panic!("not two sets of frequencies");
    };
    assert!(matches!(
        full.scaling,
        RopeScaling::Yarn { factor: 8.0, .. }
    ));
    assert_eq!((full.theta, sliding.theta), (500_000.0, 500_000.0));
    assert_eq!(sliding.scaling, RopeScaling::None);

    // The same model as transformers 5 writes it.
    let mut json = published.clone();
    let mut yarn = json["rope_scaling"].take();
    yarn["rope_theta"] = json["rope_theta"].take();
    json["rope_parameters"] = json!({
        "full_attention": yarn,
        "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
    });
    json["layer_types"] = Value::Null;
    assert_eq!(read(&json).unwrap().canonical(), config.canonical());
}

#[test]
fn a_ministral_is_read_as_transformers_reads_it() {
    let spec = |more: Value| {
        let mut json = json!({"model_type": "ministral", "num_hidden_layers": 4});
        for (key, value) in more.as_object().unwrap() {
            json[key] = value.clone();
        }
        read(&json).unwrap().spec
    };
    let windows = |spec: &ModelSpec| -> Vec<Option<usize>> {
        let blocks = spec.blocks.iter();
        blocks.map(|block| block.attention().window).collect()
    };
    assert_eq!(windows(&spec(json!({}))), [Some(4096); 4]);
    assert_eq!(
        windows(&spec(json!({"sliding_window": null}))),
        [None::<usize>; 4]
    );
    // The layers of mistralai/Ministral-8B-Instruct-2410.
    let types = [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "sliding_attention",
    ];
    let interleaved = spec(json!({"sliding_window": 32_768, "layer_types": types}));
    assert_eq!(
        windows(&interleaved),
        [None, Some(32_768), Some(32_768), Some(32_768)]
    );
}

#[test]
fn a_ministral_3_is_read_as_transformers_reads_it() {
    // The fields of the config.json of mistralai/Ministral-3-8B-Base-2512 that describe its text.
    let text = json!({
        "model_type": "ministral3",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "max_position_embeddings": 262_144,
        "num_attention_heads": 32,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16_384,
            "rope_theta": 1_000_000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": null,
        "tie_word_embeddings": false,
        "vocab_size": 131_072,
    });
    let published = json!({
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"model_type": "pixtral"},
    });
    let config = read(&published).unwrap();
    assert_eq!(config.parameter_count(), 8_489_553_920);
    assert_eq!(config.architecture.as_str(), "ministral3");
    assert_eq!(
        config.hf_json["architectures"],
        json!(["Ministral3ForCausalLM"])
    );
    let scaling = config.spec.ropes[0].query_scaling.unwrap();
    assert_eq!((scaling.beta, scaling.period), (0.1, 16_384));
    assert_eq!(
        [0, 16_383].map(|position| scaling.factor(position)),
        [1.0, 1.0]
    );
    for (position, periods) in [(16_384, 1.0), (32_767, 1.0), (32_768, 2.0), (262_143, 15.0)] {
        let want = 1.0 + 0.1 * (1.0_f64 + periods).ln();
        let got = f64::from(scaling.factor(position));
        assert_close("factor", got, want, 1e-6, 1e-12);
    }
    // These are also the defaults.
    let defaults = read(&json!({"model_type": "ministral3"})).unwrap();
    assert_eq!(defaults.canonical(), config.canonical());
    // The factor is part of the identity, and cannot be absent.
    let mut other = text.clone();
    other["rope_parameters"]["llama_4_scaling_beta"] = json!(0.2);
    assert_ne!(read(&other).unwrap().canonical(), config.canonical());
    other["rope_parameters"]["llama_4_scaling_beta"] = Value::Null;
    let error = read(&other).unwrap_err().to_string();
    assert!(
        error.contains("rope_parameters.llama_4_scaling_beta"),
        "{error}"
    );
}

#[test]
fn the_text_of_a_mistral_3_may_be_a_mistral_or_a_ministral_3() {
    let of = |text: Value| read(&json!({"model_type": "mistral3", "text_config": text}));
    let sizes = json!({
        "hidden_size": 5120,
        "head_dim": 128,
        "intermediate_size": 32_768,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rope_theta": 1_000_000_000.0,
        "sliding_window": null,
        "vocab_size": 131_072,
    });
    let typed = |name: &str| {
        let mut text = sizes.clone();
        text["model_type"] = json!(name);
        of(text)
    };
    // The text of mistralai/Mistral-Small-3.1-24B-Instruct-2503.
    let mistral = typed("mistral").unwrap();
    assert_eq!(mistral.architecture.as_str(), "mistral");
    assert_eq!(mistral.parameter_count(), 23_572_403_200);
    assert!(mistral.spec.blocks[0].attention().window.is_none());
    assert_eq!(of(sizes.clone()).unwrap().canonical(), mistral.canonical());
    assert!(typed("llama").is_err());
}

#[test]
fn the_text_of_a_mistral_3_of_text_and_images_has_the_log_probs_of_the_text_alone() {
    let folder = tempfile::tempdir().unwrap();
    crate::support::copy_files(&golden("models/ministral3"), folder.path());
    let path = folder.path().join("config.json");
    let text: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let config = json!({
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": text,
    });
    std::fs::write(&path, config.to_string()).unwrap();
    let stored = tensors("models/ministral3/model.safetensors");
    let rename = |(name, tensor): (&String, &Tensor)| {
        let name = name.replacen("model.", "model.language_model.", 1);
        (name, tensor.clone())
    };
    let mut renamed: HashMap<String, Tensor> = stored.iter().map(rename).collect();
    renamed.insert(
        "model.vision_tower.ln_pre.weight".into(),
        Tensor::zeros(2, candle_core::DType::F32, &Device::Cpu).unwrap(),
    );
    candle_core::safetensors::save(&renamed, folder.path().join("model.safetensors")).unwrap();
    let model = bradley::formats::loader::load_model(
        None,
        folder.path().to_str().unwrap(),
        &Default::default(),
    )
    .unwrap();
    let (alone, tokenizer) = tiny("ministral3");
    assert_eq!(model.config.canonical(), alone.config.canonical());
    let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
    assert_golden_log_probs("ministral3", "mistral3", &policy(model).0, &pairs);
}

/// The fields of the language model in Qwen/Qwen2-VL-2B-Instruct's config.json.
fn qwen2_vl_text() -> Value {
    json!({
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 32_768,
        "tie_word_embeddings": true,
        "use_sliding_window": false,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 151_936,
    })
}

#[test]
fn the_text_of_a_qwen2_vl_is_read_nested_and_at_the_top_level() {
    for name in ["qwen2_vl", "qwen2_5_vl"] {
        let mut flat = qwen2_vl_text();
        flat["model_type"] = json!(name);
        flat["architectures"] = json!(["ForConditionalGeneration"]);
        flat["vision_config"] = json!({"model_type": name, "hidden_size": 1536});
        let config = read(&flat).unwrap();
        assert_eq!(config.parameter_count(), 1_543_714_304);
        assert_eq!(config.model_type(), name);
        assert_eq!(config.whole_json.as_ref(), Some(&flat));
        assert_eq!(config.eos_token_ids, [151_645]);
        // Alone it is a Qwen2, which transformers can load.
        assert_eq!(config.hf_json["model_type"], json!("qwen2"));
        assert_eq!(
            config.hf_json["rope_scaling"],
            json!({"type": "default"}),
            "{name}"
        );
        assert_eq!(config.spec.ropes, [RopeConfig::new(1_000_000.0)]);
        let alone = read(&config.hf_json).unwrap();
        assert_eq!(alone.canonical(), config.canonical());
        assert_eq!(alone.whole_json, None);

        let mut text = qwen2_vl_text();
        text["model_type"] = json!(format!("{name}_text"));
        let nested = json!({"model_type": name, "text_config": text, "vision_config": {}});
        assert_eq!(read(&nested).unwrap().canonical(), config.canonical());
        // transformers 5 stores the head's tie outside.
        let mut moved = nested.clone();
        moved["text_config"]["tie_word_embeddings"] = json!(false);
        moved["tie_word_embeddings"] = json!(true);
        assert_eq!(read(&moved).unwrap().canonical(), config.canonical());
        // The defaults are those of the config class.
        let defaults = read(&json!({"model_type": name, "text_config": {}})).unwrap();
        let spec = &defaults.spec;
        assert_eq!(
            (spec.hidden_size, spec.blocks.len(), spec.rms_norm_eps),
            (8192, 80, 1e-5)
        );
        assert_eq!(spec.ropes[0].theta, 1_000_000.0);
        let other = json!({"model_type": name, "text_config": {"model_type": "llama"}});
        let e = read(&other).unwrap_err().to_string();
        assert!(e.contains("text_config.model_type 'llama'"), "{e}");
    }
}

#[test]
fn the_text_of_a_qwen3_vl_is_read_as_transformers_reads_it() {
    // The fields of Qwen/Qwen3-VL-4B-Instruct's config.json that describe the model.
    let published = json!({
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151_655,
        "text_config": {
            "attention_bias": false,
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "max_position_embeddings": 262_144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "mrope_interleaved": true,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
            "rope_theta": 5_000_000,
            "tie_word_embeddings": true,
            "vocab_size": 151_936,
        },
        "tie_word_embeddings": true,
        "vision_config": {"model_type": "qwen3_vl"},
    });
    let config = read(&published).unwrap();
    assert_eq!(config.parameter_count(), 4_022_468_096);
    assert_eq!(config.spec.ropes, [RopeConfig::new(5_000_000.0)]);
    assert_eq!(config.hf_json["architectures"], json!(["Qwen3ForCausalLM"]));
    for block in &config.spec.blocks {
        let attention = block.attention();
        assert_eq!(
            (attention.qk_norm, attention.window),
            (QkNorm::PerHead, None)
        );
    }
    let defaults = read(&json!({"model_type": "qwen3_vl", "text_config": {}})).unwrap();
    assert_eq!(defaults.spec.ropes[0].theta, 500_000.0);
    assert_eq!(defaults.spec.hidden_size, 4096);
}

#[test]
fn other_models_are_refused_with_the_reason_and_what_is_supported() {
    for (name, reason) in [
        ("qwen3_moe", "mixture of experts"),
        ("mixtral", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
        ("deepseek_v3", "mixture of experts"),
        ("phimoe", "mixture of experts"),
        ("granitemoe", "mixture of experts"),
        ("olmoe", "mixture of experts"),
        ("qwen3_vl_moe", "mixture of experts"),
        ("qwen3_next", "only softmax attention"),
        ("falcon_h1", "only softmax attention"),
        ("jamba", "only softmax attention"),
        ("granitemoehybrid", "only softmax attention"),
        ("gemma3n", "for each layer"),
        ("gemma", "Gemma 2 and 3 are"),
        ("t5gemma", "encoder-decoder"),
        ("modernbert", "it is an encoder"),
        ("gpt2", "only these are implemented"),
        ("minicpm3", "latent attention"),
        ("idefics3", "models of text and images or sound"),
        ("unheard_of", "'unheard_of' (supported: llama, mistral"),
    ] {
        let e = read(&json!({"model_type": name})).unwrap_err().to_string();
        assert!(
            e.contains(&format!("architecture '{name}'")) && e.contains(reason),
            "{e}"
        );
        assert!(
            e.contains("glm4, smollm3") && e.contains("the text of gemma3, mistral3, qwen2_vl"),
            "{e}"
        );
    }
}
