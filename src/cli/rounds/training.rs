//! The training job of a round.

use std::path::Path;

use serde_json::{Value, json};

use super::folder::{RoundTraining, RunFolder};
use crate::cli::args::Output;
use crate::cli::data::DataFiles;
use crate::cli::failure::{Failure, Outcome};
use crate::cli::flag_names::{JobFile, JobWords};
use crate::cli::job_creation::{check_without_dataset, create_job};
use crate::cli::job_flags::{JobFlags, get, remove, set};
use crate::cli::job_rows::{JobRows, RowLimits};
use crate::cli::job_wait::end_of_job;
use crate::cli::output::state;
use crate::cli::policy_names::PolicyNames;
use crate::cli::progress::{WorkProgress, say, waiting, warn};
use crate::cli::short_names::{self, own_jobs, with_earlier_last};
use crate::cli::train::{base_model, read_job_file};
use crate::domain::logged::LOGGED_REFERENCE;
use crate::rpc::canonical::{self, CanonicalError, FieldSelection};
use crate::rpc::client::{Client, Code, is_not_found, is_transient};
use crate::rpc::pb;
use crate::rpc::pb::training_job::{Evaluation, Method};

/// Label of the jobs of a run, with its id.
const RUN_LABEL: &str = "rounds";
/// Label with the number of the round, from 1.
const ROUND_LABEL: &str = "round";
/// Fields of a job file that each round sets itself.
const SET_BY_ROUNDS: [&str; 2] = ["policy", "dataset"];

/// The settings that the jobs of all rounds share, and the caller's words for the fields.
pub(super) struct RoundTemplate {
    job: pb::TrainingJob,
    words: JobWords,
}

/// A round to train.
pub(super) struct RoundToTrain<'a> {
    /// Id of the run.
    pub run: &'a str,
    /// Number of the round, from 1.
    pub number: u32,
    /// Description of the round for progress and messages.
    pub what: &'a str,
    /// The policy to start from.
    pub policy: &'a str,
}

impl RoundTemplate {
    /// Reads the job file, if there is one.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be read, has several jobs, or a field that rounds
    /// cannot use.
    pub fn read(path: Option<&Path>) -> Result<Self, Failure> {
        let (mut file, mut fields) = match path {
            Some(path) => one_job(path)?,
            // Errors name the fields as a job file has them.
            None => (
                JobFile {
                    name: "the job".to_owned(),
                    fields: json!({}),
                },
                json!({}),
            ),
        };
        if get(&fields, "lora.init_adapter").is_some() {
            return Err(Failure::Usage(format!(
                "{}: lora.init_adapter is an adapter that --policy does not have when it answers: \
                 train one step from it, and name that checkpoint with --policy",
                file.name
            )));
        }
        if get(&fields, "reference").and_then(Value::as_str) == Some(LOGGED_REFERENCE) {
            return Err(Failure::Usage(format!(
                "{}: reference is {LOGGED_REFERENCE}, but the pairs of a round have no log-probs: \
                 remove it",
                file.name
            )));
        }
        for name in SET_BY_ROUNDS {
            remove(&mut fields, name);
            remove(&mut file.fields, name);
        }
        if get(&fields, "full").is_none() && get(&fields, "lora").is_none() {
            set(&mut fields, "lora", json!({}));
        }
        // Pairs can be too long for the job, which only the server knows.
        if get(&fields, "row_policy").is_none() {
            set(&mut fields, "row_policy", json!("ROW_POLICY_SKIP"));
        }
        let unusable = |e: CanonicalError| Failure::Usage(format!("{}: {e}", file.name));
        Ok(RoundTemplate {
            job: canonical::from_value(fields).map_err(unusable)?,
            words: JobWords {
                flags: JobFlags::default(),
                file: Some(file),
                uploads: Vec::new(),
            },
        })
    }

    /// Completes the names in the job file. In a run that an earlier start has begun, `@last` means
    /// what it meant then; `earlier` has the settings of that start.
    ///
    /// # Errors
    /// Returns a failure if a name stands for nothing on the server.
    pub async fn complete(
        &mut self,
        client: &Client,
        names: &PolicyNames,
        earlier: Option<&Value>,
    ) -> Outcome {
        let earlier = |field: &str| earlier.and_then(|settings| settings[field].as_str());
        if !self.job.reference.is_empty() {
            let word = self.words.of_field("training_job.reference");
            let given = with_earlier_last(&self.job.reference, earlier("reference"));
            self.job.reference = names.complete(&word, &given).await?;
        }
        if let Some(Evaluation::EvalDataset(name)) = &mut self.job.evaluation {
            let given = with_earlier_last(name, earlier("eval_dataset"));
            *name = short_names::dataset(client, &given).await?;
        }
        Ok(())
    }

    /// Returns the settings as canonical JSON.
    ///
    /// # Errors
    /// Returns a failure if the job cannot be written as JSON.
    pub fn settings(&self) -> Result<Value, Failure> {
        canonical::to_value(&self.job, FieldSelection::Set).map_err(unreadable)
    }

    /// Checks the settings before any pair is made.
    ///
    /// # Errors
    /// Returns a failure that names the fields which the server refuses.
    pub async fn check(&self, client: &Client, policy: &str) -> Outcome {
        let job = pb::TrainingJob {
            policy: policy.to_owned(),
            ..self.job.clone()
        };
        let checking = check_without_dataset(client, job, &self.words);
        waiting("the server checks the job", checking).await
    }

    /// Returns the job of a round on a dataset as canonical JSON.
    fn request(&self, round: &RoundToTrain<'_>, dataset: String) -> Result<Value, Failure> {
        let mut job = self.job.clone();
        job.policy = round.policy.to_owned();
        job.dataset = dataset;
        let number = round.number;
        if number > 1 && matches!(job.method, Some(Method::Lora(_))) {
            // The job takes over the settings of the adapter that the round before has trained.
            job.method = Some(Method::Lora(pb::LoraConfig::default()));
        }
        job.display_name = match job.display_name.as_str() {
            "" => format!("rounds {}: round {number}", round.run),
            title => format!("{title}: round {number}"),
        };
        job.labels
            .insert(RUN_LABEL.to_owned(), round.run.to_owned());
        job.labels
            .insert(ROUND_LABEL.to_owned(), number.to_string());
        canonical::to_value(&job, FieldSelection::Set).map_err(unreadable)
    }
}

/// Reads a file with one job.
fn one_job(path: &Path) -> Result<(JobFile, Value), Failure> {
    let (file, mut documents) = read_job_file(path)?;
    match (documents.pop(), documents.is_empty()) {
        (Some(only), true) => Ok((file, only)),
        _ => Err(Failure::Usage(format!(
            "{} has several jobs, and every round trains one: leave one of them",
            file.name
        ))),
    }
}

fn unreadable(error: CanonicalError) -> Failure {
    Failure::Usage(error.to_string())
}

/// Trains the policies of a run.
pub(super) struct RoundTrainer {
    pub client: Client,
    /// The flag that names the server in commands that are shown.
    pub server_flag: String,
    pub template: RoundTemplate,
    /// Name of the job that is waited for.
    pub running: Option<String>,
}

impl RoundTrainer {
    /// Trains the policy of a round on its pairs, and returns the name of the new policy's
    /// checkpoint. What an earlier start has done is not done again.
    ///
    /// # Errors
    /// Returns a failure if the server refuses the pairs or the job, or the job does not succeed.
    pub async fn train(
        &mut self,
        folder: &RunFolder,
        round: &RoundToTrain<'_>,
        pairs: &DataFiles,
    ) -> Result<String, Failure> {
        let number = round.number;
        let stored = folder.training(number)?;
        if let Some(checkpoint) = stored.as_ref().and_then(|t| t.checkpoint.clone()) {
            return Ok(checkpoint);
        }
        let name = match stored.as_ref().and_then(|t| t.job.clone()) {
            Some(name) => Some(name),
            None => self.lost_job(round).await?,
        };
        let earlier = match &name {
            Some(name) => self.earlier_job(name, round.what).await?,
            None => None,
        };
        let mut training = match stored {
            Some(training) => training,
            None => {
                let dataset = match &earlier {
                    Some(job) => job.dataset.clone(),
                    None => self.dataset(round, pairs).await?,
                };
                let training = RoundTraining {
                    request: self.template.request(round, dataset)?,
                    job: None,
                    checkpoint: None,
                };
                folder.store_training(number, &training)?;
                training
            }
        };
        let job = match earlier {
            Some(job) => job,
            None => self.create(folder, round, &training).await?,
        };
        training.job = Some(job.name.clone());
        folder.store_training(number, &training)?;
        self.running = Some(job.name.clone());
        let checkpoint = self.checkpoint(&job, round.what).await?;
        self.running = None;
        training.checkpoint = Some(checkpoint.clone());
        folder.store_training(number, &training)?;
        Ok(checkpoint)
    }

    /// Returns the name of a dataset with the pairs of a round.
    async fn dataset(
        &self,
        round: &RoundToTrain<'_>,
        pairs: &DataFiles,
    ) -> Result<String, Failure> {
        let batch = self.template.job.batch.as_ref();
        let limits = RowLimits {
            model: base_model(&self.client, round.policy).await?,
            max_length: batch.and_then(|b| b.max_length).unwrap_or(0),
        };
        let skips = self.template.job.row_policy() == pb::RowPolicy::Skip;
        // Standard output is for the report.
        let title = format!("rounds {}: pairs of round {}", round.run, round.number);
        let mut rows = JobRows::new(&self.client, Output::Json).with_title(title);
        let dataset = rows.dataset(pairs, &limits, skips).await;
        // Failures name flags of `train`, which `rounds` lacks or uses for its judge.
        dataset.map_err(|failure| {
            failure
                .replacing("--max-length", "batch.max_length of --file")
                .replacing("--skip-bad-rows", "row_policy: skip in --file")
        })
    }

    /// Finds the job that an earlier start has requested, if the answer was lost. The same request
    /// would be refused if the dataset was deleted since.
    async fn lost_job(&self, round: &RoundToTrain<'_>) -> Result<Option<String>, Failure> {
        let labels = [
            (RUN_LABEL, round.run.to_owned()),
            (ROUND_LABEL, round.number.to_string()),
        ];
        let is_of_round = |job: &pb::TrainingJob| {
            let has = |(key, value): &(&str, String)| job.labels.get(*key) == Some(value);
            job.policy == round.policy && labels.iter().all(has)
        };
        let jobs = own_jobs(&self.client).await?;
        // A copy of the job, which has its labels, is newer.
        let oldest = jobs.into_iter().rev().find(is_of_round);
        Ok(oldest.map(|job| job.name))
    }

    /// Returns the job of an earlier start. One that has failed or was cancelled since is deleted.
    async fn earlier_job(
        &self,
        name: &str,
        what: &str,
    ) -> Result<Option<pb::TrainingJob>, Failure> {
        let request = pb::GetTrainingJobRequest {
            name: name.to_owned(),
        };
        let job = match self.client.training().get_training_job(request).await {
            Ok(job) => job.into_inner(),
            Err(status) if is_not_found(&status) => {
                warn(&format!(
                    "{name} was deleted: the policy of {what} is trained again"
                ));
                return Ok(None);
            }
            Err(status) => return Err(status.into()),
        };
        if !matches!(job.state(), pb::JobState::Failed | pb::JobState::Cancelled) {
            return Ok(Some(job));
        }
        warn(&format!(
            "{name} ended {}: it is deleted, and the policy of {what} is trained again",
            state(job.state)
        ));
        let request = pb::DeleteTrainingJobRequest {
            name: name.to_owned(),
        };
        match self.client.training().delete_training_job(request).await {
            Ok(_) => Ok(None),
            Err(status) if is_not_found(&status) => Ok(None),
            Err(status) => Err(status.into()),
        }
    }

    /// Creates the job of a round. The server returns the same job if an earlier start has created
    /// it already.
    async fn create(
        &self,
        folder: &RunFolder,
        round: &RoundToTrain<'_>,
        training: &RoundTraining,
    ) -> Result<pb::TrainingJob, Failure> {
        let job: pb::TrainingJob =
            canonical::from_value(training.request.clone()).map_err(unreadable)?;
        let request = pb::CreateTrainingJobRequest {
            training_job: Some(job),
            request_id: format!("{RUN_LABEL}-{}-{}", round.run, round.number),
            validate_only: false,
        };
        let creating = create_job(&self.client, request);
        let status = match waiting("the server checks the job", creating).await {
            Ok(job) => {
                say(&format!("{}: the job is {}", round.what, job.name));
                return Ok(job);
            }
            Err(status) => status,
        };
        if !is_transient(status.code()) {
            // The next start uploads the pairs and makes the request again.
            folder.remove_training(round.number)?;
        }
        let is_taken = status.code() == Code::AlreadyExists;
        let failure = self.template.words.failure(status);
        Err(match is_taken {
            true => failure.with_remark(&format!(
                "an earlier start has created this job, which was changed since: delete it \
                 (bradley jobs delete JOB{}) and run the same command again",
                self.server_flag
            )),
            false => failure,
        })
    }

    /// Waits for the end of a job, and returns the name of its best checkpoint, or of the last one
    /// if the job has no evaluation.
    async fn checkpoint(&self, job: &pb::TrainingJob, what: &str) -> Result<String, Failure> {
        let name = job.name.as_str();
        let progress = WorkProgress::steps(&format!("{what}: training"));
        let flag = &self.server_flag;
        let ended = end_of_job(&self.client, (name, job.state()), flag, &progress).await?;
        drop(progress);
        if ended.state != pb::JobState::Succeeded {
            return Err(Failure::Failed(format!(
                "{name} ended {}: {}\nthe same command deletes this job and trains again",
                state(ended.state.into()),
                self.template.words.in_sentence(&ended.reason)
            )));
        }
        let request = pb::ListCheckpointsRequest {
            parent: name.to_owned(),
        };
        let listed = self.client.checkpoints().list_checkpoints(request).await?;
        let checkpoints = listed.into_inner().checkpoints;
        let best = checkpoints.iter().find(|c| c.best);
        let last = checkpoints.iter().max_by_key(|c| c.step);
        match best.or(last) {
            Some(checkpoint) => Ok(checkpoint.name.clone()),
            None => Err(Failure::Failed(format!(
                "the checkpoints of {name} were deleted: delete the job, too (bradley jobs delete \
                 {name}{flag}), and run the same command again"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> Result<RoundTemplate, Failure> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("job.yaml");
        std::fs::write(&path, text).unwrap();
        RoundTemplate::read(Some(&path))
    }

    fn round() -> RoundToTrain<'static> {
        RoundToTrain {
            run: "abc",
            number: 2,
            what: "round 2 of 3",
            policy: "trainingJobs/a/checkpoints/4",
        }
    }

    #[test]
    fn a_round_sets_policy_dataset_and_labels() {
        let text = "policy: models/other\ndataset: datasets/other\nlabels: {a: b}\n\
                    lora: {rank: 2}\nbatch: {max_steps: 3}\n";
        let request = template(text)
            .unwrap()
            .request(&round(), "datasets/d".into());
        let job: pb::TrainingJob = canonical::from_value(request.unwrap()).unwrap();
        assert_eq!(job.policy, "trainingJobs/a/checkpoints/4");
        assert_eq!(job.dataset, "datasets/d");
        assert_eq!(job.display_name, "rounds abc: round 2");
        let labels: Vec<(&str, &str)> = ["a", "round", "rounds"]
            .map(|key| (key, job.labels[key].as_str()))
            .to_vec();
        assert_eq!(labels, [("a", "b"), ("round", "2"), ("rounds", "abc")]);
        assert_eq!(job.batch.as_ref().and_then(|b| b.max_steps), Some(3));
        assert_eq!(job.row_policy(), pb::RowPolicy::Skip);
        // The adapter has its rank already.
        let adapter = Method::Lora(pb::LoraConfig::default());
        assert_eq!(job.method, Some(adapter));
    }

    #[test]
    fn a_file_that_rounds_cannot_use_is_refused() {
        for (text, part) in [
            ("seed: 1\n---\nseed: 2\n", "has several jobs"),
            ("lora: {init_adapter: x}\n", "lora.init_adapter"),
            ("reference: logged\n", "have no log-probs"),
            ("no_such_field: 1\n", "no_such_field"),
        ] {
            let failure = template(text).err().map(|e| e.message().to_owned());
            let failure = failure.unwrap_or_default();
            assert!(failure.contains(part), "{text}: {failure}");
        }
    }
}
