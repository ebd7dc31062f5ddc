//! The devices that run passes.

use std::sync::Arc;

use super::backend::PolicyView;
use super::cuda::Cuda;
use crate::compute::cpu::buffer::Buffer;
use crate::compute::cpu::gemm::Kernel;
pub use crate::compute::out_of_memory::{OutOfMemory, is_out_of_memory};
use crate::domain::training::Precision;

/// A device that runs a decoder's passes.
#[derive(Clone, Debug, Default)]
pub enum ComputeDevice {
    /// This machine's cores, with the kernels of [`crate::compute::cpu`].
    #[default]
    Cpu,
    /// An NVIDIA GPU. Builds without the feature `cuda` never construct this variant.
    Cuda(Arc<Cuda>),
}

/// A value of the setting `device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The CPU.
    Cpu,
    /// The GPU with this ordinal.
    Cuda(usize),
    /// Every GPU that can be opened, or the CPU if there is none.
    Auto,
}

impl DeviceChoice {
    /// Parses `cpu`, `cuda` (the first GPU), `cuda:N` or `auto`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "cpu" => Some(DeviceChoice::Cpu),
            "auto" => Some(DeviceChoice::Auto),
            "cuda" => Some(DeviceChoice::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")?
                .parse()
                .ok()
                .map(DeviceChoice::Cuda),
        }
    }

    /// Parses a comma-separated list of choices. `auto` must be the only entry, a GPU may be listed
    /// only once, and GPUs cannot be combined with the CPU: the score of a pair would depend on the
    /// device that happened to be free.
    pub fn parse_list(text: &str) -> Option<Vec<Self>> {
        let all: Vec<Self> = text
            .split(',')
            .map(|one| Self::parse(one.trim()))
            .collect::<Option<_>>()?;
        let cpus = all.iter().filter(|d| **d == DeviceChoice::Cpu).count();
        let gpus: std::collections::HashSet<_> = all
            .iter()
            .filter(|d| matches!(d, DeviceChoice::Cuda(_)))
            .map(|d| d.to_string())
            .collect();
        let fits = all.len() == 1 || cpus == all.len() || gpus.len() == all.len();
        fits.then_some(all)
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            DeviceChoice::Auto => f.write_str("auto"),
        }
    }
}

impl ComputeDevice {
    /// Opens the devices of a choice: one, unless it is [`DeviceChoice::Auto`].
    ///
    /// # Errors
    /// Returns the reason if the requested GPU cannot be opened.
    pub fn open_all(choice: DeviceChoice) -> Result<Vec<Self>, String> {
        match choice {
            DeviceChoice::Cpu => Ok(vec![ComputeDevice::Cpu]),
            DeviceChoice::Cuda(ordinal) => Ok(vec![Self::cuda(ordinal)?]),
            DeviceChoice::Auto => Ok(Self::all()),
        }
    }

    /// Returns the reason why [`DeviceChoice::Auto`] has chosen the CPU.
    pub fn no_gpu_reason() -> String {
        Cuda::absence()
    }

    /// Opens the device of a choice, the first one if there are several.
    ///
    /// # Errors
    /// Fails in the same cases as [`ComputeDevice::open_all`].
    pub fn open(choice: DeviceChoice) -> Result<Self, String> {
        Ok(Self::open_all(choice)?.remove(0))
    }

    fn cuda(ordinal: usize) -> Result<Self, String> {
        Cuda::open(ordinal)
            .map(ComputeDevice::Cuda)
            .map_err(|e| e.to_string())
    }

    fn all() -> Vec<Self> {
        let found: Vec<Self> = Cuda::open_all()
            .into_iter()
            .map(ComputeDevice::Cuda)
            .collect();
        if found.is_empty() {
            vec![ComputeDevice::Cpu]
        } else {
            found
        }
    }

    /// Returns true for the CPU.
    pub fn is_cpu(&self) -> bool {
        matches!(self, ComputeDevice::Cpu)
    }

    /// Returns a name for everything about the device that affects rounding. On the CPU, GEMMs use
    /// `kernel`.
    pub fn arithmetic(&self, kernel: Kernel) -> String {
        match self {
            ComputeDevice::Cpu => kernel.arithmetic(),
            ComputeDevice::Cuda(cuda) => cuda.arithmetic(),
        }
    }

    /// Returns `cpu` or `cuda:N`.
    pub fn name(&self) -> String {
        match self {
            ComputeDevice::Cpu => "cpu".into(),
            ComputeDevice::Cuda(cuda) => cuda.name(),
        }
    }

    /// Returns the width of the widest attention head that the kernels support, in elements. `None`
    /// means no limit.
    pub fn max_head_dim(&self) -> Option<usize> {
        match self {
            ComputeDevice::Cpu => None,
            ComputeDevice::Cuda(cuda) => Some(cuda.max_head_dim()),
        }
    }

    /// Returns the free and the total memory of the device, in bytes. Returns `None` for the CPU,
    /// which has no memory of its own, and for a GPU whose driver does not say.
    pub fn memory(&self) -> Option<(u64, u64)> {
        match self {
            ComputeDevice::Cpu => None,
            ComputeDevice::Cuda(cuda) => cuda.memory(),
        }
    }

    /// Returns the peak of the device's own memory in use since the last trim, in bytes. Returns
    /// `None` for the CPU.
    pub fn peak_memory(&self) -> Option<u64> {
        match self {
            ComputeDevice::Cpu => None,
            ComputeDevice::Cuda(cuda) => Some(cuda.peak_bytes()),
        }
    }

    /// Returns true if the device has failed permanently. Only a new process can use it again.
    pub fn is_lost(&self) -> bool {
        match self {
            ComputeDevice::Cpu => false,
            ComputeDevice::Cuda(cuda) => cuda.is_lost(),
        }
    }

    /// Waits until the device has finished all submitted work. On the CPU this does nothing,
    /// because calls are synchronous.
    pub fn wait(&self) {
        if let ComputeDevice::Cuda(cuda) = self {
            cuda.wait();
        }
    }

    /// Invalidates copies of a policy's own weights after they were changed in place.
    pub fn changed(&self, policy: PolicyView<'_>) {
        if let ComputeDevice::Cuda(cuda) = self {
            cuda.changed(policy);
        }
    }

    /// Frees the memory of a run that has ended. `precision` is the server's precision: device
    /// copies of weights in other precisions are dropped.
    pub fn end_of_run(&self, precision: Precision) {
        if let ComputeDevice::Cuda(cuda) = self {
            cuda.end_of_run(precision);
        }
        self.trim();
    }

    /// Returns unused memory to the operating system and to the GPU's driver, including device
    /// copies of weights that no longer exist on the host.
    pub fn trim(&self) {
        Buffer::trim();
        if let ComputeDevice::Cuda(cuda) = self
            && let Err(e) = cuda.trim()
        {
            tracing::warn!(error = %e, "unused memory of the GPU could not be freed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert_eq!(DeviceChoice::parse("cpu"), Some(DeviceChoice::Cpu));
        assert_eq!(DeviceChoice::parse("auto"), Some(DeviceChoice::Auto));
        assert_eq!(DeviceChoice::parse("cuda"), Some(DeviceChoice::Cuda(0)));
        assert_eq!(DeviceChoice::parse("cuda:3"), Some(DeviceChoice::Cuda(3)));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "CPU"] {
            assert_eq!(DeviceChoice::parse(wrong), None, "{wrong}");
        }
        let all = |text| DeviceChoice::parse_list(text).map(|all| all.len());
        for (text, devices) in [
            ("cpu", 1),
            ("auto", 1),
            ("cuda:0,cuda:2", 2),
            ("cuda, cuda:1", 2),
            ("cpu,cpu", 2),
        ] {
            assert_eq!(all(text), Some(devices), "{text}");
        }
        for wrong in [
            "",
            "cpu,",
            "cpu,cuda:0",
            "auto,cpu",
            "cuda:0,auto",
            "auto,auto",
            "cuda,cuda:0",
        ] {
            assert_eq!(all(wrong), None, "{wrong}");
        }
    }
}
