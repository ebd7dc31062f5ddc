//! Preference rows, and the findings of their validation.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::job::Millis;
use super::logged::LoggedLogprobs;
use super::message::TemplateArguments;
pub use super::message::{ChatMessage, MAX_MESSAGES};
use super::violation::shortened;

/// Plain text or chat messages.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Text {
    /// Text that is tokenised as it is.
    Plain(String),
    /// Messages that are rendered with the chat template.
    Chat(Vec<ChatMessage>),
}

impl Text {
    /// Returns the size of the text in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Text::Plain(text) => text.len(),
            Text::Chat(messages) => messages.iter().map(ChatMessage::bytes).sum(),
        }
    }
}

/// A prompt and two answers. All three have the same form: all plain text or all chat messages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PreferenceRow {
    /// Number of the row, from 1; in JSONL the line number.
    pub row: u64,
    /// Id that the row has in the file.
    pub id: Option<String>,
    /// Prompt x. With implicit prompts, the messages that both dialogues share.
    pub prompt: Text,
    /// Preferred answer y_w.
    pub chosen: Text,
    /// Other answer y_l.
    pub rejected: Text,
    /// Factor on the row's loss; the default is 1.
    pub weight: f64,
    /// Tools and template arguments of the row. Only rows of chat messages have them.
    #[serde(default, skip_serializing_if = "TemplateArguments::is_empty")]
    pub arguments: TemplateArguments,
    /// True if the prompt's system message is from the column `system`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub has_system_column: bool,
    /// Columns of the row that are not used, e.g. `score`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored: Vec<String>,
    /// Shape of the row in the file.
    #[serde(default)]
    pub shape: RowShape,
    /// Number of the pair within its row, from 1, if the row makes several pairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pair: Option<u32>,
    /// Log-probs that the row carries. Their columns are in `ignored`, too, because only some jobs
    /// and calls use them.
    #[serde(default, skip_serializing_if = "LoggedLogprobs::is_absent")]
    pub logged: LoggedLogprobs,
}

impl PreferenceRow {
    /// Returns the part of the row that version 0.2.0 ignored or could not read, so that a job of
    /// that version saw other tokens. `None` if the row means the same to both versions.
    pub fn new_since_0_2_0(&self) -> Option<String> {
        if !matches!(self.shape, RowShape::Preference | RowShape::ImplicitPrompt) {
            return Some(self.shape.name().to_owned());
        }
        if self
            .arguments
            .tools
            .as_ref()
            .is_some_and(|tools| !tools.is_empty())
        {
            return Some("tools".to_owned());
        }
        if !self.arguments.kwargs.is_empty() {
            return Some("chat_template_kwargs".to_owned());
        }
        if self.has_system_column {
            return Some("system".to_owned());
        }
        let fields = [
            ("prompt", &self.prompt),
            ("chosen", &self.chosen),
            ("rejected", &self.rejected),
        ];
        fields.into_iter().find_map(|(field, text)| {
            let Text::Chat(messages) = text else {
                return None;
            };
            let new = messages
                .iter()
                .enumerate()
                .find_map(|(i, message)| Some((i, message.new_since_0_2_0()?)));
            new.map(|(i, key)| format!("{field}[{i}].{key}"))
        })
    }

    /// Returns the name of a column as it is in the file. With one chosen and several rejected
    /// answers, `rejected` becomes the entry of this pair.
    pub fn column(&self, name: &str) -> String {
        match self.pair {
            Some(pair) if name == "rejected" && self.shape == RowShape::SeveralRejected => {
                format!("rejected[{}]", pair.saturating_sub(1))
            }
            _ => name.to_owned(),
        }
    }
}

/// Supported row shapes; `src/train/rows/shapes.rs` describes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowShape {
    /// prompt, chosen and rejected.
    #[default]
    Preference,
    /// Two whole dialogues that share the prompt.
    ImplicitPrompt,
    /// Two plain texts that share the prompt.
    ImplicitPromptText,
    /// OpenAI's columns input, preferred_output and non_preferred_output.
    OpenaiPreference,
    /// Texts with "Human:" and "Assistant:" turns.
    Hh,
    /// Whole dialogues, and a prompt column with the text of their first user message.
    Ultrafeedback,
    /// Columns question, chosen and rejected, and often system, as plain texts: a dialogue.
    Orca,
    /// One chosen answer and a list of rejected ones.
    SeveralRejected,
    /// A list of several chosen answers, and one or more rejected ones.
    SeveralAnswers,
}

impl RowShape {
    /// Returns the name in the API.
    pub fn name(self) -> &'static str {
        match self {
            RowShape::Preference => "preference",
            RowShape::ImplicitPrompt => "implicit_prompt",
            RowShape::ImplicitPromptText => "implicit_prompt_text",
            RowShape::OpenaiPreference => "openai_preference",
            RowShape::Hh => "hh",
            RowShape::Ultrafeedback => "ultrafeedback",
            RowShape::Orca => "orca",
            RowShape::SeveralRejected => "several_rejected",
            RowShape::SeveralAnswers => "several_answers",
        }
    }
}

/// File format of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetFormat {
    /// One JSON object per line.
    Jsonl,
    /// Apache Parquet.
    Parquet,
}

/// Severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The row can still be used.
    Warning,
    /// The row cannot be used.
    Error,
}

/// Reason of a finding; its name is part of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IssueReason {
    /// The line is not a JSON object.
    InvalidJson,
    /// The line is not UTF-8.
    InvalidUtf8,
    /// A field has the wrong type or form, or the chat template refuses the row.
    InvalidType,
    /// `weight` is not a finite number above 0.
    InvalidWeight,
    /// A field changes the meaning of the row but is not supported: images, audio, video, files, or
    /// tools or a system message with plain text.
    UnsupportedField,
    /// A column is not used (a warning).
    IgnoredField,
    /// `prompt`, `chosen` or `rejected` is absent, or `prompt` is empty.
    MissingField,
    /// An answer has no text.
    EmptyCompletion,
    /// `chosen` equals `rejected`.
    IdenticalAnswers,
    /// The prompt is implicit, but the two dialogues or texts have no common beginning that answers
    /// follow.
    DifferentPrompts,
    /// The prompt leaves no room for an answer token in `max_length`.
    PromptFillsMaxLength,
    /// `max_length` cuts an answer (a warning).
    Truncated,
    /// The last tokens of the prompt differ in prompt + answer and are left out (a warning).
    PromptCut,
    /// A token has no embedding in the model.
    TokenOutsideVocabulary,
    /// The same pair occurred before (a warning).
    DuplicatePair,
    /// The same pair occurred before with the answers swapped.
    ContradictoryPair,
    /// Plain-text answers, but the tokenizer has no end-of-sequence token (a warning, once per
    /// file).
    NoEos,
}

impl IssueReason {
    /// Returns the name in the API.
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

    /// Returns the severity. A contradictory pair could still be read, but it is an error because
    /// it harms the training.
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

    /// Returns true for errors that always depend on a job's model and `max_length`.
    fn depends_on_job(self) -> bool {
        matches!(
            self,
            IssueReason::PromptFillsMaxLength | IssueReason::TokenOutsideVocabulary
        )
    }
}

/// One finding about one row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowIssue {
    /// Number of the row, from 1.
    pub row: u64,
    /// Id that the row has in the file.
    pub id: Option<String>,
    /// Path of the field.
    pub field: String,
    /// Reason of the finding.
    pub reason: IssueReason,
    /// Explanation with the remedy.
    pub message: String,
    /// True for an error that was found with a model. The row may be good for another model.
    #[serde(default, skip_serializing_if = "is_false")]
    pub of_model: bool,
}

impl RowIssue {
    /// Returns true for errors that depend on a job's model and `max_length`, so that each job must
    /// check its rows for them. In reports of version 0.2.0, rows that a chat template refused are
    /// not among them.
    pub fn depends_on_job(&self) -> bool {
        self.of_model || self.reason.depends_on_job()
    }

    /// Returns the message with the field. Most messages begin with it already.
    pub fn message_with_field(&self) -> String {
        match self.message.starts_with(&self.field) {
            true => self.message.clone(),
            false => format!("{}: {}", self.field, self.message),
        }
    }

    /// Returns the finding with shortened texts and without NUL characters, which databases do not
    /// store.
    pub fn shortened(self) -> Self {
        let short = |text: String, limit: usize| {
            let text = if text.len() > limit {
                shortened(&text, limit)
            } else {
                text
            };
            if text.contains('\0') {
                text.replace('\0', "\u{fffd}")
            } else {
                text
            }
        };
        RowIssue {
            id: self.id.map(|id| short(id, MAX_ISSUE_CHARS.0)),
            field: short(self.field, MAX_ISSUE_CHARS.0),
            message: short(self.message, MAX_ISSUE_CHARS.1),
            ..self
        }
    }
}

/// Maximum number of findings that a report lists; further ones are only counted.
pub const MAX_LISTED_ISSUES: usize = 1000;
/// Maximum length of a stored finding's id and field (first) and message (second), in characters,
/// without the `…` of a text that was cut. Rows come from clients and may be long.
const MAX_ISSUE_CHARS: (usize, usize) = (199, 399);
/// Maximum number of characters of a value that is quoted in a finding's message.
pub const MAX_QUOTED_VALUE: usize = 200;

/// Result of a validation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValidationReport {
    /// Number of rows in the file.
    pub rows: u64,
    /// Number of rows without an error.
    pub valid_rows: u64,
    /// Number of findings by reason.
    pub counts: BTreeMap<String, u64>,
    /// First [`MAX_LISTED_ISSUES`] findings. Empty in a list of datasets.
    #[serde(default)]
    pub issues: Vec<RowIssue>,
    /// True if there were more findings than are listed.
    pub issues_truncated: bool,
    /// Number of readable rows by the name of their shape.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub shapes: BTreeMap<String, u64>,
    /// Number of usable pairs, if rows have several; 0 if every row has one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pairs: u64,
    /// Number of rows with an error for which [`RowIssue::depends_on_job`] is false. `None` in
    /// reports of version 0.2.0, in which a row has at most one finding that depends on the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unusable_rows: Option<u64>,
    /// Check of lengths that the report includes; `None` if lengths were not checked, and in
    /// reports of version 0.2.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length_check: Option<LengthCheck>,
    /// Reference log-probs in the rows; `None` in reports of version 0.3.0 and before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logged: Option<LoggedRows>,
}

/// Reference log-probs in the rows of a dataset, for jobs with reference `logged`. Rows that have
/// an error for every job do not count.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedRows {
    /// Number of pairs that have them.
    pub pairs: u64,
    /// Number of rows with a pair that lacks them, or whose column has something else.
    pub rows_without: u64,
    /// Finding about the first of these rows.
    pub first_without: Option<RowIssue>,
}

/// Check of the lengths of rows when a dataset is uploaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthCheck {
    /// Id of the model whose tokenizer was used.
    pub model: String,
    /// Maximum length in tokens.
    pub max_length: usize,
}

fn is_false(b: &bool) -> bool {
    !*b
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl ValidationReport {
    /// Counts a finding without listing it.
    pub fn count(&mut self, reason: IssueReason) {
        *self.counts.entry(reason.name().to_owned()).or_default() += 1;
    }

    /// Counts a finding, and lists it if the list is not full.
    pub fn add(&mut self, issue: RowIssue) {
        self.count(issue.reason);
        if self.issues.len() < MAX_LISTED_ISSUES {
            self.issues.push(issue.shortened());
        } else {
            self.issues_truncated = true;
        }
    }

    /// Returns the number of rows with an error.
    pub fn bad_rows(&self) -> u64 {
        self.rows - self.valid_rows
    }

    /// Returns the number of rows that a job cannot use, and the first error of one. They are those
    /// that no job can use; and if the upload was checked with `model`, also those that the report
    /// lists because this model's tokenizer or chat template refused them. Lengths and tokens
    /// outside the vocabulary do not count: each job checks them when it starts.
    pub fn bad_rows_with(&self, model: Option<&str>) -> (u64, Option<&RowIssue>) {
        let checked = self.length_check.as_ref().map(|check| check.model.as_str());
        let is_checked = model.is_some() && checked == model;
        let listed = || {
            self.issues.iter().filter(|i| {
                i.reason.severity() == Severity::Error
                    && !i.reason.depends_on_job()
                    && (is_checked || !i.of_model)
            })
        };
        let rows = |of_model: bool| -> BTreeSet<u64> {
            let these = listed().filter(|i| i.of_model == of_model);
            these.map(|i| i.row).collect()
        };
        let of_model = rows(true).difference(&rows(false)).count() as u64;
        (self.bad_rows_of_any_job() + of_model, listed().next())
    }

    /// Returns the number of rows that count as bad for every job. Rows with errors that were found
    /// with a model do not count: each job checks these with its own model and `max_length`. In
    /// reports of version 0.2.0, rows that the chat template of the upload's model refuses do.
    pub fn bad_rows_of_any_job(&self) -> u64 {
        self.unusable_rows.unwrap_or_else(|| {
            let reasons = [
                IssueReason::PromptFillsMaxLength,
                IssueReason::TokenOutsideVocabulary,
            ];
            let depending: u64 = reasons
                .iter()
                .filter_map(|reason| self.counts.get(reason.name()))
                .sum();
            self.bad_rows().saturating_sub(depending)
        })
    }
}

/// A dataset as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// The id in `datasets/{id}`.
    pub id: String,
    /// Title, for display only.
    pub display_name: String,
    /// File format.
    pub format: DatasetFormat,
    /// Size of the file in bytes.
    pub size_bytes: u64,
    /// BLAKE3 hash of the file, in hex.
    pub content_hash: String,
    /// Result of the validation.
    pub report: ValidationReport,
    /// Time at which the upload was acknowledged.
    pub create_time: Millis,
    /// Client that uploaded it; empty without authentication.
    pub owner: String,
}
