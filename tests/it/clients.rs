//! Clients of other projects: grpcurl through reflection, Python's grpcio with the protos, peft
//! with the adapter, OpenTelemetry's SDK, lm-evaluation-harness.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::references::models;
use crate::server::Server;
use crate::support::{golden, needed};

fn protos() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("proto")
}

/// Encodes bytes as standard base64 with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in bytes.chunks(3) {
        let n = group.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - group.len()));
        for i in 0..4 {
            out.push(if i <= group.len() {
                DIGITS[(n >> (18 - 6 * i)) as usize & 63] as char
            } else {
                '='
            });
        }
    }
    out
}

/// Runs a command that must succeed, and returns its output.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{command:?}\n{out}\n{err}");
    out.into_owned()
}

/// Runs tests/clients/cycle.py with the model that the server has as `model` and that peft loads
/// from `base`. The adapter goes to the folder `out`.
fn cycle(
    server: &Server,
    python: &str,
    pairs: &Path,
    base: &str,
    model: &str,
    out: &Path,
) -> String {
    let address = server.address.strip_prefix("http://").unwrap();
    run(Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/cycle.py"))
        .arg(address)
        .arg(protos())
        .arg(pairs)
        .args([base, model])
        .arg(out)
        .env("HF_HUB_OFFLINE", "1"))
}

#[test]
#[ignore = "needs Python with grpcio and peft (BRADLEY_TEST_PYTHON)"]
fn grpcio_trains_and_scores_and_peft_loads_the_adapter() {
    let python = needed("BRADLEY_TEST_PYTHON");
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let base = golden("models/llama");
    let said = cycle(
        &server,
        &python,
        &golden("pairs.jsonl"),
        base.to_str().unwrap(),
        "tiny",
        &dir.path().join("adapter"),
    );
    assert!(said.contains("peft agrees within"), "{said}");
}

/// The harness reads log-likelihoods from the server, and computes them itself with transformers.
/// Its client leaves BOS out if it is not told otherwise, unlike its own backend.
#[test]
#[ignore = "needs Python with lm-eval, torch and transformers (BRADLEY_TEST_PYTHON)"]
fn lm_evaluation_harness_gets_the_log_likelihoods_that_it_computes_itself() {
    let python = needed("BRADLEY_TEST_PYTHON");
    let (dir, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start_with(dir.path(), &models(&["qwen2", "llama"]), &[]);
    // Llama's tokenizer adds BOS.
    for (model, further) in [("qwen2", None), ("llama", Some("add_bos_token=True"))] {
        let said = run(Command::new(&python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/harness.py"))
            .arg(format!("{}/openai/v1", server.address))
            .arg(model)
            .arg(golden(&format!("models/{model}")))
            .arg(work.path().join(model))
            .args(further));
        assert!(said.contains("20 items agree"), "{said}");
    }
}

#[test]
#[ignore = "needs Python with grpcio and OpenTelemetry (BRADLEY_TEST_PYTHON)"]
fn an_opentelemetry_client_finds_one_trace_for_a_score_and_one_for_a_job() {
    let python = needed("BRADLEY_TEST_PYTHON");
    let mut client = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/traces.py"))
        .arg(protos())
        .arg(golden("pairs.jsonl"))
        .arg("tiny")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut port = String::new();
    let mut said = BufReader::new(client.stdout.take().unwrap());
    said.read_line(&mut port).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("http://127.0.0.1:{}", port.trim());
    let flags = ["--otlp-endpoint", &endpoint];
    let models = format!("tiny={}", golden("models/llama").display());
    // Spans are sent after 200 ms instead of 5 s.
    let environment = [("OTEL_BSP_SCHEDULE_DELAY", "200")];
    let server = Server::start_in(dir.path(), &models, &flags, &environment);
    writeln!(
        client.stdin.take().unwrap(),
        "{}",
        server.address.trim_start_matches("http://")
    )
    .unwrap();
    let output = client.wait_with_output().unwrap();
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert!(
        output.status.success(),
        "{rest}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(rest.contains("score:") && rest.contains("job:"), "{rest}");
    println!("{rest}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs grpcurl (BRADLEY_TEST_GRPCURL)"]
async fn grpcurl_trains_and_scores_by_reflection() {
    let grpcurl = needed("BRADLEY_TEST_GRPCURL");
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let address = server.address.strip_prefix("http://").unwrap().to_owned();
    let call = |method: &str, body: &str| -> serde_json::Value {
        let out = run(Command::new(&grpcurl).args(["-plaintext", "-d", body, &address, method]));
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{method}: {e}: {out}"))
    };
    let listed = run(Command::new(&grpcurl).args(["-plaintext", &address, "list"]));
    for service in [
        "bradley.v1.TrainingService",
        "bradley.v1.ScoringService",
        "grpc.health.v1.Health",
    ] {
        assert!(listed.contains(service), "{listed}");
    }
    let described = run(Command::new(&grpcurl).args([
        "-plaintext",
        &address,
        "describe",
        "bradley.v1.PairScore",
    ]));
    assert!(described.contains("double probability"), "{described}");
    assert_eq!(
        call("grpc.health.v1.Health/Check", "{}")["status"],
        "SERVING"
    );
    assert_eq!(
        call(
            "bradley.v1.ModelService/GetModel",
            r#"{"name":"models/tiny"}"#
        )["architecture"],
        "llama"
    );

    // grpcurl reads the messages of a client stream as JSON, one after the other, with bytes in
    // base64.
    let file = std::fs::read(golden("pairs.jsonl")).unwrap();
    let mut body = serde_json::json!({"metadata": {"display_name": "by grpcurl"}}).to_string();
    for piece in file.chunks(999) {
        body += &serde_json::json!({"chunk": base64(piece)}).to_string();
    }
    let uploaded = call("bradley.v1.DatasetService/UploadDataset", &body);
    assert_eq!(uploaded["report"]["validRows"], "6", "{uploaded}");
    let dataset = uploaded["name"].as_str().unwrap().to_owned();
    let listed = call("bradley.v1.DatasetService/ListDatasets", "{}");
    assert_eq!(listed["datasets"][0]["name"], dataset);
    let body = serde_json::json!({"training_job": {
        "policy": "models/tiny", "dataset": dataset, "lora": {"rank": 4},
        "batch": {"batch_size": 2, "max_length": 256, "max_steps": 3},
        "optimizer": {"learning_rate": 0.01}}});
    let name = call(
        "bradley.v1.TrainingService/CreateTrainingJob",
        &body.to_string(),
    )["name"]
        .as_str()
        .unwrap()
        .to_owned();
    let body = serde_json::json!({"parent": name}).to_string();
    let streamed = run(Command::new(&grpcurl).args([
        "-plaintext",
        "-d",
        &body,
        &address,
        "bradley.v1.TrainingService/StreamTrainingEvents",
    ]));
    assert!(
        streamed.contains("JOB_STATE_SUCCEEDED") && streamed.contains("rewards/margins"),
        "{streamed}"
    );
    // After a cursor only the remaining events are sent.
    let all = streamed.matches("\"sequence\"").count();
    let body = serde_json::json!({"parent": name, "after_sequence": 3}).to_string();
    let rest = run(Command::new(&grpcurl).args([
        "-plaintext",
        "-d",
        &body,
        &address,
        "bradley.v1.TrainingService/StreamTrainingEvents",
    ]));
    assert_eq!(rest.matches("\"sequence\"").count(), all - 3, "{rest}");
    assert!(
        rest.contains("\"sequence\": \"4\"") && !rest.contains("\"sequence\": \"3\""),
        "{rest}"
    );
    let text = |role: &str, content: &str| {
        let message = serde_json::json!({"role": role, "content": content});
        serde_json::json!({"chat": {"messages": [message]}})
    };
    let pair = serde_json::json!({
        "id": "x",
        "prompt": text("user", "Name a colour."),
        "a": text("assistant", "Blue."),
        "b": text("assistant", "It depends."),
    });
    let options = serde_json::json!({"policy": format!("{name}/checkpoints/latest")});
    let body = serde_json::json!({"options": options, "pairs": [pair]});
    let score = call("bradley.v1.ScoringService/ScorePairs", &body.to_string());
    assert!(
        score["results"][0]["score"]["probability"]
            .as_f64()
            .is_some(),
        "{score}"
    );
    let body = serde_json::json!({"name": format!("{name}/checkpoints/latest")}).to_string();
    let files = run(Command::new(&grpcurl).args([
        "-plaintext",
        "-d",
        &body,
        &address,
        "bradley.v1.CheckpointService/DownloadCheckpoint",
    ]));
    assert!(
        files.contains("adapter_model.safetensors") && files.contains("\"chunk\""),
        "{files}"
    );
    let refused = Command::new(&grpcurl)
        .args([
            "-plaintext",
            "-d",
            r#"{"name":"x"}"#,
            &address,
            "bradley.v1.TrainingService/GetTrainingJob",
        ])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("InvalidArgument"));
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_v1_lists_the_services() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let channel = tonic::transport::Endpoint::from_shared(server.address.clone())
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut client = ServerReflectionClient::new(channel);
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = client
        .server_reflection_info(tokio_stream::iter(vec![request]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers
        .message()
        .await
        .unwrap()
        .unwrap()
        .message_response
        .unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else {
        panic!("{answer:?}")
    };
    assert!(
        list.service
            .iter()
            .any(|s| s.name == "bradley.v1.ScoringService")
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs SmolLM2 (BRADLEY_TEST_MODEL) and Python with grpcio and peft (BRADLEY_TEST_PYTHON)"]
async fn grpcio_trains_and_scores_with_a_real_model_and_peft_loads_the_adapter() {
    let (python, model) = (needed("BRADLEY_TEST_PYTHON"), needed("BRADLEY_TEST_MODEL"));
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(dir.path(), &format!("smollm2={model}"), &[]);
    let said = cycle(
        &server,
        &python,
        &golden("pairs.jsonl"),
        &model,
        "smollm2",
        &dir.path().join("adapter"),
    );
    assert!(said.contains("peft agrees within"), "{said}");
}
