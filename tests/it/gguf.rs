//! GGUF files, which these tests write from the golden models as llama.cpp's converter would:
//! reading one must give the same model. Also damaged files.

use std::io::BufWriter;
use std::path::Path;

use bradley::formats::export::save_companions;
use bradley::formats::loader::load_model;
use bradley::formats::tokenizer::ChatTokenizer;
use bradley::infer::scorer::score;
use candle_core::Tensor;
use candle_core::quantized::gguf_file::{Value, write};
use candle_core::quantized::{GgmlDType, QTensor};
use serde_json::json;

use crate::support::{MODELS, encode, golden, policy, rows, tensors, tiny};

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

/// Returns llama.cpp's name of a tensor.
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

/// Writes a golden model as GGUF, with the matrices whose rows are whole blocks in `dtype`.
fn convert(name: &str, out: &Path, dtype: GgmlDType) {
    convert_with(name, out, dtype, &[]);
}

/// Does the same, and adds the tensors in `more` under llama.cpp's names.
fn convert_with(name: &str, out: &Path, dtype: GgmlDType, more: &[(&str, Tensor)]) {
    convert_as(name, out, dtype, more, &[]);
}

/// Does the same, and adds the metadata in `other`, which replaces the converter's values.
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
    let tokenizer: serde_json::Value = serde_json::from_slice(
        &std::fs::read(golden(&format!("models/{name}/tokenizer.json"))).unwrap(),
    )
    .unwrap();
    let settings: serde_json::Value = serde_json::from_slice(
        &std::fs::read(golden(&format!("models/{name}/tokenizer_config.json"))).unwrap(),
    )
    .unwrap();
    let architecture = if name == "mistral" { "llama" } else { name };
    let number = |k: &str| config[k].as_u64().unwrap() as u32;
    let heads = number("num_attention_heads") as usize;
    let head_dim = config["head_dim"]
        .as_u64()
        .map_or(number("hidden_size") / heads as u32, |d| d as u32);

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
        ("tokenizer.ggml.model".into(), Value::String("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Value::String("gpt-2".into())),
        (
            "tokenizer.ggml.tokens".into(),
            Value::Array(
                vocabulary
                    .iter()
                    .map(|(t, _)| Value::String(t.clone()))
                    .collect(),
            ),
        ),
        ("tokenizer.ggml.token_type".into(), Value::Array(types)),
        ("tokenizer.ggml.merges".into(), Value::Array(merges)),
        ("tokenizer.ggml.bos_token_id".into(), id("bos_token")),
        ("tokenizer.ggml.eos_token_id".into(), id("eos_token")),
        (
            "tokenizer.ggml.add_bos_token".into(),
            Value::Bool(name == "mistral"),
        ),
        ("tokenizer.chat_template".into(), Value::String(template)),
    ];
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
    for name in MODELS.into_iter().filter(|n| *n != "llama") {
        let file = dir.path().join(format!("{name}.gguf"));
        convert(name, &file, GgmlDType::F32);
        let (model, tokenizer) =
            policy(load_model(None, file.to_str().unwrap(), &Default::default()).unwrap());
        let (original, original_tokenizer) = tiny(name);
        for f in ["pairs.jsonl", "plain.jsonl"] {
            let rows = rows(f);
            let pairs = encode(&rows, &tokenizer, 256);
            assert_eq!(pairs, encode(&rows, &original_tokenizer, 256), "{name}");
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

/// In these files `eos_token_id` ends a text and another token ends a turn, as in files of Llama 3.
#[test]
fn the_tokens_that_end_a_text_and_a_turn_both_stop_generation() {
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
fn log_probs_of_quantised_models_are_near_those_of_f32() {
    let dir = tempfile::tempdir().unwrap();
    let (original, tokenizer) = tiny("qwen3");
    let pair = &encode(&rows("pairs.jsonl"), &tokenizer, 256)[1];
    let want: f32 = score(&original, &pair.groups()).unwrap()[0].iter().sum();
    for (dtype, tolerance) in [
        (GgmlDType::F16, 1e-2),
        (GgmlDType::BF16, 5e-2),
        (GgmlDType::Q8_0, 5e-2),
        (GgmlDType::Q5_1, 0.3),
        (GgmlDType::Q5_0, 0.3),
        (GgmlDType::Q4_1, 0.5),
        (GgmlDType::Q4_0, 0.5),
    ] {
        let file = dir.path().join("model.gguf");
        convert("qwen3", &file, dtype);
        let (model, _) =
            policy(load_model(None, file.to_str().unwrap(), &Default::default()).unwrap());
        let got: f32 = score(&model, &pair.groups()).unwrap()[0].iter().sum();
        assert!(
            (got - want).abs() < tolerance * want.abs(),
            "{dtype:?}: {got} vs {want}"
        );
    }
}

#[test]
fn a_truncated_file_is_an_error_that_names_it_and_a_damaged_one_no_panic() {
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
    // Inverts each byte of the counts and of the first entries. Some of these files can be loaded;
    // none may cause a panic.
    for at in 4..400 {
        let mut changed = bytes.clone();
        changed[at] ^= 0xff;
        std::fs::write(&file, &changed).unwrap();
        let _ = load();
    }
}

#[test]
fn tensors_that_the_metadata_does_not_call_for_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiny.gguf");
    let tensor = || Tensor::ones(64, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
    let load = |more: &[(&str, Tensor)]| {
        convert_with("llama", &file, GgmlDType::F32, more);
        load_model(None, file.to_str().unwrap(), &Default::default())
    };
    // The first block has no bias, so the others are expected to have none.
    let e = load(&[
        ("blk.1.attn_q.bias", tensor()),
        ("blk.2.attn_q.bias", tensor()),
    ])
    .unwrap_err()
    .to_string();
    assert!(
        e.contains("'blk.1.attn_q.bias' (and 1 others)") && e.contains(file.to_str().unwrap()),
        "{e}"
    );
    let e = load(&[("blk.7.attn_norm.weight", tensor())])
        .unwrap_err()
        .to_string();
    assert!(
        e.contains("'blk.7.attn_norm.weight' belongs to a decoder layer"),
        "{e}"
    );
    load(&[
        ("blk.0.attn_rot_embd", tensor()),
        ("something.else", tensor()),
    ])
    .unwrap();
}
