//! One micro-batch: forward pass, loss, metrics and, when training, backward pass.
//!
//! Each row runs forward and backward before the next one, so that a device holds the activations
//! of only one row at a time. Only losses that compare pairs with each other (AOT) need the forward
//! passes of all rows first.

use candle_core::Result;

use super::backprop::{self, RowTape, SavePolicy};
use super::reference::BatchReferences;
use super::trainable::StepGradients;
use crate::domain::dpo::{DpoConfig, Normalization};
use crate::domain::job::Metrics;
use crate::infer::data_parallel::over_devices;
use crate::infer::pack::{PackedRow, pack_rows_for_devices};
use crate::infer::pair::{EncodedPair, SequenceGroup};
use crate::math::loss::{BatchSize, PairLogps, ReferenceLogps, partial_loss};
use crate::math::metrics::{PairObservation, TokenStats, micro_batch};
use crate::math::score::{AnswerLogps, reward};
use crate::model::decoder::Policy;

/// Pairs over which the loss is averaged.
pub(super) struct MicroBatch<'a> {
    pub dpo: &'a DpoConfig,
    pub policy: &'a Policy,
    pub pairs: &'a [&'a EncodedPair],
    pub references: &'a BatchReferences,
    pub row_tokens: usize,
}

/// Log-probs and statistics of a pair, taken from its row.
struct Sides<'a> {
    /// Index of the pair in the micro-batch.
    pair: usize,
    /// log π_θ of each token, for chosen and rejected.
    logps: [&'a [f32]; 2],
    /// log Σ p² of each token, used by WPO.
    squares: [Vec<f32>; 2],
    stats: [Vec<TokenStats>; 2],
}

fn sides<'a>(row: &PackedRow, tape: &'a RowTape) -> Vec<Sides<'a>> {
    let side = |ranges: &[std::ops::Range<usize>], s: usize| {
        let described = &tape.distributions()[ranges[s].clone()];
        let stats = described
            .iter()
            .map(|d| TokenStats {
                mean_logit: d.mean_logit as f64,
                entropy: d.entropy as f64,
                is_argmax: d.is_argmax,
            })
            .collect();
        (
            &tape.log_probs()[ranges[s].clone()],
            described.iter().map(|d| d.log_sum_p2).collect(),
            stats,
        )
    };
    let of_pair = |(&pair, ranges): (&usize, &Vec<_>)| {
        let ((chosen, p2_chosen, stats_chosen), (rejected, p2_rejected, stats_rejected)) =
            (side(ranges, 0), side(ranges, 1));
        Sides {
            pair,
            logps: [chosen, rejected],
            squares: [p2_chosen, p2_rejected],
            stats: [stats_chosen, stats_rejected],
        }
    };
    row.items
        .iter()
        .zip(&row.completions)
        .map(of_pair)
        .collect()
}

impl MicroBatch<'_> {
    /// Returns the mean loss and its metrics. Adds `scale`·∂loss to `gradients`, which has one
    /// entry for each of the policy's devices.
    pub fn train(
        &self,
        save: SavePolicy,
        scale: f64,
        gradients: &mut [StepGradients],
        yield_point: &mut dyn FnMut(),
    ) -> Result<(f64, Metrics)> {
        let (loss, observations) = self.run(save, scale, Some(gradients), yield_point)?;
        Ok((loss, micro_batch(loss, &observations)))
    }

    /// Returns the mean loss and the observations of each pair.
    pub fn evaluate(&self, yield_point: &mut dyn FnMut()) -> Result<(f64, Vec<PairObservation>)> {
        self.run(SavePolicy::Nothing, 1.0, None, yield_point)
    }

    fn run(
        &self,
        save: SavePolicy,
        scale: f64,
        mut gradients: Option<&mut [StepGradients]>,
        yield_point: &mut dyn FnMut(),
    ) -> Result<(f64, Vec<PairObservation>)> {
        let groups: Vec<Vec<SequenceGroup>> = self.pairs.iter().map(|p| p.groups()).collect();
        let items: Vec<&[SequenceGroup]> = groups.iter().map(Vec::as_slice).collect();
        let devices = self.policy.devices().count();
        let spec = &self.policy.config.spec;
        let class = |length| spec.length_class(length);
        let rows = pack_rows_for_devices(&items, self.row_tokens, devices, &class);
        let at_once = if self.dpo.compares_pairs() {
            rows.len().max(1)
        } else {
            devices
        };
        let mut loss = 0.0;
        let mut observations = vec![PairObservation::default(); self.pairs.len()];
        for rows in rows.chunks(at_once) {
            let forward = |policy: &Policy, row: &PackedRow, yield_point: &mut dyn FnMut()| {
                backprop::forward(policy, row.row.clone(), save, yield_point)
            };
            let tapes = over_devices(self.policy, rows.iter().collect(), yield_point, forward)?;
            let (part, upstream) = self.part(rows, &tapes, scale, &mut observations);
            loss += part;
            let Some(gradients) = gradients.as_deref_mut().filter(|_| loss.is_finite()) else {
                continue;
            };
            // The backward pass of a row runs on the device of its forward pass.
            let mut shares: Vec<Vec<(RowTape, Vec<f32>)>> =
                (0..devices).map(|_| Vec::new()).collect();
            for (i, row) in tapes.into_iter().zip(upstream).enumerate() {
                shares[i % devices].push(row);
            }
            let shares = shares.into_iter().zip(gradients).collect();
            over_devices(
                self.policy,
                shares,
                yield_point,
                |policy, (share, gradients), yield_point| {
                    share.into_iter().try_for_each(|(tape, upstream)| {
                        backprop::backward(policy, tape, &upstream, gradients, yield_point)
                    })
                },
            )?;
        }
        Ok((loss, observations))
    }

    /// Returns the part of the loss that comes from some rows, and ∂loss/∂log p `[N]` for the
    /// targets of each row.
    fn part(
        &self,
        rows: &[PackedRow],
        tapes: &[RowTape],
        scale: f64,
        observations: &mut [PairObservation],
    ) -> (f64, Vec<Vec<f32>>) {
        let all: Vec<Sides> = rows
            .iter()
            .zip(tapes)
            .flat_map(|(row, tape)| sides(row, tape))
            .collect();
        let inputs: Vec<PairLogps> = all
            .iter()
            .map(|s| PairLogps {
                policy_chosen: s.logps[0],
                policy_rejected: s.logps[1],
                reference: self.references.of(s.pair),
                weight: self.pairs[s.pair].weight,
                wpo: self
                    .dpo
                    .wpo
                    .then_some((s.squares[0].as_slice(), s.squares[1].as_slice())),
            })
            .collect();
        let whole = BatchSize {
            pairs: self.pairs.len(),
            chosen_tokens: self.pairs.iter().map(|p| p.chosen.len()).sum(),
        };
        let loss = partial_loss(self.dpo, &inputs, whole, scale);
        let mut upstream: Vec<Vec<f32>> = rows
            .iter()
            .map(|r| vec![0f32; r.row.targets.len()])
            .collect();
        let places = rows
            .iter()
            .enumerate()
            .flat_map(|(r, row)| row.completions.iter().map(move |c| (r, c)));
        for (i, (r, ranges)) in places.enumerate() {
            upstream[r][ranges[0].clone()].copy_from_slice(&loss.grad_chosen[i]);
            upstream[r][ranges[1].clone()].copy_from_slice(&loss.grad_rejected[i]);
        }
        for s in all {
            let reference = self.references.of(s.pair).map(ReferenceLogps::sums);
            let answer = |side: usize| AnswerLogps {
                reference: reference.map(|sums| sums[side]),
                ..AnswerLogps::new(s.logps[side], None)
            };
            let (w, l) = (answer(0), answer(1));
            let rewards = |normalization| {
                (
                    reward(self.dpo.beta, normalization, w),
                    reward(self.dpo.beta, normalization, l),
                )
            };
            let (reward_chosen, reward_rejected) = rewards(self.dpo.logged_normalization());
            let trains_means = self.dpo.reward_normalization() == Normalization::Mean;
            let normalized = trains_means.then(|| rewards(Normalization::Mean));
            let [chosen, rejected] = s.stats;
            observations[s.pair] = PairObservation {
                logp_chosen: w.policy,
                logp_rejected: l.policy,
                reward_chosen,
                reward_rejected,
                normalized,
                chosen,
                rejected,
            };
        }
        (loss.loss, upstream)
    }
}
