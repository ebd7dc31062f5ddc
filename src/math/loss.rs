//! DPO and related losses on a micro-batch: the loss and ∂loss/∂log p of every
//! completion token.
//!
//! Notation (arXiv:2305.18290 and TRL): `lr = log π − log π_ref`, each summed over the
//! completion tokens; `w` and `l` mark the chosen and the rejected answer; `s(lr)` is the score of
//! the f-divergence; `δ = s_w − s_l`; `n` is the number of completion tokens; `ε` is the label
//! smoothing.
//!
//! Every loss is a function of four sums (Σ log π and Σ log π_ref of both answers) and of the
//! token counts. The gradient of a token is therefore `∂loss/∂(Σ log π)`, times the token's
//! weight in the sum if LD-DPO weights tokens. The terms that are means over tokens (sft, rpo,
//! orpo's NLL) add a constant to the gradient of each chosen token.

mod pairwise;
#[cfg(test)]
mod tests;

use self::pairwise::{Sums, sorted_transport, value_and_slopes};
use super::score::total;
use crate::domain::dpo::{DpoConfig, LossType};

/// Inputs of the loss for one pair. Log-probs are per completion token, in nats.
#[derive(Clone, Copy, Debug)]
pub struct PairLogps<'a> {
    /// log π of each chosen token.
    pub policy_chosen: &'a [f32],
    /// log π of each rejected token.
    pub policy_rejected: &'a [f32],
    /// Reference log-probs. `None` means no reference (lr = log π).
    pub reference: Option<ReferenceLogps<'a>>,
    /// Factor on the pair's loss.
    pub weight: f64,
    /// With WPO: the policy's log Σ_v p_v² at each chosen and each rejected token.
    pub wpo: Option<(&'a [f32], &'a [f32])>,
}

/// Reference log-probs of a pair, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ReferenceLogps<'a> {
    /// log π_ref of each chosen and each rejected token.
    Tokens(&'a [f32], &'a [f32]),
    /// Σ log π_ref of the chosen and of the rejected answer. LD-DPO, which weights tokens, needs
    /// [`ReferenceLogps::Tokens`].
    Sums([f64; 2]),
}

impl ReferenceLogps<'_> {
    /// Returns Σ log π_ref of the chosen and of the rejected answer.
    pub fn sums(self) -> [f64; 2] {
        match self {
            ReferenceLogps::Tokens(chosen, rejected) => [total(chosen), total(rejected)],
            ReferenceLogps::Sums(sums) => sums,
        }
    }
}

/// Loss of a micro-batch and its gradient.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchLoss {
    /// Σ_terms (weight of the term) · (mean over pairs; for NLL terms, over chosen tokens). Not
    /// multiplied by `scale`.
    pub loss: f64,
    /// scale · ∂loss/∂log p of each chosen token, one list per pair.
    pub grad_chosen: Vec<Vec<f32>>,
    /// scale · ∂loss/∂log p of each rejected token, one list per pair.
    pub grad_rejected: Vec<Vec<f32>>,
}

/// Size of a micro-batch: the denominators of its means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSize {
    /// Number of pairs.
    pub pairs: usize,
    /// Number of tokens in all chosen completions.
    pub chosen_tokens: usize,
}

/// Returns the mean loss over a micro-batch. The gradients are multiplied by `scale`, which is 1 /
/// (number of micro-batches in the step). The weight of a pair multiplies its term, but the mean is
/// still over the number of pairs.
pub fn batch_loss(config: &DpoConfig, pairs: &[PairLogps], scale: f64) -> BatchLoss {
    let chosen_tokens = pairs.iter().map(|p| p.policy_chosen.len()).sum();
    partial_loss(
        config,
        pairs,
        BatchSize {
            pairs: pairs.len(),
            chosen_tokens,
        },
        scale,
    )
}

/// Returns the contribution of some `pairs` to the mean loss of a micro-batch of size `whole`, with
/// their gradients. The contributions of all parts add up to [`batch_loss`], unless the loss
/// compares pairs with each other ([`DpoConfig::compares_pairs`]).
pub fn partial_loss(
    config: &DpoConfig,
    pairs: &[PairLogps],
    whole: BatchSize,
    scale: f64,
) -> BatchLoss {
    let num_pairs = whole.pairs.max(1) as f64;
    let sums: Vec<Sums> = pairs.iter().map(|p| sums(config, p)).collect();
    // WPO's weights are constants in the gradient.
    let weights: Vec<f64> = pairs.iter().map(|p| p.weight * wpo_weight(p)).collect();
    let mut total = 0.0;
    let mut slopes = vec![(0.0, 0.0); pairs.len()];
    let mut nll_factor = config.rpo_alpha.unwrap_or(0.0);

    for term in &config.losses {
        match term.loss {
            LossType::Sft => nll_factor += term.weight,
            LossType::Aot | LossType::AotUnpaired => {
                let (values, ds) = sorted_transport(config, term, &sums);
                for i in 0..pairs.len() {
                    total += term.weight * weights[i] * values[i] / num_pairs;
                    // The i-th loss is computed from the i-th smallest value of each side. `ds[i]`
                    // holds the slopes of pair i, with the index of the loss that each belongs to.
                    slopes[i].0 += term.weight * ds[i].0 * weights[ds[i].2] / num_pairs;
                    slopes[i].1 += term.weight * ds[i].1 * weights[ds[i].3] / num_pairs;
                }
            }
            loss => {
                if loss == LossType::Orpo {
                    nll_factor += term.weight;
                }
                for (i, s) in sums.iter().enumerate() {
                    let (value, dw, dl) = value_and_slopes(config, term, s);
                    let factor = term.weight * weights[i] / num_pairs;
                    total += factor * value;
                    slopes[i].0 += factor * dw;
                    slopes[i].1 += factor * dl;
                }
            }
        }
    }

    let per_token = if whole.chosen_tokens > 0 {
        nll_factor / whole.chosen_tokens as f64
    } else {
        0.0
    };
    let mut out = BatchLoss {
        loss: total,
        ..BatchLoss::default()
    };
    for (i, p) in pairs.iter().enumerate() {
        let nll_slope = -per_token * weights[i];
        if nll_factor > 0.0 {
            out.loss += nll_slope * p.policy_chosen.iter().map(|x| *x as f64).sum::<f64>();
        }
        let shared = p.policy_chosen.len().min(p.policy_rejected.len());
        let token = |t: usize, slope: f64, constant: f64| {
            (scale * (slope * token_weight(config, t, shared) + constant)) as f32
        };
        out.grad_chosen.push(
            (0..p.policy_chosen.len())
                .map(|t| token(t, slopes[i].0, nll_slope))
                .collect(),
        );
        out.grad_rejected.push(
            (0..p.policy_rejected.len())
                .map(|t| token(t, slopes[i].1, 0.0))
                .collect(),
        );
    }
    out
}

/// Returns the weight of a token. LD-DPO (arXiv:2409.06411): tokens beyond the length of the
/// shorter answer, `shared`, have the weight α.
fn token_weight(config: &DpoConfig, token: usize, shared: usize) -> f64 {
    match config.ld_alpha {
        Some(alpha) if token >= shared => alpha,
        _ => 1.0,
    }
}

/// Sums the log-probs of a pair's answers, with the weights of LD-DPO.
fn sums(config: &DpoConfig, p: &PairLogps) -> Sums {
    let shared = p.policy_chosen.len().min(p.policy_rejected.len());
    let sum = |xs: &[f32]| {
        xs.iter()
            .enumerate()
            .map(|(t, x)| *x as f64 * token_weight(config, t, shared))
            .sum::<f64>()
    };
    let [reference_w, reference_l] = match p.reference.filter(|_| !config.reference_free) {
        Some(ReferenceLogps::Tokens(chosen, rejected)) => [sum(chosen), sum(rejected)],
        Some(ReferenceLogps::Sums(sums)) => sums,
        None => [0.0; 2],
    };
    Sums {
        policy_w: sum(p.policy_chosen),
        policy_l: sum(p.policy_rejected),
        reference_w,
        reference_l,
        n_w: p.policy_chosen.len().max(1) as f64,
        n_l: p.policy_rejected.len().max(1) as f64,
    }
}

/// Returns the weight of a pair in WPO (arXiv:2406.11827, eq. 2): w_w·w_l with w =
/// exp(mean_t[log p_t − log Σ_v p_v²]).
fn wpo_weight(p: &PairLogps) -> f64 {
    let mean = |logps: &[f32], p2: &[f32]| {
        logps
            .iter()
            .zip(p2)
            .map(|(a, b)| *a as f64 - *b as f64)
            .sum::<f64>()
            / logps.len().max(1) as f64
    };
    match p.wpo {
        Some((chosen, rejected)) => {
            (mean(p.policy_chosen, chosen) + mean(p.policy_rejected, rejected)).exp()
        }
        None => 1.0,
    }
}
