//! Output of the commands: tables for people; JSON, YAML and CSV for programs.

pub mod flat;
pub mod human;
pub mod table;
#[cfg(test)]
mod tests;
pub mod wrap;

use std::io::IsTerminal as _;

use serde_json::{Value, json};

use self::flat::section;
pub use self::human::{bytes, seconds};
use self::table::{Section, Shown};
use self::wrap::wrapped;
use super::args::Output;
use super::failure::Failure;
use super::progress::say;
use crate::domain::dataset::RowShape;
use crate::domain::violation::counted;
use crate::rpc::canonical::{self, Canonical, FieldSelection};
use crate::rpc::client::Timestamp;
use crate::rpc::pb;

/// Exit code if nobody reads standard output any more, as shells have it for SIGPIPE.
const EXIT_BROKEN_PIPE: i32 = 141;

/// The fields of a job that are its settings.
const JOB_SETTINGS: [&str; 13] = [
    "dpo",
    "optimizer",
    "lora",
    "full",
    "batch",
    "run",
    "seed",
    "precision",
    "row_policy",
    "chat_template_kwargs",
    "chat_template_kwargs_json",
    "eval_fraction",
    "logged_check",
];

/// Prints a line on standard output.
pub fn line(text: &str) {
    emit(&format!("{text}\n"));
}

/// Prints a line on standard error, at a terminal without a break within a word.
pub fn say_wrapped(text: &str) {
    let width = table::terminal_width().filter(|_| std::io::stderr().is_terminal());
    say(&fitted(text, width));
}

/// Breaks a text at spaces into lines that fit a terminal of this width. Without one it is not
/// divided.
fn fitted(text: &str, width: Option<usize>) -> String {
    match width.filter(|width| *width > 1) {
        // The last column of the terminal stays free, because some wrap when it is filled.
        Some(width) => wrapped(text, width - 1).join("\n"),
        None => text.to_owned(),
    }
}

/// Writes to standard output. If nobody reads it any more or the disk is full, the process ends:
/// there is nobody left to work for.
fn emit(text: &str) {
    if let Err(failure) = write(text.as_bytes()) {
        say(&format!("error: {}", failure.message()));
        std::process::exit(1)
    }
}

/// Writes to standard output. If nobody reads it any more, the process ends, as with `| head`.
///
/// # Errors
/// Returns a failure if the output cannot be written, e.g. because the disk is full.
pub fn write(bytes: &[u8]) -> Result<(), Failure> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    let written = out.write_all(bytes).and_then(|()| out.flush());
    drop(out);
    written.map_err(|e| unwritten(&e))
}

/// Returns the failure of a write to standard output. If nobody reads that any more, the process
/// ends.
pub fn unwritten(error: &std::io::Error) -> Failure {
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        std::process::exit(EXIT_BROKEN_PIPE)
    }
    Failure::Failed(format!("standard output: {error}"))
}

/// Prints one JSON document on several indented lines.
pub fn json_document(value: &Value) {
    emit(&format!("{value:#}\n"));
}

/// Prints one item of a stream.
pub fn item(output: Output, value: &Value) {
    emit(&stream_item(output, value));
}

/// Returns one item of a stream: an item of a YAML list, so that all items together are one
/// document, or else one line of JSON.
pub fn stream_item(output: Output, value: &Value) -> String {
    let list = || canonical::yaml_of(&Value::Array(vec![value.clone()])).ok();
    let yaml = (output == Output::Yaml).then(list).flatten();
    yaml.unwrap_or_else(|| format!("{value}\n"))
}

/// Prints one YAML document.
fn yaml_document(value: &Value) {
    // JSON is YAML, too.
    let text = canonical::yaml_of(value).unwrap_or_else(|_| format!("{value:#}\n"));
    emit(&text);
}

/// Renders a table with a header that fits the terminal.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    table::render(header, rows, table::terminal_width())
}

/// Prints a list: `rows` as a table with a header, or `items` as JSON, YAML or CSV.
pub fn list(output: Output, header: &[&str], rows: Vec<Vec<String>>, items: Vec<Value>) {
    match output {
        Output::Table => line(&table(header, rows)),
        Output::Json => json_document(&Value::Array(items)),
        Output::Yaml => yaml_document(&Value::Array(items)),
        Output::Csv => emit(&flat::csv(None, &items)),
    }
}

/// Prints objects as CSV with some of their fields as columns.
pub fn csv(header: &[&str], items: Vec<Value>) {
    emit(&flat::csv(Some(header), &items));
}

/// Prints one resource: one field per line, JSON, YAML, or CSV with one row.
pub fn resource(output: Output, value: &Value) {
    view(output, value, || vec![section("field", value)]);
}

/// Prints one resource: for people as the sections that `sections` returns, else as it is.
fn view(output: Output, value: &Value, sections: impl FnOnce() -> Vec<Section>) {
    match output {
        Output::Table => line(&table::render_sections(
            &sections(),
            table::terminal_width(),
        )),
        Output::Json => json_document(value),
        Output::Yaml => yaml_document(value),
        Output::Csv => emit(&flat::csv(None, std::slice::from_ref(value))),
    }
}

/// Returns the canonical form of a message.
///
/// # Errors
/// Returns a failure if the server sent a value that has no JSON form.
pub fn message<M: Canonical>(message: &M, fields: FieldSelection) -> Result<Value, Failure> {
    canonical::to_value(message, fields)
        .map_err(|e| Failure::Failed(format!("the server's answer cannot be shown: {e}")))
}

/// Returns the canonical forms of messages, without fields that are not set.
///
/// # Errors
/// The errors of [`message`].
pub fn messages<M: Canonical>(all: &[M]) -> Result<Vec<Value>, Failure> {
    all.iter()
        .map(|m| message(m, FieldSelection::Set))
        .collect()
}

/// Prints a job.
///
/// # Errors
/// The errors of [`message`].
pub fn show_job(
    output: Output,
    job: &pb::TrainingJob,
    fields: FieldSelection,
) -> Result<(), Failure> {
    let value = message(job, fields)?;
    view(output, &value, || job_sections(job, &value));
    Ok(())
}

/// Prints a job after a change: for people its name and its state, else the whole job.
///
/// # Errors
/// The errors of [`message`].
pub fn changed_job(output: Output, job: &pb::TrainingJob) -> Result<(), Failure> {
    match output {
        Output::Table => {
            line(&format!("{} is {}", job.name, state(job.state)));
            Ok(())
        }
        other => show_job(other, job, FieldSelection::Set),
    }
}

/// Prints what a command has deleted.
pub fn deleted(output: Output, name: &str) {
    done(output, "deleted", name);
}

/// Prints what a command has done with a resource: `deleted trainingJobs/ID`.
pub fn done(output: Output, what: &str, name: &str) {
    match output {
        Output::Table => line(&format!("{what} {name}")),
        other => resource(other, &json!({ what: name })),
    }
}

/// Returns the parts of a job for people: what it is and how it stands, its settings, its newest
/// metrics, and the hashes of its inputs.
fn job_sections(job: &pb::TrainingJob, value: &Value) -> Vec<Section> {
    let p = job.progress.unwrap_or_default();
    let shown = |path: &str| {
        flat::at(value, path)
            .map(|value| flat::readable(path, value))
            .unwrap_or_default()
    };
    let mut about = Section::new("job");
    about.add("name", &job.name);
    about.add("title", &job.display_name);
    about.add("state", state(job.state));
    if let Some(error) = &job.error {
        let details = flat::at(value, "error.details").and_then(Value::as_array);
        let reason = details
            .into_iter()
            .flatten()
            .find_map(|detail| detail["reason"].as_str());
        about.add("reason", reason.unwrap_or_default());
        about.add("error", &error.message);
    }
    if p.total_steps > 0 {
        let epoch = (p.epoch * 100.0).round() / 100.0;
        about.add(
            "progress",
            format!("step {} of {}, epoch {epoch}", p.step, p.total_steps),
        );
    }
    if let Some(left) = p.eta_seconds.filter(|_| job.end_time.is_none()) {
        about.add("time left", human::seconds(left));
    }
    if p.tokens > 0 {
        about.add("tokens", p.tokens.to_string());
    }
    for (title, path) in [
        ("policy", "policy"),
        ("reference", "reference"),
        ("dataset", "dataset"),
        ("evaluated on", "eval_dataset"),
        ("owner", "owner"),
        ("created", "create_time"),
        ("started", "start_time"),
        ("ended", "end_time"),
        ("stored after its end for", "ttl"),
        ("etag", "etag"),
        ("runs on", "replica"),
        ("heard at", "replica_time"),
        ("last event at", "last_event_time"),
    ] {
        about.add(title, shown(path));
    }
    if job.priority != 0 {
        about.add("priority", job.priority.to_string());
    }
    let labels: Vec<String> = job.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    about.add("labels", labels.join(", "));
    if !job.skipped_rows.is_empty() {
        let lines = job.skipped_rows.clone();
        about
            .fields
            .push(("rows left out".into(), Shown::Lines(lines)));
    }
    vec![
        about,
        section("settings", &settings(value)),
        section("metrics", &part(value, "latest_metrics")),
        section("contents", &part(value, "pins")),
    ]
}

/// Returns the settings of a job: its canonical form without names, state and results.
pub fn settings(job: &Value) -> Value {
    let chosen = JOB_SETTINGS
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), job.get(*name)?.clone())));
    Value::Object(chosen.collect())
}

/// Returns an object's field; an empty object if there is none.
fn part(value: &Value, field: &str) -> Value {
    value.get(field).cloned().unwrap_or_else(|| json!({}))
}

/// Renders the estimated cost of a job as JSON.
pub fn estimate(e: &pb::EstimateTrainingJobResponse) -> Value {
    let seconds = e
        .duration
        .as_ref()
        .map_or(0.0, |d| d.seconds as f64 + f64::from(d.nanos) / 1e9);
    json!({
        "train_pairs": e.train_pairs,
        "eval_pairs": e.eval_pairs,
        "skipped_rows": e.skipped_rows,
        "total_steps": e.total_steps,
        "tokens": e.tokens,
        "longest_pair_tokens": e.longest_pair_tokens,
        "memory_bytes": e.memory_bytes,
        "memory_limit_bytes": e.memory_limit_bytes,
        "seconds": seconds,
    })
}

/// Formats a time as `2026-11-24T10:00:00Z`; without a time the result is empty.
pub fn time(t: Option<&Timestamp>) -> String {
    t.and_then(|t| jiff::Timestamp::new(t.seconds, 0).ok())
        .map(|t| t.to_string())
        .unwrap_or_default()
}

/// Returns the name of a protobuf job state without its prefix, in lower case: `running`.
pub fn state(state: i32) -> String {
    let name = pb::JobState::try_from(state)
        .unwrap_or_default()
        .as_str_name();
    name.trim_start_matches("JOB_STATE_").to_lowercase()
}

/// Describes the shapes of a dataset's rows. Returns `None` if all are plain preference rows with
/// one pair each.
pub fn shapes(r: &pb::ValidationReport) -> Option<String> {
    let mut shapes: Vec<(&String, &u64)> = r.shapes.iter().collect();
    shapes.sort();
    let mut parts: Vec<String> = shapes
        .iter()
        .map(|(name, rows)| format!("{rows} {name}"))
        .collect();
    if r.pairs > 0 {
        parts.push(format!("{} in all", counted(r.pairs, "pair")));
    }
    let is_plain = r.pairs == 0
        && shapes
            .iter()
            .all(|(name, _)| *name == RowShape::Preference.name());
    (!is_plain).then(|| format!("rows by shape: {}", parts.join(", ")))
}

/// Returns the names of a model's uses without their prefix, in lower case: `train_lora`.
fn uses(m: &pb::Model) -> Vec<String> {
    let name = |of_model: pb::ModelUse| of_model.as_str_name().trim_start_matches("MODEL_USE_");
    m.uses().map(|u| name(u).to_lowercase()).collect()
}

/// Describes the uses of a model for people: `train lora, score, text only`.
pub fn supported(m: &pb::Model) -> String {
    let mut parts: Vec<String> = uses(m).iter().map(|name| name.replace('_', " ")).collect();
    if m.text_only {
        parts.push("text only".to_owned());
    }
    parts.join(", ")
}

/// Renders an event as JSON.
pub fn event(e: &pb::TrainingEvent) -> Value {
    use pb::training_event::Event as E;
    let (kind, body) = match &e.event {
        Some(E::StateChange(s)) => (
            "state_change",
            json!({"from": state(s.from), "to": state(s.to), "reason": s.reason}),
        ),
        Some(E::StepMetrics(s)) => (
            "step_metrics",
            json!({"step": s.step, "metrics": s.metrics}),
        ),
        Some(E::EvalMetrics(s)) => (
            "eval_metrics",
            json!({"step": s.step, "metrics": s.metrics}),
        ),
        Some(E::CheckpointCreated(c)) => (
            "checkpoint_created",
            json!({"checkpoint": c.checkpoint, "step": c.step, "best": c.best}),
        ),
        Some(E::Log(l)) => ("log", json!({"severity": l.severity, "message": l.message})),
        None => ("unknown", Value::Null),
    };
    json!({"sequence": e.sequence, "time": time(e.time.as_ref()), kind: body})
}
