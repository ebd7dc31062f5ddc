//! Output of the commands: tables for people, JSON for programs.
#![allow(clippy::print_stdout)]

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::args::Output;
use crate::domain::dataset::RowShape;
use crate::rpc::client::Timestamp;
use crate::rpc::pb;

/// Fields of resources whose value is an object of content hashes.
const HASHES: [&str; 3] = ["identity", "pins", "base"];
/// Number of digits of a hash that a table shows.
const HASH_DIGITS: usize = 12;

/// Prints a line on standard output.
pub fn line(text: &str) {
    println!("{text}");
}

/// Prints one JSON document on several indented lines.
pub fn json_document(value: &Value) {
    println!("{value:#}");
}

/// Prints one JSON document on one line, as an item of a stream.
pub fn json_line(value: &Value) {
    println!("{value}");
}

/// Renders a table with a header.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    table.to_string()
}

/// Prints a list: `rows` as a table with a header, or `json` as a JSON array.
pub fn list(output: Output, header: &[&str], rows: Vec<Vec<String>>, json: Vec<Value>) {
    match output {
        Output::Table => line(&table(header, rows)),
        Output::Json => json_document(&Value::Array(json)),
    }
}

/// Prints one resource: one field per line, or JSON.
pub fn resource(output: Output, value: &Value) {
    match (output, value) {
        (Output::Table, Value::Object(fields)) => {
            let rows = fields
                .iter()
                .flat_map(|(k, v)| cells(k, v))
                .map(|(field, value)| vec![field, value])
                .collect();
            line(&table(&["field", "value"], rows));
        }
        _ => json_document(value),
    }
}

/// Returns the table rows of a resource's field. Content hashes get a row each and are shortened;
/// JSON output has them in full.
fn cells(field: &str, value: &Value) -> Vec<(String, String)> {
    match value {
        Value::Object(parts) if HASHES.contains(&field) => {
            let rows = parts
                .iter()
                .flat_map(|(part, value)| hash_cells(&format!("{field}.{part}"), value));
            rows.collect()
        }
        _ => vec![(
            field.to_owned(),
            value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned),
        )],
    }
}

fn hash_cells(field: &str, value: &Value) -> Vec<(String, String)> {
    match value {
        Value::Object(parts) => parts
            .iter()
            .flat_map(|(part, value)| hash_cells(&format!("{field}.{part}"), value))
            .collect(),
        _ => vec![(field.to_owned(), short(value.as_str().unwrap_or_default()))],
    }
}

/// Returns the first [`HASH_DIGITS`] digits of a hash, which suffice to distinguish models and
/// datasets.
pub fn short(hash: &str) -> String {
    hash.chars().take(HASH_DIGITS).collect()
}

fn identity(i: &pb::ModelIdentity) -> Value {
    json!({
        "weights": i.weights,
        "config": i.config,
        "tokenizer": i.tokenizer,
        "chat_template": i.chat_template,
    })
}

fn pins(p: &pb::JobPins) -> Value {
    let hashes = [
        ("init_adapter", &p.init_adapter),
        ("policy", &p.policy),
        ("reference", &p.reference),
        ("dataset", &p.dataset),
        ("eval_dataset", &p.eval_dataset),
    ];
    let named = hashes.into_iter().filter(|(_, hash)| !hash.is_empty());
    let mut all: serde_json::Map<String, Value> = named
        .map(|(name, hash)| (name.to_owned(), json!(hash)))
        .collect();
    all.extend(
        p.base
            .as_ref()
            .map(|base| ("base".to_owned(), identity(base))),
    );
    Value::Object(all)
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

/// Renders a job as JSON.
pub fn job(j: &pb::TrainingJob) -> Value {
    let p = j.progress.unwrap_or_default();
    json!({
        "name": j.name,
        "display_name": j.display_name,
        "labels": j.labels,
        "priority": j.priority,
        "etag": j.etag,
        "state": state(j.state),
        "policy": j.policy,
        "reference": j.reference,
        "dataset": j.dataset,
        "step": p.step,
        "total_steps": p.total_steps,
        "epoch": p.epoch,
        "tokens": p.tokens,
        "eta_seconds": p.eta_seconds,
        "metrics": j.latest_metrics,
        "pins": j.pins.as_ref().map(pins),
        "error": j.error.as_ref().map(|e| e.message.clone()),
        "skipped_rows": j.skipped_rows,
        "create_time": time(j.create_time.as_ref()),
        "start_time": time(j.start_time.as_ref()),
        "end_time": time(j.end_time.as_ref()),
    })
}

/// Renders a dataset as JSON.
pub fn dataset(d: &pb::Dataset) -> Value {
    let r = d.report.clone().unwrap_or_default();
    let issues: Vec<Value> = r
        .issues
        .iter()
        .map(|i| {
            json!({
                "row": i.row,
                "id": i.id,
                "field": i.field,
                "reason": i.reason,
                "message": i.message,
            })
        })
        .collect();
    json!({
        "name": d.name,
        "display_name": d.display_name,
        "size_bytes": d.size_bytes,
        "content_hash": d.content_hash,
        "rows": r.rows,
        "valid_rows": r.valid_rows,
        "shapes": r.shapes,
        "pairs": r.pairs,
        "findings": r.counts,
        "issues": issues,
        "create_time": time(d.create_time.as_ref()),
    })
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
        parts.push(format!("{} pairs in all", r.pairs));
    }
    let is_plain = r.pairs == 0
        && shapes
            .iter()
            .all(|(name, _)| *name == RowShape::Preference.name());
    (!is_plain).then(|| format!("rows by shape: {}", parts.join(", ")))
}

/// Renders a checkpoint as JSON.
pub fn checkpoint(c: &pb::Checkpoint) -> Value {
    json!({
        "name": c.name,
        "step": c.step,
        "best": c.best,
        "adapter": c.adapter,
        "size_bytes": c.size_bytes,
        "metrics": c.metrics,
        "base": c.base.as_ref().map(identity),
        "create_time": time(c.create_time.as_ref()),
    })
}

/// Renders a model as JSON.
pub fn model(m: &pb::Model) -> Value {
    json!({
        "name": m.name,
        "source": m.source,
        "architecture": m.architecture,
        "parameters": m.parameters,
        "vocab_size": m.vocab_size,
        "num_layers": m.num_layers,
        "hidden_size": m.hidden_size,
        "max_position_embeddings": m.max_position_embeddings,
        "chat_template": m.chat_template,
        "dtype": m.dtype,
        "text_only": m.text_only,
        "uses": uses(m),
        "fingerprint": m.fingerprint,
        "device": m.device,
        "identity": m.identity.as_ref().map(identity),
    })
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

/// Formats a number of parameters for people: `135M`, `8.03B`.
pub fn parameters(n: u64) -> String {
    let millions = n as f64 / 1e6;
    match millions < 999.5 {
        true => format!("{millions:.0}M"),
        false => format!("{:.2}B", millions / 1e3),
    }
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

/// Formats a number of bytes for people.
pub fn bytes(n: u64) -> String {
    indicatif::HumanBytes(n).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_shows_its_size_and_what_is_supported() {
        let sizes = [123_456, 134_515_008, 999_885_952, 8_030_261_248];
        assert_eq!(
            sizes.map(parameters),
            ["0M", "135M", "1.00B", "8.03B"].map(str::to_owned)
        );
        let mut of_text = pb::Model {
            dtype: "bf16".into(),
            ..Default::default()
        };
        for name in ["TRAIN_LORA", "TRAIN_FULL", "SCORE", "EXPORT"] {
            let of_model = pb::ModelUse::from_str_name(&format!("MODEL_USE_{name}")).unwrap();
            of_text.uses.push(of_model.into());
        }
        assert_eq!(supported(&of_text), "train lora, train full, score, export");
        of_text.uses.remove(1);
        of_text.text_only = true;
        assert_eq!(supported(&of_text), "train lora, score, export, text only");
        let json = model(&of_text);
        assert_eq!(json["uses"], json!(["train_lora", "score", "export"]));
        assert_eq!(
            (&json["dtype"], &json["text_only"]),
            (&json!("bf16"), &json!(true))
        );
    }

    #[test]
    fn hashes_are_short_in_tables_and_whole_in_json() {
        let hash = |digit: &str| digit.repeat(64);
        let base = pb::ModelIdentity {
            weights: hash("a"),
            config: hash("b"),
            tokenizer: hash("c"),
            chat_template: String::new(),
        };
        let pins = pb::JobPins {
            base: Some(base),
            dataset: hash("d"),
            ..Default::default()
        };
        let job = job(&pb::TrainingJob {
            pins: Some(pins),
            ..Default::default()
        });
        assert_eq!(job["pins"]["base"]["weights"], hash("a"));
        assert_eq!(job["pins"]["dataset"], hash("d"));
        let rows = cells("pins", &job["pins"]);
        assert!(
            rows.contains(&("pins.base.weights".into(), "a".repeat(12))),
            "{rows:?}"
        );
        assert!(
            rows.contains(&("pins.dataset".into(), "d".repeat(12))),
            "{rows:?}"
        );
        assert!(
            !rows.iter().any(|(field, _)| field == "pins.reference"),
            "{rows:?}"
        );
    }
}
