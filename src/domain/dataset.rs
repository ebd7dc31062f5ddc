//! Preference rows and what validation says of them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::job::Millis;
use super::message::TemplateArguments;
pub use super::message::{ChatMessage, MAX_MESSAGES};
use super::violation::shortened;

/// Plain text or chat messages.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Text {
    /// Used as it is.
    Plain(String),
    /// Rendered with the chat template.
    Chat(Vec<ChatMessage>),
}

impl Text {
    /// Bytes of its text.
    pub fn bytes(&self) -> usize {
        match self {
            Text::Plain(text) => text.len(),
            Text::Chat(messages) => messages.iter().map(ChatMessage::bytes).sum(),
        }
    }
}

/// A prompt and two answers; the prompt and both answers have the same form (all plain or all
/// chat).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PreferenceRow {
    /// From 1: a line number in JSONL.
    pub row: u64,
    /// The row's own id.
    pub id: Option<String>,
    /// x; for implicit prompts, the messages both dialogues share.
    pub prompt: Text,
    /// y_w.
    pub chosen: Text,
    /// y_l.
    pub rejected: Text,
    /// Multiplies the row's loss; 1 unless given.
    pub weight: f64,
    /// The row's own tools and template arguments, which only dialogues have.
    #[serde(default, skip_serializing_if = "TemplateArguments::is_empty")]
    pub arguments: TemplateArguments,
    /// Columns that the row has and that are neither used nor known, e.g. `score`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored: Vec<String>,
    /// The shape that the row has in the file.
    #[serde(default)]
    pub shape: RowShape,
    /// The pair's place among its row's pairs, from 1, where the row has several rejected answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pair: Option<u32>,
}

impl PreferenceRow {
    /// Returns what version 0.2.0 did not use of the row, or could not read: a job of that version
    /// saw other tokens. `None` for a row that means the same to both versions.
    pub fn new_since_0_2_0(&self) -> Option<String> {
        if !matches!(self.shape, RowShape::Preference | RowShape::ImplicitPrompt) {
            return Some(self.shape.name().to_owned());
        }
        if self.arguments.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
            return Some("tools".to_owned());
        }
        if !self.arguments.kwargs.is_empty() {
            return Some("chat_template_kwargs".to_owned());
        }
        let fields =
            [("prompt", &self.prompt), ("chosen", &self.chosen), ("rejected", &self.rejected)];
        fields.into_iter().find_map(|(field, text)| {
            let Text::Chat(messages) = text else { return None };
            let new = messages
                .iter()
                .enumerate()
                .find_map(|(i, message)| Some((i, message.new_since_0_2_0()?)));
            new.map(|(i, key)| format!("{field}[{i}].{key}"))
        })
    }

    /// A column as the row names it: of several rejected answers, the one of this pair.
    pub fn column(&self, name: &str) -> String {
        match self.pair {
            Some(pair) if name == "rejected" => format!("rejected[{}]", pair.saturating_sub(1)),
            _ => name.to_owned(),
        }
    }
}

/// The shapes of rows that are recognised; `train::rows` describes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowShape {
    /// prompt, chosen and rejected.
    #[default]
    Preference,
    /// Two whole dialogues, which share the prompt.
    ImplicitPrompt,
    /// Two plain texts, which share the prompt.
    ImplicitPromptText,
    /// OpenAI's input, preferred_output and non_preferred_output.
    OpenaiPreference,
    /// Texts of "Human:" and "Assistant:".
    Hh,
    /// Whole dialogues, with the text of their first user message as the prompt.
    Ultrafeedback,
    /// A list of rejected answers.
    SeveralRejected,
}

impl RowShape {
    /// The word on the wire.
    pub fn name(self) -> &'static str {
        match self {
            RowShape::Preference => "preference",
            RowShape::ImplicitPrompt => "implicit_prompt",
            RowShape::ImplicitPromptText => "implicit_prompt_text",
            RowShape::OpenaiPreference => "openai_preference",
            RowShape::Hh => "hh",
            RowShape::Ultrafeedback => "ultrafeedback",
            RowShape::SeveralRejected => "several_rejected",
        }
    }
}

/// The file format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetFormat {
    /// One JSON object a line.
    Jsonl,
    /// Apache Parquet.
    Parquet,
}

/// Whether a row can still be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// It can.
    Warning,
    /// It cannot.
    Error,
}

/// The stable word for a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IssueReason {
    /// Not a JSON object.
    InvalidJson,
    /// Not UTF-8.
    InvalidUtf8,
    /// A field of the wrong type or form.
    InvalidType,
    /// weight is not a finite number above 0.
    InvalidWeight,
    /// A field that changes what a row means and that cannot be used: images, audio, video, or
    /// tools with plain text.
    UnsupportedField,
    /// A column that is not used (a warning).
    IgnoredField,
    /// prompt, chosen or rejected is absent.
    MissingField,
    /// An answer without text.
    EmptyCompletion,
    /// chosen equals rejected.
    IdenticalAnswers,
    /// Implicit prompts whose dialogues share no first message.
    DifferentPrompts,
    /// No room for an answer token in max_length.
    PromptFillsMaxLength,
    /// max_length cuts an answer (a warning).
    Truncated,
    /// The end of the prompt's tokens is not in prompt + answer, so that it is left out (a
    /// warning).
    PromptCut,
    /// A token that the model has no embedding for.
    TokenOutsideVocabulary,
    /// The same pair occurred before (a warning).
    DuplicatePair,
    /// The same pair occurred before with the answers exchanged.
    ContradictoryPair,
    /// Plain-text answers for a tokenizer that has no end-of-sequence token (a warning, once for a
    /// file).
    NoEos,
}

impl IssueReason {
    /// The word on the wire.
    pub fn name(self) -> &'static str {
        match self {
            IssueReason::InvalidJson => "invalid_json",
            IssueReason::InvalidUtf8 => "invalid_utf8",
            IssueReason::InvalidType => "invalid_type",
            IssueReason::InvalidWeight => "invalid_weight",
            IssueReason::UnsupportedField => "unsupported_field",
            IssueReason::IgnoredField => "ignored_field",
            IssueReason::MissingField => "missing_field",
            IssueReason::EmptyCompletion => "empty_completion",
            IssueReason::IdenticalAnswers => "identical_answers",
            IssueReason::DifferentPrompts => "different_prompts",
            IssueReason::PromptFillsMaxLength => "prompt_fills_max_length",
            IssueReason::Truncated => "truncated",
            IssueReason::PromptCut => "prompt_cut",
            IssueReason::TokenOutsideVocabulary => "token_outside_vocabulary",
            IssueReason::DuplicatePair => "duplicate_pair",
            IssueReason::ContradictoryPair => "contradictory_pair",
            IssueReason::NoEos => "no_eos",
        }
    }

    /// Errors make a row unusable. Contradictions are warnings on both rows' face but poison
    /// training, so they are errors.
    pub fn severity(self) -> Severity {
        match self {
            IssueReason::Truncated
            | IssueReason::PromptCut
            | IssueReason::DuplicatePair
            | IssueReason::IgnoredField
            | IssueReason::NoEos => Severity::Warning,
            _ => Severity::Error,
        }
    }

    /// Returns true if each job has to check this with its own model and max_length.
    pub fn depends_on_job(self) -> bool {
        matches!(self, IssueReason::PromptFillsMaxLength | IssueReason::TokenOutsideVocabulary)
    }
}

/// One finding about one row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowIssue {
    /// From 1.
    pub row: u64,
    /// The row's own id.
    pub id: Option<String>,
    /// Which field.
    pub field: String,
    /// The stable word.
    pub reason: IssueReason,
    /// In words, with the remedy.
    pub message: String,
}

impl RowIssue {
    /// The same with texts of limited length and without NUL characters, which databases do not
    /// store.
    pub fn shortened(self) -> Self {
        let short = |text: String, limit: usize| {
            let text = if text.len() > limit { shortened(&text, limit) } else { text };
            if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
        };
        RowIssue {
            id: self.id.map(|id| short(id, MAX_ISSUE_TEXT.0)),
            field: short(self.field, MAX_ISSUE_TEXT.0),
            message: short(self.message, MAX_ISSUE_TEXT.1),
            ..self
        }
    }
}

/// How many findings a report lists in full.
pub const MAX_LISTED_ISSUES: usize = 1000;
/// Characters of a row's id, and of a finding's message, that a report keeps: rows are a client's
/// own, and may be long.
const MAX_ISSUE_TEXT: (usize, usize) = (199, 399);
/// Characters of a value that a finding's message repeats.
pub const MAX_QUOTED_VALUE: usize = 200;

/// What validation found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValidationReport {
    /// Rows in the file.
    pub rows: u64,
    /// Rows without an error.
    pub valid_rows: u64,
    /// Findings by reason.
    pub counts: BTreeMap<String, u64>,
    /// The first [`MAX_LISTED_ISSUES`]; none in a list of datasets.
    #[serde(default)]
    pub issues: Vec<RowIssue>,
    /// Whether there were more.
    pub issues_truncated: bool,
    /// Rows that could be read, by the name of their shape.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub shapes: BTreeMap<String, u64>,
    /// Pairs that can be used, where rows make several; 0 where every row makes one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pairs: u64,
    /// Rows with an error that no model and no length avoids; `None` in reports of version 0.2.0,
    /// where a row has at most one finding that depends on the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unusable_rows: Option<u64>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl ValidationReport {
    /// Counts a finding without listing it.
    pub fn count(&mut self, reason: IssueReason) {
        *self.counts.entry(reason.name().to_owned()).or_default() += 1;
    }

    /// Counts a finding and lists it while there is room.
    pub fn add(&mut self, issue: RowIssue) {
        self.count(issue.reason);
        if self.issues.len() < MAX_LISTED_ISSUES {
            self.issues.push(issue.shortened());
        } else {
            self.issues_truncated = true;
        }
    }

    /// Rows that cannot be used.
    pub fn bad_rows(&self) -> u64 {
        self.rows - self.valid_rows
    }

    /// Rows that no job can use. Whether a prompt is too long, or a token is outside the
    /// vocabulary, is for each job to say, with its own model and length.
    pub fn bad_rows_of_any_job(&self) -> u64 {
        self.unusable_rows.unwrap_or_else(|| {
            let reasons = [IssueReason::PromptFillsMaxLength, IssueReason::TokenOutsideVocabulary];
            let depending: u64 =
                reasons.iter().filter_map(|reason| self.counts.get(reason.name())).sum();
            self.bad_rows().saturating_sub(depending)
        })
    }
}

/// A dataset as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// The id in `datasets/{id}`.
    pub id: String,
    /// A title.
    pub display_name: String,
    /// Its format.
    pub format: DatasetFormat,
    /// Of the file.
    pub size_bytes: u64,
    /// BLAKE3 in hex.
    pub content_hash: String,
    /// Findings.
    pub report: ValidationReport,
    /// When acknowledged.
    pub create_time: Millis,
    /// The client that uploaded it; empty without authentication.
    pub owner: String,
}
