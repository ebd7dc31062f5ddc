//! `bradley jobs diff`: the fields in which two jobs differ.

use serde_json::{Value, json};

use super::args::{DiffArgs, Output};
use super::failure::{Failure, Outcome};
use super::output::{self, flat};
use super::remote::connect;
use super::short_names;
use crate::rpc::canonical::FieldSelection;
use crate::rpc::client::Client;
use crate::rpc::pb;

/// Fields that are compared besides the settings: the job's inputs, labels and priority.
const FIELDS_BESIDES_SETTINGS: [&str; 7] = [
    "policy",
    "reference",
    "dataset",
    "eval_dataset",
    "labels",
    "priority",
    "pins",
];

pub(super) async fn run(args: DiffArgs, output: Output) -> Outcome {
    let client = connect(&args.server.target()).await?;
    let a = get(&client, &args.a).await?;
    let b = get(&client, &args.b).await?;
    let side = |job: &pb::TrainingJob| -> Result<Value, Failure> {
        let whole = output::message(job, FieldSelection::Set)?;
        Ok(match args.all {
            true => whole,
            false => compared(&whole),
        })
    };
    let different = flat::differences(&side(&a)?, &side(&b)?);
    if different.is_empty() && output == Output::Table {
        output::line(&format!("{} and {} have the same settings", a.name, b.name));
        return Ok(());
    }
    let rows = different
        .iter()
        .map(|(path, a, b)| vec![path.clone(), shown(path, a), shown(path, b)])
        .collect();
    let items = different
        .iter()
        .map(|(path, a, b)| json!({"field": path, "a": a, "b": b}))
        .collect();
    match output {
        Output::Csv => output::csv(&["field", "a", "b"], items),
        _ => output::list(output, &["field", &title(&a), &title(&b)], rows, items),
    }
    Ok(())
}

async fn get(client: &Client, given: &str) -> Result<pb::TrainingJob, Failure> {
    let name = short_names::job(client, given).await?;
    let request = pb::GetTrainingJobRequest { name };
    Ok(client
        .training()
        .get_training_job(request)
        .await?
        .into_inner())
}

/// Returns a job's title, or its name without one.
fn title(job: &pb::TrainingJob) -> String {
    match job.display_name.is_empty() {
        true => job.name.clone(),
        false => job.display_name.clone(),
    }
}

/// Returns a job's settings, inputs, labels and priority.
fn compared(job: &Value) -> Value {
    let mut compared = output::settings(job);
    for field in FIELDS_BESIDES_SETTINGS {
        if let Some(value) = job.get(field) {
            compared[field] = value.clone();
        }
    }
    compared
}

fn shown(path: &str, value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        value => flat::readable(path, value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fields_that_differ_are_listed() {
        let a = json!({"dpo": {"beta": 0.1, "losses": []}, "lora": {"rank": 4}, "seed": 1});
        let b = json!({"dpo": {"beta": 0.5, "losses": []}, "full": {}, "seed": 1});
        assert_eq!(
            flat::differences(&a, &b),
            [
                ("dpo.beta".to_owned(), json!(0.1), json!(0.5)),
                ("lora.rank".to_owned(), json!(4), Value::Null),
                ("full".to_owned(), Value::Null, json!({})),
            ]
        );
        let job = json!({"name": "x", "state": "y", "seed": 1, "policy": "models/a"});
        assert_eq!(compared(&job), json!({"seed": 1, "policy": "models/a"}));
    }
}
