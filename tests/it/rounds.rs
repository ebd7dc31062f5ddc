//! `bradley rounds`: rounds of pairs, training and comparison, killed and continued.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use bradley::rpc::client::Client;
use bradley::rpc::pb;
use serde_json::Value;

use crate::backends::Proxy;
use crate::server::{Server, get, job, submit, trained_adapter, upload};
use crate::support::{binary, golden};
use crate::wait::until;

/// Optimizer steps of a round.
const STEPS: u64 = 6;
/// Prompts of the rounds that are killed.
const PROMPTS: usize = 24;
const SOON: Duration = Duration::from_secs(120);

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns the command for a server and a policy.
fn command_at((address, policy): (&str, &str), dir: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command
        .args(["rounds", "--server", address, "--policy", policy])
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
    let mut command = command_at((server.address.as_str(), "tiny"), dir, out, more);
    command.output().unwrap()
}

fn write_inputs(dir: &Path, prompts: usize, steps: u64) {
    let prompt = |i: usize| format!("{{\"id\": {i}, \"prompt\": \"Name the number {i}.\"}}\n");
    let lines: String = (0..prompts).map(prompt).collect();
    std::fs::write(dir.join("prompts.jsonl"), lines).unwrap();
    let job = format!(
        "lora: {{rank: 2}}\noptimizer: {{learning_rate: 0.0001}}\nlabels: {{team: a}}\n\
         priority: -1\n\
         batch: {{batch_size: 2, max_length: 128, max_steps: {steps}}}\n"
    );
    std::fs::write(dir.join("job.yaml"), job).unwrap();
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Returns true if a file of JSON is there and has a text in this field.
fn has_text(path: &Path, field: &str) -> bool {
    path.exists() && json(path)[field].is_string()
}

/// Returns true if a file of outcomes has more than its header and two prompts.
fn has_some_outcomes(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|lines| lines.lines().count() > 3)
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

/// Returns the id of the run in a folder.
fn run_id(out: &Path) -> String {
    json(&out.join("rounds.json"))["run"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// Returns the titles of all datasets.
async fn titles(client: &Client) -> Vec<String> {
    let request = pb::ListDatasetsRequest {
        page_size: 1000,
        ..Default::default()
    };
    let listed = client.datasets().list_datasets(request).await.unwrap();
    let datasets = listed.into_inner().datasets.into_iter();
    datasets.map(|dataset| dataset.display_name).collect()
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

#[tokio::test(flavor = "multi_thread")]
async fn killed_rounds_continue_to_the_same_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"));
    let client = server.client().await;
    let judge = trained_adapter(&client).await;
    let dir = dir.path();
    write_inputs(dir, PROMPTS, STEPS);
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
    let proxy = Proxy::in_front_of(&server.address);
    let url = proxy.url();
    let start = || {
        let mut command = command_at((url.as_str(), "tiny"), dir, &out, &flags);
        command.spawn().unwrap()
    };
    // After some outcomes nothing passes, so that prompts are left when the command is killed.
    let written = progress.clone();
    proxy.hold_while(move || has_some_outcomes(&written));
    let mut child = start();
    until("some outcomes", SOON, async || has_some_outcomes(&progress)).await;
    child.kill().unwrap();
    child.wait().unwrap();
    let first = out.join("round-1/pairs.jsonl");
    assert!(!first.exists(), "no prompt is left");

    // The second round begins when the job below is in the queue.
    let training = out.join("round-1/job.json");
    let written = training.clone();
    proxy.hold_while(move || has_text(&written, "checkpoint"));
    let mut child = start();
    until("the policy of the first round", SOON, async || {
        has_text(&training, "checkpoint")
    })
    .await;
    // A job of a higher priority keeps that of the second round in the queue.
    let dataset = upload(&client, "pairs.jsonl").await;
    let blocker = submit(&client, job(&dataset.name, 1_000_000)).await;
    proxy.release();
    let training = out.join("round-2/job.json");
    until("the training of the second round", SOON, async || {
        has_text(&training, "job")
    })
    .await;
    child.kill().unwrap();
    child.wait().unwrap();
    let seen = json(&training);
    assert!(seen["checkpoint"].is_null(), "{seen}");
    let waiting = seen["job"].as_str().unwrap();
    assert_ne!(get(&client, waiting).await.state(), pb::JobState::Succeeded);
    let request = pb::CancelTrainingJobRequest { name: blocker };
    client
        .training()
        .cancel_training_job(request)
        .await
        .unwrap();
    // The killed command has left its dataset for the evaluation.
    let header = json(&out.join("rounds.json"));
    let evaluated = format!("rounds {}: pairs of --eval-data", run_id(&out));
    assert!(titles(&client).await.contains(&evaluated));

    // Other flags are refused, and nothing is lost by that.
    let mut other = flags;
    other[3] = "0.5";
    let refused = run(&server, dir, &out, &other);
    let said = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("--min-margin"), "{said}");

    let made = run(&server, dir, &out, &flags);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let left = titles(&client).await;
    assert!(!left.contains(&evaluated));
    for round in [1, 2] {
        let title = format!("rounds {}: pairs of round {round}", run_id(&calm));
        assert!(left.contains(&title), "{left:?}");
        let expected = pairs(&calm, round);
        assert!(expected.len() > PROMPTS / 4, "{}", expected.len());
        assert_eq!(pairs(&out, round), expected);
    }
    assert_eq!(json(&training)["job"], seen["job"]);
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
    assert_eq!(second["prompts"], PROMPTS);
    let answers = std::fs::read_to_string(out.join("round-2/answers.jsonl")).unwrap();
    let answers: Vec<Value> = answers
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), 6);
    // Answers of white space only, which this policy often gives, have no reward.
    let wins: Vec<f64> = answers.iter().filter_map(win).collect();
    assert_eq!(second["compared"], wins.len());
    // Here every answer fits the judge.
    let blank = answers.len() - wins.len();
    let expected = serde_json::json!({"blank": blank, "not_scored": 0});
    assert_eq!(second["not_compared"], expected);
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
    let judge = trained_adapter(&client).await;
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
    let said = [
        "3 near ties (largest margin ",
        ", below --min-margin 1000000000)",
        "round 1 of 2 has no pairs",
    ];
    refused(&out, &none, &said);
    // The same command says the same, and other flags are those of another run.
    refused(&out, &none, &["round 1 of 2 has no pairs"]);
    // With newer jobs, such as those of the run, @last is still the job of the first start.
    let named = dir.join("named");
    let last = ["--judge", "@last", "--min-margin", "1e9"];
    refused(&named, &last, &["round 1 of 2 has no pairs"]);
    let newer = trained_adapter(&client).await;
    assert_ne!(newer, judge);
    refused(&named, &last, &["round 1 of 2 has no pairs"]);
    let step = ["--judge", "@last/checkpoints/4", "--min-margin", "1e9"];
    refused(&named, &step, &["another value of --judge"]);
    let other = [&none[..], &["--temperature", "0.5"]].concat();
    refused(&out, &other, &["another value of --temperature"]);
    // All settings may change as long as no prompt has an outcome.
    let hot = dir.join("hot");
    let wrong = [&none[..], &["--temperature", "-1"]].concat();
    refused(&hot, &wrong, &["--temperature"]);
    refused(&hot, &other, &["round 1 of 2 has no pairs"]);
    refused(&hot, &none, &["another value of --temperature"]);
    // The settings of the training may change before the first job is created.
    std::fs::write(dir.join("job.yaml"), "batch: {max_steps: 3}\n").unwrap();
    refused(&out, &none, &["round 1 of 2 has no pairs"]);
    std::fs::write(dir.join("job.yaml"), "lora: {rank: 100000}\n").unwrap();
    let new = dir.join("new");
    refused(&new, &["--judge", &judge], &["lora.rank"]);
    // The policy has an adapter of rank 4 already.
    std::fs::write(dir.join("job.yaml"), "lora: {rank: 8}\n").unwrap();
    let adapter = dir.join("adapter");
    let policy = (server.address.as_str(), judge.as_str());
    let made = command_at(policy, dir, &adapter, &[]).output().unwrap();
    let said = text(&made.stderr);
    assert_eq!(made.status.code(), Some(2), "{said}");
    assert!(
        said.contains("lora.rank") && said.contains("which has 4"),
        "{said}"
    );
    assert!(!adapter.join("round-1").exists());
    std::fs::write(dir.join("job.yaml"), "seed: 1\n---\nseed: 2\n").unwrap();
    refused(&new, &["--judge", &judge], &["has several jobs"]);
    std::fs::write(dir.join("prompts.jsonl"), "\n").unwrap();
    std::fs::write(dir.join("job.yaml"), "seed: 1\n").unwrap();
    let empty = ["error: ", "prompts.jsonl has no prompts"];
    refused(&new, &["--judge", &judge], &empty);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_found_again_although_its_answer_was_lost_and_its_rows_were_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"));
    let client = server.client().await;
    let judge = trained_adapter(&client).await;
    let dir = dir.path();
    write_inputs(dir, 12, 2);
    let out = dir.join("out");
    let flags = [
        "--judge",
        &judge,
        "--min-margin",
        "0",
        "--seed",
        "3",
        "--rounds",
        "1",
        "--compare-prompts",
        "1",
    ];
    let made = run(&server, dir, &out, &flags);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let run_id = run_id(&out);
    let first = jobs(&client, &run_id).await.remove(0);
    let request = pb::DeleteDatasetRequest {
        name: first.dataset.clone(),
    };
    client.datasets().delete_dataset(request).await.unwrap();

    // The folder is as if the command had ended before the answer, or while nothing was stored.
    let training = out.join("round-1/job.json");
    let mut unanswered = json(&training);
    unanswered["job"] = Value::Null;
    unanswered["checkpoint"] = Value::Null;
    for stored in [Some(unanswered.to_string()), None] {
        std::fs::remove_file(out.join("round-1/report.json")).unwrap();
        match &stored {
            Some(text) => std::fs::write(&training, text).unwrap(),
            None => std::fs::remove_file(&training).unwrap(),
        }
        let again = run(&server, dir, &out, &flags);
        assert!(again.status.success(), "{}", text(&again.stderr));
        assert_eq!(json(&training)["job"], first.name);
        assert_eq!(jobs(&client, &run_id).await.len(), 1);
    }

    // Without its labels the job is not found, and has to be deleted.
    let request = pb::UpdateTrainingJobRequest {
        training_job: Some(pb::TrainingJob {
            name: first.name.clone(),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["labels".to_owned()],
        }),
    };
    client
        .training()
        .update_training_job(request)
        .await
        .unwrap();
    std::fs::remove_file(out.join("round-1/report.json")).unwrap();
    std::fs::remove_file(&training).unwrap();
    let refused = run(&server, dir, &out, &flags);
    let said = text(&refused.stderr);
    assert!(!refused.status.success(), "{said}");
    let parts = [first.name.as_str(), "bradley jobs delete JOB --server"];
    for part in parts {
        assert!(said.contains(part), "{part} is not in\n{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pairs_of_the_evaluation_have_their_own_columns_and_a_dataset_of_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"));
    let client = server.client().await;
    let judge = trained_adapter(&client).await;
    let dir = dir.path();
    write_inputs(dir, 12, 2);
    let prompts = std::fs::read_to_string(dir.join("prompts.jsonl")).unwrap();
    let questions = prompts.replace("\"prompt\"", "\"question\"");
    std::fs::write(dir.join("prompts.jsonl"), questions).unwrap();
    // A row of the evaluation has too few cells, so that it is not sent.
    let pairs = dir.join("pairs.csv");
    let csv = "prompt,good,rejected\nIs ice cold?,Yes.,No.\nIs it?,Yes.\n";
    std::fs::write(&pairs, csv).unwrap();
    let out = dir.join("out");
    let run = |pairs: &str, eval_columns: &str| {
        let flags = [
            "--judge",
            &judge,
            "--min-margin",
            "0",
            "--seed",
            "3",
            "--rounds",
            "1",
            "--compare-prompts",
            "1",
            "--columns",
            "prompt=question",
            "--eval-data",
            pairs,
            "--eval-columns",
            eval_columns,
            "--format",
            "json",
        ];
        run(&server, dir, &out, &flags)
    };
    let refused = |pairs: &str, eval_columns: &str, part: &str| {
        let made = run(pairs, eval_columns);
        let said = text(&made.stderr);
        assert!(!made.status.success(), "{said}");
        assert!(said.contains(part), "{part} is not in\n{said}");
    };
    let file = pairs.to_str().unwrap();
    refused("-", "chosen=good", "write the pairs to a file first");
    let missing = "which --eval-columns chosen=best names";
    refused(file, "chosen=best", missing);
    let made = run(file, "chosen=good");
    let said = text(&made.stderr);
    assert!(made.status.success(), "{said}");
    assert!(
        said.contains("1 row cannot be read and was left out"),
        "{said}"
    );
    let report: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(report["rounds"][0]["held_out"]["pairs"], 1, "{report}");

    // A dataset that a killed start has left is deleted, and those of other runs are not.
    let title = |run: &str| format!("rounds {run}: pairs of --eval-data");
    let (of_run, of_another) = (title(&run_id(&out)), title("another"));
    assert!(!titles(&client).await.contains(&of_run));
    for title in [&of_run, &of_another] {
        let metadata = pb::UploadMetadata {
            display_name: title.clone(),
            ..Default::default()
        };
        let file = golden("pairs.jsonl");
        let uploaded = client.upload_dataset(&file, metadata, |_| {}).await;
        uploaded.unwrap();
    }
    let again = run(file, "chosen=good");
    assert!(again.status.success(), "{}", text(&again.stderr));
    let left = titles(&client).await;
    assert!(
        !left.contains(&of_run) && left.contains(&of_another),
        "{left:?}"
    );

    // A changed file is noticed although one of its rows is not sent.
    std::fs::write(&pairs, csv.replace("cold", "hot")).unwrap();
    refused(file, "chosen=good", "another value of --eval-data");
}
