//! A server without a model that refuses rows of calls, for clients that have to wait.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bradley::rpc::pb;
use bradley::rpc::pb::model_service_server::{ModelService, ModelServiceServer};
use bradley::rpc::pb::scoring_service_server::{ScoringService, ScoringServiceServer};
use prost::Message as _;
use tokio::net::TcpListener;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Names of its models.
const MODELS: [&str; 2] = ["models/tuned", "models/base"];

/// A server that scores the first row of its first calls and refuses the others. Later it scores
/// everything.
#[derive(Clone)]
pub struct RefusingServer {
    /// Number of calls of which it refuses rows.
    refusals: usize,
    /// The time after which it asks to send its second row again. That of row N is N times shorter.
    retry_after: Duration,
    /// Times of the calls so far, without those that identify the weights.
    calls: Arc<Mutex<Vec<Instant>>>,
}

impl RefusingServer {
    /// Starts a server on a port of its own, and returns it with its address.
    pub async fn start(refusals: usize, retry_after: Duration) -> (Self, String) {
        let server = RefusingServer {
            refusals,
            retry_after,
            calls: Arc::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (_, health) = tonic_health::server::health_reporter();
        let router = tonic::transport::Server::builder()
            .add_service(health)
            .add_service(ModelServiceServer::new(server.clone()))
            .add_service(ScoringServiceServer::new(server.clone()));
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        (server, address)
    }

    /// Returns the times between its calls.
    pub fn pauses(&self) -> Vec<Duration> {
        let calls = self.calls.lock().unwrap();
        calls.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    /// Takes note of a call. Returns true if rows of it are refused.
    fn is_busy(&self) -> bool {
        let mut calls = self.calls.lock().unwrap();
        calls.push(Instant::now());
        calls.len() <= self.refusals
    }

    /// Returns the refusal of the row at a place from 1.
    fn refusal(&self, place: usize) -> tonic_types::Status {
        let details = ErrorDetails::with_retry_info(Some(self.retry_after / place as u32));
        let message = "the queue is full";
        let status = Status::with_error_details(Code::Unavailable, message, details);
        tonic_types::Status::decode(status.details()).unwrap()
    }
}

fn model(name: &str) -> pb::Model {
    pb::Model {
        name: name.to_owned(),
        ..Default::default()
    }
}

#[tonic::async_trait]
impl ModelService for RefusingServer {
    async fn get_model(
        &self,
        request: Request<pb::GetModelRequest>,
    ) -> Result<Response<pb::Model>, Status> {
        Ok(Response::new(model(&request.into_inner().name)))
    }

    async fn list_models(
        &self,
        _: Request<pb::ListModelsRequest>,
    ) -> Result<Response<pb::ListModelsResponse>, Status> {
        let models = MODELS.map(model).to_vec();
        Ok(Response::new(pb::ListModelsResponse { models }))
    }
}

#[tonic::async_trait]
impl ScoringService for RefusingServer {
    type StreamScorePairsStream = ReceiverStream<Result<pb::StreamScorePairsResponse, Status>>;

    async fn score_pairs(
        &self,
        request: Request<pb::ScorePairsRequest>,
    ) -> Result<Response<pb::ScorePairsResponse>, Status> {
        let pairs = request.into_inner().pairs;
        // The pair with which a client identifies the weights has no id.
        let is_identified = pairs.iter().any(|pair| pair.id.is_empty());
        let is_busy = !is_identified && self.is_busy();
        let result = |pair: pb::Pair| {
            let place: usize = pair.id.parse().unwrap_or_default();
            let result = match is_busy && place > 0 {
                true => pb::pair_result::Result::Error(self.refusal(place)),
                false => pb::pair_result::Result::Score(pb::PairScore {
                    probability: 0.5,
                    a: Some(pb::CompletionScore::default()),
                    b: Some(pb::CompletionScore::default()),
                    ..Default::default()
                }),
            };
            pb::PairResult {
                id: pair.id,
                result: Some(result),
            }
        };
        Ok(Response::new(pb::ScorePairsResponse {
            results: pairs.into_iter().map(result).collect(),
            policy_version: MODELS[0].to_owned(),
            reference_version: MODELS[1].to_owned(),
            ..Default::default()
        }))
    }

    async fn stream_score_pairs(
        &self,
        _: Request<Streaming<pb::StreamScorePairsRequest>>,
    ) -> Result<Response<Self::StreamScorePairsStream>, Status> {
        Err(Status::unimplemented("this server has no streams"))
    }

    async fn score_completions(
        &self,
        request: Request<pb::ScoreCompletionsRequest>,
    ) -> Result<Response<pb::ScoreCompletionsResponse>, Status> {
        let is_busy = self.is_busy();
        let count = request.into_inner().completions.len();
        let result = |place: usize| {
            let result = match is_busy && place > 0 {
                true => pb::completion_result::Result::Error(self.refusal(place)),
                false => pb::completion_result::Result::Score(pb::CompletionScore::default()),
            };
            pb::CompletionResult {
                result: Some(result),
                probability: 0.0,
            }
        };
        Ok(Response::new(pb::ScoreCompletionsResponse {
            results: (0..count).map(result).collect(),
            ranking: (0..count as u32).collect(),
            policy_version: MODELS[0].to_owned(),
            reference_version: MODELS[1].to_owned(),
            ..Default::default()
        }))
    }
}
