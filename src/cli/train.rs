//! `bradley train`: reads jobs from flags and a file, uploads their data, creates them and, with
//! `--watch`, follows one.

use std::io::Read;
use std::path::Path;

use serde_json::{Value, json};

use super::args::{Output, TrainArgs};
use super::failure::{Failure, Outcome};
use super::flag_names::{JobFile, JobWords};
use super::job_creation::create_job;
use super::job_flags::{JobVariant, MAX_SWEEP, OUTPUT_ONLY, get, remove, set};
use super::job_rows::{JobRows, RowLimits};
use super::policy_names::PolicyNames;
use super::remote::{connect, server_flag};
use super::watch::{self, ProgressView};
use super::{output, progress, short_names};
use crate::domain::logged::LOGGED_REFERENCE;
use crate::domain::violation::shortened;
use crate::rpc::canonical::{self, CanonicalError, FieldSelection, KeyMatch};
use crate::rpc::client::{Client, ClientError, FirstEvent, field_violations};
use crate::rpc::pb::{self, training_job::Evaluation};

/// Maximum length of a chain of jobs in which each starts from a checkpoint of the next. Longer
/// chains are not followed to the base model.
const MAX_JOB_CHAIN: usize = 32;
/// Maximum size of a job file in bytes.
const MAX_JOB_FILE: u64 = 1 << 20;
/// Maximum number of keys of a job file that an error names, and of characters of each.
const MAX_NAMED_KEYS: usize = 8;
const MAX_KEY_CHARS: usize = 50;
/// Label with the id of a sweep, which all its jobs have.
const SWEEP_LABEL: &str = "sweep";

pub(super) async fn run(mut args: TrainArgs, output: Output) -> Outcome {
    if let Some(days) = args.ttl_days {
        args.job.add("ttl", format!("{days}d"));
    }
    let is_job_piped = args.file.as_ref().is_some_and(|f| f.as_os_str() == "-");
    let piped = args
        .data
        .iter()
        .chain(&args.eval_data)
        .filter(|f| *f == "-");
    if usize::from(is_job_piped) + piped.count() > 1 {
        return Err(Failure::Usage(
            "- stands for the standard input and can be named once in --file (-f), --data and \
             --eval-data"
                .into(),
        ));
    }
    if args.watch {
        watch::check_format(output)?;
    }
    let (file, documents) = match args.file.as_deref().map(read_job_file).transpose()? {
        Some((file, documents)) => (Some(file), documents),
        None => (None, vec![json!({})]),
    };
    let variants = variants(&args, file.as_ref(), &documents)?;
    let uploads = [
        ("data", !args.data.is_empty()),
        ("eval-data", !args.eval_data.is_empty()),
    ];
    let words = JobWords {
        flags: args.job.clone(),
        file,
        uploads: uploads
            .into_iter()
            .filter(|(_, is_given)| *is_given)
            .map(|(flag, _)| flag)
            .collect(),
    };
    let mut jobs = requested(variants, &args)?;
    if args.print_job {
        for (i, job) in jobs.iter().enumerate() {
            if i > 0 {
                output::line("---");
            }
            let yaml = canonical::to_yaml(&job.request, FieldSelection::Set).map_err(unreadable)?;
            output::line(yaml.trim_end());
        }
        return Ok(());
    }
    if args.watch && jobs.len() > 1 {
        return Err(Failure::Usage(format!(
            "--watch follows one job, and these values make {}: leave it out, and follow one with \
             bradley watch",
            jobs.len()
        )));
    }
    if args.data.is_empty() && jobs.iter().any(|job| job.request.dataset.is_empty()) {
        let place = args.file.as_ref().map(|f| f.display().to_string());
        return Err(Failure::Usage(format!(
            "{} has no dataset: name --data or --dataset",
            place.unwrap_or_else(|| "the job".into())
        )));
    }
    let client = connect(&args.server.target()).await?;
    complete_names(&client, &mut jobs, &words).await?;
    let uses_logged = jobs
        .iter()
        .any(|job| job.request.reference == LOGGED_REFERENCE);
    let mut call = TrainCall {
        rows: JobRows::new(&client, output).with_logged(uses_logged),
        sources: Vec::new(),
        client,
        words,
        output,
    };
    match call.prepare(&args, &mut jobs).await {
        Ok(()) => {}
        Err(failure) => {
            // Nothing uses the uploads of a refused call.
            let failure = match call.rows.remove_uploads().await {
                Some(remaining) => note(failure, &remaining),
                None => failure,
            };
            return Err(failure);
        }
    }
    call.finish(&args, jobs).await
}

/// A job of the call.
struct PlannedJob {
    request: pb::TrainingJob,
    /// Makes a repeated call return the job of the first one.
    request_id: String,
    /// The values in which it differs from the sweep's other jobs; empty for a single job.
    difference: String,
}

impl PlannedJob {
    /// Puts the job's place in its sweep before a message.
    fn place(&self, failure: Failure) -> Failure {
        match self.difference.as_str() {
            "" => failure,
            difference => before(failure, difference),
        }
    }
}

/// Changes the message of a failure of the call. A server that is not reached and Ctrl-C have
/// messages of their own, which stay as they are.
fn change(failure: Failure, with: impl Fn(String) -> String) -> Failure {
    match failure {
        Failure::Failed(m) => Failure::Failed(with(m)),
        Failure::Usage(m) => Failure::Usage(with(m)),
        other => other,
    }
}

/// Puts a text before the message.
fn before(failure: Failure, text: &str) -> Failure {
    change(failure, |message| format!("{text}: {message}"))
}

/// Adds a line to the message.
fn note(failure: Failure, text: &str) -> Failure {
    change(failure, |message| format!("{message}\n  {text}"))
}

/// A job of the call, with its place in a file of several jobs; the place is empty otherwise.
struct PlacedVariant {
    place: String,
    variant: JobVariant,
}

/// Applies the flags to each job of the file.
fn variants(
    args: &TrainArgs,
    file: Option<&JobFile>,
    documents: &[Value],
) -> Result<Vec<PlacedVariant>, Failure> {
    let mut all = Vec::new();
    for (i, document) in documents.iter().enumerate() {
        let place = match file {
            Some(file) if documents.len() > 1 => format!("{} job {}", file.name, i + 1),
            _ => String::new(),
        };
        let of_document = args.job.apply(document).map_err(Failure::Usage)?;
        all.extend(of_document.into_iter().map(|variant| PlacedVariant {
            place: place.clone(),
            variant,
        }));
    }
    if all.len() > MAX_SWEEP {
        return Err(Failure::Usage(format!(
            "the file's {} jobs make {} with the values of the flags: at most {MAX_SWEEP} are \
             created together",
            documents.len(),
            all.len()
        )));
    }
    Ok(all)
}

/// Reads a job file, YAML or JSON, with one job or, as YAML documents, several. `-` reads standard
/// input. The fields of the returned file are those of all its jobs.
///
/// # Errors
/// Returns a failure if the file cannot be read or has fields that jobs do not have.
pub(super) fn read_job_file(path: &Path) -> Result<(JobFile, Vec<Value>), Failure> {
    let name = match path.to_str() {
        Some("-") => "standard input".to_owned(),
        _ => path.display().to_string(),
    };
    let failed = |e: std::io::Error| Failure::Failed(format!("{name}: {e}"));
    let mut text = String::new();
    let source: Box<dyn Read> = match path.to_str() {
        Some("-") => Box::new(std::io::stdin()),
        _ => Box::new(std::fs::File::open(path).map_err(failed)?),
    };
    source
        .take(MAX_JOB_FILE + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > MAX_JOB_FILE {
        return Err(Failure::Usage(format!(
            "{name} is larger than {MAX_JOB_FILE} bytes: a job file has the fields of jobs"
        )));
    }
    let usage = |e: CanonicalError| Failure::Usage(format!("{name}: {e}"));
    let mut documents = canonical::values_of_yaml(&text).map_err(usage)?;
    if documents.is_empty() {
        documents.push(Value::Null);
    }
    let is_one = documents.len() == 1;
    let mut fields = json!({});
    for (i, document) in documents.iter_mut().enumerate() {
        *document = read_job(std::mem::take(document)).map_err(|reason| {
            Failure::Usage(match is_one {
                true => format!("{name}: {reason}"),
                false => format!("{name} job {}: {reason}", i + 1),
            })
        })?;
        merge(&mut fields, document);
    }
    Ok((JobFile { name, fields }, documents))
}

/// Adds the fields of `other`, also those of nested objects.
fn merge(fields: &mut Value, other: &Value) {
    match (fields, other) {
        (Value::Object(fields), Value::Object(other)) => {
            for (key, value) in other {
                merge(fields.entry(key).or_insert(Value::Null), value);
            }
        }
        (field, other) => *field = other.clone(),
    }
}

/// Reads a job as canonical JSON, without the fields that only the server sets. An error says what
/// is wrong with the job.
fn read_job(mut fields: Value) -> Result<Value, String> {
    const EXAMPLE: &str = "bradley train --print-job prints a job file";
    let text = |e: CanonicalError| e.to_string();
    let Value::Object(object) = &mut fields else {
        let kind = match fields {
            Value::Null => "empty",
            Value::Array(_) => "a list",
            _ => "a single value",
        };
        return Err(format!(
            "this is {kind}, and a job is an object with fields of {}; {EXAMPLE}",
            settable_fields().map_err(text)?
        ));
    };
    object.retain(|key, _| !OUTPUT_ONLY.contains(&key.as_str()));
    let mut found = 0;
    let mut misspelt = 0;
    let mut unknown = Vec::new();
    for key in object.keys() {
        match canonical::match_key::<pb::TrainingJob>(key).map_err(text)? {
            KeyMatch::Field => found += 1,
            KeyMatch::Misspelt => misspelt += 1,
            KeyMatch::Unknown => unknown.push(key.clone()),
        }
    }
    object.retain(|key, _| !unknown.contains(key));
    let read = canonical::from_value(fields)
        .and_then(|job: pb::TrainingJob| canonical::to_value(&job, FieldSelection::Set));
    if unknown.is_empty() {
        return read.map_err(text);
    }
    let settable = settable_fields().map_err(text)?;
    let wrong = format!("{}: a job has {settable}", do_not_exist(&unknown));
    match read {
        _ if found == 0 && unknown.len() > misspelt => {
            Err(format!("this is no job file: {wrong}; {EXAMPLE}"))
        }
        Ok(_) => Err(wrong),
        Err(other) => Err(format!("{wrong}; {other}")),
    }
}

/// Says that keys do not exist, and names the first of them.
fn do_not_exist(keys: &[String]) -> String {
    let first = keys.iter().take(MAX_NAMED_KEYS);
    let short: Vec<String> = first.map(|key| shortened(key, MAX_KEY_CHARS)).collect();
    let named = short.join(", ");
    match keys.len() {
        1 => format!("{named} does not exist"),
        all if all > MAX_NAMED_KEYS => {
            format!("{named} and {} more do not exist", all - MAX_NAMED_KEYS)
        }
        _ => format!("{named} do not exist"),
    }
}

/// Returns the names of the fields that a job file can set, separated by commas.
fn settable_fields() -> Result<String, CanonicalError> {
    let paths = canonical::field_paths::<pb::TrainingJob>()?;
    let names: Vec<&str> = paths
        .iter()
        .map(|field| field.path.as_str())
        .filter(|path| !path.contains('.') && !OUTPUT_ONLY.contains(path))
        .collect();
    Ok(names.join(", "))
}

fn unreadable(error: CanonicalError) -> Failure {
    Failure::Usage(error.to_string())
}

/// Converts the jobs of a call to messages. A job of a sweep gets labels and a title of its own.
fn requested(variants: Vec<PlacedVariant>, args: &TrainArgs) -> Result<Vec<PlannedJob>, Failure> {
    let id = uuid::Uuid::now_v7().simple().to_string();
    // The last digits are random, the first ones are the time.
    let sweep = &id[id.len() - 8..];
    let planned = variants
        .into_iter()
        .map(|PlacedVariant { place, variant }| {
            let values = variant.describe();
            let difference = format!("{place} {values}").trim().to_owned();
            let mut fields = variant.fields;
            if !args.eval_data.is_empty() {
                remove(&mut fields, "eval_fraction");
            }
            if get(&fields, "full").is_none() && get(&fields, "lora").is_none() {
                set(&mut fields, "lora", json!({}));
            }
            let mut request: pb::TrainingJob = canonical::from_value(fields).map_err(unreadable)?;
            if !variant.swept.is_empty() {
                let labels = &mut request.labels;
                // The caller may name the sweep.
                let name = labels.entry(SWEEP_LABEL.to_owned());
                name.or_insert_with(|| sweep.to_owned());
                for (flag, value) in variant.swept {
                    let label = flag.replace('-', "_");
                    if labels.contains_key(&label) {
                        return Err(Failure::Usage(format!(
                            "--label {label}: a sweep over --{flag} sets this label itself: choose \
                         another key, or leave the label out"
                        )));
                    }
                    labels.insert(label, value);
                }
                request.display_name = format!("{} {values}", request.display_name)
                    .trim_start()
                    .to_owned();
            }
            Ok(PlannedJob {
                request,
                request_id: format!("train-{}", uuid::Uuid::now_v7().simple()),
                difference,
            })
        });
    planned.collect()
}

/// Completes the names of policies, references and datasets.
async fn complete_names(
    client: &Client,
    jobs: &mut [PlannedJob],
    words: &JobWords,
) -> Result<(), Failure> {
    let names = PolicyNames::of(client).await?;
    for job in jobs {
        let request = &mut job.request;
        request.policy = match request.policy.as_str() {
            "" => names.only_model("--policy")?,
            given => {
                names
                    .complete(&words.of_field("training_job.policy"), given)
                    .await?
            }
        };
        if !request.reference.is_empty() && request.reference != LOGGED_REFERENCE {
            let word = words.of_field("training_job.reference");
            request.reference = names.complete(&word, &request.reference).await?;
        }
        if !request.dataset.is_empty() {
            request.dataset = short_names::dataset(client, &request.dataset).await?;
        }
        if let Some(Evaluation::EvalDataset(name)) = &mut request.evaluation {
            *name = short_names::dataset(client, name).await?;
        }
    }
    Ok(())
}

/// A call of `train` with its connection.
struct TrainCall {
    client: Client,
    words: JobWords,
    rows: JobRows,
    /// Names of the datasets with the rows of files, and of these files with their flag.
    sources: Vec<(String, String)>,
    output: Output,
}

impl TrainCall {
    /// Checks the jobs, uploads their data, and checks them again with it.
    async fn prepare(&mut self, args: &TrainArgs, jobs: &mut [PlannedJob]) -> Result<(), Failure> {
        if jobs.len() > 1 && self.output == Output::Table {
            output::line(&format!("{} jobs:", jobs.len()));
            for job in jobs.iter() {
                output::line(&format!("  {}", job.difference));
            }
        }
        let uploads = !args.data.is_empty() || !args.eval_data.is_empty();
        if uploads {
            for job in jobs.iter() {
                self.check_without_data(args, job).await?;
            }
        }
        // All files are found before the first one is uploaded.
        let data = progress::find(&args.data, &args.reading).await?;
        let eval_data = progress::find(&args.eval_data, &args.reading).await?;
        for job in jobs.iter_mut() {
            let batch = job.request.batch.as_ref();
            let limits = RowLimits {
                model: match uploads {
                    true => base_model(&self.client, &job.request.policy).await?,
                    false => String::new(),
                },
                max_length: batch.and_then(|b| b.max_length).unwrap_or(0),
            };
            let skips = job.request.row_policy() == pb::RowPolicy::Skip;
            if !data.is_empty() {
                let name = self.rows.dataset(&data, &limits, skips).await?;
                let source = format!("{} of --data", data.title());
                self.sources.push((name.clone(), source));
                job.request.dataset = name;
            }
            if !eval_data.is_empty() {
                let name = self.rows.dataset(&eval_data, &limits, skips).await?;
                let source = format!("{} of --eval-data", eval_data.title());
                self.sources.push((name.clone(), source));
                job.request.evaluation = Some(Evaluation::EvalDataset(name));
            }
        }
        // A sweep is created as a whole or not at all, as far as its jobs can be checked before.
        if jobs.len() > 1 && !args.estimate && !args.validate_only {
            for job in jobs.iter() {
                self.create(job, true).await?;
            }
        }
        Ok(())
    }

    /// Checks the values of a job's fields before the data is uploaded. The server refuses the
    /// missing datasets in any case, and tells the other wrong values with them. What depends on
    /// the model or on another job, it checks only with the datasets.
    async fn check_without_data(&self, args: &TrainArgs, job: &PlannedJob) -> Result<(), Failure> {
        let mut request = job.request.clone();
        if !args.data.is_empty() {
            request.dataset = String::new();
        }
        if !args.eval_data.is_empty() {
            request.evaluation = Some(Evaluation::EvalDataset(String::new()));
        }
        let request = pb::CreateTrainingJobRequest {
            training_job: Some(request),
            request_id: String::new(),
            validate_only: true,
        };
        let Err(refused) = self.client.training().create_training_job(request).await else {
            return Ok(());
        };
        let missing = ["training_job.dataset", "training_job.eval_dataset"];
        let has_other = field_violations(&refused)
            .iter()
            .any(|(field, _)| !missing.contains(&field.as_str()));
        if !has_other {
            return Ok(());
        }
        Err(job.place(self.words.failure_without(refused, &missing)))
    }

    async fn create(
        &self,
        job: &PlannedJob,
        validate_only: bool,
    ) -> Result<pb::TrainingJob, Failure> {
        let request = pb::CreateTrainingJobRequest {
            training_job: Some(job.request.clone()),
            request_id: job.request_id.clone(),
            validate_only,
        };
        let asked = create_job(&self.client, request);
        let answer = progress::waiting("the server checks the job", asked).await;
        answer.map_err(|e| self.refused(job, e))
    }

    /// Converts the refusal of a job to a failure in the caller's words: with flags in place of
    /// fields, and with files in place of the datasets with their rows.
    fn refused(&self, job: &PlannedJob, error: impl Into<ClientError>) -> Failure {
        let refused = job.place(self.words.failure(error));
        let sources = self.sources.iter();
        sources.fold(refused, |refused, (name, source)| {
            refused.replacing(name, source)
        })
    }

    /// Estimates, validates or creates the jobs, and prints the answers.
    async fn finish(self, args: &TrainArgs, jobs: Vec<PlannedJob>) -> Outcome {
        if args.estimate {
            return self.estimate(jobs).await;
        }
        let mut made = Vec::new();
        for job in &jobs {
            match self.create(job, args.validate_only).await {
                Ok(answer) => made.push((job, answer)),
                Err(failure) => return Err(self.give_up(args, failure, &made).await),
            }
        }
        if let ([(_, job)], true, false) = (&made[..], args.watch, args.validate_only) {
            if self.output == Output::Table {
                output::line(&format!("{} is queued", job.name));
            }
            let first = FirstEvent::After(0);
            let view = ProgressView::new(self.output).with_words(&self.words);
            return watch::follow(&self.client, &args.server, &job.name, first, view).await;
        }
        if let [(_, job)] = &made[..] {
            if args.validate_only {
                progress::say("the job is valid; because of --validate-only it was not created");
            }
            output::show_job(self.output, job, FieldSelection::Set)?;
            self.say_next_step(args, &made);
            return Ok(());
        }
        let header = ["name", "state", "differs in"];
        let state = |job: &pb::TrainingJob| match args.validate_only {
            true => "valid".to_owned(),
            false => output::state(job.state),
        };
        let rows = made
            .iter()
            .map(|(planned, job)| vec![job.name.clone(), state(job), planned.difference.clone()])
            .collect();
        let all: Vec<pb::TrainingJob> = made.iter().map(|(_, job)| job.clone()).collect();
        output::list(self.output, &header, rows, output::messages(&all)?);
        self.say_next_step(args, &made);
        Ok(())
    }

    /// Tells a person how to follow the jobs that were created.
    fn say_next_step(&self, args: &TrainArgs, made: &[(&PlannedJob, pb::TrainingJob)]) {
        if self.output != Output::Table || args.validate_only {
            return;
        }
        let jobs: Vec<&pb::TrainingJob> = made.iter().map(|(_, job)| job).collect();
        if let Some(step) = next_step(&jobs, &server_flag(&args.server)) {
            progress::say(&step);
        }
    }

    /// Adds to a failure what happened before it: uploads are removed if no job was made, and
    /// otherwise the made jobs are named.
    async fn give_up(
        self,
        args: &TrainArgs,
        failure: Failure,
        made: &[(&PlannedJob, pb::TrainingJob)],
    ) -> Failure {
        if made.is_empty() || args.validate_only {
            return match self.rows.remove_uploads().await {
                Some(remaining) => note(failure, &remaining),
                None => failure,
            };
        }
        let names: Vec<&str> = made.iter().map(|(_, job)| job.name.as_str()).collect();
        note(
            failure,
            &format!("these jobs of the sweep were created: {}", names.join(", ")),
        )
    }

    async fn estimate(self, jobs: Vec<PlannedJob>) -> Outcome {
        let is_one = jobs.len() == 1;
        let mut all = Vec::new();
        for job in jobs {
            let request = pb::EstimateTrainingJobRequest {
                training_job: Some(job.request.clone()),
            };
            let mut training = self.client.training();
            let asked = training.estimate_training_job(request);
            let answer = progress::waiting("estimating the job", asked).await;
            let estimate = match answer {
                Ok(estimate) => estimate.into_inner(),
                Err(error) => {
                    let failure = self.refused(&job, error);
                    return Err(match self.rows.remove_uploads().await {
                        Some(remaining) => note(failure, &remaining),
                        None => failure,
                    });
                }
            };
            let mut shown = output::estimate(&estimate);
            if is_one || self.output == Output::Table {
                if !job.difference.is_empty() {
                    output::line(&job.difference);
                }
                output::resource(self.output, &shown);
                continue;
            }
            shown["differs_in"] = job.difference.into();
            all.push(shown);
        }
        if !all.is_empty() {
            output::list(self.output, &[], Vec::new(), all);
        }
        Ok(())
    }
}

/// Describes how to follow jobs; `flag` names the server in commands. The jobs of a sweep have a
/// label in common. `None` if there is no job, or if several have no such label.
fn next_step(jobs: &[&pb::TrainingJob], flag: &str) -> Option<String> {
    let [first, others @ ..] = jobs else {
        return None;
    };
    if others.is_empty() {
        let id = first.name.trim_start_matches("trainingJobs/");
        return Some(format!("follow it: bradley watch {id}{flag}"));
    }
    let sweep = first.labels.get(SWEEP_LABEL)?;
    let is_of_sweep = |job: &&pb::TrainingJob| job.labels.get(SWEEP_LABEL) == Some(sweep);
    others.iter().all(is_of_sweep).then(|| {
        format!(
            "these jobs have the label {SWEEP_LABEL}={sweep}\n\
             list them: bradley jobs list --label {SWEEP_LABEL}={sweep}{flag}"
        )
    })
}

/// Returns the base model of a policy. For a checkpoint it follows the policies of the jobs back to
/// a base model. The result is empty if the base model cannot be determined.
///
/// # Errors
/// Returns no failure: a policy that the server does not find has no known base model.
pub(super) async fn base_model(client: &Client, policy: &str) -> Result<String, Failure> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: &str, sweep: Option<&str>) -> pb::TrainingJob {
        let label = sweep.map(|sweep| (SWEEP_LABEL.to_owned(), sweep.to_owned()));
        pb::TrainingJob {
            name: format!("trainingJobs/{name}"),
            labels: label.into_iter().collect(),
            ..Default::default()
        }
    }

    #[test]
    fn the_next_step_follows_a_job_or_lists_those_of_a_sweep() {
        let (single, first) = (job("a", None), job("b", Some("s")));
        let (second, other) = (job("c", Some("s")), job("d", Some("t")));
        let step = |jobs: &[&pb::TrainingJob]| next_step(jobs, " --server X");
        assert_eq!(
            step(&[&single]).as_deref(),
            Some("follow it: bradley watch a --server X")
        );
        let listed = step(&[&first, &second]).unwrap_or_default();
        assert!(
            listed.ends_with("bradley jobs list --label sweep=s --server X"),
            "{listed}"
        );
        assert_eq!(step(&[&first, &other]), None);
        assert_eq!(step(&[&first, &single]), None);
        assert_eq!(step(&[]), None);
    }

    #[test]
    fn a_file_of_something_else_is_no_job_file_and_says_so_once() {
        let mut config = json!({"name": "m", "architectures": ["LlamaForCausalLM"]});
        for i in 0..20 {
            config[format!("zz{i}")] = json!(i);
        }
        let said = read_job(config).unwrap_err();
        let begin = "this is no job file: architectures, zz0, zz1, zz2, zz3, zz4, zz5, zz6 and 13 \
                     more do not exist: a job has display_name, labels, policy, ";
        assert!(said.starts_with(begin), "{said}");
        assert!(
            said.ends_with("bradley train --print-job prints a job file"),
            "{said}"
        );
        for name in OUTPUT_ONLY {
            assert!(!said.contains(&format!(" {name},")), "{name} is in {said}");
        }
        for (other, kind) in [
            (json!([1, 2]), "a list"),
            (Value::Null, "empty"),
            (json!("text"), "a single value"),
        ] {
            let said = read_job(other).unwrap_err();
            let begin = format!("this is {kind}, and a job is an object with fields of ");
            assert!(said.starts_with(&begin), "{said}");
            assert!(said.contains("prints a job file"), "{said}");
        }
    }

    #[test]
    fn unknown_keys_of_a_job_are_named_with_its_other_errors() {
        let said = |job: Value| read_job(job).unwrap_err();
        assert_eq!(
            said(json!({"lora": {"rnak": 8}})),
            "lora.rnak does not exist: did you mean lora.rank?"
        );
        assert_eq!(
            said(json!({"optimiser": {}})),
            "optimiser does not exist: did you mean optimizer?"
        );
        let both = said(json!({"zzz": 1, "qqq": 2, "seed": "many"}));
        assert!(
            both.starts_with("zzz, qqq do not exist: a job has display_name, "),
            "{both}"
        );
        assert!(both.contains("; seed is \"many\": it must be "), "{both}");
        assert!(!both.contains("no job file"), "{both}");
        let job = json!({"uid": "u", "seed": 7});
        assert_eq!(read_job(job).unwrap(), json!({"seed": 7}));
    }
}
