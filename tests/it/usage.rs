//! The work that is counted for each owner, with the real server and the real command line.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bradley::rpc::pb;
use serde_json::Value;
use tonic::Code;

use crate::server::{Server, create_token, finish, job, pairs, score, submit, upload};
use crate::support::golden;

/// Runs `bradley usage`, and returns its answer as JSON.
fn usage(server: &Server, token: &str, more: &[&str]) -> Vec<Value> {
    let done = Command::new(crate::support::binary())
        .args(["--output", "json", "usage", "--server", &server.address])
        .args(["--token", token])
        .args(more)
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    serde_json::from_slice(&done.stdout).unwrap()
}

fn serve(dir: &Path) -> Server {
    let models = format!("tiny={}", golden("models/llama").display());
    Server::start_with(dir, &models, &["--auth", "tokens"])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_sees_its_own_work_and_an_administrator_all() {
    let dir = tempfile::tempdir().unwrap();
    let a = create_token(dir.path(), "team-a", "submit,score");
    let b = create_token(dir.path(), "team-b", "score");
    let ops = create_token(dir.path(), "ops", "admin");
    let mut server = serve(dir.path());
    assert!(
        usage(&server, &a, &[]).is_empty(),
        "there is usage before any work"
    );

    let of_a = server.client_with(&a).await;
    let n = pairs().len() as u64;
    let scored = score(&of_a, "models/tiny", pairs()).await;
    // Each pair's row has its prompt once.
    let tokens: u64 = scored
        .results
        .iter()
        .map(|r| {
            let s = crate::server::scored(r);
            let (a, b) = (s.a.as_ref().unwrap(), s.b.as_ref().unwrap());
            u64::from(a.prompt_tokens + a.tokens + b.tokens)
        })
        .sum();
    let seen = usage(&server, &a, &[]);
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!(seen[0]["owner"], "team-a");
    assert_eq!(seen[0]["scored_pairs"], n);
    let counted = seen[0]["scored_tokens"].as_u64().unwrap();
    assert!(counted.abs_diff(tokens) <= 2 * n, "{counted}, not {tokens}");
    assert_eq!(seen[0]["training_device_seconds"], 0.0);

    let dataset = upload(&of_a, "pairs.jsonl").await;
    let began = std::time::Instant::now();
    let name = submit(&of_a, job(&dataset.name, 20)).await;
    finish(&of_a, &name).await;
    let most = began.elapsed().as_secs_f64();
    let trained = |record: &Value| record["training_device_seconds"].as_f64().unwrap();
    let seen = usage(&server, &a, &[]);
    assert!(
        trained(&seen[0]) > 0.0 && trained(&seen[0]) <= most,
        "{seen:?}"
    );

    let of_b = server.client_with(&b).await;
    score(&of_b, "models/tiny", pairs()[..1].to_vec()).await;
    assert_eq!(usage(&server, &b, &[])[0]["scored_pairs"], 1);
    let all = usage(&server, &ops, &[]);
    let owners: Vec<&str> = all.iter().map(|r| r["owner"].as_str().unwrap()).collect();
    assert_eq!(owners, ["team-a", "team-b"]);
    let one = usage(&server, &ops, &["--owner", "team-b"]);
    assert_eq!(one.len(), 1);
    let refused = of_b
        .usage()
        .get_usage(pb::GetUsageRequest {
            owner: "team-a".into(),
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);

    // A restart loses nothing, and the days are those of the work.
    let before = usage(&server, &ops, &["--by-day"]);
    assert!(server.terminate(Duration::from_secs(60)).success());
    let server = serve(dir.path());
    assert_eq!(usage(&server, &ops, &["--by-day"]), before);
    let today = before[0]["from"].as_str().unwrap().to_owned();
    assert_eq!(before[0]["to"], before[0]["from"]);
    let since = usage(&server, &ops, &["--from", &today, "--to", &today]);
    assert_eq!(since.len(), 2);
    let earlier = usage(
        &server,
        &ops,
        &["--from", "2020-01-01", "--to", "2020-12-31"],
    );
    assert!(earlier.is_empty());
    let of_b = server.client_with(&b).await;
    for (start, end, field) in [
        ("2020-13-01", "", "start_date"),
        ("", "yesterday", "end_date"),
        ("2020-01-01", "2022-01-01", "start_date"),
        ("2020-02-01", "2020-01-01", "start_date"),
    ] {
        let request = pb::GetUsageRequest {
            start_date: start.into(),
            end_date: end.into(),
            ..Default::default()
        };
        let refused = of_b.usage().get_usage(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{start} {end}");
        assert!(refused.message().contains(field), "{refused:?}");
    }
}

/// The device finishes the batch that it is computing when the server begins to drain. Its clients
/// get their scores, so the work is counted as theirs.
#[tokio::test(flavor = "multi_thread")]
async fn work_that_ends_while_the_server_drains_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let team = create_token(dir.path(), "team", "score");
    let mut server = serve(dir.path());
    let pair = pb::Pair {
        a: Some(plain("An answer. ".repeat(60))),
        b: Some(plain("Another answer. ".repeat(60))),
        ..Default::default()
    };
    let mut calls = tokio::task::JoinSet::new();
    for caller in 0..4 {
        let (client, mut pair) = (server.client_with(&team).await, pair.clone());
        calls.spawn(async move {
            let mut scored: u64 = 0;
            loop {
                // The cache has no log-probs of a new prompt.
                let prompt = format!("{caller}.{scored} A question. ");
                pair.prompt = Some(plain(prompt.repeat(60)));
                let request = pb::ScorePairsRequest {
                    options: Some(pb::ScoringOptions {
                        policy: "models/tiny".into(),
                        ..Default::default()
                    }),
                    pairs: vec![pair.clone()],
                };
                match client.scoring().score_pairs(request).await {
                    Ok(_) => scored += 1,
                    Err(_) => return scored,
                }
            }
        });
    }
    let limit = Duration::from_secs(60);
    crate::wait::until("some scores", limit, async || {
        usage(&server, &team, &[])
            .first()
            .is_some_and(|record| record["scored_pairs"].as_u64() >= Some(4))
    })
    .await;
    assert!(server.terminate(limit).success());
    let scored: u64 = calls.join_all().await.into_iter().sum();
    let server = serve(dir.path());
    assert_eq!(usage(&server, &team, &[])[0]["scored_pairs"], scored);
}

fn plain(text: String) -> pb::Text {
    pb::Text {
        form: Some(pb::text::Form::Plain(text)),
    }
}
