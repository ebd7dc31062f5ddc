//! `bradley jobs metrics`: a job's metrics as a table with a row for each logged step.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::args::{MetricsArgs, Output};
use super::failure::{Failure, Outcome};
use super::output::{self, flat};
use super::remote::connect;
use super::short_names;
use crate::domain::violation::counted;
use crate::rpc::canonical;
use crate::rpc::client::Client;
use crate::rpc::pb::{self, training_event::Event};

/// Maximum number of events in a page.
const PAGE_SIZE: i32 = 1000;
/// Metrics that are shown first; the others follow in alphabetical order.
const FIRST_METRICS: [&str; 8] = [
    "loss",
    "eval_loss",
    "rewards/margins",
    "rewards/accuracies",
    "eval_rewards/margins",
    "eval_rewards/accuracies",
    "learning_rate",
    "grad_norm",
];

/// Metrics of a step.
#[derive(Debug, Default)]
struct StepRow {
    /// Epochs done; `None` if the step has only an evaluation.
    epoch: Option<f64>,
    metrics: BTreeMap<String, f64>,
}

pub(super) async fn run(args: MetricsArgs, output: Output) -> Outcome {
    let client = connect(&args.named.server.target()).await?;
    let job = short_names::job(&client, &args.named.name).await?;
    let steps = read(&client, &job, args.after).await?;
    let header = columns(&steps);
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let items: Vec<Value> = steps
        .iter()
        .map(|(step, row)| item(*step, row, &header))
        .collect();
    let Some(path) = &args.out else {
        let rows = items.iter().map(|item| cells(item, &header)).collect();
        match output {
            Output::Csv => output::csv(&header, items),
            _ => output::list(output, &header, rows, items),
        }
        return Ok(());
    };
    let given = args.is_format_given.then_some(output);
    let text = match file_format(path, given, output) {
        Output::Json => format!("{:#}\n", Value::Array(items)),
        Output::Yaml => {
            canonical::yaml_of(&Value::Array(items)).map_err(|e| Failure::Failed(e.to_string()))?
        }
        Output::Csv => flat::csv(Some(&header), &items),
        Output::Table => {
            let rows = items.iter().map(|item| cells(item, &header)).collect();
            // A file has no width into which the table must fit.
            format!("{}\n", output::table::render(&header, rows, None))
        }
    };
    std::fs::write(path, text)
        .map_err(|e| Failure::Failed(format!("--out {}: {e}", path.display())))?;
    match output {
        Output::Table => output::line(&format!(
            "{} of {job} {} in {}",
            counted(steps.len() as u64, "step"),
            if steps.len() == 1 { "is" } else { "are" },
            path.display()
        )),
        other => output::resource(other, &json!({"file": path, "steps": steps.len()})),
    }
    Ok(())
}

/// Returns the format of a file: the one that was typed, else that of its extension, else the
/// default of results. A file is no table by default, but CSV.
fn file_format(path: &Path, given: Option<Output>, default: Output) -> Output {
    if let Some(given) = given {
        return given;
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("csv") => Output::Csv,
        Some("json") => Output::Json,
        Some("yaml" | "yml") => Output::Yaml,
        _ if default == Output::Table => Output::Csv,
        _ => default,
    }
}

/// Returns the metrics of the stored events with a sequence number above `after`, by step. A step
/// that was repeated after a restart has its last values.
async fn read(client: &Client, job: &str, after: u64) -> Result<BTreeMap<u64, StepRow>, Failure> {
    let mut steps: BTreeMap<u64, StepRow> = BTreeMap::new();
    let mut after_sequence = after;
    loop {
        let request = pb::ListTrainingEventsRequest {
            parent: job.to_owned(),
            after_sequence,
            page_size: PAGE_SIZE,
        };
        let page = client
            .training()
            .list_training_events(request)
            .await?
            .into_inner();
        let before = after_sequence;
        for event in page.events {
            after_sequence = event.sequence;
            match event.event {
                Some(Event::StepMetrics(s)) => {
                    let row = steps.entry(s.step).or_default();
                    row.epoch = s.progress.map(|p| p.epoch);
                    row.metrics.extend(s.metrics);
                }
                Some(Event::EvalMetrics(s)) => {
                    steps.entry(s.step).or_default().metrics.extend(s.metrics);
                }
                _ => {}
            }
        }
        if !page.more || after_sequence == before {
            return Ok(steps);
        }
    }
}

/// Columns that are not from the metrics of a step, even if these have the same name.
const OF_STEP: [&str; 2] = ["step", "epoch"];

/// Returns the names of all columns: those that matter most first.
fn columns(steps: &BTreeMap<u64, StepRow>) -> Vec<String> {
    let mut names: Vec<&String> = steps.values().flat_map(|row| row.metrics.keys()).collect();
    names.retain(|name| !OF_STEP.contains(&name.as_str()));
    names.sort_unstable();
    names.dedup();
    let place = |name: &str| {
        FIRST_METRICS
            .iter()
            .position(|f| *f == name)
            .unwrap_or(FIRST_METRICS.len())
    };
    names.sort_by_key(|name| place(name));
    OF_STEP
        .into_iter()
        .map(str::to_owned)
        .chain(names.into_iter().cloned())
        .collect()
}

/// Returns a row with all columns; null where a step has no value.
fn item(step: u64, row: &StepRow, header: &[&str]) -> Value {
    let value = |name: &str| match name {
        "step" => json!(step),
        "epoch" => json!(row.epoch),
        name => match row.metrics.get(name) {
            // JSON has no NaN and no infinity.
            Some(x) if !x.is_finite() => json!(x.to_string()),
            found => json!(found),
        },
    };
    let all: Map<String, Value> = header
        .iter()
        .map(|name| ((*name).to_owned(), value(name)))
        .collect();
    Value::Object(all)
}

fn cells(item: &Value, header: &[&str]) -> Vec<String> {
    header
        .iter()
        .map(|name| match (*name, &item[*name]) {
            ("step", value) => flat::plain(value),
            (_, Value::Number(n)) => n.as_f64().map(significant).unwrap_or_default(),
            (_, value) => flat::plain(value),
        })
        .collect()
}

/// Formats a number with four significant digits. One from 10000 to 99999 has all its digits before
/// the point.
fn significant(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_owned(),
        size if (1e-3..1e5).contains(&size) => {
            let decimals = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
            format!("{x:.decimals$}")
        }
        _ => format!("{x:.3e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_every_column_and_the_important_ones_come_first() {
        let metrics = |all: &[(&str, f64)]| {
            let all = all.iter().map(|(name, x)| ((*name).to_owned(), *x));
            all.collect::<BTreeMap<_, _>>()
        };
        let steps = BTreeMap::from([
            (
                1,
                StepRow {
                    epoch: Some(0.5),
                    metrics: metrics(&[("a", 1.0), ("epoch", 0.5), ("loss", f64::NAN)]),
                },
            ),
            (
                2,
                StepRow {
                    epoch: None,
                    metrics: metrics(&[("eval_loss", 0.25)]),
                },
            ),
        ]);
        let header = columns(&steps);
        assert_eq!(header, ["step", "epoch", "loss", "eval_loss", "a"]);
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        let items: Vec<Value> = steps.iter().map(|(s, r)| item(*s, r, &header)).collect();
        assert_eq!(
            flat::csv(Some(&header), &items),
            "step,epoch,loss,eval_loss,a\n1,0.5,NaN,,1.0\n2,,,0.25,\n"
        );
        assert_eq!(cells(&items[1], &header), ["2", "", "", "0.2500", ""]);
        assert_eq!(
            [1234.56, 0.71234, 1e-5, 12.0, -0.5].map(significant),
            ["1235", "0.7123", "1.000e-5", "12.00", "-0.5000"].map(str::to_owned)
        );
    }

    #[test]
    fn a_file_has_the_format_of_its_name_unless_another_is_given() {
        let of = |name: &str, given, default| file_format(Path::new(name), given, default);
        for default in [Output::Table, Output::Csv, Output::Json, Output::Yaml] {
            assert_eq!(of("m.csv", None, default), Output::Csv);
            assert_eq!(of("m.json", None, default), Output::Json);
            assert_eq!(of("m.yaml", None, default), Output::Yaml);
            assert_eq!(of("m.yml", None, default), Output::Yaml);
        }
        for given in [Output::Table, Output::Csv, Output::Json, Output::Yaml] {
            assert_eq!(of("m.json", Some(given), given), given);
            assert_eq!(of("m.txt", Some(given), given), given);
        }
        assert_eq!(of("m.txt", None, Output::Table), Output::Csv);
        assert_eq!(of("m", None, Output::Json), Output::Json);
    }
}
