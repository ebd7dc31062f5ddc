//! `bradley jobs | datasets | checkpoints | models`: commands for resources of a server.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use super::args::{
    CheckpointsCommand, ContentsFlag, DatasetsCommand, GetArgs, JobsCommand, ModelsCommand,
    NamedArgs, Output,
};
use super::failure::{Failure, Outcome, unless_interrupted};
use super::output::{self, bytes, human, time};
use super::progress::{self, waiting};
use super::remote::{connect, server_flag};
use super::short_names::JobChoice;
use super::{job_columns, job_diff, job_metrics, short_names, watch};
use crate::rpc::canonical::{Canonical, FieldSelection};
use crate::rpc::client::{Client, FieldMask};
use crate::rpc::pb;

/// Connects to the server and returns the name of the job that is meant.
async fn open_job(args: &NamedArgs) -> Result<(Client, String), Failure> {
    let client = connect(&args.server.target()).await?;
    let name = short_names::job(&client, &args.name).await?;
    Ok((client, name))
}

/// Connects to the server and returns the name of the checkpoint that is meant.
async fn open_checkpoint(args: &NamedArgs) -> Result<(Client, String), Failure> {
    let client = connect(&args.server.target()).await?;
    let name = short_names::checkpoint(&client, &args.name).await?;
    Ok((client, name))
}

/// Connects to the server and returns the name of the dataset that is meant.
async fn open_dataset(args: &NamedArgs) -> Result<(Client, String), Failure> {
    let client = connect(&args.server.target()).await?;
    let name = short_names::dataset(&client, &args.name).await?;
    Ok((client, name))
}

/// Returns the fields that a command shows.
fn fields(args: &GetArgs) -> FieldSelection {
    match args.all {
        true => FieldSelection::All,
        false => FieldSelection::Set,
    }
}

/// Prints the chosen fields of a message, in the format that is asked for.
fn show<M: Canonical>(output: Output, message: &M, fields: FieldSelection) -> Outcome {
    output::resource(output, &output::message(message, fields)?);
    Ok(())
}

/// Returns the state with a name of [`super::args::JOB_STATES`].
fn job_state(name: &str) -> pb::JobState {
    let full = format!("JOB_STATE_{}", name.to_uppercase());
    pb::JobState::from_str_name(&full).unwrap_or_default()
}

/// Returns the values of labels by their keys.
///
/// # Errors
/// Returns a failure if a key has two values.
fn distinct_labels(given: Vec<(String, String)>) -> Result<BTreeMap<String, String>, Failure> {
    let mut labels = BTreeMap::new();
    for (key, value) in given {
        match labels.get(&key) {
            Some(other) if *other != value => {
                return Err(Failure::Usage(format!(
                    "--label {key} is given twice, with {other:?} and {value:?}: a label has one \
                     value"
                )));
            }
            _ => labels.insert(key, value),
        };
    }
    Ok(labels)
}

pub(super) async fn jobs(command: JobsCommand, output: Output) -> Outcome {
    match command {
        JobsCommand::Watch(args) => return watch::run(args, output).await,
        JobsCommand::List(args) => {
            let client = connect(&args.server.target()).await?;
            let choice = JobChoice {
                states: args.state.iter().map(|name| job_state(name)).collect(),
                labels: distinct_labels(args.label)?.into_iter().collect(),
                limit: args.limit.map(|limit| limit as usize),
                own: false,
            };
            let chosen = short_names::chosen_jobs(&client, &choice).await?;
            job_columns::list(output, &args.columns, &chosen)?;
        }
        JobsCommand::Diff(args) => job_diff::run(args, output).await?,
        JobsCommand::Metrics(args) => job_metrics::run(args, output).await?,
        JobsCommand::Get(args) => {
            let (client, name) = open_job(&args.named).await?;
            let job = client
                .training()
                .get_training_job(pb::GetTrainingJobRequest { name })
                .await?
                .into_inner();
            output::show_job(output, &job, fields(&args))?;
        }
        JobsCommand::Update(args) => {
            let changed = [
                ("display_name", args.title.is_some()),
                ("priority", args.priority.is_some()),
                ("labels", !args.label.is_empty()),
            ];
            let paths: Vec<String> = changed
                .into_iter()
                .filter(|(_, named)| *named)
                .map(|(field, _)| field.to_owned())
                .collect();
            if paths.is_empty() {
                return Err(Failure::Usage(
                    "nothing to change: give --title, --priority or --label".to_owned(),
                ));
            }
            let labels = distinct_labels(args.label)?;
            let (client, name) = open_job(&args.named).await?;
            let training_job = Some(pb::TrainingJob {
                name,
                etag: args.etag,
                display_name: args.title.unwrap_or_default(),
                priority: args.priority.unwrap_or_default(),
                labels,
                ..Default::default()
            });
            let request = pb::UpdateTrainingJobRequest {
                training_job,
                update_mask: Some(FieldMask { paths }),
            };
            let job = client
                .training()
                .update_training_job(request)
                .await?
                .into_inner();
            match output {
                Output::Table => output::done(output, "updated", &job.name),
                _ => output::show_job(output, &job, FieldSelection::Set)?,
            }
        }
        JobsCommand::Pause(args) => {
            let (client, name) = open_job(&args).await?;
            let job = client
                .training()
                .pause_training_job(pb::PauseTrainingJobRequest { name })
                .await?
                .into_inner();
            output::changed_job(output, &job)?;
        }
        JobsCommand::Resume(args) => {
            let (client, name) = open_job(&args).await?;
            let job = client
                .training()
                .resume_training_job(pb::ResumeTrainingJobRequest { name })
                .await?
                .into_inner();
            output::changed_job(output, &job)?;
        }
        JobsCommand::Cancel(args) => {
            let client = connect(&args.server.target()).await?;
            // With a name that is ambiguous or cannot be one, no job is cancelled.
            let mut names = Vec::new();
            for given in &args.names {
                names.push(short_names::job(&client, given).await?);
            }
            let is_single = names.len() == 1;
            let (mut cancelled, mut refused) = (Vec::new(), None);
            for name in names {
                let request = pb::CancelTrainingJobRequest { name };
                let job = match client.training().cancel_training_job(request).await {
                    Ok(job) => job.into_inner(),
                    Err(status) => {
                        refused = Some(status);
                        break;
                    }
                };
                if output == Output::Table {
                    output::changed_job(output, &job)?;
                }
                cancelled.push(job);
            }
            // Also the jobs before one that is refused.
            match &cancelled[..] {
                _ if output == Output::Table || cancelled.is_empty() => {}
                [one] if is_single => output::show_job(output, one, FieldSelection::Set)?,
                many => output::list(output, &[], vec![], output::messages(many)?),
            }
            if let Some(status) = refused {
                return Err(status.into());
            }
        }
        JobsCommand::Delete(args) => {
            let (client, name) = open_job(&args).await?;
            client
                .training()
                .delete_training_job(pb::DeleteTrainingJobRequest { name: name.clone() })
                .await?;
            output::deleted(output, &name);
        }
    }
    Ok(())
}

pub(super) async fn datasets(command: DatasetsCommand, output: Output) -> Outcome {
    match command {
        DatasetsCommand::Upload(args) => {
            let client = connect(&args.server.target()).await?;
            let data = progress::find(&args.files, &args.reading).await?;
            let model = match args.model.as_str() {
                "" => String::new(),
                given => short_names::model(&client, given).await?,
            };
            let metadata = pb::UploadMetadata {
                display_name: args.title.clone().unwrap_or_else(|| data.title()),
                format: pb::DatasetFormat::Unspecified.into(),
                model,
                max_length: args.max_length,
                ..Default::default()
            };
            let said = format!(
                "interrupted: if all rows were sent, the server may have stored them: bradley \
                 datasets list{}",
                server_flag(&args.server)
            );
            let uploading = progress::upload(&client, &data, metadata);
            let uploaded = unless_interrupted(&said, uploading).await?;
            for warning in uploaded.warnings() {
                progress::warn(&warning);
            }
            show(output, &uploaded.dataset, FieldSelection::Set)?;
        }
        DatasetsCommand::List(server) => {
            let client = connect(&server.target()).await?;
            let all = short_names::all_datasets(&client).await?;
            let rows = all
                .iter()
                .map(|d| {
                    let r = d.report.clone().unwrap_or_default();
                    vec![
                        d.name.clone(),
                        d.display_name.clone(),
                        r.rows.to_string(),
                        r.valid_rows.to_string(),
                        bytes(d.size_bytes),
                        time(d.create_time.as_ref()),
                    ]
                })
                .collect();
            output::list(
                output,
                &["name", "title", "rows", "usable", "size", "created"],
                rows,
                output::messages(&all)?,
            );
        }
        DatasetsCommand::Get(args) => {
            let (client, name) = open_dataset(&args.named).await?;
            let dataset = client
                .datasets()
                .get_dataset(pb::GetDatasetRequest { name })
                .await?
                .into_inner();
            show(output, &dataset, fields(&args))?;
        }
        DatasetsCommand::Delete(args) => {
            let (client, name) = open_dataset(&args).await?;
            client
                .datasets()
                .delete_dataset(pb::DeleteDatasetRequest { name: name.clone() })
                .await?;
            output::deleted(output, &name);
        }
    }
    Ok(())
}

pub(super) async fn checkpoints(command: CheckpointsCommand, output: Output) -> Outcome {
    match command {
        CheckpointsCommand::List(args) => {
            let (client, parent) = open_job(&args).await?;
            let all = client
                .checkpoints()
                .list_checkpoints(pb::ListCheckpointsRequest { parent })
                .await?
                .into_inner()
                .checkpoints;
            let rows = all
                .iter()
                .map(|c| {
                    vec![
                        c.name.clone(),
                        c.step.to_string(),
                        if c.best { "yes".into() } else { String::new() },
                        bytes(c.size_bytes),
                        time(c.create_time.as_ref()),
                    ]
                })
                .collect();
            output::list(
                output,
                &["name", "step", "best", "size", "created"],
                rows,
                output::messages(&all)?,
            );
        }
        CheckpointsCommand::Get(args) => {
            let (client, name) = open_checkpoint(&args.named).await?;
            let checkpoint = client
                .checkpoints()
                .get_checkpoint(pb::GetCheckpointRequest { name })
                .await?
                .into_inner();
            show(output, &checkpoint, fields(&args))?;
        }
        CheckpointsCommand::Download(args) => {
            check_new_or_empty(&args.out).await?;
            let (client, name) = open_checkpoint(&args.named).await?;
            let request = pb::DownloadCheckpointRequest {
                name,
                format: export_format(args.contents).into(),
                dtype: args.dtype,
            };
            let said = format!(
                "interrupted: the files in {} are not complete: remove them before the next \
                 download",
                args.out.display()
            );
            let downloading = async {
                let download = client.download(request, &args.out);
                let names = waiting("downloading the checkpoint", download).await;
                names.map_err(Failure::from)
            };
            let names = unless_interrupted(&said, downloading).await?;
            let rows = names
                .iter()
                .map(|n| vec![args.out.join(n).display().to_string()])
                .collect();
            output::list(
                output,
                &["file"],
                rows,
                names
                    .iter()
                    .map(|n| serde_json::json!(args.out.join(n)))
                    .collect(),
            );
        }
        CheckpointsCommand::Export(args) => {
            let (client, name) = open_checkpoint(&args.named).await?;
            let request = pb::ExportCheckpointRequest {
                name,
                format: export_format(args.contents).into(),
                dtype: args.dtype,
            };
            let mut checkpoints = client.checkpoints();
            let exporting = async {
                let export = checkpoints.export_checkpoint(request);
                let export = waiting("the server exports the checkpoint", export).await;
                export.map_err(Failure::from)
            };
            let export = unless_interrupted("interrupted", exporting).await?;
            let export = export.into_inner();
            let files: Vec<&str> = export.files.iter().map(|f| f.path.as_str()).collect();
            output::resource(
                output,
                &serde_json::json!({"path": export.path, "files": files}),
            );
        }
        CheckpointsCommand::Delete(args) => {
            let client = connect(&args.server.target()).await?;
            let name = short_names::one_checkpoint(&client, &args.name).await?;
            client
                .checkpoints()
                .delete_checkpoint(pb::DeleteCheckpointRequest { name: name.clone() })
                .await?;
            output::deleted(output, &name);
        }
    }
    Ok(())
}

/// Refuses a folder with files, because those of another download could not be told from the new
/// ones.
async fn check_new_or_empty(out: &Path) -> Outcome {
    let failed = |e: std::io::Error| Failure::Failed(format!("{}: {e}", out.display()));
    let mut entries = match tokio::fs::read_dir(out).await {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    match entries.next_entry().await.map_err(failed)? {
        None => Ok(()),
        Some(entry) => Err(Failure::Usage(format!(
            "--out: {} is not empty (it has {}): name a new folder, or remove what an interrupted \
             download has left",
            out.display(),
            entry.file_name().display()
        ))),
    }
}

fn export_format(contents: ContentsFlag) -> pb::ExportFormat {
    match contents {
        ContentsFlag::Auto => pb::ExportFormat::Unspecified,
        ContentsFlag::Adapter => pb::ExportFormat::Adapter,
        ContentsFlag::Merged => pb::ExportFormat::Merged,
    }
}

pub(super) async fn models(command: ModelsCommand, output: Output) -> Outcome {
    match command {
        ModelsCommand::List(server) => {
            let client = connect(&server.target()).await?;
            let all = short_names::all_models(&client).await?;
            let rows = all
                .iter()
                .map(|m| {
                    vec![
                        m.name.clone(),
                        m.architecture.clone(),
                        human::parameters(m.parameters),
                        m.max_position_embeddings.to_string(),
                        m.dtype.clone(),
                        if m.chat_template { "yes" } else { "no" }.to_owned(),
                        output::supported(m),
                        m.device.clone(),
                        output::flat::short(&m.fingerprint),
                        m.source.clone(),
                    ]
                })
                .collect();
            output::list(
                output,
                &[
                    "name",
                    "family",
                    "size",
                    "context",
                    "dtype",
                    "template",
                    "supported",
                    "device",
                    "weights",
                    "source",
                ],
                rows,
                output::messages(&all)?,
            );
        }
        ModelsCommand::Get(args) => {
            let client = connect(&args.named.server.target()).await?;
            let name = short_names::model(&client, &args.named.name).await?;
            let model = client
                .models()
                .get_model(pb::GetModelRequest { name })
                .await?
                .into_inner();
            show(output, &model, fields(&args))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::JOB_STATES;

    #[test]
    fn every_state_can_be_chosen_by_the_name_that_lists_show() {
        let mut chosen: Vec<i32> = JOB_STATES
            .iter()
            .map(|name| {
                let state = job_state(name).into();
                assert_eq!(output::state(state), *name);
                state
            })
            .collect();
        chosen.sort_unstable();
        let all: Vec<i32> = (1..)
            .take_while(|state| pb::JobState::try_from(*state).is_ok())
            .collect();
        assert_eq!(chosen, all);
    }
}
