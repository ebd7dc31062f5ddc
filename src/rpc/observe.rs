//! Traces, counts and times every call, enforces its deadline and returns its request id.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http_body::Frame;
use prost::Message as _;
use tokio::time::Sleep;
use tonic::Code;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, HeaderValue, Request, Response};
use tower::{Layer, Service};
use tracing::Instrument;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::auth::HEALTH_CHECK_METHOD;
use super::connections::OpenCall;
use super::listener::Peer;
use super::{pb, status};
use crate::service::error::ServiceError;
use crate::telemetry::trace;

/// Header with the id of a call. A client may send one of at most 128 bytes of ASCII; otherwise the
/// server creates it. The answer has it, too.
pub(super) const REQUEST_ID: &str = "x-request-id";

/// Deadlines are enforced here this long before the transport enforces them, because the
/// transport's error has no details.
const DEADLINE_MARGIN: Duration = Duration::from_millis(3);

/// Layer that adds [`Observe`] to a server.
#[derive(Clone, Copy, Debug)]
pub(super) struct ObserveLayer;

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Observe<S> {
        Observe { inner }
    }
}

/// A service that traces and counts its calls.
#[derive(Clone, Debug)]
pub(super) struct Observe<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for Observe<S>
where
    S: Service<Request<B>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: std::fmt::Display,
    B: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let method = known_method(request.uri().path());
        let id = request_id(request.headers());
        let span = span(method, &id, request.headers());
        let trace = span.context();
        let traceparent = trace::format(&trace);
        let left = time_left(request.headers());
        let deadline = left.and_then(|left| tokio::time::Instant::now().checked_add(left));
        // The call counts as open until its whole answer has been sent.
        let open = request.extensions().get::<Peer>().and_then(|peer| {
            // A health check is not counted as an open call: it needs no token, so one that never
            // ends must not keep its connection open.
            peer.activity.touch();
            (method != HEALTH_CHECK_METHOD).then(|| peer.activity.begin_call())
        });
        let call = self.inner.call(request);
        let mut observed_call = ObservedCall::new(method);
        let observed = async move {
            // After the deadline the call is dropped. Its work that still waits for the device is
            // then never started.
            let mut result = match deadline {
                Some(deadline) => tokio::time::timeout_at(deadline, call)
                    .await
                    .unwrap_or_else(|_| {
                        Ok(status::status(ServiceError::DeadlineExceeded).into_http())
                    }),
                None => call.await,
            };
            let code = match &mut result {
                Ok(response) => {
                    for (name, value) in [
                        (REQUEST_ID, Some(&id)),
                        (trace::TRACEPARENT, traceparent.as_ref()),
                    ] {
                        if let Some(value) = value.and_then(|v| HeaderValue::from_str(v).ok()) {
                            response.headers_mut().insert(name, value);
                        }
                    }
                    if let Some(status) = status::of_malformed_message(response.headers()) {
                        let headers = response.headers_mut();
                        headers.remove("grpc-message");
                        // `Status` encodes its text for headers, so this does not fail.
                        let _ = status.add_header(headers);
                    }
                    // An error without a body has its status in the headers. A later error of a
                    // stream is not counted here.
                    let code = response
                        .headers()
                        .get("grpc-status")
                        .and_then(|v| v.to_str().ok())
                        .and_then(|v| v.parse::<i32>().ok());
                    code.map_or(Code::Ok, Code::from)
                }
                Err(_) => Code::Internal,
            };
            observed_call.ended(code);
            let deadline = deadline.map(|at| Box::pin(tokio::time::sleep_until(at)));
            result.map(|response| {
                response.map(|body| {
                    Body::new(AnswerBody {
                        body,
                        deadline,
                        _open: open,
                    })
                })
            })
        };
        Box::pin(observed.instrument(span))
    }
}

/// Returns the id of a call: the client's, or a new one.
pub(super) fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|v| v.to_str().ok());
    match given.filter(|v| v.len() <= 128) {
        Some(given) => given.to_owned(),
        None => uuid::Uuid::now_v7().to_string(),
    }
}

/// The body of an answer. Its call counts as open until the body is dropped. A body that is not
/// complete at the call's deadline ends with DEADLINE_EXCEEDED.
struct AnswerBody {
    body: Body,
    /// Timer of the deadline; `None` if there is none, and after the end of the body.
    deadline: Option<Pin<Box<Sleep>>>,
    _open: Option<OpenCall>,
}

impl http_body::Body for AnswerBody {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = &mut *self;
        // The timer is polled first, because a stream may always have a further message.
        if let Some(timer) = &mut this.deadline
            && timer.as_mut().poll(cx).is_ready()
        {
            this.deadline = None;
            // Dropping the stream ends the work of the call.
            this.body = Body::empty();
            let mut trailers = HeaderMap::new();
            let late = status::status(ServiceError::DeadlineExceeded);
            let added = late.add_header(&mut trailers);
            return Poll::Ready(Some(added.map(|()| Frame::trailers(trailers))));
        }
        let frame = std::task::ready!(Pin::new(&mut this.body).poll_frame(cx));
        let has_ended = match &frame {
            Some(Ok(frame)) => frame.is_trailers(),
            Some(Err(_)) | None => true,
        };
        if has_ended {
            this.deadline = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self.deadline {
            // The deadline may cut the body off.
            Some(_) => http_body::SizeHint::default(),
            None => self.body.size_hint(),
        }
    }
}

/// Counts and logs a call when it ends. A call that is dropped before its end was cancelled by its
/// client.
struct ObservedCall {
    method: &'static str,
    start: Instant,
    code: Code,
}

impl ObservedCall {
    fn new(method: &'static str) -> Self {
        ObservedCall {
            method,
            start: Instant::now(),
            code: Code::Cancelled,
        }
    }

    /// Sets the call's code. This is a method because the future must capture the whole struct,
    /// whose `Drop` counts the call; an assignment would capture only the field.
    fn ended(&mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for ObservedCall {
    fn drop(&mut self) {
        let Self { method, code, .. } = *self;
        let seconds = self.start.elapsed().as_secs_f64();
        let code_label = format!("{code:?}");
        let this = tracing::Span::current();
        this.set_attribute("rpc.grpc.status_code", code as i64);
        if is_server_fault(code) {
            this.set_status(opentelemetry::trace::Status::error(code_label.clone()));
        }
        metrics::counter!("bradley_requests_total", "method" => method, "code" => code_label)
            .increment(1);
        metrics::histogram!("bradley_request_seconds", "method" => method).record(seconds);
        tracing::debug!(?code, seconds, "request served");
    }
}

/// Creates the call's span, in the caller's trace if the call has one. Logs show the trace's id
/// even if no spans are exported.
fn span(method: &'static str, id: &str, headers: &HeaderMap) -> tracing::Span {
    let caller = trace::parse(
        headers
            .get(trace::TRACEPARENT)
            .and_then(|v| v.to_str().ok()),
    );
    let name = method.trim_start_matches('/');
    let span = tracing::info_span!(
        "rpc",
        method,
        request_id = id,
        trace_id = Empty,
        otel.name = name,
        otel.kind = "server"
    );
    let known = trace::id(&caller);
    // This fails only if no spans are exported.
    let _ = span.set_parent(caller);
    if let Some(trace_id) = known.or_else(|| trace::id(&span.context())) {
        span.record("trace_id", trace_id);
    }
    if let Some((service, method)) = name.split_once('/') {
        span.set_attribute("rpc.system", "grpc");
        span.set_attribute("rpc.service", service);
        span.set_attribute("rpc.method", method);
    }
    span
}

/// Returns true if the code may be the server's fault. Only spans with such a code are marked as
/// errors.
fn is_server_fault(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

/// Returns the time that the client's `grpc-timeout` leaves, minus [`DEADLINE_MARGIN`]; `None`
/// without a valid one.
fn time_left(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    // The gRPC protocol allows at most eight digits.
    let n: u64 = Some(number).filter(|n| n.len() <= 8)?.parse().ok()?;
    let left = match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    };
    Some(left.saturating_sub(DEADLINE_MARGIN))
}

/// Returns the path of a method if the server has it, else `unknown`. Without this, callers could
/// create metric series and fill logs with invented names.
pub(super) fn known_method(path: &str) -> &'static str {
    METHODS.get(path).map_or("unknown", String::as_str)
}

/// Paths `/package.Service/Method` of all methods that are served.
static METHODS: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let sets = [
        pb::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
    ];
    let files = sets
        .iter()
        .filter_map(|bytes| prost_types::FileDescriptorSet::decode(*bytes).ok())
        .flat_map(|set| set.file);
    let mut all: HashSet<String> = files
        .flat_map(|file| {
            let package = file.package().to_owned();
            file.service.into_iter().flat_map(move |service| {
                let name = format!("/{package}.{}", service.name());
                service
                    .method
                    .into_iter()
                    .map(move |m| format!("{name}/{}", m.name()))
            })
        })
        .collect();
    all.extend(
        ["v1", "v1alpha"]
            .map(|v| format!("/grpc.reflection.{v}.ServerReflection/ServerReflectionInfo")),
    );
    all
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_methods_that_exist_have_names() {
        for path in [
            "/bradley.v1.ScoringService/ScorePairs",
            "/bradley.v1.TrainingService/EstimateTrainingJob",
            "/grpc.health.v1.Health/Check",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ] {
            assert_eq!(known_method(path), path);
        }
        assert_eq!(
            known_method("/bradley.v1.ScoringService/Nothing"),
            "unknown"
        );
    }

    #[test]
    fn deadlines_are_read_in_every_unit() {
        let left = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", HeaderValue::from_str(text).unwrap());
            time_left(&headers)
        };
        assert_eq!(left("2S"), Some(Duration::from_millis(1997)));
        assert_eq!(left("2M"), Some(Duration::from_millis(119_997)));
        assert_eq!(left("50m"), Some(Duration::from_millis(47)));
        assert_eq!(left("5000u"), Some(Duration::from_millis(2)));
        assert_eq!(left("1n"), Some(Duration::ZERO));
        assert_eq!(
            left("1H"),
            Some(Duration::from_secs(3600) - DEADLINE_MARGIN)
        );
        for wrong in ["", "S", "1x", "123456789S", "é"] {
            assert_eq!(left(wrong), None, "{wrong:?}");
        }
    }
}
