//! Free space of the volume that holds the data directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::blocking::blocking;

/// Interval between two readings.
const INTERVAL: Duration = Duration::from_secs(15);

/// Size of a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that a process without root rights may still write.
    pub free: u64,
    /// All bytes; 0 on a file system that does not tell its size.
    pub total: u64,
}

impl Space {
    /// Returns true if less than a tenth is free, as the alert BradleyDiskAlmostFull has it.
    pub fn is_almost_full(self) -> bool {
        self.free.saturating_mul(10) < self.total
    }
}

/// Updates the gauges forever. This is a task of its own, because on a network volume that hangs a
/// reading does not return.
pub(super) async fn measure(data_dir: PathBuf) {
    loop {
        let folder = data_dir.clone();
        match blocking(move || space(&folder)).await {
            Ok(Ok(space)) => {
                metrics::gauge!("bradley_data_volume_free_bytes").set(space.free as f64);
                metrics::gauge!("bradley_data_volume_bytes").set(space.total as f64);
            }
            Ok(Err(e)) => {
                tracing::debug!(error = %e, "the free space of data_dir cannot be read");
            }
            Err(e) => tracing::debug!(error = %e, "the free space of data_dir cannot be read"),
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Reads the size of the file system that holds `folder`.
///
/// # Errors
/// Fails if the folder does not exist or the file system does not answer.
pub fn space(folder: &Path) -> std::io::Result<Space> {
    let found = rustix::fs::statvfs(folder)?;
    Ok(Space {
        free: found.f_bavail.saturating_mul(found.f_frsize),
        total: found.f_blocks.saturating_mul(found.f_frsize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_on_a_volume_with_a_size() {
        let folder = tempfile::tempdir().unwrap();
        let space = space(folder.path()).unwrap();
        assert!(space.total > 0 && space.free <= space.total, "{space:?}");
        assert!(super::space(&folder.path().join("missing")).is_err());
    }

    #[test]
    fn a_volume_with_less_than_a_tenth_free_is_almost_full() {
        let space = |free, total| Space { free, total };
        assert!(space(0, 1000).is_almost_full() && space(99, 1000).is_almost_full());
        assert!(!space(100, 1000).is_almost_full() && !space(0, 0).is_almost_full());
    }
}
