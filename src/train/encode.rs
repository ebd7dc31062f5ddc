//! Text to tokens, as TRL 1.16 tokenises preference rows.
//!
//! Chat: the prompt is rendered with the generation prompt, prompt + answer is rendered whole; plain text: prompt + answer is one text, EOS appended
//! to an answer that lacks it. The prompt's tokens are the longest prefix common to all of them, so that a merge across the boundary cannot be
//! counted on the wrong side. Every later token counts, EOS included.

use crate::domain::dataset::{IssueReason, PreferenceRow, RowIssue, Text};
use crate::domain::training::Truncation;
use crate::model::error::ModelError;
use crate::model::tokenizer::ChatTokenizer;
use crate::train::pair::{EncodedPair, SequenceGroup};

/// Why a text cannot be made into tokens.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The prompt leaves no room for an answer token.
    #[error("the prompt alone has {tokens} tokens, max_length is {max_length}: shorten the prompt or raise max_length")]
    PromptFillsMaxLength {
        /// Tokens of the prompt.
        tokens: usize,
        /// The limit.
        max_length: usize,
    },
    /// No token precedes the answer.
    #[error("the prompt has no tokens, so nothing predicts the answer's first token: give a prompt")]
    EmptyPrompt,
    /// No token is the answer's.
    #[error("{field} has no tokens of its own after the prompt")]
    EmptyCompletion {
        /// chosen, rejected or `completions[i]`.
        field: String,
    },
    /// Chat and plain text in one item.
    #[error("{field} and the prompt must both be plain text or both be messages")]
    MixedForms {
        /// chosen, rejected or `completions[i]`.
        field: String,
    },
    /// The tokenizer or the chat template refused.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// Turns rows into tokens for one model and one max_length.
#[derive(Clone, Copy, Debug)]
pub struct PairEncoder<'a> {
    tokenizer: &'a ChatTokenizer,
    max_length: usize,
    truncation: Truncation,
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
        PairEncoder { tokenizer, max_length, truncation }
    }

    /// Whether the tokenizer has an end-of-sequence token, which ends every plain-text answer.
    pub fn has_eos(&self) -> bool {
        self.tokenizer.eos_token().is_some()
    }

    /// Encodes a validated row.
    pub fn encode_row(&self, row: &PreferenceRow) -> Result<EncodedPair, RowIssue> {
        let issue = |e: EncodeError| {
            let (field, reason) = match &e {
                EncodeError::PromptFillsMaxLength { .. } => ("prompt".to_owned(), IssueReason::PromptFillsMaxLength),
                EncodeError::EmptyPrompt => ("prompt".to_owned(), IssueReason::MissingField),
                EncodeError::EmptyCompletion { field } => (field.clone(), IssueReason::EmptyCompletion),
                EncodeError::MixedForms { field } => (field.clone(), IssueReason::InvalidType),
                EncodeError::Model(_) => ("prompt".to_owned(), IssueReason::InvalidType),
            };
            RowIssue { row: row.row, id: row.id.clone(), field: row.column(&field), reason, message: e.to_string() }
        };
        let pair = self.encode_pair(&row.prompt, &row.chosen, &row.rejected).map_err(issue)?;
        Ok(EncodedPair { row: row.row, id: row.id.clone(), weight: row.weight, ..pair })
    }

    /// Encodes a prompt with two answers.
    pub fn encode_pair(&self, prompt: &Text, a: &Text, b: &Text) -> Result<EncodedPair, EncodeError> {
        let mut sides = self.encode(prompt, &[("chosen".into(), a), ("rejected".into(), b)])?.into_iter();
        // One result per answer.
        let (Some(chosen), Some(rejected)) = (sides.next(), sides.next()) else { return Err(EncodeError::EmptyPrompt) };
        Ok(EncodedPair {
            row: 0,
            id: None,
            weight: 1.0,
            rejected_prompt: (rejected.prompt != chosen.prompt).then_some(rejected.prompt),
            prompt: chosen.prompt,
            chosen: chosen.tokens,
            rejected: rejected.tokens,
            chosen_truncated: chosen.truncated,
            rejected_truncated: rejected.truncated,
        })
    }

    /// Encodes a prompt with N answers. An error in one answer is the call's error: use one call per answer to keep them apart.
    pub fn encode_completions(&self, prompt: &Text, completions: &[Text]) -> Result<Vec<EncodedCompletion>, EncodeError> {
        let named: Vec<(String, &Text)> = completions.iter().enumerate().map(|(i, c)| (format!("completions[{i}]"), c)).collect();
        self.encode(prompt, &named)
    }

    fn encode(&self, prompt: &Text, answers: &[(String, &Text)]) -> Result<Vec<EncodedCompletion>, EncodeError> {
        let prompt_ids = match prompt {
            Text::Plain(text) => self.plain(text)?,
            Text::Chat(messages) => self.tokenizer.encode(&self.tokenizer.apply_chat_template(messages, true)?, false)?,
        };
        let mut whole = Vec::with_capacity(answers.len());
        let mut shared = prompt_ids.len();
        for (field, answer) in answers {
            let ids = match (prompt, answer) {
                (Text::Plain(p), Text::Plain(a)) => self.plain(&format!("{p}{a}{}", self.missing_eos(a)))?,
                (Text::Chat(p), Text::Chat(a)) => {
                    let dialogue: Vec<_> = p.iter().chain(a).cloned().collect();
                    self.tokenizer.encode(&self.tokenizer.apply_chat_template(&dialogue, false)?, false)?
                }
                _ => return Err(EncodeError::MixedForms { field: field.clone() }),
            };
            shared = shared.min(prompt_ids.iter().zip(&ids).take_while(|(a, b)| a == b).count());
            whole.push(ids);
        }
        if shared == 0 {
            return Err(EncodeError::EmptyPrompt);
        }
        answers.iter().zip(whole).map(|((field, _), ids)| self.truncate(field, ids, shared)).collect()
    }

    /// A plain prompt or text: BOS where the tokenizer adds one, but never a second one before text that already starts with it.
    fn plain(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        let starts_with_bos = self.tokenizer.bos_token().is_some_and(|bos| !bos.is_empty() && text.starts_with(bos));
        Ok(self.tokenizer.encode(text, !starts_with_bos)?)
    }

    fn missing_eos(&self, answer: &str) -> &str {
        match self.tokenizer.eos_token() {
            Some(eos) if !answer.ends_with(eos) => eos,
            _ => "",
        }
    }

    fn truncate(&self, field: &str, ids: Vec<u32>, shared: usize) -> Result<EncodedCompletion, EncodeError> {
        let (n, max) = (ids.len(), self.max_length);
        if n <= shared {
            return Err(EncodeError::EmptyCompletion { field: field.to_owned() });
        }
        let truncated = n > max;
        let (from, to, split) = match self.truncation {
            _ if !truncated => (0, n, shared),
            Truncation::KeepStart if shared >= max => {
                return Err(EncodeError::PromptFillsMaxLength { tokens: shared, max_length: max });
            }
            Truncation::KeepStart => (0, max, shared),
            // One token of context must stay: where the answer alone fills max_length, its first kept token is the context.
            Truncation::KeepEnd => (n - max, n, shared.max(n - max + 1)),
        };
        Ok(EncodedCompletion { prompt: ids[from..split].to_vec(), tokens: ids[split..to].to_vec(), truncated })
    }
}

/// Groups encoded completions that share a prompt, keeping the order: the log-probs of a packed row come back in the order of `completions`.
pub fn group(completions: &[EncodedCompletion]) -> Vec<SequenceGroup> {
    let mut groups: Vec<SequenceGroup> = Vec::new();
    for c in completions {
        match groups.last_mut() {
            Some(g) if g.prompt == c.prompt => g.completions.push(c.tokens.clone()),
            _ => groups.push(SequenceGroup { prompt: c.prompt.clone(), completions: vec![c.tokens.clone()] }),
        }
    }
    groups
}
