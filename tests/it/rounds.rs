//! `bradley rounds`: rounds of pairs, training and comparison, killed and continued.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use bradley::rpc::client::Client;
use bradley::rpc::pb;
use serde_json::Value;

use crate::server::{Server, finish, job, submit, upload};
use crate::support::{binary, golden};
use crate::wait::until;

/// Optimizer steps of a round: enough that the command is killed while they run.
const STEPS: u64 = 400;
const SOON: Duration = Duration::from_secs(120);

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn command(server: &Server, dir: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command
        .args(["rounds", "--server", &server.address, "--policy", "tiny"])
        .args(["--samples", "4", "--max-tokens", "8", "--keep-cut"])
        .arg("--data")
        .arg(dir.join("prompts.jsonl"))
        .arg("--file")
        .arg(dir.join("job.yaml"))
        .arg("--out")
        .arg(out)
        .args(more);
    command
}

fn run(server: &Server, dir: &Path, out: &Path, more: &[&str]) -> Output {
    command(server, dir, out, more).output().unwrap()
}

fn write_inputs(dir: &Path, prompts: usize, steps: u64) {
    let prompt = |i: usize| format!("{{\"id\": {i}, \"prompt\": \"Name the number {i}.\"}}\n");
    let lines: String = (0..prompts).map(prompt).collect();
    std::fs::write(dir.join("prompts.jsonl"), lines).unwrap();
    let job = format!(
        "lora: {{rank: 2}}\noptimizer: {{learning_rate: 0.0001}}\nlabels: {{team: a}}\n\
         batch: {{batch_size: 2, max_length: 128, max_steps: {steps}}}\n"
    );
    std::fs::write(dir.join("job.yaml"), job).unwrap();
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Returns the pairs of a round. The names of trained policies, which differ between runs, are left
/// out.
fn pairs(out: &Path, round: u32) -> Vec<Value> {
    let path = out.join(format!("round-{round}/pairs.jsonl"));
    let lines = std::fs::read_to_string(path).unwrap();
    let pair = |line: &str| {
        let mut pair: Value = serde_json::from_str(line).unwrap();
        let policy = pair["generated"]["policy"].take();
        match round {
            1 => assert_eq!(policy, "models/tiny"),
            _ => assert!(policy.as_str().unwrap().starts_with("trainingJobs/")),
        }
        pair
    };
    lines.lines().map(pair).collect()
}

/// Returns 1 if the new policy's answer has the larger reward, 0 if the old one's has, and 0.5 if
/// the answers are the same; `None` if they differ and one has no reward.
fn win(answers: &Value) -> Option<f64> {
    let (before, after) = (&answers["before"], &answers["after"]);
    if before["text"] == after["text"] {
        return Some(0.5);
    }
    let (before, after) = (before["reward"].as_f64()?, after["reward"].as_f64()?);
    Some(if after > before { 1.0 } else { 0.0 })
}

/// Returns the jobs of a run.
async fn jobs(client: &Client, run: &str) -> Vec<pb::TrainingJob> {
    let request = pb::ListTrainingJobsRequest {
        page_size: 1000,
        ..Default::default()
    };
    let listed = client.training().list_training_jobs(request).await;
    let mut jobs = listed.unwrap().into_inner().training_jobs;
    jobs.retain(|job| job.labels.get("rounds").is_some_and(|label| label == run));
    jobs
}

/// Trains an adapter and returns the name of its checkpoint.
async fn judge(client: &Client) -> String {
    let dataset = upload(client, "pairs.jsonl").await;
    let name = submit(client, job(&dataset.name, 4)).await;
    finish(client, &name).await;
    format!("{name}/checkpoints/4")
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_rounds_continue_to_the_same_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"));
    let client = server.client().await;
    let judge = judge(&client).await;
    let dir = dir.path();
    write_inputs(dir, 60, STEPS);
    let held_out = golden("pairs.jsonl");
    let flags = [
        "--judge",
        &judge,
        "--min-margin",
        "0",
        "--seed",
        "3",
        "--compare-prompts",
        "6",
        "--eval-data",
        held_out.to_str().unwrap(),
        "--format",
        "json",
    ];
    let calm = dir.join("calm");
    let made = run(&server, dir, &calm, &flags);
    let said = text(&made.stderr);
    assert!(made.status.success(), "{said}");
    assert!(said.contains("round 2 of 2: the new policy is"), "{said}");

    let out = dir.join("killed");
    let progress = out.join("round-1/pairs.jsonl.progress");
    let mut child = command(&server, dir, &out, &flags).spawn().unwrap();
    until("some outcomes", SOON, async || {
        std::fs::read_to_string(&progress).is_ok_and(|lines| lines.lines().count() > 3)
    })
    .await;
    child.kill().unwrap();
    child.wait().unwrap();
    let first = out.join("round-1/pairs.jsonl");
    assert!(!first.exists(), "the command was faster than the test");

    let training = out.join("round-2/job.json");
    let mut child = command(&server, dir, &out, &flags).spawn().unwrap();
    until("the training of the second round", SOON, async || {
        training.exists() && json(&training)["job"].is_string()
    })
    .await;
    child.kill().unwrap();
    child.wait().unwrap();
    let seen = json(&training);
    assert!(
        seen["checkpoint"].is_null(),
        "too fast for the test: {seen}"
    );

    // Other flags are refused, and nothing is lost by that.
    let mut other = flags;
    other[3] = "0.5";
    let refused = run(&server, dir, &out, &other);
    let said = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("--min-margin"), "{said}");

    let made = run(&server, dir, &out, &flags);
    assert!(made.status.success(), "{}", text(&made.stderr));
    for round in [1, 2] {
        let expected = pairs(&calm, round);
        assert!(expected.len() > 20, "{}", expected.len());
        assert_eq!(pairs(&out, round), expected);
    }
    let header = json(&out.join("rounds.json"));
    let of_run = jobs(&client, header["run"].as_str().unwrap()).await;
    let numbers: BTreeSet<&str> = of_run.iter().map(|j| j.labels["round"].as_str()).collect();
    assert_eq!((of_run.len(), numbers), (2, BTreeSet::from(["1", "2"])));
    assert!(of_run.iter().all(|job| job.labels["team"] == "a"));

    let report: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(report["run"], header["run"]);
    let second = &report["rounds"][1];
    assert_eq!(report["policy"], second["new_policy"]);
    assert_eq!(second["policy"], report["rounds"][0]["new_policy"]);
    let new_policy = second["new_policy"].as_str().unwrap();
    assert!(new_policy.ends_with(&format!("/checkpoints/{STEPS}")));
    assert_eq!(second["pairs"], pairs(&out, 2).len());
    assert!(second["mean_margin"].as_f64().unwrap() > 0.0, "{second}");
    assert_eq!(second["prompts"], 60);
    let answers = std::fs::read_to_string(out.join("round-2/answers.jsonl")).unwrap();
    let answers: Vec<Value> = answers
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), 6);
    // Answers of white space only, which this policy often gives, have no reward.
    let wins: Vec<f64> = answers.iter().filter_map(win).collect();
    assert_eq!(second["compared"], wins.len());
    let win_rate = second["win_rate"].as_f64();
    let expected = (!wins.is_empty()).then(|| wins.iter().sum::<f64>() / wins.len() as f64);
    assert_eq!(win_rate, expected, "{second}");
    assert!(second["held_out"]["pairs"].as_u64() > Some(0), "{second}");
    assert_eq!(second["samples"].as_array().unwrap().len(), 3);

    // A complete run is only reported again, here for people.
    let again = run(&server, dir, &out, &flags[..flags.len() - 2]);
    let shown = text(&again.stdout);
    assert!(again.status.success(), "{}", text(&again.stderr));
    assert!(shown.contains("round 2, prompt 3"), "{shown}");
    assert!(
        shown.contains(&format!("the new policy: {new_policy}")),
        "{shown}"
    );
    assert_eq!(
        jobs(&client, header["run"].as_str().unwrap()).await.len(),
        2
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rounds_that_cannot_go_on_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"));
    let client = server.client().await;
    let judge = judge(&client).await;
    let dir = dir.path();
    write_inputs(dir, 3, 2);
    let out: PathBuf = dir.join("out");
    let refused = |out: &Path, more: &[&str], parts: &[&str]| {
        let made = run(&server, dir, out, more);
        let said = text(&made.stderr);
        assert!(!made.status.success(), "{said}");
        for part in parts {
            assert!(said.contains(part), "{part} is not in\n{said}");
        }
    };
    refused(&out, &[], &["models/tiny is its own reference", "--judge"]);
    refused(
        &out,
        &["--judge", "nothing"],
        &["--judge nothing does not exist"],
    );
    let file = dir.join("prompts.jsonl");
    refused(&file, &["--judge", &judge], &["is a file: name a folder"]);
    let none = ["--judge", &judge, "--min-margin", "1e9"];
    refused(&out, &none, &["3 near ties", "round 1 of 2 has no pairs"]);
    // The same command says the same, and other flags are those of another run.
    refused(&out, &none, &["round 1 of 2 has no pairs"]);
    // With newer jobs, such as those of the run, @last is still the job of the first start.
    let named = dir.join("named");
    let last = ["--judge", "@last", "--min-margin", "1e9"];
    refused(&named, &last, &["round 1 of 2 has no pairs"]);
    let newer = self::judge(&client).await;
    assert_ne!(newer, judge);
    refused(&named, &last, &["round 1 of 2 has no pairs"]);
    let step = ["--judge", "@last/checkpoints/4", "--min-margin", "1e9"];
    refused(&named, &step, &["another value of --judge"]);
    let other = [&none[..], &["--temperature", "0.5"]].concat();
    refused(&out, &other, &["another value of --temperature"]);
    // The settings of the training may change before the first job is created.
    std::fs::write(dir.join("job.yaml"), "batch: {max_steps: 3}\n").unwrap();
    refused(&out, &none, &["round 1 of 2 has no pairs"]);
    std::fs::write(dir.join("job.yaml"), "lora: {rank: 100000}\n").unwrap();
    let new = dir.join("new");
    refused(&new, &["--judge", &judge], &["lora.rank"]);
    std::fs::write(dir.join("job.yaml"), "seed: 1\n---\nseed: 2\n").unwrap();
    refused(&new, &["--judge", &judge], &["has several jobs"]);
    std::fs::write(dir.join("prompts.jsonl"), "\n").unwrap();
    std::fs::write(dir.join("job.yaml"), "seed: 1\n").unwrap();
    refused(&new, &["--judge", &judge], &["prompts.jsonl"]);
}
