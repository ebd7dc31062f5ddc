//! `bradley demo`: serves, trains and scores a real model over a loopback connection.

mod model;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::args::{DemoArgs, Output};
use super::failure::{Failure, Outcome};
use super::generate::{GenerationFailure, begin, printable};
use super::loopback::LoopbackServer;
use super::output::line;
use super::output::table::terminal_width;
use super::output::wrap::wrapped;
use super::progress::waiting;
use super::score::result::Summary;
use super::score::{self, StreamedAnswer};
use super::settings::{Sources, hub};
use super::telemetry;
use super::watch::ProgressView;
use crate::domain::dataset::{PreferenceRow, Text};
use crate::rpc::client::{Client, Code};
use crate::rpc::pb::{self, training_event::Event};

/// 124 pairs in JSONL that prefer a direct answer to a padded one. A quarter of them is held out of
/// the training.
const PAIRS: &str = include_str!("demo/pairs.jsonl");
const MODEL_ID: &str = "demo";
/// Maximum time for the server to load the model.
const START_LIMIT: Duration = Duration::from_secs(120);
/// Time for which pairs are sent again while the server has no room for any of them.
const SCORING_PATIENCE: Duration = Duration::from_secs(60);
/// Maximum number of tokens of the answers that are shown.
const ANSWER_TOKENS: u32 = 48;
/// Columns before the lines of an answer.
const INDENT: usize = 5;

pub(super) async fn run(args: DemoArgs) -> Outcome {
    let start = Instant::now();
    let failed = |e: &dyn std::fmt::Display| Failure::Failed(e.to_string());
    telemetry::log("warn", false, None, None)?;
    let sources = Sources::environment();

    line("1. The model");
    let (given, for_model) = (args.model.clone(), sources.clone());
    let source = tokio::task::spawn_blocking(move || {
        model::find(given, &for_model, &hub(&for_model), &|text| {
            line(&format!("   {text}"))
        })
    })
    .await
    .map_err(|e| failed(&e))?
    .map_err(Failure::Failed)?;
    line(&format!("   {source}"));

    line("2. The server");
    let temporary = tempfile::tempdir().map_err(|e| failed(&e))?;
    let data_dir = args
        .data_dir
        .clone()
        .unwrap_or_else(|| temporary.path().join("data"));
    let flags = [
        ("models", format!("{MODEL_ID}={source}")),
        ("data_dir", data_dir.display().to_string()),
        ("precision", args.precision.clone()),
        ("device", args.device.clone()),
    ];
    let server = LoopbackServer::start(&flags, &sources).await?;
    let ready = server.connect_when_ready(START_LIMIT);
    let client = match waiting("the server loads the model", ready).await {
        Ok(client) => client,
        // If the server has ended with an error, that is the cause.
        Err(failure) => return Err(server.stop().await.err().unwrap_or(failure)),
    };
    let models = client
        .models()
        .list_models(pb::ListModelsRequest {})
        .await?
        .into_inner()
        .models;
    for m in &models {
        line(&format!(
            "   {} serves {} ({:.0}M parameters, {}) on {}",
            server.address,
            m.name,
            m.parameters as f64 / 1e6,
            m.architecture,
            m.device
        ));
    }

    line("3. The preference set: direct answers over padded ones");
    let (train_file, held_out_file) = write_split(temporary.path()).map_err(|e| failed(&e))?;
    let dataset = upload(&client, &train_file, "demo: direct over padded").await?;
    let report = dataset.report.clone().unwrap_or_default();
    let held_out = score::read(&held_out_file)?;
    line(&format!(
        "   {} holds {} rows, {} usable; {} more pairs are held out",
        dataset.name,
        report.rows,
        report.valid_rows,
        held_out.len()
    ));

    let base = format!("models/{MODEL_ID}");
    let before = score_held_out(&client, &base, &base, &held_out).await?;
    let question = held_out.first();
    let answer_before = answer(&client, &base, question).await?;

    line("4. Training a LoRA adapter with DPO");
    let job = client
        .training()
        .create_training_job(job_request(&dataset.name, args.epochs))
        .await?
        .into_inner();
    let (mut view, mut end) = (ProgressView::new(Output::Table), pb::StateChange::default());
    client
        .follow(&job.name, 0, |event| {
            if let Some(Event::StateChange(s)) = &event.event {
                end = s.clone();
            }
            view.show(&event);
            true
        })
        .await?;
    view.finish();
    if end.to() != pb::JobState::Succeeded {
        return Err(Failure::Failed(format!(
            "{} ended: {}",
            job.name, end.reason
        )));
    }

    line("5. The held-out pairs, scored through the service");
    let policy = format!("{}/checkpoints/latest", job.name);
    let after = score_held_out(&client, &policy, "", &held_out).await?;
    let answer_after = answer(&client, &policy, question).await?;
    let row = |name: &str, s: &Summary| {
        vec![
            name.into(),
            format!("{:.1}%", 100.0 * s.accuracy()),
            format!("{:.3}", s.probability()),
            format!("{:+.3}", s.margin()),
        ]
    };
    line(&super::output::table(
        &[
            "held-out pairs",
            "accuracy",
            "mean Pr(chosen ≻ rejected)",
            "mean margin",
        ],
        vec![
            row("before training", &before),
            row("after training", &after),
        ],
    ));
    line(
        "   Before training the policy is its own reference: every margin is 0, and a tie counts \
         half.",
    );
    let answers = answer_before.zip(answer_after);
    match question.map(|row| text_of(&row.prompt)).zip(answers) {
        Some((question, (before, after))) => {
            line(&format!(
                "   One of their questions, answered at temperature 0 (at most {ANSWER_TOKENS} \
                 tokens):"
            ));
            show("question", &question);
            show("before training", &before);
            show("after training", &after);
        }
        None => line("   This device cannot generate, so that no answer is shown."),
    }

    server.stop().await?;
    let peak = peak_memory_mib()
        .map(|m| format!(", peak memory {m} MiB"))
        .unwrap_or_default();
    line(&format!(
        "   {:.0} seconds in all{peak}",
        start.elapsed().as_secs_f64()
    ));
    line(&final_hints(&source, args.data_dir.as_deref(), &job.name));
    Ok(())
}

fn job_request(dataset: &str, epochs: f64) -> pb::CreateTrainingJobRequest {
    pb::CreateTrainingJobRequest {
        training_job: Some(pb::TrainingJob {
            display_name: "demo".into(),
            policy: format!("models/{MODEL_ID}"),
            dataset: dataset.into(),
            method: Some(pb::training_job::Method::Lora(pb::LoraConfig {
                rank: Some(16),
                ..Default::default()
            })),
            optimizer: Some(pb::OptimizerConfig {
                learning_rate: Some(1e-4),
                lr_scheduler_type: "cosine".into(),
                warmup_ratio: Some(0.1),
                ..Default::default()
            }),
            batch: Some(pb::BatchConfig {
                batch_size: Some(4),
                max_length: Some(512),
                epochs: Some(epochs),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Writes the training and the held-out rows to two files and returns their paths.
fn write_split(folder: &Path) -> std::io::Result<(PathBuf, PathBuf)> {
    let (train, held_out) = (folder.join("train.jsonl"), folder.join("held-out.jsonl"));
    let (mut a, mut b) = (
        std::fs::File::create(&train)?,
        std::fs::File::create(&held_out)?,
    );
    for text in PAIRS.lines().filter(|l| !l.trim().is_empty()) {
        let mut row: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)?;
        let file = if row.remove("split") == Some("heldout".into()) {
            &mut b
        } else {
            &mut a
        };
        writeln!(file, "{}", serde_json::Value::Object(row))?;
    }
    Ok((train, held_out))
}

async fn upload(client: &Client, path: &Path, title: &str) -> Result<pb::Dataset, Failure> {
    let metadata = pb::UploadMetadata {
        display_name: title.into(),
        model: format!("models/{MODEL_ID}"),
        max_length: 512,
        ..Default::default()
    };
    Ok(client.upload_dataset(path, metadata, |_| {}).await?)
}

async fn score_held_out(
    client: &Client,
    policy: &str,
    reference: &str,
    rows: &[PreferenceRow],
) -> Result<Summary, Failure> {
    let options = pb::ScoringOptions {
        policy: policy.into(),
        reference: reference.into(),
        ..Default::default()
    };
    let mut summary = Summary::default();
    let rows: Vec<_> = rows.iter().cloned().map(Ok).collect();
    let each = |answer| {
        if let StreamedAnswer::Row(row) = answer {
            summary.add(&row);
        }
        Ok(())
    };
    let rows = Box::new(rows.into_iter());
    let scoring = score::score(client, options, rows, SCORING_PATIENCE, each);
    waiting("scoring the held-out pairs", scoring).await?;
    Ok(summary)
}

/// Returns the answer of a policy at temperature 0 to the prompt of a row; `None` if the server
/// cannot generate, because it computes on a GPU.
async fn answer(
    client: &Client,
    policy: &str,
    row: Option<&PreferenceRow>,
) -> Result<Option<String>, Failure> {
    let Some(row) = row else {
        return Ok(None);
    };
    let request = pb::GenerateCompletionsRequest {
        policy: policy.to_owned(),
        prompt: Some(score::text(&row.prompt)),
        max_tokens: ANSWER_TOKENS,
        temperature: Some(0.0),
        ..Default::default()
    };
    let generating = async { begin(client, request).await?.read(|_, _| Ok(())).await };
    match waiting("answering a held-out question", generating).await {
        Ok(samples) => Ok(samples.samples.into_iter().next().map(|sample| sample.text)),
        Err(GenerationFailure::Refused(status)) if status.code() == Code::FailedPrecondition => {
            Ok(None)
        }
        Err(failure) => Err(failure.into()),
    }
}

/// Returns the text of a prompt: of its last message, if it has messages.
fn text_of(prompt: &Text) -> String {
    match prompt {
        Text::Plain(text) => text.clone(),
        Text::Chat(messages) => messages
            .last()
            .and_then(|message| message.fields().get("content")?.as_str())
            .unwrap_or_default()
            .to_owned(),
    }
}

/// Prints a text under a title, in lines that fit the terminal.
fn show(title: &str, text: &str) {
    line(&format!("   {title}:"));
    let width = terminal_width().map_or(usize::MAX, |width| width.saturating_sub(INDENT + 1));
    let shown = match text.trim() {
        "" => "(an empty answer)",
        text => text,
    };
    for wrapped_line in wrapped(&printable(shown), width) {
        line(format!("{}{wrapped_line}", " ".repeat(INDENT)).trim_end());
    }
}

/// Returns the process's peak resident memory in MiB, if the system reports it.
fn peak_memory_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}

/// Returns the last lines of the output: where the job is, and commands for the user's own pairs.
fn final_hints(source: &str, data_dir: Option<&Path>, job: &str) -> String {
    let kept = match data_dir {
        Some(dir) => format!(
            "The job {job} and its adapter are kept in {}.\n",
            dir.display()
        ),
        None => String::new(),
    };
    format!(
        "{kept}
The same with your own pairs (one {{\"prompt\", \"chosen\", \"rejected\"}} a line):
  bradley serve --models {source}
  bradley train --data pairs.jsonl --eval-fraction 0.1 --watch
  bradley score --policy trainingJobs/ID/checkpoints/latest --data pairs.jsonl
  bradley checkpoints download trainingJobs/ID/checkpoints/latest --out my-adapter"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_pairs_is_held_out_and_every_row_is_usable() {
        let folder = tempfile::tempdir().unwrap();
        let (train, held_out) = write_split(folder.path()).unwrap();
        let (train, held_out) = (
            score::read(&train).unwrap(),
            score::read(&held_out).unwrap(),
        );
        assert_eq!((train.len(), held_out.len()), (93, 31));
        assert!(
            train
                .iter()
                .all(|t| held_out.iter().all(|h| h.prompt != t.prompt))
        );
    }
}
