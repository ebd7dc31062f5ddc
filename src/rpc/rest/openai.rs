//! OpenAI's API for chat and text completions under `/openai/v1`, by calls of the gRPC service, for
//! clients that were written for it.
//!
//! Names of models are IDs of base models, or full names of policies. A parameter that would change
//! the answer and is not supported is refused by name. Each prompt of a request is a call of its
//! own.

mod answer;
mod endpoint;
mod request;
mod tokens;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tonic::Status;
use tonic::body::Body;

use self::answer::AnswerConverter;
pub use self::answer::error;
pub use self::endpoint::Endpoint;
use self::request::AnswerOptions;
use super::request::{LateBody, converted, framed, read_body};
use crate::rpc::pb;

/// Beginning of the paths of this API.
pub const PREFIX: &str = "/openai/v1/";

/// A request whose headers have been checked.
#[derive(Debug)]
pub struct OpenAiCall {
    /// The method.
    pub endpoint: Endpoint,
    /// True if the headers say that the body is JSON.
    pub is_json: bool,
    /// Maximum size of the body, in bytes.
    pub limit: usize,
    /// Time limit for the body.
    pub timeout: Duration,
}

impl OpenAiCall {
    /// Returns the body of the gRPC call, and what converts the call's answer.
    pub fn into_message(self, body: Body) -> (LateBody, AnswerConverter) {
        let asked = Arc::new(OnceLock::new());
        let converter = AnswerConverter {
            endpoint: self.endpoint.clone(),
            asked: Arc::clone(&asked),
        };
        (LateBody::reading(self.read(body, asked)), converter)
    }

    /// Reads the body and returns the message of the call, framed as gRPC sends it.
    async fn read(self, body: Body, asked: Arc<OnceLock<AnswerOptions>>) -> Result<Bytes, Status> {
        let is_chat = match self.endpoint {
            Endpoint::Models => {
                return Ok(framed(&pb::ListModelsRequest {}.encode_to_vec()));
            }
            Endpoint::Model(id) => {
                let name = format!("models/{id}");
                return Ok(framed(&pb::GetModelRequest { name }.encode_to_vec()));
            }
            Endpoint::Chat => true,
            Endpoint::Text => false,
        };
        let text = read_body(body, self.is_json, self.limit, self.timeout).await?;
        let convert = move |text: &[u8]| {
            let (message, parsed) = request::generation(is_chat, text)?;
            // Each call reads its body once.
            let _ = asked.set(parsed);
            Ok(framed(&message.encode_to_vec()))
        };
        converted(text, convert).await
    }
}
