//! Evaluations with the real server and the real command line. The figures are compared with those
//! of the scores that ScorePairs and ScoreCompletions return.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bradley::math::calibration::{CalibrationPoint, fit};
use bradley::math::evaluation::{Wins, probability_scores};
use bradley::math::sigmoid;
use bradley::rpc::client::{Client, Status};
use bradley::rpc::pb::{self, evaluate_policy_response::Part};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Value, json};
use sqlx::Connection as _;
use tonic::Code;
use unicode_width::UnicodeWidthStr;

use crate::server::{Server, create_token, finish, job, scored, submit, until_event};
use crate::support::golden;
use crate::wait::until;

/// Rows of a dataset whose evaluation is interrupted. Scoring them must take seconds, because a busy
/// machine may interrupt it late.
const MANY_ROWS: usize = 20_000;

/// Starts a server with a policy and a reference.
fn serve(dir: &Path, flags: &[&str]) -> Server {
    let models = format!(
        "tiny={},ref={}",
        golden("models/llama").display(),
        golden("models/llama-ref").display()
    );
    Server::start_with(dir, &models, flags)
}

fn options() -> pb::ScoringOptions {
    pb::ScoringOptions {
        policy: "models/tiny".into(),
        reference: "models/ref".into(),
        beta: Some(0.7),
        ..Default::default()
    }
}

fn request(dataset: &pb::Dataset) -> pb::EvaluatePolicyRequest {
    pb::EvaluatePolicyRequest {
        options: Some(options()),
        dataset: dataset.name.clone(),
        ..Default::default()
    }
}

/// Evaluates, and returns the number of progress messages and the report.
async fn evaluate(
    client: &Client,
    request: pb::EvaluatePolicyRequest,
) -> Result<(usize, pb::EvaluationReport), Status> {
    let mut messages = client.evaluations().evaluate_policy(request).await?;
    let mut progress = 0;
    let mut report = None;
    while let Some(message) = messages.get_mut().message().await? {
        assert!(report.is_none(), "a message after the report");
        match message.part.unwrap() {
            Part::Progress(_) => progress += 1,
            Part::Report(found) => report = Some(found),
        }
    }
    Ok((progress, report.expect("no report")))
}

fn write_rows(file: &Path, rows: &[Value]) {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(file, lines).unwrap();
}

async fn upload(client: &Client, file: &Path) -> pb::Dataset {
    client
        .upload_dataset(file, pb::UploadMetadata::default(), |_| {})
        .await
        .unwrap()
}

/// Returns rows with different prompts, lengths, subsets and given scores.
fn rows(n: usize) -> Vec<Value> {
    let words = [
        " red",
        " green",
        " blue and",
        " 17",
        " perhaps",
        " no",
        " yes,",
        " it is",
    ];
    let subsets = ["chat", "code", "math"];
    let text = |seed: usize, length: usize| -> String {
        (0..length)
            .map(|i| words[(seed * 7 + i * i * 3 + i) % words.len()])
            .collect()
    };
    (0..n)
        .map(|i| {
            json!({
                "id": i,
                "prompt": format!("{i}. Which{}?", text(i, i % 3)),
                "chosen": text(i, 1 + (i * 5) % 9),
                "rejected": format!("{}.", text(i + 3, 1 + (i * 3) % 40)),
                "subset": subsets[i % 3],
                "score_chosen": i % 4,
                "score_rejected": 1.5,
            })
        })
        .collect()
}

/// Scores rows of plain texts with ScorePairs.
async fn score_rows(client: &Client, rows: &[Value]) -> Vec<pb::PairScore> {
    score_rows_with(client, options(), rows).await
}

async fn score_rows_with(
    client: &Client,
    options: pb::ScoringOptions,
    rows: &[Value],
) -> Vec<pb::PairScore> {
    let text = |value: &Value| {
        let plain = value.as_str().unwrap().to_owned();
        Some(pb::Text {
            form: Some(pb::text::Form::Plain(plain)),
        })
    };
    let pairs = rows.iter().map(|row| pb::Pair {
        prompt: text(&row["prompt"]),
        a: text(&row["chosen"]),
        b: text(&row["rejected"]),
        ..Default::default()
    });
    let request = pb::ScorePairsRequest {
        options: Some(options),
        pairs: pairs.collect(),
    };
    let answer = client.scoring().score_pairs(request).await.unwrap();
    answer
        .get_ref()
        .results
        .iter()
        .map(|r| scored(r).clone())
        .collect()
}

fn check_rate(got: Option<&pb::WinRate>, differences: impl Iterator<Item = f64>) {
    let mut wins = Wins::default();
    differences.for_each(|d| wins.add(d));
    let got = got.expect("no win rate");
    let (lower, upper) = wins.interval().unwrap();
    assert_eq!(
        (got.count, got.share, got.lower, got.upper),
        (wins.count, wins.share().unwrap(), lower, upper)
    );
}

fn check_probability(got: Option<&pb::ProbabilityReport>, margins: &[f64], bins: usize) {
    let (got, expected) = (
        got.expect("no probability report"),
        probability_scores(margins, bins).unwrap(),
    );
    assert_eq!(
        (got.auc, got.brier, got.log_loss, got.ece),
        (
            expected.auc,
            expected.brier,
            expected.log_loss,
            expected.ece
        )
    );
    assert_eq!(got.bins.len(), bins);
    for (got, expected) in got.bins.iter().zip(&expected.bins) {
        assert_eq!(
            (
                got.above,
                got.up_to,
                got.samples,
                got.predicted,
                got.observed
            ),
            (
                expected.above,
                expected.up_to,
                expected.samples,
                expected.predicted,
                expected.observed
            )
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_has_the_figures_of_the_scored_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &[]);
    let client = server.client().await;
    let rows = rows(90);
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, &rows);
    let dataset = upload(&client, &file).await;
    let scores = score_rows(&client, &rows).await;
    let margins: Vec<f64> = scores.iter().map(|s| s.margin).collect();
    let lengths: Vec<i64> = scores
        .iter()
        .map(|s| {
            let tokens = |c: &Option<pb::CompletionScore>| i64::from(c.as_ref().unwrap().tokens);
            tokens(&s.a) - tokens(&s.b)
        })
        .collect();
    assert!(margins.iter().any(|m| *m > 0.0) && margins.iter().any(|m| *m < 0.0));

    let wanted = pb::EvaluatePolicyRequest {
        subset_column: "subset".into(),
        bins: 8,
        ..request(&dataset)
    };
    let (progress, report) = evaluate(&client, wanted.clone()).await.unwrap();
    assert!(progress >= 1);
    assert_eq!(report.dataset, dataset.name);
    assert_eq!(
        (report.rows, report.pairs, report.failed_pairs),
        (90, 90, 0)
    );
    check_rate(report.accuracy.as_ref(), margins.iter().copied());
    assert_eq!(report.best_of_n, None);
    check_probability(report.probability.as_ref(), &margins, 8);
    let mean = margins.iter().sum::<f64>() / 90.0;
    assert_eq!(report.mean_margin, mean);

    let names: Vec<&str> = report.subsets.iter().map(|s| s.subset.as_str()).collect();
    assert_eq!(names, ["chat", "code", "math"]);
    for (i, subset) in report.subsets.iter().enumerate() {
        let of_subset = margins.iter().copied().skip(i).step_by(3);
        check_rate(subset.accuracy.as_ref(), of_subset);
    }
    let mut in_ranges = 0;
    for range in &report.by_length {
        let (from, to) = (
            range.from_tokens.unwrap_or(i64::MIN),
            range.to_tokens.unwrap_or(i64::MAX),
        );
        let inside = || {
            lengths
                .iter()
                .zip(&margins)
                .filter(|(d, _)| (from..=to).contains(d))
        };
        in_ranges += inside().count();
        if inside().count() > 0 {
            check_rate(range.accuracy.as_ref(), inside().map(|(_, m)| *m));
        }
    }
    assert_eq!((report.by_length.len(), in_ranges), (5, 90));
    // Given scores 0 and 1 are below 1.5, 2 and 3 above it.
    let signs = margins
        .iter()
        .enumerate()
        .map(|(i, m)| if i % 4 < 2 { -m } else { *m });
    check_rate(report.agreement.as_ref(), signs);
    let histogram = report.margins.as_ref().unwrap();
    assert_eq!(histogram.counts.iter().sum::<u64>(), 90);

    // A hash of the prompt decides whether a pair is in the first half, with which the calibration
    // is fitted, or in the second one, on which it is judged.
    let halves = [false, true].map(|wanted| -> Vec<CalibrationPoint> {
        (0..90)
            .filter(|i| {
                let prompt = rows[*i]["prompt"].to_string();
                (blake3::hash(prompt.as_bytes()).as_bytes()[0] & 1 == 1) == wanted
            })
            .map(|i| CalibrationPoint {
                margin: margins[i],
                length_difference: lengths[i] as f64,
            })
            .collect()
    });
    let calibration = report.calibration.as_ref().unwrap();
    match fit(&halves[0]) {
        Err(problem) => assert_eq!(calibration.problem, problem.to_string()),
        Ok(fitted) => {
            assert_eq!(
                (calibration.fitted_pairs, calibration.judged_pairs),
                (halves[0].len() as u64, halves[1].len() as u64)
            );
            assert_eq!(
                (calibration.temperature, calibration.length_coefficient),
                (fitted.temperature, fitted.length_coefficient)
            );
            let raw: Vec<f64> = halves[1].iter().map(|p| p.margin).collect();
            check_probability(calibration.before.as_ref(), &raw, 8);
            let calibrated: Vec<f64> = halves[1].iter().map(|p| fitted.margin(*p)).collect();
            check_probability(calibration.after.as_ref(), &calibrated, 8);
        }
    }

    assert_eq!(
        (
            report.policy_version.as_str(),
            report.reference_version.as_str()
        ),
        ("models/tiny", "models/ref")
    );
    assert_eq!(
        (report.beta, report.normalization()),
        (0.7, pb::RewardNormalization::Sum)
    );
    assert!(report.warnings.is_empty());
    // Another run has the same bits, although its scores come in another order.
    assert_eq!(evaluate(&client, wanted).await.unwrap().1, report);
    let metrics = server.metrics();
    let call = "bradley_requests_total{method=\"/bradley.v1.EvaluationService/EvaluatePolicy\"";
    assert!(metrics.contains(call), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_with_several_answers_count_as_one_and_bad_rows_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &[]);
    let client = server.client().await;
    // The shape of RewardBench 2, with several chosen answers in some rows.
    let answers = [
        " four",
        " 5",
        " it is six",
        " seven?",
        " 8, perhaps",
        " nine",
    ];
    let mut rows: Vec<Value> = (0..12)
        .map(|i| {
            let chosen = 1 + i % 2;
            json!({
                "id": format!("r{i}"),
                "prompt": format!("{i} + 2 =?"),
                "chosen": &answers[i % 3..i % 3 + chosen],
                "rejected": &answers[3..],
                "subset": if i < 6 { json!("first") } else { Value::Null },
            })
        })
        .collect();
    let n = rows.len();
    // The last two of these can be read, but not scored in 64 tokens.
    rows.push(json!({"id": "lonely", "prompt": "x", "chosen": " y"}));
    rows.push(json!({"prompt": "long ".repeat(200), "chosen": " y", "rejected": " z"}));
    rows.push(
        json!({"id": "several", "prompt": "long ".repeat(200), "chosen": [" y"],
                     "rejected": [" z", " w"]}),
    );
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, &rows);
    let mut text = std::fs::read_to_string(&file).unwrap();
    text.push_str("not JSON\n");
    std::fs::write(&file, text).unwrap();
    let dataset = upload(&client, &file).await;

    let wanted = pb::EvaluatePolicyRequest {
        options: Some(pb::ScoringOptions {
            max_length: Some(64),
            ..options()
        }),
        subset_column: "subset".into(),
        ..request(&dataset)
    };
    let (_, report) = evaluate(&client, wanted).await.unwrap();
    assert_eq!(report.rows, n as u64 + 4);
    // Six rows have one chosen and six two, each against three rejected ones.
    assert_eq!(report.pairs, 6 * 3 + 6 * 6);
    assert_eq!(report.failed_pairs, 5, "{:?}", report.errors);
    let errors: Vec<(u64, u32, &str)> = report
        .errors
        .iter()
        .map(|e| (e.row, e.pair, e.id.as_str()))
        .collect();
    assert_eq!(
        errors,
        [
            (13, 0, "lonely"),
            (14, 0, ""),
            (15, 1, "several#1"),
            (15, 2, "several#2"),
            (16, 0, "")
        ]
    );
    let messages: Vec<&str> = report.errors.iter().map(|e| e.message.as_str()).collect();
    assert!(
        messages[0].starts_with("rejected is missing"),
        "{messages:?}"
    );
    assert!(messages[1].starts_with("prompt"), "{messages:?}");
    assert!(messages[4].contains("not JSON"), "{messages:?}");

    // The best answer by ScoreCompletions.
    let mut differences = Vec::new();
    for row in &rows[..n] {
        let list = |column: &str| row[column].as_array().unwrap().clone();
        let chosen = list("chosen").len();
        let plain = |value: &Value| pb::Text {
            form: Some(pb::text::Form::Plain(value.as_str().unwrap().to_owned())),
        };
        let all = [list("chosen"), list("rejected")].concat();
        let request = pb::ScoreCompletionsRequest {
            options: Some(options()),
            prompt: Some(plain(&row["prompt"])),
            completions: all.iter().map(plain).collect(),
        };
        let answer = client.scoring().score_completions(request).await.unwrap();
        let best = answer.get_ref().ranking[0] as usize;
        differences.push(if best < chosen { 1.0 } else { -1.0 });
    }
    let wins = differences.iter().filter(|d| **d > 0.0).count();
    assert!(0 < wins && wins < n, "the rows are too easy: {wins} of {n}");
    check_rate(report.best_of_n.as_ref(), differences.iter().copied());
    let names: Vec<&str> = report.subsets.iter().map(|s| s.subset.as_str()).collect();
    assert_eq!(names, ["", "first"]);
    check_rate(
        report.subsets[0].best_of_n.as_ref(),
        differences[6..].iter().copied(),
    );
    check_rate(
        report.subsets[1].best_of_n.as_ref(),
        differences[..6].iter().copied(),
    );
}

/// Writes rows of four texts as Parquet.
fn write_parquet(file: &Path, rows: &[Value]) {
    const COLUMNS: [&str; 4] = ["prompt", "chosen", "rejected", "subset"];
    let schema: String = COLUMNS
        .iter()
        .map(|column| format!("required binary {column} (UTF8); "))
        .collect();
    let schema = Arc::new(parse_message_type(&format!("message rows {{ {schema} }}")).unwrap());
    let out = std::fs::File::create(file).unwrap();
    let mut writer = SerializedFileWriter::new(out, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for column in COLUMNS {
        let mut out = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = rows
            .iter()
            .map(|row| ByteArray::from(row[column].as_str().unwrap()))
            .collect();
        out.typed::<ByteArrayType>()
            .write_batch(&values, None, None)
            .unwrap();
        out.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parquet_dataset_gives_the_same_report() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &[]);
    let client = server.client().await;
    let rows = rows(30);
    let (lines, columns) = (
        dir.path().join("rows.jsonl"),
        dir.path().join("rows.parquet"),
    );
    write_rows(&lines, &rows);
    write_parquet(&columns, &rows);
    let mut reports = Vec::new();
    for file in [&lines, &columns] {
        let dataset = upload(&client, file).await;
        let wanted = pb::EvaluatePolicyRequest {
            subset_column: "subset".into(),
            ..request(&dataset)
        };
        let (_, report) = evaluate(&client, wanted).await.unwrap();
        reports.push(pb::EvaluationReport {
            dataset: String::new(),
            agreement: None,
            ..report
        });
    }
    assert_eq!(reports[0].subsets.len(), 3);
    assert_eq!(reports[0], reports[1]);
    // The copy of the Parquet file is gone.
    let temporary = server.data_dir.join("tmp");
    let left = std::fs::read_dir(&temporary).map_or(0, |files| files.count());
    assert_eq!(left, 0, "{}", temporary.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evaluation_ends_when_its_client_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &[]);
    let client = server.client().await;
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, &rows(MANY_ROWS));
    let dataset = upload(&client, &file).await;
    let mut messages = client
        .evaluations()
        .evaluate_policy(request(&dataset))
        .await
        .unwrap()
        .into_inner();
    let first = messages.message().await.unwrap().unwrap();
    assert!(matches!(first.part, Some(Part::Progress(p)) if p.total_pairs == MANY_ROWS as u64));
    until("a scored pair", Duration::from_secs(60), async || {
        server.scored_pairs() > 0
    })
    .await;
    drop(messages);
    let (mut scored, mut unchanged_since) = (0, Instant::now());
    until("the end of the work", Duration::from_secs(60), async || {
        let now = server.scored_pairs();
        if now != scored {
            (scored, unchanged_since) = (now, Instant::now());
        }
        unchanged_since.elapsed() >= Duration::from_secs(1)
    })
    .await;
    assert!(scored < MANY_ROWS as u64, "all {scored} pairs were scored");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evaluation_waits_for_its_share_of_the_quota() {
    let dir = tempfile::tempdir().unwrap();
    // Room for few pairs at a time.
    let server = serve(dir.path(), &["--max-scoring-tokens-per-client", "200"]);
    let client = server.client().await;
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, &rows(40));
    let dataset = upload(&client, &file).await;
    let (_, report) = evaluate(&client, request(&dataset)).await.unwrap();
    assert_eq!(
        (report.pairs, report.failed_pairs),
        (40, 0),
        "{:?}",
        report.errors
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn evaluations_need_the_role_score_and_the_callers_own_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let submitter = create_token(dir.path(), "team-a", "submit");
    let scorer = create_token(dir.path(), "team-a", "score");
    let other = create_token(dir.path(), "team-b", "submit,score");
    let server = serve(dir.path(), &["--auth", "tokens"]);
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, &rows(12));
    let owner = server.client_with(&submitter).await;
    let dataset = upload(&owner, &file).await;
    let refused = evaluate(&owner, request(&dataset)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("score"), "{refused:?}");
    let foreign = evaluate(&server.client_with(&other).await, request(&dataset)).await;
    assert_eq!(foreign.unwrap_err().code(), Code::PermissionDenied);
    let scorer = server.client_with(&scorer).await;
    let (_, report) = evaluate(&scorer, request(&dataset)).await.unwrap();
    assert_eq!(report.pairs, 12);
    let saving = pb::EvaluatePolicyRequest {
        save_calibration: true,
        ..request(&dataset)
    };
    let refused = evaluate(&scorer, saving).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("submit"), "{refused:?}");
    // The pairs are counted as used.
    let usage = pb::GetUsageRequest::default();
    let usage = scorer.usage().get_usage(usage).await.unwrap().into_inner();
    assert_eq!(usage.usage[0].scored_pairs, 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &[]);
    let client = server.client().await;
    let file = dir.path().join("rows.jsonl");
    let mut with_list = rows(12);
    with_list[7]["tags"] = json!(["a"]);
    write_rows(&file, &with_list);
    let dataset = upload(&client, &file).await;
    let good = request(&dataset);
    let cases = [
        (
            "dataset",
            pb::EvaluatePolicyRequest {
                dataset: "rows".into(),
                ..good.clone()
            },
        ),
        (
            "bins",
            pb::EvaluatePolicyRequest {
                bins: 101,
                ..good.clone()
            },
        ),
        (
            "options.policy",
            pb::EvaluatePolicyRequest {
                options: None,
                ..good.clone()
            },
        ),
        (
            "rejected_score_column",
            pb::EvaluatePolicyRequest {
                chosen_score_column: "a".into(),
                ..good.clone()
            },
        ),
        (
            "save_calibration",
            pb::EvaluatePolicyRequest {
                save_calibration: true,
                ..good.clone()
            },
        ),
        (
            "subset_column",
            pb::EvaluatePolicyRequest {
                subset_column: "tags".into(),
                ..good.clone()
            },
        ),
    ];
    for (field, request) in cases {
        let refused = evaluate(&client, request).await.unwrap_err();
        assert_eq!(
            refused.code(),
            Code::InvalidArgument,
            "{field}: {refused:?}"
        );
        assert!(refused.message().contains(field), "{field}: {refused:?}");
    }
    let (rest, last) = dataset.name.split_at(dataset.name.len() - 1);
    let gone = format!("{rest}{}", if last == "0" { "1" } else { "0" });
    let misspelt = pb::EvaluatePolicyRequest {
        subset_column: "subsets".into(),
        ..good.clone()
    };
    let (_, report) = evaluate(&client, misspelt).await.unwrap();
    let warnings = report.warnings;
    assert!(
        warnings.len() == 1 && warnings[0].contains("\"subsets\""),
        "{warnings:?}"
    );
    let gone = pb::EvaluatePolicyRequest {
        dataset: gone,
        ..good.clone()
    };
    let refused = evaluate(&client, gone).await.unwrap_err();
    assert!(
        [Code::NotFound, Code::PermissionDenied].contains(&refused.code()),
        "{refused:?}"
    );

    // The weights of a running job change.
    let running = submit(&client, job(&dataset.name, 100_000)).await;
    until_event(&client, &running, |e| crate::server::is_step(e, 1)).await;
    let live = pb::EvaluatePolicyRequest {
        options: Some(pb::ScoringOptions {
            policy: format!("{running}/checkpoints/latest"),
            ..Default::default()
        }),
        ..good
    };
    let refused = evaluate(&client, live).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("still training"), "{refused:?}");
}

fn bradley(server: &Server, arguments: &[&str]) -> Output {
    Command::new(crate::support::binary())
        .args(arguments)
        .args(["--server", &server.address])
        .output()
        .unwrap()
}

async fn number_of_datasets(client: &Client) -> usize {
    let request = pb::ListDatasetsRequest::default();
    let page = client.datasets().list_datasets(request).await.unwrap();
    page.into_inner().datasets.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_prints_a_report_and_writes_plots() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &[]);
    let client = server.client().await;
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, &rows(60));
    let (data, plots) = (file.to_str().unwrap(), dir.path().join("plots"));
    let scoring = [
        "evaluate",
        "--policy",
        "tiny",
        "--reference",
        "ref",
        "--beta",
        "0.7",
    ];
    let files = [
        "--data",
        data,
        "--subset-column",
        "subset",
        "--plots",
        plots.to_str().unwrap(),
    ];
    let done = bradley(&server, &[&scoring[..], &files].concat());
    assert!(done.status.success(), "{done:?}");
    let table = String::from_utf8(done.stdout).unwrap();
    for line in table.lines() {
        assert!(line.width() <= 80, "{} columns: {line}", line.width());
    }
    for part in [
        "models/tiny",
        "models/ref",
        "60 pairs",
        "subset code",
        "AUC",
        "calibration",
    ] {
        assert!(table.contains(part), "no {part:?} in:\n{table}");
    }
    for name in ["reliability.svg", "margins.svg"] {
        let svg = std::fs::read_to_string(plots.join(name)).unwrap();
        assert!(
            svg.starts_with("<svg") && svg.contains("</svg>"),
            "{name}: {svg}"
        );
    }
    // The upload is gone.
    assert_eq!(number_of_datasets(&client).await, 0);

    let dataset = upload(&client, &file).await;
    let (_, report) = evaluate(&client, request(&dataset)).await.unwrap();
    let of_dataset = ["--dataset", "@last", "--format", "json"];
    let done = bradley(&server, &[&scoring[..], &of_dataset].concat());
    assert!(done.status.success(), "{done:?}");
    let printed: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(printed["dataset"], dataset.name);
    let auc = report.probability.as_ref().unwrap().auc;
    assert_eq!(printed["probability"]["auc"].as_f64(), Some(auc));
    assert_eq!(
        number_of_datasets(&client).await,
        1,
        "a named dataset stays"
    );
    // The server has the rows already, and they stay.
    let done = bradley(
        &server,
        &[&scoring[..], &["--data", data, "--format", "yaml"]].concat(),
    );
    assert!(done.status.success(), "{done:?}");
    assert!(String::from_utf8(done.stdout).unwrap().contains("auc: "));
    assert_eq!(number_of_datasets(&client).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_command_deletes_its_upload() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &[]);
    let client = server.client().await;
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, &rows(MANY_ROWS));
    let child = Command::new(crate::support::binary())
        .args(["evaluate", "--policy", "tiny", "--reference", "ref"])
        .args(["--server", &server.address, "--data"])
        .arg(&file)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("a scored pair", Duration::from_secs(60), async || {
        server.scored_pairs() > 0
    })
    .await;
    assert_eq!(number_of_datasets(&client).await, 1);
    crate::backends::signal(child.id(), libc::SIGINT);
    let done = child.wait_with_output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(130), "{said}");
    assert!(!said.contains("remains on the server"), "{said}");
    assert_eq!(number_of_datasets(&client).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_fails_for_bad_rows_unless_they_may_be_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &[]);
    let client = server.client().await;
    let mut bad = rows(12);
    bad[4]["prompt"] = json!("long ".repeat(400));
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, &bad);
    let data = file.to_str().unwrap();
    let scoring = [
        "evaluate",
        "--policy",
        "tiny",
        "--reference",
        "ref",
        "--max-length",
        "128",
    ];
    let done = bradley(&server, &[&scoring[..], &["--data", data]].concat());
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(
        said.contains("row 5 (id \"4\"): prompt") && said.contains("--skip-bad-rows"),
        "{said}"
    );
    let done = bradley(
        &server,
        &[&scoring[..], &["--data", data, "--skip-bad-rows"]].concat(),
    );
    assert!(done.status.success(), "{done:?}");
    assert!(
        String::from_utf8(done.stdout)
            .unwrap()
            .contains("11 pairs scored, 1 without")
    );
    assert_eq!(number_of_datasets(&client).await, 0);

    let done = bradley(
        &server,
        &[
            "evaluate",
            "--policy",
            "tiny",
            "--score-columns",
            "a",
            "--data",
            data,
        ],
    );
    assert_eq!(done.status.code(), Some(2), "{done:?}");
    let target = "/proc/no-such-folder/plots";
    let done = bradley(
        &server,
        &[
            &scoring[..],
            &["--data", data, "--skip-bad-rows", "--plots", target],
        ]
        .concat(),
    );
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(
        done.status.code() == Some(1) && said.contains(target),
        "{said}"
    );
}

/// Returns the number of calibrations in a server's database.
async fn stored_calibrations(server: &Server) -> i64 {
    let database = server.data_dir.join("bradley.db");
    assert!(database.is_file(), "{}", database.display());
    let url = format!("sqlite://{}", database.display());
    let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
    sqlx::query_scalar("SELECT COUNT(*) FROM calibrations")
        .fetch_one(&mut connection)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_calibration_belongs_to_exactly_its_checkpoint_and_options() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &[]);
    let client = server.client().await;
    let trained = crate::server::upload(&client, "pairs.jsonl").await;
    let mut wanted = job(&trained.name, 2);
    wanted.run = Some(pb::RunConfig {
        save_steps: Some(1),
        ..Default::default()
    });
    let name = submit(&client, wanted).await;
    finish(&client, &name).await;
    let of_step = |step: u64| pb::ScoringOptions {
        policy: format!("{name}/checkpoints/{step}"),
        ..Default::default()
    };
    // Swaps answers until the policy is wrong about exactly the quarter of the pairs with the
    // smallest margins: if it were right about all pairs, no temperature could be fitted.
    let mut rows = rows(80);
    let raw = score_rows_with(&client, of_step(2), &rows).await;
    let mut sizes: Vec<f64> = raw.iter().map(|score| score.margin.abs()).collect();
    sizes.sort_by(f64::total_cmp);
    for (row, score) in rows.iter_mut().zip(&raw) {
        assert_eq!(score.calibrated_probability, None);
        if (score.margin > 0.0) == (score.margin.abs() < sizes[sizes.len() / 4]) {
            let chosen = row["chosen"].take();
            row["chosen"] = std::mem::replace(&mut row["rejected"], chosen);
        }
    }
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, &rows);
    let dataset = upload(&client, &file).await;
    let saving = pb::EvaluatePolicyRequest {
        options: Some(of_step(2)),
        save_calibration: true,
        ..request(&dataset)
    };
    let (_, report) = evaluate(&client, saving.clone()).await.unwrap();
    let calibration = report.calibration.as_ref().unwrap();
    assert!(calibration.saved, "{}", calibration.problem);
    assert_eq!(stored_calibrations(&server).await, 1);

    let raw = score_rows_with(&client, of_step(1), &rows).await;
    assert!(
        raw.iter()
            .all(|score| score.calibrated_probability.is_none())
    );
    let expected = |score: &pb::PairScore| {
        let tokens =
            |answer: &Option<pb::CompletionScore>| f64::from(answer.as_ref().unwrap().tokens);
        let difference = tokens(&score.a) - tokens(&score.b);
        let margin =
            score.margin / calibration.temperature + calibration.length_coefficient * difference;
        sigmoid(margin)
    };
    let scores = score_rows_with(&client, of_step(2), &rows).await;
    for score in &scores {
        assert_eq!(score.calibrated_probability, Some(expected(score)));
        assert_eq!(score.probability, sigmoid(score.margin));
    }
    // The reference and beta of the job, by their names.
    let named = pb::ScoringOptions {
        reference: "models/tiny".into(),
        beta: Some(report.beta),
        ..of_step(2)
    };
    let named = score_rows_with(&client, named, &rows).await;
    assert_eq!(named, scores);
    let others = [
        pb::ScoringOptions {
            reference: "models/ref".into(),
            ..of_step(2)
        },
        pb::ScoringOptions {
            beta: Some(report.beta * 2.0),
            ..of_step(2)
        },
        pb::ScoringOptions {
            normalization: pb::RewardNormalization::Mean.into(),
            ..of_step(2)
        },
        options(),
    ];
    for other in others {
        let scores = score_rows_with(&client, other.clone(), &rows[..2]).await;
        assert_eq!(scores[0].calibrated_probability, None, "{other:?}");
    }

    // A second one replaces it. The command line shows both.
    let checkpoint = format!("{name}/checkpoints/2");
    let data = file.to_str().unwrap();
    let arguments = [
        "evaluate",
        "--policy",
        &checkpoint,
        "--data",
        data,
        "--save-calibration",
    ];
    let done = bradley(&server, &arguments);
    assert!(done.status.success(), "{done:?}");
    assert!(
        String::from_utf8(done.stdout)
            .unwrap()
            .contains("saved with the checkpoint")
    );
    assert_eq!(stored_calibrations(&server).await, 1);
    let arguments = [
        "score",
        "--policy",
        &checkpoint,
        "--data",
        data,
        "--format",
        "json",
    ];
    let done = bradley(&server, &arguments);
    let first = String::from_utf8(done.stdout).unwrap();
    let first: Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
    assert_eq!(
        first["calibrated_probability"].as_f64(),
        Some(expected(&scores[0]))
    );

    let csv = bradley(&server, &[&arguments[..5], &["--format", "csv"]].concat());
    let csv = String::from_utf8(csv.stdout).unwrap();
    let cell = csv.lines().nth(1).unwrap().split(',').nth(4).unwrap();
    assert_eq!(cell.parse().ok(), Some(expected(&scores[0])), "{csv}");
    let table = bradley(&server, &arguments[..5]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.lines().next().unwrap().contains("calibrated")
            && table.contains(&format!("{:.4}", expected(&scores[0]))),
        "{table}"
    );
    let folder = dir.path().join("scored");
    let (name, out) = (arguments[2], folder.to_str().unwrap());
    let files = ["score-files", "--policy", name, "--in", data, "--out", out];
    let files = [&files[..], &["--out-format", "jsonl"]].concat();
    let done = bradley(&server, &files);
    assert!(done.status.success(), "{done:?}");
    let part = std::fs::read_dir(&folder).unwrap();
    let part = part
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "jsonl"))
        .unwrap();
    let part = std::fs::read_to_string(part).unwrap();
    assert_eq!(part.lines().count(), scores.len());
    for (line, score) in part.lines().zip(&scores) {
        let row: Value = serde_json::from_str(line).unwrap();
        let calibrated = row["calibrated_probability"].as_f64();
        assert_eq!(calibrated, score.calibrated_probability);
    }
    // Parts of two calibrations are not mixed.
    let file = dir.path().join("fewer.jsonl");
    write_rows(&file, &rows[..60]);
    let fewer = upload(&client, &file).await;
    let of_fewer = pb::EvaluatePolicyRequest {
        dataset: fewer.name,
        ..saving.clone()
    };
    let (_, report) = evaluate(&client, of_fewer).await.unwrap();
    assert!(report.calibration.is_some_and(|c| c.saved));
    let refused = bradley(&server, &files);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        refused.status.code() == Some(2)
            && said.contains("--save-calibration stored (there: ")
            && said.contains("temperature"),
        "{said}"
    );
    let (_, report) = evaluate(&client, saving).await.unwrap();
    assert!(report.calibration.is_some_and(|c| c.saved));

    // A backup has it, and it goes with its checkpoint.
    let other = tempfile::tempdir().unwrap();
    let (backup, restored) = (other.path().join("backup"), other.path().join("data"));
    for (command, from, to) in [
        ("backup", &backup, dir.path()),
        ("restore", &backup, restored.as_path()),
    ] {
        let done = Command::new(crate::support::binary())
            .arg(command)
            .arg(from)
            .arg("--data-dir")
            .arg(to)
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
    }
    drop(server);
    let server = serve(&restored, &[]);
    let client = server.client().await;
    assert_eq!(score_rows_with(&client, of_step(2), &rows).await, scores);
    let delete = pb::DeleteCheckpointRequest { name: checkpoint };
    client
        .checkpoints()
        .delete_checkpoint(delete)
        .await
        .unwrap();
    assert_eq!(stored_calibrations(&server).await, 0);
}
