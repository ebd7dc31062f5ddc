//! The command line at its edges: job files with several jobs, formats of streams, a server that
//! does not answer, tokens with few roles, and readers that stop reading.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bradley::rpc::canonical;
use bradley::rpc::pb;
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};

use crate::people::Terminal;
use crate::server::{
    Server, create_token, create_token_with_id, finish, get, is_step, job, submit, until_event,
    upload,
};
use crate::support::golden;
use crate::wait::{until, until_blocking};

/// Limit for what takes seconds at most, on a busy machine.
const SOON: Duration = Duration::from_secs(120);

/// The command without the caller's settings.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(crate::support::binary());
    command.args(args);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BRADLEY_")) {
        command.env_remove(name);
    }
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a command that must succeed, and returns its standard output.
#[track_caller]
fn succeed(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

/// Runs a command that must fail with this exit code, and returns what it says.
#[track_caller]
fn fails(code: i32, args: &[&str]) -> String {
    let out = run(args);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
    said
}

/// Reads the documents of a YAML text.
fn documents(text: &str) -> Vec<Value> {
    canonical::values_of_yaml(text).unwrap()
}

#[test]
fn reference_none_makes_a_job_without_a_reference() {
    let print = ["train", "--print-job"];
    let printed = |more: &[&str]| documents(&succeed(&[&print[..], more].concat()));
    let one = printed(&["--reference", "none"]);
    assert_eq!(one[0]["dpo"], json!({"reference_free": true}));
    assert_eq!(one[0].get("reference"), None);
    let both = printed(&["--reference", "none", "--reference", "models/base"]);
    assert_eq!(both.len(), 2);
    assert_eq!(both[0]["labels"]["reference"], "none");
    assert_eq!(both[0]["dpo"]["reference_free"], true);
    assert_eq!(both[1]["reference"], "models/base");
    assert_eq!(both[1]["dpo"].get("reference_free"), None);
    let contradicting = ["--reference", "none", "--reference-free=false"];
    let said = fails(2, &[&print[..], &contradicting].concat());
    assert!(said.contains("--reference none and"), "{said}");
}

#[test]
fn the_printed_jobs_of_a_sweep_are_a_job_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sweep.yaml");
    let path = file.to_str().unwrap();
    let sweep = ["--beta", "0.1,0.2", "--seed", "1,2", "--label", "by=me"];
    let printed = succeed(&[&["train", "--print-job"][..], &sweep].concat());
    assert_eq!(documents(&printed).len(), 4);
    std::fs::write(&file, &printed).unwrap();
    // With their labels and titles.
    assert_eq!(succeed(&["train", "-f", path, "--print-job"]), printed);
    let overridden = succeed(&["train", "-f", path, "--print-job", "--rank", "3"]);
    for job in documents(&overridden) {
        assert_eq!(
            (&job["lora"]["rank"], &job["labels"]["by"]),
            (&json!(3), &json!("me"))
        );
    }
    let said = fails(2, &["train", "-f", path, "--print-job", "--seed", "5,6"]);
    assert!(said.contains("--label seed: a sweep over --seed"), "{said}");

    std::fs::write(&file, "seed: 1\n---\n\n---\ndpo:\n  bta: 2\n").unwrap();
    let said = fails(2, &["train", "-f", path, "--print-job"]);
    assert!(
        said.contains("sweep.yaml job 2: dpo.bta does not exist"),
        "{said}"
    );
    std::fs::write(&file, "seed: 1\n---\n".repeat(33)).unwrap();
    let said = fails(2, &["train", "-f", path, "--print-job", "--epochs", "1,2"]);
    assert!(said.contains("33 jobs make 66"), "{said}");
}

#[test]
fn the_answer_to_one_prompt_is_not_written_to_a_file_of_results() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("g.jsonl");
    let path = out.to_str().unwrap();
    let prompt = ["generate", "--policy", "tiny", "--prompt", "hi"];
    let said = fails(2, &[&prompt[..], &["--out", path]].concat());
    let remedy = format!("--format json > {path}");
    for part in ["--out", "is for the results of --data", &remedy] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    assert!(!out.exists());
}

#[test]
fn a_sweep_overwrites_no_label_of_the_caller() {
    let sweep = ["train", "--print-job", "--beta", "0.1,0.2", "--label"];
    let said = fails(2, &[&sweep[..], &["beta=mine"]].concat());
    assert!(said.contains("--label beta: a sweep over --beta"), "{said}");
    let named = documents(&succeed(&[&sweep[..], &["sweep=study"]].concat()));
    assert!(
        named.iter().all(|job| job["labels"]["sweep"] == "study"),
        "{named:?}"
    );
}

#[test]
fn a_time_to_live_is_a_time_or_is_refused_by_name() {
    let print = |ttl: &str| run(&["train", "--print-job", &format!("--ttl={ttl}")]);
    for (ttl, stored) in [
        ("0s", "0s"),
        ("90s", "90s"),
        ("1.5s", "1.500s"),
        ("7d", "604800s"),
    ] {
        let out = print(ttl);
        let job = &documents(&text(&out.stdout))[0];
        assert_eq!(job["ttl"], stored, "{ttl}: {}", text(&out.stderr));
    }
    for ttl in [
        "",
        "s",
        "é",
        "7",
        "-1d",
        "1e300s",
        "NaNs",
        "infs",
        "99999999999999999999d",
        "18446744073709551615d",
        "18446744073709551615s",
        "9223372036854775807m",
    ] {
        let out = print(ttl);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{ttl}: {said}");
        assert!(said.contains("ttl"), "{ttl}: {said}");
    }
}

/// Returns HOST:PORT of a port that accepts connections and never answers.
fn silent_port() -> String {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = silent.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        // Connections stay open and get no answer.
        let open: Vec<_> = silent.incoming().collect();
        drop(open);
    });
    place
}

/// Runs a command that must end within 30 seconds. Returns its exit code and what it says.
fn ends_soon(args: &[&str]) -> (Option<i32>, String) {
    let mut child = command(args).stderr(Stdio::piped()).spawn().unwrap();
    let mut status = None;
    let limit = Duration::from_secs(30);
    until_blocking("the end of the command", limit, || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    let mut said = String::new();
    child.stderr.unwrap().read_to_string(&mut said).unwrap();
    (status.unwrap().code(), said)
}

#[test]
fn a_server_that_says_nothing_is_not_healthy() {
    let address = format!("http://{}", silent_port());
    // Without a limit of its own, the command ends when keep-alive gives up, after 50 s.
    let (code, said) = ends_soon(&["health", "--server", &address]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("answered no health check within"), "{said}");
}

#[test]
fn a_tls_handshake_without_an_answer_ends() {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, params.self_signed(&key).unwrap().pem()).unwrap();
    let address = format!("https://{}", silent_port());
    let ca = ca.to_str().unwrap();
    let tls = ["--server", &address, "--tls-server-ca", ca];
    let (code, said) = ends_soon(&[&["health"][..], &tls].concat());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("answered no health check within"), "{said}");
    let (code, said) = ends_soon(&[&["jobs", "list"][..], &tls].concat());
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains("accepts connections but did not answer the TLS handshake within 10 seconds"),
        "{said}"
    );
}

#[test]
fn an_error_about_settings_names_misspelt_variables() {
    let out = command(&["serve"])
        .env("BRADLEY_MODEL", "tiny=/nowhere")
        .output()
        .unwrap();
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.contains("--models is not set"), "{said}");
    assert!(
        said.contains("BRADLEY_MODEL is unknown and has no effect: did you mean BRADLEY_MODELS?"),
        "{said}"
    );
}

#[test]
fn a_download_into_a_folder_with_files_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (new, used) = (dir.path().join("new"), dir.path().join("used"));
    std::fs::create_dir(&used).unwrap();
    let download = |code: i32, out: &std::path::Path| {
        let fixed = ["checkpoints", "download", "@last", "--contents", "merged"];
        let rest = [
            "--server",
            "http://127.0.0.1:1",
            "--out",
            out.to_str().unwrap(),
        ];
        fails(code, &[&fixed[..], &rest].concat())
    };
    // These folders are accepted, and then there is no server.
    download(3, &new);
    download(3, &used);
    std::fs::write(used.join("adapter_config.json"), "{}").unwrap();
    let said = download(2, &used);
    assert!(
        said.contains("--out: ")
            && said.contains("used is not empty (it has adapter_config.json): name a new folder")
            && said.contains("or remove what an interrupted download has left"),
        "{said}"
    );
    assert_eq!(std::fs::read_dir(&used).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_jobs_are_cancelled_by_one_command() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let mut names = Vec::new();
    for _ in 0..5 {
        names.push(submit(&client, job(&dataset, 100_000)).await);
    }
    let given: Vec<&str> = names.iter().map(String::as_str).collect();
    let cancel = ["jobs", "cancel", "--server", server.address.as_str()];
    // With a name that cannot be one, no job is cancelled.
    let said = fails(2, &[&cancel[..], &given[..2], &["@first"]].concat());
    assert!(said.contains("@first names no job"), "{said}");
    let said = succeed(&[&cancel[..], &given[..2]].concat());
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    for (line, name) in lines.iter().zip(&names) {
        assert!(line.starts_with(&format!("{name} is cancel")), "{said}");
    }
    let said = succeed(&[&cancel[..], &given[2..4], &["--format", "json"]].concat());
    let list: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(list[0]["name"], given[2]);
    assert_eq!(list[1]["name"], given[3]);
    // The job before one that does not exist is cancelled and shown.
    let unknown = "00000000-0000-7000-8000-000000000000";
    let more = [given[4], unknown, "--format", "json"];
    let out = run(&[&cancel[..], &more].concat());
    assert!(!out.status.success(), "{}", text(&out.stdout));
    let list: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    assert_eq!(list[0]["name"], given[4]);
}

#[test]
fn a_missing_file_of_certificates_is_named_with_its_flag() {
    let secure = ["--server", "https://127.0.0.1:1"];
    let list = ["jobs", "list", "--tls-server-ca", "/nowhere/ca.pem"];
    let said = fails(1, &[&list[..], &secure].concat());
    assert!(said.contains("--tls-server-ca /nowhere/ca.pem: "), "{said}");
}

#[test]
fn a_label_with_two_values_is_refused() {
    let twice = ["--label", "env=prod", "--label", "env=dev"];
    let nowhere = ["--server", "http://127.0.0.1:1"];
    let update = [&["jobs", "update", "@last"][..], &nowhere].concat();
    for args in [&["train", "--print-job"][..], &update] {
        let said = fails(2, &[args, &twice].concat());
        assert!(
            said.contains(r#"--label env is given twice, with "prod" and "dev""#),
            "{said}"
        );
    }
    let same = ["--label", "env=prod", "--label", "env=prod"];
    let printed = succeed(&[&["train", "--print-job"][..], &same].concat());
    assert_eq!(documents(&printed)[0]["labels"], json!({"env": "prod"}));
}

#[test]
fn an_update_without_a_change_names_the_flags_before_it_connects() {
    let nowhere = ["--server", "http://127.0.0.1:1"];
    let said = fails(2, &[&["jobs", "update", "@last"][..], &nowhere].concat());
    assert!(
        said.contains("nothing to change: give --title, --priority or --label"),
        "{said}"
    );
    fails(
        3,
        &[
            &["jobs", "update", "@last", "--priority", "1"][..],
            &nowhere,
        ]
        .concat(),
    );
}

#[test]
fn the_usage_line_of_an_error_has_no_values_of_variables() {
    for (args, usage) in [
        (
            &["jobs", "pause"][..],
            "bradley jobs pause [OPTIONS] <NAME>",
        ),
        (&["jobs", "update"], "bradley jobs update [OPTIONS] <NAME>"),
        (&["watch", "--tial", "3"], "bradley watch [OPTIONS] <JOB>"),
    ] {
        let out = command(args)
            .env("BRADLEY_SERVER", "http://127.0.0.1:1")
            .env("BRADLEY_TOKEN", "t")
            .output()
            .unwrap();
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("Usage: {usage}\n")), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_estimates_have_the_format_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let job_name = submit(&client, job(&dataset, 2)).await;
    finish(&client, &job_name).await;
    let at = ["--server", &server.address];
    let with = |args: &[&str], format: &str| [args, &at, &["--format", format]].concat().join(" ");
    let said = |args: &[&str], format: &str| {
        let line = with(args, format);
        succeed(&line.split(' ').collect::<Vec<_>>())
    };

    let pairs = golden("pairs.jsonl");
    let score = [
        "score",
        "--policy",
        "tiny",
        "--data",
        pairs.to_str().unwrap(),
    ];
    let rows = canonical::value_of_yaml(&said(&score, "yaml")).unwrap();
    let lines = said(&score, "json");
    let lines: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(rows, Value::Array(lines));

    let watch = ["watch", &job_name];
    let events = canonical::value_of_yaml(&said(&watch, "yaml")).unwrap();
    let lines = said(&watch, "json");
    let lines: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(events, Value::Array(lines));
    let refused = with(&watch, "csv");
    let refused = fails(2, &refused.split(' ').collect::<Vec<_>>());
    assert!(
        refused.contains("--format csv") && refused.contains("json or yaml"),
        "{refused}"
    );

    let estimate = [
        "train",
        "--dataset",
        &dataset,
        "--max-length",
        "128",
        "--estimate",
    ];
    let sweep = [&estimate[..], &["--beta", "0.1,0.2"]].concat();
    let yaml = canonical::value_of_yaml(&said(&sweep, "yaml")).unwrap();
    let betas: Vec<&Value> = (0..2).map(|i| &yaml[i]["differs_in"]).collect();
    assert_eq!(betas, ["beta=0.1", "beta=0.2"]);
    let csv = said(&sweep, "csv");
    assert_eq!(
        csv.lines().count(),
        3,
        "a header and a line for each job: {csv}"
    );
    let one = canonical::value_of_yaml(&said(&estimate, "yaml")).unwrap();
    assert_eq!(one["total_steps"], yaml[0]["total_steps"]);

    // On a terminal, the bar is on standard error, and the events are where results are.
    let (terminal, stderr) = Terminal::open();
    let watch = [&["watch", &job_name][..], &at].concat();
    let out = command(&watch).stderr(stderr).output().unwrap();
    assert!(out.status.success(), "{}", terminal.shows());
    let said = text(&out.stdout);
    for event in ["running", "step 2/2", "checkpoint trainingJobs/"] {
        assert!(said.contains(event), "{event} is not in {said}");
    }
    assert!(
        !terminal.shows().contains("checkpoint trainingJobs/"),
        "{}",
        terminal.shows()
    );
}

#[test]
fn doctor_tells_a_new_artifact_store_from_one_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (data, share) = (dir.path().join("data"), dir.path().join("share/new"));
    let url = format!("file://{}", share.display());
    let models = format!("tiny={}", golden("models/llama").display());
    // Returns the status and the detail of the check.
    let store = || {
        let out = command(&["doctor", "--models", &models, "--artifact-url", &url])
            .args(["--listen", "127.0.0.1:0", "--http-listen", "off"])
            .args(["--format", "json", "--data-dir"])
            .arg(&data)
            .output()
            .unwrap();
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|c| c["name"] == "artifact store");
        let text = |name: &str| check.unwrap()[name].as_str().unwrap().to_owned();
        (text("status"), text("detail"))
    };
    let (status, detail) = store();
    assert_eq!(status, "ok", "{detail}");
    assert!(detail.contains("is made at the first start"), "{detail}");
    assert!(!share.exists(), "doctor made the folder");
    std::fs::create_dir_all(&data).unwrap();
    let server = Server::start_with(&data, &models, &["--artifact-url", &url]);
    assert_eq!(store(), ("ok".to_owned(), format!("{url} answers")));
    drop(server);
    // A share that is not mounted.
    std::fs::rename(&share, dir.path().join("elsewhere")).unwrap();
    let (status, detail) = store();
    assert!(
        status == "failed" && detail.contains("does not exist, but this database has files there"),
        "{status}: {detail}"
    );
    std::fs::create_dir(&share).unwrap();
    let (status, detail) = store();
    assert!(
        status == "failed" && detail.contains("that this database knows"),
        "{status}: {detail}"
    );
}

#[test]
fn commands_without_settings_of_serve_do_not_read_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().to_str().unwrap();
    let to = "postgres://127.0.0.1:1/bradley";
    for (args, code, wanted) in [
        (
            &["demo", "--model", "/nowhere/model"][..],
            1,
            "/nowhere/model",
        ),
        (
            &["migrate", "--to", to, "--data-dir", data],
            2,
            "has no bradley.db",
        ),
    ] {
        let out = command(args)
            .env("BRADLEY_CONFIG", "/nowhere/bradley.toml")
            .output()
            .unwrap();
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        assert!(
            said.contains(wanted) && !said.contains("bradley.toml"),
            "{args:?}: {said}"
        );
    }
}

#[test]
fn a_path_in_place_of_the_artifact_stores_url_is_refused_in_the_words_of_serve() {
    let words = "\"/a/store\": it must be a URL such as s3://bucket/prefix or file:///folder";
    let to = ["--to", "postgres://127.0.0.1:1/bradley"];
    for (args, name) in [
        (&["migrate", to[0], to[1]][..], "--artifact-url is "),
        (&["serve", "--models", "x=/nowhere"], "artifact"),
    ] {
        let given = [args, &["--artifact-url", "/a/store"]].concat();
        let out = command(&given).output().unwrap();
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{said}");
        assert!(said.contains(name) && said.contains(words), "{said}");
    }
}

#[test]
fn settings_that_cannot_be_used_are_wrong_arguments_of_demo_and_doctor() {
    let model = golden("models/llama");
    let model = model.to_str().unwrap();
    let said = fails(2, &["demo", "--model", model, "--precision", "f16"]);
    assert!(
        said.contains("--precision is \"f16\": it must be f32 or bf16"),
        "{said}"
    );
    let said = fails(2, &["doctor", "--config", "/nowhere/bradley.toml"]);
    assert!(
        said.contains("/nowhere/bradley.toml cannot be read"),
        "{said}"
    );
}

#[test]
fn the_help_lists_every_exit_code() {
    let help = succeed(&["--help"]);
    // The lines are wrapped.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for code in [
        "0 success",
        "1 failure",
        "2 wrong",
        "3 no server",
        "130 ",
        "141 ",
    ] {
        assert!(help.contains(code), "{code} is not in {help}");
    }
}

#[test]
fn last_is_the_callers_own_job_and_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let team = create_token(dir.path(), "team", "submit");
    let ops = create_token(dir.path(), "ops", "admin");
    let models = format!("tiny={}", golden("models/llama").display());
    let server = Server::start_with(dir.path(), &models, &["--auth", "tokens"]);
    let pairs = golden("pairs.jsonl");
    let pairs = pairs.to_str().unwrap();
    let with = |token: &str, args: &[&str]| {
        let connection = ["--server", &server.address, "--token", token];
        let all = [args, &connection].concat();
        all.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>()
    };
    let named = |token: &str, kind: &str| {
        let args = with(token, &[kind, "get", "@last", "--format", "json"]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let shown: Value = serde_json::from_str(&succeed(&args)).unwrap();
        shown["name"].as_str().unwrap().to_owned()
    };
    // Uploads a dataset and creates a job with it; the job need not run.
    let make = |token: &str| {
        let upload = with(token, &["datasets", "upload", pairs]);
        succeed(&upload.iter().map(String::as_str).collect::<Vec<_>>());
        let train = ["train", "--dataset", "@last", "--max-steps", "1"];
        let train = with(token, &train);
        succeed(&train.iter().map(String::as_str).collect::<Vec<_>>());
        (named(token, "jobs"), named(token, "datasets"))
    };

    let of_team = make(&team);
    // An administrator sees the team's, but has none.
    for (kind, what) in [("jobs", "job"), ("datasets", "dataset")] {
        let args = with(&ops, &[kind, "get", "@last"]);
        let said = fails(2, &args.iter().map(String::as_str).collect::<Vec<_>>());
        let expected = format!("your own newest {what}, and you have none yet");
        assert!(said.contains(&expected), "{said}");
    }
    let of_ops = make(&ops);
    assert_ne!(of_ops.0, of_team.0);
    assert_ne!(of_ops.1, of_team.1);
    let newer = make(&team);
    assert_ne!(newer.0, of_team.0);
    assert_eq!((named(&ops, "jobs"), named(&ops, "datasets")), of_ops);
    assert_eq!((named(&team, "jobs"), named(&team, "datasets")), newer);

    // A list of an administrator still has everyone's.
    let list = with(&ops, &["jobs", "list", "--format", "json"]);
    let list = succeed(&list.iter().map(String::as_str).collect::<Vec<_>>());
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_may_only_score_works_with_whole_names() {
    let dir = tempfile::tempdir().unwrap();
    let team = create_token(dir.path(), "team", "submit,score");
    let (id, scorer) = create_token_with_id(dir.path(), "team", "score");
    let models = format!("tiny={}", golden("models/llama").display());
    let server = Server::start_with(dir.path(), &models, &["--auth", "tokens"]);
    let pairs = golden("pairs.jsonl");
    let pairs = pairs.to_str().unwrap();
    let train = [
        "train",
        "--server",
        &server.address,
        "--token",
        &team,
        "--data",
        pairs,
    ];
    succeed(
        &[
            &train[..],
            &["--max-steps", "1", "--batch-size", "2", "--watch"],
        ]
        .concat(),
    );
    let list = [
        "jobs",
        "list",
        "--server",
        &server.address,
        "--token",
        &team,
    ];
    let jobs = succeed(&[&list[..], &["--format", "json"]].concat());
    let jobs: Value = serde_json::from_str(&jobs).unwrap();
    let name = jobs[0]["name"].as_str().unwrap();
    let whole = name.trim_start_matches("trainingJobs/");

    let score = |policy: &str| {
        let fixed = ["score", "--server", &server.address, "--token", &scorer];
        let more = ["--data", pairs, "--policy", policy];
        [&fixed[..], &more].concat().join(" ")
    };
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    for policy in [whole, name, &format!("{name}/checkpoints/latest")] {
        let args = words(&score(policy));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        assert!(succeed(&args).contains("accuracy"), "{policy}");
    }
    for (policy, parts) in [
        ("tinny", ["did you mean models/tiny?", "whole id"]),
        (
            &whole[..8],
            [
                "does not exist",
                "whole id for a token without the role submit",
            ],
        ),
        (
            "@last",
            [
                "--policy @last: only a token with the role submit",
                "whole ID",
            ],
        ),
    ] {
        let args = words(&score(policy));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let said = fails(2, &args);
        for part in parts {
            assert!(said.contains(part), "{policy}: {part} is not in {said}");
        }
    }

    // Other answers for people: times with a unit, and what was done.
    let usage = succeed(&["usage", "--server", &server.address, "--token", &team]);
    let first_line = usage.lines().next().unwrap();
    assert!(
        first_line.contains(" to ") && first_line.ends_with(" (UTC)"),
        "{usage}"
    );
    assert!(
        usage.contains("device time") && usage.contains(" s"),
        "{usage}"
    );
    let folder = dir.path().to_str().unwrap();
    let revoked = succeed(&["tokens", "revoke", &id, "--data-dir", folder]);
    assert_eq!(revoked, format!("revoked {id}\n"));
}

/// `bradley … | head -1` ends in silence, with the exit code that shells have for SIGPIPE.
#[test]
fn a_command_whose_reader_has_gone_ends_quietly() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("many.jsonl");
    let row = json!({"prompt": "2+2=", "chosen": "4", "rejected": "5"});
    // More than a pipe holds.
    std::fs::write(&file, format!("{row}\n").repeat(2000)).unwrap();
    let data = ["--data", file.to_str().unwrap(), "--policy", "tiny"];
    for args in [
        [&["score", "--format", "json"][..], &data].concat(),
        [&["score"][..], &data].concat(),
        vec!["completions", "bash"],
    ] {
        let mut child = command(&args)
            .env("BRADLEY_SERVER", &server.address)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut reader = BufReader::with_capacity(64, child.stdout.take().unwrap());
        reader.read_line(&mut String::new()).unwrap();
        drop(reader);
        let mut status = None;
        until_blocking("the end of the command", SOON, || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        let mut said = String::new();
        child.stderr.unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(status.unwrap().code(), Some(141), "{args:?}: {said}");
        assert!(!said.contains("error"), "{args:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_jobs_says_which_server_runs_each_and_the_age_of_its_newest_event() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, job(&dataset, 100_000)).await;
    until_event(&client, &name, |event| is_step(event, 1)).await;
    let at = ["--server", &server.address];
    let list = [&["jobs", "list"][..], &at].concat();
    let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let machine = machine.trim();
    let table = succeed(&list);
    for shown in ["replica", "last event", machine, " s ago"] {
        assert!(table.contains(shown), "{shown} is not in {table}");
    }
    let running = get(&client, &name).await;
    assert_eq!(running.replica, machine);
    let heard = running.replica_time.unwrap().seconds;
    let began = running.start_time.unwrap().seconds;
    assert!(
        (began - 1..began + 600).contains(&heard),
        "{heard} is far from {began}"
    );
    let newest = running.last_event_time;
    assert!(newest.is_some());
    let follow = client.follow(&name, 0, |event| event.time != newest);
    let followed = tokio::time::timeout(Duration::from_secs(60), follow).await;
    followed.expect("no event has that time").unwrap();
    let by_name = [&list[..], &["--columns", "name,heard,last event"]].concat();
    assert!(succeed(&by_name).contains("heard"));
    let request = pb::CancelTrainingJobRequest { name: name.clone() };
    client
        .training()
        .cancel_training_job(request)
        .await
        .unwrap();
    finish(&client, &name).await;
    let ended = get(&client, &name).await;
    assert_eq!((ended.replica.as_str(), ended.replica_time), ("", None));
    assert_eq!(ended.last_event_time, None);
    assert!(!succeed(&list).contains("last event"));
}

/// A row that is too long is an error of the field that has its texts.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_too_long_names_the_field_of_its_call() {
    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", golden("models/llama").display());
    let server = Server::start_with(dir.path(), &models, &["--max-row-tokens", "256"]);
    let client = server.client().await;
    let text = |text: String| pb::Text {
        form: Some(pb::text::Form::Plain(text)),
    };
    let request = pb::ScoreCompletionsRequest {
        options: Some(pb::ScoringOptions {
            policy: "models/tiny".into(),
            ..Default::default()
        }),
        prompt: Some(text("2+2=".into())),
        completions: (0..9).map(|i| text(format!(" {i}").repeat(100))).collect(),
    };
    let answer = client.scoring().score_completions(request).await;
    let refused = answer.unwrap_err();
    let fields = bradley::rpc::client::field_violations(&refused);
    assert_eq!(fields[0].0, "completions", "{refused:?}");
    assert!(fields[0].1.contains("send fewer answers"), "{refused:?}");
}

/// A job may have longer pairs than this server scores in one row. Its estimate says how long it
/// takes all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_pairs_are_too_long_to_score_is_estimated() {
    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", golden("models/llama").display());
    for limit in ["2", "64"] {
        let server = Server::start_with(
            &dir.path().join(limit),
            &models,
            &["--max-row-tokens", limit],
        );
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await;
        let request = pb::EstimateTrainingJobRequest {
            training_job: Some(job(&dataset.name, 3)),
        };
        let answer = client.training().estimate_training_job(request).await;
        let estimate = answer.unwrap().into_inner();
        assert_eq!(estimate.total_steps, 3);
        assert!(estimate.longest_pair_tokens > 64, "{estimate:?}");
        assert!(estimate.duration.is_some(), "{estimate:?}");
    }
}

/// Arrow files are read where they are, which needs no room for a copy.
#[test]
fn an_arrow_file_is_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("pairs.arrow");
    let column = |values: [&str; 2]| -> Arc<dyn arrow_array::Array> {
        Arc::new(arrow_array::StringArray::from(values.to_vec()))
    };
    let batch = arrow_array::RecordBatch::try_from_iter([
        ("prompt", column(["2+2=", "3+3="])),
        ("chosen", column(["4", "6"])),
        ("rejected", column(["5", "7"])),
    ])
    .unwrap();
    let out = std::fs::File::create(&file).unwrap();
    let mut writer = arrow_ipc::writer::FileWriter::try_new(out, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let file = file.to_str().unwrap();
    let score = [
        "score",
        "--policy",
        "tiny",
        "--server",
        &server.address,
        "--data",
        file,
    ];
    let out = command(&score)
        .env("TMPDIR", "/does/not/exist")
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text_of(&out));
    assert!(text_of(&out).contains("2 pairs"), "{}", text_of(&out));
}

fn text_of(out: &Output) -> String {
    text(&out.stdout) + &text(&out.stderr)
}

/// A proxy that drops one answer: that to the first call that contains `mark`. It closes the
/// connection when it may.
struct AnswerDroppingProxy {
    port: u16,
    may_close: Arc<AtomicBool>,
}

impl AnswerDroppingProxy {
    fn start(backend: u16, mark: &'static [u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let may_close = Arc::<AtomicBool>::default();
        let (has_dropped, shared) = (Arc::<AtomicBool>::default(), may_close.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = TcpStream::connect(("127.0.0.1", backend)).unwrap();
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let drops = Arc::<AtomicBool>::default();
                let (has_dropped, is_marked) = (has_dropped.clone(), drops.clone());
                std::thread::spawn(move || ask(from, to, mark, (&has_dropped, &is_marked)));
                let may_close = shared.clone();
                std::thread::spawn(move || answer(server, client, (&drops, &may_close)));
            }
        });
        AnswerDroppingProxy { port, may_close }
    }
}

/// Passes calls on. Before the first marked one of all connections, sets the first flag, which they
/// share, and the second one, with which the answers of this connection are dropped.
fn ask(
    mut client: TcpStream,
    mut server: TcpStream,
    mark: &[u8],
    (has_dropped, is_marked): (&AtomicBool, &AtomicBool),
) {
    let (mut buffer, mut sent) = (vec![0; 1 << 16], Vec::new());
    while let Ok(n @ 1..) = client.read(&mut buffer) {
        sent.extend_from_slice(&buffer[..n]);
        let has_mark = sent.windows(mark.len()).any(|window| window == mark);
        if has_mark && !has_dropped.swap(true, Ordering::AcqRel) {
            is_marked.store(true, Ordering::Release);
        }
        if server.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = server.shutdown(Shutdown::Both);
}

/// Passes answers on, or drops them until the connection may be closed.
fn answer(
    mut server: TcpStream,
    mut client: TcpStream,
    (drops, may_close): (&AtomicBool, &AtomicBool),
) {
    let interval = Duration::from_millis(50);
    server.set_read_timeout(Some(interval)).unwrap();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = server.read(&mut buffer);
        let is_dropped = drops.load(Ordering::Acquire);
        if is_dropped && may_close.load(Ordering::Acquire) {
            break;
        }
        match read {
            Ok(0) => break,
            Ok(_) if is_dropped => {}
            Ok(n) if client.write_all(&buffer[..n]).is_ok() => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Ok(_) | Err(_) => break,
        }
    }
    let _ = server.shutdown(Shutdown::Both);
    let _ = client.shutdown(Shutdown::Both);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_answer_is_lost_is_created_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let title = "its answer is lost";
    let port = server.address.rsplit(':').next().unwrap();
    let proxy = AnswerDroppingProxy::start(port.parse().unwrap(), title.as_bytes());
    let address = format!("http://127.0.0.1:{}", proxy.port);
    let flags = ["--title", title, "--max-steps", "1", "--format", "json"];
    let args = ["train", "--server", &address, "--dataset", &dataset];
    let child = command(&[&args[..], &flags].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let jobs = async || {
        let request = pb::ListTrainingJobsRequest::default();
        let listed = client.training().list_training_jobs(request).await;
        listed.unwrap().into_inner().training_jobs
    };
    until("the job", SOON, async || jobs().await.len() == 1).await;
    proxy.may_close.store(true, Ordering::Release);
    let ended = tokio::task::spawn_blocking(move || child.wait_with_output());
    let out = ended.await.unwrap().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    let told: Value = serde_json::from_slice(&out.stdout).unwrap();
    let all = jobs().await;
    assert_eq!(all.len(), 1, "{all:?}");
    assert_eq!(told["name"], all[0].name.as_str());
}
