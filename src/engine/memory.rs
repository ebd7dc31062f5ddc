//! Memory limits of devices and host, and the part that is free.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::api::EngineOptions;
use crate::model::device::ComputeDevice;

/// Host memory beside the base models, which runs on GPUs share. Clones share the counter.
#[derive(Clone, Debug)]
pub(super) struct HostMemory {
    limit: u64,
    in_use: Arc<AtomicU64>,
}

impl HostMemory {
    pub fn new(limit: u64) -> Self {
        HostMemory {
            limit,
            in_use: Arc::default(),
        }
    }

    /// Returns the bytes that the runs in progress leave free.
    pub fn left(&self) -> u64 {
        self.limit
            .saturating_sub(self.in_use.load(Ordering::Relaxed))
    }

    /// Returns true if runs may need `bytes` in total.
    pub fn allows(&self, bytes: u64) -> bool {
        bytes <= self.limit
    }

    /// Sets the total that the runs in progress need.
    pub fn set_in_use(&self, bytes: u64) {
        self.in_use.store(bytes, Ordering::Relaxed);
    }
}

/// Memory limit of the weights in the LRU cache and of the cached keys and values of generation:
/// the part of device and host memory that is left by the base models and the runs in progress.
#[derive(Clone, Debug)]
pub(super) struct Room {
    /// Bytes beside the base models, in the memory that the device computes in.
    device: u64,
    /// Part of these bytes that the run on this group of devices needs.
    run: Arc<AtomicU64>,
    host: HostMemory,
    /// Number of workers that share the host memory.
    workers: u64,
}

impl Room {
    pub fn new(device: u64, run: Arc<AtomicU64>, host: HostMemory, workers: usize) -> Self {
        Room {
            device,
            run,
            host,
            workers: workers.max(1) as u64,
        }
    }

    /// Returns a room without a limit.
    pub fn unlimited() -> Self {
        Room::new(u64::MAX, Arc::default(), HostMemory::new(u64::MAX), 1)
    }

    /// Reserves bytes for the run on this group of devices; 0 means that there is none.
    pub fn reserve_for_run(&self, bytes: u64) {
        self.run.store(bytes, Ordering::Relaxed);
    }

    /// Returns the maximum bytes of all cached weights, keys and values.
    pub fn bytes(&self) -> u64 {
        self.device
            .saturating_sub(self.run.load(Ordering::Relaxed))
            .min(self.host.left() / self.workers)
    }
}

/// Returns the memory limit of a device in bytes: of a GPU's own memory, or of the host's. A GPU
/// that is divided by MIG reports the memory of its slice.
pub(super) fn limit(options: &EngineOptions, device: &ComputeDevice) -> u64 {
    let Some((free, total)) = device.memory() else {
        return host_limit(options);
    };
    // A setting above the memory that is free now is used all the same: another process may free
    // memory later.
    let limit = match options.device_memory_limit {
        Some(set) => set,
        None => within(None, Some(free)),
    };
    let name = device.name();
    tracing::info!(
        device = name,
        limit_mib = limit >> 20,
        free_mib = free >> 20,
        total_mib = total >> 20,
        "memory limit of a GPU"
    );
    if limit > free {
        tracing::warn!(
            device = name,
            free_mib = free >> 20,
            "device_memory_limit is above the GPU's free memory: jobs may run out of memory"
        );
    }
    limit
}

/// Returns the host memory limit in bytes: the setting, or else nine tenths of the memory that this
/// process may use.
pub(super) fn host_limit(options: &EngineOptions) -> u64 {
    options
        .memory_limit
        .unwrap_or_else(|| within(None, HostMemoryOfProcess::read().usable()))
}

/// Returns a memory limit in bytes. `usable` is the memory that there is, `None` if it is not
/// known. A `setting` is lowered to it; without a setting the limit is nine tenths of it.
fn within(setting: Option<u64>, usable: Option<u64>) -> u64 {
    match (setting, usable) {
        (Some(limit), Some(usable)) => limit.min(usable),
        (Some(limit), None) => limit,
        (None, Some(usable)) => usable / 10 * 9,
        (None, None) => u64::MAX,
    }
}

/// Returns the limit on host memory for the setting `memory_limit`, and logs what it follows from.
/// A limit above the memory that this process may use is lowered to it: the kernel would kill the
/// process before the limit is reached.
pub fn host_limit_for(setting: Option<u64>) -> u64 {
    let memory = HostMemoryOfProcess::read();
    let limit = within(setting, memory.usable());
    let mib = |bytes: Option<u64>| bytes.map(|bytes| bytes >> 20);
    tracing::info!(
        limit_mib = limit >> 20,
        machine_mib = mib(memory.machine),
        container_mib = mib(memory.group),
        "limit on host memory"
    );
    if let Some(set) = setting.filter(|set| *set > limit) {
        tracing::warn!(
            memory_limit_mib = set >> 20,
            lowered_to_mib = limit >> 20,
            "memory_limit is lowered to the memory of the machine or the container"
        );
    }
    limit
}

/// Host memory in bytes that this process may use.
pub struct HostMemoryOfProcess {
    /// The machine's memory; `None` if it is not known.
    pub machine: Option<u64>,
    /// The limit of this process's control group, such as a container's; `None` if there is none.
    pub group: Option<u64>,
}

impl HostMemoryOfProcess {
    /// Asks the kernel.
    pub fn read() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).ok();
        HostMemoryOfProcess {
            machine: read("/proc/meminfo").and_then(|text| memory_total(&text)),
            group: read("/proc/self/cgroup")
                .and_then(|text| group_limit(Path::new("/sys/fs/cgroup"), &text)),
        }
    }

    /// Returns the machine's memory, or the control group's limit if that is lower.
    fn usable(&self) -> Option<u64> {
        self.machine.into_iter().chain(self.group).min()
    }
}

/// Returns `MemTotal` of /proc/meminfo in bytes.
fn memory_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with("MemTotal:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Returns the lowest memory limit of the control groups listed in /proc/self/cgroup, for version 2
/// (`0::/path`) and version 1 (`N:memory:/path`). `mount` is the folder where they are mounted.
/// Inside a container the process's own group often is mounted as the root, whatever the listed
/// path.
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
    // A number above any memory means no limit.
    limits.min().filter(|limit| *limit < 1 << 60)
}

/// Returns the lowest number in the files called `name` in a group's folder and its parents, up to
/// `root`.
fn lowest(root: PathBuf, path: &str, name: &str) -> Option<u64> {
    let group = root.join(path.trim_start_matches('/'));
    let folders = group
        .ancestors()
        .take_while(|folder| folder.starts_with(&root));
    // Without a limit the file has `max` or a number larger than any memory.
    let limits = folders.filter_map(|folder| {
        std::fs::read_to_string(folder.join(name))
            .ok()?
            .trim()
            .parse()
            .ok()
    });
    limits.min()
}

#[cfg(test)]
mod tests;
