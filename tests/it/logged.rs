//! Log-probs that rows carry: jobs that train on them without a reference, and scores without a
//! model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bradley::rpc::client::{Client, Status};
use bradley::rpc::pb::{self, training_event::Event};
use serde_json::{Value, json};
use tonic_types::StatusExt as _;

use crate::attacks::{Column, write_parquet};
use crate::references::{golden_job, models};
use crate::server::{
    Server, create, finish, get, job, job_error_reason, pairs, pause, reason, resume, score,
    scored, state, submit, succeed, upload,
};
use crate::support::{assert_close, golden, numbers};

const TINY: &str = "models/tiny";

/// Writes rows as JSONL and uploads them.
async fn upload_rows(client: &Client, dir: &Path, rows: &[Value]) -> pb::Dataset {
    let file = write_rows(dir, rows);
    upload_file(client, &file).await
}

fn write_rows(dir: &Path, rows: &[Value]) -> PathBuf {
    let file = dir.join("rows.jsonl");
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    std::fs::write(&file, lines.join("\n")).unwrap();
    file
}

async fn upload_file(client: &Client, file: &Path) -> pb::Dataset {
    let metadata = pb::UploadMetadata::default();
    let uploaded = client.upload_dataset(file, metadata, |_| {}).await;
    uploaded.unwrap()
}

/// Returns the rows of pairs.jsonl with the columns that `columns` returns for each id.
fn rows_with(columns: impl Fn(&str) -> Value) -> Vec<Value> {
    let text = std::fs::read_to_string(golden("pairs.jsonl")).unwrap();
    let row = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        let added = columns(row["id"].as_str().unwrap());
        let added = added.as_object().unwrap().clone();
        row.as_object_mut().unwrap().extend(added);
        row
    };
    text.lines().map(row).collect()
}

/// Returns the golden rows with the reference log-probs that the tiny model gives.
async fn logged_rows(client: &Client) -> Vec<Value> {
    let scores = score(client, TINY, pairs()).await;
    let sums: BTreeMap<String, [f64; 2]> = scores
        .results
        .iter()
        .map(|result| {
            let pair = scored(result);
            let sum = |side: &Option<pb::CompletionScore>| side.as_ref().unwrap().reference_logprob;
            (result.id.clone(), [sum(&pair.a), sum(&pair.b)])
        })
        .collect();
    rows_with(|id| json!({"ref_chosen_logps": sums[id][0], "ref_rejected_logps": sums[id][1]}))
}

/// Returns the length of the longest prompt with an answer, in tokens.
async fn longest(client: &Client) -> u32 {
    let scores = score(client, TINY, pairs()).await;
    let answers = scores.results.iter().flat_map(|result| {
        let pair = scored(result);
        pair.a.iter().chain(&pair.b)
    });
    let lengths = answers.map(|answer| answer.prompt_tokens + answer.tokens);
    lengths.max().unwrap()
}

/// Returns the number of training pairs and scoring items whose reference log-probs were computed
/// or found in the cache.
fn references(server: &Server) -> f64 {
    let count = |name: &str| server.metric(name).unwrap_or_default();
    count("bradley_reference_cache_hits_total") + count("bradley_reference_cache_misses_total")
}

fn logged(job: pb::TrainingJob) -> pb::TrainingJob {
    pb::TrainingJob {
        reference: "logged".into(),
        ..job
    }
}

/// Follows a job that must succeed, and returns its events.
async fn events_of(client: &Client, job: pb::TrainingJob) -> Vec<pb::TrainingEvent> {
    let name = submit(client, job).await;
    let events = finish(client, &name).await;
    let ended = get(client, &name).await;
    assert_eq!(ended.state(), pb::JobState::Succeeded, "{:?}", ended.error);
    events
}

/// Returns the metrics of steps and evaluations, without times.
fn metrics(events: &[pb::TrainingEvent]) -> Vec<BTreeMap<String, f64>> {
    let of = |event: &pb::TrainingEvent| match &event.event {
        Some(Event::StepMetrics(step)) => Some(step.metrics.clone()),
        Some(Event::EvalMetrics(eval)) => Some(eval.metrics.clone()),
        _ => None,
    };
    let all = events.iter().filter_map(of);
    all.map(|metrics| metrics.into_iter().collect()).collect()
}

/// Returns the messages that a job has logged.
fn logs(events: &[pb::TrainingEvent]) -> Vec<String> {
    let of = |event: &pb::TrainingEvent| match &event.event {
        Some(Event::Log(log)) => Some(log.message.clone()),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

/// Follows a job that must fail, and returns the reason and the message of its error.
async fn failure_of(client: &Client, job: pb::TrainingJob) -> (String, String) {
    let name = submit(client, job).await;
    finish(client, &name).await;
    let ended = get(client, &name).await;
    assert_eq!(ended.state(), pb::JobState::Failed);
    let error = ended.error.unwrap();
    (job_error_reason(&error), error.message)
}

// ---- training

/// Returns jobs of four steps with an evaluation, with different losses and methods.
fn jobs(dataset: &str) -> Vec<(&'static str, pb::TrainingJob)> {
    let with = |losses: &[&str], change: fn(&mut pb::DpoConfig)| {
        let mut dpo = pb::DpoConfig {
            losses: losses
                .iter()
                .map(|loss| pb::WeightedLoss {
                    loss_type: (*loss).into(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        change(&mut dpo);
        pb::TrainingJob {
            dpo: Some(dpo),
            evaluation: Some(pb::training_job::Evaluation::EvalFraction(0.3)),
            run: Some(pb::RunConfig {
                eval_steps: Some(2),
                eval_on_start: true,
                ..Default::default()
            }),
            ..job(dataset, 4)
        }
    };
    let mut full = with(&["sigmoid"], |_| {});
    full.method = Some(pb::training_job::Method::Full(pb::FullConfig {}));
    full.optimizer = Some(pb::OptimizerConfig {
        learning_rate: Some(1e-3),
        ..Default::default()
    });
    vec![
        ("full", full),
        (
            "dpop and rpo",
            with(&["sigmoid"], |dpo| {
                (dpo.dpop_lambda, dpo.rpo_alpha) = (Some(5.0), Some(0.5));
            }),
        ),
        ("means", with(&["ipo"], |_| {})),
        ("sorted", with(&["aot"], |_| {})),
        (
            "mix",
            with(&["sigmoid_norm", "apo_zero", "sft"], |dpo| {
                dpo.use_weighting = true
            }),
        ),
        (
            "divergence",
            with(&["sigmoid"], |dpo| {
                dpo.f_divergence = "js_divergence".into()
            }),
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_on_logged_log_probs_is_the_job_that_computes_them() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let rows = logged_rows(&client).await;
    let dataset = upload_rows(&client, dir.path(), &rows).await;
    // The upload says what the columns are for.
    let report = dataset.report.unwrap();
    assert_eq!((report.valid_rows, report.counts["ignored_field"]), (6, 12));
    let about = &report.issues[0];
    assert!(
        about
            .message
            .contains("is used only by jobs with reference logged"),
        "{about:?}"
    );
    for (what, ordinary) in jobs(&dataset.name) {
        let before = references(&server);
        let with = events_of(&client, logged(ordinary.clone())).await;
        assert_eq!(
            references(&server),
            before,
            "{what}: a reference was asked for"
        );
        let agreement = logs(&with);
        assert!(
            agreement.len() == 1 && agreement[0].contains("6 sampled pairs agree"),
            "{what}: {agreement:?}"
        );
        let without = events_of(&client, ordinary).await;
        let said = logs(&without);
        assert!(
            said.len() == 1 && said[0].starts_with("6 rows have ref_chosen_logps"),
            "{what}: {said:?}"
        );
        let (with, without) = (metrics(&with), metrics(&without));
        assert_eq!((with.len(), without.len()), (7, 7), "{what}");
        for (i, (got, want)) in with.iter().zip(&without).enumerate() {
            assert!(got.keys().eq(want.keys()), "{what} {i}");
            for (name, want) in want {
                assert_close(&format!("{what} {i} {name}"), got[name], *want, 1e-6, 1e-9);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probs_of_transformers_train_as_trl_does() {
    let data = tempfile::tempdir().unwrap();
    let adapters = golden("adapters");
    let server = Server::start_with(
        data.path(),
        &models(&["llama", "qwen2"]),
        &["--adapter-dir", adapters.to_str().unwrap()],
    );
    let client = server.client().await;
    for case in crate::support::json("references.json").as_array().unwrap() {
        let sum = |id: &str, side: &str| -> f64 {
            numbers(&case["scores"][id][side]["reference"]).iter().sum()
        };
        let rows = rows_with(|id| {
            json!({
                "ref_chosen_logps": sum(id, "chosen"),
                "ref_rejected_logps": sum(id, "rejected"),
            })
        });
        let dataset = upload_rows(&client, data.path(), &rows).await.name;
        for kind in ["full", "lora"] {
            let on_rows = logged(golden_job(&dataset, case, kind));
            // The reference is another model than the one that the job starts from.
            let (reason, message) = failure_of(&client, on_rows.clone()).await;
            assert_eq!(reason, "DATASET_INVALID", "{message}");
            for part in [
                "row ",
                "_logps is -",
                "the weights that the job starts from give -",
            ] {
                assert!(message.contains(part), "{message}");
            }
            let warned = pb::TrainingJob {
                logged_check: "warn".into(),
                ..on_rows
            };
            let events = events_of(&client, warned).await;
            let said = logs(&events);
            let warning = said
                .iter()
                .find(|said| said.contains("of 6 sampled pairs disagree"));
            assert!(warning.is_some(), "{said:?}");
            let want = case["runs"][kind]["steps"].as_array().unwrap();
            let got = metrics(&events);
            assert_eq!(got.len(), want.len());
            for (k, (got, want)) in got.iter().zip(want).enumerate() {
                for (metric, value) in want.as_object().unwrap() {
                    let what = format!("{} {kind} step {} {metric}", case["policy"], k + 1);
                    let tolerance = match metric.as_str() {
                        "loss" | "grad_norm" => 1e-4,
                        _ => 1e-3,
                    };
                    assert_close(&what, got[metric], value.as_f64().unwrap(), tolerance, 1e-2);
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_goes_on_with_the_same_log_probs() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let rows = logged_rows(&client).await;
    let dataset = upload_rows(&client, dir.path(), &rows).await.name;
    // The job must last for seconds, because a busy machine may pause it late.
    let long = logged(job(&dataset, 300));
    let undisturbed = submit(&client, long.clone()).await;
    let undisturbed = succeed(&client, &undisturbed).await;
    let paused = submit(&client, long).await;
    pause(&client, &paused).await;
    assert_eq!(state(&client, &paused).await, pb::JobState::Paused);
    resume(&client, &paused).await.unwrap();
    assert_eq!(succeed(&client, &paused).await, undisturbed);
    // Its checkpoints are scored against the weights that the policy started from.
    let scores = score(&client, &format!("{paused}/checkpoints/latest"), pairs()).await;
    assert_eq!(scores.reference_version, TINY);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_without_usable_log_probs_is_refused_by_its_number() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let rows = logged_rows(&client).await;
    let changes: [(&str, Value, &str); 4] = [
        (
            "ref_chosen_logps",
            Value::Null,
            "ref_chosen_logps is missing, but the row has ref_rejec",
        ),
        (
            "ref_rejected_logps",
            json!(0.5),
            "ref_rejected_logps is 0.5: a log-prob is a finite",
        ),
        (
            "ref_chosen_logps",
            json!("-3"),
            "ref_chosen_logps is \"-3\": it must be one number",
        ),
        (
            "",
            Value::Null,
            "ref_chosen_logps and ref_rejected_logps are missing",
        ),
    ];
    for (column, value, expected) in changes {
        let mut rows = rows.clone();
        let row = rows[2].as_object_mut().unwrap();
        match column {
            "" => row.retain(|name, _| !name.ends_with("_logps")),
            column => drop(row.insert(column.to_owned(), value)),
        }
        let dataset = upload_rows(&client, dir.path(), &rows).await;
        let report = dataset.report.unwrap();
        // Other jobs can use the row; the upload warns of it.
        assert_eq!(report.valid_rows, 6, "{report:?}");
        let warned = report
            .issues
            .iter()
            .find(|i| i.message.starts_with(expected));
        assert_eq!(
            warned.map(|i| i.row),
            (!column.is_empty()).then_some(3),
            "{report:?}"
        );
        let job = logged(job(&dataset.name, 1));
        let refused = create(&client, job.clone()).await.unwrap_err();
        assert_eq!(reason(&refused), "DATASET_INVALID", "{refused:?}");
        let message = refused.message();
        assert!(
            message.contains("has 1 rows that cannot be used with reference logged"),
            "{message}"
        );
        assert!(
            message.contains("row 3, ")
                && message.contains(" missing_field: ")
                && message.contains(expected),
            "{message}"
        );
        let skipping = pb::TrainingJob {
            row_policy: pb::RowPolicy::Skip.into(),
            ..job
        };
        let name = submit(&client, skipping).await;
        finish(&client, &name).await;
        let ended = get(&client, &name).await;
        assert_eq!(ended.state(), pb::JobState::Succeeded, "{:?}", ended.error);
        assert!(
            ended.skipped_rows.len() == 1 && ended.skipped_rows[0].starts_with("row 3, ref_"),
            "{:?}",
            ended.skipped_rows
        );
    }
    // The estimate reads the rows, too.
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let request = pb::EstimateTrainingJobRequest {
        training_job: Some(logged(job(&dataset, 1))),
    };
    let refused = client.training().estimate_training_job(request).await;
    let refused = refused.unwrap_err();
    assert!(refused.message().contains("6 rows"), "{refused:?}");
    // Without any log-prob, there is no row left to train on. Evaluation rows need them, too.
    let skipping = pb::TrainingJob {
        row_policy: pb::RowPolicy::Skip.into(),
        ..logged(job(&dataset, 1))
    };
    let refused = create(&client, skipping).await.unwrap_err();
    assert_eq!(reason(&refused), "DATASET_INVALID", "{refused:?}");
    assert!(
        refused.message().contains("row 1, ref_chosen_logps")
            && refused.message().contains("No other row is left"),
        "{refused:?}"
    );
    let with_logps = upload_rows(&client, dir.path(), &rows).await.name;
    let evaluated = pb::TrainingJob {
        evaluation: Some(pb::training_job::Evaluation::EvalDataset(dataset)),
        ..logged(job(&with_logps, 1))
    };
    let refused = create(&client, evaluated).await.unwrap_err();
    assert!(refused.message().contains("6 rows"), "{refused:?}");
    // max_length cuts an answer whose log-prob is that of all its tokens.
    let dataset = upload_rows(&client, dir.path(), &rows).await.name;
    let mut short = logged(job(&dataset, 1));
    short.batch.as_mut().unwrap().max_length = Some(longest(&client).await - 1);
    let (_, message) = failure_of(&client, short.clone()).await;
    assert!(
        message.contains("truncated: max_length cuts ") && message.contains("raise max_length"),
        "{message}"
    );
    // A job that would skip every row says why.
    short.row_policy = pb::RowPolicy::Skip.into();
    short.batch.as_mut().unwrap().max_length = Some(2);
    let (_, message) = failure_of(&client, short).await;
    assert!(
        message.contains("no row left") && message.contains("raise max_length"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_need_more_than_sums_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let rows = logged_rows(&client).await;
    let dataset = upload_rows(&client, dir.path(), &rows).await.name;
    let refused = async |field: &str, job: pb::TrainingJob| {
        let status: Status = create(&client, job).await.unwrap_err();
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations.len(), 1, "{violations:?}");
        assert_eq!(violations[0].field, field, "{violations:?}");
        violations[0].description.clone()
    };
    let with = |dpo: pb::DpoConfig| pb::TrainingJob {
        dpo: Some(dpo),
        ..logged(job(&dataset, 1))
    };
    for loss in ["sft", "simpo", "orpo"] {
        let losses = vec![pb::WeightedLoss {
            loss_type: loss.into(),
            ..Default::default()
        }];
        let said = refused(
            "training_job.reference",
            with(pb::DpoConfig {
                losses,
                ..Default::default()
            }),
        )
        .await;
        assert!(said.contains(loss), "{said}");
    }
    let reference_free = pb::DpoConfig {
        reference_free: true,
        ..Default::default()
    };
    refused("training_job.reference", with(reference_free)).await;
    let ld_alpha = pb::DpoConfig {
        ld_alpha: Some(0.5),
        ..Default::default()
    };
    refused("training_job.dpo.ld_alpha", with(ld_alpha)).await;
    let moving = pb::TrainingJob {
        method: Some(pb::training_job::Method::Full(pb::FullConfig {})),
        ..with(pb::DpoConfig {
            reference_sync: Some(pb::ReferenceSync::default()),
            ..Default::default()
        })
    };
    refused("training_job.dpo.reference_sync", moving).await;
    let checked = |reference: &str, check: &str| pb::TrainingJob {
        reference: reference.into(),
        logged_check: check.into(),
        ..job(&dataset, 1)
    };
    refused("training_job.logged_check", checked(TINY, "warn")).await;
    refused("training_job.logged_check", checked("logged", "maybe")).await;
    // The answer to a job is a job for the same.
    for (check, answered) in [("", "fail"), ("warn", "warn")] {
        let request = pb::CreateTrainingJobRequest {
            training_job: Some(checked("logged", check)),
            validate_only: true,
            ..Default::default()
        };
        let answer = client.training().create_training_job(request).await;
        let answer = answer.unwrap().into_inner();
        assert_eq!(
            (&*answer.reference, &*answer.logged_check),
            ("logged", answered)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parquet_has_the_same_log_probs() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let text = |texts: [&'static str; 4]| Column::Text(texts.map(Some).to_vec());
    let file = dir.path().join("rows.parquet");
    let columns = vec![
        text(["1 2", "2 3", "3 4", "4 5"]),
        text([" 3", " 4", " 5", " 6"]),
        text([" 0"; 4]),
        Column::Float(vec![Some(-1.5), Some(-2.5), Some(f32::NAN), None]),
        Column::Double(vec![Some(-3.5), Some(-4.5), Some(-1.0), None]),
    ];
    let schema = "required binary prompt (UTF8); required binary chosen (UTF8);
                  required binary rejected (UTF8); optional float ref_chosen_logps;
                  optional double ref_rejected_logps;";
    write_parquet(&file, schema, columns);
    let dataset = upload_file(&client, &file).await;
    let report = dataset.report.unwrap();
    assert_eq!(report.valid_rows, 4, "{report:?}");
    let problem = report.issues.iter().find(|issue| issue.row == 3).unwrap();
    assert!(
        problem.message.starts_with("ref_chosen_logps is \"NaN\""),
        "{problem:?}"
    );
    let job = pb::TrainingJob {
        row_policy: pb::RowPolicy::Skip.into(),
        logged_check: "warn".into(),
        ..logged(job(&dataset.name, 1))
    };
    let name = submit(&client, job).await;
    let events = finish(&client, &name).await;
    let ended = get(&client, &name).await;
    assert_eq!(ended.state(), pb::JobState::Succeeded, "{:?}", ended.error);
    assert_eq!(ended.skipped_rows.len(), 2, "{:?}", ended.skipped_rows);
    // β·(log π − log π_ref), with log π from the metrics and the means of log π_ref.
    let first = &metrics(&events)[0];
    for (side, mean) in [("chosen", -2.0), ("rejected", -4.0)] {
        let expected = 0.1 * (first[&format!("logps/{side}")] - mean);
        assert_close(side, first[&format!("rewards/{side}")], expected, 1e-9, 1.0);
    }
}

// ---- scoring

fn options(reference: &str) -> pb::ScoringOptions {
    pb::ScoringOptions {
        policy: TINY.into(),
        reference: reference.into(),
        ..Default::default()
    }
}

async fn score_pairs(
    client: &Client,
    options: pb::ScoringOptions,
    pairs: Vec<pb::Pair>,
) -> pb::ScorePairsResponse {
    let request = pb::ScorePairsRequest {
        options: Some(options),
        pairs,
    };
    let answer = client.scoring().score_pairs(request).await;
    answer.unwrap().into_inner()
}

/// Returns the log-probs of a score, as a later request carries them.
fn logged_of(pair: &pb::PairScore) -> pb::LoggedLogprobs {
    let (a, b) = (pair.a.as_ref().unwrap(), pair.b.as_ref().unwrap());
    pb::LoggedLogprobs {
        reference_a: Some(a.reference_logprob),
        reference_b: Some(b.reference_logprob),
        policy_a: Some(a.policy_logprob),
        policy_b: Some(b.policy_logprob),
        tokens_a: Some(a.tokens),
        tokens_b: Some(b.tokens),
    }
}

/// Returns the same without the policy's.
fn of_reference(logged: pb::LoggedLogprobs) -> pb::LoggedLogprobs {
    pb::LoggedLogprobs {
        reference_a: logged.reference_a,
        reference_b: logged.reference_b,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pairs_with_log_probs_have_the_scores_of_the_models_that_gave_them() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = format!("tiny={}", golden("models/llama").display());
    let server = Server::start_with(
        dir.path(),
        &format!("{tiny},{}", models(&["llama-ref"])),
        &[],
    );
    let client = server.client().await;
    for normalization in [pb::RewardNormalization::Sum, pb::RewardNormalization::Mean] {
        let options = |reference: &str| pb::ScoringOptions {
            normalization: normalization.into(),
            ..options(reference)
        };
        let computed = score_pairs(&client, options("models/llama-ref"), pairs()).await;
        let with = |change: &dyn Fn(pb::Pair, pb::LoggedLogprobs) -> pb::Pair| -> Vec<pb::Pair> {
            let all = pairs().into_iter().zip(&computed.results);
            all.map(|(pair, result)| change(pair, logged_of(scored(result))))
                .collect()
        };
        let on_reference = with(&|pair, logged| pb::Pair {
            logged: Some(of_reference(logged)),
            ..pair
        });
        let without_texts = with(&|pair, logged| pb::Pair {
            id: pair.id,
            logged: Some(logged),
            ..Default::default()
        });
        let before = references(&server);
        for (what, pairs) in [("reference", on_reference), ("both", without_texts)] {
            let got = score_pairs(&client, options(""), pairs).await;
            // Policy and default reference are the same model, which does not matter here.
            assert_eq!(got.warnings, [""; 0], "{what}");
            for (got, want) in got.results.iter().zip(&computed.results) {
                assert_eq!(got.id, want.id);
                let (got, want) = (scored(got), scored(want));
                assert!(got.logged && !want.logged);
                assert_eq!(
                    (got.margin, got.probability),
                    (want.margin, want.probability)
                );
                let (got, want) = (got.a.as_ref().unwrap(), want.a.as_ref().unwrap());
                assert_eq!(
                    (
                        got.policy_logprob,
                        got.reference_logprob,
                        got.reward,
                        got.tokens
                    ),
                    (
                        want.policy_logprob,
                        want.reference_logprob,
                        want.reward,
                        want.tokens
                    ),
                    "{what}"
                );
            }
        }
        assert_eq!(references(&server), before, "a reference was asked for");
    }
    assert_eq!(server.scored_pairs(), 36);
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probs_that_give_no_score_are_errors_of_their_pair() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let good = pb::LoggedLogprobs {
        reference_a: Some(-1.0),
        reference_b: Some(-2.0),
        ..Default::default()
    };
    let both = pb::LoggedLogprobs {
        policy_a: Some(-3.0),
        policy_b: Some(-4.0),
        ..good
    };
    let sum = pb::RewardNormalization::Sum;
    let mean = pb::RewardNormalization::Mean;
    let cases = [
        (
            "reference_b",
            sum,
            pb::LoggedLogprobs {
                reference_b: None,
                ..good
            },
        ),
        (
            "reference_a",
            sum,
            pb::LoggedLogprobs {
                reference_a: Some(0.1),
                ..good
            },
        ),
        (
            "reference_b",
            sum,
            pb::LoggedLogprobs {
                reference_b: Some(f64::NAN),
                ..good
            },
        ),
        (
            "policy_a",
            sum,
            pb::LoggedLogprobs {
                policy_a: None,
                ..both
            },
        ),
        (
            "reference_a",
            sum,
            pb::LoggedLogprobs {
                reference_a: None,
                reference_b: None,
                ..both
            },
        ),
        (
            "tokens_a",
            sum,
            pb::LoggedLogprobs {
                tokens_a: Some(3),
                ..good
            },
        ),
        (
            "tokens_b",
            sum,
            pb::LoggedLogprobs {
                tokens_b: Some(0),
                ..both
            },
        ),
        (
            "tokens_b",
            mean,
            pb::LoggedLogprobs {
                tokens_a: Some(3),
                ..both
            },
        ),
    ];
    for (field, normalization, logged) in cases {
        let pair = |logged| pb::Pair {
            logged: Some(logged),
            ..pairs().remove(0)
        };
        let options = pb::ScoringOptions {
            normalization: normalization.into(),
            ..options("")
        };
        // The other pair keeps its score.
        let answer = score_pairs(&client, options, vec![pair(logged), pair(good)]).await;
        let Some(pb::pair_result::Result::Error(error)) = &answer.results[0].result else {
            panic!("{logged:?} is accepted: {answer:?}")
        };
        let message = &error.message;
        assert!(
            message.contains(&format!("pair.logged.{field}")),
            "{field}: {message}"
        );
        assert!(scored(&answer.results[1]).logged);
    }
    // A cut answer.
    let cut = pb::ScoringOptions {
        max_length: Some(longest(&client).await - 1),
        ..options("")
    };
    let long: Vec<pb::Pair> = pairs()
        .into_iter()
        .map(|pair| pb::Pair {
            logged: Some(good),
            ..pair
        })
        .collect();
    let answer = score_pairs(&client, cut, long).await;
    let said = format!("{answer:?}");
    assert!(said.contains("max_length cuts prompt + answer"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_reference_checks_a_sample_of_the_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let text = |text: String| {
        Some(pb::Text {
            form: Some(pb::text::Form::Plain(text)),
        })
    };
    let many: Vec<pb::Pair> = (0..200)
        .map(|i| pb::Pair {
            id: i.to_string(),
            prompt: text("Count:".into()),
            a: text(format!(" {i} and {}", i * 7)),
            b: text(format!(" no {i}")),
            ..Default::default()
        })
        .collect();
    let computed = score_pairs(&client, options(TINY), many.clone()).await;
    let with = |shift: f64| -> Vec<pb::Pair> {
        let all = many.iter().zip(&computed.results);
        all.map(|(pair, result)| {
            let mut logged = of_reference(logged_of(scored(result)));
            logged.reference_b = logged.reference_b.map(|sum| sum - shift);
            pb::Pair {
                logged: Some(logged),
                ..pair.clone()
            }
        })
        .collect()
    };
    let errors = async |reference: &str, shift: f64| -> Vec<String> {
        let answer = score_pairs(&client, options(reference), with(shift)).await;
        let results = answer.results.into_iter();
        results
            .filter_map(|result| match result.result {
                Some(pb::pair_result::Result::Error(error)) => Some(error.message),
                _ => None,
            })
            .collect()
    };
    assert_eq!(errors(TINY, 0.0).await, [""; 0]);
    assert_eq!(errors("", 1.0).await, [""; 0], "nothing to compare with");
    let found = errors(TINY, 1.0).await;
    assert!((2..60).contains(&found.len()), "{} of 200", found.len());
    for part in [
        "pair.logged.reference_b",
        "options.reference gives -",
        "1.0000 nats apart",
    ] {
        assert!(
            found.iter().all(|message| message.contains(part)),
            "{found:?}"
        );
    }
}

// ---- the command line

fn bradley(server: &Server, args: &[&str]) -> (Output, String) {
    let out = Command::new(crate::support::binary())
        .args(args)
        .env_remove("BRADLEY_CONFIG")
        .env("BRADLEY_SERVER", &server.address)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    (out, said)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_scores_and_trains_on_the_columns() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let mut rows = logged_rows(&client).await;
    for row in &mut rows {
        // A policy that has learnt the pair.
        let logged = |column: &str| row[column].as_f64().unwrap();
        let (chosen, rejected) = (logged("ref_chosen_logps"), logged("ref_rejected_logps"));
        row["chosen_logps"] = json!(chosen / 2.0);
        row["rejected_logps"] = json!(rejected * 2.0);
    }
    let file = write_rows(dir.path(), &rows);
    let file = file.to_str().unwrap();
    let score = |more: &[&str]| {
        let args = [
            "score", "--policy", "tiny", "--format", "json", "--data", file,
        ];
        let (out, said) = bradley(&server, &[&args[..], more].concat());
        let lines: Vec<Value> = String::from_utf8(out.stdout)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        (out.status.success(), lines, said)
    };
    let (is_success, lines, said) = score(&[]);
    assert!(is_success, "{said}");
    let unused = "6 rows have fields that are not used, e.g. row 1: ";
    assert!(
        said.contains(unused) && said.contains("ref_chosen_logps"),
        "{said}"
    );
    assert!(
        lines
            .iter()
            .all(|line| line["margin"] == 0.0 && line.get("logged").is_none())
    );
    let (is_success, lines, said) = score(&["--logged", "reference"]);
    assert!(is_success, "{said}");
    assert!(
        said.contains(unused) && !said.contains("ref_chosen_logps"),
        "{said}"
    );
    assert!(
        lines
            .iter()
            .all(|line| line["margin"] == 0.0 && line["logged"] == true)
    );
    let (is_success, lines, said) = score(&["--logged", "both"]);
    assert!(is_success && !said.contains("not used"), "{said}");
    for (line, row) in lines.iter().zip(&rows) {
        let of = |column: &str| row[column].as_f64().unwrap();
        let margin = 0.1 * (of("chosen_logps") - of("ref_chosen_logps"))
            - 0.1 * (of("rejected_logps") - of("ref_rejected_logps"));
        assert_close(
            "margin",
            line["margin"].as_f64().unwrap(),
            margin,
            1e-12,
            1.0,
        );
    }
    // A row without the columns has an error, and CSV has the numbers of JSONL.
    let mut few = rows.clone();
    few[1].as_object_mut().unwrap().remove("ref_rejected_logps");
    write_rows(dir.path(), &few);
    let (is_success, lines, _) = score(&["--logged", "reference"]);
    assert!(!is_success);
    let error = lines[1]["error"].as_str().unwrap();
    assert!(
        error.starts_with("ref_rejected_logps is missing"),
        "{error}"
    );
    let csv = dir.path().join("rows.csv");
    std::fs::write(
        &csv,
        "prompt,chosen,rejected,theirs,ref_rejected_logps\n1 2, 3, 0,-1.5,-2.5\n",
    )
    .unwrap();
    let args = [
        "score",
        "--policy",
        "tiny",
        "--format",
        "json",
        "--logged",
        "reference",
    ];
    let mapped = [
        "--columns",
        "ref_chosen_logps=theirs",
        "--data",
        csv.to_str().unwrap(),
    ];
    let (out, said) = bradley(&server, &[&args[..], &mapped].concat());
    assert!(out.status.success(), "{said}");
    let line: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(line["chosen"]["reference_logprob"], -1.5);
    assert_eq!(line["rejected"]["reference_logprob"], -2.5);

    // Training by flags.
    let file = write_rows(dir.path(), &rows);
    let args = [
        "train",
        "--data",
        file.to_str().unwrap(),
        "--max-steps",
        "2",
        "--rank",
        "2",
    ];
    let flags = ["--reference", "logged", "--logged-check", "warn", "--watch"];
    let (out, said) = bradley(&server, &[&args[..], &flags].concat());
    let said = said + &String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{said}");
    assert!(said.contains("6 sampled pairs agree"), "{said}");
    // Only the columns that the job does not use are reported as not used.
    assert!(
        said.contains(" chosen_logps ignored_field") && !said.contains("ref_chosen_logps ignored"),
        "{said}"
    );
    // The rows of an upload are named by their file, which the caller knows.
    let eval_data = golden("pairs.jsonl");
    let more = ["--eval-data", eval_data.to_str().unwrap()];
    let (out, said) = bradley(&server, &[&args[..], &flags, &more].concat());
    assert!(!out.status.success(), "{said}");
    let expected = "error: pairs.jsonl of --eval-data has 6 rows that cannot be used with";
    assert!(
        said.contains(expected) && said.contains("Fix them: no other row is left"),
        "{said}"
    );
    assert!(!said.contains("--skip-bad-rows"), "{said}");
    write_rows(dir.path(), &few);
    let (out, said) = bradley(&server, &[&args[..], &flags].concat());
    assert!(!out.status.success(), "{said}");
    assert!(
        said.contains("error: rows.jsonl of --data has 1 rows that cannot be used with")
            && said.contains("--skip-bad-rows"),
        "{said}"
    );
}
