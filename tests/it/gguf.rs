//! GGUF files that this test writes from the golden models as llama.cpp's converter would. Reading
//! one must give the same model.

use std::io::BufWriter;
use std::path::{Path, PathBuf};

use bradley::formats::export::save_companions;
use bradley::formats::loader::load_model;
use bradley::formats::tokenizer::ChatTokenizer;
use bradley::infer::scorer::score;
use candle_core::Tensor;
use candle_core::quantized::gguf_file::{Value, write};
use candle_core::quantized::{GgmlDType, QTensor};
use serde_json::json;

use crate::support::{MODELS, encode, golden, policy, relative, rows, tensors, tiny};

const SCORES: &str = "tokenizer.ggml.scores";

/// Returns Q and K rows in llama.cpp's order: per head, the two halves interleaved.
fn interleave(t: &Tensor, heads: usize) -> Tensor {
    let (rows, width) = t.dims2().unwrap();
    t.reshape((heads, 2, rows / heads / 2, width))
        .unwrap()
        .transpose(1, 2)
        .unwrap()
        .contiguous()
        .unwrap()
        .reshape((rows, width))
        .unwrap()
}

fn gguf_name(name: &str) -> String {
    let named = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    named
        .iter()
        .fold(name.to_owned(), |n, (from, to)| n.replace(from, to))
}

/// Returns the metadata of a golden model's tokenizer.
fn tokenizer_metadata(name: &str) -> Vec<(String, Value)> {
    let read = |file: &str| -> serde_json::Value {
        let path = golden(&format!("models/{name}/{file}"));
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    let (tokenizer, settings) = (read("tokenizer.json"), read("tokenizer_config.json"));
    let mut vocabulary: Vec<(String, u64)> = tokenizer["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(t, id)| (t.clone(), id.as_u64().unwrap()))
        .collect();
    vocabulary.sort_by_key(|(_, id)| *id);
    let special = |token: &str| {
        tokenizer["added_tokens"]
            .as_array()
            .unwrap()
            .iter()
            .any(|a| a["content"] == token)
    };
    let types = vocabulary
        .iter()
        .map(|(t, _)| Value::I32(if special(t) { 3 } else { 1 }))
        .collect();
    let merges = tokenizer["model"]["merges"].as_array().unwrap();
    let merges = merges
        .iter()
        .map(|m| {
            Value::String(format!(
                "{} {}",
                m[0].as_str().unwrap(),
                m[1].as_str().unwrap()
            ))
        })
        .collect();
    let id = |key: &str| {
        let token = settings[key].as_str().unwrap();
        Value::U32(vocabulary.iter().find(|(t, _)| t == token).unwrap().1 as u32)
    };
    let template =
        std::fs::read_to_string(golden(&format!("models/{name}/chat_template.jinja"))).unwrap();
    let tokens = vocabulary
        .iter()
        .map(|(t, _)| Value::String(t.clone()))
        .collect();
    vec![
        ("tokenizer.ggml.model".into(), Value::String("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Value::String("gpt-2".into())),
        ("tokenizer.ggml.tokens".into(), Value::Array(tokens)),
        ("tokenizer.ggml.token_type".into(), Value::Array(types)),
        ("tokenizer.ggml.merges".into(), Value::Array(merges)),
        ("tokenizer.ggml.bos_token_id".into(), id("bos_token")),
        ("tokenizer.ggml.eos_token_id".into(), id("eos_token")),
        (
            "tokenizer.ggml.add_bos_token".into(),
            Value::Bool(name == "mistral"),
        ),
        ("tokenizer.chat_template".into(), Value::String(template)),
    ]
}

/// Writes a golden model as GGUF, with the matrices whose rows are whole blocks in `dtype`.
fn convert(name: &str, out: &Path, dtype: GgmlDType) {
    convert_with(name, out, dtype, &[]);
}

/// Does the same with further tensors, under llama.cpp's names.
fn convert_with(name: &str, out: &Path, dtype: GgmlDType, more: &[(&str, Tensor)]) {
    convert_as(name, out, dtype, more, &[]);
}

/// Does the same with other metadata; keys that the converter writes too get these values.
fn convert_as(
    name: &str,
    out: &Path,
    dtype: GgmlDType,
    more: &[(&str, Tensor)],
    other: &[(&str, Value)],
) {
    let config: serde_json::Value = serde_json::from_slice(
        &std::fs::read(golden(&format!("models/{name}/config.json"))).unwrap(),
    )
    .unwrap();
    let architecture = if name == "mistral" { "llama" } else { name };
    let number = |k: &str| config[k].as_u64().unwrap() as u32;
    let heads = number("num_attention_heads") as usize;
    let head_dim = config["head_dim"]
        .as_u64()
        .map_or(number("hidden_size") / heads as u32, |d| d as u32);

    let key = |suffix: &str| format!("{architecture}.{suffix}");
    let mut metadata = vec![
        (
            "general.architecture".into(),
            Value::String(architecture.into()),
        ),
        ("general.name".into(), Value::String(format!("tiny {name}"))),
        (key("block_count"), Value::U32(number("num_hidden_layers"))),
        (
            key("context_length"),
            Value::U32(number("max_position_embeddings")),
        ),
        (key("embedding_length"), Value::U32(number("hidden_size"))),
        (
            key("feed_forward_length"),
            Value::U32(number("intermediate_size")),
        ),
        (key("attention.head_count"), Value::U32(heads as u32)),
        (
            key("attention.head_count_kv"),
            Value::U32(number("num_key_value_heads")),
        ),
        (key("attention.key_length"), Value::U32(head_dim)),
        (key("attention.value_length"), Value::U32(head_dim)),
        (key("rope.dimension_count"), Value::U32(head_dim)),
        (key("rope.freq_base"), Value::F32(10000.0)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(1e-6)),
    ];
    metadata.extend(tokenizer_metadata(name));
    if name == "mistral" {
        metadata.push((
            key("attention.sliding_window"),
            Value::U32(number("sliding_window")),
        ));
    }
    metadata.retain(|(key, _)| other.iter().all(|(name, _)| name != key));
    // A SentencePiece tokenizer has scores instead of merges.
    if other.iter().any(|(name, _)| *name == SCORES) {
        metadata.retain(|(key, _)| key != "tokenizer.ggml.merges");
    }
    metadata.extend(
        other
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone())),
    );
    let stored: Vec<(String, QTensor)> = tensors(&format!("models/{name}/model.safetensors"))
        .into_iter()
        .map(|(n, t)| {
            let t = match () {
                () if name == "mistral" && n.contains("q_proj") => interleave(&t, heads),
                () if name == "mistral" && n.contains("k_proj") => {
                    interleave(&t, number("num_key_value_heads") as usize)
                }
                () => t,
            };
            let kind = if t.rank() == 2 && t.dim(1).unwrap() % dtype.block_size() == 0 {
                dtype
            } else {
                GgmlDType::F32
            };
            (gguf_name(&n), QTensor::quantize(&t, kind).unwrap())
        })
        .collect();
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let more: Vec<(&str, QTensor)> = more
        .iter()
        .map(|(n, t)| (*n, QTensor::quantize(t, GgmlDType::F32).unwrap()))
        .collect();
    let more = more.iter().map(|(n, t)| (*n, t));
    let stored: Vec<(&str, &QTensor)> = stored
        .iter()
        .map(|(n, t)| (n.as_str(), t))
        .chain(more)
        .collect();
    write(
        &mut BufWriter::new(std::fs::File::create(out).unwrap()),
        &metadata,
        &stored,
    )
    .unwrap();
}

#[test]
fn a_converted_model_is_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    // Not Llama: GGUF stores only a part of its rope scaling (llama3), and the other numbers of the
    // tiny model are not those of the published ones.
    for name in MODELS.into_iter().filter(|n| *n != "llama") {
        let file = dir.path().join(format!("{name}.gguf"));
        convert(name, &file, GgmlDType::F32);
        let (model, tokenizer) =
            policy(load_model(None, file.to_str().unwrap(), &Default::default()).unwrap());
        let (original, its_tokenizer) = tiny(name);
        for f in ["pairs.jsonl", "plain.jsonl"] {
            let rows = rows(f);
            let pairs = encode(&rows, &tokenizer, 256);
            assert_eq!(pairs, encode(&rows, &its_tokenizer, 256), "{name}");
            for pair in &pairs {
                assert_eq!(
                    score(&model, &pair.groups()).unwrap(),
                    score(&original, &pair.groups()).unwrap(),
                    "{name}"
                );
            }
        }
    }
}

/// Writes the golden model in `folder` as llama.cpp's converter writes models of the architecture.
/// `own` has the family's metadata, by keys without the architecture's prefix. `factors` has
/// longrope's divisors, by the names of their tensors.
fn convert_family(
    folder: &Path,
    name: &str,
    architecture: &str,
    own: &[(&str, Value)],
    factors: &[(&str, Tensor)],
    out: &Path,
) {
    let text = std::fs::read(folder.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let text = config.get("text_config").unwrap_or(&config);
    let number = |field: &str| text[field].as_u64().unwrap() as u32;
    let key = |suffix: &str| format!("{architecture}.{suffix}");
    let (heads, kv_heads) = (number("num_attention_heads"), number("num_key_value_heads"));
    let mut metadata = vec![
        (
            "general.architecture".to_owned(),
            Value::String(architecture.into()),
        ),
        ("general.name".to_owned(), Value::String("tiny".into())),
        (
            key("attention.layer_norm_rms_epsilon"),
            Value::F32(text["rms_norm_eps"].as_f64().unwrap() as f32),
        ),
    ];
    for (suffix, field) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ] {
        metadata.push((key(suffix), Value::U32(number(field))));
    }
    if let Some(dim) = text["head_dim"].as_u64() {
        for suffix in ["attention.key_length", "attention.value_length"] {
            metadata.push((key(suffix), Value::U32(dim as u32)));
        }
    }
    metadata.extend(
        own.iter()
            .map(|(suffix, value)| (key(suffix), value.clone())),
    );
    metadata.extend(tokenizer_metadata(name));

    let norms: &[(&str, &str)] = match architecture {
        "gemma2" | "gemma3" | "olmo2" => &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ],
        "glm4" => &[
            ("post_self_attn_layernorm", "post_attention_norm"),
            ("post_mlp_layernorm", "post_ffw_norm"),
        ],
        _ => &[],
    };
    let others = [
        ("language_model.", ""),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("mlp.gate_up_proj", "ffn_up"),
    ];
    let other_parts = ["visual.", "vision_tower.", "multi_modal_projector."];
    let is_permuted = ["granite", "smollm3", "mistral3"].contains(&architecture);
    let permuted = |t: &Tensor, heads: u32| {
        let rows = t.dim(0).unwrap();
        let matrix = t.reshape((rows, t.elem_count() / rows)).unwrap();
        interleave(&matrix, heads as usize)
            .reshape(t.shape())
            .unwrap()
    };
    let weights =
        candle_core::safetensors::load(folder.join("model.safetensors"), &candle_core::Device::Cpu)
            .unwrap();
    let stored: Vec<(String, QTensor)> = weights
        .into_iter()
        .filter(|(name, _)| !other_parts.iter().any(|part| name.contains(part)))
        .map(|(name, t)| {
            let t = match () {
                () if is_permuted && name.contains("q_proj") => permuted(&t, heads),
                () if is_permuted && name.contains("k_proj") => permuted(&t, kv_heads),
                () if architecture.starts_with("gemma") && name.ends_with("norm.weight") => {
                    (t + 1.0).unwrap()
                }
                () => t,
            };
            let renamed = norms
                .iter()
                .chain(&others)
                .fold(name, |name, (from, to)| name.replace(from, to));
            (
                gguf_name(&renamed),
                QTensor::quantize(&t, GgmlDType::F32).unwrap(),
            )
        })
        .chain(factors.iter().map(|(name, t)| {
            (
                (*name).to_owned(),
                QTensor::quantize(t, GgmlDType::F32).unwrap(),
            )
        }))
        .collect();
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let stored: Vec<(&str, &QTensor)> = stored.iter().map(|(n, t)| (n.as_str(), t)).collect();
    write(
        &mut BufWriter::new(std::fs::File::create(out).unwrap()),
        &metadata,
        &stored,
    )
    .unwrap();
}

/// A golden model in two formats.
pub struct TwoFormats {
    /// Name of the golden model.
    pub name: &'static str,
    /// Folder with the files of transformers.
    pub folder: PathBuf,
    /// The same model as GGUF.
    pub gguf: PathBuf,
}

/// Writes to `dir`, in both formats, models of the further families that llama.cpp has. Settings
/// that GGUF cannot store are changed.
pub fn write_families(dir: &Path) -> Vec<TwoFormats> {
    type OwnMetadata = Vec<(&'static str, Value)>;
    let text = |value: &str| Value::String(value.into());
    let factor = |first: f64, step: f64| -> Tensor {
        let values: Vec<f32> = (0..12)
            .map(|i| (first + step * f64::from(i)) as f32)
            .collect();
        Tensor::new(values, &candle_core::Device::Cpu).unwrap()
    };
    let factors = [
        ("rope_factors_short.weight", factor(1.0, 0.05)),
        ("rope_factors_long.weight", factor(1.0, 0.4)),
    ];
    let attention_factor = (1.0 + (512.0_f64 / 50.0).ln() / 50.0_f64.ln()).sqrt() as f32;
    let window = |size| ("attention.sliding_window", Value::U32(size));
    let pattern = |slides: &[bool]| {
        let flags = slides.iter().map(|slides| Value::Bool(*slides)).collect();
        ("attention.sliding_window_pattern", Value::Array(flags))
    };
    let rotated = |dims| ("rope.dimension_count", Value::U32(dims));
    let theta = |theta| ("rope.freq_base", Value::F32(theta));
    let local_theta = |theta| ("rope.freq_base_swa", Value::F32(theta));
    let linear = |factor| {
        [
            ("rope.scaling.type", text("linear")),
            ("rope.scaling.factor", Value::F32(factor)),
        ]
    };
    let yarn = |factor, original| {
        [
            ("rope.scaling.type", text("yarn")),
            ("rope.scaling.factor", Value::F32(factor)),
            ("rope.scaling.original_context_length", Value::U32(original)),
        ]
    };
    let multipliers = |attention, embedding, residual, logits| {
        [
            ("attention.scale", Value::F32(attention)),
            ("embedding_scale", Value::F32(embedding)),
            ("residual_scale", Value::F32(residual)),
            ("logit_scale", Value::F32(logits)),
        ]
    };
    let caps = [
        ("attn_logit_softcapping", Value::F32(2.5)),
        ("final_logit_softcapping", Value::F32(4.0)),
    ];
    let longrope = [
        rotated(24),
        window(0),
        ("rope.scaling.type", text("longrope")),
        ("rope.scaling.attn_factor", Value::F32(attention_factor)),
        ("rope.scaling.original_context_length", Value::U32(50)),
    ];
    let temperature = [
        ("rope.scaling.yarn_log_multiplier", Value::F32(1.0)),
        ("attention.temperature_scale", Value::F32(0.3)),
        rotated(16),
    ];
    let cases: Vec<(&str, &str, OwnMetadata)> = vec![
        (
            "gemma2-64",
            "gemma2",
            [caps.to_vec(), vec![window(20)]].concat(),
        ),
        (
            "gemma3",
            "gemma3",
            [
                linear(4.0).to_vec(),
                vec![
                    window(16),
                    theta(1e4),
                    local_theta(100.0),
                    pattern(&[true, false]),
                ],
            ]
            .concat(),
        ),
        ("phi3", "phi3", vec![rotated(8), window(16)]),
        ("phi3-long", "phi3", longrope.to_vec()),
        ("glm4", "glm4", vec![rotated(4)]),
        (
            "glm4-64",
            "glm4",
            [linear(2.0).to_vec(), vec![rotated(16)]].concat(),
        ),
        ("smollm3", "smollm3", vec![rotated(8), theta(2e6)]),
        (
            "granite",
            "granite",
            multipliers(0.25, 3.0, 0.5, 2.0).to_vec(),
        ),
        (
            "granite-64",
            "granite",
            [
                linear(4.0).to_vec(),
                multipliers(0.015_625, 12.0, 0.22, 0.7).to_vec(),
            ]
            .concat(),
        ),
        ("olmo2", "olmo2", vec![theta(1e4)]),
        (
            "olmo3",
            "olmo2",
            vec![window(16), theta(5e5), pattern(&[true, true, true, false])],
        ),
        (
            "olmo3-64",
            "olmo2",
            [
                yarn(4.0, 32).to_vec(),
                vec![
                    window(20),
                    theta(1e4),
                    local_theta(100.0),
                    pattern(&[false, true]),
                ],
            ]
            .concat(),
        ),
        (
            "ministral3",
            "mistral3",
            [yarn(4.0, 16).to_vec(), temperature.to_vec()].concat(),
        ),
        ("mistral", "mistral3", vec![rotated(8), window(16)]),
        ("qwen2_vl", "qwen2vl", vec![theta(1e4)]),
        ("qwen2_5_vl", "qwen2vl", yarn(4.0, 32).to_vec()),
        ("qwen3_vl", "qwen3vl", vec![theta(1e4)]),
        (
            "gemma3-images",
            "gemma3",
            vec![
                window(16),
                theta(1e6),
                local_theta(1e4),
                pattern(&[true, false]),
            ],
        ),
        ("mistral3-images", "mistral3", vec![rotated(16)]),
    ];
    // GGUF has neither Gemma 3's factor on the scores, which llama.cpp computes from the sizes, nor
    // windows of Qwen.
    let not_in_gguf = [
        (
            "gemma3",
            "\"query_pre_attn_scalar\": 24",
            "\"query_pre_attn_scalar\": 16",
        ),
        (
            "gemma3-images",
            "\"query_pre_attn_scalar\": 256",
            "\"query_pre_attn_scalar\": 16",
        ),
        (
            "qwen2_vl",
            "\"use_sliding_window\": true",
            "\"use_sliding_window\": false",
        ),
        ("qwen2_vl", "\"sliding_attention\"", "\"full_attention\""),
    ];
    let write = |(name, architecture, own): (&'static str, &str, OwnMetadata)| {
        let (folder, file) = (dir.join(name), dir.join(format!("{name}.gguf")));
        std::fs::create_dir(&folder).unwrap();
        crate::support::copy_files(&golden(&format!("models/{name}")), &folder);
        for (_, stored, other) in not_in_gguf.iter().filter(|(model, ..)| *model == name) {
            crate::support::replace(folder.join("config.json"), stored, other);
        }
        let factors = if name == "phi3-long" {
            &factors[..]
        } else {
            &[]
        };
        convert_family(&folder, name, architecture, &own, factors, &file);
        TwoFormats {
            name,
            folder,
            gguf: file,
        }
    };
    cases.into_iter().map(write).collect()
}

#[test]
fn a_converted_model_of_each_family_is_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    for TwoFormats { name, folder, gguf } in write_families(dir.path()) {
        let load = |path: &Path| load_model(None, path.to_str().unwrap(), &Default::default());
        let (converted, original) = (load(&gguf).unwrap(), load(&folder).unwrap());
        assert_eq!(
            converted.config.canonical(),
            original.config.canonical(),
            "{name}"
        );
        let (converted, tokenizer) = policy(converted);
        let (original, its_tokenizer) = policy(original);
        let rows = rows("pairs.jsonl");
        let pairs = encode(&rows, &tokenizer, 256);
        assert_eq!(pairs, encode(&rows, &its_tokenizer, 256), "{name}");
        for pair in &pairs {
            let got = score(&converted, &pair.groups()).unwrap();
            let want = score(&original, &pair.groups()).unwrap();
            if name.starts_with("gemma") {
                // (w + 1) − 1 is rounded.
                for (got, want) in got.concat().iter().zip(want.concat()) {
                    let (got, want) = (f64::from(*got), f64::from(want));
                    crate::support::assert_close(name, got, want, 1e-5, 0.1);
                }
            } else {
                assert_eq!(got, want, "{name}");
            }
        }
    }
}

#[test]
fn files_of_other_architectures_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("other.gguf");
    let convert = |architecture: &str, own: &[(&str, Value)]| {
        convert_family(
            &golden("models/glm4"),
            "glm4",
            architecture,
            own,
            &[],
            &file,
        );
        load_model(None, file.to_str().unwrap(), &Default::default())
            .unwrap_err()
            .to_string()
    };
    for (architecture, reason) in [
        ("qwen3moe", "mixture of experts"),
        ("gemma3n", "for each layer"),
        ("falcon-h1", "softmax attention"),
        ("command-r", "RMSNorms"),
        ("unheard-of", "(supported: llama"),
    ] {
        let e = convert(architecture, &[]);
        let named = format!("'{architecture}'");
        assert!(
            e.contains(reason) && e.contains(&named) && e.contains("gemma3, phi3"),
            "{e}"
        );
    }
    let sections = Value::Array(vec![Value::I32(1); 4]);
    let e = convert("glm4", &[("rope.dimension_sections", sections)]);
    assert!(e.contains("order of rows"), "{e}");
    // A number of blocks that would not fit into memory.
    let e = error_of_too_many_blocks(&file);
    assert!(e.contains("block_count"), "{e}");
}

/// Returns the error of a file that claims to have very many blocks.
fn error_of_too_many_blocks(file: &Path) -> String {
    let own = [("attention.sliding_window", Value::U32(16))];
    let folder = tempfile::tempdir().unwrap();
    crate::support::copy_files(&golden("models/olmo3"), folder.path());
    crate::support::replace(
        folder.path().join("config.json"),
        "\"num_hidden_layers\": 4",
        "\"num_hidden_layers\": 4000000000",
    );
    convert_family(folder.path(), "olmo3", "olmo2", &own, &[], file);
    load_model(None, file.to_str().unwrap(), &Default::default())
        .unwrap_err()
        .to_string()
}

/// As in files of Llama 3, `eos_token_id` ends a text, and another token ends a turn. That token
/// is known from `eot_token_id`, or because the chat template prints it.
#[test]
fn the_end_of_a_turn_stops_generation_beside_the_end_of_a_text() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("turns.gguf");
    let (end_of_text, end_of_turn) = (0, 2);
    let (eos, eot) = (
        ("tokenizer.ggml.eos_token_id", Value::U32(end_of_text)),
        ("tokenizer.ggml.eot_token_id", Value::U32(end_of_turn)),
    );
    let plain = (
        "tokenizer.chat_template",
        Value::String("{{ messages[0]['content'] }}{{ eos_token }}".into()),
    );
    let both = vec![end_of_text, end_of_turn];
    let cases = [
        (vec![eos.clone()], both.clone()),
        (vec![eos.clone(), eot.clone()], both.clone()),
        (vec![eos.clone(), eot, plain.clone()], both),
        (vec![eos, plain], vec![end_of_text]),
    ];
    let (_, original) = tiny("qwen2");
    for (metadata, stops) in cases {
        convert_as("qwen2", &file, GgmlDType::F32, &[], &metadata);
        let model = load_model(None, file.to_str().unwrap(), &Default::default()).unwrap();
        assert_eq!(model.config.eos_token_ids, stops, "{metadata:?}");
        assert_eq!(model.tokenizer.end_ids(), stops, "{metadata:?}");
        // Same as in the Hugging Face tokenizer that the file was made from.
        assert_eq!(model.tokenizer.eos_id(), Some(end_of_text));
        let out = tempfile::tempdir().unwrap();
        save_companions(out.path(), &model.config, &model.tokenizer, |_| true).unwrap();
        let text = std::fs::read(out.path().join("generation_config.json")).unwrap();
        let saved: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let wanted = if stops.len() == 1 {
            json!(stops[0])
        } else {
            json!(stops)
        };
        assert_eq!(saved["eos_token_id"], wanted);
        // Dialogues end as the template ends them, independently of the tokenizer's eos_token.
        if metadata
            .iter()
            .all(|(key, _)| *key != "tokenizer.chat_template")
        {
            let rows = rows("pairs.jsonl");
            assert_eq!(
                encode(&rows, &model.tokenizer, 256),
                encode(&rows, &original, 256)
            );
        }
    }
}

/// The export has a tokenizer.json, which the GGUF file does not have.
#[test]
fn a_sentencepiece_tokenizer_has_the_same_tokens_after_the_export() {
    // Texts and types of SentencePiece's model files: unknown, control, byte, normal, unused.
    let mut pieces = vec![("<unk>".to_owned(), 2), ("<s>".to_owned(), 3)];
    pieces.push(("</s>".to_owned(), 3));
    pieces.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 6)));
    let learnt = pieces.len();
    pieces.extend(["ab", "▁ab", "▁", "a", "b"].map(|text| (text.to_owned(), 1)));
    // The fixture has 320 rows.
    pieces.extend((pieces.len()..320).map(|id| (format!("[PAD{id}]"), 5)));
    let texts = pieces.iter().map(|(text, _)| Value::String(text.clone()));
    let types = pieces.iter().map(|(_, kind)| Value::I32(*kind));
    let scores = (0..pieces.len()).map(|id| Value::F32(-(id.saturating_sub(learnt) as f32)));
    let metadata = [
        ("tokenizer.ggml.model", Value::String("llama".into())),
        ("tokenizer.ggml.pre", Value::String("default".into())),
        ("tokenizer.ggml.tokens", Value::Array(texts.collect())),
        ("tokenizer.ggml.token_type", Value::Array(types.collect())),
        (SCORES, Value::Array(scores.collect())),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
    ];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pieces.gguf");
    convert_as("mistral", &file, GgmlDType::F32, &[], &metadata);
    let model = load_model(None, file.to_str().unwrap(), &Default::default()).unwrap();
    save_companions(dir.path(), &model.config, &model.tokenizer, |_| true).unwrap();
    let exported = ChatTokenizer::from_folder(dir.path()).unwrap();
    assert!(exported.has_vocabulary_of(&model.tokenizer));
    assert_eq!(model.tokenizer.vocabulary_rows(), learnt + 5);
    let cases = [
        ("ab ab", vec![1, 260, 260]),
        ("ab</s>ab", vec![1, 260, 2, 260]),
        ("é", vec![1, 261, 3 + 0xc3, 3 + 0xa9]),
    ];
    for (text, ids) in cases {
        for tokenizer in [&model.tokenizer, &exported] {
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids);
            assert_eq!(
                tokenizer.decode(&ids[1..]).unwrap(),
                text.replace("</s>ab", "</s> ab")
            );
        }
    }
}

#[test]
fn quantised_models_stay_close() {
    let dir = tempfile::tempdir().unwrap();
    let (original, tokenizer) = tiny("qwen3");
    let pair = &encode(&rows("pairs.jsonl"), &tokenizer, 256)[1];
    let want: f32 = score(&original, &pair.groups()).unwrap()[0].iter().sum();
    let weights = original.parameters.named();
    // Log-probs alone would not show wrong weights: with zeros their sum is only a tenth larger.
    for (dtype, of_weights, of_log_probs) in [
        (GgmlDType::F16, 1e-3, 1e-2),
        (GgmlDType::BF16, 5e-3, 5e-2),
        (GgmlDType::Q8_0, 1e-2, 5e-2),
        (GgmlDType::Q5_1, 6e-2, 0.3),
        (GgmlDType::Q5_0, 6e-2, 0.3),
        (GgmlDType::Q4_1, 0.12, 0.5),
        (GgmlDType::Q4_0, 0.12, 0.5),
    ] {
        let file = dir.path().join("model.gguf");
        convert("qwen3", &file, dtype);
        let (model, _) =
            policy(load_model(None, file.to_str().unwrap(), &Default::default()).unwrap());
        let loaded = model.parameters.named();
        assert_eq!(loaded.len(), weights.len());
        for ((name, rounded), (_, exact)) in loaded.iter().zip(&weights) {
            let error = relative(rounded, exact);
            assert!(
                error < of_weights,
                "{dtype:?} {name}: relative error {error:e}"
            );
        }
        let got: f32 = score(&model, &pair.groups()).unwrap()[0].iter().sum();
        assert!(
            (got - want).abs() < of_log_probs * want.abs(),
            "{dtype:?}: {got} vs {want}"
        );
    }
}

#[test]
fn a_truncated_or_hostile_file_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("damaged.gguf");
    convert("qwen2", &file, GgmlDType::F32);
    let bytes = std::fs::read(&file).unwrap();
    let load = || load_model(None, file.to_str().unwrap(), &Default::default());
    for cut in [0, 3, 8, 20, 200, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..cut]).unwrap();
        let e = load().unwrap_err().to_string();
        assert!(e.contains("damaged.gguf"), "{cut}: {e}");
    }
    std::fs::copy(golden("models/llama/model.safetensors"), &file).unwrap();
    let e = load().unwrap_err().to_string();
    assert!(e.contains("name the folder with its config.json"), "{e}");
    // Inverts every byte of the counts and the first entries. Such a file may be refused or read,
    // but it must cause neither a panic nor an endless allocation.
    for at in 4..400 {
        let mut changed = bytes.clone();
        changed[at] ^= 0xff;
        std::fs::write(&file, &changed).unwrap();
        let _ = load();
    }
}

#[test]
fn divisors_of_rotary_frequencies_are_compared_with_the_head_that_the_file_claims() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiny.gguf");
    let error = |divisors: usize, head_dim: u64| {
        let ones = Tensor::ones(divisors, candle_core::DType::F32, &candle_core::Device::Cpu);
        let keys = [
            "llama.attention.key_length",
            "llama.attention.value_length",
            "llama.rope.dimension_count",
        ];
        let claims = keys.map(|key| (key, Value::U64(head_dim)));
        let more = [("rope_freqs.weight", ones.unwrap())];
        convert_as("llama", &file, GgmlDType::F32, &more, &claims);
        load_model(None, file.to_str().unwrap(), &Default::default())
            .unwrap_err()
            .to_string()
    };
    // The frequencies of the second head would not fit into memory.
    for (divisors, head_dim) in [(3, 16), (8, 1 << 40)] {
        let e = error(divisors, head_dim);
        assert!(
            e.contains("'rope_freqs.weight': the divisors are not those of Llama 3"),
            "{e}"
        );
    }
}

#[test]
fn tensors_that_the_metadata_does_not_call_for_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiny.gguf");
    let some = || Tensor::ones(64, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
    let load = |more: &[(&str, Tensor)]| {
        convert_with("llama", &file, GgmlDType::F32, more);
        load_model(None, file.to_str().unwrap(), &Default::default())
    };
    // The first block has no bias, so the others are expected to have none.
    let e = load(&[("blk.1.attn_q.bias", some()), ("blk.2.attn_q.bias", some())])
        .unwrap_err()
        .to_string();
    assert!(
        e.contains("'blk.1.attn_q.bias' (and 1 others)") && e.contains(file.to_str().unwrap()),
        "{e}"
    );
    let e = load(&[("blk.7.attn_norm.weight", some())])
        .unwrap_err()
        .to_string();
    assert!(
        e.contains("'blk.7.attn_norm.weight' belongs to a decoder layer"),
        "{e}"
    );
    load(&[("blk.0.attn_rot_embd", some()), ("something.else", some())]).unwrap();
}
