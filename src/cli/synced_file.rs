//! A file that exists only as a whole: it gets its name when its content is on disk.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::failure::{Failure, Outcome};

/// Maximum number of bytes of a line that is read to find out who has written a file.
const MAX_FIRST_LINE: u64 = 64 << 20;

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Failure {
    move |e| Failure::Failed(format!("{}: {e}", path.display()))
}

/// Returns the folder of a file; `.` if its path has none.
pub(super) fn parent(out: &Path) -> &Path {
    match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Checks that no file is at the temporary name `part` of an output, or that an interrupted run of
/// `command` has left it: then it is empty, or its first line is an object that `is_own` knows, or
/// it is the beginning of such a line.
///
/// # Errors
/// Returns a failure if the file is of somebody else, or cannot be read.
pub(super) fn check_part(
    part: &Path,
    command: &str,
    is_own: impl Fn(&Map<String, Value>) -> bool,
) -> Outcome {
    let is_file = match fs::metadata(part) {
        Ok(metadata) => metadata.is_file(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(part)(e)),
    };
    if is_file {
        let file = File::open(part).map_err(failed(part))?;
        let length = file.metadata().map_err(failed(part))?.len();
        let mut line = Vec::new();
        BufReader::new(file.take(MAX_FIRST_LINE))
            .read_until(b'\n', &mut line)
            .map_err(failed(part))?;
        let is_known = match serde_json::from_slice::<Map<String, Value>>(&line) {
            Ok(row) => is_own(&row),
            // The program was killed while it wrote the first row.
            Err(e) => e.is_eof() && line.starts_with(b"{") && line.len() as u64 == length,
        };
        if line.is_empty() || is_known {
            return Ok(());
        }
    }
    Err(Failure::Usage(format!(
        "{} is not of {command}, which would replace it: remove it, or name another file with \
         --out",
        part.display()
    )))
}

/// A file that is written under a temporary name, and gets its own when it is on disk.
pub(super) struct SyncedFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl SyncedFile {
    pub fn create(path: PathBuf) -> Result<Self, Failure> {
        let file = File::create(&path).map_err(failed(&path))?;
        Ok(SyncedFile {
            path,
            file: BufWriter::new(file),
        })
    }

    /// Writes a value as a line.
    pub fn json_line(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let path = &self.path;
        serde_json::to_writer(&mut self.file, value)
            .map_err(|e| failed(path)(e.into()))
            .and_then(|()| self.file.write_all(b"\n").map_err(failed(path)))
    }

    /// Writes what is buffered, so that others can read it.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.file.flush().map_err(failed(&self.path))
    }

    /// Flushes the file to disk and gives it its name.
    pub fn move_to(mut self, target: &Path) -> Result<(), Failure> {
        let path = &self.path;
        self.file.flush().map_err(failed(path))?;
        self.file.get_ref().sync_all().map_err(failed(path))?;
        fs::rename(path, target).map_err(failed(target))?;
        // The rename is on disk when the folder is.
        let folder = parent(target);
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(failed(folder))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_file_is_replaced_only_if_it_is_of_the_same_command() {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("out.part");
        let check = || check_part(&part, "bradley pairs", |row| row.contains_key("generated"));
        check().unwrap();
        for own in ["", "{\"generated\": {}}\n{\"gen", "{\"generated\": {\"te"] {
            fs::write(&part, own).unwrap();
            check().unwrap();
        }
        for foreign in [
            "mine",
            "{\"a\": 1}\n{\"generated\": {}}\n",
            "{\"a\": 1}",
            "{\n\"a\": 1}",
            "[]\n",
            "\n",
        ] {
            fs::write(&part, foreign).unwrap();
            let e = check().unwrap_err();
            let said = "out.part is not of bradley pairs, which would replace it: remove it";
            assert!(e.message().contains(said), "{}", e.message());
        }
        fs::remove_file(&part).unwrap();
        fs::create_dir(&part).unwrap();
        assert!(check().is_err());
    }
}
