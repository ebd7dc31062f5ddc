//! One span, one counter and one histogram for every call.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use tonic::Code;
use tonic::codegen::http::{HeaderValue, Request, Response};
use tower::{Layer, Service};
use tracing::Instrument;

use super::status;

/// The header that carries a request's id, taken from the client or made here, and given back.
const REQUEST_ID: &str = "x-request-id";

/// Adds [`Observe`] to a server.
#[derive(Clone, Copy, Debug)]
pub(super) struct ObserveLayer;

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Observe<S> {
        Observe { inner }
    }
}

/// A service whose calls are traced and counted.
#[derive(Clone, Debug)]
pub(super) struct Observe<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Observe<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: std::fmt::Display,
    B: Send + 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<R>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let method = request.uri().path().to_owned();
        let id = request.headers().get(REQUEST_ID).and_then(|v| v.to_str().ok()).filter(|v| v.len() <= 128).map(str::to_owned);
        let id = id.unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
        let span = tracing::info_span!("rpc", method, request_id = id);
        let call = self.inner.call(request);
        let start = Instant::now();
        let observed = async move {
            let mut result = call.await;
            let code = match &mut result {
                Ok(response) => {
                    if let Ok(value) = HeaderValue::from_str(&id) {
                        response.headers_mut().insert(REQUEST_ID, value);
                    }
                    if let Some(status) = status::explained(response.headers()) {
                        let headers = response.headers_mut();
                        headers.remove("grpc-message");
                        // It fails only for text that is no header, which `Status` encodes.
                        let _ = status.add_header(headers);
                    }
                    // An error without an answer has its status among the headers; a stream's later error is its own event.
                    let code = response.headers().get("grpc-status").and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<i32>().ok());
                    code.map_or(Code::Ok, Code::from)
                }
                Err(_) => Code::Internal,
            };
            let seconds = start.elapsed().as_secs_f64();
            let (method_label, code_label) = (label(&method), format!("{code:?}"));
            metrics::counter!("bradley_requests_total", "method" => method_label.clone(), "code" => code_label).increment(1);
            metrics::histogram!("bradley_request_seconds", "method" => method_label).record(seconds);
            tracing::debug!(code = ?code, seconds, "request served");
            result
        };
        Box::pin(observed.instrument(span))
    }
}

/// Only the server's own methods become label values: a client cannot make up new ones.
fn label(path: &str) -> String {
    match path.strip_prefix('/').filter(|p| p.starts_with("bradley.v1.") || p.starts_with("grpc.")) {
        Some(p) if p.len() <= 96 && p.matches('/').count() == 1 => p.to_owned(),
        _ => "unknown".to_owned(),
    }
}
