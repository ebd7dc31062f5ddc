//! `_run.json`, which describes a run and is the same for all of its processes, and
//! `_manifest.json`, which lists the parts when all of them exist.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::encode::{PartCounts, TAIL_BYTES, jsonl_counts, parquet_counts};
use super::input::ScoreInput;
use super::reader::{InputRecord, InputRows, PartNaming, record_name, rows_name};
use super::store::PartStore;
use super::weights::WeightsIdentity;
use crate::cli::args::PartFormat;
use crate::cli::failure::Failure;
use crate::cli::output::flat;
use crate::cli::output::table::elide;

/// Name of the description of a run.
const RUN_FILE: &str = "_run.json";
/// Name of the list of parts.
const MANIFEST_FILE: &str = "_manifest.json";
/// Maximum number of parts whose counts are read at the same time.
const MAX_READS: usize = 16;
/// Maximum number of fields that an error about another run names.
const MAX_DIFFERING: usize = 3;
/// Maximum number of characters of each of their values.
const MAX_SHOWN: usize = 80;

/// Everything that the content of the parts depends on, besides the inputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct RunDescription {
    /// Names and content of the weights.
    pub weights: WeightsIdentity,
    /// β, if it was given.
    pub beta: Option<f64>,
    /// Maximum number of tokens, if it was given.
    pub max_length: Option<u32>,
    /// Variables for the chat template, as they were given.
    pub template_args: String,
    /// The tools for rows without tools of their own, as JSON.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tools: String,
    /// The mapped columns, as `--columns` has them, sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// Precision of this process's own engine; empty with servers, which have one of their own.
    pub precision: String,
    /// Names of the columns of the inputs that the parts have, too.
    pub carry: Vec<String>,
    /// Number of rows of a part.
    pub part_rows: u32,
    /// Format of the parts.
    pub format: String,
}

impl RunDescription {
    /// Returns the hash of everything that a score depends on, and of the columns, in hex.
    pub(super) fn options_hash(&self) -> String {
        let part = json!({
            "weights": self.weights,
            "beta": self.beta.map(f64::to_bits),
            "max_length": self.max_length,
            "template_args": self.template_args,
            "tools": self.tools,
            "columns": self.columns,
            "precision": self.precision,
            "carry": self.carry,
        });
        blake3::hash(part.to_string().as_bytes())
            .to_hex()
            .to_string()
    }

    /// Writes the description into the output, or compares it with the one that is there.
    ///
    /// # Errors
    /// Returns a failure if the output cannot be written or has the parts of another run.
    pub(super) async fn claim(&self, out: &PartStore) -> Result<(), Failure> {
        let failed = |e: serde_json::Error| Failure::Failed(e.to_string());
        let mut text = serde_json::to_vec_pretty(self).map_err(failed)?;
        text.push(b'\n');
        if out.create(RUN_FILE, text).await? {
            return Ok(());
        }
        let found = out.read(RUN_FILE, None).await?.unwrap_or_default();
        let other: RunDescription = serde_json::from_slice(&found).map_err(|e| {
            Failure::Usage(format!(
                "--out {}/{RUN_FILE} does not describe a run of this version ({e}): name another \
                 --out, or continue with the version that began it",
                out.shown()
            ))
        })?;
        if other == *self {
            return Ok(());
        }
        let value = |run: &RunDescription| serde_json::to_value(run).unwrap_or_default();
        let shown = |value: &Value| elide(&value.to_string(), MAX_SHOWN);
        let mut differing: Vec<String> = flat::differences(&value(self), &value(&other))
            .iter()
            .map(|(path, here, there)| {
                format!("{path} (there: {}, here: {})", shown(there), shown(here))
            })
            .collect();
        // Other weights differ in all of their hashes, which say nothing to people.
        let more = differing.len().saturating_sub(MAX_DIFFERING);
        differing.truncate(MAX_DIFFERING);
        if more > 0 {
            differing.push(format!("and {more} more"));
        }
        Err(Failure::Usage(format!(
            "--out {} has the parts of another run ({RUN_FILE}): they differ in {}: name another \
             --out",
            out.shown(),
            differing.join(", ")
        )))
    }
}

/// Counts of a finished run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RunCounts {
    pub parts: u64,
    pub rows: u64,
    pub errors: u64,
}

/// Returns the parts that belong to the inputs, in order, or `None` if one is missing.
async fn parts(
    out: &PartStore,
    inputs: &[ScoreInput],
    naming: &PartNaming,
    written: &BTreeMap<String, u64>,
) -> Result<Option<(Vec<Value>, Vec<String>)>, Failure> {
    let (mut listed, mut names) = (Vec::new(), Vec::new());
    for input in inputs {
        let (record, rows) = (record_name(&input.name), rows_name(&input.name));
        if !written.contains_key(&record) || !written.contains_key(&rows) {
            return Ok(None);
        }
        let record = out.read(&record, None).await?.unwrap_or_default();
        let rows = out.read(&rows, None).await?.unwrap_or_default();
        let (Ok(record), Ok(rows)) = (
            serde_json::from_slice::<InputRecord>(&record),
            serde_json::from_slice::<InputRows>(&rows),
        ) else {
            return Ok(None);
        };
        let starts = (0..rows.rows).step_by(naming.rows as usize);
        let of_input: Vec<String> = starts
            .map(|start| naming.name(&input.name, &record.identity, start))
            .collect();
        if !of_input.iter().all(|part| written.contains_key(part)) {
            return Ok(None);
        }
        listed.push(json!({
            "name": input.name,
            "content": record.identity,
            "rows": rows.rows,
            "parts": of_input.len(),
        }));
        names.extend(of_input);
    }
    Ok(Some((listed, names)))
}

/// Writes the manifest if every part of every shard exists. Returns its counts, or `None` if parts
/// are missing.
///
/// # Errors
/// Returns a failure if the output cannot be read or written.
pub(super) async fn complete(
    out: &PartStore,
    inputs: &[ScoreInput],
    naming: &PartNaming,
    run: &RunDescription,
    started: Instant,
) -> Result<Option<RunCounts>, Failure> {
    let written = out.list().await?;
    let Some((inputs, names)) = parts(out, inputs, naming, &written).await? else {
        return Ok(None);
    };
    let (mut waiting, mut reading) = (names.iter().cloned().enumerate(), JoinSet::new());
    let mut counts = vec![PartCounts::default(); names.len()];
    loop {
        while reading.len() < MAX_READS {
            let Some((at, name)) = waiting.next() else {
                break;
            };
            let (out, format) = (out.clone(), naming.format);
            reading.spawn(async move { (at, count(&out, &name, format).await) });
        }
        let Some(done) = reading.join_next().await else {
            break;
        };
        let (at, count) = done.map_err(|e| Failure::Failed(e.to_string()))?;
        counts[at] = count?;
    }
    let mut total = RunCounts::default();
    let mut parts = Vec::with_capacity(names.len());
    for (name, count) in names.iter().zip(&counts) {
        total.parts += 1;
        total.rows += count.rows;
        total.errors += count.errors;
        parts.push(json!({
            "name": name,
            "rows": count.rows,
            "errors": count.errors,
            "bytes": written.get(name),
        }));
    }
    let manifest = json!({
        "bradley": env!("CARGO_PKG_VERSION"),
        "run": run,
        "options_hash": naming.options,
        "inputs": inputs,
        "parts": parts,
        "rows": total.rows,
        "errors": total.errors,
        "seconds": started.elapsed().as_secs_f64(),
    });
    let is_same = |found: &Value| {
        let parts = ["run", "inputs", "parts"];
        parts
            .iter()
            .all(|field| found.get(*field) == manifest.get(*field))
    };
    let found = out.read(MANIFEST_FILE, None).await?.unwrap_or_default();
    if !serde_json::from_slice(&found).is_ok_and(|found: Value| is_same(&found)) {
        let text = format!("{manifest:#}\n");
        out.replace(MANIFEST_FILE, text.into_bytes()).await?;
    }
    out.clean().await;
    Ok(Some(total))
}

async fn count(out: &PartStore, name: &str, format: PartFormat) -> Result<PartCounts, Failure> {
    let last = match format {
        PartFormat::Parquet => Some(TAIL_BYTES),
        PartFormat::Jsonl => None,
    };
    let content = out.read(name, last).await?.unwrap_or_default();
    let counts = match format {
        PartFormat::Parquet => parquet_counts(&content),
        PartFormat::Jsonl => jsonl_counts(&content),
    };
    counts.ok_or_else(|| {
        Failure::Failed(format!(
            "--out {}/{name}: it is damaged: delete it and run the command again",
            out.shown()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(columns: &[&str]) -> RunDescription {
        RunDescription {
            weights: WeightsIdentity {
                policy: "models/m".to_owned(),
                reference: String::new(),
                normalization: "sum".to_owned(),
                policy_content: Value::Null,
                reference_content: Value::Null,
                calibration: None,
            },
            beta: None,
            max_length: None,
            template_args: String::new(),
            tools: String::new(),
            columns: columns.iter().map(|pair| (*pair).to_owned()).collect(),
            precision: String::new(),
            carry: Vec::new(),
            part_rows: 8,
            format: "jsonl".to_owned(),
        }
    }

    #[tokio::test]
    async fn another_run_is_refused_also_by_a_field_that_only_one_of_both_has() {
        let mapped = r#"["chosen=good"]"#;
        for (first, second, there, here) in [
            (run(&["chosen=good"]), run(&[]), mapped, "null"),
            (run(&[]), run(&["chosen=good"]), "null", mapped),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().display().to_string();
            let out = PartStore::open(&out, &BTreeMap::new()).unwrap();
            first.claim(&out).await.unwrap();
            first.claim(&out).await.unwrap();
            let refusal = second.claim(&out).await.unwrap_err();
            let wanted = format!("they differ in columns (there: {there}, here: {here}): name");
            let said = refusal.message();
            assert!(said.contains(&wanted), "{said}");
        }
    }
}
