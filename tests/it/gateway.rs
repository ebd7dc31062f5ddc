//! Replicas behind a load balancer during a rollout: Envoy with deploy/gateway/envoy.yaml, and a
//! client that balances by itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bradley::rpc::client::Client;
use bradley::rpc::client::Target;
use bradley::rpc::pb;

use crate::backends::Postgres;
use crate::replicas::{adapter, check_history, checkpointing, undisturbed};
use crate::server::{
    Server, finish, free_port, is_final, losses, pairs, score, scored, state, submit, upload,
};
use crate::support::{golden, needed};
use crate::wait::{until, until_blocking};

/// Maximum time for Envoy to start and for requests to be answered.
const PATIENCE: Duration = Duration::from_secs(60);

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Envoy. It reads the addresses of the replicas from a file instead of asking a cluster.
struct Envoy {
    child: Child,
    dir: tempfile::TempDir,
    port: u16,
}

impl Envoy {
    fn start(replicas: &[&Server]) -> Self {
        let (program, python) = (needed("BRADLEY_TEST_ENVOY"), needed("BRADLEY_TEST_PYTHON"));
        let dir = tempfile::tempdir().unwrap();
        let descriptors = dir.path().join("bradley.pb");
        let files = [
            "training",
            "dataset",
            "checkpoint",
            "scoring",
            "evaluation",
            "generation",
            "model",
            "usage",
        ]
        .map(|f| format!("bradley/v1/{f}.proto"));
        let files = files
            .into_iter()
            .chain(["google/rpc/error_details.proto".to_owned()]);
        let made = Command::new(python)
            .args(["-m", "grpc_tools.protoc", "--include_imports"])
            .arg(format!("-I{}", repository().join("proto").display()))
            .arg(format!("--descriptor_set_out={}", descriptors.display()))
            .args(files)
            .status();
        assert!(made.unwrap().success());
        let port = free_port();
        let config =
            std::fs::read_to_string(repository().join("deploy/gateway/envoy.yaml")).unwrap();
        let (before, rest) = config.split_once("      # discovery:").unwrap();
        let (_, after) = rest.split_once("      # end of discovery\n").unwrap();
        let discovery = format!(
            "      type: EDS\n      eds_cluster_config: {{service_name: bradley, eds_config: \
             {{resource_api_version: V3, path_config_source: {{path: {}}}}}}}\n",
            dir.path().join("replicas.yaml").display()
        );
        let config = format!("{before}{discovery}{after}")
            .replace("/etc/envoy/bradley.pb", descriptors.to_str().unwrap())
            .replace(
                "{address: 0.0.0.0, port_value: 8080}",
                &format!("{{address: 127.0.0.1, port_value: {port}}}"),
            );
        assert!(config.contains(&format!("port_value: {port}")));
        std::fs::write(dir.path().join("envoy.yaml"), config).unwrap();
        write_replicas(dir.path(), replicas);
        let child = Command::new(program)
            .arg("-c")
            .arg(dir.path().join("envoy.yaml"))
            .args([
                "--use-dynamic-base-id",
                "--concurrency",
                "1",
                "--log-level",
                "error",
            ])
            .spawn()
            .unwrap();
        let envoy = Envoy { child, dir, port };
        until_blocking("the start of Envoy", PATIENCE, || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        envoy
    }

    /// Replaces the list of replicas, which Envoy reads again at once.
    fn set_replicas(&self, replicas: &[&Server]) {
        write_replicas(self.dir.path(), replicas);
    }

    async fn client(&self) -> Client {
        let target = Target::plain(format!("http://127.0.0.1:{}", self.port));
        Client::connect(&target, Duration::from_secs(10))
            .await
            .unwrap()
    }

    /// Sends a REST request, and returns the status and the body. The server itself, without the
    /// gateway, must answer the same.
    fn rest(
        &self,
        server: &Server,
        method: &str,
        path: &str,
        body: &str,
    ) -> (u16, serde_json::Value) {
        let answer = rest_at(self.port, method, path, body);
        let port = server.address.rsplit(':').next().unwrap().parse().unwrap();
        let direct = rest_at(port, method, path, body);
        assert_eq!(
            (answer.0, with_floats(&answer.1)),
            (direct.0, with_floats(&direct.1)),
            "{method} {path}: the gateway and the server"
        );
        answer
    }
}

/// Returns JSON with every number as a float, because a gateway may write 0.0 as 0.
fn with_floats(value: &serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Number(number) => number.as_f64().into(),
        Value::Array(items) => items.iter().map(with_floats).collect(),
        Value::Object(fields) => {
            let fields = fields.iter();
            fields
                .map(|(key, value)| (key.clone(), with_floats(value)))
                .collect()
        }
        other => other.clone(),
    }
}

/// Sends a REST request to a port, and returns the status and the body.
fn rest_at(port: u16, method: &str, path: &str, body: &str) -> (u16, serde_json::Value) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         connection: close\r\n"
    );
    write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{method} {path}: {answer:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    // In a chunked body each chunk is a line, between lines with the sizes.
    let text = match head.to_lowercase().contains("transfer-encoding: chunked") {
        true => body.split("\r\n").skip(1).step_by(2).collect::<String>(),
        false => body.to_owned(),
    };
    // Answers of Envoy itself are not JSON.
    (
        status,
        serde_json::from_str(&text).unwrap_or(serde_json::Value::String(text)),
    )
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes the file with the addresses of the replicas. The complete file is renamed to its name,
/// because Envoy reads it as soon as it appears.
fn write_replicas(dir: &Path, replicas: &[&Server]) {
    let endpoint = |s: &&Server| {
        let port = s.address.rsplit(':').next().unwrap();
        format!(
            "{{endpoint: {{address: {{socket_address: \
             {{address: 127.0.0.1, port_value: {port}}}}}}}}}"
        )
    };
    let all: Vec<String> = replicas.iter().map(endpoint).collect();
    let kind = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
    let text = format!(
        "resources:\n- \"@type\": {kind}\n  cluster_name: bradley\n  \
         endpoints: [{{lb_endpoints: [{}]}}]\n",
        all.join(", ")
    );
    std::fs::write(dir.join("next.yaml"), text).unwrap();
    std::fs::rename(dir.join("next.yaml"), dir.join("replicas.yaml")).unwrap();
}

/// Clients that score without a pause and count the answers.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    async fn start(envoy: &Envoy, clients: usize) -> Self {
        let (stop, answered) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicUsize::new(0)),
        );
        let expected = score(&envoy.client().await, "models/tiny", pairs()).await;
        let mut tasks = Vec::new();
        for _ in 0..clients {
            let (client, stop, answered, expected) = (
                envoy.client().await,
                stop.clone(),
                answered.clone(),
                expected.clone(),
            );
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    // A failed call panics here, which fails the test.
                    let got = score(&client, "models/tiny", pairs()).await;
                    for (a, b) in got.results.iter().zip(&expected.results) {
                        assert_eq!(scored(a), scored(b), "replicas give different scores");
                    }
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        Load {
            stop,
            answered,
            clients: tasks,
        }
    }

    fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until `n` more requests have been answered.
    async fn wait_for_more(&self, n: usize) {
        let before = self.answered();
        until("more answered requests", PATIENCE, async || {
            self.answered() >= before + n
        })
        .await;
    }

    /// Stops the clients, and returns the number of answers.
    async fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.expect("a request failed");
        }
        self.answered.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES), Envoy (BRADLEY_TEST_ENVOY) and Python with \
            grpcio-tools (BRADLEY_TEST_PYTHON)"]
async fn both_replicas_are_replaced_in_turn_and_no_request_fails() {
    let postgres = Postgres::start();
    let (expected, weights) = undisturbed(1500).await;
    let shared = tempfile::tempdir().unwrap();
    let (database, artifacts) = (
        postgres.url(),
        format!("file://{}", shared.path().display()),
    );
    let models = format!("tiny={}", golden("models/llama").display());
    let flags = [
        "--database-url",
        &database,
        "--artifact-url",
        &artifacts,
        "--lease",
        "3",
    ];
    let folders: Vec<PathBuf> = (0..4)
        .map(|i| shared.path().join(format!("replica-{i}")))
        .collect();
    let start = |i: usize| Server::start_with(&folders[i], &models, &flags);
    let mut replicas = vec![start(0), start(1)];
    let envoy = Envoy::start(&replicas.iter().collect::<Vec<_>>());
    let client = envoy.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, checkpointing(&dataset.name, 1500)).await;
    // A replica that stops refuses many calls at the same time.
    let load = Load::start(&envoy, 24).await;
    load.wait_for_more(100).await;
    for next in [2, 3] {
        // Adds a new replica first, then stops the old one while calls are on their way to it.
        let added = start(next);
        envoy.set_replicas(&[&replicas[0], &replicas[1], &added]);
        load.wait_for_more(100).await;
        assert!(
            !is_final(state(&client, &name).await),
            "the job ended before the replicas were replaced"
        );
        let mut old = replicas.remove(0);
        envoy.set_replicas(&[&replicas[0], &added]);
        assert!(tokio::task::block_in_place(|| old.terminate(Duration::from_secs(40))).success());
        replicas.push(added);
        load.wait_for_more(100).await;
    }
    let answered = load.end().await;
    let events = finish(&client, &name).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Succeeded);
    check_history(&events);
    assert_eq!(
        losses(&events),
        expected,
        "other losses than without a rollout"
    );
    assert!(adapter(&client, &name).await == weights);
    println!("{answered} requests, none failed");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (BRADLEY_TEST_ENVOY) and Python with grpcio-tools (BRADLEY_TEST_PYTHON)"]
async fn the_gateway_offers_rest_with_json() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let envoy = Envoy::start(&[&server]);
    let (status, models) = envoy.rest(&server, "GET", "/v1/models", "");
    assert_eq!(
        (status, models["models"][0]["name"].as_str()),
        (200, Some("models/tiny")),
        "{models}"
    );

    let text = |role: &str, content: &str| {
        let message = serde_json::json!({"role": role, "content": content});
        serde_json::json!({"chat": {"messages": [message]}})
    };
    let prompt = text("user", "Name a colour.");
    let pair = serde_json::json!({
        "id": "x",
        "prompt": prompt,
        "a": text("assistant", "Blue."),
        "b": text("assistant", "No."),
    });
    let body = serde_json::json!({"options": {"policy": "models/tiny"}, "pairs": [pair]});
    let (status, answer) = envoy.rest(&server, "POST", "/v1/scoring:scorePairs", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    assert_eq!(
        answer["results"][0]["score"]["probability"].as_f64(),
        Some(0.5),
        "a model is its own reference: {answer}"
    );

    let completions =
        serde_json::json!([text("assistant", "Blue."), text("assistant", "It depends.")]);
    let body = serde_json::json!({
        "options": {"policy": "models/tiny"},
        "prompt": prompt,
        "completions": completions,
    });
    let (status, ranked) = envoy.rest(
        &server,
        "POST",
        "/v1/scoring:scoreCompletions",
        &body.to_string(),
    );
    assert_eq!(
        (status, ranked["results"].as_array().map(Vec::len)),
        (200, Some(2)),
        "{ranked}"
    );

    // Envoy makes an array of a stream; the server itself sends lines or events.
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let body = serde_json::json!({"options": {"policy": "models/tiny"}, "dataset": dataset.name});
    let path = "/v1/evaluation:evaluatePolicy";
    let (status, evaluated) = rest_at(envoy.port, "POST", path, &body.to_string());
    let messages = evaluated.as_array().map_or(&[][..], Vec::as_slice);
    let report = messages.last().map(|message| &message["report"]);
    let accuracy = report.and_then(|report| report["accuracy"]["share"].as_f64());
    assert_eq!(
        (status, accuracy),
        (200, Some(0.5)),
        "a model is its own reference: {evaluated}"
    );

    // Errors have gRPC's code, and name the invalid fields.
    let (status, missing) = envoy.rest(&server, "GET", "/v1/models/none", "");
    assert_eq!(
        (status, missing["code"].as_i64()),
        (404, Some(5)),
        "{missing}"
    );
    let wrong = serde_json::json!({"options": {"policy": "models/tiny", "beta": -1}, "pairs": []});
    let (status, wrong) = envoy.rest(
        &server,
        "POST",
        "/v1/scoring:scorePairs",
        &wrong.to_string(),
    );
    assert_eq!(status, 400, "{wrong}");
    assert!(
        wrong["details"].to_string().contains("fieldViolations"),
        "{wrong}"
    );
    // Envoy's own answer has no JSON.
    let (status, _) = rest_at(envoy.port, "GET", "/v1/nothing", "");
    assert_eq!(status, 404);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python with grpcio (BRADLEY_TEST_PYTHON)"]
async fn no_call_of_a_client_with_the_service_config_fails_when_a_replica_stops() {
    let python = needed("BRADLEY_TEST_PYTHON");
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut stopping = Server::start(dirs[0].path());
    let staying = Server::start(dirs[1].path());
    let address = |s: &Server| s.address.trim_start_matches("http://").to_owned();
    let mut client = Command::new(python)
        .arg(repository().join("tests/clients/balanced.py"))
        .arg(repository().join("proto"))
        .arg(repository().join("deploy/gateway/service-config.json"))
        .arg("tiny")
        .arg(format!("{},{}", address(&stopping), address(&staying)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(client.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "started");
    // Both replicas are used.
    for server in [&stopping, &staying] {
        until("the use of a replica", PATIENCE, async || {
            server.scored_pairs() >= 10
        })
        .await;
    }
    assert!(tokio::task::block_in_place(|| stopping.terminate(Duration::from_secs(40))).success());
    let before = staying.scored_pairs();
    until("calls without the stopped replica", PATIENCE, async || {
        // The client has ended if a call has failed.
        staying.scored_pairs() >= before + 50 || client.try_wait().unwrap().is_some()
    })
    .await;
    drop(client.stdin.take());
    let output = client.wait_with_output().unwrap();
    said.read_to_string(&mut line).unwrap();
    assert!(
        output.status.success(),
        "{line}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(line.contains("none failed"), "{line}");
}
