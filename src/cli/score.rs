//! `bradley score`: streams the pairs of files to the server and prints their scores as they
//! come.

pub(super) mod logged;
pub(super) mod result;
mod unprinted;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use self::result::{RowPrinter, Score, ScoredRow, Summary};
use self::unprinted::UnprintedRows;
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
use crate::rpc::client::{Client, Status, from_rpc_status, is_draining, is_transient, retry_after};
use crate::rpc::pb::{self, stream_score_pairs_request::Part};
use crate::train::rows::names::COMPLETIONS_COLUMN;
use crate::train::rows::{RowReader, detect_format, read_rows};

/// Maximum number of pairs that are read ahead, and of those that are queued for sending.
const MAX_QUEUED_PAIRS: usize = 64;
/// Limits of the time before a pair is sent again because the server asked for this.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The warning about a server that is shutting down.
const LEAVING: &str = "the server is shutting down: rows without an answer are sent again, to the \
    restarted server or to another one";

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
    let patience = Duration::from_secs(args.retries.retry_timeout);
    let scoring = progress.during(score(&client, options, rows, patience, each));
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
        n => Err(Failure::Failed(format!(
            "{n} of {rows} rows could not be scored: {}{hint}",
            remedy(&summary)
        ))),
    }
}

/// Returns the remedy for the rows without a score.
fn remedy(summary: &Summary) -> String {
    let of_server = summary.failed_at_server();
    let of_rows = summary.failed() - of_server;
    if of_rows == 0 {
        return "the server had no room for them or failed; score them again later".to_owned();
    }
    // Skipping all rows would leave none.
    let skip = match summary.failed() == summary.rows() {
        true => "",
        false => ", or skip them with --skip-bad-rows",
    };
    match of_server {
        0 => format!("correct them{skip}"),
        _ => format!(
            "the server had no room for {of_server} of them or failed; score these again later, \
             and correct the others{skip}"
        ),
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
    /// A warning: about the weights that were named, or about the server.
    Warning(String),
}

/// A row that was read.
struct ReadRow {
    /// The row with an empty score, or with the reason why it cannot be read.
    row: ScoredRow,
    /// Its pair without an id, if it can be read.
    pair: Option<pb::Pair>,
}

/// Scores rows and calls `each` for every row, in the order of the files. A row that cannot be read
/// or scored gets an error of its own. A pair for which the server has no room is sent again, until
/// the server has given nothing but such refusals for `retry_timeout`. The number of rows in memory
/// is limited, whatever the size of the files.
///
/// # Errors
/// Returns the failure of the call, or of `each`.
pub(super) async fn score(
    client: &Client,
    options: pb::ScoringOptions,
    rows: RowReader,
    retry_timeout: Duration,
    mut each: impl FnMut(StreamedAnswer) -> Outcome,
) -> Outcome {
    let (sender, read) = mpsc::channel(MAX_QUEUED_PAIRS);
    tokio::task::spawn_blocking(move || read_all(rows, &sender));
    let mut scoring = StreamedScoring {
        client,
        options,
        retry_timeout,
        read,
        are_all_read: false,
        rows: UnprintedRows::new(),
        warnings: Vec::new(),
        leaving: None,
    };
    while let Some(pause) = scoring.stream(&mut each).await? {
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

/// The work of [`score`].
struct StreamedScoring<'a> {
    client: &'a Client,
    options: pb::ScoringOptions,
    retry_timeout: Duration,
    /// The rows of the files.
    read: mpsc::Receiver<ReadRow>,
    are_all_read: bool,
    rows: UnprintedRows,
    /// The warnings so far. Each stream has them.
    warnings: Vec<String>,
    /// The time after which another stream is to be opened, if the server is shutting down.
    leaving: Option<Duration>,
}

impl StreamedScoring<'_> {
    /// Sends pairs over a stream until all rows have a result and are printed. Returns the time to
    /// wait if the others are to be sent over another stream.
    async fn stream(
        &mut self,
        each: &mut impl FnMut(StreamedAnswer) -> Outcome,
    ) -> Result<Option<Duration>, Failure> {
        self.rows.send_again();
        let (sender, receiver) = mpsc::channel(MAX_QUEUED_PAIRS);
        // The channel has room for the first message.
        let _ = sender
            .send(request(Part::Options(self.options.clone())))
            .await;
        let mut sender = Some(sender);
        let opened = self
            .client
            .scoring()
            .stream_score_pairs(ReceiverStream::new(receiver))
            .await;
        let mut answers = match opened {
            Ok(answers) => answers.into_inner(),
            Err(status) => return self.pause_after(status).map(Some),
        };
        self.leaving = None;
        loop {
            while let Some(row) = self.rows.pop() {
                each(StreamedAnswer::Row(Box::new(row)))?;
            }
            let is_done = self.are_all_read && self.rows.is_empty();
            if is_done || self.leaving.is_some() {
                sender = None;
            }
            let now = Instant::now();
            let is_open = sender.as_ref().is_some_and(|sender| !sender.is_closed());
            let may_send = is_open && self.rows.may_send(now);
            let may_read = is_open && !self.are_all_read && self.rows.may_read();
            let wakes_at = self.rows.wakes_at(now).filter(|_| is_open);
            tokio::select! {
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => self.take(answer, each)?,
                    // The status of the call comes last.
                    Ok(None) if is_done => return Ok(None),
                    Ok(None) => return self.pause_at_end().map(Some),
                    Err(status) => return self.pause_after(status).map(Some),
                },
                Some(room) = room_in(sender.as_ref()), if may_send => {
                    if let Some(pair) = self.rows.send() {
                        room.send(request(Part::Pair(pair)));
                    }
                }
                read = self.read.recv(), if may_read => match read {
                    Some(ReadRow { row, pair }) => self.rows.push(row, pair),
                    None => self.are_all_read = true,
                },
                () = tokio::time::sleep_until(wakes_at.unwrap_or(now)), if wakes_at.is_some() => {}
            }
        }
    }

    /// Takes an answer to a pair.
    ///
    /// # Errors
    /// Returns a failure if the server has given nothing but refusals for too long.
    fn take(
        &mut self,
        mut answer: pb::StreamScorePairsResponse,
        each: &mut impl FnMut(StreamedAnswer) -> Outcome,
    ) -> Outcome {
        for warning in std::mem::take(&mut answer.warnings) {
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning.clone());
                each(StreamedAnswer::Warning(warning))?;
            }
        }
        let Some(result) = &answer.result else {
            return Ok(());
        };
        // Other ids are of no row that waits.
        let Ok(index) = result.id.parse::<usize>() else {
            return Ok(());
        };
        let error = match &result.result {
            Some(pb::pair_result::Result::Error(error)) => Some(from_rpc_status(error)),
            _ => None,
        };
        if let Some(status) = &error
            && let Some(delay) = asked_pause(status)
        {
            let now = Instant::now();
            if !is_draining(status) {
                self.rows.refused(index, delay, now);
            } else if self.leaving.replace(delay).is_none() {
                each(StreamedAnswer::Warning(LEAVING.to_owned()))?;
            }
            return self.check_patience(now, || Failure::Failed(status.message().to_owned()));
        }
        let of_server = error.is_some_and(|status| is_transient(status.code()));
        match scored(answer) {
            Ok(score) => self.rows.scored(index, score),
            Err(message) if of_server => self.rows.failed_at_server(index, message),
            Err(message) => self.rows.failed(index, message),
        }
        Ok(())
    }

    /// Returns the time after which a stream that failed can be repeated.
    ///
    /// # Errors
    /// Returns the failure if it is for good, or if the server has given nothing but refusals for
    /// too long.
    fn pause_after(&mut self, status: Status) -> Result<Duration, Failure> {
        let is_passing = is_transient(status.code());
        let pause = asked_pause(&status).or(self.leaving.filter(|_| is_passing));
        let Some(pause) = pause else {
            return Err(status.into());
        };
        self.check_patience(Instant::now(), || status.into())?;
        Ok(pause)
    }

    /// Returns the time after which a stream is repeated that ended before every pair was answered.
    ///
    /// # Errors
    /// Returns a failure if the server is not shutting down.
    fn pause_at_end(&self) -> Result<Duration, Failure> {
        self.leaving.ok_or_else(|| {
            Failure::Failed("the server ended the stream before every pair was answered".into())
        })
    }

    /// Takes note of a refusal.
    ///
    /// # Errors
    /// Returns `failure` if the server has given nothing but refusals for too long.
    fn check_patience(&mut self, now: Instant, failure: impl FnOnce() -> Failure) -> Outcome {
        self.rows.begin_patience(now);
        if !self.rows.are_refused_for(self.retry_timeout, now) {
            return Ok(());
        }
        let seconds = self.retry_timeout.as_secs();
        Err(failure().with_context(&format!("no answer for {seconds} s (--retry-timeout)")))
    }
}

fn request(part: Part) -> pb::StreamScorePairsRequest {
    pb::StreamScorePairsRequest { part: Some(part) }
}

/// Waits until a stream takes another message; `None` if it has ended.
async fn room_in<T>(sender: Option<&mpsc::Sender<T>>) -> Option<mpsc::Permit<'_, T>> {
    sender?.reserve().await.ok()
}

/// Returns the time after which the server asks to repeat a call or a pair, within limits.
fn asked_pause(status: &Status) -> Option<Duration> {
    retry_after(status).map(|pause| pause.clamp(SHORTEST_PAUSE, LONGEST_PAUSE))
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
    // The first ones are of `--logged`, with which rows have no numbers of tokens.
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

/// Reads rows, until their receiver is dropped.
fn read_all(rows: RowReader, sender: &mpsc::Sender<ReadRow>) {
    for row in rows {
        let (row, pair) = match row {
            Ok(row) => {
                let pair = pb::Pair {
                    logged: logged::message(&row.logged),
                    ..pair(String::new(), &row)
                };
                let read = ScoredRow {
                    row: row.row,
                    pair: row.pair,
                    id: row.id,
                    ignored: row.ignored,
                    missing_column: None,
                    of_server: false,
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
                    of_server: false,
                    result: Err(issue.message_with_field()),
                    missing_column: lacks_column.then_some(issue.field),
                    id: issue.id,
                };
                (read, None)
            }
        };
        if sender.blocking_send(ReadRow { row, pair }).is_err() {
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
    fn rows_that_the_server_failed_to_score_are_not_to_be_corrected() {
        // `None` is a row with a score, `Some(true)` one that the server failed to score.
        let advice = |rows: &[Option<bool>]| {
            let mut summary = Summary::default();
            for failure in rows {
                summary.add(&ScoredRow {
                    row: 1,
                    pair: None,
                    id: None,
                    ignored: Vec::new(),
                    missing_column: None,
                    of_server: *failure == Some(true),
                    result: match failure {
                        None => Ok(Score::default()),
                        Some(_) => Err("an error".to_owned()),
                    },
                });
            }
            remedy(&summary)
        };
        assert_eq!(advice(&[Some(false)]), "correct them");
        let skip = "correct them, or skip them with --skip-bad-rows";
        assert_eq!(advice(&[None, Some(false)]), skip);
        let again = "the server had no room for them or failed; score them again later";
        assert_eq!(advice(&[None, Some(true)]), again);
        let both = "the server had no room for 1 of them or failed; score these again later, and \
                    correct the others";
        assert_eq!(advice(&[Some(false), Some(true)]), both);
    }

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
