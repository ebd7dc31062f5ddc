//! Files of every kind, as people give them to the command line: compressed, several, piped, from
//! the hub, with other columns and with mistakes.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::get;
use serde_json::{Value, json};

use crate::server::Server;
use crate::support::{golden, needed};

fn command(server: &Server, args: &[&str]) -> Command {
    let mut command = Command::new(crate::support::binary());
    command
        .args(args)
        .env_remove("BRADLEY_CONFIG")
        .env("BRADLEY_SERVER", &server.address);
    command
}

fn said(out: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&out.stdout), text(&out.stderr))
}

/// Runs a command that must succeed, and returns its standard output.
fn succeed(server: &Server, args: &[&str]) -> String {
    let out = command(server, args).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", said(&out));
    String::from_utf8(out.stdout).unwrap()
}

/// Runs a command that must fail with exit code 1 or 2, and returns everything that it prints.
fn fail(server: &Server, args: &[&str]) -> String {
    let out = command(server, args).output().unwrap();
    let code = out.status.code();
    assert!(
        matches!(code, Some(1 | 2)),
        "{args:?}: {code:?} {}",
        said(&out)
    );
    said(&out)
}

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn gzip(path: &Path, text: &str) {
    let file = std::fs::File::create(path).unwrap();
    let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap();
}

const CSV: &str = "question,good,bad\n1 + 1?,2,3\n\"2, 3?\",\"2\n3\",4\n";
const COLUMNS: &str = "prompt=question,chosen=good,rejected=bad";

#[test]
fn a_compressed_table_with_other_columns_is_uploaded_trained_on_and_scored() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("pairs");
    gzip(&file, CSV);
    let file = file.to_str().unwrap();
    let upload = [
        "datasets",
        "upload",
        file,
        "--columns",
        COLUMNS,
        "--output",
        "json",
    ];
    let dataset: Value = serde_json::from_str(&succeed(&server, &upload)).unwrap();
    assert_eq!(dataset["report"]["rows"], 2, "{dataset}");
    let train = [
        "train",
        "--data",
        file,
        "--columns",
        COLUMNS,
        "--max-steps",
        "1",
        "--watch",
    ];
    let text = succeed(&server, &train);
    assert!(
        text.contains("2 rows, 2 of them usable") && text.contains("succeeded"),
        "{text}"
    );
    // The second job finds what the first one has converted and uploaded.
    let again = [&train[..7], &["--validate-only"]].concat();
    let text = succeed(&server, &again);
    assert!(
        text.contains("pairs is already stored: datasets/") && text.contains("2 of them usable"),
        "{text}"
    );
    let score = [
        "score",
        "--policy",
        "models/tiny",
        "--output",
        "json",
        "--data",
        file,
    ];
    let scores = lines(&succeed(
        &server,
        &[&score[..], &["--columns", COLUMNS]].concat(),
    ));
    assert_eq!(
        (scores.len(), &scores[1]["row"]),
        (2, &json!(2)),
        "{scores:?}"
    );
    assert!(
        scores[0]["chosen"]["tokens"].as_u64() > Some(0),
        "{scores:?}"
    );
    // The same rows as lines have the same scores.
    let same = dir.path().join("same.jsonl");
    let rows = [("1 + 1?", "2", "3"), ("2, 3?", "2\n3", "4")]
        .map(|(p, c, r)| json!({"prompt": p, "chosen": c, "rejected": r}).to_string());
    std::fs::write(&same, rows.join("\n")).unwrap();
    let score = [&score[..6], &[same.to_str().unwrap()]].concat();
    assert_eq!(lines(&succeed(&server, &score)), scores);
    let mistaken = COLUMNS.replace("good", "goood");
    let text = fail(
        &server,
        &["datasets", "upload", file, "--columns", &mistaken],
    );
    assert!(
        text.contains("no column \"goood\", which --columns chosen=goood names; found: question")
            && text.contains("did you mean good?"),
        "{text}"
    );
}

#[test]
fn several_files_and_standard_input_are_one_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let row = |n: usize| json!({"prompt": format!("{n}?"), "chosen": " a", "rejected": " b"});
    let array = format!("[{},\n {}]", row(1), row(2));
    std::fs::write(dir.path().join("part-1.json"), array).unwrap();
    let bad = "{\"prompt\": \"9?\", \"choosen\": \"a\", \"rejected\": \"b\"}";
    let lines = format!("{}\n{bad}\n", row(3));
    std::fs::write(dir.path().join("part-2.json"), lines).unwrap();
    let pattern = dir.path().join("part-*.json");
    let pattern = pattern.to_str().unwrap();
    let text = fail(&server, &["train", "--data", pattern, "--max-steps", "1"]);
    let finding = "part-2.json, row 2: chosen missing_field: chosen is missing; found: prompt, \
                   choosen, rejected; did you mean chosen instead of choosen?";
    assert_eq!(text.matches(finding).count(), 1, "{text}");
    assert!(
        text.contains("error: 1 of the 4 rows of part-1.json and 1 more cannot be used: correct")
            && text.contains("--skip-bad-rows")
            && !text.contains("row_policy"),
        "{text}"
    );
    let mut child = command(&server, &["datasets", "upload", "-", "--output", "json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let csv = b"prompt;chosen;rejected\n1?; a; b\n2?; c;\n";
    child.stdin.take().unwrap().write_all(csv).unwrap();
    let out = child.wait_with_output().unwrap();
    let dataset: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (&dataset["report"]["rows"], &dataset["report"]["valid_rows"]),
        (&json!(2), &json!(1)),
        "{dataset}"
    );
    let renamed = dir.path().join("renamed.jsonl");
    std::fs::write(&renamed, format!("{bad}\n")).unwrap();
    let text = fail(&server, &["datasets", "upload", renamed.to_str().unwrap()]);
    assert!(
        text.contains("renamed.jsonl: ")
            && text.contains("did you mean chosen instead of choosen?")
            && text.contains("; --columns chosen=NAME reads the column NAME as chosen"),
        "{text}"
    );
    let archive = dir.path().join("pairs.jsonl");
    std::fs::write(&archive, b"PK\x03\x04....").unwrap();
    let text = fail(&server, &["datasets", "upload", archive.to_str().unwrap()]);
    assert!(
        text.contains("pairs.jsonl: is a zip archive or an Excel workbook"),
        "{text}"
    );
}

#[test]
fn standard_input_is_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let train = |more: &[&str]| {
        let args = [&["train", "--data", "-", "--max-steps", "1"], more].concat();
        let mut child = command(&server, &args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A refused command may not read it.
        let _ = child.stdin.take().unwrap().write_all(CSV.as_bytes());
        let out = child.wait_with_output().unwrap();
        (out.status.code(), said(&out))
    };
    let columns = ["--columns", COLUMNS];
    let (code, text) = train(&[&columns[..], &["--seed", "1,2"]].concat());
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(text.matches("2 of them usable").count(), 1, "{text}");
    let (code, text) = train(&[&columns[..], &["--max-length", "64,128"]].concat());
    assert_eq!(code, Some(2), "{text}");
    assert!(
        text.contains("standard input can be read once") && text.contains("write them to a file"),
        "{text}"
    );
    let (code, text) = train(&["--eval-data", "-"]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("can be named once"), "{text}");
}

#[test]
fn a_damaged_file_leaves_no_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("pairs.csv.gz");
    gzip(&file, CSV);
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 9]).unwrap();
    let file = file.to_str().unwrap();
    let text = fail(&server, &["datasets", "upload", file, "--columns", COLUMNS]);
    assert!(
        text.contains(&format!("{file}: ")) && text.contains("gzip data is damaged"),
        "{text}"
    );
    let stored: Value =
        serde_json::from_str(&succeed(&server, &["datasets", "list", "--output", "json"])).unwrap();
    assert_eq!(stored, json!([]));
}

#[test]
fn a_table_without_a_row_to_send_is_refused_before_the_server_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("latin1.csv");
    let refused = |content: &[u8]| {
        std::fs::write(&file, content).unwrap();
        let path = file.to_str().unwrap();
        fail(&server, &["datasets", "upload", path])
    };
    let text = refused(b"prompt,chosen,rejected\n1?,caf\xe9,b\n2?,\xe9,c\n");
    assert!(
        text.contains(
            "latin1.csv: none of its 2 rows can be read, the first one: row 1: chosen is not UTF-8"
        ) && !text.contains("holds no row"),
        "{text}"
    );
    let text = refused(b"prompt,chosen,rejected\n");
    assert!(text.contains("latin1.csv: it holds no row\n"), "{text}");
}

#[test]
fn a_column_of_prompts_with_another_name_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("asked.csv");
    let hint = "--columns prompt=NAME reads the column NAME as prompt";
    let asked = |rows: &str| {
        std::fs::write(&file, format!("question_text,chosen,rejected\n{rows}")).unwrap();
        file.to_str().unwrap()
    };
    // The answers of the first row begin alike, those of the second do not.
    let path = asked("1?,I am,I was\n2?,a,b\n");
    let out = command(&server, &["datasets", "upload", path])
        .output()
        .unwrap();
    let text = said(&out);
    assert!(out.status.success(), "{text}");
    assert!(
        text.contains(&format!("warning: rows have no prompt: {hint}")),
        "{text}"
    );
    let text = fail(&server, &["train", "--data", path, "--max-steps", "1"]);
    assert!(
        text.contains("found: question_text, chosen, rejected")
            && text.contains("if it holds the prompt, rename it to prompt")
            && text.contains(hint),
        "{text}"
    );
    let score = ["score", "--policy", "models/tiny", "--data", path];
    let text = fail(&server, &score);
    assert!(text.contains(&format!("--skip-bad-rows; {hint}")), "{text}");
    let text = fail(&server, &["datasets", "upload", asked("2?,a,b\n")]);
    assert!(
        text.contains("asked.csv: none of the 1 rows") && text.contains(&format!("; {hint}")),
        "{text}"
    );
}

#[test]
fn rows_that_cannot_be_scored_follow_one_rule() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("pairs.jsonl");
    let long = "word ".repeat(200);
    let rows = [
        json!({"prompt": "1?", "chosen": " a", "rejected": " b"}).to_string(),
        "{\"prompt\":".to_owned(),
        json!({"prompt": long, "chosen": " a", "rejected": " b", "id": "long"}).to_string(),
        json!({"prompt": "2?", "chosen": format!(" {long}"), "rejected": " b"}).to_string(),
    ];
    std::fs::write(&file, rows.join("\n")).unwrap();
    let file = file.to_str().unwrap();
    let score = [
        "score",
        "--policy",
        "models/tiny",
        "--max-length",
        "20",
        "--data",
        file,
    ];
    let text = fail(&server, &score);
    assert!(text.contains("2 of 4 rows could not be scored"), "{text}");
    let skip = [&score[..], &["--skip-bad-rows"]].concat();
    let out = command(&server, &skip).output().unwrap();
    let text = said(&out);
    assert!(out.status.success(), "{text}");
    assert!(text.contains("2 of 4 rows were skipped"), "{text}");
    assert!(
        text.contains("2 rows without a score, 1 truncated answer"),
        "{text}"
    );
    let rows = lines(&succeed(
        &server,
        &[&skip[..], &["--output", "json"]].concat(),
    ));
    let errors: Vec<(&Value, bool)> = rows
        .iter()
        .map(|row| (&row["row"], row.get("error").is_some()))
        .collect();
    let (one, two, three, four) = (json!(1), json!(2), json!(3), json!(4));
    assert_eq!(
        errors,
        [(&one, false), (&two, true), (&three, true), (&four, false)]
    );
    assert_eq!((rows[0].get("id"), &rows[2]["id"]), (None, &json!("long")));
    // A file without any usable row fails all the same.
    std::fs::write(dir.path().join("bad.jsonl"), "x\n").unwrap();
    let bad = dir.path().join("bad.jsonl");
    let bad = [
        "score",
        "--policy",
        "models/tiny",
        "--skip-bad-rows",
        "--data",
        bad.to_str().unwrap(),
    ];
    let text = fail(&server, &bad);
    assert!(
        text.contains("1 of 1 rows could not be scored: correct them\n"),
        "{text}"
    );
    // Rows of several answers are for another command.
    let several = json!({"prompt": "1?", "completions": [" a", " b"]});
    std::fs::write(dir.path().join("bad.jsonl"), several.to_string()).unwrap();
    let text = fail(&server, &bad);
    assert!(
        text.contains("rows with completions are for bradley score-files"),
        "{text}"
    );
}

const COMMIT: &str = "0123456789012345678901234567890123456789";

/// Serves a data set of one configuration with two splits, as the hub does.
async fn hub(served: Arc<AtomicUsize>) -> String {
    let info = || async {
        let files =
            ["README.md", "math/train.csv", "math/test.csv"].map(|file| json!({"rfilename": file}));
        json!({"sha": COMMIT, "siblings": files}).to_string()
    };
    let file = move |headers: HeaderMap| {
        let served = served.clone();
        async move {
            let bytes = CSV.as_bytes();
            let range = headers
                .get("range")
                .and_then(|v| v.to_str().ok())
                .unwrap_or_default();
            if range != "bytes=0-0" {
                served.fetch_add(1, Ordering::Relaxed);
            }
            let range = range
                .trim_start_matches("bytes=")
                .split_once('-')
                .unwrap_or(("0", ""));
            let from: usize = range.0.parse().unwrap_or(0);
            let to = range
                .1
                .parse()
                .unwrap_or(bytes.len() - 1)
                .min(bytes.len() - 1);
            let headers = [
                ("x-repo-commit", COMMIT.to_owned()),
                ("etag", "\"train\"".to_owned()),
                (
                    "content-range",
                    format!("bytes {from}-{to}/{}", bytes.len()),
                ),
                ("accept-ranges", "bytes".to_owned()),
            ];
            (
                StatusCode::PARTIAL_CONTENT,
                headers,
                bytes[from..=to].to_vec(),
            )
                .into_response()
        }
    };
    let router = Router::new()
        .route("/api/datasets/team/pairs/revision/{revision}", get(info))
        .route(
            "/datasets/team/pairs/resolve/{revision}/math/train.csv",
            get(file),
        );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    endpoint
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_set_on_the_hub_is_downloaded_once() {
    let served = Arc::<AtomicUsize>::default();
    let endpoint = hub(served.clone()).await;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let cache = dir.path().join("cache");
    let upload = |id: &str| {
        let args = [
            "datasets",
            "upload",
            id,
            "--columns",
            COLUMNS,
            "--output",
            "json",
        ];
        let mut command = command(&server, &args);
        command
            .env("HF_ENDPOINT", &endpoint)
            .env("HF_HUB_CACHE", &cache)
            .env_remove("HF_HUB_OFFLINE");
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    let out = upload("hf://datasets/team/pairs").await.unwrap();
    assert!(!out.status.success());
    let text = said(&out);
    assert!(
        text.contains("several parts: math/test, math/train")
            && text.contains("hf://datasets/team/pairs/math/test"),
        "{text}"
    );
    for _ in 0..2 {
        let out = upload("hf://datasets/team/pairs/math/train").await.unwrap();
        assert!(out.status.success(), "{}", said(&out));
        let dataset: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(dataset["report"]["rows"], 2, "{dataset}");
    }
    assert_eq!(
        served.load(Ordering::Relaxed),
        1,
        "the second time comes from the cache"
    );
}

#[test]
#[ignore = "needs Python with datasets and pandas (BRADLEY_TEST_PYTHON)"]
fn what_datasets_and_pandas_write_is_read() {
    let python = needed("BRADLEY_TEST_PYTHON");
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let script = r#"
import json, sys
import datasets, pandas
rows = [json.loads(line) for line in open(sys.argv[1])]
data = datasets.Dataset.from_list(rows)
data.save_to_disk(sys.argv[2] + "/saved", num_shards=2)
datasets.DatasetDict({"train": data}).save_to_disk(sys.argv[2] + "/dict")
data.to_parquet(sys.argv[2] + "/rows.parquet")
frame = pandas.DataFrame(rows)
frame.to_json(sys.argv[2] + "/rows.json.gz", orient="records")
for column in ["prompt", "chosen", "rejected"]:
    frame[column] = frame[column].map(json.dumps)
frame.to_csv(sys.argv[2] + "/rows.csv.gz", index=False)
"#;
    let rows = golden("pairs.jsonl");
    let made = Command::new(python)
        .args([
            "-c",
            script,
            rows.to_str().unwrap(),
            dir.path().to_str().unwrap(),
        ])
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", dir.path().join("hf"))
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", said(&made));
    let score = |file: &Path| {
        let args = [
            "score",
            "--policy",
            "models/tiny",
            "--output",
            "json",
            "--data",
        ];
        lines(&succeed(
            &server,
            &[&args[..], &[file.to_str().unwrap()]].concat(),
        ))
    };
    let expected = score(&rows);
    assert_eq!(expected.len(), 6);
    for name in [
        "saved",
        "dict",
        "rows.parquet",
        "rows.json.gz",
        "rows.csv.gz",
    ] {
        assert_eq!(score(&dir.path().join(name)), expected, "{name}");
    }
}
