//! REST and server-sent events on the gRPC port, for every method with a `google.api.http`
//! annotation whose request is one message.
//!
//! [`RestService`] turns an HTTP request into the gRPC call of the same method and hands it to the
//! layers below, so that authentication, limits, deadlines, metrics and the audit log are those of
//! gRPC. REST's routes are not in the code: `routes` reads the annotations. `openai` has the few
//! paths of OpenAI's API, and answers them by gRPC calls, too.

mod answer;
mod hosts;
mod openai;
mod openapi;
mod request;
mod routes;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tonic::body::Body;
use tonic::codegen::http::request::Parts;
use tonic::codegen::http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header,
};
use tower::{Layer, Service};

use self::answer::StreamForm;
pub use self::hosts::RestHost;
use self::openai::{Endpoint, OpenAiCall};
use self::request::{LateBody, RequestParts};
use self::routes::{BodyFields, Lookup};
use super::auth::LogRate;
use super::listener::Peer;
use super::observe::{REQUEST_ID, request_id};
use super::status::status;
use crate::domain::violation::{quoted, shortened};
use crate::service::audit::AUDIT;
use crate::service::error::ServiceError;

/// Path of the OpenAPI document.
const DOCUMENT: &str = "/openapi.json";
/// Header with the time limit of a call, in seconds. `grpc-timeout` is refused, because gRPC's
/// transport would answer it with a gRPC error.
const TIMEOUT: &str = "x-server-timeout";
const GRPC_TIMEOUT: &str = "grpc-timeout";
const LAST_EVENT_ID: &str = "last-event-id";
/// Headers that the gRPC call gets.
const FORWARDED: [&str; 4] = ["authorization", "x-request-id", "traceparent", "tracestate"];
/// Maximum number of characters of a request that an error repeats.
const MAX_REPEATED: usize = 200;

/// Reads the annotations and builds the OpenAPI document, so that an error ends the start.
///
/// # Errors
/// Describes what cannot be used.
pub(super) fn prepare() -> Result<(), String> {
    routes::table()?;
    openapi::document()?;
    Ok(())
}

/// Layer that adds [`RestService`] to a server.
#[derive(Clone, Debug)]
pub(super) struct RestLayer {
    /// Maximum size of a request's body, in bytes; `None` serves gRPC only.
    pub max_body: Option<usize>,
    /// Maximum size of a request's headers, in bytes.
    pub max_headers: usize,
    /// Names of hosts that requests may ask for; `None` means every name.
    pub hosts: Option<Arc<[RestHost]>>,
    /// Limits the number of refusals that are logged.
    pub log: Arc<LogRate>,
}

impl<S> Layer<S> for RestLayer {
    type Service = RestService<S>;

    fn layer(&self, inner: S) -> RestService<S> {
        RestService {
            inner,
            layer: self.clone(),
        }
    }
}

/// A service that answers REST requests by calls of the gRPC service inside it.
#[derive(Clone, Debug)]
pub(super) struct RestService<S> {
    inner: S,
    layer: RestLayer,
}

impl<S> Service<Request<Body>> for RestService<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // Only `self.inner` was polled ready, so the call uses it, and `self` keeps the clone.
        let replacement = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, replacement);
        let is_grpc = is_grpc(&request);
        let max_body = match self.layer.max_body {
            Some(max_body) if !(is_grpc && request.version() == Version::HTTP_2) => max_body,
            _ => return Box::pin(inner.call(request)),
        };
        if let Some(peer) = request.extensions().get::<Peer>() {
            peer.activity.touch();
        }
        let layer = self.layer.clone();
        Box::pin(async move {
            let planned = match is_grpc {
                true => Err(Refused::of(
                    StatusCode::HTTP_VERSION_NOT_SUPPORTED,
                    ServiceError::invalid("version", "is HTTP/1.1: gRPC needs HTTP/2"),
                )),
                false => plan(&request, &layer, max_body),
            };
            match planned {
                Ok(Plan::Call(call)) => {
                    let (route, form, resumes) = (call.parts.route, call.form, call.resumes());
                    let response = inner.call(call.into_grpc(request)).await?;
                    Ok(answer::convert(response, route, form, resumes).await)
                }
                Ok(Plan::OpenAi(call, timeout)) => {
                    let path = call.endpoint.grpc_path();
                    let start = Instant::now();
                    let (head, body) = request.into_parts();
                    let (message, converter) = call.into_message(body);
                    let first = grpc_call(head.clone(), path, timeout.clone(), message);
                    let response = inner.call(first).await?;
                    // Calls the service for a further prompt of the request.
                    let call = move |message: Bytes| {
                        let left = timeout.as_ref().and_then(|t| time_left(t, start.elapsed()));
                        let message = LateBody::reading(std::future::ready(Ok(message)));
                        let call = grpc_call(head.clone(), path, left, message);
                        let mut service = inner.clone();
                        async move {
                            std::future::poll_fn(|cx| service.poll_ready(cx)).await?;
                            service.call(call).await
                        }
                    };
                    converter.convert(response, call).await
                }
                Ok(Plan::Document(document)) => {
                    Ok(answer::json(StatusCode::OK, document.as_bytes()))
                }
                Err(refused) => Ok(layer.refuse(&request, refused)),
            }
        })
    }
}

impl RestLayer {
    /// Answers a request that is refused, and logs it if the caller may not make it.
    fn refuse(&self, request: &Request<Body>, refused: Refused) -> Response<Body> {
        let id = request_id(request.headers());
        if refused.http == StatusCode::FORBIDDEN && self.log.try_log() {
            let peer = request.extensions().get::<Peer>();
            let peer = peer.map(|p| p.address.to_string());
            tracing::warn!(
                target: AUDIT,
                peer,
                request_id = id,
                reason = %refused.error,
                "refused"
            );
        }
        let mut response = refused.into_response(request.uri().path());
        if let Ok(id) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        response
    }
}

fn content_type(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::CONTENT_TYPE)?.to_str().ok()
}

fn is_grpc(request: &Request<Body>) -> bool {
    content_type(request.headers()).is_some_and(|t| t.starts_with("application/grpc"))
}

/// A request that is refused before a method is called.
struct Refused {
    http: StatusCode,
    error: ServiceError,
    allow: Option<String>,
}

impl Refused {
    fn of(http: StatusCode, error: ServiceError) -> Self {
        Refused {
            http,
            error,
            allow: None,
        }
    }

    /// Returns the answer, in the form of the API that `path` belongs to.
    fn into_response(self, path: &str) -> Response<Body> {
        let status = status(self.error);
        let code = format!("{:?}", status.code());
        metrics::counter!("bradley_requests_total", "method" => "unknown", "code" => code)
            .increment(1);
        let mut response = match path.starts_with(openai::PREFIX) {
            true => openai::error(self.http, &status),
            false => answer::error(self.http, &status),
        };
        if let Some(allow) = self.allow.and_then(|a| HeaderValue::from_str(&a).ok()) {
            response.headers_mut().insert(header::ALLOW, allow);
        }
        response
    }
}

/// The gRPC call of a request.
struct PlannedCall {
    parts: RequestParts,
    form: StreamForm,
    timeout: Option<HeaderValue>,
}

/// The way in which a request is answered.
enum Plan {
    /// By a gRPC call.
    Call(PlannedCall),
    /// By a gRPC call with this time limit, whose answer gets OpenAI's form.
    OpenAi(OpenAiCall, Option<HeaderValue>),
    /// By the OpenAPI document.
    Document(&'static str),
}

impl PlannedCall {
    /// Returns true if the client continues a stream.
    fn resumes(&self) -> bool {
        self.parts.last_event_id.is_some() && self.parts.route.cursor.is_some()
    }

    fn into_grpc(self, request: Request<Body>) -> Request<Body> {
        let (head, body) = request.into_parts();
        let path = self.parts.route.grpc_path.as_str();
        grpc_call(head, path, self.timeout, LateBody::new(self.parts, body))
    }
}

/// Returns the gRPC call of a request with the headers `head`.
fn grpc_call(
    head: Parts,
    path: &'static str,
    timeout: Option<HeaderValue>,
    message: LateBody,
) -> Request<Body> {
    let mut call = Request::new(Body::new(message));
    *call.method_mut() = Method::POST;
    *call.uri_mut() = Uri::from_static(path);
    *call.version_mut() = Version::HTTP_2;
    *call.extensions_mut() = head.extensions;
    let headers = call.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    if let Some(timeout) = timeout {
        headers.insert(GRPC_TIMEOUT, timeout);
    }
    for name in FORWARDED {
        if let Some(value) = head.headers.get(name) {
            headers.insert(name, value.clone());
        }
    }
    call
}

/// Finds the method of a request and checks its headers.
fn plan(request: &Request<Body>, layer: &RestLayer, max_body: usize) -> Result<Plan, Refused> {
    let max_headers = layer.max_headers;
    let headers = request.headers();
    let header_bytes: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum();
    if header_bytes > max_headers {
        return Err(Refused::of(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ServiceError::invalid("headers", format!("have more than {max_headers} bytes")),
        ));
    }
    if let Some(hosts) = &layer.hosts {
        check_host(request, hosts)?;
    }
    check_origin(request)?;
    let (verb, path) = (request.method(), request.uri().path());
    if path == DOCUMENT {
        return match *verb {
            Method::GET => openapi::document()
                .map(Plan::Document)
                .map_err(|e| Refused::of(StatusCode::INTERNAL_SERVER_ERROR, internal(e))),
            _ => Err(other_verb(verb, &[&Method::GET])),
        };
    }
    if let Some(openai_path) = path.strip_prefix(openai::PREFIX) {
        return plan_openai(request, openai_path, max_body);
    }
    let table =
        routes::table().map_err(|e| Refused::of(StatusCode::INTERNAL_SERVER_ERROR, internal(e)))?;
    let (route, parts) = match routes::find(table, verb, path) {
        Lookup::Route(route, parts) => (route, parts),
        Lookup::OtherVerbs(verbs) => return Err(other_verb(verb, &verbs)),
        Lookup::NoPath => return Err(no_path(path)),
    };
    let is_json = match route.body {
        BodyFields::None => {
            let remedy = "this method takes its fields as parameters of the query";
            check_no_body(headers, remedy)?
        }
        _ => check_body(headers)?,
    };
    let bindings = route
        .template
        .bindings(&parts)
        .ok_or_else(|| bad("path", "is not UTF-8"))?;
    let last_event_id = match headers.get(LAST_EVENT_ID) {
        // A browser sends an empty one if no event had an ID.
        Some(id) if !id.is_empty() => {
            let id = id
                .to_str()
                .map_err(|_| bad("last-event-id", "is not ASCII"))?;
            Some(id.to_owned())
        }
        _ => None,
    };
    Ok(Plan::Call(PlannedCall {
        parts: RequestParts {
            route,
            bindings,
            query: request.uri().query().unwrap_or_default().to_owned(),
            last_event_id,
            is_json,
            limit: max_body,
            timeout: request::BODY_TIMEOUT,
        },
        form: stream_form(headers),
        timeout: timeout(headers)?,
    }))
}

/// Checks the headers of a request for OpenAI's API. `path` has no [`openai::PREFIX`].
fn plan_openai(request: &Request<Body>, path: &str, max_body: usize) -> Result<Plan, Refused> {
    let (verb, headers) = (request.method(), request.headers());
    let endpoint = Endpoint::find(path).ok_or_else(|| no_path(request.uri().path()))?;
    if *verb != endpoint.verb() {
        return Err(other_verb(verb, &[&endpoint.verb()]));
    }
    if request.uri().query().is_some_and(|query| !query.is_empty()) {
        return Err(bad("query", "has no meaning for this path: leave it out"));
    }
    let is_json = match endpoint.has_body() {
        true => check_body(headers)?,
        false => check_no_body(headers, "leave it out")?,
    };
    let call = OpenAiCall {
        endpoint,
        is_json,
        limit: max_body,
        timeout: request::BODY_TIMEOUT,
    };
    Ok(Plan::OpenAi(call, timeout(headers)?))
}

fn no_path(path: &str) -> Refused {
    let error = ServiceError::not_found("path", shortened(path, MAX_REPEATED));
    Refused::of(StatusCode::NOT_FOUND, error)
}

fn internal(e: &str) -> ServiceError {
    ServiceError::internal(e)
}

fn bad(field: &str, description: impl Into<String>) -> Refused {
    Refused::of(
        StatusCode::BAD_REQUEST,
        ServiceError::invalid(field, description),
    )
}

fn other_verb(verb: &Method, accepted: &[&Method]) -> Refused {
    let accepted: Vec<&str> = accepted.iter().map(|m| m.as_str()).collect();
    let accepted = accepted.join(", ");
    let given = shortened(verb.as_str(), MAX_REPEATED);
    Refused {
        allow: Some(accepted.clone()),
        ..Refused::of(
            StatusCode::METHOD_NOT_ALLOWED,
            ServiceError::invalid("method", format!("is {given}: this path has {accepted}")),
        )
    }
}

/// Returns the host that a request asks for, with its port.
fn host(request: &Request<Body>) -> Option<&str> {
    match request.uri().authority() {
        Some(authority) => Some(authority.as_str()),
        None => request.headers().get(header::HOST)?.to_str().ok(),
    }
}

fn denied(message: String) -> Refused {
    let error = ServiceError::PermissionDenied { message };
    Refused::of(StatusCode::FORBIDDEN, error)
}

/// Refuses requests for a host with an unknown name, because a page may have pointed its own name
/// at this server. Every browser names the host.
fn check_host(request: &Request<Body>, known: &[RestHost]) -> Result<(), Refused> {
    let has_host = request.uri().authority().is_some() || request.headers().contains_key("host");
    let host = host(request).unwrap_or_default();
    if !has_host || hosts::is_known(host, known) {
        return Ok(());
    }
    Err(denied(format!(
        "the host is {}: without tokens and TLS this server answers REST under an IP address, \
         localhost and the names in the setting rest_hosts; add the name to it",
        quoted(&shortened(host, MAX_REPEATED))
    )))
}

/// Refuses requests that a browser sends for a page of another site. Such a page could otherwise
/// send calls to a server without tokens that only this machine reaches. [`check_host`] refuses the
/// pages whose host name was pointed at this machine.
fn check_origin(request: &Request<Body>) -> Result<(), Refused> {
    let Some(origin) = request.headers().get(header::ORIGIN) else {
        return Ok(());
    };
    let origin = origin.to_str().ok().and_then(|o| o.split_once("://"));
    match (origin, host(request)) {
        (Some((_, origin)), Some(host)) if origin.eq_ignore_ascii_case(host) => Ok(()),
        _ => Err(denied(
            "this server answers no pages of other origins (CORS): put a proxy in front of it \
             that allows them and removes the header origin"
                .to_owned(),
        )),
    }
}

/// Checks that a request has no body. Returns false: the headers do not say that it is JSON.
/// `remedy` ends the error.
fn check_no_body(headers: &HeaderMap, remedy: &str) -> Result<bool, Refused> {
    let length = headers.get(header::CONTENT_LENGTH);
    let has_body =
        length.is_some_and(|v| v != "0") || headers.contains_key(header::TRANSFER_ENCODING);
    match has_body {
        true => Err(bad("body", format!("is not accepted: {remedy}"))),
        false => Ok(false),
    }
}

/// Checks the headers about the body. Returns true if they say that it is JSON.
fn check_body(headers: &HeaderMap) -> Result<bool, Refused> {
    let unsupported = |field: &str, needed: &str| {
        let given = headers.get(field).and_then(|v| v.to_str().ok());
        let given = quoted(&shortened(given.unwrap_or_default(), MAX_REPEATED));
        let text = format!("is {given}: {needed}");
        Refused::of(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ServiceError::invalid(field, text),
        )
    };
    if headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|v| v != "identity")
    {
        return Err(unsupported("content-encoding", "it must not be compressed"));
    }
    match content_type(headers) {
        None if headers.contains_key(header::CONTENT_TYPE) => {
            Err(unsupported("content-type", "it must be application/json"))
        }
        None => Ok(false),
        Some(text) => {
            let essence = text.split(';').next().unwrap_or_default().trim();
            match essence.eq_ignore_ascii_case("application/json") {
                true => Ok(true),
                false => Err(unsupported("content-type", "it must be application/json")),
            }
        }
    }
}

fn stream_form(headers: &HeaderMap) -> StreamForm {
    let mut accepted = headers.get_all(header::ACCEPT).iter();
    let accepts_events = accepted.any(|value| {
        let value = value.to_str().unwrap_or_default().to_ascii_lowercase();
        value
            .split(',')
            .any(|part| part.split(';').next().map(str::trim) == Some(answer::EVENT_STREAM))
    });
    match accepts_events {
        true => StreamForm::Events,
        false => StreamForm::Lines,
    }
}

/// Returns what is left of a time limit in gRPC's form, which [`timeout`] has returned.
fn time_left(limit: &HeaderValue, passed: Duration) -> Option<HeaderValue> {
    let millis = limit.to_str().ok()?.strip_suffix('m')?;
    let limit = Duration::from_millis(millis.parse().ok()?);
    let left = limit.saturating_sub(passed).as_millis().max(1);
    HeaderValue::from_str(&format!("{left}m")).ok()
}

/// Returns the time limit of a call in gRPC's form.
fn timeout(headers: &HeaderMap) -> Result<Option<HeaderValue>, Refused> {
    if headers.contains_key(GRPC_TIMEOUT) {
        return Err(bad(
            "grpc-timeout",
            "is for gRPC: send x-server-timeout with a number of seconds",
        ));
    }
    let Some(value) = headers.get(TIMEOUT) else {
        return Ok(None);
    };
    let seconds = value.to_str().ok().and_then(|v| v.parse::<f64>().ok());
    let limit = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
    let limit = limit.filter(|limit| !limit.is_zero());
    let problem = "must be a number of seconds above 0";
    let limit = limit.ok_or_else(|| bad("x-server-timeout", problem))?;
    // The gRPC protocol allows at most eight digits.
    let millis = limit.as_millis().clamp(1, 99_999_999);
    Ok(HeaderValue::from_str(&format!("{millis}m")).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_limit_ends_but_is_never_zero() {
        let limit = HeaderValue::from_static("2500m");
        for (passed, left) in [(0, "2500m"), (1000, "1500m"), (2500, "1m"), (9000, "1m")] {
            let passed = Duration::from_millis(passed);
            assert_eq!(time_left(&limit, passed).unwrap(), left, "{passed:?}");
        }
        assert_eq!(
            time_left(&HeaderValue::from_static("2S"), Duration::ZERO),
            None
        );
    }
}
