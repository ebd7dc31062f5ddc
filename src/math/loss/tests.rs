//! Compares gradients with central differences for every loss, divergence and weighting, and tests
//! identities of the losses.

use proptest::prelude::*;

use super::*;
use crate::domain::dpo::{Divergence, WeightedLoss};

#[derive(Debug)]
struct Pair {
    chosen: Vec<f32>,
    rejected: Vec<f32>,
    reference: (Vec<f32>, Vec<f32>),
    p2: (Vec<f32>, Vec<f32>),
    weight: f64,
}

fn view<'a>(pairs: &'a [Pair], config: &DpoConfig) -> Vec<PairLogps<'a>> {
    pairs
        .iter()
        .map(|p| PairLogps {
            policy_chosen: &p.chosen,
            policy_rejected: &p.rejected,
            reference: (!config.reference_free)
                .then_some(ReferenceLogps::Tokens(&p.reference.0, &p.reference.1)),
            weight: p.weight,
            wpo: config.wpo.then_some((&p.p2.0, &p.p2.1)),
        })
        .collect()
}

fn logps(n: std::ops::Range<usize>) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(-3.0f32..-0.05, n)
}

fn pair() -> impl Strategy<Value = Pair> {
    (
        logps(1..5),
        logps(1..5),
        logps(4..5),
        logps(4..5),
        0.5f64..2.0,
    )
        .prop_map(|(chosen, rejected, a, b, weight)| {
            let reference = (a[..chosen.len()].to_vec(), b[..rejected.len()].to_vec());
            let p2 = (
                chosen.iter().map(|x| x * 1.1).collect(),
                rejected.iter().map(|x| x * 0.9).collect(),
            );
            Pair {
                chosen,
                rejected,
                reference,
                p2,
                weight,
            }
        })
}

fn config(loss: LossType) -> DpoConfig {
    DpoConfig {
        losses: vec![WeightedLoss::new(loss, 0.7)],
        beta: 0.3,
        label_smoothing: if loss == LossType::ExoPair { 0.01 } else { 0.1 },
        ..DpoConfig::default()
    }
}

/// Compares every token's gradient with a central difference of the loss.
fn check(config: &DpoConfig, pairs: &mut [Pair]) {
    // WPO's weights are constants in the gradient. The differences are therefore computed without
    // WPO, on pairs that are weighted with the constants.
    let analytic = batch_loss(config, &view(pairs, config), 1.0);
    let mut frozen = config.clone();
    if config.wpo {
        frozen.wpo = false;
        let weights: Vec<f64> = view(pairs, config).iter().map(wpo_weight).collect();
        pairs
            .iter_mut()
            .zip(weights)
            .for_each(|(p, w)| p.weight *= w);
    }
    for i in 0..pairs.len() {
        for side in 0..2 {
            let n = if side == 0 {
                pairs[i].chosen.len()
            } else {
                pairs[i].rejected.len()
            };
            for t in 0..n {
                let h = 1.0 / 2048.0; // exact in f32, so that the difference has f64 precision
                let mut at = |d: f32| {
                    let x = if side == 0 {
                        &mut pairs[i].chosen[t]
                    } else {
                        &mut pairs[i].rejected[t]
                    };
                    let old = *x;
                    *x += d;
                    let moved = (
                        *x as f64,
                        batch_loss(&frozen, &view(pairs, &frozen), 1.0).loss,
                    );
                    if side == 0 {
                        pairs[i].chosen[t] = old
                    } else {
                        pairs[i].rejected[t] = old
                    }
                    moved
                };
                let ((x1, up), (x, here), (x0, down)) = (at(h), at(0.0), at(-h));
                let numeric = (up - down) / (x1 - x0);
                // The hinge is piecewise linear. If the slopes on both sides of a point differ, the
                // kink is between them, and the difference is not the gradient.
                let bend = (up - here) / (x1 - x) - (here - down) / (x - x0);
                if config.losses.iter().any(|l| l.loss == LossType::Hinge) && bend.abs() > 1e-4 {
                    continue;
                }
                let g = if side == 0 {
                    analytic.grad_chosen[i][t]
                } else {
                    analytic.grad_rejected[i][t]
                } as f64;
                assert!(
                    (numeric - g).abs() < 2e-4 + 2e-3 * g.abs(),
                    "{:?} {:?}: pair {i} side {side} token {t}: {numeric} vs {g}",
                    config.losses,
                    config.divergence
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 12,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn gradients_match_differences(
        mut pairs in prop::collection::vec(pair(), 1..4),
        ld in any::<bool>(),
        free in any::<bool>(),
        wpo in any::<bool>(),
    ) {
        for loss in LossType::ALL {
            // The hinge and the sorting losses have kinks. A difference across a kink is not the
            // gradient, so these losses are tested with one pair only.
            if matches!(loss, LossType::Hinge | LossType::Aot | LossType::AotUnpaired)
                && pairs.len() > 1
            {
                continue;
            }
            let mut c = config(loss);
            c.ld_alpha = ld.then_some(0.4);
            c.reference_free = free;
            c.wpo = wpo;
            c.rpo_alpha = ld.then_some(0.2);
            let weights: Vec<f64> = pairs.iter().map(|p| p.weight).collect();
            check(&c, &mut pairs);
            pairs.iter_mut().zip(weights).for_each(|(p, w)| p.weight = w);
        }
    }

    #[test]
    fn gradients_match_differences_for_every_divergence(
        mut pairs in prop::collection::vec(pair(), 1..3),
    ) {
        for divergence in [
            Divergence::ForwardKl,
            Divergence::JensenShannon,
            Divergence::Alpha { alpha: 0.5 },
            Divergence::Alpha { alpha: 1.6 },
        ] {
            for loss in LossType::ALL
                .into_iter()
                .filter(|l| l.accepts_divergence() && *l != LossType::Hinge)
            {
                check(&DpoConfig { divergence, dpop_lambda: 0.0, ..config(loss) }, &mut pairs);
            }
        }
    }
}

fn fixed() -> Vec<Pair> {
    let p = |c: f32, r: f32, rc: f32, rr: f32| Pair {
        chosen: vec![c, -0.5],
        rejected: vec![r, -1.5, -0.25],
        reference: (vec![rc, -0.75], vec![rr, -1.0, -0.5]),
        p2: (vec![-0.1; 2], vec![-0.2; 3]),
        weight: 1.0,
    };
    vec![
        p(-1.0, -2.0, -1.5, -1.0),
        p(-3.0, -0.5, -0.5, -2.5),
        p(-0.25, -0.75, -1.25, -0.5),
    ]
}

#[test]
fn sorted_losses_have_their_gradients() {
    for loss in [LossType::Aot, LossType::AotUnpaired, LossType::Hinge] {
        check(&config(loss), &mut fixed());
    }
}

#[test]
fn dpop_penalises_a_falling_chosen_answer_only() {
    let plain = config(LossType::Sigmoid);
    let mut c = config(LossType::Sigmoid);
    c.dpop_lambda = 2.0;
    check(&c, &mut fixed());
    // Only the second chosen answer is less likely than under the reference.
    for (pair, falls) in fixed().iter().zip([false, true, false]) {
        let loss = |c: &DpoConfig| batch_loss(c, &view(std::slice::from_ref(pair), c), 1.0).loss;
        if falls {
            assert!(loss(&c) > loss(&plain));
        } else {
            assert_eq!(loss(&c), loss(&plain));
        }
    }
}

#[test]
fn an_undecided_policy_has_loss_ln_2() {
    let c = DpoConfig::default();
    let pairs = fixed();
    let same: Vec<PairLogps> = pairs
        .iter()
        .map(|p| PairLogps {
            policy_chosen: &p.reference.0,
            policy_rejected: &p.reference.1,
            ..view(std::slice::from_ref(p), &c)[0]
        })
        .collect();
    assert!((batch_loss(&c, &same, 1.0).loss - std::f64::consts::LN_2).abs() < 1e-15);
}

#[test]
fn a_mix_is_the_sum_of_its_parts() {
    let pairs = fixed();
    let loss = |losses: Vec<WeightedLoss>| {
        let c = DpoConfig {
            losses,
            ..DpoConfig::default()
        };
        batch_loss(&c, &view(&pairs, &c), 1.0).loss
    };
    let (a, b) = (
        WeightedLoss::new(LossType::Sigmoid, 0.8),
        WeightedLoss::new(LossType::Sft, 0.3),
    );
    assert!((loss(vec![a, b]) - loss(vec![a]) - loss(vec![b])).abs() < 1e-12);
}

#[test]
fn enormous_margins_stay_finite() {
    for loss in LossType::ALL {
        let c = DpoConfig {
            label_smoothing: 0.01,
            ..config(loss)
        };
        for (w, l) in [(-1e4f32, -1.0f32), (-1.0, -1e4)] {
            let p = PairLogps {
                policy_chosen: &[w],
                policy_rejected: &[l],
                reference: Some(ReferenceLogps::Tokens(&[-1.0], &[-1.0])),
                weight: 1.0,
                wpo: None,
            };
            let out = batch_loss(&c, &[p], 1.0);
            let mut gradients = out.grad_chosen.iter().chain(&out.grad_rejected).flatten();
            assert!(
                out.loss.is_finite() && gradients.all(|g| g.is_finite()),
                "{loss:?}: {out:?}"
            );
        }
    }
}

/// Label smoothing is rejected for losses that ignore it, as determined by
/// [`LossType::smooths_labels`].
#[test]
fn the_losses_that_use_label_smoothing_are_those_that_say_so() {
    let logps = |n: usize, x: f32| vec![x; n];
    let pair = |x: f32| Pair {
        chosen: logps(3, -0.4 * x),
        rejected: logps(2, -1.1 * x),
        reference: (logps(3, -0.7), logps(2, -0.9)),
        p2: (logps(3, -0.4), logps(2, -1.1)),
        weight: 1.0,
    };
    let pairs = [pair(1.0), pair(0.5)];
    for loss in LossType::ALL {
        let of = |label_smoothing| {
            let config = DpoConfig {
                label_smoothing,
                ..config(loss)
            };
            batch_loss(&config, &view(&pairs, &config), 1.0).loss
        };
        assert_eq!(of(0.1) != of(0.2), loss.smooths_labels(), "{}", loss.name());
    }
}
