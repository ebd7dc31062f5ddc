//! `bradley jobs | datasets | checkpoints | models`: commands for resources of a server.

use super::args::{
    CheckpointsCommand, DatasetsCommand, Format, JobsCommand, ModelsCommand, NamedArgs, Output,
};
use super::data::DataFiles;
use super::failure::{Failure, Outcome};
use super::output::{self, bytes, state, time};
use super::remote::{connect, full_name};
use crate::rpc::client::{Client, FieldMask};
use crate::rpc::pb;

/// Connects to the server and completes the resource's name with the prefix `{collection}/`.
async fn open(args: &NamedArgs, collection: &str) -> Result<(Client, String), Failure> {
    Ok((
        connect(&args.server.target()).await?,
        full_name(collection, &args.name),
    ))
}

pub(super) async fn jobs(command: JobsCommand, output: Output) -> Outcome {
    const JOBS: &str = "trainingJobs";
    match command {
        JobsCommand::List(server) => {
            let client = connect(&server.target()).await?;
            let (mut all, mut page_token) = (Vec::new(), String::new());
            loop {
                let request = pb::ListTrainingJobsRequest {
                    page_size: 1000,
                    page_token,
                    states: vec![],
                };
                let page = client
                    .training()
                    .list_training_jobs(request)
                    .await?
                    .into_inner();
                all.extend(page.training_jobs);
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            let rows = all
                .iter()
                .map(|j| {
                    let p = j.progress.unwrap_or_default();
                    vec![
                        j.name.clone(),
                        state(j.state),
                        format!("{}/{}", p.step, p.total_steps),
                        j.policy.clone(),
                        j.display_name.clone(),
                        time(j.create_time.as_ref()),
                    ]
                })
                .collect();
            output::list(
                output,
                &["name", "state", "steps", "policy", "title", "created"],
                rows,
                all.iter().map(output::job).collect(),
            );
        }
        JobsCommand::Get(args) => {
            let (client, name) = open(&args, JOBS).await?;
            let job = client
                .training()
                .get_training_job(pb::GetTrainingJobRequest { name })
                .await?
                .into_inner();
            output::resource(output, &output::job(&job));
        }
        JobsCommand::Update(args) => {
            let (client, name) = open(&args.named, JOBS).await?;
            let changed = [
                ("display_name", args.title.is_some()),
                ("priority", args.priority.is_some()),
                ("labels", !args.label.is_empty()),
            ];
            let paths = changed
                .into_iter()
                .filter(|(_, named)| *named)
                .map(|(field, _)| field.to_owned())
                .collect();
            let training_job = Some(pb::TrainingJob {
                name,
                etag: args.etag,
                display_name: args.title.unwrap_or_default(),
                priority: args.priority.unwrap_or_default(),
                labels: args.label.into_iter().collect(),
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
            output::resource(output, &output::job(&job));
        }
        JobsCommand::Pause(args) => {
            let (client, name) = open(&args, JOBS).await?;
            let job = client
                .training()
                .pause_training_job(pb::PauseTrainingJobRequest { name })
                .await?
                .into_inner();
            output::resource(output, &output::job(&job));
        }
        JobsCommand::Resume(args) => {
            let (client, name) = open(&args, JOBS).await?;
            let job = client
                .training()
                .resume_training_job(pb::ResumeTrainingJobRequest { name })
                .await?
                .into_inner();
            output::resource(output, &output::job(&job));
        }
        JobsCommand::Cancel(args) => {
            let (client, name) = open(&args, JOBS).await?;
            let job = client
                .training()
                .cancel_training_job(pb::CancelTrainingJobRequest { name })
                .await?
                .into_inner();
            output::resource(output, &output::job(&job));
        }
        JobsCommand::Delete(args) => {
            let (client, name) = open(&args, JOBS).await?;
            client
                .training()
                .delete_training_job(pb::DeleteTrainingJobRequest { name })
                .await?;
        }
    }
    Ok(())
}

pub(super) async fn datasets(command: DatasetsCommand, output: Output) -> Outcome {
    const DATASETS: &str = "datasets";
    match command {
        DatasetsCommand::Upload(args) => {
            let client = connect(&args.server.target()).await?;
            let data = DataFiles::find(&args.files, &args.reading).await?;
            let model = if args.model.is_empty() {
                String::new()
            } else {
                full_name("models", &args.model)
            };
            let metadata = pb::UploadMetadata {
                display_name: args.name.clone().unwrap_or_else(|| data.title()),
                format: pb::DatasetFormat::Unspecified.into(),
                model,
                max_length: args.max_length,
            };
            let bar = match data.bytes() {
                Some(size) => indicatif::ProgressBar::new(size),
                None => indicatif::ProgressBar::new_spinner(),
            };
            let progress = bar.clone();
            let uploaded = data
                .upload(&client, metadata, move |n| progress.set_position(n))
                .await;
            bar.finish_and_clear();
            let uploaded = uploaded?;
            if let Some(warning) = uploaded.left_out.warning() {
                super::score::warn(&warning);
            }
            output::resource(output, &output::dataset(&uploaded.dataset));
        }
        DatasetsCommand::List(server) => {
            let client = connect(&server.target()).await?;
            let (mut all, mut page_token) = (Vec::new(), String::new());
            loop {
                let page = client
                    .datasets()
                    .list_datasets(pb::ListDatasetsRequest {
                        page_size: 1000,
                        page_token,
                    })
                    .await?
                    .into_inner();
                all.extend(page.datasets);
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
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
                all.iter().map(output::dataset).collect(),
            );
        }
        DatasetsCommand::Get(args) => {
            let (client, name) = open(&args, DATASETS).await?;
            let dataset = client
                .datasets()
                .get_dataset(pb::GetDatasetRequest { name })
                .await?
                .into_inner();
            output::resource(output, &output::dataset(&dataset));
        }
        DatasetsCommand::Delete(args) => {
            let (client, name) = open(&args, DATASETS).await?;
            client
                .datasets()
                .delete_dataset(pb::DeleteDatasetRequest { name })
                .await?;
        }
    }
    Ok(())
}

pub(super) async fn checkpoints(command: CheckpointsCommand, output: Output) -> Outcome {
    const JOBS: &str = "trainingJobs";
    match command {
        CheckpointsCommand::List(args) => {
            let (client, parent) = open(&args, JOBS).await?;
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
                all.iter().map(output::checkpoint).collect(),
            );
        }
        CheckpointsCommand::Download(args) => {
            let (client, name) = open(&args.named, JOBS).await?;
            let request = pb::DownloadCheckpointRequest {
                name,
                format: format(args.format).into(),
                dtype: args.dtype,
            };
            let names = client.download(request, &args.out).await?;
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
            let (client, name) = open(&args.named, JOBS).await?;
            let request = pb::ExportCheckpointRequest {
                name,
                format: format(args.format).into(),
                dtype: args.dtype,
            };
            let export = client
                .checkpoints()
                .export_checkpoint(request)
                .await?
                .into_inner();
            let files: Vec<&str> = export.files.iter().map(|f| f.path.as_str()).collect();
            output::resource(
                output,
                &serde_json::json!({"path": export.path, "files": files}),
            );
        }
        CheckpointsCommand::Delete(args) => {
            let (client, name) = open(&args, JOBS).await?;
            client
                .checkpoints()
                .delete_checkpoint(pb::DeleteCheckpointRequest { name })
                .await?;
        }
    }
    Ok(())
}

fn format(f: Format) -> pb::ExportFormat {
    match f {
        Format::Auto => pb::ExportFormat::Unspecified,
        Format::Adapter => pb::ExportFormat::Adapter,
        Format::Merged => pb::ExportFormat::Merged,
    }
}

pub(super) async fn models(command: ModelsCommand, output: Output) -> Outcome {
    match command {
        ModelsCommand::List(server) => {
            let client = connect(&server.target()).await?;
            let all = client
                .models()
                .list_models(pb::ListModelsRequest {})
                .await?
                .into_inner()
                .models;
            let rows = all
                .iter()
                .map(|m| {
                    vec![
                        m.name.clone(),
                        m.architecture.clone(),
                        output::parameters(m.parameters),
                        m.max_position_embeddings.to_string(),
                        m.dtype.clone(),
                        if m.chat_template { "yes" } else { "no" }.to_owned(),
                        output::supported(m),
                        m.device.clone(),
                        output::short(&m.fingerprint),
                        m.source.clone(),
                    ]
                })
                .collect();
            output::list(
                output,
                &[
                    "name",
                    "architecture",
                    "parameters",
                    "context",
                    "dtype",
                    "chat template",
                    "supported",
                    "device",
                    "weights",
                    "source",
                ],
                rows,
                all.iter().map(output::model).collect(),
            );
        }
        ModelsCommand::Get(args) => {
            let (client, name) = open(&args, "models").await?;
            let model = client
                .models()
                .get_model(pb::GetModelRequest { name })
                .await?
                .into_inner();
            output::resource(output, &output::model(&model));
        }
    }
    Ok(())
}
