//! The folder of a run: its settings, and for each round the pairs, the job and the report.
//!
//! ```text
//! FOLDER/rounds.json             the run: its id, seed, policies and settings
//! FOLDER/round-1/pairs.jsonl     the pairs of the first round
//! FOLDER/round-1/job.json        the training job: its request, its name, its checkpoint
//! FOLDER/round-1/answers.jsonl   the answers before and after the training
//! FOLDER/round-1/report.json     the report, which is written when the round is complete
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cli::failure::{Failure, Outcome};
use crate::cli::synced_file::SyncedFile;

/// A run, as rounds.json has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct RunHeader {
    /// Identifies the run in labels of its jobs.
    pub run: String,
    /// Seed of the first prompt of the first round.
    pub seed: u64,
    /// Policy of the first round, by a name that always means the same weights.
    pub policy: String,
    /// Judge of all rounds, named in the same way; `None` if each round's policy is the judge.
    pub judge: Option<String>,
    /// Reference of the judge, named in the same way; empty for that of the judge's job.
    pub reference: String,
    /// The settings as they were given.
    pub settings: Value,
}

/// The training of a round, as job.json has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct RoundTraining {
    /// The requested job as canonical JSON. It is stored before the job is created, so that a
    /// repeated request is the same.
    pub request: Value,
    /// Name of the job; `None` if no answer to the request has come.
    #[serde(default)]
    pub job: Option<String>,
    /// Name of the checkpoint that is the next policy; `None` until the job has ended.
    #[serde(default)]
    pub checkpoint: Option<String>,
}

/// The folder of a run, which no other process may use meanwhile.
#[derive(Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
    _lock: File,
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Failure {
    move |e| Failure::Failed(format!("{}: {e}", path.display()))
}

impl RunFolder {
    /// Creates the folder, or opens that of an earlier start.
    ///
    /// # Errors
    /// Returns a failure if the folder cannot be written, or another process uses it.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        if path.exists() && !path.is_dir() {
            return Err(Failure::Usage(format!(
                "--out {} is a file: name a folder",
                path.display()
            )));
        }
        fs::create_dir_all(path)
            .map_err(|e| Failure::Failed(format!("--out {}: {e}", path.display())))?;
        let lock_path = path.join("rounds.lock");
        let lock = File::create(&lock_path).map_err(failed(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(RunFolder {
                path: path.to_owned(),
                _lock: lock,
            }),
            Err(fs::TryLockError::WouldBlock) => Err(Failure::Failed(format!(
                "another bradley rounds works on {}: wait for it, or name another folder with \
                 --out",
                path.display()
            ))),
            Err(fs::TryLockError::Error(e)) => Err(failed(&lock_path)(e)),
        }
    }

    /// Returns the run of a folder without opening it; `None` if there is no such folder, or the
    /// folder has no run.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be read.
    pub fn stored_header(path: &Path) -> Result<Option<RunHeader>, Failure> {
        match path.is_dir() {
            true => read(path, &header_path(path)),
            false => Ok(None),
        }
    }

    /// Returns the path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the run; `None` if the folder has none.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be read, or the folder has rounds of an unknown run.
    pub fn header(&self) -> Result<Option<RunHeader>, Failure> {
        let header = Self::stored_header(&self.path)?;
        let first = self.round(1);
        if header.is_none() && first.exists() {
            return Err(Failure::Usage(format!(
                "{} is of a run whose settings are not known, because rounds.json is missing: name \
                 another folder with --out",
                first.display()
            )));
        }
        Ok(header)
    }

    /// Stores the run.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be written.
    pub fn store_header(&self, header: &RunHeader) -> Outcome {
        write(&header_path(&self.path), std::slice::from_ref(header))
    }

    /// Creates the folder of a round.
    ///
    /// # Errors
    /// Returns a failure if the folder cannot be created.
    pub fn create_round(&self, number: u32) -> Outcome {
        let path = self.round(number);
        fs::create_dir_all(&path).map_err(failed(&path))
    }

    /// Returns the path of the pairs of a round.
    pub fn pairs(&self, number: u32) -> PathBuf {
        self.round(number).join("pairs.jsonl")
    }

    /// Returns true if the pairs of a round are complete.
    pub fn has_pairs(&self, number: u32) -> bool {
        let pairs = self.pairs(number);
        // The file gets its name before the progress is removed.
        pairs.is_file() && !self.progress(number).exists()
    }

    /// Returns true if a prompt of the first round has an outcome.
    ///
    /// # Errors
    /// Returns a failure if the file of outcomes cannot be read.
    pub fn has_outcomes(&self) -> Result<bool, Failure> {
        if self.pairs(1).exists() {
            return Ok(true);
        }
        let path = self.progress(1);
        match fs::read(&path) {
            // The first line has the settings.
            Ok(text) => Ok(text.split(|byte| *byte == b'\n').count() > 2),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(failed(&path)(e)),
        }
    }

    /// Returns the training of a round; `None` if it has not begun.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be read.
    pub fn training(&self, number: u32) -> Result<Option<RoundTraining>, Failure> {
        read(&self.path, &self.training_path(number))
    }

    /// Stores the training of a round.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be written.
    pub fn store_training(&self, number: u32, training: &RoundTraining) -> Outcome {
        let path = self.training_path(number);
        write(&path, std::slice::from_ref(training))
    }

    /// Removes the training of a round, so that it begins again.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be removed.
    pub fn remove_training(&self, number: u32) -> Outcome {
        let path = self.training_path(number);
        fs::remove_file(&path).map_err(failed(&path))
    }

    /// Stores the compared answers of a round, one a line.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be written.
    pub fn store_answers(&self, number: u32, answers: &[impl Serialize]) -> Outcome {
        write(&self.round(number).join("answers.jsonl"), answers)
    }

    /// Returns the report of a round; `None` if the round is not complete.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be read.
    pub fn report<T: DeserializeOwned>(&self, number: u32) -> Result<Option<T>, Failure> {
        read(&self.path, &self.report_path(number))
    }

    /// Stores the report of a round.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be written.
    pub fn store_report(&self, number: u32, report: &impl Serialize) -> Outcome {
        write(&self.report_path(number), std::slice::from_ref(report))
    }

    fn round(&self, number: u32) -> PathBuf {
        self.path.join(format!("round-{number}"))
    }

    fn progress(&self, number: u32) -> PathBuf {
        self.round(number).join("pairs.jsonl.progress")
    }

    fn training_path(&self, number: u32) -> PathBuf {
        self.round(number).join("job.json")
    }

    fn report_path(&self, number: u32) -> PathBuf {
        self.round(number).join("report.json")
    }
}

fn header_path(folder: &Path) -> PathBuf {
    folder.join("rounds.json")
}

/// Reads a file of a run's folder; `None` if there is none.
fn read<T: DeserializeOwned>(folder: &Path, path: &Path) -> Result<Option<T>, Failure> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(path)(e)),
    };
    let value = serde_json::from_slice(&text).map_err(|e| {
        Failure::Failed(format!(
            "{}: {e}; name another folder than {} with --out to begin again",
            path.display(),
            folder.display()
        ))
    })?;
    Ok(Some(value))
}

/// Writes a file with one value a line, which exists only as a whole.
fn write(path: &Path, values: &[impl Serialize]) -> Outcome {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let mut file = SyncedFile::create(part.into())?;
    for value in values {
        file.json_line(value)?;
    }
    file.move_to(path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn header() -> RunHeader {
        RunHeader {
            run: "r".into(),
            seed: 7,
            policy: "models/m".into(),
            judge: None,
            reference: String::new(),
            settings: json!({"policy": "models/m", "min_margin": 0.1}),
        }
    }

    #[test]
    fn what_is_stored_is_found_by_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let folder = RunFolder::open(&path).unwrap();
        assert_eq!(folder.header().unwrap(), None);
        assert_eq!(RunFolder::stored_header(&path).unwrap(), None);
        folder.store_header(&header()).unwrap();
        folder.create_round(1).unwrap();
        let training = RoundTraining {
            request: json!({"policy": "models/m"}),
            job: Some("trainingJobs/j".into()),
            checkpoint: None,
        };
        folder.store_training(1, &training).unwrap();
        let e = RunFolder::open(&path).unwrap_err();
        let part = "another bradley rounds works on";
        assert!(e.message().contains(part), "{}", e.message());
        let stored = RunFolder::stored_header(&path).unwrap();
        assert_eq!(stored, Some(header()));
        let nowhere = dir.path().join("nowhere");
        assert_eq!(RunFolder::stored_header(&nowhere).unwrap(), None);
        drop(folder);
        let folder = RunFolder::open(&path).unwrap();
        assert_eq!(folder.header().unwrap(), Some(header()));
        assert_eq!(folder.training(1).unwrap(), Some(training));
        assert_eq!(folder.training(2).unwrap(), None);
        assert_eq!(folder.report::<Value>(1).unwrap(), None);
        folder.remove_training(1).unwrap();
        assert_eq!(folder.training(1).unwrap(), None);
    }

    #[test]
    fn pairs_are_complete_without_a_file_of_progress() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::open(dir.path()).unwrap();
        folder.create_round(1).unwrap();
        assert!(!folder.has_pairs(1));
        let progress = dir.path().join("round-1/pairs.jsonl.progress");
        assert!(!folder.has_outcomes().unwrap());
        // The settings, and an outcome that was being written.
        fs::write(&progress, "{}\n{").unwrap();
        assert!(!folder.has_outcomes().unwrap());
        fs::write(&progress, "{}\n{}\n").unwrap();
        assert!(folder.has_outcomes().unwrap());
        fs::write(&progress, "").unwrap();
        fs::write(folder.pairs(1), "").unwrap();
        assert!(folder.has_outcomes().unwrap());
        assert!(!folder.has_pairs(1));
        fs::remove_file(progress).unwrap();
        assert!(folder.has_pairs(1));
        let e = folder.header().unwrap_err();
        assert!(e.message().contains("rounds.json is missing"), "{e:?}");
        fs::write(dir.path().join("rounds.json"), "{").unwrap();
        let e = folder.header().unwrap_err();
        assert!(e.message().contains("name another folder"), "{e:?}");
    }
}
