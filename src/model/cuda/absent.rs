//! Stands in for `cuda.rs` in builds without the feature `cuda`.
//!
//! It has the same items, as far as other modules use them. The types have no values, so code that
//! runs passes on a GPU compiles in every build and is never reached in this one.

pub mod sizes;

use std::sync::Arc;

use candle_core::{Error, Result};

use crate::compute::cpu::head::HeadOutput;
use crate::domain::training::Precision;
use crate::model::backend::{Keep, PolicyView};
use crate::model::params::ParamId;
use crate::model::row::PreparedRow;

/// A GPU; never opened in this build.
#[derive(Debug)]
pub enum Cuda {}

/// A row after its forward pass on a GPU.
#[derive(Debug)]
pub enum DeviceTape {}

/// Gradients on a GPU.
#[derive(Debug)]
pub enum GradientBuffers {}

impl Cuda {
    /// Refuses.
    ///
    /// # Errors
    /// Always: this build has no GPU support.
    pub fn open(_ordinal: usize) -> Result<Arc<Self>> {
        Err(Error::Msg("this build has no GPU support: build it with --features cuda".into()))
    }

    /// Returns no GPU.
    pub fn open_all() -> Vec<Arc<Self>> {
        Vec::new()
    }

    /// Returns `cuda:N`.
    pub fn name(&self) -> String {
        match *self {}
    }

    /// Names what decides the last bits of its results.
    pub fn arithmetic(&self) -> String {
        match *self {}
    }

    /// Returns the widest attention head that the kernels compute with.
    pub fn max_head_dim(&self) -> usize {
        match *self {}
    }

    /// Returns the bytes of memory that are free, and all bytes.
    pub fn memory(&self) -> Option<(u64, u64)> {
        match *self {}
    }

    /// Returns the most bytes of memory that were in use at one time.
    pub fn peak_bytes(&self) -> u64 {
        match *self {}
    }

    /// Returns whether it failed for good.
    pub fn is_lost(&self) -> bool {
        match *self {}
    }

    /// Waits until it has done what it was given.
    pub fn wait(&self) {
        match *self {}
    }

    /// Returns unused memory to the driver.
    pub fn trim(&self) -> Result<()> {
        match *self {}
    }

    /// Tells that a policy's own weights were changed in place.
    pub fn changed(&self, _policy: PolicyView<'_>) {
        match *self {}
    }

    /// Forgets the weights that only a run that has ended used.
    pub fn end_of_run(&self, _precision: Precision) {
        match *self {}
    }

    /// Returns zero gradients for tensors of these sizes.
    pub fn gradients(
        &self,
        _sizes: impl IntoIterator<Item = (ParamId, usize)>,
    ) -> Result<GradientBuffers> {
        match *self {}
    }

    /// Returns the log-probs of the row's completion tokens.
    pub fn log_probs(
        &self,
        _policy: PolicyView<'_>,
        _row: &PreparedRow,
        _yield_point: &mut dyn FnMut(),
    ) -> Result<Vec<f32>> {
        match *self {}
    }

    /// Runs the row forward.
    pub fn forward(
        &self,
        _policy: PolicyView<'_>,
        _row: &PreparedRow,
        _keep: Keep,
        _yield_point: &mut dyn FnMut(),
    ) -> Result<DeviceTape> {
        match *self {}
    }

    /// Runs the row backward.
    pub fn backward(
        &self,
        _policy: PolicyView<'_>,
        _row: &PreparedRow,
        _tape: DeviceTape,
        _upstream: &[f32],
        _gradients: &mut GradientBuffers,
        _yield_point: &mut dyn FnMut(),
    ) -> Result<()> {
        match *self {}
    }
}

impl DeviceTape {
    /// Returns what came out of the head.
    pub fn output(&self) -> &HeadOutput {
        match *self {}
    }
}

impl GradientBuffers {
    /// Sets all to zero.
    pub fn clear(&self) -> Result<()> {
        match *self {}
    }

    /// Copies a tensor's sum to the host.
    pub fn download(&self, _id: ParamId, _to: &mut [f32]) -> Result<()> {
        match *self {}
    }
}
