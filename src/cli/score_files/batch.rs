//! Scores the rows of a part: pairs in calls of several, with those that share a prompt next to
//! each other, and several answers to a prompt in a call of their own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::task::JoinSet;

use super::fleet::{CallError, Fleet, ScoringAnswer, ScoringCall};
use super::row::{InputRow, PromptAnswers, RowContent};
use crate::cli::failure::{Failure, Outcome};
use crate::cli::score::{logged, pair, row_error, text};
use crate::domain::dataset::Text;
use crate::rpc::client::{Code, Status, from_rpc_status, is_transient, retry_after};
use crate::rpc::pb;

/// Maximum number of pairs in a call.
const CALL_PAIRS: usize = 64;
/// Maximum text of the pairs in a call in bytes, unless one pair has more. The server's limit on
/// messages is 16 MiB by default.
const CALL_BYTES: usize = 1 << 20;
/// Number of first attempts at a pair in which an internal error of the server counts as passing.
/// Later such an error is the pair's result, so that a pair that always causes one does not stop
/// the others.
const MAX_INTERNAL_ERRORS: u32 = 3;

/// The result of a row.
#[derive(Debug)]
pub(super) enum RowResult {
    Pair(Box<pb::PairScore>),
    Answers(Box<AnswerScores>),
    Error(String),
}

/// Scores of several answers, in their order.
#[derive(Debug, Default)]
pub(super) struct AnswerScores {
    /// `None` for an answer that has no score.
    pub rewards: Vec<Option<f64>>,
    /// Ranks of the answers; the best one has rank 1. `None` for an answer that has no score.
    pub ranks: Vec<Option<i32>>,
    /// True if an answer was truncated.
    pub is_truncated: bool,
    /// The error of the first answer without a score.
    pub error: Option<String>,
}

/// A call with the places of its rows in the part.
struct RowCall {
    places: Vec<usize>,
    call: ScoringCall,
    /// The columns of the answers; empty for pairs.
    columns: Vec<String>,
}

/// Scores rows. Results have the order of the rows. `scored` is called with the number of rows that
/// have a result since its last call.
///
/// # Errors
/// Returns a failure if the run cannot go on; a row that cannot be scored has an error as its
/// result.
pub(super) async fn score(
    fleet: &Arc<Fleet>,
    options: &pb::ScoringOptions,
    rows: &[InputRow],
    mut scored: impl FnMut(u64),
) -> Result<Vec<RowResult>, Failure> {
    let mut results: Vec<Option<RowResult>> = rows
        .iter()
        .map(|row| match &row.content {
            RowContent::Bad(message) => Some(RowResult::Error(message.clone())),
            _ => None,
        })
        .collect();
    scored(results.iter().flatten().count() as u64);
    let (mut calls, mut running) = (calls(options, rows).into_iter(), JoinSet::new());
    let mut is_over = false;
    while !is_over || !running.is_empty() {
        // More calls than the servers take would only wait.
        while !is_over && running.len() < fleet.capacity().max(1) {
            let Some(call) = calls.next() else {
                is_over = true;
                break;
            };
            let fleet = Arc::clone(fleet);
            running.spawn(async move { answer(&fleet, call).await });
        }
        let Some(done) = running.join_next().await else {
            continue;
        };
        for (place, result) in done?? {
            results[place] = Some(result);
            scored(1);
        }
    }
    let missing = || RowResult::Error("the server sent no result".to_owned());
    Ok(results
        .into_iter()
        .map(|result| result.unwrap_or_else(missing))
        .collect())
}

/// Divides rows into calls. Bad rows are in none.
fn calls(options: &pb::ScoringOptions, rows: &[InputRow]) -> Vec<RowCall> {
    // Pairs in the order in which their prompts occur first.
    let mut of_prompt: HashMap<&Text, usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut calls = Vec::new();
    for (place, row) in rows.iter().enumerate() {
        match &row.content {
            RowContent::Pair(pair) => {
                let group = *of_prompt.entry(&pair.prompt).or_insert(groups.len());
                if group == groups.len() {
                    groups.push(Vec::new());
                }
                groups[group].push(place);
            }
            RowContent::Answers(answers) => calls.push(RowCall {
                places: vec![place],
                call: ScoringCall::Answers(answers_call(options, answers)),
                columns: answers.columns.clone(),
            }),
            RowContent::Bad(_) => {}
        }
    }
    let (mut places, mut pairs, mut bytes) = (Vec::new(), Vec::new(), 0);
    let call = |places: &mut Vec<usize>, pairs: &mut Vec<pb::Pair>| RowCall {
        places: std::mem::take(places),
        call: ScoringCall::Pairs(pb::ScorePairsRequest {
            options: Some(options.clone()),
            pairs: std::mem::take(pairs),
        }),
        columns: Vec::new(),
    };
    for place in groups.into_iter().flatten() {
        let RowContent::Pair(row) = &rows[place].content else {
            continue;
        };
        let size = [&row.prompt, &row.chosen, &row.rejected].map(text_bytes);
        let size: usize = size.iter().sum();
        if !pairs.is_empty() && (pairs.len() == CALL_PAIRS || bytes + size > CALL_BYTES) {
            calls.push(call(&mut places, &mut pairs));
            bytes = 0;
        }
        bytes += size;
        pairs.push(pb::Pair {
            logged: logged::message(&row.logged),
            ..pair(place.to_string(), row)
        });
        places.push(place);
    }
    if !pairs.is_empty() {
        calls.push(call(&mut places, &mut pairs));
    }
    calls
}

fn text_bytes(text: &Text) -> usize {
    match text {
        Text::Plain(text) => text.len(),
        Text::Chat(messages) => messages
            .iter()
            .filter_map(|m| m.fields().get("content").and_then(Value::as_str))
            .map(str::len)
            .sum(),
    }
}

/// Builds the call for a row with several answers. The request has tools and template variables
/// only in its options, so those of the row are merged into them.
fn answers_call(options: &pb::ScoringOptions, row: &PromptAnswers) -> pb::ScoreCompletionsRequest {
    let mut options = options.clone();
    if let Some(tools) = &row.arguments.tools {
        options.tools_json = Value::from(tools.clone()).to_string();
    }
    if !row.arguments.kwargs.is_empty() {
        let given = &options.chat_template_kwargs_json;
        let mut all: Map<String, Value> = serde_json::from_str(given).unwrap_or_default();
        all.extend(row.arguments.kwargs.clone());
        options.chat_template_kwargs_json = Value::Object(all).to_string();
    }
    pb::ScoreCompletionsRequest {
        options: Some(options),
        prompt: Some(text(&row.prompt)),
        completions: row.answers.iter().map(text).collect(),
    }
}

/// Scores the pairs of one call. A pair that cannot be scored has its own error.
///
/// # Errors
/// Returns a failure if nothing more can be scored.
pub(in crate::cli) async fn score_pairs(
    fleet: &Fleet,
    request: pb::ScorePairsRequest,
) -> Result<Vec<Result<pb::PairScore, String>>, Failure> {
    let missing = || Err("the server sent no result".to_owned());
    let count = request.pairs.len();
    let mut results: Vec<Result<pb::PairScore, String>> = (0..count).map(|_| missing()).collect();
    for (place, result) in pairs(fleet, (0..count).collect(), request).await? {
        results[place] = match result {
            RowResult::Pair(score) => Ok(*score),
            RowResult::Error(message) => Err(message),
            RowResult::Answers(_) => missing(),
        };
    }
    Ok(results)
}

/// Results with the places of their rows in the part.
type PlacedResults = Vec<(usize, RowResult)>;

/// Scores the rows of a call, until each has a score or an error of its own.
async fn answer(fleet: &Fleet, call: RowCall) -> Result<PlacedResults, Failure> {
    match call.call {
        ScoringCall::Pairs(request) => pairs(fleet, call.places, request).await,
        ScoringCall::Answers(request) => {
            let Some(place) = call.places.first() else {
                return Ok(Vec::new());
            };
            let result = answers(fleet, request, &call.columns).await?;
            Ok(vec![(*place, result)])
        }
    }
}

/// Pairs that are to be scored, with their places.
struct WaitingPairs {
    places: Vec<usize>,
    request: pb::ScorePairsRequest,
    /// Number of times that they have failed.
    attempts: u32,
}

/// The passing errors among the results of a call.
#[derive(Default)]
struct RowRefusals {
    /// The longest time after which the server asks to send such a row again.
    asked: Option<Duration>,
    /// The message of the first one; `None` if there is none.
    reason: Option<String>,
}

impl RowRefusals {
    fn add(&mut self, status: &Status) {
        self.asked = self.asked.max(retry_after(status));
        self.reason
            .get_or_insert_with(|| status.message().to_owned());
    }

    fn is_empty(&self) -> bool {
        self.reason.is_none()
    }

    /// Waits until the rows are to be sent again. `attempts` is the number of times that they have
    /// failed before.
    ///
    /// # Errors
    /// Returns a failure if no row has got a result for `--retry-timeout`.
    async fn wait(&self, fleet: &Fleet, attempts: u32) -> Outcome {
        let reason = self.reason.as_deref().unwrap_or_default();
        fleet.wait_after_refusal(self.asked, attempts, reason).await
    }
}

/// Scores pairs. Those with a passing error are scored again after the time that the server names,
/// and if the server refuses a call because of its content, each half of it is sent alone.
async fn pairs(
    fleet: &Fleet,
    places: Vec<usize>,
    request: pb::ScorePairsRequest,
) -> Result<PlacedResults, Failure> {
    let mut answered = Vec::with_capacity(places.len());
    let mut waiting = vec![WaitingPairs {
        places,
        request,
        attempts: 0,
    }];
    while let Some(WaitingPairs {
        places,
        request,
        attempts,
    }) = waiting.pop()
    {
        let call = ScoringCall::Pairs(request);
        let answer = fleet.call(&call).await;
        let ScoringCall::Pairs(request) = call else {
            break;
        };
        let results = match answer {
            Ok(ScoringAnswer::Pairs(answer)) => answer.results,
            Ok(ScoringAnswer::Answers(_)) => Vec::new(),
            Err(CallError::Fatal(failure)) => return Err(failure),
            Err(CallError::Refused(message)) if places.len() == 1 => {
                answered.extend(
                    places
                        .into_iter()
                        .map(|at| (at, RowResult::Error(message.clone()))),
                );
                continue;
            }
            // One of the pairs is the reason.
            Err(CallError::Refused(_)) => {
                let half = places.len() / 2;
                for range in [half..places.len(), 0..half] {
                    waiting.push(WaitingPairs {
                        places: places[range.clone()].to_vec(),
                        request: pb::ScorePairsRequest {
                            options: request.options.clone(),
                            pairs: request.pairs[range].to_vec(),
                        },
                        attempts,
                    });
                }
                continue;
            }
        };
        if results.len() != places.len() {
            return Err(Failure::Failed(format!(
                "the server sent {} results for {} pairs",
                results.len(),
                places.len()
            )));
        }
        let answered_before = answered.len();
        let mut refusals = RowRefusals::default();
        let (mut again_places, mut again) = (Vec::new(), Vec::new());
        for ((place, pair), result) in places.into_iter().zip(request.pairs).zip(results) {
            let result = match result.result {
                Some(pb::pair_result::Result::Score(score)) => RowResult::Pair(Box::new(score)),
                Some(pb::pair_result::Result::Error(e)) if is_passing(e.code, attempts) => {
                    refusals.add(&from_rpc_status(&e));
                    again_places.push(place);
                    again.push(pair);
                    continue;
                }
                Some(pb::pair_result::Result::Error(e)) => RowResult::Error(row_error(&e.message)),
                None => RowResult::Error("the server sent no result".to_owned()),
            };
            answered.push((place, result));
        }
        if answered.len() > answered_before {
            fleet.answered();
        }
        if !refusals.is_empty() {
            refusals.wait(fleet, attempts).await?;
            waiting.push(WaitingPairs {
                places: again_places,
                request: pb::ScorePairsRequest {
                    options: request.options,
                    pairs: again,
                },
                attempts: attempts + 1,
            });
        }
    }
    Ok(answered)
}

/// Returns true if an error may pass when the pair is scored again.
fn is_passing(code: i32, attempts: u32) -> bool {
    match Code::from(code) {
        Code::Internal | Code::Unknown => attempts < MAX_INTERNAL_ERRORS,
        code => is_transient(code),
    }
}

/// Scores the answers of one row, again if one of them has a passing error. Errors name their
/// columns.
async fn answers(
    fleet: &Fleet,
    request: pb::ScoreCompletionsRequest,
    columns: &[String],
) -> Result<RowResult, Failure> {
    let call = ScoringCall::Answers(request);
    let mut attempts = 0;
    loop {
        let answer = match fleet.call(&call).await {
            Ok(ScoringAnswer::Answers(answer)) => answer,
            Ok(ScoringAnswer::Pairs(_)) => {
                return Ok(RowResult::Error("the server sent no result".to_owned()));
            }
            Err(CallError::Fatal(failure)) => return Err(failure),
            Err(CallError::Refused(message)) => {
                return Ok(RowResult::Error(with_columns(&message, columns)));
            }
        };
        let mut refusals = RowRefusals::default();
        for result in &answer.results {
            if let Some(pb::completion_result::Result::Error(e)) = &result.result
                && is_passing(e.code, attempts)
            {
                refusals.add(&from_rpc_status(e));
            }
        }
        if refusals.is_empty() {
            fleet.answered();
            return Ok(RowResult::Answers(Box::new(ranked(answer, columns))));
        }
        // Scores of the other answers are no progress, because all are sent again.
        refusals.wait(fleet, attempts).await?;
        attempts += 1;
    }
}

/// Puts scores and ranks in the order of the answers.
fn ranked(answer: pb::ScoreCompletionsResponse, columns: &[String]) -> AnswerScores {
    let mut scores = AnswerScores {
        ranks: vec![None; answer.results.len()],
        ..Default::default()
    };
    for (rank, at) in (1..).zip(&answer.ranking) {
        if let Some(place) = scores.ranks.get_mut(*at as usize) {
            *place = Some(rank);
        }
    }
    for (at, result) in answer.results.into_iter().enumerate() {
        let (reward, message) = match result.result {
            Some(pb::completion_result::Result::Score(score)) => {
                scores.is_truncated |= score.truncated;
                (Some(score.reward), None)
            }
            Some(pb::completion_result::Result::Error(e)) => (None, Some(e.message)),
            None => (None, Some("the server sent no result".to_owned())),
        };
        scores.rewards.push(reward);
        if let Some(message) = message {
            let column = columns.get(at).map_or("", String::as_str);
            scores
                .error
                .get_or_insert_with(|| of_answer(column, at, &message));
        }
    }
    scores
}

/// Puts the error of an answer into the words of a row and of the flags. The server's message
/// begins with the field that is wrong: the prompt or the answer.
fn of_answer(column: &str, at: usize, message: &str) -> String {
    if let Some(about_prompt) = message.strip_prefix("prompt ") {
        return row_error(&format!("pair.prompt {about_prompt}"));
    }
    let named = message.strip_prefix(&format!("completions[{at}] "));
    row_error(&format!("{column}: {}", named.unwrap_or(message)))
}

/// Replaces the fields in a message by the answers' columns and by flags.
fn with_columns(message: &str, columns: &[String]) -> String {
    let named = |text: String, (at, column): (usize, &String)| {
        text.replace(&format!("completions[{at}]"), column)
    };
    let text = columns.iter().enumerate().fold(message.to_owned(), named);
    row_error(&text.replace("options.tools ", "--tools "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(prompt: &str, answer: &str) -> InputRow {
        let line = serde_json::json!({"prompt": prompt, "chosen": answer, "rejected": "b"});
        let reading = crate::cli::score_files::row::RowReading::default();
        reading.line(1, line.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn pairs_that_share_a_prompt_are_sent_together_within_the_limits() {
        let mut rows: Vec<InputRow> = (0..100).map(|i| row(["p", "q"][i % 2], "a")).collect();
        rows.push(InputRow::bad(101, "bad".to_owned()));
        rows.push(row("long", &"x".repeat(CALL_BYTES)));
        let calls = calls(&pb::ScoringOptions::default(), &rows);
        let sizes: Vec<usize> = calls.iter().map(|call| call.places.len()).collect();
        assert_eq!(sizes, [64, 36, 1]);
        let places: Vec<usize> = calls.iter().flat_map(|call| call.places.clone()).collect();
        assert!(
            places[..50].iter().all(|place| place % 2 == 0),
            "{places:?}"
        );
        let mut sorted = places;
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq((0..100).chain([101])));
    }

    #[test]
    fn the_error_of_an_answer_names_columns_and_flags() {
        assert_eq!(
            of_answer(
                "rejected",
                1,
                "prompt the prompt alone has 9 tokens, max_length is 8: shorten the prompt or \
                 raise max_length"
            ),
            "prompt: the prompt alone has 9 tokens, --max-length is 8: shorten the prompt or raise \
             --max-length"
        );
        assert_eq!(
            of_answer("rejected[0]", 1, "completions[1] has no text"),
            "rejected[0]: has no text"
        );
        assert_eq!(of_answer("good", 0, "busy"), "good: busy");
        let columns = ["chosen".to_owned(), "rejected[0]".to_owned()];
        assert_eq!(
            with_columns(
                "  completions[1] has no text\n  completions[0] is a",
                &columns
            ),
            "  rejected[0] has no text\n  chosen is a"
        );
    }
}
