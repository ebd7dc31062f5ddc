//! `bradley pairs`: pairs from a policy's own answers, compared with the calls that they come from.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use bradley::rpc::client::Client;
use bradley::rpc::pb;
use serde_json::Value;

use crate::backends::Proxy;
use crate::server::{Server, trained_adapter};
use crate::support::{binary, golden};
use crate::wait::until;

const SEED: u64 = 3;
const SAMPLES: u32 = 4;
const MAX_TOKENS: u32 = 8;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns the command with [`SAMPLES`] samples, unless `more` has another number.
fn command(address: &str, prompts: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(["pairs", "--server", address, "--policy", "tiny"]);
    if !more.contains(&"--samples") {
        command.args(["--samples", &SAMPLES.to_string()]);
    }
    command
        .args(["--max-tokens", &MAX_TOKENS.to_string()])
        .arg("--data")
        .arg(prompts)
        .arg("--out")
        .arg(out)
        .args(more);
    command
}

fn run(server: &Server, prompts: &Path, out: &Path, more: &[&str]) -> Output {
    command(&server.address, prompts, out, more)
        .output()
        .unwrap()
}

/// Writes prompts of both kinds and returns their file.
fn prompts(dir: &Path, number: usize) -> PathBuf {
    let path = dir.join("prompts.jsonl");
    let row = |i: usize| match i % 2 {
        0 => format!("{{\"id\": {i}, \"prompt\": \"Name the number {i}.\"}}\n"),
        _ => format!(
            "{{\"id\": {i}, \"messages\": [{{\"role\": \"user\", \"content\": \"Say {i}.\"}}]}}\n"
        ),
    };
    std::fs::write(&path, (0..number).map(row).collect::<String>()).unwrap();
    path
}

fn rows(path: &Path) -> Vec<Value> {
    let lines = std::fs::read_to_string(path).unwrap();
    let rows = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    rows.collect()
}

fn chat(role: &str, content: &str) -> pb::Text {
    let message = pb::Message {
        role: role.into(),
        content: content.into(),
        ..Default::default()
    };
    pb::Text {
        form: Some(pb::text::Form::Chat(pb::MessageList {
            messages: vec![message],
        })),
    }
}

/// Returns the different samples of a prompt in the order of their rewards, with these.
async fn ranked(client: &Client, prompt: &str, seed: u64, judge: &str) -> Vec<(String, f64)> {
    let request = pb::GenerateCompletionsRequest {
        policy: "models/tiny".into(),
        prompt: Some(chat("user", prompt)),
        samples: SAMPLES,
        max_tokens: MAX_TOKENS,
        seed: Some(seed),
        ..Default::default()
    };
    let answer = client.generation().generate_completions(request).await;
    let mut stream = answer.unwrap().into_inner();
    let mut samples = vec![String::new(); SAMPLES as usize];
    while let Some(response) = stream.message().await.unwrap() {
        for delta in response.deltas {
            samples[delta.index as usize].push_str(&delta.text);
        }
    }
    let mut texts: Vec<String> = Vec::new();
    for sample in samples {
        if !sample.trim().is_empty() && !texts.contains(&sample) {
            texts.push(sample);
        }
    }
    let request = pb::ScoreCompletionsRequest {
        options: Some(pb::ScoringOptions {
            policy: judge.into(),
            ..Default::default()
        }),
        prompt: Some(chat("user", prompt)),
        completions: texts.iter().map(|t| chat("assistant", t)).collect(),
    };
    let answer = client.scoring().score_completions(request).await.unwrap();
    let answer = answer.into_inner();
    let reward = |i: usize| match &answer.results[i].result {
        Some(pb::completion_result::Result::Score(score)) => score.reward,
        other => panic!("{other:?}"),
    };
    let ranking = answer.ranking.iter().map(|i| *i as usize);
    ranking.map(|i| (texts[i].clone(), reward(i))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_is_the_best_and_the_worst_sample() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let judge = trained_adapter(&client).await;
    let prompts = prompts(dir.path(), 6);
    let out = dir.path().join("pairs.jsonl");
    let seed = SEED.to_string();
    let flags = [
        "--keep-cut",
        "--judge",
        &judge,
        "--min-margin",
        "0",
        "--seed",
        &seed,
    ];
    let made = run(&server, &prompts, &out, &flags);
    let said = text(&made.stderr);
    assert!(made.status.success(), "{said}");
    assert!(said.contains("6 pairs from 6 prompts"), "{said}");
    let pairs = rows(&out);
    assert_eq!(pairs.len(), 6);
    for (i, pair) in pairs.iter().enumerate() {
        let prompt = match i % 2 {
            0 => format!("Name the number {i}."),
            _ => format!("Say {i}."),
        };
        assert_eq!((&pair["id"], &pair["messages"]), (&i.into(), &Value::Null));
        assert_eq!(pair["prompt"][0]["content"], prompt.as_str());
        let expected = ranked(&client, &prompt, SEED + i as u64, &judge).await;
        let (best, worst) = (&expected[0], expected.last().unwrap());
        assert_eq!(pair["chosen"][0]["content"], best.0.as_str());
        assert_eq!(pair["rejected"][0]["content"], worst.0.as_str());
        let generated = &pair["generated"];
        assert_eq!(generated["chosen_reward"], best.1);
        assert_eq!(generated["rejected_reward"], worst.1);
        assert_eq!(generated["margin"], best.1 - worst.1);
        assert_eq!(generated["judge"], judge.as_str());
        assert_eq!(generated["different_samples"], expected.len());
        assert_eq!(generated["seed"], SEED + i as u64);
    }
    // The pairs are data to train on.
    let trained = Command::new(binary())
        .args(["train", "--server", &server.address, "--policy", "tiny"])
        .args([
            "--rank",
            "2",
            "--max-length",
            "128",
            "--max-steps",
            "1",
            "--watch",
        ])
        .arg("--data")
        .arg(&out)
        .output()
        .unwrap();
    assert!(trained.status.success(), "{}", text(&trained.stderr));

    // A margin that no prompt reaches, and a judge that is its own reference.
    let none = dir.path().join("none.jsonl");
    let high = [
        "--keep-cut",
        "--judge",
        &judge,
        "--min-margin",
        "1e9",
        "--format",
        "json",
    ];
    let made = run(&server, &prompts, &none, &high);
    let said = text(&made.stderr);
    assert_eq!(made.status.code(), Some(1), "{said}");
    assert!(
        said.contains("no prompt has a pair: lower --min-margin"),
        "{said}"
    );
    let report: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(
        (&report["near_ties"], &report["pairs"]),
        (&6.into(), &0.into())
    );
    let largest = report["largest_near_tie"].as_f64();
    assert!(largest > Some(0.0) && largest < Some(1e9), "{report}");
    assert_eq!(report["min_margin"], 1e9);
    let made = run(
        &server,
        &prompts,
        &none,
        &["--keep-cut", "--min-margin", "0"],
    );
    let said = text(&made.stderr);
    assert!(said.contains("6 near ties (equal rewards)"), "{said}");
    assert!(said.contains("the same weights"), "{said}");
    assert!(!none.exists());
    assert!(!dir.path().join("none.jsonl.progress").exists());

    // The result of an earlier run, and files of others, are not replaced.
    let before = std::fs::read(&out).unwrap();
    let again = run(&server, &prompts, &out, &flags);
    let said = text(&again.stderr);
    assert_eq!(again.status.code(), Some(2), "{said}");
    assert!(
        said.contains("exists: remove it, or name another file"),
        "{said}"
    );
    assert_eq!(std::fs::read(&out).unwrap(), before);

    // A judge that does not exist is not the error of a row.
    let missing = judge.replace("/checkpoints/4", "/checkpoints/9");
    let lost = dir.path().join("lost.jsonl");
    let refused = run(&server, &prompts, &lost, &["--judge", &missing]);
    let said = text(&refused.stderr);
    assert!(!refused.status.success(), "{said}");
    assert!(!said.contains("row 1"), "{said}");
    assert!(!dir.path().join("lost.jsonl.progress").exists());

    // The pairs can be the prompts of other pairs.
    let more = dir.path().join("more.jsonl");
    let made = run(&server, &out, &more, &flags);
    let said = text(&made.stderr);
    assert!(made.status.success(), "{said}");
    let left_out = "left out of the pairs: chosen, rejected, generated\n";
    assert_eq!(said.matches(left_out).count(), 1, "{said}");
    let more = rows(&more);
    assert_eq!(more.len(), 6);
    for (pair, prompt) in more.iter().zip(&pairs) {
        assert_eq!(
            (&pair["id"], &pair["prompt"]),
            (&prompt["id"], &prompt["prompt"])
        );
        assert_eq!(pair["generated"]["seed"], prompt["generated"]["seed"]);
        assert_eq!(pair["chosen"], prompt["chosen"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_run_continues_to_the_same_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let judge = trained_adapter(&client).await;
    let prompts = prompts(dir.path(), 60);
    let seed = SEED.to_string();
    let flags = [
        "--keep-cut",
        "--min-margin",
        "0",
        "--judge",
        &judge,
        "--seed",
        &seed,
        "--length-penalty",
        "0.01",
    ];
    let calm = dir.path().join("calm.jsonl");
    let made = run(&server, &prompts, &calm, &flags);
    assert!(made.status.success(), "{}", text(&made.stderr));
    assert!(rows(&calm).len() > 30, "{}", text(&made.stderr));
    let out = dir.path().join("killed.jsonl");
    let progress = dir.path().join("killed.jsonl.progress");
    let has_more_lines_than = |path: &Path, number: usize| {
        std::fs::read_to_string(path).is_ok_and(|lines| lines.lines().count() > number)
    };
    let proxy = Proxy::in_front_of(&server.address);
    for finished in [2, 20] {
        // After these nothing passes, so that prompts are left when the command is killed.
        let written = progress.clone();
        proxy.hold_while(move || has_more_lines_than(&written, finished));
        let mut child = command(&proxy.url(), &prompts, &out, &flags)
            .spawn()
            .unwrap();
        until("some outcomes", Duration::from_secs(60), async || {
            has_more_lines_than(&progress, finished)
        })
        .await;
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!out.exists(), "no prompt is left");
    }
    let other = [
        "--keep-cut",
        "--judge",
        &judge,
        "--seed",
        &seed,
        "--min-margin",
        "0.5",
    ];
    let refused = run(&server, &prompts, &out, &other);
    let said = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("--length-penalty, --min-margin"), "{said}");
    let made = run(&server, &prompts, &out, &flags);
    let said = text(&made.stderr);
    assert!(made.status.success(), "{said}");
    assert!(said.contains("of 60 prompts were done before"), "{said}");
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&calm).unwrap());
    assert!(!progress.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_a_pair_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let prompts = prompts(dir.path(), 2);
    let out = dir.path().join("pairs.jsonl");
    let refused = |more: &[&str], part: &str| {
        let made = run(&server, &prompts, &out, more);
        let said = text(&made.stderr);
        assert!(!made.status.success() && said.contains(part), "{said}");
    };
    refused(&["--judge", "nothing"], "--judge");
    refused(&["--min-margin", "-1"], "--min-margin");
    // Errors of flags name no row, and come before anything is stored.
    refused(&["--temperature", "-1"], "error: --temperature is -1");
    refused(&["--beta", "-1"], "error: --beta is -1");
    let none = Command::new(binary())
        .args(["pairs", "--policy", "tiny", "--max-tokens", "0", "--data"])
        .arg(&prompts)
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    let said = text(&none.stderr);
    assert_eq!(none.status.code(), Some(2), "{said}");
    assert!(said.contains("a whole number, at least 1"), "{said}");
    // Nothing is left of a run without an outcome.
    assert!(!dir.path().join("pairs.jsonl.progress").exists());
    let own = run(&server, &prompts, &prompts, &[]);
    let said = text(&own.stderr);
    assert!(said.contains("would replace a file of --data"), "{said}");
    std::fs::write(&prompts, "").unwrap();
    refused(&[], "prompts.jsonl has no prompts");
    std::fs::write(&prompts, "{\"prompt\": \"x\", \"system\": \"y\"}\n").unwrap();
    refused(&[], "the column system cannot be copied");
    std::fs::write(&prompts, "{\"prompt\": \"x\"}\n").unwrap();
    let wrong_outputs = [
        (dir.path().to_owned(), "is a folder: name a file"),
        (dir.path().join("none/"), "ends with a slash: name a file"),
        (dir.path().join("none/pairs.jsonl"), "none does not exist"),
        (PathBuf::from("-"), "is standard output: name a file"),
    ];
    for (wrong, part) in wrong_outputs {
        let made = run(&server, &prompts, &wrong, &[]);
        let said = text(&made.stderr);
        assert_eq!(made.status.code(), Some(2), "{said}");
        assert!(said.contains(part), "{said}");
    }
    let without_pairs = |more: &[&str], part: &str| {
        let made = run(&server, &prompts, &out, more);
        let said = text(&made.stderr);
        assert_eq!(made.status.code(), Some(1), "{said}");
        assert!(said.contains(part), "{said}");
        assert!(!out.exists());
        said
    };
    let few = "1 with fewer than two different complete answers";
    // Greedy samples are all the same.
    without_pairs(&["--temperature", "0"], few);
    // Samples that are cut off, and those that are too long to be scored whole.
    without_pairs(&["--ignore-eos"], few);
    let words = "word ".repeat(60);
    let short = [
        "--ignore-eos",
        "--keep-cut",
        "--reference",
        "tiny",
        "--max-length",
        "60",
    ];
    std::fs::write(&prompts, format!("{{\"prompt\": \"{words}\"}}\n")).unwrap();
    let said = without_pairs(&short, "1 with answers that cannot be scored");
    let reason = "some samples cannot be scored: the prompt alone has ";
    assert!(said.contains(reason), "{said}");
    assert!(said.contains("--max-length is 60"), "{said}");
    assert!(said.contains("0 with fewer than two different"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_answers_than_the_server_scores_at_a_time_are_scored_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let server = Server::start(&data);
    let judge = trained_adapter(&server.client().await).await;
    let prompts = prompts(dir.path(), 2);
    let flags = [
        "--keep-cut",
        "--judge",
        &judge,
        "--min-margin",
        "0",
        "--seed",
        "5",
        "--samples",
        "64",
    ];
    let whole = dir.path().join("whole.jsonl");
    let made = run(&server, &prompts, &whole, &flags);
    assert!(made.status.success(), "{}", text(&made.stderr));
    drop(server);
    // 64 answers of 8 tokens are longer than 256 tokens, and a prompt with one answer is not.
    let tiny = format!("tiny={}", golden("models/llama").display());
    let server = Server::start_with(&data, &tiny, &["--max-row-tokens", "256"]);
    let parts = dir.path().join("parts.jsonl");
    let made = run(&server, &prompts, &parts, &flags);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let (whole, parts) = (rows(&whole), rows(&parts));
    assert_eq!((whole.len(), parts.len()), (2, 2));
    for (one, other) in whole.iter().zip(&parts) {
        let (one, other) = (&one["generated"], &other["generated"]);
        assert!(one["different_samples"].as_u64() > Some(32), "{one}");
        assert_eq!(one["different_samples"], other["different_samples"]);
        for name in ["chosen_reward", "rejected_reward", "margin"] {
            let difference = one[name].as_f64().unwrap() - other[name].as_f64().unwrap();
            assert!(difference.abs() < 1e-4, "{name}: {one} {other}");
        }
    }
}
