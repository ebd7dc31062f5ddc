//! Calls have ids, and open ones end when their callers' tokens are revoked or lose their roles.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bradley::rpc::client::Status;
use bradley::rpc::pb;
use serde_json::Value;
use tonic::{Code, Request};

use crate::server::{Server, finish, job, latest, submit, upload};
use crate::support::golden;
use crate::wait::until;

/// Limit for what a server notices within seconds, on a busy machine.
const NOTICED: Duration = Duration::from_secs(60);
/// Size of a file that does not fit in the buffers of a connection.
const LARGE_FILE_BYTES: usize = 64 << 20;

fn bradley(args: &[&str]) -> Vec<u8> {
    let mut command = Command::new(crate::support::binary());
    let done = command
        .args(args)
        .env_remove("BRADLEY_OUTPUT")
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    done.stdout
}

fn serve(dir: &Path, flags: &[&str]) -> Server {
    let models = format!("tiny={}", golden("models/llama").display());
    Server::start_with(dir, &models, &[&["--auth", "tokens"], flags].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_ends_when_its_token_is_revoked() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_str().unwrap();
    let create = ["tokens", "create", "--owner", "team", "--data-dir", folder];
    let made = bradley(&[&create[..], &["--format", "json"]].concat());
    let made: Value = serde_json::from_slice(&made).unwrap();
    let server = serve(dir.path(), &[]);
    let client = server.client_with(made["token"].as_str().unwrap()).await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, job(&dataset, 2)).await;
    finish(&client, &name).await;
    let request = pb::ExportCheckpointRequest {
        name: latest(&name),
        ..Default::default()
    };
    let export = client
        .checkpoints()
        .export_checkpoint(request)
        .await
        .unwrap();
    // The export is made once. With a large file, a download of it takes as long as its reader.
    let export = dir.path().join(export.into_inner().path);
    std::fs::write(export.join("large"), vec![7; LARGE_FILE_BYTES]).unwrap();
    let request = pb::DownloadCheckpointRequest {
        name: latest(&name),
        ..Default::default()
    };
    let answer = client.checkpoints().download_checkpoint(request).await;
    let mut parts = answer.unwrap().into_inner();
    parts.message().await.unwrap().expect("no file came");

    let id = made["id"].as_str().unwrap();
    bradley(&["tokens", "revoke", id, "--data-dir", folder]);
    let refused = async || {
        client
            .models()
            .list_models(pb::ListModelsRequest {})
            .await
            .is_err()
    };
    until("the refusal of the token", NOTICED, refused).await;
    let mut bytes = 0;
    let end = loop {
        match tokio::time::timeout(NOTICED, parts.message()).await {
            Ok(Ok(Some(part))) => {
                if let Some(pb::download_checkpoint_response::Part::Chunk(chunk)) = part.part {
                    bytes += chunk.len();
                    // A slow reader, as long as the call goes on.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            Ok(end) => break end,
            Err(_) => panic!("the download hangs"),
        }
    };
    assert_eq!(end.unwrap_err().code(), Code::Unauthenticated);
    assert!(bytes < LARGE_FILE_BYTES, "{bytes} bytes");
}

/// An entry of a token file with other roles is another permission: calls that need the lost role
/// end, and new ones are refused.
#[tokio::test(flavor = "multi_thread")]
async fn open_calls_end_when_their_token_loses_a_role() {
    let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = files.path().join("tokens.yaml");
    let token = "a-token-of-more-than-32-characters-0123456789";
    let hash = sha256(token);
    let declare = |roles: &str| {
        let entry = format!("- owner: team\n  roles: [{roles}]\n  sha256: {hash}\n");
        let new = files.path().join("new");
        std::fs::write(&new, entry).unwrap();
        std::fs::rename(&new, &file).unwrap();
    };
    declare("submit, score");
    let server = serve(dir.path(), &["--token-file", file.to_str().unwrap()]);
    let client = server.client_with(token).await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, job(&dataset, 1_000_000)).await;
    let request = pb::StreamTrainingEventsRequest {
        parent: name.clone(),
        ..Default::default()
    };
    let answer = client.training().stream_training_events(request).await;
    let mut events = answer.unwrap().into_inner();
    events.message().await.unwrap().expect("no event came");
    declare("score");
    let end: Status = tokio::time::timeout(NOTICED, async {
        loop {
            match events.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ends without a status"),
                Err(status) => break status,
            }
        }
    })
    .await
    .expect("the stream does not end");
    assert_eq!(end.code(), Code::Unauthenticated);
    let get = pb::GetTrainingJobRequest { name };
    let refused = client.training().get_training_job(get).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

/// Returns the SHA-256 of a token in hex, as the command prints it for a token file.
fn sha256(token: &str) -> String {
    use std::io::Write as _;
    let mut child = Command::new(crate::support::binary())
        .args(["tokens", "hash", "--owner", "team", "--format", "json"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    writeln!(child.stdin.take().unwrap(), "{token}").unwrap();
    let done = child.wait_with_output().unwrap();
    let entry: Value = serde_json::from_slice(&done.stdout).unwrap();
    entry["sha256"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_has_the_callers_id_or_one_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let answered = async |id: Option<&[u8]>, model: &str| {
        let mut request = Request::new(pb::GetModelRequest { name: model.into() });
        if let Some(id) = id {
            let headers = request.metadata_mut().as_mut();
            let value = tonic::codegen::http::HeaderValue::from_bytes(id).unwrap();
            headers.insert("x-request-id", value);
        }
        let metadata = match client.models().get_model(request).await {
            Ok(answer) => answer.metadata().clone(),
            Err(status) => status.metadata().clone(),
        };
        let id = metadata
            .get("x-request-id")
            .expect("the answer has no id")
            .to_str()
            .unwrap()
            .to_owned();
        (id, metadata.get_all("x-request-id").iter().count())
    };
    let longest = "x".repeat(128);
    for model in ["models/tiny", "models/none"] {
        for given in ["mine-1", &longest] {
            let answer = answered(Some(given.as_bytes()), model).await;
            assert_eq!(answer, (given.to_owned(), 1), "{model}");
        }
        let too_long = "x".repeat(129);
        for given in [None, Some(too_long.as_bytes()), Some("é".as_bytes())] {
            let (id, n) = answered(given, model).await;
            let is_made = uuid::Uuid::parse_str(&id).is_ok();
            assert!(is_made && n == 1, "{given:?}: {id:?}");
        }
    }
}
