//! Compares log-probs and gradients of the first four families with transformers and TRL.
//! families.rs does the same for the further families.

use std::sync::Arc;

use bradley::domain::dpo::DpoConfig;
use bradley::domain::training::{LoraConfig, Precision, TARGET_MODULES};
use bradley::formats::peft;
use bradley::infer::pack::{Owned, pack};
use bradley::infer::pair::{EncodedPair, SequenceGroup};
use bradley::infer::scorer::{score, score_shared};
use bradley::math::loss::{PairLogps, ReferenceLogps, batch_loss};
use bradley::math::rng::kaiming_uniform;
use bradley::model::adapter::Adapter;
use bradley::model::decoder::Policy;
use bradley::model::device::ComputeDevice;
use bradley::model::params::LoraTensor;
use bradley::train::backprop::{SavePolicy, backward, forward};
use bradley::train::trainable::{StepGradients, TrainablePolicy};
use candle_core::{Device, Tensor};

use crate::support::{
    FAMILY_MODELS, MODELS, assert_close, device, encode, golden, is_batch_invariant, json, numbers,
    open, policy, relative, rows, tensors, tiny,
};

/// f32 log-probs agree to 1e-5 relative; values below 0.1 nat are compared on that scale.
const LOGP: f64 = 1e-5;

#[test]
fn log_probs_are_those_of_transformers() {
    let expected = json("logps.json");
    for name in MODELS {
        let ((model, tokenizer), (reference, _)) = (tiny(name), tiny(&format!("{name}-ref")));
        for file in ["pairs.jsonl", "plain.jsonl"] {
            let rows = rows(file);
            for (row, pair) in rows.iter().zip(encode(&rows, &tokenizer, 256)) {
                let e = &expected[name][row.id.as_deref().unwrap()];
                let (p, r) = (
                    score(&model, &pair.groups()).unwrap(),
                    score(&reference, &pair.groups()).unwrap(),
                );
                for (i, side) in ["chosen", "rejected"].into_iter().enumerate() {
                    let what = format!("{name} {:?} {side}", row.id);
                    for (got, want) in [
                        (&p[i], &e[side]["policy"]["logps"]),
                        (&r[i], &e[side]["reference"]),
                    ] {
                        let want = numbers(want);
                        assert_eq!(got.len(), want.len(), "{what}");
                        for (g, w) in got.iter().zip(want) {
                            assert_close(&what, *g as f64, w, LOGP, 0.1);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn rope_scalings_are_those_of_transformers() {
    for case in json("ropes.json").as_array().unwrap() {
        let kind = case["config"]["rope_parameters"].to_string();
        let config = bradley::model::config::ModelConfig::from_hf_json(
            &case["config"].to_string(),
            std::path::Path::new("config.json"),
        )
        .unwrap();
        let (inv_freq, factor) = config.spec.ropes[0].inv_freq(config.spec.head_dim());
        let want = numbers(&case["inv_freq"]);
        assert_eq!(inv_freq.len(), want.len());
        for (g, w) in inv_freq.iter().zip(want) {
            assert_close(&kind, *g as f64, w, 1e-6, 1e-12);
        }
        if let Some(long) = case["long"].as_object() {
            let length = long["length"].as_u64().unwrap() as usize;
            let spec = &config.spec;
            assert_ne!(spec.length_class(length), spec.length_class(64), "{kind}");
            let (inv_freq, _) = spec.ropes[0].inv_freq_at(spec.head_dim(), length);
            for (g, w) in inv_freq.iter().zip(numbers(&long["inv_freq"])) {
                assert_close(&kind, *g as f64, w, 1e-6, 1e-12);
            }
        }
        assert_close(
            &kind,
            factor as f64,
            case["attention_factor"].as_f64().unwrap(),
            1e-6,
            1e-12,
        );
    }
}

#[test]
fn sharded_and_bf16_weights_load() {
    let (whole, tokenizer) = tiny("llama");
    let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
    let want = score(&whole, &pairs[0].groups()).unwrap();
    assert_eq!(
        score(&tiny("llama-sharded").0, &pairs[0].groups()).unwrap(),
        want
    );
    let bf16 = score(&tiny("llama-bf16").0, &pairs[0].groups()).unwrap();
    for (g, w) in bf16[0].iter().zip(&want[0]) {
        assert_close("bf16 weights", *g as f64, *w as f64, 0.05, 1.0);
    }
}

#[test]
fn token_statistics_are_those_of_transformers() {
    let expected = json("logps.json");
    for name in MODELS {
        let (model, tokenizer) = tiny(name);
        let rows = rows("pairs.jsonl");
        for (row, pair) in rows.iter().zip(encode(&rows, &tokenizer, 256)) {
            let tape = forward(
                &model,
                pack(&[&pair.groups()]).row,
                SavePolicy::Nothing,
                &mut || {},
            )
            .unwrap();
            let e = &expected[name][row.id.as_deref().unwrap()]["chosen"]["policy"];
            let (means, entropies, p2) = (
                numbers(&e["mean_logits"]),
                numbers(&e["entropy"]),
                numbers(&e["log_sum_p2"]),
            );
            for (t, d) in tape.distributions()[..pair.chosen.len()].iter().enumerate() {
                let what = format!("{name} {:?} token {t}", row.id);
                assert_close(&what, d.mean_logit as f64, means[t], 1e-4, 0.1);
                assert_close(&what, d.entropy as f64, entropies[t], 1e-4, 0.1);
                assert_close(&what, d.log_sum_p2 as f64, p2[t], 1e-4, 0.1);
                assert_eq!(d.is_argmax, e["argmax"][t].as_bool().unwrap(), "{what}");
            }
        }
    }
}

/// Returns gradients of the mean sigmoid loss over `pairs`, in one packed row.
fn gradients(
    policy: &TrainablePolicy,
    pairs: &[EncodedPair],
    references: &[Vec<Vec<f32>>],
    checkpointing: bool,
) -> Vec<(String, Tensor)> {
    let groups: Vec<_> = pairs.iter().map(EncodedPair::groups).collect();
    let row = pack(&groups.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let save = if checkpointing {
        SavePolicy::BlockInputs
    } else {
        SavePolicy::Tapes
    };
    let tape = forward(&policy.policy, row.row.clone(), save, &mut || {}).unwrap();
    let side = |i: usize, s: usize| &tape.log_probs()[row.completions[i][s].clone()];
    let inputs: Vec<PairLogps> = (0..pairs.len())
        .map(|i| PairLogps {
            policy_chosen: side(i, 0),
            policy_rejected: side(i, 1),
            reference: Some(ReferenceLogps::Tokens(&references[i][0], &references[i][1])),
            weight: 1.0,
            wpo: None,
        })
        .collect();
    let loss = batch_loss(&DpoConfig::default(), &inputs, 1.0);
    let mut upstream = vec![0f32; row.row.targets.len()];
    for (i, ranges) in row.completions.iter().enumerate() {
        upstream[ranges[0].clone()].copy_from_slice(&loss.grad_chosen[i]);
        upstream[ranges[1].clone()].copy_from_slice(&loss.grad_rejected[i]);
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

#[test]
fn every_weights_gradient_is_torchs() {
    for name in MODELS {
        let ((model, tokenizer), (reference, _)) = (tiny(name), tiny(&format!("{name}-ref")));
        let pairs = encode(&rows("pairs.jsonl")[..2], &tokenizer, 256);
        let references: Vec<_> = pairs
            .iter()
            .map(|p| score(&reference, &p.groups()).unwrap())
            .collect();
        let policy = TrainablePolicy::full(&model, Precision::F32).unwrap();
        let expected = tensors(&format!("grads_{name}.safetensors"));
        for checkpointing in [false, true] {
            let got = gradients(&policy, &pairs, &references, checkpointing);
            assert_eq!(got.len(), expected.len(), "{name}");
            for (tensor, g) in &got {
                let error = relative(g, &expected[tensor]);
                assert!(error < 2e-4, "{name} {tensor}: relative error {error:e}");
            }
        }
    }
}

#[test]
fn every_adapter_gradient_is_torchs_and_peft_adapters_load() {
    for name in MODELS {
        let (model, tokenizer) = tiny(name);
        let adapter = peft::load(&golden(&format!("adapters/{name}")), &model.config).unwrap();
        let policy = TrainablePolicy::lora(&model, &adapter, Precision::F32).unwrap();
        let rows = rows("pairs.jsonl");
        let pairs = encode(&rows, &tokenizer, 256);
        let logps = json(&format!("adapters/{name}/logps.json"));
        for (row, pair) in rows.iter().zip(&pairs) {
            let got = score(&policy.policy, &pair.groups()).unwrap();
            for (i, side) in ["chosen", "rejected"].into_iter().enumerate() {
                for (g, w) in got[i]
                    .iter()
                    .zip(numbers(&logps[row.id.as_deref().unwrap()][side]))
                {
                    assert_close(
                        &format!("{name} {side} with its adapter"),
                        *g as f64,
                        w,
                        LOGP,
                        0.1,
                    );
                }
            }
        }
        let references: Vec<_> = pairs[..2]
            .iter()
            .map(|p| score(&model, &p.groups()).unwrap())
            .collect();
        let expected = tensors(&format!("adapters/{name}/grads.safetensors"));
        for checkpointing in [false, true] {
            let got = gradients(&policy, &pairs[..2], &references, checkpointing);
            assert_eq!(got.len(), expected.len(), "{name}");
            for (tensor, g) in &got {
                let error = relative(g, &expected[tensor]);
                assert!(error < 2e-4, "{name} {tensor}: relative error {error:e}");
            }
        }
    }
}

#[test]
fn activation_checkpointing_changes_no_bit() {
    let (model, tokenizer) = tiny("qwen3");
    let pairs = encode(&rows("pairs.jsonl")[..3], &tokenizer, 256);
    let references: Vec<_> = pairs
        .iter()
        .map(|p| score(&tiny("qwen3-ref").0, &p.groups()).unwrap())
        .collect();
    let policy = TrainablePolicy::full(&model, Precision::F32).unwrap();
    let (kept, recomputed) = (
        gradients(&policy, &pairs, &references, false),
        gradients(&policy, &pairs, &references, true),
    );
    for ((name, a), (_, b)) in kept.iter().zip(&recomputed) {
        let bits = |t: &Tensor| {
            t.flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .iter()
                .map(|x| x.to_bits())
                .collect::<Vec<_>>()
        };
        assert_eq!(bits(a), bits(b), "{name}");
    }
}

#[test]
fn bf16_log_probs_are_within_a_percent_of_f32() {
    for name in MODELS {
        let (model, tokenizer) = tiny(name);
        for pair in encode(&rows("pairs.jsonl"), &tokenizer, 256) {
            let exact = score(&model, &pair.groups()).unwrap();
            let rounded = score(&model.with_precision(Precision::Bf16), &pair.groups()).unwrap();
            for (e, r) in exact.iter().zip(&rounded) {
                let sum = |v: &[f32]| v.iter().map(|x| *x as f64).sum::<f64>();
                assert_close(name, sum(r), sum(e), 0.01, 0.1);
            }
        }
    }
}

/// Checks that numbers are equal but for the rounding of operands and sums.
fn assert_near(what: &str, got: &[f32], want: &[f32], precision: Precision) {
    let tolerance = if precision == Precision::Bf16 {
        0.02
    } else {
        LOGP
    };
    got.iter()
        .zip(want)
        .for_each(|(g, w)| assert_close(what, *g as f64, *w as f64, tolerance, 1.0));
}

#[test]
fn packed_rows_equal_separate_sequences() {
    let exact = is_batch_invariant();
    for (name, precision) in MODELS
        .into_iter()
        .flat_map(|m| [(m, Precision::F32), (m, Precision::Bf16)])
    {
        let (model, tokenizer) = tiny(name);
        let model = model.with_precision(precision);
        let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
        let all: Vec<_> = pairs.iter().map(EncodedPair::groups).collect();
        let packed = pack(&all.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let logps = model.log_probs(packed.row.clone(), &mut || {}).unwrap();
        for (i, pair) in pairs.iter().enumerate() {
            for (side, completion) in [&pair.chosen, &pair.rejected].into_iter().enumerate() {
                let alone = SequenceGroup {
                    prompt: pair.prompt.clone(),
                    completions: vec![completion.clone()],
                };
                let want = &score(&model, &[alone]).unwrap()[0];
                let got = &logps[packed.completions[i][side].clone()];
                if exact {
                    assert_eq!(got, want, "{name}: bit for bit");
                } else {
                    assert_near(&format!("{name} {precision:?}"), got, want, precision);
                }
            }
        }
    }
}

#[test]
fn adapters_that_share_rows_score_as_each_alone_bit_for_bit() {
    // The emulator is slow, and has the kernels of the further families in other tests.
    let families: &[&str] = match device() {
        ComputeDevice::Cpu => &FAMILY_MODELS,
        _ => &[],
    };
    for (name, precision) in MODELS
        .into_iter()
        .chain(families.iter().copied())
        .flat_map(|m| [(m, Precision::F32), (m, Precision::Bf16)])
    {
        let (base, tokenizer) = tiny(name);
        let base = base.with_precision(precision);
        let with = |rank: usize, targets: &[&str], seed: u64| {
            let config = LoraConfig {
                rank,
                target_modules: targets.iter().map(|t| t.to_string()).collect(),
                ..LoraConfig::default()
            };
            let random = |tensor: &LoraTensor| {
                let values =
                    kaiming_uniform(seed, &tensor.name, tensor.elements(), tensor.shape[1]);
                Tensor::from_vec(values, &tensor.shape, &Device::Cpu)
            };
            let adapter = Adapter::build(&base.config, &config, random).unwrap();
            Policy {
                adapter: Some(Arc::new(adapter)),
                ..base.clone()
            }
        };
        let policies = [
            base.clone(),
            with(4, &TARGET_MODULES, 1),
            with(20, &["q_proj", "v_proj", "down_proj"], 2),
        ];
        let groups: Vec<_> = encode(&rows("pairs.jsonl"), &tokenizer, 256)
            .iter()
            .map(EncodedPair::groups)
            .collect();
        // Every policy scores every pair: the same prompts under several adapters in one row.
        let items: Vec<Owned> = groups
            .iter()
            .flat_map(|g| (0..policies.len()).map(move |p| (p, g.as_slice())))
            .collect();
        for row_tokens in [150, usize::MAX] {
            let together = score_shared(&policies, &items, row_tokens, &mut || {}).unwrap();
            for ((owner, groups), logps) in items.iter().zip(&together) {
                let (what, want) = (
                    format!("{name} {precision:?}: adapter {owner}"),
                    score(&policies[*owner], groups).unwrap(),
                );
                if is_batch_invariant() {
                    assert_eq!(*logps, want, "{what}");
                } else {
                    logps
                        .iter()
                        .zip(&want)
                        .for_each(|(got, want)| assert_near(&what, got, want, precision));
                }
            }
            assert_ne!(
                together[0], together[1],
                "{name}: an adapter changes no log-prob"
            );
        }
    }
}

#[test]
fn a_damaged_or_foreign_file_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &std::path::Path| {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(golden(from)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    };
    let load = |dir: &std::path::Path| {
        let model =
            bradley::formats::loader::load_model(None, dir.to_str().unwrap(), &Default::default())?;
        bradley::model::parameters::Parameters::load(&model.config, &model.weights, Precision::F32)
    };
    let dir = folder.path().join("truncated");
    copy("models/llama", &dir);
    let file = dir.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for cut in [0, 4, 100, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..cut]).unwrap();
        let e = load(&dir).unwrap_err().to_string();
        assert!(e.contains("model.safetensors"), "{cut}: {e}");
    }
    let dir = folder.path().join("other-shape");
    copy("models/llama", &dir);
    std::fs::copy(
        golden("models/qwen3/model.safetensors"),
        dir.join("model.safetensors"),
    )
    .unwrap();
    let e = load(&dir).unwrap_err().to_string();
    assert!(e.contains("shape") || e.contains("no tensor"), "{e}");

    let (model, _) = policy(open("qwen3"));
    let e = peft::load(&golden("adapters/llama"), &model.config)
        .unwrap_err()
        .to_string();
    assert!(e.contains("shape"), "{e}");
    let dir = folder.path().join("adapter");
    copy("adapters/llama", &dir);
    std::fs::write(dir.join("adapter_model.safetensors"), b"not safetensors").unwrap();
    assert!(
        peft::load(&dir, &tiny("llama").0.config)
            .unwrap_err()
            .to_string()
            .contains("adapter_model.safetensors")
    );
}
