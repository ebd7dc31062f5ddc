//! From the answer of a gRPC call to an HTTP answer: JSON, an event stream, or an error.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http_body::{Body as _, Frame};
use prost::Message as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, MessageDescriptor};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep};
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::request::{HTTP_STATUS, MAX_INLINE, next_frame};
use super::routes::Route;
use crate::rpc::canonical;
use crate::rpc::status::{status, to_rpc_status};
use crate::service::error::ServiceError;

/// Media type of an event stream.
pub const EVENT_STREAM: &str = "text/event-stream";
/// Media type of a stream with one JSON object a line.
const JSON_LINES: &str = "application/x-ndjson";
const JSON: &str = "application/json";

/// Time without an event after which an event stream has a comment. It keeps proxies from closing
/// the connection, and finds clients that are gone.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Time for which a resumed event stream waits for its first event before its headers are sent. If
/// the stream ends within it without an event, the answer is 204, after which an EventSource does
/// not connect again.
const RESUME_WAIT: Duration = Duration::from_secs(1);
/// Bytes before each message of a gRPC body: a flag and the length.
const PREFIX: usize = 5;

/// Form of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamForm {
    /// Server-sent events.
    Events,
    /// One JSON object a line.
    Lines,
}

/// Returns an error as the JSON of a google.rpc.Status.
pub fn error(http: StatusCode, status: &Status) -> Response<Body> {
    error_with(http, status, status_json(status, StatusJson::Plain))
}

/// Returns an error with a JSON body of its own, and the headers that belong to it.
pub fn error_with(http: StatusCode, status: &Status, body: Vec<u8>) -> Response<Body> {
    let mut response = json(http, body);
    let headers = response.headers_mut();
    let retry = status.get_details_retry_info().and_then(|r| r.retry_delay);
    if let Some(delay) = retry {
        let seconds = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
    if http == StatusCode::UNAUTHORIZED {
        let scheme = HeaderValue::from_static("Bearer");
        headers.insert(header::WWW_AUTHENTICATE, scheme);
    }
    response
}

/// Returns an answer with a JSON body.
pub fn json(http: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = with_type(JSON, full(body.into()));
    *response.status_mut() = http;
    response
}

fn full(bytes: Bytes) -> Body {
    Body::new(OneFrame(Some(bytes)))
}

fn with_type(media_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    for (name, value) in [
        (header::CONTENT_TYPE, media_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ] {
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static(value));
    }
    response
}

/// A body whose bytes are known.
struct OneFrame(Option<Bytes>);

impl http_body::Body for OneFrame {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.0.as_ref().map_or(0, |b| b.len() as u64))
    }
}

/// Converts the answer of a gRPC call. `resumes` is true for a client that continues a stream.
pub async fn convert(
    response: Response<Body>,
    route: &Route,
    form: StreamForm,
    resumes: bool,
) -> Response<Body> {
    let (head, body) = response.into_parts();
    let converted = match failure(&head.headers) {
        Some(status) => error_of(&status, &head.headers),
        None if route.method.is_server_streaming() => stream(body, route, form, resumes).await,
        None => one_message(body, route.method.output()).await,
    };
    with_headers(converted, head.headers)
}

/// Returns the status in the headers or trailers of a call that failed.
pub fn failure(headers: &HeaderMap) -> Option<Status> {
    Status::from_header_map(headers).filter(|status| status.code() != Code::Ok)
}

/// Adds the headers of the gRPC answer that are not part of its protocol, e.g. the request's ID.
pub fn with_headers(mut response: Response<Body>, given: HeaderMap) -> Response<Body> {
    let is_protocol = |name: &HeaderName| {
        let name = name.as_str();
        name.starts_with("grpc-") || ["content-type", "date", HTTP_STATUS].contains(&name)
    };
    let headers = response.headers_mut();
    let mut last = None;
    for (name, value) in given {
        // Further values of a header come without its name.
        last = name.or(last);
        if let Some(name) = last.clone().filter(|name| !is_protocol(name)) {
            headers.append(name, value);
        }
    }
    response
}

/// Returns the answer for a call that failed. `headers` are the headers or trailers of the call.
fn error_of(status: &Status, headers: &HeaderMap) -> Response<Body> {
    error(http_status(status, headers), status)
}

/// Returns the HTTP status of a call that failed: the one in its headers or trailers, otherwise
/// that of its gRPC code, as google.rpc.Code lists them.
pub fn http_status(status: &Status, headers: &HeaderMap) -> StatusCode {
    let own = headers.get(HTTP_STATUS);
    if let Some(own) = own.and_then(|v| StatusCode::from_bytes(v.as_bytes()).ok()) {
        return own;
    }
    match status.code() {
        Code::Ok => StatusCode::OK,
        // The status that nginx introduced for a client that has left.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Form of a status in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StatusJson {
    /// Its fields.
    Plain,
    /// Its fields and `@type`, which distinguishes it from the messages of a stream.
    Typed,
}

fn status_json(status: &Status, form: StatusJson) -> Vec<u8> {
    let rpc = to_rpc_status(status.clone());
    let descriptor = canonical::pool()
        .ok()
        .and_then(|pool| pool.get_message_by_name("google.rpc.Status"));
    let text = descriptor.and_then(|d| canonical::proto_json(&d, &rpc.encode_to_vec()).ok());
    let text = text.unwrap_or_else(|| format!("{{\"code\":{}}}", rpc.code).into_bytes());
    if form == StatusJson::Plain {
        return text;
    }
    let start: &[u8] = b"{\"@type\":\"type.googleapis.com/google.rpc.Status\",";
    [start, text.get(1..).unwrap_or_default()].concat()
}

/// Returns the error for an answer that cannot be converted.
pub fn conversion(e: impl std::fmt::Display) -> Status {
    status(ServiceError::internal(format!(
        "an answer has no JSON: {e}"
    )))
}

/// Reads the whole body of a call: its messages, framed as gRPC sends them.
///
/// # Errors
/// Returns the error of a call that failed, with the HTTP status that it has.
pub async fn read_all(body: Body) -> Result<BytesMut, (StatusCode, Status)> {
    read_counted(body, |_| Ok(())).await
}

/// Reads the whole body of a call as [`read_all`] does. `count` gets the number of bytes of each
/// frame, and may refuse it.
///
/// # Errors
/// As [`read_all`], and the error of `count`.
pub async fn read_counted(
    mut body: Body,
    count: impl Fn(usize) -> Result<(), Status>,
) -> Result<BytesMut, (StatusCode, Status)> {
    let mut data = BytesMut::new();
    let mut trailers = HeaderMap::new();
    while let Some(frame) = next_frame(&mut body).await {
        match frame.map(Frame::into_data) {
            Ok(Ok(bytes)) => {
                if let Err(status) = count(bytes.len()) {
                    return Err((http_status(&status, &trailers), status));
                }
                data.extend_from_slice(&bytes);
            }
            Ok(Err(frame)) => trailers.extend(frame.into_trailers().unwrap_or_default()),
            Err(status) => return Err((http_status(&status, &trailers), status)),
        }
    }
    match failure(&trailers) {
        Some(status) => Err((http_status(&status, &trailers), status)),
        None => Ok(data),
    }
}

/// Converts the answer of a unary call.
async fn one_message(body: Body, descriptor: MessageDescriptor) -> Response<Body> {
    let mut data = match read_all(body).await {
        Ok(data) => data,
        Err((http, status)) => return error(http, &status),
    };
    let internal = |status: Status| error_of(&status, &HeaderMap::new());
    let Some(message) = take_message(&mut data) else {
        return internal(conversion("it has no message"));
    };
    let bytes = message.len();
    let convert = move || canonical::proto_json(&descriptor, &message).map_err(conversion);
    match inline_or_on_thread(bytes, convert).await {
        Ok(text) => json(StatusCode::OK, text),
        Err(status) => internal(status),
    }
}

/// Converts an answer. One of more than [`MAX_INLINE`] bytes is converted on a thread for blocking
/// work.
///
/// # Errors
/// Returns the error of `convert`.
pub async fn inline_or_on_thread<T: Send + 'static>(
    bytes: usize,
    convert: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    if bytes <= MAX_INLINE {
        return convert();
    }
    tokio::task::spawn_blocking(convert)
        .await
        .unwrap_or_else(|e| Err(conversion(e)))
}

/// Takes the first message of a gRPC body, if it is there completely. The server compresses no
/// answer, because the call did not say that it accepts this.
pub fn take_message(data: &mut BytesMut) -> Option<Bytes> {
    let length = data.get(1..PREFIX)?.try_into().ok()?;
    let length = u32::from_be_bytes(length) as usize;
    if data.len() < PREFIX + length {
        return None;
    }
    data.advance(PREFIX);
    Some(data.split_to(length).freeze())
}

async fn stream(body: Body, route: &Route, form: StreamForm, resumes: bool) -> Response<Body> {
    let text = EventText {
        descriptor: route.method.output(),
        sequence: route.cursor.as_ref().map(|c| c.sequence.clone()),
        form,
    };
    let mut events = Events::new(body, text);
    if resumes && form == StreamForm::Events {
        let first = std::future::poll_fn(|cx| events.poll_next(cx));
        // Without an event in time, the headers are sent and the stream waits.
        if let Ok(first) = tokio::time::timeout(RESUME_WAIT, first).await {
            if let Next::End(None) = first {
                let mut response = with_type(EVENT_STREAM, Body::empty());
                response.headers_mut().remove(header::CONTENT_TYPE);
                *response.status_mut() = StatusCode::NO_CONTENT;
                return response;
            }
            events.waiting = Some(first);
        }
    }
    streamed(events, form)
}

/// Returns the answer of a call whose messages come one by one as server-sent events.
pub fn event_stream(body: Body, text: impl StreamText) -> Response<Body> {
    streamed(Events::new(body, text), StreamForm::Events)
}

fn streamed(events: Events<impl StreamText>, form: StreamForm) -> Response<Body> {
    let media_type = match form {
        StreamForm::Events => EVENT_STREAM,
        StreamForm::Lines => JSON_LINES,
    };
    let mut response = with_type(media_type, Body::new(events));
    // nginx would otherwise collect events before it sends them.
    let unbuffered = HeaderName::from_static("x-accel-buffering");
    response
        .headers_mut()
        .insert(unbuffered, HeaderValue::from_static("no"));
    response
}

/// A step of a stream.
enum Next {
    /// The text of a message.
    Text(Vec<u8>),
    /// The end, with the error if there was one.
    End(Option<Status>),
}

impl From<Result<Vec<u8>, Status>> for Next {
    fn from(text: Result<Vec<u8>, Status>) -> Self {
        match text {
            Ok(text) => Next::Text(text),
            Err(status) => Next::End(Some(status)),
        }
    }
}

/// Turns the messages of a gRPC stream into the text of an HTTP stream.
pub trait StreamText: Clone + Send + Unpin + 'static {
    /// Returns true if the text may have comments while no message comes.
    fn has_comments(&self) -> bool;

    /// Returns the text of a message; it may be empty.
    ///
    /// # Errors
    /// Returns the error that ends the stream if the message cannot be converted.
    fn of(&self, message: &[u8]) -> Result<Vec<u8>, Status>;

    /// Returns the last text of a stream that ended with `error`; `None` if it has none.
    fn last(&self, error: Option<Status>) -> Option<Vec<u8>>;
}

/// Turns messages into their JSON.
#[derive(Clone)]
struct EventText {
    descriptor: MessageDescriptor,
    /// The field whose value is an event's ID.
    sequence: Option<FieldDescriptor>,
    form: StreamForm,
}

/// The body of a stream. It reads the gRPC stream only when the client takes more.
struct Events<T> {
    body: Body,
    /// Bytes of the gRPC stream that have not been converted yet.
    data: BytesMut,
    text: T,
    /// A message above [`MAX_INLINE`] that a thread for blocking work converts.
    converting: Option<JoinHandle<Result<Vec<u8>, Status>>>,
    heartbeat: Pin<Box<Sleep>>,
    /// A step that was already read.
    waiting: Option<Next>,
    has_ended: bool,
}

impl<T: StreamText> Events<T> {
    fn new(body: Body, text: T) -> Self {
        Events {
            body,
            data: BytesMut::new(),
            text,
            converting: None,
            heartbeat: Box::pin(tokio::time::sleep(HEARTBEAT)),
            waiting: None,
            has_ended: false,
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        loop {
            if let Some(converting) = &mut self.converting {
                let text = std::task::ready!(Pin::new(converting).poll(cx));
                self.converting = None;
                match text.unwrap_or_else(|e| Err(conversion(e))) {
                    Ok(text) if text.is_empty() => continue,
                    text => return Poll::Ready(text.into()),
                }
            }
            if let Some(message) = take_message(&mut self.data) {
                if message.len() <= MAX_INLINE {
                    match self.text.of(&message) {
                        Ok(text) if text.is_empty() => continue,
                        text => return Poll::Ready(text.into()),
                    }
                }
                let text = self.text.clone();
                self.converting = Some(tokio::task::spawn_blocking(move || text.of(&message)));
                continue;
            }
            let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
            match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(bytes))) => self.data.extend_from_slice(&bytes),
                Some(Ok(Err(frame))) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return Poll::Ready(Next::End(failure(&trailers)));
                }
                Some(Err(status)) => return Poll::Ready(Next::End(Some(status))),
                None => return Poll::Ready(Next::End(None)),
            }
        }
    }
}

impl StreamText for EventText {
    /// Lines have no comments: not every reader of lines would skip them.
    fn has_comments(&self) -> bool {
        self.form == StreamForm::Events
    }

    fn of(&self, message: &[u8]) -> Result<Vec<u8>, Status> {
        let json = canonical::proto_json(&self.descriptor, message).map_err(conversion)?;
        if self.form == StreamForm::Lines {
            return Ok([&json[..], b"\n"].concat());
        }
        let mut text = Vec::with_capacity(json.len() + 32);
        if let Some(sequence) = &self.sequence {
            let event =
                DynamicMessage::decode(self.descriptor.clone(), message).map_err(conversion)?;
            if let Some(id) = event.get_field(sequence).as_u64() {
                text.extend_from_slice(format!("id: {id}\n").as_bytes());
            }
        }
        text.extend_from_slice(b"data: ");
        text.extend_from_slice(&json);
        text.extend_from_slice(b"\n\n");
        Ok(text)
    }

    fn last(&self, error: Option<Status>) -> Option<Vec<u8>> {
        let error = error.map(|status| status_json(&status, StatusJson::Typed));
        match (self.form, error) {
            (StreamForm::Events, Some(error)) => {
                Some([b"event: status\ndata: ", &error[..], b"\n\n"].concat())
            }
            (StreamForm::Events, None) => Some(b"event: end\ndata: {}\n\n".to_vec()),
            (StreamForm::Lines, Some(error)) => Some([&error[..], b"\n"].concat()),
            (StreamForm::Lines, None) => None,
        }
    }
}

impl<T: StreamText> http_body::Body for Events<T> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if this.has_ended {
            return Poll::Ready(None);
        }
        let next = match this.waiting.take() {
            Some(next) => Poll::Ready(next),
            None => this.poll_next(cx),
        };
        let text = match next {
            Poll::Ready(Next::Text(text)) => Some(text),
            Poll::Ready(Next::End(error)) => {
                this.has_ended = true;
                this.text.last(error)
            }
            Poll::Pending => {
                if !this.text.has_comments() {
                    return Poll::Pending;
                }
                std::task::ready!(this.heartbeat.as_mut().poll(cx));
                Some(b": heartbeat\n\n".to_vec())
            }
        };
        this.heartbeat.as_mut().reset(Instant::now() + HEARTBEAT);
        Poll::Ready(text.map(|text| Ok(Frame::data(Bytes::from(text)))))
    }
}

#[cfg(test)]
mod tests;
