//! `bradley score`: streams the pairs of a file to the server and prints their scores.

use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::args::{Output, ScoreArgs};
use super::data::DataFiles;
use super::failure::{Failure, Outcome};
use super::output;
use super::remote::connect;
use crate::domain::dataset::{ChatMessage, PreferenceRow, RowIssue, Text};
use crate::domain::message::TemplateArguments;
use crate::rpc::client::Client;
use crate::rpc::pb;
use crate::train::rows::{detect_format, read_rows};

/// Maximum number of pairs that are queued for sending.
const MAX_QUEUED_PAIRS: usize = 64;

pub(super) async fn run(args: ScoreArgs, output: Output) -> Outcome {
    let client = connect(&args.server.target()).await?;
    let (reader, trouble) = DataFiles::find(&args.data, &args.reading).await?.reader();
    let read = tokio::task::spawn_blocking(move || reader.collect::<Vec<_>>());
    let all = read.await.map_err(|e| Failure::Failed(e.to_string()))?;
    trouble.check()?;
    let rows: Vec<PreferenceRow> = all
        .iter()
        .filter_map(|r| r.as_ref().ok())
        .cloned()
        .collect();
    warn_of_ignored_fields(&rows);
    let options = pb::ScoringOptions {
        policy: args.policy.clone(),
        reference: args.reference.clone(),
        beta: args.beta,
        max_length: args.max_length,
        per_token_logprobs: false,
        chat_template_kwargs: None,
        chat_template_kwargs_json: template_arguments(args.template_args.as_deref())?,
        tools: Vec::new(),
        tools_json: match &args.tools {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?,
            None => String::new(),
        },
        normalization: normalization(&args.normalization).into(),
    };
    let Scores {
        results,
        normalization,
        warnings,
    } = score(&client, options, &rows).await?;
    warnings.iter().for_each(|warning| warn(warning));
    let summary = Summary::of(&results);
    let mut results = results.into_iter();
    let lines: Vec<ScoredLine> = all
        .into_iter()
        .filter_map(|row| ScoredLine::of(row, &mut results))
        .collect();
    let failed = lines.iter().filter(|line| line.result.is_err()).count();
    let truncated: usize = lines.iter().map(ScoredLine::truncated).sum();
    match output {
        Output::Json => lines
            .iter()
            .for_each(|line| output::json_line(&to_json(line, normalization))),
        Output::Table => {
            let rows = lines.iter().map(to_row).collect();
            output::line(&output::table(
                &[
                    "pair",
                    "Pr(chosen ≻ rejected)",
                    "margin",
                    "reward chosen",
                    "reward rejected",
                    "tokens",
                ],
                rows,
            ));
            output::line(&format!(
                "{} pairs: accuracy {:.1}% (ties count half), mean probability {:.3}, \
                 mean margin {:+.3}; rewards are {}s over tokens; {failed} rows without a score, \
                 {truncated} truncated answers",
                lines.len() - failed,
                100.0 * summary.accuracy,
                summary.probability,
                summary.margin,
                normalization_name(normalization)
            ));
        }
    }
    match failed {
        0 => Ok(()),
        n if args.skip_bad_rows && n < lines.len() => {
            warn(&format!("{n} of {} rows were skipped", lines.len()));
            Ok(())
        }
        n => Err(Failure::Failed(format!(
            "{n} of {} rows could not be scored: correct them, or skip them with --skip-bad-rows",
            lines.len()
        ))),
    }
}

/// A row of the files with its score, or with the reason why it has none.
struct ScoredLine {
    /// Number of the row, from 1 and through all files.
    row: u64,
    /// Number of the pair within its row, if the row has several rejected answers.
    pair: Option<u32>,
    id: Option<String>,
    result: Result<pb::PairScore, String>,
}

impl ScoredLine {
    /// Combines a row with its result. Rows that cannot be read have none.
    fn of(
        row: Result<PreferenceRow, RowIssue>,
        results: &mut impl Iterator<Item = pb::PairResult>,
    ) -> Option<Self> {
        Some(match row {
            Ok(row) => ScoredLine {
                row: row.row,
                pair: row.pair,
                id: row.id,
                result: match results.next()?.result {
                    Some(pb::pair_result::Result::Score(score)) => Ok(score),
                    Some(pb::pair_result::Result::Error(e)) => Err(e.message),
                    None => Err("no result".to_owned()),
                },
            },
            Err(issue) => ScoredLine {
                row: issue.row,
                pair: None,
                id: issue.id,
                result: Err(issue.message),
            },
        })
    }

    /// Returns the number of answers that were cut.
    fn truncated(&self) -> usize {
        let answers = self
            .result
            .iter()
            .flat_map(|score| score.a.iter().chain(&score.b));
        answers.filter(|answer| answer.truncated).count()
    }

    /// Returns the row's id, or without one its number, with the pair's number if the row makes
    /// several pairs: `7#2`.
    fn name(&self) -> String {
        match (&self.id, self.pair) {
            (Some(id), _) => id.clone(),
            (None, Some(pair)) => format!("{}#{pair}", self.row),
            (None, None) => self.row.to_string(),
        }
    }
}

/// Reads the pairs of a JSONL or Parquet file.
///
/// # Errors
/// Returns a failure if the file cannot be opened, or one that names the row if a row cannot be
/// read.
pub(super) fn read(path: &std::path::Path) -> Result<Vec<PreferenceRow>, Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::Failed(format!("{}: {e}", path.display()));
    let mut start = [0; 4];
    let mut file = std::fs::File::open(path).map_err(|e| failed(&e))?;
    let n = std::io::Read::read(&mut file, &mut start).map_err(|e| failed(&e))?;
    let mut rows = Vec::new();
    for row in read_rows(path, detect_format(&start[..n])).map_err(|e| failed(&e))? {
        rows.push(row.map_err(|i| failed(&format!("row {}, {}: {}", i.row, i.field, i.message)))?);
    }
    Ok(rows)
}

/// Checks that the value of `--template-args` is a JSON object and returns it unchanged; without
/// the flag the result is empty. The text is sent as JSON, because a Struct would lose the order of
/// keys and turn 1.0 into 1.
pub(super) fn template_arguments(text: Option<&str>) -> Result<String, Failure> {
    let Some(text) = text else {
        return Ok(String::new());
    };
    let _: Map<String, Value> = serde_json::from_str(text).map_err(|e| {
        Failure::Usage(format!(
            "--template-args: {e}; give a JSON object such as {{\"enable_thinking\": false}}"
        ))
    })?;
    Ok(text.to_owned())
}

/// Parses the value of `--normalization`.
fn normalization(name: &str) -> pb::RewardNormalization {
    match name {
        "sum" => pb::RewardNormalization::Sum,
        "mean" => pb::RewardNormalization::Mean,
        _ => pb::RewardNormalization::AsTrained,
    }
}

/// Returns the name of a normalization in `--normalization`.
fn normalization_name(normalization: pb::RewardNormalization) -> &'static str {
    match normalization {
        pb::RewardNormalization::Sum => "sum",
        pb::RewardNormalization::Mean => "mean",
        pb::RewardNormalization::AsTrained | pb::RewardNormalization::Unspecified => "as_trained",
    }
}

#[allow(clippy::print_stderr)]
pub(super) fn warn(message: &str) {
    eprintln!("warning: {message}");
}

/// Warns if rows have fields that are not used.
fn warn_of_ignored_fields(rows: &[PreferenceRow]) {
    let affected = rows.iter().filter(|row| !row.ignored.is_empty()).count();
    if let Some(row) = rows.iter().find(|row| !row.ignored.is_empty()) {
        warn(&format!(
            "{affected} rows have fields that are not used, e.g. row {}: {}",
            row.row,
            row.ignored.join(", ")
        ));
    }
}

/// The server's answer to a file of pairs.
pub(super) struct Scores {
    /// One result per row, in the order of the rows.
    pub results: Vec<pb::PairResult>,
    /// The normalization of the rewards that was used.
    normalization: pb::RewardNormalization,
    /// The server's warnings about the weights that were named.
    warnings: Vec<String>,
}

/// Scores every row over one stream.
pub(super) async fn score(
    client: &Client,
    options: pb::ScoringOptions,
    rows: &[PreferenceRow],
) -> Result<Scores, Failure> {
    use pb::stream_score_pairs_request::Part;
    let (sender, receiver) = mpsc::channel(MAX_QUEUED_PAIRS);
    let mut messages = vec![Part::Options(options)];
    messages.extend(
        rows.iter()
            .enumerate()
            .map(|(i, r)| Part::Pair(pair(i.to_string(), r))),
    );
    tokio::spawn(async move {
        for part in messages {
            if sender
                .send(pb::StreamScorePairsRequest { part: Some(part) })
                .await
                .is_err()
            {
                return;
            }
        }
    });
    let mut answers = client
        .scoring()
        .stream_score_pairs(ReceiverStream::new(receiver))
        .await?
        .into_inner();
    let mut results: Vec<Option<pb::PairResult>> = vec![None; rows.len()];
    let (mut normalization, mut warnings) = (pb::RewardNormalization::Unspecified, Vec::new());
    while let Some(mut answer) = answers.message().await? {
        normalization = answer.normalization();
        warnings.append(&mut answer.warnings);
        if let Some(mut result) = answer.result
            && let Some(i) = result.id.parse::<usize>().ok().filter(|i| *i < rows.len())
        {
            result.id = row_name(&rows[i]);
            results[i] = Some(result);
        }
    }
    let all: Option<Vec<pb::PairResult>> = results.into_iter().collect();
    let results = all.ok_or_else(|| {
        Failure::Failed("the server ended the stream before every pair was answered".into())
    })?;
    Ok(Scores {
        results,
        normalization,
        warnings,
    })
}

/// Returns the row's id. Without an id it returns the row's number, with the pair's number if the
/// row makes several pairs: `7#2`.
fn row_name(row: &PreferenceRow) -> String {
    match (&row.id, row.pair) {
        (Some(id), _) => id.clone(),
        (None, Some(pair)) => format!("{}#{pair}", row.row),
        (None, None) => row.row.to_string(),
    }
}

fn pair(id: String, row: &PreferenceRow) -> pb::Pair {
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
    }
}

fn text(t: &Text) -> pb::Text {
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

/// Averages over the pairs that have a score. Answer a of each pair is the preferred one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summary {
    /// Share of pairs with a positive margin; a tie counts half.
    pub accuracy: f64,
    /// Mean Pr(a ≻ b).
    pub probability: f64,
    /// Mean margin.
    pub margin: f64,
}

impl Summary {
    pub(super) fn of(results: &[pb::PairResult]) -> Self {
        let scores: Vec<&pb::PairScore> = results
            .iter()
            .filter_map(|r| match &r.result {
                Some(pb::pair_result::Result::Score(s)) => Some(s),
                _ => None,
            })
            .collect();
        let n = scores.len().max(1) as f64;
        let mean = |f: &dyn Fn(&pb::PairScore) -> f64| scores.iter().map(|s| f(s)).sum::<f64>() / n;
        let win = |s: &pb::PairScore| {
            if s.margin > 0.0 {
                1.0
            } else if s.margin == 0.0 {
                0.5
            } else {
                0.0
            }
        };
        Summary {
            accuracy: mean(&win),
            probability: mean(&|s| s.probability),
            margin: mean(&|s| s.margin),
        }
    }
}

fn to_json(line: &ScoredLine, normalization: pb::RewardNormalization) -> Value {
    let mut all = json!({"row": line.row});
    if let Some(pair) = line.pair {
        all["pair"] = pair.into();
    }
    if let Some(id) = &line.id {
        all["id"] = id.clone().into();
    }
    let score = match &line.result {
        Ok(score) => score,
        Err(message) => {
            all["error"] = message.clone().into();
            return all;
        }
    };
    let side = |c: &Option<pb::CompletionScore>| {
        let c = c.clone().unwrap_or_default();
        json!({
            "policy_logprob": c.policy_logprob,
            "reference_logprob": c.reference_logprob,
            "reward": c.reward,
            "tokens": c.tokens,
            "truncated": c.truncated,
        })
    };
    all["probability"] = score.probability.into();
    all["margin"] = score.margin.into();
    all["normalization"] = normalization_name(normalization).into();
    all["chosen"] = side(&score.a);
    all["rejected"] = side(&score.b);
    all
}

fn to_row(line: &ScoredLine) -> Vec<String> {
    match &line.result {
        Ok(s) => {
            let (a, b) = (
                s.a.clone().unwrap_or_default(),
                s.b.clone().unwrap_or_default(),
            );
            let numbers = [
                format!("{:.4}", s.probability),
                format!("{:+.4}", s.margin),
                format!("{:+.4}", a.reward),
                format!("{:+.4}", b.reward),
            ];
            [
                vec![line.name()],
                numbers.to_vec(),
                vec![format!("{}+{}", a.tokens, b.tokens)],
            ]
            .concat()
        }
        Err(message) => vec![line.name(), format!("error: {message}")],
    }
}
