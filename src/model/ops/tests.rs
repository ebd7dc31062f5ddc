//! Each op's gradient against central finite differences, and its value against a plain version written with candle's own operations.

use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor, Var};

use super::attention::{Heads, segment_attention};
use super::linear::{linear, lora_linear};
use super::log_prob::{LogProbOptions, linear_log_prob};
use super::rms_norm::rms_norm;
use super::rope::{RopeTable, rope};
use super::seed::backward_from;
use super::swiglu::swiglu;
use crate::model::layout::RowLayout;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let n = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖a − b‖ / ‖b‖.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    let (mut num, mut den) = (0f64, 0f64);
    for (a, b) in a.iter().zip(b) {
        num += (*a as f64 - *b as f64).powi(2);
        den += (*b as f64).powi(2);
    }
    (num / den.max(1e-30)).sqrt()
}

/// Compares the gradients of Σ f(inputs)⊙u with central differences along random directions.
fn check_gradients(name: &str, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Tensor) {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tracked);
    let upstream = random(y.dims(), 99);
    let grads = backward_from(&y, &upstream).unwrap();
    let objective =
        |inputs: &[Tensor]| -> f64 { values(&f(inputs)).iter().zip(values(&upstream)).map(|(y, u)| *y as f64 * u as f64).sum() };
    for (i, var) in vars.iter().enumerate() {
        let g = values(grads.get(var).unwrap_or_else(|| panic!("{name}: no gradient for argument {i}")));
        for trial in 0..3 {
            let direction = random(inputs[i].dims(), 1000 + trial);
            let eps = 1e-2;
            let moved = |sign: f64| {
                let mut at = inputs.to_vec();
                at[i] = (&inputs[i] + (&direction * (sign * eps)).unwrap()).unwrap();
                objective(&at)
            };
            let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * eps);
            let analytic: f64 = g.iter().zip(values(&direction)).map(|(g, d)| *g as f64 * d as f64).sum();
            let scale = values(&direction).iter().zip(&g).map(|(d, g)| (*d as f64 * *g as f64).powi(2)).sum::<f64>().sqrt();
            assert!(
                (numeric - analytic).abs() < 2e-3 * scale.max(1e-2) + 2e-3 * analytic.abs(),
                "{name}, argument {i}: {numeric} vs {analytic}"
            );
        }
    }
}

#[test]
fn rms_norm_matches_its_formula_and_its_differences() {
    let (x, w) = (random(&[5, 24], 1), random(&[24], 2));
    let plain = x
        .broadcast_div(&(x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap() + 1e-5).unwrap().sqrt().unwrap())
        .unwrap()
        .broadcast_mul(&w)
        .unwrap();
    assert!(relative(&values(&rms_norm(&x, &w, 1e-5).unwrap()), &values(&plain)) < 1e-6);
    check_gradients("rms_norm", &[x, w], |a| rms_norm(&a[0], &a[1], 1e-5).unwrap());
}

#[test]
fn rope_rotates_and_its_transpose_is_its_gradient() {
    let table = RopeTable::new(&[0, 1, 2, 7], &[1.0, 0.3, 0.05, 0.01], 1.1);
    let x = random(&[4, 16], 3);
    let y = values(&rope(&x, &table).unwrap());
    let xs = values(&x);
    for (i, f) in [1.0f32, 0.3, 0.05, 0.01].iter().enumerate() {
        let (t, angle) = (3, 7.0 * f);
        let (a, b) = (xs[t * 16 + i], xs[t * 16 + 4 + i]);
        assert!((y[t * 16 + i] - 1.1 * (a * angle.cos() - b * angle.sin())).abs() < 1e-6);
        assert!((y[t * 16 + 4 + i] - 1.1 * (b * angle.cos() + a * angle.sin())).abs() < 1e-6);
    }
    check_gradients("rope", &[x], |a| rope(&a[0], &table).unwrap());
}

#[test]
fn swiglu_matches_its_formula_and_its_differences() {
    let (g, u) = ((random(&[6, 40], 4) * 4.0).unwrap(), random(&[6, 40], 5));
    let plain = (g.silu().unwrap() * &u).unwrap();
    assert!(relative(&values(&swiglu(&g, &u).unwrap()), &values(&plain)) < 1e-6);
    check_gradients("swiglu", &[g, u], |a| swiglu(&a[0], &a[1]).unwrap());
}

#[test]
fn linear_forms_only_the_gradients_that_are_wanted() {
    let (x, w, b) = (random(&[7, 12], 6), random(&[9, 12], 7), random(&[9], 8));
    check_gradients("linear", &[x.clone(), w.clone()], |a| linear(&a[0], &a[1], None).unwrap());
    check_gradients("biased linear", &[x.clone(), w.clone(), b], |a| linear(&a[0], &a[1], Some(&a[2])).unwrap());
    let var = Var::from_tensor(&x).unwrap();
    let grads = backward_from(&linear(&var, &w, None).unwrap(), &random(&[7, 9], 1)).unwrap();
    assert!(grads.get(&w).is_none(), "a frozen weight must cost no gradient");
    assert!(grads.get(&var).is_some());
}

#[test]
fn lora_linear_is_the_base_plus_the_low_rank_update() {
    let (x, w, bias) = (random(&[7, 12], 6), random(&[9, 12], 7), random(&[9], 8));
    let (a, b) = (random(&[3, 12], 9), random(&[9, 3], 10));
    let merged = (&w + (b.matmul(&a).unwrap() * 0.7).unwrap()).unwrap();
    let plain = linear(&x, &merged, Some(&bias)).unwrap();
    assert!(relative(&values(&lora_linear(&x, &w, Some(&bias), &a, &b, 0.7).unwrap()), &values(&plain)) < 1e-6);
    check_gradients("lora_linear", &[x, a, b], |t| lora_linear(&t[0], &w, Some(&bias), &t[1], &t[2], 0.7).unwrap());
}

/// Attention with an explicit mask, in candle's own operations.
fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, layout: &RowLayout) -> Vec<f32> {
    let t = layout.tokens();
    let positions = layout.positions();
    let mut mask = vec![f32::NEG_INFINITY; t * t];
    for s in &layout.segments {
        for i in s.tokens.clone() {
            for j in s.prefix.clone().chain(s.tokens.start..i + 1) {
                if heads.window.is_none_or(|w| (positions[i] - positions[j]) < w as u32) {
                    mask[i * t + j] = 0.0;
                }
            }
        }
    }
    let mask = Tensor::from_vec(mask, (t, t), &Device::Cpu).unwrap();
    let mut out = vec![0f32; t * heads.query * heads.dim];
    for h in 0..heads.query {
        let take = |x: &Tensor, h: usize| x.narrow(1, h * heads.dim, heads.dim).unwrap().contiguous().unwrap();
        let kv = h / (heads.query / heads.key);
        let scores = (take(q, h).matmul(&take(k, kv).t().unwrap()).unwrap() * (1.0 / (heads.dim as f64).sqrt())).unwrap();
        let scores = (scores + &mask).unwrap();
        let e = scores.broadcast_sub(&scores.max_keepdim(1).unwrap()).unwrap().exp().unwrap();
        let p = e.broadcast_div(&e.sum_keepdim(1).unwrap()).unwrap();
        let o = values(&p.matmul(&take(v, kv)).unwrap());
        for i in 0..t {
            out[i * heads.query * heads.dim + h * heads.dim..][..heads.dim].copy_from_slice(&o[i * heads.dim..][..heads.dim]);
        }
    }
    out
}

#[test]
fn segment_attention_equals_masked_attention_with_and_without_a_window() {
    let mut layout = RowLayout::default();
    layout.push_group(70, [66, 3]);
    layout.push_group(5, [1, 80]);
    let layout = Arc::new(layout);
    let t = layout.tokens();
    for window in [None, Some(1), Some(9), Some(72)] {
        let heads = Heads { query: 4, key: 2, dim: 8, window };
        let (q, k, v) = (random(&[t, 32], 11), random(&[t, 16], 12), random(&[t, 16], 13));
        let got = values(&segment_attention(&q, &k, &v, heads, &layout).unwrap());
        let want = plain_attention(&q, &k, &v, heads, &layout);
        assert!(relative(&got, &want) < 1e-6, "window {window:?}");
    }
}

#[test]
fn segment_attention_gradients_match_differences() {
    let mut layout = RowLayout::default();
    layout.push_group(3, [4, 2]);
    layout.push_group(2, [66]);
    let layout = Arc::new(layout);
    let t = layout.tokens();
    for window in [None, Some(3)] {
        let heads = Heads { query: 4, key: 2, dim: 4, window };
        let inputs = [random(&[t, 16], 14), random(&[t, 8], 15), random(&[t, 8], 16)];
        check_gradients("segment_attention", &inputs, |a| segment_attention(&a[0], &a[1], &a[2], heads, &layout).unwrap());
    }
}

#[test]
fn log_probs_and_distributions_match_a_full_softmax() {
    let (rows, hidden, vocabulary) = (130, 8, 37);
    let (h, w) = ((random(&[rows, hidden], 17) * 3.0).unwrap(), random(&[vocabulary, hidden], 18));
    let targets: Arc<Vec<u32>> = Arc::new((0..rows as u32).map(|i| i * 7 % vocabulary as u32).collect());
    let (logp, d) = linear_log_prob(&h, &w, targets.clone(), LogProbOptions { distribution: true, gradient: false }).unwrap();
    let (logp, d) = (values(&logp), d.take());
    let logits = values(
        &h.to_dtype(DType::F64).unwrap().matmul(&w.to_dtype(DType::F64).unwrap().t().unwrap()).unwrap().to_dtype(DType::F32).unwrap(),
    );
    for (i, row) in logits.chunks(vocabulary).enumerate() {
        let row: Vec<f64> = row.iter().map(|x| *x as f64).collect();
        let m = row.iter().cloned().fold(f64::MIN, f64::max);
        let lse = m + row.iter().map(|x| (x - m).exp()).sum::<f64>().ln();
        let y = targets[i] as usize;
        assert!((logp[i] as f64 - (row[y] - lse)).abs() < 1e-5);
        assert!((d[i].mean_logit as f64 - row.iter().sum::<f64>() / row.len() as f64).abs() < 1e-5);
        let entropy: f64 = -row.iter().map(|x| (x - lse).exp() * (x - lse)).sum::<f64>();
        assert!((d[i].entropy as f64 - entropy).abs() < 1e-5);
        let p2: f64 = row.iter().map(|x| (2.0 * (x - lse)).exp()).sum();
        assert!((d[i].log_sum_p2 as f64 - p2.ln()).abs() < 1e-5);
        assert_eq!(d[i].is_argmax, row.iter().all(|x| *x <= row[y]));
    }
}

#[test]
fn log_prob_gradients_match_differences_for_a_frozen_and_a_trainable_head() {
    let (h, w) = ((random(&[9, 8], 19) * 2.0).unwrap(), random(&[37, 8], 20));
    let targets: Arc<Vec<u32>> = Arc::new((0..9).map(|i| i * 4).collect());
    let options = LogProbOptions { distribution: false, gradient: true };
    check_gradients("frozen head", std::slice::from_ref(&h), |a| linear_log_prob(&a[0], &w, targets.clone(), options).unwrap().0);
    check_gradients("trainable head", &[h, w], |a| linear_log_prob(&a[0], &a[1], targets.clone(), options).unwrap().0);
}
