//! Comparison of two policies by their answers without randomness, as the judge ranks them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cli::failure::Failure;
use crate::cli::generate::{PromptRow, in_order};
use crate::cli::pairs::{PairMaker, prompt_json};
use crate::cli::progress::WorkProgress;

/// An answer with the judge's reward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct JudgedAnswer {
    pub text: String,
    /// Number of tokens that were generated.
    pub tokens: usize,
    /// The reward, lowered by the length penalty; `None` if the answer cannot be scored whole.
    pub reward: Option<f64>,
}

/// The answers to a prompt before and after a round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ComparedAnswers {
    /// The prompt as a row has it: a text, or a list of messages.
    pub prompt: Value,
    /// Of the round's policy.
    pub before: JudgedAnswer,
    /// Of the policy that the round has trained.
    pub after: JudgedAnswer,
}

impl ComparedAnswers {
    /// Returns 1 if the new policy wins, 0 if the old one does, and 0.5 for a tie. `None` if the
    /// answers differ and one of them has no reward.
    pub fn win(&self) -> Option<f64> {
        if self.before.text == self.after.text {
            return Some(0.5);
        }
        let (before, after) = (self.before.reward?, self.after.reward?);
        Some(match after.partial_cmp(&before)? {
            std::cmp::Ordering::Greater => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Less => 0.0,
        })
    }
}

/// Numbers of prompts whose answers before and after could not be compared, because the answers
/// differ and one of them has no reward.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct NotCompared {
    /// One of the answers is empty or has only white space.
    pub blank: usize,
    /// One of the answers is too long for the judge, or cannot be scored for another reason.
    pub not_scored: usize,
}

impl NotCompared {
    /// Counts the prompts without a comparison.
    pub fn of(answers: &[ComparedAnswers]) -> Self {
        let mut counts = NotCompared::default();
        for answer in answers.iter().filter(|answer| answer.win().is_none()) {
            let texts = [&answer.before.text, &answer.after.text];
            match texts.iter().any(|text| text.trim().is_empty()) {
                true => counts.blank += 1,
                false => counts.not_scored += 1,
            }
        }
        counts
    }

    /// Returns the number of prompts without a comparison.
    pub fn total(&self) -> usize {
        self.blank + self.not_scored
    }
}

/// Compares the answers of two policies to prompts. `title` names the prompts in errors, `what` is
/// the round.
///
/// # Errors
/// Returns a failure if the server refuses a call, or does not answer for long.
pub(super) async fn compare(
    maker: &Arc<PairMaker>,
    (title, what): (&str, &str),
    prompts: &[PromptRow],
    (before, after): (&str, &str),
) -> Result<Vec<ComparedAnswers>, Failure> {
    let total = prompts.len() as u64;
    let progress = WorkProgress::prompts(&format!("{what}: comparing"), total);
    let begin = |row: PromptRow| {
        let context = format!("{title}: {}", row.place);
        let maker = Arc::clone(maker);
        let policies = [before.to_owned(), after.to_owned()];
        async move {
            let compared = compare_prompt(&maker, &row, &policies).await;
            compared.map_err(|failure| failure.with_context(&context))
        }
    };
    let mut all = Vec::with_capacity(prompts.len());
    let work = in_order(prompts.to_vec(), begin, |compared| {
        all.push(compared);
        progress.add(1);
        Ok(())
    });
    progress.during(work).await?;
    drop(progress);
    Ok(all)
}

async fn compare_prompt(
    maker: &PairMaker,
    row: &PromptRow,
    [old, new]: &[String; 2],
) -> Result<ComparedAnswers, Failure> {
    let before = maker.greedy(&row.prompt, old).await?;
    let after = maker.greedy(&row.prompt, new).await?;
    let texts = [before.text, after.text];
    let is_same = texts[0] == texts[1];
    // The server need not score an answer twice.
    let scored = match is_same {
        true => &texts[..1],
        false => &texts[..],
    };
    let rewards = maker.rewards(&row.prompt, scored).await?;
    let first = rewards.first().copied().flatten();
    let second = match is_same {
        true => first,
        false => rewards.get(1).copied().flatten(),
    };
    let [before_text, after_text] = texts;
    Ok(ComparedAnswers {
        prompt: prompt_json(&row.prompt),
        before: JudgedAnswer {
            text: before_text,
            tokens: before.tokens,
            reward: first,
        },
        after: JudgedAnswer {
            text: after_text,
            tokens: after.tokens,
            reward: second,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(before: (&str, Option<f64>), after: (&str, Option<f64>)) -> ComparedAnswers {
        let answer = |(text, reward): (&str, Option<f64>)| JudgedAnswer {
            text: text.into(),
            tokens: 1,
            reward,
        };
        ComparedAnswers {
            prompt: "p".into(),
            before: answer(before),
            after: answer(after),
        }
    }

    fn win(before: (&str, Option<f64>), after: (&str, Option<f64>)) -> Option<f64> {
        answers(before, after).win()
    }

    #[test]
    fn answers_without_a_comparison_are_counted_by_their_reason() {
        let all = [
            answers(("a", Some(0.1)), ("b", Some(0.2))),
            answers((" ", None), (" ", None)),
            answers(("\n", None), ("b", Some(0.1))),
            answers(("a", Some(0.1)), ("", None)),
            answers(("a", Some(0.1)), ("long", None)),
        ];
        let counts = NotCompared::of(&all);
        assert_eq!((counts.blank, counts.not_scored, counts.total()), (2, 1, 3));
    }

    #[test]
    fn the_larger_reward_wins_and_equal_ones_are_a_tie() {
        assert_eq!(win(("a", Some(0.1)), ("b", Some(0.2))), Some(1.0));
        assert_eq!(win(("a", Some(0.2)), ("b", Some(0.1))), Some(0.0));
        assert_eq!(win(("a", Some(0.1)), ("b", Some(0.1))), Some(0.5));
        assert_eq!(win(("a", None), ("a", None)), Some(0.5));
        assert_eq!(win(("a", None), ("b", Some(0.1))), None);
    }
}
