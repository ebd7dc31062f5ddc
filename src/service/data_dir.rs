//! The data directory as a whole: only one process uses it, and only when it is complete.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use super::error::{Result, ServiceError, failed};
use crate::domain::reason::Reason;

/// File that the process which uses the data directory has locked.
pub(super) const LOCK_FILE: &str = "bradley.lock";
/// Folder with the files of a restore until it is complete.
pub(super) const RESTORING_FOLDER: &str = "restoring";

/// Locks the data directory for this process.
///
/// # Errors
/// `FailedPrecondition` (`DATA_DIR_IN_USE`) if another process has locked it.
pub(super) fn lock(root: &Path) -> Result<File> {
    let path = root.join(LOCK_FILE);
    let file = File::create(&path).map_err(|e| failed(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let message = format!(
                "a server or a command of Bradley already uses the data directory {}: wait for \
                 its end or stop it, or name another folder",
                root.display()
            );
            Err(ServiceError::FailedPrecondition {
                reason: Reason::DataDirInUse,
                message,
            })
        }
        Err(TryLockError::Error(e)) => Err(failed(&path, e)),
    }
}

/// Checks that no other process uses the data directory, which need not exist yet. Nothing stays
/// locked.
///
/// # Errors
/// `FailedPrecondition` (`DATA_DIR_IN_USE`) if another process has locked it.
pub(super) fn check_unused(root: &Path) -> Result<()> {
    // Other problems with the folder are found when it is opened.
    if root.join(LOCK_FILE).exists() {
        lock(root)?;
    }
    Ok(())
}

/// Checks that no restore into the data directory was interrupted.
///
/// # Errors
/// `FailedPrecondition` (`DATA_DIR_IN_USE`) if one was.
pub(super) fn check_restored(root: &Path) -> Result<()> {
    let folder = root.join(RESTORING_FOLDER);
    if !fs::exists(&folder).map_err(|e| failed(&folder, e))? {
        return Ok(());
    }
    let message = format!(
        "a restore into {} was interrupted: empty this folder, and run bradley restore again",
        root.display()
    );
    Err(ServiceError::FailedPrecondition {
        reason: Reason::DataDirInUse,
        message,
    })
}
