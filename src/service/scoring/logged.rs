//! Pairs whose log-probs the caller has computed before: of the reference, or of both models.

use crate::domain::dpo::Normalization;
use crate::domain::training::Precision;
use crate::infer::encode::EncodedCompletion;
use crate::math::score::AnswerLogps;
use crate::service::error::{Result, ServiceError};
use crate::train::logged::allowed_difference;

/// Names of the fields with the reference's log-probs, for errors.
const REFERENCE_FIELDS: [&str; 2] = ["pair.logged.reference_a", "pair.logged.reference_b"];
/// Names of the fields with the numbers of tokens.
const TOKENS_FIELDS: [&str; 2] = ["pair.logged.tokens_a", "pair.logged.tokens_b"];
/// The named reference also computes one pair in 16, to compare it with the logged log-probs.
const CHECK_INTERVAL: u8 = 16;

/// Log-probs of a pair's answers a and b that the caller has computed before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoggedPair {
    /// Σ log π_ref of each answer, in nats. The reference then computes nothing. Only a reference
    /// that the request names also computes one pair in 16, as a check.
    pub reference: Option<[f64; 2]>,
    /// Log-probs under the policy. No model computes anything then, not even as a check, and no
    /// text is needed.
    pub policy: Option<LoggedPolicy>,
}

/// The policy's log-probs of a pair's answers a and b.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoggedPolicy {
    /// Σ log π_θ of each answer, in nats.
    pub sums: [f64; 2],
    /// Number of tokens of each answer.
    pub tokens: [Option<u32>; 2],
}

impl LoggedPolicy {
    /// Returns the answers with the log-probs of both models. `needs_reference` is true if the
    /// rewards are measured against a reference.
    ///
    /// # Errors
    /// `InvalidArgument` if the reference's log-probs are missing, or the numbers of tokens for
    /// rewards that are means over tokens.
    pub(super) fn answers(
        self,
        reference: Option<[f64; 2]>,
        needs_reference: bool,
        normalization: Normalization,
    ) -> Result<[AnswerLogps; 2]> {
        if needs_reference && reference.is_none() {
            let message = "is missing: the policy's log-probs give a reward only together with the \
                           reference's; add reference_a and reference_b, or leave policy_a and \
                           policy_b out";
            return Err(ServiceError::invalid(REFERENCE_FIELDS[0], message));
        }
        let missing = TOKENS_FIELDS
            .into_iter()
            .zip(self.tokens)
            .find(|(_, tokens)| tokens.is_none());
        if let (Normalization::Mean, Some((field, _))) = (normalization, missing) {
            let message = "is missing: the rewards are means over tokens, and the text of a pair \
                           with the policy's log-probs is not tokenised; add the number of tokens, \
                           or set options.normalization to SUM";
            return Err(ServiceError::invalid(field, message));
        }
        Ok([0, 1].map(|i| AnswerLogps {
            policy: self.sums[i],
            reference: reference.map(|sums| sums[i]),
            tokens: self.tokens[i].unwrap_or(0) as usize,
        }))
    }
}

/// Checks that no answer is cut: its log-prob was summed over all of its tokens.
///
/// # Errors
/// `InvalidArgument` with the first answer that is cut.
pub(super) fn refuse_truncated(encoded: &[EncodedCompletion]) -> Result<()> {
    match encoded
        .iter()
        .zip(REFERENCE_FIELDS)
        .find(|(answer, _)| answer.truncated)
    {
        None => Ok(()),
        Some((_, field)) => Err(ServiceError::invalid(
            field,
            "is the log-prob of the whole answer, but max_length cuts prompt + answer: raise \
             options.max_length, or leave the pair's logged log-probs out",
        )),
    }
}

/// Returns true if the named reference also computes the pair: the first byte of a hash of the
/// tokens of its prompt and answers is a multiple of [`CHECK_INTERVAL`]. So the same pairs are
/// checked each time. If many pairs have the same answers, some of them are checked, because their
/// prompts differ.
pub(super) fn is_checked(encoded: &[EncodedCompletion]) -> bool {
    let mut hash = blake3::Hasher::new();
    for answer in encoded {
        for id in answer.prompt.iter().chain(&answer.tokens) {
            hash.update(&id.to_le_bytes());
        }
    }
    hash.finalize().as_bytes()[0].is_multiple_of(CHECK_INTERVAL)
}

/// Compares the log-probs that the caller gave with those that the reference has computed for the
/// answers with these numbers of tokens.
///
/// # Errors
/// `InvalidArgument` with both numbers if an answer's differ by more than rounding.
pub(super) fn compare(
    logged: [f64; 2],
    computed: [Option<f64>; 2],
    tokens: [usize; 2],
    precision: Precision,
) -> Result<()> {
    for (i, field) in REFERENCE_FIELDS.into_iter().enumerate() {
        let (Some(computed), allowed) = (computed[i], allowed_difference(precision, tokens[i]))
        else {
            continue;
        };
        let difference = (computed - logged[i]).abs();
        if difference > allowed {
            let message = format!(
                "is {:.4}, but options.reference gives {computed:.4} in {} ({difference:.4} nats \
                 apart, {allowed:.4} are allowed for {} tokens): name the reference that it was \
                 computed with, or none",
                logged[i],
                precision.name(),
                tokens[i]
            );
            return Err(ServiceError::invalid(field, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_pairs_with_the_same_answers_are_checked() {
        let answer = |prompt: u32, token: u32| EncodedCompletion {
            prompt: vec![prompt],
            tokens: vec![token],
            truncated: false,
        };
        let is_one = |prompt: &u32| is_checked(&[answer(*prompt, 1), answer(*prompt, 2)]);
        let checked = (0..1600).filter(is_one).count();
        assert!((50..150).contains(&checked), "{checked} of 1600");
    }
}
