//! Compares log-probs with those of candle-transformers: a second implementation of each family, on
//! the same tiny weights, in f32 on the CPU.

use bradley::infer::pair::SequenceGroup;
use bradley::infer::scorer::score;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use serde_json::Value;

use crate::support::{json, tensors, tiny};

/// Computes the logits of the last position from token ids of shape `[1, T]`.
type Oracle = Box<dyn FnMut(&Tensor) -> Result<Tensor>>;
/// Makes the model from a config.json in candle's terms and the weights.
type MakeOracle = fn(Value, VarBuilder<'static>) -> Oracle;

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

/// The families that candle-transformers has, by the names of their fixtures.
const FAMILIES: [(&str, MakeOracle); 4] = [
    ("llama", llama_oracle),
    ("mistral", oracle!(mistral::Model)),
    ("qwen2", oracle!(qwen2::ModelForCausalLM)),
    ("qwen3", oracle!(qwen3::ModelForCausalLM)),
];

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

/// Returns a fixture's config.json as candle reads it: with the fields of transformers 4.
fn candle_config(fixture: &str) -> Value {
    let mut config = json(&format!("models/{fixture}/config.json"));
    let rope = config["rope_parameters"].clone();
    config["rope_theta"] = rope["rope_theta"].clone();
    if rope["rope_type"] != "default" {
        config["rope_scaling"] = rope;
    }
    // candle masks the keys at `j + window < i` (models/mistral.rs), so its window does not count
    // the query's own position. In transformers it does. candle's Qwen2 needs a number even where
    // the window is off.
    config["sliding_window"] = match config["sliding_window"].as_u64() {
        Some(window) => (window - 1).into(),
        None => config["max_position_embeddings"].clone(),
    };
    config
}

/// Lengths of the sequences: around the fixtures' window of 16 tokens, and longer than a block of
/// 64 queries.
const LENGTHS: [u32; 7] = [1, 2, 7, 16, 17, 40, 100];

/// Each log-prob of the next token differs by at most 1e-4 of its value plus 1e-5.
#[test]
fn next_tokens_have_the_log_probs_of_candle_transformers() {
    let mut compared = 0;
    for (family, make) in FAMILIES {
        for fixture in [family.to_owned(), format!("{family}-ref")] {
            let weights = tensors(&format!("models/{fixture}/model.safetensors"));
            let weights = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
            let config = candle_config(&fixture);
            let vocabulary = config["vocab_size"].as_u64().unwrap() as u32;
            let mut oracle = make(config, weights);
            let (model, _) = tiny(&fixture);
            for length in LENGTHS {
                let prompt: Vec<u32> = (0..length)
                    .map(|i| (31 * i * i + 7 * i + length) % vocabulary)
                    .collect();
                let tokens = Tensor::new(prompt.as_slice(), &Device::Cpu).unwrap();
                let logits = oracle(&tokens.unsqueeze(0).unwrap()).unwrap();
                let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
                assert_eq!(logits.len(), vocabulary as usize, "{fixture}");
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
                    let difference = (f64::from(got[0]) - want).abs();
                    assert!(
                        difference <= 1e-5 + 1e-4 * want.abs(),
                        "{fixture}, {length} tokens, then {token}: {} is not {want}",
                        got[0]
                    );
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 2000, "only {compared} log-probs compared");
}
