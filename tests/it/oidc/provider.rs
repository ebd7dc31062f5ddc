//! Tokens of oidc-provider, an implementation that the OpenID Foundation has certified.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tonic::Code;

use super::{call, serve, until_accepted};
use crate::server::{free_port, job, submit, try_get, upload};
use crate::support::needed;
use crate::wait::until;

/// `trainer:secret` in base64.
const CREDENTIALS: &str = "dHJhaW5lcjpzZWNyZXQ=";

/// A provider in a process of its own; killed when dropped.
struct Provider(Child);

impl Provider {
    /// Starts a provider with a new key.
    fn start(port: u16, algorithm: &str, key: &str) -> Provider {
        let folder = PathBuf::from(needed("BRADLEY_TEST_OIDC"));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/oidc/provider.mjs");
        let mut child = Command::new(folder.join("bin/node"))
            .arg(script)
            .arg(&folder)
            .args([&port.to_string(), algorithm, key])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        while line.trim() != "ready" {
            line.clear();
            assert_ne!(output.read_line(&mut line).unwrap(), 0, "it ended");
        }
        Provider(child)
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks the provider for an access token for a resource.
fn token(port: u16, resource: &str) -> String {
    let body = format!("grant_type=client_credentials&resource={resource}");
    let mut connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(
        connection,
        "POST /token HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n\
         authorization: Basic {CREDENTIALS}\r\n\
         content-type: application/x-www-form-urlencoded\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let json: Value = serde_json::from_str(body).unwrap();
    let token = json["access_token"].as_str();
    token.unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs oidc-provider on Node.js (BRADLEY_TEST_OIDC)"]
async fn tokens_of_a_certified_provider_are_accepted_across_its_rotations() {
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}");
    let audience = "https%3A%2F%2Fbradley.example.com";
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &url, &["--oidc-refresh", "3600"]);
    let mut old: Option<String> = None;
    for (i, algorithm) in ["RS256", "PS256", "ES256", "EdDSA"].into_iter().enumerate() {
        let _provider = Provider::start(port, algorithm, &format!("key-{i}"));
        let new = token(port, audience);
        until_accepted(&server, &new).await;
        let wrong = call(&server, &token(port, "https%3A%2F%2Fother.example.com")).await;
        let wrong = wrong.unwrap_err();
        assert_eq!(wrong.code(), Code::Unauthenticated, "{algorithm}");
        assert!(wrong.message().contains("audience"), "{wrong:?}");
        // A key that is no longer published checks nothing.
        if let Some(old) = old.replace(new.clone()) {
            let refused = async || call(&server, &old).await.is_err();
            until(
                "the refusal of an old key",
                Duration::from_secs(30),
                refused,
            )
            .await;
        }
        let trainer = server.client_with(&new).await;
        let dataset = upload(&trainer, "pairs.jsonl").await;
        let name = submit(&trainer, job(&dataset.name, 1)).await;
        let job = try_get(&trainer, &name).await.unwrap();
        assert_eq!(job.owner, "oidc:trainer");
    }
}
