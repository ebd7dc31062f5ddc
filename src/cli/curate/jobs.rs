//! The datasets and jobs of a curation on the server.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::index::RowIndex;
use crate::cli::args::CurateArgs;
use crate::cli::data::DataFiles;
use crate::cli::failure::{Failure, Outcome};
use crate::cli::flag_names::JobWords;
use crate::cli::job_creation::{check_without_dataset, create_job};
use crate::cli::job_flags::JobFlags;
use crate::cli::job_wait::end_of_job;
use crate::cli::output::state;
use crate::cli::progress::{WorkProgress, waiting, warn};
use crate::cli::short_names::{all_jobs, own_datasets};
use crate::cli::synced_file::SyncedFile;
use crate::rpc::canonical::{self, CanonicalError};
use crate::rpc::client::{Client, ClientError, Status, is_absent, is_exhausted, is_not_found};
use crate::rpc::pb;

/// Label of the jobs of a curation, with its id.
pub(super) const RUN_LABEL: &str = "curate";
/// Label with the number of the fold, from 1.
const FOLD_LABEL: &str = "fold";
/// Maximum number of datasets with the same content that are looked at.
const MAX_CANDIDATES: i32 = 1000;

/// The settings that the jobs of all folds share, and the caller's words for the fields.
pub(super) struct JobTemplate {
    pub job: pb::TrainingJob,
    words: JobWords,
}

impl JobTemplate {
    /// Makes a job from the flags of the command.
    ///
    /// # Errors
    /// Returns a failure that names a flag whose value cannot be read.
    pub fn new(args: &CurateArgs, model: &str) -> Result<Self, Failure> {
        let mut flags = JobFlags::default();
        for (name, value) in [
            ("epochs", &args.epochs),
            ("learning-rate", &args.learning_rate),
            ("beta", &args.beta),
            ("rank", &args.rank),
            ("batch-size", &args.batch_size),
        ] {
            flags.add(name, value.clone());
        }
        for (name, value) in [
            ("label-smoothing", &args.label_smoothing),
            ("max-length", &args.max_length),
            ("precision", &args.precision),
            ("template-args", &args.template_args),
            ("priority", &args.priority),
        ] {
            if let Some(value) = value {
                flags.add(name, value.clone());
            }
        }
        flags.add("policy", model.to_owned());
        flags.add("seed", args.seed.to_string());
        flags.add("schedule", "cosine".to_owned());
        flags.add("warmup-ratio", "0.1".to_owned());
        // Rows can be too long for the model, which only the server knows.
        flags.add("skip-bad-rows", "true".to_owned());
        let fields = serde_json::json!({});
        let mut jobs = flags.apply(&fields).map_err(Failure::Usage)?;
        let wrong = |e: CanonicalError| Failure::Usage(e.to_string());
        let fields = jobs.pop().map(|job| job.fields).unwrap_or_default();
        Ok(JobTemplate {
            job: canonical::from_value(fields).map_err(wrong)?,
            words: JobWords {
                flags,
                file: None,
                uploads: vec!["data"],
            },
        })
    }

    /// Returns the settings that scores depend on, as text that is the same for the same settings.
    pub fn settings(&self) -> Result<String, Failure> {
        let job = pb::TrainingJob {
            priority: 0,
            ..self.job.clone()
        };
        let fields = canonical::to_value(&job, canonical::FieldSelection::Set);
        let fields = fields.map_err(|e| Failure::Usage(e.to_string()))?;
        Ok(fields.to_string())
    }

    /// Checks the settings before anything is uploaded.
    ///
    /// # Errors
    /// Returns a failure that names the flags which the server refuses.
    pub async fn check(&self, client: &Client) -> Outcome {
        let checking = check_without_dataset(client, self.job.clone(), &self.words);
        waiting("the server checks the flags", checking).await
    }
}

/// A job of a fold.
#[derive(Clone, Debug)]
pub(super) struct FoldJob {
    pub name: String,
    state: pb::JobState,
}

impl FoldJob {
    fn of(job: pb::TrainingJob) -> Self {
        FoldJob {
            state: job.state(),
            name: job.name,
        }
    }

    fn has_failed(&self) -> bool {
        matches!(self.state, pb::JobState::Failed | pb::JobState::Cancelled)
    }
}

/// The reason why a job was not created.
pub(super) enum CreateError {
    /// The caller has too many unfinished jobs.
    Exhausted(Failure),
    Other(Failure),
}

impl From<Failure> for CreateError {
    fn from(failure: Failure) -> Self {
        CreateError::Other(failure)
    }
}

/// The jobs of one curation.
pub(super) struct FoldJobs {
    client: Client,
    /// The flag that names the server in commands that are shown.
    server_flag: String,
    template: JobTemplate,
    run: String,
    folds: u32,
    /// Jobs on the server, by fold from 0.
    jobs: BTreeMap<u32, FoldJob>,
    /// Datasets on the server.
    datasets: Vec<String>,
}

impl FoldJobs {
    /// Finds the jobs and datasets of earlier starts.
    pub async fn find(
        client: &Client,
        server_flag: String,
        template: JobTemplate,
        run: &str,
        folds: u32,
    ) -> Result<Self, Failure> {
        let mut found = FoldJobs {
            client: client.clone(),
            server_flag,
            template,
            run: run.to_owned(),
            folds,
            jobs: BTreeMap::new(),
            datasets: Vec::new(),
        };
        // Those whose jobs are deleted already, too.
        let titles: Vec<String> = (0..folds).map(|fold| found.title(fold)).collect();
        for dataset in own_datasets(client).await? {
            if titles.contains(&dataset.display_name) {
                found.add_dataset(&dataset.name);
            }
        }
        let mut jobs = Vec::new();
        for job in all_jobs(client).await? {
            let label = |name: &str| job.labels.get(name).map(String::as_str);
            let fold = label(FOLD_LABEL).and_then(|fold| fold.parse::<u32>().ok());
            if let (Some(id), Some(fold @ 1..)) = (label(RUN_LABEL), fold)
                && id == run
                && fold <= folds
            {
                jobs.push((fold - 1, job));
            }
        }
        if jobs.is_empty() {
            return Ok(found);
        }
        // Administrators see the jobs of everybody.
        let owner = found.owner(jobs.iter().map(|(_, job)| job)).await?;
        for (fold, job) in jobs {
            if job.owner == owner {
                found.add_dataset(&job.dataset);
                found.jobs.insert(fold, FoldJob::of(job));
            }
        }
        Ok(found)
    }

    /// Returns the owner that jobs of this caller have. The server says it when it checks a job
    /// with one of the datasets.
    async fn owner(&self, jobs: impl Iterator<Item = &pb::TrainingJob>) -> Result<String, Failure> {
        let mut names = Vec::new();
        for job in jobs {
            let request = pb::CreateTrainingJobRequest {
                training_job: Some(pb::TrainingJob {
                    dataset: job.dataset.clone(),
                    ..self.template.job.clone()
                }),
                request_id: String::new(),
                validate_only: true,
            };
            match self.client.training().create_training_job(request).await {
                Ok(checked) => return Ok(checked.into_inner().owner),
                // The dataset was deleted.
                Err(refused) if is_absent(&refused) => names.push(job.name.as_str()),
                Err(error) => return Err(self.template.words.failure(error)),
            }
        }
        let commands = names
            .iter()
            .map(|name| format!("bradley jobs delete {name}{}", self.server_flag));
        Err(Failure::Failed(format!(
            "the datasets of an earlier start were deleted, so that its jobs cannot be used: \
             delete these, too ({}), and run the command again",
            commands.collect::<Vec<_>>().join(", ")
        )))
    }

    fn add_dataset(&mut self, name: &str) {
        if !self.datasets.iter().any(|known| known == name) {
            self.datasets.push(name.to_owned());
        }
    }

    fn title(&self, fold: u32) -> String {
        format!("curate {}: fold {} of {}", self.run, fold + 1, self.folds)
    }

    /// Returns the names of the jobs.
    pub fn names(&self) -> Vec<&str> {
        self.jobs.values().map(|job| job.name.as_str()).collect()
    }

    /// Describes what is on the server, with the commands that remove it; `None` if nothing is.
    pub fn remaining(&self) -> Option<String> {
        let flag = &self.server_flag;
        let mut lines = Vec::new();
        for job in self.jobs.values() {
            lines.push(format!("  bradley jobs cancel {}{flag}", job.name));
        }
        for job in self.jobs.values() {
            lines.push(format!("  bradley jobs delete {}{flag}", job.name));
        }
        for dataset in &self.datasets {
            lines.push(format!("  bradley datasets delete {dataset}{flag}"));
        }
        (!lines.is_empty()).then(|| {
            format!(
                "on the server are {} jobs with the label {RUN_LABEL}={} and {} datasets; to \
                 remove them, cancel the jobs that have not ended, and then delete all:\n{}",
                self.jobs.len(),
                self.run,
                self.datasets.len(),
                lines.join("\n")
            )
        })
    }

    /// Returns the job of a fold, which is created unless an earlier start has done so. A job that
    /// failed or was cancelled since is deleted and created again. `file` is the path for the rows
    /// that are uploaded.
    pub async fn ensure(
        &mut self,
        (data, index): (&DataFiles, &Arc<RowIndex>),
        fold: u32,
        file: PathBuf,
    ) -> Result<FoldJob, CreateError> {
        if let Some(job) = self.jobs.get(&fold).cloned() {
            if !job.has_failed() {
                return Ok(job);
            }
            warn(&format!(
                "{} ended {}: it is deleted, and fold {} trained again",
                job.name,
                state(job.state.into()),
                fold + 1
            ));
            self.delete_job(fold).await?;
        }
        let (data, index) = (data.clone(), Arc::clone(index));
        let path = file.clone();
        let written =
            tokio::task::spawn_blocking(move || write_training_rows(&data, &index, fold, &path));
        let hash = written.await.map_err(Failure::from)??;
        let dataset = self.dataset(fold, &file, &hash).await?;
        let _ = std::fs::remove_file(&file);
        self.add_dataset(&dataset);
        let mut job = self.template.job.clone();
        job.dataset = dataset;
        job.display_name = self.title(fold);
        let labels = [
            (RUN_LABEL, self.run.clone()),
            (FOLD_LABEL, (fold + 1).to_string()),
        ];
        job.labels
            .extend(labels.map(|(key, value)| (key.to_owned(), value)));
        let request = pb::CreateTrainingJobRequest {
            training_job: Some(job),
            // A creation whose answer was lost makes no second job.
            request_id: format!("{RUN_LABEL}-{}-{}", self.run, fold + 1),
            validate_only: false,
        };
        let creating = create_job(&self.client, request);
        let created = match waiting("the server checks the job", creating).await {
            Ok(created) => FoldJob::of(created),
            Err(status) => {
                let is_exhausted = is_exhausted(&status);
                let failure = self.template.words.failure(status);
                return Err(match is_exhausted {
                    true => CreateError::Exhausted(failure),
                    false => CreateError::Other(failure),
                });
            }
        };
        self.jobs.insert(fold, created.clone());
        Ok(created)
    }

    /// Returns the dataset with a fold's training rows: that of an earlier start, or a new one.
    async fn dataset(&self, fold: u32, file: &Path, hash: &str) -> Result<String, Failure> {
        let title = self.title(fold);
        let request = pb::ListDatasetsRequest {
            page_size: MAX_CANDIDATES,
            content_hash: hash.to_owned(),
            ..Default::default()
        };
        let stored = self.client.datasets().list_datasets(request).await?;
        // The user's own datasets with the same content are not deleted at the end.
        let mut stored = stored.into_inner().datasets.into_iter();
        let is_ours = |d: &pb::Dataset| d.content_hash == hash && d.display_name == title;
        if let Some(found) = stored.find(is_ours) {
            return Ok(found.name);
        }
        let metadata = pb::UploadMetadata {
            display_name: title,
            content_hash: hash.to_owned(),
            format: pb::DatasetFormat::Jsonl.into(),
            ..Default::default()
        };
        let what = format!(
            "fold {} of {}: sending the other rows",
            fold + 1,
            self.folds
        );
        let upload = self.client.upload_dataset(file, metadata, |_| {});
        Ok(waiting(&what, upload).await?.name)
    }

    /// Waits for the end of a fold's job and shows its progress.
    ///
    /// # Errors
    /// Returns a failure unless the job succeeds.
    pub async fn wait(&self, job: &FoldJob, progress: &WorkProgress) -> Outcome {
        let named = (job.name.as_str(), job.state);
        let ended = end_of_job(&self.client, named, &self.server_flag, progress).await?;
        if ended.state == pb::JobState::Succeeded {
            return Ok(());
        }
        Err(Failure::Failed(format!(
            "{} ended {}: {}",
            job.name,
            state(ended.state.into()),
            self.template.words.in_sentence(&ended.reason)
        )))
    }

    /// Deletes a job. Nothing happens if it does not exist any more.
    async fn delete_job(&mut self, fold: u32) -> Outcome {
        if let Some(job) = self.jobs.get(&fold) {
            let request = pb::DeleteTrainingJobRequest {
                name: job.name.clone(),
            };
            ignore_absent(self.client.training().delete_training_job(request).await)?;
            self.jobs.remove(&fold);
        }
        Ok(())
    }

    /// Deletes all jobs and datasets.
    ///
    /// # Errors
    /// Returns the first failure; what is deleted by then is not in [`FoldJobs::remaining`].
    pub async fn delete(&mut self) -> Outcome {
        let folds: Vec<u32> = self.jobs.keys().copied().collect();
        for fold in folds {
            self.delete_job(fold).await?;
        }
        while let Some(name) = self.datasets.last().cloned() {
            let request = pb::DeleteDatasetRequest { name };
            ignore_absent(self.client.datasets().delete_dataset(request).await)?;
            self.datasets.pop();
        }
        Ok(())
    }
}

fn ignore_absent<T>(deleted: Result<T, Status>) -> Outcome {
    match deleted {
        Ok(_) => Ok(()),
        Err(status) if is_not_found(&status) => Ok(()),
        Err(status) => Err(ClientError::from(status).into()),
    }
}

/// Writes the rows that a fold's adapter is trained on, and returns the hash of the file.
fn write_training_rows(
    data: &DataFiles,
    index: &RowIndex,
    fold: u32,
    path: &Path,
) -> Result<String, Failure> {
    let mut file = SyncedFile::create(path.to_owned())?;
    let mut hasher = blake3::Hasher::new();
    for (record, row) in data.records().zip(&index.rows) {
        let record = record?;
        if row.is_trained_by(fold) {
            file.json_line(&record.columns)?;
            hasher.update(&serde_json::to_vec(&record.columns).unwrap_or_default());
            hasher.update(b"\n");
        }
    }
    file.flush()?;
    Ok(hasher.finalize().to_hex().to_string())
}
