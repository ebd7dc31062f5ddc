//! Compares log-probs with those of candle-transformers: a second implementation of each family, on
//! the same tiny weights, in f32 on the CPU.
//!
//! candle-transformers computes some models otherwise than transformers. Each such deviation has a
//! correction: a change of candle's weights or config.json that makes candle compute what
//! transformers does, or, where there is none, a change of Bradley's config.json that makes Bradley
//! compute what candle does. With all corrections the log-probs agree. Without any one of them they
//! do not, so that a version of candle without the deviation is noticed.
//!
//! Lines of source are those of candle-transformers 0.11.1. docs/decisions/038 has the list.

use std::collections::HashMap;
use std::panic::catch_unwind;

use bradley::formats::loader::load_model;
use bradley::formats::source::HubOptions;
use bradley::infer::pair::SequenceGroup;
use bradley::infer::scorer::score;
use bradley::model::decoder::Policy;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::smol::smollm3;
use candle_transformers::models::{
    gemma2, gemma3, glm4_new, granite, llama, mistral, olmo2, phi3, qwen2, qwen3, qwen3_vl,
};
use serde_json::{Value, json};

use crate::support::{copy_files, golden, json, policy, tensors};

/// Computes the logits of the last position from token ids of shape `[1, T]`.
type Oracle = Box<dyn FnMut(&Tensor) -> Result<Tensor>>;
/// Makes the model from a config.json in candle's terms and the weights.
type MakeOracle = fn(Value, VarBuilder<'static>) -> Oracle;
/// Changes the files that one of the two implementations gets.
type Correction = fn(&mut Inputs);

/// Makes the constructor of one of candle's models. Most have the same functions. Some take flags
/// before the configuration (Gemma: `use_flash_attn`).
macro_rules! oracle {
    ($family:ident :: $model:ident $(, $flag:expr)*) => {
        |config: Value, weights: VarBuilder<'static>| -> Oracle {
            let config: $family::Config = serde_json::from_value(config).unwrap();
            let mut model = $family::$model::new($($flag,)* &config, weights).unwrap();
            Box::new(move |tokens: &Tensor| {
                model.clear_kv_cache();
                model.forward(tokens, 0)
            })
        }
    };
}

/// Lengths of the sequences: around the fixtures' windows of 16 and 20 tokens, and longer than a
/// block of 64 queries.
const LENGTHS: [u32; 9] = [1, 2, 7, 16, 17, 20, 21, 40, 100];

/// A tiny model, one of candle's models that computes it, and the deviations of that model.
struct Case {
    /// Folder in tests/goldens/models.
    fixture: &'static str,
    make: MakeOracle,
    /// Each with its place in candle's source.
    corrections: Vec<(&'static str, Correction)>,
    /// Lengths of the prompts, to each of which one token is added.
    lengths: &'static [u32],
}

impl Case {
    fn new(fixture: &'static str, make: MakeOracle) -> Self {
        Case {
            fixture,
            make,
            corrections: Vec::new(),
            lengths: &LENGTHS,
        }
    }

    /// Adds a deviation by its place in candle's source, and its correction.
    fn but(mut self, source: &'static str, correction: Correction) -> Self {
        self.corrections.push((source, correction));
        self
    }

    fn of_lengths(mut self, lengths: &'static [u32]) -> Self {
        self.lengths = lengths;
        self
    }
}

/// Returns the fixtures that are compared, each with the model of candle that computes it.
fn cases() -> Vec<Case> {
    let longrope = || {
        Case::new("phi3-long", oracle!(phi3::Model))
            .but("models/phi3.rs:100,119", multiply_frequencies)
            .but("models/phi3.rs:135", scale_rotated_rows)
    };
    vec![
        Case::new("llama", llama_oracle),
        Case::new("llama-ref", llama_oracle),
        Case::new("mistral", oracle!(mistral::Model)).but("models/mistral.rs:406", narrow_window),
        Case::new("mistral-ref", oracle!(mistral::Model))
            .but("models/mistral.rs:406", narrow_window),
        Case::new("ministral", oracle!(mistral::Model)).but("models/mistral.rs:406", narrow_window),
        // One mask for all layers.
        Case::new("ministral-64", oracle!(mistral::Model))
            .but("models/mistral.rs:406", narrow_window)
            .but("models/mistral.rs:438", window_on_all_layers),
        Case::new("qwen2", oracle!(qwen2::ModelForCausalLM)),
        Case::new("qwen2-ref", oracle!(qwen2::ModelForCausalLM)),
        // `use_sliding_window` and `max_window_layers` are read, but not applied.
        Case::new("qwen2_vl", oracle!(qwen2::ModelForCausalLM))
            .but("models/qwen2.rs:307", narrow_window)
            .but("models/qwen2.rs:358", window_on_all_layers),
        Case::new("qwen2_5_vl", oracle!(qwen2::ModelForCausalLM))
            .but("models/qwen2.rs:50", without_rope_scaling),
        Case::new("qwen3", oracle!(qwen3::ModelForCausalLM)),
        Case::new("qwen3-ref", oracle!(qwen3::ModelForCausalLM)),
        Case::new("qwen3_vl", oracle!(qwen3::ModelForCausalLM)),
        Case::new("qwen3_vl", qwen3_vl_oracle),
        Case::new("qwen3_vl-64", oracle!(qwen3::ModelForCausalLM))
            .but("models/qwen3.rs:45", without_rope_scaling),
        Case::new("gemma2", oracle!(gemma2::Model, false))
            .but("models/gemma2.rs:240", scale_queries)
            .but("models/gemma2.rs:405", narrow_window)
            .but("models/gemma2.rs:435", window_on_all_layers),
        Case::new("gemma2-64", oracle!(gemma2::Model, false))
            .but("models/gemma2.rs:378", tie_embeddings)
            .but("models/gemma2.rs:405", narrow_window)
            .but("models/gemma2.rs:435", window_on_all_layers),
        Case::new("gemma3", gemma3_oracle)
            .but("models/gemma3.rs:263", scale_normed_queries)
            .but("models/gemma3.rs:84", without_rope_scaling),
        Case::new("phi3", oracle!(phi3::Model)).but("models/phi3.rs:393", without_window),
        longrope().of_lengths(&[1, 2, 7, 16, 17, 40, 49]),
        // candle chooses the factors by the position, transformers by the length of the sequence.
        longrope()
            .but("models/phi3.rs:128", long_factors_everywhere)
            .of_lengths(&[50, 51, 100]),
        Case::new("glm4", oracle!(glm4_new::ModelForCausalLM)),
        Case::new("glm4-64", oracle!(glm4_new::ModelForCausalLM))
            .but("models/glm4_new.rs:48", without_rope_scaling),
        Case::new("smollm3", oracle!(smollm3::ModelForCausalLM)),
        Case::new("granite", granite_oracle)
            .but("models/granite.rs:436", multiply_embeddings)
            .but("models/granite.rs:295", multiply_scores)
            .but("models/granite.rs:399,401", multiply_outputs)
            .but("models/granite.rs:442", divide_logits),
        Case::new("olmo2", oracle!(olmo2::Model)),
        // OLMo 3 is OLMo 2 with windows.
        Case::new("olmo3", oracle!(olmo2::Model)).but("models/olmo2.rs:311", window_on_no_layer),
    ]
}

/// candle's Llama has its cache apart.
fn llama_oracle(config: Value, weights: VarBuilder<'static>) -> Oracle {
    let config: llama::LlamaConfig = serde_json::from_value(config).unwrap();
    let config = config.into_config(false);
    let model = llama::Llama::load(weights, &config).unwrap();
    Box::new(move |tokens: &Tensor| {
        let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
        model.forward(tokens, 0, &mut cache)
    })
}

/// candle's Granite has its cache apart.
fn granite_oracle(config: Value, weights: VarBuilder<'static>) -> Oracle {
    let config: granite::GraniteConfig = serde_json::from_value(config).unwrap();
    let config = config.into_config(false);
    let model = granite::Granite::load(weights, &config).unwrap();
    Box::new(move |tokens: &Tensor| {
        let mut cache = granite::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
        model.forward(tokens, 0, &mut cache)
    })
}

/// Gives candle's Gemma 3 one token at a time, because it cannot take several: it stores values in
/// its cache that are not contiguous (models/gemma3.rs:247), which fails if there is more than one
/// key head. One token needs no mask, and candle's cache then has the keys of the window exactly.
fn gemma3_oracle(config: Value, weights: VarBuilder<'static>) -> Oracle {
    let config: gemma3::Config = serde_json::from_value(config).unwrap();
    let mut model = gemma3::Model::new(false, &config, weights).unwrap();
    Box::new(move |tokens: &Tensor| {
        model.clear_kv_cache();
        let last = tokens.dim(1)? - 1;
        for position in 0..last {
            model.forward(&tokens.narrow(1, position, 1)?, position)?;
        }
        model.forward(&tokens.narrow(1, last, 1)?, last)
    })
}

/// Makes candle's Qwen3-VL from the config.json of its language model and from all weights.
fn qwen3_vl_model(config: &Value, weights: VarBuilder<'static>) -> qwen3_vl::Qwen3VLModel {
    let whole = json!({
        "text_config": config,
        "vision_config": config["vision_config"],
        "image_token_id": 0,
        "video_token_id": 0,
        "vision_start_token_id": 0,
        "vision_end_token_id": 0,
    });
    let whole: qwen3_vl::Config = serde_json::from_value(whole).unwrap();
    let weights =
        weights.rename_f(|name: &str| name.replacen("model.language_model.", "model.", 1));
    qwen3_vl::Qwen3VLModel::new(&whole, weights).unwrap()
}

/// Returns the logits of the last of these tokens, which follow `before` tokens in the cache.
fn qwen3_vl_logits(
    model: &qwen3_vl::Qwen3VLModel,
    tokens: &Tensor,
    before: usize,
) -> Result<Tensor> {
    let lengths = vec![tokens.dim(1)?];
    let no_images = || vec![Vec::new()];
    model.forward(
        tokens,
        None,
        None,
        None,
        None,
        lengths,
        no_images(),
        no_images(),
        &[before],
    )
}

/// Gives candle's Qwen3-VL one token at a time, because it masks nothing where there are several
/// (models/qwen3_vl/mod.rs:70: the condition is the wrong way round). Nothing clears its cache, so
/// each sequence has a model of its own.
fn qwen3_vl_oracle(config: Value, weights: VarBuilder<'static>) -> Oracle {
    Box::new(move |tokens: &Tensor| {
        let model = qwen3_vl_model(&config, weights.clone());
        let last = tokens.dim(1)? - 1;
        for position in 0..last {
            qwen3_vl_logits(&model, &tokens.narrow(1, position, 1)?, position)?;
        }
        qwen3_vl_logits(&model, &tokens.narrow(1, last, 1)?, last)
    })
}

/// The files of a model.
struct Files {
    config: Value,
    weights: HashMap<String, Tensor>,
}

/// One model as each of the two implementations gets it.
struct Inputs {
    bradley: Files,
    candle: Files,
}

impl Inputs {
    fn new(fixture: &str) -> Self {
        let config = json(&format!("models/{fixture}/config.json"));
        let weights = tensors(&format!("models/{fixture}/model.safetensors"));
        Inputs {
            candle: Files {
                config: candle_config(&config),
                weights: candle_weights(&config, &weights),
            },
            bradley: Files { config, weights },
        }
    }

    /// Returns a number of candle's config.json.
    fn number(&self, field: &str) -> f64 {
        self.candle.config[field]
            .as_f64()
            .unwrap_or_else(|| panic!("{field} is no number"))
    }

    /// Returns the language model's part of Bradley's config.json.
    fn bradley_text(&mut self) -> &mut Value {
        let config = &mut self.bradley.config;
        if config.get("text_config").is_some() {
            &mut config["text_config"]
        } else {
            config
        }
    }

    /// Multiplies candle's tensors whose names end in `suffix`.
    fn multiply(&mut self, suffix: &str, factor: f64) {
        for (name, tensor) in &mut self.candle.weights {
            if name.ends_with(suffix) {
                *tensor = tensor.affine(factor, 0.0).unwrap();
            }
        }
    }
}

/// Returns the config.json of the language model as candle reads it: with the fields of
/// transformers 4.
fn candle_config(whole: &Value) -> Value {
    let mut config = whole.get("text_config").unwrap_or(whole).clone();
    config["tie_word_embeddings"] = whole["tie_word_embeddings"].clone();
    config["vision_config"] = whole["vision_config"].clone();

    let parameters = config["rope_parameters"].clone();
    let rope = parameters.get("full_attention").unwrap_or(&parameters);
    config["rope_theta"] = rope["rope_theta"].clone();
    if let Some(local) = parameters.get("sliding_attention") {
        config["rope_local_base_freq"] = local["rope_theta"].clone();
    }
    if rope["partial_rotary_factor"]
        .as_f64()
        .is_some_and(|f| f != 1.0)
    {
        config["partial_rotary_factor"] = rope["partial_rotary_factor"].clone();
    }
    // candle knows no other context extension.
    if matches!(rope["rope_type"].as_str(), Some("llama3" | "longrope")) {
        let mut scaling = rope.clone();
        scaling["type"] = rope["rope_type"].clone();
        config["rope_scaling"] = scaling;
    }

    // candle's Qwen2 needs a number even where there is no window.
    if config["sliding_window"].is_null() {
        config["sliding_window"] = config["max_position_embeddings"].clone();
    }
    let full = config["layer_types"].as_array().and_then(|types| {
        types
            .iter()
            .position(|kind| kind.as_str() == Some("full_attention"))
    });
    if let Some(full) = full {
        config["sliding_window_pattern"] = json!(full + 1);
    }
    // candle's Qwen3 needs these fields.
    for (field, value) in [
        ("max_window_layers", json!(28)),
        ("use_sliding_window", json!(false)),
    ] {
        if config.get(field).is_none() {
            config[field] = value;
        }
    }
    config
}

/// Returns the weights by the names that candle expects. Its Mistral and its Granite read the head
/// even if it is tied to the embeddings (models/mistral.rs:385, models/granite.rs:448), and its
/// Qwen3-VL reads a bias of the head (models/qwen3_vl/text.rs:285).
fn candle_weights(whole: &Value, weights: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let rename = |(name, tensor): (&String, &Tensor)| {
        (
            name.replacen("model.language_model.", "model.", 1),
            tensor.clone(),
        )
    };
    let mut renamed: HashMap<String, Tensor> = weights.iter().map(rename).collect();
    if whole["tie_word_embeddings"].as_bool() == Some(true) {
        let embeddings = renamed["model.embed_tokens.weight"].clone();
        renamed.insert("lm_head.weight".to_owned(), embeddings);
    }
    let vocabulary = renamed["lm_head.weight"].dim(0).unwrap();
    let bias = Tensor::zeros(vocabulary, DType::F32, &Device::Cpu).unwrap();
    renamed.insert("lm_head.bias".to_owned(), bias);
    renamed
}

/// Makes candle's window count the query's own position, as in transformers: candle masks the keys
/// at `j + window < i`.
fn narrow_window(inputs: &mut Inputs) {
    let window = inputs.number("sliding_window") as u64;
    inputs.candle.config["sliding_window"] = json!(window - 1);
}

fn set_layer_types(inputs: &mut Inputs, kind: &str) {
    let text = inputs.bradley_text();
    let layers = text["num_hidden_layers"].as_u64().unwrap() as usize;
    text["layer_types"] = json!(vec![kind; layers]);
}

/// Gives all of Bradley's layers the window, as candle does.
fn window_on_all_layers(inputs: &mut Inputs) {
    set_layer_types(inputs, "sliding_attention");
}

/// Takes the window from Bradley's layers, because candle's model has none.
fn window_on_no_layer(inputs: &mut Inputs) {
    set_layer_types(inputs, "full_attention");
}

/// Takes the window from Bradley's model, because candle's model has none.
fn without_window(inputs: &mut Inputs) {
    inputs.bradley.config["sliding_window"] = Value::Null;
}

/// Takes the context extension (linear or yarn) from Bradley's model, because candle ignores it.
fn without_rope_scaling(inputs: &mut Inputs) {
    let parameters = &mut inputs.bradley_text()["rope_parameters"];
    let rope = if parameters.get("full_attention").is_some() {
        &mut parameters["full_attention"]
    } else {
        parameters
    };
    rope["rope_type"] = json!("default");
}

/// Makes Bradley's head the embeddings, because candle's is always tied to them.
fn tie_embeddings(inputs: &mut Inputs) {
    inputs.bradley.config["tie_word_embeddings"] = json!(true);
    inputs.bradley.weights.remove("lm_head.weight").unwrap();
}

/// Returns √(head_dim / query_pre_attn_scalar): candle's Gemma divides the scores by √head_dim.
fn query_factor(inputs: &Inputs) -> f64 {
    (inputs.number("head_dim") / inputs.number("query_pre_attn_scalar")).sqrt()
}

fn scale_queries(inputs: &mut Inputs) {
    let factor = query_factor(inputs);
    inputs.multiply("q_proj.weight", factor);
}

/// Multiplies the factors 1 + w of the norm of the queries.
fn scale_normed_queries(inputs: &mut Inputs) {
    let factor = query_factor(inputs);
    for (name, tensor) in &mut inputs.candle.weights {
        if name.ends_with("q_norm.weight") {
            *tensor = tensor.affine(factor, factor - 1.0).unwrap();
        }
    }
}

/// Inverts the factors of longrope: candle multiplies frequencies by them, and transformers
/// divides.
fn multiply_frequencies(inputs: &mut Inputs) {
    let scaling = &mut inputs.candle.config["rope_scaling"];
    for list in ["short_factor", "long_factor"] {
        for factor in scaling[list].as_array_mut().unwrap() {
            let inverse = 1.0 / factor.as_f64().unwrap();
            *factor = json!(inverse);
        }
    }
}

/// Makes candle use the factors of long sequences at every position.
fn long_factors_everywhere(inputs: &mut Inputs) {
    let scaling = &mut inputs.candle.config["rope_scaling"];
    let long = scaling["long_factor"].clone();
    scaling["short_factor"] = long;
}

/// Multiplies what is rotated of queries and keys by longrope's factor on cos and sin, which candle
/// does not have: √(1 + ln(context / original) / ln(original)), arXiv:2402.13753.
fn scale_rotated_rows(inputs: &mut Inputs) {
    let original = inputs.number("original_max_position_embeddings");
    let ratio = inputs.number("max_position_embeddings") / original;
    let factor = (1.0 + ratio.ln() / original.ln()).sqrt() as f32;
    let query_heads = inputs.number("num_attention_heads");
    let heads = (query_heads + inputs.number("num_key_value_heads")) as usize;
    let head_dim = (inputs.number("hidden_size") / query_heads) as usize;
    let rotated = (inputs.number("partial_rotary_factor") * head_dim as f64) as usize;
    for (name, tensor) in &mut inputs.candle.weights {
        if !name.ends_with("qkv_proj.weight") {
            continue;
        }
        let rows = tensor.dim(0).unwrap();
        let factors: Vec<f32> = (0..rows)
            .map(|row| {
                let is_rotated = row < heads * head_dim && row % head_dim < rotated;
                if is_rotated { factor } else { 1.0 }
            })
            .collect();
        let factors = Tensor::from_vec(factors, (rows, 1), &Device::Cpu).unwrap();
        *tensor = tensor.broadcast_mul(&factors).unwrap();
    }
}

/// Multiplies candle's embeddings by `embedding_multiplier`, which its Granite ignores.
fn multiply_embeddings(inputs: &mut Inputs) {
    let factor = inputs.number("embedding_multiplier");
    inputs.multiply("embed_tokens.weight", factor);
}

/// Multiplies candle's scores by `attention_multiplier` in place of 1 / √head_dim.
fn multiply_scores(inputs: &mut Inputs) {
    let head_dim = inputs.number("hidden_size") / inputs.number("num_attention_heads");
    let factor = inputs.number("attention_multiplier") * head_dim.sqrt();
    inputs.multiply("q_proj.weight", factor);
}

/// Multiplies the outputs of candle's attention and MLP by `residual_multiplier`.
fn multiply_outputs(inputs: &mut Inputs) {
    let factor = inputs.number("residual_multiplier");
    inputs.multiply("o_proj.weight", factor);
    inputs.multiply("down_proj.weight", factor);
}

/// Divides candle's logits by `logits_scaling`.
fn divide_logits(inputs: &mut Inputs) {
    let factor = 1.0 / inputs.number("logits_scaling");
    inputs.multiply("lm_head.weight", factor);
}

/// Loads Bradley's model from a copy of the fixture with these files.
fn bradley_model(fixture: &str, files: &Files) -> Policy {
    let folder = tempfile::tempdir().unwrap();
    copy_files(&golden(&format!("models/{fixture}")), folder.path());
    std::fs::write(folder.path().join("config.json"), files.config.to_string()).unwrap();
    candle_core::safetensors::save(&files.weights, folder.path().join("model.safetensors"))
        .unwrap();
    let path = folder.path().to_str().unwrap();
    policy(load_model(None, path, &HubOptions::default()).unwrap()).0
}

/// Makes candle's model.
fn candle_model(make: MakeOracle, files: Files) -> Oracle {
    let weights = VarBuilder::from_tensors(files.weights, DType::F32, &Device::Cpu);
    make(files.config, weights)
}

/// Returns token ids as a tensor of shape `[1, T]`.
fn one_row(tokens: &[u32]) -> Tensor {
    Tensor::new(tokens, &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap()
}

/// Returns the largest difference between log-probs of the next token in the two implementations.
/// The unit is 1e-4 of the log-prob plus 1e-5. Makes the corrections except number `left_out`.
fn largest_difference(case: &Case, left_out: Option<usize>) -> f64 {
    let mut inputs = Inputs::new(case.fixture);
    for (i, (_, correct)) in case.corrections.iter().enumerate() {
        if left_out != Some(i) {
            correct(&mut inputs);
        }
    }
    let vocabulary = inputs.number("vocab_size") as u32;
    let model = bradley_model(case.fixture, &inputs.bradley);
    let mut oracle = candle_model(case.make, inputs.candle);

    let mut largest = 0f64;
    for length in case.lengths {
        let prompt: Vec<u32> = (0..*length)
            .map(|i| (31 * i * i + 7 * i + length) % vocabulary)
            .collect();
        let logits = oracle(&one_row(&prompt)).unwrap();
        let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(logits.len(), vocabulary as usize, "{}", case.fixture);
        let total: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();

        let next: Vec<u32> = (0..vocabulary).step_by(7).collect();
        let group = SequenceGroup {
            prompt,
            completions: next.iter().map(|token| vec![*token]).collect(),
        };
        let got = score(&model, &[group]).unwrap();
        assert_eq!(got.len(), next.len());
        for (token, got) in next.iter().zip(got) {
            let want = f64::from(logits[*token as usize]) - total.ln();
            let difference = (f64::from(got[0]) - want).abs() / (1e-5 + 1e-4 * want.abs());
            assert!(
                difference.is_finite(),
                "{}, {length} tokens, then {token}: {} and {want}",
                case.fixture,
                got[0]
            );
            largest = largest.max(difference);
        }
    }
    largest
}

/// Each log-prob of the next token differs by at most 1e-4 of its value plus 1e-5.
#[test]
fn next_tokens_have_the_log_probs_of_candle_transformers() {
    for case in cases() {
        let difference = largest_difference(&case, None);
        assert!(
            difference <= 1.0,
            "{}: {difference} times the tolerance",
            case.fixture
        );
    }
}

/// A correction that changes nothing would hide that the deviation is gone, or is another one.
#[test]
fn candle_transformers_deviates_in_each_place_that_is_corrected() {
    for case in cases() {
        for (i, (source, _)) in case.corrections.iter().enumerate() {
            let difference = largest_difference(&case, Some(i));
            assert!(
                difference > 10.0,
                "{}: without the correction of {source}, only {difference} times the tolerance",
                case.fixture
            );
        }
    }
}

/// Fixtures that candle's models cannot compute, each with a part of the message.
#[test]
fn candle_transformers_refuses_what_it_cannot_compute() {
    let refused: [(&str, MakeOracle, &str); 4] = [
        // The width of a head is hidden_size / num_attention_heads (models/olmo2.rs:126,
        // models/granite.rs:319), whatever head_dim is.
        (
            "olmo2-64",
            oracle!(olmo2::Model),
            "shape mismatch for model.layers.0.self_attn.q_proj",
        ),
        (
            "granite-64",
            granite_oracle,
            "shape mismatch for model.layers.0.self_attn.q_proj",
        ),
        // models/smol/smollm3.rs:174.
        (
            "smollm3-64",
            oracle!(smollm3::ModelForCausalLM),
            "sliding window is not supported",
        ),
        // See `gemma3_oracle`.
        (
            "gemma3",
            oracle!(gemma3::Model, false),
            "slice-set only supports contiguous tensors",
        ),
    ];
    for (fixture, make, message) in refused {
        let compute = || {
            let mut oracle = candle_model(make, Inputs::new(fixture).candle);
            oracle(&one_row(&[1, 2])).unwrap();
        };
        let panic = catch_unwind(compute).expect_err(fixture);
        let got = panic.downcast_ref::<String>().unwrap();
        assert!(got.contains(message), "{fixture}: {got}");
    }
}

/// See `qwen3_vl_oracle`.
#[test]
fn qwen3_vl_of_candle_transformers_has_no_causal_mask() {
    let Files { config, weights } = Inputs::new("qwen3_vl").candle;
    let weights = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let tokens = one_row(&[11, 70, 200, 31]);
    let model = qwen3_vl_model(&config, weights.clone());
    let in_one_pass = qwen3_vl_logits(&model, &tokens, 0).unwrap();
    let one_by_one = qwen3_vl_oracle(config, weights)(&tokens).unwrap();
    let differences = (in_one_pass - one_by_one).unwrap().abs().unwrap();
    let largest: f32 = differences.max_all().unwrap().to_scalar().unwrap();
    assert!(largest > 0.01, "{largest}: candle has a mask");
}
