use std::collections::HashMap;

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

#[test]
fn logits_that_are_not_numbers_are_an_error() {
    let logits = [0.0, f32::NAN, 1.0];
    for temperature in [0.0, 1.0] {
        let mut sampler = options(temperature, None, None).sampler(0);
        let e = draw(&mut sampler, &logits).unwrap_err();
        assert!(e.to_string().contains("not a number"), "{e}");
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
