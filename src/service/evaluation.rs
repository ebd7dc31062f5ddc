//! Evaluations: every pair of a dataset is scored in the same way as a pair of a call, and a report
//! says how well the scores agree with the dataset.
//!
//! ```text
//! file ─▶ reader ─▶ bounded channel ─▶ admit, score ─▶ tally ─▶ report
//! ```
//!
//! A Parquet file is first copied as lines, because a server decodes one file at a time, and
//! scoring takes long. Memory holds some numbers for each pair, and the texts of at most
//! `IN_FLIGHT` pairs that are scored and `READ_AHEAD` that wait.

pub mod report;

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::Instrument as _;

use self::report::{EvaluationReport, EvaluationTally, Judgement, PairFailure, Versions};
use super::artifacts::{Artifacts, Temporary};
use super::audit::audit;
use super::auth::access::{own_dataset, require};
use super::blocking::blocking;
use super::detached::DetachedWork;
use super::error::{Result, ServiceError, failed, unreadable};
use super::limiter::Limiter;
use super::scoring::logged::LoggedPair;
use super::scoring::{
    PairToScore, ReservedPair, ScoreOptions, ScoredPair, ScoringService, ScoringSession,
    score_reserved,
};
use super::store::Store;
use crate::domain::access::{Caller, Role};
use crate::domain::dataset::{Dataset, DatasetFormat, PreferenceRow, RowIssue};
use crate::domain::reason::Reason;
use crate::domain::violation::quoted;
use crate::train::rows::DataError;
use crate::train::rows::labelled::{LabelledPair, for_each_pair};

/// Maximum number of evaluations at the same time; further ones wait.
const MAX_EVALUATIONS: usize = 8;
/// Maximum number of pairs of an evaluation that are scored at the same time.
const IN_FLIGHT: usize = 256;
/// Maximum number of pairs that are read but not yet admitted.
const READ_AHEAD: usize = 64;
/// Interval of progress messages.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Delay before a pair for which there was no room is tried again, unless another pair is scored
/// earlier. It doubles with each try up to [`MAX_DELAY`].
const FIRST_DELAY: Duration = Duration::from_millis(50);
const MAX_DELAY: Duration = Duration::from_secs(2);
/// Time without any scored pair after which pairs are not tried again.
const PATIENCE: Duration = Duration::from_secs(120);
/// Maximum number of characters of a subset's name.
const MAX_SUBSET_CHARS: usize = 200;
/// Fields of a pair in the scoring API, and their columns in a dataset. Errors name the column.
const PAIR_FIELDS: [(&str, &str); 3] = [
    ("pair.prompt", "prompt"),
    ("pair.a", "chosen"),
    ("pair.b", "rejected"),
];

/// Columns of UltraFeedback with the scores of the answers.
pub const SCORE_COLUMNS: (&str, &str) = ("score_chosen", "score_rejected");

/// An evaluation that is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationRequest {
    /// Id of the dataset.
    pub dataset: String,
    /// Policy, reference and options.
    pub options: ScoreOptions,
    /// Column that names a row's subset.
    pub subset_column: Option<String>,
    /// Columns with the given scores of the chosen and of the rejected answer.
    pub score_columns: (String, String),
    /// Number of bins of the reliability diagram.
    pub bins: usize,
    /// True to store the calibration with the policy's checkpoint.
    pub save_calibration: bool,
}

/// Numbers of pairs of an evaluation so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EvaluationProgress {
    /// Pairs with a score.
    pub scored: u64,
    /// Pairs and unreadable rows without a score.
    pub failed: u64,
    /// Usable pairs of the dataset, as its upload counted them.
    pub total: u64,
}

/// Evaluates policies on datasets. Clones share its limit.
#[derive(Clone)]
pub struct EvaluationService {
    store: Store,
    artifacts: Artifacts,
    scoring: Arc<ScoringService>,
    limit: Limiter,
    /// Stores calibrations.
    detached: DetachedWork,
}

/// An accepted evaluation.
pub struct AcceptedEvaluation {
    service: EvaluationService,
    caller: Caller,
    request: EvaluationRequest,
    session: ScoringSession,
    dataset: Dataset,
}

/// Facts about a pair, besides its score, that the report needs.
struct PairFacts {
    place: (u64, u32),
    id: Option<String>,
    subset: Option<String>,
    given: Option<f64>,
    is_held_out: bool,
}

/// The thread that reads pairs.
type Reading = tokio::task::JoinHandle<std::result::Result<(), DataError>>;
type ScoredFacts = (PairFacts, Result<ScoredPair>);

impl EvaluationService {
    pub(super) fn new(
        store: Store,
        artifacts: Artifacts,
        scoring: Arc<ScoringService>,
        detached: DetachedWork,
    ) -> Self {
        EvaluationService {
            store,
            artifacts,
            scoring,
            limit: Limiter::new(MAX_EVALUATIONS),
            detached,
        }
    }

    /// Checks a request.
    ///
    /// # Errors
    /// The errors of [`ScoringService::session`]; `InvalidArgument` if the policy is being trained;
    /// `PermissionDenied` if the dataset does not exist or belongs to another client, `NotFound`
    /// for administrators. To store a calibration, `PermissionDenied` without the role `submit`,
    /// and `InvalidArgument` for a base model.
    pub async fn begin(
        &self,
        caller: &Caller,
        request: EvaluationRequest,
    ) -> Result<AcceptedEvaluation> {
        let session = self
            .scoring
            .session(caller, request.options.clone())
            .await?;
        if session.is_live() {
            let message = format!(
                "{} is still training, and its weights change during an evaluation: name a \
                 checkpoint by its step, or wait until the job has ended",
                session.policy_version()
            );
            return Err(ServiceError::invalid("options.policy", message));
        }
        if request.save_calibration {
            require(caller, Role::Submit)?;
            if !session.may_be_calibrated() {
                let message = format!(
                    "stores the calibration with a checkpoint, and {} is none: name a checkpoint \
                     as the policy, or leave this out",
                    session.policy_version()
                );
                return Err(ServiceError::invalid("save_calibration", message));
            }
        }
        let dataset = own_dataset(&self.store, caller, &request.dataset).await?;
        Ok(AcceptedEvaluation {
            service: self.clone(),
            caller: caller.clone(),
            request,
            session,
            dataset,
        })
    }
}

impl AcceptedEvaluation {
    /// Scores the pairs and returns the report. `progress` is called about once a second. Dropping
    /// the future ends the work.
    ///
    /// # Errors
    /// `FailedPrecondition` if the dataset's file is missing or has changed; `InvalidArgument` if
    /// the subset column has too many values or one that is a list or an object, or if the
    /// dataset's file cannot be decoded; `NotFound` if the calibration cannot be stored, because
    /// the checkpoint has been deleted meanwhile; errors of scoring that are not about a single
    /// pair, such as `Unavailable` if the server is shutting down or has no room for two minutes.
    pub async fn run(
        self,
        mut progress: impl FnMut(EvaluationProgress) + Send,
    ) -> Result<EvaluationReport> {
        let _permit = self.service.limit.acquire().await?;
        let (mut pairs, reading) = self.read().await?;
        let mut tally = EvaluationTally::default();
        let mut tasks: JoinSet<ScoredFacts> = JoinSet::new();
        let room = Arc::new(WaitingRoom::new());
        let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let report = &self.dataset.report;
        let total = report.pairs.max(report.valid_rows);
        let (mut is_open, mut has_subsets) = (true, false);
        while is_open || !tasks.is_empty() {
            tokio::select! {
                next = pairs.recv(), if is_open && tasks.len() < IN_FLIGHT => match next {
                    Some(LabelledPair { labels, pair: Ok(row) }) => {
                        tally.read(row.row);
                        let facts = self.facts(&labels, &row)?;
                        has_subsets |= facts.subset.as_ref().is_some_and(|name| !name.is_empty());
                        let pair = to_score(row);
                        let again = pair.clone();
                        // Waits until there is room for the pair's text.
                        let reserved = self.session.reserve(pair).await;
                        let (session, room) = (self.session.clone(), room.clone());
                        let scored = async move {
                            (facts, score(reserved, &session, again, &room).await)
                        };
                        tasks.spawn(scored.in_current_span());
                    }
                    Some(LabelledPair { pair: Err(issue), .. }) => {
                        tally.read(issue.row);
                        tally.fail(unreadable_row(issue));
                    }
                    None => is_open = false,
                },
                Some(done) = tasks.join_next() => {
                    let (facts, scored) = done.map_err(|e| {
                        ServiceError::internal(format!("a scoring task failed: {e}"))
                    })?;
                    add(&mut tally, facts, scored)?;
                }
                _ = ticks.tick() => progress(EvaluationProgress {
                    scored: tally.scored(),
                    failed: tally.failed(),
                    total,
                }),
            }
        }
        reading
            .await
            .map_err(|e| ServiceError::internal(format!("reading the dataset failed: {e}")))?
            .map_err(|e| undecodable(&e))?;
        let mut warnings = self.session.warnings();
        if let Some(column) = &self.request.subset_column
            && !has_subsets
        {
            warnings.push(format!(
                "no row has a value in the column {}",
                quoted(column)
            ));
        }
        let versions = Versions {
            policy: self.session.policy_version(),
            reference: self.session.reference_version(),
            beta: self.session.beta(),
            normalization: self.session.normalization(),
            warnings,
        };
        let (dataset, bins) = (self.dataset.id.clone(), self.request.bins);
        // Sorts some numbers of each pair several times.
        let mut report = blocking(move || tally.finish(dataset, bins, versions)).await?;
        if self.request.save_calibration
            && let Ok(judged) = &mut report.calibration
        {
            let (session, caller) = (self.session.clone(), self.caller.clone());
            let (fitted, policy) = (judged.fitted, report.versions.policy.clone());
            let storing = async move {
                session.store_calibration(&fitted).await?;
                audit(&caller, "calibrate", &policy);
                Ok::<_, ServiceError>(())
            };
            self.service.detached.to_its_end(storing).await?;
            judged.is_saved = true;
        }
        Ok(report)
    }

    /// Starts to read the dataset's pairs on a thread of its own, which ends if nobody receives
    /// them any more.
    async fn read(&self) -> Result<(mpsc::Receiver<LabelledPair>, Reading)> {
        let (dataset, artifacts) = (&self.dataset, &self.service.artifacts);
        let mut path = artifacts
            .fetch_dataset(dataset, &dataset.content_hash)
            .await?;
        let (sender, receiver) = mpsc::channel(READ_AHEAD);
        let columns = self.columns();
        let format = dataset.format;
        let mut copy = None;
        if format == DatasetFormat::Parquet {
            let temporary = Temporary(artifacts.temporary());
            let (from, columns) = (path, columns.clone());
            path = temporary.0.clone();
            // The guard is in the work, which goes on if the client leaves, and then removes the
            // copy.
            let copied =
                blocking(move || copy_as_lines(&from, &temporary.0, &columns).map(|()| temporary));
            copy = Some(copied.await??);
        }
        let reading = tokio::task::spawn_blocking(move || {
            let result = match &copy {
                Some(_) => read_lines(&path, &sender),
                None => for_each_pair(&path, format, &columns, |pair| send(&sender, &path, pair)),
            };
            drop(copy);
            match result {
                // Nobody receives the pairs any more.
                Err(_) if sender.is_closed() => Ok(()),
                result => result,
            }
        });
        Ok((receiver, reading))
    }

    /// Returns the columns that are read besides those of a pair.
    fn columns(&self) -> Vec<String> {
        let (chosen, rejected) = &self.request.score_columns;
        let subset = self.request.subset_column.iter();
        subset.chain([chosen, rejected]).cloned().collect()
    }

    /// Returns the facts about a pair. `labels` has the values of [`Self::columns`].
    fn facts(
        &self,
        labels: &serde_json::Map<String, Value>,
        row: &PreferenceRow,
    ) -> Result<PairFacts> {
        let subset = match &self.request.subset_column {
            None => None,
            Some(column) => Some(match labels.get(column) {
                None => String::new(),
                Some(Value::String(text)) => text.chars().take(MAX_SUBSET_CHARS).collect(),
                Some(value @ (Value::Number(_) | Value::Bool(_))) => value.to_string(),
                Some(_) => {
                    let message = format!(
                        "is {}, whose value in row {} is a list or an object: name a column with \
                         texts or numbers",
                        quoted(column),
                        row.row
                    );
                    return Err(ServiceError::invalid("subset_column", message));
                }
            }),
        };
        let (chosen, rejected) = &self.request.score_columns;
        let score = |column: &String| labels.get(column).and_then(Value::as_f64);
        Ok(PairFacts {
            place: (row.row, row.pair.unwrap_or(0)),
            id: row.id.clone(),
            subset,
            given: score(chosen)
                .zip(score(rejected))
                .map(|(chosen, rejected)| chosen - rejected),
            is_held_out: is_held_out(row),
        })
    }
}

/// Returns true if a pair belongs to the half of the data on which a calibration is judged. A hash
/// of the prompt decides, so that this half has other prompts than the one of the fit.
fn is_held_out(row: &PreferenceRow) -> bool {
    let text = serde_json::to_vec(&row.prompt).unwrap_or_default();
    blake3::hash(&text).as_bytes()[0] & 1 == 1
}

fn to_score(row: PreferenceRow) -> PairToScore {
    PairToScore {
        prompt: row.prompt,
        a: row.chosen,
        b: row.rejected,
        arguments: row.arguments,
        logged: LoggedPair::default(),
    }
}

fn unreadable_row(issue: RowIssue) -> PairFailure {
    let issue = issue.shortened();
    PairFailure {
        place: (issue.row, 0),
        message: issue.message_with_field(),
        id: issue.id,
    }
}

/// Scores a pair. While there is no room in the quota or in the queue, it is tried again: after
/// another pair of the evaluation was scored, or after some time.
async fn score(
    reserved: Result<ReservedPair>,
    session: &ScoringSession,
    pair: PairToScore,
    room: &WaitingRoom,
) -> Result<ScoredPair> {
    let mut delay = FIRST_DELAY;
    let mut scored = score_reserved(reserved).await;
    while let Err(e) = &scored {
        if !is_passing(e) || room.is_stuck() {
            break;
        }
        let _ = tokio::time::timeout(delay, room.next.notified()).await;
        delay = (2 * delay).min(MAX_DELAY);
        scored = score_reserved(session.reserve(pair.clone()).await).await;
    }
    if scored.is_ok() {
        room.scored();
    }
    scored
}

/// The place where pairs wait for room in the quota or in the queue.
struct WaitingRoom {
    /// Wakes one of them.
    next: Notify,
    /// Time at which a pair was scored last.
    last_score: Mutex<Instant>,
}

impl WaitingRoom {
    fn new() -> Self {
        WaitingRoom {
            next: Notify::new(),
            last_score: Mutex::new(Instant::now()),
        }
    }

    fn scored(&self) {
        *self
            .last_score
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.next.notify_one();
    }

    /// Returns true if no pair has been scored for a long time.
    fn is_stuck(&self) -> bool {
        let last = *self
            .last_score
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        last.elapsed() > PATIENCE
    }
}

/// Returns true if the error may pass: there is no room now, or something is unavailable.
fn is_passing(error: &ServiceError) -> bool {
    match error {
        ServiceError::Unavailable { .. } => !error.is_draining(),
        ServiceError::ResourceExhausted { reason, .. } => *reason == Reason::TooManyTokens,
        _ => false,
    }
}

/// Adds a pair's score, or the error if it is the pair's own.
fn add(tally: &mut EvaluationTally, facts: PairFacts, scored: Result<ScoredPair>) -> Result<()> {
    let failure = |message: String| PairFailure {
        place: facts.place,
        id: facts.id.clone(),
        message,
    };
    match scored {
        Ok(pair) if pair.margin.is_finite() => tally.add(Judgement {
            place: facts.place,
            subset: facts.subset,
            margin: pair.margin,
            rewards: (pair.a.reward, pair.b.reward),
            length_difference: pair.a.token_ids.len() as i64 - pair.b.token_ids.len() as i64,
            truncated: u64::from(pair.a.truncated) + u64::from(pair.b.truncated),
            given: facts.given,
            is_held_out: facts.is_held_out,
        })?,
        Ok(pair) => tally.fail(failure(format!(
            "the margin is {}, so that the answers cannot be compared",
            pair.margin
        ))),
        // Text that is too long for a row, for example.
        Err(e @ ServiceError::InvalidArgument(_)) => {
            let message = e.to_string();
            let renamed = PAIR_FIELDS.iter().find_map(|(field, column)| {
                let rest = message.strip_prefix(field)?;
                Some(format!("{column}{rest}"))
            });
            tally.fail(failure(renamed.unwrap_or(message)));
        }
        Err(ServiceError::ResourceExhausted { reason, message })
            if reason != Reason::TooManyTokens =>
        {
            tally.fail(failure(message));
        }
        Err(e) => return Err(e),
    }
    Ok(())
}

fn send(
    sender: &mpsc::Sender<LabelledPair>,
    path: &Path,
    pair: LabelledPair,
) -> std::result::Result<(), DataError> {
    sender
        .blocking_send(pair)
        .map_err(|_| DataError::Interrupted {
            path: path.to_owned(),
        })
}

/// Copies the pairs of a Parquet file to a file of JSON lines, which can be read at the speed of
/// scoring. While the Parquet file is decoded, no other can be.
fn copy_as_lines(from: &Path, to: &Path, columns: &[String]) -> Result<()> {
    let mut out = BufWriter::new(File::create_new(to).map_err(|e| failed(to, e))?);
    let copied = for_each_pair(from, DatasetFormat::Parquet, columns, |pair| {
        let written = serde_json::to_writer(&mut out, &pair).map_err(std::io::Error::from);
        let written = written.and_then(|()| out.write_all(b"\n"));
        written.map_err(|source| DataError::Io {
            path: to.to_owned(),
            source,
        })
    });
    copied.map_err(|e| undecodable(&e))?;
    out.flush().map_err(|e| failed(to, e))
}

/// Returns the error for a dataset's file that cannot be decoded.
fn undecodable(e: &DataError) -> ServiceError {
    match e {
        DataError::BadFile { reason, .. } => ServiceError::invalid("dataset", reason.clone()),
        other => unreadable(other),
    }
}

/// Reads the lines of [`copy_as_lines`].
fn read_lines(
    path: &Path,
    sender: &mpsc::Sender<LabelledPair>,
) -> std::result::Result<(), DataError> {
    let at = |source| DataError::Io {
        path: path.to_owned(),
        source,
    };
    for line in BufReader::new(File::open(path).map_err(at)?).lines() {
        let pair = serde_json::from_str(&line.map_err(at)?).map_err(|e| at(e.into()))?;
        send(sender, path, pair)?;
    }
    Ok(())
}
