//! From an HTTP request to the message of a gRPC call.
//!
//! The body is read when the gRPC service asks for the message, so after the caller's token and
//! role have been checked, as for gRPC's own messages.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body::Frame;
use prost::Message as _;
use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value};
use tokio::sync::Semaphore;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::StatusCode;
use tonic::metadata::MetadataValue;

use super::routes::{BodyFields, Route};
use crate::domain::violation::{Violations, quoted, shortened};
use crate::rpc::canonical::{self, CanonicalError};
use crate::rpc::status::status;
use crate::service::error::ServiceError;

/// Metadata of an error that has another HTTP status than its gRPC code. It is removed from the
/// answer.
pub const HTTP_STATUS: &str = "x-bradley-http-status";

/// Time limit for a client to send the body of a request.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Bodies and answers above this size, in bytes, are converted on a thread for blocking work.
pub const MAX_INLINE: usize = 64 << 10;
/// Maximum number of values and keys in a body. Each takes up to a hundred bytes of memory, however
/// short it is in the text.
const MAX_VALUES: usize = 1 << 20;
/// Permits for converting bodies above [`MAX_INLINE`]: two at the same time, further ones wait.
static LARGE_BODY_PERMITS: Semaphore = Semaphore::const_new(2);

/// The parts of a request that its message is made of.
#[derive(Debug)]
pub struct RequestParts {
    /// The route.
    pub route: &'static Route,
    /// Fields in the path, with their values.
    pub bindings: Vec<(String, String)>,
    /// The query string; may be empty.
    pub query: String,
    /// Value of the header `last-event-id`.
    pub last_event_id: Option<String>,
    /// True if the request has the content type of JSON.
    pub is_json: bool,
    /// Maximum size of the body, in bytes.
    pub limit: usize,
    /// Time limit for the body.
    pub timeout: Duration,
}

/// A message that is being read.
type LateMessage = Pin<Box<dyn Future<Output = Result<Bytes, Status>> + Send>>;

/// The body of a gRPC call that becomes known when it is polled.
pub struct LateBody(Option<LateMessage>);

impl LateBody {
    /// Makes the body of a call from its HTTP request.
    pub fn new(parts: RequestParts, body: Body) -> Self {
        LateBody::reading(read(parts, body))
    }

    /// Makes the body of a call from a message that is being read, framed as gRPC sends it.
    pub fn reading(message: impl Future<Output = Result<Bytes, Status>> + Send + 'static) -> Self {
        LateBody(Some(Box::pin(message)))
    }
}

impl http_body::Body for LateBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(message) = &mut self.0 else {
            return Poll::Ready(None);
        };
        let read = std::task::ready!(message.as_mut().poll(cx));
        self.0 = None;
        Poll::Ready(Some(read.map(Frame::data)))
    }
}

/// Returns an error that has its own HTTP status.
fn with_http(e: ServiceError, http: StatusCode) -> Status {
    let mut status = status(e);
    let value = MetadataValue::from(http.as_u16());
    status.metadata_mut().insert(HTTP_STATUS, value);
    status
}

/// Returns the next frame of a body.
pub async fn next_frame(body: &mut Body) -> Option<Result<Frame<Bytes>, Status>> {
    std::future::poll_fn(|cx| http_body::Body::poll_frame(Pin::new(&mut *body), cx)).await
}

/// Reads the body and returns the message, encoded and framed as gRPC sends it.
async fn read(parts: RequestParts, body: Body) -> Result<Bytes, Status> {
    let text = match parts.route.body {
        BodyFields::None => Bytes::new(),
        _ => read_body(body, parts.is_json, parts.limit, parts.timeout).await?,
    };
    converted(text, move |text| message(&parts, text)).await
}

/// Reads a body of at most `limit` bytes. `is_json` is true if the headers say that it is JSON.
///
/// # Errors
/// Returns the error for a body that is too long, late or not JSON by its headers.
pub async fn read_body(
    body: Body,
    is_json: bool,
    limit: usize,
    timeout: Duration,
) -> Result<Bytes, Status> {
    let text = tokio::time::timeout(timeout, collect(body, limit))
        .await
        .map_err(|_| {
            let seconds = timeout.as_secs();
            let late = format!("was not sent within {seconds} seconds");
            let e = ServiceError::invalid("body", late);
            with_http(e, StatusCode::REQUEST_TIMEOUT)
        })??;
    if !text.is_empty() && !is_json {
        let e = ServiceError::invalid(
            "content-type",
            "is missing: a body must be sent as application/json",
        );
        return Err(with_http(e, StatusCode::UNSUPPORTED_MEDIA_TYPE));
    }
    Ok(text)
}

/// Converts the text of a body. A long text is converted on a thread for blocking work.
///
/// # Errors
/// Returns the error of `convert`.
pub async fn converted(
    text: Bytes,
    convert: impl FnOnce(&[u8]) -> Result<Bytes, ServiceError> + Send + 'static,
) -> Result<Bytes, Status> {
    if text.len() <= MAX_INLINE {
        return convert(&text).map_err(status);
    }
    // The semaphore is never closed. The thread has the permit, because it continues when its call
    // has been cancelled.
    let permit = LARGE_BODY_PERMITS.acquire().await;
    let work = move || {
        let _permit = permit;
        convert(&text)
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| status(ServiceError::internal(e)))?
        .map_err(status)
}

async fn collect(mut body: Body, limit: usize) -> Result<Bytes, Status> {
    let mut all = BytesMut::new();
    while let Some(frame) = next_frame(&mut body).await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        if all.len() + data.len() > limit {
            let long = format!("has more than {limit} bytes (the server's max_message_bytes)");
            let e = ServiceError::invalid("body", long);
            return Err(with_http(e, StatusCode::PAYLOAD_TOO_LARGE));
        }
        all.extend_from_slice(&data);
    }
    Ok(all.freeze())
}

/// Makes the message from all parts of a request.
fn message(parts: &RequestParts, text: &[u8]) -> Result<Bytes, ServiceError> {
    let (route, request) = (parts.route, parts.route.method.input());
    let mut value = match &route.body {
        BodyFields::None => Value::Object(Map::new()),
        BodyFields::All if text.is_empty() => Value::Object(Map::new()),
        BodyFields::All => parse(text)?,
        BodyFields::One(field) => {
            let mut object = Map::new();
            if !text.is_empty() {
                object.insert(field.name().to_owned(), parse(text)?);
            }
            Value::Object(object)
        }
    };
    let mut wrong = Violations::default();
    if let Value::Object(object) = &mut value {
        for (key, text) in form_urlencoded::parse(parts.query.as_bytes()) {
            if let Err(problem) = set_parameter(route, &request, object, &key, &text) {
                wrong.push(shortened(&key, 100), problem);
            }
        }
        if let (Some(id), Some(cursor)) = (&parts.last_event_id, &route.cursor) {
            // An EventSource connects again with its first URL, so the header wins.
            object.insert(cursor.after.clone(), Value::String(id.clone()));
            object.remove("tail");
        }
        for (path, text) in &parts.bindings {
            set_binding(&request, object, path, text, &mut wrong);
        }
    }
    wrong.into_result().map_err(ServiceError::InvalidArgument)?;
    let message = canonical::dynamic_from_value(request, value).map_err(|e| match e {
        CanonicalError::Fields(wrong) => ServiceError::InvalidArgument(wrong),
        e => ServiceError::invalid("body", e.to_string()),
    })?;
    Ok(framed(&message.encode_to_vec()))
}

/// Returns a message with the prefix that gRPC sends before it: a flag and the length.
pub fn framed(message: &[u8]) -> Bytes {
    let mut all = BytesMut::with_capacity(message.len() + 5);
    all.put_u8(0);
    all.put_u32(message.len() as u32);
    all.put_slice(message);
    all.freeze()
}

/// Parses the JSON of a body.
///
/// # Errors
/// `InvalidArgument` if it is malformed or has too many values.
pub fn parse(text: &[u8]) -> Result<Value, ServiceError> {
    if has_too_many_values(text) {
        let many = format!("has more than {MAX_VALUES} values: divide the request");
        return Err(ServiceError::invalid("body", many));
    }
    serde_json::from_slice(text)
        .map_err(|e| ServiceError::invalid("body", format!("is not valid JSON: {e}")))
}

/// Returns true if a JSON text has more than [`MAX_VALUES`] values and keys besides the first. Each
/// follows a comma, a colon or an opening bracket outside of strings; these are counted.
fn has_too_many_values(text: &[u8]) -> bool {
    if text.len() < MAX_VALUES {
        return false;
    }
    let (mut values, mut in_string, mut is_escaped) = (0, false, false);
    for byte in text {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_string => is_escaped = true,
            b'"' => in_string = !in_string,
            b',' | b':' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    values > MAX_VALUES
}

/// Sets the field that a query parameter names. An error says what is wrong with the parameter.
fn set_parameter(
    route: &Route,
    request: &MessageDescriptor,
    object: &mut Map<String, Value>,
    key: &str,
    text: &str,
) -> Result<(), String> {
    if let BodyFields::All = route.body {
        return Err("is not accepted: this method takes its fields in the body".to_owned());
    }
    let (parents, last) = key.rsplit_once('.').unwrap_or(("", key));
    let (mut message, mut object) = (request.clone(), object);
    let mut path = String::new();
    for name in parents.split('.').filter(|_| !parents.is_empty()) {
        let field = field(&message, name, &path)?;
        check_is_parameter(route, &field, &path)?;
        let inner = match field.kind() {
            Kind::Message(inner) if !field.is_list() && !field.is_map() => inner,
            _ => return Err(format!("does not exist: {name} has no fields")),
        };
        path = join(&path, field.name());
        let entry = object
            .entry(field.name())
            .or_insert_with(|| Value::Object(Map::new()));
        let Value::Object(entry) = entry else {
            return Err(format!(
                "does not fit another parameter: {path} has a value"
            ));
        };
        (message, object) = (inner, entry);
    }
    let field = field(&message, last, &path)?;
    check_is_parameter(route, &field, &path)?;
    let value = parameter_value(&field, text)
        .ok_or_else(|| "cannot be a parameter: it is a message or a map".to_owned())?;
    if field.is_list() {
        let list = object
            .entry(field.name())
            .or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(list) = list {
            list.push(value);
        }
        return Ok(());
    }
    match object.insert(field.name().to_owned(), value) {
        None => Ok(()),
        Some(_) => Err("is given twice".to_owned()),
    }
}

fn field(message: &MessageDescriptor, name: &str, path: &str) -> Result<FieldDescriptor, String> {
    message
        .get_field_by_name(name)
        .or_else(|| message.get_field_by_json_name(name))
        .ok_or_else(|| canonical::unknown_key(message, &shortened(name, 100), path))
}

fn join(path: &str, name: &str) -> String {
    match path {
        "" => name.to_owned(),
        path => format!("{path}.{name}"),
    }
}

/// Refuses parameters for fields that the path or the body has.
fn check_is_parameter(route: &Route, field: &FieldDescriptor, path: &str) -> Result<(), String> {
    let path = join(path, field.name());
    if route.template.variables.iter().any(|v| v.field == path) {
        return Err("is part of the path, so it cannot be a parameter".to_owned());
    }
    match &route.body {
        BodyFields::One(body) if body.name() == path => {
            Err(format!("belongs into the body, which is the field {path}"))
        }
        _ => Ok(()),
    }
}

/// Returns a parameter as JSON for the field; `None` for fields that have no text form.
fn parameter_value(field: &FieldDescriptor, text: &str) -> Option<Value> {
    let string = || Value::String(text.to_owned());
    if field.is_map() {
        return None;
    }
    Some(match field.kind() {
        Kind::Bool => boolean(text),
        Kind::Enum(_) => match text.parse::<i32>() {
            Ok(number) => Value::from(number),
            Err(_) => string(),
        },
        Kind::Message(message) => match message.full_name() {
            "google.protobuf.FieldMask" => Value::String(camel_case(text)),
            "google.protobuf.BoolValue" => boolean(text),
            "google.protobuf.Timestamp"
            | "google.protobuf.Duration"
            | "google.protobuf.StringValue"
            | "google.protobuf.BytesValue"
            | "google.protobuf.DoubleValue"
            | "google.protobuf.FloatValue"
            | "google.protobuf.Int32Value"
            | "google.protobuf.Int64Value"
            | "google.protobuf.UInt32Value"
            | "google.protobuf.UInt64Value" => string(),
            _ => return None,
        },
        _ => string(),
    })
}

fn boolean(text: &str) -> Value {
    match text {
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        other => Value::String(other.to_owned()),
    }
}

/// Returns the paths of a field mask in the form of protobuf's JSON, which accepts no underscores.
fn camel_case(text: &str) -> String {
    let mut camel = String::with_capacity(text.len());
    let mut is_upper = false;
    for c in text.chars() {
        match c {
            '_' => is_upper = true,
            c if is_upper => {
                camel.extend(c.to_uppercase());
                is_upper = false;
            }
            c => camel.push(c),
        }
    }
    camel
}

/// Sets a field that the path has. The body may have the same value, but no other.
fn set_binding(
    request: &MessageDescriptor,
    object: &mut Map<String, Value>,
    path: &str,
    text: &str,
    wrong: &mut Violations,
) {
    let (mut message, mut object) = (request.clone(), object);
    let mut names = path.split('.').peekable();
    while let Some(name) = names.next() {
        let Some(field) = message.get_field_by_name(name) else {
            return;
        };
        let key = match object.contains_key(field.json_name()) {
            true => field.json_name().to_owned(),
            false => field.name().to_owned(),
        };
        if names.peek().is_none() {
            let other = match object.get(&key) {
                None | Some(Value::Null) => None,
                Some(Value::String(other)) if other.is_empty() || other == text => None,
                Some(Value::String(other)) => Some(quoted(other)),
                Some(other) => Some(shortened(&other.to_string(), 100)),
            };
            match other {
                Some(other) => wrong.push(
                    path,
                    format!("is {other} in the body and {} in the path", quoted(text)),
                ),
                None => {
                    object.insert(key, Value::String(text.to_owned()));
                }
            }
            return;
        }
        let Kind::Message(inner) = field.kind() else {
            return;
        };
        let entry = object.entry(key).or_insert(Value::Null);
        if entry.is_null() {
            *entry = Value::Object(Map::new());
        }
        // Another value is reported when the message is read.
        let Value::Object(entry) = entry else {
            return;
        };
        (message, object) = (inner, entry);
    }
}

#[cfg(test)]
mod tests;
