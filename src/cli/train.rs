//! `bradley train`: uploads a dataset, submits a job and, with `--watch`, follows it.

use super::args::{Output, TrainArgs};
use super::data::{DataFiles, Uploaded};
use super::failure::{Failure, Outcome};
use super::remote::{connect, full_name};
use super::{output, watch};
use crate::rpc::client::{Client, ProtoDuration};
use crate::rpc::pb;

/// Maximum length of a chain of jobs in which each starts from a checkpoint of the next. Longer
/// chains are not followed to the base model.
const MAX_JOB_CHAIN: usize = 32;
const SECONDS_PER_DAY: i64 = 24 * 3600;

pub(super) async fn run(args: TrainArgs, output: Output) -> Outcome {
    let client = connect(&args.server.target()).await?;
    let policy = match &args.policy {
        Some(p) => p.clone(),
        None => only_model(&client).await?,
    };
    let limits = RowLimits {
        model: base_model(&client, &policy).await?,
        max_length: args.max_length.unwrap_or(0),
    };
    // All files are found before the first one is uploaded.
    let data = DataFiles::find(&args.data, &args.reading).await?;
    let eval_data = DataFiles::find(&args.eval_data, &args.reading).await?;
    let dataset = match &args.dataset {
        _ if !data.is_empty() => upload_for_job(&client, &data, &limits, &args, output).await?,
        Some(name) => full_name("datasets", name),
        None => return Err(Failure::Usage("name --data or --dataset".into())),
    };
    let evaluation = match args.eval_fraction {
        _ if !eval_data.is_empty() => Some(pb::training_job::Evaluation::EvalDataset(
            upload_for_job(&client, &eval_data, &limits, &args, output).await?,
        )),
        Some(f) => Some(pb::training_job::Evaluation::EvalFraction(f)),
        None => None,
    };
    let requested = job(&args, policy, dataset, evaluation)?;
    if args.estimate {
        let request = pb::EstimateTrainingJobRequest {
            training_job: Some(requested),
        };
        let estimate = client
            .training()
            .estimate_training_job(request)
            .await
            .map_err(with_flag_names)?
            .into_inner();
        output::resource(output, &output::estimate(&estimate));
        return Ok(());
    }
    let request = pb::CreateTrainingJobRequest {
        training_job: Some(requested),
        request_id: String::new(),
        validate_only: args.validate_only,
    };
    let job = client
        .training()
        .create_training_job(request)
        .await
        .map_err(with_flag_names)?
        .into_inner();
    if args.validate_only {
        output::resource(output, &output::job(&job));
        return Ok(());
    }
    if !args.watch {
        output::resource(output, &output::job(&job));
        return Ok(());
    }
    if output == Output::Table {
        output::line(&format!("{} is queued", job.name));
    }
    watch::follow(&client, &job.name, 0, output).await
}

fn job(
    args: &TrainArgs,
    policy: String,
    dataset: String,
    evaluation: Option<pb::training_job::Evaluation>,
) -> Result<pb::TrainingJob, Failure> {
    let method = match args.full {
        true => pb::training_job::Method::Full(pb::FullConfig {}),
        false => pb::training_job::Method::Lora(pb::LoraConfig {
            rank: args.rank,
            alpha: args.alpha,
            target_modules: args.target_modules.clone(),
            ..Default::default()
        }),
    };
    Ok(pb::TrainingJob {
        display_name: args.name.clone(),
        priority: args.priority,
        policy,
        reference: args.reference.clone().unwrap_or_default(),
        dataset,
        evaluation,
        method: Some(method),
        dpo: Some(pb::DpoConfig {
            losses: losses(args.loss.as_deref())?,
            beta: args.beta,
            label_smoothing: args.label_smoothing,
            ..Default::default()
        }),
        optimizer: Some(pb::OptimizerConfig {
            learning_rate: args.learning_rate,
            lr_scheduler_type: args.schedule.clone().unwrap_or_default(),
            warmup_ratio: args.warmup_ratio,
            ..Default::default()
        }),
        batch: Some(pb::BatchConfig {
            batch_size: args.batch_size,
            gradient_accumulation_steps: args.gradient_accumulation_steps,
            max_length: args.max_length,
            epochs: args.epochs,
            max_steps: args.max_steps,
            ..Default::default()
        }),
        run: Some(pb::RunConfig {
            save_steps: args.save_steps,
            eval_steps: args.eval_steps,
            ..Default::default()
        }),
        seed: args.seed,
        precision: args.precision.clone().unwrap_or_default(),
        ttl: args.ttl_days.map(|days| ProtoDuration {
            seconds: i64::from(days) * SECONDS_PER_DAY,
            nanos: 0,
        }),
        chat_template_kwargs_json: super::score::template_arguments(args.template_args.as_deref())?,
        row_policy: if args.skip_bad_rows {
            pb::RowPolicy::Skip.into()
        } else {
            pb::RowPolicy::Reject.into()
        },
        ..Default::default()
    })
}

/// Parses a loss or a mix: `sigmoid` or `sigmoid=0.8,sft=0.2`.
fn losses(text: Option<&str>) -> Result<Vec<pb::WeightedLoss>, Failure> {
    let mut losses = Vec::new();
    for part in text
        .unwrap_or_default()
        .split(',')
        .filter(|p| !p.is_empty())
    {
        let (name, weight) = part.split_once('=').unwrap_or((part, "1"));
        let weight = weight.parse().map_err(|_| {
            Failure::Usage(format!("--loss: the weight in {part:?} is not a number"))
        })?;
        losses.push(pb::WeightedLoss {
            loss_type: name.to_owned(),
            weight: Some(weight),
            ..Default::default()
        });
    }
    Ok(losses)
}

async fn only_model(client: &Client) -> Result<String, Failure> {
    let models = client
        .models()
        .list_models(pb::ListModelsRequest {})
        .await?
        .into_inner()
        .models;
    match &models[..] {
        [one] => Ok(one.name.clone()),
        many => {
            let names: Vec<&str> = many.iter().map(|m| m.name.as_str()).collect();
            Err(Failure::Usage(format!(
                "the server has {} models: name one with --policy ({})",
                many.len(),
                names.join(", ")
            )))
        }
    }
}

/// Model and maximum length with which the server checks the rows of an uploaded file.
#[derive(Clone, Debug, Default)]
struct RowLimits {
    /// `models/{id}`; empty leaves lengths unchecked.
    model: String,
    /// Tokens of prompt and answer; 0 is the server's default.
    max_length: u32,
}

/// Returns the base model of a policy. For a checkpoint it follows the policies of the jobs back to
/// a base model. The result is empty if the base model cannot be determined.
async fn base_model(client: &Client, policy: &str) -> Result<String, Failure> {
    let mut policy = policy.to_owned();
    for _ in 0..MAX_JOB_CHAIN {
        if policy.starts_with("models/") {
            return Ok(policy);
        }
        let Some((job, _)) = policy.split_once("/checkpoints/") else {
            break;
        };
        let request = pb::GetTrainingJobRequest {
            name: job.to_owned(),
        };
        match client.training().get_training_job(request).await {
            Ok(job) => policy = job.into_inner().policy,
            // The job was deleted, or the name is wrong and the server will refuse it with a
            // reason.
            Err(_) => break,
        }
    }
    Ok(String::new())
}

/// Uploads files and lets the server check them with the job's model and maximum length. Returns
/// the dataset's name.
///
/// # Errors
/// Returns a failure if the server would refuse the job because of these rows.
async fn upload_for_job(
    client: &Client,
    data: &DataFiles,
    limits: &RowLimits,
    args: &TrainArgs,
    output: Output,
) -> Result<String, Failure> {
    let metadata = pb::UploadMetadata {
        display_name: data.title(),
        model: limits.model.clone(),
        max_length: limits.max_length,
        ..Default::default()
    };
    let uploaded = data.upload(client, metadata, |_| {}).await?;
    if output == Output::Table {
        print_findings(&uploaded);
    }
    match uploaded.refusal() {
        Some(refusal) if !args.skip_bad_rows => {
            let example = match output {
                // The findings have been printed.
                Output::Table => None,
                Output::Json => uploaded.first_error(),
            };
            let example = example.map(|e| format!(" ({e})")).unwrap_or_default();
            Err(Failure::Failed(format!(
                "{} of {} cannot be used{example}: {}",
                refusal.rows,
                data.title(),
                refusal.remedy
            )))
        }
        _ => Ok(uploaded.dataset.name),
    }
}

/// Prints the findings of the validation of an upload.
fn print_findings(uploaded: &Uploaded) {
    let r = uploaded.dataset.report.clone().unwrap_or_default();
    output::line(&format!(
        "{} holds {} rows, {} of them usable",
        uploaded.dataset.name, r.rows, r.valid_rows
    ));
    if let Some(shapes) = output::shapes(&r) {
        output::line(&format!("  {shapes}"));
    }
    for finding in uploaded.findings(10) {
        output::line(&format!("  {finding}"));
    }
    if let Some(warning) = uploaded.left_out.warning() {
        output::line(&format!("  {warning}"));
    }
}

/// Converts a refused call to a failure, and replaces the API's field names in its text by flags.
fn with_flag_names(status: crate::rpc::client::Status) -> Failure {
    const FLAGS: [(&str, &str); 3] = [
        (
            "set row_policy to SKIP to train on the other",
            "leave them out with --skip-bad-rows to train on the other",
        ),
        (
            "set row_policy to SKIP",
            "leave them out with --skip-bad-rows",
        ),
        ("with max_length", "with --max-length"),
    ];
    let replace = |message: String| {
        FLAGS
            .iter()
            .fold(message, |text, (field, flag)| text.replace(field, flag))
    };
    match Failure::from(status) {
        Failure::Failed(m) => Failure::Failed(replace(m)),
        Failure::Usage(m) => Failure::Usage(replace(m)),
        Failure::Unreachable(m) => Failure::Unreachable(m),
    }
}
