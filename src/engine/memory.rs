//! Memory accounting: what the devices and the machine have, and what a run needs of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::api::{EngineError, EngineOptions, WeightsRef};
use super::residents::{Bases, wants_exact, weight_bytes};
use crate::domain::training::{Method, Precision, TrainingSpec};
use crate::model::config::ModelConfig;
use crate::model::device::ComputeDevice;
use crate::train::estimate::{self, Lengths, Memory};

/// Bytes that a run needs besides the base models and its plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extra {
    /// In the memory that its passes use: a GPU's own, or on the CPU the machine's.
    pub device: u64,
    /// In the machine's memory, where the device has its own; 0 on the CPU.
    pub host: u64,
}

/// Bytes that a run needs besides the base models. The run carries them through the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// [`Extra::device`].
    pub extra: u64,
    /// With the leanest plan on its device, `extra` included.
    pub minimum: u64,
    /// In the machine's memory, where the device has its own; 0 on the CPU.
    pub host: u64,
}

/// Returns what a run needs besides the base models and its plan. Admission, the estimate and the
/// start of a run all use this function, so that a run plans with what was granted.
pub(super) fn extra(
    bases: &Bases,
    model: &str,
    reference: Option<&WeightsRef>,
    spec: &TrainingSpec,
    lengths: Lengths,
    memory: Memory,
) -> Result<Extra, EngineError> {
    let server = bases.precision();
    let precision = spec.precision.unwrap_or(server);
    let is_exact_run = wants_exact(spec, server);
    let base = bases.get(model)?;
    let f32_of = |parameters: u64| parameters * weight_bytes(Precision::F32);
    let (mut host, mut gpu, mut activations) = (0, 0, 0);

    // A LoRA policy's frozen weights, if those in memory are rounded and the run's must not be.
    // A fully trained policy has all its weights in the plan.
    let reads_base_again = matches!(spec.method, Method::Lora(_)) && is_exact_run && !base.is_exact;
    if reads_base_again {
        host += f32_of(base.info.parameters);
    }
    // A GPU has the base model in the run's precision, too: for the policy, the reference, or scoring.
    if precision != server {
        gpu += base.info.parameters * weight_bytes(precision);
    }

    if let Some((weights, id)) = reference.filter(|_| spec.dpo.has_reference(true)).and_then(|w| Some((w, w.model()?))) {
        let other = bases.get(id)?;
        let parameters = other.info.parameters;
        let is_moving = spec.dpo.reference_sync.is_some();
        let has_own_weights = is_moving || matches!(weights, WeightsRef::Full { .. } | WeightsRef::StoredReference { .. });
        let shares_policy_base = id == model && reads_base_again;
        host += if is_moving {
            // While the policy is mixed in, the old and the new weights are both there.
            2 * f32_of(parameters)
        } else if has_own_weights {
            parameters * weight_bytes(if is_exact_run { Precision::F32 } else { server })
        } else if is_exact_run && !other.is_exact && !shares_policy_base {
            f32_of(parameters)
        } else {
            0
        };
        if has_own_weights || (id != model && precision != server) {
            gpu += parameters * weight_bytes(precision);
        }
        activations = more_activations(&other.policy.config, &base.policy.config, spec, lengths);
    }
    Ok(match memory {
        Memory::Host => Extra { device: host + activations, host: 0 },
        Memory::Gpu => Extra { device: gpu + activations, host },
    })
}

/// Bytes of activations that scoring a row on the reference's model needs beyond those on the
/// policy's, which the plan counts.
fn more_activations(reference: &ModelConfig, policy: &ModelConfig, spec: &TrainingSpec, lengths: Lengths) -> u64 {
    let row_tokens = lengths.longest.max(spec.batch.row_tokens.min(lengths.micro_batch));
    estimate::scoring(reference, row_tokens).saturating_sub(estimate::scoring(policy, row_tokens))
}

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
    /// What the base models leave of the memory that the device's passes use.
    device: u64,
    /// What the run on the device, or on its group of devices, needs of that.
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
        self.device.saturating_sub(self.run.load(Ordering::Relaxed)).min(self.host.left() / self.workers)
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
    let group = read("/proc/self/cgroup").and_then(|text| group_limit(Path::new("/sys/fs/cgroup"), &text));
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
            _ if controllers.split(',').any(|c| c == "memory") => lowest(mount.join("memory"), path, "memory.limit_in_bytes"),
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
    let limits = folders.filter_map(|folder| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok());
    limits.min()
}

#[cfg(test)]
mod tests;
