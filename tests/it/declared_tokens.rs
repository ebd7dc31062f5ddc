//! Tokens that a file declares, with the real server and the real command line.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use bradley::rpc::client::Status;
use bradley::rpc::pb;
use tonic::Code;

use crate::server::{Server, job, submit, try_get, upload};
use crate::support::golden;
use crate::wait::{holds_for, until};

/// Runs `bradley tokens hash` with a line of standard input.
fn hash(arguments: &[&str], token: &str) -> Output {
    let mut child = Command::new(crate::support::binary())
        .args(["tokens", "hash"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    // A command that refuses its flags does not read.
    let _ = writeln!(input, "{token}");
    drop(input);
    child.wait_with_output().unwrap()
}

/// Returns the entry of a token.
fn entry(owner: &str, roles: &str, token: &str) -> String {
    let done = hash(&["--owner", owner, "--roles", roles], token);
    assert!(done.status.success(), "{done:?}");
    String::from_utf8(done.stdout).unwrap()
}

fn serve(dir: &Path, file: &Path) -> Server {
    let flags = ["--auth", "tokens", "--token-file", file.to_str().unwrap()];
    Server::start_with(
        dir,
        &format!("tiny={}", golden("models/llama").display()),
        &flags,
    )
}

async fn call(server: &Server, token: &str) -> Result<(), Status> {
    let client = server.client_with(token).await;
    client
        .models()
        .list_models(pb::ListModelsRequest {})
        .await
        .map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_declares_tokens_and_takes_them_back() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.yaml");
    let [a, b, c] = ["a", "b", "c"].map(|x| x.repeat(40));
    let (for_a, for_b) = (
        entry("team-a", "submit,score", &a),
        entry("team-b", "submit,score", &b),
    );
    std::fs::write(&file, format!("# The platform's tokens.\n{for_a}{for_b}")).unwrap();
    let server = serve(dir.path(), &file);
    let limit = Duration::from_secs(60);

    let (of_a, of_b) = (server.client_with(&a).await, server.client_with(&b).await);
    let dataset = upload(&of_a, "pairs.jsonl").await;
    let name = submit(&of_a, job(&dataset.name, 100_000)).await;
    assert_eq!(try_get(&of_a, &name).await.unwrap().owner, "team-a");
    let refused = try_get(&of_b, &name).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    for wrong in [c.as_str(), &a[1..], &a.to_uppercase(), "team-a"] {
        let refused = call(&server, wrong).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{wrong}");
    }
    let digest = for_a.split("sha256: ").nth(1).unwrap().trim();
    let refused = call(&server, digest).await.unwrap_err();
    assert_eq!(
        refused.code(),
        Code::Unauthenticated,
        "the hash is no token"
    );
    // A token of the database works beside them, and shares the jobs of its owner.
    let own = Command::new(crate::support::binary())
        .args(["--output", "json", "tokens", "create", "--owner", "team-a"])
        .arg("--data-dir")
        .arg(dir.path())
        .output()
        .unwrap();
    let own: serde_json::Value = serde_json::from_slice(&own.stdout).unwrap();
    let own = server.client_with(own["token"].as_str().unwrap()).await;
    assert!(try_get(&own, &name).await.is_ok());

    // A file that cannot be used changes nothing.
    std::fs::write(&file, format!("{for_b}- owner: team-c\n")).unwrap();
    until("the error in the log", limit, async || {
        server.has_logged("the token file cannot be used")
    })
    .await;
    assert!(call(&server, &a).await.is_ok() && call(&server, &b).await.is_ok());

    // A new one replaces all tokens, and open calls of those that are gone end. It is written as
    // the kubelet does: a link is pointed at another folder.
    let request = pb::StreamTrainingEventsRequest {
        parent: name.clone(),
        after_sequence: 0,
        ..Default::default()
    };
    let mut open = of_a
        .training()
        .stream_training_events(request)
        .await
        .unwrap()
        .into_inner();
    let next = dir.path().join("next.yaml");
    let for_c = hash(
        &["--owner", "team-a", "--roles", "submit", "--days", "1"],
        &c,
    );
    let for_c = String::from_utf8(for_c.stdout).unwrap();
    assert!(for_c.contains("expires: "), "{for_c}");
    std::fs::write(&next, format!("{for_b}{for_c}")).unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&next, &link).unwrap();
    std::fs::rename(&link, &file).unwrap();
    until("the refusal of a removed token", limit, async || {
        call(&server, &a).await.is_err()
    })
    .await;
    assert!(call(&server, &b).await.is_ok());
    let of_c = server.client_with(&c).await;
    assert!(
        try_get(&of_c, &name).await.is_ok(),
        "a new token of the owner does not reach its job"
    );
    let ended = async {
        loop {
            match open.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(e) => return Some(e.code()),
            }
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(30), ended).await;
    assert_eq!(
        ended.expect("the stream does not end"),
        Some(Code::Unauthenticated)
    );
    assert_eq!(server.metric("bradley_declared_tokens "), Some(2.0));

    // An expired entry is refused, and a file that is gone takes nothing back. The server looks at
    // the file every five seconds.
    let past = for_c.replace("expires: 2", "expires: 1");
    std::fs::write(&file, format!("{for_b}{past}")).unwrap();
    until("the refusal of an expired token", limit, async || {
        call(&server, &c).await.is_err()
    })
    .await;
    std::fs::remove_file(&file).unwrap();
    holds_for("a token's validity", Duration::from_secs(7), async || {
        call(&server, &b).await.is_ok()
    })
    .await;
}

#[test]
fn an_entry_is_made_from_a_token_and_the_token_is_apart() {
    let made = hash(&["--owner", "ops", "--roles", "admin", "--generate"], "");
    let (entry, token) = (
        String::from_utf8(made.stdout).unwrap(),
        String::from_utf8(made.stderr).unwrap(),
    );
    let token = token.trim().strip_prefix("token: ").unwrap();
    assert!(token.len() >= 64 && !entry.contains(token), "{entry}");
    assert_eq!(entry, self::entry("ops", "admin", token));
    let expected = "- owner: ops\n  roles:\n  - admin\n  sha256: ";
    assert!(entry.starts_with(expected), "{entry}");
    let json = Command::new(crate::support::binary())
        .args(["--output", "json", "tokens", "hash", "--generate"])
        .args(["--owner", "ops"])
        .output()
        .unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["roles"], serde_json::json!(["submit", "score"]));

    let long = "x".repeat(40);
    for (arguments, token, says) in [
        (&["--owner", "ops"][..], "short", "is too short"),
        (&["--owner", "ops"], "", "is too short"),
        (&["--owner", "ops"], &long.replace("xx", "x "), "has spaces"),
        (&["--owner", "ops"], &"x".repeat(5000), "is too long"),
        (&["--owner", "o:s"], &long, "owner"),
        (&["--owner", "ops", "--roles", "root"], &long, "--roles"),
    ] {
        let refused = hash(arguments, token);
        let message = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{message}");
        assert!(message.contains(says), "{token}: {message}");
    }
}

#[test]
fn a_server_does_not_start_with_a_file_that_it_cannot_use() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.yaml");
    let start = || {
        let done = Command::new(crate::support::binary())
            .args(["serve", "--listen", "127.0.0.1:0", "--http-listen", "off"])
            .args(["--auth", "tokens", "--models"])
            .arg(format!("tiny={}", golden("models/llama").display()))
            .arg("--token-file")
            .arg(&file)
            .arg("--data-dir")
            .arg(dir.path())
            .output()
            .unwrap();
        assert!(!done.status.success());
        String::from_utf8(done.stderr).unwrap()
    };
    let message = start();
    assert!(
        message.contains("token_file") && message.contains("tokens.yaml"),
        "{message}"
    );
    std::fs::write(&file, "- {owner: a, roles: [score], sha256: x}\n").unwrap();
    let message = start();
    assert!(message.contains("entry 1: sha256"), "{message}");
}
