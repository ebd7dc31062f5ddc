//! Generation compared with transformers' `generate`, and with this program's own scoring. There is
//! no generation on a GPU yet: with BRADLEY_TEST_DEVICE=cuda:N these tests fail.

use std::sync::Arc;

use bradley::compute::cpu::attention::CacheLayout;
use bradley::domain::training::{LoraConfig, Precision, TARGET_MODULES};
use bradley::infer::generate::{
    LogProbOptions, Prompt, Sampled, SamplingOptions, Sequence, decode, prefill,
    tokens_with_equal_frequencies,
};
use bradley::infer::pair::SequenceGroup;
use bradley::infer::scorer::score;
use bradley::math::rng::kaiming_uniform;
use bradley::model::adapter::Adapter;
use bradley::model::decoder::Policy;
use bradley::model::parameters::Parameters;
use bradley::model::params::LoraTensor;
use candle_core::{Device, Tensor};

use crate::support::{FAMILY_MODELS, MODELS, ids, json, open, tiny};

/// One sample that a test asks for.
#[derive(Clone)]
struct Wanted {
    prompt: Vec<u32>,
    adapter: Option<Arc<Adapter>>,
    options: SamplingOptions,
    sample: usize,
    tokens: usize,
}

fn greedy() -> SamplingOptions {
    SamplingOptions {
        temperature: 0.0,
        top_p: None,
        top_k: None,
        seed: 0,
    }
}

fn sampled(seed: u64) -> SamplingOptions {
    SamplingOptions {
        temperature: 1.0,
        seed,
        ..greedy()
    }
}

/// Generates all samples together: one prefill, then one pass for each token of all that are not
/// complete.
fn generate(base: &Policy, wanted: &[Wanted]) -> Vec<Vec<Sampled>> {
    let layout: CacheLayout = base.cache_layout();
    let mut prompts: Vec<Prompt> = wanted
        .iter()
        .map(|w| Prompt::new(w.prompt.clone(), w.tokens, w.adapter.clone()).unwrap())
        .collect();
    let logits = prefill(base, &layout, &mut prompts, &mut || {}).unwrap();
    let (mut sequences, mut all) = (Vec::new(), Vec::new());
    for ((prompt, w), logits) in prompts.into_iter().zip(wanted).zip(logits) {
        let (sequence, first) =
            Sequence::begin(Arc::new(prompt), &w.options, w.sample, &logits).unwrap();
        sequences.push(sequence);
        all.push(vec![first]);
    }
    loop {
        let mut open: Vec<(usize, &mut Sequence)> = sequences
            .iter_mut()
            .enumerate()
            .filter(|(i, _)| all[*i].len() < wanted[*i].tokens)
            .collect();
        if open.is_empty() {
            return all;
        }
        let indices: Vec<usize> = open.iter().map(|(i, _)| *i).collect();
        let mut rows: Vec<&mut Sequence> = open.iter_mut().map(|(_, s)| &mut **s).collect();
        let next = decode(base, &layout, &mut rows, &mut || {}).unwrap();
        for (i, token) in indices.into_iter().zip(next) {
            all[i].push(token.unwrap());
        }
    }
}

fn tokens(sampled: &[Sampled]) -> Vec<u32> {
    sampled.iter().map(|s| s.token).collect()
}

/// Returns the log-probs that scoring gives for the generated tokens.
fn scored(base: &Policy, w: &Wanted, generated: &[Sampled]) -> Vec<f32> {
    let policy = Policy {
        adapter: w.adapter.clone(),
        ..base.clone()
    };
    let group = SequenceGroup {
        prompt: w.prompt.clone(),
        completions: vec![tokens(generated)],
    };
    score(&policy, &[group]).unwrap().remove(0)
}

/// Checks that the log-probs of generated tokens have the bits that scoring computes.
fn assert_scored(what: &str, base: &Policy, w: &Wanted, generated: &[Sampled]) {
    let want = scored(base, w, generated);
    for (i, (got, want)) in generated.iter().zip(&want).enumerate() {
        assert_eq!(
            got.log_prob.to_bits(),
            want.to_bits(),
            "{what}, token {i}: {} is not {want}",
            got.log_prob
        );
    }
}

/// Token ids that look random.
fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length)
        .map(|i| (seed * 131 + i * i * 37 + i * 11) % 317 + 3)
        .collect()
}

/// An adapter with random values, so that it changes every log-prob.
fn adapter(policy: &Policy, seed: u64, rank: usize) -> Arc<Adapter> {
    let config = LoraConfig {
        rank,
        target_modules: TARGET_MODULES.map(str::to_owned).to_vec(),
        ..LoraConfig::default()
    };
    let tensor = |t: &LoraTensor| {
        let [rows, columns] = t.shape;
        let values = kaiming_uniform(seed, &t.name, t.elements(), 8);
        Tensor::from_vec(values, (rows, columns), &Device::Cpu)
    };
    Arc::new(Adapter::build(&policy.config, &config, tensor).unwrap())
}

fn in_bf16(name: &str) -> Policy {
    let model = open(name);
    let parameters = Parameters::load(&model.config, &model.weights, Precision::Bf16).unwrap();
    Policy {
        parameters: Arc::new(parameters),
        precision: Precision::Bf16,
        ..tiny(name).0
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let golden = json("generation.json");
    let (mut cases, mut cut) = (0, 0);
    for (name, expected) in golden.as_object().unwrap() {
        let (policy, _) = tiny(name);
        let expected = expected.as_array().unwrap();
        let wanted: Vec<Wanted> = expected
            .iter()
            .map(|case| Wanted {
                prompt: ids(&case["prompt"]),
                adapter: None,
                options: greedy(),
                sample: 0,
                tokens: 32,
            })
            .collect();
        for (case, got) in expected.iter().zip(generate(&policy, &wanted)) {
            let (got, want, ties) = (tokens(&got), ids(&case["tokens"]), ids(&case["ties"]));
            assert_eq!(want.len(), 32);
            cases += 1;
            // After a position at which two logits are equal up to rounding, the texts may differ.
            let first = got.iter().zip(&want).position(|(g, w)| g != w);
            if let Some(first) = first {
                assert!(
                    ties.contains(&(first as u32)),
                    "{name}, prompt of {}: {got:?} is not {want:?}",
                    ids(&case["prompt"]).len()
                );
                cut += 1;
            }
        }
    }
    assert!(cases >= 3 * (MODELS.len() + FAMILY_MODELS.len()), "{cases}");
    assert!(cut <= 2, "{cut} of {cases} differ after a tie");
}

#[test]
fn log_probs_of_generated_tokens_are_those_of_scoring() {
    let names = MODELS.iter().chain(&FAMILY_MODELS);
    for (n, name) in names.enumerate() {
        for base in [tiny(name).0, in_bf16(name)] {
            let adapters = [None, Some(adapter(&base, 5, 3)), Some(adapter(&base, 6, 4))];
            // Prompts and completions on both sides of a panel, of a window and of a block of the
            // cache.
            let long = if n % 4 == 0 { 66 } else { 9 };
            let shapes = [(1, 9), (31, 5), (64, long), (77, 9)];
            let mut wanted: Vec<Wanted> = Vec::new();
            for (i, (length, count)) in shapes.into_iter().enumerate() {
                let spec = &base.config.spec;
                wanted.push(Wanted {
                    prompt: prompt((n + i) as u32, length),
                    adapter: adapters[(n + i) % 3].clone(),
                    options: sampled(i as u64),
                    sample: i,
                    tokens: tokens_with_equal_frequencies(spec, length as usize, count),
                });
            }
            let what = format!("{name} in {:?}", base.precision);
            for (w, got) in wanted.iter().zip(generate(&base, &wanted)) {
                assert_eq!(got.len(), w.tokens, "{what}");
                assert_scored(&what, &base, w, &got);
            }
        }
    }
}

#[test]
fn log_probs_of_a_prompt_are_those_of_scoring_up_to_rounding() {
    for name in MODELS.iter().chain(&FAMILY_MODELS) {
        // In bf16, other sums may round an intermediate value to its neighbour.
        for (base, bound) in [(tiny(name).0, 1e-3), (in_bf16(name), 0.2)] {
            let adapters = [None, Some(adapter(&base, 5, 3)), None];
            let wanted = LogProbOptions {
                top: 2,
                prompt: true,
            };
            let ids = [prompt(1, 1), prompt(2, 31), prompt(3, 130)];
            let made = ids.iter().zip(&adapters).map(|(ids, adapter)| {
                let made = Prompt::new(ids.clone(), 1, adapter.clone()).unwrap();
                made.with_log_probs(wanted)
            });
            let mut prompts: Vec<Prompt> = made.collect();
            prefill(&base, &base.cache_layout(), &mut prompts, &mut || {}).unwrap();
            for ((ids, adapter), prompt) in ids.iter().zip(adapters).zip(&mut prompts) {
                let scored = prompt.take_scored();
                assert_eq!(scored.len(), ids.len() - 1);
                if scored.is_empty() {
                    continue;
                }
                let policy = Policy {
                    adapter,
                    ..base.clone()
                };
                let group = SequenceGroup {
                    prompt: ids[..1].to_vec(),
                    completions: vec![ids[1..].to_vec()],
                };
                let want = score(&policy, &[group]).unwrap().remove(0);
                for ((got, id), want) in scored.iter().zip(&ids[1..]).zip(want) {
                    assert_eq!(got.token.token, *id);
                    let difference = (got.token.log_prob - want).abs();
                    assert!(difference < bound, "{name}: {got:?} is not {want}");
                    assert!(got.top[0].log_prob >= got.top[1].log_prob);
                }
            }
        }
    }
}

#[test]
fn a_seed_gives_the_same_tokens_alone_and_in_a_crowd() {
    let base = tiny("llama").0;
    let adapters = [None, Some(adapter(&base, 1, 4))];
    let wanted: Vec<Wanted> = (0..32)
        .map(|i| Wanted {
            prompt: prompt(i % 5, 3 + 7 * (i % 5)),
            adapter: adapters[i as usize % 2].clone(),
            options: SamplingOptions {
                temperature: 1.5,
                ..sampled(u64::from(i / 2))
            },
            sample: i as usize % 2,
            tokens: 4 + i as usize % 9,
        })
        .collect();
    let together = generate(&base, &wanted);
    for (w, crowd) in wanted.iter().zip(&together) {
        let alone = generate(&base, std::slice::from_ref(w)).remove(0);
        assert_eq!(&alone, crowd);
        assert_scored("llama", &base, w, crowd);
    }
    // Other samples of the same request, and other seeds, are other texts.
    let same_prompt: Vec<Wanted> = (0..8)
        .map(|i| Wanted {
            sample: i % 4,
            options: sampled(i as u64 / 4),
            tokens: 12,
            adapter: None,
            prompt: prompt(9, 10),
        })
        .collect();
    let all = generate(&base, &same_prompt);
    for (i, a) in all.iter().enumerate() {
        assert!(all[i + 1..].iter().all(|b| tokens(a) != tokens(b)), "{i}");
    }
}

#[test]
fn samples_of_one_prompt_share_its_keys() {
    let base = tiny("qwen3").0;
    let layout = base.cache_layout();
    let ids = prompt(3, 70);
    let mut prompts = [Prompt::new(ids.clone(), 20, None).unwrap()];
    let logits = prefill(&base, &layout, &mut prompts, &mut || {}).unwrap();
    let [shared] = prompts.map(Arc::new);
    let (mut sequences, mut all): (Vec<Sequence>, Vec<Vec<Sampled>>) = (0..5)
        .map(|sample| {
            let (sequence, first) =
                Sequence::begin(shared.clone(), &sampled(1), sample, &logits[0]).unwrap();
            (sequence, vec![first])
        })
        .unzip();
    for _ in 1..20 {
        let mut rows: Vec<&mut Sequence> = sequences.iter_mut().collect();
        let next = decode(&base, &layout, &mut rows, &mut || {}).unwrap();
        for (sample, token) in all.iter_mut().zip(next) {
            sample.push(token.unwrap());
        }
    }
    let group = SequenceGroup {
        prompt: ids,
        completions: all.iter().map(|sample| tokens(sample)).collect(),
    };
    // One row has the prompt and all samples, as ScoreCompletions has them.
    let want = score(&base, &[group]).unwrap();
    for (got, want) in all.iter().zip(want) {
        let got: Vec<u32> = got.iter().map(|s| s.log_prob.to_bits()).collect();
        let want: Vec<u32> = want.iter().map(|l| l.to_bits()).collect();
        assert_eq!(got, want);
    }
}

#[test]
fn frequencies_that_depend_on_the_length_limit_a_completion() {
    let spec = &tiny("phi3-long").0.config.spec;
    // Its pretrained context has 50 tokens.
    assert_eq!(tokens_with_equal_frequencies(spec, 40, 32), 10);
    assert_eq!(tokens_with_equal_frequencies(spec, 10, 32), 32);
    assert_eq!(tokens_with_equal_frequencies(spec, 50, 32), 32);
    let spec = &tiny("llama").0.config.spec;
    assert_eq!(tokens_with_equal_frequencies(spec, 500, 1000), 1000);
}
