//! Output of a file of prompts: standard output, or a file that gets its name when it is complete.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::cli::data::DataFiles;
use crate::cli::failure::{Failure, Outcome};
use crate::cli::output;
use crate::cli::synced_file::check_part;

/// End of the name of an output file that is not complete.
const PART_SUFFIX: &str = ".part";

/// The results of a file of prompts.
pub(super) enum Results {
    /// Lines on standard output.
    Printed,
    /// A file. The results are in `part` until all are there; if that is `None`, they are written
    /// to the target itself, which is a pipe or a device.
    File {
        target: PathBuf,
        part: Option<PathBuf>,
        file: File,
    },
}

fn unwritten(path: &Path, e: &std::io::Error) -> Failure {
    Failure::Failed(format!("--out {}: {e}", path.display()))
}

impl Results {
    /// Opens the output for the prompts in `data`.
    ///
    /// # Errors
    /// Returns a failure if the output is a file of prompts, if its `.part` file exists and is not
    /// of this command, or if it cannot be created.
    pub fn create(out: Option<&Path>, data: &DataFiles) -> Result<Self, Failure> {
        let Some(out) = out else {
            return Ok(Results::Printed);
        };
        // The target of a symbolic link is replaced, not the link.
        let target = out.canonicalize().unwrap_or_else(|_| out.to_owned());
        let is_special = fs::metadata(out).is_ok_and(|m| !m.is_file() && !m.is_dir());
        let part = (!is_special).then(|| {
            let mut name = target.clone().into_os_string();
            name.push(PART_SUFFIX);
            PathBuf::from(name)
        });
        let written = part.as_ref().unwrap_or(&target);
        if data.contains(&target) || data.contains(written) {
            return Err(Failure::Usage(format!(
                "--out {} would replace a file of --data: name another file",
                out.display()
            )));
        }
        if target.is_dir() {
            return Err(Failure::Usage(format!(
                "--out {} is a folder: name a file",
                out.display()
            )));
        }
        if let Some(part) = &part {
            check_part(part, "bradley generate", |row| {
                row.contains_key("samples") && row.contains_key("prompt_tokens")
            })?;
        }
        let file = File::create(written).map_err(|e| unwritten(written, &e))?;
        Ok(Results::File { target, part, file })
    }

    /// Writes a result.
    pub fn add(&mut self, line: &str) -> Outcome {
        match self {
            Results::Printed => output::write(line.as_bytes()),
            Results::File { target, file, .. } => file
                .write_all(line.as_bytes())
                .map_err(|e| unwritten(target, &e)),
        }
    }

    /// Flushes the file to disk and gives it its name.
    pub fn finish(self) -> Outcome {
        let Results::File {
            target,
            part: Some(part),
            file,
        } = self
        else {
            return Ok(());
        };
        file.sync_all()
            .and_then(|()| fs::rename(&part, &target))
            .map_err(|e| unwritten(&target, &e))
    }

    /// Adds to a failure where the `written` results before it are. A file without any is removed.
    pub fn interrupted(self, failure: Failure, written: usize) -> Failure {
        let Results::File {
            part: Some(part), ..
        } = self
        else {
            return failure;
        };
        if written == 0 {
            // Without results the file is of no use, and the next start replaces it.
            let _ = fs::remove_file(&part);
            return failure;
        }
        failure.with_remark(&format!(
            "{} has the first {written} results; the next start with this --out replaces it",
            part.display()
        ))
    }
}
