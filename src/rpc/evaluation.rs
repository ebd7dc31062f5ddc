//! Implements the gRPC EvaluationService.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

use super::auth::split_caller;
use super::convert::evaluation as convert;
use super::pb::evaluate_policy_response::Part;
use super::pb::{self, evaluation_service_server};
use super::status::status;
use crate::service::auth::tokens::TokenService;
use crate::service::evaluation::EvaluationService;

/// Maximum number of messages that wait for a slow client. Progress that finds no room is left out.
const MAX_WAITING_MESSAGES: usize = 2;

/// The gRPC service for evaluations.
pub(super) struct EvaluationRpc {
    pub evaluations: EvaluationService,
    /// Used to end evaluations when their callers' tokens expire or are revoked.
    pub tokens: TokenService,
}

#[tonic::async_trait]
impl evaluation_service_server::EvaluationService for EvaluationRpc {
    type EvaluatePolicyStream = ReceiverStream<Result<pb::EvaluatePolicyResponse, Status>>;

    async fn evaluate_policy(
        &self,
        request: Request<pb::EvaluatePolicyRequest>,
    ) -> Result<Response<Self::EvaluatePolicyStream>, Status> {
        let (caller, r) = split_caller(request)?;
        let evaluation = self
            .evaluations
            .begin(&caller, convert::request(r)?)
            .await
            .map_err(status)?;
        let (answers, receiver) = mpsc::channel(MAX_WAITING_MESSAGES);
        let tokens = self.tokens.clone();
        let serving = async move {
            let part = |part| pb::EvaluatePolicyResponse { part: Some(part) };
            let messages = answers.clone();
            let progress = move |progress| {
                // Without room, this progress is left out.
                let progress = part(Part::Progress(convert::progress(progress)));
                let _ = messages.try_send(Ok(progress));
            };
            let ended = tokio::select! {
                ended = evaluation.run(progress) => ended,
                e = tokens.until_invalid(&caller) => Err(e),
                // The client has left. Dropping the evaluation ends its work.
                () = answers.closed() => return,
            };
            let last = ended
                .map(|report| part(Part::Report(convert::report(report))))
                .map_err(status);
            let _ = answers.send(last).await;
        };
        tokio::spawn(serving.in_current_span());
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
