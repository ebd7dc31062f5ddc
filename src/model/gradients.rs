//! Interface through which the backward pass accumulates gradients.

use super::params::ParamId;

/// Accumulates the gradients of a backward pass.
pub trait GradientSink {
    /// Returns a tensor's gradient as accumulated so far, row-major, to be added to. `None` if the
    /// tensor is not trained.
    fn get_mut(&mut self, id: ParamId) -> Option<&mut [f32]>;
}
