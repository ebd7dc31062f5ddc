//! Metrics of the volume that holds the data directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::blocking::blocking;

/// Interval between two readings.
const INTERVAL: Duration = Duration::from_secs(15);

/// Size of a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Space {
    /// Bytes that a process without root rights may still write.
    free: u64,
    total: u64,
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
fn space(folder: &Path) -> std::io::Result<Space> {
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
}
