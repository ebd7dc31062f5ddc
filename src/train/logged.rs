//! Logged reference log-probs: which rows have them, and whether the model agrees with them.
//!
//! A run does not compute the log-probs that its rows carry. Before its first step it computes
//! those of a sample of rows, with the weights that it starts from. Rows that were logged with
//! another model, chat template or tokenizer differ by far more than rounding does.

use super::event::RunEvent;
use crate::domain::dataset::{IssueReason, PreferenceRow, RowIssue};
use crate::domain::logged::{LoggedProblem, REFERENCE_COLUMNS};
use crate::domain::training::Precision;
use crate::infer::pair::EncodedPair;
use crate::infer::scorer::Logps;
use crate::math::rng::epoch_order;
use crate::math::score::total;

/// Maximum number of pairs that are computed for comparison.
pub(super) const SAMPLE_PAIRS: usize = 16;
/// Number of an epoch that no run reaches. The sample is the first pairs in this epoch's order.
const SAMPLE_EPOCH: u64 = u64::MAX;

fn issue(row: &PreferenceRow, field: &str, reason: IssueReason, message: String) -> RowIssue {
    RowIssue {
        row: row.row,
        id: row.id.clone(),
        field: row.column(field),
        reason,
        message,
        of_model: false,
    }
}

/// Returns the reference log-probs of the chosen and of the rejected answer that a row carries.
///
/// # Errors
/// Returns the column that is missing or unusable.
pub(super) fn reference_sums(row: &PreferenceRow) -> Result<[f64; 2], RowIssue> {
    row.logged
        .of_reference()
        .map_err(|LoggedProblem { column, message }| {
            issue(row, &column, IssueReason::MissingField, message)
        })
}

/// Returns the pair with the log-probs that its row carries.
///
/// # Errors
/// Returns the column that is missing or unusable, or the answer that `max_length` cuts: its
/// log-prob was summed over all of its tokens, or over other ones.
pub fn with_logged(pair: EncodedPair, row: &PreferenceRow) -> Result<EncodedPair, RowIssue> {
    let sums = reference_sums(row)?;
    let cut = [
        ("chosen", pair.chosen_truncated, REFERENCE_COLUMNS[0]),
        ("rejected", pair.rejected_truncated, REFERENCE_COLUMNS[1]),
    ];
    if let Some((field, _, column)) = cut.into_iter().find(|(_, is_cut, _)| *is_cut) {
        let message = format!(
            "max_length cuts {field}, but {column} is the log-prob of the whole answer: raise \
             max_length, or leave the row out"
        );
        return Err(issue(row, field, IssueReason::Truncated, message));
    }
    Ok(EncodedPair {
        logged: Some(sums),
        ..pair
    })
}

/// Returns the largest difference in nats between the sums of two correct computations of an answer
/// of `tokens` tokens.
///
/// In f32, libraries that add in another order differ by less than 1e-4 nats a token. Rounding the
/// operands of a matrix multiplication to bf16 changes each by at most 1 in 256, and a token's
/// log-prob by some 0.01 nats, with either sign. An answer of 32 tokens of SmolLM2 differed by 0.6
/// nats, with the tiles of AMX. Another model or another prompt changes a token by a tenth of a nat
/// and more. The constant part is for short answers, in which one token decides.
pub fn allowed_difference(precision: Precision, tokens: usize) -> f64 {
    let (once, each_token) = match precision {
        Precision::F32 => (0.01, 1e-3),
        Precision::Bf16 => (0.2, 2e-2),
    };
    once + each_token * tokens as f64
}

/// Returns the indices of the pairs of the sample, of `pairs` pairs.
pub(super) fn sample(pairs: usize, seed: u64) -> Vec<usize> {
    let order = epoch_order(pairs, seed, SAMPLE_EPOCH);
    order
        .into_iter()
        .take(SAMPLE_PAIRS)
        .map(|i| i as usize)
        .collect()
}

/// Comparison of a sample of pairs with the model.
#[derive(Clone, Debug, Default)]
pub(super) struct Comparison {
    /// Number of pairs that were compared.
    pairs: usize,
    /// Number of pairs of which an answer differs too much.
    differing: usize,
    /// Description of the first one.
    first: Option<String>,
    /// Largest difference of an answer, in nats.
    largest: f64,
}

impl Comparison {
    /// Compares a pair with the log-probs of its tokens. Returns the description of its first
    /// answer that differs too much.
    pub fn add(
        &mut self,
        pair: &EncodedPair,
        model: &Logps,
        precision: Precision,
    ) -> Option<String> {
        let logged = pair.logged?;
        let mut problem = None;
        for ((column, logged), tokens) in REFERENCE_COLUMNS.into_iter().zip(logged).zip(model) {
            let (computed, allowed) = (total(tokens), allowed_difference(precision, tokens.len()));
            let difference = (computed - logged).abs();
            self.largest = self.largest.max(difference);
            if difference > allowed {
                problem.get_or_insert_with(|| {
                    format!(
                        "row {}: {column} is {logged:.4}, but the weights that the job starts from \
                         give {computed:.4} in {} ({difference:.4} nats apart, {allowed:.4} are \
                         allowed for {} tokens)",
                        pair.row,
                        precision.name(),
                        tokens.len()
                    )
                });
            }
        }
        self.pairs += 1;
        self.differing += usize::from(problem.is_some());
        if self.first.is_none() {
            self.first.clone_from(&problem);
        }
        problem
    }

    /// Returns the event with the result.
    pub fn report(&self) -> RunEvent {
        let (pairs, largest) = (self.pairs, self.largest);
        let (severity, message) = match &self.first {
            None => (
                "info",
                format!(
                    "the logged reference log-probs of {pairs} sampled pairs agree with the model, \
                     the largest difference is {largest:.6} nats"
                ),
            ),
            Some(first) => (
                "warning",
                format!(
                    "the logged reference log-probs of {} of {pairs} sampled pairs disagree with \
                     the model; the first, {first}",
                    self.differing
                ),
            ),
        };
        RunEvent::Log { severity, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(logged: [f64; 2]) -> EncodedPair {
        EncodedPair {
            row: 7,
            id: None,
            weight: 1.0,
            prompt: vec![1],
            chosen: vec![2, 3],
            rejected_prompt: None,
            rejected: vec![4],
            chosen_truncated: false,
            rejected_truncated: false,
            logged: Some(logged),
        }
    }

    #[test]
    fn a_sample_follows_from_the_seed_and_has_each_pair_once() {
        let of = |seed| sample(1000, seed);
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        let mut few = sample(5, 1);
        few.sort_unstable();
        assert_eq!(few, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn the_first_answer_that_differs_by_more_than_rounding_is_named() {
        let model: Logps = vec![vec![-1.0, -2.0], vec![-4.0]];
        let mut comparison = Comparison::default();
        let near = pair([-3.0 - 0.011, -4.0 + 0.01]);
        assert_eq!(comparison.add(&near, &model, Precision::F32), None);
        let far = pair([-3.0, -4.2]);
        let problem = comparison.add(&far, &model, Precision::F32).unwrap();
        for part in [
            "row 7",
            "ref_rejected_logps",
            "-4.2000",
            "-4.0000",
            "1 tokens",
            "f32",
        ] {
            assert!(problem.contains(part), "{problem}");
        }
        let RunEvent::Log { severity, message } = comparison.report() else {
            panic!("the report is not a log event");
        };
        assert!(
            severity == "warning" && message.contains("1 of 2"),
            "{message}"
        );
        // In bf16 a token may differ by more.
        let too_far = pair([-3.0, -4.25]);
        assert!(
            Comparison::default()
                .add(&too_far, &model, Precision::Bf16)
                .is_some()
        );
        let rounded = pair([-3.2, -4.2]);
        assert_eq!(
            Comparison::default().add(&rounded, &model, Precision::Bf16),
            None
        );
    }
}
