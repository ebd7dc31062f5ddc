//! The folder beside the output with the scores of finished folds. It makes a curation resumable,
//! and is removed at the end.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cli::failure::Failure;
use crate::cli::synced_file::{SyncedFile, parent};

/// The score of a row by the adapter of its fold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FoldScore {
    /// Number of the row.
    pub row: u64,
    /// Probability and margin of the pair with the lowest margin, or the reason why the row has
    /// none.
    #[serde(flatten)]
    pub result: FoldResult,
}

/// The result of a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum FoldResult {
    Scored {
        /// Pr(chosen ≻ rejected).
        probability: f64,
        /// Reward of the chosen answer, minus that of the other.
        margin: f64,
        /// Calibrated Pr(chosen ≻ rejected), if the adapter has a calibration.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        calibrated_probability: Option<f64>,
        /// Number of the pair within the row, from 1, if the row makes several pairs.
        pair: Option<u32>,
    },
    Failed {
        /// The server's message, in the words of the row and of the flags.
        error: String,
    },
}

/// The folder of one curation, which no other process may use meanwhile.
#[derive(Debug)]
pub(super) struct ScoreFolder {
    path: PathBuf,
    _lock: File,
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Failure {
    move |e| Failure::Failed(format!("{}: {e}", path.display()))
}

/// Returns the beginning of the names of the folders of an output.
fn prefix(out: &Path) -> String {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    format!("{name}.curate-")
}

/// Checks that the output can be created.
///
/// # Errors
/// Returns a failure if its folder does not exist or its path is a folder.
pub(super) fn check_output(flag: &str, out: &Path) -> Result<(), Failure> {
    let wrong = |reason: String| {
        Err(Failure::Usage(format!(
            "{flag} {}: {reason}",
            out.display()
        )))
    };
    if out.is_dir() || out.file_name().is_none() {
        return wrong("is a folder: name a file".to_owned());
    }
    match parent(out) {
        folder if folder.is_dir() => Ok(()),
        folder => wrong(format!("the folder {} does not exist", folder.display())),
    }
}

impl ScoreFolder {
    /// Returns the path of the folder.
    pub fn path(out: &Path, run: &str) -> PathBuf {
        parent(out).join(format!("{}{run}", prefix(out)))
    }

    /// Creates the folder, or opens that of an earlier start.
    ///
    /// # Errors
    /// Returns a failure if the folder cannot be written, or another process uses it.
    pub fn open(out: &Path, run: &str) -> Result<Self, Failure> {
        let path = Self::path(out, run);
        fs::create_dir_all(&path).map_err(failed(&path))?;
        let lock_path = path.join("lock");
        let lock = File::create(&lock_path).map_err(failed(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(ScoreFolder { path, _lock: lock }),
            Err(fs::TryLockError::WouldBlock) => Err(Failure::Failed(format!(
                "another bradley curate works on {}: wait for it, or name another file with --out",
                out.display()
            ))),
            Err(fs::TryLockError::Error(e)) => Err(failed(&lock_path)(e)),
        }
    }

    /// Returns the ids of earlier curations with this output that have not ended.
    pub fn others(out: &Path, run: &str) -> Vec<String> {
        let prefix = prefix(out);
        let entries = fs::read_dir(parent(out)).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let ids = names.filter_map(|name| name.strip_prefix(&prefix).map(str::to_owned));
        ids.filter(|id| id != run).collect()
    }

    /// Returns the path of a file that exists only during this start.
    pub fn temporary(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.part"))
    }

    fn scores(&self, fold: u32) -> PathBuf {
        self.path.join(format!("fold-{}.jsonl", fold + 1))
    }

    /// Returns true if the scores of a fold are complete.
    pub fn has_scores(&self, fold: u32) -> bool {
        self.scores(fold).is_file()
    }

    /// Begins the scores of a fold.
    pub fn create_scores(&self, fold: u32) -> Result<ScoreWriter, Failure> {
        Ok(ScoreWriter {
            file: SyncedFile::create(self.temporary(&format!("fold-{}", fold + 1)))?,
            target: self.scores(fold),
        })
    }

    /// Reads the scores of a fold, which are in the order of the rows. A fold without rows has
    /// none.
    pub fn read_scores(
        &self,
        fold: u32,
    ) -> Result<impl Iterator<Item = Result<FoldScore, Failure>> + use<>, Failure> {
        let path = self.scores(fold);
        let file = match path.exists() {
            true => Some(File::open(&path).map_err(failed(&path))?),
            false => None,
        };
        let lines = file
            .into_iter()
            .flat_map(|file| BufReader::new(file).lines());
        Ok(lines.map(move |line| {
            let line = line.map_err(failed(&path))?;
            serde_json::from_str(&line).map_err(|e| {
                Failure::Failed(format!(
                    "{}: {e}: delete the file, and its fold is scored again",
                    path.display()
                ))
            })
        }))
    }

    /// Returns the failure for scores of a fold that lack a row.
    pub fn lacks_a_row(&self, fold: u32) -> Failure {
        Failure::Failed(format!(
            "{} lacks a row: delete the file, and its fold is scored again",
            self.scores(fold).display()
        ))
    }

    /// Removes the folder.
    pub fn remove(self) -> Result<(), Failure> {
        fs::remove_dir_all(&self.path).map_err(failed(&self.path))
    }
}

/// Writes the scores of a fold. They are used only if [`ScoreWriter::finish`] has completed them.
pub(super) struct ScoreWriter {
    file: SyncedFile,
    target: PathBuf,
}

impl ScoreWriter {
    pub fn add(&mut self, score: &FoldScore) -> Result<(), Failure> {
        self.file.json_line(score)
    }

    pub fn finish(self) -> Result<(), Failure> {
        self.file.move_to(&self.target)
    }
}
