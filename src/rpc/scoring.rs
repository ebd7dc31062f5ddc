//! Implements the gRPC ScoringService.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use super::auth::split_caller;
use super::convert::scoring as convert;
use super::pb::{self, scoring_service_server::ScoringService, stream_score_pairs_request::Part};
use super::status::{incomplete, message, status};
use crate::service::auth::tokens::TokenService;
use crate::service::error::ServiceError;
use crate::service::scoring::{self, ScoredPair, ScoringSession, score_reserved};

/// Maximum number of pairs in a ScorePairs call.
const MAX_PAIRS: usize = 1024;
/// Maximum number of answers to one prompt.
const MAX_COMPLETIONS: usize = 256;
/// Maximum number of pairs of one stream that are scored at the same time. Further pairs are not
/// read from the client until some are answered.
const IN_FLIGHT: usize = 256;
/// Maximum number of answers that wait for a slow client.
const MAX_WAITING_MESSAGES: usize = 64;

/// The gRPC service for scoring.
pub(super) struct ScoringRpc {
    pub scoring: Arc<scoring::ScoringService>,
    /// Used to end streams when their callers' tokens expire or are revoked.
    pub tokens: TokenService,
}

type Scored = Result<ScoredPair, ServiceError>;

#[tonic::async_trait]
impl ScoringService for ScoringRpc {
    async fn score_pairs(
        &self,
        request: Request<pb::ScorePairsRequest>,
    ) -> Result<Response<pb::ScorePairsResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        let (options, per_token) = convert::options(r.options)?;
        if r.pairs.is_empty() || r.pairs.len() > MAX_PAIRS {
            return Err(status(ServiceError::invalid(
                "pairs",
                format!("has {} pairs: send 1 to {MAX_PAIRS}", r.pairs.len()),
            )));
        }
        let session = self
            .scoring
            .session(&caller, options)
            .await
            .map_err(status)?;
        // The tasks are dropped with this call, so pairs are not scored for a client that has left.
        let mut tasks = JoinSet::new();
        let mut results: Vec<(String, Option<Scored>)> = Vec::with_capacity(r.pairs.len());
        for (i, pair) in r.pairs.into_iter().enumerate() {
            results.push((pair.id.clone(), None));
            let session = session.clone();
            tasks.spawn(async move { (i, score(&session, pair).await) }.in_current_span());
        }
        while let Some(done) = tasks.join_next().await {
            match done.map_err(|e| {
                status(ServiceError::internal(format!(
                    "a scoring task failed: {e}"
                )))
            })? {
                // The whole call fails, so that a client or a gateway can repeat it at another
                // replica without reading the results.
                (_, Err(e)) if e.is_draining() => return Err(status(e)),
                (i, scored) => results[i].1 = Some(scored),
            }
        }
        if results.iter().all(|(_, r)| {
            matches!(
                r,
                Some(Err(
                    ServiceError::Unavailable { .. } | ServiceError::ResourceExhausted { .. }
                ))
            )
        }) && let Some((_, Some(Err(e)))) = results.pop()
        {
            return Err(status(e));
        }
        // The warnings are about the reference, which these pairs do not use.
        let uses_logged = |scored: &Option<Scored>| matches!(scored, Some(Ok(pair)) if pair.logged);
        let warnings = match results.iter().all(|(_, scored)| uses_logged(scored)) {
            true => Vec::new(),
            false => session.warnings(),
        };
        let results = results
            .into_iter()
            .map(|(id, scored)| {
                pair_result(
                    id,
                    scored.unwrap_or_else(|| Err(ServiceError::internal("unscored"))),
                    per_token,
                )
            })
            .collect();
        Ok(Response::new(pb::ScorePairsResponse {
            results,
            policy_version: session.policy_version(),
            reference_version: session.reference_version().unwrap_or_default(),
            normalization: convert::normalization(session.normalization()),
            warnings,
            calibration: session.calibration().map(convert::calibration),
        }))
    }

    type StreamScorePairsStream = ReceiverStream<Result<pb::StreamScorePairsResponse, Status>>;

    async fn stream_score_pairs(
        &self,
        request: Request<Streaming<pb::StreamScorePairsRequest>>,
    ) -> Result<Response<Self::StreamScorePairsStream>, Status> {
        let (caller, mut requests) = split_caller(request)?;
        let Some(Part::Options(options)) = requests.message().await?.and_then(|m| m.part) else {
            return Err(incomplete(
                "must be options in the first message of a scoring stream",
            ));
        };
        let (options, per_token) = convert::options(Some(options))?;
        let session = self
            .scoring
            .session(&caller, options)
            .await
            .map_err(status)?;
        let (answers, receiver) = mpsc::channel(MAX_WAITING_MESSAGES);
        let tokens = self.tokens.clone();
        let serving = async move {
            let ended = tokio::select! {
                ended = score_stream(requests, &answers, &session, per_token) => ended,
                e = tokens.until_invalid(&caller) => Err(status(e)),
            };
            if let Err(e) = ended {
                let _ = answers.send(Err(e)).await;
            }
        };
        tokio::spawn(serving.in_current_span());
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn score_completions(
        &self,
        request: Request<pb::ScoreCompletionsRequest>,
    ) -> Result<Response<pb::ScoreCompletionsResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        let (options, per_token) = convert::options(r.options)?;
        let n = r.completions.len();
        if n == 0 || n > MAX_COMPLETIONS {
            return Err(status(ServiceError::invalid(
                "completions",
                format!("has {n} answers: send 1 to {MAX_COMPLETIONS}"),
            )));
        }
        let prompt = convert::text("prompt", r.prompt).map_err(status)?;
        let mut completions = Vec::with_capacity(n);
        for (i, c) in r.completions.into_iter().enumerate() {
            completions.push(convert::text(&format!("completions[{i}]"), Some(c)).map_err(status)?);
        }
        let session = self
            .scoring
            .session(&caller, options)
            .await
            .map_err(status)?;
        let scored = session
            .admit_completions(prompt, completions)
            .await
            .map_err(status)?
            .score()
            .await
            .map_err(status)?;
        let results = scored
            .answers
            .into_iter()
            .map(|answer| {
                let result = match answer.score {
                    Ok(s) => {
                        pb::completion_result::Result::Score(convert::completion(s, per_token))
                    }
                    Err(e) => pb::completion_result::Result::Error(message(e)),
                };
                pb::CompletionResult {
                    result: Some(result),
                    probability: answer.probability,
                }
            })
            .collect();
        Ok(Response::new(pb::ScoreCompletionsResponse {
            results,
            ranking: scored.ranking.into_iter().map(|i| i as u32).collect(),
            policy_version: session.policy_version(),
            reference_version: session.reference_version().unwrap_or_default(),
            normalization: convert::normalization(session.normalization()),
            warnings: session.warnings(),
        }))
    }
}

async fn score(session: &ScoringSession, pair: pb::Pair) -> Scored {
    session.admit(convert::pair(pair)?).await?.score().await
}

fn pair_result(id: String, scored: Scored, per_token: bool) -> pb::PairResult {
    let result = match scored {
        Ok(s) => pb::pair_result::Result::Score(convert::pair_score(s, per_token)),
        Err(e) => pb::pair_result::Result::Error(message(e)),
    };
    pb::PairResult {
        id,
        result: Some(result),
    }
}

type Answers = mpsc::Sender<Result<pb::StreamScorePairsResponse, Status>>;

/// Reads pairs from a stream, scores at most [`IN_FLIGHT`] at a time, and answers each when it is
/// scored. Returns when the client has sent its last pair and all are answered, or has left.
async fn score_stream(
    mut requests: Streaming<pb::StreamScorePairsRequest>,
    answers: &Answers,
    session: &ScoringSession,
    per_token: bool,
) -> Result<(), Status> {
    let mut tasks: JoinSet<(String, Scored)> = JoinSet::new();
    let mut open = true;
    // The warnings are sent once. They are about the reference, so they go with the first answer to
    // a pair that uses it.
    let mut warnings = session.warnings();
    while open || !tasks.is_empty() {
        tokio::select! {
            next = requests.message(), if open && tasks.len() < IN_FLIGHT => match next? {
                Some(pb::StreamScorePairsRequest { part: Some(Part::Pair(pair)) }) => {
                    let id = pair.id.clone();
                    // `reserve` waits until there is room for the pair's text. The next message is
                    // read only then.
                    match convert::pair(pair) {
                        Ok(pair) => {
                            let reserved = tokio::select! {
                                reserved = session.reserve(pair) => reserved,
                                () = answers.closed() => return Ok(()),
                            };
                            let scored = async move { (id, score_reserved(reserved).await) };
                            tasks.spawn(scored.in_current_span());
                        }
                        Err(e) => drop(tasks.spawn(async move { (id, Err(e)) })),
                    }
                }
                Some(_) => {
                    return Err(incomplete(
                        "must be a pair in every message of a scoring stream after the options",
                    ));
                }
                None => open = false,
            },
            Some(done) = tasks.join_next() => {
                let (id, scored) = done.map_err(|e| {
                    status(ServiceError::internal(format!("a scoring task failed: {e}")))
                })?;
                let policy_version = scored
                    .as_ref()
                    .map_or_else(|_| session.policy_version(), |s| s.policy_version.clone());
                let uses_logged = scored.as_ref().is_ok_and(|s| s.logged);
                let answer = pb::StreamScorePairsResponse {
                    result: Some(pair_result(id, scored, per_token)),
                    policy_version,
                    normalization: convert::normalization(session.normalization()),
                    warnings: match uses_logged {
                        true => Vec::new(),
                        false => std::mem::take(&mut warnings),
                    },
                };
                if answers.send(Ok(answer)).await.is_err() {
                    return Ok(()); // the client has left; dropping the tasks abandons their work
                }
            }
            () = answers.closed() => return Ok(()),
        }
    }
    Ok(())
}
