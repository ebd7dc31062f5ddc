//! REST and server-sent events on the gRPC port, over real sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use bradley::rpc::pb;
use prost_reflect::{DescriptorPool, MethodDescriptor};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rcgen::{CertificateParams, KeyPair};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tonic_types::StatusExt as _;

use crate::pages::{fenced, read};
use crate::server::{Server, create_token, finish, job, pairs, score, scored, submit, upload};
use crate::support::{golden, needed};
use crate::wait::until;

/// Time limit of one request.
const PATIENCE: Duration = Duration::from_secs(60);

fn tiny() -> String {
    format!("tiny={}", golden("models/llama").display())
}

/// Returns a client whose requests have a time limit.
pub fn client() -> reqwest::Client {
    // This fails if another test has done it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .timeout(PATIENCE)
        .build()
        .unwrap()
}

/// An HTTP answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: reqwest::header::HeaderMap,
    body: Value,
}

async fn send(request: RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let text = response.text().await.unwrap();
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    Answer {
        status,
        headers,
        body,
    }
}

fn request(server: &Server, verb: Method, path: &str) -> RequestBuilder {
    client().request(verb, format!("{}{path}", server.address))
}

async fn get(server: &Server, path: &str) -> Answer {
    send(request(server, Method::GET, path)).await
}

fn with_json(request: RequestBuilder, body: &Value) -> RequestBuilder {
    request
        .header("content-type", "application/json")
        .body(body.to_string())
}

async fn post(server: &Server, path: &str, body: Value) -> Answer {
    send(with_json(request(server, Method::POST, path), &body)).await
}

/// Returns the API's methods that REST can serve, with the HTTP method and the path of those that
/// are annotated.
fn methods() -> Vec<(MethodDescriptor, Option<(Method, String)>)> {
    let pool = DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
    let option = pool.get_extension_by_name("google.api.http").unwrap();
    let mut all = Vec::new();
    for method in pool
        .services()
        .flat_map(|s| s.methods().collect::<Vec<_>>())
    {
        if method.is_client_streaming() {
            continue;
        }
        let options = method.options();
        let rule = options.has_extension(&option).then(|| {
            let rule = options.get_extension(&option);
            let rule = rule.as_message().unwrap();
            ["get", "post", "patch", "delete"]
                .into_iter()
                .find_map(|verb| {
                    let path = rule.get_field_by_name(verb)?.as_str()?.to_owned();
                    let verb = verb.to_uppercase().parse().unwrap();
                    (!path.is_empty()).then_some((verb, path))
                })
                .unwrap()
        });
        all.push((method, rule));
    }
    all
}

/// Returns a path that fits a template.
fn example(template: &str) -> String {
    let mut path = String::new();
    for part in template.split(['{', '}']) {
        path += part.split_once('=').map_or(part, |(_, pattern)| pattern);
    }
    path.replace('*', "x")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_annotated_method_is_reachable() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let without: BTreeSet<String> = methods()
        .into_iter()
        .filter(|(_, rule)| rule.is_none())
        .map(|(method, _)| method.name().to_owned())
        .collect();
    // Its answer is a file in pieces.
    assert_eq!(without, BTreeSet::from(["DownloadCheckpoint".to_owned()]));
    let mut called = Vec::new();
    for (method, rule) in methods() {
        let Some((verb, template)) = rule else {
            continue;
        };
        let mut call = request(&server, verb.clone(), &example(&template));
        if verb == Method::POST || verb == Method::PATCH {
            call = with_json(call, &json!({}));
        }
        let answer = send(call).await;
        assert!(
            answer.headers.contains_key("x-request-id"),
            "{template}: {answer:?}"
        );
        assert!(
            !matches!(answer.status, 405 | 415 | 500 | 501),
            "{verb} {template}: {answer:?}"
        );
        called.push(format!(
            "/{}/{}",
            method.parent_service().full_name(),
            method.name()
        ));
    }
    assert!(called.len() > 20, "only {called:?}");
    let metrics = server.metrics();
    for method in called {
        let label = format!("bradley_requests_total{{method=\"{method}\"");
        assert!(metrics.contains(&label), "{method} was not called");
    }
}

/// The events of a stream so far: ID, name and data of each.
#[derive(Debug, Default)]
struct Received {
    text: String,
    events: Vec<(Option<u64>, String, Value)>,
}

impl Received {
    fn add(&mut self, bytes: &[u8]) {
        self.text += std::str::from_utf8(bytes).unwrap();
        while let Some((event, rest)) = self.text.split_once("\n\n") {
            let mut fields: BTreeMap<&str, &str> = BTreeMap::new();
            for line in event.lines() {
                let (name, value) = line.split_once(':').unwrap();
                fields.insert(name, value.trim_start());
            }
            if let Some(data) = fields.get("data") {
                self.events.push((
                    fields.get("id").map(|id| id.parse().unwrap()),
                    fields.get("event").unwrap_or(&"message").to_string(),
                    serde_json::from_str(data).unwrap(),
                ));
            }
            self.text = rest.to_owned();
        }
    }
}

fn event_stream(server: &Server, job: &str, last: Option<u64>) -> RequestBuilder {
    let path = format!("/v1/{job}/events:stream");
    let call = request(server, Method::GET, &path).header("accept", "text/event-stream");
    match last {
        Some(last) => call.header("last-event-id", last.to_string()),
        None => call,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_submitted_watched_and_scored_with() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let grpc = server.client().await;
    let dataset = upload(&grpc, "pairs.jsonl").await.name;
    let spec = json!({
        "policy": "models/tiny",
        "dataset": dataset,
        "lora": {"rank": 4},
        "optimizer": {"learningRate": 1e-2},
        "batch": {"batchSize": 2, "max_length": "256", "maxSteps": 12},
        "rowPolicy": "skip",
        "labels": {"zero": "", "team": "x"},
    });
    let created = post(&server, "/v1/trainingJobs?request_id=once", spec.clone()).await;
    assert_eq!(created.status, 200, "{created:?}");
    let name = created.body["name"].as_str().unwrap().to_owned();
    assert_eq!(created.body["rowPolicy"], "ROW_POLICY_SKIP");
    assert_eq!(created.body["labels"]["zero"], "");
    let again = post(&server, "/v1/trainingJobs?requestId=once", spec).await;
    assert_eq!(again.body["name"], name.as_str(), "the same request");

    // The stream breaks after two events and is resumed.
    let mut received = Received::default();
    let mut stream = event_stream(&server, &name, None).send().await.unwrap();
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    while received.events.len() < 2 {
        received.add(&stream.chunk().await.unwrap().expect("the stream ended"));
    }
    drop(stream);
    received.text.clear();
    let last = received.events.last().unwrap().0;
    let mut stream = event_stream(&server, &name, last).send().await.unwrap();
    assert_eq!(stream.status(), StatusCode::OK);
    while let Some(bytes) = stream.chunk().await.unwrap() {
        received.add(&bytes);
    }
    let (_, end, _) = received.events.pop().unwrap();
    assert_eq!(end, "end");
    let expected = finish(&grpc, &name).await;
    let ids: Vec<u64> = received.events.iter().map(|e| e.0.unwrap()).collect();
    assert_eq!(ids, (1..=expected.len() as u64).collect::<Vec<_>>());
    for ((_, _, data), event) in received.events.iter().zip(&expected) {
        let loss = |event: &pb::TrainingEvent| match &event.event {
            Some(pb::training_event::Event::StepMetrics(step)) => step.metrics.get("loss").copied(),
            _ => None,
        };
        assert_eq!(data["sequence"], event.sequence.to_string());
        assert_eq!(
            data["stepMetrics"]["metrics"]["loss"].as_f64(),
            loss(event),
            "{data}"
        );
    }
    let stream = event_stream(&server, &name, ids.last().copied())
        .send()
        .await
        .unwrap();
    assert_eq!(
        stream.status(),
        StatusCode::NO_CONTENT,
        "an EventSource stops"
    );

    // The same as lines, and as a page of a list.
    let lines = get(
        &server,
        &format!("/v1/{name}/events:stream?after_sequence=2"),
    )
    .await;
    assert_eq!(lines.headers["content-type"], "application/x-ndjson");
    let Value::String(lines) = lines.body else {
        panic!("the body is not text of several lines")
    };
    let sequences: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["sequence"].clone())
        .collect();
    assert_eq!(sequences.len(), expected.len() - 2);
    let page = get(&server, &format!("/v1/{name}/events?page_size=3")).await;
    assert_eq!(page.body["events"].as_array().unwrap().len(), 3);
    assert_eq!(page.body["more"], true);

    let done = get(&server, &format!("/v1/{name}")).await;
    assert_eq!(done.body["state"], "JOB_STATE_SUCCEEDED");
    assert_eq!(done.body["progress"]["step"], "12");
    let mask = format!("/v1/{name}?update_mask=display_name");
    let body = json!({"displayName": "renamed", "labels": {"x": "y"}});
    let update = with_json(request(&server, Method::PATCH, &mask), &body);
    let updated = send(update).await;
    assert_eq!(updated.body["displayName"], "renamed", "{updated:?}");
    assert_eq!(updated.body["labels"]["team"], "x");

    // Scores have the bits of gRPC's.
    let policy = format!("{name}/checkpoints/latest");
    let text = |m: &pb::Text| {
        let Some(pb::text::Form::Chat(list)) = &m.form else {
            panic!("not a chat row")
        };
        let messages: Vec<Value> = list
            .messages
            .iter()
            .map(|m| json!({"role": m.role, "content": m.content}))
            .collect();
        json!({"chat": {"messages": messages}})
    };
    let rows: Vec<Value> = pairs()
        .iter()
        .map(|p| {
            json!({
                "id": p.id,
                "prompt": text(p.prompt.as_ref().unwrap()),
                "a": text(p.a.as_ref().unwrap()),
                "b": text(p.b.as_ref().unwrap()),
            })
        })
        .collect();
    let body = json!({"options": {"policy": policy}, "pairs": rows});
    let rest = post(&server, "/v1/scoring:scorePairs", body).await;
    assert_eq!(rest.status, 200, "{rest:?}");
    let over_grpc = score(&grpc, &policy, pairs()).await;
    let results = rest.body["results"].as_array().unwrap();
    assert_eq!(results.len(), over_grpc.results.len());
    for (a, b) in results.iter().zip(&over_grpc.results) {
        let probability = a["score"]["probability"].as_f64().unwrap();
        assert_eq!(probability.to_bits(), scored(b).probability.to_bits());
    }
    let deleted = send(request(&server, Method::DELETE, &format!("/v1/{name}"))).await;
    assert_eq!((deleted.status, deleted.body), (200, json!({})));
    assert_eq!(get(&server, &format!("/v1/{name}")).await.status, 404);
}

fn reason(body: &Value) -> &str {
    let details = body["details"].as_array().unwrap();
    let info = details
        .iter()
        .find(|d| d["@type"] == "type.googleapis.com/google.rpc.ErrorInfo");
    info.unwrap()["reason"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_their_status_and_details() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(dir.path(), &tiny(), &["--max-message-bytes", "64KiB"]);
    let call = |verb: Method, path: &str| request(&server, verb, path);

    let unknown = get(&server, "/v1/nothing").await;
    assert_eq!((unknown.status, reason(&unknown.body)), (404, "NOT_FOUND"));
    let put = send(call(Method::PUT, "/v1/trainingJobs/x")).await;
    assert_eq!(put.status, 405);
    let allow = put.headers["allow"].to_str().unwrap();
    assert_eq!(
        allow.split(", ").collect::<BTreeSet<_>>(),
        ["GET", "PATCH", "DELETE"].into()
    );
    let options = send(call(Method::OPTIONS, "/v1/models")).await;
    assert_eq!(options.status, 405, "no CORS");
    assert!(!options.headers.contains_key("access-control-allow-origin"));

    let form = call(Method::POST, "/v1/scoring:scorePairs")
        .header("content-type", "application/x-www-form-urlencoded")
        .body("{}");
    let form = send(form).await;
    assert_eq!(form.status, 415, "{form:?}");
    assert!(
        form.body["message"]
            .as_str()
            .unwrap()
            .contains("application/json")
    );
    let untyped = send(call(Method::POST, "/v1/scoring:scorePairs").body("{}")).await;
    assert_eq!(untyped.status, 415, "{untyped:?}");
    let packed = call(Method::POST, "/v1/scoring:scorePairs").header("content-encoding", "gzip");
    assert_eq!(send(with_json(packed, &json!({}))).await.status, 415);
    let large = json!({"options": {"policy": "x".repeat(70 << 10)}});
    let large = post(&server, "/v1/scoring:scorePairs", large).await;
    assert_eq!(large.status, 413, "{large:?}");
    assert!(
        large.body["message"]
            .as_str()
            .unwrap()
            .contains("max_message_bytes")
    );
    assert!(!large.headers.contains_key("x-bradley-http-status"));
    let with_body = with_json(call(Method::GET, "/v1/models"), &json!({}));
    assert_eq!(send(with_body).await.status, 400);
    let headers = call(Method::GET, "/v1/models").header("x-long", "x".repeat(17 << 10));
    assert_eq!(send(headers).await.status, 431);
    let page = call(Method::GET, "/v1/models").header("origin", "https://example.com");
    let page = send(page).await;
    assert_eq!(
        (page.status, reason(&page.body)),
        (403, "PERMISSION_DENIED")
    );
    let own = call(Method::GET, "/v1/models").header("origin", server.address.clone());
    assert_eq!(send(own).await.status, 200);
    let grpc = call(Method::POST, "/bradley.v1.ModelService/ListModels")
        .header("content-type", "application/grpc");
    assert_eq!(send(grpc).await.status, 505);

    // The violations are those of gRPC.
    let body = json!({"options": {"policy": "models/tiny", "beta": -1}, "pairs": []});
    let rest = post(&server, "/v1/scoring:scorePairs", body).await;
    let options = pb::ScoringOptions {
        policy: "models/tiny".into(),
        beta: Some(-1.0),
        ..Default::default()
    };
    let over_grpc = server
        .client()
        .await
        .scoring()
        .score_pairs(pb::ScorePairsRequest {
            options: Some(options),
            pairs: Vec::new(),
        })
        .await
        .unwrap_err();
    assert_eq!((rest.status, rest.body["code"].as_i64()), (400, Some(3)));
    assert_eq!(rest.body["message"], over_grpc.message());
    let details = rest.body["details"].as_array().unwrap();
    let violations = details.iter().find_map(|d| d["fieldViolations"].as_array());
    let violations: Vec<(&str, &str)> = violations
        .unwrap()
        .iter()
        .map(|v| {
            (
                v["field"].as_str().unwrap(),
                v["description"].as_str().unwrap(),
            )
        })
        .collect();
    let expected = over_grpc
        .get_details_bad_request()
        .unwrap()
        .field_violations;
    let expected: Vec<(&str, &str)> = expected
        .iter()
        .map(|v| (v.field.as_str(), v.description.as_str()))
        .collect();
    assert_eq!(violations, expected);
    let misspelt = post(
        &server,
        "/v1/trainingJobs",
        json!({"polici": "models/tiny"}),
    )
    .await;
    assert_eq!(misspelt.status, 400);
    assert!(
        misspelt.body.to_string().contains("did you mean"),
        "{misspelt:?}"
    );

    let timeout = |value: &'static str| {
        let plain = |text: &str| json!({"plain": text});
        let pair = json!({"prompt": plain("Why? "), "a": plain("So. "), "b": plain("No.")});
        let body = json!({"options": {"policy": "models/tiny"}, "pairs": vec![pair; 500]});
        let call = request(&server, Method::POST, "/v1/scoring:scorePairs");
        with_json(call.header("x-server-timeout", value), &body)
    };
    let late = send(timeout("0.001")).await;
    assert_eq!(
        (late.status, reason(&late.body)),
        (504, "DEADLINE_EXCEEDED")
    );
    assert_eq!(send(timeout("soon")).await.status, 400);
    let grpc_timeout = call(Method::GET, "/v1/models").header("grpc-timeout", "1S");
    assert_eq!(send(grpc_timeout).await.status, 400);

    let traced = call(Method::GET, "/v1/models").header("x-request-id", "mine");
    let traced = send(traced).await;
    assert_eq!(traced.headers["x-request-id"], "mine");
    assert_eq!(traced.headers["cache-control"], "no-store");
}

/// Sends bytes over a new connection and returns all of the answer.
fn raw(address: &str, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // The server may close the connection before it has read everything.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn address(server: &Server) -> &str {
    server.address.trim_start_matches("http://")
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_roles_are_checked_before_a_body_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let scorer = create_token(dir.path(), "team", "score");
    let server = Server::start_with(dir.path(), &tiny(), &["--auth", "tokens"]);
    let nobody = get(&server, "/v1/models").await;
    assert_eq!(
        (nobody.status, reason(&nobody.body)),
        (401, "UNAUTHENTICATED")
    );
    assert_eq!(nobody.headers["www-authenticate"], "Bearer");
    let models = request(&server, Method::GET, "/v1/models").bearer_auth(&scorer);
    assert_eq!(send(models).await.body["models"][0]["name"], "models/tiny");
    let jobs = request(&server, Method::GET, "/v1/trainingJobs").bearer_auth(&scorer);
    assert_eq!(send(jobs).await.status, 403);
    // The document has nothing of this server.
    assert_eq!(get(&server, "/openapi.json").await.status, 200);
    // Nothing of the announced body is sent.
    for (credentials, status) in [("x", "401"), (scorer.as_str(), "403")] {
        let head = format!(
            "POST /v1/trainingJobs HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: 100000\r\n\
             authorization: Bearer {credentials}\r\n\r\n"
        );
        let answer = tokio::task::block_in_place(|| raw(address(&server), head.as_bytes()));
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    let refused = server.metric("bradley_refused_total ");
    assert!(refused >= Some(4.0), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_requests_are_refused_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let flags = [
        "--max-message-bytes",
        "1MiB",
        "--generation-cache-tokens",
        "1024",
    ];
    let server = Server::start_with(dir.path(), &tiny(), &flags);
    let mut random = StdRng::seed_from_u64(7);
    let mut templates: Vec<(Method, String)> = methods().into_iter().filter_map(|m| m.1).collect();
    for (verb, path) in [
        (Method::GET, "models"),
        (Method::GET, "models/{name=*}"),
        (Method::POST, "chat/completions"),
        (Method::POST, "completions"),
    ] {
        templates.push((verb, format!("/openai/v1/{path}")));
    }
    let pieces = [
        "%2F",
        "%",
        "%ff",
        "..",
        ":",
        "::",
        "*",
        "{name}",
        "é",
        "?",
        "&",
        "=",
        "[0]",
        "latest",
        "x",
        ".",
        "//",
        ";",
        "%00",
        "\"",
        "states",
        "page_size",
        "-1",
        "18446744073709551616",
    ];
    for _ in 0..400 {
        let (verb, template) = &templates[random.random_range(0..templates.len())];
        let mut path = example(template);
        for _ in 0..random.random_range(0..6) {
            let at = random.random_range(0..=path.len());
            if path.is_char_boundary(at) && at > 0 {
                path.insert_str(at, pieces[random.random_range(0..pieces.len())]);
            }
        }
        let bodies = [
            "{",
            "[]",
            "null",
            "{\"pairs\": {}}",
            "{\"pairs\": [1, {\"a\": {\"chat\": []}}]}",
            "{\"options\": {\"beta\": 1e999}}",
            "{\"name\": 7}",
            "\"",
            "{\"a\": 1, \"a\": 2}",
            "{\"policy\": \"models/tiny\", \"prompt\": {\"plain\": \"x\"}, \"maxTokens\": 2}",
            "{\"model\": \"tiny\", \"prompt\": \"x\", \"max_tokens\": 2, \"stream\": true}",
            "{\"model\": \"tiny\", \"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"n\": 2}",
        ];
        let body = bodies[random.random_range(0..bodies.len())];
        let head = format!(
            "{verb} {} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            path.replace(' ', ""),
            body.len()
        );
        let answer = tokio::task::block_in_place(|| raw(address(&server), head.as_bytes()));
        let status = answer.split(' ').nth(1).unwrap_or_default().to_owned();
        assert!(
            status.starts_with('4') || status == "200",
            "{verb} {path} {body}: {answer}"
        );
    }
    // The longest query that the transport takes, and a longer one.
    let query = "states=JOB_STATE_QUEUED&".repeat(2600);
    let long = get(&server, &format!("/v1/trainingJobs?{query}page_size=x")).await;
    assert_eq!(long.status, 400, "{}", long.status);
    let longer = format!("GET /v1/models?{query}{query} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    let longer = tokio::task::block_in_place(|| raw(address(&server), longer.as_bytes()));
    assert!(longer.starts_with("HTTP/1.1 414 "), "{longer}");
    let values = format!("{{\"pairs\": [{}0]}}", "0,".repeat(500_000));
    let many = request(&server, Method::POST, "/v1/scoring:scorePairs")
        .header("content-type", "application/json")
        .body(values);
    assert_eq!(send(many).await.status, 400);
    let nested = format!("{{\"pairs\": {}", "[".repeat(100_000));
    let nested = request(&server, Method::POST, "/v1/scoring:scorePairs")
        .header("content-type", "application/json")
        .body(nested);
    assert_eq!(send(nested).await.status, 400);
    for bytes in [
        &b"GET / HTTP/9.9\r\n\r\n"[..],
        b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        b"POST /v1/trainingJobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
          transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost y\r\n\r\n",
    ] {
        tokio::task::block_in_place(|| raw(address(&server), bytes));
    }
    assert_eq!(get(&server, "/v1/models").await.status, 200);
    assert!(!server.has_logged("panicked"));
    assert!(server.client().await.health().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_when_their_client_leaves_and_when_the_server_stops() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let grpc = server.client().await;
    let dataset = upload(&grpc, "pairs.jsonl").await.name;
    let name = submit(&grpc, job(&dataset, 100_000)).await;
    let streams = |server: &Server| server.metric("bradley_event_streams ");
    let mut open = Vec::new();
    for _ in 0..5 {
        let mut stream = event_stream(&server, &name, None).send().await.unwrap();
        stream.chunk().await.unwrap().expect("no event");
        open.push(stream);
    }
    assert!(streams(&server) >= Some(5.0), "{}", server.metrics());
    let mut last = open.pop().unwrap();
    drop(open);
    until("the end of abandoned streams", PATIENCE, async || {
        streams(&server) == Some(1.0)
    })
    .await;

    let reading = tokio::spawn(async move {
        let mut received = Received::default();
        while let Some(bytes) = last.chunk().await.unwrap() {
            received.add(&bytes);
        }
        received.events.pop()
    });
    let status = tokio::task::block_in_place(|| server.terminate(Duration::from_secs(40)));
    assert!(status.success());
    let reading = reading.await.unwrap();
    let (id, event, data) = reading.expect("no last event");
    assert_eq!((id, event.as_str()), (None, "status"), "{data}");
    assert_eq!(reason(&data), "DRAINING");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_at_its_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let grpc = server.client().await;
    let dataset = upload(&grpc, "pairs.jsonl").await.name;
    let name = submit(&grpc, job(&dataset, 100_000)).await;
    let path = format!("/v1/{name}/events:stream");
    let stream = request(&server, Method::GET, &path).header("x-server-timeout", "5");
    let lines = stream.try_clone().unwrap().send().await.unwrap();
    assert_eq!(lines.status(), 200);
    let text = lines.text().await.unwrap();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["@type"], "type.googleapis.com/google.rpc.Status");
    assert_eq!(
        (last["code"].as_i64(), reason(&last)),
        (Some(4), "DEADLINE_EXCEEDED")
    );

    let mut events = stream
        .header("accept", "text/event-stream")
        .send()
        .await
        .unwrap();
    let mut received = Received::default();
    while let Some(bytes) = events.chunk().await.unwrap() {
        received.add(&bytes);
    }
    let (id, event, data) = received.events.pop().expect("no last event");
    assert_eq!((id, event.as_str()), (None, "status"), "{data}");
    assert_eq!(reason(&data), "DEADLINE_EXCEEDED");

    // This channel transmits the deadline of a gRPC call and does not apply it.
    let carrier = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let origin = server.address.parse().unwrap();
    let mut events = tonic::Request::new(pb::StreamTrainingEventsRequest {
        parent: name,
        ..Default::default()
    });
    let limit = "5S".parse().unwrap();
    events.metadata_mut().insert("grpc-timeout", limit);
    let mut client =
        pb::training_service_client::TrainingServiceClient::with_origin(carrier, origin);
    let mut events = client
        .stream_training_events(events)
        .await
        .unwrap()
        .into_inner();
    events.message().await.unwrap().expect("no event");
    let late = loop {
        match events.message().await {
            Ok(Some(_)) => {}
            ended => break ended.expect_err("the stream ended without an error"),
        }
    };
    assert_eq!(late.code(), tonic::Code::DeadlineExceeded, "{late}");
    assert_eq!(crate::server::reason(&late), "DEADLINE_EXCEEDED");
    until("the end of the streams' work", PATIENCE, async || {
        server.metric("bradley_event_streams ") == Some(0.0)
    })
    .await;
}

/// A page in a browser tries DNS rebinding: its own host name stands for the server's address.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_cannot_point_its_own_name_at_a_server_without_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = "bradley,*.models.svc";
    let server = Server::start_with(dir.path(), &tiny(), &["--rest-hosts", hosts]);
    let call = |host: &str| {
        let port = address(&server).rsplit(':').next().unwrap().to_owned();
        let host = format!("{host}:{port}");
        let origin = format!("http://{host}");
        request(&server, Method::GET, "/v1/models")
            .header("host", host)
            // For the browser, the page and the server have the same origin.
            .header("origin", origin)
    };
    for host in ["127.0.0.1", "localhost", "[::1]", "bradley", "b.models.svc"] {
        assert_eq!(send(call(host)).await.status, 200, "{host}");
    }
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(send(call(own.trim())).await.status, 200, "{own}");
    let page = send(call("attacker.example")).await;
    assert_eq!(
        (page.status, reason(&page.body)),
        (403, "PERMISSION_DENIED")
    );
    let message = page.body["message"].as_str().unwrap();
    assert!(
        message.contains("attacker.example") && message.contains("rest_hosts"),
        "{message}"
    );
    assert!(!page.headers["x-request-id"].is_empty());
    until("the line of the audit log", PATIENCE, async || {
        let lines = server.lines_with("attacker.example");
        lines
            .iter()
            .any(|line| line.contains("\"target\":\"audit\""))
    })
    .await;
    // HTTP/2 has the name in another place, and gRPC calls are not those of a page.
    let to = address(&server).to_owned();
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let to = to.clone();
        Box::pin(async move {
            let stream = tokio::net::TcpStream::connect(to).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        })
    });
    let carrier = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .http2_only(true)
        .build::<_, tonic::body::Body>(connector);
    let uri = "http://attacker.example/v1/models".parse().unwrap();
    assert_eq!(carrier.get(uri).await.unwrap().status().as_u16(), 403);
    let origin = "http://attacker.example".parse().unwrap();
    pb::model_service_client::ModelServiceClient::with_origin(carrier, origin)
        .list_models(pb::ListModelsRequest {})
        .await
        .unwrap();
    drop(server);

    // A server that needs tokens answers every host: a page has no token.
    let scorer = create_token(dir.path(), "team", "score");
    let server = Server::start_with(dir.path(), &tiny(), &["--auth", "tokens"]);
    let proxied = request(&server, Method::GET, "/v1/models")
        .header("host", "models.example.com")
        .bearer_auth(&scorer);
    assert_eq!(send(proxied).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_serves_both_versions_of_http() {
    let dir = tempfile::tempdir().unwrap();
    let key = KeyPair::generate().unwrap();
    let parameters = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = parameters.self_signed(&key).unwrap();
    let (cert_file, key_file) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert_file, certificate.pem()).unwrap();
    std::fs::write(&key_file, key.serialize_pem()).unwrap();
    let (cert, key) = (cert_file.to_str().unwrap(), key_file.to_str().unwrap());
    let server = Server::start_with(
        &dir.path().join("data"),
        &tiny(),
        &["--tls-cert", cert, "--tls-key", key],
    );
    let trusted = reqwest::Certificate::from_pem(certificate.pem().as_bytes()).unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let port = server.address.rsplit(':').next().unwrap();
    let url = format!("https://localhost:{port}/v1/models");
    let builder = || {
        reqwest::Client::builder()
            .tls_certs_only([trusted.clone()])
            .timeout(PATIENCE)
    };
    for (builder, version) in [
        (builder(), reqwest::Version::HTTP_2),
        (builder().http1_only(), reqwest::Version::HTTP_11),
    ] {
        let response = builder.build().unwrap().get(&url).send().await.unwrap();
        assert_eq!(response.version(), version);
        let body: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
        assert_eq!(body["models"][0]["name"], "models/tiny");
    }
    let plain = reqwest::Client::builder().build().unwrap();
    assert!(
        plain
            .get(format!("{}/v1/models", server.address))
            .send()
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn http_2_without_grpc_is_rest_too() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let carrier = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .http2_only(true)
        .build_http::<tonic::body::Body>();
    let uri = format!("{}/v1/models/tiny", server.address)
        .parse()
        .unwrap();
    let response = carrier.get(uri).await.unwrap();
    assert_eq!(response.status().as_u16(), 200);
    assert_eq!(response.headers()["content-type"], "application/json");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_rest_speaks_grpc_only() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(dir.path(), &tiny(), &["--rest", "off"]);
    assert!(
        request(&server, Method::GET, "/v1/models")
            .send()
            .await
            .is_err()
    );
    assert!(server.client().await.health().await.unwrap());
    assert!(
        server.http_get("/v1/models").starts_with("HTTP/1.1 404"),
        "the other port answers REST requests"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python with openapi-spec-validator (BRADLEY_TEST_PYTHON)"]
async fn the_openapi_document_is_valid() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let document = get(&server, "/openapi.json").await;
    assert_eq!(document.headers["content-type"], "application/json");
    assert_eq!(document.body["openapi"], "3.1.0");
    let file = dir.path().join("openapi.json");
    std::fs::write(&file, document.body.to_string()).unwrap();
    let checked = Command::new(needed("BRADLEY_TEST_PYTHON"))
        .args(["-m", "openapi_spec_validator", "--schema", "3.1"])
        .arg(&file)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(
        checked.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&checked.stderr)
    );
    let size = document.body.to_string().len();
    assert!(size < 500_000, "{size} bytes");
}

/// Returns the arguments of a command line in which only single quotes quote.
fn arguments(line: &str) -> Vec<String> {
    let mut all = vec![String::new()];
    for (i, part) in line.split('\'').enumerate() {
        let last = all.len() - 1;
        if i % 2 == 1 {
            all[last] += part;
            continue;
        }
        let mut words = part.split(' ');
        all[last] += words.next().unwrap();
        all.extend(words.map(str::to_owned));
    }
    all.retain(|argument| !argument.is_empty());
    all
}

/// Sends the request of a `curl` command, because curl may be missing on this machine.
fn curl(line: &str) -> RequestBuilder {
    let arguments = arguments(line);
    assert_eq!(arguments[0], "curl");
    let (mut url, mut headers, mut body) = (None, Vec::new(), None);
    let mut rest = arguments[1..].iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "-sS" | "-sSN" => {}
            "-H" => headers.push(rest.next().unwrap().split_once(": ").unwrap()),
            "-d" => body = rest.next(),
            _ => assert_eq!(url.replace(argument), None, "{line}"),
        }
    }
    let verb = if body.is_some() {
        Method::POST
    } else {
        Method::GET
    };
    let mut request = client().request(verb, url.unwrap().as_str());
    for (name, value) in headers {
        request = request.header(name, value);
    }
    match body {
        Some(body) => request.body(body.clone()),
        None => request,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_of_the_readme_run() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let dataset = upload(&server.client().await, "pairs.jsonl").await.name;
    let page = read("README.md");
    let (_, section) = page.split_once("\n## REST\n").unwrap();
    let commands = fenced(section).remove(0).lines;
    assert_eq!(commands.len(), 4, "{commands:?}");
    let mut job = String::new();
    let mut answers = Vec::new();
    for command in &commands {
        let command = command
            .replace("http://127.0.0.1:50051", &server.address)
            .replace("models/MODEL", "models/tiny")
            .replace("datasets/ID", &dataset)
            .replace("trainingJobs/ID", &job);
        let answer = send(curl(&command)).await;
        assert_eq!(answer.status, 200, "{command}: {answer:?}");
        if let Some(name) = answer.body["name"].as_str() {
            job = name.to_owned();
        }
        answers.push(answer.body);
    }
    assert_eq!(answers[0]["models"][0]["name"], "models/tiny");
    assert!(
        answers[2]
            .as_str()
            .unwrap()
            .ends_with("event: end\ndata: {}\n\n")
    );
    let score = &answers[3]["results"][0]["score"];
    assert!(score["probability"].as_f64().unwrap() > 0.0, "{score}");
}
