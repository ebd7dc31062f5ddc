//! `bradley curate` as a user runs it: folds that are scored by adapters that have not seen them,
//! duplicates and contradictions, interruptions, and what stays on the server.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use bradley::rpc::client::Client;
use bradley::rpc::pb;
use serde_json::{Value, json};

use crate::server::{Server, create_token, id, job, resume, submit, upload};
use crate::support::golden;
use crate::wait::until;

/// Number of folds of the tests.
const FOLDS: usize = 3;
const LIMIT: Duration = Duration::from_secs(120);

/// A file of pairs in a folder of its own, which also gets the outputs of `curate`.
struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new(lines: &[String]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pairs.jsonl"), lines.join("\n")).unwrap();
        Case { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the names of the files and folders beside the pairs.
    fn files(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    /// Returns the folder with the scores so far of an output.
    fn folder(&self, out: &str) -> Option<PathBuf> {
        let prefix = format!("{out}.curate-");
        let name = self.files().into_iter().find(|n| n.starts_with(&prefix));
        name.map(|name| self.path(&name))
    }

    /// Returns the command that curates the pairs.
    fn command(&self, server: &Server, out: &str, more: &[&str]) -> Command {
        let mut command = Command::new(crate::support::binary());
        command
            .args(["curate", "--folds", &FOLDS.to_string(), "--epochs", "1"])
            .args(["--rank", "2", "--batch-size", "8", "--max-length", "64"])
            .args(["--learning-rate", "0.01", "--data"])
            .arg(self.path("pairs.jsonl"))
            .arg("--out")
            .arg(self.path(out))
            .args(more)
            .env_remove("BRADLEY_CONFIG")
            .env("BRADLEY_SERVER", &server.address);
        command
    }

    /// Runs the command, which must succeed.
    fn curate(&self, server: &Server, out: &str, more: &[&str]) -> Output {
        let done = self.command(server, out, more).output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
        done
    }

    fn start(&self, server: &Server, out: &str, more: &[&str]) -> Running {
        let mut command = self.command(server, out, more);
        Running(
            command
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        )
    }

    fn rows(&self, name: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(name)).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

/// A `curate` in the background; killed when dropped.
struct Running(Child);

impl Running {
    fn signal(&self, signal: i32) {
        crate::backends::signal(self.0.id(), signal);
    }

    /// Returns true if the command has a handler for SIGINT, which would end it otherwise.
    fn handles_interrupts(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let caught = status.lines().find_map(|l| l.strip_prefix("SigCgt:"));
        let caught = u64::from_str_radix(caught.unwrap().trim(), 16).unwrap();
        caught & (1 << (libc::SIGINT - 1)) != 0
    }

    /// Returns the exit code and what it printed; `None` after a signal.
    fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        use std::io::Read as _;
        self.0
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        self.0
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        (self.0.wait().unwrap().code(), said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn said(out: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&out.stdout), text(&out.stderr))
}

fn row(prompt: &str, chosen: &str, rejected: &str) -> Value {
    json!({"prompt": prompt, "chosen": chosen, "rejected": rejected})
}

/// Rows of `n` prompts, every third of which has a second row with other answers.
fn rows(n: usize) -> Vec<Value> {
    let mut rows = Vec::new();
    for i in 0..n {
        rows.push(row(&format!("Count {i}."), " one", &format!(" no {i}")));
        if i % 3 == 0 {
            rows.push(row(&format!("Count {i}."), " two", " three"));
        }
    }
    rows
}

fn lines(rows: &[Value]) -> Vec<String> {
    rows.iter().map(Value::to_string).collect()
}

async fn jobs(client: &Client) -> Vec<pb::TrainingJob> {
    let request = pb::ListTrainingJobsRequest::default();
    let listed = client.training().list_training_jobs(request).await.unwrap();
    let jobs = listed.into_inner().training_jobs.into_iter();
    jobs.filter(|job| job.labels.contains_key("curate"))
        .collect()
}

async fn dataset_count(client: &Client) -> usize {
    let request = pb::ListDatasetsRequest::default();
    let listed = client.datasets().list_datasets(request).await.unwrap();
    listed.into_inner().datasets.len()
}

async fn cancel(client: &Client, name: &str) {
    let request = pb::CancelTrainingJobRequest {
        name: name.to_owned(),
    };
    client
        .training()
        .cancel_training_job(request)
        .await
        .unwrap();
}

/// Returns the name of the job of a fold, from 1.
async fn job_of(client: &Client, fold: usize) -> String {
    let jobs = jobs(client).await;
    let fold = fold.to_string();
    let found = jobs.iter().find(|job| job.labels["fold"] == fold);
    found.unwrap().name.clone()
}

/// Returns the rows of a dataset as they lie on the server's disk.
fn stored_rows(server: &Server, dataset: &str) -> BTreeSet<String> {
    let file = server.data_dir.join("datasets").join(id(dataset));
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_is_written_and_scored_by_the_adapter_that_has_not_seen_it() {
    let mut input = rows(15);
    input[2]["id"] = json!("two");
    input[2]["source"] = json!({"list": [1, 2.0, null], "text": "ü"});
    // Log-probs that another tool has computed do not replace those of the adapter.
    for column in [
        "ref_chosen_logps",
        "ref_rejected_logps",
        "chosen_logps",
        "rejected_logps",
    ] {
        input[4][column] = json!(-1.0);
    }
    // The same pair as row 1, and the opposite of row 4.
    let duplicate = json!({"prompt": "Count 0.", "chosen": " one", "rejected": " no 0", "id": 9});
    let opposite = row("Count 2.", " no 2", " one");
    let several = json!({"prompt": "Several?", "chosen": " a", "rejected": [" b", " c c c"]});
    let identical = row("Same?", " same", " same");
    let too_long = row(&"word ".repeat(300), " a", " b");
    let first = input.len();
    input.extend([duplicate, opposite, several, identical, too_long]);
    let mut text = lines(&input);
    text.push("not json".to_owned());
    let case = Case::new(&text);
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let report = case.path("report.json");
    let done = case.curate(
        &server,
        "out.jsonl",
        &["--keep", "--report", report.to_str().unwrap()],
    );

    let output = case.rows("out.jsonl");
    assert_eq!(output.len(), text.len());
    let results = [
        "fold",
        "out_of_fold_probability",
        "margin",
        "pair",
        "verdict",
        "duplicate_of",
        "contradicts",
        "error",
    ];
    for (given, written) in input.iter().zip(&output) {
        let own: Vec<(&String, &Value)> = given.as_object().unwrap().iter().collect();
        let columns = written.as_object().unwrap().iter();
        let kept: Vec<(&String, &Value)> = columns
            .filter(|(name, _)| !results.contains(&name.as_str()))
            .collect();
        assert_eq!(own, kept);
    }
    let names = |row: &Value| -> Vec<String> {
        let columns = row.as_object().unwrap().keys();
        let found = columns.filter(|name| results.contains(&name.as_str()));
        found.cloned().collect()
    };
    let scored = ["fold", "out_of_fold_probability", "margin", "verdict"];
    for row in &output[..first] {
        assert_eq!(names(row)[..4], scored, "{row}");
        let (p, margin) = (
            row["out_of_fold_probability"].as_f64().unwrap(),
            row["margin"].as_f64().unwrap(),
        );
        assert!((p - 1.0 / (1.0 + (-margin).exp())).abs() < 1e-9, "{row}");
        let verdict = match p {
            p if p < 0.4 => "probably_flipped",
            p if p < 0.6 => "doubtful",
            _ => "agrees",
        };
        assert_eq!(row["verdict"], verdict, "{row}");
    }
    assert_eq!(output[first]["duplicate_of"], 1);
    assert_eq!(output[first]["margin"], output[0]["margin"]);
    let contradicted = input
        .iter()
        .position(|r| r["prompt"] == "Count 2.")
        .unwrap();
    assert_eq!(output[first + 1]["contradicts"], contradicted + 1);
    assert_eq!(output[contradicted]["contradicts"], first + 2);
    let opposite = [contradicted, first + 1].map(|i| output[i]["margin"].as_f64().unwrap());
    assert_eq!(opposite[0], -opposite[1], "both are scored by one adapter");
    let pair = output[first + 2]["pair"].as_u64().unwrap();
    assert_eq!(names(&output[first + 3]), ["error"]);
    let error = |i: usize| output[i]["error"].as_str().unwrap().to_owned();
    assert!(error(first + 3).contains("chosen and rejected are the same"));
    assert_eq!(
        names(&output[first + 4]),
        ["fold", "error"],
        "{}",
        output[first + 4]
    );
    let of_prompt = error(first + 4);
    assert!(
        of_prompt.starts_with("prompt: ") && of_prompt.contains("--max-length is "),
        "{of_prompt}"
    );
    assert_eq!(output[first + 5]["line"], "not json");
    assert_eq!(names(&output[first + 5]), ["error"]);

    // Which rows were used: each pair is in all datasets but that of its fold.
    let kept = jobs(&client).await;
    assert_eq!(kept.len(), FOLDS);
    let trained: BTreeMap<String, BTreeSet<String>> = kept
        .iter()
        .map(|job| (job.name.clone(), stored_rows(&server, &job.dataset)))
        .collect();
    let label: BTreeMap<&str, &str> = kept
        .iter()
        .map(|job| (job.name.as_str(), job.labels["fold"].as_str()))
        .collect();
    let mut fold_of_prompt: BTreeMap<String, String> = BTreeMap::new();
    for (i, line) in lines(&input).iter().enumerate() {
        let unseen: Vec<&String> = trained
            .iter()
            .filter(|(_, rows)| !rows.contains(line))
            .map(|(job, _)| job)
            .collect();
        if output[i].get("duplicate_of").is_some() || output[i].get("contradicts").is_some() {
            assert_eq!(unseen.len(), FOLDS, "row {} trains an adapter", i + 1);
            continue;
        }
        if i >= first + 3 {
            continue;
        }
        assert_eq!(unseen.len(), 1, "row {}", i + 1);
        let fold = output[i]["fold"].to_string();
        assert_eq!(fold, label[unseen[0].as_str()], "row {}", i + 1);
        let prompt = input[i]["prompt"].as_str().unwrap().to_owned();
        let fold = fold_of_prompt.entry(prompt).or_insert(unseen[0].clone());
        assert_eq!(fold, unseen[0], "row {}: a prompt is in two folds", i + 1);
    }
    assert_eq!(
        fold_of_prompt.values().collect::<BTreeSet<_>>().len(),
        FOLDS,
        "every fold has rows"
    );
    // The scores are those of that adapter.
    for (i, written) in output.iter().enumerate().take(first).step_by(4) {
        let Some(fold) = fold_of_prompt.get(written["prompt"].as_str().unwrap()) else {
            continue;
        };
        let one = case.path("one.jsonl");
        std::fs::write(&one, input[i].to_string()).unwrap();
        let scored = Command::new(crate::support::binary())
            .args(["score", "--format", "json", "--policy", fold, "--data"])
            .arg(&one)
            .env("BRADLEY_SERVER", &server.address)
            .output()
            .unwrap();
        let score: Value = serde_json::from_slice(&scored.stdout).unwrap();
        assert_eq!(score["margin"], written["margin"], "row {}", i + 1);
    }
    // Of several pairs, the one with the lowest margin counts.
    let fold = &fold_of_prompt["Several?"];
    let one = case.path("one.jsonl");
    std::fs::write(&one, input[first + 2].to_string()).unwrap();
    let scored = Command::new(crate::support::binary())
        .args(["score", "--format", "json", "--policy", fold, "--data"])
        .arg(&one)
        .env("BRADLEY_SERVER", &server.address)
        .output()
        .unwrap();
    let margins: Vec<f64> = String::from_utf8(scored.stdout)
        .unwrap()
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["margin"]
                .as_f64()
                .unwrap()
        })
        .collect();
    let lowest = margins.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(output[first + 2]["margin"], lowest);
    assert_eq!(margins[pair as usize - 1], lowest);

    // The report.
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    let with = |column: &str| {
        output
            .iter()
            .filter(|row| row.get(column).is_some())
            .count()
    };
    let counts = ["errors", "duplicates", "contradictions"].map(|name| report[name].clone());
    assert_eq!(json!(counts), json!([3, 1, 2]));
    assert_eq!(report["rows"], output.len());
    let verdicts = report["verdicts"].as_object().unwrap().values();
    let verdicts: u64 = verdicts.map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(verdicts as usize, with("verdict"));
    let wins = output
        .iter()
        .filter(|row| row["margin"].as_f64() > Some(0.0));
    let accuracy = wins.count() as f64 / with("verdict") as f64;
    assert_eq!(report["accuracy"], accuracy);
    let shown = String::from_utf8(done.stdout).unwrap();
    for line in shown
        .lines()
        .filter(|line| !line.starts_with("kept on the server: "))
    {
        assert!(line.chars().count() <= 80, "{line}");
    }
    assert!(shown.contains("probably flipped"), "{shown}");
    assert!(!case.files().iter().any(|name| name.contains(".curate-")));

    // The same rows again use the jobs that were kept, and then delete them.
    case.curate(
        &server,
        "again.jsonl",
        &["--agrees-from", "0.5", "--flipped-below", "0.5"],
    );
    let again = case.rows("again.jsonl");
    for (a, b) in output.iter().zip(&again) {
        assert_eq!(a["margin"], b["margin"]);
        assert_ne!(b["verdict"], "doubtful");
    }
    assert_eq!(server.lines_with("job created").len(), FOLDS);
    assert!(jobs(&client).await.is_empty());
    assert_eq!(dataset_count(&client).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn interruptions_change_nothing_in_the_output() {
    let case = Case::new(&lines(&rows(12)));
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    case.curate(&server, "undisturbed.jsonl", &["--priority", "-1"]);
    let created = || server.lines_with("job created").len();
    assert_eq!(created(), FOLDS);

    // A job of a higher priority keeps the adapters in the queue until the test is ready.
    let dataset = upload(&client, "pairs.jsonl").await;
    let blocker = submit(&client, job(&dataset.name, 1_000_000)).await;
    let start = || case.start(&server, "out.jsonl", &["--priority", "-1"]);
    let running = start();
    until("the folder of the scores", LIMIT, async || {
        case.folder("out.jsonl").is_some()
    })
    .await;
    running.signal(libc::SIGKILL);
    assert_eq!(running.end().0, None);

    let running = start();
    // The killed command may have created the jobs.
    until("the jobs and a handler", LIMIT, async || {
        jobs(&client).await.len() == FOLDS && running.handles_interrupts()
    })
    .await;
    running.signal(libc::SIGINT);
    let (code, text) = running.end();
    assert_eq!(code, Some(130), "{text}");
    assert!(text.contains("the same command continues"), "{text}");
    for job in jobs(&client).await {
        for line in ["cancel", "delete"] {
            let line = format!("bradley jobs {line} {} --server", job.name);
            assert!(text.contains(&line), "{text}");
        }
        assert!(text.contains(&format!("datasets delete {}", job.dataset)));
    }

    // The first fold is scored, the second one waits, and the third one was cancelled.
    let name = job_of(&client, 2).await;
    let request = pb::PauseTrainingJobRequest { name };
    client.training().pause_training_job(request).await.unwrap();
    cancel(&client, &job_of(&client, 3).await).await;
    let cancelled = job_of(&client, 3).await;
    let running = start();
    until("the new job", LIMIT, async || {
        let jobs = jobs(&client).await;
        jobs.len() == FOLDS && jobs.iter().all(|job| job.name != cancelled)
    })
    .await;
    cancel(&client, &blocker).await;
    let first = case.folder("out.jsonl").unwrap().join("fold-1.jsonl");
    until("the scores of the first fold", LIMIT, async || {
        first.is_file()
    })
    .await;
    // Another start at the same time is refused.
    let mut other = case.command(&server, "out.jsonl", &["--priority", "-1"]);
    let other = other.output().unwrap();
    assert_eq!(other.status.code(), Some(1));
    assert!(
        said(&other).contains("another bradley curate works on"),
        "{}",
        said(&other)
    );
    running.signal(libc::SIGKILL);
    assert_eq!(running.end().0, None);
    resume(&client, &job_of(&client, 2).await).await.unwrap();

    case.curate(&server, "out.jsonl", &["--priority", "-1"]);
    let bytes = |name: &str| std::fs::read(case.path(name)).unwrap();
    assert_eq!(bytes("out.jsonl"), bytes("undisturbed.jsonl"));
    // The blocker, one job for each fold, and one for the cancelled one.
    assert_eq!(created(), FOLDS + 1 + FOLDS + 1);
    assert!(jobs(&client).await.is_empty());
    assert_eq!(dataset_count(&client).await, 1, "the blocker's remains");
    assert_eq!(case.folder("out.jsonl"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_and_files_that_cannot_be_used_leave_nothing_behind() {
    let case = Case::new(&lines(&rows(9)));
    std::fs::write(case.path("bad.jsonl"), "{\"prompt\": \"x\"}\n").unwrap();
    std::fs::write(case.path("one.jsonl"), lines(&rows(1)).join("\n")).unwrap();
    std::fs::write(case.path("empty.jsonl"), "\n").unwrap();
    std::fs::write(case.path("there.jsonl"), "").unwrap();
    let before = case.files();
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let run = |args: &[&str]| {
        let mut command = Command::new(crate::support::binary());
        command
            .arg("curate")
            .args(args)
            .current_dir(case.dir.path())
            .env_remove("BRADLEY_CONFIG")
            .env("BRADLEY_SERVER", &server.address)
            .stdin(Stdio::null());
        command.output().unwrap()
    };
    let usual = ["--data", "pairs.jsonl", "--out", "out.jsonl"];
    let cases: [(&[&str], i32, &str); 17] = [
        (&["--folds", "1"], 2, "--folds"),
        (
            &["--flipped-below", "0.7"],
            2,
            "--agrees-from is 0.6 and --flipped-below is 0.7",
        ),
        (&["--agrees-from", "1.5"], 2, "--agrees-from is 1.5"),
        (&["--beta", "-1"], 2, "--beta"),
        (&["--learning-rate", "fast"], 2, "--learning-rate"),
        (&["--rank", "4,8"], 2, "--rank"),
        (&["--model", "nope"], 2, "--model nope does not exist"),
        (&["--policy", "nope"], 2, "--model nope does not exist"),
        (
            &["--report", "no/such/report.json"],
            2,
            "the folder no/such does not exist",
        ),
        (
            &["--report", "out.jsonl"],
            2,
            "--report names the file of --out",
        ),
        (
            &["--data", "-", "--out", "out.jsonl"],
            2,
            "write them to a file first",
        ),
        (
            &["--data", "pairs.jsonl", "--out", "pairs.jsonl"],
            2,
            "is one of the files of --data",
        ),
        (
            &["--data", "pairs.jsonl", "--out", "there.jsonl"],
            2,
            "there.jsonl exists",
        ),
        (&["--data", "pairs.jsonl", "--out", "."], 2, "is a folder"),
        (
            &["--data", "bad.jsonl", "--out", "out.jsonl"],
            1,
            "the first one: chosen is missing",
        ),
        (
            &["--data", "one.jsonl", "--out", "out.jsonl"],
            1,
            "more rows with different prompts",
        ),
        (
            &["--data", "empty.jsonl", "--out", "out.jsonl"],
            1,
            "empty.jsonl has no rows",
        ),
    ];
    for (flags, code, message) in cases {
        let args = match flags.contains(&"--data") {
            true => flags.to_vec(),
            false => [&usual[..], flags].concat(),
        };
        let done = run(&args);
        assert_eq!(done.status.code(), Some(code), "{args:?}: {}", said(&done));
        assert!(said(&done).contains(message), "{args:?}: {}", said(&done));
    }
    assert_eq!(case.files(), before);
    assert!(jobs(&client).await.is_empty());
    assert_eq!(dataset_count(&client).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_with_the_same_rows_has_jobs_of_their_own() {
    let case = Case::new(&lines(&rows(9)));
    let dir = tempfile::tempdir().unwrap();
    let member = create_token(dir.path(), "team", "submit,score");
    let admin = create_token(dir.path(), "root", "admin");
    let models = format!("tiny={}", golden("models/llama").display());
    let server = Server::start_with(dir.path(), &models, &["--auth", "tokens"]);
    let client = server.client_with(&admin).await;
    let owners = async || {
        let jobs = jobs(&client).await;
        jobs.into_iter().map(|job| job.owner).collect::<Vec<_>>()
    };
    case.curate(&server, "team.jsonl", &["--keep", "--token", &member]);
    assert_eq!(owners().await, ["team"; FOLDS]);
    let created = || server.lines_with("job created").len();
    assert_eq!(created(), FOLDS);
    // The owner's own jobs are found again.
    case.curate(&server, "again.jsonl", &["--keep", "--token", &member]);
    assert_eq!(created(), FOLDS);
    case.curate(&server, "admin.jsonl", &["--token", &admin]);
    assert_eq!(created(), 2 * FOLDS);
    assert_eq!(owners().await, ["team"; FOLDS], "those of others stay");
    assert_eq!(dataset_count(&client).await, FOLDS);
    let bytes = |name: &str| std::fs::read(case.path(name)).unwrap();
    assert_eq!(bytes("team.jsonl"), bytes("admin.jsonl"));
    assert_eq!(bytes("team.jsonl"), bytes("again.jsonl"));
}

#[tokio::test(flavor = "multi_thread")]
async fn pairs_that_are_refused_for_load_are_scored_later() {
    let case = Case::new(&lines(&rows(9)));
    let (dir, busy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(dir.path());
    case.curate(&server, "out.jsonl", &[]);
    // Only a client without a pair in work may have another one, so that all but one are refused.
    let models = format!("tiny={}", golden("models/llama").display());
    let quota = ["--max-scoring-tokens-per-client", "1"];
    let server = Server::start_with(busy.path(), &models, &quota);
    case.curate(&server, "busy.jsonl", &[]);
    let bytes = |name: &str| std::fs::read(case.path(name)).unwrap();
    assert_eq!(bytes("out.jsonl"), bytes("busy.jsonl"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dataset_that_an_earlier_start_has_left_is_deleted_at_the_end() {
    let case = Case::new(&lines(&rows(9)));
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    case.curate(&server, "out.jsonl", &["--keep"]);
    let made = jobs(&client).await;
    // The first one is as if its job was deleted and the command killed before the dataset was.
    for title in [made[0].display_name.as_str(), "of somebody else"] {
        let metadata = pb::UploadMetadata {
            display_name: title.to_owned(),
            ..Default::default()
        };
        let file = golden("pairs.jsonl");
        let uploaded = client.upload_dataset(&file, metadata, |_| {}).await;
        uploaded.unwrap();
    }
    assert_eq!(dataset_count(&client).await, FOLDS + 2);
    case.curate(&server, "again.jsonl", &[]);
    assert!(jobs(&client).await.is_empty());
    assert_eq!(dataset_count(&client).await, 1);
}
