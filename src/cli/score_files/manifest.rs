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
/// Maximum number of characters of a value in the error about another run.
const MAX_SHOWN: usize = 80;
/// Fields of a [`RunDescription`], with the words for them in the error about another run.
const WORDS: [(&str, &str); 14] = [
    ("weights.policy", "--policy"),
    ("weights.reference", "--reference"),
    ("weights.normalization", "--normalization"),
    (
        "weights.calibration",
        "the calibration that evaluate --save-calibration stored",
    ),
    ("beta", "--beta"),
    ("max_length", "--max-length"),
    ("template_args", "--template-args"),
    ("tools", "--tools"),
    ("columns", "--columns"),
    ("logged", "--logged"),
    ("precision", "--precision"),
    ("carry", "--carry"),
    ("part_rows", "--part-rows"),
    ("format", "--format"),
];
/// Fields that hold only hashes, with their words. Their values say nothing to people.
const HASH_WORDS: [(&str, &str); 2] = [
    ("weights.policy_content", "the content of the policy"),
    ("weights.reference_content", "the content of the reference"),
];

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
    /// The value of `--logged`; empty without the flag.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub logged: String,
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
        let mut part = json!({
            "weights": self.weights,
            "beta": self.beta.map(f64::to_bits),
            "max_length": self.max_length,
            "template_args": self.template_args,
            "tools": self.tools,
            "columns": self.columns,
            "precision": self.precision,
            "carry": self.carry,
        });
        // Runs without it keep the hash that they had before this flag existed.
        if !self.logged.is_empty() {
            part["logged"] = json!(self.logged);
        }
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
        Err(Failure::Usage(format!(
            "--out {} has the parts of another run ({RUN_FILE}): they differ in {}: name another \
             --out",
            out.shown(),
            self.differences(&other).join(", ")
        )))
    }

    /// Describes the differences from the run that the output has, in the words of the flags.
    fn differences(&self, other: &Self) -> Vec<String> {
        let value = |run: &Self| serde_json::to_value(run).unwrap_or_default();
        let mut described: Vec<String> = Vec::new();
        for (path, here, there) in flat::differences(&value(self), &value(other)) {
            let is_hash = |(field, _): &&(&str, &str)| {
                let rest = path.strip_prefix(*field);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            };
            let text = match HASH_WORDS.iter().find(is_hash) {
                Some((_, words)) => (*words).to_owned(),
                None => {
                    let words = WORDS.iter().find(|(field, _)| *field == path);
                    let words = words.map_or(path.as_str(), |(_, words)| *words);
                    format!("{words} (there: {}, here: {})", shown(&there), shown(&here))
                }
            };
            // Other content differs in several hashes.
            if !described.contains(&text) {
                described.push(text);
            }
        }
        described
    }
}

/// Returns a value as a person would type it; `none` for one that was not given.
fn shown(value: &Value) -> String {
    let text = match value {
        Value::Null => String::new(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(flat::plain).collect();
            items.join(",")
        }
        other => flat::plain(other),
    };
    match text.as_str() {
        "" => "none".to_owned(),
        text => elide(text, MAX_SHOWN),
    }
}

/// Counts of a finished run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RunCounts {
    pub parts: u64,
    pub rows: u64,
    pub errors: u64,
}

/// Returns the inputs as the manifest lists them, and the names of their parts in order, or `None`
/// if a part is missing.
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
            let bytes = written.get(&name).copied().unwrap_or_default();
            reading.spawn(async move { (at, count(&out, &name, bytes, format).await) });
        }
        let Some(done) = reading.join_next().await else {
            break;
        };
        let (at, count) = done?;
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

/// Returns the counts of a part with a size of `bytes` bytes.
async fn count(
    out: &PartStore,
    name: &str,
    bytes: u64,
    format: PartFormat,
) -> Result<PartCounts, Failure> {
    let tail = match format {
        // Stores refuse an empty range.
        PartFormat::Parquet if bytes > 0 => Some(bytes.saturating_sub(TAIL_BYTES)..bytes),
        PartFormat::Parquet | PartFormat::Jsonl => None,
    };
    let content = out.read(name, tail).await?.unwrap_or_default();
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
            logged: String::new(),
            precision: String::new(),
            carry: Vec::new(),
            part_rows: 8,
            format: "jsonl".to_owned(),
        }
    }

    /// Returns the error of a run in the output of another one.
    async fn refusal(first: &RunDescription, second: &RunDescription) -> String {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().display().to_string();
        let out = PartStore::open(&out, &BTreeMap::new()).unwrap();
        first.claim(&out).await.unwrap();
        first.claim(&out).await.unwrap();
        second.claim(&out).await.unwrap_err().message().to_owned()
    }

    #[tokio::test]
    async fn another_run_is_refused_also_by_a_field_that_only_one_of_both_has() {
        let mapped = "chosen=good";
        for (first, second, there, here) in [
            (run(&[mapped]), run(&[]), mapped, "none"),
            (run(&[]), run(&[mapped]), "none", mapped),
        ] {
            let said = refusal(&first, &second).await;
            let wanted = format!("they differ in --columns (there: {there}, here: {here}): name");
            assert!(said.contains(&wanted), "{said}");
        }
    }

    #[tokio::test]
    async fn every_difference_from_another_run_is_named_by_its_flag() {
        let first = run(&[]);
        let hashes = |hash: &str| json!({"weights": hash, "config": hash});
        let second = RunDescription {
            weights: WeightsIdentity {
                policy: "models/other".to_owned(),
                reference: "models/m".to_owned(),
                normalization: "mean".to_owned(),
                policy_content: hashes("1"),
                reference_content: hashes("2"),
                calibration: Some("temperature 2.0".to_owned()),
            },
            beta: Some(0.5),
            max_length: Some(64),
            template_args: "{}".to_owned(),
            tools: "[]".to_owned(),
            columns: vec!["id=key".to_owned(), "prompt=p".to_owned()],
            logged: "both".to_owned(),
            precision: "f32".to_owned(),
            carry: vec!["a".to_owned(), "b".to_owned()],
            part_rows: 9,
            format: "parquet".to_owned(),
        };
        let said = refusal(&first, &second).await;
        for wanted in [
            "--policy (there: models/m, here: models/other)",
            "--reference (there: none, here: models/m)",
            "--normalization (there: sum, here: mean)",
            "the content of the policy",
            "the content of the reference",
            "--save-calibration stored (there: none, here: temperature 2.0)",
            "--beta (there: none, here: 0.5)",
            "--max-length (there: none, here: 64)",
            "--template-args (there: none, here: {})",
            "--tools (there: none, here: [])",
            "--columns (there: none, here: id=key,prompt=p)",
            "--logged (there: none, here: both)",
            "--precision (there: none, here: f32)",
            "--carry (there: none, here: a,b)",
            "--part-rows (there: 8, here: 9)",
            "--format (there: jsonl, here: parquet)",
        ] {
            assert_eq!(said.matches(wanted).count(), 1, "{wanted}: {said}");
        }
        assert!(!said.contains("weights."), "{said}");
    }

    #[test]
    fn the_log_probs_that_are_used_are_in_the_hash() {
        let hash = |logged: &str| {
            let run = RunDescription {
                logged: logged.to_owned(),
                ..run(&[])
            };
            run.options_hash()
        };
        let hashes = ["", "reference", "both"].map(hash);
        assert!(hashes[0] != hashes[1] && hashes[0] != hashes[2] && hashes[1] != hashes[2]);
    }
}
