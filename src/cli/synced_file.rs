//! A file that exists only as a whole: it gets its name when its content is on disk.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::failure::Failure;

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
