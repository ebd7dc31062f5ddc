//! The command line's output: formats, columns, short names, and tables on a terminal.

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{Command, Output};

use bradley::rpc::canonical;
use bradley::rpc::pb;
use serde_json::{Value, json};

use crate::server::Server;
use crate::support::{binary, golden};

fn command(server: &Server, args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command
        .args(args)
        .env_remove("BRADLEY_CONFIG")
        .env_remove("BRADLEY_OUTPUT")
        .env("BRADLEY_SERVER", &server.address);
    command
}

fn run(server: &Server, args: &[&str]) -> Output {
    command(server, args).output().unwrap()
}

/// Runs a command that must succeed, and returns its standard output.
#[track_caller]
fn succeed(server: &Server, args: &[&str]) -> String {
    let out = run(server, args);
    assert!(
        out.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

/// Runs a command with wrong arguments, and returns what it says.
#[track_caller]
fn refused(server: &Server, args: &[&str]) -> String {
    let out = run(server, args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
    said
}

#[track_caller]
fn as_json(server: &Server, args: &[&str]) -> Value {
    serde_json::from_str(&succeed(server, &[args, &["--format", "json"]].concat())).unwrap()
}

/// Trains a job to its end, and returns its name.
fn train(server: &Server, flags: &[&str]) -> String {
    let pairs = golden("pairs.jsonl");
    let fixed = [
        "train",
        "--data",
        pairs.to_str().unwrap(),
        "--rank",
        "4",
        "--batch-size",
        "2",
        "--max-steps",
        "3",
        "--watch",
    ];
    succeed(server, &[&fixed[..], flags].concat());
    let newest = as_json(server, &["jobs", "get", "@last"]);
    newest["name"].as_str().unwrap().to_owned()
}

/// Opens a terminal of this many columns. The second value returned is the end for a process.
fn terminal(columns: u16) -> (File, OwnedFd) {
    let size = libc::winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let (mut main, mut of_process) = (0, 0);
    // SAFETY: openpty writes two descriptors, and reads a size that lives as long as the call.
    let opened = unsafe {
        libc::openpty(
            &mut main,
            &mut of_process,
            std::ptr::null_mut(),
            std::ptr::null(),
            &size,
        )
    };
    assert_eq!(opened, 0);
    // SAFETY: both descriptors are open, and nothing else owns them.
    unsafe { (File::from_raw_fd(main), OwnedFd::from_raw_fd(of_process)) }
}

/// Runs a command whose standard output is a terminal of this many columns, and returns what the
/// terminal shows.
fn on_terminal(server: &Server, columns: u16, args: &[&str]) -> String {
    let (main, of_process) = terminal(columns);
    let mut command = command(server, args);
    command.stdout(of_process);
    shown_on(main, command)
}

/// Runs a command that must succeed, and returns what the terminal shows whose end it has.
fn shown_on(mut main: File, mut command: Command) -> String {
    let mut child = command.env_remove("COLUMNS").spawn().unwrap();
    // The command holds the last other end, so that reading ends with the process.
    drop(command);
    let mut shown = Vec::new();
    // A terminal without another end is an error on Linux, not an end of file.
    let _ = main.read_to_end(&mut shown);
    let shown = String::from_utf8(shown).unwrap().replace('\r', "");
    assert!(child.wait().unwrap().success(), "{shown}");
    shown
}

fn widest(text: &str) -> usize {
    text.lines().map(|l| l.chars().count()).max().unwrap()
}

#[test]
fn every_format_has_the_whole_job_and_a_short_name_suffices() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    assert!(refused(&server, &["jobs", "get", "@last"]).contains("you have none yet"));
    let title = "first with a title that is longer than a terminal is wide, so that it must be cut";
    let first = train(&server, &["--beta", "0.25", "--title", title]);
    let second = train(
        &server,
        &["--name", "second", "--loss", "ipo", "--seed", "7"],
    );

    // JSON and YAML are the message itself.
    let text = succeed(&server, &["jobs", "get", &first, "--format", "json"]);
    let job: pb::TrainingJob = canonical::from_json(&text).unwrap();
    assert_eq!(job.dpo.as_ref().unwrap().beta, Some(0.25));
    assert_eq!(job.state(), pb::JobState::Succeeded);
    let text = succeed(&server, &["jobs", "get", &first, "--format", "yaml"]);
    assert_eq!(canonical::from_yaml::<pb::TrainingJob>(&text).unwrap(), job);
    assert_eq!(
        succeed(&server, &["jobs", "get", &first, "-o", "yaml"]),
        text
    );
    let all = succeed(
        &server,
        &["jobs", "get", &first, "--format", "yaml", "--all"],
    );
    assert!(
        all.contains("rpo_alpha: null") && !text.contains("rpo_alpha"),
        "{all}"
    );
    let csv = succeed(&server, &["jobs", "list", "--format", "csv"]);
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let header = reader.headers().unwrap().clone();
    let beta = header.iter().position(|h| h == "dpo.beta").unwrap();
    let betas: Vec<String> = reader
        .records()
        .map(|row| row.unwrap()[beta].to_owned())
        .collect();
    assert_eq!(betas, ["0.1", "0.25"]);
    // The old flag and the variable still set the format.
    let old = succeed(&server, &["jobs", "get", &first, "--output", "json"]);
    assert_eq!(canonical::from_json::<pb::TrainingJob>(&old).unwrap(), job);
    let by_variable = command(&server, &["models", "list"])
        .env("BRADLEY_OUTPUT", "yaml")
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&by_variable.stdout).starts_with("- name: models/tiny"));
    let bad_variable = command(&server, &["models", "list"])
        .env("BRADLEY_OUTPUT", "xml")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&bad_variable.stderr);
    assert!(said.contains("'xml' for '--format <FORMAT>'"), "{said}");
    assert!(refused(&server, &["jobs", "list", "--format", "merged"]).contains("table, json"));

    // Names: the beginning of an ID, and the newest.
    let id = first.strip_prefix("trainingJobs/").unwrap();
    let common = id
        .chars()
        .zip(second.strip_prefix("trainingJobs/").unwrap().chars())
        .take_while(|(a, b)| a == b)
        .count();
    let short = &id[..common.max(3) + 1];
    assert_eq!(
        as_json(&server, &["jobs", "get", short])["name"],
        first.as_str()
    );
    let ambiguous = refused(&server, &["jobs", "get", &id[..4]]);
    assert!(
        ambiguous.contains(&first) && ambiguous.contains(&second),
        "{ambiguous}"
    );
    let checkpoints = as_json(&server, &["checkpoints", "list", "@last"]);
    let checkpoint = &checkpoints[0];
    assert_eq!(checkpoint["step"], 3);
    assert_eq!(
        &as_json(&server, &["checkpoints", "get", "@last/checkpoints/3"]),
        checkpoint
    );
    assert_eq!(
        &as_json(&server, &["checkpoints", "get", "@last"]),
        checkpoint
    );
    let model = refused(&server, &["models", "get", "tinny"]);
    assert!(
        model.contains("did you mean models/tiny?") && model.contains("has models/tiny"),
        "{model}"
    );

    // The view for people has the settings.
    let view = succeed(&server, &["jobs", "get", short]);
    for field in [
        "dpo.beta",
        "dpo.losses",
        "optimizer.learning_rate",
        "lora.rank",
        "batch.batch_size",
        "batch.epochs",
        "seed",
        "precision",
    ] {
        assert!(
            view.contains(&format!("│ {field}  ")),
            "{field} is not in\n{view}"
        );
    }
    assert!(
        view.contains(title),
        "the title is cut although there is no terminal:\n{view}"
    );

    // Comparison.
    let diff = as_json(&server, &["jobs", "diff", &first, "@last"]);
    let of = |field: &str| {
        let found = diff
            .as_array()
            .unwrap()
            .iter()
            .find(|d| d["field"] == field);
        found.map(|d| (d["a"].clone(), d["b"].clone()))
    };
    assert_eq!(of("dpo.beta"), Some((json!(0.25), json!(0.1))));
    assert_eq!(of("seed"), Some((json!(42), json!(7))));
    assert_eq!(of("lora.rank"), None);
    let same = succeed(&server, &["jobs", "diff", &first, &first]);
    assert!(same.contains("have the same settings"), "{same}");

    // Names that cannot be one are refused as they were typed.
    let other = refused(&server, &["watch", "@2"]);
    assert!(
        other.contains("@2 names no job: @last is the only"),
        "{other}"
    );
    let other = refused(&server, &["datasets", "get", "@newest"]);
    assert!(other.contains("@newest names no dataset"), "{other}");
    let newest = ["checkpoints", "delete", "@last/checkpoints/latest"];
    let newest = refused(&server, &newest);
    assert!(
        newest.contains("@last/checkpoints/latest: name a step, @last/checkpoints/STEP"),
        "{newest}"
    );

    // Columns.
    let columns = ["jobs", "list", "--columns", "title,beta,lora.rank,steps"];
    assert_eq!(
        as_json(&server, &columns)[0],
        json!({"title": "second", "beta": 0.1, "lora.rank": 4, "steps": "3/3"})
    );
    let wrong = refused(&server, &["jobs", "list", "--columns", "betta"]);
    assert!(wrong.contains("did you mean beta?"), "{wrong}");

    // A choice.
    let chosen = |flags: &[&str]| -> Vec<Value> {
        let list = as_json(&server, &[&["jobs", "list"][..], flags].concat());
        let jobs = list.as_array().unwrap();
        jobs.iter().map(|job| job["name"].clone()).collect()
    };
    assert_eq!(chosen(&[]), [second.as_str(), first.as_str()]);
    assert_eq!(chosen(&["--limit", "1"]), [second.as_str()]);
    assert_eq!(
        chosen(&["--state", "running,succeeded"]),
        [second.as_str(), first.as_str()]
    );
    assert_eq!(
        chosen(&["--state", "queued", "--state", "running"]),
        [""; 0]
    );
    succeed(&server, &["jobs", "update", &first, "--label", "team=a"]);
    assert_eq!(chosen(&["--label", "team=a"]), [first.as_str()]);
    assert_eq!(
        chosen(&["--label", "team=a", "--limit", "1"]),
        [first.as_str()]
    );
    assert_eq!(chosen(&["--label", "team=b"]), [""; 0]);
    let wrong = refused(&server, &["jobs", "list", "--state", "runing"]);
    assert!(
        wrong.contains("[possible values: queued, preparing, running"),
        "{wrong}"
    );

    // Metrics.
    let file = dir.path().join("m.csv");
    succeed(
        &server,
        &["jobs", "metrics", "@last", "--out", file.to_str().unwrap()],
    );
    let written = std::fs::read_to_string(&file).unwrap();
    assert_eq!(written.lines().count(), 4, "{written}");
    assert!(written.starts_with("step,epoch,loss,"), "{written}");
    // A typed format decides, else the name of the file, else the variable.
    let in_file = |name: &str, flags: &[&str]| {
        let file = dir.path().join(name);
        let named = ["jobs", "metrics", "@last", "--out", file.to_str().unwrap()];
        let mut metrics = command(&server, &[&named[..], flags].concat());
        let out = metrics.env("BRADLEY_OUTPUT", "json").output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{name} {flags:?}: {said}");
        std::fs::read_to_string(&file).unwrap()
    };
    assert_eq!(in_file("v.csv", &[]), written);
    assert_eq!(in_file("c.json", &["--format", "csv"]), written);
    assert_eq!(in_file("o.json", &["--output", "csv"]), written);
    let json = in_file("v.txt", &[]);
    assert!(json.starts_with("[\n"), "{json}");
    assert_eq!(in_file("v.json", &[]), json);
    let yaml = in_file("v.yaml", &[]);
    assert!(yaml.contains("step: 1\n"), "{yaml}");
    let table = in_file("t.json", &["--format", "table"]);
    assert!(
        table.starts_with('┌') && table.contains(" loss "),
        "{table}"
    );
    let metrics = as_json(&server, &["jobs", "metrics", "@last"]);
    assert_eq!(metrics[2]["step"], 3);
    assert!(metrics[2]["loss"].is_f64());
    let past = refused(&server, &["jobs", "metrics", "@last", "--after", "100000"]);
    assert!(past.contains("--after is 100000"), "{past}");

    // Terminals.
    for width in [60, 80] {
        for args in [
            &["jobs", "list"][..],
            &["models", "list"],
            &["datasets", "list"],
            &["checkpoints", "list", "@last"],
            &["jobs", "metrics", "@last"],
            &["jobs", "diff", &first, "@last"],
        ] {
            let shown = on_terminal(&server, width, args);
            assert!(
                widest(&shown) <= usize::from(width),
                "{args:?} on {width} columns:\n{shown}"
            );
        }
    }
    let shown = on_terminal(&server, 80, &["jobs", "list"]);
    let listed = shown.lines().nth(3).unwrap();
    let id_in_list = listed.split_whitespace().nth(1).unwrap();
    assert_eq!(
        as_json(&server, &["jobs", "get", id_in_list])["name"],
        second.as_str()
    );
    // The bar shows steps, but those that --tail asks for are lines, too.
    let watched = |args: &[&str]| {
        let (main, of_process) = terminal(80);
        let mut command = command(&server, args);
        command
            .env("TERM", "xterm")
            .stderr(of_process.try_clone().unwrap())
            .stdout(of_process);
        shown_on(main, command)
    };
    let (bar, tail) = (
        watched(&["watch", &first]),
        watched(&["watch", &first, "--tail", "20"]),
    );
    assert!(!bar.contains("step 1/3  loss "), "{bar}");
    assert!(tail.contains("step 1/3  loss "), "{tail}");
    let shown = on_terminal(&server, 80, &["jobs", "get", &first]);
    assert!(shown.contains(&format!("\ntitle: {title}")), "{shown}");

    // Deletion says what it deleted.
    let said = succeed(&server, &["jobs", "delete", short]);
    assert_eq!(said.trim(), format!("deleted {first}"));
    assert_eq!(
        as_json(&server, &["datasets", "delete", "@last"])["deleted"]
            .as_str()
            .map(|name| name.starts_with("datasets/")),
        Some(true)
    );
}

#[test]
fn the_view_of_a_dataset_lists_findings_and_json_has_their_severity() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(
        dir.path(),
        &format!("tiny={}", golden("models/llama").display()),
        &["--drain-timeout", "5"],
    );
    let file = dir.path().join("rows.jsonl");
    let rows = [
        json!({"prompt": "p", "chosen": "a", "rejected": "b"}),
        json!({"prompt": "p", "chosen": "", "rejected": "b"}),
    ];
    std::fs::write(&file, rows.map(|row| row.to_string()).join("\n")).unwrap();
    let path = file.to_str().unwrap();
    let view = succeed(&server, &["datasets", "upload", path, "--title", "mine"]);
    assert!(
        view.contains("row 2: error chosen empty_completion: "),
        "{view}"
    );
    let dataset = as_json(&server, &["datasets", "get", "@last"]);
    let finding = &dataset["report"]["issues"][0];
    assert_eq!(finding["severity"], "ISSUE_SEVERITY_ERROR");
    assert_eq!(
        (&dataset["display_name"], &finding["row"]),
        (&json!("mine"), &json!(2))
    );
}
