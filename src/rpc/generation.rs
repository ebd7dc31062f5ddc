//! Implements the gRPC GenerationService.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

use super::auth::split_caller;
use super::convert::generation as convert;
use super::pb::{self, generation_service_server};
use super::status::status;
use crate::engine::api::EngineError;
use crate::service::auth::tokens::TokenService;
use crate::service::error::ServiceError;
use crate::service::generation::{Generation, GenerationService};

/// Maximum number of responses that wait for a slow client. Meanwhile further tokens collect in the
/// engine's channel, and the engine waits when that is full.
const MAX_WAITING_MESSAGES: usize = 4;
/// Maximum time for which a response waits for a slow client.
const SEND_LIMIT: Duration = Duration::from_secs(60);

/// The gRPC service for generation.
pub(super) struct GenerationRpc {
    pub generation: Arc<GenerationService>,
    /// Used to end streams when their callers' tokens expire or are revoked.
    pub tokens: TokenService,
}

type Responses = mpsc::Sender<Result<pb::GenerateCompletionsResponse, Status>>;

#[tonic::async_trait]
impl generation_service_server::GenerationService for GenerationRpc {
    type GenerateCompletionsStream =
        ReceiverStream<Result<pb::GenerateCompletionsResponse, Status>>;

    async fn generate_completions(
        &self,
        request: Request<pb::GenerateCompletionsRequest>,
    ) -> Result<Response<Self::GenerateCompletionsStream>, Status> {
        let (caller, r) = split_caller(request)?;
        let (options, log_probs) = convert::request(r)?;
        let seed = options.sampling.seed;
        let generation = self
            .generation
            .begin(&caller, options)
            .await
            .map_err(status)?;
        let (responses, receiver) = mpsc::channel(MAX_WAITING_MESSAGES);
        let tokens = self.tokens.clone();
        let serving = async move {
            let ended = tokio::select! {
                ended = send_all(generation, &responses, seed, log_probs) => ended,
                e = tokens.until_invalid(&caller) => Err(e),
                // The client has left. Dropping the generation ends its work.
                () = responses.closed() => return,
            };
            if let Err(e) = ended {
                // The generation has ended, so this wait for the client holds no part of its work.
                let _ = responses.send(Err(status(e))).await;
            }
        };
        tokio::spawn(serving.in_current_span());
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Sends the prompt's tokens if they were asked for, the samples, then the numbers of tokens.
async fn send_all(
    mut generation: Generation,
    responses: &Responses,
    seed: u64,
    log_probs: bool,
) -> Result<(), ServiceError> {
    loop {
        let tokens = generation.next_of_prompt().await?;
        if tokens.is_empty() {
            break;
        }
        let response = pb::GenerateCompletionsResponse {
            policy_version: generation.policy_version().to_owned(),
            seed,
            prompt_tokens: tokens.into_iter().map(convert::prompt_token).collect(),
            ..Default::default()
        };
        if !send(responses, response, SEND_LIMIT).await? {
            return Ok(());
        }
    }
    loop {
        let parts = generation.next().await?;
        let is_over = parts.is_empty();
        let response = pb::GenerateCompletionsResponse {
            deltas: parts
                .into_iter()
                .map(|part| convert::delta(part, log_probs))
                .collect(),
            policy_version: generation.policy_version().to_owned(),
            seed,
            usage: is_over.then(|| pb::GenerationUsage {
                prompt_tokens: generation.prompt_tokens() as u32,
                completion_tokens: generation.completion_tokens() as u32,
            }),
            prompt_tokens: Vec::new(),
        };
        if !send(responses, response, SEND_LIMIT).await? || is_over {
            return Ok(());
        }
    }
}

/// Sends a response. Returns false if the client has left.
///
/// # Errors
/// `Aborted` if the client does not read for the time `limit`.
async fn send(
    responses: &Responses,
    response: pb::GenerateCompletionsResponse,
    limit: Duration,
) -> Result<bool, ServiceError> {
    match timeout(limit, responses.send(Ok(response))).await {
        Ok(sent) => Ok(sent.is_ok()),
        Err(_) => Err(EngineError::AnswerNotRead { waited: limit }.into()),
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn a_client_that_does_not_read_ends_the_call_with_a_reason() {
        let (responses, mut receiver) = mpsc::channel(1);
        let response = pb::GenerateCompletionsResponse::default;
        let long = Duration::from_secs(3600);
        assert!(send(&responses, response(), long).await.unwrap());
        let e = send(&responses, response(), Duration::from_millis(2)).await;
        let e = status(e.unwrap_err());
        assert_eq!(e.code(), Code::Aborted);
        assert!(e.message().contains("read it as it comes"), "{e}");
        receiver.recv().await.unwrap().unwrap();
        assert!(send(&responses, response(), long).await.unwrap());
        drop(receiver);
        assert!(!send(&responses, response(), long).await.unwrap());
    }
}
