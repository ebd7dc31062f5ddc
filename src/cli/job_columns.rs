//! `bradley jobs list --columns`: columns by the names of fields.

use serde_json::Value;

use super::args::Output;
use super::failure::Failure;
use super::output::{self, flat, human};
use crate::domain::similar::nearest;
use crate::rpc::canonical::{self, FieldPath, FieldSelection};
use crate::rpc::pb;

/// Columns that are shown by default.
const DEFAULT_COLUMNS: [&str; 6] = ["name", "state", "steps", "policy", "title", "created"];
/// Columns whose names differ from those of their fields, and these fields.
const FIELDS_OF_COLUMNS: [(&str, &str); 5] = [
    ("title", "display_name"),
    ("created", "create_time"),
    ("steps", STEPS),
    ("heard", HEARD),
    ("last event", LAST_EVENT),
];
/// Columns that are shown by default if a server runs one of the jobs: which one, and the age of
/// the job's newest event.
const OF_RUNNING: [&str; 2] = ["replica", "last event"];
/// The column with the time since the last sign of life of the server that runs a job.
const HEARD: &str = "replica_time";
/// The column with the age of a job's newest event.
const LAST_EVENT: &str = "last_event_time";
/// The column with both numbers of steps.
const STEPS: &str = "progress.step/total_steps";

/// A column of the list of jobs.
struct ListedColumn {
    /// The name that the user gave.
    title: String,
    /// Path of the field, or [`STEPS`].
    path: String,
}

/// Prints jobs with the columns that are named, or else the default ones. Without names, all
/// formats but the table have the whole jobs.
///
/// # Errors
/// Returns a failure if a column is no field of a job.
pub(super) fn list(
    output: Output,
    names: &[String],
    jobs: &[pb::TrainingJob],
) -> Result<(), Failure> {
    if names.is_empty() && output != Output::Table {
        output::list(output, &[], vec![], output::messages(jobs)?);
        return Ok(());
    }
    let paths =
        canonical::field_paths::<pb::TrainingJob>().map_err(|e| Failure::Failed(e.to_string()))?;
    let columns: Vec<ListedColumn> = match names.is_empty() {
        true => {
            let is_running = jobs.iter().any(|job| !job.replica.is_empty());
            let of_running = OF_RUNNING.iter().filter(|_| is_running);
            let names = DEFAULT_COLUMNS.iter().chain(of_running);
            let names: Vec<String> = names.map(|&name| name.to_owned()).collect();
            column_list(&names, &paths)?
        }
        false => column_list(names, &paths)?,
    };
    let values: Vec<Value> = jobs
        .iter()
        .map(|job| output::message(job, FieldSelection::All))
        .collect::<Result<_, _>>()?;
    let header: Vec<&str> = columns.iter().map(|c| c.title.as_str()).collect();
    let rows = values
        .iter()
        .map(|job| columns.iter().map(|c| cell(&c.path, job)).collect())
        .collect();
    let chosen: Vec<(&str, &str)> = columns
        .iter()
        .map(|c| (c.title.as_str(), c.path.as_str()))
        .collect();
    let items = values.iter().map(|job| select(job, &chosen)).collect();
    match output {
        Output::Csv => output::csv(&header, items),
        _ => output::list(output, &header, rows, items),
    }
    Ok(())
}

fn column_list(names: &[String], paths: &[FieldPath]) -> Result<Vec<ListedColumn>, Failure> {
    names
        .iter()
        .map(|name| {
            Ok(ListedColumn {
                title: name.clone(),
                path: path(name, paths)?,
            })
        })
        .collect()
}

/// Returns the path of the field that a column's name means: a path, the last part of one, or a key
/// of a map.
fn path(name: &str, paths: &[FieldPath]) -> Result<String, Failure> {
    if let Some((_, path)) = FIELDS_OF_COLUMNS.iter().find(|(short, _)| *short == name) {
        return Ok((*path).to_owned());
    }
    let is_key = |p: &FieldPath| {
        let rest = name.strip_prefix(&p.path).and_then(|r| r.strip_prefix('.'));
        p.has_keys && rest.is_some_and(|key| !key.is_empty())
    };
    if paths.iter().any(|p| p.path == name || is_key(p)) {
        return Ok(name.to_owned());
    }
    let last_part = |p: &&FieldPath| p.path.rsplit('.').next() == Some(name);
    let meant: Vec<&str> = paths
        .iter()
        .filter(last_part)
        .map(|p| p.path.as_str())
        .collect();
    match meant[..] {
        [one] => Ok(one.to_owned()),
        [] => {
            let known = paths.iter().map(|p| p.path.as_str()).chain(DEFAULT_COLUMNS);
            let parts = paths.iter().filter_map(|p| p.path.rsplit('.').next());
            let hint = nearest(name, known.chain(parts)).map_or_else(
                || "`bradley jobs get @last --format yaml --all` shows all fields".to_owned(),
                |meant| format!("did you mean {meant}?"),
            );
            Err(Failure::Usage(format!(
                "--columns: {name} is no field of a job: {hint}"
            )))
        }
        ref many => Err(Failure::Usage(format!(
            "--columns: {name} may be {}: give one of these",
            many.join(" or ")
        ))),
    }
}

fn cell(path: &str, job: &Value) -> String {
    if [HEARD, LAST_EVENT].contains(&path) {
        let time = flat::at(job, path).and_then(Value::as_str);
        let time: Option<jiff::Timestamp> = time.and_then(|time| time.parse().ok());
        return time.map_or_else(String::new, |time| {
            let seconds = jiff::Timestamp::now().duration_since(time).as_secs_f64();
            format!("{} ago", human::seconds(seconds.max(0.0)))
        });
    }
    if path != STEPS {
        return flat::at(job, path)
            .map(|value| flat::readable(path, value))
            .unwrap_or_default();
    }
    let count = |field| flat::at(job, field).map_or_else(|| "0".to_owned(), flat::plain);
    format!(
        "{}/{}",
        count("progress.step"),
        count("progress.total_steps")
    )
}

fn select(job: &Value, columns: &[(&str, &str)]) -> Value {
    let mut chosen = flat::select(job, columns);
    for (title, path) in columns {
        if *path == STEPS {
            chosen[*title] = cell(STEPS, job).into();
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn resolved(name: &str) -> Result<String, String> {
        let paths = canonical::field_paths::<pb::TrainingJob>().unwrap();
        path(name, &paths).map_err(|e| match e {
            Failure::Usage(said) => said,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn a_column_is_a_path_its_last_part_or_a_key_of_a_map() {
        for (name, path) in [
            ("title", "display_name"),
            ("dpo.beta", "dpo.beta"),
            ("beta", "dpo.beta"),
            ("learning_rate", "optimizer.learning_rate"),
            ("latest_metrics.eval_loss", "latest_metrics.eval_loss"),
            ("labels.a.b", "labels.a.b"),
            ("pins.base.weights", "pins.base.weights"),
            ("dpo", "dpo"),
        ] {
            assert_eq!(resolved(name).as_deref(), Ok(path), "{name}");
        }
        assert_eq!(
            resolved("alpha").unwrap_err(),
            "--columns: alpha may be dpo.reference_sync.alpha or lora.alpha: give one of these"
        );
        assert_eq!(
            resolved("lerning_rate").unwrap_err(),
            "--columns: lerning_rate is no field of a job: did you mean learning_rate?"
        );
        assert!(resolved("xyzzy").unwrap_err().contains("jobs get @last"));
        assert!(resolved("labels.").is_err());
    }
}
