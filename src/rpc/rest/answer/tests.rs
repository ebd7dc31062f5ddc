use std::collections::VecDeque;

use prost::Message;
use tonic::codegen::http::Method;

use super::*;
use crate::rpc::pb;
use crate::rpc::rest::routes::{Lookup, find, table};

/// A body of given frames; without an end if `is_open`.
struct Frames {
    frames: VecDeque<Frame<Bytes>>,
    is_open: bool,
}

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.frames.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None if self.is_open => Poll::Pending,
            None => Poll::Ready(None),
        }
    }
}

/// Returns a gRPC body with events of these numbers, in frames of 7 bytes.
fn body(sequences: &[u64], end: Option<Status>) -> Body {
    let mut bytes = Vec::new();
    for &sequence in sequences {
        let event = pb::TrainingEvent {
            sequence,
            ..Default::default()
        };
        let event = event.encode_to_vec();
        bytes.push(0);
        bytes.extend((event.len() as u32).to_be_bytes());
        bytes.extend(event);
    }
    let mut frames: VecDeque<_> = bytes
        .chunks(7)
        .map(|chunk| Frame::data(Bytes::copy_from_slice(chunk)))
        .collect();
    let is_open = end.is_none();
    if let Some(status) = end {
        let mut trailers = HeaderMap::new();
        status.add_header(&mut trailers).unwrap();
        frames.push_back(Frame::trailers(trailers));
    }
    Body::new(Frames { frames, is_open })
}

fn ok() -> Status {
    let mut headers = HeaderMap::new();
    headers.insert("grpc-status", HeaderValue::from_static("0"));
    Status::from_header_map(&headers).unwrap()
}

fn route() -> &'static Route {
    let path = "/v1/trainingJobs/x/events:stream";
    match find(table().unwrap(), &Method::GET, path) {
        Lookup::Route(route, _) => route,
        other => panic!("{other:?}"),
    }
}

async fn text(mut body: Body) -> String {
    let mut all = Vec::new();
    while let Some(frame) = next_frame(&mut body).await {
        all.extend(frame.unwrap().into_data().unwrap());
    }
    String::from_utf8(all).unwrap()
}

#[tokio::test]
async fn events_have_their_numbers_and_an_end() {
    let draining = status(ServiceError::draining());
    for (end, last) in [
        (ok(), "event: end\ndata: {}"),
        (draining, "event: status\ndata: {"),
    ] {
        let response = stream(body(&[4, 5], Some(end)), route(), StreamForm::Events, false).await;
        assert_eq!(response.headers()["content-type"], EVENT_STREAM);
        let text = text(response.into_body()).await;
        let events: Vec<&str> = text.split("\n\n").collect();
        assert_eq!(events.len(), 4, "{text}");
        assert!(
            events[0].starts_with("id: 4\ndata: {\"sequence\":\"4\""),
            "{text}"
        );
        assert!(events[1].starts_with("id: 5\ndata: {"), "{text}");
        assert!(events[2].starts_with(last), "{text}");
    }
}

#[tokio::test]
async fn lines_have_no_end_but_an_error() {
    let response = stream(body(&[1], Some(ok())), route(), StreamForm::Lines, false).await;
    assert_eq!(text(response.into_body()).await, "{\"sequence\":\"1\"}\n");
    let end = Some(status(ServiceError::draining()));
    let response = stream(body(&[1], end), route(), StreamForm::Lines, false).await;
    let text = text(response.into_body()).await;
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["@type"], "type.googleapis.com/google.rpc.Status");
    assert_eq!(last["code"], 14);
}

#[tokio::test]
async fn a_resumed_stream_without_new_events_has_no_content() {
    let resumed = |sequences: &[u64]| {
        stream(
            body(sequences, Some(ok())),
            route(),
            StreamForm::Events,
            true,
        )
    };
    assert_eq!(resumed(&[]).await.status(), StatusCode::NO_CONTENT);
    let response = resumed(&[9]).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(text(response.into_body()).await.starts_with("id: 9\n"));
}

/// Returns a stream of events whose first heartbeat is due after `quiet`.
fn events(body: Body, quiet: Duration) -> Events<EventText> {
    Events {
        body,
        data: BytesMut::new(),
        text: EventText {
            descriptor: route().method.output(),
            sequence: None,
            form: StreamForm::Events,
        },
        converting: None,
        heartbeat: Box::pin(tokio::time::sleep(quiet)),
        waiting: None,
        has_ended: false,
    }
}

#[test]
fn a_large_message_is_converted_on_another_thread() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .unwrap();
    let log = |message: String| {
        let log = pb::LogMessage {
            message,
            ..Default::default()
        };
        let event = pb::TrainingEvent {
            event: Some(pb::training_event::Event::Log(log)),
            ..Default::default()
        };
        let event = event.encode_to_vec();
        let mut bytes = vec![0];
        bytes.extend((event.len() as u32).to_be_bytes());
        bytes.extend(event);
        let frames = VecDeque::from([Frame::data(Bytes::from(bytes))]);
        Body::new(Frames {
            frames,
            is_open: false,
        })
    };
    let is_ready = |events: &mut Events<EventText>| {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        Pin::new(events).poll_frame(&mut cx).is_ready()
    };
    let small = log("x".to_owned());
    runtime.block_on(async {
        // The only other thread is busy until the end of the first poll.
        let (release, released) = std::sync::mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || released.recv());
        assert!(is_ready(&mut events(small, HEARTBEAT)));
        let mut large = events(log("x".repeat(MAX_INLINE)), HEARTBEAT);
        assert!(!is_ready(&mut large));
        drop(release);
        let text = text(Body::new(large)).await;
        assert!(text.contains(&"x".repeat(MAX_INLINE)));
        assert!(text.ends_with("event: end\ndata: {}\n\n"));
    });
}

#[tokio::test]
async fn a_quiet_stream_has_heartbeats() {
    let mut events = events(body(&[], None), Duration::ZERO);
    let frame = std::future::poll_fn(|cx| Pin::new(&mut events).poll_frame(cx)).await;
    let data = frame.unwrap().unwrap().into_data().unwrap();
    assert_eq!(data, ": heartbeat\n\n");
    assert!(events.heartbeat.deadline() > Instant::now() + HEARTBEAT / 2);
}

#[tokio::test]
async fn an_error_has_its_http_status_and_headers() {
    let unavailable = status(ServiceError::draining());
    let response = error_of(&unavailable, &HeaderMap::new());
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let after: u64 = response.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(after >= 1);
    let body: serde_json::Value = serde_json::from_str(&text(response.into_body()).await).unwrap();
    assert_eq!(body["code"], 14);
    let details = body["details"].as_array().unwrap();
    let of_type = |name: &str| {
        details
            .iter()
            .find(|d| d["@type"].to_string().contains(name))
    };
    assert_eq!(of_type("ErrorInfo").unwrap()["reason"], "DRAINING");
    assert!(of_type("RetryInfo").unwrap()["retryDelay"].is_string());

    let mut own = HeaderMap::new();
    own.insert(HTTP_STATUS, HeaderValue::from_static("413"));
    let response = error_of(&status(ServiceError::invalid("body", "x")), &own);
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
}
