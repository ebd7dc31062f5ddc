//! `bradley score-files`: scores are those of ScorePairs bit for bit, every row is written once
//! whatever is killed, and nothing of one run is mixed with another.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bradley::rpc::client::{Client, Target};
use bradley::rpc::pb;
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::record::Field;
use parquet::schema::parser::parse_message_type;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Map, Value, json};

use crate::attacks::{Column, peak_kib, peak_kib_while_running};
use crate::backends::{Fault, Proxy, S3, signal};
use crate::refusing_server::RefusingServer;
use crate::server::{Server, create, finish, free_port, job, upload};
use crate::support::{copy_files, golden, perturb_weights};
use crate::wait::until_blocking;

/// Time limit for a command.
const LIMIT: Duration = Duration::from_secs(240);

/// Returns the `--models` flag for a tuned copy of the tiny model, and the tiny model.
fn models(dir: &Path) -> String {
    let (base, tuned) = (golden("models/llama"), dir.join("tuned"));
    if !tuned.exists() {
        std::fs::create_dir(&tuned).unwrap();
        copy_files(&base, &tuned);
        perturb_weights(tuned.join("model.safetensors"));
    }
    format!("tuned={},base={}", tuned.display(), base.display())
}

const WEIGHTS: [&str; 4] = ["--policy", "models/tuned", "--reference", "models/base"];

/// Returns `score-files` of inputs to a folder, against a server.
fn command(server: &str, input: &str, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(crate::support::binary());
    command
        .args(["score-files", "--in", input, "--out"])
        .arg(out)
        .args(more)
        .env_remove("BRADLEY_CONFIG")
        .env_remove("JOB_COMPLETION_INDEX")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // Beside --models only the variable may name a server, which is not used.
    match more.contains(&"--models") {
        true => command.env("BRADLEY_SERVER", server),
        false => command.args(["--server", server]),
    };
    command
}

fn said(out: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&out.stdout), text(&out.stderr))
}

fn succeed(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", said(&out));
    said(&out)
}

/// Runs a command that must fail with this exit code, and returns everything that it prints.
fn fail(command: &mut Command, code: i32) -> String {
    let out = command.output().unwrap();
    assert_eq!(out.status.code(), Some(code), "{command:?}: {}", said(&out));
    said(&out)
}

/// Returns the files below a folder, without those that begin with an underscore.
fn parts(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    files(folder)
        .into_iter()
        .filter(|(name, _)| !name.starts_with('_'))
        .collect()
}

/// Returns the number of these files, which are not read.
fn part_count(folder: &Path) -> usize {
    let names = file_names(folder);
    names.iter().filter(|name| !name.starts_with('_')).count()
}

/// Returns all files below a folder that another process may be writing to.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |name: String| {
        let content = std::fs::read(folder.join(&name)).ok()?;
        Some((name, content))
    };
    file_names(folder).into_iter().filter_map(read).collect()
}

/// Returns the paths of these files, relative to the folder.
fn file_names(folder: &Path) -> Vec<String> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(at) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&at) else {
            continue;
        };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap();
                found.push(name.to_owned());
            }
        }
    }
    found
}

fn json_of(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(x) => json!(x),
        Field::Int(x) => json!(x),
        Field::Long(x) => json!(x),
        Field::Double(x) => json!(x),
        Field::Str(x) => json!(x),
        Field::ListInternal(list) => list.elements().iter().map(json_of).collect(),
        other => panic!("an unexpected value: {other:?}"),
    }
}

/// Returns the rows of all parts in the order of their names.
fn rows(folder: &Path) -> Vec<Map<String, Value>> {
    let parts = parts(folder).into_iter();
    parts
        .flat_map(|(name, content)| rows_of(&name, content))
        .collect()
}

/// Returns the rows of a part.
fn rows_of(name: &str, content: Vec<u8>) -> Vec<Map<String, Value>> {
    if name.ends_with(".jsonl") {
        let text = String::from_utf8(content).unwrap();
        let lines = text.lines();
        return lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
    }
    let file = SerializedFileReader::new(bytes::Bytes::from(content)).unwrap();
    let mut rows = Vec::new();
    for row in file.get_row_iter(None).unwrap() {
        let row = row.unwrap();
        let cells = row.get_column_iter();
        rows.push(cells.map(|(name, f)| (name.clone(), json_of(f))).collect());
    }
    rows
}

fn manifest(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("_manifest.json")).unwrap()).unwrap()
}

/// Returns pairs of which every fourth shares its prompt with others.
fn pairs(count: usize) -> Vec<Value> {
    let pair = |i: usize| {
        let prompt = if i.is_multiple_of(4) { 0 } else { i };
        json!({
            "id": format!("pair-{i}"),
            "prompt": format!("Question {prompt}: what is {prompt} + 1?"),
            "chosen": format!(" It is {}.", prompt + 1),
            "rejected": " I do not know; ask someone else".repeat(1 + i % 3),
            "source": {"page": i},
        })
    };
    (0..count).map(pair).collect()
}

/// Returns pairs of few tokens, for runs of many rows.
fn short_pairs(numbers: Range<usize>) -> Vec<Value> {
    let pair = |i: usize| {
        json!({
            "id": format!("pair-{i}"),
            "prompt": format!("{i}+1="),
            "chosen": (i + 1).to_string(),
            "rejected": "no",
            "source": {"page": i},
        })
    };
    numbers.map(pair).collect()
}

fn write_lines(path: &Path, rows: &[Value]) {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    std::fs::write(path, lines.join("\n") + "\n").unwrap();
}

/// Writes text columns and a column `page` of numbers, in row groups of 50 rows.
fn write_parquet(path: &Path, rows: &[Value]) {
    let schema = "message rows { optional binary id (UTF8); optional binary prompt (UTF8); \
                  optional binary chosen (UTF8); optional binary rejected (UTF8); required \
                  int64 page; }";
    let schema = parse_message_type(schema).unwrap().into();
    let file = std::fs::File::create(path).unwrap();
    let properties = WriterProperties::builder().build().into();
    let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
    for group in rows.chunks(50) {
        let mut columns = writer.next_row_group().unwrap();
        for name in ["id", "prompt", "chosen", "rejected"] {
            let text = |row: &Value| Some(ByteArray::from(row[name].as_str()?.as_bytes().to_vec()));
            let cells: Vec<Option<ByteArray>> = group.iter().map(text).collect();
            let levels: Vec<i16> = cells.iter().map(|c| i16::from(c.is_some())).collect();
            let values: Vec<ByteArray> = cells.into_iter().flatten().collect();
            let mut column = columns.next_column().unwrap().unwrap();
            let typed = column.typed::<ByteArrayType>();
            typed.write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        let pages: Vec<i64> = group
            .iter()
            .map(|r| r["source"]["page"].as_i64().unwrap())
            .collect();
        let mut column = columns.next_column().unwrap().unwrap();
        column
            .typed::<Int64Type>()
            .write_batch(&pages, None, None)
            .unwrap();
        column.close().unwrap();
        columns.close().unwrap();
    }
    writer.close().unwrap();
}

fn plain(text: &Value) -> Option<pb::Text> {
    let text = text.as_str().unwrap().to_owned();
    Some(pb::Text {
        form: Some(pb::text::Form::Plain(text)),
    })
}

fn options() -> Option<pb::ScoringOptions> {
    Some(pb::ScoringOptions {
        policy: "models/tuned".into(),
        reference: "models/base".into(),
        ..Default::default()
    })
}

/// Scores pairs by ScorePairs.
async fn expected(client: &Client, rows: &[Value]) -> Vec<pb::PairScore> {
    let pair = |row: &Value| pb::Pair {
        prompt: plain(&row["prompt"]),
        a: plain(&row["chosen"]),
        b: plain(&row["rejected"]),
        ..Default::default()
    };
    let request = pb::ScorePairsRequest {
        options: options(),
        pairs: rows.iter().map(pair).collect(),
    };
    let answer = client.scoring().score_pairs(request).await.unwrap();
    let results = answer.into_inner().results.into_iter();
    results
        .map(|result| match result.result.unwrap() {
            pb::pair_result::Result::Score(score) => score,
            pb::pair_result::Result::Error(e) => panic!("{}", e.message),
        })
        .collect()
}

fn assert_is_score(row: &Map<String, Value>, score: &pb::PairScore) {
    let (a, b) = (score.a.as_ref().unwrap(), score.b.as_ref().unwrap());
    for (column, number) in [
        ("probability", score.probability),
        ("margin", score.margin),
        ("policy_logprob_a", a.policy_logprob),
        ("policy_logprob_b", b.policy_logprob),
        ("reference_logprob_a", a.reference_logprob),
        ("reference_logprob_b", b.reference_logprob),
        ("reward_a", a.reward),
        ("reward_b", b.reward),
    ] {
        let found = row[column].as_f64().unwrap();
        assert_eq!(found.to_bits(), number.to_bits(), "{column} of {row:?}");
    }
    assert_eq!(
        (&row["tokens_a"], &row["tokens_b"]),
        (&json!(a.tokens), &json!(b.tokens))
    );
    assert_eq!(row["truncated"], json!(a.truncated || b.truncated));
    assert_eq!(row["error"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_of_every_format_are_those_of_score_pairs_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    let all = pairs(70);
    std::fs::create_dir_all(at("in/a")).unwrap();
    // Log-probs of other models, which nobody has asked for.
    let mut logged = all.clone();
    for row in &mut logged {
        for (column, sum) in [
            ("ref_chosen_logps", -1.0),
            ("ref_rejected_logps", -2.0),
            ("chosen_logps", -3.0),
            ("rejected_logps", -4.0),
        ] {
            row[column] = json!(sum);
        }
    }
    write_lines(&at("in/a/x.jsonl"), &logged);
    write_parquet(&at("in/a/y.parquet"), &all);
    let text = std::fs::read(at("in/a/x.jsonl")).unwrap();
    let file = std::fs::File::create(at("in/z.jsonl.gz")).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    gzip.write_all(&text).unwrap();
    gzip.finish().unwrap();
    let zstd = zstd::encode_all(&text[..], 1).unwrap();
    std::fs::write(at("in/z.jsonl.zst"), zstd).unwrap();
    let scores = expected(&server.client().await, &all).await;
    let pattern = at("in/**/*.*");
    let run = |out: &Path, more: &[&str]| {
        let fixed = ["--part-rows", "32"];
        let args = [&WEIGHTS[..], &fixed, more].concat();
        let pattern = pattern.to_str().unwrap();
        succeed(&mut command(&server.address, pattern, out, &args))
    };
    let text = run(&at("out"), &["--carry", "source,prompt"]);
    assert!(
        text.contains("complete: 12 parts, 280 rows, 0 with an error"),
        "{text}"
    );
    let written = rows(&at("out"));
    let inputs = ["a/x.jsonl", "a/y.parquet", "z.jsonl.gz", "z.jsonl.zst"];
    assert_eq!(written.len(), inputs.len() * all.len());
    for (at, row) in written.iter().enumerate() {
        let (input, i) = (inputs[at / all.len()], at % all.len());
        assert_eq!((&row["input"], &row["row"]), (&json!(input), &json!(i + 1)));
        assert_eq!(
            (&row["id"], &row["prompt"]),
            (&all[i]["id"], &all[i]["prompt"])
        );
        let source = match input {
            "a/y.parquet" => Value::Null,
            _ => json!(all[i]["source"].to_string()),
        };
        assert_eq!(row["source"], source);
        assert_is_score(row, &scores[i]);
    }
    let manifest = manifest(&at("out"));
    assert_eq!(
        (&manifest["rows"], &manifest["errors"]),
        (&json!(280), &json!(0))
    );
    assert_eq!(manifest["parts"].as_array().unwrap().len(), 12);
    assert_eq!(manifest["run"]["weights"]["policy"], json!("models/tuned"));
    let misspelt = run(&at("misspelt"), &["--carry", "sorce,prompt"]);
    assert!(
        misspelt.contains("a value in the column \"sorce\" of --carry; found: id, prompt, chosen,")
            && misspelt.contains("did you mean source?"),
        "{misspelt}"
    );
    assert_eq!(misspelt.matches("warning: ").count(), 1, "{misspelt}");
    // Nothing is left to do.
    assert!(run(&at("out"), &["--carry", "source,prompt"]).contains("0 parts with 0 rows written"));
    // JSON lines carry a number of a Parquet file as a number.
    run(&at("jsonl"), &["--format", "jsonl", "--carry", "page"]);
    let lines = rows(&at("jsonl"));
    assert_eq!(lines.len(), written.len());
    for (i, row) in lines.iter().enumerate() {
        assert_is_score(row, &scores[i % all.len()]);
    }
    assert_eq!(lines[all.len() + 7]["page"], json!(7));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_rows_keep_their_place_and_several_answers_are_ranked() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    let good = pairs(3);
    let answers = json!([" one", " two, or three", " none"]);
    let lines = [
        good[0].to_string(),
        "{\"prompt\": \"cut off".to_owned(),
        String::new(),
        json!({"id": 7, "prompt": "p", "chosen": " a"}).to_string(),
        json!({"prompt": "p", "completions": answers, "id": "n"}).to_string(),
        json!({"prompt": "p", "chosen": "", "rejected": ""}).to_string(),
        json!({"prompt": "p", "chosen": " one", "rejected": [" two, or three", " none"]})
            .to_string(),
        json!({"prompt": "p ".repeat(40_000), "chosen": " a", "rejected": " b"}).to_string(),
        json!({"prompt": "p", "completions": []}).to_string(),
        good[1].to_string(),
    ];
    std::fs::write(at("x.jsonl"), lines.join("\n")).unwrap();
    let input = at("x.jsonl");
    let args = [
        &WEIGHTS[..],
        &["--part-rows", "4", "--max-length", "200000"],
    ]
    .concat();
    succeed(&mut command(
        &server.address,
        input.to_str().unwrap(),
        &at("out"),
        &args,
    ));
    let rows = rows(&at("out"));
    let numbers: Vec<&Value> = rows.iter().map(|row| &row["row"]).collect();
    assert_eq!(
        numbers,
        [1, 2, 4, 5, 6, 7, 8, 9, 10]
            .map(|n| json!(n))
            .iter()
            .collect::<Vec<_>>()
    );
    let error = |at: usize| rows[at]["error"].as_str().unwrap_or_default();
    assert!(error(1).contains("JSON"), "{}", error(1));
    assert!(error(2).contains("rejected is missing"), "{}", error(2));
    assert_eq!(rows[2]["id"], json!("7"));
    // An empty answer is the end of a text, which has a probability.
    assert_eq!(rows[4]["probability"], json!(0.5));
    for at in [6, 7] {
        assert!(!error(at).is_empty(), "{:?}", rows[at]);
        assert_eq!(rows[at]["probability"], Value::Null);
    }
    assert!(error(7).contains("1 to 256"), "{}", error(7));
    let client = server.client().await;
    let scores = expected(&client, &good[..2]).await;
    assert_is_score(&rows[0], &scores[0]);
    assert_is_score(&rows[8], &scores[1]);
    let request = pb::ScoreCompletionsRequest {
        options: options().map(|o| pb::ScoringOptions {
            max_length: Some(200_000),
            ..o
        }),
        prompt: plain(&json!("p")),
        completions: answers
            .as_array()
            .unwrap()
            .iter()
            .filter_map(plain)
            .collect(),
    };
    let ranked = client
        .scoring()
        .score_completions(request)
        .await
        .unwrap()
        .into_inner();
    for row in [&rows[3], &rows[5]] {
        let rewards: Vec<f64> = row["rewards"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_f64)
            .collect();
        for (at, result) in ranked.results.iter().enumerate() {
            let Some(pb::completion_result::Result::Score(score)) = &result.result else {
                panic!("{result:?}")
            };
            assert_eq!(rewards[at].to_bits(), score.reward.to_bits());
        }
        let best = ranked.ranking[0] as usize;
        assert_eq!(
            (&row["ranks"][best], &row["error"]),
            (&json!(1), &Value::Null)
        );
    }
    assert_eq!(manifest(&at("out"))["errors"], json!(4));
}

/// Renames columns of rows.
fn renamed(rows: &[Value], names: &[(&str, &str)]) -> Vec<Value> {
    let mut rows = rows.to_vec();
    for fields in rows.iter_mut().filter_map(Value::as_object_mut) {
        for (from, to) in names {
            let value = fields.remove(*from).unwrap();
            fields.insert((*to).to_owned(), value);
        }
    }
    rows
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_are_mapped_and_logged_log_probs_are_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    let all = pairs(20);
    let scores = expected(&server.client().await, &all).await;
    std::fs::create_dir(at("in")).unwrap();
    let names = [
        ("prompt", "asked"),
        ("chosen", "good"),
        ("rejected", "chosen"),
    ];
    let mut lines = renamed(&all, &names);
    // Log-probs of another tool. If they were used, neither model would be asked.
    for row in &mut lines {
        for column in ["ref_chosen_logps", "ref_rejected_logps"] {
            row[column] = json!(-1.0);
        }
        (row["chosen_logps"], row["rejected_logps"]) = (json!(-2.0), json!(-3.0));
    }
    write_lines(&at("in/x.jsonl"), &lines);
    // Here `rejected` has the prompts, `prompt` the chosen answers and `chosen` the rejected ones.
    let names = [
        ("prompt", "x"),
        ("chosen", "prompt"),
        ("rejected", "chosen"),
    ];
    let rotated = renamed(&renamed(&all, &names), &[("x", "rejected")]);
    write_parquet(&at("in/y.parquet"), &rotated);
    let run = |input: &str, out: &str, more: &[&str]| {
        let (input, out) = (at(input), at(out));
        let args = [&WEIGHTS[..], more].concat();
        command(&server.address, input.to_str().unwrap(), &out, &args)
    };
    let of_lines = "prompt=asked,chosen=good,rejected=chosen";
    let flags = ["--columns", of_lines, "--carry", "good,chosen"];
    succeed(&mut run("in/x.jsonl", "lines", &flags));
    let of_parquet = "prompt=rejected,chosen=prompt,rejected=chosen";
    let flags = ["--columns", of_parquet, "--carry", "prompt,chosen"];
    succeed(&mut run("in/y.parquet", "parquet", &flags));
    for (folder, good) in [("lines", "good"), ("parquet", "prompt")] {
        let rows = rows(&at(folder));
        assert_eq!(rows.len(), all.len());
        for ((row, score), pair) in rows.iter().zip(&scores).zip(&all) {
            assert_is_score(row, score);
            assert_eq!((&row["id"], &row[good]), (&pair["id"], &pair["chosen"]));
            assert_eq!(row["chosen"], pair["rejected"]);
        }
    }
    // Messages have the names of the input, and the mapping is a part of the run.
    let text = fail(
        &mut run("in/x.jsonl", "lines", &["--columns", "prompt=asked"]),
        2,
    );
    assert!(text.contains("--columns (there: "), "{text}");
    let flags = ["--columns", "prompt=asked,chosen=good,rejected=none"];
    succeed(&mut run("in/x.jsonl", "none", &flags));
    let error = rows(&at("none"))[0]["error"].to_string();
    assert!(error.contains("none is missing"), "{error}");
    let text = fail(
        &mut run("in/y.parquet", "no", &["--columns", "chosen=none"]),
        1,
    );
    assert!(
        text.contains("no column \"none\", which stands for chosen; found: id, prompt"),
        "{text}"
    );
    let text = fail(
        &mut run("in/x.jsonl", "no", &["--columns", "good=chosen"]),
        2,
    );
    assert!(text.contains("did you mean chosen=good?"), "{text}");
}

/// Returns the lines that `bradley score` prints as JSON for the rows of a file.
fn printed(server: &str, input: &str, more: &[&str]) -> Vec<Value> {
    let out = Command::new(crate::support::binary())
        .args(["score", "--server", server, "--format", "json"])
        .args(["--data", input])
        .args(more)
        .env_remove("BRADLEY_CONFIG")
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", said(&out));
    let text = String::from_utf8(out.stdout).unwrap();
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn logged_log_probs_give_the_scores_that_score_prints() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let models = models(dir.path());
    let server = Server::start_with(&at("data"), &models, &[]);
    let mut all = pairs(40);
    let scores = expected(&server.client().await, &all).await;
    // Log-probs that none of the models gives.
    for (row, score) in all.iter_mut().zip(&scores) {
        let (a, b) = (score.a.as_ref().unwrap(), score.b.as_ref().unwrap());
        row["theirs"] = json!(a.reference_logprob * 1.5);
        row["ref_rejected_logps"] = json!(b.reference_logprob * 0.5);
        row["chosen_logps"] = json!(a.policy_logprob * 0.5);
        row["rejected_logps"] = json!(b.policy_logprob * 1.5);
    }
    write_lines(&at("x.jsonl"), &all);
    let input = at("x.jsonl");
    let input = input.to_str().unwrap();
    let mapped = "ref_chosen_logps=theirs";
    let policy = ["--policy", "models/tuned", "--columns", mapped];
    for logged in ["reference", "both"] {
        let args = [&policy[..], &["--logged", logged]].concat();
        let text = succeed(&mut command(&server.address, input, &at(logged), &args));
        // The policy is not compared with itself.
        assert!(!text.contains("warning: "), "{text}");
        let lines = printed(&server.address, input, &args);
        let written = rows(&at(logged));
        assert_eq!((written.len(), lines.len()), (all.len(), all.len()));
        for (i, row) in written.iter().enumerate() {
            for (column, place) in [
                ("probability", "/probability"),
                ("margin", "/margin"),
                ("policy_logprob_a", "/chosen/policy_logprob"),
                ("policy_logprob_b", "/rejected/policy_logprob"),
                ("reference_logprob_a", "/chosen/reference_logprob"),
                ("reference_logprob_b", "/rejected/reference_logprob"),
                ("reward_a", "/chosen/reward"),
                ("reward_b", "/rejected/reward"),
                ("tokens_a", "/chosen/tokens"),
                ("tokens_b", "/rejected/tokens"),
            ] {
                let found = lines[i].pointer(place);
                assert_eq!(Some(&row[column]), found, "{column} of {row:?}");
            }
            assert_eq!(row["reference_logprob_a"], all[i]["theirs"]);
            assert_ne!(row["margin"], json!(scores[i].margin));
            assert_eq!(row["error"], Value::Null);
        }
        assert_eq!(manifest(&at(logged))["run"]["logged"], json!(logged));
    }
    // Runs with other log-probs, or without any, do not continue this one.
    let mut without = command(&server.address, input, &at("both"), &policy);
    let text = fail(&mut without, 2);
    let difference = "--logged (there: both, here: none)";
    assert!(text.contains(difference), "{text}");
    // The own engine is the same service.
    let own = ["--logged", "both", "--models", &models, "--device", "cpu"];
    let args = [&policy[..], &own].concat();
    succeed(&mut command("http://127.0.0.1:1", input, &at("own"), &args));
    assert_eq!(rows(&at("own")), rows(&at("both")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_reference_checks_some_of_the_logged_rows() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    let mut all = pairs(200);
    let scores = expected(&server.client().await, &all).await;
    let run = |name: &str, rows: &[Value]| {
        write_lines(&at(name), rows);
        let args = [&WEIGHTS[..], &["--logged", "reference"]].concat();
        let input = at(name);
        let out = at(&format!("{name}-scored"));
        succeed(&mut command(
            &server.address,
            input.to_str().unwrap(),
            &out,
            &args,
        ));
        out
    };
    for (row, score) in all.iter_mut().zip(&scores) {
        let (a, b) = (score.a.as_ref().unwrap(), score.b.as_ref().unwrap());
        row["ref_chosen_logps"] = json!(a.reference_logprob);
        row["ref_rejected_logps"] = json!(b.reference_logprob);
    }
    for (row, score) in rows(&run("right.jsonl", &all)).iter().zip(&scores) {
        assert_is_score(row, score);
    }
    for row in &mut all {
        row["ref_chosen_logps"] = json!(row["ref_chosen_logps"].as_f64().unwrap() - 1.0);
    }
    let written = rows(&run("wrong.jsonl", &all));
    let errors: Vec<&str> = written
        .iter()
        .filter_map(|row| row["error"].as_str())
        .collect();
    assert!((1..100).contains(&errors.len()), "{} of 200", errors.len());
    for error in errors {
        assert!(
            error.starts_with("ref_chosen_logps is -")
                && error.contains("but --reference gives -")
                && error.contains("1.0000 nats apart"),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_without_usable_log_probs_has_an_error_that_names_the_column() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    let line = |columns: &[(&str, f64)]| {
        let mut row = pairs(2).remove(1);
        for (column, sum) in columns {
            row[*column] = json!(sum);
        }
        row
    };
    let lines = [
        line(&[("theirs", -1.5), ("ref_rejected_logps", -2.0)]),
        line(&[("ref_rejected_logps", -2.0)]),
        line(&[]),
        line(&[("theirs", 0.5), ("ref_rejected_logps", -2.0)]),
        json!({"prompt": "p", "completions": [" a", " b"]}),
    ];
    write_lines(&at("x.jsonl"), &lines);
    let of_lines = [
        "theirs is missing, but the row has ref_rejected_logps",
        "theirs and ref_rejected_logps are missing",
        "theirs is 0.5: a log-prob is a finite number",
        "--logged takes rows with one chosen and one rejected answer",
    ];
    let text = |texts: [&'static str; 3]| Column::Text(texts.map(Some).to_vec());
    let columns = vec![
        text(["1 2", "2 3", "3 4"]),
        text([" 3", " 4", " 5"]),
        text([" 0"; 3]),
        Column::Float(vec![Some(-1.5), Some(f32::NAN), None]),
        Column::Double(vec![Some(-3.5), Some(-1.0), None]),
    ];
    let schema = "required binary prompt (UTF8); required binary chosen (UTF8);
                  required binary rejected (UTF8); optional float theirs;
                  optional double ref_rejected_logps;";
    crate::attacks::write_parquet(&at("y.parquet"), schema, columns);
    let of_records = [
        "theirs is \"NaN\": it must be one number",
        "theirs and ref_rejected_logps are missing",
    ];
    let mapped = ["--columns", "ref_chosen_logps=theirs"];
    let args = [&WEIGHTS[..2], &mapped, &["--logged", "reference"]].concat();
    for (input, expected) in [("x.jsonl", &of_lines[..]), ("y.parquet", &of_records[..])] {
        let (file, out) = (at(input), at(&format!("{input}-scored")));
        let file = file.to_str().unwrap();
        let text = succeed(&mut command(&server.address, file, &out, &args));
        let warning = format!("the first error is in row 2 of {input}: {}", expected[0]);
        assert!(text.contains(&warning), "{text}");
        let written = rows(&out);
        assert_eq!(written.len(), expected.len() + 1);
        assert_eq!(written[0]["error"], Value::Null);
        assert_eq!(written[0]["reference_logprob_a"], json!(-1.5));
        for (row, expected) in written[1..].iter().zip(expected) {
            let error = row["error"].as_str().unwrap();
            assert!(error.starts_with(*expected), "{error}");
            assert_eq!(row["probability"], Value::Null);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_error_of_the_rows_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    let all = pairs(3);
    let names = [("chosen", "good"), ("rejected", "bad")];
    write_lines(&at("other.jsonl"), &renamed(&all, &names));
    let mut mixed = all;
    mixed[1] = json!({"prompt": "p", "chosen": " a"});
    write_lines(&at("mixed.jsonl"), &mixed);
    let run = |input: &str, out: &str| {
        let (input, out) = (at(input), at(out));
        let input = input.to_str().unwrap();
        succeed(&mut command(&server.address, input, &out, &WEIGHTS))
    };
    let text = run("other.jsonl", "none");
    let pointer = format!("the column error of the parts in {}", at("none").display());
    for expected in [
        "complete: 1 part, 3 rows, 3 with an error; see _manifest.json",
        pointer.as_str(),
        "warning: none of the rows that were written has a score; the first error is in row 1 of \
         other.jsonl: chosen is missing",
        "--columns chosen=NAME",
    ] {
        assert!(text.contains(expected), "{expected} is missing: {text}");
    }
    assert_eq!(text.matches("warning: ").count(), 1, "{text}");
    // Nothing is left to do, and the errors are still there.
    assert!(run("other.jsonl", "none").contains(&pointer));
    let text = run("mixed.jsonl", "some");
    assert!(
        text.contains(
            "warning: 1 row has an error; the first error is in row 2 of mixed.jsonl: rejected is \
             missing"
        ) && !text.contains("--columns"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn several_chosen_answers_are_ranked_with_the_rejected_ones() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    let lines = [
        json!({"prompt": "p", "chosen": [" one", " two"], "rejected": [" three", " 4", " 5"]}),
        json!({"prompt": "p", "completions": [" one", " two", " three", " 4", " 5"]}),
    ];
    write_lines(&at("x.jsonl"), &lines);
    let input = at("x.jsonl");
    let input = input.to_str().unwrap();
    succeed(&mut command(&server.address, input, &at("out"), &WEIGHTS));
    let rows = rows(&at("out"));
    assert_eq!(rows[0]["rewards"].as_array().unwrap().len(), 5);
    assert_eq!(rows[0]["rewards"], rows[1]["rewards"]);
    assert_eq!(rows[0]["ranks"], rows[1]["ranks"]);
}

/// Returns the command of one of two shards.
fn shard_command(server: &str, input: &str, out: &Path, flags: &[&str], shard: usize) -> Command {
    let mut command = command(server, input, out, &[&WEIGHTS[..], flags].concat());
    command
        .env("JOB_COMPLETION_INDEX", shard.to_string())
        .env("JOB_COMPLETIONS", "2");
    command
}

/// Two shards as processes that write into the same output.
struct TwoShards<'a> {
    /// Returns the command of a shard.
    command: &'a dyn Fn(usize) -> Command,
    /// Counts the parts that are written.
    written: Arc<dyn Fn() -> usize + Send + Sync>,
    /// Number of parts of the whole output.
    parts: usize,
}

impl<'a> TwoShards<'a> {
    fn of_folder(command: &'a dyn Fn(usize) -> Command, out: &Path, parts: usize) -> Self {
        let out = out.to_owned();
        TwoShards {
            command,
            written: Arc::new(move || part_count(&out)),
            parts,
        }
    }

    fn start(&self) -> [Option<Child>; 2] {
        [0, 1].map(|shard| Some(self.spawn(shard)))
    }

    fn spawn(&self, shard: usize) -> Child {
        (self.command)(shard).spawn().unwrap()
    }

    /// Waits until `holds` returns true. Each part has the whole time limit.
    fn until(&self, mut holds: impl FnMut() -> bool) {
        while !holds() {
            let before = (self.written)();
            until_blocking("a further part", LIMIT, || {
                holds() || (self.written)() > before
            });
        }
    }

    /// Runs both shards to their end. Returns the peak memory of each in KiB: when a quarter of the
    /// parts was written, and at its end.
    fn peaks(&self) -> ([u64; 2], [u64; 2]) {
        let mut shards = self.start();
        let (mut early, mut last) = (None, [0; 2]);
        self.until(|| {
            for (shard, peak) in shards.iter().zip(&mut last) {
                let child = shard.as_ref();
                let found = child.and_then(|child| peak_kib_while_running(child.id()));
                *peak = found.unwrap_or(*peak);
            }
            if early.is_none() && (self.written)() >= self.parts / 4 {
                early = Some(last);
            }
            have_ended(&mut shards)
        });
        (early.unwrap_or(last), last)
    }
}

/// Returns true if both shards have ended. One that has failed is an error.
fn have_ended(shards: &mut [Option<Child>; 2]) -> bool {
    for shard in shards.iter_mut() {
        let has_ended = |child: &mut Child| child.try_wait().unwrap().is_some();
        if let Some(child) = shard.take_if(has_ended) {
            let out = child.wait_with_output().unwrap();
            assert!(out.status.success(), "a shard failed: {}", said(&out));
        }
    }
    shards.iter().all(Option::is_none)
}

/// Number of parts that may be written between the moment when a kill is due and the kill. As many
/// again may be in work then.
const PARTS_PER_KILL: usize = 4;

/// Starts two shards whose server is behind `proxy`, and kills one of them and starts it again
/// `kills` times: at random numbers of parts of the whole run, each time after a random part of
/// `delay`. Returns the shards after the last kill, when parts are left.
fn disturbed(
    run: &TwoShards<'_>,
    proxy: &Proxy,
    kills: usize,
    delay: Duration,
    seed: u64,
) -> [Option<Child>; 2] {
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let end = run.parts - 2 * PARTS_PER_KILL - 2;
    let mut due: Vec<usize> = (0..kills).map(|_| random.random_range(0..end)).collect();
    due.sort_unstable();
    // Nothing passes at the limit, so that parts are left however late this process kills a shard.
    let limit = Arc::new(AtomicUsize::new(usize::MAX));
    let (shared, written) = (Arc::clone(&limit), Arc::clone(&run.written));
    proxy.hold_while(move || written() >= shared.load(Ordering::Relaxed));
    let mut shards = run.start();
    for wanted in due {
        limit.store(wanted + PARTS_PER_KILL, Ordering::Relaxed);
        run.until(|| have_ended(&mut shards) || (run.written)() >= wanted);
        std::thread::sleep(delay.mul_f64(random.random_range(0.0..1.0)));
        let is_over = have_ended(&mut shards);
        assert!(!is_over, "the shards ended before all kills");
        let chosen = random.random_range(0..2_usize);
        // A shard may have written all of its parts.
        let victim = match shards[chosen] {
            Some(_) => chosen,
            None => 1 - chosen,
        };
        let mut child = shards[victim].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        shards[victim] = Some(run.spawn(victim));
    }
    proxy.release();
    shards
}

/// Returns a proxy in front of a server, to and from which every message takes 20 ms. So a run of
/// many parts takes seconds on a fast machine, too.
fn slowed(address: &str) -> Proxy {
    let proxy = Proxy::in_front_of(address);
    proxy.set(Fault::Slow(Duration::from_millis(20)));
    proxy
}

/// Compares two outputs: all files are equal, except for the time in the manifest.
fn assert_same(a: &Path, b: &Path) {
    assert_same_files(files(a), files(b));
}

fn assert_same_files(mut of_a: BTreeMap<String, Vec<u8>>, mut of_b: BTreeMap<String, Vec<u8>>) {
    let without_seconds = |content: Vec<u8>| {
        let mut manifest: Value = serde_json::from_slice(&content).unwrap();
        manifest["seconds"].take();
        manifest
    };
    let manifests = [&mut of_a, &mut of_b].map(|all| all.remove("_manifest.json").unwrap());
    let [left, right] = manifests.map(without_seconds);
    assert_eq!(left, right);
    let names = |all: &BTreeMap<String, Vec<u8>>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&of_a), names(&of_b));
    assert!(of_a == of_b, "the parts differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_that_are_killed_and_restarted_write_the_bytes_of_an_undisturbed_run() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    std::fs::create_dir(at("in")).unwrap();
    write_lines(&at("in/x.jsonl"), &pairs(200));
    write_parquet(&at("in/y.parquet"), &pairs(120));
    let input = at("in/*");
    let input = input.to_str().unwrap();
    let args = [&WEIGHTS[..], &["--part-rows", "8"]].concat();
    succeed(&mut command(&server.address, input, &at("calm"), &args));
    let slow = slowed(&server.address);
    let (url, out) = (slow.url(), at("disturbed"));
    let flags = ["--part-rows", "8", "--connections", "1"];
    let start = |shard: usize| shard_command(&url, input, &out, &flags, shard);
    // 25 parts of x and 15 of y.
    let run = TwoShards::of_folder(&start, &out, 40);
    let mut shards = disturbed(&run, &slow, 6, Duration::from_millis(120), 22);
    run.until(|| have_ended(&mut shards));
    assert_same(&at("calm"), &out);
    assert_eq!(rows(&out).len(), 320);
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_says_that_the_same_command_continues_and_it_does() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    write_lines(&at("x.jsonl"), &pairs(120));
    let input = at("x.jsonl");
    let args = [&WEIGHTS[..], &["--part-rows", "4", "--connections", "1"]].concat();
    let run = |server: &str| command(server, input.to_str().unwrap(), &at("out"), &args);
    // After a part nothing passes, so that rows are left when the command is interrupted.
    let proxy = Proxy::in_front_of(&server.address);
    let out = at("out");
    proxy.hold_while(move || !parts(&out).is_empty());
    let child = run(&proxy.url()).spawn().unwrap();
    until_blocking("the first part", LIMIT, || !parts(&at("out")).is_empty());
    signal(child.id(), libc::SIGINT);
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(130), "{}", said(&out));
    assert!(
        said(&out).contains("the same command continues"),
        "{}",
        said(&out)
    );
    assert!(!at("out/_manifest.json").exists());
    let text = succeed(&mut run(&server.address));
    assert!(text.contains("complete: 30 parts"), "{text}");
    assert_eq!(rows(&at("out")).len(), 120);
}

#[test]
fn ctrl_c_stops_the_own_engine() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let models = models(dir.path());
    write_lines(&at("x.jsonl"), &pairs(4000));
    std::fs::create_dir(at("tmp")).unwrap();
    let input = at("x.jsonl");
    let own = ["--part-rows", "4", "--models", &models, "--device", "cpu"];
    let args = [&WEIGHTS[..], &own].concat();
    let nowhere = "http://127.0.0.1:1";
    let child = command(nowhere, input.to_str().unwrap(), &at("out"), &args)
        .env("TMPDIR", at("tmp"))
        .spawn()
        .unwrap();
    until_blocking("the first part", LIMIT, || !parts(&at("out")).is_empty());
    signal(child.id(), libc::SIGINT);
    let out = child.wait_with_output().unwrap();
    let text = said(&out);
    assert_eq!(out.status.code(), Some(130), "{text}");
    assert!(text.contains("the same command continues"), "{text}");
    assert!(!at("out/_manifest.json").exists());
    let left = std::fs::read_dir(at("tmp")).unwrap().count();
    assert_eq!(left, 0, "the engine's folder is left");
}

/// Starts a server at a given port, so that another one can take its place.
fn serve_at(port: u16, data: &Path, models: &str) -> Child {
    Command::new(crate::support::binary())
        .args(["serve", "--listen", &format!("127.0.0.1:{port}")])
        .args(["--http-listen", "off", "--models", models, "--data-dir"])
        .arg(data)
        .env_remove("BRADLEY_CONFIG")
        .env("BRADLEY_DEVICE", "cpu")
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

async fn until_ready(port: u16) {
    let target = Target::plain(format!("http://127.0.0.1:{port}"));
    crate::wait::until(
        "the start of the server",
        LIMIT,
        async || match Client::connect(&target, Duration::from_secs(1)).await {
            Ok(client) => matches!(client.health().await, Ok(true)),
            Err(_) => false,
        },
    )
    .await;
}

/// Ends a child when a test ends.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_replica_loses_no_row_and_other_weights_in_its_place_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let models = models(dir.path());
    let stable = Server::start_with(&at("data-0"), &models, &[]);
    write_lines(&at("x.jsonl"), &pairs(240));
    let input = at("x.jsonl");
    let input = input.to_str().unwrap();
    let paced = [
        "--part-rows",
        "8",
        "--connections",
        "1",
        "--retry-timeout",
        "100",
    ];
    let args = [&WEIGHTS[..], &paced].concat();
    succeed(&mut command(&stable.address, input, &at("calm"), &args));

    let port = free_port();
    let mut replica = Ended(serve_at(port, &at("data-1"), &models));
    until_ready(port).await;
    let of_replica = Proxy::start(port);
    let of_stable = Proxy::in_front_of(&stable.address);
    let address = of_replica.url();
    // After some parts nothing passes, so that rows are left when a server is killed.
    for proxy in [&of_replica, &of_stable] {
        let out = at("two");
        proxy.hold_while(move || parts(&out).len() > 2);
    }
    let both = format!("{address},{}", of_stable.url());
    let mut running = command(&both, input, &at("two"), &args).spawn().unwrap();
    until_blocking("the first parts", LIMIT, || parts(&at("two")).len() > 2);
    replica.0.kill().unwrap();
    replica.0.wait().unwrap();
    assert!(running.try_wait().unwrap().is_none(), "no row is left");
    of_replica.release();
    of_stable.release();
    let out = running.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", said(&out));
    assert_same(&at("calm"), &at("two"));

    // A server with the same names and other weights takes the place of the only one.
    let mut first = Ended(serve_at(port, &at("data-2"), &models));
    until_ready(port).await;
    let out = at("changed");
    of_replica.hold_while(move || parts(&out).len() > 2);
    let mut running = command(&address, input, &at("changed"), &args)
        .spawn()
        .unwrap();
    until_blocking("the first parts", LIMIT, || parts(&at("changed")).len() > 2);
    first.0.kill().unwrap();
    first.0.wait().unwrap();
    assert!(running.try_wait().unwrap().is_none(), "no row is left");
    of_replica.release();
    let base = golden("models/llama").display().to_string();
    let swapped = format!("tuned={base},base={base}");
    let _second = Ended(serve_at(port, &at("data-3"), &swapped));
    let out = running.wait_with_output().unwrap();
    let text = said(&out);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert!(
        text.contains("the policy's content has changed at"),
        "{text}"
    );
    let calm = parts(&at("calm"));
    for (name, content) in parts(&at("changed")) {
        assert!(
            calm.get(&name) == Some(&content),
            "{name} is of other weights"
        );
    }
    assert!(!at("changed/_manifest.json").exists());
    // Another run with these weights does not continue the parts of the others.
    let text = fail(&mut command(&address, input, &at("changed"), &args), 2);
    assert!(
        text.contains("has the parts of another run")
            && text.contains("differ in the content of the policy"),
        "{text}"
    );
}

#[test]
fn a_server_that_starts_later_is_found_by_its_name() {
    use std::io::{BufRead as _, BufReader, Read as _};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let models = models(dir.path());
    write_lines(&at("x.jsonl"), &pairs(20));
    let input = at("x.jsonl");
    let input = input.to_str().unwrap();
    let port = free_port();
    let args = [&WEIGHTS[..], &["--wait-for-server", "240"]].concat();
    let name = format!("dns:///localhost:{port}");
    let mut running = Ended(command(&name, input, &at("named"), &args).spawn().unwrap());
    let mut errors = BufReader::new(running.0.stderr.take().unwrap());
    let mut lines = errors.by_ref().lines().map_while(Result::ok);
    let waits = lines.any(|line| line.starts_with("waiting for a server: "));
    assert!(waits, "the command does not wait");
    let _server = Ended(serve_at(port, &at("data"), &models));
    let mut rest = String::new();
    errors.read_to_string(&mut rest).unwrap();
    assert!(running.0.wait().unwrap().success(), "{rest}");
    let address = format!("http://127.0.0.1:{port}");
    succeed(&mut command(&address, input, &at("plain"), &WEIGHTS));
    assert_same(&at("plain"), &at("named"));
}

#[test]
fn several_connections_write_what_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    write_lines(&at("x.jsonl"), &pairs(80));
    let input = at("x.jsonl");
    let input = input.to_str().unwrap();
    let run = |connections: &str| {
        let proxy = Proxy::in_front_of(&server.address);
        let more = ["--part-rows", "8", "--connections", connections];
        let args = [&WEIGHTS[..], &more].concat();
        succeed(&mut command(&proxy.url(), input, &at(connections), &args));
        proxy.connections()
    };
    run("1");
    // One more is opened at the start.
    let opened = run("4");
    assert!(opened > 4, "{opened} connections");
    assert_same(&at("1"), &at("4"));
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_rows_are_sent_again_after_the_time_that_the_server_names() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let answers = json!({"prompt": "p", "completions": [" one", " two", " three"]});
    for (name, rows) in [("pairs", pairs(3)), ("answers", vec![answers])] {
        let input = at(&format!("{name}.jsonl"));
        write_lines(&input, &rows);
        let input = input.to_str().unwrap();
        // Longer than the first pauses without this request.
        let asked = Duration::from_millis(700);
        let (server, address) = RefusingServer::start(2, asked).await;
        let out = at(&format!("{name}-out"));
        let text = succeed(&mut command(&address, input, &out, &WEIGHTS));
        assert!(text.contains("0 with an error"), "{name}: {text}");
        let pauses = server.pauses();
        assert_eq!(pauses.len(), 2, "{name}: {pauses:?}");
        assert!(pauses.iter().all(|pause| *pause >= asked), "{pauses:?}");
        // The row that this server scores is no reason to wait for the others for ever.
        let (_, address) = RefusingServer::start(usize::MAX, Duration::from_millis(100)).await;
        let out = at(&format!("{name}-never"));
        let args = [&WEIGHTS[..], &["--retry-timeout", "1"]].concat();
        let text = fail(&mut command(&address, input, &out, &args), 1);
        assert!(
            text.contains(" s (--retry-timeout): the queue is full; run the command again later"),
            "{name}: {text}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_scored_or_written_is_named_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    std::fs::create_dir(at("in")).unwrap();
    write_lines(&at("in/x.jsonl"), &pairs(10));
    let input = at("in/x.jsonl");
    let input = input.to_str().unwrap();
    let refused = |out: &str, args: &[&str], code: i32| {
        fail(&mut command(&server.address, input, &at(out), args), code)
    };
    let text = refused("o1", &["--policy", "models/tuneed"], 2);
    assert!(text.contains("did you mean models/tuned?"), "{text}");
    let text = refused("o2", &[&WEIGHTS[..], &["--beta", "-1"]].concat(), 2);
    assert!(text.contains("--beta"), "{text}");
    let text = refused("o3", &[&WEIGHTS[..], &["--carry", "margin"]].concat(), 2);
    assert!(text.contains("--carry margin"), "{text}");
    let text = fail(
        &mut command(&server.address, "/none/x*.jsonl", &at("o4"), &WEIGHTS),
        2,
    );
    assert!(text.contains("nothing matches this pattern"), "{text}");
    // The output is a file.
    let text = refused("in/x.jsonl", &WEIGHTS, 1);
    assert!(
        text.contains("--out") && text.contains("name another folder"),
        "{text}"
    );

    // A disk that takes no file of this size: nothing is half written, and the run continues later.
    let whole = command(&server.address, input, &at("full"), &WEIGHTS);
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 4; exec \"$0\" \"$@\""])
        .arg(whole.get_program())
        .args(whole.get_args());
    let text = fail(&mut limited, 1);
    assert!(
        text.contains("File too large") && text.contains("--out"),
        "{text}"
    );
    assert!(parts(&at("full")).is_empty());
    let mut again = command(&server.address, input, &at("full"), &WEIGHTS);
    assert!(succeed(&mut again).contains("complete: 1 part, 10 rows"));

    // Another number of rows in a part would write rows twice.
    let args = [&WEIGHTS[..], &["--part-rows", "4"]].concat();
    succeed(&mut command(&server.address, input, &at("out"), &args));
    let text = refused("out", &[&WEIGHTS[..], &["--part-rows", "5"]].concat(), 2);
    assert!(text.contains("--part-rows (there: 4, here: 5)"), "{text}");
    // So would another content of an input.
    write_lines(&at("in/x.jsonl"), &pairs(11));
    let text = refused("out", &args, 1);
    assert!(text.contains("not the content of which --out"), "{text}");
    write_lines(&at("in/x.jsonl"), &pairs(10));
    // A later version may describe runs in another way.
    std::fs::write(at("out/_run.json"), "{\"weights\": 1}").unwrap();
    let text = refused("out", &args, 2);
    assert!(
        text.contains("_run.json does not describe a run of this version"),
        "{text}"
    );

    // A damaged input does not keep the others from being scored.
    let whole = std::fs::read(golden("pairs.jsonl")).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&whole).unwrap();
    let gzip = gzip.finish().unwrap();
    std::fs::write(at("in/cut.jsonl.gz"), &gzip[..gzip.len() / 2]).unwrap();
    std::fs::write(at("in/false.parquet"), b"PAR1 and nothing else").unwrap();
    std::fs::write(at("in/table.csv"), "prompt,chosen,rejected\na,b,c\n").unwrap();
    let pattern = at("in/*");
    let mut mixed = command(
        &server.address,
        pattern.to_str().unwrap(),
        &at("mixed"),
        &WEIGHTS,
    );
    let text = fail(&mut mixed, 1);
    for expected in [
        "3 of 4 inputs could not be read",
        "cut.jsonl.gz: ",
        "its gzip data is damaged or cut off",
        "false.parquet: not a readable Parquet file",
        "score-files reads JSONL and Parquet",
    ] {
        assert!(text.contains(expected), "{expected} is missing: {text}");
    }
    let scored = rows(&at("mixed"));
    assert_eq!(
        scored
            .iter()
            .filter(|row| row["input"] == "x.jsonl")
            .count(),
        10
    );
    assert!(!at("mixed/_manifest.json").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_pinned_and_latest_of_a_running_job_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start(&at("data"));
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    write_lines(&at("x.jsonl"), &pairs(10));
    let input = at("x.jsonl");
    let input = input.to_str().unwrap();
    let ended = create(&client, job(&dataset.name, 2)).await.unwrap().name;
    finish(&client, &ended).await;
    let policy = format!("{ended}/checkpoints/latest");
    succeed(&mut command(
        &server.address,
        input,
        &at("ended"),
        &["--policy", &policy],
    ));
    let run = manifest(&at("ended"));
    let weights = &run["run"]["weights"];
    assert_eq!(weights["policy"], json!(format!("{ended}/checkpoints/2")));
    assert_eq!(weights["reference"], json!("models/tiny"));
    let request = pb::GetCheckpointRequest { name: policy };
    let checkpoint = client.checkpoints().get_checkpoint(request).await.unwrap();
    let digest = checkpoint.into_inner().digest;
    assert_eq!(digest.len(), 64, "{digest:?}");
    assert_eq!(weights["policy_content"]["digest"], json!(digest));
    let endless = create(&client, job(&dataset.name, 100_000))
        .await
        .unwrap()
        .name;
    for name in ["latest", "best"] {
        let policy = format!("{endless}/checkpoints/{name}");
        let mut command = command(&server.address, input, &at(name), &["--policy", &policy]);
        let text = fail(&mut command, 2);
        assert!(
            text.contains(&policy) && text.contains("bradley checkpoints list"),
            "{text}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_engine_writes_what_a_server_does() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let models = models(dir.path());
    write_lines(&at("x.jsonl"), &pairs(40));
    let input = at("x.jsonl");
    let input = input.to_str().unwrap();
    for (out, device) in [("own", "cpu"), ("two", "cpu,cpu")] {
        let own = ["--part-rows", "16", "--models", &models, "--device", device];
        // The address of a server is not used.
        let args = [&WEIGHTS[..], &own].concat();
        let text = succeed(&mut command("http://127.0.0.1:1", input, &at(out), &args));
        assert!(text.contains("complete: 3 parts, 40 rows"), "{text}");
    }
    assert_same(&at("own"), &at("two"));
    let server = Server::start_with(&at("data"), &models, &[]);
    let scores = expected(&server.client().await, &pairs(40)).await;
    for (row, score) in rows(&at("own")).iter().zip(&scores) {
        assert_is_score(row, score);
    }
    assert_eq!(manifest(&at("own"))["run"]["precision"], json!("f32"));
    let missing = ["--models", "tuned=/none", "--policy", "models/tuned"];
    let text = fail(
        &mut command("http://127.0.0.1:1", input, &at("none"), &missing),
        1,
    );
    assert!(text.contains("/none"), "{text}");
    let refused = |more: &[&str], parts: &[&str]| {
        let own = ["--models", models.as_str(), "--device", "cpu"];
        let args = [&own[..], more].concat();
        let text = fail(
            &mut command("http://127.0.0.1:1", input, &at("no"), &args),
            2,
        );
        for part in parts {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    };
    let merged = "checkpoints download JOB/checkpoints/STEP --contents merged";
    for job in ["trainingJobs/x", "x/checkpoints/3", "@last"] {
        let policy = format!("--policy {job}: with --models there are no jobs: ");
        refused(&["--policy", job], &[&policy, merged]);
        let reference = format!("--reference {job}: with --models there are no jobs: ");
        let flags = ["--policy", "models/tuned", "--reference", job];
        refused(&flags, &[&reference, merged]);
    }
    for other in ["models/unknown", "unknown"] {
        let parts = ["--models has models/", " and no jobs: ", merged];
        refused(&["--policy", other], &parts);
    }
    let both = [&WEIGHTS[..], &["--server", "http://127.0.0.1:1"]].concat();
    refused(&both, &["--server is of no use with --models"]);
}

/// Sends a plain HTTP request for an object to moto, which does not check its signature. Returns
/// the content of the answer.
fn request_object(s3: &S3, method: &str, key: &str, content: &[u8]) -> Vec<u8> {
    use std::io::Read as _;
    let mut connection = std::net::TcpStream::connect(("127.0.0.1", s3.port())).unwrap();
    let head = format!(
        "{method} /bradley/{key} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: AWS4-HMAC-SHA256 \
         Credential=test/20260101/us-east-1/s3/aws4_request\r\nContent-Length: {}\r\nConnection: \
         close\r\n\r\n",
        content.len()
    );
    connection.write_all(head.as_bytes()).unwrap();
    connection.write_all(content).unwrap();
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let content = answer.split_off(end.unwrap() + 4);
    let head = String::from_utf8_lossy(&answer);
    assert!(head.starts_with("HTTP/1.1 200"), "{method} {key}: {head}");
    content
}

/// Returns the objects below a prefix by the rest of their keys.
fn objects(s3: &S3, prefix: &str) -> BTreeMap<String, Vec<u8>> {
    let keys = s3.keys(prefix);
    let object = |key: &String| {
        let content = request_object(s3, "GET", key, &[]);
        (key[prefix.len()..].to_owned(), content)
    };
    keys.iter().map(object).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python with moto (BRADLEY_TEST_PYTHON)"]
async fn objects_of_a_bucket_are_scored_into_a_bucket_that_fails_now_and_then() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let s3 = Arc::new(S3::start());
    let store = Proxy::start(s3.port());
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    write_lines(&at("x.jsonl"), &pairs(152));
    write_parquet(&at("y.parquet"), &pairs(76));
    for name in ["x.jsonl", "y.parquet"] {
        let content = std::fs::read(at(name)).unwrap();
        request_object(&s3, "PUT", &format!("pairs/day=1/{name}"), &content);
    }
    let input = "s3://bradley/pairs/**/*.*";
    let flags = ["--part-rows", "8", "--connections", "1"];
    let args = [&WEIGHTS[..], &flags].concat();
    let out = Path::new("s3://bradley/calm/");
    let mut calm = command(&server.address, input, out, &args);
    succeed(calm.envs(s3.environment()));
    let slow = slowed(&server.address);
    let url = slow.url();
    let start = |shard: usize| {
        let out = Path::new("s3://bradley/scored/");
        let mut command = shard_command(&url, input, out, &flags, shard);
        command.envs(s3.environment_at(store.port()));
        command
    };
    // The proxy does not keep moto alive after this test.
    let weak = Arc::downgrade(&s3);
    let run = TwoShards {
        command: &start,
        written: Arc::new(move || weak.upgrade().map_or(0, |s3| s3.keys("scored/day").len())),
        // 19 parts of x and 10 of y.
        parts: 29,
    };
    let mut shards = disturbed(&run, &slow, 4, Duration::from_millis(120), 22);
    let before = (run.written)();
    run.until(|| have_ended(&mut shards) || (run.written)() > before);
    store.set(Fault::Error);
    std::thread::sleep(Duration::from_millis(700));
    store.set(Fault::None);
    run.until(|| have_ended(&mut shards));
    assert_eq!((run.written)(), run.parts);
    assert_same_files(objects(&s3, "calm/"), objects(&s3, "scored/"));
    let text = succeed(&mut start(1));
    assert!(
        text.contains("complete: 29 parts, 228 rows, 0 with an error"),
        "{text}"
    );
    let mut elsewhere = command(&server.address, "s3://nobody/x", &at("o"), &WEIGHTS);
    elsewhere.envs(s3.environment());
    let text = fail(&mut elsewhere, 2);
    assert!(
        text.contains("s3://nobody/x") && text.contains("check the URL"),
        "{text}"
    );
}

/// Two shards score many rows in 64 parts, undisturbed and with twenty kills. This takes too long
/// for each change, so it is run by hand. `BRADLEY_TEST_MILLION` is the number of rows:
///
/// ```text
/// BRADLEY_TEST_MILLION=1000000 cargo test --test it -- --ignored --nocapture a_million_rows
/// ```
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs much time, and the number of rows in BRADLEY_TEST_MILLION"]
async fn a_million_rows_are_written_once() {
    let count: usize = std::env::var("BRADLEY_TEST_MILLION")
        .expect("set BRADLEY_TEST_MILLION to the number of rows, or skip this test")
        .parse()
        .unwrap();
    let part_rows = count.div_ceil(64);
    // 64, unless the number of rows is small.
    let total = count.div_ceil(part_rows);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_with(&at("data"), &models(dir.path()), &[]);
    std::fs::create_dir(at("in")).unwrap();
    // Each file has eight parts.
    for (i, start) in (0..count).step_by(8 * part_rows).enumerate() {
        let end = count.min(start + 8 * part_rows);
        write_parquet(&at(&format!("in/{i}.parquet")), &short_pairs(start..end));
    }
    let input = at("in/*");
    let input = input.to_str().unwrap();
    let part_rows = part_rows.to_string();
    let flags = ["--part-rows", part_rows.as_str()];

    let calm = at("calm");
    let start = |shard: usize| shard_command(&server.address, input, &calm, &flags, shard);
    let (early, last) = TwoShards::of_folder(&start, &calm, total).peaks();
    for (shard, (early, last)) in early.into_iter().zip(last).enumerate() {
        let figures = format!(
            "shard {shard}: a peak of {} MiB after a quarter of the parts, {} MiB at the end",
            early >> 10,
            last >> 10
        );
        eprintln!("{figures}");
        let most = early + early * 3 / 10 + (32 << 10);
        assert!(early > 0 && last <= most, "{figures}");
    }

    let proxy = Proxy::in_front_of(&server.address);
    let (url, killed) = (proxy.url(), at("killed"));
    let start = |shard: usize| shard_command(&url, input, &killed, &flags, shard);
    let run = TwoShards::of_folder(&start, &killed, total);
    let kills = 20;
    let mut shards = disturbed(&run, &proxy, kills, Duration::from_secs(1), 22);
    run.until(|| have_ended(&mut shards));
    assert_same(&calm, &killed);
    let manifest = manifest(&killed);
    assert_eq!(manifest["parts"].as_array().unwrap().len(), total);
    assert_eq!(
        (&manifest["rows"], &manifest["errors"]),
        (&json!(count), &json!(0))
    );
    let mut is_written = vec![false; count];
    for (name, content) in parts(&killed) {
        for row in rows_of(&name, content) {
            let id = row["id"].as_str().unwrap();
            let number: usize = id.strip_prefix("pair-").unwrap().parse().unwrap();
            let is_twice = std::mem::replace(&mut is_written[number], true);
            assert!(!is_twice, "{id} is written twice");
        }
    }
    let rows = is_written.iter().filter(|is_written| **is_written).count();
    assert_eq!(rows, count, "rows are missing");
    let peak = peak_kib(server.pid()) >> 10;
    eprintln!("{rows} rows in {total} parts, {kills} kills; the server has a peak of {peak} MiB");
}
