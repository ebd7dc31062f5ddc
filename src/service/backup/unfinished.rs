//! Folders of a backup that is not complete yet. Each has a locked file while its backup runs, so
//! that the next backup recognises and removes the folders of those that were killed. On a file
//! system without locks, no other backup removes a folder, because it cannot lock the file either.
//! There, a server that starts removes the folder with the links.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::service::artifacts::{IN_USE_FILE, Temporary, remove};
use crate::service::error::{Result, ServiceError, failed};

/// Beginning of the names of folders with the links of backups, in the folder of temporary files.
const LINKS_PREFIX: &str = "backup-";
/// End of the names of unfinished backups.
const PARTIAL_SUFFIX: &str = ".partial";

/// A folder that is removed on drop, and that no other backup removes before.
pub(super) struct Unfinished {
    folder: Temporary,
    /// The file [`IN_USE_FILE`], locked if the file system has locks.
    _in_use: File,
}

impl Unfinished {
    /// Creates and locks a folder for links in the folder `temporary` of a data directory.
    ///
    /// # Errors
    /// `ResourceExhausted` or `Internal` if the file system fails.
    pub fn for_links(temporary: &Path) -> Result<Unfinished> {
        Unfinished::create(
            temporary.join(format!("{LINKS_PREFIX}{}", Uuid::now_v7())),
            File::try_lock,
        )
    }

    /// Creates and locks a folder beside `target`, which becomes the backup.
    ///
    /// # Errors
    /// `InvalidArgument` if the target has no name; `ResourceExhausted` or `Internal` if the file
    /// system fails.
    pub fn beside(target: &Path) -> Result<Unfinished> {
        let name = target.file_name().ok_or_else(|| {
            let message = format!("{} has no name: name a new folder", target.display());
            ServiceError::invalid("DIR", message)
        })?;
        let partial = format!(
            ".{}.{}{PARTIAL_SUFFIX}",
            name.to_string_lossy(),
            Uuid::now_v7()
        );
        Unfinished::create(parent(target).join(partial), File::try_lock)
    }

    fn create(
        folder: PathBuf,
        lock: impl Fn(&File) -> std::result::Result<(), TryLockError>,
    ) -> Result<Unfinished> {
        fs::create_dir_all(&folder).map_err(|e| failed(&folder, e))?;
        let folder = Temporary(folder);
        // The file has its name only when it is locked, so that it is never found without its lock.
        let (unlocked, in_use) = (
            folder.0.join(format!("{IN_USE_FILE}.new")),
            folder.0.join(IN_USE_FILE),
        );
        let file = File::create(&unlocked).map_err(|e| failed(&unlocked, e))?;
        if let Err(e) = lock(&file) {
            tracing::debug!(folder = %folder.0.display(), error = %e, "a file cannot be locked");
        }
        // Even without a lock, the file is useful: if it is gone, somebody has removed the folder.
        fs::rename(&unlocked, &in_use).map_err(|e| failed(&unlocked, e))?;
        Ok(Unfinished {
            folder,
            _in_use: file,
        })
    }

    /// Returns the folder.
    pub fn path(&self) -> &Path {
        &self.folder.0
    }

    /// Returns true if nobody has removed the folder.
    pub fn is_intact(&self) -> bool {
        fs::exists(self.path().join(IN_USE_FILE)).unwrap_or(false)
    }

    /// Renames the folder to `target`.
    ///
    /// # Errors
    /// `Internal` if the file system fails; then the folder is removed.
    pub fn publish(self, target: &Path) -> Result<()> {
        fs::rename(self.path(), target).map_err(|e| failed(target, e))?;
        self.folder.persist();
        // The backup is complete now, with or without this empty file.
        if let Err(e) = remove(&target.join(IN_USE_FILE)) {
            tracing::warn!(
                backup = %target.display(),
                error = %e,
                "the file {IN_USE_FILE} of a complete backup cannot be removed"
            );
        }
        Ok(())
    }
}

/// Removes the folders with links that killed backups left in the folder of temporary files.
///
/// # Errors
/// `Internal` if the folder cannot be read.
pub(super) fn remove_abandoned_links(temporary: &Path) -> Result<()> {
    remove_abandoned(temporary, |name| name.starts_with(LINKS_PREFIX), remove)
}

/// Removes the unfinished folders of killed backups beside `target`, whatever their targets were:
/// the name of a backup is often its date.
///
/// # Errors
/// `Internal` if the folder of `target` cannot be read.
pub(super) fn remove_abandoned_backups(target: &Path) -> Result<()> {
    remove_abandoned(parent(target), is_partial, remove)
}

/// Returns true for `.NAME.UUID.partial`.
fn is_partial(name: &str) -> bool {
    let inner = name
        .strip_prefix('.')
        .and_then(|rest| rest.strip_suffix(PARTIAL_SUFFIX));
    inner
        .and_then(|inner| inner.rsplit_once('.'))
        .is_some_and(|(_, id)| Uuid::try_parse(id).is_ok())
}

/// Removes the abandoned folders among those whose names `is_ours` accepts. One that cannot be
/// removed, e.g. because it belongs to another user, stays.
fn remove_abandoned(
    folder: &Path,
    is_ours: impl Fn(&str) -> bool,
    remove: impl Fn(&Path) -> Result<()>,
) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|e| failed(folder, e))?,
    };
    for entry in entries {
        let entry = entry.map_err(|e| failed(folder, e))?;
        if !entry.file_name().to_str().is_some_and(&is_ours) {
            continue;
        }
        // A backup that is at work has locked its file.
        let in_use = File::open(entry.path().join(IN_USE_FILE));
        if in_use.is_ok_and(|file| file.try_lock().is_ok())
            && let Err(e) = remove(&entry.path())
        {
            tracing::warn!(
                folder = %entry.path().display(),
                error = %e,
                "the folder of a backup that was killed cannot be removed: remove it by hand"
            );
        }
    }
    Ok(())
}

/// Returns the folder of a path.
pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn left(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn folders_of_killed_backups_are_removed_and_those_of_running_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("2026-11-30");
        let running = Unfinished::beside(&target).unwrap();
        let links = Unfinished::for_links(dir.path()).unwrap();
        // A killed process leaves its folder, without a lock.
        for name in [
            ".2026-11-29.0193c8e4-7a3f-7000-8000-000000000000.partial",
            ".mine.partial",
            "backup-1",
            "upload",
        ] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join(IN_USE_FILE), "").unwrap();
        }
        // This one has no file to lock, so it may belong to something else.
        fs::create_dir(
            dir.path()
                .join(".x.0193c8e4-7a3f-7000-8000-000000000001.partial"),
        )
        .unwrap();
        remove_abandoned_backups(&target).unwrap();
        remove_abandoned_links(dir.path()).unwrap();
        assert_eq!(left(dir.path()).len(), 5, "{:?}", left(dir.path()));
        assert!(running.is_intact() && links.is_intact());
        drop(links);
        running.publish(&target).unwrap();
        assert_eq!(
            left(dir.path()),
            [
                ".mine.partial",
                ".x.0193c8e4-7a3f-7000-8000-000000000001.partial",
                "2026-11-30",
                "upload"
            ]
        );
        assert!(left(&target).is_empty());
        remove_abandoned_links(&dir.path().join("none")).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_removed_stops_no_backup() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["backup-1", "backup-2"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join(IN_USE_FILE), "").unwrap();
        }
        let tried = std::cell::RefCell::new(Vec::new());
        let denied = |path: &Path| {
            tried.borrow_mut().push(path.to_owned());
            Err(failed(path, io::ErrorKind::PermissionDenied.into()))
        };
        remove_abandoned(dir.path(), |_| true, denied).unwrap();
        assert_eq!(tried.into_inner().len(), 2);
    }

    #[test]
    fn without_locks_a_backup_notices_that_its_folder_was_removed() {
        let dir = tempfile::tempdir().unwrap();
        let no_locks = |_: &File| {
            let reason = io::Error::from(io::ErrorKind::Unsupported);
            Err(TryLockError::Error(reason))
        };
        let running = Unfinished::create(dir.path().join("backup-1"), no_locks).unwrap();
        assert!(running.is_intact());
        // A server does this when it starts.
        remove(running.path()).unwrap();
        assert!(!running.is_intact());
        let target = dir.path().join("complete");
        let running = Unfinished::create(dir.path().join("backup-2"), no_locks).unwrap();
        running.publish(&target).unwrap();
        assert!(left(&target).is_empty());
    }

    #[test]
    fn a_backup_notices_that_its_folder_was_removed() {
        let dir = tempfile::tempdir().unwrap();
        let running = Unfinished::beside(&dir.path().join("backup")).unwrap();
        remove(running.path()).unwrap();
        fs::create_dir(running.path()).unwrap();
        assert!(!running.is_intact());
    }
}
