//! `bradley score`: streams the pairs of files to the server and prints their scores as they
//! come.

mod logged;
pub(super) mod result;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use self::result::{RowPrinter, Score, ScoredRow, Summary};
use super::args::{Output, ScoreArgs};
use super::data::{DataFiles, naming};
use super::failure::{Failure, Outcome, unless_interrupted};
use super::output::{table, unwritten};
use super::policy_names::PolicyNames;
use super::progress::{self, WorkProgress, say, warn};
use super::remote::connect;
use crate::domain::dataset::{ChatMessage, IssueReason, PreferenceRow, Text};
use crate::domain::message::TemplateArguments;
use crate::domain::violation::counted;
use crate::rpc::client::Client;
use crate::rpc::pb;
use crate::train::rows::names::COMPLETIONS_COLUMN;
use crate::train::rows::{RowReader, detect_format, read_rows};

/// Maximum number of pairs that are queued for sending.
const MAX_QUEUED_PAIRS: usize = 64;
/// Maximum number of rows that are queued for printing. Answers come in any order, rows are printed
/// in the order of the files.
const MAX_UNPRINTED_ROWS: usize = 1024;

pub(super) async fn run(args: ScoreArgs, output: Output) -> Outcome {
    let client = connect(&args.server.target()).await?;
    let mut options = args.scoring.options()?;
    options.per_token_logprobs = args.per_token_logprobs;
    let names = PolicyNames::of(&client).await?;
    names.complete_options(&mut options).await?;
    let data = progress::find(&args.data, &args.reading).await?;
    let progress = WorkProgress::pairs("scoring");
    let total = RowCount::start(data.clone());
    let files = data.clone();
    let (rows, read_failure) = data.reader();
    let answers = ["chosen", "rejected"].map(|column| files.original_column(column));
    let mut printer = RowPrinter::new(std::io::stdout(), output, table::terminal_width())
        .with_answer_columns(answers);
    let (mut summary, mut ignored) = (Summary::default(), IgnoredColumns::default());
    let each = |answer| -> Outcome {
        match answer {
            StreamedAnswer::Warning(text) => progress.suspend(|| warn(&text)),
            StreamedAnswer::Row(row) => {
                summary.add(&row);
                ignored.add(&row);
                progress
                    .suspend(|| printer.print(&row))
                    .map_err(|e| unwritten(&e))?;
                if let Some(total) = total.get() {
                    progress.set_total(total.max(summary.rows()));
                }
                progress.set(summary.rows());
            }
        }
        Ok(())
    };
    let rows = logged::rows(rows, args.logged);
    let scoring = progress.during(score(&client, options, rows, each));
    let answered = unless_interrupted("interrupted", scoring).await;
    // A file that cannot be read to its end is also the reason why the stream ended.
    let outcome = read_failure.check().and(answered);
    let rate = progress.summary();
    drop(progress);
    // A call that was refused as a whole has no results to sum up.
    if outcome.is_ok() || summary.rows() > 0 {
        printer.summary(&summary).map_err(|e| unwritten(&e))?;
    }
    for error in printer.errors(summary.failed()) {
        say(&error);
    }
    ignored.warn();
    if let Some(rate) = rate {
        say(&rate);
    }
    outcome.map_err(|failure| match (summary.rows(), failure) {
        (n, Failure::Interrupted(_)) => {
            Failure::Interrupted(format!("interrupted after {}", counted(n, "row")))
        }
        (0, failure) => failure,
        (n, failure) => failure.with_context(&format!("after {}", counted(n, "row"))),
    })?;
    let rows = summary.rows();
    let hint = match printer.lacks_prompts() {
        true => format!("; {}", naming("prompt")),
        false => String::new(),
    };
    match summary.failed() {
        0 => Ok(()),
        n if args.skip_bad_rows && n < rows => {
            warn(&format!("{n} of {rows} rows were skipped{hint}"));
            Ok(())
        }
        n if n == rows && printer.lacks_columns() => {
            let remedy = match has_completions(files).await {
                true => "rows with completions are for bradley score-files",
                false => "rename the columns, or name them with --columns chosen=NAME",
            };
            Err(Failure::Failed(format!(
                "none of the {n} rows could be scored: {remedy}"
            )))
        }
        // Skipping them would leave no row.
        n if n == rows => Err(Failure::Failed(format!(
            "{n} of {rows} rows could not be scored: correct them{hint}"
        ))),
        n => Err(Failure::Failed(format!(
            "{n} of {rows} rows could not be scored: correct them, or skip them with \
             --skip-bad-rows{hint}"
        ))),
    }
}

/// Returns true if the first row of the files has the column `completions`.
async fn has_completions(files: DataFiles) -> bool {
    if !files.is_rereadable() {
        return false;
    }
    let first = tokio::task::spawn_blocking(move || files.whole_records().next());
    let Ok(Some(Ok(first))) = first.await else {
        return false;
    };
    first
        .columns
        .is_ok_and(|columns| columns.contains_key(COMPLETIONS_COLUMN))
}

/// Reads the pairs of a JSONL or Parquet file.
///
/// # Errors
/// Returns a failure if the file cannot be opened, or one that names the row if a row cannot be
/// read.
pub(super) fn read(path: &Path) -> Result<Vec<PreferenceRow>, Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::Failed(format!("{}: {e}", path.display()));
    let mut start = [0; 4];
    let mut file = std::fs::File::open(path).map_err(|e| failed(&e))?;
    let n = std::io::Read::read(&mut file, &mut start).map_err(|e| failed(&e))?;
    let rows = read_rows(path, detect_format(&start[..n])).map_err(|e| failed(&e))?;
    rows.map(|row| {
        row.map_err(|issue| {
            failed(&format!(
                "row {}, {}",
                issue.row,
                issue.message_with_field()
            ))
        })
    })
    .collect()
}

/// Number of rows that have columns which are not used, and the first of them.
#[derive(Default)]
struct IgnoredColumns {
    rows: u64,
    example: Option<String>,
}

impl IgnoredColumns {
    fn add(&mut self, row: &ScoredRow) {
        if !row.ignored.is_empty() {
            self.rows += 1;
            self.example.get_or_insert_with(|| {
                let named = |name: &String| match name.trim() {
                    "" => "a column without a name".to_owned(),
                    _ => name.clone(),
                };
                let names: Vec<String> = row.ignored.iter().map(named).collect();
                format!("row {}: {}", row.row, names.join(", "))
            });
        }
    }

    fn warn(&self) {
        if let Some(example) = &self.example {
            warn(&format!(
                "{} {} fields that are not used, e.g. {example}",
                counted(self.rows, "row"),
                if self.rows == 1 { "has" } else { "have" }
            ));
        }
    }
}

/// Number of rows of the files. It is counted in the background, so that large files are scored
/// from the start.
struct RowCount {
    counting: tokio::task::JoinHandle<()>,
    total: Arc<std::sync::OnceLock<u64>>,
    /// Tells the background task to stop.
    is_over: Arc<AtomicBool>,
}

impl RowCount {
    fn start(data: DataFiles) -> Self {
        let (total, is_over) = (Arc::default(), Arc::default());
        let (result, stop) = (Arc::clone(&total), Arc::clone(&is_over));
        let counting = tokio::task::spawn_blocking(move || {
            if !data.is_rereadable() {
                return;
            }
            let (rows, read_failure) = data.reader();
            let mut n = 0;
            for _ in rows {
                n += 1;
                if AtomicBool::load(&stop, Ordering::Relaxed) {
                    return;
                }
            }
            if read_failure.check().is_ok() {
                let _ = std::sync::OnceLock::set(&result, n);
            }
        });
        RowCount {
            counting,
            total,
            is_over,
        }
    }

    /// Returns the number of rows once it is known.
    fn get(&self) -> Option<u64> {
        self.total.get().copied()
    }
}

impl Drop for RowCount {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.counting.abort();
    }
}

/// A part of the server's answer to a stream of pairs.
pub(super) enum StreamedAnswer {
    /// The next row of the files.
    Row(Box<ScoredRow>),
    /// A warning about the weights that were named.
    Warning(String),
}

/// A row that was read and perhaps sent.
struct ReadRow {
    /// Number of the pair in the stream, from 0.
    index: usize,
    /// The row, so far with an empty score.
    row: ScoredRow,
}

/// Scores rows over one stream and calls `each` for every row, in the order of the files. A row
/// that cannot be read or scored gets an error of its own. Two rows more than
/// [`MAX_UNPRINTED_ROWS`] are in memory at most, whatever the size of the files.
pub(super) async fn score(
    client: &Client,
    options: pb::ScoringOptions,
    rows: RowReader,
    mut each: impl FnMut(StreamedAnswer) -> Outcome,
) -> Outcome {
    let (sender, receiver) = mpsc::channel(MAX_QUEUED_PAIRS);
    let (read, mut unprinted) = mpsc::channel(MAX_UNPRINTED_ROWS);
    tokio::task::spawn_blocking(move || send(options, rows, &sender, &read));
    let mut answers = client
        .scoring()
        .stream_score_pairs(ReceiverStream::new(receiver))
        .await?
        .into_inner();
    // Answers to later rows than the next one to print.
    let mut early: HashMap<usize, pb::StreamScorePairsResponse> = HashMap::new();
    while let Some(ReadRow { index, mut row }) = unprinted.recv().await {
        while row.result.is_ok() {
            if let Some(answer) = early.remove(&index) {
                row.result = scored(answer);
                break;
            }
            let Some(mut answer) = answers.message().await? else {
                return Err(Failure::Failed(
                    "the server ended the stream before every pair was answered".into(),
                ));
            };
            for warning in std::mem::take(&mut answer.warnings) {
                each(StreamedAnswer::Warning(warning))?;
            }
            let id = answer.result.as_ref().and_then(|r| r.id.parse().ok());
            // Other ids are of no row that waits.
            let waiting = index..=index + MAX_UNPRINTED_ROWS + 1;
            if let Some(id) = id.filter(|id| waiting.contains(id)) {
                early.insert(id, answer);
            }
        }
        each(StreamedAnswer::Row(Box::new(row)))?;
    }
    // The status of the call comes last.
    while answers.message().await?.is_some() {}
    Ok(())
}

fn scored(answer: pb::StreamScorePairsResponse) -> Result<Score, String> {
    let normalization = answer.normalization();
    match answer.result.and_then(|r| r.result) {
        Some(pb::pair_result::Result::Score(pair)) => Ok(Score {
            pair,
            policy_version: answer.policy_version,
            normalization,
        }),
        Some(pb::pair_result::Result::Error(e)) => Err(row_error(&e.message)),
        None => Err("the server sent no result".to_owned()),
    }
}

/// Puts the error of a pair into the words of a row and of the flags.
pub(super) fn row_error(message: &str) -> String {
    const FIELDS: [(&str, &str); 8] = [
        ("pair.prompt ", "prompt: "),
        ("pair.a ", "chosen: "),
        ("pair.b ", "rejected: "),
        ("options.tools ", "--tools "),
        ("pair.logged.reference_a ", "ref_chosen_logps "),
        ("pair.logged.reference_b ", "ref_rejected_logps "),
        ("pair.logged.tokens_a ", "the number of tokens of chosen "),
        ("pair.logged.tokens_b ", "the number of tokens of rejected "),
    ];
    // The first ones are of `score --logged`, whose rows have no numbers of tokens.
    const INSTRUCTIONS: [(&str, &str); 4] = [
        (
            "add the number of tokens, or set options.normalization to SUM",
            "use --normalization sum, or --logged reference",
        ),
        (
            "raise options.max_length, or leave the pair's logged log-probs out",
            "raise --max-length, or leave --logged out",
        ),
        ("options.reference", "--reference"),
        ("leave this field and its JSON form empty", "leave it out"),
    ];
    let named = FIELDS
        .iter()
        .find_map(|(field, word)| Some(format!("{word}{}", message.strip_prefix(field)?)));
    let mut text = named.unwrap_or_else(|| message.to_owned());
    for (instruction, flags) in INSTRUCTIONS {
        text = text.replace(instruction, flags);
    }
    text.replace(" max_length", " --max-length")
}

/// Reads rows and sends them, until the call or the printing ends.
fn send(
    options: pb::ScoringOptions,
    rows: RowReader,
    sender: &mpsc::Sender<pb::StreamScorePairsRequest>,
    read: &mpsc::Sender<ReadRow>,
) {
    use pb::stream_score_pairs_request::Part;
    let part = |part| pb::StreamScorePairsRequest { part: Some(part) };
    if sender.blocking_send(part(Part::Options(options))).is_err() {
        return;
    }
    for (index, row) in rows.enumerate() {
        let (row, pair) = match row {
            Ok(row) => {
                let pair = pb::Pair {
                    logged: logged::message(&row.logged),
                    ..pair(index.to_string(), &row)
                };
                let read = ScoredRow {
                    row: row.row,
                    pair: row.pair,
                    id: row.id,
                    ignored: row.ignored,
                    missing_column: None,
                    result: Ok(Score::default()),
                };
                (read, Some(pair))
            }
            Err(issue) => {
                let lacks_column = match issue.reason {
                    IssueReason::MissingField => true,
                    IssueReason::DifferentPrompts => issue.field == "prompt",
                    _ => false,
                };
                let read = ScoredRow {
                    row: issue.row,
                    pair: None,
                    ignored: Vec::new(),
                    result: Err(issue.message_with_field()),
                    missing_column: lacks_column.then_some(issue.field),
                    id: issue.id,
                };
                (read, None)
            }
        };
        // The row is announced before its pair is sent, so that its answer is awaited.
        if read.blocking_send(ReadRow { index, row }).is_err() {
            return;
        }
        if let Some(pair) = pair
            && sender.blocking_send(part(Part::Pair(pair))).is_err()
        {
            return;
        }
    }
}

/// Converts a row into a pair: chosen is answer a, rejected is answer b. Log-probs that the row
/// carries are left out, because models compute them unless the caller asks for the row's own.
pub(super) fn pair(id: String, row: &PreferenceRow) -> pb::Pair {
    let TemplateArguments { tools, kwargs } = &row.arguments;
    pb::Pair {
        id,
        prompt: Some(text(&row.prompt)),
        a: Some(text(&row.chosen)),
        b: Some(text(&row.rejected)),
        tools: Vec::new(),
        tools_json: tools
            .as_ref()
            .map(|tools| Value::from(tools.clone()).to_string())
            .unwrap_or_default(),
        chat_template_kwargs: None,
        chat_template_kwargs_json: if kwargs.is_empty() {
            String::new()
        } else {
            json!(kwargs).to_string()
        },
        logged: None,
    }
}

/// Converts a text or dialogue.
pub(super) fn text(t: &Text) -> pb::Text {
    let form = match t {
        Text::Plain(s) => pb::text::Form::Plain(s.clone()),
        Text::Chat(messages) => {
            let messages = messages.iter().map(message).collect();
            pb::text::Form::Chat(pb::MessageList { messages })
        }
    };
    pb::Text { form: Some(form) }
}

/// Converts a message. If it has other keys than role and a text content, it is sent as JSON, which
/// preserves the order of keys.
fn message(message: &ChatMessage) -> pb::Message {
    let fields = message.fields();
    match fields.get("content").and_then(Value::as_str) {
        Some(content) if fields.len() == 2 => pb::Message {
            role: message.role().to_owned(),
            content: content.to_owned(),
            ..Default::default()
        },
        _ => pb::Message {
            fields_json: json!(fields).to_string(),
            ..Default::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_pair_names_columns_and_flags() {
        assert_eq!(
            row_error(
                "pair.prompt the prompt alone has 9 tokens, max_length is 8: shorten the prompt \
                 or raise max_length"
            ),
            "prompt: the prompt alone has 9 tokens, --max-length is 8: shorten the prompt or raise \
             --max-length"
        );
        assert_eq!(row_error("pair.b has no text"), "rejected: has no text");
        assert_eq!(
            row_error(
                "pair.logged.reference_b is the log-prob of the whole answer, but max_length cuts \
                 prompt + answer: raise options.max_length, or leave the pair's logged log-probs \
                 out"
            ),
            "ref_rejected_logps is the log-prob of the whole answer, but --max-length cuts prompt \
             + answer: raise --max-length, or leave --logged out"
        );
        assert_eq!(
            row_error(
                "options.tools applies only to chat messages: send chat messages, or leave this \
                 field and its JSON form empty"
            ),
            "--tools applies only to chat messages: send chat messages, or leave it out"
        );
        assert_eq!(row_error("busy"), "busy");
    }
}
