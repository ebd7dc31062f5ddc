//! Replaces `cuda.rs` in builds without the feature `cuda`.
//!
//! It defines the items of `cuda.rs` that other modules use. The types cannot be constructed, so
//! code that runs passes on a GPU compiles in every build and is never reached in this one.

pub mod sizes;

pub use self::{
    AbsentGpu as Cuda, AbsentGradientBuffers as GradientBuffers, AbsentTape as DeviceTape,
};

use std::sync::Arc;

use candle_core::{Error, Result};

use crate::compute::cpu::head::HeadOutput;
use crate::domain::training::Precision;
use crate::model::backend::{PolicyView, SavePolicy};
use crate::model::params::ParamId;
use crate::model::row::PreparedRow;

/// A GPU. This build cannot open one.
#[derive(Debug)]
pub enum AbsentGpu {}

/// Result of a forward pass over a row on a GPU.
#[derive(Debug)]
pub enum AbsentTape {}

/// Gradients on a GPU.
#[derive(Debug)]
pub enum AbsentGradientBuffers {}

impl AbsentGpu {
    /// Returns an error.
    ///
    /// # Errors
    /// Always fails, because this build has no GPU support.
    pub fn open(_ordinal: usize) -> Result<Arc<Self>> {
        Err(Error::Msg(
            "this build has no GPU support: build it with --features cuda".into(),
        ))
    }

    /// Returns an empty list.
    pub fn open_all() -> Vec<Arc<Self>> {
        Vec::new()
    }

    /// Returns the reason why [`Self::open_all`] opens no GPU.
    pub fn absence() -> String {
        "this build has no GPU support".to_owned()
    }

    /// Returns `cuda:N`.
    pub fn name(&self) -> String {
        match *self {}
    }

    /// Returns a name for everything that affects rounding.
    pub fn arithmetic(&self) -> String {
        match *self {}
    }

    /// Returns the width of the widest attention head that the kernels support, in elements.
    pub fn max_head_dim(&self) -> usize {
        match *self {}
    }

    /// Returns the free and the total memory, in bytes.
    pub fn memory(&self) -> Option<(u64, u64)> {
        match *self {}
    }

    /// Returns the peak of the memory in use since the last trim, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        match *self {}
    }

    /// Returns true if the GPU has failed permanently.
    pub fn is_lost(&self) -> bool {
        match *self {}
    }

    /// Waits until the GPU has finished all submitted work.
    pub fn wait(&self) {
        match *self {}
    }

    /// Returns unused memory to the driver.
    pub fn trim(&self) -> Result<()> {
        match *self {}
    }

    /// Drops the copies of a policy's own weights after they were changed in place.
    pub fn changed(&self, _policy: PolicyView<'_>) {
        match *self {}
    }

    /// Drops the copies of weights that only an ended run used.
    pub fn end_of_run(&self, _precision: Precision) {
        match *self {}
    }

    /// Allocates gradients of zero for tensors of these sizes, in elements.
    pub fn gradients(
        &self,
        _sizes: impl IntoIterator<Item = (ParamId, usize)>,
    ) -> Result<AbsentGradientBuffers> {
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
        _save: SavePolicy,
        _yield_point: &mut dyn FnMut(),
    ) -> Result<AbsentTape> {
        match *self {}
    }

    /// Runs the row backward.
    pub fn backward(
        &self,
        _policy: PolicyView<'_>,
        _row: &PreparedRow,
        _tape: AbsentTape,
        _upstream: &[f32],
        _gradients: &mut AbsentGradientBuffers,
        _yield_point: &mut dyn FnMut(),
    ) -> Result<()> {
        match *self {}
    }
}

impl AbsentTape {
    /// Returns the output of the head.
    pub fn output(&self) -> &HeadOutput {
        match *self {}
    }
}

impl AbsentGradientBuffers {
    /// Sets all gradients to zero.
    pub fn clear(&self) -> Result<()> {
        match *self {}
    }

    /// Copies the accumulated gradient of a tensor to the host.
    pub fn download(&self, _id: ParamId, _to: &mut [f32]) -> Result<()> {
        match *self {}
    }
}
