use std::collections::HashMap;

use candle_core::D;
use proptest::prelude::*;

use super::*;

/// Draws `n` tokens, each from its own generator as the first tokens of samples are.
fn frequencies(options: &SamplingOptions, logits: &[f32], n: usize) -> HashMap<u32, usize> {
    let mut counts = HashMap::new();
    for sample in 0..n {
        let drawn = draw(&mut options.sampler(sample), logits).unwrap();
        *counts.entry(drawn.token).or_insert(0) += 1;
    }
    counts
}

fn options(temperature: f64, top_p: Option<f64>, top_k: Option<usize>) -> SamplingOptions {
    SamplingOptions {
        temperature,
        top_p,
        top_k,
        seed: 7,
    }
}

/// Returns the probabilities that sampling should have: softmax(logits / temperature), then only
/// the `kept` most likely tokens.
fn expected(logits: &[f32], temperature: f64, kept: usize) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    let mut p = vec![0f64; logits.len()];
    for i in &order[..kept] {
        p[*i] = (logits[*i] as f64 / temperature).exp();
    }
    let sum: f64 = p.iter().sum();
    p.iter().map(|x| x / sum).collect()
}

#[test]
fn sampled_frequencies_pass_a_chi_squared_test() {
    let logits = [0.3f32, -1.0, 1.2, 0.0, 2.0, -0.5, 0.9, 1.7];
    const N: usize = 20_000;
    // The probabilities at temperature 1 of the five most likely tokens are 0.34, 0.25, 0.15, 0.11
    // and 0.06, so that the nucleus of 0.75 has four.
    for (options, temperature, kept) in [
        (options(1.0, None, None), 1.0, 8),
        (options(0.5, None, None), 0.5, 8),
        (options(2.0, None, None), 2.0, 8),
        (options(1.0, None, Some(3)), 1.0, 3),
        (options(1.0, Some(0.75), None), 1.0, 4),
        // As many tokens as TopKLogitsWarper and then TopPLogitsWarper of transformers leave.
        (options(1.0, Some(0.75), Some(3)), 1.0, 2),
        (options(1.0, Some(0.85), Some(5)), 1.0, 4),
        (options(0.5, Some(0.6), Some(4)), 0.5, 2),
        (options(1.0, Some(0.99), Some(3)), 1.0, 3),
        (options(1.0, Some(0.75), Some(100)), 1.0, 4),
    ] {
        let p = expected(&logits, temperature, kept);
        let counts = frequencies(&options, &logits, N);
        let mut chi_squared = 0.0;
        for (token, p) in p.iter().enumerate() {
            let count = counts.get(&(token as u32)).copied().unwrap_or(0) as f64;
            match *p > 0.0 {
                true => chi_squared += (count - N as f64 * p).powi(2) / (N as f64 * p),
                false => assert_eq!(count, 0.0, "{options:?}: token {token}"),
            }
        }
        // The 99.9 % quantile of χ² with 7 degrees of freedom; with fewer it is lower still.
        let bound = [0.0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32][kept - 1];
        assert!(chi_squared < bound, "{options:?}: {chi_squared}");
        // The log-prob is that of temperature 1, whatever the options are.
        let all = expected(&logits, 1.0, 8);
        let drawn = draw(&mut options.sampler(0), &logits).unwrap();
        let want = all[drawn.token as usize].ln();
        assert!(
            (drawn.log_prob as f64 - want).abs() < 1e-5,
            "{drawn:?} {want}"
        );
    }
    let greedy = frequencies(&options(0.0, Some(0.1), Some(2)), &logits, 50);
    assert_eq!(greedy, HashMap::from([(4, 50)]));
}

/// Sets the probabilities outside the nucleus to 0 as candle does, which sorts all tokens.
fn keep_nucleus_by_sorting(probabilities: &mut [f32], p: f32) {
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
    let mut sum = 0f32;
    for token in order {
        match sum >= p {
            true => probabilities[token] = 0.0,
            false => sum += probabilities[token],
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Many probabilities are equal, and most nuclei have more tokens than are sorted at first.
    #[test]
    fn a_nucleus_has_the_tokens_that_sorting_the_vocabulary_gives(
        weights in prop::collection::vec(0u32..20, 1..4000),
        p in 0.001f32..1.0,
    ) {
        let total = weights.iter().sum::<u32>().max(1) as f32;
        let mut ours: Vec<f32> = weights.iter().map(|w| *w as f32 / total).collect();
        let mut sorted = ours.clone();
        keep_nucleus(&mut ours, p);
        keep_nucleus_by_sorting(&mut sorted, p);
        prop_assert_eq!(ours, sorted);
    }

    /// Many logits are equal.
    #[test]
    fn the_most_likely_token_is_that_of_candle(
        steps in prop::collection::vec(-6i32..6, 1..300),
    ) {
        let logit = |step: &i32| match *step {
            -6 => f32::NEG_INFINITY,
            step => step as f32 * 0.5,
        };
        let logits: Vec<f32> = steps.iter().map(logit).collect();
        let tensor = Tensor::from_slice(&logits, logits.len(), &Device::Cpu).unwrap();
        let first = tensor.argmax(D::Minus1).unwrap().to_scalar::<u32>().unwrap();
        prop_assert_eq!(most_likely_token(&logits), Some(first));
    }
}

#[test]
fn a_seed_gives_the_tokens_that_candle_samples_from_a_sorted_vocabulary() {
    let logits: Vec<f32> = (0..3000).map(|i| (i * 7919 % 97) as f32 * 0.05).collect();
    let tensor = Tensor::from_slice(&logits, logits.len(), &Device::Cpu).unwrap();
    for (temperature, p) in [
        (1.0, 0.02),
        (1.0, 0.3),
        (0.7, 0.9),
        (2.0, 0.999),
        (1.0, 1.0),
    ] {
        let options = options(temperature, Some(p), None);
        for sample in 0..10 {
            let seed = derived_seed(options.seed, &format!("sample {sample}"));
            let sampling = Sampling::TopP { p, temperature };
            let mut candle = LogitsProcessor::from_sampling(seed, sampling);
            let mut ours = options.sampler(sample);
            for place in 0..3 {
                assert_eq!(
                    ours.choose(&logits).unwrap(),
                    candle.sample(&tensor).unwrap(),
                    "{options:?}: token {place} of sample {sample}"
                );
            }
        }
    }
}

#[test]
fn logits_that_are_not_numbers_are_an_error() {
    let logits = [0.0, f32::NAN, 1.0];
    for temperature in [0.0, 1.0] {
        let mut sampler = options(temperature, None, None).sampler(0);
        let e = draw(&mut sampler, &logits).unwrap_err();
        assert!(e.to_string().contains("not a number"), "{e}");
    }
    for place in [0, 63, 64, 129] {
        let mut logits = [1.0; 130];
        logits[place] = f32::NAN;
        assert_eq!(most_likely_token(&logits), None, "place {place}");
    }
}

#[test]
fn a_request_needs_its_prompt_once_and_the_last_token_never() {
    assert_eq!(blocks_needed(64, 1, 1), 1);
    assert_eq!(blocks_needed(65, 1, 1), 2);
    assert_eq!(blocks_needed(65, 3, 2), 2 + 3);
    assert_eq!(blocks_needed(1, 2, 65), 1 + 2);
    assert_eq!(blocks_needed(1, 2, 66), 1 + 4);
}
