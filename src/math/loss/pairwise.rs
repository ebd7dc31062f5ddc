//! The losses as functions of a pair's sums, with their slopes ∂/∂Σlog π_w and
//! ∂/∂Σlog π_l. The notation is that of [`super`].

use crate::domain::dpo::{Divergence, DpoConfig, LossType, WeightedLoss};
use crate::math::{log_sigmoid, sigmoid};

/// The inputs of a loss for one pair.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sums {
    /// Σ log π over the chosen completion.
    pub policy_w: f64,
    /// Σ log π over the rejected completion.
    pub policy_l: f64,
    /// Σ log π_ref over the chosen completion; 0 without a reference.
    pub reference_w: f64,
    /// Σ log π_ref over the rejected completion; 0 without a reference.
    pub reference_l: f64,
    /// Number of tokens in the chosen completion.
    pub n_w: f64,
    /// Number of tokens in the rejected completion.
    pub n_l: f64,
}

impl Sums {
    fn lr_w(&self) -> f64 {
        self.policy_w - self.reference_w
    }

    fn lr_l(&self) -> f64 {
        self.policy_l - self.reference_l
    }
}

/// Exponents are clamped to this maximum, as in TRL, to avoid overflow in f32.
const MAX_EXPONENT: f64 = 80.0;

/// Returns s(lr) and s'(lr).
fn score(divergence: Divergence, lr: f64) -> (f64, f64) {
    match divergence {
        Divergence::ReverseKl => (lr, 1.0),
        Divergence::ForwardKl => {
            let e = (-lr).min(MAX_EXPONENT).exp();
            (1.0 - e, if -lr > MAX_EXPONENT { 0.0 } else { e })
        }
        Divergence::JensenShannon => (std::f64::consts::LN_2 + log_sigmoid(lr), sigmoid(-lr)),
        Divergence::Alpha { alpha } => {
            let t = (alpha - 1.0) * lr;
            let e = t.min(MAX_EXPONENT).exp();
            (
                (e - 1.0) / (alpha - 1.0),
                if t > MAX_EXPONENT { 0.0 } else { e },
            )
        }
    }
}

/// Returns −(1−ε)·log σ(z) − ε·log σ(−z) and its derivative with respect to z.
fn smoothed(z: f64, eps: f64) -> (f64, f64) {
    (
        -(1.0 - eps) * log_sigmoid(z) - eps * log_sigmoid(-z),
        sigmoid(z) - (1.0 - eps),
    )
}

/// Returns a pair's loss and its slopes ∂/∂Σlog π_w and ∂/∂Σlog π_l. It returns zeros
/// for the losses that the caller computes: aot and aot_unpaired, which compare pairs, and sft, a
/// mean over tokens. The result for orpo does not include its NLL term.
pub(super) fn value_and_slopes(
    config: &DpoConfig,
    term: &WeightedLoss,
    s: &Sums,
) -> (f64, f64, f64) {
    let (beta, eps) = (config.beta, config.smoothing(term));
    let (lr_w, lr_l) = (s.lr_w(), s.lr_l());
    let ((s_w, ds_w), (s_l, ds_l)) = (
        score(config.divergence, lr_w),
        score(config.divergence, lr_l),
    );
    let delta = s_w - s_l;
    // Applies the chain rule to a loss that depends on δ only, given f(δ) and f'(δ).
    let of_delta = |(value, slope): (f64, f64)| (value, slope * ds_w, -slope * ds_l);
    let (r_w, r_l) = (beta * lr_w, beta * lr_l);

    match term.loss {
        LossType::Sigmoid => {
            // DPOP (arXiv:2402.13228, eq. 3) subtracts λ·max(0, −lr_w) inside; λ = 0 is
            // plain DPO.
            let lambda = config.dpop_lambda;
            let (value, slope) = smoothed(beta * (delta - lambda * (-lr_w).max(0.0)), eps);
            let penalty = if lr_w < 0.0 { lambda } else { 0.0 };
            (value, slope * beta * (ds_w + penalty), -slope * beta * ds_l)
        }
        LossType::Hinge => {
            let gap = 1.0 - beta * delta;
            of_delta(if gap > 0.0 { (gap, -beta) } else { (0.0, 0.0) })
        }
        LossType::Ipo => {
            let gap = s_w / s.n_w - s_l / s.n_l - 1.0 / (2.0 * beta);
            (
                gap * gap,
                2.0 * gap * ds_w / s.n_w,
                -2.0 * gap * ds_l / s.n_l,
            )
        }
        LossType::ExoPair => {
            let z = beta * delta;
            let (p, q) = (sigmoid(z), sigmoid(-z));
            let (a, b) = (
                log_sigmoid(z) - (1.0 - eps).ln(),
                log_sigmoid(-z) - eps.ln(),
            );
            // d/dz [p·a + q·b] = p·q·(a − b) + p·q − q·p.
            of_delta((p * a + q * b, beta * p * q * (a - b)))
        }
        LossType::NcaPair => {
            let value = -log_sigmoid(r_w) - 0.5 * log_sigmoid(-r_w) - 0.5 * log_sigmoid(-r_l);
            (
                value,
                beta * (-sigmoid(-r_w) + 0.5 * sigmoid(r_w)),
                beta * 0.5 * sigmoid(r_l),
            )
        }
        LossType::Robust => {
            let z = beta * delta;
            let value = (-(1.0 - eps) * log_sigmoid(z) + eps * log_sigmoid(-z)) / (1.0 - 2.0 * eps);
            let slope = (-(1.0 - eps) * sigmoid(-z) - eps * sigmoid(z)) / (1.0 - 2.0 * eps);
            of_delta((value, beta * slope))
        }
        LossType::BcoPair => (
            -log_sigmoid(r_w) - log_sigmoid(-r_l),
            -beta * sigmoid(-r_w),
            beta * sigmoid(r_l),
        ),
        LossType::SppoHard => {
            let (a, b) = (lr_w - 0.5 / beta, lr_l + 0.5 / beta);
            (a * a + b * b, 2.0 * a, 2.0 * b)
        }
        LossType::ApoZero => (
            1.0 - sigmoid(r_w) + sigmoid(r_l),
            -beta * sigmoid(r_w) * sigmoid(-r_w),
            beta * sigmoid(r_l) * sigmoid(-r_l),
        ),
        LossType::ApoDown => {
            let z = beta * (lr_w - lr_l);
            let d = beta * sigmoid(z) * sigmoid(-z);
            (
                sigmoid(r_w) + 1.0 - sigmoid(z),
                beta * sigmoid(r_w) * sigmoid(-r_w) - d,
                d,
            )
        }
        LossType::Discopop => {
            let (z, tau) = (beta * delta, config.discopop_tau);
            let m = sigmoid(z / tau);
            let logistic = -log_sigmoid(z);
            // m·e^(−z), computed so that it stays finite where e^(−z) alone overflows.
            let exponential = (log_sigmoid(z / tau) - z).exp();
            let rise = sigmoid(-z / tau) / tau;
            let slope =
                -sigmoid(-z) * (1.0 - m) - exponential + rise * (exponential - m * logistic);
            of_delta((logistic * (1.0 - m) + exponential, beta * slope))
        }
        LossType::SigmoidNorm => {
            let z = beta * (s_w / s.n_w - s_l / s.n_l);
            let slope = -beta * sigmoid(-z);
            (-log_sigmoid(z), slope * ds_w / s.n_w, -slope * ds_l / s.n_l)
        }
        LossType::Simpo => {
            // arXiv:2405.14734, eq. 6.
            let z = beta * (s.policy_w / s.n_w - s.policy_l / s.n_l) - config.simpo_gamma;
            let (value, slope) = smoothed(z, eps);
            (value, slope * beta / s.n_w, -slope * beta / s.n_l)
        }
        LossType::Orpo => {
            // arXiv:2403.07691, eq. 6–7, on mean log-probs a: log-odds(a) = a − log(1 − e^a),
            // slope 1/(1 − e^a).
            let odds = |a: f64| {
                let a = a.min(-1e-12);
                (a - (-a.exp_m1()).ln(), -1.0 / a.exp_m1())
            };
            let ((o_w, do_w), (o_l, do_l)) = (odds(s.policy_w / s.n_w), odds(s.policy_l / s.n_l));
            let z = o_w - o_l;
            let slope = -config.orpo_lambda * sigmoid(-z);
            (
                -config.orpo_lambda * log_sigmoid(z),
                slope * do_w / s.n_w,
                -slope * do_l / s.n_l,
            )
        }
        LossType::Aot | LossType::AotUnpaired | LossType::Sft => (0.0, 0.0, 0.0),
    }
}

/// Computes AOT (arXiv:2406.05882), the losses of the sorted differences. Returns the k-th loss for
/// each k. Also returns for each pair: the slopes of its chosen and its rejected side, then for
/// each of the two sides the index k of the loss that the side is part of.
#[allow(clippy::type_complexity)]
pub(super) fn sorted_transport(
    config: &DpoConfig,
    term: &WeightedLoss,
    sums: &[Sums],
) -> (Vec<f64>, Vec<(f64, f64, usize, usize)>) {
    let order = |key: &dyn Fn(&Sums) -> f64| {
        let mut order: Vec<usize> = (0..sums.len()).collect();
        order.sort_by(|a, b| key(&sums[*a]).total_cmp(&key(&sums[*b])));
        order
    };
    let mut values = Vec::with_capacity(sums.len());
    let mut slopes = vec![(0.0, 0.0, 0, 0); sums.len()];
    let beta = config.beta;
    let (upper, lower) = match term.loss {
        LossType::AotUnpaired => (order(&Sums::lr_w), order(&Sums::lr_l)),
        _ => (
            order(&|s| s.policy_w - s.policy_l),
            order(&|s| s.reference_w - s.reference_l),
        ),
    };
    for (k, (&i, &j)) in upper.iter().zip(&lower).enumerate() {
        let delta = match term.loss {
            LossType::AotUnpaired => sums[i].lr_w() - sums[j].lr_l(),
            _ => {
                (sums[i].policy_w - sums[i].policy_l) - (sums[j].reference_w - sums[j].reference_l)
            }
        };
        let (value, slope) = smoothed(beta * delta, config.smoothing(term));
        values.push(value);
        (slopes[i].0, slopes[i].2) = (beta * slope, k);
        match term.loss {
            LossType::AotUnpaired => (slopes[j].1, slopes[j].3) = (-beta * slope, k),
            _ => (slopes[i].1, slopes[i].3) = (-beta * slope, k),
        }
    }
    (values, slopes)
}
