//! Compares each kernel's gradient with central finite differences, and its value with its formula,
//! mostly in candle's own operations.

use candle_core::{D, DType, Device, Tensor};

use super::attention::{Heads, attention, attention_backward};
use super::gemm::{Elements, Kernel, NR, Operand, View, WeightView};
use super::head::{
    HeadInput, HeadOptions, MAX_SAVED_PROBABILITIES, head, head_weight_gradient, log_prob, logits,
    most_likely,
};
use super::rms_norm::{HeadColumns, head_norm, head_norm_backward, rms_norm, rms_norm_backward};
use super::rope::{Direction, RopeTable, RotaryPairs, rotate};
use super::simd::{soft_cap, soft_cap_slope};
use super::swiglu::{
    ActivationFunction, GateUpTape, GatedTiles, GradientTiles, SavedGateUp, gated, gated_backward,
};
use crate::compute::layout::RowLayout;
use crate::math::rng::kaiming_uniform;

/// Returns the kernels that multiply in f32.
fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::available()
        .into_iter()
        .filter(|k| matches!(k, Kernel::Portable | Kernel::Avx512))
}

/// Returns values that are uniform in (−1, 1).
fn random(n: usize, seed: u64) -> Vec<f32> {
    kaiming_uniform(seed, "test", n, 1)
}

fn matrix(values: &[f32], cols: usize) -> Tensor {
    Tensor::from_slice(values, (values.len() / cols, cols), &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Returns ‖a − b‖ / ‖b‖.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |f: &dyn Fn(usize) -> f64| (0..a.len()).map(|i| f(i).powi(2)).sum::<f64>().sqrt();
    norm(&|i| a[i] as f64 - b[i] as f64) / norm(&|i| b[i] as f64).max(1e-15)
}

/// Compares `gradient` with central differences of Σ f(x)⊙upstream along random directions.
fn check_gradient(
    name: &str,
    x: &[f32],
    gradient: &[f32],
    upstream: &[f32],
    f: impl Fn(&[f32]) -> Vec<f32>,
) {
    let objective = |x: &[f32]| -> f64 {
        f(x).iter()
            .zip(upstream)
            .map(|(y, u)| *y as f64 * *u as f64)
            .sum()
    };
    for trial in 0..3 {
        let direction = random(x.len(), 1000 + trial);
        let eps = 1e-2f32;
        let moved = |sign: f32| {
            objective(
                &x.iter()
                    .zip(&direction)
                    .map(|(x, d)| x + sign * eps * d)
                    .collect::<Vec<_>>(),
            )
        };
        let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * eps as f64);
        let terms = gradient
            .iter()
            .zip(&direction)
            .map(|(g, d)| *g as f64 * *d as f64);
        let (analytic, scale) = (
            terms.clone().sum::<f64>(),
            terms.map(|t| t * t).sum::<f64>().sqrt(),
        );
        assert!(
            (numeric - analytic).abs() < 2e-3 * scale.max(1e-2) + 2e-3 * analytic.abs(),
            "{name}, trial {trial}: {numeric} vs {analytic}"
        );
    }
}

#[test]
fn rms_norm_matches_its_formula_and_its_differences() {
    let (x, w, u) = (random(5 * 24, 1), random(24, 2), random(5 * 24, 3));
    let norm = |x: &[f32], w: &[f32]| {
        let mut y = vec![0f32; x.len()];
        rms_norm(x, w, 1e-5, &mut y);
        y
    };
    let t = matrix(&x, 24);
    let rms = (t.sqr().unwrap().mean_keepdim(D::Minus1).unwrap() + 1e-5)
        .unwrap()
        .sqrt()
        .unwrap();
    let plain = t
        .broadcast_div(&rms)
        .unwrap()
        .broadcast_mul(&Tensor::from_slice(&w, 24, &Device::Cpu).unwrap())
        .unwrap();
    assert!(relative(&norm(&x, &w), &values(&plain)) < 1e-6);
    let (mut dx, mut dw) = (vec![0f32; x.len()], vec![0f32; 24]);
    rms_norm_backward(&x, &w, &u, 1e-5, &mut dx, Some(&mut dw));
    check_gradient("rms_norm x", &x, &dx, &u, |x| norm(x, &w));
    check_gradient("rms_norm w", &w, &dw, &u, |w| norm(&x, w));
}

#[test]
fn head_norm_is_the_norm_of_every_head_and_leaves_the_rest_alone() {
    let heads = HeadColumns {
        stride: 30,
        offset: 8,
        count: 2,
    };
    let (x, w, u) = (random(4 * 30, 4), random(8, 5), random(4 * 30, 6));
    let norm = |x: &[f32], w: &[f32]| {
        let mut y = x.to_vec();
        head_norm(&mut y, heads, w, 1e-5);
        y
    };
    let y = norm(&x, &w);
    let mut one = vec![0f32; 8];
    rms_norm(&x[38 + 8..][..8], &w, 1e-5, &mut one);
    assert_eq!(y[38 + 8..][..8], one[..]);
    assert_eq!(y[..8], x[..8]);
    assert_eq!(y[24..30], x[24..30]);
    let (mut dx, mut dw) = (u.clone(), vec![0f32; 8]);
    head_norm_backward(&x, &mut dx, heads, &w, 1e-5, Some(&mut dw));
    check_gradient("head_norm x", &x, &dx, &u, |x| norm(x, &w));
    check_gradient("head_norm w", &w, &dw, &u, |w| norm(&x, w));
}

#[test]
fn rope_rotates_and_its_transpose_is_its_gradient() {
    let frequencies: &[f32] = &[1.0, 0.3, 0.05, 0.01];
    let segments = [(0..3, frequencies), (7..8, frequencies)];
    let table = RopeTable::new(segments, 1.1, RotaryPairs::Halves);
    let rotated = |x: &[f32], direction| {
        let mut y = x.to_vec();
        rotate(&mut y, 20, (0..2, 8), &table, direction);
        y
    };
    let (x, u) = (random(80, 3), random(80, 4));
    let y = rotated(&x, Direction::Forward);
    for (i, f) in [1.0f32, 0.3, 0.05, 0.01].iter().enumerate() {
        let angle = 7.0 * f;
        let (a, b) = (x[60 + i], x[60 + 4 + i]);
        assert!((y[60 + i] - 1.1 * (a * angle.cos() - b * angle.sin())).abs() < 1e-6);
        assert!((y[60 + 4 + i] - 1.1 * (b * angle.cos() + a * angle.sin())).abs() < 1e-6);
    }
    assert_eq!(y[16..20], x[16..20], "what is not a rotated head stays");
    check_gradient("rope", &x, &rotated(&u, Direction::Backward), &u, |x| {
        rotated(x, Direction::Forward)
    });
}

#[test]
fn rope_rotates_the_first_dimensions_of_each_head_in_halves_or_in_pairs() {
    // Two segments with frequencies of their own; heads of 6, of which 4 dimensions are rotated.
    let (short, long): (&[f32], &[f32]) = (&[1.0, 0.3], &[0.5, 0.02]);
    for pairs in [RotaryPairs::Halves, RotaryPairs::Interleaved] {
        let table = RopeTable::new([(0..2, short), (5..7, long)], 1.1, pairs);
        let rotated = |x: &[f32], direction| {
            let mut y = x.to_vec();
            rotate(&mut y, 20, (0..3, 6), &table, direction);
            y
        };
        let (x, u) = (random(80, 3), random(80, 4));
        let y = rotated(&x, Direction::Forward);
        for (token, position, frequencies) in [(1, 1.0, short), (3, 6.0, long)] {
            for head in 0..3 {
                let first = token * 20 + head * 6;
                for (i, f) in frequencies.iter().enumerate() {
                    let angle: f32 = position * f;
                    let (one, other) = match pairs {
                        RotaryPairs::Halves => (first + i, first + 2 + i),
                        RotaryPairs::Interleaved => (first + 2 * i, first + 2 * i + 1),
                    };
                    let (a, b) = (x[one], x[other]);
                    assert!((y[one] - 1.1 * (a * angle.cos() - b * angle.sin())).abs() < 1e-6);
                    assert!((y[other] - 1.1 * (b * angle.cos() + a * angle.sin())).abs() < 1e-6);
                }
                assert_eq!(
                    y[first + 4..first + 6],
                    x[first + 4..first + 6],
                    "{pairs:?}"
                );
            }
        }
        assert_eq!(y[18..20], x[18..20], "what is not a rotated head stays");
        check_gradient("rope", &x, &rotated(&u, Direction::Backward), &u, |x| {
            rotated(x, Direction::Forward)
        });
    }
}

#[test]
fn gated_units_match_their_formulas_and_their_differences() {
    let x: Vec<f32> = random(6 * 80, 4).iter().map(|x| 4.0 * x).collect();
    let u = random(6 * 40, 5);
    for activation in ACTIVATIONS {
        let product = |x: &[f32]| match gated(Kernel::Portable, activation, x, 40).view().elements {
            Elements::F32(y) => y[..6 * 40].to_vec(),
            Elements::Bf16(_) => unreachable!("the kernel does not round"),
        };
        let t = matrix(&x, 80);
        let gate = t.narrow(1, 0, 40).unwrap();
        // candle's GELU is the tanh approximation.
        let active = match activation {
            ActivationFunction::Silu => gate.silu().unwrap(),
            ActivationFunction::GeluTanh => gate.gelu().unwrap(),
        };
        let plain = (active * t.narrow(1, 40, 40).unwrap()).unwrap();
        assert!(
            relative(&product(&x), &values(&plain)) < 1e-6,
            "{activation:?}"
        );
        let mut dx = x.clone();
        gated_backward(activation, &mut dx, 40, &u);
        check_gradient(&format!("{activation:?}"), &x, &dx, &u, product);
    }
}

#[test]
fn the_ends_of_the_activations_are_finite() {
    for activation in ACTIVATIONS {
        // Seven gates, then seven values of up.
        let x = [
            -1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0,
        ];
        let mut dx = x;
        gated_backward(activation, &mut dx, 7, &[1.0; 7]);
        assert!(dx.iter().all(|d| d.is_finite()), "{activation:?}: {dx:?}");
        assert!(
            dx[..3].iter().all(|d| d.abs() < 1e-9) && dx[3] == 0.5 && dx[4..7] == [1.0; 3],
            "{activation:?}: {dx:?}"
        );
    }
}

const ACTIVATIONS: [ActivationFunction; 2] =
    [ActivationFunction::Silu, ActivationFunction::GeluTanh];

/// Calls `f` with `[T, F]` matrices tile by tile, as `matmul_tiles` does.
fn by_tiles<const P: usize>(
    all: [&[f32]; P],
    width: usize,
    take: impl Fn(std::ops::Range<usize>, std::ops::Range<usize>, [Vec<f32>; P]),
) {
    let tokens = all[0].len() / width;
    for first in (0..tokens).step_by(37) {
        for column in (0..width).step_by(NR) {
            let (rows, columns) = (
                first..(first + 37).min(tokens),
                column..(column + NR).min(width),
            );
            let tile = |x: &[f32]| {
                // Values beyond the columns are unspecified, here NaN.
                let mut tile = vec![f32::NAN; rows.len() * NR];
                for (to, row) in tile.chunks_mut(NR).zip(rows.clone()) {
                    to[..columns.len()].copy_from_slice(&x[row * width..][columns.clone()]);
                }
                tile
            };
            take(rows.clone(), columns.clone(), all.map(tile));
        }
    }
}

/// Returns the columns `from..from + F` of `[T, 2F]`.
fn half(x: &[f32], width: usize, from: usize) -> Vec<f32> {
    x.chunks(2 * width)
        .flat_map(|row| row[from..from + width].to_vec())
        .collect()
}

#[test]
fn gating_by_tiles_gives_the_same_values_and_saves_its_input() {
    let (tokens, width) = (45, 64);
    let x: Vec<f32> = random(tokens * 2 * width, 4)
        .iter()
        .map(|x| 4.0 * x)
        .collect();
    let (gate, up) = (half(&x, width, 0), half(&x, width, width));
    for kernel in Kernel::available() {
        let rounds = kernel.is_bf16();
        let bits = |operand: &Operand, width: usize| -> Vec<u32> {
            (0..tokens)
                .flat_map(|i| match operand.view().elements {
                    Elements::F32(v) => v[i * width..][..width]
                        .iter()
                        .map(|x| x.to_bits())
                        .collect::<Vec<_>>(),
                    Elements::Bf16(_) => operand
                        .bf16_row(i)
                        .iter()
                        .map(|x| u32::from(x.to_bits()))
                        .collect(),
                })
                .collect()
        };
        let formats = [SavedGateUp::Nothing, SavedGateUp::F32, SavedGateUp::Bf16]
            .into_iter()
            .filter(|k| rounds || *k != SavedGateUp::Bf16);
        for (format, activation) in
            formats.flat_map(|format| ACTIVATIONS.map(|activation| (format, activation)))
        {
            let tiles = GatedTiles::new(kernel, activation, (tokens, width), format);
            // SAFETY: a single thread calls this, so no other task writes the part.
            by_tiles(
                [&gate, &up],
                width,
                |rows, columns, [gate, mut up]| unsafe {
                    tiles.take(rows, columns, &gate, &mut up)
                },
            );
            let (y, saved) = tiles.finish();
            assert_eq!(
                bits(&y, width),
                bits(&gated(kernel, activation, &x, width), width),
                "{kernel:?} {activation:?} {format:?}"
            );
            match (saved, format) {
                (None, SavedGateUp::Nothing) => {}
                (Some(GateUpTape::F32(saved)), SavedGateUp::F32) => {
                    assert_eq!(saved[..], x[..], "{kernel:?}")
                }
                (Some(GateUpTape::Bf16(saved)), SavedGateUp::Bf16) => {
                    let rounded =
                        Operand::new(kernel, View::f32(&x, 2 * width), tokens, 2 * width, 1.0);
                    assert_eq!(
                        bits(&saved, 2 * width),
                        bits(&rounded, 2 * width),
                        "{kernel:?}"
                    );
                }
                _ => panic!("{kernel:?} saves something else for {format:?}"),
            }
        }
    }
}

/// Only bf16 kernels save a rounded input, so this compares nothing on a processor without them.
#[test]
fn a_gated_unit_that_saves_its_input_rounded_has_the_gradients_of_what_it_saved() {
    for (tokens, width) in [(13, 41), (45, 64)] {
        let x: Vec<f32> = random(tokens * 2 * width, 4)
            .iter()
            .map(|x| half::bf16::from_f32(4.0 * x).to_f32())
            .collect();
        let u = random(tokens * width, 5);
        let kernels = Kernel::available().into_iter().filter(|k| k.is_bf16());
        for (kernel, activation) in
            kernels.flat_map(|kernel| ACTIVATIONS.map(|activation| (kernel, activation)))
        {
            let bits = |operand: &Operand| {
                (0..tokens)
                    .flat_map(|i| operand.bf16_row(i).to_vec())
                    .collect::<Vec<_>>()
            };
            let saved = Operand::new(kernel, View::f32(&x, 2 * width), tokens, 2 * width, 1.0);
            let saved = Operand::owned(kernel, saved.view(), tokens, 2 * width);
            let tiles = GradientTiles::new(&saved, activation, width);
            // SAFETY: a single thread calls this, so no other task writes the part.
            by_tiles([&u], width, |rows, columns, [g]| unsafe {
                tiles.take(rows, columns, &g)
            });
            let (y, [gate, up]) = tiles.finish();
            assert_eq!(
                bits(&y),
                bits(&gated(kernel, activation, &x, width)),
                "{kernel:?} {activation:?}"
            );
            let mut exact = x.clone();
            gated_backward(activation, &mut exact, width, &u);
            for (ours, from) in [(gate, 0), (up, width)] {
                let exact = half(&exact, width, from);
                assert_eq!(
                    bits(&ours),
                    bits(&Operand::new(
                        kernel,
                        View::f32(&exact, width),
                        tokens,
                        width,
                        1.0
                    )),
                    "{kernel:?} {width}"
                );
            }
        }
    }
}

/// Computes attention with an explicit mask, in candle's own operations.
fn plain_attention(qkv: &[f32], heads: Heads, layout: &RowLayout) -> Vec<f32> {
    let t = layout.tokens();
    let positions = layout.positions();
    let mut mask = vec![f32::NEG_INFINITY; t * t];
    for s in &layout.segments {
        for i in s.tokens.clone() {
            for j in s.prefix.clone().chain(s.tokens.start..i + 1) {
                if heads
                    .window
                    .is_none_or(|w| (positions[i] - positions[j]) < w as u32)
                {
                    mask[i * t + j] = 0.0;
                }
            }
        }
    }
    let (mask, qkv) = (matrix(&mask, t), matrix(qkv, heads.row()));
    let mut out = vec![0f32; t * heads.width()];
    for h in 0..heads.query {
        let take = |head: usize| {
            qkv.narrow(1, head * heads.dim, heads.dim)
                .unwrap()
                .contiguous()
                .unwrap()
        };
        let kv = h / (heads.query / heads.key);
        let (q, k, v) = (
            take(h),
            take(heads.query + kv),
            take(heads.query + heads.key + kv),
        );
        let scores =
            (q.matmul(&k.t().unwrap()).unwrap() * (1.0 / (heads.dim as f64).sqrt())).unwrap();
        let scores = match heads.softcap.map(f64::from) {
            None => scores,
            Some(cap) => ((scores / cap).unwrap().tanh().unwrap() * cap).unwrap(),
        };
        let scores = (scores + &mask).unwrap();
        let e = scores
            .broadcast_sub(&scores.max_keepdim(1).unwrap())
            .unwrap()
            .exp()
            .unwrap();
        let o = values(
            &e.broadcast_div(&e.sum_keepdim(1).unwrap())
                .unwrap()
                .matmul(&v)
                .unwrap(),
        );
        for i in 0..t {
            out[i * heads.width() + h * heads.dim..][..heads.dim]
                .copy_from_slice(&o[i * heads.dim..][..heads.dim]);
        }
    }
    out
}

fn attend(kernel: Kernel, qkv: &[f32], heads: Heads, layout: &RowLayout) -> (Vec<f32>, Vec<f32>) {
    let (mut out, mut lse) = (
        vec![0f32; layout.tokens() * heads.width()],
        vec![0f32; layout.tokens() * heads.query],
    );
    attention(kernel, qkv, heads, layout, &mut out, &mut lse);
    (out, lse)
}

#[test]
fn attention_equals_masked_attention_with_and_without_a_window() {
    let mut layout = RowLayout::default();
    layout.push_group(70, [66, 3]);
    layout.push_group(5, [1, 80]);
    for kernel in kernels() {
        for (window, dim, softcap) in [
            (None, 8, None),
            (Some(1), 8, None),
            (Some(9), 40, None),
            (Some(72), 8, None),
            // Caps that are about as large as the scores.
            (None, 8, Some(0.4)),
            (Some(9), 40, Some(0.7)),
        ] {
            let heads = Heads {
                query: 4,
                key: 2,
                dim,
                window,
                scale: 1.0 / (dim as f32).sqrt(),
                softcap,
            };
            let qkv = random(layout.tokens() * heads.row(), 11);
            let error = relative(
                &attend(kernel, &qkv, heads, &layout).0,
                &plain_attention(&qkv, heads, &layout),
            );
            assert!(error < 1e-6, "{kernel:?}, {heads:?}: {error:e}");
        }
    }
}

#[test]
fn attention_gradients_match_differences() {
    let mut layout = RowLayout::default();
    layout.push_group(3, [4, 2]);
    layout.push_group(2, [66]);
    for kernel in kernels() {
        for (window, dim, softcap) in [
            (None, 4, None),
            (Some(3), 36, None),
            (None, 4, Some(0.5)),
            (Some(3), 36, Some(0.5)),
        ] {
            let heads = Heads {
                query: 4,
                key: 2,
                dim,
                window,
                scale: 1.0 / (dim as f32).sqrt(),
                softcap,
            };
            let qkv = random(layout.tokens() * heads.row(), 14);
            let u = random(layout.tokens() * heads.width(), 15);
            let (out, lse) = attend(kernel, &qkv, heads, &layout);
            let mut dqkv = vec![f32::NAN; qkv.len()];
            attention_backward(kernel, &qkv, heads, &layout, (&out, &lse), &u, &mut dqkv);
            check_gradient("attention", &qkv, &dqkv, &u, |x| {
                attend(kernel, x, heads, &layout).0
            });
        }
    }
}

#[test]
fn bf16_attention_stays_near_f32() {
    let mut layout = RowLayout::default();
    layout.push_group(40, [66, 3]);
    for softcap in [None, Some(0.5)] {
        let heads = Heads {
            query: 4,
            key: 2,
            dim: 16,
            window: None,
            scale: 0.25,
            softcap,
        };
        let qkv = random(layout.tokens() * heads.row(), 14);
        let u = random(layout.tokens() * heads.width(), 15);
        let run = |kernel| {
            let (out, lse) = attend(kernel, &qkv, heads, &layout);
            let mut dqkv = vec![f32::NAN; qkv.len()];
            attention_backward(kernel, &qkv, heads, &layout, (&out, &lse), &u, &mut dqkv);
            (out, dqkv)
        };
        let (out, gradient) = run(Kernel::Portable);
        for kernel in Kernel::available() {
            let (o, g) = run(kernel);
            assert!(
                relative(&o, &out) < 0.01 && relative(&g, &gradient) < 0.02,
                "{kernel:?} {softcap:?}: {} {}",
                relative(&o, &out),
                relative(&g, &gradient)
            );
        }
    }
}

#[test]
fn the_soft_cap_is_tanh_and_has_its_derivative() {
    // From far beyond the cap through 0 to values whose tanh is the value itself.
    let xs: Vec<f32> = (-4000..=4000)
        .map(|i| i as f32 / 100.0)
        .chain((0..60).flat_map(|i| [0.5f32.powi(i), -(0.5f32.powi(i))]))
        .collect();
    for cap in [0.5f32, 30.0] {
        let mut ys = xs.clone();
        soft_cap(&mut ys, 2.0, cap);
        for (x, y) in xs.iter().zip(&ys) {
            let t = (2.0 * f64::from(*x) / f64::from(cap)).tanh();
            let (want, slope) = (f64::from(cap) * t, 1.0 - t * t);
            assert!(
                (f64::from(*y) - want).abs() <= 1e-6 * want.abs() && y.abs() <= cap,
                "x = {x}, cap = {cap}: {y} is not {want}"
            );
            let got = f64::from(soft_cap_slope(*y, cap));
            assert!(
                (got - slope).abs() < 2e-6,
                "x = {x}, cap = {cap}: the slope {got} is not {slope}"
            );
        }
    }
}

const PLAIN: HeadOptions = HeadOptions {
    distribution: true,
    gradient: false,
    trained: None,
};

fn head_input<'a>(
    kernel: Kernel,
    h: &'a [f32],
    w: &'a [f32],
    targets: &'a [u32],
    softcap: Option<f32>,
) -> HeadInput<'a> {
    HeadInput {
        kernel,
        h,
        w: WeightView::new(Elements::F32(w), HIDDEN),
        targets,
        softcap,
    }
}

/// Width of the hidden states in the tests of the head.
const HIDDEN: usize = 8;
/// Soft-caps of the logits in the tests of the head. The second one is about as large as they are.
const LOGIT_SOFTCAPS: [Option<f32>; 2] = [None, Some(3.0)];

#[test]
fn log_probs_and_distributions_match_a_full_softmax() {
    // More rows than one task processes, and more tokens than a tile has.
    let (rows, vocabulary) = (130, 2100);
    let h: Vec<f32> = random(rows * HIDDEN, 17).iter().map(|x| 3.0 * x).collect();
    let w = random(vocabulary * HIDDEN, 18);
    let targets: Vec<u32> = (0..rows as u32)
        .map(|i| i * 397 % vocabulary as u32)
        .collect();
    let f64s = |v: &[f32]| matrix(v, HIDDEN).to_dtype(DType::F64).unwrap();
    let uncapped: Vec<Vec<f64>> = f64s(&h)
        .matmul(&f64s(&w).t().unwrap())
        .unwrap()
        .to_vec2()
        .unwrap();
    for (kernel, softcap) in kernels().flat_map(|kernel| LOGIT_SOFTCAPS.map(|cap| (kernel, cap))) {
        let got = head(head_input(kernel, &h, &w, &targets, softcap), PLAIN);
        for (i, row) in uncapped.iter().enumerate() {
            let row: Vec<f64> = match softcap.map(f64::from) {
                None => row.clone(),
                Some(cap) => row.iter().map(|l| cap * (l / cap).tanh()).collect(),
            };
            let m = row.iter().cloned().fold(f64::MIN, f64::max);
            let lse = m + row.iter().map(|x| (x - m).exp()).sum::<f64>().ln();
            let (y, d) = (targets[i] as usize, got.distributions[i]);
            assert!((got.log_probs[i] as f64 - (row[y] - lse)).abs() < 1e-5);
            assert!(
                (d.mean_logit as f64 - row.iter().sum::<f64>() / row.len() as f64).abs() < 1e-5
            );
            let entropy: f64 = -row.iter().map(|x| (x - lse).exp() * (x - lse)).sum::<f64>();
            assert!(
                (d.entropy as f64 - entropy).abs() < 2e-5,
                "{} vs {entropy}",
                d.entropy
            );
            let p2: f64 = row.iter().map(|x| (2.0 * (x - lse)).exp()).sum();
            assert!((d.log_sum_p2 as f64 - p2.ln()).abs() < 1e-5);
            assert_eq!(d.is_argmax, row.iter().all(|x| *x <= row[y]));
        }
    }
}

#[test]
fn log_probs_of_whole_rows_of_logits_have_the_bits_of_the_tiles() {
    // First and last tokens of tiles and panels, among others.
    const TOKENS: [u32; 9] = [0, 31, 32, 511, 512, 700, 1023, 1024, 1099];
    // More tokens than a tile has, and no multiple of a panel. The largest width has more units
    // than a block of a GEMM, also as pairs.
    let vocabulary = 1100;
    for hidden in [HIDDEN, 72, 2100] {
        let w = random(vocabulary * hidden, 22);
        // One strip of rows of every kernel, and more.
        for rows in [1, 14, 15, 16, 33] {
            let h = random(rows * hidden, 23);
            for (kernel, softcap) in Kernel::available()
                .into_iter()
                .flat_map(|kernel| LOGIT_SOFTCAPS.map(|cap| (kernel, cap)))
            {
                let w = WeightView::new(Elements::F32(&w), hidden);
                let all = logits(kernel, &h, w, softcap);
                assert_eq!(all.len(), rows * vocabulary);
                for first in [0, 4, 8] {
                    let targets: Vec<u32> = (first..first + rows)
                        .map(|i| TOKENS[i % TOKENS.len()])
                        .collect();
                    let input = HeadInput {
                        kernel,
                        h: &h,
                        w,
                        targets: &targets,
                        softcap,
                    };
                    let by_tiles: Vec<u32> = head(input, HeadOptions::default())
                        .log_probs
                        .iter()
                        .map(|log_prob| log_prob.to_bits())
                        .collect();
                    let whole: Vec<u32> = all
                        .chunks(vocabulary)
                        .zip(&targets)
                        .map(|(row, y)| log_prob(row, *y).to_bits())
                        .collect();
                    let case = format!("{kernel:?} {softcap:?} {rows}x{hidden} from {first}");
                    assert_eq!(whole, by_tiles, "{case}");
                }
            }
        }
    }
}

#[test]
fn log_prob_gradients_match_differences_for_a_frozen_and_a_trainable_head() {
    let (rows, vocabulary) = (9, 1100);
    let h: Vec<f32> = random(rows * HIDDEN, 19).iter().map(|x| 2.0 * x).collect();
    let w = random(vocabulary * HIDDEN, 20);
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 130).collect();
    let u = random(rows, 21);
    for (kernel, softcap) in kernels().flat_map(|kernel| LOGIT_SOFTCAPS.map(|cap| (kernel, cap))) {
        // Save all probabilities, those of the first tiles, or none.
        let gradients = [MAX_SAVED_PROBABILITIES, rows * 1024, 0].map(|saved| {
            let options = HeadOptions {
                distribution: false,
                gradient: true,
                trained: Some(saved),
            };
            let mut out = head(head_input(kernel, &h, &w, &targets, softcap), options);
            let mut dw = vec![0f32; w.len()];
            head_weight_gradient(
                head_input(kernel, &h, &w, &targets, softcap),
                &mut out,
                &u,
                &mut dw,
            );
            (out, dw)
        });
        assert!(
            gradients[1..].iter().all(|(_, dw)| *dw == gradients[0].1),
            "{kernel:?} {softcap:?}: bits depend on what is saved"
        );
        let [(out, dw), ..] = gradients;
        let dh: Vec<f32> = out
            .gradient
            .chunks(HIDDEN)
            .zip(&u)
            .flat_map(|(row, u)| row.iter().map(move |x| x * u))
            .collect();
        let log_probs = |h: &[f32], w: &[f32]| {
            head(head_input(kernel, h, w, &targets, softcap), PLAIN).log_probs
        };
        let name = |of: &str| format!("head {of} {softcap:?}");
        check_gradient(&name("h"), &h, &dh, &u, |h| log_probs(h, &w));
        check_gradient(&name("w"), &w, &dw, &u, |w| log_probs(&h, w));
    }
}

#[test]
fn queries_rotated_with_a_scaled_table_are_scaled_and_other_heads_are_left_alone() {
    let frequencies: &[f32] = &[1.0, 0.3];
    let segments = [(0..1, frequencies), (5..6, frequencies)];
    let table = RopeTable::new(segments, 1.0, RotaryPairs::Halves);
    let scaled = table.scaled(&[1.0, 3.0]);
    let x: Vec<f32> = (0..2 * 14).map(|i| i as f32 * 0.1 - 1.0).collect();
    for direction in [Direction::Forward, Direction::Backward] {
        // Three heads of four elements and two more columns; the middle head is rotated.
        let (mut plain, mut y) = (x.clone(), x.clone());
        rotate(&mut plain, 14, (1..2, 4), &table, direction);
        rotate(&mut y, 14, (1..2, 4), &scaled, direction);
        for (i, ((y, plain), x)) in y.iter().zip(&plain).zip(&x).enumerate() {
            let (token, column) = (i / 14, i % 14);
            let want = match (4..8).contains(&column) {
                true => plain * [1.0, 3.0][token],
                false => *x,
            };
            assert!((y - want).abs() < 1e-5, "token {token}, column {column}");
        }
        assert_ne!(plain, x);
    }
}

#[test]
fn the_most_likely_tokens_come_first_and_equal_ones_in_the_order_of_their_ids() {
    let mut logits = random(1300, 3);
    for (id, logit) in [(900, 2.0), (7, 2.0), (20, 3.0)] {
        logits[id] = logit;
    }
    let top = most_likely(&logits, 3);
    let ids: Vec<u32> = top.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [20, 7, 900]);
    for (id, likely) in &top {
        assert_eq!(likely.to_bits(), log_prob(&logits, *id).to_bits());
    }
    assert!(most_likely(&logits, 0).is_empty());
    let all = most_likely(&logits[..4], 9);
    let sum: f32 = all.iter().map(|(_, log_prob)| log_prob.exp()).sum();
    assert!(all.len() == 4 && (sum - 1.0).abs() < 1e-5, "{all:?}");
}
