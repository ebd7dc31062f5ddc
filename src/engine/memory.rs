//! How much memory the devices and the machine have, and what is left of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::api::EngineOptions;
use crate::model::device::ComputeDevice;

/// The machine's memory that the base models leave, as far as runs on GPUs share it. Clones share
/// the count.
#[derive(Clone, Debug)]
pub(super) struct HostMemory {
    limit: u64,
    in_use: Arc<AtomicU64>,
}

impl HostMemory {
    pub fn new(limit: u64) -> Self {
        HostMemory { limit, in_use: Arc::default() }
    }

    /// Bytes that the runs in progress leave.
    pub fn left(&self) -> u64 {
        self.limit.saturating_sub(self.in_use.load(Ordering::Relaxed))
    }

    /// Returns true if runs may need `bytes` together.
    pub fn allows(&self, bytes: u64) -> bool {
        bytes <= self.limit
    }

    /// Notes what the runs in progress need together.
    pub fn set_in_use(&self, bytes: u64) {
        self.in_use.store(bytes, Ordering::Relaxed);
    }
}

/// Bytes that loaded weights may take: what the base models leave of the device's and of the
/// machine's memory, less what runs in progress need.
#[derive(Clone, Debug)]
pub(super) struct Room {
    /// Bytes that the base models leave in the memory that the device's passes use.
    device: u64,
    /// Bytes of these that the run on the device, or on its group of devices, needs.
    run: Arc<AtomicU64>,
    host: HostMemory,
    /// Workers that share the machine's memory.
    workers: u64,
}

impl Room {
    pub fn new(device: u64, run: Arc<AtomicU64>, host: HostMemory, workers: usize) -> Self {
        Room { device, run, host, workers: workers.max(1) as u64 }
    }

    /// Without a limit.
    pub fn unlimited() -> Self {
        Room::new(u64::MAX, Arc::default(), HostMemory::new(u64::MAX), 1)
    }

    /// Reserves bytes for the run of this group of devices; 0 when there is none.
    pub fn reserve_for_run(&self, bytes: u64) {
        self.run.store(bytes, Ordering::Relaxed);
    }

    /// Bytes that the weights may take in all.
    pub fn bytes(&self) -> u64 {
        self.device
            .saturating_sub(self.run.load(Ordering::Relaxed))
            .min(self.host.left() / self.workers)
    }
}

/// Bytes that a device's passes may need: of a GPU's own memory, or of the machine's.
pub(super) fn limit(options: &EngineOptions, device: &ComputeDevice) -> u64 {
    match device.memory() {
        Some((free, _)) => options.device_memory_limit.unwrap_or(free / 10 * 9),
        None => host_limit(options),
    }
}

/// Bytes of the machine's memory that may be needed: those of the options, else nine tenths of what
/// this process may use.
pub(super) fn host_limit(options: &EngineOptions) -> u64 {
    options.memory_limit.or_else(|| usable().map(|bytes| bytes / 10 * 9)).unwrap_or(u64::MAX)
}

/// The machine's memory, or the limit of this process's control group where that is lower.
fn usable() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| memory_total(&text));
    let group =
        read("/proc/self/cgroup").and_then(|text| group_limit(Path::new("/sys/fs/cgroup"), &text));
    machine.into_iter().chain(group).min()
}

/// `MemTotal` of /proc/meminfo, in bytes.
fn memory_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with("MemTotal:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Returns the lowest memory limit along the paths of the control groups in /proc/self/cgroup, of
/// version 2 (`0::/path`) and of version 1 (`N:memory:/path`). `mount` is where they are mounted. A
/// container often sees its own group as the root, whatever the path says.
fn group_limit(mount: &Path, groups: &str) -> Option<u64> {
    let limits = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        match controllers {
            "" => lowest(mount.to_owned(), path, "memory.max"),
            _ if controllers.split(',').any(|c| c == "memory") => {
                lowest(mount.join("memory"), path, "memory.limit_in_bytes")
            }
            _ => None,
        }
    });
    limits.min()
}

/// Returns the lowest number in the files called `name` in a group's folder and in those above it,
/// up to `root`.
fn lowest(root: PathBuf, path: &str, name: &str) -> Option<u64> {
    let group = root.join(path.trim_start_matches('/'));
    let folders = group.ancestors().take_while(|folder| folder.starts_with(&root));
    // A group without a limit says `max`, or has a number beyond all memory.
    let limits = folders
        .filter_map(|folder| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok());
    limits.min()
}

#[cfg(test)]
mod tests;
