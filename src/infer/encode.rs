//! Tokenises preference rows as TRL 1.16 does.
//!
//! Chat: the prompt is rendered with the generation prompt, and prompt + answer is rendered as one
//! dialogue. Plain text: prompt + answer is one text, and EOS is appended to an answer that lacks
//! it.
//!
//! The prompt's tokens are the longest common prefix of the tokenised prompt and of every tokenised
//! prompt + answer. A token that spans the boundary therefore belongs to the answer. Every token
//! after the prefix is part of the answer, EOS included.

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

/// A part of the input, for error messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The prompt.
    Prompt,
    /// The preferred answer of a row.
    Chosen,
    /// The dispreferred answer of a row.
    Rejected,
    /// The answer with this index in a list, counted from 0.
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

/// Reason why a text cannot be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The prompt leaves no room for an answer token within `max_length`.
    #[error(
        "the prompt alone has {tokens} tokens, max_length is {max_length}: shorten the prompt or \
         raise max_length"
    )]
    PromptFillsMaxLength {
        /// Number of tokens in the prompt.
        tokens: usize,
        /// Maximum number of tokens in prompt + answer.
        max_length: usize,
    },
    /// The prompt has no tokens, or its first token is another one in prompt + answer.
    #[error(
        "no token belongs to the prompt alone, so nothing predicts the answer's first token: give \
         a prompt, or a longer one"
    )]
    EmptyPrompt,
    /// The answer has no tokens.
    #[error("{at} has no tokens of its own after the prompt")]
    EmptyCompletion {
        /// The answer concerned.
        at: Part,
    },
    /// One of prompt and answer is a chat, the other one plain text.
    #[error("{at} and the prompt must both be plain text or both be messages")]
    MixedForms {
        /// The answer concerned.
        at: Part,
    },
    /// The tokenizer produced a token that the model's vocabulary does not have.
    #[error(
        "{at} has the token {token:?} with the id {id}, but the model's vocabulary has only \
         {vocab_size} tokens: remove it, or serve the model with the tokenizer that belongs to it"
    )]
    TokenOutsideVocabulary {
        /// The part that contains the token.
        at: Part,
        /// The token's text.
        token: String,
        /// The token's id.
        id: u32,
        /// Number of rows in the model's embedding.
        vocab_size: usize,
    },
    /// The tokenizer failed, or the chat template refused the messages.
    #[error("{error}")]
    Model {
        /// The prompt if it fails alone, otherwise the answer that was encoded after it.
        at: Part,
        /// The error of the tokenizer or the template.
        error: ModelError,
    },
}

impl EncodeError {
    /// Returns the part of the input that caused the error.
    pub fn part(&self) -> Part {
        match self {
            EncodeError::EmptyCompletion { at }
            | EncodeError::MixedForms { at }
            | EncodeError::Model { at, .. }
            | EncodeError::TokenOutsideVocabulary { at, .. } => *at,
            EncodeError::PromptFillsMaxLength { .. } | EncodeError::EmptyPrompt => Part::Prompt,
        }
    }

    /// Returns the message without the name of the part, for callers that know it by another name.
    pub fn problem(&self) -> String {
        let message = self.to_string();
        let name = format!("{} ", self.part());
        match message.strip_prefix(&name) {
            Some(problem) => problem.to_owned(),
            None => message,
        }
    }
}

static NO_ARGUMENTS: LazyLock<TemplateArguments> = LazyLock::new(TemplateArguments::default);
/// Maximum number of tokens of the prompt's cut tail that are decoded for a message.
const MAX_CUT_TOKENS_SHOWN: usize = 64;

/// Encodes rows for one model and one `max_length`.
#[derive(Clone, Copy, Debug)]
pub struct PairEncoder<'a> {
    tokenizer: &'a ChatTokenizer,
    /// Maximum number of tokens in prompt + completion.
    max_length: usize,
    truncation: Truncation,
    /// Tools and variables for the chat template. Those of a row take precedence.
    arguments: &'a TemplateArguments,
    /// Date that chat templates print. `None` means today.
    date: Option<DateTime>,
    /// Number of rows in the model's embedding. Ids from this number on are rejected. `None` turns
    /// the check off.
    vocab_size: Option<usize>,
}

/// Result of encoding the answers to one prompt.
struct Encoded {
    completions: Vec<EncodedCompletion>,
    /// Tail of the prompt's tokens that is not in the common prefix.
    cut: Vec<u32>,
}

/// An encoded completion with its prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedCompletion {
    /// Token ids of the prompt, after truncation.
    pub prompt: Vec<u32>,
    /// Token ids of the completion, after truncation.
    pub tokens: Vec<u32>,
    /// True if prompt + completion was longer than `max_length` and was truncated.
    pub truncated: bool,
}

impl<'a> PairEncoder<'a> {
    /// Makes an encoder. `max_length` is the maximum number of tokens in prompt + completion.
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

    /// Returns the encoder with tools and variables for the chat template.
    pub fn with_arguments(self, arguments: &'a TemplateArguments) -> Self {
        PairEncoder { arguments, ..self }
    }

    /// Returns the encoder with the date that chat templates print.
    pub fn with_date(self, date: DateTime) -> Self {
        PairEncoder {
            date: Some(date),
            ..self
        }
    }

    /// Returns the encoder for a model with `vocab_size` rows in its embedding. Tokens with
    /// ids from `vocab_size` on are then rejected.
    pub fn with_vocab_size(self, vocab_size: usize) -> Self {
        PairEncoder {
            vocab_size: Some(vocab_size),
            ..self
        }
    }

    /// Returns true if the tokenizer has an end-of-sequence token. It is then the last token of
    /// every plain-text answer whose end is not truncated.
    pub fn has_eos(&self) -> bool {
        self.tokenizer.eos_token().is_some()
    }

    /// Encodes a validated row.
    ///
    /// # Errors
    /// Returns the field of the row that cannot be encoded and the reason.
    pub fn encode_row(&self, row: &PreferenceRow) -> Result<EncodedPair, RowIssue> {
        self.encode_row_with_cut(row).map(|(pair, _)| pair)
    }

    /// Encodes a validated row like [`PairEncoder::encode_row`]. Also returns the text of the
    /// prompt's tail that is not in the common prefix, if there is such a tail: at most 64 tokens
    /// of it.
    ///
    /// # Errors
    /// Returns the field of the row that cannot be encoded and the reason.
    pub fn encode_row_with_cut(
        &self,
        row: &PreferenceRow,
    ) -> Result<(EncodedPair, Option<String>), RowIssue> {
        let issue = |e: EncodeError| {
            let reason = match &e {
                EncodeError::PromptFillsMaxLength { .. } => IssueReason::PromptFillsMaxLength,
                EncodeError::EmptyPrompt => IssueReason::MissingField,
                EncodeError::EmptyCompletion { .. } => IssueReason::EmptyCompletion,
                EncodeError::MixedForms { .. } | EncodeError::Model { .. } => {
                    IssueReason::InvalidType
                }
                EncodeError::TokenOutsideVocabulary { .. } => IssueReason::TokenOutsideVocabulary,
            };
            let field = e.part().to_string();
            let message = match &e {
                EncodeError::Model {
                    error: ModelError::ChatTemplate { .. },
                    ..
                } => format!("{e}: correct the row, or use a model whose template accepts it"),
                _ => e.to_string(),
            };
            RowIssue {
                row: row.row,
                id: row.id.clone(),
                field: row.column(&field),
                reason,
                message,
                of_model: !matches!(e, EncodeError::MixedForms { .. }),
            }
        };
        let merged = row.arguments.over(self.arguments);
        let encoder = self.with_arguments(&merged);
        let (pair, cut) = encoder
            .pair_with_cut(&row.prompt, &row.chosen, &row.rejected)
            .map_err(issue)?;
        let tail = match cut.as_slice() {
            [] => None,
            cut => Some(
                self.tokenizer
                    .decode(&cut[..cut.len().min(MAX_CUT_TOKENS_SHOWN)])
                    .map_err(|error| {
                        let at = Part::Prompt;
                        issue(EncodeError::Model { at, error })
                    })?,
            ),
        };
        Ok((
            EncodedPair {
                row: row.row,
                id: row.id.clone(),
                weight: row.weight,
                ..pair
            },
            tail,
        ))
    }

    /// Encodes a prompt with two answers: `a` is the chosen one, `b` the rejected one.
    ///
    /// # Errors
    /// Returns the reason why the prompt or an answer cannot be encoded.
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
        // `encode` returns one completion per answer, so this is never an error.
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
            logged: None,
        };
        Ok((pair, encoded.cut))
    }

    /// Encodes a prompt with N independent answers. Each is encoded as if it were the only one: its
    /// prompt is the longest common prefix of the prompt and this prompt + answer. Returns one
    /// result per answer.
    pub fn encode_completions(
        &self,
        prompt: &Text,
        completions: &[Text],
    ) -> Vec<Result<EncodedCompletion, EncodeError>> {
        let prompt_ids = self.encode_prompt(prompt);
        let encode = |(i, answer): (usize, &Text)| -> Result<EncodedCompletion, EncodeError> {
            let at = Part::Answer(i);
            match &prompt_ids {
                Ok(prompt_ids) => self.encode_alone(prompt, prompt_ids, at, answer),
                // The prompt's error cannot be cloned, so it is produced again for each answer.
                Err(_) => self.encode_alone(prompt, &self.encode_prompt(prompt)?, at, answer),
            }
        };
        completions.iter().enumerate().map(encode).collect()
    }

    /// Encodes a prompt with answers that are compared with each other. As in
    /// [`PairEncoder::encode_pair`], all answers share one split between prompt and answer.
    ///
    /// # Errors
    /// Returns the first error. It names an answer by its index in the list.
    pub fn encode_together(
        &self,
        prompt: &Text,
        answers: &[Text],
    ) -> Result<Vec<EncodedCompletion>, EncodeError> {
        let answers: Vec<_> = answers
            .iter()
            .enumerate()
            .map(|(i, answer)| (Part::Answer(i), answer))
            .collect();
        Ok(self.encode(prompt, &answers)?.completions)
    }

    /// Encodes one answer to a prompt with the tokens `prompt_ids`, independent of other answers.
    fn encode_alone(
        &self,
        prompt: &Text,
        prompt_ids: &[u32],
        at: Part,
        answer: &Text,
    ) -> Result<EncodedCompletion, EncodeError> {
        let ids = self.encode_prompt_and_answer(prompt, at, answer)?;
        match common_prefix(prompt_ids, &ids) {
            0 => Err(EncodeError::EmptyPrompt),
            shared => self.split_and_truncate(at, ids, shared),
        }
    }

    /// Encodes a prompt with its answers. The answers begin after the longest common prefix of the
    /// prompt and of every prompt + answer, as TRL splits pairs.
    fn encode(&self, prompt: &Text, answers: &[(Part, &Text)]) -> Result<Encoded, EncodeError> {
        let prompt_ids = self.encode_prompt(prompt)?;
        let mut whole = Vec::with_capacity(answers.len());
        let mut shared = prompt_ids.len();
        for (at, answer) in answers {
            let ids = self.encode_prompt_and_answer(prompt, *at, answer)?;
            shared = shared.min(common_prefix(&prompt_ids, &ids));
            whole.push(ids);
        }
        if shared == 0 {
            return Err(EncodeError::EmptyPrompt);
        }
        let completions = answers
            .iter()
            .zip(whole)
            .map(|((at, _), ids)| self.split_and_truncate(*at, ids, shared));
        Ok(Encoded {
            completions: completions.collect::<Result<_, _>>()?,
            cut: prompt_ids[shared..].to_vec(),
        })
    }

    /// Encodes a prompt whose answer is to be generated.
    ///
    /// # Errors
    /// Returns the reason why the prompt cannot be encoded.
    pub fn encode_to_continue(&self, prompt: &Text) -> Result<Vec<u32>, EncodeError> {
        let ids = self.encode_prompt(prompt)?;
        if ids.is_empty() {
            return Err(EncodeError::EmptyPrompt);
        }
        self.check_vocabulary(Part::Prompt, &ids)?;
        Ok(ids)
    }

    /// Returns the tokens of the prompt alone.
    fn encode_prompt(&self, prompt: &Text) -> Result<Vec<u32>, EncodeError> {
        match prompt {
            Text::Plain(text) => self.encode_plain(Part::Prompt, text),
            Text::Chat(messages) => self.encode_chat(Part::Prompt, messages, true),
        }
    }

    /// Returns the tokens of prompt + answer.
    fn encode_prompt_and_answer(
        &self,
        prompt: &Text,
        at: Part,
        answer: &Text,
    ) -> Result<Vec<u32>, EncodeError> {
        match (prompt, answer) {
            (Text::Plain(p), Text::Plain(a)) => {
                self.encode_plain(at, &format!("{p}{a}{}", self.missing_eos(a)))
            }
            (Text::Chat(p), Text::Chat(a)) => {
                let dialogue: Vec<_> = p.iter().chain(a).cloned().collect();
                self.encode_chat(at, &dialogue, false)
            }
            _ => Err(EncodeError::MixedForms { at }),
        }
    }

    /// Returns the tokens of a dialogue that the chat template renders.
    fn encode_chat(
        &self,
        at: Part,
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
        let rendered = self.tokenizer.apply_chat_template(messages, &options);
        rendered
            .and_then(|text| self.tokenizer.encode(&text, false))
            .map_err(|error| EncodeError::Model { at, error })
    }

    /// Returns the tokens of a plain text. BOS is added if the tokenizer does so, unless the text
    /// already starts with BOS.
    fn encode_plain(&self, at: Part, text: &str) -> Result<Vec<u32>, EncodeError> {
        let starts_with_bos = self
            .tokenizer
            .bos_token()
            .is_some_and(|bos| !bos.is_empty() && text.starts_with(bos));
        self.tokenizer
            .encode(text, !starts_with_bos)
            .map_err(|error| EncodeError::Model { at, error })
    }

    /// Returns the tokenizer's EOS if it has one and the answer lacks it, otherwise an empty text.
    fn missing_eos(&self, answer: &str) -> &str {
        match self.tokenizer.eos_token() {
            Some(eos) if !answer.ends_with(eos) => eos,
            _ => "",
        }
    }

    /// Splits the tokens of prompt + answer after the first `shared` ones, truncates them to
    /// `max_length` and checks their ids.
    fn split_and_truncate(
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
                return Err(EncodeError::PromptFillsMaxLength {
                    tokens: shared,
                    max_length: max,
                });
            }
            Truncation::KeepStart => (0, max, shared),
            // At least one token of context must remain. If the answer alone fills max_length, its
            // first remaining token becomes the context.
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
        let Some(vocab_size) = self.vocab_size else {
            return Ok(());
        };
        let Some(id) = ids.iter().copied().find(|id| *id as usize >= vocab_size) else {
            return Ok(());
        };
        let token = self.tokenizer.decode(&[id]);
        Err(EncodeError::TokenOutsideVocabulary {
            at,
            token: token.map_err(|error| EncodeError::Model { at, error })?,
            id,
            vocab_size,
        })
    }
}

/// Returns the length of the longest common prefix of two lists.
fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Groups consecutive completions with the same prompt. The order does not change, so the log-probs
/// of the packed groups are in the order of `completions`.
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
