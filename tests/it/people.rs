//! The command line as a person at a terminal sees it: progress, results as they come, Ctrl-C, and
//! plain words when a connection fails.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::backends::signal;
use crate::security::TlsServer;
use crate::server::{Server, free_port};
use crate::support::golden;
use crate::wait::{until, until_blocking};

/// Limit for what takes seconds at most, on a busy machine.
const SOON: Duration = Duration::from_secs(120);

/// The command with the address of a server, without the caller's settings.
pub fn bradley(address: &str, args: &[&str]) -> Command {
    let mut command = Command::new(crate::support::binary());
    command.args(args);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BRADLEY_")) {
        command.env_remove(name);
    }
    command.env("BRADLEY_SERVER", address);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A terminal of 80 columns, and what was written to it.
pub struct Terminal {
    written: Arc<Mutex<Vec<u8>>>,
    keyboard: File,
}

impl Terminal {
    /// Returns the terminal and its end for a child process.
    pub fn open() -> (Self, Stdio) {
        let (terminal, theirs) = Self::open_device();
        (terminal, Stdio::from(theirs))
    }

    /// Returns the terminal and its other end.
    pub fn open_device() -> (Self, OwnedFd) {
        let (mut ours, mut theirs) = (0, 0);
        let size = libc::winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the call writes two descriptors and reads one struct; the other pointers may be
        // null.
        let opened = unsafe {
            libc::openpty(
                &raw mut ours,
                &raw mut theirs,
                std::ptr::null_mut(),
                std::ptr::null(),
                &raw const size,
            )
        };
        assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: both descriptors were opened above and belong to nobody else.
        let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
        // Other tests start processes at the same time, which must not inherit the terminal.
        // SAFETY: the descriptor is open, and the call changes only its flags.
        let flagged = unsafe { libc::fcntl(ours.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        assert_eq!(flagged, 0);
        let written = Arc::new(Mutex::new(Vec::new()));
        let (copy, mut ours) = (written.clone(), File::from(ours));
        let keyboard = ours.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Reading fails when the last process with the terminal has ended.
            while let Ok(n @ 1..) = ours.read(&mut buffer) {
                copy.lock().unwrap().extend(&buffer[..n]);
            }
        });
        (Terminal { written, keyboard }, theirs)
    }

    /// Types text.
    pub fn types(&self, text: &str) {
        self.types_bytes(text.as_bytes());
    }

    /// Types bytes that need not be UTF-8.
    pub fn types_bytes(&self, bytes: &[u8]) {
        (&self.keyboard).write_all(bytes).unwrap();
    }

    pub fn shows(&self) -> String {
        text(&self.written.lock().unwrap())
    }
}

/// Waits for the end of a child.
pub fn status(child: &mut Child) -> std::process::ExitStatus {
    let mut status = None;
    until_blocking("the end of the command", SOON, || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// Writes a file of `rows` pairs with the ids p1, p2, …
fn pairs_file(folder: &Path, rows: usize) -> PathBuf {
    let path = folder.join(format!("{rows}.jsonl"));
    let mut file = File::create(&path).unwrap();
    for i in 1..=rows {
        let row = serde_json::json!({
            "id": format!("p{i}"), "prompt": "2+2=", "chosen": format!("{}", i % 7), "rejected": "x",
        });
        writeln!(file, "{row}").unwrap();
    }
    path
}

/// More rows than the command and the pipe hold: a command that waits for the last score would have
/// all of them scored before its first line.
#[test]
fn scores_are_printed_as_they_come_with_progress_on_standard_error() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let rows = 4000;
    let file = pairs_file(dir.path(), rows);
    let args = [
        "score",
        "--policy",
        "models/tiny",
        "--output",
        "json",
        "--data",
        file.to_str().unwrap(),
    ];
    let (terminal, stderr) = Terminal::open();
    let mut command = bradley(&server.address, &args);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .unwrap();
    drop(command);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    // The command waits for this test to read more, so the server cannot have scored all rows.
    let scored = server.scored_pairs();
    assert!(
        scored < rows as u64,
        "the first line came after all {scored} scores"
    );
    signal(server.pid(), libc::SIGSTOP);
    until_blocking("a bar with the rate", SOON, || {
        terminal.shows().contains("pairs/s")
    });
    assert!(child.try_wait().unwrap().is_none(), "{}", terminal.shows());
    signal(server.pid(), libc::SIGCONT);

    let mut ids = vec![first];
    ids.extend(lines.map(Result::unwrap));
    assert!(status(&mut child).success(), "{}", terminal.shows());
    assert_eq!(ids.len(), rows, "{}", terminal.shows());
    for (i, line) in ids.iter().enumerate() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(row["id"], format!("p{}", i + 1));
        assert_eq!(row["row"], i as u64 + 1);
        assert_eq!(row["policy_version"], "models/tiny");
        assert!(row["chosen"]["prompt_tokens"].as_u64() > Some(0) && row["probability"] == 0.5);
    }
    let shown = terminal.shows();
    // The model against itself: the server's warning comes first, the bar knows the number of rows.
    assert!(shown.contains("warning:"), "{shown}");
    assert!(shown.contains(&format!("/{rows} pairs")), "{shown}");
    assert!(shown.contains(&format!("{rows} pairs in ")), "{shown}");
}

/// The server is stopped, so that rows are left when the command is interrupted.
#[test]
fn ctrl_c_ends_scoring_and_says_after_how_many_rows() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = pairs_file(dir.path(), 4000);
    let args = [
        "score",
        "--policy",
        "models/tiny",
        "--output",
        "json",
        "--data",
        file.to_str().unwrap(),
    ];
    let (terminal, stderr) = Terminal::open();
    let mut command = bradley(&server.address, &args);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .unwrap();
    drop(command);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    signal(server.pid(), libc::SIGSTOP);
    signal(child.id(), libc::SIGINT);
    let printed = 1 + lines.count();
    assert_eq!(status(&mut child).code(), Some(130), "{}", terminal.shows());
    signal(server.pid(), libc::SIGCONT);
    let said = format!("interrupted after {printed} row");
    until_blocking(&said, SOON, || terminal.shows().contains(&said));
}

#[tokio::test(flavor = "multi_thread")]
async fn watching_says_once_that_the_connection_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = crate::server::upload(&client, "pairs.jsonl").await;
    let long = crate::server::job(&dataset.name, 100_000);
    let name = crate::server::submit(&client, long).await;
    let (terminal, stderr) = Terminal::open();
    let mut command = bradley(&server.address, &["watch", &name]);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap();
    drop(command);
    until("steps of the job", SOON, async || {
        terminal.shows().contains("/100000 steps")
    })
    .await;
    server.kill();
    until("the warning", SOON, async || {
        terminal
            .shows()
            .contains("connection to the server is lost")
    })
    .await;
    signal(child.id(), libc::SIGINT);
    assert_eq!(status(&mut child).code(), Some(130));
    let shown = terminal.shows();
    assert_eq!(shown.matches("is lost").count(), 1, "{shown}");
}

/// While the server is stopped, the bar says how many prompts are done.
#[test]
fn generating_for_a_file_shows_how_many_prompts_are_done() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let (prompts, rows) = (dir.path().join("prompts.jsonl"), 400);
    let line = "{\"prompt\": \"Name a colour.\"}\n";
    std::fs::write(&prompts, line.repeat(rows)).unwrap();
    let args = ["generate", "--policy", "models/tiny", "--max-tokens", "12"];
    let (terminal, stderr) = Terminal::open();
    let mut command = bradley(&server.address, &args);
    let mut child = command
        .arg("--data")
        .arg(&prompts)
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .unwrap();
    drop(command);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    signal(server.pid(), libc::SIGSTOP);
    until_blocking("a bar with the prompts", SOON, || {
        terminal.shows().contains(&format!("/{rows} "))
    });
    signal(server.pid(), libc::SIGCONT);
    assert_eq!(lines.count(), rows - 1, "{}", terminal.shows());
    assert!(status(&mut child).success(), "{}", terminal.shows());
}

/// The errors of values speak of the flags that were given.
#[test]
fn refused_values_of_generate_and_evaluate_are_named_by_their_flags() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let said = |args: &[&str]| {
        let out = bradley(&server.address, args).output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        text(&out.stderr)
    };
    let generate = ["generate", "--policy", "tiny", "--prompt", "x"];
    for (flags, expected) in [
        (&["--temperature", "-1"][..], "--temperature is -1: "),
        (&["--top-p", "2"][..], "--top-p is 2: "),
        (&["--top-k", "0"][..], "--top-k is 0: "),
        (&["--samples", "65"][..], "--samples is 65: "),
        (&["--stop", ""][..], "--stop has 0 bytes: "),
        (
            &["--max-tokens", "100000"][..],
            "--max-tokens is too large: the prompt and ",
        ),
        (
            &["--plain", "--template-args", "{}"][..],
            "cannot be used with",
        ),
    ] {
        let said = said(&[&generate[..], flags].concat());
        assert!(said.contains(expected), "{flags:?}: {said}");
    }
    let name = "x".repeat(300);
    let evaluate = ["evaluate", "--policy", "tiny", "--subset-column", &name];
    let refused = said(&[&evaluate[..], &["--dataset", &"0".repeat(36)]].concat());
    assert!(refused.contains("--subset-column must have"), "{refused}");
    let pairs = golden("pairs.jsonl");
    let evaluate = ["evaluate", "--policy", "tiny", "--save-calibration"];
    let refused = said(&[&evaluate[..], &["--data", pairs.to_str().unwrap()]].concat());
    assert!(refused.contains("--save-calibration stores"), "{refused}");
}

/// A full queue and a full quota are caused by the command's own pairs, for which it waits.
#[test]
fn rows_wait_until_the_server_has_room_for_them() {
    let models = format!("tiny={}", golden("models/llama").display());
    for flag in ["--queue-tokens", "--max-scoring-tokens-per-client"] {
        let dir = tempfile::tempdir().unwrap();
        // Room for a few pairs.
        let server = Server::start_with(dir.path(), &models, &[flag, "60"]);
        let rows = 600;
        let file = pairs_file(dir.path(), rows);
        let args = ["score", "--policy", "tiny", "--format", "json", "--data"];
        let mut command = bradley(&server.address, &args);
        let out = command.arg(&file).output().unwrap();
        let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
        assert!(out.status.success(), "{flag}: {stderr}");
        assert_eq!(stdout.lines().count(), rows, "{flag}: {stderr}");
        for (i, line) in stdout.lines().enumerate() {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(row["row"], i as u64 + 1, "{flag}: {row}");
            assert_eq!(row["probability"], 0.5, "{flag}: {row}");
        }
        assert_eq!(stderr.matches("warning:").count(), 1, "{stderr}");
        // Without patience, the first refusal ends the command.
        let impatient = [&args[..5], &["--retry-timeout", "0", "--data"]].concat();
        let mut command = bradley(&server.address, &impatient);
        let out = command.arg(&file).output().unwrap();
        let stderr = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{flag}: {stderr}");
        assert!(stderr.contains("(--retry-timeout): "), "{flag}: {stderr}");
    }
}

#[test]
fn a_bad_row_is_listed_apart_and_the_others_are_scored() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = pairs_file(dir.path(), 3);
    let long = serde_json::json!({
        "id": "long", "prompt": "word ".repeat(3000), "chosen": "a", "rejected": "b",
    });
    let rows = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{rows}not json\n{long}\n{rows}")).unwrap();
    let args = [
        "score",
        "--policy",
        "models/tiny",
        "--data",
        file.to_str().unwrap(),
    ];
    let out = bradley(&server.address, &args).output().unwrap();
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    assert_eq!(out.status.code(), Some(1), "{stdout}{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(
        lines.len(),
        1 + 6 + 1,
        "a header, six rows, a summary: {stdout}"
    );
    assert!(
        lines[..7].iter().all(|line| line.chars().count() <= 80),
        "{stdout}"
    );
    assert!(lines[7].starts_with("6 pairs: accuracy 50.0%"), "{stdout}");
    assert!(
        stderr.contains("row 4: not JSON")
            && stderr.contains("row 5 (id \"long\")")
            && stderr.contains("error: 2 of 8 rows could not be scored: correct them"),
        "{stderr}"
    );
    // JSON has a line for each row, with or without a score.
    let out = bradley(
        &server.address,
        &[&args[..], &["--output", "json"]].concat(),
    )
    .output()
    .unwrap();
    assert_eq!(
        (out.status.code(), text(&out.stdout).lines().count()),
        (Some(1), 8)
    );
    // Log-probs of the tokens are there if they are asked for.
    let one = pairs_file(dir.path(), 1);
    let args = [
        "score",
        "--policy",
        "models/tiny",
        "--data",
        one.to_str().unwrap(),
        "--output",
        "json",
        "--per-token-logprobs",
    ];
    let out = bradley(&server.address, &args).output().unwrap();
    let row: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let (tokens, logprobs) = (
        &row["chosen"]["tokens"],
        &row["chosen"]["policy_token_logprobs"],
    );
    assert_eq!(
        tokens.as_u64().unwrap() as usize,
        logprobs.as_array().unwrap().len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_the_watching_and_not_the_job() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let pairs = golden("pairs.jsonl");
    let args = [
        "train",
        "--data",
        pairs.to_str().unwrap(),
        "--rank",
        "4",
        "--batch-size",
        "2",
        "--max-length",
        "256",
        "--max-steps",
        "100000",
        "--watch",
    ];
    let (terminal, stderr) = Terminal::open();
    let mut command = bradley(&server.address, &args);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap();
    drop(command);
    until("metrics of the job", SOON, async || {
        terminal.shows().contains("  accuracy ")
    })
    .await;
    signal(child.id(), libc::SIGINT);
    assert_eq!(status(&mut child).code(), Some(130));
    let shown = terminal.shows();
    let (_, hint) = shown.split_once("the job goes on: ").unwrap();
    let id = hint.split_whitespace().nth(3).unwrap();
    assert!(hint.starts_with("bradley jobs watch "), "{hint}");
    assert!(
        hint.contains(&format!("--server {}", server.address)),
        "{hint}"
    );
    assert!(!shown.contains("0/0 steps"), "{shown}");
    // The whole line fits the 80 columns of the terminal, so that its end is not cut.
    let (_, end) = shown.split_once("  accuracy ").unwrap();
    assert!(
        end.trim_start_matches(|c: char| c.is_ascii_digit())
            .starts_with('%'),
        "{shown}"
    );

    let client = server.client().await;
    let name = format!("trainingJobs/{id}");
    assert!(!crate::server::is_final(
        crate::server::state(&client, &name).await
    ));
    let cancel = bradley(&server.address, &["jobs", "cancel", id])
        .output()
        .unwrap();
    assert!(cancel.status.success(), "{}", text(&cancel.stderr));
    let said = text(&cancel.stdout);
    let states = [" is cancelling\n", " is cancelled\n"];
    assert!(
        states.iter().any(|state| said == format!("{name}{state}")),
        "{said}"
    );
    let events = crate::server::finish(&client, &name).await;
    let newest = events.last().unwrap().sequence;
    assert!(newest > 4, "{newest} events");

    // The newest events only; the last one is the end of the job.
    let args = ["jobs", "watch", id, "--tail", "3", "--output", "json"];
    let out = bradley(&server.address, &args).output().unwrap();
    let sequences: Vec<u64> = text(&out.stdout)
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|event| event["sequence"].as_u64().unwrap())
        .collect();
    assert_eq!(sequences, [newest - 2, newest - 1, newest]);
    assert_eq!(out.status.code(), Some(1), "the job was cancelled");
    let out = bradley(&server.address, &["watch", id, "--tail", "0"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(2));
}

#[test]
fn after_the_end_a_summary_names_the_metrics_the_best_checkpoint_and_the_next_command() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let pairs = golden("pairs.jsonl");
    let args = [
        "train",
        "--data",
        pairs.to_str().unwrap(),
        "--eval-data",
        pairs.to_str().unwrap(),
        "--rank",
        "4",
        "--batch-size",
        "2",
        "--max-length",
        "256",
        "--max-steps",
        "4",
        "--eval-steps",
        "2",
        "--watch",
    ];
    let out = bradley(&server.address, &args).output().unwrap();
    let said = text(&out.stdout);
    assert!(out.status.success(), "{said}{}", text(&out.stderr));
    let (_, summary) = said.split_once(" succeeded after 4 steps").unwrap();
    for part in [
        "training:    loss ",
        "evaluation:  loss ",
        "best:        trainingJobs/",
    ] {
        assert!(summary.contains(part), "{part} is not in {summary}");
    }
    // The next command is one that works.
    let line = summary.lines().find(|line| line.contains("next:")).unwrap();
    let (_, command) = line.split_once("bradley ").unwrap();
    let command = command.replace("PAIRS", pairs.to_str().unwrap());
    let words: Vec<&str> = command.split_whitespace().collect();
    let out = bradley("", &words).output().unwrap();
    assert!(out.status.success(), "{command}: {}", text(&out.stderr));
}

#[test]
fn a_failed_connection_is_explained_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let list = |address: &str| -> Output {
        bradley("", &["models", "list", "--server", address])
            .output()
            .unwrap()
    };
    let port = server.address.trim_start_matches("http://");
    let closed = free_port();
    let tls = TlsServer::start();
    let tls_port = tls.port();
    for (address, code, words) in [
        (port.to_owned(), 2, format!("write http://{port}")),
        (format!("grpc://{port}"), 2, format!("write http://{port}")),
        (
            format!("https://{port}"),
            3,
            format!("does not use TLS: write http://{port}"),
        ),
        (
            format!("http://{}", server.http),
            3,
            "is Bradley's port for metrics and probes".to_owned(),
        ),
        (
            format!("https://{}", server.http),
            3,
            "is Bradley's port for metrics and probes".to_owned(),
        ),
        (
            format!("http://127.0.0.1:{closed}"),
            3,
            format!("nothing listens on 127.0.0.1:{closed}"),
        ),
        (
            "http://no-such-machine.invalid:50051".to_owned(),
            3,
            "no machine has the name \"no-such-machine.invalid\"".to_owned(),
        ),
        (
            format!("http://localhost:{tls_port}"),
            3,
            format!("uses TLS: write https://localhost:{tls_port}"),
        ),
        (
            format!("https://localhost:{tls_port}"),
            3,
            "--tls-server-ca".to_owned(),
        ),
    ] {
        let out = list(&address);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{address}: {said}");
        assert!(
            said.contains(&words),
            "{address}: {words:?} is not in {said}"
        );
    }
    // The right authority, but the server wants a certificate of the client.
    let ca = tls.file("ca.pem");
    let args = ["models", "list", "--tls-server-ca", ca.to_str().unwrap()];
    let out = bradley(&format!("https://localhost:{tls_port}"), &args)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(3));
    assert!(
        text(&out.stderr).contains("--tls-client-cert"),
        "{}",
        text(&out.stderr)
    );
    assert!(list(&server.address).status.success());
}

/// Returns the checks of `doctor --output json` by name: status and detail.
fn checks(out: &Output) -> std::collections::BTreeMap<String, (String, String)> {
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
    let all = report["checks"].as_array().unwrap().iter();
    all.map(|c| (text(&c["name"]), (text(&c["status"]), text(&c["detail"]))))
        .collect()
}

#[test]
fn doctor_shows_settings_with_their_sources_and_fails_if_something_does_not_answer() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let config = dir.path().join("bradley.toml");
    std::fs::write(&config, "lease = 20\n").unwrap();
    let model = format!("tiny={}", golden("models/llama").display());
    let doctor = |more: &[&str]| {
        let args = [
            "doctor",
            "--config",
            config.to_str().unwrap(),
            "--models",
            &model,
        ];
        let mut command = bradley("", &[&args[..], more].concat());
        command
            .env_remove("BRADLEY_SERVER")
            .env("BRADLEY_DATA_DIR", &server.data_dir)
            .env("BRADLEY_QUUE_TOKENS", "5")
            .output()
            .unwrap()
    };
    let free = format!("127.0.0.1:{}", free_port());
    let taken = server.address.trim_start_matches("http://");
    let good = [
        "--address",
        &server.address,
        "--listen",
        taken,
        "--http-listen",
        &free,
    ];
    let out = doctor(&[&good[..], &["--output", "yaml"]].concat());
    let report: serde_json::Value = yaml_serde::from_slice(&out.stdout).unwrap();
    assert!(
        report["checks"].is_array() && report["settings"].is_array(),
        "{report}"
    );
    let out = doctor(&[&good[..], &["--output", "json"]].concat());
    assert!(
        out.status.success(),
        "{}{}",
        text(&out.stdout),
        text(&out.stderr)
    );
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let source = |name: &str| {
        let settings = report["settings"].as_array().unwrap();
        let setting = settings.iter().find(|s| s["name"] == name).unwrap();
        setting["source"].as_str().unwrap().to_owned()
    };
    assert_eq!(source("models"), "--models");
    assert_eq!(source("data_dir"), "BRADLEY_DATA_DIR");
    assert_eq!(source("lease"), format!("{}: lease", config.display()));
    assert_eq!(source("batch_tokens"), "default");
    assert!(report["machine"]["cores"].is_string() && report["machine"]["kernels"].is_string());
    let found = checks(&out);
    let status = |name: &str| {
        let check = found.iter().find(|(n, _)| n.starts_with(name));
        check
            .unwrap_or_else(|| panic!("{name} is not in {found:?}"))
            .1
            .clone()
    };
    assert_eq!(status("model tiny").0, "ok");
    assert!(
        status("database").1.starts_with("SQLite, 0 jobs"),
        "{found:?}"
    );
    assert_eq!(status("listen").0, "warning", "the server listens there");
    assert_eq!(status("http_listen").0, "ok");
    let misspelt = status("BRADLEY_QUUE_TOKENS");
    assert!(
        misspelt.1.contains("did you mean BRADLEY_QUEUE_TOKENS?"),
        "{misspelt:?}"
    );
    assert_eq!(
        status("server"),
        ("ok".to_owned(), "serves models/tiny".to_owned())
    );

    // What does not answer fails the command; the other checks are made all the same.
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let url = format!(
        "postgres://bradley:secret@127.0.0.1:{}/bradley",
        free_port()
    );
    let file = format!("file://{}", dir.path().display());
    let bad = [
        "--address",
        &nowhere,
        "--database-url",
        &url,
        "--artifact-url",
        &file,
        "--models",
        "/nonexistent",
        "--listen",
        &free,
    ];
    let out = doctor(&[&bad[..], &["--output", "json"]].concat());
    assert_eq!(out.status.code(), Some(1));
    assert!(
        !text(&out.stdout).contains("secret"),
        "{}",
        text(&out.stdout)
    );
    let found = checks(&out);
    let failed: Vec<&str> = found
        .iter()
        .filter(|(_, (status, _))| status == "failed")
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(
        failed,
        [
            "database",
            "model nonexistent",
            &format!("server {nowhere}")
        ],
        "{found:?}"
    );
    assert!(text(&out.stderr).contains("3 checks failed"));
    // A setting that cannot be used is a failed check with its source.
    let out = doctor(&["--lease", "soon", "--listen", &free]);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text(&out.stdout).contains("failed   --lease: "),
        "{}",
        text(&out.stdout)
    );
}

#[test]
fn completions_are_scripts_and_every_command_has_a_manual_page() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("bradley.bash");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let out = bradley("", &["completions", shell]).output().unwrap();
        assert!(
            out.status.success() && text(&out.stdout).contains("doctor"),
            "{shell}"
        );
        if shell == "bash" {
            std::fs::write(&script, &out.stdout).unwrap();
        }
    }
    let checked = Command::new("bash")
        .arg("-n")
        .arg(&script)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{}", text(&checked.stderr));
    // The script completes a command's name.
    let complete = format!(
        ". {}; COMP_WORDS=(bradley chec); COMP_CWORD=1; _bradley bradley chec bradley; \
         echo \"${{COMPREPLY[@]}}\"",
        script.display()
    );
    let completed = Command::new("bash")
        .args(["-c", &complete])
        .output()
        .unwrap();
    assert_eq!(text(&completed.stdout).trim(), "checkpoints");

    let pages = dir.path().join("man");
    let out = bradley("", &["man", "--out", pages.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    let mut commands = vec![(String::new(), Vec::new())];
    let mut seen = 0;
    while let Some((page, words)) = commands.pop() {
        let name = format!("bradley{page}");
        let file = pages.join(format!("{name}.1"));
        let written = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(written.contains(".TH"), "{name}: {written}");
        seen += 1;
        for command in subcommands(&words) {
            commands.push((
                format!("{page}-{command}"),
                [&words[..], &[command]].concat(),
            ));
        }
    }
    assert!(seen > 25, "{seen} commands seen");
    let out = bradley("", &["man"]).output().unwrap();
    assert!(
        text(&out.stdout).contains("Preference"),
        "{}",
        text(&out.stdout)
    );
}

/// Returns the names of a command's subcommands, as its help lists them.
fn subcommands(words: &[String]) -> Vec<String> {
    let out = bradley("", &[]).args(words).arg("--help").output().unwrap();
    let help = text(&out.stdout);
    let Some((_, list)) = help.split_once("\nCommands:\n") else {
        return Vec::new();
    };
    let names = list
        .lines()
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next());
    names
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn redirected_logs_have_no_colours_and_name_a_method_once() {
    let dir = tempfile::tempdir().unwrap();
    let model = format!("tiny={}", golden("models/llama").display());
    let args = [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--http-listen",
        "off",
        "--log",
        "bradley=debug",
        "--models",
        &model,
        "--data-dir",
        dir.path().to_str().unwrap(),
    ];
    let mut child = bradley("", &args).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map(Result::unwrap);
    let serving = lines.find(|line| line.contains(" serving ")).unwrap();
    let (_, rest) = serving.split_once(" address=").unwrap();
    let address = format!("http://{}", rest.split_whitespace().next().unwrap());
    assert!(
        bradley(&address, &["models", "list"])
            .status()
            .unwrap()
            .success()
    );
    let served = lines
        .find(|line| line.contains("request served") && line.contains("ListModels"))
        .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        !serving.contains('\u{1b}') && !served.contains('\u{1b}'),
        "{served}"
    );
    assert!(
        served.contains("request_id=") && !served.contains("otel."),
        "{served}"
    );
    assert_eq!(served.matches("ListModels").count(), 1, "{served}");
}

#[test]
fn readiness_lists_the_parts_if_it_is_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let brief = server.http_get("/readyz");
    assert!(brief.ends_with("\r\n\r\nok\n"), "{brief}");
    let verbose = server.http_get("/readyz?verbose");
    let parts = [
        "[+] new work: accepted\n",
        "[+] database: answers\n",
        "[+] models: tiny\n",
        "[+] jobs that run here: 0\n",
    ];
    assert!(verbose.starts_with("HTTP/1.1 200"), "{verbose}");
    assert!(verbose.ends_with(&(parts.concat() + "ok\n")), "{verbose}");
}

#[test]
fn a_collector_that_is_not_there_is_in_the_log_once() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("http://127.0.0.1:{}", free_port());
    let models = format!("tiny={}", golden("models/llama").display());
    let flags = ["--otlp-endpoint", &endpoint];
    // Spans are sent after 200 ms instead of 5 s.
    let environment = [("OTEL_BSP_SCHEDULE_DELAY", "200")];
    let server = Server::start_in(dir.path(), &models, &flags, &environment);
    let lost = "spans cannot be sent and are lost";
    until_blocking("the warning", Duration::from_secs(60), || {
        let listed = bradley(&server.address, &["models", "list"])
            .output()
            .unwrap();
        assert!(listed.status.success(), "{}", text(&listed.stderr));
        server.has_logged(lost)
    });
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(400));
        assert!(
            bradley(&server.address, &["models", "list"])
                .output()
                .unwrap()
                .status
                .success()
        );
    }
    assert_eq!(server.lines_with(lost).len(), 1);
}
