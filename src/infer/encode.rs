//! Text to tokens, as TRL 1.16 tokenises preference rows.
//!
//! Chat: the prompt is rendered with the generation prompt, prompt + answer is rendered whole;
//! plain text: prompt + answer is one text, EOS appended to an answer that lacks it. The prompt's
//! tokens are the longest prefix common to all of them, so that a merge across the boundary cannot
//! be counted on the wrong side. Every later token counts, EOS included.

use std::fmt;
use std::sync::LazyLock;

use jiff::civil::DateTime;

use super::pair::{EncodedPair, SequenceGroup};
use crate::domain::dataset::{ChatMessage, IssueReason, PreferenceRow, RowIssue, Text};
use crate::domain::message::TemplateArguments;
use crate::domain::training::Truncation;
use crate::formats::chat_template::RenderOptions;
use crate::formats::tokenizer::ChatTokenizer;
use crate::model::error::ModelError;

/// A part of what is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The prompt.
    Prompt,
    /// The preferred answer of a row.
    Chosen,
    /// The other answer of a row.
    Rejected,
    /// One of the answers of a list, from 0 on.
    Answer(usize),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Prompt => f.write_str("prompt"),
            Part::Chosen => f.write_str("chosen"),
            Part::Rejected => f.write_str("rejected"),
            Part::Answer(i) => write!(f, "completions[{i}]"),
        }
    }
}

/// Why a text cannot be made into tokens.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The prompt leaves no room for an answer token.
    #[error(
        "the prompt alone has {tokens} tokens, max_length is {max_length}: shorten the prompt or raise max_length"
    )]
    PromptFillsMaxLength {
        /// Tokens of the prompt.
        tokens: usize,
        /// The limit.
        max_length: usize,
    },
    /// No token precedes the answer.
    #[error(
        "the prompt has no tokens, so nothing predicts the answer's first token: give a prompt"
    )]
    EmptyPrompt,
    /// No token is the answer's.
    #[error("{at} has no tokens of its own after the prompt")]
    EmptyCompletion {
        /// The answer.
        at: Part,
    },
    /// Chat and plain text in one item.
    #[error("{at} and the prompt must both be plain text or both be messages")]
    MixedForms {
        /// The answer.
        at: Part,
    },
    /// The tokenizer has tokens that the model does not have.
    #[error(
        "{at} has the token {token:?} with the id {id}, but the model's vocabulary ends at {vocab_size}: remove it, or serve the model with \
         the tokenizer that belongs to it"
    )]
    TokenOutsideVocabulary {
        /// The prompt or the answer.
        at: Part,
        /// The token's text.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },
    /// The tokenizer or the chat template refused.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl EncodeError {
    /// Returns the part that is at fault.
    pub fn part(&self) -> Part {
        match self {
            EncodeError::EmptyCompletion { at }
            | EncodeError::MixedForms { at }
            | EncodeError::TokenOutsideVocabulary { at, .. } => *at,
            EncodeError::PromptFillsMaxLength { .. }
            | EncodeError::EmptyPrompt
            | EncodeError::Model(_) => Part::Prompt,
        }
    }
}

static NO_ARGUMENTS: LazyLock<TemplateArguments> = LazyLock::new(TemplateArguments::default);
/// Tokens of a prompt's cut end that are decoded for a finding.
const MAX_SHOWN_TAIL: usize = 64;

/// Turns rows into tokens for one model and one max_length.
#[derive(Clone, Copy, Debug)]
pub struct PairEncoder<'a> {
    tokenizer: &'a ChatTokenizer,
    max_length: usize,
    truncation: Truncation,
    /// What the chat template sees besides the messages; a row's own tools and variables win.
    arguments: &'a TemplateArguments,
    /// The date that chat templates print; `None` is today's.
    date: Option<DateTime>,
    /// Rows of the model's embedding: ids from here on are refused. `None` does not check.
    vocab_size: Option<usize>,
}

/// Answers to one prompt as tokens.
struct Encoded {
    completions: Vec<EncodedCompletion>,
    /// The end of the prompt's tokens that is in no completion's prompt.
    cut: Vec<u32>,
}

/// One of N completions after encoding.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedCompletion {
    /// The prompt it was given, after truncation.
    pub prompt: Vec<u32>,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Whether max_length cut it.
    pub truncated: bool,
}

impl<'a> PairEncoder<'a> {
    /// An encoder; `max_length` counts the tokens of prompt + completion.
    pub fn new(tokenizer: &'a ChatTokenizer, max_length: usize, truncation: Truncation) -> Self {
        PairEncoder {
            tokenizer,
            max_length,
            truncation,
            arguments: &NO_ARGUMENTS,
            date: None,
            vocab_size: None,
        }
    }

    /// The same with tools and variables for the chat template.
    pub fn with_arguments(self, arguments: &'a TemplateArguments) -> Self {
        PairEncoder { arguments, ..self }
    }

    /// The same with the date that chat templates print.
    pub fn with_date(self, date: DateTime) -> Self {
        PairEncoder { date: Some(date), ..self }
    }

    /// The same for a model with so many rows in its embedding: other tokens are refused.
    pub fn with_vocab_size(self, vocab_size: usize) -> Self {
        PairEncoder { vocab_size: Some(vocab_size), ..self }
    }

    /// Whether the tokenizer has an end-of-sequence token, which ends every plain-text answer.
    pub fn has_eos(&self) -> bool {
        self.tokenizer.eos_token().is_some()
    }

    /// Encodes a validated row.
    pub fn encode_row(&self, row: &PreferenceRow) -> Result<EncodedPair, RowIssue> {
        self.encode_row_with_cut(row).map(|(pair, _)| pair)
    }

    /// [`PairEncoder::encode_row`] with the text of the prompt's end that is left out, if any.
    pub fn encode_row_with_cut(
        &self,
        row: &PreferenceRow,
    ) -> Result<(EncodedPair, Option<String>), RowIssue> {
        let issue = |e: EncodeError| {
            let reason = match &e {
                EncodeError::PromptFillsMaxLength { .. } => IssueReason::PromptFillsMaxLength,
                EncodeError::EmptyPrompt => IssueReason::MissingField,
                EncodeError::EmptyCompletion { .. } => IssueReason::EmptyCompletion,
                EncodeError::MixedForms { .. } | EncodeError::Model(_) => IssueReason::InvalidType,
                EncodeError::TokenOutsideVocabulary { .. } => IssueReason::TokenOutsideVocabulary,
            };
            let field = e.part().to_string();
            RowIssue {
                row: row.row,
                id: row.id.clone(),
                field: row.column(&field),
                reason,
                message: e.to_string(),
            }
        };
        let merged = row.arguments.over(self.arguments);
        let encoder = self.with_arguments(&merged);
        let (pair, cut) =
            encoder.pair_with_cut(&row.prompt, &row.chosen, &row.rejected).map_err(issue)?;
        let tail = match cut.as_slice() {
            [] => None,
            cut => Some(
                self.tokenizer
                    .decode(&cut[..cut.len().min(MAX_SHOWN_TAIL)])
                    .map_err(|e| issue(e.into()))?,
            ),
        };
        Ok((EncodedPair { row: row.row, id: row.id.clone(), weight: row.weight, ..pair }, tail))
    }

    /// Encodes a prompt with two answers.
    pub fn encode_pair(
        &self,
        prompt: &Text,
        a: &Text,
        b: &Text,
    ) -> Result<EncodedPair, EncodeError> {
        self.pair_with_cut(prompt, a, b).map(|(pair, _)| pair)
    }

    fn pair_with_cut(
        &self,
        prompt: &Text,
        a: &Text,
        b: &Text,
    ) -> Result<(EncodedPair, Vec<u32>), EncodeError> {
        let encoded = self.encode(prompt, &[(Part::Chosen, a), (Part::Rejected, b)])?;
        let mut sides = encoded.completions.into_iter();
        // One result per answer.
        let (Some(chosen), Some(rejected)) = (sides.next(), sides.next()) else {
            return Err(EncodeError::EmptyPrompt);
        };
        let pair = EncodedPair {
            row: 0,
            id: None,
            weight: 1.0,
            rejected_prompt: (rejected.prompt != chosen.prompt).then_some(rejected.prompt),
            prompt: chosen.prompt,
            chosen: chosen.tokens,
            rejected: rejected.tokens,
            chosen_truncated: chosen.truncated,
            rejected_truncated: rejected.truncated,
        };
        Ok((pair, encoded.cut))
    }

    /// Encodes a prompt with N answers, each as if it were alone: it begins after the longest
    /// prefix that the prompt and the answer itself share, an error is its own, and says
    /// [`Part::Answer`]`(0)`.
    pub fn encode_completions(
        &self,
        prompt: &Text,
        completions: &[Text],
    ) -> Vec<Result<EncodedCompletion, EncodeError>> {
        let prompt_ids = self.prompt(prompt);
        let encode = |answer: &Text| -> Result<EncodedCompletion, EncodeError> {
            match &prompt_ids {
                Ok(prompt_ids) => self.encode_alone(prompt, prompt_ids, answer),
                // Every answer gets the prompt's error, which cannot be copied.
                Err(_) => self.encode_alone(prompt, &self.prompt(prompt)?, answer),
            }
        };
        completions.iter().map(encode).collect()
    }

    /// Encodes a prompt with answers that are compared with each other, split as
    /// [`PairEncoder::encode_pair`] splits a pair. An error names the answer by its place in the
    /// list.
    pub fn encode_together(
        &self,
        prompt: &Text,
        answers: &[Text],
    ) -> Result<Vec<EncodedCompletion>, EncodeError> {
        let answers: Vec<_> =
            answers.iter().enumerate().map(|(i, answer)| (Part::Answer(i), answer)).collect();
        Ok(self.encode(prompt, &answers)?.completions)
    }

    fn encode_alone(
        &self,
        prompt: &Text,
        prompt_ids: &[u32],
        answer: &Text,
    ) -> Result<EncodedCompletion, EncodeError> {
        let at = Part::Answer(0);
        let ids = self.prompt_and_answer(prompt, at, answer)?;
        match common_prefix(prompt_ids, &ids) {
            0 => Err(EncodeError::EmptyPrompt),
            shared => self.truncate(at, ids, shared),
        }
    }

    /// Encodes answers that begin after the longest prefix that the prompt and all of them share,
    /// as TRL splits pairs.
    fn encode(&self, prompt: &Text, answers: &[(Part, &Text)]) -> Result<Encoded, EncodeError> {
        let prompt_ids = self.prompt(prompt)?;
        let mut whole = Vec::with_capacity(answers.len());
        let mut shared = prompt_ids.len();
        for (at, answer) in answers {
            let ids = self.prompt_and_answer(prompt, *at, answer)?;
            shared = shared.min(common_prefix(&prompt_ids, &ids));
            whole.push(ids);
        }
        if shared == 0 {
            return Err(EncodeError::EmptyPrompt);
        }
        let completions =
            answers.iter().zip(whole).map(|((at, _), ids)| self.truncate(*at, ids, shared));
        Ok(Encoded {
            completions: completions.collect::<Result<_, _>>()?,
            cut: prompt_ids[shared..].to_vec(),
        })
    }

    /// Returns the tokens of a prompt alone.
    fn prompt(&self, prompt: &Text) -> Result<Vec<u32>, EncodeError> {
        match prompt {
            Text::Plain(text) => self.plain(text),
            Text::Chat(messages) => self.chat(messages, true),
        }
    }

    /// Returns the tokens of a prompt with an answer.
    fn prompt_and_answer(
        &self,
        prompt: &Text,
        at: Part,
        answer: &Text,
    ) -> Result<Vec<u32>, EncodeError> {
        match (prompt, answer) {
            (Text::Plain(p), Text::Plain(a)) => {
                self.plain(&format!("{p}{a}{}", self.missing_eos(a)))
            }
            (Text::Chat(p), Text::Chat(a)) => {
                let dialogue: Vec<_> = p.iter().chain(a).cloned().collect();
                self.chat(&dialogue, false)
            }
            _ => Err(EncodeError::MixedForms { at }),
        }
    }

    /// A rendered dialogue.
    fn chat(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, EncodeError> {
        let TemplateArguments { tools, kwargs } = self.arguments;
        let options = RenderOptions {
            add_generation_prompt,
            tools: tools.as_deref(),
            kwargs,
            date: self.date,
        };
        Ok(self
            .tokenizer
            .encode(&self.tokenizer.apply_chat_template(messages, &options)?, false)?)
    }

    /// A plain prompt or text: BOS where the tokenizer adds one, but never a second one before text
    /// that already starts with it.
    fn plain(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        let starts_with_bos =
            self.tokenizer.bos_token().is_some_and(|bos| !bos.is_empty() && text.starts_with(bos));
        Ok(self.tokenizer.encode(text, !starts_with_bos)?)
    }

    fn missing_eos(&self, answer: &str) -> &str {
        match self.tokenizer.eos_token() {
            Some(eos) if !answer.ends_with(eos) => eos,
            _ => "",
        }
    }

    fn truncate(
        &self,
        at: Part,
        ids: Vec<u32>,
        shared: usize,
    ) -> Result<EncodedCompletion, EncodeError> {
        let (n, max) = (ids.len(), self.max_length);
        if n <= shared {
            return Err(EncodeError::EmptyCompletion { at });
        }
        let truncated = n > max;
        let (from, to, split) = match self.truncation {
            _ if !truncated => (0, n, shared),
            Truncation::KeepStart if shared >= max => {
                return Err(EncodeError::PromptFillsMaxLength { tokens: shared, max_length: max });
            }
            Truncation::KeepStart => (0, max, shared),
            // One token of context must stay: where the answer alone fills max_length, its first
            // kept token is the context.
            Truncation::KeepEnd => (n - max, n, shared.max(n - max + 1)),
        };
        self.check_vocabulary(Part::Prompt, &ids[from..split])?;
        self.check_vocabulary(at, &ids[split..to])?;
        Ok(EncodedCompletion {
            prompt: ids[from..split].to_vec(),
            tokens: ids[split..to].to_vec(),
            truncated,
        })
    }

    fn check_vocabulary(&self, at: Part, ids: &[u32]) -> Result<(), EncodeError> {
        let Some(vocab_size) = self.vocab_size else { return Ok(()) };
        let Some(id) = ids.iter().copied().find(|id| *id as usize >= vocab_size) else {
            return Ok(());
        };
        Err(EncodeError::TokenOutsideVocabulary {
            at,
            token: self.tokenizer.decode(&[id])?,
            id,
            vocab_size,
        })
    }
}

/// Returns how many tokens two lists have in common at their beginnings.
fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Groups encoded completions that share a prompt, keeping the order: the log-probs of a packed row
/// come back in the order of `completions`.
pub fn group(completions: &[EncodedCompletion]) -> Vec<SequenceGroup> {
    let mut groups: Vec<SequenceGroup> = Vec::new();
    for c in completions {
        match groups.last_mut() {
            Some(g) if g.prompt == c.prompt => g.completions.push(c.tokens.clone()),
            _ => groups.push(SequenceGroup {
                prompt: c.prompt.clone(),
                completions: vec![c.tokens.clone()],
            }),
        }
    }
    groups
}

#[cfg(test)]
mod tests;
